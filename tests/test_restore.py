"""Restoring: what comes back is what was there, nothing is overwritten unasked, and it can be interrupted."""

import errno
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

import backup
from faults.proxy import Action, FaultProxy
from helpers import (
    BACKUP,
    Backup,
    Bucket,
    Result,
    run_backup,
    sample_objects,
    settings,
    tree,
    wait_until,
    with_target,
    with_target_secrets,
)
from loading import load_settings
from servers import READER, WRITER, SeaweedFS

LEASE = ".s3borgbackup-lease"


@dataclass
class Site:
    """A configuration with one target, and the buckets behind it; `destination` is empty."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket
    destination: Bucket
    folder: Path

    def restore(self, *words: str, environment: Mapping[str, str] | None = None) -> Result:
        """Runs `restore first`."""
        return run_backup(environment or self.environment, "restore", "first", *words)

    def back_up(self) -> str:
        """Makes an archive; returns its name."""
        result = run_backup(self.environment).expect(0)
        return next(line for line in result.lines if line.startswith("first ")).split()[-1]

    def archive_by_hand(self, path: str) -> None:
        """Makes an archive `by-hand`, of a folder or file, with borg."""
        command = [sys.executable, str(BACKUP), "borg", "first", "create", "::by-hand", path]
        subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, check=True)

    def worst_day(self) -> dict[str, str]:
        """The configuration of a new machine: the target, with keys that may only read, and nothing else."""
        keys = {"access_key_id": READER.access_key_id, "secret_access_key": READER.secret_access_key}
        names = ("PATH", "HOME", "TMPDIR", "TARGETS", "TARGET_SECRETS")
        known = {name: self.environment[name] for name in names}
        return with_target_secrets(known, "first", **keys)


def make_site(server: SeaweedFS, new_bucket: Callable[..., Bucket], folder: Path) -> Site:
    """A site with empty buckets on a server."""
    source, target, destination = (
        new_bucket(purpose, on=server) for purpose in ("source", "target", "destination")
    )
    keys = {
        "RESTORE_ACCESS_KEY_ID": WRITER.access_key_id,
        "RESTORE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
    }
    environment = settings(server, folder, source.name, {"first": target.name}, **keys)
    return Site(environment, source, target, destination, folder)


@pytest.fixture
def site(server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, needs_fuse: None) -> Site:
    """A site with empty buckets."""
    return make_site(server, new_bucket, tmp_path)


# ---------------------------------------------------------------------------------------------- What is meant


def archive(name: str, started: datetime) -> backup.Archive:
    """One as `borg list` shows it."""
    return backup.Archive.parse({"name": name, "time": f"{started.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}"})


ARCHIVES = [
    archive(name, datetime.fromisoformat(name[-19:]))
    for name in (
        "other-2025-01-01T00:00:00",
        "label-2025-01-02T03:00:05",
        "label-2025-01-03T03:00:05",
        "label-two-2025-01-04T03:00:05",
    )
]


@pytest.mark.parametrize(
    ("label", "name", "at", "chosen"),
    [
        ("label", "", "", "label-2025-01-03T03:00:05"),
        ("label-two", "", "", "label-two-2025-01-04T03:00:05"),
        ("nothing", "", "", "label-two-2025-01-04T03:00:05"),
        ("label", "other-2025-01-01T00:00:00", "", "other-2025-01-01T00:00:00"),
        ("label", "", "2025-01-02", "label-2025-01-02T03:00:05"),
        ("label", "", "2025-01-02T03:00", "label-2025-01-02T03:00:05"),
        ("label", "", "2025-01-03 03:00", "label-2025-01-03T03:00:05"),
        ("label", "", "2025-01-03T03:00:04", "label-2025-01-02T03:00:05"),
        ("label", "", "2025-01-03T03:00:05", "label-2025-01-03T03:00:05"),
        ("label", "", "2026-01-01", "label-2025-01-03T03:00:05"),
        ("nothing", "", "2025-01-01", "other-2025-01-01T00:00:00"),
    ],
)
def test_the_archive_is_the_newest_of_the_label_until_the_time(
    label: str, name: str, at: str, chosen: str
) -> None:
    """A time without seconds means the end of its minute, one without hours the end of its day."""
    until = backup.end_of_time(at) if at else None
    assert backup.choose_archive(ARCHIVES, label, name, until)[0].name == chosen


def test_a_time_may_name_its_zone() -> None:
    assert backup.end_of_time("2025-01-02T03:00Z") == datetime(2025, 1, 2, 3, 1, tzinfo=UTC)
    assert backup.end_of_time("2025-01-02T03:00:00+02:00") == datetime(2025, 1, 2, 1, 0, 1, tzinfo=UTC)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our time zone: its clocks are set back on 2025-10-26 at 3, and forward on 2025-03-30 at 2."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("at", "end"), [("2025-10-26", "2025-10-26T23:00+00:00"), ("2025-03-30", "2025-03-30T22:00+00:00")]
)
def test_a_day_may_have_23_or_25_hours(at: str, end: str) -> None:
    assert backup.end_of_time(at) == datetime.fromisoformat(end)


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("name", "start"),
    [("x-2025-10-26T02:30:05", "2025-10-26T00:30:06"), ("x-2025-10-26T02:10:03", "2025-10-26T01:10:04")],
)
def test_a_local_time_that_comes_twice_is_told_apart(name: str, start: str) -> None:
    started = datetime.fromisoformat(start).replace(tzinfo=UTC)
    assert archive(name, started).start == started - timedelta(seconds=1)


@pytest.mark.parametrize(
    ("name", "at", "words"),
    [
        ("label-2025-01-03T03:00:50", "", "`backup.py list` shows what there is."),
        ("", "2024-12-31", "The oldest archive is of 2025-01-01 00:00:00 "),
    ],
)
def test_where_no_archive_is_meant_it_is_said_how_to_find_one(name: str, at: str, words: str) -> None:
    until = backup.end_of_time(at) if at else None
    with pytest.raises(backup.BackupError) as error:
        backup.choose_archive(ARCHIVES, "label", name, until)
    assert words in str(error.value)


def plan_of(
    folder: Path, entries: Iterable[tuple[str, str]], manifest: Iterable[backup.S3Object] = ()
) -> backup.Plan:
    """What is known when an archive's list, of paths and kinds, was read; each file has a byte."""
    plan = backup.Plan(folder / "plan")
    rows = enumerate(entries)
    plan.insert("entries", ((path.encode(), place, kind, 1, 0, True) for place, (path, kind) in rows))
    plan.add(manifest)
    plan.arrange(Path("/data/source"))
    return plan


