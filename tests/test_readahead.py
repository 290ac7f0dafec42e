"""Reading ahead: the source's bytes are fetched once and side by side, and the archives are the same."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from faults.proof import newest_contents
from faults.proxy import Action, FaultProxy, Request
from helpers import (
    Backup,
    Bucket,
    Repository,
    Result,
    borg_environment,
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


def test_the_order_is_borgs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files made in no order, in folders among files: what `borg create` lists."""
    folder = tmp_path / "tree"
    for key in sorted(sample_objects(3, 200, largest_bytes=10), key=hash):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(b"x")
    (folder / "link").symlink_to("plain.txt")
    environment = borg_environment(tmp_path) | {"BORG_PASSPHRASE": ""}
    repository = tmp_path / "repository"
    subprocess.run(["borg", "init", "--encryption=none", repository], env=environment, check=True)
    command = ["borg", "create", "--list", "--dry-run", "--log-json", f"{repository}::x", "tree"]
    listed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True)
    paths = [json.loads(line).get("path", "") for line in listed.stderr.splitlines()]
    files = [path for path in paths if os.path.isfile(tmp_path / path) and not path.endswith("link")]
    monkeypatch.chdir(tmp_path)
    assert [entry.path for entry in backup.in_borgs_order("tree")] == files
    assert len(files) > 150


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


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[Callable[[int], tuple[backup.ReadAhead, list[backup.Reader]]]]:
    """A read-ahead of a folder with 40 files of 1 MiB for two readers, whose window is 16 MiB."""
    folder, started = tmp_path / "source", []
    folder.mkdir()
    for number in range(40):
        (folder / str(number)).write_bytes(bytes(MEBIBYTE))
    made: list[backup.ReadAhead] = []

    def make(stall_seconds: int) -> tuple[backup.ReadAhead, list[backup.Reader]]:
        settings = SimpleNamespace(
            source=SimpleNamespace(target=None),
            read_ahead_threads=2,
            source_metadata=False,
            stall_seconds=stall_seconds,
        )
        runtime, mount = SimpleNamespace(settings=settings, memory_mb=300), SimpleNamespace(path=folder)
        both = [backup.Reader(), backup.Reader()]
        made.append(backup.ReadAhead(runtime, mount, both))
        for reader in both:
            started.append(backup.Child(["sleep", "60"], os.environ, print, print))
            made[0].began(reader, -math.inf, started[-1])
        return made[0], both

    yield make
    for ahead in made:
        ahead.close()
    for child in started:
        child.kill()


def pass_files(ahead: backup.ReadAhead, reader: backup.Reader, folder: Path, first: int, end: int) -> None:
    """The reader is done with these of the files, with each as soon as it is in the window."""
    for entry in itertools.islice(backup.in_borgs_order(str(folder)), first, end):
        wait_until(lambda path=entry.path: path in ahead._places, 10, f"{entry.name} is in the window")
        ahead.passed(reader, entry.path)


def test_who_is_far_ahead_is_held_until_the_other_has_come_nearer(readers: Callable, tmp_path: Path) -> None:
    """At three quarters of the window, until a half."""
    ahead, (fast, slow) = readers(900)
    pass_files(ahead, fast, tmp_path / "source", 0, 12)
    assert state(fast.child) == "S"
    pass_files(ahead, fast, tmp_path / "source", 12, 13)
    wait_until(lambda: state(fast.child) == "T", 5, "it is held")
    pass_files(ahead, slow, tmp_path / "source", 0, 5)
    assert state(fast.child) == "T"
    pass_files(ahead, slow, tmp_path / "source", 5, 6)
    wait_until(lambda: state(fast.child) == "S", 5, "it goes on")
    assert state(slow.child) == "S"


def test_who_does_not_move_is_left_behind(readers: Callable, tmp_path: Path) -> None:
    """After a third of STALL_TIMEOUT; the other is held no more, and what it reads is read ahead."""
    ahead, (fast, _) = readers(6)
    pass_files(ahead, fast, tmp_path / "source", 0, 13)
    wait_until(lambda: state(fast.child) == "T", 5, "it is held")
    wait_until(lambda: state(fast.child) == "S", 10, "it goes on")
    pass_files(ahead, fast, tmp_path / "source", 13, 40)
    assert state(fast.child) == "S"


