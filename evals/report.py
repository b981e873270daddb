"""report.html: one page on one run or several, without a server, a network or a further file.

It is made from whatever a run folder holds of config.yaml, metrics.jsonl, events.jsonl,
bad_images.txt and report_images/. All text is escaped.
"""

import base64
import json
import shlex
import time
from functools import reduce
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from engine.checkpoint import write_atomically
from engine.config import TrainConfig
from engine.distill_config import DistillTrainConfig
from engine.layers import lay_over, without_replaced
from engine.logger import read_metrics
from engine.settings import build, find_config, read_yaml, to_dict, write_out
from errors import UserError
from evals.report_curves import PLOT, curve_pictures, swatch
from evals.report_images import steps_in
from files import read_yaml_file

PAGE = Path(__file__).with_name("report_page.html")
MOST_EVENTS = 200
NONE = "–"
PICTURES = {
    "crops": "Crops of these images, as the student gets them",
    "masks": "Their global crops; what is hidden from the student is blue",
    "neighbours": "Each image, and the images whose CLS is most similar, nearest first",
}
MAPS = (
    "Below the images, of each step: three principal components of the patches as colours, which "
    "mean the same within a step only; attention of CLS in the last block, mean of its heads."
)


def write_report(path: Path, runs: dict[str, Path], since: float | None = None) -> None:
    """Writes the page, whole or not at all.

    Args:
        runs: name -> run folder; the curves of several lie over each other.
        since: time.perf_counter() from which the page counts its seconds; by default now.

    Raises:
        UserError: if a config.yaml is no YAML.
    """
    since = time.perf_counter() if since is None else since
    read = [ReportedRun(swatch(k), *run) for k, run in enumerate(runs.items())]
    pictures, curves = curve_pictures({run.name: run.records for run in read})
    parts = {
        "Warnings and events": "".join(map(events, read)),
        "Probes": probes(read),
        "Curves": pictures and f"<div class=curves>{pictures}</div>",
        "PCA and attention over time": "".join(map(over_time, read)),
        "Crops, masks and neighbours": as_trained(read[0]) if len(read) == 1 else "",
        "Configuration": configuration(read),
        "Environment, and how to run it again": "".join(map(environment, read)),
    }
    sections = [f"<h2>{title}</h2>{body}" for title, body in parts.items() if body]
    page = Template(PAGE.read_text()).substitute(
        title=escape(", ".join(runs)),
        body="\n".join([*map(summary, read), *sections]),
        plot=json.dumps(PLOT),
        curves=json.dumps(curves, separators=(",", ":")).replace("<", "\\u003c"),
        seconds=f"{time.perf_counter() - since:.1f}",
    )
    # ASCII, because names of files may be any bytes.
    write_atomically(path, page.encode("ascii", "xmlcharrefreplace").decode())


class ReportedRun:
    """What the folder of a run holds; `base` is the configuration that its own one changes."""

    def __init__(self, dot: str, name: str, folder: Path):
        self.name, self.folder, self.heading = name, folder, dot + escape(name)
        self.records, self.events = (
            read_metrics(folder / f"{log}.jsonl") for log in ("metrics", "events")
        )
        config = folder / "config.yaml"
        self.text = config.read_text(errors="replace") if config.is_file() else ""
        self.config = flat(read_yaml_file(config) or {}) if self.text else {}
        header = [line[2:] for line in self.text.splitlines() if line.startswith("# ")]
        self.header = dict(line.partition(" ")[::2] for line in header)
        self.distillation = folder.absolute().parent.name == "students"
        # The configuration to start again with.
        self.whole = folder.absolute().parents[1] / "config.yaml" if self.distillation else config
        self.base_name, base = self._base()
        self.base = flat(base)

    def _base(self) -> tuple[str, dict]:
        """Name and keys of: the distillation of a student, the run's `--config`, the defaults."""
        if self.distillation and self.whole.is_file():
            return "the distillation", read_yaml_file(self.whole) or {}
        distills = any(key.startswith("distill.") for key in self.config)
        schema = DistillTrainConfig if distills else TrainConfig
        words = self.header.get("command", "").replace("--config=", "--config ").split()
        if "--config" in words[:-1]:
            name = words[words.index("--config") + 1].strip("'\"")
            try:
                layers = [write_out(schema, keys) for keys in read_yaml(find_config(name), schema)]
                cfg = build(schema, reduce(lay_over, layers, {}))
                return name, without_replaced(to_dict(cfg))
            except (UserError, OSError):  # the file has moved or changed
                pass
        return "the defaults", without_replaced(to_dict(schema()))

    def warnings(self) -> list[str]:
        found = [
            f"step {event['step']}: {event.get('text')}"
            for event in self.events
            if event.get("kind") == "warning"
        ]
        if lost := [r["step"] for r in self.records if "loss" in r and r["loss"] is None]:
            found.append(f"no finite loss in {len(lost)} logged steps, first in step {lost[0]}")
        bad = self.folder / "bad_images.txt"
        lines = bad.read_text(errors="replace").splitlines() if bad.is_file() else []
        if lines:
            some = "; ".join(line.replace("\t", ": ") for line in lines[:10])
            found.append(f"{len(lines)} images could not be read (bad_images.txt): {some}")
        return found[-MOST_EVENTS:]


