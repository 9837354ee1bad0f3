"""Token masks: what they keep, and patched models with them against a loop by hand over the model's own logits.

Legend: B blocks of L tokens, N = B * L positions, V ids.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.errors import LogitcacheError, ObjectiveError, TargetsError, UsageError
from logitcache.losses import Objective, TokenMask, pack_targets, patch_forward
from logitcache.losses.dense import dense_loss
from tests.losses.batches import BUCKET, Example, assert_same_grads, grads_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = [
    TokenMask("teacher-entropy", 0.6),
    TokenMask("teacher-entropy", 0.6, "nothing"),
    TokenMask("student-entropy", 0.3),
    TokenMask("student-entropy", 0.3, "nothing"),
]


def with_entropy(example: Example) -> Example:
    """The example with entropies of its teacher, of which many are equal."""
    count = len(example.targets)
    entropy = np.random.default_rng(1).integers(0, 5, count).astype(np.float32)
    example.targets = example.targets.with_columns(np.full(count, np.nan), entropy)
    return example


def kept_by_hand(mask: TokenMask, entropy: Any, counted: Any) -> list[list[bool]]:
    """The definition: one block after the other, one position after the other."""
    result = []
    for values, counts in zip(entropy.tolist(), counted.tolist(), strict=True):
        places = [place for place, count in enumerate(counts) if count]
        places.sort(key=lambda place: (-values[place], place))
        number = max(1, math.floor(mask.keep * len(places) + 0.5))
        result.append([place in places[:number] for place in range(len(values))])
    return result


# ---------------------------------------------------------------------------------------------- the mask itself


@pytest.mark.parametrize("keep", [0.01, 0.15, 0.5, 0.85, 1])
def test_the_share_of_each_block_with_the_highest_entropy(keep: float) -> None:
    g = torch.Generator().manual_seed(0)
    counted = torch.rand(12, 40, generator=g) < torch.linspace(0, 1.1, 12)[:, None]
    assert not counted[0].any()
    assert counted[-1].all()
    entropy = torch.randint(0, 9, (12, 40), generator=g) / 4
    entropy[~counted] = torch.tensor([torch.nan, torch.inf, 99.0]).repeat(500)[: int((~counted).sum())]
    mask = TokenMask(keep=keep)
    kept = mask.kept(entropy, counted)
    assert kept.tolist() == kept_by_hand(mask, entropy, counted)
    for rows in (slice(0, 1), slice(3, 7), slice(11, None)):
        assert torch.equal(mask.kept(entropy[rows], counted[rows]), kept[rows])
    assert torch.equal(mask.kept(entropy.bfloat16(), counted), kept)


def test_as_many_labels_count_as_will_be_kept() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (6, 25), generator=g)
    labels[torch.rand(6, 25, generator=g) < 0.4] = -100
    labels[2] = -100
    mask = TokenMask("student-entropy", 0.35, "nothing")
    beforehand = mask.counted_labels(labels)
    kept = mask.kept(torch.rand(6, 25, generator=g), labels != -100)
    assert torch.equal((beforehand != -100).sum(1), kept.sum(1))
    assert ((beforehand == labels) | (beforehand == -100)).all()
    assert replace(mask, rest="labels").counted_labels(labels) is labels


def test_one_graph() -> None:
    torch.compiler.reset()
    mask, g = TokenMask(keep=0.4), torch.Generator().manual_seed(0)
    entropy, counted = torch.rand(3, 20, generator=g), torch.rand(3, 20, generator=g) < 0.8
    compiled = torch.compile(mask.kept, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(entropy, counted), mask.kept(entropy, counted))


def test_a_mask_is_a_value() -> None:
    for mask in (*MASKS, TokenMask(keep=1 / 3)):
        assert TokenMask.parse(str(mask), mask.rest) == mask
        assert TokenMask.from_dict(mask.to_dict()) == mask
    assert str(TokenMask()) == "teacher-entropy:0.85"
    assert TokenMask.parse("student-entropy:0.5") == TokenMask("student-entropy", 0.5, "labels")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TokenMask("entropy"), "a mask's by is 'entropy'; use teacher-entropy or student-entropy"),
        (lambda: TokenMask(rest="ce"), "a mask's rest is 'ce'; use labels or nothing"),
        (lambda: TokenMask(keep=0), "keep is 0; it must be a share above 0 and at most 1"),
        (lambda: TokenMask(keep=1.5), "keep is 1.5"),
        (lambda: TokenMask(keep="0.5"), "keep is '0.5'"),
        (lambda: TokenMask.parse("teacher-entropy"), "'teacher-entropy' is not understood; .*teacher-entropy:0.85 or"),
        (lambda: TokenMask.parse("teacher-entropy:85%"), "'teacher-entropy:85%' is not understood"),
        (lambda: TokenMask.parse("student-entropy:nan"), "keep is nan"),
        (lambda: TokenMask.parse("kl:0.5"), "a mask's by is 'kl'"),
        (lambda: TokenMask.from_dict({"by": "student-entropy", "share": 0.5}), "mapping of by, keep, rest"),
    ],
)
def test_masks_that_make_no_sense(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_blocks_are_needed() -> None:
    with pytest.raises(ObjectiveError, match="entropy has shape \\(6,\\) and counted \\(6,\\)"):
        TokenMask().kept(torch.zeros(6), torch.ones(6, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------- in patched models


def by_hand(
    logits_BLV: torch.Tensor, example: Example, mask: TokenMask, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss in float64 and what was kept."""
    logits_NV, labels_N = logits_BLV.double().flatten(0, 1), example.following.flatten()
    if mask.by == "student-entropy":
        entropy_N = torch.special.entr(logits_NV.detach().softmax(1)).sum(1)
    else:
        entropy_N = torch.from_numpy(example.targets.entropy)
    counted_BL = example.following != -100
    kept_BL = torch.tensor(kept_by_hand(mask, entropy_N.view(counted_BL.shape), counted_BL))
    targets = example.targets.to_device()
    distilled_N, ce_N = (dense_loss(logits_NV, labels_N, targets, BUCKET, share) for share in (alpha, 0.0))
    total, number = logits_NV.new_zeros(()), 0
    for row, (keeps, counts) in enumerate(zip(kept_BL.flatten(), counted_BL.flatten(), strict=True)):
        if keeps or (counts and mask.rest == "labels"):
            total, number = total + (distilled_N if keeps else ce_N)[row], number + 1
    return total / number, kept_BL


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask}-{mask.rest}")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_and_its_gradient(family: str, mask: TokenMask) -> None:
    """In every implementation, with and without a soft cap; targets as they are and packed."""
    example, model = with_entropy(Example(length=14)), tiny_model(family, seed=2).train()
    expected, kept = by_hand(model(input_ids=example.ids).logits, example, mask, 0.9)
    assert kept.any()
    assert not torch.equal(kept, example.following != -100)
    theirs = grads_of(model, expected)
    inputs = {"input_ids": example.ids, "labels": example.labels}
    for impl in ("reference", "chunk", "split"):
        patch_forward(model, mask=mask, impl=impl)
        output = model(**inputs, teacher_targets=pack_targets(example.targets, (2, 14)))
        assert torch.equal(output.kept, kept)
        assert torch.equal(output.counted, kept if mask.rest == "nothing" else example.following != -100)
        assert output.loss.item() == pytest.approx(expected.item(), rel=2e-6)
        assert_same_grads(grads_of(model, output.loss), theirs)
    whole = model(**inputs, teacher_targets=example.targets, num_items_in_batch=7)
    assert whole.loss.item() * 7 == pytest.approx(expected.item() * int(output.counted.sum()), rel=2e-6)
    again = model(**inputs, teacher_targets=example.targets, alpha=torch.full((2, 14), 0.9))
    assert again.loss.item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("mask", MASKS[1:3], ids=str)
