"""engine/resume.py: what may change when a run goes on, and what it needs no more."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import distill
import train
from data.sources.specs import open_data
from engine import run as run_module
from engine.checkpoint import latest_step
from engine.logger import Logger
from errors import UserError
from export import main as export
from models import load_backbone
from tests.processes import run_process
from tests.test_train import metrics


def listed(images: Path, *, absolute: bool) -> Path:
    files = sorted(images.iterdir())
    path = images.parent / f"list{absolute}.txt"
    path.write_text("\n".join(str(file) if absolute else f"images/{file.name}" for file in files))
    return path


def packed(images: Path, name: str) -> Path:
    with tarfile.open(images.parent / name, "w") as shard:
        for file in sorted(images.iterdir()):
            shard.add(file, file.name)
    return images.parent / name


def spellings(images: Path) -> dict[str, str]:
    """Kinds of data whose images are those of `images`, spelled in other ways."""
    (images.parent / "link").symlink_to(images)
    (images.parent / "mix.yaml").write_text(yaml.safe_dump([{"data": str(images)}]))
    (images.parent / "mix2.yaml").write_text(yaml.safe_dump([{"data": f"{images}/", "weight": 1}]))
    return {
        f"{images}": f"folder:{images}/",
        f"{images.parent}/../{images.parent.name}/images": f"{images.parent}/link",
        f"folder:{images.parent}?split=images": f"{images}?labels={images.parent}/labels.csv",
        f"list:{listed(images, absolute=True)}": f"{listed(images, absolute=False)}",
        f"tar:{packed(images, 'a.tar')}": f"{packed(images, 'b.tar')}",
        f"mix:{images.parent}/mix.yaml": f"mix:{images.parent}/mix2.yaml",
        "scenes?size=5&seed=0": "scenes?split=train&size=5",
    }


def test_a_fingerprint_says_what_the_images_are_and_not_where_they_lie(images):
    (images.parent / "labels.csv").write_text("file,label\n0.png,a\n")
    for one, other in spellings(images).items():
        assert open_data(one).fingerprint() == open_data(other).fingerprint(), (one, other)
    plain = open_data(str(images)).fingerprint()
    for other in (f"{images}?size=11", f"{images}?window=0,1", f"{images}?page=1"):
        assert open_data(other).fingerprint() != plain, other
    (images / "3.png").rename(images / "33.png")
    assert open_data(str(images)).fingerprint() != plain
    assert open_data("scenes?seed=1").fingerprint() != open_data("scenes").fingerprint()
    arrays = {"images": np.zeros((3, 8, 8), np.uint8)}
    for name in ("a/x.npz", "b/x.npz", "b/y.npz"):
        (images.parent / name).parent.mkdir(exist_ok=True)
        np.savez(images.parent / name, **arrays)
    a, b, c = (
        open_data(f"npz:{images.parent}/{name}").fingerprint()
        for name in ("a/x.npz", "b/x.npz", "b/y.npz")
    )
    assert a == b != c


def test_a_run_goes_on_after_its_images_moved(tiny, images, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train.main([*tiny, f"data.train={images}", "total_steps=2"])
    train.main([*tiny, f"data.train=folder:{images}/", "total_steps=4"])
    images.rename(tmp_path / "moved")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    train.main([*tiny, "data.train=$SCRATCH/moved", "total_steps=6"])
    assert latest_step(run) == 6 and [record["step"] for record in metrics(run)] == [*range(1, 7)]


def test_a_run_does_not_go_on_with_other_images_unless_a_key_says_so(
    tiny, images, tmp_path, capsys
):
    call, run = [*tiny, f"data.train={images}"], tmp_path / "run"
    train.main([*call, "total_steps=2"])
    before = (run / "config.yaml").read_text()
    (images / "0.png").rename(images / "new.png")
    with pytest.raises(UserError, match="12 images as before, but others.*data.allow_change=true"):
        train.main([*call, "total_steps=4"])
    shutil.copy(images / "1.png", images / "more.png")
    with pytest.raises(UserError, match=r"data.train had 12 images and has 13; .*allow_change"):
        train.main([*call, "total_steps=4"])
    assert (run / "config.yaml").read_text() == before and latest_step(run) == 2
    capsys.readouterr()
    train.main([*call, "total_steps=4", "data.allow_change=true"])
    assert "data.train had 12 images and has 13; the order" in capsys.readouterr().err
    train.main([*call, "total_steps=6"])  # these are now the run's
    assert latest_step(run) == 6
    train.main([*call, f"data.train={images}?size=3", "overwrite=true", "total_steps=2"])


def test_the_images_of_stages_are_compared_too(tiny, images, tmp_path):
    other = shutil.copytree(images, tmp_path / "other")
    stages = f"stages={{a: {{steps: 1}}, b: {{steps: 1, data: {{train: {other}}}}}}}"
    call = [*tiny, f"data.train={images}", "total_steps=null", stages]
    train.main(call)
    other = other.rename(tmp_path / "moved")
    train.main([*call, f"stages.b.data.train={other}/", "stages.b.steps=2"])
    assert latest_step(tmp_path / "run") == 3
    (other / "0.png").unlink()
    with pytest.raises(UserError, match=r"stages.b.data.train had 12 images and has 11"):
        train.main([*call, f"stages.b.data.train={other}", "stages.b.steps=3"])
    (other / "0.png").write_bytes((other / "1.png").read_bytes())
    with pytest.raises(UserError, match="stages.b .*batch_size"):
        train.main([*call, f"stages.b.data.train={other}", "stages.b.batch_size=4"])


def test_a_run_without_a_record_is_compared_by_the_key(tiny, images, tmp_path):
    train.main([*tiny, f"data.train={images}", "total_steps=2"])
    (tmp_path / "run/checkpoints/data.json").unlink()
    train.main([*tiny, f"data.train={images}/", "total_steps=3"])
    (tmp_path / "run/checkpoints/data.json").unlink()
    with pytest.raises(UserError, match="data.train was .*images and is .*other") as caught:
        train.main([*tiny, f"data.train={images.rename(tmp_path / 'other')}", "total_steps=4"])
    assert "stages" not in str(caught.value)


def same_checkpoints(one: Path, other: Path) -> None:
    one, other = (load_backbone(run).state_dict() for run in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Weights whose positions are of another size, whose pixels are otherwise normalised.
ODD = "embed_dim=32&depth=2&num_heads=2&patch_size=8&image_size=48&interpolation=offset"


def test_weights_that_are_gone_stop_no_run_that_has_begun(tiny, tmp_path):
    start = tmp_path / "start"
    export(["--model", f"random:vit_nano?{ODD}", "--format", "own", "--output", str(start)])
    file = start / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"image_mean": [0.25] * 3, "image_std": [0.125] * 3}))
    call = [*tiny, f"init={start}", "total_steps=2"]
    whole = [*call, f"output_dir={tmp_path / 'whole'}"]
    train.main(whole)
    shutil.rmtree(tmp_path / "whole/teacher")  # so the weights are opened again
    train.main([*whole, "total_steps=4"])
    train.main(call)
    start.rename(tmp_path / "gone")
    train.main([*call, "total_steps=2"])  # finished
    train.main([*call, f"init={start}/", "total_steps=4"])
    same_checkpoints(tmp_path / "run", tmp_path / "whole")
    cfg = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert cfg["data"]["mean"] == [0.25] * 3 and cfg["data"]["std"] == [0.125] * 3
    with pytest.raises(UserError, match=r"init \(.*start.* -> .*other\)"):
        train.main([*call, f"init={tmp_path}/other", "total_steps=5"])
    with pytest.raises(FileNotFoundError, match="start"):
        train.main([*call, "overwrite=true"])


def test_students_go_on_without_their_initial_weights_and_with_moved_images(tiny, images, tmp_path):
    train.main([*tiny, f"output_dir={tmp_path / 'teacher'}", "total_steps=1"])
    start = tmp_path / "start"
    shape = "embed_dim=32&depth=2&num_heads=2&patch_size=8"
    export(["--model", f"random:vit_nano?{shape}", "--format", "own", "--output", str(start)])
    call = [*tiny, "loss.koleo.weight=0", f"distill.teacher={tmp_path / 'teacher'}"]
    call += [f"distill.students.a.init={start}", "distill.match=features", "total_steps=1"]
    distill.main([*call, f"data.train={images}"])
    start.rename(tmp_path / "gone")
    moved = images.rename(tmp_path / "moved")
    distill.main([*call, f"data.train={moved}", "total_steps=2"])
    assert latest_step(tmp_path / "run/students/a") == 2
    (moved / "0.png").unlink()
    with pytest.raises(UserError, match="students/a: data.train had 12 images and has 11"):
        distill.main([*call, f"data.train={moved}", "total_steps=3"])


# ----------------------------------------------------------------- longer runs, several ranks


def test_a_longer_run_says_how_its_schedules_are_stretched(tiny, capsys):
    train.main([*tiny, "total_steps=4"])
    capsys.readouterr()
    train.main([*tiny, "total_steps=8"])
    said = capsys.readouterr().err
    assert "total_steps was 4 and is 8" in said and "at step 4: lr " in said
    constant = ["schedule.lr=1e-3", "schedule.teacher_temp=0.05"]
    constant += ["schedule.weight_decay=0.04", "schedule.ema_momentum=0.99"]
    train.main([*tiny, *constant, "overwrite=true"])
    capsys.readouterr()
    train.main([*tiny, *constant, "total_steps=6"])
    assert "stretches" not in capsys.readouterr().err


def only_rank_0_reads_the_log():
    """Rank 0 cuts the log as it resumes: what another rank reads then is anybody's guess."""
    read = run_module.read_metrics

    def reading(path):
        return read(path) if os.environ["RANK"] == "0" else [{"step": 0, "probe/knn": 1.0}]

    run_module.read_metrics = reading


