"""What the first records of a corpus show without a tokenizer: fields of another kind, damage, no text at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from logitcache.corpus.chat import check_roles
from logitcache.corpus.encoding import ids_of
from logitcache.corpus.fields import CorpusFields
from logitcache.corpus.packing import empty_corpus
from logitcache.corpus.readers import iter_documents
from logitcache.corpus.records import Record, iter_records
from logitcache.corpus.sources import CorpusFile


def check_beginning(files: Sequence[CorpusFile], fields: CorpusFields, vocab_size: int | None = None) -> None:
    """Read a corpus up to the first record with something in it, and refuse what `encode_corpus` would refuse there.

    Args:
        fields: what is in a record.
        vocab_size: token ids must be below it; None where that is not known yet.

    Raises:
        CorpusError: a file cannot be read, or a record does not hold what it should; the message gives its place.
        EmptyCorpusError: there is no such record.
    """
    empty = 0
    for visible, continued in _records(files, fields, vocab_size):
        if visible:
            return
        empty += not continued
    raise empty_corpus(empty)


def _records(files: Sequence[CorpusFile], fields: CorpusFields, vocab_size: int | None) -> Iterator[tuple[bool, bool]]:
    """Of each record, or piece of a long text, whether anything is in it, and whether the next is more of the same."""
    if fields.kind == "text":
        for document in iter_documents(files, fields.names["text"]):
            yield _visible(document.text), document.continued
    else:
        for record in iter_records(files, fields.names):
            yield _holds_something(record, fields, vocab_size), False


def _holds_something(record: Record, fields: CorpusFields, vocab_size: int | None) -> bool:
    if fields.kind == "completions":
        return _visible(record.text("prompt") + record.text("completion"))
    if fields.kind == "messages":
        check_roles(record.messages(), record.place)
        return True
    return ids_of(record, vocab_size).visible


def _visible(text: str) -> bool:
    return bool(text) and not text.isspace()
