r"""What texts find: classes without examples, pictures by captions, segments by names.

    python eval_text.py classify --model runs/align_quickstart \
        --data "scenes?split=val&size=1000"
    python eval_text.py retrieve --model runs/align_quickstart \
        --data "scenes?split=val&size=200"
    python eval_text.py segment --model runs/align_quickstart \
        --data "scenes?split=val&size=100"

MODEL is a run of align.py. A class is the mean of its names in all templates (CLIP); its names are
its label in words, or those in --classes FILE.csv with the columns label and name, of which a class
may have several rows. --templates FILE.txt holds a line each, with {} for the name; `openai` stands
for CLIP's 80, from the package open_clip_torch.

classify: the nearest class of each image.
retrieve: recall at 1, 5 and 10; an image counts if any of its captions is found.
segment: the nearest class of each pixel by the patches' half of the vectors, no head, mIoU. Images
have --size on their short side, windows of --window pixels begin every --stride. Class 0 of a mask
is left out; class k is the k-th label (protocol of dino.txt on ADE20k: 512, 384, 192).
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from data.annotated import Annotated
from data.captions import with_captions
from data.images import ImageData, class_names
from data.sources.specs import open_data, open_with_labels
from data.sources.tables import read_csv
from engine import distributed
from engine.cli import evaluation_parser, path_argument, run_script
from engine.logger import notice, say_passed_over
from engine.pairs import read_tokens
from errors import UserError
from evals.alignment import describe_tokens, image_vectors, say_cut
from evals.frozen import FrozenModel, check_least, progress_bar, run_evaluation
from evals.knn import FeatureRows
from evals.patches import confusion, mean_iou, upsample
from evals.reading import read_batches
from evals.zero_shot import (
    read_names,
    read_templates,
    recall,
    top_accuracy,
    window_scores,
)
from models.alignment import load_text_model

HELP = {
    "classify": "accuracy by the names of the classes",
    "retrieve": "recall of captions and images",
    "segment": "mIoU by the names of the classes",
}


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    task = {"classify": classify, "retrieve": retrieve, "segment": segment}[arguments.task]
    open_model = partial(FrozenModel, load=load_text_model)
    run_evaluation(arguments, open_model, partial(task, arguments))


def parse(argv: list[str] | None) -> argparse.Namespace:
    looks = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**looks)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, text in HELP.items():
        parents = [evaluation_parser("")]
        task = tasks.add_parser(name, help=text, parents=parents, add_help=False, **looks)
        task.add_argument("--data", required=True, help="DATA with labels, captions or masks")
        if name != "segment":
            cached = "folder of `extract.py --features cls mean` of --data, in place of images"
            task.add_argument("--features", metavar="DIR", help=cached)
        if name != "retrieve":
            add = task.add_argument
            add("--classes", type=path_argument, metavar="FILE.csv", help="names of the labels")
            add("--templates", metavar="FILE.txt", help="sentences with {}, or openai")
    add = tasks.choices["segment"].add_argument
    add("--window", type=int, help="side in pixels; by default the short side of the image")
    add("--stride", type=int, help="in pixels; by default half a window")
    arguments = parser.parse_args(argv)
    check_least(arguments, 1, "batch_size")
    if arguments.task == "segment":
        check_least(arguments, 1, "window", "stride")
        if arguments.resize is not None or len(arguments.size or [1]) > 1:
            raise UserError("segment keeps whole images: give their short side by --size alone")
    return arguments


def prompts(
    arguments: argparse.Namespace, model: FrozenModel, labels: list[str], half: str
) -> Tensor:
    """(K, E): a vector for each label."""
    names = read_names(arguments.classes, labels)
    templates = read_templates(arguments.templates)
    return model.backbone.encode_classes(names, templates, half)


def vectors_of(arguments: argparse.Namespace, model: FrozenModel, data: ImageData) -> FeatureRows:
    """Of the images, or of features in files; on rank 0."""
    if arguments.features is None:
        return model.features(partial(image_vectors, model.backbone), model.items(data), "images")
    if model.backbone.alignment.vision_head.blocks:
        raise UserError("--features is for models with align.head_blocks=0, which see no more")
    chosen, tokens = read_tokens(arguments.features, data, model.backbone.backbone.embed_dim)
    labels = (
        torch.full((len(chosen),), -1) if chosen.labels is None else torch.tensor(chosen.labels)
    )
    vectors = describe_tokens(model.backbone, tokens.to(model.device)).cpu()
    return FeatureRows(vectors, labels, torch.from_numpy(chosen.rows))


def classify(arguments: argparse.Namespace, model: FrozenModel) -> dict:
    data = open_with_labels(arguments.data, model.channels)
    say_passed_over(data)
    found = vectors_of(arguments, model, data)
    if not distributed.is_main():
        return {}
    labels = class_names(data)
    classes = prompts(arguments, model, labels, "both").cpu()
    known = found.labels >= 0
    scores = top_accuracy(found.features[known], found.labels[known], classes)
    result = {"task": "classify", "model": arguments.model, **scores, "classes": len(labels)}
    return result | {"chance": round(1 / len(labels), 4), "n_val": int(known.sum())}


def retrieve(arguments: argparse.Namespace, model: FrozenModel) -> dict:
    data = with_captions(open_data(arguments.data, model.channels), arguments.data)
    say_passed_over(data)
    found = vectors_of(arguments, model, data)
    if not distributed.is_main():
        return {}
    captions = [data.captions(index) for index in found.images.tolist()]
    owners = [row for row, texts in enumerate(captions) for _ in texts]
    texts = sum(captions, [])
    if sentence := say_cut(model.backbone.tokenizer, texts):
        notice(sentence)
    vectors = model.backbone.encode_texts(texts).cpu()
    scores = recall(found.features, vectors, torch.tensor(owners))
    result = {"task": "retrieve", "model": arguments.model, **scores}
    top1 = sum(part["1"] for part in scores.values()) / 2
    return result | {"top1": top1, "n_images": len(captions), "n_texts": len(texts)}


def segment(arguments: argparse.Namespace, model: FrozenModel) -> dict:
    data = open_data(arguments.data, model.channels)
    say_passed_over(data)
    names = segment_names(data, arguments)
    classes = prompts(arguments, model, names, "patches")
    size = arguments.size[0] if arguments.size else min(model.prepare["size"])
    window = arguments.window or size
    stride = arguments.stride or max(1, window // 2)
    statistics = model.prepare["mean"], model.prepare["std"], model.prepare["interpolation"]
    items = Annotated(data, "mask", size, model.backbone.patch_size, *statistics, ignore=0)
    counts, images = 0, 0
    progress = progress_bar("segments", unit="batch")
    for batch in read_batches(items, **model.loading, collate=list, progress=progress):
        for image, mask, _ in batch or ():
            scores = window_scores(model.backbone, image.to(model.device), classes, window, stride)
            predicted = 1 + upsample(scores, mask.shape).argmax(dim=0).cpu()
            counts, images = counts + confusion(predicted, mask), images + 1
    counts = sum(part for part in distributed.gather_objects(counts))
    images = sum(distributed.gather_objects(images))
    counts = counts[1:, 1:]  # without class 0
    accuracy = float(counts.diag().sum() / counts.sum())
    miou, each = mean_iou(counts)
    result = {"task": "segment", "model": arguments.model, "miou": miou, "pixel_accuracy": accuracy}
    return result | {
        "iou": dict(zip(names, each, strict=False)),
        "size": size,
        "window": window,
        "stride": stride,
        "n_val": images,
    }


def segment_names(data: ImageData, arguments: argparse.Namespace) -> list[str]:
    """The labels of the mask's classes 1, 2, ...: of the data, else of --classes in its order."""
    if data.classes is not None:
        return data.classes
    if arguments.classes is None:
        raise UserError(f"{arguments.data} has no names of classes; give --classes FILE.csv")
    rows = read_csv(arguments.classes, ("label", "name"))
    return list(dict.fromkeys(row["label"].strip() for row in rows))


if __name__ == "__main__":
    run_script(main)
