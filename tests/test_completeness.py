"""Completeness: an archive has each object that the source lists; what it lacks is named, with its reason."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from faults.proxy import Action, FaultProxy, Request
from helpers import (
    BACKUP,
    MANIFEST_PATH,
    Backup,
    Bucket,
    Repository,
    Result,
    command_line,
    descendants,
    let_age,
    run_backup,
    settings,
    wait_until,
    with_target,
)
from servers import Moto, SeaweedFS

NewBucket = Callable[..., Bucket]

LONG = "l" * 300
# What S3 keeps and no mount can show: hidden by objects below the same name, or a name that no file can have.
UNSHOWN = {key: key.encode() * 3 for key in ("a", "deep/er", "x//y", "./z", "in/../side", "trail/")}
# No disk takes a name of 300 bytes, but Linux lets FUSE show one of up to 1024, and so borg has it.
SHOWN = {
    "a/b": b"below a",
    "deep/er/still": b"below",
    "plain": b"plain",
    "empty": b"",
    "x/z": b"beside",
    LONG: b"long",
    f"folder/{LONG}/below": b"below long",
}
MARKER = "empty folder/"
SLOW = "lzma,6"  # some 2 MB a second
FILLER_BYTES = 10_000_000
LARGE_BYTES = 20_000_000  # more than the window that reading ahead has with 256 MB


# --------------------------------------------------------------------------------------------- Pure decisions


@pytest.mark.parametrize(
    ("key", "size_bytes", "is_shown"),
    [
        *((key, 7, True) for key in SHOWN),
        *((key, 7, key in ("a", "deep/er")) for key in UNSHOWN),  # what hides these is beside them
        ("marker/", 0, True),
        ("marker//", 0, False),
        ("/", 0, False),
        ("/leading", 7, False),
        ("a/.", 7, False),
        ("..", 7, False),
        ("nul\0byte", 7, False),
        ("return\rs", 7, False),
        ("no XML \x01/below", 7, False),
        ("no XML \ufffe", 7, False),
        ("no UTF-8 \udcff", 7, False),
        ("tab\t and line\nend", 7, True),
        ("l" * 1025, 7, False),
        ("l" * 1024, 7, True),
        ("ü" * 513, 7, False),
        ("ü" * 512, 7, True),
        ("...", 7, True),
        (".hidden/..x/y..", 7, True),
    ],
)
def test_what_a_mount_can_show(key: str, size_bytes: int, is_shown: bool) -> None:
    assert backup.is_showable(key, size_bytes) == is_shown


LISTED_AT = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
OF_BOTH = "it was overwritten meanwhile: what is archived may be of both versions"
LARGE = backup.WHOLE_READ_BYTES + 1


@pytest.mark.parametrize(
    ("is_read", "shown_bytes", "shown_after_seconds", "now_bytes", "reason", "noted"),
    [
        # The mount was listed after it: that version was read, or will be by the next run.
        (True, 7, 5, 7, "", (7, "new")),
        (True, LARGE, 5, LARGE, "", (LARGE, "new")),
        ("again", 7, 5, 7, "", (7, "new")),
        # borg knows the version that was listed, and was told of that.
        (False, 7, 5, 7, "", (5, "old")),
        # It came after the mount was listed.
        (False, 5, 0, 7, "", (5, "old")),
        (True, 5, 0, 7, "it was overwritten meanwhile: 5 bytes are archived, it has 7", (5, "")),
        (True, 50, 0, 1200, "it was overwritten meanwhile: 50 bytes are archived, it has 1,200", (50, "")),
        (True, 5, 0, 5, "", (5, "")),
        (True, LARGE, 0, LARGE, OF_BOTH, (LARGE, "")),
        (True, None, None, 7, "it was overwritten meanwhile, and No such file or directory", (7, "")),
    ],
)  # fmt: skip
def test_what_is_noted_of_an_object_that_was_overwritten_after_it_was_listed(
    tmp_path: Path,
    is_read: bool | str,
    shown_bytes: int | None,
    shown_after_seconds: int | None,
    now_bytes: int,
    reason: str,
    noted: tuple[int, str],
) -> None:
    """It was listed with 5 bytes, and overwritten 5 seconds later; the mount shows it as it was at a time."""
    if shown_bytes is not None and shown_after_seconds is not None:
        with (tmp_path / "key").open("wb") as file:
            file.truncate(shown_bytes)
        when = LISTED_AT.timestamp() + shown_after_seconds
        os.utime(tmp_path / "key", (when, when))
    since = LISTED_AT.timestamp() + (-60 if is_read is True else 60)
    feeder = SimpleNamespace(
        readers=[backup.Reader(since=since, began=1.0)],
        read_again={"key"} if is_read == "again" else set(),
        overwritten={},
        mixed=backup.Findings(),
        path=lambda each: str(tmp_path / each.key),
    )
    each = backup.S3Object("key", 5, LISTED_AT, "old")
    now = backup.S3Object("key", now_bytes, LISTED_AT + timedelta(seconds=5), "new")
    found = backup.Feeder._overwritten(feeder, each, now)
    assert [why for _, why in feeder.mixed.named] == [reason] * bool(reason)
    assert (found.size_bytes, found.etag) == noted


def test_that_borg_reads_a_manifest_is_no_reason_to_list_the_source_again() -> None:
    """It is older than anything that borg knows, and always new."""
    fed = SimpleNamespace(since=LISTED_AT.timestamp(), feeder=SimpleNamespace(is_unproven=False))
    fed.knows = lambda each: backup.Reader.knows(fed, each)
    backup.Fed._judge(fed, 1, backup.MANIFEST, "A")
    assert not fed.feeder.is_unproven


CATALOG = """
import datetime, pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
import backup
now = datetime.datetime.now(datetime.UTC)

