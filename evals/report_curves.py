"""Curves of report.html: small SVG pictures, and the numbers that its script shows on a hover."""

from html import escape

import numpy as np

from evals.curves import curve_names
from evals.figures import COLOURS

POINTS = 400  # of a curve, at most
ALL_POINTS = 2000  # of the curves of all runs in one picture
WIDTH, HEIGHT = 300, 150
LEFT, RIGHT, TOP, BOTTOM = 48, 292, 8, 130  # edges of the plot; report_page.html reads them

Curve = tuple[list[int], list[float]]  # steps and values


def curve_section(runs: dict[str, list[dict]]) -> tuple[str, list[dict[str, Curve]]]:
    """HTML of a small picture for each field, runs over each other, and the curves of each picture.

    Args:
        runs: name -> records of metrics.jsonl. Fields that are missing or null are skipped.
    """
    points = max(20, min(POINTS, ALL_POINTS // len(runs)))
    last = max([1, *(record["step"] for records in runs.values() for record in records)])
    pictures, curves = [], []
    for name in curve_names(runs):
        field = {run: thinned(records, name, points) for run, records in runs.items()}
        field = {run: curve for run, curve in field.items() if curve[0]}
        colours = {run: colour(k) for k, run in enumerate(runs)}
        pictures.append(picture(name, field, colours, last, len(curves)))
        curves.append(field)
    names = [f"{swatch(k)}{escape(run)} " for k, run in enumerate(runs)] if len(runs) > 1 else []
    legend = f"<p>{' '.join(names)}</p>" if names else ""
    return (f"{legend}<div class=curves>{''.join(pictures)}</div>" if pictures else ""), curves


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def swatch(number: int) -> str:
    """A dot in the colour of a run."""
    return f'<span class=swatch style="background:{colour(number)}"></span>'


def thinned(records: list[dict], name: str, points: int) -> Curve:
    """At most about so many of the measured points: spans keep their lowest and highest value."""
    known = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    values = np.array([value for _, value in known], dtype=float)
    chosen = range(len(known))
    if len(known) > points:
        spans = np.array_split(np.arange(len(known)), points // 2 - 1)
        ends = [int(span[find(values[span])]) for span in spans for find in (np.argmin, np.argmax)]
        chosen = sorted({0, *ends, len(known) - 1})
    return [known[i][0] for i in chosen], [float(f"{values[i]:.5g}") for i in chosen]


def picture(
    name: str, field: dict[str, Curve], colours: dict[str, str], last: int, number: int
) -> str:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    values = [value for _, curve in field.values() for value in curve]
    low, high = min(values), max(values)
    rim = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - rim, high + rim
    locator, short = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]), EngFormatter(sep="")
    parts = []
    for tick in locator.tick_values(low, high):
        if low <= tick <= high:
            y = BOTTOM - (tick - low) / (high - low) * (BOTTOM - TOP)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" class=y>{tick:.6g}</text>')
    for step in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True).tick_values(0, last):
        if step <= last:
            x = LEFT + step / last * (RIGHT - LEFT)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" class=x>{short(step)}</text>')
    for run, (steps, of_run) in field.items():
        xs = LEFT + np.array(steps) / last * (RIGHT - LEFT)
        ys = BOTTOM - (np.array(of_run) - low) / (high - low) * (BOTTOM - TOP)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        if len(steps) == 1 or name.startswith("probe/"):
            dots = (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in zip(xs, ys, strict=True)
            )
            parts.append(f'<g fill="{colours[run]}">{"".join(dots)}</g>')
        parts.append(f'<polyline stroke="{colours[run]}" points="{line}"/>')
    title = escape(name.replace("_", " ").replace("/", ": "))
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg class=curve role=img aria-label="{title}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'data-curve="{number}" data-last="{last}">{"".join(parts)}</svg></figure>'
    )
