"""Tables of names, labels and marks in CSV files, and the text files that list images."""

import csv
from pathlib import Path

from errors import UserError

LINE = "#line"  # key of a row under which its line in the file stands


def open_text(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    # utf-8-sig: spreadsheets write a byte order mark; surrogateescape: file names may be any bytes.
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file by column, each with its line under LINE; empty lines are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: without one of `columns`, or for a line that the first line does not describe.
    """
    rows = []
    with open_text(path) as file:
        reader = csv.reader(file, skipinitialspace=True, strict=True)
        names = None
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise UserError(
                    f"{str(path)!r}, line {line}: {error}; is a quotation mark not closed?"
                ) from error
            if names is None:
                names = [value.strip() for value in values]
                _require_columns(path, names, columns)
            elif any(values):
                rows.append(_row(path, line, names, values))
    if names is None:
        _require_columns(path, [], columns)
    return rows


def _require_columns(path: Path, names: list[str], columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in names]
    if missing:
        raise UserError(
            f"{str(path)!r} has no column {missing[0]!r}; "
            f"its first line must name the columns {', '.join(columns)}"
        )


def _row(path: Path, line: int, names: list[str], values: list[str]) -> dict[str, str]:
    while len(values) > len(names) and not values[-1]:
        values = values[:-1]
    if len(values) != len(names):
        raise UserError(
            f"{str(path)!r}, line {line}: {len(values)} fields where the first line names "
            f"{len(names)} ({', '.join(names)}); a field with a comma stands in quotation marks"
        )
    row = dict(zip(names, values, strict=True))
    if "file" in row and not row["file"]:
        raise UserError(f"{str(path)!r}, line {line}: the column file is empty")
    return row | {LINE: str(line)}
