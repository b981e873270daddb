"""How images must be prepared, as each dialect writes it beside the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from models.features import Preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# DINOv3's satellite models (SAT-493M).
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers


def from_hugging_face(values: Mapping[str, Any], source: str) -> Preprocessing:
    """From the values of a preprocessor_config.json, in any of its layouts.

    With `size: {height, width}` transformers squeezes images into that size; we resize the short side and crop, which is the
    same for images of that aspect and does not distort the others.

    Raises:
        UserError: if a value is missing or not understood.
    """
    values = values.get("image_processor", values)
    try:
        size = _height_width(values.get("size", 224))
        crop = (
            _height_width(values["crop_size"])
            if values.get("do_center_crop") and "crop_size" in values
            else size
        )
        names = {number: name for name, number in RESAMPLE.items()}
        return Preprocessing(
            size=crop,
            resize=min(size) if values.get("do_resize", True) else min(crop),
            mean=_per_channel(values["image_mean"] if values.get("do_normalize", True) else (0.0,)),
            std=_per_channel(values["image_std"] if values.get("do_normalize", True) else (1.0,)),
            interpolation=names[values.get("resample", RESAMPLE["bicubic"])],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is no image processor that we know: {error!r}") from error


def to_hugging_face(preprocessing: Preprocessing) -> dict[str, Any]:
    """A BitImageProcessor: resize the short side, centre crop, rescale, normalise."""
    height, width = preprocessing.size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def from_timm(values: Mapping[str, Any], source: str) -> Preprocessing:
    """From a `pretrained_cfg`.

    Raises:
        UserError: if a value is not understood.
    """
    try:
        height, width = values.get("input_size", (3, 224, 224))[-2:]
        resize = int(
            max(height, width) / values.get("crop_pct", 0.875) + 1e-6
        )  # rounded down, as timm does
        mean, std = values.get("mean", IMAGENET_MEAN), values.get("std", IMAGENET_STD)
        interpolation = values.get("interpolation", "bicubic")
        if interpolation not in RESAMPLE:
            raise UserError(
                f"{source} asks for interpolation {interpolation!r}; allowed are {', '.join(RESAMPLE)}"
            )
        return Preprocessing(
            (height, width), resize, _per_channel(mean), _per_channel(std), interpolation
        )
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{source} has a pretrained_cfg that we do not understand: {error}"
        ) from error


def to_timm(preprocessing: Preprocessing) -> dict[str, Any]:
    height, width = preprocessing.size
    return {
        "input_size": [len(preprocessing.mean), height, width],
        "crop_pct": max(height, width) / preprocessing.resize,
        "crop_mode": "center",
        "interpolation": preprocessing.interpolation,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


def as_published(path: Path, learned_positions: bool, in_channels: int = 3) -> Preprocessing:
    """For files that say nothing: Meta's evaluation (DINO, DINOv2: 256 then crop 224; DINOv3: 256) with the statistics of
    ImageNet, or those of SAT-493M where `path` names it. Other channel counts than 3 get the average of those."""
    satellite = "sat493m" in path.name.lower()
    mean, std = (SATELLITE_MEAN, SATELLITE_STD) if satellite else (IMAGENET_MEAN, IMAGENET_STD)
    if in_channels != 3:
        mean, std = ((sum(values) / 3,) * in_channels for values in (mean, std))
    side = 224 if learned_positions else 256
    return Preprocessing((side, side), 256, mean, std)


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


def _per_channel(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
