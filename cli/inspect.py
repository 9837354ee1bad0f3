"""`logitcache inspect`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from logitcache.errors import LogitcacheError, UsageError

from .console import counted, debug_option, err, json_option, out, print_json
from .results import ancestry_line

if TYPE_CHECKING:
    from logitcache.store import Blocks, Cache

CONTEXT_TOKENS = 40
BAR_WIDTH, LEAST_WIDTH_FOR_BARS = 30, 80
# `=0.1234`; unbiased weights above 1 take as much.
WEIGHT_WIDTH = 7
EXAMPLE = """
\b
Example:
  logitcache inspect cache
  logitcache inspect cache --position 1500

Of shards it only looks whether their files are there, and warns where some are not; `verify` reads them.

Exit status: 0 done, 1 damaged or no cache, 2 wrong usage.
"""


@click.command(epilog=EXAMPLE, short_help="Show a cache's facts, or a position or block as text.")
@click.argument("cache", type=click.Path())
@click.option(
    "--position", type=int, metavar="N", help="Show the teacher's distribution after the N-th token (from 0)."
)
@click.option("--block", type=int, metavar="B", help="Show the text of a block and what the teacher made of it.")
@click.option("--tokenizer", metavar="DIR", help="The teacher's tokenizer, if it is no longer where the dump found it.")
@click.option("--rows", type=click.IntRange(min=1), default=20, show_default=True, help="Tokens for --position.")
@json_option
@debug_option
def inspect(
    cache: str, position: int | None, block: int | None, tokenizer: str | None, rows: int, as_json: bool
) -> None:
    """Show what is in a cache: its facts, or one position or block decoded to text."""
    from logitcache.store import open_cache

    opened = open_cache(cache, partial=True)
    if position is not None and block is not None:
        raise UsageError("--position and --block exclude each other; give one of them")
    if position is not None:
        show_position(opened, position, Decoder(opened, tokenizer), rows, as_json)
    elif block is not None:
        show_block(opened, block, Decoder(opened, tokenizer), as_json)
    else:
        show_facts(opened, as_json)


def show_facts(cache: Cache, as_json: bool) -> None:
    """The cache as a whole, as its documents tell it; of shards only that they are there."""
    manifest = cache.manifest
    shards, missing = len(manifest.shards), cache.missing_shards
    identity = manifest.identity
    num_bytes = cache.num_bytes
    tokens = cache.num_tokens
    entries = sum(shard.num_entries for shard in manifest.shards)
    packing = identity.corpus.get("packing", {})
    facts: dict[str, Any] = {
        "cache": cache.location,
        "complete": manifest.complete,
        "teacher": identity.teacher.get("name"),
        "teacher dtype": identity.teacher.get("dtype"),
        "vocabulary": cache.vocab_size,
        "select": str(cache.selection),
        "unbiased": cache.unbiased,
        # Draws from a top-k never hit its tail: they are unbiased for the stored ids only.
        **({} if identity.mean_tail_mass is None else {"tail mass left out": identity.mean_tail_mass}),
        "tokens": tokens,
        **({"counted tokens": cache.num_counted} if cache.masked else {}),
        **({"rows left out (NaN or infinite)": cache.num_nonfinite} if identity.leaves_out_nonfinite else {}),
        "blocks": cache.num_blocks,
        "block length": cache.block_length,
        "documents": identity.corpus.get("documents"),
        "BOS / EOS": f"{packing.get('bos')} / {packing.get('eos')}",
        "ids per token": round(entries / tokens, 2) if tokens else 0.0,
        "container": identity.container,
        "bytes": num_bytes,
        "bytes per token": round(num_bytes / tokens, 2) if tokens else None,
        "shards": shards,
        # In a bucket nobody looks: it would be a request for each.
        **({} if "://" in cache.location else {"shard files": shards - len(missing)}),
        "fingerprint": cache.fingerprint,
    }
    if missing:
        are = "is" if len(missing) == 1 else "are"
        what = f"warning: {len(missing)} of {counted(shards, 'shard file')} {are} missing, for example {missing[0]}; "
        err.print(Text(f"{what}restore what is missing, or run the same dump again", style="yellow"), soft_wrap=True)
    if as_json:
        print_json({**facts, "ancestry": [step.model_dump() for step in identity.ancestry]})
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        text = "not known" if value is None else f"{value:,}" if type(value) in (int, float) else str(value)
        table.add_row(Text(name, style="dim"), Text(text))
    for number, step in enumerate(identity.ancestry):
        table.add_row(Text("" if number else "made by", style="dim"), Text(ancestry_line(step)))
    out.print(table)


def _mean(values: Any) -> float:
    return float(values.mean()) if values.size else math.nan


def _nats(value: float) -> str:
    return "not stored" if math.isnan(value) else f"{value:.3f} nats"


def show_position(cache: Cache, position: int, decoder: Decoder, rows: int, as_json: bool) -> None:
    """The text before a position and the teacher's tokens after it, most probable first."""
    if not 0 <= position < cache.manifest.identity.geometry.num_tokens:
        last = cache.manifest.identity.geometry.num_tokens - 1
        raise UsageError(f"position {position} is outside {cache.location}; choose 0 to {last}")
    block, place = cache.manifest.identity.geometry.locate(position)
    blocks = cache.read_blocks(block, block + 1)
    row = blocks.targets.slice(place, place + 1)
    order = (-row.weights).argsort(kind="stable")[:rows]
    label = int(blocks.labels()[0, place])
    kind = "weight (unbiased)" if row.unbiased else "probability"
    threshold = float(row.threshold[0])
    listed: list[dict[str, Any]] = [
        {
            "id": int(row.ids[entry]),
            "token": decoder.token(int(row.ids[entry])),
            "weight": float(row.weights[entry]),
            "exact": float(row.weights[entry]) > threshold,
        }
        for entry in order
    ]
    context = decoder.text(blocks.tokens[0, max(0, place - CONTEXT_TOKENS + 1) : place + 1].tolist())
    facts: dict[str, Any] = {
        "position": position,
        "block": block,
        "place": place,
        "context": context,
        "next_id": None if label < 0 else label,
        "next_token": None if label < 0 else decoder.token(label),
        "label_logprob": float(row.label_logprob[0]),
        "entropy": float(row.entropy[0]),
        "tail_mass": float(row.tail_mass[0]),
        "entries": len(row.ids),
        **({} if blocks.counted is None else {"counted": bool(blocks.counted[0, place])}),
        "unbiased": row.unbiased,
        "teacher": listed,
    }
    if as_json:
        print_json(facts)
        return
    out.print(Text(f"position {position} (block {block}, place {place})", style="bold"))
    out.print(Text("… " if place >= CONTEXT_TOKENS else "", style="dim") + Text(context) + Text(" ▮", style="cyan"))
    table = Table(box=None, pad_edge=False)
    # On a narrow terminal bars are left out and tokens folded; ids and weights stay whole.
    table.add_column("id", justify="right", min_width=max((len(str(entry["id"])) for entry in listed), default=2))
    table.add_column("token", overflow="fold")
    table.add_column(kind, justify="right", min_width=WEIGHT_WIDTH)
    table.add_column(no_wrap=True)
    bar_width = BAR_WIDTH if out.width >= LEAST_WIDTH_FOR_BARS else 0
    for entry in listed:
        style = "green" if entry["id"] == label else ""
        bar = "█" * round(bar_width * entry["weight"])
        # Of a varopt row some weights are probabilities and the others samples.
        mark = "=" if entry["exact"] and row.unbiased else ""
        table.add_row(str(entry["id"]), Text(entry["token"]), f"{mark}{entry['weight']:.4f}", Text(bar), style=style)
    out.print(table)
    if row.unbiased and cache.has_exact_head:
        out.print(Text("= the teacher's own probability; the others are sampled, all with one weight", style="dim"))
    _print_row_facts(facts, len(listed), _reason(cache))


