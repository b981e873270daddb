"""An output folder: what stands in it is never lost, and one process works in it at a time."""

import shutil
import signal
import time
from pathlib import Path

import pytest

import distill
import train
from engine.checkpoint import latest_step
from engine.cli import StoppedEarly
from errors import UserError
from models.weights.load import load_backbone
from tests.conftest import TINY
from tests.processes import Started, run_process
from tests.test_train import losses, metrics

TEACHER = "distill.teacher=random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8"
STUDENT = "distill.students.small.model.embed_dim=32"
MISTAKES = {
    "arch": ["model.arch=vit_smal"],
    "probe": ["probe.every=2", "probe.train=/no/such", "probe.val=/no/such"],
    "tune": ["tune.mode=lora", "tune.targets=[nosuch]"],
    "init": ["init=/no/such/weights"],
    "gram": ["loss.gram.weight=1", "loss.gram.teacher=/no/such/weights"],
    "batch": ["micro_batch_size=3"],
    "data": ["data.train=/no/such"],
}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.main([*TINY, f"output_dir={folder}"])
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_mistake_changes_nothing_in_the_folder(mistake, overwrite, run):
    before = contents(run)
    with pytest.raises((ValueError, OSError)):
        flag = f"overwrite={str(overwrite).lower()}"
        train.main([*TINY, *MISTAKES[mistake], flag, "total_steps=6", f"output_dir={run}"])
    assert contents(run) == before and not list(run.parent.glob("run.old*"))


@pytest.mark.parametrize("mistake", ["arch", "init", "data"])
def test_a_mistake_in_one_student_changes_nothing_of_a_distillation(mistake, tmp_path):
    folder = tmp_path / "run"
    base = [*TINY, TEACHER, STUDENT, "total_steps=2", f"output_dir={folder}"]
    distill.main(base)
    before = contents(folder)
    wrong = MISTAKES[mistake][0]
    wrong = wrong if mistake == "data" else f"distill.students.small.{wrong}"
    with pytest.raises((ValueError, OSError)):
        distill.main([*base, wrong, "overwrite=true"])
    assert contents(folder) == before
    distill.main([*base, "overwrite=true"])
    assert contents(Path(f"{folder}.old")) == before and latest_step(folder / "students/small") == 2


def test_overwriting_moves_the_run_aside_and_leaves_the_rest(run):
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    again = [*TINY, f"output_dir={run}", "overwrite=true", "seed=1"]
    for number in ("", "2", "3"):
        train.main(again)
        aside = contents(run.with_name(f"run.old{number}"))
        if not number:
            assert aside | {"notes.txt": b"mine"} == before
        assert (run / "notes.txt").read_text() == "mine" and latest_step(run) == 4
    assert load_backbone(run.with_name("run.old"))


@pytest.mark.parametrize("name", ["checkpoints/resnet.pth", "best/a.txt", "teacher/b", "wandb/c"])
def test_overwriting_refuses_what_no_run_of_ours_left(name, tmp_path):
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("precious")
    with pytest.raises(UserError, match="no run of this program"):
        train.main([*TINY, f"output_dir={folder}", "overwrite=true"])
    assert contents(folder) == {name: b"precious"}


@pytest.mark.parametrize("lost", [("checkpoints",), ("checkpoints", "teacher")])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again_unasked(lost, run):
    for name in lost:
        shutil.rmtree(run / name)
    before = contents(run)
    with pytest.raises(UserError, match=r"without checkpoints .* overwrite=true"):
        train.main([*TINY, f"output_dir={run}"])
    assert contents(run) == before
    train.main([*TINY, f"output_dir={run}", "overwrite=true"])
    assert contents(run.with_name("run.old")) == before and latest_step(run) == 4


@pytest.mark.parametrize("script", [train, distill])
def test_a_configuration_written_by_hand_is_not_replaced(script, tmp_path):
    folder = tmp_path / "exp"
    folder.mkdir()
    (folder / "config.yaml").write_text("# notes\nbase: quickstart.yaml\n")
    with pytest.raises(UserError, match="was not written by a run"):
        script.main(
            ["--config", str(folder / "config.yaml"), *TINY, f"output_dir={folder}"]
            + ([TEACHER, STUDENT] if script is distill else [])
        )
    assert contents(folder) == {"config.yaml": b"# notes\nbase: quickstart.yaml\n"}


# ----------------------------------------------------------------- one process


