"""What arguments, the corpus' first record and the teacher's config show is refused before the teacher is loaded.

The teachers here have no weights that could be loaded: whoever tries speaks of those.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache.corpus import encode_corpus, expand_paths, pack_encoded, resolve_policy
from logitcache.dump import DumpOptions, run_dump
from logitcache.dump_checks import refuse_unfit
from logitcache.errors import CorpusError, EmptyCorpusError, LogitcacheError, ModelError, PlanMismatchError, UsageError
from logitcache.models import ModelShape
from logitcache.planning import PlanOptions, make_plan
from logitcache.teachers import TransformersTeacher
from tests.corpus.test_chat import CHATML
from tests.engines.dumps import options
from tests.store.caches import files_of
from tests.tiny import save_tiny

Run = Callable[[DumpOptions], object]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place whose teacher's weights are cut off, with the tokenizer and the config of `place`'s."""
    folder = tmp_path_factory.mktemp("bare")
    weights = save_tiny(folder / "teacher") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "corpus.txt").write_text("Some text.\n")
    return folder


@pytest.fixture(params=["one worker", "two workers", "torchrun", "tensor parallel", "dry run"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, dict[str, Any]]:
    """One way to run a dump, and the options that it takes. Ray's is in test_ray.py."""
    if request.param == "dry run":
        return (lambda given: make_plan(PlanOptions(given, together=True))), {}
    by_torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in by_torchrun.items():
        monkeypatch.setenv(name, value)
    changes: dict[str, dict[str, Any]] = {
        "one worker": {},
        "two workers": {"workers": 2},
        "torchrun": {"engine": "torchrun"},
        "tensor parallel": {"engine": "torchrun", "tensor_parallel": True, "device": "auto"},
    }
    return run_dump, changes[request.param]


def refusal(run: Callable[[], object]) -> LogitcacheError:
    with pytest.raises(LogitcacheError) as caught:
        run()
    return caught.value


def same(one: LogitcacheError, other: LogitcacheError) -> bool:
    return (type(one), str(one)) == (type(other), str(other))


def test_weights_that_cannot_be_loaded(bare: Path, tmp_path: Path) -> None:
    """Nothing else is wrong, so here they are spoken of: the other tests could fail."""
    given = options(bare, tmp_path / "cache")
    for start in (run_dump, lambda given: make_plan(PlanOptions(given))):
        assert "model.safetensors is damaged or incomplete" in str(refusal(lambda start=start: start(given)))  # type: ignore[misc]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_config_gives_the_teachers_own_words(family: str, tmp_path: Path) -> None:
    """Whatever a family calls its context."""
    folder = save_tiny(tmp_path / "teacher", family)
    (tmp_path / "corpus.txt").write_text("Some text.\n")
    assert ModelShape.read(folder) == ModelShape(300, 128)
    teacher = TransformersTeacher.load(folder, device="cpu")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for given, said in (
        (options(tmp_path, tmp_path / "cache", block_length=129), "the teacher's context of 128"),
        (options(tmp_path, tmp_path / "cache", ("top-k:301", tmp_path / "k")), "the teacher's vocabulary has 300"),
    ):
        found = refusal(lambda given=given: run_dump(given))  # type: ignore[misc]
        assert isinstance(found, UsageError)
        assert said in str(found)
        assert same(found, refusal(lambda given=given: refuse_unfit(given, teacher)))  # type: ignore[misc]


def test_arguments(bare: Path, tmp_path: Path, run: tuple[Run, dict[str, Any]]) -> None:
    """Those of blocks and rows that the teacher cannot have, under every engine."""
    start, changes = run
    cache = tmp_path / "cache"
    for given, said in (
        (options(bare, cache, block_length=129, **changes), "blocks of 129 tokens are longer than the teacher's"),
        (options(bare, cache, ("top-p:0.5:301", tmp_path / "k"), **changes), "selection top-p:0.5:301 keeps 301 ids"),
    ):
        found = refusal(lambda given=given: start(given))  # type: ignore[misc]
        assert isinstance(found, UsageError)
        assert str(found).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_names(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^the dtype must be one of auto, float32, bfloat16, float16, not 'int4'$"):
        options(bare, tmp_path / "cache", dtype="int4")


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


MESSAGES = {"messages_field": "m"}
PAIRS = {"prompt_field": "p", "completion_field": "c"}
# File, its content, fields, and how the refusal begins behind the file's name, or all of it.
CORPORA: dict[str, tuple[str, bytes, dict[str, str], str]] = {
    "empty": ("a.txt", b"", {}, "the corpus is empty: 1 document and no text in any"),
    "white": ("a.txt", b" \n" * 600_000, {}, "the corpus is empty: 1 document and no text in any"),
    "null": ("a.jsonl", lines({"text": ""}, {"text": " "}), {}, "the corpus is empty: 2 documents and no text"),
    "no record": ("a.jsonl", b"\n", {}, "the corpus is empty: 0 documents and no text in any"),
    "no pair": ("a.jsonl", lines({"p": "", "c": ""}), PAIRS, "the corpus is empty: 1 document and no text"),
    "no ids": ("a.jsonl", lines({"i": []}), {"ids_field": "i"}, "the corpus is empty: 1 document and no text"),
    "latin-1": ("a.txt", "Über".encode("latin-1"), {}, " is not UTF-8 at byte offset 0"),
    "no field": ("a.jsonl", lines({"body": "x"}), {}, ":1 has no field 'text'; it has 'body'"),
    "no string": ("a.jsonl", lines({"text": 3}), {}, ":1 has a field 'text' that is a number, not a string"),
    "no JSON": ("a.jsonl", b"plain\n", {}, ":1 is not a JSON object"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(lines({"text": "x"}))[:14], {}, " is not a whole gzip file"),
    "no column": ("a.parquet", parquet(body=["x"]), {}, " has no column 'text'; it has 'body'"),
    "numbers": ("a.parquet", parquet(text=[1]), {}, " has int64 in column 'text', not strings"),
    "no Parquet": ("a.parquet", b"PAR1", {}, " is damaged or not Parquet"),
    "plain pairs": ("a.txt", b"x", PAIRS, " is plain text and has no fields 'p' and 'c'"),
    "no completion": ("a.jsonl", lines({"p": "x"}), PAIRS, ":1 has no field 'c'"),
    "no role": ("a.jsonl", lines({"m": [{"content": "x"}]}), MESSAGES, ":1 has a message 0 in field 'm' that is no"),
    "parts": (
        "a.jsonl",
        lines({"m": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
        MESSAGES,
        ":1 has a message 0 in field 'm' whose content is an array, not text; write it as one string",
    ),
    "an object": (
        "a.jsonl",
        lines({"m": [{"role": "user", "content": {"text": "x"}}]}),
        MESSAGES,
        ":1 has a message 0 in field 'm' whose content is an object, not text",
    ),
    "nobody answers": (
        "a.jsonl",
        lines({"m": [{"role": "user", "content": "x"}]}),
        MESSAGES,
        ":1 has no message of the role 'assistant', only of 'user'",
    ),
    "other ids": ("a.jsonl", lines({"i": [5, 300]}), {"ids_field": "i"}, ":1 holds token id 300 (number 1 of its"),
    "short mask": ("a.jsonl", lines({"i": [5], "k": []}), {"ids_field": "i", "mask_field": "k"}, ":1 has a field 'k'"),
}


@pytest.mark.parametrize("case", CORPORA)
def test_the_first_record(bare: Path, teacher: TransformersTeacher, tmp_path: Path, case: str) -> None:
    """With the words that tokenising has for it, and for a trial as for the dump."""
    name, content, fields, said = CORPORA[case]
    path = tmp_path / name
    path.write_bytes(content)
    given = options(bare, tmp_path / "cache", corpus=(str(path),), **fields)  # type: ignore[arg-type]
    found = refusal(lambda: run_dump(given))
    assert isinstance(found, EmptyCorpusError if said.startswith("the corpus") else CorpusError)
    assert str(found).startswith(said if said.startswith("the corpus") else f"{path}{said}")
    assert same(found, refusal(lambda: make_plan(PlanOptions(given))))
    assert same(found, refusal(lambda: tokenised(given, teacher)))
    assert [one.name for one in tmp_path.iterdir()] == [name]


def tokenised(given: DumpOptions, teacher: TransformersTeacher) -> None:
    """What is done of a corpus when the teacher is there."""
    policy = resolve_policy(teacher.tokenizer, given.block_length)
    teacher.tokenizer.chat_template = CHATML
    batches = encode_corpus(teacher.tokenizer, expand_paths(given.corpus), given.fields, teacher.vocab_size)
    pack_encoded(batches, policy, given.fields.masked)


def test_a_corpus_under_every_engine(bare: Path, tmp_path: Path, run: tuple[Run, dict[str, Any]]) -> None:
    start, changes = run
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"body": "x"}))
    given = options(bare, tmp_path / "cache", corpus=(str(path),), **changes)
    assert re.match(rf"{re.escape(str(path))}:1 has no field 'text'", str(refusal(lambda: start(given))))


def test_what_begins_well_is_not_refused(place: Path, tmp_path: Path) -> None:
    """Records without text may come before one with text."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": ""}, {"text": "Some text."}))
    report = run_dump(options(place, tmp_path / "cache", corpus=(str(path),)))
    assert report.manifests[0].identity.corpus["empty_documents"] == 1


def test_a_config_that_says_nothing(tmp_path: Path) -> None:
    """Loading says what is wrong with it."""
    assert ModelShape.read(tmp_path) == ModelShape()
    (tmp_path / "config.json").write_text("{")
    assert ModelShape.read(tmp_path) == ModelShape()
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {}, "vocab_size": 7}')
    assert ModelShape.read(tmp_path).vocab_size == 7
    assert ModelShape.read(tmp_path, trust_remote_code=True) == ModelShape()
    assert ModelShape.read(tmp_path, gguf_file="a.gguf") == ModelShape()
    ModelShape().check_block_length(1 << 40)
    with pytest.raises(ModelError, match="does not exist"):
        ModelShape.read(tmp_path / "nowhere")


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "nonfinite": ({"nonfinite": "mask"}, "--nonfinite: the cache has 'fail', this run 'mask'"),
    "compile": ({"compile": True}, "--compile: the cache has False, this run True"),
    "max tokens": ({"max_tokens": 50}, "--max-tokens: the cache has None, this run 50"),
    "another field": ({"text_field": "body"}, "--text-field: the cache has 'text', this run 'body'"),
    "another file": ({"corpus": "b.jsonl"}, r"--corpus \(a.jsonl\): only the cache has this file; 1 more file changed"),
    "a longer file": ({"corpus": "more/a.jsonl"}, r"--corpus \(a.jsonl\): the cache has 23 bytes of it, this run 24"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("finished", [True, False])
def test_a_dump_that_was_begun_with_others(place: Path, bare: Path, tmp_path: Path, case: str, finished: bool) -> None:
    """What names, sizes and options show; a trial says it, too."""
    changes, said = OTHERS[case]
    (tmp_path / "more").mkdir()
    for name, text in {"a.jsonl": "Some text.", "b.jsonl": "Some text.", "more/a.jsonl": "Some text.."}.items():
        (tmp_path / name).write_bytes(lines({"text": text}))
    root = tmp_path / "cache"
    given = options(place, root, corpus=(str(tmp_path / "a.jsonl"),))
    run_dump(given)
    if not finished:
        (root / "manifest.json").unlink()
    before = files_of(root)
    corpus = str(tmp_path / changes.get("corpus", "a.jsonl"))
    others = options(bare, root, **{**changes, "corpus": (corpus,)})
    found = refusal(lambda: run_dump(others))
    assert isinstance(found, PlanMismatchError)
    [line] = str(found).splitlines()[1:]
    assert re.fullmatch(f"  {said}", line), line
    assert same(found, refusal(lambda: make_plan(PlanOptions(others, together=True))))
    assert files_of(root) == before
