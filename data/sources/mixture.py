"""Several sources of images in fixed proportions, as a pure function of the step.

    - {data: "folder:/photos", weight: 3}          # three images in four of a mixed step
    - {data: "tar:/scans-{00..31}.tar", weight: 1}
    - {data: "imagenet:/imagenet", weight: 0, alone: 0.1}   # a tenth of the steps, unmixed

Relative paths start from the folder of the file. The last line is DINOv3's mixing (section 3.1:
10 % of the steps show ImageNet-1k alone). Proportions are exact over every PERIOD images (weights)
and steps (`alone`), in a random order. Within a source no image repeats before all of it was seen.
Step s is found without going through the steps before it, so a run resumes by naming a step.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from data.images import ImageData, class_names, number_classes
from errors import UserError
from files import read_yaml_file

PERIOD = 10_000
# Purposes of random numbers; those below are the loader's.
KINDS_OF_STEPS, SOURCES_OF_PLACES, SOURCE_ORDER = range(16, 19)


class Mixture(ImageData):
    """Sources one after another, as a data set; in `step_indices`, mixed.

    Args:
        weights: shares of the images of mixed steps; any scale.
        alone: share of the steps that show this source only, each in [0, 1], together at most 1.

    Raises:
        UserError: for a negative or missing share.
    """

    def __init__(
        self, sources: Sequence[ImageData], weights: Sequence[float], alone: Sequence[float]
    ):
        if min(*weights, *alone) < 0 or sum(alone) > 1 + 1e-9:
            raise UserError(
                f"weights {weights} must not be negative, "
                f"and {alone} (alone) must lie in [0, 1] together"
            )
        if sum(weights) == 0 and sum(alone) < 1 - 1e-9:
            raise UserError(
                "all weights are 0, and `alone` does not add up to 1: "
                "what should the other steps show?"
            )
        self.passed_over = [line for source in sources for line in source.passed_over]
        self.sources, self.starts = list(sources), np.cumsum([0, *map(len, sources)])
        mixed = max(0.0, 1 - sum(alone))
        self.step_quotas = _quotas([*alone, mixed])
        self.quotas = _quotas(weights) if sum(weights) else np.zeros(len(weights), dtype=np.int64)
        self.patterns: dict[int, tuple] = {}  # by purpose, the last one asked for
        self.orders: dict[int, tuple] = {}  # by source, the last epoch's
        if any(source.labels is not None for source in sources):
            names = [name for source in sources for name in _names(source)]
            self.labels, self.classes = number_classes(names)
        if any(source.captioned is not None for source in sources):
            none = [np.zeros(len(source), bool) for source in sources]
            pairs = zip(sources, none, strict=True)
            self.captioned = np.concatenate(
                [blank if data.captioned is None else data.captioned for data, blank in pairs]
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image(self, index: int) -> Tensor:
        source, number = self._place(index)
        return source.image(number)

    def name(self, index: int) -> str:
        source, number = self._place(index)
        return source.name(number)

    def fingerprint(self) -> str:
        shares = [self.step_quotas.tolist(), self.quotas.tolist()]
        parts = [source.fingerprint() for source in self.sources]
        return hashlib.sha256(repr([shares, parts, self.starts.tolist()]).encode()).hexdigest()[:16]

    def annotations(self, index: int) -> dict:
        source, number = self._place(index)
        return source.annotations(number)

    def captions(self, index: int) -> list[str]:
        source, number = self._place(index)
        return source.captions(number)

    def step_indices(self, step: int, batch_size: int, seed: int, shift: int = 0) -> np.ndarray:
        """(batch_size,) image indices of a global batch.

        Args:
            shift: images shown before this step less step · batch_size, where steps before had
                another batch size. It is divided among the kinds of steps, so with `alone` a
                source may then miss or repeat a few images.
        """
        kinds, kind = self._count(KINDS_OF_STEPS, self.step_quotas, step, 1, seed)
        # Images of each kind of step before this one.
        before = np.maximum(0, kinds * batch_size + shift * self.step_quotas // PERIOD)
        drawn, sources = self._count(
            SOURCES_OF_PLACES, self.quotas, int(before[-1]), batch_size, seed
        )
        drawn = drawn + before[:-1]  # images of each source
        if kind[0] < len(self.sources):
            sources = np.full(batch_size, kind[0])
        indices = np.empty(batch_size, dtype=np.int64)
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            indices[places] = self._images(source, drawn[source] + np.arange(len(places)), seed)
        return indices

    def fill_nodata(self, mean: Sequence[float]) -> None:
        for source in self.sources:
            source.fill_nodata(mean)

    def _place(self, index: int) -> tuple[ImageData, int]:
        source = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.sources[source], int(index - self.starts[source])

    def _count(self, purpose: int, quotas: np.ndarray, first: int, count: int, seed: int):
        """How often each value stands before `first` in an endless row, and the `count` values
        from there on."""
        if not quotas.any():
            return quotas, np.empty(0, dtype=np.int64)
        period, place = divmod(first, PERIOD)
        last_period = (place + count - 1) // PERIOD
        row = [self._pattern(purpose, quotas, period + k, seed) for k in range(last_period + 1)]
        before = period * quotas + np.bincount(row[0][:place], minlength=len(quotas))
        return before, np.concatenate(row)[place : place + count]

    def _pattern(self, purpose: int, quotas: np.ndarray, period: int, seed: int) -> np.ndarray:
        key = (period, seed)
        if self.patterns.get(purpose, (None,))[0] != key:
            rng = np.random.default_rng([seed, purpose, period])
            self.patterns[purpose] = key, rng.permutation(np.repeat(np.arange(len(quotas)), quotas))
        return self.patterns[purpose][1]

    def _images(self, source: int, numbers: np.ndarray, seed: int) -> np.ndarray:
        """Indices of the images that a source shows as its `numbers`-th, each epoch in another
        order."""
        length = len(self.sources[source])
        epochs, places = np.divmod(numbers, length)
        found = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            key = (epoch, seed)
            if self.orders.get(source, (None,))[0] != key:
                rng = np.random.default_rng([seed, SOURCE_ORDER, source, epoch])
                self.orders[source] = key, rng.permutation(np.arange(length, dtype=np.int32))
            chosen = epochs == epoch
            found[chosen] = self.orders[source][1][places[chosen]]
        return found + self.starts[source]


def read_mixture(path: Path) -> list[tuple[str, float, float]]:
    """(data, weight, alone) of each source in a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is no list of sources.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    items = read_yaml_file(path, is_text=lambda keys: keys == ("data",))
    if not isinstance(items, list) or not items:
        raise UserError(f"{str(path)!r} must be a list of {{data: DATA, weight: number}}")
    return [_source(item, path) for item in items]


