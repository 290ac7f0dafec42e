"""SHARD: each key is in exactly one part of the source, and all parts together hold every key."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from faults.proxy import FaultProxy
from helpers import UNUSUAL_KEYS, Backup, Bucket, Repository, Result, run_backup, settings
from servers import Moto, SeaweedFS, Server
from test_config import FIRST, FIRST_SECRETS, environ, mistakes_of, with_target

ODD_KEYS = (
    *("x//y", "x/y", "//x", "/", "//", "/lead", "lead", "a", "a/", "a/b", "a/b/", "a/b/c", "a//b", "a-b"),
    *("./z", "../up", "trail/", "\x01", "a\x02b/c", "dark/\x02", "+/%2f", "100%/a b", "é/ü/x", "k" * 1024),
    *("deep/er/still/more/and/more/and/more/and/more", "deep/er", "deep/er/", "a/b/c/d"),
)
NO_UTF8 = "no UTF-8 \udcff/x"


def parts(count: int, depth: int = 1) -> list[backup.Shard]:
    return [backup.Shard.parse(f"{number}/{count}/{depth}") for number in range(1, count + 1)]


def folder_of(shard: backup.Shard, key: str) -> str:
    """The folder that decides: "" or with a slash at the end."""
    return "".join(f"{part}/" for part in key.split("/")[:-1][: shard.depth])


def has(shard: backup.Shard, key: str) -> bool:
    """Whether a key belongs to a part, by the definition."""
    return shard.has_folder(folder_of(shard, key))


def owner(key: str, count: int) -> int:
    """The number of the part that a key belongs to."""
    (number,) = [each.number for each in parts(count) if has(each, key)]
    return number


# -------------------------------------------------------------------------------------------------- The parts


@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 2, 16, 1000])
def test_each_key_is_in_exactly_one_part(count: int, depth: int) -> None:
    shards = parts(count, depth)
    for key in (*ODD_KEYS, *UNUSUAL_KEYS, NO_UTF8):
        assert sum(has(each, key) for each in shards) == 1, key


@pytest.mark.parametrize(
    ("key", "folders"),
    [
        ("a", ("", "")),
        ("a/", ("a/", "a/")),
        ("a/b", ("a/", "a/")),
        ("a/b/", ("a/", "a/b/")),
        ("a/b/c", ("a/", "a/b/")),
        ("a/b/c/d", ("a/", "a/b/")),
        ("/lead", ("/", "/")),
        ("//x", ("/", "//")),
        ("x//y", ("x/", "x//")),
        (NO_UTF8, ("no UTF-8 \udcff/",) * 2),
    ],
)
def test_the_folder_decides_and_its_part_never_changes(key: str, folders: tuple[str, str]) -> None:
    """Another rule in another version would have each object archived anew, in another repository."""
    for depth, folder in enumerate(folders, 1):
        number = int(hashlib.md5(folder.encode(errors="surrogateescape")).hexdigest(), 16) % 16 or 16
        assert [each.number for each in parts(16, depth) if has(each, key)] == [number]


def test_a_completion_index_serves_as_it_is() -> None:
    assert [backup.Shard.parse(f"{index}/16").padded for index in (0, 3, 15)] == ["16", "03", "15"]
    assert backup.Shard.parse("0/16") == backup.Shard.parse("16/16/1")


# ------------------------------------------------------------------------------------------ The configuration

WITH = "backups:all/{shard}"
MISTAKES = {
    "no {shard}": (with_target() | {"SHARD": "3/16"}, ['"first"."path"', "such as backups:first/{shard}"]),
    "a whole bucket": (with_target(path="b") | {"SHARD": "3/16"}, ['"first"."path"', "such as b:{shard}"]),
    "no SHARD": (with_target(path=WITH), ['"first"."path"', "SHARD is not set"]),
    **{
        repr(text): (with_target(path=WITH) | {"SHARD": text}, ["SHARD", "such as 3/16"])
        for text in ("3", "17/16", "0/0", "-1/16", "3/16/0", "3/16/9", "3/16/", "a/b", "$(JOB_INDEX)/16")
    },
}


@pytest.mark.parametrize(("environment", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_its_place_and_what_to_write(environment: dict[str, str], words: list[str]) -> None:
    (mistake,) = mistakes_of(environment)
    assert [word for word in words if word not in mistake] == []


def test_all_targets_are_told_of_together() -> None:
    targets = {name: {**FIRST, "path": f"backups:{name}"} for name in ("one", "two")}
    secrets = dict.fromkeys(targets, FIRST_SECRETS)
    values = environ(TARGETS=json.dumps(targets), TARGET_SECRETS=json.dumps(secrets), SHARD="1/2")
    assert [mistake.partition(":")[0] for mistake in mistakes_of(values)] == [
        'TARGETS "one"."path"', 'TARGETS "two"."path"',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shard", "path", "bucket", "prefix"),
    [
        ("3/16", WITH, "backups", "all/03"),
        ("0/16", WITH, "backups", "all/16"),
        ("7/9", "b-{shard}", "b-7", ""),
    ],
)
def test_each_part_has_a_place_of_its_own(shard: str, path: str, bucket: str, prefix: str) -> None:
    (target,) = backup.Configuration(with_target(path=path) | {"SHARD": shard}).settings().targets
    assert (target.store.bucket, target.store.prefix) == (bucket, prefix)


# ------------------------------------------------------------------------------------------------ The listing


Listing = Callable[..., list[backup.S3Object]]


def lister(server: Server, bucket: Bucket, prefix: str, endpoint: str = "") -> Listing:
    """Lists a part, or all without one, as a run does."""
    key = server.reader.access_key_id, server.reader.secret_access_key
    store = backup.Store(None, endpoint or server.endpoint, bucket.name, prefix, *key)

    def objects(shard: backup.Shard | None = None) -> list[backup.S3Object]:
        console = SimpleNamespace(progress=lambda *_: None)
        runtime = SimpleNamespace(settings=SimpleNamespace(shard=shard), console=console)
        return list(backup.objects_of(runtime, backup.S3Client(store)))

    return objects


def keys_of(listing: Iterable[backup.S3Object]) -> list[str]:
    """The keys of objects, sorted."""
    return sorted(each.key for each in listing if each.size_bytes >= 0)


def shown(listing: Iterable[backup.S3Object], folder: Path) -> dict[str, bool]:
    """Whether a mount shows it, by key, as the catalog has it."""
    with contextlib.closing(backup.Catalog(folder / "catalog")) as catalog:
        catalog.add(listing)
        catalog.hide([])
        return {each.key: each.is_shown for each in catalog.rows()}


@pytest.fixture(scope="module")
def odd_bucket(moto: Moto) -> Bucket:
    """Odd keys at the top, and below a prefix with others beside it."""
    bucket = Bucket(moto, "shards-odd").create()
    bucket.put(dict.fromkeys([*ODD_KEYS, *(f"p/{key}" for key in ODD_KEYS[:-4]), "p", "p-", "p0"], b"1"))
    return bucket


@pytest.mark.parametrize("prefix", ["", "p"])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_the_parts_lists_are_the_whole_list_and_share_nothing(
    moto: Moto, odd_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, prefix: str, count: int, depth: int
) -> None:
    """Also where a listing has many pages."""
    list_page = backup.S3Client.list_page
    monkeypatch.setattr(backup.S3Client, "list_page", functools.partialmethod(list_page, limit=3))
    objects = lister(moto, odd_bucket, prefix)
    lists = [keys_of(objects(shard)) for shard in parts(count, depth)]
    assert sorted(key for each in lists for key in each) == keys_of(objects())
    assert sum(map(len, lists)) >= len(ODD_KEYS) - 4
    for shard, each in zip(parts(count, depth), lists, strict=True):
        assert [key for key in each if not has(shard, key)] == []


@pytest.mark.parametrize("depth", [1, 2])
def test_a_part_knows_what_folders_of_other_parts_hide(
    moto: Moto, odd_bucket: Bucket, tmp_path: Path, depth: int
) -> None:
    """The mount shows them all: `a` beside `a/b` is to be fetched, whosever `a/b` is."""
    objects, together = lister(moto, odd_bucket, ""), dict[str, bool]()
    for shard in parts(5, depth):
        together |= shown(objects(shard), tmp_path)
    assert together == shown(objects(), tmp_path)
    assert not together["a"]


def listed(proxy: FaultProxy) -> list[tuple[str, bool]]:
    """Prefix of each LIST request, and whether folders are one entry in it."""
    return [
        (each.query["prefix"], "delimiter" in each.query) for each, _ in proxy.requests if each.kind == "LIST"
    ]


def test_a_part_lists_its_own_folders_and_those_above(server: SeaweedFS, source: Bucket) -> None:
    source.put(
        {f"p/{one}/{two}/x/y": b"1" for one in "ab" for two in "cdef"} | {"p/top": b"1", "other/z": b"1"}
    )
    for depth, above in ((1, ["p/"]), (2, ["p/", "p/a/", "p/b/"])):
        for shard in parts(3, depth):
            with FaultProxy(server.endpoint) as proxy:
                found = keys_of(lister(server, source, "p", proxy.endpoint)(shard))
                requests = listed(proxy)
            keys = [key.removeprefix("p/") for key in source.sizes("p/")]
            own = {folder_of(shard, key) for key in keys if has(shard, key)}
            own = sorted(f"p/{folder}" for folder in own if folder.count("/") == depth)
            assert found == sorted(key for key in keys if has(shard, key))
            assert requests[0] == ("p/", True)
            assert sorted(prefix for prefix, has_delimiter in requests if has_delimiter) == above
            assert [prefix for prefix, has_delimiter in requests if not has_delimiter] == own


# ------------------------------------------------------------------------------------------------------- Runs

FOLDERS = [f"folder {number}" for number in range(6)]
CONTENTS = {f"{folder}/{name}": f"{folder} {name}".encode() for folder in FOLDERS for name in ("x", "y/z")}
CONTENTS |= {"plain": b"at the top", FOLDERS[0]: b"beside a folder", FOLDERS[3]: b"another", "x//y": b"odd"}
COUNT = 3


def environment(
    server: Server, folder: Path, source: Bucket, target: Bucket, shard: str, **variables: str
) -> dict[str, str]:
    """Of one pod: all share /cache, as with one claim."""
    path = f"{target.name}:{{shard}}" if shard else f"{target.name}:1"
    values = settings(server, folder / shard.replace("/", "-"), source.name, {"first": path}, **variables)
    (folder / "cache").mkdir(exist_ok=True)
    return {**values, "XDG_CACHE_HOME": str(folder / "cache"), "SHARD": shard}


def archived(target: Bucket, folder: Path, number: int, count: int = COUNT) -> dict[str, bytes]:
    """What the newest archive of a part holds."""
    repository = Repository.download(target, folder / f"copy-{number}", prefix=str(number))
    data = folder / f"{number}-{count}" / "data" / "source"
    return repository.contents(repository.archives()[-1], data, folder / f"extracted-{number}")


def run_all(environments: list[dict[str, str]]) -> list[Result]:
    """Side by side, each to its end."""
    pods = [Backup(each) for each in environments]
    try:
        return [pod.wait() for pod in pods]
    finally:
        for pod in pods:
            pod.close()


@pytest.mark.usefixtures("needs_fuse")
def test_all_parts_together_hold_every_key_and_a_verification_proves_it(
    moto: Moto, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    source, target = (new_bucket(name, on=moto) for name in ("source", "target"))
    source.put(CONTENTS)
    pods = [
        environment(moto, tmp_path, source, target, f"{number}/{COUNT}") for number in range(1, COUNT + 1)
    ]
    results = [result.expect(0) for result in run_all(pods)]
    found: dict[str, bytes] = {}
    for number, result in enumerate(results, 1):
        part = archived(target, tmp_path, number)
        assert part == {key: body for key, body in CONTENTS.items() if owner(key, COUNT) == number}
        assert f"part {number} of {COUNT}: lists {len(part)} object" in result.output
        assert f"this is part {number} of {COUNT}" in result.lines
        found |= part
    assert found == CONTENTS
    assert len(list((tmp_path / "cache" / "s3borgbackup").glob("*.catalog"))) == COUNT

    verified = run_backup(pods[0], "verify", "first", "--all-shards", "--sample", "all").expect(0)
    assert re.findall(r"of first, part (\d) of 3: the source", verified.output) == ["1", "2", "3"]
    assert "all 3 parts are right" in verified.output

    # A key that came later is counted, by its own part; without an archive of a part there is no proof.
    source.put({"late/x": b"1"})
    (name,) = Repository(tmp_path / "copy-2").archives()
    run_backup(pods[1], "borg", "first", "delete", f"::{name}").expect(0)
    failed = run_backup(
        {**pods[2], "LOG_FORMAT": "json"}, "verify", "first", "--all-shards", "--json"
    ).expect(2)
    assert "of 3 parts, these are not all right: 2" in failed.output
    told = [each for line in failed.lines if "shard" in (each := json.loads(line))]
    assert [each["shard"] for each in told] == ["1/3/1", "2/3/1", "3/3/1"]
    assert [each["result"] for each in told] == ["ok", "failed", "ok"]
    assert [each["new"] for each in told] == [owner("late/x", COUNT) == number for number in (1, 2, 3)]


@pytest.mark.usefixtures("needs_fuse")
def test_a_part_without_objects_is_no_warning_until_it_is_emptied(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    key = next(key for key in CONTENTS if owner(key, 2) == 1)
    other = next(key for key in CONTENTS if owner(key, 2) == 2)
    source.put({key: b"1"})
    metrics = tmp_path / "metrics.prom"
    pod = environment(server, tmp_path, source, target, "2/2") | {"METRICS_FILE": str(metrics)}
    for _ in range(2):
        run_backup(pod).expect(0)
    labels = 'label="backup",shard="2/2/1",target="first"'  # other parts' files lie beside it
    assert f"s3borgbackup_last_archive_objects{{{labels}}} 0\n" in metrics.read_text()
    source.put({other: b"2"})
    run_backup(pod).expect(0)
    assert archived(target, tmp_path, 2, 2) == {other: b"2"}
    source.delete(other)
    emptied = run_backup(pod).expect(1)
    assert "the archive has 0 objects, the one before it 1: is part 2 of 2 of" in emptied.output
    run_backup(pod).expect(0)
    source.clear()
    assert "lists no objects" in run_backup(pod).expect(1).output


@pytest.mark.usefixtures("needs_fuse")
def test_keys_of_other_parts_that_spoil_the_mounts_listing_cost_nothing(
    moto: Moto, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """No XML holds them, and the mount shows all parts."""
    source, target = (new_bucket(name, on=moto) for name in ("source", "target"))
    own = next(each for each in FOLDERS if owner(f"{each}/", 2) == 1)
    bad = next(f"{own}{number}/\x02" for number in range(9) if owner(f"{own}{number}/", 2) == 2)
    first = next(f"{number}/\x01" for number in range(9) if owner(f"{number}/", 2) == 2)
    source.put({f"{own}/x": b"1", f"{own}/y/z": b"2", "top": b"3"})
    expected = {key: source.get(key) for key in source.sizes() if owner(key, 2) == 1}
    pod = environment(moto, tmp_path, source, target, "1/2")
    source.put({bad: b"4"})
    run_backup(pod).expect(0)
    assert archived(target, tmp_path, 1, 2) == expected
    source.put({first: b"5", f"{own}/new": b"6"})
    run_backup(pod).expect(0)


# ---------------------------------------------------------------------------------------- One part, one place


@pytest.mark.usefixtures("needs_fuse")
def test_a_repository_is_for_one_part_and_says_so(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put(CONTENTS)
    with FaultProxy(server.endpoint) as proxy:
        env = {**environment(server, tmp_path, source, target, "1/2"), "SOURCE_ENDPOINT": proxy.endpoint}
        run_backup(env).expect(0)
        assert "1/.s3borgbackup-shard-1-2-1" in target.sizes()
        listed_before = len(listed(proxy))
        for shard, words in (("1/3", "here SHARD=1/3/1"), ("1/2/2", "here SHARD=1/2/2")):
            refused = run_backup({**env, "SHARD": shard}).expect(2)
            line = next(line for line in refused.lines if "the repository at" in line)
            assert f"target-first: the repository at {target.name}:1 is for SHARD=1/2/1, and {words}" in line
            assert 'point TARGETS "first"."path" at an empty place' in line
        whole = {**environment(server, tmp_path, source, target, ""), "SOURCE_ENDPOINT": proxy.endpoint}
        assert "is for SHARD=1/2/1, and here SHARD is not set" in run_backup(whole).expect(2).output
        # Each was refused with the first page, before the source was listed.
        assert len(listed(proxy)) == listed_before + 3
    other = {**env, "SHARD": "1/3", "SOURCE_ENDPOINT": server.endpoint}
    for command in (["verify", "first"], ["check-config"]):
        assert "is for SHARD=1/2/1" in run_backup(other, *command).expect(2).output
    # What reads is not refused, nor is the part itself.
    run_backup(other, "list", "first").expect(0)
    run_backup(other, "restore", "first", "--to", str(tmp_path / "restored")).expect(0)
    run_backup(environment(server, tmp_path, source, target, "1/2")).expect(0)


@pytest.mark.usefixtures("needs_fuse")
def test_a_repository_of_a_whole_source_takes_no_part(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put({"a/b": b"1"})
    run_backup(environment(server, tmp_path, source, target, "")).expect(0)
    assert not [key for key in target.sizes() if "shard" in key]
    refused = run_backup(environment(server, tmp_path, source, target, "1/2")).expect(2)
    assert "is for a whole source (without SHARD), and here SHARD=1/2/1" in refused.output


def test_all_shards_needs_to_know_how_many(
    tmp_path: Path, server: SeaweedFS, source: Bucket, target: Bucket
) -> None:
    done = run_backup(environment(server, tmp_path, source, target, ""), "verify", "first", "--all-shards")
    assert "`--all-shards`: SHARD is not set" in done.expect(78).output
