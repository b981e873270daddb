"""Tensors of a file, in any dialect, into a backbone; every tensor is accounted for."""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.layers import KeyMaskedLinear
from models.positions import RotaryPositions
from models.vit import VisionTransformer
from models.weights.dialect import OWN, Dialect

# Tensors of a file that are no part of the backbone: heads, and DINOv3's copy of ConvNeXt's norm.
ASIDE = (
    r"(model\.)?(\w*head(_dist)?s?|classifier|pooler|fc)\.|norms\.3\.|(embeddings\.)?mask_token$"
)
# Tensors of a `VisionTransformer`. Others are a fork's own: no foreign format has a place for them.
PUBLISHED = re.compile(
    r"(cls_token|mask_token|pos_embed|register_tokens|patch_embed\.\w+|rope\.periods"
    r"|(local_)?(cls_)?norm\.\w+|blocks\.\d+\.(norm[12]\.(weight|bias)|ls[12]\.gamma"
    r"|attn\.(qkv|proj)\.(weight|bias|bias_mask)|mlp\.(fc1|fc2|w12|w3)\.(weight|bias)))$"
)
NAMES_SHOWN = 8  # of missing or unexpected tensors; a wrong file has hundreds


@dataclass
class WeightsFile:
    """A file or folder of weights.

    Attributes:
        tensors: the backbone's, by their names without the common prefix.
        aside: names of the other tensors.
        config: config.json, {} if there is none.
    """

    path: Path
    tensors: dict[str, Tensor]
    aside: list[str]
    config: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        return [f"left aside: {shorten(self.aside)}"] if self.aside else []

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def kind(self) -> str | None:
        """Hugging Face's model_type."""
        return self.config.get("model_type")

    @property
    def timm_name(self) -> str | None:
        """timm's name of the architecture, if this is a folder of timm."""
        name = self.config.get("architecture")
        return name.partition(".")[0] if isinstance(name, str) and self.kind is None else None

    @property
    def timm_arguments(self) -> dict[str, Any]:
        arguments = dict(self.config.get("model_args") or {})
        arguments.pop("num_classes", None)
        arguments.pop("global_pool", None)
        return arguments


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that `VisionTransformer` lacks."""
    known = list(inspect.signature(VisionTransformer).parameters)
    unknown = ", ".join(sorted(set(options) - set(known)))
    if unknown:
        raise UserError(f"unknown option {unknown}; known are channels, {', '.join(known)}")


def build_empty(options: Mapping[str, Any]) -> VisionTransformer:
    """On the meta device: the file has every tensor, and drawing billions first is slow.

    Raises:
        UserError: for an unknown option, or a value out of range.
    """
    check_options(options)
    with torch.device("meta"):
        return VisionTransformer(**options)


def load_tensors(
    backbone: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    dialect: Dialect = OWN,
    notes: Iterable[str] = (),
) -> None:
    """Gives `backbone`, which may be on the meta device, copies of `tensors` in its own types.

    Prints to standard error how many of its tensors the file called `source` holds, what was left
    aside, and `notes`.

    Raises:
        UserError: if names or shapes differ, with those that do and the likely cause.
    """
    own = backbone.state_dict()
    fresh = fresh_tensors(backbone, tensors)
    state, defaults, used = dict(fresh), [], set()
    faults: dict[str, list[str]] = {"missing": [], "unexpected": [], "of another shape": []}
    misshapen = {}  # our name -> the shape found, the shape needed
    for name, wanted in ((name, own[name]) for name in own if name not in fresh):
        names = dialect.names(name) or ()
        used.update(names)
        absent = [part for part in names if part and part not in tensors]
        whole = dialect is not OWN and len(absent) == len(names)
        default = default_tensor(backbone, name, wanted) if whole else None
        if default is not None:
            state[name] = default
            defaults.append(name)
            continue
        faults["missing"] += absent if names else [name]
        rows = list(wanted.shape)
        if len(names) > 1:
            rows[0] //= len(names)
        for part in names:
            if part in tensors and not _fits(tensors[part].shape, rows):
                found = list(tensors[part].shape)
                misshapen[name] = found, rows
                faults["of another shape"].append(f"{part} {found} instead of {rows}")
        if names and not absent and name not in misshapen:
            parts = [tensors[part] if part else torch.zeros(rows) for part in names]
            state[name] = _join(parts, wanted)

    unused = [name for name in tensors if name not in used]
    aside = [name for name in unused if re.match(ASIDE, name)]
    faults["unexpected"] = [name for name in unused if name not in aside]
    started = len(defaults) + len(fresh)
    report = [f"{source}: matched {len(state) - started} / {len(own) - started} tensors", *notes]
    report += [f"not in these weights, so they start fresh: {shorten(kinds(fresh))}"] * bool(fresh)
    report += ["the mask token, which it lacks, starts at zeros"] * ("mask_token" in defaults)
    report += [f"left aside: {shorten(aside)}"] * bool(aside)
    report += _other_types(tensors)
    print("; ".join(report), file=sys.stderr)
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {shorten(them)}" for kind, them in faults.items() if them)
        cause = _likely_cause(misshapen, faults["missing"], faults["unexpected"])
        raise UserError(f"{source} does not hold the weights of this backbone; {listed}{cause}")
    # Copied into the parameters that exist, which an optimizer may hold. Those on the meta device
    # hold nothing and are replaced.
    backbone.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))


def _other_types(tensors: Mapping[str, Tensor]) -> list[str]:
    types = {t.dtype for t in tensors.values() if t.is_floating_point()} - {torch.float32}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
    return [f"stored in {names}, loaded as float32"] if types else []


def _join(parts: list[Tensor], wanted: Tensor) -> Tensor:
    """One tensor of ours from its rows, as a copy."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.reshape(wanted.shape).to(wanted.dtype, copy=True).contiguous()


