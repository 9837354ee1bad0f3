"""Caches of prompts with completions, conversations and token ids, of a real (tiny) teacher: dump, reading, algebra."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache import models
from logitcache.algebra import BlockRanges, merge_caches, subset_cache
from logitcache.dump import run_dump
from logitcache.errors import (
    CacheError,
    CorpusError,
    PlanMismatchError,
    TrainingError,
    UsageError,
)
from logitcache.reader import AveragedCaches, CacheDataset, MixedCaches, ReaderOptions, make_batch
from logitcache.store import convert, open_cache, schema, verify
from tests.corpus.files import save_dataset, write_records
from tests.corpus.test_chat import TALK
from tests.faults import forkserver, run_killed, run_to_end
from tests.rollouts import (
    LENGTH,
    NO_PAIRS,
    SPECS,
    assert_same,
    dump,
    everything,
    given,
    mask_of,
    pairs,
    reopened,
)
from tests.store.caches import files_of, rewrite
from tests.tiny import save_tiny

children = forkserver()


# ---------------------------------------------------------------------------------------------- dump


def naive_stream(place: Path) -> tuple[list[int], list[bool]]:
    """Tokens and which are to be learnt: of a completion and the EOS after it."""
    tokenizer = models.load_tokenizer(place / "teacher")
    tokens: list[int] = []
    learnt: list[bool] = []
    for row in pairs(12):
        prompt, both = (tokenizer.encode(text, add_special_tokens=False) for text in
                        (row["prompt"], row["prompt"] + row["completion"]))  # fmt: skip
        assert both[: len(prompt)] == prompt
        tokens += [*both, 0]
        learnt += [False] * len(prompt) + [True] * (len(both) - len(prompt)) + [bool(row["completion"])]
    return tokens, learnt


@pytest.mark.parametrize("spec", SPECS)
def test_rows_stand_where_completions_are(
    place: Path, rollouts: dict[str, Path], whole: dict[str, Path], spec: str
) -> None:
    """There they are those of a cache of the same tokens without a mask; elsewhere nothing is, and no label."""
    masked, plain = reopened(rollouts[spec]), reopened(whole[spec])
    mine, theirs = everything(masked), everything(plain)
    tokens, learnt = naive_stream(place)
    assert mine.tokens[mine.valid].tolist() == theirs.tokens[theirs.valid].tolist() == tokens
    shifted = np.zeros(mine.valid.shape, dtype=bool)
    shifted.ravel()[: len(tokens) - 1] = learnt[1:]
    shifted[:, -1] = False
    counted = mask_of(mine)
    np.testing.assert_array_equal(counted, shifted)
    np.testing.assert_array_equal(mine.labels(), np.where(counted, theirs.labels(), -100))
    assert masked.num_counted == counted.sum() == (mine.labels() >= 0).sum() > 0
    here, there = (blocks.targets.take(np.flatnonzero(counted)) for blocks in (mine, theirs))
    np.testing.assert_array_equal(here.ids, there.ids)
    assert np.isfinite(here.label_logprob).all()
    np.testing.assert_allclose(here.label_logprob, there.label_logprob, atol=1 / 64 + 1e-6)
    if spec == "sample:11":
        np.testing.assert_array_equal(here.weights, there.weights)
    away = mine.targets.take(np.flatnonzero(~counted))
    assert not away.row_lengths.any()
    assert np.isnan(away.label_logprob).all()
    assert masked.stored_bytes()["label_logprob"] > 0


def test_the_rows_are_the_teachers(place: Path, rollouts: dict[str, Path]) -> None:
    blocks = everything(open_cache(rollouts["top-k:7"]))
    model = models.load_model(place / "teacher")
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.from_numpy(blocks.tokens)).logits.double(), -1).flatten(0, 1).numpy()
    for row in np.flatnonzero(mask_of(blocks)):
        ids = blocks.targets.slice(row, row + 1).ids
        np.testing.assert_array_equal(ids, np.sort(np.argsort(-expected[row], kind="stable")[:7]))
        label = blocks.labels().ravel()[row]
        np.testing.assert_allclose(blocks.targets.label_logprob[row], expected[row, label], atol=1 / 128 + 1e-4)


def test_a_chunk_in_which_nothing_counts(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, from which tables are counted; the teacher is not asked about it."""
    monkeypatch.setattr(schema, "CHUNK_TOKENS", 2 * LENGTH)
    late = [{"prompt": pairs(4)[2]["prompt"] * 3, "completion": " a word"}, *pairs(5)]
    corpus = write_records(tmp_path, "jsonl", late)
    outputs = {spec: tmp_path / spec for spec in SPECS}
    dump(place, corpus, *outputs.items())
    for root in outputs.values():
        cache = reopened(root)
        assert not mask_of(cache.read_chunk(cache.chunks[0])).any()
        assert mask_of(everything(cache)).any()


