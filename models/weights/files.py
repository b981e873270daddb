"""Tensors and JSON from and to files. Nothing that a file holds is ever executed."""

import argparse
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import UserError

# In the order in which a folder is searched; the index of shards comes with the file it stands for.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# What training checkpoints nest a model under, the one to evaluate first.
NESTS = ("teacher", "model_ema", "ema", "state_dict_ema", "ema_state_dict", "ema_model")
NESTS += ("model", "state_dict")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, or of a folder with one of `WEIGHT_FILES`, whole or in shards.

    A training checkpoint gives its teacher.

    Raises:
        FileNotFoundError: if there are none.
        UserError: if a file is damaged, or holds anything but tensors and plain values.
    """
    if path.is_file():
        return _read_file(path)
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return _read_file(path / name)
        if (path / f"{name}.index.json").is_file():
            return _read_shards(path, f"{name}.index.json")
    others = sorted(file for ext in ("safetensors", "pth", "pt") for file in path.glob(f"*.{ext}"))
    others = [file for file in others if file.name != "heads.safetensors"]
    if len(others) != 1:
        found = ", ".join(file.name for file in others) or "none"
        raise FileNotFoundError(
            f"{path / WEIGHT_FILES[0]} is missing; without it there must be one file of weights "
            f"in the folder, and there is {found}"
        )
    return _read_file(others[0])


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it holds no JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, or by its suffix `.pth` what `torch.load` reads; replaced at once."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    if path.suffix == ".pth":
        replace(path, lambda scratch: torch.save(tensors, scratch))
    else:
        replace(path, lambda scratch: save_file(tensors, scratch, metadata={"format": "pt"}))


def write_json(path: Path, values: dict) -> None:
    replace(path, lambda scratch: scratch.write_text(json.dumps(values, indent=2) + "\n"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside `path` first, so a killed process leaves no half file."""
    scratch = path.with_name(path.name + ".tmp")
    write(scratch)
    os.replace(scratch, path)


def _read_file(path: Path) -> dict[str, Tensor]:
    _refuse_other_files(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    tensors = _unnest(_unpickle(path))
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    return tensors


def _refuse_other_files(path: Path) -> None:
    """Raises UserError for what a failed download leaves in place of weights."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(f"{path} is a web page, such as an error or a login; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS; `git lfs pull` fetches the file itself")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty; download it again")


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    names = read_json(folder / index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / index} has no weight_map of tensors to files")
    tensors = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise UserError(f"{folder / index} names the shard {name!r}, which is no plain file")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; {index} counts it as a shard")
        tensors |= _read_file(folder / name)
    return tensors


def _unpickle(path: Path) -> Any:
    # The authors' full DINO checkpoints hold their arguments, which are plain values.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|operand) (\S+)", str(error))
        if wanted is None:
            raise UserError(f"{path} is damaged or is no file of tensors") from error
        culprit = next(group for group in wanted.groups() if group)
        raise UserError(
            f"{path} would run code on loading ({culprit}), so it was not read; allowed are "
            "tensors and plain values"
        ) from error
    except (RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise UserError(f"{path} is damaged or is no file of tensors: {reason}") from error


def _unnest(found: Any) -> dict[str, Tensor]:
    """The first model in a checkpoint; the file itself if it maps names to tensors."""
    while isinstance(found, dict):
        nests = [name for name in NESTS if isinstance(found.get(name), dict)]
        if not nests:
            return {name: t for name, t in found.items() if isinstance(t, Tensor)}
        if len(nests) > 1:
            others = ", ".join(nests[1:])
            print(
                f"of several networks in the file {nests[0]} is taken, not {others}",
                file=sys.stderr,
            )
        found = found[nests[0]]
    return {}
