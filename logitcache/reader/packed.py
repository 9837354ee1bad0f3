"""A batch as one contiguous buffer: one copy to a device, taken apart there by a few tensor operations.

Legend: B blocks of L tokens, N = B * L rows, nnz stored entries of all rows, K longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.reader.chunks import BlockRows
from logitcache.targets import COLUMNS, DeviceTargets, empty_row

WeightType = Literal["float32", "float16"]
IGNORED = -100
# Fields begin at multiples of this many bytes, which every type and every copy engine is content with.
ALIGNMENT = 16


@dataclass(frozen=True)
class PackedLayout:
    """Where the fields of a batch lie in its buffer, and what the host knows of them.

    Args:
        blocks, length: B and L.
        entries: nnz; None in a batch without targets.
        longest: K, at least 1.
        weights: type of the weights in the buffer.
        whole: whether every block has L tokens.
        equal: whether every row has K entries.
        masked: whether a mask says which rows count.
    """

    blocks: int
    length: int
    entries: int | None = None
    longest: int = 1
    weights: WeightType = "float32"
    whole: bool = True
    equal: bool = False
    masked: bool = False

    @property
    def rows(self) -> int:
        return self.blocks * self.length

    @cached_property
    def fields(self) -> dict[str, tuple[int, int, str]]:
        """Of each field: its first byte, number of values and type."""
        sizes = {"tokens": (self.rows, "int32"), "sizes": (self.blocks, "int32")}
        if self.masked:
            sizes["counted"] = (self.rows, "bool")
        if self.entries is not None:
            sizes["offsets"] = (self.rows + 1, "int32")
            sizes |= dict.fromkeys(COLUMNS, (self.rows, "float32"))
            sizes |= {"ids": (self.entries, "int32"), "weights": (self.entries, self.weights)}
        fields, position = {}, 0
        for name, (count, dtype) in sizes.items():
            fields[name] = (position, count, dtype)
            position += -(-count * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        return fields

    @property
    def num_bytes(self) -> int:
        start, count, dtype = list(self.fields.values())[-1]
        return start + count * np.dtype(dtype).itemsize


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B blocks in one buffer; reads like a dictionary of `input_ids`, `labels` and `targets`, on any device.

    Move it with `to`, which copies once, and take it apart there. Nothing here waits for a GPU.

    Args:
        buffer: uint8, all fields.
        layout: where they lie.
        unbiased, has_exact_head: as in `SparseTargets`.
        samples_seen: blocks read by all ranks up to and with this batch: `CacheDataset.state_after`.
    """

    buffer: torch.Tensor
    layout: PackedLayout
    unbiased: bool
    has_exact_head: bool
    samples_seen: int = 0

    def __repr__(self) -> str:
        return f"PackedBatch({self.layout.blocks} x {self.layout.length} tokens on {self.buffer.device})"

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return self._tensors_of_targets() if name == "targets" else getattr(self, name)

    def keys(self) -> KeysView[str]:
        """The names that `[]` knows."""
        names = ("input_ids", "labels") if self.layout.entries is None else ("input_ids", "labels", "targets")
        return dict.fromkeys(names).keys()

    def unpack(self) -> dict[str, Any]:
        """The plain dictionary `{"input_ids", "labels", "targets": {...}}` on the buffer's device."""
        return {name: self[name] for name in self.keys()}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device: one copy, which a pinned batch makes beside other work."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self, *_device: Any) -> PackedBatch:
        """The batch in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return self if self.buffer.is_pinned() else replace(self, buffer=self.buffer.pin_memory())

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 [B, L]; 0 where a block has ended."""
        return self._tokens().long()

    @property
    def labels(self) -> torch.Tensor:
        """int64 [B, L]: the next token; -100 where there is none in the block, or it does not count."""
        tokens_BL = self._tokens()
        labels_BL = tokens_BL.new_full(tokens_BL.shape, IGNORED, dtype=torch.int64)
        labels_BL[:, :-1] = tokens_BL[:, 1:]
        if not self.layout.whole:
            place_L = torch.arange(1, self.layout.length + 1, device=self.buffer.device)
            labels_BL.masked_fill_(place_L >= self._field("sizes").unsqueeze(1), IGNORED)
        if self.layout.masked:
            labels_BL.masked_fill_(~self._field("counted").view_as(labels_BL), IGNORED)
        return labels_BL

    @property
    def targets(self) -> DeviceTargets:
        """The teacher's rows, padded to [N, K]. Raises KeyError in a batch read without targets."""
        return DeviceTargets(**self["targets"], unbiased=self.unbiased, has_exact_head=self.has_exact_head)

    def _tensors_of_targets(self) -> dict[str, torch.Tensor]:
        ids_NK, weights_NK = self._padded()
        return {"ids": ids_NK, "weights": weights_NK, **{name: self._field(name) for name in COLUMNS}}

    def _padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 [N, K] padded with -1 and weights float32 [N, K] padded with 0."""
        ids, weights, shape = self._field("ids"), self._field("weights"), (self.layout.rows, self.layout.longest)
        if self.layout.equal:
            return ids.view(shape).long(), weights.view(shape).float()
        if not self.layout.entries:
            return ids.new_full(shape, -1, dtype=torch.int64), weights.new_zeros(shape, dtype=torch.float32)
        spread = _spread_by_mask if ids.device.type == "cpu" else _spread_by_index
        return spread(self._field("offsets"), ids, weights, shape[1])

    def _tokens(self) -> torch.Tensor:
        return self._field("tokens").view(self.layout.blocks, self.layout.length)

    def _field(self, name: str) -> torch.Tensor:
        start, count, dtype = self.layout.fields[name]
        stop = start + count * np.dtype(dtype).itemsize
        return self.buffer[start:stop].view(getattr(torch, dtype))


def pack(
    blocks: Sequence[BlockRows],
    length: int,
    weights: WeightType = "float32",
    pinned: bool = False,
    has_exact_head: bool = True,
    samples_seen: int = 0,
) -> PackedBatch:
    """Copy blocks into one buffer.

    Args:
        blocks: B of them; all with targets, or none.
        length: L; shorter blocks are filled up with empty rows.
        weights: type of the weights in the buffer.
        pinned: whether the buffer is page-locked.
        has_exact_head, samples_seen: kept with the batch.
    """
    with_targets = blocks[0].targets is not None
    layout = PackedLayout(
        blocks=len(blocks),
        length=length,
        entries=sum(block.num_entries for block in blocks) if with_targets else None,
        weights=weights,
        whole=all(block.tokens.size == length for block in blocks),
        masked=any(block.counted is not None for block in blocks),
    )
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=pinned)
    views = _views(buffer, layout)
    position = 0
    for number, block in enumerate(blocks):
        rows = slice(number * length, (number + 1) * length)
        tokens = views["tokens"][rows]
        tokens[: block.tokens.size], tokens[block.tokens.size :] = block.tokens, 0
        views["sizes"][number] = block.tokens.size
        if layout.masked:
            views["counted"][rows] = False
            views["counted"][rows][: block.tokens.size] = True if block.counted is None else block.counted
        if block.targets is not None:
            _copy_rows(block, views, rows, position)
            position += block.num_entries
    if with_targets:
        views["offsets"][-1] = position
        lengths = np.diff(views["offsets"])
        longest = max(1, int(lengths.max(initial=0)))
        layout = replace(layout, longest=longest, equal=longest * layout.rows == position)
    unbiased = blocks[0].targets is not None and blocks[0].targets.unbiased
    return PackedBatch(buffer, layout, unbiased, has_exact_head, samples_seen)


def _spread_by_index(
    offsets: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as [N, K]: each cell looks its entry up, so that no size is asked of a GPU."""
    starts_N1, stops_N1 = offsets[:-1].unsqueeze(1), offsets[1:].unsqueeze(1)
    place_NK = starts_N1 + torch.arange(longest, dtype=torch.int32, device=ids.device)
    filled_NK = place_NK < stops_N1
    # Cells of the padding look up some other row's entry, which is then replaced.
    place = place_NK.clamp_(max=ids.numel() - 1).flatten()
    ids_NK, weights_NK = (values.index_select(0, place).view(filled_NK.shape) for values in (ids, weights))
    return torch.where(filled_NK, ids_NK, -1).long(), torch.where(filled_NK, weights_NK, 0).float()


