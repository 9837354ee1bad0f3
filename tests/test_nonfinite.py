"""`dump --nonfinite mask`: rows of logits that are NaN or infinite are left out and counted, the others are as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitcache import models
from logitcache.algebra import BlockRanges, Derivation, derive_cache, merge_caches, subset_cache
from logitcache.audit import AuditOptions, audit_cache
from logitcache.dump import run_dump
from logitcache.errors import ModelError, PlanMismatchError, UsageError
from logitcache.losses import Objective, distillation_loss
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.selection import Selection
from logitcache.store import Blocks, convert, open_cache, schema, verify
from logitcache.store.card import dataset_card
from tests.corpus.files import write_records
from tests.engines.test_memory import Notes
from tests.faults import forkserver, run_killed, start
from tests.format.check import check_cache
from tests.rollouts import pairs
from tests.store.caches import rewrite
from tests.teachers.serving import Serving
from tests.test_dump import LENGTH, SPECS, content_of, dump_job, options, write_corpus
from tests.tiny import tiny_model, tiny_tokenizer

children = forkserver()
MASK = {"nonfinite": "mask"}
OUTPUTS = (*SPECS, "label")


def make_place(folder: Path) -> Path:
    """A teacher whose numbers overflow from each `ü` to the end of its block, and a corpus with some of them."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.encode("ü")] = torch.nan
    models.save_model(model, folder / "teacher", tokenizer)
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def caches(place: Path) -> dict[str, Path]:
    """Of one dump, with two chunks in a unit."""
    roots = {spec: place / "caches" / spec.replace(":", "-") for spec in OUTPUTS}
    notes = Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "CHUNK_TOKENS", 4 * LENGTH)
        run_dump(options(place, *roots.items(), **MASK), notes)
    said = "the teacher's logits are NaN or infinite at some positions; their rows are left out and counted"
    assert notes.said == [said]
    return roots


def everything(root: Path) -> Blocks:
    report = verify(root)
    assert report.ok, report.problems
    cache = open_cache(root)
    return cache.read_blocks(0, cache.num_blocks)


def logits_of(place: Path, tokens_BL: NDArray[np.int64]) -> torch.Tensor:
    """The model's own, float64 [B, L, V], one block after another."""
    model = models.load_model(place / "teacher")
    with torch.no_grad():
        return torch.cat([model(torch.from_numpy(block[None])).logits for block in tokens_BL]).double()


def followed(blocks: Blocks) -> NDArray[np.bool_]:
    """bool [B, L]: positions with a next token in their block."""
    return np.asarray(blocks.valid & np.pad(blocks.valid[:, 1:], ((0, 0), (0, 1))))


@pytest.mark.parametrize("spec", OUTPUTS)
def test_the_rows_that_can_be_had_are_stored(place: Path, caches: dict[str, Path], spec: str) -> None:
    blocks, cache = everything(caches[spec]), open_cache(caches[spec])
    logits = logits_of(place, blocks.tokens)
    finite = torch.isfinite(logits).all(-1).numpy()
    wanted = followed(blocks)
    assert blocks.counted is not None
    np.testing.assert_array_equal(blocks.counted, wanted & finite)
    left_out = int((wanted & ~finite).sum())
    assert 20 < left_out < wanted.sum() - 20
    assert cache.manifest.counters == {"counted": int(blocks.counted.sum()), "nonfinite": left_out}
    assert (cache.num_nonfinite, verify(caches[spec]).nonfinite) == (left_out, left_out)
    assert cache.manifest.identity.teacher["nonfinite"] == "mask"
    labels = np.where(blocks.counted, np.pad(blocks.tokens[:, 1:], ((0, 0), (0, 1))), 0)
    picked = torch.log_softmax(logits, -1).numpy()[*np.indices(labels.shape), labels]
    stored = blocks.targets.label_logprob.reshape(labels.shape)
    np.testing.assert_allclose(stored[blocks.counted], picked[blocks.counted], atol=1 / 128 + 1e-4)
    assert np.isnan(stored[~blocks.counted]).all()
    lengths = blocks.targets.row_lengths.reshape(labels.shape)
    assert not lengths[~blocks.counted].any()
    assert (lengths[blocks.counted] > 0).all() == (spec != "label")
    assert check_cache(caches[spec]).counted == blocks.counted[blocks.valid].astype(int).tolist()


