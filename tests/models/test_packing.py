"""Crops of two sizes in one pass are the crops of two passes."""

import pytest
import torch

from models.head import ProjectionHead
from models.ssl_model import SSLModel
from models.vit import VisionTransformer

SMALL = dict(embed_dim=32, depth=3, num_heads=2, patch_size=4, image_size=16, layerscale=0.5)
KINDS = {
    "learned positions": dict(qkv_bias=True),
    "rotary, registers, gated, norms of their own": dict(
        positions="rope",
        registers=2,
        ffn="swiglu",
        mask_k_bias=True,
        untie_cls_norm=True,
        untie_local_cls_norm=True,
    ),
}


def crops() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 16, generator=generator) < 0.4
    return (
        torch.randn(6, 3, 16, 16, generator=generator),
        torch.randn(9, 3, 8, 12, generator=generator),
        masks,
    )


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_features_and_gradients_of_one_pass_are_those_of_two(options):
    images, local, masks = crops()
    torch.manual_seed(1)
    model = VisionTransformer(**SMALL, **options).train()
    gradients = []
    for packed in (True, False):
        model.zero_grad()
        seen = (
            model(images, masks, local_crops=local)
            if packed
            else [model(images, masks), model(local, local=True)]
        )
        sum((part.cls.square().sum() + part.patches.pow(3).sum()) for part in seen).backward()
        gradients.append(
            (
                [(part.cls, part.patches, part.registers) for part in seen],
                [p.grad for p in model.parameters()],
            )
        )
    (ours, ours_grad), (theirs, theirs_grad) = gradients
    for mine, other in zip(sum(ours, ()), sum(theirs, ()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_drop_path_takes_whole_samples_of_each_size_and_keeps_the_expectation():
    images, local, _ = crops()
    torch.manual_seed(2)
    model = VisionTransformer(**{**SMALL, "depth": 1, "layerscale": None}, drop_path=0.5).train()
    block, seen = model.blocks[0], []
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    x = torch.cat([torch.randn(6 * 17, 32), torch.randn(9 * 7, 32)])
    shapes, sums = [(6, 17), (9, 7)], 0
    model.eval()
    whole = block(x, [None, None], shapes) - x
    model.train()
    block.mlp.fc2.weight.data.zero_(), block.mlp.fc2.bias.data.zero_()  # one branch alone
    whole = block.attn(block.norm1(x), [None, None], shapes)
    for _ in range(400):
        out = block(x, [None, None], shapes) - x
        for part, (samples, tokens) in zip(out.split([6 * 17, 9 * 7]), shapes, strict=True):
            kept = part.unflatten(0, (samples, tokens)).abs().amax(-1) > 0
            assert (kept == kept[:, :1]).all()  # all tokens of a sample, or none
            assert kept[:, 0].sum() in (samples // 2, (samples + 1) // 2)
        sums = sums + out.detach()
    assert seen[-1] == [(3, 17), (5, 7)]
    for mean, branch in zip(
        (sums / 400).split([6 * 17, 9 * 7]), whole.split([6 * 17, 9 * 7]), strict=True
    ):
        assert (mean - branch).norm() < 0.1 * branch.norm()


def test_the_student_sees_all_crops_in_one_pass():
    images, local, masks = crops()
    backbone = VisionTransformer(**SMALL)
    model, passes = SSLModel(backbone, ProjectionHead(32, 8, hidden=16, bottleneck=8)), []
    backbone.blocks[0].register_forward_pre_hook(
        lambda module, inputs: passes.append(tuple(inputs[0].shape))
    )
    out = model(images, local, masks)
    assert passes == [(6 * 17 + 9 * 7, 32)] and out.local_logits.shape == (9, 8)
    apart = model(images, None, masks).global_logits
    torch.testing.assert_close(out.global_logits, apart, rtol=1e-5, atol=1e-6)
