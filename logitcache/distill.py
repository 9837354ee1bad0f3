"""`logitcache train`: a student learns from caches. A composition; the parts do the work."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy
import torch
import transformers

import logitcache
from logitcache import models
from logitcache.errors import LogitcacheError, TrainingError
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.store import Cache
from logitcache.training import DistillationTrainer, evaluate_blocks
from logitcache.training.arguments import training_arguments
from logitcache.training.checks import check_impl, check_shares, remarks_on_batch
from logitcache.training.evaluation import empty_batch, overall
from logitcache.training.load import check_fits, load_student
from logitcache.training.options import TrainOptions
from logitcache.training.pinned import snapshot_units
from logitcache.training.ranks import Ranks
from logitcache.training.records import RecordCallback, diverged, plot_losses
from logitcache.training.run_data import RunData, plain_text_batches
from logitcache.training.run_folder import RunFolder
from logitcache.training.settings import settings_for_all

# Options that name files or folders.
_PATHS = ("cache", "student", "out", "held_out_cache", "eval_text", "tokenizer")

StepProgress = Callable[[int, int, dict[str, float]], None]


def run_training(
    options: TrainOptions,
    resume: bool = False,
    progress: StepProgress | None = None,
    command: Sequence[str] | None = None,
    remark: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a student and write it to `options.out`, a folder that `AutoModelForCausalLM.from_pretrained` loads.

    The folder also gets metrics.jsonl, loss.png, run.json (options, cache fingerprints, versions), train.yaml and
    checkpoints/. Under torchrun every process calls this; they train together, and the main one writes.

    Args:
        options: what to do.
        resume: go on from the last checkpoint of an interrupted run with the same options, by as many processes or
            others; of a finished run, return its result.
        progress: called as progress(step, total_steps, latest metrics), on the main rank.
        command: the command line that asked for this, for run.json.
        remark: called on the main rank, before the first step, with each sentence about what may not be as expected;
            of a finished run, that nothing is left to do.

    Returns:
        The final evaluation's metrics and `steps`, `tokens`, `tokens_per_second`; with early_stop also `best_step`,
        whose student and evaluation these are, and `stopped_at` where that was before the end.

    Raises:
        UsageError, CacheError, ModelError, ObjectiveError, TrainingError: before the first step, when the run makes
        no sense; or DamagedCacheError when stored data turns out damaged.
    """
    ranks = Ranks.of_environment()
    ranks.join()
    with ranks.watching():
        # A dump that goes on may show each rank another snapshot: the main one's holds.
        units = ranks.from_main(ranks.agree(lambda: snapshot_units(options, RunFolder(options.out).units)))
        run = ranks.agree(lambda: _Run(options, resume, ranks, command, units))
        result = run.folder.result() if resume else None
        run.check_same(result)
        if remark is not None and ranks.is_main:
            for sentence in run.remarks if result is None else [_finished(options.out)]:
                remark(sentence)
        if result is not None:
            return result
        with run.folder.writing():
            return run.train(progress or (lambda step, total, metrics: None))


