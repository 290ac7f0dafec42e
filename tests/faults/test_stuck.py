"""What does not move any more though S3 answers: it is noticed soon, and the target is tried once more."""

import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from helpers import (
    Backup,
    Bucket,
    children,
    command_line,
    first_short,
    patch_backup,
    sample_objects,
    settings,
    wait_until,
)
from proof import newest_contents
from proxy import Action, FaultProxy
from servers import WRITER, SeaweedFS

# -------------------------------------------------------------------------------------------- Without a mount

SILENCE_SECONDS, STALL_SECONDS = 1.2, 4.0
MOVING = {
    "nothing": "import time; time.sleep(60)",
    "bytes": "import os\nzero = os.open('/dev/zero', 0)\nwhile True: os.read(zero, 4096)",
    "cpu": "while True: pass",
}


@pytest.fixture
def mount_of(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., backup.Mount]]:
    """A mount of a bucket at an endpoint, as far as it is measured: some process moves bytes, or does not."""
    monkeypatch.setattr(backup, "SILENCE_SECONDS", SILENCE_SECONDS)
    bucket, begun = new_bucket("store"), []

    def make(program: str, endpoint: str = server.endpoint) -> backup.Mount:
        store = backup.Store("x", endpoint, bucket.name, "", WRITER.access_key_id, WRITER.secret_access_key)
        argv = [sys.executable, "-c", MOVING[program]]
        begun.append(backup.Child(argv, os.environ, lambda _: None, lambda _: None))
        log = backup.TigrisLog("x", backup.Console(debug=False))
        hasty = backup.Patience(answer_seconds=1, unreachable_seconds=0, failing_seconds=0)
        return backup.Mount(None, store, tmp_path, begun[-1], log, backup.S3Client(store, None, hasty))

    yield make
    for child in begun:
        child.kill()


def stands_still_for(clock: backup.StallClock, limit_seconds: float = STALL_SECONDS + 3) -> float:
    """After how many seconds the clock says so; infinity where it does not."""
    start = time.monotonic()
    while time.monotonic() - start < limit_seconds:
        try:
            clock.check("it hangs")
        except backup.Hung:
            return time.monotonic() - start
        time.sleep(0.05)
    return float("inf")


def test_what_stands_still_while_s3_answers_is_given_up_much_sooner(
    mount_of: Callable[..., backup.Mount],
) -> None:
    assert stands_still_for(backup.StallClock(STALL_SECONDS, [mount_of("nothing")])) < STALL_SECONDS


def test_where_s3_does_not_answer_it_is_waited_for(
    server: SeaweedFS, mount_of: Callable[..., backup.Mount]
) -> None:
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "LIST", Action.HANG)
        mounts = [mount_of("nothing"), mount_of("nothing", proxy.endpoint)]
        assert stands_still_for(backup.StallClock(STALL_SECONDS, mounts)) >= STALL_SECONDS
        assert proxy.count(lambda request: request.kind == "LIST"), "it was asked"


def test_so_are_a_lease_that_cannot_be_renewed_and_a_tigrisfs_that_complains(
    mount_of: Callable[..., backup.Mount],
) -> None:
    suspended, complaining = mount_of("nothing"), mount_of("nothing")
    suspended.lease = SimpleNamespace(suspended=True)
    assert stands_still_for(backup.StallClock(STALL_SECONDS, [suspended])) >= STALL_SECONDS
    clock, start = backup.StallClock(STALL_SECONDS, [complaining]), time.monotonic()
    while time.monotonic() - start < 3 * SILENCE_SECONDS:
        complaining.log.feed('{"level": "error", "message": "SlowDown"}')
        assert stands_still_for(clock, SILENCE_SECONDS / 4) > STALL_SECONDS


