"""How commands that write a cache say what they wrote, and lines that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import counted, out, plain_table, print_json

if TYPE_CHECKING:
    from logitcache.algebra import Result
    from logitcache.store import Ancestor


def print_result(result: Result, as_json: bool) -> None:
    """One line of facts about the new cache, and what was met on the way."""
    from logitcache.store import open_cache

    cache = open_cache(result.root, partial=True)
    facts: dict[str, Any] = {
        "cache": str(result.root),
        "complete": result.manifest is not None,
        "select": str(cache.selection),
        "blocks": cache.num_blocks,
        "tokens": result.tokens,
        "bytes": cache.num_bytes,
        "bytes_per_token": cache.num_bytes / result.tokens if result.tokens else None,
        "fingerprint": None if result.manifest is None else result.manifest.fingerprint,
        "computed_tokens": result.computed_tokens,
        "seconds": result.seconds,
        **result.notes,
    }
    if as_json:
        print_json(facts)
        return
    names = ("cache", "select", "blocks", "tokens", "size", "B/token")
    table = plain_table(names, left=names[:2], fold=True)
    size, rate = f"{facts['bytes'] / 1e6:,.2f} MB", facts["bytes_per_token"]
    numbers = (f"{cache.num_blocks:,}", f"{result.tokens:,}", size, "" if rate is None else f"{rate:.1f}")
    table.add_row(facts["cache"], facts["select"], *numbers, style="bold")
    out.print(table)
    print_speed(result.computed_tokens, result.seconds, "write", "written")


def print_speed(tokens: int, seconds: float, verb: str, done: str, more: str = "") -> None:
    """How fast a run wrote its tokens, or that there were none."""
    if tokens:
        rate = tokens / max(seconds, 1e-9)
        out.print(f"{tokens:,} tokens {done} in {seconds:,.1f} s, {rate:,.0f} tokens/s{more}")
    else:
        out.print(f"Nothing was left to {verb}.")


def ancestry_line(step: Ancestor) -> str:
    """A step in one line: `derive from=top-k:64 select=top-k:12 of 0123456789ab`."""
    arguments = " ".join(f"{name}={_short(value)}" for name, value in sorted(step.arguments.items()))
    parents = ", ".join(parent[:12] for parent in step.parents)
    return " ".join(part for part in (step.operation, arguments, "of", parents) if part)


def left_out_line(rows: int) -> str:
    """What `--nonfinite mask` left out."""
    return f"Left out, as the teacher's logits are NaN or infinite there: {counted(rows, 'row')}"


def _short(value: Any) -> str:
    text = ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
