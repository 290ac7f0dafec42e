"""The commands that a person uses besides a backup: on real repositories, and on the worst day."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pexpect
import pytest

import backup
from helpers import (
    BACKUP,
    Backup,
    Bucket,
    Repository,
    Result,
    full,
    mounts_below,
    processes_with,
    run_backup,
    settings,
    skip_or_fail,
    small_disk,
    tree,
    wait_until,
    with_target,
    with_target_secrets,
)
from loading import load_settings
from servers import READER, SeaweedFS

LEASE = ".s3borgbackup-lease"


@dataclass
class Site:
    """A configuration with one target, and the buckets behind it."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket
    folder: Path

    def call(
        self, *words: str, environment: Mapping[str, str] | None = None, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs backup.py with standard output and error apart; `text` is its standard input."""
        return subprocess.run(
            [sys.executable, str(BACKUP), *words],
            env=dict(environment or self.environment),
            cwd=self.folder,
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def as_reader(self) -> dict[str, str]:
        """The same configuration with keys for the target that may only list and read."""
        keys = {
            "access_key_id": READER.access_key_id,
            "secret_access_key": READER.secret_access_key,
        }
        return with_target_secrets(self.environment, "first", **keys)

    def without_source(self) -> dict[str, str]:
        """The same configuration without the source."""
        return {name: value for name, value in self.environment.items() if not name.startswith("SOURCE_")}


def archive_of(result: Result) -> str:
    """The name of the archive that a run made."""
    row = next(line for line in result.lines if line.startswith("first "))
    return row.split()[-1]


@pytest.fixture
def site(server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, needs_fuse: None) -> Site:
    """A source with a few objects."""
    source.put({f"folder/{number}": os.urandom(1000) for number in range(10)})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    return Site(environment, source, target, tmp_path)


# ---------------------------------------------------------------------------------------------- What is meant


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ([], True),
        (["run"], True),
        (["--help"], True),
        (["ash"], False),
        (["rum"], False),
        (["borg"], False),
        (["borg", "--version"], False),
        (["borg", "list", "/data/target-first"], False),
        (["borg", "key", "export", "/data/target-first"], False),
        (["borg", "first", "list"], True),
        (["borg", "target-first", "list"], True),
        (["borg", "firts", "list"], True),
    ],
)
def test_borgs_own_command_lines_are_for_borg(words: list[str], ours: bool, tmp_path: Path) -> None:
    """`docker run ... s3borgbackup borg list /data/x` means what it always meant."""
    for name in ("run", "ash", "rum", "borg"):
        (tmp_path / name).touch(mode=0o755)
    program = "" if ours else str(tmp_path / words[0])
    assert backup.other_program(words, {"PATH": str(tmp_path)}) == program


def test_every_command_of_borg_is_known() -> None:
    """Otherwise its name would be taken for a target's."""
    text = subprocess.run(["borg", "--help"], capture_output=True, text=True, check=True).stdout
    listed = [
        line.split()[0] for line in text.partition("required arguments:")[2].splitlines() if line[4:5].strip()
    ]
    assert len(listed) > 15
    assert set(listed) - {"<command>"} <= set(backup.BORG_COMMANDS)


@pytest.mark.parametrize("name", ["first", "target-first"])
def test_a_target_is_called_by_its_name_or_its_stores(name: str) -> None:
    loaded = load_settings(
        {
            "TARGETS": json.dumps({"first": {"endpoint": "http://127.0.0.1:1", "path": "bucket"}}),
            "TARGET_SECRETS": json.dumps(
                {"first": {"access_key_id": "a", "secret_access_key": "b", "borg_passphrase": "c"}}
            ),
        },
        needs_source=False,
    )
    assert [chosen.name for chosen in backup.chosen(loaded, "targets", [name])] == ["first"]


# ------------------------------------------------------------------------------------------------------- borg


def test_borg_works_on_the_repository_of_a_target(site: Site) -> None:
    """Without a repository on the command line, and its output is on standard output, alone."""
    archive = archive_of(run_backup(site.environment).expect(0))
    site.source.put({"folder/new": b"new"})
    later = archive_of(run_backup(site.environment).expect(0))
    for words in (["list", "--short"], ["list", "--short", "--last", "9"]):
        result = site.call("borg", "first", *words)
        assert (result.returncode, result.stdout.split()) == (0, [archive, later]), result.stderr
    for words in ([archive, later], [f"::{archive}", later]):
        result = site.call("borg", "target-first", "diff", *words)
        assert result.returncode == 0, result.stderr
        assert "folder/new" in result.stdout
        assert "folder/3" not in result.stdout
    assert "folder/new" in site.call("borg", "first", "list", later).stdout


def test_a_command_of_borg_that_changes_the_repository_is_uploaded(site: Site) -> None:
    archive = archive_of(run_backup(site.environment).expect(0))
    result = site.call("borg", "first", "rename", archive, "renamed")
    assert result.returncode == 0, result.stderr
    assert LEASE not in site.target.sizes()
    copy = Repository.download(site.target, site.folder / "copy")
    copy.check()
    assert copy.archives() == ["renamed"]


def test_borgs_exit_code_is_ours(site: Site) -> None:
    run_backup(site.environment).expect(0)
    assert site.call("borg", "first", "list", "no-such-archive").returncode == 2
    assert site.call("borg", "first", "delete", "no-such-archive").returncode != 0
    modern = {**site.environment, "BORG_EXIT_CODES": "modern"}
    assert site.call("borg", "first", "list", "no-such-archive", environment=modern).returncode == 31


def test_what_reads_needs_no_key_that_may_write_and_no_source(site: Site) -> None:
    archive = archive_of(run_backup(site.environment).expect(0))
    before = site.target.contents()
    keys = json.loads(site.as_reader()["TARGET_SECRETS"])
    environment = {**site.without_source(), "TARGET_SECRETS": json.dumps(keys)}
    result = site.call("borg", "first", "list", "--short", environment=environment)
    assert (result.returncode, result.stdout) == (0, f"{archive}\n"), result.stderr
    assert "without the lease" in result.stderr
    assert site.call("borg", "first", "extract", archive, environment=environment).returncode == 0
    extracted = site.folder / str(Path(site.environment["DATA_DIR"]) / "source").lstrip("/")
    assert (extracted / "folder/3").read_bytes() == site.source.get("folder/3")
    assert site.target.contents() == before
    refused = site.call("borg", "first", "delete", archive, environment=environment)
    assert refused.returncode == 2
    assert "AccessDenied" in refused.stderr


@contextmanager
def long_backup(site: Site) -> Iterator[Backup]:
    """A run that is in the middle of `borg create`, and is seen to live before it is over."""
    site.source.put({"large": os.urandom(40_000_000)})
    slow = with_target(site.environment, "first", compression="lzma,9")
    with Backup({**slow, "LEASE_TTL": "10"}) as running:
        running.wait_for_line("borg create begins")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        yield running
        assert running.process.poll() is None, "the run was too short for the test"
    site.target.clear()


@pytest.mark.long
def test_what_reads_works_beside_a_backup_with_the_same_cache(site: Site) -> None:
    archive = archive_of(run_backup(site.environment).expect(0))
    with long_backup(site):
        result = site.call("borg", "first", "list", "--short")
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[:1] == [archive]
        assert "another run works on this repository: a backup" in result.stderr
        assert site.call("borg", "first", "compact").returncode == 75


def test_what_reads_minds_no_lock_and_no_missing_index(site: Site) -> None:
    """After a crash, beside a lock of whomever: nothing is removed, and borg reads the segments."""
    site.source.put({"large": os.urandom(100_000)})
    archive = archive_of(run_backup(site.environment).expect(0))
    index = next(key for key in site.target.sizes() if key.startswith("index."))
    site.target.delete(index)
    site.target.put({"lock.exclusive/elsewhere@1.1-0": b""})
    before = site.target.contents()
    result = site.call("borg", "first", "list", "--short", environment=site.as_reader())
    assert (result.returncode, result.stdout) == (0, f"{archive}\n"), result.stderr
    assert site.target.contents() == before
    site.target.clear()


def test_a_reader_notices_a_repository_that_was_set_back(site: Site) -> None:
    """What borg remembers of the repository counts for readers, too; they do not change it."""
    run_backup(site.environment).expect(0)
    old = site.target.contents()
    run_backup(site.environment).expect(0)
    site.target.clear()
    site.target.put(old)
    result = site.call("borg", "first", "list")
    assert result.returncode == 2
    assert "newer than repository" in result.stderr


@pytest.mark.long
def test_what_writes_notices_a_repository_that_was_swapped(site: Site) -> None:
    """For an older state of it, or for one without encryption, to which nobody meant to give the data."""
    run_backup(site.environment).expect(0)
    old = site.target.contents()
    run_backup(site.environment).expect(0)
    other = Repository(site.folder / "other")
    other.borg("init", "-e", "none", str(other.folder))
    for command, swapped, words in (
        ("maintain", old, "newer than repository"),
        ("run", old, "newer than repository"),
        ("run", tree(other.folder), "it is not encrypted"),
    ):
        site.target.clear()
        site.target.put(swapped)
        assert words in run_backup(site.environment, command).expect(2).output
        assert site.target.contents("data/") == {
            key: body for key, body in swapped.items() if key.startswith("data/")
        }


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("mount", "backup.py mount target-first, then borg mount"),
        ("umount", "`backup.py umount`"),
        ("serve", "S3"),
    ],
)
def test_a_command_of_borg_that_cannot_work_here_is_refused_with_a_hint(
    site: Site, command: str, hint: str
) -> None:
    result = site.call("borg", "first", command, "mountpoint")
    assert result.returncode == 78
    assert f"`borg {command}`" in result.stderr
    assert hint in result.stderr
    assert site.target.sizes() == {}