@pytest.mark.parametrize("moving", ["bytes", "cpu"])
def test_a_borg_that_computes_and_a_mount_that_moves_bytes_are_not_stuck(
    mount_of: Callable[..., backup.Mount], moving: str
) -> None:
    """The CPU time is borg's."""
    mount, other = mount_of("bytes" if moving == "bytes" else "nothing"), mount_of("cpu")
    meters = [lambda: 10 * backup.cpu_seconds(other.child.pid)] if moving == "cpu" else []
    clock = backup.StallClock(STALL_SECONDS, [mount], *meters)
    assert stands_still_for(clock, 3 * SILENCE_SECONDS) > STALL_SECONDS


def test_a_shared_mount_that_moves_for_others_hides_nobody_who_is_stuck(
    mount_of: Callable[..., backup.Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "SHARED_BYTES", 1_000_000)
    own, source = mount_of("nothing"), mount_of("bytes")
    stuck = backup.StallClock(STALL_SECONDS, [own, source], beside=lambda: 1)
    assert stands_still_for(stuck) < STALL_SECONDS
    steps = itertools.count()
    moving = backup.StallClock(STALL_SECONDS, [own, source], beside=lambda: next(steps))
    assert stands_still_for(moving, 3 * SILENCE_SECONDS) > STALL_SECONDS


# --------------------------------------------------------------------------------------------------- In a run


@pytest.fixture
def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The silence that is taken for a deadlock is shorter than it may be among users."""
    patch_backup(monkeypatch, tmp_path, "backup.SILENCE_SECONDS = 5")


def freeze(running: Backup, mount_point: str) -> None:
    """Stops the tigrisfs that serves a mount: it moves nothing any more, and S3 answers as ever."""
    lines = {pid: command_line(pid) for pid in children(running.pid)}
    [pid] = [pid for pid, line in lines.items() if re.match(rf"\S*tigrisfs .*/{mount_point}$", line)]
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse", "hasty")
@pytest.mark.parametrize(
    ("frozen", "twice"), first_short([("target-first", ["first"]), ("source", ["first", "second"])])
)
def test_a_target_that_got_stuck_is_tried_once_more_and_the_run_ends_well(
    server: SeaweedFS,
    source: Bucket,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    frozen: str,
    twice: list[str],
) -> None:
    """After its first lease has expired, whatever LEASE_WAIT says, and with new mounts."""
    source.put(sample_objects(5, 40))
    source.put({f"large/{number}": os.urandom(1_200_000) for number in range(4)})  # these take the mount
    targets = {name: new_bucket(name) for name in ("first", "second")}
    with FaultProxy(server.endpoint) as proxy:
        # No borg may be done before the mount is frozen.
        slow = proxy.add(lambda request: request.kind == "GET", Action.DELAY, after=1, seconds=3)
        environment = settings(
            server,
            tmp_path,
            source.name,
            {name: {"path": bucket.name, "prune": "--keep-last=3"} for name, bucket in targets.items()},
            SOURCE_ENDPOINT=proxy.endpoint,
            STALL_TIMEOUT="40",
            LEASE_TTL="10",
            LEASE_WAIT="0",
            METRICS_FILE=str(tmp_path / "metrics"),
        )
        with Backup(environment) as running:
            for name in targets:
                running.wait_for_line(f"[target-{name}] borg create begins")
            wait_until(lambda: slow.hit, 20, "the source is read")
            freeze(running, frozen)
            proxy.clear()
            result = running.wait(200).expect(0)
    told = [line for line in result.lines if "tried twice, as it got stuck: " in line]
    assert [line.partition(":")[0] for line in told] == twice, result.output
    assert all("no progress for 5 s, though S3 answers" in line for line in told)
    for name, bucket in targets.items():
        contents = newest_contents(bucket, tmp_path / name, environment)
        assert contents == source.contents()


@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.leaves_lock
def test_a_run_that_hangs_on_a_mount_is_stopped_in_time(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """`docker stop` grants 10 s."""
    source.put(sample_objects(6, 40))
    with Backup(settings(server, tmp_path, source.name, {"first": target.name})) as running:
        running.wait_for_line("borg create begins")
        freeze(running, "target-first")
        running.send_signal(signal.SIGTERM)
        assert running.wait(60).expect(128 + signal.SIGTERM).duration_seconds < 20
