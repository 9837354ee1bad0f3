"""patch_forward: loss and gradients of the model's own logits, without them; everything else stays as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache import models
from logitcache.errors import TargetsError
from logitcache.kernels import chunk, slices
from logitcache.losses import (
    LossSettings,
    distillation_loss,
    is_patched,
    pack_targets,
    patch_forward,
    unpatch_forward,
)
from tests.kernels.problems import LargestTensor
from tests.losses.batches import Example, assert_same_grads, grads_of
from tests.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_the_models_own_logits(family: str, tied: bool, example: Example) -> None:
    """With biases, soft capping, logit scales, tied embeddings."""
    plain = tiny_model(family, seed=2, tie_word_embeddings=tied).train()
    # Dropout, which GPT-2 and Phi have, would draw twice.
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    output = plain(input_ids=example.ids, labels=example.labels)
    expected_ce, expected = output.loss.item(), example.dense(output.logits)
    theirs = grads_of(plain, expected)
    model = patch_forward(plain)
    ours = model(input_ids=example.ids, labels=example.labels, teacher_targets=example.targets)
    assert ours.logits is None
    assert ours.loss.dtype == torch.float32
    assert ours.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert_same_grads(grads_of(model, ours.loss), theirs)
    assert model(input_ids=example.ids, labels=example.labels).loss.item() == pytest.approx(expected_ce, rel=2e-6)


def test_a_vocabulary_with_padded_rows() -> None:
    """280 tokens in a head of 300 rows: the rows past them take no part when one says so."""
    example, model = Example(columns=280), tiny_model("llama", seed=2).train()
    logits = model(input_ids=example.ids).logits
    expected, all_rows = example.dense(logits[..., :280]), example.dense(logits)
    theirs = grads_of(model, expected)
    inputs = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": example.targets}
    patch_forward(model, valid_vocab=280)
    loss = model(**inputs).loss
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    grads = grads_of(model, loss)
    assert_same_grads(grads, theirs)
    assert not grads["lm_head.weight"][280:].any()
    patch_forward(model, valid_vocab=None)
    assert model(**inputs).loss.item() == pytest.approx(all_rows.item(), rel=2e-6)


def test_both_conventions_of_labels(model: Any, example: Example) -> None:
    given = {"input_ids": example.ids, "teacher_targets": example.targets}
    one = model(**given, labels=example.labels)
    for labels in ({"shift_labels": example.following}, {"labels": example.labels, "shift_labels": example.following}):
        other = model(**given, **labels)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.ce, other.ce)
    assert torch.equal(one.counted, example.following != -100)
    by_place = model(example.ids, None, None, None, None, example.labels, teacher_targets=example.targets)
    assert torch.equal(one.loss, by_place.loss)


def test_columns_to_log(model: Any, example: Example) -> None:
    out = model(input_ids=example.ids, labels=example.labels, teacher_targets=example.targets, alpha=0.25)
    assert out.ce.shape == out.divergence.shape == out.counted.shape == example.ids.shape
    assert not out.ce.requires_grad
    mixed = (0.75 * out.ce + 0.25 * out.divergence).sum() / out.counted.sum()
    assert mixed.item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert not out.ce[~out.counted].any()
    labels_only = model(input_ids=example.ids, labels=example.labels)
    assert labels_only.divergence is None
    torch.testing.assert_close(labels_only.ce, out.ce, rtol=1e-6, atol=1e-6)


def test_alpha_by_call_and_by_position(model: Any, example: Example) -> None:
    given = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": example.targets}
    plain = model(**given)
    for alpha in (0.25, torch.tensor(0.25), torch.full(example.ids.shape, 0.25)):
        assert model(**given, alpha=alpha).loss.item() == pytest.approx(
            ((0.75 * plain.ce + 0.25 * plain.divergence).sum() / example.counted).item(), rel=1e-6
        )
    patch_forward(model, alpha=0.25)
    assert torch.equal(model(**given).loss, model(**given, alpha=0.25).loss)


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor([7.0])])
def test_num_items_in_batch_divides_the_sum(model: Any, example: Example, items: Any) -> None:
    given = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": example.targets}
    expected = model(**given).loss.item() * example.counted / 7
    assert model(**given, num_items_in_batch=items).loss.item() == pytest.approx(expected, rel=1e-6)
    nothing = torch.full_like(example.labels, -100)
    assert model(input_ids=example.ids, labels=nothing, num_items_in_batch=torch.tensor(0)).loss.item() == 0


@pytest.mark.parametrize("form", ["sparse", "device", "packed", "folded", "floats", "short"])
def test_forms_of_the_teachers_rows(model: Any, example: Example, form: str) -> None:
    device = example.targets.to_device()
    floats = {name: getattr(device, name) for name in ("ids", "weights", "tail_mass", "threshold", "entropy")}
    forms = {
        "sparse": example.targets,
        "device": device,
        "packed": pack_targets(example.targets),
        "folded": pack_targets(device, (2, 9)),
        "floats": {**floats, "unbiased": False},
        "short": {name: floats[name] for name in ("ids", "weights", "tail_mass")},
    }
    given = {"input_ids": example.ids, "labels": example.labels}
    expected = model(**given, teacher_targets=example.targets).loss
    assert torch.equal(model(**given, teacher_targets=forms[form]).loss, expected)


def test_packed_rows_hold_no_floating_point(example: Example) -> None:
    packed = pack_targets(example.targets, (2, 9))
    assert packed["ids"].shape[:2] == packed["tail_mass"].shape == (2, 9)
    assert not any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in packed.values())


def test_unbiased_rows(model: Any, example: Example) -> None:
    """The objective follows the rows: a dict says it itself, or the settings say it."""
    columns = {"offsets": example.targets.offsets, "ids": example.targets.ids, "weights": example.targets.weights}
    sampled = type(example.targets)(**columns, unbiased=True)
    given = {"input_ids": example.ids, "labels": example.labels}
    expected = model(**given, teacher_targets=sampled)
    packed = pack_targets(sampled)
    assert torch.equal(model(**given, teacher_targets=packed).loss, expected.loss)
    silent = {name: value for name, value in packed.items() if name not in ("unbiased", "has_exact_head")}
    with pytest.raises(TargetsError, match="is not said to be unbiased"):
        model(**given, teacher_targets=silent)
    patch_forward(model, unbiased=True)
    assert torch.equal(model(**given, teacher_targets=silent).loss, expected.loss)


def test_masks_and_positions_reach_the_body(model: Any, example: Example) -> None:
    """Left padding: the loss of padded sequences is that of the sequences."""
    pad = 4
    ids = torch.nn.functional.pad(example.ids, (pad, 0), value=5)
    labels = torch.nn.functional.pad(example.labels, (pad, 0), value=-100)
    labels[:, pad] = -100
    mask = (torch.arange(ids.shape[1]) >= pad).long().expand_as(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert padded.loss.item() == pytest.approx(model(example.ids, labels=example.labels).loss.item(), rel=1e-5)
    assert padded.loss.item() != pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-3)
    embeds = model.get_input_embeddings()(example.ids)
    by_embeddings = model(inputs_embeds=embeds, labels=example.labels, output_hidden_states=True)
    assert torch.equal(by_embeddings.loss, model(example.ids, labels=example.labels).loss)
    assert len(by_embeddings.hidden_states) == 3


def largest_of_a_step(impl: str, example: Example) -> int:
    """Forward, backward and the optimiser's step."""
    model = patch_forward(tiny_model("llama", seed=2).train(), impl=impl)
    optimizer = torch.optim.AdamW(model.parameters())
    with LargestTensor() as watch:
        model(input_ids=example.ids, labels=example.labels, teacher_targets=example.targets).loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return watch.numel


