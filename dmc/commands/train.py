"""`dmc train`: retrofit a pretrained model with Dynamic Memory Compression or Sparsification, or pretrain one.

    torchrun train.py --target-cr 4                              # the small base model, on this machine
    torchrun train.py --model DIR --target-cr 4 data.text=my.txt # any directory of a known family (docs/families.md)
    torchrun train.py --method dms --target-cr 4                 # eviction (DMS) instead of merging (DMC)
    torchrun train.py --config configs/quickstart.yaml           # a recipe
    torchrun train.py --config R.yaml run.resume=auto            # continue a stopped run
    dmc train ...                                                # the same, one process; so is python train.py
    dmc train --config R.yaml --dry-run --world 32               # the plan: layout, memory, time, one small step

Any configuration key is set as section.key=value after the flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import dmc.training  # noqa: F401 - before anything of megatron: makes it run without CUDA
from checkpoints import convert, store
from data import batches, mixture, opening, tokens
from dmc import hub
from dmc.families import ModelShape, check_names, count, read_shape
from dmc.fitted import FittedDecisions
from dmc.model.fingerprint import model_hash
from dmc.training import backends, decoder, dryrun, flops, peers, setup
from dmc.training import config as configuration
from dmc.training.config import Config
from dmc.training.metrics import Reporter
from dmc.training.schedule import Schedule
from dmc.training.signals import Stopped
from dmc.training.trainer import Trainer
from dmc.weights import Weights

STOPPED = "stopped"  # file in run.output: a signal ended the run; a job script checks it and requeues


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="dmc train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration (section.key, default, meaning; more in docs/training.md):\n" + configuration.describe(),
    )
    parser.add_argument("--config", help="YAML recipe, see configs/")
    parser.add_argument("--target-cr", help="compression ratio to reach, tokens per cache entry (dmc.target_cr)")
    parser.add_argument("--method", help="dmc, dms, or none for plain pretraining (dmc.method)")
    parser.add_argument("--model", help="directory of the model to start from, or its name on the Hub: org/name (run.model)")
    parser.add_argument("--output", help="directory of the run (run.output)")
    parser.add_argument("--resume", help="auto, or a checkpoint directory (run.resume)")
    parser.add_argument("--dry-run", action="store_true", default=None, help="print the plan, try a small step (run.dry_run)")
    parser.add_argument("--world", help="ranks that the dry run plans for (plan.world)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any key of the configuration")
    return parser


def parse(argv: list[str]) -> Config:
    """The configuration of a command line.

    Raises:
        ValueError: one sentence, for anything that is wrong with it.
    """
    parser = make_parser()
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        known = ", ".join(sorted(o for a in parser._actions for o in a.option_strings if o.startswith("--")))
        raise ValueError(f"unknown flag {unknown[0]}; known: {known}; configuration keys go as section.key=value")
    flags = {
        "dmc.target_cr": args.target_cr,
        "dmc.method": args.method,
        "run.model": args.model,
        "run.output": args.output,
        "run.resume": args.resume,
        "run.dry_run": args.dry_run,
        "plan.world": args.world,
    }
    extra = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return configuration.load(args.config, [*args.overrides, *extra])


def build(config: Config) -> Trainer:
    """Build the trainer and everything that it uses.

    Raises:
        ValueError: one sentence, for every error that the user can fix.
    """
    model = hub.located(config.run.model)
    hf = read_shape(model)
    check_length(config, hf)
    teacher, teacher_hf = None, None
    if flops.distils(config):
        directory = hub.located(config.distill.teacher) if config.distill.teacher else model
        teacher, teacher_hf = Weights(directory), read_shape(directory)
        check_names(teacher_hf, list(teacher), directory)
        check_length(config, teacher_hf)
    fitted = FittedDecisions.load(config.dmc.init) if config.dmc.init else None
    if fitted is not None:
        fitted.threshold(config.dmc.target_cr, config.data.sequence_length)  # the window must allow the target
    output = Path(config.run.output)
    checkpoints = store.CheckpointStore(output / "checkpoints", keep_last=config.run.keep_last)
    tokenizer = tokens.load_tokenizer(model, hf.vocab_size)
    weights = None
    if config.run.init != "random":
        weights = Weights(model)
        check_names(hf, list(weights), model)
    begin = opening.opening(tokenizer, config.data.bos)
    training, held_out = tokens.corpora(
        config.data.text,
        config.data.held_out,
        tokenizer,
        config.data.cache,
        config.data.bos,
        chat=config.data.chat,
        loss_on=config.data.loss_on,
    )
    source = batches.Source(training, held_out, config.data.sequence_length, config.optim, config.log, config.run.seed)
    setup.init_distributed(config)
    peers.watch(config.run.peer_timeout)
    resume = find_resume(config, checkpoints)
    rank = torch.distributed.get_rank()
    prepare_output(output, config, resume=resume is not None, rank=rank)
    meta = {
        "config": configuration.to_dict(config),
        "hf_config": dict(hf.fields),
        "corpus_hash": training.hash,
        "held_out_hash": held_out.hash,
        "model_hash": model_hash(model, config.run.init, together=True),
        "tokenizer_dir": str(model.resolve()),
        "model_name": hub.shown(config.run.model),
        "tokenizer_hash": tokens.tokenizer_hash(tokenizer),
        "corpora": mixture.describe(training),
        "begin": begin,
    }
    if fitted is not None:
        fitted.check(meta["model_hash"], hf.num_hidden_layers, hf.num_key_value_heads, hf.hidden_size, config.dmc.recent)
    reporter = Reporter(config.log, output, meta["config"], rank=rank, steps=Schedule(config).steps)
    trainer = Trainer(
        config,
        hf,
        batches=source,
        store=checkpoints,
        reporter=reporter,
        meta=meta,
        loader=weights and convert.loader(hf, weights),
        teacher_loader=teacher and convert.loader(teacher_hf, teacher),
        teacher_hf=teacher_hf,
    )
    characters = held_out.characters_per_token
    reporter.say(
        f"model {config.run.model} ({count(hf) / 1e6:.2f}M parameters)  text {training.hash} "
        f"({training.tokens} tokens, held out {held_out.hash} {held_out.tokens}, {characters:.2f} characters each)"
        f"  {trainer.schedule.steps} steps  output {output}"
    )
    reporter.say(f"  {opening.described(begin)} (data.bos={str(config.data.bos).lower()})")
    reporter.say(backends.describe(config.run.transformer_engine))
    for about, epochs in zip(meta["corpora"], source.epochs(trainer.schedule.steps), strict=True):
        reporter.say(f"  {about['share']} of the sequences from {about['name']} ({about['hash']}): {epochs:.2f} epochs")
    for text in (*training.corpora, *held_out.corpora):
        if text.scored is not None:
            reporter.say(f"  loss on {text.scored_tokens} of the {len(text)} tokens of {text.name}, its assistant turns")
        if text.skipped:
            reporter.say(f"  left out of {text.name}: {text.skipped}")
    if resume is not None:
        trainer.resume(str(resume))
    elif fitted is not None:
        setup.start_from(config, trainer.student, fitted)
    return trainer


def dry_run(config: Config) -> None:
    """Print the plan of the run and try one step of a shrunken model in its layout; write nothing, load no weights.

    Raises:
        ValueError: one sentence, for anything that would stop the run.
    """
    directory = Path(config.run.model)
    if directory.is_dir() or not config.plan.shape:
        directory = hub.located(config.run.model, weights=False)
        hf, source = read_shape(directory), config.run.model
    else:
        hf = read_shape(config.plan.shape)
        source = f"{directory} is not on this machine: the shape is that of {config.plan.shape} (plan.shape)"
    check_length(config, hf)
    print(f"model      {source}, {count(hf) / 1e6:.2f}M parameters", flush=True)
    for line in dryrun.run(config, hf, batch=batches.Batch):
        print(line, flush=True)
    print(f"not tried  data.text ({config.data.text}) was not read, no weights were loaded, nothing was written", flush=True)


def check_length(config: Config, hf: ModelShape) -> None:
    """Reject sequences longer than the model's positions.

    Raises:
        ValueError: naming both lengths, and the reason if the limit is not max_position_embeddings.
    """
    length, longest = config.data.sequence_length, hf.max_position_embeddings
    if length > longest:
        raise ValueError(f"data.sequence_length {length} exceeds the model's max_position_embeddings {longest}")
    decoder.check_length(hf.rope, length)


def find_resume(config: Config, checkpoints: store.CheckpointStore) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start."""
    if not config.run.resume:
        return None
    checkpoints.clean()
    if config.run.resume != "auto":
        checkpoints.check(config.run.resume)
        return Path(config.run.resume)
    found = checkpoints.newest()
    started = checkpoints.directory.is_dir() and any(checkpoints.directory.iterdir())
    if found is None and started and not config.run.overwrite:
        raise ValueError(f"{checkpoints.directory} holds only incomplete or damaged checkpoints: run.overwrite=true starts again")
    return found


