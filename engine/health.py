"""Detects collapse from cheap measures of targets and features, taken in logged steps."""

import math

import torch
from torch import Tensor

from data.sources.specs import ImageData
from engine import distributed
from engine.cli import RunFailed
from engine.logger import notice

# Limits are ours, from about 80 runs of up to 3,300 steps with 32 to 2,048 prototypes.
ONE_PROTOTYPE = 0.9  # top_share from here on is collapse; a moving centre recovers in 60 steps
# teacher_kl in nats up to here is collapse: collapsed runs had up to 0.001, others above 0.006.
SAME_TARGETS = 0.002
SAME_FEATURES = 0.01  # feature_std up to here is collapse; above 0.02 in all runs
HOLDS = 80  # steps that a sign must last: eight time constants of a centre with momentum 0.9
LOOKS = 4  # logged steps in which a sign must show
SAME_PICTURE = 0.9  # share of the pictures checked that are the same
PICTURES = 32  # checked before the first step

REMEDIES = {
    "prototype": "usual causes: no centring, a teacher temperature so low that one prototype wins "
    "every time, a learning rate too high; try loss.dino.centering=sinkhorn, a higher "
    "schedule.teacher_temp, a lower schedule.lr.peak",
    "targets": "usual causes: a teacher temperature near or above the student's, no centring, a "
    "learning rate or an EMA too fast; try a lower schedule.teacher_temp, "
    "loss.dino.centering=sinkhorn, a lower schedule.lr.peak, a higher schedule.ema_momentum",
    "features": "usual causes: a learning rate too high, images that hardly differ; try a lower "
    "schedule.lr.peak, loss.koleo.weight=0.1, other images in data.train",
    "pictures": "there is nothing to tell apart; usual causes: a wrong data.train, an export that "
    "wrote one image many times; try other images",
}


@torch.no_grad()
def health(
    teacher_probs: Tensor, features: Tensor, patches: Tensor | None = None
) -> dict[str, Tensor]:
    """Measures of one step, the same on every rank.

    Args:
        teacher_probs: (..., K) targets of one step, rows sum to 1.
        features: (G, B, D) the student's CLS features before the head, of G views of B images;
            (B, D) is one view.
        patches: (G·B, N, D) the student's patch features; None where they are not measured.

    Returns:
        teacher_entropy: mean entropy of a target as a share of ln K: 1 is uniform, 0 one-hot.
        teacher_kl: mean KL divergence of a target from the mean target, in nats: 0 when all images
            get the same.
        prototype_use: exp(entropy of the mean target) / K, the share of the prototypes in use.
        top_share: the part of the targets that the most used prototype takes, from 1 / K to 1.
        feature_std: mean over dimensions of the standard deviation over images, of L2-normalised
            features times sqrt(D); 1 for independent dimensions, 0 when all images look alike.
        effective_rank: exp(entropy of the singular values' shares) of the centred features
            (RankMe, arXiv 2210.02885), at most min(G·B - 1, D).
        view_match: how often the first two views of an image are more alike than views of two
            images, over all pairs of images: 0.5 is chance. With at least two views and two images.
        patch_similarity: mean cosine between two patches of a view; 1 when all patches look alike.
    """
    probs = teacher_probs.flatten(0, -2).float()
    features = features.float().nan_to_num()  # the loss reports what is not finite
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
    return {f"health/{name}": value for name, value in zip(local, values, strict=True)}


def view_match(first: Tensor, second: Tensor) -> Tensor:
    """Share of the pairs i, j with first[i] more like second[i] than second[j]; (B, D), unit."""
    similarity = first @ second.T
    wins = (similarity.diag()[:, None] - similarity).sign()  # 1, 0 or -1; 0 on the diagonal
    images = len(first)
    return 0.5 + 0.5 * wins.sum() / (images * (images - 1))


