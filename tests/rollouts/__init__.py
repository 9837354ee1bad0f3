"""Prompts with completions, and caches of them from a tiny teacher: masked, and of the same tokens without a mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache import models
from logitcache.dump import DumpOptions, DumpReport, Output, run_dump
from logitcache.selection import Selection
from logitcache.store import Blocks, Cache, open_cache, schema, verify
from tests.codec.rows import assert_equal
from tests.corpus.files import write_records
from tests.corpus.test_chat import CHATML
from tests.tiny import tiny_model, tiny_tokenizer

LENGTH, SEED = 13, 5
SPECS = ("top-k:7", "sample:11", "varopt:9", "label")


@dataclass(frozen=True)
class Rollouts:
    """Read only.

    Args:
        place: a folder with `teacher` (whose tokenizer has a chat template), `records.jsonl` and `other/records.jsonl`.
        masked: caches of `records.jsonl`, by selection, from one dump.
        whole: of the same tokens as ids, without a mask.
    """

    place: Path
    masked: dict[str, Path]
    whole: dict[str, Path]


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and completions of uneven lengths, some of them longer than a block and one prompt than several."""
    words = ["the", "cache", "keeps", "what", "its", "teacher", "knew", "and", "every", "student", "reads", "it"]
    rng = np.random.default_rng(seed)

    def text(words_in_it: int) -> str:
        return " ".join(rng.choice(words, words_in_it))

    rows = [{"prompt": text(int(rng.integers(1, 9))) + ":", "completion": " " + text(int(rng.integers(1, 12)))}
            for _ in range(count)]  # fmt: skip
    rows[2]["prompt"] = text(40)
    rows[3]["completion"] = ""
    return rows


def dump(place: Path, corpus: Path, *outputs: tuple[str, Path], **changes: Any) -> DumpReport:
    """Units of 4 blocks of 13 tokens."""
    return run_dump(given(place, corpus, *outputs, **changes))


def given(place: Path, corpus: Path, *outputs: tuple[str, Path], **changes: Any) -> DumpOptions:
    settings: dict[str, Any] = {
        "teacher": str(place / "teacher"),
        "corpus": (str(corpus),),
        "device": "cpu",
        "block_length": LENGTH,
        "batch_tokens": 3 * LENGTH,
        "unit_tokens": 4 * LENGTH,
        "seed": SEED,
        "prompt_field": "prompt",
        "completion_field": "completion",
    }
    made = tuple(Output(Selection.parse(spec), root) for spec, root in outputs)
    return DumpOptions(outputs=made, **{**settings, **changes})


NO_PAIRS = {"prompt_field": None, "completion_field": None}


def make_rollouts(place: Path) -> Rollouts:
    """Write everything below `place`."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    models.save_model(tiny_model(), place / "teacher", tokenizer)
    write_records(place, "jsonl", pairs(12))
    for folder in ("other", "ids"):
        (place / folder).mkdir()
    write_records(place / "other", "jsonl", pairs(7, seed=1))
    masked, whole = ({spec: place / kind / spec for spec in SPECS} for kind in ("masked", "whole"))
    with pytest.MonkeyPatch.context() as patch:
        # Two chunks in a unit.
        patch.setattr(schema, "CHUNK_TOKENS", 2 * LENGTH)
        dump(place, place / "records.jsonl", *masked.items())
    blocks = everything(open_cache(masked["label"]))
    path = write_records(place / "ids", "jsonl", [{"ids": blocks.tokens[blocks.valid].tolist()}])
    dump(place, path, *whole.items(), ids_field="ids", **NO_PAIRS)
    return Rollouts(place, masked, whole)


def everything(cache: Cache) -> Blocks:
    return cache.read_blocks(0, cache.num_blocks)


def mask_of(blocks: Blocks) -> np.ndarray:
    assert blocks.counted is not None
    return blocks.counted


def reopened(root: Path) -> Cache:
    report = verify(root)
    assert report.ok, report.problems
    return open_cache(root)


def assert_same(one: Blocks, other: Blocks) -> None:
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(mask_of(one), mask_of(other))
    assert_equal(one.targets, other.targets)
