"""Conversations -> tokens by the tokenizer's chat template, and which of them the assistant says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.corpus.records import encodable
from logitcache.corpus.tokens import common_beginning, token_ids
from logitcache.errors import CorpusError, UsageError

Messages = Sequence[dict[str, Any]]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template. Build it with `of`.

    What the assistant says is to be learnt. A template with `{% generation %}` marks it. Otherwise it is what the
    template adds to the conversation before an assistant's message, which ends with its prompt for one, to make the
    conversation with that message: the message itself and what the template writes after it, its end mark above all.

    Args:
        tokenizer: a transformers tokenizer.
        template: Jinja source.
    """

    tokenizer: Any
    template: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """The tokenizer's own. Raises UsageError when it has none."""
        try:
            return cls(tokenizer, str(tokenizer.get_chat_template()))
        except ValueError as error:
            raise UsageError(
                "the teacher's tokenizer has no chat template (or several and no default), so messages cannot be "
                "written; use a teacher that has one, or prompts and completions that are written already"
            ) from error

    @property
    def sha256(self) -> str:
        """Hash of the template."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def encode(self, messages: Messages, place: str) -> tuple[list[int], NDArray[np.bool_]]:
        """Token ids of a conversation and bool [tokens], which of them are to be learnt.

        Special tokens are those that the template writes, and no others.

        Raises:
            CorpusError: the assistant says nothing, the template refuses the conversation, or it cannot be told what
                of it the assistant says; the message begins with `place`.
        """
        check_roles(messages, place)
        ids, learnt = (self._marked if GENERATION.search(self.template) else self._compared)(messages, place)
        if not learnt.any():
            raise CorpusError(
                f"{place} gives no token that the assistant says, though it has a message; repair the chat template"
            )
        return ids, learnt

    def _marked(self, messages: Messages, place: str) -> tuple[list[int], NDArray[np.bool_]]:
        """By the template's own marks."""
        encoded = self._apply(messages, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=np.bool_)

    def _compared(self, messages: Messages, place: str) -> tuple[list[int], NDArray[np.bool_]]:
        """By comparing the conversation with its beginnings."""
        whole = encodable(self._apply(messages, place, tokenize=False), place)
        texts = [whole]
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                if not number:
                    raise CorpusError(
                        f"{place} begins with the assistant's message, which nothing prompts; leave it out"
                    )
                texts.append(self._beginning(whole, messages[:number], place, add_generation_prompt=True))
                texts.append(self._beginning(whole, messages[: number + 1], place))
        ids, *parts = token_ids(self.tokenizer, texts)
        learnt = np.zeros(len(ids), dtype=np.bool_)
        for before, after in zip(parts[::2], parts[1::2], strict=True):
            learnt[common_beginning(before, ids) : common_beginning(after, ids)] = True
        return ids, learnt

    def _beginning(self, whole: str, messages: Messages, place: str, **options: Any) -> str:
        text = str(self._apply(messages, place, tokenize=False, **options))
        if not whole.startswith(text):
            raise CorpusError(
                f"{place}: the chat template does not write the first {len(messages)} messages as the beginning of "
                "the whole conversation, so it cannot be told what the assistant says; use a template with "
                "{% generation %}, or records that end with the assistant's first message"
            )
        return text

    def _apply(self, messages: Messages, place: str, **options: Any) -> Any:
        # Whatever a template does, raising included, is Jinja's or its own.
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:
            what = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise CorpusError(f"{place}: the chat template refuses the conversation ({what}); repair it") from error


def check_roles(messages: Messages, place: str) -> None:
    """Raise CorpusError unless the assistant says something."""
    if all(message["role"] != ASSISTANT for message in messages):
        roles = ", ".join(repr(role) for role in sorted({message["role"] for message in messages}))
        raise CorpusError(
            f"{place} has no message of the role {ASSISTANT!r}, only of {roles}, so nothing to learn; leave it out"
        )
