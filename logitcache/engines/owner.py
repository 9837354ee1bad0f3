"""Who holds a lease, and whether that process still lives: known at once on its own machine, nowhere else."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from typing import Any

_STATE, _STARTED = 0, 19
_GONE = {"Z", "X"}


@functools.cache
def this_machine() -> str:
    """Names the boot and the process namespace: where two processes have the same, each sees the other's number.

    Empty where that cannot be told; then only a lease's age counts.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the command's name, which may hold anything; None for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def this_process() -> dict[str, Any]:
    """What a lease says of its owner."""
    fields = _process(os.getpid())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": this_machine(),
        "started": fields[_STARTED] if fields else "",
    }


def known_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner's process ran on this machine and is gone. False: it lives, or nobody can tell from here."""
    machine, pid = owner.get("machine"), owner.get("pid")
    if not machine or machine != this_machine() or not isinstance(pid, int):
        return False
    fields = _process(pid)
    # Another process may have got the number since.
    return fields is None or fields[_STATE] in _GONE or fields[_STARTED] != owner.get("started")
