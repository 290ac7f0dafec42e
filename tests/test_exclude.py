"""EXCLUDE: what a user does not want is in no archive, is counted, and is missed by nobody."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import backup
from helpers import Bucket, Repository, run_backup, settings
from servers import WRITER, Moto
from test_told import Receiver

PATTERNS = ["*.tmp", "cache/*", "a/*", "dark/\x02", "nothing-*", "[x]//y"]
KEPT = {
    "a": b"beside what is excluded",
    "plain": b"1",
    "cache": b"not below it",
    "x//z": b"3",
    "folder\x01/two": b"no XML holds its name",
    "dark/ok": b"in a folder that cannot be listed",
    "Upper.TMP": b"4",
}
EXCLUDED = ("a/b", "cache/1", "cache/deep/2", "x//y", "folder\x01/one.tmp", "dark/\x02")


@pytest.mark.parametrize(
    ("key", "is_excluded"),
    [(key, True) for key in (*EXCLUDED, "no UTF-8 \udcff.tmp", "line\nend.tmp", "deep/er.tmp")]
    + [(key, False) for key in (*KEPT, "line\nend")],
)
def test_a_pattern_is_for_the_whole_key(tmp_path: Path, key: str, is_excluded: bool) -> None:
    catalog = backup.Catalog(tmp_path / "catalog")
    catalog.add([backup.S3Object(key, 1, backup.EPOCH)])
    catalog.exclude(PATTERNS)
    assert catalog.total("excluded(key)") == (is_excluded, is_excluded)
    catalog.close()


@pytest.mark.usefixtures("needs_fuse")
def test_what_is_excluded_is_in_no_archive_and_missing_nowhere(
    moto: Moto, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """In a first run, in one without changes and in one with; in a restore and to `verify`."""
    source, target, restored = (new_bucket(name, on=moto) for name in ("source", "target", "restored"))
    below = {f"p/{key}": body for key, body in {**KEPT, **dict.fromkeys(EXCLUDED, b"12")}.items()}
    source.put(below)
    with Receiver() as receiver:
        env = settings(
            moto,
            tmp_path,
            f"{source.name}:p",
            {"first": target.name},
            EXCLUDE=json.dumps(PATTERNS),
            HEADERS="off",
            RESTORE_ACCESS_KEY_ID=WRITER.access_key_id,
            RESTORE_SECRET_ACCESS_KEY=WRITER.secret_access_key,
            NOTIFY_URL=receiver.url("/hook"),
            NOTIFY_ON="always",
        )
        first = run_backup(env).expect(0)
        told = [heard.json for heard in receiver.heard]
    assert f"excluded: {len(EXCLUDED)} objects, {2 * len(EXCLUDED)} B" in first.lines
    assert f"excluded: {len(EXCLUDED)} objects" in json.dumps(told)
    assert [line.partition("EXCLUDE: ")[2] for line in first.lines if "EXCLUDE: " in line] == [
        "no key matches 'nothing-*'"
    ]
    del env["NOTIFY_URL"]
    again = run_backup({**env, "LOG_FORMAT": "json"}).expect(0)
    events = [entry for line in again.lines if (entry := json.loads(line))["event"] == "excluded"]
    assert [(entry["objects"], entry["bytes"]) for entry in events] == [(len(EXCLUDED), 2 * len(EXCLUDED))]
    verified = run_backup(env, "verify", "first", "--sample", "all").expect(0)
    for words in (
        f"{len(KEPT)} archived, {len(KEPT)} in the source now",
        "missing +0 that",
        "unarchivable +0 that",
        "since then +0 new, 0 changed, 0 deleted",
    ):
        assert re.search(words, verified.output), words

    source.put({"p/plain": b"changed", "p/new.tmp": b"1", "p/new": b"new"})
    run_backup(env).expect(0)
    kept = {**KEPT, "plain": b"changed", "new": b"new"}
    repository = Repository.download(target, tmp_path / "copy")
    for number, (archive, expected) in enumerate(zip(repository.archives(), (KEPT, KEPT, kept), strict=True)):
        found = repository.contents(archive, tmp_path / "data/source", tmp_path / f"extracted{number}")
        assert found == expected
        assert repository.manifest(archive).keys() == expected.keys()
    run_backup(env, "restore", "first", "--to-bucket", restored.name).expect(0)
    assert restored.contents() == kept
