"""What a real teacher is worth on clip art and photographs (docs/results.md).

    python docs/experiments/real_distill.py SHARED --seeds 0 1

SHARED holds weights/dinov2-small, datasets/openclipart and images. A ViT of 1.4 M parameters and a
ConvNeXt of 3.4 M learn from the weights in one run of distill.py, for --minutes in all. The same
networks are trained from scratch on the same pictures, each for as long. k-NN and linear accuracy
on val.csv, of whose pictures none is trained on; runs/real_distill/results.json, which is gone on
with.
"""

import argparse
import csv
import json
from pathlib import Path

import yaml
from real_weights import STOPPED, accuracy, call, read, write_unlabelled

FOLDER = Path("runs/real_distill")
STUDENTS = {
    "vit": {"model": {"arch": "vit_nano", "depth": 6, "patch_size": 14, "positions": "rope"}},
    "convnext": {"model": {"arch": "timm:convnext_atto"}, "loss": {"ibot": {"weight": 0.0}}},
}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("shared", type=Path)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    flags.add_argument("--minutes", type=float, default=8.0)
    arguments = flags.parse_args()
    shared = arguments.shared.resolve()
    weights, clipart = shared / "weights/dinov2-small", shared / "datasets/openclipart"
    FOLDER.mkdir(parents=True, exist_ok=True)
    configs = write_configs(weights, clipart, shared / "images", arguments.minutes)
    results = read(FOLDER / "results.json")
    for seed in arguments.seeds:
        runs = {f"distilled-{seed}": ("distill.py", "distill")}
        runs |= {f"{name}-{seed}": ("train.py", name) for name in STUDENTS}
        for run, (script, config) in runs.items():
            folder = FOLDER / run
            call(script, "--config", configs[config], f"output_dir={folder}", f"seed={seed}",
                 also=STOPPED)  # fmt: skip
            students = {f"{run}, {name}": folder / "students" / name for name in STUDENTS}
            for label, model in (students if script == "distill.py" else {run: folder}).items():
                if label not in results:
                    results[label] = accuracy(model, clipart)
                    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
                    print(label, results[label], flush=True)


def write_configs(weights: Path, clipart: Path, photographs: Path, minutes: float) -> dict:
    """Name -> file: `distill`, and one for each student from scratch."""
    pictures = write_unlabelled(clipart, FOLDER)
    with open(pictures, "a", newline="") as file:
        found = sorted(path for path in photographs.iterdir() if path.suffix in (".png", ".jpg"))
        csv.writer(file).writerows([[path] for path in found])
    shared = {
        "base": str(Path("configs/clipart.yaml").resolve()),
        "total_steps": 100_000,
        "time_limit": minutes / 60,
        "batch_size": 32,
        "precision": "auto",
        "data": {"train": f"list:{pictures}", "workers": 0},
        "crops": {"global_size": 98, "local_size": 42},
        "loss": {"ibot": {"weight": 1.0, "prototypes": None, "centering": "sinkhorn"}},
        "schedule": {
            "lr": {"peak": 1e-3, "end": 1e-3, "warmup": 50, "shape": "constant"},
            "ema_momentum": 0.99,
            "teacher_temp": 0.04,
        },
        "checkpoint": {"every": 100_000},
    }
    values = {name: lay_over(shared, student) for name, student in STUDENTS.items()}
    section = {"teacher": str(weights), "match": "features", "students": STUDENTS}
    values["distill"] = shared | {"loss": {"koleo": {"weight": 0.0}}, "distill": section}
    files = {name: FOLDER / f"{name}.yaml" for name in values}
    for name, path in files.items():
        path.write_text(yaml.safe_dump(values[name]))
    return files


def lay_over(base: dict, changes: dict) -> dict:
    """`base` with `changes`, section by section."""
    both = dict(base)
    for key, value in changes.items():
        known = both.get(key)
        both[key] = lay_over(known, value) if isinstance(known, dict) else value
    return both


if __name__ == "__main__":
    main()
