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
from logitcache.corpus import CorpusFile, expand_paths, iter_documents, pack, resolve_policy
from logitcache.dump_corpus import Corpus
from logitcache.dump_options import DumpOptions
from logitcache.errors import CorpusError, EmptyCorpusError
from logitcache.planning.windows import cut_windows, file_sizes

# Up to here tokenising all of it takes some seconds.
EXACT_TOKENS, EXACT_BYTES = 1 << 20, 1 << 22
# Text has fewer tokens than a byte has eighths, so that a window of so many bytes fills its block.
_BYTES_PER_TOKEN = 8


class SampleCorpus(Corpus):
    """Blocks in memory, in place of a dump's corpus.

    Args:
        record, tokenizer: as of `Corpus`.
        tokens_BL: int64 [B, L]; the last block may be padded, as `record["num_tokens"]` says.
    """

    def __init__(self, record: dict[str, Any], tokenizer: dict[str, Any], tokens_BL: NDArray[np.int64]) -> None:
        self.record, self.tokenizer, self.tokens_BL = record, tokenizer, tokens_BL

    @property
    def has_tokens(self) -> bool:
        return True

    def read(self, first: int, stop: int) -> NDArray[np.int64]:
        """Blocks [first, stop)."""
        return self.tokens_BL[first:stop]

    def discard_new(self) -> None:
        """There is nothing to remove."""

    def resized(self, num_tokens: int) -> SampleCorpus:
        """The same blocks, said to be of a corpus of so many tokens."""
        return SampleCorpus({**self.record, "num_tokens": num_tokens}, self.tokenizer, self.tokens_BL)

    def head(self, blocks: int) -> SampleCorpus:
        """The first blocks."""
        tokens = self.tokens_BL[:blocks]
        return SampleCorpus({**self.record, "num_tokens": min(self.num_tokens, tokens.size)}, self.tokenizer, tokens)


@dataclass(frozen=True)
class Sample:
    """What was taken of a corpus.

    Args:
        corpus: the sample.
        total_tokens: of the whole corpus, as far as the dump would read it.
        uncertainty: relative, two standard errors of `total_tokens`; 0 where it is exact.
        whole: whether the sample is the corpus.
        tokenising_seconds: for all of the corpus, by what this part took.
        files, bytes: of the whole corpus.
    """

    corpus: SampleCorpus
    total_tokens: int
    uncertainty: float
    whole: bool
    tokenising_seconds: float
    files: int
    bytes: int


