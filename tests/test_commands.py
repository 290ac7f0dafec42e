"""The commands that a person uses besides a backup: on real repositories, and on the worst day."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import backup
from helpers import (
    BACKUP,
    Backup,
    Bucket,
    Repository,
    Result,
    run_backup,
    settings,
    wait_until,
    with_target,
    with_target_secrets,
)
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
def test_borgs_own_command_lines_are_for_borg(words: list[str], ours: bool) -> None:
    """`docker run ... s3borgbackup borg list /data/x` means what it always meant."""
    assert backup.is_ours(words) == ours


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
    store = backup.Store("first", "http://127.0.0.1:1", "bucket", "", "id", "secret")
    target = backup.Target("first", store, "p", "none", False, "lz4", (), None)
    loaded = backup.load_settings(
        {
            "TARGETS": json.dumps({"first": {"endpoint": store.endpoint, "path": "bucket"}}),
            "TARGET_SECRETS": json.dumps(
                {"first": {"access_key_id": "a", "secret_access_key": "b", "borg_passphrase": "c"}}
            ),
        },
        needs_source=False,
    )
    assert backup.chosen_target(loaded, name).name == target.name


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
    """A run that is in the middle of `borg create`."""
    site.source.put({"large": os.urandom(40_000_000)})
    with Backup(with_target(site.environment, "first", compression="lzma,9")) as running:
        running.wait_for_line("borg create begins")
        wait_until(lambda: site.target.locks(), 30, "borg has its lock in the bucket")
        yield running
        assert running.process.poll() is None, "the run was too short for the test"
    site.target.clear()


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


def test_where_no_repository_is_a_command_says_so(site: Site) -> None:
    for words in (("borg", "first", "list"), ("borg", "first", "compact")):
        result = site.call(*words)
        assert result.returncode == 2
        assert "holds no repository yet. Run a backup first" in result.stderr
    assert site.target.sizes() == {}


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
