"""Weighted k-NN on frozen features: the first number to look at.

    python eval_knn.py --model runs/quickstart --train "scenes?split=train&size=4000" --val "scenes?split=val&size=1000"
    python eval_knn.py --model "pixels?patch_size=8" --train "scenes?split=train&size=4000" --val "scenes?split=val&size=1000"

Protocol of DINO (arXiv 2104.14294, appendix F.1): L2-normalised CLS features, cosine similarity, the k nearest training
images vote with exp(similarity / temperature). Exact. Several k in one pass; `top1` is that of the best k.
"""

import sys
import time
from functools import partial
from typing import Optional

from tqdm import tqdm

from data.datasets import open_labelled
from data.loader import EvalDataset, default_workers
from engine import distributed
from engine.cli import evaluation_parser, preparation, print_result, run_script
from engine.probes import extract_cls, knn_accuracy
from models.pretrained import load_backbone


def main(argv: Optional[list[str]] = None) -> None:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--train", required=True, help="DATA with labels that vote")
    parser.add_argument("--val", required=True, help="DATA with labels to be found")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the vote; lower trusts the nearest more")
    arguments = parser.parse_args(argv)
    if min(arguments.k) < 1 or arguments.temperature <= 0 or arguments.batch_size < 1:
        raise ValueError("--k and --batch-size must be at least 1, --temperature more than 0")

    began = time.perf_counter()
    device = distributed.choose_device(arguments.device)
    backbone = load_backbone(arguments.model).to(device)
    train, val = open_labelled(arguments.train, arguments.val, backbone.in_channels)
    features = []
    for name, data in (("train", train), ("val", val)):
        progress = partial(tqdm, desc=f"features of {name}", unit="batch", disable=not sys.stderr.isatty())
        items = EvalDataset(data, **preparation(backbone.preprocessing, arguments.resize, arguments.size))
        workers = default_workers(device.type) if arguments.workers is None else arguments.workers
        features += extract_cls(
            backbone, items, device, batch_size=arguments.batch_size, workers=workers, progress=progress
        )
    accuracy = knn_accuracy(*features, ks=arguments.k, temperature=arguments.temperature)
    result = {"task": "knn", "model": arguments.model, "k": {str(k): value for k, value in accuracy.items()}}
    result |= {"top1": max(accuracy.values()), "n_train": len(train), "n_val": len(val)}
    print_result(result | {"seconds": round(time.perf_counter() - began, 1)}, arguments.output)


if __name__ == "__main__":
    run_script(main)
