"""An audit says "same teacher" of what the teacher made, and finds each known fault."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache import models
from logitcache.algebra import BlockRanges, Derivation, derive_cache, subset_cache
from logitcache.audit import AuditOptions, AuditReport, audit_cache
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.errors import CacheError, DamagedCacheError, ModelError, UsageError
from logitcache.selection import Selection
from logitcache.store import CacheWriter, convert, open_cache
from tests.audit.caches import changed_teacher, given, moved, one_step, rewritten, rounded, unchanged
from tests.caches import BLOCK_LENGTH, Dumped
from tests.faults import flip_bit
from tests.rollouts import SPECS, Rollouts
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

ROWS = 400
CACHES = ("top_k", "sample", "varopt", "dense", "top_p", "proposal")


@pytest.fixture(scope="module")
def made(dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of one teacher by name: those of `dumped`, two other selections, and one in bfloat16."""
    root = tmp_path_factory.mktemp("made")
    specs = {"top_p": "top-p:0.6:40", "proposal": "sample:15:0.7"}
    dump(dumped.teacher, dumped.corpus, {root / name: spec for name, spec in specs.items()})
    dump(dumped.teacher, dumped.corpus, {root / "half": "top-k:8"}, dtype="bfloat16")
    folders = {name: getattr(dumped, name) for name in CACHES[:4]}
    return {**folders, **{name: root / name for name in (*specs, "half")}}


def dump(teacher: Path, corpus: Path, caches: dict[Path, str], dtype: str = "auto", bos: str = "auto") -> None:
    outputs = tuple(Output(Selection.parse(spec), folder) for folder, spec in caches.items())
    options = DumpOptions(
        str(teacher), (str(corpus),), outputs, dtype=dtype, device="cpu", block_length=BLOCK_LENGTH, bos=bos, seed=3
    )
    run_dump(options)


def audit(cache: Path, teacher: Path, **options: object) -> AuditReport:
    return audit_cache(cache, AuditOptions(str(teacher), **{"rows": ROWS, "device": "cpu", **options}))  # type: ignore[arg-type]


def measures(report: AuditReport) -> set[str]:
    return {figure.measure for figure in report.figures}


# ---------------------------------------------------------------------------------------- the teacher's own rows


@pytest.mark.parametrize("name", CACHES)
def test_same_teacher(name: str, made: dict[str, Path], dumped: Dumped) -> None:
    report = audit(made[name], dumped.teacher)
    assert report.verdict == "same teacher", report.sentence
    assert report.ok
    assert (report.files, report.tokenizer, report.dtype, report.other_dtype) == ("same", "same", "float32", None)
    assert report.rows == ROWS
    rows = {"top_k": {"rows"}, "dense": {"rows"}, "top_p": {"rows"}, "varopt": {"rows", "draws"}}
    assert measures(report) == {"label", "entropy"} | rows.get(name, {"draws"})
    assert {figure.part for figure in report.figures} == {"start", "rest"}
    for figure in report.figures:
        # Rounding to 1/64 nat is all there is, and the same draws come out.
        assert figure.mean <= (0.01 if figure.measure == "draws" else 1.3 * figure.band)


@pytest.mark.parametrize("batch_tokens", [1, 96, 100_000])
def test_batch_size_makes_no_other_teacher(batch_tokens: int, made: dict[str, Path], dumped: Dumped) -> None:
    report = audit(made["sample"], dumped.teacher, batch_tokens=batch_tokens, rows=200)
    assert report.verdict == "same teacher"


def test_few_rows(made: dict[str, Path], dumped: Dumped) -> None:
    for seed in range(12):
        assert audit(made["top_k"], dumped.teacher, rows=1, seed=seed).verdict == "same teacher"