def prepare_output(output: Path, config: Config, *, resume: bool, rank: int) -> None:
    """Create the run's directory; reject a directory that holds another run."""
    failure: list[str | None] = [None]
    if rank == 0:
        if (output / "config.json").exists() and not resume:
            if config.run.overwrite:
                shutil.rmtree(output)
            elif config.run.resume == "auto":  # the run ended before its first checkpoint: its steps are repeated
                (output / "metrics.jsonl").unlink(missing_ok=True)
            else:
                failure[0] = (
                    f"{output} holds a run: continue it with --resume auto, replace it with run.overwrite=true, "
                    "or name another --output"
                )
        if failure[0] is None:
            output.mkdir(parents=True, exist_ok=True)
            (output / STOPPED).unlink(missing_ok=True)
            (output / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ValueError(failure[0])


@record
def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments (those of the process if None), build, train.

    Exit codes: 0 when the run is complete; 75 when a signal stopped it and a checkpoint was saved; 2 with one sentence for
    errors that the user can fix, including a full disk; 1 with one sentence for an aborted run (diverged, another rank died).
    """
    try:
        with peers.reported():
            config = parse(sys.argv[1:] if arguments is None else arguments)
            if config.run.dry_run:
                dry_run(config)
                return
            trainer = build(config)
    except (ValueError, peers.Lost) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    try:
        with peers.reported():
            trainer.train()
    except (FloatingPointError, OSError, peers.Lost) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, OSError) else 1)
    except Stopped as stop:
        if torch.distributed.get_rank() == 0:
            (Path(trainer.config.run.output) / STOPPED).write_text(f"{stop}\n")
            print(stop, flush=True)
        leave()
        raise
    leave()


def leave() -> None:
    """Stop the watch over the other ranks and destroy the process group."""
    peers.close()
    torch.distributed.destroy_process_group()
