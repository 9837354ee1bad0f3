"""Packing against a naive implementation, exact counts, and the policies."""

from __future__ import annotations

import hashlib
import itertools
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.corpus import (
    Document,
    PackingPolicy,
    TokenBlocks,
    encoding,
    pack,
    pack_encoded_to_file,
    resolve_policy,
)
from logitcache.corpus.documents import cut_pieces
from logitcache.errors import CorpusError, UsageError
from tests.tiny import tiny_tokenizer

EOS, BOS = 0, 1
TOKENIZER = tiny_tokenizer(bos=True)


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, "memory", index) for index, text in enumerate(texts)]


def naive_stream(texts: list[str], policy: PackingPolicy, max_tokens: int | None) -> list[int]:
    plain: list[int] = []
    for text in texts:
        if text.strip():
            plain += [BOS] * (policy.bos == "document")
            plain += TOKENIZER.encode(text, add_special_tokens=False)
            plain += [EOS] * (policy.eos == "document")
    if policy.bos == "block":
        stream: list[int] = []
        for token in plain:
            stream += [BOS] * (len(stream) % policy.block_length == 0)
            stream.append(token)
        if max_tokens is not None and len(stream) > max_tokens:
            return stream[:max_tokens]
        return stream
    return plain[:max_tokens]


