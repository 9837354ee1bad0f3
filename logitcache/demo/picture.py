"""The demo's picture: held-out curves, and what each run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#7f8c8d", "#d98c3f", "#2a7f9e")


def draw_comparison(logs: dict[str, list[dict[str, Any]]], rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG: held-out cross entropy against steps on the left, final KL and calibration error on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, kl, ece = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
    for (title, log), colour in zip(logs.items(), COLOURS, strict=True):
        points = [(row["step"], row["eval_ce"]) for row in log if "eval_ce" in row]
        if points:
            curves.plot(*zip(*points, strict=True), "o-", color=colour, label=title, markersize=4)
    curves.set(xlabel="optimiser step", ylabel="nats per token", title="Held-out cross entropy")
    curves.grid(alpha=0.3)
    curves.legend(frameon=False)
    names = [row["run"].replace(", ", "\n").replace(" only", "\nonly") for row in rows]
    for axes, key, title in ((kl, "kl", "KL from the teacher (nats)"), (ece, "ece", "Calibration error")):
        bars = axes.bar(range(len(rows)), [row[key] for row in rows], color=COLOURS)
        axes.bar_label(bars, fmt="%.3f", fontsize=9)
        axes.set_xticks(range(len(rows)), names, fontsize=7)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
