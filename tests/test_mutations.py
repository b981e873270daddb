"""Three hundred mutated configurations: each trains, or is refused in a sentence (exit 2)."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import train
from engine.cli import run_script
from engine.config import TrainConfig
from engine.settings import all_keys
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
BASE = [*TINY, "total_steps=2", "checkpoint.every=100", "data.train=scenes?size=16"]
KEYS = [
    key for key in all_keys(TrainConfig) if key not in ("output_dir", "data.workers", "compile")
]

WRONG_VALUES = (
    "banana", "", "true", "null", "-1", "0", "1.5", "-0.5", "[]", "[1]", "[1, 2]", "[-4, 8]",
    "[[1, 2]]", "{}", "{a: 1}", ".nan", ".inf", "-.inf", "1e999", "2020-01-01", "'", "{", "[1, 2",
    "*anchor", "!!python/object:os.system {}", "!!int x", "-10%", "110%", "0x10", "0o7", "\x00",
    "é", "auto", "none", "off", "[null]", "{1: 2}", "? [a]",
)  # fmt: skip

ODD = (  # these train
    ["total_steps=2", "epochs=1"], ["crops.global_size=33"], ["crops.global_size=[40, 24]"],
    ["crops.global_count=1"], ["crops.global_count=3"], ["crops.local_count=0"],
    ["crops.mix=[{global_size: 32, local_size: 16}, {global_size: 40, local_size: 16}]"],
    ["data.channels=1"], ["data.channels=1", "data.mean=[0.5]", "data.std=[0.2]"],
    ["data.channels=1", "crops.hue=0.1"], ["model.patch_size=7"], ["model.registers=3"],
    ["model.ffn=swiglu"], ["model.ffn=swiglu64"], ["model.ffn_ratio=0.001"], ["model.layerscale=0"],
    ["model.positions=rope", "model.rope_jitter=2", "model.rope_rescale=2"],
    ["model.mask_k_bias=true", "model.qkv_bias=false"], ["loss.dino.weight=0"],
    ["loss.dino.prototypes=1"], ["loss.dino.layers=1"], ["loss.ibot.prototypes=16"],
    ["loss.ibot.mask_ratio=[0, 0]"], ["loss.ibot.mask_probability=0"], ["loss.gram.weight=1"],
    ["loss.gram.weight=1", "loss.gram.teacher=random:vit_small?patch_size=5"],
    ["loss.gram.weight=1", "loss.gram.teacher=random:vit_nano?patch_size=8&image_size=32&depth=1"],
    ["loss.gram.weight=1", "loss.gram.start=1"],
    ["loss.gram.weight=1", "loss.gram.teacher_scale=1.3"],
    ["schedule.gram.peak=1", "schedule.gram.warmup=1"], ["schedule.lr.peak=1e30"],
    ["schedule.lr=0"], ["schedule.lr.warmup=200%"], ["schedule.lr.warmup=50"],
    ["schedule.lr.decay=0"], ["schedule.koleo={warmup: 1}"],
    ["probe.every=2", "probe.train=scenes?size=24", "probe.val=scenes?split=val&size=8"],
    ["precision=bf16"], ["tune.mode=lora"], ["tune.mode=partial"], ["stages={1: {steps: 1}}"],
    ["stages={a: {steps: 1}, a: {steps: 2}}"],
    ["stages={a: {steps: 1}, b: {steps: 1, loss: {gram: {weight: 1}}}}"],
    ["stages={a: {steps: 1}, b: {steps: 1, loss: {gram: {weight: 1, teacher: init}}}}"],
    ["stages={a: {steps: 1}, b: {steps: 1, loss: {gram: {weight: 1, teacher: '@1'}}}}"],
    ["stages={a: {steps: 1, schedule: {lr: {peak: 1e-4}}}}"],
    ["stages={a: {steps: 1}, b: {steps: 1, crops: {global_size: 40}}}"],
    ["stages={a: {steps: 1, tune: {mode: lora}}}"], ["stages={a: {steps: 1}, ../b: {steps: 1}}"],
    ["stages={a/b: {steps: 1}}"], ["stages={'': {steps: 1}}"],
)  # fmt: skip

IMPOSSIBLE = (
    ["total_steps=null"], ["epochs=-1", "total_steps=null"], ["images=0", "total_steps=null"],
    ["batch_size=6", "loss.koleo.group=4"], ["micro_batch_size=2"], ["micro_batch_size=3"],
    ["micro_batch_size=-2"], ["crops.global_size=4"], ["crops.local_size=4"],
    ["crops.global_size=-32"], ["crops.global_size=[32]"], ["crops.global_size=[32, 32, 32]"],
    ["crops.global_size=[32, -32]"], ["crops.global_scale=[0.9, 0.1]"],
    ["crops.global_scale=[0, 1]"], ["crops.local_scale=[0.1, 1.1]"], ["crops.local_scale=[0.1]"],
    ["crops.global_count=0"], ["crops.global_count=1", "crops.local_count=0"],
    ["crops.local_count=-1"], ["crops.policy=unnatural"], ["crops.flip=2"], ["crops.blur=[0, 0]"],
    ["crops.hue=0.6"], ["crops.mix=[]"], ["crops.mix=[{share: 0}]"],
    ["crops.mix=[{share: 1, global_sise: 32}]"], ["crops.mix=3"], ["crops.mix=[[1, 2]]"],
    ["data.channels=0"], ["data.channels=2"], ["data.channels=4"], ["data.mean=[0.5]"],
    ["data.std=[0, 1, 1]"], ["data.max_bad=-1"], ["data.channels=1", "crops.stain=0.2"],
    ["model.arch=vit_gigantic"], ["model.arch="], ["model.arch=timm:"],
    ["model.arch=timm:no_such_model"], ["model.arch=../etc"], ["model.embed_dim=33"],
    ["model.num_heads=3"], ["model.num_heads=64"],
    ["model.embed_dim=30", "model.num_heads=2", "model.positions=rope"], ["model.embed_dim=-32"],
    ["model.depth=0"], ["model.patch_size=0"], ["model.patch_size=-8"], ["model.patch_size=32"],
    ["model.patch_size=64"], ["model.registers=-1"], ["model.drop_path=1"], ["model.ffn=geglu"],
    ["model.ffn_ratio=0"], ["model.norm_eps=-1"], ["model.positions=rope", "model.rope_base=0"],
    ["model.rope_jitter=-1"], ["model.positions=rope", "model.rope_jitter=0.5"],
    ["model.positions=rope", "model.rope_rescale=0"],
    ["model.positions=rope", "model.rope_base=-100"],
    ["model.positions=rope", "model.rope_shift=-1"], ["loss.dino.weight=0", "loss.ibot.weight=0"],
    ["loss.dino.weight=-1"], ["loss.dino.prototypes=0"], ["loss.dino.layers=0"],
    ["loss.dino.bottleneck=-1"], ["loss.dino.student_temp=0"], ["loss.ibot.prototypes=-16"],
    ["loss.ibot.mask_ratio=[0.5, 0.1]"], ["loss.ibot.mask_ratio=[0.9, 1]"],
    ["loss.ibot.mask_probability=2"], ["loss.koleo.group=1"], ["loss.koleo.group=3"],
    ["loss.koleo.group=16"], ["loss.gram.weight=-1"],
    ["loss.gram.weight=1", "loss.gram.teacher=init"],
    ["loss.gram.weight=1", "loss.gram.teacher=auto"],
    ["loss.gram.weight=1", "loss.gram.teacher=@5"], ["loss.gram.weight=1", "loss.gram.teacher=@"],
    ["loss.gram.weight=1", "loss.gram.teacher=@x"],
    ["loss.gram.weight=1", "loss.gram.teacher=/no/such/run"],
    ["loss.gram.weight=1", "loss.gram.refresh=1"], ["loss.gram.weight=1", "loss.gram.start=2"],
    ["loss.gram.weight=1", "loss.gram.start=99%"],
    ["loss.gram.weight=1", "loss.gram.teacher_scale=0.5"],
    ["loss.gram.weight=1", "loss.gram.teacher=pixels", "loss.gram.teacher_scale=2"],
    ["loss.gram.max_refreshes=2"], ["loss.gram.weight=1", "loss.gram.teacher=timm:no_such_model"],
    ["schedule.gram=2", "loss.gram.teacher=init"], ["schedule.lr.peak=-1"],
    ["schedule.lr.warmup=-1"], ["schedule.lr.shape=square"], ["schedule.lr.shape=constant"],
    ["schedule.ema_momentum=2"], ["schedule.ema_momentum=-1"], ["schedule.teacher_temp=0"],
    ["schedule.teacher_temp.end=-1"], ["schedule.weight_decay=-1"], ["schedule.ibot=-1"],
    ["schedule.dino=0", "schedule.ibot=0"], ["schedule.dino_local=-1"], ["schedule=3"],
    ["schedule.unknown=1"], ["optim.betas=[0.9]"], ["optim.betas=[0.9, 1]"], ["optim.clip_grad=0"],
    ["optim.layer_decay=0"], ["optim.layer_decay=2"], ["optim.patch_embed_lr=-1"],
    ["optim.freeze_last_layer=x"], ["optim.lr_scaling=cubic"], ["probe.every=1"],
    ["probe.every=-1"], ["probe.every=1", "probe.train=scenes?size=4", "probe.val=nowhere"],
    ["checkpoint.every=0"], ["checkpoint.keep=0"], ["checkpoint.snapshot=-1"], ["device=gpu"],
    ["device=cuda:99"], ["precision=int8"], ["strategy=zero"], ["seed=-1"],
    ["seed=9223372036854775808"], ["schedule.weight_decay.end=-1"],
    ["model.positions=rope", "model.rope_rescale=0.5"], ["seed=1.5"],
    ["seed=99999999999999999999999"], ["log_every=0"], ["log_every=-3"], ["batch_size=0"],
    ["batch_size=1"], ["batch_size=-8"], ["tune.mode=half"], ["tune.mode=lora", "tune.rank=0"],
    ["tune.mode=partial", "tune.targets=[no.such.layer]"], ["tune.mode=lora", "tune.targets=3"],
    ["tune.dropout=2", "tune.mode=lora"], ["health.on_collapse=panic"],
)  # fmt: skip

STAGES = (
    "{}", "[]", "3", "{a: null}", "{a: 3}", "{a: {}}", "{a: {steps: 0}}", "{a: {steps: -1}}",
    "{a: {steps: x}}", "{a: {steps: 1.5}}", "{a: {steps: true}}",
    "{a: {steps: 1, model: {depth: 3}}}", "{a: {steps: 1, batch_size: 0}}",
    "{a: {steps: 1, seed: 2}}", "{a: {steps: 1, schedule: 3}}",
    "{a: {steps: 1, schedule: {lr: x}}}", "{a: {steps: 1, loss: null}}",
    "{a: {steps: 1, stages: {b: {steps: 1}}}}", "{a: {steps: 1, crops: {global_size: 4}}}",
    "{a: {steps: 1, data: {train: nowhere}}}", "{a: {steps: 1, init: nowhere}}",
    "{a: {steps: 1, total_steps: 5}}",
    "{a: {steps: 1}, b: {steps: 1, loss: {gram: {weight: 1, teacher: '@9'}}}}",
    "{a: {steps: 1, crops: {mix: [{share: -1}]}}}",
    "{a: {steps: 1}, b: {steps: 1, crops: {local_count: -1}}}",
    "{a: {steps: 1, loss: {dino: {prototypes: 8}}}}", "{a: {steps: 1, unknown: 1}}",
    "{a: {steps: 1, epochs: 1}}", "a",
)  # fmt: skip

MISSING = (
    "data.train=folder:/no/such/folder", "data.train=/no/such/folder",
    "data.train=list:/no/such/list.txt", "data.train=imgaes",
    "data.train=tar:/no/such-{{0000..0003}}.tar", "data.train=npz:/no/such.npz",
    "data.train=scenes?sise=3", "data.train=scenes?size=0", "data.train=scenes?size=-3",
    "data.train=scenes?size=x", "data.train=scenes?split=test", "data.train=scenes?resolution=0",
    "data.train=python:no_such_module:make", "data.train=python:os", "data.train=python:os:getcwd",
    "data.train=mix:/no/such.yaml", "data.train=fashion_mnist:/no/such", "data.train=cifar10",
    "data.train=fashion_mnits:/x", "data.train=folder:{empty}", "data.train={empty}",
    "data.train={text}", "data.train={text}?split=a", "data.train={binary}",
    "data.train=npz:{binary}", "data.train=tar:{binary}", "data.train=mix:{text}",
    "data.train=folder:{text}", "init=/no/such/run", "init={empty}", "init={text}", "init={binary}",
    "init={safetensors}", "init=random:vit_nano", "init=random:no_such", "init=timm:no_such",
    "init=pixels", "init=random:vit_nano?patch_size=x", "init=/no/such/run@5",
    "init=/no/such/run@best", "output_dir={text}", "output_dir=/dev/null/run", "output_dir=",
    "output_dir={text}/below",
)  # fmt: skip

FILES = (
    "- a\n- b\n", "a: [1\n", "just text", "3", "base: no_such.yaml\n", "base: {file}\n",
    "base: [a]\n", "base: quickstart.yaml\nmodle: 3\n", "a: &x [*x]\n", "? {a: b}\n: c\n", "1: 2\n",
    "null: 2\n", "\t\n", "batch_size: !!float x\n", "%YAML 9.9\n---\na: 1\n", "loss: [dino]\n",
    "loss: {dino: {wieght: 1}}\n", "data: scenes\n", "schedule: {lr: [1e-3, 1e-5]}\n",
    "seed: 2001-01-01\n", "true: 1\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """An empty folder, and files that are not what their place asks for."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("no such picture.png\nnor this\n")
    (folder / "binary.pth").write_bytes(bytes(range(256)) * 4)
    (folder / "weights.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    names = {
        "empty": "empty",
        "text": "text.txt",
        "binary": "binary.pth",
        "safetensors": "weights.safetensors",
    }
    return {name: str(folder / path) for name, path in names.items()}


