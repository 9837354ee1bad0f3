"""Caches for the tests of reading, training and the command line: random rows, and real dumps of a tiny teacher."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from logitcache.store import Cache, CacheWriter, Geometry, open_cache
from tests.store.caches import commit, content, identity
from tests.tiny import save_tiny

BLOCK_LENGTH = 32
# Ten shards of two or three chunks: more than a window of shards, and more than a window of chunks.
MANY_SHARDS = Geometry(num_tokens=247, block_length=5, chunk_blocks=2, unit_blocks=5)
STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def random_cache(root: Path, kind: str = "counts", seed: int = 0, geometry: Geometry = MANY_SHARDS) -> Cache:
    """A finished cache of random `sample:9` ("counts") or top-k ("logprob") rows, opened."""
    tokens, targets = content(kind, seed, geometry)
    writer = CacheWriter.open(root, identity(kind, seed, geometry))
    for unit in writer.pending_units():
        commit(writer, unit, tokens, targets)
    writer.finalize()
    return open_cache(root)


@dataclass(frozen=True)
class Dumped:
    """A tiny teacher (llama, 300 ids), its corpus, and caches of it from one dump with blocks of 32 tokens.

    Args:
        top_k: of 8 ids a row.
        sample: of 20 draws a row.
        varopt: of 8 ids a row.
        dense: of all 300 ids.
    """

    teacher: Path
    corpus: Path
    top_k: Path
    sample: Path
    varopt: Path
    dense: Path


def corpus_text(lines: int, first: int = 0) -> str:
    """Some English with numbers in it: about 34 tokens a line."""
    return "".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(first, first + lines))


def dump_tiny(root: Path) -> Dumped:
    """Make a teacher and its caches below `root`."""
    from logitcache.dump import DumpOptions, Output, run_dump
    from logitcache.selection import Selection

    folders = {name: root / name for name in ("top_k", "sample", "varopt", "dense")}
    made = Dumped(save_tiny(root / "teacher"), root / "corpus.txt", **folders)
    made.corpus.write_text(corpus_text(100))
    specs = {"top-k:8": made.top_k, "sample:20": made.sample, "varopt:8": made.varopt, "top-k:300": made.dense}
    outputs = tuple(Output(Selection.parse(spec), folder) for spec, folder in specs.items())
    run_dump(
        DumpOptions(
            teacher=str(made.teacher),
            corpus=(str(made.corpus),),
            outputs=outputs,
            device="cpu",
            block_length=BLOCK_LENGTH,
            unit_tokens=512,
        )
    )
    return made


def dump_orphan(root: Path, made: Dumped) -> Path:
    """Make a cache whose teacher is no longer where the dump found it."""
    from logitcache.dump import DumpOptions, Output, run_dump
    from logitcache.selection import Selection

    shutil.copytree(made.teacher, root / "gone")
    output = Output(Selection.parse("top-k:4"), root / "orphan")
    run_dump(DumpOptions(str(root / "gone"), (str(made.corpus),), (output,), device="cpu", block_length=BLOCK_LENGTH))
    shutil.rmtree(root / "gone")
    return root / "orphan"


def student_yaml(path: Path, **changes: Any) -> Path:
    """Write a student's config; a change to None leaves the key out."""
    values = {key: value for key, value in {**STUDENT, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return path