def _reason(cache: Cache) -> str:
    """Why a position does not count, after `is not one to learn`."""
    some = cache.manifest.identity.leaves_out_nonfinite and cache.num_nonfinite != 0
    return ", or the teacher's logits were NaN or infinite" if some else ""


def _print_row_facts(facts: dict[str, Any], listed: int, reason: str) -> None:
    if facts["entries"] > listed:
        more = counted(facts["entries"] - listed, "more entry", "more entries")
        out.print(Text(f"{more}; see all with --rows", style="dim"))
    label = facts["label_logprob"]
    if not facts.get("counted", True):
        out.print(f"nothing is stored here: the next token is not one to learn, as in a prompt{reason}", soft_wrap=True)
        return
    if facts["next_id"] is None:
        out.print("there is no next token here: the block or the corpus ends")
    else:
        out.print(Text(f"next token in the text: {facts['next_token']} (teacher log-probability {_nats(label)})"))
    out.print(f"entropy {_nats(facts['entropy'])}{_tail(facts, facts['unbiased'])}")


def show_block(cache: Cache, block: int, decoder: Decoder, as_json: bool) -> None:
    """A block's text and averages over its positions."""

    if not 0 <= block < cache.num_blocks:
        raise UsageError(f"block {block} is outside {cache.location}; choose 0 to {cache.num_blocks - 1}")
    blocks: Blocks = cache.read_blocks(block, block + 1)
    valid, targets = blocks.valid[0], blocks.targets
    stored = valid if blocks.counted is None else blocks.counted[0]
    # An imported cache may know only some of them; their mean would be no cross entropy, so NaN passes through.
    labelled = blocks.labels()[0] >= 0
    facts: dict[str, Any] = {
        "block": block,
        "tokens": int(valid.sum()),
        **({} if blocks.counted is None else {"counted": int(stored.sum())}),
        "entropy": _mean(targets.entropy[stored]),
        "cross_entropy": _mean(-targets.label_logprob[labelled]),
        "tail_mass": _mean(targets.tail_mass[stored]),
        "entries_per_token": _mean(targets.row_lengths[stored]),
        "text": decoder.text(blocks.tokens[0][valid].tolist()),
    }
    if as_json:
        print_json(facts)
        return
    out.print(Text(f"block {block}, {counted(facts['tokens'], 'token')}", style="bold"))
    out.print(Text(str(facts["text"])))
    if not stored.any():
        what = f"none of its tokens is one to learn, as inside a prompt{_reason(cache)}"
        out.print(f"nothing is stored of this block: {what}", soft_wrap=True)
        return
    out.print(
        f"teacher's cross entropy {_nats(facts['cross_entropy'])}, entropy {_nats(facts['entropy'])}, "
        f"{facts['entries_per_token']:.1f} ids per token{_tail(facts, cache.unbiased)}"
    )


