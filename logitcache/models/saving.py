"""Writing models: as safetensors, and once from GGUF."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from logitcache.errors import ModelError
from logitcache.models.loading import load_model, load_tokenizer, quiet


def save_model(
    model: Any, folder: str | Path, tokenizer: Any | None = None, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write `model` (also one loaded from GGUF) as safetensors, and the tokenizer beside it.

    `weights` are its whole state where it holds shards only.

    Raises:
        ModelError: the folder cannot be written.
    """
    if getattr(model.config, "quantization_config", None) is not None and hasattr(model, "hf_quantizer"):
        # A GGUF load leaves plain weights, but transformers still refuses to save them.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        # safetensors 0.8 lets nobody else read its files, whatever the umask says.
        mode = (Path(folder) / "config.json").stat().st_mode
        for path in Path(folder).glob("*.safetensors"):
            path.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the model cannot be written to {folder} ({error}); check the folder and its space"
        ) from error


def convert_gguf(folder: str | Path, gguf_file: str, out_dir: str | Path, dtype: str = "auto") -> Path:
    """Load a GGUF file once and write it as safetensors with its tokenizer; later loads take under a second.

    `out_dir` appears whole or not at all; one that is there already is returned untouched.

    Raises:
        ModelError: as `load_model` and `save_model`.
    """
    target = Path(out_dir).expanduser()
    if (target / "config.json").is_file():
        return target
    model = load_model(folder, gguf_file, dtype=dtype, device="cpu")
    tokenizer = load_tokenizer(folder, gguf_file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        # Inside of it, as the temporary folder itself is for nobody else to read.
        partial = temporary / target.name
        partial.mkdir()
    except OSError as error:
        raise ModelError(f"{target.parent} cannot be written ({error.strerror}); choose another folder") from error
    try:
        save_model(model, partial, tokenizer)
        partial.replace(target)
    except OSError as error:
        # Another process may have finished the same conversion first.
        if not (target / "config.json").is_file():
            raise ModelError(f"{target} cannot be written ({error.strerror}); remove it or choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
