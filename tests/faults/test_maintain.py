"""What can happen to a maintenance: killed, refused, beside a backup. What it keeps stays whole."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import (
    Backup,
    Bucket,
    descendants,
    first_short,
    kill_all,
    run_backup,
    settings,
    wait_until,
    with_target,
)
from proof import Table, newest_contents, prove_intact
from proxy import Action, FaultProxy
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

LEASE_SECONDS = 10
SLOW = "lzma,9"  # half a minute for LARGE_BYTES
LARGE_BYTES = 40_000_000


@dataclass
class Site:
    """A repository with something to prune and to compact, and a maintenance of it without a source."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket
    proxy: FaultProxy
    folder: Path

    @property
    def maintenance(self) -> dict[str, str]:
        """Other settings than the backup's: it prunes, and knows nothing of the source."""
        pruning = with_target(self.environment, "first", prune="--keep-last=1", compact=0)
        return {name: value for name, value in pruning.items() if not name.startswith("SOURCE_")}

    def back_up(self) -> None:
        """Makes an archive of which a part is new."""
        self.source.put({f"changing/{number}": os.urandom(300_000) for number in range(6)})
        run_backup(self.environment).expect(0)

    def prove_intact(self) -> None:
        """A maintenance succeeds unaided, what it keeps is whole, and so is what comes after it."""
        run_backup(self.maintenance, "maintain").expect(0)
        assert newest_contents(self.target, self.folder, self.environment) == self.source.contents()
        prove_intact(self.environment, self.source, self.target, self.folder)


@pytest.fixture
def site(server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path) -> Iterator[Site]:
    """Two archives."""
    with FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        limits = {"LEASE_TTL": str(LEASE_SECONDS), "STALL_TIMEOUT": "8", "LOG_LEVEL": "debug"}
        environment = settings(server, tmp_path, source.name, {"first": entry}, **limits)
        made = Site(environment, source, target, proxy, tmp_path)
        made.back_up()
        made.back_up()
        yield made


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_maintenance_that_is_killed_is_repeated_without_help(site: Site, table: Table) -> None:
    """While it prunes, compacts, and uploads."""
    for phase in ("borg prune", "borg compact", "compaction freed"):
        with table.attempt("SIGKILL of everything, in mid-maintenance"):
            site.back_up()
            with Backup(site.maintenance, "maintain") as running:
                running.wait_for_line(phase)
                kill_all([running.pid, *descendants(running.pid)])
            site.prove_intact()


@pytest.mark.parametrize("first", first_short([4, 12, 20, 28, 36]))
def test_a_maintenance_whose_writes_are_refused_never_says_that_it_is_done(
    site: Site, table: Table, first: int
) -> None:
    """From the Nth write on; of some 40, the last are the lease's."""
    with table.attempt("writes of a maintenance are refused (403) from the Nth on"):
        fault = site.proxy.add(lambda request: request.is_write, Action.REFUSE, after=first)
        result = run_backup(site.maintenance, "maintain")
        site.proxy.clear()
        if result.exit_code == 0:
            assert fault.hit == 0 or "lease could not be given back" in result.output, result.output
        else:
            result.expect(2)
            assert "AccessDenied" in result.output or "permission denied" in result.output.lower()
        site.prove_intact()


@pytest.mark.long
def test_a_maintenance_beside_a_backup_waits_for_its_turn(site: Site, table: Table) -> None:
    """And so does a backup beside a maintenance; each says who is at work."""
    with table.attempt("a maintenance during a backup"):
        site.source.put({"large": os.urandom(LARGE_BYTES)})
        with Backup(with_target(site.environment, "first", compression=SLOW)) as backup:
            wait_until(site.target.locks, 60, "borg has its lock in the bucket")
            busy = run_backup(site.maintenance, "maintain").expect(75)
            assert "another run works on this repository: a backup on " in busy.output
            backup.process.terminate()
            backup.wait(30)
        site.source.delete("large")
    with table.attempt("a backup during a maintenance"):
        site.proxy.add(lambda request: request.is_write and "data/" in request.key, Action.HANG, after=0)
        with Backup(site.maintenance, "maintain") as maintenance:
            maintenance.wait_for_line("borg prune")
            busy = run_backup(site.environment).expect(75)
            assert "another run works on this repository: maintenance on " in busy.output
            site.proxy.clear()
            maintenance.wait(60)
        site.prove_intact()
