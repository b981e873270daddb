"""report.html: one page on one run or several, without a server, a network or a further file.

It is made from what a run folder holds (config.yaml, metrics.jsonl, events.jsonl, report_images/,
bad_images.txt), whatever of that is there. All text from files is escaped.
"""

import base64
import json
import shlex
import time
from dataclasses import dataclass
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
from evals.report_curves import BOTTOM, LEFT, RIGHT, TOP, WIDTH, curve_section, swatch
from evals.report_images import steps_in
from files import read_yaml_file

PAGE = Path(__file__).with_name("report_page.html")
MOST_ROWS = 30  # of a table of probes
MOST_EVENTS = 200
NONE = "–"


def write_report(path: Path, runs: dict[str, Path], since: float | None = None) -> None:
    """Writes the page, whole or not at all.

    Args:
        runs: name -> run folder; curves of several lie over each other.
        since: of time.perf_counter(), from which the page's seconds count; by default now.

    Raises:
        UserError: if a config.yaml is no YAML.
    """
    since = time.perf_counter() if since is None else since
    read = [ReportedRun(k, name, folder) for k, (name, folder) in enumerate(runs.items())]
    curves, data = curve_section({run.name: run.records for run in read})
    parts = {
        "": "".join(map(summary, read)),
        "Warnings and events": "".join(map(events, read)),
        "Probes": probes(read),
        "Curves": curves,
        "PCA and attention over time": "".join(map(over_time, read)),
        "Crops, masks, neighbours": as_trained(read[0]) if len(read) == 1 else "",
        "Configuration": configuration(read),
        "Environment, and how to run it again": "".join(map(environment, read)),
    }
    sections = [
        f"<section>{title and f'<h2>{title}</h2>'}{body}</section>"
        for title, body in parts.items()
        if body
    ]
    page = Template(PAGE.read_text()).substitute(
        title=escape(", ".join(runs)),
        body="\n".join(sections),
        edges=", ".join(map(str, (LEFT, RIGHT, TOP, BOTTOM, WIDTH))),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        seconds=f"{time.perf_counter() - since:.1f}",
    )
    # ASCII, because names of files may be any bytes.
    write_atomically(path, page.encode("ascii", "xmlcharrefreplace").decode())


@dataclass
class ReportedRun:
    """What the folder of a run holds."""

    number: int  # among the runs of the page
    name: str
    folder: Path

    def __post_init__(self):
        self.records = read_metrics(self.folder / "metrics.jsonl")
        self.events = read_metrics(self.folder / "events.jsonl")
        config = self.folder / "config.yaml"
        self.text = config.read_text(errors="replace") if config.is_file() else ""
        self.config = flat(read_yaml_file(config) or {}) if self.text else {}
        header = [line[2:] for line in self.text.splitlines() if line.startswith("# ")]
        self.header = dict(line.partition(" ")[::2] for line in header)
        self.base_name, self.base = self._base()

    def _base(self) -> tuple[str, dict[str, str]]:
        """The configuration that this one changes: its file, its distillation, or the defaults."""
        whole = self.folder.parent.parent / "config.yaml"
        if self.folder.parent.name == "students" and whole.is_file():
            return "the distillation", flat(read_yaml_file(whole) or {})
        distilled = any(key.startswith("distill.") for key in self.config)
        schema = DistillTrainConfig if distilled else TrainConfig
        if name := config_of(self.header.get("command", "")):
            try:
                layers = [
                    write_out(schema, layer) for layer in read_yaml(find_config(name), schema)
                ]
                cfg = build(schema, reduce(lay_over, layers, {}))
                return name, flat(without_replaced(to_dict(cfg)))
            except (UserError, OSError):  # it has moved, or is no longer valid
                pass
        return "the defaults", flat(without_replaced(to_dict(schema())))

    def swatch(self) -> str:
        return swatch(self.number)

    @property
    def warnings(self) -> list[str]:
        found = [
            f"step {event['step']}: {event.get('text')}"
            for event in self.events
            if event.get("kind") == "warning"
        ]
        if lost := [r["step"] for r in self.records if "loss" in r and r["loss"] is None]:
            words = f"the loss was not finite in {len(lost)} logged steps, first in step {lost[0]}"
            found.append(words)
        bad = self.folder / "bad_images.txt"
        if bad.is_file():
            names = bad.read_text(errors="replace").splitlines()
            named = "; ".join(name.replace("\t", ": ") for name in names[:10])
            found.append(f"{len(names)} images could not be read (bad_images.txt): {named}")
        return found[-MOST_EVENTS:]


