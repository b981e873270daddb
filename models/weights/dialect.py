"""`Dialect`: a table between our tensor names and those of one family of files."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Names = tuple[str, ...]
NUMBER = r"(?<=\.)\d+(?=\.)"


@dataclass(frozen=True)
class Dialect:
    """How one family of files names our tensors. Reading and writing use the same table.

    Attributes:
        name: for messages.
        table: our name, or our name without its last part, -> theirs. `#` stands for a number.
            Several names hold the rows of one tensor of ours, one after the other. An empty name
            stands for rows of zeros that the family leaves out. What the table lacks, and what
            it maps to (), is not held.
        interpolation: of learned positions, where no file tells it.
        norm_eps: the same for the norms.
    """

    name: str
    table: Mapping[str, str | Names] = field(repr=False)
    interpolation: str = "offset"
    norm_eps: float = 1e-6

    def names(self, own: str) -> Names | None:
        """Their names for one of ours, numbers filled in; None if the family does not hold it."""
        if not self.table:
            return (own,)
        generic = re.sub(NUMBER, "#", own)
        stem, dot, leaf = generic.rpartition(".")
        if generic in self.table:
            found = _as_tuple(self.table[generic])
        else:
            names = _as_tuple(self.table.get(stem, ()))
            found = tuple(name + dot + leaf if name else "" for name in names)
        numbers = re.findall(NUMBER, own)
        return tuple(_fill(name, numbers) for name in found) or None

    def find(self, own: str, tensors: Iterable[str]) -> dict[int, str]:
        """Names among `tensors` of (the first rows of) `own`, by the number at its `#`, or 0."""
        probe = self.names(own.replace("#", "987654"))
        if probe is None:
            return {}
        pattern = re.compile(re.escape(probe[0]).replace("987654", r"(\d+)"))
        hits = ((pattern.fullmatch(name), name) for name in tensors)
        return {int(hit[1]) if pattern.groups else 0: name for hit, name in hits if hit}


OWN = Dialect("own", {})


def same_names(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def replace_mlp(table: Mapping[str, str | Names], new: dict[str, str | Names]) -> dict:
    """`table` with other names for the feed-forward net."""
    return {name: theirs for name, theirs in table.items() if ".mlp." not in name} | new


def has_name(tensors: Iterable[str], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in tensors)


def _as_tuple(value: str | Names) -> Names:
    return (value,) if isinstance(value, str) else value


def _fill(template: str, numbers: list[str]) -> str:
    for number in numbers:
        template = template.replace("#", number, 1)
    return template