def test_no_logits_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor at all is as large as [B, L, V]: chunks of 16 of the 128 positions here."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES_CPU", 4)
    monkeypatch.setattr(chunk, "MIN_ROWS_CPU", 16)
    example = Example(batch=4, length=32)
    logits = example.ids.numel() * 300
    assert largest_of_a_step("auto", example) < logits
    assert largest_of_a_step("reference", example) >= logits


def test_the_weights_gradients_do_not_depend_on_slices(monkeypatch: pytest.MonkeyPatch, example: Example) -> None:
    model = patch_forward(tiny_model("gemma2", seed=2).train(), impl="split")
    gradients = []
    for columns in (1024, 64):
        monkeypatch.setattr(slices, "MIN_COLUMNS", columns)
        monkeypatch.setattr(slices, "TILE_BYTES_CPU", 4)
        given = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": example.targets}
        gradients.append(grads_of(model, model(**given).loss))
    assert_same_grads(*gradients)


# ---------------------------------------------------------------------------------------------- as before


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
def test_without_labels_it_behaves_as_before(family: str, example: Example) -> None:
    model = tiny_model(family, seed=2)
    before = model(input_ids=example.ids)
    text = model.generate(example.ids, max_new_tokens=4, do_sample=False)
    patch_forward(model)
    after = model(input_ids=example.ids)
    assert type(after) is type(before)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(model(example.ids, alpha=None, logits_to_keep=2).logits, before.logits[:, -2:])
    assert torch.equal(model.generate(example.ids, max_new_tokens=4, do_sample=False), text)


