"""A teacher over three devices that torch only pretends to have; to be run as a process of its own.

Fake tensors have a device and a shape but no numbers, and an operation on tensors of two devices fails as on real ones.
Prints where ids go, and where the body's hidden states, the teacher's, its logits and the whole model's come out.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import dispatch_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from logitcache import models
from logitcache.models.head import LMHead, head_options
from logitcache.models.placement import keep_head
from logitcache.teachers import TransformersTeacher
from tests.tiny import tiny_model

PLACES = {
    "model.embed_tokens": "pretend:0",
    "model.rotary_emb": "pretend:0",
    "model.layers.0": "pretend:0",
    "model.layers.1": "pretend:1",
    "model.final_layernorm": "pretend:1",
    "lm_head": "pretend:2",
}


class Backend(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch asks a backend."""

    def device_count(self) -> int:
        return 3


def place(module: Any, device: str) -> None:
    """Before accelerate does, which makes new parameters in a way that fake tensors do not know."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = torch.nn.Parameter(tensor.detach().to(device), requires_grad=False)
        for name, tensor in part._buffers.items():
            part._buffers[name] = tensor.to(device)


def split(model: Any) -> tuple[Any, LMHead]:
    """As `split_model`, which refuses fake tensors."""
    head = model.get_output_embeddings()
    return model.base_model, LMHead(head.weight, head.bias, *head_options(model.config))


def main() -> None:
    """Run it."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", Backend())
    # What looks at numbers, or at the type of a weight, is left out.
    models.check_split, models.split_model = (lambda model: None), split
    TransformersTeacher._check_ids = lambda self, ids: None  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny_model("phi")
        for name, device in PLACES.items():
            place(model.get_submodule(name), device)
        dispatch_model(model, PLACES)
        keep_head(model)
        teacher = TransformersTeacher(model, None, {})
        ids = torch.zeros(2, 8, dtype=torch.long)
        body = models.body_hidden(model, ids.to(models.input_device(model)))
        hidden = teacher.hidden(ids)
        logits = teacher.logits(hidden)
        whole = model(input_ids=ids, use_cache=False).logits
        print(models.input_device(model), body.device, hidden.device, logits.device, whole.device)  # noqa: T201
        try:
            teacher.logits(body)
        except RuntimeError as error:
            sys.stderr.write(str(error))


if __name__ == "__main__":
    main()
