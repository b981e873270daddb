"""Pictures, to PNG: what patch tokens see, where CLS looks, what resembles a point, what training shows, curves.

    python visualize.py pca        --model random:vit_small --images scenes --output pca.png
    python visualize.py attention  --model random:vit_small --images scenes --output attention.png
    python visualize.py similarity --model random:vit_small --images scenes --points 20,30 --output similarity.png
    python visualize.py embedding  --model random:vit_nano --images scenes --count 100 --output embedding.png
    python visualize.py crops      --config configs/quickstart.yaml --images scenes --output crops.png
    python visualize.py masks      --config configs/quickstart.yaml --images scenes --output masks.png
    python visualize.py curves     --runs runs/quickstart --output curves.png

pca draws the first three principal components of the patch tokens as red, green and blue. Each image has its own
colours; with --joint one colour means the same in all of them, with --basis FILE also in later pictures: FILE is
written where there is none. --foreground leaves out the side of the first component that touches the border more.
attention draws softmax(q k) of CLS for each head and their mean; registers are left out and have maps of their own.
similarity draws the cosine between the patch at each point and all others; by default the centre's.
embedding places whole images by their CLS features.
Images keep their aspect; more pixels give more tokens: --size 448 for photographs, --size 4096 --window 512 for scans.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import channel_statistics
from data.loader import EvalDataset
from data.masking import draw_masks
from data.pictures import UnreadableImage
from data.pixels import normalize, resize, to_unit
from data.sources.specs import ImageData, open_data
from engine.cli import preparation, print_result, run_script
from engine.config import TrainConfig, load_config
from engine.distributed import choose_device
from engine.logger import notice, read_metrics
from engine.validation import size_pair
from engine.views import guidance_from, multi_crop_from
from errors import UserError
from evals.figures import (
    draw_curves,
    draw_embedding,
    draw_groups,
    draw_report,
    draw_sheet,
    enlarge,
    mark,
    pack,
)
from evals.maps import (
    PCABasis,
    Picture,
    attention_image,
    cosine_maps,
    foreground,
    heat_picture,
    hide_patches,
    load_basis,
    patch_tokens,
    pca_basis,
    pca_image,
    pca_map,
    prefix_attention,
    save_basis,
    to_picture,
)  # fmt: skip
from models.weights.load import load_backbone

LONGEST = 16  # times the short side: a strip of one pixel by thousands would become millions
THUMBNAIL = 128  # pixels
MANY = 400  # images of which thumbnails would only hide each other


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.output.suffix != ".png":
        raise UserError(f"--output is {arguments.output}; give a name that ends in .png")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    details = TASKS[arguments.task](arguments)
    print_result({"task": arguments.task, **details, "output": str(arguments.output)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    tasks = parser.add_subparsers(dest="task", required=True)

    task = tasks.add_parser("pca", help="principal components of patch tokens as colours")
    add_model(task)
    add_window(task)
    task.add_argument("--joint", action="store_true", help="one set of colours for all images")
    task.add_argument(
        "--basis",
        type=Path,
        metavar="FILE",
        help="colours of FILE; from these images if there is none",
    )
    task.add_argument("--foreground", action="store_true", help="background patches are black")

    task = tasks.add_parser("attention", help="where CLS looks, head by head")
    add_model(task)
    task.add_argument(
        "--layer", type=int, default=-1, help="block, from 0 or from the end; by default the last"
    )

    task = tasks.add_parser("similarity", help="patches that resemble the one at a point")
    add_model(task)
    add_window(task)
    task.add_argument(
        "--points",
        nargs="+",
        metavar="X,Y",
        help="pixels of the original images, by default the centre",
    )
    task.add_argument(
        "--across", action="store_true", help="points of the first image are sought in all"
    )

    task = tasks.add_parser(
        "embedding", help="a map on which images that look alike to the model are neighbours"
    )
    add_model(task, count=MANY)
    task.add_argument(
        "--method", default="pca", choices=("pca", "tsne"), help="tsne needs scikit-learn"
    )
    task.add_argument(
        "--points", action="store_true", help=f"no thumbnails, as with more than {MANY} images"
    )
    task.add_argument("--batch-size", type=int, default=64, help="images a forward pass")

    for name, text in (
        ("crops", "the views that a configuration trains on"),
        ("masks", "what it hides of them"),
    ):
        task = tasks.add_parser(name, help=text)
        task.add_argument("--config", help="a YAML file, by path or by its name in configs/")
        add_images(task)
        task.add_argument(
            "overrides", nargs="*", metavar="key=value", help="for example crops.local_count=4"
        )

    task = tasks.add_parser("curves", help="losses, probes and health over the steps of runs")
    task.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="output folders of train.py, overlaid",
    )

    for task in tasks.choices.values():
        task.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    return parser.parse_args(argv)


def add_model(task: argparse.ArgumentParser, count: int = 8) -> None:
    known = "a run folder, RUN@step, RUN@best, weights, random:vit_small, pixels ..."
    task.add_argument("--model", required=True, help=known)
    add_images(task, count)
    task.add_argument("--size", type=int, help="short side in pixels; by default the model's own")
    task.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def add_window(task: argparse.ArgumentParser) -> None:
    task.add_argument(
        "--window",
        type=int,
        metavar="PIXELS",
        help="look through squares of that side, where --size is large",
    )


def add_images(task: argparse.ArgumentParser, count: int = 8) -> None:
    known = "image files, folders or DATA specs"
    task.add_argument("--images", nargs="+", required=True, metavar="PATH", help=known)
    task.add_argument(
        "--count", type=int, default=count, help="at most so many images of each PATH"
    )


# ----------------------------------------------------------------- images


def load_images(
    specs: Sequence[str],
    channels: int,
    count: int,
    prepare: Callable[[ImageData], Callable] = lambda data: data.image,
) -> Iterator[tuple[str, ImageData, int, Tensor]]:
    """Spec, data, index and image of the first `count` of each spec; what cannot be read is named and passed over.

    Args:
        prepare: makes of a data set the function from index to image; by default (channels, H, W) in the stored type.
    """
    if count < 1 or not specs:
        raise UserError(
            f"--count is {count} and --images names {len(specs)}; give at least 1 of both"
        )
    found, reason = 0, None
    for spec, data in [(spec, open_data(spec, channels)) for spec in specs]:
        image_at = prepare(data)
        for index in range(min(count, len(data))):
            try:
                image = image_at(index)
            except UnreadableImage as error:
                reason = error
                notice(f"left out: {error}")
                continue
            found += 1
            yield spec, data, index, image
    if not found:
        raise UserError(
            f"none of the images of {' '.join(specs)} could be read; the last: {reason}"
        )


def open_model(arguments: argparse.Namespace) -> tuple[nn.Module, torch.device, int]:
    """The backbone, its device, and the short side that images are brought to."""
    device = choose_device(arguments.device)
    backbone = load_backbone(arguments.model).to(device)
    size = min(backbone.preprocessing.size) if arguments.size is None else arguments.size
    if size < backbone.patch_size:
        raise UserError(f"--size is {size}; the model's patches are {backbone.patch_size} pixels")
    return backbone, device, size


def prepared(
    arguments: argparse.Namespace, backbone: nn.Module, size: int, height: int = 224
) -> Iterator[tuple[str, tuple[int, int], Tensor, Picture]]:
    """One image at a time: name, original (H, W), what the model gets (C, h, w), and that as a picture.

    Pictures are `height` pixels high, or four a patch where that is more.
    """
    wanted = backbone.preprocessing
    for _, data, index, image in load_images(arguments.images, len(wanted.mean), arguments.count):
        name = data.name(index)
        original = tuple(image.shape[-2:])
        if max(original) > LONGEST * min(original):
            height, width = original
            raise UserError(
                f"{name} is {width} x {height} pixels; the longest that is drawn is 1 : {LONGEST}"
            )
        image = fit(image, size, backbone.patch_size, wanted.interpolation)
        image = normalize(unit_copy(image), wanted.mean, wanted.std)
        picture = to_picture(image, wanted.mean, wanted.std)
        yield (
            name,
            original,
            image,
            enlarge(picture, max(height, 4 * (size // backbone.patch_size))),
        )


def fit(image: Tensor, size: int, patch_size: int, interpolation: str) -> Tensor:
    """Short side to `size` pixels in the same aspect, then the centre that whole patches cover.

    The model would cut or pad the rest away: so that picture and patch grid agree, it is cut here.
    """
    resized, kept = fitted_size(tuple(image.shape[-2:]), size, patch_size)
    top, left = ((before - after) // 2 for before, after in zip(resized, kept))
    return resize(image, resized, interpolation)[:, top : top + kept[0], left : left + kept[1]]


def unit_copy(image: Tensor) -> Tensor:
    """`to_unit`, never the image itself: what follows works in place."""
    return to_unit(image).clone() if image.is_floating_point() else to_unit(image)


def fitted_size(
    original: tuple[int, int], size: int, patch_size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(H, W) after resizing, and what is kept of it."""
    resized = tuple(round(side * size / min(original)) for side in original)
    return resized, tuple(side // patch_size * patch_size for side in resized)


# ----------------------------------------------------------------- what a model sees


def pca(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    photographs, tokens, grids = [], [], []
    for _, _, image, photograph in prepared(arguments, backbone, size):
        patches, grid = patch_tokens(backbone, image, device, arguments.window)
        photographs.append(photograph)
        tokens.append(patches)
        grids.append(grid)
    keeps = [torch.ones(len(patches), dtype=torch.bool) for patches in tokens]
    if arguments.foreground:
        keeps = [foreground(*of_one) for of_one in zip(tokens, grids)]
    bases = choose_bases([patches[keep] for patches, keep in zip(tokens, keeps)], arguments)
    maps = [pca_image(*of_one) for of_one in zip(tokens, grids, bases, keeps)]
    groups = [
        [photo, enlarge(map, len(photo), smooth=False)] for photo, map in zip(photographs, maps)
    ]
    draw_groups(arguments.output, groups, ["image", "PCA of patches"])
    return {"model": arguments.model, "images": len(groups), "size": size}


def choose_bases(tokens: list[Tensor], arguments: argparse.Namespace) -> list[PCABasis]:
    """One basis for each image's tokens (n, D): its own, that of all, or that of the file."""
    if arguments.basis is None and not arguments.joint:
        return [pca_basis(patches) for patches in tokens]
    if arguments.basis is None or not arguments.basis.exists():
        basis = pca_basis(torch.cat(tokens))
        if arguments.basis is not None:
            save_basis(arguments.basis, basis)
            notice(f"colours of these images written to {arguments.basis}")
        return [basis] * len(tokens)
    basis = load_basis(arguments.basis)
    if len(basis.mean) != tokens[0].shape[1]:
        raise UserError(
            f"{arguments.basis} was made from tokens of {len(basis.mean)} numbers; "
            f"those of {arguments.model} have {tokens[0].shape[1]}"
        )
    return [basis] * len(tokens)


def attention(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    rows, shares = [], []
    for _, _, image, photograph in prepared(arguments, backbone, size, height=320):
        weights, features = prefix_attention(backbone, image[None].to(device), arguments.layer)
        weights, grid, prefix = weights[0].cpu(), features.grid, weights.shape[2]
        heads = attention_image(weights, grid, prefix)
        registers = [
            attention_image(weights, grid, prefix, row).mean(dim=0) for row in range(1, prefix)
        ]
        row = [
            photograph,
            sheet_of([heads.mean(dim=0)], len(photograph)),
            sheet_of(heads, len(photograph)),
        ]
        rows.append(row + ([sheet_of(registers, len(photograph))] if registers else []))
        shares.append(
            [part.sum(dim=1).mean() for part in weights[:, 0].tensor_split([1, prefix], dim=1)]
        )
    headings = [
        "image",
        f"CLS, mean of {len(heads)} heads",
        "CLS, each head",
        "each register, mean of heads",
    ]
    draw_sheet(arguments.output, rows, headings[: len(rows[0])])
    shares = torch.tensor(shares).mean(dim=0).tolist()
    attended = {
        part: round(share, 4) for part, share in zip(("cls", "registers", "patches"), shares)
    }
    result = {"model": arguments.model, "images": len(rows), "size": size, "layer": arguments.layer}
    return result | {"heads": len(heads), "cls_attends_to": attended}


def sheet_of(maps: Sequence[Tensor], height: int) -> Picture:
    """Maps (h, w) of one image, each from its own least to its own largest value, packed into one picture."""
    return pack(
        [heat_picture(values) for values in maps], math.isqrt(len(maps)), height, smooth=False
    )


def similarity(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    points = None if arguments.points is None else [parse_point(text) for text in arguments.points]
    queries, groups, ranges = None, [], []
    for name, original, image, photograph in prepared(arguments, backbone, size):
        patches, grid = patch_tokens(backbone, image, device, arguments.window)
        maps, places = [], []
        if queries is None or not arguments.across:
            cells = [
                patch_at(point, name, original, size, grid, backbone.patch_size)
                for point in points or [None]
            ]
            queries = patches[[y * grid[1] + x for y, x in cells]]
            down, right = len(photograph) / grid[0], photograph.shape[1] / grid[1]
            places = [((x + 0.5) * right, (y + 0.5) * down) for y, x in cells]
        for number, values in enumerate(cosine_maps(queries, patches)):
            ranges.append((values.min(), values.max()))
            map = enlarge(heat_picture(values.view(grid)), len(photograph), smooth=False)
            maps.append(mark(map, places[number : number + 1], first=number))
        groups.append([mark(photograph, places), *maps])
    names = (
        ["similarity to the centre"]
        if points is None
        else [f"to {text}" for text in arguments.points]
    )
    draw_groups(arguments.output, groups, ["image", *names])
    low, high = torch.tensor(ranges).unbind(1)
    result = {
        "model": arguments.model,
        "images": len(groups),
        "size": size,
        "points": arguments.points,
    }
    return result | {"cosine": [round(float(low.min()), 4), round(float(high.max()), 4)]}


def parse_point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--points has {text!r}; give X,Y in pixels of the original image, such as 120,80"
        ) from error
    return x, y


def patch_at(
    point: tuple[float, float] | None,
    name: str,
    original: tuple[int, int],
    size: int,
    grid: tuple[int, int],
    patch_size: int,
) -> tuple[int, int]:
    """Row and column of the patch at a point (x, y) of the original (H, W); None is the centre.

    Raises:
        UserError: if the point lies outside the image.
    """
    height, width = original
    x, y = (width / 2, height / 2) if point is None else point
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"the point {x:g},{y:g} is outside of {name}, which is {width} x {height} pixels"
        )
    resized, kept = fitted_size(original, size, patch_size)
    place = []
    for coordinate, before, after, cut, count in zip((y, x), original, resized, kept, grid):
        patch = int((coordinate * after / before - (after - cut) // 2) // patch_size)
        place.append(
            min(max(patch, 0), count - 1)
        )  # a point in the rim that was cut takes the nearest patch
    return place[0], place[1]


@torch.inference_mode()
def embedding(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    wanted = preparation(backbone.preprocessing, None, None if arguments.size is None else [size])
    images = squares(arguments, wanted)
    features, names, thumbnails = [], [], []
    for batch in iter(lambda: list(islice(images, arguments.batch_size)), []):
        pixels = torch.stack([image for _, image in batch])
        features.append(F.normalize(backbone(pixels.to(device)).cls.float(), dim=1).cpu())
        names += [name for name, _ in batch]
        if not arguments.points and len(names) <= MANY:
            thumbnails += [
                enlarge(to_picture(image, wanted["mean"], wanted["std"]), THUMBNAIL)
                for image in pixels
            ]
    positions, axis_labels = (tsne_map if arguments.method == "tsne" else pca_map)(
        torch.cat(features)
    )
    draw_embedding(
        arguments.output,
        positions,
        names,
        thumbnails if len(thumbnails) == len(names) else (),
        axis_labels,
    )
    result = {
        "model": arguments.model,
        "images": len(names),
        "size": size,
        "method": arguments.method,
    }
    return result | {"classes": len(set(names) - {""})}


def squares(arguments: argparse.Namespace, wanted: dict) -> Iterator[tuple[str, Tensor]]:
    """Class name, else the spec where there are several, and image (C, h, w) prepared as for k-NN."""

    def prepare(data: ImageData) -> Callable[[int], Tensor]:
        items = EvalDataset(data, **wanted)
        return lambda index: items[index][0]

    several = len(arguments.images) > 1
    for spec, data, index, image in load_images(
        arguments.images, len(wanted["mean"]), arguments.count, prepare
    ):
        yield class_name(data, index) or (spec if several else ""), image


def class_name(data: ImageData, index: int) -> str:
    label = -1 if data.labels is None else int(data.labels[index])
    return "" if label < 0 else str(label) if data.classes is None else data.classes[label]


def tsne_map(features: Tensor) -> tuple[np.ndarray, tuple[str, str]]:
    """scikit-learn's t-SNE, which begins from the first two components and seed 0: the same features, the same map."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        wanted = "--method tsne needs scikit-learn: pip install scikit-learn"
        raise UserError(f"{wanted} ({error}); --method pca needs nothing") from error
    if len(features) < 4:
        raise UserError(
            f"--method tsne needs at least 4 images, not {len(features)}; --method pca takes any number"
        )
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(
        features.numpy()
    ), ("", "")


# ----------------------------------------------------------------- what a model is shown


def crops(arguments: argparse.Namespace) -> dict:
    cfg, images, views, mean, std = views_of(arguments)
    normalised = [normalize(unit_copy(image), mean, std) for image in images]
    draw_report(arguments.output, normalised, crops=views, mean=mean, std=std, height=192)
    return {"config": arguments.config, "images": len(images), "policy": cfg.crops.policy}


def masks(arguments: argparse.Namespace) -> dict:
    """The global crops as the student gets them: of some of them patches are hidden, of the others none."""
    cfg, images, views, mean, std = views_of(arguments)
    ibot, count = cfg.loss.ibot, cfg.crops.global_count
    if ibot.weight == 0:
        notice("loss.ibot.weight is 0: this configuration hides nothing; drawn as if it were not")
    grid = tuple(side // cfg.model.patch_size for side in size_pair(cfg.crops.global_size))
    drawn = draw_masks(
        count * len(images), grid, ibot.mask_probability, ibot.mask_ratio, (cfg.seed,)
    )
    of_image = drawn.view(count, len(images), *grid).transpose(0, 1)  # they come crop-major
    hidden = [
        [
            hide_patches(to_picture(crop, mean, std), mask)
            for crop, mask in zip(crops_of_one, masks_of_one)
        ]
        for crops_of_one, masks_of_one in zip(views, of_image)
    ]
    normalised = [normalize(unit_copy(image), mean, std) for image in images]
    draw_report(arguments.output, normalised, crops=hidden, mean=mean, std=std, height=192)
    result = {"config": arguments.config, "images": len(images), "grid": list(grid)}
    return result | {
        "masked_crops": int(drawn.any(dim=1).sum()),
        "hidden": round(drawn.float().mean().item(), 4),
    }


def views_of(
    arguments: argparse.Namespace,
) -> tuple[TrainConfig, list[Tensor], list[list[Tensor]], tuple, tuple]:
    """The configuration, the images, the normalised views of each (globals first), and the mean and std of both."""
    # --images takes whatever follows it, a key=value too; in a spec, = comes after a question mark.
    is_path = [
        Path(text).exists() or "=" not in text.partition("?")[0] for text in arguments.images
    ]
    paths = list(compress(arguments.images, is_path))
    swallowed = [text for text in arguments.images if text not in paths]
    cfg = load_config(arguments.config, arguments.overrides + swallowed)
    mean, std = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    loaded = list(load_images(paths, cfg.data.channels, arguments.count))
    images = [image for *_, image in loaded]
    multi_crop, guidance, targets = (
        multi_crop_from(cfg.crops, mean, std),
        guidance_from(cfg.crops),
        None,
    )
    if (
        guidance is not None
    ):  # which way crops follow marks, by place in this list instead of place in a run's stream
        counts = multi_crop.globals, multi_crop.crops
        targets = [
            guidance.targets(data, index, k, cfg.seed, *counts)
            for k, (_, data, index, _) in enumerate(loaded)
        ]
    return cfg, images, multi_crop.examples(images, cfg.seed, targets), mean, std


def curves(arguments: argparse.Namespace) -> dict:
    names = [path.resolve().name for path in arguments.runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in arguments.runs]
    runs = {name: read_metrics(path / "metrics.jsonl") for name, path in zip(names, arguments.runs)}
    for name, path in zip(names, arguments.runs):
        if not runs[name]:
            raise FileNotFoundError(f"{path} holds no metrics.jsonl with records of a run")
    draw_curves(arguments.output, runs)
    return {"runs": [str(path) for path in arguments.runs]}


TASKS = {
    task.__name__: task for task in (pca, attention, similarity, embedding, crops, masks, curves)
}

if __name__ == "__main__":
    run_script(main)
