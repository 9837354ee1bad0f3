"""Where models and tokenizers come from: folders, the hub, GGUF files."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from logitcache.errors import ModelError, UsageError, reason_of
from logitcache.models.placement import (
    DeviceMap,
    fitted,
    keep_head,
    offloaded_share,
    read_device_map,
    tensor_parallel_plan,
    whole_head,
)

_logger = logging.getLogger(__name__)

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
# The order in which transformers looks for weights.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_model(
    source: str | Path,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | None = None,
    tensor_parallel: bool = False,
) -> Any:
    """A causal language model, in eval mode, whole on one device or spread over several.

    Args:
        source: a local folder, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        gguf_file: name of a GGUF file inside `source` to load instead of safetensors.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        trust_remote_code: run Python code that comes with the model.
        device_map: spread the model: "auto", "balanced", "balanced_low_0", "sequential" or a JSON file
            {module: device}, as of transformers' `device_map`. The head then stays on a device of its own.
        tensor_parallel: this process is one rank of several that load the same model, a slice of each layer on each;
            the head is whole on all. transformers chooses the device.

    Raises:
        UsageError: an unknown dtype or device, or a map that does not fit the model or the machine.
        ModelError: the model is missing, damaged, incomplete or of a kind that cannot be loaded.
    """
    torch_dtype, torch_device = choose_dtype(dtype), choose_device(device)
    folder = resolve_source(source, gguf_file)
    if gguf_file is None:
        _check_config(folder, trust_remote_code)
        weight_files(folder)
    spread = None if device_map is None else _placement(device_map, folder, gguf_file, trust_remote_code)
    with quiet(), _explained(folder, gguf_file, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf_file,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map=spread,
            distributed_config=tensor_parallel_plan() if tensor_parallel else None,
        )
    model, info = loaded
    _check_loaded(folder, info)
    with _explained(folder, gguf_file, "model"):
        if tensor_parallel:
            whole_head(model)
        elif spread is None:
            model.to(torch_device)
        else:
            _settle(model, folder, named=isinstance(spread, str))
        return model.eval()


def _settle(model: Any, folder: Path, named: bool) -> None:
    """Keep the head of a spread model in place, and say where transformers chose to keep weights off the devices."""
    away = offloaded_share(model)
    if away and named:
        _logger.warning(
            "%.0f %% of the weights of %s do not fit on the devices here and are fetched for every batch: slow",
            100 * away,
            folder,
        )
    keep_head(model)


def _placement(given: str, folder: Path, gguf_file: str | None, trust_remote_code: bool) -> str | DeviceMap:
    """The device map, compared with the model before anything is read into memory."""
    device_map = read_device_map(given)
    if isinstance(device_map, dict):
        with quiet(), _explained(folder, gguf_file, "model"), torch.device("meta"):
            config = AutoConfig.from_pretrained(
                folder, gguf_file=gguf_file, trust_remote_code=trust_remote_code, local_files_only=True
            )
            bare = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return fitted(given, device_map, bare)
    return device_map


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
    with quiet(), _explained(folder, gguf_file, "tokenizer"):
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
    if not name:
        raise ModelError("the name of the model is empty; give its folder or hub id, . for the current folder")
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


def choose_dtype(dtype: str) -> Any:
    """The torch dtype for a name of `DTYPES`, "auto" for "auto". Raises UsageError for another name."""
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
    own_code = isinstance(config, dict) and "auto_map" in config
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
        reason = reason_of(error)
        damaged = None if gguf_file or what == "tokenizer" else _damaged_file(folder)
        if damaged is not None:
            message = f"the weight file {damaged} is damaged or incomplete ({reason}); fetch or save the model again"
        elif "`offload_folder`" in str(error):
            message = (
                f"--device-map keeps only weights of safetensors files on disk, and those of {folder} would have to be "
                "rewritten; map all of it to cpu or other devices, or save it with save_pretrained"
            )
        elif "has no `tp_plan`" in str(error):
            message = f"transformers has no plan to split {folder} over ranks; spread it with --device-map instead"
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
def errors_only() -> Iterator[None]:
    """Silence what transformers logs, errors excepted."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and advice of transformers; what matters in it is checked by this module."""
    bar = transformers_logging.is_progress_bar_enabled()
    hub_bars_off = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader draws its progress bar on stderr whatever the settings.
        with errors_only(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
        (disable_progress_bars if hub_bars_off else enable_progress_bars)()
