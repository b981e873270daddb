"""Our steps beside the authors' own, in one call on one GPU (docs/performance.md).

Their repositories stay as they are:

    git clone https://github.com/facebookresearch/dinov3
    pip install omegaconf termcolor torchmetrics ftfy regex submitit scikit-learn
    # ViT-L/16, 2 x 256 + 8 x 112, the step alone
    python docs/experiments/authors.py dinov3 dinov3
    git clone https://github.com/facebookresearch/dino
    # ViT-S/16 from JPEG files, loader included
    python docs/experiments/authors.py dino dino --images /imagenet/train --batch 256

Medians and their ratio, one line of JSON. On a CPU `dinov3` runs too, in float32, without FSDP,
for small sizes.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402
from data.loader import Batch  # noqa: E402
from engine.config import TrainConfig, load_config  # noqa: E402
from evals.flops import synchronize  # noqa: E402


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("which", choices=("dinov3", "dino"))
    flags.add_argument("checkout", type=Path, help="of the authors' repository")
    flags.add_argument("--images", help="dino: a folder of folders of JPEG files")
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--steps", type=int, default=25)
    flags.add_argument("--workers", type=int, default=16)
    flags.add_argument("--arch", default="vit_large")
    flags.add_argument(
        "--sizes", type=int, nargs=3, default=(256, 112, 8), metavar=("GLOBAL", "LOCAL", "LOCALS")
    )
    flags.add_argument("--prototypes", type=int, default=65536)
    arguments = flags.parse_args()
    if arguments.which == "dino" and not arguments.images:
        flags.error("dino reads JPEG files; give --images")
    compare = {"dinov3": compare_steps, "dino": compare_pipelines}[arguments.which]
    found = torch.cuda.is_available()
    machine = {"device": torch.cuda.get_device_name() if found else "cpu"}
    machine |= {"against": arguments.which, "torch": torch.__version__}
    print(json.dumps(machine | compare(arguments)))


def compare_steps(arguments: argparse.Namespace) -> dict:
    """The step of DINOv3 on one batch that stays on the device, five rounds in turns.

    Memory is the peak over what the device held before the side in question was built.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = our_config(arguments, device)
    workload = bench.Workload(cfg, bench.chosen_stage(cfg, None), device)
    workload.warm_up(2)
    batch = workload.next_batch()
    memory = {}

    def ours() -> None:
        workload.train_on(batch, bench.Clock(device))

    memory["ours_gib"] = peak_gib(ours, device, 0)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    # Where torch.compile fails, their code is to fail as well, and not to run as it is.
    torch._dynamo.config.suppress_errors = False
    theirs = authors_step(arguments, cfg, batch, device)
    memory["theirs_gib"] = peak_gib(theirs, device, held)
    seconds = times({"ours": ours, "theirs": theirs}, max(1, arguments.steps // 5), device)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak, source = bench.peak_flops(device, kind)
    return {
        "batch": arguments.batch,
        "ours_ms": round(1e3 * seconds["ours"], 1),
        "theirs_ms": round(1e3 * seconds["theirs"], 1),
        "ratio": round(seconds["theirs"] / seconds["ours"], 3),
        "mfu": round(sum(workload.flops.values()) / seconds["ours"] / peak, 3),
        "peak_from": source,
    } | memory


def our_config(arguments: argparse.Namespace, device: torch.device) -> TrainConfig:
    """Our ViT-L/16 recipe with the sizes asked for; crops are made by this process."""
    size, local, locals_ = arguments.sizes
    keys = [
        f"model.arch={arguments.arch}",
        f"crops.global_size={size}",
        f"crops.local_size={local}",
        f"crops.local_count={locals_}",
        f"batch_size={arguments.batch}",
        f"data.train=scenes?size={2 * arguments.batch}",
        "data.workers=0",
        "data.augment_on=workers",
        f"loss.koleo.group={arguments.batch}",
        f"device={device.type}",
    ]
    keys += [f"loss.{head}.prototypes={arguments.prototypes}" for head in ("dino", "ibot")]
    keys += [] if device.type == "cuda" else ["precision=fp32"]
    return load_config("dinov3_vitl16.yaml", keys)


def peak_gib(step: Callable[[], None], device: torch.device, held: int) -> float | None:
    """Peak of a second step, less what is `held` (bytes); None on a CPU."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)


def times(
    steps: dict[str, Callable[[], None]], count: int, device: torch.device
) -> dict[str, float]:
    """Medians of five rounds, seconds a step; the first round, which compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(6):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
            if number:
                seconds[name].append((time.perf_counter() - start) / count)
    return {name: median(values) for name, values in seconds.items()}


def authors_step(
    arguments: argparse.Namespace, ours: TrainConfig, batch: Batch, device: torch.device
) -> Callable[[], None]:
    """A step of their SSLMetaArch on the same crops and masks, as their train.py makes it."""
    sys.path.insert(0, str(arguments.checkout))
    from dinov3 import distributed as theirs
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    cuda = device.type == "cuda"
    if cuda:
        theirs.enable(overwrite=True)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.Tensor.cuda = lambda self, *_, **__: self  # their code knows one device
    with torch.device("meta"):
        model = SSLMetaArch(authors_config(arguments, ours, cuda))
    if cuda:
        model.prepare_for_distributed_training()
    model.to_empty(device=device)
    model.init_weights()
    model.train()
    groups = model.get_params_groups() if cuda else model.student.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999))
    data = authors_batch(batch, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.forward_backward(data, teacher_temp=0.07, iteration=0)
        for part in model.student.values():
            torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm=3.0)
        optimizer.step()
        model.update_ema(0.992)

    return step


