"""Audit: a run succeeds only when the bucket holds what borg wrote."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from helpers import Backup, Bucket, run_backup, sample_objects, settings
from loading import mount_of_folder
from servers import SeaweedFS


@pytest.mark.parametrize(
    ("expected", "listed", "mistakes"),
    [
        ({}, {}, []),
        ({"config": 5, "data/0/1": 17}, {"config": 5, "data/0/1": 17}, []),
        ({"config": 5, "data/0/1": 17}, {"config": 5}, ["data/0/1 is missing"]),
        ({"data/0/1": 1700}, {"data/0/1": 1024}, ["data/0/1 has 1,024 of 1,700 bytes"]),
        ({"config": 5}, {"config": 5, "lock.exclusive/me": 0}, ["lock.exclusive/me was not removed"]),
        ({"a": 1, "b": 2}, {"b": 1, "c": 3}, ["a is missing", "b has 1 of 2 bytes", "c was not removed"]),
    ],
)
def test_every_difference_is_named(
    expected: dict[str, int], listed: dict[str, int], mistakes: list[str]
) -> None:
    assert backup.upload_mistakes(expected, listed) == mistakes


def test_the_lease_and_what_others_try_at_their_start_are_not_borgs(tmp_path: Path) -> None:
    """Another run that begins writes a probe and removes it; the mount may show it to the end."""
    sizes = {"config": 5, ".s3borgbackup-lease": 80, ".s3borgbackup-probe-b8d174fc5ef0": 1, "data/0/1": 17}
    for name, size_bytes in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size_bytes))
    store = backup.Store("first", "http://localhost:1", "bucket", "a/b", "KEY-ID", "KEY-SECRET")
    assert backup.repository_files(mount_of_folder(store, tmp_path)) == {"config": 5, "data/0/1": 17}
    listed = [backup.S3Object(f"a/b/{name}", size, datetime.now(UTC), "") for name, size in sizes.items()]
    listed += [backup.S3Object(f"a/b/{name}", 0, datetime.now(UTC), "") for name in ("", "data/", "data/0/")]
    client = SimpleNamespace(store=store, list_objects=lambda prefix: listed)
    assert backup.listed_files(client) == {"config": 5, "data/0/1": 17}


@pytest.mark.usefixtures("needs_fuse")
def test_a_segment_that_did_not_reach_the_bucket_fails_the_target(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """Borg and TigrisFS both end with 0, and a segment is not there: the run must say so and fail."""
    source.put(sample_objects(3, 20))
    env = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(env).expect(0)
    with Backup(env) as running:
        running.wait_for_line("borg create begins")
        target.delete("data/0/1")  # holds a commit only: borg does not read it again
        result = running.wait()
    assert result.exit_code == 2
    assert "data/0/1 is missing" in result.output


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
def test_what_was_not_removed_fails_the_target(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """An object in the repository that borg does not know of, such as a lock whose removal was lost."""
    source.put(sample_objects(4, 5))
    env = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(env).expect(0)
    with Backup(env) as running:
        running.wait_for_line("borg create begins")
        target.put({"data/0/999.tmp": b"left over"})
        result = running.wait()
    assert result.exit_code == 2
    assert "data/0/999.tmp was not removed" in result.output


@pytest.mark.usefixtures("needs_fuse")
def test_the_folder_of_a_lock_that_tigrisfs_uploads_too_late_is_removed(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """TigrisFS uploads a folder when it gets round to it, which may be after borg has removed its lock."""
    source.put(sample_objects(5, 5))
    env = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(env).expect(0)
    with Backup(env) as running:
        running.wait_for_line("borg create begins")
        target.put({"lock.exclusive.x1y2.tmp/": b""})
        running.wait().expect(0)
    assert [key for key in target.sizes() if key.startswith("lock.")] == []
