"""What may not be combined: impossible settings are refused before any work is done, one sentence each."""

import re
from typing import Any

from errors import UserError

LENGTHS = ("total_steps", "epochs", "images")


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def validate(cfg: Any) -> None:
    """Refuse impossible values before any work is done; one sentence each."""
    for name in ("batch_size", "log_every"):
        require(getattr(cfg, name) >= 1, f"{name} is {getattr(cfg, name)}; it must be at least 1")
    for name in (*LENGTHS, "micro_batch_size"):
        value = getattr(cfg, name)
        require(value is None or value > 0, f"{name} is {value}; it must be more than 0")
    for name in ("time_limit", "hang_timeout"):
        value = getattr(cfg, name)
        require(value is None or value > 0, f"{name} is {value}; it must be more than 0")
    require(
        cfg.strategy != "fsdp" or cfg.tune.mode == "full",
        f"strategy=fsdp shards what trains, tune.mode={cfg.tune.mode} trains little; use strategy=ddp",
    )
    require(0 <= cfg.seed < 2**63, f"seed is {cfg.seed}; it must lie in [0, 2^63)")
    given = [name for name in LENGTHS if getattr(cfg, name) is not None]
    require(len(given) <= 1, f"{' and '.join(given)} say the same length; give one of them")
    _validate_crops(cfg)
    _validate_model(cfg.model)
    _validate_losses(cfg)
    _validate_gram(cfg.loss.gram)
    _validate_optim(cfg)
    for name in ("every", "keep", "snapshot"):
        require(
            getattr(cfg.checkpoint, name) >= (0 if name == "snapshot" else 1),
            f"checkpoint.{name} is too small",
        )
    probe = cfg.probe
    require(
        probe.every >= 0, f"probe.every is {probe.every}; it must be 0 (off) or a number of steps"
    )
    require(
        probe.every == 0 or bool(probe.train and probe.val),
        "probe.every is set; probe.train and probe.val must be DATA specs with labels",
    )
    guard = cfg.guard
    require(guard.tolerance >= 0, f"guard.tolerance is {guard.tolerance}; it must be 0 or more")
    wanted = "patches" if guard.probe == "miou" else guard.probe
    require(
        guard.action is None or (probe.every > 0 and getattr(probe, wanted)),
        f"guard.action is {guard.action}, but {guard.probe} is not measured; set probe.every and probe.{wanted}, or guard.action=null",
    )


def _validate_crops(cfg: Any) -> None:
    crops = cfg.crops
    require(
        crops.mix is None or len(crops.mix) > 0, "crops.mix is empty; give pairs of sizes, or null"
    )
    for kind in ("global", "local"):
        low, high = _pair(getattr(crops, f"{kind}_scale"), f"crops.{kind}_scale")
        require(
            0 < low <= high <= 1,
            f"crops.{kind}_scale is [{low}, {high}]; it must be [low, high] within (0, 1]",
        )
        for sizes in [crops, *(crops.mix or [])]:
            size = getattr(sizes, f"{kind}_size")
            require(
                min(size_pair(size)) >= cfg.model.patch_size
                or kind == "local"
                and not crops.local_count,
                f"crops.{kind}_size {size} is smaller than model.patch_size {cfg.model.patch_size}",
            )
    for sizes in crops.mix or []:
        require(sizes.share > 0, f"a share of crops.mix is {sizes.share}; it must be more than 0")
    require(
        crops.global_count >= 1,
        f"crops.global_count is {crops.global_count}; it must be at least 1",
    )
    require(
        crops.local_count >= 0, f"crops.local_count is {crops.local_count}; it must be 0 or more"
    )
    require(
        crops.global_count + crops.local_count >= 2 or cfg.loss.dino.weight == 0,
        "the DINO loss compares different crops of an image; crops.global_count + crops.local_count must be at least 2",
    )
    for name in ("flip", "turn", "jitter", "grayscale", "solarize", "guided", "guided_share"):
        value = getattr(crops, name)
        require(
            value is None or 0 <= value <= 1,
            f"crops.{name} is {value}; a probability lies in [0, 1]",
        )
    for name, limit in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
        value = getattr(crops, name)
        require(
            value is None or 0 <= value <= limit,
            f"crops.{name} is {value}; it must lie in [0, {limit}]",
        )
    require(
        crops.stain is None or crops.stain >= 0,
        f"crops.stain is {crops.stain}; it must be 0 or more",
    )
    if crops.blur is not None:
        require(
            len(crops.blur) == 3 and all(0 <= p <= 1 for p in crops.blur),
            f"crops.blur is {crops.blur}; it must be three probabilities: global crop 1, other global crops, local crops",
        )
    data = cfg.data
    require(data.channels >= 1, f"data.channels is {data.channels}; it must be at least 1")
    require(
        data.workers is None or data.workers >= 0,
        f"data.workers is {data.workers}; it must be 0 or more",
    )
    require(
        data.max_bad is None or data.max_bad >= 0,
        f"data.max_bad is {data.max_bad}; it must be 0 or more",
    )
    for name in ("mean", "std"):
        value = getattr(data, name)
        require(
            value is None or len(value) == data.channels,
            f"data.{name} needs {data.channels} values, one a channel",
        )
    require(data.std is None or min(data.std) > 0, "data.std must be positive")


