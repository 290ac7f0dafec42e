"""Exactness: a bucket that was restored has every key, every byte and every header of the one archived."""

import functools
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from faults.proxy import FaultProxy
from helpers import BACKUP, MANIFEST_PATH, Bucket, Result, odd_path, run_backup, settings, tree
from servers import WRITER, Moto, SeaweedFS

MODIFIED = 1735689600  # 2025-01-01T00:00:00Z
HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "cache-control": "max-age=60, public",
    "content-disposition": "attachment; filename=\"a b.html\"; filename*=UTF-8''a%20b.html",
    "content-encoding": "gzip",
    "content-language": "de, en",
    "expires": "Wed, 21 Oct 2015 07:28:00 GMT",
    "x-amz-meta-owner": "Ann O'Nym  twice",
    "x-amz-meta-empty-not": "0",
    "x-amz-meta-words": "=?UTF-8?Q?caf=C3=A9?=",
}
REDIRECT = {"x-amz-website-redirect-location": "/elsewhere?a=1"}
TAGS = {"team": "a + b/c=d", "cost centre": "4711", "empty": ""}
# Keys that no mount can show; those that a disk can hold all the same are not among `NO_FILES`.
NO_FILES = ("x//y", "//", "/lead", "./z", "../up", "trail/", "p" * 300 + "/q", "k" * 1024)
ODD_KEYS = (*NO_FILES, "a", "\x01", "\x7f", "a\x02b/c", "100%", "%2f", "+", "é" * 100)


@dataclass
class Thing:
    """An object."""

    body: bytes
    headers: dict[str, str] | None = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    is_odd: bool = False
    is_lost: bool = False  # the archive has nothing but its name

    def line(self, key: str) -> str:
        """Its line in the manifest."""
        facts: dict[str, Any] = {"key": key, "size": len(self.body), "modified": "2025-01-01T00:00:00+00:00"}
        facts["etag"] = hashlib.md5(self.body).hexdigest()
        facts |= {} if self.headers is None else {"headers": self.headers}
        facts |= {"tags": self.tags} if self.tags else {}
        return json.dumps({**facts, **({"path": odd_path(key)} if self.is_odd else {})}) + "\n"


@dataclass
class Site:
    """An archive `exact` in the target `first`, and an empty bucket."""

    environment: dict[str, str]
    folder: Path
    destination: Bucket

    def archive(self, things: Mapping[str, Thing]) -> None:
        """Makes it, as a run does."""
        paths = []
        for key, thing in sorted(things.items(), key=lambda pair: pair[0].encode()):
            path = self.folder / (odd_path(key) if thing.is_odd else f"data/source/{key}")
            if key.endswith("/") and not thing.is_odd:
                path.mkdir(parents=True)
            elif not thing.is_lost:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(thing.body)
            else:
                continue
            os.utime(path, (MODIFIED, MODIFIED))
            paths.append(str(path.relative_to(self.folder)))
        (self.folder / MANIFEST_PATH).parent.mkdir(exist_ok=True, parents=True)
        with (self.folder / MANIFEST_PATH).open("w") as manifest:
            manifest.writelines(things[key].line(key) for key in sorted(things, key=str.encode))
        options = ["--paths-from-stdin", "--paths-delimiter", "\\0"]
        command = [sys.executable, str(BACKUP), "borg", "first", "create", *options, "::exact"]
        given = "\0".join([*paths, MANIFEST_PATH]).encode()
        environment = {**self.environment, "PYTHONPATH": ""}
        subprocess.run(command, env=environment, cwd=self.folder, input=given, check=True)

    def restore(self, *words: str, **variables: str) -> Result:
        """Restores it, into the bucket unless `words` say otherwise."""
        to = () if "--to" in words or "--to-bucket" in words else ("--to-bucket", self.destination.name)
        command = ("restore", "first", "--archive", "exact", *to, *words)
        return run_backup({**self.environment, **variables}, *command)

    def found(self, key: str) -> Thing:
        """An object of the destination."""
        return found_thing(self.destination, key)


def found_thing(bucket: Bucket, key: str) -> Thing:
    """An object as boto3 shows it."""
    answer = bucket.client.get_object(Bucket=bucket.name, Key=key)
    raw = answer["ResponseMetadata"]["HTTPHeaders"]
    names = (*HEADERS, *REDIRECT)
    tags = bucket.client.get_object_tagging(Bucket=bucket.name, Key=key)["TagSet"]
    return Thing(
        answer["Body"].read(),
        {name: raw[name] for name in raw if name in names or name.startswith("x-amz-meta-")},
        {tag["Key"]: tag["Value"] for tag in tags},
    )


