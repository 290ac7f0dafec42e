"""Stopping a run: in every phase, in an orderly way, and by force."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.proxy import Action, FaultProxy, Request
from helpers import (
    Backup,
    Bucket,
    Repository,
    Result,
    command_line,
    descendants,
    is_running,
    leftovers,
    mounts_below,
    processes_with,
    run_backup,
    settings,
    wait_until,
    with_target,
)
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

LARGE_BYTES = 40_000_000
SLOW = "lzma,9"  # half a minute for LARGE_BYTES, so that there is time to stop it
DOCKER_STOP_SECONDS = 10


@dataclass
class Site:
    """A configuration with one target, and the buckets behind it."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket
    folder: Path

    def slow(self) -> dict[str, str]:
        """The same with an object in the source that takes long to archive."""
        self.source.put({"large": os.urandom(LARGE_BYTES)})
        return with_target(self.environment, "first", compression=SLOW)


@pytest.fixture
def site(server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path) -> Site:
    """A source with a few objects."""
    source.put({f"folder/{number}": os.urandom(1000) for number in range(10)})
    environment = settings(
        server,
        tmp_path,
        source.name,
        {"first": {"path": target.name, "prune": "--keep-last=2"}},
        LOG_LEVEL="debug",
    )
    return Site(environment, source, target, tmp_path)


def assert_stopped_cleanly(site: Site, result: Result, number: signal.Signals) -> None:
    """The exit code tells the signal; no mount, no process, no lock; and docker would not have killed us."""
    result.expect(128 + number)
    assert number.name in result.output
    assert leftovers(site.folder) == []
    assert site.target.locks() == []
    assert not any(line.startswith("Traceback") for line in result.lines), result.output
    assert not any(key.startswith(".s3borgbackup-probe") for key in site.target.sizes()), (
        "the probe of the check is still there"
    )


def assert_next_run_succeeds(site: Site) -> None:
    """A run after it succeeds, and the repository is whole."""
    site.source.delete("large")
    run_backup(site.environment).expect(0)
    repository = Repository.download(site.target, site.folder / "copy")
    repository.check()
    assert repository.archives()


def stop_at(
    site: Site, environment: dict[str, str], line: str, number: signal.Signals
) -> tuple[Result, float]:
    """Sends a signal as soon as there is such a line; the result, and how long the end took."""
    with Backup(environment) as backup:
        backup.wait_for_line(line)
        start = time.monotonic()
        backup.send_signal(number)
        result = backup.wait(60)
    return result, time.monotonic() - start


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("backup of", signal.SIGTERM),
        ("[source] ", signal.SIGHUP),
        ("a new repository is made", signal.SIGINT),
        ("borg init", signal.SIGTERM),
        ("borg create", signal.SIGHUP),
    ],
)
def test_a_first_run_stopped_in_any_phase_leaves_nothing_and_can_be_repeated(
    site: Site, line: str, number: signal.Signals
) -> None:
    result, seconds = stop_at(site, site.slow(), line, number)
    assert_stopped_cleanly(site, result, number)
    assert seconds < DOCKER_STOP_SECONDS
    assert_next_run_succeeds(site)


@pytest.mark.long
def test_a_later_run_stopped_in_any_phase_keeps_the_archives_that_were_there(site: Site) -> None:
    """While the repository is looked at, pruned, compacted and unmounted."""
    run_backup(site.environment).expect(0)
    (site.folder / "new").mkdir()
    elsewhere = {**site.environment, "XDG_CONFIG_HOME": str(site.folder / "new")}
    for line, number, environment in (
        ("borg list", signal.SIGTERM, elsewhere),  # where borg has not seen the repository yet
        ("borg prune", signal.SIGINT, site.environment),
        ("borg compact", signal.SIGTERM, site.environment),
    ):
        site.source.put({"folder/changes": os.urandom(1_000_000)})
        result, seconds = stop_at(site, environment, line, number)
        assert_stopped_cleanly(site, result, number)
        assert seconds < DOCKER_STOP_SECONDS
    assert_next_run_succeeds(site)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_stopped_while_borg_works_ends_in_time_with_its_lock_released(
    site: Site, number: signal.Signals
) -> None:
    """By each stop signal, in the middle of a large object, with part of it in the bucket already."""
    with Backup(site.slow()) as backup:
        backup.wait_for_line("borg create")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        start = time.monotonic()
        backup.send_signal(number)
        result = backup.wait(60)
    assert time.monotonic() - start < DOCKER_STOP_SECONDS
    assert_stopped_cleanly(site, result, number)
    assert any(line.startswith("first ") and "failed" in line for line in result.lines)


def from_then_on(is_first: Callable[[Request], bool]) -> Callable[[Request], bool]:
    """Matches all requests after the first such one, and that too."""
    began: list[Request] = []

    def matches(request: Request) -> bool:
        if not began and is_first(request):
            began.append(request)
        return bool(began)

    return matches


STOPPED_WHILE_S3_FAILS = {
    "a store is examined": ("check-config", lambda request: request.kind == "LIST"),
    "the lease is taken": ("run", lambda request: request.key.endswith("-lease") and request.is_write),
    "a repository is made": ("run", lambda request: request.key == "config" and request.is_write),
    "leftovers are looked for": ("run", lambda request: request.query.get("start-after") == "hints"),
    "a note is read": ("info", lambda request: request.key.endswith("-checked")),
    "a target is mounted": ("run", lambda request: "user-agent" in request.headers),
    "borg writes a segment": ("run", lambda request: request.key.startswith("data/0/") and request.is_write),
    "the end is uploaded": ("run", lambda request: request.key.startswith("index.") and request.is_write),
}
NEW = ("the lease is taken", "a repository is made")


