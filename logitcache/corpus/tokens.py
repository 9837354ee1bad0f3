"""Texts -> token ids, without special tokens that the text does not spell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text."""
    encoded: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return encoded


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.asarray(one[:length]) != np.asarray(other[:length])
    return int(np.argmax(differ)) if differ.any() else length
