"""Does a cache hold what this teacher says? Random rows are computed again and compared: docs/audit.md.

Run A computes the rows as a dump would, and what is stored is compared with it. Run B is the same teacher at another
batch size: A's rows, stored as the cache would store them, are compared with it, and that is the band of noise. Only
where the cache is outside it, suspicions are tried, and run C is the teacher in another dtype.

Legend: n picked rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache import models
from logitcache.audit.measures import Measured, measure
from logitcache.audit.picked import PickedRows
from logitcache.audit.recompute import View, recompute
from logitcache.audit.report import AuditOptions, AuditReport
from logitcache.audit.suspicions import suspicions_of
from logitcache.audit.verdict import Figure, figures_of
from logitcache.errors import CacheError, ModelError
from logitcache.progress import Progress, Silent
from logitcache.selection import block_uniforms
from logitcache.selection.select import select
from logitcache.store import Cache, Identity, open_cache
from logitcache.targets import SparseTargets
from logitcache.teachers import TransformersTeacher

# Enough rows to see whether a suspicion fits, and cheap beside the runs.
SUSPICION_BLOCKS = 3
FAR_BETTER = 10
KNOWN_BOUNDARIES = (None, "attended", "unknown")


def audit_cache(location: str | Path, options: AuditOptions, progress: Progress | None = None) -> AuditReport:
    """Compare random rows of a cache with what a teacher says of the same tokens.

    The tokens are the cache's own. An unfinished cache is audited up to its commits.

    Raises:
        CacheError: there is no cache, it holds no rows yet, or nothing in them can be compared.
        DamagedCacheError, RemoteError: rows cannot be read.
        ModelError: the teacher cannot be loaded, has another tokenizer or vocabulary, or gives NaN.
        UsageError: an unknown dtype, device or device map.
    """
    progress = progress or Silent()
    cache = open_cache(location, partial=True)
    identity = cache.manifest.identity
    boundaries = identity.corpus.get("document_boundaries")
    if boundaries not in KNOWN_BOUNDARIES:
        raise CacheError(
            f"{cache.location} has document boundaries {boundaries!r}, which no audit can compute again; verify it "
            "without --against-teacher"
        )
    picked = PickedRows.of(cache, options.rows, options.seed)
    progress.stage("loading the teacher")
    tokenizer = _check_tokenizer(identity, options)
    cache_dtype = identity.teacher.get("dtype")
    wanted = cache_dtype if options.dtype == "auto" and cache_dtype in models.DTYPES else options.dtype
    teacher = _load(options, str(wanted))
    _check_fits(cache, teacher)
    runs = _Runs(cache, picked, options, progress)
    progress.stage("running the teacher")
    found, own = runs.against(teacher, picked.targets)
    progress.stage("running it again, block by block")
    band, _ = runs.against(teacher, own, batch_blocks=1)
    report = AuditReport(
        cache=cache.location,
        teacher=options.teacher,
        dtype=_dtype(teacher),
        cache_dtype=None if cache_dtype is None else str(cache_dtype),
        files=_files(identity, options),
        tokenizer=tokenizer,
        rows=len(picked),
        blocks=len(picked.blocks),
        figures=figures_of(found, band, picked.at_start),
    )
    if not report.figures:
        raise CacheError(
            f"the rows of {cache.location} hold nothing that can be compared: no label_logprob, no entropy, and draws "
            "of stored rows; audit the cache they were drawn from"
        )
    if report.verdict == "same teacher":
        return report
    report = _suspect(report, runs, teacher, found)
    if not report.fits_exactly:
        other = "bfloat16" if report.dtype == "float32" else "float32"
        progress.stage(f"running it in {other}")
        del teacher  # two of them may not fit into memory
        precision, _ = runs.against(_load(options, other), own)
        figures = figures_of(found, band, picked.at_start, precision)
        report = replace(report, figures=figures, other_dtype=other)
    return replace(report, blocks_off=_blocks_off(report.figures, found, picked)) if not report.ok else report


class _Runs:
    """The picked rows, and how a run of a teacher is compared with them."""

    def __init__(self, cache: Cache, picked: PickedRows, options: AuditOptions, progress: Progress) -> None:
        self.cache, self.picked, self.progress = cache, picked, progress
        identity = cache.manifest.identity
        self.selection = cache.selection
        # Later steps may have drawn anew, or given the blocks other numbers.
        self.redraws = bool(self.selection.draws) and all(
            step.operation == "convert" or (step.operation == "derive" and "select" not in step.arguments)
            for step in identity.ancestry
        )
        # Draws from a top-k never hit its tail, so that they are not the teacher's.
        self.scores = bool(self.selection.draws) and not self.redraws and identity.mean_tail_mass is None
        self._seed = identity.seed
        self._batch_blocks = max(2, options.batch_tokens // cache.block_length)

    @torch.inference_mode()
    def against(
        self, teacher: TransformersTeacher, stored: SparseTargets, batch_blocks: int | None = None
    ) -> tuple[Measured, SparseTargets]:
        """Stored rows [n] against a teacher, and its own rows as this cache would store them."""
        picked, uniforms = self.picked, self._uniforms()
        measured: Measured = {}
        parts, length = [], self.cache.block_length
        for rows, dist, labels in recompute(teacher, picked, batch_blocks or self._batch_blocks):
            again = select(self.selection, dist, None if uniforms is None else uniforms[rows])
            found = measure(stored.take(rows), dist, labels, again if self.redraws else None, self.scores)
            for name, values in found.items():
                measured.setdefault(name, np.full(len(picked), np.nan))[rows] = values
            columns = (dist.label_logprob(labels).cpu().numpy(), dist.entropy().cpu().numpy())
            parts.append(again.with_columns(*columns))
            done = (int(picked.block[rows[-1]]) + 1) * length
            self.progress.advance(done, picked.tokens.size, done, 0)
        codec = self.cache.codec
        # Of a cache with a mask only rows that count were picked.
        counted = np.ones(len(picked), dtype=bool) if codec.masked else None
        coded = codec.code(SparseTargets.concatenate(parts), np.random.default_rng(self._seed).random, counted)
        return measured, codec.targets(coded)

    @torch.inference_mode()
    def under(self, teacher: TransformersTeacher, view: View, picked: PickedRows) -> Measured:
        """Some of the rows against a teacher, by columns and exact weights, as if they were those of a view."""
        measured: Measured = {}
        for rows, dist, labels in recompute(teacher, picked, self._batch_blocks, view):
            for name, values in measure(picked.targets.take(rows), dist, labels).items():
                measured.setdefault(name, np.full(len(picked), np.nan))[rows] = values
        return measured

    def _uniforms(self) -> NDArray[np.float64] | None:
        """float64 [n, draws]: the random numbers of the rows."""
        if not self.selection.draws:
            return None
        length, parts = self.cache.block_length, []
        for number, block in enumerate(self.picked.blocks.tolist()):
            place = self.picked.place[self.picked.block == number]
            parts.append(block_uniforms(self._seed, [block], length, self.selection.draws)[place])
        return np.concatenate(parts)


def _suspect(report: AuditReport, runs: _Runs, teacher: TransformersTeacher, found: Measured) -> AuditReport:
    """The report with the suspicion that fits, if one does; tried on the blocks that are furthest off."""
    over = {figure.measure for figure in report.figures if figure.verdict != "same teacher"} - {"draws", "score"}
    if not over:
        return report
    runs.progress.stage("looking for what may have gone wrong")
    blocks = _furthest(found, over, runs.picked)
    rows, few = runs.picked.rows_of(blocks), runs.picked.of_blocks(blocks)
    # Those of all rows: few of them may be quieter by chance than what they are compared with.
    limits = {(figure.measure, figure.part): figure.limit for figure in report.figures}

    def means(measured: Measured) -> dict[tuple[str, str], float]:
        made = figures_of({name: measured[name] for name in over}, {}, few.at_start)
        return {(figure.measure, figure.part): figure.mean for figure in made}

    plain = means({name: found[name][rows] for name in over})
    for suspicion in suspicions_of(runs.cache.manifest.identity, few):
        under = means(runs.under(teacher, suspicion.view, few))
        known = [name for name in plain if name in under]
        if known and all(under[name] <= limits[name] for name in known):
            return replace(report, fits=suspicion.says, fits_exactly=True)
        if known and all(under[name] * FAR_BETTER < plain[name] for name in known):
            report = replace(report, fits=suspicion.says)
    return report


def _furthest(found: Measured, names: set[str], picked: PickedRows) -> NDArray[np.int64]:
    """Indices of the few blocks whose rows are furthest off, ascending; not of those that are well beside them."""
    distance = np.zeros(len(picked.blocks))
    for name in names:
        known = ~np.isnan(found[name])
        distance += np.bincount(picked.block[known], found[name][known], minlength=distance.size)
    order = np.argsort(-distance, kind="stable")[:SUSPICION_BLOCKS]
    return np.sort(order[distance[order] * FAR_BETTER >= distance.max()])


def _blocks_off(figures: Sequence[Figure], found: Measured, picked: PickedRows) -> list[int]:
    """Numbers of the blocks in which the mean of a measure is over its limit."""
    off: set[int] = set()
    for figure in figures:
        rows = picked.at_start if figure.part == "start" else ~picked.at_start
        values = found[figure.measure]
        if figure.verdict == "same teacher" or figure.measure == "score":
            continue
        for number, block in enumerate(picked.blocks.tolist()):
            known = values[rows & (picked.block == number) & ~np.isnan(values)]
            if known.size and known.mean() > figure.limit:
                off.add(block)
    return sorted(off)


def _load(options: AuditOptions, dtype: str) -> TransformersTeacher:
    """The teacher, without a tokenizer: the tokens are the cache's."""
    models.resolve_source(options.teacher, options.gguf_file)
    model = models.load_model(
        options.teacher, options.gguf_file, dtype, options.device, options.trust_remote_code, options.device_map
    )
    return TransformersTeacher(model, None, {})


