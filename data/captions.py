"""Captions of images: cleaned when data is opened, one of several drawn for each step."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.images import Chosen, ImageData
from errors import UserError

CAPTION, SHUFFLE = 5, 6  # purposes of random numbers, beside those of data/loader.py
LOOKED_AT = 10_000  # images whose captions are measured at the start
KINDS = (
    "a .csv with the columns file and caption, .txt members beside the images of a tar, "
    "caption=COLUMN of hf, or `scenes`"
)


def clean_caption(text: str | bytes | None, passed: Counter) -> str:
    """The caption in one line; "" for one that is empty or not UTF-8, which `passed` counts."""
    try:
        text = text.decode() if isinstance(text, bytes) else str(text or "")
        text.encode()  # files of text are read with bytes that are not UTF-8 as surrogates
    except UnicodeError:
        passed["not UTF-8"] += 1
        return ""
    text = " ".join(text.split())
    passed["empty"] += not text
    return text


def say_captions(passed: Counter, title: str) -> list[str]:
    """A sentence with the counts of captions that `clean_caption` passed over, or none."""
    found = [f"{count} {reason}" for reason, count in sorted(passed.items()) if count]
    return [f"{title}: captions passed over: {', '.join(found)}"] if found else []


def with_captions(data: ImageData, spec: str) -> ImageData:
    """The images that have a caption; a line of `passed_over` counts the others.

    Raises:
        UserError: if none has.
    """
    if data.captioned is None or not data.captioned.any():
        said = "".join(f" ({line})" for line in data.passed_over)
        raise UserError(f"{spec} has no captions; they come from {KINDS}{said}")
    if data.captioned.all():
        return data
    chosen = Chosen(data, np.flatnonzero(data.captioned))
    line = f"{spec}: {len(data) - len(chosen)} of {len(data)} images have no caption; left out"
    chosen.passed_over, chosen.origin = [*data.passed_over, line], data.origin
    return chosen


def drawn_captions(
    data: ImageData, images: Sequence[int], first: int, seed: int, shuffle: bool = False
) -> list[str]:
    """One caption of each image, the same for the same place in the stream of a run.

    Args:
        first: place in the stream of the first of `images`.
        shuffle: the caption of another image, the same one each time: a control.
    """
    other = np.random.default_rng([seed, SHUFFLE]).permutation(len(data)) if shuffle else None
    texts = []
    for place, index in enumerate(images, first):
        found = data.captions(int(index if other is None else other[index]))
        draw = np.random.SeedSequence([seed, CAPTION, place]).generate_state(1)[0]
        texts.append(found[int(draw) % len(found)])
    return texts


def some_captions(data: ImageData) -> list[str]:
    """All captions of up to LOOKED_AT images, evenly spread."""
    places = np.unique(np.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).astype(int))
    return [text for index in places for text in data.captions(int(index))]
