"""Configurations as files and dataclasses: YAML with `base:`, `key=value`, types, rules, changes.

This file knows the meaning of no key, except for the length of a run and its stages.
Each error is one sentence that names the key and the allowed values.
"""

import dataclasses
import math
import os
import platform
import subprocess
import types
import typing
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from functools import partial, reduce
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from engine.keys import (
    all_keys,
    declared_type,
    dotted,
    is_text,
    is_union,
    notes,
    options_of,
    sections_of,
    suggestion,
)
from engine.launch import describe_start
from engine.layers import (
    lay_over,
    merge,
    value_at,
    void_in_words,
    weights_given_twice,
    without_replaced,
)
from engine.logger import notice
from errors import UserError
from files import expand, parse_yaml, read_yaml_file

if TYPE_CHECKING:
    from engine.config import TrainConfig

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
KINDS = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text"},
    **{list: "a list such as [0.1, 0.5]", dict: "names and their keys", types.NoneType: "null"},
}
RENAMED = {"crops": {"turn": "rotate90"}}  # keys of earlier versions: section, old name, new
NULLS = ("", "~", "null", "Null", "NULL")  # in YAML
Config = TypeVar("Config")  # a dataclass


def free(default: Any) -> Any:
    """A field that a run may change when it goes on (speed, logging, length)."""
    return dataclasses.field(default=default, metadata={"free": True})


def listed(*values: float) -> Any:
    return section(lambda: list(values))


def section(factory: Callable[[], Any], free: bool = False) -> Any:
    return dataclasses.field(default_factory=factory, metadata={"free": free})


