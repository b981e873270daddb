"""Reads the keys of a configuration from its dataclasses: names, types, rules, units, sentences.

Prints the tables of `python train.py --keys` and of docs/configuration.md.
"""

import dataclasses
import difflib
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Union

from errors import UserError

WIDTH = 100  # columns of a terminal
HEADINGS = ("key", "type", "default", "unit")
PAGE = """# Configuration

This page is written by

```
python distill.py --keys --markdown > docs/configuration.md
```

It has every key of a configuration file and of the command line (`key=value`). A key of type text
keeps its text: `output_dir=1.10` writes to `1.10`. `~` and `$VARIABLES` in paths are replaced.

Without `--markdown` the same stands in your terminal; `python train.py --keys loss.dino` shows one
section. Only `distill.py` reads the keys of `distill`; all others are read by `train.py` as well.
A key of a stage or a student is written below its name: `stages.gram.schedule.lr.peak=1e-4`.
"""
FIELD = re.compile(r"    (\w+): [^#]*(?:  # (.*))?")
WORDS = {int: "int", float: "float", bool: "bool", str: "text", dict: "mapping", type(None): "null"}


class Rule(NamedTuple):
    """A condition on a value beyond its type; part of the `Annotated` type of a field."""

    words: str  # after "it must be"
    holds: Callable[[Any], object]


def within(interval: str, count: int = 0, words: str = "") -> Rule:
    """Numbers in an interval such as "(0, 1]": one, a list of any length, or a list of `count`."""
    low, high = map(float, interval[1:-1].split(","))
    above = "more than" if interval[0] == "(" else "at least"
    bounds = f"in {interval}" if math.isfinite(high) else f"{above} {low:g}"
    bounds = "non-negative" if interval == "[0, inf)" else bounds

    def holds(value: float | list[float]) -> bool:
        numbers = value if isinstance(value, list) else [value]
        fits = not count or len(numbers) == count
        lower = all(number > low or number == low and above == "at least" for number in numbers)
        upper = all(number < high or number == high and interval[-1] == "]" for number in numbers)
        return fits and lower and upper

    return Rule(words or (f"{count} numbers {bounds}" if count else bounds), holds)


def rising(interval: str) -> Rule:
    """[low, high] within an interval."""
    numbers = within(interval, 2)
    words = f"[low, high] within {interval}"
    return Rule(words, lambda pair: numbers.holds(pair) and pair[0] <= pair[1])


def is_size(size: int | list[int]) -> bool:
    """Whether it is a number of pixels, or [height, width]."""
    return isinstance(size, int) or len(size) == 2


def is_span(span: int | str) -> bool:
    """Whether it is a number of steps, or a share of the run such as "10%"."""
    if isinstance(span, int):
        return span >= 0
    return bool(re.fullmatch(r"\d+(\.\d+)?%", span))


class Key(NamedTuple):
    """A row of the table, in words."""

    name: str
    type: str
    default: str
    unit: str
    sentence: str


class Section(NamedTuple):
    name: str
    cls: type
    title: str
    keys: list[Key]


