"""Teachers over several devices: accelerate's hooks really move and fetch weights, and the rows stay the same."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch.testing import assert_close

from logitcache import models
from logitcache.dump import run_dump
from logitcache.errors import ModelError, UsageError
from logitcache.models.placement import keep_head
from logitcache.selection import Selection
from logitcache.teachers import BlockBatch, TransformersTeacher
from tests.engines.dumps import make_place, options
from tests.tiny import FAMILIES, save_tiny, tiny_model

TOKENS = np.random.default_rng(0).integers(0, 300, (3, 16))
SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}


def write(folder: Path, device_map: Any) -> str:
    path = folder / "map.json"
    path.write_text(device_map if isinstance(device_map, str) else json.dumps(device_map))
    return str(path)


def exact(one: TransformersTeacher, other: TransformersTeacher) -> None:
    """Both give the same rows, bit by bit, and logits on the head's device."""
    selections = [Selection.parse("top-k:9"), Selection.parse("sample:7")]
    batch = BlockBatch(TOKENS, 0, 40, selections, 3)
    for ours, theirs in zip(*(each.begin_rows(batch)() for each in (one, other)), strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.weights, theirs.weights)
        np.testing.assert_array_equal(ours.label_logprob, theirs.label_logprob)
    hidden = other.hidden(TOKENS)
    assert hidden.device == other.logits(hidden).device == other.device == other.head.weight.device
    assert_close(one.logits(one.hidden(TOKENS)), other.logits(hidden), rtol=0, atol=0)


def away(teacher: TransformersTeacher) -> set[str]:
    return {name for name, parameter in teacher.model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_on_disk(tmp_path: Path, family: str, tied: bool) -> None:
    """Scales, softcaps and biases of every family; the body is fetched for each forward, the head is there."""
    folder = save_tiny(tmp_path / "teacher", family, tie_word_embeddings=tied)
    whole = TransformersTeacher.load(folder, device="cpu")
    spread = TransformersTeacher.load(folder, device_map=write(tmp_path, {"": "disk"}))
    exact(whole, spread)
    assert len(away(spread)) >= 2 * 9
    assert not any(parameter.is_meta for parameter in spread.model.get_output_embeddings().parameters())
    head, theirs = spread.head, whole.head
    assert (head.softcap, head.logit_scale, head.bias is None) == (
        theirs.softcap, theirs.logit_scale, theirs.bias is None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu", "model.layers.1": "disk"},
        {"": "disk", "model.layers.1.mlp": "cpu"},
        {"model": "cpu", "model.layers": "disk", "model.layers.0.self_attn.q_proj": "cpu", "lm_head": "disk"},
    ],
)
def test_entries_inside_of_others(tmp_path: Path, device_map: dict[str, str]) -> None:
    """The longest name counts, as transformers reads such a map; accelerate alone does not always."""
    folder = save_tiny(tmp_path / "teacher")
    spread = TransformersTeacher.load(folder, device_map=write(tmp_path, device_map))
    exact(TransformersTeacher.load(folder, device="cpu"), spread)
    for name in (name for name, _ in spread.model.named_parameters() if name != "lm_head.weight"):
        longest = max((key for key in device_map if key == "" or name.startswith(f"{key}.")), key=len)
        assert (name in away(spread)) == (device_map[longest] == "disk"), name


@pytest.mark.parametrize(("head", "tied"), [("cpu", True), ("cpu", False), ("disk", False)])
def test_some_layers_on_disk(tmp_path: Path, head: str, tied: bool) -> None:
    folder = save_tiny(tmp_path / "teacher", "gemma2", tie_word_embeddings=tied)
    device_map = {**SPLIT, "model.rotary_emb": "cpu", "lm_head": head}
    spread = TransformersTeacher.load(folder, dtype="bfloat16", device_map=write(tmp_path, device_map))
    exact(TransformersTeacher.load(folder, dtype="bfloat16", device="cpu"), spread)
    assert {name.split(".")[2] for name in away(spread) if "layers" in name} == {"0"}
    assert spread.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_weights_that_wait_in_memory(family: str) -> None:
    """As with layers on "cpu" beside a GPU: they are copied to where the layer runs, and taken back."""
    model = cpu_offload(tiny_model(family), execution_device=torch.device("cpu"))
    keep_head(model)
    spread = TransformersTeacher(model, None, {})
    exact(TransformersTeacher(tiny_model(family), None, {}), spread)
    assert away(spread)


def test_hooks_without_a_kept_head_are_refused() -> None:
    model = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM lies on meta; load it whole on one device$"):
        models.check_split(model)


@pytest.mark.parametrize("name", models.DEVICE_MAPS)
def test_named_maps_on_a_machine_with_one_device(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "teacher")
    spread = TransformersTeacher.load(folder, device_map=name)
    if not torch.cuda.is_available():
        exact(TransformersTeacher.load(folder, device="cpu"), spread)
    assert not away(spread)