@pytest.mark.parametrize(
    ("paths", "prefix"),
    [
        ([("data/source", "d"), ("data/source/a", "-")], "data/source/"),
        ([("srv/x/source", "d"), ("srv/x/source/a/b", "-")], "srv/x/source/"),
        ([("data/source/photos", "d"), ("data/source/photos/a", "-")], "data/source/"),
        ([("photos", "d"), ("photos/a", "-")], ""),
        ([("data/source", "d"), ("data/sourceless/a", "-")], ""),
        ([("file", "-")], ""),
        ([], "data/source/"),
    ],
)
def test_keys_begin_below_the_folder_that_was_archived(
    tmp_path: Path, paths: list[tuple[str, str]], prefix: str
) -> None:
    """Wherever the source was mounted then; an archive that somebody made by hand may hold anything."""
    assert plan_of(tmp_path, paths).prefix == prefix


CONTENTS = [
    ("data/source", "d"),
    ("data/source/photos", "d"),
    ("data/source/photos/a", "-"),
    ("data/source/photos/b", "-"),
    ("data/source/photos2", "-"),
    ("data/source/empty", "d"),
    ("data/source/link", "l"),
    ("data/source/../evil", "-"),
]


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        ((), {"photos/a", "photos/b", "photos2", "empty/", "link", "../evil"}),
        (("photos",), {"photos/a", "photos/b"}),
        (("photos/",), {"photos/a", "photos/b"}),
        (("/photos/a", "photos2"), {"photos/a", "photos2"}),
        (("data/source/photos/b",), {"photos/b"}),
        (("empty",), {"empty/"}),
    ],
)
def test_a_path_is_a_key_or_a_folder(tmp_path: Path, paths: tuple[str, ...], keys: set[str]) -> None:
    plan = plan_of(tmp_path, CONTENTS)
    plan.select(paths)
    assert {item.key for item in plan.items()} == keys
    assert plan.sums("warning IS NOT NULL")[0] == ("link" in keys)


def test_a_path_that_names_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(backup.BackupError) as error:
        plan_of(tmp_path, CONTENTS).select(("photos", "fotos"))
    assert str(error.value).startswith("the archive holds nothing at 'fotos'. A PATH is an object's key or a")


KEEP, WRITE, DIFFERENT, UNKNOWN = (backup.Fate(fate) for fate in ("there", "write", "different", "unknown"))


@pytest.mark.parametrize(
    ("archived", "there", "fate"),
    [
        ((5, ""), (None, "", None), WRITE),
        ((5, ""), (0, "", None), WRITE),
        ((5, ""), (6, "", 100), DIFFERENT),
        ((5, ""), (5, "", 100), KEEP),
        ((5, ""), (5, "", 101), UNKNOWN),
        ((5, ""), (5, "x", None), UNKNOWN),
        ((5, "x"), (5, "x", None), KEEP),
        ((5, "x"), (5, "", 100), KEEP),
        ((5, "y"), (5, "x", None), UNKNOWN),
        ((5, "x"), (4, "x", None), UNKNOWN),
        ((5, ""), (4, "", 100), UNKNOWN),
        ((0, ""), (0, "", None), KEEP),
        ((0, ""), (1, "", None), DIFFERENT),
    ],
)
def test_what_is_there_decides_what_is_done(
    tmp_path: Path, archived: tuple[Any, ...], there: tuple[Any, ...], fate: backup.Fate
) -> None:
    """By size and ETag, and time: a file gets that of the archive, here 100, when it is complete."""
    plan = backup.Plan(tmp_path / "plan")
    columns = "key, modified, size, etag, there_size, there_etag, there_modified"
    plan.execute(f"INSERT INTO items ({columns}) VALUES (x'6b', 100, ?, ?, ?, ?, ?)", [*archived, *there])
    plan.execute(backup.FIRST_FATES)
    assert [found.fate for found in plan.items()] == [fate]


def etag_of(body: bytes, part_bytes: int) -> str:
    """The ETag of what is uploaded in such parts."""
    parts = [hashlib.md5(body[at : at + part_bytes]).digest() for at in range(0, len(body), part_bytes)]
    return f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"


LARGE = random.Random(25).randbytes(25 * 2**20 + 1)


