"""What tests share: polling, processes and mounts, buckets, downloaded repositories, running backup.py.

Everything here goes through the operating system, boto3 and borg, never through backup.py's own functions: a
mistake there must not hide itself.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from servers import READER, WRITER, Identity, Server, die_with_parent, terminate_with_parent

BACKUP = Path(__file__).resolve().parent.parent / "backup.py"
PASSPHRASE = "correct horse battery staple"

POLL_SECONDS = 0.02
THREADS = 16

# What Python says in development mode: of a socket that nobody closed, for instance.
PYTHONS_WARNING = re.compile(r"\.py:[0-9]+: \w*Warning: |^Exception ignored in")

Answer = TypeVar("Answer")

SEALED_PREFIXES = ("AWS_", "BORG_", "WEED_", "SOURCE_", "TARGET", "BACKUP_", "DATA_DIR", "LOG_LEVEL")


def seal_environment() -> None:
    """Take the user's own settings out of our environment: real credentials least of all may reach a test."""
    for variable in list(os.environ):
        if variable.startswith(SEALED_PREFIXES) or variable.lower().endswith("_proxy"):
            del os.environ[variable]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull


def first_short(variants: Sequence[Any]) -> list[Any]:
    """Variants for `parametrize`: the first is part of every run, the others of `tests/run long`."""
    return [
        variants[0],
        *(
            pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.long)
            for each in variants[1:]
        ),
    ]


NO_SKIP = "S3BORGBACKUP_NO_SKIP"


def skip_or_fail(reason: str) -> None:
    """Skip the test and say why; where nothing may be skipped (CI), fail instead."""
    if os.environ.get(NO_SKIP):
        pytest.fail(f"{reason} ({NO_SKIP} is set, so this is not skipped)")
    pytest.skip(reason)


# ---------------------------------------------------------------------------------------------------- Polling


def wait_until(predicate: Callable[[], Answer], timeout_seconds: float, what: str) -> Answer:
    """The first true answer of `predicate`; AssertionError naming `what` when there is none in time."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds} s: {what}")
        time.sleep(POLL_SECONDS)


# --------------------------------------------------------------------------------------- Processes and mounts


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and parent of a process; None when it is gone."""
    try:
        # The command's name is in parentheses and may hold anything, so count from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    stat = _stat(pid)
    return stat is not None and stat[0] != "Z"


def children(pid: int) -> list[int]:
    """The direct children of a process, zombies included."""
    return [other for other in _pids() if (stat := _stat(other)) and stat[1] == pid]


def descendants(pid: int) -> list[int]:
    """All processes below a process, zombies included, parents before children."""
    below = children(pid)
    for child in below:
        below.extend(children(child))
    return below


def zombies(pid: int) -> list[int]:
    """The descendants of a process that ended and were not waited for."""
    return [child for child in descendants(pid) if (stat := _stat(child)) and stat[0] == "Z"]


def kill_all(pids: Sequence[int]) -> None:
    """SIGKILL for processes in this order; returns when all are gone, or zombies of somebody else."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in pids), 10, "all of them are gone")


def ancestors(pid: int) -> list[int]:
    """The parents of a process, nearest first."""
    found: list[int] = []
    while (stat := _stat(pid)) and (pid := stat[1]):
        found.append(pid)
    return found


def _proc_text(pid: int, name: str) -> str:
    try:
        return (
            Path(f"/proc/{pid}/{name}")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="surrogateescape")
            .strip()
        )
    except OSError:
        return ""


def command_line(pid: int) -> str:
    """The arguments of a process, separated by blanks; empty when it is gone."""
    return _proc_text(pid, "cmdline")


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it is gone or not ours to read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in raw.split("\0") if "=" in entry)


def processes_with(text: str) -> dict[int, str]:
    """Processes (pid → command line) with `text` in arguments or environment, without us and our parents."""
    ours = {os.getpid(), *ancestors(os.getpid())}
    return {
        pid: command_line(pid) or f"pid {pid}"
        for pid in _pids()
        if pid not in ours and (text in command_line(pid) or text in _proc_text(pid, "environ"))
    }


def mounts_below(folder: Path) -> list[Path]:
    """Mount points at or below a folder, the innermost first; never touches the mounts, which may hang."""
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        # Blanks and backslashes are written as octal escapes.
        escaped = line.split(" ")[4].encode(errors="surrogateescape")
        mount_point = Path(os.fsdecode(escaped.decode("unicode_escape").encode("latin-1")))
        if mount_point == folder or folder in mount_point.parents:
            found.append(mount_point)
    return found[::-1]


def leftovers(folder: Path) -> list[str]:
    """What a test that worked in `folder` left behind: mounts and processes, each as a line for a person."""
    return [f"mount {mount_point}" for mount_point in mounts_below(folder)] + [
        f"process {pid}: {command}" for pid, command in processes_with(str(folder)).items()
    ]


def remove_leftovers(folder: Path) -> None:
    """Kill and unmount what `leftovers` names, so that the next test starts clean."""
    for pid in processes_with(str(folder)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for mount_point in mounts_below(folder):
        subprocess.run(["fusermount3", "-uz", mount_point], check=False)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 4 MB at `folder`."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "s3borgbackup-test", folder], capture_output=True, text=True
    )
    if done.returncode:
        skip_or_fail(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """No byte is left on the disk of `folder`."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


