"""Files of records in every kind that a corpus may have."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KINDS = ["jsonl", "jsonl.gz", "parquet", "arrow", "stream.arrow"]


def write_records(folder: Path, kind: str, records: Sequence[dict[str, Any]]) -> Path:
    """A file of these records in `folder`; `stream.arrow` is the form that `datasets` writes."""
    path = folder / f"records.{kind}"
    if kind.startswith("jsonl"):
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        return path
    table = pa.Table.from_pylist(list(records))
    if kind == "parquet":
        pq.write_table(table, path)
        return path
    form = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
    with form(path, table.schema) as writer:
        # Several batches, so that rows are numbered over all of them.
        writer.write_table(table, max_chunksize=2)
    return path


def save_dataset(folder: Path, records: Sequence[dict[str, Any]], files: int = 2) -> Path:
    """A folder as `Dataset.save_to_disk` of `datasets` writes it, with a file of its cache that is no part of it."""
    folder.mkdir(parents=True)
    names, step = [], -(-len(records) // files)
    for number in range(files):
        part = write_records(folder, "stream.arrow", records[number * step : (number + 1) * step])
        names.append(f"data-{number:05d}-of-{files:05d}.arrow")
        part.rename(folder / names[-1])
    write_records(folder, "stream.arrow", records[:1]).rename(folder / "cache-0123456789abcdef.arrow")
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
