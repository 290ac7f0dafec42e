#!/usr/bin/env python3
"""Back up an S3 bucket to one or more S3 buckets with BorgBackup, the buckets mounted with TigrisFS.

What a run does: it reads the configuration from environment variables and reports every mistake in it at
once; asks S3 directly whether each store is there and usable; lists the source into a catalog, which is what
the archives are compared with; mounts the source read-only; and for each target, several side by side, takes
the lease that excludes other runs, makes the borg repository where it is new, clears what crashed runs left,
mounts the bucket, and creates an archive: borg is told object by object what to read, while threads read
ahead of it and ask for headers, and what no mount can show is fetched by our own client. Then it prunes,
compacts and checks where asked, unmounts, which returns only when all is uploaded, compares the bucket with
what borg wrote, and gives the lease back. At the end whoever is to hear of the run is told. One failing
target does not stop the others.
Nothing is waited for that makes no progress.
Whatever happens, mounts and processes are gone at the end, and the exit code tells how it went: 0 all well, 1
finished with warnings, 2 something failed, 75 another run was at work, 78 wrong configuration or usage, 128+N
stopped by signal N.

The sections of this file, each using only those above it:

    Constants       paths, and times with their reasons
    Errors          what a user is told: what happened, and what to do about it
    Configuration   environment variables -> Settings, or all the mistakes in them
    S3              request signing (pure), and a thin client: control, listings, headers, restoring
    Catalog         the objects of a source, an archive or a bucket, in an SQLite file
    Lease           the right to write to a repository: an object renewed under S3's conditions
    Processes       console, stop signals, the one place that starts child processes, deadlines, progress
    Mounts          TigrisFS: memory, command line, log, mounting, unmounting
    Read-ahead      threads that read the source before borg does, and keep several borgs together
    Borg            command lines (pure), what borg's log lines, exit codes and locks mean, one runner
    Audit           whether the bucket holds what borg wrote; what an archive lacks
    Notifications   how a run went, for a health check, a webhook and Prometheus
    Repository      preflight, the lease, leftovers; a repository opened for writing, or to read from
    Check           whether a repository is sound: `borg check` in slices, and what was checked when
    Backup          the catalog of a run, what feeds borg, one target, a whole run, the summary
    Operations      what a person does with backups: list, info, maintain, key-export, any borg command
    Restore         an archive, or a part of it, into a folder or a bucket
    Verification    whether an archive is good: compared with the live bucket, and a sample byte for byte
    Manual mode     mounts that outlive the command that made them
    Command line    the commands, `main`
"""

from __future__ import annotations

import argparse
import base64
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
import hmac
import http.client
import io
import itertools
import json
import math
import os
import queue
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
import struct
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
from typing import IO, Any, NoReturn, TypeVar

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
LEFTOVER_SECONDS = 86400  # after which what a run has left in /cache is nobody's
LOCK_WAIT_SECONDS = 10  # how long a lock that somebody else holds is waited for
KILL_SECONDS = 3  # for a killed process to be gone: longer only while it hangs in a system call
TELL_SECONDS = 20  # for all that is told of a run at its end, with all tries: it must not hold the next one
TELL_STOPPED_SECONDS = 2  # the same after a stop signal: `docker stop` grants 10 s for everything
TELL_TRY_SECONDS = 5  # for one try

CONNECT_TIMEOUT_SECONDS = 8  # for one connection attempt
ANSWER_TIMEOUT_SECONDS = 30  # for one read from a connection: some servers take long to list
CONNECT_PATIENCE_SECONDS = 8  # how long these are tried again: a wrong endpoint is to be told in seconds
SERVER_PATIENCE_SECONDS = 120  # how long 429 and 5xx answers are retried: such storms pass
PROVEN_PATIENCE_SECONDS = 300  # how long either is retried in mid-run
MAX_BACKOFF_SECONDS = 8.0

# TigrisFS: a memory limit needs read-ahead sizes that fit it (`memory_flags`).
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
WATCH_SECONDS = 0.05  # between looks at how far borg is in a large object
JOIN_SECONDS = 15  # how long a borg that is about to begin is waited for
HOLD_SECONDS = 30  # how long a fast borg is held for the sake of a slow one, at first

# Restoring.
RESTORE_THREADS = 128  # that write at the same time
WAITING_OBJECTS = 256  # small objects that may wait for a thread

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
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.message.rstrip('.')}. {self.hint}" if self.hint else self.message
        return " ".join(line.split())


class ConfigurationError(BackupError):
    """Mistakes in the configuration or in the command line, all of them at once."""

    exit_code = EXIT_CONFIGURATION

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = tuple(mistakes)


class StillRunning(BackupError):
    """Another run works on the repository: nothing is broken, it was only not our turn."""

    exit_code = EXIT_BUSY


class S3Error(BackupError):
    """An answer of the S3 server that is not success, or no answer (`status` 0); `code` is S3's own."""

    def __init__(self, message: str, hint: str, status: int, code: str) -> None:
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

LEASE_SECONDS = range(10, 3601)
# Below this, TigrisFS's read-ahead does not fit its cache: reads fail, and borg skips the objects.
MEMORY_MB = range(256, 1_000_001)

STORE_KEYS = ("endpoint", "path", "access_key_id", "secret_access_key", "region")
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
        return f"{self.prefix}/" if self.prefix else ""

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
        return "destination"

    def setting(self, key: str) -> str:
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
    source_metadata: bool  # asked for once, and not needed any more
    headers: bool  # whether objects' headers and tags are archived
    shrink_percent: int  # an archive that lost more of its objects than this is suspicious; 0: none is
    destination: Destination  # how to reach the bucket that is restored into

    @property
    def stores(self) -> tuple[Store, ...]:
        return (self.source, *(target.store for target in self.targets))

    def require_source(self) -> None:
        """Raises ConfigurationError where a source is needed, and the configuration has none."""
        if mistakes := missing_settings(self.source):
            raise ConfigurationError(mistakes)

    def mount_point(self, store: Store) -> Path:
        """Where `store` is mounted: `/data/source` or `/data/target-NAME`."""
        return self.data_dir / store.name


# A parser returns what a text means, or raises ValueError, which says what to write instead.


def whole_number(allowed: range, about: str = "") -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,12}", text) and int(text) in allowed:
            return int(text)
        raise ValueError(f"write a whole number from {allowed[0]} to {allowed[-1]}{about}")

    return parse


def one_of(**meanings: Any) -> Callable[[str], Any]:
    """A parser of these words, in any case, that returns what they mean."""

    def parse(text: str) -> Any:
        if text.lower() not in meanings:
            raise ValueError(f"write {' or '.join(meanings)}")
        return meanings[text.lower()]

    return parse


def parse_label(label: str) -> str:
    """A prefix of archive names."""
    if not re.fullmatch(r"[^\s/{}*?\[\]\\:\x00-\x1f\x7f]+", label):
        raise ValueError(
            "write letters, digits, '.', '_' and '-' only: the label is part of archive names and patterns"
        )
    if re.search(r"-[0-9]{4}(-|$)", label):
        raise ValueError(
            f"{label!r} could be taken for a shorter label with a date, and `prune` would confuse the two;"
            " leave out the dash before the four digits"
        )
    return label


def parse_data_dir(text: str) -> Path:
    if not text.startswith("/") or re.search(r"[{}]|::", text):
        raise ValueError("write an absolute path without braces, such as /data")
    return Path(text)


