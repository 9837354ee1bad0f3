"""Models and tokenizers: where they come from, what identifies them, and how their logits are made.

Legend: V rows of the LM head, D width of the hidden state, B sequences of L tokens, N positions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
import re
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from logitcache.errors import ModelError, UsageError

_logger = logging.getLogger(__name__)

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
# The order in which transformers looks for weights.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# These multiply by `logits_scaling`; Granite, its relatives and MiniCPM3 divide.
_MULTIPLY_BY_SCALING = ("hyperclovax",)
_NOT_IDENTITY = ("truncation", "padding")


# ---------------------------------------------------------------------------------------------- loading


def load_model(
    source: str | Path,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model, in eval mode, whole on one device.

    Args:
        source: a local folder, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        gguf_file: name of a GGUF file inside `source` to load instead of safetensors.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UsageError: an unknown dtype or device.
        ModelError: the model is missing, damaged, incomplete or of a kind that cannot be loaded.
    """
    torch_dtype, torch_device = _chosen_dtype(dtype), choose_device(device)
    folder = resolve_source(source, gguf_file)
    if gguf_file is None:
        _check_config(folder, trust_remote_code)
        weight_files(folder)
    with _quiet(), _explained(folder, gguf_file, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf_file,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, info = loaded
    _check_loaded(folder, info)
    with _explained(folder, gguf_file, "model"):
        return model.to(torch_device).eval()


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model of which transformers made up a weight; it would only log that."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}), which would be random; "
            "fetch or save the model again"
        )
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"the weight {name} of {folder} has shape {list(stored)}, but its config.json asks for {list(expected)}; "
            "fetch or save the model again"
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        _logger.warning("%d weights in %s are not used by the model, such as %s", len(unused), folder, unused[0])


def load_tokenizer(source: str | Path, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local folder, hub id or GGUF file.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    folder = resolve_source(source, gguf_file, weights=False)
    with _quiet(), _explained(folder, gguf_file, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=gguf_file, trust_remote_code=trust_remote_code, local_files_only=True
        )
    if not len(tokenizer):
        raise ModelError(f"the tokenizer in {folder} is empty; save the model's tokenizer into that folder")
    return tokenizer


def resolve_source(source: str | Path, gguf_file: str | None = None, weights: bool = True) -> Path:
    """The local folder behind a folder name or hub id (downloaded if it is not in the hub's cache).

    Raises:
        ModelError: no such folder or hub model, or the folder holds neither a model nor `gguf_file`.
    """
    name = str(source)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ModelError(
            f"{name} is a file; name its folder {folder.parent}"
            + (f" and add --gguf-file {folder.name}" if folder.suffix == ".gguf" else "")
        )
    if not folder.is_dir():
        folder = _snapshot(name, gguf_file, weights)
    if gguf_file is not None:
        _check_gguf(folder, gguf_file)
    elif weights and not (folder / "config.json").is_file():
        raise _no_config(folder)
    return folder


def _snapshot(name: str, gguf_file: str | None, weights: bool) -> Path:
    parent = Path(name).parent
    if not _HUB_ID.fullmatch(name) or (parent != Path() and parent.is_dir()):
        raise ModelError(f"the model folder {name} does not exist; check the spelling and the working folder")
    patterns = list(_TOKENIZER_PATTERNS)
    if gguf_file is not None:
        patterns.append(gguf_file)
    elif weights:
        patterns.append("*.safetensors")
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if weights and gguf_file is None and not any(folder.glob("*.safetensors*")):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "*.bin"]))
    except Exception as error:
        raise ModelError(
            f"{name} is neither a folder here nor a model that the hub's cache or the hub could give "
            f"({type(error).__name__}); check the spelling, the network and HF_HUB_OFFLINE"
        ) from error
    return folder


