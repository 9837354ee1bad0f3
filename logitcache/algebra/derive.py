"""`logitcache derive`: the same blocks with less of each row kept, without a teacher."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitcache.algebra import rows
from logitcache.algebra.rewrite import Change, Picked, Result, ancestry_of, rewrite
from logitcache.codec import LayoutName, RowCodec
from logitcache.codec.values import ValueCodec
from logitcache.errors import CacheError, UsageError
from logitcache.progress import Progress, Silent
from logitcache.selection import Selection, block_uniforms
from logitcache.store import Cache, Geometry, StoredSelection, open_cache
from logitcache.store.layout import refuse_sources
from logitcache.store.schema import CHUNK_TOKENS
from logitcache.targets import SparseTargets

COLUMNS = ("entropy", "label_logprob")
MAX_TAIL_MASS = 0.01
# Uniform numbers held at once: 64 MiB.
MOST_UNIFORMS = 1 << 23

Operation = Literal["keep", "cut", "draw", "thin", "forget"]


@dataclass(frozen=True)
class Derivation:
    """What to make of a cache.

    Args:
        select: what to keep of each row; None keeps rows as they are.
        drop: columns to forget, of "entropy" and "label_logprob".
        seed: of the draws, 0 to 2^62 - 1.
        codec: layout of the new cache, "small" or "fast"; None keeps the source's.
        max_tail_mass: draws are taken from stored probabilities only where the mean mass of their tails, which no
            draw can hit, is at most this.

    Raises:
        UsageError: an argument is out of its range.
    """

    select: Selection | None = None
    drop: tuple[str, ...] = ()
    codec: LayoutName | None = None
    seed: int = 0
    max_tail_mass: float = MAX_TAIL_MASS

    def __post_init__(self) -> None:
        unknown = [name for name in self.drop if name not in COLUMNS]
        if unknown:
            raise UsageError(f"column {unknown[0]!r} cannot be dropped; choose of {', '.join(COLUMNS)}")
        if not 0 <= self.seed < 1 << 62:
            raise UsageError(f"seed is {self.seed}; it must lie between 0 and 2^62 - 1")
        if not (math.isfinite(self.max_tail_mass) and 0 <= self.max_tail_mass <= 1):
            raise UsageError(f"max-tail-mass is {self.max_tail_mass}; it must lie between 0 and 1")


def derive_cache(
    source: str | Path, root: str | Path, derivation: Derivation, progress: Progress | None = None
) -> Result:
    """Write, or finish, a cache of the blocks of `source` that keeps less of each row.

    - top-k or top-p -> fewer ids, or a narrower top-p: what a dump would have kept, from the stored probabilities.
    - top-k or top-p -> sample:N: N draws from the stored ids. They are unbiased for the *stored* distribution, that is
      the teacher's without its tail, renormalised; an id's expected weight is off by at most the row's tail mass. The
      mean of it is recorded in the new cache's ancestry, and refused where it is over `max_tail_mass`.
    - sample:N -> sample:n: n of the N draws, as if only n had been made; still unbiased for the teacher.
    - any -> label: nothing but label_logprob, as stored.

    Draws depend on the source's fingerprint, the seed and the block: the same line gives the same bytes.

    Raises:
        UsageError: the selection cannot be had from what is stored, or nothing would change.
        CacheError, PlanMismatchError: the source is unfinished or leaves too much in the tail, or the folder holds
            something else.
    """
    root, progress = Path(root), progress or Silent()
    cache = open_cache(source)
    refuse_sources(root, [cache.root])
    identity = cache.manifest.identity
    old = cache.selection
    new = derivation.select or old
    operation = operation_for(old, new, cache.location)
    layout = derivation.codec or cache.codec.layout
    if operation == "keep" and not derivation.drop and layout == cache.codec.layout:
        raise UsageError(
            f"nothing of {cache.location} would change; give another --select, --codec, or a column to --drop"
        )
    arguments: dict[str, Any] = {} if new == old else {"select": str(new), "from": str(old)}
    if derivation.drop:
        arguments["drop"] = sorted(set(derivation.drop))
    if layout != cache.codec.layout:
        arguments["codec"] = layout
    if operation in ("draw", "thin"):
        arguments["seed"] = derivation.seed
    if operation == "forget":
        _check_labels(cache, derivation.drop)
    notes = {}
    if operation == "draw":
        progress.stage("measuring the mass of the tails")
        notes["mean_tail_mass"] = arguments["mean_tail_mass"] = _checked_tail_mass(cache, derivation.max_tail_mass)
    derived = identity.model_copy(
        update={
            "selection": StoredSelection(**new.to_dict()),
            "seed": derivation.seed if operation == "draw" else identity.seed,
            "codec": RowCodec(layout, _values(cache.codec, operation, new), cache.masked).to_dict(),
            "geometry": _geometry(identity.geometry, old, new),
            "ancestry": ancestry_of([cache], "derive", arguments),
        }
    )
    change = _change(cache, operation, old, new, derivation)
    result = rewrite(root, derived, cache.manifest.origin, Picked.whole([cache]), change, derivation.drop, progress)
    result.notes.update(notes)
    return result


def operation_for(old: Selection, new: Selection, where: str) -> Operation:
    """How rows of selection `new` are had from rows of `old`. Raises UsageError where they cannot be."""
    exact = ("top-k", "top-p")
    counted = tuple(one.method == "sample" and one.exponent is None for one in (old, new))
    why = "what is stored does not determine it"
    if new == old:
        return "keep"
    if not new.keeps_ids:
        return "forget"
    if old.method in exact and new.method in exact:
        if new.size > old.size or (old.mass or 1) < (new.mass or 1):
            why = "it keeps more than is stored"
        elif old.method == "top-p" and new.method == "top-k":
            why = "a row of top-p may hold fewer ids"
        else:
            return "cut"
    elif old.method in exact and counted[1]:
        return "draw"
    elif all(counted):
        if new.size <= old.size:
            return "thin"
        why = "it needs more draws than are stored"
    elif not old.keeps_ids:
        why = "it stores no ids"
    elif new.method == "varopt":
        why = "varopt rows are only made by a dump"
    elif old.unbiased and new.method in exact:
        why = "draws do not tell which ids are the most probable"
    raise UsageError(f"{new} cannot be derived from {where}, which holds {old}: {why}; dump with --select {new}")


def _geometry(geometry: Geometry, old: Selection, new: Selection) -> Geometry:
    """The same blocks; as many more of them in a chunk as rows became shorter, so that chunks do not become tiny."""
    chunk, unit = geometry.chunk_blocks, geometry.unit_blocks
    most = min(old.size // max(1, new.size), CHUNK_TOKENS // (chunk * geometry.block_length), unit // chunk)
    chunk *= max(1, most)
    return geometry.model_copy(update={"chunk_blocks": chunk, "unit_blocks": unit - unit % chunk})


def _values(old: RowCodec, operation: Operation, new: Selection) -> ValueCodec:
    """How weights are coded: as they were, unless there are new draws."""
    if operation in ("keep", "cut"):
        return old.values
    return RowCodec.for_selection(new.method, new.size, None, old.layout).values


def _change(
    cache: Cache, operation: Operation, old: Selection, new: Selection, derivation: Derivation
) -> Change | None:
    """The change of rows that makes the new cache; None where they stay."""
    geometry, key = cache.manifest.identity.geometry, _stream_key(cache.fingerprint, derivation.seed)

    def change(targets: SparseTargets, first: int, stop: int, counted: NDArray[np.bool_] | None) -> SparseTargets:
        if operation == "forget":
            return rows.forget(targets)
        if operation == "cut":
            return rows.keep_largest(targets, new.size, new.mass)
        if operation == "draw":
            return _by_blocks(targets, geometry, (first, stop), counted, new.draws, key, rows.draw)

        def thin(part: SparseTargets, uniforms: NDArray[np.float64]) -> SparseTargets:
            return rows.thin(part, old.draws, uniforms, new.draws)

        return _by_blocks(targets, geometry, (first, stop), counted, old.draws, key, thin)

    return None if operation == "keep" else change


def _by_blocks(
    targets: SparseTargets,
    geometry: Geometry,
    blocks: tuple[int, int],
    counted: NDArray[np.bool_] | None,
    draws: int,
    key: int,
    draw: Callable[[SparseTargets, NDArray[np.float64]], SparseTargets],
) -> SparseTargets:
    """Apply a sampling step to the rows of `blocks`, a few blocks at a time to bound the random numbers held.

    `counted` says which of the blocks' real positions have a row among `targets`; None: all.
    """
    first, stop = blocks
    length = geometry.block_length
    step = max(1, MOST_UNIFORMS // (length * draws))
    parts, done, seen = [], 0, 0
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        valid = np.arange(length) < np.array(geometry.block_tokens(begin, end))[:, None]
        # Every position has its numbers, also where a block has ended: they depend on nothing but the place.
        uniforms = block_uniforms(key, range(begin, end), length, draws)[valid.ravel()]
        seen += len(uniforms)
        if counted is not None:
            uniforms = uniforms[counted[seen - len(uniforms) : seen]]
        parts.append(draw(targets.slice(done, done + len(uniforms)), uniforms))
        done += len(uniforms)
    return SparseTargets.concatenate(parts)


def _stream_key(fingerprint: str, seed: int) -> int:
    """A 128-bit Philox key. It holds the source: one stream may not serve a cache and what is derived from it."""
    return int.from_bytes(hashlib.sha256(f"derive/{fingerprint}/{seed}".encode()).digest()[:16], "little")


def _checked_tail_mass(cache: Cache, limit: float) -> float:
    """Mean tail mass of the stored rows. Raises CacheError when it is over `limit` or a row stores nothing."""
    total = 0.0
    for ref in cache.chunks:
        blocks = cache.read_chunk(ref)
        counted = (blocks.valid if blocks.counted is None else blocks.counted).ravel()
        if (blocks.targets.row_lengths[counted] == 0).any():
            raise CacheError(
                f"{cache.location} has rows without any id from block {ref.first_block} on; nothing can be drawn"
            )
        total += float(blocks.targets.tail_mass[counted].sum(dtype=np.float64))
    mean = round(total / max(1, cache.num_counted), 6)
    if mean > limit:
        raise CacheError(
            f"{cache.location} leaves on average {mean:.4f} of the teacher's probability in the tails, over {limit:g}, "
            "and no draw from it can hit a tail; dump with --select sample:N for unbiased draws, or accept the bias "
            "with a larger --max-tail-mass"
        )
    return mean


def _check_labels(cache: Cache, drop: tuple[str, ...]) -> None:
    """Raise unless label_logprob, all that `label` keeps, is there."""
    if "label_logprob" in drop:
        raise UsageError("label keeps nothing but label_logprob, which --drop would forget; leave one of the two out")
    blocks = cache.read_chunk(cache.chunks[0])
    known = np.isfinite(blocks.targets.label_logprob[blocks.labels().ravel() >= 0])
    if known.size and not known.any():
        raise CacheError(
            f"{cache.location} does not know the teacher's log-probability of its tokens (label_logprob), all that "
            "label keeps; derive from a cache that does, or dump with --select label"
        )
