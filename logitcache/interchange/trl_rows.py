"""The `trl` target: a row a block, as TRL's SFTTrainer takes pre-tokenised text, with the teacher's top-k beside it.

No trainer of TRL reads stored teacher log-probabilities (seen in version 1.16): GKD, GOLD and the distillation trainers
run the teacher, or ask a server. The columns are those of such a server's answer
(`VLLMClient.get_sequence_logprobs` with a prompt of one token), so that an answer can be replayed from the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitcache.interchange.folder import list_array
from logitcache.interchange.ranked import padded_entries, refuse_unbiased
from logitcache.interchange.rows import RealRows
from logitcache.store import Cache

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TrlRows:
    """Writes blocks with `k` ids at each position; shorter rows are filled with id 0 at -inf, as TRL does."""

    k: int

    @classmethod
    def for_cache(cls, cache: Cache) -> TrlRows:
        """Raises InterchangeError for sampled caches."""
        refuse_unbiased(cache, "TRL")
        return cls(cache.manifest.identity.selection.size)

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        nested = pa.list_(pa.list_(pa.float32()))
        fields = {
            "input_ids": pa.list_(pa.int64()),
            "completion_mask": pa.list_(pa.int8()),
            "logprob_token_ids": pa.list_(pa.list_(pa.int64())),
            "logprobs": nested,
            "actual_logprobs": nested,
        }
        return pa.schema(list(fields.items()))

    def table(self, rows: RealRows) -> pa.Table:
        import pyarrow as pa

        ids, logprobs = padded_entries(rows.targets, self.k)
        # TRL counts from the predicted token: item j is about token j + 1, so a block's last row has no place.
        kept = np.ones(len(rows), dtype=bool)
        kept[rows.starts[1:] - 1] = False
        row_starts = rows.starts - np.arange(len(rows.starts))

        def column(values: NDArray[Any]) -> pa.ListArray:
            data = values[kept]
            return list_array(list_array(data.reshape(-1), np.arange(len(data) + 1) * data.shape[1]), row_starts)

        # A token is to be learnt if the position before it counts.
        counted = np.ones(len(rows), dtype=np.int8) if rows.counted is None else rows.counted.astype(np.int8)
        mask = np.append(0, counted[:-1])
        mask[rows.starts[:-1]] = 0
        return pa.table(
            {
                "input_ids": list_array(rows.tokens, rows.starts),
                "completion_mask": list_array(mask, rows.starts),
                "logprob_token_ids": column(ids),
                "logprobs": column(logprobs.astype(np.float32)),
                "actual_logprobs": column(rows.targets.label_logprob[:, None]),
            }
        )

    def columns(self) -> dict[str, str]:
        return {
            "input_ids": "tokens of the block",
            "completion_mask": "1 for tokens to learn; 0 for the first, which nothing predicts, and those of prompts",
            "logprob_token_ids": f"for each token but the first: {self.k} ids by falling probability",
            "logprobs": "their log-probabilities, nats; unused places, all of a prompt's, are -inf with id 0",
            "actual_logprobs": "for each token but the first: its own log-probability; NaN where unknown",
        }

    def side_files(self) -> dict[str, str]:
        return {}

    def notes(self) -> str:
        return (
            "TRL's SFTTrainer trains on `input_ids` and `completion_mask`. No trainer of TRL reads the teacher's "
            "columns from a dataset: they are for a subclass that does, or for a stand-in of the teacher server."
        )
