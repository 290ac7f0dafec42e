"""The lease: that of two runs on a repository only one works, and what the other one says."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import backup
from faults.proxy import Action, FaultProxy, Request
from helpers import (
    BACKUP,
    PASSPHRASE,
    Backup,
    Bucket,
    Repository,
    borg_environment,
    run_backup,
    settings,
    wait_until,
    with_target,
    with_target_secrets,
)
from servers import ADMIN, WRITER, SeaweedFS

LEASE = ".s3borgbackup-lease"
SLOW = "lzma,9"  # half a minute for LARGE_BYTES, so that there is time to look at it
LARGE_BYTES = 40_000_000
TTL_SECONDS = 10  # the shortest that LEASE_TTL may be
MARGIN_SECONDS = 2  # HTTP's dates have whole seconds

FIELDS = {
    "run_id": "a1",
    "host": "nas",
    "purpose": "a backup",
    "since": "2026-01-02T03:04:05Z",
    "ttl_seconds": 10,
}


def lease_body(**fields: Any) -> bytes:
    """A lease object's content as a run writes it."""
    return json.dumps({**FIELDS, "write": 1, **fields}).encode()


def holder_of(body: bytes, age_seconds: int = 0) -> backup.Holder:
    """Who holds a lease whose object was written so long before somebody looks."""
    now = datetime.now(UTC)
    times = {"date": now, "last-modified": now - timedelta(seconds=age_seconds)}
    headers = {name: format_datetime(when, usegmt=True) for name, when in times.items()}
    return backup.Holder.parse(backup.Answer(200, {**headers, "etag": '"e"'}, body))


class Notes:
    """A dead man's switch that only notes for when it was armed, and when."""

    def __init__(self) -> None:
        self.armed: list[tuple[float, float]] = []

    def arm(self, at_boot_seconds: float) -> None:
        if at_boot_seconds:
            self.armed.append((at_boot_seconds, backup.boot_seconds()))

    def assert_harmless(self) -> None:
        """It was armed, and never for a moment that had passed."""
        assert self.armed
        assert [until for until, now in self.armed if until <= now] == []


def runtime_with(ttl_seconds: int) -> Any:
    """What a lease needs to know of a run."""
    settings = SimpleNamespace(lease_ttl_seconds=ttl_seconds, lease_wait_seconds=0, stall_seconds=60)
    return SimpleNamespace(run_id="x", settings=settings, console=backup.Console(debug=False))


# -------------------------------------------------------------------------------------------- What is decided


def test_a_lease_names_who_holds_it() -> None:
    holder = holder_of(lease_body())
    assert (holder.run_id, holder.ttl_seconds, holder.etag) == ("a1", 10, '"e"')
    assert str(holder) == "a backup on nas, since 2026-01-02T03:04:05Z"


def test_no_two_writes_of_a_lease_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's ETag is a digest of the content: equal content would hide that somebody wrote in between."""
    bodies: list[bytes] = []

    def put(_: backup.S3Client, _key: str, body: bytes, condition: Mapping[str, str]) -> backup.Answer:
        bodies.append(body)
        if len(bodies) > 1:  # then it is tried out whether the server heeds conditions
            raise backup.S3Error(f"{condition} is not met", "", 412, "PreconditionFailed")
        return backup.Answer(200, {"etag": '"e"'}, b"", backup.boot_seconds())

    monkeypatch.setattr(backup.S3Client, "put", put)
    monkeypatch.setattr(backup.S3Client, "find", lambda *_: None)
    monkeypatch.setattr(backup.S3Client, "delete", lambda *_: None)
    client = backup.S3Client(backup.Store("t", "http://s3.test", "bucket"))
    with backup.Lease(runtime_with(60), client, "a test", only_reads=True) as lease:
        assert lease.enforced
    assert len(set(bodies)) == len(bodies) == 4  # the last ETag with quotes, and without


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b"{}",
        lease_body(ttl_seconds="soon"),
        lease_body(ttl_seconds=None),
        lease_body(ttl_seconds=float("inf")),
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_lease_that_nobody_can_read_has_an_unknown_holder_and_expires_all_the_same(body: bytes) -> None:
    holder = holder_of(body)
    assert holder.run_id == ""
    assert "unknown" in str(holder)
    assert 0 < holder.ttl_seconds <= 3600


