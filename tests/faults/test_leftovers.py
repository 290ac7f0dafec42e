"""What a crash or a visitor left in a repository or in borg's cache, met by a fresh mount."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from helpers import (
    BACKUP,
    Backup,
    Bucket,
    Repository,
    Result,
    first_short,
    run_backup,
    sample_objects,
    settings,
    tree,
)
from proof import Table, prove_intact
from proxy import Action, FaultProxy
from servers import WRITER, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

OURS, THEIRS = "s3borgbackup-deadbeef", "laptop@12345"
STALL_SECONDS = "20"  # should a lock block a run after all, it is not for long
SECONDS_FOR_A_FOREIGN_LOCK = 30


def exclusive(host: str) -> dict[str, bytes]:
    """An exclusive lock as it lies in a bucket: the folder's marker, and the file that names the owner."""
    return {"lock.exclusive/": b"", f"lock.exclusive/{host}.123-0": b""}


def half_taken(host: str) -> dict[str, bytes]:
    """What borg makes before it renames it to the lock."""
    folder = "lock.exclusive.abc12345.tmp/"
    return {folder: b"", f"{folder}{host}.1-0": b""}


def roster(kind: str, *hosts: str) -> dict[str, bytes]:
    """The file in which borg notes who reads ("shared") or writes."""
    return {"lock.roster": json.dumps({kind: [[host, 123, 0] for host in hosts]}).encode()}


OUR_LEFTOVERS = {
    "an exclusive lock": exclusive(OURS),
    "without its folder's marker": {f"lock.exclusive/{OURS}.123-0": b""},
    "a folder without its owner": {"lock.exclusive/": b""},
    "a half-taken lock": half_taken(OURS),
    "a shared lock": roster("shared", OURS),
    "all at once": {**exclusive(OURS), **half_taken(OURS), **roster("exclusive", OURS)},
    "a roster cut short": {"lock.roster": b'{"shared": [["s3bor'},
}


@pytest.fixture
def environment(server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path) -> dict[str, str]:
    """The configuration of a repository in which one run has worked."""
    source.put(sample_objects(21, 40))
    made = settings(
        server,
        tmp_path,
        source.name,
        {"first": {"path": target.name, "prune": "--keep-last=2"}},
        STALL_TIMEOUT=STALL_SECONDS,
    )
    run_backup(made).expect(0)
    source.put({"since": b"then"})
    return made


@pytest.fixture
def cache(environment: Mapping[str, str], tmp_path: Path) -> Path:
    """borg's cache of the repository, on a volume that outlives a container that is killed."""
    [config] = (tmp_path / "cache" / "borg").glob("*/config")
    return config.parent


def test_a_roster_that_vanishes_while_it_is_looked_at_is_none(target: Bucket) -> None:
    """borg removes it when its last holder leaves."""
    target.put(roster("shared", THEIRS))
    with FaultProxy(target.server.endpoint) as proxy:
        store = backup.Store(
            "first", proxy.endpoint, target.name, "", WRITER.access_key_id, WRITER.secret_access_key
        )
        client, lease = backup.S3Client(store), SimpleNamespace(enforced=True)
        assert backup.clear_leftovers(None, client, lease)
        proxy.add(lambda request: request.kind == "GET", Action.REFUSE, status=404, code="NoSuchKey")
        assert not backup.clear_leftovers(None, client, lease)
    target.delete("lock.roster")


@pytest.mark.long
@pytest.mark.parametrize("left", first_short(list(OUR_LEFTOVERS)))
def test_a_lock_that_a_crashed_run_left_holds_nobody_up(
    environment: Mapping[str, str], source: Bucket, target: Bucket, tmp_path: Path, table: Table, left: str
) -> None:
    target.put(OUR_LEFTOVERS[left])
    with table.attempt("a stale lock of ours in the bucket"):
        result = prove_intact(environment, source, target, tmp_path)
        names = " ".join(OUR_LEFTOVERS[left])
        assert ("a lock that borg left behind is removed" in result.output) == (OURS in names)
        assert [key for key in target.sizes() if key.startswith("lock.exclusive")] == []


