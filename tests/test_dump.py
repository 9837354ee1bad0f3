"""`dump` from corpus and teacher to a cache: alignment, resuming after every kind of kill, and refusals."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache import dump_corpus, models, store
from logitcache.corpus import expand_paths, iter_documents, pack, resolve_policy
from logitcache.dump import DumpOptions, DumpReport, Output, Silent, run_dump
from logitcache.errors import CacheError, CorpusError, DamagedCacheError, ModelError, PlanMismatchError, UsageError
from logitcache.selection import Selection
from logitcache.store import open_cache, repair, schema, verify
from tests.faults import FAILPOINTS, forkserver, run_killed, run_to_end, start
from tests.store.caches import files_of
from tests.teachers.alignment import Expected
from tests.tiny import save_tiny

LENGTH = 13
SPECS = ("top-k:7", "top-p:0.6:40", "sample:11", "sample:11:0.7", "varopt:9")
# A stored log-probability is off by half a step of 1/8 nat, its row's sum by as much, and the tail's logit by less.
WEIGHT_TOLERANCE = 3 / 16 + 1e-3
# Rounded at random to either neighbour; a varopt row's largest weight takes up what that does to all others.
ROUNDED_TOLERANCE = 0.7
SCALAR_TOLERANCE = 1 / 64
WORDS = [
    "The cache",
    "keeps",
    "what",
    "the teacher",
    "knew,",
    "and",
    "数字",
    "its student\n",
    "reads",
    "ünïcödé",
    "it.",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, and `corpus` of several documents of uneven lengths in two files."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "teacher")
    write_corpus(folder / "corpus")
    return folder


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, count)) for count in (9, 1, 24, 8, 3)]
    (folder / "a.txt").write_text(texts[0])
    lines = "".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in texts[1:])
    (folder / "b.jsonl").write_text(lines)


def options(place: Path, *outputs: tuple[str, Path], **changes: Any) -> DumpOptions:
    """Units of 8 blocks of 13 tokens, 3 blocks in a forward pass."""
    settings: dict[str, Any] = {
        "teacher": str(place / "teacher"),
        "corpus": (str(place / "corpus"),),
        "device": "cpu",
        "block_length": LENGTH,
        "batch_tokens": 3 * LENGTH + 1,
        "unit_tokens": 8 * LENGTH,
        "seed": 5,
    }
    return DumpOptions(
        outputs=tuple(Output(Selection.parse(spec), root) for spec, root in outputs), **{**settings, **changes}
    )


def packed(given: DumpOptions, tokenizer: Any) -> Any:
    """The corpus as blocks in memory, the plain way."""
    policy = resolve_policy(tokenizer, given.block_length)
    return pack(tokenizer, iter_documents(expand_paths(given.corpus), "text"), policy, given.max_tokens)


class Stages(Silent):
    """Remembers what a dump did."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def stage(self, what: str) -> None:
        self.seen.append(what)


# ---------------------------------------------------------------------------------------------- alignment


