"""The completeness audit: each object of the source that an archive lacks is named, with its reason."""

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
    Backup,
    Bucket,
    Repository,
    Result,
    command_line,
    descendants,
    run_backup,
    settings,
    wait_until,
    with_target,
)
from servers import READER, Moto, SeaweedFS

NewBucket = Callable[..., Bucket]

LONG = "l" * 300
# What S3 keeps and no mount can show, with the audit's reason.
UNSHOWN = {
    "a": "it is hidden by objects below the same name",
    "deep/er": "it is hidden by objects below the same name",
    "x//y": "no file can have this name",
    "./z": "no file can have this name",
    "in/../side": "no file can have this name",
    "trail/": "no file can have this name",
}
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


# --------------------------------------------------------------------------------------------- Pure decisions


@pytest.mark.parametrize(
    ("key", "failed", "hidden", "reason"),
    [
        *((key, False, "hidden" in reason, reason) for key, reason in UNSHOWN.items()),
        ("l" * 1025, False, False, "no file can have this name"),
        (LONG, False, False, "the mount did not show it"),
        ("/leading", False, False, "no file can have this name"),
        ("a/.", False, False, "no file can have this name"),
        ("..", False, False, "no file can have this name"),
        ("nul\0byte", False, False, "no file can have this name"),
        ("ü" * 513, False, False, "no file can have this name"),
        ("ü" * 512, False, False, "the mount did not show it"),
        ("...", False, False, "the mount did not show it"),
        (".hidden/..x/y..", False, False, "the mount did not show it"),
        ("unreadable", True, False, "it could not be read"),
    ],
)
def test_the_reason_why_an_object_is_missing(key: str, failed: bool, hidden: bool, reason: str) -> None:
    assert backup.why_missing(key, failed, hidden) == reason


BEGAN = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
OF_BOTH = "it was overwritten meanwhile: what is archived may be of both versions"
LARGE = backup.WHOLE_READ_BYTES + 1


