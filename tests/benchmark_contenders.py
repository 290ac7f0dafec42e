"""What the benchmark compares, and how one run of it is measured: seconds, memory, requests, bytes.

Every contender begins with an empty target, an existing bucket, and makes its repository itself. It ends when
everything is in the bucket. Caches (borg's, restic's) stay from one of its runs to the next.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmark_report import PHASES, RESTORE, Measurement
from helpers import BACKUP, PASSPHRASE, borg_environment, mounts_below, settings
from servers import READER, WRITER, Identity, SeaweedFS, die_with_parent

SAMPLE_SECONDS = 0.05
MOUNT_SECONDS = 30
RUN_SECONDS = 3600  # after which a run counts as hanging
TAIL_LINES = 15


class RunFailed(Exception):
    """A contender's run did not succeed; the message says how it ended, with the last lines of its output."""


# --------------------------------------------------------------------------------------- Processes and memory


def _parents() -> dict[int, int]:
    """Every process → its parent."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
                found[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    return found


def _memory(pid: int) -> int:
    """The process's share of the memory it uses, in bytes: what n processes share counts 1/n for each."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss: +(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def memory_of_trees(roots: Sequence[int]) -> int:
    """Bytes of memory of these processes and all their descendants."""
    parents = _parents()
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return sum(map(_memory, found))


class Processes:
    """The processes of one run. In the `with` block their memory is watched; at its end none is left."""

    def __init__(self, log_path: Path) -> None:
        """What they print goes to `log_path`."""
        self.peak_bytes = 0
        self._log_path = log_path
        self._started: list[subprocess.Popen[bytes]] = []
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a program of this run, with this environment and nothing else of ours."""
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._started.append(process)
        return process

    def run(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        """Run a program to its end; raises RunFailed unless it ends with 0."""
        self.wait(self.start(command, environment))

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of what was started; raises RunFailed unless it is 0."""
        arguments: Sequence[str] = process.args  # type: ignore[assignment]
        try:
            exit_code = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            raise self.failure(f"{arguments[0]} did not end within {RUN_SECONDS} s") from None
        if exit_code:
            raise self.failure(f"{' '.join(arguments[:2])} ended with exit code {exit_code}")

    def failure(self, what: str) -> RunFailed:
        """The exception for something that went wrong, with what was printed last."""
        lines = self._log_path.read_text(errors="replace").splitlines() if self._log_path.exists() else []
        return RunFailed("\n    ".join([what, *lines[-TAIL_LINES:]]))

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            running = [process.pid for process in self._started[:] if process.returncode is None]
            self.peak_bytes = max(self.peak_bytes, memory_of_trees(running))

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._watcher.join()
        for process in self._started:
            process.kill()
            process.wait()


# ------------------------------------------------------------------------------------------------- Contenders

BEFORE = "BENCHMARK_BEFORE"  # a variable: the path of another backup.py that is measured, too


@dataclass(frozen=True)
class Place:
    """Where a contender works: what to read, where to write, a folder of its own."""

    folder: Path
    server: SeaweedFS
    endpoint: str  # of the server, with the network's latency
    source: str
    targets: tuple[str, ...]
    local_files: Path  # the same files as in the source
    restored: str  # an empty bucket

    @property
    def target(self) -> str:
        """The first or only target bucket."""
        return self.targets[0]


Run = Callable[[Place, Processes, str], None]  # the last one is the phase


@dataclass(frozen=True)
class Contender:
    """One way to back up a bucket."""

    name: str
    run: Run
    programs: tuple[str, ...]  # what must be on the PATH
    target_count: int = 1
    phases: tuple[str, ...] = tuple(PHASES)
    is_local: bool = False  # it uses no network, so latency is nothing to it
    is_variant: bool = False  # not measured everywhere by default
    is_asked_for: bool = False  # and this one nowhere


def _run_s3borgbackup(place: Place, processes: Processes, phase: str, program: str | Path = BACKUP) -> None:
    targets = {bucket: {"path": bucket, "endpoint": place.endpoint} for bucket in place.targets}
    restore = {
        "RESTORE_ENDPOINT": place.endpoint,
        "RESTORE_ACCESS_KEY_ID": WRITER.access_key_id,
        "RESTORE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
        "PYTHONDEVMODE": "",
    }
    environment = settings(
        place.server, place.folder, place.source, targets, SOURCE_ENDPOINT=place.endpoint, **restore
    )
    arguments = ["restore", place.target, "--to-bucket", place.restored] if phase == RESTORE else []
    processes.run([sys.executable, program, *arguments], environment)


