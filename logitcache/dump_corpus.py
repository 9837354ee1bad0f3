"""The corpus of a dump: token blocks, in a file in the first output's scratch folder until the dump is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache import models
from logitcache.corpus import (
    CorpusFile,
    PackingPolicy,
    corpus_files_identity,
    iter_documents,
    pack_to_file,
    resolve_policy,
)
from logitcache.dump_options import DumpOptions
from logitcache.errors import CorpusError
from logitcache.store import Layout, Manifest, TokenFile, load_document


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
    def prepare(cls, options: DumpOptions, files: Sequence[CorpusFile], tokenizer: Any) -> Corpus:
        """Find the tokens that an earlier run left, or tokenise. Raises CorpusError."""
        policy = resolve_policy(tokenizer, options.block_length, options.bos, options.eos)
        inputs = {
            "files": corpus_files_identity(files),
            "packing": policy.to_dict(),
            "text_field": options.text_field,
            "max_tokens": options.max_tokens,
        }
        identity = models.tokenizer_identity(tokenizer)
        key = {**inputs, "tokenizer": identity["sha256"]}
        layout = Layout(options.outputs[0].root)
        stored = TokenFile(layout.work)
        found = _facts_of_finished(options, inputs) or stored.find(key)
        facts = found or cls._tokenise(options, files, tokenizer, policy, stored, key)
        return cls({**inputs, **facts}, identity, stored, options.block_length, new=found is None)

    @staticmethod
    def _tokenise(
        options: DumpOptions,
        files: Sequence[CorpusFile],
        tokenizer: Any,
        policy: PackingPolicy,
        stored: TokenFile,
        key: dict[str, Any],
    ) -> dict[str, Any]:
        stored.prepare()
        documents = iter_documents(files, options.text_field)
        try:
            blocks = pack_to_file(tokenizer, documents, policy, stored.path, options.max_tokens)
        except CorpusError:
            stored.discard()
            raise
        facts = {
            "num_tokens": blocks.num_tokens,
            "documents": blocks.documents,
            "empty_documents": blocks.empty_documents,
            "sha256": blocks.sha256,
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
    def num_tokens(self) -> int:
        return int(self.record["num_tokens"])

    def read(self, first: int, stop: int) -> NDArray[np.int64]:
        """Blocks [first, stop) as int64 [B, L], padded at the corpus' end."""
        return self._stored.read(first * self._block_length, stop * self._block_length).reshape(-1, self._block_length)


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
