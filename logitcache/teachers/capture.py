"""Blocks in, sparse rows out: one teacher forward, its head in slices, any number of selections on each slice.

Legend: B blocks of L tokens, R real rows (positions before the corpus' end), n rows of a slice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.errors import ModelError
from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution, Summary
from logitcache.selection.kept import Gathered, Kept
from logitcache.selection.select import keep
from logitcache.targets import SparseTargets
from logitcache.teachers.teacher import BlockBatch, PendingRows

# Softmax, entropy and selection walk their rows several times: on a CPU the rows should stay in its nearer caches.
_CPU_STATISTICS_BYTES = 3 << 20


class LogitsTeacher(Protocol):
    """What capturing needs of a teacher that makes logits here; `TransformersTeacher` is one."""

    vocab_size: int
    device: torch.device

    def hidden(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """Last hidden states [B * L, D] of blocks [B, L]."""

    def product(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, D] times the head, [n, V]."""

    def finish(self, product_rows: torch.Tensor) -> torch.Tensor:
        """float32 logits [n, V] of rows of `product`."""

    def row_slices(self, n_rows: int) -> Iterator[slice]:
        """Slices of rows whose logits fit the memory budget."""


class RowsFromLogits:
    """`Teacher.begin_rows` for a `LogitsTeacher`."""

    def begin_rows(self: LogitsTeacher, batch: BlockBatch) -> PendingRows:
        """One forward pass for all selections, as `begin_capture`."""
        return begin_capture(self, batch)


def capture_blocks(teacher: LogitsTeacher, batch: BlockBatch) -> list[SparseTargets]:
    """The teacher's distributions at the positions of `batch`, once for each selection.

    Raises:
        ModelError: a logit is NaN or +inf, or all are -inf, and `batch.nonfinite` is "fail"; the message names block
            and position.
    """
    return begin_capture(teacher, batch)()


@torch.inference_mode()
def begin_capture(teacher: LogitsTeacher, batch: BlockBatch) -> PendingRows:
    """As `capture_blocks`; what it returns is to be called, by any thread, for the rows.

    A GPU may still be at work when this returns: the copies to the processor are under way behind it, and the next
    batch can be begun. Calling waits for them, checks and assembles; the teacher is not needed for that.
    """
    selections, counted_R, device = batch.selections, batch.counted_R, teacher.device
    wanted = np.flatnonzero(counted_R)
    if not wanted.size:
        return lambda: [_nothing(selection).spread(counted_R) for selection in selections]
    labels_R = torch.from_numpy(_labels(batch.tokens_BL, batch.num_rows)[wanted]).to(device)
    uniforms = [_uniforms(batch, selection.draws, wanted, device) for selection in selections]
    hidden_RD = teacher.hidden(batch.tokens_BL)[: batch.num_rows]
    if batch.counted_BL is not None:
        hidden_RD = hidden_RD[torch.from_numpy(wanted).to(hidden_RD.device)]
    space = _space(teacher)
    gathered = [Gathered(wanted.size) for _ in selections]
    summaries: list[Summary] = []
    for outer in teacher.row_slices(wanted.size):
        # The product lives only as long as this call: two slices at once would double the memory.
        for rows, dist in _distributions(teacher, teacher.product(hidden_RD[outer]), outer, space):
            if batch.nonfinite == "mask":
                dist = _selectable(dist)
            for selection, uniform, whole in zip(selections, uniforms, gathered, strict=True):
                whole.put(rows, keep(selection, dist, None if uniform is None else uniform[rows]))
            summaries.append(dist.summary(labels_R[rows], spend=True))
            del dist
    summary = Summary.concatenate(summaries)
    return _Captured(
        torch.stack([summary.lse, summary.label_logprob(), summary.entropy()]).to("cpu", non_blocking=True),
        [whole.kept.to_host() for whole in gathered],
        _now_on(device),
        batch,
        counted_R,
    )


