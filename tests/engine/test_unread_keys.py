"""A key that the chosen architecture or policy does not read is refused: no key does nothing."""

from dataclasses import dataclass, fields

import pytest
import yaml

import train
from data.augment import AugmentPolicy
from engine.config import CropsConfig, DistillTrainConfig, ModelConfig, load_config
from engine.start import build_student
from engine.students import student_configs
from engine.views import NOT_OF_POLICY, multi_crop_from
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


def test_a_new_key_of_crops_without_a_field_in_the_policy_fails_in_the_first_batch():
    @dataclass
    class Forked(CropsConfig):
        posterize: float | None = None

    multi_crop_from(Forked(), [0.5] * 3, [0.5] * 3)
    with pytest.raises(TypeError, match="posterize"):
        multi_crop_from(Forked(posterize=0.5), [0.5] * 3, [0.5] * 3)
