"""What can be configured: one dataclass a section, typed, with defaults and refusals.

Each field carries its unit, its origin and when to move it. Fields made with `free(...)` change speed, logging or
length but not the method; every other field is part of the result and may not change when a run goes on.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, Union

from engine.settings import (
    build,
    find_config,
    free,
    merge,
    parse_override,
    read_yaml,
    section,
    write_out,
)
from engine.stages import stage_configs
from engine.validation import require, validate, validate_gram_teacher
from errors import UserError

Span = Union[int, str]  # a number of steps, or a share of the run such as "10%"
Size = Union[int, list[int]]  # pixels; a number, or [height, width]


@dataclass
class DataConfig:
    train: str = "scenes?split=train"  # a DATA spec: folder, list, torchvision name, scenes; labels are never used
    channels: int = 3  # of the images as the model sees them; images with others are converted
    mean: list[float] | None = (
        None  # per channel, of values in [0, 1]; null: those of `init`, else ImageNet's
    )
    #   (their average for other counts); give your own where images are much darker, as in X-rays
    std: list[float] | None = None  # as mean
    workers: int | None = free(
        None
    )  # loader processes a rank; null: by the number of cores; more while
    #   data_wait_fraction in metrics.jsonl is above 0.1; 0: none
    max_bad: int | None = free(
        None
    )  # unreadable images before the run stops; null: more than 10 and more than 1 %
    augment_on: Literal["auto", "device", "workers"] = free(
        "auto"
    )  # where crops and colours are made: device: workers only
    #   read and shrink; auto: device on CUDA, else workers. The same views but for rounding, and the filter where an image was
    #   shrunk; ours. workers where the GPU is the bottleneck and the cores are not


@dataclass
class SizeConfig:
    """One of the pairs of `crops.mix`; pixels, as in `crops`."""

    share: float = 1.0  # of the steps; the shares of all pairs are taken relative to their sum
    global_size: Size = 224
    local_size: Size = 96


@dataclass
class CropsConfig:
    """Multi-crop (DINO, section 3). Sizes in pixels, scales as shares of the image's area."""

    global_size: Size = 224  # the teacher's view; a multiple of the patch size
    global_scale: list[float] = field(
        default_factory=lambda: [0.32, 1.0]
    )  # DINOv2; 0.4 in DINO; higher for small objects
    global_count: int = 2  # DINO; the teacher's cost grows with it
    local_size: Size = 96  # DINO; 98 for patches of 14; a multiple of the patch size
    local_scale: list[float] = field(
        default_factory=lambda: [0.05, 0.32]
    )  # higher where a small crop loses the object
    local_count: int = 8  # 0 = no local crops; each costs about a fifth of a global one
    policy: str = "natural"  # the colour policy's name in data/augment.py; the keys below change it
    flip: float | None = None  # probability of a left-right flip; 0 where sides matter
    turn: float | None = (
        None  # probability of a turn by 90, 180 or 270 degrees; 0.75 where there is no up
    )
    jitter: float | None = None  # probability of brightness, contrast, saturation, hue together
    brightness: float | None = (
        None  # factor from 1 - x to 1 + x; 0.4 in DINO; lower where intensity is a measurement
    )
    contrast: float | None = None  # as brightness
    saturation: float | None = None  # as brightness, 0.2 in DINO; three channels only
    hue: float | None = (
        None  # share of the colour circle, 0.1 in DINO; three channels only; higher if colour misleads
    )
    grayscale: float | None = None  # probability, 0.2 in DINO; three channels only
    blur: list[float] | None = (
        None  # probabilities for global crop 1, the other global crops, local crops;
    )
    #   1, 0.1, 0.5 in DINO; 0 for small images, where a blur removes the object
    stain: float | None = (
        None  # strength of the stain jitter; three channels only; 0.2 in the policy histology
    )
    solarize: float | None = None  # probability, on the second global crop; 0.2 in DINO
    guided: float = 0.0  # probability that a local crop of an image with marks (boxes, masks) shows a marked place (DINO-LG);
    #   0 = marks are not looked at; folder:DIR?marks=FILE.csv brings marks
    guided_globals: bool = (
        False  # whether global crops follow marks as well; for things smaller than a global crop
    )
    guided_share: float = (
        1.0  # of the images, whose marks are looked at; below 1 to see how many are needed
    )
    mix: list[SizeConfig] | None = (
        None  # pairs of sizes, one drawn for each step, in place of global_size and
    )
    #   local_size; for a last stage at high resolution (DINOv3)


