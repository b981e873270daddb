"""preprocessor_config.json: how images are prepared, as transformers' image processors say it."""

import sys
from collections.abc import Mapping
from typing import Any

from errors import UserError
from models.features import Preprocessing, read_interpolation

# Filters by PIL's numbers.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def read_preprocessing(values: Mapping[str, Any], source: str) -> Preprocessing:
    """From the values of a preprocessor_config.json, in any of its layouts.

    With `size: {height, width}` transformers squeezes images into that size. We resize the short
    side and crop, which distorts no image, and say so.

    Raises UserError if a value is missing or not understood; `source` is the file's name in it.
    """
    values = values.get("image_processor", values)
    names = {number: name for name, number in RESAMPLE.items()}
    try:
        size = crop = _height_width(values.get("size", 224))
        if values.get("do_center_crop") and "crop_size" in values:
            crop = _height_width(values["crop_size"])
        elif isinstance(values.get("size"), dict) and "height" in values["size"]:
            print(
                f"{source}: transformers squeezes images into {size[0]} x {size[1]} pixels; here "
                "their short side is resized and the centre cropped",
                file=sys.stderr,
            )
        rescaled = values.get("do_rescale", True)
        scale = 1 / values.get("rescale_factor", 1 / 255) if rescaled else 1.0
        normalize = values.get("do_normalize", True)
        mean = values["image_mean"] if normalize else (0.0,)
        std = values["image_std"] if normalize else (1.0,)
        return Preprocessing(
            size=crop,
            resize=min(size) if values.get("do_resize", True) else min(crop),
            mean=tuple(map(float, mean)),
            std=tuple(map(float, std)),
            interpolation=read_interpolation(names[values.get("resample", 3)], source),
            scale=float(round(scale, 6)),
            window=tuple(values["window"]) if values.get("window") else None,
            span=tuple(map(tuple, values["span"])) if values.get("span") else None,
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{source} is no image processor that we know: {error!r}") from error


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


def write_preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    """A BitImageProcessor: resize the short side, centre crop, rescale, normalise."""
    height, width = preprocessing.size
    # It would make RGB of whatever it is given.
    as_they_are: dict[str, Any] = {}
    if len(preprocessing.mean) != 3:
        as_they_are["do_convert_rgb"] = False
    if preprocessing.window:  # for our readers; transformers has no such step
        as_they_are["window"] = list(preprocessing.window)
    if preprocessing.span:  # likewise
        as_they_are["span"] = [list(pair) for pair in preprocessing.span]
    return as_they_are | {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / preprocessing.scale,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
