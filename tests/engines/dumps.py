"""Small dumps that several processes share, and looking at them from outside."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from logitcache.dump import DumpOptions, DumpReport, Output, run_dump
from logitcache.engines.leases import Leases
from logitcache.engines.watch import snapshot
from logitcache.progress import Snapshot
from logitcache.selection import Selection
from logitcache.store import Layout
from tests.caches import corpus_text
from tests.store.caches import files_of
from tests.tiny import save_tiny

LENGTH = 16
_MOMENT = 0.02


def make_place(folder: Path) -> Path:
    """`teacher`, and `corpus.txt` of about a thousand tokens."""
    save_tiny(folder / "teacher")
    (folder / "corpus.txt").write_text(corpus_text(30))
    return folder


def options(place: Path, root: Path, *more: tuple[str, Path], **changes: Any) -> DumpOptions:
    """Units of 6 blocks of 16 tokens: about ten of them."""
    settings: dict[str, Any] = {"block_length": LENGTH, "batch_tokens": 3 * LENGTH, "unit_tokens": 6 * LENGTH}
    settings |= {"device": "cpu", "seed": 3, **changes}
    outputs = tuple(Output(Selection.parse(spec), folder) for spec, folder in (("sample:7", root), *more))
    return DumpOptions(str(place / "teacher"), outputs=outputs, **{"corpus": (str(place / "corpus.txt"),), **settings})


def dump(given: DumpOptions, log: Path | None = None) -> None:
    """What the children run. One thread, so that equal runs give equal bytes; `log` gets the tokens it computed."""
    torch.set_num_threads(1)
    report: DumpReport = run_dump(given)
    if log is not None:
        log.write_text(str(report.computed_tokens))


def content(root: Path) -> dict[str, bytes]:
    """All files of a finished cache; there must be none besides."""
    files = files_of(root)
    kinds = {name.partition("/")[0] for name in files}
    assert kinds == {"manifest.json", "plan.json", "codebook", "commits", "shards"}
    return files


def await_state(
    root: Path, wanted: Callable[[Snapshot], bool], process: subprocess.Popen[str] | None = None
) -> Snapshot:
    """Look at a dump until it is as wanted. A dump that never is hangs the test, unless its `process` ends."""
    while True:
        assert process is None or process.poll() is None, process.communicate()
        if Layout(root).leases.is_dir() and wanted(seen := snapshot([root])):
            return seen
        time.sleep(_MOMENT)


def await_stop(pid: int) -> None:
    """Return when a process is stopped."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(_MOMENT)


def let_expire(leases: Path) -> None:
    """Make every lease look as it does when its owner showed no life for an hour."""
    for path in leases.iterdir():
        moment = path.stat().st_mtime - 3600
        os.utime(path, (moment, moment))


def elsewhere(leases: Leases) -> Leases:
    """The same worker as if it ran on another machine: nobody here can tell whether its process lives."""
    leases._owner["machine"] = "another machine"
    return leases
