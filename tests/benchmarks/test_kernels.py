"""The kernel benchmark measures what it says: every contender computes its task, and the numbers are right."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, kernels, report
from benchmarks.head_problem import ALPHA, BUCKET, CE, LIVE, NO_TAIL, SCATTERED, TASKS, Shape, exact, make_problem
from benchmarks.peer_code import Missing
from benchmarks.race import Entry, Stopwatch, check, enter, race, run
from logitcache.losses import Objective
from logitcache.losses.dense import dense_loss

SHAPE, K = Shape(300, 16, 21), 5
PLAIN = [contender for contender in contenders.contenders() if "compile" not in contender.name]


@pytest.fixture
def problem():
    return make_problem(SHAPE, K, torch.float32, "cpu")


def attempt(contender, problem) -> tuple[Entry | None, str]:
    try:
        return enter(contender, problem, K), ""
    except Missing as missing:
        return None, str(missing)


@pytest.mark.parametrize("contender", PLAIN, ids=lambda one: f"{one.name} {one.task}")
def test_contender_computes_its_task(problem, contender) -> None:
    """Loss and gradients against float64. Other projects' where they are installed; else they say why not."""
    ours_or_torch = contender.name.startswith((contenders.EAGER, "logitcache split", "logitcache auto"))
    entry, reason = attempt(contender, problem)
    if entry is None:
        assert not ours_or_torch
        assert any(word in reason for word in ("installed", "import", "CUDA", "impl is", "has no", "No module"))
        return
    check([entry], "cpu")
    assert max(entry.errors) < 2e-5
    assert entry.loss == pytest.approx(exact(problem, contender.task).loss, rel=2e-5)


@pytest.mark.parametrize("task", TASKS)
def test_exact_is_the_written_definition(problem, task: str) -> None:
    """`exact` against `losses/dense.py`, row by row, and its gradients against autograd through the head."""
    tail = {BUCKET: "bucket", NO_TAIL: "unnormalised", SCATTERED: "unnormalised", LIVE: "bucket"}.get(task)
    objective = Objective.cross_entropy() if tail is None else Objective.forward_kl(tail)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (problem.hidden_ND, problem.weight_VD))
    targets = problem.targets
    if task == LIVE:
        teacher = (problem.teacher_ND.double() @ weight.detach().T).softmax(1)
        everything = torch.arange(SHAPE.v).expand(SHAPE.n, -1)
        targets = replace(targets, ids=everything, weights=teacher, tail_mass=torch.zeros(SHAPE.n))
    alpha = {CE: 0.0, BUCKET: ALPHA, NO_TAIL: ALPHA}.get(task, 1.0)
    loss = dense_loss(hidden @ weight.T, problem.labels_N, targets, objective, alpha).mean()
    loss.backward()
    truth = exact(problem, task)
    assert truth.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    assert (truth.dhidden_ND - hidden.grad).norm() < 1e-9 * hidden.grad.norm()
    problem.hidden_ND.grad, problem.weight_VD.grad = hidden.grad.float(), weight.grad.float()
    assert max(truth.errors(problem)) < 1e-7


def test_errors_are_relative_frobenius_norms(problem) -> None:
    entry = enter(next(one for one in PLAIN if one.name == contenders.EAGER and one.task == CE), problem, K)
    run(entry)
    problem.hidden_ND.grad *= 1.01
    problem.weight_VD.grad *= 0.97
    assert exact(problem, CE).errors(problem) == pytest.approx((0.01, 0.03), rel=1e-3)