def test_where_no_repository_is_a_command_says_so(site: Site) -> None:
    for words in (("borg", "first", "list"), ("borg", "first", "compact")):
        result = site.call(*words)
        assert result.returncode == 2
        assert "holds no repository yet. Run a backup first" in result.stderr
    assert site.target.sizes() == {}


@pytest.mark.leaves_lock
def test_a_killed_reader_is_in_nobodys_way(site: Site) -> None:
    """The next one removes the dead mount that it left; what it read was not changed."""
    run_backup(site.environment).expect(0)
    with Backup(site.environment, "borg", "first", "export-tar", "none", "-") as reader:
        mounts = wait_until(lambda: mounts_below(site.folder), 30, "the repository is mounted")
        reader.send_signal(signal.SIGKILL)
        reader.wait().expect(128 + signal.SIGKILL)
    wait_until(lambda: not processes_with(str(site.folder)), 10, "borg and tigrisfs are gone")
    assert mounts_below(site.folder) == mounts
    site.target.delete(LEASE)
    assert site.call("list").returncode == 0
    assert not [mount for mount in mounts if mount.parent.exists()]


def test_a_reader_is_told_that_a_compaction_took_away_what_it_needed(site: Site) -> None:
    """As if another run had removed a segment after the reader has looked."""
    site.source.put({"big": os.urandom(100_000)})
    run_backup(site.environment).expect(0)
    loaded = load_settings(site.environment)
    report = backup.Report("id", loaded.label, datetime.now(UTC))
    console, stop = backup.Console(debug=False), backup.Stop()
    runtime = backup.Runtime(loaded, site.environment, console, stop, 1000, report)
    with (
        pytest.raises(backup.BackupError, match="another run changed the repository while it was read"),
        backup.opened_for_reading(runtime, loaded.targets[0]) as repository,
    ):
        site.target.delete(*[key for key in site.target.sizes() if key.startswith(("data/", "index."))])
        repository.borg.run(["list", str(repository.borg.repository)])