@pytest.mark.long
def test_a_lock_that_a_crashed_run_left_in_borgs_cache_holds_nobody_up(
    environment: Mapping[str, str],
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    table: Table,
    cache: Path,
) -> None:
    for lock in ("lock.exclusive", "lock.exclusive.abc12345.tmp"):
        (cache / lock).mkdir()
        (cache / lock / f"{OURS}.1-0").touch()
    (cache / "lock.roster").write_bytes(roster("exclusive", OURS)["lock.roster"])
    with table.attempt("a stale lock of ours in borg's cache"):
        prove_intact(environment, source, target, tmp_path)
        assert [path for path in cache.glob("lock.*") if path.name != "lock.roster"] == []


@pytest.mark.long
def test_a_lock_in_borgs_cache_lives_as_long_as_the_run_that_took_it(
    environment: Mapping[str, str], target: Bucket, cache: Path
) -> None:
    """A run on a copy has another lease, and the same cache where two containers share its volume."""
    lock = cache / "lock.exclusive" / f"{OURS}.1-0"
    lock.parent.mkdir()
    lock.touch()
    before = target.contents()
    copy, lease = backup.Store("copy", "", "", "", "", ""), SimpleNamespace(enforced=False)
    with backup.cache_reserved(None, copy, lease, cache):
        result = run_backup(environment).expect(2)
    assert (
        "target-first: a run on another repository with the same id (a copy) uses borg's cache"
        in result.output
    )
    assert lock.exists()
    assert target.contents() == before


@pytest.mark.long
def test_a_lock_of_somebody_else_in_borgs_cache_is_named_and_the_advice_that_is_given_helps(
    environment: Mapping[str, str],
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    table: Table,
    cache: Path,
) -> None:
    (cache / "lock.exclusive").mkdir()
    (cache / "lock.exclusive" / f"{THEIRS}.1-0").touch()
    with table.attempt("somebody else's lock in borg's cache, broken as the error says"):
        result = run_backup(environment).expect(2)
        assert result.duration_seconds < SECONDS_FOR_A_FOREIGN_LOCK
        assert (cache / "lock.exclusive" / f"{THEIRS}.1-0").exists()
        type_what_it_says(result, environment, tmp_path / "bin")
        prove_intact(environment, source, target, tmp_path)


def type_what_it_says(result: Result, environment: Mapping[str, str], folder: Path) -> None:
    """Has a shell run the command line that the run's error gives."""
    command = re.search(r"backup\.py mount .*", next(line for line in result.lines if THEIRS in line))
    assert command, result.output
    folder.mkdir()
    (folder / "backup.py").symlink_to(BACKUP)
    path = f"{folder}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", command[0]],
        env={**environment, "PATH": path},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.long
@pytest.mark.leaves_lock
@pytest.mark.parametrize("kind", first_short(["exclusive", "shared"]))
def test_a_lock_of_somebody_else_is_named_and_the_advice_that_is_given_helps(
    environment: Mapping[str, str], source: Bucket, target: Bucket, tmp_path: Path, table: Table, kind: str
) -> None:
    """It may be a person at work, so it is left alone; ours that lie beside it are none of that person's."""
    theirs = exclusive(THEIRS) if kind == "exclusive" else roster("shared", OURS, THEIRS)
    target.put(theirs)
    with table.attempt(f"somebody else's {kind} lock, broken as the error says"):
        result = run_backup(environment).expect(2)
        assert result.duration_seconds < SECONDS_FOR_A_FOREIGN_LOCK
        mount_point = tmp_path / "data" / "target-first"
        assert f"backup.py mount target-first && borg break-lock {mount_point}" in result.output
        assert {key: target.get(key) for key in theirs} == theirs
        type_what_it_says(result, environment, tmp_path / "bin")
        prove_intact(environment, source, target, tmp_path)


INDEX_FILES = ("hints.", "index.", "integrity.")


