"""verify --against-teacher, stats and plot, as they are typed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from logitcache.audit import AuditOptions, audit_cache
from logitcache.cli.console import out
from logitcache.stats import measure_stats
from logitcache.store import open_cache
from tests.audit.caches import changed_teacher, moved, one_step, rewritten
from tests.caches import Dumped
from tests.cli.conftest import Main
from tests.tiny import tiny_tokenizer

AUDIT = ("--rows", 200, "--seed", 3, "--device", "cpu", "--batch-tokens", 128)


def test_the_same_teacher(logitcache: Main, dumped: Dumped) -> None:
    shown = logitcache("verify", dumped.varopt, "--against-teacher", dumped.teacher, *AUDIT)
    assert shown.status == 0
    assert "\nsame teacher: the cache holds what this teacher says" in shown.out
    for measure in ("label", "entropy", "rows", "draws"):
        assert re.search(rf"^{measure} +start +\d+( +[\d.e+-]+){{5}} *$", shown.out, re.MULTILINE)
    assert "the files of the dump, the same tokenizer" in shown.out
    assert "running it again, block by block" in shown.err
    ran = logitcache("verify", dumped.varopt, "--against-teacher", dumped.teacher, *AUDIT, "--json")
    facts = json.loads(ran.out)
    options = AuditOptions(str(dumped.teacher), rows=200, seed=3, device="cpu", batch_tokens=128)
    report = audit_cache(dumped.varopt, options)
    assert facts == {"ok": True, "verdict": "same teacher", "sentence": report.sentence, **asdict(report)}


def test_another_precision_is_no_failure(logitcache: Main, dumped: Dumped) -> None:
    line = ("verify", dumped.sample, "--against-teacher", dumped.teacher, *AUDIT, "--dtype", "bfloat16")
    shown = logitcache(*line)
    assert shown.status == 0
    assert "\nother precision: the cache holds what this teacher says in another precision" in shown.out
    assert "float32" in shown.out.splitlines()[0]
    assert json.loads(logitcache(*line, "--json").out)["ok"] is True


@pytest.mark.parametrize("kind", ["shifted", "tuned"])
def test_different(kind: str, logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    cache, teacher = dumped.sample, dumped.teacher
    if kind == "shifted":
        cache = rewritten(cache, tmp_path / "cache", moved(1))
    else:
        teacher = changed_teacher(teacher, tmp_path / "teacher", one_step)
    shown = logitcache("verify", cache, "--against-teacher", teacher, *AUDIT)
    assert shown.status == 1
    assert "\ndifferent: the cache does not hold what this teacher says" in shown.out
    assert ("rows stand one too late" in shown.out) == (kind == "shifted")
    facts = logitcache("verify", cache, "--against-teacher", teacher, *AUDIT, "--json")
    assert facts.status == 1
    assert json.loads(facts.out)["verdict"] == "different"
    assert logitcache("verify", cache).status == 0, "its bytes are whole"


def test_another_tokenizer(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    teacher = changed_teacher(dumped.teacher, tmp_path / "teacher", lambda _: None, tiny_tokenizer(290))
    refused = logitcache("verify", dumped.sample, "--against-teacher", teacher, *AUDIT)
    assert refused.status == 1
    assert "ids mean other tokens; give the right teacher, or its tokenizer with --tokenizer" in refused.sentence
    ran = logitcache("verify", dumped.sample, "--against-teacher", teacher, *AUDIT, "--tokenizer", dumped.teacher)
    assert ran.status == 0


# ---------------------------------------------------------------------------------------------------- stats, plot


@pytest.mark.parametrize("name", ["top_k", "sample", "varopt"])
def test_stats(name: str, logitcache: Main, dumped: Dumped) -> None:
    root = getattr(dumped, name)
    found = measure_stats(root)
    facts = json.loads(logitcache("stats", root, "--json").out)
    assert (facts["tokens"], facts["distinct_ids"]) == (found.tokens, found.distinct_ids)
    assert facts["cross_entropy"] == pytest.approx(found.cross_entropy)
    assert facts["entropy"] == asdict(found.entropy)  # type: ignore[call-overload]
    assert facts["places"] == [asdict(place) for place in found.places]
    assert facts["array_bytes"] == found.array_bytes
    tokenizer = tiny_tokenizer()
    assert [one["token"] for one in facts["top_ids"]] == [tokenizer.decode([one.id]) for one in found.top_ids]
    shown = logitcache("stats", root)
    assert shown.status == 0
    assert f"{found.selection}, {found.tokens:,} tokens\n" in shown.out
    assert f"teacher's cross entropy {found.cross_entropy:.4f} nats a token" in shown.out
    assert f"next token among the ids: {found.label_kept:.2%} of {found.labelled:,} rows" in shown.out
    assert ("tail mass" in shown.out) == (name != "sample")
    for array, count in found.array_bytes.items():
        assert re.search(rf"^{array} +{count:,} ", shown.out, re.MULTILINE)


def test_stats_on_a_narrow_terminal(logitcache: Main, dumped: Dumped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are folded; no number is cut."""
    monkeypatch.setattr(out, "_width", 40)
    shown = logitcache("stats", dumped.top_k).out
    assert "…" not in shown
    assert re.search(r"^entropy \(nats\)( +\d+\.\d{3}){8}$", shown, re.MULTILINE)