def _source(item, path: Path) -> tuple[str, float, float]:
    known = {"data", "weight", "alone"}
    if not isinstance(item, dict) or "data" not in item or not item.keys() <= known:
        raise UserError(
            f"{item} in {str(path)!r} is no source; "
            "keys are data, weight (default 1) and alone (default 0)"
        )
    try:
        shares = float(item.get("weight", 1)), float(item.get("alone", 0))
    except (TypeError, ValueError, OverflowError):
        shares = (math.inf,)
    if not all(map(math.isfinite, shares)):
        raise UserError(f"{item} in {str(path)!r}: weight and alone are numbers")
    return str(item["data"]), *shares


def _quotas(shares: Sequence[float]) -> np.ndarray:
    """Whole numbers that add up to PERIOD, by largest remainder; at least 1 for what is not 0."""
    exact = np.array(shares, dtype=np.float64) / sum(shares) * PERIOD
    quotas = np.maximum(np.floor(exact + 1e-9), exact > 0).astype(np.int64)
    while (missing := PERIOD - quotas.sum()) != 0:
        sign = np.sign(missing)
        remainder = np.where(quotas > 0, (exact - quotas) * sign, -np.inf)
        quotas[np.argmax(remainder)] += sign
    return quotas


def _names(source: ImageData) -> list[str | None]:
    if source.labels is None:
        return [None] * len(source)
    names = [*class_names(source), None]  # the last serves label -1
    return [names[label] for label in source.labels]
