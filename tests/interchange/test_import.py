"""Imports give what the files hold, resume, and refuse files that are damaged, foreign or do not fit."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from logitcache.errors import CacheError, CorpusError, InterchangeError, LogitcacheError, PlanMismatchError, UsageError
from logitcache.interchange import (
    DistillKitLayout,
    ImportOptions,
    ImportReport,
    export_cache,
    import_distillkit,
    read_layout,
)
from logitcache.interchange.decoding import decode_sequence, probabilities
from logitcache.interchange.sequences import parquet_files, scan
from logitcache.store import Cache, ContainerKind, open_cache, schema, verify
from logitcache.targets import SparseTargets
from tests.caches import Dumped
from tests.faults import flip_bit
from tests.interchange.captures import VOCABULARY, bit_string, position, sequence, write_capture
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run(source: Path, out: Path, tokenizer: str, **more: Any) -> ImportReport:
    return import_distillkit(ImportOptions((str(source),), out, tokenizer, **more))


def decode(source: Path) -> list[SparseTargets]:
    """The rows of every sequence, before a cache rounds them."""
    layout = read_layout(source / "compression_config.yaml")
    found = scan(parquet_files([source]), None)
    return [decode_sequence(row, layout, layout.d)[0] for row in found.read(0)]


# ------------------------------------------------------------------------------------------- what comes in


@pytest.mark.parametrize(("spare", "container"), [(0, "zarr"), (1, "arrow")])
def test_a_file_made_from_the_written_formulas(
    spare: int, container: ContainerKind, tokenizer: str, tmp_path: Path
) -> None:
    """As captured (no position for the last token) and as packed (one for each); the last sequence is shorter."""
    sequences = [sequence(number, 6 if number < 8 else 4, spare) for number in range(9)]
    report = run(write_capture(tmp_path / "in", sequences), tmp_path / "cache", tokenizer, container=container)
    cache = open_cache(tmp_path / "cache")
    assert verify(tmp_path / "cache").ok
    assert (cache.block_length, cache.num_blocks, cache.num_tokens, cache.vocab_size) == (6, 9, 52, VOCABULARY)
    assert (report.left_out, report.rescaled) == (0, 0)
    blocks = cache.read_blocks(0, 9)
    targets = blocks.targets
    decoded = decode(tmp_path / "in")
    for number, made in enumerate(sequences):
        length = 6 if number < 8 else 4
        assert blocks.tokens[number][:length].tolist() == made["input_ids"][:length]
        for place in range(length):
            row = targets.slice(number * 6 + place, number * 6 + place + 1)
            ids, logprobs, *_ = position(11 * number + place)
            expected = dict(zip(ids, np.exp(np.minimum.accumulate(logprobs)), strict=True))
            assert row.ids.tolist() == sorted(expected)
            # The cache rounds to 1/16 nat and scales the row to its tail; `decoded` is before that.
            exact = decoded[number].slice(place, place + 1)
            np.testing.assert_allclose(exact.weights, [expected[key] for key in sorted(expected)], rtol=1e-6)
            np.testing.assert_allclose(np.log(row.weights), np.log(exact.weights), atol=0.1)
            label = made["input_ids"][place + 1] if place + 1 < length else -1
            known = np.log(expected[label]) if label in expected else np.nan
            np.testing.assert_allclose(exact.label_logprob, [known], atol=1e-6)
            np.testing.assert_allclose(row.label_logprob, [known], atol=1 / 100)
    assert np.isfinite(targets.label_logprob).any(), "no next token is among the ids: the test shows nothing"
    assert np.isnan(targets.entropy).all()
    assert (targets.threshold == 0).all()
    assert not targets.unbiased


def test_identity_says_where_it_came_from(tokenizer: str, tmp_path: Path) -> None:
    source = write_capture(tmp_path / "in", [sequence(number, 4) for number in range(3)])
    identity = run(source, tmp_path / "cache", tokenizer, vocab_size=310).manifest.identity
    assert identity.teacher["name"] == "imported from distillkit"
    sha256 = hashlib.sha256((source / "data_0.parquet").read_bytes()).hexdigest()
    assert identity.teacher["files"] == [{"name": "data_0.parquet", "sha256": sha256}]
    assert identity.teacher["layout"]["k"] == identity.selection.size == 5
    assert identity.vocab_size == 310
    tokens = np.concatenate([sequence(number, 4)["input_ids"] for number in range(3)])
    assert identity.corpus["sha256"] == hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()


def test_the_layout_may_stand_in_a_training_configuration(tokenizer: str, tmp_path: Path) -> None:
    source = write_capture(tmp_path / "in", [sequence(0, 4), sequence(1, 4)])
    fields = yaml.safe_load((source / "compression_config.yaml").read_text())
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"model": "x", "teacher": {"kind": "dataset", "logprob_compressor": fields}}))
    (source / "compression_config.yaml").unlink()
    one = import_distillkit(
        ImportOptions((str(source / "data_0.parquet"),), tmp_path / "cache", tokenizer, layout=str(config))
    )
    assert one.manifest.complete


@pytest.mark.parametrize(
    ("selection", "layout", "tolerance"),
    [
        ("top_k", DistillKitLayout.exact(300, 8), 1e-6),
        ("dense", DistillKitLayout.exact(300, 300), 1e-6),
        ("dense", DistillKitLayout.exact(300, 128).model_copy(update={"exact_dtype": "bfloat16"}), 2.0**-5),
    ],
)
def test_round_trip(selection: str, layout: DistillKitLayout, tolerance: float, dumped: Dumped, tmp_path: Path) -> None:
    """Out and in again: the files differ by what the layout rounds, the new cache also by what a cache rounds."""
    cache = open_cache(getattr(dumped, selection))
    export_cache(cache, "distillkit", tmp_path / "out", layout=layout)
    run(tmp_path / "out", tmp_path / "back", str(dumped.teacher))
    back = open_cache(tmp_path / "back")
    assert (back.num_tokens, back.block_length, back.vocab_size) == (cache.num_tokens, 32, 300)
    assert back.manifest.identity.tokenizer == cache.manifest.identity.tokenizer
    before, after = (one.read_blocks(0, one.num_blocks) for one in (cache, back))
    np.testing.assert_array_equal(after.tokens, before.tokens)
    files = SparseTargets.concatenate(decode(tmp_path / "out"))
    for number in range(0, cache.num_tokens, 7):
        old, file, new = (targets.slice(number, number + 1) for targets in (before.targets, files, after.targets))
        order = np.sort(np.lexsort((old.ids, -old.weights))[: layout.k])
        assert new.ids.tolist() == file.ids.tolist() == old.ids[order].tolist()
        np.testing.assert_allclose(np.log(file.weights), np.log(old.weights[order]), atol=tolerance)
        np.testing.assert_allclose(np.log(new.weights), np.log(file.weights), atol=0.1)


def test_polynomials_come_back_as_they_decode(dumped: Dumped, tmp_path: Path) -> None:
    """DistillKit's budget configuration: the cache holds what its formulas give, in falling order and below 1."""
    cache = open_cache(dumped.dense)
    layout = DistillKitLayout.budget(300)
    export_cache(cache, "distillkit", tmp_path / "out", layout=layout)
    report = run(tmp_path / "out", tmp_path / "back", str(dumped.teacher))
    row = pq.read_table(tmp_path / "out" / "data").to_pylist()[3]
    decoded = layout.decode_logprobs(np.array(row["compressed_logprobs"], np.uint8))
    ids = layout.decode_ids(np.array(row["bytepacked_indices"], np.uint8))
    expected, _ = probabilities(decoded, 1)
    targets = open_cache(tmp_path / "back").read_blocks(3, 4).targets
    assert report.rescaled < cache.num_tokens / 2
    for place in range(32):
        new = targets.slice(place, place + 1)
        order = np.argsort(ids[place])
        assert new.ids.tolist() == ids[place][order].tolist()
        np.testing.assert_allclose(np.log(new.weights), np.log(expected[place][order]), atol=0.1)


