"""Words for features: texts are aligned with a frozen backbone (LiT; dino.txt, arXiv 2412.16334).

    python align.py --config configs/align_quickstart.yaml    # laptop CPU, minutes
    torchrun --nproc_per_node 8 align.py --config align_quickstart.yaml \
        align.backbone=/my/weights data.train=list:/my/captions.csv align.head_blocks=2

Each step:
    1. The frozen backbone sees one crop an image. Without blocks in the vision head its tokens were
       computed before the first step, and no image is read.
    2. The vision head makes [CLS; mean of patches] of them, the text transformer a vector of one
       caption an image.
    3. The loss: of all pairs of the batch, over all ranks, the right ones are the most alike.
    4. Head and text follow the gradient.
    5. Their average follows them; with a momentum of 0, the default, it is they themselves.

Started again with the same output_dir, a run goes on where it stopped. eval_text.py, visualize.py
text and load_backbone read output_dir.
"""

from functools import partial

import torch
from torch import Tensor, nn

from data.captions import drawn_captions, some_captions, with_captions
from data.images import Chosen, ImageData
from data.loader import Batch
from data.sources.specs import open_data
from engine import distributed, parallel
from engine.align_config import AlignTrainConfig, alignment_schedules
from engine.cli import config_parser, run_script
from engine.config import load_config
from engine.lengths import length_in_steps
from engine.logger import notice, say_passed_over
from engine.pairs import crop_loader, read_tokens, token_loader
from engine.resume import check_images
from engine.run import Run, run_of_its_own
from engine.stages import Stage, plan_stages
from engine.start import check_batches
from engine.step import OptimizationStep
from engine.trainer import Trainer
from errors import UserError
from evals.alignment import alignment_outputs, cached_tokens, say_cut
from files import with_option
from losses.contrastive import info_nce_loss, sigmoid_loss
from models.alignment import Alignment, AlignmentOutput, build_alignment
from models.ssl_model import count_parameters
from models.text import Tokenizer
from models.weights.load import load_backbone


def main(argv: list[str] | None = None) -> None:
    arguments = config_parser(__doc__, AlignTrainConfig).parse_args(argv)
    cfg = load_config(arguments.config, arguments.overrides, AlignTrainConfig)
    device = distributed.choose_device(cfg.device)
    with run_of_its_own(), distributed.process_group(device, cfg.hang_timeout):
        align(cfg, device)


def align(cfg: AlignTrainConfig, device: torch.device) -> None:
    backbone = open_backbone(cfg).to(device)
    tokenizer = Tokenizer(cfg.align.tokenizer, cfg.align.context)
    images = open_pairs(cfg)
    say_passed_over(images)
    stages = plan_stages(cfg, length_in_steps(cfg, len(images)), alignment_schedules)
    check_batches(stages)
    check_images(cfg, images)
    run = Run(cfg, stages, device, cfg.time_limit)
    if not run.open():
        return
    if sentence := say_cut(tokenizer, some_captions(images)):
        notice(sentence)
    torch.manual_seed(cfg.seed)
    model = new_alignment(cfg, backbone, tokenizer, device)
    texts, head = count_parameters(model.text), count_parameters(model.vision_head)
    notice(f"text {cfg.align.text}: {texts:,} parameters, vision head: {head:,}")
    trainer = Trainer(cfg, model, nn.ModuleDict(), stages, device, run.start_step)
    copies = trainer.copies.make
    outputs = alignment_outputs(cfg, images, backbone, tokenizer, copies, device)
    trainer.start(run, images, outputs)
    for stage in trainer.stages_left():
        align_stage(trainer, stage, backbone, tokenizer)


def align_stage(trainer: Trainer, stage: Stage, backbone: nn.Module, tokenizer: Tokenizer) -> None:
    """The steps of one stage; a run without `stages` has one."""
    cfg, run, device = stage.cfg, trainer.run, trainer.device
    images, tokens = open_tokens(cfg, run, backbone, device)
    if tokens is not None and run.start_step == stage.first == 0:
        for model in (parallel.unwrap(trainer.student), trainer.teacher):
            model.vision_head.standardise(tokens.to(device))
    first_step, update = trainer.enter(stage)
    if tokens is None:
        loader = crop_loader(stage, images, first_step, backbone, device)
    else:
        loader = token_loader(stage, images, tokens, first_step)
    share = cfg.batch_size // distributed.world_size()
    for step, batch in run.steps(loader, first_step):
        distributed.seed_step(cfg.seed, step)
        now = stage.now(step)
        batch = batch.to(device, non_blocking=True)
        place = step * cfg.batch_size + stage.shift + distributed.rank() * share
        texts = drawn_captions(images, batch.images, place, cfg.seed, cfg.align.shuffle)
        tokens = tokenizer(texts).to(device)
        out = align_step(update, step, backbone, batch, tokens, cfg.align.loss, now)
        run.step_done(step + 1, partial(measures, update, step + 1, out, now))


