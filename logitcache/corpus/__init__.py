"""Text, JSONL and Parquet files -> documents -> fixed blocks of token ids. Imports neither torch nor transformers."""

from logitcache.corpus.documents import Document
from logitcache.corpus.packing import TokenBlocks, pack, pack_to_file
from logitcache.corpus.policy import PackingPolicy, resolve_policy
from logitcache.corpus.readers import iter_documents
from logitcache.corpus.sources import CorpusFile, corpus_files_identity, expand_paths

__all__ = [
    "CorpusFile",
    "Document",
    "PackingPolicy",
    "TokenBlocks",
    "corpus_files_identity",
    "expand_paths",
    "iter_documents",
    "pack",
    "pack_to_file",
    "resolve_policy",
]
