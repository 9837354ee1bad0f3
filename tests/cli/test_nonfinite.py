"""What the commands say of rows that were left out because the teacher's logits were not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from logitcache.store import open_cache
from tests.cli.conftest import Main
from tests.store.caches import rewrite
from tests.test_dump import LENGTH
from tests.test_nonfinite import everything, followed, make_place


def test_how_many_rows_were_left_out(tmp_path: Path, logitcache: Main) -> None:
    place, root = make_place(tmp_path), tmp_path / "cache"
    line = ["dump", "--teacher", place / "teacher", "--corpus", place / "corpus", "--device", "cpu", "--out", root]
    line += ["--select", "top-k:7", "--block-length", LENGTH, "--nonfinite", "mask"]
    planned = logitcache(*line, "--dry-run")
    assert planned.status == 0, planned.err
    assert "the angle is not known: the teacher's logits are NaN or infinite where it is measured" in planned.out
    made = logitcache(*line)
    count = open_cache(root).num_nonfinite
    said = f"Left out, as the teacher's logits are NaN or infinite there: {count} rows"
    assert said in made.out
    assert f'"nonfinite": {count}' in logitcache(*line, "--json").out
    assert said in logitcache("verify", root).out
    assert f"rows left out (NaN or infinite)  {count}" in logitcache("inspect", root).out
    blocks = everything(root)
    assert blocks.counted is not None
    lost = int(np.flatnonzero(followed(blocks) & ~blocks.counted)[0])
    line = ["inspect", root, "--position", lost]
    said = "nothing is stored here: the next token is not one to learn, as in a prompt, or the teacher's"
    assert said in logitcache(*line).out
    # As of blocks of a cache with prompts, too.
    rewrite(root / "manifest.json", counters={"counted": open_cache(root).num_counted})
    assert "rows left out (NaN or infinite)  not known" in logitcache("inspect", root).out
    assert said in logitcache(*line).out
