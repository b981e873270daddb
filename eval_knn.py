r"""Weighted k-NN on frozen features, the first number to look at; also retrieval and copies.

    python eval_knn.py --model runs/quickstart --train "scenes?split=train&size=4000" \
        --val "scenes?split=val&size=1000"
    python eval_knn.py --model pixels --train "scenes?split=train&size=4000" \
        --val "scenes?split=val&size=1000"
    python eval_knn.py --model pixels --train "scenes?size=1000" \
        --val "scenes?split=val&size=100" --retrieval --copies

Protocol of DINO (arXiv 2104.14294, appendix F.1): the k training images whose L2-normalised CLS
features are most similar vote with exp(cosine / temperature). The vote is exact. One pass serves
several k; `top1` is that of the best k.

--retrieval ranks --train by the same similarity for every image of --val and prints the mean
average precision. Images of the same class should come first; the image itself does not count.
With --truth FILE.json the file says what should, as for the revisited Oxford and Paris:
{"query": {"easy": [names], "hard": [names], "junk": [names]}}. `medium` looks for easy and hard,
`hard` for hard only. --copies edits every image of --val and looks for the original among --val and
--train, by CLS and GeM-pooled patches, as DINO does on Copydays.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.corruptions import Copies
from data.images import Chosen, ImageData
from data.sources.specs import match_classes, open_data, open_labelled
from engine import distributed
from engine.cli import evaluation_parser, path_argument, run_script
from engine.logger import say_passed_over
from errors import UserError
from evals.frozen import FrozenModel, run_evaluation
from evals.knn import FeatureRows, cls_features, knn_accuracy, retrieval_map, whitening

GEM = 4  # exponent of the generalised mean (DINO's copy detection)
# Level of difficulty -> keys of the truth to look for, and those to ignore.
LEVELS = {"medium": (("easy", "hard"), ("junk",)), "hard": (("hard",), ("easy", "junk"))}
Judge = Callable[[range], tuple[Tensor, Tensor]]  # rows of queries -> relevant, ignored (rows, n)


def copy_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """L2-normalised CLS and GeM-pooled patches (B, D + D'), as DINO detects copies."""
    features = backbone(images)
    pooled = features.patches.float().clamp(min=1e-6).pow(GEM).mean(1).pow(1 / GEM)
    return F.normalize(torch.cat([features.cls.float(), pooled], dim=1), dim=1)


def names_of(data: ImageData) -> list[str]:
    return [data.name(index) for index in range(len(data))]


def by_class(train: ImageData, val: ImageData) -> Judge:
    """Relevant: the same class. Ignored: the image itself, told by its name."""
    labels, names = torch.from_numpy(train.labels), names_of(val)
    place = {name: index for index, name in enumerate(names_of(train))}

    def judge(rows: range) -> tuple[Tensor, Tensor]:
        wanted = torch.from_numpy(val.labels[rows.start : rows.stop])[:, None]
        ignored = torch.zeros(len(rows), len(labels), dtype=torch.bool)
        for number, row in enumerate(rows):
            if names[row] in place:
                ignored[number, place[names[row]]] = True
        return (labels == wanted) & (wanted >= 0), ignored

    return judge


def by_truth(path: Path, level: str, train: Chosen, val: ImageData) -> Judge:
    """Relevant and ignored images of each query by a file of names, with or without extension.

    Args:
        train: the readable images of --train; the file may name the others too.

    Raises:
        UserError: if the file has another form or names an image that --train lacks.
    """
    try:
        truth = json.loads(path.read_text())
        lists = {
            Path(query).stem: {key: {Path(name).stem for name in entry[key]} for key in entry}
            for query, entry in truth.items()
        }
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        form = '{"query": {"easy": [names], "hard": [names], "junk": [names]}}'
        raise UserError(f"{path} is not {form}") from error
    place = {Path(name).stem: index for index, name in enumerate(names_of(train))}
    given = {Path(name).stem for name in names_of(train.data)}
    queries = [Path(name).stem for name in names_of(val)]
    if not set(queries) & set(lists):
        raise UserError(f"{path} has no query of --val")
    for query in queries:
        for name in set().union(*lists.get(query, {}).values()) - given:
            raise UserError(f"{path} names {name!r}, which --train lacks")

    def judge(rows: range) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(2, len(rows), len(place), dtype=torch.bool)
        for number, row in enumerate(rows):
            entry = lists.get(queries[row], {})
            for mask, keys in zip(masks, LEVELS[level], strict=True):
                names = {name for key in keys for name in entry.get(key, ())}
                mask[number, [place[name] for name in names & place.keys()]] = True
        return masks[0], masks[1]

    return judge


def whitener(model: FrozenModel, rows: FeatureRows | None) -> Callable:
    """PCA whitening learned on features; without them, features stay as they are."""
    return (lambda rows: rows) if rows is None else whitening(rows.features.to(model.device))


def copy_sets(
    model: FrozenModel, train: ImageData, val: ImageData, whiten: ImageData | None
) -> dict[str, FeatureRows]:
    """Features of edited copies of `val`, of `val`, the distractors `train`, and `whiten`."""
    describe, items = partial(copy_features, model.backbone), model.items(val)
    sets = {"copies": Copies(items), "originals": items, "distractors": model.items(train)}
    if whiten is not None:
        sets["--whiten"] = model.items(whiten)
    return {name: model.features(describe, part, name) for name, part in sets.items()}


def copy_detection(model: FrozenModel, sets: dict[str, FeatureRows]) -> dict:
    """The copies look for their originals among these and the distractors."""
    copies, originals, others = (sets[name] for name in ("copies", "originals", "distractors"))
    white = whitener(model, sets.get("--whiten"))
    database = torch.cat([originals.features, others.features]).to(model.device)
    queries, database = white(copies.features.to(model.device)), white(database)

    def judge(rows: range) -> tuple[Tensor, Tensor]:
        relevant = torch.zeros(len(rows), len(database), dtype=torch.bool)
        wanted = copies.images[rows.start : rows.stop, None]
        relevant[:, : len(originals.images)] = wanted == originals.images
        return relevant, torch.zeros_like(relevant)

    nearest = torch.cat([(part @ database.T).argmax(1) for part in queries.split(256)]).cpu()
    among = torch.cat([originals.images, torch.full_like(others.images, -1)])
    top1 = float((among[nearest] == copies.images).double().mean())
    result = retrieval_map(queries, database, judge)
    return {**result, "top1": top1, "database": len(database)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--train", required=True, help="DATA with labels that vote")
    add("--val", required=True, help="DATA with labels to predict")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="of the vote; low favours the nearest")
    add("--retrieval", action="store_true", help="rank --train for each image of --val")
    add("--truth", type=path_argument, metavar="FILE.json", help="what --retrieval should find")
    add("--copies", action="store_true", help="copy detection")
    add("--whiten", metavar="DATA", help="images to learn PCA whitening from; labels not needed")
    add("--scales", type=float, nargs="+", default=[1.0], help="of images; DINO: 1 0.7071 0.5")
    arguments = parser.parse_args(argv)
    positive = arguments.temperature > 0 and min(arguments.scales) > 0
    if min(arguments.k) < 1 or arguments.batch_size < 1 or not positive:
        raise UserError(
            "--k and --batch-size must be at least 1, --temperature and --scales more than 0"
        )
    ranks = arguments.retrieval or arguments.copies
    if arguments.truth and not arguments.retrieval or arguments.whiten and not ranks:
        raise UserError(
            "--truth is for --retrieval, --whiten for --retrieval and --copies; add one of them"
        )
    return arguments


def open_both(arguments: argparse.Namespace, channels: int) -> tuple[ImageData, ImageData, bool]:
    """--train and --val, and whether both have labels. Only --truth and --copies need none, and
    they look at the images of --val without one, too."""
    if arguments.truth or arguments.copies and not arguments.retrieval:
        train, val = (open_data(spec, channels) for spec in (arguments.train, arguments.val))
        val.labels = match_classes(train, val)
        return train, val, val.labels is not None
    return *open_labelled(arguments.train, arguments.val, channels), True


def evaluate(arguments: argparse.Namespace, model: FrozenModel) -> dict:
    train, val, labelled = open_both(arguments, model.channels)
    say_passed_over(train, val)
    result = {"task": "knn" if labelled else "retrieval", "model": arguments.model}
    result["left_out"] = val.left_out
    whiten = open_data(arguments.whiten, model.channels) if arguments.whiten else None
    describe = partial(cls_features, model.backbone, scales=arguments.scales)
    found: dict[str, FeatureRows] = {}
    if labelled or arguments.retrieval:
        sets = {"train": train, "val": val}
        if whiten is not None and arguments.retrieval:
            sets["--whiten"] = whiten
        for name, data in sets.items():
            found[name] = model.features(describe, model.items(data), name)
    copies = copy_sets(model, train, val, whiten) if arguments.copies else None
    if not distributed.is_main():
        return {}
    if found:
        train, val = Chosen(train, found["train"].images), Chosen(val, found["val"].images)
    if labelled:
        result |= vote(arguments, model.device, found, result["left_out"])
    if arguments.retrieval:
        white = whitener(model, found.get("--whiten"))
        queries, database = (found[name].features.to(model.device) for name in ("val", "train"))
        result["retrieval"] = rank(arguments, white(queries), white(database), train, val)
    if copies:
        result["copies"] = copy_detection(model, copies)
    return {"n_train": model.count(train), "n_val": model.count(val)} | result


def vote(
    arguments: argparse.Namespace, device: torch.device, found: dict[str, FeatureRows], hidden: int
) -> dict:
    """Top-1 of each k on the images of `val` that have a label; `hidden` were left out before."""
    database, queries = (found[name].features.to(device) for name in ("train", "val"))
    labels, truth = (found[name].labels.to(device) for name in ("train", "val"))
    known = truth >= 0
    settings = {"ks": arguments.k, "temperature": arguments.temperature}
    scores = knn_accuracy(database, labels, queries[known], truth[known], **settings)
    count = int(known.sum())
    result = {"k": {str(k): top1 for k, top1 in scores.items()}, "top1": max(scores.values())}
    return result | {"n_val": count, "left_out": hidden + len(known) - count}


def rank(
    arguments: argparse.Namespace,
    queries: Tensor,
    database: Tensor,
    train: Chosen,
    val: ImageData,
) -> dict:
    """Mean average precision, by --truth at each level."""
    if not arguments.truth:
        return retrieval_map(queries, database, by_class(train, val))
    judges = {level: by_truth(arguments.truth, level, train, val) for level in LEVELS}
    return {level: retrieval_map(queries, database, judge) for level, judge in judges.items()}


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    run_evaluation(arguments, FrozenModel, partial(evaluate, arguments))


if __name__ == "__main__":
    run_script(main)
