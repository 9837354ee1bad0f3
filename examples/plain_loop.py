"""A plain PyTorch loop: python examples/plain_loop.py CACHE MODEL CHECKPOINT STEPS. Run again, it goes on exactly."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from logitcache import open_cache
from logitcache.losses import distillation_loss
from logitcache.reader import CacheDataset, ReaderOptions

cache, source, checkpoint, steps = open_cache(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
dataset = CacheDataset(cache, ReaderOptions(batch_blocks=8, pin_memory=device == "cuda"))
parts = {"model": model, "optimizer": optimizer, "reader": dataset}
if checkpoint.exists():
    for name, state in torch.load(checkpoint, weights_only=True).items():
        parts[name].load_state_dict(state)
for _, packed in zip(range(steps), dataset, strict=False):
    batch = packed.to(device, non_blocking=True)
    hidden = model.base_model(batch.input_ids).last_hidden_state.flatten(0, 1)
    loss = distillation_loss(hidden, model.lm_head.weight, batch.labels.flatten(), batch.targets, alpha=0.9)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{packed.samples_seen} blocks: loss {loss.item():.4f}")
torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
