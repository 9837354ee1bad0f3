"""Everything `logitcache plan` can be told."""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from logitcache.codec import LayoutName
from logitcache.dump_options import DumpOptions, Output
from logitcache.errors import UsageError
from logitcache.selection import Selection

LEAST_SAMPLE_TOKENS = 256


@dataclass(frozen=True)
class PlanOptions:
    """A dump that is only thought of, and what to say of it.

    Args:
        dump: the dump. Nothing is written to its outputs, and nothing is read there.
        codecs: codecs to compare.
        together: whether all outputs come from the same forward passes, as in a dump, or each selection from a dump of
            its own.
        sample_tokens: tokens to try; by default 8,192 on a CPU, 65,536 on a GPU.
        student: model folder, hub id or config file of a student whose appetite is measured; None for none.
        machines: machines like this one that share the dump.
    """

    dump: DumpOptions
    codecs: tuple[LayoutName, ...] = ("small", "fast")
    together: bool = False
    sample_tokens: int | None = None
    student: str | None = None
    machines: int = 1

    def __post_init__(self) -> None:
        if self.sample_tokens is not None and self.sample_tokens < LEAST_SAMPLE_TOKENS:
            raise UsageError(f"sample-tokens is {self.sample_tokens}; it must be at least {LEAST_SAMPLE_TOKENS}")
        if self.dump.served:
            raise UsageError(
                f"plan tries the teacher on this machine, and {self.dump.teacher} asks a server; dump a little "
                "with --max-tokens to try it"
            )
        if self.dump.tensor_parallel:
            raise UsageError(
                "plan tries the teacher in one process; leave --tensor-parallel out, and spread the teacher with "
                "--device-map for a trial"
            )
        if self.machines < 1:
            raise UsageError(f"machines is {self.machines}; it must be at least 1")

    @property
    def selections(self) -> list[Selection]:
        """Of the outputs, in their order."""
        return [output.selection for output in self.dump.outputs]

    @property
    def groups(self) -> list[list[Selection]]:
        """Selections that share the teacher's forward passes."""
        return [self.selections] if self.together else [[selection] for selection in self.selections]


def planned_outputs(selections: list[Selection]) -> tuple[Output, ...]:
    """Outputs of a dump that has no folders yet. Raises UsageError when a selection is given twice."""
    if len(set(selections)) != len(selections):
        raise UsageError("a selection is given twice; give each --select once")
    # Nothing is written there, and nothing must be there; where the plan's own caches go can be written, too.
    nowhere = Path(tempfile.gettempdir()) / f"logitcache-{uuid.uuid4().hex}"
    return tuple(Output(selection, nowhere / str(number)) for number, selection in enumerate(selections))
