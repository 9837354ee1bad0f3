"""Patched models under peft: adapters on the body, on the head, trained copies of the head, and what is refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from logitcache.errors import ModelError
from logitcache.losses import is_patched, patch_forward, unpatch_forward
from logitcache.training import evaluate_blocks
from tests.losses.batches import Example, assert_same_grads, grads_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BODY = ["q_proj", "v_proj"]


def adapted(model: Any, targets: list[str], **options: Any) -> Any:
    """The model with LoRA of random weights: a fresh adapter is no change at all."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return wrapped.train()


def assert_like_its_own_logits(model: Any, example: Example, seed: int | None = None) -> None:
    """Loss and gradients of every trained parameter, against the model's own logits."""
    inputs = {"input_ids": example.ids, "labels": example.labels}

    def seeded(**more: Any) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        return model(**more)

    expected = example.dense(seeded(input_ids=example.ids).logits)
    theirs = grads_of(model, expected)
    out = seeded(**inputs, teacher_targets=example.targets)
    assert out.logits is None
    assert out.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert_same_grads(grads_of(model, out.loss), theirs)


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("targets", [BODY, [*BODY, "lm_head"]], ids=["body", "head"])
def test_lora(targets: list[str], first: str) -> None:
    """In either order; a softcap on top."""
    model = tiny_model("gemma2", seed=2, tie_word_embeddings=False)
    model = patch_forward(adapted(model, targets)) if first == "adapter" else adapted(patch_forward(model), targets)
    assert is_patched(model)
    assert_like_its_own_logits(model, Example())
    assert is_patched(unpatch_forward(model)) is False
    assert model(input_ids=Example().ids, labels=Example().labels).logits is not None


def test_lora_on_the_head_with_dropout() -> None:
    """The same draws of dropout give the same gradient: the branch is kept apart, not merged into the weight."""
    model = patch_forward(adapted(tiny_model("llama", seed=2), ["lm_head"], lora_dropout=0.5))
    assert_like_its_own_logits(model, Example(), seed=7)


def test_adapters_switched_off_and_merged() -> None:
    example = Example()
    model = patch_forward(adapted(tiny_model("llama", seed=2), ["lm_head"])).eval()
    inputs = {"input_ids": example.ids, "labels": example.labels}
    tuned = model(**inputs).loss
    with model.disable_adapter():
        plain = model(**inputs).loss
    assert plain.item() == pytest.approx(tiny_model("llama", seed=2)(**inputs).loss.item(), rel=2e-6)
    assert tuned.item() != pytest.approx(plain.item(), rel=1e-3)
    model.merge_adapter()
    assert model(**inputs).loss.item() == pytest.approx(tuned.item(), rel=2e-6)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert is_patched(merged)
    assert merged(**inputs).loss.item() == pytest.approx(tuned.item(), rel=2e-6)


def test_two_adapters_on_the_head() -> None:
    model = adapted(tiny_model("llama", seed=2), ["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_like_its_own_logits(patch_forward(model), Example())


def test_a_head_that_peft_trains_whole() -> None:
    model = patch_forward(adapted(tiny_model("llama", seed=2), BODY, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert_like_its_own_logits(model, Example())
    example = Example()
    with model.disable_adapter():
        plain = model(input_ids=example.ids, labels=example.labels).loss
    expected = tiny_model("llama", seed=2)(input_ids=example.ids, labels=example.labels).loss
    assert plain.item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("targets", [BODY, ["lm_head"]], ids=["body", "head"])
def test_evaluation_of_adapted_models(targets: list[str]) -> None:
    example, model = Example(), adapted(tiny_model("llama", seed=2), targets).eval()
    expected = model(input_ids=example.ids, labels=example.labels).loss.item()
    found = evaluate_blocks(model, [{"input_ids": example.ids, "labels": example.following}], unbiased=False)
    assert found["ce"] == pytest.approx(expected, rel=1e-5)


def test_adapters_that_are_refused() -> None:
    def message(model: Any) -> str:
        with pytest.raises(ModelError) as caught:
            patch_forward(model)
        return str(caught.value)

    dora = adapted(tiny_model("llama"), ["lm_head"], use_dora=True)
    assert "wears a variant of LoRA on its LM head (adapter 'default': DoRA" in message(dora)
    assert "wears a variant of LoRA" in message(adapted(tiny_model("llama"), ["lm_head"], lora_bias=True))
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompts = peft.get_peft_model(tiny_model("llama"), config)
    assert "wears PROMPT_TUNING, whose virtual tokens have no teacher rows" in message(prompts)
    ia3 = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    assert "needs a plain linear LM head" in message(peft.get_peft_model(tiny_model("llama"), ia3))
