"""What can be configured: one dataclass a section; rules between keys: engine/validation.py.

The type of a key holds its rule and unit, the comment above or beside it says what it is. `free`
keys change speed, logging or length; all others may not change when a run goes on.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from engine import settings, validation
from engine.keys import Rule, is_size, is_span, rising, within
from engine.settings import free, listed, section
from engine.stages import stage_configs
from files import expand

Count = Annotated[int, within("[1, inf)"), "count"]
Images = Annotated[int, within("[1, inf)"), "images"]
CountOrZero = Annotated[int, within("[0, inf)"), "count"]
Steps = Annotated[int, within("[1, inf)"), "steps"]
StepsOrNever = Annotated[int, within("[0, inf)"), "steps"]
Span = Annotated[int | str, Rule("a number of steps or a share such as 10%", is_span), "steps or %"]
Seed = Annotated[int, within("[0, 9223372036854775808)", words="in [0, 2^63)"), "number"]
Side = Annotated[int, within("[1, inf)"), "pixels"]
Pixels = Annotated[int | list[int], Rule("a number, or [height, width]", is_size), "pixels"]
Factor = Annotated[float, within("[0, inf)"), "factor"]
AnyFactor = Annotated[float, "factor"]
Positive = Annotated[float, within("(0, inf)"), "number"]
Seconds = Annotated[float, within("(0, inf)"), "seconds"]
Stretch = Annotated[float, within("[1, inf)"), "factor"]
Temperature = Annotated[float, within("(0, inf)"), "temperature"]
Probability = Annotated[float, within("[0, 1]"), "probability"]
Share = Annotated[float, within("[0, 1]"), "share"]
Area = Annotated[list[float], rising("(0, 1]"), "share of area"]
Scheduled = Annotated[float, within("[0, inf)"), "as scheduled"]
Centering = Literal["ema", "sinkhorn", "none"]


@dataclass
class DataConfig:
    """The images, and the processes that load them."""

    train: str = free("scenes?split=train")  # DATA to train on; labels are never used.
    allow_change: bool = free(False)  # Whether a run may go on with other images than before.
    channels: Count = 3  # The model sees so many channels; other images are converted.
    # Mean of each channel; null: that of `init`, else of ImageNet (other channels: its average).
    # Give your own where images are much darker, as in X-rays.
    mean: Annotated[list[float], "value in [0, 1]"] | None = None
    # Standard deviation of each channel, as mean.
    std: Annotated[list[float], within("(0, inf)"), "value in [0, 1]"] | None = None
    # Loader processes a rank; 0: none; null: by cores; more while data_wait_fraction exceeds 0.1.
    workers: CountOrZero | None = free(None)
    max_bad: CountOrZero | None = free(None)  # Unreadable images; null: stops above 10 and 1 %.
    scaled_jpeg: bool = False  # Large JPEG files are decoded no finer than their crops need (ours).
    # Where crops and colours are made (ours). device: workers only read and shrink. auto: device on
    # GPUs on which both were measured (H100), else workers. The views are the same but for rounding
    # and the filter that shrinks. workers: where the GPU is the bottleneck and the cores are not.
    augment_on: Literal["auto", "device", "workers"] = free("auto")


@dataclass
class SizeConfig:
    """One pair of sizes."""

    share: Annotated[float, within("(0, inf)"), "relative"] = 1.0  # Share of the steps.
    global_size: Pixels = 224  # Side of the teacher's view.
    local_size: Pixels = 96  # Side of a local crop.


@dataclass
class CropsConfig:
    """Multi-crop (DINO, section 3). Null: what the policy says."""

    global_size: Pixels = 224  # Side of the teacher's view; a multiple of the patch size.
    global_scale: Area = listed(0.32, 1.0)  # DINOv2; from 0.4 in DINO; higher for small objects.
    global_count: Count = 2  # Global crops of an image (DINO); the teacher's cost grows with it.
    local_size: Pixels = 96  # Side of a local crop, as global_size; 98 for patches of 14 (DINO).
    local_scale: Area = listed(0.05, 0.32)  # Higher where crops lose the object.
    local_count: CountOrZero = 8  # Local crops of an image; each costs a fifth of a global one.
    # Of what becomes a crop; 3/4 to 4/3 in DINO; [1, 1] where shapes carry meaning.
    ratio: Annotated[list[float], rising("(0, inf)"), "width / height"] = listed(3 / 4, 4 / 3)
    policy: str = "natural"  # Of data/augment.py; a later policy drops colour keys before it.
    flip: Probability | None = None  # A crop is flipped left-right; 0 where sides matter.
    rotate90: Probability | None = None  # Turned by 90, 180 or 270 degrees; 0.75 without an up.
    jitter: Probability | None = None  # Brightness, contrast, saturation and hue change together.
    brightness: Share | None = None  # x: 1 - x to 1 + x; DINO 0.4; low where intensity matters.
    contrast: Share | None = None  # As brightness.
    saturation: Share | None = None  # As brightness; 0.2 in DINO; three channels only.
    # Largest turn of the colours; 0.1 in DINO; three channels only; more if colour misleads.
    hue: Annotated[float, within("[0, 0.5]"), "turns"] | None = None
    grayscale: Probability | None = None  # Colour is removed; 0.2 in DINO; three channels only.
    # Global crop 1, the other global crops, local crops are blurred; 1, 0.1, 0.5 in DINO; 0 for
    # small images, where a blur removes the object.
    blur: Annotated[list[float], within("[0, 1]", 3), "probability"] | None = None
    stain: Factor | None = None  # Jitter of stains; three channels only; 0.2 in policy histology.
    solarize: Probability | None = None  # The second global crop is solarized; 0.2 in DINO.
    # Local crops show marks (folder:DIR?marks=FILE.csv) this often (DINO-LG); 0: marks not read.
    guided: Probability = 0.0
    guided_globals: bool = False  # Whether global crops follow marks as well; for small things.
    guided_share: Share = 1.0  # Images whose marks are read; less to see how many it takes.
    # Pairs of sizes, one drawn a step, in place of the two above; for high resolution (DINOv3).
    mix: list[SizeConfig] | None = None


@dataclass
class ModelConfig:
    """The backbone. Null: what the preset says."""

    arch: str = "vit_small"  # A preset of models/vit.py, or timm:NAME, which reads no key below.
    patch_size: Side = 16  # Smaller is better and slower (quadratic).
    positions: Literal["learned", "rope"] = "learned"  # learned: DINO, DINOv2. rope: DINOv3.
    registers: CountOrZero = 0  # Extra tokens against artefacts in patches; 4 in DINOv3.
    layerscale: AnyFactor | None = None  # Initial value; 1e-5 in DINOv2, DINOv3; null: none (DINO).
    # Stochastic depth of the student; 0.1 for small, 0.3 to 0.4 for large models.
    drop_path: Annotated[float, within("[0, 1)"), "probability"] = 0.0
    drop_path_shape: Literal["uniform", "linear"] = "uniform"  # Over depth; linear in DINO only.
    ffn: str | None = None  # Feed-forward layer: mlp, swiglu, swiglu64, ...
    ffn_ratio: Positive | None = None  # Hidden width over embedding width.
    embed_dim: Count | None = None  # Width of a token.
    depth: Count | None = None  # Transformer blocks.
    num_heads: Count | None = None  # A head is 64 wide in all published models but the 7B.
    qkv_bias: bool = True  # Whether queries, keys and values have one; not in DINOv3 7B.
    mask_k_bias: bool = False  # Whether keys have no bias, as it has no effect; true in DINOv3.
    norm_eps: Positive = 1e-6  # Added to variances in layer norms; 1e-5 in DINOv3.
    untie_cls_norm: bool = False  # Whether CLS and registers have a final norm of their own.
    untie_local_cls_norm: bool = False  # Whether those of local crops have one (DINOv3 7B).
    rope_base: Positive = 100.0  # Longest period of the rotation (DINOv3).
    rope_shift: Factor | None = None  # Positions move by up to this; training only.
    rope_jitter: Stretch | None = None  # Each axis is scaled by up to this; training only.
    rope_rescale: Stretch | None = None  # Both axes together; 2 in DINOv3; training only.


@dataclass
class DinoConfig:
    """Prototypes of different crops' CLS agree (DINO)."""

    weight: Factor = 1.0  # Weight of the term; 1 in all papers; 0: off.
    local_weight: Factor = 1.0  # Weight of local crops; 0.5 in DINOv3's Gram stage.
    # K; a few hundred for small data; a flat loss at ln K means too many or too warm a teacher.
    prototypes: Count = 65536
    hidden: Count = 2048  # Width of the projection head; 8192 in DINOv3 7B; less in small models.
    bottleneck: Count = 256  # Width before the prototypes; 384 in DINOv2 (long), 512 in the 7B.
    layers: Count = 3  # Linear layers of the projection head (DINO).
    # plain: DINOv3. weight_norm: DINOv2. unit_norm: DINO's ViT-B (norms stay 1: steadier).
    last_layer: Literal["plain", "weight_norm", "unit_norm"] = "weight_norm"
    # ema: DINO. sinkhorn: DINOv2, DINOv3. With ema keep
    # 10 × (1 - ema_momentum) × student_temp / teacher_temp below 0.5 (DINO: 0.1; 10 steps is the
    # centre's memory), or the teacher outruns its centre and all images swing to one target.
    centering: Centering = "sinkhorn"
    student_temp: Temperature = 0.1  # The same in all papers; move schedule.teacher_temp.


