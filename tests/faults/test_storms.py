"""S3 fails for minutes and comes back: the run waits for it, and no object is lost."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import Backup, Bucket, first_short, run_backup, sample_objects, settings
from proof import Table, newest_contents, prove_intact
from proxy import Action, FaultProxy
from servers import WRITER, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

OUTAGE_SECONDS = 130
LARGE_BYTES = 60_000_000
SDK_TRIES = 4  # of TigrisFS for one deletion, before it says that it failed

STORMS = {
    "503": {"action": Action.REFUSE, "status": 503, "code": "SlowDown"},
    "500": {"action": Action.REFUSE, "status": 500, "code": "InternalError"},
    "reset": {"action": Action.RESET},
}


def weather_the_storm(
    server: SeaweedFS, make: Callable[[str], Bucket], folder: Path, side: str, storm: str
) -> None:
    """Every request to one side fails for minutes from the middle of `borg create` on."""
    source, target = make("source"), make("target")
    objects = sample_objects(11, 60)
    objects["large"] = bytes(range(256)) * (LARGE_BYTES // 256)
    source.put(objects)
    with FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "prune": "--keep-last=1"}
        if side == "target":
            entry["endpoint"] = proxy.endpoint
        environment = settings(server, folder, source.name, {"first": entry}, LEASE_TTL="20")
        if side == "source":
            environment["SOURCE_ENDPOINT"] = proxy.endpoint
        with Backup(environment) as backup:
            backup.wait_for_line("borg create begins")
            proxy.add(lambda _: True, **STORMS[storm])
            threading.Event().wait(OUTAGE_SECONDS)
            assert backup.process.poll() is None, "\n".join(backup.lines)
            proxy.clear()
            backup.wait(400).expect(0)
        assert newest_contents(target, folder, environment) == objects
        prove_intact(environment, source, target, folder)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_storms_of_minutes_on_either_side_lose_nothing(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, table: Table
) -> None:
    def work(side: str, storm: str) -> None:
        with table.attempt(f"{OUTAGE_SECONDS} s of nothing but errors from a side's S3"):
            weather_the_storm(server, new_bucket, tmp_path / f"{side}-{storm}", side, storm)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, side, storm) for side in ("source", "target") for storm in STORMS]:
            done.result()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("action", "probability"), first_short([(Action.REFUSE, 0.33), (Action.CUT, 0.33), (Action.RESET, 0.03)])
)
def test_requests_that_fail_at_random_lose_nothing(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    table: Table,
    action: Action,
    probability: float,
) -> None:
    """Both sides at once, from the first request to the last.

    TigrisFS repeats what was answered with an error. A write whose connection is reset can leave it with a
    file that it never uploads: then the run ends as stalled, and the next one succeeds.
    """
    source.put(sample_objects(12, 80))
    word = f"{probability:.0%} of all requests fail ({action.name.lower()})"
    with table.attempt(word), FaultProxy(server.endpoint, 5) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint, "prune": "--keep-last=1"}
        environment = settings(
            server,
            tmp_path,
            source.name,
            {"first": entry},
            SOURCE_ENDPOINT=proxy.endpoint,
            STALL_TIMEOUT="60",
            LEASE_TTL="20",
        )
        run_backup(environment).expect(0)
        source.put({"another": b"one"})
        proxy.add(lambda _: True, action, probability=probability, status=503, code="SlowDown")
        result = run_backup(environment, timeout_seconds=400)
        if action is not Action.RESET or "no progress" not in result.output:
            result.expect(0)
        proxy.clear()
        prove_intact(environment, source, target, tmp_path)


@pytest.mark.long
def test_a_last_deletion_that_fails_for_longer_than_tigrisfs_is_silent_is_waited_for(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    """Its SDK repeats it for seconds before TigrisFS complains; at an unmount it would be the last try."""
    source.put(sample_objects(13, 5))
    with table.attempt("503 for the last deletion of a run"), FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        environment = settings(server, tmp_path, source.name, {"first": entry})
        run_backup(environment).expect(0)
        fault = proxy.add(
            lambda request: request.kind == "DELETE" and request.key.startswith("integrity."),
            Action.REFUSE,
            times=SDK_TRIES + 2,
            status=503,
            code="SlowDown",
        )
        run_backup(environment).expect(0)
        assert fault.hit == SDK_TRIES + 2
        prove_intact(environment, source, target, tmp_path)


@pytest.mark.parametrize("name", first_short(["source", "target-first"]))
@pytest.mark.parametrize(
    ("fault", "exit_code"),
    first_short(
        [
            ({"status": 503, "code": "SlowDown", "times": SDK_TRIES + 2}, 0),
            ({"status": 403, "code": "AccessDenied"}, 2),
        ]
    ),
)
def test_what_a_person_wrote_is_uploaded_before_umount_says_so(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    table: Table,
    name: str,
    fault: dict[str, Any],
    exit_code: int,
) -> None:
    """A refusal is told within seconds: no waiting helps."""
    word = f"{fault['status']} for a file written by hand"
    with table.attempt(word), FaultProxy(server.endpoint) as proxy:
        environment = settings(
            server,
            tmp_path,
            source.name,
            {"first": {"path": target.name, "endpoint": proxy.endpoint}},
            source_identity=WRITER,
            SOURCE_ENDPOINT=proxy.endpoint,
        )
        options = ["--read-write"] if name == "source" else []
        run_backup(environment, "mount", name, *options).expect(0)
        proxy.add(lambda request: request.is_write and request.key == "file", Action.REFUSE, **fault)
        (tmp_path / "data" / name / "file").write_bytes(b"written by hand")
        result = run_backup(environment, "umount", name, timeout_seconds=60).expect(exit_code)
        bucket = source if name == "source" else target
        if exit_code:
            assert "AccessDenied" in result.output
            assert "everything is uploaded" not in result.output
        else:
            assert bucket.contents() == {"file": b"written by hand"}
