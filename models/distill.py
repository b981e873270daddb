"""Distillation: a frozen teacher, with its heads if it has any, and a student that matches it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import UserError
from files import with_option
from models.features import Features
from models.head import ProjectionHead
from models.weights.load import load_backbone, load_heads


@dataclass
class TeacherOutput:
    """The teacher's vectors of n crops, small enough to be exchanged between ranks.

    With heads, their vectors before the prototypes, of L2 norm 1; without, the backbone's.
    """

    cls: Tensor  # (n, E)
    patches: Tensor  # (n, N, E')
    grid: tuple[int, int]  # (h, w), h·w = N


class Teacher(nn.Module):
    """A frozen backbone, with the heads that stand beside its weights, or None."""

    def __init__(
        self,
        backbone: nn.Module,
        dino_head: ProjectionHead | None = None,
        ibot_head: ProjectionHead | None = None,
    ):
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head
        self.requires_grad_(False).eval()

    @property
    def patch_head(self) -> ProjectionHead:
        """The iBOT head; the DINO head where it is shared."""
        return self.dino_head if self.ibot_head is None else self.ibot_head

    @torch.no_grad()
    def forward(self, images: Tensor, heads: bool) -> TeacherOutput:
        """(n, C, H, W) normalised with the backbone's statistics -> `TeacherOutput`."""
        features: Features = self.backbone(images)
        cls, patches = features.cls, features.patches
        if heads:
            cls = self.dino_head.bottleneck(cls)
            patches = self.patch_head.bottleneck(patches)
        return TeacherOutput(cls, patches, features.grid)


def load_teacher(spec: str | Path, channels: int) -> Teacher:
    """The backbone of a MODEL with `channels` input channels, and the heads beside its weights.

    Raises:
        FileNotFoundError: if there is no such model.
        UserError: if its files are damaged, or the heads are another backbone's.
    """
    backbone = load_backbone(with_option(str(spec), f"channels={channels}"))
    tensors = load_heads(spec)
    heads = [head_from(tensors, name) for name in ("dino_head", "ibot_head")]
    for head in heads:
        width = None if head is None else head.mlp[0].in_features
        if width not in (None, backbone.embed_dim):
            raise UserError(
                f"the heads beside {spec} take vectors of {width}; its backbone has "
                f"{backbone.embed_dim}"
            )
    return Teacher(backbone, *heads)


def head_from(tensors: Mapping[str, Tensor], name: str) -> ProjectionHead | None:
    """The head of that name in a run's heads.safetensors, by its shapes; None if there is none."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    if not own:
        return None
    linears = [key for key in own if key.startswith("mlp.") and key.endswith("weight")]
    places = sorted(int(key.split(".")[1]) for key in linears)
    kinds = {"last_layer.weight": "plain", "last_layer.weight_g": "weight_norm"}
    kind = next((kinds[key] for key in kinds if key in own), "unit_norm")
    prototypes = own["last_layer.weight" if kind == "plain" else "last_layer.weight_v"]
    hidden, width = own[f"mlp.{places[0]}.weight"].shape
    head = ProjectionHead(width, len(prototypes), hidden, prototypes.shape[1], len(places), kind)
    head.load_state_dict(own)
    return head


@dataclass
class MatchingOutput:
    """As `SSLOutput`, with the projected vectors in place of logits."""

    cls: Tensor  # (G·B, D) before the projection
    patches: Tensor  # (G·B, N, D)
    grid: tuple[int, int]
    matched_cls: Tensor  # (G·B, D') in the teacher's space
    matched_patches: Tensor  # (G·B, N, D')


class MatchingStudent(nn.Module):
    """A backbone and two linear maps into the teacher's space, which only training needs."""

    def __init__(self, backbone: nn.Module, teacher_dim: int):
        super().__init__()
        self.backbone = backbone
        self.cls_projection = nn.Linear(backbone.embed_dim, teacher_dim)
        self.patch_projection = nn.Linear(backbone.embed_dim, teacher_dim)

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        masks: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> MatchingOutput:
        """(G·B, C, H, W) normalised -> `MatchingOutput`.

        The other arguments are those of `SSLModel` and have no effect.
        """
        features = self.backbone(global_crops)
        cls, patches = features.cls, features.patches
        matched_cls, matched_patches = self.cls_projection(cls), self.patch_projection(patches)
        return MatchingOutput(cls, patches, features.grid, matched_cls, matched_patches)
