"""A whole run: what is in the buckets afterwards, what is said, and with which exit code it ends."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from faults.proxy import FaultProxy
from helpers import (
    BACKUP,
    PASSPHRASE,
    UNUSUAL_KEYS,
    Backup,
    Bucket,
    Repository,
    Result,
    borg_environment,
    mounted,
    mounts_below,
    run_backup,
    sample_objects,
    settings,
    skip_or_fail,
    tree,
    wait_until,
    with_target,
    with_target_secrets,
)
from servers import READER, Identity, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

NewBucket = Callable[..., Bucket]


def summary_row(result: Result, target: str) -> list[str]:
    """The columns of a target's row in the table at a run's end."""
    header = next(number for number, line in enumerate(result.lines) if line.startswith("target  "))
    return next(
        re.split(r" {2,}", line) for line in result.lines[header + 1 :] if line.startswith(f"{target} ")
    )


def source_folder(environment: Mapping[str, str]) -> Path:
    """Where a run mounts the source."""
    return Path(environment["DATA_DIR"]).resolve() / "source"


def newest_contents(repository: Repository, environment: Mapping[str, str]) -> dict[str, bytes]:
    """The objects in the newest archive."""
    folder = repository.folder.with_name(repository.folder.name + ".newest")
    return repository.contents(repository.archives()[-1], source_folder(environment), folder)


def total_bytes(bucket: Bucket) -> int:
    """What the objects of a bucket take."""
    return sum(bucket.sizes().values())


# ------------------------------------------------------------------------------------ What ends up in buckets


def test_every_target_holds_what_the_bucket_held_at_each_run(
    server: SeaweedFS, new_bucket: NewBucket, tmp_path: Path
) -> None:
    """Both archives of both targets have exactly the bucket's objects of their time, unusual keys included.

    An object that is overwritten by as many other bytes counts as changed.
    """
    source, first, second = new_bucket("source"), new_bucket("first"), new_bucket("second")
    objects = sample_objects(1, 60)
    source.put(objects)
    environment = settings(server, tmp_path, source.name, {"first": first.name, "second": second.name})

    result = run_backup(environment).expect(0)
    for name in ("first", "second"):
        row = summary_row(result, name)
        assert row[1:3] == ["ok", "60"]
        assert re.fullmatch(r"backup-\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", row[-1])
        assert f"[target-{name}] archive {row[-1]}: 60 objects, " in result.output
    assert "Traceback" not in result.output

    gone, changed = UNUSUAL_KEYS[1], UNUSUAL_KEYS[4]
    source.delete(gone)
    source.put({changed: objects[changed][::-1] or b"x", "new/ključ.txt": b"new"})
    now = source.contents()
    result = run_backup(environment).expect(0)
    assert summary_row(result, "first")[1:3] == ["ok", "60"]

    for bucket in (first, second):
        repository = Repository.download(bucket, tmp_path / bucket.name)
        repository.check()
        old, new = repository.archives()
        assert new == summary_row(result, bucket.name.split("-")[0])[-1]
        assert repository.contents(old, source_folder(environment), tmp_path / f"{bucket.name}-1") == objects
        assert repository.contents(new, source_folder(environment), tmp_path / f"{bucket.name}-2") == now


def test_only_what_lies_below_the_prefixes_is_read_and_written(
    server: SeaweedFS, new_bucket: NewBucket, tmp_path: Path
) -> None:
    source, target = new_bucket("source"), new_bucket("target")
    source.put({"in/side/a.txt": b"a", "in/side/b/c.txt": b"c", "in/sideways.txt": b"no", "out.txt": b"no"})
    others = {"borg/keep.txt": b"keep", "borgs/x": b"x", "top.txt": b"top"}
    target.put(others)
    environment = settings(server, tmp_path, f"{source.name}:in/side", {"first": f"{target.name}:borg/here/"})
    run_backup(environment).expect(0)
    repository = Repository.download(target, tmp_path / "copy", prefix="borg/here")
    assert newest_contents(repository, environment) == {"a.txt": b"a", "b/c.txt": b"c"}
    assert {key: target.get(key) for key in target.sizes() if not key.startswith("borg/here/")} == others


@pytest.mark.parametrize(("encryption", "can_be_read"), [(None, False), ("authenticated", True)])
def test_neither_content_nor_names_can_be_read_in_the_target_unless_that_was_asked_for(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    encryption: str | None,
    can_be_read: bool,
) -> None:
    """Not compressed, so that each would be found; the default is to encrypt."""
    name, content = "what nobody may know.txt", b"and what it says"
    source.put({name: content})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(with_target(environment, "first", encryption=encryption, compression="none")).expect(0)
    stored = b"".join(target.contents().values())
    assert [text in stored for text in (name.encode(), content)] == [can_be_read] * 2


def test_the_default_compression_is_what_the_readme_says(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put({"text": b"text " * 10_000, "random": os.urandom(50_000)})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(with_target(environment, "first", compression=None)).expect(0)
    repository = Repository.download(target, tmp_path / "copy")
    [archive] = json.loads(repository.borg("info", "--json", "--last", "1", str(repository.folder)))[
        "archives"
    ]
    assert "--compression auto,zstd,22 " in " ".join(archive["command_line"])
    assert archive["stats"]["compressed_size"] < 60_000
    assert newest_contents(repository, environment) == source.contents()


def test_proxies_in_the_environment_are_not_used(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """Neither by this program nor by TigrisFS, which would use none for a server called localhost anyway."""
    source.put({"a": b"a"})
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        skip_or_fail(f"the machine's own name {host} cannot be resolved: {error}")
    names = [f"{scheme}_proxy" for scheme in ("http", "https", "all")]
    variables = dict.fromkeys([*names, *map(str.upper, names)], "http://127.0.0.1:1")
    with FaultProxy(server.endpoint, address=address) as relay:
        endpoint = relay.endpoint.replace(f"//{address}:", f"//{host}:")
        environment = settings(
            server,
            tmp_path,
            source.name,
            {"first": {"path": target.name, "endpoint": endpoint}},
            SOURCE_ENDPOINT=endpoint,
            STALL_TIMEOUT="20",
            **variables,
        )
        run_backup(environment).expect(0)
        assert relay.count(lambda request: "user-agent" in request.headers), "TigrisFS came this way"


@pytest.mark.long
def test_prune_leaves_the_archives_of_another_label_alone(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """`backup` keeps one archive of its own; those of `backup-other` stay, though the name begins alike."""
    source.put({"a": b"a"})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    other = {**environment, "BACKUP_LABEL": "backup-other"}
    for once in (other, environment):
        run_backup(once).expect(0)
    result = run_backup(with_target(environment, "first", prune="--keep-last=1")).expect(0)
    archives = Repository.download(target, tmp_path / "copy").archives()
    assert [name.rpartition("-20")[0].removesuffix("-20") for name in sorted(archives)] == [
        "backup",
        "backup-other",
    ]
    assert summary_row(result, "first")[-1] in archives


@pytest.mark.long
def test_compact_gives_back_the_space_of_pruned_archives_unless_told_not_to(
    server: SeaweedFS, new_bucket: NewBucket, tmp_path: Path
) -> None:
    source, compacted, left = new_bucket("source"), new_bucket("compacted"), new_bucket("left")
    source.put({"big": os.urandom(4_000_000), "small": b"small"})
    environment = settings(
        server,
        tmp_path,
        source.name,
        {
            "compacted": {"path": compacted.name, "prune": "--keep-last=1"},
            "left": {"path": left.name, "prune": "--keep-last=1", "compact": False},
        },
    )
    run_backup(environment).expect(0)
    assert total_bytes(compacted) > 4_000_000
    source.delete("big")
    result = run_backup(environment).expect(0)
    assert total_bytes(compacted) < 1_000_000 < 4_000_000 < total_bytes(left)
    assert any("[target-compacted] compaction freed" in line for line in result.lines)
    for bucket in (compacted, left):
        repository = Repository.download(bucket, tmp_path / bucket.name)
        assert newest_contents(repository, environment) == {"small": b"small"}
        assert len(repository.archives()) == 1


# ---------------------------------------------------------------------------- Repositories that exist already


def test_a_repository_without_encryption_needs_no_passphrase_and_is_not_used_for_another_mode(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put({"a": b"a"})
    environment = settings(
        server, tmp_path, source.name, {"first": {"path": target.name, "encryption": "none"}}
    )
    environment = with_target_secrets(environment, "first", borg_passphrase=None)
    run_backup(environment).expect(0)
    before = target.contents()
    wanting = with_target_secrets(
        with_target(environment, "first", encryption="repokey-blake2"), "first", borg_passphrase=PASSPHRASE
    )
    result = run_backup(wanting).expect(2)
    assert summary_row(result, "first")[1] == "failed"
    assert "encryption" in result.output
    assert "none" in result.output
    assert_same_archives(target, before)


def assert_same_archives(bucket: Bucket, before: Mapping[str, bytes]) -> None:
    """No segment, key or config was touched; what borg notes about locks and nonces may differ."""
    now = bucket.contents()
    for key, body in before.items():
        if not re.search(r"(^|/)(nonce|lock\.)", key):
            assert now.get(key) == body, key
    assert {key for key in now if key.startswith("data/")} == {
        key for key in before if key.startswith("data/")
    }


def test_a_repository_made_by_plain_borg_is_continued(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """Drop-in: somebody used borg on a mount of the bucket; we go on, and the old archive stays readable."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_bytes(b"from before")
    with mounted(target, tmp_path / "by-hand") as folder:
        plain = Repository(folder)
        plain.borg("init", "-e", "repokey", str(folder))
        plain.borg("create", f"{folder}::by-hand", "file", cwd=tmp_path / "old")
    source.put({"new": b"new"})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    result = run_backup(environment).expect(0)
    assert "a new repository" not in result.output
    repository = Repository.download(target, tmp_path / "copy")
    repository.check()
    assert repository.archives()[0] == "by-hand"
    assert tree(repository.extract("by-hand", tmp_path / "extracted")) == {"file": b"from before"}
    assert newest_contents(repository, environment) == {"new": b"new"}


