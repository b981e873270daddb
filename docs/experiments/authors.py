"""Our steps beside the authors' own, in one call on one GPU (docs/performance.md). Their repositories stay as they are:

    git clone https://github.com/facebookresearch/dinov3 && pip install omegaconf termcolor torchmetrics ftfy regex submitit scikit-learn
    python docs/experiments/authors.py dinov3 dinov3                    # ViT-L/16, 2 x 256 + 8 x 112, the step alone
    git clone https://github.com/facebookresearch/dino
    python docs/experiments/authors.py dino dino --images /imagenet/train --batch 256    # ViT-S/16 from JPEG files, loader included

Medians and their ratio, one line of JSON. On a CPU `dinov3` runs too, in float32, without FSDP, for small sizes.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import bench
from engine.config import load_config
from evals.flops import synchronize


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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(
        json.dumps(
            {"against": arguments.which, "device": device, "torch": torch.__version__}
            | compare(arguments)
        )
    )


def compare_steps(arguments: argparse.Namespace) -> dict:
    """The step of DINOv3 on one batch that stays on the device, five rounds in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, local, locals_ = arguments.sizes
    heads = [f"loss.{head}.prototypes={arguments.prototypes}" for head in ("dino", "ibot")]
    shape = [
        f"crops.global_size={size}",
        f"crops.local_size={local}",
        f"crops.local_count={locals_}",
        f"batch_size={arguments.batch}",
    ]
    plain = [] if device.type == "cuda" else ["precision=fp32"]
    data = [
        f"data.train=scenes?size={2 * arguments.batch}",
        "data.workers=0",
        f"loss.koleo.group={arguments.batch}",
    ]
    cfg = load_config(
        "dinov3_vitl16.yaml",
        [f"model.arch={arguments.arch}", *shape, *heads, *data, *plain, f"device={device.type}"],
    )
    workload = bench.Workload(cfg, bench.chosen_stage(cfg, None), device)
    workload.warm_up(2)
    batch = workload.next_batch()
    theirs = authors_step(arguments, cfg, batch, device)
    steps = {"ours": lambda: workload.train_on(batch, bench.Clock(device)), "theirs": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(6):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(max(1, arguments.steps // 5)):
                step()
            synchronize(device)
            if number:  # the first round compiles
                seconds[name].append((time.perf_counter() - start) / max(1, arguments.steps // 5))
    ours, authors = (median(seconds[name]) for name in steps)
    peak, source = bench.peak_flops(
        device, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    return {
        "batch": arguments.batch, "ours_ms": round(1e3 * ours, 1), "theirs_ms": round(1e3 * authors, 1),
        "ratio": round(authors / ours, 3), "mfu": round(sum(workload.flops.values()) / ours / peak, 3), "peak_from": source,
    }  # fmt: skip


def authors_step(arguments: argparse.Namespace, ours: object, batch: object, device: torch.device):
    """A step of their SSLMetaArch on the same crops and masks, as their train.py makes it."""
    sys.path.insert(0, str(arguments.checkout))
    from dinov3 import distributed as theirs
    from dinov3.configs import get_default_config
    from dinov3.train.ssl_meta_arch import SSLMetaArch
    from omegaconf import OmegaConf

    cuda = device.type == "cuda"
    if cuda:
        theirs.enable(overwrite=True)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.Tensor.cuda = lambda self, *_, **__: self  # their code knows one device
    size, local, count = arguments.sizes
    m = ours.model
    head = {"head_n_prototypes": arguments.prototypes}
    cfg = OmegaConf.merge(get_default_config(), OmegaConf.create({
        "student": {"arch": arguments.arch, "patch_size": 16, "drop_path_rate": m.drop_path, "layerscale": m.layerscale,
                    "n_storage_tokens": m.registers, "mask_k_bias": True, "pos_embed_rope_dtype": "bf16" if cuda else "fp32"},
        "dino": head, "ibot": head, "train": {"batch_size_per_gpu": arguments.batch, "compile": cuda},
        "crops": {"global_crops_size": size, "local_crops_size": local, "local_crops_number": count},
    }))  # fmt: skip
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    if cuda:
        model.prepare_for_distributed_training()
    model.to_empty(device=device)
    model.init_weights()
    model.train()
    groups = model.get_params_groups() if cuda else model.student.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999))
    masks = batch.masks
    indices = masks.flatten().nonzero().flatten()
    weight = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    data = {
        "collated_global_crops": batch.global_crops, "collated_local_crops": batch.local_crops, "collated_masks": masks,
        "mask_indices_list": indices, "masks_weight": weight, "upperbound": len(indices), "global_batch_size": arguments.batch,
        "n_masked_patches": torch.full((1,), len(indices), dtype=torch.long, device=device),
    }  # fmt: skip

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.forward_backward(data, teacher_temp=0.07, iteration=0)
        for part in model.student.values():
            torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm=3.0)
        optimizer.step()
        model.update_ema(0.992)

    return step


def compare_pipelines(arguments: argparse.Namespace) -> dict:
    """DINO v1 from files to weights: their main_dino.py as it is, then ours, each alone on the machine."""
    shared = ["--nproc_per_node", "1", "--standalone"]
    call = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *shared,
        "main_dino.py",
        "--arch",
        "vit_small",
        "--data_path",
        str(Path(arguments.images).resolve()),
    ]
    call += [
        "--batch_size_per_gpu",
        str(arguments.batch),
        "--num_workers",
        str(arguments.workers),
        "--output_dir",
        "/tmp/authors_dino",
        "--epochs",
        "100",
    ]
    found: list[tuple[float, float]] = []
    with subprocess.Popen(
        call, cwd=arguments.checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-20:], line]
            if times := re.search(r"time: ([\d.]+)\s+data: ([\d.]+)", line):
                found.append((float(times[1]), float(times[2])))
            if (
                len(found) > 1 + arguments.steps // 10
            ):  # a line every ten steps, of a running mean; the first starts up
                process.terminate()
                break
    if len(found) < 2:
        sys.exit("main_dino.py gave no times:\n" + "".join(tail))
    theirs, wait = found[-1]
    call = [
        sys.executable,
        "bench.py",
        "--config",
        "dino_vits16.yaml",
        f"data.train=folder:{Path(arguments.images).resolve()}",
        "--warmup",
        "10",
    ]
    call += [
        f"batch_size={arguments.batch}",
        f"data.workers={arguments.workers}",
        "--steps",
        str(arguments.steps),
    ]
    ours = json.loads(
        subprocess.run(call, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    return {
        "batch": arguments.batch, "ours": ours["images_per_second"], "theirs": round(arguments.batch / theirs, 1),
        "ratio": round(ours["images_per_second"] * theirs / arguments.batch, 3),
        "data_wait": ours["data_wait_fraction"], "data_wait_theirs": round(wait / theirs, 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
