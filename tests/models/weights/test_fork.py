"""A fork's own parameter: kept in our format only, read back exactly, fresh where it is missing."""

import itertools
import json

import pytest
import torch
from torch import nn

from errors import UserError
from models import vit
from models.features import Preprocessing
from models.layers import Attention
from models.vit import VisionTransformer
from models.weights import own, read
from models.weights.load import load_backbone
from models.weights.save import CONVERTERS, write_backbone

PLAIN = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
RGB = Preprocessing((32, 32), 32, (0.5,) * 3, (0.25,) * 3)
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Gated(Attention):
    """A gate for each head, which starts at 1."""

    def __init__(self, dim, num_heads, **options):
        super().__init__(dim, num_heads, **options)
        self.gate = nn.Parameter(torch.ones(num_heads))

    def _attend(self, qkv, rotation):
        heads = super()._attend(qkv, rotation).unflatten(-1, (self.num_heads, -1))
        return (heads * self.gate[:, None]).flatten(-2)


@pytest.fixture
def forked(monkeypatch):
    """Backbones have gates, as after a fork's change of models/layers.py."""
    own._said.clear()
    monkeypatch.setattr("models.layers.Attention", Gated)
    return VisionTransformer


def backbone_with_gates():
    backbone = VisionTransformer(**PLAIN)
    with torch.no_grad():
        for number, block in enumerate(backbone.blocks):
            block.attn.gate.copy_(torch.tensor([0.5, 2.0]) + number)
    return backbone.eval()


def test_the_published_names_are_those_of_every_vit():
    choices = [
        {"positions": ["learned", "rope"]},
        {"ffn": ["mlp", "swiglu"]},
        {"layerscale": [None, 1e-5]},
        {"registers": [0, 2]},
        {"untie_cls_norm": [False, True], "untie_local_cls_norm": [False]},
    ]
    options = [
        dict(zip(c, v, strict=True)) for c in choices for v in itertools.product(*c.values())
    ]
    options += [{"untie_local_cls_norm": True}, {"mask_k_bias": True}, {"mask_token": False}]
    for changes in options:
        backbone = VisionTransformer(**PLAIN | changes)
        assert read.own_of_fork(backbone) == [], changes


def test_a_teacher_is_written_in_our_format_and_read_back_exactly(forked, tmp_path, capsys):
    backbone = backbone_with_gates()
    for _ in range(2):
        own.save_teacher(backbone, tmp_path / "teacher", RGB)
    said = capsys.readouterr().err
    assert said.count("our own format only") == 1 and "blocks.*.attn.gate" in said
    loaded = load_backbone(tmp_path / "teacher")
    assert torch.equal(loaded(IMAGES).patches, backbone(IMAGES).patches)
    assert loaded.blocks[1].attn.gate.tolist() == [1.5, 3.0]
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["model_type"] == "nanodino"  # transformers refuses it


@pytest.mark.parametrize("format", CONVERTERS)
def test_no_foreign_format_is_written_that_would_compute_something_else(format, forked, tmp_path):
    with pytest.raises(UserError, match=r"own format holds blocks\.\*\.attn\.gate"):
        write_backbone(backbone_with_gates(), RGB, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("written", ["own", "hf", "meta"])
def test_weights_without_the_parameter_load_and_say_what_starts_fresh(
    written, tmp_path, monkeypatch, capsys
):
    plain = VisionTransformer(**PLAIN, norm_eps=1e-6).eval()
    write_backbone(plain, RGB, tmp_path / "plain", written)
    path = tmp_path / "plain" / ("backbone.pth" if written == "meta" else "")
    query = "?num_heads=2" if written == "meta" else ""
    monkeypatch.setattr("models.layers.Attention", Gated)
    loaded = load_backbone(f"{path}{query}")
    assert "start fresh: blocks.*.attn.gate" in capsys.readouterr().err
    torch.testing.assert_close(loaded(IMAGES).cls, plain(IMAGES).cls)


def test_a_file_that_has_some_of_the_parameters_is_damaged(forked, tmp_path):
    backbone = backbone_with_gates()
    state = backbone.state_dict()
    del state["blocks.1.attn.gate"]
    with pytest.raises(UserError, match="missing: blocks.1.attn.gate"):
        read.load_tensors(VisionTransformer(**PLAIN), state, "file")
    assert vit.VisionTransformer is VisionTransformer
