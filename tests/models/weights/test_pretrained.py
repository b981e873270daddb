"""Released weights: our model computes what transformers and timm compute; no tensor is lost."""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import eval_knn
from models import load_backbone
from models.channels import adapt_channels
from models.features import Preprocessing
from models.timm_backbone import TimmBackbone
from models.vit import PRESETS, VisionTransformer
from models.weights.foreign import find_dialect
from models.weights.load import load_heads
from models.weights.save import save_backbone
from models.weights.shapes import vit_options
from tests.dialects import (
    HF_CLASSES,
    SEVEN_BILLION,
    deviation,
    draw,
    hf_tokens,
    hugging_face,
    meta_file,
    tokens,
)
from tests.processes import run_process

BOUND = 1e-5  # of the largest number in the reference
SMALL_GATED = {"use_swiglu_ffn": True}
transformers_only = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("transformers"),
    reason="needs transformers (tests/requirements.txt)",
)


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(
        1, channels, height, width, generator=torch.Generator().manual_seed(height + width)
    )


def sizes_of(name: str, native: int | None = None) -> list[tuple[int, int]]:
    """Native, another square, one that is not square."""
    if name == "DINOv3ConvNextModel":
        return [(64, 64), (96, 96), (64, 96)]
    patch = 14 if name.startswith("Dinov2") else 16
    return [(native or 4 * patch,) * 2, (6 * patch, 6 * patch), (3 * patch, 5 * patch)]


def check(backbone, reference, sizes):
    for size in sizes:
        images = image(*size, backbone.in_channels)
        found = deviation(backbone, reference(images), images)
        assert found <= BOUND, f"{size}: {found}"


# ----------------------------------------------------------------- Hugging Face


