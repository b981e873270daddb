"""Images that break readers: a readable one gives the right pixels, an unreadable one its name and
the reason."""

import json
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data.pictures import read_image
from data.sources.specs import UnreadableImage, open_data
from tests.deep import noise, png16, png_chunk

COLOUR, DEEP = noise(20, 30, 3), noise(20, 30, 3, dtype=np.uint16)


def first_rows(array: np.ndarray) -> torch.Tensor:
    """(C, H, W) of (H, W) or (H, W, C), grey repeated to three."""
    array = array if array.ndim == 3 else array[..., None]
    return torch.from_numpy(array.transpose(2, 0, 1).copy()).expand(3, -1, -1)


def write_readable(folder) -> dict[str, torch.Tensor]:
    """Odd files, and the pixels of each, worked out here and not by a reader."""
    cmyk = noise(20, 30, 4, seed=1)
    ink = 255 - cmyk.astype(np.int64)
    index, palette = noise(20, 30, seed=2), noise(256, 3, seed=3)
    alpha, frames = noise(20, 30, 4, seed=4), noise(3, 20, 30, 3, seed=5)
    arrays = (
        ("cmyk.tif", cmyk, "CMYK"), ("alpha.png", alpha, "RGBA"), ("palette.png", index, "P"),
        ("one_pixel.png", COLOUR[:1, :1], "RGB"), ("strip.png", noise(1, 30_000, seed=6), "L"),
    )  # fmt: skip
    pictures = {}
    for name, array, mode in arrays:
        pictures[name] = Image.frombytes(mode, array.shape[1::-1], array.tobytes())
    pictures["palette.png"].putpalette(palette.tobytes())
    for name, picture in pictures.items():
        picture.save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(COLOUR).save(folder / "turned.png", exif=turned)
    for name, options in (("animated.png", {}), ("animated.webp", {"lossless": True})):
        first, *others = (Image.fromarray(frame) for frame in frames)
        first.save(folder / name, save_all=True, append_images=others, **options)
    (folder / "sixteen_bits.png").write_bytes(png16(DEEP))
    (folder / "sixteen_bits_alpha.png").write_bytes(png16(np.concatenate([DEEP, DEEP[..., :1]], 2)))
    (folder / "sixteen_bits_turned.png").write_bytes(png16(DEEP, orientation=6))
    Image.fromarray(DEEP[..., 0]).save(folder / "sixteen_bits_grey.png")
    Image.fromarray(COLOUR).save(folder / "png_called.jpg", "PNG")
    Image.fromarray(COLOUR).save(folder / "tiff_called.png", "TIFF")
    with open(folder / "array_called.gif", "wb") as file:
        np.save(file, COLOUR)
    arrays = {
        "cmyk.tif": (ink[..., :3] * ink[..., 3:] / 255).round().astype(np.uint8),
        "alpha.png": alpha[..., :3],
        "palette.png": palette[index],
        "one_pixel.png": COLOUR[:1, :1],
        "strip.png": noise(1, 30_000, seed=6),
        "turned.png": np.rot90(COLOUR, -1),
        "animated.png": frames[0],
        "animated.webp": frames[0],
        "sixteen_bits.png": DEEP,
        "sixteen_bits_alpha.png": DEEP,
        "sixteen_bits_turned.png": np.rot90(DEEP, -1),
        "sixteen_bits_grey.png": DEEP[..., 0],
        "png_called.jpg": COLOUR,
        "tiff_called.png": COLOUR,
        "array_called.gif": COLOUR,
    }
    return {name: first_rows(array) for name, array in arrays.items()}


