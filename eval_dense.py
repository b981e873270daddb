r"""Dense probes on frozen patch tokens: segmentation, depth, matching, tracking, localization.

    python eval_dense.py segmentation --model runs/quickstart --train "scenes?size=900" \
        --val "scenes?split=val&size=90"
    python eval_dense.py depth --model "pixels?patch_size=6" --train "scenes?size=900" \
        --val "scenes?split=val&size=90"
    python eval_dense.py segmentation --head mask --model runs/quickstart \
        --train "scenes?size=900" --val "scenes?split=val&size=90" --output runs/masks
    python eval_dense.py correspondence --model runs/quickstart --val "scenes?split=val&size=200"
    python eval_dense.py tracking --model runs/quickstart --val "scenes?split=val&size=50&frames=8"
    python eval_dense.py localization --model runs/quickstart --val "scenes?split=val&size=200"

The model gets whole images, their short side at its own size unless --size says otherwise. Results
are measured at the full size of the annotations. "limit" in a result is the score of the truth
itself after pooling to the patch grid: no features do much better. segmentation and depth train a
head on --train: a linear one, a mask decoder (--head mask) or DPT (--head dpt). With --output it is
kept there, and `visualize.py predictions --head DIR` draws with it (docs/systems.md). localization
chooses TokenCut's threshold on --train, if it is given.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter

import torch
from torch import nn

from data.annotated import Annotated, clip, kinds_of, prepared_clip, prepared_pair
from data.images import ImageData
from data.sources.specs import open_data
from engine import distributed
from engine.cli import evaluation_parser, run_script
from engine.logger import notice, say_passed_over
from errors import UserError
from evals.dense import SEGMENTATION, Recipe, linear_segmentation
from evals.dense_heads import MAPS, detect, dpt_depth, keep_linear, mask_head_segmentation
from evals.depth import DEPTH, linear_depth
from evals.dpt import BINS
from evals.frozen import FrozenModel, progress_bar, run_evaluation
from evals.localization import localize, read_truth
from evals.matching import match_keypoints, match_views, track
from evals.patches import LastLayers, Sliding, extract_patches, patch_knn_segmentation
from evals.reading import Made, first_readable, in_order, read_batches

SCALES = (0.75, 1.0, 1.25, 1.5)  # of --multi-scale; each also mirrored
HELP = {
    "segmentation": "mIoU of a linear, k-NN or mask head",
    "depth": "RMSE and delta1 of a linear or DPT head",
    "detection": "mAP of boxes by FCOS or a linear head",
    "correspondence": "recall of matched points and keypoints",
    "tracking": "J&F of propagated labels",
    "localization": "CorLoc, IoU and pointing game of attention, LOST and TokenCut",
}
POSITIVE = (
    *("batch_size", "layers", "window", "steps", "k", "lr", "thresholds", "queries"),
    *("context", "radius", "top", "temperature", "span", "minutes"),
)


def main(argv: list[str] | None = None) -> None:
    run_evaluation(parse(argv), DenseModel, evaluate)


def evaluate(model: "DenseModel") -> dict:
    flags = model.flags
    train = open_data(flags.train, model.channels) if flags.train else None
    val = open_data(flags.val, model.channels)
    sets = [val] if train is None else [train, val]
    say_passed_over(*sets)
    for data in sets:
        first_readable(data, 1)  # one that does not fit is reported here, not by a loader process
    if train is not None and flags.task in ("correspondence", "tracking"):
        notice(f"{flags.task} fits nothing: --train is not used")
        train = None
    result = {"task": flags.task, "model": flags.model, **TASKS[flags.task](model, train, val)}
    counts = {} if train is None else {"n_train": model.count(train)}
    return result | counts | {"n_val": model.count(val)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    looks = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**looks)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, text in HELP.items():
        parents = [evaluation_parser("")]
        add = tasks.add_parser(
            name, help=text, parents=parents, add_help=False, **looks
        ).add_argument
        trains = name in ("segmentation", "depth", "detection")
        add("--train", required=trains, help="DATA with annotations to fit a head or threshold to")
        add("--val", required=True, help="DATA with annotations to predict")
        if name != "localization":
            blocks = "last blocks, concatenated, by default 1; DINOv2's +ms: 4"
            if trains:
                blocks = (
                    "which blocks, from 0: four of --head mask and dpt, one for boxes; " + blocks
                )
            add("--layers", type=int, nargs="+", help=blocks)
            add("--window", type=int, help="side in pixels of a sliding window; else whole images")
        if trains:
            add("--lr", type=float, nargs="+", help="learning rates; the best on --val is reported")
            add("--steps", type=int, help="by default 32 or 25 epochs, at least 300 steps")
            add("--seed", type=int, default=0)
            add(
                "--multi-scale",
                action="store_true",
                help=f"mean over {SCALES} of the size, mirrored",
            )
            wide = "channels of --head mask (256), dpt (64) and fcos (64); fewer are faster"
            add("--width", type=int, help=wide)
            keeps = "whether maps of --head mask, dpt and fcos are kept, if they fit into 4 GiB"
            add("--cache", choices=("auto", "off"), default="auto", help=keeps)
            limit = (
                "of training with --head mask, dpt and fcos; the same command goes on from --output"
            )
            add("--minutes", type=float, help=limit)
    add = tasks.choices["segmentation"].add_argument
    add("--head", choices=("linear", "knn", "mask"), default="linear")
    queries = "of --head mask, matched to classes; by default one for each class"
    add("--queries", type=int, help=queries)
    add("--k", type=int, default=30, help="patches that vote, of --head knn")
    add("--ignore-index", type=int, default=255, help="class to leave out, besides 255")
    add = tasks.choices["depth"].add_argument
    span = "metres of the bins; by default those of --train"
    add("--span", type=float, nargs=2, metavar=("LOW", "HIGH"), help=span)
    add("--head", choices=("linear", "dpt"), default="linear")
    add("--bins", choices=BINS, default="linear", help="of --head dpt: how they are spaced")
    align = "measure after the scale and shift of each image that fit best"
    add("--align", action="store_true", help=align)
    add("--canopy", action="store_true", help="heights of trees: also MAE, R2, block R2 and bias")
    add = tasks.choices["detection"].add_argument
    add("--head", choices=("fcos", "linear"), default="fcos")
    add_matching(tasks.choices)
    return check(parser.parse_args(argv))


def add_matching(tasks: dict[str, argparse.ArgumentParser]) -> None:
    add = tasks["correspondence"].add_argument
    add("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    add = tasks["tracking"].add_argument
    add("--context", type=int, default=7, help="frames to take labels from, besides the first")
    add("--radius", type=float, help="in patches; by default 0.4 of the grid's short side")
    add("--top", type=int, default=5, help="patches that a label is taken from")
    add("--temperature", type=float, default=0.1, help="0.1 in DINO, 0.2 in DINOv3")


def check(arguments: argparse.Namespace) -> argparse.Namespace:
    if arguments.resize is not None:
        raise UserError(
            "--resize is for a centre crop, and dense probes keep whole images; "
            "give the short side by --size"
        )
    if arguments.scaled_jpeg:
        raise UserError(
            "--scaled-jpeg is for features of whole images; dense probes read all pixels"
        )
    if arguments.size is not None and (len(arguments.size) > 2 or min(arguments.size) < 1):
        raise UserError("--size takes the short side, or height and width, in pixels")
    for name in POSITIVE:
        if name == "layers" and by_blocks(arguments):
            continue  # indices, from 0
        value = getattr(arguments, name, None)
        values = value if isinstance(value, list) else [value]
        if value is not None and min(values) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
    span = getattr(arguments, "span", None)
    if span is not None and span[0] >= span[1]:
        raise UserError(f"--span is {span[0]:g} {span[1]:g}; the first must be the smaller")
    return (check_head if hasattr(arguments, "head") else check_layers)(arguments)


def by_blocks(arguments: argparse.Namespace) -> bool:
    """Whether --layers are indices of blocks, from 0, for the heads of evals/heads.py."""
    return arguments.task == "detection" or getattr(arguments, "head", "") in ("mask", "dpt")


def check_head(arguments: argparse.Namespace) -> argparse.Namespace:
    """Refuses flags that --head does not read."""
    head, layers = arguments.head, arguments.layers
    if arguments.multi_scale and (head != "linear" or by_blocks(arguments)):
        raise UserError("--multi-scale goes with --head linear of masks and depth only")
    if not by_blocks(arguments):
        for name in ("minutes", "width", "queries"):
            if getattr(arguments, name, None) is not None:
                raise UserError(f"--{name} goes with --head mask, dpt and detection only")
        return check_layers(arguments)
    if arguments.window is not None:
        raise UserError(
            f"--window is not for {arguments.task} by {head}: it trains on whole images"
        )
    if arguments.lr is not None and len(arguments.lr) > 1:
        raise UserError(f"--lr has {len(arguments.lr)} rates; --head {head} trains at one")
    maps = MAPS[arguments.task]
    if layers is not None and len(layers) != maps:
        raise UserError(f"--layers names {len(layers)} blocks; --head {head} takes {maps}")
    if (arguments.width or 64) % 64 or (arguments.width and head == "linear"):
        raise UserError(f"--width is {arguments.width}; a multiple of 64, not for --head linear")
    if arguments.minutes is not None and arguments.output is None:
        raise UserError("--minutes needs --output, where the training is kept to go on from")
    return arguments


def check_layers(arguments: argparse.Namespace) -> argparse.Namespace:
    """--layers as a number: 1 by default."""
    layers = getattr(arguments, "layers", None) or [1]
    if len(layers) > 1:
        raise UserError(f"--layers has {len(layers)} numbers; give how many of the last blocks")
    arguments.layers = layers[0]
    return arguments


class DenseModel(FrozenModel):
    """A frozen model with the flags of a task.

    Attributes:
        flags: the parsed arguments.
        windowed: the backbone with --layers and --window.
    """

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.flags = arguments
        self.loading["progress"] = progress_bar(arguments.task)
        self.windowed: nn.Module = self.backbone
        if isinstance(getattr(arguments, "layers", None), int) and arguments.layers > 1:
            self.windowed = LastLayers(self.windowed, arguments.layers)
        if getattr(arguments, "window", None) is not None:
            self.windowed = Sliding(self.windowed, arguments.window)

    def annotated(
        self, data: ImageData, kind: str | Sequence[str], scale: float = 1.0, flip: bool = False
    ) -> Annotated:
        """Whole images for the model, `scale` times their size, with their annotations."""
        wanted, size = self.backbone.preprocessing, self.flags.size
        sides = [round(side * scale) for side in size or [min(wanted.size)]]
        size = sides[0] if len(sides) == 1 else tuple(sides)
        statistics = wanted.mean, wanted.std, wanted.interpolation
        options = {"ignore": getattr(self.flags, "ignore_index", 255), "flip": flip}
        return Annotated(data, kind, size, self.backbone.patch_size, *statistics, **options)

    def variants(self, data: ImageData, kind: str) -> list[Annotated]:
        """The images at the sizes of --multi-scale, each also mirrored; without it as they are."""
        if not self.flags.multi_scale:
            return [self.annotated(data, kind)]
        return [
            self.annotated(data, kind, scale, flip) for scale in SCALES for flip in (False, True)
        ]

    def made(self, data: ImageData, make: Callable[[int], tuple]) -> Iterator[tuple]:
        """`make(i)` of this rank's images that can be read."""
        options = self.loading | {"batch_size": 1, "collate": itemgetter(0)}
        return filter(None, read_batches(Made(data, make), **options))

    def probe_linear(
        self,
        probe: Callable,
        recipe: Recipe,
        train: ImageData,
        val: ImageData,
        kind: str,
        **options,
    ) -> dict:
        """Trains heads with `recipe`, --lr, --steps and --seed."""
        flags = self.flags
        if flags.output is not None and flags.window is None:
            options["keep"] = partial(keep_linear, self.backbone, flags)
        options |= {"recipe": replace(recipe, lrs=tuple(flags.lr or recipe.lrs))}
        options |= {"steps": flags.steps, "seed": flags.seed, **self.loading}
        training, vals = self.annotated(train, kind), self.variants(val, kind)
        return probe(self.windowed, training, vals, self.device, **options)

    def train_head(
        self, task: Callable, train: ImageData, val: ImageData, kind: str | Sequence[str]
    ) -> dict:
        """Trains and measures a head of evals/dense_heads.py."""
        both = self.annotated(train, kind), self.annotated(val, kind)
        scores, _ = task(self.backbone, *both, self.flags, self.device, **self.loading)
        return scores


