"""README.md and docs/: the files, links and flags that they name exist, and no line is too wide."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("models", "losses", "data", "engine", "evals", "configs", "docs", "tests")
FILES = {
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.*"), *(path for room in ROOMS for path in (ROOT / room).rglob("*"))]
}
NAMES = {Path(path).name for path in FILES}
# Files that a reader writes, or that a run writes.
OF_THE_READER = {"adapt.yaml", "mix.yaml", "config.yaml"}
FILE_NAME = r"[\w./-]*\w\.(?:py|yaml|md)\b"
all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, kind: str) -> list[str]:
    """The code blocks of a page whose fence names `kind`."""
    parts = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [block for name, block in parts if name == kind]


def without_own_folders(text: str) -> str:
    """The text without paths that begin at the reader's root, such as /my/files.csv."""
    return re.sub(r"(?<![\w.])/[\w./{}-]+", "", text)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@all_pages
def test_every_file_that_a_page_names_exists(page):
    text = re.sub(r"^(---|\+\+\+) .*$", "", page.read_text(), flags=re.M)  # files of a patch
    for name in re.findall(FILE_NAME, without_own_folders(text)):
        if name in OF_THE_READER or Path(name).stem.isupper():  # FILE.yaml stands for any
            continue
        beside = (page.parent / name).resolve()
        there = beside.exists() or name in FILES or ("/" not in name and name in NAMES)
        assert there, f"{page.name} names {name}"


def test_every_file_that_a_docstring_or_recipe_names_exists():
    named = rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/{FILE_NAME}"
    for path in (ROOT / name for name in sorted(FILES)):
        if path.suffix in (".py", ".yaml") and ROOT / "tests" not in path.parents:
            for name in re.findall(named, path.read_text()):
                there = name in FILES or Path(name).stem.isupper()  # configs/X.yaml stands for any
                assert there, f"{path.relative_to(ROOT)} names {name}"


@all_pages
def test_every_folder_of_the_program_that_a_page_names_exists(page):
    for name in re.findall(
        rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[\w/]*/?(?![\w.])", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@all_pages
def test_every_relative_link_resolves(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name} links to {link}"


@all_pages
def test_no_line_but_those_of_tables_is_wider_than_100_columns(page):
    wide = [
        line
        for line in page.read_text().splitlines()
        if len(line) > 100 and not line.startswith("|")
    ]
    assert not wide


def test_the_map_of_the_readme_has_every_script_and_room_and_their_files():
    (text,) = [
        block for block in blocks((ROOT / "README.md").read_text(), "") if "distill.py" in block
    ]
    described: dict[str, str] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            name, _, rest = line.partition(" ")
            described[name] = rest
        elif line:
            described[name] += line
    scripts = {path.name for path in ROOT.glob("*.py")}
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.rglob("__init__.py")}
    rooms = {name for name in packages if not name.startswith(("tests", "."))}
    assert scripts | rooms <= described.keys()
    for room in rooms:
        for name in re.findall(r"\w+\.py", described[room]):
            assert (ROOT / room / name).exists(), f"{room} has no {name}"


@all_pages
def test_commands_give_only_flags_that_the_programs_have(page):
    code = "\n".join(path.read_text() for path in ROOT.rglob("*.py") if "tests" not in path.parts)
    text = page.read_text().replace("\\\n", " ")
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    lines += re.findall(r"`(python [^`]*)`", text)
    for line in lines:
        if re.match(r"(python|torchrun) ", line) and "venv" not in line:
            arguments = line[line.index(".py") :] if ".py" in line else line
            for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", arguments.partition("  #")[0]):
                assert f'"{flag}"' in code, f"{page.name}: {line}"
