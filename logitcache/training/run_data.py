"""What a run reads: its caches, averaged and mixed, and what it is evaluated on.

Legend: L block length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from logitcache.corpus import expand_paths, iter_documents, pack, resolve_policy
from logitcache.errors import TrainingError, UsageError, counted
from logitcache.reader import (
    AveragedCaches,
    BlockSource,
    CacheDataset,
    MixedCaches,
    ReaderOptions,
    make_batch,
    sources_of,
)
from logitcache.store import Cache, open_cache
from logitcache.training.evaluation import empty_batch
from logitcache.training.options import TrainOptions
from logitcache.training.pinned import open_pinned
from logitcache.training.ranks import ALONE, Ranks

Batch = dict[str, Any]
# Caches that are averaged, with their weights.
Group = tuple[list[Cache], list[float]]


@dataclass(frozen=True)
class EvaluationSet:
    """Blocks [first, stop) of a source that a run is measured on.

    Args:
        name: of the corpus, where there is more than one.
        source: what they are read from.
        first, stop: which blocks.
    """

    name: str
    source: BlockSource
    first: int
    stop: int

    def batches(self, blocks: int, ranks: Ranks = ALONE) -> Iterator[Batch]:
        """This rank's batches of at most `blocks` blocks."""
        for start in ranks.share(range(self.first, self.stop, blocks)):
            if start is None:
                yield empty_batch()
            else:
                read = [self.source.read_blocks(start, min(self.stop, start + blocks))]
                # Rows without ids have a distribution to compare with as little as labels have.
                yield make_batch(read, with_targets=self.source.keeps_ids)


