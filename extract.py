"""Features of a data set to .npy files, with an index in .csv: for clustering, retrieval, or a classifier of one's own.

    python extract.py --model random:vit_nano --data "scenes?split=val&size=200" --output features
    python extract.py --model runs/quickstart --data /my/images --features cls patches --dtype float16 --output features

Row i of every array in DIR is line i of DIR/index.csv (row, name, label, class):

    cls.npy      (n, D)     the CLS token after the final norm, not L2-normalised
    mean.npy     (n, D)     mean of the patch tokens
    patches.npy  (n, N, D)  all patch tokens, row by row over the grid (h, w) that the JSON line names

Images are resized, cropped and normalised as the model's own preprocessing says. What cannot be read has no row and is
listed in DIR/bad_images.txt. Arrays are written as they come and never held in memory; read them so too:
numpy.load("features/patches.npy", mmap_mode="r").
"""

import csv
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.loader import EvalDataset, default_workers
from data.pictures import UnreadableImage
from data.sources.specs import ImageData, open_data
from engine.cli import evaluation_parser, preparation, print_result, run_script
from engine.distributed import choose_device
from engine.logger import notice
from errors import UserError
from models.features import Features
from models.weights.load import load_backbone

KINDS = {
    "cls": lambda features: features.cls,
    "mean": lambda features: features.patches.mean(dim=1),
    "patches": lambda features: features.patches,
}


def main(argv: list[str] | None = None) -> None:
    parser = evaluation_parser(__doc__)
    parser.add_argument(
        "--data", required=True, help="DATA; labels are written down where there are any"
    )
    parser.add_argument(
        "--features", nargs="+", choices=KINDS, default=["cls"], help="by default cls"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the arrays"
    )
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        raise UserError("--output is missing; name the folder for the arrays and their index")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be at least 1")

    began = time.perf_counter()
    device = choose_device(arguments.device)
    backbone = load_backbone(arguments.model).to(device)
    data = open_data(arguments.data, backbone.in_channels)
    items = Readable(
        EvalDataset(data, **preparation(backbone.preprocessing, arguments.resize, arguments.size))
    )
    workers = default_workers(device.type) if arguments.workers is None else arguments.workers
    loader = DataLoader(items, arguments.batch_size, num_workers=workers, collate_fn=collate)
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder, kinds = arguments.output, dict.fromkeys(arguments.features)
    writers = {kind: Writer(folder / f"{kind}.npy", len(data), arguments.dtype) for kind in kinds}
    rows, bad, grid = [], [], None
    with torch.inference_mode():
        for images, indices, unreadable in tqdm(
            loader, desc="features", unit="batch", disable=not sys.stderr.isatty()
        ):
            bad += unreadable
            if indices:
                features: Features = backbone(images.to(device))
                grid = features.grid
                rows += indices
                check_space(arguments.output, writers, features, len(data))
                for kind, writer in writers.items():
                    writer.append(KINDS[kind](features))
    if not rows:
        raise UserError(
            f"none of the {len(data)} images of {arguments.data} could be read; one of them: {bad[0]}"
        )
    shapes = {kind: writer.close() for kind, writer in writers.items()}
    write_index(arguments.output, data, rows, bad)
    result = {"task": "extract", "model": arguments.model, "data": arguments.data, "n": len(rows)}
    result |= {
        "unreadable": len(bad),
        "features": shapes,
        "grid": list(grid),
        "dtype": arguments.dtype,
    }
    print_result(result | {"seconds": round(time.perf_counter() - began, 1)}, arguments.output)


class Readable(Dataset):
    """Items of an `EvalDataset`; in place of one that cannot be read, the reason."""

    def __init__(self, items: EvalDataset):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, _, index = self.items[index]
            return image, index
        except UnreadableImage as error:
            return str(error)


def collate(items: list) -> tuple[Tensor | None, list[int], list[str]]:
    """Images (B, C, H, W) that could be read, their indices in the data, and the reasons of the others."""
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, [index for _, index in good], [item for item in items if isinstance(item, str)]


class Writer:
    """An array in a .npy file, filled from the front; it has its name only when it is whole."""

    def __init__(self, path: Path, most: int, dtype: str):
        self.path, self.most, self.dtype = path, most, dtype
        self.unfinished = path.with_suffix(".part")
        self.array, self.filled = None, 0

    def append(self, values: Tensor) -> None:
        """values: (B, ...), the same shape each time but for B.

        Raises:
            UserError: if they are not finite, in the type of the file.
        """
        with np.errstate(over="ignore"):  # said below
            values = values.float().cpu().numpy().astype(self.dtype)
        if not np.isfinite(values).all():
            name = self.path.stem
            raise UserError(
                f"{name} features are not finite in {self.dtype}; check the model, or take float32"
            )
        if self.array is None:
            self.array = open_memmap(
                self.unfinished, "w+", self.dtype, (self.most, *values.shape[1:])
            )
        self.array[self.filled : self.filled + len(values)] = values
        self.filled += len(values)

    def close(self) -> list[int]:
        """Leaves the file with the rows that were filled, and says its shape."""
        self.array.flush()
        if self.filled < self.most:  # a .npy file cannot be cut in place: its head tells the shape
            whole, shorter = self.array, self.path.with_suffix(".short")
            self.array = open_memmap(shorter, "w+", self.dtype, (self.filled, *whole.shape[1:]))
            self.array[:] = whole[: self.filled]
            self.array.flush()
            os.replace(shorter, self.unfinished)
        os.replace(self.unfinished, self.path)
        return list(self.array.shape)


def check_space(folder: Path, writers: dict[str, Writer], features: Features, images: int) -> None:
    """Before the first row is written, says how large the files will be; ValueError where they do not fit."""
    if any(writer.array is not None for writer in writers.values()):
        return
    numbers = sum(math.prod(KINDS[kind](features).shape[1:]) for kind in writers)
    size = numbers * images * np.dtype(next(iter(writers.values())).dtype).itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{size / 1e9:.1f} GB of features do not fit into {folder}, where {free / 1e9:.1f} GB are free; "
            "--dtype float16 halves them, size=N in --data takes fewer images"
        )
    notice(f"{images} images, {size / 1e6:.1f} MB of features")


def write_index(folder: Path, data: ImageData, rows: list[int], bad: list[str]) -> None:
    """index.csv, a line an image that has a row, and bad_images.txt, a line an image that has none."""
    with (folder / "index.csv").open(
        "w", newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        writer = csv.writer(file)
        writer.writerow(["row", "name", "label", "class"])
        for row, index in enumerate(rows):
            label = -1 if data.labels is None else int(data.labels[index])
            name = "" if label < 0 else str(label) if data.classes is None else data.classes[label]
            writer.writerow([row, data.name(index), label, name])
    listed = folder / "bad_images.txt"
    listed.unlink(missing_ok=True)  # of an earlier call
    if bad:
        notice(f"{len(bad)} images could not be read; {listed} names them")
        listed.write_text(
            "".join(f"{line}\n" for line in bad), encoding="utf-8", errors="surrogateescape"
        )


if __name__ == "__main__":
    run_script(main)
