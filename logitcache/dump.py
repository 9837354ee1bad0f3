"""`logitcache dump`: run a teacher once over a corpus and write what it knows. A composition; the parts do the work.

One forward of the teacher can feed several caches: every output has its own selection, plan and commits, and a unit
is computed when at least one output still lacks it. Engines differ in who starts
the workers; each worker does the same.
"""

from __future__ import annotations

from logitcache.dump_job import DumpReport
from logitcache.dump_options import DumpOptions, Output
from logitcache.engines.worker import run_worker
from logitcache.progress import Progress, Silent
from logitcache.teachers import TransformersTeacher

__all__ = ["DumpOptions", "DumpReport", "Output", "Progress", "Silent", "run_dump"]


def run_dump(
    options: DumpOptions, progress: Progress | None = None, teacher: TransformersTeacher | None = None
) -> DumpReport:
    """Write, or finish, the caches that `options` asks for.

    `teacher` is one loaded already from `options.teacher`; by default it is loaded here.

    Raises:
        UsageError, CorpusError, ModelError: the arguments, the corpus or the teacher are not usable.
        PlanMismatchError: an output folder holds a cache begun with other arguments.
        CacheError: an output cannot be written; what is committed stays, and the same call resumes.
    """
    return run_worker(options, progress or Silent(), teacher)
