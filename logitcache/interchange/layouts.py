"""Which DistillKit layout is meant: a name of its documentation, or a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from logitcache.errors import InterchangeError, UsageError
from logitcache.interchange.distillkit import DistillKitLayout

CONFIG_NAME = "compression_config.yaml"
NAMES = ("recommended", "budget")


def choose_layout(spec: str, vocab_size: int | None) -> DistillKitLayout:
    """ "recommended" or "budget" of DistillKit's documentation, or else the layout in a YAML file.

    Raises:
        UsageError: a name without a vocabulary size.
        InterchangeError: as `read_layout`.
    """
    if spec not in NAMES:
        return read_layout(Path(spec))
    if vocab_size is None:
        raise UsageError(f"--layout {spec} does not say how large the vocabulary is; give --vocab-size")
    try:
        named = DistillKitLayout.recommended if spec == "recommended" else DistillKitLayout.budget
        return named(vocab_size)
    except ValidationError as error:
        raise UsageError(
            f"--layout {spec} does not fit a vocabulary of {vocab_size} ids; write a layout file with a smaller k"
        ) from error


def read_layout(path: Path) -> DistillKitLayout:
    """The layout in a YAML file: DistillKit's `logprob_compressor` fields, alone or in a training configuration.

    Raises:
        InterchangeError: there is no such file, it is not YAML, or its fields contradict each other.
    """
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InterchangeError(
            f"{path} does not exist, but only the configuration of the capture says what the bytes mean; give it with "
            "--layout FILE (its fields stand in the dataset's description or in the DistillKit configuration)"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InterchangeError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]}); mend it") from error
    for key in ("teacher", "logprob_compressor"):
        fields = fields.get(key, fields) if isinstance(fields, dict) else fields
    try:
        return DistillKitLayout.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the configuration"
        raise InterchangeError(
            f"{path} is no DistillKit logprob_compressor: {where}: {first['msg']}; mend the file"
        ) from error
