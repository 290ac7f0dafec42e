"""Mounts: how they are made, kept by hand, noticed and cleaned up."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from faults.proxy import Action, FaultProxy
from helpers import (
    BACKUP,
    PASSPHRASE,
    Backup,
    Bucket,
    Repository,
    as_pid_1,
    borg_environment,
    children,
    command_line,
    is_running,
    mounted,
    mounts_below,
    processes_with,
    run_backup,
    sample_objects,
    settings,
    skip_or_fail,
    tree,
    wait_until,
    with_target,
    with_target_secrets,
)
from loading import load_settings, mount_of_folder
from servers import WRITER, SeaweedFS

needs_fuse = pytest.mark.usefixtures("needs_fuse")
PLAN = backup.MemoryPlan(SimpleNamespace(targets=[1], parallel_targets=1), 1000)


def test_a_folder_in_which_something_is_still_mounted_is_not_emptied(tmp_path: Path) -> None:
    """As where a mount of a bucket could not be undone: to remove the folder would delete its objects."""
    with backup.folder_for_mounts() as folder:
        (folder / "destination").mkdir()
        if subprocess.run(["mount", "--bind", tmp_path, folder / "destination"]).returncode:
            skip_or_fail("nothing can be mounted here")
        (folder / "destination" / "object").write_bytes(b"")
    subprocess.run(["umount", folder / "destination"], check=True)
    assert (tmp_path / "object").exists()
    folder.joinpath("destination").rmdir()
    folder.rmdir()
    with backup.folder_for_mounts() as folder:
        (folder / "destination").mkdir()
    assert not folder.exists()


# -------------------------------------------------------------------------------------------- What is decided


@pytest.mark.parametrize(
    ("escaped", "mount_point"),
    [
        ("/data/source", "/data/source"),
        (r"/data/with\040blank", "/data/with blank"),
        (r"/tab\011and\012line", "/tab\tand\nline"),
        (r"/back\134slash\134040", "/back\\slash\\040"),
        (r"/hash\043", "/hash#"),
        ("/Straße/日本語", "/Straße/日本語"),
    ],
)
def test_mount_points_are_read_from_the_table_as_they_are(
    escaped: str, mount_point: str, tmp_path: Path
) -> None:
    """proc(5) escapes blanks, tabs, line ends, backslashes and hashes; the rest is as it is."""
    root = "21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
    line = f"99 21 0:50 / {escaped} rw,nosuid shared:7 master:2 - fuse.tigrisfs bucket rw,user_id=0\n"
    (tmp_path / "mountinfo").write_text(root + line, encoding="utf-8")
    assert backup.mount_table(tmp_path / "mountinfo") == {"/": "ext4", mount_point: "fuse.tigrisfs"}


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("prefix", ["", "some/prefix"])
def test_keys_reach_tigrisfs_by_its_environment_only(read_only: bool, prefix: str) -> None:
    store = backup.Store("first", "http://localhost:1", "bucket", prefix, "KEY-ID", "KEY-SECRET")
    given = {"PATH": "/bin", "HOME": "/home/me", "SOURCE_SECRET_ACCESS_KEY": "no", "TARGET_SECRETS": "no"}
    mount_point = Path("/data/target-first")
    command, environment = backup.tigrisfs_command(store, "eu-1", mount_point, read_only, PLAN, given)
    assert not [word for word in command if "KEY-" in word]
    assert command[-2:] == [f"bucket:{prefix}" if prefix else "bucket", "/data/target-first"]
    assert ("ro" in command) == read_only
    assert environment["AWS_ACCESS_KEY_ID"] == "KEY-ID"
    assert environment["AWS_SECRET_ACCESS_KEY"] == "KEY-SECRET"
    assert "no" not in environment.values()
    assert environment["HOME"] != "/home/me", "~/.aws would count"


# ------------------------------------------------------------------------------------------------ Manual mode


@pytest.fixture
def environment(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """A source and a target; what a test left mounted is unmounted as a user would do it."""
    variables = settings(server, tmp_path, source.name, {"first": target.name})
    yield variables
    for name in ("source", "target-first"):
        if mounts_below(Path(variables["DATA_DIR"]) / name):
            run_backup(variables, "umount", name)


@contextmanager
def mounted_by_hand(environment: Mapping[str, str], *arguments: str) -> Iterator[Path]:
    """The folder that `backup.py mount` made usable; unmounted by `backup.py umount` at the end."""
    run_backup(environment, "mount", *arguments).expect(0)
    yield Path(environment["DATA_DIR"]) / arguments[0]
    run_backup(environment, "umount", arguments[0]).expect(0)


@pytest.mark.long
@needs_fuse
def test_a_repository_is_made_by_hand_as_in_the_manual(
    environment: dict[str, str], source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """`mount` returns when the mount is usable; when `umount` returned, everything is in the bucket.

    The output of both ends when they return, so that `$(…)` does not hang on the mount that lives on.
    """
    source.put({"a": b"a"})
    folder = Path(environment["DATA_DIR"]) / "target-first"
    result = run_backup(environment, "mount", "target-first").expect(0)
    assert mounts_below(folder) == [folder]
    assert f"borg list {folder}" in result.output
    assert "umount target-first" in result.output

    borg = {**borg_environment(tmp_path / "borg"), "BORG_PASSPHRASE": PASSPHRASE}
    (tmp_path / "borg").mkdir()
    subprocess.run(["borg", "init", "-e", "repokey-blake2", folder], env=borg, check=True, cwd=tmp_path)
    objects = sample_objects(3, 30)
    for key, body in objects.items():
        path = folder / "README.d" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    result = run_backup(environment, "umount", "target-first").expect(0)
    assert "uploaded" in result.output
    assert mounts_below(tmp_path) == []
    assert target.contents("README.d/") == {f"README.d/{key}": body for key, body in objects.items()}
    target.delete(*target.sizes("README.d/"))

    run_backup(environment).expect(0)
    assert len(Repository.download(target, tmp_path / "copy").archives()) == 1


@needs_fuse
def test_mounting_and_unmounting_twice_is_said_and_harmless(environment: dict[str, str]) -> None:
    result = run_backup(environment, "umount", "target-first").expect(0)
    assert "not mounted" in result.output
    with mounted_by_hand(environment, "target-first") as folder:
        (folder / "file").write_bytes(b"x")
        result = run_backup(environment, "mount", "target-first").expect(0)
        assert "already" in result.output
        assert mounts_below(folder) == [folder]
        assert (folder / "file").read_bytes() == b"x"
    result = run_backup(environment, "umount", "target-first").expect(0)
    assert "not mounted" in result.output


@needs_fuse
def test_the_output_of_mount_ends_when_it_returns(environment: dict[str, str]) -> None:
    """A shell's `$(backup.py mount …)` waits for the pipe's end, not for the process.

    Nor is anything else kept open that a shell has, such as the file of a `flock`.
    """
    command = [sys.executable, str(BACKUP), "mount", "source"]
    reader, writer = os.pipe()
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        pass_fds=[writer],
    )
    assert done.returncode == 0, done.stderr
    os.close(writer)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert "umount source" in done.stdout
    folder = Path(environment["DATA_DIR"]) / "source"
    assert mounts_below(folder) == [folder]
    run_backup(environment, "umount", "source").expect(0)


@needs_fuse
def test_the_source_is_mounted_read_only_unless_asked_otherwise(
    server: SeaweedFS, environment: dict[str, str], source: Bucket
) -> None:
    objects = {"folder/a": b"a", "b": b"b"}
    source.put(objects)
    with mounted_by_hand(environment, "source") as folder:
        assert tree(folder) == objects
        for write in (
            lambda: (folder / "new").write_bytes(b"x"),
            lambda: (folder / "b").unlink(),
            lambda: (folder / "new").mkdir(),
        ):
            with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                write()
    assert source.contents() == objects

    writer = {
        "SOURCE_ACCESS_KEY_ID": WRITER.access_key_id,
        "SOURCE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
    }
    with mounted_by_hand({**environment, **writer}, "source", "--read-write") as folder:
        (folder / "folder" / "restored").write_bytes(b"restored")
    assert source.contents() == {**objects, "folder/restored": b"restored"}


@needs_fuse
def test_a_mount_that_s3_refuses_fails_in_seconds_with_the_reason(environment: dict[str, str]) -> None:
    wrong = with_target_secrets(environment, "first", secret_access_key="wrong")
    result = run_backup(wrong, "mount", "target-first").expect(2)
    assert "target-first" in result.output
    assert "SignatureDoesNotMatch" in result.output
    assert result.duration_seconds < 10
    read_only = run_backup(environment, "mount", "source", "--read-write").expect(2)
    assert "AccessDenied" in read_only.output
    assert mounts_below(Path(environment["DATA_DIR"])) == []


@needs_fuse
def test_a_mount_that_is_in_use_stays_and_the_reason_is_told(
    environment: dict[str, str], target: Bucket
) -> None:
    run_backup(environment, "mount", "target-first").expect(0)
    folder = Path(environment["DATA_DIR"]) / "target-first"
    (folder / "file").write_bytes(b"x")
    with subprocess.Popen(["cat"], cwd=folder, stdin=subprocess.PIPE) as user:
        result = run_backup(environment, "umount", "target-first").expect(2)
        assert "busy" in result.output
        assert f"Leave {folder}" in result.output
        assert mounts_below(folder) == [folder]
        assert (folder / "file").read_bytes() == b"x"
        assert user.stdin
        user.stdin.close()
        user.wait(10)
    run_backup(environment, "umount", "target-first").expect(0)
    assert target.contents() == {"file": b"x"}


@needs_fuse
def test_without_a_name_all_are_unmounted_whatever_becomes_of_one(
    environment: dict[str, str], target: Bucket
) -> None:
    assert "nothing is mounted" in run_backup(environment, "umount").expect(0).output
    for name in ("source", "first"):  # for target-first
        run_backup(environment, "mount", name).expect(0)
    data = Path(environment["DATA_DIR"])
    (data / "target-first" / "file").write_bytes(b"x")
    with subprocess.Popen(["cat"], cwd=data / "source", stdin=subprocess.PIPE) as user:
        result = run_backup(environment, "umount").expect(2)
        assert "source: cannot be unmounted" in result.output
        assert mounts_below(data) == [data / "source"]
        assert target.contents() == {"file": b"x"}
        assert user.stdin
        user.stdin.close()
    run_backup(environment, "umount").expect(0)
    assert mounts_below(data) == []


# -------------------------------------------------------------------------------- A shell that is a container

MOUNT = f"{sys.executable} {BACKUP} mount target-first"
BY_HAND = f"{MOUNT} && echo by hand >$DATA_DIR/target-first/file"


def as_container(environment: Mapping[str, str], script: str) -> subprocess.CompletedProcess[str]:
    """A shell with this script as a container has it: below backup.py as process 1."""
    command = as_pid_1(BACKUP, "sh", "-c", script)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


@needs_fuse
@pytest.mark.parametrize("code", [0, 3])
def test_what_a_shell_left_mounted_is_unmounted_before_the_container_ends(
    environment: dict[str, str], target: Bucket, code: int
) -> None:
    """With PID 1 all of its processes end, and what tigrisfs has not uploaded is lost."""
    done = as_container(environment, f"{BY_HAND}; exit {code}")
    assert done.returncode == code, done.stderr
    assert "[target-first] is unmounted, everything is uploaded" in done.stdout + done.stderr
    assert target.contents() == {"file": b"by hand\n"}, "and the lease is given back"


@pytest.mark.long
@needs_fuse
def test_what_could_not_be_uploaded_then_is_an_error_of_the_container(
    environment: dict[str, str], target: Bucket
) -> None:
    with FaultProxy(target.server.endpoint) as proxy:
        proxy.add(lambda request: request.is_write and request.key == "file", Action.REFUSE)
        done = as_container(with_target(environment, "first", endpoint=proxy.endpoint), BY_HAND)
    assert done.returncode == 2
    assert "AccessDenied (403): injected (tigrisfs: Failed to flush small file file)" in done.stderr
    assert target.sizes() == {}


@needs_fuse
def test_a_mount_that_has_only_begun_when_the_shell_ends_is_unmounted_too(
    environment: dict[str, str], target: Bucket
) -> None:
    begun = "until grep -qs tigrisfs /proc/[0-9]*/comm; do :; done"
    done = as_container(environment, f"{MOUNT} & {begun}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[target-first] is unmounted, everything is uploaded" in done.stdout + done.stderr
    assert target.sizes() == {}


@needs_fuse
def test_a_shell_that_is_stopped_leaves_nothing_mounted(environment: dict[str, str], target: Bucket) -> None:
    command = as_pid_1(BACKUP, "sh", "-c", f"{BY_HAND}; echo ready; sleep 100; true")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "ready\n" in iter(process.stdout.readline, "")
        os.kill(children(process.pid)[0], signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert target.contents() == {"file": b"by hand\n"}


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    store = backup.Store("first", "http://localhost:1", "bucket", "", "KEY-ID", "KEY-SECRET")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    mount = mount_of_folder(store, tmp_path)
    assert list(mount.files(tmp_path)) == ["folder/file"]
    with pytest.raises(backup.BackupError, match=r"listing .*file: Not a directory"):
        mount.files(tmp_path / "folder" / "file")


# --------------------------------------------------------------------------------------- Mounts that are dead


def leave_a_dead_mount(environment: Mapping[str, str], name: str) -> Path:
    """What a machine's crash or an out-of-memory kill leaves: a mount whose tigrisfs is gone."""
    run_backup(environment, "mount", name).expect(0)
    folder = Path(environment["DATA_DIR"]) / name
    keepers = [
        pid
        for pid, line in processes_with(environment["DATA_DIR"]).items()
        if "tigrisfs" in line or str(BACKUP) in line
    ]
    assert len(keepers) == 2
    # The one that would clean up first; the other one may end with it.
    for pid in sorted(keepers, key=lambda pid: "tigrisfs" in command_line(pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in keepers), 10, "both are gone")
    # The first access may get ECONNABORTED, all others ENOTCONN.
    with pytest.raises(OSError, match=f"{os.strerror(errno.ENOTCONN)}|{os.strerror(errno.ECONNABORTED)}"):
        list(folder.iterdir())
    return folder


