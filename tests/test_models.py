"""Loading, identity and the split into body and head, on tiny random models."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from logitcache import models
from logitcache.errors import LogitcacheError, ModelError, UsageError
from logitcache.models import saving
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the ModelError that `call` raises: one line, no full stop."""
    with pytest.raises(ModelError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


# ---------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_split_makes_the_models_logits(family: str, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_model(family, vocab_size=301, tie_word_embeddings=tied).to(dtype)
    models.check_split(model)
    body, head = models.split_model(model)
    assert body is model.base_model
    assert (head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.randint(0, 301, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = models.body_hidden(model, ids)
        ours = models.head_logits(hidden.reshape(-1, hidden.shape[-1]), head)
        theirs = model(input_ids=ids).logits.reshape(-1, 301)
    assert ours.dtype == torch.float32
    exact = dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 5e-2)


def test_what_the_heads_hold() -> None:
    assert models.split_model(tiny_model("phi"))[1].bias is not None
    assert models.split_model(tiny_model("gemma2"))[1].softcap == 7.0
    assert models.split_model(tiny_model("cohere"))[1].logit_scale == 0.25
    assert models.split_model(tiny_model("granite"))[1].logit_scale == pytest.approx(0.2)
    plain = models.split_model(tiny_model("llama", final_logit_softcapping=None, logit_scale=1.0))[1]
    assert (plain.bias, plain.softcap, plain.logit_scale) == (None, None, None)


def test_gradients_reach_the_head() -> None:
    _, head = models.split_model(tiny_model("gemma2"))
    hidden = torch.randn(3, 32, requires_grad=True)
    models.head_logits(hidden, head).logsumexp(-1).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None


@pytest.mark.parametrize("change", ["softcap", "scale", "bias", "mask"])
def test_logits_made_in_another_way_are_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights so small that no softcap would show without amplifying them.
    model = tiny_model("llama", initializer_range=0.002)
    forward = type(model).forward

    def odd(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        logits = output.logits
        if change == "softcap":
            output.logits = 30 * torch.tanh(logits / 30)
        elif change == "scale":
            output.logits = logits * 1.01
        elif change == "bias":
            output.logits = logits + 0.1
        else:
            output.logits = logits[..., :-1]
        return output

    models.check_split(model)
    monkeypatch.setattr(type(model), "forward", odd)
    model.train()
    message = refused(models.check_split, model)
    assert message == (
        "LlamaForCausalLM (model type 'llama') computes its logits in a way logitcache does not know; "
        "choose another architecture, or report this one"
    )
    assert model.training


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny_model("llama")
    forward = type(model.model).forward

    def ahead(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = forward(model.model, input_ids=input_ids, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state[:, -1:]
        return output

    model.model.forward = ahead
    assert refused(models.check_split, model).startswith("LlamaForCausalLM lets a position see the tokens after it")


def test_heads_that_are_no_plain_linear_are_refused() -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, base_layer: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.weight = base_layer.weight

    model = tiny_model()
    model.lm_head = Adapter(model.lm_head)
    assert refused(models.split_model, model).startswith("LlamaForCausalLM has Adapter where logitcache needs a plain")
    model = tiny_model()
    assert refused(models.split_model, model.model).startswith("LlamaModel is a body without an LM head")
    with torch.device("meta"):
        meta = type(model)(model.config)
    assert refused(models.split_model, meta) == "LlamaForCausalLM lies on meta; load it whole on one device"
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(300, 32, dtype=torch.int8), requires_grad=False)
    assert "quantised to torch.int8" in refused(models.split_model, model)
    model.get_base_model = lambda: model
    assert "merge_and_unload" in refused(models.split_model, model)


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    model = tiny_model()

    def broken(**_: Any) -> Any:
        raise ValueError("pixel_values are needed")

    model.model.forward = broken
    assert "does not run on token ids alone (ValueError: pixel_values are needed)" in refused(models.check_split, model)


@pytest.mark.parametrize("vocab_size", [1, 5])
def test_vocabularies_of_a_few_ids_can_be_checked(vocab_size: int) -> None:
    models.check_split(tiny_model("gpt2", vocab_size=vocab_size))


# ---------------------------------------------------------------------------------------------- loading


def test_load(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    model = models.load_model(str(folder))
    assert (model.training, model.dtype, model.device.type) == (False, torch.float32, models.choose_device("auto").type)
    assert torch.equal(model.lm_head.weight.cpu(), tiny_model().lm_head.weight)
    assert models.load_model(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert len(models.load_tokenizer(folder)) == 300
    assert before == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    assert capfd.readouterr() == ("", "")


def test_progress_bars_that_ignore_the_settings_are_silenced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm.auto import tqdm

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: list(tqdm(range(3))))
    assert models.load_tokenizer(folder) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_wrong_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^the dtype must be one of auto, float32, bfloat16, float16, not 'int4'$"):
        models.load_model(folder, dtype="int4")
    with pytest.raises(UsageError, match=r"^the device must be one of auto, cpu, cuda, not 'tpu'$"):
        models.load_model(folder, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"torch finds no usable CUDA device; choose cpu or auto$"):
        models.load_model(folder, device="cuda")


def test_folders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("./mising-dir", "/no/such/dir", "models/mising", "../x", "~/mising-dir", "a/b/c"):
        expected = f"the model folder {name} does not exist; check the spelling and the working folder"
        assert refused(models.load_model, name) == expected
        assert refused(models.load_tokenizer, name) == expected


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(models.load_model, empty).startswith(f"{empty} has no config.json, so it is not a model;")
    assert refused(models.load_model, "").startswith("the name of the model is empty;")
    (empty / "adapter_config.json").write_text("{}")
    assert "holds an adapter, not a whole model" in refused(models.load_model, empty)
    assert (
        refused(models.load_model, folder / "config.json")
        == f"{folder}/config.json is a file; name its folder {folder}"
    )


def test_gguf_that_is_not_named_or_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    for name in ("b.gguf", "a.gguf"):
        (gguf / name).write_bytes(b"GGUF broken")
    assert refused(models.load_model, gguf) == (
        f"{gguf} has no config.json but holds a.gguf, b.gguf; name the one to load with --gguf-file a.gguf"
    )
    assert refused(models.load_model, gguf, "c.gguf") == f"{gguf} has no file c.gguf; it holds a.gguf, b.gguf"
    assert refused(models.load_tokenizer, folder, "c.gguf") == f"{folder} has no file c.gguf; it holds no GGUF file"
    assert refused(models.load_model, gguf / "a.gguf").endswith(f"name its folder {gguf} and add --gguf-file a.gguf")
    assert refused(models.load_model, gguf, "a.gguf").startswith(f"the model {gguf}/a.gguf cannot be loaded (")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = 'loading a.gguf needs the gguf package; run: pip install "logitcache[demo]"'
    assert refused(models.load_model, gguf, "a.gguf") == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_ty', "config.json is not JSON (Unterminated string"),
        ("[]", "config.json names no model_type;"),
        ("7", "config.json names no model_type;"),
        ("{}", "config.json names no model_type; fetch or save the model again"),
        ('{"model_type": "nosuch"}', "does not know as a causal language model; choose another model"),
        ('{"model_type": "vit"}', "is a 'vit' model, which transformers"),
        ('{"model_type": "own", "auto_map": {}}', "load it with trust_remote_code only if you trust its authors"),
        (
            '{"model_type": "llama", "hidden_size": "wide"}',
            "cannot be loaded (Validation error for field 'hidden_size': ",
        ),
    ],
)
def test_broken_configs(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    assert message in refused(models.load_model, folder)


def test_weights_that_are_missing_or_damaged(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    whole = path.read_bytes()
    del weights["model.norm.weight"], weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert refused(models.load_model, folder) == (
        f"{folder} lacks 2 of the model's weights (lm_head.weight, model.norm.weight), which would be random; "
        "fetch or save the model again"
    )
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(models.load_model, folder).startswith(f"the weight file {path} is damaged or incomplete (")
    path.write_bytes(b"")
    assert refused(models.load_model, folder).startswith(f"the weight file {path} is damaged or incomplete (")
    path.unlink()
    assert refused(models.load_model, folder).startswith(
        f"{folder} has a config.json but no weights (model.safetensors)"
    )


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    message = refused(models.load_model, folder)
    assert message.startswith("the weight lm_head.weight of ")
    assert message.endswith(
        "has shape [300, 32], but its config.json asks for [300, 64]; fetch or save the model again"
    )


def test_weights_that_the_model_does_not_use_are_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    models.load_model(folder, device="cpu")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"9 weights in {folder} are not used by the model, such as model.layers.1.input_layernorm.weight"
    )


def test_shards_that_are_missing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = models.weight_files(tmp_path)
    assert len(shards) > 2
    models.check_split(models.load_model(tmp_path, device="cpu"))
    shards[1].unlink()
    assert f"lacks 1 of its {len(shards) - 1} weight files ({shards[1].name}); fetch" in refused(
        models.load_model, tmp_path
    )
    shards[0].write_text("[]")
    assert "is not an index of weight files" in refused(models.load_model, tmp_path)


def test_tied_heads_are_not_missing(tmp_path: Path) -> None:
    save_tiny(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = models.load_model(tmp_path, device="cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bare", with_tokenizer=False)
    assert refused(models.load_tokenizer, folder) == (
        f"{folder} has no tokenizer file such as tokenizer.json; save the model's tokenizer there"
    )
    (folder / "tokenizer.json").write_text('{"bro')
    assert refused(models.load_tokenizer, folder).startswith(f"{folder} has no tokenizer that can be loaded (")


# ---------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache(hub: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--someone--tiny"
    save_tiny(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert torch.equal(models.load_model("someone/tiny", device="cpu").lm_head.weight, tiny_model().lm_head.weight)
    assert len(models.load_tokenizer("someone/tiny")) == 300
    identity = models.model_identity("someone/tiny")
    assert (identity["name"], identity["revision"]) == ("someone/tiny", revision)


@pytest.mark.parametrize("name", ["someone/absent", "absent"])
def test_a_hub_id_that_is_not_in_the_cache(hub: Path, name: str) -> None:
    assert refused(models.load_model, name) == (
        f"{name} is neither a folder here nor a model that the hub's cache or the hub could give "
        "(LocalEntryNotFoundError); check the spelling, the network and HF_HUB_OFFLINE"
    )


# ---------------------------------------------------------------------------------------------- identity


def test_model_identity(folder: Path, tmp_path: Path) -> None:
    identity = models.model_identity(folder)
    assert [file["name"] for file in identity["files"]] == ["config.json", "model.safetensors"]
    assert (identity["name"], identity["revision"]) == ("tiny", None)
    copy = tmp_path / "copy"
    models.save_model(models.load_model(folder, device="cpu"), copy)
    assert models.model_identity(copy)["sha256"] == identity["sha256"]
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = -weights["model.norm.weight"][3]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert models.model_identity(copy)["sha256"] != identity["sha256"]
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert [file["name"] for file in models.model_identity(folder, "a.gguf")["files"]] == ["a.gguf"]


def test_tokenizer_identity(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    identity = models.tokenizer_identity(tokenizer)
    assert (identity["size"], identity["eos_id"], identity["bos_id"], identity["unk_id"]) == (300, 0, 1, None)
    tokenizer("some text", truncation=True, max_length=2)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ messages }}"
    for turn in ("first", "second"):
        tokenizer.save_pretrained(tmp_path / turn)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / turn)
        assert models.tokenizer_identity(tokenizer) == identity
    others = [tiny_tokenizer(), tiny_tokenizer(299, bos=True), tiny_tokenizer(bos=True)]
    others[-1].add_tokens(["<more>"])
    assert len({models.tokenizer_identity(other)["sha256"] for other in [tokenizer, *others]}) == 4


def test_slow_tokenizers_are_identified_by_their_vocabulary() -> None:
    class Slow:
        bos_token_id, eos_token_id, unk_token_id = None, 1, 0

        def __init__(self, words: list[str]) -> None:
            self.words = words

        def __len__(self) -> int:
            return len(self.words)

        def get_vocab(self) -> dict[str, int]:
            return {word: index for index, word in enumerate(self.words)}

    assert models.tokenizer_identity(Slow(["a", "b"])) == models.tokenizer_identity(Slow(["a", "b"]))
    assert (
        models.tokenizer_identity(Slow(["a", "b"]))["sha256"] != models.tokenizer_identity(Slow(["b", "a"]))["sha256"]
    )


# ---------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("hidden", [0o022, 0o007])
def test_a_saved_model_is_for_those_whom_the_umask_lets_read(hidden: int, tmp_path: Path) -> None:
    before = os.umask(hidden)
    try:
        models.save_model(tiny_model(), tmp_path / "model", tiny_tokenizer())
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~hidden}


def test_convert_gguf_is_atomic_and_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GGUF reader itself is transformers'; what surrounds it is ours."""
    calls = []

    def load(folder: Any, gguf_file: str, dtype: str, device: str) -> Any:
        calls.append(gguf_file)
        model = tiny_model()
        # As transformers leaves a model that it loaded from GGUF.
        model.config.quantization_config, model.hf_quantizer, model.is_quantized = (
            {"quant_method": "gguf"},
            object(),
            True,
        )
        return model

    monkeypatch.setattr(saving, "load_model", load)
    monkeypatch.setattr(saving, "load_tokenizer", lambda folder, gguf_file: tiny_tokenizer())
    out = tmp_path / "cache" / "converted"

    with monkeypatch.context() as patch:

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(type(tiny_model()), "save_pretrained", full)
        assert "cannot be written to" in refused(models.convert_gguf, tmp_path, "a.gguf", out)
        assert not list(out.parent.iterdir())

    assert models.convert_gguf(tmp_path, "a.gguf", out) == out
    assert models.convert_gguf(tmp_path, "a.gguf", out) == out
    assert calls == ["a.gguf"] * 2
    assert [path.name for path in out.parent.iterdir()] == ["converted"]
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert out.stat().st_mode == ordinary.stat().st_mode
    monkeypatch.undo()
    assert torch.equal(models.load_model(out, device="cpu").lm_head.weight, tiny_model().lm_head.weight)
    assert len(models.load_tokenizer(out)) == 300
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    monkeypatch.setattr(saving, "load_model", load)
    monkeypatch.setattr(saving, "load_tokenizer", lambda folder, gguf_file: tiny_tokenizer())
    assert refused(models.convert_gguf, tmp_path, "a.gguf", occupied).startswith(f"{occupied} cannot be written (")


def test_errors_keep_their_cause(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(LogitcacheError) as caught:
        models.load_model(folder)
    assert caught.value.__cause__ is not None


def test_a_failed_load_logs_nothing(folder: Path) -> None:
    """transformers logs a report of several lines about missing weights; the error says it in one."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    transformers_logging.add_handler(handler)
    try:
        refused(models.load_model, folder)
        assert not records
        AutoModelForCausalLM.from_pretrained(folder)
        assert records
    finally:
        transformers_logging.remove_handler(handler)


def test_the_models_transformers_loads_are_ours(folder: Path) -> None:
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(models.load_model(folder, device="cpu")(ids).logits, theirs(ids).logits)
