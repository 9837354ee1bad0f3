"""An audit of a real teacher's caches: its own rows, and the same moved by one position."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcache.audit import AuditOptions, audit_cache
from logitcache.demo import plays, teacher_folder
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.selection import Selection
from tests.audit.caches import moved, rewritten

pytestmark = pytest.mark.real_teacher


def test_right_and_moved_rows(tmp_path: Path) -> None:
    teacher, corpus = str(teacher_folder()), (str(plays()["hamlet"]),)
    outputs = (
        Output(Selection.parse("sample:25"), tmp_path / "drawn"),
        Output(Selection.parse("top-k:16"), tmp_path / "top"),
    )
    run_dump(DumpOptions(teacher, corpus, outputs, block_length=64, max_tokens=256))
    report = audit_cache(tmp_path / "drawn", AuditOptions(teacher, rows=120))
    assert (report.verdict, report.files, report.blocks) == ("same teacher", "same", 4)
    assert all(figure.mean < 2e-5 for figure in report.figures if figure.measure != "draws")
    report = audit_cache(rewritten(tmp_path / "top", tmp_path / "moved", moved(1)), AuditOptions(teacher, rows=120))
    assert report.verdict == "different"
    assert report.fits_exactly
    assert "rows stand one too late" in report.sentence
