"""Decision heads fitted to what a token's absence costs in nats, by gradients; for docs/results/fitted.md.

    python scripts/fitted_fisher.py checkpoints/base --text stdlib --out runs/fitted/fisher.pt
    python scripts/fitted_variants.py make runs/fitted/fisher.pt --out runs/fitted/variants

Without token t the attention output of query i in one head changes by d = p / (1 - p) (o_i - v_t). With g the gradient of
the loss on labels that the model itself drew, the expectation of (g · d)² is twice the KL divergence that this change
causes, to second order. Targets are the logarithms of its sum and of its maximum over queries behind the window. One
backward pass per sequence is needed, unlike for `dmc calibrate --decisions`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from dmc.evaluation.fit_decisions import FitSettings  # noqa: E402
from dmc.evaluation.moments import Moments  # noqa: E402
from dmc.evaluation.sequences import read_sequences  # noqa: E402
from dmc.model.fingerprint import model_hash  # noqa: E402

TARGETS = ("fisher-sum", "fisher-max")
_SAMPLED = 16


def cost(attention: Tensor, value: Tensor, out: Tensor, gradient: Tensor, window: int) -> Tensor:
    """Targets ``[2 H, T]`` of one layer.

    Args:
        attention: ``[H, G, T, T]``; value: ``[H, T, D]``; out, gradient: ``[H, G, T, D]``.
    """
    place = torch.arange(attention.shape[-1])
    far = attention.masked_fill(place[:, None] - place <= window, 0.0)
    change = (gradient * out).sum(-1, keepdim=True) - gradient @ value[:, None].mT
    square = (far / (1 - far).clamp(min=1e-4) * change).square()
    return torch.cat([torch.log(square.sum((1, 2)) + 1e-12), torch.log(square.amax((1, 2)) + 1e-12)])


def main() -> None:
    """Collects the sums of the regression and writes them as `fitted_variants.py collect` does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=100)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings, count = FitSettings(window=options.window), options.sequences
    found = read_sequences(options.text, options.directory, length=options.length, count=count)
    model = LlamaForCausalLM.from_pretrained(options.directory, dtype=torch.float32, attn_implementation="eager")
    heads, tokens = model.config.num_key_value_heads, settings.fitted(options.length)
    scored = slice(settings.sinks, options.length - settings.window - 1)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(count, generator=generator)
    total, sampled = [None] * len(model.model.layers), [[] for _ in model.model.layers]
    seen: dict[tuple[str, int], Tensor] = {}
    for index, layer in enumerate(model.model.layers):

        def keep(name: str, index: int = index):  # noqa: ANN202
            def hook(_: torch.nn.Module, inputs: tuple, output: Tensor | None = None) -> None:
                kept = inputs[0] if output is None else output
                if name == "out":
                    kept.retain_grad()
                seen[name, index] = kept

            return hook

        layer.input_layernorm.register_forward_hook(keep("hidden"))
        layer.self_attn.v_proj.register_forward_hook(keep("value"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep("out"))
    for number, row in enumerate(tqdm(found.tokens[order], desc="collect", disable=not sys.stderr.isatty())):
        result = model(row[None], use_cache=False, output_attentions=True)
        labels = torch.multinomial(result.logits[0].detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(result.logits[0], labels, reduction="sum").backward()
        for index, attention in enumerate(result.attentions):
            hidden, value, out = (seen[name, index] for name in ("hidden", "value", "out"))
            split = [x[0].detach().unflatten(-1, (heads, -1, model.config.head_dim)).permute(1, 2, 0, 3) for x in (out, out.grad)]
            value = value[0].detach().unflatten(-1, (heads, -1)).transpose(0, 1)
            target = cost(attention[0].detach().unflatten(0, (heads, -1)), value, *split, settings.window)
            hidden = hidden[0].detach()
            late = F.pad(hidden[settings.window :], (0, 0, 0, settings.window))
            x = torch.cat([hidden, late, hidden.new_ones(len(row), 1)], -1)
            moments = Moments.of(x[tokens], target[:, tokens].T)
            total[index] = moments if total[index] is None else total[index] + moments
            if number >= count - _SAMPLED:
                sampled[index].append(x[scored, :-1].half())
        model.zero_grad()
        seen.clear()
    torch.save(
        {
            "steps": [count],
            "moments": [[one] for one in total],
            "sampled": [torch.stack(part) for part in sampled],
            "heads": heads,
            "length": options.length,
            "hidden": model.config.hidden_size,
            "settings": settings,
            "model": model_hash(options.directory),
            "text": found.name,
            "text_hash": found.text_hash,
            "targets": TARGETS,
        },
        options.out,
    )


if __name__ == "__main__":
    main()
