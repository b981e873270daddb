"""Adapting released weights: what docs/adapt.md says, continue.yaml, and images of any depth and
number of channels.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data.stats
import eval_knn
import export
import train
from data.sources.specs import open_data
from engine import optim
from engine.config import load_config
from errors import UserError
from models.weights.load import load_backbone
from tests import conftest
from tests.test_train import folder_of, metrics

PAGE = (Path(__file__).parent.parent / "docs" / "adapt.md").read_text()
SCRIPTS = {
    "-m data.stats": data.stats,
    "eval_knn.py": eval_knn,
    "train.py": train,
    "export.py": export,
}


def moved(first: Path | str, second: Path | str) -> set[str]:
    """Names of the tensors that differ between two backbones."""
    one, other = (load_backbone(model).state_dict() for model in (first, second))
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A run of four steps, whose weights the others start from."""
    run = tmp_path_factory.mktemp("before") / "run"
    train.main([*conftest.TINY, "checkpoint.every=4", f"output_dir={run}"])
    return run


# ----------------------------------------------------------------- starting from weights


def test_a_run_from_weights_trains_its_backbone(before, tiny):
    """Stages once loaded the weights again, into parameters that the optimiser did not hold: only
    heads learned.
    """
    train.main([*tiny[:-1], f"init={before}", "schedule.lr=1e-3", "total_steps=2", tiny[-1]])
    assert len(moved(before, folder_of(tiny))) == len(load_backbone(before).state_dict())


def test_a_stage_of_its_own_weights_trains_them(before, tiny, tmp_path):
    (tmp_path / "s.yaml").write_text(
        f"stages: {{one: {{steps: 1}}, two: {{steps: 2, init: {before}, schedule: {{lr: 1e-3}}}}}}"
    )
    train.main(
        [
            "--config",
            str(tmp_path / "s.yaml"),
            *(item for item in tiny if "total_steps" not in item),
        ]
    )
    weights, after = (load_backbone(run).state_dict() for run in (before, folder_of(tiny)))
    assert moved(before, folder_of(tiny)) == weights.keys()
    assert (
        max((after[name] - weights[name]).abs().max() for name in weights) < 0.01
    )  # those weights, two steps on


@pytest.mark.parametrize("mode", ["lora", "partial"])
def test_a_run_from_weights_may_train_little_of_them(mode, before, tiny):
    little = [
        f"tune.mode={mode}",
        "tune.targets=[blocks.1.attn.qkv]",
        "total_steps=2",
        "schedule.lr=1e-2",
    ]
    train.main([*tiny[:-1], f"init={before}", *little, tiny[-1]])
    changed = moved(before, folder_of(tiny))
    assert "blocks.1.attn.qkv.weight" in changed and changed <= {
        "blocks.1.attn.qkv.weight",
        "blocks.1.attn.qkv.bias",
    }


# ----------------------------------------------------------------- continue.yaml


def continued(before: Path, run: Path, *keys: str) -> list[str]:
    """continue.yaml at the tiny size: two stages of 2 and 3 steps."""
    size = [
        item
        for item in conftest.TINY
        if not item.startswith(("total_steps", "loss.koleo.weight", "loss.ibot.weight"))
    ]
    short = [
        "stages.heads.steps=2",
        "stages.adapt.steps=3",
        "schedule.lr.peak=1e-2",
        "checkpoint.every=99",
    ]
    return [
        "--config",
        "continue.yaml",
        *size,
        f"init={before}",
        *short,
        "probe.every=0",
        "guard.action=null",
        *keys,
        f"output_dir={run}",
    ]


