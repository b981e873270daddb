"""Images as a frozen model wants them."""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from data.images import ImageData
from data.jpeg import decoded_for
from data.pixels import cut_strip, normalize, resize, to_unit

STRIP = 16  # crops; of a longer image only the part around its centre crop is resized


class EvalDataset(Dataset):
    """Images as a frozen model wants them: short side to `resize`, centre crop, normalised.

    Item i is (float32 (C, h, w), label or -1, i). Where the crop would reach beyond the resized
    image, the image is made as much larger as it takes; nothing is padded.

    Args:
        resize: short side in pixels.
        size: crop (h, w) in pixels.
        mean, std: of one or C values, for inputs in [0, 1].
        interpolation: a mode of torch.nn.functional.interpolate; antialiased where it can be.
        scaled_jpeg: JPEG files are decoded no finer than the resized image, see data/jpeg.py.
    """

    def __init__(
        self,
        data: ImageData,
        resize: int,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        scaled_jpeg: bool = False,
    ):
        self.data, self.resize, self.size = data, resize, tuple(size)
        self.scaled_jpeg = scaled_jpeg
        self.mean, self.std, self.interpolation = tuple(mean), tuple(std), interpolation
        data.fill_nodata(self.mean)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        with decoded_for(self.finer if self.scaled_jpeg else None):
            image, label = self.data[index]
        height, width = image.shape[-2:]
        h, w = self.size
        scale = self.scale(height, width)
        # The small addend: 256 / 3 * 3 may come out a hair below 256.
        height, width = int(height * scale + 1e-6), int(width * scale + 1e-6)
        top, left = round((height - h) / 2), round((width - w) / 2)
        if max(height / h, width / w) > STRIP:
            image, (height, width), (top, left) = cut_strip(
                image, (height, width), (top, left), self.size
            )
        image = resize(image, (height, width), self.interpolation)
        crop = image[:, top : top + h, left : left + w]
        return normalize(to_unit(crop.clone()), self.mean, self.std), label, index

    def scale(self, height: int, width: int) -> float:
        """Side in pixels of what an image is resized to, as a share of its own."""
        h, w = self.size
        return max(self.resize / min(height, width), h / height, w / width)

    def finer(self, height: int, width: int) -> float:
        """How many times finer an image is than what it is resized to."""
        return 1 / self.scale(height, width)
