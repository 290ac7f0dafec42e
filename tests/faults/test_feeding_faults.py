"""S3 refuses or leaves open what is asked beside borg's reads, or an object changes between two reads."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import (
    Backup,
    Bucket,
    Repository,
    leftovers,
    let_age,
    patch_backup,
    run_backup,
    settings,
    wait_until,
)
from proof import Table, newest_contents
from proxy import Action, FaultProxy, Request
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

MANY = 2300  # more than wait for their headers at a time
DOCKER_STOP_SECONDS = 10
LARGER_THAN_CACHE_BYTES = 200_000_000  # so that the mount does not know any more what was before it


def is_own_head(request: Request) -> bool:
    """A question of ours for an object's headers; TigrisFS says who it is."""
    return request.kind == "HEAD" and "user-agent" not in request.headers


@pytest.mark.long
def test_headers_that_s3_refuses_are_told_once_and_hold_nobody_up(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    source.put({f"{number:04}": str(number).encode() for number in range(MANY)})
    let_age(source)
    with table.attempt("each question for headers is refused"), FaultProxy(server.endpoint) as proxy:
        environment = settings(
            server, tmp_path, source.name, {"first": target.name}, SOURCE_ENDPOINT=proxy.endpoint
        )
        run_backup({**environment, "HEADERS": "off"}).expect(0)
        proxy.add(is_own_head, Action.REFUSE, status=403, code="AccessDenied")
        result = run_backup(environment).expect(0)
        assert result.output.count("headers cannot be asked for") == 1
        assert "(403)" in next(line for line in result.lines if "headers cannot be asked for" in line)
        assert newest_contents(target, tmp_path, environment) == source.contents()
        repository = Repository.download(target, tmp_path / "local")
        manifest = repository.manifest(repository.archives()[-1])
        assert len(manifest) == MANY
        assert not any("headers" in entry for entry in manifest.values())


@pytest.mark.long
def test_an_object_that_is_archived_without_its_headers_is_named(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    """The next run asks again."""
    source.put({f"{number:04}": str(number).encode() for number in range(9)})
    let_age(source)
    with table.attempt("a question for headers is refused"), FaultProxy(server.endpoint) as proxy:
        environment = settings(
            server, tmp_path, source.name, {"first": target.name}, SOURCE_ENDPOINT=proxy.endpoint
        )
        run_backup({**environment, "HEADERS": "off"}).expect(0)
        refused = proxy.add(
            lambda request: is_own_head(request) and request.key == "0004",
            Action.REFUSE,
            status=403,
            code="AccessDenied",
        )
        words = "'0004' is archived without its headers: "
        assert words in run_backup(environment).expect(0).output
        proxy.remove(refused)
        assert words not in run_backup(environment).expect(0).output
        repository = Repository.download(target, tmp_path / "local")
        _, first, second = (repository.manifest(archive) for archive in repository.archives())
        assert [key for key, entry in first.items() if "headers" not in entry] == ["0004"]
        assert all("headers" in entry for entry in second.values())


def test_headers_that_s3_does_not_answer_hold_no_stopped_run(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    source.put({f"folder/{number}": os.urandom(1000) for number in range(50)})
    let_age(source)
    with table.attempt("stopped while headers are waited for"), FaultProxy(server.endpoint) as proxy:
        environment = settings(
            server, tmp_path, source.name, {"first": target.name}, SOURCE_ENDPOINT=proxy.endpoint
        )
        run_backup({**environment, "HEADERS": "off"}).expect(0)
        fault = proxy.add(is_own_head, Action.HANG)
        with Backup(environment) as running:
            wait_until(lambda: fault.hit >= 16, 60, "headers are asked for")
            start = time.monotonic()
            running.send_signal(signal.SIGTERM)
            result = running.wait(60).expect(128 + signal.SIGTERM)
        assert time.monotonic() - start < DOCKER_STOP_SECONDS
        assert not any(line.startswith(("Traceback", "Exception")) for line in result.lines), result.output
        assert leftovers(tmp_path) == []
        assert target.locks() == []
        assert [path.name for path in (tmp_path / "cache" / "s3borgbackup").iterdir() if path.is_dir()] == []
        assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.long
def test_a_source_that_answers_no_more_is_given_its_time_once_and_not_for_each_object(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it did not give is named, and nothing is pruned; the next run has it."""
    patch_backup(monkeypatch, tmp_path, "backup.PROVEN = backup.Patience(5, 2, 2)")
    source.put({f"{number:03}": os.urandom(100) for number in range(200)})
    with table.attempt("the source answers no more"), FaultProxy(server.endpoint) as proxy:
        made = settings(
            server, tmp_path, source.name, {"first": target.name}, SOURCE_ENDPOINT=proxy.endpoint,
            READ_AHEAD_THREADS="4",
        )  # fmt: skip
        is_fetched = lambda request: request.headers.get("range") == "bytes=0-99"  # noqa: E731
        proxy.add(is_fetched, Action.REFUSE, status=503, code="ServiceUnavailable", after=50)
        result = run_backup(made).expect(2)
        assert "150 objects of the source could not be read" in result.output
        assert "ServiceUnavailable (503)" in result.output
        assert proxy.count(is_fetched) < 200 + 4 * 10, "each of four threads tries one object again and again"
        proxy.clear()
        run_backup(made).expect(0)
        assert newest_contents(target, tmp_path, made) == source.contents()


@pytest.mark.long
def test_a_manifest_does_not_take_what_a_late_target_reads_for_what_others_have_read(
    server: SeaweedFS,
    source: Bucket,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The object is overwritten when one target is done with it, and the other has not begun."""
    impatient = "backup.JOIN_SECONDS, backup.SOURCE_CACHE_MB = 1, backup.SMALLEST_CACHE_MB"
    patch_backup(monkeypatch, tmp_path, impatient)
    targets = {name: new_bucket(name) for name in ("first", "second")}
    source.put({"object": b"old", "then": bytes(LARGER_THAN_CACHE_BYTES)})
    with table.attempt("an object changes between two targets"), FaultProxy(server.endpoint) as proxy:
        entries = {
            "first": targets["first"].name,
            "second": {"path": targets["second"].name, "endpoint": proxy.endpoint},
        }
        environment = settings(server, tmp_path, source.name, entries)
        hanging = proxy.add(lambda request: request.key == "config" and request.is_write, Action.HANG)
        with Backup(environment) as running:
            running.wait_for_line("[target-first] done")
            assert hanging.hit
            assert "[target-second] borg create begins" not in "\n".join(running.lines)
            source.put({"object": b"new"})
            proxy.clear()
            running.wait().expect(0)
    for name, body in (("first", b"old"), ("second", b"new")):
        assert newest_contents(targets[name], tmp_path / name, environment)["object"] == body
        repository = Repository.download(targets[name], tmp_path / f"local-{name}")
        etag = repository.manifest(repository.archives()[-1])["object"]["etag"]
        assert etag in ("", hashlib.md5(body).hexdigest())
