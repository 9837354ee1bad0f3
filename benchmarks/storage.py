"""`logitcache bench storage` on the demo's teacher and text, with the targets beside it.

    python -m benchmarks.storage [--tokens 204800] [--folder DIR] [--save]

The table's times are processor seconds of one core, the best of five runs; the gradient is that of 1,024 positions.
DistillKit's layouts are fitted here in float64; its own encoder, in float32, leaves larger errors.
"""

from __future__ import annotations

from benchmarks import report
from benchmarks.bounds import bounds
from logitcache.bench import COLUMNS, NOTE, Measurement, StorageOptions, cells, draw_storage, measure_storage
from logitcache.demo import plays, teacher_folder
from logitcache.store import open_cache

BOUNDED, PILOTS = ("sample:25", "varopt:12", "top-k:50"), (16_384, 131_072)

# Selection, stored as, what is measured, target, aim.
TARGETS = (
    ("sample:25", "small, zarr", "entry_bytes", 16.0, 12.0),
    ("varopt:12", "small, zarr", "entry_bytes", 17.0, 13.0),
    ("top-k:50", "small, zarr", "entry_bytes", 84.0, 65.0),
    ("top-k:50", "small, zarr", "divergence", 1e-4, None),
    ("sample:25", "small, zarr", "side_bytes", 3.5, 3.0),
    ("top-k:50", "small, zarr", "side_bytes", 3.5, 3.0),
    ("sample:25", "fast, zarr", "decode_rate", 8.0, None),
    ("sample:25", "small, zarr", "decode_rate", 1.0, None),
    ("top-k:64", "fast, zarr", "decode_rate", 1.5, None),
    ("sample:25", "small, zarr", "encode_rate", 0.5, None),
)


def verdicts(lines: list[Measurement]) -> list[list[str]]:
    """Each target with what was measured."""
    found = {(line.selection, line.layout): line for line in lines}
    rows = []
    for selection, layout, what, target, aim in TARGETS:
        value = getattr(found[selection, layout], what)
        met = value >= target if what.endswith("rate") else value <= target
        rows.append([selection, layout, what, f"{value:.3g}", f"{target:g}", "-" if aim is None else f"{aim:g}",
                     "yes" if met else "NO"])  # fmt: skip
    return rows


def _bounds_row(options: StorageOptions, spec: str, pilot: int) -> list[str]:
    assert options.folder is not None
    found = bounds(
        open_cache(options.folder / spec.replace(":", "-") / "small-zarr"), min(pilot, options.max_tokens // 2)
    )
    return [spec, f"{found.pilot:,}", f"{found.unigram:.2f}", f"{found.bigram:.2f}", f"{found.stored:.2f}"]


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=204_800)
    report.add_folder(arguments)
    given = arguments.parse_args()
    with report.kept_or_scratch(given.folder) as folder:
        options = StorageOptions(
            teacher=str(teacher_folder(print)),
            corpus=tuple(str(path) for path in plays(print).values()),
            dtype="bfloat16",
            max_tokens=given.tokens,
            folder=folder,
        )
        lines = measure_storage(options)
        entropy = [_bounds_row(options, spec, pilot) for spec in BOUNDED for pilot in PILOTS]
    body = "\n\n".join(
        [
            f"SmolLM2-135M in bfloat16, {given.tokens:,} tokens of Shakespeare in blocks of 512. Bytes are per token. "
            + NOTE.replace("\n", " "),
            report.table(("select", "stored as", "measured", "value", "target", "aim", "met"), verdicts(lines)),
            "Entropy bounds of the ids alone, bytes a token, without tables (benchmarks/bounds.py):",
            report.table(("select", "pilot rows", "unigram", "bigram", "stored by `small`"), entropy),
            report.table(COLUMNS, [[line.selection, *cells(line)] for line in lines]),
        ]
    )
    report.publish("storage", "python -m benchmarks.storage", body, given.save)
    if given.save:
        draw_storage(lines, report.RESULTS / f"storage_{report.hardware()}.png")


if __name__ == "__main__":
    main()
