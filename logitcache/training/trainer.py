"""transformers.Trainer with the fused distillation loss: the logits [B, L, V] never exist."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from logitcache import models
from logitcache.losses import DistillationOutput, LossSettings, Objective, TokenMask, pack_targets, patch_forward
from logitcache.targets import DeviceTargets
from logitcache.training.schedules import AlphaSchedule, BlendSchedule


@dataclass(frozen=True)
class DistillationSettings:
    """What is minimised.

    Args:
        objective: the divergence, or `Objective.cross_entropy()` to train on labels alone.
        alpha: weight of the divergence over the run.
        temperature: of the divergence.
        unbiased: whether the batches' targets are unbiased samples.
        has_exact_head: whether those samples say which of them are exact (varopt); None: look, where that is free.
        impl: of the loss, as in `distillation_loss`.
        blend: share of the unbiased term over the run; of tail='blend' only.
        z_loss: coefficient of lse^2, added whatever alpha is.
        mask: which positions keep the divergence; None: all that count.
    """

    objective: Objective
    alpha: AlphaSchedule = field(default_factory=AlphaSchedule)
    temperature: float = 1.0
    unbiased: bool = False
    impl: str = "auto"
    has_exact_head: bool | None = None
    blend: BlendSchedule = field(default_factory=BlendSchedule)
    z_loss: float = 0.0
    mask: TokenMask | None = None

    @property
    def labels_only(self) -> bool:
        """Whether the teacher's rows are not read at all."""
        return not self.objective.reads_targets or (self.alpha.kind == "constant" and self.alpha.peak == 0)

    @property
    def of_a_step(self) -> LossSettings:
        """What the patched model is told once; alpha and blend come with each step."""
        return LossSettings(
            Objective.cross_entropy() if self.labels_only else self.objective,
            temperature=self.temperature,
            impl=self.impl,
            z_loss=self.z_loss,
            unbiased=self.unbiased,
            has_exact_head=self.has_exact_head,
            mask=self.mask,
        )


class DistillationTrainer(Trainer):
    """Trains a causal language model on batches of cached teacher rows.

    Args:
        model: a transformers causal language model.
        args: TrainingArguments with `max_steps` set; `remove_unused_columns` must be False.
        train_dataset: iterable of batches as `CacheDataset` yields them, already sliced for this rank, or of plain
            dictionaries of the same tensors.
        settings: what is minimised.
        evaluator: called as evaluator(model) for `evaluate`; returns metrics without the "eval_" prefix.
        Further keywords go to transformers.Trainer.

    Logged besides Trainer's own values: `ce` and `divergence` (nats per counted token), `z_loss` where there is one
    (with its coefficient, per counted token), `alpha`, `blend` where the objective has one, `kept` where there is a
    mask (share of the labelled tokens that keep the divergence), `tokens_per_second` (labelled ones).
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Iterable[Any],
        settings: DistillationSettings,
        evaluator: Callable[[Any], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        patch_forward(model, settings.of_a_step)
        if evaluator is not None:
            # Trainer wants a dataset before it calls `evaluate`; ours asks the evaluator instead.
            kwargs.setdefault("eval_dataset", [])
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        # The loss is a sum over counted tokens divided by their number over accumulation steps and ranks, which
        # Trainer counts from the labels; ours are aligned with the positions, not shifted.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self.settings, self.evaluator = settings, evaluator
        self._sums: dict[str, torch.Tensor] = {}
        self._clock = 0.0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Evaluating, saving and what callbacks do then does not count against tokens per second."""
        clock, began = self._clock, time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        now = time.perf_counter()
        self._clock = clock + (now - began) if self._clock == clock else now

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with models.quiet():
            super()._save_checkpoint(model, trial)

    def get_train_dataloader(self) -> Any:
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            # A generator of its own: drawing the workers' seed from torch's would shift the dropout of a resumed run.
            generator = torch.Generator().manual_seed(self.args.seed)
            workers = self.args.dataloader_num_workers
            # Without workers a dataset that wants its batches pinned has done so itself, off this thread.
            pin = workers > 0 and self.args.dataloader_pin_memory and self.args.device.type == "cuda"
            return DataLoader(dataset, batch_size=None, num_workers=workers, generator=generator, pin_memory=pin)
        return dataset

    def _prepare_inputs(self, inputs: Any) -> Any:
        if hasattr(inputs, "unpack"):  # one copy, taken apart on the device
            inputs = inputs.to(self.args.device, non_blocking=True).unpack()
        return super()._prepare_inputs(inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's count of what the summed loss is divided by, less the tokens that a mask leaves nothing to."""
        mask = self.settings.mask
        if mask is not None:
            batch_samples = [{"labels": mask.counted_labels(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._clock = time.perf_counter()
        return super()._inner_training_loop(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step, last = self.state.global_step, self.state.max_steps
        output: Any = model(
            input_ids=inputs["input_ids"],
            shift_labels=inputs["labels"],
            teacher_targets=self._targets(inputs),
            alpha=None if self.settings.labels_only else self.settings.alpha.at(step, last),
            blend=self.settings.blend.at(step, last),
            num_items_in_batch=num_items_in_batch,
        )
        loss = output.loss
        # With tokens counted over all ranks, DDP's mean over ranks must be undone.
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        self._record(output, inputs["labels"])
        return (loss, output) if return_outputs else loss

    def _targets(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The teacher's rows, packed: mixed precision of a wrapper must not round them."""
        if self.settings.labels_only:
            return None
        settings = self.settings
        return pack_targets(
            DeviceTargets(**inputs["targets"], unbiased=settings.unbiased, has_exact_head=settings.has_exact_head)
        )

    def _record(self, output: DistillationOutput, labels: torch.Tensor) -> None:
        """Add up what will be logged, on the device and without a synchronisation."""
        columns = {name: getattr(output, name) for name in ("counted", "ce", "divergence", "z_loss", "kept")}
        for name, column in {"labelled": labels != -100, **columns}.items():
            if column is not None:
                # In float64: FSDP rounds what a model returns to the type it computes in.
                total = column.sum(dtype=torch.float64)
                self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            totals = {name: self.accelerator.reduce(value, "sum").item() for name, value in self._sums.items()}
            labelled, counted = (max(1.0, totals.pop(name)) for name in ("labelled", "counted"))
            logs |= {name: value / (labelled if name == "kept" else counted) for name, value in totals.items()}
            logs["tokens_per_second"] = labelled / (time.perf_counter() - self._clock)
            self._clock = time.perf_counter()
            done = max(0, self.state.global_step - 1), self.state.max_steps
            logs["alpha"] = self.settings.alpha.at(*done)
            if self.settings.objective.tail == "blend" and not self.settings.labels_only:
                logs["blend"] = self.settings.blend.at(*done)
            self._sums = {}
        super().log(logs, start_time)

    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        """Run the evaluator, log its metrics under the prefix and return them; without any nothing is logged."""
        if self.evaluator is None:
            return {}
        model: Any = self.model
        training = model.training
        model.eval()
        try:
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator(model).items()}
        finally:
            model.train(training)
        if not metrics:
            return {}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights of a model that FSDP has sharded, gathered on the main rank; every rank calls. None of others."""
        if not isinstance(self.model, FSDPModule):
            return None
        return dict(self.accelerator.get_state_dict(self.model))
