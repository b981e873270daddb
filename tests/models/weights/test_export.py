"""Export: transformers, timm and onnxruntime compute what our model computes; no tensor is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import export
from data.evaluation import EvalDataset
from data.sources.specs import open_data
from engine.cli import RunFailed, preparation
from models import load_backbone
from models.features import Preprocessing
from models.pixels import PixelBackbone
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer, build_backbone
from models.weights import own, save
from models.weights.save import save_backbone, save_teacher, write_backbone
from tests.dialects import HF_CLASSES, deviation, draw, hf_tokens, hugging_face, meta_file, tokens
from tests.processes import run_process

BOUND = 1e-5  # of the largest number in the reference
PREPROCESSING = Preprocessing((64, 48), 72, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
TINY = dict(embed_dim=128, depth=2, num_heads=2, patch_size=8, image_size=32)
ROPE = dict(positions="rope", norm_eps=1e-5, mask_k_bias=True, layerscale=0.1, registers=4)
MODELS = {
    "DINO": dict(interpolation="size"),
    "DINO without biases": dict(
        interpolation="size", qkv_bias=False, proj_bias=False, ffn_bias=False
    ),
    "DINOv2": dict(layerscale=0.1, interpolation="size"),
    "DINOv2 with masked key bias": dict(layerscale=0.1, interpolation="size", mask_k_bias=True),
    "DINOv2, gated": dict(layerscale=0.1, interpolation="size", ffn="swiglu"),
    "DINOv2 with registers": dict(layerscale=0.1, interpolation="antialias", registers=4),
    "registers, gated, no LayerScale": dict(interpolation="antialias", registers=2, ffn="swiglu"),
    "DINOv3": ROPE,
    "DINOv3, gated, of 13 channels": {
        **ROPE,
        "ffn": "swiglu64",
        "ffn_ratio": 3.0,
        "in_channels": 13,
    },
    "DINOv3 without qkv bias, local norm": {
        **ROPE,
        "qkv_bias": False,
        "mask_k_bias": False,
        "untie_local_cls_norm": True,
    },
    "rope as in the quickstart": dict(positions="rope", norm_eps=1e-6),
    "rope without registers": {**ROPE, "registers": 0, "mask_token": False, "rope_base": 50.0},
}


def build(options: dict) -> VisionTransformer:
    return draw(VisionTransformer(**{**TINY, **options}))


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(
        2, channels, height, width, generator=torch.Generator().manual_seed(height + width)
    )


def statistics(channels: int) -> Preprocessing:
    return Preprocessing((64, 48), 72, (0.4,) * channels, (0.2,) * channels)


def assert_same_tokens(found: torch.Tensor, backbone, images: torch.Tensor) -> None:
    with torch.no_grad():
        reference = tokens(backbone(images))
    assert (found - reference).abs().max() <= BOUND * reference.abs().max()


# ----------------------------------------------------------------- opened by others


@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_our_export_and_computes_our_tokens(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = build(MODELS[name])
    write_backbone(backbone, statistics(backbone.in_channels), tmp_path, "hf")
    model, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    assert not missing and not report["unexpected_keys"] and not report["mismatched_keys"]
    for size in [(32, 32), (48, 48), (24, 40)]:
        images = image(*size, backbone.in_channels)
        assert_same_tokens(hf_tokens(model.eval(), images), backbone, images)


@pytest.mark.parametrize("name", MODELS)
def test_the_teacher_of_a_run_opens_in_transformers_and_comes_back_whole(name, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    backbone = build({**MODELS[name], "fit": "pad", "drop_path": 0.1, "image_size": [32, 32]})
    save_teacher(backbone, tmp_path, statistics(backbone.in_channels))
    again = load_backbone(tmp_path)
    assert again.config == backbone.config and again.preprocessing == statistics(
        backbone.in_channels
    )
    state, loaded = backbone.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    acting = {
        key: state.get(f"{key}_mask", torch.ones(())) for key in state
    }  # a masked key bias has no effect
    assert all(torch.equal(loaded[key] * acting[key], state[key] * acting[key]) for key in state)
    assert load_backbone(f"{tmp_path}?fit=crop").config["fit"] == "crop"
    capsys.readouterr()
    model, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    images = image(32, 32, backbone.in_channels)
    assert_same_tokens(hf_tokens(model.eval(), images), backbone, images)


def test_a_teacher_without_counterpart_in_transformers_stays_ours(tmp_path):
    for number, backbone in enumerate(
        (build(dict(untie_cls_norm=True)), TimmBackbone("test_resnet"))
    ):
        save_teacher(backbone, tmp_path / str(number), statistics(3))
        assert (
            json.loads((tmp_path / str(number) / "config.json").read_text())["model_type"]
            == "nanodino"
        )
        again = load_backbone(tmp_path / str(number)).state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_timm_opens_our_export_and_computes_our_tokens(name, tmp_path):
    options = {
        **MODELS[name],
        **({"interpolation": "antialias"} if "interpolation" in MODELS[name] else {}),
    }
    backbone = build(options)
    write_backbone(backbone, statistics(backbone.in_channels), tmp_path, "timm")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_model_data_config(model)
    assert list(data["mean"]) == [0.4] * backbone.in_channels
    assert list(data["input_size"]) == [backbone.in_channels, 64, 48]
    for size in [(32, 32), (48, 48), (24, 40)]:
        images = image(*size, backbone.in_channels)
        with torch.no_grad():
            assert_same_tokens(model.forward_features(images), backbone, images)
            assert_same_tokens(model(images)[:, None], lambda x: _cls_only(backbone(x)), images)


def _cls_only(features):
    features.registers = features.patches = features.cls[:, :0, None].expand(
        -1, 0, features.cls.shape[1]
    )
    return features


@pytest.mark.parametrize(
    "arch, name",
    [("vit_small", "vit_small_patch14_dinov2"), ("vit_base", "vit_base_patch14_dinov2")],
)
def test_official_sizes_open_as_weights_of_timms_own_models(arch, name, tmp_path):
    backbone = draw(
        build_backbone(
            arch, patch_size=14, image_size=518, layerscale=1.0, interpolation="antialias", depth=12
        )
    )
    write_backbone(backbone, statistics(3), tmp_path, "timm")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, dynamic_img_size=True
    ).eval()
    images = image(56, 84)[:1]
    with torch.no_grad():
        assert_same_tokens(model.forward_features(images), backbone, images)


@pytest.mark.parametrize(
    "options", [{}, dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), in_channels=5)]
)
def test_convnexts_open_in_transformers_and_timm(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = draw(TimmBackbone("convnext_tiny", **options))
    for format in ("hf", "timm"):
        write_backbone(backbone, statistics(backbone.in_channels), tmp_path / format, format)
    images = image(64, 96, backbone.in_channels)
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == "DINOv3ConvNextModel"
    assert_same_tokens(hf_tokens(model, images), backbone, images)
    model = timm.create_model(
        f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0
    ).eval()
    with torch.no_grad():
        assert_same_tokens(model(images)[:, None], lambda x: _cls_only(backbone(x)), images)


def test_other_models_of_timm_go_back_to_timm_only(tmp_path):
    backbone = TimmBackbone("test_resnet").eval()
    write_backbone(backbone, statistics(3), tmp_path, "timm")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    assert torch.equal(model.conv1[0].weight, backbone.model.conv1[0].weight)
    assert torch.equal(load_backbone(tmp_path)(image(64, 64)).cls, backbone(image(64, 64)).cls)
    for format in ("hf", "meta"):
        with pytest.raises(ValueError, match="test_resnet has no counterpart"):
            write_backbone(backbone, statistics(3), tmp_path, format)


def test_the_image_processor_prepares_images_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_backbone(build(MODELS["DINO"]), PREPROCESSING, tmp_path / "hf", "hf")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).resize(
        (140, 100), Image.Resampling.BICUBIC
    )
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "a.png")
    ours, _, _ = EvalDataset(
        open_data(f"folder:{tmp_path / 'images'}"), **preparation(PREPROCESSING, None, None)
    )[0]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 2 / 255 / min(
        PREPROCESSING.std
    )  # rounding to 8 bits on the way


# ----------------------------------------------------------------- cycles


@pytest.mark.parametrize("name", HF_CLASSES)
def test_hf_own_meta_own_timm_own_hf_loses_no_bit(name, tmp_path, capsys):
    pytest.importorskip("transformers")
    source = hugging_face(name, "nano")
    source.save_pretrained(tmp_path / "0")
    states, lost = [], set()
    folder = tmp_path / "0"
    for step, format in enumerate(["own", "meta", "own", "timm", "own", "hf"], 1):
        backbone = load_backbone(folder)
        states.append(backbone.state_dict())
        folder = tmp_path / str(step)
        lost |= {note for note in write_backbone(backbone, backbone.preprocessing, folder, format)}
    first, last = (
        load_file(tmp_path / "0" / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    apart = {"embeddings.mask_token"} if any("mask_token" in note for note in lost) else set()
    if any("position of the CLS token" in note for note in lost):
        folded = "embeddings.cls_token", "embeddings.position_embeddings"
        apart |= set(folded)
        assert torch.equal(last[folded[0]], first[folded[0]] + first[folded[1]][:, :1])
        assert (
            torch.equal(last[folded[1]][:, 1:], first[folded[1]][:, 1:])
            and not last[folded[1]][:, 0].any()
        )
    first = {key: tensor for key, tensor in first.items() if not key.startswith("pooler.")}
    assert first.keys() == last.keys()
    for key in first.keys() - apart:
        assert torch.equal(first[key], last[key]), key
    # Up to the first file of timm nothing at all is lost.
    for before, after in zip(states[:3], states[1:4], strict=True):
        assert before.keys() == after.keys() and all(
            torch.equal(before[key], after[key]) for key in before
        )


@pytest.mark.parametrize("name", HF_CLASSES)
def test_our_meta_files_have_the_authors_tensors(name, tmp_path):
    pytest.importorskip("transformers")
    model = hugging_face(name, "nano")
    model.save_pretrained(tmp_path / "hf")
    backbone = load_backbone(tmp_path / "hf")
    write_backbone(backbone, backbone.preprocessing, tmp_path / "meta", "meta")
    ours = torch.load(tmp_path / "meta" / "backbone.pth", weights_only=True)
    theirs = meta_file(model, load_file(tmp_path / "hf" / "model.safetensors"))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].shape == theirs[key].shape and torch.allclose(
            ours[key], theirs[key], rtol=1e-6, atol=0
        ), key


@pytest.mark.parametrize("format", ["hf", "timm", "meta", "own"])
@pytest.mark.parametrize("name", MODELS)
def test_every_export_is_a_model_of_ours_again(name, format, tmp_path, capsys):
    backbone = build(MODELS[name])
    preprocessing = statistics(backbone.in_channels)
    notes = write_backbone(backbone, preprocessing, tmp_path, format)
    query = [note.partition("?")[2] for note in notes if "?" in note]
    query += (
        [f"interpolation={MODELS[name]['interpolation']}"]
        if "interpolation" in MODELS[name]
        else []
    )
    again = load_backbone(f"{tmp_path}?{'&'.join(query)}" if query else tmp_path)
    images = image(24, 40, backbone.in_channels)
    with torch.no_grad():
        assert deviation(again, tokens(backbone(images)), images) <= BOUND
    assert format == "meta" or again.preprocessing == preprocessing


# ----------------------------------------------------------------- refused or named


@pytest.mark.parametrize(
    "format, options, word",
    [
        ("hf", dict(untie_cls_norm=True), "untie_cls_norm=True"),
        ("timm", dict(untie_cls_norm=True), "untie_cls_norm=True"),
        ("hf", dict(image_size=(32, 16)), "4 x 2 grid"),
        ("hf", dict(layerscale=0.1, ffn_ratio=3.5), "mlp_ratio"),
        ("hf", dict(positions="rope", rope_normalize="max"), "rope_normalize=max"),
        ("timm", dict(positions="rope", rope_normalize="min"), "rope_normalize=min"),
        ("timm", dict(norm_eps=1e-5), "norm_eps=1e-05"),
        ("timm", dict(positions="rope", norm_eps=1e-3), "norm_eps=0.001"),
        ("meta", dict(norm_eps=1e-5), "norm_eps=1e-05"),
        ("tf", {}, "'tf'; it must be one of own, hf, timm, meta"),
    ],
)
def test_models_without_a_counterpart_are_refused_in_a_sentence(format, options, word, tmp_path):
    with pytest.raises(ValueError, match=word.replace("(", r"\(")):
        write_backbone(build(options), PREPROCESSING, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "format, options, word",
    [
        ("timm", MODELS["DINOv2 with registers"], "position of the CLS token"),
        ("timm", ROPE, "not held: mask_token"),
        ("hf", dict(MODELS["DINO"], mask_token=True), "not held: mask_token"),
        ("hf", {**ROPE, "untie_local_cls_norm": True}, "local_cls_norm"),
        ("hf", {**ROPE, "layerscale": None}, "added without effect: blocks.*.ls1.gamma"),
        ("hf", dict(fit="pad"), "padded"),
        ("hf", dict(interpolation="offset"), "resized by 'size' there, here by 'offset'"),
        ("meta", dict(interpolation="size"), "resized by 'offset' there"),
        ("meta", dict(num_heads=4), r"?num_heads=4"),
        ("meta", {**ROPE, "norm_eps": 1e-6}, "?norm_eps=1e-06"),
    ],
)
def test_what_a_format_cannot_hold_is_named(format, options, word, tmp_path):
    assert word in "; ".join(write_backbone(build(options), PREPROCESSING, tmp_path, format))


def test_rounded_periods_are_named(tmp_path):
    backbone = build(ROPE)
    assert not any(
        "periods" in note for note in write_backbone(backbone, PREPROCESSING, tmp_path, "hf")
    )
    backbone.rope.periods.copy_(backbone.rope.periods.bfloat16())
    for format in ("hf", "timm"):
        assert any(
            "periods are rounded" in note
            for note in write_backbone(backbone, PREPROCESSING, tmp_path, format)
        )
    assert not any(
        "periods" in note for note in write_backbone(backbone, PREPROCESSING, tmp_path, "meta")
    )


def test_raw_pixels_have_no_weights_to_write(tmp_path):
    with pytest.raises(ValueError, match="PixelBackbone has no counterpart"):
        write_backbone(PixelBackbone(), PREPROCESSING, tmp_path, "hf")


# ----------------------------------------------------------------- the script


@pytest.fixture
def run(tmp_path):
    """What a run leaves, as far as exports look at it."""
    save_backbone(build(MODELS["DINOv3"]), tmp_path / "run" / "teacher", PREPROCESSING)
    recipe = (
        "# commit 0\ninit: hf:facebook/dinov3-vits16-pretrain-lvd1689m\n"
        "data: {train: 'folder:/scans'}\nseed: 7\n"
    )
    (tmp_path / "run" / "config.yaml").write_text(recipe)
    return tmp_path / "run"


@pytest.mark.parametrize("format", ["hf", "timm", "meta", "own"])
def test_exports_end_with_one_line_of_json_and_a_model_card(format, run, tmp_path, capsys):
    export.main(["--model", str(run), "--format", format, "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert len(lines) == 1 and result["task"] == "export" and result["format"] == format
    assert result["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "folder:/scans",
        "hf:facebook/dinov3-vits16",
        "DINOv3 License",
        "mean (0.1, 0.2, 0.3)",
        "seed: 7",
    ):
        assert part in card
    assert export.USAGE[format] in card
    assert all(note in card for note in result["not_held"])


def licence(run: Path, init: str) -> str:
    (run / "config.yaml").write_text(f"init: {init}\n")
    card = export.model_card(str(run), "hf", load_backbone(run), [])
    return next(line for line in card.splitlines() if "Licence" in line)


@pytest.mark.parametrize(
    "init, words",
    [
        ("hf:facebook/dinov2-small", "Apache-2.0"),
        ("hf:facebook/dino-vits16", "Apache-2.0"),
        ("hf:facebook/dinov3-vitl16-pretrain-sat493m", "DINOv3 License"),
        ("timm:vit_small_patch16_dinov3.lvd1689m", "DINOv3 License"),
        ("timm:convnext_tiny.dinov3_lvd1689m", "DINOv3 License"),
        ("timm:vit_small_patch14_reg4_dinov2.lvd142m?channels=1", "Apache-2.0"),
        ("timm:vit_small_patch16_224.dino", "Apache-2.0"),
        ("null", "no other weights"),
        ("random:vit_nano", "no other weights"),
        ("/my/weights.pth", "unknown"),
        ("/home/nanoDINO/dinov3_study/vits.pth", "unknown"),
        ("hf:someone/dinov2-of-mine", "unknown"),
        ("hf:medical/dinov3-x", "unknown"),
        ("timm:resnet50.a1_in1k", "unknown"),
        ("timm:vit_base_patch16_dinosaur", "unknown"),
    ],
)
def test_the_licence_is_that_of_a_known_name_and_never_guessed_from_a_path(init, words, run):
    assert words in licence(run, init)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "dinov3_vit"}, "DINOv3 License"),
        ({"model_type": "dinov2", "_name_or_path": "facebook/dinov2-base"}, ": Apache-2.0"),
        ({"model_type": "vit", "_name_or_path": "facebook/dino-vitb8"}, ": Apache-2.0"),
        ({"model_type": "vit", "_name_or_path": "me/dinov3"}, "unknown"),
        ({"model_type": "dinov2"}, "Apache-2.0, if these are Meta's weights"),
        ({"model_type": "nanodino"}, "unknown"),
    ],
)
def test_the_licence_of_a_folder_is_what_its_config_says(config, words, run, tmp_path):
    folder = tmp_path / "dinov3_study" / "dino"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    assert words in licence(run, str(folder))


def test_the_licence_passes_from_run_to_run(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "teacher").mkdir(parents=True)
        (folder / "teacher/config.json").write_text('{"model_type": "dinov2"}')
    (second / "config.yaml").write_text(f"init: {first}\n")
    for init, words in (("hf:facebook/dinov3-x", "DINOv3 License"), ("null", "no other weights")):
        (first / "config.yaml").write_text(f"init: {init}\n")
        assert words in licence(run, str(second)), init
    (first / "config.yaml").write_text(f"init: {second}\n")
    assert "unknown" in licence(run, str(second))


@pytest.mark.parametrize("name", ["DINO", "DINOv3"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_onnxruntime_computes_our_tokens(name, dynamic, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    save_backbone(build(MODELS[name]), tmp_path / "own", PREPROCESSING)
    flags = ["--dynamic-batch"] if dynamic else []
    export.main(
        [
            "--model",
            str(tmp_path / "own"),
            "--format",
            "onnx",
            "--output",
            str(tmp_path),
            "--size",
            "24",
            "40",
            *flags,
        ]
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_error"] <= BOUND
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    images = image(24, 40)
    images = torch.cat([images, images.flip(-1)]) if dynamic else images[:1]
    found = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        features = load_backbone(tmp_path / "own")(images)
    assert names == (
        ["cls", "registers", "patches"] if features.registers.shape[1] else ["cls", "patches"]
    )
    for key, theirs in zip(names, found, strict=True):
        ours = getattr(features, key)
        assert (torch.from_numpy(theirs) - ours).abs().max() <= BOUND * ours.abs().max()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no/such/run", "--format", "hf"], "no/such/run"),
        (["--model", "random:vit_nano?untie_cls_norm=true", "--format", "timm"], "untie_cls_norm"),
        (["--model", "random:vit_nano", "--format", "onnx", "--opset", "9"], "--opset is 9"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_two(arguments, words, tmp_path):
    done = run_process("export.py", *arguments, "--output", str(tmp_path))
    assert (
        done.returncode == 2
        and words in done.stderr
        and "Traceback" not in done.stderr
        and not done.stdout
    )


@pytest.mark.parametrize("format", ["hf", "timm", "meta", "own"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O")])
def test_a_full_disk_leaves_no_half_export(format, error, tmp_path, monkeypatch):
    def full(path, tensors):
        path.write_bytes(b"half")
        raise error

    for module in (save, own):
        monkeypatch.setattr(module, "write_tensors", full)
    model = "random:vit_nano?depth=1&patch_size=8&layerscale=1"
    arguments = ["--model", model, "--format", format, "--output", str(tmp_path / "out")]
    with pytest.raises(RunFailed, match="is the disk full"):
        export.main(arguments)
    assert not list(tmp_path.rglob("*.*"))
    monkeypatch.undo()
    export.main(arguments)
    assert (tmp_path / "out" / "README.md").is_file()
    assert not list(tmp_path.glob("*.unfinished"))
