"""The machinery behind engine.config: YAML files with `base:`, `key=value` overrides, conversion by declared type.

It knows dataclasses, not what they are for; every mistake is one sentence that names the key and what is allowed.
"""

import dataclasses
import difflib
import platform
import subprocess
import types
import typing
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from errors import UserError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def free(default: Any) -> Any:
    """A field that a run may change when it goes on (speed, logging, length)."""
    return dataclasses.field(default=default, metadata={"free": True})


def section(cls: type) -> Any:
    return dataclasses.field(default_factory=cls)


# ----------------------------------------------------------------- from YAML and the command line to dataclasses


def find_config(name: str) -> Path:
    """The file `name`, as a path or in `configs/`."""
    for path in (Path(name), CONFIG_FOLDER / name, CONFIG_FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml")))
    raise UserError(f"no configuration {name}: give a path or one of {known}")


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> list[dict]:
    """The file's keys after those of its `base:` (relative to the file, or in `configs/`; or a list, such as of a model's recipe
    and of continue.yaml): layers, the last one wins.

    Args:
        above: the files whose base this is.
    """
    if path.resolve() in above:
        raise UserError(f"{path} is its own base, by way of {', '.join(map(str, above))}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: no text, or `2020-99-99` and `!!float x`
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values")
    bases, layers = values.pop("base", None), []
    for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
        beside = path.parent / str(base)
        below = beside if beside.is_file() else find_config(str(base))
        layers += read_yaml(below, (*above, path.resolve()))
    return [*layers, values]


def parse_override(argument: str) -> dict:
    """ "a.b=1" as {"a": {"b": 1}}."""
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise UserError(
            f"cannot read {argument!r}: write key=value, for example optim.clip_grad=1.0"
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text  # DATA specs hold characters that YAML gives a meaning
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


ONE_OF = (
    "total_steps",
    "epochs",
    "images",
)  # three words for one thing: a layer that gives one, or steps of stages, replaces them


def merge(below: Any, above: Any) -> Any:
    """Deep merge of mappings, `above` wins."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    stages = above.get("stages")
    stages = stages.values() if isinstance(stages, dict) else ()
    if any(above.get(name) is not None for name in ONE_OF) or any(
        isinstance(stage, dict) and "steps" in stage for stage in stages
    ):
        below = {key: value for key, value in below.items() if key not in ONE_OF}
    return below | {
        key: merge(below[key], value) if key in below else value for key, value in above.items()
    }


def write_out(cls: type, values: Any, path: str = "") -> Any:
    """Replaces short forms (a schedule given as a number) by the mapping that they stand for, so that layers merge.

    A section that holds none is refused here, where no layer above it can hide the mistake.
    """
    values = cls.shorthand(values) if hasattr(cls, "shorthand") else values
    if not isinstance(values, dict):
        raise UserError(f"{path} is a section, not the value {values!r}")
    inner = {key: _without_none(hint) for key, hint in typing.get_type_hints(cls).items()}
    written = {}
    for key, value in values.items():
        is_section = dataclasses.is_dataclass(inner.get(key)) and value is not None
        written[key] = (
            write_out(inner[key], value, f"{path}.{key}" if path else str(key))
            if is_section
            else value
        )
    return written


def build(
    cls: type, values: Any, path: str = "", default: Any = None, root: type | None = None
) -> Any:
    """A dataclass from nested mappings; unknown keys and wrong types are refused with the nearest valid key.

    Args:
        default: an instance that gives what `values` leaves out; that of `cls()` otherwise.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path} is a section, not the value {values!r}")
    hints, root, default = typing.get_type_hints(cls), root or cls, default or cls()
    arguments = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise UserError(f"unknown key {full}{_suggestion(root, str(key), path)}")
        inner = _without_none(hints[key])
        if dataclasses.is_dataclass(inner) and value is not None:
            arguments[key] = build(inner, value, full, getattr(default, key), root)
        else:
            arguments[key] = convert(value, hints[key], full)
    return dataclasses.replace(default, **arguments)


def _suggestion(root: type, key: str, path: str) -> str:
    """'; did you mean ...?', over the whole tree so that a key in the wrong section is found too."""
    keys = all_keys(root)
    full = f"{path}.{key}" if path else key
    near = [name for name in keys if name.split(".")[-1] == key][
        :1
    ]  # the right key in the wrong section
    near = near or difflib.get_close_matches(full, keys, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(
        key, [name.split(".")[-1] for name in keys], n=1, cutoff=0.5
    )
    return (
        f"; did you mean {near[0]}?"
        if near
        else f"; the keys here are {', '.join(n for n in keys if n.rpartition('.')[0] == path)}"
    )


def all_keys(cls: type, path: str = "") -> list[str]:
    """Every key and section below `cls`, dotted."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        full = f"{path}.{name}" if path else name
        keys.append(full)
        inner = _without_none(hint)
        if dataclasses.is_dataclass(inner):
            keys += all_keys(inner, full)
    return keys


def _without_none(hint: Any) -> Any:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return (
        options[0]
        if typing.get_origin(hint) in (Union, types.UnionType) and len(options) == 1
        else hint
    )


def convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the declared type (YAML reads 1e-3 as text and `on` as a bool), or one sentence."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, options, name)
    if origin is Literal:
        value = (
            {False: "none", None: "none"}.get(value, value)
            if isinstance(value, (bool, type(None)))
            else value
        )
        if value not in options:
            raise UserError(
                f"{name} is {value!r}; it must be one of {', '.join(map(str, options))}"
            )
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{name} is {value!r}; it must hold names and their keys")
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} is {value!r}; it must be a list such as [0.1, 0.5]")
        return [convert(item, options[0], name) for item in value]
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name, root=hint)
    return _convert_scalar(value, hint, name)


def _convert_union(value: Any, options: tuple, name: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return convert(value, option, name)
            except UserError as error:
                errors.append(error)
    raise errors[0]


def _convert_scalar(value: Any, hint: type, name: str) -> Any:
    if hint is str and isinstance(value, (str, int, float, Path)) and not isinstance(value, bool):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if (
        hint in (int, float)
        and isinstance(value, (int, float, str))
        and not isinstance(value, bool)
    ):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if number - number == 0 and (
            hint is float or number == int(number)
        ):  # neither nan nor infinite
            return (
                hint(number)
                if hint is float or abs(number) > 2**53 or isinstance(value, str)
                else int(value)
            )
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise UserError(f"{name} is {value!r}; it must be {words}")


# ----------------------------------------------------------------- back to YAML, and what may change


def to_dict(cfg: Any) -> dict:
    """Nested plain values, in the order of declaration."""
    return {name: _plain(value) for name, value in vars(cfg).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def to_yaml(cfg: Any, header: str = "") -> str:
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.safe_dump(
        to_dict(cfg), sort_keys=False, default_flow_style=None, width=110
    )


def changed_keys(old: Any, new: Any, path: str = "", all_fields: bool = False) -> list[str]:
    """Keys that belong to the result (or all) and differ, with both values."""
    changes = []
    for item in dataclasses.fields(new):
        full = f"{path}.{item.name}" if path else item.name
        before, after = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(after) and dataclasses.is_dataclass(before):
            changes += changed_keys(before, after, full, all_fields)
        elif before != after and (all_fields or not item.metadata.get("free")):
            changes.append(f"{full} ({before} -> {after})")
    return changes


def refuse_changes(cfg: Any, saved: Path) -> None:
    """Raises UserError if `cfg` would change the result of the run whose configuration stands in `saved`."""
    old = build(
        type(cfg), reduce(merge, (write_out(type(cfg), layer) for layer in read_yaml(saved)), {})
    )
    changes = changed_keys(old, cfg) + changed_stages(old.stages, cfg.stages)
    if cfg.stages and old.total_steps != cfg.total_steps:
        changes.append(
            f"total_steps ({old.total_steps} -> {cfg.total_steps}; a run with stages grows by its last stage)"
        )
    if changes:
        raise UserError(
            f"{saved.parent} was begun with other settings: {', '.join(changes)}; give the old ones, another output_dir, or overwrite=true"
        )


def changed_stages(old: dict | None, new: dict | None) -> list[str]:
    """What may not change in a run that has begun: anything but a longer last stage, or further ones."""
    if old is None or new is None:
        return (
            []
            if old == new
            else ["stages (there were none)" if old is None else "stages (left out)"]
        )
    changes = [
        f"stages.{name} (left out or moved)"
        for name, then in zip(old, [*new, *[None] * len(old)])
        if name != then
    ]
    for number, name in enumerate(old, 1):
        before, after = dict(old[name]), dict(new.get(name, old[name]))
        steps = before.pop("steps", None), after.pop("steps", None)
        if before != after:
            changes.append(f"stages.{name} ({before} -> {after})")
        elif steps[0] != steps[1] and (number < len(old) or steps[1] < steps[0]):
            changes.append(
                f"stages.{name}.steps ({steps[0]} -> {steps[1]}; only the last stage may grow)"
            )
    return changes


def provenance() -> str:
    """When, from which commit and with which versions: the header of config.yaml."""
    packages = ("torch", "torchvision", "timm", "numpy")
    versions = "  ".join(f"{name} {metadata.version(name)}" for name in packages)
    folder = Path(__file__).resolve().parent
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True
        )
        commit = git.stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        commit = "unknown"
    return f"commit {commit}\npython {platform.python_version()}  {versions}"
