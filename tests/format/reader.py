"""Rows of a cache, read as FORMAT.md section 6 says: no code of logitcache, loops where the text has loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.format.files import ENDINGS, FormatError, Planes, read_container, read_index, require

__all__ = ["Contents", "FormatError", "read_cache"]

PARAMETERS = {
    "counts": ("draws", 1),
    "probabilities": ("root_steps", 16),
    "weights": ("root_steps", 16),
    "head-tail": ("root_steps", 16),
    "none": (None, 0),
}
CODINGS = {"top-k": "probabilities", "top-p": "probabilities", "varopt": "head-tail", "label": "none"}
OF_ROWS = {
    "counts": [],
    "probabilities": ["least", "tail"],
    "weights": [],
    "head-tail": ["rest", "precision"],
    "none": [],
}
UNBIASED = ("counts", "weights", "head-tail")
ROW = ("ids", "weights", "tail_mass", "threshold", "label_logprob", "entropy")
Rows = list[list[int]]
# A row's token and the one at the next position.
Around = tuple[int, int | None]


@dataclass
class Contents:
    """Everything a cache stores, one item for each of its T committed tokens.

    Args:
        blocks: the block each token is in.
        ids, weights: of each row, ids ascending.
        counted: 0 or 1 of a masked cache; empty otherwise.
    """

    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ids: Rows = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    tail_mass: list[float] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    label_logprob: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)


class Tables:
    """The codebook."""

    def __init__(self, planes: Planes, vocab_size: int) -> None:
        require(set(planes) == {"ids", "context_sizes", "candidates"}, "the codebook has other planes")
        listed, sizes, candidates = (planes[name].tolist() for name in ("ids", "context_sizes", "candidates"))
        require(len(set(listed)) == len(listed), "the codebook lists an id twice")
        require(all(identifier < vocab_size for identifier in listed), "the codebook lists an id out of range")
        require(len(sizes) <= vocab_size and sum(sizes) == len(candidates), "the candidates do not fit their sizes")
        self.vocab_size, self.num_candidates = vocab_size, len(candidates)
        self.id_of_rank = listed + sorted(set(range(vocab_size)) - set(listed))
        self.candidates: dict[int, list[int]] = {}
        ids = [self.id(rank) for rank in candidates]
        for rank, size in enumerate(sizes):
            self.candidates[self.id(rank)], ids = ids[:size], ids[size:]

    def id(self, rank: int) -> int:
        require(0 <= rank < self.vocab_size, "a rank is out of range")
        return self.id_of_rank[rank]

    def id_of_key(self, key: int, token: int, following: int | None) -> int:
        if key == 0:
            require(following is not None, "a key stands for the next row's token, and there is none")
            return int(following or 0)
        candidates = self.candidates.get(token, [])
        return candidates[key - 1] if key <= len(candidates) else self.id(key - 1 - len(candidates))


def read_cache(root: Path) -> Contents:
    """Everything in the cache, or FormatError."""
    index = read_index(root)
    identity, contents = index.identity, Contents()
    _check_codec(identity["codec"], identity["selection"])
    if not index.shards:
        return contents
    attributes: dict[str, Any] = {"format_version": 1, "role": "codebook", "plan": index.plan}
    path = root / "codebook" / f"tables{ENDINGS[identity['container']]}"
    planes = read_container(path, index.codebook_sha256, None, attributes, 1 << 26)
    require(len(planes) == 1, "the codebook has several chunks")
    tables = Tables(planes[0], identity["vocab_size"])
    step = identity["geometry"]["chunk_blocks"]
    for shard in index.shards:
        own = {name: shard[name] for name in ("unit", "first_block", "num_tokens")}
        most = 16 * shard["num_tokens"] + 8 * shard["num_entries"] + 65_536
        path = root / "shards" / shard["file"]
        chunks = read_container(path, shard["sha256"], shard["num_bytes"], {**attributes, "role": "shard", **own}, most)
        stop = shard["first_block"] + shard["num_blocks"]
        firsts = range(shard["first_block"], stop, step)
        require(len(chunks) == len(firsts), "a shard has another number of chunks")
        before = sum(map(len, contents.ids))
        for first, chunk in zip(firsts, chunks, strict=True):
            counts = index.tokens_of_block[first : min(first + step, stop)]
            contents.blocks += [first + block for block, count in enumerate(counts) for _ in range(count)]
            _read_chunk(chunk, sum(counts), identity["codec"], tables, contents)
        require(sum(map(len, contents.ids)) - before == shard["num_entries"], "a shard has another number of entries")
    return contents


def _check_codec(codec: dict[str, Any], selection: dict[str, Any]) -> None:
    sampled = "counts" if selection["exponent"] is None else "weights"
    require(codec["values"] == CODINGS.get(selection["method"], sampled), "the codec is not that of the selection")
    name, least = PARAMETERS[codec["values"]]
    known = {"layout", "values", name} - {None} | (set(codec) & {"masked"})
    require(set(codec) == known and codec["layout"] in ("small", "fast"), "an unknown codec")
    require(codec.get("masked", True) is True, "a codec that says it has no mask")
    require((selection["size"] == 0) == (selection["method"] == "label"), "only `label` has the size 0")
    require(selection["size"] <= 65_535, "a selection keeps more entries than a row may have")
    require((selection["mass"] is not None) == (selection["method"] == "top-p"), "only `top-p` has a mass")
    require(0 < (selection["mass"] or 1) <= 1, "a mass is not in (0, 1]")
    require(name is None or least <= codec[name] <= 65_535, "a parameter of the codec is out of range")
    require(name != "draws" or codec["draws"] == selection["size"], "the codec has another number of draws")


def _read_chunk(planes: Planes, count: int, codec: dict[str, Any], tables: Tables, contents: Contents) -> None:
    coding = codec["values"]
    masked = ["counted"] if "masked" in codec else []
    require(all(name in planes and planes[name].size == count for name in ["tokens", *masked]), "a plane of positions")
    counted = planes["counted"].tolist() if masked else [1] * count
    require(set(counted) <= {0, 1}, "a position counts neither 0 nor 1 times")
    places = [place for place in range(count) if counted[place]]
    tokens = [tables.id(rank) for rank in planes["tokens"].tolist()]
    around = [(tokens[place], tokens[place + 1] if place + 1 < count else None) for place in places]
    rows = {name: plane for name, plane in planes.items() if name not in ("tokens", *masked)}
    found = _read_rows(rows, around, codec, tables)
    absent = (
        ([], [], 0.0, math.inf, math.nan, math.nan) if coding in UNBIASED else ([], [], 1.0, 0.0, math.nan, math.nan)
    )
    whole: list[Any] = [absent] * count
    for place, row in zip(places, found, strict=True):
        whole[place] = row
    contents.tokens += tokens
    contents.counted += counted if masked else []
    for name, column in zip(ROW, zip(*whole, strict=True), strict=True):
        getattr(contents, name).extend(column)


def _read_rows(planes: Planes, around: list[Around], codec: dict[str, Any], tables: Tables) -> list[Any]:
    """Each row's ids, weights, tail mass, threshold, label_logprob and entropy, as `ROW` lists them."""
    coding, layout, count = codec["values"], codec["layout"], len(around)
    plane = {"counts": "counts", "none": ""}.get(coding, "levels")
    of_rows = [*OF_ROWS[coding], "label_logprob", "entropy"]
    if (layout, coding) != ("small", "counts") and plane:
        of_rows.append("lengths")
    require(set(planes) == {*(["ids", plane] if plane else []), *of_rows}, "a chunk has other planes")
    require(all(planes[name].size == count for name in of_rows), "a plane of rows has another size")
    numbers = {name: integers.tolist() for name, integers in planes.items()}
    codes, stored = (numbers[plane], numbers["ids"]) if plane else ([], [])
    lengths = numbers.get("lengths")
    if lengths is None:
        lengths = _lengths_of_counts(codes, count, codec["draws"]) if plane else [0] * count
    require(max(lengths, default=0) <= 65_535, "a row is too long")
    require(sum(lengths) == len(codes) == len(stored), "the lengths do not fit the entries")
    read = _fast if layout == "fast" else _small
    ids, codes_of_rows = read(stored, codes, lengths, around, tables)
    special = {0: math.nan, 1: -math.inf}
    rows = []
    for row, row_codes in enumerate(codes_of_rows):
        extra = [numbers[name][row] for name in OF_ROWS[coding]]
        label, entropy = numbers["label_logprob"][row], numbers["entropy"][row]
        columns = special.get(label, -(label - 2) / 64), math.nan if entropy == 0 else (entropy - 1) / 64
        rows.append((ids[row], *VALUES[coding](row_codes, *extra, codec), *columns))
    return rows


