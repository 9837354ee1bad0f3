"""What `logitcache verify --against-teacher` says of caches that are right, and of each known fault, on a real teacher.

python -m benchmarks.audit [--tokens 1536] [--rows 300] [--save]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from logitcache import models
from logitcache.audit import AuditOptions, AuditReport, audit_cache
from logitcache.demo import other_domain_text, plays, teacher_folder
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.selection import Selection
from logitcache.store import Blocks, CacheWriter, open_cache
from logitcache.targets import SparseTargets
from logitcache.teachers import BlockBatch, TransformersTeacher
from logitcache.teachers.capture import capture_blocks

BLOCK_LENGTH = 256
SPECS = ("top-k:16", "sample:25", "varopt:12")
HEADER = ("cache", "audited with", "label", "limit", "largest of its limit", "verdict", "explained", "s")


def dump(root: Path, dtype: str, tokens: int, specs: tuple[str, ...]) -> None:
    outputs = tuple(Output(Selection.parse(spec), root / f"{dtype} {spec}") for spec in specs)
    corpus = (str(plays(print)["hamlet"]),)
    run_dump(
        DumpOptions(
            str(teacher_folder(print)), corpus, outputs, dtype=dtype, block_length=BLOCK_LENGTH, max_tokens=tokens
        )
    )


def rewrite(source: Path, root: Path, change: Callable[[Blocks], SparseTargets]) -> Path:
    """A cache of the same plan with other rows; `source` has whole blocks only."""
    cache = open_cache(source)
    writer = CacheWriter.open(root, cache.manifest.identity, cache.manifest.origin)
    geometry, length = writer.geometry, cache.block_length
    for unit in writer.pending_units():
        first, stop = geometry.unit_range(unit)
        chunks = []
        for begin in range(first, stop, geometry.chunk_blocks):
            blocks = cache.read_blocks(begin, min(begin + geometry.chunk_blocks, stop))
            assert blocks.valid.all(), f"take a multiple of {length} tokens"
            chunks.append(writer.encode(begin, blocks.tokens.ravel(), change(blocks)))
        writer.commit_unit(unit, chunks)
    writer.finalize()
    return root


def shifted(blocks: Blocks) -> SparseTargets:
    """Row t is that of t - 1."""
    places = np.arange(blocks.tokens.size).reshape(blocks.tokens.shape)
    return blocks.targets.take(np.maximum(places - 1, places[:, :1]).ravel())


def with_bos(blocks: Blocks) -> SparseTargets:
    """As a server that puts a BOS before every prompt would answer."""
    teacher = TransformersTeacher.load(teacher_folder(print))
    fed = np.insert(blocks.tokens, 0, teacher.tokenizer.bos_token_id, axis=1)
    parts = []
    for number, row in enumerate(fed):
        [targets] = capture_blocks(
            teacher, BlockBatch(row[None], blocks.first_block + number, row.size, [Selection.parse(SPECS[0])], 0)
        )
        parts.append(targets.slice(1, row.size))
    return SparseTargets.concatenate(parts)


def fine_tuned(root: Path, rate: float) -> Path:
    """The teacher after one step of AdamW on 512 tokens of another domain."""

    def step(model: Any, tokenizer: Any) -> None:
        ids = torch.tensor([tokenizer(other_domain_text().read_text()[:8000])["input_ids"][:512]])
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return changed(root, step)


def rounded(root: Path) -> Path:
    """The teacher with bfloat16's digits in float32 files."""

    @torch.no_grad()
    def round_weights(model: Any, _: Any) -> None:
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())

    return changed(root, round_weights)


def changed(root: Path, change: Callable[[Any, Any], None]) -> Path:
    model, tokenizer = models.load_model(teacher_folder(print)), models.load_tokenizer(teacher_folder(print))
    change(model, tokenizer)
    models.save_model(model, root, tokenizer)
    return root


def cases(root: Path) -> Iterator[tuple[str, str, Path, AuditOptions]]:
    """What the cache is, what it is audited with, its folder and the options."""
    teacher = str(teacher_folder(print))
    for spec in SPECS:
        yield f"{spec}, float32", "its teacher", root / f"float32 {spec}", AuditOptions(teacher)
    top, drawn = (root / f"float32 {spec}" for spec in SPECS[:2])
    half = root / f"bfloat16 {SPECS[0]}"
    yield f"{SPECS[0]}, bfloat16", "its teacher", half, AuditOptions(teacher)
    yield f"{SPECS[0]}, bfloat16", "its teacher in float32", half, AuditOptions(teacher, dtype="float32")
    yield f"{SPECS[0]}, float32", "its teacher in bfloat16", top, AuditOptions(teacher, dtype="bfloat16")
    moved = rewrite(drawn, root / "moved", shifted)
    yield f"{SPECS[1]}, rows shifted by one", "its teacher", moved, AuditOptions(teacher)
    silent = rewrite(top, root / "bos", with_bos)
    yield f"{SPECS[0]}, a BOS that the cache does not have", "its teacher", silent, AuditOptions(teacher)
    for rate in (1e-5, 1e-6, 1e-7):
        tuned = fine_tuned(root / f"tuned {rate}", rate)
        yield f"{SPECS[1]}, float32", f"after one step of AdamW at {rate:g}", drawn, AuditOptions(str(tuned))
    coarse = rounded(root / "rounded")
    yield f"{SPECS[0]}, float32", "weights rounded to bfloat16, in float32", top, AuditOptions(str(coarse))


def line(cache: str, audited: str, found: AuditReport, seconds: float) -> list[str]:
    label = next(figure for figure in found.figures if (figure.measure, figure.part) == ("label", "rest"))
    over = max(found.figures, key=lambda figure: figure.mean / figure.limit)
    return [
        cache,
        audited,
        f"{label.mean:.1e}",
        f"{label.limit:.1e}",
        f"{over.measure}: {over.mean / over.limit:,.2f}",
        found.verdict,
        found.fits or "",
        f"{seconds:.0f}",
    ]


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=1536)
    arguments.add_argument("--rows", type=int, default=300)
    given = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dump(root, "float32", given.tokens, SPECS)
        dump(root, "bfloat16", given.tokens, SPECS[:1])
        for cache, audited, path, options in cases(root):
            started = time.perf_counter()
            found = audit_cache(path, AuditOptions(**{**options.__dict__, "rows": given.rows}))
            rows.append(line(cache, audited, found, time.perf_counter() - started))
            print(" | ".join(rows[-1]), flush=True)
    body = (
        f"SmolLM2-135M on Hamlet, {given.tokens:,} tokens in blocks of {BLOCK_LENGTH}, {given.rows} rows looked at. "
        "`label`: mean of (difference of log p(next token))^2 / 2 past the first 16 positions, nats; its limit is 4 "
        "times that of the teacher against itself.\n\n" + report.table(HEADER, rows)
    )
    report.publish("audit", "python -m benchmarks.audit", body, given.save)


if __name__ == "__main__":
    main()
