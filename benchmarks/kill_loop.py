"""SIGKILL at random, many times: does a dump always go on, and end as one that nobody disturbed?

    python -m benchmarks.kill_loop [--rounds 200] [--seed 0] [--save]

Each round starts one to three processes of the same dump of a tiny teacher and kills each at a random moment, unless it
is through by then. After every round the cache must be whole as far as it goes, its commits those of the undisturbed
dump; a finished one must equal it in every byte, and the next round begins a new one.
"""

from __future__ import annotations

import filecmp
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.models import save_model
from logitcache.selection import Selection
from logitcache.store import Layout, open_cache, verify

BLOCK_LENGTH, UNIT_BLOCKS = 32, 4
VOCABULARY = 300
MOST_PROCESSES = 3
_STORE = ("zarr.storage", "zarr.codecs.numcodecs")


@dataclass
class Tally:
    """What a loop met.

    Args:
        rounds, kills: how many.
        finished: rounds that ended with a finished cache.
        nothing: rounds in which no process came as far as a plan.
        commits: units that were committed in all rounds together.
    """

    rounds: int = 0
    kills: int = 0
    finished: int = 0
    nothing: int = 0
    commits: int = 0


def make_teacher(folder: Path) -> Path:
    """A random llama of two layers with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=BLOCK_LENGTH,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    save_model(model.eval(), folder, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    return folder


def options(place: Path, root: Path) -> DumpOptions:
    """A dump of some 16 units."""
    return DumpOptions(
        teacher=str(place / "teacher"),
        corpus=(str(place / "corpus.txt"),),
        outputs=(Output(Selection.parse("sample:7"), root),),
        device="cpu",
        block_length=BLOCK_LENGTH,
        batch_tokens=2 * BLOCK_LENGTH,
        unit_tokens=UNIT_BLOCKS * BLOCK_LENGTH,
    )


def dump(given: DumpOptions) -> None:
    """What each process runs. One thread, so that equal runs give equal bytes."""
    torch.set_num_threads(1)
    run_dump(given)


def kill_loop(
    folder: Path, rounds: int, seed: int, context: BaseContext, tell: Callable[[str], None] = lambda _: None
) -> Tally:
    """Run the loop in `folder`. Raises AssertionError where a cache is not what it must be."""
    make_teacher(folder / "teacher")
    text = "".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(50))
    (folder / "corpus.txt").write_text(text)
    whole, root = folder / "whole", folder / "cache"
    # Once to warm the processes up, once for the time that a whole dump takes.
    for _ in range(2):
        shutil.rmtree(whole, ignore_errors=True)
        began = time.perf_counter()
        run_killed(context, options(folder, whole), [None])
        seconds = time.perf_counter() - began
    random, tally = np.random.default_rng(seed), Tally()
    while tally.rounds < rounds:
        tally.rounds += 1
        delays = (random.uniform(0, seconds, random.integers(1, MOST_PROCESSES + 1))).tolist()
        before = len(list(Layout(root).commits.glob("*.json")))
        tally.kills += run_killed(context, options(folder, root), delays)
        check(root, whole)
        tally.commits += len(list(Layout(root).commits.glob("*.json"))) - before
        tally.nothing += not Layout(root).plan.exists()
        if Layout(root).manifest.exists():
            # A kill may have come after the manifest.
            run_killed(context, options(folder, root), [None])
            compare(root, whole)
            tally.finished += 1
            shutil.rmtree(root)
        tell(f"round {tally.rounds}: {tally}")
    run_killed(context, options(folder, root), [None])
    compare(root, whole)
    return tally


def run_killed(context: BaseContext, given: DumpOptions, delays: list[float | None]) -> int:
    """Start a process for each delay, and kill it after so many seconds. Returns how many did not end before."""
    processes: list[Any] = [context.Process(target=dump, args=(given,)) for _ in delays]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    began, kills = time.perf_counter(), 0
    for delay, process in sorted(zip(delays, processes, strict=True), key=lambda pair: pair[0] or 0):
        process.join(None if delay is None else max(0.0, began + delay - time.perf_counter()))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), f"a dump ended with {process.exitcode}"
    return kills


def check(root: Path, whole: Path) -> None:
    """What is committed is whole, and is what the undisturbed dump committed."""
    if not Layout(root).plan.exists():
        return
    report_ = verify(root)
    assert report_.ok, report_.problems
    for record in Layout(root).commits.glob("*.json"):
        assert filecmp.cmp(record, Layout(whole).commit(int(record.stem)), shallow=False), record
    shards = open_cache(root, partial=True).manifest.shards
    assert report_.tokens == sum(shard.num_tokens for shard in shards)


def compare(root: Path, whole: Path) -> None:
    """A finished cache covers every token once and equals the undisturbed one in every file."""
    geometry = open_cache(root).manifest.identity.geometry
    covered = [
        range(shard.first_block, shard.first_block + shard.num_blocks) for shard in open_cache(root).manifest.shards
    ]
    assert [block for blocks in covered for block in blocks] == list(range(geometry.num_blocks))
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert all(filecmp.cmp(root / name, whole / name, shallow=False) for name in names)


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    # Children start from a process that has imported what a dump needs and run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["logitcache.dump", "transformers.models.llama.modeling_llama", *_STORE])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_loop(Path(folder), given.rounds, given.seed, context, lambda line: print(line, flush=True))
    rows = [[f"{value:,}" for value in vars(tally).values()] + [f"{time.perf_counter() - began:,.0f} s"]]
    body = (
        "Each round: one to three processes of one dump, each killed at a random moment. Every check passed: what is "
        "committed is whole and as in an undisturbed dump; every finished cache equals that in every byte.\n\n"
    )
    names = ["rounds", "kills", "finished caches", "rounds before a plan", "units committed", "time"]
    report.publish("kill_loop", "python -m benchmarks.kill_loop", body + report.table(names, rows), given.save)


if __name__ == "__main__":
    main()
