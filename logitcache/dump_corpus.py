"""The corpus of a dump: token blocks, in a file in the first output's scratch folder until the dump is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache import models
from logitcache.corpus import (
    ChatTemplate,
    CorpusFile,
    Encoded,
    PackingPolicy,
    corpus_files_identity,
    encode_corpus,
    pack_encoded_to_file,
    resolve_policy,
)
from logitcache.dump_options import DumpOptions
from logitcache.errors import CorpusError
from logitcache.progress import Progress, Silent
from logitcache.store import Layout, Manifest, TokenFile, load_document

# How often somebody who waits for a large corpus is told how far it is.
_TOLD_SECONDS = 5.0

Facts = dict[str, Any]
Once = Callable[[Callable[[], Facts | None], Callable[[], Facts]], Facts]


def alone(find: Callable[[], Facts | None], make: Callable[[], Facts]) -> Facts:
    """What `find` finds, or else `make` makes: `Once` where there are no other workers."""
    return find() or make()


class Corpus:
    """The token blocks of a dump, kept in a file in the first output's scratch folder until the dump is complete.

    Resuming reuses that file; a finished dump run again needs no tokens and makes none.

    Attributes:
        record: what the plan says of the corpus.
        tokenizer: identity of the tokenizer that makes the tokens.
    """

    def __init__(
        self, record: dict[str, Any], tokenizer: dict[str, Any], stored: TokenFile, block_length: int, new: bool
    ) -> None:
        self.record, self.tokenizer = record, tokenizer
        self._stored, self._block_length, self._new = stored, block_length, new

    @classmethod
    def prepare(
        cls,
        options: DumpOptions,
        files: Sequence[CorpusFile],
        tokenizer: Any,
        vocab_size: int,
        once: Once = alone,
        progress: Progress | None = None,
    ) -> Corpus:
        """Find the tokens that another worker or an earlier run left, or tokenise.

        Args:
            options: of the dump.
            files: to read.
            tokenizer: the teacher's.
            vocab_size: of the teacher's head.
            once: finds or makes; with several workers one makes and all others find.
            progress: told now and then how far the tokenising is.

        Raises:
            CorpusError: a file cannot be read, or does not hold what it should; of token ids, those of `vocab_size`.
            UsageError: the tokenizer has no chat template, and messages are to be read.
        """
        fields = options.fields
        policy = resolve_policy(tokenizer, options.block_length, *options.special_tokens)
        template = {"chat_template_sha256": ChatTemplate.of(tokenizer).sha256} if fields.kind == "messages" else {}
        inputs = {
            "files": corpus_files_identity(files),
            "packing": policy.to_dict(),
            **fields.to_dict(),
            **template,
            "max_tokens": options.max_tokens,
        }
        identity = models.tokenizer_identity(tokenizer)
        key = {**inputs, "tokenizer": identity["sha256"]}
        layout = Layout(options.outputs[0].root)
        stored = TokenFile(layout.work)
        made: list[Facts] = []

        def find() -> Facts | None:
            return _facts_of_finished(options, inputs) or stored.find(key)

        def make() -> Facts:
            batches = encode_corpus(tokenizer, files, fields, vocab_size)
            made.append(cls._pack(options, batches, policy, stored, key, progress or Silent()))
            return made[0]

        facts = once(find, make)
        return cls({**inputs, **facts}, identity, stored, options.block_length, new=bool(made))

    @staticmethod
    def _pack(
        options: DumpOptions,
        batches: Iterable[list[Encoded]],
        policy: PackingPolicy,
        stored: TokenFile,
        key: dict[str, Any],
        progress: Progress,
    ) -> dict[str, Any]:
        stored.prepare()
        mask_path = stored.mask_path if options.fields.masked else None
        try:
            told = _now_and_then(progress)
            blocks = pack_encoded_to_file(batches, policy, stored.path, mask_path, options.max_tokens, told)
        except CorpusError:
            stored.discard()
            raise
        facts = {
            "num_tokens": blocks.num_tokens,
            "documents": blocks.documents,
            "empty_documents": blocks.empty_documents,
            "sha256": blocks.sha256,
            **({} if blocks.mask_sha256 is None else {"mask_sha256": blocks.mask_sha256}),
            # Attention runs over the whole block, across the documents in it.
            "document_boundaries": "attended",
        }
        stored.record(key, facts)
        return facts

    def discard_new(self) -> None:
        """Remove the token file if this run made it: the cache there has no use for it."""
        if self._new:
            self._stored.discard()

    @property
    def has_tokens(self) -> bool:
        """Whether there are blocks to read: not for a dump that was finished already."""
        return self._stored.found

    @property
    def masked(self) -> bool:
        """Whether only some tokens are to be learnt."""
        return "mask_sha256" in self.record

    def read_counted(self, first: int, stop: int) -> NDArray[np.bool_] | None:
        """Whether each position's next token is to be learnt, of blocks [first, stop): bool [B, L]; None for all."""
        if not self.masked:
            return None
        learnt_BL = self._stored.read_mask(first * self._block_length, stop * self._block_length)
        return counted_of(learnt_BL.reshape(-1, self._block_length))

    @property
    def num_tokens(self) -> int:
        return int(self.record["num_tokens"])

    def read(self, first: int, stop: int) -> NDArray[np.int64]:
        """Blocks [first, stop) as int64 [B, L], padded at the corpus' end."""
        return self._stored.read(first * self._block_length, stop * self._block_length).reshape(-1, self._block_length)


def _now_and_then(progress: Progress) -> Callable[[int], None]:
    """Says every few seconds how many tokens there are."""
    last = time.monotonic()

    def told(num_tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _TOLD_SECONDS:
            last = time.monotonic()
            progress.stage(f"tokenising the corpus, {num_tokens:,} tokens so far")

    return told


def counted_of(learnt_BL: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each position's next token is to be learnt, of whether each token is: bool [B, L] both."""
    # A block's last position has no next token.
    return np.pad(learnt_BL[:, 1:], ((0, 0), (0, 1)))


def _facts_of_finished(options: DumpOptions, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What tokenising gave, from the manifests, when every output is finished and was made from the same inputs."""
    facts = None
    for output in options.outputs:
        layout = Layout(output.root)
        if not layout.manifest.exists():
            return None
        corpus = load_document(layout.manifest, Manifest).identity.corpus
        if any(corpus.get(name) != value for name, value in inputs.items()):
            return None
        facts = {name: value for name, value in corpus.items() if name not in inputs}
    return facts