def make_site(
    server: SeaweedFS, destination: Bucket, new_bucket: Callable[..., Bucket], folder: Path
) -> Site:
    """A site with a repository; the destination is on any server."""
    source, target = new_bucket("source"), new_bucket("target")
    environment = settings(
        server,
        folder,
        source.name,
        {"first": target.name},
        RESTORE_ENDPOINT=destination.server.endpoint,
        RESTORE_ACCESS_KEY_ID=WRITER.access_key_id,
        RESTORE_SECRET_ACCESS_KEY=WRITER.secret_access_key,
    )
    source.put({"before": b"1"})
    run_backup(environment).expect(0)
    return Site(environment, folder, destination)


@pytest.fixture
def site(server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, needs_fuse: None) -> Site:
    """With a destination on SeaweedFS."""
    return make_site(server, new_bucket("destination"), new_bucket, tmp_path)


@pytest.fixture
def moto_site(
    server: SeaweedFS, moto: Moto, new_bucket: Callable[..., Bucket], tmp_path: Path, needs_fuse: None
) -> Site:
    """With a destination that takes any key."""
    return make_site(server, new_bucket("destination", on=moto), new_bucket, tmp_path)


def every_kind() -> dict[str, Thing]:
    """An object of each kind."""
    plain = {"content-type": "text/plain"}
    return {
        "a/b": Thing(b"below", dict(HEADERS), dict(TAGS)),
        "page.html": Thing(b"<p>", {**HEADERS, **REDIRECT}),
        "empty": Thing(b"", {"content-type": "image/png"}),
        "folder/": Thing(b"", {"content-type": "application/x-directory", "x-amz-meta-a": "b"}, {"c": "d"}),
        "large": Thing(os.urandom(40_000_000), {**HEADERS, **REDIRECT}, dict(TAGS)),
        "tags only": Thing(b"t", dict(plain), dict(TAGS)),
        **{key: Thing(f"odd {key!r}".encode(), dict(plain), {"odd": "1"}, is_odd=True) for key in ODD_KEYS},
    }


def test_a_bucket_comes_back_with_every_key_byte_header_and_tag(moto_site: Site) -> None:
    """And a second restore finds nothing to do: headers and tags are compared, too."""
    things = every_kind()
    moto_site.archive(things)
    result = moto_site.restore().expect(0)
    assert f"restored {len(things)} objects" in result.output
    assert set(moto_site.destination.sizes()) == set(things)
    for key, thing in things.items():
        found = moto_site.found(key)
        assert (key, found.body) == (key, thing.body)
        assert (key, found.headers, found.tags) == (key, thing.headers, thing.tags)
    again = moto_site.restore().expect(0)
    assert f"restored 0 objects, 0 B, to {moto_site.destination.name}" in again.output
    assert f"{len(things)} were there already" in again.output


@pytest.mark.long
def test_other_headers_are_overwritten_only_when_asked_and_by_a_copy(site: Site) -> None:
    """The bytes are there already, and are not sent again."""
    things = {
        "same": Thing(b"1" * 100_000, {"content-type": "text/css"}),
        "type": Thing(b"2" * 100_000, {"content-type": "text/css", "x-amz-meta-a": "b"}, {"c": "d"}),
        "tags": Thing(b"3" * 100_000, {"content-type": "text/css"}, {"c": "d"}),
        "more": Thing(b"4" * 100_000, {"content-type": "text/css"}),
    }
    site.archive(things)
    client, bucket = site.destination.client, site.destination.name
    for key, details in {
        "same": {"ContentType": "text/css"},
        "type": {"ContentType": "text/plain"},
        "tags": {"ContentType": "text/css", "Tagging": "c=e"},
        "more": {"ContentType": "text/css", "CacheControl": "no-store"},
    }.items():
        client.put_object(Bucket=bucket, Key=key, Body=things[key].body, **details)
    before = {key: site.found(key) for key in things}
    dry = site.restore("--dry-run").expect(2)
    assert "refuse (other headers): 3 objects" in dry.output
    assert "type (other headers)" in dry.output
    result = site.restore().expect(2)
    assert "'type' is there with other headers or tags" in result.output
    assert "3 objects in" in result.output
    assert {key: site.found(key) for key in things} == before
    with FaultProxy(site.destination.server.endpoint) as proxy:
        site.restore("--overwrite", RESTORE_ENDPOINT=proxy.endpoint).expect(0)
        copied = [request.key for request, _ in proxy.requests if request.kind == "COPY"]
        sent = [
            request.key for request, _ in proxy.requests if request.kind == "PUT" and request.key in things
        ]
    assert sorted(copied) == ["more", "tags", "type"]
    assert sent == []
    assert {key: site.found(key) for key in things} == things
    assert "restored 0 objects" in site.restore().expect(0).output


