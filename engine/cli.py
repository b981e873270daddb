"""Parts that all scripts share: exit statuses, one-sentence errors, flags, the JSON result."""

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

from engine.config import TrainConfig
from engine.distributed import RankLost
from engine.keys import as_markdown, as_text, select
from errors import UserError
from files import expand
from models.features import Preprocessing

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 3
# RuntimeErrors of CUDA and MPS, of cuBLAS, of the CPU.
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "t allocate memory")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


class StoppedEarly(RuntimeError):
    """A signal or the time limit ended the run, after it had saved a checkpoint (exit 3)."""


class RunFailed(RuntimeError):
    """The run cannot go on, though its call was right (exit 1); the message says why."""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)`. A user's mistake is one sentence on standard error and exit status 2.

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
    """Lets a process on a CPU reuse the memory of large tensors that it has freed.

    glibc returns it at every free, and the page faults of getting it again were a quarter of a
    training step (docs/performance.md). Settings of MALLOC_* in the environment stand.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
                mallopt(option, value)


def memory_is_short(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if getattr(error, "errno", None) == errno.ENOMEM:
        return True
    unnamed = isinstance(error, RuntimeError) and not isinstance(error, (RunFailed, StoppedEarly))
    return unnamed and any(words in str(error) for words in NO_MEMORY)


def sentence(error: BaseException) -> str:
    """The message on one line; out of memory says what to lower."""
    said = str(error)
    of_worker = "DataLoader worker" in said
    if memory_is_short(error) and of_worker:
        remedy = "lower data.workers (--workers), batch_size or the crop sizes"
        return f"out of memory in a loader process; {remedy}"
    if memory_is_short(error):
        remedy = "lower batch_size or micro_batch_size (--batch-size for evaluations)"
        return f"out of memory; {remedy} or the crop sizes, or train with checkpointing=blocks"
    if of_worker and "Traceback" in said:  # the worker sends its whole traceback
        said = said.strip().splitlines()[-1].partition(": ")[2]
    elif of_worker:
        first = said.partition("\n")[0]
        remedy = "if memory ran out, lower data.workers or batch_size and start again"
        said = f"a loader process died ({first}); {remedy}"
    return " ".join(said.split()) or type(error).__name__


class ConfigParser(argparse.ArgumentParser):
    """Raises UserError for a wrong flag, such as -evice=cpu, instead of printing the usage."""

    schema: type = TrainConfig

    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help says what there is")

    def parse_args(self, *arguments: Any, **options: Any) -> argparse.Namespace:
        """With --keys, prints the keys and exits."""
        parsed = super().parse_args(*arguments, **options)
        if parsed.keys is not None:
            chosen = select(self.schema, parsed.keys)
            print(as_markdown(chosen) if parsed.markdown else as_text(chosen))
            self.exit()
        return parsed


def path_argument(text: str) -> Path:
    """The type of a flag that names a file or folder: `~` and `$VARIABLES` are replaced."""
    try:
        return expand(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def config_parser(
    description: str, schema: type = TrainConfig, check: bool = False
) -> argparse.ArgumentParser:
    """`--config NAME key=value ...`, `--keys` of the configuration `schema`, and `--check`."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = ConfigParser(description=description, formatter_class=layout)
    parser.schema = schema
    parser.add_argument("--config", help="a YAML file, by path or by its name in configs/")
    example = "for example data.train=/my/images batch_size=32"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)
    lookup = "print every key, or those of a section such as loss.dino, and exit"
    parser.add_argument("--keys", nargs="?", const="", metavar="SECTION", help=lookup)
    page = "with --keys: print docs/configuration.md"
    parser.add_argument("--markdown", action="store_true", help=page)
    if check:
        words = "look for what would go wrong: data, memory, speed, disk; trains and writes nothing"
        parser.add_argument("--check", action="store_true", help=words)
    return parser


def evaluation_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every evaluation takes."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    model = "a run folder, RUN@step, RUN@best, weights, random:vit_small, pixels ..."
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--batch-size", type=int, default=64, help="images a forward pass")
    workers = "loader processes; by default by the number of cores"
    parser.add_argument("--workers", type=int, help=workers)
    precision = "of the forward passes: auto is bf16 on CUDA, else fp32"
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision
    )
    resize = "short side in pixels before the centre crop; by default the model's own"
    parser.add_argument("--resize", type=int, help=resize)
    size = "centre crop in pixels, one number or height width; by default the model's own"
    parser.add_argument("--size", type=int, nargs="+", help=size)
    scaled = "decode large JPEG files no finer than the model sees them; faster"
    parser.add_argument("--scaled-jpeg", action="store_true", help=scaled)
    parser.add_argument("--output", type=path_argument, help="folder for the result as JSON")
    return parser


def preparation(preprocessing: Preprocessing, resize: int | None, size: list[int] | None) -> dict:
    """The model's preparation of images, changed by --resize and --size where they are given.

    Raises:
        UserError: if a size is not positive, or --size has more than two numbers.
    """
    values = vars(preprocessing).copy()
    del values["scale"], values["window"], values["span"]  # known from each image and from DATA
    if size is not None:
        if len(size) > 2 or min(size) < 1:
            given = " ".join(map(str, size))
            raise UserError(f"--size is {given}; give one number, or height and width, in pixels")
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
