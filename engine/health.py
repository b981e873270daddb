"""Is the run alive? Cheap measures of targets and features, taken when the logger writes, and what they say."""

import math
from typing import Any

import torch
from torch import Tensor

from engine import distributed
from engine.cli import RunFailed

# When a measure means collapse. Ours; from about 80 runs of up to 3,300 steps with 32 to 2,048 prototypes.
ONE_PROTOTYPE = (
    0.9  # least top_share; 0.1 when balanced; a moving centre ends such moments in 60 steps
)
SAME_TARGETS = 0.002  # largest teacher_kl in nats; above 0.006 in all runs that lived, 0.0001 to 0.001 in dead ones
SAME_FEATURES = 0.01  # largest feature_std; above 0.02 in all runs
HOLDS = 80  # steps that it must last: eight time constants of a centre with momentum 0.9
LOOKS = 4  # and how often it must have been seen
SAME_PICTURE = 0.9  # least share of the pictures looked at
PICTURES = 32  # looked at before the first step

REMEDIES = {
    "prototype": "usual causes: no centring, a teacher temperature so low that one prototype wins every time, a "
    "learning rate too high; try loss.dino.centering=sinkhorn, a higher schedule.teacher_temp, a lower "
    "schedule.lr.peak",
    "targets": "usual causes: a teacher temperature near or above the student's, no centring, a learning rate or an "
    "EMA too fast; try a lower schedule.teacher_temp, loss.dino.centering=sinkhorn, a lower schedule.lr.peak, a higher "
    "schedule.ema_momentum",
    "features": "usual causes: a learning rate too high, images that hardly differ; try a lower schedule.lr.peak, "
    "loss.koleo.weight=0.1, other images in data.train",
    "pictures": "there is nothing to tell apart; usual causes: a wrong data.train, an export that wrote one image many "
    "times; try other images",
}


@torch.no_grad()
def health(
    teacher_probs: Tensor, features: Tensor, patches: Tensor | None = None
) -> dict[str, Tensor]:
    """Measures of one step, the same on every rank.

    Args:
        teacher_probs: (..., K) targets of one step, rows sum to 1.
        features: (G, B, D) the student's CLS features before the head, of G views of B images; (B, D) is one view.
        patches: (G·B, N, D) the student's patch features; None where they are not measured.

    Returns:
        teacher_entropy: mean entropy of a target as a share of ln K: near 1 uniform, near 0 one-hot.
        teacher_kl: mean KL divergence of a target from the mean target, in nats: 0 when all images get the same.
        prototype_use: exp(entropy of the mean target) / K, the share of the prototypes in use.
        top_share: the part of the targets that the most used prototype takes, from 1 / K to 1.
        feature_std: mean over dimensions of the standard deviation over images, of L2-normalised features times
            sqrt(D); 1 for independent dimensions, 0 when all images look alike.
        effective_rank: exp(entropy of the singular values' shares) of the centred features (RankMe, arXiv 2210.02885),
            at most min(G·B - 1, D).
        view_match: how often the first two views of an image are more alike than views of two images, over all pairs
            of images: 0.5 is chance. With at least two views and two images.
        patch_similarity: mean cosine between two patches of a view; 1 when all patches look alike.
    """
    probs = teacher_probs.flatten(0, -2).float()
    features = features.float().nan_to_num()  # a dying run is told so by its loss
    log_k = math.log(max(probs.shape[1], 2))
    mean = distributed.mean_over_ranks(probs.mean(dim=0))
    entropy, mean_entropy = _entropy(probs).mean(), _entropy(mean)
    views = torch.nn.functional.normalize(features, dim=-1)
    normalised = views.flatten(0, -2)
    shares = torch.linalg.svdvals(normalised - normalised.mean(dim=0))
    shares = shares / shares.sum().clamp(min=1e-12)
    local = {
        "teacher_entropy": entropy / log_k,
        "teacher_kl": mean_entropy - entropy,
        "prototype_use": mean_entropy.exp() / probs.shape[1],
        "top_share": mean.amax(),
        "feature_std": normalised.std(dim=0).mean() * math.sqrt(features.shape[-1]),
        "effective_rank": _entropy(shares).exp(),
    }
    if views.dim() == 3 and min(views.shape[:2]) > 1:
        local["view_match"] = view_match(views[0], views[1])
    if patches is not None and patches.shape[1] > 1:
        local["patch_similarity"] = patch_similarity(patches)
    values = distributed.mean_over_ranks(torch.stack(list(local.values())))
    return {f"health/{name}": value for name, value in zip(local, values)}


