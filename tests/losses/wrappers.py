"""What each rank of the tests of patched models under DDP, FSDP and Trainer runs; free of pytest.

Every check gives the largest error of a gradient, relative to its norm, against the unwrapped model on the whole batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainingArguments

from logitcache.errors import TargetsError
from logitcache.losses import TokenMask, pack_targets, patch_forward
from logitcache.reader import CacheDataset, ReaderOptions, model_inputs
from logitcache.store import open_cache
from logitcache.training import AlphaSchedule, DistillationSettings, DistillationTrainer
from tests.losses.batches import BUCKET, Example
from tests.tiny import tiny_model

EXAMPLE = Example(batch=4, length=12)
FAMILY = "gemma2"
MASK = TokenMask("student-entropy", 0.4, "nothing")


def new_model(tied: bool = True) -> Any:
    return patch_forward(tiny_model(FAMILY, seed=2, tie_word_embeddings=tied).train())


def part(rank: int | None = None) -> dict[str, Any]:
    """The keyword arguments of this rank's half of the batch; of all of it with rank -1."""
    rank = dist.get_rank() if rank is None else rank
    half = slice(None) if rank < 0 else slice(2 * rank, 2 * rank + 2)
    packed = pack_targets(EXAMPLE.targets, (4, 12))
    targets = {name: value[half] if isinstance(value, torch.Tensor) else value for name, value in packed.items()}
    return {"input_ids": EXAMPLE.ids[half], "labels": EXAMPLE.labels[half], "teacher_targets": targets}


def gradients_of(wrapped: Any, named: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One step as Trainer takes it: the sum over the tokens of all ranks; wrappers average gradients over ranks."""
    loss = wrapped(**part(), num_items_in_batch=torch.tensor(EXAMPLE.counted)).loss * dist.get_world_size()
    loss.backward()
    return named()


def worst(ours: dict[str, torch.Tensor], tied: bool = True) -> float:
    """Against one process."""
    model = new_model(tied)
    model(**part(-1)).loss.backward()
    theirs = {name: value.grad for name, value in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - grad).norm() / grad.norm()) for name, grad in theirs.items())


def ddp() -> float:
    model = DistributedDataParallel(new_model())
    return worst(gradients_of(model, lambda: {n: p.grad for n, p in model.module.named_parameters()}))


def fsdp2(head_alone: bool = False) -> float:
    """Layers and the rest in units of their own. `head_alone`: the head too, and the model patched after all that."""
    model = tiny_model(FAMILY, seed=2, tie_word_embeddings=False).train() if head_alone else new_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_alone:
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    if head_alone:
        patch_forward(model, check=False)
    ours = gradients_of(model, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters()})
    return worst(ours, tied=not head_alone)


def fsdp1() -> float:
    model = FullyShardedDataParallel(new_model(), device_id=torch.device("cpu"), use_orig_params=True)

    def named() -> dict[str, torch.Tensor]:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in model.named_parameters()}

    return worst(gradients_of(model, named))


def rounded_targets(model: Any) -> str:
    """The message for floating-point targets under mixed precision, which rounds them before the model sees them."""
    inputs = part()
    floats = {
        name: value.view(torch.float32) if isinstance(value, torch.Tensor) and value.dtype == torch.int32 else value
        for name, value in inputs["teacher_targets"].items()
    }
    try:
        model(**{**inputs, "teacher_targets": floats})
    except TargetsError as error:
        return str(error)
    return "not refused"


def mixed_precision() -> dict[str, Any]:
    bfloat16 = torch.bfloat16
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    two = fully_shard(new_model(), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=bfloat16))
    one = FullyShardedDataParallel(
        new_model(),
        device_id=torch.device("cpu"),
        use_orig_params=True,
        mixed_precision=MixedPrecision(param_dtype=bfloat16, cast_forward_inputs=True),
    )
    return {
        "fsdp2": rounded_targets(two),
        "fsdp1": rounded_targets(one),
        "loss2": float(two(**part()).loss.detach()),
        "loss1": float(one(**part()).loss.detach()),
        "exact": float(new_model()(**part()).loss.detach()),
    }


class Rows(torch.utils.data.Dataset):
    """The sequences of the example one by one, four times; with targets or labels only."""

    def __init__(self, with_targets: bool = True) -> None:
        self.columns = part(-1)
        targets = self.columns.pop("teacher_targets")
        if with_targets:
            self.columns["teacher_targets"] = {name: targets[name] for name in ("ids", "weights", "tail_mass")}

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return torch.utils._pytree.tree_map(lambda column: column[index % 4], self.columns)


def arguments(folder: str, **options: Any) -> TrainingArguments:
    """Four plain steps of SGD on the CPU, each logged."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


def distilled(rank: int, mask: TokenMask | None = None) -> list[dict[str, float]]:
    """What DistillationTrainer logs in four steps over this rank's half of the example, or all of it with rank -1."""
    half = slice(None) if rank < 0 else slice(2 * rank, 2 * rank + 2)
    rows = EXAMPLE.targets.to_device()
    columns = ("ids", "weights", "tail_mass", "label_logprob", "entropy", "threshold")
    targets = {name: getattr(rows, name).unflatten(0, (4, 12))[half].flatten(0, 1) for name in columns}
    batch = {"input_ids": EXAMPLE.ids[half], "labels": EXAMPLE.following[half], "targets": targets}
    settings = DistillationSettings(BUCKET, AlphaSchedule("linear", peak=0.8), mask=mask)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, remove_unused_columns=False)
        trainer = DistillationTrainer(tiny_model(FAMILY, seed=2), args, [batch] * 4, settings)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    names = ("loss", "ce", "divergence", "alpha") if mask is None else ("loss", "ce", "divergence", "kept")
    return [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]


def trained(model: Any, batch: int, accumulate: int = 1, with_targets: bool = True) -> dict[str, Any]:
    """Four steps of transformers' own Trainer over the whole example: losses, and loss and weights after them."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate)
        trainer = Trainer(model, args, torch.utils.data.default_collate, train_dataset=Rows(with_targets))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    found = {"losses": losses, "weights": weights, "processes": trainer.accelerator.num_processes}
    return {**found, "eval": trainer.evaluate(Rows(with_targets))["eval_loss"]}


def from_cache(folder: str, accumulate: int) -> list[float]:
    """Losses of transformers' Trainer on a CacheDataset, as docs/drop_in.md has it."""
    cache = open_cache(folder)
    with tempfile.TemporaryDirectory() as out:
        args = arguments(
            out,
            per_device_train_batch_size=1,
            remove_unused_columns=False,
            gradient_accumulation_steps=accumulate,
            accelerator_config={"dispatch_batches": False},
        )
        trainer = Trainer(
            patch_forward(tiny_model("llama", vocab_size=cache.vocab_size, seed=2)),
            args,
            lambda batches: model_inputs(batches[0], cache.unbiased),
            train_dataset=CacheDataset(cache, ReaderOptions(batch_blocks=3)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def work(cache: str) -> dict[str, Any]:
    return {
        "cache": from_cache(cache, accumulate=1),
        "ddp": ddp(),
        "fsdp2": fsdp2(),
        "fsdp2 head": fsdp2(head_alone=True),
        "fsdp1": fsdp1(),
        "mixed": mixed_precision(),
        "distilled": distilled(dist.get_rank()),
        "masked": distilled(dist.get_rank(), MASK),
        "trainer": trained(new_model(), batch=1, accumulate=2),
    }