def _pair(value: list, name: str) -> tuple:
    require(len(value) == 2, f"{name} is {value}; it must have two values")
    return tuple(value)


def _validate_model(model: Any) -> None:
    require(model.patch_size >= 1, f"model.patch_size is {model.patch_size}; it must be at least 1")
    require(model.registers >= 0, f"model.registers is {model.registers}; it must be 0 or more")
    require(
        0 <= model.drop_path < 1, f"model.drop_path is {model.drop_path}; it must lie in [0, 1)"
    )
    for name in ("embed_dim", "depth", "num_heads", "ffn_ratio", "norm_eps", "rope_base"):
        value = getattr(model, name)
        require(value is None or value > 0, f"model.{name} is {value}; it must be more than 0")
    for name, least in (("rope_shift", 0), ("rope_jitter", 1), ("rope_rescale", 1)):
        value = getattr(model, name)
        require(
            value is None or value >= least,
            f"model.{name} is {value}; it must be at least {least}, or null",
        )


def _validate_losses(cfg: Any) -> None:
    loss = cfg.loss
    require(
        _largest_weight(cfg, "dino") > 0 or _largest_weight(cfg, "ibot") > 0,
        "loss.dino.weight and loss.ibot.weight are both 0: nothing to learn from",
    )
    for name in ("dino", "ibot", "koleo", "gram"):
        require(getattr(loss, name).weight >= 0, f"loss.{name}.weight is negative")
    for name in ("dino", "ibot"):
        head = getattr(loss, name)
        for key in ("prototypes", "hidden", "bottleneck", "layers"):
            value = getattr(head, key)
            require(
                value is None or value >= 1, f"loss.{name}.{key} is {value}; it must be at least 1"
            )
        require(
            head.student_temp > 0,
            f"loss.{name}.student_temp is {head.student_temp}; it must be more than 0",
        )
    low, high = _pair(loss.ibot.mask_ratio, "loss.ibot.mask_ratio")
    require(
        0 <= low <= high < 1,
        f"loss.ibot.mask_ratio is [{low}, {high}]; it must be [low, high] within [0, 1)",
    )
    require(
        0 <= loss.ibot.mask_probability <= 1,
        f"loss.ibot.mask_probability is {loss.ibot.mask_probability}; it lies in [0, 1]",
    )
    require(
        loss.koleo.group >= 2,
        f"loss.koleo.group is {loss.koleo.group}; a nearest neighbour needs at least 2 images",
    )


def _largest_weight(cfg: Any, term: str) -> float:
    """Of a loss term over the run: its schedule replaces its weight."""
    item = getattr(cfg.schedule, term)
    return (
        getattr(cfg.loss, term).weight
        if item is None
        else max(item.peak, item.start or 0, item.end or 0)
    )


