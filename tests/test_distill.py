"""distill.py: students do not know of each other, the teacher looks once, and who cannot learn from
whom is told so.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import distill
import train
from data.distillation import CropAdapter, rank_share, with_masks
from data.masking import MaskSpec
from engine.cli import StoppedEarly
from engine.config import load_config
from engine.distill_config import DistillTrainConfig
from engine.health import health
from engine.logger import read_metrics
from engine.optim import build_schedules
from engine.stages import plan_stages
from engine.students import Entry, divide_ranks, student_configs
from engine.views import stage_loader
from errors import UserError
from losses.distill import matching_loss, standardize
from models.distill import Teacher, head_from, load_teacher
from models.head import LAST_LAYERS, ProjectionHead
from models.ssl_model import SSLModel, build_ssl_model, save_heads
from models.vit import build_backbone
from models.weights.load import load_backbone
from models.weights.save import write_backbone
from tests.conftest import TINY
from tests.processes import run_process

TIMING = {"images_per_second", "data_wait_fraction", "memory_gib"}
# Another width, another patch size with other inputs and statistics, a convolutional net.
NARROW = ["distill.students.narrow={model: {embed_dim: 16}, schedule: {lr: 2e-3}}"]
COARSE = [
    "distill.students.coarse.model={patch_size: 12, drop_path: 0.2}",
    "distill.students.coarse.crops={global_size: 24, local_size: 12}",
    "distill.students.coarse.data={mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}",
]
CONVOLUTIONAL = [
    "distill.students.conv={model: {arch: 'timm:test_resnet'}, loss: {ibot: {weight: 0.5}}}"
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A run of train.py with two heads."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train.main(
        [
            *TINY,
            "loss.ibot.prototypes=24",
            "loss.dino.last_layer=plain",
            "total_steps=2",
            f"output_dir={folder}",
        ]
    )
    return str(folder)


@pytest.fixture
def shared(teacher, tmp_path) -> list[str]:
    """Overrides for students of that teacher; the folder comes last."""
    heads = ["loss.ibot.prototypes=24", "loss.dino.last_layer=plain"]
    heads += ["checkpoint.every=100"]  # at the end all the same
    return [*TINY, *heads, f"distill.teacher={teacher}", f"output_dir={tmp_path / 'run'}"]


def folder_of(overrides: list[str]) -> Path:
    return Path(overrides[-1].removeprefix("output_dir="))


def metrics(student: Path) -> list[dict]:
    return [
        {k: v for k, v in record.items() if k not in TIMING}
        for record in read_metrics(student / "metrics.jsonl")
    ]


def weights(student: Path) -> dict[str, torch.Tensor]:
    files = [load_file(student / "teacher" / f"{name}.safetensors") for name in ("model", "heads")]
    return {name: tensor for file in files for name, tensor in file.items()}


# ----------------------------------------------------------------- independent students


@pytest.mark.parametrize(
    "match, students",
    [
        ("heads", {"narrow": NARROW, "coarse": COARSE}),
        pytest.param("features", {"conv": CONVOLUTIONAL}, marks=pytest.mark.slow),
    ],
)
def test_students_of_one_run_get_exactly_the_weights_of_runs_of_their_own(
    shared, tmp_path, match, students
):
    common = [*shared, f"distill.match={match}", "schedule.ema_momentum=0.5", "total_steps=3"]
    distill.main([*common, *NARROW, *COARSE, *CONVOLUTIONAL, f"output_dir={tmp_path / 'all'}"])
    for name, overrides in students.items():
        distill.main([*common, *overrides, f"output_dir={tmp_path / name}"])
        alone, together = (tmp_path / run / "students" / name for run in (name, "all"))
        assert metrics(alone) == metrics(together) and len(metrics(alone)) == 3
        for key, tensor in weights(alone).items():
            assert torch.equal(tensor, weights(together)[key]), (name, key)


def test_two_ranks_with_a_student_each_give_the_losses_of_one_process(shared, tmp_path):
    common = [
        *shared,
        *NARROW,
        *COARSE,
        "total_steps=10",
        "loss.dino.centering=sinkhorn",
        "loss.ibot.centering=ema",
    ]
    common += ["schedule.lr.start=1e-3"]
    distill.main([*common, f"output_dir={tmp_path / 'one'}"])
    done = run_process("distill.py", *common, f"output_dir={tmp_path / 'two'}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "ranks 0 to 0" in done.stderr
    for name in ("narrow", "coarse"):
        one, two = (
            [record["loss"] for record in metrics(tmp_path / run / "students" / name)]
            for run in ("one", "two")
        )
        assert len(one) == 10 and two == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("match", ["heads", "features"])
def test_shares_of_three_ranks_give_the_losses_of_one_process(shared, tmp_path, match):
    common = [
        *shared,
        *NARROW,
        *COARSE,
        "distill.students.coarse.share=2",
        "batch_size=12",
        f"distill.match={match}",
    ]
    common += [
        "loss.koleo.group=2",
        "schedule.lr=1e-3",
        "schedule.weight_decay=0.04",
        "schedule.ema_momentum=0.9",
    ]
    common += [
        "schedule.teacher_temp=0.05",
        "distill.students.coarse.model.drop_path=0",
    ]  # drawn on each rank
    distill.main([*common, f"output_dir={tmp_path / 'one'}"])
    for steps in ("total_steps=2", "total_steps=4"):  # and goes on
        folder = f"output_dir={tmp_path / 'three'}"
        done = run_process("distill.py", *common, steps, folder, ranks=3)
        assert done.returncode == 0, done.stderr
    for name in ("narrow", "coarse"):
        one, three = (
            [record["loss"] for record in metrics(tmp_path / run / "students" / name)]
            for run in ("one", "three")
        )
        assert len(one) == 4 and three == pytest.approx(one, abs=1e-5)


def test_the_teacher_looks_once_a_step_however_many_learn(shared):
    overrides = [*shared, *NARROW, *COARSE, "total_steps=2"]
    seen = []

    def count(module, inputs, output):
        if isinstance(module, Teacher):
            seen.append(inputs[0].shape)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        distill.main([*overrides, f"output_dir={folder_of(shared)}"])
    finally:
        hook.remove()
    assert seen == [(16, 3, 32, 32)] * 2


# ----------------------------------------------------------------- a run like any other


def test_a_student_leaves_what_a_run_leaves(shared, pictures):
    probes = [
        "probe.every=2",
        "probe.train=scenes?size=30",
        "probe.val=scenes?split=val&size=10",
        "checkpoint.snapshot=2",
    ]
    distill.main([*shared, *COARSE, *probes, f"output_dir={folder_of(shared)}"])
    student = folder_of(shared) / "students" / "coarse"
    names = (
        "config.yaml metrics.jsonl checkpoints/4 curves.png report.png snapshots/2 best "
        "teacher/heads.safetensors"
    )
    assert not [name for name in names.split() if not (student / name).exists()]
    records = metrics(student)
    assert [record["step"] for record in records if "probe/knn" in record] == [0, 2, 4]
    assert {
        "loss/dino",
        "loss/ibot",
        "loss/koleo",
        "grad_norm",
        "health/teacher_entropy",
    } <= records[-1].keys()
    backbone = load_backbone(str(student))
    assert (
        backbone.patch_size == 12
        and backbone.preprocessing.mean == (0.5,) * 3
        and backbone.preprocessing.size == (24, 24)
    )
    assert load_config(str(student / "config.yaml"), [], DistillTrainConfig).crops.global_size == 24
    assert load_config(
        str(folder_of(shared) / "config.yaml"), [], DistillTrainConfig
    ).distill.students.keys() == {"coarse"}


def test_a_student_that_is_ahead_after_a_kill_waits_for_the_others(shared, capsys):
    common = [*shared, *NARROW, *COARSE, "total_steps=2", "checkpoint.every=1"]
    students = [folder_of(shared) / "students" / name for name in ("narrow", "coarse")]
    distill.main([*common, f"output_dir={folder_of(shared)}"])
    undisturbed = [(metrics(student), weights(student)) for student in students]
    (students[0] / "checkpoints" / "latest").write_text(
        "1"
    )  # as if it had died between two savings
    distill.main([*common, f"output_dir={folder_of(shared)}"])
    assert "going on from step 1" in capsys.readouterr().err
    for student, (records, tensors) in zip(students, undisturbed, strict=True):
        assert metrics(student) == records
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in weights(student).items())
    distill.main([*common, f"output_dir={folder_of(shared)}"])
    assert capsys.readouterr().err.count("is finished") == 2


@pytest.mark.slow
def test_at_the_time_limit_all_students_save_at_the_same_step_and_go_on(shared):
    common = [*shared, *NARROW, *COARSE, "total_steps=2"]
    with pytest.raises(StoppedEarly, match="stopped at step 1 of 2"):
        distill.main([*common, "time_limit=1e-9", f"output_dir={folder_of(shared)}"])
    students = [folder_of(shared) / "students" / name for name in ("narrow", "coarse")]
    assert [(student / "checkpoints" / "latest").read_text() for student in students] == ["1", "1"]
    distill.main([*common, f"output_dir={folder_of(shared)}"])
    assert [len(metrics(student)) for student in students] == [2, 2]


def test_changed_keys_are_refused_and_a_further_student_is_not(shared):
    distill.main([*shared, *NARROW, f"output_dir={folder_of(shared)}"])
    with pytest.raises(ValueError, match=r"crops.global_scale"):
        distill.main(
            [*shared, *NARROW, "crops.global_scale=[0.5, 1.0]", f"output_dir={folder_of(shared)}"]
        )
    with pytest.raises(
        ValueError,
        match=r"students/narrow was begun with other settings: model.embed_dim \(16 -> 48\)",
    ):
        distill.main(
            [
                *shared,
                "distill.students.narrow.model.embed_dim=48",
                f"output_dir={folder_of(shared)}",
            ]
        )
    distill.main([*shared, *NARROW, "distill.students.late={}", f"output_dir={folder_of(shared)}"])
    assert len(metrics(folder_of(shared) / "students" / "late")) == 4


def test_a_last_stage_at_high_resolution_keeps_the_proportions_of_the_students(shared):
    crops = "crops: {global_size: 48, local_size: 24}"
    stages = f"stages={{main: {{steps: 1}}, high: {{steps: 1, {crops}, schedule: {{lr: 1e-4}}}}}}"
    own = "distill.students.coarse.stages.high.schedule.lr=5e-4"
    overrides = [argument for argument in shared if not argument.startswith("total_steps")]
    sizes = []

    def note(module, inputs, output):
        if isinstance(module, SSLModel):
            sizes.append([tuple(crops.shape[-2:]) for crops in inputs[:2]])

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        distill.main([*overrides, *COARSE, stages, own, f"output_dir={folder_of(shared)}"])
    finally:
        hook.remove()
    assert sizes == [[(24, 24), (12, 12)], [(36, 36), (18, 18)]]
    coarse = metrics(folder_of(shared) / "students" / "coarse")
    assert [record["stage"] for record in coarse] == ["main", "high"] and coarse[-1]["lr"] == 5e-4


def test_students_start_from_weights_of_their_own(shared, teacher, tmp_path):
    still = ["schedule.lr=0", "schedule.weight_decay=0", "total_steps=1"]
    other = tmp_path / "other"
    train.main(
        [
            *TINY,
            "total_steps=1",
            "data.mean=[0.1, 0.2, 0.3]",
            "data.std=[0.5, 0.6, 0.7]",
            f"output_dir={other}",
        ]
    )
    students = [f"distill.students.warm.init={other}", "distill.students.cold={}"]
    distill.main([*shared, *still, *students, f"output_dir={folder_of(shared)}"])
    warm, cold = (folder_of(shared) / "students" / name for name in ("warm", "cold"))
    initial = load_backbone(str(other)).state_dict()
    assert all(
        torch.equal(tensor, initial[name])
        for name, tensor in load_backbone(str(warm)).state_dict().items()
    )
    assert load_backbone(str(warm)).preprocessing.mean == pytest.approx((0.1, 0.2, 0.3))
    assert load_backbone(str(cold)).preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))


def test_every_key_of_the_section_is_read(shared, monkeypatch):
    from engine.distill_config import DistillConfig

    read = set()

    def spy(self, name):
        read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(DistillConfig, "__getattribute__", spy)
    distill.main(
        [
            *shared,
            *NARROW,
            "total_steps=1",
            "distill.match=features",
            f"output_dir={folder_of(shared)}",
        ]
    )
    assert set(DistillConfig.__dataclass_fields__) <= read


# ----------------------------------------------------------------- teachers without heads


def headless(kind: str, folder: Path) -> str:
    """A random teacher of another patch size and other statistics, on disk as timm and transformers
    write it.
    """
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2Config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=14, image_size=28
        )
        transformers.Dinov2Model(config).save_pretrained(folder)
        processor = transformers.BitImageProcessor(
            size={"shortest_edge": 28}, crop_size=28, image_mean=[0.5] * 3, image_std=[0.2] * 3
        )
        processor.save_pretrained(folder)
    else:
        backbone = load_backbone(
            "random:vit_nano?patch_size=10&image_size=40&embed_dim=64&depth=1&num_heads=1"
        )
        preprocessing = replace(backbone.preprocessing, mean=(0.5,) * 3, std=(0.2,) * 3)
        write_backbone(backbone, preprocessing, folder, "timm")
    return str(folder)


@pytest.mark.parametrize("kind, size", [("timm", 40), ("transformers", 28)])
def test_a_teacher_without_heads_of_another_patch_size_and_normalisation_is_matched(
    shared, tmp_path, kind, size
):
    spec = headless(kind, tmp_path / kind)
    longer = ["total_steps=20", "crops.global_size=40", "schedule.lr=2e-3", "loss.koleo.weight=0"]
    longer += ["data.train=scenes?size=8", "schedule.weight_decay=0"]
    common = [*shared, f"distill.teacher={spec}", f"distill.teacher_size={size}", *longer]
    distill.main([*common, *NARROW, *CONVOLUTIONAL, f"output_dir={folder_of(shared)}"])
    for name in ("narrow", "conv"):
        records = metrics(folder_of(shared) / "students" / name)
        assert not {"loss/dino", "loss/ibot"} & records[-1].keys()
        for term in ("loss/cls", "loss/patches"):
            assert records[-1][term] < 0.95 * records[0][term], (name, term)


def test_a_sight_resizes_and_normalises_as_its_own_network_wants():
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    given, wanted = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), ((0.5, 0.5, 0.4), (0.2, 0.3, 0.2))

    def normalised(crops, statistics):
        mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
        return (crops - mean) / std

    sight = CropAdapter([(32, 48), (16, 16)], [(16, 24), (8, 8)], given, wanted)
    small = F.interpolate(images, (16, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        sight(normalised(images, given)), normalised(small, wanted), atol=1e-5, rtol=1e-5
    )
    assert sight.size((64, 96)) == (32, 48) and sight(None, local=True) is None
    same = CropAdapter([(32, 48), (16, 16)], [(32, 48), (16, 16)], given, given)
    assert same(images) is images


@pytest.mark.parametrize("fill", [True, False])
def test_masks_of_a_student_are_those_that_the_loader_draws(tiny, fill):
    cfg = load_config(None, [*tiny, f"loss.ibot.mask_fill={str(fill).lower()}"])
    (stage,) = plan_stages(cfg, 4, build_schedules)
    loaded = next(iter(stage_loader(stage, 2, 8, torch.device("cpu"))))
    spec = MaskSpec((4, 4), cfg.loss.ibot.mask_probability, cfg.loss.ibot.mask_ratio, fill)
    unmasked = replace(loaded, masks=None)
    drawn = with_masks(unmasked, spec, cfg.seed, 2, rank_share(8), 8)
    assert torch.equal(drawn.masks, loaded.masks) and drawn.masks.any()


@pytest.mark.parametrize("weight, prototypes", [(1, 32), (0, 24)])
def test_health_is_that_of_the_targets_that_are_trained_on(
    weight, prototypes, shared, teacher, monkeypatch
):
    """In train.py and distill.py alike: of iBOT's prototypes where the DINO term is off."""
    seen = []

    def spied(probs, *features):
        seen.append(probs.shape[-1])
        return health(probs, *features)

    for where in ("engine.trainer", "engine.student_run"):
        monkeypatch.setattr(f"{where}.health", spied)
    keys = [f"loss.dino.weight={weight}", "total_steps=1", "log_every=1"]
    distill.main([*shared[:-1], *NARROW, "distill.match=heads", *keys, shared[-1]])
    train.main([*shared[:-2], *keys, f"{shared[-1]}-train"])
    assert len(seen) >= 2 and set(seen) == {prototypes}


