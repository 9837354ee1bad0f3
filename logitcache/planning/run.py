"""`logitcache plan`: try a sample on this machine and say what the whole dump would take."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from logitcache.bench.yardstick import GradientError, Yardstick
from logitcache.codec import LayoutName, RowCodec
from logitcache.dump_checks import refuse_early, refuse_unfit
from logitcache.dump_job import identity_of, load_teacher, origin_of
from logitcache.dump_options import Output
from logitcache.planning.options import PlanOptions
from logitcache.planning.report import CorpusFacts, DumpPlan, PlannedCache, StudentFacts, worth
from logitcache.planning.sample import Sample, take_sample
from logitcache.planning.sizes import SizeModel, measure_sizes
from logitcache.planning.student import student_rate
from logitcache.planning.trial import RememberedBody, Trial, dump_sample, find_batch, warm_up
from logitcache.progress import Progress, Silent
from logitcache.selection import Selection, chunk_uniforms
from logitcache.teachers import TransformersTeacher

SAMPLE_TOKENS, SAMPLE_TOKENS_CUDA = 8192, 65_536
# Distributions of so many positions are held at once, several times over.
POSITIONS, POSITION_BYTES = 512, 128 << 20


def make_plan(
    options: PlanOptions, progress: Progress | None = None, teacher: TransformersTeacher | None = None
) -> DumpPlan:
    """Dump a sample into a temporary folder and extrapolate. Nothing is written to the outputs of `options.dump`.

    `teacher` is one loaded already.

    Raises:
        UsageError, CorpusError, ModelError, CacheError: as the dump would.
        TrainingError: the student does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="logitcache-plan-") as folder:
        return _Planner(options, progress or Silent(), Path(folder), teacher).plan()


@dataclass(frozen=True)
class _Tried:
    """What is known of one selection.

    Args:
        sizes: by codec.
        trial: of the dump that it is written by.
        gradient: of its rows; None where they hold no ids.
    """

    sizes: dict[LayoutName, SizeModel]
    trial: Trial
    gradient: GradientError | None