@pytest.mark.parametrize(
    ("key", "archived", "age_seconds", "listed_bytes", "shown_bytes", "shown_age_seconds", "reason"),
    [
        ("old", True, 60, 5, 5, 60, ""),
        ("old", False, 60, 5, 5, 60, "the mount did not show it"),
        ("old", False, 60, 5, None, None, "the mount did not show it"),
        ("folder", False, 60, 5, 0, 60, "it is hidden by objects below the same name"),
        ("marker/", False, 60, 0, None, None, ""),
        ("marker/", False, 60, 3, None, None, "no file can have this name"),
        ("l" * 1025, False, 60, 5, None, None, "no file can have this name"),
        ("/etc", False, 60, 5, None, None, "no file can have this name"),
        ("nul\0byte", False, 60, 5, None, None, "no file can have this name"),
        ("old/below", False, 60, 5, None, None, "the mount did not show it"),
        ("new", False, -5, 5, None, None, ""),
        ("new", False, 0, 5, None, None, ""),
        (LONG, False, -5, 5, None, None, ""),
        ("new", True, -5, 5, 5, -5, ""),
        ("new", True, -5, 7, 5, 60, "it was overwritten meanwhile: 5 bytes are archived, it has 7"),
        ("new", True, -5, 1200, 50, 60, "it was overwritten meanwhile: 50 bytes are archived, it has 1,200"),
        ("new", True, -5, 5, 5, 60, ""),
        ("new", True, -5, LARGE, LARGE, -5, ""),
        ("new", True, -5, LARGE, LARGE, 60, OF_BOTH),
        ("new", True, -5, 5, None, None, "it was overwritten meanwhile, and No such file or directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_object(
    tmp_path: Path,
    key: str,
    archived: bool,
    age_seconds: int,
    listed_bytes: int,
    shown_bytes: int | None,
    shown_age_seconds: int | None,
    reason: str,
) -> None:
    """Ages are as the run begins; the mount shows the object with a size and an age of its own, or not."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").touch()
    if shown_bytes is not None and shown_age_seconds is not None and key != "folder":
        with (tmp_path / key).open("wb") as file:
            file.truncate(shown_bytes)
        when = BEGAN.timestamp() - shown_age_seconds
        os.utime(tmp_path / key, (when, when))
    archive = backup.ArchivedObjects(tmp_path)
    archive.take("A" if archived else "-", f"{tmp_path}/{key}")
    entry = backup.S3Object(key, listed_bytes, BEGAN - timedelta(seconds=age_seconds))
    mount = SimpleNamespace(path=tmp_path, store=SimpleNamespace(name="source"))
    assert backup.audit_object(entry, key, archive, mount, BEGAN) == reason


@pytest.mark.parametrize(
    ("status", "held", "failed"),
    [("A", True, False), ("M", True, False), ("U", True, False), ("C", True, False), ("h", True, False),
     ("E", False, True), ("d", False, False), ("x", False, False), ("-", False, False), ("", False, False)],
)  # fmt: skip
def test_what_borg_lists_as_added_changed_or_unchanged_is_archived(
    status: str, held: bool, failed: bool
) -> None:
    archive = backup.ArchivedObjects(Path("/data/source"))
    archive.take(status, "/data/source/folder/ü\udcff")
    assert (archive.holds("folder/ü\udcff"), archive.failed("folder/ü\udcff")) == (held, failed)
    assert not archive.holds("folder")


DIGESTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import backup
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, texts = peak(), backup.Digests()
for number in range(1_000_000):
    texts.add(f"{number:->200}")
assert all(f"{number:->200}" in texts for number in range(0, 1_000_000, 100))
assert not any(f"{number}" in texts for number in range(10_000))
print(peak() - before)
"""


def test_a_million_keys_are_kept_in_30_mb() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, str(BACKUP.parent)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 30_000_000


# -------------------------------------------------------------------------------------------------- Real runs


def named(result: Result) -> dict[str, str]:
    """Key → reason of each object that the audit names."""
    pattern = r".*\] warning: '(.*)' is not, or not whole, in the archive: (.*)"
    return {match[1]: match[2] for line in result.lines if (match := re.fullmatch(pattern, line))}


@pytest.fixture
def odd_source(moto: Moto, new_bucket: NewBucket) -> Bucket:
    """A source of some objects that a mount shows, and others that it does not."""
    bucket = new_bucket("source", on=moto)
    bucket.put({**SHOWN, MARKER: b"", **dict.fromkeys(UNSHOWN, b"content")})
    assert set(bucket.sizes()) == {*SHOWN, *UNSHOWN, MARKER}
    let_age(bucket)
    return bucket


def let_age(bucket: Bucket) -> None:
    """Returns when what is in the bucket is certainly older than a run that begins then."""
    newest = max(
        entry["LastModified"] for entry in bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]
    )
    seconds = backup.RACE_SECONDS + 2
    wait_until(lambda: (datetime.now(UTC) - newest).total_seconds() > seconds, 10, "the objects are old")


def archive_of(target: Bucket, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Key → SHA-256 of the objects of the newest archive; not extracted, which a disk may refuse."""
    repository, start = Repository.download(target, folder), f"{environment['DATA_DIR']}/source/".lstrip("/")
    archive = f"{folder}::{repository.archives()[-1]}"
    lines = repository.borg("list", "--format", "{type} {sha256} {path}{NL}", archive).splitlines()
    entries = [line.split(" ", 2) for line in lines]
    return {path.removeprefix(start): digest for kind, digest, path in entries if kind == "-"}


def digests(objects: Mapping[str, bytes]) -> dict[str, str]:
    """The same of what was put into the source."""
    return {key: hashlib.sha256(body).hexdigest() for key, body in objects.items()}


@pytest.mark.usefixtures("needs_fuse")
def test_objects_that_no_mount_shows_are_named_and_all_others_archived(
    server: SeaweedFS, moto: Moto, odd_source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    entry = {"path": target.name, "endpoint": server.endpoint}
    environment = settings(moto, tmp_path, odd_source.name, {"first": entry})
    result = run_backup(environment).expect(1)
    assert named(result) == UNSHOWN
    assert f"the archive lacks {len(UNSHOWN)} objects" in result.output
    assert archive_of(target, tmp_path / "copy", environment) == digests(SHOWN)
    result = run_backup({**environment, "AUDIT": "off"}).expect(0)
    assert named(result) == {}


@pytest.mark.usefixtures("needs_fuse")
def test_of_many_such_objects_the_first_100_are_named_and_the_rest_counted(
    server: SeaweedFS, moto: Moto, new_bucket: NewBucket, tmp_path: Path
) -> None:
    """For each of two targets."""
    source, targets = new_bucket("source", on=moto), [new_bucket("target") for _ in range(2)]
    keys = [f"folder//{number:03}" for number in range(150)]
    source.put({**dict.fromkeys(keys, b"content"), "plain": b"plain"})
    let_age(source)
    entries = {bucket.name: {"path": bucket.name, "endpoint": server.endpoint} for bucket in targets}
    result = run_backup(settings(moto, tmp_path, source.name, entries)).expect(1)
    for bucket in targets:
        lines = [line for line in result.lines if f"[target-{bucket.name}]" in line]
        assert list(named(Result(1, lines, 0))) == keys[:100]
        assert len([line for line in lines if "50 more such objects" in line]) == 1
    assert result.output.count("the archive lacks 150 objects") == 2


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


def borg_is_in_the_middle(running: Backup) -> bool:
    """Whether borg has read some of the first object, and so listed the folder that it lies in."""
    for pid in descendants(running.pid):
        if " create --log-json" in command_line(pid):
            words = Path(f"/proc/{pid}/io").read_text().split()
            return int(words[words.index("rchar:") + 1]) > FILLER_BYTES
    return False


@pytest.mark.usefixtures("needs_fuse")
def test_what_is_overwritten_in_mid_run_is_named(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """borg lists a folder, and reads its objects one by one; all but the first few change meanwhile."""
    fillers = {f"0-{number}": os.urandom(FILLER_BYTES) for number in range(2)}
    before = {"longer": b"l" * 3_000, "alike": b"a" * 5_000, "large": b"L" * 2_000_000}
    source.put({**fillers, **before})
    let_age(source)
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    with Backup(with_target(environment, "first", compression=SLOW)) as running:
        running.wait_for_line("borg create begins")
        wait_until(lambda: borg_is_in_the_middle(running), 60, "borg has listed the bucket")
        after = {"longer": b"m" * 9_000, "alike": b"b" * 5_000, "large": b"M" * 2_000_000}
        source.put(after)
        result = running.wait().expect(1)
    assert named(result) == {
        "longer": "it was overwritten meanwhile: 3,000 bytes are archived, it has 9,000",
        "large": OF_BOTH,
    }
    run_backup(environment).expect(0)
    assert archive_of(target, tmp_path / "copy", environment) == digests({**fillers, **after})


@pytest.mark.usefixtures("needs_fuse")
def test_the_audit_takes_one_list_request_for_each_1000_objects(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """Counted among the requests of backup.py itself, which, unlike TigrisFS, sends no User-Agent."""
    source.put({f"{number:04}": b"" for number in range(2_100)})
    lists = {}
    with FaultProxy(server.endpoint) as proxy:
        targets = {"first": target.name}
        environment = settings(server, tmp_path, source.name, targets, SOURCE_ENDPOINT=proxy.endpoint)
        for audit in ("on", "off"):
            before = proxy.count(is_our_list)
            run_backup({**environment, "AUDIT": audit}).expect(0)
            lists[audit] = proxy.count(is_our_list) - before
    assert lists["on"] - lists["off"] == 3


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


def test_what_the_mount_does_not_show_is_named_and_nothing_is_pruned(site: Site) -> None:
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
    result = run_backup(site.environment).expect(1)
    assert named(result) == {"z": "it could not be read", "z/object": "the mount did not show it"}
    assert "older archives may hold what this one lacks: nothing is pruned" in result.output
    assert len(site.archives()) == 2


def test_an_object_whose_reading_fails_is_a_failure_after_the_archive_was_recorded_and_compared(
    site: Site,
) -> None:
    """TigrisFS cannot read an object that S3 gives, and repeats nothing after 400."""
    site.proxy.add(
        lambda request: is_of_the_mount(request) and request.kind == "GET" and request.key == "z/object",
        Action.REFUSE, status=400, code="InvalidRequest",
    )  # fmt: skip
    result = run_backup({**site.environment, "METRICS_FILE": str(site.folder / "m.prom")}).expect(2)
    assert named(result) == {"z/object": "it could not be read"}
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


@pytest.mark.parametrize(
    ("unread", "put", "refused", "verdict", "reasons"),
    [
        ("gone", [], "", "ok", []),
        ("folder", ["folder/object"], "", "failed", ["it could not be read"]),
        ("object", ["object"], "", "failed", ["it could not be read"]),
        ("object", ["object"], "object", "warnings", ["S3 refuses it: AccessDenied (403): injected"]),
    ],
)
def test_s3_is_asked_why_borg_could_not_read_an_object(
    server: SeaweedFS,
    source: Bucket,
    tmp_path: Path,
    unread: str,
    put: list[str],
    refused: str,
    verdict: str,
    reasons: list[str],
) -> None:
    source.put(dict.fromkeys(put, b"content"))
    archived = backup.ArchivedObjects(tmp_path)
    archived.take("E", f"{tmp_path}/{unread}")
    console = backup.Console(debug=False)
    log = backup.BorgLog("target-first", console, backup.Stop())
    warning = {"levelname": "WARNING", "msgid": "BackupIOError", "message": f"{unread}: read: [Errno 5]"}
    log.feed(json.dumps({"type": "log_message", **warning}))
    with FaultProxy(server.endpoint) as proxy:
        if refused:
            proxy.add(lambda request: request.key == refused, Action.REFUSE)
        store = backup.Store(
            None, proxy.endpoint, source.name, "", READER.access_key_id, READER.secret_access_key
        )
        runtime = SimpleNamespace(
            settings=SimpleNamespace(source=store, audit=False), console=console, stop=backup.Stop()
        )
        outcome = backup.Outcome(backup.Target("first", store, "", "none", False, "lz4", (), None))
        created = backup.BorgResult(backup.Verdict.FAILURE, "", log)
        at = SimpleNamespace(found=SimpleNamespace(region="", clock=BEGAN), mount=None)
        backup.compare_with_source(runtime, outcome, archived, created, at, SimpleNamespace(lease=None))
    outcome.finish()
    told = [text.partition("in the archive: ")[2] for text in console.troubles.about("warning", ["source"])]
    assert (outcome.verdict.value, [text for text in told if text]) == (verdict, reasons)


def test_an_archive_that_cannot_be_compared_is_a_failure_and_nothing_is_pruned(site: Site) -> None:
    """The source's listing is refused from the moment on at which borg reads."""
    with Backup(site.environment) as running:
        running.wait_for_line("borg create begins")
        site.proxy.add(lambda request: is_our_list(request), Action.REFUSE)
        result = running.wait().expect(2)
    assert "could not be compared with the source" in result.output
    assert "AccessDenied (403)" in result.output
    assert len(site.archives()) == 2