# ----------------------------------------------------------------- losses and heads


def test_standardised_rows_equal_a_naive_loop_however_they_are_divided():
    rows = (
        torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.0])
        + 4
    )
    expected = torch.empty_like(rows)
    variances = [
        sum((float(x) - float(rows[:, d].mean())) ** 2 for x in rows[:, d]) / 12 for d in range(5)
    ]
    for d in range(5):
        scale = (variances[d] + 0.01 * sum(variances) / 5) ** 0.5
        expected[:, d] = (rows[:, d] - rows[:, d].mean()) / scale
    torch.testing.assert_close(standardize([rows])[0], expected, atol=1e-5, rtol=1e-5)
    parts = standardize([rows[:4].view(2, 2, 5), rows[4:].view(8, 1, 5)])
    torch.testing.assert_close(
        torch.cat([part.flatten(0, -2) for part in parts]), expected, atol=1e-5, rtol=1e-5
    )


def test_the_matching_loss_is_one_minus_the_cosine_and_gives_the_teacher_no_gradient():
    student, teacher = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True),
        torch.tensor([[6.0, 8.0], [0.0, 2.0]], requires_grad=True),
    )
    loss = matching_loss(student, teacher)
    assert float(loss.detach()) == pytest.approx((0 + 1) / 2)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(ValueError, match="correspond"):
        matching_loss(student, teacher[:1])


