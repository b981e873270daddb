"""Training from existing weights (`init:`) in any dialect, and from the files of a killed run."""

import json
import signal
import time

import pytest
import torch

import eval_knn
import train
from models.weights.load import load_backbone
from models.weights.save import write_backbone
from tests.conftest import of_timm
from tests.dialects import hugging_face
from tests.processes import Started
from tests.test_train import folder_of, losses

ARCHITECTURES = {
    "ViTModel": ["model.patch_size=16"],
    "Dinov2Model": ["model.patch_size=14", "model.layerscale=1e-5"],
    "Dinov2WithRegistersModel": [
        "model.patch_size=14",
        "model.layerscale=1e-5",
        "model.registers=4",
    ],
    "DINOv3ViTModel": [
        "model.patch_size=16",
        "model.positions=rope",
        "model.registers=4",
        "model.layerscale=1e-5",
        "model.mask_k_bias=true",
        "model.norm_eps=1e-5",
    ],
}


# Readers are compared dialect by dialect elsewhere; starting a run from each takes longer.
SLOW = [pytest.param(format, marks=pytest.mark.slow) for format in ("meta", "timm")]


@pytest.mark.parametrize("format", ["hf", *SLOW])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_starts_from_weights_of_every_dialect(name, format, tiny, tmp_path, capsys):
    pytest.importorskip("transformers")
    hugging_face(name, "nano").save_pretrained(tmp_path / "hf")
    released = load_backbone(tmp_path / "hf")
    if format != "hf":
        write_backbone(released, released.preprocessing, tmp_path / format, format)
    sizes = [
        "model.embed_dim=128",
        "model.num_heads=2",
        "crops.global_size=56",
        "crops.local_size=28",
    ]
    if name in ("ViTModel", "DINOv3ViTModel"):
        sizes[2:] = ["crops.global_size=64", "crops.local_size=32"]
    overrides = [*tiny, *sizes, *ARCHITECTURES[name], f"init={tmp_path / format}"]
    train.main([*overrides, "total_steps=5", "schedule.lr=0", "schedule.weight_decay=0"])
    assert len(losses(folder_of(tiny))) == 5
    err = capsys.readouterr().err
    assert "the heads start at random" in err and "matched" in err
    trained, start = (
        load_backbone(folder_of(tiny)).state_dict(),
        load_backbone(tmp_path / format).state_dict(),
    )
    for (
        key,
        tensor,
    ) in trained.items():  # learning rate 0: it started, and stayed, where the weights are
        if key != "mask_token" and not (key.endswith("qkv.bias") and "DINOv3" in name):
            assert torch.equal(tensor, start[key]), key
    if format != "hf":
        return
    train.main(
        [
            *overrides,
            "total_steps=2",
            f"output_dir={tmp_path / 'moving'}",
            "schedule.lr=1e-2",
            "schedule.ema_momentum=0.5",
        ]
    )
    assert not torch.equal(
        load_backbone(tmp_path / "moving").state_dict()["norm.weight"], start["norm.weight"]
    )


def test_training_starts_from_a_convnext(tiny, tmp_path):
    pytest.importorskip("transformers")
    hugging_face("DINOv3ConvNextModel", "T").save_pretrained(tmp_path / "hf")
    few = ["loss.ibot.weight=0", "batch_size=4", "total_steps=2", "checkpoint.every=100"]
    train.main([*of_timm(tiny, "convnext_tiny"), *few, f"init={tmp_path / 'hf'}"])
    assert len(losses(folder_of(tiny))) == 2


def test_an_interrupted_run_is_a_model(tiny, tmp_path, capsys):
    """Killed between checkpoints, its folder gives the teacher of the last one."""
    process = Started("train.py", [*tiny, "total_steps=100000", "checkpoint.every=2"])
    try:
        deadline = time.monotonic() + 120
        while (
            not (folder_of(tiny) / "checkpoints" / "latest").exists()
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.finish()
    assert load_backbone(folder_of(tiny)).preprocessing.size == (32, 32)
    data = [
        "--train",
        "scenes?size=12",
        "--val",
        "scenes?split=val&size=6",
        "--workers",
        "0",
        "--k",
        "5",
    ]
    eval_knn.main(["--model", str(folder_of(tiny)), *data])
    assert json.loads(capsys.readouterr().out)["task"] == "knn"
