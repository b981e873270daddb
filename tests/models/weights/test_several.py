"""Files of other frameworks that hold student and teacher, and files that are no weights at all."""

import pytest
import torch

from errors import UserError
from models.features import Preprocessing
from models.vit import VisionTransformer
from models.weights.load import load_backbone
from models.weights.save import write_backbone

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
RGB = Preprocessing((32, 32), 32, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Student and teacher with the names of Meta's files."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("meta")
        write_backbone(VisionTransformer(**SMALL), RGB, folder, "meta")
        found.append(torch.load(folder / "backbone.pth", weights_only=True))
    return found


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


PREFIXES = {
    "solo-learn": ("backbone.", "momentum_backbone."),
    "lightly": ("student_embedding_model.w._model.", "teacher_embedding_model.w._model."),
    "fsdp": ("student.backbone.", "teacher.backbone."),
    "ema": ("model.", "model_ema."),
    "ema module": ("net.", "ema.net."),
    "target": ("online_network.", "target_network."),
    "moco": ("encoder_q.", "encoder_momentum."),
    "averaged": ("student.", "averaged.module."),
}


@pytest.mark.parametrize("teacher_first", [True, False])
@pytest.mark.parametrize("kind", PREFIXES)
def test_of_two_networks_the_teacher_is_taken_and_said(
    kind, teacher_first, networks, tmp_path, capsys
):
    parts = [under(p, tensors) for p, tensors in zip(PREFIXES[kind], networks, strict=True)]
    first, second = reversed(parts) if teacher_first else parts
    path = tmp_path / "both.pth"
    torch.save({"state_dict": {**first, **second, "head.weight": torch.zeros(2, 2)}}, path)
    backbone = load_backbone(f"{path}?num_heads=2")
    assert torch.equal(backbone.cls_token, networks[1]["cls_token"])
    said = capsys.readouterr().err
    student, teacher = PREFIXES[kind]
    assert f"{teacher} is taken, not {student}" in said, said


@pytest.mark.parametrize("names", [("student", "teacher"), ("model", "ema"), ("state_dict", "ema")])
def test_of_two_nested_networks_the_teacher_is_taken(names, networks, tmp_path, capsys):
    path = tmp_path / "both.pth"
    torch.save(dict(zip(names, networks, strict=True)) | {"epoch": 3}, path)
    backbone = load_backbone(f"{path}?num_heads=2")
    assert torch.equal(backbone.cls_token, networks[1]["cls_token"])


def test_one_network_is_said_to_be_one(networks, tmp_path, capsys):
    path = tmp_path / "one.pth"
    torch.save({"model": under("module.backbone.", networks[0])}, path)
    load_backbone(f"{path}?num_heads=2")
    assert "taken" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html><html>403</html>", "web page"),
        (b"\n<HTML><head>sign in</head></HTML>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 44\n", "Git LFS"),
        (b"", "is empty"),
        (b"\x80\x02}q\x00", "damaged"),
        (b"PK\x03\x04" + 30 * b"\0", "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "model.safetensors"])
def test_files_that_are_no_weights_say_what_they_are(content, words, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    words = "not a whole safetensors" if words == "damaged" and "safe" in name else words
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_file_says_so(networks, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(networks[0], path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        load_backbone(path)
