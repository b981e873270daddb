"""Maps: colours free of chance, attention as the model computes it, tokens through windows."""

import numpy as np
import pytest
import torch

from evals.maps import (
    attention_image,
    cosine_maps,
    foreground,
    heat_picture,
    hide_patches,
    load_basis,
    pca_basis,
    pca_image,
    prefix_attention,
    save_basis,
    to_picture,
)  # fmt: skip
from evals.patches import patch_tokens, window_starts
from models import load_backbone

CPU = torch.device("cpu")


# PCA.


def test_principal_components_are_the_directions_of_largest_variance_in_order():
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    points = (
        torch.randn(4000, 8) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1, 0.1, 0.1]) @ rotation + 7
    )
    basis = pca_basis(points)
    assert torch.allclose((basis.axes.float() @ rotation.T).abs(), torch.eye(3, 8), atol=0.1)
    assert torch.allclose(basis.axes @ basis.axes.T, torch.eye(3).double(), atol=1e-9)


def test_the_basis_is_the_same_for_tokens_in_another_order_and_of_the_other_sign():
    points = torch.randn(100, 12) * torch.arange(1, 13)
    basis = pca_basis(points)
    for other in (points[torch.randperm(100)], -points):
        assert torch.allclose(pca_basis(other).axes, basis.axes, atol=1e-8)
    assert (basis.axes.gather(1, basis.axes.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("count", [5, 9, 30])
def test_the_basis_is_that_of_a_plain_decomposition_with_few_tokens_or_many(count):
    points = torch.randn(count, 12, dtype=torch.float64) * torch.arange(1, 13)
    basis = pca_basis(points)
    axes = np.linalg.svd((points - points.mean(0)).numpy())[2][:3]
    axes = torch.from_numpy(
        axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    )
    assert torch.allclose(basis.axes, axes, atol=1e-8)
    assert torch.allclose(pca_basis(points.repeat(4, 1)).axes, axes, atol=1e-8)


def test_a_saved_basis_gives_the_same_colours(tmp_path):
    patches = torch.randn(20, 6)
    basis = pca_basis(patches)
    save_basis(tmp_path / "basis", basis)
    other = torch.randn(12, 6)
    assert np.array_equal(
        pca_image(other, (3, 4), load_basis(tmp_path / "basis")), pca_image(other, (3, 4), basis)
    )


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_basis_is_refused(tmp_path, content):
    (tmp_path / "basis").write_bytes(content)
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    for name in ("basis", "other.npz"):
        with pytest.raises(ValueError, match=f"{name} is no basis"):
            load_basis(tmp_path / name)


@pytest.mark.parametrize(
    "patches, flat",
    [
        (torch.ones(6, 5) * 1e3, 3),
        (torch.randn(1, 5), 3),
        (torch.randn(2, 5), 2),
        (torch.randn(6, 2), 1),
    ],
    ids=["constant", "one patch", "two patches", "two dimensions"],
)
def test_components_that_do_not_exist_are_grey(patches, flat):
    picture = pca_image(patches, (len(patches), 1), pca_basis(patches))
    assert picture.shape == (len(patches), 1, 3)
    assert (picture[..., 3 - flat :] == 127).all()
    assert flat == 3 or len(np.unique(picture[..., 0])) > 1


def test_a_pca_picture_lies_row_by_row_on_a_grid_that_is_not_square():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(7.0), indexing="ij")
    patches = torch.stack([30 * rows, columns, torch.zeros(4, 7)], dim=-1).flatten(0, 1)
    picture = pca_image(patches, (4, 7), pca_basis(patches)).astype(int)
    assert picture.shape == (4, 7, 3)
    assert (np.diff(picture[..., 0], axis=0) > 0).all()
    assert (np.diff(picture[..., 0], axis=1) == 0).all()
    assert (np.diff(picture[..., 1], axis=1) > 0).all()
    assert (np.diff(picture[..., 1], axis=0) == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_away_from_the_border(sign):
    inside = torch.zeros(6, 9, dtype=torch.bool)
    inside[2:4, 3:6] = True
    patches = torch.randn(54, 10) * 0.1
    patches[inside.flatten()] += sign * torch.arange(10)
    keep = foreground(patches, (6, 9))
    assert torch.equal(keep, inside.flatten())
    picture = pca_image(patches, (6, 9), pca_basis(patches[keep]), keep)
    assert (picture[~inside.numpy()] == 0).all() and (picture[inside.numpy()] > 0).any()


def test_patches_that_are_all_alike_are_all_foreground():
    assert foreground(torch.ones(12, 5), (3, 4)).all()


# Attention.


def eager_attention(qkv, heads):
    """softmax(q kᵀ / √d) (B, heads, T, T) of the fused projection's output (B, T, 3·D)."""
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).double()
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
@pytest.mark.parametrize(
    "channels, registers, size", [(3, 0, (32, 32)), (1, 2, (24, 40)), (6, 4, (16, 56))]
)
def test_attention_equals_eager_softmax_and_its_rows_sum_to_one(layer, channels, registers, size):
    options = "embed_dim=32&depth=3&num_heads=2&patch_size=8"
    options += f"&registers={registers}&in_channels={channels}"
    backbone = load_backbone(f"random:vit_nano?{options}")
    torch.nn.init.normal_(backbone.blocks[layer].attn.qkv.weight, std=0.5)  # far from uniform
    projected = []
    hook = backbone.blocks[layer].attn.qkv.register_forward_hook(
        lambda *call: projected.append(call[-1].detach())
    )
    rows, features = prefix_attention(backbone, torch.randn(2, channels, *size), layer)
    hook.remove()
    eager = eager_attention(projected[0], heads=2)
    assert rows.shape == (2, 2, 1 + registers, 1 + registers + features.patches.shape[1])
    assert torch.allclose(rows.double(), eager[:, :, : 1 + registers], atol=1e-6)
    assert torch.allclose(rows.sum(dim=-1), torch.ones(2, 2, 1 + registers), atol=1e-6)


def test_attention_sees_rotary_positions():
    backbone = load_backbone(
        "random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8&positions=rope&registers=2"
    )
    torch.nn.init.normal_(backbone.blocks[1].attn.qkv.weight, std=0.5)
    images = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        whole = backbone.attention(images, 1)
    assert torch.allclose(prefix_attention(backbone, images, 1)[0], whole[:, :, :3], atol=1e-6)


def test_attention_of_a_timm_model_equals_the_eager_one():
    backbone = load_backbone(
        "timm:vit_tiny_patch16_224?pretrained=false&embed_dim=32&depth=2&num_heads=2"
    )
    projected = []
    backbone.model.blocks[-1].attn.qkv.register_forward_hook(
        lambda *call: projected.append(call[-1].detach())
    )
    rows, features = prefix_attention(backbone, torch.randn(1, 3, 32, 64))
    assert features.grid == (2, 4) and rows.shape == (1, 2, 1, 9)
    assert torch.allclose(
        rows.double(), eager_attention(projected[0], heads=2)[:, :, :1], atol=1e-6
    )


def test_models_and_blocks_without_attention_are_refused():
    with pytest.raises(ValueError, match="no attention"):
        prefix_attention(load_backbone("pixels"), torch.zeros(1, 3, 64, 64))
    backbone = load_backbone("random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8")
    for layer in (2, -3):
        with pytest.raises(ValueError, match=f"--layer is {layer}.* 2 blocks, 0 to 1"):
            prefix_attention(backbone, torch.zeros(1, 3, 64, 64), layer)


def test_attention_maps_leave_cls_and_registers_out():
    attention = torch.zeros(2, 9, 9)
    attention[1, 0, 3:] = torch.arange(6.0)
    attention[:, 0, :3] = 100
    attention[:, 1:] = 200
    attention[:, 2, 3:] = 300
    maps = attention_image(attention, (2, 3), prefix=3)
    assert torch.equal(maps, torch.stack([torch.zeros(2, 3), torch.arange(6.0).view(2, 3)]))
    assert torch.equal(
        attention_image(attention, (2, 3), prefix=3, row=2), torch.full((2, 2, 3), 300.0)
    )


# Tokens.


@pytest.mark.parametrize("window", [None, 8, 16, 24, 31, 64, 400])
@pytest.mark.parametrize("size", [(64, 64), (40, 104), (8, 8)])
def test_tokens_of_a_local_model_are_the_same_through_any_window(window, size):
    backbone, image = load_backbone("pixels?patch_size=8"), torch.rand(3, *size)
    patches, grid = patch_tokens(backbone, image, CPU, window)
    assert grid == (size[0] // 8, size[1] // 8)
    assert torch.allclose(patches, backbone(image[None]).patches[0], atol=1e-6)


def test_a_window_keeps_tokens_from_seeing_beyond_it():
    backbone = load_backbone("random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8")
    image = torch.randn(3, 32, 96)
    changed = image.clone()
    changed[:, :, 64:] += 1
    for window, same in ((None, False), (32, True)):
        left = [
            patch_tokens(backbone, pixels, CPU, window)[0].view(4, 12, -1)[:, :4]
            for pixels in (image, changed)
        ]
        assert torch.allclose(*left, atol=1e-6) == same
    with pytest.raises(ValueError, match="--window is 7.* 8 pixels"):
        patch_tokens(backbone, image, CPU, 7)


@pytest.mark.parametrize(
    "length, side", [(1, 1), (5, 9), (9, 9), (10, 9), (64, 9), (65, 1), (100, 33)]
)
def test_windows_cover_everything_and_overlap_by_a_quarter(length, side):
    starts = window_starts(length, side)
    assert starts[0] == 0 and (starts[-1] + side == length or length <= side)
    assert all(
        0 < b - a <= max(1, side - side // 4) for a, b in zip(starts, starts[1:], strict=False)
    )


def test_similarity_is_the_cosine_of_each_pair():
    queries, patches = torch.randn(2, 5), torch.randn(7, 5)
    maps = cosine_maps(queries, patches)
    naive = [[float(a @ b / (a.norm() * b.norm())) for b in patches] for a in queries]
    assert torch.allclose(maps, torch.tensor(naive), atol=1e-6)
    assert torch.allclose(cosine_maps(patches, patches).diag(), torch.ones(7), atol=1e-6)


# Values as pictures.


def test_heat_spans_the_least_to_the_99th_percentile():
    values = torch.arange(400.0).view(20, 20)
    values[0, 0] = 1e6
    brightness = heat_picture(values).astype(int).sum(axis=-1).ravel()[1:]
    assert (np.diff(brightness[:-3]) >= 0).all() and brightness[-5] - brightness[0] > 500
    assert len(np.unique(heat_picture(torch.full((3, 4), 7.0)).reshape(-1, 3), axis=0)) == 1
    spike = torch.zeros(20, 20)
    spike[3, 4] = 1
    assert heat_picture(spike)[3, 4].sum() > heat_picture(spike)[0, 0].sum() + 300


def test_hidden_patches_are_covered_and_the_others_untouched():
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mask = torch.tensor([[True, False, False], [False, False, True]])
    hidden = hide_patches(picture, mask)
    covered = mask.numpy().repeat(4, axis=0).repeat(4, axis=1)
    assert hidden.dtype == np.uint8 and np.array_equal(hidden[~covered], picture[~covered])
    assert (
        hidden[covered].astype(int).std(axis=0).max()
        < 15
        < picture[covered].astype(int).std(axis=0).min()
    )


# Images.


@pytest.mark.parametrize("channels, shown", [(1, [0, 0, 0]), (3, [0, 1, 2]), (13, [0, 1, 2])])
def test_pictures_show_the_pixels_before_normalisation(channels, shown):
    pixels = torch.randint(0, 256, (channels, 5, 4), dtype=torch.uint8)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.1
    normalised = (pixels / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    picture = to_picture(normalised, mean.tolist(), std.tolist())
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, pixels[shown].permute(1, 2, 0).numpy())


def test_pictures_survive_values_out_of_range():
    image = torch.tensor([float("nan"), float("inf"), -9.0, 9.0]).view(1, 2, 2)
    assert to_picture(image, [0.5], [0.5])[..., 0].tolist() == [[0, 255], [0, 255]]