class _Run:
    """One training run: checks everything first, then trains."""

    def __init__(
        self,
        options: TrainOptions,
        resume: bool,
        ranks: Ranks,
        command: Sequence[str] | None,
        units: Sequence[int] | None,
    ) -> None:
        self.options, self.ranks = options, ranks
        self.folder = RunFolder(options.out)
        self.data = RunData(options, units)
        self.settings = settings_for_all(options, self.data.sources)
        self.batch_blocks = max(1, round(options.batch_tokens / self.data.block_length))
        self.steps = self._count_steps()
        self.device = ranks.device(options.device)
        check_impl(options, self.device)
        check_shares(options, self.batch_blocks, self.data.block_length, ranks.world_size)
        self.reading = self._reading()
        self.record = _record(options, self.data, self.steps, ranks, command)
        self.checkpoint, passed_over = self.folder.find_checkpoint(self.record, resume)
        on_batch = remarks_on_batch(options, self._step_blocks, self.data.num_blocks, self.data.block_length)
        self.remarks = [*passed_over, *on_batch]
        self.tokenizer = _load_tokenizer(options, self.data.caches[0])
        self.other_domain = plain_text_batches(
            options, self.tokenizer, self.data.block_length, self.reading.batch_blocks
        )
        self.arguments = training_arguments(
            options, self.folder.checkpoints, self.steps, self.reading.batch_blocks, self.device.type == "cpu"
        )
        transformers.set_seed(options.seed)
        self.student = load_student(options.student, self.data.widest, self.tokenizer, options.seed)
        for held_out in self.data.evaluation:
            check_fits(self.student, options.student, held_out.source)
        # DDP waits for every parameter's gradient; an expert that no token chose has none.
        self.arguments.ddp_find_unused_parameters = any("expert" in name for name, _ in self.student.named_parameters())

    def check_same(self, result: dict[str, Any] | None) -> None:
        """Raise TrainingError unless all ranks see the same caches and the same state of the run."""
        self.ranks.check_same("cache", self.data.fingerprints)
        self.ranks.check_same("checkpoint", self.checkpoint and self.checkpoint[0].name)
        self.ranks.check_same("result", result)

    def train(self, progress: StepProgress) -> dict[str, Any]:
        dataset = self.data.dataset(self.reading)
        done = 0
        if self.checkpoint is not None:
            dataset.load_state_dict(self.checkpoint[1])
            done = self.checkpoint[1]["samples_seen"] // self._step_blocks
        if self.ranks.is_main:
            self.folder.begin(self.record, done if self.checkpoint else -1)
        self.ranks.wait()
        finished = self._load_finished() if done == self.steps or self._was_stopped else None
        trainer = self._trainer(dataset, progress)
        if finished is None:
            with models.errors_only():
                trainer.train(resume_from_checkpoint=str(self.checkpoint[0]) if self.checkpoint else None)
        else:
            # Trainer would take one step more.
            for name in ("global_step", "max_steps", "best_global_step"):
                setattr(trainer.state, name, getattr(finished, name))
        return self._finish(trainer)

    @property
    def _step_blocks(self) -> int:
        return self.batch_blocks * self.options.accumulate

    @property
    def _was_stopped(self) -> bool:
        return self.checkpoint is not None and self.checkpoint[1].get("stopped", False)

    def _count_steps(self) -> int:
        options = self.options
        if options.max_steps is not None:
            return options.max_steps
        tokens = options.max_tokens or options.epochs * self.data.num_blocks * self.data.block_length
        return max(1, round(tokens / (self._step_blocks * self.data.block_length)))

    def _reading(self) -> ReaderOptions:
        return ReaderOptions.for_rank(
            self.batch_blocks,
            self.ranks.rank,
            self.ranks.world_size,
            seed=self.options.seed,
            with_targets=not self.settings.labels_only,
            pin_memory=self.device.type == "cuda",
        )

    def _load_finished(self) -> transformers.TrainerState:
        """The student and state of a run that was killed after its last step."""
        assert self.checkpoint is not None
        folder = self.checkpoint[0]
        state = transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if self.options.early_stop and state.best_global_step:
            folder = folder.with_name(f"checkpoint-{state.best_global_step}")
        self.student = models.load_model(folder, dtype="float32", device=self.device.type)
        return state

    def _trainer(self, dataset: CacheDataset, progress: StepProgress) -> DistillationTrainer:
        def reader_state(step: int) -> dict[str, Any]:
            return dataset.state_at(step * self._step_blocks)

        callbacks: list[Any] = [RecordCallback(self.folder.metrics, reader_state, progress, self.ranks)]
        if self.options.early_stop:
            callbacks.append(transformers.EarlyStoppingCallback(self.options.early_stop))
        trainer = DistillationTrainer(
            self.student, self.arguments, dataset, self.settings, self._evaluate, callbacks=callbacks
        )
        for noisy in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(noisy)
        if self.ranks.rank:
            # Weights are drawn alike on all ranks, dropout is not.
            transformers.set_seed((self.options.seed + self.ranks.rank) % 2**32)
        return trainer

    def _evaluate(self, model: Any) -> dict[str, float]:
        device, blocks = next(model.parameters()).device, self.reading.batch_blocks
        results = {
            one.name: evaluate_blocks(model, one.batches(blocks, self.ranks), one.source.unbiased, device, self.ranks)
            for one in self.data.evaluation
        }
        metrics = overall(results)
        if self.other_domain:
            batches = [batch or empty_batch() for batch in self.ranks.share(self.other_domain)]
            other = evaluate_blocks(model, batches, False, device, self.ranks)
            metrics |= {"other_ce": other["ce"], "other_ece": other["ece"]}
        return metrics

    def _finish(self, trainer: DistillationTrainer) -> dict[str, Any]:
        steps, best = trainer.state.global_step, trainer.state.best_global_step if self.options.early_stop else None
        rows = self.folder.metrics.rows()
        evaluated = (row for row in reversed(rows) if row["step"] == (best or steps) and _is_evaluation(row))
        final: dict[str, Any] | None = self.ranks.from_main(next(evaluated, None))
        if final is None:
            final = trainer.evaluate()
        weights = trainer.whole_weights()
        if not self.ranks.is_main:
            return self.ranks.from_main({})
        result = {
            **{name: value for name, value in final.items() if name.startswith("eval_")},
            "steps": steps,
            "tokens": steps * self._step_blocks * self.data.block_length,
            **({"best_step": best} if best else {}),
            **({"stopped_at": steps} if steps < self.steps else {}),
        }
        if "stopped_at" in result and not any("stopped_at" in row for row in rows):
            trainer.log({"stopped_at": steps})
        self._write(result, weights)
        return self.ranks.from_main(result)

    def _write(self, result: dict[str, Any], weights: dict[str, Any] | None) -> None:
        out, rows = self.folder.path, self.folder.metrics.rows()
        # The last update is seen by no loss, and by no evaluation where nothing is held out.
        for name, weight in (weights or self.student.state_dict()).items():
            if not weight.isfinite().all():
                raise diverged(f"the weight {name} is not finite after step {result['steps']}")
        rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        models.save_model(self.student, out, self.tokenizer, weights)
        plot_losses(rows, out / "loss.png", f"{out.name}: {self.settings.objective.kind}")
        result["tokens_per_second"] = sorted(rates)[len(rates) // 2] if rates else 0.0
        self.folder.finish(result)


def _record(
    options: TrainOptions, data: RunData, steps: int, ranks: Ranks, command: Sequence[str] | None
) -> dict[str, Any]:
    """What run.json says: enough to repeat the run, and to know another one."""
    return {
        "command": None if command is None else list(command),
        "options": {
            key: _absolute(value) if key in _PATHS else value for key, value in options.model_dump(mode="json").items()
        },
        "fingerprints": data.fingerprints,
        "units": [cache.num_units for cache in data.caches],
        "steps": steps,
        "world_size": ranks.world_size,
        "versions": {
            "logitcache": logitcache.__version__,
            **{module.__name__: module.__version__ for module in (torch, transformers, accelerate, numpy)},
            "python": platform.python_version(),
        },
    }


def _finished(out: str) -> str:
    return (
        f"the run in {out} is finished and nothing is left to train; to train its student on, start another run with "
        f"--student {out} and another --out"
    )


def _is_evaluation(row: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is of an evaluation; without held-out blocks, of text of another domain alone."""
    return any(name.startswith("eval_") for name in row)


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
