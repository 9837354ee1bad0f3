"""Document: one text of a corpus, and the rule by which long texts are cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# A tokenizer needs many times the memory of its text; a piece of this many characters keeps that under some 200 MB.
PIECE_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Document:
    """One text of a corpus, or one piece of a long plain-text file.

    Args:
        text: the text; "" where the corpus holds a null or an empty record.
        file: path of the file it came from.
        index: number of the document within its file, from 0.
        continued: the next Document holds more of the same text.
    """

    text: str
    file: str
    index: int
    continued: bool = False


def cut_pieces(chunks: Iterable[str], limit: int = PIECE_CHARACTERS) -> Iterator[tuple[str, bool]]:
    """Cut one text, which arrives in `chunks`, into pieces of at most `limit` characters.

    Each piece ends behind the last newline that fits, or after exactly `limit` characters where there is none.
    The pieces depend on the text alone, not on how it was chunked. Yields (piece, more pieces follow);
    an empty text is one empty piece.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > limit:
            newline = held.rfind("\n", start, start + limit)
            stop = newline + 1 if newline >= 0 else start + limit
            yield held[start:stop], True
            start = stop
        held = held[start:]
    yield held, False