def find_config(name: str | Path) -> Path:
    """The file `name`, as a path or in `configs/`."""
    for path in (expand(name), CONFIG_FOLDER / name, CONFIG_FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml")))
    raise UserError(f"no configuration {name}: give a path or one of {known}")


def load(config: str | Path | None, overrides: list[str], schema: type[Config]) -> Config:
    """Defaults of the schema, then a file with its bases, then `key=value`; the last one wins."""
    layers = read_yaml(find_config(config), schema) if config else []
    layers = [write_out(schema, layer) for layer in layers]
    given = [write_out(schema, parse_override(override, schema)) for override in overrides]
    values: dict = {}
    for layer in [*layers, reduce(merge, given, {})]:
        if void := void_in_words(values, layer):
            notice(void)
        values = lay_over(values, layer)
    refuse_weights_given_twice(values)
    run = {key: value for key, value in values.items() if key != "model"}  # of students: their own
    for where, keys in _parts(values):
        refuse_weights_given_twice(keys, f"{where}: ")
        if void := void_in_words(run, keys):
            notice(f"{where}: {void}")
    return build(schema, values)


def _parts(values: dict) -> Iterator[tuple[str, dict]]:
    """The keys of each stage and each student, and their path."""
    for above in (("stages",), ("distill", "students")):
        found = value_at(values, above)
        for name, keys in found.items() if isinstance(found, dict) else ():
            if isinstance(keys, dict):
                yield ".".join((*above, str(name))), keys


def refuse_weights_given_twice(values: dict, where: str = "") -> None:
    """
    Raises:
        UserError: if one layer gives a term a weight and a schedule.
    """
    for schedule, weight in weights_given_twice(values):
        raise UserError(f"{where}{schedule} and {weight} are both given; leave one out")


def load_saved(path: Path, schema: type[Config]) -> Config:
    """The configuration of a run, which may be of an earlier version."""
    layer = without_replaced(reduce(merge, read_yaml(path, schema), {}))
    model = layer.get("model") or {}
    return build(schema, lay_over(layer, {"model": {"arch": model["arch"]}} if model else {}))


def read_yaml(path: Path, schema: type, above: tuple[Path, ...] = ()) -> list[dict]:
    """The file's keys after those of its `base:`: layers, the last one wins.

    `base:` is a file or a list of files, relative to this one or in `configs/`; `above` are the
    files whose base this is.
    """
    if path.resolve() in above:
        raise UserError(f"{path} is its own base, by way of {', '.join(map(str, above))}")
    values = read_yaml_file(path, partial(is_text, schema)) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values")
    bases = values.pop("base", None) or []
    layers = []
    for base in bases if isinstance(bases, list) else [bases]:
        beside = path.parent / expand(str(base))
        below = beside if beside.is_file() else find_config(str(base))
        layers += read_yaml(below, schema, (*above, path.resolve()))
    return [*layers, by_new_names(values)]


def by_new_names(values: Any, section: str = "") -> Any:
    """Keys of earlier versions, at any depth, under today's names."""
    if not isinstance(values, dict):
        return values
    names = RENAMED.get(section, {})
    return {names.get(key, key): by_new_names(value, str(key)) for key, value in values.items()}


def parse_override(argument: str, schema: type) -> dict:
    """ "a.b=1" as {"a": {"b": 1}}; where the schema declares text, the text as it stands."""
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise UserError(f"cannot read {argument!r}: write key=value, such as optim.clip_grad=1.0")
    path = tuple(key.split("."))
    try:
        value = parse_yaml(text, argument, partial(is_text, schema), path)
    except yaml.YAMLError:
        value = text  # which the declared type may refuse
    if declared_type(schema, path) is str:
        value = None if text in NULLS else text
    for part in reversed(path):
        value = {part: value}
    return by_new_names(value)


def write_out(cls: type, values: Any, path: str = "") -> dict:
    """Replaces short forms (a schedule given as a number) by their mapping, so that layers merge.

    A section without keys is refused here, before a layer above it can hide the mistake.
    """
    values = cls.shorthand(values) if hasattr(cls, "shorthand") else values
    if not isinstance(values, dict):
        raise UserError(f"{path} is a section, not the value {values!r}")
    sections, written = sections_of(cls), dict(values)
    for key, value in values.items():
        if key in sections and value is not None:
            written[key] = write_out(sections[key], value, dotted(path, key))
    return written


def build(
    cls: type[Config],
    values: Any,
    path: str = "",
    default: Config | None = None,
    root: type | None = None,
) -> Config:
    """A dataclass from nested mappings; unknown keys and wrong types are refused.

    `default` gives what `values` leaves out; the nearest valid key is looked for in all of `root`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path} is a section, not the value {values!r}")
    hints, sections = typing.get_type_hints(cls), sections_of(cls)
    root, default = root or cls, default or cls()
    arguments = {}
    for key, value in values.items():
        full = dotted(path, key)
        if key not in hints:
            raise UserError(f"unknown key {full}{suggestion(all_keys(root), path, str(key))}")
        if key in sections and value is not None:
            arguments[key] = build(sections[key], value, full, getattr(default, key), root)
        else:
            arguments[key] = convert(value, hints[key], full)
    return dataclasses.replace(default, **arguments)


def convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the declared type; YAML reads 1e-3 as text and `on` as a bool."""
    kind, options = typing.get_origin(hint) or hint, typing.get_args(hint)
    if is_union(hint):
        errors = []
        for option in options_of(hint):
            try:
                return convert(value, option, name)
            except UserError as error:
                errors.append(error)
        raise errors[0]
    if dataclasses.is_dataclass(kind):
        return build(kind, value, name)
    if kind is Literal:
        value = "none" if value is None or value is False else value
        if value in options:
            return value
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(map(str, options))}")
    if kind is list and isinstance(value, (list, tuple)):
        return [convert(item, options[0], name) for item in value]
    if kind in (bool, dict, types.NoneType) and isinstance(value, kind):
        return value
    if kind is str and isinstance(value, (str, Path)) and str(value):
        return str(value)
    number = _number(value, kind) if kind in (int, float) else None
    if number is not None:
        return number
    raise UserError(f"{name} is {_shown(repr(value))}; it must be {KINDS[kind]}")


