"""`train.py --check` names ten prepared mistakes, is silent about a sound configuration, writes
nothing, and computes the memory that a step takes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train
from evals import check, data_check

ROOT = Path(__file__).parent.parent
# Of the tiny configuration, what has no reason to be warned of.
SOUND = ["total_steps=400", "loss.dino.prototypes=16", "crops.global_size=32", "probe.every=0"]
SOUND += ["schedule.ema_momentum=0.98"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A small sample, and clocks that run for a moment."""
    monkeypatch.setattr(data_check, "SAMPLE", 64)
    monkeypatch.setattr(check, "TIMED_SECONDS", 0.5)
    # How fast the machine is at the moment is no matter of most of these tests.
    monkeypatch.setattr(check, "KEEPS_UP", 0.0)


def folder_of(path: Path, count: int, side: int = 64, same: int = 0) -> Path:
    """So many pictures of coloured noise, the first `same` of which are identical."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        if number == 0:
            first = pixels
        pixels = first if number < same else pixels
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        picture.save(path / f"{number:03}.png")
    return path


def checked(arguments: list[str], capsys) -> tuple[int, dict, str]:
    """(exit status, result, what stands on standard error) of a check."""
    status = 0
    try:
        train.main([*arguments, "--check"])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    return status, json.loads(line), err


def warned(result: dict, of: str) -> str:
    """What is said of a key; it must be the only warning."""
    (warning,) = [item for item in result["warnings"] if of in item["change"]]
    assert len(result["warnings"]) == 1, result["warnings"]
    return f"{warning['says']}; {warning['why']}"


@pytest.fixture
def sound(tiny, tmp_path):
    images = folder_of(tmp_path / "images", 80)
    return [*tiny, *SOUND, f"data.train=folder:{images}"]


def test_a_sound_configuration_has_no_warning_and_leaves_no_trace(sound, tmp_path, capsys):
    status, result, said = checked(sound, capsys)
    assert status == 0 and result["warnings"] == [] and not result["fails"]
    assert "no warnings" in said and result["images"] == 80
    assert not (tmp_path / "run").exists()
    assert result["memory_gib"] > 0 and result["largest_micro_batch_size"] == 8
    assert {"parameters", "gradients", "optimizer", "teacher", "activations"} == result[
        "memory_parts_gib"
    ].keys()


def test_a_wrong_mean_is_named_with_the_right_one(sound, capsys):
    status, result, _ = checked([*sound, "data.mean=[0.9,0.9,0.9]"], capsys)
    assert status == 0 and "have mean -1.7" in warned(result, "data.mean=[0.")


def test_three_identical_images_of_four_are_named(sound, tmp_path, capsys):
    images = folder_of(tmp_path / "copies", 64, same=48)
    status, result, said = checked([*sound, f"data.train=folder:{images}"], capsys)
    assert status == 0
    assert "48 of 64 images looked at have a copy" in warned(result, "data.train")
    assert "100% of KoLeo" in said or "99% of KoLeo" in said
    assert result["exact_copies"] == 47


def test_crops_larger_than_the_images_are_named(sound, capsys):
    status, result, _ = checked([*sound, "crops.global_size=96"], capsys)
    assert status == 0
    assert "crops.global_size is 96, the short side of the images 64" in warned(
        result, "crops.global_size"
    )


def test_far_too_many_prototypes_are_named_with_a_number_that_fits(sound, tmp_path, capsys):
    images = folder_of(tmp_path / "200", 200)
    many = [f"data.train=folder:{images}", "loss.dino.prototypes=65536"]
    status, result, _ = checked([*sound, *many], capsys)
    assert status == 0
    assert "65,536 prototypes for 200 images" in warned(result, "loss.dino.prototypes=32")


def test_a_batch_that_does_not_fit_is_an_error_with_the_size_that_fits(sound, capsys, monkeypatch):
    monkeypatch.setattr(check, "memory_there", lambda device: 0.3 * 2**30)
    many = ["batch_size=4096", "data.workers=0", "crops.local_count=4"]
    status, result, said = checked([*sound, *many], capsys)
    fitting = result["largest_micro_batch_size"]
    assert status == 2 and result["fails"] and 0 < fitting < 4096
    assert "0.30 are there" in warned(result, f"micro_batch_size={fitting}, which fits")
    assert "error: a process needs" in said


class Slow:
    """A Dataset of noise that takes its time; `seconds` an image."""

    def __init__(self, seconds: str = "0"):
        self.seconds = float(seconds)

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int):
        time.sleep(self.seconds)
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)


def test_a_loader_at_a_third_of_the_step_is_named(sound, capsys, monkeypatch):
    monkeypatch.setattr(check, "KEEPS_UP", 0.9)
    monkeypatch.setattr(check.StepTrial, "images_a_second", lambda *_: 60.0)
    slow = "data.train=python:tests.test_check:Slow?seconds=0.05"  # fewer than 20 a second
    status, result, _ = checked([*sound, slow, "data.workers=1"], capsys)
    assert status == 0 and result["loader_images_per_second"] < 20
    assert "the step takes 60.0" in warned(result, "data.workers=")
    waits = re.search(r"waits for images (\d+)%", result["warnings"][0]["why"])
    assert 66 < int(waits[1]) < 100
    monkeypatch.setattr(check.StepTrial, "images_a_second", lambda *_: 1.0)
    fast = checked([*sound, "data.train=python:tests.test_check:Slow"], capsys)[1]
    assert fast["warnings"] == []


def test_labels_that_match_nothing_are_an_error(sound, tmp_path, capsys):
    table = tmp_path / "labels.csv"
    rows = [f"other/{number}.png,{number % 2}" for number in range(9)]
    table.write_text("\n".join(["file,label", *rows, "000.png,1"]))
    train_set = f"folder:{tmp_path / 'images'}?labels={table}"
    status, result, _ = checked([*sound, f"data.train={train_set}"], capsys)
    assert status == 0 and "9 of 10 labels match no image" in warned(result, "data.train")
    for name in ("a/x", "b/y"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(tmp_path / "images" / "000.png", tmp_path / name)
    probe = ["probe.every=2", f"probe.train=folder:{tmp_path / 'a'}"]
    probe += [f"probe.val=folder:{tmp_path / 'b'}"]
    status, result, _ = checked([*sound, *probe], capsys)
    assert status == 2 and "no class in common" in warned(result, "probe.train")


def test_a_run_of_a_few_steps_is_named_in_epochs(sound, capsys):
    sound = [part for part in sound if not part.startswith("total_steps")]
    status, result, _ = checked([*sound, "epochs=2"], capsys)
    assert status == 0 and "has 20 steps (2 epochs of 10)" in warned(result, "total_steps")


def test_a_disk_that_is_too_small_is_an_error(sound, capsys, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage)
    status, result, _ = checked(sound, capsys)
    assert status == 2 and "GiB are free at" in warned(result, "output_dir")


def test_five_percent_of_unreadable_files_are_an_error_only_where_the_run_would_stop(
    sound, tmp_path, capsys
):
    images = folder_of(tmp_path / "broken", 64)
    for number in (3, 40, 41):
        (images / f"{number:03}.png").write_bytes(b"no picture")
    broken = [*sound, f"data.train=folder:{images}"]
    status, result, _ = checked(broken, capsys)
    assert status == 0 and "3 of 64 images cannot be read" in warned(result, "data.max_bad")
    status, result, said = checked([*broken, "data.max_bad=2"], capsys)
    assert (
        status == 2 and "above 2 (data.max_bad), and about 3" in said and result["unreadable"] == 3
    )


def test_the_quickstart_has_no_warning(capsys, tmp_path):
    arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "device=cpu"]
    status, result, _ = checked([*arguments, f"output_dir={tmp_path / 'run'}"], capsys)
    assert status == 0 and result["warnings"] == []


# ----------------------------------------------------------------- memory

SMALL_CROPS = ["crops.global_size=98", "crops.local_size=42", "crops.local_count=4"]
CONFIGURATIONS = {
    "quickstart, batch 128": ["quickstart.yaml", "batch_size=128"],
    "DINOv2 ViT-S/14, batch 8": ["dinov2_vits14.yaml", "batch_size=8", *SMALL_CROPS],
    "DINO ViT-S/16, batch 8": [
        *("dino_vits16.yaml", "batch_size=8", "crops.global_size=112", "crops.local_size=48")
    ],
    "DINOv2 ViT-S/14, 4 micro batches of 4": [
        *("dinov2_vits14.yaml", "batch_size=16", "micro_batch_size=4", *SMALL_CROPS)
    ],
    "half a ViT-B/14, batch 8, blocks": [
        *("dinov2_vits14.yaml", "batch_size=8", "model.arch=vit_base", "checkpointing=blocks"),
        *(*SMALL_CROPS, "model.depth=6", "loss.dino.prototypes=4096"),
    ],
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak resident memory as Linux counts it")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_memory_is_within_a_tenth_of_the_measured_peak(name):
    config, *overrides = CONFIGURATIONS[name]
    overrides += ["device=cpu", "precision=fp32", "data.workers=0", "data.train=scenes?size=40"]
    overrides += ["loss.koleo.weight=0"]
    if not any(item.startswith("micro") for item in overrides):
        overrides.append("micro_batch_size=null")
    results = []
    # Freed memory goes back to the system, so that the peak is of what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for command in (["bench.py", "--steps", "1", "--warmup", "1"], ["train.py", "--check"]):
        script, *flags = command
        call = [sys.executable, script, "--config", config, *overrides, *flags]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment)
        results.append(json.loads(done.stdout))
    measured = results[0]["memory_gib"] - results[0]["memory_before_gib"]
    computed = results[1]["memory_gib"]
    print(
        f"{name}: measured {measured:.3f} GiB, computed {computed:.3f}, {computed / measured:.2f}"
    )
    assert computed == pytest.approx(measured, rel=0.1)
