"""Command line: what can be typed, and exit codes that say what happened."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import BACKUP, skip_or_fail, wait_until

PATH = {"PATH": os.environ["PATH"]}


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program with an empty environment."""
    command = [sys.executable, str(BACKUP), *arguments]
    return subprocess.run(
        command, env={**PATH, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_names_every_command(word: str) -> None:
    result = call(word)
    assert result.returncode == 0
    assert all(f"\n  {command} " in result.stdout for command in ("run", "mount", "umount", "check-config"))


def test_version() -> None:
    assert call("--version").stdout.startswith("s3borgbackup ")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["rum"], "did you mean run?"),
        (["check-conifg"], "did you mean check-config?"),
        (["mount"], "takes one name"),
        (["umount", "a", "b"], "takes one name"),
        (["mount", "target-first", "--read-write"], "mount source"),
        (["run", "--fast"], "unknown option"),
        (["check-config", "first"], "takes no names"),
    ],
)
def test_wrong_usage_is_78_and_says_what_is_right(words: list[str], remedy: str) -> None:
    result = call(*words)
    assert result.returncode == 78
    assert remedy in result.stderr


def test_without_configuration_each_missing_variable_is_named() -> None:
    result = call()
    assert result.returncode == 78
    names = ("SOURCE_ENDPOINT", "SOURCE_PATH", "SOURCE_ACCESS_KEY_ID", "SOURCE_SECRET_ACCESS_KEY", "TARGETS")
    assert [name for name in names if f"{name}: is missing" not in result.stderr] == []


def test_another_program_takes_our_place() -> None:
    """`docker run ... s3borgbackup ash` gives a shell, with its environment and its exit code."""
    result = call("sh", "-c", "echo $GREETING $$; exit 7", GREETING="hello")
    assert result.returncode == 7
    assert result.stdout.startswith("hello ")


def as_pid_1(script: Path | str, *arguments: str) -> list[str]:
    """A command line that runs a Python program as PID 1 of a new PID namespace."""
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or not unshare:
        skip_or_fail("a PID namespace takes root and unshare(1)")
    return [
        str(unshare),
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        sys.executable,
        str(script),
        *arguments,
    ]


def test_as_pid_1_the_exit_code_is_passed_on() -> None:
    command = as_pid_1(BACKUP, "check-config")
    result = subprocess.run(command, env=PATH, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 78
    assert "SOURCE_ENDPOINT: is missing" in result.stderr


def test_as_pid_1_signals_are_passed_on_and_orphans_reaped(tmp_path: Path) -> None:
    """PID 1 gets every process whose parent has ended, and no default signal actions."""
    worker = tmp_path / "worker"
    worker.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        os._exit(0)  # an orphan once its parent is gone\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "pids = lambda: [pid for pid in os.listdir('/proc') if pid.isdigit()]\n"
        "def is_zombie(pid):\n"
        "    try:\n"
        "        return ' Z ' in open(f'/proc/{pid}/stat').read()\n"
        "    except OSError:\n"
        "        return False  # it was reaped while we looked\n"
        "while any(map(is_zombie, pids())):\n"
        "    time.sleep(0.02)\n"
        "print('reaped', flush=True)\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    init = tmp_path / "init"
    init.write_text(
        f"import os, sys\nsys.path.insert(0, {str(BACKUP.parent)!r})\nimport backup\n"
        f"backup.__file__ = {str(worker)!r}\nassert os.getpid() == 1\n"
        "sys.exit(backup.be_init([], os.environ))\n",
        encoding="utf-8",
    )
    with subprocess.Popen(as_pid_1(init), env=PATH, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "reaped\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: children.read_text(encoding="ascii").split(), 10, "unshare has its child")
        os.kill(int(children.read_text(encoding="ascii").split()[0]), 15)
        assert process.wait(timeout=20) == 5
