"""Tables of what gpu.py measured, as docs/performance.md has them."""

import json
import os


def markdown(report: dict) -> str:
    """The tables of docs/performance.md, then everything else that was measured."""
    parts = report["parts"]
    sections = [
        "## On one GPU",
        table("| | GPU | images/s | MFU | data wait | memory, GiB |", page_rows(parts)),
        "## Compilation and augmentation",
        table(
            "| | batch | compile | augmentation | images/s | ms a step | without data wait "
            "| teacher | forward | loss | backward | optimizer | EMA | MFU | data wait "
            "| memory, GiB |",
            bench_rows(parts),
        ),
        "## Beside the authors' step",
        table(
            "| | GPU | images | ours, ms | theirs, ms | ratio | ours, GiB | theirs, GiB |",
            authors_rows(parts),
        ),
        "## Memory",
        table("| | measured, GiB | computed, GiB | ratio |", memory_rows(parts)),
        "## Tests for GPUs",
        parts.get("tests", {}).get("summary", "not run"),
    ]
    failed = [f"- {name}: {part['error']}" for name, part in parts.items() if "error" in part]
    if failed:
        sections += ["## Not measured", "\n".join(failed)]
    machine = json.dumps(report.get("machine", {}))
    return "\n\n".join(sections) + f"\n\n{machine}, {report.get('seconds')} s\n"


def table(head: str, rows: list[list]) -> str:
    line = "|" + "---|" * (head.count("|") - 1)
    cells = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join([head, line, *cells])


def measured(parts: dict) -> list[dict]:
    """Results of bench.py."""
    return [part for part in parts.values() if "images_per_second" in part]


def page_rows(parts: dict) -> list[list]:
    """Of each model, compiled, the faster way of augmentation."""
    names = {
        "vitl16": "ViT-L/16, DINOv3, 2 × 256 + 8 × 112",
        "vits16": "ViT-S/16, JPEG files, {} cores",
    }
    rows = []
    for model, name in names.items():
        found = [part for part in measured(parts) if part["model"] == model]
        found = [part for part in found if part["compile"] == "on"]
        if not found:
            continue
        best = max(found, key=lambda part: part["images_per_second"])
        speed = [best["images_per_second"], share(best["mfu"]), share(best["data_wait_fraction"])]
        label = f"{name.format(os.cpu_count())}, batch {best['batch_size']}"
        label += f", crops made by {the_maker(best)}"
        rows.append([label, best["device"], *speed, round(best["memory_gib"], 1)])
    return rows


def bench_rows(parts: dict) -> list[list]:
    rows = []
    for part in measured(parts):
        phases = part["phases_ms"]
        name = (
            part["model"] if part["checkpointing"] == "none" else f"{part['model']}, checkpointed"
        )
        names = ("teacher", "forward", "loss", "backward", "optimizer", "ema")
        rows.append(
            [
                name,
                part["batch_size"],
                part["compile"] + (" (failed)" if part.get("compile_failed") else ""),
                part["augmentation"],
                part["images_per_second"],
                part["step_ms"],
                round(part["step_ms"] * (1 - part["data_wait_fraction"]), 1),
                *(round(phases.get(phase, 0.0), 1) for phase in names),
                share(part["mfu"]),
                share(part["data_wait_fraction"]),
                part["memory_gib"],
            ]
        )
    return rows


def authors_rows(parts: dict) -> list[list]:
    keys = ("model", "device", "batch", "ours_ms", "theirs_ms", "ratio", "ours_gib", "theirs_gib")
    found = [part for part in parts.values() if "theirs_ms" in part]
    return [[part[key] for key in keys] for part in found]


def memory_rows(parts: dict) -> list[list]:
    """Peaks of what bench.py measured against what it computed for the same batch."""
    rows = []
    for part in measured(parts):
        computed = parts.get("memory", {}).get("rows", {}).get(part["model"], {})
        row = computed.get(str(part["batch_size"]))
        if row is None or part["augmentation"] == "device":
            continue
        checkpointed = part["checkpointing"] != "none"
        expected = row["total_checkpointed" if checkpointed else "total"]
        found = part["memory_gib"] - part["memory_before_gib"]
        label = f"{part['model']}, batch {part['batch_size']}, {part['precision']}"
        label += ", `checkpointing=blocks`" if checkpointed else f", compile {part['compile']}"
        rows.append([label, round(found, 2), round(expected, 2), round(found / expected, 2)])
    return rows


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def the_maker(part: dict) -> str:
    return "the workers" if part["augmentation"] == "workers" else "the GPU"
