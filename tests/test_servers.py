"""The same story on every S3 server that can be had: `tests/run servers`.

What a server can is found out with boto3 first. What it keeps is then backed up, verified and restored, and
has to come back the same.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from helpers import (
    UNUSUAL_KEYS,
    Backup,
    Bucket,
    Result,
    leftovers,
    remove_leftovers,
    run_backup,
    settings,
    skip_or_fail,
    wait_until,
    with_target_secrets,
)
from matrix import ROWS, Row
from matrix_servers import KINDS, Kind
from servers import Identity, Server
from test_exact import HEADERS, ODD_KEYS, REDIRECT, TAGS
from test_lease import LEASE, SLOW, elsewhere

pytestmark = [pytest.mark.usefixtures("needs_fuse"), pytest.mark.timeout(600)]

LARGE_BYTES, SHORT_BYTES = 200_000_000, 40_000_000
RANDOM_BYTES = 24_000_000
LEASED_BYTES = 16_000_000  # longer than the shortest lease, so that it has to be renewed
SMALL_COUNT = 60
WRITERS = 8
KEYS = (*ODD_KEYS, "a/b", *UNUSUAL_KEYS)
REFUSED = (ClientError, BotoCoreError)
SUSPENDED = "the lease cannot be renewed"
UNCONDITIONAL = "does not enforce conditional writes"
SNAPSHOT = dict[str, tuple[str, dict[str, str], dict[str, str]]]


def large_body(size: int) -> bytes:
    """Bytes that are quickly made and compressed; no two blocks of it are alike."""
    return b"".join(number.to_bytes(8, "big") * 512 for number in range(size // 4096 + 1))[:size]


class Site:
    """A server under test, and what was found out about it, in `row`; all is made when asked for."""

    def __init__(self, server: Server, folder: Path, row: Row, large_bytes: int) -> None:
        self.server, self.folder, self.row, self.large_bytes = server, folder, row, large_bytes
        self.client = server.client()

    def bucket(self, purpose: str) -> Bucket:
        """A new bucket."""
        return Bucket(self.server, f"{purpose}-{uuid.uuid4().hex[:8]}").create()

    def put(self, bucket: Bucket, key: str, body: bytes = b"content", **details: Any) -> str:
        """Write an object; its ETag."""
        return self.client.put_object(Bucket=bucket.name, Key=key, Body=body, **details)["ETag"]

    def headers(self, bucket: Bucket, key: str) -> dict[str, str]:
        """The headers of an object that belong to it."""
        raw = self.client.head_object(Bucket=bucket.name, Key=key)["ResponseMetadata"]["HTTPHeaders"]
        names = (*HEADERS, *REDIRECT)
        return {name: raw[name] for name in raw if name in names or name.startswith("x-amz-meta-")}

    def tags(self, bucket: Bucket, key: str) -> dict[str, str]:
        """The tags of an object; none where the server knows none."""
        try:
            found = self.client.get_object_tagging(Bucket=bucket.name, Key=key).get("TagSet", [])
        except REFUSED:
            return {}
        return {tag["Key"]: tag.get("Value", "") for tag in found}

    def snapshot(self, bucket: Bucket) -> SNAPSHOT:
        """All that a bucket has: key → digest of the content, headers, tags."""

        def look(key: str) -> tuple[str, dict[str, str], dict[str, str]]:
            body = self.client.get_object(Bucket=bucket.name, Key=key)["Body"]
            digest = hashlib.sha256()
            for piece in body.iter_chunks(1 << 20):
                digest.update(piece)
            return digest.hexdigest(), self.headers(bucket, key), self.tags(bucket, key)

        keys = list(bucket.sizes())
        with ThreadPoolExecutor(4) as pool:
            return dict(zip(keys, pool.map(look, keys), strict=True))

    # ---------------------------------------------------------------------------------- What the server can

    @functools.cached_property
    def kept_keys(self) -> list[str]:
        """Those of `KEYS` that the server keeps, and keeps beside each other."""
        bucket, kept = self.bucket("keys"), []
        for number, key in enumerate(KEYS):
            try:
                self.put(bucket, key, b"%d" % number)
                if bucket.get(key) == b"%d" % number and key in bucket.sizes():
                    kept.append(key)
            except REFUSED:
                with contextlib.suppress(*REFUSED):
                    self.client.delete_object(Bucket=bucket.name, Key=key)
        again = bucket.sizes()
        kept = [key for key in kept if key in again]
        lost = [key if len(key) < 20 else f"{key[:3]}… of {len(key)}" for key in KEYS if key not in kept]
        self.row.cells["keys"] = "all" if not lost else f"{len(kept)} of {len(KEYS)}"
        if lost:
            self.row.note(f"does not keep the keys {', '.join(map(repr, lost))}")
        return kept

    @functools.cached_property
    def kept_headers(self) -> dict[str, str]:
        """Those of `HEADERS` and the redirect that the server keeps, asked for one by one."""
        bucket, kept, found = self.bucket("headers"), {}, {"no": [], "changes": []}
        for name, value in {**HEADERS, **REDIRECT}.items():
            there = ""
            with contextlib.suppress(*REFUSED):
                self.put(bucket, "object", **details({name: value}))
                there = self.headers(bucket, "object").get(name, "")
            if there == value:
                kept[name] = value
            else:
                found["changes" if there else "no"].append(name.removeprefix("x-amz-"))
        words = [f"{verb} {', '.join(names)}" for verb, names in found.items() if names]
        self.row.cells["headers"] = "; ".join(words) or "all"
        return kept

    @functools.cached_property
    def has_tags(self) -> bool:
        """Whether the server keeps tags."""
        bucket, kept = self.bucket("tags"), {}
        with contextlib.suppress(*REFUSED):
            tagging = "team=a%20%2B%20b%2Fc%3Dd&cost%20centre=4711&empty="
            self.put(bucket, "object", Tagging=tagging)
            kept = self.tags(bucket, "object")
        self.row.cells["tags"] = "yes" if kept == TAGS else "no"
        return kept == TAGS

    @functools.cached_property
    def has_conditions(self) -> bool:
        """Whether the server enforces what a lease needs: both headers, and for one of many at once."""
        bucket = self.bucket("conditions")
        self.put(bucket, "object")

        def is_refused(**condition: str) -> bool:
            try:
                self.put(bucket, "object", b"other", **condition)
                return False
            except ClientError as error:
                return error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412)

        if not (is_refused(IfNoneMatch="*") and is_refused(IfMatch='"00000000000000000000000000000000"')):
            return False

        def wins(number: int) -> bool:
            with contextlib.suppress(ClientError):
                return bool(self.put(bucket, "race", b"%d" % number, IfNoneMatch="*"))
            return False

        with ThreadPoolExecutor(WRITERS) as pool:
            winners = sum(pool.map(wins, range(WRITERS)))
        if winners != 1:
            self.row.note(f"of {WRITERS} conditional writes at once, {winners} succeed")
        return True

    def has_locks(self) -> str:
        """What there is against ransomware: versions, and object lock."""
        bucket, found = self.bucket("versions"), []
        with contextlib.suppress(*REFUSED):
            on = {"Status": "Enabled"}
            self.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration=on)
            self.put(bucket, "object", b"1")
            self.put(bucket, "object", b"2")
            if len(self.client.list_object_versions(Bucket=bucket.name).get("Versions", ())) == 2:
                found.append("versions")
        with contextlib.suppress(*REFUSED):
            name = f"locked-{uuid.uuid4().hex[:8]}"
            self.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
            version = self.client.put_object(
                Bucket=name,
                Key="object",
                Body=b"1",
                ObjectLockMode="GOVERNANCE",
                ObjectLockRetainUntilDate=time.time() + 3600,
            ).get("VersionId", "")
            try:
                self.client.delete_object(Bucket=name, Key="object", VersionId=version)
            except ClientError:
                found.append("object lock")
        return ", ".join(found) or "no"

    # ---------------------------------------------------------------------------------------------- The story

    @functools.cached_property
    def source(self) -> Bucket:
        """A bucket with all that the server keeps."""
        bucket = self.bucket("source")
        for number, key in enumerate(self.kept_keys):
            self.put(bucket, key, b"%d" % number, ContentType="text/plain")
        self.put(bucket, "headers/page.html", b"<p>", **details(self.kept_headers))
        if self.has_tags:
            self.put(bucket, "tagged", Tagging="team=a%20%2B%20b%2Fc%3Dd&cost%20centre=4711&empty=")
        bucket.put({f"small/{number % 7}/{number}": b"%d" % number * 99 for number in range(SMALL_COUNT)})
        for key, body in {
            "large": large_body(self.large_bytes),
            "random": os.urandom(RANDOM_BYTES),
        }.items():  # in parts
            self.client.upload_fileobj(io.BytesIO(body), bucket.name, key)
        return bucket

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """The configuration: a whole bucket, and a place in another one, as targets."""
        targets = {
            "first": {"path": self.bucket("first").name, "prune": "--keep-last=1", "compact": 0},
            "second": f"{self.bucket('second').name}:deep/prefix",
        }
        return self.settings(self.source, targets)

    def settings(self, source: Bucket, targets: dict[str, Any]) -> dict[str, str]:
        """A configuration with this server's keys."""
        return settings(
            self.server,
            self.folder / uuid.uuid4().hex[:8],
            source.name,
            targets,
            source_identity=self.server.reader,
            target_identity=self.server.writer,
            RESTORE_ENDPOINT=self.server.endpoint,
            RESTORE_ACCESS_KEY_ID=self.server.writer.access_key_id,
            RESTORE_SECRET_ACCESS_KEY=self.server.writer.secret_access_key,
        )

    @functools.cached_property
    def runs(self) -> list[Result]:
        """A first run, an unchanged one, and one after changes; each must be all well."""
        found = [self.run(), self.run()]
        self.client.delete_object(Bucket=self.source.name, Key="small/0/0")
        self.put(self.source, "small/1/1", b"changed")
        self.put(self.source, "small/new", os.urandom(100_000))
        return [*found, self.run()]

    def run(self, *arguments: str, **variables: str) -> Result:
        """Run backup.py, which has to be content; of a server without conditional writes it complains."""
        with Backup({**self.environment, **variables}, *arguments) as backup:
            result = ended(backup)
        warnings = [line for line in result.lines if "] warning: " in line and UNCONDITIONAL not in line]
        assert not warnings, result.output
        return result.expect(0)


