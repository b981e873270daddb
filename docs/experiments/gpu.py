"""What docs/performance.md says of one GPU: speed, the authors' step, memory, the tests for GPUs.

    python docs/experiments/gpu.py OUT --dinov3 path/to/dinov3        # gpu.sh is the usual way in
    python docs/experiments/gpu.py OUT --size toy                     # at toy size, on a CPU

Each part is a process with a time limit of its own, the most valuable first. OUT/gpu.json and the
tables in OUT/gpu.md are written after each part, so a call that is cut off keeps what it has;
OUT/gpu.log holds what the parts said. A part that fails is recorded, and the rest goes on. What
lies in OUT already is kept. The images are noise of 500 x 375 pixels in JPEG files, made here.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpu_tables import markdown
from photographs import write_photographs

ROOT = Path(__file__).parents[2]
LEAST = 15  # seconds; with less left in the budget no part starts
VITL = ["crops.global_size=256", "crops.local_size=112", "crops.local_count=8"]
VITS = ["crops.global_size=224", "crops.local_size=96", "crops.local_count=8"]
TOY = ["device=cpu", "model.arch=vit_nano", "loss.dino.prototypes=256", "loss.ibot.prototypes=256"]
TOY += ["crops.global_size=64", "crops.local_size=32", "crops.local_count=2"]


@dataclass(frozen=True)
class Size:
    """How large everything is: images, batches of ViT-L and ViT-S, steps, and the time limits."""

    photographs: int
    batches: dict[str, int]
    smaller: dict[str, int]  # batches where the first do not fit into memory
    group: int  # of the KoLeo loss
    workers: int
    steps: dict[str, list[str]]
    changes: dict[str, list[str]]
    limit: float  # factor on the limits of all parts
    authors: dict[str, list[str]]
    tests: list[str]


FULL = Size(
    photographs=1000,
    batches={"vitl16": 64, "vits16": 128},
    smaller={"vitl16": 32, "vits16": 64},
    group=16,
    workers=16,
    # The warm-up uses up the batches that the loader made while the model was compiled.
    steps={
        "vitl16": ["--steps", "25", "--warmup", "15"],
        "vits16": ["--steps", "60", "--warmup", "40"],
    },
    changes={"vitl16": VITL, "vits16": VITS},
    limit=1.0,
    authors={
        "vitl16": ["--arch", "vit_large", "--sizes", "256", "112", "8", "--batch", "32"],
        "vits16": ["--arch", "vit_small", "--sizes", "224", "96", "8", "--batch", "64"],
    },
    tests=["-q"],
)
TOY_SIZE = Size(
    photographs=24,
    batches={"vitl16": 4, "vits16": 8},
    smaller={"vitl16": 2, "vits16": 4},
    group=2,
    workers=1,
    steps={name: ["--steps", "2", "--warmup", "2"] for name in ("vitl16", "vits16")},
    changes={"vitl16": TOY, "vits16": TOY},
    limit=4.0,
    authors={
        name: ["--arch", "vit_small", "--sizes", "64", "32", "2", "--batch", batch]
        + ["--prototypes", "256", "--steps", "5"]
        for name, batch in (("vitl16", "4"), ("vits16", "2"))
    },
    tests=["-q", "--collect-only"],
)
SIZES = {"full": FULL, "toy": TOY_SIZE}


@dataclass(frozen=True)
class Part:
    """One measurement: `command` prints one line of JSON last, unless `read` says otherwise."""

    name: str
    command: list[str]
    limit: int  # seconds
    smaller: list[str] | None = None  # the command where the first one has too little memory
    facts: tuple[tuple[str, str], ...] = ()  # added to the result
    read: Callable[[str], dict] | None = None  # standard output -> result
    missing: str = ""  # why the part cannot run


def main() -> None:
    arguments = parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    size = SIZES[arguments.size]
    file = arguments.out / "gpu.json"
    report = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as scratch:
        environment = process_environment(arguments.packages, Path(scratch) / "packages")
        report["machine"] = describe_machine()
        photographs = Path(scratch) / "photographs"
        write_photographs(photographs, size.photographs)
        report["machine"]["seconds_to_make_the_images"] = round(time.monotonic() - started, 1)
        workers = loader_workers(size)
        for part in plan(size, photographs, workers, arguments.dinov3):
            if arguments.only and part.name not in arguments.only:
                continue
            left = arguments.budget - (time.monotonic() - started)
            result = run_part(part, left, size.limit, environment, arguments.out / "gpu.log")
            report["parts"][part.name] = result
            report["seconds"] = round(time.monotonic() - started, 1)
            write(report, arguments.out)
    write(report, arguments.out)
    print((arguments.out / "gpu.md").read_text())


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("out", type=Path, help="folder for gpu.json, gpu.md and gpu.log")
    flags.add_argument("--size", choices=SIZES, default="full")
    flags.add_argument("--budget", type=float, default=470.0, help="seconds for everything")
    flags.add_argument("--dinov3", type=Path, help="a checkout of the authors' repository")
    flags.add_argument("--packages", type=Path, help="packages for what is not installed")
    flags.add_argument("--only", nargs="+", help="names of parts")
    return flags


# ----------------------------------------------------------------- what is run


def plan(size: Size, photographs: Path, workers: int, dinov3: Path | None) -> list[Part]:
    """All parts in the order of their worth."""
    bench = partial(bench_part, size, photographs, workers)
    authors = partial(authors_part, size, dinov3)
    return [
        bench("vits16", "off", "workers", 110),  # the first part reads everything from a cold disk
        bench("vits16", "on", "workers", 110),
        bench("vitl16", "off", "workers", 90),
        bench("vitl16", "on", "workers", 120),
        authors("vitl16", 170),
        authors("vits16", 120),
        memory_part(size, photographs, 45),
        bench("vitl16", "off", "workers", 60, checkpointing="blocks"),
        bench("vits16", "on", "device", 80),
        bench("vitl16", "on", "device", 90),
        tests_part(size, 60),
    ]


def bench_part(
    size: Size,
    photographs: Path,
    workers: int,
    model: str,
    compiled: str,
    augmented: str,
    limit: int,
    checkpointing: str = "none",
) -> Part:
    """bench.py on JPEG files; the peak of memory is that of this one variant."""
    keys = [
        f"compile={str(compiled == 'on').lower()}",
        f"data.augment_on={augmented}",
        f"data.workers={workers}",
        f"checkpointing={checkpointing}",
    ]
    commands = [
        [*bench_command(size, photographs, model, batch), *keys, *size.steps[model]]
        for batch in (size.batches[model], size.smaller[model])
    ]
    facts = {
        "model": model,
        "compile": compiled,
        "augmentation": augmented,
        "checkpointing": checkpointing,
    }
    suffix = "" if checkpointing == "none" else "_checkpointed"
    name = f"bench_{model}_compile_{compiled}_{augmented}{suffix}"
    return Part(name, commands[0], limit, commands[1], tuple(facts.items()))


def memory_part(size: Size, photographs: Path, limit: int) -> Part:
    """The memory that bench.py computes for each batch that may be measured, all at once."""
    calls = [
        [*bench_command(size, photographs, model, batch), "--memory"]
        for model in size.batches
        for batch in (size.batches[model], size.smaller[model])
    ]
    code = (
        "import subprocess\n"
        f"calls = {calls!r}\n"
        "running = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for call in calls]\n"
        "for process in running:\n"
        "    print(process.communicate()[0])\n"
    )
    return Part("memory", [sys.executable, "-c", code], limit, read=read_memory)


def bench_command(size: Size, photographs: Path, model: str, batch: int) -> list[str]:
    config = f"dinov3_{model}.yaml"
    data = [f"data.train=folder:{photographs}", f"batch_size={batch}"]
    data.append(f"loss.koleo.group={size.group}")
    return [sys.executable, "bench.py", "--config", config, *size.changes[model], *data]


def authors_part(size: Size, dinov3: Path | None, model: str, limit: int) -> Part:
    """The authors' step and ours on one batch, in turns."""
    command = [sys.executable, "docs/experiments/authors.py", "dinov3", str(dinov3)]
    command += size.authors[model]
    missing = "" if dinov3 else "no checkout of the authors' repository was given"
    return Part(f"authors_{model}", command, limit, facts=(("model", model),), missing=missing)


