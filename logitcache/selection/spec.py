"""What to keep of a distribution: the `--select` argument as a value. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from logitcache.errors import UsageError

METHODS = ("top-k", "top-p", "sample", "varopt", "label")
SPELLINGS = "top-k:64, top-p:0.95:100, sample:50, sample:50:0.8, varopt:12 or label"
MAX_ENTRIES = 65_535
# Beyond it float32 cannot hold p ** exponent of ids that matter, so they would never be drawn.
MAX_EXPONENT = 4.0


@dataclass(frozen=True)
class Selection:
    """A selection method and its parameters. p is the teacher's probability of an id, w the stored weight.

    `top-k:K` keeps the K most probable ids, w = p.

    `top-p:P:K` keeps the fewest most probable ids that hold mass P, at most K, w = p (Holtzman et al. 2020, "The
    Curious Case of Neural Text Degeneration").

    `sample:N` keeps the distinct ids among N draws with replacement from p, w = count / N; Var[w] = p (1 - p) / N.
    `sample:N:T` draws from q ~ p^T, w = count / N * p / q; Var[w] = p^2 (1 / q - 1) / N (Anshumann et al. 2025,
    "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL).

    `varopt:K` keeps K ids: those with p above the row's threshold tau, w = p, and a sample of the others, each with
    probability p / tau and w = tau, where sum(min(1, p / tau)) = K; Var[w] = p (tau - p) in the tail and 0 in the
    head, the least sum of variances of all unbiased estimates that keep K ids (Cohen, Duffield, Kaplan, Lund, Thorup
    2011, "Efficient stream sampling for variance-optimal estimation of subset sums", SIAM J. Comput. 40).

    `label` keeps no ids: only log p(next token), for offline on-policy distillation.

    docs/selections.md compares them.

    Args:
        method: "top-k", "top-p", "sample", "varopt" or "label".
        size: K, the most entries a row may keep, or N, the number of draws; 1 to 65,535, and 0 for "label".
        mass: P, in (0, 1]; only for "top-p".
        exponent: T, in (0, 4]; only for "sample", and None for 1.

    Raises:
        UsageError: a parameter is out of its range, or belongs to another method.
    """

    method: str
    size: int
    mass: float | None = None
    exponent: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"selection method {self.method!r} is unknown; write {SPELLINGS}")
        if self.method == "label" and self.size:
            raise UsageError(f"selection label keeps no ids, not {self.size}; write {SPELLINGS}")
        if self.keeps_ids and not 1 <= self.size <= MAX_ENTRIES:
            raise UsageError(f"selection {self} keeps {self.size} entries a row; choose 1 to {MAX_ENTRIES}")
        if (self.method == "top-p") != (self.mass is not None):
            raise UsageError(f"selection {self.method} is spelled otherwise; write {SPELLINGS}")
        if self.mass is not None and not (math.isfinite(self.mass) and 0 < self.mass <= 1):
            raise UsageError(f"top-p mass {self.mass} is outside (0, 1]; write for example top-p:0.95:100")
        if self.exponent is not None:
            self._check_exponent(self.exponent)

    def _check_exponent(self, exponent: float) -> None:
        if self.method != "sample":
            raise UsageError(f"selection {self.method} has no exponent; write {SPELLINGS}")
        if not 0 < exponent <= MAX_EXPONENT:
            raise UsageError(
                f"sample exponent {exponent} is outside (0, {MAX_EXPONENT:g}]; write for example sample:50:0.8"
            )
        if exponent == 1:
            object.__setattr__(self, "exponent", None)

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read `top-k:K`, `top-p:P:K`, `sample:N`, `sample:N:T`, `varopt:K` or `label`. Raises UsageError."""
        method, *numbers = text.strip().lower().split(":")
        try:
            if method == "label" and not numbers:
                return cls(method, 0)
            if method in ("top-k", "sample", "varopt") and len(numbers) == 1:
                return cls(method, int(numbers[0]))
            if method == "top-p" and len(numbers) == 2:
                return cls(method, int(numbers[1]), mass=float(numbers[0]))
            if method == "sample" and len(numbers) == 2:
                return cls(method, int(numbers[0]), exponent=float(numbers[1]))
        except UsageError:
            raise
        except ValueError:
            pass
        raise UsageError(f"selection {text!r} is not understood; write {SPELLINGS}")

    def __str__(self) -> str:
        if not self.keeps_ids:
            return self.method
        parts = [self.method] + ([repr(self.mass)] if self.mass is not None else []) + [str(self.size)]
        return ":".join(parts + ([repr(self.exponent)] if self.exponent is not None else []))

    @property
    def unbiased(self) -> bool:
        """Whether E[weights] equals the teacher's distribution."""
        return self.method in ("sample", "varopt")

    @property
    def keeps_ids(self) -> bool:
        """Whether rows have entries; `label` rows have columns only."""
        return self.method != "label"

    @property
    def draws(self) -> int:
        """Uniform random numbers needed for each row."""
        return {"sample": self.size, "varopt": 1}.get(self.method, 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UsageError when a row cannot keep that many distinct ids."""
        if self.method != "sample" and self.size > vocab_size:
            raise UsageError(
                f"selection {self} keeps {self.size} ids, but the teacher's vocabulary has {vocab_size}; keep fewer"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in plan and manifest; `exponent` only where there is one."""
        fields: dict[str, Any] = {"method": self.method, "size": self.size, "mass": self.mass}
        return fields if self.exponent is None else {**fields, "exponent": self.exponent}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Selection:
        """The inverse of `to_dict`."""
        return cls(fields["method"], fields["size"], fields.get("mass"), fields.get("exponent"))
