"""A teacher that transformers runs in this process.

Legend: B blocks of L tokens, N = B * L rows, D width of the hidden state, V rows of the LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from logitcache import models
from logitcache.errors import ModelError
from logitcache.selection import Selection
from logitcache.teachers.capture import RowsFromLogits
from logitcache.teachers.compiled import CompiledBody, check_compiler

# Logits of one slice of rows: small enough for the caches and memory of a laptop, large enough to keep a GPU busy.
_CPU_LOGITS_BYTES = 32 << 20
_CUDA_LOGITS_BYTES = 1 << 30
_LEAST_ROWS = 16


class TransformersTeacher(RowsFromLogits):
    """A causal language model with its tokenizer; build it with `load`.

    Attributes:
        model, tokenizer: as loaded.
        head: the `LMHead` that makes logits of hidden states.
        device: torch.device of the head, where logits are made; the body may be spread over others.
        vocab_size: V, rows of the LM head; the softmax runs over all of them, as in the model itself.
        blocks_at_once: 1: a single block keeps it busy.
    """

    blocks_at_once = 1

    def __init__(self, model: Any, tokenizer: Any, model_identity: dict[str, Any]) -> None:
        models.check_split(model)
        self.model, self.tokenizer = model, tokenizer
        self._model_identity = model_identity
        _, self.head = models.split_model(model)
        self.device: torch.device = self.head.weight.device
        self.vocab_size = int(self.head.weight.shape[0])
        self._config = model.config.get_text_config()
        self._input_device = models.input_device(model)
        self._embedded = int(model.get_input_embeddings().weight.shape[0])
        self._compiled: CompiledBody | None = None

    @classmethod
    def load(
        cls,
        source: str | Path,
        gguf_file: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        tokenizer: str | Path | None = None,
        device_map: str | None = None,
        tensor_parallel: bool = False,
        compile: bool = False,
    ) -> Self:
        """Load and check a teacher; arguments as `models.load_model`.

        Args:
            tokenizer: folder or hub id of the tokenizer, if it is not beside the model.
            compile: run the body through torch.compile, in batches as `expect_batches` says.

        Raises:
            UsageError: an unknown dtype or device, or a device map that does not fit.
            ModelError: model or tokenizer cannot be loaded, the architecture is not understood, or torch finds no
                compiler.
        """
        # Before the tokenizer: whoever names a GGUF folder must hear about the GGUF first.
        models.resolve_source(source, gguf_file)
        if tokenizer is None:
            loaded_tokenizer = models.load_tokenizer(source, gguf_file, trust_remote_code)
        else:
            loaded_tokenizer = models.load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        model = models.load_model(source, gguf_file, dtype, device, trust_remote_code, device_map, tensor_parallel)
        teacher = cls(model, loaded_tokenizer, models.model_identity(source, gguf_file))
        if compile:
            check_compiler(teacher.device)
            teacher._compiled = CompiledBody(teacher._body)
        return teacher

    def identity(self) -> dict[str, Any]:
        """What determines the teacher's numbers, ready for JSON: model files, dtype, attention and versions.

        `compiled` is there where compiling was asked for: it changes the numbers' last bits.
        """
        return {
            **self._model_identity,
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
            **({} if self._compiled is None else {"compiled": True}),
            "attention": str(getattr(self._config, "_attn_implementation", None)),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def check_block_length(self, block_length: int) -> None:
        """Raise UsageError if blocks of `block_length` tokens do not fit into the teacher's context."""
        models.ModelShape.of_config(self.model.config).check_block_length(block_length)

    def check_selections(self, selections: Sequence[Selection]) -> None:
        """Nothing to check: every selection can be made of whole distributions."""

    def expect_batches(self, blocks: int) -> None:
        """Batches of so many blocks are run compiled from now on, if `load` was told to; others never are."""
        if self._compiled is not None:
            self._compiled.expect(blocks)

    @torch.inference_mode()
    def hidden(self, tokens: NDArray[np.integer[Any]] | torch.Tensor) -> torch.Tensor:
        """Last hidden states [B * L, D], row-major, in the model's dtype, of blocks [B, L] of token ids.

        Padding may only end a block: attention is causal, so it changes nothing before it.

        Raises:
            ModelError: an id that the model does not embed; the message gives its block and position.
        """
        ids = torch.from_numpy(np.array(tokens, dtype=np.int64)) if isinstance(tokens, np.ndarray) else tokens.long()
        self._check_ids(ids)
        hidden = (self._compiled or self._body)(ids.to(self._input_device))
        return hidden.reshape(-1, hidden.shape[-1]).to(self.device)

    @torch.inference_mode()
    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, V] of hidden states [n, D]; keep n to what `row_slices` gives."""
        return self.finish(self.product(hidden_rows))

    def product(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, D] times the head, [n, V] in its dtype; `finish` makes logits of it, or of some rows."""
        return models.head_product(hidden_rows, self.head)

    def finish(self, product_rows: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, V] of rows of `product`."""
        return models.finish_logits(product_rows, self.head)

    def row_slices(self, n_rows: int, budget_bytes: int | None = None) -> Iterator[slice]:
        """Slices that cover `n_rows` rows; the float32 logits of each take at most `budget_bytes`, or 16 rows.

        Args:
            budget_bytes: by default 32 MiB on CPU, 1 GiB on CUDA.
        """
        if budget_bytes is None:
            budget_bytes = _CPU_LOGITS_BYTES if self.device.type == "cpu" else _CUDA_LOGITS_BYTES
        rows = max(_LEAST_ROWS, budget_bytes // (self.vocab_size * 4))
        for start in range(0, n_rows, rows):
            yield slice(start, min(start + rows, n_rows))

    def _body(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return models.body_hidden(self.model, ids_BL)

    def _check_ids(self, ids: torch.Tensor) -> None:
        wrong = (ids < 0) | (ids >= self._embedded)
        if bool(wrong.any()):
            block, position = (int(index) for index in wrong.nonzero()[0])
            raise ModelError(
                f"token id {int(ids[block, position])} at block {block} of this batch, position {position}, is outside "
                f"the teacher's {self._embedded} embeddings; use the tokenizer that belongs to the teacher"
            )
