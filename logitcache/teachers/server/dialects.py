"""How servers are asked for the log-probabilities of a prompt's tokens, and how they answer.

Each dialect sends token ids, so that nothing is tokenised again, and reads token ids, never text: different tokens may
have one text. One token is generated and ignored, because servers do not take 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from logitcache.teachers.server.answers import AnswerError, PromptLogprobs

TOKEN_PREFIX = "token_id:"


class Dialect(Protocol):
    """One way to ask."""

    name: str
    described: str

    def address(self, base: str) -> str:
        """The URL to post to, of the server's base URL."""

    def question(self, model: str, prompt: Sequence[int], entries: int, text: bool) -> dict[str, Any]:
        """What to post: ids of a prompt, how many entries are wanted of each position, and whether their text is."""

    def read(self, answer: Any, prompt: Sequence[int], entries: int, vocab_size: int) -> PromptLogprobs:
        """The answer to `question`. Raises AnswerError; KeyError, TypeError and the like if it has another form."""


class VllmDialect:
    """vLLM's own field `prompt_logprobs` of /v1/completions: ids as keys of JSON objects, with their text and rank."""

    name = "vllm"
    described = "with vLLM's prompt_logprobs"

    def address(self, base: str) -> str:
        return f"{base}/completions"

    def question(self, model: str, prompt: Sequence[int], entries: int, text: bool) -> dict[str, Any]:
        return {**_request(model, prompt), "prompt_logprobs": entries}

    def read(self, answer: Any, prompt: Sequence[int], entries: int, vocab_size: int) -> PromptLogprobs:
        told = answer["choices"][0].get("prompt_logprobs")
        if told is None:
            raise AnswerError("says nothing of the prompt")
        # Before the first token there is nothing to predict it from.
        rows = [_present(row, position) for position, row in enumerate(told[1:])]
        values = [{int(number): entry["logprob"] for number, entry in row.items()} for row in rows]
        found = PromptLogprobs.of(values, prompt, entries, vocab_size)
        texts = [row[str(token)].get("decoded_token") for row, token in zip(rows, prompt[1:], strict=True)]
        return found if None in texts else replace(found, text="".join(texts))


class EchoDialect:
    """OpenAI's `echo` with `logprobs`, tokens named `token_id:7` as vLLM does when asked to.

    For gateways that pass on only the fields that OpenAI had.
    """

    name = "echo"
    described = "with OpenAI's echo and logprobs"

    def address(self, base: str) -> str:
        return f"{base}/completions"

    def question(self, model: str, prompt: Sequence[int], entries: int, text: bool) -> dict[str, Any]:
        return {**_request(model, prompt), "echo": True, "logprobs": entries, "return_tokens_as_token_ids": True}

    def read(self, answer: Any, prompt: Sequence[int], entries: int, vocab_size: int) -> PromptLogprobs:
        choice = answer["choices"][0]
        told = choice["logprobs"] or {}
        if len(told.get("tokens", ())) < len(prompt):
            raise AnswerError("says nothing of the prompt")
        names = told["tokens"][: len(prompt)]
        if not all(name.startswith(TOKEN_PREFIX) for name in names):
            raise AnswerError("names tokens by their text, and different tokens may have the same")
        if [_id_of(name) for name in names] != list(prompt):
            raise AnswerError("echoes other tokens than were sent")
        rows = [_present(row, position) for position, row in enumerate(told["top_logprobs"][1 : len(prompt)])]
        values = [{_id_of(name): value for name, value in row.items()} for row in rows]
        for position, row in enumerate(values):
            # Not every server repeats the token that was sent among the others.
            row.setdefault(prompt[position + 1], told["token_logprobs"][position + 1])
        return replace(PromptLogprobs.of(values, prompt, entries, vocab_size), text=choice["text"])


class SglangDialect:
    """SGLang's own /generate beside the OpenAI-style API, which names tokens by their text: lists of (log p, id, text).

    It is asked from the first token on (`logprob_start_len`), which also keeps its cache of prefixes out.
    """

    name = "sglang"
    described = "with SGLang's /generate"

    def address(self, base: str) -> str:
        return f"{base.removesuffix('/v1')}/generate"

    def question(self, model: str, prompt: Sequence[int], entries: int, text: bool) -> dict[str, Any]:
        return {
            "input_ids": list(prompt),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": entries,
            "return_text_in_logprobs": text,
        }

    def read(self, answer: Any, prompt: Sequence[int], entries: int, vocab_size: int) -> PromptLogprobs:
        told = answer["meta_info"]
        tokens = told["input_token_logprobs"][1:]
        if [number for _, number, _ in tokens] != list(prompt[1:]):
            raise AnswerError("tells of other tokens than were sent")
        rows = [_present(row, position) for position, row in enumerate(told["input_top_logprobs"][1:])]
        values = [{number: value for value, number, _ in row} for row in rows]
        for row, (value, number, _) in zip(values, tokens, strict=True):
            row.setdefault(number, value)
        found = PromptLogprobs.of(values, prompt, entries, vocab_size)
        texts = [text for _, _, text in tokens]
        return found if None in texts else replace(found, text="".join(texts))


def _request(model: str, prompt: Sequence[int]) -> dict[str, Any]:
    # At a temperature of 1 the log-probabilities are the model's own, even where a server tells what it samples from.
    return {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 1.0}


def _present(row: Any, position: int) -> Any:
    if row is None:
        raise AnswerError("leaves a position out, as caches of prefixes do", position)
    return row


def _id_of(name: str) -> int:
    return int(name.removeprefix(TOKEN_PREFIX))


DIALECTS: tuple[Dialect, ...] = (VllmDialect(), EchoDialect(), SglangDialect())
