"""The table that the fault suite prints: fault, tries, survived."""

import pytest

from proof import Table, table_lines


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """`with table.attempt("what is done to it"):` around each try."""
    return Table(request.node.user_properties)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table after the results."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    properties = [pair for report in reports for pair in report.user_properties]
    if any(what == "tried" for what, _ in properties):
        terminalreporter.section("faults")
        for line in table_lines(properties):
            terminalreporter.line(line)