@transformers_only
@pytest.mark.parametrize("size", ["S", "B", pytest.param("L", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HF_CLASSES)
def test_hugging_face_folders_give_the_tokens_of_transformers(name, size, tmp_path):
    native = (518 if name.startswith("Dinov2") else 224) if size == "S" else None
    options = {"image_size": native} if native and "Conv" not in name else {}
    model = hugging_face(name, size, **options)
    model.save_pretrained(tmp_path)
    check(load_backbone(tmp_path), lambda images: hf_tokens(model, images), sizes_of(name, native))


@transformers_only
@pytest.mark.parametrize(
    "name, options",
    [
        ("DINOv3ViTModel", SEVEN_BILLION),
        ("DINOv3ViTModel", dict(num_register_tokens=0, key_bias=True)),
        ("DINOv3ViTModel", dict(proj_bias=False, mlp_bias=False, rope_theta=50.0, num_channels=4)),
        ("Dinov2Model", SMALL_GATED),
        ("Dinov2Model", dict(qkv_bias=False, use_mask_token=False, layer_norm_eps=1e-3)),
        ("Dinov2WithRegistersModel", {**SMALL_GATED, "num_register_tokens": 2}),
        (
            "ViTModel",
            dict(patch_size=8, image_size=32, layer_norm_eps=1e-12, num_attention_heads=4),
        ),
    ],
)
def test_options_of_hugging_face_configurations_are_followed(name, options, tmp_path):
    model = hugging_face(name, "nano", **options)
    model.save_pretrained(tmp_path)
    check(load_backbone(tmp_path), lambda images: hf_tokens(model, images), sizes_of(name))


@transformers_only
def test_shards_and_models_with_a_classifier_are_read(tmp_path, capsys):
    import transformers

    model = hugging_face("Dinov2Model", "nano")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    check(load_backbone(tmp_path / "shards"), lambda images: hf_tokens(model, images), [(56, 56)])
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="counts it as a shard"):
        load_backbone(tmp_path / "shards")

    classifier = draw(
        transformers.ViTForImageClassification(hugging_face("ViTModel", "nano").config)
    )
    classifier.save_pretrained(tmp_path / "classifier")
    check(
        load_backbone(tmp_path / "classifier"),
        lambda images: hf_tokens(classifier.vit, images),
        [(64, 64)],
    )
    assert "left aside: classifier.bias, classifier.weight" in capsys.readouterr().err


# ----------------------------------------------------------------- Meta


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """By class: a small model of transformers and the authors' file of its weights."""
    pytest.importorskip("transformers")
    made = {}
    for name in HF_CLASSES:
        folder = tmp_path_factory.mktemp(name)
        model = hugging_face(name, "nano")
        model.save_pretrained(folder)
        made[name] = model, meta_file(model, load_file(folder / "model.safetensors"))
    return made


def offset_positions(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Meta's `interpolate_pos_encoding` of DINO and DINOv2."""
    side = round((positions.shape[1] - 1) ** 0.5)
    maps = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = tuple((new + 0.1) / side for new in grid)
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", antialias=False)
    assert maps.shape[-2:] == grid
    return torch.cat(
        [positions[:, :1], maps.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)], dim=1
    )


@pytest.mark.parametrize("name", HF_CLASSES)
def test_meta_files_give_the_tokens_of_transformers(name, meta, tmp_path):
    model, weights = meta[name]
    torch.save(weights, tmp_path / "file.pth")
    sizes = sizes_of(name)[:1] if name in ("ViTModel", "Dinov2Model") else sizes_of(name)
    check(load_backbone(tmp_path / "file.pth"), lambda images: hf_tokens(model, images), sizes)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_positions_follow_the_dialect_and_can_be_told_otherwise(name, meta, tmp_path):
    model, weights = meta[name]
    torch.save(weights, tmp_path / "file.pth")
    _, square, oblong = sizes_of(name)
    # As the authors resize them: transformers' model with positions made for the other size.
    side = square[0] // model.config.patch_size
    resized = hugging_face(name, "nano", image_size=square[0])
    state = model.state_dict() | {
        "embeddings.position_embeddings": offset_positions(
            model.embeddings.position_embeddings.detach(), (side, side)
        )
    }
    resized.load_state_dict(state)
    check(load_backbone(tmp_path / "file.pth"), lambda images: hf_tokens(resized, images), [square])
    told = load_backbone(f"{tmp_path / 'file.pth'}?interpolation=size")
    check(told, lambda images: hf_tokens(model, images), [square, oblong])


def test_dinov2_with_swiglu_and_dinov3_with_a_gate_are_read(tmp_path):
    pytest.importorskip("transformers")
    for name, options in [("Dinov2Model", SMALL_GATED), ("DINOv3ViTModel", SEVEN_BILLION)]:
        model = hugging_face(name, "nano", **options)
        model.save_pretrained(tmp_path / name)
        torch.save(
            meta_file(model, load_file(tmp_path / name / "model.safetensors")),
            tmp_path / f"{name}.pth",
        )
        check(
            load_backbone(tmp_path / f"{name}.pth"),
            functools.partial(hf_tokens, model),
            sizes_of(name)[:1],
        )


def prefixed(weights: dict, *prefix: str) -> dict:
    return {"".join(prefix) + name: tensor for name, tensor in weights.items()}


def test_training_checkpoints_give_their_teacher_without_prefixes(meta, tmp_path, capsys):
    model, weights = meta["ViTModel"]
    head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_g": torch.ones(4, 1)}
    student = prefixed(weights | head, "module.", "backbone.") | prefixed(head, "module.")
    checkpoint = {
        "student": {name: torch.zeros_like(tensor) for name, tensor in student.items()},
        "teacher": prefixed(weights, "backbone.") | head,
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, output_dir="."),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(checkpoint, tmp_path / "dino.pth")
    check(load_backbone(tmp_path / "dino.pth"), lambda images: hf_tokens(model, images), [(64, 64)])
    assert "left aside: head.mlp.0.weight, head.last_layer.weight_g" in capsys.readouterr().err
    torch.save({"teacher": prefixed(weights, "module.", "backbone.")}, tmp_path / "wrapped.pth")
    check(
        load_backbone(tmp_path / "wrapped.pth"), lambda images: hf_tokens(model, images), [(64, 64)]
    )

    model, weights = meta["Dinov2Model"]
    chunked = {
        name.replace("blocks.", "blocks.0." if "blocks.0" in name else "blocks.1."): t
        for name, t in weights.items()
    }
    heads = {
        "dino_head.mlp.0.weight": torch.zeros(4, 4),
        "ibot_head.last_layer.weight_v": torch.zeros(4, 4),
    }
    torch.save(
        {"teacher": prefixed(chunked, "backbone.") | heads}, tmp_path / "teacher_checkpoint.pth"
    )
    backbone = load_backbone(tmp_path / "teacher_checkpoint.pth")
    check(backbone, lambda images: hf_tokens(model, images), [(56, 56)])
    assert backbone.depth == 2


def test_ibot_files_bring_their_mask_token(meta, tmp_path):
    _, weights = meta["ViTModel"]
    torch.save(
        {"teacher": {**weights, "masked_embed": torch.full((1, 128), 0.25)}}, tmp_path / "ibot.pth"
    )
    assert torch.equal(load_backbone(tmp_path / "ibot.pth").mask_token, torch.full((1, 128), 0.25))


def test_rounded_periods_and_local_norms_of_dinov3_are_kept(meta, tmp_path):
    _, weights = meta["DINOv3ViTModel"]
    rounded = weights["rope_embed.periods"].bfloat16().float()
    local = {
        "local_cls_norm.weight": torch.full((128,), 2.0),
        "local_cls_norm.bias": torch.full((128,), 3.0),
    }
    torch.save({**weights, **local, "rope_embed.periods": rounded}, tmp_path / "dinov3.pth")
    backbone = load_backbone(tmp_path / "dinov3.pth")
    assert torch.equal(backbone.rope.periods, rounded) and not torch.equal(
        rounded, weights["rope_embed.periods"]
    )
    assert torch.equal(backbone.local_cls_norm.bias, local["local_cls_norm.bias"])
    assert backbone.config["norm_eps"] == 1e-5 and backbone.config["mask_k_bias"]


def test_heads_are_counted_by_the_width_or_told(tmp_path):
    odd = draw(
        VisionTransformer(
            embed_dim=96, depth=1, num_heads=4, patch_size=8, image_size=32, mask_token=False
        )
    )
    theirs = {
        name.replace("patch_embed.", "patch_embed.proj."): t for name, t in odd.state_dict().items()
    }
    torch.save(theirs, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="96 wide.*num_heads="):
        load_backbone(tmp_path / "odd.pth")
    images = image(32, 32)
    told = load_backbone(f"{tmp_path / 'odd.pth'}?num_heads=4")
    assert deviation(told, tokens(odd(images)).detach(), images) == 0


@pytest.mark.parametrize("arch", [arch for arch in PRESETS if arch != "vit_nano"])
def test_published_sizes_are_known_by_their_shapes(arch):
    """So `model.arch` of a configuration equals that of the weights it starts from."""
    options = {
        **PRESETS[arch],
        "positions": "rope",
        "registers": 4,
        "layerscale": 1e-5,
        "norm_eps": 1e-5,
        "mask_k_bias": True,
    }
    with torch.device("meta"):
        backbone = VisionTransformer(**options)
    names = {"register_tokens": "storage_tokens", "rope.periods": "rope_embed.periods"}
    theirs = {names.get(key, key): tensor for key, tensor in backbone.state_dict().items()}
    theirs = {
        key.replace("patch_embed.", "patch_embed.proj."): tensor for key, tensor in theirs.items()
    }
    for key in [key for key in theirs if ".w12." in key]:
        w12 = theirs.pop(key)
        for name, half in zip(("w1", "w2"), w12.chunk(2), strict=True):
            theirs[key.replace("w12", name)] = half
    found = vit_options(theirs, find_dialect(theirs, from_timm=False), {})
    differing = {key for key, value in found.items() if backbone.config[key] != value}
    assert found["embed_dim"] == backbone.embed_dim and not differing


# ----------------------------------------------------------------- timm


@pytest.mark.parametrize("size", ["small", "base", pytest.param("large", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name, patch",
    [
        ("vit_{}_patch14_dinov2", 14),
        ("vit_{}_patch14_reg4_dinov2", 14),
        ("vit_{}_patch16_dinov3", 16),
        ("vit_{}_patch16_dinov3_qkvb", 16),
        ("vit_{}_patch16_224", 16),
    ],
)
def test_timm_folders_give_the_tokens_of_timm(name, patch, size, tmp_path):
    if size == "base" and name.endswith(("reg4_dinov2", "dinov3")):
        pytest.skip("the sisters of these are compared at this size")
    model = draw(
        timm.create_model(
            name.format(size), num_classes=0, img_size=4 * patch, dynamic_img_size=True
        )
    )
    save_for_hf(model, tmp_path, safe_serialization=True)
    backbone = load_backbone(tmp_path)
    assert isinstance(backbone, VisionTransformer)
    with torch.no_grad():
        check(
            backbone,
            model.forward_features,
            [(4 * patch, 4 * patch), (6 * patch, 6 * patch), (3 * patch, 5 * patch)],
        )


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_small_plus_patch16_dinov3_qkvb", dict(depth=2)),
        ("vit_7b_patch16_dinov3", dict(depth=2, embed_dim=128, num_heads=1)),
        ("vit_giant_patch14_reg4_dinov2", dict(depth=2, embed_dim=192, num_heads=3)),
        ("vit_giant_patch14_dinov2", dict(depth=2, embed_dim=192, num_heads=3, in_chans=5)),
    ],
)
def test_gated_models_of_timm_are_read(name, options, tmp_path):
    patch = 14 if "14" in name else 16
    model = draw(
        timm.create_model(name, num_classes=0, img_size=4 * patch, dynamic_img_size=True, **options)
    )
    save_for_hf(model, tmp_path, safe_serialization=True)
    with torch.no_grad():
        check(
            load_backbone(tmp_path),
            model.forward_features,
            [(4 * patch, 4 * patch), (3 * patch, 5 * patch)],
        )


def test_bare_files_of_timm_are_known_by_their_names(tmp_path):
    model = draw(
        timm.create_model(
            "vit_small_patch16_224.dino",
            num_classes=10,
            depth=2,
            img_size=64,
            dynamic_img_size=True,
        )
    )
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    with torch.no_grad():
        check(
            load_backbone(tmp_path / "dino.safetensors"),
            model.forward_features,
            [(64, 64), (48, 80)],
        )


def test_convnexts_of_timm_have_the_tokens_of_dinov3(tmp_path):
    model = draw(
        timm.create_model("convnext_tiny.dinov3_lvd1689m", num_classes=0, depths=(1, 1, 1, 1))
    )
    save_for_hf(model, tmp_path, safe_serialization=True)
    backbone, images = load_backbone(tmp_path), image(64, 96)
    with torch.no_grad():
        maps = model.forward_features(images)
        sequence = torch.cat([maps.mean((2, 3))[:, None], maps.flatten(2).mT], dim=1)
        reference = F.layer_norm(
            sequence, (768,), model.head.norm.weight, model.head.norm.bias, 1e-6
        )
    assert deviation(backbone, reference, images) <= BOUND
    assert backbone.preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224.augreg_in21k", "test_vit2"])
def test_any_other_folder_of_timm_is_read_too(name, tmp_path):
    model = draw(timm.create_model(name, num_classes=7))
    save_for_hf(model, tmp_path, safe_serialization=True)
    backbone = load_backbone(tmp_path)
    size = model.pretrained_cfg["input_size"][-2:]
    images = image(*size)
    with torch.no_grad():
        reference = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.allclose(backbone(images).cls, reference, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------- normalisation


GREY = {"mean": (0.1,) * 3, "std": (0.2,) * 3}
PROCESSORS = {
    "no crop": (
        {"size": {"height": 48, "width": 32}, "resample": 2},
        Preprocessing((48, 32), 32, **GREY, interpolation="bilinear"),
    ),
    "crop": (
        {
            "size": {"shortest_edge": 40},
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 24},
            "resample": 3,
        },
        Preprocessing((32, 24), 40, **GREY),
    ),
    "old": (
        {"size": 32, "resample": 2, "feature_extractor_type": "ViTFeatureExtractor"},
        Preprocessing((32, 32), 32, **GREY, interpolation="bilinear"),
    ),
    "old crop": (
        {"size": 40, "do_center_crop": True, "crop_size": 32, "resample": 3},
        Preprocessing((32, 32), 40, **GREY),
    ),
}


@transformers_only
@pytest.mark.parametrize("layout", PROCESSORS)
def test_every_layout_of_image_processors_is_understood(layout, tmp_path):
    values, expected = PROCESSORS[layout]
    hugging_face("ViTModel", "nano").save_pretrained(tmp_path)
    values = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, **values}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert load_backbone(tmp_path).preprocessing == expected