def write_unreadable(folder) -> dict[str, str]:
    """Broken files, and what the reason must say."""
    for name in ("truncated.jpg", "truncated.png", "truncated.tif", "truncated.gif"):
        Image.fromarray(noise(60, 60, 3)).save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:900])
    (folder / "truncated_deep.png").write_bytes(png16(DEEP)[:900])
    np.save(folder / "truncated.npy", COLOUR)
    (folder / "truncated.npy").write_bytes((folder / "truncated.npy").read_bytes()[:900])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image at all")
    write_huge_png(folder / "huge.png", bits=1)
    write_huge_png(folder / "huge_deep.png", bits=16)
    with open(folder / "huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (30_000, 30_000)}
        )
        file.truncate(900_000_200)  # a hole: takes no room on the disk
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    np.save(folder / "bands.npy", noise(9, 9, 5))
    np.save(folder / "hounsfield.npy", np.full((9, 9), -1000, np.int16))
    np.save(folder / "nan.npy", np.full((9, 9), np.nan, np.float32))
    np.save(folder / "objects.npy", np.array([{}] * 4).reshape(2, 2), allow_pickle=True)
    return dict.fromkeys((path.name for path in folder.iterdir()), ".") | {
        "huge.png": "900000000 pixels",
        "huge_deep.png": "30000 x 30000 pixels",
        "huge.npy": "30000 x 30000 pixels",
        "gone.png": "No such file",
        "bands.npy": "has 5 channels, 3 are asked for",
        "hounsfield.npy": "values from -1000 to -1000 .* window=",
        "zero.png": "empty file",
        "text.jpg": "no image",
        "truncated_deep.png": "truncated",
        "nan.npy": "NaN",
        "truncated.jpg": "truncated",
    }


def write_huge_png(path, bits: int) -> None:
    """30,000 x 30,000: whole with 1 bit (a small file), its header alone with 16."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, bits, 0 if bits == 1 else 2, 0, 0, 0)
    pixels = zlib.compress(bytes((30_000 // 8 + 1) * 30_000), 1) if bits == 1 else b""
    chunks = (b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


def test_odd_images_are_read_with_the_right_pixels(tmp_path):
    expected = write_readable(tmp_path)
    for path in tmp_path.iterdir():
        image = read_image(path)
        assert (
            image.dtype == expected[path.name].dtype and image.shape == expected[path.name].shape
        ), path.name
        off = (image.int() - expected[path.name].int()).abs().max()
        assert off <= (1 if path.name == "cmyk.tif" else 0), (
            path.name,
            off,
        )  # Pillow rounds inks its own way


def test_an_animated_gif_shows_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "a.gif") == 10).all() and (
        read_image(tmp_path / "a.gif", page=1) == 200
    ).all()


def test_unreadable_images_say_why(tmp_path):
    for name, reason in write_unreadable(tmp_path).items():
        with pytest.raises(UnreadableImage, match=reason) as caught:
            read_image(tmp_path / name)
        assert caught.value.name == str(tmp_path / name) and "\n" not in str(caught.value)


def test_thirty_thousand_pixels_square_are_refused_undecoded(tmp_path):
    write_unreadable(tmp_path)
    start = time.perf_counter()
    for name in ("huge.png", "huge_deep.png", "huge.npy"):
        with pytest.raises(UnreadableImage, match="pixels"):
            read_image(tmp_path / name)
    assert time.perf_counter() - start < 0.5  # decoding 900 million pixels takes seconds


def test_a_file_may_vanish_after_the_folder_was_listed(images):
    data = open_data(str(images))
    (images / "3.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        data.image([data.name(k) for k in range(12)].index(str(images / "3.png")))


def test_a_folder_with_hostile_images_trains_and_lists_exactly_those_it_could_not_read(
    tmp_path, tiny
):
    folder = tmp_path / "images"
    folder.mkdir()
    broken = {str(folder / name) for name in write_unreadable(folder)}
    write_readable(folder)
    for number in range(200):
        Image.fromarray(noise(36, 40, 3, seed=number)).save(folder / f"good_{number}.png")
    steps = -(-len(list(folder.iterdir())) // 8)
    train.main(
        [
            *tiny,
            f"data.train={folder}",
            f"total_steps={steps}",
            "data.max_bad=20",
            "checkpoint.every=100",
        ]
    )
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in lines} == broken and len(lines) == len(broken)
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert logged[-1]["step"] == steps and np.isfinite([row["loss"] for row in logged]).all()