def test_a_frozen_backbone_stays_bit_equal_through_the_first_stage_and_heads_learn(
    before, tmp_path, monkeypatch
):
    clip, gradients = optim.clip_gradients, []

    def watched(model, *arguments):
        gradients.append(
            any(parameter.grad is not None for parameter in model.backbone.parameters())
        )
        return clip(model, *arguments)

    monkeypatch.setattr(optim, "clip_gradients", watched)
    run = tmp_path / "run"
    train.main(continued(before, run))
    assert [record["stage"] for record in metrics(run)] == ["heads"] * 2 + ["adapt"] * 3
    assert gradients == [False, False, True, True, True]  # the backbone's are not even computed
    assert not moved(before, f"{run}@2") and len(moved(before, run)) > 20
    old, new = (
        load_file(folder / "heads.safetensors")
        for folder in (before / "teacher", run / "snapshots" / "2")
    )
    assert all(
        not torch.equal(tensor, new[name])
        for name, tensor in old.items()
        if name.endswith("weight")
    )


def test_a_gram_anchor_holds_on_to_the_initial_weights(before, tmp_path):
    train.main(continued(before, tmp_path / "run", "loss.gram.weight=1"))
    records = metrics(tmp_path / "run")
    assert ["loss/gram" in record for record in records] == [False, False, True, True, True]
    assert records[-1]["loss/gram"] > 0


@pytest.mark.parametrize(
    "recipe",
    [
        "dinov2_vits14.yaml",
        "dinov3_vits16.yaml",
        "dino_vits16.yaml",
        "ibot_vits16.yaml",
        "vits.yaml",
    ],
)
def test_continue_builds_on_the_recipe_of_any_model(recipe, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"base: [{recipe}, continue.yaml]\noutput_dir: runs/mine\n")
    cfg, model = load_config(str(tmp_path / "mine.yaml"), []), load_config(recipe, [])
    assert (
        cfg.model == model.model
        and cfg.output_dir == "runs/mine"
        and cfg.batch_size == 64
        and cfg.total_steps is None
    )
    assert (
        list(cfg.stages) == ["heads", "adapt"]
        and cfg.guard.action == "stop"
        and cfg.optim.lr_scaling == "none"
    )


def test_of_several_bases_the_last_one_wins_and_the_file_over_them(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "batch_size: 8\nloss: {ibot: {weight: 1.0}, dino: {weight: 2.0}}\n"
    )
    (tmp_path / "b.yaml").write_text("batch_size: 16\nloss: {dino: {weight: 3.0}}\n")
    (tmp_path / "c.yaml").write_text("base: [a.yaml, b.yaml]\nloss: {koleo: {weight: 0.5}}\n")
    cfg = load_config(str(tmp_path / "c.yaml"), [])
    assert (cfg.batch_size, cfg.loss.ibot.weight, cfg.loss.dino.weight, cfg.loss.koleo.weight) == (
        16,
        1.0,
        3.0,
        0.5,
    )
    (tmp_path / "a.yaml").write_text("base: [c.yaml]\n")
    with pytest.raises(UserError, match="its own base"):
        load_config(str(tmp_path / "c.yaml"), [])


# ----------------------------------------------------------------- images as they are


def deep_images(folder: Path, channels: int) -> str:
    """Twelve 16-bit images: PNG for one channel, TIFF for 13 where it can be written, NPY for the
    others.
    """
    folder.mkdir()
    rng = np.random.default_rng(channels)
    for number in range(12):
        slope = np.linspace(1000 * number, 60_000 - 2000 * number, 40 * 48).reshape(1, 40, 48)
        pixels = (slope + rng.integers(0, 4000, (channels, 40, 48))).astype(np.uint16)
        if channels == 1:
            Image.fromarray(pixels[0]).save(folder / f"{number}.png")
        elif channels == 13:
            tifffile = pytest.importorskip("tifffile")
            tifffile.imwrite(
                folder / f"{number}.tif", pixels, photometric="minisblack", planarconfig="separate"
            )
        else:
            np.save(folder / f"{number}.npy", pixels.transpose(1, 2, 0))
    return str(folder)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_deep_images_of_any_channels_train_and_come_back_from_hugging_face_with_equal_features(
    channels, tiny, tmp_path
):
    images, run = deep_images(tmp_path / "images", channels), folder_of(tiny)
    assert len(open_data(images, channels).image(0).unique()) > 256
    mean = [0.3 + 0.01 * k for k in range(channels)]
    settings = [
        f"data.train={images}",
        f"data.channels={channels}",
        f"data.mean={mean}",
        f"data.std={[0.2] * channels}",
    ]
    train.main(
        [
            *tiny[:-1],
            *settings,
            "crops.policy=microscopy",
            "total_steps=3",
            "checkpoint.every=3",
            tiny[-1],
        ]
    )
    assert all(np.isfinite(record["loss"]) for record in metrics(run))
    export.main(["--model", str(run), "--format", "hf", "--output", str(tmp_path / "exported")])
    ours, again = load_backbone(run), load_backbone(tmp_path / "exported")
    assert (
        list(again.preprocessing.mean) == pytest.approx(mean)
        and again.preprocessing == ours.preprocessing
    )
    inputs = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = ours(inputs), again(inputs)
        assert torch.equal(first.cls, second.cls) and torch.equal(first.patches, second.patches)
        transformers = pytest.importorskip("transformers")
        theirs = (
            transformers.AutoModel.from_pretrained(tmp_path / "exported")
            .eval()(inputs)
            .last_hidden_state
        )
    assert torch.allclose(theirs[:, 0], first.cls, atol=1e-5) and torch.allclose(
        theirs[:, 1:], first.patches, atol=1e-5
    )


