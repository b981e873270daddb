"""Layers of a configuration: files, their bases, the command line, stages; which keys hold."""

from functools import partial
from typing import Any

# Three ways to give the length. A layer with one of them, or with steps of stages, replaces those
# of the layers below.
ONE_OF = ("total_steps", "epochs", "images")
# Keys of `crops` that are read by their names. All others are fields of AugmentPolicy, which a
# policy in a layer above replaces.
NOT_OF_POLICY = {
    *("global_size", "global_scale", "global_count", "local_size", "local_scale", "local_count"),
    *("ratio", "policy", "guided", "guided_globals", "guided_share", "mix"),
}


Path = tuple[str, ...]  # of keys


def merge(below: Any, above: Any, choices: bool = False) -> Any:
    """Deep merge of mappings, `above` wins; with `choices`, without what `void_keys` names."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    for _, path in void_keys(below, above) if choices else ():
        below = _without(below, path)
    stages = above.get("stages")
    stages = stages.values() if isinstance(stages, dict) else ()
    gives_steps = any(isinstance(stage, dict) and "steps" in stage for stage in stages)
    if gives_steps or any(above.get(name) is not None for name in ONE_OF):
        below = {key: value for key, value in below.items() if key not in ONE_OF}
    both = {key: merge(below[key], above[key], choices) for key in above if key in below}
    return below | above | both


lay_over = partial(merge, choices=True)


def void_keys(below: dict, above: dict) -> list[tuple[Path, Path]]:
    """(key of `above`, key of `below` that it makes void).

    A model of timm reads no key of the model below; a colour policy and another way to tune bring
    their own values; a schedule replaces a constant weight and the other way round.
    """
    found = []
    model, crops, tune = (_section(below, name) for name in ("model", "crops", "tune"))
    if str(value_at(above, ("model", "arch"))).startswith("timm:"):
        found += [(("model", "arch"), ("model", key)) for key in model]
    if value_at(above, ("crops", "policy")) is not None:
        keys = [key for key in crops if key not in NOT_OF_POLICY]
        found += [(("crops", "policy"), ("crops", key)) for key in keys]
    if value_at(above, ("tune", "mode")) not in (None, tune.get("mode")) and "mode" in tune:
        found += [(("tune", "mode"), ("tune", key)) for key in tune if key != "mode"]
    for one, other in _constants_and_schedules(below, above):
        if value_at(above, one) is not None and value_at(below, other) is not None:
            found.append((one, other))
    return found


def void_in_words(below: dict, above: dict) -> str:
    """What is set in `below`, not again in `above`, and void, with what makes it void."""
    void: dict[Path, list[str]] = {}
    for cause, path in void_keys(below, above):
        value = value_at(below, path)
        if value is not None and value_at(above, path) is None:
            void.setdefault(cause, []).append(f"{'.'.join(path)} {value}")
    sentences = []
    for cause, paths in void.items():
        chosen = f"{'.'.join(cause)} {value_at(above, cause)}"
        sentences.append(f"{chosen} replaces what stands below it: {', '.join(paths)}")
    return "; ".join(sentences)


def weights_given_twice(values: dict) -> list[tuple[str, str]]:
    """(schedule, constant weight) of terms for which one layer gives both."""
    pairs = _constants_and_schedules(values, values)
    return [
        (".".join(one), f"{'.'.join(other)} {value_at(values, other)}")
        for one, other in pairs
        if one[0] == "schedule" and None not in (value_at(values, one), value_at(values, other))
    ]


def _constants_and_schedules(below: dict, above: dict) -> list[tuple[Path, Path]]:
    """Paths of schedule.TERM and loss.TERM.weight, of TERM_local and local_weight; both ways."""
    pairs = []
    for term in dict.fromkeys([*_section(below, "loss"), *_section(above, "loss")]):
        for name, weight in ((term, "weight"), (f"{term}_local", "local_weight")):
            pairs.append((("schedule", name), ("loss", term, weight)))
    return pairs + [(other, one) for one, other in pairs]


def without_replaced(values: dict) -> dict:
    """Without the constant weights that schedules replace, so that the rest reads back."""
    for one, other in _constants_and_schedules(values, values):
        if one[0] == "schedule" and value_at(values, one) is not None:
            values = _without(values, other)
    return values


def _section(layer: dict, name: str) -> dict:
    return layer[name] if isinstance(layer.get(name), dict) else {}


def value_at(layer: Any, path: Path) -> Any:
    for key in path:
        layer = layer.get(key) if isinstance(layer, dict) else None
    return layer


def _without(layer: dict, path: Path) -> dict:
    key, *rest = path
    if not isinstance(layer, dict) or key not in layer:
        return layer
    if rest:
        return layer | {key: _without(layer[key], tuple(rest))}
    return {name: value for name, value in layer.items() if name != key}