def test_problem_is_a_teachers(problem) -> None:
    """The stored rows are the top of the teacher's softmax, smaller K are its head, and the tail is the rest."""
    p = (problem.teacher_ND @ problem.weight_VD.detach().T).softmax(1)
    top = p.topk(3, dim=1)
    small = problem.with_k(3).targets
    torch.testing.assert_close(small.ids, top.indices.sort(1).values)
    torch.testing.assert_close(small.tail_mass, 1 - top.values.sum(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(small.weights, p.gather(1, small.ids))
    assert small.tail_mass.min() >= problem.targets.tail_mass.min() > 0


def test_a_contender_that_fails_is_left_out(problem) -> None:
    def broken(problem):
        return lambda: torch.zeros(2).view(3)

    with pytest.raises(Missing, match="RuntimeError: shape"):
        enter(contenders.Contender("broken", CE, 3, broken), problem, K)
    assert problem.hidden_ND.grad is None


def test_every_contender_runs_once_a_round(problem) -> None:
    order: list[str] = []

    def recorder(name: str) -> contenders.Contender:
        def make(problem):
            return lambda: order.append(name) or (problem.hidden_ND.sum() + problem.weight_VD.sum())

        return contenders.Contender(name, CE, 3, make)

    entries = [enter(recorder(name), problem, K) for name in "ab"]
    products = race(entries, 3, Stopwatch("cpu", "cpu"))
    assert order == list("ab" * 4), "a warm-up each, then three rounds by turns"
    assert len(products) == len(entries[0].total) == len(entries[1].forward) == 3
    assert all(total >= forward >= 0 for total, forward in zip(entries[0].total, entries[0].forward, strict=True))


def test_ratios_are_medians_within_rounds(problem) -> None:
    """A round that is slow for all leaves the ratios alone."""
    one, two = (enter(PLAIN[0], problem, K) for _ in range(2))
    one.total, two.total = [10.0, 100.0, 12.0], [20.0, 200.0, 24.0]
    assert two.ratio(one) == 2
    assert one.over_floor([5.0, 50.0, 6.0]) == pytest.approx(2 / 3)
    assert (one.median, one.spread) == (12, pytest.approx((56 - 11) / 2 / 12))


PEAK = """
import torch
from benchmarks import measure

warm = torch.ones(20_000_000)
del warm

def job():
    first = torch.ones(10_000_000)
    second = first + 1
    del first
    second.add_(torch.ones(10_000_000))

print(measure.peak_beyond(job))
"""


def test_peak_is_what_was_held_at_once() -> None:
    """Two blocks of 40 MB at a time, three in all; memory that was freed before does not hide them.

    In a process of its own: what an old one has freed here and there its allocator may hold or give back.
    """
    said = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    assert float(said.stdout) == pytest.approx(80, abs=4)


def test_table_and_targets(tmp_path: Path) -> None:
    """The whole command, at a shape of seconds: all K for the essential contenders, the middle one for the others."""
    out = tmp_path / "kernels.md"
    options = ["--shape", "50000,3,4", "--k", "2", "--k", "4", "--k", "7", "--rounds", "2", "--without", "compile"]
    kernels.main([*options, "--device", "cpu", "--out", str(out)])
    text = out.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == list(kernels.HEADER)
    assert {len(row) for row in rows} == {len(kernels.HEADER)}
    named = {(row[0], row[1], row[2]) for row in rows}
    assert {(BUCKET, contenders.EAGER, k) for k in "247"} | {(CE, contenders.EAGER, "-")} <= named
    assert {row[2] for row in rows if "reference" in row[1] and row[0] == BUCKET} == {"4"}
    assert sum(row[7] == "1.00" and row[1] == contenders.EAGER for row in rows) == 5
    assert text.count("target at most") == 4
    assert "V 50,000, D 3, N 4, float32" in text
    assert "Liger fused linear CE: its kernels are for CUDA" in text


def test_essential_contenders_and_no_targets(capsys: pytest.CaptureFixture[str]) -> None:
    """A batch of fewer rows than the head is wide says why it has no targets."""
    kernels.main(["--shape", "50000,8,3", "--k", "4", "--rounds", "2", "--essential", "--device", "cpu"])
    text = capsys.readouterr().out
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| CE")]
    assert [(task.strip(), name.strip()) for task, name in rows] == [
        (BUCKET, contenders.EAGER),
        (BUCKET, "logitcache split"),
        (BUCKET, "logitcache auto"),
    ]
    assert "No targets for batches of fewer rows" in text
    assert "target at most" not in text


def test_needs_nothing_but_torch() -> None:
    """A GPU machine has torch, triton and this repository, and not our other dependencies."""
    code = "import sys, benchmarks.kernels; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "torch" in loaded
    heavy = {"transformers", "zarr", "numcodecs", "pcodec", "pyarrow", "pydantic", "click", "rich", "liger_kernel"}
    assert not loaded & heavy


def test_missing_packages_have_no_version() -> None:
    line = report.machine(("torch", "no-such-distribution-anywhere"))
    assert f"torch {torch.__version__}" in line
    assert "no-such" not in line
