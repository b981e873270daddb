"""Released weights and photographs, where ../shared has them: parity, export, half precision."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import export
from data.pictures import read_image
from data.pixels import normalize, resize, to_unit
from errors import UserError
from models import load_backbone
from models.weights.save import FORMATS
from tests.dialects import hf_tokens, tokens

SHARED = Path(__file__).parents[4] / "shared"
WEIGHTS, PHOTOGRAPHS = SHARED / "weights" / "dinov2-small", SHARED / "images"
BOUND = 1e-4  # of the largest number in the reference
pytestmark = pytest.mark.skipif(
    not (WEIGHTS.is_dir() and PHOTOGRAPHS.is_dir()),
    reason="needs released weights and photographs in ../shared",
)


@pytest.fixture(scope="module")
def ours():
    return load_backbone(WEIGHTS)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


def photograph(name: str, height: int, width: int, backbone) -> torch.Tensor:
    """(1, 3, height, width), normalised as the weights say."""
    pixels = to_unit(resize(read_image(PHOTOGRAPHS / name, 3), (height, width)))
    return normalize(pixels, backbone.preprocessing.mean, backbone.preprocessing.std)[None]


@torch.no_grad()
def assert_parity(backbone, theirs, images, seen_by_theirs):
    """CLS and patches of every block, each after the final norm."""
    output = theirs(seen_by_theirs, output_hidden_states=True)
    references = [theirs.layernorm(hidden) for hidden in output.hidden_states[1:]]
    assert torch.equal(references[-1], output.last_hidden_state)
    assert len(references) == backbone.depth
    blocks = backbone.intermediate(images, range(backbone.depth))
    pairs = zip([*blocks, backbone(images)], [*references, references[-1]], strict=True)
    for features, reference in pairs:
        for found, wanted in (
            (features.cls, reference[:, 0]),
            (features.patches, reference[:, 1:]),
        ):
            assert found.shape == wanted.shape
            assert (found - wanted).abs().max() <= BOUND * wanted.abs().max()


@pytest.mark.parametrize(
    "name, size",
    [("chelsea.png", (224, 224)), ("rocket.jpg", (518, 518)), ("coffee.png", (196, 280))]
    + [("camera.png", (230, 301))],
)
def test_every_block_computes_what_transformers_computes_on_photographs(name, size, ours, theirs):
    images = photograph(name, *size, ours)
    assert_parity(ours, theirs, images, images)


def test_sides_that_are_no_multiple_are_padded_where_asked(theirs):
    backbone = load_backbone(f"{WEIGHTS}?fit=pad")
    images = photograph("astronaut.png", 230, 301, backbone)
    padded = F.pad(images, (0, 308 - 301, 0, 238 - 230))
    assert_parity(backbone, theirs, images, padded)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_bits_back(format, ours, tmp_path):
    export.main(["--model", str(WEIGHTS), "--format", format, "--output", str(tmp_path / "out")])
    again = load_backbone(tmp_path / "out")
    state = again.state_dict()
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(state[name], tensor), name
    # Meta's and timm's code resize positions in another way than transformers, as the card says.
    again = load_backbone(f"{tmp_path / 'out'}?interpolation=size")
    images = photograph("chelsea.png", 112, 154, ours)
    with torch.no_grad():
        assert torch.equal(tokens(again(images)), tokens(ours(images)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_and_read_as_float32(dtype, format, ours, tmp_path, capsys):
    folder = tmp_path / "half"
    call = ["--model", str(WEIGHTS), "--format", format, "--dtype", dtype]
    export.main([*call, "--output", str(folder)])
    capsys.readouterr()
    again = load_backbone(folder)
    assert f"stored in {dtype}, loaded as float32" in capsys.readouterr().err
    for name, tensor in ours.state_dict().items():
        read = again.state_dict()[name]
        assert read.dtype == torch.float32
        assert torch.equal(read, tensor.to(getattr(torch, dtype)).float()), name
    stored = sum(file.stat().st_size for file in folder.glob("*.*"))
    assert stored < 2.1 * sum(parameter.numel() for parameter in ours.parameters())


def test_transformers_reads_half_precision_of_ours_in_its_type(ours, tmp_path):
    transformers = pytest.importorskip("transformers")
    call = ["--model", str(WEIGHTS), "--format", "hf", "--dtype", "float16"]
    export.main([*call, "--output", str(tmp_path / "half")])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    model = transformers.AutoModel.from_pretrained(tmp_path / "half", dtype="auto").eval()
    assert model.dtype == torch.float16
    images = photograph("chelsea.png", 224, 224, ours)
    with torch.no_grad():
        reference = tokens(ours(images))
    assert (hf_tokens(model.float(), images) - reference).abs().max() <= BOUND * reference.max()


def test_numbers_beyond_half_precision_and_onnx_are_refused(tmp_path, ours):
    large = load_backbone(WEIGHTS)
    large.blocks[3].mlp.fc1.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match="blocks.3.mlp.fc1.weight.*bfloat16"):
        export.store_as(large, torch.float16)
    call = ["--model", str(WEIGHTS), "--format", "onnx", "--dtype", "float16"]
    with pytest.raises(UserError, match="onnx"):
        export.main([*call, "--output", str(tmp_path / "onnx")])
