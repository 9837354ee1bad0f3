"""What two plans differ in, and how that is said to whoever runs a command again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from logitcache.errors import counted
from logitcache.store.schema import Identity

# Dotted name of a field, and its values in two documents.
Difference = tuple[str, object, object]

# Fields that are all of what their option says.
_OPTION_ALONE = ("codec.layout", "teacher.compiled")
# Fields that are lists of files: {"name", "sha256"}, with "bytes" where they are a corpus.
_FILES = ("corpus.files", "teacher.files")
STEP_OPTIONS: dict[str, tuple[str, ...]] = {
    "convert": ("container",),
    "derive": ("select", "drop", "codec", "seed"),
    "merge": (),
    "subset": ("blocks",),
}


@dataclass(frozen=True)
class Wording:
    """How a command calls what settles the fields of its plan.

    Fields are given by their dotted name or the beginning of it; of those that fit the longest counts, "" fits all.

    Args:
        options: the option that settles a field.
        follows: fields that others settle, listed only where nothing else differs.
        absent: what it means that a field is not there.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    follows: tuple[str, ...] = ()
    absent: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of_step(cls, identity: Identity) -> Wording:
        """Of the command that makes a cache of others: all follows from them and from what the step was told."""
        last, operation = f"ancestry.{len(identity.ancestry) - 1}", identity.ancestry[-1].operation
        options = {f"{last}.arguments.{name}": f"--{name}" for name in STEP_OPTIONS[operation]}
        return cls({**options, f"{last}.parents": "CACHE"}, ("",))

    def lines(self, stored: Identity, given: Identity) -> list[str]:
        """One for each option, or field without one, in which the plans of a cache and of this run differ."""
        differences = diff_identities(stored, given)
        causes = [row for row in differences if not self._follows(row[0])]
        lines: dict[str, str] = {}
        # What has an option explains the rest.
        optional = [row for row in differences if _fitting(self.options, row[0]) is not None]
        for name, old, new in causes or optional or differences:
            option = self.options.get(_fitting(self.options, name) or name)
            if (files := _fitting(_FILES, name)) is not None:
                option, (part, key) = option or files, files.split(".")
                old, new = (getattr(identity, part).get(key, []) for identity in (stored, given))
                lines.setdefault(option, f"{option} {_files_that_differ(old, new)}")
                continue
            if option is None:
                option = label = name
            elif name.startswith("selection."):
                label, old, new = option, str(stored.selection.spec), str(given.selection.spec)
            elif name == "geometry.unit_blocks":
                label, old, new = option, _unit_tokens(stored), _unit_tokens(given)
            else:
                plain = name in _OPTION_ALONE or name.endswith(option.removeprefix("--").replace("-", "_"))
                label = option if plain else f"{option} ({name})"
            old, new = (self.absent.get(name) if value is None else value for value in (old, new))
            lines.setdefault(option, f"{label}: the cache has {old!r}, this run {new!r}")
        return list(lines.values())

    def _follows(self, name: str) -> bool:
        option, follows = _fitting(self.options, name), _fitting(self.follows, name)
        return follows is not None and (option is None or len(option) <= len(follows))


def diff_identities(old: Identity, new: Identity) -> list[Difference]:
    """Fields in which two identities differ."""
    return diff(old.model_dump(mode="json"), new.model_dump(mode="json"))


def diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[Difference]:
    """Fields in which two nested documents differ: (dotted name, old value, new value)."""
    rows: list[Difference] = []
    for key in sorted({*old, *new}):
        mine, theirs = _numbered(old.get(key)), _numbered(new.get(key))
        if isinstance(mine, dict) and isinstance(theirs, dict):
            rows += diff(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            rows.append((f"{prefix}{key}", mine, theirs))
    return rows


def _fitting(beginnings: Iterable[str], name: str) -> str | None:
    """The longest of some beginnings of dotted names that is one of `name`."""
    found = (part for part in beginnings if not part or f"{name}.".startswith(f"{part}."))
    return max(found, key=len, default=None)


def _unit_tokens(identity: Identity) -> int:
    return identity.geometry.unit_blocks * identity.geometry.block_length


def _files_that_differ(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """The end of a line: the first file that differs, by its name, what of it changed, and how many others did."""
    stored, given = _by_name(old), _by_name(new)
    names = [name for name in {**stored, **given} if stored.get(name) != given.get(name)]
    mine, theirs = stored.get(names[0]), given.get(names[0])
    if mine is None or theirs is None:
        what = f"only {'this run' if mine is None else 'the cache'} has this file"
    elif mine.get("bytes") != theirs.get("bytes"):
        what = f"the cache has {mine.get('bytes')} bytes of it, this run {theirs.get('bytes')}"
    else:
        what = f"the cache has it with SHA-256 {mine.get('sha256')}, this run {theirs.get('sha256')}"
    more = f"; {counted(len(names) - 1, 'more file')} changed" if names[1:] else ""
    return f"({names[0]}): {what}{more}"


def _by_name(files: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Files by their names; of those that share one the later ones by name and number."""
    named: dict[str, dict[str, Any]] = {}
    for number, file in enumerate(files):
        name = str(file["name"])
        named[name if name not in named else f"{name}, file {number}"] = file
    return named


def _numbered(value: Any) -> Any:
    """A list of objects as an object, by name or else by number, so that a difference inside one of them is named."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return value
    if all("name" in item for item in value):
        return _by_name(value)
    return {str(number): item for number, item in enumerate(value)}