def view_match(first: Tensor, second: Tensor) -> Tensor:
    """Share of the pairs of images i, j in which first[i] is more like second[i] than like second[j]; (B, D), unit."""
    similarity = first @ second.T
    wins = (similarity.diag()[:, None] - similarity).sign()  # 1, 0 or -1; 0 on the diagonal
    images = len(first)
    return 0.5 + 0.5 * wins.sum() / (images * (images - 1))


def patch_similarity(patches: Tensor) -> Tensor:
    """Mean cosine between two different patches of an image; (B, N, D). Of N vectors, not of N² pairs."""
    total = torch.nn.functional.normalize(patches.float().nan_to_num(), dim=-1).sum(dim=1)
    count = patches.shape[1]
    return ((total.square().sum(dim=-1) - count) / (count * (count - 1))).mean()


def _entropy(probs: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


class CollapseWatch:
    """Says in one sentence that a run is collapsing, once for each kind of collapse, or ends the run.

    Args:
        on_collapse: "warn", or "stop": raises RunFailed with the sentence.
    """

    def __init__(self, on_collapse: str):
        self.on_collapse = on_collapse
        self.since: dict[str, tuple[int, int]] = {}  # kind -> first step of the streak, looks in it
        self.said: set[str] = set()

    def look(self, step: int, values: dict[str, float]) -> str | None:
        """What is wrong at this step, given `health` as numbers; None where nothing is, or it was said before.

        A value that is not finite says nothing.
        """
        if "health/teacher_kl" not in values:  # a probe alone
            return None
        signs = _signs({name.removeprefix("health/"): value for name, value in values.items()})
        before = {kind: self.since.get(kind, (step, 0)) for kind in signs}
        self.since = {kind: (first, looks + 1) for kind, (first, looks) in before.items()}
        for kind, (first, looks) in self.since.items():
            if step - first >= HOLDS and looks >= LOOKS and kind not in self.said:
                return self._say(kind, f"{signs[kind]} since step {first}")
        return None

    def look_at(self, images: Any) -> str | None:
        """Before the first step: whether the images are one picture many times.

        Args:
            images: a sequence with `image(index)` (C, H, W), which raises OSError for what cannot be read.
        """
        count, share = same_pictures(images)
        if share < SAME_PICTURE:
            return None
        several = f"{round(share * count)} of {count} images looked at are the same picture"
        same = "the data set holds one image" if count == 1 else several
        return self._say("pictures", same)

    def _say(self, kind: str, sign: str) -> str:
        self.said.add(kind)
        sentence = f"collapsing: {sign}; {REMEDIES[kind]}"
        if self.on_collapse == "stop":
            raise RunFailed(f"{sentence}; health.on_collapse=warn goes on all the same")
        return sentence


def _signs(values: dict[str, float]) -> dict[str, str]:
    """What looks like collapse at one step: kind -> in words."""
    top, kl = values.get("top_share", math.nan), values.get("teacher_kl", math.nan)
    entropy, std = values.get("teacher_entropy", math.nan), values.get("feature_std", math.nan)
    signs = {}
    if top >= ONE_PROTOTYPE:
        signs["prototype"] = f"one prototype takes {top:.0%} of the targets"
    elif kl <= SAME_TARGETS:  # of one prototype the difference is 0 as well
        uniform = "uniform" if entropy > 0.98 else "the same for every image"
        signs["targets"] = (
            f"the targets are {uniform} (entropy {entropy:.1%} of ln K, {kl:.1g} nats from their mean)"
        )
    if std <= SAME_FEATURES:
        signs["features"] = (
            f"the features of all images are alike (standard deviation {std:.2g}, 1 when independent)"
        )
    return signs


def same_pictures(images: Any) -> tuple[int, float]:
    """(images looked at, the share of them that the most frequent picture has); (0, 0.0) if none is readable.

    Pictures are the same where 8 x 8 averages differ by less than 2 % of their spread: a re-encoded copy counts.
    """
    total, thumbnails = len(images), []
    for index in sorted(
        {number * total // PICTURES for number in range(PICTURES)}
    ):  # fewer, if there are fewer
        try:
            image = images.image(index).float()
        except OSError:  # counted when it comes up in training
            continue
        thumbnails.append(
            torch.nn.functional.adaptive_avg_pool2d(image.mean(dim=0, keepdim=True), 8).flatten()
        )
    if not thumbnails:
        return 0, 0.0
    averages = torch.stack(thumbnails)
    apart = (averages[:, None] - averages[None]).abs().amax(dim=-1)
    spread = averages.std(dim=1)
    same = apart <= 0.02 * torch.maximum(spread[:, None], spread[None])
    return len(averages), float(same.sum(dim=1).amax() / len(averages))
