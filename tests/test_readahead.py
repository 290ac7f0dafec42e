"""Reading ahead: the source's bytes are fetched once and side by side, and the archives are the same."""

import contextlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import backup
from faults.proof import newest_contents
from faults.proxy import Action, FaultProxy, Request
from helpers import (
    Backup,
    Bucket,
    Repository,
    Result,
    run_backup,
    sample_objects,
    settings,
    wait_until,
)
from servers import SeaweedFS

MEBIBYTE = 1024 * 1024
# S3's times are in whole seconds; what is older than this when a run begins cannot get the same time again.
SETTLED_SECONDS = 4
DELAY_SECONDS = 0.5

# -------------------------------------------------------------------------------------------- Without a mount


def test_the_position_in_an_open_file_is_the_kernels(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with path.open("rb", buffering=0) as stream:
        assert backup.file_position(os.getpid(), str(path)) == 0
        stream.read(70)
        assert backup.file_position(os.getpid(), str(path)) == 70
        assert backup.file_position(os.getpid(), f"{path}s") == 0
    assert backup.file_position(os.getpid(), str(path)) == 0
    assert backup.file_position(2**22 + 1, str(path)) == 0, "no such process"


def state(child: backup.Child) -> str:
    """The letter of a process's state, proc(5): T for one that was stopped."""
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]


def settings_with(threads: int, stall_seconds: int) -> SimpleNamespace:
    """What reading ahead asks of a configuration."""
    return SimpleNamespace(
        targets=[1], parallel_targets=1, read_ahead_threads=threads, stall_seconds=stall_seconds
    )


Readers = Callable[..., tuple[backup.ReadAhead, list[backup.Reader]]]


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[Readers]:
    """Reads files of these sizes in MiB ahead for two readers that are processes; the window has 16 MiB."""
    started: list[backup.Child] = []
    made: list[backup.ReadAhead] = []

    def make(sizes: Sequence[int], stall_seconds: int = 900, threads: int = 2) -> Any:
        settings = settings_with(threads, stall_seconds)
        items = []
        for number, size in enumerate(sizes, 1):
            path = tmp_path / f"{number}"
            with path.open("wb") as file:
                file.truncate(size * MEBIBYTE)
            items.append(backup.Upcoming(str(path), size * MEBIBYTE))
        both = [backup.Reader(), backup.Reader()]
        made.append(backup.ReadAhead(SimpleNamespace(settings=settings, memory_mb=300), items, both))
        for reader in both:
            words = [sys.executable, "-c", READ_A_FILE, str(tmp_path / "1"), str(tmp_path / "go")]
            started.append(backup.Child(words, os.environ, print, print))
            made[0].began(reader, -math.inf, started[-1])
        return made[0], both

    yield make
    for ahead in made:
        ahead.close()
    for child in started:
        child.kill()


# It reads a file to as many MiB as the name of a file `go…` says, when that is there.
READ_A_FILE = """
import glob, sys, time
file, read = open(sys.argv[1], "rb", buffering=0), 0
while True:
    for path in glob.glob(sys.argv[2] + "*"):
        while read < int(path.removeprefix(sys.argv[2])):
            file.read(1024 * 1024)
            read += 1
    time.sleep(0.01)
"""


