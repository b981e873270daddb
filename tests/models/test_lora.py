"""LoRA and freezing: adapters add up, only what is named trains, the rest is shared and stays."""

import copy
import io
from collections import Counter

import pytest
import torch
from torch import nn

from models.features import Features, Preprocessing
from models.head import ProjectionHead
from models.lora import (
    Adapter,
    apply_lora,
    copy_sharing_frozen,
    freeze_for,
    merge,
    merged_copy,
    share_frozen,
)
from models.ssl_model import SSLModel, update_ema
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer, build_backbone
from models.weights.load import load_backbone
from models.weights.save import save_teacher

DINOV3 = dict(positions="rope", registers=4, mask_k_bias=True, layerscale=0.5)
VARIANTS = {  # a backbone, and what of it is adapted
    "mlp": (lambda: tiny(ffn="mlp"), ["q", "k", "v", "proj", "fc1", "fc2"]),
    "swiglu, no key bias": (
        lambda: tiny(ffn="swiglu", **DINOV3),
        ["q", "k", "v", "proj", "w1", "w2", "w3"],
    ),
    "no biases": (
        lambda: tiny(qkv_bias=False, proj_bias=False, ffn_bias=False),
        ["v", "proj", "fc1"],
    ),
    "timm ViT": (
        lambda: timm_model("vit_tiny_patch16_224", depth=2, img_size=32),
        ["q", "v", "attn.proj", "fc2"],
    ),
    "timm BEiT": (
        lambda: timm_model(
            "beit_base_patch16_224", depth=2, embed_dim=48, num_heads=2, img_size=32
        ),
        ["q", "v"],
    ),
    "timm ConvNeXt": (
        lambda: timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)),
        ["fc1", "fc2"],
    ),
}
variants = pytest.mark.parametrize("build, targets", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**options) -> VisionTransformer:
    """With weights large enough for every part to be seen in the output."""
    torch.manual_seed(0)
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    return randomized(build_backbone("vit_nano", **{**size, **options}))