def test_the_same_weights_in_other_files(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    def renamed(model: torch.nn.Module) -> None:
        model.config._name_or_path = "elsewhere"  # type: ignore[union-attr]
        model.config.pad_token_id = 7  # type: ignore[union-attr]

    report = audit(made["sample"], changed_teacher(dumped.teacher, tmp_path / "copy", renamed))
    assert (report.files, report.verdict) == ("other", "same teacher")
    assert "its files are not those of the dump, and a change too slight for these limits" in report.sentence
    assert "files" not in audit(made["sample"], dumped.teacher).sentence


# ------------------------------------------------------------------------------------------------------ precision


def test_the_dtype_of_the_dump_is_taken(made: dict[str, Path], dumped: Dumped) -> None:
    report = audit(made["half"], dumped.teacher)
    assert (report.dtype, report.cache_dtype, report.verdict) == ("bfloat16", "bfloat16", "same teacher")


@pytest.mark.parametrize(("name", "dtype", "other"), [
    ("half", "float32", "bfloat16"),
    ("top_k", "bfloat16", "float32"),
    ("sample", "bfloat16", "float32"),
    ("varopt", "bfloat16", "float32"),
])  # fmt: skip
def test_other_precision(name: str, dtype: str, other: str, made: dict[str, Path], dumped: Dumped) -> None:
    report = audit(made[name], dumped.teacher, dtype=dtype)
    assert report.verdict == "other precision", report.sentence
    assert report.ok
    assert report.other_dtype == other
    assert f"not over what {other} instead of {dtype} makes" in report.sentence
    label = next(figure for figure in report.figures if (figure.measure, figure.part) == ("label", "rest"))
    assert label.precision is not None
    assert 0.3 < label.mean / label.precision < 3
    assert label.mean > 5 * label.limit


# ------------------------------------------------------------------------------------------------------ other rows


@pytest.mark.parametrize("name", ["top_k", "sample", "varopt"])
@pytest.mark.parametrize(
    ("by", "says"), [(1, "position t - 1: rows stand one too late"), (-1, "rows stand one too early")]
)
def test_rows_shifted_by_one(
    name: str, by: int, says: str, made: dict[str, Path], dumped: Dumped, tmp_path: Path
) -> None:
    report = audit(rewritten(made[name], tmp_path / "cache", moved(by)), dumped.teacher)
    assert report.verdict == "different"
    assert report.fits_exactly
    assert says in report.sentence
    assert not report.ok


def test_only_the_ids_are_shifted(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    """The columns are right, and so the rows alone must tell."""
    report = audit(rewritten(made["top_k"], tmp_path / "top_k", moved(1, columns=False)), dumped.teacher)
    assert {figure.measure for figure in report.figures if figure.verdict == "different"} == {"rows"}
    assert "one too late" in report.sentence
    report = audit(rewritten(made["sample"], tmp_path / "sample", moved(1, columns=False)), dumped.teacher)
    assert {figure.measure for figure in report.figures if figure.verdict == "different"} == {"draws"}


def test_shifted_rows_of_another_precision(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    """Shifting does not explain them to the last digit, but far better than not."""
    report = audit(rewritten(made["half"], tmp_path / "cache", moved(1)), dumped.teacher, dtype="float32")
    assert report.verdict == "different"
    assert not report.fits_exactly
    assert "its rows fit far better if the row of position t is the teacher's of position t - 1" in report.sentence


def test_a_few_blocks_are_named(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    root = rewritten(made["sample"], tmp_path / "cache", moved(1, slice(40, 42)))
    report = audit(root, dumped.teacher, rows=10_000)
    assert report.rows == open_cache(root).num_tokens
    assert report.verdict == "different"
    assert report.blocks_off == [40, 41]
    assert f"in 2 of {report.blocks} blocks; its rows fit if the row of position t is" in report.sentence


def test_draws_with_another_seed(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    identity = open_cache(made["sample"]).manifest.identity.model_copy(update={"seed": 9})
    root = rewritten(made["sample"], tmp_path / "cache", lambda blocks: blocks.targets, identity)
    report = audit(root, dumped.teacher)
    assert report.verdict == "different"
    assert {figure.measure for figure in report.figures if figure.verdict != "same teacher"} == {"draws"}


# ---------------------------------------------------------------------------------------------------- other weights


@pytest.mark.parametrize("name", ["top_k", "sample", "varopt"])
def test_one_step_of_fine_tuning(name: str, made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    report = audit(made[name], changed_teacher(dumped.teacher, tmp_path / "tuned", one_step))
    assert (report.files, report.verdict) == ("other", "different")
    assert report.fits is None


def test_a_change_no_larger_than_precision(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    """The same figures excuse the same files, or a dtype that is not that of the dump, and nothing else."""
    teacher = changed_teacher(dumped.teacher, tmp_path / "rounded", rounded)
    report = audit(made["sample"], teacher)
    assert report.verdict == "different"
    assert "its files are not those of the dump, and nothing says that its precision is another" in report.sentence
    report = audit(made["sample"], teacher, dtype="bfloat16")
    assert report.verdict == "other precision"
    assert "a slight change of its weights may hide in this" in report.sentence


def test_another_teacher(made: dict[str, Path], tmp_path: Path) -> None:
    report = audit(made["dense"], save_tiny(tmp_path / "other", seed=1))
    assert report.verdict == "different"
    assert report.fits is None
    assert len(report.blocks_off) == report.blocks


# --------------------------------------------------------------------------------------- other tokens in front


@pytest.fixture(scope="module")
def with_bos(dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokenizer knows a BOS, id 1."""
    folder = tmp_path_factory.mktemp("bos") / "teacher"
    models.save_model(tiny_model(), folder, tiny_tokenizer(bos=True))
    return folder


def test_a_bos_that_the_cache_does_not_have(with_bos: Path, dumped: Dumped, tmp_path: Path) -> None:
    """As of a server that puts one before every prompt."""
    dump(with_bos, dumped.corpus, {tmp_path / "right": "top-k:8"}, bos="none")
    change = given(with_bos, open_cache(tmp_path / "right"), prefix=1)
    report = audit(rewritten(tmp_path / "right", tmp_path / "wrong", change), with_bos)
    assert report.verdict == "different"
    assert report.fits_exactly
    assert (
        "if the teacher was given BOS (1) before every block, which the cache's blocks do not have" in report.sentence
    )


def test_a_bos_that_the_teacher_did_not_get(with_bos: Path, dumped: Dumped, tmp_path: Path) -> None:
    dump(with_bos, dumped.corpus, {tmp_path / "right": "sample:15"}, bos="block")
    assert audit(tmp_path / "right", with_bos).verdict == "same teacher"
    change = given(with_bos, open_cache(tmp_path / "right"), dropped=1)
    report = audit(rewritten(tmp_path / "right", tmp_path / "wrong", change), with_bos)
    assert report.verdict == "different"
    assert "if the teacher was not given the token 1 with which every block begins" in report.sentence


def test_another_tokenizer_is_refused_before_anything_runs(
    made: dict[str, Path], dumped: Dumped, tmp_path: Path
) -> None:
    teacher = changed_teacher(dumped.teacher, tmp_path / "teacher", unchanged, tiny_tokenizer(290))
    (teacher / "model.safetensors").unlink()
    wanted = open_cache(made["top_k"]).manifest.identity.tokenizer["sha256"]
    with pytest.raises(ModelError, match=f"has hash [0-9a-f]{{12}}, the cache was made with {wanted[:12]}"):
        audit(made["top_k"], teacher)


def test_the_tokenizer_elsewhere_or_nowhere(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    shutil.copytree(dumped.teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    report = audit(made["top_k"], tmp_path / "bare")
    assert (report.tokenizer, report.verdict) == ("not found", "same teacher")
    assert audit(made["top_k"], tmp_path / "bare", tokenizer=str(dumped.teacher)).tokenizer == "same"
    with pytest.raises(ModelError, match="has no tokenizer"):
        audit(made["top_k"], dumped.teacher, tokenizer=str(tmp_path))


# --------------------------------------------------------------------------------------- caches made of caches


def derived(source: Path, root: Path, select: str | None, *drop: str) -> Path:
    derive_cache(source, root, Derivation(None if select is None else Selection.parse(select), drop, max_tail_mass=1.0))
    return root


def test_derived_caches(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    convert(made["sample"], tmp_path / "arrow", "arrow")
    subset_cache(made["sample"], tmp_path / "part", BlockRanges.parse("30:60"))
    cases: list[tuple[Path, set[str]]] = [
        (tmp_path / "arrow", {"label", "entropy", "draws"}),
        (tmp_path / "part", {"label", "entropy", "score"}),
        (derived(made["dense"], tmp_path / "narrow", "top-k:5", "entropy"), {"label", "rows"}),
        (derived(made["sample"], tmp_path / "thin", "sample:7", "label_logprob"), {"entropy", "score"}),
        (derived(made["sample"], tmp_path / "plain", None, "entropy"), {"label", "draws"}),
        (derived(made["top_k"], tmp_path / "drawn", "sample:9"), {"label", "entropy"}),
    ]
    for root, expected in cases:
        report = audit(root, dumped.teacher)
        assert report.verdict == "same teacher", (root.name, report.sentence)
        assert measures(report) == expected, root.name


def test_draws_alone_tell_the_teacher(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    """Of draws that cannot be made again, and without columns, only the score is left."""
    root = derived(made["sample"], tmp_path / "thin", "sample:12", "label_logprob", "entropy")
    report = audit(root, dumped.teacher)
    assert (measures(report), report.verdict) == ({"score"}, "same teacher")
    assert audit(root, save_tiny(tmp_path / "other", seed=1)).verdict == "different"


def test_nothing_to_compare(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    root = derived(made["top_k"], tmp_path / "drawn", "sample:9", "label_logprob", "entropy")
    with pytest.raises(CacheError, match="hold nothing that can be compared"):
        audit(root, dumped.teacher)


# ----------------------------------------------------------------------------------------------------- refusals


def test_an_unfinished_cache(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    cache = open_cache(made["top_k"])
    writer = CacheWriter.open(tmp_path / "begun", cache.manifest.identity, cache.manifest.origin)
    with pytest.raises(CacheError, match="holds no rows yet"):
        audit(tmp_path / "begun", dumped.teacher)
    del writer
    shutil.copytree(made["top_k"], tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    for record in sorted((tmp_path / "half" / "commits").iterdir())[1:]:
        record.unlink()
    report = audit(tmp_path / "half", dumped.teacher, rows=10_000)
    assert (report.verdict, report.rows) == ("same teacher", cache.manifest.shards[0].num_tokens)


def test_boundaries_that_were_not_attended(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    identity = open_cache(made["top_k"]).manifest.identity
    masked = identity.model_copy(update={"corpus": {**identity.corpus, "document_boundaries": "masked"}})
    root = rewritten(made["top_k"], tmp_path / "cache", lambda blocks: blocks.targets, masked)
    with pytest.raises(CacheError, match="has document boundaries 'masked', which no audit can compute again"):
        audit(root, dumped.teacher)


def no_numbers(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("does not exist", lambda root, dumped: root / "nothing"),
        ("has 310 ids, .* was made with 300", lambda root, dumped: save_tiny(root / "wide", vocab_size=310)),
        ("NaN or infinity", lambda root, dumped: changed_teacher(dumped.teacher, root / "nan", no_numbers)),
        (
            "longer than the teacher's context of 16",
            lambda root, dumped: save_tiny(root / "short", max_position_embeddings=16),
        ),
    ],
)
def test_teachers_that_cannot_be_used(
    what: str, make: Callable[[Path, Dumped], Path], made: dict[str, Path], dumped: Dumped, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=what):
        audit(made["top_k"], make(tmp_path, dumped))


def test_damage_is_no_difference(made: dict[str, Path], dumped: Dumped, tmp_path: Path) -> None:
    shutil.copytree(made["top_k"], tmp_path / "cache")
    for shard in (tmp_path / "cache" / "shards").iterdir():
        flip_bit(shard, 4 * shard.stat().st_size)
    with pytest.raises(DamagedCacheError, match="its SHA-256 differs"):
        audit(tmp_path / "cache", dumped.teacher)


@pytest.mark.parametrize("options", [{"rows": 0}, {"rows": -4}, {"batch_tokens": 0}, {"seed": -1}])
def test_numbers_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="it must be at least"):
        AuditOptions("teacher", **options)  # type: ignore[arg-type]


def test_equal_seeds_look_at_equal_rows(made: dict[str, Path], dumped: Dumped) -> None:
    first, again, other = (audit(made["top_k"], dumped.teacher, rows=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert not np.allclose(
        [figure.mean for figure in first.figures], [figure.mean for figure in other.figures], rtol=1e-3
    )


# ------------------------------------------------------------------------------------ masks, and rows without ids


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["masked", "whole"])
def test_rows_that_count_are_compared(spec: str, kind: str, rollout_caches: Rollouts) -> None:
    """All of them, where more are asked for than there are; and labels alone where there are no ids."""
    root = getattr(rollout_caches, kind)[spec]
    cache = open_cache(root)
    report = audit(root, rollout_caches.place / "teacher", rows=10_000)
    assert report.verdict == "same teacher", report.sentence
    assert report.rows == cache.num_counted
    assert (report.blocks < cache.num_blocks) == cache.masked, "some blocks are inside a prompt"
    of_spec = {"top-k:7": {"rows"}, "sample:11": {"draws"}, "varopt:9": {"rows", "draws"}}
    assert measures(report) == {"label"} | ({"entropy"} | of_spec[spec] if cache.keeps_ids else set())


@pytest.mark.parametrize("spec", ["top-k:7", "label"])
def test_another_teacher_of_a_mask(spec: str, rollout_caches: Rollouts, tmp_path: Path) -> None:
    other = changed_teacher(rollout_caches.place / "teacher", tmp_path / "stepped", one_step)
    report = audit(rollout_caches.masked[spec], other, rows=100)
    assert (report.verdict, report.files, report.rows) == ("different", "other", 100)


def test_a_server_cannot_audit() -> None:
    with pytest.raises(UsageError, match=r"is a server, .* name the folder or hub id of its model"):
        AuditOptions("http://127.0.0.1:8000/v1")
