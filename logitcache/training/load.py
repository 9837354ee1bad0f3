"""Student folders and configs -> models that fit a cache."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
import yaml

from logitcache import models
from logitcache.errors import ModelError, TrainingError, reason_of

# Keys that configs take without listing them among their fields.
_FURTHER_KEYS = ("attn_implementation", "name_or_path", "rope_scaling", "rope_theta", "torch_dtype")


class Learnt(Protocol):
    """What a student must fit: a cache, or what several are read as."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def block_length(self) -> int: ...
    @property
    def tokenizer(self) -> str:
        """Its sha256."""


def load_student(source: str, cache: Learnt, tokenizer: Any, seed: int) -> Any:
    """A student from a model folder, or with random weights from a YAML/JSON file of a transformers config.

    A config without `vocab_size` gets the teacher's. Raises ModelError or TrainingError when it does not fit the cache.
    """
    path = Path(source)
    # Not any suffix: the hub id SmolLM2-1.7B has one too.
    if path.is_file() or path.suffix in (".yaml", ".yml", ".json"):
        student = _from_config(path, cache, tokenizer, seed)
    else:
        student = models.load_model(source, dtype="float32", device="cpu")
        _check_student_tokenizer(models.resolve_source(source), cache)
    models.check_split(student)
    check_fits(student, source, cache)
    return student


def check_fits(student: Any, source: str, cache: Learnt) -> None:
    """Raise TrainingError unless the student has an output for every id and a position for every token of a block."""
    rows = student.get_output_embeddings().weight.shape[0]
    if rows < cache.vocab_size:
        raise TrainingError(
            f"the student {source} has a vocabulary of {rows} ids, the cache holds ids up to {cache.vocab_size - 1}; "
            f"use a student of at least {cache.vocab_size} ids and the teacher's tokenizer"
        )
    longest = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and longest < cache.block_length:
        raise TrainingError(
            f"the student {source} takes {longest} positions, the cache's blocks have {cache.block_length} tokens; "
            "raise max_position_embeddings or dump with a smaller --block-length"
        )


def _from_config(path: Path, cache: Learnt, tokenizer: Any, seed: int) -> Any:
    try:
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict) or "model_type" not in values:
            raise ModelError(f"{path} names no model_type; write a transformers config, for example model_type: llama")
        _check_model_type(path, str(values["model_type"]))
        _check_keys(path, values)
        values.setdefault("vocab_size", cache.vocab_size)
        if tokenizer is not None:
            # Ids of special tokens come from the cache's tokenizer; a config class's own may not exist in it.
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                values.setdefault(name, getattr(tokenizer, name))
        with models.quiet():
            config = transformers.AutoConfig.for_model(**values)
            torch.manual_seed(seed)
            # Whatever the config says: weights in bfloat16 would lose the optimiser's small steps.
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except OSError as error:
        raise ModelError(f"the student config {path} cannot be read ({error.strerror}); check the path") from error
    except ModelError:
        raise
    except Exception as error:
        # Configs and models of transformers check themselves, each with exceptions of its own.
        reason = reason_of(error)
        raise ModelError(f"the student config {path} is not a usable transformers config: {reason}") from error


def _check_model_type(path: Path, model_type: str) -> None:
    """transformers answers an unknown one with the names of all the others."""
    if model_type not in transformers.CONFIG_MAPPING:
        nearest = difflib.get_close_matches(model_type, list(transformers.CONFIG_MAPPING), n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "check its spelling"
        raise ModelError(f"{path} has model_type {model_type!r}, which this transformers does not know; {hint}")


def _check_keys(path: Path, values: dict[str, Any]) -> None:
    """transformers keeps unknown keys without a word; refuse those of a file written by hand.

    A config.json of transformers itself may hold fields of other tools and versions.
    """
    if path.suffix == ".json":
        return
    default = transformers.AutoConfig.for_model(values["model_type"])
    known = {*default.to_dict(), *default.attribute_map, *_FURTHER_KEYS}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "; check its spelling"
            raise ModelError(f"{path} has a key {key!r} that a {values['model_type']!r} config does not have{hint}")


def _check_student_tokenizer(folder: Path, cache: Learnt) -> None:
    """A student folder that brings a tokenizer must bring the cache's."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return
    found = models.tokenizer_identity(models.load_tokenizer(folder))["sha256"]
    if found != cache.tokenizer:
        raise TrainingError(
            f"the student {folder} has a tokenizer with hash {found[:12]}, the cache was made with "
            f"{cache.tokenizer[:12]}; use a student with the teacher's tokenizer"
        )