def timm_model(name: str, **options) -> TimmBackbone:
    torch.manual_seed(0)
    return randomized(build_backbone(f"timm:{name}", **options))


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Adapters as after some training: B is not zero."""
    for adapter in adapters(model).values():
        adapter.b.normal_(std=0.2)
    return model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def names_of(model: nn.Module) -> set[str]:
    """What is adapted, without the numbers of blocks."""
    return {
        ".".join(part for part in name.split(".") if not part.isdigit()) for name in adapters(model)
    }


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def joined(features: Features) -> torch.Tensor:
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def matrices(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


# ----------------------------------------------------------------- the function


@variants
def test_merged_equals_unmerged(build, targets):
    model = build().eval()
    before = joined(model(images()))
    apply_lora(model, targets, rank=4, alpha=8)
    assert torch.allclose(joined(model(images())), before, atol=1e-6, rtol=1e-6)  # B is 0
    adapted = joined(trained(model)(images()))
    assert (adapted - before).norm() > 0.02 * before.norm()
    plain = merged_copy(model)
    rounding = (
        4e-6  # of float32, which depends on the processor; the products in float64 decide below
    )
    assert (joined(plain(images())) - adapted).abs().max() <= rounding * adapted.abs().max()
    assert torch.equal(joined(model(images())), adapted)  # the copy left it alone
    exact = joined(model.double()(images().double()))
    assert (
        joined(merged_copy(model)(images().double())) - exact
    ).abs().max() <= 1e-12 * exact.abs().max()


def test_an_adapter_adds_the_product_of_its_matrices_to_its_rows_alone():
    torch.manual_seed(0)
    model = trained(apply_lora(tiny(), ["q", "v"], rank=4, alpha=10))
    qkv, plain = model.blocks[1].attn.qkv, merged_copy(model).blocks[1].attn.qkv
    q, k, v = (plain.weight - qkv.weight).chunk(3)
    assert (
        torch.allclose(q, 10 / 4 * qkv.lora_q.b @ qkv.lora_q.a, atol=1e-6) and q.abs().max() > 0.01
    )
    assert (
        torch.allclose(v, 10 / 4 * qkv.lora_v.b @ qkv.lora_v.a, atol=1e-6) and v.abs().max() > 0.01
    )
    assert torch.equal(k, torch.zeros_like(k))
    assert torch.equal(plain.bias, qkv.bias)


@variants
def test_merged_weights_have_the_names_and_classes_of_a_plain_backbone(build, targets):
    plain = build()
    state, classes = plain.state_dict(), [type(module) for module in plain.modules()]
    model = trained(freeze_for(build(), "lora", targets))
    merged = merged_copy(model)
    assert list(merged.state_dict()) == list(state)
    assert [type(module) for module in merged.modules()] == classes
    changed = {
        name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, state[name])
    }
    assert changed == {name.rpartition(".lora")[0] + ".weight" for name in adapters(model)}
    assert merge(model) is model and list(model.state_dict()) == list(state)


def test_an_exported_teacher_opens_as_a_plain_backbone(tmp_path):
    model = trained(freeze_for(tiny(**DINOV3), "lora", ["qkv", "fc1"])).eval()
    save_teacher(merged_copy(model), tmp_path, Preprocessing((32, 32), 32, (0.5,) * 3, (0.5,) * 3))
    assert torch.allclose(
        joined(load_backbone(tmp_path)(images())), joined(model(images())), atol=1e-5
    )


def test_dropout_acts_on_the_adapters_only_and_only_in_training():
    model = freeze_for(tiny(), "lora", ["q", "fc1"], dropout=0.5).train()
    assert torch.equal(
        model(images()).cls, model(images()).cls
    )  # B is 0: what dropout changes does not count
    trained(model)
    assert not torch.equal(model(images()).cls, model(images()).cls)
    model.eval()
    assert torch.equal(model(images()).cls, model(images()).cls)


def test_bf16_autocast_gives_the_sum_within_its_precision_and_keeps_no_cast_of_a_frozen_weight():
    model = trained(freeze_for(tiny(**DINOV3), "lora", ["q", "v", "fc1"]))
    shapes = {tuple(layer.weight.shape) for layer in matrices(model)}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = joined(model(images()))
    exact = joined(model(images()))
    assert (out - exact).norm() < 0.03 * exact.norm()
    assert not [
        tensor.shape
        for tensor in kept
        if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
    ]

    gradients = []
    for result in (out, exact):
        result.square().mean().backward()
        gradients.append(
            torch.cat(
                [
                    parameter.grad.flatten()
                    for parameter in model.parameters()
                    if parameter.requires_grad
                ]
            )
        )
        model.zero_grad()
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def test_torch_compile_takes_the_whole_graph():
    model = trained(freeze_for(tiny(), "lora", ["q", "v", "fc2"]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(images()).cls, model(images()).cls, atol=1e-6)


# ----------------------------------------------------------------- what is adapted, what trains


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q", "v"], {"blocks.attn.qkv.lora_q", "blocks.attn.qkv.lora_v"}),
        (["attn.k"], {"blocks.attn.qkv.lora_k"}),
        (["qkv"], {f"blocks.attn.qkv.lora_{part}" for part in "qkv"}),
        (["proj", "fc*"], {"blocks.attn.proj.lora", "blocks.mlp.fc1.lora", "blocks.mlp.fc2.lora"}),
        (["mlp"], {"blocks.mlp.fc1.lora", "blocks.mlp.fc2.lora"}),
    ],
)
def test_only_the_named_layers_get_adapters(targets, expected):
    model = apply_lora(tiny(), targets, rank=2, alpha=2)
    assert names_of(model) == expected and len(adapters(model)) == 2 * len(expected)  # two blocks


def test_the_parts_of_a_gated_net_are_named_one_by_one():
    gated = tiny(ffn="swiglu")
    assert names_of(apply_lora(gated, ["w1", "w3"], rank=2, alpha=2)) == {
        "blocks.mlp.w12.lora_w1",
        "blocks.mlp.w3.lora",
    }


def test_a_path_chooses_blocks():
    model = apply_lora(tiny(depth=3), ["blocks.[12].attn.q", "blocks.0.mlp.fc1"], rank=2, alpha=2)
    assert set(adapters(model)) == {f"blocks.{block}.attn.qkv.lora_q" for block in (1, 2)} | {
        "blocks.0.mlp.fc1.lora"
    }


def test_layers_of_timm_are_named_by_their_last_parts():
    model = apply_lora(
        timm_model("vit_tiny_patch16_224", depth=2, img_size=32),
        ["v", "attn.proj"],
        rank=2,
        alpha=2,
    )
    assert names_of(model) == {"model.blocks.attn.qkv.lora_v", "model.blocks.attn.proj.lora"}


@pytest.mark.parametrize(
    "arch, targets, count",
    [
        ("vit_small", ["q", "v"], 147_456),
        ("vit_base", ["qkv", "proj"], 589_824),
        ("vit_large", ["q", "k", "v", "proj", "fc1", "fc2"], 3_538_944),
    ],
)
def test_parameter_counts_equal_the_formula(arch, targets, count):
    """rank · (in + out) of every adapted matrix, the parts of qkv one by one (FACTS)."""
    with torch.device("meta"):
        model = freeze_for(build_backbone(arch), "lora", targets, rank=8)
    assert (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        == count
    )


@variants
def test_gradient_reaches_exactly_the_adapters(build, targets):
    """Every one, or DistributedDataParallel would wait for it."""
    model = trained(freeze_for(build(), "lora", targets))
    joined(model(images())).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {f"{name}.{matrix}" for name in adapters(model) for matrix in "ab"}
    assert all(
        parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None
    )


@pytest.mark.parametrize(
    "targets, expected",
    [
        ([], Counter()),
        (["norm"], Counter({"norm": 2})),
        (["blocks.1.mlp"], Counter({"blocks": 4})),
        (
            ["bias", "cls_token"],
            Counter({"blocks": 2 * 6, "norm": 1, "patch_embed": 1, "cls_token": 1}),
        ),
        (["norm?", "pos_embed"], Counter({"blocks": 2 * 4, "pos_embed": 1})),
    ],
)
def test_partial_trains_what_is_named_and_nothing_by_default(targets, expected):
    model = freeze_for(tiny(), "partial", targets)
    assert (
        Counter(name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad)
        == expected
    )
    assert joined(model(images())).requires_grad == bool(targets)


@pytest.mark.parametrize(
    "mode, targets", [("lora", ["q", "v"]), ("partial", ["blocks.1"]), ("partial", [])]
)
def test_frozen_tensors_stay_bit_equal_and_the_others_move(mode, targets):
    student = SSLModel(
        freeze_for(tiny(), mode, targets), ProjectionHead(32, 16, hidden=16, bottleneck=8)
    )
    trains = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    for _ in range(3):
        student(images()).global_logits.log_softmax(-1)[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) != trains.get(name, False), name


def test_batch_norms_that_are_frozen_keep_their_statistics():
    model = freeze_for(timm_model("resnet10t"), "partial", ["layer4"])
    before = copy.deepcopy(model.state_dict())
    model(images(64))
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed and all(name.startswith("model.layer4") for name in changed)
    freeze_for(model, "full")(images(64))
    assert not torch.equal(
        model.state_dict()["model.bn1.running_mean"], before["model.bn1.running_mean"]
    )


def test_another_mode_merges_the_adapters_first():
    model = trained(freeze_for(tiny(), "lora", ["q"])).eval()
    before = joined(model(images()))
    freeze_for(model, "full")
    assert not adapters(model) and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.allclose(joined(model(images())), before, atol=1e-5)


# ----------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "mode, known", [("lora", "blocks, attn, qkv, q, k, v, proj, mlp, fc1, fc2"), ("partial", "fc1")]
)
def test_a_target_that_names_nothing_is_refused_with_the_names_there_are(mode, known):
    with pytest.raises(ValueError, match=f"named 'fc3'.*{known}") as error:
        freeze_for(tiny(), mode, ["fc1", "fc3"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(mode="some"), "full, lora, partial"),
        (dict(mode="full", targets=["q"]), "where everything trains"),
        (dict(mode="lora", rank=0), "whole number from 1 on"),
        (dict(mode="lora", alpha=0), "above 0"),
        (dict(mode="lora", dropout=1.0), r"\[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        freeze_for(tiny(), **arguments)


# ----------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "mode, targets", [("lora", ["q", "v"]), ("partial", ["norm"]), ("full", [])]
)
def test_a_teacher_shares_what_is_frozen_and_nothing_else(mode, targets):
    student = SSLModel(
        freeze_for(tiny(**DINOV3), mode, targets), ProjectionHead(32, 16, hidden=16, bottleneck=8)
    )
    teacher = copy_sharing_frozen(student)
    others = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        assert (others[name].data_ptr() == parameter.data_ptr()) != parameter.requires_grad, name
        assert torch.equal(others[name], parameter)
    buffers = dict(teacher.named_buffers())
    assert all(
        buffers[name].data_ptr() != buffer.data_ptr() for name, buffer in student.named_buffers()
    )


@pytest.mark.parametrize("earlier", [("partial", []), ("lora", ["q"]), ("full", [])])
@pytest.mark.parametrize("later", [("partial", []), ("lora", ["v"]), ("full", [])])
def test_when_other_parts_train_the_teacher_keeps_its_values_and_shares_anew(earlier, later):
    student = SSLModel(
        freeze_for(tiny(), *earlier), ProjectionHead(32, 16, hidden=16, bottleneck=8)
    )
    teacher = copy_sharing_frozen(student).requires_grad_(False).eval()
    with torch.no_grad():  # training
        for parameter in student.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    own = merged_copy(teacher).state_dict()
    freeze_for(student.backbone, *later)
    teacher = share_frozen(teacher, student)
    students = student.state_dict()
    for name, parameter in student.named_parameters():
        now = teacher.get_parameter(name)
        assert (
            (now is parameter)
            == (now.data_ptr() == parameter.data_ptr())
            == (not parameter.requires_grad)
        ), name
        assert not now.requires_grad
        assert torch.equal(
            now, own[name] if parameter.requires_grad and name in own else students[name]
        ), name
    assert list(teacher.state_dict()) == list(students)


def test_the_average_moves_the_teachers_adapters_alone():
    student = freeze_for(tiny(), "lora", ["q", "v"])
    teacher = copy_sharing_frozen(student).requires_grad_(False).eval()
    before = copy.deepcopy(teacher.state_dict())
    update_ema(teacher, trained(student), 0.75)
    for name, tensor in teacher.state_dict().items():
        if name.endswith(".b"):
            assert torch.allclose(tensor, 0.25 * student.state_dict()[name])
        else:
            assert torch.equal(tensor, before[name]), name


def test_merging_the_student_leaves_the_weights_that_the_teacher_shares():
    student = freeze_for(tiny(), "lora", ["q", "v"])
    teacher = copy_sharing_frozen(student).eval()
    before = joined(teacher(images()))
    merge(trained(student))
    assert torch.equal(joined(teacher(images())), before)


def test_adapters_survive_copying_and_pickling_and_state_dicts():
    model = trained(freeze_for(tiny(**DINOV3), "lora", ["v", "proj"])).eval()
    expected = joined(model(images()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    fresh = freeze_for(tiny(**DINOV3), "lora", ["v", "proj"]).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), fresh):
        assert torch.equal(joined(other(images())), expected)


def test_a_model_from_the_meta_device_starts_as_the_plain_one():
    with torch.device("meta"):
        model = freeze_for(build_backbone("vit_nano", depth=2, **DINOV3), "lora", ["qkv", "fc1"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    for adapter in adapters(model).values():
        adapter.reset_parameters()
    assert all(adapter.a.any() and not adapter.b.any() for adapter in adapters(model).values())
    model.eval()
    assert torch.allclose(joined(model(images())), joined(merged_copy(model)(images())), atol=1e-6)
