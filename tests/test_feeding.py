"""What a run archives: every key, every header, and what happens to objects while it reads."""

import os
from pathlib import Path

import pytest

from helpers import Bucket, Repository, run_backup, settings
from servers import Moto, SeaweedFS

ODD_KEYS = (
    *(
        "a",
        "x//y",
        "//",
        "/lead",
        "./z",
        "../up",
        "trail/",
        "deep/./er",
        "deep/..",
        "folder/\x01",
        "x\x02y/z",
    ),
    *("del\x7f", "lone%", "100%25", "+ &=?#;'\"<>", "tab\there", "é" * 300, "k/" + "l" * 600, "z" * 1024),
)
PLAIN_KEYS = (
    "a/b",
    "folder/beside",
    "folder/deeper/still",
    "plain",
    "Straße/日本語",
    "x/y",
    "marker/",
    "y/in place",
    "y/in/place",
)
HEADERS = {
    "CacheControl": "max-age=31536000, immutable",
    "ContentDisposition": "attachment; filename*=UTF-8''%E2%82%AC.txt",
    "ContentEncoding": "gzip",
    "ContentLanguage": "de, en",
    "ContentType": "text/html; charset=utf-8",
    "Metadata": {"colour": "red", "word": "=?UTF-8?B?w7xuaWNvZGU=?="},
    "Tagging": "team=a%20b&empty=",
}


@pytest.fixture
def odd_source(moto: Moto) -> Bucket:
    """A bucket on the server that keeps every key."""
    name = f"odd-{os.urandom(6).hex()}"
    moto.client().create_bucket(Bucket=name)
    return Bucket(moto, name)


def newest(target: Bucket, folder: Path) -> tuple[Repository, str]:
    """The repository, downloaded, and the name of its newest archive."""
    repository = Repository.download(target, folder)
    repository.check()
    return repository, repository.archives()[-1]


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.parametrize("extra", [(), ("\x01top", "line\rend")], ids=["", "unlistable-root"])
@pytest.mark.parametrize("threads", ["32", "0"])
def test_every_key_is_archived_and_readable_with_plain_borg(
    server: SeaweedFS,
    target: Bucket,
    odd_source: Bucket,
    tmp_path: Path,
    extra: tuple[str, ...],
    threads: str,
) -> None:
    """Where TigrisFS cannot list a folder, what is directly in it comes through our own client, too."""
    objects = {key: os.urandom(len(key)) for key in (*ODD_KEYS, *PLAIN_KEYS, *extra)} | {"marker/": b""}
    odd_source.put(objects)
    environment = settings(server, tmp_path, odd_source.name, {"first": target.name})
    environment |= {"SOURCE_ENDPOINT": odd_source.server.endpoint, "READ_AHEAD_THREADS": threads}
    result = run_backup(environment).expect(0)
    assert "warning" not in result.output
    repository, archive = newest(target, tmp_path / "local")
    contents = repository.contents(archive, Path(environment["DATA_DIR"], "source"), tmp_path / "extracted")
    assert contents == {key: body for key, body in objects.items() if key != "marker/"}
    manifest = repository.manifest(archive)
    assert list(manifest) == sorted(objects, key=str.encode)
    in_place = {key for key, entry in manifest.items() if "path" not in entry}
    assert {"y/in place", "y/in/place"} <= in_place <= set(PLAIN_KEYS)
    assert all(entry["size"] == len(objects[key]) for key, entry in manifest.items())
    run_backup(environment).expect(0)


@pytest.mark.usefixtures("needs_fuse")
def test_the_manifest_has_each_objects_headers_and_tags(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    for number in range(3):
        source.client.put_object(Bucket=source.name, Key=f"all/{number}", Body=b"x", **HEADERS)
    source.put({"none": b"y"})
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(environment).expect(0)
    repository, archive = newest(target, tmp_path / "local")
    manifest = repository.manifest(archive)
    entry = manifest["all/1"]
    assert entry["headers"] == {
        "cache-control": HEADERS["CacheControl"],
        "content-disposition": HEADERS["ContentDisposition"],
        "content-encoding": "gzip",
        "content-language": "de, en",
        "content-type": HEADERS["ContentType"],
        "x-amz-meta-colour": "red",
        "x-amz-meta-word": "=?UTF-8?B?w7xuaWNvZGU=?=",
    }
    assert entry["tags"] == {"team": "a b", "empty": ""}
    assert "tags" not in manifest["none"]
    assert entry["etag"] == source.client.head_object(Bucket=source.name, Key="all/1")["ETag"].strip('"')
