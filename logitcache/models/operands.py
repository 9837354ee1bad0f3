"""The LM head of a model in training as operands of one matrix product, through peft's adapters and sharding hooks.

Legend: V rows of the LM head, D width of the hidden state, N positions, R rank of an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from logitcache.errors import ModelError
from logitcache.models.head import LMHead, head_options, plain_linear

Result = TypeVar("Result")


def causal_lm(model: Any) -> Any:
    """The transformers model inside of peft's wrapper, or the model itself.

    Raises:
        ModelError: the wrapper puts virtual tokens before the input, so that positions are not the tokens'.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{type(model).__name__} wears {model.active_peft_config.peft_type.value}, whose virtual tokens have no "
            "teacher rows; use LoRA, or train without an adapter"
        )
    return model.get_base_model()


def with_head(model: Any, hidden: torch.Tensor, function: Callable[[torch.Tensor, LMHead], Result]) -> Result:
    """`function(hidden, head)` with the model's LM head as one linear map, gathered if it is sharded.

    Args:
        model: a transformers causal language model, or peft's wrapper of one.
        hidden: [..., D] the body's last hidden states.
        function: gets the hidden states and the head to multiply them with. Under LoRA on the head both are wider by
            R: x W' + s (x A') B' = [x, s x A'] [W, B]', exact under dropout too. That costs a copy [V, D + R] of the
            weight; the gradient reaches A and B (and W, unless it is frozen) through it. What the function returns goes
            through the head module's hooks: tensors, in tuples and dicts.

    Raises:
        ModelError: the head is not a plain linear layer, a LoRA layer or a copy that peft trains.
    """
    model = causal_lm(model)
    linear = model.get_output_embeddings()

    def inside(hidden: torch.Tensor) -> Result:
        hidden, weight, bias = _operands(model, linear, hidden)
        softcap, scale = head_options(model.config)
        return function(hidden, LMHead(weight, bias, softcap, scale))

    _check_own_forward(model, linear)
    if not isinstance(linear, torch.nn.Module) or not (linear._forward_pre_hooks or linear._forward_hooks):
        return inside(hidden)
    # FSDP2 gathers a head of its own unit, and readies its backward, in hooks around the module's forward.
    linear.forward = inside
    try:
        return linear(hidden)
    finally:
        del linear.forward


def inside_forward(model: Any, function: Callable[[], None]) -> None:
    """Call `function` in the place of the model's forward pass, inside the hooks with which FSDP2 gathers its weights.

    It is for passes without a graph: nothing is returned through the hooks, which would round it under mixed precision.
    A model without hooks is not called.
    """
    model = causal_lm(model)
    if not (model._forward_pre_hooks or model._forward_hooks):
        function()
        return
    own = vars(model).get("forward")  # accelerate's, under mixed precision
    model.forward = function
    try:
        model()
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _operands(model: Any, linear: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(hidden, weight, bias) of the linear map that the module is."""
    linear = _trained_copy(linear)
    if not _is_lora(linear):
        return hidden, *plain_linear(type(model).__name__, linear)
    weight, bias = plain_linear(type(model).__name__, linear.base_layer)
    if linear.disable_adapters or linear.merged:
        return hidden, weight, bias
    hiddens, weights = [hidden], [weight]
    for name in linear.active_adapters:
        if name not in linear.lora_A:
            continue
        down, up = linear.lora_A[name], linear.lora_B[name]
        if name in linear.lora_variant or up.bias is not None:
            raise ModelError(
                f"{type(model).__name__} wears a variant of LoRA on its LM head (adapter {name!r}: DoRA, a bias or "
                "another extension) that logitcache does not know; use plain LoRA there, or take it off the head"
            )
        low = down(linear.lora_dropout[name](hidden.to(down.weight.dtype))) * linear.scaling[name]
        hiddens.append(low.to(hidden.dtype))
        weights.append(up.weight.to(weight.dtype))
    return torch.cat(hiddens, dim=-1), torch.cat(weights, dim=1), bias


def _trained_copy(linear: Any) -> Any:
    """The copy of the head that peft trains (`modules_to_save`) where there is one and it is active."""
    other = sys.modules.get("peft.utils.other")
    if other is None or not isinstance(linear, other.ModulesToSaveWrapper):
        return linear
    active = linear.active_adapters
    if linear.disable_adapters or not active or any(name not in linear.modules_to_save for name in active):
        return linear.original_module
    return linear.modules_to_save[active[0]]


def _is_lora(linear: Any) -> bool:
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and type(linear) is layers.Linear


def _check_own_forward(model: Any, linear: Any) -> None:
    if "forward" in getattr(linear, "__dict__", {}):
        raise ModelError(
            f"the forward of the LM head of {type(model).__name__} was replaced (by tensor parallelism, offloading or "
            "another patch), which a fused loss would pass by; load the model without that"
        )
