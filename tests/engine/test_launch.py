"""Launchers: what they announce, which device a process takes, and the SLURM script of the page."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from engine import distributed, parallel
from engine.config import load_config
from engine.launch import read_launch
from engine.optim import build_schedules
from engine.stages import plan_stages
from engine.start import check_batches
from errors import UserError

ROOT = Path(__file__).parents[2]
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


def launched(*values: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize(
    "environment, launch",
    [
        ({}, {}),
        ({"HOME": "/root", "SLURM_JOB_ID": "77"}, {}),  # an allocation without srun
        (TORCHRUN, TORCHRUN),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, launched("0", "1", "1", "node1", "29400")),
        (TORCHRUN | SLURM, TORCHRUN),  # torchrun within an allocation
        (SLURM, launched("11", "16", "3", "10.0.0.7", "10077")),
        (SLURM | {"MASTER_ADDR": "node9"}, launched("11", "16", "3", "node9", "10077")),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}),
        (MPI, launched("2", "4", "2", "127.0.0.1", "29500")),
        (
            MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node1"},
            launched("2", "4", "2", "node1", "29500"),
        ),
    ],
)
def test_each_launcher_is_understood(environment, launch):
    assert read_launch(environment) == launch


def test_mpirun_on_several_machines_needs_the_first_of_them():
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        read_launch(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


@pytest.mark.parametrize(
    "environment, gpus, device",
    [
        ({}, 8, "cuda"),
        (TORCHRUN, 8, "cuda:1"),
        (SLURM, 8, "cuda:3"),
        (SLURM, 1, "cuda:0"),  # --gpus-per-task=1: a process sees its own GPU only
        (MPI, 4, "cuda:2"),
    ],
)
@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_a_process_takes_the_gpu_of_its_number(name, environment, gpus, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "environ", dict(environment))
    assert distributed.choose_device(name) == torch.device(device)


@pytest.mark.parametrize("precision, gathered", [("auto", True), ("bf16", True), ("fp32", False)])
def test_fsdp_gathers_in_the_precision_that_computes(precision, gathered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    policy = parallel.sharding_precision(precision, torch.device("cuda"))
    assert policy.param_dtype == (torch.bfloat16 if gathered else None)
    assert policy.reduce_dtype == (torch.float32 if gathered else None)
    assert parallel.sharding_precision(precision, torch.device("cpu")).param_dtype is None


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp"])
def test_several_processes_share_their_work(strategy, tiny, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    stages = plan_stages(load_config(None, [*tiny, f"strategy={strategy}"]), 4, build_schedules)
    if strategy != "none":
        check_batches(stages)
        return
    with pytest.raises(UserError, match="strategy is none, but a launcher started 2 processes"):
        check_batches(stages)


@pytest.mark.parametrize("strategy, gpus, alone", [("ddp", 1, 0), ("ddp", 4, 1), ("fsdp", 0, 1)])
def test_one_process_of_many_wanted_is_noticed(strategy, gpus, alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed.runs_alone(strategy) == bool(alone)


@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_slurm_script_requeues_only_what_was_stopped(status, tmp_path):
    page = (ROOT / "docs" / "clusters.md").read_text()
    (script,) = [
        block for block in re.findall(r"```bash\n(.*?)```", page, re.S) if "SBATCH" in block
    ]
    for name, body in {
        "srun": f"exit {status}",
        "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> requeued; else echo node1; fi',
    }.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == (status == 3)
