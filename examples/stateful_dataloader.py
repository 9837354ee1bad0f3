"""torchdata's StatefulDataLoader with worker processes: python examples/stateful_dataloader.py CACHE STATE BATCHES.

Prints the first tokens of each batch; run again, it goes on after the last batch that it printed.
"""

import sys
from pathlib import Path

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from logitcache import open_cache
from logitcache.reader import CacheDataset, ReaderOptions

cache, path, count = open_cache(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dataset = CacheDataset(cache, ReaderOptions(batch_blocks=8))
loader = StatefulDataLoader(dataset, batch_size=None, num_workers=2, pin_memory=torch.cuda.is_available())
if path.exists():
    loader.load_state_dict(torch.load(path, weights_only=True))
for _, batch in zip(range(count), loader, strict=False):
    print(batch.samples_seen, batch.input_ids[:, 0].tolist(), tuple(batch.targets.ids.shape))
torch.save(loader.state_dict(), path)
