"""run_training on several caches: teachers averaged, corpora mixed, each measured, and what does not go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from logitcache.algebra import BlockRanges, subset_cache
from logitcache.distill import run_training
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.errors import LogitcacheError, UsageError
from logitcache.reader import ReaderOptions
from logitcache.selection import Selection
from logitcache.training.options import TrainOptions
from logitcache.training.run_data import RunData
from tests.caches import BLOCK_LENGTH, Dumped, corpus_text, random_cache, student_yaml
from tests.runs import losses_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def other_text(dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher on another corpus, a third as long."""
    root = tmp_path_factory.mktemp("other")
    (root / "text.txt").write_text(corpus_text(33, first=2000))
    output = Output(Selection.parse("top-k:8"), root / "numbers")
    run_dump(
        DumpOptions(str(dumped.teacher), (str(root / "text.txt"),), (output,), device="cpu", block_length=BLOCK_LENGTH)
    )
    return output.root


@pytest.fixture
def values(dumped: Dumped, tmp_path: Path) -> dict[str, Any]:
    return {
        "cache": (str(dumped.top_k),),
        "student": str(student_yaml(tmp_path / "student.yaml")),
        "out": str(tmp_path / "out"),
        "max_steps": 4,
        "batch_tokens": 4 * BLOCK_LENGTH,
        "log_every": 1,
        "save_every": 2,
        "device": "cpu",
    }


def test_a_teacher_averaged_with_itself_is_that_teacher(values: dict[str, Any], dumped: Dumped) -> None:
    """The order of two caches is another one, so all 108 blocks in one batch."""
    values |= {"held_out": 0, "max_steps": 1, "batch_tokens": 108 * BLOCK_LENGTH}
    copies = (str(dumped.top_k), str(dumped.top_k))
    run_training(TrainOptions.build(values | {"out": values["out"] + "1"}))
    run_training(TrainOptions.build(values | {"cache": copies, "out": values["out"] + "2"}))
    assert losses_of(Path(values["out"] + "1")) == pytest.approx(losses_of(Path(values["out"] + "2")), rel=1e-5)


def test_averaged_and_mixed(values: dict[str, Any], dumped: Dumped, other_text: Path) -> None:
    """Two teachers' caches of one text, and a cache of another text, each corpus measured by itself."""
    caches = (str(dumped.top_k), str(other_text), str(dumped.dense))
    options = TrainOptions.build(values | {"cache": caches, "cache_weights": (1, 2, 3)})
    data = RunData(options)
    assert [source.location for source in data.sources] == [f"the average of {caches[0]} and {caches[2]}", caches[1]]
    assert data.sources[0].shares == [0.25, 0.75]
    result = run_training(options)
    assert {"eval_ce", "eval_kl", "eval_top_k_ce", "eval_top_k_kl", "eval_numbers_ce", "eval_numbers_kl"} <= set(result)
    low, high = sorted((result["eval_top_k_ce"], result["eval_numbers_ce"]))
    assert low <= result["eval_ce"] <= high
    record = json.loads(Path(values["out"], "run.json").read_text())
    assert len(record["fingerprints"]) == 3
    assert TrainOptions.build(record["options"]) == options


def test_corpora_count_as_much_as_they_hold_or_as_told(
    values: dict[str, Any], dumped: Dumped, other_text: Path
) -> None:
    both = values | {"cache": (str(dumped.top_k), str(other_text))}
    by_size = RunData(TrainOptions.build(both))
    first, second = (stop for _, stop in by_size.ranges)
    assert by_size.num_blocks == first + second
    assert first > 2 * second
    for weights, expected in (((), first / (first + second)), ((1, 1), 0.5), ((1, 3), 0.25)):
        data = RunData(TrainOptions.build(both | {"cache_weights": weights}))
        state = data.dataset(ReaderOptions(4)).state_dict()
        assert state["weights"][0] == pytest.approx(expected)
        assert state["blocks"] == [[0, first], [0, second]]


def test_a_mix_resumes_exactly(values: dict[str, Any], dumped: Dumped, other_text: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Stopped

    values |= {"cache": (str(dumped.top_k), str(other_text)), "max_steps": 6}
    run_training(TrainOptions.build(values))
    broken = TrainOptions.build(values | {"out": values["out"] + "2"})
    with pytest.raises(Stopped):
        run_training(broken, progress=stop)
    run_training(broken, resume=True)
    assert losses_of(Path(values["out"])) == losses_of(Path(values["out"] + "2"))
    turned = TrainOptions.build({**broken.model_dump(), "cache": broken.cache[::-1]})
    shutil.move(Path(broken.out, "result.json"), Path(broken.out, "was.json"))
    with pytest.raises(LogitcacheError, match="begun with other options"):
        run_training(turned, resume=True)


def test_subsets_of_one_corpus_are_mixed(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    """They name the same corpus and have the same size, but hold other blocks."""
    for name, ranges in (("low", "0:40"), ("high", "40:80")):
        subset_cache(dumped.top_k, tmp_path / name, BlockRanges.parse(ranges))
    parts = (str(tmp_path / "low"), str(tmp_path / "high"))
    assert len(RunData(TrainOptions.build(values | {"cache": parts})).sources) == 2
    with pytest.raises(LogitcacheError, match="hold other tokens or masks in blocks"):
        run_training(TrainOptions.build(values | {"cache": parts, "combine": "average"}))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cache_weights": (1, 2, 3)}, "--cache-weights gives 3 weights for 2 caches"),
    ({"cache_weights": (1, -2)}, "^--cache-weights 1.0,-2.0 makes no shares; give each cache a number above 0$"),
    ({"cache_weights": (1, 0)}, "--cache-weights 1.0,0.0 makes no shares"),
    ({"cache_weights": (1e308, 1e308)}, "--cache-weights 1e.308,1e.308 makes no shares"),
    ({"combine": "average"}, "cannot be averaged: corpus is"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_go_together(
    changes: dict[str, Any], message: str, values: dict[str, Any], dumped: Dumped, other_text: Path
) -> None:
    with pytest.raises(LogitcacheError, match=message):
        run_training(TrainOptions.build(values | {"cache": (str(dumped.top_k), str(other_text)), **changes}))
    assert not Path(values["out"]).exists()


def test_another_tokenizer_or_kind(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    strange = random_cache(tmp_path / "strange")
    with pytest.raises(LogitcacheError, match="cannot be mixed: tokenizer is"):
        RunData(TrainOptions.build(values | {"cache": (str(dumped.top_k), str(strange.root))}))
    with pytest.raises(LogitcacheError, match="cannot be averaged: unbiased is False and True"):
        RunData(TrainOptions.build(values | {"cache": (str(dumped.top_k), str(dumped.sample))}))
    with pytest.raises(UsageError, match="cache"):
        TrainOptions.build(values | {"cache": ()})
