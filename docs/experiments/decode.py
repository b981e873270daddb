"""Crops of large JPEG files, decoded whole and no finer than needed (docs/performance.md).

    python docs/experiments/decode.py SHARED

Mosaics of the photographs in SHARED/images, as JPEG files of 12 megapixels and of the size of
ImageNet's, become the multi-crop views of vits.yaml's sizes: two of 224 pixels, eight of 96. Both
ways take turns, batch by batch, in one process with one thread; the result is the median of the
ratios, and how far the crops differ.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.augment import POLICIES, CropSpec, MultiCrop
from data.loader import StepDataset, Views
from data.sources.specs import open_data

SIZES = {"12 megapixels": (3000, 4000), "ImageNet": (375, 500)}
FILES, BATCH, STEPS = 8, 8, 21
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("shared", type=Path)
    shared = flags.parse_args().shared
    torch.set_num_threads(1)
    photographs = [Image.open(shared / "images" / name).convert("RGB") for name in PHOTOGRAPHS]
    for title, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            for number in range(FILES):
                mosaic(photographs, size, number).save(f"{folder}/{number}.jpg", quality=90)
            print(json.dumps({"files": title, **compare(folder)}), flush=True)


def mosaic(photographs: list[Image.Image], size: tuple[int, int], seed: int) -> Image.Image:
    """Photographs as they are, side by side until (height, width) is full."""
    random = np.random.default_rng(seed)
    whole = Image.new("RGB", size[::-1])
    for top in range(0, size[0], 300):
        for left in range(0, size[1], 300):
            photograph = photographs[random.integers(len(photographs))]
            x, y = (int(random.integers(side - 299)) for side in photograph.size)
            whole.paste(photograph.crop((x, y, x + 300, y + 300)), (left, top))
    return whole


def compare(folder: str) -> dict:
    crops = MultiCrop(
        CropSpec((224, 224), (0.32, 1.0), 2),
        CropSpec((96, 96), (0.05, 0.32), 8),
        POLICIES["crops_only"],
        (0.0,),
        (1.0,),
    )
    data = open_data(folder, 3)
    ways = [
        StepDataset(data, [Views(crops)], batch_size=BATCH, seed=0, scaled_jpeg=scaled)
        for scaled in (False, True)
    ]
    seconds, differences = [], []
    for step in range(STEPS):
        both, pair = [None, None], [0.0, 0.0]
        for way in (0, 1) if step % 2 else (1, 0):
            began = time.perf_counter()
            both[way] = ways[way][step]
            pair[way] = time.perf_counter() - began
        seconds.append(pair)
        whole, scaled = both
        for name in ("global_crops", "local_crops"):
            differences.append((getattr(whole, name) - getattr(scaled, name)).abs().mean().item())
    rates = [BATCH / statistics.median(one) for one in zip(*seconds[1:], strict=True)]
    return {
        "images_per_second": [round(rate, 2) for rate in rates],
        "ratio": round(statistics.median(a / b for a, b in seconds[1:]), 2),
        "mean_difference": round(statistics.mean(differences), 4),
    }


if __name__ == "__main__":
    main()
