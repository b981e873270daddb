r"""Chooses images before a run: drops near duplicates, balances concepts, retrieves neighbours.

    python curate.py dedup --model runs/quickstart --data /my/images --output unique.csv
    python curate.py dedup --model runs/quickstart --data /my/images --against /my/test \
        --output clean.csv
    python curate.py balance --model runs/quickstart --data list:unique.csv --target 50000 \
        --output even.csv
    python curate.py retrieve --model runs/quickstart --data /my/images --seeds /my/examples \
        --output similar.csv
    python train.py --config vits.yaml data.train=list:even.csv

LIST is for data.train=list:LIST. LIST.reasons.csv says of each image why it stayed or went, and
LIST.png shows examples: look at them.

dedup     keeps the first image of each group of near duplicates: pairs, directly or over others
          (DINOv2), whose CLS features have a cosine of --threshold or more and whose grey 16 x 16
          thumbnails one of --layout. Colour is ignored. With --against, groups that reach into
          those images are dropped whole. The picture shows the pairs nearest to the threshold on
          both sides, and the JSON counts pairs at thresholds around it.
balance   takes --target images as evenly as possible from clusters of clusters (hierarchical
          k-means; DINOv3).
retrieve  keeps the --neighbours images nearest to each image of --seeds, at most --cap.

--features DIR takes the CLS features from a folder of extract.py instead of computing them; dedup
then sees colours, and no thumbnails.
Similarities are exact. On two cores dedup of 100,000 images takes a minute and of a million hours,
balance of 100,000 images seven minutes, without the time of the features.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import ImageData
from data.sources.folder import FileImages
from data.sources.specs import open_data
from engine import distributed
from engine.cli import evaluation_parser, path_argument, run_script
from engine.logger import notice, say_passed_over
from errors import UserError
from evals.curation import (
    ROUNDS,
    balanced,
    default_levels,
    entropy,
    find_duplicates,
    hierarchy,
    nearest,
    thumbnails,
)
from evals.figures import draw_sheet, enlarge
from evals.frozen import FrozenModel, check_least, class_name, progress_bar, run_evaluation
from evals.maps import to_picture

THUMB = 16 * 16 + 1  # numbers of a thumbnail
HEIGHT, SHOWN = 96, 8  # pixels of an image in the picture; rows, and images of a row
LARGE = 0.05  # share of the images in one group from which on a threshold is too low


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--data", required=True, help="DATA to choose from: a folder or list of files")
    add("--features", type=path_argument, help="a folder that extract.py wrote of these images")
    add("--threshold", type=float, default=0.9, help="dedup: cosine of near duplicates (0.9)")
    add("--layout", type=float, default=0.8, help="dedup: cosine of their thumbnails (0.8)")
    add("--against", help="dedup: DATA, such as a test set, whose near duplicates are dropped")
    add("--target", type=int, help="balance: how many images to take")
    add("--levels", type=int, nargs="+", help="balance: clusters of each level, finest first")
    add("--seeds", help="retrieve: DATA to find neighbours of")
    add("--neighbours", type=int, default=4, help="retrieve: of each image of --seeds (4)")
    add("--cap", type=int, help="retrieve: images in all, the most similar ones")
    add("--seed", type=int, default=0, help="balance: of the clusters and the draw")
    arguments = parser.parse_args(argv)
    arguments.list, arguments.output = arguments.output, None
    if arguments.list is None or arguments.list.suffix != ".csv":
        raise UserError("--output names the list to write, which ends in .csv")
    needed = {"balance": "target", "retrieve": "seeds"}.get(arguments.task)
    if needed and getattr(arguments, needed) is None:
        raise UserError(f"curate.py {arguments.task} needs --{needed}")
    for name in ("threshold", "layout"):
        if not 0 < getattr(arguments, name) <= 1:
            raise UserError(f"--{name} is {getattr(arguments, name):g}; it must be in (0, 1]")
    check_least(arguments, 1, "batch_size", "target", "neighbours", "cap")
    check_least(arguments, 0, "seed")
    levels = arguments.levels or [1]
    if min(levels) < 1 or sorted(levels, reverse=True) != levels:
        raise UserError("--levels are numbers of clusters from 1 on, the largest first")
    return arguments


class Pool:
    """The images that could be read, with their features.

    Attributes:
        rows: (n, D) CLS features, of grey images where there are thumbnails.
        thumbs: (n, 257), see `thumbnails`; None without `grey`.
        images: (n,) the indices in `data` that rows belong to.
    """

    def __init__(
        self,
        model: FrozenModel,
        spec: str,
        features: Path | None = None,
        *,
        files_only: bool = False,
        grey: bool = False,
    ):
        self.model, self.data = model, open_data(spec, model.channels)
        if files_only and not isinstance(self.data, FileImages):
            raise UserError(f"curate.py writes a list of files; {spec} is no folder or list")
        say_passed_over(self.data)
        self.items, self.thumbs = model.items(self.data), None
        if features is not None:
            self.rows, self.images = read_features(features, self.data)
            return
        describe = self._describe_grey if grey else self._describe
        self.rows, _, self.images = model.features(describe, self.items, spec)
        if grey and len(self.rows):
            self.rows, self.thumbs = self.rows[:, :-THUMB], self.rows[:, -THUMB:]

    @torch.inference_mode()
    def _describe(self, images: Tensor) -> Tensor:
        return self.model.backbone(images).cls.float()

    @torch.inference_mode()
    def _describe_grey(self, images: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(self.model.prepare[name], device=images.device).view(-1, 1, 1)
            for name in ("mean", "std")
        )
        pixels = images * std + mean
        grey = (pixels.mean(1, keepdim=True) - mean) / std
        return torch.cat([self._describe(grey), thumbnails(pixels)], dim=1)

    def picture(self, row: int) -> np.ndarray:
        image = self.items[int(self.images[row])][0]
        statistics = self.model.prepare["mean"], self.model.prepare["std"]
        return enlarge(to_picture(image, *statistics), HEIGHT)


def read_features(folder: Path, data: ImageData) -> tuple[Tensor, Tensor]:
    """CLS features of `extract.py` and the images of `data` that they belong to, by name.

    Raises:
        UserError: if the folder has none of these images.
    """
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with (folder / "index.csv").open(**text) as file:
        index = {row["name"]: int(row["row"]) for row in csv.DictReader(file)}
    images = [image for image in range(len(data)) if data.name(image) in index]
    if not images:
        raise UserError(f"{folder}/index.csv names no image of --data")
    if len(images) < len(data):
        notice(f"{len(data) - len(images)} images have no row in {folder} and are left out")
    array = np.load(folder / "cls.npy", mmap_mode="r")
    rows = array[[index[data.name(image)] for image in images]]
    return torch.from_numpy(rows.astype(np.float32)), torch.tensor(images)


def curate(arguments: argparse.Namespace, model: FrozenModel) -> dict:
    grey = arguments.task == "dedup" and arguments.features is None
    pool = Pool(model, arguments.data, arguments.features, files_only=True, grey=grey)
    other = {"dedup": arguments.against, "retrieve": arguments.seeds}.get(arguments.task)
    other = None if other is None else Pool(model, other, grey=grey)
    if not distributed.is_main():
        return {}
    task = TASKS[arguments.task]
    reasons, rows, title, result = task(arguments, pool, other)
    write_lists(arguments.list, pool, reasons)
    if rows:
        draw_sheet(arguments.list.with_suffix(".png"), rows, [""] * max(map(len, rows)), title)
    kept = sum(reason["kept"] for reason in reasons)
    if not kept:
        notice("no image is left")
    result = {"task": arguments.task, "model": arguments.model, "data": arguments.data, **result}
    return result | {"n": len(reasons), "kept": kept, "list": str(arguments.list)}


def dedup(arguments: argparse.Namespace, pool: Pool, against: Pool | None) -> tuple:
    own = len(pool.rows)
    rows = pool.rows if against is None else torch.cat([pool.rows, against.rows])
    bar = progress_bar("similarities", unit="block")
    thumbs = pool.thumbs
    if thumbs is not None and against is not None:
        thumbs = torch.cat([thumbs, against.thumbs])
    rows, thumbs = (None if t is None else t.to(pool.model.device) for t in (rows, thumbs))
    options = {"thumbs": thumbs, "layout": arguments.layout, "examples": 2 * SHOWN}
    found = find_duplicates(rows, arguments.threshold, **options, progress=bar)
    groups = found.roots[:own]
    leaked = set(found.roots[own:].tolist())
    reasons = []
    for row, root in enumerate(groups.tolist()):
        kept = root == row and root not in leaked
        why = "unique" if kept else "near an image of --against" if root in leaked else "duplicate"
        reasons.append({"kept": kept, "reason": why, "group": name_of(pool, root)})
    sizes = np.bincount(groups)
    largest = int(sizes.max())
    if largest > max(20, LARGE * own):
        notice(
            f"one group has {largest} of {own} images, the first {name_of(pool, sizes.argmax())}; "
            "if they do not look alike, raise --threshold"
        )
    cells = [
        [(pool if row < own else against).picture(row if row < own else row - own) for row in pair]
        for pair in found.pairs.tolist()
    ]
    split = int((found.similarities < arguments.threshold).sum())
    title = f"pairs by cosine; the first {split} are below {arguments.threshold:g} and stay"
    result = {"threshold": arguments.threshold, "groups": int((sizes > 1).sum())}
    result |= {"largest": largest, "pairs": found.curve}
    if against is not None:
        result["near_against"] = sum(root in leaked for root in groups.tolist())
    return reasons, cells, title, result


def balance(arguments: argparse.Namespace, pool: Pool, _: None) -> tuple:
    count, rng = len(pool.rows), np.random.default_rng(arguments.seed)
    wanted = arguments.levels or default_levels(count)
    generator = torch.Generator().manual_seed(arguments.seed)
    levels = hierarchy(pool.rows, wanted, generator, ROUNDS, progress_bar("levels"))
    taken = balanced(levels, arguments.target, rng)
    kept = np.isin(np.arange(count), taken)
    names = [f"cluster{number}" for number in range(1, len(levels) + 1)]
    reasons = []
    for row in range(count):
        clusters = {name: int(level[row]) for name, level in zip(names, levels, strict=True)}
        why = "drawn" if kept[row] else "not drawn"
        reasons.append({"kept": bool(kept[row]), "reason": why, **clusters})
    sizes = np.bincount(levels[-1])
    cells = []
    for cluster in np.argsort(-sizes, kind="stable")[:SHOWN]:
        members = np.flatnonzero(levels[-1] == cluster)
        members = rng.choice(members, min(SHOWN, len(members)), replace=False)
        cells.append([pool.picture(row) for row in members])
    title = "images of the largest clusters, one a row"
    evenness = {"before": entropy(levels[-1]), "after": entropy(levels[-1][taken])}
    clusters = [len(np.unique(level)) for level in levels]
    return reasons, cells, title, {"clusters": clusters, "evenness": evenness}


def retrieve(arguments: argparse.Namespace, pool: Pool, seeds: Pool) -> tuple:
    bar = progress_bar("neighbours", unit="block")
    both = (part.rows.to(pool.model.device) for part in (seeds, pool))
    cosines, rows = nearest(*both, arguments.neighbours, progress=bar)
    best: dict[int, tuple[float, int]] = {}  # row -> its highest cosine and that seed
    for seed, (values, found) in enumerate(zip(cosines.tolist(), rows.tolist(), strict=True)):
        for value, row in zip(values, found, strict=True):
            best[row] = max(best.get(row, (-1.0, 0)), (value, -seed))
    ranked = sorted(best, key=lambda row: (-best[row][0], row))
    kept = set(ranked[: arguments.cap])
    reasons = []
    for row in range(len(pool.rows)):
        value, seed = best.get(row, ("", None))
        why = "neighbour" if row in kept else "beyond --cap" if row in best else "no neighbour"
        near = "" if seed is None else name_of(seeds, -seed)
        reasons.append({"kept": row in kept, "reason": why, "cosine": value, "seed": near})
    shown = np.linspace(0, len(seeds.rows) - 1, min(SHOWN, len(seeds.rows))).astype(int)
    cells = [
        [seeds.picture(seed), *(pool.picture(row) for row in rows[seed][: SHOWN - 1].tolist())]
        for seed in shown
    ]
    return reasons, cells, "an image of --seeds, then its neighbours", {"seeds": len(seeds.rows)}


def name_of(pool: Pool, row: int) -> str:
    return pool.data.name(int(pool.images[row]))


def write_lists(path: Path, pool: Pool, reasons: Sequence[dict]) -> None:
    """LIST of the kept images with their classes, and LIST.reasons.csv of all."""
    labelled = pool.data.labels is not None
    kept, every = [["file", "label"][: 1 + labelled]], [["file", *reasons[0]]]
    for row, reason in enumerate(reasons):
        image = int(pool.images[row])
        file = str(Path(pool.data.name(image)).absolute())
        every.append([file, *(int(v) if isinstance(v, bool) else v for v in reason.values())])
        if reason["kept"]:
            kept.append([file, class_name(pool.data, image)][: 1 + labelled])
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, table in ((path.with_suffix(".reasons.csv"), every), (path, kept)):
        write_csv(target, table)


def write_csv(path: Path, table: Sequence[Sequence]) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(table)
    unfinished.replace(path)


TASKS: dict[str, Callable[..., tuple]] = {"dedup": dedup, "balance": balance, "retrieve": retrieve}


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    run_evaluation(arguments, FrozenModel, lambda model: curate(arguments, model))


if __name__ == "__main__":
    run_script(main)
