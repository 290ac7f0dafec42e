"""Processes: children are ended in order, their output is complete, and whatever hangs is given up."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import backup
from helpers import BACKUP, is_running, wait_until

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def shell(script: str, lines: list[str] | None = None) -> backup.Child:
    """A shell that runs `script`; its output goes to `lines`."""
    collected = lines if lines is not None else []
    return backup.Child(["sh", "-c", script], ENVIRONMENT, collected.append, collected.append)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill $$", 143)]
)
def test_exit_codes_are_a_shells(script: str, code: int) -> None:
    assert backup.run_to_end(shell(script), backup.Stop()) == code


def test_output_is_complete() -> None:
    """All lines are there when the process counts as ended."""
    lines: list[str] = []
    child = shell("i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done", lines)
    assert backup.run_to_end(child, backup.Stop()) == 0
    assert lines == [str(number) for number in range(2000)]


def test_a_stop_signal_ends_the_child_politely() -> None:
    lines: list[str] = []
    child = shell("trap 'echo released; exit 9' TERM; echo ready; while :; do sleep 0.05; done", lines)
    wait_until(lambda: "ready" in lines, 10, "the child is ready")
    stop = backup.Stop()
    stop.signals.append(signal.SIGTERM)
    with pytest.raises(backup.Stopped) as stopped:
        backup.run_to_end(child, stop)
    assert stopped.value.exit_code == 143
    assert lines[-1] == "released"


def test_a_second_stop_signal_ends_it_for_certain() -> None:
    lines: list[str] = []
    child = shell("trap '' TERM; echo ready; while :; do sleep 0.05; done", lines)
    wait_until(lambda: "ready" in lines, 10, "the child is ready")
    stop = backup.Stop()
    stop.signals += [signal.SIGINT, signal.SIGINT]
    with pytest.raises(backup.Stopped):
        backup.run_to_end(child, stop)
    assert not is_running(child.pid)


def test_a_child_does_not_outlive_us(tmp_path: Path) -> None:
    """After SIGKILL of ours no borg may go on writing."""
    program = (
        "import backup, os, time\n"
        "child = backup.Child(['sleep', '600'], dict(os.environ), print, print)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    folder = Path(backup.__file__).parent
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(pid), 10, "the child ends with its parent")


def test_a_missing_program_is_an_error_with_its_name() -> None:
    with pytest.raises(backup.BackupError, match="cannot start no-such-program"):
        backup.Child(["no-such-program"], ENVIRONMENT, print, print)


def test_what_hangs_is_given_up() -> None:
    start = time.monotonic()
    with pytest.raises(backup.BackupError, match="the mount: no answer within 1 s"):
        backup.within(1, "the mount", lambda: time.sleep(60))
    assert time.monotonic() - start < 10


def test_what_fails_in_the_background_raises_its_own_error() -> None:
    with pytest.raises(FileNotFoundError):
        backup.within(5, "stat", lambda: os.stat("/nonexistent"))


def test_one_failure_side_by_side_does_not_hide_the_others() -> None:
    def fail() -> int:
        raise backup.BackupError("broken")

    first, second = backup.side_by_side([fail, lambda: 2], backup.Stop())
    assert isinstance(first, backup.BackupError)
    assert second == 2


def test_children_see_no_secrets_of_ours() -> None:
    environ = {"PATH": "/bin", "TARGET_SECRETS": "x", "SOURCE_SECRET_ACCESS_KEY": "y", "BORG_PASSPHRASE": "z"}
    assert backup.minimal_environment(environ, ()) == {"PATH": "/bin", "LC_ALL": "C.UTF-8"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain ü", "plain ü"), ("a\nb", "a\\nb"), ("\x1b[31m", "\\x1b[31m"), ("\udcff", "\\udcff")],
)
def test_a_line_stays_one_line(text: str, shown: str) -> None:
    """Object keys may hold line ends and terminal control characters."""
    assert backup.printable(text) == shown


def test_on_a_terminal_progress_is_one_live_line() -> None:
    """Of whoever spoke last, no longer than the terminal is wide; an ordinary line ends it."""
    script = (
        "import backup\n"
        "console = backup.Console(debug=False)\n"
        "console.progress('first', '10 objects')\n"
        "console.progress('second', '7 objects: ' + 'x' * 500)\n"
        "console.info('first', 'done')\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(BACKUP.parent)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs) as process:
        assert process.wait(30) == 0
    os.close(theirs)
    shown = os.read(ours, 10_000).decode().split("\r\033[K")
    os.close(ours)
    assert shown[1].rstrip() == "[first] 10 objects"
    assert shown[2].startswith("[second] 7 objects: xxx")
    assert len(shown[2].rstrip()) == 79
    assert shown[-1].partition("\n")[0].strip() == "[first] done"


@pytest.fixture
def writing() -> Iterator[Callable[[int], None]]:
    """Writes as many bytes, in this process, which the mount below takes for its tigrisfs."""
    with open(os.devnull, "wb", buffering=0) as null:
        yield lambda count: [null.write(bytes(100_000)) for _ in range(count // 100_000)]


@pytest.fixture
def mount(tmp_path: Path) -> backup.Mount:
    store = backup.Store("first", "http://127.0.0.1:1", "bucket", "", "key", "secret")
    child = backup.Child(["true"], ENVIRONMENT, print, print)
    child.pid = os.getpid()
    log = backup.TigrisLog("target-first", backup.Console(debug=False))
    return backup.Mount(None, store, tmp_path, child, log, backup.S3Client(store))


def test_an_answer_that_the_kernel_no_longer_awaits_is_no_complaint(mount: backup.Mount) -> None:
    """Seen at an unmount just after a file was closed."""
    mount.log.feed("writeMessage: no such file or directory [16 0 0 0 0 0 0 0 50 0 0 0 0 0 0 0]")
    assert not mount.log.is_complaining
    refused = "writeMessage: no such file or directory [16 0 0 0 251 255 255 255 50 0 0 0 0 0 0 0]"
    mount.log.feed(refused)  # -EIO, which nobody was told
    assert mount.log.reason == refused


FAILED = json.dumps({"level": "warn", "message": "Failed to flush part 0 of object data/0/1: RequestError"})


def test_an_upload_that_is_tried_in_vain_is_no_progress(
    mount: backup.Mount, writing: Callable[[int], None]
) -> None:
    meter = mount.meter(900)
    values = [meter()]
    for _ in range(20):
        writing(20_000_000)
        values.append(meter())
        mount.log.feed(FAILED)
        values.append(meter())
    assert max(values[2:]) < values[1] + 1


def test_what_a_slow_line_sends_after_an_outage_is_progress(
    mount: backup.Mount, writing: Callable[[int], None]
) -> None:
    """During it TigrisFS complains again and again without having sent anything."""
    meter, sent = mount.meter(900), 3_000_000
    meter()
    writing(sent)
    before = meter()
    for _ in range(200):
        mount.log.feed(FAILED)
        meter()
    writing(sent + 100_000)
    assert meter() >= before + 1
