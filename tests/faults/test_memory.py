"""A container with 512 MB of memory and a source of 2 GB: the run finishes without a warning."""

import contextlib
import hashlib
import random
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers import (
    BACKUP,
    Backup,
    Bucket,
    Repository,
    Result,
    command_line,
    descendants,
    run_backup,
    settings,
    skip_or_fail,
    wait_until,
)
from proof import Table
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

LIMIT_BYTES = 512 * 1024 * 1024
LARGE_BYTES = 1_000_000_000
SIZES = [*[100_000_000] * 4, *[25_000_000] * 12, *[10_000_000] * 20, *[1_000_000] * 100]
PIECE_BYTES = 25_000_000


# ------------------------------------------------------------------------------------- A group with a limit


@dataclass(frozen=True)
class MemoryGroup:
    """A control group that limits memory, of either version of the kernel's interface."""

    folder: Path
    is_v2: bool

    def number(self, v1: str, v2: str, key: str = "") -> int:
        """A number out of one of its files: the only one, or the one on the line that begins with `key`."""
        text = (self.folder / (v2 if self.is_v2 else v1)).read_text()
        if not key:
            return int(text)
        return next(int(line.split()[1]) for line in text.splitlines() if line.split()[0] == key)

    @property
    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        return self.number("memory.oom_control", "memory.events", "oom_kill")

    @property
    def resident_bytes(self) -> int:
        """What its processes hold now, without the page cache."""
        return self.number("memory.stat", "memory.stat", "anon" if self.is_v2 else "total_rss")

    def command(self, *arguments: str) -> tuple[str, ...]:
        """The command line that runs backup.py in this group from its first moment on."""
        argv = shlex.join([sys.executable, str(BACKUP), *arguments])
        return "sh", "-c", f"echo $$ >{shlex.quote(str(self.folder / 'cgroup.procs'))} && exec {argv}"


def make_group(limit_bytes: int) -> MemoryGroup:
    """A new group with that limit. Raises OSError where none can be made."""
    v1 = Path("/sys/fs/cgroup/memory")
    is_v2 = not v1.is_dir()
    group = MemoryGroup((v1.parent if is_v2 else v1) / f"s3borgbackup-{uuid.uuid4().hex[:12]}", is_v2)
    group.folder.mkdir()
    try:
        name = "memory.max" if is_v2 else "memory.limit_in_bytes"
        (group.folder / name).write_text(str(limit_bytes))
    except OSError:
        group.folder.rmdir()
        raise
    return group


@pytest.fixture
def small_group(request: pytest.FixtureRequest) -> Iterator[MemoryGroup]:
    """A group with LIMIT_BYTES, or the test's own limit; removed when its processes are gone."""
    try:
        group = make_group(getattr(request, "param", LIMIT_BYTES))
    except OSError as error:
        skip_or_fail(f"no memory control group can be made: {error}")
        return
    yield group
    wait_until(lambda: not (group.folder / "cgroup.procs").read_text(), 20, "the group is empty")
    group.folder.rmdir()


@dataclass
class Watch:
    """The highest that was seen of a group's memory and of each program in it, in bytes."""

    group: MemoryGroup
    together: int = 0
    programs: dict[str, int] = field(default_factory=dict)

    def look(self, backup: Backup) -> None:
        """Looks once."""
        self.together = max(self.together, self.group.resident_bytes)
        for pid in [backup.pid, *descendants(backup.pid)]:
            name = program(pid)
            self.programs[name] = max(self.programs.get(name, 0), peak_bytes(pid))

    def __str__(self) -> str:
        """What was seen, for people."""
        each = ", ".join(f"{name} {peak // 1_000_000}" for name, peak in sorted(self.programs.items()))
        return f"MB at most: {self.together // 1_000_000} together, {each}"


def program(pid: int) -> str:
    """What a process of a run is, in a word or two."""
    words = command_line(pid).split()
    if "tigrisfs" in command_line(pid).partition(" ")[0]:
        return f"tigrisfs {words[-1].rpartition('/')[2]}"
    if borg := re.search(r" (list|init|create|prune|compact) --log-json", command_line(pid)):
        return f"borg {borg[1]}"
    return "backup.py"