@dataclass
class IbotConfig:
    """Prototypes of hidden patches are those that the teacher sees (iBOT)."""

    weight: Factor = 0.0  # Weight of the term; 1 in iBOT, DINOv2, DINOv3; 0: off.
    prototypes: Count | None = None  # K of a head of its own; null: the DINO head is shared.
    hidden: Count = 2048  # As in `dino`; of a head of its own only, with the next two.
    bottleneck: Count = 256  # As in `dino`.
    layers: Count = 3  # As in `dino`.
    centering: Centering = "sinkhorn"  # As in `dino`.
    student_temp: Temperature = 0.1  # As in `dino`.
    mask_probability: Probability = 0.5  # A global crop gets a mask (DINOv2).
    # Hidden patches of a masked crop (DINOv2).
    mask_ratio: Annotated[list[float], rising("[0, 1)"), "share"] = listed(0.1, 0.5)
    mask_fill: bool = True  # Whether masks reach their size (DINOv3) or may stay short (DINOv2).


@dataclass
class KoleoConfig:
    """Features of different images stay apart (KoLeo)."""

    weight: Factor = 0.0  # Weight of the term; 0.1 in DINOv2 and DINOv3; 0: off.
    # Images in which the nearest neighbour is sought (DINOv3); it divides micro batches.
    group: Annotated[int, within("[2, inf)"), "count"] = 16