@pytest.mark.long
@pytest.mark.parametrize("left", ["README|config", r"README|config|nonce|data/0/\d+"])
def test_what_an_interrupted_init_left_is_made_anew(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, left: str
) -> None:
    local = Repository(tmp_path / "local")
    local.borg("init", "-e", "repokey-blake2", str(local.folder))
    target.put({key: body for key, body in tree(local.folder).items() if re.fullmatch(left, key)})
    source.put({"a": b"a"})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    result = run_backup(environment).expect(0)
    assert any("warning" in line and "interrupted" in line for line in result.lines)
    repository = Repository.download(target, tmp_path / "copy")
    repository.check()
    assert newest_contents(repository, environment) == {"a": b"a"}


@pytest.mark.parametrize(
    "photos", [{"photos/cat.jpg": b"cat"}, {"photos/cat.jpg": b"cat", "config": b"[core]"}]
)
def test_objects_of_somebody_else_where_the_repository_should_be_are_not_touched(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, photos: Mapping[str, bytes]
) -> None:
    source.put({"a": b"a"})
    target.put(photos)
    result = run_backup(settings(server, tmp_path, source.name, {"first": target.name})).expect(2)
    assert target.contents() == photos
    assert 'TARGETS "first"."path"' in result.output


def test_a_wrong_passphrase_names_the_setting(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put({"a": b"a"})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(environment).expect(0)
    before = target.contents()
    wrong = with_target_secrets(environment, "first", borg_passphrase="not it")
    result = run_backup(wrong).expect(2)
    assert 'TARGET_SECRETS "first"."borg_passphrase"' in result.output
    assert "not it" not in result.output
    assert_same_archives(target, before)


@contextmanager
def locked_by_somebody_else(bucket: Bucket, folder: Path) -> Iterator[None]:
    """Plain borg on another mount, as if on another machine, holds the lock of the repository."""
    with mounted(bucket, folder):
        base_folder = folder.with_name(f"{folder.name}.borg")
        holder = subprocess.Popen(
            ["borg", "with-lock", str(folder), "cat"],
            env={**borg_environment(base_folder), "BORG_HOST_ID": "elsewhere@1"},
            stdin=subprocess.PIPE,
        )
        try:
            wait_until(lambda: bucket.locks() or holder.poll() is not None, 30, "the lock is in the bucket")
            yield
        finally:
            assert holder.stdin
            holder.stdin.close()
            holder.wait(60)


@pytest.mark.long
def test_a_lock_of_somebody_else_is_respected_and_its_owner_named(
    server: SeaweedFS, new_bucket: NewBucket, tmp_path: Path
) -> None:
    source, first, second = new_bucket("source"), new_bucket("first"), new_bucket("second")
    source.put({"a": b"a"})
    environment = settings(server, tmp_path, source.name, {"first": first.name, "second": second.name})
    run_backup(environment, "run", "first").expect(0)
    with locked_by_somebody_else(first, tmp_path / "elsewhere"):
        result = run_backup(environment).expect(2)
        assert first.locks(), "the lock was broken"
    error = next(line for line in result.lines if "elsewhere@1" in line)
    assert f"borg break-lock {environment['DATA_DIR']}/target-first" in error
    assert [summary_row(result, name)[1] for name in ("first", "second")] == ["failed", "ok"]
    assert len(Repository.download(first, tmp_path / "copy").archives()) == 1


# ---------------------------------------------------------------------------------------- What can be refused


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SOURCE_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ({"SOURCE_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"),
        ({"SOURCE_PATH": "no-such-bucket"}, "NoSuchBucket"),
    ],
)
def test_an_unusable_source_is_told_in_seconds_and_in_s3s_words(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    changes: Mapping[str, str],
    code: str,
) -> None:
    environment = {**settings(server, tmp_path, source.name, {"first": target.name}), **changes}
    result = run_backup(environment).expect(2)
    assert any("error" in line and "source" in line and code in line for line in result.lines)
    assert result.duration_seconds < 10
    assert target.sizes() == {}