def config_of(command: str) -> str | None:
    """NAME of `--config NAME` in a command."""
    try:
        words = shlex.split(command.replace("--config=", "--config "))
    except ValueError:  # cut within quotes
        return None
    return words[words.index("--config") + 1] if "--config" in words[:-1] else None


def flat(values: Any, path: str = "") -> dict[str, str]:
    """Dotted key -> value as text."""
    if isinstance(values, dict) and values:
        parts = [
            flat(value, f"{path}.{key}" if path else str(key)) for key, value in values.items()
        ]
        return {key: value for part in parts for key, value in part.items()}
    return {path: values if isinstance(values, str) else json.dumps(values)} if path else {}


# Sections: each returns HTML, or nothing where there is nothing to say.


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>" if rows else ""


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else NONE


def image(path: Path, text: str, kind: str = "") -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    media = "png" if path.suffix == ".png" else "jpeg"
    source = f"data:image/{media};base64,{data}"
    return f'<img class="{kind}" alt="{escape(text)}" src="{source}">'


def summary(run: ReportedRun) -> str:
    last = run.records[-1] if run.records else {}
    total = run.config.get("total_steps", "null")
    done = f"step {last.get('step', 0)}" + ("" if total == "null" else f" of {total}")
    ending = run.events[-1].get("text", "") if run.events else ""
    losses = [record["loss"] for record in run.records if record.get("loss") is not None]
    facts = [done, *([ending] if ending.startswith(("finished", "stopped", "ended")) else [])]
    facts += [f"loss {number(losses[-1])}"] if losses else []
    name = escape(run.name)
    return f"<h1>{run.swatch()}{name}</h1><p>{escape(', '.join(facts))}</p>"


def events(run: ReportedRun) -> str:
    found = [f"<p class=warning>{escape(text[:2000])}</p>" for text in run.warnings]
    rows = [
        [escape(str(event.get(key, ""))[:2000]) for key in ("step", "time", "text")]
        for event in run.events[-MOST_EVENTS:]
    ]
    words = f"{escape(run.name)}: {len(run.warnings)} warnings, {len(run.events)} events"
    body = table(["step", "time", "event"], rows)
    listed = f"<details><summary>{words}</summary>{body}</details>" if rows else ""
    return "".join(found) + listed


