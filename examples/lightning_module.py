"""lightning's Trainer: python examples/lightning_module.py CACHE MODEL CHECKPOINT STEPS. Run again, it goes on."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoModelForCausalLM

from logitcache import open_cache
from logitcache.losses import patch_forward
from logitcache.reader import PackedBatch
from logitcache.reader.lightning import CacheDataModule


class Student(LightningModule):
    def __init__(self, source: str):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        patch_forward(self.model.train())

    def training_step(self, batch: PackedBatch, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch.input_ids, shift_labels=batch.labels, teacher_targets=batch.targets).loss
        print(f"{batch.samples_seen} blocks: loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


cache, source, checkpoint, steps = open_cache(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
begun = torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.exists() else 0
trainer = Trainer(max_steps=begun + steps, logger=False, enable_checkpointing=False, enable_progress_bar=False)
data = CacheDataModule(cache, global_batch_blocks=8)
trainer.fit(Student(source), data, ckpt_path=checkpoint if begun else None)
trainer.save_checkpoint(checkpoint)
