"""Files as users write them: YAML in which no key stands twice."""

from pathlib import Path
from typing import Any

import yaml

from errors import UserError


def read_yaml_file(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: if it is no YAML, or a key stands twice in a mapping.
    """
    try:
        return parse_yaml(path.read_text(), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; `where` it stands is for the message.

    Raises:
        yaml.YAMLError: if it is no YAML.
        UserError: if a key stands twice in a mapping, of which YAML would take the last.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_twice(node, where, set())
        return loader.construct_document(node)
    except ValueError as error:  # a value that its type cannot hold, such as the date 2020-99-99
        if isinstance(error, UserError):
            raise
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _refuse_twice(node: yaml.Node, where: str, seen: set[int]) -> None:
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))  # an alias is the node itself, which may hold its alias
    lines: dict[str, int] = {}
    for item in node.value:
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        if isinstance(key, yaml.ScalarNode):
            name, line = key.value, key.start_mark.line + 1
            if name in lines:
                both = f"lines {lines[name]} and {line}"
                place = f"line {line}" if line == lines[name] else both
                raise UserError(f"{name} stands twice in {where} ({place}); join them")
            lines[name] = line
        _refuse_twice(value, where, seen)