def _likely_cause(
    misshapen: Mapping[str, tuple[list[int], list[int]]], missing: list[str], unexpected: list[str]
) -> str:
    for name in ("patch_embed.weight", "model.stem.0.weight"):
        if name in misshapen:
            (width, channels, *patch), (own_width, own_channels, *own_patch) = misshapen[name]
            if width != own_width:
                return f"; likely cause: another arch, {width} wide instead of {own_width}"
            if channels != own_channels:
                return f"; likely cause: {channels} input channels instead of {own_channels}"
            return f"; likely cause: patch size {patch[0]} instead of {own_patch[0]}"
    if "pos_embed" in misshapen:
        found, needed = misshapen["pos_embed"]
        counts = f"{found[1]} positions instead of {needed[1]}"
        return f"; likely cause: another image_size or patch_size, {counts}"
    if misshapen:
        return "; likely cause: another arch"
    few, many = _count_blocks(missing), _count_blocks(unexpected)
    if few or many:
        return f"; likely cause: another depth, {few} blocks too few and {many} too many"
    if missing and unexpected:
        return "; likely cause: another kind of model"
    return "; likely cause: the file was changed or not written to its end" if missing else ""


def default_tensor(backbone: nn.Module, name: str, wanted: Tensor) -> Tensor | None:
    """The value of a tensor that files may leave out; None for any other tensor.

    The mask of the keys and the periods follow from the architecture; only training needs the
    mask token.
    """
    if name.endswith(".bias_mask"):
        linear = KeyMaskedLinear(1, len(wanted))
        linear.reset_mask()
        return linear.bias_mask
    if name == "rope.periods":
        return RotaryPositions(4 * len(wanted), backbone.config["rope_base"]).periods
    return torch.zeros(wanted.shape) if name == "mask_token" else None


def own_of_fork(backbone: nn.Module) -> list[str]:
    """Names of the tensors that a fork added to `VisionTransformer`."""
    names = backbone.state_dict() if isinstance(backbone, VisionTransformer) else ()
    return [name for name in names if not PUBLISHED.match(name)]


def fresh_tensors(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Initial values of a fork's own tensors of which a file has none of the kind."""
    held = kinds(tensors)
    missing = [name for name in own_of_fork(backbone) if kinds([name])[0] not in held]
    if not missing:
        return {}
    with torch.random.fork_rng(devices=[]):
        initial = type(backbone)(**backbone.config).state_dict()
    return {name: initial[name] for name in missing}


def kinds(names: Iterable[str]) -> list[str]:
    """Names with `*` for the number of the block, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _fits(found: Iterable[int], needed: Iterable[int]) -> bool:
    """Dialects differ in ones: (1, D) and (1, 1, D) are the same token."""
    return [side for side in found if side != 1] == [side for side in needed if side != 1]


def _count_blocks(names: list[str]) -> int:
    return len({name.rpartition(".norm1.")[0] for name in names if ".norm1." in name})