def _shown(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def _number(value: Any, kind: type) -> float | None:
    """The number of a kind that `value` is or spells, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        exact = Decimal(value)
    except InvalidOperation:
        return None
    if not exact.is_finite():
        return None
    if kind is float:
        number = float(exact)
        return number if math.isfinite(number) else None
    return int(exact) if abs(exact) < 2**63 and exact == int(exact) else None


def check_rules(section: Any, path: str = "") -> None:
    """Raises UserError for the first value in a dataclass, at any depth, that breaks its rule."""
    values = vars(section)  # without getattr, so that a test can see who reads a key
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        full, value = dotted(path, name), values[name]
        for rule in notes(hint)[0]:
            if value is not None and not rule.holds(value):
                or_null = ", or null" if types.NoneType in typing.get_args(hint) else ""
                given = _shown(str(value))
                raise UserError(f"{full} is {given}; it must be {rule.words}{or_null}")
        for inner in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(inner):
                check_rules(inner, full)


def to_dict(values: Any) -> Any:
    """Nested plain values of a dataclass, in the order of declaration."""
    if isinstance(values, list):
        return [to_dict(item) for item in values]
    if not dataclasses.is_dataclass(values):
        return values
    return {name: to_dict(value) for name, value in vars(values).items()}


def to_yaml(cfg: object, header: str = "") -> str:
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    layout = {"sort_keys": False, "default_flow_style": None, "width": 110}
    return comment + yaml.safe_dump(without_replaced(to_dict(cfg)), **layout)


def changed_keys(old: Config, new: Config, path: str = "", all_fields: bool = False) -> list[str]:
    """The changed keys that affect the result (or all changed keys), with both values."""
    changes = []
    for item in dataclasses.fields(new):
        full, before, after = (
            dotted(path, item.name),
            getattr(old, item.name),
            getattr(new, item.name),
        )
        if dataclasses.is_dataclass(after) and dataclasses.is_dataclass(before):
            changes += changed_keys(before, after, full, all_fields)
        elif all_fields or not item.metadata.get("free"):
            if as_place(before) == as_place(after):
                continue
            changes.append(f"{full} ({before} -> {after})")
    return changes


def as_place(value: Any) -> Any:
    """A text as the absolute path that it may be, so that two spellings of a path are equal."""
    if not isinstance(value, str):
        return value
    return os.path.abspath(os.path.expanduser(os.path.expandvars(value)))


def without_free(cls: type, values: Any) -> Any:
    """A stage's keys without those that a run may change, and its texts as paths."""
    if isinstance(values, list):
        return [as_place(value) for value in values]
    if not isinstance(values, dict):
        return as_place(values)
    sections, kept = sections_of(cls), {}
    frees = {item.name for item in dataclasses.fields(cls) if item.metadata.get("free")}
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            below = without_free(sections[key], value)
            kept |= {key: below} if below else {}
        elif key not in frees:
            kept[key] = without_free(cls, value)
    return kept


def refuse_changes(cfg: "TrainConfig", saved: Path) -> None:
    """Raises UserError if `cfg` would change the result of the run that was begun with `saved`."""
    old = load_saved(saved, type(cfg))
    changes = changed_keys(old, cfg) + changed_stages(old.stages, cfg.stages, type(cfg))
    if cfg.stages and old.total_steps != cfg.total_steps:
        lengths = f"{old.total_steps} -> {cfg.total_steps}"
        changes.append(f"total_steps ({lengths}; a run with stages grows by its last stage)")
    if changes:
        remedy = "give the old ones, another output_dir, or overwrite=true"
        begun = f"{saved.parent} was begun with other settings"
        raise UserError(f"{begun}: {', '.join(changes)}; {remedy}")


def changed_stages(old: dict | None, new: dict | None, cls: type) -> list[str]:
    """Forbidden changes of the stages of a run: all but a longer last stage and further stages."""
    if old is None or new is None:
        words = "stages (there were none)" if old is None else "stages (left out)"
        return [] if old == new else [words]
    if list(new)[: len(old)] != list(old):
        return [f"stages ({', '.join(old)} -> {', '.join(new)}; none may be left out or moved)"]
    changes = []
    for number, (name, before) in enumerate(old.items(), 1):
        steps, then = before.get("steps"), new[name].get("steps")
        may_grow = number == len(old) and then >= steps
        after = new[name] | {"steps": steps}
        same = without_free(cls, without_replaced(before)) == without_free(
            cls, without_replaced(after)
        )
        if not same or not (steps == then or may_grow):
            given = f"{before} -> {new[name]}; only the last stage may grow"
            changes.append(f"stages.{name} ({given})")
    return changes


def provenance() -> str:
    """Commit, versions of the packages, machine and command, for the header of config.yaml."""
    packages = ("torch", "torchvision", "timm", "numpy")
    versions = "  ".join(f"{name} {metadata.version(name)}" for name in packages)
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=CONFIG_FOLDER, capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        commit = "unknown"
    lines = [f"commit {commit}", f"python {platform.python_version()}  {versions}"]
    return "\n".join([*lines, *describe_start()])
