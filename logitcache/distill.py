"""`logitcache train`: a student learns from a cache. A composition; the parts do the work."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.integrations.integration_utils import get_available_reporting_integrations

import logitcache
from logitcache import models
from logitcache.corpus import expand_paths, iter_documents, pack, resolve_policy
from logitcache.errors import LogitcacheError, TrainingError, UsageError
from logitcache.reader import CacheDataset, ReaderOptions, make_batch
from logitcache.store import open_cache
from logitcache.store.location import refuse_url
from logitcache.training import DistillationTrainer, evaluate_blocks
from logitcache.training.load import check_fits, load_student
from logitcache.training.options import TrainOptions
from logitcache.training.pinned import open_pinned
from logitcache.training.records import MetricsLog, RecordCallback, last_whole_checkpoint, plot_losses
from logitcache.training.settings import settings_for

# Options that name files or folders.
_PATHS = ("cache", "student", "out", "held_out_cache", "eval_text", "tokenizer")

StepProgress = Callable[[int, int, dict[str, float]], None]


def run_training(options: TrainOptions, resume: bool = False, progress: StepProgress | None = None) -> dict[str, Any]:
    """Train a student and write it to `options.out`, a folder that `AutoModelForCausalLM.from_pretrained` loads.

    The folder also gets metrics.jsonl, loss.png, run.json (options, cache fingerprint, versions) and checkpoints/.

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
    if resume and run.result_path.exists():
        return dict(json.loads(run.result_path.read_text()))
    with _writing(run.out):
        return run.train(progress or (lambda step, total, metrics: None))


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written, which torch and safetensors report in ways of their own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{out} cannot be written ({reason}); make room there ({shutil.disk_usage(out).free:,} bytes are free) and "
            "go on with --resume"
        ) from error


