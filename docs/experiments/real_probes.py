"""Every dense probe and every picture of released weights (docs/released.md).

    python docs/experiments/real_probes.py SHARED

SHARED holds weights/dinov2-small, datasets/openclipart and images. The probes run on `scenes` at
224 pixels in bf16, for the weights, for the same network untrained, and for pixels. The pictures
are of the photographs in SHARED/images, and of clip art. runs/probes/results.json, which is gone
on with, and runs/probes/*.png.
"""

import argparse
import json
from pathlib import Path

from real_weights import BF16, call, read

FOLDER = Path("runs/probes")
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
TRAIN, VAL = "scenes?split=train&size=400", "scenes?split=val&size=200"
PROBES = {
    "segmentation": ("--train", TRAIN, "--val", VAL),
    "depth": ("--train", TRAIN, "--val", VAL),
    "correspondence": ("--val", VAL),
    "tracking": ("--val", "scenes?split=val&size=30&frames=8"),
    "localization": ("--val", VAL),
}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("shared", type=Path)
    shared = flags.parse_args().shared.resolve()
    FOLDER.mkdir(parents=True, exist_ok=True)
    weights = shared / "weights/dinov2-small"
    models = {
        "released": str(weights),
        "untrained": "random:vit_small?patch_size=14&layerscale=1e-5&image_size=518",
        "pixels": "pixels?patch_size=14",
    }
    results = read(FOLDER / "results.json")
    for task, data in PROBES.items():
        for name, model in models.items():
            key = f"{task}, {name}"
            if key in results or (task, name) == ("localization", "pixels"):
                continue
            flags = ("--model", model, "--size", 224, *BF16, *data)
            results[key] = call("eval_dense.py", task, *flags)
            (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            print(key, results[key], flush=True)
    draw(weights, shared)


def draw(weights: Path, shared: Path) -> None:
    photographs = [shared / "images" / name for name in PHOTOGRAPHS]
    clipart = shared / "datasets/openclipart"
    model = ("--model", weights)
    recipe = ("--config", "continue_dinov2_vits14.yaml", "--images", *photographs[:2])
    pictures = {
        "pca": (*model, "--size", 448, "--joint", "--images", *photographs),
        "foreground": (*model, "--size", 448, "--foreground", "--images", *photographs),
        "attention": (*model, "--size", 448, "--images", *photographs[:2]),
        "similarity": (*model, "--size", 448, "--points", "200,120", "300,200", "--images",
                       *photographs[:2]),
        "embedding": (*model, "--size", 98, "--count", 120, "--images",
                      f"list:{clipart}/val.csv"),
        "crops": recipe,
        "masks": recipe,
    }  # fmt: skip
    for name, arguments in pictures.items():
        task = "pca" if name == "foreground" else name
        path = FOLDER / f"{name}.png"
        if not path.exists():
            call("visualize.py", task, *arguments, "--output", path)
    runs = [Path("runs/real") / run for run in ("gram-0", "partial-0", "naive-0")]
    if all(run.is_dir() for run in runs) and not (FOLDER / "curves.png").exists():
        call("visualize.py", "curves", "--runs", *runs, "--output", FOLDER / "curves.png")


if __name__ == "__main__":
    main()
