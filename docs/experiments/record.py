"""Record what the shipped configurations compute, to show that a refactor changes nothing.

    python docs/experiments/record.py run before.json --work /tmp/before    # on the old commit
    python docs/experiments/record.py run after.json --work /tmp/after    # on the new one
    python docs/experiments/record.py compare before.json after.json    # exit status 1: they differ

`run` trains 30 steps of several configurations (one thread, seed 0), measures the quickstart's
teacher with every evaluation, exports it and draws every picture. It keeps losses, JSON lines and
hashes of files. Seconds, rates, memory and versions are left out. `--only NAME ...` runs some of
the commands; `--checkout DIR` records another checkout.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

TIMINGS = {
    "seconds",
    "images_per_second",
    "data_wait_fraction",
    "memory_gib",
    "step_ms",
    "time",
    "output",
}
STEPS = "total_steps=30 log_every=1 device=cpu"
TRAIN, VAL = '"scenes?split=train&size=200"', '"scenes?split=val&size=60"'
QUICK = f"--config configs/quickstart.yaml {STEPS}"
DISTILL = f"--config configs/distill_quickstart.yaml {STEPS}"
COMMANDS = {
    "quickstart": f"train.py {QUICK} probe.every=15 checkpoint.every=15",
    "accumulated": f"train.py {QUICK} probe.every=0 checkpoint.every=30 "
    "micro_batch_size=16 loss.dino.centering=ema loss.ibot.prototypes=32 loss.ibot.centering=ema "
    "optim.clip_per=tensor optim.layer_decay=0.9 optim.freeze_last_layer=5 "
    "optim.patch_embed_lr=0.2",
    "lora": f"train.py {QUICK} probe.every=0 checkpoint.every=30 tune.mode=lora",
    "stages": f"train.py --config configs/dinov3_quickstart.yaml {STEPS} batch_size=32 "
    "probe.every=10 "
    "checkpoint.every=10 checkpoint.snapshot=7 stages.gram.loss.gram.refresh=2",
    "distilled": f"distill.py {DISTILL} probe.every=15 checkpoint.every=15 "
    "distill.teacher={work}/quickstart",
    "distilled_heads": f"distill.py {DISTILL} probe.every=0 checkpoint.every=30 "
    "distill.teacher={work}/quickstart distill.match=heads distill.students.convnext=null",
    "fashion_mnist": f"train.py --config configs/fashion_mnist.yaml {STEPS} checkpoint.every=30 "
    'data.train="fashion_mnist:{datasets}?split=train"',
    "knn": f"eval_knn.py --model {{run}} --train {TRAIN} --val {VAL} --retrieval --copies",
    "knn_pixels": f'eval_knn.py --model "pixels?patch_size=6" --size 48 --train {TRAIN} '
    f"--val {VAL}",
    "linear": f"eval_linear.py --model {{run}} --train {TRAIN} --val {VAL} --steps 50",
    "linear_dino": f"eval_linear.py --model {{run}} --train {TRAIN} --val {VAL} --protocol "
    "dino --steps 50",
    "logreg": f"eval_linear.py --model {{run}} --train {TRAIN} --val {VAL} --protocol "
    f"logreg --also {VAL}",
    "segmentation": f"eval_dense.py segmentation --model {{run}} --train {TRAIN} --val {VAL}",
    "depth": f"eval_dense.py depth --model {{run}} --train {TRAIN} --val {VAL}",
    "correspondence": f"eval_dense.py correspondence --model {{run}} --val {VAL}",
    "tracking": 'eval_dense.py tracking --model {run} --val "scenes?split=val&size=10&frames=8"',
    "localization": f"eval_dense.py localization --model {{run}} --train {TRAIN} --val {VAL}",
    "extract": f"extract.py --model {{run}} --data {VAL} --features cls mean patches "
    f"--output {{out}}",
    "export_hf": "export.py --model {run} --format hf --output {out}",
    "export_timm": "export.py --model {run} --format timm --output {out}",
    "export_meta": "export.py --model {run} --format meta --output {out}",
    "export_own": "export.py --model {run} --format own --output {out}",
    "pca": "visualize.py pca --model {run} --images scenes --output {out}/pca.png",
    "attention": "visualize.py attention --model {run} --images scenes --output "
    "{out}/attention.png",
    "similarity": "visualize.py similarity --model {run} --images scenes --output "
    "{out}/similarity.png",
    "embedding": "visualize.py embedding --model {run} --images scenes --count 40 --output "
    "{out}/embedding.png",
    "crops": "visualize.py crops --config configs/quickstart.yaml --images scenes --output "
    "{out}/crops.png",
    "masks": "visualize.py masks --config configs/quickstart.yaml --images scenes --output "
    "{out}/masks.png",
    "stats": "-m data.stats scenes?size=100",
}
HASHED = (
    ".safetensors",
    ".npy",
    ".pth",
    ".png",
    ".csv",
)  # of files that an evaluation, export or picture leaves


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "compare"))
    parser.add_argument(
        "files", nargs="+", type=Path, help="run: where to write; compare: the two records"
    )
    parser.add_argument("--work", type=Path, help="run: folder for runs and exports")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--datasets", default="../shared/datasets", help="folder with FashionMNIST")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    arguments = parser.parse_args()
    if arguments.action == "compare":
        sys.exit(compare(*arguments.files))
    record = {name: run(name, arguments) for name in arguments.only}
    arguments.files[0].write_text(json.dumps(record, indent=1) + "\n")


def run(name: str, arguments: argparse.Namespace) -> dict:
    work = arguments.work.resolve()
    out = work / name
    places = {"work": work, "run": work / "quickstart", "out": out, "datasets": arguments.datasets}
    words = shlex.split(COMMANDS[name].format(**places))
    trains = words[0] in ("train.py", "distill.py")
    words += [f"output_dir={out}", "overwrite=true"] if trains else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=arguments.checkout, env=env, capture_output=True, text=True
    )
    print(
        f"{name}: exit {done.returncode}, {time.perf_counter() - start:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    if done.returncode:
        return {"exit": done.returncode, "error": done.stderr.splitlines()[-3:]}
    if trains:
        return {
            str(path.parent.relative_to(work)): steps(path)
            for path in sorted(out.rglob("metrics.jsonl"))
        }
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    text = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith("{") and str(work) not in line
    ]
    hashes = {
        str(p.relative_to(out)): digest(p) for p in sorted(out.rglob("*")) if p.suffix in HASHED
    }
    return {
        "json": [without_timings(line, str(work)) for line in lines],
        "text": text,
        "files": hashes,
    }


def steps(path: Path) -> list[dict]:
    return [without_timings(json.loads(line), "") for line in path.read_text().splitlines()]


def without_timings(value: object, work: str) -> object:
    if isinstance(value, dict):
        return {
            key: without_timings(item, work) for key, item in value.items() if key not in TIMINGS
        }
    if isinstance(value, list):
        return [without_timings(item, work) for item in value]
    return value.replace(work, "WORK") if work and isinstance(value, str) else value


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compare(before: Path, after: Path) -> int:
    """Prints, command by command, how many values are equal. Returns the exit status."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    differ = 0
    for name in sorted(old.keys() & new.keys()):
        left, right = dict(flat(old[name])), dict(flat(new[name]))
        changed = [
            key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)
        ]
        differ += bool(changed)
        print(f"{name}: {len(left) - len(changed)} of {len(left)} values equal")
        for key in changed[:5]:
            print(f"    {key}: {left.get(key)} -> {right.get(key)}")
    only = sorted(old.keys() ^ new.keys())
    print(
        f"{len(old.keys() & new.keys())} commands compared, {differ} differ"
        + (f"; only in one: {only}" if only else "")
    )
    return int(differ > 0)


def flat(value: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for key, item in items for pair in flat(item, f"{path}/{key}")]
    return [(path, value)]


if __name__ == "__main__":
    main()
