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
from logitcache.models.placement import is_spread

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
        ModelError: the model has no plain linear head, wears an adapter, or lies on several devices without a map.
    """
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ModelError(f"{name} wears an adapter; merge it first with merge_and_unload()")
    body = model.base_model
    if body is model:
        raise ModelError(f"{name} is a body without an LM head; choose a causal language model")
    weight, bias = plain_linear(name, model.get_output_embeddings())
    check_place(model)
    return body, LMHead(weight, bias, *head_options(model.config))


def plain_linear(name: str, linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, D] and bias [V] of a linear layer; ModelError, naming the model, for anything else."""
    if not isinstance(linear, torch.nn.Linear) or type(linear).forward is not torch.nn.Linear.forward:
        raise ModelError(
            f"{name} has {type(linear).__name__} where logitcache needs a plain linear LM head; "
            "merge adapters first, load it without quantisation, or choose another architecture"
        )
    weight = linear.weight
    if type(weight).__name__ == "DTensor":
        raise ModelError(
            f"the LM head of {name} is a DTensor that nothing gathers; under FSDP call the sharded model itself, under "
            "tensor parallelism use distillation_loss with shard=VocabularyShard.of(...)"
        )
    if not weight.is_floating_point() or type(weight) not in (torch.Tensor, torch.nn.Parameter):
        raise ModelError(
            f"{name} has an LM head quantised to {weight.dtype} ({type(weight).__name__}); load the model without "
            "quantisation, or at least its head"
        )
    return weight, linear.bias


def check_place(model: Any) -> None:
    """Raise ModelError unless all of the model lies on one device, with memory, or was spread by a device map."""
    if is_spread(model):
        return
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ModelError(f"{type(model).__name__} lies on {', '.join(places)}; load it whole on one device")


def head_options(config: Any) -> tuple[float | None, float | None]:
    """(softcap, logit_scale) of a transformers config, None where it has none."""
    config = config.get_text_config()
    softcap = next(filter(None, (_number(config, field) for field in _SOFTCAPS)), None)
    return softcap, _logit_scale(config)


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
    return finish_logits(head_product(hidden, head), head)


def head_product(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    """The product of hidden states [N, D] with the head, [N, V] in the head's dtype."""
    return F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)


def finish_logits(product: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Logits float32 [N, V] of `head_product`, or of some of its rows."""
    logits = product.float()
    if head.logit_scale is not None:
        logits = logits * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
