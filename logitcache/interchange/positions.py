"""The `parquet` target: one row a position, so that a viewer shows it and SQL can ask it; nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitcache.interchange.folder import list_array
from logitcache.interchange.rows import RealRows

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Positions:
    """One row a position; of a cache with a mask, with a column that says whether it counts."""

    masked: bool = False

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        mask = [pa.field("counted", pa.bool_(), nullable=False)] if self.masked else []
        return pa.schema(
            [
                pa.field("block", pa.int64(), nullable=False),
                pa.field("position", pa.int32(), nullable=False),
                pa.field("token", pa.int64(), nullable=False),
                pa.field("next_token", pa.int64()),
                *mask,
                pa.field("ids", pa.list_(pa.int64()), nullable=False),
                pa.field("weights", pa.list_(pa.float32()), nullable=False),
                pa.field("tail_mass", pa.float32(), nullable=False),
                pa.field("label_logprob", pa.float32()),
                pa.field("entropy", pa.float32()),
                pa.field("threshold", pa.float32(), nullable=False),
            ]
        )

    def table(self, rows: RealRows) -> pa.Table:
        import pyarrow as pa

        targets = rows.targets
        columns = {
            "block": rows.block,
            "position": rows.position.astype(np.int32),
            "token": rows.tokens,
            "next_token": pa.array(rows.labels, mask=rows.labels < 0),
            **({"counted": rows.counted} if self.masked else {}),
            "ids": list_array(targets.ids, targets.offsets),
            "weights": list_array(targets.weights, targets.offsets),
            "tail_mass": targets.tail_mass,
            "label_logprob": _nullable(targets.label_logprob),
            "entropy": _nullable(targets.entropy),
            "threshold": targets.threshold,
        }
        return pa.table(columns)

    def columns(self) -> dict[str, str]:
        return {
            "block": "number of the block",
            "position": "place in the block, from 0",
            "token": "the token at this place",
            "next_token": "the token after it; null where the block or the corpus ends, or it is not one to learn",
            **(
                {"counted": "whether the token after it is one to learn; nothing is stored elsewhere"}
                if self.masked
                else {}
            ),
            "ids": "token ids kept of the teacher's distribution of the next token, ascending",
            "weights": "their probabilities; of a sampled selection: unbiased weights",
            "tail_mass": "probability of all other ids; 0 for sampled selections",
            "label_logprob": "teacher's log-probability of next_token, nats; null where unknown",
            "entropy": "of the teacher's full distribution, nats; null where unknown",
            "threshold": "weights above it are exact probabilities (0: all, infinity: none)",
        }

    def side_files(self) -> dict[str, str]:
        return {}

    def notes(self) -> str:
        return "A row is one position: the teacher's distribution of the next token, given its block up to `token`."


def _nullable(values: NDArray[np.float32]) -> Any:
    import pyarrow as pa

    return pa.array(values, mask=np.isnan(values))