def peak_bytes(pid: int) -> int:
    """The highest resident size of a process, proc(5); 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


# ------------------------------------------------------------------------------------------------- The source


def put_random(bucket: Bucket, key: str, size_bytes: int, chance: random.Random) -> str:
    """Writes an object of that size that cannot be compressed, by parts; returns its SHA-256."""
    digest, client, parts = hashlib.sha256(), bucket.client, []
    name = {"Bucket": bucket.name, "Key": key}
    upload = {**name, "UploadId": client.create_multipart_upload(**name)["UploadId"]}
    for number, start in enumerate(range(0, size_bytes, PIECE_BYTES), 1):
        piece = chance.randbytes(min(PIECE_BYTES, size_bytes - start))
        digest.update(piece)
        etag = client.upload_part(**upload, PartNumber=number, Body=piece)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    return digest.hexdigest()


def fill(bucket: Bucket, chance: random.Random) -> dict[str, str]:
    """2 GB: one object of 1 GB among others of 1 to 100 MB; returns key → SHA-256."""
    digests = {
        f"folder/{number:03}.bin": put_random(bucket, f"folder/{number:03}.bin", size, chance)
        for number, size in enumerate(SIZES)
    }
    return {**digests, "folder/large": put_random(bucket, "folder/large", LARGE_BYTES, chance)}


def change(bucket: Bucket, digests: Mapping[str, str], chance: random.Random) -> dict[str, str]:
    """Every other small object is deleted, so that compact has to move the rest; a large one is replaced."""
    gone = list(digests)[4:-1:2]
    bucket.delete(*gone)
    kept = {key: digest for key, digest in digests.items() if key not in gone}
    return {**kept, "folder/000.bin": put_random(bucket, "folder/000.bin", SIZES[0], chance)}


def archived_digests(target: Bucket, folder: Path) -> dict[str, str]:
    """Key → SHA-256 of what the only archive holds, after the repository has passed its check."""
    repository = Repository.download(target, folder)
    repository.check()
    [archive] = repository.archives()
    lines = repository.borg("list", "--format", "{sha256} {path}{NL}", f"{folder}::{archive}").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return {
        path.partition("/source/")[2]: digest for digest, path in pairs if path.endswith((".bin", "large"))
    }


# ---------------------------------------------------------------------------------------------------- The run


def run_in(group: MemoryGroup, environment: Mapping[str, str], watch: Watch) -> Result:
    """Runs backup.py in the group to its end."""
    with Backup(environment, *group.command()) as backup:
        while backup.process.poll() is None:
            watch.look(backup)
            time.sleep(0.1)
        return backup.wait(1)


@pytest.mark.long
@pytest.mark.timeout(1800)  # alone it takes a fifth of this
def test_a_run_with_512_mb_backs_up_2_gb_to_two_targets_without_a_warning(
    server: SeaweedFS,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    table: Table,
    small_group: MemoryGroup,
) -> None:
    """Twice, with create, prune and compact; borg's caches of the first run are there in the second."""
    source, targets = new_bucket("source"), {name: new_bucket(name) for name in ("first", "second")}
    chance = random.Random(512)
    digests = fill(source, chance)
    entries = {
        name: {"path": bucket.name, "prune": "--keep-last=1", "compact": 0}
        for name, bucket in targets.items()
    }
    environment = settings(server, tmp_path, source.name, entries, PYTHONDEVMODE="")
    watch = Watch(small_group)
    with table.attempt("512 MB of memory, 2 GB of objects, two targets"):
        for once in (1, 2):
            digests = change(source, digests, chance) if once == 2 else digests
            result = run_in(small_group, environment, watch)
            print(f"run {once}: {result.duration_seconds:.0f} s; {watch}")
            result.expect(0)
            assert not [line for line in result.lines if "warning" in line.lower()], result.output
            assert small_group.oom_kills == 0
            assert result.output.count("compaction freed") == 2
        assert archived_digests(targets["second"], tmp_path / "copy") == digests
        result = run_backup(environment, timeout_seconds=300).expect(0)
        assert [line for line in result.lines if "warning" in line] == []


@pytest.mark.parametrize("small_group", [200 * 1024 * 1024], indirect=True)
def test_a_container_with_too_little_memory_is_told_so(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, small_group: MemoryGroup
) -> None:
    environment = settings(server, tmp_path, source.name, {"first": target.name}, PYTHONDEVMODE="")
    result = run_backup(environment, *small_group.command()).expect(2)
    assert "there are only 209 MB of memory" in result.output
    assert "--memory" in result.output
    assert target.sizes() == {}
