"""A restore that is killed, stopped or refused: it never says that it is done, and its repetition ends it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import (
    Backup,
    Bucket,
    Result,
    descendants,
    first_short,
    full,
    is_running,
    mounts_below,
    remove_leftovers,
    run_backup,
    sample_objects,
    settings,
    small_disk,
    tree,
    wait_until,
    with_target,
)
from proof import Table
from proxy import Action, FaultProxy, Request
from servers import WRITER, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

OUTAGE_SECONDS = 40


@dataclass
class Site:
    """A repository, and a destination behind a proxy."""

    environment: dict[str, str]
    objects: dict[str, bytes]
    source: Bucket
    target: Bucket
    destination: Bucket
    proxy: FaultProxy
    folder: Path

    @property
    def to_bucket(self) -> tuple[str, ...]:
        """The command that restores into the destination."""
        return "restore", "first", "--to-bucket", self.destination.name

    def restore(self, **variables: str) -> Result:
        """Restores into the destination."""
        return run_backup({**self.environment, **variables}, *self.to_bucket, timeout_seconds=200)

    def prove(self) -> None:
        """The same command, with nothing in its way, ends what was interrupted."""
        self.proxy.clear()
        self.restore().expect(0)
        assert self.destination.contents() == self.objects
        assert self.uploads() == []

    def uploads(self) -> list[str]:
        """The keys of the uploads in parts that nobody has ended."""
        listed = self.destination.client.list_multipart_uploads(Bucket=self.destination.name)
        return [upload["Key"] for upload in listed.get("Uploads", ())]


@pytest.fixture
def site(server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path) -> Iterator[Site]:
    """With small objects and some that are uploaded in parts."""
    source, target, destination = (new_bucket(name) for name in ("source", "target", "destination"))
    objects = sample_objects(31, 400, largest_bytes=100_000)
    objects |= {f"large/{number}": os.urandom(36_000_000 if number % 2 else 7_000_000) for number in range(6)}
    source.put(objects)
    with FaultProxy(server.endpoint, 3) as proxy:
        environment = settings(
            server,
            tmp_path,
            source.name,
            {"first": target.name},
            LEASE_TTL="10",
            RESTORE_ENDPOINT=proxy.endpoint,
            RESTORE_ACCESS_KEY_ID=WRITER.access_key_id,
            RESTORE_SECRET_ACCESS_KEY=WRITER.secret_access_key,
        )
        run_backup(environment).expect(0)
        yield Site(environment, objects, source, target, destination, proxy, tmp_path)


def writes(request: Request) -> bool:
    """What writes an object that is restored."""
    return request.is_write and ".s3borgbackup-" not in request.key


def kill_everything(running: Backup) -> bool:
    """SIGKILL for backup.py; what it had started ends with it. False when it had just ended by itself."""
    everybody = [running.pid, *descendants(running.pid)]
    running.process.kill()
    result = running.wait(10)
    if result.exit_code == 0:
        return False
    result.expect(137)
    wait_until(lambda: not any(is_running(pid) for pid in everybody), 10, "all of them are gone")
    return True


KILLED_WITH = (*range(1, 402, 80), "large/0", "large/3", "large/5")


def wait_for_the_moment(running: Backup, written: Callable[[], set[str]], moment: int | str) -> None:
    """Returns when so many objects are being written or are written, or when this one is."""

    def has_come() -> bool:
        names = written()
        return len(names) >= moment if isinstance(moment, int) else moment in names

    wait_until(lambda: has_come() or running.process.poll() is not None, 60, f"{moment} is written")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("to_bucket", [True, False])
def test_a_restore_killed_at_any_moment_is_ended_by_its_repetition(
    site: Site, table: Table, to_bucket: bool
) -> None:
    """Half-written objects are no hindrance, and what is whole is not written again."""
    out = site.folder / "out"
    words = site.to_bucket if to_bucket else ("restore", "first", "--to", str(out))
    interrupted = 0

    def written() -> set[str]:
        if not to_bucket:
            return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        return {request.key for request, _ in site.proxy.requests[before:] if writes(request)}

    for moment in KILLED_WITH:
        site.destination.clear()
        shutil.rmtree(out, ignore_errors=True)
        before = len(site.proxy.requests)
        with table.attempt("SIGKILL of a restore, in its middle"):
            with Backup(site.environment, *words) as running:
                wait_for_the_moment(running, written, moment)
                interrupted += kill_everything(running)
            remove_leftovers(site.folder)  # dead mounts, which a container takes along
            run_backup(site.environment, *words).expect(0)
            assert (site.destination.contents() if to_bucket else tree(out)) == site.objects
            assert site.uploads() == []
    assert interrupted >= len(KILLED_WITH) // 2, "moments that came too late"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_restore_that_is_stopped_ends_in_order_and_goes_on_later(site: Site, table: Table) -> None:
    slow = site.proxy.add(writes, Action.DELAY, seconds=0.3)
    with table.attempt("SIGTERM to a restore"):
        with Backup(site.environment, *site.to_bucket) as running:
            wait_until(lambda: slow.hit > 20, 60, "it writes")
            running.send_signal(signal.SIGTERM)
            site.proxy.clear()
            result = running.wait(30).expect(143)
        assert "restored" not in result.output.replace("restored into", "")
        assert mounts_below(site.folder) == []
        assert site.uploads() == []
        done = len(site.destination.sizes())
        assert done
        site.prove()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", first_short(["503", "reset"]))
def test_a_destination_that_fails_for_a_while_is_waited_for(site: Site, table: Table, fault: str) -> None:
    storms = {
        "503": {"action": Action.REFUSE, "status": 503, "code": "SlowDown"},
        "reset": {"action": Action.RESET},
    }
    with table.attempt(f"{OUTAGE_SECONDS} s of nothing but errors from the destination"):
        with Backup(site.environment, *site.to_bucket) as running:
            wait_until(lambda: site.proxy.count(writes) > 50, 60, "it writes")
            storm = site.proxy.add(lambda _: True, **storms[fault])
            wait_until(lambda: storm.hit, 30, "the storm is noticed")
            time.sleep(OUTAGE_SECONDS)
            assert running.process.poll() is None, "\n".join(running.lines)
            site.proxy.clear()
            running.wait(200).expect(0)
        assert site.destination.contents() == site.objects


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("action", "probability"), [(Action.REFUSE, 0.33), (Action.LOSE_ANSWER, 0.05), (Action.RESET, 0.2)]
)
def test_requests_that_fail_at_random_lose_nothing(
    site: Site, table: Table, action: Action, probability: float
) -> None:
    word = f"{probability:.0%} of a destination's requests fail ({action.name.lower()})"
    with table.attempt(word):
        site.proxy.add(lambda _: True, action, probability=probability, status=503, code="SlowDown")
        result = site.restore(STALL_TIMEOUT="60")
        if "no progress" not in result.output:
            result.expect(0)
            assert site.destination.contents() == site.objects
        site.prove()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", first_short([0, 10, 200, 400 + 3 + 3 * 5 - 1]))
def test_a_destination_that_refuses_writes_is_never_done(site: Site, table: Table, after: int) -> None:
    """From the first on, in the middle, and the last alone."""
    with table.attempt("writes to the destination are refused (403)"):
        fault = site.proxy.add(writes, Action.REFUSE, after=after, code="AccessDenied")
        result = site.restore().expect(2)
        assert fault.hit
        assert "AccessDenied (403)" in result.output
        assert "RESTORE_ACCESS_KEY_ID" in result.output
        assert "restored" not in result.output
        assert result.duration_seconds < 60
        site.prove()


@pytest.mark.long
def test_an_upload_is_ended_when_nobody_goes_on_with_it(site: Site, table: Table) -> None:
    """At once when a restore is stopped or refused, by the next one when it was killed; nobody else's is."""
    site.destination.client.create_multipart_upload(Bucket=site.destination.name, Key="large/foreign")

    def begin(running: Backup) -> None:
        hanging = site.proxy.add(lambda request: request.kind == "PART", Action.HANG)
        wait_until(lambda: hanging.hit > 1, 60, "it uploads in parts")
        assert len(site.uploads()) > 1
        assert running.process.poll() is None

    with table.attempt("SIGTERM within an upload in parts"):
        with Backup(site.environment, *site.to_bucket) as running:
            begin(running)
            running.send_signal(signal.SIGTERM)
            running.wait(20).expect(143)
        assert site.uploads() == ["large/foreign"]
    site.proxy.clear()
    refused = site.proxy.add(lambda request: request.kind == "PART", Action.REFUSE, after=1)
    with table.attempt("a part of an upload is refused (403)"):
        site.restore().expect(2)
        assert refused.hit
        assert site.uploads() == ["large/foreign"]
    site.proxy.clear()
    with table.attempt("SIGKILL within an upload in parts"):
        with Backup(site.environment, *site.to_bucket) as running:
            begin(running)
            kill_everything(running)
        site.proxy.clear()
        remove_leftovers(site.folder)
        assert len(site.uploads()) > 1
        site.restore().expect(0)
        assert site.uploads() == ["large/foreign"]
        assert site.destination.contents() == site.objects


