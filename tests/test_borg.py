"""Borg: what its exit codes and log lines mean, and command lines that say what is meant."""

import fnmatch
import json
import subprocess
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import pytest

import backup
from helpers import borg_environment

STORE = backup.Store("first", "http://127.0.0.1:1", "bucket", "", "key-id", "key-secret")
TARGET = backup.Target("first", STORE, "pass-phrase", "repokey-blake2", False, "lz4", ("--keep-daily=7",), 10)
REPOSITORY = Path("/data/target-first")
COMMANDS = {
    "create": backup.borg_create(TARGET, "label", REPOSITORY, "comment"),
    "prune": backup.borg_prune(TARGET, "label", REPOSITORY),
    "compact": backup.borg_compact(TARGET, REPOSITORY),
}


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (0, backup.Verdict.OK),
        (1, backup.Verdict.WARNING),
        (100, backup.Verdict.WARNING),
        (107, backup.Verdict.WARNING),
        (127, backup.Verdict.WARNING),
        (106, backup.Verdict.WARNING),
        (2, backup.Verdict.FAILURE),
        (52, backup.Verdict.FAILURE),
        (128, backup.Verdict.FAILURE),
        (143, backup.Verdict.FAILURE),
    ],
)
def test_exit_codes(code: int, meaning: backup.Verdict) -> None:
    assert backup.verdict(code) is meaning


@pytest.mark.parametrize("command", COMMANDS)
def test_no_secret_is_on_a_command_line(command: str) -> None:
    assert not [
        word for word in COMMANDS[command] if "pass-phrase" in word or word in ("key-id", "key-secret")
    ]


def test_create_asks_s3_for_nothing_that_costs_a_request() -> None:
    """Extended attributes, ACLs and flags cost a HEAD request for each object."""
    assert {"--noxattrs", "--noacls", "--noflags"} < set(COMMANDS["create"])
    assert "/data/target-first::label-{now:%Y-%m-%dT%H:%M:%S}" in COMMANDS["create"]


@pytest.mark.parametrize(
    ("archive", "ours"),
    [
        ("label-2026-11-23T12:00:00", True),
        ("label-2026-11-23T12:00:00.checkpoint", True),
        ("label-other-2026-11-23T12:00:00", False),
        ("label2-2026-11-23T12:00:00", False),
        ("my-label-2026-11-23T12:00:00", False),
    ],
)
def test_prune_catches_this_labels_archives_only(archive: str, ours: bool) -> None:
    pattern = COMMANDS["prune"][COMMANDS["prune"].index("--glob-archives") + 1]
    assert fnmatch.fnmatchcase(archive, pattern) == ours


def log_of(*entries: dict[str, object], stopped: bool = False) -> backup.BorgLog:
    """A log that has read these entries."""
    stop = backup.Stop()
    if stopped:
        stop.signals.append(15)
    log = backup.BorgLog("target-first", backup.Console(debug=False), stop)
    for entry in entries:
        log.feed(json.dumps(entry))
    return log


def message(level: str, text: str, msgid: str = "") -> dict[str, object]:
    """One of borg's log messages."""
    return {"type": "log_message", "levelname": level, "message": text, "msgid": msgid, "name": "borg"}


@pytest.mark.parametrize(
    ("text", "msgid"),
    [
        ("data/source/x: read: [Errno 5] Input/output error: 'x'", "BackupIOError"),
        ("data/source/x: open: [Errno 13] Permission denied: 'x'", "BackupPermissionError"),
        ("data/source/x: read: [Errno 2] No such file", "BackupFileNotFoundError"),
    ],
)
def test_what_borg_could_not_read_is_no_warning_where_our_own_client_tries_next(
    capsys: pytest.CaptureFixture[str], text: str, msgid: str
) -> None:
    """That is, where borg is fed; elsewhere nobody else would tell of it."""
    assert log_of(message("WARNING", text, msgid)).warnings.count == 1
    assert "data/source/x" in capsys.readouterr().err
    told = []
    log = backup.BorgLog("target-first", backup.Console(debug=False), backup.Stop(), told.append)
    log.feed(json.dumps(message("WARNING", text, msgid)))
    log.feed('{"type": "fed_status", "number": 7, "status": "E"}')
    assert log.warnings.count == 0
    assert capsys.readouterr().err == ""
    assert told == [{"type": "fed_status", "number": 7, "status": "E"}]


def test_the_hard_link_note_is_explained_and_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    note = (
        "Failed to securely erase old repository config file (hardlinks not supported). Old repokey data, ..."
    )
    assert log_of(message("WARNING", note)).warnings.count == 0
    output = capsys.readouterr()
    assert "harmless" in output.out
    assert output.err == ""


def test_a_tracebacks_last_line_is_the_reason() -> None:
    traceback = (
        "Traceback (most recent call last):\nOSError: [Errno 28] No space left on device\n\nPlatform: x"
    )
    log = log_of(message("ERROR", "Local Exception", "Exception"), message("ERROR", traceback))
    assert log.reason(2) == "OSError: [Errno 28] No space left on device"


def test_without_words_the_exit_code_is_the_reason() -> None:
    assert log_of().reason(7) == "it ended with 7"


