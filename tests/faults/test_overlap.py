"""Two runs on one repository: at once, one frozen meanwhile, and one that cannot renew its lease, or lost it.

That there are never two writers is seen from outside: a run writes to a repository through a tigrisfs that
has the target mounted, and no two runs may have one at the same time.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from faults.conftest import Table
from faults.proof import newest_contents, prove_intact
from helpers import (
    BACKUP,
    Backup,
    Bucket,
    Repository,
    Result,
    command_line,
    descendants,
    first_short,
    is_running,
    settings,
    wait_until,
    with_target,
)
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

TTL_SECONDS = 10  # the shortest that LEASE_TTL may be
LEASE = ".s3borgbackup-lease"
SLOW = "lzma,9"  # half a minute for LARGE_BYTES
LARGE_BYTES = 40_000_000
HUGE_BYTES = 300_000_000  # some seconds as fast as it goes
SETTLE_SECONDS = 4  # for what a process that goes on would write

# Both runs are process 2 of a process namespace of their own, with a table of mounts of its own.
CONTAINED = (
    "unshare",
    "--pid",
    "--mount",
    "--mount-proc",
    "--fork",
    "--kill-child",
    sys.executable,
    str(BACKUP),
)


@dataclass
class Site:
    """One source, one target, and the configurations of two machines that share nothing else."""

    environments: Sequence[dict[str, str]]
    source: Bucket
    target: Bucket
    folder: Path

    def prove_sound(self, archive_count: int) -> None:
        """What is in the bucket passes `borg check --verify-data` and has that many archives."""
        repository = Repository.download(self.target, self.folder / f"copy-{time.monotonic_ns()}")
        repository.check()
        assert len(repository.archives()) == archive_count

    def prove_intact(self) -> Result:
        """A normal run of the machine on which something happened succeeds, and nothing is missing."""
        return prove_intact(self.environments[0], self.source, self.target, self.folder)


@pytest.fixture
def make_site(new_bucket: Callable[..., Bucket], server: SeaweedFS, tmp_path: Path) -> Callable[..., Site]:
    """`make_site(LEASE_WAIT="60")`: a source of some objects, an empty target."""

    def make(on: SeaweedFS = server, **variables: str) -> Site:
        source, target = new_bucket("source", on=on), new_bucket("target", on=on)
        source.put({f"folder/{number}": os.urandom(20_000) for number in range(20)})
        environments = [
            settings(
                on,
                tmp_path / name,
                source.name,
                {"first": target.name},
                LEASE_TTL=str(TTL_SECONDS),
                **variables,
            )
            for name in ("one", "two")
        ]
        return Site(environments, source, target, tmp_path)

    return make


# ------------------------------------------------------------------------------------ What is seen of outside


def writers(backups: Sequence[Backup], target: Bucket) -> list[int]:
    """The tigrisfs of each run that has the target mounted."""
    return [
        pid
        for backup in backups
        for pid in descendants(backup.pid)
        if command_line(pid).startswith("tigrisfs") and target.name in command_line(pid)
    ]


@dataclass
class Watch:
    """Looks all the while for runs that have the target mounted, and notes when two have."""

    backups: Sequence[Backup]
    target: Bucket
    seen: set[int] = field(default_factory=set)
    overlaps: list[list[int]] = field(default_factory=list)

    def look(self) -> None:
        """Looks once. All that are still there after the last was found were there together."""
        found = writers(self.backups, self.target)
        self.seen.update(found)
        together = [pid for pid in found if is_running(pid)]
        if len(together) > 1:
            self.overlaps.append(together)


@contextlib.contextmanager
def never_two_writers(backups: Sequence[Backup], target: Bucket, count: int) -> Iterator[None]:
    """Fails when two runs have the target mounted at one moment, or not `count` of them in all (0: any)."""
    watch, over = Watch(backups, target), threading.Event()

    def look_on() -> None:
        while not over.wait(0.05):
            watch.look()

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert watch.overlaps == []
    assert watch.seen, "no writer was seen at all"
    assert not count or len(watch.seen) == count


def snapshot(bucket: Bucket) -> dict[str, tuple[int, str]]:
    """Every key with its size and ETag, and the uploads that are not complete."""
    pages = bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name)
    found = {
        entry["Key"]: (entry["Size"], entry["ETag"]) for page in pages for entry in page.get("Contents", ())
    }
    uploads = bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", ())
    return found | {f"{upload['Key']} (incomplete)": (0, upload["UploadId"]) for upload in uploads}


def assert_nothing_is_written(bucket: Bucket, before: Mapping[str, tuple[int, str]]) -> None:
    """The bucket stays as it was for long enough that a process that goes on would have shown."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: snapshot(bucket) != before, SETTLE_SECONDS, "something is written")
    assert snapshot(bucket) == before


