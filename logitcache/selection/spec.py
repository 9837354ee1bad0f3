"""What to keep of a distribution: the `--select` argument as a value. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from logitcache.errors import UsageError

SPELLINGS = "top-k:64, top-p:0.95:100 or sample:50"
MAX_ENTRIES = 65_535


@dataclass(frozen=True)
class Selection:
    """A selection method and its parameters.

    `top-k:K` keeps the K most probable ids. `top-p:P:K` keeps the fewest most probable ids that hold mass P, at
    most K (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). `sample:N` keeps the distinct
    ids among N draws with replacement and their counts; count / N is an unbiased estimate of p (Random Sampling
    Knowledge Distillation, "Sparse Logit Sampling", ACL 2025).

    Args:
        method: "top-k", "top-p" or "sample".
        size: K, the most entries a row may keep, or N, the number of draws; 1 to 65,535.
        mass: P, in (0, 1]; only for "top-p".
    """

    method: str
    size: int
    mass: float | None = None

    def __post_init__(self) -> None:
        if self.method not in ("top-k", "top-p", "sample"):
            raise UsageError(f"selection method {self.method!r} is unknown; write {SPELLINGS}")
        if not 1 <= self.size <= MAX_ENTRIES:
            raise UsageError(f"selection {self} keeps {self.size} entries a row; choose 1 to {MAX_ENTRIES}")
        if (self.method == "top-p") != (self.mass is not None):
            raise UsageError(f"selection {self.method} is spelled otherwise; write {SPELLINGS}")
        if self.mass is not None and not (math.isfinite(self.mass) and 0 < self.mass <= 1):
            raise UsageError(f"top-p mass {self.mass} is outside (0, 1]; write for example top-p:0.95:100")

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read `top-k:K`, `top-p:P:K` or `sample:N`. Raises UsageError."""
        method, *numbers = text.strip().lower().split(":")
        try:
            if method in ("top-k", "sample") and len(numbers) == 1:
                return cls(method, int(numbers[0]))
            if method == "top-p" and len(numbers) == 2:
                return cls(method, int(numbers[1]), float(numbers[0]))
        except UsageError:
            raise
        except ValueError:
            pass
        raise UsageError(f"selection {text!r} is not understood; write {SPELLINGS}")

    def __str__(self) -> str:
        parts = [self.method] + ([repr(self.mass)] if self.mass is not None else []) + [str(self.size)]
        return ":".join(parts)

    @property
    def unbiased(self) -> bool:
        """Whether E[weights] equals the teacher's distribution."""
        return self.method == "sample"

    @property
    def draws(self) -> int:
        """Uniform random numbers needed for each row."""
        return self.size if self.method == "sample" else 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UsageError when a row cannot keep that many distinct ids."""
        if self.method != "sample" and self.size > vocab_size:
            raise UsageError(f"selection {self} keeps {self.size} ids, but the teacher's vocabulary has {vocab_size}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in plan and manifest."""
        return {"method": self.method, "size": self.size, "mass": self.mass}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Selection:
        """The inverse of `to_dict`."""
        return cls(fields["method"], fields["size"], fields.get("mass"))
