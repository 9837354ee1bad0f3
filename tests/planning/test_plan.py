"""What `logitcache plan` says of a dump is what the dump then writes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from logitcache.algebra import Derivation, derive_cache
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.errors import CacheError, CorpusError, ModelError, TrainingError, UsageError
from logitcache.planning import DumpPlan, PlanOptions, make_plan, planned_outputs
from logitcache.selection import Selection
from logitcache.store import open_cache
from logitcache.teachers import TransformersTeacher
from tests.caches import student_yaml

SPECS = ("top-k:8", "sample:20", "varopt:8")
SAMPLE = 3200


def dump_options(place: Path, folder: Path | None = None, **changes: object) -> DumpOptions:
    selections = [Selection.parse(spec) for spec in SPECS]
    outputs = planned_outputs(selections)
    if folder is not None:
        outputs = tuple(Output(selection, folder / str(n)) for n, selection in enumerate(selections))
    options = DumpOptions(str(place / "teacher"), (str(place / "text.txt"),), outputs, device="cpu", block_length=64)
    return replace(options, **changes)


@pytest.fixture(scope="module")
def plan(place: Path) -> DumpPlan:
    return make_plan(PlanOptions(dump_options(place), sample_tokens=SAMPLE))


@pytest.mark.parametrize(("container", "unit_tokens"), [("zarr", None), ("arrow", 2048)])
def test_sizes_are_those_of_the_dump(
    place: Path, plan: DumpPlan, tmp_path: Path, container: str, unit_tokens: int | None
) -> None:
    options = dump_options(place, tmp_path, container=container, unit_tokens=unit_tokens)
    if container == "arrow":
        options = replace(options, outputs=options.outputs[1:2])
        plan = make_plan(PlanOptions(options, sample_tokens=SAMPLE))
    assert plan.corpus.sample_tokens == SAMPLE
    assert not plan.corpus.whole
    report = run_dump(options)
    assert (report.tokens, plan.corpus.uncertainty) == (plan.corpus.tokens, 0)
    assert report.tokens > 6 * SAMPLE
    found = {}
    for output in options.outputs:
        fast = tmp_path / f"{output.root.name}-fast"
        derive_cache(output.root, fast, Derivation(codec="fast"))
        found[str(output.selection), "small"] = open_cache(output.root).num_bytes
        found[str(output.selection), "fast"] = open_cache(fast).num_bytes
    planned = {(cache.select, cache.codec): cache.bytes for cache in plan.caches}
    assert planned.keys() == found.keys()
    ratios = {name: planned[name] / size for name, size in found.items()}
    assert all(abs(ratio - 1) < 0.05 for ratio in ratios.values()), ratios


def test_a_sample_of_everything_is_exact(place: Path, tmp_path: Path) -> None:
    options = dump_options(place, tmp_path / "out", max_tokens=600, codec="fast")
    plan = make_plan(PlanOptions(options, ("fast",), together=True))
    assert plan.corpus.whole
    assert plan.corpus.tokens == plan.corpus.sample_tokens == 600
    assert not (tmp_path / "out").exists()
    run_dump(options)
    for output, cache in zip(options.outputs, plan.caches, strict=True):
        # The numbers of documents and of file hashes are not known, only about how long they are.
        assert cache.bytes == pytest.approx(open_cache(output.root).num_bytes, abs=32)
        assert (cache.cache, cache.bytes_uncertainty) == (str(output.root), 0)
    assert plan.total_bytes == sum(cache.bytes for cache in plan.caches)


def test_what_a_plan_says(plan: DumpPlan) -> None:
    by_name = {(cache.select, cache.codec): cache for cache in plan.caches}
    assert [*by_name] == [(spec, codec) for spec in SPECS for codec in ("small", "fast")]
    for cache in plan.caches:
        assert cache.cache is None
        assert cache.bytes_per_token == pytest.approx(cache.bytes / plan.corpus.tokens, rel=1e-4)
        assert 0 < cache.bytes_uncertainty < 0.2
        least = (plan.corpus.tokens / cache.tokens_per_second + plan.tokenising_seconds) / 3600
        assert cache.hours == pytest.approx(least + plan.loading_seconds / 3600)
        assert cache.break_even_students > 1, "a dump costs at least what the live teacher of one student costs"
        assert (cache.speed_up, cache.reader_bytes_per_second) == (None, None)
    # Of 512 positions: few draws are far from the full gradient, and biased top-k is, too.
    angles = {spec: by_name[spec, "small"].gradient_angle for spec in SPECS}
    assert all(0 < angle < 90 for angle in angles.values())
    assert angles["sample:20"] > angles["varopt:8"]
    assert plan.gradient_positions == 512


def test_workers_and_machines(place: Path, plan: DumpPlan) -> None:
    options = dump_options(place, workers=3, max_tokens=600, outputs=planned_outputs([Selection.parse("top-k:8")]))
    many = make_plan(PlanOptions(options, ("small",), together=True, machines=4))
    assert (plan.speed_up, many.speed_up) == (1, 4)
    assert "3 workers share this machine's processors" in many.notes[-2]
    assert "that none waits for another is assumed" in many.notes[-1]


def test_a_student_says_what_it_reads(place: Path, tmp_path: Path) -> None:
    options = dump_options(place, max_tokens=600)
    plan = make_plan(PlanOptions(options, ("small",), student=str(student_yaml(tmp_path / "student.yaml"))))
    assert plan.student is not None
    rate = plan.student.tokens_per_second
    assert rate > 0
    for cache in plan.caches:
        assert cache.reader_bytes_per_second == pytest.approx(rate * cache.bytes_per_token)
        assert cache.speed_up is not None
        gains = [*cache.speed_up.values()]
        assert gains == sorted(gains), "the more students share a dump, the better"
        assert (gains[0] > 1) == (cache.break_even_students < 1)


REFUSED = {
    "no corpus": (CorpusError, "does not exist", {"corpus": ("nowhere.txt",)}),
    "no teacher": (ModelError, "no-such-teacher", {"teacher": "./no-such-teacher"}),
    "long blocks": (UsageError, "longer than the teacher's context", {"block_length": 4096}),
    "vocabulary": (UsageError, "301", {"outputs": planned_outputs([Selection.parse("top-k:301")])}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_by_a_dump(place: Path, case: str) -> None:
    error, message, changes = REFUSED[case]
    options = dump_options(place, **changes)
    with pytest.raises(error, match=message) as planned:
        make_plan(PlanOptions(options))
    with pytest.raises(error) as dumped:
        run_dump(options)
    assert str(planned.value) == str(dumped.value)


def test_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    outputs = (Output(Selection.parse("top-k:4"), tmp_path / "notes"),)
    with pytest.raises(CacheError, match="not empty and not a logitcache cache"):
        make_plan(PlanOptions(dump_options(place, outputs=outputs), together=True))
    with pytest.raises(UsageError, match="sample-tokens is 255; it must be at least 256"):
        PlanOptions(dump_options(place), sample_tokens=255)
    with pytest.raises(UsageError, match=r"tries the teacher on this machine, and http://host:8000/v1 asks a server"):
        PlanOptions(dump_options(place, teacher="http://host:8000/v1", device="auto", tokenizer=str(place / "teacher")))
    with pytest.raises(UsageError, match="machines is 0"):
        PlanOptions(dump_options(place), machines=0)
    with pytest.raises(UsageError, match="a selection is given twice"):
        planned_outputs([Selection.parse("top-k:4")] * 2)
    small = student_yaml(tmp_path / "student.yaml", vocab_size=20)
    with pytest.raises(TrainingError, match="vocabulary of 20 ids"):
        make_plan(PlanOptions(dump_options(place, max_tokens=500), ("small",), student=str(small)))


def test_what_is_in_the_working_folder_does_not_matter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold anything, and need not be writable."""
    monkeypatch.chdir(tmp_path)
    for number in range(len(SPECS)):
        (tmp_path / f"plan-{number}").write_text("mine")
    tmp_path.chmod(0o555)
    options = dump_options(place, max_tokens=300, outputs=planned_outputs([Selection.parse("top-k:8")]))
    assert make_plan(PlanOptions(options, ("small",))).corpus.tokens == 300
    tmp_path.chmod(0o755)
    assert len([*tmp_path.iterdir()]) == len(SPECS)


def test_a_loaded_teacher_is_taken(place: Path) -> None:
    teacher = TransformersTeacher.load(place / "teacher", device="cpu")
    outputs = planned_outputs([Selection.parse("top-k:8")])
    options = dump_options(place, max_tokens=300, teacher="not loaded again", outputs=outputs)
    plan = make_plan(PlanOptions(options, ("small",)), teacher=teacher)
    assert math.isclose(plan.loading_seconds, 0, abs_tol=0.05)
