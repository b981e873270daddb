"""Layers of a configuration: files, their bases, the command line, stages; which keys hold."""

from collections.abc import Iterator
from functools import partial
from typing import Any

# Three ways to give the length. A layer with one of them, or with steps of stages, replaces those
# of the layers below.
ONE_OF = ("total_steps", "epochs", "images")
# Keys of `crops` that are read by their names. All others are fields of AugmentPolicy, which a
# policy in a layer above replaces.
NOT_OF_POLICY = {
    *("global_size", "global_scale", "global_count", "local_size", "local_scale", "local_count"),
    *("policy", "guided", "guided_globals", "guided_share", "mix"),
}


def merge(below: Any, above: Any, choices: bool = False) -> Any:
    """Deep merge of mappings, `above` wins; with `choices`, without what `void_keys` names."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    for section, key in void_keys(below, above) if choices else ():
        kept = {name: value for name, value in below[section].items() if name != key}
        below = below | {section: kept}
    stages = above.get("stages")
    stages = stages.values() if isinstance(stages, dict) else ()
    gives_steps = any(isinstance(stage, dict) and "steps" in stage for stage in stages)
    if gives_steps or any(above.get(name) is not None for name in ONE_OF):
        below = {key: value for key, value in below.items() if key not in ONE_OF}
    both = {key: merge(below[key], above[key], choices) for key in above if key in below}
    return below | above | both


lay_over = partial(merge, choices=True)


def void_keys(below: dict, above: dict) -> Iterator[tuple[str, str]]:
    """(section, key) of `below` that a choice in `above` makes void.

    A model of timm reads no key of the model below, and a colour policy brings its own values.
    """

    def section(layer: dict, name: str) -> dict:
        return layer[name] if isinstance(layer.get(name), dict) else {}

    if str(section(above, "model").get("arch")).startswith("timm:"):
        for key in section(below, "model"):
            yield "model", key
    if section(above, "crops").get("policy") is not None:
        for key in section(below, "crops"):
            if key not in NOT_OF_POLICY:
                yield "crops", key


def void_in_words(below: dict, above: dict) -> str:
    """Says which keys of `below` a choice in `above` makes void, and what is given in neither."""
    void = [
        f"{section}.{key} {below[section][key]}"
        for section, key in void_keys(below, above)
        if key != "arch" and key not in above[section] and below[section][key] is not None
    ]
    if not void:
        return ""
    chosen = [
        f"{section}.{key} {above[section][key]}"
        for section, key in (("model", "arch"), ("crops", "policy"))
        if any(name.startswith(f"{section}.") for name in void)
    ]
    return f"{' and '.join(chosen)} replaces what stands below it: {', '.join(void)}"
