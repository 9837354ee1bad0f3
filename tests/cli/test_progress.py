"""The lines that a dump prints while it runs."""

from __future__ import annotations

import pytest

from logitcache.cli.progress import DumpView


@pytest.mark.parametrize(
    ("caches", "said"), [(1, "17.0 B/token, 0:00 left\n"), (3, "17.0 B/token in 3 caches together, 0:00 left\n")]
)
def test_bytes_of_several_caches(caches: int, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """They are added up: who waits for a disk to fill wants to know of all."""
    with DumpView(caches=caches) as view:
        view.advance(100, 100, 100, 1700)
    line = capfd.readouterr().err
    assert line.startswith("dump: 100%, 100 of 100 tokens, ")
    assert line.endswith(said)
