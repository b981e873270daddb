"""Several stages in one run (DINOv3: pretrain, Gram anchoring, high resolution).

A stage is the run's configuration with some keys overridden, for a number of steps. Steps are
counted over the whole run; schedules, spans and `start` of a stage count from its first step.
A run without `stages:` is one stage without a name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.layers import lay_over
from engine.optim import span_steps
from engine.settings import build, changed_keys, convert, to_dict, write_out
from errors import UserError

if TYPE_CHECKING:
    from engine.config import TrainConfig

Schedules = dict[str, Callable[[int], float]]

# Keys that a stage may override. The state of the run (weights, moments, folder) does not depend on
# them.
ALLOWED = (
    "init", "batch_size", "micro_batch_size", "data.train", "crops.", "schedule.", "loss.gram.",
    "loss.koleo.", "loss.coding_rate.", "loss.anchor.",
    "loss.dino.weight", "loss.dino.local_weight", "loss.dino.student_temp",
    "loss.ibot.weight", "loss.ibot.student_temp", "loss.ibot.mask_",
    "optim.clip_grad", "optim.clip_per", "optim.lr_scaling",
    "optim.freeze_last_layer", "tune.",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Steps first, ..., stop - 1 of the run, under one configuration."""

    name: str | None
    cfg: "TrainConfig"
    first: int
    stop: int
    images_before: int  # that the run has seen when the stage begins
    schedules: Schedules

    @property
    def shift(self) -> int:
        """What to add to step * batch_size for the images seen before a step of this stage."""
        return self.images_before - self.first * self.cfg.batch_size

    def now(self, step: int) -> dict[str, float]:
        """The scheduled values at a step of the run, without the terms that have not begun."""
        return {name: schedule(step - self.first) for name, schedule in self.schedules.items()}


def stage_configs(
    cfg: "TrainConfig",
) -> Iterator[tuple[str | None, int | None, "TrainConfig"]]:
    """(name, steps, configuration) of each stage; (None, None, cfg) where the run has no `stages`.

    Raises:
        UserError: for a stage without steps, and for keys that a stage cannot override.
    """
    if cfg.stages is None:
        yield None, None, cfg
        return
    if not cfg.stages:
        raise UserError("stages is empty; give at least one stage, or leave it out")
    base = to_dict(cfg) | {"stages": None, "init": None}
    for name, keys in cfg.stages.items():
        keys = dict(keys) if isinstance(keys, dict) else {}
        steps = keys.pop("steps", None)
        steps = convert(steps, int, f"stages.{name}.steps")
        if steps < 1:
            raise UserError(f"stages.{name}.steps is {steps}; it must be at least 1")
        try:
            keys = write_out(type(cfg), keys)
            stage = build(type(cfg), lay_over(_without_schedules(base, keys), keys))
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None
        for change in changed_keys(replace(cfg, stages=None, init=None), stage, all_fields=True):
            if not change.startswith(ALLOWED):
                allowed = ", ".join(ALLOWED)
                raise UserError(
                    f"stages.{name} cannot change {change}; a stage may change {allowed}"
                )
        if stage.init and stage.tune.mode == "lora":
            raise UserError(
                f"stages.{name} has an init of its own and tune.mode=lora; "
                "load it in a stage before, or as the run's init"
            )
        yield name, steps, stage


def _without_schedules(base: dict, keys: dict) -> dict:
    """`base` without the schedules that `keys` give: a stage's schedule is not merged."""
    given = keys.get("schedule")
    names = set(given) & set(base["schedule"]) if isinstance(given, dict) else set()
    blank = {"start": None, "end": None, "warmup": 0, "decay": None, "shape": "cosine"}
    replaced = {name: blank | ({"start": 0.0} if name == "lr" else {}) for name in names}
    return base | {"schedule": base["schedule"] | replaced}


def plan_stages(
    cfg: "TrainConfig",
    total_steps: int | None,
    schedules: Callable[["TrainConfig", int], Schedules],
) -> list[Stage]:
    """The stages of a run in order.

    Args:
        total_steps: length of a run without stages; scales those of a run with stages, or None.
        schedules: of a configuration over so many steps.
    """
    parts = list(stage_configs(cfg))
    ends, given = [], 0
    for _, steps, _ in parts:
        given += steps or 0
        ends.append(given)
    if total_steps is not None:
        ends = [round(end * total_steps / given) for end in ends] if given else [total_steps]
    stages, first, images = [], 0, 0
    for (name, _, stage), stop in zip(parts, ends, strict=True):
        if stop <= first:
            raise UserError(
                f"{total_steps} steps are too few for {len(parts)} stages: "
                f"stages.{name} would have none"
            )
        start = span_steps(stage.loss.gram.start, stop - first)
        if start >= stop - first:
            raise UserError(
                f"loss.gram.start {start} is not before the end, after {stop - first} steps"
            )
        stages.append(Stage(name, stage, first, stop, images, schedules(stage, stop - first)))
        first, images = stop, images + (stop - first) * stage.batch_size
    return stages