def tests_part(size: Size, limit: int) -> Part:
    """The tests marked gpu; only files that hold such tests are read."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    chosen = [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=", "-ra", "--tb=short"]
    command += ["-p", "no:cacheprovider", *size.tests, *chosen]
    return Part("tests", command, limit, read=read_tests)


def read_memory(text: str) -> dict:
    """Rows by model and number of images."""
    rows: dict[str, dict] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            table = json.loads(line)
            model = table["config"].removeprefix("dinov3_").removesuffix(".yaml")
            row = table["rows"][0]
            rows.setdefault(model, {})[str(row["images"])] = row
    if not rows:
        raise ValueError("bench.py computed nothing")
    return {"rows": rows}


def read_tests(text: str) -> dict:
    lines = [line for line in text.splitlines() if line.strip()]
    return {"summary": lines[-1] if lines else "", "tests": lines[-40:]}


# ----------------------------------------------------------------- how it is run


def run_part(part: Part, left: float, factor: float, environment: dict, log: Path) -> dict:
    """The part's result with its seconds, or with `error` and the end of what it said."""
    if part.missing:
        return {"error": part.missing}
    if left < LEAST:
        return {"error": "not run: no time was left"}
    start = time.monotonic()
    limit = min(part.limit * factor, left)
    print(f"{part.name}: at most {limit:.0f} s", file=sys.stderr)
    result, memory = call(part, part.command, limit, environment, log)
    if memory and part.smaller:
        print(f"{part.name}: out of memory, again with a smaller batch", file=sys.stderr)
        limit -= time.monotonic() - start
        result, _ = call(part, part.smaller, max(limit, 1.0), environment, log)
        result["out_of_memory_first"] = True
    seconds = round(time.monotonic() - start, 1)
    print(f"{part.name}: {result.get('error', 'done')}, {seconds} s", file=sys.stderr)
    return dict(part.facts) | result | {"part_seconds": seconds}