@pytest.mark.parametrize(
    ("body", "etag", "trusted", "fate"),
    [
        (b"12345", hashlib.md5(b"12345").hexdigest(), True, backup.Fate.KEEP),
        (b"12345", hashlib.md5(b"54321").hexdigest(), True, backup.Fate.DIFFERENT),
        (b"12345", hashlib.md5(b"12345").hexdigest(), False, backup.Fate.KEEP),
        (b"12345", hashlib.md5(b"54321").hexdigest(), False, backup.Fate.UNKNOWN),
        (b"12345", etag_of(b"12345", 5), True, backup.Fate.KEEP),
        (b"12345", etag_of(b"54321", 5), True, backup.Fate.UNKNOWN),
        (b"12345", hashlib.md5(b"of other parts").hexdigest() + "-3", True, backup.Fate.UNKNOWN),
        (b"12345", "", True, backup.Fate.UNKNOWN),
        *((LARGE, etag_of(LARGE, mib * 2**20), True, backup.Fate.KEEP) for mib in (5, 8, 16, 25)),
        (LARGE[:-1], etag_of(LARGE[:-1], 5 * 2**20), True, backup.Fate.KEEP),
        (LARGE, etag_of(LARGE, 7 * 2**20), True, backup.Fate.UNKNOWN),
        (LARGE, hashlib.md5(LARGE).hexdigest(), True, backup.Fate.KEEP),
    ],
)
def test_an_etag_tells_content_where_it_is_an_md5(
    body: bytes, etag: str, trusted: bool, fate: backup.Fate
) -> None:
    """Of the content, or of its parts, where these are of a usual size."""
    found = backup.Item("k", "p", len(body), 100, there_bytes=len(body), there_etag=etag)
    assert backup.fate_by_etag(found, io.BytesIO(body), trusted) is fate


@pytest.mark.parametrize(
    ("there", "fate"),
    [
        (b"12345", backup.Fate.KEEP),
        (b"123", backup.Fate.WRITE),
        (b"124", backup.Fate.DIFFERENT),
        (b"123456", backup.Fate.DIFFERENT),
    ],
)
def test_a_beginning_counts_as_half_written(there: bytes, fate: backup.Fate) -> None:
    assert backup.fate_by_content([there[:2], there[2:]], io.BytesIO(b"12345")) is fate


@pytest.mark.parametrize(
    ("size_bytes", "part_mib"),
    [(16 * 2**20 + 1, 16), (10_000 * 16 * 2**20, 16), (10_000 * 16 * 2**20 + 1, 17), (5 * 2**40, 525)],
)
def test_parts_are_equal_and_no_more_than_s3_takes(size_bytes: int, part_mib: int) -> None:
    assert backup.part_bytes(size_bytes) == part_mib * 2**20
    assert -(-size_bytes // backup.part_bytes(size_bytes)) <= 10_000


# ----------------------------------------------------------------------------------------------- Command line


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["first"], "one of the arguments --to --to-bucket is required"),
        (["first", "--to", "x", "--to-bucket", "y"], "--to-bucket: not allowed with argument --to"),
        (["first", "--to", "x", "--at", "2025-01-01", "--archive", "y"], "not allowed with"),
        (["first", "--to", "x", "--at", "yesterday"], "write a time such as 2025-01-31T03:00"),
        (["first", "--to", "x", "--at", "9999-12-31"], "write a time such as"),
        (["first", "--to", "x", "--at", ""], "argument --at: "),
        (["first", "--to", "x", "--archive", ""], "leave it out for the newest"),
        (["first", "--to", ""], "argument --to: write a path"),
        (["first", "/", "--to", "x"], "leave it out to restore all"),
        (["--to", "x"], "required: NAME"),
        (["first", "--to", "x", "--overwritte"], "unrecognized arguments: --overwritte"),
    ],
)
def test_a_wrong_command_line_is_explained(words: list[str], mistake: str) -> None:
    with pytest.raises(backup.ConfigurationError) as error:
        backup.parse_arguments(["restore", *words])
    assert mistake in str(error.value)


def loaded(bucket: tuple[str, str] | None = None, **variables: str) -> backup.Settings:
    """Settings with one target, `first`, in bucket `backups:borg`, and these variables."""
    target = {"endpoint": "http://127.0.0.1:1", "path": "backups:borg"}
    secrets = {"access_key_id": "a", "secret_access_key": "b", "borg_passphrase": "c"}
    given = {"TARGETS": json.dumps({"first": target}), "TARGET_SECRETS": json.dumps({"first": secrets})}
    return load_settings({**given, **variables}, False, bucket)


SOURCE = {
    "SOURCE_ENDPOINT": "http://127.0.0.1:1",
    "SOURCE_PATH": "things",
    "SOURCE_ACCESS_KEY_ID": "source-id",
    "SOURCE_SECRET_ACCESS_KEY": "source-secret",
    "SOURCE_REGION": "source-region",
}


def destination(location: str, **variables: str) -> backup.Store:
    """Where `restore --to-bucket` writes."""
    _, arguments = backup.parse_arguments(["restore", "first", "--to-bucket", location])
    return loaded(arguments["bucket"], **variables).destination


def test_a_destination_is_reached_like_the_source_unless_told_otherwise() -> None:
    store = destination("things:photos/", **SOURCE)
    assert (store.bucket, store.prefix, store.region) == ("things", "photos", "source-region")
    assert store.access_key_id == "source-id"
    assert store.setting("access_key_id") == "RESTORE_ACCESS_KEY_ID (now SOURCE_ACCESS_KEY_ID)"
    keys = {"RESTORE_ACCESS_KEY_ID": "own-id", "RESTORE_SECRET_ACCESS_KEY": "own-secret"}
    store = destination("things", **SOURCE, **keys)
    assert (store.endpoint, store.access_key_id) == ("http://127.0.0.1:1", "own-id")
    assert store.setting("access_key_id") == "RESTORE_ACCESS_KEY_ID"
    store = destination("things", **SOURCE, RESTORE_ENDPOINT="http://elsewhere/")
    assert (store.endpoint, store.region, store.name) == ("http://elsewhere", None, "destination")


