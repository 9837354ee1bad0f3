"""What `logitcache plan` says of a dump, beside the dump itself: bytes and time.

    python -m benchmarks.plan [--sample-tokens 4096] [--tokens 40960] [--rounds 1] [--save]

SmolLM2-135M on Shakespeare. One dump writes all selections; its time is the wall clock's, loading and tokenising
included. Caches of the codec `fast` are derived from it: the same rows, laid out anew. Plan and dump take turns, so
that a busy machine disturbs both; the ratio of times is the median over rounds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import report
from logitcache.algebra import Derivation, derive_cache
from logitcache.demo import plays, teacher_folder
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.planning import DumpPlan, PlanOptions, make_plan
from logitcache.selection import Selection
from logitcache.store import open_cache

SELECTIONS = ("sample:25", "varopt:12", "top-k:50")
SIZE_TOLERANCE, TIME_TOLERANCE = 0.05, 0.25


def dump_options(folder: Path, tokens: int, dtype: str) -> DumpOptions:
    return DumpOptions(
        teacher=str(teacher_folder(print)),
        corpus=tuple(str(path) for path in plays(print).values()),
        outputs=tuple(Output(Selection.parse(spec), folder / spec.replace(":", "-")) for spec in SELECTIONS),
        dtype=dtype,
        block_length=512,
        max_tokens=tokens,
    )


def dumped_bytes(options: DumpOptions) -> dict[tuple[str, str], int]:
    """Of the caches of a dump, and of what they are in the codec `fast`, by selection and codec."""
    sizes = {}
    for output in options.outputs:
        fast = output.root.with_name(f"{output.root.name}-fast")
        derive_cache(output.root, fast, Derivation(codec="fast"))
        sizes[str(output.selection), "small"] = open_cache(output.root).num_bytes
        sizes[str(output.selection), "fast"] = open_cache(fast).num_bytes
    return sizes


def one_round(tokens: int, sample_tokens: int, dtype: str) -> tuple[DumpPlan, float, float, dict[tuple[str, str], int]]:
    """The plan, the seconds that making it took, those of the dump, and the bytes that came of it."""
    with tempfile.TemporaryDirectory() as folder:
        options = dump_options(Path(folder), tokens, dtype)
        started = time.perf_counter()
        plan = make_plan(PlanOptions(options, together=True, sample_tokens=sample_tokens))
        planning = time.perf_counter() - started
        started = time.perf_counter()
        run_dump(options)
        seconds = time.perf_counter() - started
        return plan, planning, seconds, dumped_bytes(options)


def met(ratio: float, tolerance: float) -> str:
    return f"{tolerance:.0%}: {'yes' if abs(ratio - 1) <= tolerance else 'NO'}"


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=40_960)
    arguments.add_argument("--sample-tokens", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--dtype", default="bfloat16")
    given = arguments.parse_args()
    rounds = [one_round(given.tokens, given.sample_tokens, given.dtype) for _ in range(given.rounds)]
    plan, _, _, sizes = rounds[0]
    ratios = [plan.caches[0].hours * 3600 / seconds for plan, _, seconds, _ in rounds]
    times = [
        [f"{plan.caches[0].hours * 3600:.0f}", f"{seconds:.0f}", f"{ratio:.3f}", f"{planning:.0f}"]
        for (plan, planning, seconds, _), ratio in zip(rounds, ratios, strict=True)
    ]
    rows = []
    for cache in plan.caches:
        real = sizes[cache.select, cache.codec]
        ratio = cache.bytes / real
        rows.append(
            [cache.select, cache.codec, f"{cache.bytes:,}", f"{cache.bytes_uncertainty:.1%}", f"{real:,}",
             f"{ratio - 1:+.1%}", met(ratio, SIZE_TOLERANCE)]
        )  # fmt: skip
    parts = [
        f"SmolLM2-135M in {given.dtype}, blocks of 512: {given.sample_tokens:,} tokens tried, {given.tokens:,} dumped, "
        f"all selections from one forward pass.",
        report.table(("select", "codec", "planned bytes", "±", "dumped bytes", "off", "target, met"), rows),
        f"Time of the dump, loading and tokenising included; median ratio {statistics.median(ratios):.3f}, target "
        f"{met(statistics.median(ratios), TIME_TOLERANCE)}.",
        report.table(("planned s", "dumped s", "ratio", "planning took s"), times),
    ]
    report.publish("plan", "python -m benchmarks.plan", "\n\n".join(parts), given.save)


if __name__ == "__main__":
    main()
