"""`verify NAME`: an archive is compared with the live bucket, and a sample of it is proved."""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig

import backup
from faults.proxy import Action, FaultProxy
from helpers import (
    BACKUP,
    MANIFEST_PATH,
    Backup,
    Bucket,
    Result,
    odd_path,
    run_backup,
    sample_objects,
    settings,
    wait_until,
    with_target_secrets,
)
from servers import READER, WRITER, SeaweedFS

# ------------------------------------------------------------------------------------------------- The sample


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300", 300),
        ("1", 1),
        ("1%", 0.01),
        ("0.5%", 0.005),
        ("100%", 1.0),
        ("all", 1.0),
        *[(text, None) for text in ("", "0", "0%", "101%", "-1", "1.5", "half", "1 %", "%", "²")],
    ],
)
def test_a_sample_is_a_number_a_share_or_all(text: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            backup.parse_sample(text)
    else:
        sample = backup.parse_sample(text)
        assert (sample, type(sample)) == (expected, type(expected)), "1 is an object, and 1.0 are all"


def choose(sample: str, seed: int, count: int) -> list[int]:
    """Which of `count` objects are chosen."""
    plan = plan_of(count)
    plan.execute("UPDATE items SET is_chosen = 0")
    plan.choose("1", backup.parse_sample(sample), seed)
    return [int(item.key) for item in plan.items("is_chosen")]


@functools.lru_cache
def plan_of(count: int) -> backup.Plan:
    """The plan of an archive with so many objects."""
    with tempfile.TemporaryDirectory() as folder:
        plan = backup.Plan(Path(folder, "plan"))
    for number in range(1, count + 1):
        plan.execute("INSERT INTO items (key, size) VALUES (?, 1)", [f"{number:04}".encode()])
    return plan


@pytest.mark.parametrize("sample", ["7", "10%", "all", "1000"])
def test_the_same_seed_chooses_the_same_and_another_one_others(sample: str) -> None:
    first, again, other = (choose(sample, seed, 500) for seed in (1, 1, 2))
    assert first == again
    assert (first == other) == (sample in ("all", "1000"))


@pytest.mark.parametrize(
    ("sample", "expected"), [("7", 7), ("all", 500), ("1000", 500), ("500", 500), ("10%", 50), ("0.1%", 1)]
)
def test_as_many_are_chosen_as_were_asked_for(sample: str, expected: int) -> None:
    chosen = choose(sample, 3, 500)
    assert len(chosen) == expected
    assert {*chosen} <= {*range(1, 501)}
    assert choose(sample, 3, 0) == []


def test_the_default_sample_finds_a_damage_of_1_percent_with_a_chance_of_95() -> None:
    sample = backup.parse_arguments(["verify", "first"])[1]["sample"]
    assert sample == 300
    assert round(1 - 0.99**sample, 2) == 0.95


@pytest.mark.parametrize(("sample", "least", "most"), [("5", 350, 650), ("10%", 130, 290)])
def test_each_object_has_the_same_chance(sample: str, least: int, most: int) -> None:
    """2,000 samples of 20 objects: each is in about as many."""
    counts = Counter(number for seed in range(2000) for number in choose(sample, seed, 20))
    assert len(counts) == 20
    assert least <= min(counts.values()) <= max(counts.values()) <= most


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        ("s3borgbackup: source as of 2026-01-31T03:00:00Z", datetime(2026, 1, 31, 3, tzinfo=UTC)),
        (
            "s3borgbackup: source as of 2026-01-31T03:00:00Z, with manifest",
            datetime(2026, 1, 31, 3, tzinfo=UTC),
        ),
        ("", datetime(2026, 1, 31, 4, tzinfo=UTC)),
        ("my comment", datetime(2026, 1, 31, 4, tzinfo=UTC)),
        ("s3borgbackup: source as of yesterday", datetime(2026, 1, 31, 4, tzinfo=UTC)),
    ],
)
def test_an_archive_says_as_of_when_it_has_the_source(comment: str, expected: datetime) -> None:
    """Where it does not, its start counts, less what a clock that S3 accepts may be wrong."""
    entry = {"name": "x", "time": "2026-01-31T04:15:00.000000", "comment": comment}
    as_of = backup.Archive.parse(entry).as_of
    assert (as_of, as_of.tzname()) == (expected, "UTC"), "as which it is printed"


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("missing", backup.Verdict.FAILURE),
        ("differing", backup.Verdict.FAILURE),
        ("unarchivable", backup.Verdict.WARNING),
        ("unreadable", backup.Verdict.WARNING),
        ("headers_changed", backup.Verdict.WARNING),
        ("changed", backup.Verdict.OK),
        ("appeared", backup.Verdict.OK),
        ("deleted", backup.Verdict.OK),
    ],
)
def test_what_changed_since_is_no_fault_of_the_archive(kind: str, verdict: backup.Verdict) -> None:
    found = backup.Verification("first", 1)
    found.found[kind].add("a\nkey", "why")
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