def _run_before(place: Place, processes: Processes, phase: str) -> None:
    """Another backup.py, say of the release before, that `--before` names."""
    _run_s3borgbackup(place, processes, phase, os.environ[BEFORE])


@contextlib.contextmanager
def _mounted(
    place: Place, processes: Processes, bucket: str, identity: Identity, *options: str
) -> Iterator[Path]:
    """The bucket as a folder, by TigrisFS; all is uploaded when the block is left."""
    folder = place.folder / "mounts" / bucket
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(place.folder), **_aws_keys(identity)}
    command = ["tigrisfs", "-f", "--endpoint", place.endpoint, *options, bucket, folder]
    process = processes.start(command, environment)
    deadline = time.monotonic() + MOUNT_SECONDS
    while not mounts_below(folder):
        if process.poll() is not None or time.monotonic() > deadline:
            raise processes.failure(f"{bucket} could not be mounted")
        time.sleep(0.01)
    try:
        yield folder
        subprocess.run(["fusermount3", "-u", folder], check=True)
        processes.wait(process)
    finally:
        if mounts_below(folder):
            subprocess.run(["fusermount3", "-uz", folder], check=False)


def _aws_keys(identity: Identity) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": identity.access_key_id,
        "AWS_SECRET_ACCESS_KEY": identity.secret_access_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _borg(
    place: Place, processes: Processes, phase: str, source: Path, repository: Path, *options: str
) -> None:
    """Make the repository where this is the first run, and an archive in any."""
    environment = borg_environment(place.folder)
    if phase == "first":
        processes.run(["borg", "init", "--encryption", "repokey-blake2", repository], environment)
    command = ["borg", "create", "--compression", "lz4", *options, f"{repository}::{phase}", source]
    processes.run(command, environment)


def _run_plain(place: Place, processes: Processes, phase: str, *options: str) -> None:
    options = ("--files-cache=mtime,size", *options)
    with (
        _mounted(place, processes, place.source, READER, "-o", "ro") as source,
        _mounted(place, processes, place.target, WRITER) as repository,
    ):
        _borg(place, processes, phase, source, repository, *options)


def _run_plain_noxattrs(place: Place, processes: Processes, phase: str) -> None:
    _run_plain(place, processes, phase, "--noxattrs")


def _run_local(place: Place, processes: Processes, phase: str) -> None:
    _borg(place, processes, phase, place.local_files, place.folder / "repository")


def _run_restic(place: Place, processes: Processes, phase: str) -> None:
    """With what spares it requests: no extended attributes, and inode numbers, new in each mount, ignored."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(place.folder),
        "RESTIC_REPOSITORY": f"s3:{place.endpoint}/{place.target}",
        "RESTIC_PASSWORD": PASSPHRASE,
        "RESTIC_CACHE_DIR": str(place.folder / "cache"),
        **_aws_keys(WRITER),
    }
    restic = ["restic", "--option", "s3.bucket-lookup=path"]
    if phase == "first":
        processes.run([*restic, "init"], environment)
    with _mounted(place, processes, place.source, READER, "-o", "ro", "--disable-xattr") as source:
        processes.run([*restic, "backup", "--ignore-inode", source], environment)


def _run_rclone(place: Place, processes: Processes, phase: str, *options: str) -> None:
    """Between two remotes, so that the data takes the way through rclone and is not copied by the server."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(place.folder),
        "RCLONE_CONFIG": str(place.folder / "rclone.conf"),
    }
    for name, identity in (("SOURCE", READER), ("TARGET", WRITER), ("RESTORED", WRITER)):
        fields = {
            "TYPE": "s3",
            "PROVIDER": "SeaweedFS",
            "ENDPOINT": place.endpoint,
            "ACCESS_KEY_ID": identity.access_key_id,
            "SECRET_ACCESS_KEY": identity.secret_access_key,
            "NO_CHECK_BUCKET": "true",
        }
        environment |= {f"RCLONE_CONFIG_{name}_{field}": value for field, value in fields.items()}
    ways = [f"source:{place.source}", f"target:{place.target}", f"restored:{place.restored}"]
    processes.run(["rclone", "sync", *options, *(ways[1:] if phase == RESTORE else ways[:2])], environment)


