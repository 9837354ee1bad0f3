"""Rows from a server are those of the same model run here; and what is asked of the server on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from logitcache.errors import ModelError, UsageError
from logitcache.models import load_tokenizer
from logitcache.selection import Selection
from logitcache.targets import SparseTargets
from logitcache.teachers import BlockBatch, ServerOptions, ServerTeacher, Teacher, TransformersTeacher
from logitcache.teachers.server.asking import Asking
from logitcache.teachers.server.client import Client
from logitcache.teachers.server.dialects import VllmDialect
from logitcache.teachers.server.pace import Pace
from tests.teachers.serving import Serving

SELECTIONS = [Selection.parse(text) for text in ("top-k:7", "top-p:0.6:40")]
EVERY = [*SELECTIONS, *(Selection.parse(text) for text in ("sample:11", "sample:11:0.7", "varopt:12"))]
QUICK = ServerOptions(concurrency=3, backoff=0.01)


def blocks_of(blocks: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, (blocks, length))


def rows_of(
    teacher: Teacher, tokens: np.ndarray, first_block: int, num_rows: int, selections: list[Selection], seed: int
) -> list[SparseTargets]:
    return teacher.begin_rows(BlockBatch(tokens, first_block, num_rows, selections, seed))()


def assert_same_rows(given: SparseTargets, wanted: SparseTargets, entropy: bool) -> None:
    """To what the rounding of the log-probabilities in JSON and of one block at a time leaves."""
    np.testing.assert_array_equal(given.offsets, wanted.offsets)
    np.testing.assert_array_equal(given.ids, wanted.ids)
    np.testing.assert_allclose(given.weights, wanted.weights, rtol=1e-4)
    np.testing.assert_allclose(given.tail_mass, wanted.tail_mass, atol=1e-5)
    np.testing.assert_allclose(given.label_logprob, wanted.label_logprob, atol=1e-4)
    np.testing.assert_allclose(given.threshold, wanted.threshold, rtol=1e-4)
    assert given.unbiased == wanted.unbiased
    if entropy:
        np.testing.assert_allclose(given.entropy, wanted.entropy, atol=1e-4)
    else:
        assert np.isnan(given.entropy).all()


@pytest.mark.parametrize("flavour", ["vllm", "echo", "sglang"])
@pytest.mark.parametrize(("blocks", "rows"), [(1, 1), (4, 38), (3, 33)])
def test_rows_are_the_models_own(
    server: Serving, served_model: Path, one_thread: None, flavour: str, blocks: int, rows: int
) -> None:
    """The last position of each block, and a padded last block, included."""
    server.set(flavour=flavour)
    teacher = ServerTeacher.connect(server.url, served_model, QUICK)
    teacher.check_selections(SELECTIONS)
    assert teacher.identity()["served"] == flavour
    local, tokens = TransformersTeacher.load(served_model, device="cpu"), blocks_of(blocks, 11)
    pairs = zip(
        rows_of(teacher, tokens, 5, rows, SELECTIONS, 4), rows_of(local, tokens, 5, rows, SELECTIONS, 4), strict=True
    )
    for given, wanted in pairs:
        assert len(given) == rows
        assert_same_rows(given, wanted, entropy=False)


@pytest.mark.parametrize("flavour", ["vllm", "echo", "sglang"])
def test_a_server_that_tells_everything_serves_every_selection(
    server: Serving, served_model: Path, one_thread: None, flavour: str
) -> None:
    """The same draws as here, and the entropy."""
    server.set(flavour=flavour, most=300)
    teacher = ServerTeacher.connect(server.url, served_model, QUICK)
    teacher.check_selections(EVERY)
    local, tokens = TransformersTeacher.load(served_model, device="cpu"), blocks_of(3, 9)
    for given, wanted in zip(
        rows_of(teacher, tokens, 7, 25, EVERY, 4), rows_of(local, tokens, 7, 25, EVERY, 4), strict=True
    ):
        assert_same_rows(given, wanted, entropy=True)


def test_the_identity_names_model_and_dialect_and_no_address(server: Serving, served_model: Path) -> None:
    teacher = ServerTeacher.connect(server.url, served_model)
    assert teacher.identity() == {"name": "tiny", "revision": None, "files": [], "served": "vllm"}
    assert teacher.vocab_size == 300


def test_the_vocabulary_is_the_configs(server: Serving, served_model: Path, tmp_path: Path) -> None:
    """A model's head may have more rows than its tokenizer has ids."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((served_model / name).read_bytes())
    assert ServerTeacher.connect(server.url, tmp_path).vocab_size == 300
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 320}}')
    assert ServerTeacher.connect(server.url, tmp_path).vocab_size == 320


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        ({"status": 500}, 3),
        ({"status": 503}, 2),
        ({"status": 429, "retry_after": "0"}, 4),
        ({"status": 429, "retry_after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 1),
        ({"status": 429, "retry_after": "soon"}, 1),
        ({"do": "hang up"}, 3),
        ({"do": "break off"}, 3),
    ],
)
def test_what_passes_is_tried_again(server: Serving, served_model: Path, fault: dict[str, str], times: int) -> None:
    teacher, tokens = ServerTeacher.connect(server.url, served_model, QUICK), blocks_of(2, 5)
    undisturbed = rows_of(teacher, tokens, 0, 10, SELECTIONS, 0)
    server.set(reset=True, faults=[fault] * times)
    for given, wanted in zip(rows_of(teacher, tokens, 0, 10, SELECTIONS, 0), undisturbed, strict=True):
        np.testing.assert_array_equal(given.ids, wanted.ids)
    assert server.set()["asked"] == 2 + times


