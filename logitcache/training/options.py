"""Options of a training run, as the command line, `--config` files and run.json spell them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from logitcache.errors import UsageError

ObjectiveName = Literal[
    "auto",
    "cross-entropy",
    "forward-kl",
    "reverse-kl",
    "jsd",
    "skew-kl",
    "tvd",
    "decoupled",
    "mse",
    "policy-gradient",
]
Tail = Literal["auto", "bucket", "renormalised", "teacher_renormalised", "unnormalised", "label", "unbiased", "blend"]


class TrainOptions(BaseModel):
    """Everything `logitcache train` can be told; also the form of `--config` files.

    Several caches are averaged where they hold the same token blocks (several teachers) and mixed where they do not
    (several corpora); `combine` says which of it. `cache_weights` are shares, one of each cache: by default equal ones
    of teachers, and of corpora what they hold.

    Sizes are in tokens, rounded to whole blocks of the cache; `batch_tokens` is the batch of all processes together,
    whatever their number. `early_stop` ends the run after so many evaluations in a row without a lower cross entropy,
    and writes the student of the lowest. `fsdp` shards weights, gradients and optimiser state over GPUs. `epochs`,
    `max_tokens` and `max_steps` each bound the run; the last one given in that order wins. `tail`, `beta`, `reverse`
    and `clip` belong to some objectives only, `blend` and `blend_end` to tail='blend': see docs/objectives.md. `mask`
    is what `TokenMask.parse` reads, or "none". `partial` trains on the
    units that an unfinished dump has committed when the run begins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    cache: tuple[str, ...] = Field(min_length=1)
    combine: Literal["auto", "average", "mix"] = "auto"
    cache_weights: tuple[float, ...] = ()
    partial: bool = False
    student: str
    out: str = Field(min_length=1)
    objective: ObjectiveName = "auto"
    tail: Tail = "auto"
    beta: float | None = None
    reverse: bool | None = None
    clip: float | None = None
    blend: float | None = Field(None, ge=0, le=1)
    blend_end: float | None = Field(None, ge=0, le=1)
    z_loss: float = Field(0.0, ge=0)
    mask: str | None = None
    mask_rest: Literal["labels", "nothing"] | None = None
    alpha: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    alpha_schedule: Literal["constant", "linear", "wsd"] = "constant"
    alpha_warmup: float = Field(0.1, ge=0, le=1)
    alpha_decay: float = Field(0.2, ge=0, le=1)
    epochs: float = Field(1.0, gt=0)
    max_tokens: int | None = Field(None, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_tokens: int = Field(4096, ge=1)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    held_out: float = Field(0.05, ge=0, lt=1)
    held_out_cache: str | None = None
    eval_tokens: int = Field(16384, ge=1)
    eval_text: tuple[str, ...] = ()
    eval_every: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    log_every: int = Field(10, ge=1)
    early_stop: int | None = Field(None, ge=1)
    tokenizer: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    impl: Literal["auto", "reference", "split", "chunk", "triton"] = "auto"
    fsdp: Literal["off", "full-shard", "shard-grad-op"] = "off"
    report_to: tuple[str, ...] = ()

    @field_validator("cache", "cache_weights", "eval_text", "report_to", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | float | int) else value

    @field_validator("objective", mode="before")
    @classmethod
    def _as_in_python(cls, value: Any) -> Any:
        # `Objective`, whose messages reach the command line, spells forward_kl.
        return value.replace("_", "-") if isinstance(value, str) else value

    @field_validator("mask")
    @classmethod
    def _none_is_no_mask(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @classmethod
    def build(cls, values: dict[str, Any], places: Mapping[str, str] | None = None) -> TrainOptions:
        """Validate. Raises UsageError that names the key, suggests the nearest one, or says what is out of range.

        `places` says where keys of a file stand, as `train.yaml:3`; others are named as options of the command line.
        """
        places = places or {}
        for key in values:
            if key not in cls.model_fields:
                place = f"{places[key]}: " if key in places else ""
                raise UsageError(f"{place}{_unknown_key(key, cls.model_fields)}")
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            if first["type"] == "missing":
                raise UsageError(f"--{key} is missing; give it here or as `{key}` in a --config file") from error
            name = f"{places[key]}: {key}" if key in places else as_option(key)
            raise UsageError(f"{name} is {first['input']!r}; {_demand(first['msg'])}") from error


# Keys that `train` takes from --set and --config only.
SET_ONLY = frozenset(
    {"accumulate", "alpha_decay", "alpha_warmup", "combine", "eval_every", "eval_tokens", "impl", "log_every"}
    | {"lr_schedule", "max_grad_norm", "report_to", "save_every", "warmup", "weight_decay"}
)


def as_option(key: str) -> str:
    """How the command line is told a key: `--batch-tokens`, `--set impl`."""
    return f"--set {key}" if key in SET_ONLY else f"--{key.replace('_', '-')}"


def _demand(message: str) -> str:
    """pydantic's "Input should be less than 1, ..." as "it must be less than 1"."""
    return (
        message.partition(", unable")[0]
        .replace("Input should be", "it must be", 1)
        .replace("String should", "it must")
        .replace("tuple", "list")
    )


def _unknown_key(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the keys are {', '.join(sorted(known))}"
    return f"there is no option {key!r}; {hint}"