@pytest.mark.parametrize(
    ("memory_mb", "window_mib", "piece_mib"),
    [(256, 12, 1.5), (300, 16, 2), (400, 25, 3.125), (1024, 64, 8), (4000, 250, 8), (100_000, 250, 8)],
)
def test_what_is_read_ahead_fits_in_a_quarter_of_the_cache(
    memory_mb: int, window_mib: float, piece_mib: float
) -> None:
    source = backup.Store(
        target=None, endpoint="http://x", bucket="b", prefix="", access_key_id="k", secret_access_key="s"
    )
    window = backup.read_ahead_bytes(memory_mb, source)
    assert window == window_mib * MEBIBYTE
    assert 4 * window <= backup.data_cache_mb(memory_mb, source) * MEBIBYTE
    assert backup.piece_bytes(window) == piece_mib * MEBIBYTE


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
    """Whether TigrisFS gets an object's content; backup.py, which looks at one byte, names no agent."""
    return request.kind == "GET" and "user-agent" in request.headers


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
    ranges: dict[str, list[range]] = {key: [] for key, body in objects.items() if body}
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


def test_an_object_larger_than_the_window_is_read_ahead_to_its_end(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy
) -> None:
    """borg names it when it begins to read it; what follows it must not take its place in the window."""
    source.put({"large": os.urandom(48 * MEBIBYTE), "next": b"x"})
    proxy.add(is_read, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(environment(MEMORY_LIMIT_MB="256")).expect(0)
    late = [request for request in reads(proxy) if fetched_bytes(request, 2**40).start >= 24 * MEBIBYTE]
    assert most_at_a_time(late) > 1


def test_verify_reads_ahead_within_an_object_that_is_larger_than_the_window(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy
) -> None:
    """To its end: with 256 MB the window has 12 MiB."""
    objects = {"large": bytes(40 * MEBIBYTE)}
    source.put(objects)
    made = environment(MEMORY_LIMIT_MB="256")
    run_backup(made).expect(0)
    before = len(proxy.requests)
    proxy.add(is_read, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(made, "verify", "first").expect(0)
    read = [request for request, _ in proxy.requests[before:] if is_read(request)]
    assert_each_byte_was_read_once(read, objects)
    last = [request for request in read if fetched_bytes(request, 2**40).start >= 20 * MEBIBYTE]
    assert most_at_a_time(last) > 1


@pytest.mark.parametrize(("threads", "at_once"), [("16", range(8, 100)), ("0", range(1, 3))])
def test_objects_are_read_side_by_side_and_without_threads_one_by_one(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, threads: str, at_once: range
) -> None:
    source.put(
        {f"{number % 3}/{number}": b"x" * (number + 1) for number in range(48 if threads != "0" else 8)}
    )
    proxy.add(is_read, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(environment(READ_AHEAD_THREADS=threads)).expect(0)
    assert most_at_a_time(reads(proxy)) in at_once


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
    changed = {"plain.txt": source.get("plain.txt")[::-1] or b"x", "new": b"new"}
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


def test_user_metadata_is_archived_on_demand_and_asked_for_side_by_side(
    environment: Make, source: Bucket, target: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    keys = [f"{number % 3}/{number}" for number in range(24)]
    for key in keys:
        source.client.put_object(Bucket=source.name, Key=key, Body=b"x", Metadata={"colour": key[2:]})
    made = environment(SOURCE_METADATA="true")

    def is_head(request: Request) -> bool:
        return request.kind == "HEAD" and bool(request.key)

    proxy.add(is_head, Action.DELAY, seconds=DELAY_SECONDS)
    run_backup(made).expect(0)
    heads = [request.when for request, _ in proxy.requests if is_head(request) and request.key in keys]
    assert len(heads) == len(keys), "one for each object"
    assert heads[-1] - heads[0] < len(keys) * DELAY_SECONDS / 2
    repository = Repository.download(target, tmp_path / "local")
    folder = tmp_path / "extracted"
    folder.mkdir()
    command = ["borg", "extract", f"{repository.folder}::{repository.archives()[-1]}"]
    # It warns of TigrisFS's own attributes (s3.etag), which no file system takes.
    subprocess.run(command, cwd=folder, env=borg_environment(tmp_path), capture_output=True, check=False)
    found = {path.name: os.getxattr(path, "user.colour") for path in folder.rglob("*") if path.is_file()}
    assert found == {key[2:]: key[2:].encode() for key in keys}


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


def test_a_new_target_beside_one_that_knows_all_costs_one_read(
    environment: Make,
    source: Bucket,
    target: Bucket,
    new_bucket: Callable[..., Bucket],
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    objects = {key: body for key, body in sample_objects(6, 50).items() if body}
    source.put(objects)
    time.sleep(SETTLED_SECONDS)
    run_backup(environment()).expect(0)
    first = len(reads(proxy))
    second = new_bucket("target")
    made = environment({"second": second})
    run_backup(made).expect(0)
    assert sorted(request.key for request in reads(proxy)[first:]) == sorted(objects)
    assert newest_contents(second, tmp_path, made) == objects


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
        result = run_backup(made).expect(2)
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
