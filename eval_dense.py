"""Dense probes on frozen patch tokens: segmentation, depth, correspondence, tracking, localization.

    python eval_dense.py segmentation --model runs/quickstart --train "scenes?size=900" --val "scenes?split=val&size=90"
    python eval_dense.py depth --model "pixels?patch_size=6" --train "scenes?size=900" --val "scenes?split=val&size=90"
    python eval_dense.py correspondence --model runs/quickstart --val "scenes?split=val&size=200"
    python eval_dense.py tracking --model runs/quickstart --val "scenes?split=val&size=50&frames=8"
    python eval_dense.py localization --model runs/quickstart --val "scenes?split=val&size=200"

Whole images are seen, their short side at the model's own size unless --size says otherwise, and everything is measured
at the full size of the annotations. "limit" in a result is what the truth itself reaches when it is pooled to the patch
grid: no features do much better. segmentation and depth train a linear head on --train; localization chooses
TokenCut's threshold there, if it is given.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data.annotated import Annotated, clip, kinds_of, pair
from data.images import ImageData
from data.loader import default_workers
from data.sources.specs import open_data
from engine.cli import evaluation_parser, print_result, run_script
from engine.distributed import choose_device
from errors import UserError
from evals import localization
from evals import matching as correspondence
from evals.dense import SEGMENTATION, linear_segmentation
from evals.depth import DEPTH, linear_depth
from evals.patches import LastLayers, Sliding, extract_patches, patch_knn_segmentation
from models.weights.load import load_backbone

SCALES = (0.75, 1.0, 1.25, 1.5)  # --multi-scale; each also mirrored


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    began = time.perf_counter()
    device = choose_device(arguments.device)
    backbone = load_backbone(arguments.model).to(device)
    train = open_data(arguments.train, backbone.in_channels) if arguments.train else None
    val = open_data(arguments.val, backbone.in_channels)
    for data in filter(None, (train, val)):
        data.image(0)  # one that does not fit says so here, and not from inside a worker
    if train is not None and arguments.task in ("correspondence", "tracking"):
        print(f"{arguments.task} fits nothing: --train is not used", file=sys.stderr)
        train = None
    result = TASKS[arguments.task](arguments, backbone, train, val, device)
    counts = {"n_val": len(val)} if train is None else {"n_train": len(train), "n_val": len(val)}
    result = {"task": arguments.task, "model": arguments.model, **result, **counts}
    print_result(result | {"seconds": round(time.perf_counter() - began, 1)}, arguments.output)


def parse(argv: list[str] | None) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    tasks = parser.add_subparsers(dest="task", required=True)
    words = {
        "segmentation": "mIoU of a linear or k-NN head", "depth": "RMSE and delta1 of a linear head",
        "correspondence": "recall of matched points and keypoints", "tracking": "J&F of propagated labels",
        "localization": "CorLoc, IoU and pointing game of attention, LOST and TokenCut",
    }  # fmt: skip
    for name, help in words.items():
        shared = evaluation_parser("")
        task = tasks.add_parser(
            name,
            help=help,
            description=__doc__,
            formatter_class=plain,
            parents=[shared],
            add_help=False,
        )
        trains = name in ("segmentation", "depth")
        task.add_argument(
            "--train",
            required=trains,
            help="DATA with annotations that a head or a threshold is fitted to",
        )
        task.add_argument("--val", required=True, help="DATA with annotations to be found")
        if name != "localization":
            task.add_argument(
                "--layers",
                type=int,
                default=1,
                help="the last so many blocks, side by side (4: DINOv2's +ms)",
            )
            task.add_argument(
                "--window",
                type=int,
                help="side in pixels of a sliding window; by default the whole image at once",
            )
        if trains:
            task.add_argument(
                "--lr", type=float, nargs="+", help="learning rates; the best on --val is reported"
            )
            task.add_argument(
                "--steps", type=int, help="by default 32 or 25 epochs, at least 300 steps"
            )
            task.add_argument("--seed", type=int, default=0)
            task.add_argument(
                "--multi-scale",
                action="store_true",
                help=f"mean over {SCALES} of the size, each mirrored too",
            )
    task = tasks.choices["segmentation"]
    task.add_argument("--head", choices=("linear", "knn"), default="linear")
    task.add_argument("--k", type=int, default=30, help="patches that vote, of --head knn")
    task.add_argument(
        "--ignore-index",
        type=int,
        default=255,
        help="class of pixels that do not count, besides 255",
    )
    task = tasks.choices["depth"]
    task.add_argument(
        "--span",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="metres of the bins; by default those of --train",
    )
    tasks.choices["correspondence"].add_argument(
        "--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2]
    )
    task = tasks.choices["tracking"]
    task.add_argument(
        "--context", type=int, default=7, help="frames that labels come from, besides the first"
    )
    task.add_argument(
        "--radius",
        type=float,
        help="patches that a label may travel; by default 0.4 of the grid's short side",
    )
    task.add_argument("--top", type=int, default=5, help="patches that a label is taken from")
    task.add_argument("--temperature", type=float, default=0.1, help="0.1 in DINO, 0.2 in DINOv3")
    return check(parser.parse_args(argv))


def check(arguments: argparse.Namespace) -> argparse.Namespace:
    if arguments.resize is not None:
        raise UserError(
            "--resize is for a centre crop, and dense probes keep whole images; give the short side by --size"
        )
    if arguments.size is not None and (len(arguments.size) > 2 or min(arguments.size) < 1):
        raise UserError("--size takes the short side, or height and width, in pixels")
    positive = (
        "batch_size",
        "layers",
        "window",
        "steps",
        "k",
        "lr",
        "thresholds",
        "context",
        "radius",
        "top",
        "temperature",
        "span",
    )
    for name in positive:
        value = getattr(arguments, name, None)
        values = value if isinstance(value, list) else [value]
        if value is not None and min(values) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
    span = getattr(arguments, "span", None)
    if span is not None and span[0] >= span[1]:
        raise UserError(f"--span is {span[0]:g} {span[1]:g}; the first must be the smaller")
    if getattr(arguments, "head", "") == "knn" and arguments.multi_scale:
        raise UserError("--multi-scale goes with --head linear only")
    return arguments


def prepared(
    arguments: argparse.Namespace,
    backbone: nn.Module,
    data: ImageData,
    kind: Any,
    scale: float = 1.0,
    **options,
) -> Annotated:
    """Whole images as the model wants them, with their annotations."""
    wanted = backbone.preprocessing
    size = [min(wanted.size)] if arguments.size is None else arguments.size
    size = [round(side * scale) for side in size]
    size = size[0] if len(size) == 1 else tuple(size)
    shape = (wanted.mean, wanted.std, wanted.interpolation)
    return Annotated(data, kind, size, backbone.patch_size, *shape, **options)


def seen_through(arguments: argparse.Namespace, backbone: nn.Module) -> nn.Module:
    """The backbone with --layers and --window."""
    if arguments.layers > 1:
        backbone = LastLayers(backbone, arguments.layers)
    return backbone if arguments.window is None else Sliding(backbone, arguments.window)


def loading(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    workers = default_workers(device.type) if arguments.workers is None else arguments.workers
    progress = partial(tqdm, desc=arguments.task, disable=not sys.stderr.isatty())
    return {"batch_size": arguments.batch_size, "workers": workers, "progress": progress}


def segmentation(
    arguments, backbone, train: ImageData, val: ImageData, device: torch.device
) -> dict:
    options, ignore = loading(arguments, device), {"ignore": arguments.ignore_index}
    seen = seen_through(arguments, backbone)
    training = prepared(arguments, backbone, train, "mask", **ignore)
    if arguments.head == "knn":
        validation = prepared(arguments, backbone, val, "mask", **ignore)
        return {
            "head": "knn",
            **patch_knn_segmentation(seen, training, validation, device, k=arguments.k, **options),
        }
    vals = variants(arguments, backbone, val, "mask", **ignore)
    recipe = replace(SEGMENTATION, lrs=tuple(arguments.lr or SEGMENTATION.lrs))
    training_options = {"recipe": recipe, "steps": arguments.steps, "seed": arguments.seed}
    return {
        "head": "linear",
        **linear_segmentation(seen, training, vals, device, **training_options, **options),
    }


def depth(arguments, backbone, train: ImageData, val: ImageData, device: torch.device) -> dict:
    seen, training = (
        seen_through(arguments, backbone),
        prepared(arguments, backbone, train, "depth"),
    )
    vals = variants(arguments, backbone, val, "depth")
    recipe = replace(DEPTH, lrs=tuple(arguments.lr or DEPTH.lrs))
    options = {
        "span": arguments.span,
        "recipe": recipe,
        "steps": arguments.steps,
        "seed": arguments.seed,
    }
    return linear_depth(seen, training, vals, device, **options, **loading(arguments, device))


def variants(arguments, backbone, data: ImageData, kind: str, **options) -> list[Dataset]:
    if not arguments.multi_scale:
        return [prepared(arguments, backbone, data, kind, **options)]
    each = [(scale, flip) for scale in SCALES for flip in (False, True)]
    return [
        prepared(arguments, backbone, data, kind, scale, flip=flip, **options)
        for scale, flip in each
    ]


def matching(
    arguments, backbone, train: ImageData | None, val: ImageData, device: torch.device
) -> dict:
    seen, thresholds = seen_through(arguments, backbone), arguments.thresholds
    there = kinds_of(val)
    if not {"pair", "keypoints"} & set(there):
        raise UserError(
            f"{val.name(0)} has neither pairs of views nor keypoints; `scenes` has both"
        )
    result = {"recall": None, "keypoints": None}
    if "pair" in there:
        images = prepared(arguments, backbone, val, ())
        result |= correspondence.match_views(
            seen, tqdm_if_terminal(views(images), len(val)), device, thresholds
        )
    if "keypoints" not in there:
        return result
    data = prepared(arguments, backbone, val, "keypoints")
    items = []
    for item in extract_patches(seen, data, device, **loading(arguments, device)):
        shape = tuple(val.image(item.index).shape[-2:])
        scale = torch.tensor([shape[1], shape[0], 1.0])
        items.append((item.tokens, item.grid, item.target.float() / scale, shape))
    labels = [-1] * len(val) if val.labels is None else val.labels.tolist()
    return result | {"keypoints": correspondence.match_keypoints(items, labels, thresholds)}


def views(images: Annotated) -> Iterator[tuple]:
    """Pairs as `match_views` takes them, points as shares of width and height."""
    for index in range(len(images)):
        image_a, image_b, points_a, points_b, visible = pair(images.data, index)
        points = [
            torch.as_tensor(points) / torch.tensor([image.shape[-1], image.shape[-2]])
            for points, image in ((points_a, image_a), (points_b, image_b))
        ]
        shape = tuple(image_b.shape[-2:])
        yield (
            images.prepare(image_a),
            images.prepare(image_b),
            *points,
            torch.as_tensor(visible),
            shape,
        )


def tracking(
    arguments, backbone, train: ImageData | None, val: ImageData, device: torch.device
) -> dict:
    clip(val, 0)
    images = prepared(arguments, backbone, val, ())

    def clips() -> Iterator[tuple[list[Tensor], Tensor]]:
        for index in range(len(val)):
            frames, instances = clip(val, index)
            yield [images.prepare(frame) for frame in frames], torch.as_tensor(instances)

    options = {
        name: getattr(arguments, name) for name in ("context", "radius", "top", "temperature")
    }
    seen = seen_through(arguments, backbone)
    return correspondence.track(seen, tqdm_if_terminal(clips(), len(val)), device, **options)


def discovery(
    arguments, backbone, train: ImageData | None, val: ImageData, device: torch.device
) -> dict:
    result = localization.localize(objects(arguments, backbone, val, device))
    chosen = "val"
    grid = result["tokencut"]
    if train is not None:
        grid, chosen = (
            localization.localize(objects(arguments, backbone, train, device))["tokencut"],
            "train",
        )
    tau = max(grid, key=lambda one: grid[one]["corloc"])
    side = max(result["centre"], key=lambda one: result["centre"][one]["corloc"])
    best = {"tokencut": {"tau": float(tau), "chosen_on": chosen, **result["tokencut"][tau]}}
    best["centre"] = {
        "share": float(side),
        **result["centre"][side],
    }  # the best of them: the baseline is given every chance
    corloc = {tau: one["corloc"] for tau, one in result["tokencut"].items()}
    return result | best | {"tokencut_corloc": corloc}


def objects(arguments, backbone, data: ImageData, device: torch.device) -> Iterator[tuple]:
    """Tokens, attention and truth of each image, as `localize` takes them."""
    known = [kind for kind in ("boxes", "instance", "mask") if kind in kinds_of(data)]
    if not known:
        raise UserError(f"{data.name(0)} has neither boxes nor masks of objects")
    images = prepared(arguments, backbone, data, known)
    for item in tqdm_if_terminal(
        extract_patches(backbone, images, device, **loading(arguments, device)), len(data)
    ):
        notes = item.target
        if known == ["boxes"]:
            notes = notes | {"shape": torch.tensor(data.image(item.index).shape[-2:])}
        attention = None
        if hasattr(backbone, "attention"):
            with torch.inference_mode():
                weights = backbone.attention(images[item.index][0][None].to(device))[0, :, 0]
            attention = weights[:, -item.tokens.shape[0] :].unflatten(1, item.grid).cpu()
        yield item, attention, localization.read_truth(notes)


def tqdm_if_terminal(items, total: int):
    return tqdm(items, total=total, disable=not sys.stderr.isatty())


TASKS: dict[str, Callable[..., dict]] = {
    "segmentation": segmentation,
    "depth": depth,
    "correspondence": matching,
    "tracking": tracking,
    "localization": discovery,
}


if __name__ == "__main__":
    run_script(main)