def check_against_the_teacher(given: DumpOptions, report: DumpReport) -> None:
    """Every row read back is the model's own distribution at that position."""
    model, tokenizer = models.load_model(given.teacher), models.load_tokenizer(given.teacher)
    blocks = packed(given, tokenizer)
    assert blocks.num_tokens == report.tokens == report.computed_tokens
    expected = Expected.of(model, blocks.tokens.astype(np.int64), blocks.num_tokens)
    for output, manifest in zip(given.outputs, report.manifests, strict=True):
        assert verify(output.root).ok
        cache = open_cache(output.root)
        assert cache.manifest == manifest
        assert len(manifest.shards) == -(-cache.num_blocks // 8)
        read = cache.read_blocks(0, cache.num_blocks)
        real = read.valid.ravel()
        assert real.sum() == blocks.num_tokens
        np.testing.assert_array_equal(read.tokens.ravel()[real], blocks.tokens.ravel()[real])
        stored = read.targets.slice(0, blocks.num_tokens)
        rounded = output.selection.method == "varopt" or output.selection.exponent is not None
        tolerance = ROUNDED_TOLERANCE if rounded else WEIGHT_TOLERANCE
        expected.check(stored, output.selection, given.seed, tolerance, SCALAR_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2"])
def test_rows_are_the_teachers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several documents, an odd block length, a padded last block, batches that divide nothing, three selections."""
    monkeypatch.setattr(schema, "CHUNK_TOKENS", 4 * LENGTH)
    save_tiny(tmp_path / "teacher", family)
    write_corpus(tmp_path / "corpus")
    given = options(tmp_path, *((spec, tmp_path / spec.replace(":", "-")) for spec in SPECS))
    report = run_dump(given)
    assert report.tokens % LENGTH
    assert report.manifests[0].identity.geometry.chunk_blocks == 4
    check_against_the_teacher(given, report)


def test_a_vocabulary_over_2_to_the_18(tmp_path: Path) -> None:
    """The tokenizer is small; what the head gives mass to is not."""
    small = {"hidden_size": 8, "num_attention_heads": 2, "tie_word_embeddings": True}
    save_tiny(tmp_path / "teacher", "llama", (1 << 18) + 50_000, **small)
    write_corpus(tmp_path / "corpus")
    given = options(tmp_path, ("top-k:7", tmp_path / "one"), ("sample:11", tmp_path / "two"), max_tokens=2 * LENGTH + 1)
    check_against_the_teacher(given, run_dump(given))
    cache = open_cache(tmp_path / "two")
    assert cache.vocab_size == (1 << 18) + 50_000
    assert cache.read_blocks(0, 2).targets.ids.max() >= 1 << 18


@pytest.mark.parametrize("batch_tokens", [1, 5 * LENGTH, 10_000])
def test_batches_change_nothing_that_is_drawn(place: Path, tmp_path: Path, batch_tokens: int) -> None:
    given = options(place, ("sample:11", tmp_path / "one"))
    other = options(place, ("sample:11", tmp_path / "other"), batch_tokens=batch_tokens)
    run_dump(given)
    run_dump(other)
    one, two = (open_cache(root).read_blocks(0, 10).targets for root in (tmp_path / "one", tmp_path / "other"))
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.weights, two.weights)
    assert open_cache(tmp_path / "one").manifest.identity == open_cache(tmp_path / "other").manifest.identity


def test_outputs_of_one_run_equal_runs_of_their_own(place: Path, tmp_path: Path) -> None:
    run_dump(options(place, *((spec, tmp_path / "together" / spec) for spec in SPECS)))
    for spec in SPECS:
        run_dump(options(place, (spec, tmp_path / "alone" / spec)))
    for spec in SPECS:
        assert content_of(tmp_path / "together" / spec) == content_of(tmp_path / "alone" / spec)


def test_max_tokens(place: Path, tmp_path: Path) -> None:
    given = options(place, ("top-k:3", tmp_path / "cache"), max_tokens=30)
    assert run_dump(given).tokens == 30
    cache = open_cache(tmp_path / "cache")
    assert (cache.num_tokens, cache.num_blocks) == (30, 3)
    tokens = packed(given, models.load_tokenizer(given.teacher)).tokens
    np.testing.assert_array_equal(cache.read_blocks(0, 2).tokens, tokens[:2])


@pytest.mark.parametrize("spec", SPECS)
def test_containers_hold_the_same(place: Path, tmp_path: Path, spec: str) -> None:
    """And a cache is not resumed in the other kind."""
    given = options(place, (spec, tmp_path / "zarr"))
    other = options(place, (spec, tmp_path / "arrow"), container="arrow")
    for run in (given, other):
        check_against_the_teacher(run, run_dump(run))
    one, two = (open_cache(tmp_path / kind) for kind in ("zarr", "arrow"))
    for mine, theirs in zip(one.chunks, two.chunks, strict=True):
        for name, plane in one.read_planes(mine).items():
            np.testing.assert_array_equal(plane, two.read_planes(theirs)[name])
    with pytest.raises(PlanMismatchError, match=r"container: the cache has 'arrow', this run 'zarr'"):
        run_dump(options(place, (spec, tmp_path / "arrow")))


# ---------------------------------------------------------------------------------------------- kills


def content_of(root: Path) -> dict[str, bytes]:
    """What a reader trusts: manifest, table and the shards the manifest lists."""
    shards = {f"shards/{shard.file}" for shard in open_cache(root).manifest.shards}
    listed = shards | {"manifest.json", "plan.json"}
    return {name: data for name, data in files_of(root).items() if name in listed or "codebook" in name}


def dump_job(given: DumpOptions) -> None:
    """What the children run. One thread, so that equal runs give equal bytes."""
    torch.set_num_threads(1)
    run_dump(given)


children = forkserver()


def dump_and_die(given: DumpOptions, moment: int, log: Path) -> None:
    """Dump; at the `moment`-th operation on a file of the cache, die. Writes the number of operations to `log`."""
    root, seen = str(given.outputs[0].root), 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")) and any(root in str(argument) for argument in arguments):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    dump_job(given)
    log.write_text(str(seen))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A cache dumped without interruption by a child."""
    root = place / "whole"
    run_to_end(children, dump_job, options(place, ("sample:11", root)))
    return root


def test_every_failpoint_is_tried() -> None:
    sources = Path(store.__file__).parent.glob("*.py")
    names = {name for path in sources for name in re.findall(r'failpoint\("([a-z._]+)"\)', path.read_text())}
    # Those of push and pull are tried in tests/store/test_transfer.py, those of buckets in test_bucket_writer.py.
    assert {name for name in names if not name.startswith(("transfer.", "bucket."))} == set(FAILPOINTS)


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_kill_at_a_failpoint(place: Path, whole: Path, tmp_path: Path, failpoint: str) -> None:
    """What is committed is whole; running again ends with the bytes of an uninterrupted run."""
    root = tmp_path / "cache"
    given = options(place, ("sample:11", root))
    run_killed(children, dump_job, given, failpoint=failpoint)
    assert (root / "manifest.json").exists() == (failpoint == "manifest.written")
    assert verify(root).ok
    units = len(open_cache(whole).manifest.shards)
    committed = {"commit.after_link": 1, "manifest.before_write": units, "manifest.written": units}
    assert len(list((root / "commits").glob("*.json"))) == committed.get(failpoint, 0)
    run_to_end(children, dump_job, given)
    assert content_of(root) == content_of(whole)
    assert verify(root).ok
    assert not (root / "work").exists()


def test_kills_at_random_moments(place: Path, tmp_path: Path) -> None:
    """Five SIGKILLs of one dump, at the n-th touch of a file for random n; each run goes on from what it finds."""
    root, log = tmp_path / "cache", tmp_path / "log"
    given = options(place, ("sample:11", root), unit_tokens=2 * LENGTH)
    run_to_end(children, dump_and_die, given, 0, log)
    wanted, operations = content_of(root), int(log.read_text())
    assert operations > 50
    shutil.rmtree(root)
    for moment in np.random.default_rng(6).integers(1, operations // 3, 5):
        process = start(children, dump_and_die, given, int(moment), log)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if (root / "plan.json").exists():
            report = verify(root)
            assert report.ok
            commits = sorted(path.stem for path in (root / "commits").glob("*.json"))
            assert commits == [f"{unit:06d}" for unit in range(report.shards)]
    run_to_end(children, dump_job, given)
    assert content_of(root) == wanted


def test_a_killed_command(place: Path, whole: Path, tmp_path: Path) -> None:
    """The same through the real command line."""
    root = tmp_path / "cache"
    command = [sys.executable, "-m", "logitcache.cli.main", "dump", "--device", "cpu", "--seed", "5"]
    command += ["--teacher", str(place / "teacher"), "--corpus", str(place / "corpus"), "--out", str(root)]
    command += ["--select", "sample:11", "--block-length", "13", "--batch-tokens", "40", "--unit-tokens", "104"]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, **one_thread, "LOGITCACHE_FAILPOINT": "commit.after_rename:kill"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list((root / "shards").glob("*.zip"))) == 1
    assert not list((root / "commits").glob("*.json"))
    run_to_end(children, dump_job, options(place, ("sample:11", root)))
    assert content_of(root) == content_of(whole)


def test_one_output_behind_the_other(place: Path, tmp_path: Path) -> None:
    """Two outputs, one finished and one begun: only what is missing is computed, and both end as they should."""
    both = options(place, ("sample:11", tmp_path / "a"), ("top-k:7", tmp_path / "b"))
    run_dump(options(place, ("sample:11", tmp_path / "a")))
    before = files_of(tmp_path / "a")
    run_killed(children, dump_job, options(place, ("top-k:7", tmp_path / "b")), failpoint="commit.after_link")
    report = run_dump(both)
    assert report.computed_tokens == report.tokens - 8 * LENGTH
    assert files_of(tmp_path / "a") == before
    assert verify(tmp_path / "b").ok
    assert open_cache(tmp_path / "b").num_tokens == report.tokens


def no_tokenising(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the corpus was tokenised again")

    patch.setattr(dump_corpus, "pack_encoded_to_file", refuse)


def test_missing_shards_are_computed_again(place: Path, whole: Path, tmp_path: Path) -> None:
    """Of a finished cache: the same line mends it, byte for byte, and computes only what is gone."""
    shutil.copytree(whole, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    shards = open_cache(tmp_path / "cache").manifest.shards
    (tmp_path / "cache" / "shards" / shards[1].file).unlink()
    assert not verify(tmp_path / "cache").ok
    report = run_dump(options(place, ("sample:11", tmp_path / "cache")))
    assert report.computed_tokens == shards[1].num_tokens
    assert files_of(tmp_path / "cache") == before
    assert verify(tmp_path / "cache").ok


def test_a_missing_commit_record_is_made_again(place: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    report = run_dump(options(place, ("sample:11", tmp_path / "cache")))
    assert report.computed_tokens == open_cache(whole).manifest.shards[1].num_tokens
    assert files_of(tmp_path / "cache") == before


def test_a_missing_plan_is_written_again(place: Path, whole: Path, tmp_path: Path) -> None:
    """By whoever would make the same cache, and by nobody else."""
    shutil.copytree(whole, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    (tmp_path / "cache" / "plan.json").unlink()
    with pytest.raises(PlanMismatchError, match=r"--seed: the cache has 5, this run 6$"):
        run_dump(options(place, ("sample:11", tmp_path / "cache"), seed=6))
    assert run_dump(options(place, ("sample:11", tmp_path / "cache"))).computed_tokens == 0
    assert files_of(tmp_path / "cache") == before


def refused_for_want_of(tables: Path, given: DumpOptions) -> None:
    """In a child, which holds the cache no longer than it lives."""
    with pytest.raises(DamagedCacheError, match=f"^{tables} is missing; restore it, or run logitcache repair"):
        run_dump(given)


def test_missing_tables_are_no_finished_cache(place: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    [tables] = (tmp_path / "cache" / "codebook").iterdir()
    tables.unlink()
    run_to_end(children, refused_for_want_of, tables, options(place, ("sample:11", tmp_path / "cache")))
    repair(tmp_path / "cache", apply=True)
    run_dump(options(place, ("sample:11", tmp_path / "cache")))
    assert files_of(tmp_path / "cache") == files_of(whole)


def test_a_finished_cache_costs_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(place, ("top-k:7", tmp_path / "a"), ("sample:11", tmp_path / "b"))
    first = run_dump(given)
    assert first.computed_tokens == first.tokens > 0
    before = files_of(tmp_path)
    no_tokenising(monkeypatch)
    stages = Stages()
    second = run_dump(given, stages)
    assert (second.tokens, second.computed_tokens) == (first.tokens, 0)
    assert second.manifests == first.manifests
    assert stages.seen[-1] == "nothing left to compute"
    assert files_of(tmp_path) == before


def test_resuming_does_not_tokenise(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(place, ("sample:11", tmp_path / "cache"))
    run_killed(children, dump_job, given, failpoint="commit.after_link")
    no_tokenising(monkeypatch)
    report = run_dump(given)
    assert report.computed_tokens == report.tokens - 8 * LENGTH


# ---------------------------------------------------------------------------------------------- other arguments


def swap_lines(place: Path) -> None:
    """Another corpus with as many tokens and documents."""
    path = place / "corpus" / "b.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[::-1]]))


def other_teacher(place: Path) -> None:
    shutil.rmtree(place / "teacher")
    save_tiny(place / "teacher", seed=1)


CHANGES: dict[str, tuple[str, dict[str, Any], Callable[[Path], None] | None, set[str]]] = {
    "size": ("top-k:6", {}, None, {"selection.size"}),
    "method": (
        "sample:7",
        {},
        None,
        {"selection.method", "codec.values", "codec.draws", "codec.root_steps"},
    ),
    "seed": ("top-k:7", {"seed": 6}, None, {"seed"}),
    "block length": (
        "top-k:7",
        {"block_length": 12, "unit_tokens": 96},
        None,
        {"geometry.block_length"},
    ),
    "units": ("top-k:7", {"unit_tokens": 4 * LENGTH}, None, {"geometry.unit_blocks"}),
    "dtype": ("top-k:7", {"dtype": "bfloat16"}, None, {"teacher.dtype"}),
    "eos": (
        "top-k:7",
        {"eos": "none"},
        None,
        {"corpus.packing.eos", "corpus.num_tokens", "corpus.sha256", "geometry.num_tokens"},
    ),
    "max tokens": (
        "top-k:7",
        {"max_tokens": 50},
        None,
        {"corpus.max_tokens"},
    ),
    "corpus": ("top-k:7", {}, swap_lines, {"corpus.files.b.jsonl.sha256", "corpus.sha256"}),
    "teacher": ("top-k:7", {}, other_teacher, {"teacher.files.model.safetensors.sha256", "teacher.sha256"}),
}

SAID = {
    "size": "select: the cache has 'top-k:7', this run 'top-k:6'",
    "method": "select: the cache has 'top-k:7', this run 'sample:7'",
    "seed": "seed: the cache has 5, this run 6",
    "block length": "block-length: the cache has 13, this run 12",
    "units": r"unit-tokens: the cache has 104, this run 52",
    "dtype": "dtype: the cache has 'float32', this run 'bfloat16'",
    "eos": "eos: the cache has 'document', this run 'none'",
    "max tokens": "max-tokens: the cache has None, this run 50",
    "corpus": r"corpus \(b.jsonl\): the cache has it with SHA-256 \w{64}, this run \w{64}",
    "teacher": r"teacher \(model.safetensors\): the cache has it with SHA-256 \w{64}, this run \w{64}",
}


@pytest.fixture(scope="module")
def finished_place(place: Path) -> Path:
    """`place` with a finished top-k cache in `finished`."""
    run_dump(options(place, ("top-k:7", place / "finished")))
    return place


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_other_arguments_are_refused(finished_place: Path, tmp_path: Path, change: str, finished: bool) -> None:
    """Exactly the fields that differ are known, the option behind them is named, and the cache is left as it was."""
    for name in ("teacher", "corpus", "finished"):
        shutil.copytree(finished_place / name, tmp_path / name)
    root = tmp_path / "finished"
    if not finished:
        (root / "manifest.json").unlink()
        (root / "commits" / "000001.json").unlink()
    before = files_of(root)
    spec, changes, prepare, fields = CHANGES[change]
    if prepare is not None:
        prepare(tmp_path)
    with pytest.raises(PlanMismatchError, match=r"was begun with other arguments; repeat those") as caught:
        run_dump(options(tmp_path, (spec, root), **changes))
    listed = {field for field, _, _ in caught.value.differences}
    assert listed == fields
    [line] = str(caught.value).splitlines()[1:]
    assert re.fullmatch(f"  --{SAID[change]}", line), line
    assert files_of(root) == before


# ---------------------------------------------------------------------------------------------- refusals

BAD = {
    "k over the vocabulary": (
        {"spec": "top-k:301"},
        UsageError,
        r"^selection top-k:301 keeps 301 ids, but the teacher's vocabulary has 300; keep fewer$",
    ),
    "block length 1": ({"block_length": 1}, UsageError, r"^a block of 1 token has no next token; choose a block"),
    "block length 0": ({"block_length": 0}, UsageError, r"choose a block length of at least 2$"),
    "block over the context": (
        {"block_length": 129},
        UsageError,
        r"^blocks of 129 tokens are longer than the teacher's context of 128; choose",
    ),
    "no such corpus": ({"corpus": ("nowhere.txt",)}, CorpusError, r"nowhere.txt"),
    "no such teacher": ({"teacher": "./nowhere"}, ModelError, r"^the model folder ./nowhere does not exist"),
    "bad dtype": ({"dtype": "int4"}, UsageError, r"^the dtype must be one of"),
    "no such bos": ({"bos": "document"}, UsageError, r"the tokenizer has no BOS token"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_write_nothing(place: Path, tmp_path: Path, case: str) -> None:
    changes, kind, message = BAD[case]
    spec = changes.get("spec", "top-k:7")
    rest = {name: value for name, value in changes.items() if name != "spec"}
    with pytest.raises(kind, match=message):
        run_dump(options(place, (str(spec), tmp_path / "cache"), **rest))
    assert files_of(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "  \n\n"])
def test_an_empty_corpus(place: Path, tmp_path: Path, text: str) -> None:
    corpus = tmp_path / "empty.txt"
    corpus.write_text(text)
    with pytest.raises(CorpusError, match=r"^the corpus is empty: "):
        run_dump(options(place, ("top-k:7", tmp_path / "cache"), corpus=(str(corpus),)))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_another_selection_of_also(place: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "also")
    with pytest.raises(PlanMismatchError, match=r"--also: the cache has 'sample:11', this run 'sample:12'$"):
        run_dump(options(place, ("top-k:7", tmp_path / "cache"), ("sample:12", tmp_path / "also")))


def test_a_folder_that_is_no_cache(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"is not empty and not a logitcache cache \(it holds 'notes.txt'\)"):
        run_dump(options(place, ("top-k:7", tmp_path)))
    with pytest.raises(UsageError, match=r"notes.txt is a file; choose another folder for --out$"):
        run_dump(options(place, ("top-k:7", tmp_path / "notes.txt")))
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 0}, r"^batch-tokens is 0; it must be at least 1$"),
        ({"unit_tokens": -1}, r"^unit-tokens is -1; it must be at least 1$"),
        ({"max_tokens": 0}, r"^max-tokens is 0; it must be at least 1$"),
        ({"seed": -1}, r"^seed is -1; it must lie between 0 and 2\^62 - 1$"),
        ({"seed": 1 << 62}, r"^seed is \d+; it must lie between"),
        ({"outputs": ()}, r"^every cache needs a folder of its own"),
    ],
)
def test_options_that_make_no_sense(place: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    good = options(place, ("top-k:7", tmp_path / "a"))
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(good, **changes)


def test_two_outputs_in_one_folder(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^every cache needs a folder of its own; give each selection another --out$"):
        options(place, ("top-k:7", tmp_path / "a"), ("top-k:8", tmp_path / "b" / ".." / "a"))
    with pytest.raises(UsageError, match=r"a/b would lie inside the cache .*/a; choose another folder$"):
        options(place, ("top-k:7", tmp_path / "a"), ("top-k:8", tmp_path / "a" / "b"))


def test_a_teacher_that_fails_leaves_a_resumable_cache(place: Path, tmp_path: Path) -> None:
    """NaN in the third unit: the units before it stay, and a mended run goes on from there."""
    root = tmp_path / "cache"
    given = options(place, ("top-k:7", root))
    calls: list[int] = []

    def poison(_module: Any, _inputs: Any, output: Any) -> None:
        calls.append(len(output.last_hidden_state))
        if sum(calls) > 18:
            output.last_hidden_state[:] = float("nan")

    from logitcache.teachers import TransformersTeacher

    teacher = TransformersTeacher.load(given.teacher, device="cpu")
    hook = teacher.model.base_model.register_forward_hook(poison)
    with pytest.raises(ModelError, match=r"^the teacher's logits hold NaN or infinity at block \d+, position 0;"):
        run_dump(given, teacher=teacher)
    hook.remove()
    assert verify(root).shards == 2
    report = run_dump(given, teacher=teacher)
    assert report.computed_tokens == report.tokens - 16 * LENGTH
    assert verify(root).ok
