"""align.py and eval_text.py: learning, resuming, ranks, a frozen backbone, what users are told."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import align
import eval_text
import export
import extract
import visualize
from data.scenes.scenes import Scenes
from engine.align_config import AlignTrainConfig
from engine.config import load_config
from errors import UserError
from models import load_backbone
from models.alignment import load_text_model
from models.text import TEXT_SIZES, TextTransformer, Tokenizer
from tests.processes import run_process

BACKBONE = "random:vit_nano?patch_size=8&image_size=32&depth=1&registers=2"
CALL = [
    *("device=cpu", "precision=fp32", "total_steps=4", "batch_size=8", "log_every=1"),
    *(f"align.backbone={BACKBONE}", "data.train=scenes?size=24", "align.embed_dim=16"),
    *("checkpoint.every=2", "seed=3"),
]
PROBE = ["probe.every=4", "probe.train=scenes?size=20", "probe.val=scenes?split=val&size=20"]
BLOCKS = ["align.head_blocks=1", "crops.global_size=32"]


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    monkeypatch.setitem(TEXT_SIZES, "tiny", dict(width=16, depth=1, num_heads=2))


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("evals.alignment.draw_queries", lambda *_, **__: None)
    monkeypatch.setattr("evals.alignment.draw_curves", lambda *_, **__: None)


def weights(run) -> dict:
    return load_text_model(run).state_dict()


def losses(run) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


@pytest.mark.parametrize("extra", [[], BLOCKS, ["align.loss=sigmoid"]], ids=str)
def test_a_resumed_run_is_that_of_one_piece_and_the_backbone_never_changes(
    extra, tmp_path, undrawn
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    align.main([*CALL, *extra, f"output_dir={whole}"])
    align.main([*CALL, *extra, f"output_dir={parts}", "total_steps=2", "schedule.lr=7e-4"])
    align.main([*CALL, *extra, f"output_dir={tmp_path / 'x'}", "schedule.lr=7e-4"])
    align.main([*CALL, *extra, f"output_dir={parts}", "schedule.lr=7e-4"])
    first, second = weights(tmp_path / "x"), weights(parts)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    before = load_backbone(BACKBONE).state_dict()
    after = load_text_model(whole).backbone.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert losses(whole)[0] != losses(whole)[-1]


@pytest.mark.parametrize("extra", [[], BLOCKS], ids=str)
def test_two_ranks_train_as_one(extra, tmp_path, undrawn):
    same = ["align.drop_path=0", "total_steps=2"]  # what is dropped is drawn on each rank
    runs = []
    for ranks in (1, 2):
        runs.append(tmp_path / str(ranks))
        call = [*CALL, *PROBE, "batch_size=4", *extra, *same, f"output_dir={runs[-1]}"]
        done = run_process("align.py", *call, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)


def test_features_of_extract_train_as_those_computed_on_the_way(tmp_path, undrawn):
    options = ["--model", BACKBONE, "--data", "scenes?size=24", "--features", "cls", "mean"]
    extract.main([*options, "--output", str(tmp_path / "features"), "--device", "cpu"])
    align.main([*CALL, f"output_dir={tmp_path / 'a'}"])
    read = f"align.features={tmp_path / 'features'}"
    align.main([*CALL, f"output_dir={tmp_path / 'b'}", read])
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    with pytest.raises(UserError, match="has no features of"):
        other = "data.train=scenes?split=val&size=24"
        align.main([*CALL, f"output_dir={tmp_path / 'c'}", read, other])


@pytest.mark.parametrize(
    "given, words",
    [
        (["align.backbone=null"], "give align.backbone a MODEL"),
        (["model.patch_size=8"], "does not read model.patch_size"),
        (["loss.koleo.weight=1"], "does not read loss.koleo.weight"),
        (["crops.local_count=3"], "does not read crops.local_count"),
        (["init=runs/x"], "does not read init"),
        (["align.embed_dim=15"], "must be even"),
        (["align.context=2"], "at least 3"),
        (["data.train=fashion_mnist:/nowhere"], "/nowhere"),
        (["align.tokenizer=words"], "bytes, clip"),
    ],
)
def test_a_mistake_is_one_sentence(given, words, tmp_path):
    with pytest.raises((UserError, FileNotFoundError), match=words):
        align.main([*CALL, f"output_dir={tmp_path}", *given])


def picture(path, value: int = 0):
    Image.fromarray(np.full((32, 40, 3), value, np.uint8)).save(path)


def test_bad_captions_and_missing_files_are_counted_in_a_sentence(tmp_path, capsys, undrawn):
    for number in range(4):
        picture(tmp_path / f"{number}.png", 60 * number)
    rows = [b"file,caption", b"0.png,a dark one", b"0.png,black", b"1.png,", b"2.png,\xff\xfe"]
    rows += [b"3.png," + 100 * b"long ", b"4.png,gone"]
    (tmp_path / "x.csv").write_bytes(b"\n".join(rows))
    data = f"data.train=list:{tmp_path / 'x.csv'}"
    align.main([*CALL, data, "batch_size=2", f"output_dir={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert "captions passed over: 1 empty, 1 not UTF-8" in said
    assert "2 of 5 images have no caption; left out" in said
    assert "1 of 4 captions looked at are longer than the 77 tokens" in said
    assert "left out:" in said and "4.png" in (tmp_path / "run/bad_images.txt").read_text()
    (tmp_path / "none.csv").write_text("file,label\n0.png,x\n")
    with pytest.raises(UserError, match="has no captions; they come from a .csv"):
        align.main([*CALL, f"data.train=list:{tmp_path / 'none.csv'}", f"output_dir={tmp_path}/n"])


def test_captions_stand_beside_the_images_of_a_tar(tmp_path, capsys, undrawn):
    from data.sources.specs import open_data

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, text in enumerate(["a  red\nball", "", b"\xff"]):
            picture(tmp_path / f"{number}.png", 60 * number)
            content = text if isinstance(text, bytes) else text.encode()
            (tmp_path / f"{number}.txt").write_bytes(content)
            for name in (f"{number}.png", f"{number}.txt"):
                tar.add(tmp_path / name, name)
    data = open_data(f"tar:{tmp_path / 'x.tar'}")
    assert [data.captions(index) for index in range(3)] == [["a red ball"], [], []]
    assert data.captioned.tolist() == [True, False, False]
    said = " ".join(data.passed_over)
    assert "1 members are captions that are empty" in said and "not UTF-8" in said


def test_every_evaluation_and_picture_of_texts_runs(tmp_path, capsys, undrawn):
    run = tmp_path / "run"
    align.main([*CALL, *PROBE, f"output_dir={run}"])
    data = ["--model", str(run), "--data", "scenes?split=val&size=20", "--device", "cpu"]
    capsys.readouterr()
    eval_text.main(["classify", *data])
    found = json.loads(capsys.readouterr().out)
    in_loop = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["probe/zero_shot"]
    assert found["chance"] == 0.1 and 0 <= found["top1"] <= found["top5"] <= 1 and in_loop >= 0
    eval_text.main(["retrieve", *data])
    assert json.loads(capsys.readouterr().out)["n_texts"] == 80
    (tmp_path / "t.txt").write_text("one {}\ntwo {}s\n")
    rest = ["--window", "24", "--templates", str(tmp_path / "t.txt")]
    eval_text.main(["segment", *data, *rest])
    assert 0 <= json.loads(capsys.readouterr().out)["miou"] <= 1
    export.main(["--model", str(run), "--format", "own", "--output", str(tmp_path / "own")])
    eval_text.main(["classify", "--model", str(tmp_path / "own"), *data[2:]])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["top1"] == found["top1"]
    images = ["--images", "scenes?size=2", "--query", "a disc", "a star"]
    picture = ["--output", str(tmp_path / "q.png"), "--device", "cpu"]
    visualize.main(["text", "--model", str(run), *images, *picture])
    assert (tmp_path / "q.png").is_file()
    with pytest.raises(UserError, match="without texts"):
        eval_text.main(["classify", "--model", BACKBONE, *data[2:]])
    (tmp_path / "t.txt").write_text("no place\n")
    with pytest.raises(UserError, match="has no {}"):
        eval_text.main(["classify", *data, *rest[2:]])


def test_scenes_say_their_objects_and_keep_their_pixels():
    scenes = Scenes(size=4)
    before = [scenes.image(index) for index in range(4)]
    for index in range(4):
        name = scenes.classes[scenes.labels[index]]
        captions = scenes.captions(index)
        assert captions[0] == f"a {name}" and all(name in caption for caption in captions)
        objects = len(scenes.annotations(index)["box_labels"])
        assert captions[3].count(" and a ") == objects - 1
        assert torch.equal(scenes.image(index), before[index])


def test_padding_and_later_tokens_do_not_change_a_text():
    tokenizer = Tokenizer("bytes", 12)
    torch.manual_seed(0)
    model = TextTransformer(
        vocabulary=tokenizer.vocabulary, context=12, width=32, depth=2, num_heads=4, embed_dim=8
    )
    alone, together = model(tokenizer(["a cat"])), model(tokenizer(["a cat", "longer text"]))
    torch.testing.assert_close(alone[0], together[0])
    tokens = tokenizer(["a cat"])
    changed = tokens.clone()
    changed[0, -1] = 7  # behind the end, once the end is moved
    tokens[0, 3] = changed[0, 3] = tokenizer.end
    torch.testing.assert_close(model(tokens), model(changed))


def test_long_texts_are_cut_and_keep_their_end():
    tokenizer = Tokenizer("bytes", 8)
    tokens = tokenizer(["0123456789", "é"])
    assert tokens.shape == (2, 8) and tokens[0].tolist()[-1] == tokenizer.end
    assert tokens[1].tolist() == [256, 0xC3, 0xA9, 257, 0, 0, 0, 0]
    assert tokenizer.is_cut("0123456") and not tokenizer.is_cut("012345")


def test_the_text_transformer_of_the_paper_has_its_size():
    sizes = dict(width=1280, depth=24, num_heads=20)
    with torch.device("meta"):
        model = TextTransformer(vocabulary=49408, context=77, embed_dim=2048, **sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == 538_131_200


def test_the_page_has_the_keys_that_the_program_prints(capsys):
    with pytest.raises(SystemExit):
        align.main(["--keys", "align", "--markdown"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (Path(__file__).parents[1] / "docs/text.md").read_text()
    assert "\n".join(rows) in page


def test_the_defaults_are_those_of_dino_txt():
    cfg = load_config(None, [], AlignTrainConfig)
    assert (cfg.schedule.lr.peak, cfg.optim.betas, cfg.optim.clip_grad) == (7e-4, [0.9, 0.99], None)
    assert cfg.schedule.ema_momentum.peak == 0 and cfg.crops.policy == "crops_only"
