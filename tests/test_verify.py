"""`verify NAME`: an archive is compared with the live bucket, and a sample of it is proved."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import backup
from faults.proxy import Action, FaultProxy
from helpers import (
    BACKUP,
    Backup,
    Bucket,
    Result,
    run_backup,
    sample_objects,
    settings,
    wait_until,
    with_target_secrets,
)
from servers import READER, SeaweedFS

# ------------------------------------------------------------------------------------------------- The sample


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300", backup.Sample(number=300)),
        ("1%", backup.Sample(share=0.01)),
        ("0.5%", backup.Sample(share=0.005)),
        ("100%", backup.Sample(share=1.0)),
        ("all", backup.Sample(share=1.0)),
        *[(text, None) for text in ("", "0", "0%", "101%", "-1", "1.5", "half", "1 %", "%", "²")],
    ],
)
def test_a_sample_is_a_number_a_share_or_all(text: str, expected: backup.Sample | None) -> None:
    assert backup.Sample.parse(text) == expected


def choose(folder: Path, sample: str, seed: int, count: int) -> list[int]:
    """Which of `count` objects are chosen."""
    wanted = backup.Sample.parse(sample)
    assert wanted
    spool = folder / f"{sample.strip('%')}-{seed}"
    chooser = backup.Chooser(wanted, seed, spool)
    for number in range(count):
        chooser.take(backup.Chosen(str(number), number, unchanged=True))
    chooser.finish()
    chosen = [int(entry.path) for entry in backup.read_sample(spool)]
    assert len(chosen) == chooser.number
    return chosen


@pytest.mark.parametrize("sample", ["7", "10%", "all", "1000"])
def test_the_same_seed_chooses_the_same_and_another_one_others(tmp_path: Path, sample: str) -> None:
    first, again, other = (choose(tmp_path, sample, seed, 500) for seed in (1, 1, 2))
    assert first == again == sorted(set(first)), "in the archive's order, none twice"
    assert (first == other) == (sample in ("all", "1000"))


@pytest.mark.parametrize(("sample", "expected"), [("7", 7), ("all", 500), ("1000", 500), ("500", 500)])
def test_as_many_are_chosen_as_were_asked_for(tmp_path: Path, sample: str, expected: int) -> None:
    assert len(choose(tmp_path, sample, 3, 500)) == expected


def test_a_share_is_about_that_share_and_at_least_one_object(tmp_path: Path) -> None:
    assert 800 < len(choose(tmp_path, "10%", 1, 10_000)) < 1200
    assert [len(choose(tmp_path, "0.1%", seed, 5)) for seed in range(20)] == [1] * 20
    assert choose(tmp_path, "1%", 1, 0) == []


@pytest.mark.parametrize(("sample", "least", "most"), [("5", 350, 650), ("10%", 130, 290)])
def test_each_object_has_the_same_chance(tmp_path: Path, sample: str, least: int, most: int) -> None:
    """2,000 samples of 20 objects: each is in about as many; also what is taken for want of others."""
    counts = Counter(number for seed in range(2000) for number in choose(tmp_path, sample, seed, 20))
    assert len(counts) == 20
    assert least <= min(counts.values()) <= max(counts.values()) <= most


def test_a_sample_of_a_number_keeps_no_more_than_that(tmp_path: Path) -> None:
    chooser = backup.Chooser(backup.Sample(number=10), 1, tmp_path / "sample")
    for number in range(1000):
        chooser.take(backup.Chosen(str(number), 1, unchanged=True))
        assert len(chooser._kept) <= 10


def test_a_large_sample_is_proved_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One borg gets so many paths in a file, and so many strange ones on its command line, not more."""
    monkeypatch.setattr(backup, "PATHS_AT_ONCE", 4)
    monkeypatch.setattr(backup, "AWKWARD_AT_ONCE", 2)
    chooser, spool = backup.Chooser(backup.Sample(number=99), 1, tmp_path / "sample"), tmp_path / "sample"
    paths = ["a", "b", "c", "d", "e\n", "f", "g ", "h", "#i"]
    for path in paths:
        chooser.take(backup.Chosen(path, 1, unchanged=True))
    chooser.finish()
    parts = [
        ([chosen.path for chosen in batch.objects], batch.number, list(batch.patterns))
        for batch in backup.batches(backup.Sample(number=99), chooser, spool)
    ]
    assert [part[0] for part in parts] == [paths[:4], paths[4:7], paths[7:]]
    assert [part[1] for part in parts] == [4, 3, 2]
    assert parts[1][2][2:6] == ["--pattern", "+ pf:e\n", "--pattern", "+ pf:g "]
    assert (tmp_path / "sample.patterns").read_text() == "+ pf:h\n+ pf:#i\n"


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [
        (b"", b"", ""),
        (b"abc", b"abc", ""),
        (b"abc", b"abd", "byte 2 "),
        (b"abc", b"ab", "byte 2 "),
        (b"", b"x", "byte 0 "),
        (b"x" * 2_500_000, b"x" * 2_500_000, ""),
        (b"x" * 2_500_000 + b"a", b"x" * 2_500_000 + b"b", "byte 2,500,000 "),
    ],
)
def test_the_first_difference_is_found(ours: bytes, theirs: bytes, place: str) -> None:
    found = backup.first_difference(io.BytesIO(ours), io.BytesIO(theirs))
    assert (place in found) if place else found == ""


