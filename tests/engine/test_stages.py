"""Several stages in one run, and Gram anchoring in any of them: who acts when, resumed at any step,
refused in a sentence.
"""

import copy
import itertools
import shutil

import numpy as np
import pytest
import torch
import yaml

import train
from data.loader import StepDataset
from data.sources.specs import open_data
from engine.cli import run_script
from engine.config import CropsConfig, SizeConfig, load_config
from engine.gram import GramTeacher
from engine.optim import build_schedules
from engine.stages import plan_stages
from engine.views import views_from
from models.weights.load import load_backbone
from tests.test_train import folder_of, metrics

THREE = {
    "pretrain": {"steps": 3, "schedule": {"lr": {"peak": 1e-2, "shape": "constant", "warmup": 1}}},
    "gram": {
        "steps": 4,
        "batch_size": 4,
        "loss": {
            "gram": {
                "weight": 2,
                "teacher": "auto",
                "start": 1,
                "refresh": 2,
                "teacher_scale": 2,
                "distortions": False,
            }
        },
        "schedule": {
            "lr": 5e-3,
            "dino_local": {"start": 1, "peak": 0.5, "warmup": 2, "shape": "constant"},
        },
    },
    "highres": {
        "steps": 3,
        "loss": {"gram": {"weight": 1.5, "teacher": "init", "teacher_scale": 1.5}},
        "crops": {
            "mix": [
                {"share": 1, "global_size": 48, "local_size": 16},
                {"share": 1, "global_size": 40, "local_size": 20},
            ]
        },
        "schedule": {"lr": {"start": 0, "peak": 0, "end": 1e-3, "decay": 2}, "ema_momentum": 0.9},
    },
}


@pytest.fixture
def staged(tiny, tmp_path):
    """The tiny run as three stages of 10 steps; `crops.mix` and Gram teachers of several kinds
    among them.
    """
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump({"stages": THREE}, sort_keys=False))
    settings = [item for item in tiny if not item.startswith("total_steps")]
    rope = [
        "model.positions=rope",
        "model.registers=2",
        "model.rope_rescale=2",
        "loss.ibot.prototypes=16",
    ]
    return [
        "--config",
        str(path),
        *settings[:-1],
        *rope,
        "checkpoint.every=1",
        "checkpoint.keep=99",
        "checkpoint.snapshot=1",
        settings[-1],
    ]


def test_a_run_killed_at_any_step_goes_on_to_the_same_end(staged, tmp_path):
    train.main(staged)
    run = folder_of(staged)
    assert [record["stage"] for record in metrics(run)] == ["pretrain"] * 3 + ["gram"] * 4 + [
        "highres"
    ] * 3
    assert [record["images_seen"] for record in metrics(run)] == [
        8,
        16,
        24,
        28,
        32,
        36,
        40,
        48,
        56,
        64,
    ]
    assert ["loss/gram" in record for record in metrics(run)] == [False] * 4 + [True] * 6
    final = load_backbone(run).state_dict()
    for step in (2, 3, 4, 8):  # within a stage and at its end, before and after Gram's start
        again = tmp_path / f"again{step}"
        shutil.copytree(run, again)
        (again / "checkpoints" / "latest").write_text(
            str(step)
        )  # as a kill right after that checkpoint leaves it
        for kept in (again / "snapshots").iterdir():
            if int(kept.name) > step:
                shutil.rmtree(kept)
        train.main([*staged[:-1], f"output_dir={again}"])
        assert metrics(again) == metrics(run), step
        assert all(
            torch.equal(value, final[name])
            for name, value in load_backbone(again).state_dict().items()
        )


