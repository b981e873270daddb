"""What a resumed run needs of the past: whether it began, the images it began with."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data.images import ImageData
from data.sources.specs import open_data
from engine import checkpoint, settings
from engine.logger import notice
from engine.optim import build_schedules
from engine.stages import plan_stages, stage_configs
from errors import UserError

if TYPE_CHECKING:
    from engine.config import TrainConfig
    from engine.stages import Stage

RECORD = "data.json"  # beside the checkpoints, without which it means nothing


def has_begun(cfg: "TrainConfig") -> bool:
    """Whether the run of a configuration goes on from a checkpoint."""
    return not cfg.overwrite and bool(checkpoint.latest_step(Path(cfg.output_dir)))


def record_images(cfg: "TrainConfig", images: ImageData) -> None:
    """Writes down how many images a run trains on and a hash of their names, for each stage."""
    folder = Path(cfg.output_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(folder / RECORD, json.dumps(_content(cfg, images), indent=1))


def check_images(cfg: "TrainConfig", images: ImageData) -> None:
    """Compares the images of a run that has begun with those that it began with.

    Where the data lies does not matter. Runs of an earlier version have no record; there the keys
    are compared.

    Raises:
        UserError: if they are others, unless `data.allow_change` is set.
    """
    allowed = cfg.data.allow_change
    if not has_begun(cfg):
        return
    file = Path(cfg.output_dir) / "checkpoints" / RECORD
    if file.is_file():
        before, now = json.loads(file.read_text()), _content(cfg, images)
    else:
        old = settings.load_saved(Path(cfg.output_dir) / "config.yaml", type(cfg))
        before, now = _specs(old), _specs(cfg)
    changes = [
        _difference(name, before[name], now[name])
        for name in before
        if name in now and before[name] != now[name]
    ]
    if changes and allowed:
        notice(f"{'; '.join(changes)}; the order of images is another from here on")
    elif changes:
        remedy = "give the old images, another output_dir, or data.allow_change=true"
        raise UserError(f"{cfg.output_dir}: {'; '.join(changes)}; {remedy}")


def say_stretched(cfg: "TrainConfig", stages: list["Stage"], step: int) -> None:
    """Says what a longer run changes of schedules that follow its length, at the step it goes on.

    Shares of a run, such as a warm-up of 10%, grow with it; so a rate may move back.
    """
    if not step:
        return
    old = settings.load_saved(Path(cfg.output_dir) / "config.yaml", type(cfg))
    if old.total_steps == cfg.total_steps or None in (old.total_steps, cfg.total_steps):
        return
    (stage,) = [stage for stage in stages if stage.first <= step < stage.stop][:1]
    before = plan_stages(old, old.total_steps, build_schedules)
    (was,) = [stage for stage in before if stage.first <= step][-1:]
    now, then = stage.now(step), was.now(step)
    changed = [name for name in now if name in then and abs(now[name] - then[name]) > 1e-9]
    if changed:
        moves = ", ".join(f"{name} {then[name]:.4g} -> {now[name]:.4g}" for name in changed)
        notice(
            f"total_steps was {old.total_steps} and is {cfg.total_steps}, which stretches warm-up "
            f"and decay; at step {step}: {moves}"
        )


def _content(cfg: "TrainConfig", images: ImageData) -> dict[str, dict]:
    """Number and fingerprint of the images of the run, and of stages that have their own."""
    found = {"data.train": images}
    for name, _, stage in stage_configs(cfg):
        if stage.data.train != cfg.data.train:
            found[f"stages.{name}.data.train"] = open_data(stage.data.train, cfg.data.channels)
    return {
        name: {"images": len(data), "fingerprint": data.fingerprint()}
        for name, data in found.items()
    }


def _specs(cfg: "TrainConfig") -> dict[str, str]:
    specs = {"data.train": settings.as_place(cfg.data.train)}
    for name, _, stage in stage_configs(cfg) if cfg.stages else ():
        specs[f"stages.{name}.data.train"] = settings.as_place(stage.data.train)
    return specs


def _difference(name: str, before: dict | str, now: dict | str) -> str:
    if isinstance(before, str):
        return f"{name} was {before} and is {now}"
    if before["images"] != now["images"]:
        return f"{name} had {before['images']} images and has {now['images']}"
    return f"{name} has {now['images']} images as before, but others: names or keys changed"
