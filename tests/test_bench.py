"""bench.py: one line of JSON whose parts fit together, variants side by side, and memory that is
computed as it is measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import bench
import train
from data.augment import draw
from engine.config import load_config
from engine.start import build_student
from engine.views import stage_loader
from evals.flops import FlopClock, peak_flops
from evals.memory import memory_table
from models.ssl_model import count_parameters

ROOT = Path(__file__).parent.parent
FEW = ["--steps", "3", "--warmup", "1"]
CPU = torch.device("cpu")


def result_of(capsys) -> dict:
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.fixture
def measured(tiny, tmp_path, capsys):
    bench.main([*tiny, *FEW, "--output", str(tmp_path)])
    return result_of(capsys)


def test_one_line_of_json_with_every_key_and_the_same_in_a_file(measured, tmp_path):
    keys = {
        "images_per_second",
        "step_ms",
        "phases_ms",
        "mfu",
        "memory_gib",
        "data_wait_fraction",
        "gflop_per_step",
        "peak_tflops",
    }
    assert (
        keys <= measured.keys()
        and measured["task"] == "bench"
        and measured["precision"] == "float32"
    )
    assert json.loads((tmp_path / "bench.json").read_text()) == measured
    assert measured["phases_ms"].keys() == set(bench.PHASES)
    assert 0 < measured["mfu"] < 1 and 0 < measured["data_wait_fraction"] < 1


def test_phases_add_up_to_the_step_and_the_step_to_images_per_second(measured):
    assert sum(measured["phases_ms"].values()) == pytest.approx(measured["step_ms"], rel=0.25)
    assert measured["images_per_second"] == pytest.approx(8e3 / measured["step_ms"], rel=0.01)


def test_it_leaves_no_run_behind(tiny, tmp_path, capsys):
    bench.main([*tiny, *FEW])
    assert not (tmp_path / "run").exists()


def test_variants_are_compared_with_the_configuration_as_it_is(tiny, capsys):
    bench.main(
        [*tiny, *FEW, "--compare", "crops.local_count=8,crops.blur=[0,0,0]", "data.workers=1"]
    )
    base, more, workers = result_of(capsys)["variants"]
    assert base["change"] == "" and base["speedup"] == 1.0
    assert (
        more["gflop"]["forward"] > 1.4 * base["gflop"]["forward"]
        and more["gflop"]["teacher"] == base["gflop"]["teacher"]
    )
    assert "augmentation" not in workers["phases_ms"], "loader workers do it beside the step"
    assert workers["gflop_per_step"] == base["gflop_per_step"]


def test_gradients_in_micro_batches_and_recomputation_cost_no_further_operations(tiny, capsys):
    once = ["--steps", "1", "--warmup", "1"]
    bench.main([*tiny, *once, "--compare", "micro_batch_size=4", "checkpointing=blocks"])
    base, split, again = result_of(capsys)["variants"]
    assert split["gflop_per_step"] == pytest.approx(base["gflop_per_step"], rel=0.02)
    assert again["gflop_per_step"] == base["gflop_per_step"]


def test_the_trace_opens_as_json(tiny, tmp_path, capsys):
    bench.main([*tiny, *FEW, "--profile", str(tmp_path / "traces" / "trace.json")])
    assert json.loads((tmp_path / "traces" / "trace.json").read_text())["traceEvents"]


def test_every_stage_can_be_measured(capsys):
    few = [
        "data.train=scenes?size=40",
        "device=cpu",
        "batch_size=16",
        "data.workers=0",
        "--steps",
        "1",
        "--warmup",
        "1",
    ]
    bench.main(["--config", "dinov3_quickstart.yaml", *few, "--stage", "gram"])
    assert result_of(capsys)["gflop"]["teacher"] > 0


def test_operations_of_a_linear_layer_are_those_of_three_products():
    layer, x = nn.Linear(32, 64), torch.randn(16, 32, requires_grad=True)
    with FlopClock() as clock:
        y = layer(x)
        clock.mark("forward")
        y.sum().backward()
        clock.mark("backward")
    assert clock.phases == {"forward": 2 * 16 * 32 * 64, "backward": 4 * 16 * 32 * 64}


def test_operations_of_fused_attention_are_those_of_its_two_products():
    q = torch.randn(2, 4, 10, 8, requires_grad=True)
    product = 2 * 2 * 4 * 10 * 10 * 8
    with FlopClock() as clock:
        attended = F.scaled_dot_product_attention(q, q, q)
        clock.mark("forward")
        attended.sum().backward()
        clock.mark("backward")
    assert clock.phases == {"forward": 2 * product, "backward": 4 * product}


def test_the_peak_of_a_processor_is_what_a_large_product_reaches():
    peak, source = peak_flops(CPU, torch.float32)
    a = torch.randn(256, 256)
    assert peak > 1e8 and "products" in source and (a @ a).shape == (256, 256)


SIZES = [{"share": 0.5, "global_size": 32, "local_size": 16}]
SIZES += [{"share": 0.5, "global_size": 40, "local_size": 24}]


@pytest.mark.parametrize("mix", [[], [f"crops.mix={json.dumps(SIZES)}"]])
def test_timed_crops_are_the_crops_of_every_size(mix, tiny):
    stage = bench.chosen_stage(load_config(None, [*tiny, *mix]), None)
    plain, timed = (stage_loader(stage, 0, 8, CPU).dataset for _ in range(2))
    clocks, sizes = bench.time_crops(timed), set()

    def seconds() -> float:
        return sum(clock.seconds for clock in clocks)

    for step in range(8):
        before, crops = seconds(), timed[step].global_crops
        assert torch.equal(plain[step].global_crops, crops) and seconds() > before
        sizes.add(crops.shape[-1])
    assert sizes == ({32, 40} if mix else {32})
    before = seconds()
    draw(torch.Generator(), 2), plain[4]
    assert seconds() == before


# ----------------------------------------------------------------- memory


def test_memory_counts_the_parameters_of_the_model(tiny, capsys):
    bench.main([*tiny, "--memory", "--gpus", "1", "4"])
    result = result_of(capsys)
    student = build_student(load_config(None, tiny), True)
    assert result["parameters"]["all"] == count_parameters(student) and result["task"] == "memory"
    assert [row["images"] for row in result["rows"]] == [8, 2]


def table(config: str, overrides: list[str], gpus: list[int]) -> tuple[dict, list[dict]]:
    stage = bench.chosen_stage(load_config(config, overrides), None)
    with torch.device("meta"):
        student = build_student(stage.cfg, True)
    return memory_table(stage.cfg, stage.schedules, student, gpus)


def test_weights_and_moments_are_shared_and_activations_follow_the_images():
    _, (one, eight) = table("dinov2_vitl14.yaml", ["batch_size=64", "precision=fp32"], [1, 8])
    for part in ("parameters", "gradients", "optimizer", "teacher", "activations"):
        assert one[part] == pytest.approx(8 * eight[part], rel=0.02), part
    assert eight["total_checkpointed"] < eight["total"] and one["optimizer"] == pytest.approx(
        2 * one["parameters"], rel=0.01
    )


def test_the_published_seven_billion_are_counted_without_allocating():
    counts, rows = table("dinov3_vit7b16.yaml", ["micro_batch_size=16"], [8, 256])
    assert (
        counts["backbone"] == pytest.approx(6.716e9, rel=1e-3)
        and rows[1]["total"] < rows[0]["total"]
    )


def measured_and_computed(*overrides: str) -> tuple[float, float]:
    few = [
        "device=cpu",
        "data.workers=0",
        "data.train=scenes?size=40",
        "loss.koleo.weight=0",
        *overrides,
    ]
    command = [sys.executable, "bench.py", "--config", "dinov2_vits14.yaml", *few]
    outs = []
    for flags in (["--steps", "1", "--warmup", "1"], ["--memory"]):
        # What is freed goes back to the system, so that the peak is of what is held and not of what
        # lies about.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(
            [*command, *flags], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        outs.append(json.loads(done.stdout))
    row = outs[1]["rows"][0]
    total = row["total_checkpointed" if "checkpointing=blocks" in overrides else "total"]
    return outs[0]["memory_gib"] - outs[0]["memory_before_gib"], total


SMALL = (
    "crops.global_size=98",
    "crops.local_size=42",
    "crops.local_count=4",
    "batch_size=8",
    "precision=fp32",
    "model.depth=6",
)


@pytest.mark.skipif(sys.platform != "linux", reason="peak resident memory as Linux counts it")
def test_peak_memory_of_vit_small_is_as_computed():
    measured, computed = measured_and_computed(*SMALL, "loss.dino.prototypes=16384")
    assert computed == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak resident memory as Linux counts it")
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("arch", ["vit_small", "vit_base"])
def test_peak_memory_is_as_computed_with_and_without_recomputation(arch, checkpointing):
    overrides = ("batch_size=4", f"model.arch={arch}", f"checkpointing={checkpointing}")
    measured, computed = measured_and_computed(*overrides)
    assert computed == pytest.approx(measured, rel=0.25)


# ----------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "0"], "--steps"),
        (["--stage", "gram"], "no stages"),
        (["--memory", "--gpus", "3"], "3 GPUs"),
        (["--memory", "model.arch=timm:resnet10t", "loss.ibot.weight=0"], "resnet10t"),
        (["data.train=folder:/nowhere"], "/nowhere"),
        (["--compare", "loss.dino.wieght=1"], "wieght"),
    ],
)
def test_a_mistake_is_one_sentence(tiny, arguments, words):
    with pytest.raises((ValueError, OSError), match=words):
        bench.main([*tiny, *arguments])


def test_students_are_measured_together_and_each_alone(tiny, tmp_path, capsys):
    train.main([*tiny, "total_steps=2"])
    students = {"small": {"model": {"embed_dim": 16}}, 16: {"model": {"depth": 1}}}
    distill = {"distill": {"teacher": str(tmp_path / "run"), "students": students}}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill))
    capsys.readouterr()
    bench.main(
        [
            "--config",
            str(tmp_path / "distill.yaml"),
            *tiny[:-1],
            f"output_dir={tmp_path / 'none'}",
            *FEW,
        ]
    )
    result = result_of(capsys)
    assert (
        result["own_ms"].keys() == {"small", "16"}
        and min(result["own_ms"].values()) > 0 < result["shared_ms"]
    )
    parts = result["shared_ms"] + sum(result["own_ms"].values())
    assert result["cost"] == pytest.approx(result["step_ms"] / parts, rel=0.01)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="leave --compare"):
        bench.main(
            ["--config", str(tmp_path / "distill.yaml"), *tiny, "--compare", "precision=bf16"]
        )
