"""Conversations through chat templates: what the assistant says is learnt, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.corpus import ChatTemplate, CorpusFields, encode_corpus, expand_paths
from logitcache.errors import CorpusError, UsageError
from tests.corpus.files import KINDS, write_records
from tests.tiny import tiny_tokenizer

# The forms of real models' templates: ChatML with a system message of its own, and one that strips what came earlier.
CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}[system]Be kind.[end]\n{% endif %}"
    "{{ '[' + message.role + ']' + message.content + '[end]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}[system]Be kind.[end]\n{% endif %}"
    "{{ '[' + message.role + ']' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}[end]\n"
    "{% endgeneration %}{% else %}{{ message.content + '[end]\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.role == 'assistant' and not loop.last %}...{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with the user.') }}{% endif %}" + CHATML
TALK = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "\nAnd then?"},
    {"role": "assistant", "content": "\n\nTwo, three."},
]


def template(source: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = source
    return ChatTemplate.of(tokenizer)


def learnt_text(chat: ChatTemplate, messages: list[dict[str, Any]]) -> list[str]:
    """The text of each run of tokens that are to be learnt."""
    ids, learnt = chat.encode(messages, "here")
    edges = np.flatnonzero(np.diff(np.pad(learnt.astype(int), 1)))
    assert "".join(chat.tokenizer.decode([token]) for token in ids) == chat.tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    return [chat.tokenizer.decode(ids[start:stop]) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_what_the_assistant_says_is_learnt(source: str) -> None:
    """With `{% generation %}` and without; BOS is not put before what the template writes."""
    chat = template(source)
    assert learnt_text(chat, TALK) == ["One.[end]\n", "\n\nTwo, three.[end]\n"]
    assert learnt_text(chat, [{"role": "system", "content": "Hi"}, *TALK[:2]]) == ["One.[end]\n"]
    assert learnt_text(chat, [*TALK[:1], TALK[1], TALK[1]])
    ids, _ = chat.encode(TALK, "here")
    assert chat.tokenizer.bos_token_id not in ids
    assert chat.sha256 == hashlib.sha256(source.encode()).hexdigest()


def test_both_ways_agree() -> None:
    for messages in (TALK, TALK[:2], [{"role": "system", "content": "x"}, *TALK]):
        (one, mine), (other, theirs) = (template(source).encode(messages, "here") for source in (CHATML, MARKED))
        assert one == other
        np.testing.assert_array_equal(mine, theirs)


def test_a_template_that_rewrites_what_came_earlier() -> None:
    chat = template(FORGETFUL)
    assert learnt_text(chat, TALK[:2]) == ["One."]
    with pytest.raises(CorpusError, match=r"^here: the chat template does not write the first 2 messages as the begin"):
        chat.encode(TALK, "here")


REFUSED: list[tuple[str, list[dict[str, Any]], str]] = [
    (
        CHATML,
        TALK[:1],
        "here has no message of the role 'assistant', only of 'user', so nothing to learn; leave it out",
    ),
    (CHATML, TALK[1:], "here begins with the assistant's message, which nothing prompts; leave it out"),
    (STRICT, TALK[1:], r"here: the chat template refuses the conversation \(Begin with the user\); repair it"),
    (CHATML, [TALK[0], {"role": "assistant", "content": "\ud800"}], "here holds half a surrogate pair at character"),
    (CHATML, [TALK[0], {"role": "assistant", "content": 3}], "here: the chat template refuses the conversation"),
    (MARKED.replace("'assistant' %}{% gen", "'nobody' %}{% gen"), TALK, "here gives no token that the assistant says"),
]


@pytest.mark.parametrize(("source", "messages", "message"), REFUSED)
def test_conversations_that_are_refused(source: str, messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CorpusError, match=f"^{message}"):
        template(source).encode(messages, "here")


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(UsageError, match="the teacher's tokenizer has no chat template"):
        ChatTemplate.of(tiny_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_conversations(tmp_path: Path, kind: str) -> None:
    path = write_records(tmp_path, kind, [{"chat": TALK}, {"chat": TALK[:2]}])
    chat = template(CHATML)
    fields = CorpusFields(messages="chat")
    found = [one for batch in encode_corpus(chat.tokenizer, expand_paths([path]), fields, 300) for one in batch]
    for document, messages in zip(found, (TALK, TALK[:2]), strict=True):
        ids, learnt = chat.encode(messages, "here")
        assert list(document.ids) == ids
        np.testing.assert_array_equal(document.learnt, learnt)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "has a field 'chat' that is a string, not a list of messages"),
        ([], "has a field 'chat' that is empty, not a list of messages"),
        ([TALK[0], "x"], "has a message 1 in field 'chat' that is no object with a role; repair the record"),
        ([{"from": "gpt", "value": "x"}], "has a message 0 in field 'chat' that is no object with a role"),
        ([{"role": "user"}, *TALK], "has a message 0 in field 'chat' that has no content; repair the record"),
        (TALK[:1], "has no message of the role 'assistant', only of 'user', so nothing to learn; leave it out"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, value: Any, message: str) -> None:
    path = write_records(tmp_path, "jsonl", [{"chat": TALK}, {"chat": value}])
    with pytest.raises(CorpusError, match=rf"^{path}:2 {message}"):
        list(encode_corpus(template(CHATML).tokenizer, expand_paths([path]), CorpusFields(messages="chat"), 300))
