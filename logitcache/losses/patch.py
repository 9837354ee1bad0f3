"""patch_forward: a causal language model of transformers that answers labels with a fused loss instead of logits.

The mechanism is a subclass of the model's own class with another `forward`. So wrappers (DDP, FSDP, torch.compile,
peft, Trainer) see an ordinary model, the loss is computed inside of the forward pass they wrap, where FSDP has gathered
the head, and copies, pickles and saved folders of the model stay what they were.

Legend: B sequences of L tokens, N = B * L positions, D width, V rows of the LM head.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from logitcache import models
from logitcache.errors import ModelError, ObjectiveError, TargetsError
from logitcache.kernels import HeadOptions
from logitcache.losses.inputs import check_alignment, check_flags, next_labels, unpack_targets
from logitcache.losses.settings import LossSettings

# What a forward pass of ours takes besides that of the model, and what is the loss's rather than the body's.
_OWN = ("shift_labels", "teacher_targets", "alpha")
_NOT_THE_BODYS = (*_OWN, "labels", "num_items_in_batch", "logits_to_keep", "return_dict")


@dataclass
class DistillationOutput(CausalLMOutputWithPast):
    """What a patched model returns for labels: `loss`, no `logits`, and columns to log.

    Args:
        loss: (1 - alpha) * CE + alpha * T^2 * divergence, nats per counted position or per `num_items_in_batch`.
        ce: float64 [B, L], cross entropy of each position in nats, 0 where none counts; without a graph.
        divergence: [B, L] divergence from the teacher without the factor T^2, alike; None without targets.
        counted: bool [B, L], where there is a label.
    """

    ce: torch.Tensor | None = None
    divergence: torch.Tensor | None = None
    counted: torch.Tensor | None = None


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
    plain_forward = plain.forward
    signature = inspect.signature(plain_forward)
    positional = list(signature.parameters)[1:]

    @functools.wraps(plain_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(positional, args, strict=False)), **kwargs}
        if all(named.get(name) is None for name in ("labels", "shift_labels", "teacher_targets")):
            return plain_forward(self, *args, **{name: kwargs[name] for name in kwargs if name not in _OWN})
        return _loss_of(self, named)

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
    return type(plain.__name__, (plain,), {**same, **own})


def _extended(signature: inspect.Signature) -> inspect.Signature:
    """With our keywords, so that Trainer keeps such columns of a data set."""
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _OWN]
    return signature.replace(parameters=[*parameters, *own, *rest])


def _restore(plain: Any) -> Any:
    """An empty instance for copy and pickle, which cannot find a class made at run time by its name."""
    patched = _patched_class(plain)
    return patched.__new__(patched)


def _loss_of(model: Any, named: dict[str, Any]) -> Any:
    """The output for a call with labels or targets."""
    settings: LossSettings = model._logitcache_settings
    _check_call(model, named)
    body = {name: value for name, value in named.items() if name not in _NOT_THE_BODYS}
    body.setdefault("use_cache", False)
    output = model.base_model(**body, return_dict=True)
    hidden_BLD = output.last_hidden_state
    labels, shift_labels = named.get("labels"), named.get("shift_labels")
    labels_BL = next_labels(labels, shift_labels, settings.ignore_index).to(hidden_BLD.device)
    if labels_BL.shape != hidden_BLD.shape[:2]:
        raise ObjectiveError(
            f"labels have shape {tuple(labels_BL.shape)}, but there are {tuple(hidden_BLD.shape[:2])} positions"
        )
    targets = _targets(model, settings, named)
    if _may_look(model, hidden_BLD):
        if named.get("input_ids") is not None:
            check_alignment(named["input_ids"], labels, shift_labels, settings.ignore_index)
        if targets is not None:
            check_flags(targets)
    alpha, items = named.get("alpha"), named.get("num_items_in_batch")
    call = functools.partial(
        _fused, settings, labels_BL, targets, settings.alpha if alpha is None else alpha, _positive(items, hidden_BLD)
    )
    loss, ce_BL, divergence_BL, counted_BL = models.with_head(model, hidden_BLD, call)
    result = DistillationOutput(
        loss=loss,
        past_key_values=output.get("past_key_values"),
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
        ce=ce_BL,
        divergence=divergence_BL,
        counted=counted_BL,
    )
    as_dict = named.get("return_dict")
    return result if (model.config.return_dict if as_dict is None else as_dict) else result.to_tuple()


def _fused(
    settings: LossSettings,
    labels_BL: torch.Tensor,
    targets: Any,
    alpha: float | torch.Tensor,
    items: float | torch.Tensor | None,
    hidden_BLD: torch.Tensor,
    head: models.LMHead,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(loss, ce [B, L], divergence [B, L], counted [B, L]) of the body's hidden states."""
    options = HeadOptions(bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale)
    terms = settings.terms(hidden_BLD.flatten(0, 1), head.weight, labels_BL.flatten(), targets, options)
    if isinstance(alpha, torch.Tensor) and alpha.ndim:
        alpha = alpha.flatten()
    loss = terms.loss(alpha, normalizer=items)

    def column(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.detach().view_as(labels_BL)

    return loss, column(terms.ce), column(terms.divergence), terms.counted.view_as(labels_BL)


def _targets(model: Any, settings: LossSettings, named: dict[str, Any]) -> Any:
    """The rows to distil from, or None for cross entropy alone."""
    given, alpha = named.get("teacher_targets"), named.get("alpha")
    if settings.objective is not None and not settings.reads_targets:
        return None
    if settings.alpha == 0 and alpha is None:
        return None
    if given is not None:
        return unpack_targets(given, settings.unbiased, settings.has_exact_head)
    if settings.objective is not None and model.training:
        raise TargetsError(
            "the model was patched to distil, but a batch in training has no teacher_targets; pass them (Trainer drops "
            "columns it does not know unless remove_unused_columns=False), or patch_forward(model, objective=None)"
        )
    return None


def _check_call(model: Any, named: dict[str, Any]) -> None:
    """Refuse what a fused loss would leave out without a word."""
    if "targets" in named:
        raise ObjectiveError(
            "a patched model takes teacher_targets, not targets; make its inputs of a batch of CacheDataset with "
            "logitcache.reader.model_inputs, as the labels of such a batch are shifted already"
        )
    keep = named.get("logits_to_keep")
    if isinstance(keep, torch.Tensor) or keep:
        raise ObjectiveError("logits_to_keep makes no sense with labels, which need all positions; leave it out")
    routed = named.get("output_router_logits")
    if getattr(model.config.get_text_config(), "output_router_logits", False) if routed is None else routed:
        raise ModelError(
            f"{type(model).__name__} adds the load of its experts to its loss (output_router_logits), which the fused "
            "loss does not; set model.config.output_router_logits = False"
        )


def _may_look(model: Any, hidden: torch.Tensor) -> bool:
    """Whether to look at values: on CPU always, where it stalls a device once per model, in a compiled model never."""
    if torch.compiler.is_compiling():
        return False
    if hidden.device.type == "cpu":
        return True
    looked = vars(model).get("_logitcache_looked", False)
    model._logitcache_looked = True
    return not looked


def _positive(items: Any, hidden: torch.Tensor) -> float | torch.Tensor | None:
    """num_items_in_batch, at least 1: a batch may count no token at all, and its loss is then 0, not 0 / 0."""
    if isinstance(items, torch.Tensor):
        return items.reshape(-1)[0].to(hidden.device).clamp(min=1)
    return None if items is None else max(1, items)
