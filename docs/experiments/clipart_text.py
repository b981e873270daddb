"""Words for released weights on clip art (docs/text.md): zero-shot, retrieval, k-NN, pictures.

    python docs/experiments/clipart_text.py SHARED --seeds 0 1 2

SHARED holds weights/dinov2-small and datasets/openclipart. Captions are made of file names and
categories, without authors and numbers, of the 6,676 pictures that are not in val.csv. The frozen
features of 98 pixels are computed once. runs/clipart_text/results.json; what it holds is not made
again.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from evals.knn import knn_accuracy

FOLDER = Path("runs/clipart_text")
SIZE = ("--size", "98", "--resize", "98", "--precision", "fp32")
# Names at the end of a file's name, of which the library kept only the first letters.
AUTHORS = """architetto_francesco_rollandin benji_park nicu_buculei gerald_g. linda_kim ganson
juliane_krug jon_phillips jarno_vasamaa peterm mateya mimooh dan_gerhards yves_guillou
enrique_meza_c dave_pena jean_victor_balin jean-victor_balin frederic_moser sergio_luiz_araujo
romus susan_park aj_ashton omic.ch fudriot_omic.ch anthony_liekens frouke jonadab matt_todd
roman_bertle zazou kurt_cagle mauro_olivo andrew_fitzsimon christoph_brill k_yager
jakob_chaosinfait ralf_ark.in-berlin.de ryan_lerch lumen_design_studio machovka simanek"""
RECIPE = """batch_size=64 total_steps=250 log_every=10 align.embed_dim=512 schedule.lr.peak=2e-3
checkpoint.every=125"""


def words_of(name: str) -> str:
    """What a file's name says: words without authors, numbers and single letters."""
    parts = [part for part in name.lower().split("_") if part]
    while parts and re.fullmatch(r"\d+[a-z]?", parts[-1]):
        parts.pop()
    for first in range(1, len(parts)):  # the longest end that begins an author's name
        end = "_".join(parts[first:])
        if len(end) > 2 and any(author.startswith(end) for author in AUTHORS.split()):
            parts = parts[:first]
            break
    words = re.sub(r"[^a-z]+", " ", " ".join(parts)).split()
    return " ".join(word for word in words if len(word) > 1 and word != "md")


def write_captions(clipart: Path) -> Path:
    """captions.csv: three rows a picture (name; category; both), none of val.csv."""
    table = FOLDER / "captions.csv"
    with (clipart / "val.csv").open() as file:
        held_out = {row["file"] for row in csv.DictReader(file)}
    files = sorted(path.relative_to(clipart).as_posix() for path in clipart.rglob("*.png"))
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption"])
        for name in files:
            if name not in held_out:
                folder, _, stem = name.removesuffix(".png").rpartition("/")
                said, kind = words_of(stem), re.split(r"-", folder, maxsplit=1)[-1]
                kind = re.sub(r"[-_]", " ", kind)
                for caption in dict.fromkeys([said or kind, kind, f"{kind}: {said}".strip(": ")]):
                    writer.writerow([(clipart / name).resolve(), caption])
    return table


def call(*command: str) -> dict:
    """The JSON line of a script."""
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {}


def write_val_captions(clipart: Path) -> Path:
    """val_captions.csv: label, and what the name says, of each picture of val.csv."""
    table = FOLDER / "val_captions.csv"
    with (clipart / "val.csv").open() as file, table.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["file", "label", "caption"])
        for row in csv.DictReader(file):
            words = words_of(Path(row["file"]).stem)
            writer.writerow([(clipart / row["file"]).resolve(), row["label"], words])
    return table


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("shared", type=Path)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = flags.parse_args()
    clipart = arguments.shared / "datasets/openclipart"
    weights = str(arguments.shared / "weights/dinov2-small")
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}

    def measure(name: str, *command: str) -> None:
        if name not in results:
            results[name] = call(*command)
            file.write_text(json.dumps(results, indent=1))

    table, names = write_captions(clipart), write_val_captions(clipart)
    kinds = ("--features", "cls", "mean", *SIZE)
    features = {"train": str(FOLDER / "features"), "val": str(FOLDER / "val_features")}
    for part, data in (("train", f"list:{table}"), ("val", f"list:{names}")):
        source = ("--model", weights, "--data", data, "--output", features[part])
        measure(f"features {part}", "extract.py", *source, *kinds)
    results["knn"] = knn(clipart, features["train"], features["val"])
    for seed in arguments.seeds:
        for arm, extra in (("", []), ("shuffled ", ["align.shuffle=true"])):
            if arm and seed != arguments.seeds[0]:
                continue  # one is enough to see chance
            run = str(FOLDER / f"{arm.strip() or 'seed'}{seed}")
            keys = [f"align.backbone={weights}", f"align.features={features['train']}"]
            keys += [f"data.train=list:{table}", f"output_dir={run}", f"seed={seed}"]
            measure(f"{arm}run {seed}", "align.py", *keys, *RECIPE.split(), *extra)
            given = ("--model", run, "--features", features["val"])
            for task in ("classify", "retrieve"):
                flags = (task, *given, "--data", f"list:{names}")
                measure(f"{arm}{task} {seed}", "eval_text.py", *flags)
    file.write_text(json.dumps(results, indent=1))
    print(json.dumps({name: values for name, values in results.items() if "run" not in name}))


def knn(clipart: Path, train: str, val: str) -> dict:
    """Weighted k-NN of CLS, and of CLS beside the mean of the patches, from the same files."""
    features, labels = [], []
    classes = {}
    for folder, table in ((train, "train.csv"), (val, "val.csv")):
        with (clipart / table).open() as file:
            wanted = {row["file"]: row["label"] for row in csv.DictReader(file)}
        with (Path(folder) / "index.csv").open() as file:
            names = ["/".join(row["name"].split("/")[-2:]) for row in csv.DictReader(file)]
        rows = [row for row, name in enumerate(names) if name in wanted]
        parts = [np.load(Path(folder) / f"{kind}.npy")[rows] for kind in ("cls", "mean")]
        features.append([F.normalize(torch.from_numpy(part), dim=1) for part in parts])
        numbers = [classes.setdefault(wanted[names[row]], len(classes)) for row in rows]
        labels.append(torch.tensor(numbers))
    found = {}
    for name, columns in (("cls", [0]), ("both", [0, 1])):
        sets = [F.normalize(torch.cat([p[k] for k in columns], 1), dim=1) for p in features]
        scores = knn_accuracy(sets[0], labels[0], sets[1], labels[1], ks=(10, 20, 100, 200))
        found[name] = {str(k): round(score, 4) for k, score in scores.items()}
    return found | {"train": len(labels[0]), "val": len(labels[1])}


if __name__ == "__main__":
    main()
