"""Two ranks open tar shards, for tests.

SHARDS is the DATA spec, OUTPUT a folder for the files that each rank read and found. Where rank 1
meets a shard called BROKEN, its disk fails.
"""

import json
import os
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from data.sources.specs import open_data
from engine import distributed
from engine.cli import run_script

scanned = []
open_shard = tarfile.open


def counted(*arguments, fileobj, **options):
    scanned.append(os.path.basename(fileobj.name))
    if distributed.rank() == 1 and scanned[-1] == os.environ.get("BROKEN"):
        raise OSError(5, "Input/output error", fileobj.name)
    return open_shard(*arguments, fileobj=fileobj, **options)


def main(argv: list[str]) -> None:
    with distributed.process_group(torch.device("cpu"), timeout=60):
        open_data(os.environ["SHARDS"])
        data = open_data(os.environ["SHARDS"])
        found = {
            "scanned": scanned,
            "names": [data.name(index) for index in range(len(data))],
            "labels": data.labels.tolist(),
            "classes": data.classes,
            "sums": [int(data.image(index).sum()) for index in range(len(data))],
            "open": [
                os.readlink(link) for link in Path("/proc/self/fd").glob("*") if link.is_symlink()
            ],
        }
        (Path(os.environ["OUTPUT"]) / f"{distributed.rank()}.json").write_text(json.dumps(found))


tarfile.open = counted
run_script(main)
