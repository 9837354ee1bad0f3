"""PackingPolicy: block length and where BOS and EOS go."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from logitcache.errors import UsageError

BOS_CHOICES = ("none", "document", "block")
EOS_CHOICES = ("none", "document")


@dataclass(frozen=True)
class PackingPolicy:
    """How documents become blocks; everything that, with corpus and tokenizer, determines the token stream.

    Args:
        block_length: tokens in a block, at least 2.
        bos: "none", "document" (before each document) or "block" (first in each block, and only there).
        bos_id: the tokenizer's BOS id, None where it has none.
        eos: "none" or "document" (after each document).
        eos_id: the tokenizer's EOS id, None where it has none.

    Raises:
        UsageError: a value is out of range, or an id that the policy inserts is None.
    """

    block_length: int
    bos: str = "none"
    bos_id: int | None = None
    eos: str = "none"
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if self.block_length < 2:
            raise UsageError(
                f"a block of {self.block_length} token has no next token; choose a block length of at least 2"
            )
        for name, choice, choices, token_id in (
            ("bos", self.bos, BOS_CHOICES, self.bos_id),
            ("eos", self.eos, EOS_CHOICES, self.eos_id),
        ):
            if choice not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)} or auto, not {choice!r}")
            if choice != "none" and token_id is None:
                raise UsageError(
                    f"{name}={choice!r} was asked for, but the tokenizer has no {name.upper()} token; "
                    f"choose {name}='none' or another tokenizer"
                )

    @property
    def pad_id(self) -> int:
        """The id that fills the end of the last block: EOS, else BOS, else 0."""
        if self.eos_id is not None:
            return self.eos_id
        return self.bos_id if self.bos_id is not None else 0

    def to_dict(self) -> dict[str, str | int | None]:
        """The fields, ready for JSON."""
        return asdict(self)


def resolve_policy(tokenizer: Any, block_length: int, bos: str = "auto", eos: str = "auto") -> PackingPolicy:
    """The policy for this tokenizer.

    `bos="auto"`: "document" if the tokenizer itself puts BOS before a text, else "none". `eos="auto"`: "document" if
    the tokenizer has an EOS token, else "none".

    Raises:
        UsageError: an unknown choice, one the tokenizer cannot serve, or a block length under 2.
    """
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos == "auto":
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        bos = "document" if bos_id is not None and first == [bos_id] else "none"
    if eos == "auto":
        eos = "document" if eos_id is not None else "none"
    return PackingPolicy(block_length, bos, bos_id, eos, eos_id)
