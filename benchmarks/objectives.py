"""How far the gradients of a forward KL are from full distillation's, by what stands for the teacher's tail.

    python -m benchmarks.objectives [--samples 16] [--save]

SmolLM2 on Hamlet; the student is its hidden states plus noise, at three distances. Angle in degrees between the head's
gradient over 1,024 tokens and that of full knowledge distillation, and the squared error relative to its square. Of
samples, once from one of them and once from the mean over many: the noise that a batch as many times as large leaves.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import report
from logitcache.bench.yardstick import GradientError, Yardstick
from logitcache.demo import plays, teacher_folder
from logitcache.losses import Objective
from logitcache.selection import Selection
from logitcache.teachers import TransformersTeacher

DISTANCES = (0.9, 0.45, 0.2)
BLOCKS, LENGTH = 2, 512
SELECTION = "varopt:12"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
TAILS = ("bucket", "renormalised", "teacher_renormalised")


def cell(error: GradientError) -> str:
    return f"{error.angle:.1f} / {error.relative_variance:.3f}"


def measure(yardstick: Yardstick, samples: int) -> dict[str, str]:
    """Angle / relative error of each way to store 12 ids and to use them."""
    sampled = Selection.parse(SELECTION)
    drawn = [yardstick.select(sampled, seed) for seed in range(samples)]
    bucket = yardstick.gradient(drawn[0], Objective.forward_kl("bucket"))
    one = yardstick.gradient(drawn[0], Objective.forward_kl("unbiased"))
    mean = one / samples
    for targets in drawn[1:]:
        mean += yardstick.gradient(targets, Objective.forward_kl("unbiased")) / samples
    cells = {}
    for name, unbiased in (("one sample", one), (f"mean of {samples}", mean)):
        for share in SHARES:
            # The gradient of a blend is the blend of the gradients; the head, and so the bucket, is no sample.
            blended = (1 - share) * bucket + share * unbiased
            cells[f"{SELECTION}, blend {share:g}, {name}"] = cell(yardstick.compare(blended))
    top = yardstick.select(Selection.parse("top-k:12"))
    for tail in TAILS:
        cells[f"top-k:12, {tail}"] = cell(yardstick.compare(yardstick.gradient(top, Objective.forward_kl(tail))))
    return cells


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--samples", type=int, default=16)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    teacher = TransformersTeacher.load(str(teacher_folder(print)), None, "float32", "cpu", False)
    text = plays(print)["hamlet"].read_text(encoding="utf-8", errors="replace")[20_000:40_000]
    tokens = np.array(teacher.tokenizer(text)["input_ids"][: BLOCKS * LENGTH]).reshape(BLOCKS, LENGTH)
    columns = [measure(Yardstick(teacher, tokens, distance), given.samples) for distance in DISTANCES]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    header = ["12 ids a token", *(f"student at TV {distance}" for distance in DISTANCES)]
    body = (
        "SmolLM2-135M on 1,024 tokens of Hamlet. Angle in degrees / relative squared error of the head's gradient.\n\n"
    )
    body += report.table(header, rows)
    report.publish("objectives", "python -m benchmarks.objectives", body, given.save)


if __name__ == "__main__":
    main()
