"""What the command lines share: exit statuses, one-sentence errors, evaluation flags, the JSON line."""

import argparse
import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.distributed import RankLost
from errors import UserError

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 3
NO_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "t allocate memory",
)  # RuntimeErrors: of CUDA and MPS, cuBLAS, the CPU
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


class StoppedEarly(RuntimeError):
    """A signal or the time limit ended the run after a checkpoint to go on from (exit 3)."""


class RunFailed(RuntimeError):
    """The run cannot go on through no mistake in its call (exit 1); the message says why."""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)`. A user's mistake is one sentence on standard error and exit 2, without a traceback.

    NANODINO_TRACEBACK=1 shows the traceback all the same.
    """
    keep_freed_memory()
    try:
        main(sys.argv[1:])
    except StoppedEarly as error:
        print(sentence(error), file=sys.stderr)
        sys.exit(STOPPED)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        failed = isinstance(error, (RunFailed, RankLost))
        known = failed or not isinstance(error, RuntimeError) or memory_is_short(error)
        if not known and "DataLoader worker" not in str(error):
            raise
        if os.environ.get("NANODINO_TRACEBACK") == "1":
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(FAILED if failed or not known else MISTAKE)
    except KeyboardInterrupt:
        sys.exit(130)


def keep_freed_memory() -> None:
    """Large tensors on a CPU take memory that this process used before. glibc gives it back at every free, and the page faults
    of getting it again were a quarter of a training step (docs/performance.md). Settings of MALLOC_* in the environment stand.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
                mallopt(option, value)


def memory_is_short(error: BaseException) -> bool:
    if (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or getattr(error, "errno", None) == errno.ENOMEM
    ):
        return True
    unnamed = isinstance(error, RuntimeError) and not isinstance(error, (RunFailed, StoppedEarly))
    return unnamed and any(words in str(error) for words in NO_MEMORY)


def sentence(error: BaseException) -> str:
    """The message on one line; out of memory says what to lower."""
    said = str(error)
    if memory_is_short(error):
        if "DataLoader worker" in said:
            return "out of memory in a loader process; lower data.workers (--workers), batch_size or the crop sizes"
        return (
            "out of memory; lower batch_size or micro_batch_size (--batch-size for evaluations) or the crop sizes, or train "
            "with checkpointing=blocks"
        )
    if (
        "DataLoader worker" in said and "Traceback" in said
    ):  # raised in a worker, which sends its whole traceback
        said = said.strip().splitlines()[-1].partition(": ")[2]
    elif "DataLoader worker" in said:
        said = f"a loader process died ({said.partition(chr(10))[0]}); if memory ran out, lower data.workers or batch_size and start again"
    return " ".join(said.split()) or type(error).__name__


class ConfigParser(argparse.ArgumentParser):
    """Its mistakes end as all others do: -evice=cpu, say, is one sentence and no usage."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help says what there is")


def config_parser(description: str) -> argparse.ArgumentParser:
    """`--config NAME key=value ...`"""
    parser = ConfigParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a YAML file, by path or by its name in configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for example data.train=/my/images batch_size=32",
    )
    return parser


def evaluation_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every evaluation takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a run folder, RUN@step, RUN@best, weights, random:vit_small, pixels ...",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--batch-size", type=int, default=64, help="images a forward pass")
    parser.add_argument(
        "--workers", type=int, help="loader processes; by default by the number of cores"
    )
    parser.add_argument(
        "--resize",
        type=int,
        help="short side in pixels before the centre crop; by default the model's own",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        help="centre crop in pixels, one number or height width; by default the model's own",
    )
    parser.add_argument("--output", type=Path, help="folder for the result as JSON")
    return parser


def preparation(preprocessing: Any, resize: int | None, size: list[int] | None) -> dict:
    """How to prepare images: the model's own preprocessing, unless --resize or --size say otherwise.

    Raises:
        UserError: if a size is not positive, or --size has more than two numbers.
    """
    values = vars(preprocessing).copy()
    if size is not None:
        if len(size) > 2 or min(size) < 1:
            raise UserError(
                f"--size is {' '.join(map(str, size))}; give one number, or height and width, in pixels"
            )
        values["size"] = (size[0], size[-1])
        values["resize"] = max(size)  # the whole image, unless --resize says otherwise
    if resize is not None:
        if resize < 1:
            raise UserError(f"--resize is {resize}; it must be at least 1 pixel")
        values["resize"] = resize
    return values


def print_result(result: dict, output: Path | None = None) -> None:
    """ONE line of JSON on standard output, the same in OUTPUT/<task>.json."""
    print(json.dumps(result), flush=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{result['task']}.json").write_text(json.dumps(result, indent=1) + "\n")
