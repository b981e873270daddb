"""What the evaluation scripts share: a frozen model with the flags of `evaluation_parser`."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data.evaluation import EvalDataset
from data.images import ImageData
from engine import distributed
from engine.cli import preparation, print_result
from engine.distributed import choose_device, has_fast_bf16
from engine.launch import loader_workers
from engine.logger import notice
from errors import UserError
from evals.knn import FeatureRows, extract_features
from models.features import Preprocessing
from models.weights.load import load_backbone

PATIENCE = 24 * 3600.0  # seconds that ranks wait for rank 0, which trains the heads


class FrozenModel:
    """The backbone of --model on its --device, and how images are prepared and loaded for it.

    Args:
        load: MODEL -> a module that returns `Features`, with its `preprocessing`.

    Attributes:
        channels: of the images that the backbone takes.
        prepare: arguments of `EvalDataset` after the data.
        unreadable: name -> reason of the images that could not be read.
        loading: options of `read_batches`.
    """

    def __init__(
        self, arguments: argparse.Namespace, load: Callable[[str], nn.Module] = load_backbone
    ):
        self.device = choose_device(arguments.device)
        self.backbone = load(arguments.model).to(self.device)
        in_bf16(self.backbone, arguments.precision, self.device)
        self.channels = self.backbone.in_channels
        self.prepare = preparation(self.backbone.preprocessing, arguments.resize, arguments.size)
        self.prepare["scaled_jpeg"] = arguments.scaled_jpeg
        say_missing_range(self.backbone.preprocessing, vars(arguments).values())
        ranks = distributed.world_size()
        workers = loader_workers(arguments.workers, self.device.type, ranks)
        self.unreadable: dict[str, str] = {}
        self.loading = {"batch_size": arguments.batch_size, "workers": workers}
        self.loading["unreadable"] = self.unreadable

    def items(self, data: ImageData) -> EvalDataset:
        return EvalDataset(data, **self.prepare)

    def count(self, data: ImageData) -> int:
        """The number of images less those that could not be read so far."""
        return sum(data.name(index) not in self.unreadable for index in range(len(data)))

    def features(
        self, describe: Callable[[Tensor], Tensor], items: Dataset, name: str, **options: Any
    ) -> FeatureRows:
        """On the host, see `extract_features`."""
        progress = progress_bar(f"features of {name}", unit="batch")
        options = self.loading | options
        return extract_features(describe, items, self.device, progress=progress, **options)


def say_missing_range(preprocessing: Preprocessing, arguments: Iterable[Any]) -> None:
    """Says that the model was trained with a window or scale, where no DATA asks for that."""
    said = [str(argument) for argument in arguments]
    for key, value in preprocessing.asked_of_data().items():
        # Any window counts; a scale by percentiles differs from one data set to the next.
        given = f"{key}={value}"
        if not any((given if key == "scale" else "window=") in text for text in said):
            notice(f"the model was trained on images with {given}, which no DATA here has")


def in_bf16(backbone: nn.Module, precision: str, device: torch.device) -> None:
    """Lets a backbone compute under bf16 autocast, on its own functions; "auto": on CUDA.

    What it returns is float32 wherever its last operation is a norm.
    """
    wanted = precision == "auto" and device.type == "cuda" and has_fast_bf16(device)
    if precision == "bf16" or wanted:
        autocast = torch.autocast(device.type, torch.bfloat16)
        for name in ("forward", "intermediate", "attention"):
            if hasattr(backbone, name):
                setattr(backbone, name, autocast(getattr(backbone, name)))


def run_evaluation(
    arguments: argparse.Namespace,
    open_model: Callable[[argparse.Namespace], FrozenModel],
    evaluate: Callable[[Any], dict],
) -> None:
    """Prints what `evaluate` returns for the model, with the images left out and the seconds.

    The ranks of a launcher share the images; rank 0 prints.
    """
    began = time.perf_counter()
    with distributed.process_group(choose_device(arguments.device), PATIENCE):
        model = open_model(arguments)
        result = evaluate(model) | {"unreadable": len(model.unreadable)}
        if distributed.is_main():
            result["seconds"] = round(time.perf_counter() - began, 1)
            print_result(result, arguments.output)
        distributed.barrier()


def progress_bar(name: str, **options: Any) -> Callable:
    """tqdm with that description; it draws only on a terminal, and on rank 0."""
    hidden = not sys.stderr.isatty() or not distributed.is_main()
    return partial(tqdm, desc=name, disable=hidden, **options)


def class_name(data: ImageData, index: int) -> str:
    """The name of an image's class, its number where classes have no names, "" without a label."""
    label = -1 if data.labels is None else int(data.labels[index])
    if label < 0:
        return ""
    return str(label) if data.classes is None else data.classes[label]


def check_least(arguments: argparse.Namespace, least: int, *names: str) -> None:
    """Refuses flags that are given and smaller than `least`.

    Raises:
        UserError: naming the flag.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}; it must be at least {least}")
