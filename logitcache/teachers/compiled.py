"""A teacher's body through torch.compile, for batches of one shape; all others run as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from logitcache.errors import ModelError

_logger = logging.getLogger(__name__)

Body = Callable[[torch.Tensor], torch.Tensor]


class CompiledBody:
    """Calls `body`, compiled where a batch has as many blocks as was last announced.

    A body that torch cannot compile runs as it is, which is said once.

    Args:
        body: token ids [B, L] -> hidden states [B, L, D].
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        self._compiled: Body | None = None
        self._blocks = 0
        self._failed = False

    def expect(self, blocks: int) -> None:
        """Compile for batches of so many blocks, when the next one comes."""
        if blocks != self._blocks and not self._failed:
            # Sizes as constants: one batch follows the other, all of them alike.
            self._blocks, self._compiled = blocks, torch.compile(self._body, dynamic=False)

    def __call__(self, ids_BL: torch.Tensor) -> torch.Tensor:
        if self._compiled is not None and len(ids_BL) == self._blocks:
            try:
                return self._compiled(ids_BL)
            except Exception as error:
                if not _is_compilers(error):
                    raise
                self._compiled, self._failed = None, True
                _logger.warning("the teacher cannot be compiled (%s); it runs as it is", _reason(error))
        return self._body(ids_BL)


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        ModelError: there is no compiler that torch can use for this device.
    """
    try:
        torch.compile(_something, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        if not _is_compilers(error):
            raise
        raise ModelError(
            f"--compile finds no compiler that torch can use ({_reason(error)}); install g++ (or name one in CXX), or "
            "leave --compile out"
        ) from error


def _something(values: torch.Tensor) -> torch.Tensor:
    return torch.sin(values) + 1


def _is_compilers(error: Exception) -> bool:
    """Whether it comes from compiling, not from running what was compiled."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch.fx"))


def _reason(error: Exception) -> str:
    """Its first sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said.rstrip(".")
