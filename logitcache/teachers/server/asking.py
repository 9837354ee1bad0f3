"""Questions in one dialect, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logitcache.teachers.server.answers import AnswerError, PromptLogprobs
from logitcache.teachers.server.client import Client
from logitcache.teachers.server.dialects import Dialect


@dataclass(frozen=True)
class Asking:
    """Asks one model of a server in one dialect.

    Args:
        client: asks the server.
        dialect: how.
        model: its name at the server.
        vocab_size: V; every id must be below it.
    """

    client: Client
    dialect: Dialect
    model: str
    vocab_size: int

    def ask(
        self,
        prompts: Sequence[list[int]],
        entries: int,
        attempts: int | None = None,
        text: bool = False,
        known: bool = True,
    ) -> list[PromptLogprobs]:
        """The `entries` most probable ids after each token but the last of each prompt.

        Args:
            prompts: lists of ids.
            entries: K.
            attempts: how often each is asked; by default as the client's options say.
            text: whether the server's reading of the tokens is wanted, too.
            known: whether every row must be, or some may be null or NaN.

        Raises:
            RefusedError: the server says no.
            AnswerError: it says what cannot be used; `prompt` is the number of the prompt.
            ModelError: as `Client.post_all`.
        """
        questions = [self.dialect.question(self.model, prompt, entries, text) for prompt in prompts]

        def read(number: int, answer: Any) -> PromptLogprobs:
            try:
                found = self.dialect.read(answer, prompts[number], entries, self.vocab_size)
                if known:
                    found.check_known()
                return found
            except AnswerError as error:
                error.prompt = number
                raise
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise AnswerError("answers in another form", prompt=number) from error

        return self.client.post_all(self.dialect.address(self.client.base), questions, read, attempts)