def probes(runs: list[ReportedRun]) -> str:
    """First, last and best value of each probe of each run; of a single run, all of them."""
    rows, everything = [], ""
    for run in runs:
        measured = [record for record in run.records if any(map(is_probe, record))]
        names = list(dict.fromkeys(key for record in measured for key in record if is_probe(key)))
        for name in names:
            known = [record for record in measured if record.get(name) is not None]
            if not known:
                continue
            best = max(known, key=lambda record, name=name: record[name])
            values = [number(record[name]) for record in (known[0], known[-1], best)]
            cells = [run.swatch() + escape(run.name), escape(name.partition("/")[2]), *values]
            rows.append([*cells, str(best["step"])])
        shown = measured[:: -(-len(measured) // MOST_ROWS) or 1]
        each = [[str(r["step"]), *(number(r.get(name)) for name in names)] for r in shown]
        titles = ["step", *(escape(name.partition("/")[2]) for name in names)]
        everything = f"<details><summary>Over time</summary>{table(titles, each)}</details>"
    headings = ["run", "probe", "first", "last", "best", "at step"]
    return rows and table(headings, rows) + (everything if len(runs) == 1 else "")


def is_probe(name: str) -> bool:
    return name.startswith("probe/") and name != "probe/unreadable"


def over_time(run: ReportedRun) -> str:
    """One figure a step; the page's script puts a slider over them."""
    folder, figures = run.folder / "report_images", []
    for step in steps_in(folder):
        maps = [
            image(folder / f"{kind}-{step:09d}.png", f"{words} at step {step}", "strip map")
            for kind, words in (("pca", "PCA of patches"), ("attention", "attention of CLS"))
        ]
        caption = f"<figcaption>step {step}</figcaption>"
        figures.append(f"<figure>{caption}{''.join(maps)}</figure>")
    if not figures:
        return ""
    words = (
        "The images; three principal components of their patches as colours, which each step has "
        "of its own; attention of CLS in the last block, mean of its heads."
    )
    shown = image(folder / "images.jpg", "the images", "strip")
    figures = f"<div class=steps>{''.join(figures)}</div>"
    return f"<h3>{escape(run.name)}</h3><p class=note>{words}</p>{shown}{figures}"


def as_trained(run: ReportedRun) -> str:
    titles = {
        "crops": "Crops of the same images, as the student sees them",
        "masks": "Global crops: what is hidden from the student is blue",
        "neighbours": "Each image, and the images whose CLS is most similar, nearest first",
    }
    found = [
        (title, image(run.folder / "report_images" / f"{name}.jpg", title, "sheet"))
        for name, title in titles.items()
    ]
    return "".join(f"<h3>{title}</h3>{picture}" for title, picture in found if picture)


def configuration(runs: list[ReportedRun]) -> str:
    """Keys that differ from a run's base (marked) or between runs, then the whole files."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    one_base = len({run.base_name for run in runs}) == 1
    rows = []
    for key in keys:
        values = [run.config.get(key, NONE) for run in runs]
        changed = [
            value != run.base.get(key, NONE) for value, run in zip(values, runs, strict=True)
        ]
        if not any(changed) and len(set(values)) == 1:
            continue
        cells = [
            f"<mark>{escape(value)}</mark>" if new else escape(value)
            for value, new in zip(values, changed, strict=True)
        ]
        base = [escape(runs[0].base.get(key, NONE))] if one_base else []
        rows.append([f"<code>{escape(key)}</code>", *base, *cells])
    bases = [escape(runs[0].base_name)] if one_base else []
    names = [
        escape(run.name if one_base else f"{run.name} (base: {run.base_name})") for run in runs
    ]
    files = "".join(
        f"<details><summary>All of {escape(run.name)}</summary><pre>{escape(run.text)}</pre>"
        "</details>"
        for run in runs
        if run.text
    )
    marked = "<p class=note>Marked: differs from its base.</p>" if rows else ""
    return marked + table(["key", *bases, *names], rows) + files


def environment(run: ReportedRun) -> str:
    rows = [
        [escape(name), escape(f"python {value}" if name == "python" else value)]
        for name, value in run.header.items()
        if name != "command"
    ]
    distilled = run.folder.parent.name == "students"
    saved = (run.folder.parent.parent if distilled else run.folder) / "config.yaml"
    commit = run.header.get("commit", "unknown")
    again = []
    if commit != "unknown":
        changes = "  # and the changes that were not committed" if commit.endswith("-dirty") else ""
        again.append(f"git checkout {commit.removesuffix('-dirty')}{changes}")
    if "command" in run.header:
        again.append(f"{run.header['command']}  # as it was started")
    if run.config:
        script = "distill.py" if distilled else "train.py"
        command = f"python {script} --config {shlex.quote(str(saved))} output_dir=runs/again"
        again.append(f"{command}  # from what it left")
    lines = escape("\n".join(again))
    return f"<h3>{escape(run.name)}</h3>{table(['what', 'value'], rows)}<pre>{lines}</pre>"
