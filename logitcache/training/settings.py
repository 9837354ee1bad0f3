"""How a run's options and its cache decide what is minimised."""

from __future__ import annotations

from typing import Any

import numpy as np

from logitcache.errors import UsageError
from logitcache.losses import Objective
from logitcache.store import Cache
from logitcache.training.options import TrainOptions
from logitcache.training.schedules import AlphaSchedule, BlendSchedule
from logitcache.training.trainer import DistillationSettings


def settings_for(options: TrainOptions, cache: Cache) -> DistillationSettings:
    """The settings that options ask for on this cache.

    Raises:
        ObjectiveError: an option that the objective does not have or that is out of range, or a combination without a
            correct meaning on this cache; says what to use or to store instead.
        UsageError: a schedule makes no sense.
        DamagedCacheError: its first block is damaged (read for policy-gradient only).
    """
    unbiased, head = cache.unbiased, cache.has_exact_head
    objective = choose_objective(options, unbiased)
    known = objective.kind != "policy_gradient" or _knows_labels(cache)
    objective.check(unbiased, options.temperature, options.alpha, head, known, cache.keeps_ids)
    alpha = AlphaSchedule(options.alpha_schedule, options.alpha, options.alpha_warmup, options.alpha_decay)
    blend = _blend(options, objective)
    return DistillationSettings(
        objective, alpha, options.temperature, unbiased, options.impl, head, blend, options.z_loss
    )


def choose_objective(options: TrainOptions, unbiased: bool) -> Objective:
    """The objective that options name; tail "auto" is what suits the cache in a forward KL, "bucket" in others."""
    kind = "forward_kl" if options.objective == "auto" else options.objective.replace("-", "_")
    given: dict[str, Any] = {"beta": options.beta, "reverse": options.reverse, "clip": options.clip}
    if options.tail != "auto":
        given["tail"] = options.tail
    elif kind == "forward_kl":
        given["tail"] = Objective.default_for(unbiased).tail
    return Objective.named(kind, **{name: value for name, value in given.items() if value is not None})


def _blend(options: TrainOptions, objective: Objective) -> BlendSchedule:
    if objective.tail != "blend":
        for name in ("blend", "blend_end"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"{name} is {getattr(options, name)}, but only tail 'blend' mixes two terms; leave it out, or use "
                    "--tail blend on a varopt cache"
                )
    return BlendSchedule(0.5 if options.blend is None else options.blend, options.blend_end)


def _knows_labels(cache: Cache) -> bool:
    """Whether the first block holds the teacher's log-probability of each of its labels."""
    blocks = cache.read_blocks(0, 1)
    known = np.isfinite(blocks.targets.label_logprob)
    return bool(known[blocks.labels().ravel() != -100].all())
