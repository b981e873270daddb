"""Images in tar shards (WebDataset layout), read at random from an index of offsets in memory.

Members that share a name up to its first dot belong together: 0001.jpg, 0001.cls, 0001.json. One
pass over the headers finds them. An image is read only when it is asked for, so the order is as
free, and resuming as exact, as with a folder. Damage costs the members it hits: a broken header, a
shard that ends early or an empty shard each count as one unreadable image.

Several ranks divide the shards for that pass and exchange what they found. Training does not
divide them: the batch of a step is drawn from all images, whatever the number of ranks. A rank
opens a shard only while it reads an image from it.
"""

import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from data.captions import clean_caption
from data.images import ImageData, number_classes
from data.pictures import EXTENSIONS, UnreadableImage, Window, error_text, read_open_file
from engine import distributed
from errors import UserError
from files import expand

BLOCK = 512  # bytes; members begin at multiples of it
LABEL_KEYS = ("label", "cls", "class")  # of a .json member
PACKED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}
# Member, offset, size or DAMAGED, class name, offset and size of the caption.
Entry = tuple[str, int, int, str | None, tuple[int, int]]
NO_CAPTION = (0, 0)
DAMAGED = -1


class TarImages(ImageData):
    """Images in uncompressed tar files; a .cls or .json member beside an image names its class, a
    .txt member is its caption.

    All ranks make one together, of the same shards.

    Args:
        reading: keywords of `read_image`.
        size: first so many.

    Raises:
        FileNotFoundError: if a shard is missing, or there is no image in any.
        UserError: if a shard is compressed.
        OSError: on all ranks, if one cannot read its part of the shards.
    """

    def __init__(self, shards: list[Path], reading: dict, size: int | None = None):
        self.shards, self.reading = shards, reading
        stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, shards)]
        index = _index(tuple(shards), tuple(stamps))
        shard, members, places, texts, labels, self.classes, self.passed_over = index
        if (places[:, 1] == DAMAGED).all():
            more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
            extensions = " ".join(sorted(EXTENSIONS))
            raise FileNotFoundError(
                "; ".join(
                    [f"no image in {str(shards[0])!r}{more}", *self.passed_over]
                    + [f"extensions are {extensions}"]
                )
            )
        self.shard, self.members, self.places = shard[:size], members[:size], places[:size]
        self.labels = None if labels is None else labels[:size]
        self.texts, captioned = texts[:size], texts[:size, 1] > 0
        self.captioned = captioned if captioned.any() else None

    def captions(self, index: int) -> list[str]:
        text = _read(self.shards[self.shard[index]], *self.texts[index].tolist())
        return [caption] if (caption := clean_caption(text, Counter())) else []

    def __len__(self) -> int:
        return len(self.shard)

    def image(self, index: int) -> Tensor:
        name, (offset, size) = self.name(index), self.places[index].tolist()
        if size == DAMAGED:
            raise UnreadableImage(name, "broken tar header")
        try:
            content = _read(self.shards[self.shard[index]], offset, size)
        except OSError as error:
            raise UnreadableImage(name, error_text(error)) from error
        if len(content) < size:
            raise UnreadableImage(name, f"truncated: {len(content)} of {size} bytes")
        return read_open_file(io.BytesIO(content), name, **self.reading)

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}/{os.fsdecode(self.members[index])}"

    def files_below(self) -> list[bytes]:
        return list(self.members)


def expand_braces(path: str) -> list[Path]:
    """shard-{000..127}.tar is 128 paths; several braces multiply.

    Numbers are as wide as the first one.
    """
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", path)
    choices = [[parts[0]]]
    for first, last, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        numbers = [str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)]
        if not numbers:
            raise UserError(f"{{{first}..{last}}} in {path!r} counts downwards")
        choices += [numbers, [after]]
    return [expand("".join(chosen)) for chosen in itertools.product(*choices)]


def open_tar(
    path: str,
    channels: int | None,
    *,
    size: int | None = None,
    window: Window | None = None,
    page: int | None = None,
) -> TarImages:
    shards = expand_braces(path)
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        more = f", and {len(missing) - 1} more of {len(shards)} are missing"
        raise FileNotFoundError(f"no file {str(missing[0])!r}{more if len(missing) > 1 else ''}")
    for shard in shards:
        tool = PACKED.get(_read(shard, 0, 2))
        if tool:
            raise UserError(
                f"{str(shard)!r} is compressed, which rules out reading at random; "
                f"unpack it with {tool}"
            )
    return TarImages(shards, {"channels": channels, "window": window, "page": page}, size)


def _read(shard: Path, offset: int, size: int) -> bytes:
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)


@lru_cache(maxsize=8)
def _index(shards: tuple[Path, ...], stamps: tuple) -> tuple:
    """(shard, member, (offset, size), that of the caption, label) of all images, an array each, the
    classes, and what was passed over.

    Kept, because a run opens its data more than once; `stamps` change with the files. Arrays, not
    lists: workers share their pages.
    """
    parts = distributed.gather_objects(_part(shards, distributed.rank(), distributed.world_size()))
    # First the errors: ranks without one would wait for those with one.
    for part in parts:
        if isinstance(part, OSError):
            raise part
    *columns, names, passed = zip(*parts, strict=True)
    columns = [np.concatenate(arrays) for arrays in columns]
    names = list(itertools.chain(*names))
    order = np.argsort(columns[0], kind="stable")  # of the shards, whoever read them
    labels, classes = number_classes([names[place] for place in order])
    found = _sentences(sum(passed, Counter()), str(shards[0]))
    return *(column[order] for column in columns), labels, classes, found


