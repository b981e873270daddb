"""JPEG files that cost as much to read as photographs do, for measurements without a data set.

python docs/experiments/photographs.py FOLDER 2000
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image


def write_photographs(folder: Path, count: int) -> None:
    """Sixteen folders ("classes") of JPEG files."""
    for name in range(16):
        (folder / f"{name:02d}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_photograph, range(count), [folder] * count, chunksize=8))


def write_photograph(seed: int, folder: Path, width: int = 500, height: int = 375) -> None:
    """Noise of all scales, coarse strongest, as in photographs; about 100 kB."""
    numbers = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    side, weight = 4, 1.0
    while side <= 512:
        cells = Image.fromarray(numbers.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += weight * np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC))
        side, weight = 2 * side, 0.8 * weight
    total -= total.min()
    image = Image.fromarray((total * (255 / total.max())).astype(np.uint8))
    image.save(folder / f"{seed % 16:02d}" / f"{seed}.jpg", quality=95)


if __name__ == "__main__":
    write_photographs(Path(sys.argv[1]), int(sys.argv[2]))
