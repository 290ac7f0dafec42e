"""Shows s3borgbackup at work, on this machine alone: `tests/demo` installs what it needs and starts it.

It starts a small S3 server with sample data, backs the sample bucket up to two other buckets, changes
something, backs up again, and restores an object the way you would, and the whole bucket. Every command is
shown before it runs.
The exit code is 0 only when what was restored is what was there. What it makes is in a temporary folder,
which is removed at the end, after Ctrl-C too.
"""

import contextlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from helpers import (
    BACKUP,
    PASSPHRASE,
    Bucket,
    leftovers,
    remove_leftovers,
    sample_objects,
    seal_environment,
    settings,
)
from servers import WRITER, SeaweedFS, terminate_with_parent

OBJECT_COUNT = 300
LARGE_OBJECT_BYTES = 50 * 1024 * 1024
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDING_SECONDS = 60

CHANGED_KEY = "Straße/čeština/日本語.txt"
DELETED_KEY = "plain.txt"
ADDED_KEY = "added/after the first backup.txt"
# No folder can hold the first one beside the second one.
ODD_KEY, BESIDE_KEY = "notes", "notes/today.txt"
PAGE_KEY = "site/index.html"
PAGE = {
    "ContentType": "text/html; charset=utf-8",
    "CacheControl": "max-age=3600",
    "Metadata": {"author": "me"},
}


class DemoFailed(Exception):
    """Something was not as promised."""


def say(text: str = "") -> None:
    """A line to the reader."""
    print(text, flush=True)


def step(title: str) -> None:
    """A heading."""
    say(f"\n=== {title}")


def run(environment: Mapping[str, str], *command: str, cwd: Path | None = None) -> list[str]:
    """Show and run a command, show its output and return it; raises DemoFailed unless it ends with 0."""
    say(f"$ {shlex.join(command)}")
    program = [sys.executable, str(BACKUP), *command[1:]] if command[0] == BACKUP.name else [*command]
    process = subprocess.Popen(
        program,
        env=dict(environment),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        # Ctrl-C is for us; we pass it on below, once.
        start_new_session=True,
        preexec_fn=terminate_with_parent,
    )
    assert process.stdout
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            say(f"    {lines[-1]}")
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(ENDING_SECONDS)
    if process.returncode:
        raise DemoFailed(f"{command[0]} ended with exit code {process.returncode}")
    return lines


def expect(right: bool, promise: str) -> None:
    """Say that a promise holds, or end the demo."""
    if not right:
        raise DemoFailed(f"NOT so: {promise}")
    say(f"  ok: {promise}")


@contextlib.contextmanager
def workplace(purpose: str = "demo") -> Iterator[Path]:
    """A temporary folder; at the end what still runs or is mounted there is ended and the folder removed."""
    folder = Path(tempfile.mkdtemp(prefix=f"s3borgbackup-{purpose}-"))
    try:
        yield folder
    finally:
        remove_leftovers(folder)
        # Never delete through a mount that is still there.
        if not leftovers(folder):
            shutil.rmtree(folder)


@contextlib.contextmanager
def target_mounted(environment: Mapping[str, str], name: str) -> Iterator[Path]:
    """The target as a folder, by the commands that a user types."""
    run(environment, "backup.py", "mount", name)
    try:
        yield Path(environment["DATA_DIR"]) / name
    finally:
        run(environment, "backup.py", "umount", name)


def make_sample_data(source: Bucket) -> None:
    """A few hundred objects with unusual names, and a large one."""
    objects = sample_objects(7, OBJECT_COUNT, largest_bytes=200_000)
    objects["videos/large.bin"] = random.Random(7).randbytes(LARGE_OBJECT_BYTES)
    source.put(objects)
    source.put({ODD_KEY: b"a file and a folder, for S3\n"})  # first: SeaweedFS would drop it if it came last
    source.put({BESIDE_KEY: b"below it\n"})
    source.client.put_object(
        Bucket=source.name, Key=PAGE_KEY, Body=b"<h1>Hello</h1>", Tagging="team=web", **PAGE
    )
    total = sum(map(len, objects.values()))
    counted = f"{len(objects) + 3} objects, {total / 1e6:.0f} MB"
    say(f"The bucket {source.name!r} has {counted}; one of them is 50 MB.")
    say("Some names are unusual: blanks, UTF-8, '+', '%', a line break, 200 characters.")
    say(f"{ODD_KEY!r} beside {BESIDE_KEY!r} is possible on S3 only; {PAGE_KEY!r} has headers and a tag.")


def show_settings(environment: Mapping[str, str]) -> None:
    """The configuration, without secrets."""
    say("All configuration is in environment variables (secrets are not shown):")
    for name, value in environment.items():
        if name.startswith(("SOURCE", "TARGETS", "DATA_DIR")) and "SECRET" not in name:
            say(f"    {name}={value}")
    say("DATA_DIR is only for this demo: in the container, buckets appear below /data.")