def _run_rclone_checksum(place: Place, processes: Processes, phase: str) -> None:
    """With the options that its manual recommends for fewer requests."""
    _run_rclone(place, processes, phase, "--checksum", "--fast-list")


_MOUNTING = ("tigrisfs", "fusermount3")

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("s3borgbackup", _run_s3borgbackup, ("borg", *_MOUNTING), phases=(*PHASES, RESTORE)),
        Contender(
            "s3borgbackup, before",
            _run_before,
            ("borg", *_MOUNTING),
            phases=(*PHASES, RESTORE),
            is_variant=True,
            is_asked_for=True,
        ),
        Contender(
            "s3borgbackup, two targets",
            _run_s3borgbackup,
            ("borg", *_MOUNTING),
            target_count=2,
            phases=("first",),
            is_variant=True,
        ),
        Contender("plain", _run_plain, ("borg", *_MOUNTING)),
        Contender("plain, --noxattrs", _run_plain_noxattrs, ("borg", *_MOUNTING), is_variant=True),
        Contender("restic", _run_restic, ("restic", *_MOUNTING)),
        Contender("rclone", _run_rclone, ("rclone",), phases=(*PHASES, RESTORE)),
        Contender("rclone, --checksum", _run_rclone_checksum, ("rclone",), is_variant=True),
        Contender("borg, local disk", _run_local, ("borg",), is_local=True),
    )
}


# -------------------------------------------------------------------------------------------------- Measuring

_METRIC = re.compile(r"^(SeaweedFS_s3_\w+_total)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_BYTES = {
    "SeaweedFS_s3_bucket_traffic_sent_bytes_total": "sent",
    "SeaweedFS_s3_bucket_traffic_received_bytes_total": "received",
}


def count_traffic(metrics: str) -> Counter[tuple[str, str]]:
    """Requests by kind (`GET`, …) and bytes (`sent`, `received`): (bucket, kind) → number."""
    counted: Counter[tuple[str, str]] = Counter()
    for name, labels_text, value in _METRIC.findall(metrics):
        labels = dict(_LABEL.findall(labels_text))
        kind = labels.get("type") if name == "SeaweedFS_s3_request_total" else _BYTES.get(name)
        if kind:
            counted[labels.get("bucket", ""), kind] += int(float(value))
    return counted


def _requests(traffic: Counter[tuple[str, str]], place: Place) -> dict[str, dict[str, int]]:
    """Side → kind → count; what concerns no bucket counts for the target."""
    found: dict[str, dict[str, int]] = {"source": {}, "target": {}}
    for (bucket, kind), count in sorted(traffic.items()):
        if kind not in _BYTES.values():
            side = found["source" if bucket == place.source else "target"]
            side[kind] = side.get(kind, 0) + count
    return found


def _bytes(traffic: Counter[tuple[str, str]], place: Place) -> dict[str, int]:
    return {
        "from source": traffic[place.source, "sent"],
        "from target": sum(traffic[bucket, "sent"] for bucket in place.targets),
        "into target": sum(traffic[bucket, "received"] for bucket in place.targets),
    }


def measure(contender: Contender, place: Place, described: Measurement, new_bytes: int) -> Measurement:
    """One run: what describes it, with its results. One that fails has results, too: `failure` says why.

    One that reads less of the source than what is new there has failed, whatever it says.
    """
    os.sync()  # what others have written must not be on our bill
    before = count_traffic(place.server.metrics())
    failure = ""
    started = time.monotonic()
    with Processes(place.folder / f"{described.phase}.log") as processes:
        try:
            contender.run(place, processes, described.phase)
        except (RunFailed, subprocess.CalledProcessError) as error:
            failure = str(error)
        seconds = time.monotonic() - started
    traffic = count_traffic(place.server.metrics()) - before
    if not failure and not contender.is_local and traffic[place.source, "sent"] < new_bytes:
        failure = f"it read {traffic[place.source, 'sent']:,} of {new_bytes:,} new bytes"
    return replace(
        described,
        seconds=round(seconds, 3),
        peak_bytes=processes.peak_bytes,
        requests=_requests(traffic, place),
        traffic=_bytes(traffic, place),
        failure=failure,
    )
