"""Weighted k-NN on frozen features: the first number to look at. Also retrieval and copy detection.

    python eval_knn.py --model runs/quickstart --train "scenes?split=train&size=4000" --val "scenes?split=val&size=1000"
    python eval_knn.py --model pixels --train "scenes?split=train&size=4000" --val "scenes?split=val&size=1000"
    python eval_knn.py --model pixels --train "scenes?size=1000" --val "scenes?split=val&size=100" --retrieval --copies

Protocol of DINO (arXiv 2104.14294, appendix F.1): L2-normalised CLS features, cosine similarity, the k nearest training
images vote with exp(similarity / temperature). Exact. Several k in one pass; `top1` is that of the best k.

--retrieval ranks --train for every image of --val by the same similarity: mean average precision, where the images of
its class should come first (the image itself does not count), or those that --truth FILE.json names in the manner of
the revisited Oxford and Paris, {"query": {"easy": [names], "hard": [names], "junk": [names]}}: `medium` looks for easy
and hard, `hard` for hard only. --copies edits every image of --val and looks for the original among --val and --train,
by CLS and GeM-pooled patches, as DINO on Copydays.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data.corruptions import Copies
from data.loader import EvalDataset, default_workers
from data.sources.specs import ImageData, open_data, open_labelled
from engine import distributed
from engine.cli import evaluation_parser, preparation, print_result, run_script
from errors import UserError
from evals.knn import extract_features, knn_accuracy, retrieval_map, whitening
from models.weights.load import load_backbone

GEM = 4  # exponent of the generalised mean (DINO's copy detection)
SHOWN = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}  # looked for, ignored


def cls_features(scales: list[float], backbone: nn.Module, images: Tensor) -> Tensor:
    """L2-normalised CLS (B, D); of several scales the mean, normalised."""
    views = [
        images if s == 1 else F.interpolate(images, scale_factor=s, mode="bilinear") for s in scales
    ]
    return F.normalize(torch.stack([backbone(view).cls.float() for view in views]).mean(0), dim=1)


def copy_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """L2-normalised CLS and GeM-pooled patches (B, D + D'), as DINO detects copies."""
    features = backbone(images)
    pooled = features.patches.float().clamp(min=1e-6).pow(GEM).mean(1).pow(1 / GEM)
    return F.normalize(torch.cat([features.cls.float(), pooled], dim=1), dim=1)


class Extractor:
    """Features of data sets by one model and the flags, L2-normalised, whitened where asked for."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = distributed.choose_device(arguments.device)
        self.backbone = load_backbone(arguments.model).to(self.device)
        self.prepare = preparation(self.backbone.preprocessing, arguments.resize, arguments.size)
        workers = (
            default_workers(self.device.type) if arguments.workers is None else arguments.workers
        )
        self.options = {"batch_size": arguments.batch_size, "workers": workers}

    def items(self, data: ImageData) -> EvalDataset:
        return EvalDataset(data, **self.prepare)

    def __call__(self, describe: Callable, items: Dataset, name: str) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels (n,) on the device."""
        progress = partial(
            tqdm, desc=f"features of {name}", unit="batch", disable=not sys.stderr.isatty()
        )
        found = extract_features(
            partial(describe, self.backbone), items, self.device, progress=progress, **self.options
        )
        return found[0].to(self.device), found[1].to(self.device)


def names_of(data: ImageData) -> list[str]:
    return [data.name(index) for index in range(len(data))]


def by_class(train: ImageData, val: ImageData) -> Callable[[range], tuple[Tensor, Tensor]]:
    """Relevant: the same class. Ignored: the image itself, told by its name."""
    labels, names = torch.from_numpy(train.labels), names_of(val)
    place = {name: index for index, name in enumerate(names_of(train))}

    def judge(rows: range) -> tuple[Tensor, Tensor]:
        wanted = torch.from_numpy(val.labels[rows.start : rows.stop])[:, None]
        ignored = torch.zeros(len(rows), len(labels), dtype=torch.bool)
        for row in rows:
            if names[row] in place:
                ignored[row - rows.start, place[names[row]]] = True
        return (labels == wanted) & (wanted >= 0), ignored

    return judge


def by_truth(
    path: Path, level: str, train: ImageData, val: ImageData
) -> Callable[[range], tuple[Tensor, Tensor]]:
    """Relevant and ignored as a file says for each query; names of files, with or without extension.

    Raises:
        UserError: if the file is of another form or names what is not there.
    """
    try:
        truth = json.loads(path.read_text())
        truth = {Path(query).stem: entry for query, entry in truth.items()}
        lists = {
            query: {Path(n).stem for key in entry for n in entry[key]}
            for query, entry in truth.items()
        }
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(
            f'{path} is not {{"query": {{"easy": [names], "hard": [names], "junk": [names]}}}}'
        ) from error
    place = {Path(name).stem: index for index, name in enumerate(names_of(train))}
    queries = [Path(name).stem for name in names_of(val)]
    unknown = [name for query in queries for name in lists.get(query, ()) if name not in place]
    if unknown or not set(queries) & set(lists):
        raise UserError(
            f"{path} names {unknown[0]!r}, which --train lacks"
            if unknown
            else f"{path} has no query of --val"
        )

    def judge(rows: range) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(2, len(rows), len(place), dtype=torch.bool)
        for number, row in enumerate(rows):
            entry = truth.get(queries[row], {})
            for mask, keys in zip(masks, SHOWN[level]):
                mask[
                    number, [place[Path(name).stem] for key in keys for name in entry.get(key, ())]
                ] = True
        return masks[0], masks[1]

    return judge


def copy_detection(
    extract: Extractor, train: ImageData, val: ImageData, whiten: ImageData | None
) -> dict:
    """Edited copies of `val` look for their originals among `val` and the distractors `train`."""
    items = extract.items(val)
    queries, originals, others = (
        extract(copy_features, part, name)[0]
        for part, name in (
            (Copies(items), "copies"),
            (items, "originals"),
            (extract.items(train), "distractors"),
        )
    )
    database = torch.cat([originals, others])
    if whiten is not None:
        white = whitening(extract(copy_features, extract.items(whiten), "--whiten")[0])
        queries, database = white(queries), white(database)

    def judge(rows: range) -> tuple[Tensor, Tensor]:
        relevant = torch.zeros(len(rows), len(database), dtype=torch.bool)
        relevant[range(len(rows)), rows] = True
        return relevant, torch.zeros_like(relevant)

    nearest = torch.cat([(part @ database.T).argmax(1) for part in queries.split(256)]).cpu()
    top1 = (nearest == torch.arange(len(queries))).double().mean()
    return {
        **retrieval_map(queries, database, judge),
        "top1": float(top1),
        "database": len(database),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--train", required=True, help="DATA with labels that vote")
    parser.add_argument("--val", required=True, help="DATA with labels to be found")
    parser.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.07, help="of the vote; lower trusts the nearest more"
    )
    parser.add_argument(
        "--retrieval",
        action="store_true",
        help="mean average precision of --train ranked for --val",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="FILE.json",
        help="what --retrieval looks for, in place of the class",
    )
    parser.add_argument("--copies", action="store_true", help="copy detection")
    parser.add_argument(
        "--whiten", metavar="DATA", help="images, no labels needed, to learn PCA whitening from"
    )
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="of the images; DINO: 1 0.7071 0.5"
    )
    arguments = parser.parse_args(argv)
    if (
        min(arguments.k) < 1
        or arguments.temperature <= 0
        or arguments.batch_size < 1
        or min(arguments.scales) <= 0
    ):
        raise UserError(
            "--k and --batch-size must be at least 1, --temperature and --scales more than 0"
        )
    if (
        arguments.truth
        and not arguments.retrieval
        or arguments.whiten
        and not (arguments.retrieval or arguments.copies)
    ):
        raise UserError(
            "--truth is for --retrieval, --whiten for --retrieval and --copies; add one of them"
        )
    return arguments


