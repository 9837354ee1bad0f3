"""Text, JSONL, Parquet, Arrow -> documents -> fixed blocks of token ids. Imports neither torch nor transformers."""

from logitcache.corpus.beginning import check_beginning
from logitcache.corpus.chat import ChatTemplate
from logitcache.corpus.documents import Document
from logitcache.corpus.encoding import Encoded, encode_corpus
from logitcache.corpus.fields import CorpusFields
from logitcache.corpus.packing import TokenBlocks, pack, pack_encoded, pack_encoded_to_file
from logitcache.corpus.policy import PackingPolicy, resolve_policy
from logitcache.corpus.readers import iter_documents
from logitcache.corpus.sources import CorpusFile, corpus_files_identity, expand_paths

__all__ = [
    "ChatTemplate",
    "CorpusFields",
    "CorpusFile",
    "Document",
    "Encoded",
    "PackingPolicy",
    "TokenBlocks",
    "check_beginning",
    "corpus_files_identity",
    "encode_corpus",
    "expand_paths",
    "iter_documents",
    "pack",
    "pack_encoded",
    "pack_encoded_to_file",
    "resolve_policy",
]
