"""What DMC adds to a training step: time and peak memory against the plain layer, and the share of each part.

    python scripts/bench_train.py                                       # modest shapes, in under two minutes of CPU
    python scripts/bench_train.py --length 2048 --layers 4 --json out.json
    python scripts/bench_train.py --window 64 --heads 4 --layers 6 --length 1024    # late merging next to merging at once
    python scripts/bench_train.py --precision bf16 --hidden 4096 --heads 32 --kv-heads 32 --head-size 128 --ffn 11008 \\
        --vocab 32000 --length 4096 --batch 1 --layers 4                # on a GPU

Steps are whole ones of the trainer (forward, backward, optimizer) on random tokens, with language modelling as the loss:
`plain` without DMC, `dmc` with soft decisions, `dmc+teacher` with distillation; with --window also `late` and
`late+teacher`, late merging with decisions made late. Runs of all are interleaved. Parts are
timed apart, forward and backward, at the same shapes, and multiplied by the layers; what they do not explain is `rest`.
Time on a CPU is the process's CPU time, on a GPU wall clock after a synchronisation. Peak memory is that of tensors
allocated within a step, over what is held between steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from dmc import functional as fn
from dmc.extras import needed_by_script
from dmc.families import ModelShape, shape_of
from dmc.kernels.attention.attend import dmc_attention, late_attention, plain_attention

with needed_by_script("the measurement"):
    import dmc.training  # noqa: F401 - before anything of megatron: makes it run without CUDA
    from data.batches import Batch
    from dmc.training import cpu, pretend, setup
    from dmc.training.config import Config, load
    from dmc.training.losses import language_and_distillation
    from dmc.training.metrics import Reporter
    from dmc.training.trainer import Trainer

VARIANTS = {
    "plain": ["dmc.method=none"],
    "dmc": ["dmc.method=dmc", "distill.weight=0", "distill.lm_weight=1"],
    "dmc+teacher": ["dmc.method=dmc"],
}
LATE = {"late": "dmc", "late+teacher": "dmc+teacher"}  # late merging, with --window: its steps → the same with merging at once


def main() -> None:
    """Measure, print the tables, write the JSON."""
    args = _arguments()
    hf = shape_of(
        dict(
            model_type="llama",
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=args.ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_size,
            max_position_embeddings=args.length,
            tie_word_embeddings=True,
        )
    )
    settings = [
        f"data.sequence_length={args.length}",
        f"optim.micro_batch={args.batch}",
        f"optim.global_batch={args.batch}",
        f"run.precision={args.precision}",
        f"run.threads={args.threads}",
        f"dmc.decision={args.decision}",
        "dmc.repurpose_steps=0",
        "dmc.ramp_steps_per_unit=0",
    ]
    variants = dict(VARIANTS)
    if args.window is not None:
        variants |= {name: [*VARIANTS[base], f"dmc.window={args.window}", "dmc.decide=late"] for name, base in LATE.items()}
    try:
        configs = {name: load(overrides=[*settings, *extra]) for name, extra in variants.items()}
        setup.init_distributed(configs["plain"])
        trainers = {name: _trainer(config, hf) for name, config in configs.items()}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    memory = {name: _peak(lambda t=trainer: _step(t)) for name, trainer in trainers.items()}  # also the warm-up
    parts = {name: _parts(trainers[name]) for name in ("plain", "dmc", "late") if name in trainers}
    jobs = {(name, "step"): (lambda t=trainer: _step(t)) for name, trainer in trainers.items()}
    jobs |= {(name, part): run for name, found in parts.items() for part, run in found.items()}
    times = _interleaved(jobs, args.repeats)
    result = _result(args, times, memory)
    print(_tables(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("hidden", 192, "width of the model"),
        ("layers", 2, "its layers"),
        ("heads", 6, "query heads"),
        ("kv-heads", 2, "key/value heads"),
        ("head-size", 64, "neurons a head"),
        ("ffn", 512, "width of the feed-forward part"),
        ("vocab", 2048, "size of the vocabulary"),
        ("length", 512, "tokens per sequence"),
        ("batch", 2, "sequences per step"),
        ("repeats", 9, "runs of each, interleaved"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--window", type=int, help="measure late merging with this window as well (default: not)")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16")
    parser.add_argument("--decision", default="head", help="head or neuron")
    parser.add_argument("--json", default="", help="file to write the numbers to")
    args = parser.parse_args()
    if args.repeats < 3:
        parser.error(f"--repeats is {args.repeats}: at least 3 are needed for a median and its spread")
    return args


def _trainer(config: Config, hf: ModelShape) -> Trainer:
    random = (lambda *_: {}) if config.dmc.compresses and config.distill.weight else None
    return Trainer(
        config,
        hf,
        batches=pretend.Noise(config, hf.vocab_size, Batch),
        store=None,
        meta={},
        loader=None,
        teacher_loader=random,
        reporter=Reporter(config.log, Path(), {}, rank=1, steps=1),
    )


def _step(trainer: Trainer) -> None:
    trainer.train_step(trainer.schedule(trainer.step))


# ------------------------------------------------------------------------------------------- parts


def _parts(trainer: Trainer) -> dict[str, Callable[[], None]]:
    """What a step consists of, each ready to run forward and backward; those of a layer run once a layer."""
    trainer.student.state.mode = "soft" if trainer.config.dmc.compresses else "plain"
    return _matrices(trainer) | _attention(trainer) | {"loss": _loss(trainer), "optimizer": trainer.student.optimizer.step}


def _new(trainer: Trainer, *shape: int) -> Tensor:
    return torch.randn(*shape, device=cpu.device()).to(setup.dtype_of(trainer.config)).requires_grad_()


def _matrices(trainer: Trainer) -> dict[str, Callable[[], None]]:
    hf, rows = trainer.hf, (trainer.config.data.sequence_length, trainer.config.optim.micro_batch)
    layer = trainer.student.chunks[0].decoder.layers[0]
    hidden, context = _new(trainer, *rows, hf.hidden_size), _new(trainer, *rows, hf.num_attention_heads * hf.head_dim)

    def projections() -> list[Tensor]:
        return [layer.self_attention.linear_qkv(hidden)[0], layer.self_attention.linear_proj(context)[0]]

    def feed_forward() -> list[Tensor]:
        return [layer.mlp(layer.pre_mlp_layernorm(layer.input_layernorm(hidden)))[0]]

    chunk, layers = trainer.student.chunks[0], hf.num_hidden_layers

    def output() -> list[Tensor]:
        return [chunk.output_layer(hidden, weight=chunk.shared_embedding_or_output_weight())[0]]

    return {
        "output layer": _both(output, 1),
        "projections": _both(projections, layers),
        "feed-forward and norms": _both(feed_forward, layers),
    }


def _loss(trainer: Trainer) -> Callable[[], None]:
    batch, tokens = trainer.config.optim.micro_batch, trainer.config.data.sequence_length
    logits, group = _new(trainer, batch, tokens, trainer.hf.vocab_size), torch.distributed.group.WORLD
    labels = torch.zeros(batch, tokens, dtype=torch.long, device=cpu.device())
    return _both(lambda: [language_and_distillation(logits, labels, None, lm_weight=1.0, kl_weight=0.0, group=group)[0]], 1)


def _attention(trainer: Trainer) -> dict[str, Callable[[], None]]:
    config, hf = trainer.config, trainer.hf
    chunk, layers, dtype = trainer.student.chunks[0], hf.num_hidden_layers, setup.dtype_of(config)
    attention, rope = chunk.decoder.layers[0].self_attention, chunk.config.dmc_rope
    batch, tokens = config.optim.micro_batch, config.data.sequence_length
    hidden = _new(trainer, tokens, batch, hf.hidden_size)
    query, key, value = (
        _new(trainer, batch, h, tokens, hf.head_dim)
        for h in (hf.num_attention_heads, hf.num_key_value_heads, hf.num_key_value_heads)
    )
    samples = torch.arange(batch, device=cpu.device())
    starts = torch.zeros(batch, tokens, dtype=torch.bool, device=cpu.device())
    starts[:, 0] = True

    def rotation() -> list[Tensor]:
        return [fn.rotate(query.float(), rope).to(dtype), fn.rotate(key.float(), rope).to(dtype)]

    if config.dmc.method == "none":
        core = lambda: [plain_attention(query, key, value, rope=rope, starts=starts)]  # noqa: E731
        return {"rope": _both(rotation, layers), "attention core": _both(core, layers)}

    def decisions() -> list[Tensor]:
        logit, weight, _, _ = attention._decide(hidden, query, key)
        return list(attention._decisions(logit, weight, samples, starts))

    alpha, log_keep, omega = (x.detach().requires_grad_() for x in decisions())
    trainer.student.state.decisions.total()  # empties the counts

    def scan() -> list[Tensor]:
        return [fn.accumulate(torch.cat([key.float(), value.float()], -1), alpha, omega, starts=starts)[0]]

    def core() -> list[Tensor]:
        options = dict(rope=rope, starts=starts, log_keep=log_keep)
        if config.dmc.window is None:
            return [dmc_attention(query, key, value, alpha, omega, **options)]
        return [late_attention(query, key, value, alpha, omega, window=config.dmc.window, **options)]

    runs = {"decisions": decisions, "scan": scan, "rope": rotation, "attention core": core}
    return {name: _both(run, layers) for name, run in runs.items()}


def _both(forward: Callable[[], list[Tensor]], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            torch.autograd.backward([x.float().sum() for x in forward()])

    return run


# ------------------------------------------------------------------------------------------- measuring


def _interleaved(jobs: dict, repeats: int) -> dict:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: dict = {name: [] for name in jobs}
    for turn in range(repeats + 1):  # the first turn is the warm-up
        for name, run in jobs.items():
            torch.cuda.synchronize()  # does nothing on a CPU
            begun = clock()
            run()
            torch.cuda.synchronize()
            if turn:
                times[name].append(clock() - begun)
    return times


def _peak(run: Callable[[], None]) -> int:
    """Bytes that one run allocates at its peak, over what was held before it."""
    run()  # optimizer states and the like come with the first
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# ------------------------------------------------------------------------------------------- report


def _result(args: argparse.Namespace, times: dict, memory: dict) -> dict:
    variants = [name for name, part in times if part == "step"]
    seconds = {name: {part: _spread(times[name, part]) for n, part in times if n == name} for name in variants}
    for name in ("plain", "dmc", "late"):
        if name not in seconds:
            continue
        found = seconds[name]
        median = {part: value["median"] for part, value in found.items()}
        core = median.pop("attention core") - median["rope"] - median.get("scan", 0.0)
        shares = {"attention": core} | {part: value for part, value in median.items() if part != "step"}
        shares["rest"] = median["step"] - sum(shares.values())
        found["shares"] = {part: value / median["step"] for part, value in shares.items()}

    def ratio(name: str, base: str) -> dict[str, float]:
        """Each turn ran all variants close together: the ratio of a turn depends less on the machine's other load."""
        return _spread([a / b for a, b in zip(times[name, "step"], times[base, "step"], strict=True)])

    plain = seconds["plain"]["step"]["median"]
    return {
        "shape": {k: v for k, v in vars(args).items() if k != "json"},
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "seconds": seconds,
        "step_ratio": {name: ratio(name, "plain") for name in variants},
        "step_ratio_of_medians": {name: seconds[name]["step"]["median"] / plain for name in variants},
        "late_ratio": {name: ratio(name, base) for name, base in LATE.items() if name in seconds},
        "peak_bytes": memory,
        "peak_ratio": {name: value / memory["plain"] for name, value in memory.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "quartile_1": low, "quartile_3": high}


def _tables(result: dict) -> str:
    lines = ["| step | ms, median (quartiles) | to plain (quartiles) | peak MiB | to plain |", "|---|---|---|---|---|"]
    for name, ratio in result["step_ratio"].items():
        step = result["seconds"][name]["step"]
        lines.append(
            f"| {name} | {1e3 * step['median']:.1f} ({1e3 * step['quartile_1']:.1f}-{1e3 * step['quartile_3']:.1f}) | "
            f"{ratio['median']:.2f} ({ratio['quartile_1']:.2f}-{ratio['quartile_3']:.2f}) | "
            f"{result['peak_bytes'][name] / 2**20:.1f} | {result['peak_ratio'][name]:.2f} |"
        )
    shares = {name: found["shares"] for name, found in result["seconds"].items() if "shares" in found}
    lines += ["", f"| part | {', % of its step | '.join(shares)}, % of its step |", "|---" * (1 + len(shares)) + "|"]
    for part in shares["dmc"]:
        cells = (f"{100 * found[part]:.1f}" if part in found else "-" for found in shares.values())
        lines.append(f"| {part} | {' | '.join(cells)} |")
    if result["late_ratio"]:
        lines += ["", "| late merging | step time to merging at once, median (quartiles) |", "|---|---|"]
    for name, ratio in result["late_ratio"].items():
        lines.append(f"| {name} / {LATE[name]} | {ratio['median']:.3f} ({ratio['quartile_1']:.3f}-{ratio['quartile_3']:.3f}) |")
    return "\n".join(lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 1} cores"


if __name__ == "__main__":
    main()
