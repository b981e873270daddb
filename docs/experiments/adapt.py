"""The harm and its cure (docs/adapt.md): a model of scenes and Fashion-MNIST, continued on
Fashion-MNIST, naively and carefully.

    python docs/experiments/adapt.py DIR --seeds 0 1 2    # DIR holds torchvision's Fashion-MNIST

For every seed a model is trained on both, as released weights have seen something of everything,
with a rate that falls at the end. It is then continued twice for the same number of steps: by a
published recipe as it stands, on the new images alone, and by configs/continue.yaml with every
fourth image from the old domain. k-NN of all three on both domains: runs/adapt/results.json and
docs/adapt.png. What exists already is not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

FOLDER = Path("runs/adapt")
SCENES = ("scenes?split=train&size=8000", "scenes?split=val&size=4000")
KINDS = ("before", "naive", "continue")
FALL = [
    "schedule.lr.end=1e-6",
    "schedule.lr.shape=cosine",
    "schedule.ema_momentum.shape=cosine",
    "schedule.ema_momentum.end=0.996",
]
# DINOv2's rate, temperature and EMA for batches of 1,024, as its configuration has them, and many
# new prototypes.
NAIVE = [
    "schedule.lr.peak=4e-3",
    "schedule.lr.end=4e-3",
    "schedule.teacher_temp=0.07",
    "schedule.ema_momentum=0.992",
    "loss.dino.prototypes=16384",
]
CURE = [  # what the model was trained with, and a rate that the old images allow
    "loss.dino.prototypes=64",
    "batch_size=32",
    "schedule.lr.peak=5e-4",
    "schedule.ema_momentum=0.99",
    "schedule.teacher_temp=0.02",
    "stages.heads.schedule.teacher_temp=0.02",
]


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("dir", help="of Fashion-MNIST")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--steps", type=int, default=600)
    arguments = flags.parse_args()
    new = f"fashion_mnist:{arguments.dir}?split=train"
    fashion = (new, f"fashion_mnist:{arguments.dir}?split=test")
    half, quarter, careful = (FOLDER / f"{name}.yaml" for name in ("half", "quarter", "careful"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, weight in ((half, 1), (quarter, 3)):
        path.write_text(
            f'- {{data: "{new}", weight: {weight}}}\n'
            '- {data: "scenes?split=train&size=8000", weight: 1}\n'
        )
    configs = Path("configs").resolve()
    careful.write_text(f"base: [{configs}/quickstart.yaml, {configs}/continue.yaml]\n")
    results = {kind: {"scenes": [], "fashion": []} for kind in KINDS}
    for seed in arguments.seeds:
        long = FOLDER / f"long-{seed}"
        runs = {kind: FOLDER / f"{kind}-{seed}" for kind in KINDS}
        quickstart, mixed = (
            "configs/quickstart.yaml",
            [f"data.train={half}", "guard.action=null", "probe.every=0"],
        )
        train(quickstart, long, seed, *mixed, "total_steps=3000")
        train(quickstart, runs["before"], seed, *mixed, f"init={long}", "total_steps=2400", *FALL)
        start = [
            f"init={runs['before']}",
            f"total_steps={arguments.steps}",
            "guard.action=null",
            "probe.every=0",
        ]
        train(quickstart, runs["naive"], seed, *start, f"data.train={new}", *NAIVE)
        train(str(careful), runs["continue"], seed, *start, f"data.train={quarter}", *CURE)
        for kind, run in runs.items():
            for name, (images, val) in {"scenes": SCENES, "fashion": fashion}.items():
                results[kind][name].append(knn(run, images, val))
                print(seed, kind, name, results[kind][name][-1], flush=True)
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, Path("docs/adapt.png"))


def train(config: str, run: Path, seed: int, *changes: str) -> None:
    command = [
        sys.executable,
        "train.py",
        "--config",
        config,
        f"output_dir={run}",
        f"seed={seed}",
        *changes,
    ]
    subprocess.run(command, check=True)


def knn(model: Path, images: str, val: str) -> float:
    command = [
        sys.executable,
        "eval_knn.py",
        "--model",
        str(model),
        "--train",
        images,
        "--val",
        val,
        "--k",
        "20",
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["k"]["20"]


def draw(results: dict, path: Path) -> None:
    """A line a seed: what either way of going on makes of the same model."""
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    order = {"naive": "naively", "before": "before", "continue": "continue.yaml"}
    for panel, (domain, title) in zip(
        panels, {"fashion": "Fashion-MNIST (new)", "scenes": "scenes (old)"}.items(), strict=True
    ):
        values = [results[kind][domain] for kind in order]
        panel.axhline(mean(results["before"][domain]), color="0.8", linewidth=1)
        panel.plot(list(order.values()), values, color="0.6", marker="o", markersize=4, linewidth=1)
        panel.plot(
            list(order.values()),
            [mean(seeds) for seeds in values],
            color="#1f5fa8",
            marker="o",
            linewidth=2,
        )
        panel.set(title=title, ylabel="k-NN accuracy")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
