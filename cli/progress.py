"""Progress on a terminal as a bar, elsewhere (a log file, CI) as a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from logitcache.progress import RUNNING, Snapshot

from .console import counted, err

LINE_SECONDS = 10.0


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.fields.get("seconds_left")
        return Text("" if left is None else f"{duration(left)} left", style="cyan")


class _Bars(Progress):
    """A bar, and what stands below it."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class View:
    """One running job: stages, then a bar. Use as a context manager."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._live: _Bars | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._said_end = False
        self._started: float | None = None

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._live = _Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}"),
                _TimeLeft(),
                console=err,
            )
            self._live.start()
            self._task = self._live.add_task(self._name, total=None, facts="", seconds_left=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, what: str) -> None:
        """A new stage without a known length."""
        self._said_end = False
        if self._live is not None:
            self._live.update(self._task, description=f"{self._name}: {what}")
        else:
            err.print(f"{self._name}: {what}", soft_wrap=True)

    def note(self, what: str) -> None:
        """A line that stays."""
        err.print(f"{self._name}: {what}", soft_wrap=True)

    def bar(self, done: float, total: float, facts: str, seconds_left: float | None) -> None:
        """`done` of `total`, with a few words about speed or quality."""
        if self._live is not None:
            self._live.update(self._task, completed=done, total=total, facts=facts, seconds_left=seconds_left)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or (done >= total and not self._said_end):
            self._last_line, self._said_end = time.monotonic(), done >= total
            left = "" if seconds_left is None else f", {duration(seconds_left)} left"
            err.print(f"{self._name}: {done / max(total, 1):4.0%}, {facts}{left}", soft_wrap=True)

    def seconds_since_start(self) -> float:
        """Since the first call."""
        now = time.monotonic()
        self._started = self._started or now
        return now - self._started


class DumpView(View):
    """What `run_dump` reports to; `caches` is the number of those it writes, whose bytes are added up."""

    def __init__(self, name: str = "dump", caches: int = 1) -> None:
        super().__init__(name)
        self._of_caches = f" in {caches} caches together" if caches > 1 else ""
        self._resumed_bytes = 0
        self._committed = 0
        self._done_before: int | None = None

    def stage(self, what: str) -> None:
        super().stage(what)
        if what == RUNNING:
            self.seconds_since_start()

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        """See `logitcache.dump.Progress`."""
        seconds = max(self.seconds_since_start(), 1e-9)
        # What other workers finished counts, too.
        if self._done_before is None:
            self._done_before = done - computed
        rate = (done - self._done_before) / seconds
        if num_bytes != self._resumed_bytes:
            self._resumed_bytes, self._committed = num_bytes, computed
        size = f", {num_bytes / self._committed:.1f} B/token{self._of_caches}" if self._committed else ""
        facts = f"{done:,} of {total:,} tokens, {rate:,.0f} tokens/s{size}"
        self.bar(done, total, facts, (total - done) / rate if rate else None)

    def workers(self, seen: Snapshot) -> None:
        """See `logitcache.progress.Progress`."""
        busy = f"{counted(sum(state.stage == 'computing' for state in seen.workers), 'worker')} computing"
        if all(state.stage == "gone" for state in seen.workers):
            busy = "nobody works on it: run the dump's own line again to go on"
        if self._live is not None:
            self._live.below = workers_table(seen)
        if seen.total_tokens is None:
            return
        units = f"{seen.committed_units:,} of {counted(seen.total_units or 0, 'unit')}"
        facts = f"{seen.done_tokens:,} of {seen.total_tokens:,} tokens, {units}, {seen.tokens_per_second:,.0f} tokens/s"
        self.bar(seen.done_tokens, seen.total_tokens, f"{facts}, {busy}", seen.seconds_left)


def workers_table(seen: Snapshot) -> Table:
    """One line for each worker of a dump."""
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "host", "pid", "doing", "unit", "tokens", "tokens/s", "heartbeat"):
        table.add_column(column, justify="left" if column in ("worker", "host", "doing") else "right")
    for state in seen.workers:
        table.add_row(
            state.worker,
            state.host,
            str(state.pid),
            state.stage,
            "" if state.unit is None else f"{state.unit:,}",
            f"{state.computed_tokens:,}",
            "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
            f"{state.heartbeat_age:,.0f} s ago",
            style="dim" if state.stage == "gone" else "",
        )
    return table


class StageView(DumpView):
    """What commands of several stages report to, as `derive`, `merge` and `plan`: speeds are those of the stage."""

    def stage(self, what: str) -> None:
        super().stage(what)
        self._started = self._done_before = None
        self._resumed_bytes = self._committed = 0
        self.seconds_since_start()


class TrainView(View):
    """What `run_training` reports to."""

    def __init__(self, name: str = "train") -> None:
        super().__init__(name)
        self._first_step: int | None = None

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """After each optimiser step."""
        if self._first_step is None:
            self._first_step = step - 1
        seconds = max(self.seconds_since_start(), 1e-9)
        rate = (step - self._first_step) / seconds
        names = {"loss": "loss", "ce": "ce", "divergence": "kl", "eval_ce": "held-out ce"}
        facts = [f"step {step} of {total}"]
        facts += [f"{label} {metrics[name]:.3f}" for name, label in names.items() if name in metrics]
        if "tokens_per_second" in metrics:
            facts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        self.bar(step, total, ", ".join(facts), (total - step) / rate if step > self._first_step + 1 else None)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
