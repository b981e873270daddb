"""Backbone and heads behind one forward, as DDP and FSDP need it, and the teacher's update."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.head import ProjectionHead
from models.lora import copy_sharing_frozen
from models.vit import VisionTransformer


@dataclass
class SSLOutput:
    """What the losses read. Rows of crops are crop-major: view 0 of all images, then view 1.

    `patch_logits` follow `masked`.
    """

    cls: Tensor  # (G·B, D) after the final norm, global crops
    patches: Tensor  # (G·B, N, D)
    grid: tuple[int, int]  # (h, w) of the patches, h·w = N
    global_logits: Tensor  # (G·B, K)
    local_logits: Tensor | None = None  # (L·B, K), None without local crops
    patch_logits: Tensor | None = None  # (M, K'), None without `masked`


class SSLModel(nn.Module):
    """A backbone, the DINO head and an iBOT head; the student and the teacher are one each.

    Without `ibot_head`, masked patches go through the DINO head (as in iBOT and DINOv2's short
    recipe).
    """

    def __init__(
        self,
        backbone: nn.Module,
        dino_head: ProjectionHead,
        ibot_head: ProjectionHead | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        masks: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> SSLOutput:
        """
        Args:
            global_crops: (G·B, C, H, W) normalised.
            local_crops: (L·B, C, h, w) or None (the teacher sees none).
            masks: (G·B, N) bool, the patches in whose place the backbone sees the mask token, or
                None. The student is given them, the teacher not.
            masked: (M,) places of the patches whose logits are wanted, among the G·B·N, or None.
        """
        local_features = None
        if local_crops is None:
            features = self.backbone(global_crops, masks)
        elif isinstance(self.backbone, VisionTransformer):
            features, local_features = self.backbone(global_crops, masks, local_crops=local_crops)
        else:
            features = self.backbone(global_crops, masks)
            local_features = self.backbone(local_crops, local=True)
        inputs = features.cls
        rows = [len(inputs)]
        if local_features is not None:
            inputs = torch.cat([inputs, local_features.cls])
            rows.append(len(local_features.cls))

        patch_logits = None
        if masked is not None:
            patches = features.patches.flatten(0, 1)[masked]  # (M, D)
            if self.ibot_head is None:
                inputs = torch.cat([inputs, patches])
                rows.append(len(patches))
            else:
                patch_logits = self.ibot_head(patches)
        logits = list(self.dino_head(inputs).split(rows))
        if masked is not None and self.ibot_head is None:
            patch_logits = logits.pop()
        return SSLOutput(
            features.cls,
            features.patches,
            features.grid,
            global_logits=logits[0],
            local_logits=None if local_crops is None else logits[1],
            patch_logits=patch_logits,
        )


@torch.no_grad()
def update_ema(
    teacher: nn.Module,
    student: nn.Module,
    momentum: float,
    local: Callable[[Iterable[Tensor]], list[Tensor]] = list,
) -> None:
    """teacher <- momentum · teacher + (1 - momentum) · student, over what trains, paired by order.

    `local` gives this rank's shards of sharded parameters. The running statistics of batch norms
    (buffers of convolutional backbones) are averaged as the weights are; counts are copied.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    averages = [own for own, new in pairs if new.requires_grad]
    weights = [new for _, new in pairs if new.requires_grad]
    torch._foreach_lerp_(local(averages), local(weights), 1.0 - momentum)
    for own, new in zip(teacher.buffers(), student.buffers(), strict=True):
        if own.is_floating_point():
            own.lerp_(new, 1.0 - momentum)
        else:
            own.copy_(new)


class HeadSizes(Protocol):
    """Sizes of a projection head, see `ProjectionHead`."""

    prototypes: int
    hidden: int
    bottleneck: int
    layers: int


def build_ssl_model(
    backbone: nn.Module, dino: HeadSizes, ibot: HeadSizes | None, last_layer: str
) -> SSLModel:
    """Backbone and heads of these sizes, which both end in `last_layer`."""
    heads = []
    for sizes in (dino, ibot):
        if sizes is not None:
            mlp = (sizes.hidden, sizes.bottleneck, sizes.layers)
            heads.append(ProjectionHead(backbone.embed_dim, sizes.prototypes, *mlp, last_layer))
    return SSLModel(backbone, *heads)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_teacher(student: SSLModel) -> SSLModel:
    """A copy of the student in eval mode that takes no gradient; only frozen weights are shared."""
    return copy_sharing_frozen(student).requires_grad_(False).eval()


def host_copy(module: nn.Module) -> nn.Module:
    """A copy of the module in the host's memory; the device holds nothing twice."""
    return _copy_with(module, lambda weight: weight.detach().to("cpu", copy=True))


def without_weights(module: nn.Module) -> nn.Module:
    """A copy of the module with parameters that hold no numbers (on the device "meta")."""
    return _copy_with(module, lambda weight: weight.detach().to("meta"))


def _copy_with(module: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """A frozen copy with such parameters; its buffers are in the host's memory."""
    memo = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in module.buffers()}
    memo |= {id(p): nn.Parameter(copied(p), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


def save_heads(model: SSLModel, folder: Path) -> None:
    """heads.safetensors: everything but the backbone, by its name in the model."""
    state = model.state_dict()
    names = [name for name in state if not name.startswith("backbone.")]
    heads = {name: state[name].detach().cpu().contiguous() for name in names}
    save_file(heads, folder / "heads.safetensors")
