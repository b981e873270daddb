"""Backbone and projection heads behind ONE forward (DDP and FSDP need one), and the teacher's update."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.head import ProjectionHead
from models.lora import copy_sharing_frozen
from models.vit import VisionTransformer


@dataclass
class SSLOutput:
    """What the losses read. Rows of crops are crop-major: view 0 of all images, then view 1.

    `patch_logits` follow `masks.flatten().nonzero()`; None where there is no iBOT term or no local crop.
    """

    cls: Tensor  # (G·B, D) after the final norm, global crops
    patches: Tensor  # (G·B, N, D)
    grid: tuple[int, int]  # (h, w) of the patches, h·w = N
    global_logits: Tensor  # (G·B, K)
    local_logits: Tensor | None = None  # (L·B, K)
    patch_logits: Tensor | None = None  # (M, K')


class SSLModel(nn.Module):
    """The student, and by another instance the teacher: a backbone, the DINO head, and an iBOT head of its own or none.

    Without `ibot_head`, masked patches go through the DINO head (shared, as in iBOT and DINOv2's short recipe).
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

    def uses_all(self, terms: Iterable[str]) -> bool:
        """Whether every parameter takes part in a loss of these terms, which DDP has to know."""
        return "dino" in terms and ("ibot" in terms or self.ibot_head is None)

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        masks: Tensor | None = None,
        hide: bool = True,
    ) -> SSLOutput:
        """
        Args:
            global_crops: (G·B, C, H, W) normalised.
            local_crops: (L·B, C, h, w) or None (the teacher sees none).
            masks: (G·B, N) bool, the patches whose logits are wanted, or None.
            hide: whether the backbone sees the mask token in their place (student) or the patches (teacher).
        """
        hidden = masks if hide else None
        if local_crops is None:
            seen, *others = [self.backbone(global_crops, hidden)]
        elif isinstance(self.backbone, VisionTransformer):
            seen, *others = self.backbone(global_crops, hidden, local_crops=local_crops)
        else:
            seen, *others = (
                self.backbone(global_crops, hidden),
                self.backbone(local_crops, local=True),
            )
        cls = [seen.cls, *(other.cls for other in others)]
        rows = [len(part) for part in cls]
        inputs = torch.cat(cls) if len(cls) > 1 else cls[0]

        patch_logits = None
        if masks is not None:
            masked = seen.patches[masks]
            if self.ibot_head is None:
                inputs, rows = torch.cat([inputs, masked]), [*rows, len(masked)]
            else:
                patch_logits = self.ibot_head(masked)
        logits = list(self.dino_head(inputs).split(rows))
        if masks is not None and self.ibot_head is None:
            patch_logits = logits.pop()
        local_logits = logits[1] if local_crops is not None else None
        return SSLOutput(seen.cls, seen.patches, seen.grid, logits[0], local_logits, patch_logits)


@torch.no_grad()
def update_ema(
    teacher: nn.Module,
    student: nn.Module,
    momentum: float,
    local: Callable[[Iterable[Tensor]], list[Tensor]] = list,
) -> None:
    """teacher <- momentum · teacher + (1 - momentum) · student, over what trains, paired by order.

    `local` gives this rank's shards of sharded parameters. Buffers (the running statistics of batch norms in convolutional backbones) are taken from the student as they are.
    """
    pairs = [
        (own, new)
        for own, new in zip(teacher.parameters(), student.parameters())
        if new.requires_grad
    ]
    torch._foreach_lerp_(*(local(part) for part in zip(*pairs)), 1.0 - momentum)
    for own, new in zip(teacher.buffers(), student.buffers()):
        own.copy_(new)


def build_ssl_model(backbone: nn.Module, loss: Any, own_ibot_head: bool) -> SSLModel:
    """Backbone and the heads that `loss.dino` and `loss.ibot` describe (prototypes, hidden, bottleneck, layers).

    Both heads end alike, in `loss.dino.last_layer`.
    """
    heads = [loss.dino, loss.ibot] if own_ibot_head else [loss.dino]
    return SSLModel(
        backbone,
        *(
            ProjectionHead(
                backbone.embed_dim,
                head.prototypes,
                hidden=head.hidden,
                bottleneck=head.bottleneck,
                layers=head.layers,
                last_layer=loss.dino.last_layer,
            )
            for head in heads
        ),
    )


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_teacher(student: SSLModel) -> SSLModel:
    """A copy that shares nothing with the student but what is frozen there, takes no gradient and stays in eval mode."""
    return copy_sharing_frozen(student).requires_grad_(False).eval()


def host_copy(module: nn.Module) -> nn.Module:
    """The same module with copies of its tensors in the host's memory; nothing is held twice on the device."""
    tensors = [*module.parameters(), *module.buffers()]
    memo = {id(tensor): tensor.detach().to("cpu", copy=True) for tensor in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


def save_heads(model: SSLModel, folder: Path) -> None:
    """heads.safetensors: everything but the backbone, by its name in the model."""
    state = model.state_dict()
    heads = {
        name: state[name].detach().cpu().contiguous()
        for name in state
        if not name.startswith("backbone.")
    }
    save_file(heads, folder / "heads.safetensors")