def take_sample(options: DumpOptions, tokenizer: Any, sample_tokens: int) -> Sample:
    """Blocks of about `sample_tokens` tokens.

    Raises:
        CorpusError: as a dump, as far as the corpus was read.
    """
    files = expand_paths(options.corpus)
    total_bytes = sum(file_sizes(files))
    started = time.perf_counter()
    if total_bytes <= EXACT_BYTES or (options.max_tokens or EXACT_TOKENS + 1) <= EXACT_TOKENS:
        tokens_BL, total = _packed(options, tokenizer, files, options.max_tokens)
        spread, uncertainty = tokens_BL, 0.0
        seconds = time.perf_counter() - started
    else:
        spread, total, uncertainty, seconds = _estimated(options, tokenizer, files, total_bytes, sample_tokens)
    blocks = max(1, -(-sample_tokens // options.block_length))
    exact = uncertainty == 0 and spread.shape[0] * options.block_length >= total
    whole = exact and blocks >= spread.shape[0]
    chosen = spread if whole else _evenly(spread, blocks, exact and total % options.block_length > 0)
    corpus = SampleCorpus(
        _record(options, tokenizer, files, total if whole else chosen.size),
        models.tokenizer_identity(tokenizer),
        chosen,
    )
    return Sample(corpus, total, uncertainty, whole, seconds, len(files), total_bytes)


def _evenly(blocks_BL: NDArray[np.int64], count: int, last_is_short: bool) -> NDArray[np.int64]:
    """About `count` whole blocks at even distances."""
    there = max(1, blocks_BL.shape[0] - last_is_short)
    count = min(count, there)
    return blocks_BL[((np.arange(count) + 0.5) * there / count).astype(np.int64)]


def _estimated(
    options: DumpOptions, tokenizer: Any, files: Sequence[CorpusFile], total_bytes: int, sample_tokens: int
) -> tuple[NDArray[np.int64], int, float, float]:
    """Blocks of windows; tokens of the whole, their relative uncertainty, and seconds that tokenising it takes."""
    spread, rate, about, per_token = _windows(options, tokenizer, files, total_bytes, sample_tokens)
    total = max(1, round(rate * total_bytes))
    if options.max_tokens is None or options.max_tokens > total:
        return spread, total, about, total * per_token
    # Only the beginning will be read.
    stop = min(total_bytes, max(1, int(options.max_tokens / rate)))
    spread, _, _, per_token = _windows(options, tokenizer, files, stop, sample_tokens)
    short = options.max_tokens > total * (1 - about)
    return spread, options.max_tokens, about if short else 0.0, options.max_tokens * per_token


def _windows(
    options: DumpOptions, tokenizer: Any, files: Sequence[CorpusFile], stop: int, sample_tokens: int
) -> tuple[NDArray[np.int64], float, float, float]:
    """Blocks of windows in the first `stop` bytes; tokens a byte with two relative standard errors; seconds a token."""
    length = options.block_length
    count = max(8, -(-sample_tokens // length))
    parts, counts, sizes, seconds = [], [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for window in cut_windows(files, Path(folder), count, _BYTES_PER_TOKEN * length, stop):
            started = time.perf_counter()
            try:
                tokens_BL, num_tokens = _packed(options, tokenizer, [window.file], None)
            except EmptyCorpusError:
                continue
            except CorpusError as error:
                said = str(error).replace(str(window.file), f"a part of {window.source}")
                raise CorpusError(said) from error
            seconds += time.perf_counter() - started
            whole = num_tokens - num_tokens % length or num_tokens
            parts.append(tokens_BL.reshape(-1)[:whole])
            counts.append(num_tokens)
            sizes.append(window.bytes)
    if not counts:
        raise EmptyCorpusError("no text was found in a sample of the corpus; check the files and the text field")
    stream = np.concatenate(parts)
    kept = max(length, stream.size - stream.size % length)
    blocks_BL = np.pad(stream, (0, max(0, kept - stream.size)), mode="edge")[:kept].reshape(-1, length)
    rate = sum(counts) / sum(sizes)
    rates = [tokens / size for tokens, size in zip(counts, sizes, strict=True)]
    about = 2 * statistics.stdev(rates) / len(rates) ** 0.5 / rate if len(rates) > 1 else 1.0
    return blocks_BL, rate, about, seconds / sum(counts)


def _packed(
    options: DumpOptions, tokenizer: Any, files: Sequence[CorpusFile], max_tokens: int | None
) -> tuple[NDArray[np.int64], int]:
    """Blocks as the dump packs them, int64 [B, L], and how many of their tokens are real."""
    policy = resolve_policy(tokenizer, options.block_length, options.bos, options.eos)
    blocks = pack(tokenizer, iter_documents(files, options.text_field), policy, max_tokens)
    return blocks.tokens.astype(np.int64), blocks.num_tokens


def _record(options: DumpOptions, tokenizer: Any, files: Sequence[CorpusFile], num_tokens: int) -> dict[str, Any]:
    """What a plan would say of the corpus, as long as it would be; hashes take time and only their length counts."""
    unknown = "0" * 64
    return {
        "files": [
            {"name": file.name, "bytes": size, "sha256": unknown}
            for file, size in zip(files, file_sizes(files), strict=True)
        ],
        "packing": resolve_policy(tokenizer, options.block_length, options.bos, options.eos).to_dict(),
        "text_field": options.text_field,
        "max_tokens": options.max_tokens,
        "num_tokens": num_tokens,
        "documents": num_tokens,
        "empty_documents": 0,
        "sha256": unknown,
        "document_boundaries": "attended",
    }