def import_archive(
    environment: dict[str, str], entries: Mapping[str, tuple[bytes, datetime]], comment: str = ""
) -> None:
    """Makes an archive of files (path → content and time) and folders (with a slash at the end)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, (content, modified) in entries.items():
            entry = tarfile.TarInfo(path.lstrip("/").rstrip("/"))
            entry.type = tarfile.DIRTYPE if path.endswith("/") else tarfile.REGTYPE
            entry.size, entry.mtime = len(content), int(modified.timestamp())
            tar.addfile(entry, io.BytesIO(content))
    options = ["--comment", comment] if comment else []
    subprocess.run(
        [*(sys.executable, str(BACKUP), "borg", "first", "import-tar"), *options, NEWEST, "-"],
        env=environment,
        input=stream.getvalue(),
        check=True,
        timeout=60,
    )


NEWEST = "backup-2030-01-01T00:00:00"


def make_old_archive(environment: dict[str, str], source: Bucket, *keys: str) -> None:
    """Makes an archive of these objects as before there were manifests."""
    comment = f"s3borgbackup: source as of {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    listed = source.client.list_objects_v2(Bucket=source.name)["Contents"]
    paths = {entry["Key"]: f"{environment['DATA_DIR']}/source/{entry['Key']}" for entry in listed}
    entries = {
        paths[entry["Key"]]: (source.get(entry["Key"]), entry["LastModified"])
        for entry in listed
        if entry["Key"] in keys
    }
    import_archive(environment, entries, comment)


def names(findings: dict[str, Any]) -> list[str]:
    """The objects that are named."""
    assert findings["count"] == len(findings["objects"])
    return sorted(entry["key"] for entry in findings["objects"])


@pytest.mark.long
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


@pytest.mark.long
def test_of_an_archive_only_the_sample_is_read(
    environment: dict[str, str], source: Bucket, target: Bucket
) -> None:
    """So that a sample costs what it has, and not what the archive has."""
    source.put({"large": os.urandom(3_000_000), "small": b"small"})
    run_backup(environment).expect(0)
    target.flip_a_byte(target.largest("data/"))
    seed = next(seed for seed in range(99) if choose("1", seed, 2) == [2])
    found, _ = verify(environment, 0, "--sample", "1", "--seed", f"{seed}")
    assert (found["sample"]["sampled_bytes"], found["sample"]["equal"]) == (5, 1)


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_an_archive_without_a_manifest_is_compared_by_size_and_time(
    environment: dict[str, str], source: Bucket
) -> None:
    """What no mount could show is a warning there, and empty objects that stand for folders are nothing."""
    run_backup(environment).expect(1)
    put_before(source, {"a": b"hidden by a/b", "a/b": b"b", "c": b"c", "d": b"d", "e": b"e", "f/": b""})
    make_old_archive(environment, source, "a/b", "c", "d", "e")
    time.sleep(1)
    source.put({"c": b"C", "new": b"new"})
    source.delete("d")
    found, _ = verify(environment, 1)
    assert names(found["unarchivable"]) == ["a"]
    assert "hidden by objects below" in found["unarchivable"]["objects"][0]["reason"]
    assert (names(found["changed"]), names(found["deleted"])) == (["c"], ["d"])
    assert (found["archived"], found["listed"], found["missing"]["count"], found["new"]) == (4, 5, 0, 1)
    assert (found["sample"]["equal"], found["sample"]["extracted"]) == (2, 2)


@pytest.mark.long
def test_an_object_that_the_archive_lacks_is_a_failure(environment: dict[str, str], source: Bucket) -> None:
    put_before(source, {f"folder/{number}": os.urandom(1000) for number in range(10)})
    run_backup(environment).expect(0)
    run_backup(environment, "borg", "first", "recreate", "--exclude", "re:folder/3$").expect(0)
    found, _ = verify(environment, 2)
    assert names(found["missing"]) == ["folder/3"]
    assert (found["result"], found["sample"]["equal"], found["new"]) == ("failed", 9, 0)


def let_appear(source: Bucket, key: str, work: Callable[[], object]) -> None:
    """Puts an object, hides it by a delete marker while `work` is done, and takes that away again."""
    versioning = {"Status": "Enabled"}
    source.client.put_bucket_versioning(Bucket=source.name, VersioningConfiguration=versioning)
    put_before(source, {key: b"b"})
    marker = source.client.delete_object(Bucket=source.name, Key=key)["VersionId"]
    work()
    source.client.delete_object(Bucket=source.name, Key=key, VersionId=marker)


@pytest.mark.long
def test_an_object_that_appears_with_an_older_time_may_be_a_loss_where_no_manifest_tells(
    environment: dict[str, str], source: Bucket
) -> None:
    run_backup(environment).expect(1)
    source.put({"a": b"a"})
    let_appear(source, "hidden", lambda: make_old_archive(environment, source, "a"))
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
    modified = source.client.head_object(Bucket=source.name, Key=key)["LastModified"]
    import_archive(environment, {f"{environment['DATA_DIR']}/source/{key}": (content, modified)})


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("limit", "exit_code", "told"),
    [("900", 143, "stopped by SIGTERM"), ("6", 2, "NoAnswer")],
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


# ----------------------------------------------------------------------------------- Archives with a manifest


@dataclass
class Made:
    """An archive with a manifest, made by hand: what it is to hold of the source, and to say about that."""

    environment: dict[str, str]
    source: Bucket
    contents: dict[str, bytes]  # by key
    lines: dict[str, dict[str, Any]]  # of the manifest
    odd: set[str]  # keys whose content lies apart
    as_of: datetime

    def store(self) -> None:
        """Makes it, in a repository that is there already."""
        entries = {}
        for key, content in self.contents.items():
            path = f"{self.environment['DATA_DIR']}/source/{key}"
            if key in self.odd:
                path = odd_path(key)
            entries[path] = (content, datetime.fromisoformat(self.lines[key]["modified"]))
        manifest = "".join(f"{json.dumps(self.lines[key])}\n" for key in sorted(self.lines))
        entries[MANIFEST_PATH] = (manifest.encode(), self.as_of)
        comment = f"s3borgbackup: source as of {self.as_of:%Y-%m-%dT%H:%M:%SZ}, with manifest"
        import_archive(self.environment, entries, comment)


@pytest.fixture
def made(environment: dict[str, str], source: Bucket) -> Made:
    """Of a source that has what is not simple all that there is, ready to be stored."""
    run_backup(environment).expect(1)
    client, name = source.client, source.name
    source.put({"a": b"hidden by a/b", "a/b": b"b", "plain": b"plain", "empty": b"", "folder/": b""})
    headers = {"ContentType": "text/html", "CacheControl": "max-age=60", "Metadata": {"colour": "blue"}}
    client.put_object(Bucket=name, Key="page", Body=b"<p>", Tagging="team=web", **headers)
    config = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    large = os.urandom(11_000_000)
    client.upload_fileobj(io.BytesIO(large), name, "large", Config=config)
    lines = {}
    for entry in client.list_objects_v2(Bucket=name)["Contents"]:
        key, modified = entry["Key"], entry["LastModified"].isoformat()
        head = client.head_object(Bucket=name, Key=key)["ResponseMetadata"]["HTTPHeaders"]
        kept = {
            header: text
            for header, text in head.items()
            if header in ("content-type", "cache-control") or header.startswith("x-amz-meta-")
        }
        etag = entry["ETag"].strip('"')
        lines[key] = {"key": key, "size": entry["Size"], "modified": modified, "etag": etag, "headers": kept}
    lines["page"]["tags"] = {"team": "web"}
    assert len(lines) == 7
    assert (
        lines["page"]["headers"].items() >= {"content-type": "text/html", "x-amz-meta-colour": "blue"}.items()
    )
    assert "-" in lines["large"]["etag"]
    contents = {**source.contents(), "folder/": b""}
    time.sleep(backup.RACE_SECONDS + 1)
    return Made(environment, source, contents, lines, {"a"}, datetime.now(UTC))


def test_an_archive_equals_the_source_with_all_keys_and_headers(made: Made) -> None:
    run_backup(made.environment).expect(0)
    for sample in ("all", "60"):
        found, _ = verify(made.environment, 0, "--sample", sample)
        assert (found["archived"], found["listed"], found["new"]) == (7, 7, 0)
        assert (found["sample"]["sampled"], found["sample"]["equal"]) == (6, 6), "all but the folder"
        for kind in ("missing", "unarchivable", "changed", "deleted", "appeared"):
            assert found[kind]["count"] == 0
        assert found["sample"]["headers_changed"]["count"] == 0


@pytest.mark.long
def test_what_the_manifest_names_and_the_archive_lacks_is_a_failure(made: Made) -> None:
    """Of an empty object the manifest says all that there is."""
    del made.contents["a"], made.contents["plain"], made.contents["folder/"]
    made.store()
    found, _ = verify(made.environment, 2)
    assert names(found["missing"]) == ["a", "plain"]
    assert (found["archived"], found["new"], found["appeared"]["count"]) == (5, 0, 0)


@pytest.mark.long
def test_what_a_mount_could_not_read_is_found_apart(made: Made) -> None:
    """Also where borg has stored a part of it before."""
    made.odd.add("plain")
    made.store()
    assert verify(made.environment, 0)[0]["sample"]["equal"] == 6


@pytest.mark.long
def test_the_manifest_tells_what_appeared_later_with_an_older_time(made: Made) -> None:

    def store() -> None:
        made.as_of = datetime.now(UTC)
        made.store()

    let_appear(made.source, "hidden", store)
    made.source.put({"new": b"new"})
    found, _ = verify(made.environment, 0)
    assert (names(found["appeared"]), found["missing"]["count"], found["new"]) == (["hidden"], 0, 1)


@pytest.mark.long
def test_the_etag_tells_what_has_changed_and_what_was_only_written_again(made: Made) -> None:
    """With the same size and in the same second, and with another time."""
    made.lines["plain"]["etag"] = "0" * 32
    made.lines["large"]["etag"] = ""  # then the time counts
    made.store()
    time.sleep(1)
    made.source.put({"a/b": b"b", "empty": b"longer"})
    found, _ = verify(made.environment, 0)
    assert names(found["changed"]) == ["empty", "plain"]
    assert (found["sample"]["equal"], found["sample"]["extracted"]) == (4, 2)


@pytest.mark.long
def test_headers_and_tags_are_compared(made: Made) -> None:
    """Other ones since are normal, under the same time no next backup would notice."""
    made.lines["plain"]["headers"]["content-type"] = "text/plain"
    made.store()
    client, name = made.source.client, made.source.name
    client.put_object_tagging(Bucket=name, Key="page", Tagging={"TagSet": [{"Key": "team", "Value": "x"}]})
    time.sleep(1)
    client.put_object(Bucket=name, Key="a/b", Body=b"b", ContentType="text/css", CacheControl="no-cache")
    as_writer = {
        "SOURCE_ACCESS_KEY_ID": WRITER.access_key_id,
        "SOURCE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
    }
    found, _ = verify({**made.environment, **as_writer}, 1)
    headers = {entry["key"]: entry["reason"] for entry in found["sample"]["headers_changed"]["objects"]}
    assert headers == {"page": "tags", "plain": "content-type"}
    [changed] = found["changed"]["objects"]
    assert changed == {
        "key": "a/b",
        "reason": "its content is the same, but not: cache-control, content-type",
    }
    assert found["sample"]["equal"] == 6


@pytest.mark.long
def test_content_that_differs_under_the_same_etag_is_a_failure(made: Made) -> None:
    large = bytearray(made.contents["large"])
    large[7_000_000] ^= 1
    made.contents |= {"large": bytes(large), "a": b"hidden by a-b"}
    made.store()
    found, _ = verify(made.environment, 2)
    assert names(found["sample"]["differing"]) == ["a", "large"]
    reasons = [entry["reason"] for entry in found["sample"]["differing"]["objects"]]
    assert sorted(reasons) == [f"its content differs from byte {place} on" for place in ("11", "7,000,000")]


@pytest.mark.long
def test_a_damaged_manifest_is_told(made: Made) -> None:
    made.lines["plain"] = {"key": "plain"}
    made.contents.pop("plain")
    made.store()
    error = verify(made.environment, 2)[0]["error"]
    assert f"the manifest of {NEWEST} cannot be read" in error


@pytest.mark.long
def test_where_there_is_no_archive_it_says_so(environment: dict[str, str], source: Bucket) -> None:
    source.put({"a": b"a"})
    assert "holds no repository yet" in verify(environment, 2)[0]["error"]
    run_backup(environment).expect(0)
    assert "no archive 'b*'" in verify(environment, 2, "--archive", "b*")[0]["error"]
    other = {**environment, "BACKUP_LABEL": "other"}
    assert "no archive of BACKUP_LABEL 'other'" in verify(other, 2)[0]["error"]
    elsewhere = {**environment, "DATA_DIR": f"{environment['DATA_DIR']}/elsewhere"}
    assert verify(elsewhere, 0)[0]["archived"] == 1, "wherever the source was mounted then"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sample", "some"], "write a number of objects, a share such as 1%, or all"),
        (["--seed", "x"], "--seed"),
        (["--samples", "1"], "unrecognized arguments: --samples"),
    ],
)
def test_wrong_options_are_told(options: list[str], told: str, new_environment: Callable[..., Any]) -> None:
    result = run_backup(new_environment(), "verify", "first", *options).expect(78)
    assert told in result.output


@pytest.fixture
def new_environment(server: SeaweedFS, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """A configuration that nothing is done with."""
    return lambda: settings(server, tmp_path, "no-source", {"first": "no-target"})