@pytest.mark.long
def test_a_borg_that_waits_for_a_pipe_for_too_long_is_stuck(site: Site) -> None:
    """Where there is no terminal, nobody could end it; the lease and borg's lock are given back."""
    run_backup(site.environment).expect(0)
    command = [sys.executable, str(BACKUP), "borg", "first", "create", "late", "-"]
    environment = {**site.environment, "STALL_TIMEOUT": "5"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.wait(60) == 2
        assert waiting.stderr
        assert "borg create hangs" in waiting.stderr.read()
    assert run_backup(site.environment).expect(0)


def test_a_reader_that_goes_away_is_no_defect(site: Site) -> None:
    """`backup.py borg first list | head -1`."""
    run_backup(site.environment).expect(0)
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {BACKUP} borg first list --json | true"],
        env=site.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "defect" not in done.stderr
    assert "backup.py" not in done.stderr


@pytest.mark.long
def test_a_new_passphrase_is_asked_for(site: Site) -> None:
    """The old one is not taken for it, and none is guessed where nobody can be asked."""
    run_backup(site.environment).expect(0)
    refused = site.call("borg", "first", "key", "change-passphrase")
    assert refused.returncode == 2
    assert "Interactive password query failed" in refused.stderr
    changed = site.call(
        "borg",
        "first",
        "key",
        "change-passphrase",
        environment={**site.environment, "BORG_NEW_PASSPHRASE": "another"},
    )
    assert changed.returncode == 0, changed.stderr
    run_backup(site.environment).expect(2)
    run_backup(with_target_secrets(site.environment, "first", borg_passphrase="another")).expect(0)


# ---------------------------------------------------------------------------------------------- At a terminal


def at_terminal(site: Site, *words: str) -> pexpect.spawn:
    """Runs backup.py at a terminal of its own."""
    return pexpect.spawn(
        sys.executable, [str(BACKUP), *words], env=site.environment, encoding="utf-8", timeout=60, echo=False
    )


@pytest.mark.long
def test_borg_may_ask_at_the_terminal(site: Site) -> None:
    """Whoever deletes a repository has to type YES."""
    run_backup(site.environment).expect(0)
    with at_terminal(site, "borg", "first", "delete") as terminal:
        terminal.expect("Type 'YES' if you understand")
        terminal.sendline("no")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 2
    assert Repository.download(site.target, site.folder / "copy").archives()
    with at_terminal(site, "borg", "first", "key", "change-passphrase") as terminal:
        for prompt in ("Enter new passphrase: ", "Enter same passphrase again: "):
            terminal.expect(prompt)
            terminal.sendline("typed by hand")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0
    assert "typed by hand" not in (terminal.before or "")
    run_backup(with_target_secrets(site.environment, "first", borg_passphrase="typed by hand")).expect(0)


def test_borg_may_ask_in_a_container_too(site: Site) -> None:
    """There we are PID 1, whose child is no foreground process group until it is made one.

    And with the repository go neither the lease nor the mount.
    """
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or not unshare:
        skip_or_fail("a PID namespace takes root and unshare(1)")
    run_backup(site.environment).expect(0)
    words = [
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        sys.executable,
        str(BACKUP),
        "borg",
        "first",
        "delete",
    ]
    with pexpect.spawn(str(unshare), words, env=site.environment, encoding="utf-8", timeout=60) as terminal:
        terminal.expect("Type 'YES' if you understand")
        terminal.sendline("YES")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0
    assert not [key for key in site.target.sizes() if not key.startswith(".s3borgbackup-")]


@pytest.mark.long
def test_ctrl_c_at_the_terminal_reaches_borg_alone_and_what_it_wrote_is_uploaded(site: Site) -> None:
    """And the lease is given back; a question that is left unanswered is no reason to be stuck either."""
    run_backup(site.environment).expect(0)
    environment = {**site.environment, "STALL_TIMEOUT": "5"}
    with at_terminal(
        Site(environment, site.source, site.target, site.folder), "borg", "first", "delete"
    ) as it:
        it.expect("Type 'YES' if you understand")
        assert it.expect([pexpect.TIMEOUT, pexpect.EOF], timeout=9) == 0, "it was taken for stuck"
        for pause_seconds in (0.1, 0):  # borg ends at the second one; two at the same moment it takes for one
            it.sendintr()
            time.sleep(pause_seconds)
        it.expect(pexpect.EOF)
    assert it.exitstatus == 130
    assert "stopped by" not in it.before
    assert (LEASE in site.target.sizes(), site.target.locks()) == (False, [])


def test_a_stop_signal_ends_borg_in_order(site: Site) -> None:
    """`docker stop`: borg waits for its standard input, and is told to end; its lock is released."""
    run_backup(site.environment).expect(0)
    with at_terminal(site, "borg", "first", "create", "late", "-") as terminal:
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        terminal.kill(signal.SIGTERM)
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 143
    assert "stopped by SIGTERM" in terminal.before
    assert (LEASE in site.target.sizes(), site.target.locks()) == (False, [])


# ---------------------------------------------------------------------------------- list, info and key-export


@pytest.mark.long
@pytest.mark.parametrize("words", [("list", "--json"), ("info",), ("verify", "first", "--json")])
def test_an_answer_that_cannot_be_written_is_a_failure(site: Site, words: Sequence[str]) -> None:
    run_backup(site.environment).expect(0)
    with open("/dev/full", "w") as full_device:
        command = [sys.executable, str(BACKUP), *words]
        done = subprocess.run(
            command, env=site.environment, stdout=full_device, stderr=subprocess.PIPE, text=True, timeout=100
        )
    assert done.returncode == 2
    assert "the answer could not be written: No space left on device" in done.stderr


def test_a_full_disk_below_tmp_is_told(site: Site) -> None:
    run_backup(site.environment).expect(0)
    disk = site.folder / "small"
    disk.mkdir()
    with small_disk(disk), full(disk):
        (disk / "ballast").open("r+b").truncate(os.path.getsize(disk / "ballast") - 8192)
        done = site.call("list", environment={**site.environment, "TMPDIR": str(disk)})
    assert done.returncode == 2, done.stderr
    assert "No space left on device. The disk of /cache, /config or /tmp is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_shows_name_time_objects_and_size_of_every_archive(site: Site) -> None:
    """Also with keys that may only read, and without a source. The manifest is no object, but has a size."""
    first = archive_of(run_backup(site.environment).expect(0))
    site.source.put({"more": b"x" * 5000})
    second = archive_of(run_backup({**site.environment, "TZ": "Asia/Tokyo"}).expect(0))
    in_tokyo = datetime.fromisoformat(f"{second.removeprefix('backup-')}+09:00")
    assert timedelta(0) < datetime.now(UTC) - in_tokyo < timedelta(minutes=10)
    keys = site.as_reader()["TARGET_SECRETS"]
    result = site.call("list", environment={**site.without_source(), "TARGET_SECRETS": keys})
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["target", "archive", "time", "objects", "size"]
    assert [row[:2] for row in rows[1:]] == [["first", first], ["first", second]]
    zone = f"{datetime.now().astimezone():%z}"
    assert [(*row[4:6], row[-1]) for row in rows[1:]] == [(zone, "10", "kB"), (zone, "11", "kB")]
    assert all(row[1].endswith("T".join(row[2:4])) or row[3] for row in rows[1:])
    in_new_york = {**site.environment, "TZ": "America/New_York"}
    document = json.loads(site.call("list", "target-first", "--json", environment=in_new_york).stdout)
    archives = document["first"]["archives"]
    assert [(entry["name"], entry["objects"]) for entry in archives] == [(first, 10), (second, 11)]
    assert [entry["bytes"] // 5000 for entry in archives] == [2, 3]
    starts = [datetime.fromisoformat(entry["start"]) for entry in archives]
    assert {start.utcoffset() for start in starts} <= {timedelta(hours=-5), timedelta(hours=-4)}
    assert all(timedelta(0) < datetime.now(UTC) - start < timedelta(minutes=10) for start in starts)


def test_a_time_that_comes_twice_when_clocks_are_set_back_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        times = {"time": "2025-10-26T00:30:00.000000", "end": "2025-10-26T01:30:00.000000"}
        archive = backup.Archive.parse({"name": "x", **times})
        assert (archive.end - archive.start, archive.end.hour) == (timedelta(hours=1), 2)
        assert archive.as_json()["start"] == "2025-10-26T02:30:00+02:00"
    time.tzset()


@pytest.mark.parametrize(
    ("comment", "files", "objects"),
    [
        ("s3borgbackup: source as of 2026-01-31T03:00:00Z, with manifest", 8, 7),
        ("s3borgbackup: source as of 2026-01-31T03:00:00Z", 8, 8),
        ("", 8, 8),
        ("s3borgbackup: source as of 2026-01-31T03:00:00Z, with manifest", None, None),
    ],
)
def test_the_manifest_is_no_object(comment: str, files: int | None, objects: int | None) -> None:
    times = dict.fromkeys(("time", "end"), "2026-01-31T03:00:00.000000")
    entry = {"name": "x", "comment": comment, "nfiles": files, "size": 8000, **times}
    assert backup.Archive.parse(entry).objects == objects


def test_one_target_that_cannot_be_listed_does_not_keep_the_others_from_it(
    site: Site, server: SeaweedFS, tmp_path: Path
) -> None:
    archive = archive_of(run_backup(site.environment).expect(0))
    environment = settings(
        server, tmp_path, site.source.name, {"gone": "no-such-bucket", "first": site.target.name}
    )
    result = site.call("list", environment=environment)
    assert result.returncode == 2
    assert archive in result.stdout
    assert "NoSuchBucket" in result.stderr
    document = json.loads(site.call("list", "--json", environment=environment).stdout)
    assert "NoSuchBucket" in document["gone"]["error"]
    assert len(document["first"]["archives"]) == 1


@pytest.mark.long
def test_info_tells_what_a_repository_takes_and_what_is_known_of_it(site: Site) -> None:
    site.source.put({"twice": b"same" * 100_000, "again": b"same" * 100_000})
    archive = archive_of(run_backup(site.environment).expect(0))
    run_backup({**site.environment, "BACKUP_LABEL": "other"}).expect(0)
    document = json.loads(site.call("info", "first", "--json").stdout)["first"]
    sizes = {key: size for key, size in site.target.sizes().items() if not key.startswith(("lock.", ".s3"))}
    assert document["stored_bytes"] == sum(sizes.values())
    assert 0 < document["archived_bytes"] - 2 * 810_000 < 10_000, "with the manifests"
    assert (document["archives"], document["last_archive"]["name"]) == (2, archive)
    assert document["encryption"] == "repokey-blake2"
    assert (document["key_exported"], document["last_check"], document["in_use"]) == (None, None, None)
    text = site.call("info").stdout
    assert "deduplication and compression save 9" in text
    assert "never: backup.py key-export first" in text
    assert "never, as far as is known; the oldest unchecked data is " in text
    assert site.call("check", "first").returncode == 0
    checked = datetime.fromisoformat(json.loads(site.call("info", "--json").stdout)["first"]["last_check"])
    assert datetime.now(UTC) - checked < timedelta(minutes=2)
    assert f"{checked:%Y-%m-%d %H:%M:%S}" in site.call("info").stdout


@pytest.mark.long
def test_info_names_who_works_on_the_repository(site: Site) -> None:
    run_backup(site.environment).expect(0)
    with long_backup(site):
        assert "a backup on " in json.loads(site.call("info", "--json").stdout)["first"]["in_use"]


@pytest.mark.long
@pytest.mark.parametrize("encryption", ["repokey-blake2", "keyfile", "authenticated"])
def test_an_exported_key_can_be_imported_again(site: Site, encryption: str) -> None:
    """And each run asks for the export until it was done, without changing its exit code."""
    environment = with_target(site.environment, "first", encryption=encryption)
    result = run_backup(environment).expect(0)
    assert "its key was never exported" in result.output
    exported = site.call("key-export", "first", environment=environment)
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout.startswith("BORG_KEY ")
    assert ".s3borgbackup-key-exported" in site.target.sizes()
    assert "never exported" not in run_backup(environment).expect(0).output
    copy = Repository.download(site.target, site.folder / "copy")
    config = copy.folder / "config"
    without_key, keys = re.subn(r"(?m)^key = (.*\n)(\t.*\n)*", "", config.read_text())
    assert keys == (encryption != "keyfile")
    config.write_text(without_key)
    (site.folder / "key").write_text(exported.stdout)
    copy.borg("key", "import", str(copy.folder), str(site.folder / "key"))
    assert len(copy.archives()) == 2


def test_a_key_is_exported_with_keys_that_may_only_read(site: Site) -> None:
    run_backup(site.environment).expect(0)
    result = site.call("key-export", "first", environment=site.as_reader())
    assert result.returncode == 0
    assert result.stdout.startswith("BORG_KEY ")
    assert "cannot be noted" in result.stderr
    assert "AccessDenied" in result.stderr


def test_a_key_that_nobody_reads_is_not_taken_for_exported(site: Site) -> None:
    run_backup(site.environment).expect(0)
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(BACKUP), "key-export", "first"]
        done = subprocess.run(command, env=site.environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert ".s3borgbackup-key-exported" not in site.target.sizes()


def test_without_encryption_there_is_no_key_to_export_and_nobody_is_asked_to(site: Site) -> None:
    environment = with_target(site.environment, "first", encryption="none")
    assert "never exported" not in run_backup(environment).expect(0).output
    result = site.call("key-export", "first", environment=environment)
    assert result.returncode == 2
    assert "no key" in result.stderr
    assert result.stdout == ""


def test_a_new_repository_has_a_key_that_was_never_exported(site: Site) -> None:
    """What was noted of an older one there does not count for it."""
    site.target.put({".s3borgbackup-key-exported": b"{}", ".s3borgbackup-checked": b"{}"})
    assert "never exported" in run_backup(site.environment).expect(0).output
    notes = [key for key in site.target.sizes() if key.startswith(".s3borgbackup-")]
    assert notes == []


# --------------------------------------------------------------------------------------------------- maintain


@pytest.mark.long
def test_maintain_checks_where_the_target_says_so(site: Site) -> None:
    """As a run does: what it finds is told by each command that follows."""
    site.source.put({"large": os.urandom(100_000)})
    run_backup(site.environment).expect(0)
    environment = with_target(site.environment, "first", check="full/week")
    assert site.call("maintain", environment=environment).returncode == 0
    assert json.loads(site.call("info", "--json").stdout)["first"]["last_check"]
    site.target.flip_a_byte(site.target.largest("data/"))
    environment = with_target(site.environment, "first", check="full")
    result = site.call("maintain", environment=environment)
    assert result.returncode == 2
    assert "the repository is damaged" in result.stderr
    assert "DAMAGED" in site.call("info").stdout


def test_maintain_prunes_and_compacts_without_a_source(site: Site) -> None:
    site.source.put({"big": os.urandom(4_000_000)})
    run_backup(site.environment).expect(0)
    site.source.delete("big")
    archive = archive_of(run_backup(site.environment).expect(0))
    assert sum(site.target.sizes().values()) > 4_000_000
    environment = with_target(site.without_source(), "first", prune="--keep-last=1")
    result = run_backup({**environment, "LOG_FORMAT": "json"}, "maintain").expect(0)
    assert "pruned 1 archive, kept 1" in result.output
    [told] = [json.loads(line) for line in result.lines if "target_finished" in line]
    assert (told["archive"], told["archives_before"], told["archives_after"]) == ("", 2, 1)
    assert "compaction freed" in result.output
    assert sum(site.target.sizes().values()) < 1_000_000
    assert LEASE not in site.target.sizes()
    copy = Repository.download(site.target, site.folder / "copy")
    copy.check()
    assert copy.archives() == [archive]
    run_backup(site.environment).expect(0)


@pytest.mark.long
def test_maintain_prunes_nothing_where_that_would_be_a_mistake(site: Site) -> None:
    """The newest archive is empty, or none has the label."""
    run_backup(site.environment).expect(0)
    site.source.clear()
    run_backup(site.environment).expect(1)
    environment = with_target(site.environment, "first", prune="--keep-last=1")
    result = run_backup(environment, "maintain", "first").expect(1)
    assert "is empty; look at the source first" in result.output
    result = run_backup({**environment, "BACKUP_LABEL": "another"}, "maintain").expect(1)
    assert "no archive is called another-" in result.output
    assert len(Repository.download(site.target, site.folder / "copy").archives()) == 2


def test_maintain_waits_its_turn(site: Site) -> None:
    run_backup(site.environment).expect(0)
    with long_backup(site):
        result = run_backup(site.environment, "maintain").expect(75)
        assert "another run works on this repository: a backup" in result.output
