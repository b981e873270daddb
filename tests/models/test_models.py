import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import models.head
from models import load_backbone
from models.features import Preprocessing
from models.head import ProjectionHead
from models.layers import DropPath, SwiGLU
from models.positions import RotaryPositions, rotate
from models.ssl_model import update_ema
from models.timm_backbone import TimmBackbone
from models.vit import PRESETS, VisionTransformer, build_backbone
from models.weights.save import save_backbone

V3 = dict(positions="rope", registers=4, mask_k_bias=True, layerscale=1e-5, norm_eps=1e-5)
V2 = dict(patch_size=14, image_size=518, layerscale=1e-5)
PREPROCESSING = Preprocessing((32, 48), 40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")


def tiny(**options) -> VisionTransformer:
    """With weights large enough for every part to be seen in the output."""
    options = {"layerscale": 0.5, "image_size": 32, "patch_size": 8, **options}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = VisionTransformer(embed_dim=32, depth=2, num_heads=4, **options)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def joined(features) -> torch.Tensor:
    """(B, 1 + R + N, D)"""
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


# ----------------------------------------------------------------- shapes


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(32, 32), (16, 64), (50, 97), (8, 8)])
def test_any_size_gives_features_of_its_own_grid(positions, fit, size):
    model = tiny(positions=positions, fit=fit, registers=3)
    features = model(images(1, 3, *size))
    spare = 7 if fit == "pad" else 0
    h, w = (size[0] + spare) // 8, (size[1] + spare) // 8
    assert features.grid == (h, w)
    assert features.cls.shape == (1, 32)
    assert features.registers.shape == (1, 3, 32)
    assert features.patches.shape == (1, h * w, 32)


def test_transposed_sizes_give_transposed_grids():
    model = tiny(positions="rope")
    assert model(images(1, 3, 50, 97)).grid == model(images(1, 3, 97, 50)).grid[::-1] == (6, 12)


def test_crop_drops_the_remainder_and_pad_adds_zeros():
    x = images(1, 3, 20, 30)
    cropped, padded = tiny(fit="crop"), tiny(fit="pad")
    assert torch.equal(joined(cropped(x)), joined(cropped(x[..., :16, :24])))
    assert torch.equal(joined(padded(x)), joined(padded(F.pad(x, (0, 2, 0, 4)))))


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_any_number_of_channels(channels):
    assert tiny(in_channels=channels)(images(2, channels, 16, 16)).patches.shape == (2, 4, 32)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"])
def test_every_feed_forward_net_runs_without_its_biases(ffn):
    model = tiny(ffn=ffn, qkv_bias=False, proj_bias=False, ffn_bias=False)
    assert model(images(1, 3, 16, 16)).cls.shape == (1, 32)
    biases = {name for name, _ in model.blocks.named_parameters() if name.endswith("bias")}
    assert all("norm" in name for name in biases)


def test_swiglu_takes_its_gate_from_the_first_rows():
    net = SwiGLU(4, 8)
    x = images(3, 4)
    gate, up = net.w12.weight[:8], net.w12.weight[8:]
    hidden = F.silu(x @ gate.T + net.w12.bias[:8]) * (x @ up.T + net.w12.bias[8:])
    assert torch.allclose(net(x), hidden @ net.w3.weight.T + net.w3.bias, atol=1e-6)


