"""What a user can get wrong: one sentence on stderr, no traceback, exit status 1 (data) or 2 (usage)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli import main as cli_main
from logitcache.store import CacheWriter, open_cache
from tests.caches import Dumped, student_yaml
from tests.cli.conftest import Main
from tests.faults import flip_bit
from tests.store.caches import files_of
from tests.tiny import save_tiny

Line = Callable[[Path, Dumped], list[Any]]


def dump(root: Path, made: Dumped, **changes: Any) -> list[Any]:
    """A good dump line with some options changed; None leaves one out."""
    options = {
        "teacher": made.teacher,
        "corpus": made.corpus,
        "out": root / "out",
        "select": "top-k:4",
        "block_length": 32,
        "device": "cpu",
        **changes,
    }
    return ["dump", *pairs(options)]


def train(root: Path, made: Dumped, **changes: Any) -> list[Any]:
    """A good training line of two steps with some options changed."""
    options = {
        "cache": made.top_k,
        "student": student_yaml(root / "student.yaml"),
        "out": root / "out",
        "max_steps": 2,
        "device": "cpu",
        **changes,
    }
    return ["train", *pairs(options)]


def pairs(options: dict[str, Any]) -> list[Any]:
    return [
        part for name, value in options.items() if value is not None for part in ("--" + name.replace("_", "-"), value)
    ]


def file(root: Path, content: str | bytes, name: str = "text.txt") -> Path:
    path = root / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def folder(root: Path, *names: str) -> Path:
    path = root / "folder"
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"?")
    return path


def damaged(root: Path, made: Dumped) -> Path:
    """A copy of the top-k cache with one bit of each shard flipped."""
    shutil.copytree(made.top_k, root / "damaged")
    for shard in (root / "damaged" / "shards").iterdir():
        flip_bit(shard, 4 * shard.stat().st_size)
    return root / "damaged"


def audit(cache: Path, teacher: Path) -> list[Any]:
    return ["verify", cache, "--against-teacher", teacher, "--device", "cpu"]


def begun(root: Path, made: Dumped) -> Path:
    """A cache of which nothing is committed yet."""
    manifest = open_cache(made.top_k).manifest
    CacheWriter.open(root / "begun", manifest.identity, manifest.origin)
    return root / "begun"


def png_folder(root: Path) -> Path:
    (root / "a.png").mkdir()
    return root / "a.png"


CASES: dict[str, tuple[int, str, Line]] = {
    # dump: corpus
    "no corpus": (1, "does not exist", lambda r, d: dump(r, d, corpus=r / "nothing.txt")),
    "no match": (1, "matches", lambda r, d: dump(r, d, corpus=r / "*.txt")),
    "empty folder": (1, "holds no corpus file", lambda r, d: dump(r, d, corpus=folder(r))),
    "a folder named like a file": (1, "holds no corpus file", lambda r, d: dump(r, d, corpus=folder(r, "a.bin"))),
    "empty text": (1, "the corpus is empty", lambda r, d: dump(r, d, corpus=file(r, ""))),
    "white text": (1, "the corpus is empty", lambda r, d: dump(r, d, corpus=file(r, " \n\t\n"))),
    "invalid UTF-8": (1, "is not UTF-8 at byte offset 3", lambda r, d: dump(r, d, corpus=file(r, b"abc\xff def"))),
    "UTF-16": (
        1,
        "offset 0; it is UTF-16, so convert the file to UTF-8 with `iconv -f utf-16 -t utf-8`",
        lambda r, d: dump(r, d, corpus=file(r, "text".encode("utf-16"))),
    ),
    "UTF-16 of JSONL": (
        1,
        "a.jsonl:1 is not UTF-8 at byte 0 of the line; it is UTF-16",
        lambda r, d: dump(r, d, corpus=file(r, '{"text": "a"}'.encode("utf-16"), "a.jsonl")),
    ),
    "booleans among ids": (
        1,
        "a.jsonl:2 has a field 'ids' that is a list with true or false in it, not a list of whole numbers",
        lambda r, d: dump(
            r, d, corpus=file(r, '{"ids": [1, 2, 3]}\n{"ids": [1, true, 3]}\n', "a.jsonl"), ids_field="ids"
        ),
    ),
    "not JSONL": (1, "is not a JSON object", lambda r, d: dump(r, d, corpus=file(r, "{", "a.jsonl"))),
    "no such field": (1, "has no field 'text'", lambda r, d: dump(r, d, corpus=file(r, '{"a": 1}', "a.jsonl"))),
    "not Parquet": (1, "damaged or not Parquet", lambda r, d: dump(r, d, corpus=file(r, "PAR", "a.parquet"))),
    # dump: teacher
    "no teacher": (1, "does not exist", lambda r, d: dump(r, d, teacher=r / "teacher")),
    "no model": (1, "has no tokenizer file|has no config.json", lambda r, d: dump(r, d, teacher=folder(r))),
    "a file as teacher": (1, "is a file", lambda r, d: dump(r, d, teacher=d.corpus)),
    "GGUF": (1, "--gguf-file m.gguf", lambda r, d: dump(r, d, teacher=folder(r, "m.gguf"))),
    "other GGUF": (1, "has no file x.gguf", lambda r, d: dump(r, d, teacher=folder(r, "m.gguf"), gguf_file="x.gguf")),
    "no tokenizer": (
        1,
        "has no tokenizer",
        lambda r, d: dump(r, d, teacher=save_tiny(r / "teacher", with_tokenizer=False)),
    ),
    "dtype": (2, "'int3'", lambda r, d: dump(r, d, dtype="int3")),
    "device": (2, "'tpu'", lambda r, d: dump(r, d, device="tpu")),
    # dump: numbers and spellings
    "k over the vocabulary": (2, "keeps 301 ids", lambda r, d: dump(r, d, select="top-k:301")),
    "k = 0": (2, "keeps 0 entries", lambda r, d: dump(r, d, select="top-k:0")),
    "negative k": (2, "keeps -3 entries", lambda r, d: dump(r, d, select="sample:-3")),
    "mass": (2, "mass 1.5 is outside", lambda r, d: dump(r, d, select="top-p:1.5:10")),
    "spelling": (2, "'topk 64' is not understood; write top-k:64", lambda r, d: dump(r, d, select="topk 64")),
    "no number": (2, "is not understood", lambda r, d: dump(r, d, select="top-k:many")),
    "spelling of another": (2, "is not understood", lambda r, d: [*dump(r, d), "--also", "beam:3", r / "b"]),
    "one folder twice": (2, "folder of its own", lambda r, d: [*dump(r, d), "--also", "top-k:3", r / "out"]),
    "block length 1": (2, "block length of at least 2", lambda r, d: dump(r, d, block_length=1)),
    "negative block length": (2, "at least 2", lambda r, d: dump(r, d, block_length=-5)),
    "long blocks": (2, "longer than the teacher's context", lambda r, d: dump(r, d, block_length=129)),
    "negative tokens": (2, "max-tokens is -1", lambda r, d: dump(r, d, max_tokens=-1)),
    "no batch": (2, "batch-tokens is 0", lambda r, d: dump(r, d, batch_tokens=0)),
    "a batch of words": (
        2,
        "'many' is neither a number of tokens nor auto",
        lambda r, d: dump(r, d, batch_tokens="many"),
    ),
    "no unit": (2, "unit-tokens is -7", lambda r, d: dump(r, d, unit_tokens=-7)),
    "negative seed": (2, "seed is -1", lambda r, d: dump(r, d, seed=-1)),
    "text for a number": (2, "'many' is not a valid int", lambda r, d: dump(r, d, max_tokens="many")),
    "bos": (2, "'always'", lambda r, d: dump(r, d, bos="always")),
    "no BOS token": (2, "has no BOS token", lambda r, d: dump(r, d, bos="document")),
    "an occupied folder": (
        1,
        "is not a logitcache cache|not a logitcache cache",
        lambda r, d: dump(r, d, out=folder(r, "a")),
    ),
    "inside another cache": (2, "lies inside the cache", lambda r, d: dump(r, d, out=d.top_k / "new")),
    "nothing as cache": (2, "--out': it is empty, which would be the current folder", lambda r, d: dump(r, d, out="")),
    "nothing as another": (2, "'--also': it is empty", lambda r, d: [*dump(r, d), "--also", "top-k:3", ""]),
    "a run in nothing": (2, "'--out': it is empty", lambda r, d: train(r, d, out="")),
    "a run in what --set names nothing": (
        2,
        "--out is ''; it must have at least 1 character",
        lambda r, d: [*train(r, d), "--set", "out=''"],
    ),
    "a run in a cache": (2, "top_k is a cache; choose another folder", lambda r, d: train(r, d, out=d.top_k)),
    "pictures in nothing": (2, "'--out': it is empty", lambda r, d: ["plot", d.top_k, "--out", ""]),
    "pictures in the cache": (2, "top_k is a cache; choose", lambda r, d: ["plot", d.top_k, "--out", d.top_k]),
    "a copy to nothing": (2, "'FOLDER': it is empty", lambda r, d: ["pull", "s3://bucket/cache", ""]),
    "a file as cache": (2, "is a file", lambda r, d: dump(r, d, out=d.corpus)),
    "a cache below a file": (
        2,
        "corpus.txt is a file; choose another folder",
        lambda r, d: dump(r, d, out=d.corpus / "x"),
    ),
    "text and messages": (2, "give fields of one kind", lambda r, d: dump(r, d, text_field="text", messages_field="m")),
    # verify and inspect
    "verify nothing": (1, "does not exist", lambda r, d: ["verify", r / "nothing"]),
    "verify a folder": (1, "is not a logitcache cache", lambda r, d: ["verify", folder(r, "a.txt")]),
    "verify a file": (1, "not a folder", lambda r, d: ["verify", d.corpus]),
    "verify a web page": (2, "https:// is not supported", lambda r, d: ["verify", "https://host/cache"]),
    "audit nothing": (1, "does not exist", lambda r, d: audit(r / "nothing", d.teacher)),
    "audit a folder": (1, "is not a logitcache cache", lambda r, d: audit(folder(r, "a.txt"), d.teacher)),
    "audit an empty cache": (1, "holds no rows yet", lambda r, d: audit(begun(r, d), d.teacher)),
    "audit damage": (1, "its SHA-256 differs", lambda r, d: audit(damaged(r, d), d.teacher)),
    "audit without a teacher": (1, "does not exist", lambda r, d: audit(d.top_k, r / "teacher")),
    "audit with a folder": (1, "has no config.json", lambda r, d: audit(d.top_k, folder(r))),
    "audit with a file": (1, "is a file", lambda r, d: audit(d.top_k, d.corpus)),
    "audit with GGUF": (1, "has no file x.gguf", lambda r, d: [*audit(d.top_k, d.teacher), "--gguf-file", "x.gguf"]),
    "audit with a wider head": (
        1,
        "has 320 ids, .* was made with 300",
        lambda r, d: audit(d.top_k, save_tiny(r / "teacher", vocab_size=320)),
    ),
    "audit's tokenizer": (1, "has no tokenizer", lambda r, d: [*audit(d.top_k, d.teacher), "--tokenizer", r]),
    "audit of no rows": (2, "rows is 0; it must be at least 1", lambda r, d: [*audit(d.top_k, d.teacher), "--rows", 0]),
    "audit's dtype": (2, "'int3'", lambda r, d: [*audit(d.top_k, d.teacher), "--dtype", "int3"]),
    "audit of no teacher": (2, "name it with --against-teacher", lambda r, d: ["verify", d.top_k, "--rows", 10]),
    # stats and plot
    "stats of nothing": (1, "does not exist", lambda r, d: ["stats", r / "nothing"]),
    "stats of a folder": (1, "is not a logitcache cache", lambda r, d: ["stats", folder(r, "a.txt")]),
    "stats of an empty cache": (1, "holds no rows yet", lambda r, d: ["stats", begun(r, d)]),
    "stats of damage": (1, "its SHA-256 differs", lambda r, d: ["stats", damaged(r, d)]),
    "stats of no chunks": (2, "sample is 0", lambda r, d: ["stats", d.top_k, "--sample", 0]),
    "stats of no blocks": (2, "outside the cache", lambda r, d: ["stats", d.top_k, "--blocks", "500:"]),
    "stats' tokenizer": (1, "has no tokenizer", lambda r, d: ["stats", d.top_k, "--tokenizer", r]),
    "plot nothing": (1, "does not exist", lambda r, d: ["plot", r / "nothing", "--out", r / "a.png"]),
    "plot into a cache": (2, "lies inside the cache", lambda r, d: ["plot", d.top_k, "--out", d.top_k / "a.png"]),
    "plot over a file": (2, "is a file; give a name.png", lambda r, d: ["plot", d.top_k, "--out", d.corpus]),
    "plot over a folder": (2, "is a folder", lambda r, d: ["plot", d.top_k, "--out", png_folder(r)]),
    "plot into a file": (
        1,
        "cannot be written|cannot be used",
        lambda r, d: ["plot", d.top_k, "--out", d.corpus / "a"],
    ),
    "inspect nothing": (1, "does not exist", lambda r, d: ["inspect", r / "nothing"]),
    "inspect a folder": (1, "is not a logitcache cache", lambda r, d: ["inspect", folder(r, "a.txt")]),
    "inspect damage": (1, "its SHA-256 differs", lambda r, d: ["inspect", damaged(r, d), "--position", 5]),
    "inspect a damaged block": (1, "its SHA-256 differs", lambda r, d: ["inspect", damaged(r, d), "--block", 0]),
    "position": (2, "position 999999 is outside", lambda r, d: ["inspect", d.top_k, "--position", 999999]),
    "negative position": (2, "position -1 is outside", lambda r, d: ["inspect", d.top_k, "--position", -1]),
    "block": (2, "block 108 is outside", lambda r, d: ["inspect", d.top_k, "--block", 108]),
    "negative block": (2, "block -1 is outside", lambda r, d: ["inspect", d.top_k, "--block", -1]),
    "both": (2, "exclude each other", lambda r, d: ["inspect", d.top_k, "--block", 1, "--position", 1]),
    "negative rows": (2, "--rows", lambda r, d: ["inspect", d.top_k, "--position", 1, "--rows", -1]),
    "inspect's tokenizer": (1, "has no tokenizer", lambda r, d: ["inspect", d.top_k, "--block", 0, "--tokenizer", r]),
    # train
    "train on nothing": (1, "does not exist", lambda r, d: train(r, d, cache=r / "nothing")),
    "train on a folder": (1, "is not a logitcache cache", lambda r, d: train(r, d, cache=folder(r, "a.txt"))),
    "train on damage": (1, "its SHA-256 differs", lambda r, d: train(r, d, cache=damaged(r, d))),
    "vocabulary": (
        1,
        "vocabulary of 200 ids",
        lambda r, d: train(r, d, student=student_yaml(r / "s.yaml", vocab_size=200)),
    ),
    "no student": (1, "cannot be read", lambda r, d: train(r, d, student=r / "nothing.yaml")),
    "a folder as config": (1, "has no config.json", lambda r, d: train(r, d, student=folder(r))),
    "no --cache": (2, "--cache is missing; give it here", lambda r, d: train(r, d, cache=None)),
    "alpha": (2, "--alpha is 3.0; it must be less than or equal to 1", lambda r, d: train(r, d, alpha=3)),
    "negative alpha": (2, "--alpha is -0.5; it must be greater", lambda r, d: train(r, d, alpha=-0.5)),
    "no rate": (2, "--learning-rate is 0.0; it must be greater than 0", lambda r, d: train(r, d, learning_rate=0)),
    "negative steps": (2, "--max-steps is -2; it must be", lambda r, d: train(r, d, max_steps=-2)),
    "tail": (2, "--tail is 'long'; it must be 'auto', 'bucket'", lambda r, d: train(r, d, tail="long")),
    "tail of another cache": (1, "needs sampled targets", lambda r, d: train(r, d, tail="unbiased")),
    "--set": (2, "--set warmup has no value; write --set key=value", lambda r, d: [*train(r, d), "--set", "warmup"]),
    "--set nonsense": (2, "the value is not YAML", lambda r, d: [*train(r, d), "--set", "warmup=[{"]),
    "--set a typo": (2, "did you mean 'warmup'", lambda r, d: [*train(r, d), "--set", "warmap=1"]),
    "--config": (2, "cannot be read", lambda r, d: train(r, d, config=r / "nothing.yaml")),
    "--config folder": (2, "cannot be read", lambda r, d: train(r, d, config=folder(r))),
    "--config nonsense": (2, "is not YAML", lambda r, d: train(r, d, config=file(r, "a: [b"))),
    "--config bytes": (2, "is not YAML", lambda r, d: train(r, d, config=file(r, b"\xff\xfe\x00"))),
    "--config zero bytes": (2, "is not YAML", lambda r, d: train(r, d, config=file(r, b"a: \x00"))),
    "--config list": (2, "must hold keys and values", lambda r, d: train(r, d, config=file(r, "- a"))),
    "--config key": (2, "did you mean 'batch_tokens'", lambda r, d: train(r, d, config=file(r, "batch_token: 3"))),
    "resume nothing": (1, "no run to resume", lambda r, d: [*train(r, d), "--resume"]),
    # click itself
    "typo in an option": (2, "No such option.*--selekt", lambda r, d: [*dump(r, d), "--selekt", "x"]),
    "typo in a command": (2, "No such command.*dmup", lambda r, d: ["dmup"]),
    "no argument": (2, "Missing argument", lambda r, d: ["verify"]),
    "no option": (2, "Missing option.*--select", lambda r, d: dump(r, d, select=None)),
    "a value too many": (2, "unexpected extra argument", lambda r, d: ["verify", d.top_k, d.top_k]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(name: str, logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    status, message, line = CASES[name]
    ran = logitcache(*line(tmp_path, dumped))
    assert ran.status == status, ran.err
    assert re.search(message, ran.sentence), ran.sentence


@pytest.mark.parametrize(
    "line",
    [
        ["convert", "--container", "arrow"],
        ["derive", "--drop", "entropy"],
        ["subset", "--blocks", "0:3"],
        ["merge"],
        ["export", "--to", "parquet"],
    ],
    ids=lambda line: line[0],
)
def test_a_cache_is_not_written_into_itself(line: list[str], logitcache: Main, dumped: Dumped) -> None:
    before = files_of(dumped.top_k)
    for out, what in ((dumped.top_k, "is the cache to read from"), (dumped.top_k / "sub" / "new", "lies inside")):
        ran = logitcache(line[0], dumped.top_k, *line[1:], "--out", out)
        assert ran.status == 2
        assert ran.sentence.startswith(f"error: {out} {what}")
        assert ran.sentence.endswith("; choose another folder for --out")
    assert files_of(dumped.top_k) == before


def test_verify_lists_the_damage(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    root = damaged(tmp_path, dumped)
    shards = [shard.file for shard in open_cache(root).manifest.shards]
    shown = logitcache("verify", root)
    assert shown.status == 1
    assert "DAMAGED" in shown.out
    assert "Traceback" not in shown.out + shown.err
    assert all(shard in shown.out for shard in shards)
    report = logitcache("verify", root, "--json")
    assert report.status == 1
    facts = json.loads(report.out)
    assert facts["ok"] is False
    assert {problem["shard"] for problem in facts["problems"]} == set(shards)


def test_inspect_shows_the_facts_of_a_damaged_cache(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """The facts are in the manifest; a damaged manifest is refused."""
    root = damaged(tmp_path, dumped)
    assert logitcache("inspect", root).status == 0
    flip_bit(root / "manifest.json", 4000)
    for command in ("inspect", "verify"):
        ran = logitcache(command, root)
        assert ran.status == 1
        assert "manifest.json" in ran.out + ran.err
        assert "Traceback" not in ran.err


def test_debug_shows_the_traceback(logitcache: Main, tmp_path: Path) -> None:
    ran = logitcache("verify", tmp_path / "nothing", "--debug")
    assert ran.status == 1
    assert "Traceback" in ran.err
    assert "does not exist" in ran.err


def test_a_mistake_of_ours_is_one_sentence_too(
    logitcache: Main, dumped: Dumped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr(cli_main, "cli", broken)
    ran = logitcache("verify", dumped.top_k)
    assert ran.status == 1
    assert ran.err == "error: unexpected RuntimeError: the roof fell in; run again with --debug and report it\n"


def test_a_refused_dump_leaves_nothing_in_the_way(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    for changes in ({"corpus": file(tmp_path, "")}, {"select": "top-k:301"}, {"block_length": 129}):
        assert logitcache(*dump(tmp_path, dumped, **changes)).status in (1, 2)
    assert logitcache(*dump(tmp_path, dumped)).status == 0


def test_a_refused_training_leaves_nothing_in_the_way(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    assert logitcache(*train(tmp_path, dumped, student=tmp_path / "nothing.yaml")).status == 1
    assert logitcache(*train(tmp_path, dumped)).status == 0