def _validate_gram(gram: Any) -> None:
    require(
        gram.teacher_scale >= 1,
        f"loss.gram.teacher_scale is {gram.teacher_scale}; it must be at least 1",
    )
    require(
        span_is_valid(gram.start),
        f"loss.gram.start is {gram.start}; it is a number of steps or a share such as 10%",
    )
    for name in ("refresh", "max_refreshes"):
        value = getattr(gram, name)
        require(
            value is None or value >= 1,
            f"loss.gram.{name} is {value}; it must be at least 1, or null",
        )
    require(
        gram.refresh is None or gram.teacher != "ema",
        "loss.gram.refresh has no effect with loss.gram.teacher: ema, which follows the student at every step; leave one out",
    )
    require(
        gram.max_refreshes is None or gram.refresh is not None,
        "loss.gram.max_refreshes is given without loss.gram.refresh; give how often as well",
    )


def validate_gram_teacher(cfg: Any, from_weights: bool, later: bool) -> None:
    """Whether the Gram teacher that a stage asks for can exist: it starts from weights, or is not the first."""
    gram = cfg.loss.gram
    if not (gram.weight or cfg.schedule.gram):
        return
    require(
        gram.teacher != "init" or from_weights,
        "loss.gram.teacher: init needs weights to hold on to: give init, or use it in a later stage",
    )
    require(
        gram.teacher != "auto"
        or (cfg.checkpoint.snapshot > 0 and (later or gram.start not in (0, "0%"))),
        "loss.gram.teacher: auto chooses among earlier snapshots: set checkpoint.snapshot, and loss.gram.start or an earlier stage",
    )


def _validate_optim(cfg: Any) -> None:
    optim = cfg.optim
    require(
        optim.clip_grad is None or optim.clip_grad > 0,
        f"optim.clip_grad is {optim.clip_grad}; it must be more than 0, or null",
    )
    require(
        0 < optim.layer_decay <= 1,
        f"optim.layer_decay is {optim.layer_decay}; it must lie in (0, 1]",
    )
    require(
        all(0 <= beta < 1 for beta in _pair(optim.betas, "optim.betas")),
        f"optim.betas are {optim.betas}; each must lie in [0, 1)",
    )
    require(
        optim.patch_embed_lr >= 0,
        f"optim.patch_embed_lr is {optim.patch_embed_lr}; it must be 0 or more",
    )
    spans = {"optim.freeze_last_layer": optim.freeze_last_layer}
    for name, item in vars(cfg.schedule).items():
        if item is not None:
            _validate_range(name, item)
            spans |= {f"schedule.{name}.warmup": item.warmup, f"schedule.{name}.decay": item.decay}
            constant = item.shape != "constant" or item.end in (None, item.peak)
            require(
                constant,
                f"schedule.{name} is constant after its warm-up, but its end {item.end} is not its peak {item.peak}",
            )
    for name, span in spans.items():
        require(
            span is None or span_is_valid(span),
            f"{name} is {span}; a span is a number of steps or a share such as 10%",
        )
    temp = cfg.schedule.teacher_temp
    require(
        min(temp.peak, temp.peak if temp.start is None else temp.start) > 0,
        "schedule.teacher_temp must be more than 0",
    )


def _validate_range(name: str, schedule: Any) -> None:
    """Rates, weights, temperatures and momenta are not negative, and a momentum is at most 1."""
    for key in ("start", "peak", "end"):
        value = getattr(schedule, key)
        require(
            value is None or value >= 0, f"schedule.{name}.{key} is {value}; it must be 0 or more"
        )
        momentum = name == "ema_momentum" and value is not None
        require(
            not momentum or value <= 1, f"schedule.{name}.{key} is {value}; it must lie in [0, 1]"
        )


def size_pair(size: int | list[int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    return (size, size) if isinstance(size, int) else _pair(size, "a size")


def span_is_valid(span: int | str) -> bool:
    if isinstance(span, int):
        return span >= 0
    return bool(re.fullmatch(r"\d+(\.\d+)?%", span))
