"""report.html: one file that shows a run or several, whatever their folders hold."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
import visualize
from engine.config import load_config
from engine.logger import keep_event, kept_notices, notice, read_metrics
from engine.settings import to_yaml
from evals.report import write_report
from evals.report_curves import thinned
from evals.report_images import forget_steps, steps_in

EMPTY = {"meta", "img", "input", "br"}
PROBES = ["probe.every=2", "probe.train=scenes?size=30", "probe.val=scenes?split=val&size=10"]


class Page(HTMLParser):
    """A page as a browser reads it: its tags must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.marked = [], [], {}, []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kind = self.open[-1] if self.open else ""
        self.text[kind] = self.text.get(kind, "") + data + "\n"

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[str]:
        return [image["alt"] for image in self.all("img")]

    def curves(self) -> list[dict]:
        return json.loads(re.search(r'id="curves">(.*)</script>', self.source)[1])

    def rows(self, title: str) -> list[list[str]]:
        """The cells of the table after a heading, without tags."""
        part = self.source.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
        rows = re.findall(r"<tr>(.*?)</tr>", part, flags=re.S)
        cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row, flags=re.S) for row in rows]
        return [[re.sub(r"<(?!/?mark>)[^>]+>", "", cell) for cell in row] for row in cells]


def page_of(*folders: Path, output: Path) -> Page:
    write_report(output, {folder.name: folder for folder in folders})
    return Page(output.read_text())


