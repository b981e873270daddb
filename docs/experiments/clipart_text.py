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

FOLDER = Path("runs/clipart_text")
SIZE = ("--size", "98", "--resize", "98", "--precision", "fp32")
# Names at the end of a file's name, of which the library kept only the first letters.
AUTHORS = """architetto_francesco_rollandin benji_park nicu_buculei gerald_g. linda_kim ganson
juliane_krug jon_phillips jarno_vasamaa peterm mateya mimooh dan_gerhards yves_guillou
enrique_meza_c dave_pena jean_victor_balin jean-victor_balin frederic_moser sergio_luiz_araujo
romus susan_park aj_ashton omic.ch fudriot_omic.ch anthony_liekens frouke jonadab matt_todd
roman_bertle zazou kurt_cagle mauro_olivo andrew_fitzsimon christoph_brill k_yager
jakob_chaosinfait ralf_ark.in-berlin.de ryan_lerch lumen_design_studio machovka simanek"""
RECIPE = """batch_size=128 total_steps=600 log_every=20 align.embed_dim=512 schedule.lr.peak=1e-3
checkpoint.every=600"""


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


def val_captions(clipart: Path) -> Path:
    """Names of the pictures of val.csv as captions, for retrieval."""
    table = FOLDER / "val_captions.csv"
    with (clipart / "val.csv").open() as file, table.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["file", "caption"])
        for row in csv.DictReader(file):
            words = words_of(Path(row["file"]).stem)
            writer.writerow([(clipart / row["file"]).resolve(), words])
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

    table, names = write_captions(clipart), val_captions(clipart)
    features = str(FOLDER / "features")
    kinds = ("--features", "cls", "mean")
    source = ("--model", weights, "--data", f"list:{table}")
    measure("features", "extract.py", *source, *kinds, *SIZE, "--output", features)
    sets = ("--train", f"list:{clipart}/train.csv", "--val", f"list:{clipart}/val.csv")
    measure("knn", "eval_knn.py", "--model", weights, *sets, *SIZE)
    for seed in arguments.seeds:
        for arm, extra in (("", []), ("shuffled ", ["align.shuffle=true"])):
            run = str(FOLDER / f"{arm.strip() or 'seed'}{seed}")
            keys = [f"align.backbone={weights}", f"align.features={features}", f"seed={seed}"]
            keys += [f"data.train=list:{table}", f"output_dir={run}", *RECIPE.split(), *extra]
            measure(f"{arm}run {seed}", "align.py", *keys)
            data = ("--data", f"list:{clipart}/val.csv", *SIZE)
            measure(f"{arm}classify {seed}", "eval_text.py", "classify", "--model", run, *data)
            data = ("--data", f"list:{names}", *SIZE)
            measure(f"{arm}retrieve {seed}", "eval_text.py", "retrieve", "--model", run, *data)


if __name__ == "__main__":
    main()