@pytest.mark.parametrize(
    ("variables", "location", "mistake"),
    [
        ({}, "things", "RESTORE_ENDPOINT: is missing"),
        ({}, "things", "RESTORE_SECRET_ACCESS_KEY: is missing"),
        (SOURCE, "a/b", "--to-bucket: 'a/b' is not a bucket name"),
        (SOURCE, "", "--to-bucket: '' is not a bucket name"),
        (SOURCE, "backups", '--to-bucket: overlaps TARGETS "first"."path"'),
        (SOURCE, "backups:borg/data", '--to-bucket: overlaps TARGETS "first"."path"'),
        ({**SOURCE, "RESTORE_ACCESS_KEY_ID": "x"}, "things", "one is missing; write both"),
        ({**SOURCE, "RESTORE_ENDPOINT": "x"}, "things", "RESTORE_ENDPOINT: is not an http(s) URL"),
    ],
)
def test_a_destination_that_cannot_be_is_refused(
    variables: Mapping[str, str], location: str, mistake: str
) -> None:
    """A repository least of all may be restored into."""
    with pytest.raises(backup.ConfigurationError) as error:
        destination(location, **variables)
    assert mistake in str(error.value)


def test_a_destination_beside_a_repository_is_fine() -> None:
    assert destination("backups:restored", **SOURCE).prefix == "restored"


# ------------------------------------------------------------------------------------------------ To a folder


def test_a_folder_gets_every_object_and_later_only_what_it_lacks(site: Site) -> None:
    """Unusual keys, empty and large objects; owned by who restores, with their times, whatever TZ says."""
    objects = {**sample_objects(21, 60), "large": os.urandom(3_000_000)}
    site.source.put(objects)
    site.source.put({"nothing in it/": b""})
    site.back_up()
    folder = site.folder / "new" / "restored"
    site.restore("--to", str(folder), environment={**site.environment, "TZ": "America/New_York"}).expect(0)
    assert tree(folder) == objects
    assert (folder / "nothing in it").is_dir()
    for path, mode in ((folder / "large", 0o644), (folder / "nothing in it", 0o755)):
        status = path.stat()
        assert (status.st_uid, status.st_mode & 0o777) == (os.getuid(), mode)
    archived = site.source.client.head_object(Bucket=site.source.name, Key="large")["LastModified"]
    assert int((folder / "large").stat().st_mtime) == int(archived.timestamp())
    before = {path: path.stat().st_ctime_ns for path in folder.rglob("*") if path.is_file()}
    (folder / "plain.txt").unlink()
    result = site.restore("--to", str(folder)).expect(0)
    assert "restored 1 object" in result.output
    assert f"; {len(objects)} were there already" in result.output  # the empty folder is an object, too
    after = {path: path.stat().st_ctime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before[path]} == {folder / "plain.txt"}
    assert tree(folder) == objects


def test_on_the_worst_day_a_passphrase_and_a_key_that_may_read_are_enough(site: Site) -> None:
    """Nothing is configured but the target; the source was mounted elsewhere; nothing is written to it."""
    site.source.put({"a/b": b"1", "c": b"2"})
    site.back_up()
    before = site.target.contents()
    result = site.restore("a", "--to", str(site.folder / "out"), environment=site.worst_day()).expect(0)
    assert tree(site.folder / "out") == {"a/b": b"1"}
    assert "without the lease" in result.output
    server = {"RESTORE_ENDPOINT": site.source.server.endpoint}
    keys = {name: site.environment[name] for name in site.environment if name.startswith("RESTORE_")}
    environment = {**site.worst_day(), **server, **keys}
    words = ("--to-bucket", site.destination.name)
    assert "restored 2 objects" in site.restore(*words, environment=environment).expect(0).output
    assert "restored 0 objects" in site.restore(*words, environment=environment).expect(0).output
    assert site.destination.contents() == site.source.contents()
    assert site.target.contents() == before