@pytest.mark.long
def test_content_is_recognised_though_the_manifest_does_not_know_its_etag(site: Site) -> None:
    things = {"large": Thing(os.urandom(17_000_000), {"content-type": "text/css"}), "b": Thing(b"1")}
    site.archive(things)
    assert "restored 2 objects" in site.restore().expect(0).output
    assert "restored 0 objects" in site.restore().expect(0).output
    site.destination.put({"b": b"2"})
    assert "'b' is there with other content" in site.restore().expect(2).output


@pytest.mark.long
def test_what_the_archive_lacks_is_named(site: Site) -> None:
    site.archive({"here": Thing(b"1"), "gone": Thing(b"2", is_lost=True), "empty": Thing(b"", is_lost=True)})
    result = site.restore().expect(1)
    assert "'gone' is missing: the manifest has it, and the archive has not" in result.output
    assert site.destination.sizes() == {"here": 1, "empty": 0}


@pytest.mark.long
def test_headers_that_a_server_does_not_keep_are_told(site: Site) -> None:
    """And are no reason to write these objects again. SeaweedFS drops where a website redirects to."""
    site.archive({"page": Thing(b"1", {"content-type": "text/css", **REDIRECT})})
    words = "takes no x-amz-website-redirect-location: 1 object lost it"
    assert words in site.restore().expect(1).output
    assert site.found("page").headers == {"content-type": "text/css"}
    assert "restored 0 objects" in site.restore().expect(0).output


def test_keys_that_a_new_prefix_makes_too_long_are_told_before_anything_is_written(moto_site: Site) -> None:
    moto_site.archive({"k" * 1024: Thing(b"1", is_odd=True), "fine": Thing(b"2")})
    place = f"{moto_site.destination.name}:new"
    dry = moto_site.restore("--to-bucket", place, "--dry-run").expect(1)
    assert "its key would have 1,028 bytes, and S3 takes 1,024" in dry.output
    result = moto_site.restore("--to-bucket", place).expect(1)
    lines = [line for line in result.lines if "1,028 bytes" in line or "1 object, 1 B" in line]
    assert "1,028 bytes" in lines[0]
    assert "to " in lines[1]
    assert moto_site.destination.sizes() == {"new/fine": 1}


def test_a_key_that_the_server_refuses_hinders_no_other(moto_site: Site) -> None:
    """Moto refuses line ends."""
    moto_site.archive({"line\nend": Thing(b"1", is_odd=True), "fine": Thing(b"2")})
    result = moto_site.restore().expect(1)
    assert "'line\\nend' could not be restored: " in result.output
    assert moto_site.destination.sizes() == {"fine": 1}


@pytest.mark.long
def test_a_folder_gets_what_its_disk_can_hold_and_what_was_known_of_it(site: Site) -> None:
    """A key never leads out of it."""
    things = {**every_kind(), "line\nend": Thing(b"1", is_odd=True)}
    del things["large"]
    site.archive(things)
    out, metadata = site.folder / "deep" / "out", site.folder / "metadata"
    result = site.restore("--to", str(out), "--metadata", str(metadata)).expect(1)
    named = {key for key in things if f"{key!r} could not be restored: " in result.output}
    assert named == {*NO_FILES, "a/b"} or named == {*NO_FILES, "a"}
    held = {key: thing for key, thing in things.items() if key not in named}
    assert tree(out) == {key: thing.body for key, thing in held.items() if key != "folder/"}
    assert (out / "folder").is_dir()
    assert not (site.folder / "deep" / "up").exists()
    lines = metadata.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(held[key].line(key)) for key in sorted(held)]
    again = site.restore("--to", str(out)).expect(1)
    assert "restored 0 objects" in again.output


