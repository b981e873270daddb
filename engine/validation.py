"""Rules between several keys. The rule of a single key is in its type in engine/config.py."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.layers import ONE_OF
from errors import UserError

if TYPE_CHECKING:
    from engine.config import (
        CropsConfig,
        GramConfig,
        ModelConfig,
        ScheduleConfig,
        TrainConfig,
        TuneConfig,
    )


def check_keys_together(cfg: "TrainConfig") -> None:
    """Raises UserError with the sentence of the first rule that is broken."""
    for sentence in broken_rules(cfg):
        raise UserError(sentence)


def broken_rules(cfg: "TrainConfig") -> Iterator[str]:
    """A sentence for each broken rule between keys."""
    given = [name for name in ONE_OF if getattr(cfg, name) is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} say the same length; give one of them"
    if cfg.strategy == "fsdp" and cfg.tune.mode != "full":
        yield f"strategy=fsdp needs tune.mode=full, not {cfg.tune.mode}; use strategy=ddp"
    for name in ("mean", "std"):
        values = getattr(cfg.data, name)
        if values is not None and len(values) != cfg.data.channels:
            yield f"data.{name} needs {cfg.data.channels} values, one a channel"
    yield from _rules_of_tuning(cfg.tune)
    yield from _rules_of_model(cfg.model)
    if not cfg.model.arch.startswith("timm:"):
        yield from _rules_of_crop_sizes(cfg.crops, cfg.model.patch_size)
    if cfg.crops.mix == []:
        yield "crops.mix is empty; give pairs of sizes, or null"
    yield from _rules_of_losses(cfg)
    yield from _rules_of_gram(cfg.loss.gram)
    yield from _rules_of_schedules(cfg.schedule)
    probe, guard = cfg.probe, cfg.guard
    if probe.every and not (probe.train and probe.val):
        yield "probe.every is set; probe.train and probe.val must be DATA specs with labels"
    wanted = "patches" if guard.probe == "miou" else guard.probe
    if guard.action and not (probe.every and getattr(probe, wanted, True)):
        remedy = f"set probe.every and probe.{wanted}, or guard.action=null"
        yield f"guard.action is {guard.action}, but {guard.probe} is not measured; {remedy}"


def _rules_of_tuning(tune: "TuneConfig") -> Iterator[str]:
    unread = {"full": ("targets", "rank", "alpha", "dropout")}
    unread["partial"] = ("rank", "alpha", "dropout")
    defaults = vars(type(tune)())
    for name in unread.get(tune.mode, ()):
        value = getattr(tune, name)
        if value != defaults[name]:
            modes = "lora or partial" if name == "targets" else "lora"
            given = f"tune.{name} is {value}, which tune.mode {tune.mode} does not read"
            yield f"{given}; give tune.mode={modes}, or leave it out"


def _rules_of_model(model: "ModelConfig") -> Iterator[str]:
    """A key that the architecture does not read may not be set."""
    values, defaults = vars(model), vars(type(model)())
    unread, why = [], f"{model.arch} does not read it"
    if model.arch.startswith("timm:"):
        unread = [name for name in values if name != "arch"]
    elif model.positions != "rope":
        unread = [name for name in values if name.startswith("rope_")]
        why = f"model.positions is {model.positions}, which does not read it"
    for name in unread:
        if values[name] != defaults[name]:
            yield f"model.{name} is {values[name]}, but {why}; leave it out"


def _rules_of_crop_sizes(crops: "CropsConfig", patch_size: int) -> Iterator[str]:
    kinds = ("global_size", "local_size") if crops.local_count else ("global_size",)
    for sizes in [crops, *(crops.mix or [])]:
        for kind in kinds:
            size = getattr(sizes, kind)
            if min(size_pair(size)) < patch_size:
                yield f"crops.{kind} {size} is smaller than model.patch_size {patch_size}"


def _rules_of_losses(cfg: "TrainConfig") -> Iterator[str]:
    weights = []
    for name in ("dino", "ibot"):
        plan = getattr(cfg.schedule, name)  # it replaces the weight
        weights += [plan.peak, plan.start, plan.end] if plan else [getattr(cfg.loss, name).weight]
    if not any(weights):
        yield "loss.dino.weight and loss.ibot.weight are both 0: nothing to learn from"
    if cfg.loss.dino.weight and cfg.crops.global_count + cfg.crops.local_count < 2:
        needed = "crops.global_count + crops.local_count must be at least 2"
        yield f"the DINO loss compares different crops of an image; {needed}"


def _rules_of_gram(gram: "GramConfig") -> Iterator[str]:
    if gram.refresh is not None and gram.teacher == "ema":
        why = "which follows the student at every step; leave one out"
        yield f"loss.gram.refresh has no effect with loss.gram.teacher: ema, {why}"
    if gram.max_refreshes is not None and gram.refresh is None:
        yield "loss.gram.max_refreshes is given without loss.gram.refresh; give how often as well"


def _rules_of_schedules(schedules: "ScheduleConfig") -> Iterator[str]:
    for name, item in vars(schedules).items():
        if item and item.shape == "constant" and item.end not in (None, item.peak):
            given = f"but its end {item.end} is not its peak {item.peak}"
            yield f"schedule.{name} is constant after its warm-up, {given}"
    for key in ("start", "peak", "end"):
        momentum = getattr(schedules.ema_momentum, key)
        temp = getattr(schedules.teacher_temp, key)
        if momentum is not None and momentum > 1:
            yield f"schedule.ema_momentum.{key} is {momentum}; it must be in [0, 1]"
        if temp == 0 and key != "end":
            yield f"schedule.teacher_temp.{key} is {temp}; it must be more than 0"


def check_frozen(cfg: "TrainConfig", has_weights: bool, later: bool) -> None:
    """Raises UserError if a stage cannot have its Gram teacher or its anchor.

    Args:
        has_weights: whether the stage starts from trained weights, of `init` or an earlier stage.
        later: whether it is not the first stage.
    """
    gram = cfg.loss.gram
    if (cfg.loss.anchor.weight or cfg.schedule.anchor) and not has_weights:
        remedy = "give init, or use it in a later stage"
        raise UserError(f"loss.anchor needs weights from before the stage: {remedy}")
    if not (gram.weight or cfg.schedule.gram):
        return
    if gram.teacher == "init" and not has_weights:
        remedy = "give init, or use it in a later stage"
        raise UserError(f"loss.gram.teacher: init needs weights from before the stage: {remedy}")
    has_earlier = cfg.checkpoint.snapshot > 0 and (later or gram.start not in (0, "0%"))
    if gram.teacher == "auto" and not has_earlier:
        remedy = "set checkpoint.snapshot, and loss.gram.start or an earlier stage"
        raise UserError(f"loss.gram.teacher: auto chooses among earlier snapshots: {remedy}")


def size_pair(size: int | list[int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise UserError(f"a size is {size}; it must have two values")
    return tuple(size)