def authors_config(arguments: argparse.Namespace, ours: TrainConfig, cuda: bool) -> object:
    """Their defaults with our model and sizes."""
    from dinov3.configs import get_default_config
    from omegaconf import OmegaConf

    size, local, count = arguments.sizes
    head = {"head_n_prototypes": arguments.prototypes}
    student = {
        "arch": arguments.arch,
        "patch_size": 16,
        "drop_path_rate": ours.model.drop_path,
        "layerscale": ours.model.layerscale,
        "n_storage_tokens": ours.model.registers,
        "mask_k_bias": True,
        "pos_embed_rope_dtype": "bf16" if cuda else "fp32",
    }
    crops = {
        "global_crops_size": size,
        "local_crops_size": local,
        "local_crops_number": count,
    }
    train = {"batch_size_per_gpu": arguments.batch, "compile": cuda}
    changes = {"student": student, "dino": head, "ibot": head, "train": train, "crops": crops}
    return OmegaConf.merge(get_default_config(), OmegaConf.create(changes))


def authors_batch(batch: Batch, device: torch.device) -> dict:
    """Our batch as their collate function lays it out."""
    masks = batch.masks
    indices = masks.flatten().nonzero().flatten()
    weight = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    count = torch.full((1,), len(indices), dtype=torch.long, device=device)
    return {
        "collated_global_crops": batch.global_crops,
        "collated_local_crops": batch.local_crops,
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": weight,
        "upperbound": len(indices),
        "global_batch_size": len(batch.images),
        "n_masked_patches": count,
    }


def compare_pipelines(arguments: argparse.Namespace) -> dict:
    """DINO v1 from files to weights: their main_dino.py as it is, then ours, each alone."""
    images = Path(arguments.images).resolve()
    theirs, wait = authors_pipeline(arguments, images)
    call = [sys.executable, "bench.py", "--config", "dino_vits16.yaml"]
    call += [f"data.train=folder:{images}", f"batch_size={arguments.batch}"]
    call += [f"data.workers={arguments.workers}"]
    call += ["--warmup", "10", "--steps", str(arguments.steps)]
    done = subprocess.run(call, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    ours = json.loads(done.stdout)
    return {
        "batch": arguments.batch,
        "ours": ours["images_per_second"],
        "theirs": round(arguments.batch / theirs, 1),
        "ratio": round(ours["images_per_second"] * theirs / arguments.batch, 3),
        "data_wait": ours["data_wait_fraction"],
        "data_wait_theirs": round(wait / theirs, 3),
    }


def authors_pipeline(arguments: argparse.Namespace, images: Path) -> tuple[float, float]:
    """Seconds a step of their main_dino.py, and those in which it waits for data."""
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"]
    call += ["main_dino.py", "--arch", "vit_small", "--data_path", str(images)]
    call += ["--batch_size_per_gpu", str(arguments.batch)]
    call += ["--num_workers", str(arguments.workers)]
    call += ["--output_dir", "/tmp/authors_dino", "--epochs", "100"]
    found: list[tuple[float, float]] = []
    tail: list[str] = []
    with subprocess.Popen(
        call, cwd=arguments.checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            tail = [*tail[-20:], line]
            if times := re.search(r"time: ([\d.]+)\s+data: ([\d.]+)", line):
                found.append((float(times[1]), float(times[2])))
            # A line every ten steps, of a running mean; the first one starts up.
            if len(found) > 1 + arguments.steps // 10:
                process.terminate()
                break
    if len(found) < 2:
        sys.exit("main_dino.py gave no times:\n" + "".join(tail))
    return found[-1]


if __name__ == "__main__":
    main()
