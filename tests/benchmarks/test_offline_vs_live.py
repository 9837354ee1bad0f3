"""The comparison with a live teacher compares like with like, and its arithmetic is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import offline_vs_live
from benchmarks.live_teacher import dense_loss, sliced_loss
from benchmarks.offline_training import ALPHA, CACHED, CE, DENSE, DUMPS, SLICED, WAYS, Setting, Training
from logitcache.losses import LossSettings, Objective, patch_forward
from logitcache.planning.break_even import Costs
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.store import open_cache
from logitcache.teachers import TransformersTeacher
from tests.caches import BLOCK_LENGTH, corpus_text
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def lesson(dumped):
    """The teacher, and a batch of whole blocks from its cache of all ids."""
    cache = open_cache(dumped.dense)
    options = ReaderOptions(4, stop_block=cache.num_tokens // BLOCK_LENGTH)
    (batch,) = CacheDataset(cache, options, num_batches=1)
    return TransformersTeacher.load(dumped.teacher, dtype="float32", device="cpu"), batch


def gradients(loss: torch.Tensor, student) -> list[torch.Tensor]:
    student.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in student.parameters()]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_live_losses_are_one_loss(lesson, monkeypatch: pytest.MonkeyPatch, tied: bool, alpha: float) -> None:
    """In several slices, as in one piece: value and every gradient."""
    teacher, batch = lesson
    monkeypatch.setattr(teacher, "row_slices", lambda rows: (slice(s, min(s + 50, rows)) for s in range(0, rows, 50)))
    student = tiny_model(seed=5, tie_word_embeddings=tied).train()
    losses = [loss(student, teacher, batch.input_ids, batch.labels, alpha) for loss in (dense_loss, sliced_loss)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for dense, sliced in zip(*(gradients(loss, student) for loss in losses), strict=True):
        assert (sliced - dense).norm() <= 2e-5 * dense.norm()


def test_live_losses_under_autocast(lesson) -> None:
    """As on a GPU: products in bfloat16, the rest in float32. Slices are as exact as dense logits."""
    teacher, batch = lesson
    student = tiny_model(seed=5).train()
    exact = gradients(dense_loss(student, teacher, batch.input_ids, batch.labels, ALPHA), student)
    errors = []
    for loss in (dense_loss, sliced_loss):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(student, teacher, batch.input_ids, batch.labels, ALPHA)
        assert value.dtype == torch.float32
        errors.append([(a - b).norm() / b.norm() for a, b in zip(gradients(value, student), exact, strict=True)])
    for dense, sliced in zip(*errors, strict=True):
        assert 1e-4 < sliced < 1.2 * dense


@pytest.mark.parametrize("loss", [dense_loss, sliced_loss])
def test_a_cache_of_all_ids_is_a_live_teacher(lesson, loss) -> None:
    """Offline and live at the same weights: the loss and its gradient, up to how the cache rounds probabilities."""
    teacher, batch = lesson
    student = tiny_model(seed=5).train()
    live = loss(student, teacher, batch.input_ids, batch.labels, ALPHA)
    expected = gradients(live, student)
    patch_forward(student, LossSettings(Objective.forward_kl("bucket")))
    cached = student(
        input_ids=batch.input_ids, shift_labels=batch.labels, teacher_targets=batch.targets, alpha=ALPHA
    ).loss
    assert cached.item() == pytest.approx(live.item(), rel=1e-3)
    for mine, theirs in zip(gradients(cached, student), expected, strict=True):
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()


def test_break_even() -> None:
    """Both ways take as long where the formula says, and the cache gains beyond."""
    cost = Costs(dump=3.0, cached=1.0, live=2.5)
    assert cost.students() == 2
    assert cost.students(epochs=4) == 0.5
    assert cost.dump + 2 * cost.cached == 2 * cost.live
    assert cost.speed_up(2) == 1
    assert cost.speed_up(1, epochs=2) == 1
    assert cost.speed_up(1) < 1 < cost.speed_up(3)
    assert cost.speed_up(10**9) == pytest.approx(cost.live / cost.cached)
    assert Costs(3.0, 1.0, 1.0).students() == math.inf


def test_tables_are_medians_of_rounds() -> None:
    """One round in which the machine did something else changes no figure."""
    names = (*WAYS, *DUMPS)
    calm = dict.fromkeys(names, 1.0) | dict.fromkeys(DUMPS, 3.0) | dict.fromkeys((DENSE, SLICED), 4.0)
    seconds = {name: [value, value * (40 if name in CACHED.values() else 1), value] for name, value in calm.items()}
    rows = [line.split(" | ") for line in offline_vs_live.break_even_table(seconds).splitlines()[2:]]
    assert len(rows) == 4
    for row in rows:
        assert row[2:5] == ["1.00", "0.50", "0.25"]
        assert row[5:8] == ["1.00", "1.60", "2.29"]
    setting = Setting(Path(), (), Path(), Path(), 8, "cpu")
    text = offline_vs_live.speed_table(setting, seconds, dict.fromkeys(names, 10.0) | {DENSE: 25.0})
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines()}
    assert cells[DENSE] == ["0", "0.250", "-", "25", "2.50 |"]
    assert cells[CACHED["top-k:64"]] == ["1", "1.000", "0.95: yes", "10", "1.00 |"]
    assert "0.95: NO" in offline_vs_live.speed_table(setting, {**seconds, CE: [0.5] * 3}, {})


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments of a run that takes seconds."""
    teacher = save_tiny(tmp_path / "teacher", max_position_embeddings=256)
    (tmp_path / "text.txt").write_text(corpus_text(100))
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "intermediate_size": 64, "max_position_embeddings": 256, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "student.json").write_text(json.dumps(config))
    return [
        *("--teacher", str(teacher), "--corpus", str(tmp_path / "text.txt"), "--device", "cpu"),
        *("--student", str(tmp_path / "student.json"), "--folder", str(tmp_path / "caches")),
        *("--steps", "2", "--rounds", "2", "--batch-blocks", "2", "--cache-tokens", "2100"),
    ]


