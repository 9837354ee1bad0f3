"""The one primitive every objective is made of: a linear head, reduced to a logsumexp and a few gathered logits.

Legend: N rows (token positions), D width, V rows of the head, K gathered ids per row.
"""

from __future__ import annotations

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import chunk, operators, parallel, reference, statistics, triton_gather
from logitcache.kernels.chunk import linear_gather_total
from logitcache.kernels.head import (
    GatherResult,
    HeadOptions,
    HeadStatistics,
    accumulation_dtype,
    check_head,
    check_ids,
    check_temperature,
)
from logitcache.kernels.plan import GatherPlan
from logitcache.kernels.reference import dense_logits
from logitcache.kernels.shard import VocabularyShard

__all__ = [
    "IMPLEMENTATIONS",
    "GatherResult",
    "HeadOptions",
    "HeadStatistics",
    "VocabularyShard",
    "accumulation_dtype",
    "check_head",
    "check_implementation",
    "check_temperature",
    "choose_implementation",
    "dense_logits",
    "head_entropy",
    "head_statistics",
    "linear_gather",
    "linear_gather_total",
]

IMPLEMENTATIONS = ("reference", "split", "chunk", "triton")
# On GPUs a fourth product costs less than chunk's passes over whole logits, up to about this width of hidden states.
WIDEST_RECOMPUTED = 1650


