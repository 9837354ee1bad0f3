"""Encoding and commits beside the teacher's forward passes: order, errors, leases, and what is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from logitcache import dump_corpus
from logitcache.dump import run_dump
from logitcache.dump_pipeline import Pipeline
from logitcache.engines.worker import lease_of
from logitcache.errors import CacheError, ModelError
from logitcache.progress import Silent
from logitcache.store import CacheWriter, Layout, open_cache, verify
from logitcache.store.files import FAILPOINT_VARIABLE
from logitcache.teachers import TransformersTeacher
from tests.engines.dumps import content, options

# Beyond it a test that would hang forever fails instead.
HANGS = 60.0


# ---------------------------------------------------------------------------------------------- the thread


def test_work_is_done_in_order_one_piece_behind() -> None:
    """The second piece is given when the first has ended; results are told in the giver's thread."""
    log: list[tuple[str, int, int]] = []
    first = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            first.wait(HANGS)
        log.append(("done", number, threading.get_ident()))
        return number * 10

    def told(result: int) -> None:
        log.append(("told", result, threading.get_ident()))

    with Pipeline() as pipeline:
        pipeline.submit(lambda: work(0), told)
        pipeline.check()
        assert not log
        first.set()
        pipeline.submit(lambda: work(1), told)
        assert [entry[:2] for entry in log[:2]] == [("done", 0), ("told", 0)]
        assert pipeline.drain()
        assert not pipeline.drain()
    assert [entry[:2] for entry in log] == [("done", 0), ("told", 0), ("done", 1), ("told", 10)]
    assert {thread for what, _, thread in log if what == "told"} == {threading.get_ident()}
    assert threading.get_ident() not in {thread for what, _, thread in log if what == "done"}
    assert 0 < pipeline.waited <= pipeline.busy + 1


@pytest.mark.parametrize("how", ["check", "submit", "drain", "leave"])
def test_an_error_reaches_the_giver_once(how: str) -> None:
    def fail() -> int:
        raise CacheError("no room")

    told: list[int] = []
    ended = threading.Event()

    def use(pipeline: Pipeline) -> None:
        with pipeline:
            pipeline.submit(fail, told.append)
            if how == "check":
                # The thread's next piece begins when the failed one is over.
                pipeline._executor.submit(ended.set)
                assert ended.wait(HANGS)
                pipeline.check()
            elif how == "submit":
                pipeline.submit(lambda: 1, told.append)
            elif how == "drain":
                pipeline.drain()

    pipeline = Pipeline()
    with pytest.raises(CacheError, match="no room"):
        use(pipeline)
    assert told == []
    assert not pipeline.drain()


def test_leaving_with_an_error_lets_the_work_end() -> None:
    ended: list[int] = []
    begun, told = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        told.wait(HANGS)
        ended.append(1)
        return 1

    def be_interrupted() -> None:
        with Pipeline() as pipeline:
            pipeline.submit(work, ended.append)
            begun.wait(HANGS)
            threading.Timer(0.01, told.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert ended == [1]


# ---------------------------------------------------------------------------------------------- a dump


def test_a_unit_is_committed_while_the_next_is_computed(
    place: Path, teacher: TransformersTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commit waits until the teacher has the second unit's first batch; both units' leases are held."""
    root, other = tmp_path / "cache", tmp_path / "other"
    run_dump(options(place, other), teacher=teacher)
    batches: list[int] = []
    second_unit, leases = threading.Event(), []
    commit = CacheWriter.commit_unit

    def note_batch(_module: Any, _inputs: Any, output: Any) -> None:
        batches.append(len(output.last_hidden_state))
        if sum(batches) > 6:
            second_unit.set()

    def commit_late(self: CacheWriter, unit: int, *arguments: Any) -> int:
        if unit == 0:
            assert second_unit.wait(HANGS), "the teacher stood still during a commit"
            leases.extend(path.stem for path in Layout(root).leases.iterdir())
        return commit(self, unit, *arguments)

    monkeypatch.setattr(CacheWriter, "commit_unit", commit_late)
    hook = teacher.model.base_model.register_forward_hook(note_batch)
    try:
        report = run_dump(options(place, root), teacher=teacher)
    finally:
        hook.remove()
    assert {lease_of(0), lease_of(1)} <= set(leases)
    assert report.encode_seconds > 0
    assert 0 <= report.waited_seconds <= report.seconds
    assert content(root).keys() == content(other).keys()
    assert verify(root).ok


def test_a_failed_commit_ends_the_dump_at_once(
    place: Path, teacher: TransformersTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more is computed than what was under way; the same line resumes."""
    given = options(place, tmp_path / "cache")
    batches: list[int] = []
    hook = teacher.model.base_model.register_forward_hook(lambda *_: batches.append(1))
    monkeypatch.setenv(FAILPOINT_VARIABLE, "commit.after_write:error")
    with pytest.raises(CacheError, match=r"cannot be written \(failpoint commit.after_write"):
        run_dump(given, teacher=teacher)
    hook.remove()
    # Two batches a unit: the second unit may be computed whole while the first fails, but no third.
    assert len(batches) <= 4
    assert not list((tmp_path / "cache" / "commits").glob("*.json"))
    assert not list(Layout(tmp_path / "cache").work.glob("leases/*"))
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    run_dump(given, teacher=teacher)
    assert verify(tmp_path / "cache").ok


def test_what_is_under_way_when_the_teacher_fails_is_committed(
    place: Path, teacher: TransformersTeacher, tmp_path: Path
) -> None:
    def poison(_module: Any, _inputs: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            output.last_hidden_state[:] = float("nan")

    calls: list[int] = []
    hook = teacher.model.base_model.register_forward_hook(poison)
    with pytest.raises(ModelError, match="block 6, position 0"):
        run_dump(options(place, tmp_path / "cache"), teacher=teacher)
    hook.remove()
    assert [path.stem for path in (tmp_path / "cache" / "commits").glob("*.json")] == ["000000"]


def test_bytes_are_told_with_the_tokens_they_are_of(place: Path, teacher: TransformersTeacher, tmp_path: Path) -> None:
    """Whatever is computed meanwhile, bytes per token are those of what is committed."""

    class Told(Silent):
        def __init__(self) -> None:
            self.told: list[tuple[int, int, int]] = []

        def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
            self.told.append((done, computed, num_bytes))

    progress = Told()
    run_dump(options(place, tmp_path / "cache"), progress, teacher)
    shards = open_cache(tmp_path / "cache").manifest.shards
    bytes_of = {0: 0}
    for count in range(1, len(shards) + 1):
        tokens = sum(shard.num_tokens for shard in shards[:count])
        bytes_of[tokens] = sum(shard.num_bytes for shard in shards[:count])
    seen = dict.fromkeys(num_bytes for _, _, num_bytes in progress.told)
    assert list(seen) == sorted(bytes_of.values())
    for known in seen:
        # What the view divides by: the tokens told when the bytes change.
        computed = next(computed for _, computed, num_bytes in progress.told if num_bytes == known)
        assert known == 0 or bytes_of[computed] == known
    done = [done for done, _, _ in progress.told]
    assert done == sorted(done)


def test_tokenising_is_told(
    place: Path, teacher: TransformersTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stages(Silent):
        def __init__(self) -> None:
            self.told: list[str] = []

        def stage(self, what: str) -> None:
            self.told.append(what)

    progress = Stages()
    monkeypatch.setattr(dump_corpus, "_TOLD_SECONDS", 0.0)
    report = run_dump(options(place, tmp_path / "cache"), progress, teacher)
    assert f"tokenising the corpus, {report.tokens:,} tokens so far" in progress.told