def peak_with(number):
    catalog = backup.Catalog(pathlib.Path(sys.argv[2], "catalog"))
    keys = (f"folder {each % 100:02}/{each:->200}" for each in range(number))
    catalog.add(backup.S3Object(key, 1, now, "e" * 32, facts={"headers": {"a": "b" * 100}}) for key in keys)
    catalog.hide(catalog.unlistable())
    assert sum(1 for each in map(backup.manifest_line, catalog.rows()) if each) == number
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

few, many = peak_with(10_000), peak_with(110_000)
print((many - few) / 100_000)
"""


def test_the_catalogs_memory_does_not_grow_with_the_bucket(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CATALOG, str(BACKUP.parent), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20, "bytes for each object"


# -------------------------------------------------------------------------------------------------- Real runs


def named(result: Result) -> dict[str, str]:
    """Key → reason of each object that a run names as missing, or mixed."""
    pattern = r".*\] warning: '(.*)' is not, or not whole, in the archive: (.*)"
    return {match[1]: match[2] for line in result.lines if (match := re.fullmatch(pattern, line))}


@pytest.fixture
def odd_source(moto: Moto, new_bucket: NewBucket) -> Bucket:
    """A source of some objects that a mount shows, and others that it does not."""
    bucket = new_bucket("source", on=moto)
    bucket.put({**SHOWN, MARKER: b"", **UNSHOWN})
    assert set(bucket.sizes()) == {*SHOWN, *UNSHOWN, MARKER}
    let_age(bucket)
    return bucket


def archive_of(target: Bucket, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Key → SHA-256 of the objects of the newest archive; not extracted, which a disk may refuse."""
    repository = Repository.download(target, folder)
    archive, start = repository.archives()[-1], f"{environment['DATA_DIR']}/source/".lstrip("/")
    lines = repository.borg(
        "list", "--format", "{type} {sha256} {path}{NL}", f"{folder}::{archive}"
    ).splitlines()
    entries = [line.split(" ", 2) for line in lines]
    files = {path.removeprefix(start): digest for kind, digest, path in entries if kind == "-"}
    assert files.pop(MANIFEST_PATH)
    odd = {backup.odd_path(key): key for key in repository.manifest(archive)}
    return {odd.get(path, path): digest for path, digest in files.items()}


def digests(objects: Mapping[str, bytes]) -> dict[str, str]:
    """The same of what was put into the source."""
    return {key: hashlib.sha256(body).hexdigest() for key, body in objects.items()}


