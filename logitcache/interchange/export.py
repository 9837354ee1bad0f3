"""Caches -> folders of Parquet files that other tools read. Streams chunk by chunk; the folder appears whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import UsageError
from logitcache.interchange import distillkit_rows, positions, trl_rows
from logitcache.interchange.distillkit import DistillKitLayout
from logitcache.interchange.folder import new_folder
from logitcache.interchange.rows import RealRows, Writer
from logitcache.store import Blocks, Cache
from logitcache.store.layout import refuse_sources

TARGETS = ("parquet", "distillkit", "trl")
FILE_TOKENS = 1 << 20
# Rows of long lists (blocks) are grouped by so many tokens, so that a reader decodes few at once.
GROUP_TOKENS = 1 << 14


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Args:
        files: names in the folder, in the order written.
        num_bytes: of all of them.
        blocks, tokens: how many were exported.
    """

    files: list[str]
    num_bytes: int
    blocks: int
    tokens: int


def export_cache(
    cache: Cache,
    target: str,
    out: Path,
    blocks: tuple[int, int] | None = None,
    layout: DistillKitLayout | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write `cache`, or blocks [A, B) of it, as the folder `out` of Parquet files (zstd, page checksums).

    Args:
        target: "parquet" (one row a position, for viewers and queries), "distillkit" (DistillKit's capture schema)
            or "trl" (one row a block, pre-tokenised); docs/interchange.md lists the columns.
        layout: for "distillkit"; by default `distillkit_rows.default_layout`.
        progress: called with the tokens done and all tokens.

    Raises:
        UsageError: the block range or the layout makes no sense for this cache, or `out` is it or lies inside it.
        InterchangeError: the target cannot express this cache's selection, or `out` is not empty.
        CacheError, DamagedCacheError: reading the cache or writing the folder failed; `out` is then untouched.
    """
    refuse_sources(out, [cache.root])
    first, stop = blocks or (0, cache.num_blocks)
    if not 0 <= first < stop <= cache.num_blocks:
        raise UsageError(f"blocks {first}:{stop} are outside {cache.location}; choose A:B within 0:{cache.num_blocks}")
    writer = _writer(cache, target, layout)
    geometry = cache.manifest.identity.geometry
    tokens = geometry.tokens_in(first, stop)
    schema = writer.schema().with_metadata(_metadata(cache, target, first, stop))
    file_blocks = max(1, FILE_TOKENS // cache.block_length)
    starts = range(first, stop, file_blocks)
    done = 0
    with new_folder(out) as folder:
        for number, start in enumerate(starts):
            end = min(start + file_blocks, stop)
            with folder.parquet(f"data/train-{number:05d}-of-{len(starts):05d}.parquet", schema) as file:
                for part in _parts(cache, start, end, geometry.chunk_blocks):
                    rows = RealRows.of(part)
                    table = writer.table(rows).cast(schema)
                    file.write_table(table, row_group_size=_group_rows(target, cache.block_length, table.num_rows))
                    done += len(rows)
                    progress(done, tokens)
        for name, content in writer.side_files().items():
            folder.text(name, content)
        folder.text("README.md", _card(cache, target, first, stop, tokens, writer))
    return ExportReport(folder.names, folder.num_bytes, stop - first, tokens)


def _writer(cache: Cache, target: str, layout: DistillKitLayout | None) -> Writer:
    if layout is not None and target != "distillkit":
        raise UsageError(f"a DistillKit layout makes no sense for {target}; leave it out")
    if target == "distillkit":
        return distillkit_rows.DistillKitRows.for_cache(cache, layout)
    if target == "trl":
        return trl_rows.TrlRows.for_cache(cache)
    if target == "parquet":
        return positions.Positions(cache.masked)
    raise UsageError(f"{target!r} is no export target; choose one of {', '.join(TARGETS)}")


def _parts(cache: Cache, first: int, stop: int, chunk_blocks: int) -> Iterator[Blocks]:
    for start in range(first, stop, chunk_blocks):
        yield cache.read_blocks(start, min(start + chunk_blocks, stop))


def _group_rows(target: str, block_length: int, rows: int) -> int:
    """Rows of a Parquet row group: a chunk of positions, or about 16,384 tokens of blocks."""
    return rows if target == "parquet" else max(1, GROUP_TOKENS // block_length)


def _facts(cache: Cache, target: str, first: int, stop: int) -> dict[str, object]:
    identity = cache.manifest.identity
    return {
        "target": target,
        "fingerprint": cache.fingerprint,
        "teacher": identity.teacher.get("name"),
        "selection": identity.selection.model_dump(mode="json"),
        "seed": identity.seed,
        "unbiased": cache.unbiased,
        "tokenizer_sha256": identity.tokenizer.get("sha256"),
        "vocab_size": cache.vocab_size,
        "block_length": cache.block_length,
        "first_block": first,
        "stop_block": stop,
    }


def _metadata(cache: Cache, target: str, first: int, stop: int) -> dict[str, str]:
    return {"logitcache": json.dumps(_facts(cache, target, first, stop), sort_keys=True)}


def _card(cache: Cache, target: str, first: int, stop: int, tokens: int, writer: Writer) -> str:
    """README.md: what the files are, also for the Hub, which reads the first lines."""
    columns = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in writer.columns().items())
    facts = "".join(f"- {name}: {value}\n" for name, value in _facts(cache, target, first, stop).items())
    return (
        "---\nconfigs:\n- config_name: default\n  data_files: data/train-*.parquet\n---\n\n"
        f"# Teacher distributions of {tokens:,} tokens\n\nExported by `logitcache export --to {target}`.\n\n{facts}\n"
        f"| column | holds |\n|---|---|\n{columns}\n{writer.notes()}\n"
    )
