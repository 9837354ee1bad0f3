"""DistillKit captures built from the written formulas alone: bit strings, `struct` and a loop a value."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

VOCABULARY = 300
# k = 5: two exact values, three approximated by a + b * i + c * sqrt(i), two of those corrected by 3-bit residuals.
FIELDS: dict[str, Any] = {
    "d": VOCABULARY,
    "k": 5,
    "exact_k": 2,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 2}],
    "delta_encoding": False,
}
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
    ]
)


def bit_string(numbers: list[int], bits: int) -> bytes:
    """Numbers one after another, most significant bit first, zeros up to a whole byte."""
    text = "".join(f"{number:0{bits}b}" for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8))


def bfloat16(value: float) -> bytes:
    """The upper half of a float32, for values whose lower half is zero."""
    data = struct.pack("<f", value)
    assert data[:2] == b"\0\0", f"{value} is no bfloat16"
    return data[2:]


def position(number: int) -> tuple[list[int], list[float], bytes, bytes]:
    """Ids, log-probabilities, and the two byte strings of a position; every number is exact in its type."""
    ids = [(7 + 31 * number + 59 * slot) % VOCABULARY for slot in range(5)]
    head = [-0.5 - number % 4, -2.25 - number % 4]
    a, b, c = -5.0 - number % 4, -0.75, -0.25
    codes = [3 + number % 4, 6]
    scale = 0.125
    residual = [scale * (codes[0] - 4), scale * (codes[1] - 4), 0.0]
    tail = [a + b * place + c * math.sqrt(place) + residual[place] for place in range(3)]
    parts = [*map(bfloat16, head), struct.pack("<3f", a, b, c), struct.pack("<e", scale), bit_string(codes, 3)]
    packed = b"".join(parts)
    return ids, head + tail, packed, bit_string(ids, 9)


def sequence(number: int, length: int, spare: int = 0) -> dict[str, Any]:
    """A row of a capture with `length` positions and `spare` tokens more; some next tokens are among the ids."""
    made = [position(11 * number + place) for place in range(length)]
    tokens = [13 * number % VOCABULARY]
    for place in range(length + spare - 1):
        slot = (number + place) % 7
        tokens.append(made[place][0][slot] if slot < 5 else 290 + slot)
    return {
        "input_ids": tokens,
        "compressed_logprobs": [list(one[2]) for one in made],
        "bytepacked_indices": [list(one[3]) for one in made],
    }


def write_capture(folder: Path, sequences: list[dict[str, Any]], name: str = "data_0.parquet", **changes: Any) -> Path:
    """A folder as DistillKit's capture script leaves it; a change to None leaves a field of the configuration out."""
    folder.mkdir(exist_ok=True)
    fields = {key: value for key, value in {**FIELDS, **changes}.items() if value is not None}
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(fields))
    table = pa.Table.from_pylist(sequences, schema=SCHEMA)
    pq.write_table(table, folder / name, row_group_size=3, write_page_checksum=True)
    return folder