@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.parametrize("headers", ["on", "off"])
def test_objects_that_no_mount_shows_are_archived_byte_for_byte_like_all_others(
    server: SeaweedFS, moto: Moto, odd_source: Bucket, target: Bucket, tmp_path: Path, headers: str
) -> None:
    entry = {"path": target.name, "endpoint": server.endpoint}
    environment = settings(moto, tmp_path, odd_source.name, {"first": entry}, HEADERS=headers)
    for time in ("first", "again"):
        result = run_backup(environment).expect(0)
        assert "warning" not in result.output
        assert archive_of(target, tmp_path / time, environment) == digests({**SHOWN, **UNSHOWN})


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
def test_many_such_objects_are_fetched_side_by_side_and_once_for_all_targets(
    server: SeaweedFS, moto: Moto, new_bucket: NewBucket, tmp_path: Path
) -> None:
    source, targets = new_bucket("source", on=moto), [new_bucket("target") for _ in range(2)]
    odd = {f"folder//{number:03}": f"{number:03}".encode() for number in range(200)}
    source.put({**odd, "plain": b"plain"})
    let_age(source)
    with FaultProxy(moto.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "GET" and "//" in request.key, Action.DELAY, seconds=0.3)
        entries = {bucket.name: {"path": bucket.name, "endpoint": server.endpoint} for bucket in targets}
        environment = settings(moto, tmp_path, source.name, entries, SOURCE_ENDPOINT=proxy.endpoint)
        run_backup(environment).expect(0)
        requests = [request for request, _ in proxy.requests]
    fetched = [each for each in requests if each.headers.get("range") == "bytes=0-2" and each.key in odd]
    assert sorted(request.key for request in fetched) == sorted(odd)
    assert fetched[-1].when - fetched[0].when < len(odd) * 0.3 / 3
    for bucket in targets:
        expected = digests({**odd, "plain": b"plain"})
        assert archive_of(bucket, tmp_path / f"copy-{bucket.name}", environment) == expected


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
def test_an_object_that_was_deleted_before_it_was_read_is_a_note(
    server: SeaweedFS, moto: Moto, new_bucket: NewBucket, tmp_path: Path
) -> None:
    """Whoever was to read it. Two of them are larger than what is read ahead; nobody waits for them."""
    source, targets = new_bucket("source", on=moto), [new_bucket("target") for _ in range(2)]
    deleted = {"gone": b"1", "m//large": bytes(LARGE_BYTES), "m/large": bytes(LARGE_BYTES), "m//small": b"2"}
    kept = {"a": b"3", "m//z": b"4", "n": b"5", "z//z": b"6", "z/z": b"7"}
    source.put({**deleted, **kept})
    entries = {bucket.name: {"path": bucket.name, "endpoint": server.endpoint} for bucket in targets}
    variables = {"MEMORY_LIMIT_MB": "256", "STALL_TIMEOUT": "30", "PARALLEL_TARGETS": "2"}
    environment = settings(moto, tmp_path, source.name, entries, **variables)
    with Backup(environment) as running:
        running.wait_for_line(f"lists {len(deleted) + len(kept)} objects")
        source.delete(*deleted)
        result = running.wait().expect(0)
    assert "warning" not in result.output
    for bucket in targets:
        [told] = [line for line in result.lines if f"-{bucket.name}] deleted before it was read" in line]
        assert all(repr(key) in told for key in deleted)
        assert archive_of(bucket, tmp_path / f"copy-{bucket.name}", environment) == digests(kept)
        repository = Repository.download(bucket, tmp_path / f"again-{bucket.name}")
        assert repository.manifest(repository.archives()[-1]).keys() == kept.keys()


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
def test_what_is_created_after_the_run_began_is_nothing_to_warn_of(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put({f"a/{number}": os.urandom(200_000) for number in range(20)})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    with Backup(environment) as running:
        running.wait_for_line("borg create begins")
        source.put({"a/new": b"new", "b/new": b"new", "zzz": b"new"})
        result = running.wait().expect(0)
    assert not [line for line in result.lines if "warning" in line]
    archived = archive_of(target, tmp_path / "copy", environment)
    assert archived.keys() == {f"a/{number}" for number in range(20)}
    run_backup(environment).expect(0)
    assert {"a/new", "b/new", "zzz"} <= archive_of(target, tmp_path / "next", environment).keys()


def borg_is_in_the_middle(running: Backup) -> bool:
    """Whether borg has read some of the first object, and so listed the folder that it lies in."""
    for pid in descendants(running.pid):
        if " create --log-json" in command_line(pid):
            words = Path(f"/proc/{pid}/io").read_text().split()
            return int(words[words.index("rchar:") + 1]) > FILLER_BYTES
    return False


@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.parametrize("headers", ["on", "off"])
def test_what_is_overwritten_in_mid_run_is_named(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, headers: str
) -> None:
    """borg lists a folder, and reads its objects one by one; all but the first few change meanwhile."""
    fillers = {f"0-{number}": os.urandom(FILLER_BYTES) for number in range(2)}
    before = {"small": b"s" * 3_000, "longer": b"l" * 1_300_000, "large": b"L" * 2_000_000}
    source.put({**fillers, **before})
    let_age(source)
    environment = settings(server, tmp_path, source.name, {"first": target.name}, HEADERS=headers)
    with Backup(with_target(environment, "first", compression=SLOW)) as running:
        running.wait_for_line("borg create begins")
        wait_until(lambda: borg_is_in_the_middle(running), 60, "borg has listed the bucket")
        after = {"small": b"t" * 9_000, "longer": b"m" * 1_900_000, "large": b"M" * 2_000_000}
        source.put(after)
        result = running.wait().expect(1)
    assert named(result) == {
        "longer": "it was overwritten meanwhile: 1,300,000 bytes are archived, it has 1,900,000",
        "large": OF_BOTH,
    }
    run_backup(environment).expect(0)
    assert archive_of(target, tmp_path / "copy", environment) == digests({**fillers, **after})


@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.parametrize("size", [0, 3, 10, 700_000, 1_100_000])
def test_a_small_object_that_is_overwritten_meanwhile_is_archived_as_one_version_with_its_headers(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, size: int
) -> None:
    """Between the listing and the read, by one of another size, or of the same."""
    source.put({"folder/key": b"0123456789", "folder/other": b""})
    new = os.urandom(size)

    def overwrite(request: Request) -> Request:
        source.client.put_object(Bucket=source.name, Key="folder/key", Body=new, CacheControl="no-store")
        return request

    with FaultProxy(server.endpoint) as proxy:
        is_fetched = lambda request: request.headers.get("range") == "bytes=0-9"  # noqa: E731
        overwritten = proxy.add(is_fetched, Action.REWRITE, times=1, rewrite=overwrite)
        made = settings(server, tmp_path, source.name, {"first": target.name}, SOURCE_ENDPOINT=proxy.endpoint)
        assert "overwritten" not in run_backup(made).expect(0).output
        assert overwritten.hit
        assert proxy.count(lambda request: request.kind == "HEAD" and request.key == "folder/other") == 1
    repository = Repository.download(target, tmp_path / "local")
    entry = repository.manifest(repository.archives()[-1])["folder/key"]
    assert (entry["size"], entry["etag"]) == (size, hashlib.md5(new).hexdigest())
    assert entry["headers"]["cache-control"] == "no-store"
    run_backup(made, "restore", "first", "--to", str(tmp_path / "restored")).expect(0)
    assert (tmp_path / "restored" / "folder" / "key").read_bytes() == new
    assert (tmp_path / "restored" / "folder" / "other").read_bytes() == b""


@pytest.mark.usefixtures("needs_fuse")
def test_who_knows_an_object_that_is_overwritten_after_the_listing_has_the_listed_version(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """Another target reads the new one. Each archive is what its manifest says."""
    source.put({"key": b"old"})
    let_age(source)
    one = settings(server, tmp_path, source.name, {"first": f"{target.name}:1"}, HEADERS="off")
    run_backup(one).expect(0)

    def overwrite(request: Request) -> Request:
        source.put({"key": b"new"})
        return request

    with FaultProxy(server.endpoint) as proxy:
        is_fetched = lambda request: request.headers.get("range") == "bytes=0-2"  # noqa: E731
        proxy.add(is_fetched, Action.REWRITE, times=1, rewrite=overwrite)
        targets = {"first": f"{target.name}:1", "second": f"{target.name}:2"}
        both = settings(server, tmp_path, source.name, targets, SOURCE_ENDPOINT=proxy.endpoint)
        run_backup(both).expect(0)
    assert source.get("key") == b"new"
    for name, body in (("first", b"old"), ("second", b"new")):
        restored = tmp_path / name
        options = ("--to", str(restored), "--metadata", str(tmp_path / "lines"))
        run_backup(both, "restore", name, *options).expect(0)
        assert (restored / "key").read_bytes() == body
        noted = json.loads((tmp_path / "lines").read_text()).get("etag", "")
        assert noted in ("", hashlib.md5(body).hexdigest())


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.parametrize(
    ("variables", "lists"), [({}, 2), ({"HEADERS": "off"}, 4), ({"HEADERS": "off", "AUDIT": "off"}, 2)]
)
def test_the_source_is_listed_once_and_again_only_where_objects_were_read_that_were_not_asked_for(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    variables: dict[str, str],
    lists: int,
) -> None:
    """A request for 1,000 objects, among those of backup.py: unlike TigrisFS it sends no User-Agent."""
    source.put({f"{number:04}": b"" for number in range(1_100)})
    let_age(source)
    with FaultProxy(server.endpoint) as proxy:
        targets = {"first": target.name}
        variables = {**variables, "SOURCE_ENDPOINT": proxy.endpoint}
        environment = settings(server, tmp_path, source.name, targets, **variables)
        done = {}
        for change in ({}, {}, {"0500": b"changed" * 200_000}):
            source.put(change)
            before = proxy.count(is_our_whole_list)
            run_backup(environment).expect(0)
            done[len(done)] = proxy.count(is_our_whole_list) - before
    assert done == {0: 2, 1: 2, 2: lists}, "nothing is read of empty objects, and of unchanged ones"


def is_our_whole_list(request: Request) -> bool:
    """Whether backup.py itself asked for a page of up to 1,000 objects."""
    return is_our_list(request) and request.query.get("max-keys", "1000") == "1000"


def is_our_list(request: Request) -> bool:
    """Whether backup.py itself asked for a listing."""
    return request.kind == "LIST" and "user-agent" not in request.headers


# ------------------------------------------------------------------------------ What must not lead to pruning


@dataclass(frozen=True)
class Site:
    """A source behind a proxy, and a repository that keeps one archive and has one of the whole source."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket
    folder: Path
    proxy: FaultProxy

    def archives(self) -> list[str]:
        """The archives that are there now."""
        return Repository.download(self.target, self.folder / "copy").archives()


@pytest.fixture
def site(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, needs_fuse: None
) -> Iterator[Site]:
    """Its first object is `a`; there are ten in the folder `m`, and one in the folder `z`."""
    source.put({"a": b"a", **{f"m/{number}": b"m" for number in range(10)}, "z/object": b"z"})
    with FaultProxy(server.endpoint) as proxy:
        targets = {"first": {"path": target.name, "prune": "--keep-last=1"}}
        environment = settings(server, tmp_path, source.name, targets, SOURCE_ENDPOINT=proxy.endpoint)
        run_backup(environment).expect(0)
        # The next run has something to read.
        source.put({"a": b"A" * 100, "z/object": b"Z" * 200, "m/new": b"new"})
        let_age(source)
        yield Site(environment, source, target, tmp_path, proxy)


def is_of_the_mount(request: Request) -> bool:
    """Whether TigrisFS asks, not backup.py itself."""
    return "user-agent" in request.headers


@pytest.mark.long
def test_what_the_mount_does_not_show_comes_through_our_own_client(site: Site) -> None:
    """TigrisFS cannot list a folder; with over 1,000 objects it asks for each folder's listing."""
    site.source.put({f"m/{number}": b"" for number in range(1_010)})
    let_age(site.source)
    site.proxy.add(
        lambda request: (
            is_of_the_mount(request)
            and request.kind == "LIST"
            and "z/" in (request.query["prefix"], request.query.get("start-after"))
        ),
        Action.REFUSE,
    )
    result = run_backup(site.environment).expect(0)
    assert "pruned 1 archive, kept 1" in result.output
    assert archive_of(site.target, site.folder / "copy", site.environment) == digests(site.source.contents())


def is_get_of_z(request: Request) -> bool:
    return request.kind == "GET" and request.key == "z/object"


@pytest.mark.long
def test_an_object_that_the_mount_cannot_read_comes_through_our_own_client(site: Site) -> None:
    """TigrisFS repeats nothing after 400. What is small, it is not asked for."""
    site.source.put({"z/object": b"Z" * 1_100_000})
    refused = site.proxy.add(
        lambda request: is_of_the_mount(request) and is_get_of_z(request),
        Action.REFUSE, status=400, code="InvalidRequest",
    )  # fmt: skip
    result = run_backup(site.environment).expect(0)
    assert refused.hit
    assert named(result) == {}
    assert "pruned 1 archive, kept 1" in result.output
    assert archive_of(site.target, site.folder / "copy", site.environment) == digests(site.source.contents())


@pytest.mark.long
def test_an_object_whose_reading_fails_is_a_failure_after_the_archive_was_recorded_and_compared(
    site: Site,
) -> None:
    """Neither the mount nor our own client gets it, and what S3 says is no refusal of this object."""
    site.proxy.add(is_get_of_z, Action.REFUSE, status=405, code="MethodNotAllowed")
    result = run_backup({**site.environment, "METRICS_FILE": str(site.folder / "m.prom")}).expect(2)
    [(key, reason)] = named(result).items()
    assert key == "z/object"
    assert reason.startswith("it could not be read: ")
    assert "MethodNotAllowed (405)" in reason
    row = next(line for line in result.lines if line.startswith("first  "))
    assert re.fullmatch(r"first +failed +12 .* backup-\S+", row), row
    assert "1 object of the source could not be read" in result.output
    assert "last_success_timestamp_seconds{" not in (site.folder / "m.prom").read_text()
    assert len(site.archives()) == 2


@pytest.mark.parametrize("refused", ["a", "z/object"])
def test_an_object_that_s3_refuses_is_a_warning_by_name_and_all_others_are_archived(
    site: Site, refused: str
) -> None:
    """The bucket's first one, and any other; S3 answers 400 for one that is encrypted with somebody's key."""
    site.proxy.add(
        lambda request: request.kind == "GET" and request.key == refused,
        Action.REFUSE, status=400, code="InvalidRequest",
    )  # fmt: skip
    result = run_backup(site.environment).expect(1)
    assert named(result) == {refused: "S3 refuses it: InvalidRequest (400): injected"}
    assert "pruned 1 archive, kept 1" in result.output
    rest = {key: body for key, body in site.source.contents().items() if key != refused}
    assert archive_of(site.target, site.folder / "copy", site.environment) == digests(rest)


@pytest.mark.long
def test_of_many_objects_that_s3_refuses_the_first_100_are_named_and_the_rest_counted(site: Site) -> None:
    """Each is asked for once; in the next run the mount is, and then our client for no more than these."""
    keys = [f"n/{number:03}" for number in range(300)]
    site.source.put(dict.fromkeys(keys, b"content"))
    site.proxy.add(lambda request: request.kind == "GET" and request.key.startswith("n/"), Action.REFUSE)
    result = run_backup(site.environment).expect(1)
    assert list(named(result)) == keys[:100]
    assert "200 more such objects" in result.output
    assert "the archive lacks 300 objects" in result.output
    asked = lambda: [request for request, _ in site.proxy.requests if is_ours(request)]  # noqa: E731
    is_ours = lambda request: (  # noqa: E731
        request.kind == "GET" and request.key in keys and not is_of_the_mount(request)
    )
    assert sorted(request.key for request in asked()) == keys
    let_age(site.source)
    run_backup(site.environment).expect(1)
    already = len(asked())
    run_backup(site.environment).expect(1)
    assert 100 <= len(asked()) - already < 150


@pytest.mark.long
@pytest.mark.parametrize("headers", ["on", "off"])
def test_an_archive_that_cannot_be_compared_is_a_failure_and_nothing_is_pruned(
    site: Site, headers: str
) -> None:
    """The source's listing is refused from the moment on at which borg reads; with headers none is needed."""
    run_backup(site.environment).expect(0)
    site.source.put({"a": b"once more" * 200_000})  # too large to come with its proof
    let_age(site.source)
    with Backup({**site.environment, "HEADERS": headers}) as running:
        running.wait_for_line("borg create begins")
        site.proxy.add(is_our_list, Action.REFUSE)
        result = running.wait().expect(2 if headers == "off" else 0)
    if headers == "on":
        assert "pruned 1 archive, kept 1" in result.output
        return
    assert "whether objects were overwritten while they were read is not known" in result.output
    assert "AccessDenied (403)" in result.output
    assert len(site.archives()) == 2
