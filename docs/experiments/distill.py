"""What a teacher is worth (configs/distill_quickstart.yaml): the students of
distill_quickstart.yaml, of a quickstart that went on to 2,700 steps, and the same networks trained
from scratch for the wall time that the whole distillation took.

    python docs/experiments/distill.py --seeds 0 1 2

k-NN on scenes: runs/distilled/results.json and a table on standard output.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

FOLDER = Path("runs/distilled")
PROBE = (
    "--train",
    "scenes?split=train&size=2000",
    "--val",
    "scenes?split=val&size=1000",
    "--k",
    "20",
)
# As in distill_quickstart.yaml. A convolution has no mask token, and its stride of 32 wants larger
# local crops.
STUDENTS = {
    "half": ["model.embed_dim=64", "model.num_heads=2"],
    "convnext": [
        "model.arch=timm:test_convnext2",
        "crops.global_size=64",
        "crops.local_size=32",
        "loss.ibot.weight=0",
    ],
}
STOPPED = 3  # exit status of a run whose time is over


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="for distill.py")
    arguments = flags.parse_args()
    results: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        teacher, distilled = Path(f"runs/long-{seed}"), FOLDER / f"students-{seed}"
        run(
            "train.py",
            "--config",
            "configs/quickstart.yaml",
            f"output_dir={teacher}",
            f"seed={seed}",
            "total_steps=2700",
        )
        keys = [
            f"output_dir={distilled}",
            f"seed={seed}",
            f"distill.teacher={teacher}",
            "probe.every=0",
            *arguments.overrides,
        ]
        start = time.perf_counter()
        run("distill.py", "--config", "configs/distill_quickstart.yaml", *keys)
        timed = FOLDER / f"seconds-{seed}"
        if not timed.exists():  # started again, a finished run says so at once
            timed.write_text(f"{time.perf_counter() - start:.1f}")
        seconds = float(timed.read_text())
        results.setdefault("teacher", []).append(knn(teacher))
        for name, model in STUDENTS.items():
            scratch = FOLDER / f"{name}-{seed}"
            length = [
                "total_steps=100000",
                f"time_limit={seconds / 3600:.5f}",
                "probe.every=0",
                "checkpoint.every=100000",
            ]
            run(
                "train.py",
                "--config",
                "configs/quickstart.yaml",
                f"output_dir={scratch}",
                f"seed={seed}",
                *length,
                *model,
            )
            results.setdefault(f"{name}, distilled", []).append(knn(distilled / "students" / name))
            results.setdefault(f"{name}, from scratch", []).append(knn(scratch))
        print(
            seed,
            round(seconds),
            {name: values[-1] for name, values in results.items()},
            file=sys.stderr,
            flush=True,
        )
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, values in results.items():
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        print(f"| {name} | {mean(values):.3f}{spread} |")


def run(script: str, *arguments: str) -> None:
    status = subprocess.run([sys.executable, script, *arguments]).returncode
    if status not in (0, STOPPED):
        sys.exit(f"{script} ended with status {status}")


def knn(model: Path) -> float:
    command = [sys.executable, "eval_knn.py", "--model", str(model), *PROBE]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["k"]["20"]


if __name__ == "__main__":
    main()
