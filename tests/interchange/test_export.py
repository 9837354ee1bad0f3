"""Exports hold what the cache holds, stream, and appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from logitcache.errors import CacheError, DamagedCacheError, InterchangeError, LogitcacheError, UsageError
from logitcache.interchange import TARGETS, DistillKitLayout, export, export_cache
from logitcache.interchange.rows import RealRows
from logitcache.interchange.trl_rows import TrlRows
from logitcache.store import Blocks, Cache, open_cache
from logitcache.targets import SparseTargets
from tests.caches import Dumped, random_cache
from tests.faults import flip_bit


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of an export."""
    return pq.read_table(folder / "data").to_pylist()


def none_where_nan(value: float) -> float | None:
    return None if np.isnan(value) else value


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_parquet_holds_everything(kind: str, tmp_path: Path) -> None:
    """Also sampled, empty and ragged rows, NaN and infinite columns, and a padded last block."""
    cache = random_cache(tmp_path / "cache", kind)
    report = export_cache(cache, "parquet", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert (report.tokens, report.blocks) == (len(rows), cache.num_blocks) == (247, 50)
    blocks = cache.read_blocks(0, cache.num_blocks)
    targets, labels = blocks.targets, blocks.labels().ravel()
    for number, row in enumerate(rows):
        first, last = targets.offsets[number : number + 2]
        assert (row["block"], row["position"]) == divmod(number, 5)
        assert row["token"] == blocks.tokens.ravel()[number]
        assert row["next_token"] == (labels[number] if labels[number] >= 0 else None)
        assert row["ids"] == targets.ids[first:last].tolist()
        assert row["weights"] == targets.weights[first:last].tolist()
        assert (row["tail_mass"], row["threshold"]) == (targets.tail_mass[number], targets.threshold[number])
        for name in ("label_logprob", "entropy"):
            assert row[name] == none_where_nan(getattr(targets, name)[number])


def short_in_the_middle() -> Blocks:
    """Three blocks of 4 places, of which the first holds 2 tokens and the last 3: as where corpora were merged."""
    tokens = np.array([[5, 6, 0, 0], [7, 8, 9, 1], [2, 3, 4, 0]])
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]], dtype=bool)
    lengths = valid.ravel() * 2
    ids = np.tile([1, 4], 9)
    weights = np.arange(18) / 40
    return Blocks(7, tokens, SparseTargets(np.append(0, np.cumsum(lengths)), ids, weights), valid)


def test_short_blocks() -> None:
    rows = RealRows.of(short_in_the_middle())
    assert rows.starts.tolist() == [0, 2, 6, 9]
    assert rows.block.tolist() == [7, 7, 8, 8, 8, 8, 9, 9, 9]
    assert rows.position.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2]
    assert rows.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert rows.labels.tolist() == [6, -100, 8, 9, 1, -100, 3, 4, -100]
    assert rows.targets.row_lengths.tolist() == [2] * 9
    table = TrlRows(2).table(rows).to_pylist()
    assert [row["input_ids"] for row in table] == [[5, 6], [7, 8, 9, 1], [2, 3, 4]]
    assert [row["completion_mask"] for row in table] == [[0, 1], [0, 1, 1, 1], [0, 1, 1]]
    assert [len(row["logprobs"]) for row in table] == [1, 3, 2]
    assert table[1]["logprobs"][2] == pytest.approx(np.log([9 / 40, 8 / 40]))


def test_metadata_files_and_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files, each read in steps of a chunk; zstd; checksums that notice a flipped bit."""
    monkeypatch.setattr(export, "FILE_TOKENS", 60)
    cache = random_cache(tmp_path / "cache")
    asked: list[int] = []
    read = Cache.read_blocks

    def spy(self: Cache, start: int, stop: int) -> Blocks:
        asked.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(Cache, "read_blocks", spy)
    report = export_cache(cache, "parquet", tmp_path / "out", blocks=(3, 40))
    assert max(asked) <= cache.manifest.identity.geometry.chunk_blocks
    assert report.files == [*(f"data/train-{i:05d}-of-00004.parquet" for i in range(4)), "README.md"]
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [row["block"] for row in rows_of(tmp_path / "out")] == [b for b in range(3, 40) for _ in range(5)]
    first = tmp_path / "out" / report.files[0]
    facts = json.loads(pq.read_schema(first).metadata[b"logitcache"])
    assert facts["fingerprint"] == cache.fingerprint
    assert (facts["first_block"], facts["stop_block"]) == (3, 40)
    assert facts["selection"] == cache.manifest.identity.selection.model_dump(mode="json")
    assert (facts["tokenizer_sha256"], facts["vocab_size"], facts["unbiased"]) == ("0" * 64, 400, True)
    column = pq.ParquetFile(first).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
    assert "fingerprint" in (tmp_path / "out" / "README.md").read_text()
    flip_bit(
        first, 8 * (column.dictionary_page_offset or column.data_page_offset) + 8 * column.total_compressed_size - 8
    )
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(first, page_checksum_verification=True).read()


def test_distillkit_rows_decode_to_the_cache(dumped: Dumped, tmp_path: Path) -> None:
    cache = open_cache(dumped.top_k)
    layout = DistillKitLayout.exact(300, 6)
    export_cache(cache, "distillkit", tmp_path / "out", layout=layout)
    rows = rows_of(tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "compression_config.yaml").read_text())["k"] == 6
    blocks = cache.read_blocks(0, cache.num_blocks)
    assert [token for row in rows for token in row["input_ids"]] == blocks.tokens[blocks.valid].tolist()
    ids = layout.decode_ids(np.concatenate([np.array(row["bytepacked_indices"], np.uint8) for row in rows]))
    logs = layout.decode_logprobs(np.concatenate([np.array(row["compressed_logprobs"], np.uint8) for row in rows]))
    for number in range(cache.num_tokens):
        row = blocks.targets.slice(number, number + 1)
        order = np.argsort(-row.weights, kind="stable")[:6]
        assert ids[number].tolist() == row.ids[order].tolist()
        np.testing.assert_allclose(np.exp(logs[number]), row.weights[order], rtol=1e-6)


def test_distillkits_own_configurations(dumped: Dumped, tmp_path: Path) -> None:
    """The documented k = 128 and k = 50, and by default the first at the cache's own k."""
    dense, narrow = open_cache(dumped.dense), open_cache(dumped.top_k)
    for number, (cache, layout, width) in enumerate(
        [
            (dense, DistillKitLayout.recommended(300), 144 + 56),
            (dense, DistillKitLayout.budget(300), 57 + 14),
            (dense, None, 338 + 56),
            (narrow, None, 9 + 16),
        ]
    ):
        export_cache(cache, "distillkit", tmp_path / str(number), blocks=(0, 2), layout=layout)
        row = rows_of(tmp_path / str(number))[1]
        assert len(row["input_ids"]) == len(row["compressed_logprobs"]) == 32
        assert {
            len(a) + len(b) for a, b in zip(row["compressed_logprobs"], row["bytepacked_indices"], strict=True)
        } == {width}