class _Planner:
    """One plan under way."""

    def __init__(
        self, options: PlanOptions, progress: Progress, folder: Path, teacher: TransformersTeacher | None
    ) -> None:
        self.options, self.dump, self.progress, self.folder = options, options.dump, progress, folder
        refuse_early(self.dump, teacher)
        started = time.perf_counter()
        self.teacher = teacher or self._load()
        self.loading_seconds = time.perf_counter() - started
        refuse_unfit(self.dump, self.teacher)

    def plan(self) -> DumpPlan:
        self.progress.stage("reading a sample of the corpus")
        sample = take_sample(self.dump, self.teacher.tokenizer, self.teacher.vocab_size, self._sample_tokens())
        self.progress.stage("running the teacher")
        body = RememberedBody(self.teacher)
        unit_seconds = warm_up(self.dump, self.teacher, sample.corpus, self.folder / "warm-up")
        batch_tokens = find_batch(self.dump, self.teacher, sample.corpus, self.progress)
        self.dump = replace(self.dump, batch_tokens=batch_tokens)
        trials = [
            dump_sample(self.dump, group, body, sample.corpus, self.folder / str(number), unit_seconds, self.progress)
            for number, group in enumerate(self.options.groups)
        ]
        student = self._measure_student(trials[0])
        self.progress.stage("measuring sizes and errors")
        yardstick = self._yardstick(sample)
        tried = [
            self._try(selection, number, trial, yardstick)
            for group, trial in zip(self.options.groups, trials, strict=True)
            for number, selection in enumerate(group)
        ]
        caches = [
            self._planned(output, codec, sample, one, student)
            for output, one in zip(self.dump.outputs, tried, strict=True)
            for codec in one.sizes
        ]
        return DumpPlan(
            corpus=CorpusFacts(
                sample.total_tokens, sample.uncertainty, sample.files, sample.bytes, sample.corpus.num_tokens,
                sample.whole,
            ),
            caches=caches,
            student=student,
            device=_device(self.teacher),
            speed_up=self._speed_up(),
            loading_seconds=self.loading_seconds,
            tokenising_seconds=sample.tokenising_seconds,
            gradient_positions=yardstick.positions if yardstick else 0,
            together=self.options.together,
            notes=self._notes(sample, batch_tokens, yardstick is not None),
        )  # fmt: skip

    def _load(self) -> TransformersTeacher:
        self.progress.stage("loading the teacher")
        teacher = load_teacher(self.dump)
        assert isinstance(teacher, TransformersTeacher), "PlanOptions refuses servers"
        return teacher

    def _sample_tokens(self) -> int:
        usual = SAMPLE_TOKENS_CUDA if self.teacher.device.type == "cuda" else SAMPLE_TOKENS
        given = 0 if self.dump.batch_tokens == "auto" else self.dump.batch_tokens
        return self.options.sample_tokens or max(usual, 2 * given)

    def _measure_student(self, trial: Trial) -> StudentFacts | None:
        if self.options.student is None:
            return None
        self.progress.stage("training the student a few steps")
        rate = student_rate(self.options.student, trial.caches[0], self.dump.device)
        return StudentFacts(self.options.student, rate)

    def _yardstick(self, sample: Sample) -> _Positions | None:
        if not any(selection.keeps_ids for selection in self.options.selections):
            return None
        fitting = max(2, min(POSITIONS, POSITION_BYTES // (4 * self.teacher.vocab_size)))
        # Whole blocks: the end of a short one is padding.
        whole = max(1, sample.corpus.num_tokens // self.dump.block_length)
        length = min(fitting, self.dump.block_length, sample.corpus.num_tokens)
        count = max(1, min(whole, fitting // length))
        chosen = ((np.arange(count) + 0.5) * whole / count).astype(np.int64)
        tokens_BL = sample.corpus.blocks.tokens_BL[chosen, :length]
        yardstick = Yardstick(self.teacher, tokens_BL)
        # Rows of logits that are not finite may be left out of a dump, but not here.
        return _Positions(yardstick, tokens_BL.size) if bool(yardstick.full.isfinite().all()) else None

    def _try(self, selection: Selection, number: int, trial: Trial, yardstick: _Positions | None) -> _Tried:
        cache = trial.caches[number]
        codecs = {layout: replace(cache.codec, layout=layout) for layout in self.options.codecs}
        return _Tried(
            {layout: measure_sizes(cache, codec) for layout, codec in codecs.items()},
            trial,
            yardstick.error(selection, cache.codec) if yardstick and selection.keeps_ids else None,
        )

    def _planned(
        self,
        output: Output,
        codec: LayoutName,
        sample: Sample,
        tried: _Tried,
        student: StudentFacts | None,
    ) -> PlannedCache:
        options = replace(self.dump, codec=codec)
        corpus = sample.corpus.resized(sample.total_tokens)
        identity = identity_of(options, output, self.teacher, corpus)
        model = tried.sizes[codec]
        if sample.whole and codec == self.dump.codec:
            index = [one.manifest.identity.selection for one in tried.trial.caches].index(identity.selection)
            num_bytes, error = float(tried.trial.caches[index].num_bytes), 0.0
        else:
            num_bytes, error = (
                model.num_bytes(identity, origin_of(self.dump)),
                math.hypot(model.uncertainty(identity), sample.uncertainty, sample.learnt_uncertainty),
            )
        # The trial was written with the dump's own codec.
        base = tried.sizes.get(self.dump.codec, model)
        forward = tried.trial.forward_seconds
        per_token = max(forward, tried.trial.seconds + model.seconds - base.seconds)
        units = identity.geometry.num_units
        seconds = sample.total_tokens * per_token + units * tried.trial.unit_seconds
        rounds = -(-units // self._speed_up())
        hours = (self.loading_seconds + sample.tokenising_seconds + seconds * rounds / units) / 3600
        students, gains = worth(
            seconds / sample.total_tokens, forward, 1 / student.tokens_per_second if student else None
        )
        per_token_bytes = num_bytes / sample.total_tokens
        return PlannedCache(
            select=str(output.selection),
            codec=codec,
            container=self.dump.container,
            cache=output.location if self.options.together else None,
            bytes=round(num_bytes),
            bytes_uncertainty=error,
            bytes_per_token=per_token_bytes,
            tokens_per_second=sample.total_tokens / seconds,
            hours=hours,
            gradient_angle=tried.gradient.angle if tried.gradient else None,
            gradient_variance=tried.gradient.relative_variance if tried.gradient else None,
            break_even_students=students,
            speed_up=gains,
            reader_bytes_per_second=per_token_bytes * student.tokens_per_second if student else None,
        )

    def _speed_up(self) -> int:
        """Workers that do not share a processor."""
        here = min(self.dump.workers or 1, torch.cuda.device_count()) if self.teacher.device.type == "cuda" else 1
        return self.options.machines * max(1, here)

    def _notes(self, sample: Sample, batch_tokens: int, measured: bool) -> list[str]:
        """What is assumed rather than measured."""
        notes, dump = [], self.dump
        if sample.whole:
            notes.append("the sample is the whole corpus: sizes are those of the caches it made")
        elif sample.corpus.num_tokens < batch_tokens:
            notes.append(
                f"the sample fills no batch of {batch_tokens:,} tokens; larger batches may be faster (--sample-tokens)"
            )
        if not measured and any(selection.keeps_ids for selection in self.options.selections):
            notes.append("the angle is not known: the teacher's logits are NaN or infinite where it is measured")
        elif dump.fields.masked and measured:
            notes.append("the angle is that of all positions, of prompts, too")
        workers = dump.workers or 1
        if self.teacher.device.type == "cpu" and workers > 1:
            notes.append(f"{workers} workers share this machine's processors: on a CPU they are counted as one")
        elif workers > torch.cuda.device_count() > 0:
            notes.append(f"{workers} workers share {torch.cuda.device_count()} GPUs: one is counted for each GPU")
        if dump.engine != "local":
            notes.append(f"workers that the engine {dump.engine} starts elsewhere are not known here and not counted")
        if self._speed_up() > 1:
            notes.append(
                f"time is that of one worker over {self._speed_up()}: that none waits for another is assumed, not "
                "measured"
            )
        return notes


@dataclass(frozen=True)
class _Positions:
    """The yardstick, and of how many positions it is."""

    yardstick: Yardstick
    positions: int

    def error(self, selection: Selection, codec: RowCodec) -> GradientError:
        """Of rows as a cache gives them back, all of them."""
        codec, rows = replace(codec, masked=False), self.yardstick.select(selection)
        return self.yardstick.gradient_error(codec.targets(codec.code(rows, chunk_uniforms(0, 0))))


def _device(teacher: TransformersTeacher) -> str:
    places = sorted({str(place) for place in getattr(teacher.model, "hf_device_map", {}).values()})
    spread = f"; the teacher spread over {', '.join(places)}" if len(places) > 1 else ""
    if teacher.device.type == "cuda":
        return torch.cuda.get_device_name(teacher.device) + spread
    threads = torch.get_num_threads()
    return f"cpu, {threads} {'thread' if threads == 1 else 'threads'}{spread}"
