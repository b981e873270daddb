"""Damaged images for robustness and copy detection: noise, blur, contrast and JPEG.

Strengths are those of ImageNet-C (Hendrycks & Dietterich, arXiv 1903.12261, the authors' code:
gaussian_noise, gaussian_blur, contrast, jpeg_compression), made for 224 pixels; a blur scales with
the image. Unlike there, the prepared input of the model is damaged, whatever its size, and only
JPEG rounds to 8 bits.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import gaussian_blur

from data.augment import CropSpec, crop_boxes, draw, resized_crop
from data.evaluation import EvalDataset
from data.pixels import normalize
from errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTION, COPY = range(2)  # purposes of random numbers
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation
BLUR = (1, 2, 3, 4, 6)  # sigma in pixels of 224
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor
QUALITY = (25, 18, 15, 10, 7)  # of JPEG


def noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return image + sigma * torch.randn(image.shape, generator=generator)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian, sigma in pixels of an image of 224, reflected borders."""
    sigma = sigma * min(image.shape[-2:]) / 224
    radius = [min(math.ceil(4 * sigma), side - 1) for side in image.shape[:0:-1]]  # width, height
    return gaussian_blur(image, [2 * r + 1 for r in radius], [sigma, sigma])


def contrast(image: Tensor, factor: float) -> Tensor:
    """Each channel is drawn towards its own mean."""
    mean = image.mean((-2, -1), keepdim=True)
    return mean + factor * (image - mean)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Compressed and read again; other numbers of channels than 1 and 3 one channel at a time."""
    if len(image) not in (1, 3):
        return torch.cat([jpeg(channel[None], quality) for channel in image])
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    picture = Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels)
    picture.save(file, "JPEG", quality=quality)
    read = torch.from_numpy(np.array(Image.open(file)))
    return read.reshape(pixels.shape).permute(2, 0, 1) / 255


def corrupt(image: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """(C, H, W) in [0, 1] from such an image; severity 1 to 5, 5 the strongest.

    Raises:
        UserError: for an unknown corruption or severity.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise UserError(
            f"corruption {name!r} of severity {severity!r}; "
            f"there are {', '.join(CORRUPTIONS)}, severity 1 to 5"
        )
    function, strengths = CORRUPTIONS[name]
    further = (generator,) if function is noise else ()
    return function(image, strengths[severity - 1], *further).clamp(0, 1)


CORRUPTIONS = {
    "noise": (noise, NOISE),
    "blur": (blur, BLUR),
    "contrast": (contrast, CONTRAST),
    "jpeg": (jpeg, QUALITY),
}


class Corrupted(Dataset):
    """The items of an EvalDataset, corrupted; the same on every call."""

    def __init__(self, items: EvalDataset, name: str, severity: int):
        self.items, self.name, self.severity = items, name, severity

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label, _ = self.items[index]
        generator = _generator(CORRUPTION, self.severity, index)
        unit = _denormalize(image, self.items)
        damaged = corrupt(unit, self.name, self.severity, generator)
        return normalize(damaged, self.items.mean, self.items.std), label, index


class Copies(Dataset):
    """A strongly edited copy of each item, the same on every call.

    It is cropped to 30 to 70 %, mirrored half of the time, changed in contrast and light, blurred
    and compressed. Ours, in the spirit of the "strong" part of Copydays.
    """

    def __init__(self, items: EvalDataset):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label, _ = self.items[index]
        generator = _generator(COPY, index)
        height, width = image.shape[-2:]
        spec = CropSpec((height, width), (0.3, 0.7), 1)
        box = crop_boxes(draw(generator, 1), height, width, spec)[0].tolist()
        flip, gain, scale, sigma, quality = torch.rand(5, generator=generator).tolist()
        copy = resized_crop(_denormalize(image, self.items), box, spec.size, flip < 0.5)
        copy = contrast(copy, 0.5 + scale) * (0.7 + 0.6 * gain)
        copy = jpeg(blur(copy, 0.5 + 2 * sigma).clamp(0, 1), 10 + int(40 * quality))
        return normalize(copy, self.items.mean, self.items.std), label, index


def _denormalize(image: Tensor, items: EvalDataset) -> Tensor:
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (items.mean, items.std))
    return (image * std + mean).clamp(0, 1)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