def choose_device(device: str) -> torch.device:
    """The torch device for "auto", "cpu" or "cuda".

    Raises:
        UsageError: another name, or CUDA where torch has none.
    """
    if device not in DEVICES:
        raise UsageError(f"the device must be one of {', '.join(DEVICES)}, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("the device cuda was asked for, but torch finds no usable CUDA device; choose cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _chosen_dtype(dtype: str) -> Any:
    if dtype not in DTYPES:
        raise UsageError(f"the dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def _no_config(folder: Path) -> ModelError:
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return ModelError(
            f"{folder} has no config.json but holds {', '.join(gguf)}; name the one to load with --gguf-file {gguf[0]}"
        )
    if (folder / "adapter_config.json").is_file():
        return ModelError(f"{folder} holds an adapter, not a whole model; merge it into its base model and save that")
    return ModelError(f"{folder} has no config.json, so it is not a model; name the folder that save_pretrained wrote")


def _check_gguf(folder: Path, gguf_file: str) -> None:
    if not (folder / gguf_file).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file"
        raise ModelError(f"{folder} has no file {gguf_file}; it holds {there}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'loading {gguf_file} needs the gguf package; run: pip install "logitcache[demo]"')


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON ({error}); fetch or save the model again") from error
    own_code = "auto_map" in config
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not model_type:
        raise ModelError(f"{folder / 'config.json'} names no model_type; fetch or save the model again")
    known = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not known and not (trust_remote_code and own_code):
        advice = "load it with trust_remote_code only if you trust its authors" if own_code else "choose another model"
        raise ModelError(
            f"{folder} is a {model_type!r} model, which transformers {transformers.__version__} does not know as a "
            f"causal language model; {advice}"
        )


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers reads from `folder`, an index included.

    Raises:
        ModelError: there are none, or one that an index lists is absent.
    """
    for name in _WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        try:
            listed = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not an index of weight files; fetch or save the model again") from error
        absent = [shard for shard in listed if not (folder / shard).is_file()]
        if absent:
            raise ModelError(
                f"{folder} lacks {len(absent)} of its {len(listed)} weight files ({absent[0]}); fetch the model again"
            )
        return [path, *(folder / shard for shard in listed)]
    raise ModelError(f"{folder} has a config.json but no weights ({_WEIGHTS[0]}); fetch or save the model again")


@contextlib.contextmanager
def _explained(folder: Path, gguf_file: str | None, what: str) -> Iterator[None]:
    """Turn whatever the libraries raise into one sentence; the cause stays attached."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"the model {folder} does not fit on the device; choose --dtype bfloat16 or cpu") from error
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...").rstrip(".")
        damaged = None if gguf_file or what == "tokenizer" else _damaged_file(folder)
        if damaged is not None:
            message = f"the weight file {damaged} is damaged or incomplete ({reason}); fetch or save the model again"
        elif what == "tokenizer" and gguf_file is None and not any(folder.glob("*token*")):
            message = f"{folder} has no tokenizer file such as tokenizer.json; save the model's tokenizer there"
        elif what == "tokenizer":
            message = f"{folder} has no tokenizer that can be loaded ({reason}); save the model's tokenizer there"
        else:
            message = f"the model {folder / (gguf_file or '')} cannot be loaded ({reason}); check that its files match"
        raise ModelError(message) from error


def _damaged_file(folder: Path) -> Path | None:
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError):
                return path
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and advice of transformers; what matters in it is checked by this module."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars_off = are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader draws its progress bar on stderr whatever the settings.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
        (disable_progress_bars if hub_bars_off else enable_progress_bars)()


# ---------------------------------------------------------------------------------------------- identity


def model_identity(source: str | Path, gguf_file: str | None = None) -> dict[str, Any]:
    """What identifies a model: `{"name", "revision", "files": [{"name", "sha256"}], "sha256"}`.

    The files are config.json and the weights (or the GGUF file alone); `sha256` is the hash of that list; `revision`
    is the hub's commit, None for a folder that is no hub snapshot.

    Raises:
        ModelError: as `load_model`.
    """
    folder = resolve_source(source, gguf_file)
    paths = [folder / gguf_file] if gguf_file is not None else [folder / "config.json", *weight_files(folder)]
    files = []
    for path in paths:
        try:
            with open(path, "rb") as stream:
                files.append({"name": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()})
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return {
        "name": folder.resolve().name if Path(source).expanduser().is_dir() else str(source),
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "files": files,
        "sha256": _json_hash(files),
    }


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What identifies a tokenizer: `{"sha256", "size", "bos_id", "eos_id", "unk_id"}`, equal after save and reload.

    The hash covers how text becomes ids, and these special ids; not truncation, padding or the chat template.
    """
    special = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id, "unk_id": tokenizer.unk_token_id}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = sorted(tokenizer.get_vocab().items())
    else:
        state = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _NOT_IDENTITY}
    return {"sha256": _json_hash([state, special]), "size": len(tokenizer), **special}


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- logits


@dataclass(frozen=True, eq=False)
class LMHead:
    """How the last hidden state becomes logits: `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`.

    Args:
        weight: [V, D], the model's own parameter (perhaps tied to its embedding).
        bias: [V] or None.
        softcap: None for no capping.
        logit_scale: None for 1.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None


def split_model(model: Any) -> tuple[Any, LMHead]:
    """The body of a causal language model (tokens -> hidden states) and its head.

    Nothing is computed; `check_split` tells whether the two really make the model's logits.

    Raises:
        ModelError: the model has no plain linear head, wears an adapter, or lies on several devices.
    """
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ModelError(f"{name} wears an adapter; merge it first with merge_and_unload()")
    body, linear = model.base_model, model.get_output_embeddings()
    if body is model or not isinstance(linear, torch.nn.Linear) or hasattr(linear, "base_layer"):
        raise ModelError(
            f"{name} has {type(linear).__name__} where logitcache needs a plain linear LM head; "
            "merge adapters first, or choose another architecture"
        )
    weight = linear.weight
    if not weight.is_floating_point():
        raise ModelError(f"{name} has an LM head quantised to {weight.dtype}; load the model without quantisation")
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ModelError(f"{name} lies on {', '.join(places)}; load it whole on one device")
    config = model.config.get_text_config()
    softcap = next(filter(None, (_number(config, field) for field in _SOFTCAPS)), None)
    return body, LMHead(weight, linear.bias, softcap, _logit_scale(config))


def _number(config: Any, field: str) -> float | None:
    value = getattr(config, field, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _logit_scale(config: Any) -> float | None:
    scale = math.prod(value for field in _SCALES if (value := _number(config, field)) is not None)
    scaling = _number(config, "logits_scaling")
    if scaling:
        scale = scale * scaling if config.model_type in _MULTIPLY_BY_SCALING else scale / scaling
    return None if scale == 1 else float(scale)


def body_hidden(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The last hidden state, after the final norm: [B, L, D] in the model's dtype.

    Args:
        model: a causal language model that `check_split` accepts.
        input_ids: int64 [B, L] on the model's device.
        attention_mask: [B, L], None where all tokens are real or the unreal ones come last.
    """
    return model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
    ).last_hidden_state


def head_logits(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Logits float32 [N, V] of hidden states [N, D]: the product in the head's dtype, the rest in float32."""
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    if head.logit_scale is not None:
        logits = logits * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@torch.no_grad()
def check_split(model: Any) -> None:
    """Run a few tokens and compare `head_logits(body_hidden(...))` with the model's own logits.

    Raises:
        ModelError: they differ, a position sees later tokens, or the model does not run on text alone.
    """
    name, (_, head) = type(model).__name__, split_model(model)
    rows = min(head.weight.shape[0], model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(8, device=head.weight.device) * max(1, rows // 11) % rows).repeat(2, 1)
    ids[1, -1] = (ids[0, -1] + 1) % rows
    training = model.training
    model.eval()
    try:
        hidden = body_hidden(model, ids)
        gain, logits = _loud_logits(model, ids, hidden, head)
    except Exception as error:
        raise ModelError(
            f"{name} does not run on token ids alone ({type(error).__name__}: {error}); choose another model"
        ) from error
    finally:
        model.train(training)
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 3e-2
    if not _close(hidden[0, :-1], hidden[1, :-1], tolerance):
        raise ModelError(f"{name} lets a position see the tokens after it, so it is no causal language model")
    if not _close(head_logits(hidden * gain, head), logits, tolerance):
        raise ModelError(
            f"{name} (model type {model.config.model_type!r}) computes its logits in a way logitcache does not know; "
            "choose another architecture, or report this one"
        )


def _loud_logits(model: Any, ids: torch.Tensor, hidden: torch.Tensor, head: LMHead) -> tuple[float, torch.Tensor]:
    """The model's own logits with the head's input multiplied by a gain: (gain, logits).

    A softcap hardly bends the small logits of an odd input or a young model; at 40 nats nothing stays hidden.
    """
    largest = float(head_logits(hidden, LMHead(head.weight)).abs().max())
    gain, applied = (40 / largest if largest > 0 else 1.0), []

    def amplify(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        applied.append(True)
        return (args[0] * gain, *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(amplify)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return (gain if applied else 1.0), logits


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() <= tolerance * max(float(other.abs().max()), 1e-6))


# ---------------------------------------------------------------------------------------------- saving


def save_model(model: Any, folder: str | Path, tokenizer: Any | None = None) -> None:
    """Write `model` (also one loaded from GGUF) as safetensors, and the tokenizer beside it.

    Raises:
        ModelError: the folder cannot be written.
    """
    if getattr(model.config, "quantization_config", None) is not None and hasattr(model, "hf_quantizer"):
        # A GGUF load leaves plain weights, but transformers still refuses to save them.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    try:
        with _quiet():
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the model cannot be written to {folder} ({error}); check the folder and its space"
        ) from error


def convert_gguf(folder: str | Path, gguf_file: str, out_dir: str | Path, dtype: str = "auto") -> Path:
    """Load a GGUF file once and write it as safetensors with its tokenizer; later loads take under a second.

    `out_dir` appears whole or not at all; one that is there already is returned untouched.

    Raises:
        ModelError: as `load_model` and `save_model`.
    """
    target = Path(out_dir).expanduser()
    if (target / "config.json").is_file():
        return target
    model = load_model(folder, gguf_file, dtype=dtype, device="cpu")
    tokenizer = load_tokenizer(folder, gguf_file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"{target.parent} cannot be written ({error.strerror}); choose another folder") from error
    try:
        save_model(model, partial, tokenizer)
        partial.replace(target)
    except OSError as error:
        # Another process may have finished the same conversion first.
        if not (target / "config.json").is_file():
            raise ModelError(f"{target} cannot be written ({error.strerror}); remove it or choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
