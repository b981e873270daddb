"""The attentive probe: one learned query pools the frozen patches of the last blocks.

In FINO's form (eval/attention_pooling.py of its authors): the features of a patch in the last four
blocks side by side, a linear map, a norm, attention of one query without projections of query and
output, and a linear classifier. It is the fair probe of models without a trained CLS token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS, BATCH_SIZE, STEPS = 4, 32, 1500
LEARNING_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of a batch of 256
WIDTH, HEADS = 512, 8
CHUNK = 256  # images a forward pass of the heads


@dataclass(frozen=True)
class AttentiveHead:
    """One cell of the grid."""

    blocks: int  # whose patches are read, concatenated
    lr: float  # of a batch of 256; scales linearly with the batch


class AttentivePool(nn.Module):
    """Tokens (B, T, D) in any order -> logits (B, classes)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.reduce, self.norm = nn.Linear(dim, WIDTH), nn.LayerNorm(WIDTH)
        self.query = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.kv, self.classify = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, classes)

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, WIDTH): the mean of the values, weighted by each head's attention."""
        keys, values = self.kv(self.norm(self.reduce(tokens))).chunk(2, dim=-1)
        parts = (self.query.expand(len(tokens), 1, -1), keys, values)
        heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.pool(tokens))


def describe_tokens(backbone: nn.Module, images: Tensor, blocks: int = 1) -> Tensor:
    """A row of features per image, (B, N · blocks · D) float32: patch after patch."""
    layers = backbone.intermediate(images, blocks) if blocks > 1 else [backbone(images)]
    return torch.cat([layer.patches for layer in layers], dim=-1).flatten(1).float()


class AttentiveGrid:
    """Attentive probes trained side by side by AdamW, one for each learning rate.

    They start alike. One that diverges does not affect the others.

    Args:
        dim: of a token, blocks · D.
        batch_size: scales the learning rates by batch_size / 256.
    """

    def __init__(
        self,
        heads: Iterable[AttentiveHead],
        *,
        dim: int,
        classes: int,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
    ):
        self.heads, self.dim, self.device = list(heads), dim, device
        self.pools: list[AttentivePool] = []
        for _ in self.heads:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self.pools.append(AttentivePool(dim, classes).to(device))
        groups = []
        for head, pool in zip(self.heads, self.pools, strict=True):
            rate = head.lr * batch_size / 256
            groups.append({"params": list(pool.parameters()), "lr": rate, "peak": rate})
        self.optimizer = torch.optim.AdamW(groups)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self, rows: Tensor, labels: Tensor, share: float = 1.0) -> None:
        """Updates every head on rows (B, N · D) and labels (B,), at `share` of its rate."""
        tokens = rows.clone().unflatten(1, (-1, self.dim))
        self.optimizer.zero_grad()
        sum(F.cross_entropy(pool(tokens), labels) for pool in self.pools).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]
        self.optimizer.step()

    def classifier(self, head: AttentiveHead) -> Callable[[Tensor], Tensor]:
        pool = self.pools[self.heads.index(head)]

        @torch.inference_mode()
        def classify(rows: Tensor) -> Tensor:
            tokens = rows.to(self.device).float().unflatten(1, (-1, self.dim))
            return torch.cat([pool(part) for part in tokens.split(CHUNK)])

        return classify

    def accuracies(self, rows: Tensor, labels: Tensor) -> dict[AttentiveHead, float]:
        """Top-1 of every head; 0 for one that diverged. A label of -1 is never right."""
        found = {}
        for head in self.heads:
            classify, correct = self.classifier(head), 0
            for part, truth in zip(rows.split(CHUNK), labels.split(CHUNK), strict=True):
                logits = classify(part)
                right = logits.argmax(1).cpu() == truth.cpu()
                correct += int((right & logits.isfinite().all(1).cpu()).sum())
            found[head] = correct / len(rows)
        return found