def test_a_killed_dump_resumes_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    from tests.test_dump import dump_job

    corpus, specs = place / "records.jsonl", ("varopt:9", "label")
    one, other = (
        given(place, corpus, *((spec, tmp_path / name / spec) for spec in specs), container="arrow")
        for name in ("one", "other")
    )
    run_to_end(children, dump_job, one)
    run_killed(children, dump_job, other, failpoint="commit.after_rename")
    assert (tmp_path / "other" / specs[0] / "work" / "mask.bin").exists()
    run_to_end(children, dump_job, other)
    for spec in specs:
        whole_run, resumed = files_of(tmp_path / "one" / spec), files_of(tmp_path / "other" / spec)
        assert resumed == whole_run
    assert run_dump(one).computed_tokens == 0


def test_verify_counts_what_the_manifest_says(rollouts: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(rollouts["label"], root)
    assert verify(root).counted == open_cache(root).num_counted
    rewrite(root / "manifest.json", counters={"counted": 1})
    (problem,) = verify(root).problems
    assert re.search(r"\d+ positions count, not the 1 that the manifest's counters say", problem.what)


def test_a_mask_that_was_lost_is_made_again(place: Path, tmp_path: Path) -> None:
    from tests.test_dump import dump_job

    options = given(place, place / "records.jsonl", ("label", tmp_path / "cache"))
    run_killed(children, dump_job, options, failpoint="commit.after_link")
    mask = tmp_path / "cache" / "work" / "mask.bin"
    mask.write_bytes(bytes(len(mask.read_bytes())))
    run_dump(options)
    assert mask_of(everything(reopened(tmp_path / "cache"))).any()


def test_other_fields_are_refused(place: Path, rollouts: dict[str, Path]) -> None:
    rows = [{**row, "answer": row["completion"]} for row in pairs(12)]
    (place / "answers").mkdir()
    corpus = write_records(place / "answers", "jsonl", rows)
    with pytest.raises(PlanMismatchError, match="completion-field: the cache has 'completion', this run 'answer'"):
        dump(place, corpus, ("label", rollouts["label"]), completion_field="answer")


def test_messages(place: Path, tmp_path: Path) -> None:
    corpus = write_records(tmp_path, "parquet", [{"chat": TALK}, {"chat": TALK[:2]}, {"chat": TALK}])
    fields = {**NO_PAIRS, "messages_field": "chat"}
    dump(place, corpus, ("sample:11", tmp_path / "cache"), **fields)
    cache = reopened(tmp_path / "cache")
    tokenizer = models.load_tokenizer(place / "teacher")
    blocks = everything(cache)
    text = "".join(tokenizer.apply_chat_template(talk, tokenize=False) for talk in (TALK, TALK[:2], TALK))
    assert tokenizer.decode(blocks.tokens[blocks.valid]) == text
    learnt = np.pad(mask_of(blocks)[:, :-1], ((0, 0), (1, 0)))
    said = tokenizer.decode(blocks.tokens[learnt])
    # A block's first token is no position's next one, so it may be missing.
    assert set(said) <= set("One.[end]\n\n\nTwo, three.[end]\n")
    identity = cache.manifest.identity.corpus
    assert identity["packing"]["eos"] == identity["packing"]["bos"] == "none"
    assert len(identity["chat_template_sha256"]) == 64
    with pytest.raises(UsageError, match="the chat template writes the special tokens of messages; leave them at auto"):
        dump(place, corpus, ("sample:11", tmp_path / "cache"), eos="document", **fields)
    save_tiny(tmp_path / "plain")
    with pytest.raises(UsageError, match="the teacher's tokenizer has no chat template"):
        dump(place, corpus, ("label", tmp_path / "no"), teacher=str(tmp_path / "plain"), **fields)
    assert not (tmp_path / "no").exists()


def test_a_saved_dataset_of_token_ids(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(0, 300, int(rng.integers(1, 30))).tolist()} for _ in range(9)]
    corpus = save_dataset(tmp_path / "saved", rows)
    fields = {**NO_PAIRS, "ids_field": "input_ids"}
    dump(place, corpus, ("top-k:7", tmp_path / "cache"), **fields)
    blocks = everything(reopened(tmp_path / "cache"))
    assert blocks.tokens[blocks.valid].tolist() == [token for row in rows for token in row["input_ids"]]
    assert blocks.counted is None
    dump(place, corpus, ("top-k:7", tmp_path / "ended"), eos="document", **fields)
    assert open_cache(tmp_path / "ended").num_tokens == sum(
        len(row["input_ids"]) + (row["input_ids"][-1] != 0) for row in rows
    )
    save_dataset(tmp_path / "wrong", [*rows, {"input_ids": [7, 300]}])
    with pytest.raises(CorpusError, match=r"data-00001-of-00002.arrow row 4 holds token id 300 \(number 1 of its list"):
        dump(place, tmp_path / "wrong", ("top-k:7", tmp_path / "no"), **fields)
    assert not (tmp_path / "no").exists()


