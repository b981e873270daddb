"""What distill.py has to know beyond what train.py can be told."""

from dataclasses import dataclass
from typing import Any, Literal

from engine.config import Factor, Pixels, TrainConfig
from engine.settings import section


@dataclass
class DistillConfig:
    """A frozen teacher and who learns from it (distill.py only)."""

    teacher: str | None = None  # A MODEL.
    # Side of the global crops as the teacher sees them; null: crops.global_size. Half of it for
    # ConvNeXts and their stride of 32: so the patch grids are one (DINOv3).
    teacher_size: Pixels | None = None
    # heads: `loss.dino` and `loss.ibot` on the teacher's prototypes (DINOv3), for a run of ours.
    # features: its CLS and patches after a learned projection; those two terms and local crops have
    # no part. auto: heads where the teacher brings them.
    match: Literal["auto", "heads", "features"] = "auto"
    cls_weight: Factor = 1.0  # Of the CLS term of features; 0: off.
    patch_weight: Factor = 1.0  # Of the patch term of features; 0: off.
    # name: {share: of the ranks (1), any override}; each is compared in its folder (students.py).
    students: dict[str, Any] = section(dict, free=True)


@dataclass
class DistillTrainConfig(TrainConfig):
    """Crops are cut once, as `crops` says; a student's sizes are resized from them."""

    distill: DistillConfig = section(DistillConfig)
