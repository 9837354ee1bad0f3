"""How the weights of the loss's terms move over a run."""

from __future__ import annotations

from dataclasses import dataclass

from logitcache.errors import UsageError

KINDS = ("constant", "linear", "wsd")


@dataclass(frozen=True)
class AlphaSchedule:
    """alpha at each optimiser step: loss = (1 - alpha) CE + alpha T^2 divergence.

    `constant` keeps the peak. `linear` falls from the peak to `final` at the end. `wsd` (warm up, stable, decay: the
    WSD-alpha of "Pre-training Distillation for LLMs: A Design Space Exploration", arXiv 2410.16215) rises linearly
    from 0, holds the peak and falls linearly to `final`.

    Args:
        kind: "constant", "linear" or "wsd".
        peak: largest value, in [0, 1].
        warmup: share of the run in which wsd rises.
        decay: share of the run, at its end, in which wsd falls.
        final: value at the end of linear and wsd.
    """

    kind: str = "constant"
    peak: float = 0.9
    warmup: float = 0.1
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"alpha schedule {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        for name in ("peak", "warmup", "decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"alpha schedule: {name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.warmup + self.decay > 1:
            raise UsageError("alpha schedule: warmup and decay together exceed the run; they are shares of it")

    def at(self, step: int, total_steps: int) -> float:
        """alpha of optimiser step `step` (0-based) of `total_steps`."""
        done = step / max(1, total_steps - 1)
        if self.kind == "constant":
            return self.peak
        if self.kind == "linear":
            return self.peak + (self.final - self.peak) * min(done, 1.0)
        if done < self.warmup:
            return self.peak * done / self.warmup
        if done <= 1 - self.decay or self.decay == 0:
            return self.peak
        return self.peak + (self.final - self.peak) * min(1.0, (done - 1 + self.decay) / self.decay)


@dataclass(frozen=True)
class BlendSchedule:
    """Share of the unbiased term of tail='blend' at each optimiser step, from `start` to `end` in a straight line.

    The bucket has no sampling noise, the unbiased term no truncation bias; docs/objectives.md has what was measured.

    Args:
        start: value at the first step, in [0, 1].
        end: value at the last step; None: `start`, so that it is constant.
    """

    start: float = 0.5
    end: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"blend schedule: {name} is {value}; it must lie in [0, 1]")

    def at(self, step: int, total_steps: int) -> float:
        """The share at optimiser step `step` (0-based) of `total_steps`."""
        end = self.start if self.end is None else self.end
        done = min(1.0, step / max(1, total_steps - 1))
        return (1 - done) * self.start + done * end