def straight(server: Serving, folder: Path, options: ServerOptions) -> ServerTeacher:
    """One that has not asked anything yet."""
    asking = Asking(Client(server.url, None, options), VllmDialect(), "tiny", 300)
    return ServerTeacher(asking, load_tokenizer(folder), None, options.concurrency)


def test_a_stalled_request_is_given_up_and_asked_again(server: Serving, served_model: Path) -> None:
    teacher = straight(server, served_model, ServerOptions(timeout=1, attempts=20, backoff=0.01))
    server.set(faults=[{"do": "stall"}])
    assert len(rows_of(teacher, blocks_of(1, 5), 0, 5, SELECTIONS, 0)[0]) == 5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 503}, r"keeps answering 503 \(try later, None\); look at the server"),
        ({"do": "hang up"}, "cannot be reached or breaks off"),
        ({"do": "stall"}, r"does not answer within 0\.5 s; allow more with --request-timeout"),
        ({"status": 400}, r"to blocks from 7 on is 400 \(try later"),
        ({"status": 404}, "to blocks from 7 on is 404"),
        ({"status": 401}, "it wants a key in LOGITCACHE_API_KEY"),
    ],
)
def test_what_does_not_pass_is_one_sentence(
    server: Serving, served_model: Path, fault: dict[str, str], said: str
) -> None:
    options = ServerOptions(attempts=2, backoff=0.01, timeout=0.5 if fault.get("do") == "stall" else 60)
    teacher = straight(server, served_model, options)
    server.set(faults=[fault] * 2)
    with pytest.raises(ModelError, match=said) as caught:
        rows_of(teacher, blocks_of(1, 5), 7, 5, SELECTIONS, 0)
    assert "the same command goes on" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (500, "with vLLM's prompt_logprobs it answers 500, with OpenAI's .* it answers 500"),
        (503, "keeps answering 503"),
    ],
)
def test_a_server_that_fails_when_it_is_tried(server: Serving, served_model: Path, status: int, said: str) -> None:
    """500 is how some say that they do not know a question."""
    server.set(faults=[{"status": status}] * 9)
    with pytest.raises(ModelError, match=said):
        ServerTeacher.connect(server.url, served_model, QUICK)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("shorten", "block 3 cannot be used: it tells of 4 positions of 5"),
        ("shift", r"block 3, position 0 cannot be used: it does not know id \d+, the token that was sent"),
        ("nan", "block 3, position 1 cannot be used: it says NaN"),
        ("logits", "block 3, position 0 cannot be used: it says numbers above 0"),
        ("few", "block 3, position 0 cannot be used: it tells 38 of 40 entries"),
        ("forget", "block 3, position 0 cannot be used: it leaves a position out"),
        ("html", "blocks from 3 on is 200 with something that is not JSON"),
    ],
)
def test_answers_that_cannot_be_used(server: Serving, served_model: Path, spoil: str, said: str) -> None:
    teacher, tokens = ServerTeacher.connect(server.url, served_model, QUICK), blocks_of(1, 5)
    rows_of(teacher, tokens, 3, 5, SELECTIONS, 0)
    server.set(spoil=spoil)
    with pytest.raises(ModelError, match=said):
        rows_of(teacher, tokens, 3, 5, SELECTIONS, 0)


def test_requests_go_out_together_and_no_more_than_asked(server: Serving, served_model: Path) -> None:
    """The server answers only when three wait; with a fourth, it would have seen four."""
    teacher = ServerTeacher.connect(server.url, served_model, QUICK)
    server.set(reset=True, together=3)
    rows_of(teacher, blocks_of(9, 4), 0, 36, SELECTIONS, 0)
    report = server.set()
    assert (report["asked"], report["most_waiting"]) == (9, 3)
    assert teacher.blocks_at_once >= 3


def test_the_pace_spaces_turns_and_saves_none() -> None:
    """By a clock of its own."""
    now, starts = 100.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def take(pace: Pace, turns: int) -> None:
        for _ in range(turns):
            await pace.turn()
            starts.append(now)

    pace = Pace(4, clock=lambda: now, sleep=sleep)
    asyncio.run(take(pace, 3))
    assert starts == [100, 100.25, 100.5]
    now = 200.0
    asyncio.run(take(pace, 2))
    assert starts[3:] == [200, 200.25]
    asyncio.run(take(Pace(None, clock=lambda: now, sleep=sleep), 2))
    assert starts[5:] == [200.25, 200.25]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"requests_per_second": 0.0}, "requests-per-second is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServerOptions(**fields)  # type: ignore[arg-type]
