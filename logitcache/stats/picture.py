"""Statistics of a cache as pictures: one overview, or one file for each panel."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from logitcache.errors import UsageError, counted
from logitcache.stats.measure import CacheStats
from logitcache.store.layout import refuse_inside_cache

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#1f77b4", "#ff7f0e", "#2ca02c", "#7f7f7f"
BINS, MOST_BARS = 60, 100
# Legends stand above what is drawn.
HEADROOM = 1.25
NO_ROWS = "no token is followed by one to learn"
NO_IDS, NO_COLUMNS = "no row has ids", "neither entropy nor label_logprob is stored"
NOT_EXACT = "draws stand for the whole distribution, no weight is exact"
Panel = Callable[["Axes", CacheStats], None]


def check_picture(path: Path) -> None:
    """Raise UsageError or CacheError where no picture can be written: in a cache, at a URL, over a file.

    `path` is what `draw_stats` is given.
    """
    refuse_inside_cache(path, or_one=True)
    picture = path.suffix.lower() == ".png"
    if picture == path.is_dir() and path.exists():
        raise UsageError(f"--out {path} is a {'folder' if picture else 'file'}; give a name.png, or a folder")


def left_out_panels(stats: CacheStats) -> dict[str, str]:
    """Names of the panels that have nothing to show, and why."""
    columns, places = stats.columns, stats.places
    if not stats.rows:
        return dict.fromkeys((name for name in PANELS if name != "bytes"), NO_ROWS)
    reasons = {}
    if stats.kept_mass is None:
        reasons["kept_mass"] = NOT_EXACT if stats.keeps_ids else NO_IDS
    if not (columns.entropy.count or columns.surprise.count):
        reasons["entropy"] = NO_COLUMNS
    if not columns.ids.count:
        reasons["ids"] = NO_IDS
    if all(value is None for place in places for value in (place.entropy, place.cross_entropy, place.kept_mass)):
        reasons["positions"] = NO_COLUMNS
    if not stats.top_ids:
        reasons["used_ids"] = NO_IDS
    return reasons


def draw_stats(stats: CacheStats, path: Path) -> list[Path]:
    """Write PNGs: all panels in one picture where `path` ends in .png, else one file for each in the folder `path`.

    Those of `left_out_panels` are not drawn, and a file of such a name in the folder, of another cache, is removed.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib.figure import Figure

    title = f"{stats.selection}, {stats.tokens:,} tokens"
    if stats.tokens < stats.cache_tokens:
        title += f" of {stats.cache_tokens:,}"
    if stats.rows < stats.tokens:
        title += f", {stats.rows:,} of them count"
    left_out = left_out_panels(stats)
    panels = {name: panel for name, panel in PANELS.items() if name not in left_out}
    if path.suffix.lower() == ".png":
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(layout="constrained")
        figure.suptitle(title, fontsize=13)
        for axes, panel in zip(_grid(figure, len(panels)), panels.values(), strict=True):
            _draw(axes, panel, stats)
        figure.savefig(path, dpi=120)
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    for name in left_out:
        (path / f"{name}.png").unlink(missing_ok=True)
    written = []
    for name, panel in panels.items():
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        figure.suptitle(title, fontsize=10, color=GREY)
        _draw(figure.add_subplot(), panel, stats)
        written.append(path / f"{name}.png")
        figure.savefig(written[-1], dpi=130)
    return written