def test_a_machine_with_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers itself leaves on disk what does not fit, and that is said."""
    folder = save_tiny(tmp_path / "teacher")
    room = 100_000
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *_: {"cpu": room})
    with caplog.at_level(logging.WARNING, "logitcache"):
        spread = TransformersTeacher.load(folder, device_map="auto")
    exact(TransformersTeacher.load(folder, device="cpu"), spread)
    assert 0 < len(away(spread)) < len(list(spread.model.parameters()))
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("logitcache"))
    assert f"of the weights of {folder} do not fit on the devices here and are fetched for every batch" in said


def test_weights_that_cannot_stay_where_they_are(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher")
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"keeps only weights of safetensors files on disk.*save_pretrained"):
        TransformersTeacher.load(folder, device_map=write(tmp_path, {"": "disk"}))


def test_one_weight_in_two_places(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"lm_head\.weight on disk.*which are one weight; give both the same device$"):
        models.load_model(folder, device_map=write(tmp_path, {"": "cpu", "lm_head": "disk"}))


BAD: dict[str, tuple[Any, str]] = {
    "name": ("fastest", r"^--device-map must be auto, .* or a \.json file .*, not 'fastest'$"),
    "missing file": ("nowhere.json", r"^the device map nowhere\.json cannot be read \(No such file or directory\)"),
    "not JSON": ("{lm_head: 1", r"map\.json is not JSON \("),
    "not text": (b"\xff\xfe\x00", r"map\.json is not JSON \("),
    "a list": ([0, 1], r"map\.json must be one JSON object of modules and devices"),
    "empty": ({}, r"map\.json must be one JSON object"),
    "a float": ({"": 0.5}, r"map\.json must be one JSON object"),
    "true": ({"": True}, r"map\.json must be one JSON object"),
    "no such device": ({"": "cuda:77"}, r"puts '' on 'cuda:77', which is no device here; torch sees \d+ accelerators"),
    "no such index": ({"lm_head": 77}, r"puts 'lm_head' on 77, which is no device here"),
    "a negative index": ({"lm_head": -1}, r"puts 'lm_head' on -1, which is no device here"),
    "no device at all": ({"lm_head": "attic"}, r"puts 'lm_head' on 'attic', which is no device here"),
    "meta": ({"": "meta"}, r"puts '' on 'meta', which is no device here"),
    "unknown module": (
        {"": "cpu", "transformer.h.0": "disk"},
        r"names 'transformer\.h\.0', which is no module of LlamaForCausalLM; its parts are model\.embed_tokens, "
        r"model\.layers, model\.norm, model\.rotary_emb, lm_head$",
    ),
    "layer too many": ({"": "cpu", "model.layers.2": "disk"}, r"names 'model\.layers\.2', which is no module"),
    "incomplete": (
        {"model.layers": "cpu", "lm_head": "disk"},
        r"says no device for 2 weights of LlamaForCausalLM, such as model\.embed_tokens\.weight; add them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    given, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    if isinstance(given, bytes):
        (tmp_path / "map.json").write_bytes(given)
        given = "map.json"
    elif not isinstance(given, str) or given.startswith("{"):
        given = write(tmp_path, given)
    with pytest.raises(UsageError, match=message) as caught:
        models.load_model(save_tiny(tmp_path / "teacher"), device_map=given)
    assert "\n" not in str(caught.value)


def test_without_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UsageError, match=r"^--device-map needs the accelerate package; run: pip install accelerate$"):
        models.load_model(save_tiny(tmp_path / "teacher"), device_map="auto")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, r"^--device-map says where the parts of the teacher run; leave --device out$"),
        ({"workers": 2}, r"one worker takes all GPUs of this machine, not 2; leave --workers out$"),
        ({"engine": "ray"}, r"^the engine ray gives a worker one GPU, and --device-map needs several; use torchrun$"),
    ],
)
def test_what_a_map_does_not_go_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(tmp_path, tmp_path / "cache", **{"device": "auto", "device_map": "auto", **changes})


def test_ranks_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second worker would take the same GPUs, unless SLURM divided them."""
    given = options(make_place(tmp_path), tmp_path / "cache", engine="torchrun", device="auto", device_map="auto")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"this is worker 2 of its machine; start one on each, or let srun"):
        run_dump(given)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "4")
    assert run_dump(given).computed_tokens
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.delenv("SLURM_GPUS_PER_TASK")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run_dump(given).computed_tokens


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot pretend to have other devices",
)
def test_what_flows_goes_from_device_to_device() -> None:
    """Three devices that torch only pretends to have: no numbers, but what does not lie together is refused."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.three_devices"], capture_output=True, text=True)
    assert ran.stdout.split() == ["pretend:0", "pretend:1", "pretend:2", "pretend:2", "cpu"], ran.stderr[-2000:]
    assert ran.stderr.strip().endswith("found at least two devices, pretend:1 and pretend:2!")
