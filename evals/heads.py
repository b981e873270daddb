"""Trained heads on a frozen backbone, and how they are kept: the systems of docs/systems.md.

A head takes the maps of some blocks and has two methods:

    loss(maps, cls, targets, size) -> a number; the targets are a list, of each image its own
    predict(maps, cls, size) -> scores (B, K, H, W), depth (B, 1, H, W), or boxes of each image

`maps` are (B, D, h, w) of each block after the final norm, `cls` (B, D) of the same blocks. `size`
is (H, W) in pixels: in `loss` of the images, in `predict` of the result.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import distributed
from engine.cli import StoppedEarly
from engine.logger import notice
from errors import UserError
from evals.dense import FrozenPatches, LinearHead, Recipe, schedule
from evals.depth import DepthHead
from evals.detection import DetectionHead
from evals.dpt import DPTHead
from evals.mask_head import MaskHead
from evals.patches import Patches
from models.weights.load import load_backbone

SAVE_EVERY = 60.0  # seconds
SETTINGS, WEIGHTS, TRAINING = "head.json", "head.safetensors", "training.pt"


class LinearMaps(nn.Module):
    """A linear head of evals/dense.py or evals/depth.py as a head on maps."""

    def __init__(self, dims: Sequence[int], patch_size: int, **options: Any):
        super().__init__()
        build = DepthHead if "low" in options else LinearHead
        self.head = build(sum(dims), **rename(options, {"classes": "outputs"}))

    def predict(self, maps: Sequence[Tensor], cls: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        tokens = torch.cat(list(maps), dim=1).flatten(2).mT
        values = self.head(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        grid = maps[0].shape[-2:]
        return nn.functional.interpolate(values.mT.unflatten(2, grid), tuple(size), mode="bilinear")


def rename(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in options.items()}


HEADS: dict[tuple[str, str], Callable[..., nn.Module]] = {
    ("segmentation", "linear"): LinearMaps,
    ("depth", "linear"): LinearMaps,
    ("segmentation", "mask"): MaskHead,
    ("depth", "dpt"): DPTHead,
    ("detection", "fcos"): DetectionHead,
    ("detection", "linear"): DetectionHead,
}


class ChosenBlocks(nn.Module):
    """A frozen backbone that gives the tokens of several blocks side by side.

    Its patches are (B, 1 + N, L·D), CLS first. A backbone without `intermediate` gives its last
    map, whatever `blocks` are.

    Args:
        blocks: indices from 0; None takes four evenly spaced ones, the last among them (2, 5, 8 and
            11 of 12, as DINOv3's heads).

    Raises:
        UserError: if there is no such block.
    """

    def __init__(self, backbone: nn.Module, blocks: Sequence[int] | None = None):
        super().__init__()
        self.backbone, self.patch_size = backbone, backbone.patch_size
        self.blocks = [-1]
        if hasattr(backbone, "intermediate"):
            depth = len(backbone.blocks)
            quarters = [max(0, round(depth * k / 4) - 1) for k in (1, 2, 3, 4)]
            self.blocks = quarters if blocks is None else list(blocks)
            if not all(0 <= block < depth for block in self.blocks):
                given = " ".join(map(str, self.blocks))
                raise UserError(f"--layers is {given}; this model has blocks 0 to {depth - 1}")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        several = self.blocks != [-1]
        model = self.backbone
        found = model.intermediate(images, self.blocks) if several else [model(images)]
        tokens = [torch.cat([summary(one)[:, None], one.patches], dim=1) for one in found]
        return replace(found[-1], patches=torch.cat(tokens, dim=-1))


def summary(features: Any) -> Tensor:
    """(B, D): CLS, or the mean of the patches where CLS is of another width (pixels)."""
    cls, patches = features.cls, features.patches
    return cls if cls.shape[-1] == patches.shape[-1] else patches.mean(dim=1)


def as_maps(
    tokens: Tensor, grid: tuple[int, int], dims: Sequence[int], count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens (B, 1 + N, ΣD) of `ChosenBlocks` -> maps and CLS of each block, `count` of them.

    One map stands for all where the backbone gives only that.
    """
    parts = tokens.split(list(dims), dim=-1)
    parts = parts * count if len(parts) == 1 else parts
    cls = [part[:, 0] for part in parts]
    return [part[:, 1:].mT.unflatten(2, grid) for part in parts], cls


@dataclass
class HeadSettings:
    """What a kept head is: head.json.

    Attributes:
        options: of the head's class, besides dims and patch size.
        dims: D of each block's map; `blocks` are their indices.
        size: short side in pixels, or (height, width), of the images it was trained on.
        fingerprint: of the backbone's weights.
        maps: how many maps the head takes; more than len(dims) where one stands for all.
    """

    task: str
    head: str
    model: str
    options: dict[str, Any]
    dims: list[int]
    maps: int
    blocks: list[int]
    patch_size: int
    size: list[int]
    fingerprint: str
    training: dict[str, Any]

    def build(self, seed: int = 0) -> nn.Module:
        dims = self.dims * self.maps if len(self.dims) == 1 else self.dims
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return HEADS[self.task, self.head](dims, self.patch_size, **self.options)


class TrainedHead(nn.Module):
    """A frozen backbone with its head, both in eval mode.

    Attributes:
        settings: see `HeadSettings`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, settings: HeadSettings):
        super().__init__()
        self.backbone, self.head, self.settings = backbone, head, settings
        self.windowed = ChosenBlocks(backbone, settings.blocks)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, size: Sequence[int] | None = None) -> Any:
        """Normalised images (B, C, H, W) -> what the head predicts at `size`, by default theirs."""
        features = self.windowed(images)
        maps, cls = self.read(features.patches.float(), features.grid)
        return self.head.predict(maps, cls, size or images.shape[-2:])

    def read(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
        return as_maps(tokens, grid, self.settings.dims, self.settings.maps)


def fingerprint(backbone: nn.Module) -> str:
    """Twelve hexadecimal digits that tell a backbone's weights from others'."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def save_head(folder: Path, trained: TrainedHead) -> None:
    """head.safetensors and head.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in trained.head.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(asdict(trained.settings), indent=1) + "\n")


def load_head(
    folder: str | Path, model: str | None = None, device: str | torch.device = "cpu"
) -> TrainedHead:
    """A head that `eval_dense.py --output` kept, on its backbone.

    Args:
        model: MODEL of the backbone, where it is no longer where it was.

    Raises:
        UserError: if there is no head, or the backbone is another than it was trained on.
    """
    settings = read_settings(Path(folder))
    if settings is None:
        raise UserError(
            f"{folder} holds no {SETTINGS}, so no head that eval_dense.py --output kept"
        )
    name = model or settings.model
    backbone = load_backbone(name)
    if fingerprint(backbone) != settings.fingerprint:
        raise UserError(
            f"the head in {folder} was trained on {settings.model}, and {name} has other weights"
        )
    head = settings.build()
    head.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return TrainedHead(backbone, head, settings).to(device)


def read_settings(folder: Path) -> HeadSettings | None:
    path = folder / SETTINGS
    return HeadSettings(**json.loads(path.read_text())) if path.is_file() else None


# Training.


@torch.inference_mode(False)
def train_head(
    trained: TrainedHead,
    patches: FrozenPatches,
    recipe: Recipe,
    *,
    steps: int,
    seed: int,
    folder: Path | None = None,
    minutes: float = math.inf,
) -> None:
    """Trains the head on rank 0, for all ranks, by AdamW with warm-up and cosine.

    With a folder it is saved there every minute, and goes on from there.

    Raises:
        StoppedEarly: after `minutes`, with what there is saved.
        UserError: if the folder holds a head with other settings.
    """
    stopped = state = None
    if distributed.is_main():
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            training = Training(trained, recipe, steps, seed, folder)
            stopped = training.run(patches, time.monotonic() + 60 * minutes)
        state = {name: tensor.cpu() for name, tensor in trained.head.state_dict().items()}
    stopped, state = distributed.from_main((stopped, state))
    if stopped is not None:
        raise StoppedEarly(stopped)
    trained.head.load_state_dict(state)
    trained.head.eval()


class Training:
    """One head in training: its optimizer, its step, and the file that it goes on from."""

    def __init__(
        self, trained: TrainedHead, recipe: Recipe, steps: int, seed: int, folder: Path | None
    ):
        self.trained, self.recipe, self.steps, self.seed = trained, recipe, steps, seed
        self.head, self.step, self.folder = trained.head, 0, folder
        torch.manual_seed(seed)
        settings = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
        self.optimizer = torch.optim.AdamW(self.head.parameters(), recipe.lrs[0], **settings)
        if folder is not None:
            self.go_on(folder)

    def go_on(self, folder: Path) -> None:
        before = read_settings(folder)
        if before is None:
            return
        now = json.loads(json.dumps(asdict(self.trained.settings)))
        if changed := [name for name, value in asdict(before).items() if value != now[name]]:
            what = ", ".join(changed)
            raise UserError(f"{folder} holds a head with another {what}; give another --output")
        if not (folder / TRAINING).is_file():
            self.head.load_state_dict(load_file(folder / WEIGHTS))
            self.step = self.steps
            notice(f"{folder} holds this head, trained to its end; it is not trained again")
            return
        state = torch.load(folder / TRAINING, weights_only=True)
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step = state["step"]
        notice(f"going on at step {self.step} of {self.steps}")

    def save(self) -> None:
        if self.folder is None:
            return
        save_head(self.folder, self.trained)
        state = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "random": torch.get_rng_state()}
        torch.save(state, self.folder / "training.new")
        (self.folder / "training.new").replace(self.folder / TRAINING)

    def run(self, patches: FrozenPatches, until: float) -> str | None:
        """To the end, or until a time of `time.monotonic`; then says where it stopped."""
        device, saved = patches.device, time.monotonic()
        self.head.train()
        batches = patches.draws(self.steps, self.recipe.batch_size, self.seed, self.step)
        for batch in patches.progress(batches):
            self.update(batch, device)
            now = time.monotonic()
            if now > until and self.step < self.steps:
                self.save()
                return (
                    f"the time was up after step {self.step} of {self.steps}; "
                    "the same command goes on from there"
                )
            if now > saved + SAVE_EVERY:
                self.save()
                saved = now
        if self.folder is not None:
            save_head(self.folder, self.trained)
            (self.folder / TRAINING).unlink(missing_ok=True)
        return None

    def update(self, batch: list[Patches], device: torch.device) -> None:
        done = self.step / self.steps
        if hasattr(self.head, "set_progress"):
            self.head.set_progress(done)
        self.optimizer.param_groups[0]["lr"] = self.recipe.lrs[0] * schedule(done, self.recipe)
        self.optimizer.zero_grad()
        p = self.trained.settings.patch_size
        for alike in of_one_shape(batch):
            tokens = torch.stack([item.tokens for item in alike]).to(device)
            targets = [to_device(item.target, device) for item in alike]
            grid = alike[0].grid
            size = grid[0] * p, grid[1] * p
            loss = self.head.loss(*self.trained.read(tokens, grid), targets, size)
            (loss * len(alike) / len(batch)).backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.step += 1


def of_one_shape(batch: Sequence[Patches]) -> list[list[Patches]]:
    """Images whose grids and targets have one shape, together."""
    groups: dict[Any, list[Patches]] = {}
    for item in batch:
        shape = getattr(item.target, "shape", None)
        groups.setdefault((item.grid, shape), []).append(item)
    return list(groups.values())


def to_device(target: Any, device: torch.device) -> Any:
    if isinstance(target, dict):
        return {name: value.to(device) for name, value in target.items()}
    return target.to(device)
