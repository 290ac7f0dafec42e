from pathlib import Path

import pytest

import matrix
from benchmark_report import ReportError
from matrix import COLUMNS, FAILED, Row, foot, table, write_report
from matrix_servers import ABSENT, KINDS
from readme import README

FOLDED_LINES = 18  # what the README has room for


def test_a_check_that_does_not_get_to_its_end_has_failed() -> None:
    row = Row("MinIO", "1")
    with pytest.raises(ValueError, match="no"), row.checking("tags"):
        raise ValueError("no")
    with row.checking("keys"):
        pass
    with row.checking("headers"):
        row.cells["headers"] = "no expires"
    found = (FAILED, "yes", "no expires", "not run")
    assert tuple(row.cells[name] for name in ("tags", "keys", "headers", "story")) == found


def test_the_table_has_a_line_for_each_server_and_a_cell_for_each_column() -> None:
    first, *lines = table([Row("MinIO", "1"), Row("Moto", "2")]).splitlines()
    assert [line.count("|") for line in (first, *lines)] == [len(COLUMNS) + 2] * 4
    assert lines[-1].startswith("| Moto 2 | not run |")


def test_what_the_table_has_no_room_for_stands_below_it() -> None:
    row = Row("MinIO", "1")
    row.note("is slow")
    row.note("is slow")
    assert foot([row], {"Other": "nobody has it"}) == "MinIO: is slow\nOther: not here, as nobody has it"


def test_a_report_changes_nothing_but_the_place_for_it(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    begin, end = matrix.MARKERS
    readme.write_text(f"a\n{begin}\nold\n{end}\nb\n")
    write_report([Row("MinIO", "1")], readme)
    assert readme.read_text() == f"a\n{begin}\n{table([Row('MinIO', '1')])}\n{end}\nb\n"
    write_report([Row("Garage", "2")], readme)  # the others stay
    write_report([Row("MinIO", "3")], readme)
    assert readme.read_text() == f"a\n{begin}\n{table([Row('Garage', '2'), Row('MinIO', '3')])}\n{end}\nb\n"
    readme.write_text("nothing")
    with pytest.raises(ReportError):
        write_report([], readme)
    assert readme.read_text() == "nothing"


def test_the_readme_has_a_small_folded_place_for_the_table() -> None:
    before, _, rest = README.partition(matrix.MARKERS[0])
    inside, end, _ = rest.partition(matrix.MARKERS[1])
    assert end
    assert before.rpartition("\n<details>")[2].count("\n") == 2
    assert max(inside.count("\n"), len(KINDS) + 3) + 5 <= FOLDED_LINES
    assert not {kind.title for kind in KINDS} & ABSENT.keys()
