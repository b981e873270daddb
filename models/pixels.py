"""Raw pixels as features: the baseline that every table needs."""

import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.checks import check_images
from models.features import Features, Preprocessing


class PixelBackbone(nn.Module):
    """Nothing learned: `patches` are each patch's pixels, `cls` the pixels of the whole image.

    So k-NN on `cls` is k-NN on raw pixels. Unlike elsewhere the two differ in length: `cls` has
    C · image_size² numbers, each of `patches` has `embed_dim` = C · patch_size².
    """

    def __init__(self, patch_size: int = 8, image_size: int = 64, in_channels: int = 3):
        super().__init__()
        self.embed_dim = in_channels * patch_size**2
        self.patch_size = patch_size
        self.in_channels = in_channels
        zeros, ones = (0.0,) * in_channels, (1.0,) * in_channels
        self.preprocessing = Preprocessing((image_size, image_size), image_size, zeros, ones)

    def forward(self, images: Tensor, masks: Tensor | None = None, local: bool = False) -> Features:
        """(B, C, H, W) floats; what the patch size leaves over is cropped, right and bottom."""
        if masks is not None:
            raise UserError("masks are given, but raw pixels have no mask token")
        check_images(images, self.in_channels, self.patch_size)
        p, size = self.patch_size, self.preprocessing.size
        h, w = images.shape[-2] // p, images.shape[-1] // p
        tiles = images[..., : h * p, : w * p].unflatten(3, (w, p)).unflatten(2, (h, p))
        patches = tiles.permute(0, 2, 4, 1, 3, 5).reshape(len(images), h * w, -1)  # (B, N, C·p·p)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        cls = images.flatten(1)
        return Features(cls, cls.new_zeros(len(cls), 0, self.embed_dim), patches, (h, w))