def test_patching_twice_and_back(example: Example) -> None:
    model = tiny_model("llama", seed=2)
    plain = type(model)
    assert unpatch_forward(model) is model
    expected = model(input_ids=example.ids, labels=example.labels).loss
    assert patch_forward(model, alpha=0.3) is model
    patched = type(model)
    assert is_patched(model)
    assert isinstance(model, plain)
    patch_forward(model)
    assert type(model) is patched
    assert model._logitcache_settings.alpha == 0.3
    patch_forward(model, LossSettings(alpha=0.5), valid_vocab=290)
    assert model._logitcache_settings == LossSettings(alpha=0.5, valid_vocab=290)
    assert unpatch_forward(model) is model
    assert type(model) is plain
    assert not is_patched(model)
    again = model(input_ids=example.ids, labels=example.labels)
    assert torch.equal(again.loss, expected)
    assert again.logits is not None
    assert not [name for name in vars(model) if "logitcache" in name]


def test_saving_is_unaffected(tmp_path: Path, model: Any, example: Example) -> None:
    models.save_model(model, tmp_path / "patched")
    models.save_model(unpatch_forward(copy.deepcopy(model)), tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = models.load_model(tmp_path / "patched", device="cpu")
    assert torch.equal(again(input_ids=example.ids).logits, model(input_ids=example.ids).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_models_of_their_own(copied: Callable[[Any], Any], example: Example) -> None:
    model = patch_forward(tiny_model("llama", seed=2, tie_word_embeddings=True), alpha=0.3)
    other = copied(model)
    given = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": example.targets}
    assert type(other) is type(model)
    assert torch.equal(other(**given).loss, model(**given).loss)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not torch.equal(other(**given).loss, model(**given).loss)
    other(**given).loss.backward()
    assert model.lm_head.weight.grad is None


def test_what_other_tools_see(model: Any) -> None:
    plain = tiny_model("llama")
    assert type(model).__name__ == type(plain).__name__
    assert model.can_generate()
    # Trainer takes every name with "label" in it for one that a batch must hold to be evaluated.
    expected = [*list(inspect.signature(plain.forward).parameters)[:-1], "teacher_targets", "kwargs"]
    assert list(inspect.signature(model.forward).parameters) == expected
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_return_dict(model: Any, example: Example) -> None:
    expected = model(example.ids, labels=example.labels).loss
    assert torch.equal(model(example.ids, labels=example.labels, return_dict=False)[0], expected)
    model.config.return_dict = False
    assert torch.equal(model(example.ids, labels=example.labels)[0], expected)


# ---------------------------------------------------------------------------------------------- other modes


def test_gradient_checkpointing(example: Example) -> None:
    model = patch_forward(tiny_model("llama", seed=2).train())
    given = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": example.targets}
    expected = grads_of(model, model(**given).loss)
    model.activation_checkpointing_enable()
    assert_same_grads(grads_of(model, model(**given).loss), expected, 1e-6)


def test_autocast(example: Example) -> None:
    """In bfloat16 the loss is nearer to float32's than that of the model's own rounded logits."""
    model = patch_forward(tiny_model("llama", seed=2).train())
    given = {"input_ids": example.ids, "labels": example.labels}
    exact = grads_of(model, model(**given, teacher_targets=example.targets).loss)["lm_head.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**given, teacher_targets=example.targets)
        dense = example.dense(model(input_ids=example.ids).logits)
    assert out.loss.dtype == torch.float32
    ours, theirs = (grads_of(model, loss)["lm_head.weight"] for loss in (out.loss, dense))
    assert ours.dtype == torch.float32
    assert float((ours - exact).norm()) <= 1.1 * float((theirs - exact).norm())


def test_a_model_in_half_precision(example: Example) -> None:
    model = patch_forward(tiny_model("llama", seed=2).to(torch.bfloat16).train())
    out = model(input_ids=example.ids, labels=example.labels, teacher_targets=example.targets)
    with torch.no_grad():
        expected = example.dense(model(input_ids=example.ids).logits)
    assert out.loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert grads_of(model, out.loss)["lm_head.weight"].dtype == torch.bfloat16


def test_torch_compile(example: Example) -> None:
    model = patch_forward(tiny_model("llama", seed=2).train())
    given = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": pack_targets(example.targets)}
    expected = grads_of(model, model(**given).loss)
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    out = torch.compile(model, backend=backend)(**given)
    assert out.logits is None
    assert_same_grads(grads_of(model, out.loss), expected)
    # The body, whole; the head and the loss run as they are.
    assert len(graphs) == 1


def test_hooks_of_the_head_see_its_input(model: Any, example: Example) -> None:
    """What FSDP2 hangs on a head of its own unit; here a hook that halves the hidden states."""
    given = {"input_ids": example.ids, "labels": example.labels, "teacher_targets": example.targets}
    plain = model(**given).loss
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    hidden = models.body_hidden(model, example.ids).flatten(0, 1) * 0.5
    expected = distillation_loss(hidden, model.lm_head.weight, example.following.flatten(), example.targets)
    assert torch.equal(model(**given).loss, expected)
    assert not torch.equal(plain, expected)
    assert "forward" not in vars(model.lm_head)
