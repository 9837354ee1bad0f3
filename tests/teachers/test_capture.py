"""Capturing: the rows kept are the model's own distributions at their positions, whatever the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from logitcache.errors import ModelError
from logitcache.selection import Selection
from logitcache.targets import SparseTargets
from logitcache.teachers import BlockBatch, TransformersTeacher
from logitcache.teachers import capture as capture_module
from logitcache.teachers.capture import capture_blocks
from tests.codec.rows import assert_equal
from tests.teachers.alignment import Expected
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

SELECTIONS = [Selection.parse(text) for text in ("top-k:7", "top-p:0.6:40", "sample:11", "sample:11:0.7", "varopt:12")]


def teacher_of(family: str = "llama", vocab_size: int = 300, **config: Any) -> TransformersTeacher:
    return TransformersTeacher(tiny_model(family, vocab_size, **config), tiny_tokenizer(), {"sha256": "tiny"})


def blocks_of(vocab_size: int, blocks: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (blocks, length))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_models_distributions(family: str) -> None:
    """Odd lengths, a padded last block, all selections of one forward."""
    teacher, tokens, rows = teacher_of(family), blocks_of(300, 4, 11), 38
    expected = Expected.of(teacher.model, tokens, rows)
    for selection, targets in zip(
        SELECTIONS, capture_blocks(teacher, BlockBatch(tokens, 0, rows, SELECTIONS, seed=4)), strict=True
    ):
        expected.check(targets, selection, seed=4, weights=1e-4, scalars=1e-4)


def test_a_vocabulary_over_2_to_the_18() -> None:
    vocab_size = (1 << 18) + 50_000
    teacher = teacher_of("llama", vocab_size, hidden_size=8, num_attention_heads=2, tie_word_embeddings=True)
    tokens = blocks_of(vocab_size, 2, 5)
    tokens[0, :2] = vocab_size - 1, 1 << 18
    expected = Expected.of(teacher.model, tokens, 9)
    captured = capture_blocks(teacher, BlockBatch(tokens, 0, 9, SELECTIONS, seed=4))
    for selection, targets in zip(SELECTIONS, captured, strict=True):
        expected.check(targets, selection, seed=4, weights=1e-3, scalars=2e-3)
    assert captured[2].ids.max() >= 1 << 18


@pytest.mark.parametrize(("batch", "statistics_bytes"), [(1, 1), (2, 5000), (3, 20_000), (7, 12 << 20)])
def test_batches_and_slices_keep_the_same(batch: int, statistics_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes of any number of blocks, logits in slices of any number of rows."""
    teacher, tokens, rows = teacher_of(), blocks_of(300, 7, 9), 60
    whole = capture_blocks(teacher, BlockBatch(tokens, 20, rows, SELECTIONS, seed=8))
    monkeypatch.setattr(capture_module, "_CPU_STATISTICS_BYTES", statistics_bytes)
    parts: list[list[SparseTargets]] = [[] for _ in SELECTIONS]
    for start in range(0, 7, batch):
        real = min(rows, (start + batch) * 9) - start * 9
        captured = capture_blocks(
            teacher, BlockBatch(tokens[start : start + batch], 20 + start, real, SELECTIONS, seed=8)
        )
        for part, targets in zip(parts, captured, strict=True):
            part.append(targets)
    for part, targets in zip(parts, whole, strict=True):
        joined = SparseTargets.concatenate(part)
        np.testing.assert_array_equal(joined.ids, targets.ids)
        np.testing.assert_array_equal(joined.offsets, targets.offsets)
        np.testing.assert_allclose(joined.weights, targets.weights, rtol=1e-4)
        np.testing.assert_allclose(joined.label_logprob, targets.label_logprob, atol=1e-4)
        np.testing.assert_allclose(joined.entropy, targets.entropy, atol=1e-4)


def test_what_is_drawn_follows_block_and_seed() -> None:
    teacher, tokens = teacher_of(), blocks_of(300, 2, 9)
    sample = SELECTIONS[2:3]

    def drawn(first_block: int, seed: int) -> SparseTargets:
        return capture_blocks(teacher, BlockBatch(tokens, first_block, 18, sample, seed))[0]

    assert_equal(drawn(0, 1), drawn(0, 1))
    Expected.of(teacher.model, tokens, 18).check_drawn(drawn(5, 1), sample[0], seed=1, first_block=5)
    assert not np.array_equal(drawn(0, 1).ids, drawn(2, 1).ids)
    assert not np.array_equal(drawn(0, 1).ids, drawn(0, 2).ids)