@dataclass
class GramConfig:
    """Patch similarities stay those of an earlier teacher (DINOv3, section 4)."""

    # Weight of the term; 2 in DINOv3's refinement, 1.5 at high resolution (or schedule.gram).
    weight: Factor = 0.0
    # ema: the teacher itself. init: as it was when the stage began, or the weights of `init`.
    # auto: of this run's snapshots the one with the best patches, measured without labels.
    # "@STEP": this run's snapshot of that step. Else RUN@STEP or any MODEL.
    teacher: str = "ema"
    start: Span = 0  # When the term begins in the stage, and when `auto` chooses.
    refresh: Steps | None = None  # Steps between copies of the EMA teacher; 10,000 in DINOv3.
    max_refreshes: Count | None = None  # Copies at most; null: no limit; 3 in DINOv3.
    # Size of the Gram teacher's crops over the student's; 2 and 1.5 in DINOv3; costs its square.
    teacher_scale: Stretch = 1.0
    distortions: bool = True  # Whether its crops have the student's colours; not in DINOv3.


@dataclass
class CodingRateConfig:
    """Features of different images fill all directions (SimDINO)."""

    weight: Factor = 0.0  # Weight of the term; 1 in SimDINO, where it replaces KoLeo; 0: off.
    epsilon: Positive = 0.5  # Larger ones count weak directions less.


@dataclass
class AnchorConfig:
    """Features stay near those of the weights with which the stage began."""

    weight: Factor = 0.0  # Weight of the term, about 1; 0: off.
    patches: Factor = 1.0  # Of the patches' part relative to that of CLS.


@dataclass
class LossConfig:
    dino: DinoConfig = section(DinoConfig)
    ibot: IbotConfig = section(IbotConfig)
    koleo: KoleoConfig = section(KoleoConfig)
    gram: GramConfig = section(GramConfig)
    coding_rate: CodingRateConfig = section(CodingRateConfig)
    anchor: AnchorConfig = section(AnchorConfig)