def test_unsuitable_images_are_refused_in_a_sentence():
    model = tiny()
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\)"):
        model(images(1, 4, 32, 32))
    with pytest.raises(ValueError, match="float"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="7 x 32"):
        model(images(1, 3, 7, 32))
    with pytest.raises(ValueError, match="masks of shape"):
        model(images(1, 3, 32, 32), torch.zeros(1, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask_token=False"):
        tiny(mask_token=False)(images(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.bool))


@pytest.mark.parametrize(
    "option",
    [
        dict(positions="rotary"),
        dict(interpolation="bilinear"),
        dict(ffn="glu"),
        dict(fit="stretch"),
        dict(drop_path=1.0),
        dict(drop_path_shape="cosine"),
        dict(patch_size="8"),
        dict(image_size=4),
        dict(registers=-1),
        dict(positions="rope", rope_normalize="mean"),
    ],
)
def test_options_out_of_range_are_refused_by_name(option):
    with pytest.raises(ValueError, match=list(option)[-1]):
        tiny(**option)


# ----------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "arch, options, count",
    [
        ("vit_small", dict(mask_token=False), 21_665_664),  # DINO
        ("vit_base", dict(mask_token=False), 85_798_656),
        ("vit_small", V2, 22_056_576),  # DINOv2
        ("vit_base", V2, 86_580_480),
        ("vit_large", V2, 304_368_640),
        ("vit_giant", V2, 1_136_480_768),
        ("vit_small", V3, 21_601_152),  # DINOv3
        ("vit_small_plus", V3, 28_697_472),
        ("vit_base", V3, 85_669_632),
        ("vit_large", V3, 303_154_176),
        ("vit_large_plus", V3, 403_915_776),
        ("vit_huge_plus", V3, 840_633_600),
        ("vit_7b", {**V3, "qkv_bias": False, "untie_local_cls_norm": True}, 6_716_043_264),
    ],
)
def test_presets_have_the_released_number_of_parameters(arch, options, count):
    with torch.device("meta"):
        model = build_backbone(arch, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("arch", PRESETS)
def test_every_preset_builds(arch):
    with torch.device("meta"):
        model = build_backbone(arch, **V3)
    assert len(model.blocks) == model.depth == PRESETS[arch]["depth"]


def test_so400m_has_the_hidden_width_of_its_paper():
    with torch.device("meta"):
        assert build_backbone("vit_so400m").blocks[0].mlp.fc1.out_features == 4352


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="vit_smal.*vit_small, .*timm:NAME"):
        build_backbone("vit_smal")
    with pytest.raises(ValueError, match="patchsize.*patch_size"):
        build_backbone("vit_small", patchsize=8)
    with pytest.raises(ValueError, match="resnet50"):
        build_backbone("timm:resnet5O")


FULL = dict(registers=2, mask_k_bias=True, untie_cls_norm=True, untie_local_cls_norm=True)


def is_initialised(model: torch.nn.Module) -> bool:
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("options", [dict(FULL, positions="learned"), dict(FULL, positions="rope")])
def test_nan_filled_weights_are_all_initialised(options):
    model = tiny(**options)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights()
    assert is_initialised(model)
    with torch.device("meta"):
        empty = VisionTransformer(**model.config)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in empty.state_dict().values():
            tensor.fill_(float("nan"))
    torch.manual_seed(0)
    empty.init_weights()
    assert is_initialised(empty)
    torch.manual_seed(0)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, empty.state_dict()[name]), name