def is_told(ahead: backup.ReadAhead, reader: backup.Reader, number: int, seconds: float = 1) -> bool:
    """Whether a reader may be told of the object with this number within that time."""
    thread = threading.Thread(target=ahead.wait_until_near, args=(reader, number), daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_who_is_ahead_is_told_of_no_more_than_the_window_has(readers: Readers) -> None:
    """And is not stopped: it waits, until the other has come nearer."""
    ahead, (fast, slow) = readers([1] * 40)
    assert is_told(ahead, fast, 16, 10)
    ahead.done(fast, 16)
    assert not is_told(ahead, fast, 17)
    assert state(fast.child) == "S"
    ahead.done(slow, 4)
    assert is_told(ahead, fast, 20, 10)
    assert not is_told(ahead, fast, 21)


def test_who_is_busy_does_not_wait_for_others(readers: Readers) -> None:
    """Though it is ahead of them: what it waits for is itself, and nobody is left behind for that."""
    ahead, (fast, slow) = readers([1] * 40)
    ahead.done(fast, 3)
    assert not is_told(ahead, fast, 17)
    assert not fast.is_ahead
    ahead.done(fast, 16)
    wait_until(lambda: fast.is_ahead, 5, "it waits")
    ahead.done(slow, 16)
    wait_until(lambda: not fast.is_ahead, 5, "it goes on")


def test_who_is_ahead_within_an_object_larger_than_the_window_is_stopped_until_the_other_comes_nearer(
    readers: Readers, tmp_path: Path
) -> None:
    """At three quarters of the window, until a half; the second reader is at the file's beginning."""
    ahead, (fast, slow) = readers([40, 1])
    os.kill(slow.child.pid, signal.SIGSTOP)
    (tmp_path / "go11").touch()
    time.sleep(10 * backup.WATCH_SECONDS)
    assert state(fast.child) != "T"
    (tmp_path / "go11").rename(tmp_path / "go13")
    wait_until(lambda: state(fast.child) == "T", 10, "it is held")
    ahead.done(slow, 0, 3 * MEBIBYTE)
    time.sleep(10 * backup.WATCH_SECONDS)
    assert state(fast.child) == "T"
    ahead.done(slow, 0, 6 * MEBIBYTE)
    wait_until(lambda: state(fast.child) != "T", 10, "it goes on")


@pytest.mark.parametrize("worked_seconds", [0, 10_000])
def test_who_does_not_move_is_left_behind(readers: Readers, worked_seconds: int) -> None:
    """After a third of STALL_TIMEOUT; the other waits no more, and what it reads is read ahead."""
    ahead, (fast, slow) = readers([1] * 40, stall_seconds=6)
    for reader in (fast, slow):
        reader.began -= worked_seconds
    ahead.done(fast, 16)
    assert is_told(ahead, fast, 17, 10)
    assert ahead.is_left(slow)
    assert not ahead.is_left(fast)
    for number in range(17, 41):
        assert is_told(ahead, fast, number, 10)
        ahead.done(fast, number)
    assert is_told(ahead, slow, 40), "it goes on by itself"


def test_without_threads_nobody_is_held_back(readers: Readers) -> None:
    ahead, (fast, _) = readers([1] * 40, threads=0)
    assert is_told(ahead, fast, 40, 10)


def test_when_the_objects_cannot_be_listed_to_their_end_nobody_waits_for_ever(readers: Readers) -> None:
    def items() -> Iterator[backup.Upcoming]:
        yield backup.Upcoming("/dev/null", 0)
        raise ValueError("this is not caught")

    settings = settings_with(threads=2, stall_seconds=900)
    reader = backup.Reader()
    ahead = backup.ReadAhead(SimpleNamespace(settings=settings, memory_mb=300), items(), [reader])
    ahead.began(reader, -math.inf, SimpleNamespace(is_held=lambda _: False, let_go=lambda _: None))
    assert is_told(ahead, reader, 1000, 10)
    assert not ahead.wait_until_passed(1000)


@pytest.mark.parametrize(
    ("memory_mb", "window_mib", "piece_mib"),
    [(256, 12, 1.5), (300, 16, 2), (400, 25, 3.125), (1024, 64, 8), (4000, 250, 8), (100_000, 250, 8)],
)
def test_what_is_read_ahead_fits_in_a_quarter_of_the_cache(
    memory_mb: int, window_mib: float, piece_mib: float
) -> None:
    plan = backup.MemoryPlan(settings_with(threads=2, stall_seconds=900), memory_mb)
    assert plan.window_bytes == window_mib * MEBIBYTE
    assert 4 * plan.window_bytes <= plan.source_cache_mb * MEBIBYTE
    assert plan.piece_bytes == piece_mib * MEBIBYTE


def test_the_names_of_key_types_are_borgs_own() -> None:
    """They come from borg's security folder, in place of a `borg list` in each run."""
    script = (
        "from borg.crypto.key import AVAILABLE_KEY_TYPES as types\nfor t in types: print(t.TYPE, t.ARG_NAME)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    named = dict(line.split() for line in printed.splitlines())
    assert {number: named.get(number) for number in backup.KEY_TYPES} == backup.KEY_TYPES


# ----------------------------------------------------------------------------------------------- What is read


@pytest.fixture
def proxy(server: SeaweedFS, needs_fuse: None) -> Iterator[FaultProxy]:
    """Stands before the source."""
    with FaultProxy(server.endpoint) as running:
        yield running


Make = Callable[..., dict[str, str]]


@pytest.fixture
def environment(server: SeaweedFS, proxy: FaultProxy, source: Bucket, target: Bucket, tmp_path: Path) -> Make:
    """For runs with the source behind the proxy and the target `first`; more targets by name and bucket."""

    def make(more: Mapping[str, Bucket] | None = None, **variables: str) -> dict[str, str]:
        targets = {"first": target.name, **{name: bucket.name for name, bucket in (more or {}).items()}}
        endpoint = {"SOURCE_ENDPOINT": proxy.endpoint}
        return settings(server, tmp_path, source.name, targets, **endpoint, **variables)

    return make


def is_read(request: Request) -> bool:
    """Whether an object's content is fetched, by TigrisFS or by us; the preflight looks at one byte."""
    is_ours = request.headers.get("range", "bytes=0-0") != "bytes=0-0"
    return request.kind == "GET" and (is_ours or "user-agent" in request.headers)


def reads(proxy: FaultProxy) -> list[Request]:
    """All of them up to now."""
    return [request for request, _ in proxy.requests if is_read(request)]


def read_keys(proxy: FaultProxy, already: int = 0) -> set[str]:
    """The objects that were read, but for the first `already` requests."""
    return {request.key for request in reads(proxy)[already:]}


def fetched_bytes(request: Request, size: int) -> range:
    """Which bytes of an object of this size a request is for."""
    first, _, last = request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
    return range(int(first), min(int(last) + 1 if last else size, size))


def assert_each_byte_was_read_once(read: Sequence[Request], objects: Mapping[str, bytes]) -> None:
    """Neither left out nor read twice."""
    ranges: dict[str, list[range]] = {key: [] for key, body in objects.items() if len(body) > 1}
    for request in read:
        ranges[request.key].append(fetched_bytes(request, len(objects[request.key])))
    for key, found in ranges.items():
        ordered = sorted((part.start, part.stop) for part in found)
        ends = [0, *(stop for _, stop in ordered)]
        assert [start for start, _ in ordered] == ends[:-1], f"{key}: {ordered}"
        assert ends[-1] == len(objects[key]), f"{key}: {ordered}"


def most_at_a_time(read: Sequence[Request]) -> int:
    """How many reads began within DELAY_SECONDS at most: each takes at least so long."""
    times = [request.when for request in read]
    return max(sum(start <= time < start + DELAY_SECONDS for time in times) for start in times)


LARGE = {f"large/{number}": bytes([number]) * (11 * MEBIBYTE + number) for number in range(4)}


@pytest.mark.long
@pytest.mark.parametrize("memory_mb", ["256", "2048"])
def test_each_byte_is_fetched_once_whatever_the_memory(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path, memory_mb: str
) -> None:
    """With 256 MB a quarter of what is in the bucket can be ahead, and a large object not as a whole."""
    objects = {**sample_objects(1, 300), **LARGE, "zz/largest": os.urandom(40 * MEBIBYTE)}
    source.put(objects)
    made = environment(MEMORY_LIMIT_MB=memory_mb)
    run_backup(made).expect(0)
    assert_each_byte_was_read_once(reads(proxy), objects)
    assert newest_contents(target, tmp_path, made) == objects


@pytest.mark.long
def test_an_object_larger_than_the_window_is_read_ahead_to_its_end(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy
) -> None:
    """borg names it when it begins to read it; what follows it must not take its place in the window."""
    source.put({"large": os.urandom(48 * MEBIBYTE), "next": b"xy"})
    proxy.add(is_read, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(environment(MEMORY_LIMIT_MB="256")).expect(0)
    late = [request for request in reads(proxy) if fetched_bytes(request, 2**40).start >= 24 * MEBIBYTE]
    assert most_at_a_time(late) > 1


@pytest.mark.long
def test_verify_reads_ahead_within_an_object_that_is_larger_than_the_window(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy
) -> None:
    """To its end, by our own client; the preflight has looked at one byte."""

    def is_piece(request: Request) -> bool:
        return request.kind == "GET" and request.key == "large" and len(fetched_bytes(request, 2**40)) > 1

    objects = {"large": bytes(40 * MEBIBYTE)}
    source.put(objects)
    made = environment(MEMORY_LIMIT_MB="256")
    run_backup(made).expect(0)
    before = len(proxy.requests)
    proxy.add(is_piece, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(made, "verify", "first").expect(0)
    read = [request for request, _ in proxy.requests[before:] if is_piece(request)]
    assert_each_byte_was_read_once(read, objects)
    last = [request for request in read if fetched_bytes(request, 2**40).start >= 20 * MEBIBYTE]
    assert most_at_a_time(last) > 1


@pytest.mark.long
@pytest.mark.parametrize(("threads", "at_once"), [("16", range(8, 100)), ("0", range(1, 3))])
def test_objects_are_read_side_by_side_and_without_threads_one_by_one(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, threads: str, at_once: range
) -> None:
    source.put(
        {f"{number % 3}/{number}": b"x" * (number + 2) for number in range(48 if threads != "0" else 8)}
    )
    proxy.add(is_read, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(environment(READ_AHEAD_THREADS=threads)).expect(0)
    assert most_at_a_time(reads(proxy)) in at_once


def test_where_s3_is_far_away_more_are_read_side_by_side(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy
) -> None:
    source.put({f"{number}": b"xy" for number in range(200)})
    proxy.add(is_read, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(environment()).expect(0)
    assert most_at_a_time(reads(proxy)) > backup.LEAST_THREADS + 20


def is_asked(request: Request) -> bool:
    """Whether TigrisFS looks an object or a folder up."""
    return request.kind in ("LIST", "HEAD") and "user-agent" in request.headers


def test_what_is_unchanged_tigrisfs_is_not_asked_for(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    """It looks into the bucket when it is mounted, and no more than then."""
    source.put({f"{number % 4}/{number}": b"xy" for number in range(2500)})
    source.put({"folder/": b"", "folder/deep/er": b"xy"})
    time.sleep(SETTLED_SECONDS)
    made = environment(HEADERS="off")
    run_backup(made).expect(0)
    asked = []
    for commands in ([["mount", "source"], ["umount", "source"]], [["run"]]):
        before = len(proxy.requests)
        for command in commands:
            run_backup(made, *command).expect(0)
        asked.append(len([request for request, _ in proxy.requests[before:] if is_asked(request)]))
    assert asked[1] <= asked[0]
    assert newest_contents(target, tmp_path, made) == source.contents()


def test_what_borg_does_not_know_is_read_whatever_the_catalog_says(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    """borg gets the catalog's facts about an object first, and its content when it wants to read it."""
    source.put({"known": b"known"})
    time.sleep(SETTLED_SECONDS)
    made = environment()
    run_backup(made).expect(0)
    source.put({"folder/unknown": os.urandom(3_000_000), "empty": b""})
    time.sleep(SETTLED_SECONDS)
    [catalog] = (tmp_path / "cache").rglob("*.catalog")
    with contextlib.closing(sqlite3.connect(catalog, isolation_level=None)) as database:
        database.execute("UPDATE archives SET as_of = ?", [time.time()])
    already = len(reads(proxy))
    assert "warning" not in run_backup(made).expect(0).output
    assert read_keys(proxy, already) == {"folder/unknown"}
    assert newest_contents(target, tmp_path, made) == source.contents()
    already = len(reads(proxy))
    run_backup(made).expect(0)
    assert read_keys(proxy, already) == set(), "borg knows it now"


@pytest.mark.long
def test_of_an_unchanged_bucket_nothing_is_read_and_of_a_changed_one_what_has_changed(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Also the newest objects are not read again, and an overwritten one of the same size is."""
    source.put({**sample_objects(2, 60), "large": LARGE["large/1"]})
    time.sleep(SETTLED_SECONDS)
    made = environment()
    run_backup(made).expect(0)
    first = len(reads(proxy))
    run_backup(made).expect(0)
    assert read_keys(proxy, first) == set()
    changed = {"plain.txt": source.get("plain.txt")[::-1] or b"xy", "new": b"new"}
    source.put(changed)
    run_backup(made).expect(0)
    assert read_keys(proxy, first) == set(changed)
    assert newest_contents(target, tmp_path, made) == source.contents()


def test_what_may_yet_be_overwritten_with_the_same_time_is_read_again(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    """A time of S3 is a second: an object that was written as the run began may change within it."""
    source.put({"old": b"old"})
    time.sleep(SETTLED_SECONDS)
    source.put({"young": b"young"})
    made = environment(READ_AHEAD_THREADS="0")  # so that borg alone decides
    run_backup(made).expect(0)
    first = len(reads(proxy))
    run_backup(made).expect(0)
    assert read_keys(proxy, first) == {"young"}


@pytest.mark.long
def test_without_borgs_cache_all_is_read_again_and_the_run_says_how_to_keep_it(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    objects = {key: body for key, body in sample_objects(4, 30).items() if body}
    source.put(objects)
    time.sleep(SETTLED_SECONDS)
    made = environment()
    assert "--volume" not in run_backup(made).expect(0).output
    (tmp_path / "cache").rename(tmp_path / "lost")
    first = len(reads(proxy))
    result = run_backup(made).expect(0)
    assert [line for line in result.lines if "--volume s3borgbackup-cache:/cache" in line and "first" in line]
    assert read_keys(proxy, first) == set(objects)
    first = len(reads(proxy))
    assert "--volume" not in run_backup(made).expect(0).output
    assert read_keys(proxy, first) == set()


def is_head(request: Request) -> bool:
    """Whether backup.py asks for an object's headers; TigrisFS, unlike it, sends a User-Agent."""
    return request.kind == "HEAD" and "user-agent" not in request.headers


@pytest.mark.long
def test_headers_are_asked_for_side_by_side_once_for_each_new_or_changed_object(
    environment: Make, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], proxy: FaultProxy
) -> None:
    """Whatever borg reads; and for all targets once."""
    keys = {f"{number % 3}/{number}" for number in range(40)}
    source.put(dict.fromkeys(keys, b"xy"))
    time.sleep(SETTLED_SECONDS)

    def heads(made: Mapping[str, str]) -> list[Request]:
        before = len(proxy.requests)
        run_backup(made).expect(0)
        return [request for request, _ in proxy.requests[before:] if is_head(request)]

    assert heads(environment(HEADERS="off")) == []
    delay = proxy.add(is_head, Action.DELAY, seconds=DELAY_SECONDS)
    found = heads(environment())
    assert sorted(request.key for request in found) == sorted(keys)
    assert found[-1].when - found[0].when < len(keys) * DELAY_SECONDS / 4
    proxy.remove(delay)
    assert heads(environment()) == []
    assert heads(environment({"second": new_bucket("target")})) == []
    changed = {"0/0": b"yz", "new": b"xy", "empty": b""}
    source.put(changed)
    time.sleep(SETTLED_SECONDS)
    assert heads(environment(HEADERS="off")) == []
    assert sorted(request.key for request in heads(environment())) == sorted(changed)


def test_tags_that_may_not_be_read_are_told_once_and_all_else_is_archived(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    for number in range(50):
        source.client.put_object(Bucket=source.name, Key=f"{number}", Tagging="a=b", CacheControl="no-store")
    proxy.add(lambda request: "tagging" in request.query and bool(request.key), Action.REFUSE)
    result = run_backup(environment()).expect(0)
    assert len([line for line in result.lines if "tags" in line]) == 1
    assert "AccessDenied (403)" in result.output
    repository = Repository.download(target, tmp_path / "local")
    for entry in repository.manifest(repository.archives()[-1]).values():
        assert entry["headers"]["cache-control"] == "no-store"
        assert "tags" not in entry


# ----------------------------------------------------------------------------------------------- Many targets


def outcomes(result_lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """The second word of each target's row in the summary."""
    return [next(line for line in result_lines if line.split()[:1] == [name]).split()[1] for name in names]


def line_number(result: Result, text: str) -> int:
    """Which line of the output has this."""
    return next(number for number, line in enumerate(result.lines) if text in line)


def test_two_targets_cost_one_read(
    environment: Make,
    source: Bucket,
    target: Bucket,
    new_bucket: Callable[..., Bucket],
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    """Side by side, one of them slower to compress."""
    objects = {**sample_objects(5, 200), **{key: os.urandom(len(body)) for key, body in LARGE.items()}}
    source.put(objects)
    second = new_bucket("target")
    made = environment({"second": second}, MEMORY_LIMIT_MB="1024")
    made["TARGETS"] = made["TARGETS"].replace('"lz4"', '"zlib,6"', 1)
    run_backup(made).expect(0)
    assert_each_byte_was_read_once(reads(proxy), objects)
    for bucket in (target, second):
        assert newest_contents(bucket, tmp_path, made) == objects


@pytest.mark.long
def test_a_new_target_beside_one_that_knows_all_costs_one_read(
    environment: Make,
    source: Bucket,
    target: Bucket,
    new_bucket: Callable[..., Bucket],
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    objects = {key: body for key, body in sample_objects(6, 50).items() if len(body) > 1}
    source.put(objects)
    time.sleep(SETTLED_SECONDS)
    run_backup(environment()).expect(0)
    first = len(reads(proxy))
    second = new_bucket("target")
    made = environment({"second": second})
    run_backup(made).expect(0)
    assert sorted(request.key for request in reads(proxy)[first:]) == sorted(objects)
    assert newest_contents(second, tmp_path, made) == objects


@pytest.mark.long
def test_targets_run_one_after_the_other_on_demand(
    environment: Make, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket]
) -> None:
    source.put({"one": b"1"})
    result = run_backup(environment({"second": new_bucket("target")}, PARALLEL_TARGETS="1")).expect(0)
    assert line_number(result, "[target-first] done") < line_number(
        result, "[target-second] borg create begins"
    )


def is_tigrisfs_write(request: Request) -> bool:
    """Whether TigrisFS changes the bucket; backup.py itself names no agent."""
    return request.is_write and "user-agent" in request.headers


@pytest.mark.long
@pytest.mark.leaves_lock
def test_a_target_that_hangs_neither_stops_nor_holds_up_another(
    environment: Make,
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
) -> None:
    """The one that goes on is held near the other at first, and then is not, well before that one fails."""
    objects = {f"large/{number}": os.urandom(11 * MEBIBYTE) for number in range(8)}
    source.put(objects)
    second = new_bucket("target")
    made = environment({"second": second}, MEMORY_LIMIT_MB="1024", STALL_TIMEOUT="20")
    with FaultProxy(server.endpoint) as hanging:
        made["TARGETS"] = made["TARGETS"].replace(server.endpoint, hanging.endpoint, 1)
        hanging.add(is_tigrisfs_write, Action.HANG)
        result = run_backup(made, timeout_seconds=240).expect(2)  # it is tried once more
    assert outcomes(result.lines, ("first", "second")) == ["failed", "ok"], result.output
    assert line_number(result, "[target-second] done") < line_number(result, "[target-first] error")
    assert newest_contents(second, tmp_path, made) == objects


# ----------------------------------------------------------------------------------------------------- An end


def test_a_signal_ends_it_at_once(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy
) -> None:
    """Even while all its threads wait for S3."""
    source.put({f"{number}": b"x" * 100 for number in range(100)})
    hanging = proxy.add(is_read, Action.HANG)
    with Backup(environment()) as running:
        running.wait_for_line("borg create begins")
        deadline = time.monotonic() + 30
        while hanging.hit < 8 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hanging.hit >= 8, "threads read ahead"
        running.send_signal(signal.SIGTERM)
        running.wait(8).expect(143)  # `docker stop` kills after 10 s