def open_both(arguments: argparse.Namespace, channels: int) -> tuple[ImageData, ImageData, bool]:
    """--train and --val, and whether they have labels in common, which only --truth and --copies can do without."""
    if arguments.truth or arguments.copies and not arguments.retrieval:
        both = open_data(arguments.train, channels), open_data(arguments.val, channels)
        if any(data.labels is None for data in both):
            return *both, False
    return *open_labelled(arguments.train, arguments.val, channels), True


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    began = time.perf_counter()
    extract = Extractor(arguments)
    channels = extract.backbone.in_channels
    train, val, labelled = open_both(arguments, channels)
    whiten = open_data(arguments.whiten, channels) if arguments.whiten else None
    result = {"task": "knn" if labelled else "retrieval", "model": arguments.model}
    if labelled or arguments.retrieval:
        describe = partial(cls_features, arguments.scales)
        database, queries = (
            extract(describe, extract.items(data), name)
            for name, data in (("train", train), ("val", val))
        )
    if labelled:
        scores = knn_accuracy(
            *database, *queries, ks=arguments.k, temperature=arguments.temperature
        )
        result |= {
            "k": {str(k): value for k, value in scores.items()},
            "top1": max(scores.values()),
        }
    result |= {"n_train": len(train), "n_val": len(val)}
    if arguments.retrieval:
        white = (
            (lambda rows: rows)
            if whiten is None
            else whitening(extract(describe, extract.items(whiten), "--whiten")[0])
        )
        ranked = white(queries[0]), white(database[0])
        if arguments.truth:
            judges = {level: by_truth(arguments.truth, level, train, val) for level in SHOWN}
            result["retrieval"] = {
                level: retrieval_map(*ranked, judge) for level, judge in judges.items()
            }
        else:
            result["retrieval"] = retrieval_map(*ranked, by_class(train, val))
    if arguments.copies:
        result["copies"] = copy_detection(extract, train, val, whiten)
    print_result(result | {"seconds": round(time.perf_counter() - began, 1)}, arguments.output)


if __name__ == "__main__":
    run_script(main)
