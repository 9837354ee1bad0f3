"""What selecting costs a row, and how much variance each sampled selection leaves, on a real teacher's rows.

    python -m benchmarks.selection [--rounds 7] [--save]

Time: one thread, 64 rows at once (what a CPU capture hands over), softmax not counted; the best of interleaved
rounds. Variance: sum over the vocabulary of Var[weight], by the formulas of docs/selections.md, mean over rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import measure, report
from logitcache.demo import plays, teacher_folder
from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution
from logitcache.selection.select import select
from logitcache.targets import SparseTargets
from logitcache.teachers import TransformersTeacher

ROWS, SKIPPED, PIECE = 512, 8, 64
TIMED = ("top-k:12", "top-k:64", "sample:25", "sample:50", "sample:25:0.8", "varopt:12", "varopt:20", "varopt:64")
LARGE = ("top-k:1024", "sample:1024", "varopt:1024")
VARIED = ("sample:25", "sample:25:0.8", "sample:50", "sample:50:0.8", "varopt:12", "varopt:20", "varopt:50")


def real_logits() -> torch.Tensor:
    """float32 [n, V]: SmolLM2 on the beginning of Hamlet, without the first positions, which have no context."""
    teacher = TransformersTeacher.load(str(teacher_folder(print)), None, "float32", "cpu", False)
    text = plays(print)["hamlet"].read_text(encoding="utf-8", errors="replace")
    tokens = np.array([teacher.tokenizer(text[: ROWS * 12])["input_ids"][: ROWS + SKIPPED]])
    with torch.inference_mode():
        return teacher.logits(teacher.hidden(tokens)[SKIPPED:]).float()


def choose(spec: str, dist: Distribution) -> SparseTargets:
    selection, rows = Selection.parse(spec), len(dist.logits)
    return select(selection, dist, block_uniforms(0, [0], rows, selection.draws) if selection.draws else None)


def microseconds(specs: tuple[str, ...], dist: Distribution, rounds: int) -> dict[str, float]:
    """Least time of a row: what else the machine does can only add to it."""
    jobs = {spec: (lambda spec=spec: choose(spec, dist)) for spec in specs}
    seconds = measure.interleaved(jobs, rounds)  # type: ignore[arg-type]
    return {spec: min(times) / len(dist.logits) * 1e6 for spec, times in seconds.items()}


def total_variance(
    selection: Selection, probs_nV: NDArray[np.float64], tau_n: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [n]: sum over the vocabulary of the variance of a row's weights."""
    if selection.method == "varopt":
        return np.maximum(probs_nV * (tau_n[:, None] - probs_nV), 0).sum(1)
    proposal_nV = probs_nV ** (selection.exponent or 1.0)
    proposal_nV /= proposal_nV.sum(1, keepdims=True)
    return (probs_nV**2 * (1 / np.maximum(proposal_nV, 1e-300) - 1)).sum(1) / selection.size


def variance_with(probs_nV: NDArray[np.float64], distinct: float) -> NDArray[np.float64]:
    """float64 [n]: the same of as many draws with replacement as give `distinct` ids on average in each row."""
    low_n, high_n = np.ones(len(probs_nV)), np.full(len(probs_nV), 1e9)
    for _ in range(40):
        middle_n = np.sqrt(low_n * high_n)
        few_n = (1 - (1 - probs_nV) ** middle_n[:, None]).sum(1) < distinct
        low_n, high_n = np.where(few_n, middle_n, low_n), np.where(few_n, high_n, middle_n)
    return (probs_nV * (1 - probs_nV)).sum(1) / high_n


def variance_rows(dist: Distribution) -> list[list[str]]:
    probs_nV = dist.probs.double().numpy()
    probs_nV /= probs_nV.sum(1, keepdims=True)
    rows = []
    for spec in VARIED:
        targets, selection = choose(spec, dist), Selection.parse(spec)
        ids = len(targets.ids) / len(targets)
        variance_n = total_variance(selection, probs_nV, targets.threshold.astype(np.float64))
        cells = [spec, f"{ids:.1f}", "-", f"{variance_n.mean():.5f}", "-", "-"]
        if selection.method == "varopt":
            other_n = variance_with(probs_nV, selection.size)
            heads = (targets.weights > targets.threshold[targets.row_index()]).sum() / len(targets)
            cells[2], cells[4] = f"{heads:.1f}", f"{other_n.mean():.5f}"
            cells[5] = f"{(variance_n < other_n).sum()} of {len(targets)}"
        rows.append(cells)
    return rows


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    logits = real_logits()
    dist = Distribution.from_logits(logits[:PIECE].contiguous())
    times = microseconds(TIMED, dist, given.rounds) | microseconds(LARGE, dist, max(2, given.rounds // 2))
    speed = report.table(["select", "us a row"], [[spec, f"{time:.0f}"] for spec, time in times.items()])
    header = ["select", "ids", "of them exact", "sum of variances", "of draws with as many ids", "rows with less"]
    body = f"SmolLM2-135M on Hamlet, vocabulary {logits.shape[1]:,}. Best time, {PIECE} rows at once, one thread:"
    body += f"\n\n{speed}\n\nVariance, mean over {len(logits[::4])} rows:\n\n"
    body += report.table(header, variance_rows(Distribution.from_logits(logits[::4].contiguous())))
    report.publish("selection", "python -m benchmarks.selection", body, given.save)


if __name__ == "__main__":
    main()
