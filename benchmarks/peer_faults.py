"""Where other tools' distillation losses are wrong: their own code, and ours, on the same inputs.

    python -m benchmarks.peer_faults [--distillkit CHECKOUT] [--save]

Every figure is an error, so 0 is right. 'their code' runs the installed project (see benchmarks/peer_code.py for what
to install); 'formula' is ours, written from what the project publishes, and is what the tests hold.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks import report
from benchmarks.peer_cases import CASES, Case, Loss
from benchmarks.peer_code import Missing, peers

HEADER = ("peer", "what goes wrong", "when", "figure", "their code", "formula", "ours")
PACKAGES = ("torch", "liger-kernel", "trl", "axolotl", "torchtune", "nvidia-modelopt")
NOTES = """\
Ours is `distillation_loss` with the objective that answers the same question: the tail bucket, or `renormalised` at
T != 1, where the bucket is refused because no cache stores the tail at that temperature; beside torchtune's reverse KL
it is ours where this version has one, else the bucket. ModelOpt's Hugging Face trainer passes another reduction; the
default is what `LogitsDistillationLoss()` gives. By their sources (not run here), Liger's Triton JSD and TRL's chunked
divergence keep logits in float32 and are free of the half-precision faults."""


def row(case: Case, load: Callable[[], Loss]) -> tuple[list[str], str | None]:
    """One row of the table, and why the project's own code is not in it."""
    reason = None
    try:
        theirs = case.print(case.measure(load()))
    except Missing as missing:
        theirs, reason = "not run", str(missing)
    formula, ours = (case.print(case.measure(loss)) for loss in (case.formula, case.ours))
    return [case.peer, case.what, case.when, case.figure, theirs, formula, ours], reason


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--distillkit", type=Path, help="a checkout of DistillKit")
    given: argparse.Namespace = arguments.parse_args()
    warnings.simplefilter("ignore")
    loaders = peers(given.distillkit)
    rows, reasons = [], {}
    for case in CASES:
        cells, reason = row(case, loaders[case.name])
        rows.append(cells)
        if reason:
            reasons[case.peer] = reason
    body = report.table(HEADER, rows) + "\n\n" + NOTES
    if reasons:
        body += "\n\nNot run: " + "; ".join(f"{peer}: {reason}" for peer, reason in reasons.items()) + "."
    command = "python -m benchmarks.peer_faults" + (" --distillkit CHECKOUT" if given.distillkit else "")
    report.publish("peer_faults", command, body, given.save, packages=PACKAGES)


if __name__ == "__main__":
    main()
