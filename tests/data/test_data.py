"""Data: specs, pixels, and the stream of batches."""

import csv
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from data import augment
from data.augment import POLICIES, CropSpec, MultiCrop, draw
from data.evaluation import EvalDataset
from data.loader import Views, make_loader
from data.masking import MaskSpec
from data.pictures import read_image
from data.sources.published import TorchvisionImages
from data.sources.specs import UnreadableImage, match_classes, open_data


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def write_csv(path, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path):
    """Twelve flat images of odd sizes, no labels."""
    rng = np.random.default_rng(0)
    for k, size in enumerate([(50, 97), (1, 1), (97, 50), (1, 30)] * 3):
        save(tmp_path / f"{k:02d}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return tmp_path


def multi_crop(channels=3, local_count=3) -> MultiCrop:
    return MultiCrop(
        CropSpec((16, 24), (0.4, 1.0), 2),
        CropSpec((8, 12), (0.05, 0.4), local_count),
        POLICIES["natural"],
        (0.5,) * channels,
        (0.25,) * channels,
    )


def loader_of(data, batch_size=4, steps=3, **options):
    options = {"seed": 3, "stop_step": steps} | options
    views = [Views(multi_crop(), options.pop("masks", MaskSpec((4, 6))))]
    return make_loader(data, views, batch_size=batch_size, **options)


def assert_same(a, b):
    assert a.images == b.images and a.bad == b.bad
    for name in ("global_crops", "local_crops", "masks"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# Specs


def test_flat_folder_has_no_labels_and_any_size(folder):
    (folder / ".hidden.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("")
    data = open_data(str(folder))
    assert len(data) == 12 and data.labels is None and data.classes is None
    assert data.name(0) == str(folder / "00.png")
    assert data[0][0].shape == (3, 50, 97) and data[1][0].shape == (3, 1, 1) and data[0][1] == -1
    assert len(open_data(f"folder:{folder}?size=5")) == 5
    with pytest.raises(ValueError, match="no annotations"):
        data.annotations(0)


def test_classes_are_the_first_sub_folder(tmp_path):
    for name in ("val/dog/a.png", "val/cat/deep/er/b.JPG", "val/c.png", "test/eel/a.png"):
        save(tmp_path / name, noise(4, 4, 3))
    data = open_data(f"{tmp_path}?split=val")
    assert [data.name(i).removeprefix(f"{tmp_path}/val/") for i in range(3)] == [
        "c.png",
        "cat/deep/er/b.JPG",
        "dog/a.png",
    ]
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [-1, 0, 1]
    (tmp_path / "val").rename(tmp_path / "train")
    assert open_data(f"folder:{tmp_path}?split=val").classes == ["eel"]  # the test folder instead


def test_labels_from_a_table(folder):
    write_csv(folder / "y.csv", ["label", "file"], ["10", "01.png"], ["9", "00.png"], ["9", "x"])
    for labels in ("y.csv", folder / "y.csv"):
        data = open_data(f"folder:{folder}?labels={labels}&size=3")
        assert data.classes == ["9", "10"] and data.labels.tolist() == [0, 1, -1]


def test_lists_are_relative_to_themselves(folder):
    absolute = save(folder / "elsewhere" / "far.png", noise(4, 4, 3))
    (folder / "files.txt").write_text(f"03.png\n\n{absolute}\n")
    data = open_data(str(folder / "files.txt"))
    assert len(data) == 2 and data.labels is None
    assert data.image(0).shape == (3, 1, 30) and data.image(1).shape == (3, 4, 4)
    write_csv(folder / "files.csv", ["file", "label"], ["02.png", "b"], ["00.png", "a"])
    data = open_data(f"list:{folder / 'files.csv'}")
    assert data.labels.tolist() == [1, 0] and data.image(0).shape == (3, 97, 50)


def write_fashion_mnist(root, split, images, labels):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    sizes = [np.array(images.shape, ">u4"), np.array(labels.shape, ">u4")]
    (raw / f"{split}-images-idx3-ubyte").write_bytes(
        b"\0\0\x08\x03" + sizes[0].tobytes() + images.numpy().tobytes()
    )
    (raw / f"{split}-labels-idx1-ubyte").write_bytes(
        b"\0\0\x08\x01" + sizes[1].tobytes() + labels.numpy().astype(np.uint8).tobytes()
    )


def test_torchvision_class_by_snake_case_name(tmp_path):
    train, test = noise(6, 28, 28), noise(4, 28, 28, seed=1)
    write_fashion_mnist(tmp_path, "train", train, torch.arange(6))
    write_fashion_mnist(tmp_path, "t10k", test, torch.arange(4))
    data = open_data(f"fashion_mnist:{tmp_path}?split=train&size=5", channels=1)
    assert len(data) == 5 and data.labels.tolist() == [0, 1, 2, 3, 4] and len(data.classes) == 10
    assert torch.equal(data.image(2), train[2:3])
    val = open_data(f"FashionMNIST:{tmp_path}?split=val")  # there is no val: test
    assert torch.equal(val.image(1), test[[1]].expand(3, -1, -1)) and val[1][1] == 1
    with pytest.raises(FileNotFoundError, match="no FashionMNIST data in .*download=1"):
        open_data(f"fashion_mnist:{tmp_path / 'none'}?split=train")
    with pytest.raises(ValueError, match="'x'; choose from train, val, test"):
        open_data(f"fashion_mnist:{tmp_path}?split=x")


def test_torchvision_class_with_files(tmp_path):
    for name in ("Forest/a.png", "River/b.png"):
        path = save(tmp_path / "eurosat" / "2750" / name, noise(5, 7, 3))
    path.write_bytes(path.read_bytes()[:60])
    data = open_data(f"eurosat:{tmp_path}")
    assert data.classes == ["Forest", "River"] and data.labels.tolist() == [0, 1]
    assert torch.equal(data.image(0), noise(5, 7, 3).permute(2, 0, 1))
    with pytest.raises(UnreadableImage):
        data.image(1)
    with pytest.raises(ValueError, match="no splits"):
        open_data(f"eurosat:{tmp_path}?split=train")


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["CHW", "HWC"])
def test_arrays_in_memory_are_read_in_both_layouts(layout):
    class Arrays(list):
        data, targets = noise(5, 3, 6, 8).permute(layout).numpy(), [4, 3, 2, 1, 0]

    data = TorchvisionImages(Arrays(range(5)), "arrays")
    assert torch.equal(data.image(3), noise(5, 3, 6, 8)[3]) and data[3][1] == 1


def test_scenes_are_one_kind_among_others():
    data = open_data("scenes?split=val&size=3&resolution=32")
    assert len(data) == 3 and data.image(0).shape == (3, 32, 32)
    grey = open_data("scenes?split=val&size=3&resolution=32", channels=1)
    assert grey.image(0).shape == (1, 32, 32) and grey[2][1] == data[2][1]


@pytest.mark.parametrize(
    "spec, error, text",
    [
        ("foldr:{}", ValueError, "did you mean 'folder'"),
        ("fashon_mnist", ValueError, "did you mean 'fashion_mnist'"),
        ("wibble:{}", ValueError, "kinds are folder, list, tar"),
        ("folder:{}?sise=3", ValueError, "did you mean 'size'.*takes split, size, labels"),
        ("folder:{}?size=many", ValueError, "size must be a whole number"),
        ("folder:{}?size=0", ValueError, "size must be a whole number"),
        ("folder", ValueError, "needs a path"),
        ("cifar10:{}?download=yes", ValueError, "download is 0 or 1"),
        ("stl10:{}?split=vla", ValueError, "Unknown value 'vla'"),
        ("{}/missing", FileNotFoundError, "no folder or file"),
        ("list:{}/missing.txt", FileNotFoundError, "no file"),
        ("{}/empty", FileNotFoundError, "no image in"),
        ("{}?split=train", FileNotFoundError, "no folder 'train'"),
        ("{}?labels=bad.csv", ValueError, "no column 'label'"),
        ("{}?labels=other.csv", ValueError, "names no image"),
    ],
)
def test_mistakes_get_one_sentence(folder, spec, error, text):
    (folder / "empty").mkdir()
    write_csv(folder / "bad.csv", ["file", "lable"], ["00.png", "a"])
    write_csv(folder / "other.csv", ["file", "label"], ["x.png", "a"])
    with pytest.raises(error, match=text) as caught:
        open_data(spec.format(folder))
    assert "\n" not in str(caught.value)


def test_classes_are_matched_by_name(tmp_path):
    def labelled(name, *classes):
        rows = [["file", "label"], *(["x.png", c] for c in classes)]
        return open_data(str(write_csv(tmp_path / name, *rows)))

    train, val = labelled("a.csv", "cat", "dog", "eel"), labelled("b.csv", "eel", "bee", "", "cat")
    assert match_classes(train, val).tolist() == [2, -1, -1, 0]
    assert match_classes(train, labelled("c.csv", "", "")) is None
    with pytest.raises(ValueError, match="no class in common"):
        match_classes(train, labelled("d.csv", "ant"))


# Pixels


def test_every_colour_mode_gives_the_pixels_of_pillow(tmp_path):
    colour = Image.fromarray(noise(9, 7, 3).numpy())
    alpha = Image.fromarray(noise(9, 7, 4, seed=1).numpy())
    palette = colour.quantize(8)
    pictures = {
        "rgb.png": colour,
        "rgba.png": alpha,
        "la.png": alpha.convert("LA"),
        "l.png": colour.convert("L"),
        "one.png": colour.convert("1"),
        "p.png": palette,
        "cmyk.tif": colour.convert("CMYK"),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    palette.save(tmp_path / "clear.png", transparency=0)
    for path in tmp_path.iterdir():
        rgb = Image.open(path).convert("RGB")
        expected = np.asarray(rgb).transpose(2, 0, 1)
        assert np.array_equal(read_image(path, 3), expected), path
        if Image.open(path).mode in ("RGB", "RGBA", "P", "CMYK"):
            assert np.array_equal(read_image(path, 1)[0], rgb.convert("L")), path
    kept = {path.name: len(read_image(path, None)) for path in tmp_path.iterdir()}
    assert kept == {
        "rgb.png": 3,
        "rgba.png": 4,
        "la.png": 2,
        "l.png": 1,
        "one.png": 1,
        "p.png": 3,
        "clear.png": 4,
        "cmyk.tif": 3,
    }
    with pytest.raises(UnreadableImage, match="l.png: has 1 channels, 4 are asked for"):
        read_image(tmp_path / "l.png", 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    shown = noise(4, 6, 3).numpy()
    # What the camera stored, so that the tag leads back to `shown`.
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.swapaxes(0, 1),
        6: np.rot90(shown),
        7: shown[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(read_image(path), shown.transpose(2, 0, 1))


def test_sixteen_bits_are_not_truncated(tmp_path):
    array = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = read_image(save(tmp_path / "deep.png", array), 1)
    assert np.array_equal(image[0].to(torch.int32), array)
    crop = augment.resized_crop(image, (0, 0, 32, 32), (32, 32), False)
    assert torch.equal((crop * 65535).round().int(), image.int())
    views, _, _ = multi_crop(1)([image, noise(1, 9, 9)], [draw(seeded(k), 5) for k in range(2)])
    assert views.shape == (4, 1, 16, 24) and views.isfinite().all()


def test_unreadable_images_say_which_and_why(tmp_path, monkeypatch):
    path = save(tmp_path / "a.jpg", noise(64, 64, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="a.jpg: .*decompression bomb"):
        read_image(path)
    path.write_bytes(path.read_bytes()[:300])
    for broken in (path, tmp_path / "missing.png"):
        with pytest.raises(UnreadableImage) as caught:
            read_image(broken)
        error = pickle.loads(pickle.dumps(caught.value))  # as it comes out of a worker
        assert error.name == str(broken) and error.reason and str(error).count("\n") == 0


def test_evaluation_crop_is_that_of_torchvision(folder):
    data = open_data(str(folder))
    crops = EvalDataset(data, 32, (20, 28), (0.5,) * 3, (0.25,) * 3)
    for index in (0, 2):
        resize = v2.Resize(32, v2.InterpolationMode.BICUBIC)
        crop, label, same = crops[index]
        assert crop.shape == (3, 20, 28) and label == -1 and same == index
        difference = crop * 0.25 + 0.5 - v2.CenterCrop((20, 28))(resize(data.image(index))) / 255
        assert difference.abs().max() < 1.5 / 255


def test_evaluation_crop_never_reaches_beyond_the_image(folder):
    crops = EvalDataset(open_data(str(folder)), 16, (16, 48), (0.5,) * 3, (0.25,) * 3)
    assert {crop.shape for crop, _, _ in (crops[i] for i in range(4))} == {(3, 16, 48)}


# The stream


def test_batches_do_not_depend_on_the_number_of_workers(folder):
    data = open_data(str(folder))
    here, there = list(loader_of(data)), list(loader_of(data, workers=2))
    assert len(here) == len(there) == 3
    for a, b in zip(here, there, strict=True):
        assert_same(a, b)
    assert here[0].global_crops.shape == (8, 3, 16, 24) and here[0].masks.shape == (8, 24)
    assert not torch.equal(here[0].global_crops, here[1].global_crops)


def test_ranks_share_the_batch_of_one_process(folder):
    (folder / "05.png").write_bytes(b"broken")
    data = open_data(str(folder))
    whole = loader_of(data, batch_size=6)
    ranks = [loader_of(data, batch_size=6, rank=rank, world_size=2) for rank in range(2)]
    for one, *shares in zip(whole, *ranks, strict=True):
        assert one.images == shares[0].images + shares[1].images
        assert sorted(one.bad) == sorted(shares[0].bad + shares[1].bad)
        for name in ("global_crops", "local_crops", "masks"):
            views = [getattr(b, name).unflatten(0, (-1, len(b.images))) for b in (one, *shares)]
            assert torch.equal(views[0], torch.cat(views[1:], 1)), name
    with pytest.raises(ValueError, match="batch size 5 is not a multiple of 2 ranks"):
        loader_of(data, batch_size=5, world_size=2)


def test_starting_at_a_step_continues_the_stream(folder):
    data = open_data(str(folder))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = list(loader_of(data, batch_size=5, steps=8))
    assert torch.equal(torch.get_rng_state(), state)  # making batches leaves the training's alone
    for a, b in zip(whole[5:], loader_of(data, batch_size=5, steps=8, start_step=5), strict=True):
        assert_same(a, b)


def test_no_image_repeats_before_all_were_seen(folder):
    loader = loader_of(open_data(str(folder)), batch_size=5, steps=12)
    seen = np.concatenate([loader.dataset.indices(step) for step in range(12)]).tolist()
    epochs = [tuple(seen[start : start + 12]) for start in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and len(set(epochs)) == 5
    other = loader_of(open_data(str(folder)), batch_size=5, seed=4)
    assert other.dataset.indices(0).tolist() != seen[:5]


def test_a_folder_smaller_than_the_batch_repeats_after_all_were_seen(folder):
    loader = loader_of(open_data(f"{folder}?size=3"), batch_size=8, steps=2)
    batch = next(iter(loader))
    assert [sorted(batch.images[k : k + 3]) for k in (0, 3)] == [[0, 1, 2]] * 2
    again = [k for k in range(8) if batch.images[k] == 0]
    assert not torch.equal(*batch.global_crops[again[:2]])  # other crops each time
    first, second = loader_of(open_data(f"{folder}?size=1"), batch_size=2, steps=2)
    assert not torch.equal(first.global_crops, second.global_crops)  # and at every step


def test_unreadable_images_are_replaced_and_reported(folder):
    kept = [2, 7]
    for k in range(12):
        if k not in kept:
            path = save(folder / f"{k:02d}.jpg", noise(64, 64, 3))
            path.write_bytes(path.read_bytes()[:-900])
            (folder / f"{k:02d}.png").unlink()
    batch = next(iter(loader_of(open_data(str(folder)), batch_size=12, workers=2)))
    assert set(batch.images) == set(kept) and len(batch.images) == 12
    assert len(batch.bad) == 10
    assert all(name.endswith(".jpg") and "truncated" in reason for name, reason in batch.bad)
    for k in kept:
        (folder / f"{k:02d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 12 images of a batch could be read"):
        next(iter(loader_of(open_data(str(folder)), batch_size=12)))


def test_a_batch_splits_into_micro_batches(folder):
    batch = next(iter(loader_of(open_data(str(folder)), batch_size=5)))
    parts = batch.split(2)
    whole = batch.images
    assert [part.images for part in parts] == [whole[:2], whole[2:4], whole[4:]]
    for name in ("global_crops", "local_crops", "masks"):
        views = [getattr(part, name).unflatten(0, (-1, len(part.images))) for part in parts]
        assert torch.equal(torch.cat(views, 1).flatten(0, 1), getattr(batch, name))
    moved = batch.to("meta", non_blocking=True)
    assert {moved.global_crops.device.type, moved.masks.device.type} == {"meta"}
    assert moved.images == batch.images


def test_masks_and_local_crops_are_optional(folder):
    globals_only = multi_crop(local_count=0)
    loader = make_loader(
        open_data(str(folder)), [Views(globals_only)], batch_size=4, seed=0, stop_step=1
    )
    batch = next(iter(loader))
    assert batch.local_crops is None and batch.masks is None
    assert [part.global_crops.shape[0] for part in batch.split(3)] == [6, 2]


# ----------------------------------------------------------------- floats


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_nodata_becomes_0_with_a_window_and_is_refused_without(kind, tmp_path):
    image = np.array([[0.25, np.nan], [np.inf, -np.inf]], kind)
    np.save(tmp_path / "a.npy", image)
    with pytest.raises(UnreadableImage, match=r"NaN or infinite values; window=.*, and NaN 0"):
        open_data(f"folder:{tmp_path}").image(0)
    read = open_data(f"folder:{tmp_path}?window=0.5,1", 1).image(0)[0]
    assert read.tolist() == [[0.25, 0.0], [1.0, 0.0]]


def test_floats_a_hair_outside_are_clamped_and_others_named_to_the_last_digit(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[-5e-7, 0.5], [1, 1 + 5e-7]], np.float64))
    assert open_data(f"folder:{tmp_path}", 1).image(0)[0].tolist() == [[0.0, 0.5], [1.0, 1.0]]
    np.save(tmp_path / "a.npy", np.array([[0, 0.5], [1, 1 + 5e-6]], np.float64))
    with pytest.raises(UnreadableImage, match=r"values from 0 to 1\.000005"):
        open_data(f"folder:{tmp_path}", 1).image(0)