def segment(model: DenseModel, train: ImageData, val: ImageData) -> dict:
    flags = model.flags
    if flags.head == "mask":
        scores = model.train_head(mask_head_segmentation, train, val, "mask")
    elif flags.head == "linear":
        scores = model.probe_linear(linear_segmentation, SEGMENTATION, train, val, "mask")
    else:
        both = model.annotated(train, "mask"), model.annotated(val, "mask")
        options = {"k": flags.k, **model.loading}
        scores = patch_knn_segmentation(model.windowed, *both, model.device, **options)
    return {"head": flags.head, **scores}


def estimate_depth(model: DenseModel, train: ImageData, val: ImageData) -> dict:
    flags = model.flags
    if flags.head == "dpt":
        scores = model.train_head(dpt_depth, train, val, "depth")
    else:
        options = {"span": flags.span, "align": flags.align, "canopy": flags.canopy}
        scores = model.probe_linear(linear_depth, DEPTH, train, val, "depth", **options)
    return {"head": flags.head, **scores}


def find_boxes(model: DenseModel, train: ImageData, val: ImageData) -> dict:
    classes = [getattr(getattr(data, "marks", None), "classes", None) for data in (train, val)]
    if None not in classes and classes[0] != classes[1]:
        raise UserError(
            f"--train has the classes {', '.join(classes[0])} and --val {', '.join(classes[1])}; "
            "both need the same list, as a COCO file's categories give it"
        )
    return {
        "head": model.flags.head,
        **model.train_head(detect, train, val, ("boxes", "box_labels")),
    }