@pytest.mark.parametrize("kind", LAST_LAYERS)
@pytest.mark.parametrize("layers", [1, 3])
def test_heads_are_rebuilt_from_what_a_run_saves(tmp_path, kind, layers):
    loss = load_config(
        None,
        [
            *TINY,
            f"loss.dino.last_layer={kind}",
            f"loss.dino.layers={layers}",
            "loss.ibot.prototypes=9",
        ],
    ).loss
    model = build_ssl_model(
        build_backbone("vit_nano", embed_dim=32, depth=1, num_heads=2, patch_size=8, image_size=32),
        loss.dino,
        loss.ibot,
        loss.dino.last_layer,
    )
    save_heads(model, tmp_path)
    tensors = load_file(tmp_path / "heads.safetensors")
    x = torch.randn(5, 32)
    for name in ("dino_head", "ibot_head"):
        head = head_from(tensors, name)
        assert isinstance(head, ProjectionHead) and torch.equal(head(x), getattr(model, name)(x))
    assert head_from(tensors, "other_head") is None


def test_a_teacher_takes_no_gradient_and_its_exchanged_vectors_give_its_logits(teacher):
    model = load_teacher(teacher, 3)
    assert (
        not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        and not model.training
    )
    images = torch.randn(2, 3, 32, 32)
    seen, features = model(images, heads=True), model(images, heads=False)
    torch.testing.assert_close(model.dino_head.prototypes(seen.cls), model.dino_head(features.cls))
    torch.testing.assert_close(
        model.patch_head.prototypes(seen.patches), model.ibot_head(features.patches)
    )