ENDLESS = [*TINY, "total_steps=100000", "checkpoint.every=100000", "log_every=1"]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_a_second_process_is_refused_and_a_killed_one_leaves_the_folder_free(script, tmp_path):
    folder = tmp_path / "run"
    keys = [f"output_dir={folder}", "data.workers=1"]
    keys += [TEACHER, STUDENT] if script == "distill.py" else []
    log = folder / ("students/small" if script == "distill.py" else "") / "metrics.jsonl"
    first = Started(script, [*ENDLESS, *keys])
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 2)
    second = run_process(script, *ENDLESS, *keys)
    assert second.returncode == 2 and "in use by process" in second.stderr, second.stderr
    assert len(second.stderr.splitlines()) == 1 and first.running()
    first.send_signal(signal.SIGKILL)
    first.finish()
    third = Started(script, [*ENDLESS, *keys, "overwrite=true"])  # at once: nothing holds it
    wait_for(lambda: folder.with_name("run.old").is_dir() and log.is_file())
    third.send_signal(signal.SIGTERM)
    done = third.finish()
    assert done.returncode == 3 and "stopped at step" in done.stderr, done.stderr
    assert "by SIGTERM" in done.stderr and "time limit" not in done.stderr


# ----------------------------------------------------------------- damaged checkpoints


def damage_tensors(checkpoint):
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_metadata(checkpoint):
    (checkpoint / ".metadata").write_bytes(b"")


def lose_a_file(checkpoint):
    next(checkpoint.glob("*.distcp")).unlink()


def lose_metadata(checkpoint):
    (checkpoint / ".metadata").unlink()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("harm", [damage_tensors, damage_metadata, lose_a_file, lose_metadata])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(harm, ranks, run, finished):
    if ranks == 2 and harm is not damage_tensors:
        pytest.skip("the ranks agree by one function")
    harm(run / "checkpoints" / "4")
    done = run_process("train.py", *TINY, f"output_dir={run}", ranks=ranks)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "4 is damaged" in done.stderr and "going on from step 2" in done.stderr
    assert losses(run) == pytest.approx(losses(finished), abs=2e-5) and latest_step(run) == 4


@pytest.mark.parametrize("text", ["", "\n", "four"])
def test_an_unreadable_pointer_means_the_newest_checkpoint(text, run, capsys):
    (run / "checkpoints" / "latest").write_text(text)
    train.main([*TINY, f"output_dir={run}"])
    assert "is finished: 4 of 4" in capsys.readouterr().err


def test_without_a_whole_checkpoint_one_sentence_says_so(run):
    for checkpoint in (run / "checkpoints").glob("[0-9]*"):
        damage_metadata(checkpoint)
    before = contents(run)
    with pytest.raises(UserError, match="no whole checkpoint"):
        train.main([*TINY, f"output_dir={run}"])
    assert contents(run) == before


def test_lines_of_the_log_that_are_no_records_are_passed_over(run):
    log = run / "metrics.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    log.write_text("".join([first, "null\n", '{"loss": 1}\n', "[]\n", *rest]))
    train.main([*TINY, f"output_dir={run}", "total_steps=5"])
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_ctrl_c_once_saves_and_the_same_command_goes_on(script, tmp_path):
    folder = tmp_path / "run"
    keys = [f"output_dir={folder}", "data.workers=1"]
    keys += [TEACHER, STUDENT] if script == "distill.py" else []
    inner = folder / ("students/small" if script == "distill.py" else "")
    process = Started(script, [*ENDLESS, *keys])
    wait_for(lambda: (inner / "metrics.jsonl").is_file() and metrics(inner))
    process.send_signal(signal.SIGINT)
    done = process.finish()
    assert done.returncode == 3 and "by SIGINT; the same command goes on" in done.stderr
    assert "Ctrl-C again leaves at once" in done.stderr and latest_step(inner) > 0
    assert "Traceback" not in done.stderr


def test_ctrl_c_twice_leaves_at_once(tmp_path):
    slow = [*ENDLESS, "batch_size=512", "data.train=scenes?size=2000", "crops.global_size=96"]
    process = Started("train.py", [*slow, f"output_dir={tmp_path / 'run'}"])
    wait_for(lambda: (tmp_path / "run" / "config.yaml").is_file())
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    done = process.finish()
    assert done.returncode not in (0, 3) and time.monotonic() - since < 10
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize("ends", ["well", "early", "badly"])
def test_afterwards_signals_are_handled_as_before(ends, tmp_path):
    """In a notebook the program goes on after a run."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    keys = [*TINY, f"output_dir={tmp_path / 'run'}"]
    if ends == "well":
        train.main(keys)
    elif ends == "early":
        with pytest.raises(StoppedEarly):
            train.main([*keys, "time_limit=1e-9"])
    else:
        with pytest.raises(OSError):
            train.main([*keys, "data.train=/no/such"])
    assert [signal.getsignal(number) for number in numbers] == before
