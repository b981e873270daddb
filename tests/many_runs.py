"""Several runs one after another, on the ranks of one process group, for tests; without pictures.

RUNS is a JSON list of argument lists; SCRIPT is "train" or "distill".
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from distill import distill
from engine import distributed
from engine.cli import config_parser, run_script
from engine.config import TrainConfig, load_config
from engine.distill_config import DistillTrainConfig
from evals import inloop
from train import train


def main(argv: list[str]) -> None:
    run, config = train, TrainConfig
    if os.environ["SCRIPT"] == "distill":
        run, config = distill, DistillTrainConfig
    inloop.draw_curves = inloop.report_teacher = lambda *_, **__: None
    device = torch.device("cpu")
    with distributed.process_group(device, timeout=60):
        for overrides in json.loads(os.environ["RUNS"]):
            print(overrides, file=sys.stderr)
            arguments = config_parser("", config).parse_args(overrides)
            run(load_config(arguments.config, arguments.overrides, config), device)


if __name__ == "__main__":
    run_script(main)
