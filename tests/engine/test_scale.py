"""Many processes are one: losses, weights and checkpoints do not depend on how a run is spread, and
it survives what ends it.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from engine.cli import StoppedEarly
from engine.logger import read_metrics
from losses.koleo import koleo_loss
from models.weights.load import load_backbone
from tests.processes import Started, run_process
from tests.test_train import folder_of, losses, metrics

ROOT = Path(__file__).parents[2]
# Drop path and rotary augmentation draw by rank; everything else follows from the global batch.
# Schedules are constant, because a length that grows would stretch them.
SAME = [
    "model.positions=rope",
    "model.registers=2",
    "loss.ibot.prototypes=16",
    "loss.ibot.hidden=32",
    "loss.ibot.bottleneck=16",
    "loss.ibot.centering=ema",
    "loss.koleo.group=4",
    "checkpoint.every=100",
    "optim.clip_grad=0.5",
    "schedule.lr=1e-3",
    "schedule.weight_decay=0.04",
    "schedule.ema_momentum=0.99",
    "schedule.teacher_temp=0.05",
    "loss.gram.weight=1",
    "loss.gram.teacher=ema",
    "loss.gram.teacher_scale=2",
]


def start(arguments, ranks=1, script="train.py", **options):
    """A run as a user starts it, without waiting."""
    return Started(script, arguments, ranks, **options)


def finish(process, seconds=240) -> tuple[int, str]:
    """Exit status and all that was printed."""
    done = process.finish(seconds)
    return done.returncode, done.stdout + done.stderr


def run(arguments, ranks=1, **options) -> None:
    status, output = finish(start(arguments, ranks, **options))
    assert status == 0, output


def assert_same_run(a: Path, b: Path) -> None:
    for ours, theirs in zip(metrics(a), metrics(b), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name.startswith("loss") or name == "grad_norm":
                assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (
                    name,
                    ours["step"],
                )
    ours, theirs = load_backbone(a).state_dict(), load_backbone(b).state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run on one process that the others are held against."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("whole") / "run"
    overrides = [*TINY, *SAME, "total_steps=6", f"output_dir={folder}"]
    train.main(overrides)
    return overrides


@pytest.mark.parametrize(
    "spread",
    [
        "micro_batch_size=4 x 1",
        "strategy=ddp x 2",
        "strategy=fsdp x 2",
        "strategy=fsdp checkpointing=full x 2",
    ],
)
def test_a_batch_spread_in_any_way_gives_the_same_run(spread, whole, tmp_path):
    *overrides, _, ranks = spread.split()
    run([*whole[:-1], *overrides, f"output_dir={tmp_path / 'run'}"], int(ranks))
    assert_same_run(tmp_path / "run", folder_of(whole))


def test_a_micro_batch_and_two_ranks_at_once(whole, tmp_path):
    run(
        [
            *whole[:-1],
            "micro_batch_size=2",
            "loss.koleo.group=2",
            f"output_dir={tmp_path / 'spread'}",
        ],
        2,
    )
    train.main([*whole[:-1], "loss.koleo.group=2", f"output_dir={tmp_path / 'one'}"])
    assert_same_run(tmp_path / "spread", tmp_path / "one")


def test_koleo_groups_span_ranks(whole, tmp_path):
    """Groups of 8 over two ranks of 4 images."""
    run([*whole[:-1], "loss.koleo.group=8", f"output_dir={tmp_path / 'spread'}"], 2)
    train.main([*whole[:-1], "loss.koleo.group=8", f"output_dir={tmp_path / 'one'}"])
    assert_same_run(tmp_path / "spread", tmp_path / "one")


def test_koleo_of_a_gathered_batch_is_that_of_the_whole():
    rows = torch.randn(8, 5, dtype=torch.float64)
    joined = koleo_loss(rows[:4], 8, gather=lambda part: torch.cat([part, rows[4:]]))
    assert torch.equal(joined, koleo_loss(rows, 8))


def test_a_run_moves_between_strategies_and_numbers_of_ranks(whole, tmp_path):
    moved = [*whole[:-1], f"output_dir={tmp_path / 'run'}"]
    for steps, strategy, ranks in ((2, "fsdp", 2), (4, "none", 1), (6, "ddp", 2)):
        run([*moved, f"total_steps={steps}", f"strategy={strategy}"], ranks)
    # Schedules are constant but for those that the length stretches; they are pinned here.
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert_same_run(tmp_path / "run", folder_of(whole))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_ends_with_status_3_and_the_same_command_goes_on(name, tiny):
    endless = [
        *tiny[:-1],
        "total_steps=100000",
        "checkpoint.every=100000",
        "schedule.lr=1e-3",
        tiny[-1],
    ]
    process = start(endless)
    wait_for(lambda: len(read_metrics(folder_of(tiny) / "metrics.jsonl")) > 2)
    process.send_signal(getattr(signal, name))
    status, output = finish(process)
    assert (
        status == 3
        and f"by {name}; the same command goes on" in output
        and "Traceback" not in output
    )
    stopped = int((folder_of(tiny) / "checkpoints" / "latest").read_text())
    train.main([*endless[:-1], f"total_steps={stopped + 2}", tiny[-1]])
    assert len(losses(folder_of(tiny))) == stopped + 2


def wait_for(condition, seconds=120, pause=0.05) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return bool(true)


def test_the_time_limit_saves_and_stops(tiny):
    with pytest.raises(StoppedEarly, match="at the time limit"):
        train.main(
            [
                *tiny[:-1],
                "total_steps=100000",
                "checkpoint.every=100000",
                "time_limit=1e-6",
                tiny[-1],
            ]
        )
    assert (folder_of(tiny) / "checkpoints" / "latest").read_text() == "1"


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_the_term_is_named(
    tiny, tmp_path
):
    status, output = finish(
        start(tiny, 2, script="tests/broken_rank.py", FAULT="nan@1", FAULT_RANK="1")
    )
    assert status == 0 and "skipped 1 steps before step 2, not finite: koleo" in output, output
    assert all(
        value.isfinite().all() for value in load_backbone(folder_of(tiny)).state_dict().values()
    )


def test_a_skipped_step_leaves_the_weights_alone(tiny):
    """On one process, where the decision never leaves the device."""
    still = [
        *tiny[:-1],
        "schedule.ema_momentum=0",
        "total_steps=3",
        "checkpoint.snapshot=1",
        "checkpoint.every=1",
        tiny[-1],
    ]
    status, output = finish(start(still, script="tests/broken_rank.py", FAULT="nan@1"))
    assert status == 0, output
    one, two, three = (
        load_backbone(f"{folder_of(tiny)}@{step}").state_dict() for step in (1, 2, 3)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(two[name], three[name]) for name in one)


def test_too_many_in_a_row_end_all_ranks_with_the_last_checkpoint_whole(tiny):
    longer = [*tiny[:-1], "total_steps=20", "checkpoint.every=4", tiny[-1]]
    status, output = finish(
        start(longer, 2, script="tests/broken_rank.py", FAULT="nan@4-99", FAULT_RANK="1")
    )
    assert status == 1 and "not finite for 10 steps" in output and "koleo" in output, output
    assert load_backbone(folder_of(tiny)) is not None
    train.main(longer)
    assert len(losses(folder_of(tiny))) == 20


@pytest.mark.parametrize("fault, words", [("kill@2", "Signal 9"), ("hang@2", "exitcode  : 1")])
def test_a_rank_that_dies_or_hangs_ends_the_run_and_is_named(fault, words, tiny):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "tests/broken_rank.py", *tiny]
        + ["total_steps=1000", "hang_timeout=5"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "FAULT": fault, "FAULT_RANK": "1"},
    )
    output = done.stdout
    assert done.returncode == 1 and words in output, output
    assert "error: rank 1 of 2 ended, or did not answer for 5 seconds (hang_timeout)" in output, (
        output
    )
    assert 'broken_rank.py", line' not in output, (
        output
    )  # torchrun shows its own traceback, we none


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tiny):
    train.main([*tiny, "total_steps=2"])
    before = load_backbone(folder_of(tiny)).state_dict()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (60_000, 60_000))
    limited = run_process("train.py", *tiny, "total_steps=4", before=limit)
    assert (
        limited.returncode == 1
        and "is the disk full?" in limited.stderr
        and "Traceback" not in limited.stderr
    ), limited.stderr
    after = load_backbone(folder_of(tiny)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    train.main([*tiny, "total_steps=4"])
    assert len(losses(folder_of(tiny))) == 4


@pytest.mark.slow
def test_thirty_kills_leave_no_trace(tiny, tmp_path):
    """SIGKILL at random moments: of the start, of the steps, and while a checkpoint is being
    written.
    """
    long = [
        *tiny[:-1],
        "total_steps=300",
        "checkpoint.every=3",
        "checkpoint.snapshot=10",
        "batch_size=4",
        tiny[-1],
    ]
    train.main([*long[:-1], f"output_dir={tmp_path / 'undisturbed'}"])
    folder, draw, starting, kills = folder_of(tiny), random.Random(0), 0.0, Counter()

    def lines() -> int:
        file = folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    while sum(kills.values()) < 30:
        kind = ("steps", "saving", "start")[sum(kills.values()) % 3]
        seen, begun = lines(), time.monotonic()
        process = start(long)
        if kind == "start":  # imports, the checkpoint read, metrics.jsonl cut back
            time.sleep(draw.random() * starting)
        else:
            assert wait_for(lambda seen=seen: lines() > seen, 600)
            starting = time.monotonic() - begun
            # A number of steps, not of seconds: the run must outlive thirty of these.
            target = seen + draw.randrange(15)
            assert wait_for(lambda target=target: lines() > target, 600, pause=0.001)
            time.sleep(draw.random() * 0.03)
        if kind == "saving":
            assert wait_for(lambda: list(folder.glob("checkpoints/*.unfinished")), 600, pause=0.001)
        process.send_signal(signal.SIGKILL)
        status, _ = finish(process)
        assert status == -signal.SIGKILL, "it was done before it could be killed"
        kills[kind] += 1
    status, output = finish(start(long), seconds=1800)
    assert status == 0, output
    assert kills == {"steps": 10, "saving": 10, "start": 10}
    assert len(metrics(folder)) == 300 and metrics(folder) == metrics(tmp_path / "undisturbed")
    ours, theirs = (
        load_backbone(folder).state_dict(),
        load_backbone(tmp_path / "undisturbed").state_dict(),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
