"""Curves of runs over their steps, as PNG files."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from evals.figures import COLOURS

CURVES = (
    "loss", "loss/", "probe/", "health/", "grad_norm",
    "lr", "weight_decay", "ema_momentum", "teacher_temp", "images_per_second",
)  # fmt: skip
NOISY = ("loss", "health/", "grad_norm", "images_per_second")  # drawn with a running mean
STYLE = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "legend.frameon": False,
}


def draw_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Losses, probes, health, schedules and speed over steps, a small panel each, runs overlaid.

    Args:
        runs: name -> records of its metrics.jsonl. Fields that are missing or null are skipped.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = curve_names(runs) or ["loss"]
    last_step = max([1, *(record["step"] for records in runs.values() for record in records)])
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with matplotlib.rc_context(STYLE):
        width, height = 0.7 + 2.5 * columns, 0.9 + 1.7 * rows  # inches
        figure = Figure((width, height), dpi=160)
        # Places are given: finding them takes as long as drawing.
        edges = 0.6 / width, 0.45 / height, 1 - 0.15 / width, 1 - 0.6 / height
        figure.subplots_adjust(*edges, wspace=0.28, hspace=0.42)
        for number, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, number + 1)
            _draw_panel(axes, name, runs)
            axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
            if number + columns >= len(names):
                axes.set_xlabel("step", color="#555555")
        lines, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="upper left", ncols=max(1, 2 * columns - 2))
        figure.savefig(path, format="png")


def curve_names(runs: dict[str, list[dict]]) -> list[str]:
    """The fields that any run has numbers of, in the order of CURVES."""
    records = [record for run in runs.values() for record in run]
    found = dict.fromkeys(key for record in records for key in record if record[key] is not None)
    kinds = {key: key.partition("/")[0] + "/" if "/" in key else key for key in found}
    return [key for kind in CURVES for key in found if kinds[key] == kind]


def _draw_panel(axes: Any, name: str, runs: dict[str, list[dict]]) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes.set_title(name.replace("_", " ").replace("/", ": "), loc="left", fontsize=8.5)
    for number, (run, records) in enumerate(runs.items()):
        known = [record for record in records if record.get(name) is not None]
        steps, values = (np.array([record[key] for record in known]) for key in ("step", name))
        line = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.2}
        line["linestyle"] = ("-", "--", ":")[number // len(COLOURS) % 3]
        if len(values) <= 1 or name.startswith("probe/"):
            line |= {"marker": "o", "markersize": 2.5}
        if len(values) >= 100 and name.startswith(NOISY):
            axes.plot(steps, values, **line | {"linewidth": 0.5, "alpha": 0.3})
            values = running_mean(values, len(values) // 50 + 1)
        axes.plot(steps, values, label=run, **line)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of up to `window` values on either side; fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - window, 0), np.minimum(centre + window + 1, len(values))
    return (total[last] - total[first]) / (last - first)
