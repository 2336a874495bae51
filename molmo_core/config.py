"""Configuration: dataclasses read from YAML, with dotted overrides, strict about every key.

OmegaConf reads YAML, overrides and interpolation; pydantic checks types and limits. What is added here: an error that names the
key and the nearest valid one, settings of the reference code of which one value is supported (`FIXED`), and paths that are
relative to the file that holds them (`PATHS`).

Every number has limits, which are part of its type: `steps: Size`, `port: Annotated[int, Field(ge=1, le=65535)]`. They are checked
however a configuration is made, and numbers that are not finite are refused everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")

Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A size or a number of things, at least one."""
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A number of things, maybe none."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
"""A share of a whole, or a probability."""
Dropout = Annotated[float, Field(ge=0, lt=1)]
"""A probability below 1."""
Weight = Annotated[float, Field(ge=0, le=1e9)]
"""A factor that may be 0."""
Positive = Annotated[float, Field(gt=0, le=1e12)]


class ConfigError(ValueError):
    """A configuration that cannot be used. The message says which key of which file, and what to write instead."""


class MissingFile(ConfigError):
    """A file or folder that a configuration names is not there."""

    def __init__(self, message: str, path: str | Path = "") -> None:
        super().__init__(message)
        self.path = str(path)
        """As it was given; empty if the message says all there is to say of where it was looked for."""


@dataclasses.dataclass
class BaseConfig:
    """Base of all configurations. Subclasses are plain dataclasses; nested configurations are fields of their type."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    # Settings of the reference implementations that exist here with these values only (they are checked, then dropped).
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Fields that hold a path: a relative one that exists beside the file is resolved against the file's folder on load.
    PATHS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Checks the numbers, also of a configuration that is built by its constructor. A subclass adds checks across fields."""
        for name, adapter in _numbers(type(self)).items():
            try:
                adapter.validate_python(getattr(self, name))
            except ValidationError as error:
                found = error.errors()[0]
                described = _describe(dict(found) | {"loc": (name, *found["loc"])}).strip()
                raise ConfigError(f"{type(self).__name__}: {described}") from None

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Hook for a subclass: rewrites older or shorter spellings of its own keys (aliases, legacy files)."""
        return data

    @classmethod
    def new(cls, **kwargs: Any) -> Self:
        """Builds and checks a configuration from keyword arguments; nested values may be configurations or dicts."""
        return cls.from_dict(kwargs)

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "configuration", base: Path | None = None, key: str | None = None) -> Self:
        """Builds and checks a configuration from plain data. `source` names it in errors, and `key` its place there; `base` resolves
        `PATHS`."""
        checked = _prepare(cls, data, source, f"{key}." if key else "", base)
        try:
            return _adapter(cls).validate_python(checked)
        except ValidationError as error:
            lines = [_describe(dict(e) | {"loc": ((key,) if key and e["loc"] else ()) + e["loc"]}) for e in error.errors()]
            raise ConfigError(f"{source}: {len(lines)} invalid value(s)\n" + "\n".join(lines)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None, key: str | None = None) -> Self:
        """Reads a YAML file.

        Args:
            path: the file; relative paths inside it are relative to its folder.
            overrides: dotted assignments, e.g. `["llm.n_layers=16"]`, applied before checking.
            key: dotted key of the part of the file that holds this configuration (e.g. `model`).

        Raises:
            ConfigError: an unreadable file, an unknown key or a wrong value.
        """
        path = Path(path)
        data = read_yaml(path, overrides, key)
        return cls.from_dict(data, source=str(path), base=path.parent, key=key)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain dicts, lists and scalars (what `save` writes)."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the configuration as YAML; `load` gives it back."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(_plain(self.as_dict())), path)


def read_yaml(path: str | Path, overrides: list[str] | None = None, key: str | None = None, part: str | None = None) -> dict[str, Any]:
    """A YAML file as plain data, after dotted overrides and interpolation.

    Args:
        path: the file.
        overrides: dotted assignments, relative to what is returned.
        key: dotted key of the part of the file that is wanted.
        part: key of a mapping that is wanted if the file has it (otherwise the whole file is).

    Raises:
        ConfigError: the file is missing, is not a mapping, lacks `key`, or an override is not `key=value`.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path}: no such configuration file", path)
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"{path}: a configuration is a mapping of keys to values, found {type(config).__name__}")
        selected = OmegaConf.select(config, key) if key else config
        if selected is None:
            raise ConfigError(f"{path}: no key {key!r}")
        if part and OmegaConf.is_dict(OmegaConf.select(config, part)):
            selected = OmegaConf.select(config, part)
        merged = OmegaConf.merge(selected, _dotlist(overrides))
        return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def overridden(data: dict[str, Any], overrides: list[str] | None) -> dict[str, Any]:
    """Plain data after dotted overrides (the same data if there are none).

    Raises:
        ConfigError: an override is not `key=value`, or does not fit the data.
    """
    if not overrides:
        return data
    try:
        return typing.cast(
            dict[str, Any], OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(data), _dotlist(overrides)), resolve=True)
        )
    except (OmegaConfBaseException, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"overrides {overrides}: {error}") from error