def parse_metrics_file(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("write an absolute path, such as /metrics/s3borgbackup.prom")
    return text


def parse_url(text: str) -> str:
    """An http(s) URL. A mistake does not quote it: it is a secret as a whole."""
    try:
        url = urllib.parse.urlsplit(text)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        (url.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if usable and not re.search(r"[\s\x00-\x1f\x7f\\]", text):
        return text
    raise ValueError("is not an http(s) URL; write one such as https://hc-ping.com/your-uuid")


NOTIFY_ON = ("failure", "warning", "always")
ON_OR_OFF = one_of(on=True, off=False)

# A variable's field in Settings, its parser, and its default. What is not here is a store's.
SETTINGS = {
    "BACKUP_LABEL": ("label", parse_label, DEFAULT_LABEL),
    "LOG_LEVEL": ("debug", one_of(info=False, debug=True), False),
    "DATA_DIR": ("data_dir", parse_data_dir, Path(DEFAULT_DATA_DIR)),
    "LEASE_TTL": ("lease_ttl_seconds", whole_number(LEASE_SECONDS, " (seconds)"), DEFAULT_LEASE_SECONDS),
    "LEASE_WAIT": ("lease_wait_seconds", whole_number(range(7 * 86400 + 1), " (seconds)"), None),
    "STALL_TIMEOUT": ("stall_seconds", whole_number(range(5, 86401), " (seconds)"), 900),
    "AUDIT": ("audit", ON_OR_OFF, True),
    "MEMORY_LIMIT_MB": (
        "memory_limit_mb",
        whole_number(MEMORY_MB, "; TigrisFS and borg are not safe with less"),
        None,
    ),
    "READ_AHEAD_THREADS": ("read_ahead_threads", whole_number(range(257), "; 0 turns reading ahead off"), 32),
    "PARALLEL_TARGETS": ("parallel_targets", whole_number(range(1, 65)), 4),
    "SOURCE_METADATA": ("source_metadata", one_of(false=False, true=True), False),
    "HEADERS": ("headers", ON_OR_OFF, True),
    "SHRINK_WARNING": ("shrink_percent", whole_number(range(100), " (percent); 0 turns the warning off"), 50),
}
# The same for Reporting.
REPORTING = {
    "METRICS_FILE": ("metrics_file", parse_metrics_file, ""),
    "LOG_FORMAT": ("as_json", one_of(text=False, json=True), False),
    "HEALTHCHECK_URL": ("healthcheck_url", parse_url, ""),
    "NOTIFY_URL": ("notify_url", parse_url, ""),
    "NOTIFY_ON": ("notify_on", one_of(**{word: word for word in NOTIFY_ON}), NOTIFY_ON[0]),
}
VARIABLES = (
    *(*SETTINGS, *REPORTING, "TARGETS", "TARGET_SECRETS"),
    *(f"SOURCE_{key.upper()}" for key in STORE_KEYS),
    *(f"RESTORE_{key.upper()}" for key in STORE_KEYS if key != "path"),
)
# Stands for a value whose file could not be read: that is reported once, and not again as missing.
UNREADABLE = "\0"
NOT_PLAIN = "holds a NUL, or what is not UTF-8; write it without"


def is_plain(text: str) -> bool:
    """Whether a program can be given this text at all."""
    return not re.search(r"[\x00\ud800-\udfff]", text)


def read_variables(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, str]:
    """Our variables' values, each from NAME or from the file that NAME_FILE names; empty ones are unset."""
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


def parse_fields(
    table: Mapping[str, tuple[str, Callable[[str], Any], Any]],
    values: Mapping[str, str],
    place: Callable[[str], str],
    mistakes: list[str],
) -> dict[str, Any]:
    """A value for each field in such a table as SETTINGS; `place` is where a user finds what gives it.

    What is wrong is appended to `mistakes`, and counts as not given.
    """
    fields = {}
    for name, (field_name, parse, default) in table.items():
        fields[field_name] = default
        if values.get(name, UNREADABLE) != UNREADABLE:
            try:
                fields[field_name] = parse(values[name])
            except ValueError as error:
                mistakes.append(f"{place(name)}: {error}")
    return fields


def parse_reporting(values: Mapping[str, str], mistakes: list[str]) -> Reporting:
    """Who is to be told of a run. What is wrong counts as not given: the others must still hear of it."""
    return Reporting(**parse_fields(REPORTING, values, str, mistakes))


def checked_settings(values: Mapping[str, str], mistakes: list[str], needs_source: bool = True) -> Settings:
    """The settings from plain values. Raises ConfigurationError with `mistakes` and all that are found.

    That the source's settings are missing is no mistake unless it is needed.
    """
    fields = parse_fields(SETTINGS, values, str, mistakes)
    parse_reporting(values, mistakes)
    source = parse_store(None, {key: values.get(f"SOURCE_{key.upper()}", "") for key in STORE_KEYS}, mistakes)
    targets = parse_targets(values, mistakes)
    mistakes += overlap_mistakes([source, *(target.store for target in targets)])
    destination = parse_destination(values, mistakes)
    if needs_source:
        mistakes[:0] = missing_settings(source)
    if mistakes:
        raise ConfigurationError(mistakes)
    return Settings(source=source, targets=targets, destination=destination, **fields)


def parse_store(target: str | None, given: Mapping[str, str], mistakes: list[str]) -> Store:
    """A store from its settings by their lower-case names."""
    bucket, _, prefix = given.get("path", "").partition(":")
    store = Store(
        target,
        given.get("endpoint", "").rstrip("/"),
        bucket,
        prefix.strip("/"),
        given.get("access_key_id", ""),
        given.get("secret_access_key", ""),
        given.get("region") or None,
    )
    mistakes += store_mistakes(given, store.setting)
    return store


def parse_destination(values: Mapping[str, str], mistakes: list[str]) -> Destination:
    """How to reach the bucket that is restored into: as the source, but for what RESTORE_... say."""
    shared = {key: values.get(f"SOURCE_{key.upper()}", "") for key in STORE_KEYS}
    own = {key: values[name] for key in STORE_KEYS if (name := f"RESTORE_{key.upper()}") in values}
    if len(own.keys() & {"access_key_id", "secret_access_key"}) == 1:
        mistakes.append(
            "RESTORE_ACCESS_KEY_ID, RESTORE_SECRET_ACCESS_KEY: one is missing; write both, or neither"
        )
    mistakes += store_mistakes(own, lambda key: f"RESTORE_{key.upper()}")
    given = {**shared, **own}
    region = given["region"] if "region" in own or "endpoint" not in own else ""
    keys = given["access_key_id"], given["secret_access_key"]
    missing = {key for key, value in given.items() if not value}
    return Destination(
        None, given["endpoint"].rstrip("/"), "", "", *keys, region or None, frozenset(own.keys() | missing)
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
STORE_HELP = {
    "endpoint": "write the S3 server's URL, such as https://s3.eu-central-1.amazonaws.com",
    "path": "write <bucket> or <bucket>:<prefix>",
    "access_key_id": "write the key's id",
    "secret_access_key": "write the key's secret",
}


def store_mistakes(given: Mapping[str, str], place: Callable[[str], str]) -> list[str]:
    """What is wrong with what is given of a store's settings; keys and regions are not quoted."""
    mistakes = {}
    for key, text in given.items():
        if text in ("", UNREADABLE):
            continue
        if key == "endpoint":
            mistakes[key] = endpoint_mistake(text)
        elif key == "path":
            mistakes[key] = path_mistake(text)
        elif key in HEADER_PARTS and not HEADER_PARTS[key].fullmatch(text):
            mistakes[key] = (
                "has a blank or a line end around it, or a character in it that is not printable ASCII;"
                " write it without (`printf %s`, where `echo` would add a line end)"
            )
    return [f"{place(key)}: {mistake}" for key, mistake in mistakes.items() if mistake]


def endpoint_mistake(endpoint: str) -> str:
    if re.match(r"(?i)https?://[0-9a-f]*:[0-9a-f]*:", endpoint):
        return "an IPv6 address goes in brackets, such as http://[2001:db8::1]:8333"
    try:
        url = urllib.parse.urlsplit(endpoint)
        port_is_wrong = url.port == 0
        (url.hostname or "").encode("idna")
    except ValueError as error:
        return f"is not a URL ({error}); {STORE_HELP['endpoint']}"
    is_http = url.scheme in ("http", "https") and url.hostname and not port_is_wrong
    if not is_http or re.search(r"[^!-~]|\\", endpoint):
        return f"is not an http(s) URL; {STORE_HELP['endpoint']}"
    if url.username is not None or url.path not in ("", "/") or url.query or url.fragment:
        return (
            "must be scheme, host and port only; the bucket goes into the path, keys into their own settings"
        )
    return ""


def path_mistake(path: str) -> str:
    bucket, _, prefix = path.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        hint = f"; did you mean {bucket.replace('/', ':', 1)!r}?" if "/" in bucket.strip("/") else ""
        return f"{bucket!r} is not a bucket name; {STORE_HELP['path']}{hint}"
    parts = prefix.strip("/").split("/")
    if prefix.strip("/") and any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        return "the prefix has a part that no folder can be named after (empty, '.', '..' or over 255 bytes)"
    return "the prefix holds a control character" if re.search(r"[\x00-\x1f\x7f]", prefix) else ""


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
        wrong = not name or not is_plain(name) or re.search(r"[/{}\x00-\x1f\x7f]|::|:$", name)
        if wrong or len(name.encode()) > MAX_NAME_BYTES:
            mistakes.append(
                f"TARGETS {json.dumps(name)}: this name cannot be a mount point;"
                " use letters, digits, '.', '_' and '-'"
            )
        if name in secret_values:
            targets.append(parse_target(name, given, secret_values[name], mistakes))
        else:
            mistakes.append(
                f"TARGET_SECRETS {json.dumps(name)}: is missing;"
                f" write an object with {', '.join(SECRET_KEYS)}"
            )
    return tuple(targets)


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
    """A JSON object's members. Raises ValueError where one is there twice: the first would be lost."""
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
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
    place = Store(name, "", "", "", "", "").setting
    texts = {}
    for key, value in {**given, **secret}.items():
        if key == "compact" or key not in TARGET_KEYS + SECRET_KEYS:
            continue
        if isinstance(value, str) and is_plain(value):
            texts[key] = value
        elif value is not None:
            mistakes.append(f"{place(key)}: {NOT_PLAIN if isinstance(value, str) else 'write a JSON string'}")
            texts[key] = UNREADABLE
    fields = parse_fields(TARGET_TEXTS, texts, place, mistakes)
    passphrase = texts.get("borg_passphrase", "")
    if fields["encryption"] == "none":
        pass  # it has no use for one
    elif not passphrase:
        words = "is missing; `openssl rand -base64 48` makes a good one (one line)"
        mistakes.append(f"{place('borg_passphrase')}: {words}")
    elif passphrase.endswith("\n") or "\r" in passphrase:
        words = "holds a line end, which borg would not take as part of it; remove it"
        mistakes.append(f"{place('borg_passphrase')}: {words}")
    compact = given.get("compact", True)
    if isinstance(compact, bool):
        compact = DEFAULT_COMPACT_PERCENT if compact else None
    elif not (isinstance(compact, int) and 0 <= compact <= 100):
        mistakes.append(f"{place('compact')}: write true, false, or a threshold in percent from 0 to 100")
    store = parse_store(name, texts, mistakes)
    mistakes += missing_settings(store)
    return Target(
        name, store, passphrase, must_match="encryption" in texts, compact_percent=compact, **fields
    )


def parse_encryption(text: str) -> str:
    if text not in ENCRYPTION_MODES:
        raise ValueError(f"unknown mode; {near(text, ENCRYPTION_MODES)}")
    return text


COMPRESSION = re.compile(
    r"(obfuscate,([1-6]|11[0-9]|12[0-3]|250),)?(auto,)*"
    r"(none|lz4|zstd(,0?[1-9]|,1[0-9]|,2[0-2])?|zlib(,0?[0-9])?|lzma(,0?[0-9])?)"
)
COMPRESSION_HELP = "write none, lz4, zstd[,1-22], zlib[,0-9], lzma[,0-9], or one of these after 'auto,'"


def parse_compression(specification: str) -> str:
    """Refuses what borg would refuse (`borg help compression`)."""
    if not COMPRESSION.fullmatch(specification):
        raise ValueError(COMPRESSION_HELP)
    return specification


class OptionParser(argparse.ArgumentParser):
    """Parses options; raises ValueError with what is wrong, where argparse would end the program."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


KEEP_OPTIONS = [
    names.split()
    for names in (
        *("--keep-last --keep-secondly", "--keep-minutely", "-H --keep-hourly", "-d --keep-daily"),
        *("-w --keep-weekly", "-m --keep-monthly", "--keep-13weekly", "--keep-3monthly", "-y --keep-yearly"),
    )
]
KEEP_HELP = "write such as --keep-daily=7 --keep-weekly=4 --keep-monthly=6"
PRUNE_HELP = {
    "-n": "it would prune nothing: leave `prune` out instead",
    "--dry-": "it would prune nothing: leave `prune` out instead",
    "": "borg's --keep-... options are meant; which archives are pruned follows from BACKUP_LABEL",
}


def keep_interval(text: str) -> str:
    """Checks borg's interval: a positive number of H(ours), d(ays), w(eeks), m(onths) or y(ears)."""
    if not re.fullmatch(r"0*[1-9][0-9]*[Hdwmy]", text):
        raise argparse.ArgumentTypeError("write a number and one of H, d, w, m, y, such as 2d")
    return text


def parse_prune(text: str) -> tuple[str, ...]:
    """The words of a target's `prune`; refused where borg 1.4 would refuse them, or they keep nothing."""
    parser = OptionParser()
    for names in KEEP_OPTIONS:
        parser.add_argument(*names, type=int, dest=names[-1], metavar="N")
    parser.add_argument("--keep-within", type=keep_interval, metavar="INTERVAL")
    parser.add_argument("-c", "--checkpoint-interval", type=int)
    for flag in ("--list", "--quick-stats", "--save-space", "--force", "--info"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("-s", "--stats", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    try:
        words = shlex.split(text)
        options, unknown = parser.parse_known_args(words)
    except ValueError as error:
        raise ValueError(f"{error}; {KEEP_HELP}") from None
    given = {
        name: value
        for name, value in vars(options).items()
        if name.startswith("--keep") and value is not None
    }
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} has no place here; {PRUNE_HELP.get(unknown[0][:6], PRUNE_HELP[''])}"
        )
    if words and not options.keep_within and not any(given.values()):
        raise ValueError(f"keeps nothing; {KEEP_HELP}")
    if len(given.keys() & {"--keep-13weekly", "--keep-3monthly"}) == 2:
        raise ValueError("--keep-13weekly and --keep-3monthly exclude each other; keep one")
    return tuple(words)


CHECK_PERIODS = {"day": 86400, "week": 7 * 86400, "month": 30 * 86400}  # in seconds
TIME_UNITS = {"s": 1, "m": 60, "h": 3600}  # in seconds


def parse_check(text: str) -> CheckPlan | None:
    """A target's `check`: a duration or `full`, and a period where it is not done in each run."""
    if not text:
        return None
    amount, slash, every = text.partition("/")
    seconds = None if amount == "full" else parse_duration(amount)
    if (seconds or amount == "full") and (every in CHECK_PERIODS if slash else True):
        return CheckPlan(seconds, every)
    raise ValueError(
        f"{text!r} is not understood;"
        " write such as 30m (at most 30 minutes in each run), 30m/week (once a week) or full/month;"
        " units are s, m, h, periods day, week, month"
    )


def parse_duration(text: str) -> int | None:
    """Seconds from `90s`, `30m` or `2h`; None where it is nothing like that."""
    found = re.fullmatch(r"0*([1-9][0-9]{0,5})([smh])", text)
    return int(found[1]) * TIME_UNITS[found[2]] if found else None


# As SETTINGS, for a target's settings that are texts.
TARGET_TEXTS = {
    "encryption": ("encryption", parse_encryption, DEFAULT_ENCRYPTION),
    "compression": ("compression", parse_compression, DEFAULT_COMPRESSION),
    "prune": ("prune", parse_prune, ()),
    "check": ("check", parse_check, None),
}


def overlap_mistakes(stores: Sequence[Store]) -> list[str]:
    """Stores that lie inside each other: a repository would be backed up into itself, or hold another one."""
    return [
        f"{second.setting('path')}: overlaps {first.setting('path')}"
        f" ({second.location} and {first.location} on one server); give each a place of its own"
        for first, second in itertools.combinations(stores, 2)
        if first.bucket
        and (endpoint_key(first), first.bucket) == (endpoint_key(second), second.bucket)
        and (first.key_prefix.startswith(second.key_prefix) or second.key_prefix.startswith(first.key_prefix))
    ]


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


def encode_key(key: str) -> bytes:
    """A key as S3 sorts them."""
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    """A key as all else has it."""
    return key.decode("utf-8", "surrogateescape")


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


def authorization(
    canonical: str, access_key_id: str, secret_access_key: str, when: datetime, region: str
) -> str:
    """Tasks 2 and 3: the value of the Authorization header, from the canonical request."""
    scope = f"{when:%Y%m%d}/{region}/s3/aws4_request"
    digest = hashlib.sha256(encode_key(canonical)).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{when:%Y%m%dT%H%M%SZ}\n{scope}\n{digest}"
    signature = hmac.digest(signing_key(secret_access_key, scope), text.encode(), "sha256").hex()
    names = canonical.split("\n")[-2]
    return f"AWS4-HMAC-SHA256 Credential={access_key_id}/{scope},SignedHeaders={names},Signature={signature}"


@functools.lru_cache(maxsize=8)  # it holds for a day
def signing_key(secret_access_key: str, scope: str) -> bytes:
    key = f"AWS4{secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


@dataclass(frozen=True)
class S3Object:
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

    @property
    def etag(self) -> str:
        """The ETag without quotes; empty where there is none."""
        return self.headers.get("etag", "").strip('"')

    @property
    def has_tags(self) -> bool:
        """Whether the object has tags, as the answer to GET and HEAD tells."""
        return int(self.headers.get("x-amz-tagging-count") or 0) > 0


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
    """Requests to one store: signed, path-style, retried. Safe to use from several threads.

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
        self._dated: Answer | None = None  # the last one that had a time
        self._patience, self._stop = patience or Patience(), stop or Stop()
        self._is_direct = False
        self.region = region or store.region or DEFAULT_REGION
        self._url = urllib.parse.urlsplit(store.endpoint)
        self._idle: list[http.client.HTTPConnection] = []

    @property
    def clock(self) -> datetime | None:
        """The server's clock, when it answered last."""
        return self._dated and self._dated.time("Date")

    def with_patience(self, patience: Patience, unstoppable: bool = False) -> S3Client:
        """The same client, with its open connections and what it has learned, but another patience."""
        twin = copy.copy(self)
        twin._patience = patience
        twin._stop = Stop() if unstoppable else self._stop
        return twin

    def direct(self) -> S3Client:
        """The same client for threads that nobody waits for: faster, but no stop signal ends a wait."""
        twin = copy.copy(self)
        twin._is_direct = True
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

    def list_objects(
        self, prefix: str, start_after: str = "", where: tuple[str, str] | None = None
    ) -> Iterator[S3Object]:
        """All objects below `prefix`, or those after a key or from a page on; one request for each 1,000.

        They are in key order, unless the server has another one (S3's directory buckets). Some servers ignore
        where a listing is to start.
        """
        where, last = ("start-after", start_after) if start_after else where, None
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
        return (self.get_span(key, *span) if span else self.request("GET", key)).body

    def download(self, key: str, size_bytes: int) -> Iterator[Answer]:
        """The content of an object of about this size, piece by piece, all of one version, and its headers.

        Raises S3Error, where it is overwritten meanwhile, too.
        """
        if size_bytes <= LARGEST_PIECE_BYTES:
            yield self.request("GET", key)
            return
        head = self.request("HEAD", key)
        size_bytes, version = int(head.headers["content-length"]), {"If-Match": head.headers.get("etag", "*")}
        for first in range(0, size_bytes, LARGEST_PIECE_BYTES):
            last = min(first + LARGEST_PIECE_BYTES, size_bytes) - 1
            answer = self.get_span(key, first, last, version)
            yield dataclasses.replace(
                answer, headers={**answer.headers, "etag": head.headers.get("etag", "")}
            )

    def tags(self, key: str) -> dict[str, str]:
        root = ElementTree.fromstring(self.request("GET", key, query=[("tagging", "")]).body)
        tags = root.iterfind(".//{*}Tag")
        return {tag.findtext("{*}Key", ""): tag.findtext("{*}Value", "") for tag in tags}

    def get_span(self, key: str, first: int, last: int, headers: Mapping[str, str] | None = None) -> Answer:
        answer = self.request("GET", key, headers={"Range": f"bytes={first}-{last}", **(headers or {})})
        whole = answer.status == 200 and first == 0  # an object that has no more
        if len(answer.body) == last - first + 1 and (
            whole or answer.headers.get("content-range", "").startswith(f"bytes {first}-{last}/")
        ):
            return answer
        words = f"the bytes {first}-{last} of {key!r} were asked for, and others came"
        raise self._error(answer.status, "RangeIgnored", words)

    def find(self, key: str) -> Answer | None:
        """An object; None where there is none.

        Who may list only what is below a prefix is told of an absent object that access is denied (AWS).
        """
        try:
            return self.request("GET", key)
        except S3Error as error:
            if error.code == "NoSuchKey":
                return None
            if error.status == 403 and not any(entry.key == key for entry in self.list_page(key, limit=1)[0]):
                return None
            raise

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
        if self._is_direct:
            self._stop.check()
            return exchange()
        future = in_background(exchange)
        while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
            if self._stop.requested and not concurrent.futures.wait([future], timeout=CLEANUP_SECONDS).done:
                self._stop.check()
        return future.result()

    def _exchange(
        self, method: str, key: str, query: Sequence[tuple[str, str]], extra: Mapping[str, str], body: bytes
    ) -> Answer:
        path = f"/{self.store.bucket}/{key}" if key else f"/{self.store.bucket}"
        when, payload_hash = datetime.now(UTC), hashlib.sha256(body).hexdigest()
        headers = {
            **extra,
            "Host": self._url.netloc,
            "x-amz-date": f"{when:%Y%m%dT%H%M%SZ}",
            "x-amz-content-sha256": payload_hash,
        }
        canonical = canonical_request(method, path, query, headers, payload_hash)
        keys = (self.store.access_key_id, self.store.secret_access_key)
        headers["Authorization"] = authorization(canonical, *keys, when, self.region)
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
        self._dated = answer if "date" in answer.headers else self._dated
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
    objects = []
    for entry in root.iter(f"{space}Contents"):
        listed = {element.tag[len(space) :]: element.text or "" for element in entry}
        key = decode(listed.get("Key", ""))
        try:
            modified = datetime.fromisoformat(listed.get("LastModified", ""))
            size_bytes = int(listed.get("Size", ""))
        except ValueError as error:
            raise ValueError(f"the listing's entry of {key!r} cannot be read ({error})") from None
        # S3's times are UTC, also where a server does not say so.
        modified = modified if modified.tzinfo else modified.replace(tzinfo=UTC)
        objects.append(S3Object(key, size_bytes, modified, listed.get("ETag", "").strip('"')))
    if root.findtext(f"{space}IsTruncated", "").strip().lower() != "true":
        return objects, None
    if token := root.findtext(f"{space}NextContinuationToken"):
        return objects, ("continuation-token", token)
    keys = [entry.key for entry in objects]
    if not keys or keys != sorted(keys):
        raise ValueError("a page of the listing is truncated, and does not say how it goes on")
    return objects, ("start-after", keys[-1])


def connection_to(url: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    """A connection that is not opened yet. Without a port, http.client takes one from an IPv6 address."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "", url.port or kind.default_port)


def xml_text(body: bytes, name: str) -> str:
    """The text of the first element `name` in an XML error document, empty where there is none."""
    if not body:
        return ""
    try:
        return (ElementTree.fromstring(body).findtext(f".//{{*}}{name}") or "").strip()
    except ElementTree.ParseError:
        return ""


def http_reason(status: int) -> str:
    return http.client.responses.get(status, f"HTTP status {status}")


# What is archived of an object's headers and can be given to another one, besides user metadata; with
# examples, as which a probe has them.
KEPT_HEADERS = dict(
    pair.split(": ")
    for pair in (
        *("content-type: text/css", "cache-control: no-store", "content-disposition: inline"),
        *("content-encoding: gzip", "content-language: la", "expires: Thu, 01 Jan 1970 00:00:00 GMT"),
        "x-amz-website-redirect-location: /",
    )
)
USER_METADATA = "x-amz-meta-"


def kept_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those headers that are an object's own, in their order."""
    own = KEPT_HEADERS.keys()
    return {name: text for name, text in headers.items() if name in own or name.startswith(USER_METADATA)}


def headers_of(answer: Answer) -> dict[str, str]:
    """Those of an object's headers that are its own, in S3's order and letters."""
    own = kept_headers(answer.headers)
    return {name: decode_key(text.encode("latin-1")) for name, text in own.items()}


def describe_fault(fault: Exception) -> str:
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
CATALOG_PAGE = 1000  # rows at a time, and objects of a listing
# An object is hidden by others below its name: their keys begin with it and a slash, and 0 comes after that.
# (What || makes is text, which compares as more than any BLOB.)
IS_COVERED = """
EXISTS (
    SELECT 1 FROM objects AS low
    WHERE low.key >= CAST(objects.key || '/' AS BLOB) AND low.key < CAST(objects.key || '0' AS BLOB)
)
"""
HIDE_COVERED = f"UPDATE objects SET is_shown = 0 WHERE is_shown AND {IS_COVERED}"
TAKE_HEADERS = """
UPDATE objects SET facts = (
    SELECT facts FROM last.objects AS old WHERE old.key = objects.key AND old.size = objects.size
    AND old.modified = objects.modified AND old.etag = objects.etag
)
"""
TAKE_ARCHIVES = """
INSERT OR REPLACE INTO archives SELECT * FROM last.archives AS old WHERE NOT EXISTS (
    SELECT 1 FROM main.archives AS new
    WHERE new.repository = old.repository AND new.label = old.label AND new.as_of >= old.as_of
)
"""
NOTE_ARCHIVE = """
INSERT INTO archives VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    objects = coalesce(excluded.objects, objects), as_of = coalesce(excluded.as_of, as_of)
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
    is_long = any(len(encode_key(part)) > NAME_MAX_BYTES for part in name.split("/"))
    return not (is_long or UNREPRESENTABLE.search(name) or NOT_IN_XML.search(name) or "\r" in name)


def pages(rows: Iterable[Result]) -> Iterator[list[Result]]:
    """Rows, as many at a time as is good for a database."""
    rows = iter(rows)
    while page := list(itertools.islice(rows, CATALOG_PAGE)):
        yield page


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
    def _told(self, path: Path | None = None) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                hint = DISK_HELP if "full" in str(error) else TRY_AGAIN
                raise CatalogError(f"the catalog {path or self.path}: {error}", hint) from error

    def execute(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._told():
            return self._db.execute(sql, values).fetchall()

    def add(self, objects: Iterable[S3Object]) -> None:
        """Takes objects in; one with a key that is there already replaces it."""
        self.insert("objects", ((encode_key(each.key), *self._values(each)) for each in objects))

    def insert(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Takes rows in."""
        for page in pages(rows):
            with self._told():
                marks = ", ".join("?" * len(page[0]))
                self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", page)

    @staticmethod
    def _values(each: S3Object) -> tuple[Any, ...]:
        modified = (each.last_modified - EPOCH) // timedelta(microseconds=1)
        facts = None if each.facts is None else json.dumps(each.facts)
        return each.size_bytes, modified, each.etag, each.is_shown, facts

    def rows(self, where: str = "1", values: Sequence[Any] = (), after: str = "") -> Iterator[S3Object]:
        """The objects behind the key `after` for which `where` holds, a condition of SQL, in key order."""
        sql = f"SELECT * FROM objects WHERE key > ? AND ({where}) ORDER BY key LIMIT ?"
        last = encode_key(after)
        while page := self.execute(sql, (last, *values, CATALOG_PAGE)):
            yield from itertools.starmap(self._object, page)
            last = page[-1][0]

    @staticmethod
    def _object(key: bytes, size_bytes: int, modified: int, etag: str, is_shown: int, facts: str) -> S3Object:
        when = EPOCH + timedelta(microseconds=modified)
        known = None if facts is None else json.loads(facts)
        return S3Object(decode_key(key), size_bytes, when, etag, bool(is_shown), known)

    def find(self, key: str) -> S3Object | None:
        """An object; None where there is none."""
        found = self.execute("SELECT * FROM objects WHERE key = ?", [encode_key(key)])
        return self._object(*found[0]) if found else None

    def total(self, where: str = "1", values: Sequence[Any] = ()) -> tuple[int, int]:
        """The number of the objects for which `where` holds, and of their bytes."""
        return self.execute(f"SELECT count(*), coalesce(sum(size), 0) FROM objects WHERE {where}", values)[0]

    def unlistable(self) -> set[str]:
        """The folders ("" or with a slash at the end) that TigrisFS cannot list, when all objects are in.

        Besides those with a key that no XML holds, these are the ones that begin shortly before such a key:
        it first asks for a page of all that follows a folder's name (`slurpOnce` in core/dir.go).
        """
        found, recent, previous = set(), deque[tuple[int, str]](), None
        if not any(NOT_IN_XML.search(each.key) for each in self.rows("NOT is_shown")):
            return found
        for number, each in enumerate(self.rows()):
            for folder in ["", *(each.key[: match.end()] for match in re.finditer("/", each.key))]:
                if previous is None or not previous.startswith(folder):
                    recent.append((number, folder))
            while recent and recent[0][0] < number - CATALOG_PAGE:
                recent.popleft()
            if bad := [*NOT_IN_XML.finditer(each.key)]:
                found.update(folder for _, folder in recent)
                found.update(each.key[: each.key.rfind("/", 0, match.start()) + 1] for match in bad)
            previous = each.key
        return found

    def hide(self, unlistable: Iterable[str]) -> None:
        """Notes what no mount shows, though the keys would do, when all are in."""
        for folder in unlistable:
            key = encode_key(folder)
            end = key[:-1] + b"0" if key else b"\xff" * 5
            self.execute(HIDE_FOLDER, {"folder": key, "end": end, "length": len(key) + 1})
        self.execute(HIDE_COVERED)

    def open_last(self, path: Path) -> None:
        """Opens another one beside this, and takes over what is known of archives."""
        with self._told(path):
            self._db.commit()
            self._db.execute("ATTACH ? AS last", [f"{path.absolute().as_uri()}?mode=ro&immutable=1"])
            for pragma, right in (("application_id", CATALOG_ID), ("user_version", CATALOG_VERSION)):
                [[found]] = self._db.execute(f"PRAGMA last.{pragma}")
                if found != right:
                    raise sqlite3.DatabaseError(f"it is not of this version ({pragma} {found})")
            if (found := self._db.execute("PRAGMA last.quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            self._db.execute(TAKE_ARCHIVES)

    def know_headers(self) -> None:
        """Takes over what the last one knows of objects that have not changed."""
        self.execute(TAKE_HEADERS)

    def close_last(self) -> None:
        """Closes the other one."""
        with contextlib.suppress(CatalogError), self._told():
            self._db.commit()
            self._db.execute("DETACH last")

    def note_archive(
        self, repository: str, label: str, objects: int | None, as_of: float | None = None
    ) -> None:
        """Notes of the newest archive of a label how many objects it has, and of when; None: as before."""
        self.execute(NOTE_ARCHIVE, [repository, label, objects, as_of])

    def close(self) -> None:
        """Ends it, all written."""
        with contextlib.suppress(sqlite3.Error):
            self._db.interrupt()  # somebody who was stopped may have left a long query
        with self._told():
            self._db.commit()
            self._db.close()


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
OWN_FOLDER = "data/s3borgbackup/"
MANIFEST_PATH = f"{OWN_FOLDER}manifest.jsonl"


def odd_path(key: str) -> str:
    """Where an archive holds an object that no mount can show."""
    return f"{OWN_FOLDER}objects/{hashlib.sha256(encode_key(key)).hexdigest()[:32]}"


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


class DeadMansSwitch:
    """Has the kernel kill this process, and with it its children, unless the moment is put off in time.

    A program that was frozen (docker pause, SIGSTOP, a laptop's lid) cannot know it when it goes on, and
    would write on before it looks at a clock. The kernel's SIGKILL comes while it is frozen. Children die
    with us, by PR_SET_PDEATHSIG.
    """

    def __init__(self) -> None:
        self._timer = ctypes.c_void_p()
        event = struct.pack("Pii48x", 0, signal.SIGKILL, 0)  # `struct sigevent` of <signal.h>; SIGEV_SIGNAL
        if LIBC.timer_create(time.CLOCK_BOOTTIME, event, ctypes.byref(self._timer)):
            raise BackupError(
                f"timer_create(2) failed: {os.strerror(ctypes.get_errno())}",
                "Let the container's seccomp profile allow it.",
            )

    def arm(self, at_boot_seconds: float) -> None:
        """Puts the moment off; 0 disarms."""
        whole = int(at_boot_seconds)
        # `struct itimerspec` of <time.h>: no interval; seconds and nanoseconds
        spec = (ctypes.c_long * 4)(0, 0, whole, int((at_boot_seconds - whole) * 1e9))
        LIBC.timer_settime(self._timer, TIMER_ABSTIME, spec, None)

    def close(self) -> None:
        LIBC.timer_delete(self._timer)


class NoSwitch(DeadMansSwitch):
    """For who only reads under a lease: going on late harms nobody."""

    def __init__(self) -> None:
        pass

    def arm(self, at_boot_seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its object says, and how that was when we looked at it."""

    run_id: str
    host: str
    purpose: str
    since: str
    ttl_seconds: int
    etag: str = ""
    age_seconds: float = 0.0  # since its last renewal, by the server's clock

    def body(self, number: int) -> bytes:
        """The object's content. No two writes are alike, as equal content would have equal ETags."""
        fields = {name: value for name, value in vars(self).items() if name not in ("etag", "age_seconds")}
        return json.dumps({**fields, "write": number}).encode()

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
        return f"{self.purpose} on {self.host}, since {self.since}"

    @property
    def has_expired(self) -> bool:
        return self.age_seconds > self.ttl_seconds + LEASE_MARGIN_SECONDS


def look_at_lease(client: S3Client) -> Holder | None:
    """The lease object as it is now; None where there is none. Raises S3Error."""
    answer = client.find(f"{client.store.key_prefix}{LEASE_NAME}")
    if not answer:
        return None
    now, then = answer.time("Date"), answer.time("Last-Modified")
    age = (now - then).total_seconds() if now and then else 0.0
    return dataclasses.replace(
        Holder.parse(answer.body), etag=answer.headers.get("etag", ""), age_seconds=age
    )


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
        self._members: list[Child] = []
        self._lock, self.is_over = threading.RLock(), threading.Event()
        self._switch = switch or DeadMansSwitch()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._renew, self._guard)
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
            limit, is_alive = wait_seconds, False
            if wait_seconds is None:
                limit, is_alive = current.ttl_seconds + 10 * LEASE_MARGIN_SECONDS, current.etag != first.etag
            if waited >= limit or is_alive:
                raise StillRunning(
                    f"{self._client.store.name}: another run works on this repository: {current}",
                    "Let it finish, or wait for it with LEASE_WAIT.",
                )
            if current is first:
                who = "its first try" if current.run_id == self._holder.run_id else current
                self._notice(f"the repository is in use: {who}; waiting to see whether that lives")
            self._pause(min(2.0, current.ttl_seconds / 10))
        if self.enforced:  # it is renewed from now on: to find out whether that is so may take its time, too
            self._arm()
            for thread in self._threads:
                thread.start()
            self.enforced = self._is_enforced()
        if self.enforced:
            return
        self._end_threads()
        self._switch.arm(0)
        self.suspended = False
        self._notice(
            "this S3 server does not enforce conditional writes (If-None-Match, If-Match), so that runs"
            " cannot exclude each other: see to it that only one works on the repository at a time"
        )
        with contextlib.suppress(S3Error):
            self._client.delete(self._key)

    def _try_to_take(self) -> Holder | None:
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
            ours = self._holder
            is_ours = (current.run_id, current.since) == (ours.run_id, ours.since)  # a run may try twice
            if not (is_ours or current.has_expired):
                return current
            if self._write(self._client, {"If-Match": current.etag}):
                if not is_ours:
                    self._notice(f"an expired lease is taken over: {current}")
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

    def add(self, member: Child) -> None:
        """Has `member` stopped and killed with the lease."""
        with self._lock:
            self._members.append(member)
            if self.lost:
                member.send(signal.SIGKILL)
            elif self.suspended:
                member.hold(HELD_BY_LEASE)

    def write(self, request: Callable[[S3Client], object]) -> None:
        """Has `request` write under the lease, and again while S3 fails. Raises S3Error, Stuck, Stopped."""
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

    def _renew(self) -> None:
        ttl = self._holder.ttl_seconds
        while not self.is_over.wait(max(ttl / 20, self._valid_until - ttl * 3 / 4 - boot_seconds())):
            try:
                if not self._write(self._renewing_client, {"If-Match": self._etag}):
                    current = look_at_lease(self._renewing_client)
                    if current is None or current.run_id != self._holder.run_id:
                        who = current or "its object was deleted"
                        self._lose(f"the lease on the repository was lost ({who})")
                        return
                    self._write(self._renewing_client, {"If-Match": current.etag})
            except S3Error as error:
                self._trouble = str(error)
                continue
            with self._lock:
                self._arm()
                if self.suspended and self._is_fresh:
                    self.suspended = False
                    self._notice("the lease is renewed: the work goes on")
                    for member in self._members:
                        member.let_go(HELD_BY_LEASE)

    def _guard(self) -> None:
        """The guarding thread's life: a renewal may be waiting for S3 when the lease runs out."""
        while not self.is_over.wait(GUARD_SECONDS):
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
            self.is_over.set()

    def _end_threads(self) -> None:
        self.is_over.set()
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
        """`debug` shows further lines; colours are for an `environ` that allows them."""
        self.debug_is_shown = debug
        self.as_json = as_json
        self.troubles = Troubles()
        self.secrets: Collection[str] = ()  # that no traceback may show
        self._run_id = run_id
        # https://no-color.org
        unwelcome = as_json or environ is None or environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
        self._colours = not unwelcome
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
        self._print("info", name, text, event, **numbers)

    def debug(self, name: str, text: str) -> None:
        if self.debug_is_shown:
            self._print("debug", name, text)

    def warning(self, name: str, text: str, event: str = "message", /, **numbers: Any) -> None:
        self._print("warning", name, text, event, **numbers)

    def error(self, name: str, text: str, event: str = "message", /, **numbers: Any) -> None:
        self._print("error", name, text, event, **numbers)

    def defect(self, name: str, error: BaseException) -> None:
        """An exception that nobody foresaw. Its words may be anybody's, and quote what is secret."""
        trace = redacted("".join(traceback.format_exception(error)), self.secrets)
        self.error(name, DEFECT, "defect", traceback=trace)
        if not self.as_json:
            print(trace, end="", file=sys.stderr)

    def plain(self, text: str) -> None:
        for line in text.splitlines():
            self._print("info", "", line)

    def progress(self, name: str, text: str, /, **numbers: Any) -> None:
        """How far something is: a live line on a terminal, elsewhere a line every PROGRESS_SECONDS."""
        now = time.monotonic()
        if not self._terminal:
            if now >= self._progress_due.setdefault(name, now + PROGRESS_SECONDS):
                self._progress_due[name] = now + PROGRESS_SECONDS
                self.info(name, text, "progress", **numbers)
            return
        with self._lock, contextlib.suppress(OSError):
            self._latest_progress[name] = now, text
            shown = {  # one line for all that are at work; who has been silent for a while is so no more
                name: text
                for name, (when, text) in self._latest_progress.items()
                if now - when < LIVE_SECONDS
            }
            width = (shutil.get_terminal_size().columns - 1) // len(shown)
            parts = [printable(f"[{name}] {text}")[: width - 1].ljust(width) for name, text in shown.items()]
            print(f"\r\033[K{''.join(parts).rstrip()}", end="", file=self._stream, flush=True)
            self._progress_is_shown = True

    def _print(self, level: str, name: str, text: str, event: str = "message", /, **numbers: Any) -> None:
        if level in COLOURS:
            self.troubles.add(level, name, text)
        stream = sys.stderr if level in COLOURS else self._stream
        now = datetime.now(UTC)
        if self.as_json:
            line = json_line(now, level, self._run_id, name, event, text, numbers)
        else:
            label = f"{level}: " if level in COLOURS else ""
            if label and self._colours and stream.isatty():
                label = f"\033[{COLOURS[level]}m{level}:\033[0m "
            clock = "" if self._terminal or not name else f"{now:%Y-%m-%dT%H:%M:%SZ} "
            line = f"{clock}{f'[{name}] ' if name else ''}{label}{printable(text)}"
        with self._lock, contextlib.suppress(OSError):  # a terminal that was closed must not end a backup
            if self._progress_is_shown:
                print("\r\033[K", end="", file=self._stream, flush=True)
                self._progress_is_shown = False
            print(line, file=stream, flush=True)


COLOURS = {"warning": 33, "error": 31}  # yellow and red (ECMA-48, "Select Graphic Rendition")


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
        self.more = 0
        self._named: dict[str, list[tuple[str, str]]] = {"error": [], "warning": []}

    def add(self, level: str, name: str, text: str) -> None:
        if len(self._named[level]) < MAX_TROUBLES:
            self._named[level].append((name, " ".join(text.split())))
        else:
            self.more += 1

    def about(self, level: str, names: Iterable[str]) -> list[str]:
        names = set(names)
        return [text for name, text in self._named[level] if name in names]

    def names(self) -> list[str]:
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
        self.signals: list[int] = []

    def install(self) -> None:
        """Takes over SIGTERM, SIGINT and SIGHUP. Only the main thread may call this."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda signum, _frame: self.signals.append(signum))

    @property
    def requested(self) -> bool:
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
    settings: Settings
    environ: Mapping[str, str]
    console: Console
    stop: Stop
    memory_mb: int  # what TigrisFS's caches are sized by
    report: Report

    @property
    def run_id(self) -> str:
        return self.report.run_id


PIPES = {
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "start_new_session": True,
}


class Child:
    """A running child process in a session of its own, so that only we send it signals.

    Its output is read to the end by threads that hand every line to `on_output` or `on_error`. Or `consume`
    reads its standard output as it is, in a thread of its own: then it has ended when that thread has, too.
    Where that leaves early the child finds its pipe closed.
    """

    is_watched = True  # whether it is stuck when nothing moves for long

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        on_output: Callable[[str], None] | None,
        on_error: Callable[[str], None] | None,
        pass_fds: Sequence[int] = (),
        dies_with_us: bool = True,
        consume: Callable[[IO[bytes]], None] | None = None,
        **how: Any,
    ) -> None:
        """Starts the process, with pipes unless `how` tells Popen otherwise. Raises BackupError."""
        try:
            self._process = subprocess.Popen(
                argv,
                env=dict(env),
                pass_fds=pass_fds,
                # Without this a SIGKILL of ours would leave a borg behind that goes on writing.
                preexec_fn=die_with_parent if dies_with_us else None,
                **(how or PIPES),
            )
        except OSError as error:
            raise BackupError(
                f"cannot start {argv[0]}: {error.strerror}", "The image brings it; see the README."
            ) from None
        self._holders: set[str] = set()
        self._hold_lock = threading.Lock()
        self._ended = threading.Event()
        lines = [(self._process.stdout, None if consume else on_output), (self._process.stderr, on_error)]
        self._readers = [
            threading.Thread(target=read_lines, args=pair, daemon=True) for pair in lines if pair[1]
        ]

        def work() -> None:
            with self._process.stdout as stream:
                consume(stream)

        self.consumed = in_background(work) if consume else None
        for thread in (*self._readers, threading.Thread(target=self._reap, daemon=True)):
            thread.start()

    def _reap(self) -> None:
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=POLL_SECONDS * 5)  # a grandchild may hold the pipe open
        self._ended.set()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, seconds: float) -> int | None:
        """The exit code (128+N for signal N), or None when it is not done after `seconds`."""
        if not self._ended.wait(seconds):
            return None
        if self.consumed and concurrent.futures.wait([self.consumed], timeout=seconds).not_done:
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
        return why in self._holders

    def kill(self) -> bool:
        """Ends the process; False when it hangs in a system call, and ends when that mount is gone."""
        self.send(signal.SIGKILL)
        return self.wait(KILL_SECONDS) is not None


class ForegroundChild(Child):
    """A child with our own standard streams, and with the terminal where there is one: a person talks to it.

    It is the terminal's foreground process group, as a shell's command would be: it may read from the
    terminal, and Ctrl-C reaches it alone. Ctrl-Z it ignores, as nobody could have it go on. Only the main
    thread may start it.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> None:
        self.is_watched = not os.isatty(0)  # it may wait for a person, who can press Ctrl-C
        before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # children inherit this
        try:
            super().__init__(argv, env, None, None, pass_fds, process_group=0)
        finally:
            signal.signal(signal.SIGTSTP, before)

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
    """How long no meter has moved, whose numbers grow by 1 or more where there is progress."""

    def __init__(self, meters: Sequence[Callable[[], float]]) -> None:
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
        """About `beside` see Mount.meter; where it is not `hasty`, only `seconds` count."""
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
        if not controllers:
            folder, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        path = Path(group.lstrip("/"))
        for part in (path, *path.parents):
            with contextlib.suppress(OSError, ValueError):  # `max`, or not shown to us
                limits.append(int((root / folder / part / name).read_text(encoding="ascii")))
    return min(limits) // 1_000_000


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


def read_ahead_bytes(cache_mb: int) -> int:
    """How far ahead of borg the source is read, by what tigrisfs may cache of it.

    TigrisFS drops what was not used for the longest time. What was read ahead is older than what borg has
    read meanwhile, so that its cache needs room for both, and for requests under way: with two fifths of it
    a large object was fetched 1.6 times.
    """
    return cache_mb * 1024 * 1024 // 4


def piece_bytes(window_bytes: int) -> int:
    """How much of an object one thread reads ahead at a time, and TigrisFS with one request."""
    return min(max(window_bytes // 8, SMALLEST_PIECE_BYTES), LARGEST_PIECE_BYTES) // 4096 * 4096


def tigrisfs_command(
    store: Store,
    region: str,
    mount_point: Path,
    read_only: bool,
    sizes: Sequence[str],
) -> list[str]:
    """The command line that mounts `store`, with `memory_flags`; its keys go through the environment."""
    return [
        "tigrisfs",
        "-f",  # in the foreground: a daemon cannot be waited for, and what it still uploads is lost
        *("--log-format", "json", "--no-log-color", "--print-stats", "0s"),
        *("--endpoint", store.endpoint, "--region", region),
        "--no-detect",  # it asks for an absent object: who may use a prefix only is told 403 (AWS)
        "--no-expire-multipart",  # else it deletes other programs' multipart uploads
        "--disable-xattr",  # it would ask for each object's headers
        *sizes,
        *("--stat-cache-ttl", METADATA_TTL),
        *(*READ_RETRIES, "--retry-interval", WRITE_RETRY),
        *("--http-timeout", READ_TIMEOUT if read_only else WRITE_TIMEOUT),
        *("--max-parallel-parts", PARALLEL_PARTS),
        *(("-o", "ro") if read_only else ()),
        store.location,
        str(mount_point),
    ]


def memory_flags(store: Store, cache_mb: int) -> list[str]:
    """TigrisFS's flags for its cache of a store's data, and for what it reads ahead by itself, in safe sizes.

    With its defaults (5 MB, and 100 MB of a file that is read for long) a limit below 300 MB makes reads fail
    with ENOMEM, which borg takes for an unreadable file, or blocks `borg compact` for good. A single reader
    was seen to have requests for 5.5 times --read-ahead-large in the queue, each of which reserves its memory
    before it waits for more: when they come to the limit while a file is written, nothing moves any more.
    """
    if store.target is None:
        piece_kb = piece_bytes(read_ahead_bytes(cache_mb)) // 1024
        ahead_kb, large_kb, part_kb = piece_kb, piece_kb, piece_kb
    else:
        large_kb = cache_mb * 1024 // 16
        ahead_kb, part_kb = 1024, large_kb // 2
    sizes = {
        "--memory-limit": cache_mb,
        "--read-ahead": ahead_kb,
        "--read-ahead-large": large_kb,
        "--read-ahead-parallel": part_kb,
    }
    return [word for flag, number in sizes.items() for word in (flag, str(number))]


def tigrisfs_environment(store: Store, environ: Mapping[str, str], cache_mb: int) -> dict[str, str]:
    """What tigrisfs gets to see: its own key pair, and no configuration file of somebody else."""
    # Where memory is short, Go collects garbage before its heap is larger than that: 14 MB less were seen.
    spare = {"GOMEMLIMIT": f"{cache_mb + 8}MiB"} if cache_mb == SMALLEST_CACHE_MB else {}
    return minimal_environment(
        {**environ, "HOME": "/nonexistent"},
        (),
        **spare,
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
    """TigrisFS's log. Warnings and errors are shown under the mount's name, the rest when debugging."""

    def __init__(self, name: str, console: Console) -> None:
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
        now = time.monotonic()
        match = REFUSED_WRITE.match(message)
        if match and int(match[4]) not in RETRIED_STATUSES and match[2] not in PASSING_CODES:
            times, last = self._refused.get(match[1], (0, now))
            times = times + 1 if now - last < COMPLAINT_SECONDS else 1
            self._refused[match[1]] = (times, now)
            if times >= REFUSED_TIMES:
                self._refusal = (match[1], match[2], match[3], match[4])
        self.complaints.append(message)
        if message.startswith("Conflict detected"):
            self.lost = "; ".join(list(self.complaints)[-2:])
        self.failed_uploads += message.startswith("Failed to flush")
        self.complained_at = now
        if now - self._window_start > 60:
            if self._hidden:
                words = f"tigrisfs: {self._hidden} more such lines in the last minute"
                self._console.warning(self._name, words)
            self._window_start, self._shown, self._hidden = now, 0, 0
        if self._shown < COMPLAINTS_A_MINUTE:
            self._shown += 1
            self._console.warning(self._name, f"tigrisfs: {message}")
        else:
            self._hidden += 1

    @property
    def is_complaining(self) -> bool:
        return self.complained_at > 0 and time.monotonic() - self.complained_at < COMPLAINT_SECONDS

    @property
    def refusal(self) -> tuple[str, str, str, str] | None:
        """What S3 refuses as often as it is tried, its code, its words, and the status."""
        return self._refusal if self.is_complaining else None

    @property
    def reason(self) -> str:
        return self.complaints[-1] if self.complaints else "tigrisfs said nothing about it"


def mount_table(source: Path = Path("/proc/self/mountinfo")) -> dict[str, str]:
    """Mount point -> file system type in this process's mount namespace, proc(5)."""
    table = {}
    for line in source.read_bytes().decode("utf-8", "surrogateescape").splitlines():
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
    unlistable: Collection[str] = ()  # folders whose listing TigrisFS cannot read
    holds_nothing: bool = False  # that would have to be uploaded: tigrisfs may end at any moment

    def __post_init__(self) -> None:
        unit = IDLE_BYTES_PER_SECOND * FAILING_FLUSH_SECONDS
        self._stillness = Stillness([lambda: (io_bytes(self.child.pid) - NUDGE_BYTES * self.nudges) / unit])

    @property
    def is_still(self) -> bool:
        """Whether it has not moved a byte for a while; `check_alive` asks this all the time."""
        seconds = self._stillness.seconds(time.monotonic())
        return seconds > FAILING_FLUSH_SECONDS and not self.is_by_hand

    @property
    def is_alive(self) -> bool:
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
        """Whether S3 answers us, and we may write. Raises S3Error when the keys or the bucket are gone."""
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
    runtime: Runtime,
    store: Store,
    region: str,
    read_only: bool,
    lease: Lease | None = None,
    unlistable: Collection[str] = (),
) -> Iterator[Mount]:
    """`store` being mounted at its mount point; on leaving it is unmounted and everything is uploaded.

    It is there when `wait_until_usable` returns. Raises BackupError when it cannot be unmounted cleanly.
    Where Stuck is raised inside, or it was not usable, tigrisfs is killed.
    """
    path = prepare_mount_point(runtime, store)
    remove_temporary_mounts(runtime)
    log = TigrisLog(store.name, runtime.console)
    memory_mb = runtime.memory_mb
    cache_mb = data_cache_mb(memory_mb, store, targets_at_once(runtime.settings, memory_mb))
    sizes = memory_flags(store, cache_mb)
    if unlistable:  # it would list what follows each name that it looks up
        sizes.append("--no-preload-dir")
    argv = tigrisfs_command(store, region, path, read_only, sizes)
    child = Child(argv, tigrisfs_environment(store, runtime.environ, cache_mb), log.feed, log.feed)
    hasty = Patience(answer_seconds=2, unreachable_seconds=0, failing_seconds=0)
    client = S3Client(store, region, hasty, runtime.stop)
    mount = Mount(store, path, child, log, client, lease, unlistable=unlistable, holds_nothing=read_only)
    over, failure = threading.Event(), None
    try:
        if lease:
            lease.add(child)
        if not read_only:
            in_background(lambda: keep_awake(mount, over))
        yield mount
    except BaseException as error:
        failure = error
        raise
    finally:
        over.set()
        if isinstance(failure, Stuck) or not mount.usable:
            abandon(runtime, mount)
        else:
            try:
                unmount(runtime, mount)
            except BackupError as second:
                if not failure:
                    raise
                runtime.console.warning(store.name, str(second))  # the first error is the one to raise


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


def probe_mount(runtime: Runtime, store: Store, path: Path, is_listable: bool = True) -> None:
    """Lists a mount's root: the kernel answers a mere stat from its cache, even when tigrisfs is dead.

    Where that cannot be listed it is opened, which the kernel does not do by itself either. Raises OSError
    when the mount is dead, BackupError when it does not answer.
    """

    def look() -> None:
        if is_listable:
            next(os.scandir(path), None)
        else:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    within(MOUNT_SECONDS, f"{store.name}: listing {path}", look, runtime.stop)


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
    """Whether a mount was dead, and is detached now. Raises BackupError when it does not answer."""
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
        probe_mount(runtime, mount.store, mount.path, "" not in mount.unlistable)
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
    work = in_background(lambda: deque(walk_files(mount.store, mount.path), maxlen=0))
    until_done(runtime, [mount], f"{mount.store.name}: listing the repository", work)


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
        argv, lines = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(path)], []
        child = Child(argv, minimal_environment(runtime.environ, ()), lines.append, lines.append)
    except BackupError as error:
        return error.message
    if (code := child.wait(MOUNT_SECONDS)) is None:
        child.kill()
        return "no answer"
    return " ".join(lines) or f"fusermount3 ended with {code}" if code else ""


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


def wait_for_upload(runtime: Runtime, mount: Mount) -> int:
    """The exit code of tigrisfs, which ends when all is uploaded, and is killed when that takes too long."""
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
        limit = math.inf  # as long as it makes progress
        if runtime.stop.hurried or (runtime.stop.requested and mount.is_still):
            limit = HURRIED_FLUSH_SECONDS
        elif runtime.stop.requested and mount.log.is_complaining:
            limit = FAILING_FLUSH_SECONDS
        try:
            stall.check(lambda: f"{mount.store.name}: the upload does not end: {mount.log.reason}")
            if waited > limit:
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
# borg reads the objects that it is told of one after the other, and waits for S3 at each. So threads read
# what it is going to read through the same mount, and TigrisFS keeps it until borg comes. What is read is
# taken as one stream; what is read ahead is a window of it that begins where the slowest borg is, and no borg
# is told of an object before that has come into the window.


@dataclass(frozen=True)
class Upcoming:
    """One of the objects that are read, one after the other."""

    path: str
    size: int  # in bytes
    modified: float = math.inf  # in seconds since 1970
    fetch: Callable[[], None] | None = None  # reads it in another way than through the mount


@dataclass(frozen=True)
class Place:
    """An object's place in the stream of those that somebody reads."""

    number: int  # among all, from 1 on
    item: Upcoming
    start: int  # in bytes, as all that follows

    @property
    def end(self) -> int:
        """Where the next object begins. A small one counts for more, which bounds how many are ahead."""
        return self.start + max(self.item.size, SMALLEST_PLACE_BYTES)


@dataclass(eq=False)
class Reader:
    """One borg on its way through the objects."""

    since: float = -math.inf  # what was last modified before that, it knows and does not read
    child: Child | None = None  # None: it has not begun yet
    done: int = 0  # how many objects are behind it
    offset: int = 0  # how far it is in the next one
    began: float = 0.0
    waits_since: float = 0.0  # for others; 0: it does not
    waited_seconds: float = 0.0

    def waited_for(self, now: float) -> float:
        """How long it has waited for others until now."""
        return self.waited_seconds + (now - self.waits_since if self.waits_since else 0.0)

    def wait(self, is_waiting: bool) -> None:
        """It waits for others, or it does not any more."""
        now = time.monotonic()
        if is_waiting and not self.waits_since:
            self.waits_since = now
        elif self.waits_since and not is_waiting:
            self.waited_seconds, self.waits_since = self.waited_for(now), 0.0


def file_position(pid: int, path: str) -> int:
    """How far a process is in a file that it has open, /proc/PID/fdinfo of proc(5); 0 when it is not open."""
    with contextlib.suppress(OSError, ValueError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{number}") == path:
                text = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii")
                return int(text.partition("\n")[0].removeprefix("pos:"))
    return 0


NOWHERE = bytearray(READ_BYTES)  # what all threads read into: nobody looks at it


def read_piece(path: str, offset: int, end: int) -> None:
    """Reads a piece of a file into nowhere. Raises OSError."""
    if offset == end:
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        while offset < end and (got := os.preadv(fd, [memoryview(NOWHERE)[: end - offset]], offset)):
            offset += got
    finally:
        os.close(fd)


class ReadAhead:
    """Reads objects before one or more borgs do, and keeps these close enough together to share that.

    It is a help only: what it cannot read, borg will report. A borg that is ahead of another waits; but not
    when that one does not move, and not for longer than it has worked itself. Then the slower one is left to
    read by itself.
    """

    def __init__(self, runtime: Runtime, items: Iterable[Upcoming], readers: Sequence[Reader]) -> None:
        """Starts the threads. They begin when each reader has begun or left, or a while after the first."""
        settings, threads = runtime.settings, runtime.settings.read_ahead_threads
        self.moved = 0  # grows with all that is read
        self._window = read_ahead_bytes(data_cache_mb(runtime.memory_mb, settings.source))
        self._items, self._readers, self._has_threads = items, list(readers), threads > 0
        self._patience_seconds = min(HOLD_SECONDS, settings.stall_seconds / 3)
        self._piece_bytes = piece_bytes(self._window)
        self._lock = threading.RLock()
        self._changed, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._ahead: deque[Place] = deque()
        self._pieces: deque[tuple[Place, int, int]] = deque()
        self._taken: float = 0  # objects that borgs may be told of
        self._end, self._floor, self._moved_at = 0, 0, time.monotonic()
        self.is_over = False
        for work in (self._walk, self._watch, *[self._read] * threads):
            threading.Thread(target=work, daemon=True).start()

    def began(self, reader: Reader, since: float, child: Child) -> None:
        """`child` is the borg of `reader`, and knows all objects last modified before `since`."""
        with self._lock:
            reader.since, reader.child = since, child
            reader.began = self._moved_at = time.monotonic()
            self._changed.notify_all()

    def wait_until_near(self, reader: Reader, number: int) -> None:
        """Returns when `reader` may be told of the object with this number."""
        self.wait_until(reader, lambda: number <= self._taken, number)

    def wait_until_passed(self, number: int) -> bool:
        """Returns when all readers are done with this object; False at the end."""
        with self._lock:
            while not self.is_over and number > self._passed:
                self._changed.wait()
            return not self.is_over

    def is_left(self, reader: Reader) -> bool:
        """Whether it goes on by itself."""
        return reader not in self._readers

    def wait_until(self, reader: Reader, is_so: Callable[[], bool], number: int = 0) -> None:
        """Returns when it is so, or at the end. `reader` waits for others where it is ahead of them.

        It does not wait, though, before it is done with all objects that come before that `number`.
        """
        with self._lock:
            while reader in self._readers and not self.is_over and not is_so():
                reader.wait(reader.done + 1 >= number and reader.done > self._passed)
                self._changed.wait(POLL_SECONDS)
            reader.wait(False)

    def has_passed(self, number: int) -> bool:
        """Whether this object is behind all readers."""
        with self._lock:
            return number <= self._passed

    @property
    def _passed(self) -> float:
        """How many objects are behind all readers."""
        return min((reader.done for reader in self._readers), default=math.inf)

    def done(self, reader: Reader, number: int, offset: int = 0) -> None:
        """`reader` is done with so many objects, and is so far in the next one."""
        with self._lock:
            reader.done, reader.offset = max((reader.done, reader.offset), (number, offset))
            self._slide()

    def left(self, reader: Reader) -> None:
        """`reader` is at its end, or goes on by itself."""
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)
                self._hold(reader, False)
                self._slide()

    def close(self) -> None:
        """Ends it. Nobody waits for the threads: one may be in a read that takes long."""
        with self._lock:
            self.is_over, self._taken = True, math.inf
            for reader in self._readers:
                self._hold(reader, False)
            self._changed.notify_all()
            self._work.notify_all()

    def _slide(self) -> None:
        """Moves the window to where the slowest reader is."""
        passed, before = self._passed, self._floor
        while self._ahead and self._ahead[0].number <= passed:
            self._floor = self._ahead.popleft().end
        if self._ahead:
            place = self._ahead[0]
            slowest = [
                reader.offset for reader in self._readers if reader.done + 1 == place.number == passed + 1
            ]
            self._floor = max(self._floor, place.start + min(slowest, default=0))
        if self._floor > before or not self._ahead:
            self._moved_at = time.monotonic()
        self._changed.notify_all()

    def _hold(self, reader: Reader, is_held: bool) -> None:
        """Stops a borg in an object that is larger than the window, or has it go on."""
        if reader.child and is_held != reader.child.is_held(HELD_BACK):
            (reader.child.hold if is_held else reader.child.let_go)(HELD_BACK)
            reader.wait(is_held)

    def _walk(self) -> None:
        """The life of the thread that puts objects at the stream's end."""
        with self._lock:
            while not self.is_over and not self._all_began():
                self._changed.wait(WATCH_SECONDS)
        try:
            for number, item in enumerate(self._items, 1):
                if self.is_over:
                    return
                self._take(number, item)
        except BaseException:
            self.close()  # nobody waits for what does not come
            raise

    def _all_began(self) -> bool:
        """Whether it is known what is to be read. Who takes too long to begin is left behind."""
        begun = [reader.began for reader in self._readers if reader.began]
        late = [reader for reader in self._readers if not reader.began]
        if begun and time.monotonic() - max(begun) > JOIN_SECONDS:
            for reader in late:
                self.left(reader)
        return not any(reader in self._readers for reader in late)

    def is_read(self, modified: float) -> bool:
        """Whether one of the readers will read an object of this time."""
        return any(modified >= reader.since for reader in self._readers)

    def _take(self, number: int, item: Upcoming) -> None:
        """Takes an object in, piece by piece as there is room; who has none of it is told of it at once."""
        with self._lock:
            if not (self._has_threads and self._readers and self.is_read(item.modified)):
                self._taken = number
                self._changed.notify_all()
                return
            place = Place(number, item, self._end)
            self._end = place.end
            self._ahead.append(place)
            step = max(item.size, 1) if item.fetch else self._piece_bytes
            for offset in range(0, max(item.size, 1), step):
                end = min(offset + step, item.size)
                room = min(end, self._window) if item.fetch else end  # such a file is fetched as a whole
                while not self.is_over and place.start + room - self._floor > self._window:
                    self._changed.wait()
                self._pieces.append((place, offset, end))
                self._work.notify()
                self._taken = number
                self._changed.notify_all()

    def _read(self) -> None:
        """The life of a thread that reads."""
        while piece := self._next():
            place, offset, end = piece
            with contextlib.suppress(OSError):
                if place.item.fetch:
                    place.item.fetch()
                else:
                    read_piece(place.item.path, offset, end)
            self.moved += 1

    def _next(self) -> tuple[Place, int, int] | None:
        """The next piece that borg has not passed yet; None at the end."""
        with self._lock:
            while not self.is_over:
                while self._pieces:
                    piece = self._pieces.popleft()
                    if piece[0].start + piece[2] > self._floor or piece[0].item.fetch:
                        return piece
                self._work.wait()
        return None

    def _watch(self) -> None:
        """The life of the thread that sees where in a large object borg is, and who waits for too long."""
        while not self.is_over:
            time.sleep(WATCH_SECONDS)
            with self._lock:
                for reader in self._readers:
                    self._look(reader)
                self._slide()
                self._leave_behind()

    def _look(self, reader: Reader) -> None:
        """Where a reader is within an object of several pieces; who is far ahead there is held."""
        place = next((place for place in self._ahead if place.number > reader.done), None)
        if not place or not reader.child or place.item.size <= self._piece_bytes:
            self._hold(reader, False)
            return
        if place.number == reader.done + 1:
            position = min(file_position(reader.child.pid, place.item.path), place.item.size - 1)
            reader.offset = max(reader.offset, position)
        lead = place.start + reader.offset - self._floor
        if lead > self._window * 3 // 4 or lead < self._window // 2:
            self._hold(reader, lead > self._window // 2)

    def _leave_behind(self) -> None:
        """Leaves the slowest to itself when that has held up others for too long."""
        now = time.monotonic()
        waiting = [reader for reader in self._readers if reader.waits_since]
        stuck = now - self._moved_at > self._patience_seconds
        limits = [max(HOLD_SECONDS, (now - reader.began) / 2) for reader in waiting]
        if any(
            stuck or reader.waited_for(now) > limit for reader, limit in zip(waiting, limits, strict=True)
        ):
            passed = self._passed
            for reader in [each for each in self._readers if each.done == passed and not each.waits_since]:
                self.left(reader)


# ----------------------------------------------------------------------------------------------------- Borg


class Verdict(enum.Enum):
    OK = "ok"
    WARNING = "warnings"
    FAILURE = "failed"
    BUSY = "busy"  # another run works on the repository


# What borg says of a file that it could not read; the exit code is one of the source's content.
UNREAD_WARNINGS = frozenset(
    f"Backup{kind}Error" for kind in ("", "IO", "OS", "FileNotFound", "Permission", "RaceCondition")
)
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
    return ["init", "--encryption", target.encryption, str(repository)]


def borg_time(text: str) -> datetime:
    """A time as `borg list` prints it when we run it: in UTC, without saying so."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def borg_newest(repository: Path, bypass_lock: bool) -> list[str]:
    """Shows the newest archive and the encryption mode; proves passphrase and key."""
    return ["list", "--json", "--last", "1", *(["--bypass-lock"] if bypass_lock else []), str(repository)]


def borg_create(target: Target, label: str, repository: Path, comment: str = "") -> list[str]:
    """Archives what it is told of (FED).

    The files cache goes by ctime and size: S3's LastModified is both mtime and ctime here, and inode
    numbers change with every mount. ACLs and flags do not exist on S3; asking for extended attributes
    costs a request for each object.
    """
    options = ["--files-cache", "ctime,size", "--noxattrs", "--noacls", "--noflags", "--paths-from-stdin"]
    options += ["--comment", comment] if comment else []
    archive = f"{repository}::{label}-{{now:%Y-%m-%dT%H:%M:%S}}"
    return ["create", "--json", *options, "--compression", target.compression, archive]


def borg_export(repository: Path, archive: str, stream: Path) -> list[str]:
    """Writes an archive's content to `stream`, as a tar file."""
    return ["export-tar", "--tar-filter", "", f"{repository}::{archive}", str(stream)]


def borg_prune(target: Target, label: str, repository: Path) -> list[str]:
    return ["prune", "--list", "--glob-archives", archive_pattern(label), *target.prune, str(repository)]


def borg_compact(target: Target, repository: Path) -> list[str]:
    return ["compact", "--verbose", "--progress", "--threshold", str(target.compact_percent), str(repository)]


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
        self,
        name: str,
        console: Console,
        stop: Stop,
        on_fed: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.errors: list[tuple[str, str]] = []  # message id, message; the first MAX_NAMED
        self.error_count = 0
        self.warnings = 0
        self.is_warning = False  # borg's exit code tells of one: what has no id does not change that
        self.infos: list[str] = []
        self._name, self._console, self._stop = name, console, stop
        self._on_fed = on_fed

    def feed(self, line: str) -> None:
        try:
            entry = json.loads(line)
            kind = entry["type"]
        except (ValueError, KeyError, TypeError):
            self._take("ERROR", "", line)
            return
        if kind in ("fed_done", "fed_status") and self._on_fed:
            self._on_fed(entry)
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
        elif level == "WARNING" and self._on_fed and msgid in UNREAD_WARNINGS:
            self._console.debug(self._name, f"borg: {text}")  # our own client tries
        elif level == "WARNING":
            self.warnings += 1
            self.is_warning |= bool(msgid)
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
        on_fed: Callable[[Mapping[str, Any]], None] | None = None,
        on_start: Callable[[Child], None] = lambda child: None,
        trusted_before: datetime | None = None,
        consume: Callable[[IO[bytes]], None] | None = None,
        on_output: Callable[[str], None] | None = None,
        own: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        waits: Callable[[], float] = lambda: 0,
    ) -> BorgResult:
        """Runs one command to its end; `on_fed` is told what it reports of what it is fed (FED).

        `on_start` is given the process; see TRUST_OLD about `trusted_before`. The result has the output,
        unless `consume` reads it, or `on_output` is told of each line. `own` variables and `pass_fds` are for
        borg; `waits` grows while whoever feeds it, or reads from it, has reason to be slow. Raises
        BackupError when it fails, Hung when its mounts are gone or nothing moves, Stopped on a stop signal,
        and what `consume` raises. An archive that lacks what could not be read is a result.
        """
        runtime, name = self._runtime, self._target.store.name
        command, *rest = arguments
        argv = ["borg", *command.split(), "--log-json", "--lock-wait", str(LOCK_WAIT_SECONDS), *rest]
        log, output = BorgLog(name, runtime.console, runtime.stop, on_fed), []
        runtime.console.debug(name, shlex.join(argv))
        runtime.stop.check()
        with self._environment({"BORG_EXIT_CODES": "modern", **(own or {})}) as (env, fd):
            if command == "list":  # see `borg_time`; archive names and `prune` go by the user's zone
                env |= {"S3BORGBACKUP_SIZES": "yes", "TZ": "UTC"}
            if trusted_before:
                env["S3BORGBACKUP_TRUSTED_BEFORE"] = str(int(trusted_before.timestamp()) * 10**9)
            take, fds = on_output or output.append, (fd, *pass_fds)
            child = Child(argv, env, take, log.feed, fds, consume=consume)
            on_start(child)
            code = self._run_to_end(command, child, waits)
        log.report_hidden()
        if child.consumed:
            child.consumed.result()
        result = BorgResult(verdict(code), "\n".join(output), log)
        lacks_some = command == "create" and code == IO_ERROR_CODE
        if result.verdict is Verdict.FAILURE and not lacks_some:
            raise self._failure(command, code, log)
        return result

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
        words = [f"{mount.store.name}: {mount.log.reason}" for mount in self._mounts if mount.log.complaints]
        return "; ".join(words) or "tigrisfs said nothing about it"

    def _failure(self, command: str, code: int, log: BorgLog) -> BackupError:
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
            self._newest_cmtime = until

    LocalCache.memorize_file = wrapper

if "S3BORGBACKUP_TRUSTED_BEFORE" in os.environ:
    try:
        trust(int(os.environ["S3BORGBACKUP_TRUSTED_BEFORE"]))
    except (ImportError, AttributeError):
        pass
"""


# borg reads the paths that it is told of in blocks of 4096 characters, and would wait for more before it
# begins with the first. Here it takes each one at once from a pipe of our own, reports how many it is done
# with, which ones it has read and of which it could make no file, and must be told that the list is at its
# end: whoever feeds it may be gone. (`iter_separated` and `Archiver.print_file_status` of borg 1.4.)
FED = """\

def be_fed(fd):
    import json, sys
    from borg import archiver
    number = told = at = 0

    def report(kind, **facts):
        print(json.dumps({"type": kind, "number": number, **facts}), file=sys.stderr, flush=True)

    def paths(*arguments):
        nonlocal number, told, at
        rest = b""
        while part := os.read(fd, 65536):
            *whole, rest = (rest + part).split(b"\\0")
            for path in whole:
                if not path:
                    return
                number += 1
                yield os.fsdecode(path)
                if time.monotonic() > at + 0.05:
                    told, at = number, time.monotonic()
                    report("fed_done")
            if number > told:
                told, at = number, time.monotonic()
                report("fed_done")
        raise EOFError("the list of what to archive has no end")

    def note(self, status, path):
        if status in ("A", "M", "C", "E", "d"):
            report("fed_status", status=status)

    archiver.iter_separated, archiver.Archiver.print_file_status = paths, note

if "S3BORGBACKUP_FED" in os.environ:
    be_fed(int(os.environ["S3BORGBACKUP_FED"]))
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

    PATIENT_FSYNC repeats what failed, which the stall clock bounds; the others do what they are asked for by
    variables.
    """
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
        additions = PATIENT_FSYNC + TRUST_OLD + FED + LIST_SIZES + HANDED_OVER + EXPORTED
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


RACE_SECONDS = 2  # how far the clocks of an S3 service may be apart


UNREAD = "it could not be read"
REFUSED_ALIKE = "S3 refuses others like it"
REFUSALS = frozenset({400, 401, 403})  # no permission, cold storage, a foreign key for SSE-C


class Findings:
    """The objects that an archive lacks: the first ones by name, all by number."""

    def __init__(self) -> None:
        self.count, self.unread = 0, 0
        self.named: list[tuple[str, str]] = []
        self.explains_all = True

    def add(self, key: str, reason: str) -> None:
        if self.count < MAX_NAMED:
            self.named.append((key, reason))
        self.add_more(1, reason)

    def add_more(self, number: int, reason: str) -> None:
        self.count += number
        # Older archives may hold what this one lacks, so they must outlive reads that fail. But
        # S3's own refusal (cold storage) lasts until a person does something, and meanwhile no archive will
        # hold the object: pruning must not wait for that. (Where S3 suddenly refuses very many, the archive
        # has shrunk, which stops pruning, too.) Nor must it wait for an object that is overwritten in every
        # night's run.
        if reason.startswith(UNREAD):
            self.unread += number
            self.explains_all = False


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
    """A message was not taken; the reason has nothing of the URL. `may_pass`: it is worth another try."""

    def __init__(self, reason: str, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


def send_once(message: Message, seconds: float) -> None:
    """Sends a message. Raises NotTaken. No redirect is followed, no proxy used."""
    url = urllib.parse.urlsplit(message.url)
    headers = {"User-Agent": f"s3borgbackup/{VERSION}"}
    if message.body:
        headers["Content-Type"] = message.content_type
    if url.username is not None:  # basic authentication (RFC 7617)
        pair = f"{urllib.parse.unquote(url.username)}:{urllib.parse.unquote(url.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    connection = connection_to(url)
    connection.timeout = seconds
    try:
        connection.request(message.method, request_target(url), message.body or None, headers)
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
    quiet = {"always": (), "warning": (EXIT_OK,)}.get(notify_on, (EXIT_OK, EXIT_WARNINGS, EXIT_BUSY))
    return code not in quiet


def result_name(code: int) -> tuple[str, str]:
    """What an exit code is called in JSON, and for people."""
    if code > 128:
        return "stopped", f"stopped by {signal.Signals(code - 128).name}"
    return RESULTS.get(code, RESULTS[EXIT_FAILURE])


def run_document(report: Report, code: int, finished: datetime, troubles: Troubles) -> dict[str, Any]:
    """What NOTIFY_URL gets. `text` is for people, under the name that many chat programs' webhooks want."""

    def told(names: Sequence[str]) -> dict[str, list[str]]:
        return {"errors": troubles.about("error", names), "warnings": troubles.about("warning", names)}

    stores = {f"target-{target['name']}": target for target in report.targets}
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
        "targets": [{**target, **told([store])} for store, target in stores.items()],
        **told([name for name in troubles.names() if name not in stores]),
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
    """Tells those that the configuration names of a run's start and end; `report` is filled in meanwhile."""

    def __init__(self, reporting: Reporting, console: Console, stop: Stop, report: Report) -> None:
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
        reporting, jobs = self._reporting, {}

        def tell(message: Message) -> None:
            jobs[str(message)] = in_background(lambda: self._tell(message, threading.Event()))

        if url := reporting.healthcheck_url:
            text, seconds = document["text"], document["seconds"]
            if message := healthcheck_message(url, end_signal(code), text, seconds):
                tell(message)
        if reporting.notify_url and is_to_be_notified(code, reporting.notify_on):
            body = json.dumps(document).encode()
            tell(Message("NOTIFY_URL", "POST", reporting.notify_url, body, "application/json"))
        if reporting.metrics_file and self.report.command == "run":
            jobs["METRICS_FILE"] = in_background(lambda: self._write_metrics(code, finished))
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

    def _tell(self, message: Message, over: threading.Event) -> None:
        try:
            deliver(message, time.monotonic() + TELL_SECONDS, over)
            self.console.debug("run", f"{message} was told how the run goes")
        except BackupError as error:
            self.console.warning("run", str(error))

    def _write_metrics(self, code: int, finished: datetime) -> None:
        path = Path(self._reporting.metrics_file)
        try:
            replace_file(path, metrics_text(self.report, code, finished, read_metrics(path)))
        except OSError as error:
            self.console.warning("run", f"METRICS_FILE: cannot write {str(path)!r}: {error.strerror}")


METRICS = {
    "run_timestamp_seconds": "When the last run ended, whatever became of it, as Unix time.",
    "run_duration_seconds": "How long the last run took.",
    "run_exit_code": "The exit code of the last run.",
    "last_run_timestamp_seconds": "When the last run ended, as Unix time.",
    "last_run_duration_seconds": "How long the last run took for this target.",
    "last_run_exit_code": "How the last run went for this target: 0 well, 1 warnings, 2 failed, 75 busy.",
    "last_success_timestamp_seconds": "When the last run ended that succeeded for this target, as Unix time.",
    "last_archive_objects": "Objects in the last archive.",
    "last_archive_bytes": "Bytes of the objects in the last archive.",
    "last_archive_new_bytes": "Bytes that the last archive added to the repository.",
}
METRIC_LINE = re.compile(r"(s3borgbackup_[a-z_]+\{.*\}) ([0-9]+(?:\.[0-9]+)?)")
TARGET_CODES = {name: code for code, (name, _) in RESULTS.items()}  # a target's result is called like a run's


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
        target_code, name = TARGET_CODES[target["result"]], target["name"]
        new[metric("last_run_timestamp_seconds", report.label, name)] = now
        new[metric("last_run_duration_seconds", report.label, name)] = target["seconds"]
        new[metric("last_run_exit_code", report.label, name)] = target_code
        if target_code in (EXIT_OK, EXIT_WARNINGS):
            new[metric("last_success_timestamp_seconds", report.label, name)] = now
        for number in ("objects", "bytes", "new_bytes") if target["archive"] else ():
            new[metric(f"last_archive_{number}", report.label, name)] = target[number]
    known = report.configured
    lines = []
    for name, text in METRICS.items():
        start = f"s3borgbackup_{name}{{"
        wanted = old if known is None else {metric(name, report.label, target) for target in known}
        kept = [key for key in old if key.startswith(start) and key in wanted]
        found = dict.fromkeys([*kept, *(key for key in new if key.startswith(start))])
        lines += [f"# HELP s3borgbackup_{name} {text}", f"# TYPE s3borgbackup_{name} gauge"]
        lines += [f"{key} {new.get(key, old.get(key))}" for key in found]
    return "\n".join(lines) + "\n"


def metric(name: str, label: str, target: str | None = None) -> str:
    """A sample's name and labels, as the format wants them."""
    labels = {"label": label} if target is None else {"label": label, "target": target}
    escaped = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = ",".join(f'{key}="{value.translate(escaped)}"' for key, value in labels.items())
    return f"s3borgbackup_{name}{{{pairs}}}".encode("utf-8", "replace").decode()


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
    following: tuple[str, str] | None  # what asks for the next page
    clock: datetime  # the server's

    @property
    def complete(self) -> bool:
        """Whether the first page is all there is."""
        return self.following is None

    def repository_state(self, store: Store) -> RepositoryState:
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
    EMPTY = "nothing"
    READY = "a repository"
    UNFINISHED = "what an interrupted `borg init` left"
    FOREIGN = "other objects"


# With borg's temporary files, `config-abcdefgh.tmp` (SaveFile in platform/base.py of borg 1.4).
OWN_NAMES = re.compile(
    r"README|(config|nonce)(-\w{8}\.tmp)?|(data|hints|index|integrity|lock)[./].*", re.DOTALL | re.ASCII
)
SEGMENT_FILE = re.compile(r"data/[0-9]+/([0-9]+)")
CONFIG_ID = re.compile(r"^id = ([0-9a-f]{64})$", re.MULTILINE)
PROBED_OBJECTS = 10  # each may be in cold storage, or just deleted
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
    return Preflight(client.region, tuple(entries), more, client.clock or datetime.now(UTC))


def examine(client: S3Client, write: bool) -> Preflight:
    """Lists a store, reads from it and, with `write`, writes. Raises S3Error naming what is refused."""
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
    """Writes a small object below the store's prefix, reads it back and deletes it."""
    key, body = f"{client.store.key_prefix}{PROBE_NAME}{secrets.token_hex(6)}", secrets.token_bytes(16)
    for last in (False, False, True):
        client.put(key, body)
        try:
            if client.get(key, (1, len(body) - 1)) == body[1:]:
                return
            what = f"{client.store.name}: an object that was just written reads back differently"
            raise S3Error(what, "Use a store that reads what was written.", 200, "Stale")
        except S3Error as error:
            if error.status != 404 or last:  # another run removes what it takes for a leftover
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
    settings, name = runtime.settings, client.store.name
    if not client.clock:  # it tells the others since when, by a clock that all share
        look_at_lease(client)
    holder = Holder(
        runtime.run_id, socket.gethostname(), purpose, utc_now(client), settings.lease_ttl_seconds
    )

    def warn(text: str) -> None:
        runtime.console.warning(name, text)

    patience_seconds = min(PROVEN_PATIENCE_SECONDS, settings.stall_seconds)
    lease = Lease(client, holder, patience_seconds, notice or warn, runtime.stop.wait, switch)
    try:
        lease.acquire(settings.lease_wait_seconds)
        yield lease
    finally:
        lease.release()


def repository_id(runtime: Runtime, mount: Mount) -> str:
    """The id in a mounted repository's config. Raises BackupError."""
    config = within(MOUNT_SECONDS, f"{mount.store.name}: reading config", (mount.path / "config").read_text)
    found = CONFIG_ID.search(config)
    if not found:
        raise BackupError(f"{mount.store.name}: the repository's config has no id", "Restore its config.")
    return found[1]


def prepare_repository(runtime: Runtime, target: Target, client: S3Client, lease: Lease) -> bool:
    """Makes a repository where there is none, or clears what crashed runs left; returns whether it is new."""
    found = look(client)
    probe = f"{target.store.key_prefix}{PROBE_NAME}"  # what a preflight that was killed left
    delete_all(lease, [entry.key for entry in found.keys if entry.key.startswith(probe)])
    state = what_lies_there(client, found)
    if state is RepositoryState.READY:
        if lease.enforced:
            clear_leftovers(runtime, target, client, lease)
        return False
    if state is RepositoryState.UNFINISHED:
        others = found.others(target.store)
        runtime.console.warning(target.store.name, f"{state.value} is removed: {len(others)} small objects")
        delete_all(lease, others)
    runtime.console.info(target.store.name, f"a new repository is made ({target.encryption})")
    # `borg init` wants an empty place, and the lease lies there already. So it makes a few small local files,
    # which are copied; the config goes last: what an interruption leaves has none, and is made anew.
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
        repository = Path(folder, "repository")
        Borg(runtime, target, repository).run(borg_init(target, repository))
        notes = (KEY_EXPORTED_NAME, CHECKED_NAME)  # of a repository that was here before
        delete_all(lease, [f"{target.store.key_prefix}{name}" for name in notes])
        paths = [path for path in repository.rglob("*") if path.is_file() and path.name != "lock.roster"]
        for path in sorted(paths, key=lambda path: (path.name == "config", path.name != "README")):
            key, body = f"{target.store.key_prefix}{path.relative_to(repository)}", path.read_bytes()
            lease.write(lambda client, key=key, body=body: client.put(key, body))
    return True


def what_lies_there(client: S3Client, found: Preflight) -> RepositoryState:
    """The state of the place for a repository. Raises BackupError where it holds other objects."""
    store, state = client.store, found.repository_state(client.store)
    if state is RepositoryState.UNFINISHED:  # nothing of somebody else must be removed
        readme = client.get(f"{store.key_prefix}README")
        if not readme.startswith(b"This is a Borg Backup repository"):
            state = RepositoryState.FOREIGN
    if state is RepositoryState.FOREIGN:
        raise BackupError(
            f"{store.name}: {store.location} holds other objects"
            f" (such as {found.others(store)[0]!r}) and no borg repository",
            f"Point {store.setting('path')} at an empty place, such as {store.bucket}:borg.",
        )
    return state


def expect_repository(client: S3Client, found: Preflight) -> None:
    if what_lies_there(client, found) is not RepositoryState.READY:
        raise BackupError(
            f"{client.store.name}: {client.store.location} holds no repository yet",
            f"Run a backup first, or correct {client.store.setting('path')}.",
        )


def find_leftovers(client: S3Client) -> Leftovers:
    """What crashed runs left in a repository, as the bucket has it."""
    prefix = (
        client.store.key_prefix
    )  # the names that sort after segments: hints.N, index.N, integrity.N, lock
    names = [entry.key[len(prefix) :] for entry in client.list_objects(prefix, f"{prefix}hints")]
    # Its last holder may just have left.
    roster = client.find(f"{prefix}lock.roster") if "lock.roster" in names else None
    return Leftovers.sort(names, roster.body if roster else b"")


def remove_leftovers(runtime: Runtime, store: Store, lease: Lease, left: Leftovers) -> None:
    """Deletes what crashed runs left before a mount shows it: TigrisFS may deadlock on such a lock."""
    delete_all(lease, [f"{store.key_prefix}{name}" for name in left.stale])
    if any(re.match(r"lock\.exclusive.*/.", name) for name in left.stale):
        runtime.console.info(store.name, "the lock of a run that crashed is removed")
    if any(INDEX_FILE.fullmatch(name) for name in left.stale):
        runtime.console.info(store.name, "the index that a crashed run left half-written is removed")


def delete_all(lease: Lease, keys: Iterable[str]) -> None:
    for key in keys:
        lease.write(lambda client, key=key: client.delete(key))


def clear_leftovers(runtime: Runtime, target: Target, client: S3Client, lease: Lease) -> None:
    """Sees to it that borg finds no lock, and no index that it cannot use."""
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


@contextlib.contextmanager
def cache_reserved(store: Store, folder: Path) -> Iterator[None]:
    """Keeps others on this machine from borg's cache in `folder`: the lease is that of a place in S3 only."""
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


def check_encryption(runtime: Runtime, repository: Repository) -> None:
    """Raises BackupError when the repository's encryption mode is not what the configuration promises."""
    mode = seen_encryption(runtime.environ, repository.identity)  # borg itself refuses another one then
    if not mode:
        listed = repository.borg.run(borg_newest(repository.borg.repository, repository.is_ours_alone))
        mode = json.loads(listed.output)["encryption"]["mode"]
    if mistake := encryption_mistake(repository.target, mode):
        raise mistake


def read_note(client: S3Client, name: str) -> dict[str, Any]:
    """What was noted beside the repository; nothing where nothing was. Raises S3Error."""
    answer = client.find(f"{client.store.key_prefix}{name}")
    try:
        noted = json.loads(answer.body) if answer else {}
    except ValueError:
        noted = {}
    return noted if isinstance(noted, dict) else {}


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
    """An existing repository under its lease, for `purpose`; on leaving, all is uploaded and compared."""
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
    try:
        names = listed_files(runtime, repository.client).keys()
    except S3Error:
        return False
    return any(name not in names for name in repository.files if not name.startswith("lock."))


# ---------------------------------------------------------------------------------------------------- Check

# `borg check --max-duration` reads the segments one after another, compares each object in them with its
# checksum, and notes in the repository's config how far it came. One such pass over all segments may take
# many slices. What we know of it is a small JSON object beside the lease, written under the lease:

CHECK_KINDS = ("segments", "archives", "data")  # each sees what those before it see, and more
ROUND_SECONDS = 300  # borg notes its place only when it ends: so much is lost at most by an interruption
EARLY = 0.9  # a nightly run must not skip its week because it began a minute earlier than a week before


@dataclass(frozen=True)
class CheckRecord:
    repository: str = ""  # its id: what is said of another one counts for nothing
    checked: datetime | None = None  # when the last complete pass ended that found no damage
    checked_from: datetime | None = None  # when that one began: what was written before was checked since
    pass_began: datetime | None = None  # when the pass began that is under way
    segment: int = -1  # the last segment that it has checked
    began: datetime | None = None  # when the last slice or full check began that came to its end
    damage: str = ""  # what was found, until a check that sees as much finds everything sound
    damaged: datetime | None = None  # when that was found last
    kind: str = ""  # the kind of check that found it, see CHECK_KINDS

    def body(self) -> bytes:
        fields = dataclasses.asdict(self)
        return json.dumps(fields, default=lambda when: when.isoformat(timespec="seconds")).encode()

    @classmethod
    def parse(cls, body: bytes, identity: str) -> CheckRecord:
        """The record that `body` holds of the repository `identity`; an empty one where it does not."""
        empty = cls(repository=identity)
        try:
            fields = json.loads(body)
            if fields["repository"] != identity:
                return empty
            known = {name: fields[name] for name in RECORD_TIMES if fields[name] is not None}
            times = {name: datetime.fromisoformat(text).astimezone(UTC) for name, text in known.items()}
            texts = {name: str(fields[name]) for name in ("damage", "kind")}
            return cls(repository=identity, segment=int(fields["segment"]), **times, **texts)
        except (ValueError, KeyError, TypeError, RecursionError):
            return empty


RECORD_TIMES = ("checked", "checked_from", "pass_began", "began", "damaged")


@dataclass(frozen=True)
class Segment:
    """A file of a repository that holds data; its number grows with each that is written."""

    size_bytes: int
    written: datetime


@dataclass(frozen=True)
class Checked:
    record: CheckRecord
    segments: Mapping[int, Segment]  # by their numbers
    clock: datetime  # the server's

    @property
    def age(self) -> str:
        """How old the oldest unchecked data is, in a few words."""
        since = unchecked_since(self.record, self.segments)
        if not since:
            return "there is no data to check"
        return f"the oldest unchecked data is {age(max(0.0, (self.clock - since).total_seconds()))} old"

    @property
    def extent(self) -> str:
        """How much has been checked, in a few words."""
        total = size(sum(segment.size_bytes for segment in self.segments.values()))
        if not self.record.pass_began:
            return f"all {total}"
        done = [known.size_bytes for number, known in self.segments.items() if number <= self.record.segment]
        return f"{size(sum(done))} of {total} in this pass"


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
    name, path, start = repository.target.store.name, repository.mount.path, time.monotonic()
    record = last_check(repository.client, repository.identity)
    began = repository.client.clock or datetime.now(UTC)

    def clock() -> datetime:  # the server's, without asking it again
        return began + timedelta(seconds=time.monotonic() - start)

    runtime.console.info(name, "borg check begins")
    if plan.seconds is None:  # a whole pass, with the index and the archives
        record = dataclasses.replace(record, pass_began=clock(), segment=-1)
        kind = CHECK_KINDS[2] if verify_data else CHECK_KINDS[1]
        options = ["--verify-data"] if verify_data else []
        damage = damage_found(repository, ["check", "--info", "--progress", *options, str(path)])
        record = after_check(record, -1, damage, kind, clock())
    else:
        # A slice that ends in time, or with the pass; its place is noted now and then.
        position, deadline = borgs_position(repository), start + plan.seconds
        record = before_slice(record, position, clock())
        if record.segment < position:
            value = ["last_segment_checked", str(record.segment)]
            anew = ["--delete", str(path), value[0]]
            repository.borg.run(["config", *(anew if record.segment < 0 else [str(path), *value])])
        damage, is_over = missing_segments(runtime, repository), False
        while not is_over:
            seconds = max(1, round(min(ROUND_SECONDS, deadline - time.monotonic())))
            options = ["--repository-only", "--max-duration", str(seconds)]
            arguments = ["check", "--info", "--progress", *options, str(path)]
            damage = damage_found(repository, arguments) or damage
            position = borgs_position(repository)
            record = after_check(record, position, damage, CHECK_KINDS[0], clock())
            note_record(repository, record)
            is_over = position < 0 or time.monotonic() > deadline
    record = dataclasses.replace(record, began=began)
    note_record(repository, record)
    checked = Checked(record, segments_of(runtime, repository), clock())
    found = "damage was found" if record.damage else "no damage was found"
    took = duration(time.monotonic() - start)
    runtime.console.info(name, f"checked {checked.extent}, in {took}: {found}; {checked.age}")
    return checked


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
    """Writes the record beside the repository, which is open for writing, as long as the lease holds."""
    key = f"{repository.target.store.key_prefix}{CHECKED_NAME}"
    repository.lease.write(lambda client: client.put(key, record.body()))


def expect_sound(repository: Repository, record: CheckRecord) -> None:
    """Raises BackupError for damage that a check has found, and that no later one has found repaired."""
    if record.damage:
        when = f" (found {record.damaged:%Y-%m-%dT%H:%M:%SZ})" if record.damaged else ""
        raise BackupError(
            f"{repository.target.store.name}: the repository is damaged: {record.damage}{when}",
            DAMAGE_HELP.format(name=repository.target.name),
        )


def check_if_due(runtime: Runtime, repository: Repository) -> None:
    """Checks a repository as its target's `check` says. Raises BackupError, also for older damage."""
    plan, client = repository.target.check, repository.client
    if not plan:
        return
    record, now = last_check(client, repository.identity), client.clock or datetime.now(UTC)
    if is_due(plan, record.began, now):
        record = check_repository(runtime, repository, plan).record
    else:
        checked = Checked(record, segments_of(runtime, repository), now)
        runtime.console.info(repository.target.store.name, f"no check is due; {checked.age}")
    expect_sound(repository, record)


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
    if runtime.settings.source_metadata:
        words = "SOURCE_METADATA is not needed any more: user metadata is archived with all other headers"
        runtime.console.info("run", words)
    outcomes = [Outcome(target) for target in targets]
    try:
        source, *checks = preflight(runtime, targets)
        if isinstance(source, BackupError):
            raise source
        with listed_source(runtime, source) as listed:
            back_up_all(runtime, source, listed, list(zip(outcomes, checks, strict=True)))
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


@dataclass(frozen=True)
class Listing:
    """What the source lists as a run begins."""

    catalog: Catalog
    unlistable: Collection[str]  # folders that TigrisFS cannot list


@contextlib.contextmanager
def listed_source(runtime: Runtime, found: Preflight) -> Iterator[Listing]:
    """The source's listing in a catalog, with the headers that the last one knows; kept for the next run.

    What is wrong with the last one, or with its place, is told, and costs requests. Raises S3Error.
    """
    source, console = runtime.settings.source, runtime.console
    name = hashlib.sha256(f"{source.endpoint} {source.location}".encode()).hexdigest()[:16]
    kept = borg_folder(runtime.environ, "CACHE", ".cache").parent / "s3borgbackup" / f"{name}.catalog"
    with contextlib.ExitStack() as stack:
        try:
            folder = kept.with_suffix(f".{runtime.run_id}")
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            remove_old_folders(kept)
            listed = catalog_of_source(runtime, found, folder, kept)
        except (CatalogError, OSError) as error:
            console.warning(
                "source", f"the catalog is not kept, and all headers are asked for again: {error}"
            )
            with contextlib.suppress(OSError):
                os.truncate(folder / "catalog", 0)  # borg needs the room
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX)))
            listed, kept = catalog_of_source(runtime, found, folder, None), None
        try:
            yield listed
        finally:
            try:
                if kept and kept.exists():  # another run may have noted archives meanwhile
                    listed.catalog.open_last(kept)
                    listed.catalog.close_last()
                listed.catalog.close()
                if kept:
                    listed.catalog.path.replace(kept)
            except (CatalogError, OSError) as error:
                console.warning("source", f"the catalog is not kept: {error}")


def remove_old_folders(kept: Path) -> None:
    """Removes what runs that were killed have left beside a catalog."""
    for folder in kept.parent.glob(f"{kept.stem}.*/"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def objects_of(client: S3Client, console: Console, found: Preflight | None = None) -> Iterator[S3Object]:
    """What a store lists, by the keys behind its prefix; `found` knows the beginning. Raises S3Error."""
    prefix, first = client.store.key_prefix, found.keys if found else ()
    following = found.following if found else None
    rest = client.list_objects(prefix, where=following) if following or not found else ()
    for number, each in enumerate(itertools.chain(first, rest), 1):
        if not number % CATALOG_PAGE:
            console.progress(client.store.name, f"listing: {count(number, 'object')}")
        if key := each.key[len(prefix) :]:
            is_shown = is_showable(key, each.size_bytes)
            yield S3Object(key, each.size_bytes, each.last_modified, each.etag, is_shown)


def catalog_of_source(runtime: Runtime, found: Preflight, folder: Path, kept: Path | None) -> Listing:
    """Lists the source into a new catalog in `folder`; `kept` is the last one."""
    source, console, catalog = runtime.settings.source, runtime.console, Catalog(folder / "catalog")
    client = S3Client(source, found.region, PROVEN, runtime.stop)

    def work() -> Collection[str]:
        catalog.add(objects_of(client, console, found))
        unlistable = catalog.unlistable()
        catalog.hide(unlistable)
        if kept and kept.exists():
            try:
                catalog.open_last(kept)
                catalog.know_headers()
            except CatalogError as error:
                unusable = kept.with_suffix(".unusable")
                kept.replace(unusable)
                words = f"it is made anew, and all headers are asked for; the old one is {unusable.name} now"
                console.warning("source", f"{error.message}; {words}")
            catalog.close_last()
        return unlistable

    unlistable = within(LIST_SECONDS, "source: listing it", work, runtime.stop)
    number, size_bytes = catalog.total()
    console.info(
        "source",
        f"lists {count(number, 'object')}, {size(size_bytes)}",
        "listed",
        objects=number,
        bytes=size_bytes,
    )
    new = catalog.total("facts IS NULL AND is_shown")[0] if runtime.settings.headers else 0
    if new:
        console.info("source", f"headers of new and changed objects: {count(new, 'HEAD request')}")
    return Listing(catalog, unlistable)


def back_up_all(
    runtime: Runtime,
    found: Preflight,
    listed: Listing,
    work: Sequence[tuple[Outcome, Preflight | BackupError]],
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
            source, unlistable = runtime.settings.source, listed.unlistable
            with mounted(runtime, source, found.region, read_only=True, unlistable=unlistable) as mount:
                mount.is_shared = at_once > 1
                while remaining and not again and (mount.is_alive or not mount.usable):
                    batch = [remaining.popleft() for _ in range(min(at_once, len(remaining)))]
                    again = back_up_batch(runtime, found, mount, listed.catalog, batch)
                    if not mount.usable:
                        break
        except Stopped:
            raise
        except BackupError as error:
            if len(remaining) == before:
                raise
            runtime.console.warning("source", str(error))
        remaining.extend(again)


HEAD_THREADS, HEADS_AHEAD = 16, 2000  # requests at a time, and objects that wait for theirs
FETCHED_AT_ONCE = 16  # of what borg could not read
UNREAD_AT_MOST = 10_000  # of it; if it is more, something else is wrong
KNOWN_BYTES = 8 * 1024  # what it takes to pass an object that borg knows, in bytes that are read in that time

TAGS_REFUSED = "objects' tags may not be read (s3:GetObjectTagging), and are in no archive"


class Feeder:
    """What all borgs of a batch are fed from: catalog, mount, and our own client for what that cannot show.

    Objects' headers are asked for behind the reads, as the answer then proves what was read.
    """

    def __init__(
        self, runtime: Runtime, source: Preflight, mount: Mount, catalog: Catalog, readers: Sequence[Reader]
    ) -> None:
        self.runtime, self.mount, self.catalog, self.readers = runtime, mount, catalog, readers
        self.listed = catalog.total("size > 0 OR substr(key, -1) != X'2F'")[0]  # without mere folders
        self.mixed = Findings()  # what may have been archived as no version ever was
        self._client = S3Client(runtime.settings.source, source.region, PROVEN, runtime.stop)
        self._asking = self._client.direct()
        self._prefix = runtime.settings.source.key_prefix
        self._folder = Path(tempfile.mkdtemp(dir=catalog.path.parent))
        Path(self._folder, odd_path("")).parent.mkdir(parents=True)
        self._moved, self._refusals, self._tags_refused = 0, 0, False
        self.is_unproven = False  # whether somebody reads what is not asked for afterwards
        self.doubt = ""  # why that could not be looked at again
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._fetched: dict[str, tuple[concurrent.futures.Future[str], set[Reader]]] = {}
        self._to_ask: queue.Queue[tuple[int, S3Object]] = queue.Queue(HEADS_AHEAD)
        self._walked = threading.Event()
        threads = HEAD_THREADS if runtime.settings.headers else 0
        self.ahead = ReadAhead(runtime, self._items(), readers)
        self._heads = [in_background(self._ask) for _ in range(threads)]

    def close(self) -> None:
        self.ahead.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def moved(self) -> int:
        """Grows with whatever is done for borg."""
        return self._moved + self.ahead.moved

    def path(self, each: S3Object) -> str:
        return f"{self.mount.path}/{each.key.rstrip('/')}"

    def _items(self) -> Iterator[Upcoming]:
        """All objects. Each one's folders are listed before, so that TigrisFS looks nothing up one by one."""
        listed: list[str] = []
        try:
            for number, each in enumerate(self.catalog.rows(), 1):
                if each.is_shown:
                    while listed and not each.key.startswith(listed[-1]):
                        listed.pop()
                    folders = ["", *(each.key[: match.end()] for match in re.finditer("/", each.key))]
                    for folder in folders[len(listed) :]:
                        listed.append(folder)
                        self._list(folder)
                    item = Upcoming(self.path(each), each.size_bytes, each.last_modified.timestamp())
                else:
                    item = Upcoming("", each.size_bytes, fetch=lambda each=each: self._fetch_ahead(each))
                self._note_read(number, each)
                yield item
        except BackupError as error:
            if not self.ahead.is_over:
                self.runtime.console.error("source", str(error))
                self.ahead.close()
        finally:
            self._walked.set()

    def _list(self, folder: str) -> None:
        if folder not in self.mount.unlistable:
            with contextlib.suppress(OSError), os.scandir(f"{self.mount.path}/{folder}") as entries:
                for _ in entries:
                    self._moved += 1

    def _note_read(self, number: int, each: S3Object) -> None:
        """Has an object's headers asked for, when it has been read."""
        if each.facts is None and each.is_shown and self._heads:
            while not self.ahead.is_over:
                with contextlib.suppress(queue.Full):
                    self._to_ask.put((number, each), timeout=POLL_SECONDS)
                    return
        elif each.is_shown and each.size_bytes and self.ahead.is_read(each.last_modified.timestamp()):
            self.is_unproven = True

    def _ask(self) -> None:
        try:
            while not self.ahead.is_over:
                try:
                    number, each = self._to_ask.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    if self._walked.is_set():
                        return
                    continue
                if self._refusals < MAX_NAMED and self.ahead.wait_until_passed(number):
                    self._learn(each)
                self._moved += 1
        except BaseException:
            self.ahead.close()  # nobody waits for what does not come
            raise

    def _learn(self, each: S3Object) -> None:
        """Asks S3 for an object's headers, and so for the version that it has now."""
        try:
            now = self._version(each, self._asking.request("HEAD", f"{self._prefix}{each.key}"))
            if (now.size_bytes, now.etag) != (each.size_bytes, each.etag):
                now = self._overwritten(each, now)
            self.catalog.add([dataclasses.replace(now, last_modified=each.last_modified)])
            self._refusals = 0
        except (S3Error, CatalogError) as error:
            if isinstance(error, S3Error) and error.status == 404:  # it was deleted meanwhile
                return
            with self._lock:  # each number is somebody's: one of them tells
                self.is_unproven, self._refusals = True, self._refusals + 1
                number = self._refusals
            if number in (1, MAX_NAMED):
                many = "headers cannot be asked for, the archives lack those of new and changed objects"
                words = many if number > 1 else f"{each.key!r} is archived without its headers"
                self.runtime.console.warning("source", f"{words}: {error}")

    def _version(self, each: S3Object, answer: Answer) -> S3Object:
        facts: dict[str, Any] = {"headers": headers_of(answer)}
        if tags := self._tags(each.key) if answer.has_tags else {}:
            facts["tags"] = tags
        if storage_class := answer.headers.get("x-amz-storage-class"):
            facts["storage_class"] = storage_class
        size_bytes, modified = int(answer.headers["content-length"]), answer.time("Last-Modified")
        return S3Object(
            each.key, size_bytes, modified or each.last_modified, answer.etag, each.is_shown, facts
        )

    def _tags(self, key: str) -> dict[str, str]:
        """An object's tags. That they may not be read is told once."""
        if self._tags_refused:
            return {}
        try:
            return self._client.tags(f"{self._prefix}{key}")
        except S3Error as error:
            with self._lock:
                is_news = error.status == 403 and not self._tags_refused
                self._tags_refused |= is_news
            if is_news:
                self.runtime.console.info("source", f"{TAGS_REFUSED}: {error.message}")
            return {}

    def _overwritten(self, each: S3Object, now: S3Object) -> S3Object:
        """What to note of an object that had another version when it was listed.

        Whoever has read it has the old one, the new one, or, where that took several requests, some of both.
        """
        modified = each.last_modified.timestamp()
        try:
            name = f"source: stat of {each.key!r}"
            shown = within(MOUNT_SECONDS, name, lambda: os.stat(self.path(each)))
        except OSError as error:
            self.mixed.add(each.key, f"it was overwritten meanwhile, and {error.strerror}")
            return dataclasses.replace(now, etag="")
        is_read = any(reader.began and modified >= reader.since for reader in self.readers)
        if not is_read and shown.st_mtime - modified <= 1:
            return each  # and its headers belong to the version that the next run reads
        was_rewritten = now.last_modified.timestamp() - shown.st_mtime > 1
        if shown.st_size != now.size_bytes:
            sizes = f"{shown.st_size:,} bytes are archived, it has {now.size_bytes:,}"
            self.mixed.add(each.key, f"it was overwritten meanwhile: {sizes}")
        elif was_rewritten and now.size_bytes > WHOLE_READ_BYTES:
            self.mixed.add(each.key, "it was overwritten meanwhile: what is archived may be of both versions")
        elif not was_rewritten:
            return now
        return dataclasses.replace(now, size_bytes=shown.st_size, etag="")

    def _fetch_ahead(self, each: S3Object) -> None:
        with contextlib.suppress(BackupError):  # who needs it hears of that
            self.fetched(each)

    def fetched(self, each: S3Object, reader: Reader | None = None) -> str:
        """The path, for borg, of a file with an object's content, which our own client fetches.

        It is there until `reader` gives it back. Raises S3Error and OSError.
        """
        with self._lock:
            is_first = each.key not in self._fetched
            future, users = self._fetched.setdefault(each.key, (concurrent.futures.Future(), set()))
            if reader:
                users.add(reader)
        if is_first:
            try:
                future.set_result(self._fetch(each))
            except Exception as error:  # who waits for it must hear of that
                future.set_exception(error)
        while concurrent.futures.wait([future], timeout=POLL_SECONDS).not_done:
            self.runtime.stop.check()
        return future.result()

    def _fetch(self, each: S3Object) -> str:
        path = Path(self._folder, odd_path(each.key))
        with path.open("wb") as stream:
            for answer in self._client.download(f"{self._prefix}{each.key}", each.size_bytes):
                stream.write(answer.body)
                self._moved += 1
        now = self._version(each, answer)
        now = dataclasses.replace(now, size_bytes=path.stat().st_size)
        os.utime(path, (now.last_modified.timestamp(),) * 2)
        self.catalog.add([now])
        # borg archives it by what follows the dot (the slashdot hack of its documentation).
        return f"{self._folder}/./{odd_path(each.key)}"

    def give_back(self, each: S3Object, reader: Reader, number: int) -> None:
        """`reader` needs a file of `fetched` no more; it goes when all have passed it."""
        with self._lock:
            _, users = self._fetched[each.key]
            users.discard(reader)
            if not users and self.ahead.has_passed(number):
                del self._fetched[each.key]
                Path(self._folder, odd_path(each.key)).unlink(missing_ok=True)

    def manifest(self, reader: Reader, vanished: Collection[str]) -> str:
        """The path, for borg, of the manifest of an archive that lacks what has vanished.

        It is written when all headers are there.
        """
        self.ahead.wait_until(reader, lambda: all(head.done() for head in self._heads))
        while concurrent.futures.wait(self._heads, timeout=POLL_SECONDS).not_done:
            self.runtime.stop.check()
        for head in self._heads:
            head.result()
        if self.ahead.is_over:
            raise BackupError("source: the reading of its listing has ended too early", TRY_AGAIN)
        folder, is_late = tempfile.mkdtemp(dir=self._folder), self.ahead.is_left(reader)
        path = Path(folder, MANIFEST_PATH)
        path.parent.mkdir(parents=True)
        with self._writing, path.open("w", encoding="ascii") as stream:
            # Others' headers were asked for before a late one has read.
            if (self.is_unproven or is_late) and self.runtime.settings.audit:
                try:
                    self._look_again()
                except S3Error as error:
                    self.doubt = str(error)
            for each in self.catalog.rows():
                if each.key not in vanished:
                    stream.write(f"{manifest_line(each)}\n")
                    self._moved += 1
        return f"{folder}/./{MANIFEST_PATH}"

    def _look_again(self) -> None:
        """Lists the source once more, where objects were read whose headers have not been asked for since."""
        for entry in self._client.list_objects(self._prefix):
            self._moved += 1
            key = entry.key[len(self._prefix) :]
            each = self.catalog.find(key) if key else None
            if not each or not each.is_shown or (entry.etag and not each.etag):  # that was noted before
                continue
            if (each.size_bytes, each.etag) != (entry.size_bytes, entry.etag):
                now = self._overwritten(each, dataclasses.replace(entry, key=key))
                self.catalog.add([dataclasses.replace(now, facts=None)])


@dataclass(frozen=True)
class Told:
    sent: int  # how many it had been told of then
    number: int  # in the catalog
    each: S3Object
    is_fetched: bool  # by our own client


MANIFEST = S3Object(MANIFEST_PATH, 0, EPOCH)


def is_folder(each: S3Object) -> bool:
    """Whether an object is a folder for borg, and no file."""
    return each.is_shown and each.key.endswith("/")


class Fed:
    """One borg that is fed: what it was told of, and what has become of that."""

    def __init__(self, feeder: Feeder, reader: Reader, name: str, since: float) -> None:
        """Objects that were last modified before `since` it knows."""
        self.read_end, self._write_end = os.pipe()
        self.files = 0  # that its archive is to hold
        self.lacks = Findings()
        self.vanished: dict[str, None] = {}  # keys
        self.failure: Exception | None = None  # of ours
        self.has_manifest, self.manifest_bytes = False, 0
        self._feeder, self._reader, self._name, self._since = feeder, reader, name, since
        self._changed, self._is_over = threading.Condition(), False
        self._under_way: deque[Told] = deque()
        self._sent, self._refusals, self._more_unread = 0, 0, 0
        self._unread: list[S3Object] = []
        self._moved, self._seen = 0.0, (0, 0.0)
        new = "modified >= ? OR NOT is_shown"
        self._objects, self._bytes = feeder.catalog.total()
        objects, size_bytes = feeder.catalog.total(new, [max(since, 0) * 10**6])
        self._effort = size_bytes + objects * SMALLEST_PLACE_BYTES + self._objects * KNOWN_BYTES
        self._began, self._done = time.monotonic(), (0, 0, 0)

    def began(self, child: Child) -> None:
        """`child` is the borg; it reads our pipe."""
        os.close(self.read_end)
        self._feeder.ahead.began(self._reader, self._since, child)
        in_background(self._feed)

    def close(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._feeder.ahead.left(self._reader)

    def moved(self) -> float:
        """A meter: it grows while borg waits for us, and we are at work or wait for another borg."""
        now, before = (self._feeder.moved, time.monotonic()), self._seen
        self._seen = now
        if self._reader.waits_since:
            self._moved += now[1] - before[1]
        elif not self._under_way:
            self._moved += now[0] - before[0]
        return self._moved

    def take(self, event: Mapping[str, Any]) -> None:
        number, passed = event["number"], []
        with self._changed:
            if event["type"] == "fed_status":
                each = next(entry.each for entry in self._under_way if entry.sent == number)
                if event["status"] in "AMC":  # it reads what it should know: another version, perhaps
                    if each.is_shown and each.last_modified.timestamp() < self._since:
                        self._feeder.is_unproven = True
                elif event["status"] == "E" or not is_folder(each):
                    self.files -= not is_folder(each)
                    if len(self._unread) < UNREAD_AT_MOST:
                        self._unread.append(each)
                    else:
                        self._more_unread += 1
                return
            while self._under_way and self._under_way[0].sent <= number:
                passed.append(self._under_way.popleft())
            self._changed.notify_all()
        if passed:
            self._feeder.ahead.done(self._reader, passed[-1].number)
        for entry in passed:
            if entry.is_fetched:
                self._feeder.give_back(entry.each, self._reader, entry.number)
        self._tell_progress([entry.each for entry in passed])

    def _feed(self) -> None:
        try:
            with open(self._write_end, "wb", buffering=0) as pipe:
                number = 0
                for number, each in enumerate(self._feeder.catalog.rows(), 1):
                    self._note_told(number - 1)
                    self._feeder.ahead.wait_until_near(self._reader, number)
                    if each.is_shown:
                        self._tell(pipe, number, each, self._feeder.path(each))
                    else:
                        self._tell_fetched(pipe, number, [each])
                self._note_told(number)
                self._wait_until_done()
                self._fetch_unread(pipe, number)
                manifest = self._feeder.manifest(self._reader, self.vanished)
                self._tell(pipe, number, MANIFEST, manifest)
                self._wait_until_done()
                self.has_manifest = MANIFEST not in self._unread
                self.manifest_bytes = os.path.getsize(manifest) if self.has_manifest else 0
                for each in self._unread:
                    self.lacks.add(each.key, UNREAD)
                pipe.write(b"\0")  # this is the end
        except BrokenPipeError:
            pass  # borg has ended, and said why
        except OSError as error:
            words = f"{self._name}: what borg is to read cannot be written: {error.strerror}"
            self.failure = BackupError(words, DISK_HELP)
        except Exception as error:  # without the end, borg makes no archive
            self.failure = error

    def _tell(
        self, pipe: IO[bytes], number: int, each: S3Object, path: str, is_fetched: bool = False
    ) -> None:
        with self._changed:
            self._sent += 1
            self._under_way.append(Told(self._sent, number, each, is_fetched))
            self.files += not is_folder(each)
        pipe.write(os.fsencode(path) + b"\0")

    def _note_told(self, number: int) -> None:
        """borg was told of all objects up to this one, but for those that are not there."""
        with self._changed:
            if not self._under_way:
                self._feeder.ahead.done(self._reader, number)
            elif self._under_way[-1].number < number:
                self._under_way[-1] = dataclasses.replace(self._under_way[-1], number=number)

    def _tell_fetched(self, pipe: IO[bytes], number: int, objects: Sequence[S3Object]) -> None:
        """Tells borg of objects that our own client fetches, some at a time."""
        fetches = [
            in_background(lambda each=each: self._feeder.fetched(each, self._reader)) for each in objects
        ]
        for each, fetch in zip(objects, fetches, strict=True):
            try:
                self._tell(pipe, number, each, fetch.result(), is_fetched=True)
            except Stopped:
                raise
            except BackupError as error:
                self._note_lack(each, error)

    def _fetch_unread(self, pipe: IO[bytes], number: int) -> None:
        """Fetches what borg could not read, unless S3 refuses very many."""
        unread, self._unread = self._unread, []
        for start in range(0, len(unread), FETCHED_AT_ONCE):
            if self._refusals < MAX_NAMED:
                self._tell_fetched(pipe, number, unread[start : start + FETCHED_AT_ONCE])
            else:
                for each in unread[start : start + FETCHED_AT_ONCE]:
                    self.lacks.add(each.key, REFUSED_ALIKE)
        self._wait_until_done()
        if self._more_unread:
            is_alike = self._refusals >= MAX_NAMED
            self.lacks.add_more(self._more_unread, REFUSED_ALIKE if is_alike else UNREAD)

    def _note_lack(self, each: S3Object, error: BackupError) -> None:
        """Notes why an object is not in the archive, in S3's words where these are the reason."""
        status = error.status if isinstance(error, S3Error) else 0
        if status == 404:
            self.vanished[each.key] = None
        elif status in REFUSALS:
            self._refusals += 1
            self.lacks.add(each.key, f"S3 refuses it: {error.code}{error.message.partition(error.code)[2]}")
        else:
            self.lacks.add(each.key, f"{UNREAD}: {error.message}")

    def _wait_until_done(self) -> None:
        """Returns when borg has read all that it was told of. Raises BrokenPipeError when it has ended."""
        with self._changed:
            while self._under_way:
                if self._is_over:
                    raise BrokenPipeError
                self._changed.wait(POLL_SECONDS)

    def _tell_progress(self, passed: Sequence[S3Object]) -> None:
        """Says how far it is. What borg knows is passed soon; a small object takes longer than its bytes."""
        objects, size_bytes, effort = self._done
        for each in passed:
            is_new = not each.is_shown or each.last_modified.timestamp() >= self._since
            effort += KNOWN_BYTES + (SMALLEST_PLACE_BYTES + each.size_bytes if is_new else 0)
            size_bytes += each.size_bytes
        objects = min(objects + len(passed), self._objects)
        self._done = objects, size_bytes, effort
        share = min(1.0, effort / self._effort) if self._effort else 1.0
        seconds = (time.monotonic() - self._began) * (1 - share) / share if share else 0.0
        self._feeder.runtime.console.progress(
            self._name,
            f"{objects:,} of {count(self._objects, 'object')}, {size(size_bytes)} of {size(self._bytes)},"
            f" {math.floor(share * 100)} %, {duration(seconds)} left",
            objects=objects,
            bytes=size_bytes,
            objects_total=self._objects,
            bytes_total=self._bytes,
            percent=math.floor(share * 100),
            seconds_left=round(seconds),
        )


@dataclass(frozen=True)
class Source:
    found: Preflight
    mount: Mount
    feeder: Feeder
    reader: Reader


def back_up_batch(
    runtime: Runtime,
    found: Preflight,
    mount: Mount,
    catalog: Catalog,
    batch: Sequence[tuple[Outcome, Preflight | BackupError]],
) -> list[tuple[Outcome, Preflight | BackupError]]:
    """Backs up to some targets side by side; the source is read once for all. Raises Stopped.

    Returns those that are to be tried once more.
    """
    readers = [Reader() for _ in batch]
    with full_disk_told(runtime.settings.source):
        feeder = Feeder(runtime, found, mount, catalog, readers)
    try:
        futures = [
            in_background(
                lambda outcome=outcome, check=check, source=Source(found, mount, feeder, reader): attempt(
                    runtime, outcome, check, source
                )
            )
            for (outcome, check), reader in zip(batch, readers, strict=True)
        ]
        # Each sees stop signals by itself, and has its own deadlines.
        while concurrent.futures.wait(futures, timeout=PROGRESS_SECONDS).not_done:
            with contextlib.suppress(OSError):
                os.utime(catalog.path.parent)  # or another run might take it for a dead one's
    finally:
        feeder.close()
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
        source.feeder.ahead.left(source.reader)


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
            if is_new:  # `borg init` made an empty files cache
                source.feeder.catalog.note_archive(repository.cache.name, runtime.settings.label, 0, 0.0)
            else:
                check_encryption(runtime, repository)
                warn_of_missing_cache(runtime, target, repository.cache)
            create_archive(runtime, outcome, repository, source)
            is_whole = not outcome.failures
            compare_with_last(runtime, outcome, repository, source.feeder.catalog)
            if target.prune and outcome.objects and not outcome.is_suspicious:
                prune(runtime, outcome, repository)
                if target.compact_percent is not None:
                    compact(runtime, outcome, repository)
            check_at_last(runtime, outcome, repository, f"the archive {outcome.archive} is stored")
        outlast_name(outcome.archive)
    if outcome.objects and is_whole:  # what comes after another one is to be compared with the last good one
        noted = repository.cache.name, runtime.settings.label, outcome.objects
        source.feeder.catalog.note_archive(*noted)
    runtime.console.info(target.store.name, f"done: everything is uploaded to {target.store.location}")
    if is_new or not check.holds(target.store, KEY_EXPORTED_NAME):
        remind_of_key(runtime, target)


def remind_of_key(runtime: Runtime, target: Target) -> None:
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
    target, settings, feeder = outcome.target, runtime.settings, source.feeder
    runtime.console.info(target.store.name, "borg create begins")
    as_of = source.found.clock.timestamp() - RACE_SECONDS
    fed = Fed(feeder, source.reader, target.store.name, known_until(feeder.catalog, repository.cache))
    comment = f"{SOURCE_AS_OF}{source.found.clock:%Y-%m-%dT%H:%M:%SZ}{WITH_MANIFEST}"
    with contextlib.closing(fed):
        try:
            created = repository.borg.run(
                borg_create(target, settings.label, repository.mount.path, comment),
                fed.take,
                fed.began,
                source.found.clock - timedelta(seconds=RACE_SECONDS),
                own={"S3BORGBACKUP_FED": str(fed.read_end)},
                pass_fds=[fed.read_end],
                waits=fed.moved,
            )
        except BackupError as error:
            raise error if isinstance(error, (Stopped, Stuck)) or not fed.failure else fed.failure from None
    record_archive(runtime, outcome, created, fed)
    if fed.lacks.count:  # some objects, or is the source gone, or its keys revoked?
        examine(S3Client(settings.source, source.found.region, PROVEN, runtime.stop), write=False)
    judge_emptiness(runtime, outcome, feeder.listed)
    report_findings(runtime, outcome, fed, feeder.mixed)
    if feeder.doubt:
        words = "whether objects were overwritten while they were read is not known, and nothing is pruned"
        note_failure(runtime, outcome, f"{words}: {feeder.doubt}")
    report_shrunk(runtime, outcome, source.mount)
    if created.log.is_warning:
        outcome.warn()
    lost = fed.files - json.loads(created.output)["archive"]["stats"]["nfiles"]
    if lost or not fed.has_manifest:
        what = f"{count(abs(lost), 'object')} {'less' if lost > 0 else 'more'} than borg was told of"
        note_failure(runtime, outcome, f"the archive holds {what if lost else 'no manifest'}. Run it again.")
    feeder.catalog.note_archive(repository.cache.name, settings.label, None, as_of)


def known_until(catalog: Catalog, cache: Path) -> float:
    """Objects that were modified last before this time (Unix) borg knows, and will not read.

    Without its files cache it knows none; where the catalog knows nothing of that, it is as old as it is.
    """
    try:
        written = (cache / "files").stat().st_mtime
    except OSError:
        return -math.inf
    [[noted]] = catalog.execute("SELECT max(as_of) FROM archives WHERE repository = ?", [cache.name])
    return written if noted is None else noted


def note_failure(runtime: Runtime, outcome: Outcome, text: str) -> None:
    """Tells what fails a target although its story goes on, without pruning."""
    name, outcome.is_suspicious = outcome.target.store.name, True
    outcome.failures.append(f"{name}: {text}")
    runtime.console.error(name, outcome.failures[-1])


def report_findings(runtime: Runtime, outcome: Outcome, fed: Fed, mixed: Findings) -> None:
    """Prints what an archive lacks, or holds as it never was."""
    name = outcome.target.store.name
    for found in (fed.lacks, mixed):
        for key, reason in found.named:
            runtime.console.warning(name, f"{key!r} is not, or not whole, in the archive: {reason}")
        if found.count > len(found.named):
            runtime.console.warning(name, f"{found.count - len(found.named):,} more such objects")
    if lacks := fed.lacks.count + mixed.count:
        outcome.warn(f"the archive lacks {count(lacks, 'object')}")
    if fed.vanished:
        more = f" and {len(fed.vanished) - 5:,} more" if len(fed.vanished) > 5 else ""
        names = f"{', '.join(map(repr, list(fed.vanished)[:5]))}{more}"
        runtime.console.info(name, f"deleted before it was read, and so not in the archive: {names}")
    if not fed.lacks.explains_all:
        note_failure(
            runtime,
            outcome,
            f"{count(fed.lacks.unread, 'object')} of the source could not be read (named above). The archive"
            " holds the others; nothing is pruned, as older ones may hold these. Run it again; if it stays"
            " so, look at those objects.",
        )


def compare_with_last(runtime: Runtime, outcome: Outcome, repository: Repository, catalog: Catalog) -> None:
    """Warns of an archive that has far fewer objects than the one before: the source may be wrong.

    Warns once: the next archive is compared with this one.
    """
    settings, name = runtime.settings, outcome.target.store.name
    found = catalog.execute(
        "SELECT objects FROM archives WHERE repository = ? AND label = ?",
        [repository.cache.name, settings.label],
    )
    last = found[0][0] if found else None
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


def ask_count(runtime: Runtime, outcome: Outcome, repository: Repository) -> int | None:
    """How many objects the archive before this one has. borg reads both archives' metadata for that."""
    borg, options = repository.borg, ["--glob-archives", archive_pattern(runtime.settings.label)]
    options += ["--bypass-lock"] if repository.is_ours_alone else []
    try:
        shown = borg.run(["info", "--json", "--last", "2", *options, str(borg.repository)])
    except (Stopped, Stuck):
        raise
    except BackupError as error:  # the archive that was just made is worth more than this
        runtime.console.warning(outcome.target.store.name, str(error))
        return None
    for each in json.loads(shown.output)["archives"]:
        if each["name"] != outcome.archive:
            return each["stats"]["nfiles"] - each.get("comment", "").endswith(WITH_MANIFEST)
    return None


# What an archive's comment begins with: before that time the source cannot have been listed.
SOURCE_AS_OF = "s3borgbackup: source as of "
WITH_MANIFEST = ", with manifest"  # and then one of its files is no object


def outlast_name(archive: str) -> None:
    """Waits until the second in an archive's name is over: whoever comes next needs another one."""
    over = datetime.fromisoformat(archive[-len("2025-01-31T03:00:00") :]).timestamp() + 1
    time.sleep(min(1.0, max(0.0, over - time.time())))


def warn_of_missing_cache(runtime: Runtime, target: Target, cache: Path) -> None:
    """Says what a run without borg's cache costs."""
    if not (cache / "files").exists():
        runtime.console.info(
            target.store.name,
            "borg's cache of this repository is not there: the whole source is read again, and the"
            " repository's index. A volume keeps it: docker run --volume s3borgbackup-cache:/cache",
        )


def record_archive(runtime: Runtime, outcome: Outcome, created: BorgResult, fed: Fed) -> None:
    """Takes borg's statistics into `outcome` and prints them."""
    archive = json.loads(created.output)["archive"]
    stats, name = archive["stats"], outcome.target.store.name
    outcome.archive, outcome.objects = archive["name"], stats["nfiles"] - fed.has_manifest
    outcome.archived_bytes = stats["original_size"] - fed.manifest_bytes
    outcome.stored_bytes = stats["deduplicated_size"]
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


def judge_emptiness(runtime: Runtime, outcome: Outcome, listed: int) -> None:
    """Warns of an archive without objects. Raises BackupError where the source `listed` some."""
    name = outcome.target.store.name
    if outcome.objects:
        return
    if listed:
        raise BackupError(
            f"{name}: the archive {outcome.archive} is empty, and {runtime.settings.source.location} was not",
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
    target = outcome.target
    pruned = repository.borg.run(borg_prune(target, runtime.settings.label, repository.mount.path))
    outcome.add(pruned)
    gone = sum(line.startswith("Pruning archive") for line in pruned.log.infos)
    kept = sum(line.startswith("Keeping archive") for line in pruned.log.infos)
    text = f"pruned {count(gone, 'archive')}, kept {kept:,}"
    runtime.console.info(target.store.name, text, "pruned", pruned=gone, kept=kept)


def compact(runtime: Runtime, outcome: Outcome, repository: Repository) -> None:
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
    verdicts = {outcome.verdict for outcome in outcomes}
    if Verdict.FAILURE in verdicts:
        return EXIT_FAILURE
    if Verdict.BUSY in verdicts:
        return EXIT_BUSY
    return EXIT_WARNINGS if Verdict.WARNING in verdicts else EXIT_OK


def summary(outcomes: Sequence[Outcome]) -> str:
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
    if isinstance(results[0], Preflight) and settings.headers:
        tell_of_tags(runtime, results[0])
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


def tell_of_tags(runtime: Runtime, source: Preflight) -> None:
    """Says so where the source's key may not read tags, by one object."""
    client = S3Client(runtime.settings.source, source.region, HASTY, runtime.stop)
    try:
        for entry in source.keys[:1]:
            client.tags(entry.key)
    except S3Error as error:
        if error.status == 403:
            runtime.console.info("source", f"{TAGS_REFUSED}: {error.message}")


def describe(store: Store, result: Preflight) -> str:
    """What a usable store holds, in a few words."""
    if store.target is not None:
        return f"ok, holds {result.repository_state(store).value}"
    return f"ok, {count(len(result.keys), 'object')}{'' if result.complete else ' or more'}"


# ----------------------------------------------------------------------------------------------- Operations


def emit(text: str) -> None:
    """Prints a command's answer on standard output; that nobody reads it any more is no error."""
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
        files, archived_bytes = (
            number if isinstance(number, int) else None for number in map(entry.get, ("nfiles", "size"))
        )
        if files and entry.get("comment", "").endswith(WITH_MANIFEST):
            files -= 1
        return cls(entry["name"], start, end, files, archived_bytes)

    def belongs_to(self, label: str) -> bool:
        """Whether it is one of `label`, and no checkpoint."""
        return fnmatch.fnmatchcase(self.name, archive_pattern(label)) and not self.name.endswith(
            ".checkpoint"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "start": self.start.isoformat(),
            "end": self.end.isoformat(),
            "objects": self.objects,
            "bytes": self.archived_bytes,
        }


@dataclass(frozen=True)
class Contents:
    encryption: str
    archives: tuple[Archive, ...]  # oldest first

    def newest(self, label: str) -> Archive | None:
        return next((archive for archive in reversed(self.archives) if archive.belongs_to(label)), None)

    def as_json(self) -> dict[str, Any]:
        return {"archives": [archive.as_json() for archive in self.archives]}


def contents(repository: Repository) -> Contents:
    """Lists a repository's archives: a request for each. Raises BackupError."""
    options = ["--format", "{archive}{time}{end}{comment}{nfiles}{size}"]  # the last two: see LIST_SIZES
    path = str(repository.borg.repository)
    listed = json.loads(repository.borg.run(["list", "--json", *options, path]).output)
    archives = tuple(Archive.parse(entry) for entry in listed["archives"])
    return Contents(listed["encryption"]["mode"], archives)


def ask_each(
    runtime: Runtime, targets: Sequence[Target], ask: Callable[[Target], Contents | Facts]
) -> tuple[dict[Target, Contents | Facts], dict[str, Any], int]:
    """What `ask` says about each target; the same for programs, with the errors; and the exit code.

    An error is printed, and does not keep the others from their answers. Raises Stopped.
    """
    found, document, code = {}, {}, EXIT_OK
    for target in targets:
        try:
            found[target] = ask(target)
            document[target.name] = found[target].as_json()
        except Stopped:
            raise
        except BackupError as error:
            runtime.console.error(target.store.name, str(error))
            document[target.name], code = {"error": str(error)}, max(code, error.exit_code)
    return found, document, code


def list_archives(runtime: Runtime, targets: Sequence[Target], as_json: bool) -> int:
    def ask(target: Target) -> Contents:
        with opened_for_reading(runtime, target) as repository:
            return contents(repository)

    found, document, code = ask_each(runtime, targets, ask)
    rows = [("target", "archive", "time", "objects", "size")]
    for target, known in found.items():
        for archive in known.archives:
            objects = "-" if archive.objects is None else f"{archive.objects:,}"
            archived = "-" if archive.archived_bytes is None else size(archive.archived_bytes)
            rows.append((target.name, archive.name, local_time(archive.start), objects, archived))
        if not known.archives:
            rows.append((target.name, "-", "-", "-", "-"))
    text = "\n".join(table(rows)) if found else ""
    emit(json.dumps(document, indent=2) if as_json else text)
    return code


@dataclass(frozen=True)
class Facts:
    target: Target
    label: str
    identity: str
    known: Contents
    stored_objects: int
    stored_bytes: int
    key_exported: str  # when; empty: never
    checked: Checked
    lease: str  # who works on the repository; empty: nobody

    @property
    def archived_bytes(self) -> int:
        """What the archives would take one by one, without deduplication and compression."""
        return sum(archive.archived_bytes or 0 for archive in self.known.archives)

    def as_json(self) -> dict[str, Any]:
        record, newest = self.checked.record, self.known.newest(self.label)
        since = unchecked_since(record, self.checked.segments)
        return {
            "target": self.target.name,
            "endpoint": self.target.store.endpoint,
            "location": self.target.store.location,
            "repository_id": self.identity,
            "encryption": self.known.encryption,
            "key_exported": self.key_exported or None,
            "archives": len(self.known.archives),
            "archived_bytes": self.archived_bytes,
            "stored_objects": self.stored_objects,
            "stored_bytes": self.stored_bytes,
            "last_archive": newest.as_json() if newest else None,
            "last_check": record.checked.isoformat() if record.checked else None,
            "unchecked_since": since.isoformat() if since else None,
            "damage": record.damage or None,
            "in_use": self.lease or None,
        }

    def as_text(self) -> str:
        encryption, archives, record = self.known.encryption, self.known.archives, self.checked.record
        exported = f"never: backup.py key-export {shlex.quote(self.target.name)}"
        in_bucket = f"{size(self.stored_bytes)}, {count(self.stored_objects, 'object')}"
        if self.archived_bytes > self.stored_bytes:
            saved = 1 - self.stored_bytes / self.archived_bytes
            in_bucket += f": deduplication and compression save {saved:.1%}"
        last_run = "no archive has this label"
        if newest := self.known.newest(self.label):
            what = f"{count(newest.objects or 0, 'object')}, {size(newest.archived_bytes or 0)}"
            took = duration((newest.end - newest.start).total_seconds())
            last_run = f"{local_time(newest.start)}: {what}, in {took}"
        when = f"{record.checked:%Y-%m-%d %H:%M:%S %z}" if record.checked else "never, as far as is known"
        rows = [
            ("target", self.target.name),
            ("location", f"{self.target.store.location} at {self.target.store.endpoint}"),
            ("repository", self.identity),
            ("encryption", f"{encryption}: {KEY_PLACES.get(encryption, 'the key is in the repository')}"),
            ("key exported", self.key_exported or ("there is none" if encryption == "none" else exported)),
            ("archives", f"{len(archives):,}, {size(self.archived_bytes)} in all"),
            ("in the bucket", in_bucket),
            (f"last {self.label}", last_run),
            ("last check", f"DAMAGED: {record.damage}" if record.damage else f"{when}; {self.checked.age}"),
            ("in use", self.lease or "no"),
        ]
        return "\n".join(table(rows))


KEY_PLACES = {
    "none": "whoever can read the bucket can read the backup",
    "keyfile": "the key is in /config only",
    "keyfile-blake2": "the key is in /config only",
    "authenticated": "not encrypted; the key, which authenticates, is in the repository",
    "authenticated-blake2": "not encrypted; the key, which authenticates, is in the repository",
}


def gather_facts(runtime: Runtime, target: Target) -> Facts:
    with opened_for_reading(runtime, target) as repository:
        known, client = contents(repository), repository.client
        lease, record = look_at_lease(client), last_check(client, repository.identity)
        return Facts(
            target,
            runtime.settings.label,
            repository.identity,
            known,
            len(repository.files),
            sum(repository.files.values()),
            str(read_note(client, KEY_EXPORTED_NAME).get("exported", "")),
            Checked(record, segments_of(runtime, repository), client.clock or datetime.now(UTC)),
            str(lease) if lease and not lease.has_expired else "",
        )


def show_info(runtime: Runtime, targets: Sequence[Target], as_json: bool) -> int:
    found, document, code = ask_each(runtime, targets, lambda target: gather_facts(runtime, target))
    text = "\n\n".join(facts.as_text() for facts in found.values())
    emit(json.dumps(document, indent=2) if as_json else text)
    return code


def export_key(runtime: Runtime, target: Target, form: Sequence[str]) -> int:
    """Prints a repository's key, and notes beside the repository that this was done. Raises BackupError."""
    with opened_for_reading(runtime, target) as repository:
        exported = repository.borg.run(["key export", *form, str(repository.borg.repository)])
        try:
            print(exported.output, flush=True)
        except OSError as error:
            raise BackupError(
                f"{target.store.name}: the key could not be written: {error.strerror}", "Export it again."
            ) from None
        try:
            note = json.dumps({"exported": utc_now(repository.client)})
            repository.client.put(f"{target.store.key_prefix}{KEY_EXPORTED_NAME}", note.encode())
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
    """Prunes, compacts and checks repositories without their source; returns the exit code."""
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
    rows = [("target", "result", "archives", "duration")]
    for outcome in outcomes:
        counts = outcome.archives
        archives = "{archives_after:,} of {archives_before:,}".format(**counts) if counts else "-"
        rows.append((outcome.target.name, outcome.verdict.value, archives, duration(outcome.seconds)))
    return "\n".join([*table(rows), *reasons(outcomes)])


def maintain_target(runtime: Runtime, outcome: Outcome) -> None:
    target, label = outcome.target, runtime.settings.label
    with opened_for_writing(runtime, target, "maintenance") as repository:
        check_encryption(runtime, repository)
        known = contents(repository)
        newest, reason = known.newest(label), ""
        if target.prune and not newest:
            reason = f"no archive is called {label}-...; is BACKUP_LABEL that of the backups?"
        elif target.prune and newest.objects == 0:
            reason = f"the newest archive, {newest.name}, is empty; look at the source first"
        if reason:
            reason = f"nothing is pruned: {reason}"
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
    opened = opened_for_reading if command in READING_COMMANDS else opened_for_writing
    with opened(runtime, target, f"`borg {command}`") as repository:
        return repository.borg.hand_over(arguments)


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

TAGGING = "x-amz-tagging"

# A restore that has begun to upload in parts says so, again and again: who finds that nobody does any more
# ends these uploads. Nobody else's are touched.
RESTORING_NAME = f"{OWN_PREFIX}restoring-"
NOTE_SECONDS, NOTE_LIFETIME_SECONDS = 5, 20


@dataclass(frozen=True)
class Order:
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
    listed = json.loads(repository.borg.run(["list", "--json", str(repository.borg.repository)]).output)
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
# SeaweedFS may lose one of `a` and `a/b` for good where both are written at the same moment.
ABOVE_OTHERS = IS_COVERED.replace("objects", "items")
CLASHES, KEPT = "fate IN ('different', 'headers')", f"fate = 'there' AND {COUNTED}"


def parse_entry(line: bytes) -> tuple[str, str, int, int, bool]:
    """Path, kind (`-` for a file, `d` for a folder), size and Unix time of what is listed; if it is whole."""
    given = json.loads(line)
    kind = "h" if given["mode"][0] == "h" else given["type"]
    modified = math.floor(borg_time(given["mtime"]).timestamp())
    return given["path"], kind, given["size"], modified, given["healthy"]


class Plan(Catalog):
    """What an archive holds, what lies where that goes, what is to be done; its objects are the manifest."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._notes: deque[tuple[str, str, bytes]] = deque()
        self.prefix = ""  # what stands before the keys in the archive
        self.has_manifest = False
        with self._told():
            self._db.create_function("odd_path", 1, lambda key: odd_path(decode_key(key)).encode())
            self._db.executescript(PLAN_TABLES)

    def read(self, repository: Repository, archive: str, source: Path) -> None:
        """Takes in what an archive holds. `source` is where the source would be mounted now."""
        borg, place = repository.borg, f"{repository.borg.repository}::{archive}"
        borg.run(
            ["list", "--json-lines", "--format", "{size}{mtime}", place],  # nothing of its content is read
            consume=lambda lines: self.take(map(parse_entry, lines)),
        )
        self.has_manifest = bool(
            self.execute("SELECT 1 FROM entries WHERE path = ?", [MANIFEST_PATH.encode()])
        )
        if self.has_manifest:
            try:
                borg.run(
                    ["extract", "--stdout", place, f"pp:{MANIFEST_PATH}"],
                    consume=lambda lines: self.add(parse_manifest_line(line.decode()) for line in lines),
                )
            except ValueError as error:
                raise BackupError(
                    f"{repository.target.store.name}: the manifest of {archive} cannot be read: {error}",
                    DAMAGE_HELP.format(name=repository.target.name),
                ) from None
        self.arrange(source)

    def take(self, entries: Iterable[tuple[str, str, int, int, bool]]) -> None:
        rows = ((encode_key(path), place, *rest) for place, (path, *rest) in enumerate(entries))
        self.insert("entries", rows)

    def change(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self.take_notes()
        with self._told():
            self._db.executemany(sql, rows)

    def arrange(self, source: Path) -> None:
        """Joins the list and the manifest, when both are in.

        Keys stand behind the path under which the source was mounted then, which a run archived first; where
        there is none, as in what somebody archived by hand, the paths are the keys.
        """
        own = encode_key(OWN_FOLDER), encode_key(OWN_FOLDER[:-1] + "0")
        others = "path < ? OR path >= ?" if self.has_manifest else "? != ?"
        first = self.execute(f"SELECT path, kind FROM entries WHERE {others} ORDER BY place LIMIT 1", own)
        guesses, name = [str(source).lstrip("/")], f"/{source.name}"
        for path, kind in first:
            if kind == "d" and decode_key(path).endswith(name):
                guesses.insert(0, decode_key(path))
            elif self.has_manifest and f"{name}/" in decode_key(path):
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
        return self.execute(f"SELECT count(*), coalesce(sum(size), 0) FROM items WHERE {where}")[0]

    def summary(self, where: str) -> str:
        """`3 objects, 12 kB`, but for folders that an archive only has because nothing is in them."""
        number, size_bytes = self.sums(f"{where} AND {COUNTED}")
        return f"{count(number, 'object')}, {size(size_bytes)}"

    def note(self, item: Item, fate: Fate, sent: str = "") -> None:
        """Notes what is to be done about an object, or that it is written, and with which ETag."""
        self._notes.append((fate.value, sent.strip('"'), encode_key(item.key)))
        if len(self._notes) >= CATALOG_PAGE:  # one by one, threads would wait for each other most of the time
            self.take_notes()

    def take_notes(self) -> None:
        with self._told():
            notes = [self._notes.popleft() for _ in range(len(self._notes))]
            self._db.executemany("UPDATE items SET fate = ?, sent = ? WHERE key = ?", notes)

    def execute(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        self.take_notes()
        return super().execute(sql, values)


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
    """Threads that work side by side, on no more bytes than there is memory for; a failure ends all.

    Nobody waits at exit for one that hangs. Methods raise what has failed first, and Stopped.
    """

    def __init__(self, memory_bytes: int, stop: Stop) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changed, self._stop, self._number = threading.Condition(), stop, 0
        self._room = self._all = memory_bytes
        self._failures: list[BaseException] = []

    @property
    def is_busy(self) -> bool:
        return self._room < self._all

    def start(self, size_bytes: int, work: Callable[[], Result]) -> concurrent.futures.Future[Result | None]:
        """Has a thread do `work`, as soon as there is room for its bytes."""
        share = min(self._all, max(size_bytes, self._all // WAITING_OBJECTS))
        future: concurrent.futures.Future[Result | None] = concurrent.futures.Future()

        def do() -> None:
            try:
                future.set_result(None if self._failures else work())
            except BaseException as error:
                self._failures.append(error)
                future.set_exception(error)
            finally:
                with self._changed:
                    self._room += share
                    self._changed.notify_all()

        with self._changed:
            self._wait(lambda: self._room >= share)
            self._room -= share
            if self._number < RESTORE_THREADS:
                self._number += 1
                in_background(self._serve)
        self._queue.put(do)
        return future

    def _serve(self) -> None:
        while do := self._queue.get():
            do()

    def _wait(self, is_so: Callable[[], bool]) -> None:
        with self._changed:
            while not self._failures and not self._changed.wait_for(
                lambda: is_so() or self._failures, POLL_SECONDS
            ):
                self._stop.check()
            if self._failures:
                raise self._failures[0]

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if not kind:
                self._wait(lambda: not self.is_busy)
        finally:
            with self._changed:
                self._changed.wait_for(lambda: not self.is_busy, CLEANUP_SECONDS)
            for _ in range(self._number):
                self._queue.put(None)


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
        self._told = 0.0  # when that was told last

    def warn(self, text: str) -> None:
        """Tells what is not restored, or not as it was."""
        with self.lock:
            self.warnings += 1
        if self.warnings <= MAX_NAMED:
            self.console.warning("restore", text)

    def leave_out(self, item: Item, reason: str) -> None:
        self.plan.note(item, Fate.LEFT_OUT)
        self.warn(f"{item.key!r} could not be restored: {reason}")

    def add(self, objects: int, more_bytes: int) -> None:
        with self.lock:
            self.objects, self.bytes = self.objects + objects, self.bytes + more_bytes
            if time.monotonic() < self._told + POLL_SECONDS:
                return
            self._told = time.monotonic()
            done = f"{count(self.objects, 'object')}, {size(self.bytes)}"
            self.console.progress("restore", f"{done} {self.goal}")

    def for_each(self, where: str, work: Callable[..., None], *more: Any) -> None:
        """Has threads do `work` about each object for which `where` holds."""
        with Threads(self.memory_bytes, self.runtime.stop) as threads:
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
            output, threads = os.fdopen(writing, "wb"), Threads(self.memory_bytes, self.runtime.stop)
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
            for part in self.in_turn:
                where = f"fate = 'write' AND {part}"
                self.for_each(f"place IS NULL AND {where}", self.write, io.BytesIO(), {})
                self.export(repository, archive, "restored", where, self.write)
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

    is_patient, in_turn = False, ("1",)

    def __init__(self, runtime: Runtime, plan: Plan, root: Path) -> None:
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
        known, start = restorable(item.facts).items(), len(USER_METADATA)
        own = {name[start:]: text for name, text in known if name.startswith(USER_METADATA)}
        metadata = {**metadata, **own}
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
    return kept_headers((facts or {}).get("headers", {}))


def readable(value: str) -> str:
    """A header's value for comparisons: encoded words (RFC 2047) are what they mean, blanks do not count."""
    with contextlib.suppress(ValueError, LookupError, email.errors.MessageError):
        value = str(email.header.make_header(email.header.decode_header(value)))
    return " ".join(value.split())


class ToBucket(Restoration):
    """Into a bucket, by requests of our own."""

    is_patient = True  # while it waits for S3, which has an end
    in_turn = (ABOVE_OTHERS, f"NOT {ABOVE_OTHERS}")

    def __init__(self, runtime: Runtime, plan: Plan, client: S3Client, is_dry: bool) -> None:
        """Tries out what the store keeps, unless it `is_dry`. Raises S3Error."""
        super().__init__(runtime, plan, f"{client.store.location} at {client.store.endpoint}", PART_BYTES)
        self._client, self._direct, self._prefix = client, client.direct(), client.store.key_prefix
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
                answer = client.put(key, body, {**KEPT_HEADERS, TAGGING: "a=b"})
                kept = {TAGGING} if client.tags(key) else set()
            except S3Error as error:
                if error.status not in (*REFUSALS, *UNTAKEN_STATUSES, 501):
                    raise
                answer, kept = client.put(key, body, KEPT_HEADERS), set()
            dropped = {*KEPT_HEADERS, TAGGING} - kept - headers_of(client.request("HEAD", key)).keys()
            return answer.etag == MD5(body).hexdigest(), dropped
        finally:
            client.delete(key)

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
        there = (self._direct.get(self._prefix + item.key, span) for span in spans)
        self.plan.note(item, fate_by_content(there, stream))

    def compare_headers(self, item: Item, _: Threads) -> None:
        """Notes an object that is there with the same content, and with other headers or tags."""
        facts, key, wanted = item.facts or {}, self._prefix + item.key, restorable(item.facts)
        if "headers" not in facts:
            return
        try:
            found, tags = headers_of(self._direct.request("HEAD", key)), facts.get("tags")
            names = (wanted.keys() | found.keys()) - self._dropped
            names -= {"content-type"} - wanted.keys()  # whatever the server calls what has none
            differ = any(readable(wanted.get(name, "")) != readable(found.get(name, "")) for name in names)
            if differ or (tags and TAGGING not in self._dropped and self._direct.tags(key) != tags):
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
            answer = self._direct.request("PUT", key, headers=headers)
            self.plan.note(item, Fate.DONE, xml_text(answer.body, "ETag"))
        except S3Error as error:
            if not 400 <= error.status <= 501:
                raise
            self.plan.note(item, Fate.WRITE)

    def _headers_for(self, item: Item, metadata: Mapping[str, str]) -> dict[str, str]:
        """What an object is written with; `metadata` is what older archives have of it."""
        headers = restorable(item.facts) or {
            f"{USER_METADATA}{name}": value for name, value in metadata.items()
        }
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
            answer = self._direct.put(key, stream.read(), headers)
            self.add(0, item.size_bytes)
            self.plan.note(item, Fate.DONE, answer.etag)
        except S3Error as error:
            self._leave_out(item, error)

    def _upload(
        self, item: Item, key: str, headers: Mapping[str, str], stream: IO[bytes], threads: Threads
    ) -> None:
        """Begins an upload, and has threads send its parts and end it."""
        since, step = utc_now(self._client), part_bytes(item.size_bytes)
        self._write_note(key, (since, ""))
        try:
            begun = self._direct.request("POST", key, [("uploads", "")], headers)
        except S3Error as error:
            self._leave_out(item, error)
            self._write_note(key)
            return
        upload = xml_text(begun.body, "UploadId")
        self._write_note(key, (since, upload))
        # An earlier try may have begun one as well, and its answer was lost.
        found = self._begun(self._direct, key, since, utc_now(self._direct))
        self._abort(self._direct, key, [other for other in found if other != upload])

        def send(number: int, body: bytes) -> str:
            query = [("partNumber", str(number)), ("uploadId", upload)]
            etag = self._direct.put(key, body, query=query).etag
            self.add(0, len(body))
            return f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>"

        parts = [
            threads.start(step, functools.partial(send, number, stream.read(step)))
            for number in range(1, -(-item.size_bytes // step) + 1)
        ]
        threads.start(0, lambda: self._complete(item, key, upload, [part.result() for part in parts]))

    def _complete(self, item: Item, key: str, upload: str, parts: Sequence[str | None]) -> None:
        body = f"<CompleteMultipartUpload>{''.join(map(str, parts))}</CompleteMultipartUpload>".encode()
        client = self._direct.with_patience(dataclasses.replace(PROVEN, answer_seconds=300))
        try:
            answer = client.request("POST", key, [("uploadId", upload)], body=body)
            etag = xml_text(answer.body, "ETag")
        except S3Error as error:
            if error.code != "NoSuchUpload":
                self._leave_out(item, error)
                return
            there = client.request("HEAD", key)  # an answer that was lost may have been a success
            etag = there.etag
            if there.headers.get("content-length") != str(item.size_bytes) or etag == item.there_etag:
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
        if not self.plan.sums("fate = 'restored'")[0]:
            return []  # it was listed just before
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

    @staticmethod
    def _begun(client: S3Client, key: str, since: str, until: str) -> list[str]:
        """The ids of the uploads of an object that began in this time."""
        query, ids = [("uploads", ""), ("prefix", key), ("encoding-type", "url")], []
        for element in ElementTree.fromstring(client.request("GET", query=query).body).iter():
            told = {each.tag.rpartition("}")[2]: each.text or "" for each in element}
            if urllib.parse.unquote_plus(told.get("Key", "")) == key and "UploadId" in told:
                begun = datetime.fromisoformat(told["Initiated"])
                if datetime.fromisoformat(since) <= begun <= datetime.fromisoformat(until):
                    ids.append(told["UploadId"])
        return ids

    @staticmethod
    def _abort(client: S3Client, key: str, uploads: Sequence[str]) -> None:
        for upload in uploads:
            try:
                client.request("DELETE", key, [("uploadId", upload)])
            except S3Error as error:
                if error.status != 404:
                    raise

    def _end_uploads(self, note: str, uploads: Mapping[str, Sequence[str]], until: str) -> None:
        """Ends uploads, and deletes the note with them. One whose id is not known began meanwhile."""
        client = self._client.with_patience(Patience(failing_seconds=CONNECT_PATIENCE_SECONDS))

        def end(key: str) -> None:
            since, upload = uploads[key]
            self._abort(client, key, [upload] if upload else self._begun(client, key, since, until))

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
        if order.metadata:
            there = "key IN (SELECT key FROM items WHERE fate IN ('restored', 'there'))"
            metadata.writelines(f"{manifest_line(known)}\n" for known in plan.rows(there))
        return place.report(time.monotonic() - start)


def opened_metadata(order: Order) -> IO[str]:
    """The file for what is known of the objects. Raises BackupError."""
    path = order.metadata if order.metadata and not order.dry_run else os.devnull
    try:
        return open(path, "w", encoding="ascii")
    except OSError as error:
        raise BackupError(f"cannot write {path}: {error.strerror}", "Correct --metadata.") from None


# --------------------------------------------------------------------------------------------- Verification

# Is an archive good? What the source lists now comes into a table beside the plan, which has what the archive
# holds and what its manifest says of that, and each comparison is a query. A sample leaves borg as a tar
# stream, for which borg verifies what it reads, and is compared piece by piece with what S3 itself gives. So
# memory grows neither with the bucket, nor with the sample, nor with an object's size.

DEFAULT_SAMPLE = "300"  # where 1 % of the objects are bad, one of them is among 300 with a chance of 95 %
SAMPLE_HELP = "write a number of objects, a share such as 1%, or all"
PATHS_AT_ONCE = 100_000  # of a sample, for one borg, which keeps them in memory
FETCHED_AHEAD, FETCHED_BYTES = 32, 2 * 1024 * 1024  # pieces of objects, and what one has at most
CLOCK_ERROR_SECONDS = 900  # S3 refuses clients whose clocks are further off

# `content` has the archived objects in the archive's order, but first those whose content borg can give.
VERIFICATION_TABLES = (
    "CREATE TABLE content (number INTEGER PRIMARY KEY, key BLOB, since TEXT)",
    "CREATE TABLE sample (number INTEGER PRIMARY KEY, content INTEGER)",
)
IS_FILE = "(path IS NOT NULL AND fate = 'unknown')"
# ETags are opaque, that of a multipart upload depends on its parts: they are equal or not. Times are in whole
# seconds, as HTTP and tar have them.
COMPARE_CONTENT = f"""
INSERT INTO content SELECT NULL, items.key, CASE
    WHEN now.key IS NULL THEN 'deleted'
    WHEN now.size = items.size AND CASE WHEN '' IN (items.etag, now.etag)
        THEN now.modified / 1000000 = items.modified ELSE now.etag = items.etag END THEN 'unchanged'
    ELSE 'changed' END
FROM items LEFT JOIN source.objects AS now USING (key)
WHERE {COUNTED} AND (path IS NOT NULL OR items.size = 0) ORDER BY NOT {IS_FILE}, place
"""
# An archive without a manifest does not tell the empty objects that stand for folders.
LISTED = "source.objects AS now WHERE NOT (:old AND now.size = 0 AND substr(key, -1) = X'2F')"
NOT_THEN = f"{LISTED} AND NOT EXISTS (SELECT 1 FROM items WHERE items.key = now.key)"
LOST_OR_LATE = """
'of ' || strftime('%Y-%m-%dT%H:%M:%SZ', modified / 1000000, 'unixepoch') || ': the backup missed it, or it'
|| ' came later with an older time (a delete marker was removed, or it is a replica); the next has it'
"""
SAMPLED = """
SELECT sample.number, items.key, path, items.size, since = 'unchanged', now.etag, now.modified / 1000000,
    now.modified / 1000000 = items.modified, main.objects.facts
FROM sample JOIN content ON content.number = sample.content JOIN items USING (key)
LEFT JOIN source.objects AS now USING (key) LEFT JOIN main.objects USING (key)
WHERE sample.number > ? AND sample.number <= ? ORDER BY 1 LIMIT ?
"""


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

    def choose(self, total: int, seed: int) -> Iterator[int]:
        """Numbers from 1 to `total` in their order, each with the same chance; the same for the same seed.

        Of a share at least one. (Algorithm S in Knuth's "Seminumerical Algorithms", 3.4.2.)
        """
        chance, wanted = random.Random(seed), self.number or max(1, round(self.share * total))
        for number in range(1, total + 1):
            if chance.random() * (total - number + 1) < wanted:
                wanted -= 1
                yield number


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
    missing: Findings = field(default_factory=Findings)
    differing: Findings = field(
        default_factory=Findings
    )  # of the sample; so are headers_changed and unreadable
    headers_changed: Findings = field(default_factory=Findings)
    unreadable: Findings = field(default_factory=Findings)  # in the source
    unarchivable: Findings = field(default_factory=Findings)  # no archive without a manifest can hold them
    appeared: Findings = field(default_factory=Findings)  # since, with an older time
    changed: Findings = field(default_factory=Findings)  # since
    deleted: Findings = field(default_factory=Findings)  # since
    sampled: int = 0
    sampled_bytes: int = 0
    equal: int = 0  # of the sample: as in the source, byte for byte
    extracted: int = 0  # of the sample: borg's hashes hold, and the source has another version or none
    error: str = ""  # why it could not be verified to the end

    @property
    def verdict(self) -> Verdict:
        """Whether the archive is good. What changed in the source since says nothing about that."""
        if self.error or self.missing.count or self.differing.count:
            return Verdict.FAILURE
        doubts = self.unarchivable.count + self.unreadable.count + self.headers_changed.count
        return Verdict.WARNING if doubts else Verdict.OK

    def as_json(self) -> str:
        fields = {name: value_for_json(value) for name, value in vars(self).items()}
        sample = {name: fields.pop(name) for name in SAMPLE_FIELDS}
        return json.dumps({**fields, "sample": sample, "result": self.verdict.value})

    def as_text(self) -> str:
        as_of = f"{self.as_of:%Y-%m-%dT%H:%M:%SZ}" if self.as_of else "an unknown time"
        since = f"{self.new:,} new, {self.changed.count:,} changed, {self.deleted.count:,} deleted"
        rows = [
            ("archive", f"{self.archive or '-'} of {self.target}: the source as of {as_of}"),
            ("compared", f"{count(self.archived, 'object')} archived, {self.listed:,} in the source now"),
            ("missing", f"{self.missing.count:,} that the source had before"),
            ("unarchivable", f"{self.unarchivable.count:,} that no mount can show"),
            ("since then", since),
            ("", f"{self.appeared.count:,} appeared with an older time"),
            ("sample", f"{count(self.sampled, 'object')}, {size(self.sampled_bytes)}, --seed {self.seed}"),
            ("", f"{self.equal:,} equal the source byte for byte"),
            ("", f"{self.extracted:,} extracted, as the source has changed: borg's hashes hold"),
            ("", f"{self.differing.count:,} differ, {self.headers_changed.count:,} in headers or tags"),
            ("", f"{self.unreadable.count:,} could not be read in the source"),
            ("result", self.verdict.value),
        ]
        named = [
            f"{name.replace('_', ' ')}: {printable(repr(key))}{f': {reason}' if reason else ''}"
            for name, findings in vars(self).items()
            if isinstance(findings, Findings)
            for key, reason in findings.named
        ]
        return "\n".join([*named, *table(rows), *([f"error: {self.error}"] if self.error else [])])


SAMPLE_FIELDS = (
    *("seed", "sampled", "sampled_bytes", "equal", "extracted"),
    *("differing", "headers_changed", "unreadable"),
)


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
    source, name = runtime.settings.source, target.store.name
    patience = Patience(*(min(each, runtime.settings.stall_seconds) for each in dataclasses.astuple(PROVEN)))
    client = S3Client(source, preflight_one(runtime, source, write=False).region, patience, runtime.stop)
    with (
        opened_for_reading(runtime, target, "`verify`") as repository,
        tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder,
    ):
        found.archive, found.as_of = find_archive(runtime, repository, archive)
        runtime.console.info(name, f"{found.archive} is compared with {source.location}")
        with contextlib.closing(Catalog(Path(folder, "source"))) as catalog:
            take = functools.partial(catalog.add, objects_of(client, runtime.console))
            within(LIST_SECONDS, "source: listing it", take, runtime.stop)
            catalog.hide([])
        with contextlib.closing(Plan(Path(folder, "plan"))) as plan:
            plan.execute("ATTACH ? AS source", [str(catalog.path)])
            plan.read(repository, found.archive, runtime.settings.mount_point(source))
            verifier = Verifier(runtime, client, repository, plan, found)
            within(LIST_SECONDS, "comparing the lists", verifier.compare, runtime.stop)
            verifier.prove(sample, Path(folder, "chosen"))
        if found.unreadable.count:  # some objects, or are the keys revoked?
            examine(client, write=False)


def source_as_of(comment: str, start: str) -> datetime:
    """When the source was listed for an archive, at the earliest; `start` is as borg prints it."""
    with contextlib.suppress(ValueError):
        if comment.startswith(SOURCE_AS_OF):
            time = comment.removeprefix(SOURCE_AS_OF).removesuffix(WITH_MANIFEST)
            return datetime.fromisoformat(time).astimezone(UTC)
    return borg_time(start) - timedelta(seconds=CLOCK_ERROR_SECONDS)


def find_archive(runtime: Runtime, repository: Repository, name: str | None) -> tuple[str, datetime]:
    """The archive, by default the newest of BACKUP_LABEL, and as of when it has the source.

    Where it does not say so itself, that is its start by a clock of which little is known.
    """
    label, borg, store = runtime.settings.label, repository.borg, repository.target.store
    pattern = re.sub(r"[*?[]", r"[\g<0>]", name) if name else archive_pattern(label)
    options = ["--last", "1", "--format", "{name}{id}{start}{comment}", "--glob-archives", pattern]
    archives = json.loads(borg.run(["list", "--json", *options, str(borg.repository)]).output)["archives"]
    if not archives:
        what = f"no archive {name!r}" if name else f"no archive of BACKUP_LABEL {label!r}"
        raise BackupError(
            f"{store.name}: {store.location} holds {what}",
            f"`backup.py borg {repository.target.name} list` shows what it holds.",
        )
    return archives[0]["name"], source_as_of(archives[0]["comment"], archives[0]["start"])


# What S3 says when an object is gone, or shorter than it was (and gives something else than the span).
OTHER_NOW = frozenset({404, 416, 200, 206})


@dataclass(frozen=True, eq=False)
class Chosen:
    number: int
    key: str
    path: str  # in the archive
    size_bytes: int
    is_unchanged: bool
    etag: str  # in the source, when that was listed; so is `modified`, in seconds since 1970
    modified: int
    is_same_time: bool  # as when the archive was made
    facts: Mapping[str, Any]  # as the archive has them


Fetched = concurrent.futures.Future[Answer] | None  # None: what the source has is another version


@dataclass
class Verifier:
    """Compares one archive with the source, and writes down in `found` what it finds."""

    runtime: Runtime
    client: S3Client  # the source's
    repository: Repository
    plan: Plan
    found: Verification
    current: str = ""  # the object that is being read
    waits: bool = False  # for the source

    def compare(self) -> None:
        """Finds what the archive lacks, and what has changed since."""
        found, is_old = self.found, not self.plan.has_manifest
        before = (found.as_of - timedelta(seconds=RACE_SECONDS) - EPOCH) // timedelta(microseconds=1)
        values = {"old": is_old, "before": before}

        def number(where: str) -> int:
            return self.plan.execute(f"SELECT count(*) FROM {where}", values)[0][0]

        def name(findings: Findings, where: str, reason: str = "''") -> None:
            findings.count = number(where)
            sql = f"SELECT key, {reason} FROM {where} ORDER BY key LIMIT {MAX_NAMED}"
            findings.named = [(decode_key(key), text) for key, text in self.plan.execute(sql, values)]

        for statement in (*VERIFICATION_TABLES, COMPARE_CONTENT):
            self.plan.execute(statement)
        name(found.changed, "content WHERE since = 'changed'")
        name(found.deleted, "content WHERE since = 'deleted'")
        older = f"{NOT_THEN} AND modified < :before"
        if is_old:
            name(found.missing, f"{older} AND is_shown", LOST_OR_LATE)
            name(found.unarchivable, f"{older} AND NOT is_shown")
            reasons = {
                True: "it is hidden by objects below the same name",
                False: "no file can have this name",
            }
            keys = [key for key, _ in found.unarchivable.named]
            found.unarchivable.named = [(key, reasons[is_showable(key, 1)]) for key in keys]
        else:
            name(
                found.missing, "items WHERE path IS NULL AND size > 0", "'its content is not in the archive'"
            )
            name(found.appeared, older, "'the source did not list it when the archive was made'")
        found.archived, found.listed = number("content"), number(LISTED)
        found.new = number(f"{NOT_THEN} AND modified >= :before")

    def prove(self, sample: Sample, chosen: Path) -> None:
        """Chooses a sample, and compares it; what borg is to export goes to a file `chosen` for it."""
        [[files]] = self.plan.execute("SELECT count(*) FROM items WHERE " + IS_FILE)
        self.plan.insert("sample", ((None, number) for number in sample.choose(files, self.found.seed)))
        [[number]] = self.plan.execute("SELECT count(*) FROM sample")
        self.runtime.console.info(self.repository.target.store.name, f"{count(number, 'object')} are proved")
        if sample.share == 1.0:
            self._prove_part(0, number, {})
            return
        for first in range(0, number, PATHS_AT_ONCE):
            last = min(first + PATHS_AT_ONCE, number)
            with chosen.open("w", encoding="ascii") as file:
                file.writelines(f"{json.dumps(each.path)}\n" for each in self._chosen(first, last))
            self._prove_part(first, last, {"S3BORGBACKUP_EXPORTED": str(chosen)})

    def _prove_part(self, first: int, last: int, own: Mapping[str, str]) -> None:
        """Has borg export the objects of the sample behind number `first` up to `last`, or more of them.

        Raises BackupError where borg finds damage, or leaves out an object.
        """
        borg, target, before = self.repository.borg, self.repository.target, self.found.sampled

        try:
            borg.run(
                borg_export(borg.repository, self.found.archive, Path("-")),
                consume=lambda stream: self._prove_stream(stream, self._chosen(first, last)),
                own=own,
                waits=lambda: time.monotonic() if self.waits else 0.0,
            )
        except BackupError as error:
            if self.current and not isinstance(error, Stopped):
                error.message += f" (while {self.current!r} was read)"
            raise
        if (got := self.found.sampled - before) != last - first:
            words = f"borg exported {got:,} of {count(last - first, 'object')}"
            raise BackupError(f"{target.store.name}: {words}", DAMAGE_HELP.format(name=target.name))

    def _chosen(self, first: int, last: int) -> Iterator[Chosen]:
        while page := self.plan.execute(SAMPLED, (first, last, CATALOG_PAGE)):
            for number, key, path, *rest, facts in page:
                yield Chosen(number, decode_key(key), decode_key(path), *rest, json.loads(facts or "{}"))
            first = page[-1][0]

    def _fetch(self, chosen: Iterable[Chosen]) -> Iterator[tuple[Chosen, Fetched]]:
        """Each object, with each piece of it where it is unchanged; others are fetched ahead."""
        client = self.client

        def ask(each: Chosen, first: int) -> Fetched:
            key, last = (
                f"{client.store.key_prefix}{each.key}",
                min(first + FETCHED_BYTES, each.size_bytes) - 1,
            )
            if not each.is_unchanged:
                return None
            if not each.size_bytes:
                return in_background(lambda: client.request("HEAD", key))
            return in_background(lambda: client.get_span(key, first, last))

        firsts = (
            (each, range(0, each.size_bytes * each.is_unchanged or 1, FETCHED_BYTES)) for each in chosen
        )
        asked = ((each, ask(each, first)) for each, pieces in firsts for first in pieces)
        ahead = deque(itertools.islice(asked, FETCHED_AHEAD))
        while ahead:
            yield ahead.popleft()
            ahead.extend(itertools.islice(asked, 1))

    def _prove_stream(self, stream: IO[bytes], chosen: Iterable[Chosen]) -> None:
        """Takes borg's tar stream. Where that ends too early, borg tells why."""
        found = self.found
        try:
            with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8") as tar:
                for each, pieces in itertools.groupby(self._fetch(chosen), key=lambda piece: piece[0]):
                    while (member := tar.next()) and not (member.name == each.path and member.isreg()):
                        tar.members.clear()  # or it would keep them all
                    if not member:
                        break
                    self.current, archived = each.key, tar.extractfile(member)
                    verdict, reason = self._judge(each, archived, (fetched for _, fetched in pieces))
                    drain(archived)  # so that all of it is verified
                    found.sampled += 1
                    found.sampled_bytes += member.size
                    found.equal += verdict == "equal"
                    found.extracted += verdict == "extracted"
                    if reason:
                        getattr(found, verdict).add(each.key, reason)
                    self.current = ""
            drain(stream)
        except tarfile.ReadError:
            pass

    def _judge(self, each: Chosen, archived: IO[bytes], pieces: Iterable[Fetched]) -> tuple[str, str]:
        """What an archived object turns out to be, which is a field of Verification, and why."""
        offset = 0
        for fetched in pieces:
            if not fetched:
                return "extracted", ""
            try:
                answer = self._wait(fetched)
            except S3Error as error:
                if error.status in OTHER_NOW:
                    return "extracted", ""
                if not error.status:  # the source does not answer at all
                    raise
                return "unreadable", f"{error.code}{error.message.partition(error.code)[2]}"
            ours = archived.read(len(answer.body))
            if ours != answer.body:
                modified = answer.time("Last-Modified")
                if answer.etag != each.etag or not modified or int(modified.timestamp()) != each.modified:
                    return "extracted", ""
                unlike = map(int.__ne__, ours, answer.body)
                place = next(itertools.compress(itertools.count(offset), unlike))
                return "differing", f"its content differs from byte {place:,} on"
            offset += len(ours)
        self._compare_headers(each, answer)
        return "equal", ""

    def _compare_headers(self, each: Chosen, answer: Answer) -> None:
        """Compares what the archive has of an object's headers and tags, if it has them."""
        if "headers" not in each.facts:
            return
        then, now = each.facts["headers"], headers_of(answer)
        other = sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
        if answer.has_tags:
            key = f"{self.client.store.key_prefix}{each.key}"
            with contextlib.suppress(S3Error, ElementTree.ParseError):  # the key may not read tags
                tags = self._wait(in_background(lambda: self.client.tags(key)))
                other += [] if tags == each.facts.get("tags", {}) else ["tags"]
        if other and each.is_same_time:
            self.found.headers_changed.add(each.key, ", ".join(other))
        elif other:
            self.found.changed.add(each.key, f"its content is the same, but not: {', '.join(other)}")

    def _wait(self, asked: concurrent.futures.Future[Result]) -> Result:
        """What the source answers. It has its own deadline, and borg waits meanwhile."""
        self.waits = True
        try:
            return asked.result()
        finally:
            self.waits = False


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
    ready, lines = threading.Event(), []

    def show(line: str) -> None:
        if READY_LINE in line:
            ready.set()
        elif not ready.is_set():
            lines.append(line)
            print(line, file=sys.stderr, flush=True)

    words = [KEEP_COMMAND, store.name, *(["--read-write"] if read_write else [])]
    argv = [sys.executable, os.path.abspath(__file__), *words]
    keeper = Child(argv, runtime.environ, show, show, dies_with_us=False)
    patience = runtime.settings.lease_wait_seconds or runtime.settings.lease_ttl_seconds * 2
    deadline = time.monotonic() + patience + WARM_UP_SECONDS + 2 * MOUNT_SECONDS + SERVER_PATIENCE_SECONDS
    while not ready.wait(POLL_SECONDS / 4):
        if (code := keeper.wait(0)) is not None and not ready.wait(POLL_SECONDS):
            if code == EXIT_BUSY and not lines:  # another one was quicker
                return await_other_mount(runtime, store, read_write)
            return code or EXIT_FAILURE
        if runtime.stop.requested or time.monotonic() > deadline:
            keeper.send(signal.SIGTERM)
            keeper.wait(TERMINATE_SECONDS)
            runtime.stop.check()
            raise BackupError(f"{store.name}: cannot be mounted in time", TRY_AGAIN)
    path = runtime.settings.mount_point(store)
    runtime.console.plain(
        f"{store.name} ({store.location}) is mounted"
        f" {'for reading and writing' if read_write else 'read-only'} at {path}\n"
        f"next:      {'borg list' if store.target else 'ls'} {shlex.quote(str(path))}\n"
        f"when done: backup.py umount {shlex.quote(store.name)}   (returns when everything is uploaded)"
    )
    return EXIT_OK


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
            keep_store(runtime, store, read_write, stream)
            code = EXIT_OK
        except BackupError as error:
            runtime.console.error(store.name, str(error))
            code = error.exit_code
        if facts := read_state(path):  # else whoever mounts it has seen what went wrong
            write_state(stream, {**facts, "code": code})
    return code


def keep_store(runtime: Runtime, store: Store, read_write: bool, stream: IO[str]) -> None:
    """Mounts, under the lease where it is a target, and waits for the end."""
    check = examine(S3Client(store, stop=runtime.stop), write=read_write)
    client, lease = S3Client(store, check.region, PROVEN, runtime.stop), None
    request, log = (Path(stream.name).with_suffix(suffix) for suffix in (REQUEST, LOG))
    for left_over in (request, log):
        left_over.unlink(missing_ok=True)
    with contextlib.ExitStack() as undo:  # gives the lease back
        if store.target and check.repository_state(store) is RepositoryState.READY:
            lease = undo.enter_context(held(runtime, client, MANUAL_WORK))
            if lease.enforced:
                remove_leftovers(runtime, store, lease, find_leftovers(client))
        with mounted(runtime, store, client.region, read_only=not read_write, lease=lease) as mount:
            wait_until_usable(runtime, mount)
            if store.target:
                warm_up(runtime, mount)
            if store.target and not lease:
                # `borg init` wants an empty folder: a listing from before the lease does not show that.
                mount.lease = undo.enter_context(held(runtime, client, MANUAL_WORK))
                mount.lease.add(mount.child)
            write_state(stream, {"writable": read_write})
            print(READY_LINE, flush=True)
            log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            for fd in (1, 2):  # whoever reads our output sees its end
                os.dup2(log_fd, fd)
            os.close(log_fd)
            mount.is_by_hand = read_write
            written, uploaded_at = {}, 0.0  # what a repository holds, and when all was uploaded that could be
            while mount.child.wait(POLL_SECONDS) is None and not runtime.stop.requested:
                if request.exists():
                    written = json.loads(request.read_text(encoding="utf-8"))
                    upload(runtime, mount, client, written)
                    uploaded_at = time.monotonic()
                    request.unlink()
        if written:
            audit_upload(runtime, client, written)
        elif read_write and mount.log.complained_at > uploaded_at - COMPLAINT_SECONDS:
            raise BackupError(
                f"{store.name}: {store.location} may lack some of what was written: {mount.log.reason}",
                WRITE_AGAIN,
            )


def upload(runtime: Runtime, mount: Mount, client: S3Client, written: Mapping[str, int]) -> None:
    """Waits until everything is uploaded, as far as it can be: at its end TigrisFS tries each file just once.

    `written` is what a repository holds. What was written elsewhere nobody knows: there TigrisFS must have
    had nothing to complain about for a while, after it was told to upload all of it. Raises Stuck.
    """
    if mount.holds_nothing:  # it is read-only
        return

    def sync() -> None:
        folder_fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)  # of all that is below it, without a word about errors
        finally:
            os.close(folder_fd)

    told = in_background(sync)

    def mistakes() -> list[str]:
        if written:
            return upload_mistakes(written, listed_files(runtime, client))
        return [] if told.done() and not mount.log.is_complaining else [mount.log.reason]

    settle(runtime, mount, mistakes)
    mount.holds_nothing = False  # whoever works in it may go on


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
    path = resolved(runtime.settings.mount_point(store))
    request = state_file(runtime, store).with_suffix(REQUEST)

    def wait_a_little() -> None:
        runtime.stop.check()
        runtime.console.progress(store.name, "uploading what tigrisfs still holds")
        time.sleep(POLL_SECONDS / 4)

    while keeper_is_alive(runtime, store):  # which sees to it that this ends
        if str(path) in mount_table():  # at once, or when a keeper that has just begun has come so far
            # The keeper compares what a repository holds with the bucket, as long as it has the lease.
            written = repository_files(runtime, store, path) if store.target else {}
            replace_file(request, json.dumps(written))
            while request.exists() and keeper_is_alive(runtime, store):  # it may give up
                wait_a_little()
            if keeper_is_alive(runtime, store):
                detach_by_hand(runtime, store, path)
        wait_a_little()
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
SOURCE_COMMANDS = ("run", "check-config", "verify")  # they need the source's configuration
DATA_COMMANDS = ("list", "info", "key-export", "verify", "borg")  # standard output is for what is asked


NOTHING = (0, 0, "no names")
A_STORE = (1, 1, "one name: source or target-<name>")
STORES = (0, math.inf, "names: source or target-<name>")
A_TARGET = (1, 1, "one name, that of a target")
TARGETS = (0, math.inf, "names of targets")
A_TARGET_AND_PATHS = (1, math.inf, "the name of a target, and keys or folders of keys")
A_TARGET_AND_WORDS = (2, math.inf, "the name of a target and a command of borg")


def value_of(parse: Callable[[str], Result], hint: str) -> Callable[[str], Result]:
    """The parser of an option's value, which may not be nothing: a script's variable that is not set, say."""

    def parsed(text: str) -> Result:
        value = parse(text)
        if not value:
            raise argparse.ArgumentTypeError(hint)
        return value

    return parsed


def chosen_destination(settings: Settings, location: str) -> Destination:
    """The bucket to restore into. Raises ConfigurationError."""
    bucket, _, prefix = location.partition(":")
    store = dataclasses.replace(settings.destination, bucket=bucket, prefix=prefix.strip("/"))
    mistake = path_mistake(location)
    mistakes = [f"--to-bucket: {mistake}"] if mistake else []
    mistakes += missing_settings(store) if bucket else []
    for target in settings.targets:
        mistakes += overlap_mistakes([target.store, store])
    if mistakes:
        raise ConfigurationError(mistakes)
    return store


def command_restore(runtime: Runtime, given: argparse.Namespace) -> int:
    settings, (name, *paths) = runtime.settings, given.names
    order = Order(
        tuple(paths),
        given.archive or "",
        end_of_time(given.at) if given.at else None,
        Path(given.to) if given.to else None,
        chosen_destination(settings, given.to_bucket) if given.to_bucket is not None else None,
        Path(given.metadata) if given.metadata else None,
        given.overwrite,
        given.dry_run,
    )
    return restore(runtime, chosen_target(settings, name), order)


def command_mount(runtime: Runtime, given: argparse.Namespace) -> int:
    """A mount that lives on; or, as its keeper, its life."""
    store = chosen_store(runtime.settings, given.names[0])
    work = keep_mounted if given.command == KEEP_COMMAND else mount_manually
    return work(runtime, store, given.read_write or store.target is not None)


def command_umount(runtime: Runtime, given: argparse.Namespace) -> int:
    """The end of such mounts, of all without names."""
    stores = [chosen_store(runtime.settings, name) for name in given.names]
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


def command_verify(runtime: Runtime, given: argparse.Namespace) -> int:
    target = chosen_target(runtime.settings, given.names[0])
    seed = secrets.randbelow(10**9) if given.seed is None else given.seed
    return run_verify(
        runtime, target, given.archive, given.sample or Sample.parse(DEFAULT_SAMPLE), seed, given.json
    )


def command_check(runtime: Runtime, given: argparse.Namespace) -> int:
    target = chosen_target(runtime.settings, given.names[0])
    with opened_for_writing(runtime, target, "`check`") as repository:
        checked = check_repository(runtime, repository, CheckPlan(given.max_duration), given.verify_data)
    expect_sound(repository, checked.record)
    return EXIT_OK


def command_key_export(runtime: Runtime, given: argparse.Namespace) -> int:
    form = ["--paper"] if given.paper else ["--qr-html"] if given.qr_html else []
    return export_key(runtime, chosen_target(runtime.settings, given.names[0]), form)


PARSERS: dict[str, OptionParser] = {}  # of what follows a command's name
OPTION_TYPES = {
    "--archive": value_of(str, "needs a value; leave it out for the newest archive"),
    "--at": value_of(str, "needs a value; leave it out for the newest archive"),
    "--max-duration": value_of(parse_duration, "write a number and a unit (s, m, h), such as 30m"),
    "--sample": value_of(Sample.parse, SAMPLE_HELP),
    "--seed": int,
}


def command(
    usage: str,
    about: str,
    takes: tuple[int, float, str],
    run: Callable[[Runtime, argparse.Namespace], int],
    options: Mapping[str, str] | None = None,
    alternatives: bool = False,
) -> None:
    """Declares what can be typed, and what is done then.

    `takes` is how many words that are no options, at least and at most, and what these are; `options` tell
    what follows them, and their help; `alternatives` exclude each other.
    """
    parser, name = OptionParser(), usage.partition(" ")[0]
    parser.prog, parser.usage, parser.description = name, usage, about
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    group = parser.add_mutually_exclusive_group() if alternatives else parser
    known = []
    for words, text in (options or {}).items():
        word, _, value = words.partition(" ")
        known.append(word)
        if value:
            group.add_argument(word, metavar=value, type=OPTION_TYPES.get(word), help=text)
        else:
            group.add_argument(word, action="store_true", help=text)
    parser.set_defaults(command=name, takes=takes, run=run, known=known)
    PARSERS[name] = parser


JSON = {"--json": "print JSON, for programs"}
READ_WRITE = {"--read-write": "so that objects can be restored into the source"}
command(
    "run [NAME...]",
    "back up to all targets, or to the named ones (this is what no command at all does)",
    TARGETS,
    lambda runtime, given: run_backup(runtime, chosen_targets(runtime.settings, given.names)),
)
command(
    "check-config",
    "check the configuration and ask every store whether it is usable; changes nothing",
    NOTHING,
    lambda runtime, _: check_config(runtime),
)
command(
    "list [NAME...] [--json]",
    "show the archives of all targets, or of the named ones",
    TARGETS,
    lambda runtime, given: list_archives(runtime, chosen_targets(runtime.settings, given.names), given.json),
    JSON,
)
command(
    "info [NAME...] [--json]",
    "show size, last run, key and last check of all targets, or of the named ones",
    TARGETS,
    lambda runtime, given: show_info(runtime, chosen_targets(runtime.settings, given.names), given.json),
    JSON,
)
command(
    "maintain [NAME...]",
    "prune, compact and check all targets, or the named ones; needs no source",
    TARGETS,
    lambda runtime, given: maintain(runtime, chosen_targets(runtime.settings, given.names)),
)
command(
    "key-export NAME [--paper|--qr-html]",
    "print the key of a repository: keep it, with the passphrase, elsewhere",
    A_TARGET,
    command_key_export,
    {"--paper": "to print, and to type in again", "--qr-html": "as HTML with a QR code"},
    alternatives=True,
)
command(
    "verify NAME",
    "compare an archive with the live bucket, and prove the content of a sample of it",
    A_TARGET,
    command_verify,
    {
        "--archive ARCHIVE": "which one; the newest of BACKUP_LABEL by default",
        "--sample N": "how many objects are proved: a number, a share such as 1%%, or all"
        f" (default {DEFAULT_SAMPLE})",
        "--seed SEED": "choose the same sample as when this seed was printed",
        "--json": "print the result as JSON",
    },
)
command(
    "check NAME",
    "check a repository with `borg check`, whole or for some time; never repairs",
    A_TARGET,
    command_check,
    {
        "--max-duration TIME": "check for at most so long (such as 30m) from where the last such slice"
        " stopped: segments only",
        "--verify-data": "decrypt and verify each piece of data, too",
    },
)
command(
    "borg NAME ARGS...",
    "run any borg command on a target's repository: borg first diff ARCHIVE1 ARCHIVE2",
    A_TARGET_AND_WORDS,
    lambda runtime, given: run_borg(
        runtime, chosen_target(runtime.settings, given.names[0]), given.names[1:]
    ),
)
command(
    "restore NAME [PATH...]",
    "restore an archive, or parts of it: --to DIR, or --to-bucket BUCKET",
    A_TARGET_AND_PATHS,
    command_restore,
    {
        "--archive NAME": "this one, instead of the newest",
        "--at TIME": "the newest one until then: local time, such as 2025-01-31T03:00; or with a zone,"
        " +01:00 or Z",
        "--to DIR": "restore into this folder",
        "--to-bucket BUCKET[:PREFIX]": "restore into this bucket",
        "--metadata FILE": "write the objects' headers and tags there, a JSON object a line",
        "--overwrite": "what is there with other content, headers or tags, too",
        "--dry-run": "only tell what would be done",
    },
)
command(
    "mount NAME",
    "mount `source` (read-only) or `target-<name>` below /data; returns when it is usable",
    A_STORE,
    command_mount,
    READ_WRITE,
)
command("umount [NAME...]", "unmount it, or all; returns when everything is uploaded", STORES, command_umount)
COMMANDS = dict(PARSERS)  # those that a person types
command(f"{KEEP_COMMAND} NAME", "", A_STORE, command_mount, READ_WRITE)


def usage_mistake(given: argparse.Namespace) -> str:
    """What is wrong with a command line as a whole; empty where nothing is."""
    if given.command == "mount" and given.read_write and given.names != ["source"]:
        return "`--read-write` goes with `mount source`"  # targets are always mounted so
    if given.command == "check" and given.max_duration and given.verify_data:
        return "`--verify-data` looks at everything: leave out `--max-duration`"
    if given.command != "restore":
        return ""
    if (given.to is None) == (given.to_bucket is None):
        return "`restore` takes either --to DIR or --to-bucket BUCKET[:PREFIX]"
    if given.archive and given.at:
        return "`restore` takes --archive NAME or --at TIME, not both"
    if given.to == "":
        return "--to: name a folder"
    if any(not path.strip("/") for path in given.names[1:]):
        return "`restore`: a PATH is an object's key or a folder of keys; leave it out to restore everything"
    try:
        end_of_time(given.at or "2025-01-31")
    except (ValueError, OverflowError):
        return f"--at: {given.at!r} is no time; write such as 2025-01-31T03:00 or 2025-01-31"
    return ""


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


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line's meaning. Raises ConfigurationError with what is wrong."""
    name, *words = argv or ["run"]
    if name not in PARSERS:
        raise ConfigurationError([f"unknown command {name!r}; {near(name, COMMANDS)} (see --help)"])
    try:
        given, unknown = PARSERS[name].parse_known_intermixed_args([] if name == "borg" else words)
    except ValueError as error:
        raise ConfigurationError([f"`{name}`: {error} (see `{name} --help`)"]) from None
    if unknown:
        hint = near(unknown[0].partition("=")[0], given.known) if given.known else f"`{name}` has none"
        raise ConfigurationError([f"unknown option {unknown[0]!r}; {hint} (see `{name} --help`)"])
    if name == "borg":  # whose words are for borg to judge
        given.names = words
    least, most, what = given.takes
    if not least <= len(given.names) <= most:
        raise ConfigurationError([f"`{name}` takes {what} (see --help)"])
    if mistake := usage_mistake(given):
        raise ConfigurationError([mistake])
    return given


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
    return not argv or argv[0].startswith("-") or argv[0] in PARSERS


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
    if argv[:1] == ["--version"]:
        return f"s3borgbackup {VERSION}\n"
    if argv and argv[0] in COMMANDS and argv[0] != "borg" and {"-h", "--help"} & set(argv):
        return COMMANDS[argv[0]].format_help()
    if argv[:1] not in (["-h"], ["--help"], ["help"]):
        return ""
    lines = []
    for parser in COMMANDS.values():
        usage = parser.usage if len(parser.usage) < USAGE_COLUMNS else ""
        lines += [] if usage else [f"  {parser.usage}"]
        lines.append(f"  {usage:{USAGE_COLUMNS}}{parser.description}")
    return HELP.format(commands="\n".join(lines))


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
    name = "s3borgbackup"
    try:
        given = parse_arguments(argv)
        name = given.command
        if name in DATA_COMMANDS:
            console.leave_standard_output()
        if not any(name in environ or f"{name}_FILE" in environ for name in VARIABLES):
            console.plain(GREETING)
        settings = checked_settings(values, mistakes, name in SOURCE_COMMANDS)
        console.debug_is_shown = settings.debug
        report.configured = tuple(target.name for target in settings.targets)
        memory_mb = settings.memory_limit_mb or container_memory_mb()
        if name in TOLD_COMMANDS:
            reporter.start()
        code = given.run(Runtime(settings, environ, console, stop, memory_mb, report), given)
    except ConfigurationError as error:
        for mistake in error.mistakes:
            console.error("configuration", mistake)
        code = error.exit_code
    except BackupError as error:
        console.error(name, str(error))
        code = error.exit_code
    except Exception as error:  # Python's own exit code for it, 1, means warnings here
        console.defect(name, error)
        code = EXIT_FAILURE
    if report.command in TOLD_COMMANDS:
        reporter.end(code)
    return code


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
