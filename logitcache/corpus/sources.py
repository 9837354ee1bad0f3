"""Which files a corpus consists of: paths, folders and patterns -> a sorted list of files, and its identity."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import CorpusError

PLAIN_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet",)
ARROW_SUFFIXES = (".arrow",)
KNOWN_SUFFIXES = PLAIN_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES + ARROW_SUFFIXES
# What `datasets` writes beside a saved dataset's files, and beside the folders of several splits.
STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, order=True)
class CorpusFile:
    """One file of a corpus.

    Args:
        name: path below the folder or pattern it was found through, with "/"; the bare name of a file given directly.
            Names, not absolute paths, order and identify a corpus, so that moving its folder changes nothing.
        path: where it is.
    """

    name: str
    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def kind(self) -> str:
        """ "jsonl", "parquet", "arrow", or "plain" for everything else."""
        lowered = self.path.name.lower()
        if lowered.endswith(JSONL_SUFFIXES):
            return "jsonl"
        if lowered.endswith(PARQUET_SUFFIXES):
            return "parquet"
        return "arrow" if lowered.endswith(ARROW_SUFFIXES) else "plain"


def expand_paths(paths: Iterable[str | os.PathLike[str]]) -> list[CorpusFile]:
    """Files behind `paths`, sorted by name and free of duplicates (two ways to one file count once).

    Args:
        paths: files (an unknown suffix is read as plain text), folders (searched recursively for known suffixes;
            hidden files and folders are left out, links to folders are not followed), or glob patterns (`**` recurses).
            A folder that `datasets` saved a dataset in gives the files that its state.json lists.

    Raises:
        CorpusError: a path does not exist or cannot be read, a pattern matches nothing, a folder holds no corpus file.
    """
    unique: dict[str, CorpusFile] = {}
    given = [os.fspath(path) for path in paths]
    if not given:
        raise CorpusError("no corpus was given; name at least one file, folder or pattern")
    for found in sorted(file for path in given for file in _expand(path)):
        unique.setdefault(os.path.realpath(found.path), found)
    return list(unique.values())


def corpus_files_identity(files: Sequence[CorpusFile]) -> list[dict[str, str | int]]:
    """What identifies the corpus: `{"name", "bytes", "sha256"}` of each file; absolute folders play no part."""
    identity: list[dict[str, str | int]] = []
    for file in files:
        try:
            with open(file.path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                size = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise unreadable(str(file), error) from error
        identity.append({"name": file.name, "bytes": size, "sha256": digest})
    return identity


def unreadable(path: str, error: OSError) -> CorpusError:
    """The one sentence for a file or folder that the system does not let us read."""
    reason = error.strerror or str(error)
    return CorpusError(f"the corpus path {path} cannot be read ({reason}); check its permissions and that it is whole")


def _expand(given: str) -> Iterator[CorpusFile]:
    path = Path(given)
    try:
        if path.is_dir():
            yield from _walk(path)
        elif path.exists():
            yield _explicit(path)
        elif glob.has_magic(given):
            yield from _match(given)
        else:
            raise CorpusError(f"the corpus path {given} does not exist; check the spelling and the working folder")
    except OSError as error:
        raise unreadable(str(error.filename or given), error) from error


def _explicit(path: Path, name: str | None = None) -> CorpusFile:
    if not path.is_file():
        raise CorpusError(f"the corpus path {path} is neither a file nor a folder; save its content to a file first")
    if not os.access(path, os.R_OK):
        raise CorpusError(f"the corpus path {path} cannot be read (Permission denied); check its permissions")
    return CorpusFile(name or path.name, path)


def _walk(folder: Path) -> Iterator[CorpusFile]:
    def refuse(error: OSError) -> None:
        raise error

    count = 0
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if SPLITS in names:
            splits = ", ".join(sorted(subfolders))
            raise CorpusError(f"{parent} holds several splits of a dataset ({splits}); give the folder of one of them")
        for name in _saved_files(Path(parent)) if STATE in names else names:
            if not name.startswith(".") and name.lower().endswith(KNOWN_SUFFIXES):
                count += 1
                path = Path(parent, name)
                yield _explicit(path, path.relative_to(folder).as_posix())
    if not count:
        known = ", ".join(KNOWN_SUFFIXES)
        raise CorpusError(
            f"the folder {folder} holds no corpus file ({known}); name files of another kind one by one or by a pattern"
        )


def _saved_files(folder: Path) -> list[str]:
    """The files of a dataset that `datasets` saved: beside them its own caches may lie, which are no part of it."""
    try:
        listed = [entry["filename"] for entry in json.loads((folder / STATE).read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{folder / STATE} does not list the files of a dataset, as `datasets` writes it; restore it, or name the "
            "files one by one"
        ) from error
    for name in listed:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CorpusError(f"{folder} lacks {name!r}, which its {STATE} lists; fetch or save the dataset again")
    return listed


def _match(pattern: str) -> Iterator[CorpusFile]:
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = [match for match in matches if not match.is_dir()]
    if not files:
        what = "matches only folders" if matches else "matches no file"
        raise CorpusError(f"the pattern {pattern} {what}; check it, and quote it so that the shell leaves it alone")
    for file in files:
        yield _explicit(file, file.relative_to(root).as_posix())
