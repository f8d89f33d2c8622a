"""Late merging written token by token in fp64, from its definition, sharing no code with `dmc`."""

from __future__ import annotations

import math

import torch

from tests.functional.reference import merge_loop, rotate_one


def late_loop(query, key, value, alpha, omega, starts, *, window, rotated):
    """Soft late merging query by query over recent tokens and intermediate states; fp64, differentiable."""
    batch, query_heads, tokens, size = query.shape
    heads = key.shape[1]
    keys, _ = merge_loop(key, alpha, omega, starts)
    values, _ = merge_loop(value, alpha, omega, starts)
    turn = (lambda x, at: rotate_one(x, at)) if rotated else (lambda x, at: x)
    rows = []
    for b in range(batch):
        for g in range(query_heads):
            h = g // (query_heads // heads)
            for i in range(tokens):
                q = turn(query[b, g, i], i)
                first = max(t for t in range(i + 1) if t == 0 or bool(starts[b, t]))
                scores, seen = [], []
                for j in range(first, i + 1):
                    if i - j <= window:
                        scores.append((q * turn(key[b, h, j], j)).sum() / math.sqrt(size))
                        seen.append(value[b, h, j])
                    else:
                        score = (q * turn(keys[b, h, j], j)).sum() / math.sqrt(size)
                        if j < i - window - 1:
                            score = score + torch.log(1 - alpha[b, h, j + 1])
                        scores.append(score)
                        seen.append(values[b, h, j])
                rows.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(seen))
    return torch.stack(rows).view(batch, query_heads, tokens, size)


def late_cache(query, key, value, alpha, omega, *, window, rotated):
    """The cache of one sequence, token by token: ring, accumulating entry, final entries; alpha in {0, 1}.

    Returns (out [Hq, T, D], entries of each head [H] in the order final + accumulating + ring).
    """
    query_heads, tokens, size = query.shape
    heads = key.shape[0]
    out, lengths = torch.zeros_like(query), []
    turn = (lambda x, at: rotate_one(x, at)) if rotated else (lambda x, at: x)
    for h in range(heads):
        ring, final, accumulating = [], [], None  # ring: positions; final: (key, value); accumulating: [k, v, z, newest]
        for t in range(tokens):
            ring.append(t)
            if len(ring) > window + 1:
                old = ring.pop(0)
                if accumulating is not None and alpha[h, old] == 1:
                    k, v, z, _ = accumulating
                    w = omega[h, old]
                    accumulating = [(z * k + w * key[h, old]) / (z + w), (z * v + w * value[h, old]) / (z + w), z + w, old]
                else:
                    if accumulating is not None:
                        final.append((turn(accumulating[0], accumulating[3]), accumulating[1]))
                    accumulating = [key[h, old], value[h, old], omega[h, old], old]
            entries = list(final)
            if accumulating is not None:
                entries.append((turn(accumulating[0], accumulating[3]), accumulating[1]))
            entries += [(turn(key[h, j], j), value[h, j]) for j in ring]
            for g in range(h * query_heads // heads, (h + 1) * query_heads // heads):
                scores = torch.stack([e[0] for e in entries]) @ turn(query[g, t], t) / math.sqrt(size)
                out[g, t] = torch.softmax(scores, 0) @ torch.stack([e[1] for e in entries])
        lengths.append(len(final) + (accumulating is not None) + len(ring))
    return out, torch.tensor(lengths)