# ---------------------------------------------------------------------------------------------- layouts


def _fast(plane: list[int], codes: list[int], lengths: list[int], _: list[Around], tables: Tables) -> tuple[Rows, Rows]:
    require(max(plane, default=0) <= 2 * tables.vocab_size, "an integer is too large")
    ids: Rows = []
    values: Rows = []
    last = at = 0
    for length in lengths:
        row = []
        for slot, integer in enumerate(plane[at : at + length]):
            zigzag = integer // 2 if integer % 2 == 0 else -(integer + 1) // 2
            last += zigzag if slot == 0 else integer + 1
            require(0 <= last < tables.vocab_size, "an id is out of range")
            row.append(last)
        ids.append(row)
        values.append(codes[at : at + length])
        at += length
    return ids, values


def _small(
    plane: list[int], codes: list[int], lengths: list[int], around: list[Around], tables: Tables
) -> tuple[Rows, Rows]:
    require(max(plane, default=0) <= tables.vocab_size + tables.num_candidates, "an integer is too large")
    entries: list[list[tuple[int, int]]] = [[] for _ in lengths]
    keys = [-1] * len(lengths)
    at = 0
    for slot in range(max(lengths, default=0)):
        for row in (row for row, length in enumerate(lengths) if length > slot):
            keys[row] += plane[at] + 1
            entries[row].append((tables.id_of_key(keys[row], *around[row]), codes[at]))
            at += 1
    for row_entries in entries:
        row_entries.sort()
        require(len(dict(row_entries)) == len(row_entries), "a row holds an id twice")
    return [[one for one, _ in row] for row in entries], [[code for _, code in row] for row in entries]


