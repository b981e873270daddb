"""Text for a frozen backbone: two tokenizers, and a causal transformer of our own blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.checks import check_choice
from models.vit import Block

# Ours (tiny, for CPUs; base) and dino.txt's, which gives its released weights their name.
TEXT_SIZES = {
    "tiny": dict(width=128, depth=4, num_heads=4),
    "base": dict(width=512, depth=12, num_heads=8),
    "paper": dict(width=1280, depth=24, num_heads=20),
}
GROUPS = 4  # of texts by their length, on a CPU


class Tokenizer:
    """Texts to numbers: start, the tokens of the text, end, then zeros.

    The end has the largest number of all, by which the transformer finds it.

    Args:
        name: "bytes", one token a byte of UTF-8, or "clip", CLIP's byte pairs from the package
            `open_clip_torch`.
        context: most tokens a text, start and end included; of a longer one the rest is cut.

    Raises:
        UserError: for another name, or if the package is not installed.
    """

    def __init__(self, name: str = "bytes", context: int = 77):
        check_choice("tokenizer", name, ("bytes", "clip"))
        self.name, self.context = name, context
        if name == "bytes":
            self.encode: Callable[[str], Sequence[int]] = lambda text: text.encode()
            self.start, self.end = 256, 257
        else:
            clip = _clip_tokenizer()
            self.encode, self.start, self.end = clip.encode, clip.sot_token_id, clip.eot_token_id
        self.vocabulary = self.end + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, T) int64, T tokens of the longest text, at most `context`."""
        rows = [list(self.encode(text))[: self.context - 2] for text in texts]
        tokens = torch.zeros(len(rows), max(map(len, rows), default=0) + 2, dtype=torch.int64)
        for row, found in zip(tokens, rows, strict=True):
            row[: len(found) + 2] = torch.tensor([self.start, *found, self.end])
        return tokens

    def is_cut(self, text: str) -> bool:
        return len(self.encode(text)) > self.context - 2


def _clip_tokenizer() -> Any:
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise UserError(
            "the tokenizer clip needs the package open_clip_torch: pip install open_clip_torch; "
            "the tokenizer bytes needs none"
        ) from error
    return SimpleTokenizer()


class TextTransformer(nn.Module):
    """Causal transformer; a text's vector is the projection of its end token (dino.txt, CLIP).

    Queries, keys and values have no bias, as in the released dino.txt. `config` holds the
    arguments.

    Args:
        vocabulary: of the tokenizer.
        context: most tokens a text.
        width, depth, num_heads: of the blocks; TEXT_SIZES has three choices.
        embed_dim: E of the vectors.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int,
        width: int,
        depth: int,
        num_heads: int,
        embed_dim: int,
    ):
        super().__init__()
        self.config = dict(vocabulary=vocabulary, context=context, width=width, depth=depth)
        self.config |= dict(num_heads=num_heads, embed_dim=embed_dim)
        options = block_options(width, num_heads, causal=True)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(options, 0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """As dino.txt's, where biases of the feed-forward nets keep PyTorch's values."""
        width, depth = self.config["width"], self.config["depth"]
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            for last in (block.attn.proj, block.mlp.fc2):
                nn.init.normal_(last.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, T) of a `Tokenizer` -> (n, E), not normalised. Padding has no effect: it is behind
        the end token, and no token sees those behind it.
        """
        ends = tokens.argmax(dim=-1)
        if tokens.device.type != "cpu" or len(tokens) < 2 * GROUPS:
            return self._encode(tokens, ends)
        # Lengths are known here: texts of about one length go together, with little padding.
        order = ends.argsort(stable=True)
        groups = [(tokens[rows], ends[rows]) for rows in order.chunk(GROUPS)]
        parts = [self._encode(part[:, : int(last.max()) + 1], last) for part, last in groups]
        return torch.cat(parts)[order.argsort()]

    def _encode(self, tokens: Tensor, ends: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]  # (n, T, D)
        for block in self.blocks:
            x = block(x)
        x = x[torch.arange(len(x), device=x.device), ends]
        return self.projection(self.norm(x))


def block_options(width: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """What `Block` reads, as in dino.txt."""
    options = dict(embed_dim=width, num_heads=num_heads, norm_eps=1e-5, layerscale=None)
    options |= dict(qkv_bias=False, mask_k_bias=False, proj_bias=True)
    return options | dict(ffn="mlp", ffn_ratio=4.0, ffn_bias=True) | changes