# ----------------------------------------------------------------- docs/adapt.md


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.S)


def write_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """What the page takes for granted: images, labelled ones, adapt.yaml, and weights as released
    but tiny and random.
    """
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 12, 0)
    for number, (split, name) in enumerate(
        (split, name) for split in ("train", "val") for name in ("cats", "dogs")
    ):
        write_images(tmp_path / "labelled" / split / name, 4, number + 1)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 70,
    }
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(
        "weights/dinov2-small"
    )
    (tmp_path / "adapt.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "marks.csv").write_text("file,x0,y0,x1,y1\n3.png,5,5,20,20\n")
    return tmp_path


TINY = [
    "device=cpu",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "crops.global_size=28",
    "crops.local_size=14",
    "crops.local_count=1",
]
TINY += [
    "batch_size=4",
    "loss.koleo.group=4",
    "loss.dino.prototypes=16",
    "loss.dino.hidden=16",
    "loss.dino.bottleneck=8",
    "data.workers=0",
]
TINY += [
    "precision=fp32",
    "total_steps=10",
    "probe.every=5",
    "guard.tolerance=0.5",
    "log_every=1",
]  # few random images say nothing


def run_as_written(line: str) -> None:
    """A command of the page in this process; training at a tiny size."""
    name = next(name for name in SCRIPTS if line.startswith(f"python {name} "))
    words = shlex.split(line.removeprefix(f"python {name} "))
    SCRIPTS[name].main(words + TINY if name == "train.py" else words)


def test_the_five_commands_run_as_written(place, capsys):
    commands = blocks("bash")[0].splitlines()
    assert len(commands) == 5
    for command in commands:
        run_as_written(command)
    results = [
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    ]
    assert [result["task"] for result in results][:3] == ["stats", "knn", "knn"] and results[0][
        "images"
    ] == 12
    records = metrics(place / "runs" / "adapt")
    assert [record["step"] for record in records if "probe/knn" in record] == [0, 1, 5, 10]
    assert [record["stage"] for record in records] == ["heads"] * 2 + ["adapt"] * 9
    assert not moved("adapted", "runs/adapt@best") and load_backbone("adapted").patch_size == 14


def test_the_other_settings_of_the_page_run_too(place):
    run_as_written(blocks("bash")[1])
    settings = [
        "tune.mode=lora",
        "tune.mode=partial 'tune.targets=[blocks.10, blocks.11, norm]'",
        "loss.gram.weight=1",
        "micro_batch_size=16",
        "checkpointing=blocks",
    ]
    assert all(f"`{item}`" in PAGE for item in settings)
    for item in settings:
        load_config("adapt.yaml", shlex.split(item))
    for keys in re.findall(
        r"\| `(data\.channels=\d+ crops\.policy=[\w-]+|crops\.policy=\w+)", PAGE
    ):
        load_config("adapt.yaml", keys.split())
