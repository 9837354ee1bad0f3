"""What an audit was told, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from logitcache.audit.verdict import FACTOR, Figure, Verdict, worst
from logitcache.errors import UsageError
from logitcache.teachers import is_url


@dataclass(frozen=True)
class AuditOptions:
    """Everything `logitcache verify --against-teacher` can be told.

    Args:
        teacher: folder or hub id of a causal language model.
        gguf_file: name of a GGUF file in the teacher's folder.
        tokenizer: folder or hub id of its tokenizer, if that is not beside it.
        rows: how many to look at.
        seed: of their choice.
        dtype: "auto" (that of the dump, or as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or "cuda".
        device_map: spread the teacher over several devices, as `models.load_model`; None for one.
        batch_tokens: tokens in one forward pass; at least two blocks go into one.
        trust_remote_code: let a teacher run Python code of its own.

    Raises:
        UsageError: a number is out of its range, or the teacher is a server.
    """

    teacher: str
    gguf_file: str | None = None
    tokenizer: str | None = None
    rows: int = 1000
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    batch_tokens: int = 4096
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if is_url(self.teacher):
            raise UsageError(
                f"{self.teacher} is a server, and an audit needs the whole distribution, which servers do not tell; "
                "name the folder or hub id of its model, which then runs here"
            )
        for name in ("rows", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.device_map is not None and self.device != "auto":
            raise UsageError("--device-map says where the parts of the teacher run; leave --device out")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Args:
        cache: its path or URL.
        teacher: folder or hub id.
        dtype: in which the teacher ran.
        cache_dtype: in which it ran for the dump; None where the cache does not know.
        files: whether the teacher's files have the hashes that the cache recorded.
        tokenizer: "same", or "not found" where none is beside the teacher.
        rows, blocks: how many were looked at.
        figures: every measure of every part of the blocks.
        other_dtype: in which it ran to see what precision does; None where that was not needed.
        blocks_off: numbers of blocks whose own mean of a figure is over its limit.
        fits: what was done to the rows, where that explains them.
        fits_exactly: whether it explains them to the noise of batch sizes.
    """

    cache: str
    teacher: str
    dtype: str
    cache_dtype: str | None
    files: Literal["same", "other", "unknown"]
    tokenizer: Literal["same", "not found"]
    rows: int
    blocks: int
    figures: list[Figure]
    other_dtype: str | None = None
    blocks_off: list[int] = field(default_factory=list)
    fits: str | None = None
    fits_exactly: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst of all figures; never "other precision" where another explanation is at hand."""
        found = worst(self.figures)
        if found == "other precision" and (self.fits_exactly or not self.precision_explains):
            return "different"
        return found

    @property
    def ok(self) -> bool:
        """Whether the rows are this teacher's, in whatever precision."""
        return self.verdict != "different"

    @property
    def precision_explains(self) -> bool:
        """Whether nothing but precision is known to differ: other files in the dtype of the dump are other weights."""
        return self.files != "other" or self.dtype != self.cache_dtype

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if self.verdict == "different":
            return f"the cache does not hold what this teacher says: {self._reason}"
        if self.verdict == "same teacher":
            said = (
                ": no figure is over its limit, which is "
                f"{FACTOR:g} times what batch size and rounding make of the teacher itself"
            )
            doubt = "and a change too slight for these limits would not show"
        else:
            said = (
                " in another precision: the figures are over what batch size "
                f"makes, and not over what {self.other_dtype} instead of {self.dtype} makes"
            )
            doubt = "so that a slight change of its weights may hide in this"
        doubts = f"; its files are not those of the dump, {doubt}" if self.files == "other" else ""
        return f"the cache holds what this teacher says{said}{doubts}"

    @property
    def _reason(self) -> str:
        over = max(self.figures, key=lambda figure: abs(figure.mean) / figure.limit if figure.limit else 0)
        times = abs(over.mean) / over.limit if over.limit else float("inf")
        # Rounded, a little over the limit would be 1.0 times the limit.
        of = f"{times:.2%} of" if times < 1.1 else f"{times:,.{0 if times >= 10 else 1}f} times"
        found = f"{over.measure} is {of} its limit"
        where = f" in {len(self.blocks_off)} of {self.blocks} blocks"
        found += where if 0 < len(self.blocks_off) < self.blocks else ""
        if self.fits is not None:
            return f"{found}; its rows fit {'' if self.fits_exactly else 'far better '}if {self.fits}"
        if worst(self.figures) == "other precision":
            return (
                f"{found}; its files are not those of the dump, and nothing says that its precision is another (where "
                "they hold fewer digits, say so with --dtype)"
            )
        return found