@pytest.mark.long
def test_one_broken_target_of_three_does_not_stop_the_others(
    server: SeaweedFS, new_bucket: NewBucket, tmp_path: Path
) -> None:
    source, buckets = new_bucket("source"), {name: new_bucket(name) for name in ("one", "two", "three")}
    source.put({"a": b"a"})
    environment = settings(
        server, tmp_path, source.name, {name: bucket.name for name, bucket in buckets.items()}
    )
    result = run_backup(with_target_secrets(environment, "two", secret_access_key="wrong")).expect(2)
    assert any("target-two" in line and "SignatureDoesNotMatch" in line for line in result.lines)
    assert [summary_row(result, name)[1] for name in buckets] == ["ok", "failed", "ok"]
    assert buckets["two"].sizes() == {}
    for name in ("one", "three"):
        repository = Repository.download(buckets[name], tmp_path / name)
        assert newest_contents(repository, environment) == {"a": b"a"}


def test_a_target_that_may_only_be_read_is_refused_before_anything_is_mounted(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    environment = settings(server, tmp_path, source.name, {"first": target.name}, target_identity=READER)
    result = run_backup(environment).expect(2)
    assert any("target-first" in line and "AccessDenied" in line for line in result.lines)
    assert result.duration_seconds < 20


BROKEN = """
import sys, backup
whole = backup.TargetRun.judge_archive
def broken(run, *others):
    if run.target.name == "one":
        raise ValueError("as if it had a mistake")
    return whole(run, *others)
backup.TargetRun.judge_archive = broken
sys.exit(backup.main(["run"], backup.os.environ))
"""


def test_a_mistake_in_the_program_is_the_failure_of_its_target_only(
    server: SeaweedFS, new_bucket: NewBucket, tmp_path: Path
) -> None:
    source, buckets = new_bucket("source"), {name: new_bucket(name) for name in ("one", "two")}
    source.put({"a": b"a"})
    targets = {name: bucket.name for name, bucket in buckets.items()}
    metrics = tmp_path / "metrics"
    environment = settings(server, tmp_path, source.name, targets, METRICS_FILE=str(metrics))
    done = subprocess.run(
        [sys.executable, "-c", BROKEN],
        env={**environment, "PYTHONPATH": str(BACKUP.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    result = Result(done.returncode, done.stdout.splitlines(), 0).expect(2)
    assert [summary_row(result, name)[1] for name in buckets] == ["failed", "ok"]
    assert result.output.count("ValueError: as if it had a mistake") == 1
    assert [line for line in result.lines if "[target-one] error: this is a defect of the program" in line]
    successes = re.findall(r'last_success_timestamp_seconds\{.*target="(.*)"\} ', metrics.read_text())
    assert successes == ["two"]


def test_a_mistake_in_a_maintenance_is_the_failure_of_its_target_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: backup.TargetRun) -> None:
        if run.target.name == "one":
            raise ValueError("as if it had a mistake")

    monkeypatch.setattr(backup.TargetRun, "maintain", broken)
    store = backup.Store("one", "https://s3.example", "bucket", "", "id", "secret")
    targets = [
        backup.Target(name, replace(store, target=name), "", "none", False, "lz4", (), None)
        for name in ("one", "two")
    ]
    report = backup.Report("id", "backup", datetime.now(UTC))
    configured = backup.Settings(targets=tuple(targets))
    runtime = SimpleNamespace(console=backup.Console(debug=False), report=report, settings=configured)
    assert backup.maintain(runtime, targets) == 2
    assert [target["result"] for target in report.targets] == ["failed", "ok"]
    assert capfd.readouterr().err.count("ValueError: as if it had a mistake") == 1


# --------------------------------------------------------------------------------- Sources that are not whole


@pytest.mark.long
def test_an_empty_source_is_a_warning_and_nothing_is_pruned(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """A source that was emptied by accident must not push out the last archive that holds anything."""
    source.put({"a": b"a"})
    environment = settings(
        server, tmp_path, source.name, {"first": {"path": target.name, "prune": "--keep-last=1"}}
    )
    run_backup(environment).expect(0)
    source.clear()
    result = run_backup(environment).expect(1)
    assert summary_row(result, "first")[1] == "warnings"
    assert any("warning" in line and source.name in line for line in result.lines)
    repository = Repository.download(target, tmp_path / "copy")
    archives = repository.archives()
    assert len(archives) == 2
    assert repository.contents(archives[0], source_folder(environment), tmp_path / "x") == {"a": b"a"}


def test_an_empty_archive_of_a_bucket_that_listed_objects_is_a_failure(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """The objects go between the check and `borg create`: nobody may take that for a good backup."""
    source.put({f"folder {number}/x/object": b"x" for number in range(3)})
    environment = settings(
        server, tmp_path, source.name, {"first": {"path": target.name, "prune": "--keep-last=1"}}
    )
    with Backup(environment) as backup:
        wait_until(lambda: mounts_below(tmp_path), 30, "the source is mounted")
        source.clear()
        result = backup.wait().expect(2)
    assert any("error" in line and "is empty" in line and source.name in line for line in result.lines)


def test_an_object_that_may_not_be_read_is_named_and_the_rest_is_backed_up(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put({"open/a": b"a", "secret/b": b"b", "open/c": b"c"})
    limited = server.add_identity(
        Identity(
            f"limited-{source.name}",
            "limited-secret-41",
            # The long ones: tigrisfs asks for an object with a random name before it mounts.
            (f"Read:{source.name}/open/*", f"Read:{source.name}/{'?' * 20}*", f"List:{source.name}"),
        )
    )
    environment = settings(server, tmp_path, source.name, {"first": target.name}, source_identity=limited)
    result = run_backup(environment)
    assert result.exit_code in (1, 2), result.output
    assert any("secret/b" in line and ("warning" in line or "error" in line) for line in result.lines)
    assert summary_row(result, "first")[1] != "ok"
    repository = Repository.download(target, tmp_path / "copy")
    found = newest_contents(repository, environment)
    assert {key: found[key] for key in ("open/a", "open/c")} == {"open/a": b"a", "open/c": b"c"}
    assert found.get("secret/b") in (None, b"")
