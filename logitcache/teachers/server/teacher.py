"""A teacher behind an OpenAI-style server.

Legend: B blocks of L tokens, R rows, V vocabulary, K entries that the server tells of a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache import models
from logitcache.errors import ModelError
from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution
from logitcache.selection.ranked import select_ranked
from logitcache.selection.select import select
from logitcache.targets import SparseTargets
from logitcache.teachers.server import probe
from logitcache.teachers.server.answers import AnswerError, PromptLogprobs
from logitcache.teachers.server.asking import Asking
from logitcache.teachers.server.client import Client, RefusedError
from logitcache.teachers.server.options import ServerOptions, checked_url, key_from_environment
from logitcache.teachers.teacher import BlockBatch, PendingRows

# Behind a block stand a token to ask what comes before it, and the one that the server generates.
EXTRA_TOKENS = 2
RESUME = "what is committed stays, and the same command goes on from there"
# Whole distributions are asked for up to this vocabulary: an entry is some 70 bytes of JSON.
MOST_WHOLE = 1 << 14
# Blocks handed over at once for each request that may be under way: only the last of them wait for each other.
BLOCKS_A_PLACE = 4


class ServerTeacher:
    """A model that a server runs, asked for the log-probabilities of each block's tokens; build it with `connect`.

    A server tells the K most probable ids, so `top-k` and `top-p` are exact and entropies are unknown (NaN). Where it
    tells all V, everything is known.

    Attributes:
        tokenizer: the local one, whose ids are sent.
        vocab_size: V, of the model's config beside the tokenizer, else the tokenizer's size.
        blocks_at_once: enough to keep all requests under way that may be.
    """

    def __init__(self, asking: Asking, tokenizer: Any, context: int | None, concurrency: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, asking.vocab_size
        self.blocks_at_once = BLOCKS_A_PLACE * concurrency
        self._asking, self._context = asking, context

    @classmethod
    def connect(cls, url: str, tokenizer: str | Path, options: ServerOptions | None = None) -> ServerTeacher:
        """Find the model and how to ask for it. A key is taken from the environment, LOGITCACHE_API_KEY.

        Args:
            url: of the API, for example http://127.0.0.1:8000/v1.
            tokenizer: folder or hub id of the model's own tokenizer.
            options: how to ask.

        Raises:
            UsageError: the URL or the key cannot be used, or the server has several models.
            ModelError: the server cannot be reached or used, or has another tokenizer.
        """
        options = options or ServerOptions()
        client = Client(checked_url(url), key_from_environment(), options)
        loaded = models.load_tokenizer(tokenizer)
        served = probe.find_model(client, options.model)
        asking = probe.find_dialect(client, served.name, loaded, _vocabulary(tokenizer, loaded))
        return cls(asking, loaded, served.context, options.concurrency)

    def identity(self) -> dict[str, Any]:
        """What is known of the model, ready for JSON: its name, and how it was asked. No address: that may change."""
        return {"name": self._asking.model, "revision": None, "files": [], "served": self._asking.dialect.name}

    def check_selections(self, selections: Sequence[Selection]) -> None:
        """Try what these need. Raises ModelError with the reason if the server does not give it."""
        drawn = next((selection for selection in selections if selection.draws), None)
        if drawn is None:
            return probe.check_entries(self._asking, self.tokenizer, self._entries(selections))
        why = (
            f"{drawn} draws from the whole distribution, and a server tells the most probable ids only: draws of those "
            "would be biased; choose top-k:K or top-p:P:K, or run the teacher here"
        )
        if self.vocab_size > MOST_WHOLE:
            raise ModelError(why)
        try:
            return probe.check_entries(self._asking, self.tokenizer, self.vocab_size)
        except ModelError as error:
            raise ModelError(f"{why} ({error})") from error

    def check_block_length(self, block_length: int) -> None:
        """Try a block of this length. Raises ModelError if it does not fit into the model's context."""
        longest = self._context
        if longest is not None and block_length + EXTRA_TOKENS > longest:
            raise ModelError(
                f"blocks of {block_length} tokens are too long for the server's context of {longest}, as "
                f"{EXTRA_TOKENS} more are needed; choose a block length of at most {longest - EXTRA_TOKENS}, or start "
                f"the server with more (vLLM: --max-model-len {block_length + EXTRA_TOKENS})"
            )
        probe.check_length(self._asking, self.tokenizer, block_length + 1)

    def expect_batches(self, blocks: int) -> None:
        """Nothing to prepare for."""

    def begin_rows(self, batch: BlockBatch) -> PendingRows:
        """As `Teacher.begin_rows`; a request for each block that rows are wanted of, several at once, all of them here.

        Raises:
            ModelError: the server fails for good, or answers what cannot be used; the message names the block.
        """
        rows = self._rows(batch)
        return lambda: rows

    def _rows(self, batch: BlockBatch) -> list[SparseTargets]:
        length, counted_R = batch.tokens_BL.shape[1], batch.counted_R
        places = [block for block in range(-(-batch.num_rows // length)) if counted_R[block * length :][:length].any()]
        prompts = [batch.tokens_BL[block, : batch.num_rows - block * length].tolist() for block in places]
        numbers = [batch.first_block + block for block in places]
        told = self._ask(prompts, numbers, self._entries(batch.selections), batch.nonfinite == "fail")
        parts = [[SparseTargets([0], [], [], unbiased=selection.unbiased)] for selection in batch.selections]
        for block, answer in zip(places, told, strict=True):
            # A view: what is unknown is not kept.
            mask = counted_R[block * length :][:length]
            mask &= ~answer.unknown
            wanted = np.flatnonzero(mask)
            rows = self._rows_of(answer, batch.first_block + block, length, batch.selections, batch.seed)
            for part, targets in zip(parts, rows, strict=True):
                part.append(targets.take(wanted))
        return [SparseTargets.concatenate(part).spread(counted_R) for part in parts]

    def close(self) -> None:
        """Hang up."""
        self._asking.client.close()

    def _entries(self, selections: Sequence[Selection]) -> int:
        """K: draws need all V, and labels alone one, as no server tells fewer."""
        return max(1, *(self.vocab_size if selection.draws else selection.size for selection in selections))

    def _ask(
        self, blocks: Sequence[list[int]], numbers: Sequence[int], entries: int, known: bool
    ) -> list[PromptLogprobs]:
        # The token that asks what follows a block's last one may be any.
        prompts = [[*block, block[0]] for block in blocks]
        try:
            return self._asking.ask(prompts, entries, known=known)
        except ModelError as error:
            raise ModelError(f"{error}; {RESUME}") from error
        except RefusedError as error:
            said, where = f"is {error}", f"blocks from {numbers[0]} on"
        except AnswerError as error:
            said = f"cannot be used: it {error}"
            where = f"block {numbers[error.prompt]}"
            where += "" if error.position is None else f", position {error.position}"
        raise ModelError(
            f"the answer of {self._asking.client.base} to {where} {said}; see that the server runs as it did before; "
            f"{RESUME}"
        )

    def _rows_of(
        self, told: PromptLogprobs, block: int, length: int, selections: Sequence[Selection], seed: int
    ) -> list[SparseTargets]:
        """Rows of one block, once a selection."""
        # Rows that are unknown are left out in the end; until then they are even.
        logprobs_RK = np.where(told.unknown[:, None], -np.log(self.vocab_size), told.logprobs)
        label_logprob = told.sent.copy()
        label_logprob[-1] = np.nan
        if told.ids.shape[1] < self.vocab_size:
            unknown = np.full(len(label_logprob), np.nan)
            return [
                select_ranked(selection, told.ids, logprobs_RK).with_columns(label_logprob, unknown)
                for selection in selections
            ]
        dist = _whole(told.ids, logprobs_RK)
        entropy, kept = dist.entropy().numpy(), []
        unknown = np.full_like(entropy, np.nan)
        for selection in selections:
            uniforms = block_uniforms(seed, [block], length, selection.draws) if selection.draws else None
            targets = select(selection, dist, None if uniforms is None else uniforms[: len(label_logprob)])
            kept.append(targets.with_columns(label_logprob, entropy if selection.keeps_ids else unknown))
        return kept


def _whole(ids_RV: NDArray[np.int64], told_RV: NDArray[np.float64]) -> Distribution:
    """The distributions [R, V] of which all entries were told, in whatever order."""
    logprobs_RV = np.empty(ids_RV.shape, dtype=np.float32)
    np.put_along_axis(logprobs_RV, ids_RV, told_RV.astype(np.float32), axis=1)
    return Distribution.from_logits(torch.from_numpy(logprobs_RV))


def _vocabulary(source: str | Path, tokenizer: Any) -> int:
    """Rows of the model's LM head by the config beside the tokenizer; its size where there is none."""
    config = models.resolve_source(source, weights=False) / "config.json"
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields = fields.get("text_config", fields)
        return int(fields["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return len(tokenizer)
