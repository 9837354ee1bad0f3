"""Dated results files with machine and versions."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy", "zarr", "numcodecs", "pcodec")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments every benchmark has."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--save", action="store_true", help="also write a dated file under benchmarks/results")
    return arguments


def add_folder(arguments: argparse.ArgumentParser) -> None:
    """Add `--folder`, for what takes long to make."""
    arguments.add_argument("--folder", type=Path, help="keep (and find again) the caches here")


@contextmanager
def kept_or_scratch(folder: Path | None) -> Iterator[Path]:
    """The folder that was given, made where it is missing; or one that is removed at the end."""
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def hardware() -> str:
    """A short name of this machine for file names."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name().split()[-1].lower()
    return f"{os.cpu_count()}cpu"


def machine(packages: Sequence[str] = PACKAGES) -> str:
    """One line: processor, cores, GPU, Python and the versions of those packages that are installed."""
    import torch

    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    parts = [model, f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    parts.append(f"Python {platform.python_version()}")
    return ", ".join(parts + [f"{name} {found}" for name in packages if (found := _version(name))])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def publish(
    theme: str, command: str, body: str, save: bool, packages: Sequence[str] = PACKAGES, out: Path | None = None
) -> None:
    """Print the result; with `save` write it to results/<theme>_<hardware>_<date>.md, with `out` to that file."""
    today = datetime.date.today().isoformat()
    text = f"# {theme}, {today}\n\n`{command}` on {machine(packages)}.\n\n{body}\n"
    print(text)
    if save and out is None:
        RESULTS.mkdir(exist_ok=True)
        out = RESULTS / f"{theme}_{hardware()}_{today}.md"
    if out is not None:
        out.write_text(text)
        print(f"written to {out}")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
