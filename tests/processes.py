"""Scripts in processes of their own, as a user starts them, but without the seconds that importing
torch takes.

A fork server imports the scripts once. Each process is a fork of it, in which the script runs as
`__main__` with its own arguments, environment, standard output and standard error. Several ranks
get the variables that torchrun sets.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ("errors", "files", "hubconf", "kernels")  # at the top of the checkout, but no scripts
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in LIBRARY)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*SCRIPTS, "matplotlib.backends.backend_agg"])


class Started:
    """A script that runs, on one rank or several."""

    def __init__(
        self,
        script: str,
        arguments: list[str],
        ranks: int = 1,
        before: Callable[[], None] | None = None,
        **environment: str,
    ):
        self.arguments = [script, *arguments]
        self.folder = tempfile.TemporaryDirectory()
        outputs = [str(Path(self.folder.name) / name) for name in ("stdout", "stderr")]
        shared = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        if ranks > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            given = (self.arguments, shared | of_rank, outputs, before)
            self.processes.append(FORKS.Process(target=_run, args=given))
            self.processes[-1].start()

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def finish(self, seconds: float = 240) -> subprocess.CompletedProcess:
        """The end of all ranks. As under torchrun, the others end where one fails; its status is
        the whole's.

        Raises:
            TimeoutError: if the script still runs after so many seconds.
        """
        status, deadline = 0, time.monotonic() + seconds
        waiting = {process.sentinel: process for process in self.processes}
        while waiting and time.monotonic() < deadline and status == 0:
            for sentinel in multiprocessing.connection.wait(list(waiting), timeout=1):
                ended = waiting.pop(sentinel)
                ended.join()
                status = status or ended.exitcode
        in_time = status != 0 or not waiting
        self._end(list(waiting.values()))
        texts = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        stdout, stderr = (path.read_text() if path.exists() else "" for path in texts)
        self.folder.cleanup()
        if not in_time:
            raise TimeoutError(f"{self.arguments} ran for more than {seconds} seconds: {stderr}")
        return subprocess.CompletedProcess(self.arguments, status, stdout, stderr)

    def _end(self, processes: list) -> None:
        """Gives ranks that wait for a failed one the time to say so."""
        for process in processes:
            process.join(10)
            process.kill()
            process.join()


def run_process(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Like `python script arguments` from the root, or with `ranks=2` like torchrun."""
    return Started(script, list(arguments), **options).finish()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _run(
    arguments: list[str],
    environment: dict[str, str],
    outputs: list[str],
    before: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    if before is not None:
        before()
    runpy.run_path(arguments[0], run_name="__main__")
