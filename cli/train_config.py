"""What a run of `train` is told besides its options: a `--config` file, and `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logitcache.errors import UsageError


def read_config(path: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """What a YAML file holds, and where each key stands in it: `train.yaml:3`. Raises UsageError."""
    if path is None:
        return {}, {}
    import yaml

    try:
        text = path.read_text()
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror}); check the path") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise UsageError(f"{path}{line}: this is not YAML ({error.problem}); write one `key: value` a line") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not (isinstance(values, dict) and isinstance(node, yaml.MappingNode)):
        raise UsageError(f"--config {path} must hold keys and values, for example `alpha: 0.9`")
    places = {_key(name.value): f"{path}:{name.start_mark.line + 1}" for name, _ in node.value}
    return {_key(name): value for name, value in values.items()}, places


def assignment(text: str) -> tuple[str, Any]:
    """Key and value of `--set KEY=VALUE`. Raises UsageError."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text} has no value; write --set key=value")
    try:
        return _key(key), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not YAML; quote it") from error


def _key(name: Any) -> str:
    return str(name).strip().replace("-", "_")
