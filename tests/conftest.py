"""A sealed environment, real servers, fresh buckets, and the proof that each test left nothing behind."""

import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from helpers import Bucket, leftovers, mounted, remove_leftovers, seal_environment, skip_or_fail
from matrix import ROWS, foot, table, write_report
from matrix_servers import ABSENT
from servers import Moto, SeaweedFS, Server

seal_environment()

# ---------------------------------------------------------------------------------------- Servers and buckets


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One SeaweedFS for all tests. A test that stops it starts one of its own instead."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as running:
        yield running


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    """One Moto for all tests that need keys that SeaweedFS does not keep."""
    with Moto(tmp_path_factory.mktemp("moto")) as running:
        yield running


@pytest.fixture
def new_bucket(request: pytest.FixtureRequest, server: SeaweedFS) -> Iterator[Callable[..., Bucket]]:
    """`new_bucket("first")` makes an empty bucket with a name of its own; `on=…` on another server.

    When the test ends no bucket may hold a borg lock, unless the test is marked `leaves_lock`; a bucket made
    as "source" may hold anything.
    """
    made: list[Bucket] = []

    def make(purpose: str = "bucket", *, on: Server | None = None) -> Bucket:
        made.append(Bucket(on or server, f"{purpose}-{uuid.uuid4().hex[:12]}").create())
        return made[-1]

    yield make
    # A server of the test's own may be gone by now.
    running = [bucket for bucket in made if bucket.server.process]
    held = [
        f"{bucket.name}: {key}"
        for bucket in running
        if not bucket.name.startswith("source-")
        for key in bucket.locks()
    ]
    for bucket in running:
        if bucket.server is server:
            # With its objects; the disk space is free again.
            bucket.client.delete_bucket(Bucket=bucket.name)
    if held and not request.node.get_closest_marker("leaves_lock"):
        pytest.fail("the test left locks:\n" + "\n".join(held))


@pytest.fixture
def source(new_bucket: Callable[..., Bucket]) -> Bucket:
    """An empty bucket to back up."""
    return new_bucket("source")


@pytest.fixture
def target(new_bucket: Callable[..., Bucket]) -> Bucket:
    """An empty bucket to back up to."""
    return new_bucket("target")


# ------------------------------------------------------------------------- What a test needs from the machine


def _why_no_fuse(bucket: Bucket, folder: Path) -> str:
    """The reason why buckets cannot be mounted here; empty when they can."""
    for tool in ("fusermount3", "tigrisfs"):
        if not shutil.which(tool):
            return f"{tool} is not on the PATH"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    try:
        with mounted(bucket, folder):
            return ""
    except AssertionError as error:
        return f"FUSE cannot mount here: {str(error)[-500:]}"


@pytest.fixture(scope="session")
def fuse_problem(server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tried once: why FUSE does not work, or an empty text."""
    bucket = Bucket(server, "fuse-trial").create()
    return _why_no_fuse(bucket, tmp_path_factory.mktemp("fuse"))


@pytest.fixture
def needs_fuse(fuse_problem: str) -> None:
    """For tests that mount: `pytestmark = pytest.mark.usefixtures("needs_fuse")`."""
    if fuse_problem:
        skip_or_fail(f"no FUSE: {fuse_problem}")


# ------------------------------------------------------------------------------------- Nothing is left behind


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """After every test: no mount below its folder, no process with the folder in arguments or environment."""
    yield
    found = leftovers(tmp_path)
    if found:
        remove_leftovers(tmp_path)
        pytest.fail("the test left behind:\n" + "\n".join(found))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the servers' logs with a test that failed."""
    report = yield
    servers = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Server)]
    if report.failed:
        report.sections += [(f"{server.name}'s log", server.log_tail(15)) for server in servers]
    return report


# ------------------------------------------------------------------------------------- The matrix of servers


def pytest_addoption(parser: pytest.Parser) -> None:
    """`tests/run servers --report`."""
    parser.addoption("--report", action="store_true", help="write the table of servers into README.md")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """The table of servers, where any was tried; with `--report` in README.md, too, unless interrupted."""
    rows = config.stash.get(ROWS, [])
    if rows:
        terminalreporter.section("servers")
        terminalreporter.write_line(f"{table(rows)}\n\n{foot(rows, ABSENT)}")
        if config.getoption("--report") and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            write_report(rows)
