"""Per-row scalars <-> small integers: label_logprob, entropy and tail mass, quantised in the log domain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DamagedCacheError, TargetsError

STEPS_PER_NAT = 64
TAIL_STEPS_PER_NAT = 16
# Logits of a float32 mass lie in (-104, 17); the offset makes their codes positive.
TAIL_OFFSET = 2 + 128 * TAIL_STEPS_PER_NAT
ROUNDING = 1e-3


def encode_logprob(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """0: NaN (no next token), 1: -inf, otherwise 2 + round(-64 * value). Raises TargetsError above 0."""
    codes = _steps("label_logprob", -values.astype(np.float64)) + 2
    codes[np.isneginf(values)] = 1
    codes[np.isnan(values)] = 0
    return codes


def decode_logprob(codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """The inverse of `encode_logprob`, to within 1/128 nat."""
    values = ((2 - codes) / STEPS_PER_NAT).astype(np.float32)
    values[codes == 0] = np.nan
    values[codes == 1] = -np.inf
    return values


def encode_entropy(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """0: NaN (unknown), otherwise 1 + round(64 * value). Raises TargetsError below 0 or at infinity."""
    if np.isinf(values).any():
        raise TargetsError(f"row {int(np.argmax(np.isinf(values)))} has an infinite entropy")
    codes = _steps("entropy", values.astype(np.float64)) + 1
    codes[np.isnan(values)] = 0
    return codes


def decode_entropy(codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """The inverse of `encode_entropy`, to within 1/128 nat."""
    values = ((codes - 1) / STEPS_PER_NAT).astype(np.float32)
    values[codes == 0] = np.nan
    return values


def encode_tail(tail: NDArray[np.float32]) -> NDArray[np.int64]:
    """0: no mass, 1: all mass, otherwise the logit in steps of 1/16, so that tail and head both stay precise."""
    mass = tail.astype(np.float64)
    inside = (mass > 0) & (mass < 1)
    codes = np.where(mass >= 1, 1, 0).astype(np.int64)
    logit = np.log(mass[inside]) - np.log1p(-mass[inside])
    codes[inside] = np.rint(logit * TAIL_STEPS_PER_NAT).astype(np.int64) + TAIL_OFFSET
    return codes


def decode_tail(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The inverse of `encode_tail`: relative error of tail and of 1 - tail at most 1/32."""
    logit = (codes - TAIL_OFFSET) / TAIL_STEPS_PER_NAT
    if np.abs(logit[codes > 1]).max(initial=0) > 128:
        raise DamagedCacheError("a stored tail mass is outside its range")
    mass = 1 / (1 + np.exp(-logit))
    mass[codes == 0] = 0
    mass[codes == 1] = 1
    return mass


def _steps(name: str, values: NDArray[np.float64]) -> NDArray[np.int64]:
    finite = np.where(np.isfinite(values), values, 0)
    if (finite < -ROUNDING).any():
        row = int(np.argmax(finite < -ROUNDING))
        raise TargetsError(f"row {row} has {name} {values[row]} on the wrong side of 0")
    return np.rint(np.maximum(finite, 0) * STEPS_PER_NAT).astype(np.int64)