def _tail(facts: dict[str, Any], unbiased: bool) -> str:
    """The tail's mass. Weights that are an unbiased sample of all ids leave none."""
    return "" if unbiased else f", tail mass {facts['tail_mass']:.4f}"


class Decoder:
    """Ids to text with the cache's own tokenizer, or plain ids when it cannot be found."""

    def __init__(self, cache: Cache, folder: str | None) -> None:
        from logitcache import models

        origin = cache.manifest.origin
        wanted = cache.manifest.identity.tokenizer.get("sha256")
        self._tokenizer: Any = None
        try:
            found = models.load_tokenizer(folder) if folder else models.load_tokenizer(origin.teacher, origin.gguf_file)
        except LogitcacheError as error:
            if folder:
                raise
            err.print(Text(f"(showing ids only: {error}; give the tokenizer with --tokenizer)", style="dim"))
            return
        if models.tokenizer_identity(found)["sha256"] != wanted:
            raise UsageError(
                f"the tokenizer in {folder or origin.teacher} is not the one this cache was made with; "
                "give the right one with --tokenizer"
            )
        self._tokenizer = found

    @property
    def found(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def text(self, ids: list[int]) -> str:
        """Running text."""
        if self._tokenizer is None:
            return " ".join(str(number) for number in ids)
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def token(self, number: int) -> str:
        """One token, quoted so that spaces show."""
        return "" if self._tokenizer is None else repr(self.text([number]))
