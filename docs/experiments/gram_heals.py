"""Gram anchoring heals patches, from released weights (docs/gram.md; DINOv3, figures 5 and 8).

    python docs/experiments/gram_heals.py SHARED

SHARED holds weights/dinov2-small and datasets/openclipart. Training goes on on clip art with a
recipe that wrecks patches: the DINO term alone at a constant high rate. Then comes a stage with the
Gram term, whose teacher is the snapshot with the best locality (`teacher: auto`), at a lower rate.
Of each snapshot: k-NN and locality on val.csv, by the run itself, and on scenes, which nothing was
trained on, segmentation by k-NN of patches, and correspondence. runs/heal/results.json and
curve.png; what results.json holds is not made again.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import yaml
from real_weights import CROPS, call, dense, read, write_unlabelled

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path("runs/heal")
WEIGHTS = Path("weights/dinov2-small")
HEADS, WRECK, HEAL, EVERY = 20, 240, 160, 40  # steps
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
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="for train.py")
    arguments = flags.parse_args()
    shared = arguments.shared.resolve()
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = write_config(shared)
    call("train.py", "--config", config, *arguments.overrides)
    results = read(FOLDER / "results.json")
    for step, probed in probes(FOLDER / "run").items():
        if str(step) not in results:
            model = f"{FOLDER}/run@{step}" if step else shared / WEIGHTS
            results[str(step)] = probed | dense(model)
            (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            print(step, results[str(step)], flush=True)
    draw(results, FOLDER / "curve.png")


def write_config(shared: Path) -> Path:
    clipart, configs = shared / "datasets/openclipart", Path("configs").resolve()
    constant = {"start": 0, "peak": 1e-3, "end": 1e-3, "warmup": "10%", "shape": "constant"}
    values = {
        "base": [f"{configs}/dinov2_vits14.yaml", f"{configs}/continue.yaml"],
        "output_dir": str(FOLDER / "run"),
        "init": str(shared / WEIGHTS),
        "data": {"train": f"list:{write_unlabelled(clipart, FOLDER)}", "workers": 0},
        "crops": CROPS,
        "batch_size": 32,
        "loss": {"gram": {"weight": 0.0}},
        "optim": {"layer_decay": 1.0},
        "stages": {
            "heads": {"steps": HEADS},
            "adapt": {
                "steps": WRECK,
                "loss": {"ibot": {"weight": 0.0}},
                "schedule": {"lr": constant},
            },
            "heal": {
                "steps": HEAL,
                "loss": {"ibot": {"weight": 0.0}, "gram": {"weight": 2.0, "teacher": "auto"}},
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
    path = FOLDER / "heal.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def probes(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what the run measured there."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    names = ("probe/knn", "probe/locality")
    return {
        line["step"]: {name: line[name] for name in names} for line in lines if names[0] in line
    }


def draw(results: dict[str, dict], path: Path) -> None:
    steps = sorted(map(int, results))
    figure, axes = plt.subplots(1, len(LABELS), figsize=(13, 3), layout="constrained")
    for axis, (name, label) in zip(axes, LABELS.items(), strict=True):
        axis.plot(steps, [results[str(step)][name] for step in steps], marker="o")
        axis.axvspan(HEADS, HEADS + WRECK, color="tab:red", alpha=0.08, label="wrecking recipe")
        axis.axvspan(HEADS + WRECK, steps[-1], color="tab:green", alpha=0.08, label="Gram stage")
        axis.set(title=label, xlabel="step")
    axes[0].legend(loc="lower center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