def test_the_last_stage_may_grow_and_a_further_one_may_follow_and_nothing_else_changes(
    staged, tmp_path, capsys
):
    train.main(staged)
    before = metrics(folder_of(staged))
    longer = {
        **THREE,
        "highres": {**THREE["highres"], "steps": 4},
        "more": {"steps": 1, "schedule": {"lr": 1e-4}},
    }
    for stages, words in (
        ({**THREE, "gram": {**THREE["gram"], "steps": 9}}, "only the last stage may grow"),
        ({**THREE, "gram": {**THREE["gram"], "batch_size": 8}}, "stages.gram"),
        (dict(itertools.islice(THREE.items(), 2)), "left out"),
    ):
        (tmp_path / "other.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        with pytest.raises(match=words):
            train.main(["--config", str(tmp_path / "other.yaml"), *staged[2:]])
    with pytest.raises(match="total_steps"):
        train.main([*staged, "total_steps=20"])
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump({"stages": longer}, sort_keys=False))
    train.main(["--config", str(tmp_path / "longer.yaml"), *staged[2:]])
    after = metrics(folder_of(staged))
    assert after[:10] == before and [record["stage"] for record in after[10:]] == [
        "highres",
        "more",
    ]


def test_total_steps_scales_the_stages_of_a_new_run(staged):
    cfg = load_config(staged[1], [*staged[2:], "total_steps=40"])
    assert [(s.first, s.stop) for s in plan_stages(cfg, 40, build_schedules)] == [
        (0, 12),
        (12, 28),
        (28, 40),
    ]
    with pytest.raises(match="too few"):
        plan_stages(cfg, 2, build_schedules)