@pytest.mark.leaves_lock
@pytest.mark.parametrize("action", [Action.REFUSE, Action.HANG])
def test_a_run_is_stopped_in_time_while_s3_fails_or_does_not_answer(site: Site, action: Action) -> None:
    """In each of these phases, from such a request on: what is asked again, and what is never answered."""
    with FaultProxy(site.target.server.endpoint) as proxy:
        environment = with_target(site.environment, "first", endpoint=proxy.endpoint)
        took = {}
        for phase in sorted(STOPPED_WHILE_S3_FAILS, key=lambda phase: phase not in NEW):
            command, is_first = STOPPED_WHILE_S3_FAILS[phase]
            if phase not in NEW and not site.target.sizes("config"):
                site.target.clear()
                run_backup(site.environment).expect(0)
            fault = proxy.add(from_then_on(is_first), action, status=503, code="SlowDown")
            with Backup(environment, command) as backup:
                few = 1 if action is Action.REFUSE else 0
                wait_until(lambda few=few, fault=fault: fault.hit > few, 60, f"S3 fails while {phase}")
                start = time.monotonic()
                backup.send_signal(signal.SIGTERM)
                result = backup.wait(60)
            took[phase] = round(time.monotonic() - start, 1)
            proxy.clear()
            site.target.delete(*site.target.sizes(".s3borgbackup-"), *site.target.locks())
            assert leftovers(site.folder) == []
            result.expect(128 + signal.SIGTERM)
        assert max(took.values()) < DOCKER_STOP_SECONDS, took


def test_ctrl_c_reaches_borg_and_tigrisfs_through_us_only(site: Site) -> None:
    """A terminal signals the whole process group: the mounts must not go before borg is done with them."""
    with Backup(site.slow()) as backup:
        backup.wait_for_line("borg create")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        backup.send_signal_to_group(signal.SIGINT)
        result = backup.wait(60)
    assert_stopped_cleanly(site, result, signal.SIGINT)


def test_a_second_signal_hurries_and_still_unmounts(site: Site) -> None:
    """Borg is killed then; its lock and the mounts go all the same, and the first signal counts.

    Borg is stopped (SIGSTOP) and thus deaf to the first signal.
    """
    with Backup(site.slow()) as backup:
        backup.wait_for_line("borg create")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        borg = wait_until(lambda: borg_of(backup), 30, "borg create runs")
        os.kill(borg, signal.SIGSTOP)
        backup.send_signal(signal.SIGTERM)
        wait_until(lambda: is_pending(borg, signal.SIGTERM), 5, "the first signal was passed on to borg")
        start = time.monotonic()
        backup.send_signal(signal.SIGINT)
        wait_until(lambda: not is_running(borg), 3, "borg is killed at once")
        backup.wait(60).expect(128 + signal.SIGTERM)
    assert time.monotonic() - start < DOCKER_STOP_SECONDS
    assert leftovers(site.folder) == []
    assert site.target.locks() == []


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal was sent to a process that has not taken it yet, proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) & 1 << (number - 1))


def borg_of(backup: Backup) -> int | None:
    """The process id of the `borg create` of a run."""
    return next((pid for pid in descendants(backup.pid) if " create --log-json" in command_line(pid)), None)


def test_a_borg_that_does_not_obey_is_killed_in_time(site: Site) -> None:
    """One signal is enough within `docker stop`'s patience, even when borg hangs."""
    with Backup(site.slow()) as backup:
        backup.wait_for_line("borg create")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        os.kill(wait_until(lambda: borg_of(backup), 30, "borg create runs"), signal.SIGSTOP)
        backup.send_signal(signal.SIGTERM)
        start = time.monotonic()
        result = backup.wait(60).expect(128 + signal.SIGTERM)
    assert time.monotonic() - start < DOCKER_STOP_SECONDS
    assert not any(line.startswith("Traceback") for line in result.lines), result.output
    assert leftovers(site.folder) == []
    assert site.target.locks() == []


def test_a_killed_backup_leaves_no_process_that_goes_on_writing(site: Site) -> None:
    """SIGKILL cannot be handled: the kernel ends borg and tigrisfs with us.

    What is left, dead mounts, a lock and a lease, is cleaned up by the next run, which needs nobody.
    """
    with Backup({**site.slow(), "LEASE_TTL": "10"}) as backup:
        backup.wait_for_line("borg create")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        below = descendants(backup.pid)
        assert len(below) >= 3
        backup.send_signal(signal.SIGKILL)
        backup.wait().expect(128 + signal.SIGKILL)
        wait_until(lambda: not any(is_running(pid) for pid in below), 10, "borg and tigrisfs end")
    assert len(mounts_below(site.folder)) == 2

    result = run_backup(site.environment).expect(0)
    assert "dead mount" in result.output
    assert "a lock that borg left behind" in result.output
    assert leftovers(site.folder) == []


def test_a_mount_made_by_hand_ends_in_order_when_its_keeper_is_stopped(site: Site) -> None:
    """A stop signal to the keeper of a mount made by hand flushes and unmounts, as a container's end does."""
    run_backup(site.environment, "mount", "target-first").expect(0)
    folder = Path(site.environment["DATA_DIR"]) / "target-first"
    (folder / "file").write_bytes(b"x")
    running = processes_with(str(site.folder))
    keeper = next(pid for pid in running if "mount target-first" in command_line(pid))
    os.kill(keeper, signal.SIGTERM)
    wait_until(lambda: not leftovers(site.folder), DOCKER_STOP_SECONDS, "unmounted, and the keeper gone")
    assert site.target.contents() == {"file": b"x"}
