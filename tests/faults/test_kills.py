"""SIGKILL of a whole run, at moments spread over all that it does: the next run needs nobody."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.conftest import Table
from faults.proof import prove_intact
from helpers import (
    Backup,
    Bucket,
    Result,
    descendants,
    kill_all,
    run_backup,
    settings,
    wait_until,
    with_target,
)
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

SEED = 4
WORKERS = 4
INIT_KILLS, LATER_KILLS = 1, 5  # of each worker
FAULT = "SIGKILL of everything, in mid-run"


@dataclass
class Site:
    """One worker's source, its repositories and its folder; `chance` is all that is random here."""

    environment: dict[str, str]
    source: Bucket
    targets: Sequence[Bucket]
    folder: Path
    chance: random.Random

    def change(self) -> None:
        """Gives the next run something to create, to prune and to compact."""
        small = {f"folder/{self.chance.randrange(20)}": self.chance.randbytes(100_000) for _ in range(3)}
        self.source.put({**small, "large": self.chance.randbytes(6_000_000)})

    def to(self, target: Bucket) -> dict[str, str]:
        """The configuration with this bucket as the target."""
        return with_target(self.environment, "first", path=target.name)


def make_site(
    number: int, server: SeaweedFS, new_bucket: Callable[..., Bucket], folder: Path, target_count: int
) -> Site:
    """A source with some objects, and empty targets."""
    source, targets = new_bucket("source"), [new_bucket("target") for _ in range(target_count)]
    entry = {"path": targets[0].name, "prune": "--keep-last=1", "compact": 0}
    environment = settings(server, folder, source.name, {"first": entry}, LEASE_TTL="10")
    site = Site(environment, source, targets, folder, random.Random(SEED * 1000 + number))
    source.put({f"folder/{name}": site.chance.randbytes(20_000) for name in range(20)})
    site.change()
    return site


def kill_everything(backup: Backup, chance: random.Random) -> Result:
    """SIGKILL for backup.py, borg and tigrisfs, in any order, and before one can see another's end."""
    everybody = [backup.pid, *descendants(backup.pid)]
    for pid in everybody:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    chance.shuffle(everybody)
    kill_all(everybody)
    return backup.wait(10)


def kill_after(environment: dict[str, str], seconds: float, chance: random.Random, line: str = "") -> None:
    """Starts a run and kills it that many seconds later, or after its `line`; a moment too late is halved."""
    while True:
        with Backup(environment) as backup:
            if line:
                backup.wait_for_line(line)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: backup.process.poll() is not None, seconds, "its end")
            result = kill_everything(backup, chance)
        if result.exit_code != 0:
            result.expect(128 + signal.SIGKILL)
            return
        seconds /= 2


def init_seconds(site: Site) -> float:
    """How long a run takes to make a new repository."""
    with Backup(site.environment) as backup:
        backup.wait_for_line("a new repository is made")
        start = time.monotonic()
        backup.wait_for_line("borg create begins")
        seconds = time.monotonic() - start
        backup.wait().expect(0)
    return seconds


def kill_in_init(site: Site, table: Table, moments: Sequence[float]) -> None:
    """Kills a first run at each of the moments after `borg init` began, each in a new repository."""
    for target, seconds in zip(site.targets, moments, strict=True):
        with table.attempt(FAULT):
            kill_after(site.to(target), seconds, site.chance, "a new repository is made")
            prove_intact(site.to(target), site.source, target, site.folder)


def kill_later(site: Site, table: Table, fractions: Sequence[float]) -> None:
    """Kills runs with an existing repository, at these fractions of the time that such a run takes."""
    target = site.targets[-1]
    environment = site.to(target)
    site.change()
    duration = run_backup(environment).expect(0).duration_seconds
    for number, fraction in enumerate(fractions):
        site.change()
        with table.attempt(FAULT):
            kill_after(environment, fraction * duration, site.chance)
            if number % 3 == 1 or number == len(fractions) - 1:
                prove_intact(environment, site.source, target, site.folder)
            else:
                run_backup(environment).expect(0)


def spread(worker: int, count: int, chance: random.Random) -> list[float]:
    """`count` fractions for one of the workers; those of all workers lie evenly, one in each step."""
    steps = [number * WORKERS + worker for number in range(count)]
    return [(step + chance.random()) / (WORKERS * count) for step in steps]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_killed_at_any_moment_is_repeated_without_help_and_nothing_is_lost(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, table: Table
) -> None:
    """24 moments: 4 while a new repository is made, 20 of runs that create, prune and compact.

    A run after each of them waits for the lease of the dead one, and succeeds.
    """
    making = init_seconds(make_site(0, server, new_bucket, tmp_path / "measured", 1))
    sites = [
        make_site(number, server, new_bucket, tmp_path / f"worker{number}", INIT_KILLS)
        for number in range(1, WORKERS + 1)
    ]

    def work(worker: int) -> None:
        site = sites[worker]
        moments = [fraction * making for fraction in spread(worker, INIT_KILLS, site.chance)]
        kill_in_init(site, table, moments)
        kill_later(site, table, spread(worker, LATER_KILLS, site.chance))

    # A worker's thread lives as long as what it starts: children are told when the starting thread ends.
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))


def test_a_run_killed_now_and_then_is_repeated_without_help(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, table: Table
) -> None:
    """Once while a new repository is made, and twice later; the test above has many more moments."""
    site = make_site(0, server, new_bucket, tmp_path, 1)
    kill_in_init(site, table, [0.5])
    kill_later(site, table, [0.3, 0.7])
