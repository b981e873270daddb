"""Images and texts in one space: vision head, text transformer, and the scale of their products."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from files import expand, split_query
from models.features import Features
from models.text import TEXT_SIZES, TextTransformer, Tokenizer
from models.vision_head import VisionHead
from models.weights.dinotxt import convert_dinotxt, is_dinotxt
from models.weights.files import read_json, read_weights, write_json, write_tensors
from models.weights.load import find_weights, is_local, load_backbone
from models.weights.own import save_teacher

LARGEST_SCALE = math.log(100)  # of the learned log factor (CLIP, dino.txt)
CONFIG, WEIGHTS = "text.json", "text.safetensors"


@dataclass
class AlignmentOutput:
    """Vectors of b pairs, not normalised, and the learned numbers of the loss."""

    images: Tensor  # (b, E)
    texts: Tensor  # (b, E)
    logit_scale: Tensor  # (1,) log of the factor of cosines
    logit_bias: Tensor | None  # (1,) of the sigmoid loss


class Alignment(nn.Module):
    """All that trains on a frozen backbone. `config` rebuilds it.

    Args:
        vision, text: arguments of `VisionHead` and `TextTransformer`.
        tokenizer: name of a `Tokenizer`.
        bias: whether there is a learned bias, for the sigmoid loss, which starts at factor 10 and
            bias -10 (SigLIP); otherwise the factor starts at 1 / 0.07 (CLIP).
    """

    def __init__(
        self, vision: dict[str, Any], text: dict[str, Any], tokenizer: str, bias: bool = False
    ):
        super().__init__()
        self.config = dict(vision=vision, text=text, tokenizer=tokenizer, bias=bias)
        self.vision_head, self.text = VisionHead(**vision), TextTransformer(**text)
        # Of one element, because FSDP does not shard scalars.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10 if bias else 1 / 0.07)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0])) if bias else None

    @property
    def blocks(self) -> list[nn.Module]:
        """What is recomputed, compiled and sharded one by one."""
        return [*self.vision_head.blocks, *self.text.blocks]

    def forward(self, vision_tokens: Tensor, text_tokens: Tensor) -> AlignmentOutput:
        """Tokens of `VisionHead.tokens_of` and of a `Tokenizer`, row i of both a pair."""
        bias = None if self.logit_bias is None else 1.0 * self.logit_bias
        images, _ = self.vision_head(vision_tokens)
        return AlignmentOutput(images, self.text(text_tokens), 1.0 * self.logit_scale, bias)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        self.logit_scale.clamp_(0.0, LARGEST_SCALE)


def build_alignment(
    backbone: nn.Module,
    registers: int,
    *,
    head_blocks: int,
    drop_path: float,
    embed_dim: int | None,
    text: str,
    tokenizer: Tokenizer,
    bias: bool = False,
) -> Alignment:
    """A new one for a backbone with so many registers; `embed_dim` None is twice its width."""
    width = backbone.embed_dim
    heads = getattr(backbone, "num_heads", None) or max(1, width // 64)
    vision = dict(width=width, embed_dim=embed_dim or 2 * width, blocks=head_blocks)
    vision |= dict(num_heads=heads, registers=registers, drop_path=drop_path)
    sizes = dict(vocabulary=tokenizer.vocabulary, context=tokenizer.context, **TEXT_SIZES[text])
    sizes["embed_dim"] = vision["embed_dim"]
    return Alignment(vision, sizes, tokenizer.name, bias)


class TextModel(nn.Module):
    """A frozen backbone and its alignment: vectors of images, patches and texts, normalised.

    Attributes:
        preprocessing, patch_size, in_channels: of the backbone.
    """

    def __init__(self, backbone: nn.Module, alignment: Alignment, tokenizer: Tokenizer):
        super().__init__()
        self.backbone, self.alignment, self.tokenizer = backbone, alignment, tokenizer
        self.preprocessing, self.patch_size = backbone.preprocessing, backbone.patch_size
        self.in_channels = backbone.in_channels
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Features:
        """(B, C, H, W) normalised -> `Features` with cls (B, E) and patches (B, N, E / 2), both of
        L2 norm 1. Patches meet the second half of a text's vector (`encode_texts`).
        """
        features = self.backbone(images)
        vectors, patches = self.alignment.vision_head(
            self.alignment.vision_head.tokens_of(features)
        )
        vectors, patches = (F.normalize(part.float(), dim=-1) for part in (vectors, patches))
        return Features(vectors, patches[:, :0], patches, features.grid)

    @torch.no_grad()
    def encode_texts(self, texts: list[str], half: str = "both", batch: int = 256) -> Tensor:
        """(n, E) of L2 norm 1; of `half` "patches" its second half (n, E / 2), normalised."""
        device = self.alignment.logit_scale.device
        parts = [texts[first : first + batch] for first in range(0, len(texts), batch)]
        rows = [self.alignment.text(self.tokenizer(part).to(device)).float() for part in parts]
        vectors = torch.cat(rows)
        if half == "patches":
            vectors = vectors[:, vectors.shape[1] // 2 :]
        return F.normalize(vectors, dim=-1)

    def encode_classes(
        self, names: list[list[str]], templates: list[str], half: str = "both"
    ) -> Tensor:
        """(K, E): of each class the normalised mean over its names in all templates (CLIP)."""
        vectors = []
        for synonyms in names:
            texts = [template.replace("{}", name) for template in templates for name in synonyms]
            vectors.append(F.normalize(self.encode_texts(texts, half).mean(dim=0), dim=-1))
        return torch.stack(vectors)


def save_alignment(
    alignment: Alignment, folder: str | Path, backbone: nn.Module, spec: str, preprocessing: Any
) -> None:
    """The backbone as `save_teacher` writes it, text.json and text.safetensors beside it.

    Of a backbone that no folder holds (raw pixels) text.json keeps the MODEL, `spec`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = hasattr(backbone, "config")
    if held:
        save_teacher(backbone, folder, preprocessing)
    write_json(folder / CONFIG, alignment.config | ({} if held else {"backbone": spec}))
    write_tensors(folder / WEIGHTS, alignment.state_dict())


