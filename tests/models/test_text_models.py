"""Released dino.txt files, and what `TextModel` makes of images, patches and texts."""

import math

import pytest
import torch
import torch.nn.functional as F

import models.text
from errors import UserError
from evals.zero_shot import recall, softmax_map, top_accuracy, window_scores
from models import load_backbone
from models.alignment import build_alignment, load_text_model, save_alignment
from models.features import Features
from models.text import Tokenizer
from models.weights.files import write_tensors

WIDTH, TEXT, VOCABULARY, DEPTH = 64, 128, 300, 2
BACKBONE = "random:vit_nano?embed_dim=64&num_heads=1&depth=1&patch_size=8&image_size=32&registers=4"


def dinotxt_tensors() -> dict[str, torch.Tensor]:
    """The tensors of a small file, by the names of the modules in the authors' repository."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    def linear(name, out, into, bias=True):
        found = {f"{name}.weight": draw(out, into)}
        return found | ({f"{name}.bias": draw(out)} if bias else {})

    def norm(name, width):
        return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}

    tensors, hidden = {}, -(-int(WIDTH * 4 * 2 / 3) // 64) * 64
    for k in range(2):
        block = f"visual_model.head.blocks.{k}"
        tensors |= norm(f"{block}.norm1", WIDTH) | norm(f"{block}.norm2", WIDTH)
        tensors |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, bias=False)
        tensors |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        tensors |= {f"{block}.ls1.gamma": draw(WIDTH), f"{block}.ls2.gamma": draw(WIDTH)}
        for part in ("w1", "w2"):
            tensors |= linear(f"{block}.mlp.{part}", hidden, WIDTH)
        tensors |= linear(f"{block}.mlp.w3", WIDTH, hidden)
    tensors |= norm("visual_model.head.ln_final", WIDTH)
    text = "text_model.backbone"
    tensors |= {f"{text}.token_embedding.weight": draw(VOCABULARY, TEXT)}
    tensors |= {f"{text}.positional_embedding": draw(20, TEXT)} | norm(f"{text}.ln_final", TEXT)
    for k in range(DEPTH):
        block = f"{text}.blocks.{k}"
        tensors |= norm(f"{block}.attention_norm", TEXT) | norm(f"{block}.ffn_norm", TEXT)
        tensors |= linear(f"{block}.attention.qkv", 3 * TEXT, TEXT, bias=False)
        tensors |= linear(f"{block}.attention.proj", TEXT, TEXT)
        tensors |= linear(f"{block}.feed_forward.fc1", 4 * TEXT, TEXT)
        tensors |= linear(f"{block}.feed_forward.fc2", TEXT, 4 * TEXT)
    tensors |= linear("text_model.head.linear_projection", 2 * WIDTH, TEXT, bias=False)
    return tensors | {"logit_scale": torch.tensor([2.0])}


def attention(x, qkv, proj, bias, heads, causal):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (x @ qkv.T).chunk(3, -1))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ proj.T + bias


def naive_text(t, tokens):
    name = "text_model.backbone"
    x = t[f"{name}.token_embedding.weight"][tokens]
    x = x + t[f"{name}.positional_embedding"][: tokens.shape[1]]

    def norm(x, part):
        return F.layer_norm(x, x.shape[-1:], t[f"{part}.weight"], t[f"{part}.bias"])

    for k in range(DEPTH):
        b = f"{name}.blocks.{k}"
        parts = (f"{b}.attention.qkv.weight", f"{b}.attention.proj.weight")
        parts += (f"{b}.attention.proj.bias",)
        y = norm(x, f"{b}.attention_norm")
        x = x + attention(y, *(t[part] for part in parts), TEXT // 64, causal=True)
        y = norm(x, f"{b}.ffn_norm") @ t[f"{b}.feed_forward.fc1.weight"].T
        y = F.gelu(y + t[f"{b}.feed_forward.fc1.bias"])
        x = x + y @ t[f"{b}.feed_forward.fc2.weight"].T + t[f"{b}.feed_forward.fc2.bias"]
    x = norm(x, f"{name}.ln_final") @ t["text_model.head.linear_projection.weight"].T
    return x[torch.arange(len(x)), tokens.argmax(-1)]


def naive_head(t, tokens):
    def norm(x, part):
        return F.layer_norm(x, x.shape[-1:], t[f"{part}.weight"], t[f"{part}.bias"])

    def linear(x, part):
        return x @ t[f"{part}.weight"].T + t[f"{part}.bias"]

    for k in range(2):
        b = f"visual_model.head.blocks.{k}"
        parts = (f"{b}.attn.qkv.weight", f"{b}.attn.proj.weight", f"{b}.attn.proj.bias")
        attended = attention(norm(tokens, f"{b}.norm1"), *(t[p] for p in parts), 1, causal=False)
        tokens = tokens + t[f"{b}.ls1.gamma"] * attended
        x = norm(tokens, f"{b}.norm2")
        x = F.silu(linear(x, f"{b}.mlp.w1")) * linear(x, f"{b}.mlp.w2")
        tokens = tokens + t[f"{b}.ls2.gamma"] * linear(x, f"{b}.mlp.w3")
    tokens = norm(tokens, "visual_model.head.ln_final")
    return torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], dim=-1)


class SmallPairs:
    """In place of CLIP's tokenizer."""

    sot_token_id, eot_token_id = 298, 299

    def encode(self, text):
        return [ord(letter) for letter in text]


