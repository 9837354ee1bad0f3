"""A model spread over several devices: the map that transformers places it by, and a head that stays where it is.

accelerate's hooks move what flows from layer to layer, and fetch the weights of offloaded layers in each forward.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from logitcache.errors import UsageError

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = dict[str, int | str]
# Not a device of torch: weights stay in their files until a forward needs them.
_DISK = "disk"


def read_device_map(given: str) -> str | DeviceMap:
    """What transformers takes as `device_map`: one of `DEVICE_MAPS`, or {module: device} of a JSON file.

    Raises:
        UsageError: another name, a file that is no such map, a device that is not there, or no accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("--device-map needs the accelerate package; run: pip install accelerate")
    if given in DEVICE_MAPS:
        return given
    path = Path(given).expanduser()
    if path.suffix != ".json":
        raise UsageError(
            f"--device-map must be {', '.join(DEVICE_MAPS)} or a .json file of modules and their devices, not {given!r}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the device map {path} cannot be read ({error.strerror}); check its name") from error
    except ValueError as error:
        raise UsageError(f"the device map {path} is not JSON ({error}); write {{module: device}} there") from error
    if not isinstance(found, dict) or not found or not all(type(device) in (int, str) for device in found.values()):
        raise UsageError(
            f'the device map {path} must be one JSON object of modules and devices, such as {{"model.norm": 1, '
            '"lm_head": "cpu"}; a model\'s hf_device_map is one'
        )
    for module, device in found.items():
        _check_device(path, module, device)
    return found


def _check_device(path: Path, module: str, device: int | str) -> None:
    if device == _DISK:
        return
    try:
        # The one question that is right for every kind of device; an integer is an index of the accelerator's.
        there = torch.empty(0, device=torch.device(device)).device.type != "meta"
    except (RuntimeError, AssertionError):
        there = False
    if not there:
        raise UsageError(
            f"the device map {path} puts {module!r} on {device!r}, which is no device here; torch sees "
            f"{torch.accelerator.device_count()} accelerators, and there are cpu and disk"
        )


def fitted(given: str, device_map: DeviceMap, model: Any) -> DeviceMap:
    """The map in entries that do not contain each other, which accelerate does not always get right.

    Args:
        given: the map's file, for messages.
        device_map: as read.
        model: the model, with or without memory.

    Raises:
        UsageError: a name is none of the model's, or a weight has no device, or two.
    """
    weights = list(model.state_dict())
    from accelerate.utils import find_tied_parameters

    known = {name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())}
    unknown = [name for name in device_map if name not in known and name not in weights]
    if unknown:
        raise UsageError(
            f"the device map {given} names {unknown[0]!r}, which is no module of {type(model).__name__}; its parts are "
            f"{', '.join(_parts(model))}"
        )
    homeless = [name for name in weights if not _places(name, device_map)]
    if homeless:
        raise UsageError(
            f"the device map {given} says no device for {len(homeless)} weights of {type(model).__name__}, such as "
            f'{homeless[0]}; add them, or an entry "" for all that is not named'
        )
    for group in find_tied_parameters(model):
        devices = {name: device_map[max(_places(name, device_map), key=len)] for name in group}
        if len(set(devices.values())) > 1:
            said = " and ".join(f"{name} on {device}" for name, device in devices.items())
            raise UsageError(f"the device map {given} puts {said}, which are one weight; give both the same device")
    return dict(_entries("", model, device_map, None))


def _entries(name: str, part: Any, device_map: DeviceMap, device: int | str | None) -> Iterator[tuple[str, int | str]]:
    """Entries for a module (or a weight) inside one that is on `device`."""
    device = device_map.get(name, device)
    inside = f"{name}." if name else ""
    if isinstance(part, torch.nn.Module) and any(key != name and key.startswith(inside) for key in device_map):
        for inner in (part.named_children(), part.named_parameters(recurse=False), part.named_buffers(recurse=False)):
            for key, child in inner:
                yield from _entries(inside + key, child, device_map, device)
    elif device is not None:
        yield name, device


def _parts(model: Any) -> list[str]:
    """Names that a map is usually written with: what the body and the model consist of."""
    body = model.base_model_prefix
    inner = [f"{body}.{name}" for name, _ in model.base_model.named_children()]
    return [*inner, *(name for name, _ in model.named_children() if name != body)]


def _places(name: str, device_map: DeviceMap) -> list[str]:
    """The entries that hold a weight; the longest counts."""
    return [place for place in device_map if place in ("", name) or name.startswith(f"{place}.")]


def keep_head(model: Any) -> None:
    """Take the LM head of a model with accelerate's hooks out of their care: its weight stays on its device for good.

    The hooks would load an offloaded head anew for every slice of rows, and only inside of its own forward, where
    nothing but logits comes out. Whatever comes to the head is brought to its device.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import align_module_device

    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "_hf_hook"):
        return
    with align_module_device(head):
        held = {name: parameter.detach() for name, parameter in head.named_parameters(recurse=False)}
    remove_hook_from_module(head)
    # It leaves the class' own forward as an attribute, which looks like a patch.
    if getattr(head.forward, "__func__", None) is type(head).forward:
        vars(head).pop("forward", None)
    for name, tensor in held.items():
        setattr(head, name, torch.nn.Parameter(tensor, requires_grad=False))
    head.register_forward_pre_hook(_bring)


def whole_head(model: Any) -> None:
    """Give every rank of a tensor-parallel model the whole LM head, as a plain linear layer; all ranks call it."""
    head = model.get_output_embeddings()
    for name, parameter in list(head.named_parameters(recurse=False)):
        if hasattr(parameter, "full_tensor"):
            setattr(head, name, torch.nn.Parameter(parameter.detach().full_tensor(), requires_grad=False))
            # transformers' own, which multiplies with a slice and gathers the logits.
            vars(head).pop("forward", None)


def tensor_parallel_plan() -> Any:
    """What `from_pretrained` takes as `distributed_config`: the model's own plan over all ranks.

    Raises:
        UsageError: this transformers has no such thing.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return DistributedConfig(tp_plan="auto")
    except (ImportError, TypeError) as error:
        raise UsageError(
            "--tensor-parallel needs a newer transformers (5.23 is known to work); run: pip install -U transformers"
        ) from error


def _bring(head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return args[0].to(head.weight.device), *args[1:]


def is_spread(model: Any) -> bool:
    """Whether `keep_head` made the head of this model independent of its other weights' places."""
    head = model.get_output_embeddings()
    return _bring in getattr(head, "_forward_pre_hooks", {}).values()


def input_device(model: Any) -> torch.device:
    """Where token ids go: to the embedding, or to where it is fetched for a forward."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def offloaded_share(model: Any) -> float:
    """The share of a model's weights, by number, that is fetched for each forward."""
    sizes = [(parameter.numel(), parameter.device.type == "meta") for parameter in model.parameters()]
    return sum(size for size, away in sizes if away) / max(1, sum(size for size, _ in sizes))