def text_files(spec: str) -> list[Path]:
    """text.json and text.safetensors beside the weights of a MODEL; [] where there are none."""
    if not is_local(split_query(spec)[0]):
        return []
    path = find_weights(split_query(spec)[0])
    files = [(path if path.is_dir() else path.parent) / name for name in (CONFIG, WEIGHTS)]
    return files if all(file.is_file() for file in files) else []


def load_text_model(spec: str | Path) -> TextModel:
    """A run of align.py, or a folder that it wrote: backbone, vision head and text, on the CPU.

    Or FILE?backbone=MODEL: a released dino.txt file on the backbone that it was made for.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        UserError: if it has no text, or the files do not fit.
    """
    file, query = split_query(str(spec))
    if query.startswith("backbone="):
        return _load_dinotxt(expand(file), query.removeprefix("backbone="))
    files = text_files(str(spec))
    if not files:
        raise UserError(f"{spec} is a model without texts; align.py makes one that has them")
    folder, config = files[0].parent, read_json(files[0])
    backbone = load_backbone(config.pop("backbone", folder))
    tensors, where = read_weights(folder / WEIGHTS), f"{folder / CONFIG} and {WEIGHTS}"
    return _assemble(backbone, config, tensors, where)


def _load_dinotxt(file: Path, spec: str) -> TextModel:
    tensors = read_weights(file)
    if not is_dinotxt(tensors):
        raise UserError(f"{file} holds no text transformer under the names of dino.txt")
    backbone = load_backbone(spec)
    registers = getattr(backbone, "num_registers", 0)
    return _assemble(backbone, *convert_dinotxt(tensors, registers), f"{file} and {spec}")


def _assemble(backbone: nn.Module, config: dict, tensors: dict, where: str) -> TextModel:
    try:
        alignment = Alignment(**config)
        alignment.load_state_dict(tensors)
        tokenizer = Tokenizer(config["tokenizer"], config["text"]["context"])
        if alignment.vision_head.config["width"] != backbone.embed_dim:
            raise KeyError(f"a backbone of {backbone.embed_dim} numbers a token")
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where} do not fit: {reason}") from error
    return TextModel(backbone, alignment, tokenizer)