def test_a_mask_beside_token_ids(place: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(5, 30)), "mask": [0] * 20 + [1] * 5}, {"input_ids": [4, 5], "mask": [1, 1]}]
    corpus = write_records(tmp_path, "stream.arrow", rows)
    fields = {**NO_PAIRS, "ids_field": "input_ids", "mask_field": "mask"}
    dump(place, corpus, ("label", tmp_path / "cache"), **fields)
    labels = everything(open_cache(tmp_path / "cache")).labels()
    # Token 26 of the stream, the second row's 5, is the first of a block.
    assert labels[labels >= 0].tolist() == [25, 26, 27, 28, 29, 4]


# ---------------------------------------------------------------------------------------------- reading, algebra


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("with_targets", [True, False])
def test_batches_hold_the_mask(rollouts: dict[str, Path], spec: str, with_targets: bool) -> None:
    cache = open_cache(rollouts[spec])
    options = ReaderOptions(3, shuffle=False, with_targets=with_targets)
    seen = 0
    for batch in CacheDataset(cache, options, num_batches=cache.num_blocks // 3):
        blocks = cache.read_blocks(seen, seen + 3)
        np.testing.assert_array_equal(batch["input_ids"].numpy(), blocks.tokens)
        np.testing.assert_array_equal(batch["labels"].numpy(), blocks.labels())
        if with_targets:
            plain = make_batch([blocks])["targets"]
            for name, values in batch["targets"].items():
                torch.testing.assert_close(values, plain[name], rtol=0, atol=0, equal_nan=True)
        seen += 3
    assert seen > 6


def test_mixed_with_a_cache_without_a_mask(rollouts: dict[str, Path], whole: dict[str, Path]) -> None:
    caches = [open_cache(folders["sample:11"]) for folders in (rollouts, whole)]
    options = ReaderOptions(4, shuffle=False)
    batch = next(iter(CacheDataset(MixedCaches(caches, [0.5, 0.5]), options)))
    wanted = [cache.read_blocks(number, number + 1).labels() for number in range(2) for cache in caches]
    np.testing.assert_array_equal(batch["labels"].numpy(), np.concatenate(wanted))


def test_only_caches_of_one_mask_are_averaged(rollouts: dict[str, Path], whole: dict[str, Path]) -> None:
    masked, plain = (open_cache(folders["label"]) for folders in (rollouts, whole))
    average = AveragedCaches([masked, masked])
    tokens, rows, counted = average.read(average.chunks[0])
    alone = masked.read_rows(masked.chunks[0])
    np.testing.assert_array_equal(tokens, alone[0])
    np.testing.assert_allclose(rows.label_logprob, alone[1].label_logprob, rtol=1e-6)  # type: ignore[union-attr]
    np.testing.assert_array_equal(counted, alone[2])
    with pytest.raises(TrainingError, match=r"cannot be averaged: mask is \w{12} and none; dump both"):
        AveragedCaches([masked, plain])


@pytest.mark.parametrize("spec", SPECS)
def test_masked_caches_are_converted_subset_and_merged(
    place: Path, rollouts: dict[str, Path], spec: str, tmp_path: Path
) -> None:
    source = open_cache(rollouts[spec])
    convert(source.root, tmp_path / "arrow", "arrow")
    assert_same(everything(reopened(tmp_path / "arrow")), everything(source))
    subset_cache(source.root, tmp_path / "part", BlockRanges.parse("5,0:3"))
    part = reopened(tmp_path / "part")
    for number, block in enumerate([5, 0, 1, 2]):
        assert_same(part.read_blocks(number, number + 1), source.read_blocks(block, block + 1))
    dump(place, place / "other" / "records.jsonl", (spec, tmp_path / "other"))
    merge_caches([source.root, tmp_path / "other"], tmp_path / "both")
    both, other = reopened(tmp_path / "both"), open_cache(tmp_path / "other")
    assert_same(both.read_blocks(0, source.num_blocks), everything(source))
    assert_same(both.read_blocks(source.num_blocks, both.num_blocks), everything(other))
    assert both.num_counted == source.num_counted + other.num_counted
    assert "mask_sha256" in both.manifest.identity.corpus


def test_masked_and_whole_caches_are_not_merged(
    rollouts: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match=r"codec\.masked: True and None"):
        merge_caches([rollouts["sample:11"], whole["sample:11"]], tmp_path / "both")


@pytest.mark.usefixtures("one_thread")
def test_runs_of_one_plan_are_united(place: Path, tmp_path: Path) -> None:
    from tests.test_dump import dump_job

    options = {name: given(place, place / "records.jsonl", ("sample:11", tmp_path / name)) for name in ("one", "two")}
    run_killed(children, dump_job, options["one"], failpoint="commit.after_link")
    run_dump(options["two"])
    merge_caches([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert_same(everything(reopened(tmp_path / "both")), everything(open_cache(tmp_path / "two")))
