"""Documents -> blocks: insert BOS and EOS, write one stream of tokens and one of their mask, view them as rows.

Legend: B blocks, L tokens in a block.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from logitcache.corpus.documents import Document
from logitcache.corpus.encoding import Encoded, encode_texts
from logitcache.corpus.policy import PackingPolicy
from logitcache.errors import CorpusError, EmptyCorpusError, UsageError, counted

Progress = Callable[[int], None]
Tokens = NDArray[np.int32]
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
        learnt: bool [B, L], whether the token is one to learn, False for padding; None where all are.
        learnt_tokens: how many are.
        mask_sha256: hash of a byte, 0 or 1, for each real token; None without a mask.
    """

    tokens: Tokens
    num_tokens: int
    documents: int
    empty_documents: int
    sha256: str
    learnt: NDArray[np.bool_] | None
    learnt_tokens: int
    mask_sha256: str | None

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
    return pack_encoded(encode_texts(tokenizer, documents), policy, False, max_tokens, progress)


def pack_encoded(
    batches: Iterable[list[Encoded]],
    policy: PackingPolicy,
    masked: bool,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """As `pack`, for documents that are tokens already; with `masked`, what is to be learnt of them is kept, too."""
    with io.BytesIO() as stream, io.BytesIO() as mask:
        packer = _pack_stream(batches, policy, max_tokens, progress, stream, mask if masked else None)
        learnt = np.frombuffer(mask.getvalue(), dtype=np.bool_) if masked else None
        return packer.blocks(np.frombuffer(stream.getvalue(), dtype=_STORED), learnt)


def pack_encoded_to_file(
    batches: Iterable[list[Encoded]],
    policy: PackingPolicy,
    path: str | os.PathLike[str],
    mask_path: str | os.PathLike[str] | None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """As `pack_encoded`, but the tokens go to the file `path` (int32, little-endian) and come back as a memory map.

    What is to be learnt of them goes to `mask_path`, if that is given: one byte for each position. The files appear,
    whole, only at the end. Memory does not grow with the corpus.

    Raises:
        CorpusError: as `pack`, or a file cannot be written.
    """
    targets = [Path(path)] if mask_path is None else [Path(path), Path(mask_path)]
    # A name that no process of another machine may have, either.
    partial = [target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp") for target in targets]
    try:
        with ExitStack() as stack:
            streams = [stack.enter_context(open(name, "wb")) for name in partial]
            packer = _pack_stream(batches, policy, max_tokens, progress, *streams)
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
        for name, target in zip(partial, targets, strict=True):
            os.replace(name, target)
        learnt = None if mask_path is None else np.memmap(mask_path, dtype=np.bool_, mode="r")
        return packer.blocks(np.memmap(path, dtype=_STORED, mode="r"), learnt)
    except OSError as error:
        # What `iter_documents` cannot read is a CorpusError by now, so this is about the file written here.
        reason = error.strerror or str(error)
        raise CorpusError(
            f"the packed tokens cannot be written to {targets[0]} ({reason}); "
            "check the folder and its free space (4 bytes a token, 5 with a mask)"
        ) from error
    finally:
        for name in partial:
            name.unlink(missing_ok=True)


def _pack_stream(
    batches: Iterable[list[Encoded]],
    policy: PackingPolicy,
    max_tokens: int | None,
    progress: Progress | None,
    stream: BinaryIO,
    mask: BinaryIO | None = None,
) -> _Packer:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"the largest number of tokens is {max_tokens}; give at least 1, or nothing for no limit")
    packer = _Packer(policy, stream, mask, max_tokens)
    for batch in batches:
        for document in batch:
            packer.add(document)
        if progress is not None:
            progress(packer.num_tokens)
        if packer.full:
            break
    packer.finish()
    return packer


class _Packer:
    """Appends documents to the streams of tokens and of their mask, keeping counts and hashes."""

    def __init__(self, policy: PackingPolicy, stream: BinaryIO, mask: BinaryIO | None, max_tokens: int | None) -> None:
        self.policy, self.stream, self.mask, self.max_tokens = policy, stream, mask, max_tokens
        self.num_tokens = self.documents = self.empty_documents = self.learnt_tokens = 0
        self.hash, self.mask_hash = hashlib.sha256(), hashlib.sha256()
        self.open_document = False

    @property
    def full(self) -> bool:
        return self.num_tokens == self.max_tokens

    def add(self, document: Encoded) -> None:
        """Append one piece of a document; a document begins with its first piece that has visible tokens."""
        if self.full:
            return
        begins = not self.open_document and document.visible
        if begins:
            self.documents += 1
            self.open_document = True
            if self.policy.bos == "document" and not document.begins_with(self.policy.bos_id):
                self._append([self.policy.bos_id], False)
        if self.open_document:
            self._append(document.ids, document.learnt)
        if not document.continued:
            self._end(document)

    def _end(self, document: Encoded) -> None:
        if not self.open_document:
            self.empty_documents += 1
        elif self.policy.eos == "document" and not document.ends_with(self.policy.eos_id):
            self._append([self.policy.eos_id], document.last_learnt)
        self.open_document = False

    def _append(self, ids: Sequence[int | None] | NDArray[Any], learnt: bool | NDArray[np.bool_]) -> None:
        array = np.asarray(ids, dtype=_STORED)
        mask = np.broadcast_to(np.asarray(learnt), array.shape)
        if self.policy.bos == "block":
            starts = self._block_starts(array.size)
            array, mask = np.insert(array, starts, self.policy.bos_id or 0), np.insert(mask, starts, False)
        if self.max_tokens is not None:
            room = self.max_tokens - self.num_tokens
            array, mask = array[:room], mask[:room]
        self.num_tokens += array.size
        data = array.tobytes()
        self.hash.update(data)
        self.stream.write(data)
        if self.mask is not None:
            self.learnt_tokens += int(mask.sum())
            data = mask.tobytes()
            self.mask_hash.update(data)
            self.mask.write(data)

    def _block_starts(self, size: int) -> NDArray[np.int64]:
        """Before which of the next `size` tokens BOS comes: those that would otherwise be the first of a block."""
        length = self.policy.block_length
        used = self.num_tokens % length
        # The block under way takes length - used tokens (none if it is full); each later one takes length - 1.
        return np.arange(length - used if used else 0, size, length - 1)

    def finish(self) -> None:
        """Pad the last block and complete the hash."""
        if not self.num_tokens:
            raise empty_corpus(self.empty_documents)
        if self.mask is not None and not self.learnt_tokens:
            raise EmptyCorpusError(
                f"nothing of the corpus is to be learnt: no completion in {self.num_tokens:,} tokens; check the files "
                "and the fields"
            )
        missing = -self.num_tokens % self.policy.block_length
        self.stream.write(np.full(missing, self.policy.pad_id, dtype=_STORED).tobytes())
        if self.mask is not None:
            self.mask.write(bytes(missing))
        self.hash.update(np.array([self.num_tokens, self.policy.block_length], dtype="<u8").tobytes())

    def blocks(self, stored: NDArray[np.int32], learnt: NDArray[np.bool_] | None) -> TokenBlocks:
        """The streams, read back from where they were written, as rows."""
        return TokenBlocks(
            tokens=stored.reshape(-1, self.policy.block_length),
            num_tokens=self.num_tokens,
            documents=self.documents,
            empty_documents=self.empty_documents,
            sha256=self.hash.hexdigest(),
            learnt=None if learnt is None else learnt.reshape(-1, self.policy.block_length),
            learnt_tokens=self.num_tokens if learnt is None else self.learnt_tokens,
            mask_sha256=None if learnt is None else self.mask_hash.hexdigest(),
        )


def empty_corpus(documents: int) -> EmptyCorpusError:
    """What is said of a corpus of so many documents without any text."""
    return EmptyCorpusError(
        f"the corpus is empty: {counted(documents, 'document')} and no text in any; check the files and the text field"
    )