def typo(key: str, rng: random.Random) -> str:
    """The key with one letter left out, doubled, exchanged or in another case."""
    place = rng.randrange(len(key))
    letter = key[place]
    return (
        key[:place]
        + rng.choice(["", letter * 2, rng.choice("abz._ -="), letter.swapcase()])
        + key[place + 1 :]
    )


def mutants(places: dict[str, str], folder: Path, rng: random.Random) -> list[list[str]]:
    """Arguments of three hundred calls, what is wrong last; each run has its own folder."""
    configs = ["no_such.yaml", str(folder), "", *FILES]
    for number, text in enumerate(FILES, 3):
        configs[number] = str(folder / f"{number}.yaml")
        Path(configs[number]).write_text(text.replace("{file}", configs[number]))
    wrong = [*rng.sample(IMPOSSIBLE, 112), *rng.sample(ODD, 14)]
    wrong += [[f"stages={text}"] for text in rng.sample(STAGES, 28)]
    wrong += [[text.format(**places)] for text in rng.sample(MISSING, 38)]
    wrong += [["no-equals-sign"], ["=3"], ["a..b=3"], [".=1"]]
    wrong += [[f"{rng.choice(KEYS)}={rng.choice(WRONG_VALUES)}"] for _ in range(50)]
    wrong += [[f"{typo(rng.choice(KEYS), rng)}={rng.choice(WRONG_VALUES)}"] for _ in range(30)]
    calls = [(["--config", name], []) for name in configs] + [
        ([], arguments) for arguments in wrong
    ]
    runs = (f"output_dir={folder / f'run{number}'}" for number in range(len(calls)))
    return [
        [*config, *BASE, run, *arguments]
        for (config, arguments), run in zip(calls, runs, strict=True)
    ]


