"""The random stream of sampled selections: a pure function of (seed, block, position, draw). Torch-free.

Each block owns its own Philox counter range, so batch size, number of workers and resuming do not change what is
drawn (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"). Only raw 64-bit outputs are used: numpy
guarantees those, not the conversion to doubles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray


def block_uniforms(seed: int, blocks: Iterable[int], block_length: int, draws: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for every position of `blocks`: float64 [len(blocks) * block_length, draws]."""
    rows = [_uniforms_of_block(seed, block, block_length * draws) for block in blocks]
    return np.concatenate(rows).reshape(-1, draws)


def chunk_uniforms(seed: int, first_block: int) -> Callable[[int], NDArray[np.float64]]:
    """The stream for rounding the chunk that begins with `first_block`; each call gives the next n numbers in [0, 1).

    Apart from every `block_uniforms`: the top bit of the counter is set.
    """
    stream = np.random.Philox(key=seed, counter=1 << 255 | first_block << 64)
    return lambda count: _to_unit(stream.random_raw(count))


def _uniforms_of_block(seed: int, block: int, count: int) -> NDArray[np.float64]:
    # The block number sits above the low 64 counter bits, which no block can exhaust.
    stream = np.random.Philox(key=seed, counter=block << 64)
    return _to_unit(stream.random_raw(count))


def _to_unit(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (raw >> np.uint64(11)) * np.float64(2.0**-53)
