"""Crops made on the device equal those of loader workers: pixel by pixel where nothing was shrunk,
else in distribution."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bench
import train
from data import device
from data.augment import POLICIES, CropSpec, MultiCrop, draw
from data.device import cut_out, pack, resampling, shrink
from data.loader import Batch, RawBatch, StepDataset, Views, make_loader
from data.sources.mixture import Mixture
from data.sources.specs import open_data
from engine.config import CropsConfig, GramConfig, IbotConfig, SizeConfig, load_config
from engine.logger import read_metrics
from engine.views import stage_loader, views_from
from tests.data.test_guided import SPOT, Spotted

CPU = torch.device("cpu")
LEVEL = 1 / 255


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def tables_of(count: int, crops: int, seed: int = 0) -> list[Tensor]:
    generator = seeded(seed)
    return [draw(generator, crops) for _ in range(count)]


def on_device(
    crops: MultiCrop, images: list[Tensor], tables: list[Tensor], to: torch.device = CPU
) -> tuple:
    pixels, cuts = pack(crops, images, tables)
    return crops.finish(
        [cut_out(pixels.to(to), cut.to(to, False)) for cut in cuts], torch.stack(tables, 1)
    )


def plain_crops(channels: int, turn: float = 0.0, gram: bool = True) -> MultiCrop:
    """Geometry only, values from 0 to 1; sizes that are no squares."""
    policy = replace(POLICIES["crops_only"], rotate90=turn)
    specs = CropSpec((40, 32), (0.3, 1.0), 2), CropSpec((16, 24), (0.05, 0.3), 3)
    return MultiCrop(
        *specs, policy, (0.0,) * channels, (1.0,) * channels, (60, 48) if gram else None
    )


def odd_images(channels: int) -> list[Tensor]:
    """None of which is shrunk."""
    sizes = [(70, 90), (90, 61), (33, 33), (20, 160), (1, 1), (3, 2), (64, 48)]
    return [noise(channels, *size, seed=k) for k, size in enumerate(sizes)]


def textured(count: int, height: int = 400, width: int = 520, channels: int = 3) -> list[Tensor]:
    """Large images with detail at every scale."""
    images = []
    for k in range(count):
        image = torch.zeros(channels, height, width)
        for size in (4, 16, 64, 256):
            coarse = torch.rand(1, channels, size, size, generator=seeded(10 * k + size))
            image += F.interpolate(coarse, (height, width), mode="bicubic")[0] * (4 / size) ** 0.5
        image -= image.min()
        images.append((image / image.max() * 255).to(torch.uint8))
    return images


# ----------------------------------------------------------------- pixel by pixel


@pytest.mark.parametrize(
    "large, small", [(50, 20), (20, 50), (33, 33), (64, 7), (1, 9), (9, 1), (200, 12)]
)
def test_weights_are_those_of_antialiased_bicubic_interpolation(large, small):
    expected = F.interpolate(
        torch.eye(large)[None, None], (small, large), mode="bicubic", antialias=True
    )[0, 0]
    offset, step = torch.zeros(1, 1), torch.full((1, 1), large / small)
    ours = resampling(offset, step, torch.tensor([large]), small, large + 5)[0]
    assert (ours[:, :large] - expected).abs().max() < 1e-5 and not ours[:, large:].any()
    mirrored = resampling(offset + large, -step, torch.tensor([large]), small, large)[0]
    assert (mirrored - expected.flip(0)).abs().max() < 1e-5


@pytest.mark.parametrize("turn", [0.0, 0.75])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_float_crops_are_those_of_the_workers(channels, turn):
    images = [image / 255 for image in odd_images(channels)]
    crops, tables = plain_crops(channels, turn), tables_of(len(images), 5)
    for ours, theirs in zip(on_device(crops, images, tables), crops(images, tables), strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_of_8_bits_are_those_of_the_workers_within_rounding(channels):
    images = odd_images(channels)
    crops, tables = plain_crops(channels, 0.5), tables_of(len(images), 5)
    for ours, theirs in zip(on_device(crops, images, tables), crops(images, tables), strict=True):
        difference = (ours - theirs).abs()
        # Rounding happens twice, so of noise a few pixels in a million differ by two levels.
        assert (difference > 1.5 * LEVEL).float().mean() < 1e-4 and difference.max() < 2.5 * LEVEL
        assert (difference > 0).float().mean() < 0.02


def test_16_bits_are_kept_and_depths_may_mix():
    deep = [(image.int() * 257 + 31).clamp(max=65535).to(torch.uint16) for image in odd_images(1)]
    crops, tables = plain_crops(1), tables_of(len(deep), 5)
    for ours, theirs in zip(on_device(crops, deep, tables), crops(deep, tables), strict=True):
        assert (ours - theirs).abs().max() < 2e-5
    # Not up to black and white: of bytes the overshoot is cut off between the two passes, of
    # floats after them.
    mixed = [*deep[:3], *(image // 2 + 64 for image in odd_images(1)[3:])]
    for ours, theirs in zip(on_device(crops, mixed, tables), crops(mixed, tables), strict=True):
        assert (ours - theirs).abs().max() < 2.5 * LEVEL


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "crops_only"])
def test_finished_views_are_those_of_the_workers(policy):
    """Every operation: one that were missing, or had other numbers, would change most of a crop."""
    crops = MultiCrop(
        CropSpec((24, 24), (0.3, 1.0), 2),
        CropSpec((16, 16), (0.05, 0.3), 6),
        POLICIES[policy],
        (0.5,) * 3,
        (0.25,) * 3,
        (32, 32),
        True,
    )
    images = [image / 255 for image in textured(6, 60, 70)]
    tables = tables_of(6, 8)
    for ours, theirs in zip(on_device(crops, images, tables), crops(images, tables), strict=True):
        difference = (ours - theirs).abs().flatten(1)
        # A pixel at the edge of solarisation, or a hue without chroma, may fall on either side.
        assert (difference < 2e-3).float().mean() > 0.9995 and (
            difference.median(1).values < 1e-4
        ).all()


def test_crops_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    images, crops = odd_images(3), plain_crops(3, 0.75)
    tables = tables_of(len(images), 5)
    pixels, cuts = pack(crops, images, tables)
    monkeypatch.setattr(device, "BUDGET", 4 * 4000)
    _, smaller = pack(crops, images, tables)
    for whole, parts in zip(cuts, smaller, strict=True):
        assert len(whole.chunks) == 2 < len(parts.chunks)  # upright and turned
        for start, stop, height, width, _ in parts.chunks:
            assert stop - start == 1 or (stop - start) * height * width <= 4000
        a, b = cut_out(pixels, whole).int(), cut_out(pixels, parts).int()
        assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 1e-3


# ------------------------------------------------- in distribution, of images that were shrunk


def test_only_what_is_far_larger_than_any_crop_is_shrunk():
    # The smallest global crop needs images of 40 / 0.3^0.5 = 73 pixels a side, the smallest local
    # one 24 / 0.05^0.5 = 107.
    crops = plain_crops(3, gram=False)
    for size in ((107, 107), (130, 130), (90, 90), (5, 400)):
        image = noise(3, *size)
        assert shrink(image, crops) is image
    assert shrink(noise(3, 400, 600), crops).shape == (3, 88, 131)
    assert shrink(noise(3, 200, 4000), crops).shape[1] >= 40  # long ones keep the height of a crop
    assert shrink(noise(3, 2000, 3000), plain_crops(3)).shape == (3, 89, 134), (
        "those of a Gram teacher are larger"
    )


def corners(crops: Tensor) -> Tensor:
    """(n, 4) centre and extent, signed, of crops of an image whose channels say column and row."""
    x, y = crops[:, 0].mean(1), crops[:, 1].mean(2)
    return torch.stack([x.mean(1), y.mean(1), x[:, -1] - x[:, 0], y[:, -1] - y[:, 0]], 1)


def test_boxes_and_mirroring_of_shrunk_images_are_those_of_the_workers():
    height, width = 600, 700
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    images, crops = [torch.stack([x, y])] * 40, plain_crops(2, gram=False)
    tables = tables_of(40, 5)
    assert shrink(images[0], crops).shape[1] < 110
    for ours, theirs in zip(
        on_device(crops, images, tables)[:2], crops(images, tables)[:2], strict=True
    ):
        ours, theirs = corners(ours), corners(theirs)
        assert (ours - theirs).abs().max() < 0.01  # of the image's sides
        assert 0.3 < (theirs[:, 2] < 0).float().mean() < 0.7 and theirs.std(0).min() > 0.05


def spectrum(crops: Tensor) -> Tensor:
    """Mean power at low, middle and high frequencies of (n, C, s, s)."""
    power = torch.fft.fft2(crops - crops.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(crops.shape[-1]).abs()
    radius = torch.maximum(frequency[:, None], frequency[None])
    bands = ((0, 0.15), (0.15, 0.3), (0.3, 0.51))
    return torch.stack([power[(radius > low) & (radius <= high)].mean() for low, high in bands])


def moments(crops: Tensor) -> Tensor:
    flat = crops.flatten(2)
    return torch.cat([flat.mean((0, 2)), flat.std(2).mean(0), flat.mean(2).std(0)])


def test_colours_and_blur_of_shrunk_images_are_distributed_as_those_of_the_workers():
    def views(policy, seed, make=None):
        crops = MultiCrop(
            CropSpec((32, 32), (0.32, 1.0), 2),
            CropSpec((16, 16), (0.05, 0.32), 4),
            policy,
            (0.5,) * 3,
            (0.25,) * 3,
        )
        assert shrink(images[0], crops).shape[1] < 80
        tables = tables_of(len(images), 6, seed)
        return (make(crops, images, tables) if make else crops(images, tables))[:2]

    images, natural = textured(24), POLICIES["natural"]
    sharp = views(replace(natural, blur=(0.0, 0.0, 0.0)), 0)
    for ours, theirs, others, unblurred in zip(
        views(natural, 0, on_device), views(natural, 0), views(natural, 1), sharp, strict=True
    ):
        change, missing = (
            (spectrum(made) / spectrum(theirs)).log().abs() for made in (ours, unblurred)
        )
        assert (change < torch.tensor([0.01, 0.02, 0.08])).all(), change
        assert (missing > 2 * change).all() and missing.max() > 0.15, "a missing blur would show"
        assert (moments(ours) - moments(theirs)).abs().max() < 0.003
        assert (moments(others) - moments(theirs)).abs().max() > 0.01, (
            "another draw is further away"
        )


# ----------------------------------------------------------------- the stream


def assert_same(a: Batch, b: Batch, within: float = 0.0) -> None:
    assert a.images == b.images and a.bad == b.bad
    for name in ("global_crops", "local_crops", "gram_crops", "masks"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
            assert (ours.float() - theirs.float()).abs().max() <= within, name


def natural_views(**gram) -> list[Views]:
    crops = CropsConfig(global_size=32, local_size=16, local_count=3, policy="crops_only")
    ibot = IbotConfig(mask_probability=0.5, mask_ratio=[0.1, 0.5])
    return views_from(crops, [0.0], [1.0], 8, ibot, GramConfig(**gram) if gram else None)


def batches(
    data, *, raw: bool = True, steps: int = 4, batch_size: int = 6, views=None, **options
) -> list[Batch]:
    options = {"seed": 3, "stop_step": steps} | options
    loader = make_loader(
        data, views or natural_views(), batch_size=batch_size, on_device=raw, **options
    )
    loaded = list(loader)
    assert all(isinstance(batch, RawBatch if raw else Batch) for batch in loaded)
    return [batch.to("cpu", non_blocking=True) for batch in loaded]


def test_batches_are_those_of_the_workers_and_the_unreadable_are_listed(images):
    (images / "3.png").write_bytes(b"no image")
    data = open_data(str(images))
    for ours, theirs in zip(batches(data), batches(data, raw=False), strict=True):
        assert_same(ours, theirs, 2.5 * LEVEL)
    assert any(batch.bad for batch in batches(data))


def test_batches_do_not_depend_on_workers_and_go_on_at_any_step(images):
    data = open_data(str(images))
    whole = batches(data)
    for a, b in zip(whole, batches(data, workers=2), strict=True):
        assert_same(a, b)
    for a, b in zip(whole[2:], batches(data, start_step=2), strict=True):
        assert_same(a, b)


def test_ranks_share_the_batch_and_a_batch_splits_into_micro_batches(images):
    data = open_data(str(images))
    ranks = [batches(data, rank=rank, world_size=2) for rank in range(2)]
    for whole, *halves in zip(batches(data), *ranks, strict=True):
        for parts in (halves, whole.split(3)):
            assert whole.images == parts[0].images + parts[1].images
            for name in ("global_crops", "local_crops", "masks"):
                together = torch.cat(
                    [getattr(part, name).unflatten(0, (-1, 3)) for part in parts], 1
                ).flatten(0, 1)
                assert (together.float() - getattr(whole, name).float()).abs().max() < 2.5 * LEVEL


def test_crops_of_a_gram_teacher_and_mixed_sizes_are_those_of_the_workers(images):
    data = open_data(str(images))
    for gram in (
        {"teacher_scale": 2.0, "distortions": False},
        {"teacher_scale": 1.5, "distortions": True},
    ):
        pair = [
            batches(data, raw=raw, views=natural_views(**gram), steps=1)[0] for raw in (True, False)
        ]
        assert_same(*pair, 2.5 * LEVEL)
        assert pair[0].gram_crops.shape[-1] == 32 * gram["teacher_scale"]
    mix = [SizeConfig(1, 32, 16), SizeConfig(1, 48, 24)]
    views = views_from(CropsConfig(mix=mix, local_count=1, policy="crops_only"), [0.0], [1.0], 8)
    ours, theirs = (batches(data, raw=raw, views=views, steps=6) for raw in (True, False))
    assert {batch.global_crops.shape[-1] for batch in ours} == {32, 48}
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 2.5 * LEVEL)


def test_a_mixture_of_sources_is_mixed_as_before(images):
    data = Mixture([open_data(str(images)), open_data("scenes?size=9")], [1, 1], [0.3, 0])
    for ours, theirs in zip(batches(data), batches(data, raw=False), strict=True):
        assert_same(ours, theirs, 2.5 * LEVEL)


@pytest.mark.parametrize("times", [1, 8])
def test_guided_crops_show_the_mark_of_their_image(times):
    class Large(Spotted):
        """Eight times as large, it is shrunk; marks are in pixels of the original."""

        def image(self, index: int) -> Tensor:
            return super().image(index).repeat_interleave(times, 1).repeat_interleave(times, 2)

        def annotations(self, index: int) -> dict:
            return {
                "boxes": np.array([[SPOT[1], SPOT[0], SPOT[1] + 1, SPOT[0] + 1]], np.float32)
                * times
            }

    keys = {
        "global_size": 32,
        "local_size": 16,
        "local_count": 4,
        "local_scale": [0.1, 0.3],
        "policy": "crops_only",
    }
    for guided in (0.0, 1.0):
        views = views_from(CropsConfig(**keys, guided=guided), [0.0], [1.0], 8)
        raw = StepDataset(Large(), views, batch_size=64, seed=0, on_device=True)[0]
        whole = len(raw.pixels) == 64 * 60 * 80
        assert whole == (times == 1)
        shown = (raw.to("cpu").local_crops.flatten(1).amax(1) > 0.2).float().mean()
        assert shown == 1 if guided else shown < 0.4


def test_crops_are_made_in_full_precision_within_autocast(images):
    raw = StepDataset(
        open_data(str(images)), natural_views(), batch_size=6, seed=0, on_device=True
    )[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(raw.to("cpu"), raw.to("cpu"))
        low = raw.to("cpu")
    assert_same(low, raw.to("cpu"))


# ----------------------------------------------------------------- training


def test_auto_is_the_device_on_a_measured_gpu_and_the_workers_elsewhere(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")

    def chosen(device: str, *overrides: str) -> bool:
        stage = bench.chosen_stage(load_config(None, [*tiny, *overrides]), None)
        return stage_loader(stage, 0, 8, torch.device(device)).dataset.on_device

    assert chosen("cuda") and not chosen("cpu")
    assert chosen("cpu", "data.augment_on=device") and not chosen("cuda", "data.augment_on=workers")


def test_training_goes_on_exactly_and_close_to_what_the_workers_crops_give(tiny, tmp_path):
    def losses(name: str, *overrides: str) -> list[float]:
        train.main([*tiny, f"output_dir={tmp_path / name}", *constant, *overrides])
        return [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]

    constant = [
        f"schedule.{name}={value}"
        for name, value in (("lr", 1e-3), ("weight_decay", 0.04), ("ema_momentum", 0.99))
    ]
    constant += ["schedule.teacher_temp=0.05", "micro_batch_size=4"]
    workers, whole = losses("workers"), losses("whole", "data.augment_on=device")
    assert whole != workers and whole == pytest.approx(workers, abs=0.02)
    losses("parts", "data.augment_on=device", "total_steps=2")
    assert losses("parts", "data.augment_on=device", "data.workers=1") == whole


def test_bench_measures_the_crops_made_on_the_device(tiny, capsys):
    few = ["--steps", "2", "--warmup", "1", "--compare", "data.augment_on=workers"]
    bench.main([*tiny, "data.augment_on=device", *few])
    device_, workers = json.loads(capsys.readouterr().out)["variants"]
    for result in (device_, workers):
        assert (
            result["phases_ms"]["augmentation"] > 0
            and sum(result["phases_ms"].values()) <= 1.3 * result["step_ms"]
        )


# ----------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_a_gpu_makes_the_crops_of_the_workers_without_being_waited_for():
    crops = CropsConfig(global_size=64, local_size=32, local_count=4, policy="crops_only")
    data, options = (
        open_data("scenes?size=32&resolution=96"),
        {"batch_size": 16, "seed": 0, "stop_step": 4, "device": "cuda"},
    )
    loaders = [
        make_loader(data, views_from(crops, [0.0], [1.0], 8), workers=1, on_device=raw, **options)
        for raw in (True, False)
    ]
    for raw, theirs in zip(*loaders, strict=True):
        assert raw.pixels.is_pinned() and all(cut.windows.is_pinned() for cut in raw.cuts)
        raw.to(
            "cuda", non_blocking=True
        )  # the first call loads kernels and fills the pool of pinned memory
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = raw.to("cuda", non_blocking=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in (
            (ours.global_crops, theirs.global_crops),
            (ours.local_crops, theirs.local_crops),
        ):
            difference = (a.cpu() - b).abs()
            assert (
                difference.max() < 3.5 * LEVEL and (difference > 1.5 * LEVEL).float().mean() < 1e-3
            )
            assert (a.cpu() - b).mean().abs() < 0.02 * LEVEL


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_on_a_gpu_is_that_of_the_workers(policy):
    crops = MultiCrop(
        CropSpec((32, 32), (0.3, 1.0), 2),
        CropSpec((16, 16), (0.05, 0.3), 4),
        POLICIES[policy],
        (0.5,) * 3,
        (0.25,) * 3,
    )
    images = [image / 255 for image in textured(6, 60, 70)]
    tables = tables_of(6, 6)
    for ours, theirs in zip(
        on_device(crops, images, tables, torch.device("cuda"))[:2],
        crops(images, tables)[:2],
        strict=True,
    ):
        assert ((ours.cpu() - theirs).abs() < 5e-3).float().mean() > 0.999
