"""The transformers teacher on tiny random models: exact against the model's own logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.corpus import Document, PackingPolicy, pack
from logitcache.errors import ModelError, UsageError
from logitcache.teachers import TransformersTeacher
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer


def teacher(family: str = "llama", vocab_size: int = 300, **config: object) -> TransformersTeacher:
    return TransformersTeacher(tiny_model(family, vocab_size, **config), tiny_tokenizer(), {"sha256": "tiny"})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    one = teacher(family)
    blocks = pack(one.tokenizer, [Document("some text to read, twice. " * 3, "memory", 0)], PackingPolicy(11))
    assert blocks.num_tokens % 11
    hidden = one.hidden(blocks.tokens)
    assert hidden.shape == (blocks.tokens.size, 32)
    logits = torch.cat([one.logits(hidden[rows]) for rows in one.row_slices(len(hidden), budget_bytes=1)])
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = one.model(torch.from_numpy(blocks.tokens.astype(np.int64))).logits.reshape(-1, 300)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.hidden(torch.from_numpy(blocks.tokens.copy())), hidden, rtol=0, atol=0)


def test_padding_after_the_end_changes_nothing_before_it() -> None:
    one = teacher()
    tokens = np.arange(24).reshape(2, 12)
    padded = tokens.copy()
    padded[1, 7:] = 0
    torch.testing.assert_close(one.hidden(tokens)[:19], one.hidden(padded)[:19])


def test_row_slices_cover_all_rows_within_the_budget() -> None:
    one = teacher()
    for rows, budget in ((0, None), (1, None), (100, 1), (1000, 300 * 4 * 64), (17, 300 * 4 * 17)):
        slices = list(one.row_slices(rows, budget))
        assert [row for part in slices for row in range(rows)[part]] == list(range(rows))
        assert all(part.stop - part.start <= max(16, (budget or 32 << 20) // 1200) for part in slices)
    assert len(list(one.row_slices(1000, 300 * 4 * 64))) == 16
    assert len(list(one.row_slices(100, 1))) == 7


def test_a_vocabulary_over_2_to_the_18() -> None:
    one = teacher("llama", vocab_size=300_000, hidden_size=8, num_attention_heads=2, tie_word_embeddings=True)
    tokens = np.array([[0, 262_144, 299_999, 65_536, 131_072]])
    logits = one.logits(one.hidden(tokens))
    assert logits.shape == (5, 300_000)
    with torch.no_grad():
        torch.testing.assert_close(logits, one.model(torch.from_numpy(tokens)).logits[0], rtol=1e-5, atol=1e-5)
    assert next(one.row_slices(1000)) == slice(0, 27)


def test_vocabularies_that_differ() -> None:
    padded = teacher(vocab_size=320)
    assert (padded.vocab_size, len(padded.tokenizer)) == (320, 300)
    small = teacher(vocab_size=280)
    assert small.vocab_size == 280
    with pytest.raises(
        ModelError, match=r"^token id 280 at block 1 of this batch, position 2, is outside the teacher's 280"
    ):
        small.hidden(np.array([[1, 2, 3], [4, 5, 280]]))
    with pytest.raises(ModelError, match="token id -1 at block 0"):
        small.hidden(np.array([[-1, 2]]))


def test_block_length_against_the_context() -> None:
    for family in ("llama", "gpt2"):
        one = teacher(family)
        one.check_block_length(128)
        with pytest.raises(
            UsageError, match=r"^blocks of 129 tokens are longer than the teacher's context of 128; choose"
        ):
            one.check_block_length(129)


def test_load_and_identity(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", family="gemma2")
    one = TransformersTeacher.load(folder, dtype="bfloat16", device="cpu")
    identity = one.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["name"], identity["dtype"]) == ("teacher", "bfloat16")
    assert identity["torch"] == torch.__version__
    assert identity["attention"] in {"sdpa", "eager"}
    assert one.device.type == "cpu"
    assert one.logits(one.hidden(np.arange(6)[None])).dtype == torch.float32
    assert TransformersTeacher.load(folder, device="cpu").identity()["sha256"] == identity["sha256"]


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare", with_tokenizer=False)
    with pytest.raises(ModelError, match="has no tokenizer file"):
        TransformersTeacher.load(bare, device="cpu")
    full = save_tiny(tmp_path / "full")
    assert len(TransformersTeacher.load(bare, device="cpu", tokenizer=full).tokenizer) == 300
