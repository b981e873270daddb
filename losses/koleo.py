"""The KoLeo term: features of different images spread out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8
DUPLICATE = 1e-6  # closer than this, two unit vectors differ by float32 rounding only


def koleo_loss(
    features: Tensor,
    group: int | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """Kozachenko-Leonenko entropy estimator: minus the log distance to the nearest neighbour.

    From Sablayrolles et al., arXiv 1806.03198, as used in DINOv2. With x the features scaled to
    length 1 and j(i) the row most similar to row i in its group, the mean over i of
    `-log(|x_i - x_j(i) + 1e-8| + 1e-8)`. Call it once per view, or with groups that do not mix
    views: two views of an image must not be pushed apart.

    An exact duplicate keeps its value (about 15 at D = 384) but gives no gradient: the slope of
    the log there is about 1e8 and the difference it would follow is rounding, or nothing.

    Args:
        features: (B, D) before the head, any float type; computed in float32.
        group: neighbours are looked for among so many consecutive rows; None = among all. A fixed
            group gives the same loss whether the batch comes whole, in micro-batches or on
            several ranks, as long as each part is a multiple of it.
        gather: joins the rows of all ranks, differentiably, where a group is larger than B; every
            rank then computes the loss of all rows.

    Returns:
        Scalar, mean over rows. 0 with a graph when groups have fewer than 2 rows.

    Raises:
        ValueError: if B is not a multiple of group, or group is below 1.
    """
    if group is not None and group > len(features) > 0:
        features = gather(features)
    rows = len(features)
    size = rows if group is None else group
    if group is not None and (group < 1 or rows % group != 0):
        raise ValueError(f"the KoLeo group must divide the {rows} rows of the batch, got {group}")
    if rows == 0 or size < 2:
        return features.float().sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        points = F.normalize(features.float(), dim=-1, eps=EPS).unflatten(0, (-1, size))
        neighbours = points.take_along_dim(nearest_neighbours(points)[..., None], dim=1)
        distances = F.pairwise_distance(points, neighbours, eps=EPS)  # (groups, size)
        distances = torch.where(distances < DUPLICATE, distances.detach(), distances)
        return -torch.log(distances + EPS).mean()


@torch.no_grad()
def nearest_neighbours(points: Tensor) -> Tensor:
    """Index of the most similar other row: unit vectors (groups, size, D) -> (groups, size)."""
    similarity = points @ points.mT
    # The authors put -1 here, which an opposite vector reaches too; -inf never picks oneself.
    similarity.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
    return similarity.argmax(dim=-1)
