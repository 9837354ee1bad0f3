"""What transformers' Trainer is told, from a run's options."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from logitcache.errors import UsageError
from logitcache.training.options import TrainOptions

# Our names of learning rate schedules -> transformers'.
_SCHEDULES = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}


def training_arguments(
    options: TrainOptions, checkpoints: Path, steps: int, batch_blocks: int, on_cpu: bool
) -> TrainingArguments:
    """Arguments of a run of `steps` optimiser steps whose batches have `batch_blocks` blocks on each rank."""
    _check_reporters(options.report_to)
    log_every = min(options.log_every, steps)
    # Whole numbers of log intervals, so that a resumed run logs the same averages.
    save_every = options.save_every or max(1, steps // 5)
    save_every = -(-save_every // log_every) * log_every
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=batch_blocks,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES.get(options.lr_schedule, options.lr_schedule),
        lr_scheduler_kwargs={"num_decay_steps": max(1, steps // 5)} if options.lr_schedule == "wsd" else {},
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        adam_beta2=0.95,
        seed=options.seed,
        bf16=options.dtype == "bfloat16",
        use_cpu=on_cpu,
        eval_strategy="steps",
        eval_steps=options.eval_every or max(1, steps // 5),
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(options.report_to),
        remove_unused_columns=False,
        ignore_data_skip=True,
    )


def _check_reporters(names: tuple[str, ...]) -> None:
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there:
            raise UsageError(
                f"report_to: {name!r} is not installed or does not exist; install its package or choose of: "
                f"{', '.join(sorted(there)) or 'none is installed'}"
            )