def test_what_is_listed_is_known_by_key_size_and_second() -> None:
    listed = backup.Listed()
    for number in range(2000):
        listed.add(f"key {number}", number, 1000.5 + number)
    listed.finish()
    assert listed.number == 2000
    assert all(listed.is_unchanged(f"key {number}", number, 1000 + number) for number in range(2000))
    for key, size, modified in (("key 7", 8, 1007), ("key 7", 7, 1008), ("key 2000", 2000, 3000)):
        assert not listed.is_unchanged(key, size, modified)
    assert (listed.lacks("key 7"), listed.hold("key 7"), listed.lacks("key 7")) == (True, True, False)
    assert (listed.lacks("other"), listed.hold("other"), listed.is_held) == (False, False, False)
    assert all(listed.hold(f"key {number}") for number in range(2000))
    assert listed.is_held


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        ("s3borgbackup: source as of 2026-01-31T03:00:00Z", datetime(2026, 1, 31, 3, tzinfo=UTC)),
        ("", datetime(2026, 1, 31, 4, tzinfo=UTC)),
        ("my comment", datetime(2026, 1, 31, 4, tzinfo=UTC)),
        ("s3borgbackup: source as of yesterday", datetime(2026, 1, 31, 4, tzinfo=UTC)),
    ],
)
def test_an_archive_says_as_of_when_it_has_the_source(comment: str, expected: datetime) -> None:
    """Where it does not, its start counts, less what a clock that S3 accepts may be wrong."""
    assert backup.source_as_of(comment, "2026-01-31T04:15:00.000000") == expected


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("missing", backup.Verdict.FAILURE),
        ("differing", backup.Verdict.FAILURE),
        ("unarchivable", backup.Verdict.WARNING),
        ("unreadable", backup.Verdict.WARNING),
        ("changed", backup.Verdict.OK),
        ("appeared", backup.Verdict.OK),
        ("deleted", backup.Verdict.OK),
    ],
)
def test_what_changed_since_is_no_fault_of_the_archive(kind: str, verdict: backup.Verdict) -> None:
    found = backup.Verification("first", 1)
    getattr(found, kind).add("a\nkey", "why")
    assert found.verdict is verdict
    assert json.loads(found.as_json())["result"] == verdict.value
    assert "a\\nkey" in found.as_text()


# ---------------------------------------------------------------------------------------------- Real archives


@pytest.fixture
def environment(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, needs_fuse: None
) -> dict[str, str]:
    """A configuration with one target."""
    return settings(server, tmp_path, source.name, {"first": target.name})