@pytest.mark.long
def test_an_upload_whose_first_answer_was_lost_is_ended(site: Site, table: Table) -> None:
    """It is begun once more, within the same second, and the first one was begun by nobody else."""
    keys: set[str] = set()

    def is_first(request: Request) -> bool:
        is_new = request.kind == "INITIATE" and request.key not in keys
        keys.update({request.key} if is_new else ())
        return is_new

    with table.attempt("the first answer to each upload that begins is lost"):
        lost = site.proxy.add(is_first, Action.LOSE_ANSWER)
        site.restore().expect(0)
        assert lost.hit == 3
        assert site.uploads() == []
        assert site.destination.contents() == site.objects


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_restores_at_once_leave_each_other_alone(site: Site, table: Table, tmp_path: Path) -> None:
    """The second does not take the uploads of the first, which are slow, for those of a dead one."""
    slow = site.proxy.add(lambda request: request.kind == "PART", Action.DELAY, seconds=25)
    other = {**site.environment, "XDG_CACHE_HOME": str(tmp_path / "a"), "DATA_DIR": str(tmp_path / "b")}
    with table.attempt("two restores into one bucket at once"):
        with Backup(site.environment, *site.to_bucket) as first:
            wait_until(lambda: slow.hit > 1, 60, "the first uploads in parts")
            run_backup(other, *site.to_bucket, "plain.txt", timeout_seconds=200).expect(0)
            assert first.process.poll() is None, "it was too quick for the test"
            first.wait(200).expect(0)
        assert site.destination.contents() == site.objects
        assert site.uploads() == []


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_full_disk_is_told(site: Site, table: Table, tmp_path: Path) -> None:
    """Before anything is written, where the sizes tell; else when it is full."""
    words, disk = ("restore", "first", "--to"), tmp_path / "disk"
    disk.mkdir()
    with table.attempt("the disk that is restored to is full"), small_disk(disk):
        result = run_backup(site.environment, *words, str(disk)).expect(2)
        assert "free, and" in result.output
        assert "nothing was written" in result.output
        assert tree(disk) == {}
        with full(disk):
            result = run_backup(site.environment, *words, str(disk), "plain.txt").expect(2)
            assert "nothing was written" in result.output
    half = os.urandom(3_000_000)
    site.source.put({"half": half})
    run_backup(site.environment).expect(0)
    with table.attempt("the disk has room for the rest only"), small_disk(disk):
        (disk / "half").write_bytes(half[:2_000_000])
        run_backup(site.environment, *words, str(disk), "half").expect(0)
        assert tree(disk) == {"half": half}
    tiny = {f"tiny/{number}": b"x" for number in range(1100)}  # each takes 4096 bytes
    site.source.put(tiny)
    run_backup(site.environment).expect(0)
    with table.attempt("the disk that is restored to becomes full"), small_disk(disk):
        result = run_backup(site.environment, *words, str(disk), "tiny").expect(2)
        assert "No space left on device. Make room, and run it again" in result.output
        kept = len(tree(disk))
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        result = run_backup(site.environment, *words, str(disk), "tiny").expect(0)
        assert tree(disk) == tiny
        assert kept > 500


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_repository_that_changes_meanwhile_is_named_as_the_cause(site: Site, table: Table) -> None:
    """As when it is compacted by somebody whom no lease stops."""
    with FaultProxy(site.target.server.endpoint) as proxy:
        environment = with_target(site.environment, "first", endpoint=proxy.endpoint)
        hanging = proxy.add(
            lambda request: request.kind == "GET" and "/data/" in request.path, Action.HANG, after=2
        )
        with table.attempt("the repository's segments vanish while they are read"):
            with Backup(environment, *site.to_bucket) as running:
                wait_until(lambda: hanging.hit, 60, "it reads")
                site.target.delete(*[key for key in site.target.sizes() if key.startswith("data/")])
                proxy.clear()
                result = running.wait(120).expect(2)
            assert "another run changed the repository while it was read" in result.output