def _part(shards: tuple[Path, ...], first: int, every: int) -> tuple | OSError:
    """The images in shards first, first + every, ...

    Returns:
        shard, member, (offset, size), that of the caption, an array each, a list of class names,
        and counts of what was passed over. Or the error that prevents it, for the others to see.
    """
    try:
        passed = Counter()
        entries = []
        for number in range(first, len(shards), every):
            entries += [(number, *entry) for entry in _entries(shards[number], passed)]
    except OSError as error:
        return error
    return (
        np.array([entry[0] for entry in entries], dtype=np.int32),
        np.array([os.fsencode(entry[1]) for entry in entries], dtype=bytes),
        np.array([entry[2:4] for entry in entries], dtype=np.int64).reshape(-1, 2),
        np.array([entry[5] for entry in entries], dtype=np.int64).reshape(-1, 2),
        [entry[4] for entry in entries],
        passed,
    )


def _entries(shard: Path, passed: Counter) -> Iterator[Entry]:
    """One entry an image, in the order of the shard; what is passed over is counted."""
    members = _members(shard, passed)
    for _, group in itertools.groupby(members, lambda member: _split(member[0])[:2]):
        group = [(*_split(name), name, offset, size) for name, offset, size in group]
        fields = {extension: (offset, size) for _, _, extension, _, offset, size in group}
        for _, _, extension, name, offset, size in group:
            if size == DAMAGED:
                yield name, offset, size, None, NO_CAPTION
            elif extension in EXTENSIONS:
                caption = _caption_place(shard, fields, passed)
                yield name, offset, size, _class_name(shard, fields), caption
                break
        else:
            _count_passed([extension for _, _, extension, _, _, _ in group], passed)


def _count_passed(extensions: list[str], passed: Counter) -> None:
    """Counts members of a group that has no image."""
    for extension in extensions:
        last = os.path.splitext("x" + extension)[1]
        if last != extension and last in EXTENSIONS:
            passed["dot", last] += 1
        elif extension in (".cls", ".json", ".txt"):
            passed["label", extension] += 1
        elif extension:
            passed["extension", extension] += 1


def _sentences(passed: Counter, first: str) -> list[str]:
    endings = {
        "dot": "end in {} behind a further dot, and are no images: a name ends at its first dot",
        "label": "end in {} without an image of their name beside them",
        "extension": "end in {}, which is no known extension",
        "link": "are {} links, which are not followed",
        "lost": "are hard links to {} not in the shard",
        "caption": "are captions that are {}",
    }
    return [
        f"tar:{first}: {count} members {endings[kind].format(what)}"
        for (kind, what), count in sorted(passed.items())
    ]


def _split(name: str) -> tuple[str, str, str]:
    """Folder, key and extension: a/b.seg.png is a, b, .seg.png."""
    folder, base = os.path.split(name)
    key, dot, extension = base.partition(".")
    return folder, key, (dot + extension).lower()


def _class_name(shard: Path, fields: dict[str, tuple[int, int]]) -> str | None:
    if ".cls" in fields:
        return _read(shard, *fields[".cls"]).decode("utf-8", "replace").strip() or None
    if ".json" in fields:
        try:
            values = json.loads(_read(shard, *fields[".json"]))
        except ValueError:
            return None
        if not isinstance(values, dict):
            return None
        for key in LABEL_KEYS:
            if values.get(key) is not None:
                return str(values[key])
    return None


def _caption_place(shard: Path, fields: dict, passed: Counter) -> tuple[int, int]:
    """Where the .txt stands; NO_CAPTION if there is none, or it holds none, which is counted."""
    if ".txt" not in fields:
        return NO_CAPTION
    reasons = Counter()
    if clean_caption(_read(shard, *fields[".txt"]), reasons):
        return fields[".txt"]
    passed.update({("caption", reason): count for reason, count in reasons.items() if count})
    return NO_CAPTION


def _members(shard: Path, passed: Counter) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of a shard; size DAMAGED for a broken header.

    A hard link is the file that it names, which stands before it."""
    end = 0  # of the last member that was understood
    places = {}  # of the files so far, for hard links
    with open(shard, "rb") as file:
        try:
            # ignore_zeros: also goes on at the next sound header after a broken one.
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                for member in tar:
                    if member.offset > end and _is_damaged(shard, end):
                        yield f"@{end}", end, DAMAGED
                    blocks = -(-member.size // BLOCK) if member.isreg() else 0
                    end = member.offset_data + blocks * BLOCK
                    if member.isreg():
                        places[member.name] = member.offset_data, member.size
                    place = places.get(member.linkname) if member.islnk() else None
                    place = places[member.name] if member.isreg() else place
                    if os.path.basename(member.name).startswith("."):
                        continue
                    if place is not None:
                        places[member.name] = place
                        yield member.name, *place
                    elif member.islnk():
                        passed["lost", "files"] += 1
                    elif member.issym():
                        passed["link", "symbolic"] += 1
        except tarfile.TarError:
            pass  # the last member is shorter than its header says, or there is no header at all
        if _is_damaged(shard, end):
            yield f"@{end}", end, DAMAGED


def _is_damaged(shard: Path, place: int) -> bool:
    """Whether neither a sound header nor padding stands where a member should begin."""
    header = _read(shard, place, BLOCK)
    try:
        tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):
        return shard.stat().st_size == 0
    except tarfile.HeaderError:
        return True
    return False
