"""Models and tokenizers: where they come from, what identifies them, and how their logits are made."""

from logitcache.models.check import check_split
from logitcache.models.head import LMHead, body_hidden, finish_logits, head_logits, head_product, split_model
from logitcache.models.identity import model_identity, tokenizer_identity
from logitcache.models.loading import (
    DEVICES,
    DTYPES,
    choose_device,
    choose_dtype,
    errors_only,
    load_model,
    load_tokenizer,
    quiet,
    resolve_source,
    weight_files,
)
from logitcache.models.operands import causal_lm, inside_forward, with_head
from logitcache.models.placement import DEVICE_MAPS, input_device
from logitcache.models.saving import convert_gguf, save_model
from logitcache.models.shape import ModelShape

__all__ = [
    "DEVICES",
    "DEVICE_MAPS",
    "DTYPES",
    "LMHead",
    "ModelShape",
    "body_hidden",
    "causal_lm",
    "check_split",
    "choose_device",
    "choose_dtype",
    "convert_gguf",
    "errors_only",
    "finish_logits",
    "head_logits",
    "head_product",
    "input_device",
    "inside_forward",
    "load_model",
    "load_tokenizer",
    "model_identity",
    "quiet",
    "resolve_source",
    "save_model",
    "split_model",
    "tokenizer_identity",
    "weight_files",
    "with_head",
]
