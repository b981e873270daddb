"""Two ranks compute the contrastive losses of a batch that they share, for tests.

INPUT is a file of the batch, OUTPUT a folder for the losses and gradients of each rank.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from engine import distributed
from engine.cli import run_script
from losses.contrastive import info_nce_loss, sigmoid_loss


def main(argv: list[str]) -> None:
    with distributed.process_group(torch.device("cpu"), timeout=60):
        given = torch.load(os.environ["INPUT"], weights_only=True)
        own = slice(4 * distributed.rank(), 4 * distributed.rank() + 4)
        found = {}
        for name, loss, extra in (
            ("info_nce", info_nce_loss, ()),
            ("sigmoid", sigmoid_loss, (given["bias"],)),
        ):
            inputs = [given["images"][own], given["texts"][own], given["scale"], *extra]
            inputs = [tensor.clone().requires_grad_() for tensor in inputs]
            value = loss(*inputs, gather=distributed.gather_rows, chunk=3)
            value.backward()
            found[name] = [value.detach(), *(tensor.grad for tensor in inputs)]
        torch.save(found, Path(os.environ["OUTPUT"]) / f"{distributed.rank()}.pt")


run_script(main)
