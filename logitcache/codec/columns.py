"""Per-row scalars <-> small integers: label_logprob, entropy and tail mass, quantised in the log domain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DamagedCacheError, TargetsError

STEPS_PER_NAT = 64
TAIL_STEPS_PER_NAT = 16
# Logits of a float32 tail or head lie in (-104, 104); the offset makes their codes positive.
TAIL_OFFSET = 2 + 128 * TAIL_STEPS_PER_NAT
ROUNDING = 1e-3
MOST_NATS = 1e12


def encode_logprob(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """0: NaN (no next token), 1: -inf, otherwise 2 + round(-64 * value). Raises TargetsError above 0."""
    _refuse(np.isposinf(values), "label_logprob", "infinite and above 0")
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
    _refuse(np.isinf(values), "entropy", "infinite")
    codes = _steps("entropy", values.astype(np.float64)) + 1
    codes[np.isnan(values)] = 0
    return codes


def decode_entropy(codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """The inverse of `encode_entropy`, to within 1/128 nat."""
    values = ((codes - 1) / STEPS_PER_NAT).astype(np.float32)
    values[codes == 0] = np.nan
    return values


def encode_tail(tail: NDArray[np.float32], head: NDArray[np.float64]) -> NDArray[np.int64]:
    """0: no mass, 1: all mass, otherwise the logit in steps of 1/16, so that tail and head both stay precise.

    `head` is the sum of a row's weights: where it is small, 1 - tail no longer shows it.
    """
    mass = tail.astype(np.float64)
    rest = np.where((mass > 0.5) & (head > 0), head, 1 - mass)
    mass = np.where(mass > 0.5, 1 - rest, mass)
    inside = (mass > 0) & (rest > 0)
    codes = np.where(mass > 0, 1, 0).astype(np.int64)
    logit = np.log(mass[inside]) - np.log(rest[inside])
    codes[inside] = np.rint(logit * TAIL_STEPS_PER_NAT).astype(np.int64) + TAIL_OFFSET
    return codes


def decode_tail(codes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The inverse of `encode_tail`: tail and head, whose relative errors are at most 1/31."""
    logit = (codes - TAIL_OFFSET) / TAIL_STEPS_PER_NAT
    if np.abs(logit[codes > 1]).max(initial=0) > 128:
        raise DamagedCacheError("a stored tail mass is outside its range")
    logit[codes == 0], logit[codes == 1] = -np.inf, np.inf
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(logit))


def _steps(name: str, values: NDArray[np.float64]) -> NDArray[np.int64]:
    finite = np.where(np.isfinite(values), values, 0)
    _refuse(finite < -ROUNDING, name, "on the wrong side of 0")
    _refuse(finite > MOST_NATS, name, f"further from 0 than {MOST_NATS:g} nats")
    return np.rint(np.maximum(finite, 0) * STEPS_PER_NAT).astype(np.int64)


def _refuse(bad: NDArray[np.bool_], name: str, why: str) -> None:
    if bad.any():
        raise TargetsError(f"row {int(np.argmax(bad))}'s {name} is {why}")
