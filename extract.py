r"""Writes features of a data set to .npy files with an index in .csv, for uses of your own.

    python extract.py --model random:vit_nano --data "scenes?split=val&size=200" --output features
    python extract.py --model runs/quickstart --data /my/images --features cls patches \
        --dtype float16 --output features

Row i of every array in DIR is line i of DIR/index.csv (row, name, label, class):

    cls.npy      (n, D)     the CLS token after the final norm, not L2-normalised
    mean.npy     (n, D)     mean of the patch tokens
    patches.npy  (n, N, D)  patch tokens, row-major over the grid (h, w) that the JSON line names

Images are resized, cropped and normalised by the model's own preprocessing. An image that cannot be
read has no row; DIR/bad_images.txt lists it. Arrays are written batch by batch and never held in
memory. Read them the same way: numpy.load("features/patches.npy", mmap_mode="r").
"""

import argparse
import contextlib
import csv
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from data.images import ImageData
from data.sources.specs import open_data
from engine import distributed
from engine.cli import evaluation_parser, run_script
from engine.logger import ESCAPES, notice, say_passed_over
from errors import UserError
from evals.frozen import FrozenModel, check_least, class_name, progress_bar, run_evaluation
from evals.reading import read_batches

KINDS = {
    "cls": lambda features: features.cls,
    "mean": lambda features: features.patches.mean(dim=1),
    "patches": lambda features: features.patches,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="DATA; its labels, if any, are written to the index")
    add("--features", nargs="+", choices=KINDS, default=["cls"], help="by default cls")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the arrays")
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        raise UserError("--output is missing; name the folder for the arrays and their index")
    check_least(arguments, 1, "batch_size")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    run_evaluation(arguments, FrozenModel, partial(extract, arguments))


def extract(arguments: argparse.Namespace, model: FrozenModel) -> dict:
    data = open_data(arguments.data, model.channels)
    say_passed_over(data)
    folder, kinds = arguments.output, dict.fromkeys(arguments.features)
    refuse_other_arrays(folder, kinds)
    with unfinished_folder(folder) as unfinished:
        writers = {
            kind: Writer(unfinished / f"{kind}.npy", len(data), arguments.dtype) for kind in kinds
        }
        rows, grid = write_features(model, data, writers, folder)
        if not distributed.is_main():
            return {}
        shapes = {kind: writer.close() for kind, writer in writers.items()}
        write_index(unfinished, data, rows, model.unreadable)
        replace_arrays(folder, unfinished)
    if model.unreadable:
        count, listed = len(model.unreadable), folder / "bad_images.txt"
        notice(f"{count} images could not be read; {listed} names them")
    result = {"task": "extract", "model": arguments.model, "data": arguments.data, "n": len(rows)}
    return result | {"features": shapes, "grid": grid, "dtype": arguments.dtype}


def refuse_other_arrays(folder: Path, kinds: Iterable[str]) -> None:
    """
    Raises:
        UserError: for arrays that no call of this script left.
    """
    there = [kind for kind in kinds if (folder / f"{kind}.npy").exists()]
    if there and not (folder / "index.csv").is_file():
        raise UserError(
            f"{folder} holds {there[0]}.npy, but no index.csv of an earlier call; give another "
            "--output"
        )


@contextlib.contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """A folder inside for files that are not whole; nothing of it stays."""
    unfinished = folder / ".unfinished"
    if distributed.is_main():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    try:
        yield unfinished
    finally:
        if distributed.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)


def replace_arrays(folder: Path, unfinished: Path) -> None:
    """Puts the new files in place of all files of an earlier call; index.csv comes last.

    So wherever index.csv stands, the arrays beside it are its own.
    """
    for name in ("index.csv", "bad_images.txt", *(f"{kind}.npy" for kind in KINDS)):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "index.csv"):
        os.replace(path, folder / path.name)


class Writer:
    """A .npy file that is filled from the front."""

    def __init__(self, path: Path, most: int, dtype: str):
        self.path, self.most, self.dtype = path, most, dtype
        self.array, self.filled = None, 0

    def append(self, values: Tensor) -> None:
        """Writes values (B, ...), whose shape is the same each time except for B.

        Raises:
            UserError: if they are not finite in the type of the file.
        """
        with np.errstate(over="ignore"):  # the next statement refuses it
            values = values.numpy().astype(self.dtype)
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.path.stem} features are not finite in {self.dtype}; "
                "check the model, or take float32"
            )
        if self.array is None:
            shape = (self.most, *values.shape[1:])
            self.array = open_memmap(self.path, "w+", self.dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk would kill the process later
                with open(self.path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, self.path.stat().st_size)
        self.array[self.filled : self.filled + len(values)] = values
        self.filled += len(values)

    def close(self) -> list[int]:
        """Cuts the file to the rows that were filled and returns its shape."""
        self.array.flush()
        if self.filled < self.most:  # the header holds the shape, so the file is written anew
            whole, shorter = self.array, self.path.with_suffix(".short")
            self.array = open_memmap(shorter, "w+", self.dtype, (self.filled, *whole.shape[1:]))
            self.array[:] = whole[: self.filled]
            self.array.flush()
            os.replace(shorter, self.path)
        return list(self.array.shape)


@torch.inference_mode()
def write_features(
    model: FrozenModel, data: ImageData, writers: dict[str, Writer], folder: Path
) -> tuple[list[int], list[int]]:
    """Fills the arrays, on rank 0. Returns the indices of their rows, and the patches' grid."""
    rows, grid = [], []
    progress = progress_bar("features", unit="batch")
    for batch in read_batches(model.items(data), **model.loading, progress=progress):
        part = None
        if batch is not None:
            images, _, indices = batch
            features = model.backbone(images.to(model.device))
            values = {kind: KINDS[kind](features).float().cpu() for kind in writers}
            part, grid = (values, indices.tolist()), list(features.grid)
        for values, indices in filter(None, distributed.gather_to_main(part)):
            if not rows:
                check_space(folder, writers, values, len(data))
            for kind, writer in writers.items():
                writer.append(values[kind])
            rows += indices
    return rows, grid


def check_space(
    folder: Path, writers: dict[str, Writer], values: dict[str, Tensor], images: int
) -> None:
    """Says how large the files will be.

    Raises:
        UserError: if they do not fit on the disk.
    """
    numbers = sum(math.prod(part.shape[1:]) for part in values.values())
    size = numbers * images * np.dtype(next(iter(writers.values())).dtype).itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{size / 1e9:.1f} GB of features do not fit into {folder}, "
            f"where {free / 1e9:.1f} GB are free; "
            "--dtype float16 halves them, size=N in --data takes fewer images"
        )
    notice(f"{images} images, {size / 1e6:.1f} MB of features")


def write_index(folder: Path, data: ImageData, rows: list[int], bad: dict[str, str]) -> None:
    """index.csv, a line for each image with a row, and bad_images.txt for the others."""
    text = {"encoding": "utf-8", "errors": "surrogateescape"}
    with (folder / "index.csv").open("w", newline="", **text) as file:
        writer = csv.writer(file)
        writer.writerow(["row", "name", "label", "class"])
        for row, index in enumerate(rows):
            label = -1 if data.labels is None else int(data.labels[index])
            writer.writerow([row, data.name(index), label, class_name(data, index)])
    if bad:
        lines = [f"{name}: {reason}".translate(ESCAPES) for name, reason in bad.items()]
        (folder / "bad_images.txt").write_text("".join(f"{line}\n" for line in lines), **text)


if __name__ == "__main__":
    run_script(main)