# ----------------------------------------------------------------- who learns where, and mistakes


def test_ranks_are_divided_by_share():
    def divided(ranks: int, **shares: float) -> dict:
        return divide_ranks([Entry(name, None, share) for name, share in shares.items()], ranks)

    # DINOv3's own layout (its configuration of four students).
    assert divided(296, s=48, s_plus=48, b=80, l=120) == {
        "s": range(0, 48), "s_plus": range(48, 96), "b": range(96, 176), "l": range(176, 296)
    }  # fmt: skip
    assert divided(4, small=1, large=100) == {"small": range(0, 1), "large": range(1, 4)}
    assert divided(2, a=1, b=1, c=1) is None and divided(1, a=1) is None
    assert divided(3, a=1) == {"a": range(0, 3)}


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([], "distill.students is empty"),
        (["distill.students.a.batch_size=4"], "distill.students.a cannot change batch_size"),
        (
            ["distill.students.a.modl.arch=vit_nano"],
            "distill.students.a: unknown key modl; did you mean model",
        ),
        (["distill.students.a.share=0"], "distill.students.a.share is 0"),
        (["distill.students.a=vit_small"], "must hold keys and values"),
        (["distill.students.a.crops.global_size=64"], "crops are cut at crops.global_size 32"),
        (["distill.techer=x"], "did you mean distill.teacher"),
    ],
)
def test_a_mistake_among_the_students_is_one_sentence(shared, overrides, words):
    with pytest.raises(UserError, match=words):
        student_configs(load_config(None, [*shared, *overrides], DistillTrainConfig))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["loss.dino.prototypes=64"],
            "loss.dino.prototypes is 64, .* are 32; set loss.dino.prototypes=32",
        ),
        (["loss.ibot.prototypes=null"], "loss.ibot.prototypes is null, .* are 24"),
        (["distill.teacher=random:vit_nano?patch_size=8", "distill.match=heads"], "has none"),
        (["distill.teacher=timm:vit_smal_patch16_224"], "vit_small_patch16_224"),
        (
            ["distill.teacher=runs/quickstart"],
            "python train.py --config configs/quickstart.yaml makes it",
        ),
        (["distill.teacher=null"], "give distill.teacher"),
        (
            ["distill.teacher=random:timm:mixer_s32_224"],
            "the teacher .* does not take crops of 32 x 32",
        ),
        (
            ["distill.students.a.model.arch=timm:mixer_s32_224"],
            "distill.students.a does not take crops",
        ),
        (
            ["distill.students.a.model.arch=timm:test_convnext"],
            "distill.students.a does not take crops of 16 x 16",
        ),
        (["loss.gram.weight=1"], "loss.gram has no part"),
        (["distill.teacher_size=4"], "4 x 4"),
    ],
)
def test_a_wrong_pairing_is_one_sentence(shared, overrides, words):
    if "distill.teacher=runs/quickstart" in overrides and Path("runs/quickstart").exists():
        pytest.skip("there is a quickstart here")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        distill.main(
            [
                *shared,
                "distill.students.a={}",
                *overrides,
                f"output_dir={folder_of(shared)}",
            ]
        )
    assert (
        len(str(caught.value)) < 600
        and not (folder_of(shared) / "students" / "a" / "metrics.jsonl").exists()
    )


@pytest.mark.parametrize("name", ["distill_quickstart.yaml", "distill_dinov3_family.yaml"])
def test_shipped_configurations_load(name):
    cfg = load_config(name, [], DistillTrainConfig)
    entries = student_configs(cfg)
    assert len(entries) >= 2 and cfg.distill.teacher
    for entry in entries:
        assert entry.cfg.output_dir == f"{cfg.output_dir}/students/{entry.name}"