def dotted(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


# ----------------------------------------------------------------- names


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def options_of(union: Any) -> list[Any]:
    """The types in a union, numbers first, for `typing` caches equal unions of another order."""

    def rank(option: Any) -> int:
        kind = typing.get_origin(option) or option
        return [*WORDS].index(kind if kind in WORDS else bool)

    return sorted(typing.get_args(union), key=rank)


def sections_of(cls: type) -> dict[str, type]:
    """The fields of `cls` that hold a dataclass, or a dataclass or None."""
    sections = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        inner = options[0] if is_union(hint) and len(options) == 1 else hint
        if dataclasses.is_dataclass(inner):
            sections[name] = inner
    return sections


def declared_type(cls: type, path: tuple[str, ...]) -> Any:
    """The type of a key, also of a stage or a student, without null; None where there is no key."""
    for above in (("stages",), ("distill", "students")):
        if path[: len(above)] == above and len(path) > len(above) + 1:
            return declared_type(cls, path[len(above) + 1 :])
    hint = typing.get_type_hints(cls).get(path[0]) if path else None
    if path[1:]:
        inner = sections_of(cls).get(path[0])
        return declared_type(inner, path[1:]) if inner else None
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    return options[0] if is_union(hint) and len(options) == 1 else hint


def is_text(cls: type, path: tuple[str, ...]) -> bool:
    """Whether the values of a key are text."""
    return path == ("base",) or declared_type(cls, path) in (str, list[str])


def all_keys(cls: type, path: str = "") -> list[str]:
    """Every key and section below `cls`, dotted."""
    keys, sections = [], sections_of(cls)
    for name in typing.get_type_hints(cls):
        keys.append(dotted(path, name))
        if name in sections:
            keys += all_keys(sections[name], dotted(path, name))
    return keys


def suggestion(keys: list[str], path: str, key: str) -> str:
    """'; did you mean ...?', over all keys so that one in the wrong section is found too."""
    names = [name.split(".")[-1] for name in keys]
    near = [name for name in keys if name.split(".")[-1] == key]
    near = near or difflib.get_close_matches(dotted(path, key), keys, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    here = [name for name in keys if name.rpartition(".")[0] == path]
    return f"; did you mean {near[0]}?" if near else f"; the keys here are {', '.join(here)}"


# ----------------------------------------------------------------- what a field says


def notes(hint: Any) -> tuple[list[Rule], str]:
    """The rules and the unit in an `Annotated` type, or in those of a union."""
    options = typing.get_args(hint) if is_union(hint) else [hint]
    found = [note for option in options for note in getattr(option, "__metadata__", ())]
    rules = [note for note in found if isinstance(note, Rule)]
    units = [note for note in found if isinstance(note, str)]
    return rules, "".join(units)


def sentences(cls: type) -> dict[str, str]:
    """The comment above or beside each field, from the source of `cls` and of its bases."""
    said, above = {}, []
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            field = FIELD.fullmatch(line)
            if line.startswith("    # "):
                above.append(line.removeprefix("    # "))
            elif field:
                said[field[1]] = " ".join([*above, field[2] or ""]).strip()
                above = []
    return said


def type_in_words(hint: Any) -> str:
    kind, options = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return " | ".join(map(str, options))
    if is_union(hint):
        return " | ".join(map(type_in_words, options_of(hint)))
    if kind is list:
        return f"list of {type_in_words(options[0])}"
    return WORDS.get(kind) or kind.__name__.removesuffix("Config").lower()


def value_in_words(value: Any) -> str:
    """As one would write it in YAML; of a schedule only what is not its own default."""
    if dataclasses.is_dataclass(value):
        plain = vars(type(value)())
        given = {key: item for key, item in vars(value).items() if item != plain[key]}
        return ", ".join(f"{key} {value_in_words(item)}" for key, item in given.items())
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# ----------------------------------------------------------------- tables


def sections(cls: type, default: Any = None, path: str = "") -> list[Section]:
    """The section of `cls`, then those below it; `default` gives the defaults of its keys."""
    default = default or cls()
    said, below = sentences(cls), sections_of(cls)
    title = " ".join(inspect.getdoc(cls).split())
    found = [Section(path, cls, title, [])]
    plain = typing.get_type_hints(cls)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        full, value = dotted(path, name), getattr(default, name)
        rules, unit = notes(hint)
        words = [said.get(name, ""), *(f"It must be {rule.words}." for rule in rules)]
        kind = type_in_words(plain[name])
        key = Key(full, kind, value_in_words(value), unit, " ".join(words).strip())
        if said.get(name) or name not in below:
            found[0].keys.append(key)
        if name in below:
            found += sections(below[name], value, full)
        elif item := item_of(plain[name]):
            found += sections(item, None, f"{full}[]")
    return found


def item_of(hint: Any) -> type | None:
    """The dataclass of which `hint` takes a list, if any."""
    lists = [option for option in typing.get_args(hint) if typing.get_origin(option) is list]
    items = [typing.get_args(option)[0] for option in lists]
    return next(filter(dataclasses.is_dataclass, items), None)


def select(schema: type, name: str) -> list[Section]:
    """The sections at `name` and below it, or the one key of that name; "" is everything.

    Sections of one class, such as the schedules, come once.

    Raises:
        UserError: for an unknown name, with the nearest.
    """
    every = sections(schema)
    chosen = [item for item in every if f"{item.name}.".startswith(f"{name}." if name else "")]
    if not chosen:
        chosen = [
            item._replace(keys=[key for key in item.keys if key.name == name]) for item in every
        ]
    first = {item.cls: item for item in reversed(chosen) if item.keys}
    if not first:
        raise UserError(f"unknown key {name}{suggestion(all_keys(schema), *split(name))}")
    return [item for item in chosen if item is first.get(item.cls)]


def split(name: str) -> tuple[str, str]:
    path, _, key = name.rpartition(".")
    return path, key


def as_text(chosen: list[Section]) -> str:
    """A table for each section, each key with its sentence below, for terminals."""
    lines = []
    for item in chosen:
        rows = [HEADINGS, *(key[:4] for key in item.keys)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", *textwrap.wrap(f"{item.name or 'run'}: {item.title}", WIDTH)]
        for row, key in zip(rows, [None, *item.keys], strict=True):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
            if key:
                indent = {"initial_indent": "    ", "subsequent_indent": "    "}
                lines += textwrap.wrap(key.sentence, WIDTH, **indent)
    return "\n".join(lines[1:])


def as_markdown(chosen: list[Section]) -> str:
    """docs/configuration.md."""
    lines = [PAGE]
    for item in chosen:
        lines += [f"## {item.name or 'The run'}", "", item.title, ""]
        lines += ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
        for key in item.keys:
            cells = [f"`{key.name}`", *key[1:]]
            escaped = [cell.replace("|", "\\|").replace("*", "\\*") for cell in cells]
            lines.append(f"| {' | '.join(escaped)} |")
        lines.append("")
    return "\n".join(lines).rstrip()
