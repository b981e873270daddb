"""How a run was started: rank, number of processes and meeting point, machine and command."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from errors import UserError

# Names of the variables by which launchers tell a process its rank, the number of processes, and
# its number on this machine.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


def read_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, as torchrun, srun or Open MPI's mpirun announce them in `environment`.

    Empty for a process that runs alone: without a launcher, or as the only task of srun or mpirun.

    Raises:
        UserError: if mpirun starts several machines, whose first one it does not name.
    """
    known = [
        launcher
        for launcher, names in LAUNCHERS.items()
        if all(name in environment for name in names[:2])
    ]
    if not known:
        return {}
    launcher = known[0]
    rank, size, local_rank = (environment.get(name, "0") for name in LAUNCHERS[launcher])
    if launcher != "torchrun" and int(size) < 2:
        return {}
    launch = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank}
    address, port = "127.0.0.1", 29500
    if launcher == "srun":
        address = environment.get("SLURM_LAUNCH_NODE_IPADDR", address)
        port = 10000 + int(environment.get("SLURM_JOB_ID", 0)) % 50000
    on_this_machine = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", size)
    if launcher == "mpirun" and on_this_machine != size and "MASTER_ADDR" not in environment:
        raise UserError(
            "mpirun started processes on several machines; export MASTER_ADDR, the first of them"
        )
    launch["MASTER_ADDR"] = environment.get("MASTER_ADDR", address)
    launch["MASTER_PORT"] = environment.get("MASTER_PORT", str(port))
    return launch


def ranks_here(environment: Mapping[str, str], ranks: int) -> int:
    """How many of the ranks run on this machine, by torchrun or Open MPI; otherwise all of them."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in environment:
            return min(ranks, int(environment[name]))
    return ranks


def loader_workers(
    asked: int | None, device: str, ranks: int, environment: Mapping[str, str] = os.environ
) -> int:
    """Loader processes of a rank: as `asked`; by default, on a GPU machine, its share of the
    cores, at most 16.

    0 where the CPU trains: there is no more work to spread, and threads that wait for a core held
    by a loader cost more than the overlap gains.

    Args:
        device: type of the device that the batches go to.
        ranks: how many there are on all machines.
    """
    if asked is not None or device != "cuda":
        return asked or 0
    allowed = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if allowed else os.cpu_count() or 1
    return min(16, cores // ranks_here(environment, ranks))


def describe_start() -> list[str]:
    """Lines for the header of config.yaml: the machine, and the command, if a script was called."""
    size = int(read_launch(os.environ).get("WORLD_SIZE", 1))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "no CUDA"
    lines = [f"machine {platform.platform()}, {os.cpu_count()} cores, {gpu}, ranks: {size}"]
    if Path(sys.argv[0]).name in ("train.py", "distill.py"):
        launch = ["torchrun", "--nproc_per_node", str(ranks_here(os.environ, size))]
        lines.append(f"command {shlex.join([*(launch if size > 1 else ['python']), *sys.argv])}")
    return lines
