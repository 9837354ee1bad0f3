"""The whole way through the command line: dump, verify, inspect, train, resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli.console import NOTHING, out
from logitcache.store import open_cache
from tests.caches import Dumped, corpus_text, student_yaml
from tests.cli.conftest import Main
from tests.golden.rows import DRAWS, HEADS_AND_TAILS, LONGEST
from tests.runs import assert_same_weights, result_of
from tests.tiny import tiny_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"
SCRIPT = [sys.executable, "-m", "logitcache.cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def dump_line(dumped: Dumped, out: Path, *more: str) -> list[str]:
    line = ["dump", "--teacher", str(dumped.teacher), "--corpus", str(dumped.corpus), "--out", str(out)]
    return [*line, "--select", "top-k:4", "--block-length", "32", "--device", "cpu", *more]


# -------------------------------------------------------------------------------------- inside this process


def test_dump_again_and_json(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    line = dump_line(dumped, tmp_path / "cache", "--also", "sample:7", str(tmp_path / "other"))
    first = logitcache(*line)
    assert first.status == 0
    assert "top-k:4" in first.out
    assert "sample:7" in first.out
    assert "tokens computed in" in first.out
    assert "running the teacher" in first.err
    facts = logitcache(*line, "--json")
    assert facts.status == 0
    report = json.loads(facts.out)
    assert report["computed_tokens"] == 0
    assert [row["select"] for row in report["caches"]] == ["top-k:4", "sample:7"]
    for row in report["caches"]:
        cache = open_cache(row["cache"])
        assert (row["tokens"], row["fingerprint"]) == (cache.num_tokens, cache.fingerprint)
        assert row["bytes"] == sum(path.stat().st_size for path in cache.root.rglob("*") if path.is_file())
        assert row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"])
    assert "Nothing was left to compute" in logitcache(*line).out


def test_dump_into_arrow_files(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    line = dump_line(dumped, tmp_path / "cache", "--container", "arrow")
    assert logitcache(*line).status == 0
    assert {path.suffix for path in (tmp_path / "cache" / "shards").iterdir()} == {".arrow"}
    assert json.loads(logitcache("inspect", tmp_path / "cache", "--json").out)["container"] == "arrow"
    assert logitcache("verify", tmp_path / "cache").status == 0
    ran = logitcache(*dump_line(dumped, tmp_path / "cache"))
    assert ran.status == 1
    assert "\n  --container: the cache has 'arrow', this run 'zarr'" in ran.err


def test_dump_with_other_arguments(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """The difference is a list: the one message of several lines."""
    assert logitcache(*dump_line(dumped, tmp_path / "cache")).status == 0
    ran = logitcache(*dump_line(dumped, tmp_path / "cache", "--seed", "4", "--select", "top-k:5"))
    assert ran.status == 1
    assert "was begun with other arguments" in ran.err
    assert "\n  --seed: the cache has 0, this run 4" in ran.err
    assert "\n  --select: the cache has 'top-k:4', this run 'top-k:5'" in ran.err
    assert "Traceback" not in ran.err
    tried = logitcache(*dump_line(dumped, tmp_path / "cache", "--seed", "4", "--dry-run"))
    assert tried.status == 1
    assert "\n  --seed: the cache has 0, this run 4" in tried.err


def test_verify(logitcache: Main, dumped: Dumped) -> None:
    shown = logitcache("verify", dumped.sample)
    assert (shown.status, shown.err) == (0, "")
    cache = open_cache(dumped.sample)
    assert shown.out == f"{dumped.sample}: whole; 7 shards, {cache.num_tokens:,} tokens checked\n"
    report = json.loads(logitcache("verify", dumped.sample, "--json").out)
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["tokens"] == cache.num_tokens
    assert report["num_bytes"] == cache.num_bytes


def test_inspect_facts(logitcache: Main, dumped: Dumped) -> None:
    cache = open_cache(dumped.top_k)
    shown = logitcache("inspect", dumped.top_k)
    assert shown.status == 0
    assert cache.fingerprint in shown.out
    assert f"{cache.num_tokens:,}" in shown.out
    facts = json.loads(logitcache("inspect", dumped.top_k, "--json").out)
    assert facts["select"] == "top-k:8"
    assert facts["vocabulary"] == 300
    assert facts["ids per token"] == 8
    assert facts["block length"] == 32
    assert facts["complete"] is True
    assert facts["shards"] == facts["shard files"] == 7
    assert shown.err == ""


def test_inspect_says_that_shards_are_missing(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    shutil.copytree(dumped.top_k, tmp_path / "cache")
    lost = sorted((tmp_path / "cache" / "shards").iterdir())[2:4]
    for path in lost:
        path.unlink()
    shown = logitcache("inspect", tmp_path / "cache")
    assert shown.status == 0
    assert shown.err == (
        f"warning: 2 of 7 shard files are missing, for example {lost[0].name}; restore what is missing, or run the "
        "same dump again\n"
    )
    facts = json.loads(logitcache("inspect", tmp_path / "cache", "--json").out)
    assert (facts["shards"], facts["shard files"]) == (7, 5)
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("sample-exponent-small-zarr", f"sample:{DRAWS}:0.75"),
        ("top-p-fast-arrow", f"top-p:0.95:{LONGEST}"),
        ("varopt-small-arrow", f"varopt:{HEADS_AND_TAILS}"),
    ],
)
def test_selections_are_spelled_as_they_are_given(logitcache: Main, name: str, spec: str) -> None:
    assert json.loads(logitcache("inspect", GOLDEN / name, "--json").out)["select"] == spec


@pytest.mark.parametrize("position", [0, 31, 40, -1])
def test_inspect_position(logitcache: Main, dumped: Dumped, position: int) -> None:
    """A block's first, an inner and its last position, and the corpus' last."""
    cache = open_cache(dumped.top_k)
    position %= cache.num_tokens
    block, place = divmod(position, 32)
    blocks = cache.read_blocks(block, block + 1)
    row = blocks.targets.slice(place, place + 1)
    facts = json.loads(logitcache("inspect", dumped.top_k, "--position", position, "--json").out)
    listed = {entry["id"]: entry["weight"] for entry in facts["teacher"]}
    assert listed == pytest.approx(dict(zip(row.ids.tolist(), row.weights.tolist(), strict=True)))
    assert list(listed.values()) == sorted(listed.values(), reverse=True)
    tokenizer = tiny_tokenizer()
    assert facts["context"] == tokenizer.decode(blocks.tokens[0, : place + 1].tolist())
    label = int(blocks.labels()[0, place])
    assert facts["next_id"] == (label if label >= 0 else None)
    assert (facts["label_logprob"] is None) == (label < 0)
    shown = logitcache("inspect", dumped.top_k, "--position", position, "--rows", 3)
    assert shown.status == 0
    assert "5 more entries" in shown.out
    assert ("there is no next token" in shown.out) == (label < 0)


def test_inspect_on_a_narrow_terminal(logitcache: Main, dumped: Dumped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are folded; no id, weight or hash is cut."""
    monkeypatch.setattr(out, "_width", 40)
    facts = logitcache("inspect", dumped.top_k).out
    assert open_cache(dumped.top_k).fingerprint in re.sub(r"\s", "", facts)
    shown = logitcache("inspect", dumped.top_k, "--position", 40).out
    assert "…" not in facts + shown
    row = open_cache(dumped.top_k).read_blocks(1, 2).targets.slice(8, 9)
    for token, weight in zip(row.ids, row.weights, strict=True):
        assert re.search(rf"^ *{token} .* {weight:.4f} *$", shown, re.MULTILINE)


