"""Files of 16 bits that Pillow cannot write, and other images for tests of readers."""

import struct
import zlib

import numpy as np


def noise(*shape: int, seed: int = 0, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png16(array: np.ndarray, orientation: int | None = None) -> bytes:
    """A 16-bit PNG of (H, W, C) uint16: grey, grey and alpha, RGB or RGBA (PNG, section 11.2.2)."""
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)  # 0: no filter
    chunks = [png_chunk(b"IHDR", header)]
    if orientation is not None:  # big-endian TIFF header, one tag of one SHORT
        chunks.append(
            png_chunk(
                b"eXIf", b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
            )
        )
    chunks += [png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
