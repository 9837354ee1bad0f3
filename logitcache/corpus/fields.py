"""CorpusFields: which fields of a record hold its text, its prompt and completion, its messages or its token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from logitcache.errors import UsageError

Kind = Literal["text", "completions", "messages", "ids"]


@dataclass(frozen=True)
class CorpusFields:
    """What records of JSONL, Parquet and Arrow files hold. It is said, never guessed from the names of fields.

    Args:
        text: a document's text; "text" where no field of another kind is given.
        prompt, completion: a prompt, and the text after it, which alone is to be learnt.
        messages: a conversation, a list of `{"role", "content"}`; what the assistant says is to be learnt.
        ids: token ids.
        mask: beside `ids`, a list of as many 0 or 1: whether the token is to be learnt.

    Raises:
        UsageError: fields of several kinds, or one without the other it needs.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    ids: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise UsageError("a prompt field and a completion field need each other; give both")
        if self.mask is not None and self.ids is None:
            raise UsageError("a mask field says which token ids are to be learnt; give an ids field, too")
        if sum(name is not None for name in (self.text, self.prompt, self.messages, self.ids)) > 1:
            raise UsageError(
                "records hold a text, prompts and completions, messages or token ids; give fields of one kind"
            )

    @property
    def kind(self) -> Kind:
        """What is read."""
        if self.prompt is not None:
            return "completions"
        if self.messages is not None:
            return "messages"
        return "text" if self.ids is None else "ids"

    @property
    def masked(self) -> bool:
        """Whether only some tokens are to be learnt."""
        return self.kind in ("completions", "messages") or self.mask is not None

    @property
    def names(self) -> dict[str, str]:
        """The fields that are read, by what they hold."""
        if self.kind == "text":
            return {"text": self.text or "text"}
        roles = {
            "completions": ("prompt", "completion"),
            "messages": ("messages",),
            "ids": ("ids", "mask"),
        }
        return {role: getattr(self, role) for role in roles[self.kind] if getattr(self, role) is not None}

    def to_dict(self) -> dict[str, Any]:
        """`{"text_field": name}` and the like, of the fields that are read: ready for JSON."""
        return {f"{role}_field": name for role, name in self.names.items()}
