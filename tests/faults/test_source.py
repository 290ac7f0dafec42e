"""What a run works on goes away in the middle: a mount's process, the source's key or bucket, the disk."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from helpers import (
    Backup,
    Bucket,
    Repository,
    Result,
    command_line,
    descendants,
    first_short,
    full,
    run_backup,
    settings,
    small_disk,
    wait_until,
    with_target,
)
from proof import Table, prove_intact
from servers import ADMIN, READER, WRITER, Identity, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

SLOW = "lzma,6"  # some 2 MB a second: time for something to happen in the middle
LARGE_BYTES = 12_000_000
NOTICED_SECONDS = 30


def put_large(bucket: Bucket, count: int = 3) -> None:
    """Objects that take a while to archive, and a few small ones."""
    bucket.put({f"large/{number}": os.urandom(LARGE_BYTES) for number in range(count)})
    bucket.put({f"small/{number}": os.urandom(500) for number in range(20)})


def outcome(result: Result, target: str) -> str:
    """What the table at a run's end says of a target."""
    return next(re.split(r" {2,}", line)[1] for line in result.lines[::-1] if line.startswith(f"{target} "))


def child(backup: Backup, text: str) -> int:
    """The process of a run whose command line has this text; 0 when there is none."""
    return next((pid for pid in descendants(backup.pid) if text in command_line(pid)), 0)


def wait_for_the_middle(backup: Backup, target: str) -> None:
    """Returns when borg has read from the source for a target."""
    backup.wait_for_line(f"[target-{target}] borg create begins")
    borg = wait_until(lambda: child(backup, " create --log-json"), 20, "borg create runs")

    def has_read() -> bool:
        words = Path(f"/proc/{borg}/io").read_text().split()
        return int(words[words.index("rchar:") + 1]) > LARGE_BYTES

    wait_until(has_read, 60, "borg is in the middle")


# ----------------------------------------------------------------------------------------- A mount that dies


@pytest.mark.parametrize(
    ("victim", "at_once", "twice"),
    first_short(
        [
            ("source", 1, ["first"]),
            ("source", 2, ["first", "second"]),
            ("target-first", 1, ["first"]),
            ("target-first", 2, ["first"]),
        ]
    ),
)
def test_after_a_tigrisfs_has_died_who_used_it_is_tried_once_more(
    server: SeaweedFS,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    table: Table,
    victim: str,
    at_once: int,
    twice: list[str],
) -> None:
    """With new mounts, the source's, too."""
    source, first, second = new_bucket("source"), new_bucket("first"), new_bucket("second")
    put_large(source, 2)
    targets = {"first": first.name, "second": second.name}
    environment = settings(
        server, tmp_path, source.name, targets, LEASE_TTL="10", PARALLEL_TARGETS=str(at_once)
    )
    environment = with_target(environment, "second", compression=SLOW)
    with table.attempt(f"tigrisfs of the {victim.partition('-')[0]} is killed"):
        with Backup(with_target(environment, "first", compression=SLOW)) as running:
            wait_for_the_middle(running, "first")
            mount_point = str(tmp_path / "data" / victim)
            os.kill(child(running, f" {mount_point}"), signal.SIGKILL)
            running.wait_for_line(f"warning: {victim}: tigrisfs ended with 137", NOTICED_SECONDS)
            result = running.wait(250).expect(0)
        assert [outcome(result, name) for name in ("first", "second")] == ["ok", "ok"]
        why = f"tried twice, as it got stuck: {victim}: tigrisfs ended with 137"
        told = [line for line in result.lines if why in line]
        assert [line.partition(":")[0] for line in told] == twice
        for target in (first, second):
            prove_intact(environment, source, target, tmp_path)


# ------------------------------------------------------------------------------------ A source that goes away


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A server whose identities may change."""
    with SeaweedFS(tmp_path_factory.mktemp("own")) as running:
        yield running


def set_identities(server: SeaweedFS, *identities: Identity) -> None:
    """Has a running server accept these identities; one that it knew already gets another secret."""
    entries = [identity.as_seaweedfs() for identity in identities]
    (server.directory / "identities.json").write_text(json.dumps({"identities": entries}))
    assert server.process
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: all(accepts(server, who) for who in identities), 20, "the identities are read")


def accepts(server: SeaweedFS, identity: Identity) -> bool:
    """Whether the server knows an identity's key and secret."""
    try:
        server.client(identity).list_buckets()
    except ClientError:
        return False
    return True


def revoke_the_key(source: Bucket) -> Callable[[], None]:
    """The source's key has another secret now; returns what undoes that."""
    server = source.server
    assert isinstance(server, SeaweedFS)
    set_identities(server, ADMIN, WRITER, replace(READER, secret_access_key="another-secret"))
    assert not accepts(server, READER)
    return lambda: set_identities(server, ADMIN, WRITER, READER)


def delete_the_bucket(source: Bucket) -> Callable[[], None]:
    """The source is not there any more; returns what undoes that."""
    source.client.delete_bucket(Bucket=source.name)

    def undo() -> None:
        put_large(source.create(), 1)

    return undo


@pytest.mark.parametrize(
    ("fault", "code"),
    first_short([(revoke_the_key, "SignatureDoesNotMatch"), (delete_the_bucket, "NoSuchBucket")]),
)
def test_a_source_that_goes_away_in_mid_run_is_a_failure_that_names_it_and_nothing_is_pruned(
    own_server: SeaweedFS,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    table: Table,
    fault: Callable[[Bucket], Callable[[], None]],
    code: str,
) -> None:
    source, target = new_bucket("source", on=own_server), new_bucket("target", on=own_server)
    source.put({"before": b"before"})
    entry = {"path": target.name, "prune": "--keep-last=1"}
    # Little memory, so that not all is read ahead before the source goes away.
    environment = settings(own_server, tmp_path, source.name, {"first": entry}, MEMORY_LIMIT_MB="256")
    run_backup(environment).expect(0)
    [old] = Repository.download(target, tmp_path / "before").archives()
    put_large(source)
    with table.attempt(f"in mid-run: {fault.__name__.replace('_', ' ')}"):
        with Backup(with_target(environment, "first", compression=SLOW)) as running:
            wait_for_the_middle(running, "first")
            undo = fault(source)
            result = running.wait().expect(2)
        assert [line for line in result.lines if "error: source (" in line and code in line], result.output
        assert "pruned" not in result.output
        after = Repository.download(target, tmp_path / "after")
        # borg may have been killed, and then its lock is still there.
        assert old in after.borg("list", "--short", "--bypass-lock", str(after.folder)).split()
        undo()
        prove_intact(environment, source, target, tmp_path)


# ------------------------------------------------------------------------------------------------- Full disks


@pytest.mark.long
@pytest.mark.parametrize("which", first_short(["cache", "config"]))
def test_a_full_disk_is_named_and_the_run_after_there_is_room_again_succeeds(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table, which: str
) -> None:
    """borg keeps its caches and what it knows of repositories there. For a full /tmp Python finds another."""
    source.put({f"some/{number}": os.urandom(2_000) for number in range(50)})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    with table.attempt(f"the disk under /{which} is full"), small_disk(tmp_path / which):
        run_backup(environment).expect(0)
        source.put({"another": os.urandom(2_000)})
        with full(tmp_path / which):
            result = run_backup(environment).expect(2)
            assert is_named(result.lines), result.output
        prove_intact(environment, source, target, tmp_path)


def is_named(lines: Sequence[str]) -> bool:
    """Whether an error says that a disk is full, and what to do about it."""
    return any("error: " in line and "No space left" in line and "make room" in line for line in lines)