def patch_similarity(patches: Tensor) -> Tensor:
    """Mean cosine between two different patches of an image, from (B, N, D) in O(N)."""
    total = torch.nn.functional.normalize(patches.float().nan_to_num(), dim=-1).sum(dim=1)
    count = patches.shape[1]
    return ((total.square().sum(dim=-1) - count) / (count * (count - 1))).mean()


def _entropy(probs: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


class CollapseWatch:
    """Warns once for each kind of collapse, or ends the run.

    Args:
        on_collapse: "warn", or "stop": raises RunFailed with the sentence.
    """

    def __init__(self, on_collapse: str):
        self.on_collapse = on_collapse
        self.since: dict[str, tuple[int, int]] = {}  # kind -> first step of the streak, looks in it
        self.said: set[str] = set()

    def look(self, step: int, values: dict[str, float]) -> str | None:
        """A warning if this step shows collapse; None otherwise, or if it was given before.

        Args:
            values: of `health`, as numbers; one that is not finite is no sign.
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

    def look_at(self, images: ImageData) -> str | None:
        """Before the first step: a warning if the images are one picture many times."""
        count, share = same_pictures(images)
        if share < SAME_PICTURE:
            return None
        if count == 1:
            return self._say("pictures", "the data set holds one image")
        same = round(share * count)
        return self._say("pictures", f"{same} of {count} images looked at are the same picture")

    def _say(self, kind: str, sign: str) -> str:
        self.said.add(kind)
        sentence = f"collapsing: {sign}; {REMEDIES[kind]}"
        if self.on_collapse == "stop":
            raise RunFailed(f"{sentence}; health.on_collapse=warn goes on all the same")
        return sentence


def _signs(values: dict[str, float]) -> dict[str, str]:
    """The signs of collapse at one step: their kind, and a description."""
    top, kl = values.get("top_share", math.nan), values.get("teacher_kl", math.nan)
    entropy, std = values.get("teacher_entropy", math.nan), values.get("feature_std", math.nan)
    signs = {}
    if top >= ONE_PROTOTYPE:
        signs["prototype"] = f"one prototype takes {top:.0%} of the targets"
    elif kl <= SAME_TARGETS:  # `elif`: with one prototype the KL divergence is 0 as well
        uniform = "uniform" if entropy > 0.98 else "the same for every image"
        numbers = f"entropy {entropy:.1%} of ln K, {kl:.1g} nats from their mean"
        signs["targets"] = f"the targets are {uniform} ({numbers})"
    if std <= SAME_FEATURES:
        numbers = f"standard deviation {std:.2g}, 1 when independent"
        signs["features"] = f"the features of all images are alike ({numbers})"
    return signs


def warn_of_same_pictures(images: ImageData, on_collapse: str) -> None:
    """Warns, or ends the run, if the images are one picture many times."""
    if warning := CollapseWatch(on_collapse).look_at(images):
        notice(warning)


def same_pictures(images: ImageData) -> tuple[int, float]:
    """(images looked at, the share of them that are the most frequent picture).

    Pictures are the same where 8 x 8 averages differ by less than 2 % of their spread: a re-encoded
    copy counts. (0, 0.0) if none is readable.
    """
    total, thumbnails = len(images), []
    indices = {number * total // PICTURES for number in range(PICTURES)}  # a set: may be few images
    for index in sorted(indices):
        try:
            image = images.image(index).float()
        except OSError:  # counted when it comes up in training
            continue
        grey = image.mean(dim=0, keepdim=True)
        thumbnails.append(torch.nn.functional.adaptive_avg_pool2d(grey, 8).flatten())
    if not thumbnails:
        return 0, 0.0
    averages = torch.stack(thumbnails)
    apart = (averages[:, None] - averages[None]).abs().amax(dim=-1)
    spread = averages.std(dim=1)
    same = apart <= 0.02 * torch.maximum(spread[:, None], spread[None])
    return len(averages), float(same.sum(dim=1).amax() / len(averages))
