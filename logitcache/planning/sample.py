"""Some blocks of a corpus, spread over all of it, and how many tokens the whole has.

A corpus that is short, or of which a dump takes little, is tokenised as the dump would: its size is exact. Of others,
windows at even distances are tokenised, and the rest is assumed to have as many tokens a byte.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache import models
from logitcache.corpus import (
    CorpusFile,
    PackingPolicy,
    TokenBlocks,
    encode_corpus,
    expand_paths,
    pack_encoded,
    resolve_policy,
)
from logitcache.dump_corpus import Corpus, counted_of
from logitcache.dump_options import DumpOptions
from logitcache.errors import CorpusError, EmptyCorpusError
from logitcache.planning.windows import cut_windows, file_sizes

# Up to here tokenising all of it takes some seconds.
EXACT_TOKENS, EXACT_BYTES = 1 << 20, 1 << 22
# Text has fewer tokens than a byte has eighths, so that a window of so many bytes fills its block.
_BYTES_PER_TOKEN = 8
# Of blocks at even distances, where in its distance the first one lies.
_STARTS = (0.5, *((np.arange(16) + 0.5) / 16))
_UNKNOWN_HASH = "0" * 64


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens, B of L.

    Args:
        tokens_BL: int64 [B, L].
        learnt_BL: bool [B, L], whether each token is to be learnt; None where all are.
    """

    tokens_BL: NDArray[np.int64]
    learnt_BL: NDArray[np.bool_] | None

    def take(self, chosen: slice | NDArray[np.int64]) -> Blocks:
        """Some of the blocks."""
        return Blocks(self.tokens_BL[chosen], None if self.learnt_BL is None else self.learnt_BL[chosen])


class SampleCorpus(Corpus):
    """Blocks in memory, in place of a dump's corpus.

    Args:
        record, tokenizer: as of `Corpus`.
        blocks: the last one may be padded, as `record["num_tokens"]` says.
    """

    def __init__(self, record: dict[str, Any], tokenizer: dict[str, Any], blocks: Blocks) -> None:
        self.record, self.tokenizer, self.blocks = record, tokenizer, blocks

    @property
    def has_tokens(self) -> bool:
        return True

    def read(self, first: int, stop: int) -> NDArray[np.int64]:
        """Blocks [first, stop)."""
        return self.blocks.tokens_BL[first:stop]

    def read_counted(self, first: int, stop: int) -> NDArray[np.bool_] | None:
        """As of `Corpus`."""
        learnt_BL = self.blocks.learnt_BL
        return None if learnt_BL is None else counted_of(learnt_BL[first:stop])

    def discard_new(self) -> None:
        """There is nothing to remove."""

    def resized(self, num_tokens: int) -> SampleCorpus:
        """The same blocks, said to be of a corpus of so many tokens."""
        return SampleCorpus({**self.record, "num_tokens": num_tokens}, self.tokenizer, self.blocks)

    def one(self) -> SampleCorpus:
        """The block of which most is to be learnt."""
        learnt_BL = self.blocks.learnt_BL
        place = 0 if learnt_BL is None else int(learnt_BL.sum(1).argmax())
        block = self.blocks.take(slice(place, place + 1))
        length = block.tokens_BL.size
        return SampleCorpus(
            {**self.record, "num_tokens": min(length, self.num_tokens - place * length)}, self.tokenizer, block
        )


@dataclass(frozen=True)
class Sample:
    """What was taken of a corpus.

    Args:
        corpus: the sample.
        total_tokens: of the whole corpus, as far as the dump would read it.
        uncertainty: relative, two standard errors of `total_tokens`; 0 where it is exact.
        learnt_uncertainty: likewise, of the share of them that is to be learnt.
        whole: whether the sample is the corpus.
        tokenising_seconds: for all of the corpus, by what this part took.
        files, bytes: of the whole corpus.
    """

    corpus: SampleCorpus
    total_tokens: int
    uncertainty: float
    learnt_uncertainty: float
    whole: bool
    tokenising_seconds: float
    files: int
    bytes: int


