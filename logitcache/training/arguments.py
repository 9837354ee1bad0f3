"""What transformers' Trainer is told, from a run's options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from logitcache.errors import UsageError
from logitcache.training.options import TrainOptions

# Our names of learning rate schedules -> transformers'.
_SCHEDULES = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
# Share of the run, at its end, in which wsd falls.
_DECAY = 0.2


def training_arguments(
    options: TrainOptions, checkpoints: Path, steps: int, rank_blocks: int, on_cpu: bool
) -> TrainingArguments:
    """Arguments of a run of `steps` optimiser steps whose batches have `rank_blocks` blocks on each rank.

    Raises UsageError where options do not go together, or not with what is installed or there.
    """
    _check_reporters(options.report_to)
    _check_early_stop(options)
    _check_warmup(options)
    log_every = min(options.log_every, steps)
    eval_every = options.eval_every or max(1, steps // 5)
    # Whole numbers of log intervals, so that a resumed run logs the same averages.
    save_every = _whole(options.save_every or max(1, steps // 5), log_every)
    if options.early_stop:
        # The best student is one that was evaluated and saved.
        eval_every = save_every = _whole(eval_every, log_every)
    build = _on_plain_cpu if on_cpu else TrainingArguments
    arguments = build(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=rank_blocks,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES.get(options.lr_schedule, options.lr_schedule),
        lr_scheduler_kwargs={"num_decay_steps": max(1, int(steps * _DECAY))} if options.lr_schedule == "wsd" else {},
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        adam_beta2=0.95,
        seed=options.seed,
        bf16=options.dtype == "bfloat16",
        use_cpu=on_cpu,
        eval_strategy="steps",
        eval_steps=eval_every,
        save_steps=save_every,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(options.report_to),
        remove_unused_columns=False,
        ignore_data_skip=True,
        **_early_stop(options),
        **_sharding(options),
    )
    _check_sharding(options, arguments)
    if arguments.n_gpu > 1:
        # Several GPUs are for several processes; DataParallel would cut the rows of a batch apart.
        arguments._n_gpu = 1
    return arguments


def _on_plain_cpu(**values: Any) -> TrainingArguments:
    """Arguments whose device is "cpu" on every rank: accelerate's "cpu:1" is none that torch.load restores to."""
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    try:
        return TrainingArguments(**values)
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def _whole(steps: int, interval: int) -> int:
    """The next whole number of intervals."""
    return -(-steps // interval) * interval


def _early_stop(options: TrainOptions) -> dict[str, Any]:
    if not options.early_stop:
        return {"save_total_limit": 2}
    # The best checkpoint, the newest one, and the one before it while the newest is being written.
    return {
        "save_total_limit": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ce",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
    }


def _check_early_stop(options: TrainOptions) -> None:
    if not options.early_stop:
        return
    if options.held_out == 0 and options.held_out_cache is None:
        raise UsageError("early_stop watches the cross entropy of held-out blocks; give --held-out or --held-out-cache")
    if options.save_every is not None:
        raise UsageError("save_every: early_stop makes a checkpoint at each evaluation; set eval_every instead")


def _check_warmup(options: TrainOptions) -> None:
    if options.lr_schedule == "wsd" and options.warmup > 1 - _DECAY:
        raise UsageError(
            f"warmup is {options.warmup:g}, but with lr_schedule wsd the learning rate falls over the last {_DECAY:g} "
            f"of the run; use a warmup of at most {1 - _DECAY:g}"
        )


def _sharding(options: TrainOptions) -> dict[str, Any]:
    if options.fsdp == "off":
        return {}
    config = {
        "version": 2,
        "reshard_after_forward": options.fsdp == "full-shard",
        # Whole, so that a run resumes with any number of processes.
        "state_dict_type": "FULL_STATE_DICT",
    }
    return {"fsdp": True, "fsdp_config": config}


def _check_sharding(options: TrainOptions, arguments: TrainingArguments) -> None:
    kind = arguments.distributed_state.distributed_type
    if options.fsdp != "off" and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise UsageError(
            "fsdp shards a student over the GPUs of several processes, and accelerate shards on no CPU; start with "
            "`torchrun --nproc-per-node N -m logitcache.cli.main train ...` on GPUs, or leave it out"
        )


def _check_reporters(names: tuple[str, ...]) -> None:
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there:
            raise UsageError(
                f"report_to: {name!r} is not installed or does not exist; install its package or choose of: "
                f"{', '.join(sorted(there)) or 'none is installed'}"
            )
