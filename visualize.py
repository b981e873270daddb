"""Pictures, to PNG: what patch tokens see, the views that training takes, curves over runs.

    python visualize.py pca    --model random:vit_small --images "scenes?split=val" --output pca.png
    python visualize.py crops  --config configs/quickstart.yaml --images scenes --output crops.png
    python visualize.py curves --runs runs/quickstart --output curves.png

pca draws the first three principal components of the patch tokens as red, green and blue. Images
keep their aspect; more pixels give more tokens: --size 448 for large photographs. Each image has
its own colours; with --joint one colour means the same in all of them. --foreground leaves out the
side of the first component that touches the border more.
"""

import argparse
import math
from itertools import compress
from pathlib import Path
from typing import Iterator, Optional, Sequence

import torch
from torch import Tensor

from data.augment import channel_statistics, multi_crop_from, normalize, resize, to_unit
from data.datasets import open_data
from engine.cli import print_result, run_script
from engine.config import load_config
from engine.distributed import choose_device
from engine.figures import (
    draw_curves, draw_report, draw_sheet, enlarge, foreground, pca_basis, pca_image, to_picture,
)  # fmt: skip
from engine.logger import read_metrics
from models.features import Features
from models.pretrained import load_backbone


def main(argv: Optional[list[str]] = None) -> None:
    arguments = parse(argv)
    if arguments.output.suffix != ".png":
        raise ValueError(f"--output is {arguments.output}; give a name that ends in .png")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    details = {"pca": pca, "crops": crops, "curves": curves}[arguments.task](arguments)
    print_result({"task": arguments.task, **details, "output": str(arguments.output)})


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    tasks = parser.add_subparsers(dest="task", required=True)

    task = tasks.add_parser("pca", help="principal components of patch tokens as colours")
    known = "a run folder, RUN@step, RUN@best, weights, random:vit_small, pixels ..."
    task.add_argument("--model", required=True, help=known)
    add_images(task)
    task.add_argument("--size", type=int, help="short side in pixels; by default the model's own")
    task.add_argument("--joint", action="store_true", help="one set of colours for all images")
    task.add_argument("--foreground", action="store_true", help="background patches are black")
    task.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")

    task = tasks.add_parser("crops", help="the views that a configuration trains on")
    task.add_argument("--config", help="a YAML file, by path or by its name in configs/")
    add_images(task)
    example = "for example crops.local_count=4"
    task.add_argument("overrides", nargs="*", metavar="key=value", help=example)

    task = tasks.add_parser("curves", help="losses, probes and health over the steps of runs")
    known = "output folders of train.py"
    task.add_argument("--runs", nargs="+", type=Path, required=True, metavar="DIR", help=known)

    for task in tasks.choices.values():
        task.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    return parser.parse_args(argv)


def add_images(task: argparse.ArgumentParser) -> None:
    known = "image files, folders or DATA specs"
    task.add_argument("--images", nargs="+", required=True, metavar="PATH", help=known)
    task.add_argument("--count", type=int, default=8, help="at most so many images of each PATH")


def pca(arguments: argparse.Namespace) -> dict:
    device = choose_device(arguments.device)
    backbone = load_backbone(arguments.model).to(device)
    wanted = backbone.preprocessing
    size = min(wanted.size) if arguments.size is None else arguments.size
    images = load_images(arguments.images, len(wanted.mean), arguments.count)
    images = [fit(image, size, backbone.patch_size, wanted.interpolation) for image in images]
    images = [normalize(to_unit(image).clone(), wanted.mean, wanted.std) for image in images]
    with torch.inference_mode():
        features = [backbone(image[None].to(device)) for image in images]
    pictures = pca_pictures(features, arguments.joint, arguments.foreground)
    height = max(224, 4 * max(len(picture) for picture in pictures))
    photographs = [enlarge(to_picture(image, wanted.mean, wanted.std), height) for image in images]
    pictures = [enlarge(picture, height, smooth=False) for picture in pictures]
    pairs = [list(pair) for pair in zip(photographs, pictures)]
    across = max(1, round(math.sqrt(len(pairs) / 2)))  # pairs are twice as wide as high
    rows = [sum(pairs[i : i + across], []) for i in range(0, len(pairs), across)]
    draw_sheet(arguments.output, rows, ["image", "PCA of patches"] * min(across, len(pairs)))
    return {"model": arguments.model, "images": len(images), "size": size}


def fit(image: Tensor, size: int, patch_size: int, interpolation: str) -> Tensor:
    """Short side to `size` pixels in the same aspect, then the centre that whole patches cover.

    The model would cut or pad the rest away: so that picture and patch grid agree, it is cut here.

    Raises:
        ValueError: if that is less than a patch.
    """
    if size < patch_size:
        raise ValueError(f"--size is {size}; the model's patches are {patch_size} pixels")
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    image = resize(image, (round(height * scale), round(width * scale)), interpolation)
    height, width = (side // patch_size * patch_size for side in image.shape[-2:])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[:, top : top + height, left : left + width]


def pca_pictures(features: Sequence[Features], joint: bool, without_background: bool) -> list:
    """One picture an image, from a basis of its own or of all images."""
    patches = [item.patches[0].cpu() for item in features]
    keeps = [torch.ones(len(tokens), dtype=torch.bool) for tokens in patches]
    if without_background:
        keeps = [foreground(tokens, item.grid) for tokens, item in zip(patches, features)]
    counted = [tokens[keep] for tokens, keep in zip(patches, keeps)]
    if joint:
        bases = [pca_basis(torch.cat(counted))] * len(patches)
    else:
        bases = [pca_basis(tokens) for tokens in counted]
    grids = [item.grid for item in features]
    return [pca_image(*of_one) for of_one in zip(patches, grids, bases, keeps)]


def crops(arguments: argparse.Namespace) -> dict:
    # --images takes whatever follows it, a key=value too; in a spec, = comes after a question mark.
    is_path = [Path(text).exists() or "=" not in text.partition("?")[0] for text in arguments.images]
    paths = list(compress(arguments.images, is_path))
    swallowed = [text for text in arguments.images if text not in paths]
    cfg = load_config(arguments.config, arguments.overrides + swallowed)
    mean, std = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    images = list(load_images(paths, cfg.data.channels, arguments.count))
    views = multi_crop_from(cfg.crops, mean, std).examples(images, cfg.seed)
    normalised = [normalize(to_unit(image).clone(), mean, std) for image in images]
    draw_report(arguments.output, normalised, crops=views, mean=mean, std=std, height=192)
    return {"config": arguments.config, "images": len(images), "policy": cfg.crops.policy}


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


def load_images(specs: Sequence[str], channels: int, count: int) -> Iterator[Tensor]:
    """(channels, H, W) in the stored type, the first `count` of each spec."""
    if count < 1 or not specs:
        raise ValueError(f"--count is {count} and --images names {len(specs)}; give at least 1 of both")
    for spec in specs:
        data = open_data(spec, channels)
        yield from (data.image(i) for i in range(min(count, len(data))))


if __name__ == "__main__":
    run_script(main)