def _dotlist(overrides: list[str] | None) -> Any:
    for override in overrides or ():
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override {override!r} is not of the form key=value (for example train.steps=100)")
    return OmegaConf.from_dotlist(list(overrides or []))


def flatten(data: Mapping[str, Any], level: Callable[[str], str] = str, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; `level` rewrites the name of every level."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{level(str(key))}"
        flat |= flatten(value, level, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """A hint for an unknown name: ` Did you mean 'x'?` or the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Valid: {', '.join(valid)}."


def _cached(function: Callable[[type], T]) -> Callable[[type], T]:
    """`functools.cache` for functions of a class (dataclasses look unhashable to the type checker, their classes are not)."""
    return functools.cache(function)


# pydantic's names of limits.
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "below"}


def _describe(error: dict[str, Any]) -> str:
    """One line about a value that pydantic refused; a check across keys (`__post_init__`) has no single value to show."""
    where = ".".join(str(part) for part in error["loc"])
    if isinstance(error["input"], dict):
        message = str(error["msg"]).removeprefix("Value error, ")
        return f"  {message}" if not where or message.startswith(f"{where}.") else f"  {where}: {message}"
    for name, words in _LIMITS.items():
        if name in error.get("ctx", {}):
            limit = error["ctx"][name]
            return f"  {where}={error['input']} must be {words} {int(limit) if limit == int(limit) else limit:,}"
    return f"  {where}: {error['msg']} (got {error['input']!r})"


@_cached
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@_cached
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@_cached
def _numbers(cls: type) -> dict[str, TypeAdapter[Any]]:
    """What checks each field of numbers."""
    hints = typing.get_type_hints(cls, include_extras=True)
    finite = ConfigDict(allow_inf_nan=False)
    return {f.name: TypeAdapter(hints[f.name], config=finite) for f in dataclasses.fields(cls) if limits_of(hints[f.name])}


def limits_of(hint: Any) -> list[tuple[type, dict[str, float]]]:
    """The numbers in a type (`int`, `float | None`, `list[Size]`, ...), each with its limits (`{"ge": 1, "le": 65535}`).

    Numbers of nested configurations are those configurations' own.
    """
    if hint in (int, float):
        return [(hint, {})]
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated and args[0] in (int, float):
        found = {n: getattr(m, n) for field in args[1:] for m in getattr(field, "metadata", ()) for n in _LIMITS if hasattr(m, n)}
        return [(args[0], found)]
    return [] if typing.get_origin(hint) is typing.Literal else [number for arg in args for number in limits_of(arg)]


def _config_type(hint: Any) -> type[BaseConfig] | None:
    """The configuration class inside `X`, `Optional[X]` (None if there is none)."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    found = [o for o in options if isinstance(o, type) and issubclass(o, BaseConfig)]
    return found[0] if len(found) == 1 else None


def _element_type(hint: Any) -> type[BaseConfig] | None:
    """The configuration class inside `list[X]` or `dict[str, X]`."""
    args = typing.get_args(hint)
    return _config_type(args[-1]) if args and typing.get_origin(hint) in (list, dict, tuple) else None


def _prepare(cls: type[BaseConfig], data: Any, source: str, prefix: str, base: Path | None) -> Any:
    """Checks names and fixed settings recursively; the result is what pydantic validates."""
    if not isinstance(data, dict):
        return data
    try:
        data = cls.normalise(dict(data))
    except ConfigError as error:
        raise ConfigError(f"{source}: {str(error).removeprefix('configuration: ')}") from None
    fields = {f.name for f in dataclasses.fields(cls)}
    result = {}
    for name, value in data.items():
        where = f"{prefix}{name}"
        if name in cls.FIXED:
            allowed = cls.FIXED[name]
            if value not in allowed:
                options = " or ".join(repr(a) for a in allowed)
                raise ConfigError(f"{source}: {where}={value!r} is not implemented; only {options}")
            continue
        if name not in fields:
            raise ConfigError(f"{source}: unknown key {where!r}.{nearest(str(name), fields)}")
        hint = _hints(cls)[name]
        inner, element = _config_type(hint), _element_type(hint)
        if inner:
            value = _prepare(inner, value, source, f"{where}.", base)
        elif element and isinstance(value, list):
            value = [_prepare(element, v, source, f"{where}.{i}.", base) for i, v in enumerate(value)]
        elif element and isinstance(value, dict):
            value = {k: _prepare(element, v, source, f"{where}.{k}.", base) for k, v in value.items()}
        elif name in cls.PATHS and isinstance(value, str) and value and base is not None and not Path(value).is_absolute():
            beside = (base / value).resolve()
            value = str(beside) if beside.exists() else value
        result[name] = value
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
