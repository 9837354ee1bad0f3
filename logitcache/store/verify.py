"""Checks every byte of a cache and lists what is wrong, as exactly as it can be located."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from logitcache.errors import CacheError, DamagedCacheError, counted
from logitcache.store.cache import Cache, open_cache
from logitcache.store.commits import read_commits
from logitcache.store.container import open_container
from logitcache.store.documents import read_commit, read_plan
from logitcache.store.layout import Layout
from logitcache.store.location import S3Location, parse_location
from logitcache.store.objects import Objects
from logitcache.store.schema import Plan, Shard, load_document


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `array` and `chunk` are empty when the damage cannot be placed that closely."""

    shard: str
    array: str
    chunk: int | None
    what: str


@dataclass
class Report:
    """What `verify` found; `ok` when there is no problem.

    Args:
        problems: all that is wrong.
        shards: shards that were checked.
        tokens: tokens of those that are whole.
        counted: those of them whose next token is one to learn; in a cache without a mask all.
        nonfinite: rows that the manifest says were left out as the teacher's logits were not finite; None where that
            was an error, or where it is not known.
        num_bytes: of all files that were checked: shards, tables, commit records, plan and manifest.
        unfinished: whether units are still to be committed.
    """

    problems: list[Problem] = field(default_factory=list)
    shards: int = 0
    tokens: int = 0
    counted: int = 0
    nonfinite: int | None = None
    num_bytes: int = 0
    unfinished: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(location: str | Path) -> Report:
    """Check manifest, plan, commits, tables and every chunk of every shard of a cache.

    An unfinished cache is checked up to its commits. Of a remote cache every object is fetched anew, one shard at a
    time. Raises CacheError only when there is no cache at all or it cannot be read, and RemoteError; damage is listed
    in the report.
    """
    report = Report()
    place = parse_location(location)
    try:
        if isinstance(place, S3Location):
            from logitcache.store.remote import fetched_anew

            with fetched_anew(place) as (cache, objects):
                _check_objects(cache, objects, report)
                _check(cache, report)
        else:
            cache = open_cache(place, partial=True)
            _check_documents(cache, Layout(place), report)
            _check(cache, report)
    except DamagedCacheError as error:
        report.problems.append(Problem("", "", None, str(error)))
    return report


def _check(cache: Cache, report: Report) -> None:
    """Check tables and shards."""
    report.unfinished, report.num_bytes = not cache.manifest.complete, cache.num_bytes
    report.nonfinite = cache.num_nonfinite
    readable = _check_codebook(cache, report)
    for number, shard in enumerate(cache.manifest.shards):
        report.shards += 1
        found = len(report.problems)
        _check_shard(cache, number, report, decode=readable)
        if len(report.problems) == found:
            report.tokens += shard.num_tokens
        cache.close()
    said = cache.manifest.counters.get("counted", 0)
    if readable and cache.masked and report.ok and report.counted != said:
        what = f"{report.counted} positions count, not the {said} that the manifest's counters say"
        report.problems.append(Problem("", "counted", None, what))
    elif readable and report.ok:
        _check_left_out(cache, report)


def _check_left_out(cache: Cache, report: Report) -> None:
    """Where nothing else masks positions, those that do not count and have a next token were left out."""
    identity = cache.manifest.identity
    if report.nonfinite is None or not identity.masks_only_nonfinite:
        return
    # A block's last token is the only one without a next.
    followed = report.tokens - sum(shard.num_blocks for shard in cache.manifest.shards)
    if report.counted + report.nonfinite != followed:
        missing = followed - report.counted
        what = f"{missing} rows are missing, not the {report.nonfinite} that the manifest's counters say were left out"
        report.problems.append(Problem("", "counted", None, what))


def _check_documents(cache: Cache, layout: Layout, report: Report) -> None:
    try:
        plan = load_document(layout.plan, Plan)
        if plan.identity != cache.manifest.identity:
            report.problems.append(Problem("", "", None, f"{layout.plan} is not the plan of this manifest"))
            return
        commits = [Shard.of(commit) for commit in read_commits(layout, plan)]
        if commits != cache.manifest.shards:
            report.problems.append(Problem("", "", None, f"{layout.commits} differs from the manifest's shard list"))
    except CacheError as error:
        report.problems.append(Problem("", "", None, str(error)))


def _check_objects(cache: Cache, objects: Objects, report: Report) -> None:
    """Plan and commits of a remote cache."""
    readers: list[Callable[[], object]] = [partial(read_plan, objects, cache.manifest)]
    readers += [partial(read_commit, objects, cache.manifest, shard) for shard in cache.manifest.shards]
    for read in readers:
        try:
            read()
        except CacheError as error:
            report.problems.append(Problem("", "", None, str(error)))


def _check_codebook(cache: Cache, report: Report) -> bool:
    """Whether shards can be decoded."""
    try:
        if cache.manifest.shards:
            cache.codebook()
    except CacheError as error:
        report.problems.append(Problem("", "codebook", None, str(error)))
        return False
    return True


def _check_shard(cache: Cache, number: int, report: Report, decode: bool) -> None:
    """A shard with the right hash is decoded; one with another hash is searched for the chunks that fail.

    Without its codebook, which is a problem by itself, nothing can be decoded: `decode` is False.
    """
    shard = cache.manifest.shards[number]
    try:
        cache.files.check_shard(shard)
    except CacheError as error:
        located = _damaged_chunks(Layout(cache.root).shards / shard.file)
        report.problems += located or [Problem(shard.file, "", None, str(error))]
        return
    if not decode:
        return
    entries = 0
    for ref in (ref for ref in cache.chunks if ref.shard == number):
        try:
            blocks = cache.read_chunk(ref)
            entries += int(blocks.targets.ids.size)
            report.counted += int((blocks.valid if blocks.counted is None else blocks.counted).sum())
        except CacheError as error:
            where = error if isinstance(error, DamagedCacheError) else DamagedCacheError("")
            report.problems.append(Problem(shard.file, where.array, ref.chunk, str(error)))
            return
    if entries != shard.num_entries:
        name = cache.files.shard_name(shard)
        what = f"{name} holds {counted(entries, 'entry', 'entries')}, not the {shard.num_entries} that were committed"
        report.problems.append(Problem(shard.file, "", None, what))


def _damaged_chunks(path: Path) -> list[Problem]:
    try:
        container = open_container(path)
    except CacheError:
        return []
    problems = []
    for name in container.sizes:
        for chunk in range(container.num_chunks):
            try:
                container.read(name, chunk)
            except CacheError as error:
                problems.append(Problem(path.name, name, chunk, str(error)))
    container.close()
    return problems
