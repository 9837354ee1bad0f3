"""Texts, prompts with completions, conversations and token ids -> documents of tokens, with what is to be learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.corpus.chat import ChatTemplate
from logitcache.corpus.documents import Document, cut_pieces
from logitcache.corpus.fields import CorpusFields
from logitcache.corpus.readers import iter_documents
from logitcache.corpus.records import Record, iter_records
from logitcache.corpus.sources import CorpusFile
from logitcache.corpus.tokens import common_beginning, token_ids
from logitcache.errors import CorpusError

_BATCH_PIECES = 1024
# The tokenizer's result takes some 100 bytes a token until it is packed: a quarter of a million characters is 10 MB.
_BATCH_CHARACTERS = 1 << 18
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokens of a document, or of a piece of a long one.

    Args:
        ids: token ids.
        learnt: bool [len(ids)], whether each is one to learn; or one bool for all of them.
        visible: whether anything is in it; a document of nothing visible is left out.
        continued: the next one holds more of the same document.
        own_specials: it may begin with BOS or end with EOS already; neither is then added again.
    """

    ids: Sequence[int] | NDArray[Any]
    learnt: bool | NDArray[np.bool_] = True
    visible: bool = True
    continued: bool = False
    own_specials: bool = False

    def begins_with(self, token: int | None) -> bool:
        """Whether a special token that would be put before it is there."""
        return self.own_specials and len(self.ids) > 0 and self.ids[0] == token

    def ends_with(self, token: int | None) -> bool:
        """Whether a special token that would be put after it is there."""
        return self.own_specials and len(self.ids) > 0 and self.ids[-1] == token

    @property
    def last_learnt(self) -> bool:
        """Whether its last token is to be learnt, and so the EOS after it."""
        return bool(self.learnt[-1]) if isinstance(self.learnt, np.ndarray) and self.learnt.size else bool(self.learnt)


def encode_corpus(
    tokenizer: Any, files: Sequence[CorpusFile], fields: CorpusFields, vocab_size: int
) -> Iterator[list[Encoded]]:
    """Documents of `files` in batches.

    - text: as `iter_documents`, all of it to be learnt.
    - a prompt and a completion: one text, tokenised as one. The prompt's tokens are those it has by itself too; from
      the first that differs on, all are the completion's, so a token with characters of both is to be learnt.
    - messages: as the tokenizer's chat template writes them, see `ChatTemplate`.
    - ids: as they are. `mask` beside them, where it is given, says which are to be learnt.

    Args:
        tokenizer: a transformers tokenizer.
        fields: what is in a record.
        vocab_size: token ids must be below it.

    Raises:
        CorpusError: a file cannot be read, or a record does not hold what it should; the message gives its place.
    """
    if fields.kind == "text":
        return encode_texts(tokenizer, iter_documents(files, fields.names["text"]))
    records = iter_records(files, fields.names)
    if fields.kind == "completions":
        return _encode_completions(tokenizer, records)
    if fields.kind == "messages":
        template = ChatTemplate.of(tokenizer)
        conversations = (_from_template(template, record) for record in records)
        return _batches(conversations, lambda document: len(document.ids))
    return _batches((ids_of(record, vocab_size) for record in records), lambda document: len(document.ids))


def encode_texts(tokenizer: Any, documents: Iterable[Document]) -> Iterator[list[Encoded]]:
    """Texts in pieces, about a quarter of a million characters at a time."""
    pieces = (
        Document(text, document.file, document.index, cut or document.continued)
        for document in documents
        for text, cut in cut_pieces([document.text])
    )
    for batch in _batches(pieces, lambda piece: len(piece.text)):
        encoded = token_ids(tokenizer, [piece.text for piece in batch])
        yield [
            Encoded(ids, visible=bool(ids) and not piece.text.isspace(), continued=piece.continued)
            for piece, ids in zip(batch, encoded, strict=True)
        ]


def _encode_completions(tokenizer: Any, records: Iterable[Record]) -> Iterator[list[Encoded]]:
    pairs = ((record.text("prompt"), record.text("completion")) for record in records)
    for batch in _batches(pairs, lambda pair: len(pair[0]) + len(pair[1])):
        prompts = token_ids(tokenizer, [prompt for prompt, _ in batch])
        wholes = token_ids(tokenizer, [prompt + completion for prompt, completion in batch])
        encoded = []
        for (prompt, completion), prompt_ids, ids in zip(batch, prompts, wholes, strict=True):
            learnt = np.arange(len(ids)) >= common_beginning(prompt_ids, ids)
            visible = bool(ids) and not (prompt + completion).isspace()
            encoded.append(Encoded(ids, learnt, visible, own_specials=True))
        yield encoded


def _from_template(template: ChatTemplate, record: Record) -> Encoded:
    ids, learnt = template.encode(record.messages(), record.place)
    return Encoded(ids, learnt, own_specials=True)


def ids_of(record: Record, vocab_size: int | None) -> Encoded:
    """Token ids of a record. Raises CorpusError where it holds none, or, if that is known, none of `vocab_size`."""
    ids = record.integers("ids")
    if vocab_size is not None and (wrong := (ids < 0) | (ids >= vocab_size)).any():
        place = int(np.argmax(wrong))
        raise CorpusError(
            f"{record.place} holds token id {int(ids[place])} (number {place} of its list), but the teacher has "
            f"{vocab_size} ids; use token ids of the teacher's own tokenizer"
        )
    if "mask" not in record.names:
        return Encoded(ids, visible=bool(ids.size), own_specials=True)
    mask = record.integers("mask")
    if mask.shape != ids.shape or ((mask != 0) & (mask != 1)).any():
        raise CorpusError(
            f"{record.place} has a field {record.names['mask']!r} that is not 0 or 1 for each of {ids.size} token ids; "
            "choose another mask field or repair the record"
        )
    return Encoded(ids, mask.astype(np.bool_), bool(ids.size), own_specials=True)


def _batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in order, together of about a quarter of a million characters or tokens."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
