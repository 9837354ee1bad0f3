"""What identifies a model or a tokenizer: hashes of all that determines its numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from logitcache.errors import ModelError
from logitcache.models.loading import resolve_source, weight_files

_NOT_IDENTITY = ("truncation", "padding")


def model_identity(source: str | Path, gguf_file: str | None = None) -> dict[str, Any]:
    """What identifies a model: `{"name", "revision", "files": [{"name", "sha256"}], "sha256"}`.

    The files are config.json and the weights (or the GGUF file alone); `sha256` is the hash of that list; `revision`
    is the hub's commit, None for a folder that is no hub snapshot.

    Raises:
        ModelError: as `load_model`.
    """
    folder = resolve_source(source, gguf_file)
    paths = [folder / gguf_file] if gguf_file is not None else [folder / "config.json", *weight_files(folder)]
    files = []
    for path in paths:
        try:
            with open(path, "rb") as stream:
                files.append({"name": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()})
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return {
        "name": folder.resolve().name if Path(source).expanduser().is_dir() else str(source),
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "files": files,
        "sha256": _json_hash(files),
    }


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What identifies a tokenizer: `{"sha256", "size", "bos_id", "eos_id", "unk_id"}`, equal after save and reload.

    The hash covers how text becomes ids, and these special ids; not truncation, padding or the chat template.
    """
    special = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id, "unk_id": tokenizer.unk_token_id}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = sorted(tokenizer.get_vocab().items())
    else:
        state = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _NOT_IDENTITY}
    return {"sha256": _json_hash([state, special]), "size": len(tokenizer), **special}


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