@dataclass
class ModelConfig:
    arch: str = "vit_small"  # a preset of models/vit.py, or timm:NAME
    patch_size: int = 16  # pixels; smaller is better and slower (quadratic)
    positions: Literal["learned", "rope"] = "learned"  # learned: DINO, DINOv2; rope: DINOv3
    registers: int = (
        0  # extra tokens; DINOv3 4; they keep artefacts out of the patch tokens of big models
    )
    layerscale: float | None = None  # initial value; 1e-5 in DINOv2 and DINOv3; null = none (DINO)
    drop_path: float = (
        0.0  # stochastic depth of the student; 0.1 for small, 0.3 to 0.4 for large models
    )
    drop_path_shape: Literal["uniform", "linear"] = (
        "uniform"  # over depth: linear in DINO, uniform in DINOv2 and v3
    )
    ffn: str | None = None  # mlp, swiglu, swiglu64, ...; null = the preset's
    ffn_ratio: float | None = None  # hidden / embedding width; null = the preset's
    embed_dim: int | None = None  # width of a token; null = the preset's
    depth: int | None = None  # blocks; null = the preset's
    num_heads: int | None = (
        None  # null = the preset's; a head is 64 wide in all published models but the 7B
    )
    qkv_bias: bool = True  # False in DINOv3 7B
    mask_k_bias: bool = False  # True in DINOv3: no bias on the keys, where it has no effect
    norm_eps: float = 1e-6  # of the layer norms; 1e-5 in DINOv3
    untie_cls_norm: bool = False  # another final norm for CLS and registers than for patches
    untie_local_cls_norm: bool = (
        False  # another final norm for CLS and registers of local crops (DINOv3 7B)
    )
    rope_base: float = 100.0  # longest period; DINOv3
    rope_shift: float | None = None  # coordinates move by up to this; training only
    rope_jitter: float | None = None  # each axis is scaled by up to this factor; training only
    rope_rescale: float | None = (
        None  # both axes are scaled by up to this factor; 2 in DINOv3; training only
    )


@dataclass
class DinoConfig:
    weight: float = 1.0  # of the term; 1 in all papers; 0 = off
    local_weight: float = (
        1.0  # of the pairs with a local crop; DINOv3's Gram stage lowers it to 0.5
    )
    prototypes: int = 65536  # K; a few hundred for small data; a flat loss at ln K means too many or too warm a teacher
    hidden: int = (
        2048  # width of the projection head; 8192 in DINOv3 7B; smaller with a small backbone
    )
    bottleneck: int = (
        256  # width before the prototypes; 384 in DINOv2's long recipe, 512 in DINOv3 7B
    )
    layers: int = 3  # linear layers of the projection head; DINO
    last_layer: Literal["plain", "weight_norm", "unit_norm"] = (
        "weight_norm"  # DINOv3 plain; DINOv2 weight_norm; DINO
    )
    #   ViT-B unit_norm (norms held at 1: steadier)
    centering: Literal["ema", "sinkhorn", "none"] = (
        "sinkhorn"  # ema: DINO; sinkhorn: DINOv2, DINOv3; with ema keep
    )
    #   10 × (1 - ema_momentum) × student_temp / teacher_temp below 0.5 (DINO: 0.1; 10 steps is the centre's memory), or
    #   the teacher outruns its centre and all images swing to one target
    student_temp: float = (
        0.1  # softmax temperature, in all papers; rather move schedule.teacher_temp
    )


@dataclass
class IbotConfig:
    weight: float = 0.0  # 1 in iBOT, DINOv2, DINOv3
    prototypes: int | None = None  # null = the DINO head is shared
    hidden: int = 2048  # this and the next two as in `dino`; of a head of its own only
    bottleneck: int = 256
    layers: int = 3
    centering: Literal["ema", "sinkhorn", "none"] = "sinkhorn"
    student_temp: float = (
        0.1  # softmax temperature, in all papers; rather move schedule.teacher_temp
    )
    mask_probability: float = 0.5  # share of the global crops that get a mask; DINOv2
    mask_ratio: list[float] = field(
        default_factory=lambda: [0.1, 0.5]
    )  # of a masked crop's patches; DINOv2


