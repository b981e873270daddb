"""Gram anchoring heals patches, from released weights (docs/gram.md; DINOv3, figures 5 and 8).

    python docs/experiments/gram_heals.py SHARED --wreck 120 --rate 5e-4

SHARED holds weights/dinov2-small and datasets/openclipart. Training goes on on clip art with a
recipe that wrecks patches: the DINO term alone at a constant high rate. Then comes a stage with the
Gram term, whose teacher is the snapshot with the best locality (`teacher: auto`), at a lower rate.
Of each snapshot: k-NN and locality on val.csv, by the run itself, and on scenes, which nothing was
trained on, segmentation by k-NN of patches, and correspondence. results.json and curve.png
in --folder; what results.json holds is not made again.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import yaml
from real_weights import CROPS, call, dense, read, write_unlabelled

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WEIGHTS = Path("weights/dinov2-small")
HEADS, EVERY = 20, 40  # steps
LABELS = {
    "probe/knn": "k-NN, clip art",
    "probe/locality": "locality, clip art",
    "miou": "patch mIoU, scenes",
    "recall": "correspondence, scenes",
}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("shared", type=Path)
    flags.add_argument("--wreck", type=int, default=120, help="steps of the wrecking recipe")
    flags.add_argument("--rate", type=float, default=5e-4, help="its learning rate")
    flags.add_argument("--heal", type=int, default=120, help="steps of the Gram stage")
    follows = "of the teacher, which is what is measured"
    flags.add_argument("--momentum", type=float, default=0.99, help=follows)
    alone = "in the Gram stage the Gram term alone, at weight 10"
    flags.add_argument("--alone", action="store_true", help=alone)
    flags.add_argument("--folder", type=Path, default=Path("runs/heal"))
    arguments = flags.parse_args()
    shared, folder = arguments.shared.resolve(), arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    call("train.py", "--config", write_config(shared, arguments))
    results = read(folder / "results.json")
    for step, probed in probes(folder / "run").items():
        if str(step) not in results:
            model = f"{folder}/run@{step}" if step else shared / WEIGHTS
            results[str(step)] = probed | dense(model)
            (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            print(step, results[str(step)], flush=True)
    draw(results, HEADS + arguments.wreck, folder / "curve.png")


def write_config(shared: Path, arguments: argparse.Namespace) -> Path:
    folder, rate = arguments.folder, arguments.rate
    clipart, configs = shared / "datasets/openclipart", Path("configs").resolve()
    constant = {"start": 0, "peak": rate, "end": rate, "warmup": "10%", "shape": "constant"}
    gram = {"ibot": {"weight": 0.0}, "gram": {"weight": 2.0, "teacher": "auto"}}
    if arguments.alone:  # DINO's term keeps a trace, so that its head has a gradient
        gram |= {"dino": {"weight": 1e-4}, "koleo": {"weight": 0.0}}
        gram["gram"]["weight"] = 10.0
    values = {
        "base": [f"{configs}/dinov2_vits14.yaml", f"{configs}/continue.yaml"],
        "output_dir": str(folder / "run"),
        "init": str(shared / WEIGHTS),
        "data": {"train": f"list:{write_unlabelled(clipart, folder)}", "workers": 0},
        "crops": CROPS,
        "batch_size": 32,
        "loss": {"gram": {"weight": 0.0}},
        "optim": {"layer_decay": 1.0},
        "schedule": {"ema_momentum": {"peak": arguments.momentum, "end": arguments.momentum}},
        "stages": {
            "heads": {"steps": HEADS},
            "adapt": {
                "steps": arguments.wreck,
                "loss": {"ibot": {"weight": 0.0}},
                "schedule": {"lr": constant},
            },
            "heal": {
                "steps": arguments.heal,
                "loss": gram,
                "schedule": {"lr": {"peak": 2e-4}},
            },
        },
        "probe": {
            "every": EVERY,
            "patches": True,
            "train": f"list:{clipart}/train.csv",
            "val": f"list:{clipart}/val.csv",
        },
        "guard": {"action": None},
        "checkpoint": {"every": 100, "snapshot": EVERY},
    }
    path = folder / "heal.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def probes(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what the run measured there."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    names = ("probe/knn", "probe/locality")
    return {
        line["step"]: {name: line[name] for name in names} for line in lines if names[0] in line
    }


def draw(results: dict[str, dict], wrecked: int, path: Path) -> None:
    steps = sorted(map(int, results))
    figure, axes = plt.subplots(1, len(LABELS), figsize=(13, 3), layout="constrained")
    for axis, (name, label) in zip(axes, LABELS.items(), strict=True):
        axis.plot(steps, [results[str(step)][name] for step in steps], marker="o")
        axis.axvspan(HEADS, wrecked, color="tab:red", alpha=0.08, label="wrecking recipe")
        axis.axvspan(wrecked, steps[-1], color="tab:green", alpha=0.08, label="Gram stage")
        axis.set(title=label, xlabel="step")
    axes[0].legend(loc="lower center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
