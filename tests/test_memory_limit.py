"""How much memory the container has, by its control groups, and what TigrisFS may cache of it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

import backup
from helpers import Backup, Bucket, children, command_line, run_backup, settings
from servers import SeaweedFS

MACHINE_MB = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
V1_UNLIMITED = "9223372036854771712"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    """A folder with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "memory_mb"),
    [
        # Version 2; in a container the group is the root of what it sees.
        ("0::/", {f"{V2}/memory.max": "512000000"}, 512),
        ("0::/", {f"{V2}/memory.max": "max"}, MACHINE_MB),
        ("0::/", {f"{V2}/memory.max": str(10**18)}, MACHINE_MB),
        ("0::/", {}, MACHINE_MB),
        # A group below others: the smallest limit on the way up counts.
        ("0::/a/b", {f"{V2}/a/b/memory.max": "300000000", f"{V2}/a/memory.max": "max"}, 300),
        ("0::/a/b", {f"{V2}/a/b/memory.max": "max", f"{V2}/a/memory.max": "400000000"}, 400),
        ("0::/a/b", {f"{V2}/a/b/memory.max": "700000000", f"{V2}/a/memory.max": "600000000"}, 600),
        # Without a namespace of its own the path is the host's, and only the root is to be seen.
        ("0::/docker/0123", {f"{V2}/memory.max": "256000000"}, 256),
        ("0::/../../docker/0123", {f"{V2}/memory.max": "256000000"}, 256),
        # Version 1.
        ("5:memory:/", {f"{V1}/memory.limit_in_bytes": "512000000"}, 512),
        ("5:memory:/", {f"{V1}/memory.limit_in_bytes": V1_UNLIMITED}, MACHINE_MB),
        ("5:cpu,memory:/x", {f"{V1}/x/memory.limit_in_bytes": "333999999"}, 333),
        (
            "5:memory:/docker/0123",
            {f"{V1}/memory.limit_in_bytes": "268435456"},
            268,
        ),
        (
            "5:memory:/a/b",
            {
                f"{V1}/a/b/memory.limit_in_bytes": V1_UNLIMITED,
                f"{V1}/a/memory.limit_in_bytes": "400000000",
                f"{V1}/memory.limit_in_bytes": V1_UNLIMITED,
            },
            400,
        ),
        # Both, as systemd mounts them: memory is where the limit is.
        (
            "5:memory:/x\n1:name=systemd:/x\n0::/y",
            {f"{V1}/x/memory.limit_in_bytes": "450000000", f"{V2}/unified/y/cgroup.procs": "1"},
            450,
        ),
        # Other controllers say nothing of memory, nor do names that look alike.
        ("3:cpu:/x", {f"{V1}/x/memory.limit_in_bytes": "1000000"}, MACHINE_MB),
        ("3:name=memory:/x", {f"{V1}/x/memory.limit_in_bytes": "1000000"}, MACHINE_MB),
        ("0::/a:b", {f"{V2}/a:b/memory.max": "512000000"}, 512),
        ("0::/", {f"{V2}/memory.max": ""}, MACHINE_MB),
    ],
)
def test_the_memory_is_the_containers(
    tmp_path: Path, groups: str, files: Mapping[str, str], memory_mb: int
) -> None:
    assert backup.container_memory_mb(tree(tmp_path, {"proc/self/cgroup": groups, **files})) == memory_mb


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert backup.container_memory_mb(tmp_path) == MACHINE_MB


def caches(memory_mb: int, targets: int = 1, parallel: int = 4) -> tuple[int, int]:
    """What may be cached of the source, and of each target."""
    plan = backup.MemoryPlan(SimpleNamespace(targets=range(targets), parallel_targets=parallel), memory_mb)
    return plan.source_cache_mb, plan.target_cache_mb


@pytest.mark.parametrize(
    ("memory_mb", "source_mb", "target_mb"),
    [
        (256, 48, 48),
        (300, 64, 48),
        (320, 80, 48),
        (512, 128, 64),
        (536, 134, 67),
        (1_000, 250, 125),
        (2_000, 500, 128),
        (4_000, 1_000, 128),
        (64_000, 1_000, 128),
    ],
)
def test_the_caches_follow_the_memory(memory_mb: int, source_mb: int, target_mb: int) -> None:
    assert caches(memory_mb) == (source_mb, target_mb)


@pytest.mark.parametrize("memory_mb", [256, 300, 511, 512, 513, 1_023, 1_025, 3_999, 4_001, 1_000_000])
def test_the_caches_take_at_most_half_of_the_memory(memory_mb: int) -> None:
    """And none is so small that TigrisFS's read-ahead does not fit it."""
    assert sum(caches(memory_mb)) * 2 <= memory_mb
    assert min(caches(memory_mb)) >= backup.SMALLEST_CACHE_MB


@pytest.mark.parametrize(
    ("memory_mb", "targets", "parallel", "at_once"),
    [
        (256, 4, 4, 1),
        (512, 4, 4, 1),
        (1_000, 4, 4, 2),
        (2_000, 4, 4, 4),
        (2_000, 3, 4, 3),
        (2_000, 4, 2, 2),
        (2_000, 4, 1, 1),
        (8_000, 10, 8, 8),
    ],
)
def test_as_many_targets_as_asked_for_are_backed_up_side_by_side_and_fewer_where_memory_is_short(
    memory_mb: int, targets: int, parallel: int, at_once: int
) -> None:
    wanted = SimpleNamespace(targets=range(targets), parallel_targets=parallel)
    assert backup.MemoryPlan(wanted, memory_mb).targets_at_once == at_once


@pytest.mark.parametrize("text", ["255", "0", "-1", "1.5", "512M", "lots"])
def test_a_limit_that_is_too_small_to_be_safe_or_no_number_is_refused(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, text: str
) -> None:
    environment = settings(server, tmp_path, source.name, {"first": target.name}, MEMORY_LIMIT_MB=text)
    result = run_backup(environment).expect(78)
    assert "MEMORY_LIMIT_MB: write a whole number from 256 to" in result.output
    assert target.sizes() == {}


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.parametrize(("text", "source_mb", "target_mb"), [("256", 48, 48), ("800", 200, 100)])
def test_the_given_limit_sizes_the_caches_of_a_run(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    text: str,
    source_mb: int,
    target_mb: int,
) -> None:
    """What TigrisFS is started with, for a limit that overrides what the container has."""
    source.put({"a": b"a"})
    environment = settings(server, tmp_path, source.name, {"first": target.name}, MEMORY_LIMIT_MB=text)
    seen: dict[str, int] = {}
    with Backup(environment) as running:
        while running.process.poll() is None:
            for pid in children(running.pid):
                if limit := re.search(r"--memory-limit (\d+) .*/(\S+)$", command_line(pid)):
                    seen[limit[2]] = int(limit[1])
        running.wait().expect(0)
    assert seen == {"source": source_mb, "target-first": target_mb}