def outcome(call: list[str], capsys) -> str:
    """ "trained", "refused", or what is wrong with the way it ended."""
    status = 0
    try:
        run_script(lambda _: train.main(call))
    except SystemExit as error:
        status = error.code
    except Exception as error:  # a traceback for the user
        capsys.readouterr()
        return f"{type(error).__name__}: {error}"
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if status == 0:
        return "trained" if not errors else f"exit 0 in spite of {errors}"
    if status == 2 and len(errors) == 1 and 10 < len(errors[0]) < 1200:
        return "refused"
    return f"exit {status}: {errors}"


def test_three_hundred_mutants_train_or_are_refused_in_a_sentence(
    places, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    calls = mutants(places, tmp_path, random.Random(0))
    outcomes = [outcome(call, capsys) for call in calls]
    wrong = [
        f"{call[len(BASE) :]}: {end}"
        for call, end in zip(calls, outcomes, strict=True)
        if end not in ("trained", "refused")
    ]
    assert not wrong, "\n".join(wrong)
    counts = Counter(outcomes)
    assert len(calls) == 300 and counts["trained"] >= 14 and counts["refused"] >= 150


@pytest.mark.slow
def test_twenty_mutants_as_processes_end_without_a_traceback(places, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for call in random.Random(1).sample(mutants(places, tmp_path, random.Random(0)), 20):
        command = [sys.executable, str(ROOT / "train.py"), *call]
        process = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert process.returncode in (0, 2) and "Traceback" not in process.stderr, (
            call,
            process.stderr,
        )
        assert process.returncode == 0 or process.stderr.splitlines()[-1].startswith("error: "), (
            call,
            process.stderr,
        )
