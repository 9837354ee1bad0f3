"""Rows left out because the teacher's logits were not finite: a cache made of others has its own count, or none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitcache import models
from logitcache.algebra import BlockRanges, Derivation, derive_cache, merge_caches, subset_cache
from logitcache.dump import run_dump
from logitcache.errors import DamagedCacheError
from logitcache.selection import Selection
from logitcache.store import convert, open_cache, push, verify
from tests.corpus.files import write_records
from tests.rollouts import pairs
from tests.s3 import Proxy
from tests.store.caches import rewrite
from tests.test_dump import LENGTH, options
from tests.test_nonfinite import MASK, everything, followed, logits_of, make_place
from tests.tiny import tiny_model, tiny_tokenizer

NARROW = Derivation(Selection.parse("top-k:3"))


@dataclass(frozen=True)
class Made:
    """A cache, and the rows that are left out of each of its blocks, int64 [blocks]."""

    root: Path
    left_out: NDArray[np.int64]

    def of(self, *blocks: int | slice) -> int:
        return sum(int(self.left_out[part].sum()) for part in blocks)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def plain(place: Path) -> Made:
    """Every position has a row that can; units of 8 blocks."""
    run_dump(options(place, ("top-k:7", place / "plain"), **MASK))
    return Made(place / "plain", left_out(place, place / "plain", followed(everything(place / "plain"))))


@pytest.fixture(scope="module")
def prompted(place: Path) -> Made:
    """Of completions alone, the last of which overflow; units of 2 blocks."""
    rows = [{**row, "completion": row["completion"] + " ü" * (number > 8)} for number, row in enumerate(pairs(14))]
    fields = {"corpus": (str(write_records(place, "jsonl", rows)),), "unit_tokens": 2 * LENGTH}
    fields |= {"prompt_field": "prompt", "completion_field": "completion"}
    run_dump(options(place, ("top-k:7", place / "prompted"), **fields, **MASK))
    models.save_model(tiny_model(), place / "sound", tiny_tokenizer())
    run_dump(options(place, ("label", place / "wanted"), teacher=str(place / "sound"), **fields))
    wanted = everything(place / "wanted").counted
    assert wanted is not None
    return Made(place / "prompted", left_out(place, place / "prompted", wanted))


def left_out(place: Path, root: Path, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """As the teacher says. bool [B, L] -> int64 [B]."""
    finite = torch.isfinite(logits_of(place, everything(root).tokens)).all(-1).numpy()
    found: NDArray[np.int64] = (wanted & ~finite).sum(1)
    assert open_cache(root).num_nonfinite == found.sum() > 3
    return found


def counts(root: Path) -> list[int | None]:
    """Each unit's, from the commit records."""
    return [json.loads(path.read_text())["counters"].get("nonfinite") for path in sorted((root / "commits").iterdir())]


def subset(made: Made, root: Path, blocks: str) -> int | None:
    subset_cache(made.root, root, BlockRanges.parse(blocks))
    assert verify(root).ok
    return open_cache(root).num_nonfinite


def test_masks_tell_where_nothing_else_is_masked(plain: Made, tmp_path: Path) -> None:
    """In each unit of what was made, whatever blocks it has."""
    size = plain.left_out.size
    derive_cache(plain.root, tmp_path / "derived", NARROW)
    assert subset(plain, tmp_path / "part", "9,2:5,10:") == plain.of(9, slice(2, 5), slice(10, None))
    # Cut from one that was merged of one that was derived, and without the old one's commit records.
    merge_caches([tmp_path / "part", plain.root], tmp_path / "both")
    part = np.concatenate([[9], np.arange(2, 5), np.arange(10, size)])
    both = Made(tmp_path / "both", np.concatenate([plain.left_out[part], plain.left_out]))
    again = both.left_out.size - 2
    assert subset(both, tmp_path / "again", f"0,{again}") == both.of(0, again)
    for root, wanted in [(tmp_path / "derived", plain.left_out), (both.root, both.left_out)]:
        units = open_cache(root).manifest.identity.geometry.unit_blocks
        assert counts(root) == [int(wanted[unit : unit + units].sum()) for unit in range(0, wanted.size, units)]
        assert verify(root).nonfinite == wanted.sum()


