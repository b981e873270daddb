"""Files as users write them: paths with `~` and `$VARIABLES`, YAML without its surprises."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from errors import UserError

INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
FLOAT = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$")
TEXT = "tag:yaml.org,2002:str"


def expand(path: str | Path) -> Path:
    """The path with `~` and `$VARIABLES` replaced.

    Raises:
        UserError: if a variable is not set, and no file has this name with its `$`.
    """
    text = str(path)
    if "$" in text and not os.path.exists(text):
        text = os.path.expandvars(text)
        if missing := re.search(r"\$(\w+|\{\w+\})", text):
            raise UserError(f"{path}: the environment variable {missing[0]} is not set")
    return Path(os.path.expanduser(text))


def expand_listed(path: str) -> str:
    """As `expand`, for one of many paths in a file: only at its beginning, and any name is kept."""
    start = path.startswith(("~", "$"))
    return os.path.expanduser(os.path.expandvars(path)) if start else path


def split_query(spec: str, base: Path = Path()) -> tuple[str, str]:
    """A DATA or MODEL and its options: ("folder:/x", "size=3") for "folder:/x?size=3".

    Names may hold a question mark too. The longest beginning that exists is a name; otherwise
    options begin at the first question mark before a key.

    Args:
        base: the folder that relative paths start from.
    """
    marks = [match.start() for match in re.finditer(r"\?", spec)]
    for end in (len(spec), *reversed(marks)):
        for name in (spec[:end], spec[:end].partition(":")[2]):
            path = os.path.expanduser(os.path.expandvars(name))
            if name and os.path.exists(base / path):
                return spec[:end], spec[end + 1 :]
    options = re.search(r"\?(?=\w+(=|&|$))", spec)
    end = options.start() if options else len(spec)
    return spec[:end], spec[end + 1 :]


def with_option(spec: str, option: str) -> str:
    """The DATA or MODEL with one more option."""
    return f"{spec}{'&' if split_query(spec)[1] else '?'}{option}"


def read_yaml_file(path: Path, is_text: Callable[[tuple[str, ...]], bool] | None = None) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: if it is no YAML, or a key stands twice in a mapping.
    """
    try:
        return parse_yaml(path.read_text(), str(path), is_text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def parse_yaml(
    text: str,
    where: str,
    is_text: Callable[[tuple[str, ...]], bool] | None = None,
    path: tuple[str, ...] = (),
) -> Any:
    """What a YAML text holds.

    Args:
        where: it stands, for the message.
        is_text: whether the values below a path of keys are text, whatever YAML takes them for;
            null stays null.
        path: of the keys above this text.

    Raises:
        yaml.YAMLError: if it is no YAML.
        UserError: if a key stands twice in a mapping, of which YAML would take the last.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _prepare(node, where, is_text or (lambda path: False), path, set())
        return loader.construct_document(node)
    except ValueError as error:  # a number of more digits than Python reads
        if isinstance(error, UserError):
            raise
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML 1.1 in which 0010 (8), 12:30 (750) and 2026-01-05 are text, and 1e-3 is a number."""

    yaml_implicit_resolvers = {
        first: [item for item in items if not item[0].endswith((":int", ":float", ":timestamp"))]
        for first, items in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def _prepare(
    node: yaml.Node,
    where: str,
    is_text: Callable[[tuple[str, ...]], bool],
    path: tuple[str, ...],
    seen: set[int],
) -> None:
    """Refuses keys that stand twice, and lets text keys keep their text."""
    if isinstance(node, yaml.ScalarNode):
        if not node.tag.endswith(":null") and is_text(path):
            node.tag = TEXT
        return
    if id(node) in seen:  # an alias is the node itself, which may hold its alias
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for item in node.value:
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        below = path
        if isinstance(key, yaml.ScalarNode):
            name, line = key.value, key.start_mark.line + 1
            if name in lines:
                both = f"lines {lines[name]} and {line}"
                place = f"line {line}" if line == lines[name] else both
                raise UserError(f"{name} stands twice in {where} ({place}); join them")
            lines[name] = line
            below = (*path, name)
        _prepare(value, where, is_text, below, seen)