@needs_fuse
@pytest.mark.parametrize("command", [["run"], ["mount", "source"]])
def test_a_dead_mount_is_cleaned_up_by_the_next_command(
    environment: dict[str, str], source: Bucket, command: list[str]
) -> None:
    source.put({"a": b"a"})
    folder = leave_a_dead_mount(environment, "source")
    result = run_backup(environment, *command).expect(0)
    assert "dead mount" in result.output
    if command[0] == "mount":
        assert mounts_below(folder) == [folder]
        assert tree(folder) == {"a": b"a"}
        run_backup(environment, "umount", "source").expect(0)
    assert mounts_below(folder) == []


def runtime_of(environment: Mapping[str, str]) -> backup.Runtime:
    """What parts of a command need that are tried alone."""
    report = backup.Report("id", "label", datetime.now(UTC))
    console = backup.Console(debug=False)
    return backup.Runtime(load_settings(environment), environment, console, backup.Stop(), 1000, report)


@needs_fuse
@pytest.mark.parametrize(("status", "number"), [(403, errno.EACCES), (400, errno.EINVAL)])
def test_a_mount_that_s3_refuses_or_fails_is_not_dead(
    environment: dict[str, str], target: Bucket, tmp_path: Path, status: int, number: int
) -> None:
    """Somebody serves it, and may have something to upload: it stays."""
    runtime, path = runtime_of(environment), tmp_path / "theirs"
    with FaultProxy(target.server.endpoint) as proxy:
        behind = SimpleNamespace(server=proxy, name=target.name)
        with mounted(behind, path):
            proxy.add(lambda request: request.kind == "LIST", Action.REFUSE, status=status, code="No")
            with pytest.raises(OSError, match=os.strerror(number)):
                list(path.iterdir())
            assert not backup.remove_dead_mount(runtime, path)
            assert mounts_below(path) == [path]
            proxy.clear()


