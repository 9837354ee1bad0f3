"""Blocks in, sparse rows out: one teacher forward, its head in slices, any number of selections on each slice.

Legend: B blocks of L tokens, R real rows (positions before the corpus' end), n rows of a slice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.errors import ModelError
from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution
from logitcache.selection.select import select
from logitcache.targets import SparseTargets
from logitcache.teachers.teacher import Nonfinite

# Softmax, entropy and selection walk their rows several times: on a CPU the rows should stay in its caches.
_CPU_STATISTICS_BYTES = 12 << 20


class LogitsTeacher(Protocol):
    """What capturing needs of a teacher that makes logits here; `TransformersTeacher` is one."""

    vocab_size: int
    device: torch.device

    def hidden(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """Last hidden states [B * L, D] of blocks [B, L]."""

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """float32 logits [n, V] of hidden states [n, D]."""

    def row_slices(self, n_rows: int) -> Iterator[slice]:
        """Slices of rows whose logits fit the memory budget."""


class RowsFromLogits:
    """`Teacher.rows` for a `LogitsTeacher`."""

    def rows(
        self: LogitsTeacher,
        tokens_BL: NDArray[np.int64],
        first_block: int,
        num_rows: int,
        selections: Sequence[Selection],
        seed: int,
        counted_BL: NDArray[np.bool_] | None = None,
        nonfinite: Nonfinite = "fail",
    ) -> list[SparseTargets]:
        """One forward pass for all selections. Raises ModelError as `capture_blocks`."""
        return capture_blocks(self, tokens_BL, first_block, num_rows, selections, seed, counted_BL, nonfinite)


@torch.inference_mode()
def capture_blocks(
    teacher: LogitsTeacher,
    tokens_BL: NDArray[np.int64],
    first_block: int,
    num_rows: int,
    selections: Sequence[Selection],
    seed: int,
    counted_BL: NDArray[np.bool_] | None = None,
    nonfinite: Nonfinite = "fail",
) -> list[SparseTargets]:
    """The teacher's distributions at the first `num_rows` positions of consecutive blocks, once for each selection.

    Arguments as of `Teacher.rows`.

    Raises:
        ModelError: a logit is NaN or +inf, or all are -inf, and `nonfinite` is "fail"; the message names block and
            position.
    """
    blocks, length = tokens_BL.shape
    counted_R = np.ones(num_rows, dtype=bool) if counted_BL is None else counted_BL.reshape(-1)[:num_rows]
    wanted = np.flatnonzero(counted_R)
    if not wanted.size:
        return [_nothing(selection).spread(counted_R) for selection in selections]
    labels_R = torch.from_numpy(_labels(tokens_BL, num_rows)[wanted])
    uniforms = [
        block_uniforms(seed, range(first_block, first_block + blocks), length, selection.draws)[wanted]
        if selection.draws
        else None
        for selection in selections
    ]
    hidden_RD = teacher.hidden(tokens_BL)[:num_rows]
    if counted_BL is not None:
        hidden_RD = hidden_RD[torch.from_numpy(wanted).to(hidden_RD.device)]
    parts: list[list[SparseTargets]] = [[] for _ in selections]
    label_logprobs, entropies = [], []
    finite_R = np.ones(num_rows, dtype=bool)
    for outer in teacher.row_slices(wanted.size):
        pieces = _pieces(outer, teacher)
        # The logits live only as long as this call: two slices at once would double the memory.
        for rows, dist in _distributions(teacher.logits(hidden_RD[outer]), pieces):
            lost_n = ~torch.isfinite(dist.lse)
            if bool(lost_n.any()):
                lost = wanted[rows][lost_n.cpu().numpy()]
                _refuse_unless_masked(nonfinite, first_block * length + int(lost[0]), length)
                finite_R[lost] = False
                dist = Distribution.from_logits(dist.logits.masked_fill(lost_n.unsqueeze(1), 0))
            label_logprobs.append(dist.label_logprob(labels_R[rows].to(teacher.device)).cpu())
            entropies.append(dist.entropy().cpu())
            for selection, uniform, part in zip(selections, uniforms, parts, strict=True):
                part.append(select(selection, dist, None if uniform is None else uniform[rows]))
            del dist
    label_logprob, entropy = torch.cat(label_logprobs).numpy(), torch.cat(entropies).numpy()
    kept = [
        SparseTargets.concatenate(part)
        # Beside a label's log-probability the entropy would take as many bytes again.
        .with_columns(label_logprob, entropy if selection.keeps_ids else np.full_like(entropy, np.nan))
        for part, selection in zip(parts, selections, strict=True)
    ]
    if not finite_R.all():
        kept = [targets.take(np.flatnonzero(finite_R[wanted])) for targets in kept]
    return [targets.spread(counted_R & finite_R) for targets in kept]


def _nothing(selection: Selection) -> SparseTargets:
    """No rows."""
    return SparseTargets([0], [], [], unbiased=selection.unbiased)


def _pieces(outer: slice, teacher: LogitsTeacher) -> list[slice]:
    """A large slice's rows in pieces for everything but the matrix product, which likes many rows."""
    fitting = _CPU_STATISTICS_BYTES // (4 * teacher.vocab_size)
    step = max(1, fitting) if teacher.device.type == "cpu" else outer.stop - outer.start
    return [slice(start, min(start + step, outer.stop)) for start in range(outer.start, outer.stop, step)]


def _distributions(logits_nV: torch.Tensor, pieces: Sequence[slice]) -> Iterator[tuple[slice, Distribution]]:
    first = pieces[0].start
    for rows in pieces:
        yield rows, Distribution.from_logits(logits_nV[rows.start - first : rows.stop - first])


def _labels(tokens_BL: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """int64 [R]: the next token inside the same block, -1 where there is none."""
    labels = np.full(tokens_BL.shape, -1, dtype=np.int64)
    labels[:, :-1] = tokens_BL[:, 1:]
    flat = labels.reshape(-1)[:num_rows]
    flat[-1] = -1
    return flat


def _refuse_unless_masked(nonfinite: Nonfinite, row: int, length: int) -> None:
    if nonfinite == "mask":
        return
    block, position = divmod(row, length)
    raise ModelError(
        f"the teacher's logits hold NaN or infinity at block {block}, position {position}; try --dtype float32, check "
        "the model's weights, or leave such rows out: --nonfinite mask, into a new folder"
    )