@pytest.mark.parametrize(
    ("age_seconds", "expired"),
    [(0, False), (-3600, False), (10, False), (12, False), (13, True), (10**9, True)],
)
def test_a_lease_expires_when_it_was_not_renewed_for_its_lifetime(age_seconds: int, expired: bool) -> None:
    """With two seconds more, as HTTP's dates have whole seconds; a clock that went back expires nothing."""
    assert holder_of(lease_body(), age_seconds).has_expired == expired


def test_a_lease_whose_age_the_server_does_not_tell_does_not_expire() -> None:
    assert not backup.Holder.parse(backup.Answer(200, {}, lease_body())).has_expired


@pytest.mark.parametrize(
    ("status", "code", "refuses"),
    [
        (501, "NotImplemented", True),
        (501, "", True),
        (400, "NotImplemented", True),
        (400, "InvalidArgument", True),
        (412, "PreconditionFailed", False),
        (409, "ConditionalRequestConflict", False),
        (403, "AccessDenied", False),
        (503, "SlowDown", False),
        (0, "", False),
    ],
)
def test_a_server_that_does_not_know_conditions_is_told_from_one_that_fails(
    status: int, code: str, refuses: bool
) -> None:
    assert backup.refuses_conditions(backup.S3Error("target-x: no", "", status, code)) == refuses


