"""Jitter of the stains of a histological slide (HED: haematoxylin, eosin, DAB).

A stained section absorbs light in proportion to its dyes, so the logarithm of the colour is a sum
over dyes (Beer-Lambert). Laboratories differ in how much dye a slide takes up. Each dye is scaled
and shifted on its own: colours change as with another laboratory, and not as with another lamp.
"""

import torch
from torch import Tensor

from data.pixels import send
from errors import UserError

# Absorption of red, green and blue by each dye (Ruifrok and Johnston 2001, table 1).
ABSORPTION = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
DARKEST = 1 / 255  # below, the logarithm says more about noise than about dye


def require_three_channels(channels: int) -> None:
    if channels != 3:
        raise UserError(
            f"stains (the policy histology) are those of three colours, not of {channels} channels"
        )


def stain_jitter(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Each dye times a factor of [1 - s, 1 + s], plus an absorbance of [-s, s].

    Source: Tellez et al. 2018, with natural logarithms.

    Args:
        x: (n, 3, h, w) colours in [0, 1].
        u: (n, 6) uniform numbers: three factors, three shifts.

    Raises:
        UserError: if the images have another number of channels than three.
    """
    require_three_channels(x.shape[1])
    rows = torch.nn.functional.normalize(torch.tensor(ABSORPTION, dtype=x.dtype), dim=1)
    absorption, inverse = send(rows, x.device), send(rows.inverse(), x.device)
    factor, shift = (2 * strength * (u.to(x) - 0.5)).unflatten(1, (2, 3, 1, 1)).unbind(1)
    dyes = torch.einsum("nchw,cd->ndhw", -x.clamp(DARKEST, 1).log(), inverse)
    dyes = dyes * (1 + factor) + shift
    return torch.einsum("ndhw,dc->nchw", dyes, absorption).neg().exp().clamp_(0, 1)
