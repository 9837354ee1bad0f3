"""What a dump refuses before it begins: what arguments and small files show before a teacher is loaded, and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from logitcache.corpus import CorpusFile, check_beginning, expand_paths
from logitcache.dump_job import refuse_other_arguments
from logitcache.dump_options import DumpOptions
from logitcache.models import ModelShape
from logitcache.store import check_place
from logitcache.teachers import Teacher

Place = Callable[[Path, str | None], None]


def refuse_early(options: DumpOptions, teacher: Teacher | None = None, place: Place = check_place) -> list[CorpusFile]:
    """Refuse what needs no weights of the teacher to be seen; every engine and the plan begin with it.

    Loading a teacher, or fetching it, takes minutes. What is not known before is refused later, with the same words:
    by `refuse_unfit`, `Corpus.prepare` and `Job.prepare`.

    Args:
        options: of the dump.
        teacher: one loaded already.
        place: looks at an output's folder and URL, or prepares them.

    Returns the files of the corpus.

    Raises:
        UsageError: a block is longer than the teacher's context, or a row to keep than its vocabulary.
        CorpusError: a file cannot be read, or the first record does not hold what it should.
        ModelError: there is no such teacher.
        PlanMismatchError: an output holds a cache begun with other arguments.
        CacheError: an output cannot be written.
    """
    for output in options.outputs:
        place(output.root, output.url)
    files = expand_paths(options.corpus)
    refuse_other_arguments(options, files)
    shape = ModelShape()
    if teacher is None and not options.served:
        shape = ModelShape.read(options.teacher, options.gguf_file, options.trust_remote_code)
    if shape.vocab_size is not None:
        _check_vocabulary(options, shape.vocab_size)
    shape.check_block_length(options.block_length)
    check_beginning(files, options.fields, shape.vocab_size)
    return files


def refuse_unfit(options: DumpOptions, teacher: Teacher) -> None:
    """Refuse what a loaded teacher cannot do.

    Raises:
        UsageError: a block is longer than its context, or a row to keep than its vocabulary.
        ModelError: a server's teacher does not give what is asked of it.
    """
    _check_vocabulary(options, teacher.vocab_size)
    teacher.check_selections([output.selection for output in options.outputs])
    teacher.check_block_length(options.block_length)


def _check_vocabulary(options: DumpOptions, vocab_size: int) -> None:
    for output in options.outputs:
        output.selection.check_vocabulary(vocab_size)