def match(model: DenseModel, train: None, val: ImageData) -> dict:
    kinds, thresholds = kinds_of(val), model.flags.thresholds
    if not {"pair", "keypoints"} & set(kinds):
        raise UserError(
            f"{val.name(0)} has neither pairs of views nor keypoints; `scenes` has both"
        )
    result = {"recall": None, "keypoints": None}
    if "pair" in kinds:
        views = model.made(val, partial(prepared_pair, model.annotated(val, ())))
        result |= match_views(model.windowed, views, model.device, thresholds)
    if "keypoints" in kinds:
        images, items = model.annotated(val, "keypoints"), []
        for item in extract_patches(model.windowed, images, model.device, **model.loading):
            shape = tuple(val.image(item.index).shape[-2:])
            scale = torch.tensor([shape[1], shape[0], 1.0])
            label = -1 if val.labels is None else int(val.labels[item.index])
            found = item.tokens.cpu(), item.grid, item.target.float() / scale, shape
            items.append((item.index, (label, found)))
        items = in_order(items, distributed.gather_to_main)
        labels, found = [label for label, _ in items], [one for _, one in items]
        result["keypoints"] = match_keypoints(found, labels, thresholds)
    return result


def track_clips(model: DenseModel, train: None, val: ImageData) -> dict:
    clip(val, 0)  # data without clips is refused before anything runs
    clips = model.made(val, partial(prepared_clip, model.annotated(val, ())))
    names = ("context", "radius", "top", "temperature")
    options = {name: getattr(model.flags, name) for name in names}
    return track(model.windowed, clips, model.device, **options)


