"""`train.py` with a fault in one rank, for tests: FAULT=nan@STEP, kill@STEP or hang@STEP, in rank
FAULT_RANK.
"""

import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train
from engine.cli import run_script

kind, _, at = os.environ["FAULT"].partition("@")
first, last = (int(number) for number in (at.split("-") * 2)[:2])
calls = 0
compute_losses = train.compute_losses


def broken(*arguments):
    global calls
    losses, step = compute_losses(*arguments), calls
    calls += 1
    if os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0") and first <= step <= last:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            signal.signal(
                signal.SIGTERM, signal.SIG_DFL
            )  # or torchrun waits half a minute before it kills
            time.sleep(1000)
        losses["koleo"] = losses["koleo"] * float("nan")
    return losses


train.compute_losses = broken
run_script(train.main)
