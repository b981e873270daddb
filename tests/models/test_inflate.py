"""More channels than three: `inflate=mean|repeat|zero`."""

import pytest
import torch

from errors import UserError
from models.weights.load import load_backbone

MODEL = "random:vit_nano?patch_size=8&image_size=32"


def features(backbone, images):
    values = backbone.preprocessing
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (values.mean, values.std))
    return backbone((images - mean) / std).patches


@pytest.mark.parametrize("channels", [4, 6, 13])
@pytest.mark.parametrize("inflate", ["mean", "repeat"])
def test_grey_in_all_bands_gives_what_grey_gave(inflate, channels):
    before, after = (
        load_backbone(MODEL),
        load_backbone(f"{MODEL}&channels={channels}&inflate={inflate}"),
    )
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        old = features(before, grey.expand(-1, 3, -1, -1))
        new = features(after, grey.expand(-1, channels, -1, -1))
    assert (old - new).norm() / old.norm() < 1e-6 * 3
    # The first convolution itself, in double precision.
    weight = after.patch_embed.weight.double().sum(1)
    assert torch.allclose(weight, equal_statistics(before), atol=1e-6)


def equal_statistics(backbone):
    std = torch.tensor(backbone.preprocessing.std, dtype=torch.float64)
    return (backbone.patch_embed.weight.double() * (std.mean() / std).view(-1, 1, 1)).sum(1)


@pytest.mark.parametrize("channels", [4, 13])
def test_with_zero_further_bands_are_ignored_and_rgb_is_exact(channels):
    before, after = load_backbone(MODEL), load_backbone(f"{MODEL}&channels={channels}&inflate=zero")
    rgb = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        old = features(before, rgb)
        for further in (torch.zeros(2, channels - 3, 32, 32), torch.rand(2, channels - 3, 32, 32)):
            assert torch.equal(features(after, torch.cat([rgb, further], 1)), old)


def test_mean_keeps_the_differences_of_red_green_and_blue():
    before, after = load_backbone(MODEL), load_backbone(f"{MODEL}&channels=4&inflate=mean")
    std = torch.tensor(before.preprocessing.std)
    old = before.patch_embed.weight * (std.mean() / std).view(-1, 1, 1)
    assert torch.allclose(after.patch_embed.weight[:, :3], old * 3 / 4, atol=1e-6)
    assert torch.allclose(after.patch_embed.weight[:, 3], old.mean(1) * 3 / 4, atol=1e-6)


@pytest.mark.parametrize("query", ["channels=4&inflate=copy", "channels=2&inflate=mean"])
def test_other_words_and_fewer_channels_are_refused(query):
    with pytest.raises(UserError, match="it is mean, repeat, zero"):
        load_backbone(f"{MODEL}&{query}")
