"""The harm and its cure (docs/adapt.md): scenes, continued on Fashion-MNIST, naively and by continue.yaml.

    python docs/experiments/adapt.py DIR --seeds 0 1 2        # DIR holds Fashion-MNIST in torchvision's layout

For every seed the quickstart is trained, then continued twice for the same number of steps. k-NN of all three on both
domains: runs/adapt/results.json and docs/adapt.png. What exists already is not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt

FOLDER = Path("runs/adapt")
SCENES = ("scenes?split=train&size=2000", "scenes?split=val&size=1000")
KINDS = ("before", "naive", "continue")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("dir", help="of Fashion-MNIST")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--steps", type=int, default=300)
    flags.add_argument("--naive", nargs="*", default=[], metavar="key=value", help="for the naive recipe")
    flags.add_argument("--cure", nargs="*", default=[], metavar="key=value", help="for continue.yaml")
    arguments = flags.parse_args()
    fashion = (f"fashion_mnist:{arguments.dir}?split=train&size=4000", f"fashion_mnist:{arguments.dir}?split=test&size=2000")
    domain = [f"data.train=fashion_mnist:{arguments.dir}?split=train", f"probe.train={fashion[0]}", f"probe.val={fashion[1]}"]
    both = FOLDER / "continue.yaml"
    FOLDER.mkdir(parents=True, exist_ok=True)
    configs = Path("configs").resolve()
    both.write_text(f"base: [{configs}/quickstart.yaml, {configs}/continue.yaml]\n")
    results = {kind: {"scenes": [], "fashion": []} for kind in KINDS}
    for seed in arguments.seeds:
        runs = {kind: FOLDER / f"{kind}-{seed}" for kind in KINDS} | {"before": Path(f"runs/quickstart-{seed}")}
        train("configs/quickstart.yaml", runs["before"], seed)
        start = [f"init={runs['before']}", f"total_steps={arguments.steps}", *domain]
        train("configs/quickstart.yaml", runs["naive"], seed, *start, "guard.action=warn", *arguments.naive)
        train(str(both), runs["continue"], seed, *start, "loss.dino.prototypes=64", "batch_size=32", "probe.every=100", *arguments.cure)
        for kind, run in runs.items():
            for name, (images, val) in {"scenes": SCENES, "fashion": fashion}.items():
                results[kind][name].append(knn(run, images, val))
                print(seed, kind, name, results[kind][name][-1], flush=True)
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, Path("docs/adapt.png"))


def train(config: str, run: Path, seed: int, *changes: str) -> None:
    command = [sys.executable, "train.py", "--config", config, f"output_dir={run}", f"seed={seed}", *changes]
    subprocess.run(command, check=True)


def knn(model: Path, images: str, val: str) -> float:
    command = [sys.executable, "eval_knn.py", "--model", str(model), "--train", images, "--val", val, "--k", "20"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["k"]["20"]


def draw(results: dict, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    for panel, (domain, title) in zip(panels, {"scenes": "scenes (old)", "fashion": "Fashion-MNIST (new)"}.items()):
        values = [results[kind][domain] for kind in KINDS]
        spreads = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        panel.bar(KINDS, [mean(v) for v in values], yerr=spreads, capsize=4, color=["#999999", "#d1605e", "#5b8db8"])
        for place, seeds in enumerate(values):
            panel.plot([place] * len(seeds), seeds, "k.", markersize=4)
        panel.set(title=title, ylabel="k-NN accuracy", ylim=(0.9 * min(map(min, values)) - 0.02, 1.02 * max(map(max, values))))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
