"""`logitcache dump`: run a teacher once over a corpus and write what it knows. A composition; the parts do the work.

One forward of the teacher can feed several caches: every output has its own selection, plan and commits, and a unit
is computed when at least one output still lacks it. Engines differ in who starts
the workers; each worker does the same.
"""

from __future__ import annotations

from logitcache.dump_job import DumpReport
from logitcache.dump_options import DumpOptions, Output
from logitcache.engines.local import run_local
from logitcache.engines.worker import run_worker
from logitcache.errors import UsageError
from logitcache.progress import Progress, Silent
from logitcache.teachers import Teacher

__all__ = ["DumpOptions", "DumpReport", "Output", "Progress", "Silent", "run_dump"]


def run_dump(options: DumpOptions, progress: Progress | None = None, teacher: Teacher | None = None) -> DumpReport:
    """Write, or finish, the caches that `options` asks for.

    `teacher` is one loaded already from `options.teacher`; by default it is loaded here.

    Raises:
        UsageError, CorpusError, ModelError: the arguments, the corpus or the teacher are not usable.
        PlanMismatchError: an output folder holds a cache begun with other arguments.
        CacheError: an output cannot be written; what is committed stays, and the same call resumes.
    """
    progress = progress or Silent()
    if teacher is not None and (options.engine != "local" or (options.workers or 1) > 1):
        raise UsageError("a teacher that is loaded already serves one worker of the engine local")
    if options.engine == "torchrun":
        from logitcache.engines.torchrun import run_torchrun

        return run_torchrun(options, progress)
    if options.engine == "ray":
        from logitcache.engines.ray import run_ray

        return run_ray(options, progress)
    if (options.workers or 1) > 1:
        return run_local(options, progress)
    return run_worker(options, progress, teacher)