def test_what_borg_says_while_it_is_stopped_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    log_of(message("ERROR", "Received SIGTERM"), stopped=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("configured", "must_match", "actual", "refused"),
    [
        ("repokey-blake2", False, "repokey-blake2", False),
        ("repokey-blake2", False, "repokey", False),
        ("repokey-blake2", True, "repokey", True),
        ("repokey-blake2", False, "none", True),
        ("repokey-blake2", False, "authenticated", True),
        ("none", True, "none", False),
    ],
)
def test_encryption_is_what_was_asked_for(
    configured: str, must_match: bool, actual: str, refused: bool
) -> None:
    """Plain text is never accepted unasked; a mode asked for by name has to be the repository's."""
    target = backup.Target("first", STORE, "x", configured, must_match, "lz4", (), None)
    with pytest.raises(backup.BackupError) if refused else nullcontext():
        backup.expect_encryption(target, actual)


def test_a_passphrase_of_any_length_reaches_borg_whole(tmp_path: Path) -> None:
    """Borg makes a repository with it, and opens that with the same from its environment or a command."""
    passphrase = "ü $'\"# " * 50_000
    (tmp_path / "passphrase").write_text(passphrase, encoding="utf-8")
    environment = {**borg_environment(tmp_path), "BORG_REPO": str(tmp_path / "repository")}
    del environment["BORG_PASSPHRASE"]
    with backup.passphrase_file(passphrase) as fd:
        own = {**environment, "BORG_PASSPHRASE_FD": str(fd)}
        subprocess.run(
            ["borg", "init", "-e", "repokey-blake2"], env=own, pass_fds=[fd], check=True, timeout=120
        )
    own = {**environment, "BORG_PASSCOMMAND": f"cat {tmp_path}/passphrase"}
    subprocess.run(["borg", "list"], env=own, check=True, timeout=120)


@pytest.mark.parametrize(
    ("names", "complete", "state"),
    [
        ([], True, backup.RepositoryState.EMPTY),
        ([".s3borgbackup-probe-12"], True, backup.RepositoryState.EMPTY),
        (["README", "config", "data/0/1", "hints.1", "index.1"], True, backup.RepositoryState.READY),
        (["README", "config", "data/0/1"], False, backup.RepositoryState.READY),
        (["README"], True, backup.RepositoryState.UNFINISHED),
        (["README", "config", "data/0/0"], True, backup.RepositoryState.UNFINISHED),
        # Left by a crash, under the names that borg gives to what it is going to rename.
        (["README", "config-_a1b2c3d.tmp"], True, backup.RepositoryState.UNFINISHED),
        (["README", "config", "data/0/0", "nonce-q_1ze0vv.tmp"], True, backup.RepositoryState.UNFINISHED),
        (["README", "config-backup.tmp", "x.tmp"], True, backup.RepositoryState.FOREIGN),
        (["README", "data/0/0", "index.1"], True, backup.RepositoryState.UNFINISHED),
        # Something was archived since, and its index was lost: borg makes a new one.
        (["README", "config", "data/0/0", "data/0/1", "data/0/2"], True, backup.RepositoryState.READY),
        (["README", "data/0/0", "data/0/1", "data/0/2"], True, backup.RepositoryState.FOREIGN),
        (["README", "photo.jpg"], True, backup.RepositoryState.FOREIGN),
        (["config"], True, backup.RepositoryState.FOREIGN),
        (["photo.jpg", "config"], True, backup.RepositoryState.FOREIGN),
    ],
)
def test_what_lies_where_a_repository_is_expected(
    names: list[str], complete: bool, state: backup.RepositoryState
) -> None:
    assert repository_state(dict.fromkeys(names, 100), complete) is state


def repository_state(sizes: Mapping[str, int], complete: bool) -> backup.RepositoryState:
    """What a preflight says of a place with these objects below its prefix."""
    now, following = datetime.now(UTC), None if complete else ("start-after", "x")
    keys = tuple(backup.S3Object(f"borg/{name}", size, now) for name, size in sizes.items())
    store = backup.Store("first", "http://127.0.0.1:1", "bucket", "borg", "id", "secret")
    return backup.Preflight("", keys, following, now).repository_state(store)


def test_much_data_is_never_taken_for_an_interrupted_init() -> None:
    sizes = {"README": 80, "config": 700, "data/0/0": 10**9}
    assert repository_state(sizes, complete=True) is backup.RepositoryState.READY


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (20_300_002, "20.3 MB"),
        (999_600_000, "1 GB"),
        (5e15, "5 PB"),
    ],
)
def test_sizes(number: float, text: str) -> None:
    assert backup.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23, "1.2 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert backup.duration(seconds) == text


@pytest.mark.parametrize(("ago", "seconds"), [(0.0, 1.0), (0.6, 0.4), (1.5, 0.0), (-3600.0, 1.0)])
def test_the_second_of_an_archives_name_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, ago: float, seconds: float
) -> None:
    """Two archives of one second would have the same name. A clock that was set back costs no more."""
    slept: list[float] = []
    monkeypatch.setattr(backup.time, "sleep", slept.append)
    monkeypatch.setattr(backup.time, "time", lambda: 1_767_225_600.0 + ago)
    named = datetime.fromtimestamp(1_767_225_600)  # noqa: DTZ006 - borg's names are in local time
    backup.outlast_name(f"my-label-{named:%Y-%m-%dT%H:%M:%S}")
    assert slept == [pytest.approx(seconds)]
