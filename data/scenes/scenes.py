"""The embedded data set: small generated scenes with every annotation a probe needs, no download.

A scene is one large textured object, up to two smaller and farther ones of other classes, and a
cluttered background. A class is a pair of shape and texture ("striped disc"); place, size,
rotation, colours, contrast polarity and background say nothing about it. Everything is a pure
function of (seed, split, index). Annotations are in pixels; the centre of the top left pixel is
(0.5, 0.5).
"""

import math

import numpy as np
import torch
from torch import Tensor

from data.images import ImageData
from data.pictures import fit_channels
from data.scenes.captions import say_scene
from data.scenes.renderer import (
    KINDS,
    Background,
    Body,
    Rendering,
    View,
    outline,
    render,
    seen,
    to_object,
    to_scene,
)
from errors import UserError

SIZES = {"train": 20_000, "val": 4_000}
# Radians by which an object may lean: things stand, and small models learn them in minutes.
UPRIGHT = 0.8
KEYPOINTS = 8
PAIR_POINTS = 16
LABEL, SCENE, SECOND_VIEW, MOTION, DISTRACTORS = range(5)  # what a random number is for
LUMA = np.array([0.299, 0.587, 0.114])  # of red, green, blue (ITU-R BT.601)
TO_PALETTE = np.array([[1, 0, 0, 0], [-1, 1, 0, 0], [-1, 0, 1, 0], [1, -1, -1, 1]])