# ------------------------------------------------------------------------------------------- Two runs at once


def both(site: Site) -> list[Result]:
    """How two runs end that begin at the same moment, each in namespaces of its own."""
    first, second = site.environments
    with (
        Backup(first, *CONTAINED) as one,
        Backup(second, *CONTAINED) as two,
        never_two_writers([one, two], site.target, 0),
    ):
        return [one.wait(), two.wait()]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_of_two_runs_at_once_one_succeeds_and_the_other_leaves_it_alone_or_waits(
    make_site: Callable[..., Site], table: Table
) -> None:
    """Ten times, on two repositories, which the first of the runs make; host and process ids are alike."""
    for _ in range(2):
        site, archives = make_site(), 0
        for number in range(5):
            site.source.put({"large": os.urandom(8_000_000)})
            with table.attempt("two runs at once, with process ids alike"):
                results = both(site)
                codes = sorted(result.exit_code for result in results)
                assert codes in ([0, 0], [0, 75]), "\n".join(result.output for result in results)
                archives += codes.count(0)
                if number in (0, 2, 4):
                    site.prove_sound(archives)
        site.prove_intact()


@pytest.mark.long
def test_a_run_that_is_told_to_wait_has_its_turn_when_the_other_is_done(
    make_site: Callable[..., Site], table: Table
) -> None:
    site = make_site(LEASE_WAIT="60")
    site.source.put({"large": os.urandom(LARGE_BYTES // 4)})
    with table.attempt("two runs at once, one told to wait"):
        first = with_target(site.environments[0], "first", compression=SLOW)
        with Backup(first) as one:
            one.wait_for_line("borg create begins")
            with Backup(site.environments[1]) as two, never_two_writers([one, two], site.target, 2):
                two.wait_for_line("the repository is in use")
                one.wait().expect(0)
                two.wait().expect(0)
        site.prove_sound(2)


# ---------------------------------------------------------------------------------------------- A frozen run


def freeze(backup: Backup, everybody: Sequence[int]) -> None:
    """Stops these processes in the middle of `borg create`."""
    backup.wait_for_line("borg create begins")
    borg = wait_until(lambda: borg_create(backup), 20, "borg create runs")
    wait_until(lambda: bytes_read(borg) > 5_000_000, 60, "borg is in the middle")
    for pid in everybody or [backup.pid, *descendants(backup.pid)]:
        os.kill(pid, signal.SIGSTOP)


def borg_create(backup: Backup) -> int:
    """The process id of the `borg create` of a run; 0 when there is none."""
    return next((pid for pid in descendants(backup.pid) if " create --log-json" in command_line(pid)), 0)


def bytes_read(pid: int) -> int:
    """What a process has read by system calls, proc(5)."""
    words = Path(f"/proc/{pid}/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


@pytest.mark.parametrize("whole", first_short([True, False]), ids=["the whole tree", "backup.py alone"])
def test_a_run_frozen_for_longer_than_its_lease_writes_no_more_when_it_goes_on(
    make_site: Callable[..., Site], table: Table, whole: bool
) -> None:
    """As by `docker pause`. Another one takes over meanwhile; the frozen one does not outlive its lease."""
    site = make_site()
    site.source.put({"large": os.urandom(HUGE_BYTES if whole else LARGE_BYTES)})
    first = site.environments[0] if whole else with_target(site.environments[0], "first", compression=SLOW)
    with (
        table.attempt(
            f"frozen for longer than its lease: {'the whole tree' if whole else 'backup.py alone'}"
        ),
        Backup(first) as one,
    ):
        freeze(one, [] if whole else [one.pid])
        frozen = [one.pid, *descendants(one.pid)]
        assert len(frozen) > 3
        with Backup(site.environments[1]) as two, never_two_writers([one, two], site.target, 2):
            result = two.wait().expect(0)
        assert "an expired lease is taken over: a backup on" in result.output

        before = snapshot(site.target)
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert_nothing_is_written(site.target, before)
        assert not any(is_running(pid) for pid in frozen)
        one.wait(5).expect(128 + signal.SIGKILL)
        site.prove_intact()


# ----------------------------------------------------------------------------- A lease that cannot be renewed


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A server that may hang."""
    with SeaweedFS(tmp_path_factory.mktemp("own")) as running:
        yield running


@contextlib.contextmanager
def hanging(server: SeaweedFS) -> Iterator[None]:
    """No request is answered while the block runs."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


def state(pid: int) -> str:
    """The state letter of a process, proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_an_s3_that_is_away_for_longer_than_the_lease_suspends_the_run_until_it_is_back(
    own_server: SeaweedFS, make_site: Callable[..., Site], table: Table
) -> None:
    site = make_site(own_server, STALL_TIMEOUT="300")
    site.source.put({"large": os.urandom(LARGE_BYTES // 2)})
    first = with_target(site.environments[0], "first", compression=SLOW)
    with table.attempt("S3 away for longer than the lease"), Backup(first) as one:
        one.wait_for_line("borg create begins")
        borg = wait_until(lambda: borg_create(one), 20, "borg create runs")
        with hanging(own_server):
            start = time.monotonic()
            one.wait_for_line("the work is suspended", TTL_SECONDS)
            (writer,) = writers([one], site.target)
            wait_until(lambda: state(writer) == "T", 5, "tigrisfs is stopped")
            # D: it waits for a mount, and is stopped as soon as that answers.
            wait_until(lambda: state(borg) in "TD", 5, "borg is stopped")
            wait_until(lambda: time.monotonic() > start + TTL_SECONDS * 1.5, 20, "longer than the lease")
        one.wait_for_line("the work goes on", TTL_SECONDS)
        one.wait().expect(0)
        assert newest_contents(site.target, site.folder, first) == site.source.contents()
        site.prove_intact()


def visitor() -> bytes:
    """The lease of somebody else."""
    fields = {"run_id": "x", "host": "elsewhere", "purpose": "a visit", "since": "today", "ttl_seconds": 10}
    return json.dumps(fields).encode()


@pytest.mark.parametrize("deleted", first_short([False, True]), ids=["overwritten", "deleted"])
def test_a_run_whose_lease_somebody_else_touched_stops_at_once(
    make_site: Callable[..., Site], table: Table, deleted: bool
) -> None:
    """It says who has it now, and leaves both the repository and that one's lease alone."""
    site = make_site()
    site.source.put({"large": os.urandom(LARGE_BYTES)})
    first = with_target(site.environments[0], "first", compression=SLOW)
    with table.attempt(f"the lease is {'deleted' if deleted else 'overwritten'} in mid-run"):
        with Backup(first) as one:
            one.wait_for_line("borg create begins")
            wait_until(lambda: borg_create(one), 20, "borg create runs")
            start = time.monotonic()
            site.target.delete(LEASE) if deleted else site.target.put({LEASE: visitor()})
            result = one.wait(30).expect(2)
        assert time.monotonic() - start < TTL_SECONDS
        who = "its object was deleted" if deleted else "a visit on elsewhere, since today"
        assert f"the lease on the repository was lost ({who})" in result.output
        before = snapshot(site.target)
        assert (LEASE in before) != deleted
        assert_nothing_is_written(site.target, before)
        site.source.delete("large")
        site.prove_intact()
