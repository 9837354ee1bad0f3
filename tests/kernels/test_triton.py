"""The Triton kernels: compiled where there is a GPU, otherwise interpreted on the CPU (tests/conftest.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

from logitcache.errors import ObjectiveError
from logitcache.kernels import GatherResult, HeadOptions, triton_gather
from logitcache.kernels.plan import GatherPlan
from logitcache.kernels.triton_launch import Blocks
from tests.kernels.problems import HEADS, LargestTensor, Problem, make_problem, mix
from tests.kernels.test_split import SHAPE, eager, gradients, widened

# numpy warns where the powers at the ids overflow, before they are overwritten.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("lse", "lse_T", "z", "hidden", "weight", "bias")
# Small tiles with several tiles to a range, and a range for every tile. 16 is the least that tensor cores take.
SEVERAL = Blocks(rows=16, columns=16, depth=16, warps=4, stages=2, programs=2)
SINGLE = replace(SEVERAL, programs=1000)
EVERYTHING = (True, True, True)


def run(
    problem: Problem,
    head: HeadOptions | None = None,
    temperature: float = 1.0,
    operand: torch.dtype | None = None,
    width: int | None = None,
    blocks: Blocks | None = None,
    wants: tuple[bool, bool, bool] = EVERYTHING,
) -> list[torch.Tensor | None]:
    """Results, and gradients of their `mix`, on the tested device and back again."""
    head = head or HeadOptions()
    columns = head.columns(problem.weight)
    dtype = operand or problem.hidden.dtype
    plan = GatherPlan(temperature, head.softcap, head.scale, columns, dtype, width)
    tensors = [*(leaf.detach().to(DEVICE) for leaf in problem.leaves), problem.ids.to(DEVICE)]
    lse, lse_t, z = triton_gather.forward(*tensors, plan, blocks)
    assert (lse_t is None) == (temperature == 1)
    outputs = [value.requires_grad_() for value in (lse, z) if value.numel()]
    if lse_t is not None and lse_t.numel():
        outputs.append(lse_t.requires_grad_())
    found = torch.autograd.grad(mix(GatherResult(lse, lse if lse_t is None else lse_t, z)), outputs) if outputs else ()
    by_output = {id(output): grad for output, grad in zip(outputs, found, strict=True)}
    grads = (by_output.get(id(lse)), by_output.get(id(lse_t)), by_output.get(id(z)))
    saved = [None if value is None else value.detach() for value in (lse, lse_t, z)]
    leaves = triton_gather.backward(grads, *tensors, *saved, plan, wants, blocks)
    saved[1] = saved[0] if saved[1] is None else saved[1]
    return [None if value is None else value.cpu() for value in (*saved, *leaves)]


def truth(problem: Problem, head: HeadOptions | None = None, temperature: float = 1.0) -> list[torch.Tensor]:
    exact = widened(problem)
    result = exact.run(head or HeadOptions(), impl="reference", temperature=temperature)
    return [*result, *torch.autograd.grad(mix(result), exact.leaves)]


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the error by norm of the exact value, once the infinite places agree."""
    finite = torch.isfinite(exact)
    assert torch.equal(value[~finite].double(), exact[~finite])
    value, exact = value.detach().double()[finite], exact.detach()[finite]
    return float((value - exact).norm() / exact.norm().clamp(min=1e-30))


def assert_exact(found: list[torch.Tensor | None], exact: list[torch.Tensor], bound: float = 2e-6) -> None:
    for name, value, right in zip(NAMES, found, exact, strict=True):
        assert value is not None
        assert error(value, right) <= bound, (name, error(value, right))


