"""Distributions in, sparse rows out, on the device where the logits are.

Legend: n rows of one slice, K entries kept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.selection.distribution import Distribution, largest, sorted_rows
from logitcache.selection.draws import sample
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
    if not selection.keeps_ids:
        rows = dist.probs.shape[0]
        return SparseTargets(np.zeros(rows + 1, dtype=np.int64), [], [])
    if not selection.draws:
        return _most_probable(selection, dist)
    assert uniforms is not None
    uniforms_nK = torch.from_numpy(uniforms).to(dist.probs.device)
    if selection.method == "varopt":
        return varopt(dist, selection.size, uniforms_nK)
    return sample(dist, uniforms_nK, selection.exponent)


def _most_probable(selection: Selection, dist: Distribution) -> SparseTargets:
    ids_nK = largest(dist.logits, selection.size)
    weights_nK = dist.probs.gather(1, ids_nK)
    if selection.mass is not None:
        before_nK = weights_nK.cumsum(1, dtype=torch.float64) - weights_nK
        weights_nK = torch.where(before_nK < selection.mass, weights_nK, 0)
    tail_n = 1 - weights_nK.sum(1, dtype=torch.float64)
    offsets, ids, weights = sorted_rows(ids_nK, weights_nK)
    return SparseTargets(offsets, ids, weights, tail_mass=tail_n.clamp(0, 1).cpu().numpy())
