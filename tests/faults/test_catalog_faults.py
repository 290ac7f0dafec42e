"""What happens to the catalog below /cache: it costs requests at most, never a backup, and loses nothing."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from helpers import (
    Backup,
    Bucket,
    Repository,
    Result,
    full,
    let_age,
    run_backup,
    settings,
    small_disk,
)
from proof import Table, prove_intact
from proxy import FaultProxy, Request
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

OBJECTS = {f"folder/{number:03}": os.urandom(100) for number in range(60)}


def asks_for_headers(request: Request) -> bool:
    """Whether backup.py asks for an object's headers, alone or with the content; TigrisFS names itself."""
    is_read = request.kind == "GET" and request.headers.get("range", "bytes=0-0") != "bytes=0-0"
    return (is_read or request.kind == "HEAD") and "user-agent" not in request.headers


class Site:
    """A source of some objects behind a proxy, and a target that has them all once."""

    def __init__(self, proxy: FaultProxy, source: Bucket, target: Bucket, folder: Path) -> None:
        self.proxy, self.source, self.target, self.folder = proxy, source, target, folder
        self.environment = settings(
            source.server, folder, source.name, {"first": target.name}, SOURCE_ENDPOINT=proxy.endpoint
        )
        self.catalogs = folder / "cache" / "s3borgbackup"

    def run(self, **variables: str) -> tuple[Result, int]:
        """A run that must succeed, and how many objects' headers it asked for."""
        before = self.proxy.count(asks_for_headers)
        result = run_backup({**self.environment, **variables}).expect(0)
        return result, self.proxy.count(asks_for_headers) - before

    @property
    def catalog(self) -> Path:
        """The file."""
        [path] = self.catalogs.glob("*.catalog")
        return path


@pytest.fixture
def site(server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path) -> Iterator[Site]:
    """One that has had a run."""
    source.put(OBJECTS)
    let_age(source)
    with FaultProxy(server.endpoint) as proxy:
        made = Site(proxy, source, target, tmp_path)
        assert made.run()[1] == len(OBJECTS)
        yield made


def damage(catalog: Path) -> None:
    """Some pages in the middle are lost."""
    with catalog.open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(8192))


