"""patch_forward: labels, targets, settings and models that are refused, and the sentences that say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from logitcache.errors import ModelError, ObjectiveError, TargetsError
from logitcache.losses import Objective, pack_targets, patch_forward, unpatch_forward
from tests.losses.batches import Example
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def refused(error: type[Exception], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_of_the_other_convention(model: Any, example: Example) -> None:
    """An off-by-one in the labels trains a model that looks healthy and is useless."""
    ids = example.ids
    message = refused(ObjectiveError, model, ids, labels=example.following)
    assert message.endswith("would make it learn the token after the next; pass them as shift_labels")
    message = refused(ObjectiveError, model, ids, shift_labels=example.labels)
    assert message.endswith(
        "would make the model repeat its input; pass them as labels, which are shifted inside the model"
    )
    other = example.following.clone()
    other[0, 5] = (other[0, 5] + 1) % 300
    assert "name different tokens" in refused(ObjectiveError, model, ids, labels=example.labels, shift_labels=other)
    assert "pass teacher_targets" not in refused(ObjectiveError, model, ids, labels=ids, targets={})
    assert "logitcache.reader.model_inputs" in refused(ObjectiveError, model, ids, labels=ids, targets={})
    assert "labels have shape (2, 5)" in refused(ObjectiveError, model, ids, shift_labels=ids[:, :5])


def test_labels_that_fit_both_conventions(model: Any, example: Example) -> None:
    """Nothing counts, all tokens are equal, or only the last one counts: nothing to tell them apart by."""
    nothing = torch.full_like(example.ids, -100)
    same = torch.full_like(example.ids, 7)
    last = nothing.clone()
    last[:, -1] = example.ids[:, -1]
    for ids, labels in ((example.ids, nothing), (same, same), (example.ids, last)):
        for name in ("labels", "shift_labels"):
            assert torch.isfinite(model(ids, **{name: labels}).loss)


def test_targets_that_do_not_fit(model: Any, example: Example) -> None:
    given = {"input_ids": example.ids, "labels": example.labels}
    packed = pack_targets(example.targets)
    short = {**packed, "ids": packed["ids"][:-1]}
    for targets, message in (
        (example.targets.slice(0, 5), "targets has 5 rows, but hidden has 18"),
        ({"ids": packed["ids"]}, "teacher_targets lacks ['tail_mass', 'weights']"),
        ({**packed, "weight": packed["weights"]}, "teacher_targets has unknown keys ['weight']"),
        ({**packed, "weights": [0.5]}, "teacher_targets['weights'] is a list; it must be a tensor"),
        ([1], "teacher_targets is a list; pass SparseTargets"),
        (short, "targets has 17 rows, but hidden has 18"),
    ):
        assert message in refused(TargetsError, model, **given, teacher_targets=targets)
    device = example.targets.to_device()
    half = {name: getattr(device, name).bfloat16() for name in ("weights", "tail_mass", "entropy", "threshold")}
    for form in ({**packed, **half}, type(device)(**{**vars(device), **half})):
        assert "rounds the teacher's probabilities" in refused(TargetsError, model, **given, teacher_targets=form)
    message = refused(ObjectiveError, model, input_ids=example.ids, teacher_targets=packed)
    assert "teacher_targets came without labels" in message


def test_a_batch_that_lost_its_targets(example: Example) -> None:
    """Trainer drops columns it does not know; a model told to distil must not train on labels alone."""
    model = patch_forward(tiny_model("llama", seed=2), objective=Objective.forward_kl()).train()
    given = {"input_ids": example.ids, "labels": example.labels}
    assert "remove_unused_columns=False" in refused(TargetsError, model, **given)
    assert model.eval()(**given).divergence is None
    patch_forward(model, objective=Objective.cross_entropy()).train()
    assert model(**given, teacher_targets=example.targets).divergence is None
    assert torch.equal(model(**given).loss, patch_forward(model, objective=None, alpha=0)(**given).loss)


def test_settings_that_make_no_sense(model: Any) -> None:
    assert "there is no setting 'temprature'; the settings are objective, alpha" in refused(
        ObjectiveError, patch_forward, model, temprature=2.0
    )
    assert "use tail='renormalised'" in refused(
        ObjectiveError, patch_forward, model, objective=Objective.forward_kl("bucket"), temperature=2.0
    )
    for fields in ({"alpha": 1.5}, {"alpha": torch.tensor(0.5)}, {"impl": "magic"}, {"objective": "kl"}):
        refused(ObjectiveError, patch_forward, model, **fields)


def test_calls_a_fused_loss_would_get_wrong(model: Any, example: Example) -> None:
    given = {"input_ids": example.ids, "labels": example.labels}
    assert "logits_to_keep makes no sense" in refused(ObjectiveError, model, **given, logits_to_keep=3)
    assert "output_router_logits = False" in refused(ModelError, model, **given, output_router_logits=True)


def test_models_that_cannot_be_patched(example: Example) -> None:
    model = tiny_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert "plain linear LM head" in refused(ModelError, patch_forward, model)
    model = tiny_model("llama")
    model.forward = model.forward
    assert "patch the model before it is prepared" in refused(ModelError, patch_forward, model)
    with torch.device("meta"):
        model = type(tiny_model("llama"))(model.config)
    assert "lies on meta" in refused(ModelError, patch_forward, model)
    patch_forward(model, check=False).to_empty(device="cpu").load_state_dict(tiny_model("llama").state_dict())
    model.model.rotary_emb = tiny_model("llama").model.rotary_emb
    expected = tiny_model("llama")(example.ids, labels=example.labels).loss
    assert model(example.ids, labels=example.labels).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_quantised_and_replaced_heads(model: Any, example: Example) -> None:
    given = {"input_ids": example.ids, "labels": example.labels}
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(300, 32, dtype=torch.int8), requires_grad=False)
    assert "quantised to torch.int8" in refused(ModelError, model, **given)

    class Packed(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0.5

    model.lm_head = Packed(32, 300)
    assert "has Packed where logitcache needs a plain linear LM head" in refused(ModelError, model, **given)
    model.lm_head = torch.nn.Linear(32, 300)
    model.lm_head.forward = torch.nn.Linear(32, 300).forward
    assert "the forward of the LM head of LlamaForCausalLM was replaced" in refused(ModelError, model, **given)


def test_a_head_that_nothing_gathers(
    model: Any, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        split = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(split)
        message = refused(ModelError, model, example.ids, labels=example.labels)
    finally:
        dist.destroy_process_group()
    assert "is a DTensor that nothing gathers" in message
    assert "shard=VocabularyShard.of(...)" in message


def test_a_wrapped_class_cannot_be_changed_back(model: Any) -> None:
    """As FSDP2 wraps it."""
    model.__class__ = type("FSDPLlamaForCausalLM", (type(model),), {})
    assert "was wrapped after it was patched" in refused(ModelError, unpatch_forward, model)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), tiny_model("llama", seed=0).model])
def test_a_model_without_a_head_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match="has no language-model head; pass the"):
        patch_forward(model)
