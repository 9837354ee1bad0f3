"""One teacher over all processes of a launch, split by transformers' tensor parallelism: rank 0 works, others follow.

Every rank holds a slice of each layer and computes its part of the hidden states, which transformers adds up. Rank 0
is a worker like any other, and tells the others which blocks come next. The head is whole on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from logitcache.errors import ModelError, reason_of
from logitcache.teachers.transformers_teacher import TransformersTeacher

# Rank 0 may wait for long where others hold the rest of a dump; who dies closes its connections at once.
_PATIENCE = timedelta(days=30)
# What is told in the place of the shape of the next blocks.
_DONE, _FAILED = (0, 0), (-1, -1)


class TensorParallelTeacher(TransformersTeacher):
    """A teacher of which this process is one rank; all ranks load it, then rank 0 uses it and the others `follow`."""

    def __init__(self, model: Any, tokenizer: Any, model_identity: dict[str, Any]) -> None:
        try:
            super().__init__(model, tokenizer, model_identity)
        except ModelError as error:
            _check_heads(model)
            raise error
        # For what is told, whatever the devices talk by.
        self._orders = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def hidden(self, tokens: NDArray[np.integer[Any]] | torch.Tensor) -> torch.Tensor:
        """As of `TransformersTeacher`, computed by all ranks; for rank 0.

        Raises:
            ModelError: a rank is gone or lacks memory, so that no further forward is possible; or an unknown id.
        """
        ids = torch.from_numpy(np.array(tokens, dtype=np.int64)) if isinstance(tokens, np.ndarray) else tokens.long()
        self._check_ids(ids)
        with _together():
            self._tell(tuple(ids.shape))
            dist.broadcast(ids.cpu(), 0, group=self._orders)
            return super().hidden(ids)

    def follow(self) -> None:
        """Compute this rank's part of every forward until rank 0 is through.

        Raises:
            ModelError: rank 0 failed or is gone, or this rank lacks memory.
        """
        order = torch.empty(2, dtype=torch.int64)
        with _together():
            while True:
                dist.broadcast(order, 0, group=self._orders)
                if tuple(order.tolist()) in (_DONE, _FAILED):
                    break
                ids = torch.empty(*order.tolist(), dtype=torch.int64)
                dist.broadcast(ids, 0, group=self._orders)
                super().hidden(ids)
        if tuple(order.tolist()) == _FAILED:
            error = ModelError("rank 0 of the teacher ended with an error; what it said tells what to do")
            error.said_elsewhere = True
            raise error

    def dismiss(self, failed: bool = False) -> None:
        """Let the other ranks end; for rank 0, at the end. Those that are gone are not missed."""
        with contextlib.suppress(RuntimeError):
            self._tell(_FAILED if failed else _DONE)

    def _tell(self, order: tuple[int, ...]) -> None:
        dist.broadcast(torch.tensor(order, dtype=torch.int64), 0, group=self._orders)


def _check_heads(model: Any) -> None:
    """Raise ModelError where the ranks are too many for the heads, which the forward says in its own way."""
    config, ranks = model.config.get_text_config(), dist.get_world_size()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % ranks:
            raise ModelError(
                f"the teacher's {heads} {field.removeprefix('num_').replace('_', ' ')} cannot be shared by {ranks} "
                "ranks; launch a number of ranks that divides them, or use --device-map"
            )


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Whatever goes wrong in a forward of all ranks ends the teacher: the others stand in the middle of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = reason_of(error)
        raise ModelError(
            f"the teacher's ranks lost each other in a forward pass ({reason}); where memory ran out, choose a smaller "
            "--batch-tokens, and run the same command again, it resumes"
        ) from error
