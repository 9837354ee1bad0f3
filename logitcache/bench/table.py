"""The storage benchmark as a table."""

from __future__ import annotations

from logitcache.bench.storage import Measurement

COLUMNS = (
    "select", "stored as", "ids", "entries", "side", "all", "encode", "decode", "KL", "angle", "variance",
)  # fmt: skip
NOTE = """\
ids: stored a token; entries: bytes of ids, weights, lengths and tables; side: input tokens, label_logprob,
entropy, tail; all: every file; encode, decode: million tokens/s on one core; KL: of decoding, nats; angle
(degrees) and relative variance: the LM head's gradient against full distillation."""


def cells(line: Measurement) -> list[str]:
    """A measurement's columns but the first."""
    return [
        line.layout,
        f"{line.ids_per_token:.1f}",
        f"{line.entry_bytes:.2f}",
        "-" if line.side_bytes is None else f"{line.side_bytes:.2f}",
        f"{line.total_bytes:.2f}",
        f"{line.encode_rate:.2f}",
        f"{line.decode_rate:.2f}",
        f"{line.divergence:.1e}" if line.divergence > 1e-9 else "0",
        f"{line.gradient.angle:.1f}",
        f"{line.gradient.relative_variance:.4f}",
    ]
