"""The `distillkit` target: a row a block, in the schema of DistillKit's captures, and its compression_config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import yaml
from numpy.typing import NDArray

from logitcache.errors import InterchangeError, UsageError
from logitcache.interchange.distillkit import DistillKitLayout
from logitcache.interchange.folder import list_array
from logitcache.interchange.layouts import CONFIG_NAME
from logitcache.interchange.ranked import ranked_entries, refuse_unbiased
from logitcache.interchange.rows import RealRows
from logitcache.store import Cache

if TYPE_CHECKING:
    import pyarrow as pa

EXACT, TERMS = 16, (0, 1, 2, 3, 4, "sqrt")


def default_layout(vocab_size: int, k: int) -> DistillKitLayout:
    """DistillKit's recommended configuration at the cache's own k; rows too short for its polynomial are all exact."""
    recommended = DistillKitLayout.recommended(max(vocab_size, 128))
    exact = EXACT if k - EXACT >= len(TERMS) else k
    changes = {"d": vocab_size, "k": k, "exact_k": exact, "polynomial_terms": TERMS if exact < k else None}
    return DistillKitLayout(**{**recommended.model_dump(), **changes})


@dataclass(frozen=True)
class DistillKitRows:
    """Writes blocks as DistillKit's capture script does: input_ids, compressed_logprobs, bytepacked_indices."""

    layout: DistillKitLayout

    @classmethod
    def for_cache(cls, cache: Cache, layout: DistillKitLayout | None) -> DistillKitRows:
        """Raises InterchangeError when rows of this cache have no such form."""
        selection = cache.manifest.identity.selection
        refuse_unbiased(cache, "DistillKit")
        if selection.method != "top-k":
            raise InterchangeError(
                f"{cache.location} keeps rows of different lengths ({selection.method}), but DistillKit stores the "
                "same k ids at every position; export --to parquet or --to trl, or dump with --select top-k:K"
            )
        if cache.masked:
            raise InterchangeError(
                f"{cache.location} keeps rows of completions only, but DistillKit stores the same k ids at every "
                "position; export --to parquet or --to trl, which carry the mask"
            )
        layout = layout or default_layout(cache.vocab_size, selection.size)
        if layout.k > selection.size:
            raise UsageError(f"the layout keeps {layout.k} ids, {cache.location} only {selection.size}; lower k")
        if layout.d < cache.vocab_size:
            raise UsageError(f"the layout's d is {layout.d}, {cache.location} has {cache.vocab_size} ids; raise d")
        return cls(layout)

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        bytes_of_position = pa.list_(pa.list_(pa.uint8()))
        fields = {
            "input_ids": pa.list_(pa.uint64()),
            "compressed_logprobs": bytes_of_position,
            "bytepacked_indices": bytes_of_position,
        }
        return pa.schema(list(fields.items()))

    def table(self, rows: RealRows) -> pa.Table:
        import pyarrow as pa

        ids, logprobs = ranked_entries(rows.targets, self.layout.k)

        def bytes_column(data: NDArray[np.uint8]) -> pa.ListArray:
            inner = list_array(data.reshape(-1), np.arange(len(data) + 1) * data.shape[1])
            return list_array(inner, rows.starts)

        return pa.table(
            {
                "input_ids": list_array(rows.tokens.astype(np.uint64), rows.starts),
                "compressed_logprobs": bytes_column(self.layout.encode_logprobs(logprobs)),
                "bytepacked_indices": bytes_column(self.layout.encode_ids(ids)),
            }
        )

    def columns(self) -> dict[str, str]:
        return {
            "input_ids": "tokens of the block",
            "compressed_logprobs": f"for each of them {self.layout.logprob_bytes} bytes of log-probabilities",
            "bytepacked_indices": f"for each of them {self.layout.k} ids of {self.layout.id_bits} bits",
        }

    def side_files(self) -> dict[str, str]:
        return {CONFIG_NAME: yaml.safe_dump(self.layout.model_dump(mode="json"))}

    def notes(self) -> str:
        return (
            f"Train on it with DistillKit: `teacher.kind: dataset`, `teacher.logprob_compressor` as in {CONFIG_NAME}, "
            "`dataset.prepacked: true`. The last row may be shorter than the others."
        )