def verify(environment: dict[str, str], exit_code: int, *options: str) -> tuple[dict[str, Any], Result]:
    """Verifies the newest archive, and returns the JSON."""
    result = run_backup(environment, "verify", "first", "--json", *options).expect(exit_code)
    return json.loads(next(line for line in result.lines if line.startswith("{"))), result


def put_before(source: Bucket, objects: dict[str, bytes]) -> None:
    """Writes objects, and waits until they are old enough to be expected in the next archive."""
    source.put(objects)
    time.sleep(backup.RACE_SECONDS + 1)


def names(findings: dict[str, Any]) -> list[str]:
    """The objects that are named."""
    assert findings["count"] == len(findings["objects"])
    return sorted(entry["key"] for entry in findings["objects"])


@pytest.mark.parametrize("sample", ["all", "60"])
def test_a_good_archive_equals_the_source_whatever_the_names(
    environment: dict[str, str], source: Bucket, target: Bucket, sample: str
) -> None:
    """With keys that may only read, for both; a number of objects goes to borg as patterns, all do not."""
    objects = sample_objects(3, 60, largest_bytes=3_000_000)
    source.put(objects)
    run_backup({**environment, "TZ": "Asia/Tokyo"}).expect(0)
    before = target.contents()
    keys = {"access_key_id": READER.access_key_id, "secret_access_key": READER.secret_access_key}
    readers = {**with_target_secrets(environment, "first", **keys), "TZ": "America/New_York"}
    found, _ = verify(readers, 0, "--sample", sample)
    assert (found["result"], found["archived"], found["listed"]) == ("ok", 60, 60)
    assert (found["missing"]["count"], found["changed"]["count"], found["deleted"]["count"]) == (0, 0, 0)
    assert found["sample"]["sampled_bytes"] == sum(map(len, objects.values()))
    assert (found["sample"]["sampled"], found["sample"]["equal"]) == (60, 60)
    assert target.contents() == before


def test_what_changed_in_the_source_since_is_told_and_is_no_fault(
    environment: dict[str, str], source: Bucket
) -> None:
    source.put({f"folder/{number}": os.urandom(1000) for number in range(10)})
    run_backup(environment).expect(0)
    source.put({"folder/1": b"longer" * 1000, "folder/new": b"new"})
    source.delete("folder/2")
    found, _ = verify(environment, 0, "--sample", "all")
    assert (names(found["changed"]), names(found["deleted"]), found["new"]) == (["folder/1"], ["folder/2"], 1)
    assert (found["sample"]["equal"], found["sample"]["extracted"]) == (8, 2)
    text = run_backup(environment, "verify", "first").expect(0)
    assert "1 new, 1 changed, 1 deleted" in text.output
    assert "changed: 'folder/1'" in text.output


def test_an_older_archive_can_be_chosen_and_a_seed_repeats_a_sample(
    environment: dict[str, str], source: Bucket
) -> None:
    source.put({f"folder/{number}": os.urandom(1000 + number) for number in range(30)})
    first = next(line for line in run_backup(environment).expect(0).lines if line.startswith("first "))
    source.put({"folder/later": b"later"})
    run_backup(environment).expect(0)
    archive = first.split()[-1]
    found, _ = verify(environment, 0, "--archive", archive, "--sample", "5", "--seed", "8")
    again, _ = verify(environment, 0, "--archive", archive, "--sample", "5", "--seed", "8")
    assert found == again
    assert (found["archive"], found["new"], found["sample"]["sampled"]) == (archive, 1, 5)
    assert found["sample"]["seed"] == 8
    newest, _ = verify(environment, 0)
    assert newest["archive"] > archive
    assert newest["archived"] == 31