def _lengths_of_counts(codes: list[int], count: int, draws: int) -> list[int]:
    left, lengths, at = [draws] * count, [0] * count, 0
    while any(left):
        for row in (row for row in range(count) if left[row]):
            require(at < len(codes) and codes[at] < left[row], "counts do not sum to the draws")
            left[row] -= codes[at] + 1
            lengths[row] += 1
            at += 1
    require(at == len(codes), "there are counts left over")
    return lengths


# ---------------------------------------------------------------------------------------------- values


def grid(level: int, steps: int, fineness: int = 1) -> float:
    above = level - 1024 * fineness
    if above >= 0:
        return (16 / steps + above / (steps * fineness)) ** 2
    return (16 / steps) ** 2 * math.exp(above / (8 * fineness))


def _counts(codes: list[int], codec: dict[str, Any]) -> tuple[list[float], float, float]:
    require(sum(codes) + len(codes) == codec["draws"], "a row's counts do not sum to the draws")
    return [(code + 1) / codec["draws"] for code in codes], 0, math.inf


def _probabilities(codes: list[int], least: int, tail: int, codec: dict[str, Any]) -> tuple[list[float], float, float]:
    steps = codec["root_steps"]
    require(least + max(codes, default=0) <= 1008 + steps, "a probability is over 1")
    require(tail <= 4098, "a tail mass is out of range")
    mass, head = {0: (0.0, 1.0), 1: (1.0, 0.0)}.get(tail) or (
        1 / (1 + math.exp(-(tail - 2050) / 16)),
        1 / (1 + math.exp((tail - 2050) / 16)),
    )
    proportions = [grid(least + code, steps) for code in codes]
    return [value * (head / math.fsum(proportions)) for value in proportions], mass, 0


def _weights(codes: list[int], codec: dict[str, Any]) -> tuple[list[float], float, float]:
    steps = codec["root_steps"]
    require(max(codes, default=0) <= 1008 + 2000 * steps, "a weight is too large")
    return [grid(code, steps) for code in codes], 0, math.inf


def _head_tail(codes: list[int], rest: int, precision: int, codec: dict[str, Any]) -> tuple[list[float], float, float]:
    require(precision <= 5, "an unknown precision")
    steps, fineness = codec["root_steps"], 16**precision
    tails, largest = codes.count(0), codes.count(1)
    if largest:
        require(largest == 1 and (rest > 0) == (tails > 0), "a row of another form")
        mass = grid(rest - 1, steps, fineness) if rest else 0.0
    else:
        require(tails == len(codes) and rest == 0, "a row of another form")
        mass = 1.0 if codes else 0.0
    others = [grid(code - 2, steps, fineness) for code in codes if code > 1]
    left = 1 - mass - math.fsum(others)
    require(not largest or left > 0, "nothing is left for the largest")
    threshold = mass / max(1, tails)
    weights = [threshold if code == 0 else left if code == 1 else grid(code - 2, steps, fineness) for code in codes]
    return weights, 0, threshold


def _none(codes: list[int], codec: dict[str, Any]) -> tuple[list[float], float, float]:
    return [], 1, 0


VALUES: dict[str, Any] = {
    "none": _none,
    "counts": _counts,
    "probabilities": _probabilities,
    "weights": _weights,
    "head-tail": _head_tail,
}