@pytest.mark.parametrize("spec", ["top-k:7", "sample:11"])
def test_of_a_sound_teacher_only_the_ends_of_blocks_are_missing(tmp_path: Path, spec: str) -> None:
    """The same rows as without the option."""
    models.save_model(tiny_model(), tmp_path / "teacher", tiny_tokenizer())
    write_corpus(tmp_path / "corpus")
    run_dump(options(tmp_path, (spec, tmp_path / "plain")))
    run_dump(options(tmp_path, (spec, tmp_path / "masked"), **MASK))
    plain, masked = everything(tmp_path / "plain"), everything(tmp_path / "masked")
    np.testing.assert_array_equal(masked.counted, followed(plain))
    assert open_cache(tmp_path / "masked").num_nonfinite == 0
    assert open_cache(tmp_path / "plain").num_nonfinite is None
    rows = np.flatnonzero(followed(plain))
    one, two = plain.targets.take(rows), masked.targets.take(rows)
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.weights, two.weights)
    np.testing.assert_array_equal(one.label_logprob, two.label_logprob)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_batches_change_nothing(place: Path, caches: dict[str, Path], tmp_path: Path, batch_tokens: int) -> None:
    run_dump(options(place, ("sample:11", tmp_path / "cache"), batch_tokens=batch_tokens, **MASK))
    one, two = everything(caches["sample:11"]), everything(tmp_path / "cache")
    np.testing.assert_array_equal(one.counted, two.counted)
    np.testing.assert_array_equal(one.targets.ids, two.targets.ids)
    assert open_cache(tmp_path / "cache").manifest.counters == open_cache(caches["sample:11"]).manifest.counters


def test_killed_and_finished_by_two_workers(place: Path, tmp_path: Path) -> None:
    """The bytes of one undisturbed worker, counters and all."""
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    alone: Any = start(children, dump_job, options(place, ("varopt:9", whole), **MASK))
    given = options(place, ("varopt:9", cache), **MASK)
    run_killed(children, dump_job, given, failpoint="commit.after_link")
    workers: list[Any] = [alone, *(start(children, dump_job, given) for _ in range(2))]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert content_of(cache) == content_of(whole)
    assert open_cache(cache).num_nonfinite


def test_the_default_is_to_fail(place: Path, tmp_path: Path) -> None:
    """And a cache that was begun with one policy is not gone on with by the other."""
    given = options(place, ("top-k:7", tmp_path / "cache"))
    message = (
        r"at block \d+, position \d+; try --dtype float32, .* or leave such rows out: --nonfinite mask, into a new"
    )
    with pytest.raises(ModelError, match=message):
        run_dump(given)
    with pytest.raises(PlanMismatchError, match=r"\n  --nonfinite: the cache has 'fail', this run 'mask'$"):
        run_dump(options(place, ("top-k:7", tmp_path / "cache"), **MASK))
    with pytest.raises(UsageError, match=r"^nonfinite must be fail or mask, not 'skip'$"):
        options(place, ("top-k:7", tmp_path / "cache"), nonfinite="skip")


def test_beside_the_mask_of_completions(place: Path, tmp_path: Path) -> None:
    """Only rows that were wanted are counted as left out."""
    rows = [{**row, "completion": row["completion"] + " ü" * (number % 2)} for number, row in enumerate(pairs(12))]
    corpus = write_records(tmp_path, "jsonl", rows)
    fields = {"corpus": (str(corpus),), "prompt_field": "prompt", "completion_field": "completion"}
    run_dump(options(place, ("label", tmp_path / "cache"), **fields, **MASK))
    models.save_model(tiny_model(), tmp_path / "sound", tiny_tokenizer())
    run_dump(options(place, ("label", tmp_path / "plain"), teacher=str(tmp_path / "sound"), **fields))
    blocks, plain = everything(tmp_path / "cache"), everything(tmp_path / "plain")
    assert blocks.counted is not None
    assert plain.counted is not None
    finite = torch.isfinite(logits_of(place, blocks.tokens)).all(-1).numpy()
    np.testing.assert_array_equal(blocks.counted, plain.counted & finite)
    left_out = int((plain.counted & ~finite).sum())
    assert left_out > 3
    assert open_cache(tmp_path / "cache").num_nonfinite == left_out


def test_a_teacher_of_which_nothing_can_be_had(place: Path, tmp_path: Path) -> None:
    """The cache says so; there is nothing to train on, and that is refused where training begins."""
    text = tmp_path / "corpus.txt"
    text.write_text("ü" * 60)
    run_dump(options(place, ("sample:11", tmp_path / "cache"), corpus=(str(text),), **MASK))
    cache = open_cache(tmp_path / "cache")
    assert cache.num_counted == 0
    # The first byte of a block may be the second of the letter, which alone is sound.
    assert cache.num_nonfinite == followed(everything(tmp_path / "cache")).sum()