def test_nothing_is_folded_in_a_pipe(dumped: Dumped, tmp_path: Path) -> None:
    """A path longer than most terminals are wide."""
    root = tmp_path / ("a-long-name-" * 10)
    shutil.copytree(dumped.top_k, root)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "COLUMNS"}
    ran = subprocess.run([*SCRIPT, "inspect", str(root)], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.splitlines()[0].split() == ["cache", str(root)]
    assert open_cache(root).fingerprint in ran.stdout


def test_inspect_says_which_weights_are_exact(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    line = ("dump", "--teacher", dumped.teacher, "--corpus", dumped.corpus, "--block-length", 32, "--max-tokens", 64)
    assert logitcache(*line, "--select", "varopt:9", "--out", root).status == 0
    row = open_cache(root).read_blocks(0, 1).targets.slice(5, 6)
    facts = json.loads(logitcache("inspect", root, "--position", 5, "--json").out)
    exact = {entry["id"] for entry in facts["teacher"] if entry["exact"]}
    assert exact == set(row.ids[row.weights > row.threshold[0]].tolist())
    assert 0 < len(exact) < 9
    shown = logitcache("inspect", root, "--position", 5).out
    assert shown.count(" =0.") == len(exact)
    assert "the others are sampled" in shown


def test_inspect_block(logitcache: Main, dumped: Dumped) -> None:
    cache = open_cache(dumped.sample)
    last = cache.num_blocks - 1
    blocks = cache.read_blocks(last, last + 1)
    real = cache.num_tokens - last * 32
    facts = json.loads(logitcache("inspect", dumped.sample, "--block", last, "--json").out)
    assert facts["tokens"] == real
    assert facts["text"] == tiny_tokenizer().decode(blocks.tokens[0, :real].tolist())
    assert facts["entropy"] == pytest.approx(float(blocks.targets.entropy[:real].mean()))
    assert facts["cross_entropy"] == pytest.approx(float(-blocks.targets.label_logprob[: real - 1].mean()))
    assert "teacher's cross entropy" in logitcache("inspect", dumped.sample, "--block", 0).out


def test_inspect_without_the_tokenizer(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """Ids are shown, and how to get text; JSON stays JSON."""
    teacher = tmp_path / "teacher"
    shutil.copytree(dumped.teacher, teacher)
    line = dump_line(dumped, tmp_path / "cache")
    line[2] = str(teacher)
    assert logitcache(*line).status == 0
    shutil.rmtree(teacher)
    shown = logitcache("inspect", tmp_path / "cache", "--position", 3)
    assert shown.status == 0
    assert "give the tokenizer with --tokenizer" in shown.out + shown.err
    facts = json.loads(logitcache("inspect", tmp_path / "cache", "--position", 3, "--json").out)
    assert facts["context"] == " ".join(map(str, open_cache(tmp_path / "cache").read_blocks(0, 1).tokens[0, :4]))
    again = logitcache("inspect", tmp_path / "cache", "--block", 0, "--tokenizer", dumped.teacher)
    assert "Line 0 says" in again.out


def train_line(dumped: Dumped, tmp_path: Path) -> list[str]:
    student = student_yaml(tmp_path / "student.yaml")
    line = ["train", "--cache", str(dumped.top_k), "--student", str(student), "--out", str(tmp_path / "run")]
    return [*line, "--batch-tokens", "128", "--max-steps", "4", "--device", "cpu"]


def test_train_and_resume(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    line = train_line(dumped, tmp_path)
    shown = logitcache(*line)
    assert shown.status == 0
    assert "The student is in" in shown.out
    assert "train: loading" in shown.err
    assert "Writing model shards" not in shown.err
    again = logitcache(*line, "--resume", "--json")
    assert again.status == 0
    assert json.loads(again.out)["steps"] == 4
    run = tmp_path / "run"
    assert "nothing is left to train" not in shown.err
    assert again.err == (
        f"train: loading\ntrain: the run in {run} is finished and nothing is left to train; to train its student "
        f"on, start another run with --student {run} and another --out\n"
    )
    # As it says.
    on = logitcache(*line, "--student", run, "--out", tmp_path / "on", "--json")
    assert on.status == 0
    assert json.loads(on.out)["eval_ce"] < json.loads(again.out)["eval_ce"]
    refused = logitcache(*line)
    assert refused.status == 1
    assert "go on with --resume" in refused.sentence


def test_options_in_a_config_file(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """The command line wins over the file, --set over both; names with hyphens are the same."""
    config = tmp_path / "train.yaml"
    config.write_text("alpha: 0.5\nbatch-tokens: 64\nmax_steps: 3\nseed: 5\n")
    line = train_line(dumped, tmp_path)
    ran = logitcache(*line, "--config", config, "--set", "warmup=0.5", "--set", "log-every=2", "--set", "seed=6")
    assert ran.status == 0
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    chosen = {name: options[name] for name in ("alpha", "batch_tokens", "max_steps", "warmup", "log_every", "seed")}
    assert chosen == {"alpha": 0.5, "batch_tokens": 128, "max_steps": 4, "warmup": 0.5, "log_every": 2, "seed": 6}


def test_the_folder_of_a_run_repeats_it(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert logitcache(*train_line(dumped, tmp_path), "--tail", "renormalised", "--eval-text", dumped.corpus).status == 0
    assert logitcache("train", "--config", run / "train.yaml", "--out", again).status == 0
    assert result_of(run) == result_of(again)
    assert_same_weights(run, again)
    record = json.loads((again / "run.json").read_text())
    assert record["command"][1:] == ["train", "--config", str(run / "train.yaml"), "--out", str(again)]
    assert record["world_size"] == 1
    assert {"accelerate", "numpy", "torch", "transformers"} <= record["versions"].keys()


def test_an_objective_on_the_command_line(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    line = train_line(dumped, tmp_path)
    chosen = ["--objective", "skew-kl", "--tail", "renormalised", "--beta", "0.2", "--reverse", "--z-loss", "1e-4"]
    chosen += ["--mask", "student-entropy:0.5", "--mask-rest", "nothing"]
    assert logitcache(*line, *chosen, "--temperature", "2").status == 0
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    names = ("objective", "tail", "beta", "reverse", "clip", "blend", "blend_end", "z_loss", "mask", "mask_rest")
    assert [options[name] for name in names] == [
        *("skew-kl", "renormalised", 0.2, True, None, None, None, 1e-4, "student-entropy:0.5", "nothing")
    ]
    refused = logitcache(*line, *chosen, "--temperature", "2", "--resume", "--beta", "0.3")
    assert refused.status == 1
    assert "beta: the run has 0.2, now 0.3" in refused.err
    for given, status, words in (
        (("--objective", "tvd", "--clip", "3"), 2, "--objective tvd has no --clip, but --clip is 3.0; leave it out"),
        (("--tail", "blend"), 1, "dump a cache with --select varopt:K"),
        (("--blend", "0.3"), 2, "only --tail blend mixes two terms"),
        (("--blend", "3"), 2, "less than or equal to 1"),
        (("--mask", "0.85"), 2, "the mask '0.85' is not understood; write what ranks the tokens"),
        (("--mask-rest", "nothing"), 2, "there is no mask"),
        (("--mask", "student-entropy:0.5", "--mask-rest", "ce"), 2, "mask-rest"),
    ):
        refused = logitcache(*line, *given, "--set", f"out={tmp_path / 'other'}")
        assert refused.status == status
        assert words in refused.sentence


# ----------------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text(corpus_text(6000))
    return path


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_and_resumed(
    sent: signal.Signals, status: int, logitcache: Main, dumped: Dumped, long_text: Path, tmp_path: Path
) -> None:
    """The signal goes out when the teacher has begun to run; the same line then finishes the cache."""
    line = dump_line(dumped, tmp_path / "cache", "--corpus", str(long_text), "--unit-tokens", "2048")
    process = subprocess.Popen([*SCRIPT, *line], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for text in process.stderr:
        said.append(text)
        if "running the teacher" in text:
            process.send_signal(sent)
    assert process.wait() == status, "".join(said)
    assert "the same command goes on from there" in said[-1]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    finished = logitcache(*line, "--json")
    assert finished.status == 0
    tokens = open_cache(tmp_path / "cache").num_tokens
    assert 0 < json.loads(finished.out)["computed_tokens"] <= tokens
    assert logitcache("verify", tmp_path / "cache").status == 0


TRIAL = "dump --dry-run --select label --block-length 32"
STOPPED = """
import os, signal, sys
from logitcache.cli.main import main
from logitcache.cli.progress import View
signal.signal(signal.SIGINT, signal.default_int_handler)
sent = int(sys.argv[1])
View.stage = View.bar = lambda *_: os.kill(os.getpid(), sent)
sys.argv = ["logitcache", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize(
    ("command", "sent", "said"),
    [
        ("stats {top_k}", signal.SIGINT, "interrupted; nothing was written"),
        ("derive {top_k} --select top-k:4 --out {out}", signal.SIGINT, "interrupted; what is committed is kept, and"),
        ("export {top_k} --to parquet --out {out}", signal.SIGTERM, "stopped by SIGTERM; nothing is kept; the same"),
        (f"{TRIAL} --teacher {{teacher}} --corpus {{corpus}} --out {{out}}", signal.SIGINT, NOTHING),
    ],
)
def test_what_is_said_of_what_was_stopped(
    command: str, sent: signal.Signals, said: str, dumped: Dumped, tmp_path: Path
) -> None:
    """Only of commands that write is it said how to go on; the signal comes with its first sign of life."""
    line = command.format(**vars(dumped), out=tmp_path / "out").split()
    ran = subprocess.run(
        [sys.executable, "-c", STOPPED, str(int(sent)), *line], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ran.returncode == 128 + sent
    assert said in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


MODULES = """
import sys
from logitcache.cli.main import main
sys.argv = ["logitcache", *sys.argv[1:]]
try:
    main()
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def modules_of(*arguments: Any) -> set[str]:
    """Modules loaded when a command line has run."""
    command = [sys.executable, "-c", MODULES, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return set(ran.stderr.split())


def test_quick_commands_load_no_torch(dumped: Dumped) -> None:
    names = ("inspect", "verify", "gc", "repair")
    for arguments in (["--help"], ["dump", "--watch", dumped.top_k], *([name, dumped.top_k] for name in names)):
        assert not modules_of(*arguments) & {"torch", "transformers", "matplotlib", "pyarrow", "botocore"}, arguments