@dataclass(frozen=True, eq=False)
class _Captured:
    """What was begun to be copied of a batch's R rows, of which `counted_R` are wanted; called, the rows.

    Args:
        columns_3R: float32, lse, label_logprob and entropy.
        kept: of each selection.
        ready: when the copies are there; None where they are.
        batch: what was asked for.
        counted_R: bool [R], that of `batch`.
    """

    columns_3R: torch.Tensor
    kept: list[Kept]
    ready: torch.cuda.Event | None
    batch: BlockBatch
    counted_R: NDArray[np.bool_]

    def __call__(self) -> list[SparseTargets]:
        if self.ready is not None:
            self.ready.synchronize()
        lse, label_logprob, entropy = self.columns_3R.numpy()
        finite = np.isfinite(lse)
        if self.batch.nonfinite == "fail":
            self._refuse(finite)
        found_R = self.counted_R.copy()
        found_R[self.counted_R] = finite
        parts = [
            kept.targets()
            # Beside a label's log-probability the entropy would take as many bytes again.
            .with_columns(label_logprob, entropy if selection.keeps_ids else np.full_like(entropy, np.nan))
            for kept, selection in zip(self.kept, self.batch.selections, strict=True)
        ]
        if not finite.all():
            parts = [part.take(np.flatnonzero(finite)) for part in parts]
        return [part.spread(found_R) for part in parts]

    def _refuse(self, finite: NDArray[np.bool_]) -> None:
        bad = np.flatnonzero(~finite)
        if bad.size:
            row = int(np.flatnonzero(self.counted_R)[bad[0]])
            block, position = divmod(row, self.batch.tokens_BL.shape[1])
            raise ModelError(
                f"the teacher's logits hold NaN or infinity at block {self.batch.first_block + block}, position "
                f"{position}; try --dtype float32, check the model's weights, or leave such rows out: --nonfinite "
                "mask, into a new folder"
            )


def _selectable(dist: Distribution) -> Distribution:
    """With even rows in place of those that have no softmax, known by their lse as before; they are thrown away."""
    lost_n = ~torch.isfinite(dist.lse)
    if not bool(lost_n.any()):
        return dist
    even = Distribution.from_logits(dist.logits.masked_fill(lost_n.unsqueeze(1), 0))
    return replace(even, log_sum=even.log_sum.masked_fill(lost_n, torch.nan))


def _uniforms(batch: BlockBatch, draws: int, wanted: NDArray[np.int64], device: torch.device) -> torch.Tensor | None:
    """float64 [R, draws], of the rows that are wanted; None where nothing is drawn."""
    if not draws:
        return None
    blocks, length = batch.tokens_BL.shape
    numbers = range(batch.first_block, batch.first_block + blocks)
    return torch.from_numpy(block_uniforms(batch.seed, numbers, length, draws)[wanted]).to(device)


def _now_on(device: torch.device) -> torch.cuda.Event | None:
    """The moment when a GPU has done what it was told by now; None for a device that is never behind."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _nothing(selection: Selection) -> SparseTargets:
    """No rows."""
    return SparseTargets([0], [], [], unbiased=selection.unbiased)


def _space(teacher: LogitsTeacher) -> torch.Tensor | None:
    """For the probabilities of one piece after the other; None where a slice is not cut into pieces."""
    fitting = _CPU_STATISTICS_BYTES // (4 * teacher.vocab_size)
    return torch.empty(max(1, fitting), teacher.vocab_size) if teacher.device.type == "cpu" else None


def _distributions(
    teacher: LogitsTeacher, product_nV: torch.Tensor, outer: slice, space_nV: torch.Tensor | None
) -> Iterator[tuple[slice, Distribution]]:
    """The rows of a slice in pieces, for everything but the matrix product, which likes many rows."""
    step = len(product_nV) if space_nV is None else len(space_nV)
    for first, part_nV in zip(range(outer.start, outer.stop, step), product_nV.split(step), strict=True):
        space = None if space_nV is None else space_nV[: len(part_nV)]
        yield slice(first, first + len(part_nV)), Distribution.from_logits(teacher.finish(part_nV), space)


def _labels(tokens_BL: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """int64 [R]: the next token inside the same block, -1 where there is none."""
    labels = np.full(tokens_BL.shape, -1, dtype=np.int64)
    labels[:, :-1] = tokens_BL[:, 1:]
    flat = labels.reshape(-1)[:num_rows]
    flat[-1] = -1
    return flat
