"""DMC written token by token in fp64 NumPy-style loops, from the paper, sharing no code with `dmc`."""

from __future__ import annotations

import math

import torch


def merge_loop(x, alpha, omega, starts):
    """Eq. 9 one token at a time. x [B,H,T,D], alpha/omega [B,H,T], starts [B,T] → (merged, z)."""
    batch, heads, tokens, _ = x.shape
    merged, weights = [], []
    for t in range(tokens):
        fresh = torch.tensor([bool(starts[b, t]) or t == 0 for b in range(batch)])[:, None]
        a = torch.where(fresh, torch.zeros_like(alpha[:, :, t]), alpha[:, :, t])
        if t == 0:
            z = omega[:, :, 0]
            state = x[:, :, 0]
        else:
            z = a * weights[-1] + omega[:, :, t]
            old = (a * weights[-1])[..., None] * merged[-1]
            state = (old + omega[:, :, t, None] * x[:, :, t]) / z[..., None]
        merged.append(state)
        weights.append(z)
    return torch.stack(merged, 2), torch.stack(weights, 2)


def rope_tables(tokens, size, theta=10000.0, dtype=torch.float64):
    """(cos, sin) [T, D] of the half-split layout."""
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)
    return torch.cat([angles, angles], 1).cos().to(dtype), torch.cat([angles, angles], 1).sin().to(dtype)


def rotate_one(x, position, theta=10000.0):
    """Rotate the pairs (d, d + D/2) of one vector [D] by position * theta^(-2d/D)."""
    half = len(x) // 2
    out = list(x)
    for d in range(half):
        angle = position * theta ** (-2 * d / len(x))
        c, s = math.cos(angle), math.sin(angle)
        out[d] = x[d] * c - x[d + half] * s
        out[d + half] = x[d + half] * c + x[d] * s
    return torch.stack(out)


def attend_loop(query, key, value, alpha, omega, starts, *, rotated, scale=None):
    """Soft DMC attention query by query over all intermediate states; fp64, differentiable."""
    batch, query_heads, tokens, size = query.shape
    heads = key.shape[1]
    keys, _ = merge_loop(key, alpha, omega, starts)
    values, _ = merge_loop(value, alpha, omega, starts)
    scale = 1 / math.sqrt(size) if scale is None else scale
    rows = []
    for b in range(batch):
        for g in range(query_heads):
            h = g // (query_heads // heads)
            for i in range(tokens):
                q = rotate_one(query[b, g, i], i) if rotated else query[b, g, i]
                first = max(t for t in range(i + 1) if t == 0 or bool(starts[b, t]))
                scores = []
                for j in range(first, i + 1):
                    k = rotate_one(keys[b, h, j], j) if rotated else keys[b, h, j]
                    score = (q * k).sum() * scale
                    if j < i:
                        score = score + torch.log(1 - alpha[b, h, j + 1])
                    scores.append(score)
                weights = torch.softmax(torch.stack(scores), 0)
                rows.append(weights @ values[b, h, first : i + 1])
    return torch.stack(rows).view(batch, query_heads, tokens, size)


def algorithm_1(query, key, value, alpha, omega, *, rotated):
    """Inference of one sequence, token by token, per head; alpha in {0, 1}. → (out [Hq,T,D], lengths [H])."""
    query_heads, tokens, size = query.shape
    heads = key.shape[0]
    out = torch.zeros_like(query)
    lengths = []
    for h in range(heads):
        entries = []  # [key, value, z, position of the newest token]
        for t in range(tokens):
            k, v, w = key[h, t], value[h, t], omega[h, t]
            if t > 0 and alpha[h, t] == 1:
                old_k, old_v, z, _ = entries[-1]
                z = z + w
                entries[-1] = [(old_k * (z - w) + w * k) / z, (old_v * (z - w) + w * v) / z, z, t]
            else:
                entries.append([k, v, w, t])
            turned = torch.stack([rotate_one(e[0], e[3]) if rotated else e[0] for e in entries])
            for g in range(h * query_heads // heads, (h + 1) * query_heads // heads):
                q = rotate_one(query[g, t], t) if rotated else query[g, t]
                out[g, t] = torch.softmax(turned @ q / math.sqrt(size), 0) @ torch.stack([e[1] for e in entries])
        lengths.append(len(entries))
    return out, torch.tensor(lengths)


# ------------------------------------------------------------------------------------------- eviction (DMS)


def evicting_loop(query, key, value, alpha, starts, *, window, rotated):
    """Soft DMS attention query by query: token j counts for 1 - alpha_j once it is more than ``window`` back."""
    batch, query_heads, tokens, size = query.shape
    heads = key.shape[1]
    rows = []
    for b in range(batch):
        for g in range(query_heads):
            h = g // (query_heads // heads)
            for i in range(tokens):
                first = max(t for t in range(i + 1) if t == 0 or bool(starts[b, t]))
                q = rotate_one(query[b, g, i], i) if rotated else query[b, g, i]
                total, sum_ = 0, torch.zeros_like(value[b, h, 0])
                scores = [
                    (q * (rotate_one(key[b, h, j], j) if rotated else key[b, h, j])).sum() / math.sqrt(size)
                    for j in range(first, i + 1)
                ]
                top = max(score.item() for score in scores)
                for j, score in zip(range(first, i + 1), scores, strict=True):
                    weight = torch.exp(score - top) * (1 - alpha[b, h, j] if i - j > window else 1)
                    total, sum_ = total + weight, sum_ + weight * value[b, h, j]
                rows.append(sum_ / total)
    return torch.stack(rows).view(batch, query_heads, tokens, size)


def evicting_cache(query, key, value, alpha, *, window, rotated):
    """Inference of one sequence with a list that marked tokens leave; alpha in {0, 1}. → (out [Hq,T,D], lengths [H])."""
    query_heads, tokens, size = query.shape
    heads = key.shape[0]
    out, lengths = torch.zeros_like(query), []
    for h in range(heads):
        entries = []  # (position, key, value, marked)
        for t in range(tokens):
            k = rotate_one(key[h, t], t) if rotated else key[h, t]
            entries.append((t, k, value[h, t], alpha[h, t] == 1))
            for g in range(h * query_heads // heads, (h + 1) * query_heads // heads):
                q = rotate_one(query[g, t], t) if rotated else query[g, t]
                weights = torch.softmax(torch.stack([e[1] for e in entries]) @ q / math.sqrt(size), 0)
                out[g, t] = weights @ torch.stack([e[2] for e in entries])
            entries = [e for e in entries if not (e[3] and t - e[0] >= window)]  # marked at e[0], gone at e[0] + window
        lengths.append(len(entries))
    return out, torch.tensor(lengths)
