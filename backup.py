#!/usr/bin/env python3
"""Back up an S3 bucket to one or more S3 buckets with BorgBackup, the buckets mounted with TigrisFS.

What a run does: it reads the configuration from environment variables and reports every mistake in it at
once; asks S3 directly whether each store is there and usable; mounts the source read-only; and for each
target, several side by side, takes the lease that excludes other runs, makes the borg repository where it is
new, clears what crashed runs left, mounts the bucket, creates an archive while threads read the source ahead
of borg, compares it with what the source lists, prunes, compacts and checks where asked, unmounts, which
returns only when all is uploaded, compares the bucket with what borg wrote, and gives the lease back. At the
end whoever is to hear of the run is told. One failing target does not stop the others.
Nothing is waited for that makes no progress.
Whatever happens, mounts and processes are gone at the end, and the exit code tells how it went: 0 all well, 1
finished with warnings, 2 something failed, 75 another run was at work, 78 wrong configuration or usage, 128+N
stopped by signal N.

The sections of this file, each using only those above it:

    Constants       paths, and times with their reasons
    Errors          what a user is told: what happened, and what to do about it
    Configuration   environment variables -> Settings, or all the mistakes in them
    S3              request signing (pure), and a thin client for control requests, never for bulk data
    Catalog         the objects of a source, an archive or a bucket, in an SQLite file
    Lease           the right to write to a repository: an object renewed under S3's conditions
    Processes       console, stop signals, the one place that starts child processes, deadlines, progress
    Mounts          TigrisFS: memory, command line, log, mounting, unmounting
    Read-ahead      threads that read the source before borg does, and keep several borgs together
    Borg            command lines (pure), what borg's log lines, exit codes and locks mean, one runner
    Audit           whether the bucket holds what borg wrote, and the archive what the source lists
    Notifications   how a run went, for a health check, a webhook and Prometheus
    Repository      preflight, the lease, leftovers; a repository opened for writing, or to read from
    Check           whether a repository is sound: `borg check` in slices, and what was checked when
    Backup          one target, a whole run, the summary
    Operations      what a person does with backups: list, info, maintain, key-export, any borg command
    Verification    whether an archive is good: compared with the live bucket, and a sample byte for byte
    Restore         an archive, or a part of it, into a folder or a bucket
    Manual mode     mounts that outlive the command that made them
    Command line    the commands, `main`
"""

from __future__ import annotations

import argparse
import array
import base64
import bisect
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import email.header
import email.utils
import enum
import errno
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import hmac
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import tarfile
import tempfile
import termios
import threading
import time
import traceback
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor  # its import, which notes what forks do, must not be late
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, Protocol, TypeVar

# ------------------------------------------------------------------------------------------------ Constants

VERSION = "1.0.0"
DEFAULT_DATA_DIR = "/data"
MAX_NAME_BYTES = 200  # a mount point `target-NAME` must stay below the 255 bytes of a file name

# Everything that is waited for has a deadline. These are in seconds.
POLL_SECONDS = 0.2  # how soon a stop signal is noticed while a child is waited for
WARM_UP_SECONDS = 900  # how long whoever waits for a mount gives it to list a repository's folders
MOUNT_SECONDS = 120  # from the start of tigrisfs to a mount that can be listed, though a request may hang
LIST_SECONDS = 86400  # to list a whole bucket directly: each request has a deadline of its own
SETTLE_SECONDS = 30  # for what failed to be tried again: TigrisFS's SDK may wait 8 s before it says so
FIRST_PAUSE_SECONDS = 0.05  # between two looks at what is uploaded; each further one is twice as long
BUSY_SECONDS = 10  # how long an unmount is tried again while somebody still uses the mount
HURRIED_FLUSH_SECONDS = 3  # the same after a second stop signal, or a first one while nothing moves
TERMINATE_SECONDS = 4  # from SIGTERM to SIGKILL for borg, which needs 0.1 s to release its lock
FAILING_FLUSH_SECONDS = 4  # for the upload after a stop signal while S3 refuses or does not answer
CLEANUP_SECONDS = 2  # for S3 probes to be deleted again when a stop signal comes
PROGRESS_SECONDS = 30  # between two progress lines where there is no terminal
LIVE_SECONDS = 3  # how long a terminal shows the progress of somebody who says no more
LISTING_SECONDS = 10  # how long a listing may lag behind what was written, where a store is not S3 in this
LOCK_WAIT_SECONDS = 10  # how long a lock that somebody else holds is waited for
KILL_SECONDS = 3  # for a killed process to be gone: longer only while it hangs in a system call
TELL_SECONDS = 20  # for all that is told of a run at its end, with all tries: it must not hold the next one
TELL_STOPPED_SECONDS = 2  # the same after a stop signal: `docker stop` grants 10 s for everything
TELL_TRY_SECONDS = 5  # for one try

CONNECT_TIMEOUT_SECONDS = 8  # for one connection attempt
ANSWER_TIMEOUT_SECONDS = 30  # for one read from a connection: some servers take long to list
CONNECT_PATIENCE_SECONDS = (
    8  # how long connection errors are retried: a wrong endpoint is to be told in seconds
)
SERVER_PATIENCE_SECONDS = 120  # how long 429 and 5xx answers are retried: such storms pass
PROVEN_PATIENCE_SECONDS = 300  # how long either is retried in mid-run
MAX_BACKOFF_SECONDS = 8.0

# TigrisFS: a memory limit needs read-ahead sizes that fit it (`read_ahead_flags`).
SMALLEST_CACHE_MB, TARGET_CACHE_MB, SOURCE_CACHE_MB = 48, 128, 1000
LEAST_REST_MB = 236  # what one target's tigrisfs and borg, backup.py, and the source's beside its cache need
OWN_MB, FIXED_MB, BORG_MB = 40, 90, 100  # what backup.py needs, a tigrisfs beside its cache, and a borg
WHOLE_READ_BYTES = 1024 * 1024  # what TigrisFS reads in one request, and so of one version of an object
METADATA_TTL = "240h"  # nobody else writes: listings stay valid for as long as a run can last
# 1+2+4+8+15+15+... s: reads and listings survive some five minutes of errors, then borg names the object.
READ_RETRIES = ("--read-retry-attempts", "24", "--read-retry-max-interval", "15s")
WRITE_RETRY = "2s"
# For a whole request with its body. A read that is cut off goes on where it was, a part of an upload begins
# anew: on a line of 1 Mbit/s two parts of 5 MiB side by side take 84 s. borg writes one large file at a time.
# What hangs is repeated before the stall clock gives it up.
READ_TIMEOUT, WRITE_TIMEOUT = "90s", "100s"
PARALLEL_PARTS = "2"  # of one file; TigrisFS's default, 8, was no faster, and each took four times as long
WAKE_SECONDS = 0.5  # how long an fsync that missed its wake-up sleeps at most
NUDGE_BYTES = 400  # what that costs tigrisfs in reads and writes; seen: 240
RETRY_BYTES = 4 * 6_000_000  # before it complains it tries four times, each with a part of at most 5 MiB
REFUSED_TIMES = 5  # so often in a row a write is refused before it is taken as final
IDLE_BYTES_PER_SECOND = 20  # seen: 7
# How long is waited for what stands still though S3 answers us, or an eighth of STALL_TIMEOUT where that is
# more. Between two tries TigrisFS and its SDK sleep for 15 s at most.
SILENCE_SECONDS = 120
SHARED_BYTES = 512 * 1024 * 1024  # what the source may move for others before it answers somebody's read
ASK_SECONDS = 10  # between questions to S3 while TigrisFS complains
COMPLAINT_SECONDS = 15.0  # a complaint not older than this means that the trouble goes on
COMPLAINTS_A_MINUTE = 20  # TigrisFS repeats itself while it retries; more lines than that help nobody

HELD_BY_LEASE, HELD_BACK = "its lease is not certain", "it is far ahead of others"  # why a child is stopped

# Reading ahead.
READ_BYTES = 1024 * 1024  # for one read of a thread
SMALLEST_PIECE_BYTES, LARGEST_PIECE_BYTES = 1024 * 1024, 8 * 1024 * 1024
SMALLEST_PLACE_BYTES = 32 * 1024  # what an object takes of the window at least
SORTED_AT_ONCE = 10_000  # entries of a folder
WATCH_SECONDS = 0.05  # between looks at how far borg is in a large object
JOIN_SECONDS = 15  # how long a borg that is about to begin is waited for
HOLD_SECONDS = 30  # how long a fast borg is held for the sake of a slow one, at first

# Restoring.
RESTORE_THREADS = 32  # that write at the same time
WAITING_OBJECTS = 96  # small objects that may wait for a thread

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MNT_DETACH = 2  # <sys/mount.h>

EXIT_OK, EXIT_WARNINGS, EXIT_FAILURE = 0, 1, 2
EXIT_BUSY, EXIT_CONFIGURATION = 75, 78  # EX_TEMPFAIL and EX_CONFIG of <sysexits.h>

# --------------------------------------------------------------------------------------------------- Errors


TRY_AGAIN = "Run it again; LOG_LEVEL=debug tells more."
DISK_HELP = "The disk of /cache, /config or /tmp is full: make room, and run it again."
TRY_LATER = "The server is in trouble: run it again later."


class BackupError(Exception):
    """Something that a user must hear of: what happened to which store, and what to do about it."""

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, hint: str = "") -> None:
        """Takes one line that says what happened, and one that says what to do next."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The error as one line."""
        line = f"{self.message.rstrip('.')}. {self.hint}" if self.hint else self.message
        return " ".join(line.split())


class ConfigurationError(BackupError):
    """Mistakes in the configuration or in the command line, all of them at once."""

    exit_code = EXIT_CONFIGURATION

    def __init__(self, mistakes: Sequence[str]) -> None:
        """Takes one line for each mistake."""
        super().__init__("; ".join(mistakes))
        self.mistakes = tuple(mistakes)


class StillRunning(BackupError):
    """Another run works on the repository: nothing is broken, it was only not our turn."""

    exit_code = EXIT_BUSY


class S3Error(BackupError):
    """An answer of the S3 server that is not success, or no answer; `code` is S3's own."""

    def __init__(self, message: str, hint: str, status: int, code: str) -> None:
        """Takes the HTTP status (0 where there was no answer) and S3's error code beside the message."""
        super().__init__(message, hint)
        self.status = status
        self.code = code


class Stuck(BackupError):
    """What goes on cannot end well or at all: whatever takes part in it has to be killed."""


class Hung(Stuck):
    """A mount, or what works on it, does not move any more or is gone: with new mounts it may well end."""


class Stopped(BackupError):
    """A stop signal came."""

    def __init__(self, signum: int) -> None:
        """Takes the signal's number; the exit code is 128 more, as shells have it."""
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


# -------------------------------------------------------------------------------------------- Configuration

ENCRYPTION_MODES = (
    "repokey-blake2",
    "repokey",
    "keyfile-blake2",
    "keyfile",
    "authenticated-blake2",
    "authenticated",
    "none",
)
DEFAULT_ENCRYPTION = "repokey-blake2"
DEFAULT_COMPRESSION = "auto,zstd,22"
DEFAULT_LABEL = "backup"
DEFAULT_COMPACT_PERCENT = 10  # borg's own
DEFAULT_LEASE_SECONDS = 60
DEFAULT_STALL_SECONDS = 900
DEFAULT_READ_AHEAD_THREADS = 32
DEFAULT_PARALLEL_TARGETS = 4
DEFAULT_SHRINK_PERCENT = 50

LEASE_SECONDS = range(10, 3601)
WAIT_SECONDS = range(7 * 86400 + 1)
STALL_SECONDS = range(5, 86401)
# Below this, TigrisFS's read-ahead does not fit its cache: reads fail, and borg skips the objects.
MEMORY_MB = range(256, 1_000_001)
READ_AHEAD_THREADS = range(257)
PARALLEL_TARGETS = range(1, 65)
SHRINK_PERCENT = range(100)
NOTIFY_ON = ("failure", "warning", "always")
ABOUT = {
    "READ_AHEAD_THREADS": "; 0 turns reading ahead off",
    "SHRINK_WARNING": " (percent); 0 turns the warning off",
    "MEMORY_LIMIT_MB": "; TigrisFS and borg are not safe with less",
    "LEASE_TTL": " (seconds)",
    "LEASE_WAIT": " (seconds)",
    "STALL_TIMEOUT": " (seconds)",
}
Number = TypeVar("Number", int, None)

VARIABLES = (
    "BACKUP_LABEL",
    "SOURCE_ENDPOINT",
    "SOURCE_PATH",
    "SOURCE_ACCESS_KEY_ID",
    "SOURCE_SECRET_ACCESS_KEY",
    "SOURCE_REGION",
    "TARGETS",
    "TARGET_SECRETS",
    "DATA_DIR",
    "LOG_LEVEL",
    "LEASE_TTL",
    "LEASE_WAIT",
    "STALL_TIMEOUT",
    "AUDIT",
    "MEMORY_LIMIT_MB",
    "READ_AHEAD_THREADS",
    "PARALLEL_TARGETS",
    "SOURCE_METADATA",
    "SHRINK_WARNING",
    "HEALTHCHECK_URL",
    "NOTIFY_URL",
    "NOTIFY_ON",
    "METRICS_FILE",
    "LOG_FORMAT",
    "RESTORE_ENDPOINT",
    "RESTORE_ACCESS_KEY_ID",
    "RESTORE_SECRET_ACCESS_KEY",
    "RESTORE_REGION",
)
TARGET_KEYS = ("endpoint", "path", "prune", "encryption", "compression", "region", "compact", "check")
SECRET_KEYS = ("access_key_id", "secret_access_key", "borg_passphrase")


@dataclass(frozen=True)
class Store:
    """A bucket, or what lies below a prefix in it, and how to reach it. `target` is None for the source."""

    target: str | None
    endpoint: str
    bucket: str
    prefix: str  # without slashes at its ends; empty for the whole bucket
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    region: str | None = None

    @property
    def name(self) -> str:
        """What the store is called in output and on the command line: `source` or `target-NAME`."""
        return "source" if self.target is None else f"target-{self.target}"

    @property
    def location(self) -> str:
        """`bucket` or `bucket:prefix`, as the configuration has it."""
        return f"{self.bucket}:{self.prefix}" if self.prefix else self.bucket

    @property
    def key_prefix(self) -> str:
        """What every key of this store begins with."""
        return f"{self.prefix}/" if self.prefix else ""

    @property
    def mount_flags(self) -> tuple[str, ...]:
        """Further flags for TigrisFS."""
        return ()

    def setting(self, key: str) -> str:
        """Where a user finds the setting `key` (`path`, `access_key_id`, ...) of this store."""
        if self.target is None:
            return f"SOURCE_{key.upper()}"
        variable = "TARGET_SECRETS" if key in SECRET_KEYS else "TARGETS"
        return f'{variable} "{self.target}"."{key}"'


@dataclass(frozen=True)
class CheckPlan:
    """How much of a repository is checked, and how often at most."""

    seconds: int | None  # a slice of at most so long; None: everything, archives included
    every: str = ""  # one of CHECK_PERIODS; empty: in each run


@dataclass(frozen=True)
class Destination(Store):
    """A bucket that is restored into; until that is known, only how to reach it."""

    own: frozenset[str] = frozenset()  # the settings that it does not share with the source

    @property
    def name(self) -> str:
        """What it is called in output."""
        return "destination"

    def setting(self, key: str) -> str:
        """Where a user finds a setting."""
        if key == "path":
            return "--to-bucket"
        name = key.upper()
        return f"RESTORE_{name}" if key in self.own else f"RESTORE_{name} (now SOURCE_{name})"


@dataclass(frozen=True)
class Target:
    """A store that holds a borg repository, and how to treat that."""

    name: str
    store: Store
    passphrase: str = field(repr=False)
    encryption: str  # what a new repository gets
    must_match: bool  # the mode was asked for by name, so that an existing repository has to have it
    compression: str
    prune: tuple[str, ...]  # borg's options; empty: never prune
    compact_percent: int | None  # borg's threshold; None: do not compact
    check: CheckPlan | None = None  # None: a run checks nothing


@dataclass(frozen=True)
class Reporting:
    """Who is told how a run went, and the form of the output."""

    as_json: bool  # one JSON object a line
    healthcheck_url: str = field(repr=False)  # empty: none; it is a secret
    notify_url: str = field(repr=False)  # the same
    notify_on: str  # one of NOTIFY_ON
    metrics_file: str  # empty: none


@dataclass(frozen=True)
class Settings:
    """A configuration without mistakes."""

    label: str
    source: Store
    targets: tuple[Target, ...]
    data_dir: Path
    debug: bool
    lease_ttl_seconds: int
    lease_wait_seconds: int | None  # None: until it is known whether the holder is alive
    stall_seconds: int
    audit: bool
    memory_limit_mb: int | None  # None: what the container has
    read_ahead_threads: int  # 0: borg reads alone
    parallel_targets: int  # at most; fewer where memory is short
    source_metadata: bool  # whether objects' user metadata is archived
    shrink_percent: int  # an archive that lost more of its objects than this is suspicious; 0: none is
    destination: Destination  # how to reach the bucket that is restored into

    @property
    def stores(self) -> tuple[Store, ...]:
        """The source and all targets' stores."""
        return (self.source, *(target.store for target in self.targets))

    def require_source(self) -> None:
        """Raises ConfigurationError where a source is needed, and the configuration has none."""
        if mistakes := missing_settings(self.source):
            raise ConfigurationError(mistakes)

    def mount_point(self, store: Store) -> Path:
        """Where `store` is mounted: `/data/source` or `/data/target-NAME`."""
        return self.data_dir / store.name


def checked_settings(values: Mapping[str, str], mistakes: list[str], needs_source: bool = True) -> Settings:
    """The settings from plain values. Raises ConfigurationError with `mistakes` and all that are found.

    That the source's settings are missing is no mistake unless it is needed.
    """
    settings = parse_settings(values, mistakes)
    if needs_source:
        mistakes[:0] = missing_settings(settings.source)
    if mistakes:
        raise ConfigurationError(mistakes)
    return settings


def read_variables(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, str]:
    """The values of our variables, each from NAME or from the file that NAME_FILE names.

    Empty ones count as unset.
    """
    values = {}
    for name in VARIABLES:
        value, path = environ.get(name, ""), environ.get(f"{name}_FILE", "")
        if value and path:
            mistakes.append(f"{name}: given together with {name}_FILE; keep one of the two")
        elif path:
            try:
                value = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                mistakes.append(f"{name}_FILE: cannot read {path!r}: {reason}")
                value = UNREADABLE
        if value and value != UNREADABLE and not is_plain(value):
            mistakes.append(f"{name}: {NOT_PLAIN}")
            value = UNREADABLE
        if value:
            values[name] = value
    return values


# Stands for a value whose file could not be read: that is reported once, and not again as missing.
UNREADABLE = "\0"
NOT_PLAIN = "holds a NUL, or what is not UTF-8; write it without"


def is_plain(text: str) -> bool:
    """Whether a program can be given this text at all."""
    return not re.search(r"[\x00\ud800-\udfff]", text)


def parse_settings(values: Mapping[str, str], mistakes: list[str]) -> Settings:
    """Settings from plain values.

    What is wrong is appended to `mistakes`, and then the result means nothing.
    """
    label = values.get("BACKUP_LABEL", DEFAULT_LABEL)
    mistakes += [f"BACKUP_LABEL: {mistake}" for mistake in label_mistakes(label)]
    level = parse_choice(values, "LOG_LEVEL", ("info", "debug"), mistakes)
    parse_reporting(values, mistakes)
    data_dir = values.get("DATA_DIR", DEFAULT_DATA_DIR)
    if not data_dir.startswith("/") or re.search(r"[{}]|::", data_dir):
        mistakes.append("DATA_DIR: write an absolute path without braces, such as /data")
    source = parse_store(
        None, {key.lower(): values.get(f"SOURCE_{key}", "") for key in STORE_SUFFIXES}, mistakes
    )
    targets = parse_targets(values, mistakes)
    mistakes += overlap_mistakes([source, *(target.store for target in targets)])
    return Settings(
        label,
        source,
        targets,
        Path(data_dir),
        level == "debug",
        parse_number(values, "LEASE_TTL", DEFAULT_LEASE_SECONDS, LEASE_SECONDS, mistakes),
        parse_number(values, "LEASE_WAIT", None, WAIT_SECONDS, mistakes),
        parse_number(values, "STALL_TIMEOUT", DEFAULT_STALL_SECONDS, STALL_SECONDS, mistakes),
        parse_choice(values, "AUDIT", ("on", "off"), mistakes) == "on",
        parse_number(values, "MEMORY_LIMIT_MB", None, MEMORY_MB, mistakes),
        parse_number(values, "READ_AHEAD_THREADS", DEFAULT_READ_AHEAD_THREADS, READ_AHEAD_THREADS, mistakes),
        parse_number(values, "PARALLEL_TARGETS", DEFAULT_PARALLEL_TARGETS, PARALLEL_TARGETS, mistakes),
        parse_choice(values, "SOURCE_METADATA", ("false", "true"), mistakes) == "true",
        parse_number(values, "SHRINK_WARNING", DEFAULT_SHRINK_PERCENT, SHRINK_PERCENT, mistakes),
        parse_destination(values, mistakes),
    )


def parse_reporting(values: Mapping[str, str], mistakes: list[str]) -> Reporting:
    """Who is to be told of a run. What is wrong counts as not given: the others must still hear of it."""
    metrics_file = values.get("METRICS_FILE", "")
    if metrics_file and not metrics_file.startswith("/"):
        metrics_file = ""
        if values["METRICS_FILE"] != UNREADABLE:
            mistakes.append("METRICS_FILE: write an absolute path, such as /metrics/s3borgbackup.prom")
    return Reporting(
        parse_choice(values, "LOG_FORMAT", ("text", "json"), mistakes) == "json",
        parse_url(values, "HEALTHCHECK_URL", mistakes),
        parse_url(values, "NOTIFY_URL", mistakes),
        parse_choice(values, "NOTIFY_ON", NOTIFY_ON, mistakes),
        metrics_file,
    )


def parse_url(values: Mapping[str, str], name: str, mistakes: list[str]) -> str:
    """An http(s) URL, empty where there is none. A mistake does not quote it: it is a secret as a whole."""
    text = values.get(name, "")
    if not text or text == UNREADABLE:
        return ""
    try:
        url = urllib.parse.urlsplit(text)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        (url.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if usable and not re.search(r"[\s\x00-\x1f\x7f\\]", text):
        return text
    mistakes.append(f"{name}: is not an http(s) URL; write one such as https://hc-ping.com/your-uuid")
    return ""


def parse_choice(values: Mapping[str, str], name: str, choices: Sequence[str], mistakes: list[str]) -> str:
    """One of `choices`, of which the first is the default."""
    value = values.get(name, choices[0]).lower()
    if value not in choices and value != UNREADABLE:
        mistakes.append(f"{name}: write {' or '.join(choices)}")
    return value


def parse_number(
    values: Mapping[str, str], name: str, default: Number, allowed: range, mistakes: list[str]
) -> int | Number:
    """A whole number out of `allowed`."""
    text = values.get(name)
    if text is None or text == UNREADABLE:
        return default
    if re.fullmatch(r"[0-9]{1,12}", text) and int(text) in allowed:
        return int(text)
    mistakes.append(f"{name}: write a whole number from {allowed[0]} to {allowed[-1]}{ABOUT.get(name, '')}")
    return default


STORE_SUFFIXES = ("ENDPOINT", "PATH", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION")


def label_mistakes(label: str) -> list[str]:
    """What is wrong with an archive name prefix."""
    mistakes = []
    if not re.fullmatch(r"[^\s/{}*?\[\]\\:\x00-\x1f\x7f]+", label):
        mistakes.append(
            "write letters, digits, '.', '_' and '-' only: the label is part of archive names and patterns"
        )
    elif re.search(r"-[0-9]{4}(-|$)", label):
        mistakes.append(
            f"{label!r} could be taken for a shorter label with a date, and `prune` would confuse the two;"
            " leave out the dash before the four digits"
        )
    return mistakes


def parse_store(target: str | None, given: Mapping[str, str], mistakes: list[str]) -> Store:
    """A store from its settings by their lower-case names."""
    bare = Store(target, "", "", "", "", "")
    endpoint = given.get("endpoint", "")
    if endpoint and endpoint != UNREADABLE:
        mistakes += [f"{bare.setting('endpoint')}: {mistake}" for mistake in endpoint_mistakes(endpoint)]
    bucket, _, prefix = given.get("path", "").partition(":")
    if bucket != UNREADABLE and given.get("path"):
        mistakes += [f"{bare.setting('path')}: {mistake}" for mistake in path_mistakes(bucket, prefix)]
    for key in HEADER_PARTS:
        mistakes += header_mistakes(bare.setting(key), key, given.get(key, ""))
    return Store(
        target,
        endpoint.rstrip("/"),
        bucket,
        prefix.strip("/"),
        given.get("access_key_id", ""),
        given.get("secret_access_key", ""),
        given.get("region") or None,
    )


def parse_destination(values: Mapping[str, str], mistakes: list[str]) -> Destination:
    """How to reach the bucket that is restored into: as the source, but for what RESTORE_... say."""
    given, own = {}, set()
    for suffix in STORE_SUFFIXES:
        if value := values.get(f"RESTORE_{suffix}"):
            own.add(suffix.lower())
        given[suffix.lower()] = value or values.get(f"SOURCE_{suffix}", "")
    if len(own & {"access_key_id", "secret_access_key"}) == 1:
        mistakes.append(
            "RESTORE_ACCESS_KEY_ID, RESTORE_SECRET_ACCESS_KEY: one is missing; write both, or neither"
        )
    if "endpoint" in own and given["endpoint"] != UNREADABLE:
        mistakes += [f"RESTORE_ENDPOINT: {mistake}" for mistake in endpoint_mistakes(given["endpoint"])]
    for key in own.intersection(HEADER_PARTS):
        mistakes += header_mistakes(f"RESTORE_{key.upper()}", key, given[key])
    region = given["region"] if "region" in own or "endpoint" not in own else ""
    keys = given["access_key_id"], given["secret_access_key"]
    missing = {name for name, value in given.items() if not value}
    return Destination(
        None, given["endpoint"].rstrip("/"), "", "", *keys, region or None, frozenset(own | missing)
    )


def missing_settings(store: Store) -> list[str]:
    """A mistake for each setting that a store cannot do without and lacks."""
    given = {
        "endpoint": store.endpoint,
        "path": store.location,
        "access_key_id": store.access_key_id,
        "secret_access_key": store.secret_access_key,
    }
    return [
        f"{store.setting(key)}: is missing; {STORE_HELP[key]}" for key, value in given.items() if not value
    ]


# What a request's headers and a mount's environment can hold. Only a file (`_FILE`) loses the line end at its
# end: a value that others read, too, is not ours to correct.
HEADER_PARTS = {
    "access_key_id": re.compile(r"[!-~]+"),
    "secret_access_key": re.compile(r"[!-~]([ -~]*[!-~])?"),
    "region": re.compile(r"[!-~]+"),
}


def header_mistakes(setting: str, key: str, value: str) -> list[str]:
    """What is wrong with a key or a region, which is not quoted."""
    if value in ("", UNREADABLE) or HEADER_PARTS[key].fullmatch(value):
        return []
    reason = "has a blank or a line end around it, or a character in it that is not printable ASCII"
    return [f"{setting}: {reason}; write it without (`printf %s`, where `echo` would add a line end)"]


STORE_HELP = {
    "endpoint": "write the S3 server's URL, such as https://s3.eu-central-1.amazonaws.com",
    "path": "write <bucket> or <bucket>:<prefix>",
    "access_key_id": "write the key's id",
    "secret_access_key": "write the key's secret",
}


def endpoint_mistakes(endpoint: str) -> list[str]:
    """What is wrong with an endpoint URL."""
    if re.match(r"(?i)https?://[0-9a-f]*:[0-9a-f]*:", endpoint):
        return ["an IPv6 address goes in brackets, such as http://[2001:db8::1]:8333"]
    try:
        url = urllib.parse.urlsplit(endpoint)
        port_is_wrong = url.port == 0
        (url.hostname or "").encode("idna")
    except ValueError as error:
        return [f"is not a URL ({error}); {STORE_HELP['endpoint']}"]
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or port_is_wrong
        or re.search(r"[^!-~]|\\", endpoint)
    ):
        return [f"is not an http(s) URL; {STORE_HELP['endpoint']}"]
    if url.username is not None or url.path not in ("", "/") or url.query or url.fragment:
        return [
            "must be scheme, host and port only; the bucket goes into the path, keys into their own settings"
        ]
    return []


def path_mistakes(bucket: str, prefix: str) -> list[str]:
    """What is wrong with the two parts of `<bucket>:<prefix>`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        hint = f"; did you mean {bucket.replace('/', ':', 1)!r}?" if "/" in bucket.strip("/") else ""
        return [f"{bucket!r} is not a bucket name; {STORE_HELP['path']}{hint}"]
    parts = prefix.strip("/").split("/")
    if prefix.strip("/") and any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        return [
            "the prefix has a part that no folder can be named after (empty, '.', '..' or over 255 bytes)"
        ]
    if re.search(r"[\x00-\x1f\x7f]", prefix):
        return ["the prefix holds a control character"]
    return []


def parse_targets(values: Mapping[str, str], mistakes: list[str]) -> tuple[Target, ...]:
    """The targets from `TARGETS` and `TARGET_SECRETS`, in the order of `TARGETS`."""
    settings = parse_json("TARGETS", values.get("TARGETS", ""), TARGET_KEYS, mistakes)
    secret_values = parse_json("TARGET_SECRETS", values.get("TARGET_SECRETS", ""), SECRET_KEYS, mistakes)
    if settings is None or secret_values is None:
        return ()
    for name in secret_values.keys() - settings.keys():
        mistakes.append(
            f"TARGET_SECRETS {json.dumps(name)}: there is no such target in TARGETS; add it or remove this"
        )
    targets = []
    for name, given in settings.items():
        mistakes += [f"TARGETS {json.dumps(name)}: {mistake}" for mistake in name_mistakes(name)]
        if name in secret_values:
            targets.append(parse_target(name, given, secret_values[name], mistakes))
        else:
            mistakes.append(
                f"TARGET_SECRETS {json.dumps(name)}: is missing;"
                f" write an object with {', '.join(SECRET_KEYS)}"
            )
    return tuple(targets)


def name_mistakes(name: str) -> list[str]:
    """What is wrong with a target's name, which becomes part of its mount point."""
    wrong = not name or not is_plain(name) or re.search(r"[/{}\x00-\x1f\x7f]|::|:$", name)
    if wrong or len(name.encode()) > MAX_NAME_BYTES:
        return ["this name cannot be a mount point; use letters, digits, '.', '_' and '-'"]
    return []


def parse_json(
    variable: str, text: str, keys: Sequence[str], mistakes: list[str]
) -> dict[str, dict[str, Any]] | None:
    """A JSON object of objects with known keys only; None when there is nothing to go on with."""
    if text == UNREADABLE:
        return None
    if not text:
        mistakes.append(
            f'{variable}: is missing; write one line of JSON: {{"first": {{"{keys[0]}": "...", ...}}}}'
        )
        return None
    try:
        document = json.loads(text, object_pairs_hook=unique_pairs)
    except ValueError as error:
        mistakes.append(f"{variable}: {json_mistake(text, error)}")
        return None
    if not isinstance(document, dict) or not document:
        mistakes.append(f"{variable}: write a JSON object with one member for each target")
        return None
    wrong = [name for name, value in document.items() if not isinstance(value, dict)]
    mistakes += [f"{variable} {json.dumps(name)}: write an object with {', '.join(keys)}" for name in wrong]
    for name in document.keys() - set(wrong):
        for key in document[name].keys() - set(keys):
            mistakes.append(
                f"{variable} {json.dumps(name)}: unknown key {json.dumps(key)}; {near(key, keys)}"
            )
    return {name: value for name, value in document.items() if name not in wrong}


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members.

    Raises ValueError where one is there twice, as the first would silently be lost.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{json.dumps(name)} is there twice; keep one")
    return dict(pairs)


def json_mistake(text: str, error: ValueError) -> str:
    """What is wrong with a JSON text, without quoting it: it may hold secrets."""
    if text[0] in "'\"" and text[-1:] == text[0]:
        return "is quoted as a whole, and Docker's env files keep those quotes: remove the outer quotes"
    if isinstance(error, json.JSONDecodeError):
        place = f"character {error.pos + 1} (line {error.lineno})"
        return f"is not valid JSON: {error.msg} at {place}; write it on one line"
    return str(error)


def near(word: str, words: Iterable[str]) -> str:
    """A hint at what might have been meant by `word`."""
    words = list(words)
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"known are {', '.join(words)}"


def parse_target(
    name: str, given: Mapping[str, Any], secret: Mapping[str, Any], mistakes: list[str]
) -> Target:
    """One target from its two JSON objects."""
    store = Store(name, "", "", "", "", "")
    texts = {}
    for key, value in {**given, **secret}.items():
        if key == "compact" or key not in TARGET_KEYS + SECRET_KEYS:
            continue
        if isinstance(value, str) and is_plain(value):
            texts[key] = value
        elif value is not None:
            mistake = NOT_PLAIN if isinstance(value, str) else "write a JSON string"
            mistakes.append(f"{store.setting(key)}: {mistake}")
            texts[key] = UNREADABLE
    encryption = texts.get("encryption", DEFAULT_ENCRYPTION)
    if encryption not in ENCRYPTION_MODES:
        mistakes.append(f"{store.setting('encryption')}: unknown mode; {near(encryption, ENCRYPTION_MODES)}")
    compression = texts.get("compression", DEFAULT_COMPRESSION)
    if mistake := compression_mistake(compression):
        mistakes.append(f"{store.setting('compression')}: {mistake}")
    passphrase = texts.get("borg_passphrase", "")
    if mistake := passphrase_mistake(passphrase, encryption):
        mistakes.append(f"{store.setting('borg_passphrase')}: {mistake}")
    prune = parse_prune(store.setting("prune"), texts.get("prune", ""), mistakes)
    compact = parse_compact(store.setting("compact"), given.get("compact", True), mistakes)
    check = parse_check(store.setting("check"), texts.get("check", ""), mistakes)
    store = parse_store(name, texts, mistakes)
    mistakes += missing_settings(store)
    must_match = "encryption" in texts
    return Target(name, store, passphrase, encryption, must_match, compression, prune, compact, check)


def passphrase_mistake(passphrase: str, encryption: str) -> str | None:
    """What is wrong with a passphrase; mode `none` has no use for one."""
    if encryption == "none":
        return None
    if not passphrase:
        return "is missing; `openssl rand -base64 48` makes a good one (one line)"
    if passphrase.endswith("\n") or "\r" in passphrase:
        return "holds a line end, which borg would not take as part of it; remove it"
    return None


COMPRESSION_LEVELS = {"none": None, "lz4": None, "zstd": (1, 22), "zlib": (0, 9), "lzma": (0, 9)}
OBFUSCATION_LEVELS = {*range(1, 7), *range(110, 124), 250}
COMPRESSION_HELP = "write none, lz4, zstd[,1-22], zlib[,0-9], lzma[,0-9], or one of these after 'auto,'"


def compression_mistake(specification: str) -> str | None:
    """What borg would refuse in a compression specification (`borg help compression`), else None."""
    name, *rest = specification.split(",")
    if name == "auto" and rest:
        return compression_mistake(",".join(rest)) if rest[0] != "obfuscate" else "obfuscate goes before auto"
    if name == "obfuscate" and len(rest) >= 2:
        if not (rest[0].isascii() and rest[0].isdigit() and int(rest[0]) in OBFUSCATION_LEVELS):
            return "the level of obfuscate is 1-6, 110-123 or 250"
        return compression_mistake(",".join(rest[1:]))
    if name not in COMPRESSION_LEVELS or len(rest) > 1:
        return COMPRESSION_HELP
    levels = COMPRESSION_LEVELS[name]
    if rest and (levels is None or not re.fullmatch(r"[0-9]{1,2}", rest[0])):
        return COMPRESSION_HELP
    if rest and levels and not levels[0] <= int(rest[0]) <= levels[1]:
        return f"the level of {name} is {levels[0]} to {levels[1]}"
    return None


class OptionParser(argparse.ArgumentParser):
    """Parses options; raises ValueError with what is wrong."""

    def __init__(self) -> None:
        """Knows no options yet."""
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError where argparse would end the program."""
        raise ValueError(message)


class PruneParser(OptionParser):
    """The options of `borg prune` that a target's `prune` may hold."""

    def __init__(self) -> None:
        """Declares the options as borg 1.4 has them."""
        super().__init__()
        for names in KEEP_OPTIONS:
            self.add_argument(*names, type=int, dest=names[-1], metavar="N")
        self.add_argument("--keep-within", type=keep_interval, metavar="INTERVAL")
        self.add_argument("-c", "--checkpoint-interval", type=int)
        for flag in ("--list", "--stats", "--quick-stats", "--save-space", "--force", "--verbose", "--info"):
            self.add_argument(
                *({"--stats": ["-s"], "--verbose": ["-v"]}.get(flag, [])), flag, action="store_true"
            )


KEEP_OPTIONS = (
    ("--keep-last", "--keep-secondly"),
    ("--keep-minutely",),
    ("-H", "--keep-hourly"),
    ("-d", "--keep-daily"),
    ("-w", "--keep-weekly"),
    ("-m", "--keep-monthly"),
    ("--keep-13weekly",),
    ("--keep-3monthly",),
    ("-y", "--keep-yearly"),
)


def keep_interval(text: str) -> str:
    """Checks borg's interval: a positive number of H(ours), d(ays), w(eeks), m(onths) or y(ears)."""
    if not re.fullmatch(r"0*[1-9][0-9]*[Hdwmy]", text):
        raise argparse.ArgumentTypeError("write a number and one of H, d, w, m, y, such as 2d")
    return text


def parse_prune(setting: str, text: str, mistakes: list[str]) -> tuple[str, ...]:
    """The words of a target's `prune`; a mistake where borg would refuse them or where they keep nothing."""
    try:
        words = shlex.split(text)
        options, unknown = PruneParser().parse_known_args(words)
    except ValueError as error:
        mistakes.append(f"{setting}: {error}; write such as --keep-daily=7 --keep-weekly=4 --keep-monthly=6")
        return ()
    given = {
        name: value
        for name, value in vars(options).items()
        if name.startswith("--keep") and value is not None
    }
    if unknown:
        mistakes.append(
            f"{setting}: {unknown[0]!r} has no place here; {PRUNE_HELP.get(unknown[0][:6], PRUNE_HELP[''])}"
        )
    elif words and not options.keep_within and not any(given.values()):
        mistakes.append(
            f"{setting}: keeps nothing; write such as --keep-daily=7 --keep-weekly=4 --keep-monthly=6"
        )
    elif len(given.keys() & {"--keep-13weekly", "--keep-3monthly"}) == 2:
        mistakes.append(f"{setting}: --keep-13weekly and --keep-3monthly exclude each other; keep one")
    return tuple(words)


PRUNE_HELP = {
    "-n": "it would prune nothing: leave `prune` out instead",
    "--dry-": "it would prune nothing: leave `prune` out instead",
    "": "borg's --keep-... options are meant; which archives are pruned follows from BACKUP_LABEL",
}


def parse_compact(setting: str, value: object, mistakes: list[str]) -> int | None:
    """borg's compaction threshold in percent from `true`, `false` or a number."""
    if isinstance(value, bool):
        return DEFAULT_COMPACT_PERCENT if value else None
    if isinstance(value, int) and 0 <= value <= 100:
        return value
    mistakes.append(f"{setting}: write true, false, or a threshold in percent from 0 to 100")
    return None


CHECK_PERIODS = {"day": 86400, "week": 7 * 86400, "month": 30 * 86400}  # in seconds
TIME_UNITS = {"s": 1, "m": 60, "h": 3600}  # in seconds
CHECK_HELP = (
    "write such as 30m (at most 30 minutes in each run), 30m/week (once a week) or full/month;"
    " units are s, m, h, periods day, week, month"
)


def parse_check(setting: str, text: str, mistakes: list[str]) -> CheckPlan | None:
    """A target's `check`: a duration or `full`, and a period where it is not done in each run."""
    if text in ("", UNREADABLE):
        return None
    amount, slash, every = text.partition("/")
    seconds = None if amount == "full" else parse_duration(amount)
    if (seconds or amount == "full") and (every in CHECK_PERIODS if slash else True):
        return CheckPlan(seconds, every)
    mistakes.append(f"{setting}: {text!r} is not understood; {CHECK_HELP}")
    return None


def parse_duration(text: str) -> int | None:
    """Seconds from `90s`, `30m` or `2h`; None where it is nothing like that."""
    found = re.fullmatch(r"0*([1-9][0-9]{0,5})([smh])", text)
    return int(found[1]) * TIME_UNITS[found[2]] if found else None


def overlap_mistakes(stores: Sequence[Store]) -> list[str]:
    """Stores that lie inside each other: a repository would be backed up into itself, or hold another one."""
    mistakes = []
    for index, first in enumerate(stores):
        for second in stores[index + 1 :]:
            same_bucket = (endpoint_key(first), first.bucket) == (endpoint_key(second), second.bucket)
            if not (first.bucket and same_bucket):
                continue
            if first.key_prefix.startswith(second.key_prefix) or second.key_prefix.startswith(
                first.key_prefix
            ):
                mistakes.append(
                    f"{second.setting('path')}: overlaps {first.setting('path')}"
                    f" ({second.location} and {first.location} on one server); give each a place of its own"
                )
    return mistakes


def endpoint_key(store: Store) -> tuple[str, int | None]:
    """Scheme-independent host and port, for telling whether two endpoints are one server."""
    try:
        url = urllib.parse.urlsplit(store.endpoint)
        return (url.hostname or ""), url.port or {"http": 80, "https": 443}.get(url.scheme)
    except ValueError:
        return "", None


# ------------------------------------------------------------------------------------------------------- S3

# Signing follows "Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk
# (AWS Signature Version 4)" of the Amazon S3 API reference; the functions are named after its steps.


def uri_encode(text: str, safe: str = "") -> str:
    """UriEncode() of the specification: everything but unreserved characters as %XX of its UTF-8 bytes."""
    return urllib.parse.quote(text, safe=safe + "-._~", errors="surrogateescape")


def canonical_query(query: Sequence[tuple[str, str]]) -> str:
    """The canonical query string; it is also exactly what is sent."""
    pairs = sorted((uri_encode(name), uri_encode(value)) for name, value in query)
    return "&".join(f"{name}={value}" for name, value in pairs)


def canonical_request(
    method: str, path: str, query: Sequence[tuple[str, str]], headers: Mapping[str, str], payload_hash: str
) -> str:
    """Task 1: the canonical request. `path` is the decoded path; all `headers` are signed."""
    lower = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    return "\n".join(
        [
            method,
            uri_encode(path, safe="/"),
            canonical_query(query),
            "".join(f"{name}:{lower[name]}\n" for name in sorted(lower)),
            ";".join(sorted(lower)),
            payload_hash,
        ]
    )


def string_to_sign(canonical: str, when: datetime, region: str, service: str = "s3") -> str:
    """Task 2: the string to sign."""
    scope = f"{when:%Y%m%d}/{region}/{service}/aws4_request"
    digest = hashlib.sha256(encode_key(canonical)).hexdigest()
    return f"AWS4-HMAC-SHA256\n{when:%Y%m%dT%H%M%SZ}\n{scope}\n{digest}"


def signing_key(secret_access_key: str, when: datetime, region: str, service: str = "s3") -> bytes:
    """Task 3, first half: the key derived for one day, region and service."""
    key = f"AWS4{secret_access_key}".encode()
    for part in (f"{when:%Y%m%d}", region, service, "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


def authorization(
    method: str,
    path: str,
    query: Sequence[tuple[str, str]],
    headers: Mapping[str, str],
    payload_hash: str,
    access_key_id: str,
    secret_access_key: str,
    when: datetime,
    region: str,
) -> str:
    """Task 3: the value of the Authorization header."""
    text = string_to_sign(canonical_request(method, path, query, headers, payload_hash), when, region)
    signature = hmac.new(
        signing_key(secret_access_key, when, region), text.encode(), hashlib.sha256
    ).hexdigest()
    signed_headers = ";".join(sorted(name.lower() for name in headers))
    credential = f"{access_key_id}/{when:%Y%m%d}/{region}/s3/aws4_request"
    return f"AWS4-HMAC-SHA256 Credential={credential},SignedHeaders={signed_headers},Signature={signature}"


@dataclass(frozen=True)
class S3Object:
    """One line of a listing."""

    key: str
    size_bytes: int
    last_modified: datetime
    etag: str = ""  # without quotes
    is_shown: bool = True  # by a mount
    # What HEAD says of it, once that is known: `headers` by name, `tags`, `storage_class`.
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read to its end; header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent: float = 0.0  # when the try was sent that it answers, in boot_seconds()

    def time(self, header: str) -> datetime | None:
        """The time in `Date` or `Last-Modified`; None where it is missing or unreadable."""
        try:
            return email.utils.parsedate_to_datetime(self.headers[header.lower()]).astimezone(UTC)
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class Patience:
    """How long a client waits for one answer, and how long it tries again, by the kind of fault."""

    answer_seconds: float = ANSWER_TIMEOUT_SECONDS
    unreachable_seconds: float = CONNECT_PATIENCE_SECONDS
    failing_seconds: float = SERVER_PATIENCE_SECONDS


# For a store that has answered before: its address is right, so whatever it is may pass.
PROVEN = Patience(unreachable_seconds=PROVEN_PATIENCE_SECONDS, failing_seconds=PROVEN_PATIENCE_SECONDS)
# For a question that is asked about each of many objects.
HASTY = Patience(answer_seconds=8, unreachable_seconds=0, failing_seconds=0)


# What to do about S3's error codes; {setting} places are filled with the store's own settings.
S3_HINTS = {
    "NoSuchBucket": "Create the bucket or correct {path}.",
    "AccessDenied": "Give the key {permission}, or correct {path} and {access_key_id}.",
    "InvalidAccessKeyId": "Correct {access_key_id}.",
    "SignatureDoesNotMatch": "Correct {secret_access_key}.",
    "InvalidBucketName": "Correct {path}.",
    "LIST NoSuchKey": "The bucket's name belongs in {path}, not in the host of {endpoint}: take it out.",
    "SecondLevelDomainForbidden": "This server wants the bucket in the host name: that is not supported.",
    "MethodNotAllowed": "Check {endpoint}: an S3 API lies elsewhere (is this a console or a web site?).",
    "AccountProblem": "See to the account: the provider has locked it.",
    "AllAccessDisabled": "See to the account: the provider has locked it.",
    "QuotaExceeded": "Make room in the bucket, or have its quota raised.",
    "ExpiredToken": "Write a lasting key into {access_key_id}: session tokens are not supported.",
    "InvalidToken": "Write a lasting key into {access_key_id}: session tokens are not supported.",
    "RequestTimeTooSkewed": "The clock of this machine is wrong: set it.",
    "RequestExpired": "The clock of this machine is wrong: set it.",
    "AuthorizationHeaderMalformed": "Set {region} to the bucket's region.",
    "InvalidRegion": "Set {region} to the bucket's region.",
    "IllegalLocationConstraintException": "Set {region} to the bucket's region.",
    "PermanentRedirect": "Write the endpoint of the bucket's own region into {endpoint}.",
    "TemporaryRedirect": "Write the endpoint of the bucket's own region into {endpoint}.",
    "NoAnswer": "Check {endpoint} and the network.",
    "413": "Let the proxy before S3 take requests of 32 MB (nginx: client_max_body_size 32m).",
    "NotS3": "Check {endpoint}: this does not look like an S3 server.",
    "Redirect": "Redirects are not followed: write the right address into {endpoint}.",
    "CannotSend": "Correct {endpoint} and {access_key_id}.",
    "BadListing": "A backup would miss objects: update the server, or use another one.",
    "RangeIgnored": "Mounts read by ranges: have {endpoint}, or a proxy before it, heed them (206).",
}
PERMISSIONS = {
    "LIST": "s3:ListBucket",
    "GET": "s3:GetObject",
    "HEAD": "s3:GetObject",
    "PUT": "s3:PutObject",
    "DELETE": "s3:DeleteObject",
}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What passes: too early, too many, too busy; 520-530 are a CDN's words for a server that does not answer it.
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 531)})
RETRIED_CODES = frozenset({"RequestTimeout"})  # a 400, and S3's word for a body that stopped on its way
EMPTY_PAGES = 10_000  # of a listing, one after the other: millions of delete markers may lie between two keys
CONNECTION_FAULTS = (OSError, http.client.HTTPException)
DEFAULT_REGION = "us-east-1"


class S3Client:
    """Control requests to one store: signed, path-style, retried. Safe to use from several threads.

    Every method raises S3Error when S3 refuses or when there is no answer for longer than the patience
    constants say. When a stop signal comes, requests get CLEANUP_SECONDS more and no further try, also those
    that are made later, to clean up; then Stopped is raised.
    """

    def __init__(
        self,
        store: Store,
        region: str | None = None,
        patience: Patience | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Opens nothing yet; `region` is what an earlier client found out. `stop` is asked meanwhile."""
        self.store = store
        self.clock: datetime | None = None  # the server's, when it answered last
        self._patience, self._stop = patience or Patience(), stop or Stop()
        self.region = region or store.region or DEFAULT_REGION
        self._url = urllib.parse.urlsplit(store.endpoint)
        self._idle: list[http.client.HTTPConnection] = []

    def with_patience(self, patience: Patience, unstoppable: bool = False) -> S3Client:
        """The same client, with its open connections and what it has learned, but another patience."""
        twin = copy.copy(self)
        twin._patience = patience
        twin._stop = Stop() if unstoppable else self._stop
        return twin

    def list_page(
        self, prefix: str, where: tuple[str, str] | None = None, limit: int = 1000
    ) -> tuple[list[S3Object], tuple[str, str] | None]:
        """Up to `limit` objects below `prefix`, and the `where` of the next page; None: there is none."""
        query = [("list-type", "2"), ("encoding-type", "url"), ("max-keys", str(limit)), ("prefix", prefix)]
        answer = self.request("GET", query=[*query, where] if where else query)
        try:
            return parse_listing(answer.body)
        except ElementTree.ParseError as error:
            raise self._error(answer.status, "NotS3", f"the listing cannot be read ({error})") from error
        except ValueError as error:
            raise self._error(answer.status, "BadListing", str(error)) from error

    def list_objects(self, prefix: str, start_after: str = "") -> Iterator[S3Object]:
        """All objects below `prefix`, or those after a key; one request for each 1,000.

        They are in key order, unless the server has another one (S3's directory buckets). Some servers ignore
        where a listing is to start.
        """
        where, last = ("start-after", start_after) if start_after else None, None
        empty = 0
        while True:
            objects, following = self.list_page(prefix, where)
            # An empty page may have a next one; one that came twice would come for ever.
            if following and (following == where or (objects and objects == last)):
                raise self._error(200, "BadListing", "the listing does not advance: a page came twice")
            empty = 0 if objects else empty + 1
            if empty > EMPTY_PAGES:
                words = f"the listing does not advance: {EMPTY_PAGES:,} empty pages"
                raise self._error(200, "BadListing", words)
            yield from (entry for entry in objects if entry.key > start_after)
            if not following:
                return
            where, last = following, objects

    def get(self, key: str, span: tuple[int, int] | None = None) -> bytes:
        """The content of an object, or the bytes from the first to the last of `span`."""
        if not span:
            return self.request("GET", key).body
        first, last = span
        answer = self.request("GET", key, headers={"Range": f"bytes={first}-{last}"})
        whole = answer.status == 200 and first == 0  # an object that has no more
        if len(answer.body) == last - first + 1 and (
            whole or answer.headers.get("content-range", "").startswith(f"bytes {first}-{last}/")
        ):
            return answer.body
        words = f"the bytes {first}-{last} of {key!r} were asked for, and others came"
        raise self._error(answer.status, "RangeIgnored", words)

    def find(self, key: str) -> Answer | None:
        """An object; None where there is none.

        Who may list only what is below a prefix is told of an absent object that access is denied (AWS).
        """
        try:
            return self.request("GET", key)
        except S3Error as error:
            if error.code == "NoSuchKey" or (error.status == 403 and not self._is_listed(key)):
                return None
            raise

    def _is_listed(self, key: str) -> bool:
        return any(entry.key == key for entry in self.list_page(key, limit=1)[0])

    def put(
        self,
        key: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        query: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """Writes an object, or the part of one that `query` names, under the condition in `headers`.

        A bucket with object lock takes no object without its MD5.
        """
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        headers = {"Content-MD5": md5, **(headers or {})}
        return self.request("PUT", key, query, headers, body)

    def delete(self, key: str, headers: Mapping[str, str] | None = None) -> None:
        """Deletes an object, under the condition that `headers` may name; one that is not there is fine."""
        self.request("DELETE", key, headers=headers)

    def request(
        self,
        method: str,
        key: str = "",
        query: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """One request, retried while the fault may pass; finds out the bucket's region on the way."""
        start, pause = time.monotonic(), 0.1
        while True:
            try:
                answer = self._answer(lambda: self._exchange(method, key, query, headers or {}, body))
                if answer.status == 200 and method in ("PUT", "POST") and xml_text(answer.body, "Code"):
                    answer = dataclasses.replace(answer, status=500)  # it took long, and failed in the end
                if answer.status < 300:
                    return answer
                error = self._refusal(answer, method, key)
                passes = answer.status in RETRIED_STATUSES or error.code in RETRIED_CODES
                patience = self._patience.failing_seconds if passes else 0
                if self._learn_region(answer):
                    continue
            except CONNECTION_FAULTS as fault:
                error = self._error(0, "NoAnswer", describe_fault(fault))
                untrusted = isinstance(fault, ssl.SSLCertVerificationError)
                patience = 0 if untrusted else self._patience.unreachable_seconds
            except ValueError as fault:  # of http.client, whose words quote headers
                raise self._error(0, "CannotSend", f"cannot be sent ({type(fault).__name__})") from None
            if time.monotonic() - start + pause > patience:
                raise error
            self._stop.wait(pause)
            pause = min(2 * pause, MAX_BACKOFF_SECONDS)

    def _answer(self, exchange: Callable[[], Answer]) -> Answer:
        """The answer that `exchange` waits for. After a stop signal it is left to itself, soon."""
        future = in_background(exchange)
        while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
            if self._stop.requested and not concurrent.futures.wait([future], timeout=CLEANUP_SECONDS).done:
                self._stop.check()
        return future.result()

    def _exchange(
        self, method: str, key: str, query: Sequence[tuple[str, str]], extra: Mapping[str, str], body: bytes
    ) -> Answer:
        """Signs and sends one request and reads the answer to its end."""
        path = f"/{self.store.bucket}/{key}" if key else f"/{self.store.bucket}"
        when, payload_hash = datetime.now(UTC), hashlib.sha256(body).hexdigest()
        host = self._url.netloc
        headers = {
            **extra,
            "Host": host,
            "x-amz-date": f"{when:%Y%m%dT%H%M%SZ}",
            "x-amz-content-sha256": payload_hash,
        }
        keys = (self.store.access_key_id, self.store.secret_access_key)
        headers["Authorization"] = authorization(
            method, path, query, headers, payload_hash, *keys, when, self.region
        )
        target = uri_encode(path, safe="/") + (f"?{canonical_query(query)}" if query else "")
        connection, is_new = self._connection()
        sent = boot_seconds()
        try:
            # A body that is a file is sent in blocks, each with a timeout of its own: lines may be slow.
            fields = {name: encode_key(value) for name, value in headers.items()}
            fields |= {"Content-Length": str(len(body))} if body else {}
            connection.request(method, target, io.BytesIO(body) if body else None, fields)
            response = connection.getresponse()
            is_ignored = "Range" in extra and response.status == 200  # and what comes may be long
            content = response.read(READ_BYTES) if is_ignored else response.read()
        except BaseException as fault:
            connection.close()
            if is_new or isinstance(fault, TimeoutError) or not isinstance(fault, CONNECTION_FAULTS):
                raise
            self._idle.clear()  # the server closes what is idle for long: that says nothing about it
            return self._exchange(method, key, query, extra, body)
        if is_ignored:
            connection.close()
        else:
            self._idle.append(connection)
        answer = Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()}, content, sent
        )
        self.clock = answer.time("Date") or self.clock
        return answer

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """A connection that nobody uses, and whether it was opened just now."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = connection_to(self._url)
        is_new = connection.sock is None
        if is_new:
            connection.timeout = min(CONNECT_TIMEOUT_SECONDS, self._patience.answer_seconds)
            connection._create_connection = connect_within
            connection.connect()
        connection.sock.settimeout(self._patience.answer_seconds)
        return connection, is_new

    def _learn_region(self, answer: Answer) -> bool:
        """Takes over the region that the server names in a refusal; False when that is nothing new."""
        region = answer.headers.get("x-amz-bucket-region") or xml_text(answer.body, "Region")
        if self.store.region or answer.status not in (301, 400, 403) or not region or region == self.region:
            return False
        self.region = region
        return True

    def _refusal(self, answer: Answer, method: str, key: str) -> S3Error:
        """The error for an answer that is not success, in S3's own words."""
        code = xml_text(answer.body, "Code") or ("NotS3" if answer.body else http_reason(answer.status))
        message = xml_text(answer.body, "Message") or http_reason(answer.status)
        if answer.status in REDIRECTS and not xml_text(answer.body, "Code"):
            to = urllib.parse.urlsplit(answer.headers.get("location", ""))  # whose path repeats ours
            code, message = "Redirect", f"to {to.scheme}://{to.netloc}"
        permission = PERMISSIONS.get(method if key else "LIST", method)
        place = f"{self.store.bucket}/{key}" if key else self.store.bucket
        asked_for = "" if key else "LIST"
        return self._error(answer.status, code, message, asked_for, f"{permission} on {place}")

    def _error(
        self, status: int, code: str, message: str, asked_for: str = "", permission: str = ""
    ) -> S3Error:
        """An error that names the store, the code and the remedy."""
        settings = {key: self.store.setting(key) for key in ("endpoint", "path", "region", *SECRET_KEYS[:2])}
        default = S3_HINTS.get(code, TRY_LATER if status >= 500 else TRY_AGAIN)
        hint = S3_HINTS.get(str(status)) or S3_HINTS.get(f"{asked_for} {code}", default)
        hint = hint.format(**settings, permission=permission)
        number = f" ({status})" if status else ""
        where = f"{self.store.name} ({self.store.location} at {self.store.endpoint})"
        return S3Error(f"{where}: {code}{number}: {message}", hint, status, code)


def connect_within(address: tuple[str, int], seconds: float, _source: object = None) -> socket.socket:
    """A connection to a host and port, as by `socket.create_connection`, but `seconds` are for the whole.

    That one grants them to each address of a name anew, and to the resolver whatever it takes. Here each
    address gets an equal share of what is left, and a TLS handshake that follows the rest.
    """
    deadline = time.monotonic() + seconds
    lookup = in_background(lambda: socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
    try:
        found = lookup.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"looking up {address[0]} timed out") from None
    fault: OSError = OSError(f"{address[0]} has no address")
    for number, (family, kind, protocol, _, where) in enumerate(found):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(0.001, (deadline - time.monotonic()) / (len(found) - number)))
            connection.connect(where)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            return connection
        except OSError as error:
            connection.close()
            fault = error
    raise fault


def parse_listing(body: bytes) -> tuple[list[S3Object], tuple[str, str] | None]:
    """The objects of a ListObjectsV2 answer, and what asks for the next page; None where there is none.

    Raises ParseError where it is none, ValueError where it is not as S3's.
    """
    root = ElementTree.fromstring(body)
    if not root.tag.endswith("ListBucketResult"):
        raise ElementTree.ParseError(f"{root.tag} instead of ListBucketResult")
    space = root.tag[: root.tag.find("}") + 1]
    is_encoded = root.findtext(f"{space}EncodingType") == "url"
    decode = functools.partial(urllib.parse.unquote_plus, errors="surrogateescape") if is_encoded else str
    objects = [
        parse_entry_of(listed, decode)
        for listed in (
            {element.tag[len(space) :]: element.text or "" for element in entry}
            for entry in root.iter(f"{space}Contents")
        )
    ]
    if root.findtext(f"{space}IsTruncated", "").strip().lower() != "true":
        return objects, None
    if token := root.findtext(f"{space}NextContinuationToken"):
        return objects, ("continuation-token", token)
    keys = [entry.key for entry in objects]
    if not keys or keys != sorted(keys):
        raise ValueError("a page of the listing is truncated, and does not say how it goes on")
    return objects, ("start-after", keys[-1])


def parse_entry_of(listed: Mapping[str, str], decode: Callable[[str], str]) -> S3Object:
    """An object from the elements of its entry in a listing. Raises ValueError."""
    key = decode(listed.get("Key", ""))
    try:
        modified = datetime.fromisoformat(listed.get("LastModified", ""))
        size_bytes = int(listed.get("Size", ""))
    except ValueError as error:
        raise ValueError(f"the listing's entry of {key!r} cannot be read ({error})") from None
    # S3's times are UTC, also where a server does not say so.
    modified = modified if modified.tzinfo else modified.replace(tzinfo=UTC)
    return S3Object(key, size_bytes, modified, listed.get("ETag", "").strip('"'))


def connection_to(url: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    """A connection that is not opened yet. Without a port, http.client takes one from an IPv6 address."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "", url.port or kind.default_port)


def xml_text(body: bytes, name: str) -> str:
    """The text of the first element `name` in an XML error document, empty where there is none."""
    try:
        for element in ElementTree.fromstring(body).iter():
            if element.tag.rpartition("}")[2] == name:
                return (element.text or "").strip()
    except ElementTree.ParseError:
        pass
    return ""


def http_reason(status: int) -> str:
    """The standard phrase for an HTTP status."""
    return http.client.responses.get(status, f"HTTP status {status}")


def describe_fault(fault: Exception) -> str:
    """A connection fault in a few words."""
    return str(fault) or type(fault).__name__


# -------------------------------------------------------------------------------------------------- Catalog

# What a source lists, what an archive holds, and what a bucket is to get are the same kind of table. It lies
# on disk, so that memory does not grow with the bucket. It is a cache: whatever is wrong with it costs time.

CATALOG_ID, CATALOG_VERSION = 0x53334263, 1  # PRAGMA application_id and user_version of SQLite
CATALOG_TABLES = f"""
PRAGMA journal_mode = OFF; -- nothing is ever undone: a file that is not finished is thrown away
PRAGMA synchronous = OFF;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA application_id = {CATALOG_ID};
PRAGMA user_version = {CATALOG_VERSION};
CREATE TABLE objects (
    key BLOB PRIMARY KEY, size INTEGER, modified INTEGER, etag TEXT, is_shown INTEGER, facts TEXT
) WITHOUT ROWID;
CREATE TABLE archives (
    repository TEXT, label TEXT, objects INTEGER, as_of REAL, PRIMARY KEY (repository, label)
) WITHOUT ROWID;
"""
CATALOG_PAGE = 1000  # rows at a time
# An object is hidden by others below its name: their keys begin with it and a slash, 2F; 30 comes next.
HIDE_COVERED = """
UPDATE objects SET is_shown = 0 WHERE is_shown AND EXISTS (
    SELECT 1 FROM objects AS low WHERE low.key >= objects.key || X'2F' AND low.key < objects.key || X'30'
)
"""
# What is directly in a folder, not further down.
HIDE_FOLDER = """
UPDATE objects SET is_shown = 0 WHERE key > :folder AND key < :end AND instr(substr(key, :length), X'2F') = 0
"""
UNREPRESENTABLE = re.compile(r"(^|/)(\.{0,2})(/|$)|\0")  # an empty part, or one that is a folder's own name
NAME_MAX_BYTES = 1024  # FUSE_NAME_MAX of the kernel: more than a disk takes
# XML 1.0 has no place for these ("Char" in its grammar): a page of a listing that has one cannot be read. A
# return is read as a line end (2.11 there).
NOT_IN_XML = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def is_showable(key: str, size_bytes: int) -> bool:
    """Whether a mount can show an object, as far as its own key tells; an empty `folder/` is a folder."""
    name = key if size_bytes else key.removesuffix("/")
    is_long = any(len(part.encode("utf-8", "surrogateescape")) > NAME_MAX_BYTES for part in name.split("/"))
    return not (is_long or UNREPRESENTABLE.search(name) or NOT_IN_XML.search(name) or "\r" in name)


class CatalogError(BackupError):
    """SQLite's own words about a catalog that cannot be used."""


class Catalog:
    """Objects in an SQLite file, by key. Safe to use from several threads; methods raise CatalogError."""

    def __init__(self, path: Path) -> None:
        """Makes a new one at `path`, in place of what may be there."""
        self.path, self._lock = path, threading.RLock()
        path.unlink(missing_ok=True)
        with self._told():
            self._db = sqlite3.connect(path.absolute().as_uri(), uri=True, check_same_thread=False)
            self._db.executescript(CATALOG_TABLES)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                hint = DISK_HELP if "full" in str(error) else TRY_AGAIN
                raise CatalogError(f"the catalog {self.path}: {error}", hint) from error

    def execute(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """The rows that a statement gives."""
        with self._told():
            return self._db.execute(sql, values).fetchall()

    def add(self, objects: Iterable[S3Object]) -> None:
        """Takes objects in; one with a key that is there already replaces it."""
        rows = ((encode_key(each.key), *self._values(each)) for each in objects)
        while page := list(itertools.islice(rows, CATALOG_PAGE)):
            with self._told():
                self._db.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)", page)

    @staticmethod
    def _values(each: S3Object) -> tuple[Any, ...]:
        modified = (each.last_modified - EPOCH) // timedelta(microseconds=1)
        facts = None if each.facts is None else json.dumps(each.facts)
        return each.size_bytes, modified, each.etag, each.is_shown, facts

    def rows(self, where: str = "1", values: Sequence[Any] = (), after: str = "") -> Iterator[S3Object]:
        """The objects behind the key `after` for which `where` holds, a condition of SQL, in key order."""
        sql, last = (
            f"SELECT * FROM objects WHERE key > ? AND ({where}) ORDER BY key LIMIT ?",
            encode_key(after),
        )
        while page := self.execute(sql, (last, *values, CATALOG_PAGE)):
            for key, size_bytes, modified, etag, is_shown, facts in page:
                when = EPOCH + timedelta(microseconds=modified)
                known = None if facts is None else json.loads(facts)
                yield S3Object(decode_key(key), size_bytes, when, etag, bool(is_shown), known)
            last = page[-1][0]

    def find(self, key: str) -> S3Object | None:
        """An object; None where there is none."""
        return next(self.rows("key = ?", [encode_key(key)]), None)

    def remove(self, key: str) -> None:
        """Takes an object out."""
        self.execute("DELETE FROM objects WHERE key = ?", [encode_key(key)])

    def total(self, where: str = "1", values: Sequence[Any] = ()) -> tuple[int, int]:
        """The number of the objects for which `where` holds, and of their bytes."""
        return self.execute(f"SELECT count(*), coalesce(sum(size), 0) FROM objects WHERE {where}", values)[0]

    def hide(self, unlistable: Iterable[str]) -> None:
        """Notes what no mount shows, though the keys would do, when all are in.

        `unlistable` are folders ("" or with a slash at the end) whose listing TigrisFS cannot read.
        """
        for folder in unlistable:
            key = encode_key(folder)
            end = key[:-1] + b"0" if key else b"\xff" * 5
            self.execute(HIDE_FOLDER, {"folder": key, "end": end, "length": len(key) + 1})
        self.execute(HIDE_COVERED)

    def close(self) -> None:
        """Ends it, all written."""
        with self._told():
            self._db.commit()
            self._db.close()


def encode_key(key: str) -> bytes:
    """A key as S3 sorts them."""
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    """A key as all else has it."""
    return key.decode("utf-8", "surrogateescape")


def manifest_line(each: S3Object) -> str:
    """An object's line in an archive's manifest; what is not known is left out."""
    path = {} if each.is_shown else {"path": odd_path(each.key)}
    facts = {"key": each.key, "size": each.size_bytes, "modified": each.last_modified.isoformat()}
    return json.dumps({**facts, "etag": each.etag, **(each.facts or {}), **path}, separators=(",", ":"))


def parse_manifest_line(line: str) -> S3Object:
    """The object of a manifest's line. Raises ValueError where it is none."""
    try:
        found = json.loads(line)
        values = [found.pop(name) for name in ("key", "size", "modified", "etag")]
        modified, is_shown = datetime.fromisoformat(values[2]), found.pop("path", None) is None
        return S3Object(values[0], values[1], modified, values[3], is_shown, found or None)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{line[:100]!r} is no line of a manifest ({error!r})") from error


# Where an archive has what is not the source's own files. borg deduplicates the manifest like all else.
MANIFEST_PATH = "data/s3borgbackup/manifest.jsonl"


def odd_path(key: str) -> str:
    """Where an archive holds an object that no mount can show."""
    return f"data/s3borgbackup/objects/{hashlib.sha256(encode_key(key)).hexdigest()[:32]}"


# ---------------------------------------------------------------------------------------------------- Lease

# Two runs on one repository must exclude each other, and a run that crashed must not need a person. borg's
# own lock cannot tell a dead container from a live one: host name and process id change with each container.
# So a run holds an object beside the repository's files that it writes under S3's conditions (If-None-Match,
# If-Match), and writes again while it works. One that was not written for its lifetime, by the server's
# clock, may be taken over. A clock of ours tells only how long ago the last renewal was sent, and so how long
# the holder itself may still write.

OWN_PREFIX = ".s3borgbackup-"  # what the names of our objects in a repository begin with; borg ignores them
LEASE_NAME = f"{OWN_PREFIX}lease"
PROBE_NAME = f"{OWN_PREFIX}probe-"
KEY_EXPORTED_NAME = f"{OWN_PREFIX}key-exported"  # notes: small JSON objects
CHECKED_NAME = f"{OWN_PREFIX}checked"
COMPARED_NAME = f"{OWN_PREFIX}compared-"  # and the label; see `note_comparison`
LEASE_MARGIN_SECONDS = 2  # HTTP's dates have whole seconds
NO_SUCH_ETAG = '"00000000000000000000000000000000"'
IF_ABSENT = {"If-None-Match": "*"}
GUARD_SECONDS = 0.2  # how often it is checked whether the lease still holds
TIMER_ABSTIME = 1  # <time.h>

# Looked up before any fork, after which a child must do as little as possible.
LIBC = ctypes.CDLL(None, use_errno=True)


def boot_seconds() -> float:
    """A clock that goes on while the machine sleeps, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SignalEvent(ctypes.Structure):
    """`struct sigevent` of <signal.h>; sigev_notify 0 is SIGEV_SIGNAL."""

    _fields_ = (
        ("sigev_value", ctypes.c_void_p),
        ("sigev_signo", ctypes.c_int),
        ("sigev_notify", ctypes.c_int),
        ("padding", ctypes.c_byte * 48),
    )


class TimerSpec(ctypes.Structure):
    """`struct itimerspec` of <time.h>."""

    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("interval_sec", "interval_nsec", "value_sec", "value_nsec")
    )


class DeadMansSwitch:
    """Has the kernel kill this process, and with it its children, unless the moment is put off in time.

    A program that was frozen (docker pause, SIGSTOP, a laptop's lid) cannot know it when it goes on, and
    would write on before it looks at a clock. The kernel's SIGKILL comes while it is frozen. Children die
    with us, by PR_SET_PDEATHSIG.
    """

    def __init__(self) -> None:
        """Makes the timer; it does not run yet."""
        self._timer = ctypes.c_void_p()
        event = SignalEvent(None, signal.SIGKILL, 0)
        if LIBC.timer_create(time.CLOCK_BOOTTIME, ctypes.byref(event), ctypes.byref(self._timer)):
            raise BackupError(
                f"timer_create(2) failed: {os.strerror(ctypes.get_errno())}",
                "Let the container's seccomp profile allow it.",
            )

    def arm(self, at_boot_seconds: float) -> None:
        """Puts the moment off; 0 disarms."""
        whole = int(at_boot_seconds)
        spec = TimerSpec(0, 0, whole, int((at_boot_seconds - whole) * 1e9))
        LIBC.timer_settime(self._timer, TIMER_ABSTIME, ctypes.byref(spec), None)

    def close(self) -> None:
        """Removes the timer."""
        LIBC.timer_delete(self._timer)


class NoSwitch(DeadMansSwitch):
    """For who only reads under a lease: going on late harms nobody."""

    def __init__(self) -> None:
        """Makes no timer."""

    def arm(self, at_boot_seconds: float) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its object says."""

    run_id: str
    host: str
    purpose: str
    since: str
    ttl_seconds: int

    def body(self, number: int) -> bytes:
        """The object's content. No two writes are alike, as equal content would have equal ETags."""
        return json.dumps({**dataclasses.asdict(self), "write": number}).encode()

    @classmethod
    def parse(cls, body: bytes) -> Holder:
        """The holder that `body` describes; one without a name where it does not."""
        try:
            fields = json.loads(body)
            texts = {name: str(fields[name]) for name in ("run_id", "host", "purpose", "since")}
            ttl_seconds = min(max(int(fields["ttl_seconds"]), LEASE_SECONDS[0]), LEASE_SECONDS[-1])
            return cls(**texts, ttl_seconds=ttl_seconds)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return cls("", "an unknown host", "unknown work", "an unknown time", DEFAULT_LEASE_SECONDS)

    def __str__(self) -> str:
        """Who it is, in a few words."""
        return f"{self.purpose} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class Sighting:
    """A lease object as it was when we looked."""

    holder: Holder
    etag: str
    age_seconds: float  # since its last renewal, by the server's clock

    @property
    def has_expired(self) -> bool:
        """Whether anybody may take it."""
        return self.age_seconds > self.holder.ttl_seconds + LEASE_MARGIN_SECONDS


def look_at_lease(client: S3Client) -> Sighting | None:
    """The lease object as it is now; None where there is none. Raises S3Error."""
    answer = client.find(f"{client.store.key_prefix}{LEASE_NAME}")
    if not answer:
        return None
    now, then = answer.time("Date"), answer.time("Last-Modified")
    age = (now - then).total_seconds() if now and then else 0.0
    return Sighting(Holder.parse(answer.body), answer.headers.get("etag", ""), age)


class Member(Protocol):
    """What works under a lease: a child process."""

    def send(self, signum: int) -> None:
        """Sends it a signal."""

    def hold(self, why: str) -> None:
        """Stops it (SIGSTOP) until all who hold it let it go."""

    def let_go(self, why: str) -> None:
        """Has it go on (SIGCONT), as far as `why` is concerned."""


class Lease:
    """The right to write to one repository, for as long as it is renewed.

    When it cannot be renewed, the processes that write are stopped (SIGSTOP) before anybody else may take
    the lease, and go on when a renewal succeeds: then nobody took it. When somebody did, they are killed.
    """

    def __init__(
        self,
        client: S3Client,
        holder: Holder,
        patience_seconds: float,
        notice: Callable[[str], None],
        pause: Callable[[float], None],
        switch: DeadMansSwitch | None = None,
    ) -> None:
        """Takes nothing yet; `notice` is told what a user should know, `pause(seconds)` waits.

        `patience_seconds` is how long `write` tries; `switch` kills us where we would go on too late.
        """
        ttl = holder.ttl_seconds
        # Connecting and waiting for the answer together end before a lease that is suspended can expire.
        impatient = Patience(answer_seconds=max(1.0, ttl / 10), unreachable_seconds=0, failing_seconds=0)
        self.enforced = True  # whether the server heeds conditions
        self.suspended = False
        self.lost = ""  # why, when it is lost
        self.expires = False  # it is not to be given back, but to expire
        self._client, self._holder, self._notice, self._pause = client, holder, notice, pause
        self._patience_seconds = patience_seconds
        self._hasty_client = client.with_patience(impatient)
        self._renewing_client = client.with_patience(impatient, unstoppable=True)
        self._own_writes = 0  # that are under way
        self._key = f"{client.store.key_prefix}{LEASE_NAME}"
        self._etag, self._writes, self._valid_until, self._trouble = "", 0, 0.0, "no answer"
        self._members: list[Member] = []
        self._lock, self._over = threading.RLock(), threading.Event()
        self._switch = switch or DeadMansSwitch()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._renew_on, self._guard)
        ]

    def acquire(self, wait_seconds: float | None) -> None:
        """Takes the lease, and renews it from then on.

        Waits `wait_seconds` for a holder, by default just until it has renewed its lease, and so is alive,
        or until the lease has expired. Raises StillRunning, S3Error, and what `pause` raises.
        """
        start, first = boot_seconds(), None
        while current := self._try_to_take():
            first = first or current
            waited = boot_seconds() - start
            limit = current.holder.ttl_seconds + 10 * LEASE_MARGIN_SECONDS
            is_alive = current.etag != first.etag
            if waited >= (limit if wait_seconds is None else wait_seconds) or (
                wait_seconds is None and is_alive
            ):
                raise StillRunning(
                    f"{self._client.store.name}: another run works on this repository: {current.holder}",
                    "Let it finish, or wait for it with LEASE_WAIT.",
                )
            if current is first:
                ours = current.holder.run_id == self._holder.run_id
                who = "its first try" if ours else current.holder
                self._notice(f"the repository is in use: {who}; waiting to see whether that lives")
            self._pause(min(2.0, current.holder.ttl_seconds / 10))
        if self.enforced:  # it is renewed from now on: to find out whether that is so may take its time, too
            self._arm()
            for thread in self._threads:
                thread.start()
            self.enforced = self._is_enforced()
        if not self.enforced:
            self._go_without()

    def _try_to_take(self) -> Sighting | None:
        """Takes the lease where that is free, ours already or expired; else who holds it."""
        for _ in range(5):
            try:
                if self._write(self._client, IF_ABSENT):
                    return None
            except S3Error as error:
                if not refuses_conditions(error):
                    raise
                self.enforced = False
                return None
            current = look_at_lease(self._client)
            if current is None:  # given back just now
                continue
            holder, ours = current.holder, self._holder
            is_ours = (holder.run_id, holder.since) == (ours.run_id, ours.since)  # a run may try twice
            if not (is_ours or current.has_expired):
                return current
            if self._write(self._client, {"If-Match": current.etag}):
                if not is_ours:
                    self._notice(f"an expired lease is taken over: {current.holder}")
                return None
        raise BackupError(
            f"{self._client.store.name}: {self._key} can neither be written nor read", TRY_AGAIN
        )

    def _write(self, client: S3Client, condition: Mapping[str, str]) -> bool:
        """Writes the object under a condition; False when that is not met.

        Only a write that was answered counts, from when the try was sent that was answered. One whose answer
        was lost keeps the next one from meeting its condition, and is then overwritten.
        """
        with self._lock:
            self._writes += 1
            body = self._holder.body(self._writes)
        try:
            answer = client.put(self._key, body, condition)
        except S3Error as error:
            # 409: somebody else wrote at the same moment; 404: there is nothing to match.
            if error.status in (409, 412) or error.code == "NoSuchKey":
                return False
            raise
        self._etag = answer.headers.get("etag", "")
        self._valid_until = answer.sent + self._holder.ttl_seconds
        return True

    @property
    def _is_fresh(self) -> bool:
        """Whether it holds for so long that the next renewal may fail once."""
        return boot_seconds() < self._valid_until - self._holder.ttl_seconds / 4

    def _arm(self) -> None:
        """Has us killed when the lease ends, unless that is so near that the work is suspended anyway."""
        if self._is_fresh:
            self._switch.arm(self._valid_until)

    def _is_enforced(self) -> bool:
        """Tries whether the server heeds conditions: both writes have to fail."""
        try:
            return not any(
                self._write(self._client, condition) for condition in (IF_ABSENT, {"If-Match": NO_SUCH_ETAG})
            )
        except S3Error as error:
            if not refuses_conditions(error):
                raise
            return False

    def _go_without(self) -> None:
        self._end_threads()
        self._switch.arm(0)
        self.suspended = False
        self._notice(
            "this S3 server does not enforce conditional writes (If-None-Match, If-Match), so that runs"
            " cannot exclude each other: see to it that only one works on the repository at a time"
        )
        with contextlib.suppress(S3Error):
            self._client.delete(self._key)

    def add(self, member: Member) -> None:
        """Has `member` stopped and killed with the lease."""
        with self._lock:
            self._members.append(member)
            if self.lost:
                member.send(signal.SIGKILL)
            elif self.suspended:
                member.hold(HELD_BY_LEASE)

    def write(self, request: Callable[[S3Client], object]) -> None:
        """Has `request` write to the store while the lease holds, and again while S3 fails.

        Raises S3Error, Stuck, and what `pause` raises.
        """
        give_up = time.monotonic() + self._patience_seconds
        while True:
            with self._lock:
                self.check()
                allowed = not self.suspended
                self._own_writes += allowed
            try:
                if allowed:
                    request(self._hasty_client)
                    return
            except Stopped:
                self.expires = True  # what was not answered may take effect later
                raise
            except S3Error as error:
                if (error.status and error.status not in RETRIED_STATUSES) or time.monotonic() > give_up:
                    raise
            finally:
                with self._lock:
                    self._own_writes -= allowed
                    if self.suspended and not self._own_writes:
                        self._switch.arm(0)
            if time.monotonic() > give_up:
                raise Stuck(
                    f"{self._client.store.name}: the lease cannot be renewed: {self._trouble}",
                    "Run it again.",
                )
            self._pause(GUARD_SECONDS)

    def check(self) -> None:
        """Raises Stuck when the lease is lost."""
        if self.lost:
            raise Stuck(f"{self._client.store.name}: {self.lost}", "Nothing was written since; run it again.")

    def _renew_on(self) -> None:
        """The renewing thread's life."""
        ttl = self._holder.ttl_seconds
        while not self._over.wait(max(ttl / 20, self._valid_until - ttl * 3 / 4 - boot_seconds())):
            try:
                self._renew()
            except S3Error as error:
                self._trouble = str(error)

    def _renew(self) -> None:
        if not self._write(self._renewing_client, {"If-Match": self._etag}):
            current = look_at_lease(self._renewing_client)
            if current is None or current.holder.run_id != self._holder.run_id:
                who = current.holder if current else "its object was deleted"
                self._lose(f"the lease on the repository was lost ({who})")
                return
            self._write(self._renewing_client, {"If-Match": current.etag})
        with self._lock:
            self._arm()
            if self.suspended and self._is_fresh:
                self.suspended = False
                self._notice("the lease is renewed: the work goes on")
                for member in self._members:
                    member.let_go(HELD_BY_LEASE)

    def _guard(self) -> None:
        """The guarding thread's life: a renewal may be waiting for S3 when the lease runs out."""
        while not self._over.wait(GUARD_SECONDS):
            with self._lock:
                if self.suspended or self.lost or self._is_fresh:
                    continue
                self.suspended = True
                for member in self._members:
                    member.hold(HELD_BY_LEASE)
                if not self._own_writes:
                    self._switch.arm(0)  # nobody writes any more
            self._notice(f"the lease cannot be renewed: the work is suspended until it can: {self._trouble}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            self.lost = reason
            for member in self._members:
                member.send(signal.SIGKILL)
            self._switch.arm(0)
            self._over.set()

    def _end_threads(self) -> None:
        self._over.set()
        for thread in self._threads:
            if thread.ident and not self.expires:
                thread.join(CLEANUP_SECONDS)

    def release(self) -> None:
        """Gives the lease back, if it is certain that it is still ours; else, or if asked to, it expires."""
        self._end_threads()
        is_answered = not any(thread.is_alive() for thread in self._threads)
        certain = is_answered and boot_seconds() < self._valid_until - LEASE_MARGIN_SECONDS
        if self.enforced and certain and not (self.lost or self.expires):
            try:
                self._hasty_client.delete(self._key, {"If-Match": self._etag})
            except (S3Error, Stopped) as error:
                self._notice(f"the lease could not be given back, and expires by itself: {error}")
        self._switch.close()


def refuses_conditions(error: S3Error) -> bool:
    """Whether a server says that it does not know conditional writes."""
    return error.status == 501 or error.code in ("NotImplemented", "InvalidArgument")


@contextlib.contextmanager
def leased(
    client: S3Client,
    holder: Holder,
    wait_seconds: float | None,
    patience_seconds: float,
    notice: Callable[[str], None],
    pause: Callable[[float], None],
    switch: DeadMansSwitch | None = None,
) -> Iterator[Lease]:
    """The lease on the repository in `client`'s store. Raises what `Lease.acquire` raises."""
    lease = Lease(client, holder, patience_seconds, notice, pause, switch)
    try:
        lease.acquire(wait_seconds)
        yield lease
    finally:
        lease.release()


# ------------------------------------------------------------------------------------------------ Processes

Result = TypeVar("Result")


DEFECT = "this is a defect of the program, please report it"


class Console:
    """Prints one line an event, with the name of the store that it is about.

    As text for people, or as one JSON object each, with what an event has in numbers. Safe to use from
    several threads.
    """

    def __init__(
        self, debug: bool, as_json: bool = False, run_id: str = "", environ: Mapping[str, str] | None = None
    ) -> None:
        """`debug` shows the lines that are otherwise left out.

        Without an `environ` that allows it there are no colours.
        """
        self.debug_is_shown = debug
        self.as_json = as_json
        self.troubles = Troubles()
        self.secrets: Collection[str] = ()  # that no traceback may show
        self._run_id = run_id
        self._colours = not as_json and environ is not None and allows_colours(environ)
        self._lock = threading.Lock()
        self._stream = sys.stdout
        self._terminal = sys.stdout.isatty() and not as_json
        self._progress_is_shown = False
        self._progress_due: dict[str, float] = {}
        self._latest_progress: dict[str, tuple[float, str]] = {}

    def leave_standard_output(self) -> None:
        """From now on prints to standard error only: standard output is for what a program may read."""
        self._stream = sys.stderr
        self._terminal = sys.stderr.isatty() and not self.as_json

    def info(self, name: str, text: str, event: str = "message", /, **numbers: Any) -> None:
        """Something that went as planned; JSON has the kind of event, and `numbers` as fields."""
        self._print("info", name, text, event, numbers)

    def debug(self, name: str, text: str) -> None:
        """Something that only a search for a fault is interested in."""
        if self.debug_is_shown:
            self._print("debug", name, text)

    def warning(self, name: str, text: str, event: str = "message", /, **numbers: Any) -> None:
        """Something that did not go as planned and did not stop the work."""
        self.troubles.add("warning", name, text)
        self._print("warning", name, text, event, numbers)

    def error(self, name: str, text: str, event: str = "message", /, **numbers: Any) -> None:
        """A failure."""
        self.troubles.add("error", name, text)
        self._print("error", name, text, event, numbers)

    def defect(self, name: str, error: BaseException) -> None:
        """An exception that nobody foresaw. Its words may be anybody's, and quote what is secret."""
        trace = redacted("".join(traceback.format_exception(error)), self.secrets)
        self.error(name, DEFECT, "defect", traceback=trace)
        if not self.as_json:
            print(trace, end="", file=sys.stderr)

    def plain(self, text: str) -> None:
        """Text of several lines, such as a table."""
        for line in text.splitlines():
            self._print("info", "", line)

    def progress(self, name: str, text: str, /, **numbers: Any) -> None:
        """How far something is: a live line on a terminal, elsewhere a line every PROGRESS_SECONDS."""
        now = time.monotonic()
        if self._terminal:
            self._show_live(now, name, text)
        elif now >= self._progress_due.setdefault(name, now + PROGRESS_SECONDS):
            self._progress_due[name] = now + PROGRESS_SECONDS
            self.info(name, text, "progress", **numbers)

    def _show_live(self, now: float, name: str, text: str) -> None:
        """One line for all that are at work; who has been silent for a while is at work no more."""
        with self._lock, contextlib.suppress(OSError):
            self._latest_progress[name] = now, text
            shown = {
                name: text
                for name, (when, text) in self._latest_progress.items()
                if now - when < LIVE_SECONDS
            }
            width = (shutil.get_terminal_size().columns - 1) // len(shown)
            parts = [printable(f"[{name}] {text}")[: width - 1].ljust(width) for name, text in shown.items()]
            print(f"\r\033[K{''.join(parts).rstrip()}", end="", file=self._stream, flush=True)
            self._progress_is_shown = True

    def _print(
        self,
        level: str,
        name: str,
        text: str,
        event: str = "message",
        numbers: Mapping[str, Any] | None = None,
    ) -> None:
        stream = sys.stderr if level in COLOURS else self._stream
        if self.as_json:
            line = json_line(datetime.now(UTC), level, self._run_id, name, event, text, numbers or {})
        else:
            line = self._text_line(level, name, text, self._colours and stream.isatty())
        with self._lock, contextlib.suppress(OSError):  # a terminal that was closed must not end a backup
            if self._progress_is_shown:
                print("\r\033[K", end="", file=self._stream, flush=True)
                self._progress_is_shown = False
            print(line, file=stream, flush=True)

    def _text_line(self, level: str, name: str, text: str, colours: bool) -> str:
        """A line for people. Only the word `warning` or `error` is coloured."""
        clock = "" if self._terminal else f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} "
        label = f"{level}: " if level in COLOURS else ""
        if label and colours:
            label = f"\033[{COLOURS[level]}m{level}:\033[0m "
        return f"{clock}[{name}] {label}{printable(text)}" if name else f"{label}{printable(text)}"


COLOURS = {"warning": 33, "error": 31}  # yellow and red (ECMA-48, "Select Graphic Rendition")


def allows_colours(environ: Mapping[str, str]) -> bool:
    """Whether colours are welcome on a terminal (https://no-color.org)."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def json_line(
    when: datetime, level: str, run_id: str, name: str, event: str, text: str, numbers: Mapping[str, Any]
) -> str:
    """An event as one line of JSON. `about` is what text has in brackets; a target is a field, too."""
    entry = {
        "time": f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03}Z",
        "level": level,
        "run_id": run_id,
        "event": event,
        "about": name,
    }
    if name.startswith("target-"):
        entry["target"] = name.removeprefix("target-")
    # A key that is not UTF-8 has lone surrogates, at which some readers of JSON stumble.
    entry["message"] = text.encode("utf-8", "backslashreplace").decode()
    return json.dumps({**entry, **numbers})


class Troubles:
    """The warnings and errors that were printed: the first of either kind, and how many more there are."""

    def __init__(self) -> None:
        """None."""
        self.more = 0
        self._named: dict[str, list[tuple[str, str]]] = {"error": [], "warning": []}

    def add(self, level: str, name: str, text: str) -> None:
        """Takes in a line about `name`."""
        if len(self._named[level]) < MAX_TROUBLES:
            self._named[level].append((name, " ".join(text.split())))
        else:
            self.more += 1

    def about(self, level: str, names: Iterable[str]) -> list[str]:
        """The errors or warnings about one of `names`."""
        names = set(names)
        return [text for name, text in self._named[level] if name in names]

    def names(self) -> list[str]:
        """What there are any about."""
        return list(dict.fromkeys(name for named in self._named.values() for name, _ in named))

    def lines(self) -> list[str]:
        """All of them, errors first."""
        lines = [f"[{name}] {level}: {text}" for level, named in self._named.items() for name, text in named]
        return [*lines, f"{self.more:,} more"] if self.more else lines


MAX_TROUBLES = 100  # of each kind


def printable(text: str) -> str:
    """`text` on one line: object keys may hold line ends and control characters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Stop:
    """The stop signals that came. Handlers only note them; whoever waits asks."""

    def __init__(self) -> None:
        """Nothing came yet."""
        self.signals: list[int] = []

    def install(self) -> None:
        """Takes over SIGTERM, SIGINT and SIGHUP. Only the main thread may call this."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signals.append(signum)

    @property
    def requested(self) -> bool:
        """Whether the work is to end."""
        return bool(self.signals)

    @property
    def hurried(self) -> bool:
        """Whether it is to end now: a second signal came."""
        return len(self.signals) > 1

    def check(self) -> None:
        """Raises Stopped when a signal came."""
        if self.signals:
            raise Stopped(self.signals[0])

    def wait(self, seconds: float) -> None:
        """Sleeps; raises Stopped as soon as a signal came."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, POLL_SECONDS))
        self.check()


@dataclass
class Report:
    """What is told of a run at its end, filled in as it goes."""

    run_id: str
    label: str
    started: datetime
    targets: list[dict[str, Any]] = field(default_factory=list)  # how each went, as JSON has it
    table: str = ""  # the same for people
    configured: tuple[str, ...] | None = None  # all targets' names, once they are known
    command: str = "run"


@dataclass
class Runtime:
    """What every part of a run needs."""

    settings: Settings
    environ: Mapping[str, str]
    console: Console
    stop: Stop
    memory_mb: int  # what TigrisFS's caches are sized by
    report: Report

    @property
    def run_id(self) -> str:
        """What tells this run from all others."""
        return self.report.run_id


class Child:
    """A running child process in a session of its own, so that only we send it signals.

    Its output is read to the end by threads that hand every line to `on_output` or `on_error`.
    """

    is_watched = True  # whether it is stuck when nothing moves for long

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        on_output: Callable[[str], None],
        on_error: Callable[[str], None],
        pass_fds: Sequence[int] = (),
        dies_with_us: bool = True,
    ) -> None:
        """Starts the process. Raises BackupError when it cannot be started."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._start(argv, env, pass_fds, dies_with_us, start_new_session=True, **pipes)
        self._look_after((self._process.stdout, on_output), (self._process.stderr, on_error))

    def _start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        pass_fds: Sequence[int],
        dies_with_us: bool,
        **how: Any,
    ) -> None:
        try:
            self._process = subprocess.Popen(
                argv,
                env=dict(env),
                pass_fds=pass_fds,
                # Without this a SIGKILL of ours would leave a borg behind that goes on writing.
                preexec_fn=die_with_parent if dies_with_us else None,
                **how,
            )
        except OSError as error:
            raise BackupError(
                f"cannot start {argv[0]}: {error.strerror}", "The image brings it; see the README."
            ) from None

    def _look_after(self, *streams: tuple[IO[bytes], Callable[[str], None]]) -> None:
        """Reads these streams, and waits for the end."""
        self._holders: set[str] = set()
        self._hold_lock = threading.Lock()
        self._ended = threading.Event()
        self._readers = [threading.Thread(target=read_lines, args=pair, daemon=True) for pair in streams]
        for thread in (*self._readers, threading.Thread(target=self._reap, daemon=True)):
            thread.start()

    def _reap(self) -> None:
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=POLL_SECONDS * 5)  # a grandchild may hold the pipe open
        self._ended.set()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait(self, seconds: float) -> int | None:
        """The exit code (128+N for signal N), or None when the process still runs after `seconds`."""
        if not self._ended.wait(seconds):
            return None
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    def send(self, signum: int) -> None:
        """Sends a signal; nothing happens when the process has ended."""
        self._process.send_signal(signum)

    def hold(self, why: str) -> None:
        """Stops it (SIGSTOP) until all who hold it have let it go."""
        with self._hold_lock:
            self._holders.add(why)
            self.send(signal.SIGSTOP)

    def let_go(self, why: str) -> None:
        """Has it go on (SIGCONT), unless somebody else holds it."""
        with self._hold_lock:
            if why in self._holders:
                self._holders.remove(why)
                if not self._holders:
                    self.send(signal.SIGCONT)

    def is_held(self, why: str) -> bool:
        """Whether it is stopped for this reason."""
        return why in self._holders

    def kill(self) -> bool:
        """Ends the process; False when it hangs in a system call, and ends when that mount is gone."""
        self.send(signal.SIGKILL)
        return self.wait(KILL_SECONDS) is not None


class StreamedChild(Child):
    """A child whose standard output `consume` reads as it is, in a thread of its own.

    It has ended when that thread has, too. Where that leaves early the child finds its pipe closed.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        consume: Callable[[IO[bytes]], None],
        on_error: Callable[[str], None],
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts the process. Raises BackupError when it cannot be started."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._start(argv, env, pass_fds, dies_with_us=True, start_new_session=True, **pipes)
        self._look_after((self._process.stderr, on_error))

        def work() -> None:
            with self._process.stdout as stream:
                consume(stream)

        self.consumed = in_background(work)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None when it or whoever reads its output is not done after `seconds`."""
        code = super().wait(seconds)
        if code is None or concurrent.futures.wait([self.consumed], timeout=seconds).not_done:
            return None
        return code


class ForegroundChild(Child):
    """A child with our own standard streams, and with the terminal where there is one: a person talks to it.

    It is the terminal's foreground process group, as a shell's command would be: it may read from the
    terminal, and Ctrl-C reaches it alone. Ctrl-Z it ignores, as nobody could have it go on.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> None:
        """Starts the process. Raises BackupError when it cannot be started. Only for the main thread."""
        self.is_watched = not os.isatty(0)  # it may wait for a person, who can press Ctrl-C
        before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # children inherit this
        try:
            self._start(argv, env, pass_fds, dies_with_us=True, process_group=0)
        finally:
            signal.signal(signal.SIGTSTP, before)
        self._look_after()

    @contextlib.contextmanager
    def in_foreground(self) -> Iterator[None]:
        """The terminal is the child's; afterwards it is again as it was, its settings included."""
        try:
            before, settings = os.tcgetpgrp(0), termios.tcgetattr(0)
        except (OSError, termios.error):  # no terminal, or not that of our session
            yield
            return
        try:
            set_terminal(self.pid)
            self.send(signal.SIGCONT)  # it may have asked for the terminal too early
            yield
        finally:
            set_terminal(before, settings)


def set_terminal(process_group: int, settings: list[Any] | None = None) -> None:
    """Makes a process group the terminal's foreground one, and sets the terminal up.

    Without the block, SIGTTOU would stop us where we are in the background: below a PID 1, for instance.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        with contextlib.suppress(OSError, termios.error):  # the group may be gone already
            os.tcsetpgrp(0, process_group)
            if settings:
                termios.tcsetattr(0, termios.TCSADRAIN, settings)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTTOU])


def die_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it is gone."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def read_lines(stream: IO[bytes], on_line: Callable[[str], None]) -> None:
    """Hands each line of `stream` to `on_line` until its end."""
    with stream:
        for line in stream:
            on_line(line.decode("utf-8", "replace").rstrip("\n"))


def io_bytes(pid: int) -> int:
    """How much a process has read and written by system calls, /proc/PID/io of proc(5); 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return 0
    return sum(int(number) for number in re.findall(r"^[rw]char: ([0-9]+)$", text, re.MULTILINE))


def cpu_seconds(pid: int) -> float:
    """How long a process has computed, /proc/PID/stat of proc(5); 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return 0.0
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Stillness:
    """How long nothing has moved.

    Each meter returns a number that grows by 1 or more where there is progress.
    """

    def __init__(self, meters: Sequence[Callable[[], float]]) -> None:
        """The time runs from now on."""
        self._meters, self._moved_at = meters, time.monotonic()
        self._before = [meter() for meter in meters]

    def seconds(self, now: float) -> float:
        """How long it has been; to be asked again and again."""
        values = [meter() for meter in self._meters]
        if any(value >= before + 1 for value, before in zip(values, self._before, strict=True)):
            self._before, self._moved_at = values, now
        return now - self._moved_at


class StallClock:
    """Notices when nothing moves any more, neither what `meters` measure nor the mounts.

    That is so after `seconds`. It is much sooner where S3 is not the reason: where each of our own questions
    to it was answered, and tigrisfs had nothing to complain about either. Then something waits for what will
    never come.
    """

    def __init__(
        self,
        seconds: float,
        mounts: Sequence[Mount],
        *meters: Callable[[], float],
        beside: Callable[[], float] | None = None,
        hasty: bool = True,
    ) -> None:
        """The time runs from now on.

        About `beside` see Mount.meter; where it is not `hasty`, only `seconds` count.
        """
        self._seconds, self._mounts = seconds, mounts
        self._silence_seconds = max(SILENCE_SECONDS, seconds / 8)
        self._is_hasty = hasty and len(mounts) > 0 and self._silence_seconds < seconds < math.inf
        complaints = [lambda log=mount.log: log.complained_at for mount in mounts]
        self._still, self._silent = (
            Stillness([*meters, *more, *(mount.meter(limit, beside) for mount in mounts)])
            for limit, more in ((seconds, []), (self._silence_seconds, complaints))
        )
        self._looked_at = self._asked_at = self._unsure_at = time.monotonic()
        self._question: concurrent.futures.Future[bool] | None = None

    def check(self, what: Callable[[], str]) -> None:
        """Raises Hung, saying what `what` returns, when nothing moves; S3Error when S3 refuses all we ask."""
        now = time.monotonic()
        if now - self._looked_at < min(1.0, self._seconds / 10):
            return
        self._looked_at = now
        remedy = "STALL_TIMEOUT says how long that may be; run it again."
        if self._still.seconds(now) > self._seconds:
            raise Hung(f"{what()} (no progress for {self._seconds:.0f} s)", remedy)
        if self._is_hasty and self._is_silent(now):
            raise Hung(f"{what()} (no progress for {self._silence_seconds:.0f} s, though S3 answers)", remedy)

    def _is_silent(self, now: float) -> bool:
        """Whether there was silence for long enough, and S3 has answered for the second half of it.

        S3 is asked in the background: it may hold us up for as long as it likes.
        """
        if self._silent.seconds(now) < self._silence_seconds / 2:
            self._unsure_at, self._question = now, None
        elif self._question and self._question.done():
            answered, self._question = self._question.result(), None
            if answered:
                return now - self._unsure_at >= self._silence_seconds / 2
            self._unsure_at = now
        elif not self._question and now - self._asked_at >= self._silence_seconds / 12:
            self._asked_at = now
            self._question = in_background(lambda: all(mount.answers() for mount in self._mounts))
        return False


def run_to_end(child: Child, stop: Stop, check: Callable[[], None] = lambda: None) -> int:
    """The exit code of `child` when it has ended; a stop signal ends it, politely and then for certain.

    So does what `check` raises, which is called all the while; Stuck kills it at once.
    """
    while (code := child.wait(POLL_SECONDS)) is None:
        try:
            check()
            stop.check()
        except Stuck:
            child.kill()
            raise
        except BackupError:
            terminate(child, stop)
            raise
    return code


def terminate(child: Child, stop: Stop) -> None:
    """Ends a child politely, and for certain when that takes too long or somebody is in a hurry."""
    child.send(signal.SIGTERM)
    child.let_go(HELD_BACK)  # or it would not hear it
    give_up = time.monotonic() + TERMINATE_SECONDS
    while child.wait(POLL_SECONDS) is None:
        if stop.hurried or time.monotonic() > give_up:
            child.kill()
            return


def run_quickly(argv: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Runs a small program and returns exit code and output; 124 when it took longer than `seconds`."""
    lines: list[str] = []
    child = Child(argv, env, lines.append, lines.append)
    code = child.wait(seconds)
    if code is None:
        child.kill()
        return 124, "no answer"
    return code, " ".join(lines)


def in_background(function: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """Runs `function` in a thread that nobody waits for at exit: it may hang in a system call for ever."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def within(seconds: float, what: str, function: Callable[[], Result], stop: Stop | None = None) -> Result:
    """The result of `function`, which may block for ever in a system call, such as on a hanging mount.

    Raises Hung after `seconds`, Stopped on a stop signal; the thread is then left to itself.
    """
    future, deadline = in_background(function), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
            return future.result()
        if stop:
            stop.check()
    raise Hung(f"{what}: no answer within {seconds:.0f} s", TRY_AGAIN)


def side_by_side(functions: Sequence[Callable[[], Result]], stop: Stop) -> list[Result | BackupError]:
    """The results of all functions, run at the same time; a BackupError of one is its result.

    Raises Stopped on a stop signal, after CLEANUP_SECONDS for those that are about to end.
    """
    futures = [in_background(function) for function in functions]
    while concurrent.futures.wait(futures, timeout=POLL_SECONDS).not_done:
        if stop.requested:
            concurrent.futures.wait(futures, timeout=CLEANUP_SECONDS)
        stop.check()
    errors = [future.exception() for future in futures]
    stop.check()
    return [
        error if isinstance(error, BackupError) else future.result()
        for future, error in zip(futures, errors, strict=True)
    ]


def minimal_environment(environ: Mapping[str, str], names: Iterable[str], **own: str) -> dict[str, str]:
    """A child's environment: what any program needs, the variables in `names`, and `own`; no secrets."""
    kept = ("PATH", "HOME", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", *names)
    return {**{name: environ[name] for name in kept if name in environ}, "LC_ALL": "C.UTF-8", **own}


# --------------------------------------------------------------------------------------------------- Mounts

FUSE_HELP = (
    "Start the container with"
    " --device /dev/fuse:/dev/fuse --cap-add SYS_ADMIN --security-opt apparmor:unconfined."
)


def container_memory_mb(root: Path = Path("/")) -> int:
    """The memory that this process may use, in MB: the machine's, or less where a control group says so.

    Looks at memory.max of cgroup v2 and memory.limit_in_bytes of v1, of our group and of all above it,
    as far as a container sees them ("Control Group v2" and "Memory Resource Controller" of the kernel's
    documentation).
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in CGROUP_FILES:
            continue
        folder, name = CGROUP_FILES[kind]
        path = Path(group.lstrip("/"))
        for part in (path, *path.parents):
            with contextlib.suppress(OSError, ValueError):  # `max`, or not shown to us
                limits.append(int((root / folder / part / name).read_text(encoding="ascii")))
    return min(limits) // 1_000_000


CGROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
}


def targets_at_once(settings: Settings, memory_mb: int) -> int:
    """How many targets are backed up side by side: what is asked for, or less where memory is short."""
    room = memory_mb - data_cache_mb(memory_mb, settings.source) - OWN_MB - FIXED_MB
    affordable = room // (SMALLEST_CACHE_MB + FIXED_MB + BORG_MB)
    return max(1, min(len(settings.targets), settings.parallel_targets, affordable))


def data_cache_mb(memory_mb: int, store: Store, at_once: int = 1) -> int:
    """How much tigrisfs may cache of a store's data, in MiB; with `at_once` targets at most the half in all.

    Where memory is short, the source gets what is left beside one target.
    """
    if store.target is None:
        return max(SMALLEST_CACHE_MB, min(SOURCE_CACHE_MB, memory_mb // 4, memory_mb - LEAST_REST_MB))
    return max(SMALLEST_CACHE_MB, min(TARGET_CACHE_MB, memory_mb // (4 * max(2, at_once))))


def read_ahead_bytes(memory_mb: int, source: Store) -> int:
    """How far ahead of borg the source is read.

    TigrisFS drops what was not used for the longest time. What was read ahead is older than what borg has
    read meanwhile, so that its cache needs room for both, and for requests under way: with two fifths of it
    a large object was fetched 1.6 times.
    """
    return data_cache_mb(memory_mb, source) * 1024 * 1024 // 4


def piece_bytes(window_bytes: int) -> int:
    """How much of an object one thread reads ahead at a time, and TigrisFS with one request."""
    return min(max(window_bytes // 8, SMALLEST_PIECE_BYTES), LARGEST_PIECE_BYTES) // 4096 * 4096


def read_ahead_flags(store: Store, memory_mb: int, cache_mb: int) -> list[str]:
    """How much TigrisFS reads ahead by itself, with sizes that are safe with such a cache.

    With its defaults (5 MB, and 100 MB of a file that is read for long) a limit below 300 MB makes reads fail
    with ENOMEM, which borg takes for an unreadable file, or blocks `borg compact` for good. A single reader
    was seen to have requests for 5.5 times --read-ahead-large in the queue, each of which reserves its memory
    before it waits for more: when they come to the limit while a file is written, nothing moves any more.
    """
    if store.target is None:
        piece_kb = piece_bytes(read_ahead_bytes(memory_mb, store)) // 1024
        ahead_kb, large_kb, part_kb = piece_kb, piece_kb, piece_kb
    else:
        large_kb = cache_mb * 1024 // 16
        ahead_kb, part_kb = 1024, large_kb // 2
    flags = {"--read-ahead": ahead_kb, "--read-ahead-large": large_kb, "--read-ahead-parallel": part_kb}
    return [word for flag, kilobytes in flags.items() for word in (flag, str(kilobytes))]


def tigrisfs_command(
    store: Store,
    region: str,
    mount_point: Path,
    read_only: bool,
    sizes: Sequence[str],
    metadata: bool = False,
) -> list[str]:
    """The command line that mounts `store`; its keys go through the environment.

    `sizes` are its flags for memory (`memory_flags`). `metadata` shows objects' user metadata as extended
    attributes, at the cost of a HEAD request for each.
    """
    return [
        "tigrisfs",
        "-f",  # in the foreground: a daemon cannot be waited for, and what it still uploads is lost
        *("--log-format", "json", "--no-log-color", "--print-stats", "0s"),
        *("--endpoint", store.endpoint, "--region", region),
        "--no-detect",  # it asks for an absent object: who may use a prefix only is told 403 (AWS)
        "--no-expire-multipart",  # else it deletes other programs' multipart uploads
        *(() if metadata else ("--disable-xattr",)),
        *sizes,
        *("--stat-cache-ttl", METADATA_TTL),
        *(*READ_RETRIES, "--retry-interval", WRITE_RETRY),
        *("--http-timeout", READ_TIMEOUT if read_only else WRITE_TIMEOUT),
        *("--max-parallel-parts", PARALLEL_PARTS),
        *store.mount_flags,
        *(("-o", "ro") if read_only else ()),
        store.location,
        str(mount_point),
    ]


def memory_flags(settings: Settings, memory_mb: int, store: Store) -> list[str]:
    """TigrisFS's flags for its cache, and for what it reads ahead."""
    cache_mb = data_cache_mb(memory_mb, store, targets_at_once(settings, memory_mb))
    return ["--memory-limit", str(cache_mb), *read_ahead_flags(store, memory_mb, cache_mb)]


def tigrisfs_environment(store: Store, environ: Mapping[str, str]) -> dict[str, str]:
    """What tigrisfs gets to see: its own key pair, and no configuration file of somebody else."""
    return minimal_environment(
        {**environ, "HOME": "/nonexistent"},
        (),
        AWS_ACCESS_KEY_ID=store.access_key_id,
        AWS_SECRET_ACCESS_KEY=store.secret_access_key,
        AWS_EC2_METADATA_DISABLED="true",
    )


# borg tries a hard link when it saves a repository's config, removes folders that are not empty, and takes a
# lock by renaming a folder onto the one that somebody else may hold.
HARMLESS_LINES = (
    "*fuseops.RenameOp error: directory not empty",
    "*fuseops.CreateLinkOp error: function not implemented",
    "*fuseops.RmDirOp error: directory not empty",
)
# The SDK tells an S3 error as `CODE: MESSAGE\n\tstatus code: NUMBER, ...`.
REFUSED_WRITE = re.compile(r"(Failed to .*?): (\w+): (.*?)\n\tstatus code: (4\d\d),", re.DOTALL)
UNFINISHED = re.compile(r"Failed to finalize multi-part upload of object (.*?): \w+: ", re.DOTALL)
# 4xx answers that are right the next time; NoSuchUpload can mean that all is there, see Mount.find_arrived.
PASSING_CODES = (*RETRIED_CODES, "OperationAborted", "NoSuchUpload")
SHORT_READ = re.compile(r"Error reading \d+ \+\d+ of (.*) \(attempt \d+\): EOF", re.DOTALL)


class TigrisLog:
    """Reads TigrisFS's log.

    Warnings and errors are shown under the mount's name, the rest only when debugging.
    """

    def __init__(self, name: str, console: Console) -> None:
        """Nothing was read yet."""
        self.complaints: deque[str] = deque(maxlen=5)
        self.shrunk: set[str] = set()  # objects that ended before their listed size
        self.failed_uploads = 0
        self.unfinished: set[str] = set()  # keys whose CompleteMultipartUpload failed
        self.arrived: set[str] = set()  # those of them that are in the bucket all the same
        self.lost = ""  # why it has dropped what was written
        self.complained_at = 0.0
        self._refused: dict[str, tuple[int, float]] = {}  # what failed -> how often in a row, and when last
        self._refusal: tuple[str, str, str, str] | None = None
        self._name, self._console = name, console
        self._window_start, self._shown, self._hidden = 0.0, 0, 0

    def feed(self, line: str) -> None:
        """Takes one line."""
        try:
            entry = json.loads(line)
            level, message = str(entry.get("level", "warn")), str(entry.get("message", "")).strip()
            if entry.get("error"):
                message = f"{message}: {entry['error']}"
        except (ValueError, AttributeError):
            level, message = "warn", line.strip()
        if "AWS_ACCESS_KEY_ID" in message or not message:
            return
        if level in ("trace", "debug", "info") or message in HARMLESS_LINES:
            self._console.debug(self._name, f"tigrisfs: {message}")
            return
        if match := SHORT_READ.fullmatch(message):
            self.shrunk.add(match[1])
        if match := UNFINISHED.match(message):
            if match[1] in self.arrived:  # it repeats that as long as it lives
                return
            self.unfinished.add(match[1])
        self._note_refusal(message)
        self.complaints.append(message)
        if message.startswith("Conflict detected"):
            self.lost = "; ".join(list(self.complaints)[-2:])
        self.failed_uploads += message.startswith("Failed to flush")
        self.complained_at = time.monotonic()
        self._show(f"tigrisfs: {message}")

    def _note_refusal(self, message: str) -> None:
        match, now = REFUSED_WRITE.match(message), time.monotonic()
        if not match or int(match[4]) in RETRIED_STATUSES or match[2] in PASSING_CODES:
            return
        times, last = self._refused.get(match[1], (0, now))
        times = times + 1 if now - last < COMPLAINT_SECONDS else 1
        self._refused[match[1]] = (times, now)
        if times >= REFUSED_TIMES:
            self._refusal = (match[1], match[2], match[3], match[4])

    def _show(self, text: str) -> None:
        now = time.monotonic()
        if now - self._window_start > 60:
            if self._hidden:
                self._console.warning(
                    self._name, f"tigrisfs: {self._hidden} more such lines in the last minute"
                )
            self._window_start, self._shown, self._hidden = now, 0, 0
        if self._shown < COMPLAINTS_A_MINUTE:
            self._shown += 1
            self._console.warning(self._name, text)
        else:
            self._hidden += 1

    @property
    def is_complaining(self) -> bool:
        """Whether it complained a short while ago."""
        return self.complained_at > 0 and time.monotonic() - self.complained_at < COMPLAINT_SECONDS

    @property
    def refusal(self) -> tuple[str, str, str, str] | None:
        """What S3 refuses as often as it is tried, its code, its words, and the status."""
        return self._refusal if self.is_complaining else None

    @property
    def reason(self) -> str:
        """What it complained about last."""
        return self.complaints[-1] if self.complaints else "tigrisfs said nothing about it"


def mount_table() -> dict[str, str]:
    """Mount point -> file system type in this process's mount namespace."""
    return parse_mount_table(Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape"))


def parse_mount_table(text: str) -> dict[str, str]:
    """Mount point -> file system type from the text of /proc/PID/mountinfo, proc(5)."""
    table = {}
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        raw = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields.split(" ")[4])
        table[raw] = rest.split(" ")[0]
    return table


@dataclass
class Mount:
    """A mounted store and the tigrisfs process behind it."""

    store: Store
    path: Path
    child: Child
    log: TigrisLog
    client: S3Client  # to ask S3 directly
    lease: Lease | None = None  # what allows writing to it
    asked_at: float = 0.0
    nudges: int = 0  # how often its flusher was woken
    arrived: set[Path] = field(default_factory=set)  # files that are uploaded though their fsync fails
    usable: bool = False  # it was listed
    is_by_hand: bool = False  # what a person wrote is worth waiting for
    is_shared: bool = False  # by several borgs
    holds_nothing: bool = False  # that would have to be uploaded: tigrisfs may end at any moment

    def __post_init__(self) -> None:
        """Begins to note when tigrisfs has moved something, and be it in vain."""
        unit = IDLE_BYTES_PER_SECOND * FAILING_FLUSH_SECONDS
        self._stillness = Stillness([lambda: (io_bytes(self.child.pid) - NUDGE_BYTES * self.nudges) / unit])

    @property
    def is_still(self) -> bool:
        """Whether it has not moved a byte for a while; `check_alive` asks this all the time."""
        seconds = self._stillness.seconds(time.monotonic())
        return seconds > FAILING_FLUSH_SECONDS and not self.is_by_hand

    @property
    def is_alive(self) -> bool:
        """Whether somebody serves it."""
        return self.child.wait(0) is None and str(self.path) in mount_table()

    def check_alive(self) -> None:
        """Raises Hung when the mount is gone: what is read below its path would be an empty folder.

        Also when it has dropped what was written, which borg takes for stored.
        """
        if self.lease:
            self.lease.check()
        _ = self.is_still  # is noted
        if self.log.lost:
            raise Hung(f"{self.store.name}: tigrisfs lost what was written: {self.log.lost}", TRY_AGAIN)
        code = self.child.wait(0)
        if code is not None:
            raise Hung(f"{self.store.name}: tigrisfs ended with {code}: {self.log.reason}", "Run it again.")
        if str(self.path) not in mount_table():
            raise Hung(
                f"{self.store.name}: the mount at {self.path} vanished: {self.log.reason}", "Run it again."
            )

    def check_store(self) -> None:
        """Raises S3Error when S3 refuses what tigrisfs writes, or when the keys or the bucket are gone.

        It tries for ever then, for each object anew.
        """
        if refusal := self.log.refusal:
            what, code, words, status = refusal
            if code == "SerializationError":  # no XML: the answer is not S3's but a proxy's
                code, words = http_reason(int(status)), "a proxy before S3 may have said so"
            raise self.client._error(int(status), code, f"{words} (tigrisfs: {what})")
        if not self.log.is_complaining or time.monotonic() - self.asked_at < ASK_SECONDS:
            return
        self.asked_at = time.monotonic()
        self.answers()
        for key in self.log.unfinished - self.log.arrived:
            self._find_arrived(key)

    def answers(self) -> bool:
        """Whether S3 answers us, and we may write where we want to.

        Raises S3Error when the keys or the bucket are gone.
        """
        try:
            self.client.list_page(self.store.key_prefix, limit=1)
        except S3Error as error:
            if error.status in (401, 403, 404):
                raise
            return False
        return not (self.lease and self.lease.suspended)

    def _find_arrived(self, key: str) -> None:
        """Notes an object that is in the bucket although tigrisfs does not know it.

        When the answer to CompleteMultipartUpload is lost, TigrisFS repeats it for ever, and some servers say
        NoSuchUpload to that.
        """
        path = self.path / key.removeprefix(self.store.key_prefix)
        with contextlib.suppress(OSError, BackupError):
            written = within(KILL_SECONDS, f"{self.store.name}: looking at {path}", path.stat).st_size
            if self.client.request("HEAD", key).headers.get("content-length") == str(written):
                self.log.arrived.add(key)
                self.arrived.add(path)

    def meter(self, stall_seconds: float, beside: Callable[[], float] | None = None) -> Callable[[], float]:
        """A meter for StallClock: what tigrisfs has moved, in units of more than it does when idle.

        It moves bytes for a slow upload and for one that it tries in vain again and again. For each upload
        that failed as many bytes are taken off as its tries can have sent, but no more than were sent in half
        of the time: after an outage a slow line could not make up for it.

        A shared mount may move for others alone. So for a borg whose own meter, `beside`, stands still, it
        counts no more than what others may have asked for before.
        """
        limit, stood_at, start = SHARED_BYTES if beside and self.is_shared else math.inf, None, 0.0
        unit, window_seconds = IDLE_BYTES_PER_SECOND * stall_seconds, max(60.0, stall_seconds / 2)
        before, failed, worth = 0.0, self.log.failed_uploads, 0.0
        worths: deque[tuple[float, float]] = deque()

        def moved() -> float:
            nonlocal before, failed, worth, stood_at, start
            now, sent = time.monotonic(), io_bytes(self.child.pid) - NUDGE_BYTES * self.nudges
            worth, before = worth + sent - before, sent
            while worths and worths[0][0] < now - window_seconds:
                worths.popleft()
            if self.log.failed_uploads > failed:
                vain, failed = RETRY_BYTES * (self.log.failed_uploads - failed), self.log.failed_uploads
                worth = max(worth - vain, min([worth, *(value for _, value in worths)]))
            worths.append((now, worth))
            if beside and stood_at != (stands_at := beside()):
                stood_at, start = stands_at, worth
            return min(worth, start + limit) / unit

        return moved


@contextlib.contextmanager
def mounted(
    runtime: Runtime, store: Store, region: str, read_only: bool, lease: Lease | None = None
) -> Iterator[Mount]:
    """`store` being mounted at its mount point; on leaving it is unmounted and everything is uploaded.

    It is there when `wait_until_usable` returns. Raises BackupError when it cannot be unmounted cleanly.
    Where Stuck is raised inside, or it was not usable, tigrisfs is killed.
    """
    path = prepare_mount_point(runtime, store)
    remove_temporary_mounts(runtime)
    log = TigrisLog(store.name, runtime.console)
    sizes = memory_flags(runtime.settings, runtime.memory_mb, store)
    metadata = runtime.settings.source_metadata and store.target is None
    argv = tigrisfs_command(store, region, path, read_only, sizes, metadata)
    child = Child(argv, tigrisfs_environment(store, runtime.environ), log.feed, log.feed)
    hasty = Patience(answer_seconds=2, unreachable_seconds=0, failing_seconds=0)
    client = S3Client(store, region, hasty, runtime.stop)
    mount = Mount(store, path, child, log, client, lease, holds_nothing=read_only)
    over = threading.Event()
    try:
        if lease:
            lease.add(child)
        if not read_only:
            in_background(lambda: keep_awake(mount, over))
        yield mount
    except BaseException as error:
        over.set()
        if isinstance(error, Stuck) or not mount.usable:
            abandon(runtime, mount)
        else:
            try:
                unmount(runtime, mount)
            except BackupError as second:  # the first error is the one to raise
                runtime.console.warning(store.name, str(second))
        raise
    over.set()
    if mount.usable:
        unmount(runtime, mount)
    else:
        abandon(runtime, mount)


@contextlib.contextmanager
def folder_for_mounts() -> Iterator[Path]:
    """A temporary folder. It stays while something is mounted in it: to remove it would empty a bucket."""
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX)).resolve()
    try:
        yield folder
    finally:
        if not any(Path(mount_point).is_relative_to(folder) for mount_point in mount_table()):
            shutil.rmtree(folder, ignore_errors=True)


def keep_awake(mount: Mount, over: threading.Event) -> None:
    """Opens and closes a file of the mount again and again, which wakes TigrisFS's flusher, until `over`.

    An fsync can miss its wake-up (SyncFile in core/file.go: the upload may end between its look and its
    wait), and then sleeps until something else happens on the mount: borg waits, and nothing does. TigrisFS
    wakes itself two seconds after an upload (recordFlushError), but not after a rename that went well.
    """
    while not over.wait(WAKE_SECONDS):
        mount.nudges += 1
        with contextlib.suppress(OSError):
            os.close(os.open(mount.path / "config", os.O_RDONLY))


def abandon(runtime: Runtime, mount: Mount) -> None:
    """Kills tigrisfs, whatever it still holds, and frees the mount point."""
    cut_off(mount)
    if str(mount.path) in mount_table():
        detach(runtime, mount.path, lazy=True)


def cut_off(mount: Mount) -> None:
    """Kills tigrisfs. What it has sent may take effect later, so that its lease must not end at once."""
    mount.child.kill()
    if mount.lease:
        mount.lease.expires = True


def resolved(path: Path) -> Path:
    """A mount point as the kernel's table has it; the mount itself, which may be dead, is not looked at."""
    return path.parent.resolve() / path.name


def prepare_mount_point(runtime: Runtime, store: Store) -> Path:
    """An empty folder to mount on; a dead mount that a crash left there is removed."""
    if not os.path.exists("/dev/fuse"):
        raise BackupError(f"{store.name}: cannot be mounted: /dev/fuse is missing", FUSE_HELP)
    if runtime.memory_mb < MEMORY_MB[0]:
        raise BackupError(
            f"{store.name}: cannot be mounted safely: there are only {runtime.memory_mb} MB of memory",
            f"Give the container {MEMORY_MB[0]} MB or more (docker run --memory).",
        )
    path = runtime.settings.mount_point(store)
    try:
        path = resolved(path)
        if str(path) in mount_table() and not remove_dead_mount(runtime, store, path):
            name = shlex.quote(store.name)
            raise BackupError(
                f"{store.name}: is mounted at {path} already", f"Unmount it first: backup.py umount {name}"
            )
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackupError(
            f"{store.name}: cannot use {path} as mount point: {error.strerror}",
            "Make its folder writable, or set DATA_DIR to one that is.",
        ) from None
    return path


def probe_mount(runtime: Runtime, store: Store, path: Path) -> None:
    """Lists a mount's root: the kernel answers a mere stat from its cache, even when tigrisfs is dead.

    Raises OSError when the mount is dead, BackupError when it does not answer.
    """
    within(MOUNT_SECONDS, f"{store.name}: listing {path}", lambda: next(os.scandir(path), None), runtime.stop)


TEMPORARY_PREFIX = "s3borgbackup-"  # of what is made in TMPDIR


def remove_temporary_mounts(runtime: Runtime) -> None:
    """Removes what commands that were killed left mounted in temporary folders, unless somebody serves it."""
    temporary = Path(tempfile.gettempdir()).resolve()
    made = re.compile(rf"{TEMPORARY_PREFIX}\w{{8}}")  # by tempfile
    for mount_point, kind in mount_table().items():
        folder = Path(mount_point).parent
        if folder.parent != temporary or not made.fullmatch(folder.name) or not kind.startswith("fuse"):
            continue
        try:
            within(KILL_SECONDS, mount_point, lambda path=mount_point: next(os.scandir(path), None))
        except BackupError:
            pass  # somebody serves it, slowly
        except OSError as error:
            if error.errno not in NOBODY_SERVES:
                continue
            detach(runtime, Path(mount_point), lazy=True)
            if not any(path.startswith(f"{folder}/") for path in mount_table()):
                shutil.rmtree(folder, ignore_errors=True)


# What the kernel says of a mount whose process is gone; a request that was under way then gets the second.
NOBODY_SERVES = (errno.ENOTCONN, errno.ECONNABORTED)


def remove_dead_mount(runtime: Runtime, store: Store, path: Path) -> bool:
    """Detaches a mount that nobody serves any more; returns whether it was one.

    Raises BackupError when it does not answer.
    """
    try:
        probe_mount(runtime, store, path)
    except OSError as error:
        if error.errno not in NOBODY_SERVES:  # somebody's mount that S3 refuses or fails
            return False
        runtime.console.warning(store.name, f"a dead mount at {path} is removed")
        detach(runtime, path, lazy=True)
        return True
    return False


def wait_until_usable(runtime: Runtime, mount: Mount) -> None:
    """Returns when the mount is really there and can be listed; raises BackupError after MOUNT_SECONDS."""
    name, deadline = mount.store.name, time.monotonic() + MOUNT_SECONDS
    if mount.usable:  # another target's borg may have hung on it since
        mount.check_alive()
    while not mount_table().get(str(mount.path), "").startswith("fuse"):
        runtime.stop.check()
        if (code := mount.child.wait(0.02)) is not None:
            reason = "; ".join(mount.log.complaints) or mount.log.reason
            permission = re.search(r"(?i)fuse|permission denied|not permitted", reason)
            raise BackupError(
                f"{name}: cannot be mounted: {reason} (tigrisfs ended with {code})",
                FUSE_HELP if permission else TRY_AGAIN,
            )
        if time.monotonic() > deadline:
            raise Hung(f"{name}: cannot be mounted within {MOUNT_SECONDS} s: {mount.log.reason}", TRY_AGAIN)
    try:
        probe_mount(runtime, mount.store, mount.path)
    except OSError as error:
        raise BackupError(
            f"{name}: cannot be listed: {error.strerror}: {mount.log.reason}", TRY_AGAIN
        ) from None
    if not mount.usable:
        mount.usable = True
        runtime.console.debug(name, f"{mount.store.location} is mounted at {mount.path}")


def walk_files(store: Store, folder: Path) -> Iterator[Path]:
    """The files below a mount's folder. Raises BackupError where a folder cannot be listed."""

    def fail(error: OSError) -> None:
        if error.errno != errno.ENOENT:  # it was removed meanwhile
            raise BackupError(f"{store.name}: listing {error.filename}: {error.strerror}", TRY_AGAIN)

    for name, _, files in os.walk(folder, onerror=fail):
        for file in files:
            yield Path(name, file)


def warm_up(runtime: Runtime, mount: Mount) -> None:
    """Lists all folders of a repository once.

    TigrisFS deadlocks when a folder is renamed onto one that it has not listed yet, and borg takes its
    lock by exactly that rename: on a fresh mount a stale lock would block it for ever. Listings stay
    cached for METADATA_TTL.
    """

    def walk() -> None:
        for _ in walk_files(mount.store, mount.path):
            pass

    until_done(runtime, [mount], f"{mount.store.name}: listing the repository", in_background(walk))


def until_done(
    runtime: Runtime,
    mounts: Sequence[Mount],
    what: str,
    work: concurrent.futures.Future[Result],
    *meters: Callable[[], float],
) -> Result:
    """The result of `work`, which uses the mounts. Raises what it raises; Hung, Stopped, S3Error."""
    stall = StallClock(runtime.settings.stall_seconds, mounts, *meters)
    while concurrent.futures.wait([work], timeout=POLL_SECONDS).not_done:
        runtime.stop.check()
        for mount in mounts:
            mount.check_alive()
            mount.check_store()
        stall.check(lambda: f"{what} does not end")
    return work.result()


def detach(runtime: Runtime, path: Path, lazy: bool) -> str:
    """Detaches a mount; returns why it could not, or nothing.

    umount2(2) where we may, else fusermount3: as root that one needs more of umount(8) than Alpine's has.
    """

    def umount2() -> int:
        failed = LIBC.umount2(os.fsencode(path), MNT_DETACH if lazy else 0)
        return ctypes.get_errno() if failed else 0

    try:
        number = within(MOUNT_SECONDS, f"unmounting {path}", umount2)
        if number != errno.EPERM:
            return os.strerror(number) if number else ""
        argv = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(path)]
        code, words = run_quickly(argv, minimal_environment(runtime.environ, ()), MOUNT_SECONDS)
    except BackupError as error:
        return error.message
    return words or f"fusermount3 ended with {code}" if code else ""


def unmount(runtime: Runtime, mount: Mount) -> None:
    """Unmounts and waits until tigrisfs has uploaded everything and ended.

    Raises BackupError when it does not end in time; then it is killed, and the mount point is free all
    the same.
    """
    if mount.lease and mount.lease.suspended and runtime.stop.requested:
        abandon(runtime, mount)
        raise BackupError(
            f"{mount.store.name}: the upload was cut off, as its lease could not be renewed", "Run it again."
        )
    if mount.holds_nothing:  # it would sleep for a second before it ends, and who still reads would keep it
        mount.child.kill()
    deadline = time.monotonic() + BUSY_SECONDS
    try:
        while str(mount.path) in mount_table() and mount.child.wait(0) is None:
            hangs = runtime.stop.requested and mount.is_still
            lazy = runtime.stop.hurried or hangs or time.monotonic() > deadline
            reason = detach(runtime, mount.path, lazy)
            if reason and lazy:
                runtime.console.warning(mount.store.name, f"cannot unmount {mount.path}: {reason}")
            if lazy or not reason:
                break
            time.sleep(POLL_SECONDS)
        code = wait_for_upload(runtime, mount)
    finally:
        if mount.child.wait(0) is None:  # whatever failed: it must not write on when the lease is given back
            cut_off(mount)
        if str(mount.path) in mount_table():  # it died, and left a mount that answers nothing
            detach(runtime, mount.path, lazy=True)
    if code != 0 and not mount.holds_nothing:
        raise BackupError(f"{mount.store.name}: tigrisfs ended with {code}: {mount.log.reason}", TRY_AGAIN)
    runtime.console.debug(mount.store.name, f"{mount.path} is unmounted")


def flush_patience(runtime: Runtime, mount: Mount) -> float:
    """How many seconds the upload after an unmount may take, as long as it makes progress."""
    if runtime.stop.hurried or (runtime.stop.requested and mount.is_still):
        return HURRIED_FLUSH_SECONDS
    failing = runtime.stop.requested and mount.log.is_complaining
    return FAILING_FLUSH_SECONDS if failing else math.inf


def wait_for_upload(runtime: Runtime, mount: Mount) -> int:
    """The exit code of tigrisfs, which ends when everything is uploaded.

    Kills it when that takes too long.
    """
    start, told = time.monotonic(), False
    stall = StallClock(runtime.settings.stall_seconds, [mount])
    while (code := mount.child.wait(POLL_SECONDS)) is None:
        waited = time.monotonic() - start
        if waited > 2:
            runtime.console.progress(
                mount.store.name, f"uploading what tigrisfs still holds ({waited:.0f} s)"
            )
        if waited > 2 and runtime.stop.requested and not told:
            told = True
            runtime.console.info(
                mount.store.name, "still uploading; `docker run --stop-timeout` grants the time for it"
            )
        try:
            stall.check(lambda: f"{mount.store.name}: the upload does not end: {mount.log.reason}")
            if waited > flush_patience(runtime, mount):
                raise BackupError(
                    f"{mount.store.name}: the upload did not end within {waited:.0f} s: {mount.log.reason}",
                    "What borg wrote last is not in the bucket; the archives of earlier runs are.",
                )
        except BackupError:
            cut_off(mount)
            raise
    if mount.lease:
        mount.lease.check()
    return code


# ----------------------------------------------------------------------------------------------- Read-ahead
# borg reads one object after the other, and waits for S3 at each. So threads read what it is going to read
# through the same mount, and TigrisFS keeps it until borg comes. The objects that borg will read, in its
# order, are taken as one stream; what is read ahead is a window of it that begins where the slowest borg is.


@dataclass(frozen=True)
class Place:
    """An object's place in the stream."""

    path: str
    start: int  # in bytes, as all that follows
    size: int

    @property
    def end(self) -> int:
        """Where the next object begins. A small one counts for more, which bounds how many are ahead."""
        return self.start + max(self.size, SMALLEST_PLACE_BYTES)


@dataclass(frozen=True)
class Piece:
    """What a thread reads at a time: `size` bytes of an object from `offset` on."""

    place: Place
    offset: int
    size: int


@dataclass(eq=False)
class Reader:
    """One borg on its way through the source."""

    since: float = -math.inf  # what was last modified before that, it knows and does not read
    child: Child | None = None  # None: it has not begun yet
    position: int = 0  # how much of the stream is behind it
    began: float = 0.0
    held_at: float = 0.0  # 0: it is not held
    held_seconds: float = 0.0

    def held_for(self, now: float) -> float:
        """How long it was held until now."""
        return self.held_seconds + (now - self.held_at if self.held_at else 0.0)


def in_borgs_order(folder: str) -> Iterator[os.DirEntry[str]]:
    """The files below `folder` in the order in which borg archives them.

    Each folder's entries by inode number, subfolders at once (`scandir_inorder` and `Archiver._rec_walk` of
    borg 1.4).
    """
    stack = [by_inode(folder)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif entry.is_dir(follow_symlinks=False):
            stack.append(by_inode(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield entry


def objects_below(folder: str) -> Iterator[tuple[str, int, float]]:
    """Path, size in bytes and time of last modification of the files below `folder`, in borg's order."""
    for entry in in_borgs_order(folder):
        status = entry.stat(follow_symlinks=False)
        yield entry.path, status.st_size, status.st_mtime


def by_inode(folder: str) -> Iterator[os.DirEntry[str]]:
    """A folder's entries by inode number, or nearly so where there are more than SORTED_AT_ONCE.

    TigrisFS numbers them as it lists them, so that they come nearly sorted: no need to hold a million.
    """
    heap: list[tuple[int, str, os.DirEntry[str]]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            item = entry.inode(), entry.name, entry
            if len(heap) < SORTED_AT_ONCE:
                heapq.heappush(heap, item)
            else:
                yield heapq.heappushpop(heap, item)[-1]
    yield from (item[-1] for item in sorted(heap))


def file_position(pid: int, path: str) -> int:
    """How far a process is in a file that it has open, /proc/PID/fdinfo of proc(5); 0 when it is not open."""
    with contextlib.suppress(OSError, ValueError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{number}") == path:
                text = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii")
                return int(text.partition("\n")[0].removeprefix("pos:"))
    return 0


NOWHERE = bytearray(READ_BYTES)  # what all threads read into: nobody looks at it


def read_piece(piece: Piece) -> None:
    """Reads a piece into nowhere. Raises OSError."""
    if not piece.size:
        return
    fd = os.open(piece.place.path, os.O_RDONLY)
    try:
        offset, end = piece.offset, piece.offset + piece.size
        while offset < end and (got := os.preadv(fd, [memoryview(NOWHERE)[: end - offset]], offset)):
            offset += got
    finally:
        os.close(fd)


class ReadAhead:
    """Reads the source before one or more borgs do, and keeps these close enough together to share that.

    It is a help only: what it cannot read, borg will report. A borg that is far ahead of another is held
    (SIGSTOP); but not when that one does not move, and not for longer than it has worked itself. Then the
    slower one is left to read by itself.
    """

    def __init__(
        self,
        runtime: Runtime,
        mount: Mount,
        readers: Sequence[Reader],
        objects: Iterable[tuple[str, int, float]] | None = None,
    ) -> None:
        """Starts the threads. They begin when each reader has begun or left, or a while after the first.

        `objects` are what is read instead of the whole mount, as `objects_below` has them.
        """
        settings, threads = runtime.settings, runtime.settings.read_ahead_threads
        window_bytes = read_ahead_bytes(runtime.memory_mb, settings.source)
        self._window, self._readers = window_bytes, list(readers)
        self._objects = objects_below(str(mount.path)) if objects is None else objects
        self._with_metadata = settings.source_metadata
        self._patience_seconds = min(HOLD_SECONDS, settings.stall_seconds / 3)
        self._piece_bytes = piece_bytes(window_bytes)
        self._lock = threading.RLock()
        self._room, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._ahead: deque[Place] = deque()
        self._places: dict[str, Place] = {}
        self._pieces: deque[Piece] = deque()
        self._end, self._floor, self._moved_at = 0, 0, time.monotonic()
        self._over = not threads
        for work in (self._walk, self._watch, *[self._read] * threads) if threads else ():
            threading.Thread(target=work, daemon=True).start()

    def began(self, reader: Reader, since: float, child: Child) -> None:
        """`child` is the borg of `reader`, and knows all objects last modified before `since`."""
        with self._lock:
            reader.since, reader.child = since, child
            reader.began = self._moved_at = time.monotonic()
            self._room.notify_all()

    def passed(self, reader: Reader, path: str, offset: float = math.inf) -> None:
        """`reader` is done with a file, or so far in it; where in a file a borg is, we see by ourselves."""
        with self._lock:
            if place := self._places.get(path):
                position = place.start + int(offset) if offset < place.size else place.end
                reader.position = max(reader.position, position)
                self._slide()

    def left(self, reader: Reader) -> None:
        """`reader` is at its end, or goes on by itself."""
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)
                self._let_go(reader)
                self._slide()

    def close(self) -> None:
        """Ends it. Nobody waits for the threads: one may be in a read that takes long."""
        with self._lock:
            self._over = True
            for reader in self._readers:
                self._let_go(reader)
            self._room.notify_all()
            self._work.notify_all()

    def _slide(self) -> None:
        """Moves the window to where the slowest reader is, and keeps the others near it."""
        if not self._readers:
            self.close()
            return
        floor = min(reader.position for reader in self._readers)
        if floor > self._floor:
            self._floor, self._moved_at = floor, time.monotonic()
            while self._ahead and self._ahead[0].end <= floor:
                del self._places[self._ahead.popleft().path]
            self._room.notify_all()
        for reader in self._readers:
            lead = reader.position - self._floor
            if lead > self._window * 3 // 4:
                self._hold(reader)
            elif lead < self._window // 2:
                self._let_go(reader)

    def _hold(self, reader: Reader) -> None:
        if reader.child and not reader.held_at:
            reader.held_at = time.monotonic()
            reader.child.hold(HELD_BACK)

    def _let_go(self, reader: Reader) -> None:
        if reader.child and reader.held_at:
            reader.held_seconds, reader.held_at = reader.held_for(time.monotonic()), 0.0
            reader.child.let_go(HELD_BACK)

    def _walk(self) -> None:
        """The life of the thread that looks for objects to read."""
        with self._lock:
            while not self._over and not self._all_began():
                self._room.wait(WATCH_SECONDS)
        with contextlib.suppress(OSError):
            for path, size_bytes, modified in self._objects:
                if self._over:
                    return
                self._take(path, size_bytes, modified)

    def _all_began(self) -> bool:
        """Whether it is known what is to be read. Who takes too long to begin is left behind."""
        begun = [reader.began for reader in self._readers if reader.began]
        late = [reader for reader in self._readers if not reader.began]
        if begun and time.monotonic() - max(begun) > JOIN_SECONDS:
            for reader in late:
                self.left(reader)
        return not any(reader in self._readers for reader in late)

    def _take(self, path: str, size_bytes: int, modified: float) -> None:
        """Puts an object that somebody will read at the stream's end, piece by piece as there is room."""
        with self._lock:
            if not any(modified >= reader.since for reader in self._readers):
                size_bytes = 0
            if not (size_bytes or self._with_metadata):
                return
            place = Place(path, self._end, size_bytes)
            self._end = place.end
            self._ahead.append(place)
            self._places[path] = place
            for offset in range(0, size_bytes or 1, self._piece_bytes):
                piece = Piece(place, offset, min(self._piece_bytes, size_bytes - offset))
                while not self._over and place.start + offset + piece.size - self._floor > self._window:
                    self._room.wait()
                self._pieces.append(piece)
                self._work.notify()

    def _read(self) -> None:
        """The life of a thread that reads."""
        while piece := self._next():
            with contextlib.suppress(OSError):
                if self._with_metadata and not piece.offset:
                    os.listxattr(piece.place.path)
                read_piece(piece)

    def _next(self) -> Piece | None:
        """The next piece that borg has not passed yet; None at the end."""
        with self._lock:
            while not self._over:
                while self._pieces:
                    piece = self._pieces.popleft()
                    if piece.place.start + piece.offset + piece.size > self._floor:
                        return piece
                self._work.wait()
        return None

    def _watch(self) -> None:
        """The life of the thread that sees where in a large object borg is, and who waits for too long."""
        while not self._over:
            time.sleep(WATCH_SECONDS)
            with self._lock:
                for reader in self._readers:
                    self._look(reader)
                self._slide()
                self._leave_behind()

    def _look(self, reader: Reader) -> None:
        """Where a reader is within an object of several pieces."""
        place = next((place for place in self._ahead if place.end > reader.position), None)
        if place and reader.child and place.size > self._piece_bytes:
            position = place.start + min(file_position(reader.child.pid, place.path), place.size - 1)
            reader.position = max(reader.position, position)

    def _leave_behind(self) -> None:
        """Leaves the slowest to itself when that has held up others for too long."""
        now = time.monotonic()
        held = [reader for reader in self._readers if reader.held_at]
        stuck = now - self._moved_at > self._patience_seconds
        if any(
            stuck or reader.held_for(now) > max(HOLD_SECONDS, (now - reader.began) / 2) for reader in held
        ):
            for reader in [reader for reader in self._readers if reader.position == self._floor]:
                self.left(reader)


# ----------------------------------------------------------------------------------------------------- Borg


class Verdict(enum.Enum):
    """What an exit code of borg means."""

    OK = "ok"
    WARNING = "warnings"
    FAILURE = "failed"
    BUSY = "busy"  # another run works on the repository


# Unreadable content of the source. That a file vanished (107) or is forbidden (105) is a warning.
IO_ERRORS = frozenset({"BackupIOError", "BackupOSError"})
IO_ERROR_CODE = 106


def verdict(code: int) -> Verdict:
    """What borg's exit code means with BORG_EXIT_CODES=modern ("Return codes" in its documentation)."""
    if code == 0:
        return Verdict.OK
    if (code == 1 or 100 <= code <= 127) and code != IO_ERROR_CODE:
        return Verdict.WARNING
    return Verdict.FAILURE


def archive_pattern(label: str) -> str:
    """borg's pattern for the archives of `label` and of no other label."""
    return f"{label}-[0-9][0-9][0-9][0-9]-*"


def borg_init(target: Target, repository: Path) -> list[str]:
    """Makes a repository."""
    return ["init", "--encryption", target.encryption, str(repository)]


def borg_time(text: str) -> datetime:
    """A time as `borg list` prints it when we run it: in UTC, without saying so."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def borg_newest(repository: Path, bypass_lock: bool) -> list[str]:
    """Shows the newest archive and the encryption mode; proves passphrase and key."""
    return ["list", "--json", "--last", "1", *(["--bypass-lock"] if bypass_lock else []), str(repository)]


def borg_last_two(repository: Path, label: str, bypass_lock: bool) -> list[str]:
    """Shows the two newest archives of `label` with the number of their files."""
    options = ["--glob-archives", archive_pattern(label), *(["--bypass-lock"] if bypass_lock else [])]
    return ["info", "--json", "--last", "2", *options, str(repository)]


def borg_archives(repository: Path) -> list[str]:
    """Shows all archives, with the number of their objects and bytes: see LIST_SIZES."""
    return ["list", "--json", "--format", "{archive}{time}{end}{nfiles}{size}", str(repository)]


def borg_key_export(repository: Path, form: Sequence[str]) -> list[str]:
    """Shows the key, in the form that `form`, an option, asks for."""
    return ["key export", *form, str(repository)]


def borg_create(
    target: Target, label: str, repository: Path, source: Path, metadata: bool = False, comment: str = ""
) -> list[str]:
    """Archives `source`, and names each object when it is done; with `metadata` extended attributes, too.

    The files cache goes by ctime and size: S3's LastModified is both mtime and ctime here, and inode
    numbers change with every mount. ACLs and flags do not exist on S3; asking for extended attributes
    costs a request for each object.
    """
    options = ["--files-cache", "ctime,size", "--noacls", "--noflags"]
    options += [] if metadata else ["--noxattrs"]
    options += ["--comment", comment] if comment else []
    archive = f"{repository}::{label}-{{now:%Y-%m-%dT%H:%M:%S}}"
    return [
        "create",
        "--json",
        "--list",
        "--progress",
        *options,
        "--compression",
        target.compression,
        archive,
        str(source),
    ]


def borg_names(repository: Path) -> list[str]:
    """Shows all archives' names and times."""
    return ["list", "--json", str(repository)]


def borg_items(repository: Path, archive: str) -> list[str]:
    """Lists what is in an archive, a JSON object a line; nothing of its content is read."""
    return ["list", "--json-lines", "--format", "{size}{mtime}", f"{repository}::{archive}"]


def borg_export(repository: Path, archive: str, stream: Path) -> list[str]:
    """Writes an archive's content to `stream`, as a tar file."""
    return ["export-tar", "--tar-filter", "", f"{repository}::{archive}", str(stream)]


def borg_read(repository: Path, archive: str, path: str) -> list[str]:
    """Writes the content of one file in an archive to standard output."""
    return ["extract", "--stdout", f"{repository}::{archive}", f"pp:{path}"]


def borg_prune(target: Target, label: str, repository: Path) -> list[str]:
    """Deletes old archives of this label."""
    return ["prune", "--list", "--glob-archives", archive_pattern(label), *target.prune, str(repository)]


def borg_compact(target: Target, repository: Path) -> list[str]:
    """Frees the space of deleted archives."""
    return ["compact", "--verbose", "--progress", "--threshold", str(target.compact_percent), str(repository)]


def borg_check_slice(repository: Path, seconds: float) -> list[str]:
    """Checks segments for some seconds, from where the last slice stopped, which borg keeps in its config."""
    slice_options = ["--repository-only", "--max-duration", str(max(1, round(seconds)))]
    return ["check", "--info", "--progress", *slice_options, str(repository)]


def borg_check_all(repository: Path, verify_data: bool) -> list[str]:
    """Checks all segments, the index and the archives, and with `verify_data` each piece of data."""
    options = ["--verify-data"] if verify_data else []
    return ["check", "--info", "--progress", *options, str(repository)]


def borg_find_archive(repository: Path, pattern: str) -> list[str]:
    """Shows the newest archive whose name matches, with its comment."""
    options = ["--json", "--last", "1", "--format", "{name}{id}{start}{comment}"]
    return ["list", *options, "--glob-archives", pattern, str(repository)]


def borg_export_sample(repository: Path, archive: str, patterns: Sequence[str]) -> list[str]:
    """Writes what matches, in the archive's order, as a tar stream to standard output."""
    return ["export-tar", *patterns, f"{repository}::{archive}", "-"]


def drain(stream: IO[bytes]) -> None:
    """Reads the rest. borg pads its tar file behind the end, and must not find the pipe closed."""
    while stream.read(READ_BYTES):
        pass


BORG_FOLDERS = (
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "BORG_BASE_DIR",
    "BORG_CONFIG_DIR",
    "BORG_CACHE_DIR",
    "BORG_KEYS_DIR",
    "BORG_SECURITY_DIR",
)
# A person may tell borg how to behave (BORG_EXIT_CODES, BORG_NEW_PASSPHRASE, the answers to its questions);
# which repository it is and how to open it is our matter.
BORG_SECRETS = ("BORG_REPO", "BORG_PASSPHRASE", "BORG_PASSPHRASE_FD", "BORG_PASSCOMMAND")
TERMINAL_VARIABLES = ("TERM", "COLUMNS", "LINES")


def personal_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What of a person's environment a borg gets to see that they call themselves."""
    return {
        name: value
        for name, value in environ.items()
        if name in TERMINAL_VARIABLES or (name.startswith("BORG_") and name not in BORG_SECRETS)
    }


def borg_environment(runtime: Runtime, target: Target) -> dict[str, str]:
    """What borg gets to see, but for the passphrase's file descriptor."""
    own = {
        "BORG_HOST_ID": f"{OWN_HOST}{runtime.run_id}",  # host names and PIDs repeat
        "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",  # the mount point is our choice
        "BORG_DISPLAY_PASSPHRASE": "no",
    }
    if target.encryption == "none":
        own["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
    return minimal_environment(runtime.environ, BORG_FOLDERS, **own)


BREAK_LOCK_HELP = (
    "If nobody works on it any more: backup.py mount target-{name} && borg break-lock {path};"
    " backup.py umount target-{name}"
)

DAMAGE_HELP = (
    "Look for what changed objects of the bucket (a lifecycle rule, somebody's deletion), copy it before you"
    " try `backup.py borg {name} check --repair`, and then let `backup.py check {name}` look at all of it."
)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
MAX_NAMED = 100  # objects or warnings; more are counted

# What to do about borg's own errors, by its message ids; {name} and {path} are filled in.
BORG_HINTS = {
    "PassphraseWrong": 'Correct TARGET_SECRETS "{name}"."borg_passphrase".',
    "LockTimeout": BREAK_LOCK_HELP,
    "LockErrorT": BREAK_LOCK_HELP,
    "Repository.InvalidRepository": 'Point TARGETS "{name}"."path" at an empty place or a repository.',
    "Repository.InvalidRepositoryConfig": 'Point TARGETS "{name}"."path" at an empty place or a repository.',
    "Cache.EncryptionMethodMismatch": "The repository was replaced by another one; if that was you, remove"
    " /cache and /config/borg/security.",
    "Cache.RepositoryReplay": "The repository is older than when it was last used; if you restored a copy,"
    " remove /cache and /config/borg/security. If another target is a copy of it, let one of them begin in an"
    " empty place.",
    "IntegrityError": DAMAGE_HELP,
    "KeyfileNotFoundError": "The key is kept in /config: mount the volume that the repository was made with.",
    "RepoKeyNotFoundError": "Import your exported key: backup.py borg {name} key import :: FILE",
    "UnencryptedRepo": "Without encryption there is no key, and none to lose.",
    "NoManifestError": "The repository is damaged: backup.py borg {name} check",
}


class BorgLog:
    """Reads borg's JSON log lines.

    Shows progress, warnings and errors, and keeps what decides on the result.
    """

    def __init__(
        self, name: str, console: Console, stop: Stop, on_file: Callable[[str, str], None] | None = None
    ) -> None:
        """Nothing was read yet; `on_file(status, path)` is told of each file that borg has done."""
        self.errors: list[tuple[str, str]] = []  # message id, message; the first MAX_NAMED
        self.error_count = 0
        self.warnings = 0
        self.io_errors = 0
        self.infos: list[str] = []
        self._name, self._console, self._stop = name, console, stop
        self._on_file = on_file

    def feed(self, line: str) -> None:
        """Takes one line."""
        try:
            entry = json.loads(line)
            kind = entry["type"]
        except (ValueError, KeyError, TypeError):
            self._take("ERROR", "", line)
            return
        if kind == "file_status":
            if self._on_file:
                self._on_file(entry["status"], entry["path"])
        elif kind == "archive_progress" and not entry.get("finished"):
            self._console.progress(
                self._name,
                f"{count(entry['nfiles'], 'object')}, {size(entry['original_size'])}: {entry['path']}",
                objects=entry["nfiles"],
                bytes=entry["original_size"],
            )
        elif kind in ("progress_message", "progress_percent") and entry.get("message"):
            self._console.progress(self._name, entry["message"])
        elif kind == "log_message":
            self._take(entry.get("levelname", "ERROR"), entry.get("msgid", ""), entry.get("message", ""))

    def _take(self, level: str, msgid: str, message: str) -> None:
        text = message.strip()
        if not text:
            return
        if "hardlinks not supported" in text:
            self._console.info(
                self._name,
                "borg notes that S3 has no hard links when it saves its config: expected, harmless",
            )
        elif "you will need both KEY AND PASSPHRASE" in text:
            self._console.info(
                self._name,
                "keep the passphrase and a copy of the key (`backup.py key-export`) in a safe place",
            )
        elif level in ("ERROR", "CRITICAL"):
            self._take_error(msgid, text)
        elif level == "WARNING":
            self.warnings += 1
            self.io_errors += msgid in IO_ERRORS
            if self.warnings <= MAX_NAMED:
                self._console.warning(self._name, f"borg: {text}")
        else:
            self.infos.append(text)
            self._console.debug(self._name, f"borg: {text}")

    def _take_error(self, msgid: str, text: str) -> None:
        """Takes an error; a repository that has lost much gives one for each piece of data."""
        self.error_count += 1
        if self.error_count > MAX_NAMED:
            return
        self.errors.append((msgid, text))
        # What it says when it is stopped is no error; a traceback says less than the failure's own line.
        quiet = self._stop.requested or text.startswith(("Traceback", "Local Exception"))
        show = self._console.debug if quiet else self._console.error
        show(self._name, f"borg: {text}")

    def report_hidden(self) -> None:
        """Counts the warnings and errors that were not shown."""
        if self.error_count > MAX_NAMED:
            self._console.error(self._name, f"borg: {self.error_count - MAX_NAMED:,} more errors")
        if self.warnings > MAX_NAMED:
            self._console.warning(self._name, f"borg: {self.warnings - MAX_NAMED:,} more warnings")

    def reason(self, code: int) -> str:
        """Why a command failed, in one line: the exception's where borg printed a traceback."""
        text = "\n".join(message for _, message in self.errors)
        exceptions = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", text, re.MULTILINE)
        return (
            exceptions[-1] if exceptions else text.partition("\n")[0].rstrip(".") or f"it ended with {code}"
        )


@dataclass(frozen=True)
class BorgResult:
    """How a borg command went."""

    verdict: Verdict
    output: str
    log: BorgLog


class Borg:
    """Runs borg on one target's repository in the folder `repository`."""

    def __init__(
        self,
        runtime: Runtime,
        target: Target,
        repository: Path,
        mounts: Sequence[Mount] = (),
        folders: Mapping[str, str] | None = None,
    ) -> None:
        """Runs nothing yet; borg will work on `mounts`, first of all the repository's.

        `folders` are variables that tell borg to keep what it knows elsewhere than usual.
        """
        self.repository = repository
        self._runtime, self._target = runtime, target
        self._mounts, self._folders = mounts, folders or {}

    def run(
        self,
        arguments: Sequence[str],
        on_file: Callable[[str, str], None] | None = None,
        on_start: Callable[[Child], None] = lambda child: None,
        trusted_before: datetime | None = None,
        consume: Callable[[IO[bytes]], None] | None = None,
        on_output: Callable[[str], None] | None = None,
        own: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        waits: Callable[[], float] = lambda: 0,
    ) -> BorgResult:
        """Runs one command to its end; `on_file(status, path)` is told of each file that it has done.

        `on_start` is given the process; see TRUST_OLD about `trusted_before`. The result has the output,
        unless `consume` reads it, or `on_output` is told of each line. `own` variables and `pass_fds` are for
        borg; `waits` grows while whoever reads from it has reason to be slow. Raises BackupError when it
        fails, Hung when its mounts are gone or nothing moves, Stopped on a stop signal, and what `consume`
        raises. An archive that lacks what could not be read is a result.
        """
        runtime, name = self._runtime, self._target.store.name
        command, *rest = arguments
        argv = ["borg", *command.split(), "--log-json", "--lock-wait", str(LOCK_WAIT_SECONDS), *rest]
        log, output = BorgLog(name, runtime.console, runtime.stop, on_file), []
        runtime.console.debug(name, shlex.join(argv))
        runtime.stop.check()
        with self._environment({"BORG_EXIT_CODES": "modern", **(own or {})}) as (env, fd):
            if command == "list":  # see `borg_time`; archive names and `prune` go by the user's zone
                env |= {"S3BORGBACKUP_SIZES": "yes", "TZ": "UTC"}
            if trusted_before:
                env["S3BORGBACKUP_TRUSTED_BEFORE"] = str(int(trusted_before.timestamp()) * 10**9)
            kind, take = (StreamedChild, consume) if consume else (Child, on_output or output.append)
            child = kind(argv, env, take, log.feed, pass_fds=(fd, *pass_fds))
            on_start(child)
            code = self._run_to_end(command, child, waits)
        log.report_hidden()
        if isinstance(child, StreamedChild):
            child.consumed.result()
        result = BorgResult(verdict(code), "\n".join(output), log)
        lacks_some = command == "create" and code == IO_ERROR_CODE
        if result.verdict is Verdict.FAILURE and not lacks_some:
            raise self._failure(command, code, log)
        return result

    def with_mounts(self, *mounts: Mount) -> Borg:
        """The same borg, for work on further mounts, too."""
        twin = copy.copy(self)
        twin._mounts = [*self._mounts, *mounts]
        return twin

    def hand_over(self, arguments: Sequence[str]) -> int:
        """Runs what a person typed, with our standard streams and terminal; returns borg's exit code.

        The repository is in BORG_REPO; see HANDED_OVER. Raises Stuck when its mounts are gone, or nothing
        moves and no terminal is there, Stopped on a stop signal.
        """
        own = {"BORG_REPO": str(self.repository), "S3BORGBACKUP_HANDED_OVER": "yes"}
        self._runtime.stop.check()
        with self._environment({**personal_environment(self._runtime.environ), **own}) as (env, fd):
            child = ForegroundChild(["borg", *arguments], env, pass_fds=(fd,))
            with child.in_foreground():
                return self._run_to_end(arguments[0] if arguments else "", child)

    @contextlib.contextmanager
    def _environment(self, own: Mapping[str, str]) -> Iterator[tuple[dict[str, str], int]]:
        """The environment for one command, and the file descriptor of the passphrase that it names."""
        with passphrase_file(self._target.passphrase) as fd, borg_additions() as additions:
            env = {**own, **borg_environment(self._runtime, self._target), **self._folders}
            self._arrived = Path(additions, "arrived")
            if self._mounts:
                env["S3BORGBACKUP_MOUNT"] = str(self._mounts[0].path)
            yield {**env, "BORG_PASSPHRASE_FD": str(fd), "PYTHONPATH": additions}, fd

    def _run_to_end(self, command: str, child: Child, waits: Callable[[], float] = lambda: 0) -> int:
        """The exit code; looks after the mounts meanwhile, and leaves no borg behind that hangs on one."""
        leases = [mount.lease for mount in self._mounts if mount.lease]
        for lease in leases:
            lease.add(child)
        seconds = self._runtime.settings.stall_seconds if child.is_watched else math.inf

        def moved() -> float:
            return io_bytes(child.pid) + int(cpu_seconds(child.pid))

        def held() -> float:  # it would move if it might
            return time.monotonic() if child.is_held(HELD_BACK) else 0

        # What a person has started may wait for somebody else at its standard input.
        hasty = not isinstance(child, ForegroundChild)
        stall = StallClock(seconds, self._mounts, moved, held, waits, beside=moved, hasty=hasty)

        def check() -> None:
            for mount in self._mounts:
                mount.check_alive()
                mount.check_store()
                if mount.arrived:
                    self._arrived.write_bytes(b"\0".join(map(os.fsencode, mount.arrived)))
            stall.check(lambda: f"{self._target.store.name}: borg {command} hangs: {self._complaint()}")

        try:
            code = run_to_end(child, self._runtime.stop, check)
        except BackupError as error:
            self._free(child, isinstance(error, Hung))
            raise
        if code:
            for mount in self._mounts:
                mount.check_alive()  # the cause of borg's trouble, if it is gone
        return code

    def _free(self, child: Child, hung: bool) -> None:
        """Ends a borg that hangs on a mount: kills one after the other, first the one that complained last.

        Where it `hung`, the one that is to be written to is lost anyway, and others may use the other.
        """

        def order(mount: Mount) -> tuple[bool, float]:
            return hung and mount.lease is not None, mount.log.complained_at

        for mount in sorted(self._mounts, key=order, reverse=True):
            if child.wait(0) is None:
                cut_off(mount)
                child.wait(KILL_SECONDS)

    def _complaint(self) -> str:
        """What TigrisFS complained about last, on whichever mount."""
        words = [f"{mount.store.name}: {mount.log.reason}" for mount in self._mounts if mount.log.complaints]
        return "; ".join(words) or "tigrisfs said nothing about it"

    def _failure(self, command: str, code: int, log: BorgLog) -> BackupError:
        """The error for a failed command, in borg's own words."""
        name, path = self._target.name, self.repository
        msgid, reason = log.errors[0][0] if log.errors else "", log.reason(code)
        hint = BORG_HINTS.get(msgid, DISK_HELP if "No space left" in reason else TRY_AGAIN)
        owner = f" (held by {self._lock_owner(reason)})" if msgid.startswith("Lock") else ""
        return BackupError(
            f"{self._target.store.name}: borg {command}: {reason}{owner}",
            hint.format(name=name, path=shlex.quote(str(path))),
        )

    def _lock_owner(self, reason: str) -> str:
        """Who holds the lock of the repository or of the cache, as borg writes it: host.pid-thread."""
        named = re.search(r" (/.*)/lock(\.exclusive)?\b", reason)
        folder = Path(named[1]) if named else self.repository
        try:
            names = within(MOUNT_SECONDS, "lock", lambda: os.listdir(folder / "lock.exclusive"))
        except (OSError, BackupError):
            names = []
        return ", ".join(names) or "a shared lock: see lock.roster"


OWN_HOST = "s3borgbackup-"  # how BORG_HOST_ID begins, and so the name of each lock of ours


@dataclass(frozen=True)
class Leftovers:
    """What crashed runs left in a repository or a cache; under the lease each lock of ours is stale."""

    stale: tuple[str, ...]  # what to delete: names below the folder, before the folders that hold them
    owners: tuple[str, ...]  # somebody else's locks

    @classmethod
    def sort(cls, names: Sequence[str], roster: bytes) -> Leftovers:
        """Tells stale locks from others by their names below the repository and the content of `lock.roster`.

        Where nobody else is at work, a broken index and a temporary file (`nonce-*.tmp`) are stale, too.

        An exclusive lock is a folder `lock.exclusive` with a file HOST.PID-THREAD in it, one that is about to
        be taken a folder `lock.exclusive.RANDOM.tmp` with the same, and `lock.roster` names who reads
        (locking.py of borg 1.4).
        """
        folders: dict[str, list[str]] = {}
        for name in names:
            folder, slash, holder = name.partition("/")
            if slash and LOCK_FOLDER.fullmatch(folder):
                folders.setdefault(folder, []).append(holder)
        owners, stale = roster_owners(roster), []
        if roster and not owners:
            stale.append("lock.roster")
        for folder, holders in folders.items():
            foreign = [holder for holder in holders if holder and not holder.startswith(OWN_HOST)]
            stale += [f"{folder}/{holder}" for holder in holders if holder.startswith(OWN_HOST)]
            stale += [] if foreign else [f"{folder}/"]
            owners += foreign if folder == "lock.exclusive" else []
        if not owners:
            stale += broken_indexes(names)
            stale += [name for name in names if name.endswith(".tmp") and "/" not in name]
        return cls(tuple(stale), tuple(owners))


LOCK_FOLDER = re.compile(r"lock\.exclusive(\..*\.tmp)?")
INDEX_FILE = re.compile(r"(index|hints|integrity)\.(\d+)")


def broken_indexes(names: Iterable[str]) -> list[str]:
    """What to delete of the indexes in a repository at which nobody works, by the names of its files.

    borg renames hints.N, index.N and integrity.N to their names in this order, but TigrisFS may upload them
    in another, and a crash may come between. borg rebuilds an index that is not there from the segments. But
    where it meets one without hints, and an older index beside it, it mixes the two and fails with a KeyError
    (`Repository.prepare_txn` of borg 1.4). So what is not a pair is deleted.
    """
    kinds: dict[str, set[str]] = {}
    for name in names:
        if found := INDEX_FILE.fullmatch(name):
            kinds.setdefault(found[2], set()).add(found[1])
    broken = {number: kind for number, kind in kinds.items() if not kind >= {"index", "hints"}}
    return [f"{kind}.{number}" for number, each in broken.items() for kind in sorted(each)]


def roster_owners(roster: bytes) -> list[str]:
    """Who else reads or writes, by a `lock.roster`; borg takes one that it cannot read for an empty one."""
    try:
        entries = [entry for kind in json.loads(roster).values() for entry in kind]
        return [f"{host}.{pid}" for host, pid, _ in entries if not str(host).startswith(OWN_HOST)]
    except (ValueError, TypeError, AttributeError):
        return []


def borg_folder(environ: Mapping[str, str], kind: str, xdg_default: str) -> Path:
    """Where borg keeps its `CACHE` or `CONFIG` ("Environment Variables" in its documentation)."""
    base = environ.get("BORG_BASE_DIR")
    default = Path(base or environ.get("HOME") or Path.home(), xdg_default)
    folder = default if base else Path(environ.get(f"XDG_{kind}_HOME", default))
    return Path(environ.get(f"BORG_{kind}_DIR", folder / "borg"))


def cache_folder(environ: Mapping[str, str], repository_id: str) -> Path:
    """Where borg keeps its cache of a repository; it need not be there."""
    return borg_folder(environ, "CACHE", ".cache") / repository_id


# What borg notes of a repository that it has used, and what key types there are (crypto/key.py of borg 1.4).
SECURITY_FILES = ("key-type", "location", "manifest-timestamp")
KEY_TYPES = {
    "0": "keyfile",
    "2": "none",
    "3": "repokey",
    "4": "keyfile-blake2",
    "5": "repokey-blake2",
    "6": "authenticated-blake2",
    "7": "authenticated",
}


def security_folder(environ: Mapping[str, str], repository_id: str) -> Path:
    """Where borg notes what it knows of a repository; it need not be there."""
    security = environ.get("BORG_SECURITY_DIR", borg_folder(environ, "CONFIG", ".config") / "security")
    return Path(security, repository_id)


def seen_encryption(environ: Mapping[str, str], repository_id: str) -> str | None:
    """The encryption mode that a repository had when borg used it last; borg refuses any other.

    None where borg has not seen it here (`SecurityManager.known` and `assert_key_type` of borg 1.4).
    """
    folder = security_folder(environ, repository_id)
    try:
        texts = [(folder / name).read_text(encoding="ascii") for name in SECURITY_FILES]
    except (OSError, ValueError):
        return None
    return KEY_TYPES.get(texts[0].strip())


@contextlib.contextmanager
def passphrase_file(passphrase: str) -> Iterator[int]:
    """A file descriptor from which the passphrase can be read once; a pipe would take 64 KiB at most."""
    fd = os.memfd_create("passphrase")
    try:
        with open(fd, "wb", closefd=False) as stream:
            stream.write(passphrase.encode())
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


# When one upload fails, by a connection that is reset for instance, fsync fails too, and borg would give up.
# TigrisFS keeps the data, but tries again only when the file is closed, and until that has succeeded every
# fsync returns the old error (SyncFile and sendUpload in core/file.go). So the file is closed for a moment,
# behind borg's back, and opened again. A refusal may pass as well: where S3 means it, Mount.check_store ends
# borg. (REFUSED is what mapHttpError makes of 4xx; 409 is EINTR, at which Python would ask again at once, for
# ever.) A file that has arrived all the same is in a list, see Mount.arrived. And where S3 does not know an
# upload any more, TigrisFS drops the data, and fsync succeeds: but what was dropped cannot be read. Python
# imports a module named sitecustomize at its start.
#
# A folder's fsync tells borg that what it has renamed there is durable: only then does it delete the index
# before. TigrisFS tries once to upload all that it holds (SyncTree in core/goofys.go), hears of no error, and
# may wait for ever: for the deletion of a folder, which waits until no change below it is left to do. Where a
# file was renamed together with its folder, and S3 did not answer when the old name was to be deleted, one
# change is left for good (sendRename in core/file.go adds a tombstone, and does not take back what the rename
# had counted). borg takes its lock by such a rename. So a folder is made anew under its new name, and fsync
# of one waits for the files that were renamed, as it does for any other file.
PATIENT_FSYNC = """\
import ctypes, errno, fcntl, os, shutil, stat, time

PASSING = (errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT)
REFUSED = (errno.EACCES, errno.EINTR, errno.EINVAL, errno.ENOENT, errno.ENOTSUP, errno.ENXIO)
MOUNT, ARRIVED = os.environ.get("S3BORGBACKUP_MOUNT"), os.path.dirname(__file__) + "/arrived"
LIBC = ctypes.CDLL(None, use_errno=True)
renamed = []

def is_on_mount(path):
    return MOUNT and os.path.join(path, "").startswith(MOUNT + "/")

def close_for_a_moment(fd):
    path, flags = os.readlink(f"/proc/self/fd/{fd}"), fcntl.fcntl(fd, fcntl.F_GETFL)
    position = os.lseek(fd, 0, os.SEEK_CUR)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, fd, inheritable=False)
    os.close(null)
    time.sleep(3)
    again = os.open(path, flags)
    os.lseek(again, position, os.SEEK_SET)
    os.dup2(again, fd, inheritable=False)
    os.close(again)

def is_patient(number, path):
    return number in PASSING or number in REFUSED and is_on_mount(path)

def has_arrived(path):
    try:
        with open(ARRIVED, errors="surrogateescape") as stream:
            return path in stream.read().split("\\0")
    except FileNotFoundError:
        return False

def sync_renamed():
    while renamed:
        try:
            fd = os.open(renamed.pop(), os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

def patient(sync):
    def wrapper(file):
        fd = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{fd}")
        if is_on_mount(path) and stat.S_ISDIR(os.fstat(fd).st_mode):
            return sync_renamed()
        while sync(fd):
            number, path = ctypes.get_errno(), os.readlink(f"/proc/self/fd/{fd}")
            if not is_patient(number, path):
                raise OSError(number, os.strerror(number))
            if has_arrived(path):
                return
            close_for_a_moment(fd)
        prove_kept(fd)
    return wrapper

def prove_kept(fd):
    path, facts = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
    if is_on_mount(path) and stat.S_ISREG(facts.st_mode) and facts.st_size:
        with open(path, "rb", buffering=0) as stream:
            stream.read(1)

def file_by_file(replace):
    def wrapper(old, new, **options):
        if not is_on_mount(os.fspath(old)):
            return replace(old, new, **options)
        if os.path.isdir(old):
            os.mkdir(new)
            for name in os.listdir(old):
                shutil.copyfile(os.path.join(old, name), os.path.join(new, name))
            shutil.rmtree(old)
        else:
            replace(old, new, **options)
            renamed.append(new)
    return wrapper

os.fsync, os.fdatasync = patient(LIBC.fsync), patient(LIBC.fdatasync)
os.rename, os.replace = file_by_file(os.rename), file_by_file(os.replace)
"""


# borg's files cache leaves out the newest files of a run: they might be written again within the resolution
# of their time. On S3 these are all objects of the newest second, be it years ago, and each run would read
# them again. But S3 sets that time itself, so that what it had written before the run began is certain to
# get another time when it is overwritten. (LocalCache._newest_cmtime of borg 1.4; where that is called
# otherwise, nothing is lost but the saving.)
TRUST_OLD = """\

def trust(until):
    from borg.cache import LocalCache
    memorize = LocalCache.memorize_file

    def wrapper(self, *arguments):
        memorize(self, *arguments)
        if self._newest_cmtime:
            self._newest_cmtime = max(self._newest_cmtime, until)

    LocalCache.memorize_file = wrapper

if "S3BORGBACKUP_TRUSTED_BEFORE" in os.environ:
    try:
        trust(int(os.environ["S3BORGBACKUP_TRUSTED_BEFORE"]))
    except (ImportError, AttributeError):
        pass
"""


# `borg list` knows two more keys for --format: `nfiles` and `size`, which borg notes in each archive. `borg
# info` has them, too, but reads all of each archive's metadata, and needs the cache. (ArchiveFormatter of
# borg 1.4; where that is called otherwise, they are missing.)
LIST_SIZES = """\

def list_sizes():
    from borg.helpers.parseformat import ArchiveFormatter
    start = ArchiveFormatter.__init__

    def wrapper(self, format, *arguments, **options):
        start(self, format, *arguments, **options)
        for key in {"nfiles", "size"} & self.format_keys:
            self.call_keys[key] = lambda key=key: self.get_meta(key, rs=False)
        self.used_call_keys = set(self.call_keys) & self.format_keys

    ArchiveFormatter.__init__ = wrapper

if "S3BORGBACKUP_SIZES" in os.environ:
    try:
        list_sizes()
    except (ImportError, AttributeError):
        pass
"""


# What a person types after `backup.py borg NAME` needs no repository: where borg wants REPOSITORY::ARCHIVE, a
# word without a slash is an archive of BORG_REPO, so that `diff A B` and `list A` mean what they say. And a
# new passphrase is asked for: Passphrase.new of borg 1.4 would read BORG_PASSPHRASE_FD again, which is closed
# by then. And who deletes the repository deletes neither its mount nor the lease. (Where borg's parts are
# called otherwise, `::ARCHIVE` still works.)
HANDED_OVER = """\

def take_archives_by_name():
    import borg.helpers
    from borg.helpers import parseformat
    make = parseformat.location_validator

    def location_validator(archive=None, proto=None):
        validator = make(archive, proto)
        if archive is False:
            return validator
        return lambda text: validator(text if not text or "/" in text or "::" in text else "::" + text)

    parseformat.location_validator = borg.helpers.location_validator = location_validator

def ask_for_new_passphrase():
    from borg.crypto.key import Passphrase
    new = Passphrase.new.__func__

    def wrapper(cls, *arguments, **options):
        os.environ.pop("BORG_PASSPHRASE_FD", None)
        return new(cls, *arguments, **options)

    Passphrase.new = classmethod(wrapper)

def spare_what_is_ours():
    import shutil
    from borg.repository import Repository
    destroy, remove = Repository.destroy, shutil.rmtree

    def empty(path):
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                remove(entry.path)
            elif not entry.name.startswith(".s3borgbackup-"):
                os.unlink(entry.path)

    def wrapper(self):
        shutil.rmtree = empty
        try:
            destroy(self)
        finally:
            shutil.rmtree = remove

    Repository.destroy = wrapper

if "S3BORGBACKUP_HANDED_OVER" in os.environ:
    try:
        take_archives_by_name()
        ask_for_new_passphrase()
        spare_what_is_ours()
    except (ImportError, AttributeError):
        pass
"""


# Of an archive only what is asked for is to be read: a file names it, in the archive's order. Patterns for a
# million paths would take much memory, and paths hold line ends. And a tar file has no place for user
# metadata unless it is of the PAX kind. (Where borg's parts are called otherwise, more is read than is
# needed, and metadata is left out.)
EXPORTED = """\

def export_only(path):
    import json
    from borg.archive import Archive
    chosen = map(json.loads, open(path))
    item_filter, following = Archive.item_filter, [next(chosen, None)]

    def wrapper(self, item, *arguments):
        if item.path != following[0] or not item_filter(self, item, *arguments):
            return False
        following[0] = next(chosen, None)
        return True

    Archive.item_filter = wrapper

def export_metadata():
    import tarfile
    from borg.archive import Archive
    iter_items, addfile, current = Archive.iter_items, tarfile.TarFile.addfile, {}

    def noting(self, *arguments, **options):
        for item in iter_items(self, *arguments, **options):
            current["xattrs"] = item.get("xattrs") or {}
            yield item

    def adding(self, tarinfo, *arguments):
        headers = {
            "SCHILY.xattr." + name.decode(): (value or b"").decode("utf-8", "surrogateescape")
            for name, value in current["xattrs"].items()
            if name.startswith(b"user.")
        }
        self.format = tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT
        tarinfo.pax_headers = headers
        return addfile(self, tarinfo, *arguments)

    Archive.iter_items, tarfile.TarFile.addfile = noting, adding

if "S3BORGBACKUP_EXPORTED" in os.environ:
    try:
        export_metadata()
        export_only(os.environ["S3BORGBACKUP_EXPORTED"])
    except (ImportError, AttributeError):
        pass
"""


@contextlib.contextmanager
def borg_additions() -> Iterator[str]:
    """A folder for PYTHONPATH, whose content borg's interpreter executes first.

    PATIENT_FSYNC repeats what failed, which the stall clock bounds; TRUST_OLD, LIST_SIZES, HANDED_OVER and
    EXPORTED do what they are asked for by variables.
    """
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
        additions = PATIENT_FSYNC + TRUST_OLD + LIST_SIZES + HANDED_OVER + EXPORTED
        Path(folder, "sitecustomize.py").write_text(additions, encoding="ascii")
        yield folder


def encryption_mistake(target: Target, actual: str) -> BackupError | None:
    """The error when an existing repository's mode is not what the configuration promises, else None."""
    plain = ("none", "authenticated", "authenticated-blake2")
    if actual == target.encryption or not (target.must_match or actual in plain):
        return None
    return BackupError(
        f"{target.store.name}: the repository's encryption mode is {actual},"
        f" the configuration asks for {target.encryption}",
        f'Set TARGETS "{target.name}"."encryption" to {actual}, or use a new path.',
    )


def size(number: float) -> str:
    """Bytes in a form for people, with decimal units as borg and S3 bills have them."""
    unit, *larger = ("B", "kB", "MB", "GB", "TB", "PB")
    while abs(number) >= 999.5 and larger:
        number, unit = number / 1000, larger.pop(0)
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def count(number: int, noun: str) -> str:
    """`1 object`, `2,002 objects`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------- Audit

# Two questions: does the bucket hold what borg wrote, and does the archive hold what the source lists?

# TigrisFS ends with 0 although uploads failed, and borg has ended by then: when only the last writes (an
# index, the removal of the lock) are refused, nobody would notice. So the bucket is compared with what the
# mount showed.


def repository_files(runtime: Runtime, store: Store, mount_point: Path, *mounts: Mount) -> dict[str, int]:
    """The repository's files as its mount shows them: path below the mount point -> size in bytes.

    `mounts` has it where it is ours. Raises BackupError.
    """
    sizes: dict[str, int] = {}

    def walk() -> dict[str, int]:
        for path in walk_files(store, mount_point):
            with contextlib.suppress(FileNotFoundError):  # somebody still works in it
                sizes[str(path.relative_to(mount_point))] = path.stat().st_size
        return borgs_own(sizes)

    what = f"{store.name}: listing the repository"
    return until_done(runtime, mounts, what, in_background(walk), lambda: len(sizes))


def listed_files(runtime: Runtime, client: S3Client) -> dict[str, int]:
    """The same from the bucket's listing, without the empty objects that stand for folders."""
    prefix = client.store.key_prefix

    def collect() -> dict[str, int]:
        entries = client.list_objects(prefix)
        return {
            entry.key[len(prefix) :]: entry.size_bytes for entry in entries if not entry.key.endswith("/")
        }

    sizes = within(LIST_SECONDS, f"{client.store.name}: listing the repository", collect, runtime.stop)
    return borgs_own(sizes)


def borgs_own(sizes: Mapping[str, int]) -> dict[str, int]:
    """The files without ours: the lease and the probes come and go, and none is borg's."""
    return {name: size for name, size in sizes.items() if not name.startswith(OWN_PREFIX)}


def upload_mistakes(expected: Mapping[str, int], listed: Mapping[str, int]) -> list[str]:
    """What the bucket lacks or has too much, compared with what borg left in the mount."""
    missing = [f"{name} is missing" for name in sorted(expected.keys() - listed.keys())]
    extra = [f"{name} was not removed" for name in sorted(listed.keys() - expected.keys())]
    wrong = [
        f"{name} has {listed[name]:,} of {expected[name]:,} bytes"
        for name in sorted(expected.keys() & listed.keys())
        if listed[name] != expected[name]
    ]
    return missing + wrong + extra


def settle(runtime: Runtime, mount: Mount, compare: Callable[[], list[str]]) -> None:
    """Waits until `compare` finds nothing more that the bucket lacks: then tigrisfs holds nothing more.

    At its end TigrisFS tries each upload and each deletion just once. Until then it repeats those that
    failed, some without a word, and what its SDK repeats is told after many seconds. So this ends without
    success only when nothing was uploaded and nothing complained about for a while: tigrisfs may have lost
    track of a file, or somebody else has changed the bucket. It raises S3Error when S3 refuses something,
    and Stuck when there is no progress, or the mount is gone.
    """
    least, since, meter = math.inf, 0.0, mount.meter(SETTLE_SECONDS)
    most = meter()

    def mistakes() -> list[str]:
        nonlocal least, since, most
        found, moved = compare(), meter()
        mount.holds_nothing = not found
        if len(found) < least or moved >= most + 1:
            least, most, since = len(found), max(moved, most), time.monotonic()
        is_quiet = not mount.log.is_complaining and time.monotonic() - since > SETTLE_SECONDS
        return [] if is_quiet else found

    wait_until_listed(runtime, mount, mistakes)


def names_after_data(client: S3Client) -> list[str]:
    """The names that sort after a repository's segments: hints.N, index.N, integrity.N, and borg's locks."""
    prefix = client.store.key_prefix
    return [entry.key[len(prefix) :] for entry in client.list_objects(prefix, f"{prefix}hints")]


def wait_until_listed(runtime: Runtime, mount: Mount, mistakes: Callable[[], list[str]]) -> None:
    """Waits until there are no mistakes in the bucket's listing. Raises Hung when there is no progress."""
    name, pause = mount.store.name, FIRST_PAUSE_SECONDS
    stall = StallClock(runtime.settings.stall_seconds, [mount])
    while found := mistakes():
        runtime.stop.check()
        mount.check_alive()
        mount.check_store()
        stall.check(lambda what=found[0]: f"{name}: the upload does not end: {what}: {mount.log.reason}")
        runtime.console.progress(name, f"uploading what tigrisfs still holds: {found[0]}")
        until = time.monotonic() + pause
        while time.monotonic() < until:
            runtime.stop.check()
            time.sleep(min(pause, POLL_SECONDS))
        pause = min(2 * pause, MAX_BACKOFF_SECONDS)


def audit_upload(runtime: Runtime, client: S3Client, expected: Mapping[str, int]) -> None:
    """Raises BackupError unless the bucket holds exactly what borg left in the mount."""
    deadline = time.monotonic() + LISTING_SECONDS
    while mistakes := upload_mistakes(expected, listed_files(runtime, client)):
        runtime.stop.check()
        if time.monotonic() > deadline:
            raise BackupError(
                f"{client.store.name}: the bucket does not hold what borg wrote: {'; '.join(mistakes[:5])}"
                f"{f' and {len(mistakes) - 5} more' if len(mistakes) > 5 else ''}",
                "TigrisFS's warnings above tell why; run it again, and `borg check` the repository.",
            )
        time.sleep(POLL_SECONDS)


def digest_of(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest())


class Digests:
    """A set of texts that takes eight bytes for each, however long it is and however many there are.

    Two texts may be taken for one with a chance of 1 in 10^19 for each pair.
    """

    def __init__(self) -> None:
        """An empty set."""
        self._buckets = [array.array("Q") for _ in range(256)]
        self._is_sorted = True

    def add(self, text: str) -> None:
        """Takes a text in."""
        number = digest_of(text)
        self._buckets[number >> 56].append(number)
        self._is_sorted = False

    def __contains__(self, text: str) -> bool:
        """Whether a text was taken in."""
        if not self._is_sorted:
            self._buckets = [array.array("Q", sorted(bucket)) for bucket in self._buckets]
            self._is_sorted = True
        number = digest_of(text)
        bucket = self._buckets[number >> 56]
        index = bisect.bisect_left(bucket, number)
        return index < len(bucket) and bucket[index] == number


class ArchivedObjects:
    """What borg says it has archived, while it does so."""

    def __init__(self, source: Path) -> None:
        """Nothing yet; objects are named below `source`."""
        self._prefix = f"{source}/"
        self._archived = Digests()
        self._unreadable = Digests()
        self.unread: list[str] = []  # the first MAX_NAMED of what borg could not read

    def take(self, status: str, path: str) -> None:
        """Takes a file's status (`borg create --list`): A, M, U and C are archived, E is not."""
        key = path.removeprefix(self._prefix)
        if status == "E":
            self._unreadable.add(key)
            self.unread += [key] if len(self.unread) < MAX_NAMED else []
        elif status in ("A", "M", "U", "C", "h"):
            self._archived.add(key)

    def holds(self, key: str) -> bool:
        """Whether the archive holds an object."""
        return key in self._archived

    def failed(self, key: str) -> bool:
        """Whether borg could not read it."""
        return key in self._unreadable


RACE_SECONDS = 2  # how far the clocks of an S3 service may be apart


NOT_SHOWN, UNREAD = "the mount did not show it", "it could not be read"
GONE = "it was deleted meanwhile"
REFUSALS = frozenset({400, 401, 403})  # no permission, cold storage, a foreign key for SSE-C


def why_missing(key: str, failed: bool, hidden: bool) -> str:
    """Why an archive lacks an object of the source."""
    if UNREPRESENTABLE.search(key) or any(len(part.encode()) > NAME_MAX_BYTES for part in key.split("/")):
        return "no file can have this name"
    if hidden:
        return "it is hidden by objects below the same name"
    return UNREAD if failed else NOT_SHOWN


def audit_object(entry: S3Object, key: str, archive: ArchivedObjects, mount: Mount, began: datetime) -> str:
    """What is wrong with the archived form of an object that the source lists now; nothing if all is well.

    What was written after the run began belongs to the next run, but what was overwritten meanwhile may have
    been archived with the length of one version and the content of another.
    """
    is_new = entry.last_modified >= began - timedelta(seconds=RACE_SECONDS)
    if not archive.holds(key):
        if is_new or (key.endswith("/") and not entry.size_bytes):
            return ""
        name = f"{mount.store.name}: looking at {key!r}"
        hidden = key.endswith("/") or within(MOUNT_SECONDS, name, lambda: os.path.isdir(mount.path / key))
        return why_missing(key, archive.failed(key), hidden)
    if not is_new:
        return ""
    try:
        shown = within(MOUNT_SECONDS, f"{mount.store.name}: stat of {key!r}", (mount.path / key).stat)
    except OSError as error:
        return f"it was overwritten meanwhile, and {error.strerror}"
    if shown.st_size != entry.size_bytes:
        return (
            f"it was overwritten meanwhile: {shown.st_size:,} bytes are archived, it has {entry.size_bytes:,}"
        )
    was_rewritten = entry.last_modified.timestamp() - shown.st_mtime > 1
    if was_rewritten and entry.size_bytes > WHOLE_READ_BYTES:
        return "it was overwritten meanwhile: what is archived may be of both versions"
    return ""


def why_unread(client: S3Client, key: str) -> str:
    """Why borg could not read `key`: S3 itself refuses it or has it no more, else the reading failed."""
    try:
        client.get(key, (0, 0))
    except S3Error as error:
        if error.status in REFUSALS:
            return f"S3 refuses it: {error.code}{error.message.partition(error.code)[2]}"
        with contextlib.suppress(S3Error):  # what borg could not read may also be a folder
            if error.status == 404 and not client.list_page(f"{key}/", limit=1)[0]:
                return GONE
    return UNREAD


class Findings:
    """The objects that an archive lacks: the first ones by name, all by number."""

    def __init__(self) -> None:
        """None."""
        self.count = 0
        self.named: list[tuple[str, str]] = []
        self.asked: dict[str, str] = {}  # what S3 was asked about, with the answer
        self.explains_all = True

    def add(self, key: str, reason: str) -> None:
        """Takes one in."""
        self.count += 1
        if self.count <= MAX_NAMED:
            self.named.append((key, reason))
        # Older archives may hold what this one lacks, so they must outlive a mount or a read that fails. But
        # a name that no file can have, and S3's own refusal (cold storage), last until a person does
        # something, and meanwhile no archive will hold the object: pruning must not wait for that. (Where S3
        # suddenly refuses very many, the archive has shrunk, which stops pruning, too.) Nor must it wait for
        # an object that is overwritten in every night's run.
        if reason in (NOT_SHOWN, UNREAD):
            self.explains_all = False

    def ask(self, client: S3Client, unread: Sequence[str]) -> None:
        """Asks S3 why borg could not read these objects."""
        for key in unread:
            reason = self.asked[key] = why_unread(client, f"{client.store.key_prefix}{key}")
            if reason != GONE:
                self.add(key, reason)

    def compare(self, client: S3Client, mount: Mount, archive: ArchivedObjects, began: datetime) -> None:
        """Takes in what an archive lacks of what the source lists now; `began` is by the server's clock.

        One LIST for each 1,000 objects. Raises S3Error.
        """
        prefix = client.store.key_prefix
        # Of what borg could not read, S3 is asked about the first hundred, which stand for the others.
        refuses_all = len(self.asked) == MAX_NAMED and not {UNREAD, GONE} & set(self.asked.values())
        for entry in client.list_objects(prefix):
            key = entry.key[len(prefix) :]
            is_told = self.asked.get(key, GONE) != GONE
            if key and not is_told and (reason := audit_object(entry, key, archive, mount, began)):
                is_like_those = reason == UNREAD and refuses_all
                self.add(key, "S3 refuses others like it" if is_like_those else reason)


# -------------------------------------------------------------------------------------------- Notifications

# Nobody reads the output of a backup that runs at night. So a health check (healthchecks.io or Uptime Kuma)
# is told of start and end, a webhook gets the run as JSON, and Prometheus a file. None of this makes a run
# fail, or holds it for long; and of the URLs, which are secrets, only scheme and host are ever printed.

# What somebody is told of: what a schedule starts, not what a person types.
TOLD_COMMANDS = {"run": "Backup", "maintain": "Maintenance"}
BODY_BYTES = 100_000  # what healthchecks.io keeps of a ping's body ("Pinging API" in its documentation)
KUMA_PATH = "/api/push/"  # what the path of a push monitor's URL has
KUMA_LETTERS = 300  # it takes the text in the URL
RESULTS = {
    EXIT_OK: ("ok", "all well"),
    EXIT_WARNINGS: ("warnings", "finished with warnings"),
    EXIT_FAILURE: ("failed", "something failed"),
    EXIT_BUSY: ("busy", "another run was at work"),
    EXIT_CONFIGURATION: ("misconfigured", "wrong configuration"),
}


@dataclass(frozen=True)
class Message:
    """A request that tells somebody how a run goes."""

    variable: str  # where a user finds the address
    method: str
    url: str = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    content_type: str = "text/plain; charset=utf-8"

    def __str__(self) -> str:
        """What may be printed of it."""
        url = urllib.parse.urlsplit(self.url)
        return f"{self.variable} ({url.scheme}://{url.hostname})"


class NotTaken(Exception):
    """A message was not taken; `may_pass` tells whether it is worth another try."""

    def __init__(self, reason: str, may_pass: bool) -> None:
        """Takes the reason in a few words, without anything of the URL."""
        super().__init__(reason)
        self.may_pass = may_pass


def send_once(message: Message, seconds: float) -> None:
    """Sends a message. Raises NotTaken. No redirect is followed, no proxy used."""
    url = urllib.parse.urlsplit(message.url)
    connection = connection_to(url)
    connection.timeout = seconds
    try:
        own = message_headers(message, url)
        connection.request(message.method, request_target(url), message.body or None, own)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError) as fault:
        # A broken answer is not quoted: it may repeat what was asked for.
        reason = describe_fault(fault) if isinstance(fault, OSError) else f"no HTTP ({type(fault).__name__})"
        raise NotTaken(reason, not isinstance(fault, ssl.SSLCertVerificationError)) from None
    finally:
        connection.close()
    if not 200 <= status < 300:
        hint = "; redirects are not followed: write the final URL" if 300 <= status < 400 else ""
        raise NotTaken(f"{status} {http_reason(status)}{hint}", status in RETRIED_STATUSES)


def request_target(url: urllib.parse.SplitResult) -> str:
    """Path and query as HTTP has them; what is escaped already stays as it is."""
    path = urllib.parse.quote(url.path or "/", safe="/%:@!$&'()*+,;=~")
    query = urllib.parse.quote(url.query, safe="/%:@!$&'()*+,;=~?")
    return f"{path}?{query}" if query else path


def message_headers(message: Message, url: urllib.parse.SplitResult) -> dict[str, str]:
    """The request's headers; a user and password in the URL become basic authentication (RFC 7617)."""
    found = {"User-Agent": f"s3borgbackup/{VERSION}"}
    if message.body:
        found["Content-Type"] = message.content_type
    if url.username is not None:
        pair = f"{urllib.parse.unquote(url.username)}:{urllib.parse.unquote(url.password or '')}"
        found["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return found


def deliver(message: Message, deadline: float, over: threading.Event) -> None:
    """Sends a message, again while the fault may pass, until `deadline` (monotonic) or `over`.

    What is sent again may arrive twice. Raises BackupError.
    """
    pause = 1.0
    while True:
        try:
            return send_once(message, min(TELL_TRY_SECONDS, max(POLL_SECONDS, deadline - time.monotonic())))
        except NotTaken as fault:
            late = time.monotonic() + pause > deadline
            if not fault.may_pass or late or over.wait(pause):
                raise BackupError(f"{message} was not told how the run goes: {fault}") from None
        pause *= 2


def healthcheck_message(url: str, signal_name: str, text: str, seconds: float) -> Message | None:
    """What a health check is sent for `start`, `success`, `fail` or `log`; None where it knows no such thing.

    healthchecks.io takes the text as body, and `log` without changing its mind. It is given no run id
    (`rid`): a success with one does not end a start with another, so that a run which ends with 75 would
    leave a start behind that becomes an alarm, although the run that was at work succeeds (`Check.ping` of
    healthchecks). Uptime Kuma has a query: up or down, a line, and a number, here the run's milliseconds.
    """
    parts = urllib.parse.urlsplit(url)
    if KUMA_PATH not in parts.path:
        path = parts.path.rstrip("/") + ("" if signal_name == "success" else f"/{signal_name}")
        return Message("HEALTHCHECK_URL", "POST", parts._replace(path=path).geturl(), cut(text, BODY_BYTES))
    if signal_name not in ("success", "fail"):
        return None
    given = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    query = [pair for pair in given if pair[0] not in ("status", "msg", "ping")]
    query += [
        ("status", "up" if signal_name == "success" else "down"),
        ("msg", " ".join(cut(text, BODY_BYTES).decode().split())[:KUMA_LETTERS]),
        ("ping", str(round(seconds * 1000))),
    ]
    return Message("HEALTHCHECK_URL", "GET", parts._replace(query=urllib.parse.urlencode(query)).geturl())


def cut(text: str, limit_bytes: int) -> bytes:
    """As much of the text's beginning as `limit_bytes` of UTF-8 take."""
    whole = text.encode("utf-8", "backslashreplace")[:limit_bytes]
    return whole.decode("utf-8", "ignore").encode()


def end_signal(code: int) -> str:
    """What a health check is told of a run that ended with `code`.

    With warnings the archive is there. A run that found another one at work leaves the word to that one.
    """
    if code in (EXIT_OK, EXIT_WARNINGS):
        return "success"
    return "log" if code == EXIT_BUSY else "fail"


def is_to_be_notified(code: int, notify_on: str) -> bool:
    """Whether NOTIFY_ON asks for a message about a run that ended with `code`."""
    quiet = {"always": (), "warning": (EXIT_OK,)}.get(notify_on, (EXIT_OK, EXIT_WARNINGS, EXIT_BUSY))
    return code not in quiet


def result_name(code: int) -> tuple[str, str]:
    """What an exit code is called in JSON, and for people."""
    if code > 128:
        return "stopped", f"stopped by {signal.Signals(code - 128).name}"
    return RESULTS.get(code, RESULTS[EXIT_FAILURE])


def run_document(report: Report, code: int, finished: datetime, troubles: Troubles) -> dict[str, Any]:
    """What NOTIFY_URL gets. `text` is for people, under the name that many chat programs' webhooks want."""
    stores = {f"target-{target['name']}" for target in report.targets}
    others = [name for name in troubles.names() if name not in stores]
    targets = [
        {
            **target,
            "errors": troubles.about("error", [f"target-{target['name']}"]),
            "warnings": troubles.about("warning", [f"target-{target['name']}"]),
        }
        for target in report.targets
    ]
    return {
        "run_id": report.run_id,
        "command": report.command,
        "version": VERSION,
        "host": socket.gethostname(),
        "label": report.label,
        "started": f"{report.started:%Y-%m-%dT%H:%M:%SZ}",
        "finished": f"{finished:%Y-%m-%dT%H:%M:%SZ}",
        "seconds": round((finished - report.started).total_seconds(), 3),
        "exit_code": code,
        "result": result_name(code)[0],
        "targets": targets,
        "errors": troubles.about("error", others),
        "warnings": troubles.about("warning", others),
        "more": troubles.more,
        "text": run_text(report, code, troubles),
    }


def run_text(report: Report, code: int, troubles: Troubles) -> str:
    """The same for people: a line, the table, the errors and warnings."""
    what = f"{TOLD_COMMANDS[report.command]} {report.label} on {socket.gethostname()}"
    head = f"{what}: {result_name(code)[1]} (exit code {code})"
    reasons = [" ".join(target["reason"].split()) for target in report.targets]
    # What the table's reasons end with says nothing new.
    lines = [
        line
        for line in troubles.lines()
        if not any(reason and reason.endswith(line.partition(": ")[2] or line) for reason in reasons)
    ]
    return "\n".join(part for part in (head, report.table, "\n".join(lines)) if part)


class Reporter:
    """Tells those that the configuration names of a run's start and end."""

    def __init__(self, reporting: Reporting, console: Console, stop: Stop, report: Report) -> None:
        """Tells nothing yet; `report` is filled in while the run goes on."""
        self.console, self.stop, self.report = console, stop, report
        self._reporting = reporting
        self._start_is_over = threading.Event()
        self._start: concurrent.futures.Future[None] | None = None

    def start(self) -> None:
        """Tells the health check that a run begins, in the background: nobody waits for that."""
        url, over = self._reporting.healthcheck_url, self._start_is_over
        if message := healthcheck_message(url, "start", "", 0) if url else None:
            self._start = in_background(lambda: self._tell(message, over))

    def end(self, code: int) -> None:
        """Tells everybody how the run went, within TELL_SECONDS, or TELL_STOPPED_SECONDS."""
        finished = datetime.now(UTC)
        document = run_document(self.report, code, finished, self.console.troubles)
        if self.console.as_json:
            numbers = {name: document[name] for name in ("exit_code", "result", "seconds")}
            self.console.info("run", result_name(code)[1], "run_finished", **numbers)
        if self._start:  # it must not arrive after the end, so a try that is under way is waited for
            self._start_is_over.set()
            # A failure that arrives before a start still is one: after a stop signal there is no time.
            seconds = POLL_SECONDS if self.stop.requested else 2 * TELL_TRY_SECONDS
            concurrent.futures.wait([self._start], timeout=seconds)
        jobs = {
            str(message): in_background(lambda message=message: self._tell(message, threading.Event()))
            for message in self._end_messages(document)
        }
        if (path := self._reporting.metrics_file) and self.report.command == "run":
            jobs["METRICS_FILE"] = in_background(lambda: self._write_metrics(Path(path), code, finished))
        self._wait(jobs)

    def _end_messages(self, document: Mapping[str, Any]) -> Iterator[Message]:
        """What is sent at the end of a run."""
        reporting, code, seconds = self._reporting, document["exit_code"], document["seconds"]
        if url := reporting.healthcheck_url:
            message = healthcheck_message(url, end_signal(code), document["text"], seconds)
            yield from [message] if message else []
        if reporting.notify_url and is_to_be_notified(code, reporting.notify_on):
            body = json.dumps(document).encode()
            yield Message("NOTIFY_URL", "POST", reporting.notify_url, body, "application/json")

    def _tell(self, message: Message, over: threading.Event) -> None:
        """Sends a message, and says so where that fails."""
        try:
            deliver(message, time.monotonic() + TELL_SECONDS, over)
            self.console.debug("run", f"{message} was told how the run goes")
        except BackupError as error:
            self.console.warning("run", str(error))

    def _write_metrics(self, path: Path, code: int, finished: datetime) -> None:
        """Writes METRICS_FILE, and says so where that fails."""
        try:
            replace_file(path, metrics_text(self.report, code, finished, read_metrics(path)))
        except OSError as error:
            self.console.warning("run", f"METRICS_FILE: cannot write {str(path)!r}: {error.strerror}")

    def _wait(self, jobs: Mapping[str, concurrent.futures.Future[None]]) -> None:
        """Waits until all are done, not for long where the run is stopped, and names those that are not."""
        start = time.monotonic()
        while concurrent.futures.wait(jobs.values(), timeout=POLL_SECONDS).not_done:
            # A try that ends at its deadline has something to say about it.
            limit = TELL_STOPPED_SECONDS if self.stop.requested else TELL_SECONDS + 2 * POLL_SECONDS
            if time.monotonic() - start > limit:
                break
        for name, job in jobs.items():
            if not job.done():
                self.console.warning("run", f"{name}: no answer in {time.monotonic() - start:.0f} s")
            elif error := job.exception():
                self.console.warning("run", f"{name}: a defect of the program, please report it: {error!r}")


METRICS = {
    "last_run_timestamp_seconds": "When the last run ended, as Unix time.",
    "last_run_duration_seconds": "How long the last run took for this target.",
    "last_run_exit_code": "How the last run went for this target: 0 well, 1 warnings, 2 failed, 75 busy.",
    "last_success_timestamp_seconds": "When the last run ended that succeeded for this target, as Unix time.",
    "last_archive_objects": "Objects in the last archive.",
    "last_archive_bytes": "Bytes of the objects in the last archive.",
    "last_archive_new_bytes": "Bytes that the last archive added to the repository.",
}
RUN_METRICS = {
    "run_timestamp_seconds": "When the last run ended, whatever became of it, as Unix time.",
    "run_duration_seconds": "How long the last run took.",
    "run_exit_code": "The exit code of the last run.",
}
METRIC_LINE = re.compile(r"(s3borgbackup_[a-z_]+\{.*\}) ([0-9]+(?:\.[0-9]+)?)")
TARGET_CODES = {
    Verdict.OK.value: EXIT_OK,
    Verdict.WARNING.value: EXIT_WARNINGS,
    Verdict.FAILURE.value: EXIT_FAILURE,
    Verdict.BUSY.value: EXIT_BUSY,
}


def read_metrics(path: Path) -> dict[str, str]:
    """The samples in the file of an earlier run: name and labels as written -> value."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    return {found[1]: found[2] for line in lines if (found := METRIC_LINE.fullmatch(line))}


def metrics_text(report: Report, code: int, finished: datetime, old: Mapping[str, str]) -> str:
    """The run in Prometheus' text format ("Exposition formats" in its documentation).

    What this run does not tell anew stays: a success before it, and targets that were not its turn.
    """
    now = round(finished.timestamp(), 3)
    new = {metric("run_timestamp_seconds", report.label): now, metric("run_exit_code", report.label): code}
    seconds = (finished - report.started).total_seconds()
    new[metric("run_duration_seconds", report.label)] = round(seconds, 3)
    for target in report.targets:
        for name, value in target_metrics(target, now).items():
            new[metric(name, report.label, target["name"])] = value
    known = report.configured
    lines = []
    for name, text in {**RUN_METRICS, **METRICS}.items():
        start = f"s3borgbackup_{name}{{"
        wanted = None if known is None else {metric(name, report.label, target) for target in known}
        kept = [key for key in old if key.startswith(start) and (wanted is None or key in wanted)]
        found = dict.fromkeys([*kept, *(key for key in new if key.startswith(start))])
        lines += [f"# HELP s3borgbackup_{name} {text}", f"# TYPE s3borgbackup_{name} gauge"]
        lines += [f"{key} {new.get(key, old.get(key))}" for key in found]
    return "\n".join(lines) + "\n"


def target_metrics(target: Mapping[str, Any], now: float) -> dict[str, float]:
    """What a run has to tell of one target."""
    code = TARGET_CODES[target["result"]]
    found = {
        "last_run_timestamp_seconds": now,
        "last_run_duration_seconds": target["seconds"],
        "last_run_exit_code": code,
    }
    if code in (EXIT_OK, EXIT_WARNINGS):
        found["last_success_timestamp_seconds"] = now
    if target["archive"]:
        found |= {f"last_archive_{name}": target[name] for name in ("objects", "bytes", "new_bytes")}
    return found


def metric(name: str, label: str, target: str | None = None) -> str:
    """A sample's name and labels, as the format wants them."""
    labels = {"label": label} if target is None else {"label": label, "target": target}
    pairs = ",".join(f'{key}="{escape_label(value)}"' for key, value in labels.items())
    return f"s3borgbackup_{name}{{{pairs}}}"


def escape_label(value: str) -> str:
    """A label's value, in which backslash, double quote and line feed are escaped."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return escaped.encode("utf-8", "replace").decode()


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one go: who reads it finds the old one or the new one, whole. Raises OSError.

    Everybody may read it, as the umask allows: node_exporter is another user.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------- Repository


@dataclass(frozen=True)
class Preflight:
    """What S3 says about a store before anything is mounted."""

    region: str
    keys: tuple[S3Object, ...]  # the first page of its listing
    complete: bool  # that page is all there is
    clock: datetime  # the server's

    def repository_state(self, store: Store) -> RepositoryState:
        """Whether a borg repository lies in the store."""
        return repository_state(
            {entry.key[len(store.key_prefix) :]: entry.size_bytes for entry in self.keys}, self.complete
        )

    def holds(self, store: Store, name: str) -> bool:
        """Whether a note is there; our names sort before all of borg's."""
        return any(entry.key == f"{store.key_prefix}{name}" for entry in self.keys)

    def others(self, store: Store) -> list[str]:
        """The keys of what is not ours: the lease, probes and notes are."""
        return [
            entry.key for entry in self.keys if not entry.key.startswith(f"{store.key_prefix}{OWN_PREFIX}")
        ]


class RepositoryState(enum.Enum):
    """What lies where a repository is expected."""

    EMPTY = "nothing"
    READY = "a repository"
    UNFINISHED = "what an interrupted `borg init` left"
    FOREIGN = "other objects"


# With borg's temporary files, `config-abcdefgh.tmp` (SaveFile in platform/base.py of borg 1.4).
OWN_NAMES = re.compile(
    r"README|(config|nonce)(-\w{8}\.tmp)?|(data|hints|index|integrity|lock)[./].*", re.DOTALL | re.ASCII
)
SEGMENT_FILE = re.compile(r"data/[0-9]+/([0-9]+)")
UNFINISHED_MAX_BYTES = 65536  # the first manifest and its commit take less than 1 KB


def repository_state(sizes: Mapping[str, int], complete: bool) -> RepositoryState:
    """The state from the names and sizes at the beginning of a listing.

    `borg init` writes README, config, the segments 0 and 1, and last an index. Where there is no further
    segment, nothing can have been archived, so what has only borg's own names may be made anew.
    """
    names = {name for name in sizes if name and not name.startswith(OWN_PREFIX)}
    own = {name for name in names if OWN_NAMES.fullmatch(name)}
    if not names:
        return RepositoryState.EMPTY
    later = any(found and int(found[1]) > 1 for found in map(SEGMENT_FILE.fullmatch, own))
    small = complete and own == names and sum(sizes.values()) < UNFINISHED_MAX_BYTES and not later
    has_index = any(name.startswith("index.") for name in own)
    if small and "README" in own and not ("config" in own and has_index):
        return RepositoryState.UNFINISHED
    return RepositoryState.READY if "config" in own and len(own) > 1 else RepositoryState.FOREIGN


def look(client: S3Client) -> Preflight:
    """Lists the beginning of a store. Raises S3Error."""
    entries, more = client.list_page(client.store.key_prefix)
    if more and entries != sorted(entries, key=lambda entry: entry.key):  # what matters may be on any page
        entries, more = list(client.list_objects(client.store.key_prefix)), None
    return Preflight(client.region, tuple(entries), not more, client.clock or datetime.now(UTC))


def examine(client: S3Client, write: bool) -> Preflight:
    """Lists a store, reads from it and, with `write`, writes, reads back and deletes an object.

    Raises S3Error naming what is refused.
    """
    found = look(client)
    probe_read(client, [entry for entry in found.keys if not entry.key.endswith("/")][:PROBED_OBJECTS])
    if write:
        probe_write(client)
    return found


def preflight_one(runtime: Runtime, store: Store, write: bool) -> Preflight:
    """Examines one store. Raises S3Error naming what is refused, Stopped on a stop signal."""
    client = S3Client(store, stop=runtime.stop)
    [found] = side_by_side([lambda: examine(client, write)], runtime.stop)
    if isinstance(found, BackupError):
        raise found
    return found


PROBED_OBJECTS = 10


def probe_read(client: S3Client, entries: Sequence[S3Object]) -> None:
    """Reads the first byte of one of these objects.

    Raises S3Error, the first one, where S3 refuses them all. One in cold storage, or deleted since the
    listing, says nothing about the others.
    """
    refusals = []
    for entry in entries:
        try:
            client.get(entry.key, (0, 0) if entry.size_bytes else None)
            return
        except S3Error as error:
            if error.status not in (*REFUSALS, 404):
                raise
            if error.status != 404 and error.code != "InvalidObjectState":
                refusals.append(error)
    if refusals:
        raise refusals[0]


def probe_write(client: S3Client) -> None:
    """Writes a small object below the store's prefix, reads it back and deletes it.

    Does so again when it is gone: another run removes what it takes for a leftover.
    """
    key, body = f"{client.store.key_prefix}{PROBE_NAME}{secrets.token_hex(6)}", secrets.token_bytes(16)
    for last in (False, False, True):
        client.put(key, body)
        try:
            if client.get(key, (1, len(body) - 1)) == body[1:]:
                return
            what = f"{client.store.name}: an object that was just written reads back differently"
            raise S3Error(what, "Use a store that reads what was written.", 200, "Stale")
        except S3Error as error:
            if error.status != 404 or last:
                raise
        finally:
            client.delete(key)


@contextlib.contextmanager
def held(
    runtime: Runtime,
    client: S3Client,
    purpose: str,
    notice: Callable[[str], None] | None = None,
    switch: DeadMansSwitch | None = None,
) -> Iterator[Lease]:
    """The lease on a target's repository."""
    settings, name = runtime.settings, client.store.name
    if not client.clock:  # it tells the others since when, by a clock that all share
        look_at_lease(client)
    holder = Holder(
        runtime.run_id, socket.gethostname(), purpose, utc_now(client), settings.lease_ttl_seconds
    )

    def warn(text: str) -> None:
        runtime.console.warning(name, text)

    patience_seconds = min(PROVEN_PATIENCE_SECONDS, settings.stall_seconds)
    waits = settings.lease_wait_seconds
    with leased(client, holder, waits, patience_seconds, notice or warn, runtime.stop.wait, switch) as lease:
        yield lease


CONFIG_ID = re.compile(r"^id = ([0-9a-f]{64})$", re.MULTILINE)


def repository_id(runtime: Runtime, mount: Mount) -> str:
    """The id in a mounted repository's config. Raises BackupError."""
    config = within(MOUNT_SECONDS, f"{mount.store.name}: reading config", (mount.path / "config").read_text)
    found = CONFIG_ID.search(config)
    if not found:
        raise BackupError(f"{mount.store.name}: the repository's config has no id", "Restore its config.")
    return found[1]


def prepare_repository(runtime: Runtime, target: Target, client: S3Client, lease: Lease) -> bool:
    """Sees to a repository that borg can use: makes one where there is none, clears what crashed runs left.

    Returns whether it was made. Raises BackupError.
    """
    found = look(client)
    keys = found.keys
    probe = f"{target.store.key_prefix}{PROBE_NAME}"  # what a preflight that was killed left
    delete_all(lease, [entry.key for entry in keys if entry.key.startswith(probe)])
    state = what_lies_there(client, found)
    if state is RepositoryState.READY:
        if lease.enforced:
            clear_leftovers(runtime, target, client, lease)
        return False
    if state is RepositoryState.UNFINISHED:
        others = found.others(target.store)
        runtime.console.warning(target.store.name, f"{state.value} is removed: {len(others)} small objects")
        delete_all(lease, others)
    make_repository(runtime, target, lease)
    return True


def what_lies_there(client: S3Client, found: Preflight) -> RepositoryState:
    """The state of the place for a repository. Raises BackupError where it holds other objects."""
    store, state = client.store, found.repository_state(client.store)
    if state is RepositoryState.UNFINISHED and not is_remnant(client):
        state = RepositoryState.FOREIGN
    if state is RepositoryState.FOREIGN:
        raise BackupError(
            f"{store.name}: {store.location} holds other objects"
            f" (such as {found.others(store)[0]!r}) and no borg repository",
            f"Point {store.setting('path')} at an empty place, such as {store.bucket}:borg.",
        )
    return state


def expect_repository(client: S3Client, found: Preflight) -> None:
    """Raises BackupError where no repository lies in the store."""
    if what_lies_there(client, found) is not RepositoryState.READY:
        raise BackupError(
            f"{client.store.name}: {client.store.location} holds no repository yet",
            f"Run a backup first, or correct {client.store.setting('path')}.",
        )


def make_repository(runtime: Runtime, target: Target, lease: Lease) -> None:
    """Makes a repository in a local folder, and copies its few small files into the bucket.

    `borg init` wants an empty place, and the lease lies there already. The config goes last: what an
    interruption leaves has none, and is made anew.
    """
    runtime.console.info(target.store.name, f"a new repository is made ({target.encryption})")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
        repository = Path(folder, "repository")
        Borg(runtime, target, repository).run(borg_init(target, repository))
        notes = (KEY_EXPORTED_NAME, CHECKED_NAME)  # of a repository that was here before
        delete_all(lease, [f"{target.store.key_prefix}{name}" for name in notes])
        paths = [path for path in repository.rglob("*") if path.is_file() and path.name != "lock.roster"]
        for path in sorted(paths, key=lambda path: (path.name == "config", path.name != "README")):
            key, body = f"{target.store.key_prefix}{path.relative_to(repository)}", path.read_bytes()
            lease.write(lambda client, key=key, body=body: client.put(key, body))


def find_leftovers(client: S3Client) -> Leftovers:
    """What crashed runs left in a repository, as the bucket has it."""
    prefix = client.store.key_prefix
    names = names_after_data(client)
    # Its last holder may just have left.
    roster = client.find(f"{prefix}lock.roster") if "lock.roster" in names else None
    return Leftovers.sort(names, roster.body if roster else b"")


def remove_leftovers(runtime: Runtime, store: Store, lease: Lease, left: Leftovers) -> None:
    """Deletes what crashed runs left before a mount shows it: TigrisFS may deadlock on such a lock."""
    delete_all(lease, [f"{store.key_prefix}{name}" for name in left.stale])
    if any(LEFT_LOCK.search(name) for name in left.stale):
        runtime.console.info(store.name, "the lock of a run that crashed is removed")
    if any(INDEX_FILE.fullmatch(name) for name in left.stale):
        runtime.console.info(store.name, "the index that a crashed run left half-written is removed")


def delete_all(lease: Lease, keys: Iterable[str]) -> None:
    """Deletes objects, as long as the lease holds."""
    for key in keys:
        lease.write(lambda client, key=key: client.delete(key))


def clear_leftovers(runtime: Runtime, target: Target, client: S3Client, lease: Lease) -> None:
    """Sees to it that borg finds no lock, and no index that it cannot use.

    Raises BackupError when somebody else holds one for longer than LOCK_WAIT_SECONDS.
    """
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while (left := find_leftovers(client)).owners:
        if time.monotonic() > deadline:
            path = shlex.quote(str(runtime.settings.mount_point(target.store)))
            raise BackupError(
                f"{target.store.name}: the repository is locked by somebody else: {', '.join(left.owners)}",
                BREAK_LOCK_HELP.format(name=shlex.quote(target.name), path=path),
            )
        runtime.stop.check()
        time.sleep(POLL_SECONDS * 5)
    remove_leftovers(runtime, target.store, lease, left)


LEFT_LOCK = re.compile(r"^lock\.exclusive.*/.")


@contextlib.contextmanager
def cache_reserved(store: Store, folder: Path) -> Iterator[None]:
    """Keeps others on this machine from borg's cache in `folder`: the lease is that of one place in S3 only.

    Raises BackupError where somebody has it.
    """
    path = folder.with_name(f"s3borgbackup-{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path)
    except OSError:  # a network volume may have no such locks; borg says what else is wrong
        lock = contextlib.nullcontext()
    if lock is None:
        raise BackupError(
            f"{store.name}: a run on another repository with the same id (a copy) uses borg's cache of it",
            f"Let it finish, and point {store.setting('path')} at an empty place of its own.",
        )
    with lock:
        yield


def clear_cache_locks(runtime: Runtime, mount: Mount, folder: Path) -> None:
    """The same for borg's cache, which may lie on a volume and outlive a container that was killed in it."""
    if not (mount.lease and mount.lease.enforced and folder.is_dir()):
        return
    paths = [path for lock in folder.glob("lock.*") for path in (lock, *lock.glob("*"))]
    names = [f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in paths]
    roster = (folder / "lock.roster").read_bytes() if "lock.roster" in names else b""
    for name in Leftovers.sort(names, roster).stale:
        path = folder / name
        with contextlib.suppress(OSError):  # borg says what is wrong with it
            path.rmdir() if name.endswith("/") else path.unlink()
            runtime.console.debug(mount.store.name, f"{path} is removed: a run that crashed left it")


def is_remnant(client: S3Client) -> bool:
    """Whether borg wrote the README that lies there: nothing of somebody else must be removed."""
    return client.get(f"{client.store.key_prefix}README").startswith(b"This is a Borg Backup repository")


def check_encryption(runtime: Runtime, repository: Repository) -> None:
    """Raises BackupError when the repository's encryption mode is not what the configuration promises.

    Where borg has seen the repository before, it refuses another mode itself. Else it is asked.
    """
    mode = seen_encryption(runtime.environ, repository.identity)
    if not mode:
        listed = repository.borg.run(borg_newest(repository.borg.repository, repository.is_ours_alone))
        mode = json.loads(listed.output)["encryption"]["mode"]
    if mistake := encryption_mistake(repository.target, mode):
        raise mistake


def read_note(client: S3Client, name: str) -> dict[str, Any] | None:
    """What was noted beside the repository; None where nothing was. Raises S3Error."""
    answer = client.find(f"{client.store.key_prefix}{name}")
    if not answer:
        return None
    try:
        noted = json.loads(answer.body)
    except ValueError:
        noted = {}
    return noted if isinstance(noted, dict) else {}


def write_note(client: S3Client, name: str, **facts: object) -> None:
    """Notes something beside the repository. Raises S3Error."""
    client.put(f"{client.store.key_prefix}{name}", json.dumps(facts).encode())


def utc_now(client: S3Client) -> str:
    """The time by the server's clock."""
    return f"{client.clock or datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


@dataclass(frozen=True)
class Repository:
    """A mounted repository, and a borg to work on it with."""

    target: Target
    client: S3Client
    mount: Mount
    borg: Borg
    lease: Lease | None  # None: it can only be read
    identity: str  # its id
    cache: Path  # where borg keeps its cache of it
    files: Mapping[str, int]  # path -> size in bytes, as they were when it was opened

    @property
    def is_ours_alone(self) -> bool:
        """Whether the lease keeps all others away, so that borg needs no lock to read."""
        return bool(self.lease and self.lease.enforced)


@contextlib.contextmanager
def writable(
    runtime: Runtime, target: Target, client: S3Client, lease: Lease, others: Sequence[Mount] = ()
) -> Iterator[Repository]:
    """The repository mounted for writing, and ready for borg; its locks are cleared already.

    On leaving, everything is uploaded, and the bucket is compared with what borg left in the mount. `others`
    are further mounts that borg will need. Raises BackupError.
    """
    store = target.store
    with (
        mounted(runtime, store, client.region, read_only=False, lease=lease) as mount,
        contextlib.ExitStack() as undo,
    ):
        wait_until_usable(runtime, mount)
        warm_up(runtime, mount)
        identity = repository_id(runtime, mount)
        cache = cache_folder(runtime.environ, identity)
        undo.enter_context(cache_reserved(store, cache))
        clear_cache_locks(runtime, mount, cache)
        borg = Borg(runtime, target, mount.path, [mount, *others])
        yield Repository(target, client, mount, borg, lease, identity, cache, {})
        mount.check_alive()
        written = repository_files(runtime, store, mount.path, mount)
        # What borg overwrites without changing its size, it does by renaming a file that was uploaded before.
        settle(runtime, mount, lambda: upload_mistakes(written, listed_files(runtime, client)))
    if lease.enforced:  # a lock: TigrisFS may upload it late, or not know that it has, as the answer was lost
        remove_leftovers(runtime, store, lease, find_leftovers(client))
    if not mount.holds_nothing:
        audit_upload(runtime, client, written)


@contextlib.contextmanager
def opened_for_writing(runtime: Runtime, target: Target, purpose: str) -> Iterator[Repository]:
    """An existing repository under its lease, which names `purpose`, for commands that may change it.

    On leaving, everything is uploaded and compared. Raises BackupError.
    """
    found = preflight_one(runtime, target.store, write=True)
    client = S3Client(target.store, found.region, PROVEN, runtime.stop)
    with held(runtime, client, purpose) as lease:
        expect_repository(client, look(client))
        if lease.enforced:
            clear_leftovers(runtime, target, client, lease)
        with writable(runtime, target, client, lease) as repository:
            yield repository


# Reading must work on the worst day: with keys that may only read, while a run writes, after one that
# crashed, beside anybody's locks. So borg gets a folder of links to the repository's files in a mount that is
# read-only: there it may take its lock, and rebuild an index that does not fit. And it keeps what it knows
# beside that folder, as a run may have locked the cache. Only what a run removes meanwhile can be missed.

READING_IS_NOT_ALONE = (
    "reading goes on without the lease, and fails if somebody compacts the repository meanwhile"
)


@contextlib.contextmanager
def full_disk_told(store: Store) -> Iterator[None]:
    """Turns the OSError of a full disk into a BackupError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK or os.strerror(errno.ENOSPC) in str(error):
            raise BackupError(f"{store.name}: {os.strerror(errno.ENOSPC)}", DISK_HELP) from error
        raise


@contextlib.contextmanager
def opened_for_reading(runtime: Runtime, target: Target, purpose: str = "") -> Iterator[Repository]:
    """An existing repository to read from, with keys that may list and read; whoever writes goes on.

    With a `purpose` the lease is held meanwhile, where it is free and the keys may write: so nobody compacts
    the repository while it is read for long. Raises BackupError.
    """
    found = preflight_one(runtime, target.store, write=False)
    client = S3Client(target.store, found.region, PROVEN, runtime.stop)
    expect_repository(client, found)
    with contextlib.ExitStack() as undo:
        undo.enter_context(full_disk_told(target.store))
        if purpose:
            hold_if_possible(runtime, client, purpose, undo)
        folder = undo.enter_context(folder_for_mounts())
        private = dataclasses.replace(
            runtime, settings=dataclasses.replace(runtime.settings, data_dir=folder)
        )
        mount = undo.enter_context(mounted(private, target.store, client.region, read_only=True))
        wait_until_usable(private, mount)
        files = repository_files(private, target.store, mount.path, mount)
        identity = repository_id(private, mount)
        view = within(MOUNT_SECONDS, "config", lambda: link_files(mount.path, files, folder / "view"))
        borg = Borg(private, target, view, [mount], separate_folders(runtime.environ, identity, view))
        repository = Repository(
            target, client, mount, borg, None, identity, folder / "cache" / identity, files
        )
        try:
            yield repository
        except Stopped:
            raise
        except BackupError as error:
            if error.message.startswith(target.store.name) and removed_meanwhile(runtime, repository):
                raise BackupError(
                    f"{target.store.name}: another run changed the repository while it was read, which may be"
                    f" why this failed: {error.message}",
                    "Run it again.",
                ) from error
            raise


def hold_if_possible(runtime: Runtime, client: S3Client, purpose: str, undo: contextlib.ExitStack) -> None:
    """Has `undo` hold the lease, unless somebody else does, or S3 does not let us.

    Should it be lost later, reading goes on all the same.
    """
    name, settings = client.store.name, dataclasses.replace(runtime.settings, lease_wait_seconds=0)
    hasty = client.with_patience(Patience(failing_seconds=CONNECT_PATIENCE_SECONDS))
    impatient = dataclasses.replace(runtime, settings=settings)

    def notice(text: str) -> None:
        runtime.console.debug(name, text)

    try:
        undo.enter_context(held(impatient, hasty, purpose, notice, NoSwitch()))
    except (StillRunning, S3Error) as error:
        runtime.console.info(name, f"{error.message}: {READING_IS_NOT_ALONE}")


def link_files(mounted_at: Path, files: Iterable[str], view: Path) -> Path:
    """Makes the folder `view` with links to a mounted repository's files; borg's locks are left out."""
    view.mkdir()
    folders = {str(view)}
    for name in files:
        if name == "config":
            shutil.copyfile(mounted_at / name, view / name)
        elif not name.startswith("lock."):
            folder = os.path.dirname(f"{view}/{name}")
            if folder not in folders:
                os.makedirs(folder, exist_ok=True)
                folders.add(folder)
            os.symlink(f"{mounted_at}/{name}", f"{view}/{name}")
    return view


def separate_folders(environ: Mapping[str, str], identity: str, view: Path) -> dict[str, str]:
    """Where a borg that only reads keeps what it knows: beside `view`.

    It is told what is known, and so notices a repository that was swapped or set back. That this one lies
    elsewhere is no news.
    """
    known, security = security_folder(environ, identity), view.with_name("security") / identity
    if known.is_dir():
        shutil.copytree(known, security)
        (security / "location").write_text(str(view), encoding="utf-8")
    return {"BORG_CACHE_DIR": str(view.with_name("cache")), "BORG_SECURITY_DIR": str(security.parent)}


def removed_meanwhile(runtime: Runtime, repository: Repository) -> bool:
    """Whether files of the repository have gone since it was opened."""
    try:
        names = listed_files(runtime, repository.client).keys()
    except S3Error:
        return False
    return any(name not in names for name in repository.files if not name.startswith("lock."))


# ---------------------------------------------------------------------------------------------------- Check

# `borg check --max-duration` reads the segments one after another, compares each object in them with its
# checksum, and notes in the repository's config how far it came. One such pass over all segments may take
# many slices. What we know of it is a small JSON object beside the lease, written under the lease:
#
#   repository    the repository's id: what is said of another one counts for nothing
#   checked       when the last complete pass ended that found no damage
#   checked_from  when that one began: whatever was written before has been checked since
#   pass_began    when the pass began that is under way
#   segment       the last segment that it has checked
#   began         when the last slice or full check began that came to its end
#   damage        what was found, until a check that sees as much finds everything sound
#   damaged       when that was found last
#   kind          the kind of check that found it, see CHECK_KINDS

CHECK_KINDS = ("segments", "archives", "data")  # each sees what those before it see, and more
ROUND_SECONDS = 300  # borg notes its place only when it ends: so much is lost at most by an interruption
EARLY = 0.9  # a nightly run must not skip its week because it began a minute earlier than a week before


@dataclass(frozen=True)
class CheckRecord:
    """What is known of the checks of a repository; see above for the fields."""

    repository: str = ""
    checked: datetime | None = None
    checked_from: datetime | None = None
    pass_began: datetime | None = None
    segment: int = -1
    began: datetime | None = None
    damage: str = ""
    damaged: datetime | None = None
    kind: str = ""

    def body(self) -> bytes:
        """The object's content."""
        fields = dataclasses.asdict(self)
        return json.dumps(
            {
                name: value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
                for name, value in fields.items()
            }
        ).encode()

    @classmethod
    def parse(cls, body: bytes, identity: str) -> CheckRecord:
        """The record that `body` holds of the repository `identity`; an empty one where it does not."""
        empty = cls(repository=identity)
        try:
            fields = json.loads(body)
            if fields["repository"] != identity:
                return empty
            times = {name: parse_time(fields[name]) for name in RECORD_TIMES}
            texts = {name: str(fields[name]) for name in ("damage", "kind")}
            return cls(repository=identity, segment=int(fields["segment"]), **times, **texts)
        except (ValueError, KeyError, TypeError, RecursionError):
            return empty


RECORD_TIMES = ("checked", "checked_from", "pass_began", "began", "damaged")


def parse_time(text: str | None) -> datetime | None:
    """A time from its ISO form. Raises ValueError or TypeError where it has no zone, or is none."""
    return datetime.fromisoformat(text).astimezone(UTC) if text is not None else None


@dataclass(frozen=True)
class Segment:
    """A file of a repository that holds data; its number grows with each that is written."""

    size_bytes: int
    written: datetime


@dataclass(frozen=True)
class Checked:
    """What is known after a check."""

    record: CheckRecord
    segments: Mapping[int, Segment]  # by their numbers
    clock: datetime  # the server's

    @property
    def unchecked_since(self) -> datetime | None:
        """Since when the data that is unchecked for the longest time is so; None where there is no data."""
        return unchecked_since(self.record, self.segments)

    @property
    def age(self) -> str:
        """How old the oldest unchecked data is, in a few words."""
        since = self.unchecked_since
        if not since:
            return "there is no data to check"
        return f"the oldest unchecked data is {age(max(0.0, (self.clock - since).total_seconds()))} old"

    @property
    def extent(self) -> str:
        """How much has been checked, in a few words."""
        total = sum(segment.size_bytes for segment in self.segments.values())
        if not self.record.pass_began:
            return f"all {size(total)}"
        done = [number for number in self.segments if number <= self.record.segment]
        return (
            f"{size(sum(self.segments[number].size_bytes for number in done))} of {size(total)} in this pass"
        )


def age(seconds: float) -> str:
    """`3 days`, `5 hours`, `1 minute`: rounded down."""
    for name, unit in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= unit:
            return count(int(seconds // unit), name)
    return count(int(seconds), "second")


def last_check(client: S3Client, identity: str) -> CheckRecord:
    """What is known of the checks of the repository with this id. Raises S3Error."""
    answer = client.find(f"{client.store.key_prefix}{CHECKED_NAME}")
    return CheckRecord.parse(answer.body if answer else b"", identity)


def is_due(plan: CheckPlan, began: datetime | None, now: datetime) -> bool:
    """Whether the next check is to be made, when the last one began at `began`."""
    if not plan.every or not began:
        return True
    return (now - began).total_seconds() >= EARLY * CHECK_PERIODS[plan.every]


def unchecked_since(record: CheckRecord, segments: Mapping[int, Segment]) -> datetime | None:
    """Since when the data that is unchecked for the longest time is so; None where there is no data.

    Data is unchecked since the pass began that read it last, or since it was written, if none has. In a pass
    that is under way only the segments up to the last one that it checked count as read.
    """
    since = []
    for number, segment in segments.items():
        read = record.pass_began if number <= record.segment else record.checked_from
        since.append(max(segment.written, read) if read else segment.written)
    return min(since, default=None)


def before_slice(record: CheckRecord, position: int, now: datetime) -> CheckRecord:
    """The record when a slice begins; borg's config says that it will go on after `position` (-1: anew).

    Where its `segment` is then below `position`, borg has to be set back to it: somebody else went on with
    the pass, or we were interrupted before we could note what was found.
    """
    if position < 0 or not record.pass_began or record.segment < 0:
        return dataclasses.replace(record, pass_began=now, segment=-1)
    return dataclasses.replace(record, segment=min(position, record.segment))


def after_check(record: CheckRecord, position: int, damage: str, kind: str, now: datetime) -> CheckRecord:
    """The record when borg has checked all up to the segment `position`; -1: everything, the pass is over."""
    if damage:
        record = dataclasses.replace(record, damage=damage, damaged=now, kind=kind)
    if position >= 0:
        return dataclasses.replace(record, segment=position)
    over = dataclasses.replace(record, pass_began=None, segment=-1)
    if record.damage and record.damaged and record.pass_began and record.damaged >= record.pass_began:
        return over
    over = dataclasses.replace(over, checked=now, checked_from=record.pass_began)
    sees_it = CHECK_KINDS.index(kind) >= (CHECK_KINDS.index(record.kind) if record.kind in CHECK_KINDS else 0)
    return dataclasses.replace(over, damage="", damaged=None, kind="") if sees_it else over


def check_repository(
    runtime: Runtime, repository: Repository, plan: CheckPlan, verify_data: bool = False
) -> Checked:
    """Checks a repository that is open for writing: a slice of it, or everything; never repairs anything.

    Damage is in the result's record, and so is that which an earlier check has found. Raises BackupError
    where it could not be checked, Stopped on a stop signal: the next slice goes on from there.
    """
    name, start = repository.target.store.name, time.monotonic()
    record = last_check(repository.client, repository.identity)
    began = repository.client.clock or datetime.now(UTC)

    def clock() -> datetime:  # the server's, without asking it again
        return began + timedelta(seconds=time.monotonic() - start)

    runtime.console.info(name, "borg check begins")
    if plan.seconds is None:
        record = check_everything(repository, record, clock, verify_data)
    else:
        record = check_slice(runtime, repository, record, clock, start + plan.seconds)
    record = dataclasses.replace(record, began=began)
    note_record(repository, record)
    checked = Checked(record, segments_of(runtime, repository), clock())
    found = "damage was found" if record.damage else "no damage was found"
    took = duration(time.monotonic() - start)
    runtime.console.info(name, f"checked {checked.extent}, in {took}: {found}; {checked.age}")
    return checked


def check_everything(
    repository: Repository, record: CheckRecord, clock: Callable[[], datetime], verify_data: bool
) -> CheckRecord:
    """A whole pass, with the index and the archives."""
    record = dataclasses.replace(record, pass_began=clock(), segment=-1)
    kind = CHECK_KINDS[2] if verify_data else CHECK_KINDS[1]
    damage = damage_found(repository, borg_check_all(repository.mount.path, verify_data))
    return after_check(record, -1, damage, kind, clock())


def check_slice(
    runtime: Runtime,
    repository: Repository,
    record: CheckRecord,
    clock: Callable[[], datetime],
    deadline: float,
) -> CheckRecord:
    """A slice that ends at `deadline` (monotonic), or with the pass; its place is noted now and then."""
    path, position = repository.mount.path, borgs_position(repository)
    record = before_slice(record, position, clock())
    if record.segment < position:
        value = ["last_segment_checked", str(record.segment)]
        anew = ["--delete", str(path), value[0]]
        repository.borg.run(["config", *(anew if record.segment < 0 else [str(path), *value])])
    damage = missing_segments(runtime, repository)
    while True:
        seconds = min(ROUND_SECONDS, deadline - time.monotonic())
        damage = damage_found(repository, borg_check_slice(path, seconds)) or damage
        position = borgs_position(repository)
        record = after_check(record, position, damage, CHECK_KINDS[0], clock())
        note_record(repository, record)
        if position < 0 or time.monotonic() > deadline:
            return record


def damage_found(repository: Repository, arguments: Sequence[str]) -> str:
    """What a borg command finds wrong with a repository; nothing where that is sound."""
    result = repository.borg.run(arguments)
    if result.verdict is Verdict.OK:
        return ""
    further = result.log.error_count - 2  # the last one says that errors were found
    more = f" (and {count(further, 'further error')})" if further > 0 else ""
    return f"{result.log.reason(1)}{more}"


def borgs_position(repository: Repository) -> int:
    """The last segment that the pass under way has checked, as borg notes it; -1: the next is the first."""
    name, config = repository.target.store.name, repository.mount.path / "config"
    text = within(MOUNT_SECONDS, f"{name}: reading config", config.read_text)
    found = re.search(r"^last_segment_checked = ([0-9]+)$", text, re.MULTILINE)
    return int(found[1]) if found else -1


def missing_segments(runtime: Runtime, repository: Repository) -> str:
    """The segments that the repository's index counts on and that are not there: borg's slices miss that."""
    path, there = repository.mount.path, segments_of(runtime, repository)
    hints = json.loads(repository.borg.run(["debug", "dump-hints", str(path), "-"]).output)
    missing = sorted(int(number) for number, used in hints["segments"].items() if used)
    missing = [number for number in missing if number not in there]
    if not missing:
        return ""
    names = ", ".join(map(str, missing[:5]))
    more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
    damage = f"{count(len(missing), 'segment')} with data missing from the bucket: {names}{more}"
    runtime.console.error(repository.target.store.name, damage)
    return damage


def segments_of(runtime: Runtime, repository: Repository) -> dict[int, Segment]:
    """The segments of a mounted repository by their numbers: the files `data/FOLDER/NUMBER`."""
    data = repository.mount.path / "data"

    def walk() -> dict[int, Segment]:
        found = {}
        for path in walk_files(repository.target.store, data):
            if path.name.isdigit():
                status = path.stat()
                found[int(path.name)] = Segment(status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
        return found

    what = f"{repository.target.store.name}: listing the repository"
    return until_done(runtime, [repository.mount], what, in_background(walk))


def note_record(repository: Repository, record: CheckRecord) -> None:
    """Writes the record beside the repository, as long as the lease holds."""
    key = f"{repository.target.store.key_prefix}{CHECKED_NAME}"
    if not repository.lease:
        raise BackupError(f"{repository.target.store.name}: a repository that is only read cannot be checked")
    repository.lease.write(lambda client: client.put(key, record.body()))


def damage_error(repository: Repository, record: CheckRecord) -> BackupError | None:
    """The error for damage that a check has found, and that no later one has found repaired; else None."""
    if not record.damage:
        return None
    target = repository.target
    when = f" (found {record.damaged:%Y-%m-%dT%H:%M:%SZ})" if record.damaged else ""
    return BackupError(
        f"{target.store.name}: the repository is damaged: {record.damage}{when}",
        DAMAGE_HELP.format(name=target.name),
    )


def check_if_due(runtime: Runtime, repository: Repository) -> None:
    """Checks a repository as its target's `check` says.

    Raises BackupError when it is damaged, be it that an earlier check found it.
    """
    plan, client = repository.target.check, repository.client
    if not plan:
        return
    record, now = last_check(client, repository.identity), client.clock or datetime.now(UTC)
    if is_due(plan, record.began, now):
        record = check_repository(runtime, repository, plan).record
    else:
        checked = Checked(record, segments_of(runtime, repository), now)
        runtime.console.info(repository.target.store.name, f"no check is due; {checked.age}")
    if error := damage_error(repository, record):
        raise error


# --------------------------------------------------------------------------------------------------- Backup


@dataclass
class Outcome:
    """How it went with one target: it has failed until its story is at its end."""

    target: Target
    verdict: Verdict = Verdict.FAILURE
    reason: str = "was not run"
    archive: str = ""
    objects: int = 0
    archived_bytes: int = 0
    stored_bytes: int = 0
    archives: dict[str, int] = field(default_factory=dict)  # of a maintenance: how many there were, and are
    seconds: float = 0.0
    is_suspicious: bool = False  # the archive may not be worth what pruning would delete for it
    warnings: list[str] = field(default_factory=list)  # the reasons, where there are any
    failures: list[str] = field(default_factory=list)  # what fails it although its story goes on
    tries: int = 0
    stuck: str = ""  # how the first try ended

    def begin(self) -> None:
        """A try begins: what an earlier one has found counts for nothing."""
        fresh = Outcome(self.target, seconds=self.seconds, tries=self.tries + 1, stuck=self.stuck)
        vars(self).update(vars(fresh))

    def as_json(self) -> dict[str, Any]:
        """How it went, in JSON."""
        return {
            "name": self.target.name,
            "result": self.verdict.value,
            "reason": self.reason,
            "archive": self.archive,
            "objects": self.objects,
            "bytes": self.archived_bytes,
            "new_bytes": self.stored_bytes,
            **self.archives,
            "seconds": round(self.seconds, 3),
        }

    def add(self, result: BorgResult) -> None:
        """Takes a command's warnings into account."""
        if result.verdict is Verdict.WARNING:
            self.warn()

    def warn(self, reason: str = "") -> None:
        """It ends with a warning at best."""
        self.warnings.append(reason)

    def finish(self) -> None:
        """Its story is at its end."""
        if self.failures:
            self.verdict, self.reason = Verdict.FAILURE, self.failures[0]
            return
        self.verdict = Verdict.WARNING if self.warnings else Verdict.OK
        self.reason = next(filter(None, self.warnings), "")

    def fail(self, error: Exception) -> None:
        """It has failed, or it is not our turn."""
        busy = isinstance(error, StillRunning)
        self.verdict, self.reason = Verdict.BUSY if busy else Verdict.FAILURE, str(error)


def bring_to_end(runtime: Runtime, outcome: Outcome, work: Callable[[Runtime], None]) -> bool:
    """Does a target's work. Whatever goes wrong becomes its outcome, so that the others go on.

    Returns whether it got stuck for the first time, and is to be tried once more. That try takes the lease as
    anybody else would: when it has expired. What the killed tigrisfs had sent may still arrive until then,
    and would overwrite segments that have the same numbers. Raises Stopped.
    """
    start, console, name = time.monotonic(), runtime.console, outcome.target.store.name
    outcome.begin()
    if outcome.tries > 1:  # LEASE_WAIT is about other runs
        settings = dataclasses.replace(runtime.settings, lease_wait_seconds=None)
        runtime = dataclasses.replace(runtime, settings=settings)
    try:
        work(runtime)
        outcome.finish()
    except Stopped:
        outcome.fail(BackupError("was stopped"))
        raise
    except (BackupError, OSError) as error:
        outcome.fail(error)
        if isinstance(error, Hung) and outcome.tries == 1 and not runtime.stop.requested:
            outcome.stuck = error.message
            console.warning(name, f"{error.message}; it is tried once more, with new mounts", "stuck")
            return True
        console.error(name, str(error))
    except Exception as error:
        outcome.fail(BackupError(f"{name}: {type(error).__name__}: {DEFECT}"))
        console.defect(name, error)
    finally:
        outcome.seconds += time.monotonic() - start
        if outcome.tries > 1:
            first = f"tried twice, as it got stuck: {outcome.stuck}"
            outcome.reason = f"{first}; {outcome.reason}" if outcome.reason else first
    return False


def run_backup(runtime: Runtime, targets: Sequence[Target]) -> int:
    """One backup of the source to `targets`; prints what happens and returns the exit code.

    Raises BackupError when no target could even be tried, Stopped on a stop signal, after everything is
    undone.
    """
    runtime.console.info(
        "run",
        f"backup of {runtime.settings.source.location} to {count(len(targets), 'target')}",
        "run_started",
        version=VERSION,
        targets=[target.name for target in targets],
    )
    outcomes = [Outcome(target) for target in targets]
    try:
        source, *checks = preflight(runtime, targets)
        if isinstance(source, BackupError):
            raise source
        back_up_all(runtime, source, list(zip(outcomes, checks, strict=True)))
        runtime.stop.check()
    finally:
        conclude(runtime, outcomes, summary)
    return overall(outcomes)


def conclude(
    runtime: Runtime, outcomes: Sequence[Outcome], tabulate: Callable[[Sequence[Outcome]], str]
) -> None:
    """Prints how it went with each target, and notes it for those who are told."""
    report, console = runtime.report, runtime.console
    report.targets = [outcome.as_json() for outcome in outcomes]
    report.table = tabulate(outcomes)
    if not console.as_json:
        console.plain(report.table)
        return
    for outcome in outcomes:
        console.info(
            outcome.target.store.name,
            outcome.reason or outcome.verdict.value,
            "target_finished",
            **outcome.as_json(),
        )


def back_up_all(
    runtime: Runtime, found: Preflight, work: Sequence[tuple[Outcome, Preflight | BackupError]]
) -> None:
    """Backs up to several targets at a time.

    Mounts the source anew when it was lost on the way: that is the failure of the targets of that time only.
    A target that got stuck is tried once more, and the source is mounted anew for it, too: it may be the one
    that does not move.
    """
    remaining, at_once = deque(work), targets_at_once(runtime.settings, runtime.memory_mb)
    while remaining:
        before, again = len(remaining), []
        try:
            with mounted(runtime, runtime.settings.source, found.region, read_only=True) as mount:
                mount.is_shared = at_once > 1
                while remaining and not again and (mount.is_alive or not mount.usable):
                    batch = [remaining.popleft() for _ in range(min(at_once, len(remaining)))]
                    again = back_up_batch(runtime, found, mount, batch)
                    if not mount.usable:
                        break
        except Stopped:
            raise
        except BackupError as error:
            if len(remaining) == before:
                raise
            runtime.console.warning("source", str(error))
        remaining.extend(again)


@dataclass(frozen=True)
class Source:
    """The mounted source, as the borg of one target meets it."""

    found: Preflight
    mount: Mount
    ahead: ReadAhead
    reader: Reader


def back_up_batch(
    runtime: Runtime, found: Preflight, mount: Mount, batch: Sequence[tuple[Outcome, Preflight | BackupError]]
) -> list[tuple[Outcome, Preflight | BackupError]]:
    """Backs up to some targets side by side; the source is read once for all. Raises Stopped.

    Returns those that are to be tried once more.
    """
    readers = [Reader() for _ in batch]
    ahead = ReadAhead(runtime, mount, readers)
    try:
        futures = [
            in_background(
                lambda outcome=outcome, check=check, source=Source(found, mount, ahead, reader): attempt(
                    runtime, outcome, check, source
                )
            )
            for (outcome, check), reader in zip(batch, readers, strict=True)
        ]
        while concurrent.futures.wait(futures, timeout=POLL_SECONDS).not_done:
            pass  # each sees stop signals by itself, and has its own deadlines
    finally:
        ahead.close()
    return [each for each, future in zip(batch, futures, strict=True) if future.result()]


def preflight(runtime: Runtime, targets: Sequence[Target]) -> list[Preflight | BackupError]:
    """Examines the source and all targets at the same time; the source's result is the first."""
    stores = [runtime.settings.source, *(target.store for target in targets)]
    clients = [S3Client(store, stop=runtime.stop) for store in stores]
    checks = [
        lambda client=client: examine(client, write=client.store.target is not None) for client in clients
    ]
    *found, copies = side_by_side([*checks, lambda: find_copies(runtime, targets)], runtime.stop)
    runtime.stop.check()  # the only reason why that one could fail
    return [copies.get(client.store.target, result) for client, result in zip(clients, found, strict=True)]


def find_copies(runtime: Runtime, targets: Sequence[Target]) -> dict[str, BackupError]:
    """An error for each of `targets` whose repository has the id of another one's, by the target's name.

    borg keeps one cache for both, and takes the one for a manipulated version of the other. The first one in
    the configuration may go on.
    """

    def identity(target: Target) -> str:
        hasty = Patience(answer_seconds=2, unreachable_seconds=0, failing_seconds=0)
        client = S3Client(target.store, patience=None if target in targets else hasty, stop=runtime.stop)
        answer = client.find(f"{target.store.key_prefix}config")
        found = CONFIG_ID.search(answer.body.decode("utf-8", "replace")) if answer else None
        return found[1] if found else ""

    configured = runtime.settings.targets
    if len(configured) < 2:
        return {}
    ids = side_by_side([lambda target=target: identity(target) for target in configured], runtime.stop)
    first: dict[str, Target] = {}
    errors = {}
    for target, repository in zip(configured, ids, strict=True):
        if isinstance(repository, BackupError) or not repository:
            continue
        other = first.setdefault(repository, target)
        if other is not target:
            errors[target.name] = BackupError(
                f"{target.store.name}: its repository has the id of {other.store.name}'s: one is a copy of"
                " the other, and borg cannot tell them apart",
                f"Point {target.store.setting('path')} at an empty place: a run makes a repository there.",
            )
    return errors


def attempt(runtime: Runtime, outcome: Outcome, check: Preflight | BackupError, source: Source) -> bool:
    """Backs up to one target; a failure becomes its outcome, so that the others go on. Raises Stopped.

    Returns whether it is to be tried once more.
    """

    def work(runtime: Runtime) -> None:
        if isinstance(check, BackupError):
            raise check
        again = outcome.tries > 1  # a store that does not take writes any more is to be told in seconds
        found = preflight_one(runtime, outcome.target.store, write=True) if again else check
        backup_target(runtime, outcome, found, source)

    try:
        return bring_to_end(runtime, outcome, work)
    finally:
        source.ahead.left(source.reader)


def backup_target(runtime: Runtime, outcome: Outcome, check: Preflight, source: Source) -> None:
    """Backs up to one target, from taking its lease to giving it back.

    Fills in `outcome`; raises BackupError.
    """
    target = outcome.target
    client = S3Client(target.store, check.region, PROVEN, runtime.stop)
    with held(runtime, client, "a backup") as lease:
        is_new = prepare_repository(runtime, target, client, lease)
        with writable(runtime, target, client, lease, [source.mount]) as repository:
            wait_until_usable(runtime, source.mount)
            if is_new:
                note_known_objects(repository.cache, 0)  # `borg init` made an empty one
                note_count(repository.cache, runtime.settings.label, 0)
            else:
                check_encryption(runtime, repository)
                warn_of_missing_cache(runtime, target, repository.cache)
            create_archive(runtime, outcome, repository, source)
            is_whole = not outcome.failures
            compare_with_last(runtime, outcome, repository)
            if target.prune and outcome.objects and not outcome.is_suspicious:
                prune(runtime, outcome, repository)
                if target.compact_percent is not None:
                    compact(runtime, outcome, repository)
            check_at_last(runtime, outcome, repository, f"the archive {outcome.archive} is stored")
        outlast_name(outcome.archive)
    if (
        outcome.objects and is_whole
    ):  # what comes after an empty or a failed one is to be compared with the last good one
        note_count(repository.cache, runtime.settings.label, outcome.objects)
    runtime.console.info(target.store.name, f"done: everything is uploaded to {target.store.location}")
    if is_new or not check.holds(target.store, KEY_EXPORTED_NAME):
        remind_of_key(runtime, target)


def remind_of_key(runtime: Runtime, target: Target) -> None:
    """Says that the key was never exported."""
    if target.encryption != "none":
        runtime.console.info(
            target.store.name,
            "its key was never exported; if that is lost, so is the backup:"
            f" backup.py key-export {shlex.quote(target.name)} prints it, keep it with the passphrase",
        )


def create_archive(runtime: Runtime, outcome: Outcome, repository: Repository, source: Source) -> None:
    """Makes a new archive and says what it holds, and what it lacks.

    Raises BackupError, also when the source went away.
    """
    target, settings, cache = outcome.target, runtime.settings, repository.cache
    runtime.console.info(target.store.name, "borg create begins")
    archived, known_until = ArchivedObjects(source.mount.path), known_objects(cache)

    def on_file(status: str, path: str) -> None:
        archived.take(status, path)
        # borg names an object that it has to read when it begins to (`process_file` of borg 1.4).
        source.ahead.passed(source.reader, path, 0 if status in ("A", "M") else math.inf)

    arguments = borg_create(
        target,
        settings.label,
        repository.mount.path,
        source.mount.path,
        settings.source_metadata,
        f"{SOURCE_AS_OF}{source.found.clock:%Y-%m-%dT%H:%M:%SZ}",
    )
    created = repository.borg.run(
        arguments,
        on_file,
        lambda child: source.ahead.began(source.reader, known_until, child),
        source.found.clock - timedelta(seconds=RACE_SECONDS),
    )
    source.ahead.left(source.reader)
    record_archive(runtime, outcome, created)
    if created.log.warnings:  # some objects, or is the source gone, or its keys revoked?
        client = S3Client(settings.source, source.found.region, PROVEN, runtime.stop)
        examine(client, write=False)
    judge_emptiness(runtime, outcome, source.found)
    compare_with_source(runtime, outcome, archived, created, source, repository)
    report_shrunk(runtime, outcome, source.mount)
    note_known_objects(cache, source.found.clock.timestamp() - RACE_SECONDS)


def compare_with_source(
    runtime: Runtime,
    outcome: Outcome,
    archived: ArchivedObjects,
    created: BorgResult,
    source: Source,
    repository: Repository,
) -> None:
    """Names what the new archive lacks of the source; an archive that cannot be compared fails its target."""
    found = Findings()
    client = S3Client(runtime.settings.source, source.found.region, PROVEN, runtime.stop)

    def look() -> None:
        found.ask(client.with_patience(HASTY), archived.unread)
        if runtime.settings.audit:
            found.compare(client, source.mount, archived, source.found.clock)

    try:
        within(LIST_SECONDS, "source: comparing the archive with its listing", look, runtime.stop)
    except (Stopped, Stuck):
        raise
    except (BackupError, OSError) as error:
        note_failure(runtime, outcome, f"the archive could not be compared with the source: {error}")
    else:
        if runtime.settings.audit:
            note_comparison(runtime, repository, json.loads(created.output)["archive"]["id"], found)
    report_findings(runtime, outcome, found)
    gone = sum(reason == GONE for reason in found.asked.values())
    if created.verdict is not Verdict.OK and not 0 < gone == created.log.warnings:
        outcome.warn()
    unread = sum(reason == UNREAD for reason in found.asked.values())
    if created.log.io_errors and (unread or not found.asked):
        what = count(unread or created.log.io_errors, "object")
        note_failure(
            runtime,
            outcome,
            f"{what} of the source could not be read (named above). The archive holds the others."
            " Run it again; if it stays so, look at those objects.",
        )


def note_comparison(runtime: Runtime, repository: Repository, identity: str, found: Findings) -> None:
    """Notes beside the repository what the archive `identity`, the newest of its label, lacks.

    An object may appear later with an older LastModified: a version that was under a delete marker, or a
    replica. S3 does not tell it from one that was there all the time, as the marker's removal leaves no trace
    and replicas keep their time. But an archive that was found to hold all that was listed has not lost it.
    An archive's id depends on all that is in it, so the note is not believed of one that somebody changed.
    """
    if found.count > len(found.named) or not repository.lease:
        return
    name, source = f"{COMPARED_NAME}{runtime.settings.label}", runtime.settings.source
    facts = {"archive": identity, "source": [source.endpoint, source.location]}
    lacks = [key for key, _ in found.named]
    try:
        repository.lease.write(lambda client: write_note(client, name, **facts, lacks=lacks))
    except S3Error as error:  # then `verify` takes such an object for lost
        runtime.console.debug(repository.target.store.name, str(error))


def note_failure(runtime: Runtime, outcome: Outcome, text: str) -> None:
    """Tells what fails a target although its story goes on, without pruning."""
    name, outcome.is_suspicious = outcome.target.store.name, True
    outcome.failures.append(f"{name}: {text}")
    runtime.console.error(name, outcome.failures[-1])


def report_findings(runtime: Runtime, outcome: Outcome, found: Findings) -> None:
    """Prints what an archive lacks."""
    name = outcome.target.store.name
    for key, reason in found.named:
        runtime.console.warning(name, f"{key!r} is not, or not whole, in the archive: {reason}")
    if found.count > len(found.named):
        runtime.console.warning(name, f"{found.count - len(found.named):,} more such objects")
    if found.count:
        outcome.warn(f"the archive lacks {count(found.count, 'object')}")
    if not found.explains_all:
        outcome.is_suspicious = True
        if outcome.target.prune:
            runtime.console.warning(name, "older archives may hold what this one lacks: nothing is pruned")


def compare_with_last(runtime: Runtime, outcome: Outcome, repository: Repository) -> None:
    """Warns of an archive that has far fewer objects than the one before: the source may be wrong.

    Warns once: the next archive is compared with this one.
    """
    settings, name = runtime.settings, outcome.target.store.name
    last = noted_count(repository.cache, settings.label)
    if last is None and settings.shrink_percent:
        last = ask_count(runtime, outcome, repository)
    if has_shrunk(outcome.objects, last or 0, settings.shrink_percent):
        outcome.is_suspicious = True
        reason = (
            f"the archive has {count(outcome.objects, 'object')}, the one before it {last or 0:,}:"
            f" is {settings.source.location} what you want to back up? nothing was pruned (SHRINK_WARNING)"
        )
        outcome.warnings.insert(0, reason)  # it explains more than how many objects are missing
        runtime.console.warning(name, reason, "shrunk", objects=outcome.objects, objects_before=last)


def has_shrunk(objects: int, last: int, percent: int) -> bool:
    """Whether more than `percent` of the objects are gone. None at all is somebody else's business."""
    return percent > 0 and objects > 0 and objects * 100 < last * (100 - percent)


COUNTS_NAME = "s3borgbackup-objects"


def noted_count(cache: Path, label: str) -> int | None:
    """How many objects the last archive of `label` had, as noted beside borg's cache; None: not noted."""
    try:
        found = json.loads((cache / COUNTS_NAME).read_text(encoding="utf-8")).get(label)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def note_count(cache: Path, label: str, objects: int) -> None:
    """Notes how many objects the last archive of `label` has. Several labels may share a repository."""
    path = cache / COUNTS_NAME
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        counts = {}
    with contextlib.suppress(OSError):  # then borg is asked the next time
        replace_file(path, json.dumps({**(counts if isinstance(counts, dict) else {}), label: objects}))


def ask_count(runtime: Runtime, outcome: Outcome, repository: Repository) -> int | None:
    """How many objects the archive before this one has. borg reads both archives' metadata for that."""
    borg, label = repository.borg, runtime.settings.label
    try:
        shown = borg.run(borg_last_two(borg.repository, label, repository.is_ours_alone))
    except (Stopped, Stuck):
        raise
    except BackupError as error:  # the archive that was just made is worth more than this
        runtime.console.warning(outcome.target.store.name, str(error))
        return None
    archives = json.loads(shown.output)["archives"]
    return next((each["stats"]["nfiles"] for each in archives if each["name"] != outcome.archive), None)


# What an archive's comment begins with: before that time the source cannot have been listed.
SOURCE_AS_OF = "s3borgbackup: source as of "


def outlast_name(archive: str) -> None:
    """Waits until the second in an archive's name is over: whoever comes next needs another one."""
    over = datetime.fromisoformat(archive[-len("2025-01-31T03:00:00") :]).timestamp() + 1
    time.sleep(min(1.0, max(0.0, over - time.time())))


def known_objects(cache: Path) -> float:
    """Objects that were modified last before this time (Unix) borg knows, and will not read.

    That is the time of borg's files cache, which `note_known_objects` sets. Without a cache it knows none.
    """
    try:
        return (cache / "files").stat().st_mtime
    except OSError:
        return -math.inf


def note_known_objects(cache: Path, before: float) -> None:
    """Notes that borg knows all objects that were modified last before this time (Unix)."""
    with contextlib.suppress(OSError):
        os.utime(cache / "files", (before, before))


def warn_of_missing_cache(runtime: Runtime, target: Target, cache: Path) -> None:
    """Says what a run without borg's cache costs."""
    if not (cache / "files").exists():
        runtime.console.info(
            target.store.name,
            "borg's cache of this repository is not there: the whole source is read again, and the"
            " repository's index. A volume keeps it: docker run --volume s3borgbackup-cache:/cache",
        )


def record_archive(runtime: Runtime, outcome: Outcome, created: BorgResult) -> None:
    """Takes borg's statistics into `outcome` and prints them."""
    archive = json.loads(created.output)["archive"]
    stats, name = archive["stats"], outcome.target.store.name
    outcome.archive, outcome.objects = archive["name"], stats["nfiles"]
    outcome.archived_bytes, outcome.stored_bytes = stats["original_size"], stats["deduplicated_size"]
    runtime.console.info(
        name,
        f"archive {outcome.archive}: {count(outcome.objects, 'object')}, {size(outcome.archived_bytes)},"
        f" {size(stats['compressed_size'])} compressed, {size(outcome.stored_bytes)} new in the repository",
        "archive_created",
        archive=outcome.archive,
        objects=outcome.objects,
        bytes=outcome.archived_bytes,
        compressed_bytes=stats["compressed_size"],
        new_bytes=outcome.stored_bytes,
    )


def judge_emptiness(runtime: Runtime, outcome: Outcome, source: Preflight) -> None:
    """Warns of an archive without objects. Raises BackupError where the source has some."""
    name = outcome.target.store.name
    if outcome.objects:
        return
    if any(not entry.key.endswith("/") for entry in source.keys):
        raise BackupError(
            f"{name}: the archive {outcome.archive} is empty, and {runtime.settings.source.location} is not",
            "Run it again; nothing was pruned.",
        )
    reason = f"the source {runtime.settings.source.location} lists no objects; nothing was pruned"
    outcome.warn(reason)
    runtime.console.warning(name, reason)


def report_shrunk(runtime: Runtime, outcome: Outcome, source_mount: Mount) -> None:
    """Names the objects that became shorter after they were listed: borg sees an early end, and no error."""
    for key in sorted(source_mount.log.shrunk):
        outcome.warn()
        runtime.console.warning(
            outcome.target.store.name,
            f"{key!r} was overwritten while it was read: it is incomplete in this archive",
        )


def prune(runtime: Runtime, outcome: Outcome, repository: Repository) -> None:
    """Deletes old archives of this label."""
    target = outcome.target
    pruned = repository.borg.run(borg_prune(target, runtime.settings.label, repository.mount.path))
    outcome.add(pruned)
    gone = sum(line.startswith("Pruning archive") for line in pruned.log.infos)
    kept = sum(line.startswith("Keeping archive") for line in pruned.log.infos)
    text = f"pruned {count(gone, 'archive')}, kept {kept:,}"
    runtime.console.info(target.store.name, text, "pruned", pruned=gone, kept=kept)


def compact(runtime: Runtime, outcome: Outcome, repository: Repository) -> None:
    """Frees the space of what was deleted."""
    target = outcome.target
    compacted = repository.borg.run(borg_compact(target, repository.mount.path))
    outcome.add(compacted)
    for line in compacted.log.infos:
        if line.startswith("compaction freed"):
            runtime.console.info(target.store.name, line)


def check_at_last(runtime: Runtime, outcome: Outcome, repository: Repository, done: str) -> None:
    """Checks the repository where that is due. Damage fails the target; what was `done` stands all the same.

    Raises Stopped and Stuck.
    """
    try:
        check_if_due(runtime, repository)
    except (Stopped, Stuck):
        raise
    except BackupError as error:
        outcome.failures.append(f"{done}, but {error}")
        runtime.console.error(repository.target.store.name, str(error))


def overall(outcomes: Sequence[Outcome]) -> int:
    """The run's exit code."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if Verdict.FAILURE in verdicts:
        return EXIT_FAILURE
    if Verdict.BUSY in verdicts:
        return EXIT_BUSY
    return EXIT_WARNINGS if Verdict.WARNING in verdicts else EXIT_OK


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table at a run's end."""
    rows = [("target", "result", "objects", "archived", "new stored", "duration", "archive")]
    rows += [
        (
            outcome.target.name,
            outcome.verdict.value,
            f"{outcome.objects:,}",
            size(outcome.archived_bytes),
            size(outcome.stored_bytes),
            duration(outcome.seconds),
            outcome.archive or "-",
        )
        for outcome in outcomes
    ]
    return "\n".join([*table(rows), *reasons(outcomes)])


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Why it went so, for each target that has a reason."""
    return [f"{outcome.target.name}: {outcome.reason}" for outcome in outcomes if outcome.reason]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def check_config(runtime: Runtime) -> int:
    """Asks every store whether it is usable and prints a table.

    Changes nothing but a probe that it deletes again.
    """
    settings = runtime.settings
    results = [
        suitable(runtime, store, result)
        for store, result in zip(settings.stores, preflight(runtime, settings.targets), strict=True)
    ]
    rows = [("store", "location", "endpoint", "region", "access", "result")]
    for store, result in zip(settings.stores, results, strict=True):
        access = "list, read" if store.target is None else "list, read, write, delete"
        if isinstance(result, BackupError):
            rows.append((store.name, store.location, store.endpoint, store.region or "-", "-", "failed"))
        else:
            rows.append(
                (store.name, store.location, store.endpoint, result.region, access, describe(store, result))
            )
    runtime.console.plain("\n".join(table(rows)))
    failures = [result for result in results if isinstance(result, BackupError)]
    for failure in failures:
        runtime.console.error("check-config", str(failure))
    return EXIT_FAILURE if failures else EXIT_OK


def suitable(runtime: Runtime, store: Store, result: Preflight | BackupError) -> Preflight | BackupError:
    """The same result, or the error that a run would meet in what lies at a target's place."""
    if store.target is not None and isinstance(result, Preflight):
        try:
            what_lies_there(S3Client(store, result.region, stop=runtime.stop), result)
        except Stopped:
            raise
        except BackupError as error:
            return error
    return result


def describe(store: Store, result: Preflight) -> str:
    """What a usable store holds, in a few words."""
    if store.target is not None:
        return f"ok, holds {result.repository_state(store).value}"
    return f"ok, {count(len(result.keys), 'object')}{'' if result.complete else ' or more'}"


# ----------------------------------------------------------------------------------------------- Operations


def emit(text: str) -> None:
    """Prints a command's answer on standard output; that nobody reads it any more is no error.

    Raises BackupError where it cannot be written.
    """
    try:
        for line in text.splitlines():
            print(printable(line), flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:
        raise BackupError(f"the answer could not be written: {error.strerror}", "Make room for it.") from None


def local_time(when: datetime) -> str:
    """A time for people: as archives' names have it, and with its zone."""
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S %z}"


@dataclass(frozen=True)
class Archive:
    """An archive as `borg list` shows it; borg before 1.2 noted neither objects nor bytes."""

    name: str
    start: datetime
    end: datetime
    objects: int | None
    archived_bytes: int | None

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Archive:
        """From an entry of borg's JSON; the times are for people, in their zone."""
        start, end = (borg_time(entry[key]).astimezone() for key in ("time", "end"))
        numbers = [
            number if isinstance(number, int) else None for number in map(entry.get, ("nfiles", "size"))
        ]
        return cls(entry["name"], start, end, *numbers)

    def belongs_to(self, label: str) -> bool:
        """Whether it is one of `label`, and no checkpoint."""
        return fnmatch.fnmatchcase(self.name, archive_pattern(label)) and not self.name.endswith(
            ".checkpoint"
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name,
            "start": self.start.isoformat(),
            "end": self.end.isoformat(),
            "objects": self.objects,
            "bytes": self.archived_bytes,
        }


@dataclass(frozen=True)
class Contents:
    """What borg says about a repository."""

    encryption: str
    archives: tuple[Archive, ...]  # oldest first

    def newest(self, label: str) -> Archive | None:
        """The last archive of a label."""
        return next((archive for archive in reversed(self.archives) if archive.belongs_to(label)), None)


def contents(repository: Repository) -> Contents:
    """Lists a repository's archives: a request for each. Raises BackupError."""
    listed = json.loads(repository.borg.run(borg_archives(repository.borg.repository)).output)
    archives = tuple(Archive.parse(entry) for entry in listed["archives"])
    return Contents(listed["encryption"]["mode"], archives)


def for_each(
    runtime: Runtime, targets: Sequence[Target], ask: Callable[[Target], Result]
) -> dict[Target, Result | BackupError]:
    """What `ask` says about each target; an error is printed, and is that target's answer. Raises Stopped."""
    answers: dict[Target, Result | BackupError] = {}
    for target in targets:
        try:
            answers[target] = ask(target)
        except Stopped:
            raise
        except BackupError as error:
            runtime.console.error(target.store.name, str(error))
            answers[target] = error
    return answers


def worst_code(answers: Iterable[object]) -> int:
    """The exit code where some of these answers are errors."""
    return max((answer.exit_code for answer in answers if isinstance(answer, BackupError)), default=EXIT_OK)


def list_archives(runtime: Runtime, targets: Sequence[Target], as_json: bool) -> int:
    """Prints the archives of some targets; returns the exit code."""

    def ask(target: Target) -> Contents:
        with opened_for_reading(runtime, target) as repository:
            return contents(repository)

    answers = for_each(runtime, targets, ask)
    if as_json:
        document = {
            target.name: {"error": str(answer)}
            if isinstance(answer, BackupError)
            else {"archives": [archive.as_json() for archive in answer.archives]}
            for target, answer in answers.items()
        }
        emit(json.dumps(document, indent=2))
    else:
        found = {target: answer for target, answer in answers.items() if isinstance(answer, Contents)}
        emit("\n".join(table(archive_rows(found))) if found else "")
    return worst_code(answers.values())


def archive_rows(found: Mapping[Target, Contents]) -> list[tuple[str, ...]]:
    """The rows of the table of archives."""
    rows = [("target", "archive", "time", "objects", "size")]
    for target, known in found.items():
        rows += [
            (
                target.name,
                archive.name,
                local_time(archive.start),
                "-" if archive.objects is None else f"{archive.objects:,}",
                "-" if archive.archived_bytes is None else size(archive.archived_bytes),
            )
            for archive in known.archives
        ]
        if not known.archives:
            rows.append((target.name, "-", "-", "-", "-"))
    return rows


@dataclass(frozen=True)
class Facts:
    """What `info` tells about a target."""

    target: Target
    label: str
    identity: str
    encryption: str
    archives: tuple[Archive, ...]
    newest: Archive | None  # of our label
    stored_objects: int
    stored_bytes: int
    key_exported: str  # when; empty: never
    checked: Checked
    lease: str  # who works on the repository; empty: nobody

    @property
    def archived_bytes(self) -> int:
        """What the archives would take one by one, without deduplication and compression."""
        return sum(archive.archived_bytes or 0 for archive in self.archives)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        record, since = self.checked.record, self.checked.unchecked_since
        return {
            "target": self.target.name,
            "endpoint": self.target.store.endpoint,
            "location": self.target.store.location,
            "repository_id": self.identity,
            "encryption": self.encryption,
            "key_exported": self.key_exported or None,
            "archives": len(self.archives),
            "archived_bytes": self.archived_bytes,
            "stored_objects": self.stored_objects,
            "stored_bytes": self.stored_bytes,
            "last_archive": self.newest.as_json() if self.newest else None,
            "last_check": record.checked.isoformat() if record.checked else None,
            "unchecked_since": since.isoformat() if since else None,
            "damage": record.damage or None,
            "in_use": self.lease or None,
        }

    def as_text(self) -> str:
        """For people."""
        rows = [
            ("target", self.target.name),
            ("location", f"{self.target.store.location} at {self.target.store.endpoint}"),
            ("repository", self.identity),
            (
                "encryption",
                f"{self.encryption}: {KEY_PLACES.get(self.encryption, 'the key is in the repository')}",
            ),
            ("key exported", self.key_exported or self._never_exported()),
            ("archives", f"{len(self.archives):,}, {size(self.archived_bytes)} in all"),
            (
                "in the bucket",
                f"{size(self.stored_bytes)}, {count(self.stored_objects, 'object')}{self._saved()}",
            ),
            (f"last {self.label}", self._last_run()),
            ("last check", self._last_check()),
            ("in use", self.lease or "no"),
        ]
        return "\n".join(table(rows))

    def _never_exported(self) -> str:
        if self.encryption == "none":
            return "there is none"
        return f"never: backup.py key-export {shlex.quote(self.target.name)}"

    def _last_check(self) -> str:
        record = self.checked.record
        if record.damage:
            return f"DAMAGED: {record.damage}"
        when = f"{record.checked:%Y-%m-%d %H:%M:%S %z}" if record.checked else "never, as far as is known"
        return f"{when}; {self.checked.age}"

    def _saved(self) -> str:
        if self.archived_bytes <= self.stored_bytes:
            return ""
        share = 1 - self.stored_bytes / self.archived_bytes
        return f": deduplication and compression save {share:.1%}"

    def _last_run(self) -> str:
        if not self.newest:
            return "no archive has this label"
        seconds = (self.newest.end - self.newest.start).total_seconds()
        what = f"{count(self.newest.objects or 0, 'object')}, {size(self.newest.archived_bytes or 0)}"
        return f"{local_time(self.newest.start)}: {what}, in {duration(seconds)}"


KEY_PLACES = {
    "none": "whoever can read the bucket can read the backup",
    "keyfile": "the key is in /config only",
    "keyfile-blake2": "the key is in /config only",
    "authenticated": "not encrypted; the key, which authenticates, is in the repository",
    "authenticated-blake2": "not encrypted; the key, which authenticates, is in the repository",
}


def gather_facts(runtime: Runtime, target: Target) -> Facts:
    """Asks borg and S3 about a target. Raises BackupError."""
    with opened_for_reading(runtime, target) as repository:
        known, client = contents(repository), repository.client
        lease, record = look_at_lease(client), last_check(client, repository.identity)
        return Facts(
            target,
            runtime.settings.label,
            repository.identity,
            known.encryption,
            known.archives,
            known.newest(runtime.settings.label),
            len(repository.files),
            sum(repository.files.values()),
            str((read_note(client, KEY_EXPORTED_NAME) or {}).get("exported", "")),
            Checked(record, segments_of(runtime, repository), client.clock or datetime.now(UTC)),
            str(lease.holder) if lease and not lease.has_expired else "",
        )


def show_info(runtime: Runtime, targets: Sequence[Target], as_json: bool) -> int:
    """Prints what is known about some targets; returns the exit code."""
    answers = for_each(runtime, targets, lambda target: gather_facts(runtime, target))
    if as_json:
        document = {
            target.name: {"error": str(answer)} if isinstance(answer, BackupError) else answer.as_json()
            for target, answer in answers.items()
        }
        emit(json.dumps(document, indent=2))
    else:
        found = [answer.as_text() for answer in answers.values() if isinstance(answer, Facts)]
        emit("\n\n".join(found))
    return worst_code(answers.values())


def export_key(runtime: Runtime, target: Target, form: Sequence[str]) -> int:
    """Prints a repository's key, and notes beside the repository that this was done. Raises BackupError."""
    with opened_for_reading(runtime, target) as repository:
        exported = repository.borg.run(borg_key_export(repository.borg.repository, form))
        try:
            print(exported.output, flush=True)
        except OSError as error:
            raise BackupError(
                f"{target.store.name}: the key could not be written: {error.strerror}", "Export it again."
            ) from None
        try:
            write_note(repository.client, KEY_EXPORTED_NAME, exported=utc_now(repository.client))
        except S3Error as error:
            runtime.console.warning(
                target.store.name,
                f"that the key was exported cannot be noted, and runs go on to remind of it: {error}",
            )
    runtime.console.info(
        target.store.name,
        "keep this key where the passphrase is, and not with the backups: a restore takes both",
    )
    return EXIT_OK


def maintain(runtime: Runtime, targets: Sequence[Target]) -> int:
    """Prunes, compacts and checks repositories without their source; returns the exit code.

    Raises Stopped.
    """
    outcomes = [Outcome(target) for target in targets]
    try:
        for outcome in outcomes:
            work = functools.partial(maintain_target, outcome=outcome)
            if bring_to_end(runtime, outcome, work):
                bring_to_end(runtime, outcome, work)
    finally:
        conclude(runtime, outcomes, maintenance_summary)
    return overall(outcomes)


def maintenance_summary(outcomes: Sequence[Outcome]) -> str:
    """The table at a maintenance's end."""
    rows = [("target", "result", "archives", "duration")]
    rows += [
        (
            outcome.target.name,
            outcome.verdict.value,
            "{archives_after:,} of {archives_before:,}".format(**outcome.archives)
            if outcome.archives
            else "-",
            duration(outcome.seconds),
        )
        for outcome in outcomes
    ]
    return "\n".join([*table(rows), *reasons(outcomes)])


def maintain_target(runtime: Runtime, outcome: Outcome) -> None:
    """Prunes, compacts and checks one repository. Raises BackupError."""
    target, label = outcome.target, runtime.settings.label
    with opened_for_writing(runtime, target, "maintenance") as repository:
        check_encryption(runtime, repository)
        known = contents(repository)
        if reason := why_not_prune(target, label, known):
            outcome.warn(reason)
            runtime.console.warning(target.store.name, reason)
        elif target.prune:
            prune(runtime, outcome, repository)
        if target.compact_percent is not None:
            compact(runtime, outcome, repository)
        check_at_last(runtime, outcome, repository, "it is pruned and compacted as asked")
        left = contents(repository)
        outcome.archives = {"archives_before": len(known.archives), "archives_after": len(left.archives)}
    runtime.console.info(target.store.name, f"done: everything is uploaded to {target.store.location}")


def why_not_prune(target: Target, label: str, known: Contents) -> str:
    """Why pruning now would be a mistake; empty where it would not."""
    newest = known.newest(label)
    if target.prune and not newest:
        return f"nothing is pruned: no archive is called {label}-...; is BACKUP_LABEL that of the backups?"
    if target.prune and newest and newest.objects == 0:
        return f"nothing is pruned: the newest archive, {newest.name}, is empty; look at the source first"
    return ""


# borg's commands. Those in the first row change nothing, so that keys that may only read are enough for them.
READING_COMMANDS = ("list", "diff", "extract", "export-tar")
CHANGING_COMMANDS = (
    *("benchmark", "break-lock", "check", "compact", "config", "create", "debug", "delete", "help"),
    *("import-tar", "info", "init", "key", "prune", "recreate", "rename", "upgrade", "version", "with-lock"),
)
REFUSED_COMMANDS = {
    "mount": "borg would go on in the background; in a shell: backup.py mount target-{name}, then borg mount",
    "umount": "there is nothing to unmount; `backup.py mount` and `backup.py umount` go together",
    "serve": "it serves repositories to other machines; this one is in S3",
}
BORG_COMMANDS = (*READING_COMMANDS, *CHANGING_COMMANDS, *REFUSED_COMMANDS)


def run_borg(runtime: Runtime, target: Target, arguments: Sequence[str]) -> int:
    """Runs any borg command on a target's repository; returns borg's exit code. Raises BackupError."""
    command = arguments[0]
    if command in REFUSED_COMMANDS:
        raise ConfigurationError([f"`borg {command}`: {REFUSED_COMMANDS[command].format(name=target.name)}"])
    purpose = f"`borg {command}`"
    if command in READING_COMMANDS:
        with opened_for_reading(runtime, target, purpose) as repository:
            return repository.borg.hand_over(arguments)
    with opened_for_writing(runtime, target, purpose) as repository:
        return repository.borg.hand_over(arguments)


def run_check(runtime: Runtime, target: Target, plan: CheckPlan, verify_data: bool) -> int:
    """Checks a target's repository. Raises BackupError, also when it is damaged."""
    with opened_for_writing(runtime, target, "`check`") as repository:
        checked = check_repository(runtime, repository, plan, verify_data)
    if error := damage_error(repository, checked.record):
        raise error
    return EXIT_OK


# --------------------------------------------------------------------------------------------- Verification

# Is an archive good? What the source lists is kept as 16 bytes for each object; the archive's list streams
# past it, and a sample is chosen on the way, into a file. The sample leaves borg as a tar stream, for which
# borg verifies what it reads, and is compared, block by block, with the objects that have not changed since.
# So memory grows neither with the sample nor with an object's size.

DEFAULT_SAMPLE = "300"  # where 1 % of the objects are bad, one of them is among 300 with a chance of 95 %
SAMPLE_HELP = "write a number of objects, a share such as 1%, or all"
PATHS_AT_ONCE = 100_000  # of a sample, for one borg, which keeps them in memory
AWKWARD_AT_ONCE = 100  # of them on its command line
COMPARED_BYTES = 1024 * 1024  # at a time
CLOCK_ERROR_SECONDS = 900  # S3 refuses clients whose clocks are further off


@dataclass(frozen=True)
class Sample:
    """How many objects of an archive are proved: a number of them, or a share of all."""

    number: int = 0
    share: float = 0.0  # 0: it is the number that counts

    @classmethod
    def parse(cls, text: str) -> Sample | None:
        """A sample from `300`, `1%` or `all`; None where it is nothing like that."""
        if text == "all":
            return cls(share=1.0)
        found = re.fullmatch(r"([0-9]{1,9})|([0-9]{1,3}(?:\.[0-9]{1,6})?)%", text)
        if not found:
            return None
        number, share = int(found[1] or 0), float(found[2] or 0) / 100
        return cls(number, share) if number or 0 < share <= 1 else None


@dataclass(frozen=True)
class Chosen:
    """An object of a sample."""

    path: str  # in the archive
    size_bytes: int
    unchanged: bool  # the source lists it with the same size and time


class Chooser:
    """Chooses a sample of the objects that pass by, each with the same chance, and writes it to a file.

    The same seed chooses the same objects of an archive. Where a share is asked for, at least one is chosen.
    """

    def __init__(self, sample: Sample, seed: int, spool: Path) -> None:
        """Nothing has passed yet."""
        self.number = 0  # of those chosen; counted when all have passed
        self._sample, self._random, self._seen = sample, random.Random(seed), 0
        self._spool = spool.open("w", encoding="utf-8")
        self._kept: list[tuple[float, int, Chosen]] = []  # a heap, by how high the number is that was drawn

    def take(self, chosen: Chosen) -> None:
        """Decides on one object."""
        drawn = self._random.random()
        self._seen += 1
        if drawn < self._sample.share:
            self._write(chosen)
            return
        room = self._sample.number or (0 if self.number else 1)
        heapq.heappush(self._kept, (-drawn, self._seen, chosen))
        if len(self._kept) > room:
            heapq.heappop(self._kept)

    def finish(self) -> None:
        """Writes what is still to be written, in the archive's order."""
        kept = [] if self.number else sorted(self._kept, key=lambda entry: entry[1])
        with self._spool:
            for _, _, chosen in kept:
                self._write(chosen)

    def _write(self, chosen: Chosen) -> None:
        self.number += 1
        print(json.dumps(dataclasses.astuple(chosen)), file=self._spool)


def read_sample(spool: Path) -> Iterator[Chosen]:
    """The objects of a sample, in the archive's order."""
    with spool.open(encoding="utf-8") as lines:
        for line in lines:
            yield Chosen(*json.loads(line))


@dataclass(frozen=True)
class Batch:
    """What one borg exports of a sample."""

    patterns: Sequence[str]  # its options
    objects: Iterable[Chosen]
    number: int


def batches(sample: Sample, chooser: Chooser, spool: Path) -> Iterator[Batch]:
    """A sample in parts that one borg can take; the whole archive in one, as that needs no patterns."""
    if sample.share == 1.0:
        yield Batch((), read_sample(spool), chooser.number)
        return
    part, awkward = [], 0
    for chosen in read_sample(spool):
        part.append(chosen)
        awkward += is_awkward(chosen.path)
        if len(part) >= PATHS_AT_ONCE or awkward >= AWKWARD_AT_ONCE:
            yield Batch(write_patterns(part, spool), part, len(part))
            part, awkward = [], 0
    if part:
        yield Batch(write_patterns(part, spool), part, len(part))


def is_awkward(path: str) -> bool:
    """Whether borg would read something else from a line of a file: it strips lines, and ends them at CR."""
    return path != path.strip() or bool(re.search(r"[\r\n]", path))


def write_patterns(part: Sequence[Chosen], spool: Path) -> list[str]:
    """borg's options for exactly these paths, most of them in a file; none is taken for a pattern."""
    file = spool.with_suffix(".patterns")
    lines = [f"+ pf:{chosen.path}" for chosen in part]
    file.write_text("".join(f"{line}\n" for line in lines if not is_awkward(line)), encoding="utf-8")
    own = [word for line in lines if is_awkward(line) for word in ("--pattern", line)]
    return ["--patterns-from", str(file), *own, "--pattern", "- re:.*"]


class Listed:
    """What the source lists: of each object its size and time, and whether the archive holds it.

    16 bytes and a bit for each, however long its key is; see `Digests` for the chance of a mistake.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.number = 0
        self._keys = [array.array("Q") for _ in range(256)]
        self._prints = [array.array("Q") for _ in range(256)]
        self._held = [bytearray() for _ in range(256)]

    def add(self, key: str, size_bytes: int, modified: float) -> None:
        """Takes an object in."""
        number = digest_of(key)
        self.number += 1
        self._keys[number >> 56].append(number)
        self._prints[number >> 56].append(fingerprint(size_bytes, modified))

    def finish(self) -> None:
        """All are in."""
        for index, (keys, prints) in enumerate(zip(self._keys, self._prints, strict=True)):
            pairs = sorted(zip(keys, prints, strict=True))
            self._keys[index] = array.array("Q", (key for key, _ in pairs))
            self._prints[index] = array.array("Q", (value for _, value in pairs))
            self._held[index] = bytearray(len(pairs))

    def is_unchanged(self, key: str, size_bytes: int, modified: float) -> bool:
        """Whether it is listed with this size and time, by the second."""
        number = digest_of(key)
        index = self._find(number)
        return index is not None and self._prints[number >> 56][index] == fingerprint(size_bytes, modified)

    def hold(self, key: str) -> bool:
        """Notes that the archive holds an object; False where that is not listed."""
        number = digest_of(key)
        index = self._find(number)
        if index is not None:
            self._held[number >> 56][index] = 1
        return index is not None

    @property
    def is_held(self) -> bool:
        """Whether the archive holds everything that is listed."""
        return not any(0 in held for held in self._held)

    def lacks(self, key: str) -> bool:
        """Whether it is listed, and the archive does not hold it."""
        number = digest_of(key)
        index = self._find(number)
        return index is not None and not self._held[number >> 56][index]

    def _find(self, number: int) -> int | None:
        keys = self._keys[number >> 56]
        index = bisect.bisect_left(keys, number)
        return index if index < len(keys) and keys[index] == number else None


def fingerprint(size_bytes: int, modified: float) -> int:
    """64 bits that stand for an object's size and its time in whole seconds: HTTP and tar know no others."""
    return digest_of(f"{size_bytes} {math.floor(modified)}")


@dataclass
class Verification:
    """What is found about an archive."""

    target: str
    seed: int
    archive: str = ""
    as_of: datetime | None = None  # what the source had before is expected in the archive
    archived: int = 0
    listed: int = 0
    new: int = 0  # in the source since
    lacked: frozenset[str] | None = None  # keys that it lacked when it was made; None: that is not known
    missing: Findings = field(default_factory=Findings)
    appeared: Findings = field(default_factory=Findings)  # since, with an older time
    unarchivable: Findings = field(default_factory=Findings)  # no archive can hold them
    deleted: Findings = field(default_factory=Findings)  # since
    changed: Findings = field(default_factory=Findings)  # since
    sampled: int = 0
    sampled_bytes: int = 0
    equal: int = 0  # of the sample: as in the source, byte for byte
    extracted: int = 0  # of the sample: borg's hashes hold, and the source has another version or none
    differing: Findings = field(default_factory=Findings)
    unreadable: Findings = field(default_factory=Findings)  # in the source
    error: str = ""  # why it could not be verified to the end

    @property
    def verdict(self) -> Verdict:
        """Whether the archive is good. What changed in the source since says nothing about that."""
        if self.error or self.missing.count or self.differing.count:
            return Verdict.FAILURE
        return Verdict.WARNING if self.unarchivable.count or self.unreadable.count else Verdict.OK

    def as_json(self) -> str:
        """For programs."""
        fields = {name: value_for_json(getattr(self, name)) for name in VERIFICATION_FIELDS}
        sample = {name: value_for_json(getattr(self, name)) for name in SAMPLE_FIELDS}
        return json.dumps({**fields, "sample": sample, "result": self.verdict.value, "error": self.error})

    def as_text(self) -> str:
        """For people."""
        as_of = f"{self.as_of:%Y-%m-%dT%H:%M:%SZ}" if self.as_of else "an unknown time"
        rows = [
            ("archive", f"{self.archive or '-'} of {self.target}: the source as of {as_of}"),
            ("compared", f"{count(self.archived, 'object')} archived, {self.listed:,} in the source now"),
            ("missing", f"{self.missing.count:,} that the source had before"),
            ("unarchivable", f"{self.unarchivable.count:,} that no archive can hold"),
            (
                "since then",
                f"{self.new:,} new, {self.changed.count:,} changed, {self.deleted.count:,} deleted",
            ),
            ("", f"{self.appeared.count:,} appeared with an older time"),
            ("sample", f"{count(self.sampled, 'object')}, {size(self.sampled_bytes)}, --seed {self.seed}"),
            ("", f"{self.equal:,} equal the source byte for byte"),
            ("", f"{self.extracted:,} extracted, as the source has changed: borg's hashes hold"),
            (
                "",
                f"{self.differing.count:,} differ, {self.unreadable.count:,} could not be read in the source",
            ),
            ("result", self.verdict.value),
        ]
        named = [
            f"{name}: {printable(repr(key))}{f': {reason}' if reason else ''}"
            for name in NAMED_FINDINGS
            for key, reason in getattr(self, name).named
        ]
        return "\n".join([*named, *table(rows), *([f"error: {self.error}"] if self.error else [])])


VERIFICATION_FIELDS = (
    *("target", "archive", "as_of", "archived", "listed", "new"),
    *("missing", "appeared", "unarchivable", "changed", "deleted"),
)
NAMED_FINDINGS = (
    *("missing", "differing", "unreadable", "unarchivable"),
    *("appeared", "changed", "deleted"),
)
SAMPLE_FIELDS = ("seed", "sampled", "sampled_bytes", "equal", "extracted", "differing", "unreadable")


def value_for_json(value: object) -> object:
    """Findings and times as JSON has them; all else as it is."""
    if isinstance(value, Findings):
        named = [{"key": key, **({"reason": reason} if reason else {})} for key, reason in value.named]
        return {"count": value.count, "objects": named}
    return f"{value:%Y-%m-%dT%H:%M:%SZ}" if isinstance(value, datetime) else value


def run_verify(
    runtime: Runtime, target: Target, archive: str | None, sample: Sample, seed: int, as_json: bool
) -> int:
    """Verifies an archive, prints what is found, and returns the exit code. Raises Stopped."""
    found = Verification(target.name, seed)
    try:
        verify(runtime, target, archive, sample, found)
    except (Stopped, ConfigurationError):
        raise
    except BackupError as error:
        found.error = str(error)
        runtime.console.error(target.store.name, found.error)
    emit(found.as_json() if as_json else found.as_text())
    codes = {Verdict.OK: EXIT_OK, Verdict.WARNING: EXIT_WARNINGS}
    return codes.get(found.verdict, EXIT_FAILURE)


def verify(
    runtime: Runtime, target: Target, archive: str | None, sample: Sample, found: Verification
) -> None:
    """Compares an archive with what the source lists now, and proves a sample of it. Raises BackupError."""
    source = runtime.settings.source
    client = S3Client(source, preflight_one(runtime, source, write=False).region, PROVEN, runtime.stop)
    with opened_for_reading(runtime, target, "`verify`") as repository:
        find_archive(runtime, repository, archive, found)
        runtime.console.info(target.store.name, f"{found.archive} is compared with {source.location}")
        listed = list_source(runtime, client)
        found.listed = listed.number
        with mounted_apart(runtime, client.region) as mount, spool_folder() as folder:
            chooser = Chooser(sample, found.seed, folder / "sample")
            compare_lists(repository, path_prefix(runtime.settings), listed, chooser, found)
            find_missing(runtime, client, mount, listed, found)
            runtime.console.info(target.store.name, f"{count(chooser.number, 'object')} are proved")
            prover = Prover(runtime, client, mount, listed, found)
            for batch in batches(sample, chooser, folder / "sample"):
                prover.prove(repository, batch)


@contextlib.contextmanager
def spool_folder() -> Iterator[Path]:
    """A folder for the sample."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
        yield Path(folder)


@contextlib.contextmanager
def mounted_apart(runtime: Runtime, region: str) -> Iterator[Mount]:
    """The source, mounted read-only where no run and no person mounts it, and without its user metadata."""
    with folder_for_mounts() as folder:
        settings = dataclasses.replace(runtime.settings, data_dir=folder, source_metadata=False)
        private = dataclasses.replace(runtime, settings=settings)
        with mounted(private, settings.source, region, read_only=True) as mount:
            wait_until_usable(private, mount)
            yield mount


def path_prefix(settings: Settings) -> str:
    """What the paths of a source's objects begin with in an archive: `data/source/`."""
    return f"{resolved(settings.mount_point(settings.source))}/".lstrip("/")


def find_archive(runtime: Runtime, repository: Repository, name: str | None, found: Verification) -> None:
    """Finds the archive, by default the newest of BACKUP_LABEL, and as of when it has the source.

    Where it does not say so itself, that is its start by a clock of which little is known.
    """
    label, store = runtime.settings.label, repository.target.store
    pattern = re.sub(r"[*?[]", r"[\g<0>]", name) if name else archive_pattern(label)
    borg = repository.borg
    archives = json.loads(borg.run(borg_find_archive(borg.repository, pattern)).output)["archives"]
    if not archives:
        what = f"no archive {name!r}" if name else f"no archive of BACKUP_LABEL {label!r}"
        raise BackupError(
            f"{store.name}: {store.location} holds {what}",
            f"`backup.py borg {repository.target.name} list` shows what it holds.",
        )
    [archive] = archives
    found.archive = archive["name"]
    found.as_of = source_as_of(archive["comment"], archive["start"])
    noted = read_note(repository.client, f"{COMPARED_NAME}{found.archive[: -len('-2025-01-31T03:00:00')]}")
    source = runtime.settings.source
    facts = {"archive": archive["id"], "source": [source.endpoint, source.location]}
    if noted and facts.items() <= noted.items():
        found.lacked = frozenset(noted["lacks"])


def source_as_of(comment: str, start: str) -> datetime:
    """When the source was listed for an archive, at the earliest; `start` is as borg prints it."""
    with contextlib.suppress(ValueError):
        if comment.startswith(SOURCE_AS_OF):
            return datetime.fromisoformat(comment.removeprefix(SOURCE_AS_OF)).astimezone(UTC)
    return borg_time(start) - timedelta(seconds=CLOCK_ERROR_SECONDS)


def list_source(runtime: Runtime, client: S3Client) -> Listed:
    """What the source lists now, but for empty objects that stand for folders. Raises S3Error, Stopped."""
    prefix = client.store.key_prefix

    def collect() -> Listed:
        listed = Listed()
        for entry in client.list_objects(prefix):
            key = entry.key[len(prefix) :]
            if key and not is_folder_marker(entry):
                listed.add(key, entry.size_bytes, entry.last_modified.timestamp())
        listed.finish()
        return listed

    return within(LIST_SECONDS, "source: listing it", collect, runtime.stop)


def is_folder_marker(entry: S3Object) -> bool:
    """Whether an object only stands for a folder: no archive has it."""
    return entry.key.endswith("/") and not entry.size_bytes


def compare_lists(
    repository: Repository, prefix: str, listed: Listed, chooser: Chooser, found: Verification
) -> None:
    """Has the archive's list pass by what the source lists, and by the chooser. Raises BackupError."""
    outside = 0

    def consume(lines: IO[bytes]) -> None:
        nonlocal outside
        for line in lines:
            entry = json.loads(line)
            key = entry["path"].removeprefix(prefix)
            if entry["type"] != "-":
                continue
            if key == entry["path"]:
                outside += 1
                continue
            found.archived += 1
            modified = borg_time(entry["mtime"]).timestamp()
            unchanged = listed.is_unchanged(key, entry["size"], modified)
            if not listed.hold(key):
                found.deleted.add(key, "")
            elif not unchanged:
                found.changed.add(key, "")
            chooser.take(Chosen(entry["path"], entry["size"], unchanged))

    borg = repository.borg
    borg.run(borg_items(borg.repository, found.archive), consume=consume)
    chooser.finish()
    if outside and not found.archived:
        raise BackupError(
            f"{repository.target.store.name}: {found.archive} holds nothing below {prefix}",
            "Set DATA_DIR to what it was when the archive was made.",
        )


LOST_OR_LATE = (
    "the backup missed it, or it came later with an older time (a delete marker was removed, or it is a"
    " replica); the next backup will have it"
)


def find_missing(
    runtime: Runtime, client: S3Client, mount: Mount, listed: Listed, found: Verification
) -> None:
    """Names what the source had before, and the archive does not hold; lists the source again for it."""
    if listed.is_held:
        return
    prefix, before = client.store.key_prefix, found.as_of or datetime.now(UTC)

    def look() -> None:
        for entry in client.list_objects(prefix):
            key = entry.key[len(prefix) :]
            if not key or is_folder_marker(entry) or not listed.lacks(key):
                continue
            if entry.last_modified >= before - timedelta(seconds=RACE_SECONDS):
                found.new += 1
                continue
            hidden = key.endswith("/") or os.path.isdir(mount.path / key)
            reason = why_missing(key, failed=False, hidden=hidden)
            if reason != NOT_SHOWN:
                found.unarchivable.add(key, reason)
            elif found.lacked is None:
                found.missing.add(key, f"of {entry.last_modified:%Y-%m-%dT%H:%M:%SZ}: {LOST_OR_LATE}")
            elif key in found.lacked:
                found.missing.add(key, reason)
            else:
                found.appeared.add(key, "the source did not list it when the archive was made")

    within(LIST_SECONDS, "source: listing it", look, runtime.stop)


class Prover:
    """Compares what borg extracts with the source."""

    def __init__(
        self, runtime: Runtime, client: S3Client, mount: Mount, listed: Listed, found: Verification
    ) -> None:
        """Nothing is compared yet; `mount` is the source's, and `client` asks S3 about it directly."""
        settings = dataclasses.replace(runtime.settings, source_metadata=False)
        self._runtime = dataclasses.replace(runtime, settings=settings)
        self._prefix = path_prefix(settings)
        self._client, self._mount, self._listed, self._found = client, mount, listed, found
        self._current = ""  # the object that is being read
        self._passed: Callable[[str, float], None] = lambda path, offset: None  # tells how far we have read

    def prove(self, repository: Repository, batch: Batch) -> None:
        """Has borg export a part of the sample, while threads read the same of the source ahead.

        Raises BackupError where borg finds damage, or leaves out an object.
        """
        reader, before = Reader(), self._found.sampled
        original = (
            (self._original(self._key(chosen.path)), chosen.size_bytes, 0.0)
            for chosen in batch.objects
            if chosen.unchanged
        )
        ahead = ReadAhead(self._runtime, self._mount, [reader], original)
        self._passed = lambda path, offset: ahead.passed(reader, path, offset)
        borg = repository.borg.with_mounts(self._mount)
        arguments = borg_export_sample(borg.repository, self._found.archive, batch.patterns)
        try:
            borg.run(
                arguments, None, lambda child: ahead.began(reader, -math.inf, child), consume=self._consume
            )
        except BackupError as error:
            if self._current and not isinstance(error, Stopped):
                error.message += f" (while {self._current!r} was read)"
            raise
        finally:
            ahead.close()
        if self._found.sampled - before != batch.number:
            raise BackupError(
                f"{repository.target.store.name}: borg exported {self._found.sampled - before:,} of"
                f" {count(batch.number, 'object')}",
                DAMAGE_HELP.format(name=repository.target.name),
            )

    def _key(self, path: str) -> str:
        return path.removeprefix(self._prefix)

    def _original(self, key: str) -> str:
        return f"{self._mount.path}/{key}"

    def _consume(self, stream: IO[bytes]) -> None:
        """Takes borg's tar stream. Where that ends too early, borg tells why."""
        encoding = {"encoding": "utf-8", "errors": "surrogateescape"}
        try:
            with tarfile.open(fileobj=stream, mode="r|", **encoding) as tar:
                while member := tar.next():
                    tar.members.clear()  # or it would keep them all
                    if member.isreg() and member.name.startswith(self._prefix):
                        self._current = self._key(member.name)
                        self._take(self._current, member, tar.extractfile(member))
                        self._passed(self._original(self._current), math.inf)
                        self._current = ""
            drain(stream)
        except tarfile.ReadError:
            pass

    def _take(self, key: str, member: tarfile.TarInfo, archived: IO[bytes]) -> None:
        """Proves one object."""
        found, trouble, unreadable = self._found, "", False
        unchanged = self._listed.is_unchanged(key, member.size, member.mtime)
        path = self._original(key)
        if unchanged:
            try:
                with open(path, "rb") as original:
                    trouble = first_difference(archived, original, lambda at: self._passed(path, at))
            except OSError as error:
                trouble, unreadable = error.strerror or str(error), True
        drain(archived)  # so that all of it is verified
        found.sampled += 1
        found.sampled_bytes += member.size
        if not unchanged or (trouble and self._changed_meanwhile(key, member)):
            found.extracted += 1
        elif trouble:
            (found.unreadable if unreadable else found.differing).add(key, trouble)
        else:
            found.equal += 1

    def _changed_meanwhile(self, key: str, member: tarfile.TarInfo) -> bool:
        """Whether the source has another version now than what was listed, or none. Raises S3Error."""
        try:
            answer = self._client.request("HEAD", f"{self._client.store.key_prefix}{key}")
        except S3Error as error:
            if error.status == 404:
                return True
            raise
        modified = answer.time("Last-Modified")
        now = int(answer.headers.get("content-length", -1)), modified and math.floor(modified.timestamp())
        return now != (member.size, math.floor(member.mtime))


def first_difference(
    archived: IO[bytes], original: IO[bytes], passed: Callable[[int], None] = lambda offset: None
) -> str:
    """Where two contents differ first, in a few words; nothing where they are equal. Raises OSError.

    `passed` is told how far they are compared.
    """
    offset = 0
    while True:
        ours, theirs = archived.read(COMPARED_BYTES), original.read(COMPARED_BYTES)
        if ours != theirs:
            unlike = (place for place, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1)
            offset += next(unlike, min(len(ours), len(theirs)))
            return f"its content differs from byte {offset:,} on, although size and time are the same"
        if not ours:
            return ""
        offset += len(ours)
        passed(offset)


# -------------------------------------------------------------------------------------------------- Restore

# `borg extract` writes one file after the other, knows nothing of what is there already, and says nothing of
# what S3 got. So borg writes the archive to a pipe, as a tar file, and threads write what comes out of it,
# into a folder, or into a bucket by requests of our own. All that is known of an object is a row in a file,
# the plan: what the archive's list and manifest say of it, what lies where it goes, and what is to be done.
# So nothing is overwritten unasked, and a restore that was interrupted goes on where it was: what is a
# beginning of what is to be written counts as half-written.

PREVIOUS_NAMED = 20  # objects that would be overwritten
# What one object's name is to blame for, and not the place.
UNWRITABLE = frozenset(
    {
        *(errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.ELOOP, errno.EFBIG),
    }
)
UNTAKEN_STATUSES = (400, 404, 405, 409, 414)  # the same of S3, unless it is a code that S3_HINTS knows
NO_METADATA = frozenset({errno.ENOTSUP, errno.EPERM, errno.E2BIG, errno.ENOSPC, errno.ERANGE})

MIB = 1024 * 1024
PART_BYTES = 16 * MIB  # what is larger is uploaded in parts
MAX_PARTS, MAX_KEY_BYTES, MAX_OBJECT_BYTES = 10_000, 1024, 5 * 1024**4  # S3's limits
# The parts that others upload in, in MiB: ours, TigrisFS's, and what the SDKs and programs have by default.
COMMON_PARTS = (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512)

# With examples, as which a probe has them.
RESTORED_HEADERS = dict(
    pair.split(": ")
    for pair in (
        *("content-type: text/css", "cache-control: no-store", "content-disposition: inline"),
        *("content-encoding: gzip", "content-language: la", "expires: Thu, 01 Jan 1970 00:00:00 GMT"),
        "x-amz-website-redirect-location: /",
    )
)
METADATA, TAGGING = "x-amz-meta-", "x-amz-tagging"

# A restore that has begun to upload in parts says so, again and again: who finds that nobody does any more
# ends these uploads. Nobody else's are touched.
RESTORING_NAME = f"{OWN_PREFIX}restoring-"
NOTE_SECONDS, NOTE_LIFETIME_SECONDS = 5, 20


@dataclass(frozen=True)
class Order:
    """What a person wants to have restored."""

    paths: tuple[str, ...]  # keys and folders; none: everything
    archive: str  # empty: the newest one
    until: datetime | None  # not younger than that
    folder: Path | None
    bucket: Destination | None  # one of the two is given
    metadata: Path | None  # where to write what is known of the objects
    overwrite: bool
    dry_run: bool


def end_of_time(text: str) -> datetime:
    """The end of the day, minute or second that `text` names, in local time. Raises ValueError."""
    start = datetime.fromisoformat(text.replace(" ", "T").replace("Z", "+00:00"))
    if re.fullmatch(r"[0-9-]+", text):
        return (start + timedelta(days=1)).astimezone()  # days may have 23 or 25 hours
    is_minute = re.fullmatch(r".{10}.[0-9]{2}:?[0-9]{2}(Z|[+-][0-9:]+)?", text)
    return start.astimezone() + timedelta(seconds=60 if is_minute else 1)


def choose_archive(
    archives: Mapping[str, datetime], label: str, name: str, until: datetime | None
) -> tuple[str, str]:
    """The archive that is meant, and why it is that one; `archives` begin with the oldest.

    Raises BackupError where there is none.
    """
    if name:
        if name in archives:
            return name, "as named"
        hint = difflib.get_close_matches(name, archives, n=1, cutoff=0.5) or list(archives)[-1:]
        raise BackupError(f"there is no archive {name!r}", f"Did you mean {hint[0]}?" if hint else "")
    own = [found for found in archives if fnmatch.fnmatchcase(found, archive_pattern(label))]
    known, of_what = (own, f"of label {label!r}") if own else (list(archives), "of any label")
    if until:
        known = [found for found in known if archives[found] < until]
        of_what += f" until {local_time(until - timedelta(seconds=1))}"
    if not known:
        oldest = min(archives.values(), default=None)
        hint = f"The oldest archive is of {local_time(oldest)}." if oldest else "Run a backup first."
        raise BackupError(f"there is no archive {of_what}", hint)
    return max(known, key=lambda found: archives[found]), f"the newest {of_what}"


def archive_times(repository: Repository) -> dict[str, datetime]:
    """All archives and their times, the oldest first."""
    listed = json.loads(repository.borg.run(borg_names(repository.borg.repository)).output)
    times = {
        entry["name"]: archive_time(entry["name"], borg_time(entry["start"]).astimezone())
        for entry in listed["archives"]
    }
    return dict(sorted(times.items(), key=lambda pair: pair[1]))


def archive_time(name: str, start: datetime) -> datetime:
    """When an archive was made, as its name has it: borg writes that a moment before it notes the start.

    The name has the local time, which is there twice when clocks are set back.
    """
    try:
        named = datetime.fromisoformat(name[-len("2025-01-31T03:00:00") :])
        earlier = start.astimezone().replace(tzinfo=None) - named
    except (ValueError, TypeError):
        return start
    return start - earlier if timedelta(0) <= earlier < timedelta(seconds=5) else start


class Fate(enum.Enum):
    """What is to be done about an object, or was."""

    UNKNOWN = "unknown"  # its content has to be compared
    WRITE = "write"
    KEEP = "there"  # as it is to be
    DIFFERENT = "different"  # it is there with other content
    HEADERS = "headers"  # it is there with other headers or tags
    LEFT_OUT = "left out"
    DONE = "restored"


@dataclass(frozen=True, slots=True)
class Item:
    """An object in an archive, and what lies where it is to be written."""

    key: str
    path: str  # in the archive; empty: there is nothing to be read of it
    size_bytes: int
    modified: int  # Unix time in seconds
    etag: str = ""  # when it was archived
    facts: Mapping[str, Any] | None = None  # as of S3Object
    there_bytes: int | None = None  # None: nothing is there
    there_etag: str = ""  # of an object
    there_modified: int | None = None  # of a file
    fate: Fate = Fate.UNKNOWN


OWN_FOLDER = MANIFEST_PATH.removesuffix("manifest.jsonl")
PLAN_TABLES = """
CREATE TABLE entries (
    path BLOB PRIMARY KEY, place INTEGER, kind TEXT, size INTEGER, modified INTEGER, is_whole INTEGER
) WITHOUT ROWID;
CREATE TABLE items (
    key BLOB PRIMARY KEY, path BLOB, place INTEGER, size INTEGER, modified INTEGER, etag TEXT DEFAULT '',
    fate TEXT DEFAULT 'unknown', warning TEXT, there_size INTEGER, there_etag TEXT DEFAULT '',
    there_modified INTEGER, sent TEXT DEFAULT '', is_chosen INTEGER DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX in_order ON items (place);
"""
# What the manifest says of content holds where the archive has that version. Of an object that no mount shows
# there is a copy; one that a mount should have shown, and could not, may be in either place.
PLAN_ITEMS = (
    """
    INSERT OR REPLACE INTO items (key, path, place, size, modified, etag, fate, warning)
    SELECT substr(path, :start), path, place, entries.size, entries.modified,
        CASE WHEN objects.size = entries.size AND objects.modified / 1000000 = entries.modified
            THEN objects.etag ELSE '' END,
        CASE kind WHEN '-' THEN 'unknown' ELSE 'left out' END,
        CASE WHEN kind != '-' THEN 'is no plain file, and is left out'
            WHEN NOT is_whole THEN 'is damaged in the repository: parts of it are zeros' END
    FROM entries LEFT JOIN objects ON objects.key = substr(path, :start)
    WHERE kind != 'd' AND path >= :low AND path < :high
    """,
    """
    INSERT OR REPLACE INTO items (key, path, place, size, modified, etag, warning)
    SELECT key, path, place, entries.size, objects.modified / 1000000,
        CASE WHEN objects.size = entries.size THEN etag ELSE '' END,
        CASE WHEN NOT is_whole THEN 'is damaged in the repository: parts of it are zeros' END
    FROM objects CROSS JOIN entries ON path = odd_path(key)
    """,
    """
    INSERT OR IGNORE INTO items (key, size, modified, etag, fate, warning)
    SELECT key, size, modified / 1000000, etag, CASE size WHEN 0 THEN 'unknown' ELSE 'left out' END,
        CASE WHEN size THEN 'is missing: the manifest has it, and the archive has not' END
    FROM objects
    """,
    """
    INSERT OR IGNORE INTO items (key, size, modified)
    SELECT CAST(substr(path, :start) || '/' AS BLOB), 0, modified FROM entries
    WHERE kind = 'd' AND path >= :low AND path < :high AND NOT EXISTS (
        SELECT 1 FROM entries AS low
        WHERE low.path > CAST(entries.path || '/' AS BLOB) AND low.path < CAST(entries.path || '0' AS BLOB)
    )
    """,
)
# What is in a bucket: not a folder that an older archive has because nothing is in it.
COUNTED = "(place IS NOT NULL OR key IN (SELECT key FROM objects))"
CLASHES, KEPT = "fate IN ('different', 'headers')", f"fate = 'there' AND {COUNTED}"


def pages(rows: Iterator[Result]) -> Iterator[list[Result]]:
    """Rows, as many at a time as is good for a database."""
    while page := list(itertools.islice(rows, CATALOG_PAGE)):
        yield page


def parse_entry(line: bytes) -> tuple[str, str, int, int, bool]:
    """Path, kind (`-` for a file, `d` for a folder), size and Unix time of what is listed; if it is whole."""
    given = json.loads(line)
    kind = "h" if given["mode"][0] == "h" else given["type"]
    modified = math.floor(borg_time(given["mtime"]).timestamp())
    return given["path"], kind, given["size"], modified, given["healthy"]


class Plan(Catalog):
    """What an archive holds, what lies where that goes, what is to be done; its objects are the manifest."""

    def __init__(self, path: Path) -> None:
        """Holds nothing yet."""
        super().__init__(path)
        self.prefix = ""  # what stands before the keys in the archive
        with self._told():
            self._db.create_function("odd_path", 1, lambda key: odd_path(decode_key(key)).encode())
            self._db.executescript(PLAN_TABLES)

    def read(self, repository: Repository, archive: str, source: Path) -> None:
        """Takes in what an archive holds. `source` is where the source would be mounted now."""
        borg = repository.borg
        borg.run(
            borg_items(borg.repository, archive), consume=lambda lines: self.take(map(parse_entry, lines))
        )
        if self.execute("SELECT 1 FROM entries WHERE path = ?", [MANIFEST_PATH.encode()]):
            try:
                borg.run(
                    borg_read(borg.repository, archive, MANIFEST_PATH),
                    consume=lambda lines: self.add(parse_manifest_line(line.decode()) for line in lines),
                )
            except ValueError as error:
                raise BackupError(
                    f"{repository.target.store.name}: the manifest of {archive} cannot be read: {error}",
                    DAMAGE_HELP.format(name=repository.target.name),
                ) from None
        self.arrange(source)

    def take(self, entries: Iterable[tuple[str, str, int, int, bool]]) -> None:
        """Takes in the archive's list."""
        rows = ((encode_key(path), place, *rest) for place, (path, *rest) in enumerate(entries))
        for page in pages(rows):
            self.change("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)", page)

    def change(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Executes a statement for each of these rows."""
        with self._told():
            self._db.executemany(sql, rows)

    def arrange(self, source: Path) -> None:
        """Joins the list and the manifest, when both are in.

        Keys stand behind the path under which the source was mounted then, which a run archived first; where
        there is none, as in what somebody archived by hand, the paths are the keys.
        """
        own = encode_key(OWN_FOLDER), encode_key(OWN_FOLDER[:-1] + "0")
        has_manifest = bool(self.execute("SELECT 1 FROM objects LIMIT 1"))
        others = "path < ? OR path >= ?" if has_manifest else "? != ?"
        first = self.execute(f"SELECT path, kind FROM entries WHERE {others} ORDER BY place LIMIT 1", own)
        guesses, name = [str(source).lstrip("/")], f"/{source.name}"
        for path, kind in first:
            if kind == "d" and decode_key(path).endswith(name):
                guesses.insert(0, decode_key(path))
            elif has_manifest and f"{name}/" in decode_key(path):
                guesses.append(decode_key(path).partition(f"{name}/")[0] + name)
        low, high = b"", b"\xff" * 5
        for guess in guesses:
            below = encode_key(f"{guess}/"), encode_key(f"{guess}0")
            outside = f"({others}) AND path != ? AND NOT (path >= ? AND path < ?)"
            if not self.execute(
                f"SELECT 1 FROM entries WHERE {outside} LIMIT 1", [*own, encode_key(guess), *below]
            ):
                self.prefix, low, high = f"{guess}/", *below
                break
        for sql in PLAN_ITEMS:
            self.execute(sql, {"start": len(low) + 1, "low": low, "high": high})

    def select(self, paths: Sequence[str]) -> None:
        """Leaves only what `paths` name: keys or folders, as they stand, or else as borg shows them.

        Raises BackupError for what names none.
        """
        unmet = []
        for path in paths:
            bare = path.strip("/")
            for name in dict.fromkeys((path, bare, bare.removeprefix(self.prefix))):
                folder = name.rstrip("/")
                values = [encode_key(each) for each in (name, f"{folder}/", f"{folder}0")]
                where = "key = ? OR (key >= ? AND key < ?)"
                if self.execute(f"SELECT 1 FROM items WHERE {where} LIMIT 1", values):
                    self.execute(f"UPDATE items SET is_chosen = 1 WHERE {where}", values)
                    break
            else:
                unmet.append(path)
        if unmet:
            keys = [decode_key(key) for (key,) in self.execute("SELECT key FROM items LIMIT 20000")]
            names = {name for key in keys for name in itertools.accumulate(key.split("/"), "{}/{}".format)}
            close = difflib.get_close_matches(unmet[0].strip("/"), names, n=1)
            hint = "A PATH is an object's key or a folder of keys."
            raise BackupError(
                f"the archive holds nothing at {', '.join(map(repr, unmet))}",
                f"Did you mean {close[0]!r}?" if close else hint,
            )
        if paths:
            self.execute("DELETE FROM items WHERE NOT is_chosen")

    def items(self, where: str = "1", by: str = "key") -> Iterator[Item]:
        """The objects for which `where` holds, a condition of SQL, by key or by place in the archive."""
        sql = f"""
            SELECT items.{by}, items.key, items.path, items.size, items.modified, items.etag, facts,
                there_size, there_etag, there_modified, fate
            FROM items LEFT JOIN objects USING (key)
            WHERE items.{by} > ? AND ({where}) ORDER BY items.{by} LIMIT {CATALOG_PAGE}
        """
        last: object = b"" if by == "key" else -1
        while page := self.execute(sql, [last]):
            for last, key, path, *archived, facts, there_bytes, etag, modified, fate in page:  # noqa: B007
                there = None if facts is None else json.loads(facts), there_bytes, etag, modified
                yield Item(decode_key(key), decode_key(path or b""), *archived, *there, Fate(fate))

    def sums(self, where: str) -> tuple[int, int]:
        """The number of the objects for which `where` holds, and of their bytes."""
        return self.execute(f"SELECT count(*), coalesce(sum(size), 0) FROM items WHERE {where}")[0]

    def summary(self, where: str) -> str:
        """`3 objects, 12 kB`, but for folders that an archive only has because nothing is in them."""
        number, size_bytes = self.sums(f"{where} AND {COUNTED}")
        return f"{count(number, 'object')}, {size(size_bytes)}"

    def note(self, item: Item, fate: Fate, sent: str = "") -> None:
        """Notes what is to be done about an object, or that it is written, and with which ETag."""
        values = fate.value, sent.strip('"'), encode_key(item.key)
        self.execute("UPDATE items SET fate = ?, sent = ? WHERE key = ?", values)


def first_fate(item: Item) -> Fate:
    """What size and time say, and an ETag that is as it was. A file gets its time when it is complete."""
    there_bytes = item.there_bytes
    if there_bytes is None or there_bytes == 0 < item.size_bytes:
        return Fate.WRITE
    if there_bytes > item.size_bytes:
        return Fate.DIFFERENT
    is_same = not item.size_bytes or item.there_modified == item.modified
    if there_bytes == item.size_bytes and (is_same or (item.etag and item.etag == item.there_etag)):
        return Fate.KEEP
    return Fate.UNKNOWN


def part_bytes(size_bytes: int) -> int:
    """How large the parts of an object are: all are equal but for the last one."""
    return max(PART_BYTES, -(-size_bytes // (MAX_PARTS * MIB)) * MIB)


def fate_by_etag(item: Item, stream: IO[bytes], etags_are_md5: bool) -> Fate:
    """What the ETag says: the MD5 of the content, or that of the MD5s of equal parts, and their number.

    One that differs only counts where it is known to be an MD5 of all the content.
    """
    number = item.there_etag.partition("-")[2]
    sizes = {PART_BYTES * MAX_OBJECT_BYTES}
    if number:
        common = (*(mib * MIB for mib in COMMON_PARTS), part_bytes(item.size_bytes))
        sizes = {size for size in common if str(-(-item.size_bytes // size)) == number}
    if not (item.there_etag and sizes and item.there_bytes == item.size_bytes):
        return Fate.UNKNOWN
    offset, hashes = 0, {part: (bytearray(), MD5()) for part in sizes}
    while data := stream.read(MIB):
        offset += len(data)
        for part, (digests, current) in hashes.items():
            current.update(data)
            if offset % part == 0 or (number and offset == item.size_bytes):
                digests += current.digest()
                hashes[part] = digests, MD5()
    etags = {
        f"{MD5(digests).hexdigest()}-{number}" if number else current.hexdigest()
        for digests, current in hashes.values()
    }
    if item.there_etag in etags:
        return Fate.KEEP
    return Fate.DIFFERENT if etags_are_md5 and not number else Fate.UNKNOWN


def fate_by_content(there: Iterable[bytes], stream: IO[bytes]) -> Fate:
    """What the content says: a beginning of what is to be written may be completed."""
    for data in there:
        if stream.read(len(data)) != data:
            return Fate.DIFFERENT
    return Fate.WRITE if stream.read(1) else Fate.KEEP


MD5 = functools.partial(hashlib.md5, usedforsecurity=False)


class Threads:
    """Threads that work side by side, on no more bytes than there is memory for; a failure ends all."""

    def __init__(self, memory_bytes: int) -> None:
        """Nothing is under way yet."""
        self._pool, self._changed = ThreadPoolExecutor(RESTORE_THREADS), threading.Condition()
        self._room = self._all = memory_bytes
        self._failures: list[BaseException] = []

    @property
    def is_busy(self) -> bool:
        """Whether something is under way."""
        return self._room < self._all

    def start(self, size_bytes: int, work: Callable[[], Result]) -> concurrent.futures.Future[Result | None]:
        """Has a thread do `work`, as soon as there is room for its bytes. Raises what has failed."""
        share = min(self._all, max(size_bytes, self._all // WAITING_OBJECTS))
        with self._changed:
            self._changed.wait_for(lambda: self._room >= share or self._failures)
            self._room -= share
        if self._failures:
            raise self._failures[0]

        def do() -> Result | None:
            try:
                return None if self._failures else work()
            except BaseException as error:
                self._failures.append(error)
                raise
            finally:
                with self._changed:
                    self._room += share
                    self._changed.notify_all()

        return self._pool.submit(do)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if not kind and self._failures:
            raise self._failures[0]


Handler = Callable[[Item, IO[bytes], Mapping[str, str], Threads], None]  # the third: user metadata
TAR_METADATA = "SCHILY.xattr.user."


def take_out(
    fd: int, items: Iterator[Item], small_bytes: int, threads: Threads, handle: Handler
) -> Item | None:
    """Reads a tar file, and hands these objects in it on; returns the first that it lacks.

    They come in the archive's order. Raises what `handle` raises first.
    """
    # borg writes it by the same module, surrogates included.
    with (
        os.fdopen(fd, "rb") as stream,
        threads,
        tarfile.open(fileobj=stream, mode="r|", bufsize=READ_BYTES // 8, encoding="utf-8") as tar,
    ):
        item = next(items, None)
        while item and (member := tar.next()):
            tar.members.clear()  # it would remember each
            content = tar.extractfile(member) if member.isreg() else None
            if member.name != item.path or content is None:
                continue
            headers, start = member.pax_headers.items(), len(TAR_METADATA)
            metadata = {name[start:]: value for name, value in headers if name.startswith(TAR_METADATA)}
            if member.size > small_bytes:
                handle(item, content, metadata, threads)
            else:
                data = io.BytesIO(content.read())
                threads.start(member.size, functools.partial(handle, item, data, metadata, threads))
            item = next(items, None)
        drain(stream)
    return item


class Restoration:
    """A restore of a plan's objects.

    Subclasses know the place: whether it takes an object (`mistake`), what is there (`find`, `compare_...`),
    how to write (`prepare`, `write`) and what is wrong with what was written (`finish`).
    """

    def __init__(self, runtime: Runtime, plan: Plan, title: str, small_bytes: int) -> None:
        """Nothing was looked at yet; `small_bytes` is what a thread takes, what is larger `write` sees to."""
        self.title, self.small_bytes = title, small_bytes
        self.runtime, self.plan, self.console = runtime, plan, runtime.console
        # Two parts at least: one that is read, and one that is sent.
        self.memory_bytes = min(max(2 * PART_BYTES, runtime.memory_mb * MIB // 8), 8 * PART_BYTES)
        self.lock, self.losses, self.warnings = threading.Lock(), Counter[str](), 0
        self.goal, self.objects, self.bytes = "", 0, 0  # what is done, of what

    def warn(self, text: str) -> None:
        """Tells what is not restored, or not as it was."""
        with self.lock:
            self.warnings += 1
        if self.warnings <= MAX_NAMED:
            self.console.warning("restore", text)

    def leave_out(self, item: Item, reason: str) -> None:
        """Notes and tells that an object cannot be restored."""
        self.plan.note(item, Fate.LEFT_OUT)
        self.warn(f"{item.key!r} could not be restored: {reason}")

    def add(self, objects: int, more_bytes: int) -> None:
        """Notes and shows what is done."""
        with self.lock:
            self.objects, self.bytes = self.objects + objects, self.bytes + more_bytes
            done = f"{count(self.objects, 'object')}, {size(self.bytes)}"
            self.console.progress("restore", f"{done} {self.goal}")

    def for_each(self, where: str, work: Callable[..., None], *more: Any) -> None:
        """Has threads do `work` about each object for which `where` holds."""
        with Threads(self.memory_bytes) as threads:
            for item in self.plan.items(where):
                threads.start(0, functools.partial(work, item, *more, threads))

    def export(self, repository: Repository, archive: str, verb: str, where: str, handle: Handler) -> None:
        """Hands each object for which `where` holds out of the archive to `handle`, in several threads.

        Raises BackupError, also where the archive does not give all of them.
        """
        where, borg, target = f"place IS NOT NULL AND ({where})", repository.borg, repository.target
        if not self.plan.sums(where)[0]:
            return
        self.goal, self.objects, self.bytes = f"{verb}, of {self.plan.summary(where)}", 0, 0

        def take(item: Item, *rest: Any) -> None:
            handle(item, *rest)
            self.add(1, 0)

        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
            chosen = Path(folder, "chosen")
            with chosen.open("w", encoding="ascii") as lines:
                lines.writelines(f"{json.dumps(item.path)}\n" for item in self.plan.items(where, "place"))
            reading, writing = os.pipe()
            output, threads = os.fdopen(writing, "wb"), Threads(self.memory_bytes)
            items = self.plan.items(where, "place")
            work = in_background(lambda: take_out(reading, items, self.small_bytes, threads, take))
            try:
                borg.run(
                    borg_export(borg.repository, archive, Path(f"/dev/fd/{writing}")),
                    on_start=lambda _: output.close(),
                    own={"S3BORGBACKUP_EXPORTED": str(chosen)},
                    pass_fds=[writing],
                    waits=lambda: time.monotonic() if self.is_patient and threads.is_busy else 0,
                )
            except BackupError as error:
                output.close()
                concurrent.futures.wait([work], timeout=0 if isinstance(error, Stuck) else KILL_SECONDS)
                failure, final = work.exception() if work.done() else None, Stopped | Stuck | S3Error
                if isinstance(failure, BackupError | OSError) and not isinstance(error, final):
                    raise failure from error
                raise
            meters = [lambda: self.objects, lambda: io_bytes(os.getpid())]
            lost = until_done(self.runtime, [], f"writing to {self.title}", work, *meters)
        if lost:
            raise BackupError(
                f"{target.store.name}: the archive did not give {lost.path!r}",
                f"Check the repository: backup.py borg {target.name} check.",
            )

    def compare(self, repository: Repository, archive: str) -> None:
        """Finds out what is to be done about each object, and tells what cannot be restored.

        Where size and time do not tell, content is compared: by ETag in a bucket, and by reading it there.
        """
        plan = self.plan
        for key, warning in plan.execute("SELECT key, warning FROM items WHERE warning IS NOT NULL"):
            self.warn(f"{decode_key(key)!r} {warning}")
        self.find()
        for item in plan.items("fate = 'unknown'"):
            if mistake := self.mistake(item):
                self.leave_out(item, mistake)
            else:
                plan.note(item, first_fate(item))
        for is_last in (False, True):
            handle = functools.partial(self.compare_content, is_last)
            self.export(repository, archive, "compared", "fate = 'unknown'", handle)
        self.for_each("fate = 'there' AND facts IS NOT NULL", self.compare_headers)

    def tell(self, overwrite: bool) -> int:
        """Prints what a restore would do, one line for each object, and in all; returns the exit code."""
        refused = "overwrite" if overwrite else "refuse"
        words = {fate: (fate.value, "") for fate in Fate}
        words |= {Fate.DIFFERENT: (refused, ""), Fate.HEADERS: (refused, " (other headers)")}
        for item in self.plan.items(f"{COUNTED} OR fate = 'different'"):
            word, why = words[item.fate]
            self.console.plain(f"{word:9}  {size(item.size_bytes):>8}  {printable(item.key)}{why}")
        for fate, (word, why) in words.items():
            if self.plan.sums(where := f"fate = '{fate.value}'")[0]:
                text = f"{word}{why}: {self.plan.summary(where)}"
                self.console.info("restore", f"dry run to {self.title}: {text}")
        if self.plan.sums(CLASHES)[0] and not overwrite:
            return EXIT_FAILURE
        return EXIT_WARNINGS if self.warnings else EXIT_OK

    def confirm(self, overwrite: bool) -> None:
        """Says what will be written. Raises BackupError where that would overwrite what must not be."""
        number = self.plan.sums(CLASHES)[0]
        if number and not overwrite:
            for item in itertools.islice(self.plan.items(CLASHES), PREVIOUS_NAMED):
                what = "headers or tags" if item.fate is Fate.HEADERS else "content"
                self.console.error("restore", f"{item.key!r} is there with other {what}")
            raise BackupError(
                f"{count(number, 'object')} in {self.title} would be overwritten; nothing was written",
                "Restore to another place, or say --overwrite.",
            )
        self.plan.execute("UPDATE items SET fate = 'write' WHERE fate = 'different'")
        kept = self.plan.sums(KEPT)[0]
        there = f"; {count(kept, 'object')} there already" if kept else ""
        summary = self.plan.summary("fate IN ('write', 'headers')")
        self.console.info("restore", f"to {self.title}: {summary}{there}")

    def write_all(self, repository: Repository, archive: str) -> None:
        """Writes what is to be written, and what the place has lost of it once more.

        Raises BackupError unless all of it is there.
        """
        self.prepare()
        mistakes: list[str] = []
        for _ in range(2):
            self.for_each("fate = 'write' AND place IS NULL", self.write, io.BytesIO(), {})
            self.export(repository, archive, "restored", "fate = 'write'", self.write)
            mistakes = self.finish()
            if not mistakes:
                return
        more = self.plan.sums("fate = 'write'")[0] - 5
        raise BackupError(
            f"{self.title} does not hold what was restored: {'; '.join(mistakes[:5])}"
            f"{f' and {more:,} more' if more > 0 else ''}",
            "Run it again: it goes on where it was.",
        )

    def report(self, seconds: float) -> int:
        """Says what was restored, and what was lost of it; returns the exit code."""
        for what, number in sorted(self.losses.items()):
            self.warn(f"{self.title} takes no {what}: {count(number, 'object')} lost it")
        if not self.plan.sums("place IS NOT NULL")[0]:
            self.warn("this archive holds no objects; --at and --archive choose another (see `list`)")
        if self.warnings > MAX_NAMED:
            self.console.warning("restore", f"{self.warnings - MAX_NAMED:,} more warnings")
        kept, done = self.plan.sums(KEPT)[0], self.plan.summary("fate = 'restored'")
        there = f"; {kept:,} were there already" if kept else ""
        words = f"restored {done}, to {self.title} in {duration(seconds)}{there}"
        self.console.info("restore", words)
        return EXIT_WARNINGS if self.warnings else EXIT_OK


class ToFolder(Restoration):
    """Into a folder of the machine."""

    is_patient = False

    def __init__(self, runtime: Runtime, plan: Plan, root: Path) -> None:
        """Nothing was looked at yet."""
        super().__init__(runtime, plan, str(root), 256 * 1024)
        self._root, self._folders = root, set[str]()

    def mistake(self, item: Item) -> str:
        name = item.key if item.size_bytes else item.key.removesuffix("/")
        return "no file can have that name" if UNREPRESENTABLE.search(name) else ""

    def find(self) -> None:  # what is no file cannot be overwritten
        for page in pages(self.plan.items()):
            found = []
            for item in page:
                with contextlib.suppress(OSError, ValueError):  # nothing there, or no file can have that name
                    status, is_folder = os.lstat(f"{self._root}/{item.key}"), item.key.endswith("/")
                    if is_folder or stat.S_ISREG(status.st_mode):
                        size_bytes = 0 if is_folder else status.st_size
                        found.append((size_bytes, math.floor(status.st_mtime), encode_key(item.key)))
            self.plan.change("UPDATE items SET there_size = ?, there_modified = ? WHERE key = ?", found)

    def compare_content(self, is_last: bool, item: Item, stream: IO[bytes], *_: object) -> None:
        if not is_last:
            return
        try:
            with open(f"{self._root}/{item.key}", "rb") as there:
                blocks = iter(lambda: there.read(READ_BYTES), b"")
                self.plan.note(item, fate_by_content(blocks, stream))
        except OSError as error:
            words = f"{item.key!r} in {self.title} cannot be compared: {error.strerror}"
            raise BackupError(words, TRY_AGAIN) from error

    def compare_headers(self, *_: object) -> None:
        """Files have none."""

    def prepare(self) -> None:
        """Raises BackupError where the disk is certain to be too small.

        What is complete, but has not got its time, as a restore was killed, gets it.
        """
        growth = "sum(max(0, size - coalesce(there_size, 0)))"
        [(needed,)] = self.plan.execute(f"SELECT coalesce({growth}, 0) FROM items WHERE fate = 'write'")
        disk = os.statvfs(self._root)
        free = disk.f_bavail * disk.f_frsize
        if needed > free and disk.f_blocks:
            words = f"{self.title} has {size(free)} free, and {size(needed)} are to be added"
            hint = "Make room, restore a part of it, or restore to another place."
            raise BackupError(f"{words}; nothing was written", hint)
        old = "fate = 'there' AND there_modified != items.modified"
        for item in self.plan.items(f"{old} AND place IS NOT NULL"):
            try:
                path, times = f"{self._root}/{item.key}", (item.modified, item.modified)
                os.utime(path, times, follow_symlinks=False)
            except OSError as error:
                self.leave_out(item, f"its time cannot be set: {error.strerror}")

    def write(self, item: Item, stream: IO[bytes], metadata: Mapping[str, str], _: Threads) -> None:
        """Writes one object. Raises BackupError where the disk is to blame, and not the object's name."""
        path = f"{self._root}/{item.key}"
        try:
            folder = os.path.dirname(path)
            if folder not in self._folders:
                os.makedirs(folder, exist_ok=True)
                self._folders.add(folder)
            if not path.endswith("/"):
                self._fill(item, path, stream, metadata)
            self.plan.note(item, Fate.DONE)
        except OSError as error:
            if error.errno in UNWRITABLE:
                self.leave_out(item, error.strerror or str(error))
                return
            hint = "Make room, and run it again" if error.errno in FULL_DISK else "Run it again"
            words = f"cannot write {item.key!r} to {self.title}: {error.strerror}"
            raise BackupError(words, f"{hint}: it goes on where it was.") from error

    def _fill(self, item: Item, path: str, stream: IO[bytes], metadata: Mapping[str, str]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags | (os.O_EXCL if item.there_bytes is None else os.O_TRUNC), 0o644)
        with open(fd, "wb", buffering=0) as file:
            while data := stream.read(READ_BYTES):
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                self.add(0, len(data))
            for name, value in metadata.items():
                try:
                    os.setxattr(fd, f"user.{name}", encode_key(value))
                except OSError as error:
                    if error.errno not in NO_METADATA:
                        raise
                    self.losses["user metadata"] += 1
            os.utime(fd, (item.modified, item.modified))  # last: this says that it is complete

    def finish(self) -> list[str]:
        """Waits until the disk has what was written. Raises BackupError where it could not take it."""
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if LIBC.syncfs(fd):
                words = f"{self.title}: the disk could not take what was written"
                raise BackupError(f"{words}: {os.strerror(ctypes.get_errno())}", "Run it again.")
        finally:
            os.close(fd)
        return []


def restorable(facts: Mapping[str, Any] | None) -> dict[str, str]:
    """Those of an object's headers that can be given to another one."""
    headers = (facts or {}).get("headers", {}).items()
    return {name: value for name, value in headers if name in RESTORED_HEADERS or name.startswith(METADATA)}


def readable(value: str) -> str:
    """A header's value for comparisons: encoded words (RFC 2047) are what they mean, blanks do not count."""
    with contextlib.suppress(ValueError, LookupError, email.errors.MessageError):
        value = str(email.header.make_header(email.header.decode_header(value)))
    return " ".join(value.split())


class ToBucket(Restoration):
    """Into a bucket, by requests of our own."""

    is_patient = True  # while it waits for S3, which has an end

    def __init__(self, runtime: Runtime, plan: Plan, client: S3Client, is_dry: bool) -> None:
        """Tries out what the store keeps, unless it `is_dry`. Raises S3Error."""
        super().__init__(runtime, plan, f"{client.store.location} at {client.store.endpoint}", PART_BYTES)
        self._client, self._prefix = client, client.store.key_prefix
        self._note = f"{self._prefix}{RESTORING_NAME}{runtime.run_id}"
        self._uploads: dict[str, tuple[str, str]] = {}  # under way: the key -> since when, and the id
        self._beats, self._over, self._writing_note = 0, threading.Event(), threading.Lock()
        self._etags_are_md5, self._dropped = (False, set[str]()) if is_dry else self._try_out()

    def _try_out(self) -> tuple[bool, set[str]]:
        """Whether an ETag is an MD5, which it is not with some kinds of encryption; what is dropped."""
        client, start = self._client, f"{self._prefix}{PROBE_NAME}"
        for entry in client.list_objects(start):  # what a restore that was killed left
            client.delete(entry.key)
        key, body = f"{start}{secrets.token_hex(6)}", secrets.token_bytes(16)
        try:
            try:
                answer = client.put(key, body, {**RESTORED_HEADERS, TAGGING: "a=b"})
                kept = {TAGGING} if self._tags(key) else set()
            except S3Error as error:
                if error.status not in (*REFUSALS, *UNTAKEN_STATUSES, 501):
                    raise
                answer, kept = client.put(key, body, RESTORED_HEADERS), set()
            dropped = {*RESTORED_HEADERS, TAGGING} - kept - self._headers(key).keys()
            return answer.headers.get("etag", "").strip('"') == MD5(body).hexdigest(), dropped
        finally:
            client.delete(key)

    def _headers(self, key: str) -> dict[str, str]:
        headers = self._client.request("HEAD", key).headers.items()
        return restorable({"headers": {name: decode_key(text.encode("latin-1")) for name, text in headers}})

    def _tags(self, key: str) -> dict[str, str]:
        root = ElementTree.fromstring(self._client.request("GET", key, [("tagging", "")]).body)
        texts = [element.text or "" for element in root.iter() if element.tag.endswith(("}Key", "}Value"))]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    def mistake(self, item: Item) -> str:
        length = len(encode_key(self._prefix + item.key))
        if length > MAX_KEY_BYTES:
            return f"its key would have {length:,} bytes, and S3 takes {MAX_KEY_BYTES:,}"
        return "S3 takes objects of up to 5 TiB" if item.size_bytes > MAX_OBJECT_BYTES else ""

    def find(self) -> None:
        [ends] = self.plan.execute("SELECT coalesce(min(key), ''), coalesce(max(key), '') FROM items")
        pairs = zip(*(decode_key(bytes(key)) if key else "" for key in ends), strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1] < "\ud800", pairs)
        prefix = self._prefix + "".join(first for first, _ in same)
        self.plan.execute("UPDATE items SET there_size = NULL, there_etag = ''")
        for page in pages(self._client.list_objects(prefix)):
            rows = [(each.size_bytes, each.etag, encode_key(each.key[len(self._prefix) :])) for each in page]
            self.plan.change("UPDATE items SET there_size = ?, there_etag = ? WHERE key = ?", rows)

    def compare_content(self, is_last: bool, item: Item, stream: IO[bytes], *_: object) -> None:
        if not is_last:
            self.plan.note(item, fate_by_etag(item, stream, self._etags_are_md5))
            return
        size_bytes, step = item.there_bytes or 0, LARGEST_PIECE_BYTES
        spans = [(start, min(start + step, size_bytes) - 1) for start in range(0, size_bytes, step)]
        there = (self._client.get(self._prefix + item.key, span) for span in spans)
        self.plan.note(item, fate_by_content(there, stream))

    def compare_headers(self, item: Item, _: Threads) -> None:
        """Notes an object that is there with the same content, and with other headers or tags."""
        facts, key, wanted = item.facts or {}, self._prefix + item.key, restorable(item.facts)
        if "headers" not in facts:
            return
        try:
            found, tags = self._headers(key), facts.get("tags")
            names = (wanted.keys() | found.keys()) - self._dropped
            names -= {"content-type"} - wanted.keys()  # whatever the server calls what has none
            differ = any(readable(wanted.get(name, "")) != readable(found.get(name, "")) for name in names)
            if differ or (tags and TAGGING not in self._dropped and self._tags(key) != tags):
                self.plan.note(item, Fate.HEADERS)
        except S3Error as error:
            self._leave_out(item, error)

    def _leave_out(self, item: Item, error: S3Error) -> None:
        """Notes that S3 does not take this one object. Raises `error` where it is about more than that."""
        if error.status not in UNTAKEN_STATUSES or error.code in S3_HINTS.keys() - {"NotS3"}:
            raise error
        self.leave_out(item, error.message.partition("): ")[2] or error.message)

    def prepare(self) -> None:
        """Gives objects with the right content their headers, by copies onto themselves."""
        in_background(self._beat)
        self.for_each("fate = 'headers'", self._copy)

    def _copy(self, item: Item, _: Threads) -> None:
        key, headers = self._prefix + item.key, self._headers_for(item, {})
        headers |= {"x-amz-tagging-directive": "REPLACE"} if TAGGING in headers else {}
        headers["x-amz-metadata-directive"] = "REPLACE"
        headers["x-amz-copy-source"] = uri_encode(f"/{self._client.store.bucket}/{key}", safe="/")
        try:
            answer = self._client.request("PUT", key, headers=headers)
            self.plan.note(item, Fate.DONE, xml_text(answer.body, "ETag"))
        except S3Error as error:
            if not 400 <= error.status <= 501:
                raise
            self.plan.note(item, Fate.WRITE)

    def _headers_for(self, item: Item, metadata: Mapping[str, str]) -> dict[str, str]:
        """What an object is written with; `metadata` is what older archives have of it."""
        headers = restorable(item.facts) or {f"{METADATA}{name}": value for name, value in metadata.items()}
        if tags := (item.facts or {}).get("tags"):
            headers[TAGGING] = urllib.parse.urlencode(tags, quote_via=urllib.parse.quote)
        with self.lock:
            self.losses.update(headers.keys() & self._dropped)
        return {name: value for name, value in headers.items() if name not in self._dropped}

    def write(self, item: Item, stream: IO[bytes], metadata: Mapping[str, str], threads: Threads) -> None:
        """Writes one object; a large one is there when `threads` have ended. Raises S3Error."""
        key, headers = self._prefix + item.key, self._headers_for(item, metadata)
        if item.size_bytes > PART_BYTES:
            self._upload(item, key, headers, stream, threads)
            return
        try:
            answer = self._client.put(key, stream.read(), headers)
            self.add(0, item.size_bytes)
            self.plan.note(item, Fate.DONE, answer.headers.get("etag", ""))
        except S3Error as error:
            self._leave_out(item, error)

    def _upload(
        self, item: Item, key: str, headers: Mapping[str, str], stream: IO[bytes], threads: Threads
    ) -> None:
        """Begins an upload, and has threads send its parts and end it."""
        since, step = utc_now(self._client), part_bytes(item.size_bytes)
        self._write_note(key, (since, ""))
        try:
            begun = self._client.request("POST", key, [("uploads", "")], headers)
        except S3Error as error:
            self._leave_out(item, error)
            self._write_note(key)
            return
        upload = xml_text(begun.body, "UploadId")
        self._write_note(key, (since, upload))

        def send(number: int, body: bytes) -> str:
            query = [("partNumber", str(number)), ("uploadId", upload)]
            etag = self._client.put(key, body, query=query).headers.get("etag", "").strip('"')
            self.add(0, len(body))
            return f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>"

        parts = [
            threads.start(step, functools.partial(send, number, stream.read(step)))
            for number in range(1, -(-item.size_bytes // step) + 1)
        ]
        threads.start(0, lambda: self._complete(item, key, upload, [part.result() for part in parts]))

    def _complete(self, item: Item, key: str, upload: str, parts: Sequence[str | None]) -> None:
        body = f"<CompleteMultipartUpload>{''.join(map(str, parts))}</CompleteMultipartUpload>".encode()
        client = self._client.with_patience(dataclasses.replace(PROVEN, answer_seconds=300))
        try:
            answer = client.request("POST", key, [("uploadId", upload)], body=body)
            etag = xml_text(answer.body, "ETag")
        except S3Error as error:
            if error.code != "NoSuchUpload":
                self._leave_out(item, error)
                return
            there = client.request("HEAD", key).headers  # an answer that was lost may have been a success
            etag = there.get("etag", "").strip('"')
            if there.get("content-length") != str(item.size_bytes) or etag == item.there_etag:
                raise
        self._write_note(key)
        self.plan.note(item, Fate.DONE, etag)

    def _write_note(
        self, key: str = "", upload: tuple[str, str] | None = None, patience: Patience = PROVEN
    ) -> None:
        """Says which uploads are under way; that of `key` begins, or has ended."""
        with self._writing_note:
            self._uploads.pop(key, None)
            self._uploads |= {key: upload} if upload else {}
            if not self._over.is_set():
                body = json.dumps(self._uploads).encode()
                self._client.with_patience(patience).put(self._note, body)
                self._beats += 1

    def _beat(self) -> None:
        while not self._over.wait(NOTE_SECONDS):
            if self._beats:
                with contextlib.suppress(BackupError):
                    self._write_note(patience=HASTY)

    def finish(self) -> list[str]:
        deadline = time.monotonic() + LISTING_SECONDS
        wrong = "(there_size IS NULL OR there_size != items.size OR (sent != '' AND sent != there_etag))"
        where = f"fate IN ('restored', 'there') AND {wrong}"
        self.find()
        while self.plan.sums(where)[0] and time.monotonic() < deadline:
            self.runtime.stop.wait(1)
            self.find()
        mistakes = [
            f"{item.key!r} {'is missing' if item.there_bytes is None else 'is not as it was written'}"
            for item in itertools.islice(self.plan.items(where), PREVIOUS_NAMED)
        ]
        self.plan.execute(f"UPDATE items SET fate = 'write' WHERE {where}")
        return mistakes

    def close(self, is_done: bool) -> None:
        """Ends uploads that are under way, and when all `is_done` those of restores that did not live to.

        Theirs are in notes that nobody has written for a while.
        """
        self._over.set()
        with self._writing_note, contextlib.suppress(BackupError):
            if self._beats:
                soon = datetime.now(UTC) + timedelta(days=1)
                self._end_uploads(self._note, self._uploads, soon.isoformat())
        deadline = time.monotonic() + NOTE_LIFETIME_SECONDS + 1
        while is_done:
            notes = list(self._client.list_objects(f"{self._prefix}{RESTORING_NAME}"))
            now = self._client.clock or datetime.now(UTC)
            for note in notes:
                if now - note.last_modified > timedelta(seconds=NOTE_LIFETIME_SECONDS):
                    until = (note.last_modified + 2 * timedelta(seconds=NOTE_SECONDS)).isoformat()
                    self._end_uploads(note.key, json.loads(self._client.get(note.key)), until)
            if not notes or time.monotonic() > deadline:
                break
            self.console.progress("restore", "waiting to see whether another restore is alive")
            self.runtime.stop.wait(1)

    def _end_uploads(self, note: str, uploads: Mapping[str, Sequence[str]], until: str) -> None:
        """Ends uploads, and deletes the note with them. One whose id is not known began meanwhile."""
        client = self._client.with_patience(Patience(failing_seconds=CONNECT_PATIENCE_SECONDS))

        def end(key: str) -> None:
            since, ids = uploads[key][0], [uploads[key][1]]
            if not ids[0]:
                query = [("uploads", ""), ("prefix", key), ("encoding-type", "url")]
                root = ElementTree.fromstring(client.request("GET", query=query).body)
                for element in root.iter():
                    told = {each.tag.rpartition("}")[2]: each.text or "" for each in element}
                    if urllib.parse.unquote_plus(told.get("Key", "")) == key and "UploadId" in told:
                        begun = datetime.fromisoformat(told["Initiated"])
                        if datetime.fromisoformat(since) <= begun <= datetime.fromisoformat(until):
                            ids.append(told["UploadId"])
            for upload in filter(None, ids):
                try:
                    client.request("DELETE", key, [("uploadId", upload)])
                except S3Error as error:
                    if error.status != 404:
                        raise

        with ThreadPoolExecutor(RESTORE_THREADS) as pool:
            list(pool.map(end, uploads))
        client.delete(note)


@contextlib.contextmanager
def opened_place(runtime: Runtime, order: Order, plan: Plan) -> Iterator[ToFolder | ToBucket]:
    """What restores to where `order` says, which is ready to be written to, unless it only asks.

    Raises BackupError, within seconds where a permission is missing.
    """
    if order.folder:
        yield ToFolder(runtime, plan, opened_folder(runtime, order.folder, order.dry_run))
        return
    assert order.bucket
    found = preflight_one(runtime, order.bucket, write=not order.dry_run)
    client = S3Client(order.bucket, found.region, PROVEN, runtime.stop)
    place, is_done = ToBucket(runtime, plan, client, order.dry_run), False
    try:
        yield place
        is_done = not order.dry_run
    finally:
        place.close(is_done)


def opened_folder(runtime: Runtime, folder: Path, dry_run: bool) -> Path:
    """A folder to restore into, which is made where it is not there. Raises BackupError."""
    try:
        if not dry_run:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        root = folder.resolve()
        is_inside = mount_table().get("/") == "overlay" and root.stat().st_dev == os.stat("/").st_dev
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise BackupError(f"cannot restore to {folder}: {error.strerror}", "Choose another folder.") from None
    if is_inside:
        runtime.console.warning(
            "restore",
            f"{root} is a folder inside the container, and will be gone with it; mount one of the machine"
            f' there: docker run -v "$PWD/restored:{root}"',
        )
    return root


def restore(runtime: Runtime, target: Target, order: Order) -> int:
    """Restores an archive, or a part of it; returns the exit code. Raises BackupError."""
    start, settings = time.monotonic(), runtime.settings
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX))
        plan = Plan(Path(folder, "plan"))
        undo.callback(plan.close)
        metadata = undo.enter_context(opened_metadata(order))
        reading = opened_for_reading(runtime, target, "a restore")
        with opened_place(runtime, order, plan) as place, reading as repository:
            archives = archive_times(repository)
            archive, why = choose_archive(archives, settings.label, order.archive, order.until)
            what = f"archive {archive} of target {target.name} ({why})"
            runtime.console.info("restore", f"{what}, of {local_time(archives[archive])}")
            plan.read(repository, archive, settings.mount_point(settings.source))
            plan.select(order.paths)
            place.compare(repository, archive)
            if order.dry_run:
                return place.tell(order.overwrite)
            place.confirm(order.overwrite)
            place.write_all(repository, archive)
        for item in plan.items("fate IN ('restored', 'there')"):
            if known := plan.find(item.key):
                print(manifest_line(known), file=metadata)
        return place.report(time.monotonic() - start)


def opened_metadata(order: Order) -> IO[str]:
    """The file for what is known of the objects. Raises BackupError."""
    path = order.metadata if order.metadata and not order.dry_run else os.devnull
    try:
        return open(path, "w", encoding="ascii")
    except OSError as error:
        raise BackupError(f"cannot write {path}: {error.strerror}", "Correct --metadata.") from None


# ---------------------------------------------------------------------------------------------- Manual mode

# `backup.py mount` returns while its mount lives on. A keeper process, in a session of its own, is tigrisfs's
# parent: it reads the log and sees the end. It holds a lock on its state file for as long as it lives, which,
# unlike a process id, cannot be mistaken. There it notes as JSON whether the mount is `writable`, when it is
# usable, and its exit `code`, at its end. Whoever tells a person of that empties the file.

READY_LINE = "the mount is ready"
REQUEST = ".upload"  # the suffix of the file that asks a keeper to upload all that the mount shows
LOG = ".log"  # that of the file with what it prints when it is usable
BUSY_TRIES = 5
WRITE_AGAIN = "Mount it again, compare, and copy what is missing."
MANUAL_WORK = "`backup.py mount`"  # the purpose that a manual mount's lease names


def state_folder() -> Path:
    """Where the state files are."""
    return Path(tempfile.gettempdir()) / f"s3borgbackup-{os.getuid()}"


def state_file(runtime: Runtime, store: Store) -> Path:
    """Where the keeper of a store's mount says that it is there."""
    folder = state_folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BackupError(f"{folder} belongs to somebody else", "Remove it, or set TMPDIR.")
    digest = hashlib.sha256(str(runtime.settings.mount_point(store)).encode()).hexdigest()[:16]
    return folder / f"{digest}.mount"


def lock_file(path: Path) -> IO[str] | None:
    """The file, locked; None when somebody else holds the lock. The lock ends with the file's closing."""
    stream = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


def keeper_is_alive(runtime: Runtime, store: Store) -> bool:
    """Whether a keeper holds the mount of `store`."""
    stream = lock_file(state_file(runtime, store))
    if stream:
        stream.close()
    return stream is None


def is_kept(runtime: Runtime, store: Store) -> bool:
    """Whether a keeper holds the mount of `store`, or has ended and nobody was told how."""
    return keeper_is_alive(runtime, store) or bool(read_state(state_file(runtime, store)))


def read_state(path: Path) -> dict[str, Any]:
    """What a keeper has noted; nothing where it has not, or is just at it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_state(stream: IO[str], facts: Mapping[str, Any]) -> None:
    """Notes facts in place of those that were there."""
    stream.truncate(0)
    stream.write(json.dumps(facts) if facts else "")
    stream.flush()


def mount_manually(runtime: Runtime, store: Store, read_write: bool) -> int:
    """Mounts `store` so that it lives on after this command; returns when it is usable."""
    if keeper_is_alive(runtime, store):
        return await_other_mount(runtime, store, read_write)
    if read_state(state_file(runtime, store)):
        try:
            tell_end(runtime, store)
        except BackupError as error:
            runtime.console.warning(store.name, f"the mount before this one: {error}")
    words = [store.name, *(["--read-write"] if read_write else [])]
    code, said_nothing = start_keeper(runtime, store, words)
    if code == EXIT_OK:
        runtime.console.plain(advice(store, runtime.settings.mount_point(store), read_write))
    if code == EXIT_BUSY and said_nothing:
        return await_other_mount(runtime, store, read_write)
    return code


def start_keeper(runtime: Runtime, store: Store, words: Sequence[str]) -> tuple[int, bool]:
    """Starts a keeper, and waits until its mount is usable: 0, or until it ends: its exit code.

    Also returns whether it said nothing. Raises BackupError when it does neither in time, Stopped.
    """
    ready, lines = threading.Event(), []

    def show(line: str) -> None:
        if READY_LINE in line:
            ready.set()
        elif not ready.is_set():
            lines.append(line)
            print(line, file=sys.stderr, flush=True)

    argv = [sys.executable, os.path.abspath(__file__), KEEP_COMMAND, *words]
    keeper = Child(argv, runtime.environ, show, show, dies_with_us=False)
    patience = runtime.settings.lease_wait_seconds or runtime.settings.lease_ttl_seconds * 2
    deadline = time.monotonic() + patience + WARM_UP_SECONDS + 2 * MOUNT_SECONDS + SERVER_PATIENCE_SECONDS
    while not ready.wait(POLL_SECONDS / 4):
        if (code := keeper.wait(0)) is not None and not ready.wait(POLL_SECONDS):
            return code or EXIT_FAILURE, not lines
        if runtime.stop.requested or time.monotonic() > deadline:
            keeper.send(signal.SIGTERM)
            keeper.wait(TERMINATE_SECONDS)
            runtime.stop.check()
            raise BackupError(f"{store.name}: cannot be mounted in time", TRY_AGAIN)
    return EXIT_OK, not lines


def await_other_mount(runtime: Runtime, store: Store, read_write: bool) -> int:
    """Waits until what another command mounts is usable. Raises BackupError unless it is as asked for."""
    path, state = runtime.settings.mount_point(store), state_file(runtime, store)
    while "writable" not in (facts := read_state(state)):
        runtime.stop.check()
        time.sleep(POLL_SECONDS)
        if not keeper_is_alive(runtime, store):
            raise BackupError(f"{store.name}: another command could not mount it", TRY_AGAIN)
    if facts["writable"] != read_write:
        raise BackupError(
            f"{store.name}: is mounted at {path} already, {'read-only' if read_write else 'for writing'}",
            f"Unmount it first: backup.py umount {shlex.quote(store.name)}",
        )
    runtime.console.info(store.name, f"is mounted at {path} already")
    return EXIT_OK


def advice(store: Store, path: Path, read_write: bool) -> str:
    """What to type next."""
    quoted = shlex.quote(str(path))
    if store.target is None:
        how = "for reading and writing" if read_write else "read-only"
        first = f"ls {quoted}"
    else:
        how, first = "for reading and writing", f"borg list {quoted}"
    return (
        f"{store.name} ({store.location}) is mounted {how} at {path}\n"
        f"next:      {first}\n"
        f"when done: backup.py umount {shlex.quote(store.name)}   (returns when everything is uploaded)"
    )


def keep_mounted(runtime: Runtime, store: Store, read_write: bool) -> int:
    """The keeper's life: mounts, says so, and waits until somebody unmounts or a stop signal comes."""
    path = state_file(runtime, store)
    deadline = time.monotonic() + BUSY_TRIES * POLL_SECONDS  # others look whether it is locked, for a moment
    while (stream := lock_file(path)) is None:
        if time.monotonic() > deadline:
            return EXIT_BUSY  # without a word: whoever started us waits for the other one
        time.sleep(POLL_SECONDS / 4)
    with stream:
        write_state(stream, {})
        try:
            check = examine(S3Client(store, stop=runtime.stop), write=read_write)
            with contextlib.ExitStack() as undo:
                client = S3Client(store, check.region, PROVEN, runtime.stop)
                keep_store(runtime, client, check, read_write, stream, undo)
            code = EXIT_OK
        except BackupError as error:
            runtime.console.error(store.name, str(error))
            code = error.exit_code
        if facts := read_state(path):  # else whoever mounts it has seen what went wrong
            write_state(stream, {**facts, "code": code})
    return code


def keep_store(
    runtime: Runtime,
    client: S3Client,
    check: Preflight,
    read_write: bool,
    stream: IO[str],
    undo: contextlib.ExitStack,
) -> None:
    """Mounts, under the lease where it is a target, and waits for the end; `undo` gives the lease back."""
    store, state = client.store, Path(stream.name)
    request, log = state.with_suffix(REQUEST), state.with_suffix(LOG)
    for left_over in (request, log):
        left_over.unlink(missing_ok=True)
    lease = None
    if store.target and check.repository_state(store) is RepositoryState.READY:
        lease = undo.enter_context(held(runtime, client, MANUAL_WORK))
        if lease.enforced:
            remove_leftovers(runtime, store, lease, find_leftovers(client))
    with mounted(runtime, store, client.region, read_only=not read_write, lease=lease) as mount:
        wait_until_usable(runtime, mount)
        if store.target:
            warm_up(runtime, mount)
        if store.target and not lease:
            # `borg init` wants an empty folder: what is listed before the lease is there does not show it.
            mount.lease = undo.enter_context(held(runtime, client, MANUAL_WORK))
            mount.lease.add(mount.child)
        write_state(stream, {"writable": read_write})
        print(READY_LINE, flush=True)
        detach_output(log)
        mount.is_by_hand = read_write
        written, uploaded_at = until_unmounted(runtime, mount, client, request)
    if written:
        audit_upload(runtime, client, written)
    elif read_write and mount.log.complained_at > uploaded_at - COMPLAINT_SECONDS:
        raise BackupError(
            f"{store.name}: {store.location} may lack some of what was written: {mount.log.reason}",
            WRITE_AGAIN,
        )


def until_unmounted(
    runtime: Runtime, mount: Mount, client: S3Client, request: Path
) -> tuple[dict[str, int], float]:
    """Waits until the mount is gone or a stop signal comes, and uploads everything when somebody asks for it.

    Returns what they said that the repository holds, and when all was uploaded as far as it could be.
    """
    written, uploaded_at = {}, 0.0
    while mount.child.wait(POLL_SECONDS) is None and not runtime.stop.requested:
        if request.exists():
            written = json.loads(request.read_text(encoding="utf-8"))
            upload(runtime, mount, client, written)
            uploaded_at = time.monotonic()
            request.unlink()
    return written, uploaded_at


def upload(runtime: Runtime, mount: Mount, client: S3Client, written: Mapping[str, int]) -> None:
    """Waits until everything is uploaded, as far as it can be: at its end TigrisFS tries each file just once.

    `written` is what a repository holds. What was written elsewhere nobody knows: there TigrisFS must have
    had nothing to complain about for a while, after it was told to upload all of it. Raises Stuck.
    """
    if mount.holds_nothing:  # it is read-only
        return
    told = in_background(lambda: sync_folder(mount.path))

    def unsure() -> list[str]:
        return [] if told.done() and not mount.log.is_complaining else [mount.log.reason]

    def differences() -> list[str]:
        return upload_mistakes(written, listed_files(runtime, client))

    settle(runtime, mount, differences if written else unsure)
    mount.holds_nothing = False  # whoever works in it may go on


def sync_folder(folder: Path) -> None:
    """Has a file system write all that is below a folder. TigrisFS does, and tells of no error."""
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def detach_output(log: Path) -> None:
    """Sends all further output to a file, so that whoever reads ours sees its end."""
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    for fd in (1, 2):
        os.dup2(log_fd, fd)
    os.close(log_fd)


def request_upload(runtime: Runtime, store: Store, path: Path, request: Path) -> None:
    """Has the keeper upload everything; returns when it has, or gives up.

    It gets to know what a repository holds, to compare it with the bucket as long as it has the lease.
    """
    written = repository_files(runtime, store, path) if store.target else {}
    replace_file(request, json.dumps(written))
    while request.exists() and keeper_is_alive(runtime, store):
        runtime.stop.check()
        runtime.console.progress(store.name, "uploading what tigrisfs still holds")
        time.sleep(POLL_SECONDS / 4)


def detach_by_hand(runtime: Runtime, store: Store, path: Path) -> None:
    """Detaches a mount. Raises BackupError where somebody uses it."""
    for _ in range(BUSY_TRIES):  # the keeper has a file open, too, for a moment now and then
        reason = detach(runtime, path, lazy=False)
        if not reason or str(path) not in mount_table():
            return
        time.sleep(POLL_SECONDS)
    raise BackupError(
        f"{store.name}: cannot be unmounted: {reason}",
        f"Leave {path} (cd /), close what is open there and repeat.",
    )


def umount_manually(runtime: Runtime, store: Store) -> int:
    """Unmounts what `mount_manually` mounted; returns when everything is uploaded.

    Raises BackupError when that is not certain, and where another command has mounted it.
    """
    path, state = resolved(runtime.settings.mount_point(store)), state_file(runtime, store)
    while keeper_is_alive(runtime, store):  # which sees to it that this ends
        if str(path) in mount_table():  # at once, or when a keeper that has just begun has come so far
            request_upload(runtime, store, path, state.with_suffix(REQUEST))
            if keeper_is_alive(runtime, store):
                detach_by_hand(runtime, store, path)
        runtime.stop.check()
        runtime.console.progress(store.name, "uploading what tigrisfs still holds")
        time.sleep(POLL_SECONDS / 4)
    return tell_end(runtime, store)


def tell_end(runtime: Runtime, store: Store) -> int:
    """Tells, once, how a keeper that has ended fared, and frees what it left; returns its exit code.

    Raises BackupError where it was killed with a mount that was written to, or where it is not its mount.
    """
    path, state = resolved(runtime.settings.mount_point(store)), state_file(runtime, store)
    facts, was_mounted = read_state(state), str(path) in mount_table()
    if was_mounted and not remove_dead_mount(runtime, store, path):
        raise BackupError(f"{store.name}: another command has it mounted at {path}", "Let that end.")
    if stream := lock_file(state):  # else the next keeper has begun
        with stream:
            write_state(stream, {})
    if not facts:
        if not was_mounted:
            runtime.console.info(store.name, f"is not mounted at {path}")
        return EXIT_OK
    with contextlib.suppress(OSError):
        print(state.with_suffix(LOG).read_text("utf-8", "replace"), end="", file=sys.stderr)
    if "code" not in facts and facts["writable"]:
        raise BackupError(
            f"{store.name}: its mount at {path} was killed, and may have held what is not uploaded",
            WRITE_AGAIN,
        )
    code = facts.get("code", EXIT_OK)
    done = ", everything is uploaded" if facts["writable"] and code == EXIT_OK else ""
    runtime.console.info(store.name, f"is unmounted{done}")
    return code


# --------------------------------------------------------------------------------------------- Command line

KEEP_COMMAND = "_keep"


@dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    command: str
    names: tuple[str, ...] = ()  # all words that are no options
    options: Mapping[str, Any] = field(default_factory=dict)  # without their dashes


@dataclass(frozen=True)
class Takes:
    """How many words a command takes, and what these are."""

    least: int
    most: float
    what: str


NOTHING = Takes(0, 0, "no names")
A_STORE = Takes(1, 1, "one name: source or target-<name>")
STORES = Takes(0, math.inf, "names: source or target-<name>")
A_TARGET = Takes(1, 1, "one name, that of a target")
TARGETS = Takes(0, math.inf, "names of targets")


@dataclass(frozen=True)
class Command:
    """What can be typed: help, parsing and what is done come from here."""

    usage: str  # what follows the command's name
    about: str
    takes: Takes
    run: Callable[[Runtime, Arguments], int]
    declare: Callable[[OptionParser], object] = lambda _: None  # its options
    needs_source: bool = False  # whether the source has to be configured
    prints_data: bool = False  # on standard output, so that all else goes to standard error
    mistake: Callable[[Arguments], str] = lambda _: ""  # what else is wrong with a command line


def declare_read_write(parser: OptionParser) -> None:
    """The option of `mount`."""
    parser.add_argument(
        "--read-write", action="store_true", help="so that objects can be restored into the source"
    )


def declare_json(parser: OptionParser) -> None:
    """The option of what can answer to a program."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def declare_key_forms(parser: OptionParser) -> None:
    """The options of `key-export`."""
    forms = parser.add_mutually_exclusive_group()
    for option, what in (
        ("--paper", "to print, and to type in again"),
        ("--qr-html", "as HTML with a QR code"),
    ):
        forms.add_argument(option, dest="form", action="store_const", const=[option], default=[], help=what)


def mount_mistake(arguments: Arguments) -> str:
    """What is wrong with `mount NAME --read-write`: targets are always mounted so."""
    wrong = arguments.options["read_write"] and arguments.names != ("source",)
    return "`--read-write` goes with `mount source`" if wrong else ""


def a_value(text: str) -> str:
    """What an option is given, which may not be nothing: a script's variable that is not set, say."""
    if not text:
        raise argparse.ArgumentTypeError("needs a value; leave it out for the newest archive")
    return text


def declare_restore(parser: OptionParser) -> None:
    """The options of `restore`."""
    parser.add_argument("--archive", type=a_value, metavar="NAME", help="this one, instead of the newest")
    parser.add_argument(
        "--at",
        type=a_value,
        metavar="TIME",
        help="the newest one until then: local time, such as 2025-01-31T03:00; or with a zone, +01:00 or Z",
    )
    parser.add_argument("--to", metavar="DIR", help="restore into this folder")
    parser.add_argument("--to-bucket", metavar="BUCKET[:PREFIX]", help="restore into this bucket")
    parser.add_argument(
        "--metadata", metavar="FILE", help="write the objects' headers and tags there, a JSON object a line"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="what is there with other content, headers or tags, too"
    )
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be done")


def restore_mistake(arguments: Arguments) -> str:
    """What is wrong with the words of `restore`."""
    options = arguments.options
    if (options["to"] is None) == (options["to_bucket"] is None):
        return "`restore` takes either --to DIR or --to-bucket BUCKET[:PREFIX]"
    if options["archive"] and options["at"]:
        return "`restore` takes --archive NAME or --at TIME, not both"
    if options["to"] == "":
        return "--to: name a folder"
    if any(not path.strip("/") for path in arguments.names[1:]):
        return "`restore`: a PATH is an object's key or a folder of keys; leave it out to restore everything"
    try:
        end_of_time(options["at"] or "2025-01-31")
    except (ValueError, OverflowError):
        return f"--at: {options['at']!r} is no time; write such as 2025-01-31T03:00 or 2025-01-31"
    return ""


def chosen_destination(settings: Settings, location: str) -> Destination:
    """The bucket to restore into. Raises ConfigurationError."""
    bucket, _, prefix = location.partition(":")
    store = dataclasses.replace(settings.destination, bucket=bucket, prefix=prefix.strip("/"))
    mistakes = [f"--to-bucket: {mistake}" for mistake in path_mistakes(bucket, prefix)]
    mistakes += missing_settings(store) if bucket else []
    for target in settings.targets:
        mistakes += overlap_mistakes([target.store, store])
    if mistakes:
        raise ConfigurationError(mistakes)
    return store


def command_restore(runtime: Runtime, arguments: Arguments) -> int:
    """An archive, back where it can be used."""
    options, (name, *paths) = arguments.options, arguments.names
    order = Order(
        tuple(paths),
        options["archive"] or "",
        end_of_time(options["at"]) if options["at"] else None,
        Path(options["to"]) if options["to"] else None,
        chosen_destination(runtime.settings, options["to_bucket"])
        if options["to_bucket"] is not None
        else None,
        Path(options["metadata"]) if options["metadata"] else None,
        options["overwrite"],
        options["dry_run"],
    )
    return restore(runtime, chosen_target(runtime.settings, name), order)


def command_run(runtime: Runtime, arguments: Arguments) -> int:
    """A backup."""
    return run_backup(runtime, chosen_targets(runtime.settings, arguments.names))


def command_mount(runtime: Runtime, arguments: Arguments) -> int:
    """A mount that lives on; or, as its keeper, its life."""
    store, read_write = chosen_store(runtime.settings, arguments.names[0]), arguments.options["read_write"]
    if arguments.command == KEEP_COMMAND:
        return keep_mounted(runtime, store, read_write or store.target is not None)
    return mount_manually(runtime, store, read_write or store.target is not None)


def command_umount(runtime: Runtime, arguments: Arguments) -> int:
    """The end of such mounts, of all without names."""
    stores = [chosen_store(runtime.settings, name) for name in arguments.names]
    if not stores:
        stores = [store for store in runtime.settings.stores if is_kept(runtime, store)]
    if not stores:
        runtime.console.info("umount", "nothing is mounted")
    codes = [EXIT_OK]
    for store in stores:
        try:
            codes.append(umount_manually(runtime, store))
        except Stopped:
            raise
        except BackupError as error:  # the others are unmounted all the same
            runtime.console.error(store.name, str(error))
            codes.append(error.exit_code)
    return max(codes)


def command_list(runtime: Runtime, arguments: Arguments) -> int:
    """The archives."""
    targets = chosen_targets(runtime.settings, arguments.names)
    return list_archives(runtime, targets, arguments.options["json"])


def command_info(runtime: Runtime, arguments: Arguments) -> int:
    """What is known about targets."""
    return show_info(runtime, chosen_targets(runtime.settings, arguments.names), arguments.options["json"])


def command_maintain(runtime: Runtime, arguments: Arguments) -> int:
    """What repositories need now and then."""
    return maintain(runtime, chosen_targets(runtime.settings, arguments.names))


def command_key_export(runtime: Runtime, arguments: Arguments) -> int:
    """A repository's key."""
    target = chosen_target(runtime.settings, arguments.names[0])
    return export_key(runtime, target, arguments.options["form"])


def declare_verify(parser: OptionParser) -> None:
    """The options of `verify`."""
    parser.add_argument(
        "--archive", type=a_value, metavar="ARCHIVE", help="which one; the newest of BACKUP_LABEL by default"
    )
    parser.add_argument(
        "--sample",
        type=a_sample,
        default=DEFAULT_SAMPLE,
        metavar="N",
        help=f"how many objects are proved: a number, a share such as 1%%, or all (default {DEFAULT_SAMPLE})",
    )
    parser.add_argument("--seed", type=int, help="choose the same sample as when this seed was printed")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def a_sample(text: str) -> Sample:
    """A sample, for an option."""
    sample = Sample.parse(text)
    if not sample:
        raise argparse.ArgumentTypeError(SAMPLE_HELP)
    return sample


def command_verify(runtime: Runtime, arguments: Arguments) -> int:
    """A verification."""
    target, options = chosen_target(runtime.settings, arguments.names[0]), arguments.options
    seed = secrets.randbelow(10**9) if options["seed"] is None else options["seed"]
    return run_verify(runtime, target, options["archive"], options["sample"], seed, options["json"])


def declare_check(parser: OptionParser) -> None:
    """The options of `check`."""
    parser.add_argument(
        "--max-duration",
        type=a_duration,
        metavar="TIME",
        help="check for at most so long (such as 30m) from where the last such slice stopped: segments only",
    )
    parser.add_argument(
        "--verify-data", action="store_true", help="decrypt and verify each piece of data, too"
    )


def a_duration(text: str) -> int:
    """Seconds, for an option."""
    seconds = parse_duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError("write a number and a unit (s, m, h), such as 30m")
    return seconds


def check_mistake(arguments: Arguments) -> str:
    """What is wrong with a command line of `check`."""
    both = arguments.options["max_duration"] and arguments.options["verify_data"]
    return "`--verify-data` looks at everything: leave out `--max-duration`" if both else ""


def command_check(runtime: Runtime, arguments: Arguments) -> int:
    """A check."""
    target = chosen_target(runtime.settings, arguments.names[0])
    plan = CheckPlan(arguments.options["max_duration"])
    return run_check(runtime, target, plan, arguments.options["verify_data"])


def command_borg(runtime: Runtime, arguments: Arguments) -> int:
    """Any command of borg."""
    name, *words = arguments.names
    return run_borg(runtime, chosen_target(runtime.settings, name), words)


COMMANDS = {
    "run": Command(
        "[NAME...]",
        "back up to all targets, or to the named ones (this is what no command at all does)",
        TARGETS,
        command_run,
        needs_source=True,
    ),
    "check-config": Command(
        "",
        "check the configuration and ask every store whether it is usable; changes nothing",
        NOTHING,
        lambda runtime, _: check_config(runtime),
        needs_source=True,
    ),
    "list": Command(
        "[NAME...] [--json]",
        "show the archives of all targets, or of the named ones",
        TARGETS,
        command_list,
        declare_json,
        prints_data=True,
    ),
    "info": Command(
        "[NAME...] [--json]",
        "show size, last run, key and last check of all targets, or of the named ones",
        TARGETS,
        command_info,
        declare_json,
        prints_data=True,
    ),
    "maintain": Command(
        "[NAME...]",
        "prune, compact and check all targets, or the named ones; needs no source",
        TARGETS,
        command_maintain,
    ),
    "key-export": Command(
        "NAME [--paper|--qr-html]",
        "print the key of a repository: keep it, with the passphrase, elsewhere",
        A_TARGET,
        command_key_export,
        declare_key_forms,
        prints_data=True,
    ),
    "verify": Command(
        "NAME",
        "compare an archive with the live bucket, and prove the content of a sample of it",
        A_TARGET,
        command_verify,
        declare_verify,
        needs_source=True,
        prints_data=True,
    ),
    "check": Command(
        "NAME",
        "check a repository with `borg check`, whole or for some time; never repairs",
        A_TARGET,
        command_check,
        declare_check,
        mistake=check_mistake,
    ),
    "borg": Command(
        "NAME ARGS...",
        "run any borg command on a target's repository: borg first diff ARCHIVE1 ARCHIVE2",
        Takes(2, math.inf, "the name of a target and a command of borg"),
        command_borg,
        prints_data=True,
    ),
    "restore": Command(
        "NAME [PATH...]",
        "restore an archive, or parts of it: --to DIR, or --to-bucket BUCKET",
        Takes(1, math.inf, "the name of a target, and keys or folders of keys"),
        command_restore,
        declare_restore,
        mistake=restore_mistake,
    ),
    "mount": Command(
        "NAME",
        "mount `source` (read-only) or `target-<name>` below /data; returns when it is usable",
        A_STORE,
        command_mount,
        declare_read_write,
        mistake=mount_mistake,
    ),
    "umount": Command(
        "[NAME...]", "unmount it, or all; returns when everything is uploaded", STORES, command_umount
    ),
}
HIDDEN_COMMANDS = {KEEP_COMMAND: Command("NAME", "", A_STORE, command_mount, declare_read_write)}

GREETING = """\
s3borgbackup backs up an S3 bucket to other S3 buckets, deduplicated, compressed and encrypted on the way.
Environment variables configure it, and none of them is set. (Was `--env-file .env` forgotten?) Three steps:

  1. cp example.env .env     and put in your buckets, keys and passphrases
  2. docker run --rm --env-file .env s3borgbackup check-config
  3. docker run --rm --env-file .env --device /dev/fuse:/dev/fuse --cap-add SYS_ADMIN \\
         --security-opt apparmor:unconfined -v s3borgbackup-cache:/cache -v s3borgbackup-config:/config \\
         s3borgbackup

README.md, beside example.env, explains everything; `backup.py --help` shows all commands. What is missing:
"""

HELP = """\
Backs up an S3 bucket to one or more S3 buckets with BorgBackup.

commands (NAME is a target's name; `COMMAND --help` tells more):
{commands}

options:
  mount source --read-write   mount the source so that objects can be restored into it
  -h, --help                  this text
  --version                   the version

Configuration comes from environment variables; example.env and README.md explain each.
Any other word that is a program is run in our place: `docker run -it ... s3borgbackup ash` gives a shell.

examples:
  docker run --rm --env-file .env --device /dev/fuse:/dev/fuse --cap-add SYS_ADMIN \\
      --security-opt apparmor:unconfined s3borgbackup check-config
  backup.py restore first photos/2025 --to /restored      (a folder of the machine, mounted there)
  backup.py mount target-first && borg list /data/target-first && backup.py umount target-first

exit codes:
  0 all well   1 finished with warnings   2 something failed   75 another run works on the repository
  78 wrong configuration or usage   128+N stopped by signal N   `borg NAME`: borg's own
"""
USAGE_COLUMNS = 22  # of a command and what follows it, in the help


def help_text() -> str:
    """The answer to `--help`."""
    lines = []
    for name, command in COMMANDS.items():
        usage = f"{name} {command.usage}".rstrip()
        lines += [f"  {usage}"] if len(usage) >= USAGE_COLUMNS else []
        lines.append(f"  {usage if len(usage) < USAGE_COLUMNS else '':{USAGE_COLUMNS}}{command.about}")
    return HELP.format(commands="\n".join(lines))


def command_help(name: str) -> str:
    """The answer to `COMMAND --help`."""
    command = COMMANDS[name]
    parser = OptionParser()
    parser.prog, parser.usage, parser.description = name, f"{name} {command.usage}".rstrip(), command.about
    command.declare(parser)
    return parser.format_help()


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The command line's meaning. Raises ConfigurationError with what is wrong."""
    name, *words = argv or ["run"]
    command = {**COMMANDS, **HIDDEN_COMMANDS}.get(name)
    if command is None:
        raise ConfigurationError([f"unknown command {name!r}; {near(name, COMMANDS)} (see --help)"])
    options: dict[str, Any] = {}
    if name != "borg":  # whose words are for borg to judge
        options, words = parse_options(name, command, words)
    if not command.takes.least <= len(words) <= command.takes.most:
        raise ConfigurationError([f"`{name}` takes {command.takes.what} (see --help)"])
    arguments = Arguments(name, tuple(words), options)
    if mistake := command.mistake(arguments):
        raise ConfigurationError([mistake])
    return arguments


def parse_options(name: str, command: Command, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A command's options, and the other words. Raises ConfigurationError."""
    parser = OptionParser()
    command.declare(parser)
    known = [word for word in parser.format_help().replace(",", " ").split() if word.startswith("--")]
    parser.add_argument("names", nargs="*")
    try:
        found, unknown = parser.parse_known_intermixed_args(words)
    except ValueError as error:
        raise ConfigurationError([f"`{name}`: {error} (see `{name} --help`)"]) from None
    if unknown:
        hint = near(unknown[0].partition("=")[0], known) if known else f"`{name}` has none"
        raise ConfigurationError([f"unknown option {unknown[0]!r}; {hint} (see `{name} --help`)"])
    options = vars(found)
    return options, options.pop("names")


def chosen_targets(settings: Settings, names: Sequence[str]) -> list[Target]:
    """The targets with these names (all without names). Raises ConfigurationError for unknown ones."""
    known = {target.store.name: target for target in settings.targets}
    known.update({target.name: target for target in settings.targets})
    if unknown := [name for name in names if name not in known]:
        near_ones = [target.name for target in settings.targets]
        raise ConfigurationError(
            [f"there is no target {name!r}; {near(name, near_ones)}" for name in unknown]
        )
    chosen = {known[name].name: known[name] for name in names}
    return list(chosen.values()) if names else list(settings.targets)


def chosen_target(settings: Settings, name: str) -> Target:
    """The target called so. Raises ConfigurationError where there is none."""
    return chosen_targets(settings, [name])[0]


def chosen_store(settings: Settings, name: str) -> Store:
    """The store called `source`, `target-NAME` or just `NAME`. Raises ConfigurationError for other names."""
    known = {target.name: target.store for target in settings.targets}
    known.update({store.name: store for store in settings.stores})
    if name not in known:
        near_ones = [store.name for store in settings.stores]
        raise ConfigurationError([f"there is no store {name!r}; {near(name, near_ones)}"])
    if name == "source":
        settings.require_source()
    return known[name]


def is_ours(argv: Sequence[str]) -> bool:
    """Whether a command line is for us. `borg` is, unless one of borg's own commands or an option follows."""
    if argv[:1] == ["borg"]:
        return len(argv) > 1 and argv[1] not in BORG_COMMANDS and not argv[1].startswith("-")
    return not argv or argv[0].startswith("-") or argv[0] in COMMANDS or argv[0] in HIDDEN_COMMANDS


def other_program(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The program that `argv` names, such as a shell; nothing where it is a command of ours or not there."""
    return "" if is_ours(argv) else shutil.which(argv[0], path=environ.get("PATH")) or ""


# What process 1 becomes: a Python that has imported next to nothing takes 3 MB, ours 25. Its arguments: the
# child's process id, the numbers of the signals to pass on, the folder of the keepers' state files, and, if
# anything, what to run when the child leaves keepers behind, or something that they have to tell.
INIT = """\
import os, signal, sys

child, numbers, folder, umount = int(sys.argv[1]), sys.argv[2].split(), sys.argv[3], sys.argv[4:]

def pass_on(number, _):
    try:
        os.kill(child, number)
        if umount and number == signal.SIGTERM and os.isatty(0):
            os.kill(child, signal.SIGHUP)  # a shell that talks to a person ignores SIGTERM
    except ProcessLookupError:
        pass

def end():
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code

def look(path):
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return b""

def is_kept():
    for name in os.listdir("/proc"):
        if name.isdigit() and b"\\0KEEP_COMMAND\\0" in look(f"/proc/{name}/cmdline"):
            return True
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return any(look(f"{folder}/{name}") for name in names if name.endswith(".mount"))

for number in numbers:
    signal.signal(int(number), pass_on)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
code = end()
if umount and is_kept():
    child = os.posix_spawn(umount[0], umount, os.environ)
    last = end()
    code = code or last
sys.exit(code)
""".replace("KEEP_COMMAND", KEEP_COMMAND)


def be_init(argv: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """As PID 1: runs a child, passes signals on, reaps orphans, ends with the child's exit code.

    The kernel gives PID 1 no default signal actions, and every process whose parent has ended. The child is
    ourselves, or what `argv` names: when that ends, so does the container, and what it left mounted by hand
    must be unmounted first. A shell is left in the terminal's foreground process group, where Ctrl-C reaches
    it from the terminal; we are in one of our own, so that it reaches us once, from PID 1.
    """
    ourselves, numbers = [sys.executable, os.path.abspath(__file__)], list(STOP_SIGNALS)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until INIT can pass them on
    if program := other_program(argv, environ):
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # nobody could have it go on; a shell sees to its own
        if os.isatty(0):
            numbers.remove(signal.SIGINT)
        python_ignores = (signal.SIGPIPE, signal.SIGXFSZ)
        pid = os.posix_spawn(program, argv, dict(environ), setsigmask=(), setsigdef=python_ignores)
        last = [*ourselves, "umount"]
    else:
        last = []
        pid = os.posix_spawn(ourselves[0], [*ourselves, *argv], dict(environ), setpgroup=0, setsigmask=())
    passed_on = " ".join(str(signum.value) for signum in numbers)
    words = ["-ISc", INIT, str(pid), passed_on, str(state_folder()), *last]
    os.execve(sys.executable, [sys.executable, *words], dict(environ))


def told_at_once(argv: Sequence[str]) -> str:
    """The answer to what needs no configuration: help and version; nothing where something else is asked."""
    if argv[:1] in (["-h"], ["--help"], ["help"]):
        return help_text()
    if argv[:1] == ["--version"]:
        return f"s3borgbackup {VERSION}\n"
    if argv and argv[0] in COMMANDS and argv[0] != "borg" and {"-h", "--help"} & set(argv):
        return command_help(argv[0])
    return ""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the command line `argv`; prints errors, one a line, and returns the exit code."""
    if told := told_at_once(argv):
        print(told, end="")
        return EXIT_OK
    if os.getpid() == 1:
        return be_init(argv, environ)
    if program := other_program(argv, environ):
        os.execve(program, list(argv), dict(environ))
    mistakes: list[str] = []
    values = read_variables(environ, mistakes)
    reporting = parse_reporting(values, [])
    report = Report(secrets.token_hex(6), label_for_reports(values), datetime.now(UTC))
    report.command = argv[0] if argv else "run"
    console = Console(False, reporting.as_json, report.run_id, environ)
    console.secrets = secrets_in(values)
    threading.excepthook = lambda hook: console.defect("thread", hook.exc_value)
    stop = Stop()
    stop.install()
    reporter = Reporter(reporting, console, stop, report)
    code = perform(
        argv, environ, lambda needs_source: checked_settings(values, mistakes, needs_source), reporter
    )
    if report.command in TOLD_COMMANDS:
        reporter.end(code)
    return code


def perform(
    argv: Sequence[str],
    environ: Mapping[str, str],
    read_settings: Callable[[bool], Settings],
    reporter: Reporter,
) -> int:
    """Does what the command line says; prints errors and returns the exit code."""
    console, report = reporter.console, reporter.report
    arguments = Arguments("s3borgbackup")
    try:
        arguments = parse_arguments(argv)
        command = {**COMMANDS, **HIDDEN_COMMANDS}[arguments.command]
        if command.prints_data:
            console.leave_standard_output()
        if not any(name in environ or f"{name}_FILE" in environ for name in VARIABLES):
            console.plain(GREETING)
        settings = read_settings(command.needs_source)
        console.debug_is_shown = settings.debug
        report.configured = tuple(target.name for target in settings.targets)
        memory_mb = settings.memory_limit_mb or container_memory_mb()
        if arguments.command in TOLD_COMMANDS:
            reporter.start()
        return command.run(Runtime(settings, environ, console, reporter.stop, memory_mb, report), arguments)
    except ConfigurationError as error:
        for mistake in error.mistakes:
            console.error("configuration", mistake)
        return error.exit_code
    except BackupError as error:
        console.error(arguments.command, str(error))
        return error.exit_code
    except Exception as error:  # Python's own exit code for it, 1, means warnings here
        console.defect(arguments.command, error)
        return EXIT_FAILURE


def secrets_in(values: Mapping[str, str]) -> list[str]:
    """All that is secret in our variables' values; key ids, too."""
    found = [value for name, value in values.items() if name.endswith(("_KEY_ID", "_ACCESS_KEY", "_URL"))]
    with contextlib.suppress(ValueError, AttributeError):  # a mistake, which is told without quoting it
        for fields in json.loads(values.get("TARGET_SECRETS", "{}")).values():
            found += [value for value in fields.values() if isinstance(value, str)]
    return found


def redacted(text: str, secrets: Iterable[str]) -> str:
    """`text` without these secrets, whichever way Python may quote them, and without signatures."""
    forms = {form.strip() for secret in secrets for form in (secret, repr(secret)[1:-1], ascii(secret)[1:-1])}
    for form in sorted(forms - {""}, key=len, reverse=True):
        text = text.replace(form, "***")
    return re.sub(r"(Credential|Signature)=[^\s,'\"]+", r"\1=***", text)


def label_for_reports(values: Mapping[str, str]) -> str:
    """What a run is called towards others, also where the configuration is wrong."""
    label = values.get("BACKUP_LABEL", DEFAULT_LABEL)
    return DEFAULT_LABEL if label == UNREADABLE else label


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    code = main(sys.argv[1:], os.environ)
    with contextlib.suppress(OSError):  # whoever read it may be gone
        sys.stdout.flush()
    os._exit(code)  # a thread that hangs in a read of a dead mount must not keep us
