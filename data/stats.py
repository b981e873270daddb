"""Mean, standard deviation, range and type of a data set, channel by channel.

    python -m data.stats scenes?size=200
    python -m data.stats "tar:/data/shard-{0000..0127}.tar" --images 2000

Give the mean and the deviation to a run as data.mean and data.std. They are of values in [0, 1], as
the run takes them: 8 and 16 bits divided by their largest value, windowed values between the ends
of the window. The range is that of the values as read. Every image weighs the same.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from data.pixels import to_unit
from data.sources.specs import ImageData, UnreadableImage, open_data
from errors import UserError


class ImageStats(Dataset):
    """Item i is (mean, mean square, lowest, highest, type, (H, W)) of image i, the first four (C,);
    or the reason why it cannot be read."""

    def __init__(self, data: ImageData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple | str:
        try:
            image = self.data.image(index)
        except UnreadableImage as error:
            return str(error)
        values = to_unit(image).double().flatten(1)
        stored = image.flatten(1) if image.is_floating_point() else image.flatten(1).to(torch.int32)
        kind = str(image.dtype).removeprefix("torch.")
        moments = (values.mean(1), values.square().mean(1), stored.amin(1), stored.amax(1))
        return *(part.tolist() for part in moments), kind, tuple(image.shape[-2:])


def collect(data: ImageData, images: int = 10_000, workers: int = 0) -> dict:
    """Statistics of up to so many images, drawn evenly at random with a fixed seed.

    Returns:
        `mean` and `std` of values in [0, 1], `min` and `max` as stored, `dtype` and `channels`,
        the numbers of `images` that were read and `bad` ones, and the smallest and the largest
        `height` and `width`.

    Raises:
        UserError: if no image can be read, or they differ in their number of channels.
    """
    chosen = range(len(data))
    if len(data) > images:
        chosen = np.random.default_rng(0).permutation(len(data))[:images]
    loader = DataLoader(Subset(ImageStats(data), chosen), batch_size=None, num_workers=workers)
    rows, bad = [], []
    for number, item in enumerate(loader, 1):
        (bad if isinstance(item, str) else rows).append(item)
        if number % 1000 == 0:
            print(f"{number} of {len(chosen)} images", file=sys.stderr)
    if not rows:
        raise UserError(f"none of {len(bad)} images can be read; the first: {bad[0]}")
    counts = sorted({len(row[0]) for row in rows})
    if len(counts) > 1:
        raise UserError(
            f"images have {' and '.join(map(str, counts))} channels; "
            "--channels brings them to one number"
        )
    mean, square, low, high = (np.array([row[k] for row in rows]) for k in range(4))
    kinds = [row[4] for row in rows]
    sizes = np.array([row[5] for row in rows])
    return {
        "images": len(rows),
        "bad": len(bad),
        "first_bad": bad[0] if bad else None,
        "channels": counts[0],
        "dtype": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "height": [int(sizes[:, 0].min()), int(sizes[:, 0].max())],
        "width": [int(sizes[:, 1].min()), int(sizes[:, 1].max())],
        "mean": mean.mean(0).round(6).tolist(),
        "std": np.sqrt(np.maximum(square.mean(0) - mean.mean(0) ** 2, 0)).round(6).tolist(),
        "min": low.min(0).tolist(),
        "max": high.max(0).tolist(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a DATA spec")
    parser.add_argument(
        "--channels", type=int, help="bring every image to so many; by default as stored"
    )
    parser.add_argument(
        "--images", type=int, default=10_000, help="at most so many, drawn at random"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    if arguments.images < 1:
        raise UserError(f"--images is {arguments.images}; it must be at least 1")
    data = open_data(arguments.data, arguments.channels)
    for line in data.passed_over:
        print(line, file=sys.stderr)
    stats = collect(data, arguments.images, arguments.workers)
    print(f"{'channel':>7} {'mean':>9} {'std':>9} {'min':>9} {'max':>9}", file=sys.stderr)
    columns = (stats["mean"], stats["std"], stats["min"], stats["max"])
    for channel, (mean, std, low, high) in enumerate(zip(*columns, strict=True)):
        print(f"{channel:>7} {mean:>9.5f} {std:>9.5f} {low:>9g} {high:>9g}", file=sys.stderr)
    settings = []
    for name in ("channels", "mean", "std"):
        settings.append(f"data.{name}={json.dumps(stats[name], separators=(',', ':'))}")
    print(" ".join(settings), file=sys.stderr)
    seconds = round(time.perf_counter() - start, 2)
    result = {"task": "stats", "data": arguments.data, **stats, "seconds": seconds}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # a user's mistake: one sentence, exit 2
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