def test_the_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """All tables, with caches that end in a short block; then the peak of one process, from the same caches."""
    offline_vs_live.main([*command, "--no-memory", "--clock", "cpu"])
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    speeds = {row[0]: row for row in rows if len(row) == 6 and row[0]}
    assert set(speeds) == {*WAYS, *DUMPS}
    assert speeds[CE][2] == "1.000"
    assert [row[:2] for row in rows if row[1] in (DENSE, SLICED)] == [[s, w] for s in CACHED for w in (DENSE, SLICED)]
    assert "2,100 tokens" in text
    assert "processor time" in text
    cache = open_cache(Path(command[command.index("--folder") + 1]) / "top-k-64")
    stored = next(row for row in rows if row[0] == "top-k:64" and len(row) == 5)
    assert stored[1] == f"{cache.num_bytes / cache.num_tokens:.1f}"
    offline_vs_live.main([*command, "--one", SLICED])
    assert 50 < json.loads(capsys.readouterr().out.splitlines()[-1])["peak_mb"] < 20_000


def test_every_way_learns_from_the_same_tokens(command: list[str]) -> None:
    """Steps lower the loss of the batches they were made on; the first of them is the same for all."""
    given = offline_vs_live.parser().parse_args(command)
    given.folder.mkdir()
    setting = offline_vs_live.setting_of(given, given.folder)
    teacher = setting.load_teacher()
    setting.dump({spec: given.folder / spec.replace(":", "-") for spec in CACHED}, given.cache_tokens, teacher)
    first = {}
    for name, way in WAYS.items():
        training = Training(way, setting, teacher if way.live else None)
        first[name], *_ = (float(loss) for loss in training.losses(6))
        assert training.seconds(1) > 0
        assert [float(loss) for loss in training.losses(1)] < [first[name]]
    ce, plain_ce, _, bucket, dense, sliced = first.values()
    assert plain_ce == pytest.approx(ce, rel=1e-5)
    assert sliced == pytest.approx(dense, rel=1e-3)
    # Classes that are thrown together tell less.
    assert 0.9 * dense < bucket < dense