def as_pid_1(script: Path | str, *arguments: str) -> list[str]:
    """A command line that runs a Python program as PID 1 of a new PID namespace."""
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or not unshare:
        skip_or_fail("a PID namespace takes root and unshare(1)")
    options = ["--pid", "--fork", "--mount-proc", "--kill-child"]
    return [str(unshare), *options, sys.executable, str(script), *arguments]


# ---------------------------------------------------------------------------------------------------- Buckets


@dataclass(frozen=True)
class Bucket:
    """A bucket of a running server, seen through boto3."""

    server: Server
    name: str

    @property
    def client(self) -> Any:
        """A boto3 client that may do everything."""
        return self.server.client()

    def create(self) -> Self:
        """Make the bucket."""
        self.server.make_bucket(self.name)
        return self

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Write objects, many at a time, but those with others below their names one by one before these.

        Of `a` and `a/b` written at the same moment SeaweedFS loses one now and then, and says 200 to both.
        """
        client = self.client
        folders = {key[:place] for key in objects for place, letter in enumerate(key) if letter == "/"}

        def write(key: str) -> None:
            client.put_object(Bucket=self.name, Key=key, Body=objects[key])

        for key in sorted(key for key in objects if key.rstrip("/") in folders):
            write(key)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(write, (key for key in objects if key.rstrip("/") not in folders)))

    def get(self, key: str) -> bytes:
        """The content of one object."""
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def delete(self, *keys: str) -> None:
        """Delete these objects."""
        client = self.client
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: client.delete_object(Bucket=self.name, Key=key), keys))

    def flip_a_byte(self, key: str) -> bytes:
        """Damage an object in its middle; returns what it was before."""
        before = self.get(key)
        place = len(before) // 2
        self.put({key: before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :]})
        return before

    def largest(self, prefix: str = "") -> str:
        """The key of the largest object, such as the segment with most of the data."""
        sizes = self.sizes(prefix)
        return max(sizes, key=lambda key: sizes[key])

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every key that begins with `prefix`, with the object's size in bytes."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}

    def contents(self, prefix: str = "") -> dict[str, bytes]:
        """Every object whose key begins with `prefix`, folder markers (`x/`) left out."""
        client = self.client
        keys = [key for key in self.sizes(prefix) if not key.endswith("/")]
        with ThreadPoolExecutor(THREADS) as pool:
            bodies = pool.map(lambda key: client.get_object(Bucket=self.name, Key=key)["Body"].read(), keys)
            return dict(zip(keys, bodies, strict=True))

    def download(self, folder: Path, prefix: str = "") -> Path:
        """Write what is below `prefix` (`x/y`, no slash at the end) into a folder; returns the folder."""
        start = f"{prefix}/" if prefix else ""
        for key in self.sizes(start):
            path = folder / key.removeprefix(start)
            (path if key.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        for key, body in self.contents(start).items():
            (folder / key.removeprefix(start)).write_bytes(body)
        return folder

    def clear(self) -> None:
        """Delete all objects."""
        self.delete(*self.sizes())

    def locks(self) -> list[str]:
        """The keys of borg's locks in this bucket that somebody holds.

        A `lock.roster` that names nobody is what `borg list` and other readers leave; it locks nothing.
        """
        return [
            key
            for key in self.sizes()
            if any(part.startswith("lock.") for part in key.split("/")) and not self._is_empty_roster(key)
        ]

    def _is_empty_roster(self, key: str) -> bool:
        if not key.endswith("lock.roster"):
            return False
        try:
            return not any(json.loads(self.get(key) or b"{}").values())
        except self.client.exceptions.NoSuchKey:  # removed since it was listed
            return True


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder: path relative to it → content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Each is one that some layer (URL, XML, shell, file system, borg) could mangle and that SeaweedFS can keep.
UNUSUAL_KEYS = (
    "plain.txt",
    "with space.txt",
    " space at both ends ",
    "two  spaces/and a tab\there.txt",
    "Straße/čeština/日本語.txt",
    "e\u0301 decomposed.txt",
    "emoji 🗄.bin",
    "a+b+c.txt",
    "a%20b.txt",
    "100%.txt",
    "%2F.txt",
    "new\nline.txt",
    "quotes\"and'ticks`.txt",
    "&<>;|$HOME*?[x]{y}.txt",
    "#hash?query=1&x=y.txt",
    "~tilde,comma=equals:colon@at!.txt",
    "-begins-with-a-dash",
    ".hidden/.file",
    "...",
    "x" * 200,
    "ü" * 100,
    "/".join(f"level {number}" for number in range(12)) + "/deep.txt",
    "UPPER/case.TXT",
    "upper/case.txt",
)


def sample_objects(
    seed: int, count: int, *, largest_bytes: int = 64 * 1024, prefix: str = ""
) -> dict[str, bytes]:
    """`count` objects (key → content), always the same for a seed: all unusual keys, then ordinary ones.

    Sizes are spread evenly over the orders of magnitude; every other object can be compressed; one is empty.
    """
    chance = random.Random(seed)
    keys = [f"folder {number % 7}/sub{number % 3}/object-{number:05}.dat" for number in range(count)]
    keys[: len(UNUSUAL_KEYS)] = UNUSUAL_KEYS[:count]
    objects = {}
    for number, key in enumerate(keys):
        size = int(largest_bytes ** chance.random())
        block = chance.randbytes(size if number % 2 else min(size, 64))
        objects[prefix + key] = (block * (size // len(block) + 1))[:size]
    if count > len(UNUSUAL_KEYS):
        objects[prefix + keys[-1]] = b""
    return objects


# ------------------------------------------------------------------------------------ Mounts and borg by hand


@contextlib.contextmanager
def mounted(bucket: Bucket, folder: Path, *, prefix: str = "", identity: Identity = WRITER) -> Iterator[Path]:
    """The bucket as a folder, by TigrisFS without backup.py; all is uploaded when the block is left."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["tigrisfs", "-f", "--endpoint", bucket.server.endpoint, "--no-expire-multipart"]
    process = subprocess.Popen(
        [*command, bucket.name + (f":{prefix}" if prefix else ""), str(folder)],
        env={
            "PATH": os.environ["PATH"],
            "AWS_ACCESS_KEY_ID": identity.access_key_id,
            "AWS_SECRET_ACCESS_KEY": identity.secret_access_key,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    output = _Output(process)
    try:
        wait_until(lambda: mounts_below(folder) or process.poll() is not None, 20, f"{folder} is mounted")
        assert process.poll() is None, "\n".join(output.lines)
        yield folder
        subprocess.run(["fusermount3", "-u", folder], check=True)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        if mounts_below(folder):
            subprocess.run(["fusermount3", "-uz", folder], check=False)


def borg_environment(base_folder: Path, passphrase: str = PASSPHRASE) -> dict[str, str]:
    """The whole environment for a borg of a user who restores elsewhere: own caches, no question asked."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(base_folder),
        "LC_CTYPE": "C.UTF-8",
        "BORG_BASE_DIR": str(base_folder),
        "BORG_PASSPHRASE": passphrase,
        "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }


MANIFEST_PATH = "data/s3borgbackup/manifest.jsonl"


def odd_path(key: str) -> str:
    """Where an archive has the content of an object whose key no mount can show."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return f"data/s3borgbackup/objects/{digest[:32]}"


@dataclass(frozen=True)
class Repository:
    """A borg repository in a local folder, looked at with plain borg."""

    folder: Path
    passphrase: str = PASSPHRASE

    @classmethod
    def download(
        cls, bucket: Bucket, folder: Path, *, prefix: str = "", passphrase: str = PASSPHRASE
    ) -> Self:
        """A copy of the repository at `bucket:prefix`, made with boto3 alone; `folder` must not exist."""
        folder.mkdir(parents=True)
        return cls(bucket.download(folder, prefix), passphrase)

    def borg(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run borg and return its standard output; AssertionError with all it said unless it ends with 0."""
        base_folder = self.folder.with_name(self.folder.name + ".borg")
        base_folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["borg", *arguments],
            env=borg_environment(base_folder, self.passphrase),
            cwd=cwd or base_folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (
            f"borg {arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def check(self) -> None:
        """Every byte of the repository is read, decrypted and compared with its hash."""
        # Any non-zero exit code is damage: corruption ends with 1 here, borg's code for a warning elsewhere.
        self.borg("check", "--verify-data", str(self.folder))

    def archives(self) -> list[str]:
        """The archives' names, oldest first."""
        return self.borg("list", "--short", str(self.folder)).split()

    def paths(self, archive: str) -> list[str]:
        """The paths in an archive, as stored."""
        lines = self.borg("list", "--json-lines", f"{self.folder}::{archive}").splitlines()
        return [json.loads(line)["path"] for line in lines]

    def extract(self, archive: str, folder: Path) -> Path:
        """Extract a whole archive into a new folder; returns the folder."""
        folder.mkdir(parents=True)
        self.borg("extract", f"{self.folder}::{archive}", cwd=folder)
        return folder

    def contents(self, archive: str, source_folder: Path, folder: Path) -> dict[str, bytes]:
        """The objects in an archive (key → content), by extracting it into `folder`.

        `source_folder` is where the source was mounted (`<DATA_DIR>/source`). Besides, the archive holds the
        manifest, and the objects that no mount shows.
        """
        extracted = tree(self.extract(archive, folder))
        start = str(source_folder).lstrip("/") + "/"
        found = {path.removeprefix(start): body for path, body in extracted.items() if path.startswith(start)}
        others = {path: body for path, body in extracted.items() if not path.startswith(start)}
        for line in others.pop(MANIFEST_PATH, b"").splitlines():
            entry = json.loads(line)
            if (path := odd_path(entry["key"])) in others:
                found[entry["key"]] = others.pop(path)
        assert not others, f"something outside {start} in {archive}"
        return found

    def manifest(self, archive: str) -> dict[str, dict[str, Any]]:
        """An archive's manifest: what it has of each key."""
        lines = self.borg("extract", "--stdout", f"{self.folder}::{archive}", MANIFEST_PATH).splitlines()
        return {entry["key"]: entry for entry in map(json.loads, lines)}


PATCHED = """\
import os, sys
sys.stdout.reconfigure(line_buffering=True)
sys.path.insert(0, {folder!r})
import backup
{statement}
os._exit(backup.main(sys.argv[1:], os.environ))
"""


def patch_backup(monkeypatch: pytest.MonkeyPatch, folder: Path, statement: str) -> None:
    """Has a test run backup.py with other constants, which wait for less than they may among users."""
    script = folder / "patched.py"
    script.write_text(PATCHED.format(folder=str(BACKUP.parent), statement=statement))
    monkeypatch.setattr(sys.modules[__name__], "BACKUP", script)


OLD_SECONDS = 4  # twice what clocks may be apart


def let_age(bucket: Bucket) -> None:
    """Returns when what is in the bucket is certainly older than a run that begins then."""
    pages = bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name)
    newest = max(entry["LastModified"] for page in pages for entry in page["Contents"])
    wait_until(lambda: time.time() - newest.timestamp() > OLD_SECONDS, 10, "the objects are old")


# ------------------------------------------------------------------------------------------ Running backup.py


def settings(
    server: Server,
    folder: Path,
    source: str,
    targets: Mapping[str, str | Mapping[str, Any]],
    *,
    source_identity: Identity = READER,
    target_identity: Identity = WRITER,
    **variables: str,
) -> dict[str, str]:
    """The whole environment for a run of backup.py that keeps to `folder`.

    `source` is `bucket` or `bucket:prefix`; `targets` maps a name to such a path or to fields of its entry in
    TARGETS (`{"path": …, "prune": …}`). Each target's compression is `lz4` unless given: the default is slow.
    `variables` are added as they are.
    """
    secrets = {
        "access_key_id": target_identity.access_key_id,
        "secret_access_key": target_identity.secret_access_key,
        "borg_passphrase": PASSPHRASE,
    }
    for name in ("home", "config", "cache", "data", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
        "DATA_DIR": str(folder / "data"),
        "PYTHONDEVMODE": "1",  # see Backup.wait
        "SOURCE_ENDPOINT": server.endpoint,
        "SOURCE_PATH": source,
        "SOURCE_ACCESS_KEY_ID": source_identity.access_key_id,
        "SOURCE_SECRET_ACCESS_KEY": source_identity.secret_access_key,
        "TARGETS": json.dumps({name: _target(server, entry) for name, entry in targets.items()}),
        "TARGET_SECRETS": json.dumps(dict.fromkeys(targets, secrets)),
        **variables,
    }


def _target(server: Server, entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """An entry in TARGETS."""
    fields = {"path": entry} if isinstance(entry, str) else entry
    return {"endpoint": server.endpoint, "compression": "lz4", **fields}


def with_target(environment: Mapping[str, str], name: str, **fields: Any) -> dict[str, str]:
    """The environment with these fields of one target in TARGETS changed; None removes a field."""
    return _with_fields(environment, "TARGETS", name, fields)


def with_target_secrets(environment: Mapping[str, str], name: str, **fields: Any) -> dict[str, str]:
    """The environment with these fields of one target in TARGET_SECRETS changed; None removes a field."""
    return _with_fields(environment, "TARGET_SECRETS", name, fields)


def _with_fields(
    environment: Mapping[str, str], variable: str, name: str, fields: Mapping[str, Any]
) -> dict[str, str]:
    entries = json.loads(environment[variable])
    merged = {**entries.get(name, {}), **fields}
    entries[name] = {key: value for key, value in merged.items() if value is not None}
    return {**environment, variable: json.dumps(entries)}


@dataclass
class _Output:
    """The lines of a process, standard output and error together, collected by a thread as they come."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        assert isinstance(self.process.stdout, io.TextIOBase)
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def finish(self, timeout_seconds: float) -> None:
        """Wait for the end of the output. A grandchild that kept the pipe open does not hold us for ever."""
        self._thread.join(timeout_seconds)


@dataclass(frozen=True)
class Result:
    """How a run of backup.py ended."""

    exit_code: int
    lines: Sequence[str]
    duration_seconds: float

    @property
    def output(self) -> str:
        """All lines, standard output and error together."""
        return "\n".join(self.lines)

    def expect(self, exit_code: int) -> Self:
        """Fail with the whole output unless the exit code is this one."""
        assert self.exit_code == exit_code, (
            f"exit code {self.exit_code}, expected {exit_code}:\n{self.output}"
        )
        return self


class Backup:
    """backup.py at work: its lines as they come, signals, and its end. Leaving the `with` block ends it."""

    def __init__(self, environment: Mapping[str, str], *arguments: str, through: Sequence[str] = ()) -> None:
        """Start it with this environment and nothing else of ours; `through` is a command to execute it."""
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            [*through, sys.executable, str(BACKUP), *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="surrogateescape",
            start_new_session=True,
            preexec_fn=terminate_with_parent,
        )
        self._output = _Output(self.process)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    @property
    def lines(self) -> list[str]:
        """The output up to now."""
        return list(self._output.lines)

    def wait_for_line(self, text: str, timeout_seconds: float = 60) -> str:
        """The first line that contains `text`, as soon as it is there; AssertionError when it cannot come."""

        def found() -> list[str]:
            ended = self.process.poll() is not None
            if ended:
                self._output.finish(5)
            matching = [line for line in self.lines if text in line]
            assert matching or not ended, f"ended without {text!r}:\n" + "\n".join(self.lines)
            return matching

        try:
            return wait_until(found, timeout_seconds, f"a line with {text!r}")[0]
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.lines)) from None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to backup.py alone, as `docker stop` does."""
        self.process.send_signal(number)

    def send_signal_to_group(self, number: signal.Signals) -> None:
        """Send a signal to backup.py and the children in its process group, as Ctrl-C does."""
        os.killpg(self.process.pid, number)

    def wait(self, timeout_seconds: float = 120) -> Result:
        """Wait for the end; AssertionError with the output, and backup.py killed, when it does not come.

        A warning of Python's is one, too: `settings` has it run in development mode.
        """
        try:
            exit_code = self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.close()
            raise AssertionError(
                f"still running after {timeout_seconds} s:\n" + "\n".join(self.lines)
            ) from None
        # A process killed by signal N is 128+N to a shell and to Docker.
        exit_code = 128 - exit_code if exit_code < 0 else exit_code
        duration_seconds = time.monotonic() - self._started
        self._output.finish(5)
        warnings = [line for line in self.lines if PYTHONS_WARNING.search(line)]
        assert not warnings, f"Python warns: {warnings}"
        return Result(exit_code, self.lines, duration_seconds)

    def close(self) -> None:
        """End it: first in an orderly way, after 10 s by force."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_backup(environment: Mapping[str, str], *arguments: str, timeout_seconds: float = 120) -> Result:
    """Run backup.py to its end."""
    with Backup(environment, *arguments) as backup:
        return backup.wait(timeout_seconds)
