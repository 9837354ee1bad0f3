"""What `push` and `pull` do, show while they run and say when they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from .console import out, print_json
from .progress import View

if TYPE_CHECKING:
    from logitcache.store import Transfer


class TransferView(View):
    """A bar of bytes."""

    def moved(self, done: int, total: int) -> None:
        """See `logitcache.store.push`."""
        seconds = self.seconds_since_start()
        # Of a moment nobody can tell the speed.
        rate = done / seconds if seconds > 0.1 else 0.0
        speed = f", {rate / 1e6:,.1f} MB/s" if rate else ""
        facts = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB{speed}"
        self.bar(done, total, facts, (total - done) / rate if rate else None)


def transfer(command: str, copy: Callable[..., Transfer], source: str, destination: str, as_json: bool) -> None:
    """Copy a cache with a bar, and say what was done in one line or as JSON."""
    with TransferView(command) as view:
        done = copy(source, destination, view.moved)
    if as_json:
        print_json({"source": source, "destination": destination, **asdict(done)})
        return
    there = done.files - done.sent
    skipped = f"; {there} of {done.files} files were there" if there else ""
    out.print(
        f"{destination}: {done.num_bytes / 1e6:,.2f} MB of {done.fingerprint[:12]}, {done.sent_bytes / 1e6:,.2f} MB "
        f"copied in {done.seconds:,.1f} s{skipped}"
    )
