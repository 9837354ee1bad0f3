"""How other tools would store the same rows: their layouts, written from their documentation.

Legend: N rows, nnz entries, K entries of every row.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.interchange import DistillKitLayout, probabilities, ranked_entries
from logitcache.interchange.packing import pack_bits, unpack_bits
from logitcache.targets import SparseTargets, offsets_of

ID_BITS, VALUE_BITS = 17, 7
STEPS_PER_NAT = 8


class Peer(ABC):
    """A way to store rows of one selection.

    `encode` gives the bytes, `decode` the rows back. Input tokens and side columns are not part of it.
    """

    name: str

    @abstractmethod
    def encode(self, targets: SparseTargets) -> list[bytes]:
        """What would be written."""

    @abstractmethod
    def decode(self, stored: list[bytes], targets: SparseTargets) -> SparseTargets:
        """The rows; of `targets` only what is no entry (offsets' count, tail mass) may be used."""


@dataclass(frozen=True)
class Plain(Peer):
    """int32 ids, float16 weights and int16 lengths, one after another."""

    name: str = "int32 + fp16"

    def encode(self, targets: SparseTargets) -> list[bytes]:
        arrays = targets.row_lengths.astype("<u2"), targets.ids.astype("<i4"), targets.weights.astype("<f2")
        return [array.tobytes() for array in arrays]

    def decode(self, stored: list[bytes], targets: SparseTargets) -> SparseTargets:
        lengths, ids, weights = (
            np.frombuffer(data, dtype) for data, dtype in zip(stored, ("<u2", "<i4", "<f2"), strict=True)
        )
        # The smallest float16 stands for what rounded to 0.
        return _rows(lengths, ids, np.maximum(weights.astype(np.float32), 2.0**-24), targets)


@dataclass(frozen=True)
class BitPacked(Peer):
    """17-bit ids and 7-bit values, as the Random Sampling KD paper describes: counts of draws, or log-probabilities.

    Log-probabilities are stored in steps of 1/8 nat, at most 127 of them; lengths take one byte.
    """

    draws: int | None = None
    name: str = "17 + 7 bits"

    def encode(self, targets: SparseTargets) -> list[bytes]:
        weights = targets.weights.astype(np.float64)
        values = np.rint(weights * self.draws) if self.draws else np.rint(-np.log(weights) * STEPS_PER_NAT)
        packed = targets.ids << VALUE_BITS | np.clip(values, 0, (1 << VALUE_BITS) - 1).astype(np.int64)
        bits = pack_bits(packed[None, :], ID_BITS + VALUE_BITS)
        return [targets.row_lengths.astype("u1").tobytes(), bits.tobytes()]

    def decode(self, stored: list[bytes], targets: SparseTargets) -> SparseTargets:
        lengths = np.frombuffer(stored[0], "u1")
        bits = np.frombuffer(stored[1], np.uint8)[None, :]
        packed = unpack_bits(bits, ID_BITS + VALUE_BITS, int(lengths.sum(dtype=np.int64)))[0]
        values = packed & ((1 << VALUE_BITS) - 1)
        weights = values / self.draws if self.draws else np.exp(-values / STEPS_PER_NAT)
        return _rows(lengths, packed >> VALUE_BITS, weights.astype(np.float32), targets)


@dataclass(frozen=True)
class ParquetZstd(Peer):
    """Lists of uint32 ids and float32 weights in a Parquet file, zstd."""

    name: str = "Parquet zstd"

    def encode(self, targets: SparseTargets) -> list[bytes]:
        import pyarrow
        import pyarrow.parquet

        offsets = pyarrow.array(targets.offsets.astype(np.int32))
        columns = {
            "ids": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(targets.ids.astype(np.uint32))),
            "weights": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(targets.weights)),
        }
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file, compression="zstd")
        return [file.getvalue()]

    def decode(self, stored: list[bytes], targets: SparseTargets) -> SparseTargets:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(io.BytesIO(stored[0]), use_threads=False)
        ids, weights = table["ids"].combine_chunks(), table["weights"].combine_chunks()
        lengths = np.diff(np.asarray(ids.offsets))
        return _rows(lengths, np.asarray(ids.values), np.asarray(weights.values), targets)


@dataclass(frozen=True)
class DistillKit(Peer):
    """DistillKit's compressed captures, in one of its documented configurations."""

    layout: DistillKitLayout
    k: int
    name: str = "DistillKit"

    def encode(self, targets: SparseTargets) -> list[bytes]:
        ids, logprobs = ranked_entries(targets, self.k)
        return [self.layout.encode_ids(ids).tobytes(), self.layout.encode_logprobs(logprobs).tobytes()]

    def decode(self, stored: list[bytes], targets: SparseTargets) -> SparseTargets:
        data = [np.frombuffer(part, np.uint8).reshape(len(targets), -1) for part in stored]
        ids, logprobs = self.layout.decode_ids(data[0]), self.layout.decode_logprobs(data[1])
        weights, _ = probabilities(logprobs, self.layout.exact_k)
        order = np.argsort(ids, axis=1)
        lengths = np.full(len(targets), self.k)
        values = np.take_along_axis(weights, order, 1).ravel().astype(np.float32)
        sums = values.reshape(len(targets), -1).sum(1, dtype=np.float64)
        flat_ids = np.take_along_axis(ids, order, 1).ravel()
        # Its files store no tail: it is what the decoded probabilities leave.
        return SparseTargets(offsets_of(lengths), flat_ids, values, tail_mass=np.clip(1 - sums, 0, 1))


def _rows(
    lengths: NDArray[Any], ids: NDArray[Any], weights: NDArray[np.float32], targets: SparseTargets
) -> SparseTargets:
    offsets = offsets_of(lengths)
    if targets.unbiased:
        return SparseTargets(offsets, ids, weights, threshold=targets.threshold, unbiased=True)
    rows = np.repeat(np.arange(len(targets)), lengths)
    sums = np.bincount(rows, weights, minlength=len(targets))
    # Like ours, scaled so that a row sums to 1 - tail mass: rounding alone shall not decide.
    scale = np.divide(1 - targets.tail_mass, sums, out=np.ones_like(sums), where=sums > 0)
    return SparseTargets(offsets, ids, weights * scale[rows], tail_mass=targets.tail_mass)


def peers_for(method: str, size: int, vocab_size: int) -> list[Peer]:
    """The peers that can store a selection's rows."""
    peers: list[Peer] = [Plain(), ParquetZstd()]
    if vocab_size <= 1 << ID_BITS:
        peers.append(BitPacked(size if method == "sample" else None))
    if method == "top-k":
        for layout, name in ((DistillKitLayout.budget, "budget"), (DistillKitLayout.recommended, "recommended")):
            made = layout(vocab_size)
            if made.k == size:
                peers.append(DistillKit(made, size, f"DistillKit {name}"))
    return peers
