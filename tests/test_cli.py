"""Command line: what can be typed, and exit codes that say what happened."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import backup
from helpers import BACKUP, as_pid_1, wait_until

README = (BACKUP.parent / "README.md").read_text(encoding="utf-8")
PATH = {"PATH": os.environ["PATH"]}


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program with an empty environment."""
    command = [sys.executable, str(BACKUP), *arguments]
    return subprocess.run(
        command, env={**PATH, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_names_every_command_and_every_variable(word: str) -> None:
    result = call(word)
    assert result.returncode == 0
    assert [
        command for command in backup.COMMANDS if not re.search(rf"\n    {command}\s", result.stdout)
    ] == []
    assert [name for name in backup.VARIABLES if f"\n  {name} " not in result.stdout] == []
    assert len(max(result.stdout.splitlines(), key=len)) <= 110


def test_version() -> None:
    assert call("--version").stdout.startswith("s3borgbackup ")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["rum"], "did you mean run?"),
        (["check-conifg"], "did you mean check-config?"),
        (["mount"], "required: NAME"),
        (["run", "--fast"], "unrecognized arguments: --fast"),
        (["check-config", "first"], "unrecognized arguments: first"),
        (["lits"], "did you mean list?"),
        (["list", "--jsn"], "unrecognized arguments: --jsn (see `list --help`)"),
        (["list", "--json=1"], "ignored explicit argument"),
        (["key-export"], "required: NAME"),
        (["restore", "first", "--to", "x", "--to-bucket", "y"], "not allowed with"),
        (["borg", "first"], "a command of borg has to follow"),
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


def test_without_any_configuration_there_is_a_friendly_start() -> None:
    """It says what this is and what to do first; data of a program never comes before it."""
    result = call()
    assert result.returncode == 78
    assert "Three steps" in result.stdout
    assert all(word in result.stdout for word in ("example.env", "check-config", "--env-file", "README.md"))
    assert all(line in README for line in ("cp example.env .env", "s3borgbackup check-config"))
    result = call("list")
    assert (result.returncode, result.stdout) == (78, "")
    assert "Three steps" in result.stderr
    assert "Three steps" not in call(SOURCE_PATH="bucket").stdout


@pytest.mark.parametrize("command", [name for name in backup.COMMANDS if name != "borg"])
def test_each_command_explains_itself(command: str) -> None:
    """What follows `borg NAME` is for borg to explain."""
    result = call(command, "--help")
    assert result.returncode == 0
    assert f"usage: {command}" in result.stdout


def test_another_program_takes_our_place() -> None:
    """`docker run ... s3borgbackup ash` gives a shell, with its environment and its exit code."""
    result = call("sh", "-c", "echo $GREETING $$; exit 7", GREETING="hello")
    assert result.returncode == 7
    assert result.stdout.startswith("hello ")


def test_a_program_with_the_name_of_a_command_does_not(tmp_path: Path) -> None:
    """`docker run ... s3borgbackup list` is ours, whatever the image holds; `borg` is, before a target."""
    for name in ("list", "info", "borg"):
        (tmp_path / name).write_text('#!/bin/sh\necho "the program $*"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for words in (["list"], ["info"], ["borg", "first", "list"]):
        assert "the program" not in call(*words, PATH=path).stdout
    assert call("borg", "list", "/data/x", PATH=path).stdout == "the program list /data/x\n"


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
