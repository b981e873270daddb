"""Who may import whom (the layout that README.md describes), and that importing changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "losses", "data", "engine", "evals")
TOP = {path.stem for path in ROOT.glob("*.py")} - {"conftest"}
LIBRARY = {"errors", "files", "kernels"}  # at the top, for all rooms
SCRIPTS = TOP - LIBRARY
FILES = [
    *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
    *(ROOT / f"{name}.py" for name in TOP),
]
# What the files of a room may import besides the standard library, the room itself and LIBRARY.
ALLOWED = {
    "models": {
        *("torch", "timm", "safetensors", "huggingface_hub"),
        "open_clip",  # where its tokenizer is asked for
    },
    "losses": {"torch"},
    "data": {
        *("torch", "torchvision", "numpy", "PIL", "yaml", "engine.distributed"),
        *("tifffile", "rasterio", "datasets"),  # where such data is asked for
    },
    "engine": {
        *("torch", "numpy", "tqdm", "yaml", "models", "data"),
        *("wandb", "safetensors"),  # where asked for
    },
    "evals": {
        *("torch", "numpy", "PIL", "matplotlib", "tqdm", "models", "data", "engine"),
        *("torchvision", "safetensors"),
        *("sklearn", "torchmetrics", "open_clip"),  # where asked for
    },
}
STEPS_ARE_TAKEN_FROM = {"distill": {"train"}, "bench": {"train", "distill"}}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | (
                {f"engine.{item.name}" for item in node.names} if node.module == "engine" else set()
            )
    return names - {"engine"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports_of(path):
            root = name.split(".")[0]
            assert (
                root in sys.stdlib_module_names
                or root in {room, *LIBRARY}
                or ALLOWED[room] & {root, name}
            ), f"{path.relative_to(ROOT)} imports {name}"


def test_scripts_import_no_scripts_but_the_step():
    for path in FILES:
        taken = imports_of(path) & SCRIPTS
        assert taken <= STEPS_ARE_TAKEN_FROM.get(path.stem if path.parent == ROOT else "", set()), (
            path.name
        )


def test_models_losses_and_data_do_not_know_the_configuration():
    for room in ("models", "losses", "data"):
        for path in (ROOT / room).rglob("*.py"):
            assert "engine.config" not in imports_of(path), path.name


def test_importing_every_module_changes_no_global_state():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if path.name != "__init__.py"
    ]
    code = f"""
import importlib, logging, os, random, signal, sys, warnings
import torch, torchvision, timm, matplotlib
def state():
    drawn = torch.get_rng_state().sum().item(), random.getstate()
    numbers = torch.get_num_threads(), torch.get_default_dtype()
    backend = matplotlib.get_backend(auto_select=False)
    handlers = len(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    return dict(os.environ), drawn, numbers, backend, handlers
before = state()
for name in {modules!r}:
    importlib.import_module(name)
assert state() == before, "an import left a trace"
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_short():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, f"{path.name} is past 400 lines: a room is missing"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, (
                    f"{path.name}:{node.name} is past 60 lines"
                )


def test_configurations_have_a_type():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.arg == "cfg":
                assert ast.unparse(node.annotation) != "Any", f"{path.name}:{node.lineno}"
