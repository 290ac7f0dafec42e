"""S3 refuses or swallows writes in mid-run: the run ends, tells why, and the next one succeeds."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import Bucket, first_short, run_backup, sample_objects, settings
from proof import Table, newest_contents, prove_intact
from proxy import Action, FaultProxy, Request
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

SIDE_BY_SIDE = 8  # the runs mostly wait: for a stall to be noticed, for a dead run's lease to expire
LEASE_SECONDS = 10
STALL_SECONDS = 5
# Preflight's and our own requests to a store that does not answer end after 30 s, and one may be tried twice.
BOUND_SECONDS = 120
WHOLE_PROOF_EVERY = 10


@dataclass
class Site:
    """A source, a target behind a proxy of its own, and the environment for runs on them."""

    source: Bucket
    target: Bucket
    proxy: FaultProxy
    environment: dict[str, str]
    folder: Path
    runs: int = 0

    def change(self) -> None:
        """Give the next run something to store, so that it also has something to prune and to compact."""
        self.runs += 1
        self.source.put(
            {"changing": self.runs.to_bytes(4) * 25_000, f"new/{self.runs % 3}": b"x" * self.runs}
        )

    def writes(self) -> int:
        """How many writes the target has seen."""
        return self.proxy.count(lambda request: request.is_write)

    def survive(self, action: Action, first: int) -> None:
        """A run whose writes fail from the `first` on; then a normal one, which must succeed unaided."""
        self.change()
        fault = self.proxy.add(lambda request: request.is_write, action, after=first)
        result = run_backup(self.environment, timeout_seconds=BOUND_SECONDS)
        self.proxy.clear()
        if result.exit_code != 2:
            # Success, so everything is there: the one write that may fail is what gives back the lease.
            result.expect(0)
            assert fault.hit == 0 or "lease could not be given back" in result.output, result.output
            assert [key for key in self.target.sizes() if "lock." in key or key.endswith(".tmp")] == []
            contents = newest_contents(self.target, self.folder, self.environment)
            assert contents == self.source.contents()
        run_backup(self.environment).expect(0)
        assert self.target.locks() == []
        if self.runs % WHOLE_PROOF_EVERY == 0:
            prove_intact(self.environment, self.source, self.target, self.folder)


@contextmanager
def site(server: SeaweedFS, make: Callable[[str], Bucket], folder: Path) -> Iterator[Site]:
    """A site with a repository in which two runs have worked."""
    source, target = make("source"), make("target")
    source.put(sample_objects(7, 12, largest_bytes=20_000))
    with FaultProxy(server.endpoint) as proxy:
        entry = {
            "path": target.name,
            "endpoint": proxy.endpoint,
            "prune": "--keep-last=1",
            "compact": 0,
        }
        environment = settings(
            server,
            folder,
            source.name,
            {"first": entry},
            LEASE_TTL=str(LEASE_SECONDS),
            STALL_TIMEOUT=str(STALL_SECONDS),
        )
        made = Site(source, target, proxy, environment, folder)
        run_backup(environment).expect(0)
        made.change()
        yield made


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("action", "step"), [(Action.REFUSE, 3), (Action.HANG, 12)])
def test_writes_that_fail_from_the_nth_on_never_end_in_a_false_success(
    server: SeaweedFS,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    table: Table,
    action: Action,
    step: int,
) -> None:
    """Each `step`th write of a run; with S3BORGBACKUP_EVERY_WRITE set each one, which takes long."""
    with site(server, new_bucket, tmp_path / "count") as one:
        before = one.writes()
        run_backup(one.environment).expect(0)
        total = one.writes() - before
    assert total > 50, "a run that creates, prunes and compacts"
    step = 1 if os.environ.get("S3BORGBACKUP_EVERY_WRITE") else step
    numbers, lock = iter(range(0, total + step, step)), threading.Lock()
    word = {Action.REFUSE: "refused (403)", Action.HANG: "left without an answer"}[action]

    def work(worker: int) -> None:
        with site(server, new_bucket, tmp_path / f"worker-{worker}") as mine:
            while True:
                with lock:
                    first = next(numbers, None)
                if first is None:
                    break
                with table.attempt(f"all writes from the Nth of {total} on are {word}"):
                    mine.survive(action, first)
            prove_intact(mine.environment, mine.source, mine.target, mine.folder)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for done in [pool.submit(work, worker) for worker in range(SIDE_BY_SIDE)]:
            done.result()


# ----------------------------------------------------------------------------- What no repetition makes right


@pytest.fixture
def proxy(server: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def environment(
    server: SeaweedFS, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> dict[str, str]:
    """One object, which makes a segment that TigrisFS uploads in parts; stalls are far away."""
    source.put({"large": os.urandom(6_000_000)})
    entry = {"path": target.name, "endpoint": proxy.endpoint, "compression": "none"}
    return settings(server, tmp_path, source.name, {"first": entry}, STALL_TIMEOUT="900", LEASE_TTL="10")


def is_segment(request: Request) -> bool:
    """As TigrisFS writes it; those of a new repository are ours."""
    return request.key.startswith("data/0/") and "user-agent" in request.headers


@pytest.mark.parametrize(
    ("status", "code", "words"),
    first_short(
        [
            (413, "", "client_max_body_size"),  # a proxy's own page, not S3's words
            (409, "InvalidBucketState", "InvalidBucketState (409): injected"),
        ]
    ),
)
def test_uploads_that_are_refused_for_good_end_a_run_within_seconds(
    proxy: FaultProxy, environment: dict[str, str], status: int, code: str, words: str
) -> None:
    """Seen: 12 s. Small requests, such as those of the preflight, pass."""
    proxy.add(lambda request: request.body_bytes > 500_000, Action.REFUSE, status=status, code=code)
    result = run_backup(environment, timeout_seconds=60).expect(2)
    error = next(line for line in result.lines if line.startswith("first: target-first ("))
    assert f"({status})" in error
    assert words in error


@pytest.mark.long
def test_a_single_refusal_ends_no_run(
    proxy: FaultProxy, environment: dict[str, str], source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """As a server may answer for a moment while its keys or its configuration are renewed."""
    for kind, status, code in (
        ("INITIATE", 409, "OperationAborted"),
        ("PART", 403, "AccessDenied"),
        ("COMPLETE", 400, "InvalidRequest"),
        ("PUT", 404, "NoSuchBucket"),
    ):
        proxy.add(
            lambda request, kind=kind: request.kind == kind and is_segment(request),
            Action.REFUSE,
            times=1,
            status=status,
            code=code,
        )
    run_backup(environment).expect(0)
    statuses = [status for request, status in proxy.requests if is_segment(request)]
    assert sorted(status for status in statuses if status and status >= 400) == [400, 403, 404, 409]
    assert newest_contents(target, tmp_path, environment) == source.contents()


@pytest.mark.long
@pytest.mark.parametrize("repeated", first_short(["lost", "NoSuchUpload"]))
def test_an_object_that_is_there_though_no_answer_said_so_is_uploaded(
    proxy: FaultProxy,
    environment: dict[str, str],
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    repeated: str,
) -> None:
    """The answer to CompleteMultipartUpload is lost; some servers do not know the upload any more then."""

    def is_complete(request: Request) -> bool:
        return request.kind == "COMPLETE"

    proxy.add(is_complete, Action.LOSE_ANSWER, times=1 if repeated == "NoSuchUpload" else float("inf"))
    proxy.add(is_complete, Action.REFUSE, status=404, code="NoSuchUpload")
    run_backup(environment).expect(0)
    assert 200 not in [status for request, status in proxy.requests if is_complete(request)]
    assert newest_contents(target, tmp_path, environment) == source.contents()


@pytest.mark.long
def test_an_upload_that_was_aborted_is_not_taken_for_done(
    proxy: FaultProxy, environment: dict[str, str], source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """TigrisFS drops the data then, and borg would go on as if it were stored."""
    proxy.add(lambda request: request.kind == "PART", Action.REFUSE, times=1, status=404, code="NoSuchUpload")
    result = run_backup(environment)
    assert "tigrisfs lost what was written" in result.output
    run_backup(environment).expect(0)
    prove_intact(environment, source, target, tmp_path)