def cut_off(catalog: Path) -> None:
    """The end of the file is lost."""
    os.truncate(catalog, catalog.stat().st_size // 2)


def empty(catalog: Path) -> None:
    """All of it is."""
    os.truncate(catalog, 0)


def be_no_database(catalog: Path) -> None:
    """It is some other file."""
    catalog.write_text("this is something else\n" * 100)


def be_another_programs(catalog: Path) -> None:
    """It is a database of somebody else."""
    catalog.unlink()
    with sqlite3.connect(catalog) as database:
        database.executescript("PRAGMA application_id = 7; CREATE TABLE objects (key, precious)")
        database.execute("INSERT INTO objects VALUES ('a', 'b')")
    database.close()


def be_too_new(catalog: Path) -> None:
    """A later version of this program has written it."""
    with sqlite3.connect(catalog) as database:
        database.execute("PRAGMA user_version = 1000")
    database.close()


@pytest.mark.long
@pytest.mark.parametrize(
    "fault",
    [damage, cut_off, empty, be_no_database, be_another_programs, be_too_new],
    ids=lambda each: each.__name__,
)
def test_a_catalog_that_cannot_be_used_is_told_put_aside_and_made_anew(
    site: Site, table: Table, fault: Callable[[Path], None]
) -> None:
    fault(site.catalog)
    content = site.catalog.read_bytes()
    with table.attempt(f"the catalog: {fault.__name__.replace('_', ' ')}"):
        result, heads = site.run()
        [told] = [line for line in result.lines if "[source] warning: " in line]
        assert str(site.catalog) in told
        assert "made anew" in told
        assert heads == len(OBJECTS), "what it knew is asked for again"
        assert site.catalog.with_suffix(".unusable").read_bytes() == content
        result, heads = site.run()
        assert "warning" not in result.output
        assert heads == 0
        prove_intact(site.environment, site.source, site.target, site.folder)


def test_a_catalog_that_somebody_has_locked_is_read_all_the_same(site: Site) -> None:
    database = sqlite3.connect(site.catalog)
    database.execute("BEGIN EXCLUSIVE")
    result, heads = site.run()
    database.close()
    assert "warning" not in result.output
    assert heads == 0


@pytest.mark.long
def test_a_full_disk_below_the_catalog_is_told_and_the_run_goes_on_without_it(
    site: Site, table: Table
) -> None:
    """Only the catalog is on that disk; borg needs the room of its own."""
    kept = site.catalog.read_bytes()
    name = site.catalog.name
    shutil.rmtree(site.catalogs)
    site.catalogs.mkdir()
    with table.attempt("the disk under the catalog is full"), small_disk(site.catalogs):
        (site.catalogs / name).write_bytes(kept)
        with full(site.catalogs):
            site.source.put({"new": b"new"})
            result, heads = site.run()
            [told] = [line for line in result.lines if "[source] warning: " in line]
            assert "the catalog is not kept" in told
            assert "make room" in told
            assert heads == len(OBJECTS) + 1
        assert (site.catalogs / name).read_bytes() == kept, "the old one is still there"
        result, heads = site.run()
        assert "warning" not in result.output
        assert heads == 1
        prove_intact(site.environment, site.source, site.target, site.folder)


@pytest.mark.long
def test_two_runs_at_once_with_one_cache_lose_nothing(
    site: Site, new_bucket: Callable[..., Bucket], table: Table
) -> None:
    """Each with a target of its own; what both have noted is there afterwards, and nothing else."""
    second = new_bucket("target")
    other = settings(
        site.source.server, site.folder, site.source.name, {"second": second.name},
        SOURCE_ENDPOINT=site.proxy.endpoint, DATA_DIR=str(site.folder / "other"),
    )  # fmt: skip
    site.source.put({f"more/{number}": os.urandom(200_000) for number in range(30)})
    let_age(site.source)
    with table.attempt("two runs at once with one cache"):
        with Backup(site.environment) as one, Backup(other) as two:
            results = [one.wait().expect(0), two.wait().expect(0)]
        assert not any("warning" in result.output for result in results)
        assert [path.name for path in site.catalogs.iterdir()] == [site.catalog.name]
        assert site.run()[1] == 0
        assert noted_archives(site.catalog) == 2
        for target, environment in ((site.target, site.environment), (second, other)):
            prove_intact(environment, site.source, target, site.folder)


def noted_archives(catalog: Path) -> int:
    """Of how many repositories it knows the newest archive."""
    database = sqlite3.connect(f"file:{catalog}?mode=ro", uri=True)
    [[number]] = database.execute("SELECT count(*) FROM archives WHERE objects > 0")
    database.close()
    return number


@pytest.mark.long
def test_what_a_killed_run_has_left_beside_the_catalog_is_removed_when_it_is_old(site: Site) -> None:
    with Backup(site.environment) as running:
        running.wait_for_line("lists ")
        running.process.kill()
        running.process.wait()
    [left] = [path for path in site.catalogs.iterdir() if path.is_dir()]
    site.run()
    assert left.is_dir(), "its run may be alive"
    day_before = time.time() - 25 * 3600
    os.utime(left, (day_before, day_before))
    site.run()
    assert not left.exists()


@pytest.mark.long
def test_a_lost_catalog_costs_requests_only(site: Site) -> None:
    shutil.rmtree(site.catalogs)
    result, heads = site.run()
    assert "warning" not in result.output
    assert heads == len(OBJECTS)
    manifest = manifest_of(site.target, site.folder / "copy")
    assert all(entry["headers"] for entry in manifest.values())


def manifest_of(target: Bucket, folder: Path) -> Mapping[str, Mapping[str, object]]:
    """The newest archive's."""
    repository = Repository.download(target, folder)
    return repository.manifest(repository.archives()[-1])
