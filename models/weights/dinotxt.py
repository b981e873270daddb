"""Released dino.txt files (dinov3_vitl16_dinotxt_vision_head_and_text_encoder): names and sizes.

The backbone is another file. What is not told by shapes is the paper's: heads of 64 numbers,
CLIP's byte pairs, no drop path.
"""

import re

import torch
from torch import Tensor

from errors import UserError

HEAD_WIDTH = 64
# Their names (regular expressions) and ours. "w1" and "w2" become the two halves of our "w12".
NAMES = {
    r"visual_model\.head\.blocks\.(\d+)\.": r"vision_head.blocks.\1.",
    r"visual_model\.head\.ln_final\.": "vision_head.norm.",
    r"visual_model\.head\.linear_projection\.": "vision_head.projection.",
    r"text_model\.backbone\.token_embedding\.": "text.token_embedding.",
    r"text_model\.backbone\.positional_embedding": "text.positions",
    r"text_model\.backbone\.blocks\.(\d+)\.attention_norm\.": r"text.blocks.\1.norm1.",
    r"text_model\.backbone\.blocks\.(\d+)\.attention\.": r"text.blocks.\1.attn.",
    r"text_model\.backbone\.blocks\.(\d+)\.ffn_norm\.": r"text.blocks.\1.norm2.",
    r"text_model\.backbone\.blocks\.(\d+)\.feed_forward\.": r"text.blocks.\1.mlp.",
    r"text_model\.backbone\.ln_final\.": "text.norm.",
    r"text_model\.head\.linear_projection\.": "text.projection.",
    r"logit_scale": "logit_scale",
}


def is_dinotxt(tensors: dict[str, Tensor]) -> bool:
    return "text_model.backbone.positional_embedding" in tensors


def convert_dinotxt(tensors: dict[str, Tensor], registers: int) -> tuple[dict, dict[str, Tensor]]:
    """Arguments of `Alignment` and its tensors, for a backbone with so many registers.

    Raises:
        UserError: for a name that is not dino.txt's.
    """
    own = {}
    for name, tensor in tensors.items():
        if not name.startswith("visual_model.backbone."):  # of a checkpoint; opened apart
            own[_own_name(name)] = tensor.float()
    for name in [name for name in own if ".w1." in name]:
        parts = own.pop(name), own.pop(name.replace(".w1.", ".w2."))
        own[name.replace(".w1.", ".w12.")] = torch.cat(parts)
    own["logit_scale"] = own["logit_scale"].reshape(1)
    vocabulary, text_width = own["text.token_embedding.weight"].shape
    text = dict(vocabulary=vocabulary, context=len(own["text.positions"]), width=text_width)
    text |= dict(depth=_depth(own, "text"), num_heads=text_width // HEAD_WIDTH)
    text["embed_dim"] = len(own["text.projection.weight"])
    width = len(own.get("vision_head.norm.weight", range(text["embed_dim"] // 2)))
    vision = dict(width=width, embed_dim=text["embed_dim"], registers=registers, drop_path=0.0)
    vision |= dict(blocks=_depth(own, "vision_head"), num_heads=width // HEAD_WIDTH)
    if vision["embed_dim"] != 2 * width:  # their linear map has no bias
        own["vision_head.projection.bias"] = torch.zeros(vision["embed_dim"] // 2)
    return dict(vision=vision, text=text, tokenizer="clip"), own


def _own_name(name: str) -> str:
    for pattern, ours in NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, ours, name, count=1)
    raise UserError(f"{name} is no tensor of a dino.txt file")


def _depth(tensors: dict[str, Tensor], part: str) -> int:
    found = (re.match(rf"{part}\.blocks\.(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)
