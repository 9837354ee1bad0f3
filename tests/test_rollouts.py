"""Caches of prompts with completions, conversations and token ids, and caches of the labels' log-probabilities alone:
from a real (tiny) teacher through dump, reader, algebra, exports and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from logitcache import models
from logitcache.algebra import BlockRanges, Derivation, derive_cache, merge_caches, subset_cache
from logitcache.distill import run_training
from logitcache.dump import DumpOptions, DumpReport, Output, run_dump
from logitcache.errors import (
    CacheError,
    CorpusError,
    InterchangeError,
    ObjectiveError,
    PlanMismatchError,
    TrainingError,
    UsageError,
)
from logitcache.interchange import export_cache
from logitcache.losses import Objective, distillation_loss
from logitcache.reader import AveragedCaches, CacheDataset, MixedCaches, ReaderOptions, make_batch
from logitcache.selection import Selection
from logitcache.store import Blocks, Cache, convert, open_cache, schema, verify
from logitcache.training.options import TrainOptions
from tests.caches import student_yaml
from tests.codec.rows import assert_equal
from tests.corpus.files import save_dataset, write_records
from tests.corpus.test_chat import CHATML, TALK
from tests.faults import forkserver, run_killed, run_to_end
from tests.store.caches import files_of
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

LENGTH, SEED = 13, 5
SPECS = ("top-k:7", "sample:11", "varopt:9", "label")
children = forkserver()


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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher` (whose tokenizer has a chat template), `records.jsonl` and `other/records.jsonl`."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    models.save_model(tiny_model(), folder / "teacher", tokenizer)
    write_records(folder, "jsonl", pairs(12))
    (folder / "other").mkdir()
    write_records(folder / "other", "jsonl", pairs(7, seed=1))
    return folder


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


@pytest.fixture(scope="module")
def rollouts(place: Path) -> dict[str, Path]:
    """Caches of every selection, from one dump; read only."""
    folders = {spec: place / "rollouts" / spec for spec in SPECS}
    with pytest.MonkeyPatch.context() as patch:
        # Two chunks in a unit; none of the first chunk's rows counts in `late`.
        patch.setattr(schema, "CHUNK_TOKENS", 2 * LENGTH)
        dump(place, place / "records.jsonl", *folders.items())
    return folders


@pytest.fixture(scope="module")
def whole(place: Path, rollouts: dict[str, Path]) -> dict[str, Path]:
    """The same tokens as ids, without a mask."""
    blocks = everything(open_cache(rollouts["label"]))
    (place / "ids").mkdir()
    path = write_records(place / "ids", "jsonl", [{"ids": blocks.tokens[blocks.valid].tolist()}])
    folders = {spec: place / "whole" / spec for spec in SPECS}
    dump(place, path, *folders.items(), ids_field="ids", **NO_PAIRS)
    return folders


def everything(cache: Cache) -> Blocks:
    return cache.read_blocks(0, cache.num_blocks)


def mask_of(blocks: Blocks) -> np.ndarray:
    assert blocks.counted is not None
    return blocks.counted


def reopened(root: Path) -> Cache:
    report = verify(root)
    assert report.ok, report.problems
    return open_cache(root)


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


@pytest.mark.parametrize("spec", ["varopt:9", "label"])
def test_a_killed_dump_resumes_to_the_same_bytes(place: Path, tmp_path: Path, spec: str) -> None:
    from tests.test_dump import dump_job

    corpus = place / "records.jsonl"
    run_to_end(children, dump_job, given(place, corpus, (spec, tmp_path / "one"), container="arrow"))
    other = given(place, corpus, (spec, tmp_path / "other"), container="arrow")
    run_killed(children, dump_job, other, failpoint="commit.after_rename")
    assert (tmp_path / "other" / "work" / "mask.bin").exists()
    run_killed(children, dump_job, other, failpoint="commit.after_link")
    run_to_end(children, dump_job, other)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert {name: data for name, data in two.items() if name in one} == one
    assert not (tmp_path / "other" / "work").exists()
    assert dump(place, corpus, (spec, tmp_path / "one"), container="arrow").computed_tokens == 0


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
    with pytest.raises(TrainingError, match="cannot be averaged: mask is"):
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


def assert_same(one: Blocks, other: Blocks) -> None:
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(mask_of(one), mask_of(other))
    assert_equal(one.targets, other.targets)


def test_masked_and_whole_caches_are_not_merged(
    rollouts: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match=r"codec\.masked: True and None"):
        merge_caches([rollouts["sample:11"], whole["sample:11"]], tmp_path / "both")


def test_runs_of_one_plan_are_united(place: Path, tmp_path: Path) -> None:
    from tests.test_dump import dump_job

    for name, failpoint in (("one", "commit.after_link"), ("two", "manifest.before_write")):
        options = given(place, place / "records.jsonl", ("sample:11", tmp_path / name))
        run_killed(children, dump_job, options, failpoint=failpoint)
    merge_caches([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    run_to_end(children, dump_job, given(place, place / "records.jsonl", ("sample:11", tmp_path / "alone")))
    assert_same(everything(reopened(tmp_path / "both")), everything(open_cache(tmp_path / "alone")))


@pytest.mark.parametrize(
    ("source", "spec"),
    [("top-k:7", "top-k:3"), ("top-k:7", "sample:4"), ("sample:11", "sample:4"), ("varopt:9", "label")],
)
def test_derived_rows_are_those_of_a_cache_without_a_mask(
    rollouts: dict[str, Path], source: str, spec: str, tmp_path: Path
) -> None:
    """Of the rows that count, the others stay empty."""
    root = tmp_path / "derived"
    derive_cache(rollouts[source], root, Derivation(Selection.parse(spec), max_tail_mass=1))
    cache, old = reopened(root), everything(open_cache(rollouts[source]))
    new = everything(cache)
    np.testing.assert_array_equal(mask_of(new), mask_of(old))
    counted = np.flatnonzero(mask_of(new))
    rows, before = new.targets.take(counted), old.targets.take(counted)
    assert not new.targets.take(np.flatnonzero(~mask_of(new))).row_lengths.any()
    np.testing.assert_array_equal(rows.label_logprob, before.label_logprob)
    selection = Selection.parse(spec)
    for row in range(len(rows)):
        assert set(rows.slice(row, row + 1).ids) <= set(before.slice(row, row + 1).ids)
    assert (rows.row_lengths <= selection.size).all()
    if selection.method == "sample":
        np.testing.assert_allclose(rows.row_sums(), 1, rtol=1e-6)
    if selection.method == "top-k":
        assert (rows.row_lengths == 3).all()


# ---------------------------------------------------------------------------------------------- label caches


def test_label_is_derived_from_every_selection(whole: dict[str, Path], tmp_path: Path) -> None:
    """And is then what a dump would have kept."""
    wanted = everything(open_cache(whole["label"]))
    for spec in SPECS[:-1]:
        derive_cache(whole[spec], tmp_path / spec, Derivation(Selection.parse("label")))
        cache = reopened(tmp_path / spec)
        assert not cache.keeps_ids
        assert_equal(everything(cache).targets, wanted.targets)
        assert cache.manifest.identity.ancestry[-1].arguments == {"select": "label", "from": spec}
    assert wanted.targets.ids.size == 0
    assert (wanted.targets.tail_mass == 1).all()
    assert np.isnan(wanted.targets.entropy).all()


def test_what_label_cannot_be_derived_from_and_cannot_give(whole: dict[str, Path], tmp_path: Path) -> None:
    label = Derivation(Selection.parse("label"))
    with pytest.raises(UsageError, match="which holds label: it stores no ids; dump with --select top-k:3"):
        derive_cache(whole["label"], tmp_path / "no", Derivation(Selection.parse("top-k:3")))
    with pytest.raises(UsageError, match="which --drop would forget"):
        derive_cache(whole["top-k:7"], tmp_path / "no", Derivation(Selection.parse("label"), drop=("label_logprob",)))
    derive_cache(whole["top-k:7"], tmp_path / "dropped", Derivation(drop=("label_logprob",)))
    with pytest.raises(
        CacheError, match=r"does not know the teacher's log-probability of its tokens \(label_logprob\)"
    ):
        derive_cache(tmp_path / "dropped", tmp_path / "no", label)
    with pytest.raises(UsageError, match="would change"):
        derive_cache(whole["label"], tmp_path / "no", label)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("folders", ["rollouts", "whole"])
def test_policy_gradient_learns_from_labels_alone(
    folders: str, place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    caches: dict[str, Path] = request.getfixturevalue(folders)
    base = {
        "student": str(student_yaml(tmp_path / "student.yaml")), "max_steps": 3, "batch_tokens": 4 * LENGTH,
        "device": "cpu", "log_every": 1, "alpha": 1.0,
    }  # fmt: skip

    def train(spec: str, **changes: Any) -> dict[str, Any]:
        options = {**base, "cache": str(caches[spec]), "objective": "policy-gradient", **changes}
        return run_training(TrainOptions.build({**options, "out": str(tmp_path / spec / str(changes))}))

    result = train("label")
    assert result["steps"] == 3
    assert "eval_kl" not in result
    assert train("label", objective="cross-entropy")["eval_ce"] > 0
    for objective in ("auto", "forward-kl", "reverse-kl", "mse", "decoupled"):
        with pytest.raises(
            ObjectiveError, match=r"these targets hold none \(--select label keeps the labels' log-prob"
        ):
            train("label", objective=objective)


@pytest.mark.parametrize("spec", SPECS)
def test_the_loss_is_that_of_the_rows_that_count(place: Path, rollouts: dict[str, Path], spec: str) -> None:
    cache = open_cache(rollouts[spec])
    batch = next(iter(CacheDataset(cache, ReaderOptions(4, shuffle=False))))
    blocks = cache.read_blocks(0, 4)
    hidden = torch.randn(4 * LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counted = np.flatnonzero(mask_of(blocks))
    objective = Objective.default_for(cache.unbiased) if cache.keeps_ids else Objective.policy_gradient()
    labels = torch.from_numpy(blocks.labels()).flatten()
    found = distillation_loss(hidden, weight, batch["labels"].flatten(), batch.targets, objective, alpha=0.5)
    alone = distillation_loss(
        hidden[counted], weight, labels[counted], blocks.targets.take(counted), objective, alpha=0.5
    )
    torch.testing.assert_close(found, alone)


# ---------------------------------------------------------------------------------------------- exports


def test_exports(rollouts: dict[str, Path], whole: dict[str, Path], tmp_path: Path) -> None:
    cache = open_cache(rollouts["top-k:7"])
    blocks = everything(cache)
    counted = mask_of(blocks)[blocks.valid]
    export_cache(cache, "parquet", tmp_path / "parquet")
    table = pq.read_table(tmp_path / "parquet" / "data")
    assert table["counted"].to_pylist() == counted.tolist()
    assert [token or -100 for token in table["next_token"].to_pylist()] == [
        label or -100 for label in blocks.labels()[blocks.valid].tolist()
    ]
    export_cache(cache, "trl", tmp_path / "trl")
    rows = pq.read_table(tmp_path / "trl" / "data").to_pylist()
    for number, row in enumerate(rows):
        labels = blocks.labels()[number]
        learnt = [token for token, kept in zip(row["input_ids"], row["completion_mask"], strict=True) if kept]
        assert learnt == labels[labels >= 0].tolist()
    with pytest.raises(InterchangeError, match="keeps rows of completions only, but DistillKit stores the same k ids"):
        export_cache(cache, "distillkit", tmp_path / "distillkit")
    for target in ("trl", "distillkit"):
        with pytest.raises(InterchangeError, match=r"holds no ids \(label\), but .* wants the most probable ones"):
            export_cache(open_cache(whole["label"]), target, tmp_path / "no")
    export_cache(open_cache(whole["label"]), "parquet", tmp_path / "label")
    assert "counted" not in pq.read_table(tmp_path / "label" / "data").column_names