class RunData:
    """The caches of a run: those of the same token blocks are averaged, as several teachers; others are mixed.

    Args:
        options: of the run.
        units: of each cache, to read of unfinished ones; see `snapshot_units`.

    Attributes:
        caches: in the order of the options.
        sources: one of each corpus.
        ranges: blocks [first, stop) of each to train on.
        evaluation: what is held out.

    Raises:
        CacheError: a cache cannot be opened.
        TrainingError: the caches do not go together, are too small to hold some blocks out, or hold none to learn in
            a part of them.
    """

    def __init__(self, options: TrainOptions, units: Sequence[int] | None = None) -> None:
        self.options = options
        self.caches = open_pinned(options.cache, units)
        weights = options.cache_weights or (1.0,) * len(self.caches)
        if len(weights) != len(self.caches):
            given, there = (counted(len(of), what) for of, what in ((weights, "weight"), (self.caches, "cache")))
            raise UsageError(f"--cache-weights gives {given} for {there}; give one for each, or none")
        if min(weights) <= 0 or not math.isfinite(sum(weights)):
            said = ",".join(map(str, weights))
            raise UsageError(f"--cache-weights {said} makes no shares; give each cache a number above 0")
        groups = _by_corpus(self.caches, weights, options.combine)
        read = [_one(group, options.combine) for group in groups]
        self.sources = [source for each in read for source in sources_of(each)]
        self._names = _names([caches[0].location for caches, _ in groups])
        held_out = open_cache(options.held_out_cache) if options.held_out_cache else None
        self._held_out = sources_of(held_out)[0] if held_out else None
        if self._held_out:
            _refuse_other_tokenizer(self.sources[0], self._held_out)
        self.ranges = [self._training_range(source) for source in self.sources]
        # Without weights, corpora count as much as they hold.
        sizes = [float(stop - first) for first, stop in self.ranges]
        shares = [sum(weights) for _, weights in groups] if options.cache_weights else sizes
        self._source = read[0] if len(read) == 1 else MixedCaches(read, shares, self.ranges)
        self.evaluation = self._evaluation_sets()
        for source, (first, stop) in zip(self.sources, self.ranges, strict=True):
            _refuse_without_labels(source, first, stop, "to train on")
        for held in self.evaluation:
            _refuse_without_labels(held.source, held.first, held.stop, "held out")

    @property
    def block_length(self) -> int:
        return self.sources[0].block_length

    @property
    def num_blocks(self) -> int:
        """Blocks of one pass over what is trained on."""
        return sum(stop - first for first, stop in self.ranges)

    @property
    def fingerprints(self) -> list[str]:
        """Of all caches, in the order in which they are read."""
        return [name for source in self.sources for name in source.fingerprints]

    @property
    def widest(self) -> BlockSource:
        """The source of the largest vocabulary, which a student must fit."""
        return max(self.sources, key=lambda source: source.vocab_size)

    def dataset(self, options: ReaderOptions) -> CacheDataset:
        """The training blocks in their seeded order. `options` say nothing of which blocks to read."""
        if not isinstance(self._source, MixedCaches):
            first, stop = self.ranges[0]
            options = replace(options, first_block=first, stop_block=stop)
        return CacheDataset(self._source, options)

    def _training_range(self, source: BlockSource) -> tuple[int, int]:
        total, options = source.num_blocks, self.options
        if source.num_tokens == total:
            raise TrainingError(
                f"{source.location} holds one token a block and so no next token to learn; dump a larger corpus"
            )
        held = 0 if self._held_out or options.held_out == 0 else max(1, round(total * options.held_out))
        if held >= total:
            raise TrainingError(
                f"{source.location} has only {counted(total, 'block')}, too few to hold some out; use --held-out 0 or "
                "a larger cache"
            )
        return 0, total - held

    def _evaluation_sets(self) -> list[EvaluationSet]:
        """What is held out, each corpus with its share of `eval_tokens`."""
        if self._held_out:
            there = [("", self._held_out, (0, self._held_out.num_blocks))]
        else:
            there = [
                (name, source, (stop, source.num_blocks))
                for name, source, (_, stop) in zip(self._names, self.sources, self.ranges, strict=True)
                if stop < source.num_blocks
            ]
        sets = []
        for name, source, (first, stop) in there:
            wanted = max(1, self.options.eval_tokens // (source.block_length * len(there)))
            sets.append(EvaluationSet(name, source, first, min(stop, first + wanted)))
        return sets


def _by_corpus(caches: Sequence[Cache], weights: Sequence[float], combine: str) -> list[Group]:
    """Caches that are averaged, group by group, in the order of their first ones."""
    groups: dict[Any, Group] = {}
    for number, (cache, weight) in enumerate(zip(caches, weights, strict=True)):
        key = {"average": 0, "mix": number}.get(combine) if combine != "auto" else _blocks_of(cache)
        members, shares = groups.setdefault(key, ([], []))
        members.append(cache)
        shares.append(weight)
    return list(groups.values())


def _blocks_of(cache: Cache) -> tuple[Any, ...]:
    """Equal for caches of the same token blocks. Tokens are looked at, as a subset names the corpus of its source."""
    identity = cache.manifest.identity
    geometry = identity.geometry
    sizes = (cache.block_length, geometry.num_tokens, tuple(map(tuple, geometry.short_blocks)))
    return (cache.tokenizer, identity.corpus.get("sha256"), *sizes, cache.read_blocks(0, 1).tokens.tobytes())


def _one(group: Group, combine: str) -> Cache | AveragedCaches:
    caches, shares = group
    try:
        return caches[0] if len(caches) == 1 else AveragedCaches(caches, shares)
    except TrainingError as error:
        if combine != "auto" or len({cache.unbiased for cache in caches}) > 1:
            raise
        raise TrainingError(f"{error}; or take them for several corpora with --set combine=mix") from error


def _refuse_other_tokenizer(mine: BlockSource, held_out: BlockSource) -> None:
    if mine.tokenizer != held_out.tokenizer:
        raise TrainingError(
            f"the held-out cache {held_out.location} was made with another tokenizer ({held_out.tokenizer[:12]}) than "
            f"{mine.location} ({mine.tokenizer[:12]}); dump it with the same teacher"
        )


def _refuse_without_labels(source: BlockSource, first: int, stop: int, what: str) -> None:
    """Raise TrainingError where blocks [first, stop) lie inside prompts: a loss of nothing would be said to be 0."""
    if not source.masked:
        return
    for ref in source.chunks:
        blocks = np.arange(ref.first_block, ref.first_block + ref.num_blocks)
        chosen = (blocks >= first) & (blocks < stop)
        if chosen.any():
            _, _, mask = source.read(ref, with_targets=False)
            if mask is None or mask[np.repeat(chosen, source.block_tokens(blocks[0], blocks[-1] + 1))].any():
                return
    raise TrainingError(
        f"nothing is to be learnt in {counted(stop - first, 'block')} of {source.location} {what}, as inside long "
        "prompts; give more of them with --held-out and --eval-tokens or a --held-out-cache, or a larger cache"
    )


def _names(locations: Sequence[str]) -> list[str]:
    """A short name of each corpus: its folder's, numbered where two are alike; none for a single one."""
    if len(locations) == 1:
        return [""]
    names = [re.sub(r"\W+", "_", PurePosixPath(location).name) for location in locations]
    # "other" is what text of another domain is called.
    return [f"{name}_{number}" if [*names, "other"].count(name) > 1 else name for number, name in enumerate(names)]


def plain_text_batches(options: TrainOptions, tokenizer: Any, block_length: int, batch_blocks: int) -> list[Batch]:
    """Batches of `options.eval_text`, plain text of another domain: labels only.

    Raises UsageError without a tokenizer, and CorpusError.
    """
    if not options.eval_text:
        return []
    if tokenizer is None:
        raise UsageError("--eval-text needs the teacher's tokenizer; give it with --tokenizer")
    policy = resolve_policy(tokenizer, block_length)
    blocks = pack(tokenizer, iter_documents(expand_paths(options.eval_text)), policy, options.eval_tokens)
    tokens = torch.from_numpy(blocks.tokens.astype("int64"))
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    labels.view(-1)[blocks.num_tokens - 1 :] = -100
    return [
        {"input_ids": tokens[start : start + batch_blocks], "labels": labels[start : start + batch_blocks]}
        for start in range(0, len(tokens), batch_blocks)
    ]
