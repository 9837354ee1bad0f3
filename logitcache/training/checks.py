"""Whether a run's options suit the processes and the data it has, said in the words of the command line."""

from __future__ import annotations

import torch

from logitcache.errors import ObjectiveError, UsageError, counted
from logitcache.kernels import check_implementation
from logitcache.training.options import TrainOptions


def check_impl(options: TrainOptions, device: torch.device) -> None:
    """Raise UsageError where the losses' implementation cannot run on a device."""
    try:
        check_implementation(options.impl, device, spelling="--set impl={}")
    except ObjectiveError as error:
        raise UsageError(str(error)) from error


def check_shares(options: TrainOptions, batch_blocks: int, block_length: int, world_size: int) -> None:
    """Raise UsageError unless all processes get as many blocks of a batch."""
    if batch_blocks % world_size:
        even = world_size * max(1, batch_blocks // world_size)
        raise UsageError(
            f"--batch-tokens {options.batch_tokens} is {counted(batch_blocks, 'block')} of {block_length} tokens a "
            f"batch, which {world_size} processes cannot share evenly; use --batch-tokens {even * block_length}"
        )


def remarks_on_batch(options: TrainOptions, step_blocks: int, num_blocks: int, block_length: int) -> list[str]:
    """A sentence about a batch that is larger than was said, and one about a step that takes more than there is."""
    remarks = []
    if options.batch_tokens < block_length:
        remarks.append(
            f"a batch is a whole block of {block_length} tokens, the least that the cache's blocks allow, and not the "
            f"{counted(options.batch_tokens, 'token')} of --batch-tokens"
        )
    if step_blocks <= num_blocks:
        return remarks
    accumulated = f" and --set accumulate={options.accumulate}" if options.accumulate > 1 else ""
    remarks.append(
        f"one step takes {step_blocks:,} blocks of {block_length} tokens, but there are only {num_blocks:,} to train "
        f"on, so it reads blocks more than once; use a smaller --batch-tokens than {options.batch_tokens}{accumulated}"
    )
    return remarks
