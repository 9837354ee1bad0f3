"""A teacher behind a server, with prompts and completions, labels alone, and several workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.audit import AuditOptions, audit_cache
from logitcache.dump import run_dump
from logitcache.stats import measure_stats
from logitcache.store import open_cache, verify
from logitcache.teachers import ServerOptions
from tests.corpus.files import write_records
from tests.rollouts import dump, everything, given, mask_of, pairs
from tests.teachers.serving import Serving
from tests.test_dump import content_of

SPECS = ("top-k:7", "label")


def through(server: Serving, model: Path, corpus: Path, *outputs: tuple[str, Path], **changes: Any) -> Any:
    quick = ServerOptions(concurrency=2, backoff=0.01, attempts=3)
    remote = {"teacher": server.url, "tokenizer": str(model), "server": quick, "device": "auto"}
    return given(model.parent, corpus, *outputs, **{**remote, **changes})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("pairs"), "jsonl", pairs(12))


def test_rows_of_completions_and_labels(server: Serving, served_model: Path, corpus: Path, tmp_path: Path) -> None:
    """Those of the model run here, by one process and by two."""
    here, there, both = ([(spec, tmp_path / name / spec) for spec in SPECS] for name in ("here", "there", "both"))
    dump(served_model.parent, corpus, *here, teacher=str(served_model))
    asked = server.set()["asked"]
    run_dump(through(server, served_model, corpus, *there))
    asked = server.set()["asked"] - asked
    run_dump(through(server, served_model, corpus, *both, workers=2))
    for (_, mine), (spec, theirs), (_, shared) in zip(here, there, both, strict=True):
        assert verify(theirs).ok
        local, remote = everything(open_cache(mine)), everything(open_cache(theirs))
        np.testing.assert_array_equal(mask_of(remote), mask_of(local))
        np.testing.assert_array_equal(remote.targets.ids, local.targets.ids)
        np.testing.assert_allclose(remote.targets.label_logprob, local.targets.label_logprob, atol=1 / 32)
        assert np.isnan(remote.targets.entropy).all()
        # One question finds the dialect, and three try it; nothing is asked inside long prompts.
        assert asked == mask_of(local).any(1).sum() + 4 < len(local.tokens) + 4
        assert content_of(shared) == content_of(theirs)
        stats = measure_stats(theirs)
        assert (stats.rows, stats.entropy) == (open_cache(mine).num_counted, None)
        report = audit_cache(theirs, AuditOptions(str(served_model), rows=100, device="cpu"))
        assert (report.verdict, report.files) == ("same teacher", "unknown"), report.sentence
        measures = {figure.measure for figure in report.figures}
        assert measures == ({"label", "rows"} if spec == "top-k:7" else {"label"})