def test_a_part_of_an_archive_is_named_by_its_keys(moto_site: Site) -> None:
    """Odd ones, too."""
    moto_site.archive(every_kind())
    moto_site.restore("trail/", "/lead", "x", "folder").expect(0)
    assert set(moto_site.destination.sizes()) == {"trail/", "/lead", "x//y", "folder/"}


# ------------------------------------------------------------------------------------ From bucket to bucket

# What SeaweedFS keeps of such keys; a line end is what Moto does not keep.
KEPT_BY_SEAWEEDFS = ("a", "%2f", "100%", "+", "é" * 100, "line\nfeed", "tab\there", "del\x7f")


def put_thing(bucket: Bucket, key: str, thing: Thing) -> None:
    """Writes an object as it is to come back."""
    names = {name: re.sub("-(.)", lambda found: found[1].upper(), f"-{name}") for name in HEADERS}
    given = {names[name]: text for name, text in thing.headers.items() if "amz" not in name}
    if REDIRECT.keys() & thing.headers.keys():
        given["WebsiteRedirectLocation"] = thing.headers["x-amz-website-redirect-location"]
    own = {name.removeprefix("x-amz-meta-"): text for name, text in thing.headers.items() if "meta" in name}
    tags = urllib.parse.urlencode(thing.tags)
    bucket.client.put_object(
        Bucket=bucket.name, Key=key, Body=thing.body, Metadata=own, Tagging=tags, **given
    )


def every_thing(keys: Iterable[str], redirect: Mapping[str, str]) -> dict[str, Thing]:
    """Objects with these odd keys, and with all that a server keeps of an object."""
    odd = {key: Thing(f"odd {key!r}".encode(), {"content-type": "text/x"}, {"odd": "1"}) for key in keys}
    return odd | {
        "a/b": Thing(b"below", {**HEADERS, **redirect}, dict(TAGS)),
        "changed": Thing(b"1", dict(HEADERS)),
        "deleted": Thing(b"2", dict(HEADERS)),
        "empty": Thing(b"", {"content-type": "image/png"}),
        "large": Thing(os.urandom(20_000_000), {**HEADERS, **redirect}, dict(TAGS)),
        "packed.gz": Thing(gzip.compress(b"packed" * 1000), {**HEADERS, "content-type": "text/css"}),
        "other headers": Thing(b"3", {"content-type": "text/x", "x-amz-meta-a": "b"}),
    }


def prove_that_it_comes_back(
    run: Callable[..., Result], source: Bucket, restored: Bucket, things: dict[str, Thing]
) -> None:
    """Backed up twice with changes in between, everything deleted, restored into another bucket.

    `run` runs backup.py with arguments, and the target `first`.
    """
    for key, thing in things.items():
        put_thing(source, key, thing)
    run().expect(0)
    source.delete("deleted")
    changes = {
        "changed": Thing(b"one", {"content-type": "text/y"}, {"now": "tagged"}),
        "other headers": Thing(b"3", {"content-type": "text/y", "cache-control": "no-store"}),
        "new": Thing(b"4", dict(HEADERS), dict(TAGS)),
        next(iter(things)): Thing(b"odd and changed", {"content-type": "text/y"}),
    }
    for key, thing in changes.items():
        put_thing(source, key, thing)
    del things["deleted"]
    things |= changes
    run().expect(0)
    run("verify", "first", "--sample", "all").expect(0)
    source.clear()
    run("restore", "first", "--to-bucket", restored.name).expect(0)
    assert set(restored.sizes()) == set(things)
    for key, thing in things.items():
        found = found_thing(restored, key)
        assert (key, found.body, found.headers, found.tags) == (key, thing.body, thing.headers, thing.tags)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
def test_the_restored_bucket_is_the_bucket(
    server: SeaweedFS,
    moto: Moto,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    needs_fuse: None,
    kind: str,
) -> None:
    own, keys = (moto, ODD_KEYS) if kind == "moto" else (server, KEPT_BY_SEAWEEDFS)
    source, restored = new_bucket("source", on=own), new_bucket("restored", on=own)
    environment = settings(
        own,
        tmp_path,
        source.name,
        {"first": {"path": new_bucket("target").name, "endpoint": server.endpoint}},
        RESTORE_ACCESS_KEY_ID=WRITER.access_key_id,
        RESTORE_SECRET_ACCESS_KEY=WRITER.secret_access_key,
    )
    things = every_thing(keys, REDIRECT if kind == "moto" else {})
    prove_that_it_comes_back(functools.partial(run_backup, environment), source, restored, things)
