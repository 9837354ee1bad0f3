"""What two plans differ in, for those who repeat a command and for those who merge caches."""

from __future__ import annotations

from typing import Any


def diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, object, object]]:
    """Fields in which two nested documents differ: (dotted name, old value, new value)."""
    rows: list[tuple[str, object, object]] = []
    for key in sorted({*old, *new}):
        mine, theirs = _numbered(old.get(key)), _numbered(new.get(key))
        if isinstance(mine, dict) and isinstance(theirs, dict):
            rows += diff(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            rows.append((f"{prefix}{key}", mine, theirs))
    return rows


def _numbered(value: Any) -> Any:
    """A list of objects as an object, so that a difference inside one of them is named."""
    objects = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    return {str(number): item for number, item in enumerate(value)} if objects else value