class _Run:
    """One training run: checks everything first, then trains."""

    def __init__(self, options: TrainOptions, resume: bool) -> None:
        self.options = options
        self.out = Path(options.out)
        refuse_url(self.out)
        self.record_path, self.result_path = self.out / "run.json", self.out / "result.json"
        (self.cache,) = open_pinned([options.cache], options.partial, self.record_path)
        self.held_out_cache = open_cache(options.held_out_cache) if options.held_out_cache else None
        self._check_caches()
        self.settings = settings_for(options, self.cache)
        self.train_blocks, self.eval_blocks = self._split()
        self.batch_blocks = max(1, round(options.batch_tokens / self.cache.block_length))
        self.steps = self._count_steps()
        self.checkpoint = self._find_checkpoint(resume)
        self.tokenizer = self._load_tokenizer()
        self.other_domain = self._other_domain()
        self.device = models.choose_device(options.device)
        self._check_reporters()
        self.arguments = self._arguments()
        transformers.set_seed(options.seed)
        self.student = load_student(options.student, self.cache, self.tokenizer, options.seed)
        if self.held_out_cache is not None:
            check_fits(self.student, options.student, self.held_out_cache)

    def train(self, progress: StepProgress) -> dict[str, Any]:
        self._write_record()
        metrics = MetricsLog(self.out / "metrics.jsonl")
        dataset = self._dataset()
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
        return self._finish(trainer, metrics)

    @property
    def _step_blocks(self) -> int:
        return self.batch_blocks * self.options.accumulate

    def _finish(self, trainer: DistillationTrainer, metrics: MetricsLog) -> dict[str, Any]:
        rows = metrics.rows()
        final: dict[str, Any] = next((row for row in reversed(rows) if "eval_ce" in row), {})
        if final.get("step") != self.steps:
            final = trainer.evaluate()
            rows = metrics.rows()
        rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        models.save_model(self.student, self.out, self.tokenizer)
        plot_losses(rows, self.out / "loss.png", f"{self.out.name}: {self.settings.objective.kind}")
        result = {
            **{name: value for name, value in final.items() if name.startswith("eval_")},
            "steps": self.steps,
            "tokens": self.steps * self._step_blocks * self.cache.block_length,
            "tokens_per_second": sorted(rates)[len(rates) // 2] if rates else 0.0,
        }
        self.result_path.write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _check_caches(self) -> None:
        other = self.held_out_cache
        if other is None:
            return
        mine, theirs = self.cache.manifest.identity.tokenizer, other.manifest.identity.tokenizer
        if mine.get("sha256") != theirs.get("sha256"):
            raise TrainingError(
                f"the held-out cache {other.location} was made with another tokenizer "
                f"({str(theirs.get('sha256'))[:12]}) than {self.cache.location} ({str(mine.get('sha256'))[:12]}); "
                "dump it with the same teacher"
            )

    def _split(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Blocks [first, stop) to train on and to evaluate on: the cache's end is held out."""
        total = self.cache.num_blocks
        if self.cache.num_tokens == total:
            raise TrainingError(
                f"{self.cache.location} holds one token a block and so no next token to learn; dump a larger corpus"
            )
        if self.held_out_cache is not None:
            return (0, total), (0, self.held_out_cache.num_blocks)
        held = round(total * self.options.held_out)
        held = max(1, held) if self.options.held_out > 0 else 0
        if held >= total:
            raise TrainingError(
                f"{self.cache.location} has only {total} blocks, too few to hold some out; "
                "use --held-out 0 or a larger cache"
            )
        return (0, total - held), (total - held, total)

    def _count_steps(self) -> int:
        options, (first, stop) = self.options, self.train_blocks
        if options.max_steps is not None:
            return options.max_steps
        step_tokens = self.batch_blocks * options.accumulate * self.cache.block_length
        tokens = options.max_tokens or options.epochs * (stop - first) * self.cache.block_length
        return max(1, round(tokens / step_tokens))

    def _find_checkpoint(self, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        """Check that the folder is free, or that it holds this same run; then its last checkpoint. Writes nothing."""
        if self.out.exists() and not self.out.is_dir():
            raise TrainingError(f"{self.out} is a file; choose another folder for --out")
        if self.record_path.exists():
            if not resume:
                raise TrainingError(f"{self.out} holds a run already; go on with --resume or choose another --out")
            self._check_same_run(self._stored_record())
            return last_whole_checkpoint(self.out / "checkpoints")
        if self.out.is_dir() and {entry.name for entry in self.out.iterdir()} - {self._unfinished_record.name}:
            raise TrainingError(f"{self.out} is not empty and holds no run; choose another folder for --out")
        if resume:
            raise TrainingError(f"{self.out} holds no run to resume; start it without --resume")
        return None

    @property
    def _unfinished_record(self) -> Path:
        return self.record_path.with_suffix(".tmp")

    def _write_record(self) -> None:
        """Make the folder. Comes after every check, so that a refused start leaves nothing behind."""
        if not self.record_path.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            self._unfinished_record.write_text(json.dumps(self._record(), indent=1) + "\n")
            self._unfinished_record.replace(self.record_path)

    def _stored_record(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.record_path.read_text()))
        except ValueError as error:
            raise TrainingError(f"{self.record_path} is damaged ({error}); choose another --out") from error

    def _record(self) -> dict[str, Any]:
        return {
            "options": {
                key: _absolute(value) if key in _PATHS else value
                for key, value in self.options.model_dump(mode="json").items()
            },
            "cache_fingerprint": self.cache.fingerprint,
            "units": [self.cache.num_units],
            "steps": self.steps,
            "versions": {
                "logitcache": logitcache.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        mine = self._record()
        rows = [
            f"\n  {key}: the run has {stored['options'].get(key)!r}, now {value!r}"
            for key, value in mine["options"].items()
            if stored["options"].get(key) != value and key not in ("cache", "out", "device")
        ]
        if stored["cache_fingerprint"] != mine["cache_fingerprint"]:
            rows.append("\n  the cache's content is another one")
        if rows:
            raise TrainingError(
                f"{self.out} was begun with other options; repeat those or choose another --out. The difference:"
                + "".join(rows)
            )

    def _load_tokenizer(self) -> Any:
        """The tokenizer of the cache, from --tokenizer or from where the teacher was; None when it is not there."""
        wanted = self.cache.manifest.identity.tokenizer.get("sha256")
        origin = self.cache.manifest.origin
        try:
            if self.options.tokenizer is not None:
                tokenizer = models.load_tokenizer(self.options.tokenizer)
            elif origin.teacher:
                tokenizer = models.load_tokenizer(origin.teacher, origin.gguf_file)
            else:
                return None
        except LogitcacheError:
            if self.options.tokenizer is not None or self.options.eval_text:
                raise
            return None
        found = models.tokenizer_identity(tokenizer)["sha256"]
        if found != wanted:
            raise TrainingError(
                f"the tokenizer has hash {found[:12]}, the cache was made with {str(wanted)[:12]}; "
                "give the teacher's tokenizer with --tokenizer"
            )
        return tokenizer

    def _other_domain(self) -> list[dict[str, Any]]:
        """Batches of plain text of another domain, labels only."""
        if not self.options.eval_text:
            return []
        if self.tokenizer is None:
            raise UsageError("--eval-text needs the teacher's tokenizer; give it with --tokenizer")
        policy = resolve_policy(self.tokenizer, self.cache.block_length)
        files = expand_paths(self.options.eval_text)
        blocks = pack(self.tokenizer, iter_documents(files), policy, self.options.eval_tokens)
        tokens = torch.from_numpy(blocks.tokens.astype("int64"))
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        labels.view(-1)[blocks.num_tokens - 1 :] = -100
        return [
            {
                "input_ids": tokens[start : start + self.batch_blocks],
                "labels": labels[start : start + self.batch_blocks],
            }
            for start in range(0, len(tokens), self.batch_blocks)
        ]

    def _dataset(self) -> CacheDataset:
        first, stop = self.train_blocks
        options = ReaderOptions(
            self.batch_blocks,
            seed=self.options.seed,
            first_block=first,
            stop_block=stop,
            with_targets=not self.settings.labels_only,
            pin_memory=self.device.type == "cuda",
        )
        return CacheDataset(self.cache, options)

    def _evaluate(self, model: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        metrics: dict[str, float] = {}
        first, stop = self.eval_blocks
        if stop > first:
            source = self.held_out_cache or self.cache
            stop = min(stop, first + max(1, self.options.eval_tokens // source.block_length))
            starts = range(first, stop, self.batch_blocks)
            batches = (
                make_batch([source.read_blocks(start, min(stop, start + self.batch_blocks))]) for start in starts
            )
            metrics |= evaluate_blocks(model, batches, source.unbiased, device)
        if self.other_domain:
            other = evaluate_blocks(model, self.other_domain, False, device)
            metrics |= {"other_ce": other["ce"], "other_ece": other["ece"]}
        return metrics

    def _check_reporters(self) -> None:
        for name in self.options.report_to:
            if name not in (there := get_available_reporting_integrations()):
                raise UsageError(
                    f"report_to: {name!r} is not installed or does not exist; install its package or choose of: "
                    f"{', '.join(sorted(there)) or 'none is installed'}"
                )

    def _arguments(self) -> transformers.TrainingArguments:
        options = self.options
        log_every = min(options.log_every, self.steps)
        # Whole numbers of log intervals, so that a resumed run logs the same averages.
        save_every = options.save_every or max(1, self.steps // 5)
        save_every = -(-save_every // log_every) * log_every
        wsd = {"num_decay_steps": max(1, self.steps // 5)} if options.lr_schedule == "wsd" else {}
        names = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
        return transformers.TrainingArguments(
            output_dir=str(self.out / "checkpoints"),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_blocks,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.learning_rate,
            lr_scheduler_type=names.get(options.lr_schedule, options.lr_schedule),
            lr_scheduler_kwargs=wsd,
            warmup_steps=round(options.warmup * self.steps),
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            adam_beta2=0.95,
            seed=options.seed,
            bf16=options.dtype == "bfloat16",
            use_cpu=self.device.type == "cpu",
            eval_strategy="steps",
            eval_steps=options.eval_every or max(1, self.steps // 5),
            save_steps=save_every,
            save_total_limit=2,
            logging_steps=log_every,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to=list(options.report_to),
            remove_unused_columns=False,
            ignore_data_skip=True,
        )


def _absolute(value: Any) -> Any:
    """Paths that exist, made absolute: a run is the same from whichever folder it is resumed."""
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value