def test_initial_weights_have_the_scales_of_dinov3():
    torch.manual_seed(0)
    model = VisionTransformer(
        embed_dim=256, depth=1, num_heads=4, registers=64, layerscale=1e-5, mask_k_bias=True
    )
    block = model.blocks[0]
    for weight in (block.attn.qkv.weight, block.mlp.fc1.weight, model.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.register_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    bound = (3 * 16 * 16) ** -0.5
    assert 0.99 * bound < model.patch_embed.weight.abs().max() <= bound
    assert model.patch_embed.bias.abs().max() <= bound
    assert not model.mask_token.any() and not block.attn.qkv.bias.any()
    assert (block.ls1.gamma == 1e-5).all() and (model.norm.weight == 1).all()
    assert block.attn.qkv.bias_mask.view(3, 256).mean(dim=1).tolist() == [1, 0, 1]


def test_no_gradient_reaches_the_key_bias_and_it_changes_nothing():
    model = tiny(mask_k_bias=True)
    x = images(2, 3, 32, 32)
    before = joined(model(x))
    before.sum().backward()
    bias = model.blocks[0].attn.qkv.bias
    query, key, value = bias.grad.view(3, 32)
    assert not key.any() and query.any() and value.any()
    with torch.no_grad():
        bias.view(3, 32)[1] += 7.0
    assert torch.equal(joined(model(x)), before)


# ----------------------------------------------------------------- masks


@pytest.mark.parametrize("options", [dict(), dict(positions="rope", registers=2)])
def test_masked_pixels_do_not_leak(options):
    model = tiny(**options)
    masks = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    hidden = masks.view(2, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    x = images(2, 3, 32, 32)
    changed = torch.where(hidden, 5 * x + 1, x)
    assert not torch.allclose(joined(model(x)), joined(model(changed)))
    assert torch.equal(joined(model(x, masks)), joined(model(changed, masks)))


def test_masked_patches_keep_their_position():
    model = tiny()
    masks = torch.ones(1, 16, dtype=torch.bool)
    patches = model(images(1, 3, 32, 32), masks).patches
    assert not torch.allclose(patches[:, 0], patches[:, 1])


# ----------------------------------------------------------------- positions


def test_rope_gives_the_golden_numbers():
    rope = RotaryPositions(8)
    assert rope.periods.tolist() == [1, 10]
    sin, cos = rope((2, 3))
    assert sin.shape == cos.shape == (6, 8)
    expected = torch.tensor([0, -0.309017, 0.866025, -0.406737]).repeat(2)
    assert torch.allclose(sin[0], expected, atol=1e-6)
    expected = torch.tensor([-1, 0.951057, 1, 1]).repeat(2)
    assert torch.allclose(cos[1], expected, atol=1e-6)
    x = torch.sin(torch.arange(8, dtype=torch.float64) + 1).float()
    expected = [-0.841471, 0.778449, -0.639527, -0.288965, 0.958924, -0.546728, -0.206280, 1.211643]
    assert torch.allclose(rotate(x, sin[0], cos[0]), torch.tensor(expected), atol=1e-6)


def test_rope_periods_of_a_64_dimensional_head_round_to_the_released_ones():
    released = [1, 1.3359, 1.7812, 2.375, 3.1562, 4.2188, 5.625, 7.5]
    released += [10, 13.3125, 17.75, 23.75, 31.625, 42.25, 56.25, 75]
    rounded = RotaryPositions(64).periods.bfloat16().float()
    assert torch.allclose(rounded, torch.tensor(released), atol=1e-4)


def test_rotation_keeps_lengths_and_depends_on_relative_position_only():
    rope = RotaryPositions(8, normalize="max")
    sin, cos = rope((1, 5))
    q, k = images(2, 8)
    assert torch.allclose(rotate(q, sin[3], cos[3]).norm(), q.norm())
    products = [
        rotate(q, sin[i], cos[i]) @ rotate(k, sin[j], cos[j]) for i, j in ((0, 2), (1, 3), (2, 4))
    ]
    assert torch.allclose(products[0], products[1], atol=1e-5)
    assert torch.allclose(products[0], products[2], atol=1e-5)


@pytest.mark.parametrize(
    "normalize, y, x", [("separate", -0.5, -0.75), ("max", -0.75, -0.75), ("min", -0.5, -0.5)]
)
def test_rope_divides_coordinates_by_the_side_it_names(normalize, y, x):
    rope = RotaryPositions(8, base=1e8, normalize=normalize)
    sin, _ = rope((2, 4))
    angles = sin[0, [1, 3]]  # the slow period of the first patch, where sin a = a
    assert torch.allclose(angles * 1e4 / (2 * math.pi), torch.tensor([y, x]), atol=1e-4)


@pytest.mark.parametrize("option", ["rope_shift", "rope_jitter", "rope_rescale"])
def test_rope_augmentation_acts_in_training_only(option):
    plain = tiny(positions="rope")
    model = tiny(positions="rope", **{option: 2.0})
    x = images(1, 3, 32, 32)
    assert torch.equal(joined(model(x)), joined(plain(x)))
    model.train()
    first, second = joined(model(x)), joined(model(x))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, joined(plain(x)))


def test_rope_augmentation_stays_within_its_strength():
    rope = RotaryPositions(8, base=1e12, rescale=2.0).train()
    plain = RotaryPositions(8, base=1e12)((4, 4))[0][:, 1]  # angles so small that sin x = x
    factors = torch.stack([rope((4, 4))[0][:, 1] / plain for _ in range(200)])
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-4)
    assert 0.5 <= factors.min() < 0.6 and 1.8 < factors.max() <= 2.0 + 1e-4


def test_rope_augmentation_is_drawn_anew_for_each_block():
    model = tiny(positions="rope", rope_rescale=2.0).train()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][0]))
    model(images(1, 3, 32, 32))
    assert len(seen) == 2 and not torch.allclose(seen[0], seen[1])


def test_cls_and_registers_are_not_rotated_and_every_patch_is_by_its_own_place():
    model = tiny(positions="rope", registers=3)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[1]))
    model(images(1, 3, 16, 32))
    for table, expected, neutral in zip(seen, model.rope((2, 4)), (0.0, 1.0), strict=True):
        assert (table[:4] == neutral).all()
        assert torch.equal(table[4:], expected)


def test_learned_positions_are_untouched_at_their_native_size():
    model = tiny(image_size=(16, 32), registers=1, interpolation="antialias")
    x = images(1, 3, 16, 32)
    tokens = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    model(x)
    patches = model.patch_embed(x).flatten(2).mT
    expected = torch.cat([model.cls_token, patches], dim=1) + model.pos_embed
    assert torch.equal(tokens[0][:, :1], expected[:, :1])
    assert torch.equal(tokens[0][:, 1:2], model.register_tokens)
    assert torch.equal(tokens[0][:, 2:], expected[:, 1:])


