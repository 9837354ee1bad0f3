"""How a run's options and its cache decide what is minimised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from logitcache.errors import ObjectiveError, UsageError
from logitcache.losses import Objective, TokenMask
from logitcache.losses.spelling import OPTIONS
from logitcache.reader import BlockSource
from logitcache.store import Cache
from logitcache.training.options import TrainOptions
from logitcache.training.schedules import AlphaSchedule, BlendSchedule
from logitcache.training.trainer import DistillationSettings


def settings_for(options: TrainOptions, cache: Cache | BlockSource) -> DistillationSettings:
    """The settings that options ask for on this cache.

    Raises:
        ObjectiveError: a combination without a correct meaning on this cache; says what to use or to store instead.
        UsageError: an option that the objective does not have or that is out of range, or a schedule or a mask that
            makes no sense.
        DamagedCacheError: its first block with labels is damaged (read for policy-gradient and masks by
            teacher-entropy only).
    """
    unbiased, head = cache.unbiased, cache.has_exact_head
    objective = choose_objective(options, unbiased)
    known = objective.kind != "policy_gradient" or _is_known(cache, "label_logprob")
    objective.check(unbiased, options.temperature, options.alpha, head, known, cache.keeps_ids, OPTIONS)
    alpha = AlphaSchedule(options.alpha_schedule, options.alpha, options.alpha_warmup, options.alpha_decay)
    blend, mask = _blend(options, objective), _mask(options, objective, cache)
    return DistillationSettings(
        objective, alpha, options.temperature, unbiased, options.impl, head, blend, options.z_loss, mask
    )


def settings_for_all(options: TrainOptions, sources: Sequence[BlockSource]) -> DistillationSettings:
    """The settings for sources that are mixed; each must suit. Raises as `settings_for`."""
    all_settings = [settings_for(options, source) for source in sources]
    # They differ in nothing but whether rows say which of their weights are exact.
    return next((settings for settings in all_settings if not settings.has_exact_head), all_settings[0])


def choose_objective(options: TrainOptions, unbiased: bool) -> Objective:
    """The objective that options name; tail "auto" is what suits the cache in a forward KL, "bucket" in others.

    Raises UsageError for an option that it does not have or that is out of range.
    """
    kind = "forward_kl" if options.objective == "auto" else options.objective.replace("-", "_")
    given: dict[str, Any] = {"beta": options.beta, "reverse": options.reverse, "clip": options.clip}
    if options.tail != "auto":
        given["tail"] = options.tail
    elif kind == "forward_kl":
        given["tail"] = Objective.default_for(unbiased).tail
    try:
        return Objective.named(kind, OPTIONS, **{name: value for name, value in given.items() if value is not None})
    except ObjectiveError as error:
        raise UsageError(str(error)) from error


def _blend(options: TrainOptions, objective: Objective) -> BlendSchedule:
    if objective.tail != "blend":
        for name in ("blend", "blend_end"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"{OPTIONS.name(name)} is {getattr(options, name)}, but only --tail blend mixes two terms; leave "
                    "it out, or use --tail blend on a varopt cache"
                )
    return BlendSchedule(0.5 if options.blend is None else options.blend, options.blend_end)


def _mask(options: TrainOptions, objective: Objective, cache: Cache | BlockSource) -> TokenMask | None:
    if options.mask is None:
        if options.mask_rest is not None:
            raise UsageError(
                f"--mask-rest is {options.mask_rest}, but there is no mask; leave it out, or use --mask "
                "teacher-entropy:0.85"
            )
        return None
    mask = TokenMask.parse(options.mask, options.mask_rest or "labels")
    if not objective.reads_targets or options.alpha == 0:
        why = "--alpha is 0" if objective.reads_targets else "the objective is cross-entropy"
        raise UsageError(f"--mask is {mask}, but {why}, so that there is nothing to keep or to drop; leave it out")
    if mask.by == "teacher-entropy" and not _is_known(cache, "entropy"):
        raise UsageError(
            f"--mask is {mask}, but {cache.location} does not hold the teacher's entropy; use a cache that `dump` "
            "wrote with a teacher that runs here and another selection than label, and whose entropy was not dropped, "
            "or --mask student-entropy:0.5"
        )
    return mask


def _is_known(cache: Cache | BlockSource, column: str) -> bool:
    """Whether the first block that has labels holds a column of the teacher's for each of them."""
    for block in range(cache.num_blocks):
        blocks = cache.read_blocks(block, block + 1)
        labelled = blocks.labels().ravel() != -100
        if labelled.any():
            return bool(np.isfinite(getattr(blocks.targets, column)[labelled]).all())
    return True
