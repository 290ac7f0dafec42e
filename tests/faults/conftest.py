"""The table that the fault suite prints: fault, tries, survived."""

import pytest

from proof import Table

TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    """One table for the whole session."""
    config.stash[TABLE] = Table()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """`with table.attempt("what is done to it"):` around each try."""
    return request.config.stash[TABLE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table after the results."""
    table = terminalreporter.config.stash[TABLE]
    if table.tries:
        terminalreporter.section("faults")
        for line in table.lines():
            terminalreporter.line(line)
