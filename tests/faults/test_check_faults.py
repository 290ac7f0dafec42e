"""What can happen to a check, and what a check finds: a run stores its archive whatever it is."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    BACKUP,
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
from proxy import Action, FaultProxy, Request
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

RECORD = ".s3borgbackup-checked"
STALL_SECONDS = 8


@dataclass
class Site:
    """A repository of many small segments, behind a proxy that delays the reading of each."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket
    folder: Path
    proxy: FaultProxy

    def record(self) -> dict[str, Any]:
        """What is known of the checks; nothing where there was none."""
        try:
            return json.loads(self.target.get(RECORD))
        except self.target.client.exceptions.NoSuchKey:
            return {}


@pytest.fixture
def site(server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path) -> Iterator[Site]:
    """A configuration with one target, and a backup."""
    with FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        limits = {"LEASE_TTL": "10", "STALL_TIMEOUT": str(STALL_SECONDS)}
        environment = settings(server, tmp_path, source.name, {"first": entry}, **limits)
        source.put({"small": b"small"})
        run_backup(environment).expect(0)
        run_backup(environment, "borg", "first", "config", "::", "max_segment_size", "20000").expect(0)
        source.put({f"folder/{number}": os.urandom(30_000) for number in range(100)})
        run_backup(environment).expect(0)
        proxy.add(is_reading, Action.DELAY, seconds=0.03)
        yield Site(environment, source, target, tmp_path, proxy)


def is_reading(request: Request) -> bool:
    """Whether a segment is read."""
    return request.kind == "GET" and request.key.startswith("data/")


SHORT_ROUNDS = (
    "import os, sys; sys.path.insert(0, {folder!r}); import backup; backup.ROUND_SECONDS = 1;"
    " os._exit(backup.main(sys.argv[1:], os.environ))"
)


def kill_in_check(environment: Mapping[str, str], site: Site, seconds: float) -> None:
    """SIGKILL of a check that notes its place each second, `seconds` after it noted it first."""
    before = site.record().get("segment", -1)
    code = SHORT_ROUNDS.format(folder=str(BACKUP.parent))
    check = subprocess.Popen(
        [sys.executable, "-c", code, "check", "first", "--max-duration", "1h"],
        env=dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: site.record().get("segment", -1) > before, 60, "a place is noted")
    time.sleep(seconds)
    kill_all([check.pid, *descendants(check.pid)])
    assert check.wait(10) == -signal.SIGKILL


@pytest.mark.long
def test_a_check_that_is_killed_again_and_again_comes_to_its_end(site: Site, table: Table) -> None:
    """It does not begin anew, and the config that holds the key is whole."""
    began, places = set(), []
    for seconds in (0.0, 0.4):
        with table.attempt("SIGKILL of everything, in mid-check"):
            kill_in_check(site.environment, site, seconds)
            known = site.record()
            began.add(known["pass_began"])
            places.append(known["segment"])
            assert "\nkey = " in site.target.get("config").decode()
    assert places == sorted(set(places))
    run_backup(site.environment, "check", "first", "--max-duration", "1h").expect(0)
    assert [site.record()["checked_from"]] == list(began)
    prove_intact(site.environment, site.source, site.target, site.folder)


@pytest.mark.parametrize("plan", first_short(["1h", "full"]))
@pytest.mark.parametrize("damage", first_short(["a flipped bit in a segment", "a missing segment"]))
def test_damage_that_a_run_finds_does_not_keep_its_archive_from_being_stored(
    site: Site, table: Table, damage: str, plan: str
) -> None:
    key = site.target.largest("data/")
    before = site.target.get(key)
    with table.attempt(f"{damage}, found by a check in a run"):
        if damage == "a missing segment":
            site.target.delete(key)
        else:
            site.target.put({key: before[:-9] + bytes([before[-9] ^ 16]) + before[-8:]})
        site.source.put({"new": b"new"})
        result = run_backup(with_target(site.environment, "first", check=plan)).expect(2)
        assert re.search(r"^first: the archive \S+ is stored, but .* is damaged: ", result.output, re.M)
        assert "done: everything is uploaded" in result.output
        assert site.record()["checked"] is None
        site.target.put({key: before})
        assert newest_contents(site.target, site.folder, site.environment) == site.source.contents()
        run_backup(site.environment, "check", "first").expect(0)
        prove_intact(site.environment, site.source, site.target, site.folder)


@pytest.mark.long
@pytest.mark.parametrize("fault", first_short(["refused", "not answered"]))
def test_a_check_that_cannot_read_fails_and_is_not_taken_for_damage(
    site: Site, table: Table, fault: str
) -> None:
    action = {"refused": Action.REFUSE, "not answered": Action.HANG}[fault]
    with table.attempt(f"reads are {fault} in mid-check"):
        site.proxy.clear()
        site.proxy.add(is_reading, action, after=20)
        result = run_backup(site.environment, "check", "first", "--max-duration", "1h").expect(2)
        assert "is damaged" not in result.output
        site.proxy.clear()
        assert site.record().get("damage", "") == ""
        run_backup(site.environment, "check", "first", "--max-duration", "1h").expect(0)
        prove_intact(site.environment, site.source, site.target, site.folder)
