"""What a server is asked before the first block, so that what it cannot do is known before hours of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.errors import ModelError, UsageError
from logitcache.teachers.server.answers import AnswerError, PromptLogprobs, VocabularyError
from logitcache.teachers.server.asking import Asking
from logitcache.teachers.server.client import Client, FailingError, RefusedError
from logitcache.teachers.server.dialects import DIALECTS

# Tokens of the prompt that is asked about, and the ids among which they are looked for.
PROBE_TOKENS = 24
LOOKED_AT = 2000
# Of the most probable ids, between two answers to one question: what other company in a batch may change.
DRIFT_NATS = 0.25
ATTEMPTS = 3
# How servers say no to a question they do not know; a fault inside is one of the ways.
UNKNOWN_QUESTION = (500, 501)


@dataclass(frozen=True)
class Served:
    """A model as its server lists it.

    Args:
        name: under which it is asked.
        context: tokens of a prompt and its continuation together; None where the server does not say.
    """

    name: str
    context: int | None


def find_model(client: Client, wanted: str | None) -> Served:
    """The model to ask.

    Raises:
        UsageError: the server has several and none was chosen.
        ModelError: it has no such model, no list of models, or cannot be reached.
    """
    try:
        models = {str(entry["id"]): entry for entry in client.get(f"{client.base}/models", attempts=1)["data"]}
    except (RefusedError, LookupError, TypeError) as error:
        raise ModelError(
            f"{client.base}/models lists no models ({_short(error)}); give the address of an OpenAI-style API, which "
            "usually ends in /v1"
        ) from error
    if not models:
        raise ModelError(f"{client.base} serves no model; start it with one")
    names = ", ".join(list(models)[:10])
    if wanted is None and len(models) > 1:
        raise UsageError(f"{client.base} serves several models; choose one with --teacher-model: {names}")
    name = next(iter(models)) if wanted is None else wanted
    if name not in models:
        raise ModelError(f"{client.base} serves {names}, not {name}; choose with --teacher-model")
    context = models[name].get("max_model_len")
    return Served(name, context if isinstance(context, int) else None)


def find_dialect(client: Client, model: str, tokenizer: Any, vocab_size: int) -> Asking:
    """The first dialect in which the server tells of a prompt's tokens.

    Raises:
        ModelError: there is none, or the server's model has another tokenizer.
    """
    prompt, heard = probe_prompt(tokenizer), []
    for dialect in DIALECTS:
        asking = Asking(client, dialect, model, vocab_size)
        try:
            found = asking.ask([prompt], 1, ATTEMPTS, text=True)[0]
        except FailingError as error:
            if error.status not in UNKNOWN_QUESTION:
                raise
            heard.append(f"{dialect.described} it answers {error.status}")
        except (RefusedError, AnswerError) as error:
            if isinstance(error, VocabularyError) or "vocab" in str(error):
                raise ModelError(
                    f"the model of {client.base} has not the tokenizer's vocabulary: it {_short(error)}; give that "
                    "model's own tokenizer, with its config.json, as --tokenizer"
                ) from error
            heard.append(f"{dialect.described} it {_short(error)}")
        else:
            _check_text(client, tokenizer, prompt, found)
            return asking
    raise ModelError(
        f"{client.base} does not tell the log-probabilities of a prompt's tokens by their ids: {', '.join(heard)}; use "
        "a server that does, such as vLLM, or run the teacher here"
    )


def check_entries(asking: Asking, tokenizer: Any, entries: int) -> None:
    """Raise ModelError if the server does not tell `entries` log-probabilities a position, and twice the same."""
    prompt, base = probe_prompt(tokenizer), asking.client.base
    try:
        first = asking.ask([prompt], entries, ATTEMPTS)[0]
        if first.counts_the_sent:
            raise AnswerError("counts the token that was sent as one of them")
    except (RefusedError, AnswerError) as error:
        raise ModelError(
            f"{base} does not give {entries} log-probabilities a position: it {_short(error)}; let it give more (vLLM: "
            f"--max-logprobs {entries}), or --select fewer"
        ) from error
    try:
        again = asking.ask([prompt], entries, ATTEMPTS)[0]
    except (RefusedError, AnswerError) as error:
        raise ModelError(
            f"{base} answers once, but asked the same again it {_short(error)}; start it without a cache of prefixes "
            "(vLLM: --no-enable-prefix-caching)"
        ) from error
    drift = float(np.abs(first.logprobs[:, 0] - again.logprobs[:, 0]).max())
    if drift > DRIFT_NATS:
        raise ModelError(
            f"{base} gives one question answers that are {drift:.2f} nats apart; let a single model answer, without "
            "noise"
        )


def check_length(asking: Asking, tokenizer: Any, tokens: int) -> None:
    """Raise ModelError if the server does not take prompts of `tokens` tokens."""
    prompt = probe_prompt(tokenizer)
    whole = (prompt * (tokens // len(prompt) + 1))[:tokens]
    try:
        asking.ask([whole], 1, ATTEMPTS)
    except (RefusedError, AnswerError) as error:
        raise ModelError(
            f"{asking.client.base} does not take a block of {tokens - 1} tokens and what is asked with it: it "
            f"{_short(error)}; choose a smaller --block-length"
        ) from error


def probe_prompt(tokenizer: Any) -> list[int]:
    """Ids of plain letters from all over the vocabulary: what another tokenizer reads otherwise."""
    special = set(tokenizer.all_special_ids)
    plain = []
    for number in range(0, len(tokenizer), 1 + len(tokenizer) // LOOKED_AT):
        text = tokenizer.decode([number]).strip()
        if number not in special and text.isascii() and text.isalnum():
            plain.append(number)
    if len(plain) < 2:
        raise ModelError("the tokenizer has no ids of plain letters to try the server with; give the teacher's own")
    places = np.linspace(0, len(plain) - 1, min(PROBE_TOKENS, len(plain))).astype(int)
    return [plain[place] for place in places]


def _check_text(client: Client, tokenizer: Any, prompt: list[int], found: PromptLogprobs) -> None:
    mine = _letters("".join(tokenizer.decode([number]) for number in prompt[1:]))
    if found.text is not None and mine not in _letters(found.text):
        raise ModelError(
            f"the model of {client.base} reads other text from the tokenizer's ids ({_letters(found.text)[:40]!r} "
            f"instead of {mine[:40]!r}); give that model's own tokenizer with --tokenizer"
        )


def _letters(text: str) -> str:
    """Without spaces, which some tokenizers leave out when they decode single ids."""
    return "".join(text.split())


def _short(error: Exception) -> str:
    if isinstance(error, RefusedError):
        return f"answers {error}"
    return str(error) if isinstance(error, AnswerError) else f"answers in another form: {type(error).__name__}"