@dataclass
class KoleoConfig:
    weight: float = 0.0  # 0.1 in DINOv2 and DINOv3
    group: int = 16  # images among which the nearest neighbour is sought (DINOv3); micro batches are multiples of it


@dataclass
class GramConfig:
    """Patch similarities stay those of an earlier teacher (DINOv3, section 4). Steps count from the stage's first."""

    weight: float = (
        0.0  # 2 in DINOv3's refinement, 1.5 at high resolution; schedule.gram can raise it slowly
    )
    teacher: str = "ema"  # ema: the teacher itself; init: as it was when the stage began, or the weights of `init`;
    #   auto: of this run's snapshots the one with the best patches, measured without labels; "@STEP": this run's snapshot
    #   of that step; else RUN@STEP or any MODEL
    start: Span = 0  # when the term begins, and when `auto` chooses
    refresh: int | None = (
        None  # steps between copies of the EMA teacher into the Gram teacher; 10,000 in DINOv3
    )
    max_refreshes: int | None = None  # null: no limit; 3 in DINOv3
    teacher_scale: float = 1.0  # size of the Gram teacher's crops over the student's; 2 and 1.5 in DINOv3, costs its square
    distortions: bool = (
        True  # whether its crops have the student's colours and blur; False in DINOv3
    )


@dataclass
class LossConfig:
    dino: DinoConfig = section(DinoConfig)
    ibot: IbotConfig = section(IbotConfig)
    koleo: KoleoConfig = section(KoleoConfig)
    gram: GramConfig = section(GramConfig)


@dataclass
class OptimConfig:
    lr_scaling: Literal["none", "linear_256", "sqrt_1024", "sqrt_1024_x4"] = (
        "none"  # factor on schedule.lr's peak and
    )
    #   end: batch/256 (DINO), sqrt(batch/1024) (DINOv2), 4 sqrt(batch/1024) (DINOv3)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW; DINOv3 7B 0.9, 0.99
    clip_grad: float | None = 3.0  # largest L2 norm of a gradient; null = off; 30 in DINOv3 7B
    clip_per: Literal["module", "tensor"] = (
        "module"  # module: backbone and heads apart (DINOv2, v3); tensor: each alone
    )
    layer_decay: float = (
        1.0  # lr factor per block, counted from the top; 0.9 in DINOv2's short recipe
    )
    patch_embed_lr: float = 1.0  # extra lr factor of the patch embedding; 0.2 in DINOv2 and DINOv3
    freeze_last_layer: Span = (
        0  # steps or share of the run in which the prototypes do not move; 1 epoch in DINO
    )


@dataclass
class Schedule:
    """From start to peak in `warmup` (linear), from peak to end in `decay`, then constant. Spans: steps, or '10%'."""

    peak: float = 0.0  # in the unit of what is scheduled
    start: float | None = None  # null: 0 for lr, peak for the others
    end: float | None = None  # null: peak
    warmup: Span = 0
    decay: Span | None = None  # null: all that is left
    shape: Literal["constant", "linear", "cosine"] = "cosine"

    @staticmethod
    def shorthand(value: Any) -> Any:
        """A schedule written as a number is that number throughout."""
        if isinstance(value, dict):
            return value
        return {
            "peak": value,
            "start": None,
            "end": None,
            "warmup": 0,
            "decay": None,
            "shape": "constant",
        }


def schedule(**values: Any) -> Any:
    return field(default_factory=lambda: Schedule(**values))


@dataclass
class ScheduleConfig:
    lr: Schedule = schedule(
        peak=1e-3, start=0.0, end=1e-6, warmup="10%"
    )  # peak and end before optim.lr_scaling
    weight_decay: Schedule = schedule(peak=0.04, end=0.4)  # DINO; 0.04 constant in DINOv3 7B
    ema_momentum: Schedule = schedule(peak=0.992, end=1.0)  # higher for large batches and long runs
    teacher_temp: Schedule = schedule(
        start=0.04, peak=0.07, warmup="30%", shape="constant"
    )  # lower if training collapses
    dino: Schedule | None = None  # these five replace the constant weights of `loss`
    dino_local: Schedule | None = None  # DINOv3's Gram stage: 1 to 0.5
    ibot: Schedule | None = None  # as dino
    koleo: Schedule | None = None  # as dino
    gram: Schedule | None = None  # as dino; 0 to 2 in 1,000 steps in DINOv3