def test_since_when_a_lease_is_held_is_told_by_the_servers_clock(
    server: SeaweedFS, target: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fast(datetime):
        """Our clock is five minutes fast."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(minutes=5)

    store = backup.Store(
        "x", server.endpoint, target.name, "", WRITER.access_key_id, WRITER.secret_access_key
    )
    monkeypatch.setattr(backup, "datetime", Fast)
    monkeypatch.setattr(backup, "DeadMansSwitch", Notes)
    with backup.Lease(runtime_with(60), backup.S3Client(store), "a backup"):
        since = datetime.fromisoformat(json.loads(target.get(LEASE))["since"])
    assert abs((datetime.now(UTC) - since).total_seconds()) < 60


# -------------------------------------------------------------------------------------- The dead man's switch


def with_switch(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that has a DeadMansSwitch `switch`; not in our process, which it would kill."""
    setup = (
        "import sys, time; import backup; from backup import boot_seconds; switch = backup.DeadMansSwitch()"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{setup}\n{program}"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(BACKUP.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("program", "exit_code"),
    [
        ("switch.arm(boot_seconds() + 0.3); time.sleep(20)", -9),
        ("switch.arm(boot_seconds() + 0.3)\nwhile True: pass", -9),
        ("switch.arm(boot_seconds() - 5); time.sleep(20)", -9),
        ("switch.arm(boot_seconds() + 0.3); switch.arm(boot_seconds() + 60); time.sleep(0.8)", 0),
        ("switch.arm(boot_seconds() + 0.3); switch.arm(0); time.sleep(0.8)", 0),
        ("time.sleep(0.8)", 0),
    ],
    ids=["asleep", "busy", "in the past", "put off", "disarmed", "never armed"],
)
def test_the_kernel_kills_a_process_that_does_not_put_off_its_end(program: str, exit_code: int) -> None:
    done = with_switch(program)
    assert (done.returncode, done.stderr) == (exit_code, "")


# ----------------------------------------------------------------------------------- An S3 that is in trouble

SHORT_TTL_SECONDS = 3


@pytest.fixture
def proxy(server: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint) as running:
        yield running


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    made = Notes()
    monkeypatch.setattr(backup, "DeadMansSwitch", lambda: made)
    return made


def short_lease(proxy: FaultProxy, target: Bucket) -> backup.Lease:
    """A lease of three seconds on a bucket behind the proxy."""
    store = backup.Store("t", proxy.endpoint, target.name, "", ADMIN.access_key_id, ADMIN.secret_access_key)
    client = backup.S3Client(store, patience=backup.PROVEN)
    return backup.Lease(runtime_with(SHORT_TTL_SECONDS), client, "a test")


def is_trial(request: Request) -> bool:
    """Whether it only tries out if the server heeds conditions."""
    return backup.NO_SUCH_ETAG in request.headers.values()


def is_put(request: Request) -> bool:
    return request.kind == "PUT"


@pytest.mark.long
@pytest.mark.parametrize("matches", [is_put, is_trial], ids=["taken", "tried"])
def test_a_lease_that_takes_longer_to_take_than_it_lasts_kills_nobody(
    proxy: FaultProxy, target: Bucket, notes: Notes, matches: Callable[[Request], bool]
) -> None:
    """The tries that failed do not count, and while it is found out what the server can do it is renewed."""
    storm = proxy.add(matches, Action.REFUSE, status=503, code="SlowDown")
    end = threading.Timer(SHORT_TTL_SECONDS + 2, proxy.remove, [storm])
    end.start()
    with short_lease(proxy, target) as lease:
        assert storm.removed.is_set()
        lease.write(backup.S3Client.put, "written", b"")
        assert not lease.lost
    notes.assert_harmless()
    assert target.sizes() == {"written": 0}


@pytest.mark.parametrize("first", [True, False], ids=["taken", "renewed"])
def test_a_write_whose_answer_was_lost_lengthens_no_lease(
    proxy: FaultProxy, target: Bucket, notes: Notes, first: bool
) -> None:
    """The holder never believes in more than what an answered write has given it."""
    clocks_apart = backup.boot_seconds() - time.monotonic()
    lost = proxy.add(
        lambda request: is_put(request) and (request.headers.get("if-none-match") == "*") == first,
        Action.LOSE_ANSWER,
        after=0 if first else 1,
        times=1,
    )
    with short_lease(proxy, target) as lease:
        wait_until(lambda: lost.hit and len(notes.armed) > 2, 30, "it is renewed after that")
        assert not lease.lost
    written = [
        request.when + clocks_apart for request, status in proxy.requests if is_put(request) and status == 200
    ]
    for until, now in notes.armed:
        assert until - SHORT_TTL_SECONDS <= max((when for when in written if when <= now), default=0)
    assert target.sizes() == {}


# ------------------------------------------------------------------------------------------------ Whole runs


@dataclass
class Site:
    """A configuration with the target `first`, and the buckets behind it."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket

    def long_run(self) -> dict[str, str]:
        """The same with so much to do that there is time to look at it."""
        self.source.put({"large": os.urandom(LARGE_BYTES)})
        return with_target(self.environment, "first", compression=SLOW)


@pytest.fixture
def site(needs_fuse: None, server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path) -> Site:
    """A source with one object."""
    source.put({"a": b"a"})
    environment = settings(server, tmp_path / "one", source.name, {"first": target.name}, LEASE_TTL="10")
    return Site(environment, source, target)


def elsewhere(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The same configuration on another machine."""
    own = {
        "HOME": "home",
        "XDG_CONFIG_HOME": "config",
        "XDG_CACHE_HOME": "cache",
        "TMPDIR": "tmp",
        "DATA_DIR": "data",
    }
    for name in own.values():
        (folder / name).mkdir(parents=True)
    return {**environment, **{variable: str(folder / name) for variable, name in own.items()}}


@pytest.mark.long
def test_a_run_names_who_works_on_the_repository_and_says_so_by_its_exit_code(
    site: Site, tmp_path: Path
) -> None:
    """By default it waits until the other one has renewed its lease, and thus is alive: 2.5 s here."""
    with Backup(site.long_run()) as one:
        one.wait_for_line("borg create begins")
        held = json.loads(site.target.get(LEASE))
        result = run_backup(elsewhere(site.environment, tmp_path / "two")).expect(75)
        assert one.process.poll() is None
        assert result.duration_seconds < TTL_SECONDS
        who = f"another run works on this repository: a backup on {held['host']}, since {held['since']}"
        assert f"target-first: {who}" in result.output
        assert "LEASE_WAIT" in result.output
        assert held["host"] == os.uname().nodename
        assert (held["ttl_seconds"], held["since"][:2]) == (TTL_SECONDS, "20")
    assert LEASE not in site.target.sizes(), "a run that is stopped gives its lease back"
    site.target.clear()  # on a busy machine borg may have been killed before it released its lock


def test_a_run_that_shall_not_wait_does_not(site: Site) -> None:
    """Nor does it touch the lease, or anything else there."""
    site.target.put({LEASE: lease_body()})
    result = run_backup({**site.environment, "LEASE_WAIT": "0"}).expect(75)
    assert result.duration_seconds < 4
    assert "a backup on nas, since 2026-01-02T03:04:05Z" in result.output
    assert site.target.contents() == {LEASE: lease_body()}


def test_a_run_leaves_no_lease_behind(site: Site) -> None:
    """Not when it succeeds, nor when it fails."""
    assert "conditional writes" not in run_backup(site.environment).expect(0).output
    assert LEASE not in site.target.sizes()
    run_backup(with_target_secrets(site.environment, "first", borg_passphrase="wrong")).expect(2)
    assert LEASE not in site.target.sizes()


@pytest.mark.long
@pytest.mark.parametrize(
    ("action", "details"),
    [(Action.IGNORE_CONDITIONS, {}), (Action.REFUSE, {"status": 501, "code": "NotImplemented"})],
    ids=["ignored", "501"],
)
def test_a_server_without_conditional_writes_is_warned_of_by_each_run_and_serves_all_the_same(
    site: Site, tmp_path: Path, action: Action, details: Mapping[str, Any]
) -> None:
    with FaultProxy(site.target.server.endpoint) as proxy:
        fault = proxy.add(
            lambda request: not {"if-match", "if-none-match"}.isdisjoint(request.headers), action, **details
        )
        environment = with_target(site.environment, "first", endpoint=proxy.endpoint)
        result = run_backup(environment).expect(0)
        [warning] = [line for line in result.lines if "conditional writes" in line]
        assert "[target-first] warning: " in warning
        assert "see to it that only one works on the repository at a time" in warning
    assert fault.hit
    assert LEASE not in site.target.sizes()
    repository = Repository.download(site.target, tmp_path / "copy")
    repository.check()
    assert len(repository.archives()) == 1


def test_an_expired_lease_is_taken_over_at_once(site: Site) -> None:
    """It says whose it was; a lifetime of its own counts, not that of who looks."""
    site.target.put({LEASE: lease_body()})
    written = time.monotonic()
    wait_until(
        lambda: time.monotonic() > written + TTL_SECONDS + MARGIN_SECONDS + 1, 20, "the lease has expired"
    )
    result = run_backup({**site.environment, "LEASE_TTL": "3600", "LEASE_WAIT": "0"}).expect(0)
    taken = "an expired lease is taken over: a backup on nas, since 2026-01-02T03:04:05Z"
    assert taken in result.output
    assert result.duration_seconds < TTL_SECONDS
    assert LEASE not in site.target.sizes()


@pytest.mark.long
def test_the_lease_of_a_run_that_crashed_is_waited_for_and_taken_over(site: Site) -> None:
    site.target.put({LEASE: lease_body()})
    result = run_backup(site.environment).expect(0)
    assert "waiting to see whether that lives" in result.output
    assert "an expired lease is taken over" in result.output
    assert result.duration_seconds > TTL_SECONDS


def test_a_lease_that_is_no_lease_is_respected(site: Site) -> None:
    """Somebody put it there; it says that it does not know who."""
    site.target.put({LEASE: b"keep out!"})
    result = run_backup({**site.environment, "LEASE_WAIT": "0"}).expect(75)
    assert "unknown work on an unknown host" in result.output
    assert site.target.contents() == {LEASE: b"keep out!"}
    site.target.clear()


def test_the_lease_of_a_prefix_lies_below_the_prefix(site: Site) -> None:
    """So a repository beside it is another matter, and the bucket's top another one again."""
    prefixed = with_target(site.environment, "first", path=f"{site.target.name}:some/where")
    site.target.put({f"some/where/{LEASE}": lease_body(host="here")})
    site.target.put({LEASE: lease_body(host="no"), f"some/{LEASE}": lease_body(host="no")})
    result = run_backup({**prefixed, "LEASE_WAIT": "0"}).expect(75)
    assert "a backup on here, " in result.output
    site.target.delete(f"some/where/{LEASE}")
    run_backup(prefixed).expect(0)
    assert [key for key in site.target.sizes() if key.endswith(LEASE)] == [LEASE, f"some/{LEASE}"]


@pytest.mark.long
def test_a_repository_in_use_does_not_keep_the_other_targets_from_success(
    site: Site, server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """75 says "still running", and is not a failure; where one fails besides, that counts."""
    other = new_bucket("other")
    environment = settings(
        server,
        tmp_path / "two",
        site.source.name,
        {"held": site.target.name, "free": other.name},
        LEASE_WAIT="0",
    )
    site.target.put({LEASE: lease_body(ttl_seconds=3600)})
    result = run_backup(environment).expect(75)
    assert [line.split()[1] for line in result.lines if line.startswith(("held ", "free "))] == ["busy", "ok"]
    assert len(Repository.download(other, tmp_path / "copy").archives()) == 1
    result = run_backup(with_target_secrets(environment, "free", borg_passphrase="wrong")).expect(2)
    assert "a backup on nas" in result.output
    site.target.clear()


# ---------------------------------------------------------------------------- Two places, one repository's id


@pytest.mark.long
def test_a_copy_of_another_targets_repository_is_told_before_anything_is_written(
    site: Site, server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """borg's cache and what it knows are by the id. The first goes on, and the advice that is given helps."""
    other = new_bucket("other")
    environment = settings(
        server, tmp_path / "two", site.source.name, {"first": site.target.name, "second": other.name}
    )
    run_backup(environment, "run", "first").expect(0)
    other.put(site.target.contents())
    copied = other.contents()
    for words in (["check-config"], ["run", "second"]):
        result = run_backup(environment, *words).expect(2)
        assert "target-second: its repository has the id of target-first's: one is a copy" in result.output
        assert other.contents() == copied
    assert 'Point TARGETS "second"."path" at an empty place' in result.output
    run_backup(with_target(environment, "second", path=f"{other.name}:own")).expect(0)
    assert len(Repository.download(site.target, tmp_path / "copy").archives()) == 2


# ---------------------------------------------------------------------------------------------- Manual mounts


@pytest.fixture
def folder(site: Site) -> Iterator[Path]:
    """Where `backup.py mount target-first` mounts; it is unmounted at the end."""
    yield Path(site.environment["DATA_DIR"]) / "target-first"
    run_backup(site.environment, "umount", "target-first")


@pytest.mark.long
def test_a_mount_holds_the_lease_until_it_is_unmounted(site: Site, folder: Path, tmp_path: Path) -> None:
    """Also for longer than the lease lasts; a run says that it is a mount that it would have to wait for."""
    other = elsewhere(site.environment, tmp_path / "two")
    run_backup(site.environment).expect(0)
    run_backup(site.environment, "mount", "target-first").expect(0)
    first = json.loads(site.target.get(LEASE))
    wait_until(lambda: json.loads(site.target.get(LEASE))["write"] > first["write"] + 5, 30, "it is renewed")
    for waiting in ({}, {"LEASE_WAIT": "0"}):
        result = run_backup({**other, **waiting}).expect(75)
        assert "`backup.py mount` on " in result.output
    assert (folder / "config").exists()
    run_backup(site.environment, "umount", "target-first").expect(0)
    assert LEASE not in site.target.sizes()
    run_backup(other).expect(0)


def test_a_repository_in_use_is_not_mounted(site: Site, folder: Path) -> None:
    run_backup(site.environment).expect(0)
    site.target.put({LEASE: lease_body()})
    result = run_backup({**site.environment, "LEASE_WAIT": "0"}, "mount", "target-first").expect(75)
    assert "a backup on nas, since 2026-01-02T03:04:05Z" in result.output
    assert not os.path.ismount(folder)
    site.target.delete(LEASE)


@pytest.mark.long
def test_an_empty_target_is_mounted_as_an_empty_folder_so_that_borg_can_make_a_repository_there(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    """By hand, under the lease, which lies in the bucket meanwhile; the next run uses what was made."""
    run_backup(site.environment, "mount", "target-first").expect(0)
    assert os.listdir(folder) == []
    assert LEASE in site.target.sizes()
    environment = borg_environment(tmp_path / "by-hand", PASSPHRASE)
    (tmp_path / "by-hand").mkdir()
    subprocess.run(["borg", "init", "--encryption=repokey-blake2", folder], env=environment, check=True)
    run_backup({**elsewhere(site.environment, tmp_path / "two"), "LEASE_WAIT": "0"}).expect(75)
    run_backup(site.environment, "umount", "target-first").expect(0)
    assert LEASE not in site.target.sizes()
    run_backup(site.environment).expect(0)
    repository = Repository.download(site.target, tmp_path / "copy")
    repository.check()
    assert len(repository.archives()) == 1