def check_implementation(impl: str, device: torch.device | None = None, spelling: str = 'impl="{}"') -> None:
    """Raise ObjectiveError for a name that does not exist, or that cannot run on a device where one is given.

    `spelling` is how the message names an implementation.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ObjectiveError(f"impl is {impl!r}; this version has auto, {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" and device and (reason := triton_gather.unavailable(device, spelling=spelling)):
        raise ObjectiveError(reason)


def choose_implementation(impl: str, hidden: torch.Tensor, weight: torch.Tensor, summed: bool) -> str:
    """The implementation that `impl` stands for here.

    Args:
        impl: a name, or 'auto' for the fastest. On CPU: 'chunk' for sums, otherwise 'split'. Where Triton runs
            compiled: 'chunk' for sums over hidden states wider than 1,650, otherwise 'triton'.
        hidden, weight: as in `linear_gather`.
        summed: whether the caller wants a sum of row losses, whose gradient can be made in the forward pass.

    Raises:
        ObjectiveError: a name that does not exist, or an implementation that cannot run here.
    """
    check_implementation(impl)
    dtype = accumulation_dtype(hidden, weight)
    if impl == "triton" and (reason := triton_gather.unavailable(hidden.device, dtype)):
        raise ObjectiveError(reason)
    if impl != "auto":
        return impl
    compiled = hidden.device.type == "cuda" and triton_gather.unavailable(hidden.device, dtype) is None
    if summed and (not compiled or hidden.shape[1] > WIDEST_RECOMPUTED):
        return "chunk"
    return "triton" if compiled else "split"


def linear_gather(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    head: HeadOptions | None = None,
    impl: str = "auto",
    slice_width: int | None = None,
) -> GatherResult:
    """Logsumexp of the head's logits over everything but `ids`, and the logits at `ids`.

    With z = softcap(logit_scale * (hidden @ weight.T + bias)), of which the first `valid_vocab` columns count:

        lse_rest[n]   = log(sum over v not in ids[n] of exp(z[n, v]))
        lse_rest_T[n] = log(sum over v not in ids[n] of exp(z[n, v] / T))
        z[n, k]       = z[n, ids[n, k]]

    The sum leaves out the ids on purpose. A full logsumexp is one step away, `logaddexp(lse_rest, logsumexp(z))`, while
    the student's mass outside the ids, P = exp(lse_rest - lse), is never a difference of nearly equal numbers: it stays
    exact to rounding however confident the student is (1 - sum(p) would be all error below 1e-7 in float32). Gradients
    do not overlap either: g * exp(z - lse_rest) outside the ids, the caller's own gradient, as it is, at the ids.

    Args:
        hidden: [N, D] float64, float32, float16 or bfloat16.
        weight: [V, D]; its type may differ from hidden's.
        ids: int64 [N, K], unique within a row; -1, anywhere, is padding. K may be 0.
        temperature: T > 0.
        head: bias, softcap, logit_scale, valid_vocab and shard. With a shard, weight and bias are this rank's rows, ids
            and valid_vocab count over the whole head, and every rank of the group must call (see `parallel.py`).
        impl: 'auto', 'split' (slices of the vocabulary), 'chunk' (chunks of rows), 'triton' (CUDA) or 'reference'
            (dense, autograd); see `choose_implementation`.
        slice_width: columns per tile of 'split'; by default as many as keep a tile near 16 MB on CPU, 64 MB elsewhere.

    Returns:
        lse_rest [N], lse_rest_T [N] (the same tensor at T == 1) and z [N, K]: float64 for float64 inputs, otherwise
        float32 whatever the inputs. A row whose ids are the whole vocabulary has lse_rest = -inf and no gradient from
        it. z is -inf at padding, without a gradient. Gradients have the types of the inputs. One derivative only.

    Raises:
        ObjectiveError: shapes, types or devices do not fit, or impl does not exist. On CPU also: an id past the valid
            vocabulary or twice in a row. (On other devices reading the ids would stall the device; there an id past
            the vocabulary gets z = -inf from 'split'.)
    """
    head = head or HeadOptions()
    check_temperature(temperature)
    check_head(hidden, weight, head)
    chosen = choose_implementation(impl, hidden, weight, summed=False)
    check_ids(hidden, ids, head.columns(weight))
    if head.shard is not None:

        def local(hidden: torch.Tensor, ids: torch.Tensor, head: HeadOptions) -> GatherResult:
            return linear_gather(
                hidden, weight, ids, temperature=temperature, head=head, impl=chosen, slice_width=slice_width
            )

        return parallel.linear_gather(hidden, weight, ids, temperature, head, local)
    if chosen == "reference":
        return reference.linear_gather(hidden, weight, ids, temperature, head)
    plan = GatherPlan.of(hidden, weight, head, temperature, slice_width)
    if chosen == "chunk":
        lse_rest_N, lse_rest_T_N, z_NK = chunk.linear_gather(hidden, weight, ids, head, plan)
    else:
        lse_rest_N, lse_rest_T_N, z_NK = operators.gather(chosen, hidden, weight, head.bias, ids, plan)
    return GatherResult(lse_rest_N, lse_rest_N if lse_rest_T_N is None else lse_rest_T_N, z_NK)


def head_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    head: HeadOptions | None = None,
    slice_width: int | None = None,
) -> HeadStatistics:
    """Logsumexp, largest logit, argmax and the logits at `ids`, over slices of the vocabulary and without a graph.

    Args: as for `linear_gather`.

    Returns:
        lse [N] (nats, over all valid columns), max_logit [N], argmax int64 [N] (the first one of equals) and z [N, K].

    Raises:
        ObjectiveError: as for `linear_gather`.
    """
    head = head or HeadOptions()
    check_head(hidden, weight, head)
    check_ids(hidden, ids, head.columns(weight))
    if head.shard is not None:
        return parallel.head_statistics(
            hidden,
            weight,
            ids,
            head,
            lambda ids, head: statistics.head_statistics(hidden, weight, ids, head, slice_width),
        )
    return statistics.head_statistics(hidden, weight, ids, head, slice_width)


def head_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    head: HeadOptions | None = None,
    slice_width: int | None = None,
) -> torch.Tensor:
    """[N] entropy in nats of the head's softmax, over slices of the vocabulary and without a graph.

    One more product with the head, as large as that of a forward pass; float64 for float64 inputs, float32 otherwise.

    Args: as for `linear_gather`.

    Raises:
        ObjectiveError: as for `linear_gather`.
    """
    head = head or HeadOptions()
    check_head(hidden, weight, head)
    if head.shard is not None:
        return parallel.head_entropy(
            hidden, weight, head, lambda head: statistics.head_entropy(hidden, weight, head, slice_width)
        )
    return statistics.head_entropy(hidden, weight, head, slice_width).entropy