def test_an_object_that_no_archive_can_hold_is_a_warning(environment: dict[str, str], source: Bucket) -> None:
    put_before(source, {"a": b"hidden by a/b", "a/b": b"b", "c": b"c"})
    run_backup(environment).expect(1)
    found, _ = verify(environment, 1)
    assert names(found["unarchivable"]) == ["a"]
    assert "hidden by objects below" in found["unarchivable"]["objects"][0]["reason"]
    assert (found["missing"]["count"], found["new"]) == (0, 0)


def test_an_object_that_the_archive_lacks_is_a_failure(environment: dict[str, str], source: Bucket) -> None:
    put_before(source, {f"folder/{number}": os.urandom(1000) for number in range(10)})
    run_backup(environment).expect(0)
    run_backup(environment, "borg", "first", "recreate", "--exclude", "re:folder/3$").expect(0)
    found, _ = verify(environment, 2)
    assert names(found["missing"]) == ["folder/3"]
    assert (found["result"], found["sample"]["equal"], found["new"]) == ("failed", 9, 0)


def test_an_object_that_appears_with_an_older_time_is_no_loss(
    environment: dict[str, str], source: Bucket, target: Bucket
) -> None:
    """A delete marker is removed. Where it is not known what the source listed, it may as well be a loss."""
    versioning = {"Status": "Enabled"}
    source.client.put_bucket_versioning(Bucket=source.name, VersioningConfiguration=versioning)
    put_before(source, {"a": b"a", "hidden": b"b"})
    marker = source.client.delete_object(Bucket=source.name, Key="hidden")["VersionId"]
    run_backup(environment).expect(0)
    assert verify(environment, 0)[0]["appeared"]["count"] == 0
    source.client.delete_object(Bucket=source.name, Key="hidden", VersionId=marker)
    found, _ = verify(environment, 0)
    assert (names(found["appeared"]), found["missing"]["count"], found["new"]) == (["hidden"], 0, 0)
    [note] = [key for key in target.sizes() if "compared" in key]
    facts = json.loads(target.get(note))
    for change in ({"lacks": ["hidden"]}, {"source": ["another", "bucket"]}, {"archive": "of before"}):
        target.put({note: json.dumps({**facts, **change}).encode()})
        found, _ = verify(environment, 2)
        assert (names(found["missing"]), found["appeared"]["count"]) == (["hidden"], 0)
    assert "or it came later with an older time" in found["missing"]["objects"][0]["reason"]


def test_damage_in_the_repository_is_found_by_an_object_that_lies_in_it(
    environment: dict[str, str], source: Bucket, target: Bucket
) -> None:
    source.put({"large": os.urandom(3_000_000), "small": b"small"})
    run_backup(environment).expect(0)
    target.flip_a_byte(target.largest("data/"))
    found, result = verify(environment, 2, "--sample", "all")
    assert found["result"] == "failed"
    assert "Data integrity error: Segment entry checksum mismatch [segment " in found["error"]
    assert "(while 'large' was read)" in found["error"]
    assert "backup.py check first" in found["error"]
    assert "defect" not in result.output


def lie_about(environment: dict[str, str], source: Bucket, key: str, content: bytes) -> None:
    """Makes an archive in which an object has this content, with the time that it has in the source."""
    path = f"{Path(environment['DATA_DIR']) / 'source'}/{key}".lstrip("/")
    modified = source.client.head_object(Bucket=source.name, Key=key)["LastModified"]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo(path)
        entry.size, entry.mtime = len(content), int(modified.timestamp())
        tar.addfile(entry, io.BytesIO(content))
    subprocess.run(
        [sys.executable, str(BACKUP), "borg", "first", "import-tar", "backup-2030-01-01T00:00:00", "-"],
        env=environment,
        input=stream.getvalue(),
        check=True,
        timeout=60,
    )