@needs_fuse
def test_the_next_command_removes_temporary_mounts_of_whatever_was_killed(
    environment: dict[str, str], source: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `verify` and of a restore, too; what somebody serves, or made elsewhere, stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runtime = runtime_of(environment)
    store = runtime.settings.source
    dead, alive = tmp_path / "s3borgbackup-abcdef_7" / "source", tmp_path / "s3borgbackup-abcdef_8" / "source"
    elsewhere = tmp_path / "mine" / "source"
    for folder in (dead, elsewhere):
        folder.mkdir(parents=True)
        command = backup.tigrisfs_command(store, "us-east-1", folder, True, PLAN, environment)
        child = backup.Child(*command, print, print)
        wait_until(lambda folder=folder: mounts_below(folder), 20, "it is mounted")
        child.kill()
        assert child.wait(0) is not None
    with mounted(source, alive), backup.mounted(runtime, store, "us-east-1", read_only=True) as mount:
        mount.wait_until_usable()
        assert not dead.parent.exists()
        assert mounts_below(alive) == [alive]
        assert mounts_below(elsewhere) == [elsewhere]
    subprocess.run(["fusermount3", "-uz", elsewhere], check=True)


@needs_fuse
def test_a_mount_that_cannot_be_detached_does_not_outlive_its_lease(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, target: Bucket
) -> None:
    """Unmounting it hangs, and somebody has a file open: tigrisfs is killed, and the lease is to expire."""
    runtime = runtime_of({**environment, "STALL_TIMEOUT": "5"})
    store = runtime.settings.targets[0].store
    lease = backup.Lease(runtime, backup.S3Client(store), "a test", only_reads=True)
    with (
        pytest.raises(backup.BackupError),
        backup.mounted(runtime, store, "us-east-1", False, lease) as mount,
    ):
        mount.wait_until_usable()
        stream = (mount.path / "open").open("wb")
        monkeypatch.setattr(backup, "MOUNT_SECONDS", 0)
    assert not is_running(mount.child.pid)
    assert lease.expires
    with suppress(OSError):
        stream.close()
    target.clear()


@needs_fuse
@pytest.mark.parametrize(("name", "code"), [("source", 0), ("target-first", 2)])
def test_a_dead_mount_can_be_unmounted(environment: dict[str, str], name: str, code: int) -> None:
    """What was written to it may be lost: that is told, once."""
    folder = leave_a_dead_mount(environment, name)
    result = run_backup(environment, "umount").expect(code)
    assert mounts_below(folder) == []
    assert "everything is uploaded" not in result.output
    assert ("may have held what is not uploaded" in result.output) == bool(code)
    assert "is not mounted" in run_backup(environment, "umount", name).expect(0).output


@needs_fuse
def test_what_tigrisfs_held_when_it_was_killed_is_told_by_umount(
    environment: dict[str, str], target: Bucket
) -> None:
    with FaultProxy(target.server.endpoint) as proxy:
        proxy.add(lambda request: request.is_write and request.key == "file", Action.HANG)
        environment = with_target(environment, "first", endpoint=proxy.endpoint)
        run_backup(environment, "mount", "first").expect(0)
        (Path(environment["DATA_DIR"]) / "target-first" / "file").write_bytes(b"x")
        tigrisfs = [
            pid
            for pid, line in processes_with(environment["DATA_DIR"]).items()
            if "tigrisfs" in line and str(BACKUP) not in line
        ]
        os.kill(tigrisfs[0], signal.SIGKILL)
        wait_until(lambda: not mounts_below(Path(environment["DATA_DIR"])), 20, "the keeper has ended")
        assert "tigrisfs ended with 137" in run_backup(environment, "umount").expect(2).output
    assert "nothing is mounted" in run_backup(environment, "umount").expect(0).output


@needs_fuse
def test_the_mounts_of_a_run_are_not_unmounted(
    environment: dict[str, str], source: Bucket, target: Bucket
) -> None:
    source.put({"a": b"a"})
    with FaultProxy(source.server.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "GET", Action.DELAY, after=1, seconds=60)
        with Backup({**environment, "SOURCE_ENDPOINT": proxy.endpoint}) as running:
            running.wait_for_line("borg create begins")
            for name in ("source", "first"):
                assert "another command has it" in run_backup(environment, "umount", name).expect(2).output
            assert "nothing is mounted" in run_backup(environment, "umount").expect(0).output
            proxy.clear()
            running.wait().expect(0)


@needs_fuse
def test_who_mounts_second_waits_for_the_first(environment: dict[str, str], target: Bucket) -> None:
    """And fails as it does, or where it asked for something else."""
    with FaultProxy(target.server.endpoint) as proxy:
        environment = with_target(environment, "first", endpoint=proxy.endpoint)
        slow = proxy.add(lambda request: request.kind == "LIST", Action.DELAY, seconds=60)
        with Backup(environment, "mount", "first") as first, Backup(environment, "mount", "first") as second:
            wait_until(lambda: slow.hit, 20, "a keeper is at it")
            time.sleep(1)
            assert second.process.poll() is None
            proxy.clear()
            outputs = [each.wait().expect(0).output for each in (first, second)]
            assert sorted("already" in output for output in outputs) == [False, True]
    run_backup(environment, "umount").expect(0)
    run_backup(environment, "mount", "source").expect(0)
    result = run_backup(environment, "mount", "source", "--read-write").expect(2)
    assert "already, read-only" in result.output


@needs_fuse
def test_a_run_refuses_a_mount_point_that_is_in_use_and_says_how_to_free_it(
    environment: dict[str, str], source: Bucket, target: Bucket
) -> None:
    """What a user mounted by hand is not taken away, and not used either."""
    source.put({"a": b"a"})
    with mounted_by_hand(environment, "source") as folder:
        result = run_backup(environment).expect(2)
        assert "backup.py umount source" in result.output
        assert tree(folder) == {"a": b"a"}
    assert target.sizes() == {}


# -------------------------------------------------------------------------------------- When a mount is ready


@needs_fuse
def test_a_mount_around_the_mount_point_is_not_taken_for_the_mount(
    environment: dict[str, str], source: Bucket, tmp_path: Path
) -> None:
    """Only the exact mount point counts: /data may be a mount itself, and `source-old` may be one beside.

    tigrisfs is replaced by a program that never mounts. Its folder must not pass for the source.
    """
    source.put({"a": b"a"})
    programs = tmp_path / "programs"
    programs.mkdir()
    fake = programs / "tigrisfs"
    fake.write_text("#!/bin/sh\necho nothing is mounted >&2\nexit 3\n")
    fake.chmod(0o755)
    with mounted_by_hand({**environment, "DATA_DIR": f"{environment['DATA_DIR']}/source-old"}, "source"):
        start = time.monotonic()
        result = run_backup(
            {**environment, "PATH": f"{programs}:{environment['PATH']}"}, "mount", "source"
        ).expect(2)
        assert time.monotonic() - start < 20
    assert "cannot be mounted" in result.output
    assert "nothing is mounted" in result.output
