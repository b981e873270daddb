"""Linear probe on frozen features: a whole grid of heads trained in one pass, the best on --val reported.

    python eval_linear.py --model runs/quickstart --train "scenes?size=4000" --val "scenes?split=val&size=1000"
    python eval_linear.py --model pixels --train "scenes?size=400" --val "scenes?split=val&size=400" --protocol logreg

Protocols, as published but for the length, which follows the size of the data (--steps sets it):
    dinov2   every learning rate x CLS of the last 1 or 4 blocks x with or without the mean patch (arXiv 2304.07193)
    dino     one head: CLS of the last 4 blocks (below 768 numbers), else last CLS and mean patch (2104.14294)
    logreg   logistic regression on the last CLS, C chosen on a tenth of --train (2304.07193); for small data

Features are computed once per image and kept; --stream computes them anew for random crops and flips, as published. The
best head is chosen on --val, as there: with many heads and few images, judge it on an unseen set by --also.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.augment import POLICIES, CropSpec, MultiCrop
from data.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from data.loader import EvalDataset, Views, default_workers, make_loader
from data.sources.specs import ImageData, match_classes, open_data, open_labelled
from engine import distributed
from engine.cli import evaluation_parser, preparation, print_result, run_script
from errors import UserError
from evals.knn import extract_features
from evals.linear import (
    BATCH_SIZE,
    LEARNING_RATES,
    Head,
    HeadGrid,
    accuracy,
    available_blocks,
    cached_batches,
    default_steps,
    describe,
    fit_heads,
    logistic_probe,
)
from models.weights.load import load_backbone

DINO_BATCH, DINO_EPOCHS, DINO_LR = 1024, 100, 0.001
LARGE = 1 << 32  # bytes of cached features from which on they are kept in half precision


class Chosen(ImageData):
    """Some images of a data set."""

    def __init__(self, data: ImageData, rows: np.ndarray):
        self.data, self.rows = data, rows
        self.labels, self.classes = data.labels[rows], data.classes

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        return self.data.image(int(self.rows[index]))

    def name(self, index: int) -> str:
        return self.data.name(int(self.rows[index]))


def training_rows(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray:
    """Rows with a label; with `shots` so many of each class, drawn by `seed`, or all where it has fewer."""
    if shots is None:
        return np.flatnonzero(labels >= 0)
    rng = np.random.default_rng(seed)
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:shots]
        for label in np.unique(labels[labels >= 0])
    ]
    return np.sort(np.concatenate(drawn))


class Probe:
    """One model with the flags: rows of features of any data, cached or streamed."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.device = distributed.choose_device(arguments.device)
        self.backbone: nn.Module = load_backbone(arguments.model).to(self.device)
        self.prepare = preparation(self.backbone.preprocessing, arguments.resize, arguments.size)
        self.workers = (
            default_workers(self.device.type) if arguments.workers is None else arguments.workers
        )
        self.heads = self._heads()
        self.blocks = max(head.blocks for head in self.heads)
        channels, (height, width) = self.backbone.in_channels, self.prepare["size"]
        blank = torch.zeros(1, channels, height, width, device=self.device)
        self.width = self._describe(blank).shape[1]

    def _heads(self) -> list[Head]:
        """The grid; heads that a shallow backbone makes equal are one."""
        rates = self.arguments.lr
        if self.arguments.protocol == "logreg":
            return [Head(1, False, 0.0)]
        if self.arguments.protocol == "dino":
            small = self.backbone.embed_dim < 768
            blocks = available_blocks(self.backbone, (4,) if small else (1,))[0]
            return [Head(blocks, not small, lr) for lr in rates or (DINO_LR,)]
        blocks = available_blocks(self.backbone)
        return [
            Head(*cell)
            for cell in itertools.product(blocks, (False, True), rates or LEARNING_RATES)
        ]

    @torch.inference_mode()
    def _describe(self, images: Tensor) -> Tensor:
        return describe(self.backbone, images, self.blocks)

    def items(self, data: ImageData) -> EvalDataset:
        return EvalDataset(data, **self.prepare)

    def rows(self, items, name: str) -> tuple[Tensor, Tensor]:
        """Features (n, width) and labels (n,) on the host."""
        size = len(items) * self.width
        dtype = torch.float16 if 4 * size > LARGE else torch.float32
        if hasattr(os, "sysconf") and size * dtype.itemsize > 0.8 * os.sysconf(
            "SC_PHYS_PAGES"
        ) * os.sysconf("SC_PAGE_SIZE"):
            gib = size * dtype.itemsize / 2**30
            raise UserError(
                f"the features of {len(items)} images of {name} take {gib:.0f} GiB of memory; give --stream"
            )
        progress = partial(
            tqdm, desc=f"features of {name}", unit="batch", disable=not sys.stderr.isatty()
        )
        options = {"batch_size": self.arguments.batch_size, "workers": self.workers, "dtype": dtype}
        return extract_features(self._describe, items, self.device, progress=progress, **options)

    def stream(
        self, train: ImageData, batch_size: int, steps: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and labels of random resized crops (8 to 100 % of the image) and flips, each image once an epoch."""
        crop = CropSpec(self.prepare["size"], (0.08, 1.0), 1)
        views = MultiCrop(
            crop, None, POLICIES["crops_only"], self.prepare["mean"], self.prepare["std"]
        )
        options = {
            "batch_size": batch_size,
            "seed": self.arguments.seed,
            "stop_step": steps,
            "workers": self.workers,
        }
        labels = torch.from_numpy(train.labels)
        for batch in make_loader(train, [Views(views)], device=self.device.type, **options):
            parts = batch.global_crops.split(self.arguments.batch_size)  # images a forward pass
            rows = torch.cat([self._describe(part.to(self.device)) for part in parts])
            yield rows, labels[batch.images].to(self.device)


def train_grid(
    probe: Probe, train: ImageData, val: tuple[Tensor, Tensor], classes: int
) -> tuple[Callable, dict]:
    """Trains every head; the classifier of the best one on `val`, and what to report."""
    flags, published = probe.arguments, probe.arguments.protocol == "dino"
    batch_size = min(DINO_BATCH if published else BATCH_SIZE, len(train))
    length = {"epochs": DINO_EPOCHS, "most": None} if published else {}
    steps = flags.steps or default_steps(len(train), batch_size, **length)
    sizes = {
        "width": probe.width,
        "pooled": probe.backbone.embed_dim,
        "classes": classes,
        "batch_size": batch_size,
    }
    grid = HeadGrid(probe.heads, **sizes, device=probe.device, seed=flags.seed)
    if flags.stream:
        batches = probe.stream(train, batch_size, steps)
    else:
        batches = cached_batches(
            *probe.rows(probe.items(train), "train"), batch_size, probe.device, flags.seed
        )
    bar = tqdm(batches, desc="heads", unit="step", total=steps, disable=not sys.stderr.isatty())
    fit_heads(grid, bar, steps)
    scores = grid.accuracies(*val)
    best = max(scores, key=scores.get)
    cells = [{**vars(head), "top1": value} for head, value in scores.items()]
    report = {"top1": scores[best], "best": vars(best), "steps": steps, "grid": cells}
    return grid.classifier(best), report


def train_logistic(
    probe: Probe, train: ImageData, val: tuple[Tensor, Tensor], classes: int
) -> tuple[Callable, dict]:
    """The same for logistic regression, whose strength is chosen without `val`."""
    cls = probe.width - probe.backbone.embed_dim
    rows, labels = probe.rows(probe.items(train), "train")
    bar = partial(tqdm, desc="strengths", disable=not sys.stderr.isatty())
    fitted, best, held_out = logistic_probe(
        rows[:, :cls], labels, classes, seed=probe.arguments.seed, progress=bar
    )
    cells = [{"C": strength, "held_out": value} for strength, value in held_out.items()]

    def classifier(rows: Tensor) -> Tensor:
        return fitted(rows[:, :cls])

    return classifier, {"top1": accuracy(classifier, *val), "best": {"C": best}, "grid": cells}


def further_set(probe: Probe, classifier: Callable, train: ImageData, spec: str) -> dict:
    """Another validation set: images without a class of `train` are left out, the choice is among its own classes."""
    data = open_data(spec, probe.backbone.in_channels)
    labels = match_classes(train, data)
    if labels is None:
        raise UserError(
            f"{spec} has no labels; --also needs folders named by class, or a labelled data set"
        )
    data.labels = labels
    data = Chosen(data, np.flatnonzero(labels >= 0))
    allowed = torch.from_numpy(np.unique(data.labels))
    top1 = accuracy(classifier, *probe.rows(probe.items(data), spec), allowed)
    return {
        "top1": top1,
        "n": len(data),
        "left_out": len(labels) - len(data),
        "classes": len(allowed),
    }


def corruption_errors(probe: Probe, classifier: Callable, val: ImageData) -> dict:
    """Error at each severity, the mean of each corruption, and the mean of those (not divided by AlexNet's)."""
    found = {}
    for name in CORRUPTIONS:
        damaged = [Corrupted(probe.items(val), name, severity) for severity in SEVERITIES]
        errors = [
            1 - accuracy(classifier, *probe.rows(items, f"{name} {items.severity}"))
            for items in damaged
        ]
        found[name] = {"errors": errors, "mean": sum(errors) / len(errors)}
    return found | {"mean_error": sum(value["mean"] for value in found.values()) / len(found)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--train", required=True, help="DATA with labels to learn from")
    parser.add_argument(
        "--val", required=True, help="DATA with labels to be found; chooses the best head"
    )
    parser.add_argument(
        "--protocol", choices=("dinov2", "dino", "logreg"), default="dinov2", help="see above"
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        help="learning rates before batch / 256, for the protocol's own",
    )
    parser.add_argument(
        "--steps", type=int, help="updates; by default the protocol's epochs, at least 1000"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="train on random crops and flips, nothing kept in memory",
    )
    parser.add_argument("--shots", type=int, help="train on so many images of each class")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="DATA",
        help="further sets, classes matched by name",
    )
    parser.add_argument(
        "--corruptions",
        action="store_true",
        help="errors on damaged --val: noise, blur, contrast, JPEG",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the heads, the order of images and --shots"
    )
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "steps", "shots"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if min(arguments.lr or [1]) <= 0 or arguments.seed < 0:
        raise UserError("--lr must be more than 0, --seed at least 0")
    if arguments.protocol == "logreg" and (arguments.stream or arguments.lr or arguments.steps):
        raise UserError(
            "--protocol logreg fits all images at once; --stream, --lr and --steps are for the others"
        )
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    began = time.perf_counter()
    probe = Probe(arguments)
    every, val = open_labelled(arguments.train, arguments.val, probe.backbone.in_channels)
    train = Chosen(every, training_rows(every.labels, arguments.shots, arguments.seed))
    classes = int(train.labels.max()) + 1
    val_rows = probe.rows(probe.items(val), "val")
    fit = train_logistic if arguments.protocol == "logreg" else train_grid
    classifier, report = fit(probe, train, val_rows, classes)
    result = {"task": "linear", "model": arguments.model, "protocol": arguments.protocol, **report}
    result |= {"n_train": len(train), "n_val": len(val)}
    if arguments.also:
        result["also"] = {
            spec: further_set(probe, classifier, every, spec) for spec in arguments.also
        }
    if arguments.corruptions:
        result["corruptions"] = corruption_errors(probe, classifier, val)
    print_result(result | {"seconds": round(time.perf_counter() - began, 1)}, arguments.output)


if __name__ == "__main__":
    run_script(main)