def test_a_released_file_computes_what_its_authors_modules_do(tmp_path, monkeypatch):
    monkeypatch.setattr(models.text, "_clip_tokenizer", SmallPairs)
    tensors = dinotxt_tensors()
    write_tensors(tmp_path / "dinotxt.pth", tensors)
    model = load_text_model(f"{tmp_path / 'dinotxt.pth'}?backbone={BACKBONE}")
    tokens = model.tokenizer(["a cat", "two black dogs"])
    found = model.alignment.text(tokens)
    torch.testing.assert_close(found, naive_text(tensors, tokens), rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = load_backbone(BACKBONE)(images)
    tokens = torch.cat([seen.cls[:, None], seen.registers, seen.patches], dim=1)
    wanted = F.normalize(naive_head(tensors, tokens), dim=-1)
    torch.testing.assert_close(model(images).cls, wanted, rtol=1e-4, atol=1e-5)


def test_other_files_and_backbones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models.text, "_clip_tokenizer", SmallPairs)
    write_tensors(tmp_path / "a.pth", {"x": torch.ones(2)})
    with pytest.raises(UserError, match="no text transformer under the names of dino.txt"):
        load_text_model(f"{tmp_path / 'a.pth'}?backbone={BACKBONE}")
    write_tensors(tmp_path / "b.pth", dinotxt_tensors() | {"visual_model.other": torch.ones(2)})
    with pytest.raises(UserError, match=r"visual_model.other is no tensor"):
        load_text_model(f"{tmp_path / 'b.pth'}?backbone={BACKBONE}")
    write_tensors(tmp_path / "c.pth", dinotxt_tensors())
    with pytest.raises(UserError, match="do not fit: .*a backbone of 128"):
        load_text_model(f"{tmp_path / 'c.pth'}?backbone=random:vit_nano?depth=1")


def small_model(**options):
    backbone = load_backbone(BACKBONE)
    sizes = {"head_blocks": 0, "drop_path": 0.0, "embed_dim": 8, "text": "tiny"} | options
    alignment = build_alignment(backbone, 4, tokenizer=Tokenizer(), **sizes)
    return backbone, alignment


@pytest.mark.parametrize("options", [{}, {"head_blocks": 2}, {"embed_dim": None}], ids=str)
def test_text_and_tokenizer_are_saved_with_the_model_and_loaded_back(options, tmp_path):
    backbone, alignment = small_model(**options)
    save_alignment(alignment, tmp_path, backbone, BACKBONE, backbone.preprocessing)
    model = load_text_model(tmp_path)
    assert model.tokenizer.name == "bytes" and model.tokenizer.context == 77
    for name, tensor in alignment.state_dict().items():
        assert torch.equal(model.alignment.state_dict()[name], tensor)
    assert all(
        torch.equal(tensor, load_backbone(tmp_path).state_dict()[name])
        for name, tensor in backbone.state_dict().items()
    )


def test_a_class_is_the_normalised_mean_over_names_and_templates(tmp_path):
    backbone, alignment = small_model()
    save_alignment(alignment, tmp_path, backbone, BACKBONE, backbone.preprocessing)
    model = load_text_model(tmp_path)
    found = model.encode_classes([["cat", "kitten"], ["dog"]], ["{}", "a {}"])
    texts = model.encode_texts(["cat", "kitten", "a cat", "a kitten"])
    assert torch.allclose(found.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(found[0], F.normalize(texts.mean(0), dim=-1))
    patches = model.encode_texts(["dog"], "patches")
    torch.testing.assert_close(patches, F.normalize(model.encode_texts(["dog"])[:, 4:], dim=-1))


def test_recall_of_a_matrix_made_by_hand():
    """Three images with two texts each; similarities are the entries of the matrix."""
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.8, 0.0, 0.0, 0.0],  # image 0 finds its text 0
            [0.5, 0.5, 0.1, 0.5, 0.0, 0.0],  # a tie goes to the lower index, which is not its own
            [0.0, 0.0, 0.0, 0.0, 0.2, 0.3],
        ]
    )
    found = recall(torch.eye(3), similarity.T, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert found["image_to_text"] == {"1": pytest.approx(2 / 3), "5": 1.0, "10": 1.0}
    # Texts 0, 3, 4, 5 find their image; 1 and 2 find another.
    assert found["text_to_image"] == {"1": pytest.approx(4 / 6), "5": 1.0, "10": 1.0}
    scores = top_accuracy(similarity[:, :4], torch.tensor([0, 2, 3]), torch.eye(4))
    assert scores["top1"] == pytest.approx(1 / 3) and scores["top5"] == 1.0


class Constant:
    """A model whose patches are all the same."""

    patch_size = 8

    def __call__(self, images):
        grid = images.shape[-2] // 8, images.shape[-1] // 8
        patches = F.normalize(torch.ones(1, grid[0] * grid[1], 4), dim=-1)
        return Features(patches[:, 0], patches[:, :0], patches, grid)


@pytest.mark.parametrize("side, stride", [(64, 32), (32, 16), (24, 24), (40, 7), (17, 5)])
def test_constant_features_give_constant_maps_for_any_window(side, stride):
    classes = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    scores = window_scores(Constant(), torch.zeros(3, 48, 80), classes, side, stride)
    wanted = softmax_map(Constant(), torch.zeros(3, 8, 8), classes)[:, :1, :1]
    torch.testing.assert_close(scores, wanted.expand(3, 48, 80))
    torch.testing.assert_close(scores.sum(0), torch.ones(48, 80))
