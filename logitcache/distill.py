"""`logitcache train`: a student learns from caches. A composition; the parts do the work."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import logitcache
from logitcache import models
from logitcache.errors import LogitcacheError, TrainingError
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.store import Cache
from logitcache.training import DistillationTrainer, evaluate_blocks
from logitcache.training.arguments import training_arguments
from logitcache.training.evaluation import overall
from logitcache.training.load import check_fits, load_student
from logitcache.training.options import TrainOptions
from logitcache.training.records import RecordCallback, plot_losses
from logitcache.training.run_data import RunData, plain_text_batches
from logitcache.training.run_folder import RunFolder
from logitcache.training.settings import settings_for_all

# Options that name files or folders.
_PATHS = ("cache", "student", "out", "held_out_cache", "eval_text", "tokenizer")

StepProgress = Callable[[int, int, dict[str, float]], None]


def run_training(options: TrainOptions, resume: bool = False, progress: StepProgress | None = None) -> dict[str, Any]:
    """Train a student and write it to `options.out`, a folder that `AutoModelForCausalLM.from_pretrained` loads.

    The folder also gets metrics.jsonl, loss.png, run.json (options, cache fingerprints, versions) and checkpoints/.

    Args:
        options: what to do.
        resume: go on from the last checkpoint of an interrupted run with the same options; of a finished run, return
            its result.
        progress: called as progress(step, total_steps, latest metrics).

    Returns:
        The final evaluation's metrics and `steps`, `tokens`, `tokens_per_second`.

    Raises:
        UsageError, CacheError, ModelError, ObjectiveError, TrainingError: before the first step, when the run makes
        no sense; or DamagedCacheError when stored data turns out damaged.
    """
    run = _Run(options, resume)
    if resume and (result := run.folder.result()) is not None:
        return result
    with run.folder.writing():
        return run.train(progress or (lambda step, total, metrics: None))


class _Run:
    """One training run: checks everything first, then trains."""

    def __init__(self, options: TrainOptions, resume: bool) -> None:
        self.options = options
        self.folder = RunFolder(options.out)
        self.data = RunData(options)
        self.settings = settings_for_all(options, self.data.sources)
        self.batch_blocks = max(1, round(options.batch_tokens / self.data.block_length))
        self.steps = self._count_steps()
        self.record = _record(options, self.data, self.steps)
        self.checkpoint = self.folder.find_checkpoint(self.record, resume)
        self.tokenizer = _load_tokenizer(options, self.data.caches[0])
        self.other_domain = plain_text_batches(options, self.tokenizer, self.data.block_length, self.batch_blocks)
        self.device = models.choose_device(options.device)
        self.arguments = training_arguments(
            options, self.folder.checkpoints, self.steps, self.batch_blocks, self.device.type == "cpu"
        )
        transformers.set_seed(options.seed)
        self.student = load_student(options.student, self.data.widest, self.tokenizer, options.seed)
        for held_out in self.data.evaluation:
            check_fits(self.student, options.student, held_out.source)

    def train(self, progress: StepProgress) -> dict[str, Any]:
        self.folder.begin(self.record)
        metrics, dataset = self.folder.metrics, self._dataset()
        state = dataset.state_dict()
        if self.checkpoint is not None:
            state = self.checkpoint[1]
            dataset.load_state_dict(state)
            metrics.cut(state["samples_seen"] // self._step_blocks)
        else:
            metrics.cut(-1)
        finished = state["samples_seen"] == self.steps * self._step_blocks
        if finished and self.checkpoint is not None:
            # Trainer would take one step more.
            self.student = models.load_model(self.checkpoint[0], dtype="float32", device=str(self.device))
        callback = RecordCallback(metrics, lambda step: dataset.state_at(step * self._step_blocks), progress)
        trainer = DistillationTrainer(
            self.student, self.arguments, dataset, self.settings, self._evaluate, callbacks=[callback]
        )
        for noisy in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(noisy)
        if finished:
            trainer.state.global_step = trainer.state.max_steps = self.steps
        else:
            trainer.train(resume_from_checkpoint=str(self.checkpoint[0]) if self.checkpoint else None)
        return self._finish(trainer)

    @property
    def _step_blocks(self) -> int:
        return self.batch_blocks * self.options.accumulate

    def _count_steps(self) -> int:
        options = self.options
        if options.max_steps is not None:
            return options.max_steps
        tokens = options.max_tokens or options.epochs * self.data.num_blocks * self.data.block_length
        return max(1, round(tokens / (self._step_blocks * self.data.block_length)))

    def _dataset(self) -> CacheDataset:
        return self.data.dataset(
            ReaderOptions(
                self.batch_blocks,
                seed=self.options.seed,
                with_targets=not self.settings.labels_only,
                pin_memory=self.device.type == "cuda",
            )
        )

    def _evaluate(self, model: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        results = {
            held_out.name: evaluate_blocks(model, held_out.batches(self.batch_blocks), held_out.source.unbiased, device)
            for held_out in self.data.evaluation
        }
        metrics = overall(results)
        if self.other_domain:
            other = evaluate_blocks(model, self.other_domain, False, device)
            metrics |= {"other_ce": other["ce"], "other_ece": other["ece"]}
        return metrics

    def _finish(self, trainer: DistillationTrainer) -> dict[str, Any]:
        rows = self.folder.metrics.rows()
        final: dict[str, Any] = next((row for row in reversed(rows) if "eval_ce" in row), {})
        if final.get("step") != self.steps:
            final = trainer.evaluate()
            rows = self.folder.metrics.rows()
        rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        out = self.folder.path
        models.save_model(self.student, out, self.tokenizer)
        plot_losses(rows, out / "loss.png", f"{out.name}: {self.settings.objective.kind}")
        result = {
            **{name: value for name, value in final.items() if name.startswith("eval_")},
            "steps": self.steps,
            "tokens": self.steps * self._step_blocks * self.data.block_length,
            "tokens_per_second": sorted(rates)[len(rates) // 2] if rates else 0.0,
        }
        self.folder.finish(result)
        return result


def _record(options: TrainOptions, data: RunData, steps: int) -> dict[str, Any]:
    """What run.json says: enough to repeat the run, and to know another one."""
    return {
        "options": {
            key: _absolute(value) if key in _PATHS else value for key, value in options.model_dump(mode="json").items()
        },
        "fingerprints": data.fingerprints,
        "steps": steps,
        "versions": {
            "logitcache": logitcache.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _absolute(value: Any) -> Any:
    """Paths that exist, made absolute: a run is the same from whichever folder it is resumed."""
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def _load_tokenizer(options: TrainOptions, cache: Cache) -> Any:
    """The tokenizer of the cache, from --tokenizer or from where the teacher was; None when it is not there."""
    origin = cache.manifest.origin
    try:
        if options.tokenizer is not None:
            tokenizer = models.load_tokenizer(options.tokenizer)
        elif origin.teacher:
            tokenizer = models.load_tokenizer(origin.teacher, origin.gguf_file)
        else:
            return None
    except LogitcacheError:
        if options.tokenizer is not None or options.eval_text:
            raise
        return None
    found = models.tokenizer_identity(tokenizer)["sha256"]
    if found != cache.tokenizer:
        raise TrainingError(
            f"the tokenizer has hash {found[:12]}, the cache was made with {cache.tokenizer[:12]}; "
            "give the teacher's tokenizer with --tokenizer"
        )
    return tokenizer