def test_padding_does_not_reach_the_rows() -> None:
    teacher, tokens = teacher_of(), blocks_of(300, 2, 9)
    padded = tokens.copy()
    padded[1, 4:] = 0
    for one, other in zip(
        capture_blocks(teacher, BlockBatch(tokens, 0, 13, SELECTIONS, 0)),
        capture_blocks(teacher, BlockBatch(padded, 0, 13, SELECTIONS, 0)),
        strict=True,
    ):
        assert_equal(one, other)


def test_a_single_row() -> None:
    teacher, tokens = teacher_of(), blocks_of(300, 1, 5)
    for targets in capture_blocks(teacher, BlockBatch(tokens, 0, 1, SELECTIONS, 0)):
        assert len(targets) == 1
        assert np.isnan(targets.label_logprob[0])


def test_impossible_ids() -> None:
    """A head may rule ids out with -inf: they are never kept, and as a label they have log-probability -inf."""
    teacher = teacher_of("phi")
    with torch.no_grad():
        teacher.head.bias[100:] = -torch.inf
    tokens = blocks_of(300, 2, 9)
    expected = Expected.of(teacher.model, tokens, 18)
    everything = Selection("top-k", 300)
    for selection, targets in zip(
        [everything, *SELECTIONS],
        capture_blocks(teacher, BlockBatch(tokens, 0, 18, [everything, *SELECTIONS], 0)),
        strict=True,
    ):
        assert targets.ids.max() < 100
        expected.check_scalars(targets, 1e-4)
        assert np.isneginf(targets.label_logprob).any()
        assert np.isfinite(targets.entropy).all()
        if selection == everything:
            np.testing.assert_allclose(targets.tail_mass, 0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named(value: float) -> None:
    teacher, tokens = teacher_of(), blocks_of(300, 3, 9)

    def poison(_module: Any, _inputs: Any, output: Any) -> None:
        if len(output.last_hidden_state) > 1:
            output.last_hidden_state[1, 6:] = value

    teacher.model.base_model.register_forward_hook(poison)
    message = r"^the teacher's logits hold NaN or infinity at block 41, position 6; try --dtype float32"
    with pytest.raises(ModelError, match=message):
        capture_blocks(teacher, BlockBatch(tokens, 40, 27, SELECTIONS, 0))
    capture_blocks(teacher, BlockBatch(tokens[:1], 40, 9, SELECTIONS, 0))


@pytest.mark.parametrize("statistics_bytes", [1, 5000, 12 << 20])
@pytest.mark.parametrize("partly", [False, True])
def test_rows_that_are_not_finite_can_be_left_out(
    statistics_bytes: int, partly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are empty and say nothing; all others are, bit for bit, what they were."""
    monkeypatch.setattr(capture_module, "_CPU_STATISTICS_BYTES", statistics_bytes)
    teacher, tokens = teacher_of(), blocks_of(300, 3, 9)
    counted = np.random.default_rng(1).random((3, 9)) < 0.7 if partly else None
    selections = [*SELECTIONS, Selection.parse("label")]
    whole = capture_blocks(teacher, BlockBatch(tokens, 40, 25, selections, 0, counted))
    lost = np.zeros(27, dtype=bool)
    lost[[0, 5, 13, 14, 23]] = True
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf]).unsqueeze(1)

    def poison(_module: Any, _inputs: Any, output: Any) -> None:
        output.last_hidden_state.view(27, -1)[lost] = values

    teacher.model.base_model.register_forward_hook(poison)
    captured = capture_blocks(teacher, BlockBatch(tokens, 40, 25, selections, 0, counted, "mask"))
    kept = ~lost[:25] & (True if counted is None else counted.ravel()[:25])
    for targets, wanted in zip(captured, whole, strict=True):
        assert_equal(targets, wanted.take(np.flatnonzero(kept)).spread(kept))
    assert np.isnan(captured[0].label_logprob[:25][~kept]).all()
    if partly:
        # Where no row is wanted nobody looks.
        capture_blocks(teacher, BlockBatch(tokens, 40, 25, selections, 0, counted & ~lost.reshape(3, 9)))