def test_probabilities_fall_and_leave_the_exact_ones_alone() -> None:
    logs = np.array([[-0.1, -0.2, -5.0, -4.0], [-1.0, -2.0, -3.0, -2.5], [0.0005, -6, -6, -6], [-0.5, -1, -np.inf, -1]])
    values, scaled = probabilities(logs, exact_k=1)
    assert scaled == 2
    np.testing.assert_allclose(
        values[0], [np.exp(-0.1), *(np.exp([-0.2, -5, -5]) * (1 - np.exp(-0.1)) / np.exp([-0.2, -5, -5]).sum())]
    )
    np.testing.assert_allclose(values[1], np.exp([-1, -2, -3, -3]))
    assert values[2][0] == pytest.approx(1)
    assert (values.sum(axis=1) <= 1 + 1e-12).all()
    assert values[3][2:].tolist() == [0, 0]


# ------------------------------------------------------------------------------------- which sequences, resuming


def test_first_positions_of_sequences_that_are_long_enough(tokenizer: str, tmp_path: Path) -> None:
    lengths = [6, 3, 9, 5, 2, 7]
    source = write_capture(tmp_path / "in", [sequence(number, length, 1) for number, length in enumerate(lengths)])
    with pytest.raises(InterchangeError, match=r"sequence 1 does not have 6 positions .* --block-length N"):
        run(source, tmp_path / "cache", tokenizer)
    report = run(source, tmp_path / "cache", tokenizer, block_length=5)
    cache = open_cache(tmp_path / "cache")
    assert (report.left_out, cache.num_blocks, cache.block_length) == (2, 4, 5)
    kept = [sequence(number, length)["input_ids"][:5] for number, length in enumerate(lengths) if length >= 5]
    assert cache.read_blocks(0, 4).tokens.tolist() == kept
    assert cache.read_blocks(3, 4).targets.slice(4, 5).ids.tolist() == sorted(position(11 * 5 + 4)[0])
    with pytest.raises(InterchangeError, match="no sequence has 50 positions"):
        run(source, tmp_path / "other", tokenizer, block_length=50)


