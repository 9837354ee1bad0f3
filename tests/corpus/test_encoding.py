"""Prompts with completions, and token ids -> documents of tokens, with what of them is to be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.corpus import (
    CorpusFields,
    Encoded,
    PackingPolicy,
    encode_corpus,
    expand_paths,
    pack_encoded,
    pack_encoded_to_file,
)
from logitcache.errors import CorpusError, UsageError
from tests.corpus.files import KINDS, save_dataset, write_records
from tests.tiny import tiny_tokenizer

EOS, BOS = 0, 1
TOKENIZER = tiny_tokenizer(bos=True)
PAIRS = CorpusFields(prompt="prompt", completion="completion")
IDS = CorpusFields(ids="input_ids")
MASKED_IDS = CorpusFields(ids="input_ids", mask="mask")


def encoded(fields: CorpusFields, *paths: Path, vocab_size: int = 300) -> list[Encoded]:
    batches = encode_corpus(TOKENIZER, expand_paths(paths), fields, vocab_size)
    return [document for batch in batches for document in batch]


def split(document: Encoded) -> tuple[str, str]:
    """Text of the tokens that are not to be learnt, and of those that are."""
    learnt = np.broadcast_to(document.learnt, len(document.ids))
    ids = np.array(document.ids)
    return TOKENIZER.decode(ids[~learnt]), TOKENIZER.decode(ids[learnt])


# ---------------------------------------------------------------------------------------- prompts and completions


@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_learnt_and_prompts_are_not(tmp_path: Path, kind: str) -> None:
    records = [
        {"prompt": "Say a number:", "completion": " one", "id": 1},
        {"prompt": "", "completion": "all of it"},
        {"prompt": "the ca", "completion": "che"},
        {"prompt": "nothing follows", "completion": ""},
        {"prompt": "", "completion": ""},
    ]
    one, everything, torn, nothing, empty = encoded(PAIRS, write_records(tmp_path, kind, records))
    assert split(one) == ("Say a number:", " one")
    assert split(everything) == ("", "all of it")
    # A token that holds characters of both is the completion's.
    whole = TOKENIZER.encode("the cache", add_special_tokens=False)
    assert list(torn.ids) == whole
    assert "".join(split(torn)) == "the cache"
    assert "the ca".startswith(split(torn)[0])
    assert split(nothing) == ("nothing follows", "")
    assert not nothing.last_learnt
    assert not empty.visible


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompt=st.text(alphabet="th ec\n.é数", max_size=12), completion=st.text(alphabet="th ec\n.é数", max_size=12))
def test_the_border_is_where_the_prompts_own_tokens_end(prompt: str, completion: str) -> None:
    batches = encode_pairs([(prompt, completion)])
    (document,) = [document for batch in batches for document in batch]
    whole = TOKENIZER.encode(prompt + completion, add_special_tokens=False)
    alone = TOKENIZER.encode(prompt, add_special_tokens=False)
    assert list(document.ids) == whole
    learnt = np.asarray(document.learnt)
    border = int((~learnt).sum())
    assert learnt.tolist() == [False] * border + [True] * (len(whole) - border)
    assert whole[:border] == alone[:border]
    assert border in (len(alone), len(whole)) or whole[border] != alone[border]


def encode_pairs(pairs: list[tuple[str, str]]) -> Any:
    from logitcache.corpus.encoding import _encode_completions
    from logitcache.corpus.records import Record

    names = {"prompt": "prompt", "completion": "completion"}
    return _encode_completions(
        TOKENIZER, [Record("memory", names, {"prompt": one, "completion": other}) for one, other in pairs]
    )


PAIR_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x"}, "has no field 'completion'; it has 'prompt'; choose one of them as the completion field$"),
    ({"text": "x"}, "has no field 'prompt'; it has 'text'; choose one of them as the prompt field$"),
    ({"prompt": "x", "completion": 3}, "has a field 'completion' that is a number, not a string; choose another"),
    ({"prompt": [{"role": "user"}], "completion": "y"}, "has a field 'prompt' that is an array, not a string;"),
    ({"prompt": None, "completion": "y"}, "has a field 'prompt' that is null, not a string;"),
    ({"prompt": "\ud800", "completion": "y"}, "holds half a surrogate pair at character 0"),
]


@pytest.mark.parametrize(("record", "message"), PAIR_ERRORS)
def test_errors_name_the_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + json.dumps(record) + "\n")
    with pytest.raises(CorpusError, match=rf"^{path}:3 {message}"):
        encoded(PAIRS, path)


def test_errors_name_the_column_and_row(tmp_path: Path) -> None:
    path = write_records(tmp_path, "parquet", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(CorpusError, match=rf"^{path} row 1 has a field 'completion' that is null, not a string;"):
        encoded(PAIRS, path)
    with pytest.raises(CorpusError, match=rf"^{path} has no column 'answer'; it has 'prompt', 'completion'; choose"):
        encoded(CorpusFields(prompt="prompt", completion="answer"), path)
    with pytest.raises(CorpusError, match=rf"^{path} has string in column 'prompt', not lists of integers; choose ano"):
        encoded(CorpusFields(ids="prompt"), path)
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(CorpusError, match=r"plain\.txt is plain text and has no fields 'prompt' and 'completion';"):
        encoded(PAIRS, tmp_path / "plain.txt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "p"}, "a prompt field and a completion field need each other"),
        ({"completion": "c"}, "a prompt field and a completion field need each other"),
        ({"mask": "m"}, "give an ids field, too"),
        ({"prompt": "p", "completion": "c", "ids": "i"}, "give fields of one kind"),
        ({"messages": "m", "ids": "i"}, "give fields of one kind"),
        ({"messages": "m", "text": "text"}, "give fields of one kind"),
    ],
)
def test_fields_that_contradict_each_other(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CorpusFields(**given)


# ---------------------------------------------------------------------------------------- token ids


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_taken_as_they_are(tmp_path: Path, kind: str) -> None:
    rows = [[5, 299, 0], [], [7], list(range(200))]
    path = write_records(tmp_path, kind, [{"input_ids": row, "mask": [1] * len(row)} for row in rows])
    found = encoded(IDS, path)
    assert [list(document.ids) for document in found] == rows
    assert [document.visible for document in found] == [True, False, True, True]
    masked = encoded(MASKED_IDS, write_records(tmp_path, kind, [{"input_ids": [5, 6, 7], "mask": [0, 1, 0]}]))
    assert np.asarray(masked[0].learnt).tolist() == [False, True, False]
    assert not masked[0].last_learnt


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_named(tmp_path: Path, kind: str) -> None:
    for wrong in (300, -1, 1 << 40):
        path = write_records(tmp_path, kind, [{"input_ids": [1, 2]}] * 3 + [{"input_ids": [1, wrong]}])
        place = ":4" if kind.startswith("jsonl") else " row 3"
        with pytest.raises(
            CorpusError, match=rf"^{path}{place} holds token id {wrong} \(number 1 of its list\), but the"
        ):
            encoded(IDS, path)


ID_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"mask": [1]}, "has no field 'input_ids'"),
    ({"input_ids": "1 2", "mask": [1]}, "has a field 'input_ids' that is a string, not a list of whole numbers"),
    ({"input_ids": None, "mask": [1]}, "has a field 'input_ids' that is null, not a list of whole numbers"),
    ({"input_ids": [1.5], "mask": [1]}, "has a field 'input_ids' that is a list with fractions, not a list of whole"),
    ({"input_ids": [1, None], "mask": [1]}, "has a field 'input_ids' that is an array, not a list of whole numbers"),
    ({"input_ids": [[1], [2]], "mask": [1]}, "has a field 'input_ids' that is an array, not a list of whole numbers"),
    ({"input_ids": [[1], [2, 3]], "mask": [1]}, "has a field 'input_ids' that is an array, not a list of whole"),
    ({"input_ids": [1 << 70], "mask": [1]}, "has a field 'input_ids' that is an array, not a list of whole numbers"),
    ({"input_ids": [True], "mask": [1]}, "has a field 'input_ids' that is a list with true or false"),
    ({"input_ids": [1, 2], "mask": [1]}, "has a field 'mask' that is not 0 or 1 for each of 2 token ids"),
    ({"input_ids": [1, 2], "mask": [1, -100]}, "has a field 'mask' that is not 0 or 1 for each of 2 token ids"),
]


@pytest.mark.parametrize(("record", "message"), ID_ERRORS)
def test_what_token_ids_are_not(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write_records(tmp_path, "jsonl", [{"input_ids": [3], "mask": [True]}, record])
    with pytest.raises(CorpusError, match=rf"^{path}:2 {message}"):
        encoded(MASKED_IDS, path)


def test_columns_with_gaps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"input_ids": pa.array([[1, 2], [3, None]], pa.list_(pa.int32()))}), path)
    with pytest.raises(
        CorpusError, match=rf"^{path} row 1 has a field 'input_ids' that is an array, not a list of who"
    ):
        encoded(IDS, path)


def test_a_saved_dataset_is_its_own_files_only(tmp_path: Path) -> None:
    rows = [{"input_ids": [number, number + 1], "text": f"number {number}"} for number in range(5)]
    folder = save_dataset(tmp_path / "saved", rows)
    files = expand_paths([folder])
    assert [file.name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [list(document.ids) for document in encoded(IDS, folder)] == [row["input_ids"] for row in rows]
    texts = encoded(CorpusFields(), folder)
    assert [TOKENIZER.decode(document.ids) for document in texts] == [row["text"] for row in rows]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(CorpusError, match=r"lacks 'data-00001-of-00002.arrow', which its state.json lists; fetch or"):
        expand_paths([folder])
    (folder / "state.json").write_text("[]")
    with pytest.raises(CorpusError, match=r"state.json does not list the files of a dataset, as `datasets` writes it"):
        expand_paths([folder])


def test_several_splits_are_not_taken_together(tmp_path: Path) -> None:
    for split_name in ("train", "test"):
        save_dataset(tmp_path / "saved" / split_name, [{"input_ids": [1]}], files=1)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(CorpusError, match=r"holds several splits of a dataset \(test, train\); give the folder of one"):
        expand_paths([tmp_path / "saved"])
    assert len(expand_paths([tmp_path / "saved" / "train"])) == 1


@pytest.mark.parametrize("kind", ["arrow", "stream.arrow"])
def test_damaged_arrow_files(tmp_path: Path, kind: str) -> None:
    path = write_records(tmp_path, kind, [{"input_ids": [1, 2, 3]}] * 9)
    data = path.read_bytes()
    for damaged in (b"", b"not Arrow at all", data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=rf"^{path} is damaged or not Arrow \(.*\); fetch or write it again"):
            encoded(IDS, path)


# ---------------------------------------------------------------------------------------- packing


documents = st.lists(st.lists(st.tuples(st.integers(2, 99), st.booleans()), max_size=9), max_size=8)


def naive_stream(rows: list[list[tuple[int, bool]]], policy: PackingPolicy) -> list[tuple[int, bool]]:
    plain: list[tuple[int, bool]] = []
    for row in rows:
        if row:
            plain += [(BOS, False)] * (policy.bos == "document") + row
            plain += [(EOS, row[-1][1])] * (policy.eos == "document")
    if policy.bos != "block":
        return plain
    stream: list[tuple[int, bool]] = []
    for token in plain:
        stream += [(BOS, False)] * (len(stream) % policy.block_length == 0)
        stream.append(token)
    return stream


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=documents,
    length=st.integers(2, 9),
    bos=st.sampled_from(["none", "document", "block"]),
    eos=st.sampled_from(["none", "document"]),
    max_tokens=st.none() | st.integers(1, 40),
)
def test_packing_keeps_tokens_and_mask_together(
    rows: list[list[tuple[int, bool]]], length: int, bos: str, eos: str, max_tokens: int | None
) -> None:
    policy = PackingPolicy(length, bos, BOS, eos, EOS)
    stream = naive_stream(rows, policy)[:max_tokens]
    batches = [[as_document(row) for row in rows]]
    if not any(learnt for _, learnt in stream):
        why = "nothing of the corpus is to be learnt: no completion in" if stream else "the corpus is empty"
        with pytest.raises(CorpusError, match=why):
            pack_encoded(batches, policy, True, max_tokens)
        return
    blocks = pack_encoded(batches, policy, True, max_tokens)
    assert blocks.learnt is not None
    real = blocks.tokens.size - blocks.num_tokens
    assert list(zip(blocks.tokens.ravel().tolist(), blocks.learnt.ravel().tolist(), strict=True)) == [
        *stream,
        *[(EOS, False)] * real,
    ]
    assert blocks.learnt_tokens == sum(learnt for _, learnt in stream)
    assert blocks.sha256 == pack_encoded(batches, policy, False, max_tokens).sha256


def as_document(row: list[tuple[int, bool]]) -> Encoded:
    ids, learnt = [token for token, _ in row], np.array([flag for _, flag in row], dtype=bool)
    return Encoded(ids, learnt, visible=bool(row), own_specials=True)


def test_special_tokens_are_not_doubled() -> None:
    policy = PackingPolicy(8, "document", BOS, "document", EOS)
    rows = [[(BOS, False), (5, True), (EOS, True)], [(6, True)]]
    blocks = pack_encoded([[as_document(row) for row in rows]], policy, True)
    assert blocks.tokens.ravel().tolist() == [BOS, 5, EOS, BOS, 6, EOS, EOS, EOS]
    assert blocks.num_tokens == 6
    assert np.asarray(blocks.learnt).ravel().tolist() == [False, True, True, False, True, True, False, False]


def test_a_mask_in_a_file_of_its_own(tmp_path: Path) -> None:
    policy = PackingPolicy(4, "none", BOS, "document", EOS)
    batches = [[as_document([(5, False), (6, True)])], [as_document([(7, True), (8, False), (9, True)])]]
    mapped = pack_encoded_to_file(batches, policy, tmp_path / "tokens", tmp_path / "mask")
    held = pack_encoded(batches, policy, True)
    assert isinstance(mapped.learnt, np.memmap)
    np.testing.assert_array_equal(mapped.tokens, held.tokens)
    np.testing.assert_array_equal(mapped.learnt, np.asarray(held.learnt))
    assert (mapped.mask_sha256, mapped.learnt_tokens) == (held.mask_sha256, held.learnt_tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask", "tokens"]
