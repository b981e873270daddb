"""What label guidance adds (docs/adapt.md): the quickstart with random crops, and with local crops
steered to the marks of a tenth of its images.

    python docs/experiments/guided.py --seeds 0 1 2 3 4

Same steps, same seeds. Pointing game and IoU of the attention, and k-NN: runs/guided/results.json
and a table on standard output.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

FOLDER = Path("runs/guided")
METRICS = ("pointing", "box_iou", "mask_iou")
VAL = "scenes?split=val&size=300"
KINDS = {"random": [], "guided": ["crops.guided=0.8", "crops.guided_share=0.1"]}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="for both")
    arguments = flags.parse_args()
    results: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for seed in arguments.seeds:
        for kind, keys in KINDS.items():
            run = Path(f"runs/quickstart-{seed}") if kind == "random" else FOLDER / f"{kind}-{seed}"
            call(
                "train.py",
                "--config",
                "configs/quickstart.yaml",
                f"output_dir={run}",
                f"seed={seed}",
                *keys,
                *arguments.overrides,
            )
            attention = call(
                "eval_dense.py", "localization", "--model", run, "--val", VAL, "--size", 96
            )["attention"]
            metrics = [
                json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
            ]
            accuracy = [line["probe/knn"] for line in metrics if "probe/knn" in line][-1]
            results[kind].append({"k-NN": accuracy} | {name: attention[name] for name in METRICS})
            print(seed, kind, results[kind][-1], file=sys.stderr, flush=True)
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| | random crops | guided | difference, seed by seed |\n|---|---|---|---|")
    for name in (*METRICS, "k-NN"):
        values = {kind: [seed[name] for seed in seeds] for kind, seeds in results.items()}
        values["difference"] = [
            new - old for old, new in zip(values["random"], values["guided"], strict=True)
        ]
        print("|", name, *(f"| {mean(v):.3f} ± {stdev(v):.3f}" for v in values.values()), "|")


def call(script: str, *arguments) -> dict:
    """The last line of the script's output, as JSON where it is."""
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip().startswith("{") else {}


if __name__ == "__main__":
    main()
