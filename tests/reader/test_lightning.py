"""A real lightning Trainer on a CacheDataModule: each block once in order, through checkpoints, epochs and workers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from logitcache.errors import TrainingError
from logitcache.reader import CacheDataset, PackedBatch, ReaderOptions
from logitcache.reader.lightning import CacheDataModule
from logitcache.store import Cache
from tests.caches import random_cache
from tests.ranks import run_ranks
from tests.reader.batches import MANY_WORKERS, global_batches, reader, tokens_of

pytestmark = [
    MANY_WORKERS,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*srun. command is available"),
]
BATCHES = 20


class Recorder(LightningModule):
    """Takes note of what it is trained on, and is stopped before step `stop` as if by a kill."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[Any] = []
        self.stop = stop

    def training_step(self, batch: PackedBatch, index: int) -> torch.Tensor:
        if self.global_step == self.stop:
            raise InterruptedError
        self.read.append(batch.input_ids.tolist())
        return self.weight * batch.targets.weights.sum()

    def validation_step(self, batch: PackedBatch, index: int) -> None:
        assert batch.input_ids.shape == (2, 5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("lightning") / "cache")


@pytest.fixture(scope="module")
def whole(cache: Cache) -> list[Any]:
    return tokens_of(reader(cache, BATCHES))


def trainer(max_steps: int, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_steps=max_steps, **{"enable_checkpointing": False, **quiet, **options})


def saving(folder: Path, every: int) -> dict[str, Any]:
    """Trainer options for a checkpoint after every few steps."""
    callback = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    return {"callbacks": [callback], "enable_checkpointing": True}


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_twice_and_resumed(cache: Cache, whole: list[Any], workers: int, tmp_path: Path) -> None:
    """Inside an epoch and in the next; each time lightning has fetched a batch that was not trained on."""
    read: list[Any] = []
    last = None
    for begin, stop in ((0, 5), (4, 15), (14, None)):
        module = Recorder(stop)
        data = CacheDataModule(cache, 4, workers)
        fit = trainer(BATCHES, **saving(tmp_path, 2)).fit
        if stop is None:
            fit(module, data, ckpt_path=last)
        else:
            with pytest.raises(InterruptedError):
                fit(module, data, ckpt_path=last)
            last = tmp_path / f"step={stop - stop % 2}.ckpt"
        del read[begin:]
        read += module.read
    assert read == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_the_trainer_go_on(cache: Cache, whole: list[Any], workers: int) -> None:
    """Seven batches each: the batch that was fetched beyond an epoch's end is the next one's first."""
    module = Recorder()
    trainer(BATCHES, limit_train_batches=7, max_epochs=-1).fit(module, CacheDataModule(cache, 4, workers))
    assert module.read == whole


def test_validation_leaves_the_place(cache: Cache, whole: list[Any]) -> None:
    """On packed batches of another order."""
    module, data = Recorder(), CacheDataModule(cache, 4)
    held_out = CacheDataset(cache, ReaderOptions(2, seed=9), 3)
    run = trainer(6, limit_train_batches=3, max_epochs=-1)
    data.val_dataloader = lambda: DataLoader(held_out, batch_size=None)  # type: ignore[method-assign]
    run.fit(module, data)
    assert module.read == whole[:6]
    assert data.state_dict()["samples_seen"] == 6 * 4


def _rank(root: str) -> list[Any]:
    from logitcache.store import open_cache

    module = Recorder()
    trainer(4, strategy="ddp", devices=2).fit(module, CacheDataModule(open_cache(root), 8, seed=3))
    return module.read


def test_rank_and_world_size_are_the_trainers(cache: Cache, tmp_path: Path) -> None:
    ranks = run_ranks(_rank, 2, tmp_path, str(cache.root))
    assert [one + other for one, other in zip(*ranks, strict=True)] == global_batches(cache, 1, 0, 4)


def test_refusals(cache: Cache, tmp_path: Path) -> None:
    """A checkpoint of another cache, and one of another seed; ranks that do not divide are `for_rank`'s to refuse."""
    run = trainer(2)
    run.fit(Recorder(), CacheDataModule(cache, 4))
    run.save_checkpoint(tmp_path / "one.ckpt")
    other = random_cache(tmp_path / "other", seed=1)
    for data, message in ((CacheDataModule(other, 4), "fingerprints"), (CacheDataModule(cache, 4, seed=1), "seed")):
        module = Recorder()
        with pytest.raises(TrainingError, match=f"resume from has {message}"):
            trainer(4).fit(module, data, ckpt_path=tmp_path / "one.ckpt")
        assert module.read == []


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "logitcache.reader.lightning")
    with pytest.raises(ImportError, match=r"needs lightning; install it: pip install 'logitcache\[lightning\]'$"):
        importlib.import_module("logitcache.reader.lightning")
