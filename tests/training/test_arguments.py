"""What transformers' Trainer is told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from logitcache.errors import UsageError
from logitcache.training.arguments import training_arguments
from logitcache.training.options import TrainOptions

STEPS = 20


def arguments_of(out: Path, **values: Any) -> Any:
    options = TrainOptions.build({"cache": "c", "student": "s", "out": "o", "lr_schedule": "wsd", **values})
    return training_arguments(options, out, STEPS, rank_blocks=1, on_cpu=True)


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.8])
def test_wsd_rises_holds_and_falls_over_the_last_fifth(warmup: float, tmp_path: Path) -> None:
    args = arguments_of(tmp_path, warmup=warmup)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.warmup_steps, STEPS, scheduler_specific_kwargs=args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rise = round(warmup * STEPS)
    assert rates[:rise] == pytest.approx([step / rise for step in range(rise)])
    assert rates[rise:17] == [1.0] * (17 - rise)
    assert all(one > other for one, other in pairwise(rates[16:]))
    assert rates[STEPS] == pytest.approx(0, abs=1e-6)


def test_a_warmup_into_the_decay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^warmup is 0.9, but .* over the last 0.2 of the run; .* at most 0.8$"):
        arguments_of(tmp_path, warmup=0.9)
    assert arguments_of(tmp_path, warmup=0.9, lr_schedule="cosine").warmup_steps == 18