def call(
    part: Part, command: list[str], limit: float, environment: dict, log: Path
) -> tuple[dict, bool]:
    """(result, whether the device had too little memory)."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that loader workers end with it
    )
    late = False
    try:
        out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
        end(process)
        out, said = process.communicate()
    except BaseException:
        end(process)
        raise
    with log.open("a") as file:
        file.write(f"\n===== {part.name}: {' '.join(command)}\n{out}\n{said}\n")
    result: dict = {"command": command[1:]}
    if "WON'T CONVERT" in said:
        result["compile_failed"] = True  # torch.compile gave up on something and said so
    if late:
        result["error"] = f"stopped after {limit:.0f} s"
    elif process.returncode:
        result["error"] = f"exit status {process.returncode}"
    try:
        result |= part.read(out) if part.read else json.loads(out.strip().splitlines()[-1])
    except (ValueError, LookupError, TypeError) as error:
        result.setdefault("error", f"no result: {error}")
    if "error" in result:
        result["said"] = [line[:300] for line in (out + said).splitlines()[-30:]]
    return result, "error" in result and "out of memory" in said


def end(process: subprocess.Popen) -> None:
    """Ends the process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def process_environment(packages: Path | None, linked: Path) -> dict:
    """Our environment; of `packages` those are added that the interpreter cannot import."""
    environment = dict(os.environ)
    if packages is None:
        return environment
    linked.mkdir()
    for entry in packages.iterdir():
        if entry.suffix == ".dist-info" or importlib.util.find_spec(entry.stem) is not None:
            continue
        (linked / entry.name).symlink_to(entry.resolve())
    paths = [environment.get("PYTHONPATH"), str(linked)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def describe_machine() -> dict:
    """Names, versions, cores and shared memory; the versions are read without importing torch."""
    query = "--query-gpu=name,memory.total,driver_version,clocks.sm,temperature.gpu"
    gpu = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        gpu = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {}
    for name in ("torch", "torchvision", "timm", "numpy", "triton", "pytest"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": gpu,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": versions,
        "shared_memory_gib": round(shared_memory() / 2**30, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def shared_memory() -> int:
    """Bytes free for what loader workers hand over."""
    path = Path("/dev/shm")
    return shutil.disk_usage(path).free if path.is_dir() else 2**40


def loader_workers(size: Size) -> int:
    """Loader processes: at most as many as there are cores and as their batches find room."""
    batch = size.batches["vits16"] * 4 * 3 * (2 * 224**2 + 8 * 96**2)  # bytes; ViT-L's is smaller
    room = shared_memory() // (4 * batch)  # two batches wait, one is made, one is in use
    return int(min(size.workers, os.cpu_count() or 1, room))


# ----------------------------------------------------------------- what is written


def write(report: dict, out: Path) -> None:
    """gpu.json and gpu.md, each whole at any time; the first does not depend on the second."""
    replace(out / "gpu.json", json.dumps(report, indent=1) + "\n")
    try:
        text = markdown(report)
    except Exception as error:  # the numbers are in gpu.json, and further parts are to run
        text = f"no tables: {error!r}\n"
    replace(out / "gpu.md", text)


def replace(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


if __name__ == "__main__":
    main()
