"""patch_forward: a causal language model of transformers that answers labels with a fused loss instead of logits.

The mechanism is a subclass of the model's own class with another `forward`. So wrappers (DDP, FSDP, torch.compile,
peft, Trainer) see an ordinary model, the loss is computed inside of the forward pass they wrap, where FSDP has gathered
the head, and copies, pickles and saved folders of the model stay what they were.

Legend: B sequences of L tokens, V rows of the LM head.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from logitcache import models
from logitcache.errors import ModelError
from logitcache.losses.patched_forward import OWN_ARGUMENTS, assemble, head_loss, run_body
from logitcache.losses.settings import LossSettings


def patch_forward(model: Any, settings: LossSettings | None = None, *, check: bool = True, **fields: Any) -> Any:
    """Let `model(input_ids, labels=...)` compute its loss without logits [B, L, V], and distil where it gets targets.

    A patched model takes everything it took before, and of labels either convention by its name:

        labels            transformers': a copy of input_ids, -100 where nothing counts; shifted inside
        shift_labels      the next token of each position (as `Blocks.labels()`); not shifted
        teacher_targets   the teacher's rows of the B * L positions, row t for what follows token t: SparseTargets,
                          DeviceTargets, or a dict of tensors as `pack_targets` makes it
        alpha             in place of the settings' alpha: a number, or a tensor of one number or [B, L]
        num_items_in_batch  divides the sum, as transformers' Trainer wants it for gradient accumulation

    and returns a `DistillationOutput`. With none of labels, shift_labels and teacher_targets, also in generate(), it
    behaves as it did. Labels of one convention under the other's name are refused: on CPU on every call, on other
    devices, where looking stalls the device, on the first. Loss and gradients are those of the model's own logits.

    Args:
        model: a causal language model of transformers, or peft's wrapper of one; changed in place. Patching again
            changes the settings that are given, and nothing else.
        settings: what is minimised; `fields` are fields of LossSettings to set on top.
        check: False leaves out the trial run, for models without memory yet (meta device) or sharded already.

    Returns:
        The model.

    Raises:
        ModelError: the architecture is not one whose logits come from a plain linear head.
        ObjectiveError: settings that make no sense.
    """
    inner = models.causal_lm(model)
    if not callable(getattr(inner, "get_output_embeddings", None)) or inner.get_output_embeddings() is None:
        raise ModelError(f"{type(inner).__name__} has no language-model head; pass the ...ForCausalLM model")
    before = getattr(inner, "_logitcache_settings", None)
    settings = (settings or before or LossSettings()).with_fields(fields)
    if not is_patched(inner):
        if "forward" in vars(inner):
            raise ModelError(
                f"the forward of this {type(inner).__name__} was replaced (by accelerate or another patch), so a "
                "patched one would not be called; patch the model before it is prepared"
            )
        if check:
            models.check_split(inner)
        plain: Any = type(inner)
        inner.__class__ = _patched_class(plain)
    inner._logitcache_settings = settings
    return model


def unpatch_forward(model: Any) -> Any:
    """Take `patch_forward` back, and return the model; a model that is not patched stays as it is.

    Raises:
        ModelError: the model was sharded after it was patched.
    """
    inner = models.causal_lm(model)
    if not is_patched(inner):
        return model
    if "_logitcache_plain" not in vars(type(inner)):
        raise ModelError(
            f"{type(inner).__name__} was wrapped after it was patched, so its class cannot be changed back; load the "
            "saved model instead"
        )
    inner.__class__ = inner._logitcache_plain
    for name in ("_logitcache_settings", "_logitcache_looked"):
        vars(inner).pop(name, None)
    return model


def is_patched(model: Any) -> bool:
    """Whether `patch_forward` changed this model."""
    return hasattr(type(models.causal_lm(model)), "_logitcache_plain")


@functools.cache
def _patched_class(plain: Any) -> Any:
    """A subclass of a model's class, of the same name, whose forward knows labels of ours."""
    signature = inspect.signature(plain.forward)
    positional = list(signature.parameters)[1:]
    # Outside of compiled graphs: checks read values, and the slices of the vocabulary would be unrolled.
    eager_head_loss = torch.compiler.disable(head_loss)

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(positional, args, strict=False)), **kwargs}
        if all(named.get(name) is None for name in ("labels", "shift_labels", "teacher_targets")):
            return plain.forward(self, *args, **{name: kwargs[name] for name in kwargs if name not in OWN_ARGUMENTS})
        output = run_body(self, named)
        return assemble(self, named, output, eager_head_loss(self, named, output.last_hidden_state))

    forward.__signature__ = _extended(signature)  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> Any:
        _, _, *state = plain.__reduce_ex__(self, protocol)
        return (_restore, (plain,), *state)

    same = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    own = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "_logitcache_plain": plain,
        # Trainer then counts the labels of a whole accumulated batch and passes num_items_in_batch.
        "accepts_loss_kwargs": True,
    }
    return type(plain)(plain.__name__, (plain,), {**same, **own})


def _extended(signature: inspect.Signature) -> inspect.Signature:
    """With `teacher_targets`, so that Trainer keeps that column of a data set.

    Without `shift_labels`: of a signature with two names of labels Trainer evaluates no batch that lacks one of them.
    """
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    own = inspect.Parameter("teacher_targets", inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*parameters, own, *rest])


def _restore(plain: Any) -> Any:
    """An empty instance for copy and pickle, which cannot find a class made at run time by its name."""
    patched = _patched_class(plain)
    return patched.__new__(patched)