def check(blocks: TokenBlocks, stream: list[int], policy: PackingPolicy) -> None:
    length = policy.block_length
    assert blocks.num_tokens == len(stream)
    assert blocks.tokens.dtype == np.int32
    assert blocks.tokens.shape == (-(-len(stream) // length), length) == (blocks.num_blocks, blocks.block_length)
    flat = blocks.tokens.reshape(-1)
    assert flat[: len(stream)].tolist() == stream
    assert (flat[len(stream) :] == policy.pad_id).all()
    data = struct.pack(f"<{len(stream)}I", *stream) + struct.pack("<QQ", len(stream), length)
    assert blocks.sha256 == hashlib.sha256(data).hexdigest()


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab c\n\té数", max_size=40), max_size=8),
    length=st.integers(2, 9),
    bos=st.sampled_from(["none", "document", "block"]),
    eos=st.sampled_from(["none", "document"]),
    max_tokens=st.none() | st.integers(1, 60),
    batch=st.sampled_from([1, 7, 1_000_000]),
)
def test_equals_the_naive_implementation(
    texts: list[str], length: int, bos: str, eos: str, max_tokens: int | None, batch: int
) -> None:
    policy = PackingPolicy(length, bos, BOS, eos, EOS)
    stream = naive_stream(texts, policy, max_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_BATCH_CHARACTERS", batch)
        if not stream:
            with pytest.raises(CorpusError, match="the corpus is empty"):
                pack(TOKENIZER, documents(texts), policy, max_tokens)
            return
        blocks = pack(TOKENIZER, documents(texts), policy, max_tokens)
    check(blocks, stream, policy)
    if max_tokens is None:
        assert blocks.documents == sum(bool(text.strip()) for text in texts)
        assert blocks.documents + blocks.empty_documents == len(texts)


@pytest.mark.parametrize("bos", ["none", "document", "block"])
def test_packing_to_a_file_gives_the_same_blocks(tmp_path: Path, bos: str) -> None:
    policy = PackingPolicy(5, bos, BOS, "document", EOS)
    texts = documents(["one two three", "", "four"])
    seen: list[int] = []
    batches = encoding.encode_texts(TOKENIZER, texts)
    mapped = pack_encoded_to_file(batches, policy, tmp_path / "tokens.bin", None, progress=seen.append)
    held = pack(TOKENIZER, texts, policy)
    assert isinstance(mapped.tokens, np.memmap)
    assert np.array_equal(mapped.tokens, held.tokens)
    assert (mapped.num_tokens, mapped.documents, mapped.empty_documents, mapped.sha256) == (
        held.num_tokens,
        held.documents,
        held.empty_documents,
        held.sha256,
    )
    assert seen == [held.num_tokens]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"]


def test_a_failed_pack_leaves_no_file(tmp_path: Path) -> None:
    empty, one = (encoding.encode_texts(TOKENIZER, documents(texts)) for texts in (["", " \n"], ["a"]))
    with pytest.raises(CorpusError, match=r"^the corpus is empty: 2 documents and no text in any; check"):
        pack_encoded_to_file(empty, PackingPolicy(4), tmp_path / "tokens.bin", None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CorpusError, match=r"^the packed tokens cannot be written to .*no/tokens.bin \(No such file"):
        pack_encoded_to_file(one, PackingPolicy(4), tmp_path / "no" / "tokens.bin", None)


def test_an_exactly_full_block_is_not_followed_by_an_empty_one() -> None:
    ids = TOKENIZER.encode("abc def ghi", add_special_tokens=False)
    blocks = pack(TOKENIZER, documents(["abc def ghi"]), PackingPolicy(len(ids)))
    assert blocks.tokens.tolist() == [ids]
    blocks = pack(TOKENIZER, documents(["abc def ghi"]), PackingPolicy(len(ids) + 1, "block", BOS))
    assert blocks.tokens.tolist() == [[BOS, *ids]]


def test_max_tokens_stops_reading() -> None:
    policy = PackingPolicy(8, "none", None, "document", EOS)
    read: list[int] = []

    def endless() -> Any:
        for index in itertools.count():
            read.append(index)
            yield Document("some words that repeat", "memory", index)

    blocks = pack(TOKENIZER, endless(), policy, max_tokens=1001)
    assert blocks.num_tokens == 1001
    assert blocks.num_blocks == 126
    assert len(read) <= 1024
    with pytest.raises(UsageError, match="give at least 1"):
        pack(TOKENIZER, [], policy, max_tokens=0)


def test_a_huge_document_is_cut_at_newlines_and_stays_one_document() -> None:
    line = "a line of some words\n"
    text = line * 150_000
    policy = PackingPolicy(1000, "document", BOS, "document", EOS)
    blocks = pack(TOKENIZER, documents([text, "tail"]), policy)
    ids = TOKENIZER.encode(line * 2, add_special_tokens=False)
    flat = blocks.tokens.reshape(-1)[: blocks.num_tokens]
    assert blocks.documents == 2
    assert int((flat == BOS).sum()) == int((flat == EOS).sum()) == 2
    # Nothing is lost, and away from the three cuts tokenising is as ever.
    assert TOKENIZER.decode(flat[1:50]).startswith(line)
    assert abs(blocks.num_tokens - 75_000 * len(ids)) < 20
    decoded = TOKENIZER.decode(flat[1 : int(np.argmax(flat == EOS))], clean_up_tokenization_spaces=False)
    assert decoded == text


def test_pieces_from_a_reader_make_the_same_tokens() -> None:
    text = "word " * 30 + "\n" + "x" * 45 + "\nend"
    policy = PackingPolicy(7, "document", BOS, "document", EOS)
    pieces = [Document(piece, "memory", 0, more) for piece, more in cut_pieces([text], 20)]
    assert len(pieces) > 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_pieces, "__defaults__", (20,))
        whole = pack(TOKENIZER, documents([text]), policy)
    assert pack(TOKENIZER, pieces, policy).sha256 == whole.sha256


@given(text=st.text(alphabet="ab\n", max_size=200), limit=st.integers(1, 30), size=st.integers(1, 50))
def test_pieces_do_not_depend_on_chunks(text: str, limit: int, size: int) -> None:
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    pieces = list(cut_pieces(chunks, limit))
    assert pieces == list(cut_pieces([text], limit))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(len(piece) <= limit for piece, _ in pieces)
    assert [more for _, more in pieces] == [True] * (len(pieces) - 1) + [False]


def test_the_hash_is_stable() -> None:
    """Pinned: caches are compared by it across versions."""

    class Letters:
        bos_token_id, eos_token_id = None, 7

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    blocks = pack(Letters(), documents(["ab", "c"]), PackingPolicy(4, eos="document", eos_id=7))
    assert blocks.tokens.tolist() == [[97, 98, 7, 99], [7, 7, 7, 7]]
    assert blocks.num_tokens == 5
    assert blocks.sha256 == "e380377ad4e6ed925f9ae095efcf60eaa5595d837b8c0f905415aee7b5c40fd5"


@pytest.mark.parametrize(
    ("tokenizer", "bos", "eos"),
    [
        ({}, "none", "document"),
        ({"bos": True}, "none", "document"),
        ({"adds_bos": True}, "document", "document"),
    ],
)
def test_auto_policies(tokenizer: dict[str, bool], bos: str, eos: str) -> None:
    policy = resolve_policy(tiny_tokenizer(**tokenizer), 16)
    assert (policy.bos, policy.eos, policy.block_length) == (bos, eos, 16)
    assert PackingPolicy(**policy.to_dict()) == policy  # type: ignore[arg-type]


def test_explicit_policies() -> None:
    tokenizer = tiny_tokenizer()
    policy = resolve_policy(tokenizer, 16, bos="none", eos="none")
    assert (policy.bos, policy.eos, policy.pad_id) == ("none", "none", EOS)
    assert resolve_policy(TOKENIZER, 2, bos="block").bos_id == BOS
    with pytest.raises(
        UsageError, match=r"^bos='block' was asked for, but the tokenizer has no BOS token; choose bos='none'"
    ):
        resolve_policy(tokenizer, 16, bos="block")
    tokenizer.eos_token = None
    assert resolve_policy(tokenizer, 16).eos == "none"
    assert resolve_policy(tokenizer, 16).pad_id == 0
    with pytest.raises(UsageError, match="eos='document' was asked for, but the tokenizer has no EOS"):
        resolve_policy(tokenizer, 16, eos="document")
    with pytest.raises(UsageError, match="bos must be one of none, document, block or auto, not 'all'"):
        resolve_policy(tokenizer, 16, bos="all")
    for length in (1, 0, -3):
        with pytest.raises(UsageError, match="choose a block length of at least 2"):
            resolve_policy(tokenizer, length)


def test_a_tokenizer_that_truncates_by_default_loses_nothing() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer("warm up", truncation=True, max_length=2)
    text = "a rather long text, longer than two tokens"
    blocks = pack(tokenizer, documents([text]), PackingPolicy(4))
    assert blocks.num_tokens == len(tiny_tokenizer().encode(text))


def test_the_corpus_package_is_light() -> None:
    code = "import sys, logitcache.corpus; print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
