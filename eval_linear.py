r"""Linear probe on frozen features: one pass trains a grid of heads; the best on --val is reported.

    python eval_linear.py --model runs/quickstart --train "scenes?size=4000" \
        --val "scenes?split=val&size=1000"
    python eval_linear.py --model pixels --train "scenes?size=400" \
        --val "scenes?split=val&size=400" --protocol logreg

Protocols are as published except for their length, which follows the size of the data (--steps):
    dinov2   every learning rate x CLS of the last 1 or 4 blocks x with or without the mean patch
             (arXiv 2304.07193)
    dino     one head: CLS of the last 4 blocks if the width is below 768, otherwise the last CLS
             and the mean patch (arXiv 2104.14294)
    logreg   logistic regression on the last CLS, C chosen on a tenth of --train (2304.07193);
             for small data
--pool attention trains attentive probes instead, which read the patches of the last 4 blocks
(evals/attentive.py); for models without a trained CLS, and for small objects.

Features are computed once for each image and kept; --stream computes them anew for random crops and
flips, as published. The best head is chosen on --val, also as published. A choice among many heads
on few images is optimistic: --also judges the chosen head on sets that took no part in the choice.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import POLICIES, CropSpec, MultiCrop
from data.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from data.images import Chosen, ImageData
from data.loader import Views, make_loader
from data.pictures import UnreadableImage
from data.sources.specs import known_images, open_labelled, open_with_labels
from engine import distributed
from engine.cli import evaluation_parser, run_script
from engine.logger import say_passed_over
from errors import UserError
from evals import attentive
from evals.attentive import AttentiveGrid, AttentiveHead, describe_tokens
from evals.frozen import FrozenModel, check_least, progress_bar, run_evaluation
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
from evals.reading import note_unreadable

DINO_BATCH, DINO_EPOCHS, DINO_LR = 1024, 100, 0.001
LARGE = 1 << 32  # bytes of float32 features from which on they are kept in float16


def training_rows(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray:
    """Rows with a label; given `shots`, that many of each class drawn by `seed`, or all it has."""
    if shots is None:
        return np.flatnonzero(labels >= 0)
    rng = np.random.default_rng(seed)
    classes = np.unique(labels[labels >= 0])
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in classes]
    return np.sort(np.concatenate(drawn))


class Probe(FrozenModel):
    """A frozen model and the heads of the protocol: rows of features, kept or streamed."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.arguments = arguments
        self.attentive = arguments.pool == "attention"
        self.heads = self._heads()
        self.blocks = max(head.blocks for head in self.heads)
        blank = torch.zeros(1, self.channels, *self.prepare["size"], device=self.device)
        self.width = self._describe(blank).shape[1]

    def _heads(self) -> list[Head] | list[AttentiveHead]:
        """The grid of the protocol; where a shallow backbone makes heads equal, one of them."""
        rates = self.arguments.lr
        if self.attentive:
            blocks = available_blocks(self.backbone, (attentive.BLOCKS,))[0]
            return [AttentiveHead(blocks, lr) for lr in rates or attentive.LEARNING_RATES]
        if self.arguments.protocol == "logreg":
            return [Head(1, False, 0.0)]
        if self.arguments.protocol == "dino":
            small = self.backbone.embed_dim < 768
            blocks = available_blocks(self.backbone, (4,) if small else (1,))[0]
            return [Head(blocks, not small, lr) for lr in rates or (DINO_LR,)]
        blocks = available_blocks(self.backbone)
        cells = itertools.product(blocks, (False, True), rates or LEARNING_RATES)
        return [Head(*cell) for cell in cells]

    @torch.inference_mode()
    def _describe(self, images: Tensor) -> Tensor:
        row_of = describe_tokens if self.attentive else describe
        return row_of(self.backbone, images, self.blocks)

    def rows(self, items: Dataset, name: str) -> tuple[Tensor, Tensor]:
        """Features (n, width) and labels (n,) of the images that could be read, on the host.

        Raises:
            UserError: if they take more than four fifths of the memory.
        """
        size = len(items) * self.width
        dtype = torch.float16 if 4 * size > LARGE else torch.float32
        size = size * dtype.itemsize
        if hasattr(os, "sysconf"):
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if size > 0.8 * memory:
                raise UserError(
                    f"the features of {len(items)} images of {name} take {size / 2**30:.0f} GiB "
                    "of memory; give --stream"
                )
        return self.features(self._describe, items, name, dtype=dtype)[:2]

    def stream(self, train: ImageData, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and labels of random crops of 8 to 100 % of the area and flips, epoch by epoch."""
        crop = CropSpec(self.prepare["size"], (0.08, 1.0), 1)
        statistics = self.prepare["mean"], self.prepare["std"]
        views = Views(MultiCrop(crop, None, POLICIES["crops_only"], *statistics))
        options = {"seed": self.arguments.seed, "stop_step": steps}
        options |= {"workers": self.loading["workers"], "batch_size": batch}
        labels = torch.from_numpy(train.labels)
        for batch in make_loader(train, [views], device=self.device.type, **options):
            note_unreadable([UnreadableImage(*bad) for bad in batch.bad], self.unreadable)
            parts = batch.global_crops.split(self.loading["batch_size"])  # images a forward pass
            rows = torch.cat([self._describe(part.to(self.device)) for part in parts])
            yield rows, labels[batch.images].to(self.device)


def train_grid(
    probe: Probe,
    train: ImageData,
    rows: tuple[Tensor, Tensor] | None,
    val: tuple[Tensor, Tensor],
    classes: int,
) -> tuple[Callable, dict]:
    """Trains every head on `rows`, or on crops of `train` where they are None.

    Returns:
        The classifier of the best one on `val` and its report.
    """
    flags = probe.arguments
    is_dino, images = flags.protocol == "dino", len(train if rows is None else rows[1])
    usual = attentive.BATCH_SIZE if probe.attentive else DINO_BATCH if is_dino else BATCH_SIZE
    batch_size = min(usual, images)
    length = {"epochs": DINO_EPOCHS, "most": None} if is_dino else {}
    steps = attentive.STEPS if probe.attentive else default_steps(images, batch_size, **length)
    steps = flags.steps or steps
    options = {"classes": classes, "batch_size": batch_size}
    options |= {"device": probe.device, "seed": flags.seed}
    if probe.attentive:
        dim = probe.blocks * probe.backbone.embed_dim
        grid = AttentiveGrid(probe.heads, dim=dim, **options)
    else:
        pooled = probe.backbone.embed_dim
        grid = HeadGrid(probe.heads, width=probe.width, pooled=pooled, **options)
    if rows is None:
        batches = probe.stream(train, batch_size, steps)
    else:
        batches = cached_batches(*rows, batch_size, probe.device, flags.seed)
    fit_heads(grid, progress_bar("heads", unit="step", total=steps)(batches), steps)
    scores = grid.accuracies(*val)
    best = max(scores, key=scores.get)
    cells = [{**vars(head), "top1": value} for head, value in scores.items()]
    report = {"top1": scores[best], "best": vars(best), "steps": steps, "grid": cells}
    return grid.classifier(best), report


def train_logistic(
    probe: Probe, rows: Tensor, labels: Tensor, val: tuple[Tensor, Tensor], classes: int
) -> tuple[Callable, dict]:
    """The same for logistic regression, whose strength is chosen without `val`."""
    cls = probe.width - probe.backbone.embed_dim
    options = {"seed": probe.arguments.seed, "progress": progress_bar("strengths")}
    fitted, best, held_out = logistic_probe(rows[:, :cls], labels, classes, **options)
    cells = [{"C": strength, "held_out": value} for strength, value in held_out.items()]

    def classifier(rows: Tensor) -> Tensor:
        return fitted(rows[:, :cls])

    return classifier, {"top1": accuracy(classifier, *val), "best": {"C": best}, "grid": cells}


def further_set(probe: Probe, classifier: Callable, train: ImageData, spec: str) -> dict:
    """Top-1 on another set, chosen among its own classes, on rank 0.

    Images of classes that `train` lacks are left out.
    """
    known = known_images(train, open_with_labels(spec, probe.channels), spec)
    say_passed_over(known)
    classes = torch.from_numpy(np.unique(known.labels))
    rows = probe.rows(probe.items(known), spec)
    top1 = accuracy(classifier, *rows, classes)
    left_out = known.left_out
    return {"top1": top1, "n": len(rows[1]), "left_out": left_out, "classes": len(classes)}


def corruption_errors(probe: Probe, classifier: Callable, val: ImageData) -> dict:
    """Errors at each severity, the mean of each corruption, and the mean of those means.

    Nothing is divided by the errors of AlexNet.
    """
    found = {}
    for name in CORRUPTIONS:
        errors = []
        for severity in SEVERITIES:
            items = Corrupted(probe.items(val), name, severity)
            errors.append(1 - accuracy(classifier, *probe.rows(items, f"{name} {severity}")))
        found[name] = {"errors": errors, "mean": sum(errors) / len(errors)}
    return found | {"mean_error": sum(value["mean"] for value in found.values()) / len(found)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--train", required=True, help="DATA with labels to learn from")
    add("--val", required=True, help="DATA with labels to predict; the best head is chosen on it")
    add("--protocol", choices=("dinov2", "dino", "logreg"), default="dinov2", help="see above")
    pool_help = "what heads read: CLS and the mean patch, or all patches by attention"
    add("--pool", choices=("mean", "attention"), default="mean", help=pool_help)
    add("--lr", type=float, nargs="+", help="learning rates of a batch of 256; else the protocol's")
    add("--steps", type=int, help="updates; by default the protocol's epochs, at least 1000")
    add("--stream", action="store_true", help="train on random crops and flips; keep no features")
    add("--shots", type=int, help="train on so many images of each class")
    add("--also", nargs="+", default=[], metavar="DATA", help="further sets, classes by name")
    add("--corruptions", action="store_true", help="errors under noise, blur, contrast, JPEG")
    add("--seed", type=int, default=0, help="of the heads, the order of images and --shots")
    arguments = parser.parse_args(argv)
    check_least(arguments, 1, "batch_size", "steps", "shots")
    if min(arguments.lr or [1]) <= 0 or arguments.seed < 0:
        raise UserError("--lr must be more than 0, --seed at least 0")
    if arguments.pool == "attention" and arguments.protocol != "dinov2":
        raise UserError(f"--pool attention has its own protocol; leave out {arguments.protocol}")
    if arguments.protocol == "logreg" and (arguments.stream or arguments.lr or arguments.steps):
        raise UserError(
            "--protocol logreg fits all images at once; "
            "--stream, --lr and --steps are for the other protocols"
        )
    return arguments


def evaluate(probe: Probe) -> dict:
    flags = probe.arguments
    every, val = open_labelled(flags.train, flags.val, probe.channels)
    say_passed_over(every, val)
    train = Chosen(every, training_rows(every.labels, flags.shots, flags.seed))
    classes = int(train.labels.max()) + 1
    val_rows = probe.rows(probe.items(val), "val")
    rows = None if flags.stream else probe.rows(probe.items(train), "train")
    classifier, report = None, {}
    if not distributed.is_main():
        pass  # rank 0 trains
    elif flags.protocol == "logreg":
        classifier, report = train_logistic(probe, *rows, val_rows, classes)
    else:
        classifier, report = train_grid(probe, train, rows, val_rows, classes)
    protocol = "attentive" if probe.attentive else flags.protocol
    result = {"task": "linear", "model": flags.model, "protocol": protocol, **report}
    result |= {"n_train": len(train if rows is None else rows[1]), "n_val": len(val_rows[1])}
    result["left_out"] = val.left_out
    also = {spec: further_set(probe, classifier, every, spec) for spec in flags.also}
    if also:
        result["also"] = also
    if flags.corruptions:
        result["corruptions"] = corruption_errors(probe, classifier, val)
    return result


def main(argv: list[str] | None = None) -> None:
    run_evaluation(parse(argv), Probe, evaluate)


if __name__ == "__main__":
    run_script(main)