def test_alpha_one(mask: TokenMask, example: Example) -> None:
    """The rest learns from its labels, or the labels' values are not read at all."""
    example, model = with_entropy(example), tiny_model("llama", seed=2).train()
    expected, _ = by_hand(model(input_ids=example.ids).logits, example, mask, 1.0)
    patch_forward(model, mask=mask, alpha=1.0)
    output = model(input_ids=example.ids, labels=example.labels, teacher_targets=example.targets)
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert (output.ce is None) == (mask.rest == "nothing")


def test_padded_rows_of_the_head_have_no_entropy(example: Example) -> None:
    """A student's entropy is that of its valid tokens."""
    model = tiny_model("llama", seed=2)
    with torch.no_grad():
        model.lm_head.weight[280:] *= 30
    example = Example(columns=280)
    mask = TokenMask("student-entropy", 0.5)
    expected, kept = by_hand(model(input_ids=example.ids).logits[..., :280], example, mask, 0.9)
    patch_forward(model, mask=mask, valid_vocab=280)
    output = model(input_ids=example.ids, labels=example.labels, teacher_targets=example.targets)
    assert torch.equal(output.kept, kept)
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-6)


def test_everything_kept_is_no_mask(model: Any, example: Example) -> None:
    inputs = {"input_ids": example.ids, "labels": example.labels}
    plain = model(**inputs, teacher_targets=example.targets)
    assert plain.kept is None
    patch_forward(model, mask=TokenMask("student-entropy", 1.0, "nothing"))
    masked = model(**inputs, teacher_targets=example.targets)
    assert torch.equal(masked.loss, plain.loss)
    assert torch.equal(masked.kept, masked.counted)


