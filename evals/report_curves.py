"""Curves of report.html: small SVG pictures, and the numbers that its script shows on a hover."""

from html import escape
from typing import Any

import numpy as np

from evals.curves import curve_names
from evals.figures import COLOURS

POINTS, ALL_POINTS = 400, 2000  # at most: of a curve, of all curves of a picture
PLOT = LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 48, 288, 8, 130, 300, 150  # of a picture

Curve = tuple[list[int], list[float]]  # steps and values


def swatch(number: int) -> str:
    """A dot in the colour of a run."""
    return f'<i style="background:{COLOURS[number % len(COLOURS)]}"></i>'


def curve_pictures(runs: dict[str, list[dict]]) -> tuple[str, list[dict[str, Curve]]]:
    """HTML of a picture for each field, runs over each other, and the curves of each picture.

    Args:
        runs: name -> records of metrics.jsonl. Fields that are missing or null are skipped.
    """
    points = max(20, min(POINTS, ALL_POINTS // len(runs)))
    last = max([1, *(record["step"] for records in runs.values() for record in records)])
    pictures, curves = [], []
    for name in curve_names(runs):
        field = {run: thinned(records, name, points) for run, records in runs.items()}
        pictures.append(picture(name, list(field.values()), last, len(curves)))
        curves.append(field)
    return "".join(pictures), curves


def thinned(records: list[dict], name: str, points: int) -> Curve:
    """About so many of the measured points at most: of each span its lowest and its highest."""
    known = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    if len(known) > points:
        values = np.array([value for _, value in known])
        spans = np.array_split(np.arange(len(known)), points // 2)
        ends = {int(span[find(values[span])]) for span in spans for find in (np.argmin, np.argmax)}
        known = [known[i] for i in sorted({0, *ends, len(known) - 1})]
    return [step for step, _ in known], [float(f"{value:.5g}") for _, value in known]


def place(values: Any, low: float, high: float, first: float, last: float) -> np.ndarray:
    """Where values lie on an axis that goes from `low` at `first` to `high` at `last`."""
    return first + (np.array(values) - low) / (high - low) * (last - first)


def picture(name: str, curves: list[Curve], last: int, number: int) -> str:
    """The curves of one field; each run has its colour."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    values = [value for _, of_run in curves for value in of_run]
    rim = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    low, high = min(values) - rim, max(values) + rim
    ticks, parts = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]), []
    for tick in ticks.tick_values(low, high):
        if low <= tick <= high:
            y = place(tick, low, high, BOTTOM, TOP)
            line = f'<path d="M{LEFT} {y:.1f}H{RIGHT}"/>'
            parts.append(f'{line}<text x="{LEFT - 5}" y="{y + 3:.1f}">{tick:.6g}</text>')
    for step in ticks.tick_values(0, last):
        if step <= last:
            x, label = place(step, 0, last, LEFT, RIGHT), EngFormatter(sep="")(step)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" class=x>{label}</text>')
    for k, (steps, of_run) in enumerate(curves):
        xs, ys = place(steps, 0, last, LEFT, RIGHT), place(of_run, low, high, BOTTOM, TOP)
        places = list(zip(xs, ys, strict=True))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places]
        few = "".join(dots) if len(dots) == 1 or name.startswith("probe/") else ""
        colour = COLOURS[k % len(COLOURS)]
        parts.append(f'<g color="{colour}"><polyline points="{points}"/>{few}</g>')
    title = escape(name.replace("_", " ").replace("/", ": "))
    return (
        f"<figure><figcaption>{title}</figcaption><svg class=curve role=img "
        f'aria-label="{title}" viewBox="0 0 {WIDTH} {HEIGHT}" data-curve="{number}" '
        f'data-last="{last}">{"".join(parts)}</svg></figure>'
    )