def test_published_statistics_go_by_the_file_name(meta, tmp_path, capsys):
    _, weights = meta["DINOv3ViTModel"]
    for name, mean in [
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", 0.430),
        ("dinov3_vitl16_pretrain_lvd1689m.pth", 0.485),
    ]:
        torch.save(weights, tmp_path / name)
        preprocessing = load_backbone(tmp_path / name).preprocessing
        assert preprocessing.mean[0] == mean and preprocessing.size == (256, 256)


# ----------------------------------------------------------------- damage


def sentence(path, *options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_backbone(path, *options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a DINOv3 model, to be damaged."""
    pytest.importorskip("transformers")
    hugging_face("DINOv3ViTModel", "nano").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    path, whole = folder / "model.safetensors", load_file(folder / "model.safetensors")
    for name in whole:
        if name != "embeddings.mask_token":  # for training only
            save_file({key: tensor for key, tensor in whole.items() if key != name}, path)
            assert f"missing: {name}" in sentence(folder)
    save_file(whole | {"layer.0.surprise": torch.zeros(1)}, path)
    assert "unexpected: layer.0.surprise" in sentence(folder)
    save_file(whole | {"layer.1.mlp.up_proj.bias": torch.zeros(7)}, path)
    assert "layer.1.mlp.up_proj.bias [7] instead of [512]" in sentence(folder)


@pytest.mark.parametrize(
    "change, cause",
    [
        (
            {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
            "another arch, 128 wide instead of 192",
        ),
        ({"patch_size": 8}, "patch size 16 instead of 8"),
        ({"num_channels": 1}, "3 input channels instead of 1"),
        ({"num_hidden_layers": 3}, "another depth, 1 blocks too few and 0 too many"),
        ({"num_hidden_layers": 1}, "another depth, 0 blocks too few and 1 too many"),
        ({"model_type": "bert"}, "'bert'"),
        ({"model_type": "vit", "layer_norm_eps": 1e-6}, "missing"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_weights_for_another_configuration_are_refused_with_the_likely_cause(folder, change, cause):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert cause in sentence(folder)


def test_a_base_file_for_a_small_configuration_is_refused(tmp_path):
    pytest.importorskip("transformers")
    hugging_face("ViTModel", "S", num_hidden_layers=1).save_pretrained(tmp_path / "S")
    hugging_face("ViTModel", "B", num_hidden_layers=1).save_pretrained(tmp_path / "B")
    shutil.copy(tmp_path / "B" / "model.safetensors", tmp_path / "S")
    assert "another arch, 768 wide instead of 384" in sentence(tmp_path / "S")


def test_files_cut_short_are_refused(meta, folder, tmp_path):
    torch.save(meta["ViTModel"][1], tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 10, 1000, len(data) // 2, len(data) - 100):
        (tmp_path / "cut.pth").write_bytes(data[:size])
        said = sentence(tmp_path / "cut.pth")
        assert ("damaged" if size else "is empty") in said
    data = (folder / "model.safetensors").read_bytes()
    for size in (0, 4, 1000, len(data) - 100):
        (folder / "model.safetensors").write_bytes(data[:size])
        words = "not a whole safetensors file" if size else "is empty"
        assert words in sentence(folder)


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(meta, tmp_path, zipped):
    mark = tmp_path / "executed"
    torch.save(
        {**meta["ViTModel"][1], "payload": Malicious(mark)},
        tmp_path / "bad.pth",
        _use_new_zipfile_serialization=zipped,
    )
    assert (
        "would run code on loading (posix.mkdir)" in sentence(tmp_path / "bad.pth")
        or sys.platform == "win32"
    )
    assert not mark.exists()


def test_a_shard_outside_the_folder_is_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../elsewhere.safetensors', which is no plain file" in sentence(folder)


def test_files_of_something_else_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    assert "no dialect that we know" in sentence(tmp_path / "other.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    assert "holds no tensors by name" in sentence(tmp_path / "list.pth")
    assert "nano-dino/none could not be fetched" in sentence("hf:nano-dino/none")
    assert "could not be fetched" in sentence("hf:not a name")


def test_unknown_options_are_named(folder):
    assert "unknown option colour" in sentence(f"{folder}?colour=red")
    assert "interpolation is 'nearest'" in sentence(f"{folder}?interpolation=nearest")
    assert "channels is 0" in sentence(f"{folder}?channels=0")


def test_a_damaged_file_is_one_sentence_and_exit_two(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors")
    data = ["--train", "scenes?size=4", "--val", "scenes?size=4"]
    done = run_process("eval_knn.py", "--model", str(folder), *data)
    assert (
        done.returncode == 2
        and "not a whole safetensors file" in done.stderr
        and "Traceback" not in done.stderr
    )


# ----------------------------------------------------------------- use


@pytest.mark.parametrize("name", HF_CLASSES)
@pytest.mark.parametrize("dialect", ["hf", "meta"])
def test_knn_takes_every_dialect(name, dialect, meta, tmp_path, capsys):
    model, weights = meta[name]
    model.save_pretrained(tmp_path / "hf")
    torch.save(weights, tmp_path / "meta.pth")
    path = tmp_path / ("hf" if dialect == "hf" else "meta.pth")
    side = "64" if "Conv" in name else "28"
    data = [
        "--train",
        "scenes?size=12",
        "--val",
        "scenes?split=val&size=6",
        "--workers",
        "0",
        "--size",
        side,
        "--k",
        "5",
    ]
    eval_knn.main(["--model", str(path), *data])
    assert 0 <= json.loads(capsys.readouterr().out)["top1"] <= 1


def test_heads_come_from_the_folder_of_a_run(tmp_path):
    backbone = VisionTransformer(embed_dim=32, depth=1, num_heads=2, patch_size=8, image_size=32)
    save_backbone(
        backbone, tmp_path / "run" / "teacher", Preprocessing((32, 32), 32, (0.5,) * 3, (0.5,) * 3)
    )
    assert load_heads(tmp_path / "run") == {} == load_heads("random:vit_nano")
    save_file(
        {"dino_head.mlp.0.weight": torch.ones(2, 2)},
        tmp_path / "run" / "teacher" / "heads.safetensors",
    )
    assert list(load_heads(f"{tmp_path / 'run'}")) == ["dino_head.mlp.0.weight"]
    load_backbone(tmp_path / "run")


# ----------------------------------------------------------------- channels


def grey_through(backbone, grey: torch.Tensor) -> torch.Tensor:
    """Tokens of an image that is grey in every channel, prepared as the backbone wants it."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    with torch.no_grad():
        return tokens(backbone((grey.expand(-1, backbone.in_channels, -1, -1) - mean) / std))


@pytest.mark.parametrize("name", ["ViTModel", "DINOv3ConvNextModel"])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_grey_images_keep_their_features_at_any_number_of_channels(name, channels, meta, tmp_path):
    torch.save(
        meta[name][1], tmp_path / "dinov3_sat493m.pth"
    )  # whose statistics differ most between channels
    original = load_backbone(tmp_path / "dinov3_sat493m.pth")
    adapted = load_backbone(f"{tmp_path / 'dinov3_sat493m.pth'}?channels={channels}")
    grey = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    reference, found = grey_through(original, grey), grey_through(adapted, grey)
    assert adapted.in_channels == len(adapted.preprocessing.std) == channels
    assert (found - reference).abs().max() <= BOUND * reference.abs().max()
    save_backbone(adapted, tmp_path / "saved", adapted.preprocessing)
    assert torch.equal(grey_through(load_backbone(tmp_path / "saved"), grey), found)


def test_filters_sum_to_the_same_where_statistics_are_equal():
    preprocessing = Preprocessing((32, 32), 32, (0.4,) * 3, (0.2,) * 3)
    for with_statistics in (True, False):
        backbone = draw(
            VisionTransformer(embed_dim=32, depth=1, num_heads=2, patch_size=8, image_size=32)
        )
        if with_statistics:
            backbone.preprocessing = preprocessing
        weight, bias, x = (
            backbone.patch_embed.weight.clone(),
            backbone.patch_embed.bias.clone(),
            image(32, 32, 1),
        )
        reference = tokens(backbone(x.expand(-1, 3, -1, -1)))
        adapt_channels(backbone, 1)
        assert torch.allclose(backbone.patch_embed.weight, weight.sum(1, keepdim=True), atol=1e-6)
        assert torch.allclose(backbone.patch_embed.bias, bias, atol=1e-6)
        assert torch.allclose(tokens(backbone(x)), reference, atol=1e-5)
        adapt_channels(backbone, 5)
        assert torch.allclose(
            backbone.patch_embed.weight,
            weight.sum(1, keepdim=True).expand(-1, 5, -1, -1) / 5,
            atol=1e-6,
        )
        assert torch.allclose(tokens(backbone(x.expand(-1, 5, -1, -1))), reference, atol=1e-5)
        if with_statistics:
            assert backbone.preprocessing == dataclasses.replace(
                preprocessing, mean=(0.4,) * 5, std=(0.2,) * 5
            )


def test_first_layers_that_pad_are_not_adapted():
    with pytest.raises(ValueError, match="in_channels="):
        adapt_channels(TimmBackbone("test_resnet"), 1)
