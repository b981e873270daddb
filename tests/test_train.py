"""train.py as a user runs it: what a run leaves, how it goes on, what it refuses, and that the
method is the method.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bench
import train
from engine.config import load_config
from engine.logger import read_metrics
from engine.optim import build_schedules
from engine.stages import plan_stages
from engine.start import build_student
from engine.views import stage_loader
from errors import UserError
from losses.centering import build_centering
from models.ssl_model import make_teacher
from models.weights.load import load_backbone
from tests.conftest import of_timm
from tests.processes import run_process

ROOT = Path(__file__).parent.parent
TIMING = {"images_per_second", "data_wait_fraction", "memory_gib"}


def metrics(run) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in TIMING}
        for record in read_metrics(Path(run) / "metrics.jsonl")
    ]


def losses(run) -> list[float]:
    return [record["loss"] for record in metrics(run) if "loss" in record]


def folder_of(overrides) -> Path:
    return Path(overrides[-1].removeprefix("output_dir="))


def test_a_run_leaves_what_the_readme_promises(tiny, pictures):
    run = folder_of(tiny)
    probes = [
        "probe.every=2",
        "probe.train=scenes?size=30",
        "probe.val=scenes?split=val&size=10",
        "checkpoint.snapshot=2",
    ]
    train.main([*tiny, *probes])
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "checkpoints/latest",
        "checkpoints/4",
        "curves.png",
        "report.png",
        "snapshots/2",
        "best",
    ):
        assert (run / name).exists(), name
    for folder in ("teacher", "best", "snapshots/4"):
        names = {path.name for path in (run / folder).iterdir()} - {
            "extra.safetensors"
        }  # the mask token
        assert names == {
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "heads.safetensors",
        }
    assert json.loads((run / "teacher/config.json").read_text())["model_type"] == "vit"
    assert not [path for path in run.rglob("*") if "unfinished" in path.name]
    records = metrics(run)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in records if "probe/knn" in record] == [0, 2, 4]
    expected = {
        "step",
        "images_seen",
        "stage",
        "loss",
        "loss/dino",
        "loss/ibot",
        "loss/koleo",
        "lr",
        "weight_decay",
        "ema_momentum",
    }
    expected |= {
        "teacher_temp",
        "grad_norm",
        "health/teacher_entropy",
        "health/effective_rank",
        "health/feature_std",
    }
    assert expected <= records[1].keys() and records[4]["images_seen"] == 32
    assert load_config(str(run / "config.yaml"), []).batch_size == 8
    assert (
        "torch" in (run / "config.yaml").read_text().split("output_dir")[0]
    )  # the versions stand in the header


def test_the_saved_teacher_is_the_teacher_and_not_the_student(tiny):
    train.main([*tiny, "schedule.ema_momentum=1.0"])
    torch.manual_seed(0)
    cfg = load_config(None, tiny)
    initial = build_student(cfg, masked=True).backbone.state_dict()
    saved = load_backbone(str(folder_of(tiny))).state_dict()
    assert (
        saved.keys() == initial.keys()
    )  # with momentum 1 the teacher never moves; the student did
    assert all(torch.equal(saved[name], initial[name]) for name in saved)
    assert load_backbone(str(folder_of(tiny))).preprocessing.size == (32, 32)


def test_two_runs_with_one_seed_give_identical_losses_and_another_seed_others(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main([*tiny, f"output_dir={tmp_path / name}", f"seed={seed}", "model.drop_path=0.3"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_workers_probes_and_logging_leave_the_losses_alone(tiny, tmp_path):
    train.main([*tiny, f"output_dir={tmp_path / 'a'}"])
    probes = [
        "probe.every=1",
        "probe.train=scenes?size=30",
        "probe.val=scenes?split=val&size=10",
        "data.workers=1",
        "checkpoint.every=1",
    ]
    train.main([*tiny, f"output_dir={tmp_path / 'b'}", *probes])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_longer_run_prolongs_a_finished_one_exactly(tiny, tmp_path, capsys):
    constant = [f"schedule.{name}.shape=constant" for name in ("weight_decay", "ema_momentum")]
    constant += [
        "schedule.lr=1e-3",
        "schedule.teacher_temp=0.05",
        "schedule.weight_decay=0.04",
        "schedule.ema_momentum=0.99",
    ]
    constant += ["model.drop_path=0.3", "loss.dino.centering=ema"]
    train.main([*tiny, *constant, f"output_dir={tmp_path / 'whole'}", "total_steps=6"])
    train.main([*tiny, *constant, f"output_dir={tmp_path / 'parts'}", "total_steps=3"])
    train.main([*tiny, *constant, f"output_dir={tmp_path / 'parts'}", "total_steps=3"])
    assert "finished" in capsys.readouterr().err
    train.main([*tiny, *constant, f"output_dir={tmp_path / 'parts'}", "total_steps=6"])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    whole, parts = (
        load_file(tmp_path / name / "teacher" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_killed_run_goes_on_to_the_same_losses(tiny, tmp_path):
    train.main([*tiny, f"output_dir={tmp_path / 'whole'}", "total_steps=12"])
    arguments = [*tiny, f"output_dir={tmp_path / 'killed'}", "total_steps=12"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    while not latest.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= int(latest.read_text()) < 12
    train.main(arguments)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_a_changed_key_is_refused_by_name_and_overwrite_starts_afresh(tiny):
    train.main(tiny)
    with pytest.raises(ValueError, match=r"loss.dino.prototypes \(32 -> 64\)"):
        train.main([*tiny, "loss.dino.prototypes=64", "total_steps=8"])
    keep = folder_of(tiny) / "notes.txt"
    keep.write_text("mine")
    train.main([*tiny, "loss.dino.prototypes=64", "overwrite=true"])
    assert keep.exists() and len(losses(folder_of(tiny))) == 4


@pytest.mark.parametrize("micro", [4, 2])
def test_accumulation_is_exact(tiny, tmp_path, micro):
    shared = [
        "loss.koleo.group=2",
        "schedule.lr.start=1e-3",
        "loss.dino.centering=sinkhorn",
        "loss.ibot.centering=ema",
    ]
    train.main([*tiny, *shared, f"output_dir={tmp_path / 'whole'}"])
    train.main([*tiny, *shared, f"output_dir={tmp_path / 'parts'}", f"micro_batch_size={micro}"])
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)
    whole, parts = (
        load_file(tmp_path / name / "teacher" / "model.safetensors") for name in ("whole", "parts")
    )
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4)


def test_two_ranks_give_the_losses_of_one_process(tiny, tmp_path):
    shared = ["loss.dino.centering=sinkhorn", "loss.ibot.centering=ema", "schedule.lr.start=1e-3"]
    train.main([*tiny, *shared, f"output_dir={tmp_path / 'one'}"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "train.py", *tiny, *shared, f"output_dir={tmp_path / 'two'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    assert len(metrics(tmp_path / "two")) == 4  # one rank writes


def test_a_checkpoint_of_one_process_is_gone_on_with_by_two_ranks(tiny, tmp_path):
    constant = [
        "schedule.lr=1e-3",
        "schedule.teacher_temp=0.05",
        "schedule.weight_decay=0.04",
        "schedule.ema_momentum=0.99",
    ]
    train.main([*tiny, *constant, f"output_dir={tmp_path / 'one'}"])
    train.main([*tiny, *constant, f"output_dir={tmp_path / 'both'}", "total_steps=2"])
    done = run_process("train.py", *tiny, *constant, f"output_dir={tmp_path / 'both'}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)


def test_a_flat_folder_of_odd_sizes_without_labels_trains(tiny, images):
    train.main(
        [*tiny, f"data.train={images}", "crops.global_size=[32, 48]", "crops.local_size=[16, 24]"]
    )
    assert len(losses(folder_of(tiny))) == 4


def test_an_unreadable_image_is_skipped_and_listed(tiny, images):
    (images / "0-broken.png").write_bytes((images / "0.png").read_bytes()[:60])
    train.main([*tiny, f"data.train={images}"])
    listed = (folder_of(tiny) / "bad_images.txt").read_text().splitlines()
    assert len(listed) == 1 and "0-broken.png" in listed[0]
    with pytest.raises(ValueError, match="max_bad"):
        train.main([*tiny, f"data.train={images}", "data.max_bad=0", "overwrite=true"])


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.train=/no/such/folder", "/no/such/folder"),
        ("data.train=scens", "scenes"),
        ("batch_sise=4", "batch_size"),
        ("model.arch=vit_smal", "vit_small"),
        ("loss.koleo.group=3", "group"),
        ("device=cuda", "cuda"),
        ("output_dir=/proc/run", "/proc/run"),
    ],
)
def test_a_mistake_is_one_sentence_on_standard_error_and_exit_two(tiny, override, words):
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = run_process("train.py", *tiny, override)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_every_key_of_the_configuration_is_read(tiny, monkeypatch):
    """A key that nothing reads lies to its user (dinov3 issue 243). Runs differ where keys exclude
    each other.
    """
    import dataclasses

    from engine import config

    classes = [
        cls
        for cls in vars(config).values()
        if dataclasses.is_dataclass(cls) and isinstance(cls, type)
    ]
    classes = [
        cls for cls in classes if not cls.__name__.startswith("Distill")
    ]  # tests/test_distill.py reads them
    read = set()

    def spy(self, name):
        if name in type(self).__dataclass_fields__:
            read.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    probes = [
        "probe.every=4",
        "probe.patches=true",
        "probe.train=scenes?size=30",
        "probe.val=scenes?split=val&size=10",
    ]
    own_head = [
        "loss.ibot.prototypes=16",
        "loss.ibot.hidden=16",
        "loss.ibot.bottleneck=8",
        "loss.ibot.layers=2",
    ]
    gram = [
        "loss.gram.weight=1",
        "loss.gram.teacher=ema",
        "crops.mix=[{global_size: 32, local_size: 16}]",
    ]
    gram += ["crops.guided=0.5", "crops.guided_share=0.5"]
    beyond = ["loss.coding_rate.weight=1", "loss.anchor.weight=1"]
    beyond += ["init=random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8"]
    for number, extra in enumerate((probes, own_head, gram, beyond)):
        cfg = load_config(None, [*tiny, *extra, f"output_dir={folder_of(tiny)}{number}"])
        with monkeypatch.context() as patch:
            for cls in classes:
                patch.setattr(cls, "__getattribute__", spy)
            train.train(cfg, torch.device("cpu"))
    every = {(cls.__name__, field.name) for cls in classes for field in dataclasses.fields(cls)}
    passed_whole = {
        "ModelConfig",  # key by key in tests/engine/test_unread_keys.py
        "Schedule",
        "ScheduleConfig",
        "CheckpointConfig",
        "TuneConfig",
    }  # by name, to functions that refuse a name they do not have
    lengths = {
        ("TrainConfig", "epochs"),
        ("TrainConfig", "images"),
        ("TrainConfig", "device"),
        ("TrainConfig", "hang_timeout"),
    }  # read by main, or unless total_steps is
    unread = {key for key in every - read if key[0] not in passed_whole} - lengths
    assert not unread, unread


def test_no_gradient_reaches_the_teacher(tiny):
    cfg = load_config(None, tiny)
    student = build_student(cfg, masked=True)
    teacher = make_teacher(student)
    (stage,) = plan_stages(cfg, 4, build_schedules)
    schedules = stage.schedules
    batch = next(iter(stage_loader(stage, 0, 8, torch.device("cpu"))))
    now = {name: schedule(1) for name, schedule in schedules.items()}
    targets = train.teacher_targets(teacher, [batch], build_centering(cfg.loss, schedules), 0.05)
    out = student(batch.global_crops, batch.local_crops, batch.masks, batch.masked())
    terms = train.compute_losses(out, targets[0], batch, cfg.loss, now)
    sum(terms.values()).backward()
    assert terms.keys() == {"dino", "ibot", "koleo"}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    rows = targets[0].dino.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_init_starts_from_weights_heads_and_normalisation_of_a_run(tiny, tmp_path, capsys):
    train.main(
        [
            *tiny,
            f"output_dir={tmp_path / 'first'}",
            "data.mean=[0.1,0.2,0.3]",
            "data.std=[0.5,0.6,0.7]",
        ]
    )
    still = ["schedule.lr=0", "schedule.weight_decay=0", "total_steps=1"]
    train.main([*tiny, *still, f"init={tmp_path / 'first'}", f"output_dir={tmp_path / 'second'}"])
    for name in ("model", "heads"):
        first, second = (
            load_file(tmp_path / run / "teacher" / f"{name}.safetensors")
            for run in ("first", "second")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert load_config(str(tmp_path / "second" / "config.yaml"), []).data.mean == [0.1, 0.2, 0.3]
    assert "head tensors are loaded" in capsys.readouterr().err
    train.main(
        [
            *tiny,
            *still,
            f"init={tmp_path / 'first'}",
            f"output_dir={tmp_path / 'second'}",
            "total_steps=2",
        ]
    )  # goes on


def test_init_of_another_backbone_is_refused_with_the_settings_that_differ(tiny):
    with pytest.raises(ValueError, match="patch_size 4"):
        train.main(
            [
                *tiny,
                "init=random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=4&image_size=32",
            ]
        )
    with pytest.raises(ValueError, match="embed_dim 128"):
        train.main([*tiny, "init=random:vit_nano?patch_size=8"])


def test_a_convolutional_backbone_trains_without_masks_and_is_refused_with_them(tiny):
    call = [part for part in of_timm(tiny, "resnet10t") if not part.startswith("loss.ibot.weight")]
    masked = ["loss.ibot.weight=1", "schedule.ibot=0.5"]
    masked += ["stages={a: {steps: 2}, b: {steps: 2, loss: {ibot: {weight: 1}}}}"]
    for override in masked:
        for size in (32, 48, 64):  # whether the grid of masks is that of the last map or not
            said = "loss.ibot hides patches, but timm:resnet10t has no mask token; set loss.ibot"
            with pytest.raises(UserError, match=said):
                train.main([*call, override, f"crops.global_size={size}"])
        with pytest.raises(UserError, match="has no mask token"):
            bench.main([*call, override, *(["--stage", "b"] if "stages" in override else [])])
    assert not folder_of(tiny).exists()
    train.main(call)
    assert len(losses(folder_of(tiny))) == 4