def test_training_leaves_these_tokens_out(caches: dict[str, Path]) -> None:
    """Neither their divergence nor their cross entropy is learnt, and no NaN reaches the loss."""
    cache = open_cache(caches["top-k:7"])
    blocks, place = everything(caches["top-k:7"]), 0
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(300, 8))).requires_grad_()
    for batch in CacheDataset(cache, ReaderOptions(2, shuffle=False), num_batches=cache.num_blocks // 2):
        labels = batch["labels"]
        np.testing.assert_array_equal((labels >= 0).numpy(), np.asarray(blocks.counted)[place : place + 2])
        place += 2
        hidden = torch.from_numpy(rng.normal(size=(labels.numel(), 8)))
        targets, objective = batch.targets, Objective.forward_kl(tail="bucket")
        loss = distillation_loss(hidden, weight, labels.flatten(), targets, objective, alpha=0.5)
        loss.backward()
        assert bool(loss.isfinite())
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())


def test_what_is_made_of_such_a_cache(place: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    """The mask goes along, and the count: tests/algebra/test_left_out.py."""
    source = open_cache(caches["top-k:7"])
    convert(source.root, tmp_path / "arrow", "arrow")
    derive_cache(source.root, tmp_path / "derived", Derivation(Selection.parse("top-k:3")))
    assert open_cache(tmp_path / "arrow").num_nonfinite == source.num_nonfinite
    for name in ("arrow", "derived"):
        np.testing.assert_array_equal(everything(tmp_path / name).counted, everything(source.root).counted)
    subset_cache(source.root, tmp_path / "part", BlockRanges.parse("2:9"))
    merge_caches([source.root, tmp_path / "part"], tmp_path / "both")
    counted = everything(source.root).counted
    assert counted is not None
    np.testing.assert_array_equal(everything(tmp_path / "both").counted, np.concatenate([counted, counted[2:9]]))
    card = dataset_card(source.manifest, source.num_bytes, "cache")
    assert f"| left out | {source.num_nonfinite} rows, logits NaN or infinite |" in card


def test_an_audit_knows_the_teacher_by_the_rows_there_are(place: Path, caches: dict[str, Path]) -> None:
    report = audit_cache(caches["top-k:7"], AuditOptions(str(place / "teacher"), rows=60, device="cpu"))
    assert report.verdict == "same teacher"


def test_verify_counts_what_is_missing(place: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    run_dump(options(place, ("label", root), **MASK))
    counters = open_cache(root).manifest.counters
    rewrite(root / "manifest.json", counters={**counters, "nonfinite": 3})
    [problem] = verify(root).problems
    said = f"{counters['nonfinite']} rows are missing, not the 3 that the manifest's counters say were left out"
    assert problem.what == said


@pytest.mark.parametrize("flavour", ["vllm", "echo", "sglang"])
@pytest.mark.parametrize("spec", ["top-k:7", "sample:11"])
def test_a_server_that_says_null(server: Serving, served_model: Path, tmp_path: Path, flavour: str, spec: str) -> None:
    """After `<eos>`, where its numbers have overflown; `sample` needs all of its distribution."""
    write_corpus(tmp_path / "corpus")
    server.set(flavour=flavour, spoil="null", most=300)
    there = {"teacher": server.url, "tokenizer": str(served_model), "device": "auto"}
    with pytest.raises(ModelError, match=r"block \d+, position \d+ cannot be used: it says NaN"):
        run_dump(options(tmp_path, (spec, tmp_path / "failed"), **there))
    run_dump(options(tmp_path, (spec, tmp_path / "cache"), **there, **MASK))
    run_dump(options(tmp_path, (spec, tmp_path / "here"), teacher=str(served_model), **MASK))
    blocks, here = everything(tmp_path / "cache"), everything(tmp_path / "here")
    eos = blocks.tokens == 0
    assert 2 <= (followed(blocks) & eos).sum() == open_cache(tmp_path / "cache").num_nonfinite
    np.testing.assert_array_equal(blocks.counted, followed(blocks) & ~eos)
    rows = np.flatnonzero(blocks.counted)
    mine, wanted = blocks.targets.take(rows), here.targets.take(rows)
    np.testing.assert_array_equal(mine.ids, wanted.ids)
    np.testing.assert_allclose(mine.label_logprob, wanted.label_logprob, atol=1 / 32)