def take_sample(options: DumpOptions, tokenizer: Any, vocab_size: int, sample_tokens: int) -> Sample:
    """Blocks of about `sample_tokens` tokens of a tokenizer and a head of `vocab_size` ids.

    Raises:
        CorpusError: as a dump, as far as the corpus was read.
    """
    files = expand_paths(options.corpus)
    text = _Text(options, tokenizer, vocab_size)
    total_bytes = sum(file_sizes(files))
    started = time.perf_counter()
    if total_bytes <= EXACT_BYTES or (options.max_tokens or EXACT_TOKENS + 1) <= EXACT_TOKENS:
        packed = text.pack(files, options.max_tokens)
        spread, total, uncertainty, of_learnt = _blocks(packed), packed.num_tokens, 0.0, 0.0
        seconds = time.perf_counter() - started
    else:
        spread, total, uncertainty, of_learnt, seconds = _estimated(text, files, total_bytes, sample_tokens)
    there, wanted = len(spread.tokens_BL), max(1, -(-sample_tokens // options.block_length))
    exact = uncertainty == 0 and there * options.block_length >= total
    whole = exact and wanted >= there
    if not whole:
        spread = spread.take(_evenly(spread, wanted, exact and total % options.block_length > 0))
    record = text.record(files, total if whole else spread.tokens_BL.size)
    corpus = SampleCorpus(record, models.tokenizer_identity(tokenizer), spread)
    return Sample(corpus, total, uncertainty, of_learnt, whole, seconds, len(files), total_bytes)


@dataclass(frozen=True)
class _Text:
    """How a dump makes blocks of files."""

    options: DumpOptions
    tokenizer: Any
    vocab_size: int

    def pack(self, files: Sequence[CorpusFile], max_tokens: int | None) -> TokenBlocks:
        """Blocks as the dump packs them."""
        fields = self.options.fields
        batches = encode_corpus(self.tokenizer, files, fields, self.vocab_size)
        return pack_encoded(batches, self._policy, fields.masked, max_tokens)

    def record(self, files: Sequence[CorpusFile], num_tokens: int) -> dict[str, Any]:
        """What a plan would say of the corpus, as long as it would be: hashes take time and only their length counts.

        Mirrors `Corpus.prepare`.
        """
        fields = self.options.fields
        template = {"chat_template_sha256": _UNKNOWN_HASH} if fields.kind == "messages" else {}
        return {
            "files": [
                {"name": file.name, "bytes": size, "sha256": _UNKNOWN_HASH}
                for file, size in zip(files, file_sizes(files), strict=True)
            ],
            "packing": self._policy.to_dict(),
            **fields.to_dict(),
            **template,
            "max_tokens": self.options.max_tokens,
            "num_tokens": num_tokens,
            "documents": num_tokens,
            "empty_documents": 0,
            "sha256": _UNKNOWN_HASH,
            **({"mask_sha256": _UNKNOWN_HASH} if fields.masked else {}),
            "document_boundaries": "attended",
        }

    @property
    def _policy(self) -> PackingPolicy:
        return resolve_policy(self.tokenizer, self.options.block_length, *self.options.special_tokens)


def _blocks(packed: TokenBlocks) -> Blocks:
    return Blocks(packed.tokens.astype(np.int64), packed.learnt)


def _evenly(blocks: Blocks, count: int, last_is_short: bool) -> NDArray[np.int64]:
    """Numbers of about `count` whole blocks at even distances, begun so that their share of what is learnt is right."""
    there = max(1, len(blocks.tokens_BL) - last_is_short)
    count = min(count, there)
    chosen = [((np.arange(count) + start) * there / count).astype(np.int64) for start in _STARTS]
    if blocks.learnt_BL is None:
        return chosen[0]
    learnt_B = blocks.learnt_BL[:there].mean(1)
    return min(chosen, key=lambda numbers: float(abs(learnt_B[numbers].mean() - learnt_B.mean())))


def _estimated(
    text: _Text, files: Sequence[CorpusFile], total_bytes: int, sample_tokens: int
) -> tuple[Blocks, int, float, float, float]:
    """Blocks of windows; tokens of the whole; relative uncertainty of these and of the share that is learnt; seconds
    that tokenising all of it takes.
    """
    max_tokens = text.options.max_tokens
    spread, rate, about, learnt, per_token = _windows(text, files, total_bytes, sample_tokens)
    total = max(1, round(rate * total_bytes))
    if max_tokens is None or max_tokens > total:
        return spread, total, about, learnt, total * per_token
    # Only the beginning will be read.
    stop = min(total_bytes, max(1, int(max_tokens / rate)))
    spread, _, _, learnt, per_token = _windows(text, files, stop, sample_tokens)
    short = max_tokens > total * (1 - about)
    return spread, max_tokens, about if short else 0.0, learnt, max_tokens * per_token


def _windows(
    text: _Text, files: Sequence[CorpusFile], stop: int, sample_tokens: int
) -> tuple[Blocks, float, float, float, float]:
    """Blocks of windows in the first `stop` bytes; tokens a byte; two relative standard errors of these and of the
    share that is learnt; seconds a token.
    """
    length, masked = text.options.block_length, text.options.fields.masked
    count = max(8, -(-sample_tokens // length))
    parts, masks, counts, sizes, seconds = [], [], [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for window in cut_windows(files, Path(folder), count, _BYTES_PER_TOKEN * length, stop):
            started = time.perf_counter()
            try:
                packed = text.pack([window.file], None)
            except EmptyCorpusError:
                continue
            except CorpusError as error:
                said = str(error).replace(str(window.file), f"a part of {window.source}")
                raise CorpusError(said) from error
            seconds += time.perf_counter() - started
            num_tokens = packed.num_tokens
            # Prompts come first and completions last: only all of a record has its share of either.
            whole = num_tokens if masked else num_tokens - num_tokens % length or num_tokens
            parts.append(packed.tokens.reshape(-1)[:whole])
            if packed.learnt is not None:
                masks.append(packed.learnt.reshape(-1)[:whole])
            counts.append(num_tokens)
            sizes.append(window.bytes)
    if not counts:
        what = "nothing to learn" if masked else "no text"
        raise EmptyCorpusError(f"{what} was found in a sample of the corpus; check the files and the fields")
    rate = sum(counts) / sum(sizes)
    about = _uncertainty([tokens / size for tokens, size in zip(counts, sizes, strict=True)], rate)
    shares = [float(mask.mean()) for mask in masks]
    of_learnt = _uncertainty(shares, statistics.mean(shares)) if masked else 0.0
    learnt_BL = _whole_blocks(np.concatenate(masks), length) if masked else None
    tokens_BL = _whole_blocks(np.concatenate(parts).astype(np.int64), length)
    return Blocks(tokens_BL, learnt_BL), rate, about, of_learnt, seconds / sum(counts)


def _uncertainty(of_windows: Sequence[float], mean: float) -> float:
    """Two relative standard errors of a mean over windows."""
    return 2 * statistics.stdev(of_windows) / len(of_windows) ** 0.5 / mean if len(of_windows) > 1 else 1.0


def _whole_blocks(stream: NDArray[Any], length: int) -> NDArray[Any]:
    """As many whole blocks as a stream has; of a shorter one a block that ends in its last value."""
    kept = max(length, stream.size - stream.size % length)
    return np.pad(stream, (0, max(0, kept - stream.size)), mode="edge")[:kept].reshape(-1, length)
