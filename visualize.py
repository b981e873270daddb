r"""Pictures as PNG: patch tokens, attention, similarity, maps, training views, curves; reports.

    python visualize.py pca --model random:vit_small --images scenes --output pca.png
    python visualize.py attention --model random:vit_small --images scenes --output attention.png
    python visualize.py similarity --model random:vit_small --images scenes --points 20,30 \
        --output similarity.png
    python visualize.py embedding --model random:vit_nano --images scenes --count 100 \
        --output embedding.png
    python visualize.py crops --config configs/quickstart.yaml --images scenes --output crops.png
    python visualize.py masks --config configs/quickstart.yaml --images scenes --output masks.png
    python visualize.py curves --runs runs/quickstart --output curves.png
    python visualize.py report --runs runs/quickstart --output report.html
    python visualize.py predictions --head runs/masks --images scenes --output predictions.png
    python visualize.py text --model runs/align_quickstart --images scenes \
        --query "a striped disc" "a ringed star" --output text.png

pca draws the first three principal components of the patch tokens as red, green and blue. Each
image has its own colours. With --joint a colour means the same in all images. With --basis FILE it
means the same in later pictures too: FILE is written if it does not exist. --foreground leaves out
the side of the first component that touches the border more.
attention draws softmax(q k) of CLS for each head and their mean; registers have maps of their own.
similarity draws the cosine between the patch at each point and all others.
embedding places whole images by their CLS features.
report writes a page for a browser, on one run or on several: curves, probes, pictures, settings.
predictions draws masks, depth or boxes of a head that `eval_dense.py --output DIR` kept. With
--window it goes by overlapping windows; --geotiff FILE.tif writes the map of a `tile:` image.
text draws the cosine of all patches with each query, of a run of align.py; the maps of an image
share one range of colours.
Images keep their aspect, and more pixels give more tokens: --size 448 for photographs,
--size 4096 --window 512 for scans.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.evaluation import EvalDataset
from data.images import ImageData
from data.sources.specs import open_data
from data.sources.tiles import TileImages
from engine.cli import path_argument, preparation, print_result, run_script
from engine.config import TrainConfig, load_config
from engine.distributed import choose_device
from engine.logger import notice, read_metrics
from errors import UserError
from evals.curves import draw_curves
from evals.embedding import draw_embedding, pca_map, tsne_map
from evals.figures import enlarge
from evals.frozen import check_least, class_name
from evals.heads import TrainedHead, load_head
from evals.knn import cls_features
from evals.maps import to_picture
from evals.patches import patch_tokens
from evals.photographs import load_images, read_photographs
from evals.predictions import draw_predictions
from evals.report import write_report
from evals.stitch import stitch, write_geotiff
from evals.token_maps import draw_attention, draw_components, draw_queries, draw_similarity
from evals.views import Views, draw_views, hide_in_crops, make_views
from models.alignment import load_text_model
from models.weights.load import load_backbone

THUMBNAIL = 128  # pixels
SUFFIXES = {"report": ".html"}  # others write .png
MANY = 400  # images of which thumbnails would only hide each other


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    suffix = SUFFIXES.get(arguments.task, ".png")
    if arguments.output.suffix != suffix:
        raise UserError(f"--output is {arguments.output}; give a name that ends in {suffix}")
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
    add = task.add_argument
    add("--joint", action="store_true", help="one set of colours for all images")
    add(
        "--basis",
        type=path_argument,
        metavar="FILE",
        help="colours of FILE, which is written if missing",
    )
    add("--foreground", action="store_true", help="background patches are black")

    task = tasks.add_parser("attention", help="attention of CLS, head by head")
    add_model(task)
    block = "block, from 0 or from the end; by default the last"
    task.add_argument("--layer", type=int, default=-1, help=block)

    task = tasks.add_parser("similarity", help="similarity of all patches to the one at a point")
    add_model(task)
    add_window(task)
    add = task.add_argument
    add("--points", nargs="+", metavar="X,Y", help="pixels of the images, by default the centre")
    add("--across", action="store_true", help="compare all images with points of the first")

    task = tasks.add_parser("embedding", help="a map with similar images side by side")
    add_model(task, count=MANY)
    add = task.add_argument
    add("--method", default="pca", choices=("pca", "tsne"), help="tsne needs scikit-learn")
    add("--points", action="store_true", help=f"no thumbnails, as with more than {MANY} images")
    add("--batch-size", type=int, default=64, help="images a forward pass")

    add_query(tasks.add_parser("text", help="similarity of all patches to words"))

    add_kept(tasks)

    for name, task in tasks.choices.items():
        metavar = f"FILE{SUFFIXES.get(name, '.png')}"
        task.add_argument("--output", type=path_argument, required=True, metavar=metavar)
    return parser.parse_args(argv)


def add_kept(tasks: Any) -> None:
    """The tasks that need no --model: kept heads, configurations, runs."""
    task = tasks.add_parser("predictions", help="masks, depth or boxes of a kept head")
    kept = "folder that eval_dense.py --output wrote"
    task.add_argument("--head", required=True, type=path_argument, metavar="DIR", help=kept)
    add_model(task, required=False)
    add_window(task)
    georeferenced = "also write the map of a tile: image, with its coordinates, in its windows"
    task.add_argument("--geotiff", type=path_argument, metavar="FILE.tif", help=georeferenced)

    for name, text in (("crops", "views of a configuration"), ("masks", "patches that it hides")):
        task = tasks.add_parser(name, help=text)
        task.add_argument("--config", help="a YAML file, by path or by its name in configs/")
        add_images(task)
        example = "for example crops.local_count=4"
        task.add_argument("overrides", nargs="*", metavar="key=value", help=example)

    task = tasks.add_parser("curves", help="losses, probes and health over the steps of runs")
    add_runs(task)
    add_runs(tasks.add_parser("report", help="a page on one run, or on several side by side"))


def add_model(task: argparse.ArgumentParser, count: int = 8, required: bool = True) -> None:
    known = "a run folder, RUN@step, RUN@best, weights, random:vit_small, pixels ..."
    task.add_argument("--model", required=required, help=known)
    add_images(task, count)
    task.add_argument("--size", type=int, help="short side in pixels; by default the model's own")
    task.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def add_runs(task: argparse.ArgumentParser) -> None:
    add = partial(task.add_argument, nargs="+", type=path_argument, required=True)
    add("--runs", metavar="DIR", help="output folders of train.py, overlaid")


def add_window(task: argparse.ArgumentParser) -> None:
    known = "side of the squares that the model gets, for a large --size"
    task.add_argument("--window", type=int, metavar="PIXELS", help=known)


def add_query(task: argparse.ArgumentParser) -> None:
    add_model(task)
    add_window(task)
    task.add_argument("--query", nargs="+", required=True, metavar="WORDS", help="quoted texts")


def add_images(task: argparse.ArgumentParser, count: int = 8) -> None:
    known = "image files, folders or DATA specs"
    task.add_argument("--images", nargs="+", required=True, metavar="PATH", help=known)
    task.add_argument("--count", type=int, default=count, help="at most so many of each PATH")


# What a model computes.


def open_model(
    arguments: argparse.Namespace, load: Callable[[str], nn.Module] = load_backbone
) -> tuple[nn.Module, torch.device, int]:
    """The backbone, its device, and the short side that images are brought to."""
    device = choose_device(arguments.device)
    backbone = load(arguments.model).to(device)
    size = min(backbone.preprocessing.size) if arguments.size is None else arguments.size
    if size < backbone.patch_size:
        raise UserError(f"--size is {size}; the model's patches are {backbone.patch_size} pixels")
    return backbone, device, size


def pca(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    photographs = read_photographs(arguments.images, arguments.count, backbone, size)
    tokens_of = partial(patch_tokens, backbone, device=device, window=arguments.window)
    options = {"joint": arguments.joint, "basis": arguments.basis}
    options["cut_background"] = arguments.foreground
    images = draw_components(arguments.output, photographs, tokens_of, **options)
    return {"model": arguments.model, "images": images, "size": size}


def attention(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    photographs = read_photographs(arguments.images, arguments.count, backbone, size, height=320)
    found = draw_attention(arguments.output, photographs, backbone, device, arguments.layer)
    result = {"model": arguments.model, "images": found.pop("images"), "size": size}
    return result | {"layer": arguments.layer} | found


def similarity(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    photographs = read_photographs(arguments.images, arguments.count, backbone, size)
    tokens_of = partial(patch_tokens, backbone, device=device, window=arguments.window)
    options = {"points": arguments.points, "across": arguments.across}
    options |= {"size": size, "patch_size": backbone.patch_size}
    found = draw_similarity(arguments.output, photographs, tokens_of, **options)
    result = {"model": arguments.model, "images": found.pop("images"), "size": size}
    return result | {"points": arguments.points} | found


def text(arguments: argparse.Namespace) -> dict:
    model, device, size = open_model(arguments, load_text_model)
    photographs = read_photographs(arguments.images, arguments.count, model, size)
    queries, window = arguments.query, arguments.window
    found = draw_queries(arguments.output, photographs, model, queries, window)
    result = {"model": arguments.model, "images": found.pop("images"), "size": size}
    return result | {"query": queries} | found


@torch.inference_mode()
def embedding(arguments: argparse.Namespace) -> dict:
    backbone, device, size = open_model(arguments)
    check_least(arguments, 1, "batch_size")
    wanted = preparation(backbone.preprocessing, None, None if arguments.size is None else [size])
    images = named_squares(arguments, wanted)
    features, names, thumbnails = [], [], []
    while batch := list(islice(images, arguments.batch_size)):
        pixels = torch.stack([image for _, image in batch])
        features.append(cls_features(backbone, pixels.to(device)).cpu())
        names += [name for name, _ in batch]
        if not arguments.points and len(names) <= MANY:
            pictures = [to_picture(image, wanted["mean"], wanted["std"]) for image in pixels]
            thumbnails += [enlarge(picture, THUMBNAIL) for picture in pictures]
    if len(thumbnails) < len(names):
        thumbnails = []
    make_map = tsne_map if arguments.method == "tsne" else pca_map
    positions, axis_labels = make_map(torch.cat(features))
    draw_embedding(arguments.output, positions, names, thumbnails, axis_labels)
    result = {"model": arguments.model, "images": len(names), "size": size}
    return result | {"method": arguments.method, "classes": len(set(names) - {""})}


def predictions(arguments: argparse.Namespace) -> dict:
    trained = load_head(arguments.head, arguments.model, choose_device(arguments.device))
    size = min(trained.settings.size) if arguments.size is None else arguments.size
    result = {"head": str(arguments.head), "size": size}
    check_least(arguments, trained.settings.patch_size, "window")
    stitches = arguments.window is not None or arguments.geotiff is not None
    if stitches and trained.settings.task == "detection":
        raise UserError("--window and --geotiff are for maps, and this head predicts boxes")
    if arguments.geotiff is not None:
        return result | geotiff(arguments, trained, size)
    options = {"size": size, "height": 320}
    photographs = read_photographs(arguments.images, arguments.count, trained.backbone, **options)
    predict = None
    if arguments.window is not None:
        p = trained.settings.patch_size
        side = arguments.window // p * p
        predict = lambda images: stitch(trained, images[0], side)[None]  # noqa: E731
    return result | {"images": draw_predictions(arguments.output, photographs, trained, predict)}


def geotiff(arguments: argparse.Namespace, trained: TrainedHead, size: int) -> dict:
    data = open_data(arguments.images[0], trained.backbone.in_channels)
    if not isinstance(data, TileImages) or len(arguments.images) > 1:
        given = " ".join(arguments.images)
        raise UserError(f"--geotiff takes one image as tile:FILE.tif?size=512, not {given}")
    window = arguments.window or data.size
    photograph, found = write_geotiff(arguments.geotiff, data, trained, window, size)
    drawn = draw_predictions(arguments.output, [photograph], trained, lambda images: found[None])
    return {"images": drawn, "window": window, "geotiff": str(arguments.geotiff)}


def named_squares(arguments: argparse.Namespace, wanted: dict) -> Iterator[tuple[str, Tensor]]:
    """Class name, else the spec where there are several, and image (C, h, w) as for k-NN."""

    def prepare(data: ImageData) -> Callable[[int], Tensor]:
        items = EvalDataset(data, **wanted)
        return lambda index: items[index][0]

    several = len(arguments.images) > 1
    channels, count = len(wanted["mean"]), arguments.count
    for spec, data, index, image in load_images(arguments.images, channels, count, prepare):
        yield class_name(data, index) or (spec if several else ""), image


# What a model trains on.


def open_views(arguments: argparse.Namespace) -> tuple[TrainConfig, Views]:
    # --images takes every word after it, key=value too. In a spec, = follows a question mark.
    paths, overrides = [], list(arguments.overrides)
    for text in arguments.images:
        is_path = Path(text).exists() or "=" not in text.partition("?")[0]
        (paths if is_path else overrides).append(text)
    cfg = load_config(arguments.config, overrides)
    return cfg, make_views(cfg, list(load_images(paths, cfg.data.channels, arguments.count)))


def crops(arguments: argparse.Namespace) -> dict:
    cfg, views = open_views(arguments)
    draw_views(arguments.output, views, views.crops)
    images = len(views.images)
    return {"config": arguments.config, "images": images, "policy": cfg.crops.policy}


def masks(arguments: argparse.Namespace) -> dict:
    """The global crops as the student gets them: some have hidden patches."""
    cfg, views = open_views(arguments)
    if cfg.loss.ibot.weight == 0:
        notice("loss.ibot.weight is 0: this configuration hides nothing; drawn as if it did")
    pictures, drawn = hide_in_crops(cfg, views)
    draw_views(arguments.output, views, pictures)
    result = {"config": arguments.config, "images": len(pictures), "grid": list(drawn.shape[1:])}
    masked = int(drawn.flatten(1).any(dim=1).sum())
    return result | {"masked_crops": masked, "hidden": round(drawn.float().mean().item(), 4)}


def named_runs(arguments: argparse.Namespace) -> dict[str, Path]:
    """Name -> run folder: its last part, or the paths as given where two of these are the same."""
    names = [path.resolve().name for path in arguments.runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in arguments.runs]
    for path in arguments.runs:
        if not read_metrics(path / "metrics.jsonl"):
            raise FileNotFoundError(f"{path} holds no metrics.jsonl with records of a run")
    return dict(zip(names, arguments.runs, strict=True))


def curves(arguments: argparse.Namespace) -> dict:
    folders = named_runs(arguments)
    runs = {name: read_metrics(path / "metrics.jsonl") for name, path in folders.items()}
    draw_curves(arguments.output, runs)
    return {"runs": [str(path) for path in arguments.runs]}


def report(arguments: argparse.Namespace) -> dict:
    write_report(arguments.output, named_runs(arguments))
    return {"runs": [str(path) for path in arguments.runs]}


DRAWN = pca, attention, similarity, text, embedding, predictions, crops, masks, curves, report
TASKS = {task.__name__: task for task in DRAWN}

if __name__ == "__main__":
    run_script(main)
