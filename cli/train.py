"""`logitcache train`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from .console import debug_option, json_option, out, print_json
from .options import NewPath
from .progress import TrainView
from .train_config import assignment, read_config

EXAMPLE = """
\b
Example:
  logitcache train --cache cache --student student.yaml --out run --epochs 4

The student is a model folder or a YAML/JSON transformers config (`model_type: llama`, ...; the vocabulary comes from
the cache). Every option may stand in a `--config` file (with underscores); --set and the options above win. More keys
for both: accumulate, alpha_decay, alpha_warmup, combine, eval_every, eval_tokens, impl, log_every, lr_schedule,
max_grad_norm, report_to, save_every, warmup, weight_decay. docs/training.md tells what each does.

\b
On several GPUs, or processes on a CPU, the same run with the same batches:
  torchrun --nproc-per-node 4 -m logitcache.cli.main train --cache cache ...

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE)
@click.option(
    "--cache",
    multiple=True,
    metavar="CACHE",
    help="Cache that `dump` wrote; may be repeated. Those of the same text blocks are averaged, as several teachers; "
    "others are mixed, as several corpora.",
)
@click.option("--cache-weights", metavar="W,W...", help="A share for each cache.  [default: equal; corpora by size]")
@click.option("--partial", is_flag=True, default=None, help="Train on what an unfinished dump has written by now.")
@click.option("--student", metavar="CONFIG_OR_DIR", help="Model folder, or YAML/JSON of a transformers config.")
@click.option("--out", type=NewPath(), metavar="DIR", help="Folder of the run and of the trained student.")
@click.option(
    "--objective",
    help="auto (forward-kl), cross-entropy, forward-kl, reverse-kl, jsd, skew-kl, tvd, decoupled, mse or "
    "policy-gradient: docs/objectives.md says which is for what.",
)
@click.option(
    "--tail",
    help="What stands for the teacher's mass outside the stored ids: auto, bucket or renormalised; for forward-kl also "
    "teacher_renormalised, unnormalised, label, unbiased and, on varopt caches, blend.",
)
@click.option("--beta", type=float, help="Teacher's share of the mixture in jsd [0.5] and skew-kl [0.1].")
@click.option("--reverse", is_flag=True, default=None, help="skew-kl of the student to the mixture, not the teacher.")
@click.option("--clip", type=float, help="Largest advantage of policy-gradient, in nats.  [default: none]")
@click.option("--blend", type=float, help="Share of the unbiased term in --tail blend.  [default: 0.5]")
@click.option("--blend-end", type=float, help="Its share at the end of the run.  [default: as --blend]")
@click.option("--z-loss", type=float, help="Add this times logsumexp(logits)^2; 1e-4 is usual.  [default: 0]")
@click.option(
    "--mask",
    help="Keep the divergence on this share of each block's tokens, those of highest entropy: teacher-entropy:0.85 or "
    "student-entropy:0.5, for example.  [default: none]",
)
@click.option("--mask-rest", help="What the other tokens learn from: labels or nothing.  [default: labels]")
@click.option("--alpha", type=float, help="Weight of distillation: (1 - alpha) CE + alpha T^2 KL.  [default: 0.9]")
@click.option("--temperature", type=float, help="Temperature of the divergence.  [default: 1]")
@click.option("--alpha-schedule", help="constant, linear or wsd.  [default: constant]")
@click.option("--epochs", type=float, help="Passes over the training blocks.  [default: 1]")
@click.option("--max-tokens", type=int, help="Length of the run in tokens, instead of --epochs.")
@click.option("--max-steps", type=int, help="Length of the run in optimiser steps, instead of --epochs.")
@click.option("--batch-tokens", type=int, help="Tokens in a batch, of all processes together.  [default: 4096]")
@click.option("--learning-rate", type=float, help="Peak learning rate of AdamW.  [default: 1e-3]")
@click.option("--held-out", type=float, help="Share of the cache's blocks kept for evaluation.  [default: 0.05]")
@click.option("--held-out-cache", metavar="CACHE", help="Evaluate on this cache instead.")
@click.option(
    "--early-stop", type=int, metavar="N", help="End when N evaluations found no lower cross entropy; keep the best."
)
@click.option("--eval-text", multiple=True, metavar="PATH", help="Plain text of another domain to evaluate on.")
@click.option("--tokenizer", metavar="DIR", help="The teacher's tokenizer, if it is no longer where the dump found it.")
@click.option("--seed", type=int, help="Of weights, order and dropout.  [default: 0]")
@click.option("--dtype", help="float32, or bfloat16 for mixed precision.")
@click.option("--device", help="auto, cpu or cuda.")
@click.option("--fsdp", help="off, full-shard or shard-grad-op: shard the student over torchrun's GPUs.")
@click.option("--config", type=click.Path(path_type=Path), metavar="YAML", help="File with any of the options.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other option, e.g. warmup=0.1.")
@click.option(
    "--resume", is_flag=True, help="Go on from the last checkpoint of the same run, by any number of processes."
)
@json_option
@debug_option
def train(
    config: Path | None,
    assignments: tuple[str, ...],
    resume: bool,
    as_json: bool,
    cache: tuple[str, ...],
    cache_weights: str | None,
    eval_text: tuple[str, ...],
    **given: Any,
) -> None:
    """Train a student from a cache; no teacher is needed."""
    from logitcache.distill import run_training
    from logitcache.training.options import TrainOptions
    from logitcache.training.ranks import Ranks

    def read_options() -> TrainOptions:
        values, places = read_config(config)
        weights = tuple(cache_weights.split(",")) if cache_weights else ()
        lists = {"cache": cache, "cache_weights": weights, "eval_text": eval_text}
        options = {key: value for key, value in given.items() if value is not None}
        options |= {key: value for key, value in lists.items() if value}
        options |= dict(assignment(text) for text in assignments)
        return TrainOptions.build(values | options, {key: places[key] for key in places.keys() - options.keys()})

    ranks = Ranks.of_environment()
    options = ranks.agree(read_options)
    with TrainView() if ranks.is_main else nullcontext() as view:
        if view is not None:
            view.stage("loading")
        step, note = (view.step, view.note) if view else (None, None)
        metrics = run_training(options, resume, step, sys.argv, note)
    ranks.leave()
    if ranks.is_main:
        _report(metrics, options.out, as_json)


def _report(metrics: dict[str, Any], folder: str, as_json: bool) -> None:
    if as_json:
        print_json(metrics)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    out.print(table)
    out.print(f"The student is in {folder}, its loss curve in {Path(folder) / 'loss.png'}")
