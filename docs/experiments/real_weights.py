"""Continued pre-training of released weights on clip art (docs/adapt.md, docs/results.md).

    python docs/experiments/real_weights.py SHARED --seeds 0 1 --arms before naive gram lora

SHARED holds weights/dinov2-small and datasets/openclipart. Training takes the 6,676 pictures that
are not in val.csv, without labels. Every arm trains for as long as 150 steps of `plain` do.
Measured: k-NN and linear accuracy on val.csv, and on `scenes`, the old domain here, segmentation
by k-NN of patches, and correspondence. runs/real/results.json; what it holds is not made again.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

FOLDER = Path("runs/real")
BF16 = ("--precision", "bf16")
STOPPED = 3  # exit status of a run whose time is over
CROPS = {"global_size": 98, "local_size": 42, "local_count": 4}
NAIVE = "schedule.lr.peak=1e-3 schedule.lr.end=1e-3 schedule.ema_momentum=0.992"
PLAIN = "loss.gram.weight=0"
SLOW = f"{PLAIN} schedule.lr.peak=5e-5 schedule.ema_momentum=0.999 loss.dino.prototypes=4096"
LORA = "stages.adapt.tune.mode=lora schedule.lr.peak=1e-3"
LAST = "stages.adapt.tune.mode=partial stages.adapt.tune.targets=[blocks.10,blocks.11,norm]"
ARMS = {  # changes of continue.yaml, and steps in about the time of 150 steps of `plain`
    "naive": (NAIVE, 150),
    "slow": (SLOW, 150),
    "plain": (PLAIN, 150),
    "gram": ("", 130),
    "lora": (f"{PLAIN} {LORA}", 180),
    "lora_gram": (LORA, 150),
    "partial": (f"{PLAIN} {LAST}", 220),
    "anchor": (f"{PLAIN} loss.anchor.weight=1", 130),
    # What LoRA adapts, how and how fast; how many blocks train.
    "lora_rank4": (f"{PLAIN} {LORA} stages.adapt.tune.rank=4", 180),
    "lora_rank64": (f"{PLAIN} {LORA} stages.adapt.tune.rank=64", 180),
    "lora_all": (f"{PLAIN} {LORA} stages.adapt.tune.targets=[qkv,attn.proj,fc1,fc2]", 150),
    "lora_slower": (f"{PLAIN} {LORA} schedule.lr.peak=3e-4", 180),
    "lora_faster": (f"{PLAIN} {LORA} schedule.lr.peak=3e-3", 180),
    "partial_one": (f"{PLAIN} {LAST.replace('blocks.10,', '')}", 230),
    "partial_four": (f"{PLAIN} {LAST.replace('blocks.10', 'blocks.8,blocks.9,blocks.10')}", 200),
    "partial_fast": (f"{PLAIN} {LAST} schedule.lr.peak=5e-4", 220),
}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("shared", type=Path)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    flags.add_argument("--arms", nargs="+", default=["before", *ARMS])
    flags.add_argument("--results", type=Path, default=FOLDER / "results.json")
    arguments = flags.parse_args()
    shared = arguments.shared.resolve()
    weights, clipart = shared / "weights/dinov2-small", shared / "datasets/openclipart"
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_configs(weights, clipart)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            name = f"{arm}-{seed}"
            results = read(arguments.results)
            if name in results:
                continue
            began = time.monotonic()
            run = weights if arm == "before" else train(arm, seed)
            minutes = (time.monotonic() - began) / 60
            scores = {**measure(run, clipart), "minutes": round(minutes, 1)}
            results = read(arguments.results) | {name: scores}
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")
            print(name, scores, flush=True)


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_configs(weights: Path, clipart: Path) -> None:
    """A configuration for the careful arms and one for the naive one."""
    unlabelled = write_unlabelled(clipart, FOLDER)
    configs = Path("configs").resolve()
    common = {
        "init": str(weights),
        "data": {"train": f"list:{unlabelled}", "workers": 0},
        "crops": CROPS,
        "batch_size": 32,
        "probe": {"every": 0},
        "guard": {"action": None},
        "checkpoint": {"every": 1000},
    }
    for name, bases in (("careful", ["continue"]), ("naive", [])):
        base = [f"{configs}/{one}.yaml" for one in ("dinov2_vits14", *bases)]
        values = {"base": base, **common}
        if name == "naive":  # the recipe of DINOv2 for a run from scratch, at its full rate
            values["loss"] = {"koleo": {"group": 16}, "dino": {"prototypes": 4096}}
            values["optim"] = {"lr_scaling": "none", "freeze_last_layer": 0}
            values["schedule"] = {"lr": {"warmup": "10%", "peak": 1e-3, "end": 1e-3}}
            values["schedule"] |= {"teacher_temp": 0.07}
        (FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(values))


def write_unlabelled(clipart: Path, folder: Path) -> Path:
    """unlabelled.csv: the pictures that are not in val.csv."""
    with open(clipart / "val.csv", newline="") as file:
        val = {row["file"] for row in csv.DictReader(file)}
    files = (path.relative_to(clipart).as_posix() for path in sorted(clipart.rglob("*.png")))
    rows = [[clipart / file] for file in files if file not in val]
    path = (folder / "unlabelled.csv").resolve()
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["file"], *rows])
    return path


def train(arm: str, seed: int) -> Path:
    changes, steps = ARMS[arm]
    run = FOLDER / f"{arm}-{seed}"
    config = FOLDER / ("naive.yaml" if arm == "naive" else "careful.yaml")
    overrides = [f"output_dir={run}", f"seed={seed}", f"total_steps={steps}", *changes.split()]
    call("train.py", "--config", config, *overrides)
    return run


def measure(model: Path, clipart: Path) -> dict[str, float]:
    return accuracy(model, clipart) | dense(model)


def accuracy(model: Path, clipart: Path) -> dict[str, float]:
    """On val.csv."""
    labelled = ["--train", f"list:{clipart}/train.csv", "--val", f"list:{clipart}/val.csv"]
    pictures = [*BF16, "--model", model, "--size", 98, *labelled]
    knn = call("eval_knn.py", *pictures, "--k", 20)
    linear = call("eval_linear.py", *pictures, "--protocol", "logreg")
    return {"knn": knn["k"]["20"], "linear": linear["top1"]}


def dense(model: str | Path) -> dict[str, float]:
    """The old domain here: segmentation of scenes by k-NN of patches, and correspondence."""
    scenes = [f"scenes?split={name}" for name in ("train&size=200", "val&size=100")]
    options = [*BF16, "--model", model, "--size", 224, "--val", scenes[1]]
    masks = call("eval_dense.py", "segmentation", *options, "--train", scenes[0], "--head", "knn")
    match = call("eval_dense.py", "correspondence", *options)
    return {"miou": masks["miou"], "recall": match["recall"]["0.05"]}


def call(script: str, *arguments, also: int = 0) -> dict:
    """The line of JSON that a script prints; {} of train.py.

    Args:
        also: an exit status that is well, besides 0.
    """
    command = [sys.executable, script, *map(str, arguments)]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    if run.returncode not in (0, also):
        sys.exit(f"{script} ended with status {run.returncode}")
    lines = run.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


if __name__ == "__main__":
    main()
