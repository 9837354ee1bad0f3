"""The storage benchmark as a picture: bytes a token against the error of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from logitcache.bench.storage import Measurement

COLOURS = {"sample": "#1f77b4", "varopt": "#2ca02c", "top-k": "#ff7f0e", "top-p": "#d62728"}
OURS = "small, zarr"
MARKERS = {
    OURS: "o",
    "int32 + fp16": "s",
    "17 + 7 bits": "^",
    "Parquet zstd": "v",
    "DistillKit budget": "D",
    "DistillKit recommended": "P",
}


def draw_storage(measurements: Sequence[Measurement], path: Path) -> None:
    """Write a PNG: one point for every selection in our smallest form and in each peer's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for line in measurements:
        if line.layout not in MARKERS:
            continue
        ours = line.layout == OURS
        colour = COLOURS[line.selection.partition(":")[0]]
        axes.scatter(
            line.entry_bytes,
            line.gradient.relative_variance**0.5,
            marker=MARKERS[line.layout],
            s=70 if ours else 28,
            color=colour,
            alpha=1.0 if ours else 0.45,
            zorder=3 if ours else 2,
        )
        if ours:
            place = (line.entry_bytes, line.gradient.relative_variance**0.5)
            axes.annotate(line.selection, place, xytext=(7, 5), textcoords="offset points", fontsize=8)
    for layout, marker in MARKERS.items():
        axes.scatter([], [], marker=marker, color="grey", label="logitcache small" if layout == OURS else layout)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes a token for ids, weights and tables",
        ylabel="relative error of the LM head's gradient\n(against full distillation, one batch)",
        title="What a stored distribution costs, and what it is worth",
    )
    for axis, ticks in (
        (axes.xaxis, (10, 20, 50, 100, 200, 500, 1000)),
        (axes.yaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
    ):
        low, high = axis.get_view_interval()
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