def _dtype(teacher: TransformersTeacher) -> str:
    return str(teacher.head.weight.dtype).removeprefix("torch.")


def _files(identity: Identity, options: AuditOptions) -> Literal["same", "other", "unknown"]:
    recorded = identity.teacher.get("sha256")
    if recorded is None or "imported_from" in identity.teacher:
        return "unknown"
    return "same" if models.model_identity(options.teacher, options.gguf_file)["sha256"] == recorded else "other"


def _check_tokenizer(identity: Identity, options: AuditOptions) -> Literal["same", "not found"]:
    """Raise ModelError where the teacher's tokenizer is not that of the cache: its ids mean other tokens."""
    try:
        if options.tokenizer is not None:
            tokenizer = models.load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
        else:
            tokenizer = models.load_tokenizer(options.teacher, options.gguf_file, options.trust_remote_code)
    except ModelError:
        if options.tokenizer is not None:
            raise
        return "not found"
    found, recorded = models.tokenizer_identity(tokenizer)["sha256"], identity.tokenizer.get("sha256")
    if found != recorded:
        raise ModelError(
            f"the tokenizer in {options.tokenizer or options.teacher} has hash {found[:12]}, the cache was made with "
            f"{str(recorded)[:12]}: ids mean other tokens; give the right teacher, or its tokenizer with --tokenizer"
        )
    return "same"


def _check_fits(cache: Cache, teacher: TransformersTeacher) -> None:
    if teacher.vocab_size != cache.vocab_size:
        raise ModelError(
            f"the teacher's head has {teacher.vocab_size:,} ids, {cache.location} was made with {cache.vocab_size:,}; "
            "give the teacher of this cache"
        )
    # No argument is wrong, as where a dump is told the length: it is the cache that settled it.
    context = models.ModelShape.of_config(teacher.model.config).context
    if context is not None and cache.block_length > context:
        raise ModelError(
            f"blocks of {cache.block_length} tokens are longer than the teacher's context of {context}; give the "
            "teacher of this cache"
        )