def test_ranks_agree_on_the_best_of_a_resumed_run(tiny, tmp_path):
    probes = ["probe.every=2", "probe.train=scenes?size=30", "probe.val=scenes?size=20"]
    steps = ["schedule.lr=0.01", "schedule.ema_momentum=0.5", "schedule.teacher_temp=0.05"]
    keys = [*tiny, *probes, *steps, f"output_dir={tmp_path / 'run'}"]
    train.main([*keys, "total_steps=4"])
    (log := tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(
            json.dumps(record | ({"probe/knn": 0.0} if "probe/knn" in record else {})) + "\n"
            for record in metrics(tmp_path / "run")
        )
    )
    done = run_process(
        "train.py", *keys, "total_steps=8", ranks=2, before=only_rank_0_reads_the_log
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best").is_dir() and len(log.read_text().splitlines()) > 8


def test_the_time_left_leaves_out_the_seconds_of_probes(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("engine.logger.time.perf_counter", lambda: clock[0])
    logger = Logger(tmp_path, total_steps=100, start_step=0)
    logger.enter(None, 8, 0)
    logger.restart_clock(0)
    for step in (10, 20):
        clock[0] += 60.0  # ten steps a minute
        logger.log(step, logger.speed(step) | {"probe/knn": 0.5})
        clock[0] += 3600.0  # a probe
        logger.restart_clock(step)
    assert "8.0 min left" in capsys.readouterr().err.splitlines()[-1]
