"""Which files a corpus consists of, and that its identity does not depend on where it lies."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from logitcache.corpus import corpus_files_identity, expand_paths
from logitcache.errors import CorpusError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in (
        "b.txt",
        "a.md",
        "sub/c.jsonl",
        "sub/deep/d.parquet",
        "sub/e.ndjson.gz",
        "F.TXT",
        "skip.png",
        "log.log",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for hidden in (".git/x.txt", ".hidden.txt"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_text("hidden")
    return root


def names(*paths: str | Path) -> list[str]:
    return [file.name for file in expand_paths(paths)]


def test_a_folder_is_searched_for_known_kinds_in_order(tree: Path) -> None:
    assert names(tree) == ["F.TXT", "a.md", "b.txt", "sub/c.jsonl", "sub/deep/d.parquet", "sub/e.ndjson.gz"]
    kinds = {file.name: file.kind for file in expand_paths([tree])}
    assert kinds["F.TXT"] == kinds["a.md"] == "plain"
    assert kinds["sub/e.ndjson.gz"] == "jsonl"
    assert kinds["sub/deep/d.parquet"] == "parquet"


def test_an_explicit_file_of_unknown_kind_is_plain_text(tree: Path) -> None:
    (file,) = expand_paths([tree / "log.log"])
    assert (file.name, file.kind) == ("log.log", "plain")


def test_patterns_and_duplicates(tree: Path) -> None:
    assert names(f"{tree}/**/*.jsonl") == ["sub/c.jsonl"]
    assert names(f"{tree}/*.[tm]*") == ["a.md", "b.txt"]
    assert names(f"{tree}/*.log") == ["log.log"]
    (tree / "link.txt").symlink_to(tree / "b.txt")
    assert len(expand_paths([tree, tree / "b.txt", f"{tree}/*.txt", f"{tree}/sub/../b.txt"])) == 6


def test_a_name_with_brackets_that_exists_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_identity_does_not_depend_on_the_folder(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(tree, copy)
    identity = corpus_files_identity(expand_paths([tree]))
    assert identity == corpus_files_identity(expand_paths([copy]))
    assert identity[1] == {"name": "a.md", "bytes": 4, "sha256": hashlib.sha256(b"a.md").hexdigest()}
    (copy / "b.txt").write_text("changed")
    assert identity != corpus_files_identity(expand_paths([copy]))


def test_nothing_found(tree: Path, tmp_path: Path) -> None:
    missing = tmp_path / "mising.txt"
    with pytest.raises(CorpusError, match=rf"^the corpus path {missing} does not exist; check the spelling"):
        expand_paths([missing])
    with pytest.raises(CorpusError, match=r"^the pattern .*\*\.csv matches no file; check it, and quote it"):
        expand_paths([f"{tree}/*.csv"])
    with pytest.raises(CorpusError, match="matches only folders"):
        expand_paths([f"{tree}/s*b"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        CorpusError, match=rf"^the folder {empty} holds no corpus file \(\.txt, .*\.arrow\); name files"
    ):
        expand_paths([empty])
    with pytest.raises(CorpusError, match="no corpus was given"):
        expand_paths([])
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        expand_paths([fifo])


def test_what_may_not_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = expand_paths([tree])
    real_open, real_scandir = open, os.scandir

    def refuse_open(path: object, *args: object, **kwargs: object) -> object:
        if str(path).endswith("a.md"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)  # type: ignore[call-overload]

    def refuse_scandir(path: object) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse_open)
        with pytest.raises(CorpusError, match=r"a\.md cannot be read \(Permission denied\); check its permissions"):
            corpus_files_identity(files)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(CorpusError, match="cannot be read"):
            expand_paths([tree])
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse_scandir)
        with pytest.raises(CorpusError, match=r"deep cannot be read \(Permission denied\)"):
            expand_paths([tree])