def test_tail_mass_is_what_is_not_kept(logitcache: Main, dumped: Dumped) -> None:
    found = measure_stats(dumped.top_k).kept_mass
    assert found is not None
    shown = logitcache("stats", dumped.top_k).out
    [line] = re.findall(r"^tail mass(.*)$", shown, re.MULTILINE)
    turned = (found.mean, found.p99, found.p90, found.p50, found.p10, found.p1, found.most, found.least)
    assert line.split() == [f"{1 - value:.4f}" for value in turned]


def test_stats_of_a_part(logitcache: Main, dumped: Dumped) -> None:
    facts = json.loads(logitcache("stats", dumped.top_k, "--blocks", "0:4,9", "--json").out)
    assert facts["tokens"] == 5 * 32
    shown = logitcache("stats", dumped.top_k, "--sample", 2, "--seed", 1)
    cache = open_cache(dumped.top_k)
    assert f" of {cache.num_tokens:,}, 2 chunks of {len(cache.chunks)}" in shown.out


def test_stats_without_the_tokenizer(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """Ids alone where the teacher has gone, or another one stands there; a wrong one that is given is refused."""
    teacher = tmp_path / "teacher"
    shutil.copytree(dumped.teacher, teacher)
    line = ["dump", "--teacher", teacher, "--corpus", dumped.corpus, "--out", tmp_path / "cache", "--select", "top-k:4"]
    assert logitcache(*line, "--block-length", 32, "--max-tokens", 600, "--device", "cpu").status == 0
    shutil.rmtree(teacher)
    shown = logitcache("stats", tmp_path / "cache", "--json")
    assert shown.status == 0
    assert {one["token"] for one in json.loads(shown.out)["top_ids"]} == {None}
    given = logitcache("stats", tmp_path / "cache", "--json", "--tokenizer", dumped.teacher)
    assert all(one["token"] for one in json.loads(given.out)["top_ids"])
    changed_teacher(dumped.teacher, teacher, lambda _: None, tiny_tokenizer(290))
    assert logitcache("stats", tmp_path / "cache").status == 0
    refused = logitcache("stats", tmp_path / "cache", "--tokenizer", teacher)
    assert refused.status == 2
    assert "is not the one this cache was made with" in refused.sentence


def test_plot(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    ran = logitcache("plot", dumped.top_k, "--out", tmp_path / "all.png", "--sample", 1)
    assert ran.status == 0
    assert ran.out == f"{dumped.top_k}: 1 picture in {tmp_path / 'all.png'}\n"
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads(logitcache("plot", dumped.top_k, "--out", tmp_path / "all", "--sample", 1, "--json").out)
    assert [Path(path).exists() for path in facts["pictures"]] == [True] * 6
    assert facts["left_out"] == {}


def test_plot_of_what_is_not_there(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """Draws have no mass that is kept exactly."""
    ran = logitcache("plot", dumped.sample, "--out", tmp_path / "all", "--sample", 1)
    why = "draws stand for the whole distribution, no weight is exact"
    assert ran.out == f"{dumped.sample}: 5 pictures in {tmp_path / 'all'}\nwithout kept mass: {why}\n"
    facts = json.loads(logitcache("plot", dumped.sample, "--out", tmp_path / "a.png", "--sample", 1, "--json").out)
    assert facts["left_out"] == {"kept_mass": why}
