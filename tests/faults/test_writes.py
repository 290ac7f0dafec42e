"""S3 refuses or swallows writes in mid-run: the run ends, tells why, and the next one succeeds."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import Bucket, run_backup, sample_objects, settings
from proof import Table, newest_contents, prove_intact
from proxy import Action, FaultProxy
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