class Interrupted(Exception):
    pass


class Breaks:
    """Fails when the second unit is converted, and counts what was converted."""

    def __init__(self, at: int) -> None:
        self.at, self.computed, self.total = at, 0, 0

    def stage(self, what: str) -> None:
        pass

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        self.computed, self.total = computed, total
        if computed >= self.at:
            raise Interrupted


def test_resumes(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files and row groups; what is committed is not converted again, and the end is the same."""
    monkeypatch.setattr(schema, "LEAST_UNIT_TOKENS", 20)
    source = tmp_path / "in"
    for number in range(3):
        write_capture(source, [sequence(8 * number + row, 5) for row in range(8)], f"data_{number}.parquet")
    whole = run(source, tmp_path / "whole", tokenizer).manifest
    options = ImportOptions((str(source),), tmp_path / "cache", tokenizer)
    with pytest.raises(Interrupted):
        import_distillkit(options, Breaks(50))
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(tmp_path / "cache")
    with pytest.raises(PlanMismatchError, match=r"\n  --vocab-size: the cache has 300, this run 301$"):
        run(source, tmp_path / "cache", tokenizer, vocab_size=301)
    counted = Breaks(10**9)
    assert import_distillkit(options, counted).manifest.fingerprint == whole.fingerprint
    assert counted.computed == 120 - 40
    assert import_distillkit(options, counted).manifest.fingerprint == whole.fingerprint
    assert counted.computed == 0
    assert open_cache(tmp_path / "cache").read_blocks(23, 24).tokens[0].tolist() == sequence(23, 5)["input_ids"]


# --------------------------------------------------------------------------------------------- what is refused


def changed(name: str, place: int, value: Any) -> Callable[[Path], None]:
    """Write the capture with one value of the second sequence changed."""

    def change(source: Path) -> None:
        rows = [sequence(number, 4) for number in range(3)]
        rows[1][name][place] = value
        write_capture(source, rows)

    return change


def column(name: str, values: Any) -> Callable[[Path], None]:
    """Put another column in the place of `name`; None leaves it out."""

    def change(source: Path) -> None:
        table = pq.read_table(source / "data_0.parquet")
        index = table.schema.get_field_index(name)
        table = table.remove_column(index) if values is None else table.set_column(index, name, values)
        pq.write_table(table, source / "data_0.parquet")

    return change


def rename(source: Path) -> None:
    table = pq.read_table(source / "data_0.parquet")
    pq.write_table(table.rename_columns(["packed_indices", "exact_values", "coeffs"]), source / "data_0.parquet")


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda source: void(write_capture(source, [sequence(number, 4) for number in range(3)], **changes))


def void(_: object) -> None:
    pass


Refused = tuple[Callable[[Path], None], dict[str, Any], str]
# What is done to a good capture, further options, and what the one sentence says.
REFUSED: dict[str, Refused] = {
    "an id outside the vocabulary": (
        changed("bytepacked_indices", 1, list(bit_string([1, 2, 3, 4, 300], 9))),
        {},
        "sequence 1: row 1 holds token id 300, but the vocabulary has 300 ids",
    ),
    "a token outside the vocabulary": (
        changed("input_ids", 2, 300),
        {},
        "sequence 1 has the token 300, but the vocabulary has 300 ids",
    ),
    "a token that no tokenizer has": (changed("input_ids", 2, 2**40), {}, "which no tokenizer has"),
    "an id twice": (
        changed("bytepacked_indices", 1, list(bit_string([7, 7, 1, 2, 3], 9))),
        {},
        "sequence 1: row 1 .* ascending and unique",
    ),
    "a head that rises": (
        changed("compressed_logprobs", 3, [0x20, 0xC0, 0x00, 0xBF, *[0] * 15]),
        {},
        "sequence 1: row 3 does not decode",
    ),
    "not a number": (
        changed("compressed_logprobs", 0, [0xC0, 0x7F, *[0] * 17]),
        {},
        "sequence 1: row 0 does not decode",
    ),
    "too few bytes": (changed("compressed_logprobs", 0, [1, 2]), {}, "sequence 1 has positions of unequal numbers"),
    "another layout": (config(k=6), {}, "sequence 0: the ids have shape"),
    "another exact type": (config(exact_dtype="float32"), {}, "this layout stores"),
    "no ids": (column("bytepacked_indices", None), {}, "has no column 'bytepacked_indices', only input_ids"),
    "text": (column("input_ids", pa.array(["a", "b", "c"])), {}, "holds string in column 'input_ids', not lists"),
    "floats": (column("input_ids", pa.array([[0.5]] * 3)), {}, r"holds list<.*double.*> in column 'input_ids'"),
    "numbers that are no bytes": (
        column("bytepacked_indices", pa.array([[[1000] * 6] * 4] * 3)),
        {},
        "a number outside 0 to 255",
    ),
    "a null": (
        column("input_ids", pa.array([None, [1, 2, 3, 4], [1, 2, 3, 4]])),
        {},
        "0 tokens and 4 positions",
    ),
    "tokens without positions": (
        column("bytepacked_indices", pa.array([[[0] * 6] * 2] * 3)),
        {},
        "sequence 0 has 4 tokens and 2 positions",
    ),
    "the legacy format": (rename, {}, "legacy format .* centred logits"),
    "no configuration": (
        lambda source: (source / "compression_config.yaml").unlink(),
        {},
        "give it with --layout FILE",
    ),
    "a configuration that is no YAML": (
        lambda source: void((source / "compression_config.yaml").write_text("{")),
        {},
        "cannot be read as YAML",
    ),
    "a configuration of something else": (
        lambda source: void((source / "compression_config.yaml").write_text("- 1")),
        {},
        "no DistillKit logprob_compressor",
    ),
    "a configuration with a wrong field": (config(exact_dtype="int8"), {}, "exact_dtype: Input should be"),
    "not Parquet": (
        lambda source: void((source / "data_0.parquet").write_bytes(b"PAR1" * 9)),
        {},
        "damaged or not Parquet",
    ),
    "an empty file": (lambda source: void((source / "data_0.parquet").write_bytes(b"")), {}, "damaged or not Parquet"),
    "no sequence": (lambda source: void(write_capture(source, [])), {}, "hold no sequence"),
    "no Parquet file": (
        lambda source: void((source / "data_0.parquet").rename(source / "a.txt")),
        {},
        "no .parquet file",
    ),
    "no such folder": (shutil.rmtree, {"layout": "budget", "vocab_size": 300}, "does not exist"),
    "a name without a vocabulary": (lambda source: None, {"layout": "budget"}, "give --vocab-size"),
    "a name with a small vocabulary": (lambda source: None, {"layout": "budget", "vocab_size": 9}, "does not fit"),
    "a small vocabulary": (lambda source: None, {"vocab_size": 4}, "smaller than the 5 ids of a position"),
    "a block of one token": (lambda source: None, {"block_length": 1}, "must be at least 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tokenizer: str, tmp_path: Path) -> None:
    """One sentence that names the file, and no finished cache."""
    change, more, message = REFUSED[name]
    source = write_capture(tmp_path / "in", [sequence(number, 4) for number in range(3)])
    change(source)
    with pytest.raises((InterchangeError, CorpusError, UsageError), match=message) as caught:
        run(source, tmp_path / "cache", tokenizer, **more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_damage_never_becomes_other_data(tokenizer: str, tmp_path: Path) -> None:
    """Bits flipped and ends cut off anywhere: an error in one sentence, or what was there before."""
    source = write_capture(tmp_path / "in", [sequence(number, 4) for number in range(5)])
    file = source / "data_0.parquet"
    run(source, tmp_path / "cache", tokenizer)
    expected, data = read_all(open_cache(tmp_path / "cache")), file.read_bytes()
    rng = np.random.default_rng(5)
    refused = 0
    for number in range(70):
        if number < 60:
            bit = int(rng.integers(len(data) * 8))
            flip_bit(file, bit)
        else:
            bit = 8 * int(rng.integers(len(data)))
            file.write_bytes(data[: bit // 8])
        try:
            run(source, tmp_path / f"cache{number}", tokenizer)
        except LogitcacheError:
            refused += 1
        else:
            assert read_all(open_cache(tmp_path / f"cache{number}")) == expected, f"bit {bit}"
        file.write_bytes(data)
    assert refused > 10


def test_a_column_name_that_is_no_text(tokenizer: str, tmp_path: Path) -> None:
    source = write_capture(tmp_path / "in", [sequence(0, 4), sequence(1, 4)])
    file = source / "data_0.parquet"
    file.write_bytes(file.read_bytes().replace(b"bytepacked_indices", b"\xb5ytepacked_indices"))
    with pytest.raises(InterchangeError, match="damaged or not Parquet"):
        run(source, tmp_path / "cache", tokenizer)


def read_all(cache: Cache) -> bytes:
    blocks = cache.read_blocks(0, cache.num_blocks)
    targets = blocks.targets
    parts = (blocks.tokens, targets.offsets, targets.ids, targets.weights, targets.tail_mass, targets.label_logprob)
    return b"".join(part.tobytes() for part in parts)
