"""The import ranks of CONTRIBUTING.md, and what may not be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RANKS = [
    {"errors", "progress"},
    {"targets"},
    {"corpus", "models", "selection", "codec", "kernels"},
    {"teachers", "store", "losses"},
    {"reader", "algebra", "interchange", "audit"},
    {"training", "stats"},
    {"dump_options"},
    {"dump_corpus", "dump_batches"},
    {"dump_job", "dump_pipeline"},
    {"dump_unit", "dump_checks"},
    {"engines"},
    {"dump", "distill"},
    {"demo", "bench"},
    {"planning"},
    {"cli"},
]
RANK = {name: number for number, names in enumerate(RANKS) for name in names}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "cli" if relative.parts[0] == "cli" else relative.parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Parts of logitcache that a file imports, at the top or inside functions."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        parts |= {name.split(".")[1] for name in names if name.startswith("logitcache.")}
    return parts & RANK.keys()


SOURCES = sorted(
    path for folder in ("logitcache", "cli") for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"
    or path.parent != ROOT / "logitcache"
)  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = part_of(path)
    wrong = {other for other in imports_of(path) if other != here and RANK[other] >= RANK[here]}
    assert not wrong, f"{here} may not import {wrong}"


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import logitcache",
        "import logitcache.targets, logitcache.codec, logitcache.store, logitcache.selection, logitcache.algebra",
        "import logitcache; logitcache.open_cache, logitcache.verify, logitcache.SparseTargets",
        "import logitcache.interchange",
        "import logitcache.stats",
        "import logitcache.cli.main",
    ],
)
def test_light_imports(statement: str) -> None:
    assert not modules_after(statement) & {"torch", "transformers", "matplotlib", "pyarrow", "botocore"}


def test_import_logitcache_is_bare() -> None:
    assert "numpy" not in modules_after("import logitcache")