@pytest.mark.long
@pytest.mark.parametrize(
    ("missing", "older"),
    first_short([("hints.", True), ("index.", True), ("integrity.", True), ("hints.", False)]),
)
def test_an_index_that_reached_the_bucket_in_part_is_rebuilt(
    environment: dict[str, str],
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    table: Table,
    missing: str,
    older: bool,
) -> None:
    """TigrisFS uploads the three files in any order, and deletes the older ones in any order."""
    run_backup(environment).expect(0)
    repository = Repository.download(target, tmp_path / "local")
    before = set(target.sizes())
    repository.borg("prune", "--keep-last=1", str(repository.folder))
    after = {key: body for key, body in tree(repository.folder).items() if not key.startswith("lock.")}
    new = {key: body for key, body in after.items() if key not in before and not key.startswith(missing)}
    assert len([key for key in new if key.startswith(INDEX_FILES)]) == 2, "of the three files of the index"
    target.put(new)
    target.delete(*([] if older else [key for key in before if key.startswith(INDEX_FILES)]))
    with table.attempt("an index that was uploaded in part"):
        prove_intact(environment, source, target, tmp_path)


@pytest.mark.long
def test_an_interrupted_init_is_made_anew(
    environment: Mapping[str, str], source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    """`config` is what `borg init` needs first and we upload last."""
    local = Repository(tmp_path / "local")
    local.borg("init", "-e", "repokey-blake2", str(local.folder))
    target.clear()
    target.put({key: body for key, body in tree(local.folder).items() if key != "config"})
    with table.attempt("an init that did not reach its end"):
        result = prove_intact(environment, source, target, tmp_path)
        assert "interrupted `borg init`" in result.output


def small_repository(environment: Mapping[str, str], source: Bucket, target: Bucket) -> None:
    """A repository with one archive that takes no more than a new one."""
    target.clear()
    source.clear()
    source.put({"small": b"small"})
    run_backup(environment).expect(0)
    assert sum(target.sizes().values()) < backup.UNFINISHED_MAX_BYTES


@pytest.mark.long
def test_a_small_repository_that_lost_its_index_keeps_its_archives(
    environment: Mapping[str, str], source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    small_repository(environment, source, target)
    target.delete(*[key for key in target.sizes() if key.startswith(INDEX_FILES)])
    with table.attempt("the index of a small repository is gone"):
        prove_intact(environment, source, target, tmp_path)
        assert len(Repository.download(target, tmp_path / "two").archives()) == 2


@pytest.mark.long
def test_a_small_repository_without_its_config_is_not_removed(
    environment: Mapping[str, str], source: Bucket, target: Bucket, table: Table
) -> None:
    """It holds more than an init writes."""
    small_repository(environment, source, target)
    target.delete("config")
    before = target.contents("data/")
    with table.attempt("the config of a small repository is gone"):
        run_backup(environment).expect(2)
        assert target.contents("data/") == before


@pytest.mark.long
def test_a_repository_that_was_deleted_in_a_hurry_is_not_taken_for_an_interrupted_init(
    environment: Mapping[str, str], target: Bucket, table: Table
) -> None:
    """Without its config it is no repository any more, but it holds too much to be removed unasked."""
    before = target.sizes()
    assert sum(before.values()) > 100_000
    target.delete("config")
    with table.attempt("the config of a large repository is gone"):
        run_backup(environment).expect(2)
        left = {key: size for key, size in target.sizes().items() if key.startswith("data/")}
        assert left == {key: size for key, size in before.items() if key.startswith("data/")}


# ---------------------------------------------------------------------------------------- Beside the catalog


@pytest.mark.long
def test_what_a_killed_run_left_beside_the_catalog_goes_when_nobody_can_be_at_work_there_any_more(
    environment: Mapping[str, str], source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    """Another run on the same volume may be: its folder is not touched for a day."""
    folder = tmp_path / "cache" / "s3borgbackup"
    [catalog] = folder.iterdir()
    with table.attempt("SIGKILL while there is a folder beside the catalog"):
        for _ in range(2):
            with Backup({**environment, "LEASE_TTL": "10"}) as running:
                running.wait_for_line("[source] lists")
                running.send_signal(signal.SIGKILL)
                running.wait().expect(128 + signal.SIGKILL)
        young, old = set(folder.iterdir()) - {catalog}
        os.utime(old, (0, 0))
        prove_intact(environment, source, target, tmp_path)
        assert set(folder.iterdir()) == {catalog, young}