@dataclass
class OptimConfig:
    """AdamW and its rates."""

    # Factor of schedule.lr: b/256 (DINO), sqrt(b/1024) (DINOv2), 4 sqrt(b/1024) (DINOv3), b: batch.
    lr_scaling: Literal["none", "linear_256", "sqrt_1024", "sqrt_1024_x4"] = "none"
    # Decay of AdamW's two moments; 0.9, 0.99 in DINOv3 7B.
    betas: Annotated[list[float], within("[0, 1)", 2), "decay"] = listed(0.9, 0.999)
    clip_grad: Positive | None = 3.0  # Largest L2 norm of a gradient; null: off; 30 in DINOv3 7B.
    # module: backbone and heads are clipped apart (DINOv2, DINOv3). tensor: each tensor is.
    clip_per: Literal["module", "tensor"] = "module"
    # Factor of the rate per block, from the top down; 0.9 in DINOv2's short recipe.
    layer_decay: Annotated[float, within("(0, 1]"), "factor"] = 1.0
    patch_embed_lr: Factor = 1.0  # Factor of the patch embedding's rate; 0.2 in DINOv2, DINOv3.
    freeze_last_layer: Span = 0  # How long the prototypes do not move; 1 epoch in DINO.


@dataclass
class Schedule:
    """Every schedule: from start to peak (linear), from peak to end, then constant."""

    peak: Scheduled = 0.0  # Value after the warm-up.
    start: Scheduled | None = None  # First value; null: 0 for lr, peak for the others.
    end: Scheduled | None = None  # Last value; null: peak.
    warmup: Span = 0  # Length of the rise from start to peak.
    decay: Span | None = None  # Length of the way from peak to end; null: the rest.
    shape: Literal["constant", "linear", "cosine"] = "cosine"  # Shape of the way from peak to end.

    @staticmethod
    def shorthand(value: object) -> object:
        """A schedule written as a number is that number throughout."""
        if isinstance(value, dict):
            return value
        return vars(Schedule(value, shape="constant"))


def schedule(**values: Any) -> Any:
    return section(lambda: Schedule(**values))


@dataclass
class ScheduleConfig:
    """What changes over the steps. A number is constant."""

    # Learning rate; its peak and end are those before optim.lr_scaling.
    lr: Schedule = schedule(peak=1e-3, start=0.0, end=1e-6, warmup="10%")
    weight_decay: Schedule = schedule(peak=0.04, end=0.4)  # DINO; 0.04 constant in DINOv3 7B.
    ema_momentum: Schedule = schedule(peak=0.992, end=1.0)  # Higher for large batches, long runs.
    # Divides the teacher's logits; lower if training collapses.
    teacher_temp: Schedule = schedule(start=0.04, peak=0.07, warmup="30%", shape="constant")
    dino: Schedule | None = None  # These replace the constant weights of `loss`.
    dino_local: Schedule | None = None  # loss.dino.local_weight; 1 to 0.5 in DINOv3's Gram stage.
    ibot: Schedule | None = None  # loss.ibot.weight.
    koleo: Schedule | None = None  # loss.koleo.weight.
    gram: Schedule | None = None  # loss.gram.weight; 0 to 2 in 1,000 steps in DINOv3.
    coding_rate: Schedule | None = None  # loss.coding_rate.weight.
    anchor: Schedule | None = None  # loss.anchor.weight.


@dataclass
class ProbeConfig:
    """In-loop quality of the teacher; the run's losses and randomness stay the same."""

    every: StepsOrNever = free(0)  # Steps between probes; 0: never; else also at both ends.
    train: str | None = free(None)  # DATA with labels, from which probes learn.
    val: str | None = free(None)  # DATA with labels, on which they are measured.
    knn: bool = free(True)  # Whether to run weighted k-NN, k = 20.
    linear: bool = free(False)  # Whether to run a linear probe (DINOv2's grid); slower.
    # Whether to measure locality of patches, and where there are masks their k-NN mIoU.
    patches: bool = free(False)


