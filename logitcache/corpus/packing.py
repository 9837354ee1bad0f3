"""Documents -> blocks: tokenise in batches, insert BOS and EOS, write one stream, view it as rows.

Legend: B blocks, L tokens in a block.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from logitcache.corpus.documents import Document, cut_pieces
from logitcache.corpus.policy import PackingPolicy
from logitcache.errors import CorpusError, EmptyCorpusError, UsageError

Progress = Callable[[int], None]
Tokens = NDArray[np.int32]
_BATCH_PIECES = 1024
# The tokenizer's result takes some 100 bytes a token until it is packed: a quarter of a million characters is 10 MB.
_BATCH_CHARACTERS = 1 << 18
_STORED = np.dtype("<i4")


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """A packed corpus.

    Args:
        tokens: int32 [B, L], in memory or mapped from a file; row-major position b * L + t is real iff it is below
            `num_tokens`, and holds the policy's pad id otherwise (only at the end of the last block).
        num_tokens: real tokens, BOS and EOS included.
        documents: documents packed, the last one perhaps in part.
        empty_documents: documents without any visible character or token, left out.
        sha256: hash of the real tokens as little-endian uint32, then num_tokens and block_length as uint64.
    """

    tokens: Tokens
    num_tokens: int
    documents: int
    empty_documents: int
    sha256: str

    @property
    def num_blocks(self) -> int:
        """B."""
        return int(self.tokens.shape[0])

    @property
    def block_length(self) -> int:
        """L."""
        return int(self.tokens.shape[1])


def pack(
    tokenizer: Any,
    documents: Iterable[Document],
    policy: PackingPolicy,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Pack `documents` into blocks held in memory (4 bytes a token).

    Texts are tokenised without special tokens, about a quarter of a million characters at a time. A document of over
    1,000,000 characters is cut before tokenising, behind the last newline that fits, so that memory stays bounded;
    a token that would have spanned such a cut becomes two. The cut does not start a new document.

    Args:
        tokenizer: a transformers tokenizer.
        documents: from `iter_documents`.
        policy: from `resolve_policy`.
        max_tokens: stop at exactly so many stored tokens (BOS and EOS included) if the corpus has as many.
        progress: called with the number of tokens so far, after every batch.

    Raises:
        CorpusError: the documents hold no token at all.
        UsageError: `max_tokens` under 1.
    """
    with io.BytesIO() as stream:
        packer = _pack_stream(tokenizer, documents, policy, max_tokens, progress, stream)
        return packer.blocks(np.frombuffer(stream.getvalue(), dtype=_STORED))


def pack_to_file(
    tokenizer: Any,
    documents: Iterable[Document],
    policy: PackingPolicy,
    path: str | os.PathLike[str],
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """As `pack`, but the tokens go to the file `path` (int32, little-endian) and come back as a memory map.

    The file appears, whole, only at the end. Memory does not grow with the corpus.

    Raises:
        CorpusError: as `pack`, or the file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as stream:
            packer = _pack_stream(tokenizer, documents, policy, max_tokens, progress, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
        return packer.blocks(np.memmap(target, dtype=_STORED, mode="r"))
    except OSError as error:
        # What `iter_documents` cannot read is a CorpusError by now, so this is about the file written here.
        reason = error.strerror or str(error)
        raise CorpusError(
            f"the packed tokens cannot be written to {target} ({reason}); "
            "check the folder and its free space (4 bytes a token)"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _pack_stream(
    tokenizer: Any,
    documents: Iterable[Document],
    policy: PackingPolicy,
    max_tokens: int | None,
    progress: Progress | None,
    stream: BinaryIO,
) -> _Packer:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"the largest number of tokens is {max_tokens}; give at least 1, or nothing for no limit")
    packer = _Packer(policy, stream, max_tokens)
    for batch in _batches(documents):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            packer.add(document, ids)
        if progress is not None:
            progress(packer.num_tokens)
        if packer.full:
            break
    packer.finish()
    return packer


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Pieces in order, about a quarter of a million characters at a time."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        for text, cut in cut_pieces([document.text]):
            batch.append(Document(text, document.file, document.index, cut or document.continued))
            characters += len(text)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


class _Packer:
    """Appends documents to the stream of tokens, keeping counts and hash."""

    def __init__(self, policy: PackingPolicy, stream: BinaryIO, max_tokens: int | None) -> None:
        self.policy, self.stream, self.max_tokens = policy, stream, max_tokens
        self.num_tokens = self.documents = self.empty_documents = 0
        self.hash = hashlib.sha256()
        self.open_document = False

    @property
    def full(self) -> bool:
        return self.num_tokens == self.max_tokens

    def add(self, document: Document, ids: list[int]) -> None:
        """Append one piece of a document; a document begins with its first piece that has visible tokens."""
        if self.full:
            return
        begins = not self.open_document and bool(ids) and not document.text.isspace()
        if begins:
            self.documents += 1
            self.open_document = True
            if self.policy.bos == "document":
                self._append([self.policy.bos_id])
        if self.open_document:
            self._append(ids)
        if not document.continued:
            self._end()

    def _end(self) -> None:
        if not self.open_document:
            self.empty_documents += 1
        elif self.policy.eos == "document":
            self._append([self.policy.eos_id])
        self.open_document = False

    def _append(self, ids: Iterable[int | None]) -> None:
        array = np.asarray(ids, dtype=_STORED)
        if self.policy.bos == "block":
            array = self._with_block_starts(array)
        if self.max_tokens is not None:
            array = array[: self.max_tokens - self.num_tokens]
        self.num_tokens += array.size
        data = array.tobytes()
        self.hash.update(data)
        self.stream.write(data)

    def _with_block_starts(self, array: Tokens) -> Tokens:
        """Insert BOS before every token that would otherwise be the first of a block."""
        length = self.policy.block_length
        used = self.num_tokens % length
        # The block under way takes length - used tokens (none if it is full); each later one takes length - 1.
        first = length - used if used else 0
        return np.insert(array, np.arange(first, array.size, length - 1), self.policy.bos_id or 0)

    def finish(self) -> None:
        """Pad the last block and complete the hash."""
        if not self.num_tokens:
            raise EmptyCorpusError(
                f"the corpus is empty: {self.empty_documents} documents, none of which holds any text; "
                "check the files and the text field"
            )
        missing = -self.num_tokens % self.policy.block_length
        self.stream.write(np.full(missing, self.policy.pad_id, dtype=_STORED).tobytes())
        self.hash.update(np.array([self.num_tokens, self.policy.block_length], dtype="<u8").tobytes())

    def blocks(self, stored: NDArray[np.int32]) -> TokenBlocks:
        """The stream, read back from where it was written, as rows."""
        return TokenBlocks(
            tokens=stored.reshape(-1, self.policy.block_length),
            num_tokens=self.num_tokens,
            documents=self.documents,
            empty_documents=self.empty_documents,
            sha256=self.hash.hexdigest(),
        )