# ----------------------------------------------------------------- the method


def align_step(
    update: OptimizationStep,
    step: int,
    backbone: nn.Module,
    batch: Batch,
    texts: Tensor,
    loss: str,
    now: dict[str, float],
) -> AlignmentOutput:
    """One step of the run; returns the vectors of this rank's pairs.

    Args:
        batch: of crops (b, C, H, W), or of cached tokens (b, 2, D).
        texts: (b, T) of the tokenizer.
        loss: "info_nce" or "sigmoid".
        now: the scheduled values of this step.
    """
    # 1. The frozen backbone, in micro batches: only the loss needs all pairs at once.
    vision = batch.global_crops
    with update.forward("teacher"), torch.no_grad():
        if vision.dim() == 4:
            head = update.model.vision_head
            vision = [head.tokens_of(backbone(part)) for part in vision.split(update.micro_batch)]
            vision = torch.cat(vision)

    for _ in update.micro_batches([batch], [None]):
        # 2. Vision head and text transformer.
        with update.forward("forward"):
            out = update.student(vision, texts)

        # 3. The right pairs are the most alike.
        update.backward({"contrastive": contrastive_loss(out, loss)}, now)

    # 4. Head and text follow the gradient; the scale stays within its bounds.
    update.apply_gradients(step, now["lr"], now["weight_decay"])
    update.model.clamp_scale()

    # 5. The average follows.
    update.update_teacher(now["ema_momentum"])
    return out


def contrastive_loss(out: AlignmentOutput, loss: str) -> Tensor:
    gather = distributed.gather_rows
    if loss == "sigmoid":
        numbers = out.logit_scale, out.logit_bias
        return sigmoid_loss(out.images, out.texts, *numbers, gather)
    return info_nce_loss(out.images, out.texts, out.logit_scale, gather)


@torch.no_grad()
def measures(
    update: OptimizationStep, done: int, out: AlignmentOutput, now: dict[str, float]
) -> dict:
    """What metrics.jsonl records of a step: losses, the factor of cosines, and how often a rank
    finds an image's own text among those of its batch."""
    images, texts = (
        nn.functional.normalize(part.float(), dim=-1) for part in (out.images, out.texts)
    )
    own = torch.arange(len(images), device=images.device)
    found = ((images @ texts.T).argmax(dim=1) == own).float().mean()
    values = {"scale": out.logit_scale.exp(), "found": distributed.mean_over_ranks(found)}
    return update.metrics(done, now) | {f"health/{name}": value for name, value in values.items()}


# ----------------------------------------------------------------- backbone and data


def open_backbone(cfg: AlignTrainConfig) -> nn.Module:
    if cfg.align.backbone is None:
        raise UserError(
            "there is no backbone: give align.backbone a MODEL: a run, released weights, timm:NAME"
        )
    spec = with_option(cfg.align.backbone, f"channels={cfg.data.channels}")
    return load_backbone(spec).requires_grad_(False)


def new_alignment(
    cfg: AlignTrainConfig, backbone: nn.Module, tokenizer: Tokenizer, device: torch.device
) -> Alignment:
    with torch.no_grad():
        size = backbone.preprocessing.size
        seen = backbone(torch.zeros(1, backbone.in_channels, *size, device=device))
    return build_alignment(
        backbone,
        seen.registers.shape[1],
        head_blocks=cfg.align.head_blocks,
        drop_path=cfg.align.drop_path,
        embed_dim=cfg.align.embed_dim,
        text=cfg.align.text,
        tokenizer=tokenizer,
        bias=cfg.align.loss == "sigmoid",
    )


def open_pairs(cfg: AlignTrainConfig) -> ImageData:
    """The images of `data.train` that have captions."""
    return with_captions(open_data(cfg.data.train, cfg.data.channels), cfg.data.train)


def open_tokens(
    cfg: AlignTrainConfig, run: Run, backbone: nn.Module, device: torch.device
) -> tuple[ImageData, Tensor | None]:
    """The pairs of a stage, and CLS and mean patch (n, 2, D) of each where the head needs no more.

    Images that cannot be read are left out and counted.
    """
    images = open_pairs(cfg)
    if cfg.align.head_blocks:
        return images, None
    if cfg.align.features:
        return read_tokens(cfg.align.features, images, backbone.embed_dim)
    rows, unreadable = cached_tokens(cfg, backbone, images, device)
    run.bad_images.add(list(unreadable.items()))
    return Chosen(images, rows.images), rows.features


if __name__ == "__main__":
    run_script(main)
