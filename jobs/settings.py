"""The settings of every configuration, with types, limits, defaults and what they mean: for `--help`, and as docs/settings.md.

All of it is read from the configuration classes. `python -m jobs.settings > docs/settings.md` writes the page anew.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

from molmo_core.config import BaseConfig, limits_of
from molmo_core.registry import MODELS, BaseModelConfig, config_class
from pipelines.data.config import PrepareConfig
from pipelines.demo_config import DemoConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry.config import PromoteConfig, RegisterConfig
from pipelines.serving.config import ServeConfig
from pipelines.training.config import TrainConfig

JOBS: dict[str, type[BaseConfig]] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
    "promote": PromoteConfig,
    "serve": ServeConfig,
    "demo": DemoConfig,
}
WIDTH = 110
_MANY = 10**9
"""Upper limits from here on only catch mistakes; they are not shown."""
_INTRODUCTION = """\
# All settings

Made from the configuration classes by `python -m jobs.settings > docs/settings.md`; `molmo JOB --help` shows the same for one job.
[docs/configuration.md](configuration.md) explains files, overrides and paths. Upper limits that only catch mistakes are not listed.
"""


class Setting(NamedTuple):
    """One key of a configuration."""

    key: str
    type: str
    """With its limits."""
    default: str
    """As in YAML; empty: it has to be given."""
    meaning: str


def settings(
    cls: type[BaseConfig], prefix: str = "", defaults: BaseConfig | None = None, shown: dict[str, str] | None = None
) -> Iterator[Setting]:
    """The settings of a configuration and of those inside it.

    Args:
        cls, prefix: the configuration, and where it is in the file.
        defaults: has the defaults, where they are not the class's.
        shown: what is listed already, by class and defaults, and where; it is added to.
    """
    shown = {} if shown is None else shown
    hints, meanings = typing.get_type_hints(cls, include_extras=True), _meanings(cls)
    for field in dataclasses.fields(cls):
        key, hint, meaning = f"{prefix}{field.name}", hints[field.name], meanings.get(field.name, "")
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        inner, many = _inner(hint)
        if inner is None or inner is BaseModelConfig:
            kind = "path, or settings of a model" if inner else _type(hint)
            yield Setting(key, kind, "" if default is dataclasses.MISSING else _yaml(default), meaning)
            continue
        place = f"{key}.NAME." if many else f"{key}."
        optional = type(None) in typing.get_args(hint)
        given = default if isinstance(default, inner) else None
        same = f"{inner.__qualname__} {given}"
        if same in shown:
            yield Setting(f"{place}*", f"as `{shown[same]}`", _yaml(None) if optional else "", meaning)
            continue
        if optional or many:
            yield Setting(f"{place}*", "settings, as follows", "" if given else "{}" if many else _yaml(None), meaning or _summary(inner))
        shown[same] = f"{place}*"
        yield from settings(inner, place, given, shown)


def text(cls: type[BaseConfig]) -> str:
    """For a terminal: key, default, type and meaning of every setting."""
    lines = []
    for key, kind, default, meaning in settings(cls):
        lines.append(f"  {key}{f'={default}' if default else ''}  ({kind})")
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "Settings, with their defaults (CONFIG and KEY=VALUE change them):\n\n" + "\n".join(lines) + "\n"


def page() -> str:
    """docs/settings.md."""
    parts = [_INTRODUCTION]
    for job, cls in JOBS.items():
        parts.append(_section(f"molmo {job}", settings(cls)))
    shown: dict[str, str] = {}
    for name in MODELS:
        parts.append(_section(f"Model {name}", settings(config_class(name), shown=shown)))
        shown = {same: place if "of " in place else f"{place} of {name}" for same, place in shown.items()}
    return "\n".join(parts)


def _section(title: str, rows: Iterator[Setting]) -> str:
    lines = [f"## {title}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        kind, meaning = (part.replace("|", "\\|") for part in (row.type, row.meaning))
        lines.append(f"| `{row.key}` | {kind} | {f'`{row.default}`' if row.default else ''} | {meaning} |")
    return "\n".join(lines) + "\n"


def _meanings(cls: type) -> dict[str, str]:
    """The docstring under each field, on one line."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        body = _classes(parent.__module__).get(parent.__name__, []) if parent.__module__ != "builtins" else []
        for statement, following in itertools.pairwise(body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(meaning))):
                    found[name] = " ".join(meaning.split())
    return found


@functools.cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _inner(hint: Any) -> tuple[type[BaseConfig] | None, bool]:
    """The configuration class in a type, and whether there are many by name."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, BaseConfig):
            return part, typing.get_origin(hint) is dict
    return None, False


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Annotated:
        return f"{args[0].__name__}{_limits(limits_of(hint)[0][1])}"
    if origin is typing.Literal:
        return ", ".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args)
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is tuple:
        return "[" + ", ".join(_type(arg) for arg in args) + "]"
    if origin is dict:
        return "any by name" if args[1] is Any else f"by name: {_type(args[1])}"
    return {str: "text", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))


def _limits(limits: dict[str, float]) -> str:
    shown = {name: f"{value:,}" if isinstance(value, int) else f"{value:g}" for name, value in limits.items() if abs(value) < _MANY}
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " " + ", ".join(f"{signs[name]} {value}" for name, value in shown.items())


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return {None: "null", "": '""'}.get(value, str(value))


if __name__ == "__main__":
    print(page(), end="")
