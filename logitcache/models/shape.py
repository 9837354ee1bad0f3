"""What a model's config alone says of its size: read without its weights, which may not even be here yet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from logitcache.errors import UsageError
from logitcache.models.loading import quiet, resolve_source

_CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model; None is what its config does not say.

    Args:
        vocab_size: ids of its distributions.
        context: most tokens it takes at once.
    """

    vocab_size: int | None = None
    context: int | None = None

    @classmethod
    def of_config(cls, config: Any) -> ModelShape:
        """Of a transformers config; of one for text and more, its part for text."""
        text = config.get_text_config()
        contexts = filter(None, (_size(text, field) for field in _CONTEXT_FIELDS))
        return cls(_size(text, "vocab_size"), min(contexts, default=None))

    @classmethod
    def read(cls, source: str | Path, gguf_file: str | None = None, trust_remote_code: bool = False) -> ModelShape:
        """Of a local folder or hub id, of which no weights are fetched; nothing is known of what cannot be read so.

        A GGUF file holds its config beside the weights, and the fields of a model with code of its own mean what that
        code says: both tell only when they are loaded.

        Raises:
            ModelError: no such folder or hub model.
        """
        if gguf_file is not None:
            return cls()
        folder = resolve_source(source, weights=False)
        try:
            if trust_remote_code and "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
                return cls()
            with quiet():
                return cls.of_config(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
        except Exception:
            # Loading says what is wrong with it, and more of it.
            return cls()

    def check_block_length(self, block_length: int) -> None:
        """Raise UsageError if blocks of `block_length` tokens do not fit into the context."""
        if self.context is not None and block_length > self.context:
            raise UsageError(
                f"blocks of {block_length} tokens are longer than the teacher's context of {self.context}; "
                f"choose a block length of at most {self.context}"
            )


def _size(config: Any, field: str) -> int | None:
    value = getattr(config, field, None)
    return value if isinstance(value, int) and value > 0 else None