def test_where_prompts_are_masked_whole_units_are_known(prompted: Made, tmp_path: Path) -> None:
    whole = prompted.left_out.sum()
    derive_cache(prompted.root, tmp_path / "derived", NARROW)
    assert open_cache(tmp_path / "derived").num_nonfinite == whole
    units = [prompted.of(slice(first, first + 2)) for first in range(0, prompted.left_out.size, 2)]
    some, none = units.index(max(units)), units.index(0)
    blocks = f"{2 * some + 1},{none * 2},{2 * some}"
    assert subset(prompted, tmp_path / "unit", blocks) == units[some]
    assert subset(prompted, tmp_path / "sound", f"{2 * none + 1}") == 0
    convert(prompted.root, tmp_path / "arrow", "arrow")
    converted = Made(tmp_path / "arrow", prompted.left_out)
    assert subset(converted, tmp_path / "unit-of-arrow", blocks) == units[some]
    # Half of it: prompts and what overflowed look the same.
    assert subset(prompted, tmp_path / "half", f"{2 * some}") is None
    assert subset(Made(tmp_path / "half", prompted.left_out), tmp_path / "quarter", "0") is None
    assert counts(tmp_path / "half") == [None]
    # What was made of caches is known as a whole.
    derived = Made(tmp_path / "derived", prompted.left_out)
    assert subset(derived, tmp_path / "unit-of-derived", blocks) is None
    assert subset(derived, tmp_path / "shuffled", "1:,0") == whole


def test_of_a_cache_in_a_bucket(prompted: Made, proxy: Proxy, tmp_path: Path) -> None:
    url = f"{proxy.bucket('left-out')}/cache"
    push(prompted.root, url)
    unit = int(prompted.left_out.argmax()) // 2 * 2
    subset_cache(url, tmp_path / "unit", BlockRanges.parse(f"{unit}:{unit + 2}"))
    assert open_cache(tmp_path / "unit").num_nonfinite == prompted.of(slice(unit, unit + 2)) > 0


def test_a_merge_has_the_sum(plain: Made, prompted: Made, tmp_path: Path) -> None:
    """Also of caches with and without prompts."""
    merge_caches([plain.root, prompted.root], tmp_path / "both")
    both = open_cache(tmp_path / "both")
    assert both.num_nonfinite == plain.left_out.sum() + prompted.left_out.sum()
    assert verify(both.root).ok
    assert subset(Made(both.root, plain.left_out), tmp_path / "part", "0:3") is None
    assert subset(prompted, tmp_path / "half", str(prompted.left_out.argmax())) is None
    merge_caches([plain.root, tmp_path / "half"], tmp_path / "with-unknown")
    assert open_cache(tmp_path / "with-unknown").num_nonfinite is None


def test_of_other_caches_there_is_no_count(prompted: Made, tmp_path: Path) -> None:
    derive_cache(prompted.root.with_name("wanted"), tmp_path / "derived", Derivation(codec="fast"))
    assert set(open_cache(tmp_path / "derived").manifest.counters) == {"counted"}


def test_a_count_is_not_made_up_from_some_units(plain: Made, tmp_path: Path) -> None:
    """As of a cache that an earlier version began, without counting."""
    root = tmp_path / "derived"
    derive_cache(plain.root, root, NARROW)
    first, *others = sorted((root / "commits").iterdir())
    rewrite(first, counters={"counted": json.loads(first.read_text())["counters"]["counted"]})
    for path in [*others, root / "manifest.json"]:
        path.unlink()
    derive_cache(plain.root, root, NARROW)
    assert others
    assert counts(root) == [None] * (1 + len(others))
    assert open_cache(root).num_nonfinite is None


def test_a_lost_commit_record(prompted: Made, tmp_path: Path) -> None:
    """The counts of units stand nowhere else."""
    convert(prompted.root, tmp_path / "arrow", "arrow")
    (tmp_path / "arrow" / "commits" / "000001.json").unlink()
    with pytest.raises(DamagedCacheError, match=r"commits/000001\.json is missing; restore the file$"):
        subset_cache(tmp_path / "arrow", tmp_path / "part", BlockRanges.parse("0"))
