"""What `tests/run servers` found: a row for each server, a table of all, and its place in README.md."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmark_report import replace_between_markers

README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = "<!-- servers begin -->", "<!-- servers end -->"
COLUMNS = {
    "story": "backup and restore",
    "lease": "runs exclude each other",
    "keys": "odd keys",
    "headers": "headers",
    "tags": "tags",
    "rights": "read-only keys",
    "locks": "versions, object lock",
}
FAILED = "**failed**"


@dataclass
class Row:
    """What a server showed, column by column; what was not looked at is no success."""

    title: str
    version: str
    cells: dict[str, str] = field(default_factory=lambda: dict.fromkeys(COLUMNS, "not run"))
    notes: list[str] = field(default_factory=list)  # for who runs it, too long for the table

    @contextlib.contextmanager
    def checking(self, column: str) -> Iterator[None]:
        """A column that has failed unless the block gets to its end, which may fill it itself."""
        self.cells[column] = FAILED
        yield
        if self.cells[column] == FAILED:
            self.cells[column] = "yes"

    def note(self, text: str) -> None:
        """Something to print below the table, once."""
        if text not in self.notes:
            self.notes.append(text)


ROWS = pytest.StashKey[list[Row]]()  # where the tests leave theirs


def table(rows: Iterable[Row], earlier: str = "") -> str:
    """The rows in Markdown, and those of an earlier table whose servers were not tried this time."""
    head = [
        f"| {' | '.join(cells)} |" for cells in (["server", *COLUMNS.values()], [":---"] * (len(COLUMNS) + 1))
    ]
    lines = {
        row.title: f"| {row.title} {row.version} | {' | '.join(row.cells[column] for column in COLUMNS)} |"
        for row in rows
    }
    old = earlier.splitlines()[2:]
    kept = [line for line in old if not any(line.startswith(f"| {title} ") for title in lines)]
    return "\n".join([*head, *sorted([*kept, *lines.values()], key=str.casefold)])


def foot(rows: Iterable[Row], absent: dict[str, str]) -> str:
    """What the table has no room for: details of each server, and which servers are not in it."""
    lines = [f"{row.title}: {note}" for row in rows for note in row.notes]
    lines += [f"{title}: not here, as {reason}" for title, reason in absent.items()]
    return "\n".join(lines)


def write_report(rows: Iterable[Row], readme: Path = README) -> None:
    """Put the rows into the table in the README's folded part. Raises ReportError."""
    text = readme.read_text()
    earlier = text.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()
    readme.write_text(replace_between_markers(text, table(rows, earlier), *MARKERS))