@pytest.mark.parametrize("interpolation", ["offset", "size", "antialias"])
def test_learned_positions_interpolate_to_other_sizes(interpolation):
    model = tiny(interpolation=interpolation)
    with torch.no_grad():  # a plane in y and x, which any interpolation keeps in its middle
        y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        model.pos_embed[0, 1:] = (10 * y + x).view(16, 1)
        model.patch_embed.weight.zero_()
        model.patch_embed.bias.zero_()
    tokens = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    model(images(1, 3, 64, 16))  # 8 x 2 patches from 4 x 4
    plane = tokens[0][0, 1:, 0].view(8, 2)
    assert torch.equal(tokens[0][0, 0], (model.cls_token + model.pos_embed[:, :1])[0, 0])
    assert (plane[1:] > plane[:-1]).all() and (plane[:, 1] > plane[:, 0]).all()
    expected = 10 * torch.tensor([1.25, 1.75]) + 0.5  # rows 3 and 4 of 8, column 0 of 2
    assert torch.allclose(plane[3:5, 0], expected, atol=1.0)  # a row is 10


def test_interpolations_differ_as_in_the_released_models():
    model = tiny()
    x = images(1, 3, 16, 24)
    outputs = []
    for interpolation in ("offset", "size", "antialias"):
        other = VisionTransformer(**{**model.config, "interpolation": interpolation}).eval()
        other.load_state_dict(model.state_dict())
        outputs.append(joined(other(x)))
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


# ----------------------------------------------------------------- blocks