def test_content_that_differs_under_the_same_size_and_time_is_a_failure(
    environment: dict[str, str], source: Bucket
) -> None:
    """Nothing else would notice: borg's hashes hold, and the next run would not read the object again."""
    source.put({"one": b"the truth", "two": b"two"})
    run_backup(environment).expect(0)
    lie_about(environment, source, "one", b"the trust")
    found, _ = verify(environment, 2)
    assert names(found["sample"]["differing"]) == ["one"]
    assert "from byte 7 on" in found["sample"]["differing"]["objects"][0]["reason"]


def test_what_is_overwritten_or_deleted_meanwhile_is_no_damage(
    environment: dict[str, str], source: Bucket
) -> None:
    """With the same size, after the source was listed and before it is read."""
    source.put({f"folder/{number}": os.urandom(2000) for number in range(20)})
    run_backup(environment).expect(0)
    with FaultProxy(source.server.endpoint) as proxy:
        # Preflight's is one.
        proxy.add(lambda request: request.kind == "GET", Action.DELAY, after=1, seconds=60)
        slow = {**environment, "SOURCE_ENDPOINT": proxy.endpoint}
        with Backup(slow, "verify", "first", "--json") as running:
            running.wait_for_line("20 objects are proved")
            source.put({f"folder/{number}": os.urandom(2000) for number in range(15)})
            source.delete("folder/15")
            proxy.clear()
            result = running.wait().expect(0)
    found = json.loads(next(line for line in result.lines if line.startswith("{")))
    assert found["changed"]["count"] == 0, "the source was listed too late for this test"
    sample = found["sample"]
    assert (sample["differing"]["count"], sample["unreadable"]["count"]) == (0, 0)
    assert sample["extracted"] > 0, "all was read too early for this test"
    assert sample["equal"] + sample["extracted"] == 20


@pytest.mark.parametrize(
    ("limit", "exit_code", "told"),
    [("900", 143, "stopped by SIGTERM"), ("6", 2, "no progress for 6 s")],
)
def test_a_verification_that_hangs_in_the_source_can_be_stopped_and_ends_by_itself(
    environment: dict[str, str], source: Bucket, limit: str, exit_code: int, told: str
) -> None:
    source.put({f"folder/{number}": os.urandom(2000) for number in range(20)})
    run_backup(environment).expect(0)
    with FaultProxy(source.server.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "GET", Action.HANG, after=1)  # one is the preflight's
        slow = {**environment, "SOURCE_ENDPOINT": proxy.endpoint, "STALL_TIMEOUT": limit}
        with Backup(slow, "verify", "first") as running:
            running.wait_for_line("20 objects are proved")
            wait_until(lambda: proxy.count(lambda request: request.kind == "GET") > 5, 20, "it is read")
            if exit_code == 143:
                running.send_signal(signal.SIGTERM)
            result = running.wait(40).expect(exit_code)
    assert told in result.output


def test_where_there_is_no_archive_it_says_so(environment: dict[str, str], source: Bucket) -> None:
    source.put({"a": b"a"})
    assert "holds no repository yet" in verify(environment, 2)[0]["error"]
    run_backup(environment).expect(0)
    assert "no archive 'b*'" in verify(environment, 2, "--archive", "b*")[0]["error"]
    other = {**environment, "BACKUP_LABEL": "other"}
    assert "no archive of BACKUP_LABEL 'other'" in verify(other, 2)[0]["error"]
    elsewhere = {**environment, "DATA_DIR": f"{environment['DATA_DIR']}/elsewhere"}
    assert "Set DATA_DIR" in verify(elsewhere, 2)[0]["error"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sample", "some"], "write a number of objects, a share such as 1%, or all"),
        (["--seed", "x"], "--seed"),
        (["--samples", "1"], "did you mean --sample?"),
    ],
)
def test_wrong_options_are_told(options: list[str], told: str, new_environment: Callable[..., Any]) -> None:
    result = run_backup(new_environment(), "verify", "first", *options).expect(78)
    assert told in result.output


@pytest.fixture
def new_environment(server: SeaweedFS, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """A configuration that nothing is done with."""
    return lambda: settings(server, tmp_path, "no-source", {"first": "no-target"})