def flat(values: Any, path: str = "") -> dict[str, str]:
    """Dotted key -> value as text."""
    if not isinstance(values, dict) or not values:
        return {path: values if isinstance(values, str) else json.dumps(values)}
    parts = [flat(value, f"{path}.{key}".lstrip(".")) for key, value in values.items()]
    return {key: text for part in parts for key, text in part.items()}


# Parts of the page, as HTML; nothing where there is nothing to say.


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{cell}</th>" for cell in headings)
    body = "".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return f"<div class=wide><table>{body}</table></div>" if rows else ""


def image(path: Path, text: str, kind: str) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    media = "png" if path.suffix == ".png" else "jpeg"
    return f'<img class="{kind}" alt="{escape(text)}" src="data:image/{media};base64,{data}">'


def summary(run: ReportedRun) -> str:
    last, total = (run.records or [{}])[-1].get("step", 0), run.config.get("total_steps", "null")
    facts = [f"step {last}" + ("" if total == "null" else f" of {total}")]
    facts += [str(event.get("text")) for event in run.events[-1:] if event["step"] > 0]
    losses = [record["loss"] for record in run.records if record.get("loss") is not None]
    facts += [f"loss {loss:.4g}" for loss in losses[-1:]]
    return f"<h1>{run.heading}</h1><p>{escape(', '.join(facts))}</p>"


def events(run: ReportedRun) -> str:
    found = "".join(f"<p class=warning>{escape(text[:2000])}</p>" for text in run.warnings())
    rows = [
        [escape(str(event.get(key, ""))[:2000]) for key in ("step", "time", "text")]
        for event in run.events[-MOST_EVENTS:]
    ]
    words = f"{run.heading}: {len(run.warnings())} warnings, {len(run.events)} events"
    listed = table(["step", "time", "event"], rows)
    return f"{found}<details><summary>{words}</summary>{listed}</details>"


def probes(runs: list[ReportedRun]) -> str:
    rows = []
    for run in runs:
        measured = dict.fromkeys(key for record in run.records for key in record)
        for name in [key for key in measured if key.startswith("probe/")]:
            known = [record for record in run.records if record.get(name) is not None]
            if known and name != "probe/unreadable":
                best = max(known, key=lambda record, name=name: record[name])
                values = [f"{record[name]:.4g}" for record in (known[0], known[-1], best)]
                rows.append([run.heading, escape(name[6:]), *values, str(best["step"])])
    return table(["run", "probe", "first", "last", "best", "at step"], rows)


def over_time(run: ReportedRun) -> str:
    """One figure a step, over which the page's script puts a slider."""
    folder, figures = run.folder / "report_images", ""
    for step in steps_in(folder):
        names = {"pca": "PCA of patches", "attention": "attention of CLS"}
        maps = "".join(
            image(folder / f"{name}-{step:09d}.png", f"{words}, step {step}", "strip map")
            for name, words in names.items()
        )
        figures += f"<figure><figcaption>step {step}</figcaption>{maps}</figure>"
    shown = image(folder / "images.jpg", "images", "strip")
    maps = f"<p>{MAPS}</p>{shown}<div class=steps>{figures}</div>"
    return f"<h3>{run.heading}</h3>{maps}" if figures else ""


def as_trained(run: ReportedRun) -> str:
    folder = run.folder / "report_images"
    sheets = {words: image(folder / f"{name}.jpg", words, "") for name, words in PICTURES.items()}
    return "".join(f"<h3>{words}</h3>{sheet}" for words, sheet in sheets.items() if sheet)


def configuration(runs: list[ReportedRun]) -> str:
    """Keys that differ between runs, or from a run's base (marked); then the whole files."""
    shared = len({run.base_name for run in runs}) == 1  # then the base has a column of its own
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config.get(key, NONE) for run in runs]
        changed = [
            run.base.get(key, NONE) != value for run, value in zip(runs, values, strict=True)
        ]
        if any(changed) or len(set(values)) > 1:
            cells = [
                f"<mark>{escape(v)}</mark>" if new else escape(v)
                for v, new in zip(values, changed, strict=True)
            ]
            base = [escape(runs[0].base.get(key, NONE))] if shared else []
            rows.append([f"<code>{escape(key)}</code>", *base, *cells])
    bases = [f"base: {escape(run.base_name)}" for run in runs]
    names = [
        run.heading + ("" if shared else f", {base}") for run, base in zip(runs, bases, strict=True)
    ]
    files = [
        f"<details><summary>All of {run.heading}</summary><pre>{escape(run.text)}</pre></details>"
        for run in runs
    ]
    marks = "<p>Marked: other than in the base.</p>"
    return marks + table(["key", *bases[:shared], *names], rows) + "".join(files)


def environment(run: ReportedRun) -> str:
    rows = [[escape(name), escape(text)] for name, text in run.header.items() if name != "command"]
    commit = run.header.get("commit", "unknown")
    lines = [] if commit == "unknown" else [f"git checkout {commit.removesuffix('-dirty')}"]
    if commit.endswith("-dirty"):
        lines.append("# there were changes that were not committed")
    lines += [run.header[name] for name in ("command",) if name in run.header]
    distills = run.distillation or any(key.startswith("distill.") for key in run.config)
    saved = f"--config {shlex.quote(str(run.whole))} output_dir=runs/again"
    lines += [
        "# the same from the configuration that it left:",
        f"python {'distill' if distills else 'train'}.py {saved}",
    ]
    commands = escape("\n".join(lines))
    return f"<h3>{run.heading}</h3>{table(['what', 'value'], rows)}<pre>{commands}</pre>"
