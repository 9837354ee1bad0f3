"""The dataset card of a cache: a README with the front matter that hubs read, made of the manifest."""

from __future__ import annotations

import json
from typing import Any

from logitcache.store.schema import Manifest

CARD = "README.md"
# The Hub's names, of the number of rows; a row is a block here.
SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}

TEMPLATE = """\
---
pretty_name: {quoted}
tags:
- logitcache
- knowledge-distillation
- logits
task_categories:
- text-generation
size_categories:
- {size}
viewer: false
---

# {title}

A logitcache cache: what a teacher language model predicted at every position of
a corpus, for training students without running the teacher.

| | |
|---|---|
{rows}

## How to read it

    pip install 'logitcache[s3]'
    logitcache inspect {location}
    logitcache train --cache {location} --student student.yaml --out run{objective}

```python
import logitcache

cache = logitcache.open_cache({location!r})
blocks = cache.read_blocks(0, 8)  # tokens [8, {block_length}] and the teacher's rows for them
```

The files are described in logitcache's `FORMAT.md`; `logitcache verify {location}` checks every byte of them. The
licences of the teacher and of the corpus apply.
"""


def dataset_card(manifest: Manifest, num_bytes: int, location: str) -> str:
    """README.md of a cache.

    Args:
        manifest: of a finished cache.
        num_bytes: of its shards and tables.
        location: path or URL where it can be read.
    """
    identity = manifest.identity
    tokens, geometry = identity.geometry.num_tokens, identity.geometry
    selection = identity.selection
    spec = str(selection.spec)
    teacher = str(identity.teacher.get("name", "unknown"))
    corpus = identity.corpus
    entries = sum(shard.num_entries for shard in manifest.shards)
    title = f"{teacher.rstrip('/').rpartition('/')[2]}, {spec}"
    began = "import" if "imported_from" in identity.teacher else "dump"
    left_out = manifest.counters.get("nonfinite")
    facts: dict[str, Any] = {
        "teacher": f"{teacher} ({_known(identity.teacher, 'revision', 'dtype')})",
        "tokenizer": f"SHA-256 `{identity.tokenizer.get('sha256', 'unknown')}`",
        "vocabulary": f"{identity.vocab_size:,} ids",
        "corpus": f"{len(corpus.get('files', [])):,} files ({_known(corpus, 'documents', 'sha256')})",
        "selection": f"`{spec}`" + (", unbiased" if selection.unbiased else ""),
        **({"counted": f"{manifest.counters['counted']:,} tokens"} if "counted" in manifest.counters else {}),
        **({"left out": f"{left_out:,} rows, logits NaN or infinite"} if left_out else {}),
        "tokens": f"{tokens:,} in {geometry.num_blocks:,} blocks of {geometry.block_length}",
        "ids a token": f"{entries / tokens:.1f}",
        "size": f"{num_bytes:,} bytes, {num_bytes / tokens:.1f} bytes a token, {len(manifest.shards)} shards",
        "container": identity.container,
        "made by": " → ".join([began, *(step.operation for step in identity.ancestry)]),
        "fingerprint": f"`{manifest.fingerprint}`",
    }
    return TEMPLATE.format(
        title=title,
        quoted=json.dumps(title, ensure_ascii=False),
        size=next((name for most, name in SIZES.items() if geometry.num_blocks < most), "n>10M"),
        rows="\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
        location=location,
        block_length=geometry.block_length,
        # The only one that needs no ids.
        objective=" --objective policy-gradient" if selection.method == "label" else "",
    )


def _known(fields: dict[str, Any], *names: str) -> str:
    """Some fields as `name value, name value`."""
    found = [f"{name} {fields[name]}" for name in names if fields.get(name) not in (None, "")]
    return ", ".join(found) or "nothing more is known"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
