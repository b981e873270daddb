"""A key that the chosen architecture or policy does not read is refused: no key does nothing."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import yaml

import train
from data.augment import NUMBERS, POLICIES, AugmentPolicy, crop_boxes
from engine.config import CropsConfig, ModelConfig, load_config
from engine.distill_config import DistillTrainConfig
from engine.layers import NOT_OF_POLICY
from engine.stages import stage_configs
from engine.start import build_student
from engine.students import student_configs
from engine.views import MEASURED, crops_on_device, multi_crop_from
from errors import UserError
from models.vit import VisionTransformer

# Another value than the default for every key of the section but `arch`.
OTHERS = {
    **{"patch_size": 8, "positions": "rope", "registers": 2, "layerscale": 0.1, "drop_path": 0.25},
    **{"drop_path_shape": "linear", "ffn": "swiglu", "ffn_ratio": 2.0, "embed_dim": 64},
    **{"depth": 3, "num_heads": 2, "qkv_bias": False, "mask_k_bias": True, "norm_eps": 1e-5},
    **{"untie_cls_norm": True, "untie_local_cls_norm": True, "rope_base": 50.0},
    **{"rope_shift": 0.5, "rope_jitter": 1.5, "rope_rescale": 2.0},
}
NET = "timm:test_resnet"
TINY_HEAD = ["loss.dino.prototypes=8", "loss.dino.hidden=8", "loss.dino.bottleneck=8"]


def test_every_key_of_the_section_model_has_a_value_here():
    assert OTHERS.keys() | {"arch"} == {field.name for field in fields(ModelConfig)}


@pytest.mark.parametrize("key", OTHERS)
def test_a_key_of_the_model_reaches_the_network_or_is_refused(key):
    given = f"model.{key}={OTHERS[key]}"
    rope = ["model.positions=rope"] if key.startswith("rope_") else []
    call = ["model.arch=vit_nano", "crops.global_size=32", "crops.local_size=16", *rope, *TINY_HEAD]
    backbone = build_student(load_config(None, [*call, given]), masked=True).backbone
    assert isinstance(backbone, VisionTransformer) and backbone.config[key] == OTHERS[key]
    said = rf"model\.{key} is .*, but {NET} does not read it"
    for order in ([f"model.arch={NET}", given], [given, f"model.arch={NET}"]):
        with pytest.raises(UserError, match=said):
            load_config(None, order)
    if rope:
        with pytest.raises(UserError, match=rf"model\.{key} is .*positions is learned"):
            load_config(None, ["model.arch=vit_nano", given])


def test_the_model_of_a_file_below_is_no_choice_of_who_takes_one_of_timm(tmp_path):
    (tmp_path / "x.yaml").write_text(f"base: quickstart.yaml\nmodel: {{arch: '{NET}'}}\n")
    for cfg in (
        load_config("quickstart", [f"model.arch={NET}"]),
        load_config(str(tmp_path / "x.yaml"), []),
    ):
        assert cfg.model == ModelConfig(arch=NET)
    with pytest.raises(UserError, match="model.depth"):
        load_config("quickstart", [f"model.arch={NET}", "model.depth=2"])
    (tmp_path / "x.yaml").write_text(f"model: {{arch: '{NET}', registers: 4}}\n")
    with pytest.raises(UserError, match="model.registers is 4"):
        load_config(str(tmp_path / "x.yaml"), [])


def test_students_are_checked_as_well():
    call = ["model.positions=rope", "model.registers=4", f"distill.students.s.model.arch={NET}"]
    (student,) = student_configs(load_config(None, call, DistillTrainConfig))
    assert student.cfg.model == ModelConfig(arch=NET)
    cfg = load_config(None, [*call, "distill.students.s.model.registers=2"], DistillTrainConfig)
    with pytest.raises(UserError, match="distill.students.s: model.registers is 2"):
        student_configs(cfg)


def test_a_run_that_kept_the_keys_of_another_model_goes_on(tiny, tmp_path):
    call = [part for part in tiny if not part.startswith("model.")]
    call += [f"model.arch={NET}", "loss.ibot.weight=0", "crops.global_size=64"]
    train.main([*call, "total_steps=1"])
    file = tmp_path / "run/config.yaml"
    values = yaml.safe_load(file.read_text())
    values["model"]["depth"] = 2  # as earlier versions did
    file.write_text(yaml.safe_dump(values))
    train.main([*call, "total_steps=2"])


def test_every_key_of_crops_is_a_field_of_the_policy_or_read_by_name():
    keys = {field.name for field in fields(CropsConfig)}
    assert keys >= NOT_OF_POLICY
    assert keys - NOT_OF_POLICY <= {field.name for field in fields(AugmentPolicy)}


@pytest.mark.parametrize("aspect", [1.0, 2.0])
def test_crops_have_the_aspect_that_is_asked_for(aspect):
    cfg = load_config(None, [f"crops.ratio=[{aspect}, {aspect}]", "crops.global_scale=[0.1, 0.4]"])
    views = multi_crop_from(cfg.crops, (0.5,) * 3, (0.2,) * 3)
    u = torch.rand(50, NUMBERS, generator=torch.Generator().manual_seed(0))
    for spec, _ in views.cuts:
        boxes = crop_boxes(u, 1000, 1000, spec)
        shapes = boxes[:, 3] / boxes[:, 2]
        assert len(set(boxes[:, 2])) > 30 and (abs(shapes / aspect - 1) < 0.01).all()


def test_a_new_key_of_crops_without_a_field_in_the_policy_fails_in_the_first_batch():
    @dataclass
    class Forked(CropsConfig):
        posterize: float | None = None

    multi_crop_from(Forked(), [0.5] * 3, [0.5] * 3)
    with pytest.raises(TypeError, match="posterize"):
        multi_crop_from(Forked(posterize=0.5), [0.5] * 3, [0.5] * 3)


# ----------------------------------------------------------------- a policy over keys of a file

BY_HAND = "crops: {policy: aerial, flip: 0.0, hue: 0.5, blur: [0, 0, 0], global_scale: [0.5, 1]}\n"


def colours(cfg) -> dict:
    """The keys of the policy that the configuration changes."""
    crops = {name: value for name, value in vars(cfg.crops).items() if name not in NOT_OF_POLICY}
    return {name: value for name, value in crops.items() if value is not None}


@pytest.mark.parametrize("policy", ["crops_only", "histology", "aerial"])
def test_a_policy_on_the_command_line_wins_over_colours_of_a_file(policy, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(BY_HAND)
    config = str(tmp_path / "x.yaml")
    assert set(colours(load_config(config, ["crops.guided=0"]))) == {"flip", "hue", "blur"}
    assert not capsys.readouterr().err
    cfg = load_config(config, [f"crops.policy={policy}", "crops.hue=0.25"])
    said = capsys.readouterr().err
    assert colours(cfg) == {"hue": 0.25} and cfg.crops.global_scale == [0.5, 1]
    assert (
        f"crops.policy {policy} replaces" in said and "crops.flip 0.0, crops.blur [0, 0, 0]" in said
    )
    made = multi_crop_from(cfg.crops, [0.5] * 3, [0.5] * 3).policy
    assert made == replace(POLICIES[policy], hue=0.25)


def test_colours_beside_a_policy_or_after_it_change_it(tmp_path):
    (tmp_path / "below.yaml").write_text("crops: {policy: aerial, flip: 0}\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\ncrops: {rotate90: 1}\n")
    assert colours(load_config(str(tmp_path / "above.yaml"), [])) == {"flip": 0, "rotate90": 1}
    for order in (["crops.flip=0", "crops.policy=aerial"], ["crops.policy=aerial", "crops.flip=0"]):
        assert colours(load_config(None, order)) == {"flip": 0}


def test_a_policy_of_a_stage_wins_over_colours_of_the_run(capsys):
    given = ["crops.flip=0", "stages={a: {steps: 1}, b: {steps: 1, crops: {policy: aerial}}}"]
    cfg = load_config(None, given)
    first, second = (stage for _, _, stage in stage_configs(cfg))
    assert colours(first) == {"flip": 0} and not colours(second)
    assert "stages.b: crops.policy aerial replaces" in capsys.readouterr().err
    (_, _, stage) = list(stage_configs(load_config(None, [*given, "stages.b.crops.flip=0.25"])))[1]
    assert colours(stage) == {"flip": 0.25}


@pytest.mark.parametrize(
    "kind, name, wanted",
    [("cuda", "NVIDIA H100 80GB HBM3", True), ("cuda", "NVIDIA A10G", False)]
    + [("cuda", "Tesla V100-SXM2-16GB", False), ("cpu", "", False), ("mps", "", False)],
)
def test_auto_makes_crops_on_a_device_only_where_that_was_measured(kind, name, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert crops_on_device("auto", torch.device(kind)) is wanted
    assert crops_on_device("device", torch.device(kind))
    assert not crops_on_device("workers", torch.device(kind))
    page = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    assert all(f"NVIDIA {name}" in page for name in MEASURED)


def test_a_key_of_an_earlier_version_is_read_under_its_new_name(tiny, tmp_path):
    train.main([*tiny, "crops.rotate90=0.5", "total_steps=1"])
    file = tmp_path / "run/config.yaml"
    old = file.read_text().replace("rotate90:", "turn:")
    assert "turn:" in old
    file.write_text(old)
    train.main(["--config", str(file), "total_steps=2"])
    assert "rotate90: 0.5" in file.read_text()
    stages = ["crops.turn=0.25", "stages={a: {steps: 1, crops: {turn: 0.5}}, b: {steps: 1}}"]
    cfg = load_config(None, [*stages, "stages.b.crops.turn=0.75"])
    assert cfg.crops.rotate90 == 0.25
    assert [stage.crops.rotate90 for _, _, stage in stage_configs(cfg)] == [0.5, 0.75]
