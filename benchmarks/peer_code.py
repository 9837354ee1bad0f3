"""Other projects' own loss functions, loaded from where they are installed, never from copies.

Most projects pull in gigabytes when imported by name. Their loss files need little, so each file is imported alone:
parent packages are entered without running their `__init__`, and what a file wants from a heavy sibling but does not
run here is a stand-in. Install the projects with

    pip install --no-deps liger-kernel==0.8.5 trl==1.16.0 axolotl==0.19.0 torchtune==0.6.1 nvidia-modelopt==0.47.0

and take DistillKit from its repository (github.com/arcee-ai/DistillKit, commit a61c2e7).

Legend: N rows, V vocabulary, D width, K stored ids per row (the set S).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Loss = Callable[..., torch.Tensor]


class Missing(Exception):
    """A project is not installed, or this machine cannot run it. The message is the reason."""


def load(module: str, folder: Path, stand_ins: Mapping[str, Mapping[str, Any]] | None = None) -> types.ModuleType:
    """Import one file of a package without its parents' `__init__`.

    Args:
        module: dotted name, as the project itself imports the file.
        folder: where the top-level package lies.
        stand_ins: modules not to import, and the names that the file wants from them.
    """
    for name, attributes in (stand_ins or {}).items():
        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(attributes)
        sys.modules.setdefault(name, stand_in)
        _enter(name.rpartition(".")[0], folder)
    _enter(module.rpartition(".")[0], folder)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(str(error).split("\n")[0]) from error


def _enter(package: str, folder: Path) -> None:
    """Make `package` and its parents importable as bare namespaces."""
    parts = package.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if name not in sys.modules:
            bare = types.ModuleType(name)
            bare.__path__ = [str(folder.joinpath(*parts[:count]))]
            sys.modules[name] = bare


def version(distribution: str) -> str:
    """Installed version of a project; Missing if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise Missing(f"{distribution} is not installed") from error


def installed(distribution: str, module: str, **options: Any) -> types.ModuleType:
    """One file of an installed distribution."""
    version(distribution)
    return load(module, Path(str(importlib.metadata.distribution(distribution).locate_file(""))), **options)


def axolotl_kernel() -> Any:
    """axolotl's chunked top-k loss."""
    version("liger-kernel")
    return installed("axolotl", "axolotl.integrations.kd.kernels.liger")


def axolotl_heated() -> Loss:
    """Renormalised KL at a temperature. Their loss is a sum over the rows."""
    kernel = axolotl_kernel()

    def loss(hidden: Any, weight: Any, ids: Any, log_q: Any, temperature: float) -> torch.Tensor:
        module = kernel.LigerFusedLinearKLTopKLogprobLoss(
            0.0, 1.0, temperature, beta=0.0, compiled=False, compute_ce_loss=False
        )
        heated = (log_q / temperature).log_softmax(-1)
        return _axolotl_rows(module, hidden, weight, ids, heated)

    return loss


def axolotl_rounded() -> Loss:
    """KL on S, the student over the whole vocabulary."""
    kernel = axolotl_kernel()

    def loss(hidden: Any, weight: Any, ids: Any, log_q: Any) -> torch.Tensor:
        module = kernel.LigerFusedLinearKLTopKLogprobLoss(
            0.0, 1.0, 1.0, beta=0.0, compiled=False, compute_ce_loss=False, normalize_topk=False
        )
        return _axolotl_rows(module, hidden, weight, ids, log_q.float())

    return loss


def _axolotl_rows(module: Any, hidden: Any, weight: Any, ids: Any, log_q: Any) -> torch.Tensor:
    labels = torch.zeros(1, len(hidden), dtype=torch.int64)
    one_batch = (tensor[None] for tensor in (hidden, ids, log_q, torch.ones_like(ids)))
    total: torch.Tensor = module(weight, *one_batch, true_labels=labels)
    return total / len(hidden)


