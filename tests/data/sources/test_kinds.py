"""Kinds of data beyond folders, images of any depth and number of channels, statistics."""

import io
import json
import re
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import stats
from data.augment import POLICIES, CropSpec, MultiCrop
from data.loader import Views, make_loader
from data.pictures import array_to_tensor, fit_channels, read_image
from data.sources.specs import UnreadableImage, match_classes, open_data
from data.sources.tar import expand_braces
from tests.deep import noise, png16
from tests.processes import run_process


def encoded(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def channels_last(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def batches_of(data, channels: int, size: int = 16, **options) -> list:
    policy = replace(POLICIES["crops_only"], flip=0.0)
    crops = MultiCrop(
        CropSpec((size, size), (1.0, 1.0), 1, ratio=(1, 1)),
        None,
        policy,
        (0.0,) * channels,
        (1.0,) * channels,
    )
    options = {"batch_size": 2, "seed": 0, "stop_step": 1} | options
    return list(make_loader(data, [Views(crops)], **options))


# Tar shards


@pytest.fixture
def shards(tmp_path) -> tuple[str, list[np.ndarray]]:
    """Two shards of three images; the first with .cls, the second with .json and one image without
    a class."""
    images = [noise(9, 7 + k, 3, seed=k) for k in range(6)]
    content = [encoded(image) for image in images]
    write_tar(tmp_path / "s-00.tar", {
        "a/0.cls": b"10", "a/0.png": content[0], "a/0.seg.png": encoded(noise(2, 2)),
        "b/0.png": content[1], "b/0.cls": b"9\n", "c.png": content[2], "c.cls": b"10",
        "readme.txt": b"no image", "._c.png": b"left by a desktop",
    })  # fmt: skip
    write_tar(tmp_path / "s-01.tar", {
        "d.json": b'{"label": 9}', "d.PNG": content[3], "e.png": content[4], "e.json": b"{broken",
        "f.json": b'{"cls": "10", "caption": ""}', "f.png": content[5],
    })  # fmt: skip
    return f"tar:{tmp_path}/s-{{00..01}}.tar", images


def test_tar_shards_are_read_at_random(shards):
    spec, images = shards
    data = open_data(spec)
    for index in (5, 0, 3, 1, 4, 2):
        assert np.array_equal(channels_last(data.image(index)), images[index])
    assert data.name(0).endswith("s-00.tar/a/0.png") and len(open_data(f"{spec}?size=2")) == 2


def test_classes_of_a_tar_come_from_cls_or_json(shards):
    data = open_data(shards[0])
    assert data.classes == ["9", "10"] and data.labels.tolist() == [1, 0, 1, 0, -1, 1]


def test_classes_of_different_kinds_are_matched_by_name(shards, tmp_path):
    for name in ("10", "11"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        Image.fromarray(noise(3, 3)).save(tmp_path / "folder" / name / "a.png")
    labels = match_classes(open_data(shards[0]), open_data(str(tmp_path / "folder")))
    assert labels.tolist() == [1, -1]


def test_a_stream_from_tar_shards_resumes_exactly(shards):
    data = open_data(shards[0])
    whole = batches_of(data, 3, stop_step=7)
    for a, b in zip(whole[3:], batches_of(data, 3, stop_step=7, start_step=3), strict=True):
        assert a.images == b.images and torch.equal(a.global_crops, b.global_crops)


def test_broken_members_cost_themselves_and_nothing_else(shards, tmp_path):
    spec, images = shards
    path = tmp_path / "s-00.tar"
    with tarfile.open(path) as tar:
        places = {member.name: member for member in tar}
    content = bytearray(path.read_bytes())
    content[places["b/0.png"].offset + 10] ^= 255  # in a header
    content[places["c.png"].offset_data : places["c.png"].offset_data + 8] = b"notapng!"
    path.write_bytes(content)
    last = tmp_path / "s-01.tar"
    with tarfile.open(last) as tar:
        cut = tar.getmember("f.png").offset_data + 20
    last.write_bytes(last.read_bytes()[:cut])
    data = open_data(spec)
    reasons = {}
    for index in range(len(data)):
        try:
            data.image(index)
        except UnreadableImage as error:
            reasons[error.name.removeprefix(f"{tmp_path}/")] = error.reason
    assert reasons == {
        f"s-00.tar/@{places['b/0.png'].offset}": "broken tar header",
        "s-00.tar/c.png": "no image, or of an unknown format",
        "s-01.tar/f.png": f"truncated: 20 of {len(encoded(images[5]))} bytes",
    }
    assert len(data) == 6 and np.array_equal(channels_last(data.image(3)), images[3])


def test_an_empty_shard_is_one_unreadable_image(shards, tmp_path):
    (tmp_path / "s-00.tar").write_bytes(b"")
    data = open_data(shards[0])
    assert len(data) == 4
    with pytest.raises(UnreadableImage, match="broken tar header"):
        data.image(0)


def open_on_two_ranks(spec, output, **environment) -> tuple[int, str]:
    names = {"SHARDS": spec, "OUTPUT": str(output), **environment}
    done = run_process("tests/tar_ranks.py", ranks=2, **names)
    return done.returncode, done.stdout + done.stderr


def test_ranks_divide_the_shards_to_index_and_all_know_all_images(shards, tmp_path):
    write_tar(tmp_path / "s-02.tar", {"g.png": encoded(noise(4, 4)), "g.cls": b"8"})
    spec = f"tar:{tmp_path}/s-{{00..02}}.tar"
    status, output = open_on_two_ranks(spec, tmp_path)
    assert status == 0, output
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank.pop("scanned") for rank in found] == [
        ["s-00.tar", "s-02.tar"],
        ["s-01.tar"],
    ]  # once, opened twice
    assert not any(path.endswith(".tar") for rank in found for path in rank.pop("open"))
    data = open_data(spec)
    alone = {
        "names": [data.name(index) for index in range(7)],
        "labels": [2, 1, 2, 1, -1, 2, 0],
        "classes": ["8", "9", "10"],
        "sums": [int(data.image(index).sum()) for index in range(7)],
    }
    assert data.labels.tolist() == alone["labels"] and data.classes == alone["classes"]
    assert found == [alone, alone]


def test_a_shard_that_one_rank_cannot_read_is_the_error_of_all(shards, tmp_path):
    status, output = open_on_two_ranks(shards[0], tmp_path, BROKEN="s-01.tar")
    said = re.findall(
        r"error: [^\n]*?Input/output error: '[^'\n]*s-01\.tar'", output
    )  # two ranks may write into one line
    assert status == 2 and len(said) == 2, output


def test_long_names_and_joined_tars_are_no_damage(tmp_path):
    parts = [
        write_tar(tmp_path / name, {f"{name * 60}.png": encoded(noise(4, 4))}).read_bytes()
        for name in "ab"
    ]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    data = open_data(str(tmp_path / "joined.tar"))
    assert len(data) == 2 and [data.image(k).shape for k in range(2)] == [(3, 4, 4)] * 2


def test_braces_count_with_the_width_of_the_first_number():
    assert [str(path) for path in expand_braces("a{08..10}b{1..2}")] == [
        "a08b1", "a08b2", "a09b1", "a09b2", "a10b1", "a10b2",
    ]  # fmt: skip


# Arrays, one's own Dataset, the hub, lists


def test_medmnist_files_are_read_by_split(tmp_path):
    grey, colour = noise(5, 28, 28), noise(4, 28, 28, 3, seed=1)
    path = tmp_path / "x.npz"
    np.savez(
        path,
        train_images=grey,
        train_labels=np.arange(5)[:, None],
        val_images=colour,
        val_labels=noise(4, 14),
    )
    train = open_data(f"{path}?split=train", channels=1)
    assert train.labels.tolist() == [0, 1, 2, 3, 4] and np.array_equal(train.image(3)[0], grey[3])
    val = open_data(f"npz:{path}?split=val&size=2")
    assert (
        len(val) == 2
        and val.labels is None
        and np.array_equal(channels_last(val.image(1)), colour[1])
    )


def make_dataset(count: str = "3"):
    """What `python:` calls: sixteen-bit arrays with labels."""

    class Own(list):
        labels, classes = [k % 2 for k in range(int(count))], ["even", "odd"]

    return Own((noise(6, 5, 2, seed=k, dtype=np.uint16), k % 2) for k in range(int(count)))


def test_ones_own_dataset_is_a_kind():
    data = open_data("python:tests.data.sources.test_kinds:make_dataset?count=4&size=3", channels=2)
    assert len(data) == 3 and data.labels.tolist() == [0, 1, 0] and data.classes == ["even", "odd"]
    assert data.image(1).dtype == torch.uint16
    assert np.array_equal(channels_last(data.image(1)), noise(6, 5, 2, seed=1, dtype=np.uint16))


def test_saved_data_sets_of_the_hub_keep_their_bits(tmp_path):
    datasets = pytest.importorskip("datasets")
    deep, flat = noise(6, 5, 3, dtype=np.uint16), noise(6, 5, 3)
    features = datasets.Features(
        {"picture": datasets.Image(), "y": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {
        "picture": [
            {"bytes": content, "path": None} for content in (png16(deep), encoded(flat), b"no")
        ],
        "y": [1, 0, 1],
    }
    splits = {"validation": datasets.Dataset.from_dict(rows, features=features)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = open_data(f"hf:{tmp_path / 'saved'}?split=val")
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [1, 0, 1]
    assert np.array_equal(channels_last(data.image(0)), deep) and np.array_equal(
        channels_last(data.image(1)), flat
    )
    with pytest.raises(UnreadableImage, match="no image"):
        data.image(2)
    with pytest.raises(ValueError, match="no split 'train'; split= is one of validation"):
        open_data(f"hf:{tmp_path / 'saved'}?split=train")
    with pytest.raises(ValueError, match="no column x; label=NAME is one of picture, y"):
        open_data(f"hf:{tmp_path / 'saved'}?split=val&label=x")


def test_without_its_package_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_data("hf:org/name?split=train")


@pytest.mark.parametrize(
    "spec, error, text",
    [
        ("tar:{}/s-{{0..2}}.tar", FileNotFoundError, "s-0.tar.* 2 more of 3 are missing"),
        ("tar:{}/empty.tar", FileNotFoundError, "no image in"),
        ("tar:{}/packed.tar", ValueError, "is compressed.*gunzip"),
        ("npz:{}/x.npz", ValueError, "needs a split; split= is one of train"),
        ("npz:{}/x.npz?split=val", ValueError, "has no split 'val'"),
        ("npz:{}/bad.npz?split=val", ValueError, "cannot read"),
        ("npz:{}/none.npz?split=val", FileNotFoundError, "no file"),
        ("python:no.such:thing", ValueError, "names no package.module:callable"),
        (
            "python:tests.data.sources.test_kinds:nothing",
            ValueError,
            "names no package.module:callable",
        ),
        (
            "python:tests.data.sources.test_kinds:make_dataset?cuont=1",
            ValueError,
            "does not take cuont",
        ),
        ("folder:{}?window=40", ValueError, "window is CENTRE,WIDTH"),
        ("folder:{}?window=40,0", ValueError, "positive width"),
        ("mix:{}/none.yaml", FileNotFoundError, "no file"),
        ("mix:{}/text.yaml", ValueError, "must be a list"),
        ("mix:{}/typo.yaml", ValueError, "keys are data, weight"),
        ("mix:{}/word.yaml", ValueError, "are numbers"),
        ("mix:{}/zero.yaml", ValueError, "all weights are 0"),
        ("mix:{}/nested.yaml", ValueError, "itself a mixture"),
        ("mix:{}/text.yaml?size=3", ValueError, "mix takes no keys"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, spec, error, text):
    write_tar(tmp_path / "empty.tar", {"a.txt": b""})
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "x.npz", train_images=noise(1, 2, 2))
    for name, content in {
        "text": "a",
        "typo": "[{data: scenes, wieght: 1}]",
        "word": "[{data: scenes, weight: much}]",
        "zero": "[{data: 'scenes?size=1', weight: 0}]",
        "nested": f"[{{data: {tmp_path}/text.yaml}}]",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    with pytest.raises(error, match=text) as caught:
        open_data(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


# Depth and channels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_images_of_any_channels_and_depth_pass_the_loader_unrounded(tmp_path, channels, dtype):
    arrays = [noise(32, 32, channels, seed=k, dtype=dtype) for k in range(2)]
    for k, array in enumerate(arrays):
        np.save(tmp_path / f"{k}.npy", array)
    (batch,) = batches_of(open_data(str(tmp_path), channels), channels, size=32)
    for image, index in zip(batch.global_crops, batch.images, strict=True):
        expected = arrays[index].transpose(2, 0, 1) / np.iinfo(dtype).max
        assert np.abs(image.numpy() - expected).max() < 1e-6


def test_a_sixteen_bit_tiff_keeps_more_than_256_values_through_the_loader(tmp_path):
    array = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(array).save(tmp_path / "a.tif")
    for size, least in ((32, 1024), (24, 500)):  # as it is, and resized
        (batch,) = batches_of(open_data(str(tmp_path), 1), 1, size=size, batch_size=1)
        assert batch.global_crops.unique().numel() >= least


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colours_of_a_png_are_kept(tmp_path, channels):
    array = noise(9, 7, channels, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(array))
    assert np.array_equal(channels_last(read_image(tmp_path / "a.png", None)), array)


@pytest.mark.parametrize(
    "case", ["many bands", "bands apart", "deep colour", "deep alpha", "float", "infrared"]
)
def test_tiff_keeps_bits_and_bands(tmp_path, case):
    tifffile = pytest.importorskip("tifffile")
    array, options = {
        "many bands": (
            noise(9, 7, 13, dtype=np.uint16),
            {"photometric": "minisblack", "planarconfig": "contig"},
        ),
        "bands apart": (
            noise(13, 9, 7, dtype=np.uint16),
            {"photometric": "minisblack", "planarconfig": "separate"},
        ),
        "deep colour": (noise(9, 7, 3, dtype=np.uint16), {"photometric": "rgb"}),
        "deep alpha": (
            noise(9, 7, 4, dtype=np.uint16),
            {"photometric": "rgb", "extrasamples": ["unassalpha"]},
        ),
        "float": (
            np.random.default_rng(0).random((9, 7, 5), np.float32),
            {"photometric": "minisblack", "planarconfig": "contig"},
        ),
        "infrared": (noise(9, 7, 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    }[case]
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    image = read_image(tmp_path / "a.tif", None)
    assert np.array_equal(
        image.numpy(), array if case == "bands apart" else array.transpose(2, 0, 1)
    )
    if case == "deep alpha":  # dropped for three channels, as transparency is everywhere
        assert torch.equal(read_image(tmp_path / "a.tif", 3), image[:3])
    if case == "infrared":  # a band is not transparency
        with pytest.raises(UnreadableImage, match="has 4 channels, 3 are asked for"):
            read_image(tmp_path / "a.tif", 3)


def test_without_tifffile_deep_colours_are_refused_and_not_rounded(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", noise(9, 7, 3, dtype=np.uint16), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UnreadableImage, match="pip install tifffile"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_tiff_is_turned_as_shallow_tiff_is(tmp_path, orientation):
    tifffile = pytest.importorskip("tifffile")
    array = noise(5, 7, 3)
    tags = [(274, 3, 1, orientation, True)]
    for name, pixels in (("shallow", array), ("deep", array.astype(np.uint16) * 257)):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, photometric="rgb", extratags=tags)
    shallow, deep = (read_image(tmp_path / f"{name}.tif") for name in ("shallow", "deep"))
    assert torch.equal(deep.int(), shallow.int() * 257)


def test_grey_pages_are_channels_and_one_can_be_taken(tmp_path):
    pages = noise(4, 9, 7, dtype=np.uint16)
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    assert np.array_equal(open_data(str(tmp_path), 4).image(0).numpy(), pages)
    assert np.array_equal(open_data(f"{tmp_path}?page=2", 1).image(0)[0].numpy(), pages[2])
    with pytest.raises(UnreadableImage, match="no page 4, counted from 0; there are 4"):
        open_data(f"{tmp_path}?page=4", 1).image(0)


def test_of_colour_pages_and_of_thumbnails_the_first_page_is_taken(tmp_path):
    colour = [noise(9, 7, 3, seed=k) for k in range(2)]
    sizes = [noise(9, 7), noise(3, 2)]
    for name, (first, second) in (("colour", colour), ("sizes", sizes)):
        Image.fromarray(first).save(
            tmp_path / f"{name}.tif", save_all=True, append_images=[Image.fromarray(second)]
        )
    assert np.array_equal(channels_last(read_image(tmp_path / "colour.tif")), colour[0])
    assert np.array_equal(read_image(tmp_path / "sizes.tif", 1)[0], sizes[0])


def test_a_window_of_hounsfield_units_becomes_zero_to_one(tmp_path):
    units = np.linspace(-1024, 3071, 900).astype(np.int16).reshape(30, 30)
    np.save(tmp_path / "a.npy", units)
    expected = ((units.astype(np.float64) + 160) / 400).clip(0, 1)
    image = open_data(f"{tmp_path}?window=40,400", 1).image(0)
    assert image.dtype == torch.float32 and np.abs(image[0].numpy() - expected).max() < 1e-6
    wide = open_data(f"{tmp_path}?window=1000,4200", 1).image(0)
    assert wide.unique().numel() > 256 and open_data(f"{tmp_path}?window=40,400").image(
        0
    ).shape == (3, 30, 30)


@pytest.mark.parametrize("shape, channels, expected", [
    ((5, 7), None, (1, 5, 7)), ((5, 7, 3), None, (3, 5, 7)), ((3, 5, 7), None, (3, 5, 7)),
    ((13, 9, 9), 13, (13, 9, 9)),
    ((1, 1, 3), 3, (3, 1, 1)), ((4, 6, 3), 4, (4, 6, 3)), ((3, 9, 3), 3, (3, 3, 9)),
])  # fmt: skip
def test_the_channels_of_an_array_are_found(shape, channels, expected):
    assert array_to_tensor(noise(*shape), channels).shape == expected


def test_an_npz_in_a_folder_is_one_image(tmp_path):
    array = np.random.default_rng(0).random((9, 7, 2))
    np.savez_compressed(tmp_path / "a.npz", image=array, mask=noise(9, 7))
    image = open_data(str(tmp_path), 2).image(0)
    assert image.dtype == torch.float32 and np.array_equal(
        channels_last(image), array.astype(np.float32)
    )


@pytest.mark.parametrize(
    "image", [torch.rand(3, 4, 5), torch.from_numpy(noise(3, 4, 5, dtype=np.uint16))]
)
def test_luminance_of_deep_colours_keeps_their_type(image):
    grey = fit_channels(image, 1, "image")
    red, green, blue = image.double()
    assert grey.shape == (1, 4, 5) and grey.dtype == image.dtype
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (grey[0].double() - expected).abs().max() <= (1e-4 if image.is_floating_point() else 1)


# Statistics


def test_statistics_equal_a_naive_loop(tmp_path, capsys):
    arrays = [noise(9 + k, 7, 2, seed=k, dtype=np.uint16) for k in range(5)]
    for k, array in enumerate(arrays):
        np.save(tmp_path / f"{k}.npy", array)
    (tmp_path / "bad.npy").write_bytes(b"")
    stats.main([str(tmp_path)])
    result = json.loads(capsys.readouterr().out)
    units = [array / 65535 for array in arrays]
    mean = np.mean([unit.mean((0, 1)) for unit in units], 0)
    std = np.sqrt(np.mean([((unit - mean) ** 2).mean((0, 1)) for unit in units], 0))
    assert np.allclose(result["mean"], mean, atol=1e-6) and np.allclose(
        result["std"], std, atol=1e-6
    )
    assert result["min"] == np.min([array.min((0, 1)) for array in arrays], 0).tolist()
    assert result["max"] == np.max([array.max((0, 1)) for array in arrays], 0).tolist()
    assert (result["images"], result["bad"], result["dtype"], result["channels"]) == (
        5,
        1,
        {"uint16": 5},
        2,
    )
    assert (result["task"], result["height"], result["width"]) == ("stats", [9, 13], [7, 7])


def test_statistics_of_mixed_channels_ask_for_one_number(images, capsys):
    with pytest.raises(ValueError, match="images have 1 and 3 channels; --channels"):
        stats.main([str(images)])
    stats.main([str(images), "--channels", "1", "--images", "5"])
    assert json.loads(capsys.readouterr().out)["images"] == 5
