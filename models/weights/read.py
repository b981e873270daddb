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

    Prints to standard error how many of its tensors `source` holds, what was left aside, and
    `notes`.

    Args:
        source: the file's name in messages.

    Raises:
        UserError: if names or shapes differ, with those that do and the likely cause.
    """
    own = backbone.state_dict()
    match = _Match()
    for name, wanted in own.items():
        match.add(backbone, name, wanted, tensors, dialect)
    unused = [name for name in tensors if name not in match.used]
    aside = [name for name in unused if re.match(ASIDE, name)]
    match.unexpected = [name for name in unused if name not in aside]

    defaults = match.defaults
    count = len(match.state) - len(defaults)
    report = [f"{source}: matched {count} / {len(own) - len(defaults)} tensors", *notes]
    if "mask_token" in defaults:
        report.append("the mask token, which it lacks, starts at zeros")
    if aside:
        report.append(f"left aside: {shorten(aside)}")
    print("; ".join(report), file=sys.stderr)
    match.check(source)
    # Copied into the parameters that exist, which an optimizer may hold. Those on the meta device
    # hold nothing and are replaced.
    backbone.load_state_dict(match.state, assign=any(tensor.is_meta for tensor in own.values()))


class _Match:
    """The tensors of a backbone, one by one, against those of a file."""

    def __init__(self):
        self.state: dict[str, Tensor] = {}  # of the backbone, by our names
        self.used: set[str] = set()  # their names
        self.defaults: list[str] = []  # our names of tensors that the file may leave out
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        # their name -> our name, their shape, the shape it must have
        self.misshapen: dict[str, tuple[str, list[int], list[int]]] = {}

    def add(
        self,
        backbone: nn.Module,
        name: str,
        wanted: Tensor,
        tensors: Mapping[str, Tensor],
        dialect: Dialect,
    ) -> None:
        """Finds our tensor `name` among `tensors`."""
        names = dialect.names(name) or ()
        self.used.update(names)
        absent = [part for part in names if part and part not in tensors]
        if dialect is not OWN and len(absent) == len(names):
            default = default_tensor(backbone, name, wanted)
            if default is not None:
                self.state[name] = default
                self.defaults.append(name)
                return
        self.missing += absent if names else [name]
        shape = list(wanted.shape)
        if len(names) > 1:
            shape[0] //= len(names)
        present = [part for part in names if part in tensors]
        wrong = [part for part in present if not _fits(tensors[part].shape, shape)]
        for part in wrong:
            self.misshapen[part] = (name, list(tensors[part].shape), shape)
        if names and not absent and not wrong:
            rows = [tensors[part] if part else torch.zeros(shape) for part in names]
            joined = rows[0] if len(rows) == 1 else torch.cat(rows)
            joined = joined.reshape(wanted.shape).to(wanted.dtype, copy=True)
            self.state[name] = joined.contiguous()

    def check(self, source: str) -> None:
        """Raises UserError if anything is missing, unexpected or of another shape."""
        shapes = [
            f"{part} {found} instead of {needed}"
            for part, (_, found, needed) in self.misshapen.items()
        ]
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": shapes,
        }
        faults = [f"{title}: {shorten(names)}" for title, names in groups.items() if names]
        if faults:
            raise UserError(
                f"{source} does not hold the weights of this backbone; {'; '.join(faults)}"
                f"{self._likely_cause()}"
            )

    def _likely_cause(self) -> str:
        by_own = {name: (found, needed) for name, found, needed in self.misshapen.values()}
        for name in ("patch_embed.weight", "model.stem.0.weight"):
            if name in by_own:
                (width, channels, *patch), (own_width, own_channels, *own_patch) = by_own[name]
                if width != own_width:
                    return f"; likely cause: another arch, {width} wide instead of {own_width}"
                if channels != own_channels:
                    return f"; likely cause: {channels} input channels instead of {own_channels}"
                return f"; likely cause: patch size {patch[0]} instead of {own_patch[0]}"
        if "pos_embed" in by_own:
            found, needed = by_own["pos_embed"]
            return (
                f"; likely cause: another image_size or patch_size, {found[1]} positions instead "
                f"of {needed[1]}"
            )
        if self.misshapen:
            return "; likely cause: another arch"
        few, many = _count_blocks(self.missing), _count_blocks(self.unexpected)
        if few or many:
            return f"; likely cause: another depth, {few} blocks too few and {many} too many"
        if not self.missing:
            return ""
        if self.unexpected:
            return "; likely cause: another kind of model"
        return "; likely cause: the file was changed or not written to its end"


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


def shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _fits(found: Iterable[int], needed: Iterable[int]) -> bool:
    """Dialects differ in ones: (1, D) and (1, 1, D) are the same token."""
    return [side for side in found if side != 1] == [side for side in needed if side != 1]


def _count_blocks(names: list[str]) -> int:
    return len({name.rpartition(".norm1.")[0] for name in names if ".norm1." in name})
