"""Mean, standard deviation, range, percentiles and type of a data set, channel by channel.

    python -m data.stats scenes?size=200
    python -m data.stats "tar:/data/shard-{0000..0127}.tar" --images 2000

Give the mean and the deviation to a run as data.mean and data.std. They are of values in [0, 1], as
the run takes them: 8 and 16 bits divided by their largest value, values between the ends of the
window or scale. Range and percentiles are of the values as read, those of `tile:` before scale=.
Every image weighs the same. Nodata is left out. The unit and the scale are guesses: look at them.
"""

import argparse
import json
import math
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from data.sources.specs import ImageData, UnreadableImage, open_data
from errors import UserError

PERCENTILES = (1, 2, 50, 98, 99)
SAMPLES = 2_000_000  # values of each band that percentiles are of


class ImageStats(Dataset):
    """Item i is (mean, mean square, lowest, highest, share of nodata, `samples` values or fewer,
    type, (H, W)) of image i, all (C,) up to the samples (C, s); or the reason why it cannot be
    read. What is of nodata alone, or of an unknown range, is NaN."""

    def __init__(self, data: ImageData, samples: int):
        self.data, self.samples = data, samples

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple | str:
        try:
            stored, kind, unit = self.data.measured(index)
        except UnreadableImage as error:
            return str(error)
        unit = torch.full_like(stored, math.nan) if unit is None else unit
        flat, unit = stored.flatten(1), unit.flatten(1)
        empty, lowest = flat.isnan(), flat.nan_to_num(math.inf).amin(1)
        moments = [unit.nanmean(1), unit.square().nanmean(1)]
        moments += [lowest, flat.nan_to_num(-math.inf).amax(1), empty.double().mean(1)]
        samples = torch.full((len(flat), self.samples), math.nan)
        for row, of_band, missing in zip(samples, flat, empty, strict=True):
            known = of_band[~missing]
            known = known[:: max(1, math.ceil(len(known) / self.samples))]
            row[: len(known)] = known
        return *(part.tolist() for part in moments), samples, kind, tuple(stored.shape[-2:])


def collect(data: ImageData, images: int = 10_000, workers: int = 0) -> dict:
    """Statistics of up to so many images, drawn evenly at random with a fixed seed.

    Returns:
        `mean` and `std` of values in [0, 1], None where no range is known; `min`, `max` and
        `percentiles` as stored, the shares of `nodata` and of values at the maximum (`saturated`),
        `dtype` and `channels`, what `guess_unit` says, the numbers of `images` that were read and
        `bad` ones, and the smallest and the largest `height` and `width`.

    Raises:
        UserError: if no image can be read, or they differ in their number of channels.
    """
    chosen = range(len(data))
    if len(data) > images:
        chosen = np.random.default_rng(0).permutation(len(data))[:images]
    samples = math.ceil(SAMPLES / len(chosen))
    loader = DataLoader(
        Subset(ImageStats(data, samples), chosen), batch_size=None, num_workers=workers
    )
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
    kinds = [row[6] for row in rows]
    sizes = np.array([row[7] for row in rows])
    return {
        "images": len(rows),
        "bad": len(bad),
        "first_bad": bad[0] if bad else None,
        "channels": counts[0],
        "dtype": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "height": [int(sizes[:, 0].min()), int(sizes[:, 0].max())],
        "width": [int(sizes[:, 1].min()), int(sizes[:, 1].max())],
        **_of_bands(rows, kinds[0]),
    }


def _of_bands(rows: list[tuple], kind: str) -> dict:
    """The values that `collect` gives for each band, of items of `ImageStats`."""
    mean, square, low, high, empty = (np.array([row[k] for row in rows]) for k in range(5))
    low, high = low.min(0), high.max(0)
    moments = dict.fromkeys(("mean", "std"))
    if not (np.isnan(mean) & (empty < 1)).any():  # else values of an unknown range
        count = (empty < 1).sum(0).clip(min=1)
        mean, square = np.nansum(mean, 0) / count, np.nansum(square, 0) / count
        std = np.sqrt(np.maximum(square - mean**2, 0))
        moments = {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}
    values = torch.cat([row[5] for row in rows], dim=1).numpy()
    cuts = np.nanpercentile(values, PERCENTILES, axis=1)
    known = (~np.isnan(values)).sum(1).clip(min=1)
    saturated = (values == high.astype(np.float32)[:, None]).sum(1) / known
    return moments | {
        "min": low.tolist(),
        "max": high.tolist(),
        "percentiles": dict(zip(map(str, PERCENTILES), cuts.round(6).tolist(), strict=True)),
        "nodata": empty.mean(0).round(6).tolist(),
        "saturated": saturated.round(6).tolist(),
        **guess_unit(kind, float(low.min()), float(high.max()), float(cuts[-1].max())),
    }


def guess_unit(kind: str, low: float, high: float, most: float) -> dict[str, str | None]:
    """What values from `low` to `high` of a type may be, `most` being their 99th percentile, and
    `scale=` of `tile:` for them (ours)."""
    unit, scale = "unknown", "percentile(2,98)"
    if kind == "uint8":
        unit, scale = "8-bit values", None
    elif kind.startswith("float") and low >= 0 and most <= 1:
        unit, scale = "shares of 1, such as reflectance", "1"
    elif kind.startswith("float") and low >= -100 and high <= 40 and low < 0:
        unit = "decibels, as of radar"
    elif -1100 <= low <= -900:
        unit, scale = "Hounsfield units", "-160,240"
    elif low >= 0 and high <= 4095 and not kind.startswith("float"):
        unit, scale = "12-bit counts", "4095"
    elif low >= 0 and most <= 16_000:
        unit, scale = "reflectance times 10,000", "10000"
    elif kind == "uint16":
        unit, scale = "16-bit values", None
    return {"unit": unit, "scale": scale}


def say(stats: dict) -> None:
    """A table of the bands, and the settings of a run, on standard error."""
    unknown = [math.nan] * stats["channels"]
    columns = {"mean": stats["mean"] or unknown, "std": stats["std"] or unknown}
    columns |= {"min": stats["min"], "max": stats["max"]}
    columns |= {f"{p}%": values for p, values in stats["percentiles"].items()}
    columns |= {name: stats[name] for name in ("nodata", "saturated")}
    print("channel " + " ".join(f"{name:>9}" for name in columns), file=sys.stderr)
    for channel, row in enumerate(zip(*columns.values(), strict=True)):
        print(f"{channel:>7} " + " ".join(f"{value:>9.5g}" for value in row), file=sys.stderr)
    scaled = f"; of tile:, scale={stats['scale']}" if stats["scale"] else ""
    print(f"perhaps {stats['unit']}{scaled}", file=sys.stderr)
    settings = []
    for name in ("channels", "mean", "std"):
        settings.append(f"data.{name}={json.dumps(stats[name], separators=(',', ':'))}")
    print(" ".join(settings), file=sys.stderr)


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
    say(stats)
    seconds = round(time.perf_counter() - start, 2)
    result = {"task": "stats", "data": arguments.data, **stats, "seconds": seconds}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # a user's mistake: one sentence, exit 2
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