@pytest.mark.parametrize("blocks", [SEVERAL, SINGLE], ids=["several", "single"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_are_the_definition(blocks, name, temperature):
    head = HEADS[name]
    problem = make_problem(columns=head.columns(torch.empty(23, 1)), dtype=torch.float32)
    found = run(problem, head, temperature, width=20, blocks=blocks)
    assert_exact(found, truth(problem, head, temperature))
    columns = head.columns(problem.weight)
    assert (found[4][columns:] == 0).all()
    assert (found[5][columns:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", [HeadOptions(), HeadOptions(softcap=8.0)], ids=["plain", "softcap"])
def test_no_less_exact_than_plain_pytorch_in_the_same_type(dtype, head):
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; without a GPU bfloat16 has no test")
    problem = make_problem(**SHAPE, dtype=dtype)
    problem.hidden = (problem.hidden.detach() * 0.3).requires_grad_()
    exact, plain = truth(problem, head), eager(problem, head)
    split = gradients(problem, "split", head)
    for name, mine, theirs, other, right in zip(NAMES, run(problem, head), plain, split, exact, strict=True):
        assert error(mine, right) <= 2 * error(theirs, right), (name, error(mine, right), error(theirs, right))
        torch.testing.assert_close(mine.float(), other.float(), rtol=2e-2, atol=2e-3 if dtype.itemsize == 2 else 2e-5)


@pytest.mark.parametrize(("width", "programs"), [(None, 1), (None, 2), (None, 4), (16, 4), (17, 4), (48, 2), (3, 1)])
def test_ids_at_borders_of_tiles_ranges_and_slices(width, programs):
    problem = make_problem(n=3, v=64, k=10, dtype=torch.float32)
    borders = [0, 15, 16, 17, 31, 32, 47, 48, 49, 63]
    problem.ids = torch.tensor([borders, [63, -1, 48, 15, -1, 16, -1, 0, 47, 17], [-1] * 10])
    found = run(problem, width=width, blocks=replace(SEVERAL, programs=programs))
    assert_exact(found, truth(problem))


@pytest.mark.parametrize(("v", "k"), [(50, 0), (50, 1), (50, 49), (50, 50), (512, 512)])
def test_from_no_id_to_the_whole_vocabulary(v, k):
    problem = make_problem(n=4, v=v, k=k, dtype=torch.float32)
    found = run(problem, temperature=2.0, blocks=replace(SEVERAL, columns=128 if v == 512 else 16))
    assert_exact(found, truth(problem, temperature=2.0))
    assert (found[0][1] == float("-inf")) == (k == v)
    assert all(torch.isfinite(grad).all() for grad in found[3:])


@pytest.mark.parametrize(
    ("n", "v", "d", "k"), [(1, 1, 1, 0), (1, 1, 1, 1), (17, 3, 1, 2), (2, 5, 100, 3), (65, 70, 3, 1)]
)
def test_odd_shapes(n, v, d, k):
    problem = make_problem(n=max(n, 2), v=v, d=d, k=k, dtype=torch.float32)
    problem = Problem(problem.hidden.detach()[:n].requires_grad_(), problem.weight, problem.bias, problem.ids[-n:])
    assert_exact(run(problem), truth(problem))


def test_no_rows():
    problem = make_problem(n=2, dtype=torch.float32)
    problem.hidden, problem.ids = torch.empty(0, 7, requires_grad=True), problem.ids[:0]
    found = run(problem, temperature=2.0)
    assert [tuple(value.shape) for value in found] == [(0,), (0,), (0, 4), (0, 7), (23, 7), (23,)]
    assert all((grad == 0).all() for grad in found[3:])


def test_a_large_vocabulary():
    problem = make_problem(n=3, v=300_001, d=4, k=12, dtype=torch.float32)
    problem.ids[2] = torch.tensor([300_000, 0, 4095, 4096, 8191, -1, 8192, 262_143, 262_144, 299_999, -1, 150_000])
    blocks = replace(SEVERAL, columns=4096, programs=20) if DEVICE.type == "cpu" else None
    found, plain = run(problem, blocks=blocks), eager(problem, HeadOptions())
    for name, mine, theirs, right in zip(NAMES, found, plain, truth(problem), strict=True):
        assert error(mine, right) <= 2 * error(theirs, right), name


def test_products_in_half_precision_of_a_float32_weight():
    """As under autocast: the weight is converted slice by slice, in both passes, and its gradient is float32."""
    problem = make_problem(n=20, v=70, d=33, dtype=torch.float16)
    wide = replace(problem, weight=problem.weight.detach().float().requires_grad_())
    same = run(problem, blocks=SEVERAL)
    found = run(wide, operand=torch.float16, width=32, blocks=SEVERAL)
    assert [value.dtype for value in found[3:]] == [torch.float16, torch.float32, torch.float16]
    for value, expected in zip(found, same, strict=True):
        torch.testing.assert_close(value.to(expected.dtype), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_types_differ_and_products_are_in_float32(dtypes):
    problem = make_problem(dtype=torch.float32)
    hidden, weight = (leaf.detach().to(dtype) for leaf, dtype in zip(problem.leaves, dtypes, strict=False))
    problem = replace(problem, hidden=hidden.requires_grad_(), weight=weight.requires_grad_())
    found = run(problem, operand=torch.float32, blocks=SEVERAL)
    assert (found[3].dtype, found[4].dtype) == dtypes
    for name, value, right in zip(NAMES, found, truth(problem), strict=True):
        assert error(value, right) <= (2e-6 if value.dtype == torch.float32 else 4e-3), name


def test_tensors_that_are_not_contiguous():
    problem = make_problem(n=20, v=50, d=33, dtype=torch.float32)
    expected = run(problem, blocks=SEVERAL)
    strided = Problem(
        problem.hidden.detach().T.contiguous().T.requires_grad_(),
        torch.stack([problem.weight.detach()] * 2, dim=-1)[..., 1].requires_grad_(),
        torch.stack([problem.bias.detach()] * 2, dim=-1)[:, 0].requires_grad_(),
        problem.ids.T.contiguous().T,
    )
    assert not any(tensor.is_contiguous() for tensor in (*strided.leaves, strided.ids))
    for value, same in zip(run(strided, blocks=SEVERAL), expected, strict=True):
        torch.testing.assert_close(value, same)


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(wants):
    problem = make_problem(dtype=torch.float32)
    everything = run(problem, width=16)
    found = run(problem, width=16, wants=wants)
    for wanted, value, expected in zip(wants, found[3:], everything[3:], strict=True):
        assert (value is not None) == wanted
        assert not wanted or torch.equal(value, expected)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_one_output_alone(output):
    problem = make_problem(dtype=torch.float32)
    plan = GatherPlan(1.5, 2.0, 1.0, 23, torch.float32, None)
    tensors = [*(leaf.detach().to(DEVICE) for leaf in problem.leaves), problem.ids.to(DEVICE)]
    results = triton_gather.forward(*tensors, plan)
    grads = [torch.ones_like(result) if index == output else None for index, result in enumerate(results)]
    found = triton_gather.backward(tuple(grads), *tensors, *results, plan, EVERYTHING)
    exact = widened(problem)
    value = exact.run(HeadOptions(softcap=2.0), impl="reference", temperature=1.5)[output]
    expected = torch.autograd.grad(torch.where(torch.isfinite(value), value, 0.0).sum(), exact.leaves)
    for mine, right in zip(found, expected, strict=True):
        assert error(mine.cpu(), right) <= 2e-6


def test_the_same_bits_every_time_and_no_stalls():
    problem = make_problem(n=40, v=60, d=20, k=9, dtype=torch.float32)
    first = run(problem, temperature=2.0, blocks=SEVERAL)
    tensors = [*(leaf.detach().to(DEVICE) for leaf in problem.leaves), problem.ids.to(DEVICE)]
    plan = GatherPlan(2.0, None, 1.0, 60, torch.float32, None)
    grads = [torch.ones(40, device=DEVICE), torch.ones(40, device=DEVICE), torch.ones(40, 9, device=DEVICE)]
    found = []
    try:
        for _ in range(2):
            results = triton_gather.forward(*tensors, plan, SEVERAL)
            found.append([*results, *triton_gather.backward(grads, *tensors, *results, plan, EVERYTHING, SEVERAL)])
            if DEVICE.type == "cuda":
                # The second time, nothing is left to compile, and nothing may wait for the device.
                torch.cuda.set_sync_debug_mode("error")
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
    assert all(torch.equal(left.cpu(), right) for left, right in zip(found[0][:3], first[:3], strict=True))


def test_no_tensor_of_the_size_of_the_logits():
    problem = make_problem(n=64, v=1000, d=8, k=5, dtype=torch.float32)
    with LargestTensor() as seen:
        run(problem, temperature=2.0, width=100, blocks=replace(SEVERAL, rows=64, columns=128))
    # One tile, counted in bytes: the interpreter copies storages. The logits have 64 * 1000 elements.
    assert seen.numel <= 64 * 128 * 4


def test_nothing_uninitialised_is_read(monkeypatch):
    problem = make_problem(n=19, v=53, k=5, columns=50, dtype=torch.float32)
    problem.weight.data[50:] = problem.bias.data[50:] = float("nan")
    head = HeadOptions(softcap=3.0, logit_scale=0.5, valid_vocab=50)
    expected = run(problem, head, 2.0, width=20, blocks=SEVERAL)
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.isnan(torch.empty(3, device=DEVICE)).all()
        found = run(problem, head, 2.0, width=20, blocks=SEVERAL)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert all(torch.isfinite(grad).all() for grad in found[3:])


def test_softcap_is_exact_from_tiny_to_saturated_logits():
    raw = torch.cat([torch.logspace(-8, 3, 60), -torch.logspace(-8, 3, 60)])
    problem = Problem(torch.ones(1, 1), raw[:, None], torch.zeros(120), torch.arange(120)[None])
    z = run(problem, HeadOptions(softcap=30.0))[2][0].double()
    exact = 30 * torch.tanh(raw.double() / 30)
    assert ((z - exact).abs() <= 1e-6 * exact.abs()).all()


def test_a_confident_row_keeps_the_mass_outside_its_ids():
    problem = Problem(
        torch.tensor([[1.0]]), torch.tensor([[40.0], [-3.0], [2.0], [5.0]]), torch.zeros(4), torch.tensor([[0]])
    )
    torch.testing.assert_close(run(problem)[0], torch.tensor([[-3.0, 2.0, 5.0]]).logsumexp(1))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_stay_finite(scale):
    problem = make_problem(dtype=torch.float32)
    found = run(problem, HeadOptions(logit_scale=scale), blocks=SEVERAL)
    assert torch.isfinite(found[0]).all()
    assert all(torch.isfinite(grad).all() for grad in found[3:])


def test_float64_is_refused():
    with pytest.raises(ObjectiveError, match="no float64"):
        run(make_problem())


def compiled_python(*arguments: str, **environment: str) -> str:
    """Output of a Python process in which kernels are compiled, not interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env={**inherited, **environment}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_why_the_kernels_cannot_run():
    assert triton_gather.available(DEVICE)
    assert not triton_gather.available(torch.device("meta"))
    code = """
import sys, torch, logitcache.kernels
from logitcache.kernels import triton_gather
print("triton" in sys.modules)
sys.modules["triton"] = None
print(triton_gather.unavailable(torch.device("cpu")))
del sys.modules["triton"]
print(triton_gather.unavailable(torch.device("cpu")))
"""
    imported, missing, no_gpu = compiled_python("-c", code).splitlines()
    assert imported == "False"
    assert missing.startswith('impl="triton" needs the package triton (')
    assert missing.endswith('install it, or use impl="split"')
    assert no_gpu == 'impl="triton" needs a CUDA device, but the device is cpu; use impl="split"'


def test_kernels_compile_to_machine_code(tmp_path):
    """Needs no GPU: the compiler and the assembler come with Triton."""
    facts = json.loads(compiled_python("-m", "tests.kernels.compile_triton", TRITON_CACHE_DIR=str(tmp_path)))
    assert len(facts) == 9
    for fact in facts:
        assert fact["machine code"] > 0, fact
        assert fact["fits"], fact
        # float32 is multiplied exactly, half precision on the tensor cores, by warpgroups where Hopper can.
        assert not fact["tf32"], fact
        products = fact["warpgroup products"] + fact["warp products"]
        assert (products > 0) == (fact["dtype"] != "fp32" and fact["name"] != "overwrite"), fact
        assert (fact["warpgroup products"] > 0) == (products > 0 and fact["capability"] == 90 and fact["rows"] > 16), (
            fact
        )
