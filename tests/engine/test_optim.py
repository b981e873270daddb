"""Schedules, parameter groups and clipping against figures computed by hand or published."""

import pytest
import torch
from torch import nn

from engine.optim import (
    clip_gradients,
    drop_last_layer_gradients,
    is_decayed,
    layer_multiplier,
    lr_factor,
    make_optimizer,
    make_schedule,
    parameter_groups,
    set_rates,
    span_steps,
)
from models.head import ProjectionHead
from models.ssl_model import SSLModel, make_teacher, update_ema
from models.vit import VisionTransformer, build_backbone


def values(total_steps, **options):
    schedule = make_schedule(total_steps, **options)
    return [schedule(step) for step in range(total_steps)]


def test_schedules_equal_the_published_arrays():
    """FACTS: DINOv3's `schedules:` block, computed with the authors' code."""
    expected = [0, 0.25, 0.5, 0.75, 1, 0.91406, 0.68906, 0.41094, 0.18594, 0.1]
    assert values(10, start=0, peak=1, end=0.1, warmup=4) == pytest.approx(expected, abs=1e-5)
    assert values(6, start=0, peak=0, end=0.5, decay=3) == pytest.approx(
        [0, 0.25, 0.5, 0.5, 0.5, 0.5]
    )


def test_linear_and_constant_shapes():
    assert values(5, start=1, peak=1, end=0, shape="linear") == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0]
    )
    assert values(5, start=0, peak=2, warmup=2, shape="constant") == [0, 1, 2, 2, 2]


def test_the_factor_scales_peak_and_end_but_not_start():
    rising = values(4, start=1, peak=2, end=4, warmup=2, shape="linear", factor=10)
    assert rising == pytest.approx([1, 10.5, 20, 40])


def test_spans_are_steps_or_shares_and_are_cut_at_the_end_of_the_run():
    assert (span_steps(7, 100), span_steps("12.5%", 80)) == (7, 10)
    assert values(4, start=0, peak=8, warmup=8)[:2] == [0, 2]


def test_learning_rate_rules():
    assert lr_factor("linear_256", 512) == 2 and lr_factor("sqrt_1024", 256) == 0.5
    assert lr_factor("sqrt_1024_x4", 2048) * 1e-3 == pytest.approx(5.66e-3, rel=1e-3)


def test_layer_decay_of_depth_twelve():
    def of(name):
        return layer_multiplier(name, depth=12, decay=0.9)

    assert (of("norm.weight"), of("blocks.11.attn.qkv.weight")) == pytest.approx((1, 0.9))
    assert of("blocks.0.mlp.fc1.weight") == pytest.approx(0.28243, abs=1e-5)
    for name in ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed.weight"):
        assert of(name) == pytest.approx(0.25419, abs=1e-5)


def small_model():
    torch.manual_seed(0)
    backbone = VisionTransformer(
        embed_dim=16, depth=2, num_heads=2, patch_size=4, image_size=8, layerscale=1e-5, registers=1
    )
    return SSLModel(backbone, ProjectionHead(16, 8, hidden=16, bottleneck=8))


def test_groups_hold_every_parameter_once_with_its_factors():
    model = small_model()
    groups = parameter_groups(model, layer_decay=0.5, patch_embed_lr=0.2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    decayed = {
        name: is_decayed(modules[name.rpartition(".")[0]], parameter)
        for name, parameter in model.named_parameters()
    }
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay_scale"] == float(decayed[name])
            if "patch_embed" in name:
                assert group["lr_scale"] == pytest.approx(0.5**3 * 0.2)
            if "head" in name:
                assert group["lr_scale"] == 1
    undecayed = {name for name in names.values() if not decayed[name]}
    assert "backbone.blocks.0.ls1.gamma" in undecayed and "backbone.norm.weight" in undecayed
    assert "backbone.cls_token" not in undecayed  # as in the authors' code


def test_rates_reach_the_optimizer_scaled():
    optimizer = make_optimizer(parameter_groups(small_model(), layer_decay=0.5), betas=(0.9, 0.999))
    set_rates(optimizer, lr=2.0, weight_decay=0.4)
    assert {group["lr"] for group in optimizer.param_groups} == {2.0, 1.0, 0.5, 0.25}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.4}


@pytest.mark.parametrize("per", ["module", "tensor"])
def test_clipping_equals_the_formula(per):
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [p.grad.clone() for p in model.parameters()]
    total = clip_gradients(model, 0.5, per)
    assert total == pytest.approx(torch.cat([g.flatten() for g in before]).norm().item(), rel=1e-5)
    parts = list(model.parameters()) if per == "tensor" else list(model.children())
    for part in parts:
        gradients = [part.grad] if per == "tensor" else [p.grad for p in part.parameters()]
        assert torch.cat([g.flatten() for g in gradients]).norm().item() <= 0.5 + 1e-5


def test_a_frozen_last_layer_keeps_weights_and_moments():
    model = small_model()
    optimizer = make_optimizer(parameter_groups(model), betas=(0.9, 0.999))
    set_rates(optimizer, lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(4, 3, 8, 8)).global_logits.square().sum().backward()
    drop_last_layer_gradients(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved != ("last_layer" in name) or "mask_token" in name
        if "last_layer" in name:
            assert (
                optimizer.state[parameter]["step"] == 0
                and not optimizer.state[parameter]["exp_avg"].any()
            )


def test_teacher_is_a_separate_copy_that_follows_by_the_formula():
    student = small_model()
    teacher = make_teacher(student)
    storages = {p.untyped_storage().data_ptr() for p in student.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in teacher.parameters()}
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    before = [p.clone() for p in teacher.parameters()]
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    update_ema(teacher, student, 0.9)
    for old, new, followed in zip(before, student.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(followed, 0.9 * old + 0.1 * new)


def by_name(name: str) -> bool:
    """The rule as the authors' code has it, for the names of a ViT."""
    return not (name.endswith("bias") or "norm" in name or "gamma" in name)


def test_decay_goes_by_shape_and_kind_and_not_by_name():
    model = small_model()
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        assert is_decayed(module, parameter) == by_name(name), name
    for vector in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.LayerNorm((3, 4))):
        assert not any(is_decayed(vector, parameter) for parameter in vector.parameters())
    gate = nn.Module()
    gate.normalizer_gate = nn.Parameter(torch.ones(3))  # a fork's, of any name
    gate.biased_mix = nn.Parameter(torch.ones(3, 3))
    assert not is_decayed(gate, gate.normalizer_gate) and is_decayed(gate, gate.biased_mix)


@pytest.mark.parametrize("arch", ["timm:vit_tiny_patch16_224", "timm:resnet18"])
def test_timm_models_have_no_decay_on_norms_and_vits_decay_by_layer(arch):
    model = SSLModel(build_backbone(arch), ProjectionHead(8, 8, hidden=8, bottleneck=8))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {}
    for group in parameter_groups(model, layer_decay=0.5):
        for parameter in group["params"]:
            name = names[id(parameter)]
            scales[name] = group["lr_scale"]
            assert group["weight_decay_scale"] == float(parameter.ndim > 1), name
    if "vit" in arch:
        depth = 12
        assert scales["backbone.model.patch_embed.proj.weight"] == 0.5 ** (depth + 1)
        assert scales["backbone.model.blocks.0.attn.qkv.weight"] == 0.5**depth
        assert scales["backbone.model.blocks.11.attn.qkv.weight"] == 0.5
        assert scales["backbone.model.norm.weight"] == 1
