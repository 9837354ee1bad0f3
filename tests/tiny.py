"""Tiny random models and tokenizers for all tests: seeded, built in memory, saved in milliseconds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_BYTES = 256
_TEXT = [
    "The cache keeps what the teacher knew about every token of the corpus, and the student reads it later.",
    "Every block has a number; every number has a block. Ünïcödé wörks, 数字 too, and so do tabs\tand\nnewlines.",
    "A quick brown fox jumps over the lazy dog while the rain in Spain stays mainly in the plain.",
]

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_EIGHT = {**_GROUPED, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _EIGHT,
    "gemma2": {**_EIGHT, "final_logit_softcapping": 7.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_EIGHT, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": _COMMON,
    "phi": _COMMON,
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "granite": {**_GROUPED, "logits_scaling": 5.0},
}


def tiny_tokenizer(vocab_size: int = 300, bos: bool = False, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` ids (at least 258), with `<eos>` = 0 and, if `bos`, `<bos>` = 1.

    Args:
        adds_bos: the tokenizer itself puts `<bos>` before a text, as Llama's does.
    """
    bos = bos or adds_bos
    tokenizer = Tokenizer.from_str(_trained(vocab_size, bos))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _trained(vocab_size: int, bos: bool) -> str:
    special = ["<eos>", "<bos>"] if bos else ["<eos>"]
    if vocab_size < _BYTES + len(special):
        raise ValueError(f"a byte-level tokenizer needs {_BYTES + len(special)} ids or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 3, trainer)
    return tokenizer.to_str()


def tiny_model(family: str = "llama", vocab_size: int = 300, seed: int = 0, **config: Any) -> Any:
    """A random causal language model of `family` (see `FAMILIES`): 2 layers, width 32, 128 positions, float32, eval.

    Args:
        config: fields that override the family's, for example `tie_word_embeddings=True`.
    """
    fields = {**FAMILIES[family], "vocab_size": vocab_size, "initializer_range": 0.3, **config}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**ids, **fields}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def save_tiny(
    path: str | Path,
    family: str = "llama",
    vocab_size: int = 300,
    with_tokenizer: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write `tiny_model` (and `tiny_tokenizer`) into the folder `path`; returns it."""
    from logitcache.models import save_model

    tokenizer = tiny_tokenizer(min(vocab_size, 300)) if with_tokenizer else None
    save_model(tiny_model(family, vocab_size, seed, **config), path, tokenizer)
    return Path(path)
