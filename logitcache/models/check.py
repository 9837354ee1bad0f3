"""Whether a causal language model really is a body and a linear head, seen from a few tokens run through it."""

from __future__ import annotations

from typing import Any

import torch

from logitcache.errors import ModelError
from logitcache.models.head import LMHead, body_hidden, check_place, head_logits
from logitcache.models.operands import causal_lm, with_head
from logitcache.models.placement import input_device


@torch.no_grad()
def check_split(model: Any) -> None:
    """Run a few tokens and compare `head_logits(body_hidden(...))` with the model's own logits.

    Raises:
        ModelError: they differ, a position sees later tokens, the model does not run on text alone, or its head is not
            one that `with_head` takes.
    """
    model = causal_lm(model)
    check_place(model)
    name, ids = type(model).__name__, _odd_tokens(model)
    training = model.training
    model.eval()
    try:
        hidden = body_hidden(model, ids)
        gain, logits = _loud_logits(model, ids, hidden)
        split = with_head(model, hidden * gain, head_logits)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} does not run on token ids alone ({type(error).__name__}: {error}); choose another model"
        ) from error
    finally:
        model.train(training)
    if not (bool(torch.isfinite(hidden).all()) and bool(torch.isfinite(logits).all())):
        raise ModelError(f"{name} computes NaN or infinity in {hidden.dtype}; check its weights or try another --dtype")
    tolerance = 1e-4 if hidden.dtype in (torch.float32, torch.float64) else 3e-2
    if not _close(hidden[0, :-1], hidden[1, :-1], tolerance):
        raise ModelError(f"{name} lets a position see the tokens after it, so it is no causal language model")
    if not _close(split, logits, tolerance):
        raise ModelError(
            f"{name} (model type {model.config.model_type!r}) computes its logits in a way logitcache does not know; "
            "choose another architecture, or report this one"
        )


def _odd_tokens(model: Any) -> torch.Tensor:
    """Two rows of eight ids from all over the vocabulary; only the last one differs."""
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    rows = embedding.shape[0] if head is None else min(embedding.shape[0], head.shape[0])
    ids = (torch.arange(8, device=input_device(model)) * max(1, rows // 11) % rows).repeat(2, 1)
    ids[1, -1] = (ids[0, -1] + 1) % rows
    return ids


def _loud_logits(model: Any, ids: torch.Tensor, hidden: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The model's own logits with the head's input multiplied by a gain: (gain, logits).

    A softcap hardly bends the small logits of an odd input or a young model; at 40 nats nothing stays hidden.
    """
    largest = float(with_head(model, hidden, lambda x, head: head_logits(x, LMHead(head.weight)).abs().max()))
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
    one, other = one.to(other.device).float(), other.float()
    return bool((one - other).abs().max() <= tolerance * max(float(other.abs().max()), 1e-6))
