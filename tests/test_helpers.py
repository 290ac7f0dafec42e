"""What the other tests rely on: leaks are seen, servers end with us, keys survive the way and back."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import botocore.exceptions
import pytest

from helpers import (
    Bucket,
    Repository,
    is_running,
    leftovers,
    mounted,
    mounts_below,
    remove_leftovers,
    sample_objects,
    wait_until,
)
from servers import ADMIN, READER, WRITER, Identity, SeaweedFS


def test_a_process_that_knows_the_tests_folder_is_seen_and_ended(tmp_path: Path) -> None:
    by_argument = subprocess.Popen(["sleep", "60"], cwd=tmp_path, env={"DATA_DIR": str(tmp_path)})
    by_environment = subprocess.Popen([sys.executable, "-c", "input()", str(tmp_path)], stdin=subprocess.PIPE)
    with by_argument, by_environment:
        wait_until(lambda: len(leftovers(tmp_path)) == 2, 10, "both are seen")
        remove_leftovers(tmp_path)
        assert by_argument.wait(10) == by_environment.wait(10) == -signal.SIGKILL
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("needs_fuse")
def test_a_mount_with_a_blank_in_its_path_is_seen_and_removed(tmp_path: Path, target: Bucket) -> None:
    folder = tmp_path / "a mount"
    with pytest.raises(subprocess.CalledProcessError), mounted(target, folder):
        assert f"mount {folder}" in leftovers(tmp_path)
        remove_leftovers(tmp_path)
    assert mounts_below(tmp_path) == []


def test_a_held_lock_in_a_bucket_is_told_from_an_empty_roster(target: Bucket) -> None:
    target.put({"r/lock.roster": b'{"shared": []}', "r/data/0/1": b"x", "lock.exclusive/host.1-0": b""})
    assert target.locks() == ["lock.exclusive/host.1-0"]
    target.put({"lock.exclusive/host.1-0": b"", "r/lock.roster": b'{"shared": [["host", 1, 0]]}'})
    assert sorted(target.locks()) == ["lock.exclusive/host.1-0", "r/lock.roster"]
    target.clear()


def test_a_server_ends_when_the_tests_are_killed(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "from pathlib import Path; from servers import Moto\n"
        "server = Moto(Path(sys.argv[2])).start(); print(server.process.pid, flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout
        server_pid = int(tests.stdout.readline())
        os.kill(tests.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(server_pid), 10, "the server has ended")


def test_a_server_keeps_its_port_and_data_over_a_restart(tmp_path: Path) -> None:
    with SeaweedFS(tmp_path / "server") as server:
        bucket = Bucket(server, "kept").create()
        endpoint, objects = server.endpoint, sample_objects(2, 40)
        bucket.put(objects)
        limited = server.add_identity(Identity("limited-key", "limited-secret", ("Read", "List"), "kept"))
        server.stop()
        server.start()
        assert server.endpoint == endpoint
        assert bucket.contents() == objects
        assert server.client(limited).list_objects_v2(Bucket="kept")["KeyCount"] == 40


@pytest.mark.parametrize(
    ("identity", "bucket_name", "status", "code"),
    [
        (replace(WRITER, access_key_id="unknown"), None, 403, "InvalidAccessKeyId"),
        (replace(WRITER, secret_access_key="wrong"), None, 403, "SignatureDoesNotMatch"),
        (READER, None, 403, "AccessDenied"),
        (WRITER, "missing", 404, "NoSuchBucket"),
        (ADMIN, "missing", 404, "NoSuchBucket"),
    ],
)
def test_the_server_refuses_as_s3_does(
    server: SeaweedFS, target: Bucket, identity: Identity, bucket_name: str | None, status: int, code: str
) -> None:
    with pytest.raises(botocore.exceptions.ClientError) as refusal:
        server.client(identity).put_object(Bucket=bucket_name or target.name, Key="k", Body=b"")
    assert refusal.value.response["Error"]["Code"] == code
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == status


def test_the_server_enforces_conditional_writes(target: Bucket) -> None:
    def put(**condition: str) -> int:
        try:
            return target.client.put_object(Bucket=target.name, Key="lease", Body=os.urandom(8), **condition)[
                "ResponseMetadata"
            ]["HTTPStatusCode"]
        except botocore.exceptions.ClientError as error:
            return error.response["ResponseMetadata"]["HTTPStatusCode"]

    assert [put(IfNoneMatch="*"), put(IfNoneMatch="*")] == [200, 412]
    etag = target.client.head_object(Bucket=target.name, Key="lease")["ETag"]
    assert [put(IfMatch='"00"'), put(IfMatch=etag), put(IfMatch=etag)] == [412, 200, 412]


@pytest.mark.usefixtures("needs_fuse")
def test_plain_borg_through_a_mount_and_back_by_download(
    tmp_path: Path, source: Bucket, new_bucket: Callable[..., Bucket]
) -> None:
    objects = sample_objects(3, 60)
    source.put(objects)
    target = new_bucket("target")
    with (
        mounted(source, tmp_path / "data/source", identity=READER) as source_folder,
        mounted(target, tmp_path / "data/target", prefix="a/repository") as target_folder,
    ):
        by_hand = Repository(target_folder)
        by_hand.borg("init", "--encryption=repokey-blake2", str(target_folder))
        by_hand.borg("create", "--noxattrs", f"{target_folder}::first", str(source_folder))
    copy = Repository.download(target, tmp_path / "copy", prefix="a/repository")
    copy.check()
    assert copy.archives() == ["first"]
    assert copy.contents("first", tmp_path / "data/source", tmp_path / "extracted") == objects
