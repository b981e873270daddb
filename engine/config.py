"""What can be configured: one dataclass a section.

The type of a key holds its rule and unit, the comment above or beside it says what it is;
`python train.py --keys` prints them. `free` keys change speed, logging or length, not the method.
All others are part of the result: they may not change when a run goes on.
Rules between keys stand in engine/validation.py.
"""

import re
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal

from engine import settings, validation
from engine.keys import Rule
from engine.settings import free, section
from engine.stages import stage_configs
from engine.validation import length_in_steps, micro_batch_size, with_statistics

__all__ = ["length_in_steps", "load_config", "micro_batch_size", "with_statistics"]

AT_LEAST_1 = Rule("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Rule("0 or more", lambda value: value >= 0)
POSITIVE = Rule("more than 0", lambda value: value > 0)
EACH_POSITIVE = Rule("more than 0 for each channel", lambda values: all(v > 0 for v in values))
UP_TO_1 = Rule("in [0, 1]", lambda value: 0 <= value <= 1)
UP_TO_HALF = Rule("in [0, 0.5]", lambda value: 0 <= value <= 0.5)
BELOW_1 = Rule("in [0, 1)", lambda value: 0 <= value < 1)
DECAY = Rule("in (0, 1]", lambda value: 0 < value <= 1)
BETAS = Rule(
    "two values in [0, 1)", lambda pair: len(pair) == 2 and 0 <= min(pair) <= max(pair) < 1
)
AREA = Rule(
    "[low, high] within (0, 1]", lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1
)
MASKED = Rule(
    "[low, high] within [0, 1)", lambda pair: len(pair) == 2 and 0 <= pair[0] <= pair[1] < 1
)
BLUR = Rule(
    "three probabilities: global crop 1, other global crops, local crops",
    lambda values: len(values) == 3 and 0 <= min(values) <= max(values) <= 1,
)
SIZE = Rule("a number, or [height, width]", lambda size: isinstance(size, int) or len(size) == 2)
SPAN = Rule(
    "a number of steps or a share such as 10%",
    lambda span: span >= 0 if isinstance(span, int) else re.fullmatch(r"\d+(\.\d+)?%", span),
)

Count = Annotated[int, AT_LEAST_1, "count"]
CountOrZero = Annotated[int, NOT_NEGATIVE, "count"]
Steps = Annotated[int, AT_LEAST_1, "steps"]
StepsOrNever = Annotated[int, Rule("0 (off) or a number of steps", NOT_NEGATIVE.holds), "steps"]
Span = Annotated[int | str, SPAN, "steps or %"]
Pixels = Annotated[int | list[int], SIZE, "pixels"]
Factor = Annotated[float, NOT_NEGATIVE, "factor"]
AnyFactor = Annotated[float, "factor"]
Stretch = Annotated[float, AT_LEAST_1, "factor"]
Temperature = Annotated[float, POSITIVE, "temperature"]
Probability = Annotated[float, UP_TO_1, "probability"]
Share = Annotated[float, UP_TO_1, "share"]
Area = Annotated[list[float], AREA, "share of area"]
Scheduled = Annotated[float, NOT_NEGATIVE, "as scheduled"]
Centering = Literal["ema", "sinkhorn", "none"]


@dataclass
class DataConfig:
    """The images, and the processes that load them."""

    train: str = "scenes?split=train"  # DATA to train on; labels are never used.
    channels: Count = 3  # The model sees so many channels; other images are converted.
    # Mean of each channel. Null: those of `init`, else ImageNet's (for other counts of channels
    # their average). Give your own where images are much darker, as in X-rays.
    mean: Annotated[list[float], "value in [0, 1]"] | None = None
    # Standard deviation of each channel; null: as mean.
    std: Annotated[list[float], EACH_POSITIVE, "value in [0, 1]"] | None = None
    # Loader processes of a rank; null: by the number of cores; 0: none. Give more while
    # data_wait_fraction in metrics.jsonl is above 0.1.
    workers: CountOrZero | None = free(None)
    # Unreadable images before the run stops; null: more than 10 and more than 1 %.
    max_bad: CountOrZero | None = free(None)
    # Where crops and colours are made (ours). device: workers only read and shrink. auto: device on
    # CUDA, else workers. The views are the same but for rounding, and the filter where an image was
    # shrunk. Take workers where the GPU is the bottleneck and the cores are not.
    augment_on: Literal["auto", "device", "workers"] = free("auto")


@dataclass
class SizeConfig:
    """One pair of sizes."""

    # Share of the steps, relative to the sum over all pairs.
    share: Annotated[float, POSITIVE, "relative"] = 1.0
    global_size: Pixels = 224  # Side of the teacher's view.
    local_size: Pixels = 96  # Side of a local crop.


@dataclass
class CropsConfig:
    """Multi-crop (DINO, section 3). Null: what the policy says."""

    global_size: Pixels = 224  # Side of the teacher's view; a multiple of the patch size.
    # Area of a global crop (DINOv2; from 0.4 in DINO); higher for small objects.
    global_scale: Area = section(lambda: [0.32, 1.0])
    global_count: Count = 2  # Global crops of an image (DINO); the teacher's cost grows with it.
    # Side of a local crop (DINO; 98 for patches of 14); a multiple of the patch size.
    local_size: Pixels = 96
    # Area of a local crop; higher where a small crop loses the object.
    local_scale: Area = section(lambda: [0.05, 0.32])
    local_count: CountOrZero = 8  # Local crops of an image; each costs a fifth of a global one.
    policy: str = "natural"  # The colour policy's name in data/augment.py; keys below change it.
    flip: Probability | None = None  # A crop is flipped left-right; 0 where sides matter.
    turn: Probability | None = None  # A crop turns by 90, 180 or 270 degrees; 0.75 if none is up.
    jitter: Probability | None = None  # Brightness, contrast, saturation and hue change together.
    # x: the factor lies in 1 - x to 1 + x; 0.4 in DINO; lower where intensity is a measurement.
    brightness: Share | None = None
    contrast: Share | None = None  # As brightness.
    saturation: Share | None = None  # As brightness; 0.2 in DINO; three channels only.
    # Largest turn of the colour circle; 0.1 in DINO; three channels only; more if colour misleads.
    hue: Annotated[float, UP_TO_HALF, "turns"] | None = None
    grayscale: Probability | None = None  # Colour is removed; 0.2 in DINO; three channels only.
    # A blur for global crop 1, the other global crops, local crops; 1, 0.1, 0.5 in DINO; 0 for
    # small images, where a blur removes the object.
    blur: Annotated[list[float], BLUR, "probability"] | None = None
    stain: Factor | None = None  # Jitter of stains; three channels only; 0.2 in policy histology.
    solarize: Probability | None = None  # The second global crop is solarized; 0.2 in DINO.
    # A local crop of an image with marks (boxes, masks) shows a marked place (DINO-LG); 0: marks
    # are not read; folder:DIR?marks=FILE.csv brings marks.
    guided: Probability = 0.0
    # Whether global crops follow marks as well; for things smaller than a global crop.
    guided_globals: bool = False
    guided_share: Share = 1.0  # Of images, whose marks are read; below 1 to see how many it takes.
    # Pairs of sizes, one drawn for each step, in place of global_size and local_size; for a last
    # stage at high resolution (DINOv3).
    mix: Annotated[list[SizeConfig], Rule("pairs of sizes, or null", len)] | None = None


@dataclass
class ModelConfig:
    """The backbone. Null: what the preset says."""

    arch: str = "vit_small"  # A preset of models/vit.py, or timm:NAME.
    patch_size: Annotated[int, AT_LEAST_1, "pixels"] = (
        16  # Smaller is better and slower (quadratic).
    )
    positions: Literal["learned", "rope"] = "learned"  # learned: DINO, DINOv2. rope: DINOv3.
    # Extra tokens; 4 in DINOv3; they keep artefacts out of the patch tokens of big models.
    registers: CountOrZero = 0
    layerscale: AnyFactor | None = None  # Initial value; 1e-5 in DINOv2, DINOv3; null: none (DINO).
    # Stochastic depth of the student; 0.1 for small, 0.3 to 0.4 for large models.
    drop_path: Annotated[float, BELOW_1, "probability"] = 0.0
    # How drop_path goes over depth: linear in DINO, uniform in DINOv2 and DINOv3.
    drop_path_shape: Literal["uniform", "linear"] = "uniform"
    ffn: str | None = None  # Feed-forward layer: mlp, swiglu, swiglu64, ...
    ffn_ratio: Annotated[float, POSITIVE, "ratio"] | None = None  # Hidden / embedding width.
    embed_dim: Count | None = None  # Width of a token.
    depth: Count | None = None  # Blocks.
    num_heads: Count | None = None  # A head is 64 wide in all published models but the 7B.
    qkv_bias: bool = True  # Whether queries, keys and values have one; not in DINOv3 7B.
    mask_k_bias: bool = False  # Whether keys have no bias, as it has no effect; true in DINOv3.
    norm_eps: Annotated[float, POSITIVE, "variance"] = 1e-6  # Of the layer norms; 1e-5 in DINOv3.
    untie_cls_norm: bool = False  # Whether CLS and registers have a final norm of their own.
    untie_local_cls_norm: bool = False  # Whether those of local crops have one (DINOv3 7B).
    rope_base: Annotated[float, POSITIVE, "period"] = 100.0  # Longest period (DINOv3).
    rope_shift: Annotated[float, NOT_NEGATIVE, "coordinate"] | None = (
        None  # Largest; training only.
    )
    rope_jitter: Stretch | None = None  # Each axis is scaled by up to this; training only.
    # Both axes are scaled by up to this; 2 in DINOv3; training only.
    rope_rescale: Stretch | None = None


@dataclass
class DinoConfig:
    """Prototypes of different crops' CLS agree (DINO)."""

    weight: Factor = 1.0  # Of the term; 1 in all papers; 0: off.
    # Of the pairs with a local crop; DINOv3's Gram stage lowers it to 0.5.
    local_weight: AnyFactor = 1.0
    # K; a few hundred for small data; a flat loss at ln K means too many or too warm a teacher.
    prototypes: Count = 65536
    # Width of the projection head; 8192 in DINOv3 7B; smaller with a small backbone.
    hidden: Count = 2048
    # Width before the prototypes; 384 in DINOv2's long recipe, 512 in DINOv3 7B.
    bottleneck: Count = 256
    layers: Count = 3  # Linear layers of the projection head (DINO).
    # Of the prototypes: plain in DINOv3, weight_norm in DINOv2, unit_norm in DINO's ViT-B (norms
    # stay 1: steadier).
    last_layer: Literal["plain", "weight_norm", "unit_norm"] = "weight_norm"
    # ema: DINO. sinkhorn: DINOv2, DINOv3. With ema keep
    # 10 × (1 - ema_momentum) × student_temp / teacher_temp below 0.5 (DINO: 0.1; 10 steps is the
    # centre's memory), or the teacher outruns its centre and all images swing to one target.
    centering: Centering = "sinkhorn"
    student_temp: Temperature = 0.1  # The same in all papers; rather move schedule.teacher_temp.


@dataclass
class IbotConfig:
    """Prototypes of hidden patches are those that the teacher sees (iBOT)."""

    weight: Factor = 0.0  # Of the term; 1 in iBOT, DINOv2, DINOv3; 0: off.
    prototypes: Count | None = None  # K of a head of its own; null: the DINO head is shared.
    hidden: Count = 2048  # As in `dino`; of a head of its own only, with the next two.
    bottleneck: Count = 256  # As in `dino`.
    layers: Count = 3  # As in `dino`.
    centering: Centering = "sinkhorn"  # As in `dino`.
    student_temp: Temperature = 0.1  # The same in all papers; rather move schedule.teacher_temp.
    mask_probability: Probability = 0.5  # A global crop gets a mask (DINOv2).
    # Hidden patches of a masked crop (DINOv2).
    mask_ratio: Annotated[list[float], MASKED, "share"] = section(lambda: [0.1, 0.5])


@dataclass
class KoleoConfig:
    """Features of different images stay apart (KoLeo)."""

    weight: Factor = 0.0  # Of the term; 0.1 in DINOv2 and DINOv3; 0: off.
    # Images among which the nearest neighbour is sought (DINOv3); it divides micro batches.
    group: Annotated[int, Rule("at least 2, for a neighbour", lambda n: n >= 2), "count"] = 16


@dataclass
class GramConfig:
    """Patch similarities stay those of an earlier teacher (DINOv3, section 4)."""

    # Of the term; 2 in DINOv3's refinement, 1.5 at high resolution; schedule.gram can raise it.
    weight: Factor = 0.0
    # ema: the teacher itself. init: as it was when the stage began, or the weights of `init`.
    # auto: of this run's snapshots the one with the best patches, measured without labels.
    # "@STEP": this run's snapshot of that step. Else RUN@STEP or any MODEL.
    teacher: str = "ema"
    start: Span = 0  # When the term begins in the stage, and when `auto` chooses.
    # Steps between copies of the EMA teacher into the Gram teacher; 10,000 in DINOv3.
    refresh: Steps | None = None
    max_refreshes: Count | None = None  # Copies at most; null: no limit; 3 in DINOv3.
    # Size of the Gram teacher's crops over the student's; 2 and 1.5 in DINOv3; costs its square.
    teacher_scale: Stretch = 1.0
    distortions: bool = True  # Whether its crops have the student's colours; not in DINOv3.


@dataclass
class LossConfig:
    dino: DinoConfig = section(DinoConfig)
    ibot: IbotConfig = section(IbotConfig)
    koleo: KoleoConfig = section(KoleoConfig)
    gram: GramConfig = section(GramConfig)


@dataclass
class OptimConfig:
    """AdamW and its rates."""

    # Factor on schedule.lr's peak and end: batch/256 (DINO), sqrt(batch/1024) (DINOv2),
    # 4 sqrt(batch/1024) (DINOv3).
    lr_scaling: Literal["none", "linear_256", "sqrt_1024", "sqrt_1024_x4"] = "none"
    # Of AdamW; 0.9, 0.99 in DINOv3 7B.
    betas: Annotated[list[float], BETAS, "decay"] = section(lambda: [0.9, 0.999])
    # Largest norm of a gradient; null: off; 30 in DINOv3 7B.
    clip_grad: Annotated[float, POSITIVE, "L2 norm"] | None = 3.0
    # module: backbone and heads are clipped apart (DINOv2, DINOv3). tensor: each tensor is.
    clip_per: Literal["module", "tensor"] = "module"
    # Of the rate per block, counted from the top; 0.9 in DINOv2's short recipe.
    layer_decay: Annotated[float, DECAY, "factor"] = 1.0
    patch_embed_lr: Factor = 1.0  # Of the patch embedding's rate; 0.2 in DINOv2 and DINOv3.
    freeze_last_layer: Span = 0  # How long the prototypes do not move; 1 epoch in DINO.


@dataclass
class Schedule:
    """From start to peak in `warmup` (linear), from peak to end in `decay`, then constant."""

    peak: Scheduled = 0.0  # Value after the warm-up.
    start: Scheduled | None = None  # First value; null: 0 for lr, peak for the others.
    end: Scheduled | None = None  # Last value; null: peak.
    warmup: Span = 0  # From start to peak.
    decay: Span | None = None  # From peak to end; null: all that is left.
    shape: Literal["constant", "linear", "cosine"] = "cosine"  # Of the decay.

    @staticmethod
    def shorthand(value: object) -> object:
        """A schedule written as a number is that number throughout."""
        if isinstance(value, dict):
            return value
        blank = {"start": None, "end": None, "warmup": 0, "decay": None, "shape": "constant"}
        return {"peak": value, **blank}


def schedule(**values: Any) -> Any:
    return section(lambda: Schedule(**values))


@dataclass
class ScheduleConfig:
    """What changes over the steps. A number is constant."""

    # Learning rate; its peak and end are those before optim.lr_scaling.
    lr: Schedule = schedule(peak=1e-3, start=0.0, end=1e-6, warmup="10%")
    weight_decay: Schedule = schedule(peak=0.04, end=0.4)  # DINO; 0.04 constant in DINOv3 7B.
    # Of the teacher; higher for large batches and long runs.
    ema_momentum: Schedule = schedule(peak=0.992, end=1.0)
    # Temperature of the teacher's softmax; lower if training collapses.
    teacher_temp: Schedule = schedule(start=0.04, peak=0.07, warmup="30%", shape="constant")
    dino: Schedule | None = None  # These five replace the constant weights of `loss`.
    dino_local: Schedule | None = None  # loss.dino.local_weight; 1 to 0.5 in DINOv3's Gram stage.
    ibot: Schedule | None = None  # loss.ibot.weight.
    koleo: Schedule | None = None  # loss.koleo.weight.
    gram: Schedule | None = None  # loss.gram.weight; 0 to 2 in 1,000 steps in DINOv3.


@dataclass
class ProbeConfig:
    """In-loop quality of the teacher; the run's losses and randomness stay the same."""

    every: StepsOrNever = free(0)  # Between probes; otherwise also at step 0 and at the end.
    train: str | None = free(None)  # DATA with labels, to learn from.
    val: str | None = free(None)  # DATA with labels, to measure on.
    knn: bool = free(True)  # Weighted k-NN, k = 20.
    linear: bool = free(False)  # Linear probe, DINOv2's grid; takes longer than k-NN.
    # Locality of the patch similarities, and where there are masks k-NN segmentation (mIoU).
    patches: bool = free(False)


@dataclass
class CheckpointConfig:
    """What stays in the run folder."""

    every: Steps = free(1000)  # Between checkpoints; the last step is always kept.
    keep: Count = free(2)  # Newest checkpoints that stay on disk.
    # Between teachers that are kept for good; 0: none.
    snapshot: Annotated[int, NOT_NEGATIVE, "steps"] = free(0)


@dataclass
class HealthConfig:
    """What to do when the teacher's targets or the features collapse (engine/health.py)."""

    # stop: the run fails, with its last checkpoint intact.
    on_collapse: Literal["warn", "stop"] = free("warn")


@dataclass
class GuardConfig:
    """What to do when the teacher becomes worse than it was at step 0 (engine/guard.py)."""

    probe: Literal["knn", "linear", "miou"] = free(
        "knn"
    )  # The probe that counts, here and for best/.
    # How far it may fall below step 0; 0.02 is two points; more where few images are probed.
    tolerance: Annotated[float, NOT_NEGATIVE, "score"] = free(0.02)
    # stop: the run fails, best/ holds the best weights. Null: warn where there is `init` and a
    # probe, nothing otherwise.
    action: Literal["warn", "stop"] | None = free(None)


@dataclass
class TuneConfig:
    """What of the backbone trains; the heads always do."""

    # lora: low-rank adapters, merged on export. partial: what `targets` names.
    mode: Literal["full", "lora", "partial"] = "full"
    # Parts of names: q, v, attn.proj, blocks.11, norm*. []: q, v for lora; a frozen backbone for
    # partial.
    targets: list[str] = section(list)
    rank: Annotated[int, "count"] = 8  # Of the adapters.
    alpha: AnyFactor = 16.0  # Over rank, the adapters' factor.
    dropout: Annotated[float, "probability"] = 0.0  # Of the adapters' inputs.


@dataclass
class TrainConfig:
    """The run. One of total_steps, epochs and images gives its length."""

    output_dir: str = free("runs/default")  # The run folder.
    # Of initial weights, order of images, crops and masks.
    seed: Annotated[int, Rule("in [0, 2^63)", lambda value: 0 <= value < 2**63), "seed"] = 0
    overwrite: bool = free(False)  # Whether to start afresh where a run already stands.
    device: Literal["auto", "cpu", "cuda", "mps"] = free("auto")  # auto: the fastest there is.
    # Of the matrix products; auto: bf16 where it is fast.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Under torchrun or srun; alone it is none. fsdp shards weights, gradients, moments and teachers
    # over the ranks: for what does not fit into one GPU.
    strategy: Literal["none", "ddp", "fsdp"] = free("ddp")
    # torch.compile of the blocks; null: on CUDA. The first steps are slow, the others not.
    compile: bool | None = free(None)
    # Activations are computed again in the backward pass: a third more time for a fraction of the
    # memory; full: of the heads too.
    checkpointing: Literal["none", "blocks", "full"] = free("none")
    # The run saves after this and ends with exit status 3.
    time_limit: Annotated[float, POSITIVE, "hours"] | None = free(None)
    # Ranks wait so long for one that does not answer, before the run ends.
    hang_timeout: Annotated[float, POSITIVE, "seconds"] = free(600.0)
    total_steps: Steps | None = free(None)  # Optimizer steps.
    epochs: Annotated[float, POSITIVE, "passes"] | None = free(None)  # Passes over data.train.
    images: Count | None = free(None)  # Images seen.
    # A MODEL to start from: a run, released weights; `model` must describe the same backbone.
    init: str | None = None
    batch_size: Count = 64  # Images of a step, over all ranks.
    micro_batch_size: Count | None = free(None)  # Images a rank and forward; accumulation is exact.
    log_every: Steps = free(10)  # Between lines of metrics.jsonl.
    # Who shows metrics.jsonl as well.
    mirrors: list[Literal["tensorboard", "wandb"]] = section(list, free=True)
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
    # name: {steps: N, any override}, in order; see engine/stages.py. A longer last stage is no
    # change of the run.
    stages: dict[str, Any] | None = free(None)

    def __post_init__(self):
        settings.check_rules(self)
        validation.check_keys_together(self)


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
    cls_weight: AnyFactor = 1.0  # Of the CLS term of features; 0: off.
    patch_weight: AnyFactor = 1.0  # Of the patch term of features; 0: off.
    # name: {share: of the ranks (1), any override}; see engine/students.py. Each is compared in its
    # own folder.
    students: dict[str, Any] = section(dict, free=True)


@dataclass
class DistillTrainConfig(TrainConfig):
    """What distill.py reads. A student's crops are resized from those that `crops` cuts for all."""

    distill: DistillConfig = section(DistillConfig)


def load_config(
    config: str | None, overrides: list[str], schema: type[TrainConfig] = TrainConfig
) -> TrainConfig:
    """Defaults of the `schema`, then the YAML file with its bases, then `key=value` overrides.

    Raises:
        UserError: one sentence naming the key, what was given and what is allowed.
    """
    layers = settings.read_yaml(settings.find_config(config)) if config else []
    layers += [settings.parse_override(argument) for argument in overrides]
    written = [settings.write_out(schema, layer) for layer in layers]
    cfg = settings.build(schema, reduce(settings.merge, written, {}))
    for number, (_, _, stage) in enumerate(stage_configs(cfg)):
        has_weights = bool(number or cfg.init or stage.init)
        validation.check_gram_teacher(stage, has_weights, later=number > 0)
    return cfg
