"""Curves of report.html: small SVG pictures, and the numbers with which its script answers a hover.
"""

from html import escape

import numpy as np

from evals.curves import curve_names
from evals.figures import COLOURS

POINTS = 400  # of a curve, at most; fewer where there are many runs
WIDTH, HEIGHT = 300, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 294, 8, 130  # edges of the plot

_numbers: dict = {}


def curve_section(runs: dict[str, list[dict]]) -> tuple[str, list]:
    """HTML of one small picture a field, runs over each other, and [{run: [steps, values]}, ...].

    Args:
        runs: name -> records of metrics.jsonl. Fields that are missing or null are skipped.
    """
    raise NotImplementedError


def swatch(run: str) -> str:
    raise NotImplementedError