@pytest.mark.long
def test_an_archive_is_chosen_by_name_or_time(site: Site) -> None:
    archives, contents = [], [b"first", b"second"]
    for content in contents:
        site.source.put({"object": content})
        archives.append(site.back_up())
    time = archives[0][-len("2025-01-31T03:00:00") :]
    ways = (["--archive", archives[0]], ["--at", time], ["--at", "2999-12-31"], [])
    for number, words in enumerate(ways):
        folder = site.folder / f"out{number}"
        result = site.restore("--to", str(folder), *words).expect(0)
        assert tree(folder) == {"object": contents[number // 2]}
        assert f"archive {archives[number // 2]} of target first" in result.output
    result = site.restore("--to", str(site.folder / "out9"), "--archive", archives[0][:-1]).expect(2)
    assert "`backup.py list` shows what there is." in result.output


@pytest.mark.long
def test_a_path_without_objects_restores_nothing(site: Site) -> None:
    site.source.put({"photos/a": b"1"})
    site.back_up()
    result = site.restore("photos", "pohtos", "--to", str(site.folder / "out")).expect(2)
    assert "holds nothing at 'pohtos'. A PATH is an object's key or a folder of keys" in result.output
    assert tree(site.folder / "out") == {}


@pytest.mark.long
def test_files_are_not_overwritten_unasked(site: Site) -> None:
    """Not one is written then; what is there with the same content is no hindrance, half of it neither.

    What is complete, but has not got its time because a restore was killed, gets it.
    """
    objects = {"empty": b"", **{f"{number}": os.urandom(1000) for number in range(30)}}
    site.source.put(objects)
    site.back_up()
    archived = site.source.client.head_object(Bucket=site.source.name, Key="0")["LastModified"].timestamp()
    folder = site.folder / "out"
    folder.mkdir()
    there = {
        "0": objects["0"],
        "1": objects["1"][:500],
        "2": b"",
        **{f"{number}": b"x" * 1000 for number in range(3, 28)},
        "empty": b"",
        "foreign": b"f",
    }
    for name, content in there.items():
        (folder / name).write_bytes(content)
        os.utime(folder / name, (1, 1))
    result = site.restore("--to", str(folder)).expect(2)
    assert "'3' is there with other content" in result.output
    assert f"25 objects in {folder} would be overwritten; nothing was written" in result.output
    assert result.output.count("is there with other content") == 25
    assert tree(folder) == there
    result = site.restore("--to", str(folder), "--dry-run").expect(2)
    assert re.search(r"^refuse +1 kB  3$", result.output, re.MULTILINE)
    assert re.search(r"^there +1 kB  0$", result.output, re.MULTILINE)
    assert re.search(r"^write +1 kB  29$", result.output, re.MULTILINE)
    assert tree(folder) == there
    assert "overwrite: 25 objects" in site.restore("--to", str(folder), "--dry-run", "--overwrite").output
    assert {path.stat().st_mtime for path in folder.iterdir()} == {1}
    site.restore("--to", str(folder), "--overwrite").expect(0)
    times = {name: (folder / name).stat().st_mtime for name in ("0", "empty", "foreign")}
    assert times == {"0": archived, "empty": pytest.approx(archived, abs=2), "foreign": 1}
    assert tree(folder) == {**objects, "foreign": b"f"}


@pytest.mark.long
def test_a_dry_run_changes_nothing(site: Site) -> None:
    site.source.put({"a": b"1", "b": b"22"})
    site.back_up()
    before = site.target.contents()
    result = site.restore("--to", str(site.folder / "out"), "--dry-run").expect(0)
    assert "write: 2 objects, 3 B" in result.output
    assert not (site.folder / "out").exists()
    result = site.restore("--to-bucket", site.destination.name, "--dry-run").expect(0)
    assert "write: 2 objects, 3 B" in result.output
    assert site.destination.sizes() == {}
    assert {key: body for key, body in site.target.contents().items() if key != LEASE} == before


@pytest.mark.long
def test_names_that_a_disk_cannot_take_are_named_and_the_others_restored(site: Site) -> None:
    """S3 may have keys that no disk can have; what is no file of the archive is named, too."""
    folder = site.folder / "tree"
    (folder / "data" / "source").mkdir(parents=True)
    (folder / "data" / "source" / "fine").write_bytes(b"1")
    (folder / "data" / "source" / "link").symlink_to("fine")
    site.source.put({"fine": b"1"})
    site.back_up()
    site.archive_by_hand(str(folder / "data" / "source"))
    out = site.folder / "out"
    (out / "in the way").mkdir(parents=True)
    restored = site.restore("--archive", "by-hand", "--to", str(out)).expect(1)
    assert "'link' is no plain file, and is left out" in restored.output
    assert tree(out) == {"fine": b"1"}
    (out / "fine").unlink()
    (out / "fine").mkdir()
    restored = site.restore("--archive", "by-hand", "--to", str(out)).expect(1)
    assert "'fine' could not be restored: File exists" in restored.output
    assert not list((out / "fine").iterdir())


@pytest.mark.parametrize(
    ("name", "start", "time"),
    [
        ("x-2026-01-02T03:04:05", "2026-01-02T03:04:06.2", "2026-01-02T03:04:05"),
        ("x-2026-01-02T03:04:05", "2026-01-02T04:04:05.9", "2026-01-02T04:04:05.9"),
        ("x-2026-01-02T03:04:05", "2026-01-02T03:04:04", "2026-01-02T03:04:04"),
        ("by-hand", "2026-01-02T03:04:06", "2026-01-02T03:04:06"),
    ],
)
def test_an_archive_is_of_the_time_in_its_name(name: str, start: str, time: str) -> None:
    """Unless that is another one: of a copy, or of another time zone."""
    found = archive(name, datetime.fromisoformat(start).astimezone())
    assert found.start == datetime.fromisoformat(time).astimezone()


def folder_of(plan: backup.Plan, root: Path) -> backup.ToFolder:
    """A place that was looked at."""
    report = backup.Report("id", "label", datetime.now(UTC))
    console = backup.Console(debug=False)
    runtime = backup.Runtime(loaded(), {}, console, backup.Stop(), 1000, report)
    place = backup.ToFolder(runtime, plan, root, dry_run=False)
    plan.find(place.there())
    return place


def test_a_long_name_hinders_no_other(tmp_path: Path) -> None:
    """255 bytes is what disks take; a bucket takes more, and so does TigrisFS."""
    root = tmp_path / "out"
    root.mkdir()
    plan = plan_of(tmp_path, [(f"data/source/{key}", "-") for key in ("x" * 256, "fine", "fine/below")])
    place = folder_of(plan, root)
    for found in list(plan.items()):
        place.write(found, io.BytesIO(b"1"))
    assert [found.key for found in plan.items("fate = 'left out'")] == ["fine/below", "x" * 256]
    assert tree(root) == {"fine": b"1"}


class SilentBorg:
    """Exports `stream`, and says that all went well."""

    repository = Path("/repository")

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def run(self, _: object, consume: Callable[[Any], None], **__: object) -> None:
        """Only `export-tar` is asked for."""
        consume(self._stream)


def exporting(tmp_path: Path, stream: IO[bytes], *names: str) -> backup.ToFolder:
    """A place for an archive of these files that borg exports like that."""
    plan = plan_of(tmp_path, [(name, "-") for name in names])
    plan.archive = "archive"
    plan.repository = SimpleNamespace(borg=SilentBorg(stream), target=loaded().targets[0])
    (tmp_path / "out").mkdir(exist_ok=True)
    return folder_of(plan, tmp_path / "out")


def test_borg_can_write_its_tar_file_to_the_end(tmp_path: Path) -> None:
    """It fills the last record up: what is behind the end marker may come when all objects were taken out."""
    content = bytes(backup.READ_BYTES // 8 - 3 * tarfile.BLOCKSIZE)  # the marker ends where a read does
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w|") as tar:
        member = tarfile.TarInfo("key")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    reading, writing = os.pipe()
    taken: list[str] = []

    def take() -> None:
        with os.fdopen(reading, "rb") as stream:
            place = exporting(tmp_path, stream, "key")
            place.export("compared", "1", lambda found, *_: taken.append(found.key))

    with ThreadPoolExecutor(1) as pool, os.fdopen(writing, "wb", buffering=0) as stream:
        work = pool.submit(take)
        stream.write(written.getvalue()[: backup.READ_BYTES // 8])
        wait_until(lambda: taken, 10, "all objects were taken out")
        time.sleep(0.2)
        stream.write(written.getvalue()[backup.READ_BYTES // 8 :])
        stream.close()
        work.result(10)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (0, "gave 0 of 3 objects"),
        (1, "'b' is missing"),
        (2, "'b' is missing"),
        (3, "'c' is missing"),
        (4, "'c' is missing"),
    ],
)
def test_an_export_that_ends_early_is_never_a_success(tmp_path: Path, blocks: int, words: str) -> None:
    """Nothing, a header alone, and between two objects; `a` is empty, the others are not."""
    written, names = io.BytesIO(), ("a", "b", "c")
    with tarfile.open(fileobj=written, mode="w|") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 0 if name == "a" else tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    broken = io.BytesIO(written.getvalue()[: blocks * tarfile.BLOCKSIZE])
    with pytest.raises(backup.BackupError) as error:
        exporting(tmp_path, broken, *names).export("compared", "1", lambda *_: None)
    assert words in str(error.value)
    whole = io.BytesIO(written.getvalue())
    exporting(tmp_path, whole, *names).export("compared", "1", lambda *_: None)


def test_names_that_differ_in_case_only_are_not_written_over_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that takes them for one, the second is named: what was not there before must not be there."""
    root = tmp_path / "out"
    root.mkdir()
    plan = plan_of(tmp_path, [("data/source/k", "-")])
    place = folder_of(plan, root)
    (root / "k").write_bytes(b"K")
    place.write(next(plan.items()), io.BytesIO(b"1"))
    assert f"'k' could not be restored: {os.strerror(errno.EEXIST)}" in capsys.readouterr().err
    assert (root / "k").read_bytes() == b"K"


# ------------------------------------------------------------------------------------------------ To a bucket


def requests(server: SeaweedFS, bucket: Bucket) -> dict[str, int]:
    """How many requests of each kind a bucket has answered."""
    counted: dict[str, int] = {}
    pattern = rf'^SeaweedFS_s3_request_total\{{.*bucket="{bucket.name}".*type="(\w+)"\}} (\S+)'
    for kind, number in re.findall(pattern, server.metrics(), re.MULTILINE):
        counted[kind] = counted.get(kind, 0) + int(float(number))
    return counted


def test_a_bucket_gets_every_object_once(
    new_bucket: Callable[..., Bucket], tmp_path: Path, needs_fuse: None
) -> None:
    """Every key as it was and no other; a second restore writes nothing, a third what is missing."""
    with SeaweedFS(tmp_path / "server", has_metrics=True) as server:
        site = make_site(server, new_bucket, tmp_path / "site")
        objects = {**sample_objects(22, 60), "large": os.urandom(34_000_000)}
        site.source.put(objects)
        site.source.put({"nothing in it/": b""})
        site.back_up()
        site.restore("--to-bucket", site.destination.name).expect(0)
        assert site.destination.contents() == objects
        assert set(site.destination.sizes()) == {*objects, "nothing in it/"}
        first = requests(server, site.destination)
        site.restore("--to-bucket", site.destination.name).expect(0)
        second = requests(server, site.destination)
        probes = 2  # whether it may be written to, and what it keeps
        assert second["PUT"] - first["PUT"] == probes
        # ETags tell; what SeaweedFS counts as GET is a HEAD for the headers of each.
        assert second["GET"] - first["GET"] < len(objects) + 10
        site.destination.delete("plain.txt", "large")
        deleted = requests(server, site.destination)
        result = site.restore("--to-bucket", site.destination.name).expect(0)
        third = requests(server, site.destination)
        assert third["PUT"] - deleted["PUT"] == probes + 1 + 3  # one object, and three parts
        assert f"restored 2 objects, 34 MB, to {site.destination.name}" in result.output
        assert site.destination.contents() == objects


@pytest.mark.long
def test_of_an_archive_only_what_is_asked_for_is_read(site: Site) -> None:
    site.source.put({"small": b"1", **{f"large/{number}": os.urandom(10_000_000) for number in range(4)}})
    site.back_up()
    with FaultProxy(site.target.server.endpoint) as proxy:
        environment = with_target(site.environment, "first", endpoint=proxy.endpoint)
        out = site.folder / "out"
        site.restore("small", "--to", str(out), environment=environment).expect(0)
        assert tree(out) == {"small": b"1"}
        few = proxy.count(lambda request: request.kind == "GET" and "/data/" in request.path)
        site.restore("--to", str(out), environment=environment).expect(0)
        many = proxy.count(lambda request: request.kind == "GET" and "/data/" in request.path) - few
        assert few < many / 3


def test_a_prefix_of_a_bucket_is_restored_into(site: Site) -> None:
    site.source.put({"photos/a": b"1", "photos/b": b"2", "c": b"3"})
    site.back_up()
    site.destination.put({"photos/a": b"another", "x/y/photos/b": b"2"})
    site.restore("photos/", "--to-bucket", f"{site.destination.name}:x/y").expect(0)
    expected = {"photos/a": b"another", "x/y/photos/a": b"1", "x/y/photos/b": b"2"}
    assert site.destination.contents() == expected


@pytest.mark.long
def test_objects_are_not_overwritten_unasked(site: Site) -> None:
    """All that would be overwritten are counted before anything is written."""
    objects = {**{f"{number}": os.urandom(1000) for number in range(30)}, "large": os.urandom(6_000_000)}
    site.source.put(objects)
    site.back_up()
    there = {
        "0": objects["0"],
        "1": objects["1"][:500],
        "2": b"",
        **{f"{number}": b"x" * 1000 for number in range(3, 28)},
        "foreign": b"f",
    }
    site.destination.put(there)
    result = site.restore("--to-bucket", site.destination.name).expect(2)
    assert "'3' is there with other content" in result.output
    assert "25 objects in" in result.output
    assert "would be overwritten; nothing was written" in result.output
    assert site.destination.contents() == there
    site.restore("--to-bucket", site.destination.name, "--overwrite").expect(0)
    assert site.destination.contents() == {**objects, "foreign": b"f"}


def test_where_etags_are_no_md5_a_dry_run_compares_content(site: Site) -> None:
    """As with SSE-KMS: it may not write a probe to find out."""
    site.source.put({"same": b"same", "other": b"other"})
    site.back_up()
    site.destination.put({"same": b"same", "other": b"OTHER"})
    with FaultProxy(site.source.server.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "LIST", Action.OTHER_ETAGS)
        environment = {**site.environment, "RESTORE_ENDPOINT": proxy.endpoint}
        words = ("--to-bucket", site.destination.name, "--dry-run")
        result = site.restore(*words, environment=environment).expect(2)
    assert re.findall(r"^(\w+) .* (\w+)$", result.output, re.MULTILINE)[:2] == [
        ("refuse", "other"),
        ("there", "same"),
    ]


def test_large_objects_that_another_program_uploaded_are_recognised(site: Site) -> None:
    """In parts of another size, so that the ETag does not tell."""
    body = os.urandom(20_000_000)
    site.source.put({"large": body})
    site.back_up()
    client, name = site.destination.client, site.destination.name
    upload = client.create_multipart_upload(Bucket=name, Key="large")["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(body), 8 * 2**20), 1):
        part = body[start : start + 8 * 2**20]
        etag = client.upload_part(Bucket=name, Key="large", UploadId=upload, PartNumber=number, Body=part)[
            "ETag"
        ]
        parts.append({"ETag": etag, "PartNumber": number})
    client.complete_multipart_upload(
        Bucket=name, Key="large", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    before = client.head_object(Bucket=name, Key="large")
    result = site.restore("--to-bucket", name).expect(0)
    assert "1 were there already" in result.output
    after = client.head_object(Bucket=name, Key="large")
    assert (after["ETag"], after["LastModified"]) == (before["ETag"], before["LastModified"])


def test_large_objects_need_no_permission_to_list_uploads(site: Site) -> None:
    """The README does not ask for it (s3:ListBucketMultipartUploads)."""
    site.source.put({"large": os.urandom(17_000_000)})
    site.back_up()
    with FaultProxy(site.source.server.endpoint) as proxy:
        refused = proxy.add(
            lambda request: request.kind == "LIST" and "uploads" in request.query, Action.REFUSE
        )
        environment = {**site.environment, "RESTORE_ENDPOINT": proxy.endpoint}
        site.restore("--to-bucket", site.destination.name, environment=environment).expect(0)
    assert refused.hit
    assert site.destination.contents() == site.source.contents()


@pytest.mark.long
def test_a_whole_bucket_is_put_back_into_the_source(site: Site) -> None:
    """As after an accident: some objects are gone, one was overwritten, the rest is as it was."""
    objects = sample_objects(23, 40)
    site.source.put(objects)
    site.back_up()
    site.source.delete("plain.txt", *[key for key in objects if key.startswith("folder 1")])
    site.source.put({"100%.txt": b"by mistake", "new": b"n"})
    site.restore("--to-bucket", site.source.name).expect(2)
    result = site.restore("--to-bucket", site.source.name, "--overwrite").expect(0)
    assert site.source.contents() == {**objects, "new": b"n"}
    gone = 2 + sum(key.startswith("folder 1") for key in objects)
    assert f"restored {gone} objects" in result.output


@pytest.mark.long
@pytest.mark.parametrize("to_bucket", [True, False])
def test_user_metadata_comes_back(site: Site, to_bucket: bool) -> None:
    """Where it was archived (SOURCE_METADATA)."""
    metadata = {"colour": "blue", "owner": "Ann O'Nym"}
    site.source.client.put_object(Bucket=site.source.name, Key="a/b", Body=b"1", Metadata=metadata)
    site.source.put({"plain": b"2", "large": os.urandom(400_000)})
    run_backup({**site.environment, "SOURCE_METADATA": "true"}).expect(0)
    if to_bucket:
        site.restore("--to-bucket", site.destination.name).expect(0)
        head = site.destination.client.head_object(Bucket=site.destination.name, Key="a/b")
        assert head["Metadata"] == metadata
        assert site.destination.contents() == site.source.contents()
        return
    folder = site.folder / "out"
    result = site.restore("--to", str(folder))
    assert tree(folder) == site.source.contents()
    if result.exit_code == 0:
        assert os.getxattr(folder / "a" / "b", "user.colour") == b"blue"
    else:
        result.expect(1)
        assert "takes no user metadata" in result.output


@pytest.mark.long
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {
                "RESTORE_ACCESS_KEY_ID": READER.access_key_id,
                "RESTORE_SECRET_ACCESS_KEY": READER.secret_access_key,
            },
            "AccessDenied (403)",
        ),
        ({"RESTORE_ACCESS_KEY_ID": "unknown"}, "InvalidAccessKeyId (403)"),
        ({"RESTORE_ENDPOINT": "http://127.0.0.1:9"}, "Check RESTORE_ENDPOINT and the network."),
    ],
)
def test_a_destination_that_refuses_is_told_at_once(
    site: Site, variables: Mapping[str, str], words: str
) -> None:
    site.source.put({"a": b"1"})
    site.back_up()
    environment = {**site.environment, **variables}
    result = site.restore("--to-bucket", site.destination.name, environment=environment).expect(2)
    assert words in result.output
    assert "RESTORE_" in result.output
    assert result.duration_seconds < 20
    assert site.destination.sizes() == {}


def test_a_bucket_that_is_not_there_is_named(site: Site) -> None:
    site.source.put({"a": b"1"})
    site.back_up()
    result = site.restore("--to-bucket", "no-such-bucket").expect(2)
    assert "NoSuchBucket (404)" in result.output
    assert "correct --to-bucket" in result.output


# ---------------------------------------------------------------------------------------- Beside other things


@contextmanager
def long_backup(site: Site) -> Iterator[Backup]:
    """A run that is in the middle of `borg create`."""
    site.source.put({"large": os.urandom(40_000_000)})
    with Backup(with_target(site.environment, "first", compression="lzma,9")) as running:
        running.wait_for_line("borg create begins")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        yield running
        assert running.process.poll() is None, "the run was too short for the test"
    site.target.clear()


@pytest.mark.long
def test_a_restore_does_not_wait_for_a_backup(site: Site) -> None:
    """Its lease is held by the other one, which is said."""
    site.source.put({"a": b"1"})
    site.back_up()
    with long_backup(site):
        result = site.restore("--to", str(site.folder / "out")).expect(0)
        assert "another run works on this repository: a backup" in result.output
        assert "without the lease" in result.output
        assert tree(site.folder / "out") == {"a": b"1"}


@pytest.mark.long
def test_a_path_is_first_of_all_a_key(site: Site) -> None:
    """And else what borg shows, with the mount point's path before the key."""
    prefix = f"{site.environment['DATA_DIR']}/source".lstrip("/")
    site.source.put({"x": b"of the bucket", "y": b"y", f"{prefix}/x": b"of a folder"})
    site.back_up()
    site.restore(f"{prefix}/x", f"{prefix}/y", "--to", str(site.folder / "out")).expect(0)
    assert tree(site.folder / "out") == {f"{prefix}/x": b"of a folder", "y": b"y"}


def test_an_object_that_stands_for_a_folder_is_not_overwritten_unasked(site: Site) -> None:
    site.source.put({"a": b"1", "empty/": b""})
    site.back_up()
    site.destination.put({"empty/": b"somebody's"})
    with FaultProxy(site.source.server.endpoint) as proxy:
        environment = {**site.environment, "RESTORE_ENDPOINT": proxy.endpoint}
        site.restore("--to-bucket", site.destination.name, environment=environment).expect(0)
        writes = {request.key for request, _ in proxy.requests if request.kind == "PUT"}
    assert "a" in writes
    assert "empty/" not in writes


@pytest.mark.long
def test_an_archive_without_objects_is_a_warning(site: Site) -> None:
    """The source may have been emptied just before the day of the restore."""
    site.source.put({"a": b"1"})
    full = site.back_up()
    site.source.clear()
    run_backup(site.environment).expect(1)
    result = site.restore("--to", str(site.folder / "out")).expect(1)
    assert "this archive holds no objects; --at and --archive choose another" in result.output
    site.restore("--archive", full, "--to", str(site.folder / "out")).expect(0)


@pytest.mark.long
@pytest.mark.parametrize("command", ["restore", "verify"])
def test_a_backup_waits_for_a_restore_and_a_verification(site: Site, command: str) -> None:
    """So that it does not compact what is read: that one has the lease, where its key may write."""
    purpose = {"restore": "a restore", "verify": "`verify`"}[command]
    where = ["--to-bucket", site.destination.name] if command == "restore" else []
    site.source.put({"large": os.urandom(30_000_000)})
    site.back_up()
    with FaultProxy(site.source.server.endpoint) as proxy:
        slow = proxy.add(lambda request: request.key.startswith("data/"), Action.DELAY, seconds=60)
        environment = with_target(site.environment, "first", endpoint=proxy.endpoint)
        with Backup(environment, command, "first", *where) as running:
            wait_until(lambda: slow.hit, 60, "it reads the repository")
            assert json.loads(site.target.get(LEASE))["purpose"] == purpose
            result = run_backup({**site.environment, "LEASE_WAIT": "0"}).expect(75)
            assert f"another run works on this repository: {purpose}" in result.output
            with Backup({**site.environment, "LEASE_WAIT": "60"}) as waiting:
                waiting.wait_for_line("waiting to see whether that lives")
                proxy.clear()
                running.wait().expect(0)
                waiting.wait().expect(0)
    assert LEASE not in site.target.sizes()


def test_a_wrong_passphrase_is_told(site: Site) -> None:
    site.source.put({"a": b"1"})
    site.back_up()
    environment = with_target_secrets(site.environment, "first", borg_passphrase="wrong")
    result = site.restore("--to-bucket", site.destination.name, environment=environment).expect(2)
    assert 'Correct TARGET_SECRETS "first"."borg_passphrase".' in result.output
    assert "wrong" not in result.output.replace("passphrase", "")


@pytest.mark.long
def test_an_archive_of_plain_borg_is_restored(site: Site) -> None:
    """Made by hand, of whatever: its paths are the keys."""
    site.source.put({"a": b"1"})
    site.back_up()
    (site.folder / "photos").mkdir()
    (site.folder / "photos" / "one.jpg").write_bytes(b"jpg")
    site.archive_by_hand("photos")
    site.restore("--archive", "by-hand", "--to-bucket", site.destination.name).expect(0)
    assert site.destination.contents() == {"photos/one.jpg": b"jpg"}
