"""Distributions in, sparse rows out, on the device where the logits are.

Legend: n rows of one slice, K entries kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.selection.distribution import Distribution, ascending, entries_of, largest
from logitcache.selection.draws import mass_outside, sample
from logitcache.selection.kept import Kept
from logitcache.selection.spec import Selection
from logitcache.selection.varopt import varopt
from logitcache.targets import SparseTargets


def select(selection: Selection, dist: Distribution, uniforms: NDArray[np.float64] | None = None) -> SparseTargets:
    """Keep what `selection` says of each row.

    Args:
        selection: what to keep.
        dist: n distributions.
        uniforms: float64 [n, selection.draws] from `block_uniforms`; only for sampled selections.

    Returns:
        SparseTargets of n rows on the CPU, without label_logprob and entropy. Entries of probability 0 are left out.
    """
    drawn = None if uniforms is None else torch.from_numpy(uniforms).to(dist.probs.device)
    return keep(selection, dist, drawn).targets()


def keep(selection: Selection, dist: Distribution, uniforms_nK: torch.Tensor | None = None) -> Kept:
    """As `select`, but what is kept stays on the logits' device until it is asked for.

    Args:
        uniforms_nK: float64, on that device.
    """
    if not selection.keeps_ids:
        return Kept({"rows": dist.lse}, _no_entries)
    if not selection.draws:
        return _most_probable(selection, dist)
    assert uniforms_nK is not None
    if selection.method == "varopt":
        return varopt(dist, selection.size, uniforms_nK)
    return sample(dist, uniforms_nK, selection.exponent)


def _no_entries(rows: NDArray[np.float32]) -> SparseTargets:
    return SparseTargets(np.zeros(len(rows) + 1, dtype=np.int64), [], [])


def _most_probable(selection: Selection, dist: Distribution) -> Kept:
    ids_nK = largest(dist.logits, selection.size)
    probs_nK = dist.probs.gather(1, ids_nK)
    rest_n = mass_outside(dist, ids_nK, probs_nK)
    return Kept({"ids": ids_nK, "probs": probs_nK, "rest": rest_n}, _with_tail, partial(_shares, selection.mass))


def _shares(mass: float | None, ids: torch.Tensor, probs: torch.Tensor, rest: torch.Tensor) -> dict[str, torch.Tensor]:
    """Entries [n, K] and tail mass [n] of the K most probable ids [n, K] and the mass outside them [n]."""
    weights_nK = probs.to(torch.float64)
    # The float32 softmax of a large vocabulary sums to 1 only within 1e-4, and the tail may be smaller than that.
    total_n1 = weights_nK.sum(1, keepdim=True) + rest.unsqueeze(1)
    if mass is not None:
        kept_nK = weights_nK.cumsum(1) - weights_nK < mass
        rest = rest + torch.where(kept_nK, 0, weights_nK).sum(1)
        weights_nK = torch.where(kept_nK, weights_nK, 0)
    entries = ascending(ids, (weights_nK / total_n1).to(torch.float32))
    return {**entries, "tail": (rest / total_n1.squeeze(1)).clamp(0, 1)}


def _with_tail(tail: NDArray[np.float64], **entries: NDArray[Any]) -> SparseTargets:
    offsets, ids, weights = entries_of(**entries)
    return SparseTargets(offsets, ids, weights, tail_mass=tail)
