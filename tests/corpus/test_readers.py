"""Files -> documents: every kind, and the exact place of every error."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache.corpus import Document, expand_paths, iter_documents
from logitcache.corpus import documents as documents_module
from logitcache.corpus.documents import cut_pieces
from logitcache.errors import CorpusError


def read(*paths: Path, text_field: str = "text") -> list[Document]:
    return list(iter_documents(expand_paths(paths), text_field))


def texts(*paths: Path, text_field: str = "text") -> list[str]:
    return [document.text for document in read(*paths, text_field=text_field)]


def test_one_plain_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffÜber\r\nall\n".encode())
    (tmp_path / "b.md").write_bytes(b"")
    assert read(tmp_path) == [
        Document("Über\r\nall\n", str(tmp_path / "a.txt"), 0),
        Document("", str(tmp_path / "b.md"), 0),
    ]


@pytest.mark.parametrize("offset", [0, 7, (1 << 22) - 1, 1 << 22, (1 << 22) + 5])
def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"x" * offset + "é".encode("latin-1") + b" and more")
    with pytest.raises(CorpusError, match=rf"^{path} is not UTF-8 at byte offset {offset}; convert the file to UTF-8"):
        read(path)


def test_a_character_cut_short_at_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes("abc€".encode()[:-1])
    with pytest.raises(CorpusError, match="not UTF-8 at byte offset 3;"):
        read(path)


def test_a_character_may_lie_across_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.corpus.readers._READ_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_text("\ufeffa€b€€c", encoding="utf-8")
    assert texts(path) == ["a€b€€c"]


def test_a_long_plain_file_comes_in_the_pieces_that_packing_would_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.corpus.readers._READ_BYTES", 5)
    monkeypatch.setattr(cut_pieces, "__defaults__", (10,))
    assert documents_module.PIECE_CHARACTERS == 1_000_000
    text = "one two\nthree\nfour five six seven\n\n\neight"
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces = read(path)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.continued for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert [(piece.text, piece.continued) for piece in pieces] == list(cut_pieces([text]))


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz"])
def test_jsonl_holds_one_document_a_line(tmp_path: Path, suffix: str) -> None:
    lines = ['{"text": "one\\nline", "id": 1}', "", "   ", '{"id": 2, "text": ""}', '{"text": "Ünï"}']
    data = b"\xef\xbb\xbf" + "\n".join(lines).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert [(d.text, d.index) for d in read(path)] == [("one\nline", 0), ("", 1), ("Ünï", 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"text": "x"',
            r"is not a JSON object \(Expecting ',' delimiter, at character 14 of the line\); write one object",
        ),
        (b'["text"]', "holds a JSON list; write one object on each line$"),
        (b'{"body": "x", "id": 3}', "has no field 'text'; it has 'body', 'id'; choose one of them as the text field$"),
        (b"{}", "has no field 'text'; it has no fields;"),
        (b'{"text": 3}', "has a field 'text' that is a number, not a string; choose another text field or repair"),
        (b'{"text": null}', "has a field 'text' that is null, not a string"),
        (b'{"text": ["a"]}', "has a field 'text' that is an array, not a string"),
        (b'{"text": "\xe9"}', "is not UTF-8 at byte 10 of the line; convert the file"),
        (b'{"text": "a\\ud800"}', "holds half a surrogate pair at character 1"),
        (b'{"text": "x\ty"}', r"is not a JSON object \(Invalid control character, at character 12 of the line\)"),
        (b"[" * 200_000, r"is not a JSON object \(nested too deeply\)"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=rf"^{path}:3 {message}"):
        read(path)


@pytest.mark.parametrize("damage", ["not gzip", "cut", "flip"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    data = bytearray(gzip.compress(json.dumps({"text": "x" * 1000}).encode() + b"\n"))
    if damage == "not gzip":
        data = bytearray(b'{"text": "x"}')
    elif damage == "cut":
        del data[-12:]
    else:
        data[-6] ^= 1
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"^{path} is not a whole gzip file \(.*\); fetch or compress it again$"):
        read(path)


def write_parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2, write_page_checksum=True)
    return path


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_streams_one_column(tmp_path: Path, kind: pa.DataType) -> None:
    rows = pa.array(["one", None, "", "drei ü", "five"]).cast(kind)
    path = write_parquet(tmp_path / "a.parquet", text=rows, other=list(range(5)))
    assert [(d.text, d.index) for d in read(path)] == [("one", 0), ("", 1), ("", 2), ("drei ü", 3), ("five", 4)]


def test_parquet_errors(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x"], number=[1])
    with pytest.raises(
        CorpusError, match=rf"^{path} has no column 'text'; it has 'body', 'number'; choose one of them"
    ):
        read(path)
    with pytest.raises(CorpusError, match=rf"^{path} has int64 in column 'number', not strings; choose another"):
        read(path, text_field="number")
    assert texts(path, text_field="body") == ["x"]
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(CorpusError, match=rf"^{path} is damaged or not Parquet \(.*\); fetch or write it again$"):
        read(path)


def test_parquet_pages_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["abcdefgh" * 10, "ijklmnop" * 10]})
    pq.write_table(
        table, path, write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False
    )
    data = bytearray(path.read_bytes())
    data[data.index(b"abcdefgh")] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"^the corpus path {path} cannot be read \(.*CRC checksum"):
        read(path)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        path = tmp_path / name
        path.write_text("x")
        files = expand_paths([path])
        path.unlink()
        with pytest.raises(CorpusError, match=rf"^the corpus path {path} cannot be read \(.*No such file"):
            list(iter_documents(files))