def test_a_stage_may_start_from_another_run(tiny, tmp_path):
    train.main([*tiny, f"output_dir={tmp_path / 'other'}", "seed=5"])
    stages = {
        "first": {"steps": 2},
        "second": {"steps": 1, "init": str(tmp_path / "other"), "schedule": {"lr": 0}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"stages": stages}))
    train.main(
        [
            "--config",
            str(tmp_path / "s.yaml"),
            *(item for item in tiny if "total_steps" not in item),
            "schedule.weight_decay=0",
        ]
    )
    ours, theirs = (
        load_backbone(folder_of(tiny)).state_dict(),
        load_backbone(tmp_path / "other").state_dict(),
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "stages, words",
    [
        ({"a": {"stepz": 3}}, "stages.a.steps"),
        ({"a": {"steps": 0}}, "at least 1"),
        ({"a": 7}, "stages.a.steps"),
        ({"a": {"steps": 2, "loss": {"gram": {"wait": 1}}}}, "unknown key loss.gram.wait"),
        ({"a": {"steps": 2, "model": {"depth": 3}}}, "cannot change model.depth"),
        ({"a": {"steps": 2, "seed": 3}}, "cannot change seed"),
        ({"a": {"steps": 2, "crops": {"mix": []}}}, "crops.mix is empty"),
        ({"a": {"steps": 2, "crops": {"mix": [{"global": 3}]}}}, "unknown key"),
        (
            {"a": {"steps": 2, "init": "x", "tune": {"mode": "lora"}}},
            "an init of its own and tune.mode=lora",
        ),
        ({}, "stages is empty"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_stage_is_a_sentence(stages, words, tiny, tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(match=words):
        load_config(str(tmp_path / "s.yaml"), [item for item in tiny if "total_steps" not in item])


# ----------------------------------------------------------------- Gram

SOURCES = ("ema", "init", "auto", "RUN@step", "MODEL")


def gram_overrides(source, refresh, most, scale, distortions, start, model, run) -> list[str]:
    teacher = {"RUN@step": f"{run}@2", "MODEL": model}.get(source, source)
    keys = {
        "weight": 1,
        "teacher": teacher,
        "start": start,
        "teacher_scale": scale,
        "distortions": str(distortions).lower(),
    }
    keys |= {"refresh": refresh} if refresh else {}
    keys |= {"max_refreshes": most} if most else {}
    return [f"loss.gram.{key}={value}" for key, value in keys.items()]


COMBINATIONS = [
    (source, refresh, most, scale, distortions, start)
    for source, (refresh, most), scale, distortions, start in itertools.product(
        SOURCES, ((None, None), (3, None), (3, 1)), (1, 2), (True, False), (0, 4)
    )
    if not (source == "ema" and refresh) and not (source == "auto" and start == 0)
]
SOME = [item for number, item in enumerate(COMBINATIONS) if number % 9 == 0]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run with snapshots, to hold on to."""
    from tests.conftest import TINY

    run = tmp_path_factory.mktemp("earlier") / "run"
    train.main([*TINY, "batch_size=4", "checkpoint.snapshot=2", f"output_dir={run}"])
    return run


def runs_ten_steps(combination, tiny, earlier):
    source, refresh, most, scale, distortions, start = combination
    init = [f"init={earlier}"] if source == "init" else []
    gram = gram_overrides(*combination, model=earlier / "teacher", run=earlier)
    train.main(
        [
            *tiny[:-1],
            "total_steps=10",
            "batch_size=4",
            "checkpoint.every=10",
            "checkpoint.snapshot=2",
            *init,
            *gram,
            tiny[-1],
        ]
    )
    records = metrics(folder_of(tiny))
    assert len(records) == 10 and ["loss/gram" in record for record in records] == [
        step >= start for step in range(10)
    ]
    assert all(np.isfinite(record["loss"]) for record in records)


@pytest.mark.parametrize("combination", SOME, ids=str)
def test_gram_keys_combine(combination, tiny, earlier):
    runs_ten_steps(combination, tiny, earlier)


@pytest.mark.slow
@pytest.mark.parametrize(
    "combination", [item for item in COMBINATIONS if item not in SOME], ids=str
)
def test_every_allowed_combination_of_the_gram_keys_runs(combination, tiny, earlier):
    runs_ten_steps(combination, tiny, earlier)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["loss.gram.teacher=ema", "loss.gram.refresh=3"], "no effect with loss.gram.teacher: ema"),
        (["loss.gram.max_refreshes=3"], "without loss.gram.refresh"),
        (["loss.gram.refresh=0", "loss.gram.teacher=auto"], "loss.gram.refresh is 0"),
        (["loss.gram.teacher=init"], "needs weights"),
        (["loss.gram.teacher=auto", "loss.gram.start=2"], "set checkpoint.snapshot"),
        (["loss.gram.teacher=auto", "checkpoint.snapshot=1"], "earlier snapshots"),
        (["loss.gram.teacher_scale=0.5"], "at least 1"),
        (["loss.gram.start=soon"], "loss.gram.start"),
        (["loss.gram.start=4"], "not before the end"),
        (["loss.gram.teacher=nowhere/at/all"], "does not exist"),
        (
            ["loss.gram.teacher=random:vit_nano?patch_size=8", "loss.gram.refresh=1"],
            "another architecture",
        ),
        (["loss.gram.weight=-1"], "negative"),
    ],
)  # fmt: skip
def test_what_gram_cannot_do_is_one_sentence(overrides, words, tiny, capsys):
    with pytest.raises(SystemExit) as error:
        run_script(lambda _: train.main([*tiny[:-1], "loss.gram.weight=1", *overrides, tiny[-1]]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and words in lines[-1] and lines[-1].startswith("error:")


def test_start_and_refreshes_are_honoured():
    settings = load_config(
        None,
        [
            "loss.gram.teacher=init",
            "loss.gram.start=2",
            "loss.gram.refresh=3",
            "loss.gram.max_refreshes=2",
            "init=x",
        ],
    ).loss.gram
    ema = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(ema.weight, 0.0)
    gram = GramTeacher(
        settings, 10, 40, ema, snapshot=lambda: copy.deepcopy(ema), load=None, choose=None
    )
    seen = []
    for step in range(10, 30):
        seen.append(None if gram.at(step) is None else float(gram.at(step).weight.detach()))
        torch.nn.init.constant_(ema.weight, float(step + 1))  # the teacher after `step + 1` updates
        gram.follow(step + 1)
    assert (
        seen == [None] * 2 + [0.0] * 3 + [15.0] * 3 + [18.0] * 12
    )  # refreshed after 3 and 6 steps from the start, no more


def test_a_gram_teacher_equal_to_the_student_costs_nothing(tiny, earlier):
    """Nothing moves at lr 0, so the term is 0 where the student sees no mask and the same crops."""
    still = ["schedule.lr=0", "schedule.weight_decay=0", "loss.ibot.weight=0", "loss.gram.weight=1"]
    train.main([*tiny[:-1], *still, "loss.gram.teacher=ema", tiny[-1]])
    assert all(record["loss/gram"] < 1e-9 for record in metrics(folder_of(tiny)))
    other = "random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8&image_size=32&seed=3"
    train.main([*tiny[:-1], *still, f"loss.gram.teacher={other}", "overwrite=true", tiny[-1]])
    assert all(record["loss/gram"] > 1e-6 for record in metrics(folder_of(tiny)))


def test_auto_takes_the_snapshot_with_the_best_locality_and_says_so(tiny, capsys, pictures):
    import json

    train.main(
        [
            *tiny[:-1],
            "checkpoint.snapshot=1",
            "loss.gram.weight=1",
            "loss.gram.teacher=auto",
            "loss.gram.start=3",
            "schedule.lr=1e-2",
            tiny[-1],
        ]
    )
    choice = json.loads((folder_of(tiny) / "gram_choice.json").read_text())
    assert list(choice["locality"]) == ["1", "2", "3"]
    assert choice["locality"][str(choice["chosen"])] == max(choice["locality"].values())
    assert f"the snapshot of step {choice['chosen']}" in capsys.readouterr().err
    assert (folder_of(tiny) / "gram_choice.png").exists()


def test_gram_crops_are_the_global_crops_in_another_size_and_without_their_colours():
    class Gram:
        teacher_scale, distortions = 2.0, False

    class Plain(Gram):
        teacher_scale = 1.0

    crops = CropsConfig(global_size=32, local_size=16, local_count=1, flip=0.5, policy="crops_only")
    data, options = open_data("scenes?size=8"), {"batch_size": 4, "seed": 0}
    of = {
        kind: StepDataset(data, views_from(crops, [0.5], [0.5], 8, None, kind), **options)[0]
        for kind in (None, Gram, Plain)
    }
    assert of[None].gram_crops is None and torch.equal(of[None].global_crops, of[Gram].global_crops)
    assert of[Gram].gram_crops.shape == (8, 3, 64, 64) and torch.equal(
        of[Plain].gram_crops, of[None].global_crops
    )
    small = torch.nn.functional.interpolate(of[Gram].gram_crops, 32, mode="area")
    assert (small - of[None].global_crops).abs().mean() < 0.05  # the same place, mirrored alike
    colourful = CropsConfig(global_size=32, local_size=16, local_count=1)
    batch = StepDataset(data, views_from(colourful, [0.5], [0.5], 8, None, Plain), **options)[0]
    assert not torch.equal(batch.gram_crops, batch.global_crops)


def test_sizes_are_drawn_by_their_shares_and_alike_on_every_rank():
    mix = [SizeConfig(3, 32, 16), SizeConfig(1, 48, 16)]
    views = views_from(CropsConfig(mix=mix, local_count=1), [0.5], [0.5], 8)
    ranks = [
        StepDataset(
            open_data("scenes?size=8"), views, batch_size=2, seed=0, rank=rank, world_size=2
        )
        for rank in range(2)
    ]
    sizes = [[dataset[step].global_crops.shape[-1] for step in range(40)] for dataset in ranks]
    assert (
        sizes[0] == sizes[1] and 4 <= sizes[0].count(48) <= 18
    )  # 10 expected of 40; 3 deviations are 8