def _spread_by_mask(
    offsets: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with numpy, which on a CPU is twice as fast."""
    filled_NK = np.arange(longest, dtype=np.int32) < np.diff(offsets.numpy())[:, None]
    ids_NK = np.full(filled_NK.shape, -1, dtype=np.int64)
    weights_NK = np.zeros(filled_NK.shape, dtype=np.float32)
    ids_NK[filled_NK], weights_NK[filled_NK] = ids.numpy(), weights.numpy()
    return torch.from_numpy(ids_NK), torch.from_numpy(weights_NK)


def _copy_rows(block: BlockRows, views: dict[str, NDArray[Any]], rows: slice, position: int) -> None:
    """Copy a block's targets to its rows; its entries begin at `position`."""
    targets, first, stop = block.targets, block.first_row, block.stop_row
    assert targets is not None
    begin, end, real = int(targets.offsets[first]), int(targets.offsets[stop]), stop - first
    offsets = views["offsets"][rows]
    np.subtract(targets.offsets[first:stop], begin - position, out=offsets[:real], casting="same_kind")
    offsets[real:] = position + end - begin
    entries = slice(position, position + end - begin)
    views["ids"][entries], views["weights"][entries] = targets.ids[begin:end], targets.weights[begin:end]
    for name, nothing in empty_row(targets.unbiased).items():
        column = views[name][rows]
        column[:real], column[real:] = getattr(targets, name)[first:stop], nothing


def _views(buffer: torch.Tensor, layout: PackedLayout) -> dict[str, NDArray[Any]]:
    data = buffer.numpy()
    return {
        name: data[start : start + count * np.dtype(dtype).itemsize].view(dtype)
        for name, (start, count, dtype) in layout.fields.items()
    }
