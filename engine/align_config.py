"""What align.py has to know beyond what train.py can be told, and the defaults of dino.txt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from engine.config import (
    Count,
    CountOrZero,
    CropsConfig,
    GuardConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Schedule,
    ScheduleConfig,
    TrainConfig,
    TuneConfig,
)
from engine.keys import within
from engine.optim import build_schedules
from engine.settings import changed_keys, free, section
from errors import UserError

Schedules = dict[str, Callable[[int], float]]
UNREAD_CROPS = ("local_", "global_count", "mix", "guided")


@dataclass
class AlignConfig:
    """Texts on a frozen backbone (align.py only)."""

    backbone: str | None = None  # A MODEL; its weights never change.
    # Transformer blocks on the backbone's tokens; 2 in dino.txt. 0: none, and features are computed
    # once, before the first step.
    head_blocks: CountOrZero = 0
    # Stochastic depth of those blocks; 0.3 in dino.txt.
    drop_path: Annotated[float, within("[0, 1)"), "probability"] = 0.3
    # Numbers of a vector; null: twice the backbone's width, without a linear map (dino.txt).
    embed_dim: Count | None = None
    text: Literal["tiny", "base", "paper"] = "tiny"  # Text transformer of 1, 40 or 538 M weights.
    tokenizer: Literal["bytes", "clip"] = "bytes"  # clip: byte pairs of open_clip_torch.
    context: Count = 77  # Most tokens of a caption, its start and end included; the rest is cut.
    loss: Literal["info_nce", "sigmoid"] = "info_nce"  # info_nce: CLIP, dino.txt. sigmoid: SigLIP.
    # Folder that `extract.py --features cls mean` wrote of data.train, read for head_blocks 0.
    features: str | None = free(None)
    shuffle: bool = False  # Gives every image another's captions: a control that learns nothing.


def align_schedules() -> ScheduleConfig:
    """AdamW of dino.txt; its warm-up is 2,000 of 50,000 steps."""
    rate = Schedule(start=0.0, peak=7e-4, end=0.0, warmup="4%")
    decay, momentum = (Schedule(value, shape="constant") for value in (1e-4, 0.0))
    return ScheduleConfig(lr=rate, weight_decay=decay, ema_momentum=momentum)


@dataclass
class AlignTrainConfig(TrainConfig):
    """Keys of `model`, `loss` and `tune` have no part."""

    align: AlignConfig = section(AlignConfig)
    crops: CropsConfig = section(lambda: CropsConfig(policy="crops_only"))
    optim: OptimConfig = section(lambda: OptimConfig(betas=[0.9, 0.99], clip_grad=None))
    schedule: ScheduleConfig = section(align_schedules)
    guard: GuardConfig = section(lambda: GuardConfig(probe="zero_shot"))

    def __post_init__(self):
        super().__post_init__()
        unread = ["init"] if self.init else []
        sections = {"model": ModelConfig(), "loss": LossConfig(), "tune": TuneConfig()}
        sections["crops"] = CropsConfig(policy="crops_only")
        for name, default in sections.items():
            for change in changed_keys(default, getattr(self, name), name, all_fields=True):
                key = change.partition(" ")[0]
                if name != "crops" or key.removeprefix("crops.").startswith(UNREAD_CROPS):
                    unread.append(key)
        unread += [f"data.{name}" for name in ("mean", "std") if getattr(self.data, name)]
        if unread:
            raise UserError(
                f"align.py does not read {', '.join(unread)}: the backbone, align.backbone, is "
                "frozen and brings its own mean and std; leave it out"
            )
        if self.align.embed_dim and self.align.embed_dim % 2:
            raise UserError(f"align.embed_dim is {self.align.embed_dim}; it must be even")
        if self.align.context < 3:
            raise UserError(f"align.context is {self.align.context}; it must be at least 3")


def alignment_schedules(cfg: AlignTrainConfig, total_steps: int) -> Schedules:
    """As `build_schedules`, with the contrastive loss as the only term."""
    schedules = build_schedules(cfg, total_steps)
    kept = {name: schedules[name] for name in ("lr", "weight_decay", "ema_momentum")}
    return kept | {"contrastive": lambda step: 1.0}