def test_labels_alone_are_not_masked(model: Any, example: Example) -> None:
    inputs = {"input_ids": example.ids, "labels": example.labels}
    plain = model(**inputs)
    patch_forward(model, mask=TokenMask("student-entropy", 0.2, "nothing"))
    masked = model(**inputs)
    assert torch.equal(masked.loss, plain.loss)
    assert masked.kept is None


REFUSED: list[tuple[Any, type[LogitcacheError], str]] = [
    (lambda targets: targets, TargetsError, "entropy is nan in row .*, whose label counts; .* or a mask by student-"),
    (lambda targets: {"ids": targets.ids, "weights": targets.weights, "tail_mass": targets.tail_mass}, TargetsError,
     "targets.entropy is nan"),
    (lambda targets: targets.slice(0, 7), TargetsError, "targets.entropy has shape \\(7,\\), but hidden has 18 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), REFUSED)
def test_rows_without_an_entropy(
    change: Any, error: type[LogitcacheError], words: str, model: Any, example: Example
) -> None:
    patch_forward(model, mask=TokenMask("teacher-entropy"))
    with pytest.raises(error, match=words):
        model(example.ids, labels=example.labels, teacher_targets=change(example.targets.to_device()))


def test_an_entropy_that_no_label_asks_for(model: Any, example: Example) -> None:
    """Positions that do not count may be without one."""
    example = with_entropy(example)
    entropy = np.where(example.following.flatten().numpy() == -100, np.nan, example.targets.entropy)
    patch_forward(model, mask=TokenMask("teacher-entropy", 0.5))
    inputs = {"input_ids": example.ids, "labels": example.labels}
    expected = model(**inputs, teacher_targets=example.targets).loss
    example.targets = example.targets.with_columns(example.targets.label_logprob, entropy)
    assert torch.equal(model(**inputs, teacher_targets=example.targets).loss, expected)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mask": TokenMask(), "objective": Objective.cross_entropy()}, "cross_entropy has no distillation term"),
        ({"mask": "teacher-entropy:0.5"}, "mask is 'teacher-entropy:0.5'; build one, for example TokenMask"),
    ],
)
def test_settings_that_make_no_sense(fields: dict[str, Any], words: str, model: Any) -> None:
    with pytest.raises(ObjectiveError, match=words):
        patch_forward(model, **fields)
