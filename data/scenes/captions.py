"""What a generated scene shows, in words: objects, colours, places."""

import colorsys

import numpy as np

from data.scenes.renderer import KINDS, Body

HUES = ((15, "red"), (45, "orange"), (70, "yellow"), (160, "green"), (200, "cyan"), (260, "blue"))
HUES += ((300, "purple"), (345, "pink"), (361, "red"))  # up to so many degrees
GREYS = ((0.35, "dark"), (0.65, "grey"), (2.0, "pale"))  # up to such a brightness
FAINT = 0.12  # a smaller difference of red, green and blue is no colour
EDGE = 0.4  # nearer to a side than this share of the image is "left", "top", ...


def say_scene(bodies: list[Body]) -> list[str]:
    """Four captions, the main object first in each; the last one names the others too."""
    main, *others = bodies
    name = KINDS[main.label].name
    where = f"{_article(_colours(main))} {_colours(main)} {name} {_place(main)}"
    rest = "".join(f" and a {KINDS[body.label].name} {_place(body)}" for body in others)
    return [f"a {name}", f"a picture of a {name}", where, f"a {name}{rest or ' alone'}"]


def _colours(body: Body) -> str:
    """Of the two tones of the texture, each the mean of the two colours between which it drifts."""
    constant, drift, tone, both = np.asarray(body.palette, dtype=np.float64).T
    first, second = constant + drift / 2, constant + tone + (drift + both) / 2
    names = list(dict.fromkeys([_colour(first), _colour(second)]))
    return " and ".join(names)


def _colour(rgb: np.ndarray) -> str:
    rgb = np.clip(rgb, 0, 1)
    if np.ptp(rgb) < FAINT:
        return next(name for limit, name in GREYS if rgb.mean() < limit)
    degrees = 360 * colorsys.rgb_to_hsv(*rgb)[0]
    return next(name for limit, name in HUES if degrees < limit)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _place(body: Body) -> str:
    down = "top" if body.y < EDGE else "bottom" if body.y > 1 - EDGE else ""
    across = "left" if body.x < EDGE else "right" if body.x > 1 - EDGE else ""
    if down and across:
        return f"in the {down} {across}"
    if across:
        return f"on the {across}"
    return f"at the {down}" if down else "in the middle"