@dataclass
class ProbeConfig:
    """In-loop quality of the teacher; leaves the run's randomness and losses untouched."""

    every: int = free(0)  # steps; 0 = never; otherwise also at step 0 and at the end
    train: str | None = free(None)  # DATA specs with labels
    val: str | None = free(None)
    knn: bool = free(True)  # weighted k-NN, k = 20
    linear: bool = free(False)  # linear probe, DINOv2's grid; takes longer than k-NN
    patches: bool = free(
        False
    )  # locality of the patch similarities, and where there are masks k-NN segmentation (mIoU)


@dataclass
class CheckpointConfig:
    every: int = free(1000)  # steps; the last step is always kept
    keep: int = free(2)  # newest checkpoints that stay on disk
    snapshot: int = free(0)  # steps between teachers that are kept for good; 0 = none


@dataclass
class HealthConfig:
    """What to do when the teacher's targets or the features collapse (engine/health.py)."""

    on_collapse: Literal["warn", "stop"] = free(
        "warn"
    )  # stop: the run fails, with its last checkpoint intact


@dataclass
class GuardConfig:
    """What to do when the teacher becomes worse than it was at step 0 (engine/guard.py)."""

    probe: Literal["knn", "linear", "miou"] = free(
        "knn"
    )  # which of the probes counts, here and for best/
    tolerance: float = free(
        0.02
    )  # how far it may fall below step 0; 0.02 is two points; more where few images are probed
    action: Literal["warn", "stop"] | None = free(
        None
    )  # stop: the run fails, best/ holds the best weights; null: warn
    #   where there is `init` and a probe, nothing otherwise


@dataclass
class TuneConfig:
    """What of the backbone trains; the heads always do."""

    mode: Literal["full", "lora", "partial"] = (
        "full"  # lora: low-rank adapters, merged on export; partial: what `targets` names
    )
    targets: list[str] = field(
        default_factory=list
    )  # parts of names: q, v, attn.proj, blocks.11, norm*; lora: [] is q, v;
    #   partial: [] freezes the backbone
    rank: int = 8  # of the adapters
    alpha: float = 16.0  # over rank, the adapters' factor
    dropout: float = 0.0  # of the adapters' inputs