@pytest.mark.parametrize("options", [dict(), dict(positions="rope", registers=2, mask_k_bias=True)])
def test_attention_is_what_the_block_used(options):
    model = tiny(**options)
    x = images(2, 3, 32, 40)
    attn, seen = model.blocks[1].attn, {}
    attn.register_forward_hook(lambda m, inputs, output: seen.update(x=inputs[0], output=output))
    model(x)
    weights = model.attention(x, layer=1)
    tokens = 1 + options.get("registers", 0) + 20
    assert weights.shape == (2, 4, tokens, tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)
    value = attn.qkv(seen["x"])[..., 64:].unflatten(-1, (4, 8)).transpose(1, 2)
    output = attn.proj((weights @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(output, seen["output"], atol=1e-6)
    assert torch.equal(model.attention(x), weights)
    assert not torch.allclose(model.attention(x, layer=0), weights)


def test_intermediate_ends_with_the_forward_output():
    model = tiny(positions="rope", registers=2, untie_cls_norm=True)
    x = images(1, 3, 32, 32)
    last_two = model.intermediate(x, 2)
    assert torch.equal(joined(last_two[-1]), joined(model(x)))
    assert not torch.allclose(last_two[0].patches, last_two[1].patches)
    chosen = model.intermediate(x, [-1, 0])
    assert torch.equal(joined(chosen[0]), joined(last_two[1]))
    assert torch.equal(joined(chosen[1]), joined(last_two[0]))
    assert last_two[0].patches.mean(-1).shape == (1, 16)


@pytest.mark.parametrize("layers", [3, 0, [2], [-3]])
def test_blocks_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match="block"):
        tiny().intermediate(images(1, 3, 32, 32), layers)


def test_intermediate_layers_have_the_final_norm():
    model = tiny()
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.norm.bias.zero_()
    first = model.intermediate(images(1, 3, 32, 32), [0])[0]
    assert torch.allclose(first.patches.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(first.patches.var(-1, unbiased=False), torch.ones(()), atol=1e-3)


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    drop_path, x = DropPath(0.4).train(), torch.ones(10, 3)
    outputs = torch.stack([drop_path(x, lambda kept, _: 2 * kept) for _ in range(2000)])
    assert ((outputs != 1).all(dim=2).sum(dim=1) == 6).all()
    assert outputs.unique().tolist() == pytest.approx([1, 1 + 2 * 10 / 6])
    assert torch.allclose(outputs.mean(0), torch.full((10, 3), 3.0), atol=0.15)


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.4, 0.9])
def test_drop_path_drops_each_sample_at_its_rate_however_few_there_are(rate, samples):
    torch.manual_seed(0)
    drop_path, groups = DropPath(rate).train(), 500
    alone = [drop_path(torch.zeros(samples, 1), lambda x, _: x + 1)[:, 0] for _ in range(groups)]
    packed = torch.zeros(groups * samples * 2, 1)  # 500 groups of two tokens a sample
    together = drop_path(packed, lambda x, _: x + 1, [(samples, 2)] * groups)
    for added in (torch.stack(alone), together.view(groups, samples, 2)[..., 0]):
        kept = (added != 0).float()
        deviation = (rate * (1 - rate) / groups) ** 0.5
        assert kept.mean(dim=0).tolist() == pytest.approx([1 - rate] * samples, abs=5 * deviation)
        assert added[added != 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
        assert kept.sum(dim=1).unique().numel() <= 2  # the count is one of two neighbours


def test_torch_compile_takes_drop_path_in_one_graph():
    drop_path = DropPath(0.3).train()
    compiled = torch.compile(drop_path, backend="aot_eager", fullgraph=True)
    added = compiled(torch.zeros(10, 4), lambda x, _: x + 1)
    assert (added != 0).all(dim=1).sum() == 7


def test_drop_path_computes_one_sample_at_least():
    seen = []
    DropPath(0.9).train()(torch.ones(3, 2), lambda kept, _: seen.append(len(kept)) or kept)
    assert seen == [1]


def test_drop_path_is_off_in_eval():
    model, plain = tiny(drop_path=0.5), tiny()
    x = images(4, 3, 16, 16)
    assert torch.equal(joined(model(x)), joined(plain(x)))
    torch.manual_seed(0)
    model.train()
    assert not torch.allclose(joined(model(x)), joined(plain(x)))


def test_drop_path_grows_linearly_or_is_uniform():
    options = dict(embed_dim=8, depth=4, num_heads=1, drop_path=0.3)
    for shape, rates in (("linear", [0, 0.1, 0.2, 0.3]), ("uniform", [0.3] * 4)):
        model = VisionTransformer(drop_path_shape=shape, **options)
        assert [block.drop_path.rate for block in model.blocks] == pytest.approx(rates)


def test_local_cls_norm_acts_in_training_and_on_local_crops_only():
    model = tiny(registers=2, untie_local_cls_norm=True)
    x = images(1, 3, 16, 16)
    plain = model(x)
    assert torch.equal(joined(model(x, local=True)), joined(plain))
    model.train()
    assert torch.equal(joined(model(x)), joined(plain))
    local = model(x, local=True)
    assert torch.equal(local.patches, plain.patches)
    assert not torch.allclose(local.cls, plain.cls)
    assert not torch.allclose(local.registers, plain.registers)


def test_untied_cls_norm_leaves_the_patches_alone():
    tied, untied = tiny(registers=1), tiny(registers=1, untie_cls_norm=True)
    missing, _ = untied.load_state_dict(tied.state_dict(), strict=False)
    assert missing == ["cls_norm.weight", "cls_norm.bias"]
    x = images(1, 3, 16, 16)
    assert torch.equal(tied(x).patches, untied(x).patches)
    assert not torch.allclose(tied(x).cls, untied(x).cls)
    assert not torch.allclose(tied(x).registers, untied(x).registers)


def test_bfloat16_autocast_stays_close_and_differentiable():
    model = tiny(positions="rope", registers=2, drop_path=0.3)
    x = images(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = joined(model(x)).float()
    assert F.cosine_similarity(low, joined(model(x)), dim=-1).min() > 0.99
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = joined(model(x, torch.rand(4, 16) < 0.5)).float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ----------------------------------------------------------------- head


@pytest.mark.parametrize("last_layer", ["plain", "weight_norm", "unit_norm"])
@pytest.mark.parametrize("layers", [1, 3])
def test_head_compares_normalised_vectors_with_prototypes(last_layer, layers):
    head = ProjectionHead(8, 20, hidden=16, bottleneck=6, layers=layers, last_layer=last_layer)
    x = images(3, 5, 8)
    z = head.bottleneck(x)
    assert z.shape == (3, 5, 6)
    assert torch.allclose(z.norm(dim=-1), torch.ones(()), atol=1e-6)
    assert torch.allclose(head(x), z @ head.last_layer.weight.T, atol=1e-6)
    assert torch.equal(head(x), head.prototypes(z))
    assert sum(isinstance(module, torch.nn.Linear) for module in head.mlp) == layers


@pytest.mark.parametrize("last_layer", ["weight_norm", "unit_norm"])
def test_normalised_prototypes_start_at_norm_one(last_layer):
    head = ProjectionHead(8, 20, hidden=16, bottleneck=6, last_layer=last_layer)
    assert torch.allclose(head.last_layer.weight.norm(dim=1), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("bottleneck, prototypes", [(128, 64), (256, 512), (384, 1000)])
@pytest.mark.parametrize("last_layer", ["weight_norm", "unit_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_normalised_prototypes_start_and_turn_as_in_dino(last_layer, bottleneck, prototypes):
    """One step of AdamW turns each row by the same angle as in a layer built as DINO builds it."""
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(64, bottleneck), dim=1)
    labels = torch.arange(64) % prototypes
    head = ProjectionHead(8, prototypes, 16, bottleneck, last_layer=last_layer)
    theirs = torch.nn.utils.weight_norm(torch.nn.Linear(bottleneck, prototypes, bias=False))
    theirs.weight_g.data.fill_(1)
    theirs.weight_g.requires_grad = last_layer == "weight_norm"
    norms, angles = [], []
    for layer in (head.last_layer, theirs):
        norms.append(layer.weight_v.detach().norm(dim=1))
        before = layer(torch.eye(bottleneck)).detach().T
        torch.testing.assert_close(before.norm(dim=1), torch.ones(prototypes))
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
        torch.nn.functional.cross_entropy(layer(z) / 0.1, labels).backward()
        optimizer.step()
        after = layer(torch.eye(bottleneck)).detach().T
        angles.append(torch.cosine_similarity(before, after).clamp(max=1).acos())
    for ours, expected in (norms, angles):
        assert ours.mean().item() == pytest.approx(expected.mean().item(), rel=0.02)
        assert ours.std().item() == pytest.approx(expected.std().item(), rel=0.35)


@pytest.mark.parametrize("last_layer", ["weight_norm", "unit_norm"])
def test_prototypes_have_the_gradient_of_normalised_rows(last_layer, monkeypatch):
    head = ProjectionHead(8, 13, hidden=16, bottleneck=4, last_layer=last_layer).double()
    x, weights = torch.randn(5, 8).double(), torch.randn(5, 13).double()
    layer = head.last_layer
    if layer.weight_g is not None:
        layer.weight_g.data.uniform_(0.5, 2)
    for values in (1, 20, 1 << 17):  # a row at a time, five, all
        monkeypatch.setattr(models.head, "ROW_CHUNK", values)
        ours = torch.autograd.grad((weights * head(x)).sum(), list(head.parameters()))
        theirs = torch.autograd.grad(
            (weights * (head.bottleneck(x) @ layer.weight.T)).sum(), list(head.parameters())
        )
        for own, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_only_weight_norm_has_a_trainable_scale():
    scales = {}
    for last_layer in ("plain", "weight_norm", "unit_norm"):
        head = ProjectionHead(8, 20, hidden=16, bottleneck=6, last_layer=last_layer)
        scales[last_layer] = sum(p.numel() for p in head.last_layer.parameters()) - 20 * 6
        with torch.no_grad():
            for parameter in head.last_layer.parameters():
                parameter.mul_(3.0)
        norms = head.last_layer.weight.norm(dim=1)
        moved = not torch.allclose(norms, norms.new_ones(()), atol=1e-5)
        assert moved == (last_layer != "unit_norm")
    assert scales == {"plain": 0, "weight_norm": 20, "unit_norm": 0}


@pytest.mark.parametrize("last_layer", ["plain", "weight_norm", "unit_norm"])
def test_nan_filled_heads_are_all_initialised(last_layer):
    with torch.device("meta"):
        head = ProjectionHead(8, 20, hidden=16, bottleneck=6, last_layer=last_layer)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(float("nan"))
    head.init_weights()
    assert is_initialised(head)
    assert not head.mlp[0].bias.any()


def test_half_precision_heads_survive_a_zero_vector():
    head = ProjectionHead(8, 20, hidden=16, bottleneck=6).half()
    assert head(torch.zeros(2, 8, dtype=torch.float16)).isfinite().all()


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="plain, weight_norm, unit_norm"):
        ProjectionHead(8, 20, last_layer="linear")
    with pytest.raises(ValueError, match="at least 1"):
        ProjectionHead(8, 20, layers=0)


# ----------------------------------------------------------------- timm


@pytest.mark.parametrize(
    "name, size, registers, grid",
    [
        ("test_vit", (50, 97), 0, (3, 6)),  # a plain ViT with a CLS token
        ("test_vit4", (64, 32), 1, (4, 2)),  # registers, and no CLS token
        ("test_convnext", (50, 97), 0, (1, 3)),
        ("test_resnet", (64, 96), 0, (2, 3)),
    ],
)
def test_timm_models_give_features(name, size, registers, grid):
    model = build_backbone(f"timm:{name}").eval()
    assert isinstance(model, TimmBackbone)
    features = model(images(2, 3, *size))
    assert features.grid == grid
    assert features.cls.shape == (2, model.embed_dim)
    assert features.registers.shape == (2, registers, model.embed_dim)
    assert features.patches.shape == (2, grid[0] * grid[1], model.embed_dim)
    with pytest.raises(ValueError, match="no mask token"):
        model(images(2, 3, *size), torch.zeros(2, grid[0] * grid[1], dtype=torch.bool))


def test_crops_too_small_for_a_convolutional_net_are_one_sentence():
    with pytest.raises(ValueError, match="24 x 24 pixels are too small for timm:test_convnext,"):
        TimmBackbone("test_convnext").eval()(images(1, 3, 24, 24))


def test_timm_cls_is_what_timm_itself_returns():
    x = images(2, 3, 64, 64)
    for name in ("test_vit", "test_vit4", "test_convnext", "test_resnet"):
        backbone = TimmBackbone(name).eval()
        assert torch.allclose(backbone(x).cls, backbone.model(x), atol=1e-5), name


def test_timm_patches_of_a_convnext_are_normed():
    patches = TimmBackbone("test_convnext").eval()(images(1, 3, 64, 64)).patches
    assert torch.allclose(patches.mean(-1), torch.zeros(()), atol=1e-5)


def test_timm_models_take_other_channels():
    model = TimmBackbone("test_resnet", in_channels=5).eval()
    assert model(images(1, 5, 64, 64)).cls.shape == (1, model.embed_dim)
    assert len(model.native_preprocessing.mean) == 5


# ----------------------------------------------------------------- disk


@pytest.mark.parametrize(
    "backbone, size",
    [
        (tiny(image_size=(32, 16), **FULL), (32, 16)),
        (tiny(positions="rope", ffn="swiglu", rope_rescale=2.0, fit="pad", **FULL), (30, 20)),
        (TimmBackbone("test_convnext").eval(), (64, 64)),
    ],
)
def test_a_saved_backbone_is_rebuilt_bit_for_bit_from_its_folder(backbone, size, tmp_path, capsys):
    save_backbone(backbone, tmp_path / "saved", PREPROCESSING)
    loaded = load_backbone(str(tmp_path / "saved"))
    count = len(backbone.state_dict())
    assert f"matched {count} / {count} tensors" in capsys.readouterr().err
    assert loaded.state_dict().keys() == backbone.state_dict().keys()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not loaded.training and loaded.config == backbone.config
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.preprocessing == PREPROCESSING
    x = images(1, 3, *size)
    assert torch.equal(joined(loaded(x)), joined(backbone(x)))


def test_preprocessing_is_written_as_a_hugging_face_image_processor(tmp_path):
    save_backbone(tiny(), tmp_path, PREPROCESSING)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["size"] == {"shortest_edge": 40}
    assert written["crop_size"] == {"height": 32, "width": 48}
    assert written["resample"] == 2 and written["rescale_factor"] == 1 / 255
    assert written["image_mean"] == [0.1, 0.2, 0.3] and written["image_std"] == [0.4, 0.5, 0.6]
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        assert written[step] is True


def test_half_precision_files_are_read_as_float32(tmp_path):
    backbone = tiny()
    save_backbone(copy.deepcopy(backbone).bfloat16(), tmp_path, PREPROCESSING)
    loaded = load_backbone(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.cls_token, backbone.cls_token.bfloat16().float())


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda tensors: tensors.pop("blocks.1.norm2.bias"), "missing: blocks.1.norm2.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda tensors: tensors.update(cls_token=torch.zeros(1, 1, 8)),
            r"cls_token \[1, 1, 8\] instead of \[1, 1, 32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(damage, complaint, tmp_path, capsys):
    backbone = tiny()
    save_backbone(backbone, tmp_path, PREPROCESSING)
    tensors = load_file(tmp_path / "model.safetensors")
    total = len(tensors)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=complaint):
        load_backbone(str(tmp_path))
    matched = total if "unexpected" in complaint else total - 1
    assert f"matched {matched} / {total} tensors" in capsys.readouterr().err


def test_damaged_folders_are_refused_in_a_sentence(tmp_path):
    save_backbone(tiny(), tmp_path, PREPROCESSING)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()

    (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(weights)
    config["architecture"]["colour"] = "green"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="colour"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_backbone(str(tmp_path))


@pytest.fixture
def run(tmp_path):
    """A run folder whose teachers differ by the size of their preprocessing."""
    folders = {"teacher": 16, "snapshots/5": 24, "snapshots/10/teacher": 32, "best": 40}
    for folder, size in folders.items():
        preprocessing = Preprocessing((size, size), size, (0.5,) * 3, (0.5,) * 3)
        save_backbone(tiny(), tmp_path / "run@home" / folder, preprocessing)
    return tmp_path / "run@home"


@pytest.mark.parametrize("mark, size", [("", 16), ("@5", 24), ("@10", 32), ("@best", 40)])
def test_a_run_stands_for_its_teacher_a_snapshot_or_its_best(run, mark, size):
    assert load_backbone(f"{run}{mark}").preprocessing.resize == size


def test_models_that_are_not_there_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="kept are 5, 10"):
        load_backbone(f"{run}@7")
    with pytest.raises(FileNotFoundError, match="no run folder"):
        load_backbone(f"{tmp_path}/other@7")
    with pytest.raises(FileNotFoundError, match="neither config.json nor teacher/"):
        load_backbone(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="allowed are .*pixels"):
        load_backbone("no/such/model")


def test_random_backbones_depend_on_their_seed_alone():
    spec = "random:vit_nano?patch_size=8&image_size=64x32&positions=rope&layerscale=0.1&registers=2"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = load_backbone(f"{spec}&seed=1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = load_backbone(f"{spec}&seed=1"), load_backbone(f"{spec}&seed=2")
    assert torch.equal(first.cls_token, again.cls_token)
    assert not torch.equal(first.cls_token, other.cls_token)
    assert first.preprocessing.size == (64, 32) and first.preprocessing.resize == 64
    assert first(images(1, 3, 64, 32)).grid == (8, 4)
    assert len(load_backbone("random:vit_nano?in_channels=5").preprocessing.mean) == 5
    assert load_backbone("random:timm:test_resnet").preprocessing.size[0] > 0


@pytest.mark.parametrize(
    "spec, complaint",
    [
        ("random:vit_smal", "vit_small"),
        ("random:vit_nano?patchsize=8", "patchsize"),
        ("random:vit_nano?patch_size=eight", "patch_size is 'eight'"),
        ("random:vit_nano?patch_size", "option=value"),
        ("random:vit_nano?seed=me", "seed is 'me'"),
        ("random:vit_nano?registers=2&norm_eps=small", "norm_eps is 'small'"),
        ("pixels?patch=8", "patch_size, image_size, in_channels"),
        ("pixels?patch_size=half", "numbers"),
        ("timm:no_such_net", "no_such_net"),
    ],
)
def test_specs_with_mistakes_are_refused_in_a_sentence(spec, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_backbone(spec)


def test_pixels_are_patches_and_the_whole_image():
    backbone = load_backbone("pixels?patch_size=4&image_size=8")
    assert backbone.preprocessing == Preprocessing((8, 8), 8, (0.0,) * 3, (1.0,) * 3)
    x = images(2, 3, 8, 8)
    features = backbone(x)
    assert features.grid == (2, 2) and backbone.embed_dim == 48
    assert torch.equal(features.cls, x.flatten(1))
    assert torch.equal(features.patches[:, 1], x[:, :, :4, 4:].flatten(1))
    assert features.registers.shape == (2, 0, 48)
    assert backbone(images(1, 3, 12, 21)).cls.shape == (1, 192)
    with pytest.raises(ValueError, match="mask"):
        backbone(x, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="PixelBackbone"):
        save_backbone(backbone, "unused", backbone.preprocessing)


def test_a_teacher_averages_the_statistics_of_batch_norms():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    teacher = copy.deepcopy(student).eval()
    expected = teacher[1].running_mean.clone()
    for _ in range(3):
        student(torch.rand(8, 3, 4, 4) + 2)
        expected = 0.9 * expected + 0.1 * student[1].running_mean
        update_ema(teacher, student, 0.9)
    torch.testing.assert_close(teacher[1].running_mean, expected)
    assert not torch.equal(teacher[1].running_mean, student[1].running_mean)
    assert teacher[1].num_batches_tracked == 3
