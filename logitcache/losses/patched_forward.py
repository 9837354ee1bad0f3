"""The forward pass of a patched model, from its keyword arguments to an output with a loss.

Legend: B sequences of L tokens, N = B * L positions, D width, V rows of the LM head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from logitcache import models
from logitcache.errors import ModelError, ObjectiveError, TargetsError
from logitcache.kernels import HeadOptions, head_entropy
from logitcache.losses.checks import known_entropy
from logitcache.losses.inputs import check_alignment, check_flags, next_labels, unpack_targets
from logitcache.losses.settings import LossSettings

# What the forward pass takes besides what the model's own does.
OWN_ARGUMENTS = ("shift_labels", "teacher_targets", "alpha", "blend")
_NOT_THE_BODYS = (*OWN_ARGUMENTS, "labels", "num_items_in_batch", "logits_to_keep", "return_dict")

# The loss, and by their names in DistillationOutput the columns [B, L] that there are.
LossAndColumns = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass
class DistillationOutput(CausalLMOutputWithPast):
    """What a patched model returns for labels: `loss`, no `logits`, and columns to log.

    Args:
        loss: (1 - alpha) * CE + alpha * T^2 * divergence, nats per counted position or per `num_items_in_batch`.
        ce: float64 [B, L], cross entropy of each position in nats, 0 where none counts; without a graph.
        divergence: [B, L] divergence from the teacher without the factor T^2, alike; None without targets.
        z_loss: [B, L] z_loss * lse^2, alike; None where there is none.
        counted: bool [B, L], where the loss counts: where there is a label, less what a mask leaves nothing to.
        kept: bool [B, L], where a mask keeps the divergence; None without one, or without targets.
    """

    ce: torch.Tensor | None = None
    divergence: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    kept: torch.Tensor | None = None


def run_body(model: Any, named: dict[str, Any]) -> Any:
    """The body's output for a call with labels or targets; refuses what a fused loss would leave out without a word."""
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
    arguments = {name: value for name, value in named.items() if name not in _NOT_THE_BODYS}
    arguments.setdefault("use_cache", False)
    return model.base_model(**arguments, return_dict=True)


def options_of(head: models.LMHead) -> HeadOptions:
    """What the kernels must know of a model's head besides its weight."""
    return HeadOptions(bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale)


def head_loss(model: Any, named: dict[str, Any], hidden_BLD: torch.Tensor) -> LossAndColumns:
    """The loss of the body's hidden states, and its columns."""
    settings: LossSettings = model._logitcache_settings
    labels, shift_labels = named.get("labels"), named.get("shift_labels")
    labels_BL = next_labels(labels, shift_labels, settings.ignore_index).to(hidden_BLD.device)
    if labels_BL.shape != hidden_BLD.shape[:2]:
        raise ObjectiveError(
            f"labels have shape {tuple(labels_BL.shape)}, but there are {tuple(hidden_BLD.shape[:2])} positions"
        )
    targets = _targets(model, settings, named)
    look = _may_look(model, hidden_BLD)
    if look:
        if named.get("input_ids") is not None:
            check_alignment(named["input_ids"], labels, shift_labels, settings.ignore_index)
        if targets is not None:
            check_flags(targets)
    alpha, blend = (_flat(named.get(name)) for name in ("alpha", "blend"))
    items = _positive(named.get("num_items_in_batch"), hidden_BLD)

    def loss_and_columns(hidden_BLD: torch.Tensor, head: models.LMHead) -> LossAndColumns:
        hidden_ND, options = hidden_BLD.flatten(0, 1), replace(options_of(head), valid_vocab=settings.valid_vocab)
        kept_BL = None
        if settings.mask is not None and targets is not None:
            counted_BL = labels_BL != settings.ignore_index
            if settings.mask.by == "teacher-entropy":
                entropy_N = known_entropy(targets, counted_BL.flatten(), look)
            else:
                entropy_N = head_entropy(hidden_ND, head.weight, head=options)
            kept_BL = settings.mask.kept(entropy_N.view_as(labels_BL), counted_BL)
        loss, terms = settings.output(
            hidden_ND, head.weight, labels_BL.flatten(), targets, options, alpha, blend, items, kept_BL
        )
        columns = {"counted": terms.counted} | terms.columns | ({} if kept_BL is None else {"kept": kept_BL})
        return loss, {name: column.detach().view_as(labels_BL) for name, column in columns.items()}

    return models.with_head(model, hidden_BLD, loss_and_columns)


def assemble(model: Any, named: dict[str, Any], output: Any, of_the_head: LossAndColumns) -> Any:
    """The output of the whole model, from that of its body."""
    loss, columns = of_the_head
    result = DistillationOutput(
        loss=loss,
        past_key_values=output.get("past_key_values"),
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
        **columns,
    )
    as_dict = named.get("return_dict")
    return result if (model.config.return_dict if as_dict is None else as_dict) else result.to_tuple()


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


def _may_look(model: Any, hidden: torch.Tensor) -> bool:
    """Whether to look at values: on CPU always, where it stalls a device once per model."""
    if hidden.device.type == "cpu":
        return True
    looked = vars(model).get("_logitcache_looked", False)
    model._logitcache_looked = True
    return not looked


def _flat(value: float | torch.Tensor | None) -> float | torch.Tensor | None:
    """A number, or one of each of the B * L positions."""
    return value.flatten() if isinstance(value, torch.Tensor) and value.ndim else value


def _positive(items: Any, hidden: torch.Tensor) -> float | torch.Tensor | None:
    """num_items_in_batch, at least 1: a batch may count no token at all, and its loss is then 0, not 0 / 0."""
    if isinstance(items, torch.Tensor):
        return items.reshape(-1)[0].to(hidden.device).clamp(min=1)
    return None if items is None else max(1, items)
