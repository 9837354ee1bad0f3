"""A causal language model as a body and a linear head, and how the head makes logits.

Legend: V rows of the LM head, D width of the hidden state, B sequences of L tokens, N positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from logitcache.errors import ModelError

_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# These multiply by `logits_scaling`; Granite, its relatives and MiniCPM3 divide.
_MULTIPLY_BY_SCALING = ("hyperclovax",)


@dataclass(frozen=True, eq=False)
class LMHead:
    """How the last hidden state becomes logits: `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`.

    Args:
        weight: [V, D], the model's own parameter (perhaps tied to its embedding).
        bias: [V] or None.
        softcap: None for no capping.
        logit_scale: None for 1.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None


def split_model(model: Any) -> tuple[Any, LMHead]:
    """The body of a causal language model (tokens -> hidden states) and its head.

    Nothing is computed; `check_split` tells whether the two really make the model's logits.

    Raises:
        ModelError: the model has no plain linear head, wears an adapter, or lies on several devices.
    """
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ModelError(f"{name} wears an adapter; merge it first with merge_and_unload()")
    body, linear = model.base_model, model.get_output_embeddings()
    if body is model or not isinstance(linear, torch.nn.Linear) or hasattr(linear, "base_layer"):
        raise ModelError(
            f"{name} has {type(linear).__name__} where logitcache needs a plain linear LM head; "
            "merge adapters first, or choose another architecture"
        )
    weight = linear.weight
    if not weight.is_floating_point():
        raise ModelError(f"{name} has an LM head quantised to {weight.dtype}; load the model without quantisation")
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ModelError(f"{name} lies on {', '.join(places)}; load it whole on one device")
    config = model.config.get_text_config()
    softcap = next(filter(None, (_number(config, field) for field in _SOFTCAPS)), None)
    return body, LMHead(weight, linear.bias, softcap, _logit_scale(config))


def _number(config: Any, field: str) -> float | None:
    value = getattr(config, field, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _logit_scale(config: Any) -> float | None:
    scale = math.prod(value for field in _SCALES if (value := _number(config, field)) is not None)
    scaling = _number(config, "logits_scaling")
    if scaling:
        scale = scale * scaling if config.model_type in _MULTIPLY_BY_SCALING else scale / scaling
    return None if scale == 1 else float(scale)


def body_hidden(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The last hidden state, after the final norm: [B, L, D] in the model's dtype.

    Args:
        model: a causal language model that `check_split` accepts.
        input_ids: int64 [B, L] on the model's device.
        attention_mask: [B, L], None where all tokens are real or the unreal ones come last.
    """
    return model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
    ).last_hidden_state


def head_logits(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Logits float32 [N, V] of hidden states [N, D]: the product in the head's dtype, the rest in float32."""
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    if head.logit_scale is not None:
        logits = logits * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@torch.no_grad()
def check_split(model: Any) -> None:
    """Run a few tokens and compare `head_logits(body_hidden(...))` with the model's own logits.

    Raises:
        ModelError: they differ, a position sees later tokens, or the model does not run on text alone.
    """
    name, (_, head) = type(model).__name__, split_model(model)
    rows = min(head.weight.shape[0], model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(8, device=head.weight.device) * max(1, rows // 11) % rows).repeat(2, 1)
    ids[1, -1] = (ids[0, -1] + 1) % rows
    training = model.training
    model.eval()
    try:
        hidden = body_hidden(model, ids)
        gain, logits = _loud_logits(model, ids, hidden, head)
    except Exception as error:
        raise ModelError(
            f"{name} does not run on token ids alone ({type(error).__name__}: {error}); choose another model"
        ) from error
    finally:
        model.train(training)
    if not (bool(torch.isfinite(hidden).all()) and bool(torch.isfinite(logits).all())):
        raise ModelError(
            f"{name} computes NaN or infinity in {head.weight.dtype}; check its weights or try another --dtype"
        )
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 3e-2
    if not _close(hidden[0, :-1], hidden[1, :-1], tolerance):
        raise ModelError(f"{name} lets a position see the tokens after it, so it is no causal language model")
    if not _close(head_logits(hidden * gain, head), logits, tolerance):
        raise ModelError(
            f"{name} (model type {model.config.model_type!r}) computes its logits in a way logitcache does not know; "
            "choose another architecture, or report this one"
        )


def _loud_logits(model: Any, ids: torch.Tensor, hidden: torch.Tensor, head: LMHead) -> tuple[float, torch.Tensor]:
    """The model's own logits with the head's input multiplied by a gain: (gain, logits).

    A softcap hardly bends the small logits of an odd input or a young model; at 40 nats nothing stays hidden.
    """
    largest = float(head_logits(hidden, LMHead(head.weight)).abs().max())
    gain, applied = (40 / largest if largest > 0 else 1.0), []

    def amplify(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        applied.append(True)
        return (args[0] * gain, *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(amplify)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return (gain if applied else 1.0), logits


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() <= tolerance * max(float(other.abs().max()), 1e-6))