def _grid(figure: Figure, panels: int) -> list[Axes]:
    """Axes for up to six panels, which fill the figure: a row of up to three, or two rows."""
    rows = [panels] if panels <= 3 else [-(-panels // 2), panels // 2]
    figure.set_size_inches(14 * rows[0] / 3, 3.9 * len(rows))
    columns = math.lcm(*rows)
    grid = figure.add_gridspec(len(rows), columns)
    spans = [(row, columns // count, place) for row, count in enumerate(rows) for place in range(count)]
    return [figure.add_subplot(grid[row, place * width : (place + 1) * width]) for row, width, place in spans]


def _draw(axes: Axes, panel: Panel, stats: CacheStats) -> None:
    axes.set_axisbelow(True)
    panel(axes, stats)


def _kept_mass(axes: Axes, stats: CacheStats) -> None:
    axes.set_title("probability mass kept exactly")
    assert stats.kept_mass is not None, "left_out_panels comes first"
    counts = stats.columns.kept.counts
    share = np.cumsum(counts) / counts.sum()
    seen = np.flatnonzero(counts)
    axes.step([0, *(seen * stats.columns.kept.step), 1], [0, *share[seen], 1], where="post", color=BLUE, linewidth=1.6)
    _mean_line(axes, stats.kept_mass.mean, 3)
    axes.set(xlabel="mass kept of a row", ylabel="share of rows that keep at most so much", xlim=(0, 1))
    axes.set(ylim=(0, HEADROOM), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.legend(loc="upper right", frameon=False)
    axes.grid(alpha=0.3)


def _entropy(axes: Axes, stats: CacheStats) -> None:
    axes.set_title("how sure the teacher was")
    columns = {"entropy of the row": stats.columns.entropy, "surprise at the next token": stats.columns.surprise}
    known = {label: tally for label, tally in columns.items() if tally.count}
    # Equal stretches for both; the rarest 0.1 % would only make the rest narrow.
    step = stats.columns.entropy.step
    used = max(round(tally.quantile(0.999) / step) for tally in known.values()) + 1
    per_bin = -(-used // BINS)
    bins = -(-used // per_bin)
    edges = (np.arange(bins + 1) * per_bin - 0.5) * step
    for (label, tally), colour in zip(known.items(), (BLUE, ORANGE), strict=False):
        shares = tally.shares(per_bin, bins)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.3)
        axes.stairs(shares, edges, color=colour, linewidth=1.2, label=f"{label}, mean {tally.mean:.2f}")
    axes.set(xlabel="nats", ylabel="share of rows", xlim=(0, edges[-1]))
    axes.set_ylim(0, HEADROOM * axes.get_ylim()[1])
    axes.legend(loc="upper right", frameon=False)
    axes.grid(alpha=0.3)


def _ids(axes: Axes, stats: CacheStats) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title("ids of a row")
    tally = stats.columns.ids
    lengths = np.flatnonzero(tally.counts)
    per_bin = max(1, -(-int(lengths[-1]) // MOST_BARS))
    bins = int(lengths[-1]) // per_bin + 1
    shares = tally.shares(per_bin, bins)
    axes.bar((np.arange(bins) + 0.5) * per_bin - 0.5, shares, width=0.8 * per_bin, color=BLUE)
    _mean_line(axes, tally.mean, 1)
    low, high = int(lengths[0]), int(lengths[-1])
    margin = max(2, 0.05 * (high - low))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="ids kept", ylabel="share of rows", xlim=(max(-0.5, low - margin), high + margin))
    axes.set_ylim(0, HEADROOM * float(shares.max()))
    axes.legend(loc="upper right", frameon=False)
    axes.grid(alpha=0.3, axis="y")


def _positions(axes: Axes, stats: CacheStats) -> None:
    axes.set_title("along the block")
    middles = [1 + (place.first + place.stop - 1) / 2 for place in stats.places]
    lines = [("entropy", "entropy", BLUE), ("cross_entropy", "cross entropy", ORANGE)]
    for name, label, colour in lines:
        _line(axes, middles, [getattr(place, name) for place in stats.places], label, colour)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="position in the block, from 1", ylabel="nats a token")
    axes.set_ylim(0, HEADROOM * max(axes.get_ylim()[1], 1e-3))
    axes.grid(alpha=0.3)
    if stats.kept_mass is not None:
        other = axes.twinx()
        _line(other, middles, [place.kept_mass for place in stats.places], "mass kept", GREEN)
        other.set(ylabel="mean mass kept", ylim=(0, HEADROOM), yticks=[0, 0.25, 0.5, 0.75, 1])
        axes.plot([], [], color=GREEN, label="mass kept (right)", marker="o", markersize=3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper center", ncols=3, fontsize=8.5, columnspacing=1.2, handlelength=1.5)


def _bytes(axes: Axes, stats: CacheStats) -> None:
    axes.set_title("bytes a token by array")
    names = list(stats.array_bytes)
    sizes = [count / stats.shard_tokens for count in stats.array_bytes.values()]
    bars = axes.barh(names, sizes, color=BLUE)
    axes.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel=f"compressed bytes a token ({sum(sizes):.2f} together)", xlim=(0, 1.15 * max(sizes)))
    axes.grid(alpha=0.3, axis="x")


def _used_ids(axes: Axes, stats: CacheStats) -> None:
    axes.set_title("the ids that most rows keep")
    names = [str(used.id) if used.token is None else _shown(used.token) for used in stats.top_ids]
    places = np.arange(len(names))
    axes.barh(places - 0.2, [used.row_share for used in stats.top_ids], height=0.4, color=BLUE, label="share of rows")
    axes.barh(places + 0.2, [used.mean_weight for used in stats.top_ids], height=0.4, color=ORANGE, label="mean weight")
    # Without ticks, and spaced evenly, a comma is told from a full stop.
    axes.set_yticks(places, names, fontsize=8.5, family="monospace", va="center_baseline")
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set(xlabel=f"over all rows; {counted(stats.distinct_ids, 'id is', 'ids are')} kept by some row")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3, axis="x")


PANELS: dict[str, Panel] = {
    "kept_mass": _kept_mass,
    "entropy": _entropy,
    "ids": _ids,
    "positions": _positions,
    "bytes": _bytes,
    "used_ids": _used_ids,
}


def _line(axes: Axes, middles: list[float], values: list[float | None], label: str, colour: str) -> None:
    known = [(middle, value) for middle, value in zip(middles, values, strict=True) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, label=label, marker="o", markersize=3, linewidth=1.4)


def _mean_line(axes: Axes, mean: float, digits: int) -> None:
    """Ends below the legend, which would hide it and which it would strike through."""
    axes.axvline(mean, ymax=1 / HEADROOM, color=ORANGE, linestyle="--", label=f"mean {mean:.{digits}f}")


def _shown(token: str) -> str:
    """A token as a label, quoted; characters that fonts may lack, or that matplotlib reads as markup, are escaped."""
    shown = ascii(token).replace("$", "\\$")
    return shown if len(shown) <= 18 else f"{shown[:16]}…'"
