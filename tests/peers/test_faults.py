"""Faults of other tools' losses, each reproduced from its published formula; ours on the same inputs has none.

`python -m benchmarks.peer_faults` runs the projects' own code; they are not dependencies of these tests.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import peer_cases, peer_code, peer_faults
from benchmarks.peer_cases import CASES, Case
from logitcache.errors import ObjectiveError


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_formula_is_wrong_and_ours_is_not(case: Case) -> None:
    theirs, ours = case.measure(case.formula), case.measure(case.ours)
    assert not math.isfinite(theirs) or theirs > 10 * case.tolerance
    assert 0 <= ours < case.tolerance


@pytest.mark.parametrize("name", ["axolotl-t2", "trl-clamp", "liger-bf16", "torchtune-inf", "modelopt-mean"])
def test_the_measure_tells_right_from_wrong(name: str) -> None:
    """The formula without its fault measures as right: the case blames what it names, and nothing else."""
    case = next(case for case in CASES if case.name == name)
    corrected = {
        "axolotl-t2": lambda h, w, ids, log_q, t: t**2 * _renormalised(h @ w.T, ids, log_q, t),
        "trl-clamp": _bucket_in_float64,
        "liger-bf16": lambda h, w, t: _dense(h.float() @ w.float().T, t.float() @ w.float().T),
        "torchtune-inf": lambda student, teacher: _reverse_on(student[:, :60], teacher[:, :60]),
        "modelopt-mean": _dense,
    }
    assert case.measure(corrected[name]) < case.tolerance


def _renormalised(logits: torch.Tensor, ids: torch.Tensor, log_q: torch.Tensor, t: float) -> torch.Tensor:
    log_p, log_q = (logits.gather(1, ids) / t).log_softmax(1), (log_q / t).log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()


def _dense(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()


def _reverse_on(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return _dense(teacher, student)


def _bucket_in_float64(student: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    ids = student.topk(k, dim=1).indices
    log_p, log_q = (z.double().log_softmax(1) for z in (student, teacher))
    parts = [torch.cat([x.gather(1, ids), x.scatter(1, ids, -math.inf).logsumexp(1, True)], 1) for x in (log_q, log_p)]
    return (parts[0].exp() * (parts[0] - parts[1])).sum(1).mean()


@pytest.mark.parametrize(
    ("noise", "stated"),
    [(peer_cases.CLOSE, peer_cases.CLOSE_KL), (peer_cases.HALF_WAY, peer_cases.HALF_WAY_KL)],
)
def test_stated_distances(noise: float, stated: float) -> None:
    hidden, weight, teacher = (tensor.double() for tensor in peer_cases.near_teacher(noise))
    assert float(_dense(hidden @ weight.T, teacher @ weight.T)) == pytest.approx(stated, rel=0.03)


def test_bucket_is_refused_where_distillkit_is_wrong() -> None:
    ids = torch.tensor([[0, 1]])
    targets = peer_cases._targets(ids, torch.tensor([[0.5, 0.3]]), torch.tensor([0.2]))
    with pytest.raises(ObjectiveError, match="tail mass at that temperature"):
        peer_cases._ours_on_logits(torch.zeros(1, 4), targets, objective=peer_cases.BUCKET, temperature=2.0)


def test_table_names_what_is_not_run() -> None:
    """Every case has a loader; one that is missing leaves a reason, and the row keeps its other figures."""
    loaders = peer_code.peers(None)
    assert loaders.keys() == {case.name for case in CASES}
    case = next(case for case in CASES if case.name == "distillkit-teacher")
    cells, reason = peer_faults.row(case, loaders[case.name])
    assert cells[4:6] == ["not run", "NaN"]
    assert len(cells) == len(peer_faults.HEADER)
    assert reason is not None
    assert "--distillkit" in reason


def test_files_load_without_their_parents(tmp_path: Path) -> None:
    """Neither a parent's `__init__` nor a heavy sibling is run, and the file's own imports work."""
    package = tmp_path / "peer_of_test" / "losses"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('heavy')")
    (package / "helper.py").write_text("TWO = 2")
    (package / "kl.py").write_text(
        "from peer_of_test.losses.helper import TWO\nfrom ..trainer import absent\nvalue = TWO"
    )
    stand_ins = {"peer_of_test.trainer": {"absent": None}}
    assert peer_code.load("peer_of_test.losses.kl", tmp_path, stand_ins).value == 2
    (package / "broken.py").write_text("import no_such_module_anywhere")
    with pytest.raises(peer_code.Missing, match="no_such_module_anywhere"):
        peer_code.load("peer_of_test.losses.broken", tmp_path)
    with pytest.raises(peer_code.Missing, match="not installed"):
        peer_code.version("no-such-distribution-anywhere")