def change(source: Bucket) -> None:
    """What happens in a bucket between two backups."""
    source.put({CHANGED_KEY: b"the second version\n", ADDED_KEY: b"a new object\n"})
    source.delete(DELETED_KEY)
    say(f"Changed {CHANGED_KEY!r}, added {ADDED_KEY!r}, deleted {DELETED_KEY!r}.")


def restore(environment: Mapping[str, str], folder: Path, versions: Mapping[str, bytes]) -> None:
    """Mount the first target, list its archives, extract one object from each, compare, unmount.

    `versions` has what to find, in the archives' order.
    """
    # What a person would export in the shell before typing borg commands.
    borg_environment = {
        **{name: environment[name] for name in ("PATH", "HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")},
        "BORG_PASSPHRASE": PASSPHRASE,
    }
    object_path = f"{environment['DATA_DIR']}/source/{CHANGED_KEY}".lstrip("/")
    with target_mounted(environment, "target-first") as repository:
        say("$ export BORG_PASSPHRASE=…")
        run(borg_environment, "borg", "list", str(repository))
        archives = run(borg_environment, "borg", "list", "--short", str(repository))
        expect(len(archives) == len(versions), f"there are {len(versions)} archives")
        for archive, (description, content) in zip(archives, versions.items(), strict=True):
            destination = folder / "restored" / archive
            destination.mkdir(parents=True)
            say(f"$ cd {destination}")
            run(borg_environment, "borg", "extract", f"{repository}::{archive}", object_path, cwd=destination)
            restored = (destination / object_path).read_bytes()
            expect(restored == content, f"{CHANGED_KEY!r} is restored, byte for byte: {description}")


def restore_bucket(environment: Mapping[str, str], source: Bucket, restored: Bucket) -> None:
    """Restore the newest archive into an empty bucket, and compare that with the source."""
    run(environment, "backup.py", "restore", "first", "--to-bucket", restored.name)
    expect(restored.contents() == source.contents(), "it has the source's objects, byte for byte")
    expect(ODD_KEY in restored.sizes(), f"{ODD_KEY!r} beside {BESIDE_KEY!r}, too")
    head = restored.client.head_object(Bucket=restored.name, Key=PAGE_KEY)
    say(f"  {PAGE_KEY!r}: {', '.join(f'{name}: {head[name]}' for name in PAGE)}")
    expect(all(head[name] == value for name, value in PAGE.items()), "its headers are back")
    tags = restored.client.get_object_tagging(Bucket=restored.name, Key=PAGE_KEY)["TagSet"]
    expect(tags == [{"Key": "team", "Value": "web"}], "and its tag")


def demonstrate(server: SeaweedFS, folder: Path) -> None:
    """The story that the reader sees."""
    source = Bucket(server, "my-bucket").create()
    restored, *_ = [Bucket(server, name).create() for name in ("restored", "backups-one", "backups-two")]
    step("1. A bucket with data, on an S3 server of our own")
    say(f"SeaweedFS serves S3 at {server.endpoint}, on this machine only.")
    make_sample_data(source)

    step("2. The configuration: one source, two targets")
    targets = {
        "first": {
            "path": "backups-one",
            "compression": "auto,zstd,22",
            "prune": "--keep-daily=7 --keep-last=3",
        },
        "second": {"path": "backups-two:some/prefix", "compression": "lz4"},
    }
    keys = {
        "RESTORE_ACCESS_KEY_ID": WRITER.access_key_id,
        "RESTORE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
    }
    environment = settings(
        server, folder, source.name, targets, BACKUP_LABEL="demo", PYTHONDEVMODE="", **keys
    )
    show_settings(environment)
    say("The source's key may only read. Is every store usable?")
    run(environment, "backup.py", "check-config")

    step("3. The first backup: new repositories are made, everything is stored")
    original = source.get(CHANGED_KEY)
    run(environment, "backup.py")

    step("4. Something changes, and a second backup: only what is new is stored")
    change(source)
    run(environment, "backup.py")

    step("5. Restoring by hand: mount the target, use plain borg, unmount")
    versions = {"the first version": original, "the second version": source.get(CHANGED_KEY)}
    restore(environment, folder, versions)

    step("6. Restoring the bucket: every key, every byte, every header")
    restore_bucket(environment, source, restored)

    step("7. Nothing is left running or mounted")
    expect(not leftovers(folder), "no process, no mount")


def stop(number: int, _frame: FrameType | None) -> None:
    """End in an orderly way. A second signal must not cut the cleaning up short."""
    for name in STOP_SIGNALS:
        # Not SIG_IGN, which the commands of the cleaning up would inherit.
        signal.signal(name, lambda *_: None)
    sys.exit(128 + number)


def main() -> int:
    """Run the demo; the exit code is 0 only when everything was as promised."""
    seal_environment()
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        with workplace() as folder, SeaweedFS() as server:
            demonstrate(server, folder)
    except DemoFailed as failure:
        say(f"\nThe demo failed: {failure}")
        return 1
    say("\nAll as promised. The server and its data are gone again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
