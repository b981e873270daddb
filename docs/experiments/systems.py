"""Heads on frozen features, each beside a linear one and on weaker features (docs/systems.md).

    python docs/experiments/systems.py SHARED [--only TASK]

SHARED holds weights/dinov2-small and images. Segmentation, depth and detection of `scenes` at 140
pixels (with 4 distractors for detection), for the released weights, the same network untrained, and
pixels; two seeds of the released weights, one of the others. runs/systems/results.json, which is
gone on with; the heads stay in runs/systems, and runs/systems/*.png are what those of the released
weights predict of scenes and of the photographs.
"""

import argparse
import json
from pathlib import Path

from real_weights import call, read

FOLDER = Path("runs/systems")
SIZE, SEEDS = 140, (0, 1)
SCENES = "scenes?resolution=140"
TASKS = {
    "segmentation": ("linear", "mask"),
    "depth": ("linear", "dpt"),
    "detection": ("linear", "fcos"),
}
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
SCORES = {"segmentation": "miou", "depth": "rmse", "detection": "map"}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("shared", type=Path)
    flags.add_argument("--only", choices=TASKS, nargs="+", default=list(TASKS))
    arguments = flags.parse_args()
    shared = arguments.shared.resolve()
    FOLDER.mkdir(parents=True, exist_ok=True)
    models = {
        "released": str(shared / "weights/dinov2-small"),
        "untrained": "random:vit_small?patch_size=14&layerscale=1e-5&image_size=518",
        "pixels": "pixels?patch_size=14",
    }
    path = FOLDER / "results.json"
    for seed in SEEDS:
        for task in arguments.only:
            for model, where in models.items():
                if seed and model != "released":
                    continue
                for head in TASKS[task]:
                    key = f"{task}, {model}, {head}, seed {seed}"
                    if key in read(path):
                        continue
                    result = measure(task, where, head, seed, FOLDER / key.replace(", ", "-"))
                    results = read(path) | {key: result}  # another task may run beside this one
                    path.write_text(json.dumps(results, indent=1) + "\n")
                    found = {name: results[key][name] for name in (SCORES[task], "seconds")}
                    print(key, found, flush=True)
    for task in arguments.only:
        draw(task, shared)


def measure(task: str, model: str, head: str, seed: int, output: Path) -> dict:
    extra = "&distractors=4" if task == "detection" else ""
    data = ("--train", f"{SCENES}{extra}&size=400", "--val", f"{SCENES}{extra}&split=val&size=100")
    kept = ("--output", output.with_name(output.name.replace(" ", "")))
    length = LENGTH.get(head, LENGTH[None]) if by_steps(task, head) else ()
    flags = ("--model", model, "--head", head, "--seed", seed, "--size", SIZE, *data, *length)
    return call("eval_dense.py", task, *flags, "--workers", 0, *kept)


def by_steps(task: str, head: str) -> bool:
    """Whether a head is one of evals/heads.py; the others go by epochs."""
    return head != "linear" or task == "detection"


# Of two cores' minutes.
LENGTH = {None: ("--steps", 400), "mask": ("--steps", 600, "--width", 64, "--lr", 2e-3)}


def draw(task: str, shared: Path) -> None:
    head = FOLDER / f"{task}-released-{TASKS[task][1]}-seed0"
    scenes = f"{SCENES}&split=val&size=8" + ("&distractors=4" if task == "detection" else "")
    for name, images in {
        "scenes": (scenes,),
        "photographs": [shared / "images" / name for name in PHOTOGRAPHS],
    }.items():
        path = FOLDER / f"{task}_{name}.png"
        if not path.exists():
            images = ("--images", *images, "--count", 4)
            call("visualize.py", "predictions", "--head", head, *images, "--output", path)


if __name__ == "__main__":
    main()