def made_up(folder: Path, records=10, config=None, header="commit abc123", **fields) -> Path:
    """A run folder as train.py leaves it, without a network."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, records + 1):
        values = {name: float(f"{rng.normal():.6g}") for name in ("loss", "grad_norm", "lr")}
        lines.append(json.dumps({"step": step, **values, "probe/knn": 0.3, **fields}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(load_config(*config), header))
    return folder


@pytest.fixture
def run(tiny, pictures) -> Path:
    train.main([*tiny, *PROBES])
    return Path(tiny[-1].removeprefix("output_dir="))


def test_a_run_leaves_one_file_that_needs_no_other(run):
    page = Page((run / "report.html").read_text())
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|fetch\(", page.source)
    assert (run / "report.html").stat().st_size < 5e6
    shown = " ".join(page.pictures())
    for words in ("PCA of patches, step 0", "PCA of patches, step 2", "attention of CLS, step 4"):
        assert words in shown
    assert all(words in shown for words in ("Crops of", "hidden", "most similar"))
    assert [row[1] for row in page.rows("Probes")] == ["probe", "knn"]
    assert [page.rows("Warnings and events")[-1][k] for k in (0, 2)] == ["4", "finished"]
    assert f"--config {run / 'config.yaml'} output_dir=" in page.source
    assert "hidden=" not in page.source  # without scripts, every step is visible


def test_the_maps_are_those_of_the_teacher_at_each_step(run):
    folder = run / "report_images"
    assert steps_in(folder) == [0, 2, 4]
    first, last = (np.asarray(Image.open(folder / f"pca-{step:09d}.png")) for step in (0, 4))
    assert first.shape == (4, 4 * 4 + 3, 3)  # 32 pixels in patches of 8, four images, gaps between
    assert np.abs(first.astype(int) - last).max() > 0
    photographs = Image.open(folder / "images.jpg")
    assert photographs.width == photographs.height / 4 * 19  # so the rows are aligned


def test_pictures_leave_the_numbers_of_the_run_as_they_are(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("evals.inloop.report_teacher", lambda *_, **__: None)
    train.main([*tiny, *PROBES, f"output_dir={tmp_path / 'plain'}"])
    timed = ("images_per_second", "data_wait_fraction", "memory_gib")
    logs = [
        [{key: r[key] for key in r if key not in timed} for r in read_metrics(f / "metrics.jsonl")]
        for f in (run, tmp_path / "plain")
    ]
    assert logs[0] == logs[1]


def test_a_resumed_run_shows_each_step_once(run, tiny):
    later = run / "report_images" / "pca-000000003.png"  # as a longer run left it before it was cut
    shutil.copy(run / "report_images" / "pca-000000004.png", later)
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "checkpoints" / "latest").write_text("2")
    later.rename(later.with_name("pca-000000009.png"))
    train.main([*tiny, *PROBES])
    page = Page((run / "report.html").read_text())
    steps = [text for text in page.pictures() if text.startswith("PCA")]
    assert steps == [f"PCA of patches, step {step}" for step in (0, 2, 4)]
    for curves in page.curves():
        (points,) = curves.values()
        assert len(set(points[0])) == len(points[0])
    events = [(row[0], row[2]) for row in page.rows("Warnings and events")[1:]]
    assert events == [("0", "begins"), ("2", "going on from step 2"), ("4", "finished")]


def test_keys_that_differ_from_the_base_are_marked(tmp_path):
    changed = ["batch_size=16", "optim.clip_grad=7"]
    header = "commit abc-dirty\ncommand python train.py --config quickstart.yaml batch_size=16"
    run = made_up(tmp_path / "run", config=("quickstart.yaml", changed), header=header)
    page = page_of(run, output=tmp_path / "report.html")
    rows = page.rows("Configuration")
    assert rows[0][1:] == ["base: quickstart.yaml", "run"]
    found = {row[0]: row[1:] for row in rows[1:]}
    assert found == {
        "batch_size": ["32", "<mark>16</mark>"],
        "optim.clip_grad": ["3.0", "<mark>7.0</mark>"],
    }
    commands = page.text["pre"]
    assert "git checkout abc\n" in commands and "--config quickstart.yaml" in commands
    # Where the file is gone, the defaults are the base.
    header = "commit abc\ncommand python train.py --config moved/away.yaml"
    run = made_up(tmp_path / "b" / "run", config=("quickstart.yaml", changed), header=header)
    rows = page_of(run, output=tmp_path / "b.html").rows("Configuration")
    assert rows[0][1] == "base: the defaults"
    assert ["batch_size", "64", "<mark>16</mark>"] in rows


def test_text_from_files_is_no_html(tmp_path):
    bad = "<script>alert(1)</script>"
    config = (None, [f"data.train=folder:/{bad}"])
    run = made_up(tmp_path / "<b>run</b>", config=config, **{f"loss/{bad}": 1.0})
    keep_event(run / "events.jsonl", 3, f"collapsing: {bad}", "warning")
    (run / "bad_images.txt").write_bytes(f"{bad}\xff.png\tno {bad}\n".encode("latin1"))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"# {bad}\n")
    page = page_of(run, output=tmp_path / "report.html")
    assert len(page.all("script")) == 2 and not page.all("b")
    assert page.text["p"].count(bad) >= 3  # the event, the image, its reason
    other = made_up(tmp_path / "x</script><b>", config=config)
    assert len(page_of(other, run, output=tmp_path / "two.html").all("script")) == 2


def test_long_runs_and_many_runs_stay_small(run, tmp_path):
    pictures = run / "report_images"
    fields = {f"health/{k}": 0.123456 * k for k in range(20)}
    runs = [
        made_up(tmp_path / f"run{k}", 3000, ("quickstart.yaml", []), **fields) for k in range(20)
    ]
    for one in runs:
        shutil.copytree(pictures, one / "report_images")
    page_of(*runs, output=tmp_path / "many.html")
    assert (tmp_path / "many.html").stat().st_size < 5e6
    page_of(made_up(tmp_path / "long", 30_000, **fields), output=tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < 1e6


def test_fewer_points_keep_every_spike():
    records = [{"step": step, "loss": 1.0} for step in range(10_000)]
    records[1234]["loss"], records[8000]["loss"], records[5000]["loss"] = 9.0, -9.0, None
    steps, values = thinned(records, "loss", 100)
    assert len(steps) <= 102 and steps[0] == 0 and steps[-1] == 9999 and steps == sorted(set(steps))
    assert values[steps.index(1234)] == 9.0 and values[steps.index(8000)] == -9.0


def test_maps_of_the_first_the_newest_and_steps_in_between_are_kept(tmp_path):
    for step in range(0, 1001, 10):
        for kind in ("pca", "attention"):
            Image.new("RGB", (3, 3)).save(tmp_path / f"{kind}-{step:09d}.png")
        forget_steps(tmp_path, step)
        kept = steps_in(tmp_path)
        assert kept[0] == 0 and kept[-1] == step and len(kept) <= 6
    assert len(list(tmp_path.iterdir())) == 12
    assert any(300 <= known <= 700 for known in kept)  # one of about the middle


def test_two_runs_are_compared(tmp_path, capsys):
    first = made_up(tmp_path / "first", config=("quickstart.yaml", ["batch_size=16"]))
    second = made_up(tmp_path / "second", 5, ("quickstart.yaml", []), **{"probe/miou": 0.25})
    output = tmp_path / "two.html"
    visualize.main(["report", "--runs", str(first), str(second), "--output", str(output)])
    result = json.loads(capsys.readouterr().out)
    assert result == {
        "task": "report",
        "runs": [str(first), str(second)],
        "output": str(output),
    }
    page = Page(output.read_text())
    rows = page.rows("Probes")
    assert [row[:2] for row in rows[1:]] == [
        ["first", "knn"],
        ["second", "knn"],
        ["second", "miou"],
    ]
    loss = page.curves()[0]
    assert len(loss["first"][0]) == 10 and len(loss["second"][0]) == 5
    svg = page.source.split("<svg")[1].split("</svg>")[0]
    assert svg.count("<polyline") == 2
    keys = {row[0]: row[2:] for row in page.rows("Configuration")}
    assert keys["batch_size"] == ["<mark>16</mark>", "<mark>32</mark>"]  # 64 by default


def test_a_run_cut_in_the_middle_has_a_page(run, tmp_path):
    log = run / "metrics.jsonl"
    log.write_text(log.read_text()[:-40])
    with (run / "events.jsonl").open("a") as file:
        file.write('{"step": 4, "te')
    (run / "report_images" / "neighbours.jpg").unlink()
    (run / "report_images" / "attention-000000002.png").unlink()
    page = page_of(run, output=tmp_path / "cut.html")
    assert "step 3 of 4" in page.text["p"] and "PCA of patches, step 2" in page.pictures()
    bare = made_up(tmp_path / "bare", 1)
    page = page_of(bare, output=tmp_path / "bare.html")
    assert not page.pictures() and "probe: knn" in page.source
    (bare / "metrics.jsonl").write_text("")
    page_of(bare, output=tmp_path / "bare.html")


def test_warnings_of_a_step_are_on_the_page(tmp_path):
    run = made_up(tmp_path / "run", loss=None)
    notice("of another run")
    with kept_notices(run / "events.jsonl", 7):
        notice("collapsing: the targets are uniform")
    with pytest.raises(ValueError), kept_notices(run / "events.jsonl", 8):
        raise ValueError("not finite for 50 steps")
    words = page_of(run, output=tmp_path / "report.html").text["p"]
    assert "step 7: collapsing: the targets are uniform" in words
    assert "step 8: ended: not finite for 50 steps" in words
    assert "no finite loss in 10 logged steps, first in step 1" in words and "another" not in words


@pytest.mark.parametrize(
    "arguments, message", [("no/such/run x.html", "no/such/run"), (". x.png", "x.png.*html")]
)
def test_mistakes_are_one_sentence(arguments, message):
    runs, output = arguments.split()
    with pytest.raises((ValueError, OSError), match=message):
        visualize.main(["report", "--runs", runs, "--output", output])


BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")
ACTIONS = """<script>
const slider = document.querySelector("input"), svg = document.querySelector(".curve");
slider.value = 0; slider.oninput();
const box = svg.getBoundingClientRect(), x = box.left + box.width * (48 + 240 / 2) / 300;
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 20}));
const seen = [...document.querySelectorAll(".steps figure")].map((f) => f.hidden ? 0 : 1).join("");
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.title = [document.getElementById("tip").textContent, seen, wide].join("|");
</script>"""


@pytest.mark.slow
def test_a_browser_shows_values_on_hover_and_one_step_at_a_time(run, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on this machine, of {', '.join(BROWSERS)}")
    page = tmp_path / "page.html"
    page.write_text((run / "report.html").read_text() + ACTIONS)
    for size in ("500,800", "1200,900"):  # Chromium's narrowest window, and a wide one
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
        picture = tmp_path / "page.png"
        call = [browser, *options, f"--screenshot={picture}", "--dump-dom", page.as_uri()]
        done = subprocess.run(call, capture_output=True, text=True, timeout=120)
        tip, seen, wide = re.search(r"<title>(.*?)</title>", done.stdout, flags=re.S)[1].split("|")
        loss = {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r}
        assert tip == f"step 2: {loss[2]:.5g}" and seen == "100" and int(wide) <= 0
        assert np.asarray(Image.open(picture).convert("L")).std() > 5