class Scenes(ImageData):
    """Generated scenes of ten classes; the label is that of the main (largest, nearest) object.

    Args:
        split: "train" or "val", two unrelated streams of scenes.
        size: number of scenes; None is 20,000 (train) or 4,000 (val). Does not change the scenes.
        seed: another seed is another world.
        resolution: height and width in pixels, at least 32; objects keep their share of the image.
        frames: length of the clips.
        channels: of the images; None is 3.
        distractors: objects in each scene that wear the shape of one class and the texture of
            another. They belong to no class: annotations have background there.

    Raises:
        UserError: for an unknown split or a number out of range.
    """

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        seed: int = 0,
        resolution: int = 64,
        frames: int = 1,
        channels: int | None = 3,
        distractors: int = 0,
    ):
        if split not in SIZES:
            raise UserError(f"scenes have no split {split!r}; choose from {', '.join(SIZES)}")
        size = SIZES[split] if size is None else size
        numbers = {"size": size, "seed": seed, "resolution": resolution, "frames": frames}
        numbers["distractors"] = distractors
        least = {"size": 1, "seed": 0, "resolution": 32, "frames": 1, "distractors": 0}
        for name, value in numbers.items():
            if not isinstance(value, int) or not least[name] <= value < 2**32:
                allowed = f"a whole number of at least {least[name]}"
                raise UserError(f"{name} of scenes is {value!r}; it must be {allowed}")
        self.split, self.size, self.seed = split, size, seed
        self.resolution, self.frames, self.channels = resolution, frames, channels
        self.distractors = distractors
        self.title = f"scenes/{split}"
        self.classes = [kind.name for kind in KINDS]
        self._world = 2 * seed + list(SIZES).index(split)
        draws = uniforms(self._world, LABEL, np.arange(size), 1)[:, 0]
        self.labels = (draws * len(KINDS)).astype(np.int64)
        self.captioned = np.ones(size, dtype=bool)

    def __len__(self) -> int:
        return self.size

    def image(self, i: int) -> Tensor:
        """(C, H, W) uint8: the scene, which is also the first frame of its clip."""
        return self._to_tensor(self._render(*self._scene(i)).image, i)

    def captions(self, i: int) -> list[str]:
        """Objects, colours and places in words, the main object first."""
        return say_scene(self._scene(i)[0])

    def annotations(self, i: int) -> dict[str, np.ndarray]:
        """What is where in `image(i)`.

        Returns:
            boxes: (n, 4) float32 x0, y0, x1, y1 around the visible part of each, main object first.
            box_labels: (n,) int64 classes.
            mask: (H, W) uint8, 0 = background, else 1 + class.
            instance: (H, W) uint8, 0 = background, else 1 + row of `boxes`.
            depth: (H, W) float32, metres, above 0.
            keypoints: (KEYPOINTS, 3) float32 x, y and visible (0 or 1) of the main object: row k is
                the same place in the frame of its class in every scene.
        """
        bodies, background = self._scene(i)
        _, instance, depth = self._render(bodies, background)
        known = [k for k, body in enumerate(bodies) if body.texture == body.label]
        numbers = np.zeros(1 + len(bodies), np.uint8)
        numbers[1 + np.array(known)] = 1 + np.arange(len(known))
        instance, bodies = numbers[instance], [bodies[k] for k in known]
        labels = np.array([body.label for body in bodies])
        points = to_scene(bodies[0], 0.7 * outline(bodies[0].label, KEYPOINTS)) * self.resolution
        visible = _instance_at(instance, points) == 1
        return {
            "boxes": np.array([_box(instance == k + 1) for k in range(len(bodies))], np.float32),
            "box_labels": labels,
            "mask": np.append(0, 1 + labels).astype(np.uint8)[instance],
            "instance": instance,
            "depth": depth,
            "keypoints": np.column_stack([points, visible]).astype(np.float32),
        }

    def pair(self, i: int) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Two views of scene i: another camera, another light, and each object moved a little.

        Returns:
            image_a, image_b: (C, H, W) uint8; the first is `image(i)`.
            points_a, points_b: (PAIR_POINTS, 2) float32 x, y: the same places on objects in both.
            visible: (PAIR_POINTS,) bool: inside view b and not hidden there; all are in view a.
        """
        bodies, background = self._scene(i)
        stream = Stream(self._world, SECOND_VIEW, i, 64 + 4 * self.distractors)
        view = _second_camera(stream)
        moved = [_nudged(body, stream) for body in bodies]
        a, b = self._render(bodies, background), self._render(moved, background, view)
        pixels = np.flatnonzero(a.instance)
        picks = pixels[stream.array(0, len(pixels), PAIR_POINTS).astype(int)]
        rows, columns = np.divmod(picks, self.resolution)
        points_a = np.stack([columns, rows], axis=1) + 0.5
        points_b = np.empty_like(points_a)
        owners = a.instance[rows, columns]
        for number, (here, there) in enumerate(zip(bodies, moved, strict=True), start=1):
            places = to_object(here, points_a[owners == number] / self.resolution)
            points_b[owners == number] = to_scene(seen(there, view), places) * self.resolution
        visible = _instance_at(b.instance, points_b) == owners
        image_a, image_b = self._to_tensor(a.image, i), self._to_tensor(b.image, i)
        return image_a, image_b, points_a.astype(np.float32), points_b.astype(np.float32), visible

    def clip(self, i: int) -> tuple[Tensor, np.ndarray]:
        """(T, C, H, W) uint8 frames and (T, H, W) uint8 instances, as in `annotations(i)`."""
        bodies, background = self._scene(i)
        stream = Stream(self._world, MOTION, i, 64 + 8 * self.distractors)
        pan = stream.array(-1, 1, 2, 2).tolist()
        swings = [stream.array(-1, 1, 4, 2).tolist() for _ in bodies]
        frames = []
        for time in range(self.frames):
            view = View(shift=tuple(0.05 * _swing(time, *one) for one in pan))
            poses = [_moved(body, time, swing) for body, swing in zip(bodies, swings, strict=True)]
            frames.append(self._render(poses, background, view))
        images = torch.stack([self._to_tensor(frame.image, i) for frame in frames])
        return images, np.stack([frame.instance for frame in frames])

    def _scene(self, i: int) -> tuple[list[Body], Background]:
        if not 0 <= i < self.size:
            raise IndexError(f"scene {i} of {self.size}")
        bodies, background = compose(Stream(self._world, SCENE, i, 192), int(self.labels[i]))
        if self.distractors:
            stream = Stream(self._world, DISTRACTORS, i, 64 * self.distractors)
            bodies = add_distractors(stream, bodies, self.distractors)
        return bodies, background

    def _render(
        self, bodies: list[Body], background: Background, view: View | None = None
    ) -> Rendering:
        return render(bodies, background, view or View(), self.resolution)

    def _to_tensor(self, image: np.ndarray, i: int) -> Tensor:
        return fit_channels(torch.from_numpy(image), self.channels, self.name(i))


def open_scenes(
    path: str,
    channels: int | None,
    *,
    split: str = "train",
    size: int | None = None,
    seed: int = 0,
    resolution: int = 64,
    frames: int = 1,
    distractors: int = 0,
) -> Scenes:
    """For data/sources/specs.py; there is no path."""
    return Scenes(split, size, seed, resolution, frames, channels, distractors)


def uniforms(world: int, purpose: int, index: np.ndarray, count: int) -> np.ndarray:
    """(len(index), count) numbers in [0, 1), each a hash of (world, purpose, index, column).

    A hash and no generator: 20,000 labels are one call, and no library's streams have to stay as
    they are. The steps are those of splitmix64 (Steele, Lea, Flood 2014).
    """
    rows = _mix(index.astype(np.uint64) + _mix(np.array([world], np.uint64)))
    rows = _mix(rows + np.uint64(purpose))
    columns = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(rows[:, None] + columns) >> np.uint64(11)) * 2.0**-53


def _mix(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Stream:
    """Hands out `count` of those numbers in order."""

    def __init__(self, world: int, purpose: int, index: int, count: int):
        self.values = uniforms(world, purpose, np.array([index]), count)[0]
        self.used = 0

    def array(self, low: float, high: float, *shape: int) -> np.ndarray:
        start, self.used = self.used, self.used + math.prod(shape)
        return (low + (high - low) * self.values[start : self.used]).reshape(shape)

    def between(self, low: float, high: float) -> float:
        self.used += 1
        return low + (high - low) * float(self.values[self.used - 1])

    def below(self, count: int) -> int:
        return int(self.between(0, count))


def compose(stream: Stream, label: int) -> tuple[list[Body], Background]:
    """A scene, nearest object first; that one is the main object and of class `label`."""
    radius = stream.between(0.22, 0.36)
    x, y = stream.array(0.9 * radius, 1 - 0.9 * radius, 2).tolist()
    bodies = [_body(stream, label, x, y, radius)]
    for _ in range(stream.below(3)):
        other = (label + 1 + stream.below(len(KINDS) - 1)) % len(KINDS)
        radius = stream.between(0.08, 0.13)
        x, y = _free_spot(bodies, radius, stream.array(radius, 1 - radius, 6, 2).tolist())
        bodies.append(_body(stream, other, x, y, radius))
    return sorted(bodies, key=lambda body: body.depth), _background(stream)


def add_distractors(stream: Stream, bodies: list[Body], count: int) -> list[Body]:
    """The bodies, and behind them `count` smaller ones of no class."""
    bodies = list(bodies)
    for _ in range(count):
        shape, step = stream.below(len(KINDS)), 1 + stream.below(len(KINDS) - 1)
        radius = stream.between(0.07, 0.14)
        x, y = _free_spot(bodies, radius, stream.array(radius, 1 - radius, 6, 2).tolist())
        body = _body(stream, shape, x, y, radius)
        behind = max(body.depth, bodies[-1].depth)  # so that nothing annotated is hidden
        bodies.append(body._replace(texture=(shape + step) % len(KINDS), depth=behind))
    return bodies


def _free_spot(bodies, radius, spots):
    """The first spot outside every object, so half of what is put there is seen, or a corner."""

    def room(spot):
        return min(math.hypot(spot[0] - b.x, spot[1] - b.y) - b.radius for b in bodies)

    corners = [(x, y) for x in (radius, 1 - radius) for y in (radius, 1 - radius)]
    return next((spot for spot in spots if room(spot) > 0), max(corners, key=room))


def _body(stream, label, x, y, radius):
    middle = stream.between(0.42, 0.58)
    contrast = stream.between(0.28, 0.4) * (1 - 2 * stream.below(2))
    dark, light = middle - contrast, middle + contrast
    return Body(
        label=label,
        x=x,
        y=y,
        radius=radius,
        angle=stream.between(-UPRIGHT, UPRIGHT),
        depth=0.6 / radius * stream.between(0.9, 1.1),  # true sizes differ by a tenth
        frequency=2 * math.pi * KINDS[label].cycles * stream.between(0.8, 1.25),
        phase=(stream.between(0, 2 * math.pi), stream.between(0, 2 * math.pi)),
        palette=_palette(stream, np.array([dark, dark, light, light]), chroma=0.3),
        texture=label,
    )


def _background(stream, waves=6):
    cycles = [(0.3, 1.0), (0.8, 2.0), (5.0, 12.0)]  # across the image: drift, patches, grain
    length = 2 * math.pi * np.stack([stream.array(*span, waves, 1) for span in cycles])
    turn = stream.array(0, 2 * math.pi, 3, waves, 1)
    return Background(
        waves=np.stack([length * np.cos(turn), length * np.sin(turn)]),
        phase=stream.array(0, 2 * math.pi, 3, waves, 1),
        palette=_palette(stream, stream.array(0.36, 0.64, 4), chroma=0.15),
        threshold=stream.between(0, 1),
        grain=stream.between(0.02, 0.06),
    )


def _palette(stream, luma, chroma):
    """(3, 4) for the renderer, from four colours of given luma (4,) and random tint."""
    tint = stream.array(-chroma, chroma, 4, 3)
    colours = luma[:, None] + tint - (tint @ LUMA)[:, None]
    return (TO_PALETTE @ colours).T.astype(np.float32)


def _second_camera(stream):
    return View(
        zoom=stream.between(0.85, 1.2),
        angle=stream.between(-0.45, 0.45),
        shift=tuple(stream.array(-0.06, 0.06, 2).tolist()),
        gain=tuple(stream.array(0.75, 1.2, 3).tolist()),
        slope=tuple(stream.array(-0.4, 0.4, 2).tolist()),
    )


def _nudged(body, stream):
    return body._replace(
        x=body.x + stream.between(-0.05, 0.05),
        y=body.y + stream.between(-0.05, 0.05),
        radius=body.radius * stream.between(0.92, 1.08),
        angle=body.angle + stream.between(-0.3, 0.3),
    )


def _swing(time, amplitude, phase):
    """A smooth path that starts at 0, of 24 frames a period."""
    start = math.pi * phase
    return amplitude * (math.sin(start + time * math.pi / 12) - math.sin(start))


def _moved(body, time, swings):
    across, down, nearer, turn = (_swing(time, *swing) for swing in swings)
    return body._replace(
        x=body.x + 0.12 * across,
        y=body.y + 0.12 * down,
        radius=body.radius * (1 + 0.1 * nearer),
        angle=body.angle + 0.6 * turn,
    )


def _instance_at(instance, points):
    """(P,) instance under each of the points (P, 2), 255 outside the image."""
    columns, rows = np.floor(points).astype(int).T
    inside = (np.minimum(columns, rows) >= 0) & (np.maximum(columns, rows) < len(instance))
    return np.where(inside, instance[rows * inside, columns * inside], 255)


def _box(mask):
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
