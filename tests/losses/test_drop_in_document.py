"""The examples of docs/drop_in.md run, in order, as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from logitcache.losses import patch_forward
from logitcache.targets import SparseTargets
from tests.caches import Dumped
from tests.tiny import save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "drop_in.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a cache and a student."""
    (tmp_path / "cache").symlink_to(dumped.sample)
    save_tiny(tmp_path / "student", seed=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return tmp_path


def test_training(folder: Path) -> None:
    assert len(EXAMPLES[0].splitlines()) <= 30
    values: dict[str, Any] = {"torch": torch}
    exec(EXAMPLES[0], values)
    assert values["trainer"].state.global_step == 20
    divergences = []
    for saved in ("student", "run/student"):
        values["student"] = patch_forward(AutoModelForCausalLM.from_pretrained(saved))
        exec(EXAMPLES[1], values)
        divergences.append(values["kl"].item())
    assert divergences[1] < 0.95 * divergences[0]


def test_a_split_head(folder: Path) -> None:
    """In a group of one process."""
    values: dict[str, Any] = {
        "hidden": torch.randn(3, 4, requires_grad=True),
        "weight_rows": torch.randn(7, 4, requires_grad=True),
        "labels": torch.tensor([0, 3, 6]),
        "group": None,
    }
    values["targets"] = SparseTargets([0, 1, 2, 3], [1, 2, 6], [0.5, 0.4, 0.9])
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        exec(EXAMPLES[2], values)
        values["loss"].backward()
    finally:
        dist.destroy_process_group()
    assert values["weight_rows"].grad is not None
    assert len(EXAMPLES) == 3