@dataclass
class TrainConfig:
    output_dir: str = free("runs/default")
    seed: int = 0  # of initial weights, order of images, crops and masks
    overwrite: bool = free(False)  # start afresh where a run already stands
    device: Literal["auto", "cpu", "cuda", "mps"] = free("auto")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of the matrix products; auto: bf16 where it is fast
    )
    strategy: Literal["none", "ddp", "fsdp"] = free(
        "ddp"
    )  # under torchrun or srun; alone it is none. fsdp shards weights,
    #   gradients, moments and teachers over the ranks: for what does not fit into one GPU
    compile: bool | None = free(
        None
    )  # torch.compile of the blocks; null: on CUDA. The first steps are slow, the others not
    checkpointing: Literal["none", "blocks", "full"] = free(
        "none"
    )  # activations are computed again in the backward pass: a
    #   third more time for a fraction of the memory; full: of the heads too
    time_limit: float | None = free(
        None
    )  # hours after which the run saves and ends with exit status 3
    hang_timeout: float = free(
        600.0
    )  # seconds that ranks wait for one that does not answer before the run ends
    total_steps: int | None = free(None)  # one of the three gives the length
    epochs: float | None = free(None)  # passes over data.train
    images: int | None = free(None)  # images seen
    init: str | None = (
        None  # a MODEL to start from: a run, released weights; `model` must describe the same backbone
    )
    batch_size: int = 64  # images a step, over all ranks
    micro_batch_size: int | None = free(
        None
    )  # images a rank and forward, at most; accumulation is exact
    log_every: int = free(10)  # steps
    mirrors: list[Literal["tensorboard", "wandb"]] = field(
        default_factory=list, metadata={"free": True}
    )  # of metrics.jsonl
    data: DataConfig = section(DataConfig)
    crops: CropsConfig = section(CropsConfig)
    model: ModelConfig = section(ModelConfig)
    loss: LossConfig = section(LossConfig)
    optim: OptimConfig = section(OptimConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    tune: TuneConfig = section(TuneConfig)
    probe: ProbeConfig = section(ProbeConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    health: HealthConfig = section(HealthConfig)
    guard: GuardConfig = section(GuardConfig)
    stages: dict[str, Any] | None = free(None)  # compared by engine.settings.changed_stages:
    #   name: {steps: N, any override}, in order; see engine/stages.py

    def __post_init__(self):
        validate(self)


@dataclass
class DistillConfig:
    """A frozen teacher and who learns from it; the rest of the configuration holds for every student, unless its entry says otherwise."""

    teacher: str | None = None  # a MODEL
    teacher_size: Size | None = (
        None  # pixels of the global crops as the teacher sees them; null: crops.global_size. Half of
    )
    #   it for ConvNeXts and their stride of 32: so the patch grids are one (DINOv3)
    match: Literal["auto", "heads", "features"] = (
        "auto"  # heads: `loss.dino` and `loss.ibot` on the teacher's prototypes
    )
    #   (DINOv3), for a run of ours; features: its CLS and patches after a learned projection, those two terms and local
    #   crops have no part; auto: heads where the teacher brings them
    cls_weight: float = 1.0  # of the two terms of features; 0 = off
    patch_weight: float = 1.0
    students: dict[str, Any] = field(
        default_factory=dict, metadata={"free": True}
    )  # each is compared in its own folder:
    #   name: {share: of the ranks (1), any override}; see engine/students.py


@dataclass
class DistillTrainConfig(TrainConfig):
    """What distill.py reads. `crops` says at which size the crops are cut for all; a student's own sizes, resized from them."""

    distill: DistillConfig = section(DistillConfig)


# ----------------------------------------------------------------- what follows from the keys


def length_in_steps(cfg: TrainConfig, images: int) -> int | None:
    """total_steps, epochs or images as optimiser steps, at least 1; None where only the stages say how long."""
    if cfg.total_steps is not None:
        return cfg.total_steps
    if cfg.epochs is None and cfg.images is None:
        if cfg.stages:
            return None
        raise UserError("how long? give total_steps, epochs or images")
    wanted = cfg.images if cfg.images is not None else cfg.epochs * images
    return max(1, round(wanted / cfg.batch_size))


def with_statistics(cfg: TrainConfig, preprocessing: Any) -> TrainConfig:
    """Mean and std travel with weights: those of `preprocessing` are taken over where none are given.

    Others than these are worth a warning, on standard error.
    """
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    data = dataclasses.replace(cfg.data, mean=cfg.data.mean or mean, std=cfg.data.std or std)
    if (data.mean, data.std) != (mean, std):
        print(
            f"warning: data.mean and data.std are not those of {cfg.init}: {mean} and {std}",
            file=sys.stderr,
        )
    return dataclasses.replace(cfg, data=data)


def micro_batch_size(cfg: TrainConfig, ranks: int, grouped: bool) -> int:
    """Images that go through a rank's student at once; `grouped`: whether there are KoLeo groups, which must fit into them or
    span ranks that each take their share at once."""
    require(
        cfg.batch_size % ranks == 0,
        f"batch_size {cfg.batch_size} is not a multiple of the {ranks} processes",
    )
    local, group = cfg.batch_size // ranks, cfg.loss.koleo.group
    micro = min(cfg.micro_batch_size or local, local)
    fits = micro % group == 0 and local % micro % group == 0
    spans = micro == local and group % local == 0 and cfg.batch_size % group == 0
    require(
        not grouped or fits or spans,
        f"loss.koleo.group {group} does not divide the {micro} images that go through a rank's student at once (of {local}); "
        "change batch_size, micro_batch_size or loss.koleo.group",
    )
    return micro


# ----------------------------------------------------------------- loading


def load_config(
    config: str | None, overrides: list[str], schema: type = TrainConfig
) -> TrainConfig:
    """Defaults of the `schema`, then the YAML file with its bases, then `key=value` overrides; validated.

    Raises:
        UserError: one sentence naming the key, what was given and what is allowed.
    """
    layers = read_yaml(find_config(config)) if config else []
    layers += [parse_override(argument) for argument in overrides]
    cfg = build(schema, reduce(merge, (write_out(schema, layer) for layer in layers), {}))
    for number, (_, _, stage) in enumerate(stage_configs(cfg)):
        validate_gram_teacher(stage, bool(number or cfg.init or stage.init), number > 0)
    return cfg
