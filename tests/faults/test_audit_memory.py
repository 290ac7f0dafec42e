"""A run's own memory does not grow with the number of objects."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import Backup, Bucket, settings
from proof import Table, newest_contents
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

FEW, MANY = 10_000, 60_000  # of fewer, not all is on its way at a time that may be
KEY = "a folder with a name of some length/{folder:02}/" + "k" * 150 + "-{number:06}"
BOUND_BYTES = 20  # for each object more: a key alone has 200
CHANCE_BYTES = 1_000_000  # by which two runs alike differ
THREADS = 16
# glibc keeps what each of a hundred threads has given back, for that thread alone, and so more the longer it
# runs. The image's C library, musl, does not, and what the program itself holds does not grow with it.
AS_IN_THE_IMAGE = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def put_empty(bucket: Bucket, count: int) -> None:
    """Objects with long keys and nothing in them."""
    client = bucket.client

    def put(number: int) -> None:
        client.put_object(Bucket=bucket.name, Key=KEY.format(folder=number % 25, number=number), Body=b"")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(put, range(count)))


def peak_of_a_run(environment: dict[str, str], count: int) -> int:
    """The most memory that backup.py alone had while it backed up that many objects, in bytes."""
    peak = 0
    with Backup(environment) as running:
        while running.process.poll() is None:
            peak = max(peak, peak_bytes(running.pid))
            time.sleep(0.05)
        result = running.wait(1).expect(0)
    assert f"{count:,} objects" in result.output
    return peak


def peak_bytes(pid: int) -> int:
    """VmHWM of a process, proc(5)."""
    words = Path(f"/proc/{pid}/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) * 1024 if "VmHWM:" in words else 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_with_60000_objects_takes_hardly_more_memory_than_one_with_10000(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, table: Table
) -> None:
    peaks = {}
    with table.attempt(f"{MANY:,} objects, and a bound on memory"):
        for count in (FEW, MANY):
            source, target = new_bucket("source"), new_bucket("target")
            put_empty(source, count)
            folder, targets = tmp_path / str(count), {"first": target.name}
            # Python's development mode takes memory.
            own = {"PYTHONDEVMODE": "", **AS_IN_THE_IMAGE}
            environment = settings(server, folder, source.name, targets, **own)
            peaks[count] = peak_of_a_run(environment, count)
            assert len(newest_contents(target, folder, environment)) == count
        print({count: f"{peak / 1e6:.1f} MB" for count, peak in peaks.items()})
        assert peaks[MANY] - peaks[FEW] < CHANCE_BYTES + BOUND_BYTES * (MANY - FEW)