def distillkit(folder: Path | None) -> Loss:
    """Their sparse KL with a bucket for what is missing."""
    if folder is None:
        raise Missing("not on the package index; name a checkout with --distillkit")
    if not (folder / "distillkit" / "lossfuncs" / "kl.py").exists():
        raise Missing(f"{folder} holds no distillkit/lossfuncs/kl.py")
    kl = load("distillkit.lossfuncs.kl", folder)
    missing = kl.MissingProbabilityHandling.SYMMETRIC_UNIFORM

    def loss(logits: Any, ids: Any, log_q: Any, temperature: float = 1.0) -> torch.Tensor:
        total: torch.Tensor = kl.sparse_kl_div(
            logits[None], ids[None], log_q[None], missing=missing, temperature=temperature
        )
        return total / len(logits)

    return loss


def trl_bucket() -> Loss:
    """Forward KL on the student's top k and a tail."""
    stand_ins = {"trl.trainer.utils": {"selective_log_softmax": None}}
    utils = installed("trl", "trl.experimental.sdpo.loss_utils", stand_ins=stand_ins)

    def loss(student: Any, teacher: Any, k: int) -> torch.Tensor:
        rows: torch.Tensor = utils.compute_topk_self_distillation_loss(
            student, teacher, distillation_topk=k, distillation_alpha=0.0, distillation_add_tail=True
        )
        return rows.mean()

    return loss


def liger_chunked(**options: Any) -> Any:
    """Liger's chunked distillation loss, KL(teacher || student) at beta=0."""
    version("liger-kernel")
    try:
        losses = importlib.import_module("liger_kernel.chunked_loss")
    except Exception as error:  # Anything a package does at import: no Triton, no driver.
        raise Missing(f"liger-kernel does not import here: {error}") from error
    return losses.LigerFusedLinearJSDLoss(beta=0.0, **{"compiled": False, **options})


def liger_dense() -> Loss:
    """One head for both, the same weight."""
    module = liger_chunked(weight_hard_loss=0.0, weight_soft_loss=1.0)

    def loss(hidden: Any, weight: Any, teacher_hidden: Any) -> torch.Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.int64)
        value: torch.Tensor = module(hidden, weight, teacher_hidden, weight.detach(), labels)
        return value

    return loss


def liger_padded() -> Loss:
    """Logits in, through identities as heads: the student's has fewer columns."""
    module = liger_chunked(weight_hard_loss=0.0, weight_soft_loss=1.0)

    def loss(student: Any, teacher: Any) -> torch.Tensor:
        labels = torch.zeros(len(student), dtype=torch.int64)
        heads = torch.eye(student.shape[1]), torch.eye(teacher.shape[1])
        value: torch.Tensor = module(student, heads[0], teacher, heads[1], labels)
        return value

    return loss


def torchtune_reverse() -> Loss:
    """Reverse KL of dense logits."""
    losses = installed("torchtune", "torchtune.modules.loss.kd_losses")
    module = losses.ReverseKLLoss()
    return lambda student, teacher: module(student, teacher, torch.zeros(len(student), dtype=torch.int64))


def modelopt_default() -> Loss:
    """Their logits loss as its constructor makes it."""
    losses = installed("nvidia-modelopt", "modelopt.torch.distill.losses")
    module: Loss = losses.LogitsDistillationLoss()
    return module


def peers(distillkit_folder: Path | None) -> dict[str, Callable[[], Loss]]:
    """What loads the project's own code, for each case of `peer_cases`."""
    kit = {
        f"distillkit-{name}": lambda: distillkit(distillkit_folder) for name in ("teacher", "student", "heated", "bf16")
    }
    return {
        **kit,
        "axolotl-t2": axolotl_heated,
        "axolotl-bf16": axolotl_rounded,
        "trl-clamp": trl_bucket,
        "trl-rounding": trl_bucket,
        "liger-bf16": liger_dense,
        "liger-padding": liger_padded,
        "torchtune-inf": torchtune_reverse,
        "modelopt-mean": modelopt_default,
    }