@dataclass
class CheckpointConfig:
    """What stays in the run folder."""

    every: Steps = free(1000)  # Steps between checkpoints; the last step is always kept.
    keep: Count = free(2)  # Newest checkpoints that stay on disk.
    snapshot: StepsOrNever = free(0)  # Steps between teachers that are kept for good.


@dataclass
class HealthConfig:
    """What to do when the teacher's targets or the features collapse (engine/health.py)."""

    on_collapse: Literal["warn", "stop"] = free("warn")  # stop: the run fails; checkpoints stay.


@dataclass
class GuardConfig:
    """What to do when the teacher becomes worse than it was at step 0 (engine/guard.py)."""

    # What counts, here and for best/; zero_shot: of align.py.
    probe: Literal["knn", "linear", "miou", "zero_shot"] = free("knn")
    tolerance: Factor = free(0.02)  # Allowed fall below step 0; 0.02: two points; more if noisy.
    # stop: the run fails, best/ holds the best. Null: warn where there are `init` and a probe.
    action: Literal["warn", "stop"] | None = free(None)


@dataclass
class TuneConfig:
    """What of the backbone trains; the heads always do."""

    # lora: low-rank adapters, merged on export. partial: what `targets` names.
    mode: Literal["full", "lora", "partial"] = "full"
    # Parts of names: q, v, attn.proj, blocks.11, norm*; []: q, v (lora), a frozen model (partial).
    targets: list[str] = section(list)
    rank: Annotated[int, "count"] = 8  # Rank of the adapters.
    alpha: AnyFactor = 16.0  # Adapters are scaled by alpha / rank.
    dropout: Annotated[float, "probability"] = 0.0  # Dropout of the adapters' inputs.


@dataclass
class TrainConfig:
    """One of total_steps, epochs and images gives its length."""

    output_dir: str = free("runs/default")  # The run folder.
    seed: Seed = 0  # Seed of initial weights, order of images, crops and masks.
    overwrite: bool = free(False)  # Whether to start afresh where a run already stands.
    device: Literal["auto", "cpu", "cuda", "mps"] = free("auto")  # auto: the fastest there is.
    # Number format of the matrix products; auto: bf16 where it is fast.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # How ranks share the work; a rank alone: none. fsdp shards weights, gradients, moments and
    # teachers over the ranks: for what does not fit into one GPU.
    strategy: Literal["none", "ddp", "fsdp"] = free("ddp")
    compile: bool | None = free(None)  # torch.compile of the blocks (slow start); null: on CUDA.
    # What is computed again backwards, a third more time for far less memory; full: heads too.
    checkpointing: Literal["none", "blocks", "full"] = free("none")
    # After this time the run saves and ends with exit status 3.
    time_limit: Annotated[float, within("(0, inf)"), "hours"] | None = free(None)
    hang_timeout: Seconds = free(600.0)  # Ranks wait so long for a silent one; then the run ends.
    total_steps: Steps | None = free(None)  # Optimizer steps.
    epochs: Positive | None = free(None)  # Passes over data.train.
    images: Images | None = free(None)  # Images seen.
    # A MODEL to start from: a run, released weights; `model` must describe the same backbone.
    init: str | None = None
    batch_size: Images = 64  # Images of a step, over all ranks.
    # Images that go through a rank at once; null: all. Exact but for drop path and batch norms.
    micro_batch_size: Images | None = free(None)
    log_every: Steps = free(10)  # Steps between lines of metrics.jsonl.
    mirrors: list[Literal["tensorboard", "wandb"]] = section(list, free=True)  # Copies of the log.
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
    # name: {steps: N, any override}, in order (engine/stages.py); the last stage may grow.
    stages: dict[str, Any] | None = free(None)

    def __post_init__(self):
        settings.check_rules(self)
        validation.check_keys_together(self)


def load_config(
    config: str | None, overrides: list[str], schema: type[TrainConfig] = TrainConfig
) -> TrainConfig:
    """Defaults of the `schema`, then the YAML file with its bases, then `key=value` overrides.

    Raises:
        UserError: one sentence naming the key, what was given and what is allowed.
    """
    cfg = settings.load(config, overrides, schema)
    cfg.output_dir = str(expand(cfg.output_dir))
    for number, (_, _, stage) in enumerate(stage_configs(cfg)):
        later = number > 0
        validation.check_frozen(stage, bool(later or cfg.init or stage.init), later)
    return cfg
