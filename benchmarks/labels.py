"""Bytes of caches without ids, and of those whose corpus is prompts with completions, on the demo's teacher and text.

    python -m benchmarks.labels [--tokens 65536] [--folder DIR] [--save]

Plain text is Shakespeare's plays. The prompts and completions are made of them, half as many tokens: each speech
answers the one before.
`entropy` is what the column would add to a `label` cache, measured in the cache beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import report
from logitcache.demo import plays, teacher_folder
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.selection import Selection
from logitcache.store import Cache, open_cache

SPECS = ("label", "sample:25")
HEADER = ("corpus", "select", "counted", "tokens", "mask", "label_logprob", "entropy", "entries", "tables", "all files")
ENTRIES = ("ids", "counts", "lengths", "levels")
MOST = 3.0


def write_rollouts(path: Path) -> None:
    """Speeches of the plays, two by two: a prompt and its completion."""
    with path.open("w", encoding="utf-8") as out:
        for play in plays(print).values():
            speeches = [part for part in play.read_text(encoding="utf-8").split("\n\n") if part.strip()]
            for prompt, completion in zip(speeches[::2], speeches[1::2], strict=False):
                out.write(json.dumps({"prompt": prompt + "\n\n", "completion": completion}) + "\n")


def caches(folder: Path, tokens: int, name: str, corpus: list[str], **fields: str) -> list[Cache]:
    """One cache of each selection from one pass of the teacher; finished ones are found again."""
    outputs = tuple(Output(Selection.parse(spec), folder / name / spec.replace(":", "-")) for spec in SPECS)
    for output in outputs:
        output.root.parent.mkdir(parents=True, exist_ok=True)
    teacher = str(teacher_folder(print))
    run_dump(
        DumpOptions(teacher, tuple(corpus), outputs, dtype="bfloat16", block_length=512, max_tokens=tokens, **fields)  # type: ignore[arg-type]
    )
    return [open_cache(output.root) for output in outputs]


def row(name: str, cache: Cache) -> list[str]:
    """Bytes a token of each part of a cache."""
    stored, tokens = cache.stored_bytes(), cache.num_tokens
    parts = [
        stored["tokens"], stored.get("counted", 0), stored["label_logprob"], stored["entropy"],
        sum(stored.get(plane, 0) for plane in ENTRIES), cache.codebook_bytes, cache.num_bytes,
    ]  # fmt: skip
    numbers = [f"{count / tokens:.2f}" for count in parts]
    return [name, str(cache.selection), f"{cache.num_counted / tokens:.0%}", *numbers]


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=65_536)
    report.add_folder(arguments)
    given = arguments.parse_args()
    with report.kept_or_scratch(given.folder) as folder:
        rollouts = folder / "rollouts.jsonl"
        write_rollouts(rollouts)
        texts = [str(path) for path in plays(print).values()]
        plain = caches(folder, given.tokens, "text", texts)
        fields = {"prompt_field": "prompt", "completion_field": "completion"}
        masked = caches(folder, given.tokens // 2, "rollouts", [str(rollouts)], **fields)
        rows = [row("plays", cache) for cache in plain] + [row("prompts, completions", cache) for cache in masked]
        size = plain[0].num_bytes / plain[0].num_tokens
    body = (
        f"SmolLM2-135M in bfloat16, {given.tokens:,} tokens of Shakespeare, half as many of prompts and completions, "
        "in blocks of 512; bytes are per token.\n\n"
        + report.table(HEADER, rows)
        + f"\n\nA `label` cache takes {size:.2f} bytes a token with its tokens, tables and documents; at most {MOST:g} "
        f"are allowed: {'met' if size <= MOST else 'NOT MET'}. A label's log-probability is stored to 1/128 nat."
    )
    report.publish("labels", "python -m benchmarks.labels", body, given.save)


if __name__ == "__main__":
    main()