def ended(backup: Backup) -> Result:
    """How it ended; AssertionError as soon as it is suspended, as it might be for ever."""

    def has_ended() -> bool:
        suspended = [line for line in backup.lines if SUSPENDED in line]
        assert not suspended, suspended
        return backup.process.poll() is not None

    wait_until(has_ended, 300, "it ends")
    return backup.wait()


def details(headers: dict[str, str]) -> dict[str, Any]:
    """Headers as boto3 wants them."""
    names = {"content-type", "cache-control", "content-disposition", "content-encoding", "content-language"}
    found: dict[str, Any] = {"Metadata": {}}
    for name, value in headers.items():
        if name.startswith("x-amz-meta-"):
            found["Metadata"][name.removeprefix("x-amz-meta-")] = value
        elif name in names or name == "expires":
            found["".join(word.capitalize() for word in name.split("-"))] = value
        else:
            found["WebsiteRedirectLocation"] = value
    return found


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((each, LARGE_BYTES), id=each.make.name, marks=pytest.mark.servers) for each in KINDS),
        *(
            pytest.param((each, SHORT_BYTES), id=f"{each.make.name}, short")
            for each in KINDS
            if each.is_quick
        ),
    ],
)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server, started for these tests, with nothing in it."""
    kind: Kind
    kind, large_bytes = request.param
    folder = tmp_path_factory.mktemp("matrix")
    if kind.missing:
        skip_or_fail(f"{kind.missing} is not on the PATH: `tests/setup servers` installs it")
    with kind.make() as server:
        row = Row(kind.title, kind.version)
        request.config.stash.setdefault(ROWS, []).append(row)
        yield Site(server, folder, row, large_bytes)
    found = leftovers(folder)
    remove_leftovers(folder)
    shutil.rmtree(folder)
    assert not found


def test_every_store_is_found_usable(site: Site) -> None:
    with site.row.checking("story"):
        site.row.cells["locks"] = site.has_locks()
        result = site.run("check-config")
        assert not [line for line in result.lines if "failed" in line]
        assert result.output.count(" ok, holds ") == 2


def test_what_was_backed_up_is_whole_and_comes_back_the_same(site: Site) -> None:
    with site.row.checking("story"):
        first, unchanged, changed = site.runs
        # Kilobytes at most: what was overwritten a moment before the first run is looked at once more.
        assert len(re.findall(r" k?B new in the repository", unchanged.output)) == 2
        site.row.note(f"first run {first.duration_seconds:.0f} s, {changed.duration_seconds:.0f} s the last")
        assert len(site.run("list", "first").lines) == 2  # a head, and what prune left
        site.run("verify", "first", "--sample", "all")
        site.run("check", "second")
        restored = site.bucket("restored")
        site.run("restore", "first", "--to-bucket", restored.name)
        assert site.snapshot(restored) == site.snapshot(site.source)
        again = site.run("restore", "first", "--to-bucket", restored.name)
        assert "restored 0 objects" in again.output


def test_of_two_runs_at_once_one_works_or_a_warning_says_why_not(site: Site) -> None:
    with site.row.checking("lease"):
        source, target = site.bucket("source"), site.bucket("target")
        source.put({"object": os.urandom(LEASED_BYTES)})
        targets = {"first": {"path": target.name, "compression": SLOW}}
        environment = {**site.settings(source, targets), "LEASE_WAIT": "0", "LEASE_TTL": "10"}
        if not site.has_conditions:
            assert UNCONDITIONAL in run_backup(environment).output
            site.row.cells["lease"] = "no: a warning"
            return
        other = elsewhere(environment, site.folder / uuid.uuid4().hex)
        with Backup(environment) as one:
            wait_until(lambda: LEASE in target.sizes(), 60, "the first run has its lease")
            assert "another run works on this repository" in run_backup(other).expect(75).output
            assert one.process.poll() is None, "it ended before the other one was refused"
            assert UNCONDITIONAL not in ended(one).expect(0).output
        run_backup(other).expect(0)


def test_what_is_refused_is_told_in_one_line_with_store_and_remedy(site: Site) -> None:
    with site.row.checking("rights"):
        source, admin = site.bucket("source"), site.server.admin
        source.put({"object": b"1"})
        wrong = {
            "key": Identity("unknown-key", "s" * 40, ()),
            "secret": Identity(admin.access_key_id, "s" * 40, ()),
        }
        is_checked = {}
        for name, identity in wrong.items():
            try:
                site.server.client(identity).list_objects_v2(Bucket=source.name)
                is_checked[name] = False
            except ClientError:
                is_checked[name] = True
        expected = ["missing", *(f"wrong-{name}" for name in wrong if is_checked[name])]
        try:
            site.server.client(site.server.reader).put_object(Bucket=source.name, Key="forbidden")
            has_rights = False
        except ClientError:
            has_rights = True
        expected += ["reader"] if has_rights else []
        targets = {name: {"path": site.bucket(name).name} for name in expected}
        targets["missing"] = {"path": "missing-bucket"}
        environment = site.settings(source, targets)
        for name in expected[1:]:
            who = site.server.reader if name == "reader" else wrong[name.removeprefix("wrong-")]
            keys = {"access_key_id": who.access_key_id, "secret_access_key": who.secret_access_key}
            environment = with_target_secrets(environment, name, **keys)
        result = run_backup(environment, "check-config").expect(2)
        errors = [line for line in result.lines if "] error: " in line]
        for name in expected:
            lines = [each for each in errors if f" target-{name} (" in each]
            assert len(lines) == 1 or (lines and name == "reader"), (
                result.output
            )  # a line for each permission
            site.row.note(lines[0].partition("] error: ")[2])
            assert all(line.rstrip().endswith(".") for line in lines), "no remedy"
        unchecked = [name for name in wrong if not is_checked[name]]
        site.row.cells["rights"] = (
            f"accepts a wrong {unchecked[-1]}" if unchecked else "yes" if has_rights else "no"
        )