def test_trl_rows_are_a_servers_answer(dumped: Dumped, tmp_path: Path) -> None:
    cache = open_cache(dumped.top_k)
    export_cache(cache, "trl", tmp_path / "out")
    blocks = cache.read_blocks(0, cache.num_blocks)
    for number, row in enumerate(rows_of(tmp_path / "out")):
        tokens = blocks.tokens[number][blocks.valid[number]].tolist()
        assert row["input_ids"] == tokens
        assert row["completion_mask"] == [0] + [1] * (len(tokens) - 1)
        for place in range(len(tokens) - 1):
            entry = blocks.targets.slice(number * 32 + place, number * 32 + place + 1)
            listed = dict(zip(row["logprob_token_ids"][place], row["logprobs"][place], strict=True))
            assert listed == pytest.approx(dict(zip(entry.ids.tolist(), np.log(entry.weights).tolist(), strict=True)))
            assert row["logprobs"][place] == sorted(row["logprobs"][place], reverse=True)
            assert row["actual_logprobs"][place] == [entry.label_logprob[0]]
        assert len(row["logprobs"]) == len(row["logprob_token_ids"]) == len(row["actual_logprobs"]) == len(tokens) - 1


def test_trl_fills_short_rows(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache", "logprob")
    export_cache(cache, "trl", tmp_path / "out")
    row = rows_of(tmp_path / "out")[0]
    length = int(cache.read_blocks(0, 1).targets.row_lengths[0])
    assert length < 9
    assert row["logprob_token_ids"][0][length:] == [0] * (9 - length)
    assert row["logprobs"][0][length:] == [-np.inf] * (9 - length)


@pytest.mark.parametrize(
    ("cache", "target", "more", "error", "message"),
    [
        ("sample", "distillkit", {}, InterchangeError, "holds unbiased samples .* export --to parquet"),
        ("sample", "trl", {}, InterchangeError, "holds unbiased samples"),
        ("top_k", "distillkit", {"layout": DistillKitLayout.exact(300, 9)}, UsageError, "keeps 9 ids, .* only 8"),
        ("top_k", "distillkit", {"layout": DistillKitLayout.exact(299, 8)}, UsageError, "has 300 ids; raise d"),
        ("top_k", "parquet", {"layout": DistillKitLayout.exact(300, 8)}, UsageError, "makes no sense for parquet"),
        ("top_k", "csv", {}, UsageError, "'csv' is no export target"),
        ("top_k", "parquet", {"blocks": (5, 5)}, UsageError, "blocks 5:5 are outside"),
        ("top_k", "parquet", {"blocks": (0, 10**6)}, UsageError, "are outside"),
    ],
)
def test_refused(
    cache: str,
    target: str,
    more: dict[str, Any],
    error: type[LogitcacheError],
    message: str,
    dumped: Dumped,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        export_cache(open_cache(getattr(dumped, cache)), target, tmp_path / "out", **more)
    assert not list(tmp_path.iterdir())


def test_ragged_rows_are_refused_for_distillkit(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache", "logprob")
    with pytest.raises(InterchangeError, match="fewer than the 9 that every position must have"):
        export_cache(cache, "distillkit", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("target", TARGETS)
def test_all_or_nothing(target: str, dumped: Dumped, tmp_path: Path) -> None:
    """A damaged shard in the middle leaves nothing behind; a folder with something in it is not touched."""
    shutil.copytree(dumped.top_k, tmp_path / "cache")
    shard = sorted((tmp_path / "cache" / "shards").iterdir())[-1]
    flip_bit(shard, 4 * shard.stat().st_size)
    with pytest.raises(DamagedCacheError):
        export_cache(open_cache(tmp_path / "cache"), target, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    (tmp_path / "out").mkdir()
    export_cache(open_cache(dumped.top_k), target, tmp_path / "out")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(InterchangeError, match="is not empty; choose a new or empty folder"):
        export_cache(open_cache(dumped.top_k), target, tmp_path / "out")
    assert sorted((tmp_path / "out").rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        export_cache(open_cache(dumped.top_k), target, tmp_path / "file")


def test_a_folder_that_cannot_be_written(dumped: Dumped, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot be written"):
        export_cache(open_cache(dumped.top_k), "parquet", Path("/proc/logitcache"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file; choose another folder"):
        export_cache(open_cache(dumped.top_k), "parquet", tmp_path / "file" / "out")
