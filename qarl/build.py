"""A plain mapping into a tree of frozen dataclasses, strictly: nothing unknown, nothing of a wrong type, nothing silent.

Why not Hydra's structured configs: they cannot be frozen, and know neither `Literal` nor tuples.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qarl.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Make a `cls` from `data`. Raises `ConfigError` naming the dotted key, the value and the choices."""
    assert is_dataclass(cls)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: expected a mapping with keys {sorted(f.name for f in fields(cls))}, got {data!r}")
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    for key in data:
        if key not in names:
            raise unknown_key(_join(path, str(key)), names)
    values = {key: _convert(hints[key], value, _join(path, key)) for key, value in data.items()}
    return cls(**values)


def unknown_key(key: str, siblings: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, naming the nearest one that does."""
    siblings = sorted(siblings)
    near = get_close_matches(key.rpartition(".")[2], siblings, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"keys here: {', '.join(siblings)}"
    return ConfigError(f"{key}: unknown key; {hint}")


def check_keys(cls: type, keys: Iterable[str]) -> None:
    """Raise `ConfigError` for the first dotted key that leads nowhere in the tree of `cls`."""
    for key in keys:
        here: Any = cls
        walked = ""
        for part in key.split("."):
            here = _dataclass_of(here)
            if here is None:  # a free mapping, or beyond a leaf: hydra and `build` speak about those
                break
            walked = _join(walked, part)
            hints = get_type_hints(here)
            if part not in hints:
                raise unknown_key(walked, hints)
            here = hints[part]


def to_mapping(config: Any) -> dict[str, Any]:
    """The tree as plain data, tuples as lists; `build(type(config), to_mapping(config)) == config`."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _dataclass_of(hint: Any) -> Any:
    """The dataclass that `hint` is or may be, or `None`."""
    if is_dataclass(hint):
        return hint
    return next((arm for arm in get_args(hint) if is_dataclass(arm)), None)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arms = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arms:
            return None
        return _convert(next(a for a in arms if a is not type(None)), value, path)
    if origin is Literal:
        if value not in arms or isinstance(value, bool) != isinstance(arms[0], bool):
            near = get_close_matches(str(value), [str(a) for a in arms], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: {value!r} is not one of {list(arms)}{hint_text}")
        return value
    if origin is tuple:
        return _convert_tuple(arms, value, path)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return dict(value)
    if is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r}")
    return value


def _convert_tuple(arms: tuple[Any, ...], value: Any, path: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: expected a list, got {value!r}")
    if len(arms) == 2 and arms[1] is Ellipsis:
        arms = (arms[0],) * len(value)
    if len(arms) != len(value):
        raise ConfigError(f"{path}: expected {len(arms)} values, got {len(value)}: {value!r}")
    return tuple(_convert(arm, v, f"{path}[{i}]") for i, (arm, v) in enumerate(zip(arms, value, strict=True)))