def find_objects(model: DenseModel, train: ImageData | None, val: ImageData) -> dict:
    result = localize(read_objects(model, val))
    grid, chosen_on = result["tokencut"], "val"
    if train is not None:
        grid, chosen_on = localize(read_objects(model, train))["tokencut"], "train"
    tau = max(grid, key=lambda one: grid[one]["corloc"])
    cuts, boxes = result["tokencut"], result["centre"]
    # The baseline is reported at its best share, chosen on --val.
    share = max(boxes, key=lambda one: boxes[one]["corloc"])
    result["tokencut"] = {"tau": float(tau), "chosen_on": chosen_on, **cuts[tau]}
    result["centre"] = {"share": float(share), **boxes[share]}
    return result | {"tokencut_corloc": {tau: scores["corloc"] for tau, scores in cuts.items()}}


def read_objects(model: DenseModel, data: ImageData) -> Iterator[tuple]:
    """Tokens, attention and truth of each image, as `localize` takes them."""
    known = [kind for kind in ("boxes", "instance", "mask") if kind in kinds_of(data)]
    if not known:
        raise UserError(f"{data.name(0)} has neither boxes nor masks of objects")
    images = model.annotated(data, known)
    for item in extract_patches(model.backbone, images, model.device, **model.loading):
        notes = item.target
        attention = None
        if hasattr(model.backbone, "attention"):
            image = images[item.index][0][None].to(model.device)
            with torch.inference_mode():
                weights = model.backbone.attention(image)[0, :, 0]
            attention = weights[:, -len(item.tokens) :].unflatten(1, item.grid).cpu()
        yield item, attention, read_truth(notes)


TASKS: dict[str, Callable[..., dict]] = {
    "segmentation": segment,
    "depth": estimate_depth,
    "detection": find_boxes,
    "correspondence": match,
    "tracking": track_clips,
    "localization": find_objects,
}

if __name__ == "__main__":
    run_script(main)
