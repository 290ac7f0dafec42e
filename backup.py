#!/usr/bin/env python3
"""Back up an S3 bucket to one or more S3 buckets with BorgBackup, the buckets mounted with TigrisFS.

A run reads the configuration from environment variables and reports every mistake in it at once; asks S3
directly whether each store is there and usable; lists the source into a catalog, which is what the archives
are compared with; and mounts the source read-only. For each target, several side by side, it takes the lease
that excludes other runs, makes the borg repository where it is new, clears what crashed runs left, mounts the
bucket, and creates an archive: borg is told object by object what to read, while threads read ahead of it and
ask for headers, and what no mount can show is fetched by our own client. Then it prunes, compacts and checks
where asked, unmounts, which returns only when all is uploaded, compares the bucket with what borg wrote, and
gives the lease back. One failing target does not stop the others, and nothing is waited for that makes no
progress. At the end mounts and processes are gone, whatever happened, and whoever is to hear of the run is
told. The exit code tells how it went: 0 all well, 1 finished with warnings, 2 something failed, 75 another
run was at work, 78 wrong configuration or usage, 128+N stopped by signal N.

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
    Audit           whether the bucket holds what borg wrote
    Notifications   how a run went, for a health check, a webhook and Prometheus
    Repository      preflight, the lease, leftovers; a repository opened for writing, or to read from
    Check           whether a repository is sound: `borg check` in slices, and what was checked when
    Backup          a run or a maintenance, one target, the source's catalog, what feeds borg, the summary
    Operations      what a person does with backups: check-config, list, info, key-export, any borg command
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
import types
import urllib.parse
import weakref
import xml.etree.ElementTree as ElementTree
from argparse import ArgumentTypeError
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
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
MOUNT_SECONDS = 120  # from the start of tigrisfs to a mount that can be listed, though a request may hang
LIST_SECONDS = 86400  # to list a whole bucket directly: each request has a deadline of its own
SETTLE_SECONDS = 30  # for what failed to be tried again: TigrisFS's SDK may wait 8 s before it says so
TERMINATE_SECONDS = 4  # from SIGTERM to SIGKILL for borg, which needs 0.1 s to release its lock
FLUSH_SECONDS = 3  # for the upload after a second stop signal, or a first one while it gets nowhere
CLEANUP_SECONDS = 2  # for S3 probes to be deleted again when a stop signal comes
PROGRESS_SECONDS = 30  # between two progress lines where there is no terminal
LISTING_SECONDS = 10  # how long a listing may lag behind what was written, where a store is not S3 in this
LEFTOVER_SECONDS = 86400  # after which what a run has left in /cache is nobody's
LOCK_WAIT_SECONDS = 10  # how long a lock that somebody else holds is waited for
KILL_SECONDS = 3  # for a killed process to be gone: longer only while it hangs in a system call
TELL_SECONDS = 20  # for all that is told of a run at its end, with all tries: it must not hold the next one
TELL_STOPPED_SECONDS = 2  # the same after a stop signal: `docker stop` grants 10 s for everything
TELL_TRY_SECONDS = 5  # for one try

CONNECT_TIMEOUT_SECONDS = 8  # for one connection attempt
CLOCK_ERROR_SECONDS = 900  # S3 refuses clients whose clocks are further off
PLATFORM_SECONDS = 5  # for one question to whoever gives the keys
ANSWER_TIMEOUT_SECONDS = 30  # for one read from a connection: some servers take long to list
CONNECT_PATIENCE_SECONDS = 8  # how long these are tried again: a wrong endpoint is to be told in seconds
SERVER_PATIENCE_SECONDS = 120  # how long 429 and 5xx answers are retried: such storms pass
PROVEN_PATIENCE_SECONDS = 300  # how long either is retried in mid-run
MAX_BACKOFF_SECONDS = 8.0

# TigrisFS: a memory limit needs read-ahead sizes that fit it (`tigrisfs_command`).
SMALLEST_CACHE_MB, TARGET_CACHE_MB, SOURCE_CACHE_MB = 48, 128, 1000
LEAST_REST_MB = 236  # what one target's tigrisfs and borg, backup.py, and the source's beside its cache need
OWN_MB, FIXED_MB, BORG_MB = 40, 90, 100  # what backup.py needs, a tigrisfs beside its cache, and a borg
LONGEST_RUN_SECONDS = 10 * 86400
MANY_OBJECTS = 100_000  # TigrisFS takes 1.6 KB for each that it has listed, and has to forget some
SLOW_BYTES_PER_SECOND = 1_000_000  # a first run of many that is slower has more requests
LARGEST_LISTED_FOLDER = 2000  # objects, where there are many
WHOLE_READ_BYTES = 1024 * 1024  # what TigrisFS reads in one request, and so of one version of an object
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
SMALL_BODY_BYTES = 64 * 1024  # of a request, sent at once with its headers
SMALLEST_PIECE_BYTES, LARGEST_PIECE_BYTES = 1024 * 1024, 8 * 1024 * 1024
SMALLEST_PLACE_BYTES = 64 * 1024  # what an object takes of the window at least
LEAST_THREADS, MOST_THREADS, READS_PER_SECOND, MEASURED_READS = 32, 256, 1000, 100
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


@dataclass(eq=False)
class BackupError(Exception):
    """Something that a user must hear of: what happened to which store, and what to do about it."""

    message: str
    hint: str = ""
    exit_code = EXIT_FAILURE

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


@dataclass(eq=False)
class S3Error(BackupError):
    """An answer of the S3 server that is not success, or no answer (`status` 0); `code` is S3's own."""

    status: int = 0
    code: str = ""


class Stuck(BackupError):
    """What goes on cannot end well or at all: whatever takes part in it has to be killed."""


class Hung(Stuck):
    """A mount, or what works on it, does not move any more or is gone: with new mounts it may well end."""


class Stopped(BackupError):
    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


# -------------------------------------------------------------------------------------------- Configuration

NOTIFY_ON = ("failure", "warning", "always")
DEFAULT_LEASE_SECONDS, LEASE_SECONDS = 60, range(10, 3601)
# Below this, TigrisFS's read-ahead does not fit its cache: reads fail, and borg skips the objects.
MEMORY_MB, MEMORY_HELP = range(256, 1_000_001), "; TigrisFS and borg are not safe with less"
CHECK_PERIODS = {"day": 86400, "week": 7 * 86400, "month": 30 * 86400}  # in seconds


@dataclass(frozen=True)
class Value:
    """What may stand in one place: in a variable, in the JSON of one, behind an option."""

    help: str  # what to write there
    parse: Callable[[str], Any]  # raises ArgumentTypeError to say what is wrong, or any other error
    default: Any = None  # "" where something has to be written

    def __call__(self, text: str) -> Any:
        try:
            return self.parse(text)
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{error}; write {self.help}") from None
        except (ValueError, LookupError, OverflowError, TypeError):
            raise ArgumentTypeError(f"write {self.help}") from None


def setting(name: str, allowed: Any, default: Any = None, words: str = "", **options: Any) -> Any:
    """A variable, or a key in the JSON of one; `allowed` are numbers, words (with meanings), or a parser."""
    parse = allowed
    if isinstance(allowed, range):
        about = f"a whole number from {allowed[0]} to {allowed[-1]}{words}"
        parse, words = lambda text: allowed[allowed.index(int(text))], about
    elif not callable(allowed):
        meanings = allowed if isinstance(allowed, dict) else {word: word for word in allowed}
        parse, words = lambda text: meanings[text.lower()], words or " or ".join(meanings)
    return field(default=default, metadata={name: Value(words, parse, default)}, **options)


def rows(kind: type) -> dict[str, Value]:
    return {name: value for each in dataclasses.fields(kind) for name, value in each.metadata.items()}


def matching(pattern: str, result: Callable[[str], Any] = str) -> Callable[[str], Any]:
    return lambda text: result(re.fullmatch(pattern, text, re.DOTALL)[0])


def parse_url(text: str) -> str:
    """An http(s) URL. A mistake does not quote it: it may be a secret as a whole."""
    with contextlib.suppress(ValueError):
        url = urllib.parse.urlsplit(text)
        (url.hostname or "").encode("idna")
        is_usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
        if is_usable and not re.search(r"[\s\x00-\x1f\x7f\\]", text):
            return text
    raise ArgumentTypeError("is not an http(s) URL (an IPv6 address goes in brackets)")


def parse_endpoint(text: str) -> str:
    if not text.isascii() or not re.fullmatch("[^:]+://[^/@?#]+(/[^?#%]*)?", parse_url(text)):
        raise ArgumentTypeError("is not an ASCII URL without keys and query")
    return text.rstrip("/")


def parse_path(text: str) -> tuple[str, str]:
    bucket, _, prefix = text.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        hint = f" (did you mean {bucket.replace('/', ':', 1)!r}?)" if "/" in bucket.strip("/") else ""
        raise ArgumentTypeError(f"{bucket!r} is not a bucket name{hint}")
    parts = prefix.strip("/").split("/")
    folder = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f]+")
    if parts != [""] and not all(folder.fullmatch(part) and len(part.encode()) < 256 for part in parts):
        raise ArgumentTypeError("no folder can be named as a part of the prefix (empty, '.', '..', too long)")
    return bucket, "/".join(parts)


# An option of `borg prune` that says how many archives are kept (1) or how long (2), or that does no harm.
PRUNE_OPTION = re.compile(
    r"(?<!\S)(?:"
    r"(?:--keep-(?:last|(?:second|minute|hour|dai|(?:13)?week|3?month|year)ly)[= ]|-[Hdwmy][= ]?)(-?[0-9]+)"
    r"|--keep-within[= ](0*[1-9][0-9]*[Hdwmy])"
    r"|(?:--checkpoint-interval[= ]|-c[= ]?)[0-9]+"
    r"|--(?:list|stats|quick-stats|save-space|force|verbose|info)|-[sv]"
    r")(?!\S)"
)


def parse_prune(text: str) -> tuple[str, ...]:
    """Refused is what borg 1.4 would refuse, and what keeps nothing."""
    line = " ".join(shlex.split(text))
    if unknown := PRUNE_OPTION.sub("", line).split():
        words = "BACKUP_LABEL says which archives are pruned; to prune nothing leave `prune` out"
        raise ArgumentTypeError(f"{unknown[0]!r} has no place here: {words}")
    if line and not any(within or int(number or 0) for number, within in PRUNE_OPTION.findall(line)):
        raise ArgumentTypeError("keeps nothing")
    if "--keep-13weekly" in line and "--keep-3monthly" in line:
        raise ArgumentTypeError("--keep-13weekly and --keep-3monthly exclude each other; keep one")
    return tuple(line.split())


@dataclass(frozen=True)
class CheckPlan:
    """How much of a repository is checked, and how often at most."""

    seconds: int | None  # a slice of at most so long; None: everything, archives included
    every: str = ""  # one of CHECK_PERIODS; empty: in each run


def parse_check(text: str) -> CheckPlan:
    pattern = rf"(?:full|0*([1-9][0-9]{{0,5}})([smh]))(?:/({'|'.join(CHECK_PERIODS)}))?"
    if not (found := re.fullmatch(pattern, text)):
        raise ArgumentTypeError(f"{text!r} is not understood")
    number, unit, every = found.groups()
    return CheckPlan(int(number) * {"s": 1, "m": 60, "h": 3600}[unit] if unit else None, every or "")


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object with members. A mistake does not quote it: it may hold secrets."""

    def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, times in Counter(name for name, _ in pairs).items():
            if times > 1:  # the first one would be lost
                raise ArgumentTypeError(f"{json.dumps(name)} is there twice; keep one")
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=unique_pairs)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(document, dict) or not document:
        raise ValueError
    return document


@dataclass(frozen=True)
class Shard:
    """A part of a source. Which one a key belongs to depends on nothing but the key."""

    number: int  # from 1
    count: int
    depth: int = 1  # how many components of a key's folder count

    @classmethod
    def parse(cls, text: str) -> Shard:
        found = re.fullmatch("([0-9]{1,5})/([0-9]{1,5})(?:/([1-8]))?", text)
        number, total, depth = (int(each or 1) for each in found.groups()) if found else (1, 0, 1)
        if number > total or not total:
            raise ValueError(text)
        return cls(number or total, total, depth)  # Kubernetes counts from 0

    def has_folder(self, folder: str) -> bool:
        """Whether it has the objects whose folder, cut to `depth`, is this: "" or with a slash at the end."""
        digest = MD5(encode_key(folder)).digest()
        return int.from_bytes(digest, "big") % self.count == self.number % self.count

    @property
    def padded(self) -> str:
        """What `{shard}` stands for in a path."""
        return f"{self.number:0{len(str(self.count))}}"

    @property
    def setting(self) -> str:
        """As SHARD has it, with its depth."""
        return f"{self.number}/{self.count}/{self.depth}"

    @property
    def dashed(self) -> str:
        """The same in the names of files and objects."""
        return self.setting.replace("/", "-")

    def __str__(self) -> str:
        return f"part {self.number:,} of {self.count:,}"


SHARD_HELP = "a part's number and how many there are, such as 3/16, or 3/16/2"


def parse_exclude(text: str) -> tuple[str, ...]:
    patterns = json.loads(text)
    if not isinstance(patterns, list) or not all(isinstance(each, str) and each for each in patterns):
        raise ValueError
    return tuple(patterns)


EXCLUDE_HELP = """a JSON list of patterns, such as ["*.tmp", "cache/*"]"""

# Only a file (`_FILE`) loses the line end at its end: a value that others read, too, is not ours to correct.
WORD, WORDS = matching("[!-~]+"), matching("[!-~]([ -~]*[!-~])?")
WORD_HELP = "printable ASCII, no blank or line end around it (`echo` adds one)"

ENDPOINT_HELP = "the S3 server's URL, such as https://s3.eu-west-1.amazonaws.com"
PATH_HELP = "<bucket> or <bucket>:<prefix>"
# What is there at once when it is asked for: TigrisFS and borg read what they have written.
STORAGE_CLASS = matching("(?!.*(ARCHIVE|GLACIER$))[A-Z][A-Z0-9_]*")
STORAGE_CLASS_HELP = "a class that can be read at once, such as STANDARD_IA or GLACIER_IR"
# A name that a certificate for *.HOST covers.
VIRTUAL_HOST = re.compile(r"[a-z0-9-]+ https?://(?![0-9.]+(?:[:/]|$))[^\[]+")
SSE, SSE_HELP = matching("AES256|aws:kms(:[!-~]+)?"), "AES256, aws:kms, or aws:kms:<key id>"


@dataclass(frozen=True)
class Store:
    """A bucket, or what lies below a prefix in it, and how to reach it. `target` is None for the source."""

    target: str | None
    endpoint: str = setting("endpoint", parse_endpoint, "", ENDPOINT_HELP)
    bucket: str = setting("path", parse_path, "", PATH_HELP)
    prefix: str = ""  # without slashes at its ends; empty for the whole bucket
    # Without a key it is the platform's: `keys`.
    access_key_id: str | None = setting("access_key_id", WORD, None, f"the key's id: {WORD_HELP}", repr=False)
    secret_access_key: str | None = setting(
        "secret_access_key", WORDS, None, f"the secret: {WORD_HELP}", repr=False
    )
    session_token: str | None = setting("session_token", WORD, None, f"the token: {WORD_HELP}", repr=False)
    region: str | None = setting("region", WORD, None, f"the region: {WORD_HELP}")
    is_virtual: bool = setting("addressing", {"path": False, "virtual": True}, False)
    storage_class: str | None = setting("storage_class", STORAGE_CLASS, None, STORAGE_CLASS_HELP)
    sse: str | None = setting("sse", SSE, None, SSE_HELP)  # who encrypts on the server
    # Of a bucket that is restored into: the settings that it has from the source.
    shared: Collection[str] | None = None
    platform: Platform | None = field(default=None, compare=False, repr=False)  # where it has no key

    def keys(self) -> Keys:
        """What to sign with now: its own, or the platform's. Raises KeysFault."""
        if self.platform:
            return self.platform.keys()
        own = self.access_key_id or "", self.secret_access_key or "", self.session_token or ""
        return Keys(*own, self.setting("access_key_id"))

    @property
    def written_with(self) -> dict[str, str]:
        """The headers of each request that makes an object."""
        kind, _, key = (self.sse or "").partition(":kms:")
        headers = {
            "x-amz-storage-class": self.storage_class,
            "x-amz-server-side-encryption": f"{kind}:kms" if key else kind,
            "x-amz-server-side-encryption-aws-kms-key-id": key,
        }
        return {name: value for name, value in headers.items() if value}

    @property
    def name(self) -> str:
        if self.target is None:
            return "source" if self.shared is None else "destination"
        return f"target-{self.target}"

    @property
    def location(self) -> str:
        return f"{self.bucket}:{self.prefix}" if self.prefix else self.bucket

    @property
    def key_prefix(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def setting(self, key: str) -> str:
        """Where a user finds the setting `key` (`path`, `access_key_id`, ...) of this store."""
        if self.target is not None:
            variable = "TARGET_SECRETS" if key in SECRET_KEYS else "TARGETS"
            return f'{variable} "{self.target}"."{key}"'
        source, own = f"SOURCE_{key.upper()}", f"RESTORE_{key.upper()}"
        if self.shared is None:
            return source
        if key == "path":
            return "--to-bucket"
        return f"{own} (now {source})" if key in self.shared else own


ENCRYPTION_MODES = (
    *(f"{kind}{end}" for kind in ("repokey", "keyfile", "authenticated") for end in ("-blake2", "")),
    "none",
)
COMPACT = {"true": 10, "false": None, **{str(percent): percent for percent in range(101)}}  # borg's own is 10
COMPACT_HELP = "true, false, or a threshold in percent from 0 to 100"
COMPRESSION = matching(  # `borg help compression`
    r"(obfuscate,[0-9]+,)?(auto,)*(none|lz4|zstd(,([1-9]|1[0-9]|2[0-2]))?|(zlib|lzma)(,[0-9])?)"
)
COMPRESSION_HELP = "none, lz4, zstd[,1-22], zlib[,0-9], lzma[,0-9], or one of these after 'auto,'"
CHECK_HELP = "such as 30m (in each run), 30m/week or full/month; units are s, m, h, periods day, week, month"
PRUNE_HELP = "such as --keep-daily=7 --keep-weekly=4 --keep-monthly=6"
PASSPHRASE = matching(r"[^\r]*[^\r\n]")
PASSPHRASE_HELP = "one without a line end in it; `openssl rand -base64 48` makes a good one"


@dataclass(frozen=True)
class Target:
    """A store that holds a borg repository, and how to treat that."""

    name: str
    store: Store
    passphrase: str = setting("borg_passphrase", PASSPHRASE, "", PASSPHRASE_HELP, repr=False)
    encryption: str = setting("encryption", ENCRYPTION_MODES, "repokey-blake2")  # what a new repository gets
    must_match: bool = False  # the mode was asked for by name, so that an existing repository has to have it
    compression: str = setting("compression", COMPRESSION, "auto,zstd,22", COMPRESSION_HELP)
    prune: tuple[str, ...] = setting("prune", parse_prune, (), PRUNE_HELP)  # borg's options; empty: never
    compact_percent: int | None = setting("compact", COMPACT, 10, COMPACT_HELP)  # None: do not compact
    check: CheckPlan | None = setting("check", parse_check, None, CHECK_HELP)  # None: a run checks nothing


STORE, TARGET = rows(Store), rows(Target)
SECRET_KEYS = ("access_key_id", "secret_access_key", "session_token", "borg_passphrase")
WRITERS_KEYS = ("storage_class", "sse")  # of stores that are written to
TARGET_KEYS = tuple(key for key in (*STORE, *TARGET) if key not in SECRET_KEYS)
ON_OR_OFF = {"on": True, "off": False}
THREADS = {"auto": None, **{str(number): number for number in range(MOST_THREADS + 1)}}
THREADS_HELP = f"auto, or a whole number from 0 to {MOST_THREADS}; 0 turns it off"
URL_HELP = "an http(s) URL, such as https://hc-ping.com/your-uuid"
METRICS_HELP = "an absolute path, such as /metrics/s3borgbackup.prom"
# One that ends like a date would be taken for a shorter label with a date, and `prune` would confuse the two.
LABEL = matching(r"(?!.*-[0-9]{4}(-|$))[^\s/{}*?\[\]\\:\x00-\x1f\x7f]+")
LABEL_HELP = "letters, digits, '.', '_' and '-', but no '-' before four digits (as in a date)"
FOLDER = matching(r"/((?!::)[^{}])*", Path)
FOLDER_HELP = "an absolute path without braces, such as /data"


@dataclass(frozen=True)
class Settings:
    source: Store = Store(None)
    targets: tuple[Target, ...] = ()
    destination: Store = Store(None)  # without a bucket, unless one is restored into
    label: str = setting("BACKUP_LABEL", LABEL, "backup", LABEL_HELP)
    debug: bool = setting("LOG_LEVEL", {"info": False, "debug": True}, False)
    data_dir: Path = setting("DATA_DIR", FOLDER, Path(DEFAULT_DATA_DIR), FOLDER_HELP)
    lease_ttl_seconds: int = setting("LEASE_TTL", LEASE_SECONDS, DEFAULT_LEASE_SECONDS, " (seconds)")
    # None: until it is known whether the holder is alive
    lease_wait_seconds: int | None = setting("LEASE_WAIT", range(7 * 86400 + 1), None, " (seconds)")
    stall_seconds: int = setting("STALL_TIMEOUT", range(5, 86401), 900, " (seconds)")
    audit: bool = setting("AUDIT", ON_OR_OFF, True)
    memory_limit_mb: int | None = setting("MEMORY_LIMIT_MB", MEMORY_MB, None, MEMORY_HELP)
    read_ahead_threads: int | None = setting("READ_AHEAD_THREADS", THREADS, None, THREADS_HELP)
    parallel_targets: int = setting("PARALLEL_TARGETS", range(1, 65), 4)  # fewer where memory is short
    source_metadata: bool = setting("SOURCE_METADATA", {"false": False, "true": True}, False)  # not needed
    headers: bool = setting("HEADERS", ON_OR_OFF, True)  # whether they are archived, with tags
    exclude: tuple[str, ...] = setting("EXCLUDE", parse_exclude, (), EXCLUDE_HELP)  # for fnmatch
    shard: Shard | None = setting("SHARD", Shard.parse, None, SHARD_HELP)  # None: the whole source
    # An archive that lost more of its objects than this is suspicious.
    shrink_percent: int = setting("SHRINK_WARNING", range(100), 50, " (percent); 0 turns it off")
    # Who is told how a run went; nobody where it is empty.
    healthcheck_url: str = setting("HEALTHCHECK_URL", parse_url, "", URL_HELP, repr=False)
    notify_url: str = setting("NOTIFY_URL", parse_url, "", URL_HELP, repr=False)
    notify_on: str = setting("NOTIFY_ON", NOTIFY_ON, "failure")
    metrics_file: str = setting("METRICS_FILE", matching("/.*"), "", METRICS_HELP)
    log_as_json: bool = setting("LOG_FORMAT", {"text": False, "json": True}, False)  # one object a line

    @property
    def stores(self) -> tuple[Store, ...]:
        return (self.source, *(target.store for target in self.targets))

    @property
    def origin(self) -> str:
        """What is backed up."""
        return f"{self.shard} of {self.source.location}" if self.shard else self.source.location

    def mount_point(self, store: Store) -> Path:
        return self.data_dir / store.name


DOCUMENTS = {"TARGETS": TARGET_KEYS, "TARGET_SECRETS": SECRET_KEYS}
# Docker's env files keep outer quotes.
DOCUMENT_HELP = "a JSON object with one member for each target, on one line, without outer quotes"
DOCUMENT = Value(DOCUMENT_HELP, parse_json, "")
VARIABLES = {
    **rows(Settings),
    **dict.fromkeys(DOCUMENTS, DOCUMENT),
    **{f"SOURCE_{key.upper()}": value for key, value in STORE.items() if key not in WRITERS_KEYS},
    **{f"RESTORE_{key.upper()}": value for key, value in STORE.items() if key != "path"},
}


def near(word: str, words: Collection[str]) -> str:
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"known are {', '.join(words)}"


WRONG = object()  # stands where a mistake was noted, so that nothing is told as missing there, too


class Configuration:
    """Reads the environment variables, or the files that they name, and notes all the mistakes in them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.mistakes: list[str] = []
        # The values of what is secret.
        self.secrets = [
            environ.get(name, "") for name in (*OWN_KEYS[1:], "AWS_CONTAINER_AUTHORIZATION_TOKEN")
        ]
        self._platform = Platform(environ, self.secrets)
        # What stands in each place that a user knows.
        self._texts: dict[str, Any] = {name: self._read(environ, name) for name in VARIABLES}
        # Whom to tell is known even where all else is wrong: they are to hear of that.
        self.known = Settings(**self._fields(Settings))

    def settings(self, needs_source: bool = True, bucket: tuple[str, str] | None = None) -> Settings:
        """Raises ConfigurationError. `bucket`, and the prefix in it, is what is restored into."""
        source = self._store(Store(None), needs_source)
        targets, destination = self._targets(), self._destination(source, bucket)
        self.mistakes += overlap_mistakes([source, *(target.store for target in targets), destination])
        if self.mistakes:
            raise ConfigurationError(self.mistakes)
        return dataclasses.replace(self.known, source=source, targets=targets, destination=destination)

    def _tell(self, place: str, words: str) -> None:
        self.mistakes.append(f"{place}: {words}")

    def _read(self, environ: Mapping[str, str], name: str) -> Any:
        text, path = environ.get(name, ""), environ.get(f"{name}_FILE", "")
        if text and path:
            self._tell(name, f"given together with {name}_FILE; keep one of the two")
        if text or not path:
            return text
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            self._tell(f"{name}_FILE", f"cannot read {path!r}: {reason}")
            return WRONG

    def _parse(self, place: str, row: Value, is_needed: bool) -> Any:
        given = self._texts.get(place)
        try:
            if given in ("", None):
                if is_needed and row.default == "":
                    raise ArgumentTypeError(f"is missing; write {row.help}")
            elif not isinstance(given, str):
                raise ArgumentTypeError("write a JSON string")
            elif re.search(r"[\x00\ud800-\udfff]", given):  # what no program can be given
                raise ArgumentTypeError("holds a NUL, or what is not UTF-8; write it without")
            else:
                return row(given)
        except ArgumentTypeError as error:
            if given is not WRONG:
                self._tell(place, str(error))
        return row.default

    def _fields(
        self, kind: type, place: Callable[[str], str] = str, is_needed: bool = False
    ) -> dict[str, Any]:
        """A value for each field; `place` is where a user finds what is called so."""
        fields = {}
        for each in dataclasses.fields(kind):
            for name, row in each.metadata.items():
                fields[each.name] = self._parse(place(name), row, is_needed)
                if not each.repr:
                    self.secrets.append(str(self._texts.get(place(name)) or ""))
        return fields

    def _store(self, store: Store, is_needed: bool) -> Store:
        fields = self._fields(Store, store.setting, is_needed)
        fields["bucket"], fields["prefix"] = fields["bucket"] or ("", "")
        missing = [key for key in SECRET_KEYS[:2] if self._texts.get(store.setting(key)) in ("", None)]
        if is_needed and (len(missing) == 1 or not self._platform.is_there):
            for key in missing:
                self._tell(store.setting(key), f"is missing; write {STORE[key].help}")
        if fields["bucket"] and urllib.parse.urlsplit(fields["endpoint"]).path == f"/{fields['bucket']}":
            self._tell(store.setting("endpoint"), "has the bucket's name, as the path does; take it out here")
        if fields["is_virtual"] and not VIRTUAL_HOST.fullmatch(f"{fields['bucket']} {fields['endpoint']}"):
            words = "takes a bucket without dots, and an endpoint with a host name; write path"
            self._tell(store.setting("addressing"), f"virtual {words}")
        fields["platform"] = self._platform if len(missing) == 2 else None
        return dataclasses.replace(store, **fields)

    def _destination(self, source: Store, bucket: tuple[str, str] | None) -> Store:
        """Reached as the source is, but for what RESTORE_... say."""
        place = Store(None, shared=()).setting
        self._texts[place("path")] = ":".join(bucket or ())
        own = {key for key in STORE if self._texts[place(key)] != ""}
        if len(own & {"access_key_id", "secret_access_key"}) == 1:
            both = f"{place('access_key_id')}, {place('secret_access_key')}"
            self._tell(both, "one is missing; write both, or neither")
        own |= {"path", "region", "addressing"} if "endpoint" in own else {"path"}
        own |= {"session_token"} if "access_key_id" in own else set()
        given = {key for key in STORE if self._texts.get(source.setting(key), "") != ""}
        shared = tuple(key for key in STORE if key in given - own)
        store = Store(None, shared=shared)
        # What is wrong with it is told of the source.
        self._texts |= {store.setting(key): WRONG for key in shared}
        store = self._store(store, bucket is not None)
        names = {each.name for each in dataclasses.fields(Store) if each.metadata.keys() & set(shared)}
        names |= {"platform"} if "access_key_id" in shared else set()
        return dataclasses.replace(store, **{name: getattr(source, name) for name in names})

    def _targets(self) -> tuple[Target, ...]:
        settings, secrets = (self._parse(name, DOCUMENT, True) for name in DOCUMENTS)
        if not settings or not secrets:
            return ()
        for name in secrets.keys() - settings.keys():
            words = "there is no such target in TARGETS; add it or remove this"
            self._tell(f"TARGET_SECRETS {json.dumps(name)}", words)
        return tuple(self._target(name, (members, secrets.get(name))) for name, members in settings.items())

    def _target(self, name: str, objects: Sequence[Any]) -> Target:
        store, quoted = Store(name), json.dumps(name)
        is_usable = re.fullmatch(r"(?!.*(::|:$))[^/{}\x00-\x1f\x7f\ud800-\udfff]+", name)
        if not is_usable or len(name.encode()) > MAX_NAME_BYTES:
            words = "this name cannot be a mount point; use letters, digits, '.', '_' and '-'"
            self._tell(f"TARGETS {quoted}", words)
        for (variable, keys), members in zip(DOCUMENTS.items(), objects, strict=True):
            if not isinstance(members, dict):
                missing = "is missing; " if members is None else ""
                self._tell(f"{variable} {quoted}", f"{missing}write an object with {', '.join(keys)}")
                members = dict.fromkeys(keys, WRONG)
            for key, value in members.items():
                is_number = key == "compact" and isinstance(value, int | float)
                self._texts[store.setting(key)] = json.dumps(value) if is_number else value
                if key not in keys:
                    self._tell(f"{variable} {quoted}", f"unknown key {json.dumps(key)}; {near(key, keys)}")
        self._replace_shard(store.setting("path"))
        mode = self._texts.get(store.setting("encryption")) or ""
        fields = self._fields(Target, store.setting, str(mode).lower() != "none")
        return Target(name, self._store(store, True), must_match=bool(mode), **fields)

    def _replace_shard(self, place: str) -> None:
        # Each part has a repository of its own. A mistake in SHARD itself was told.
        path, shard = self._texts.get(place), self.known.shard
        if not isinstance(path, str) or not path or (self._texts["SHARD"] and not shard):
            return
        if shard and "{shard}" not in path:
            words = f"SHARD is set, and each part needs a repository of its own; write {{shard}} into {path}"
            self._tell(place, f"{words}, such as {path}{'/' if ':' in path else ':'}{{shard}}")
        elif "{shard}" in path and not shard:
            self._tell(place, "has {shard}, and SHARD is not set; set that, such as 1/16, or take this out")
            self._texts[place] = WRONG
        elif shard:
            self._texts[place] = path.replace("{shard}", shard.padded)


def overlap_mistakes(stores: Sequence[Store]) -> list[str]:
    """A repository in the source would be backed up into itself, one in another would damage that."""
    mistakes, known = [], []
    for store in stores:
        url = urllib.parse.urlsplit(store.endpoint)  # whose scheme makes no difference
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
        place = url.hostname, port, url.path, store.bucket
        for other, its_place in known if store.endpoint and store.bucket else ():
            first, second = sorted([store.key_prefix, other.key_prefix])
            # What is restored may go where it came from.
            if place == its_place and second.startswith(first) and (store.target or other.target):
                mistakes.append(
                    f"{store.setting('path')}: overlaps {other.setting('path')}"
                    f" ({store.location} and {other.location} on one server); give each a place of its own"
                )
        known.append((store, place))
    return mistakes


# ------------------------------------------------------------------------------------------------------- S3

# Signing follows "Signature Calculations for the Authorization Header: Transferring Payload in a Single
# Chunk" of the Amazon S3 API reference; the functions are named after its steps.

Query = Sequence[tuple[str, str]]
Headers = Mapping[str, str]
Where = tuple[str, str] | None  # a listing begins: the parameter of its request that says so
NO_HEADERS: Headers = {}
LISTED = ("Key", "LastModified", "Size", "ETag")  # of what a listing says of an object
IS_FOLDER = -1  # in place of a size: it is no object, but others lie below it
MD5 = functools.partial(hashlib.md5, usedforsecurity=False)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# A key as S3 sorts them, and as all else has it.
encode_key = functools.partial(str.encode, encoding="utf-8", errors="surrogateescape")
decode_key = functools.partial(bytes.decode, encoding="utf-8", errors="surrogateescape")


def uri_encode(text: str, safe: str = "") -> str:
    """UriEncode() of the specification."""
    return urllib.parse.quote(text, safe=safe + "-._~", errors="surrogateescape")


def canonical_request(method: str, path: str, query: Query, headers: Headers, payload_hash: str) -> str:
    """Task 1. `path` is not encoded yet. Lines two and three of the result are exactly what is sent."""
    pairs = sorted((uri_encode(name), uri_encode(value)) for name, value in query)
    encoded = "&".join(map("=".join, pairs))
    lower = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    lines = "".join(f"{name}:{lower[name]}\n" for name in sorted(lower))
    names = ";".join(sorted(lower))
    return "\n".join([method, uri_encode(path, safe="/"), encoded, lines, names, payload_hash])


def authorization(canonical: str, key_id: str, secret_key: str, when: datetime, region: str) -> str:
    """Tasks 2 and 3: the Authorization header."""
    scope = f"{when:%Y%m%d}/{region}/s3/aws4_request"
    digest = hashlib.sha256(encode_key(canonical)).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{when:%Y%m%dT%H%M%SZ}\n{scope}\n{digest}"
    signature = hmac.digest(signing_key(secret_key, scope), text.encode(), "sha256").hex()
    names = canonical.split("\n")[-2]
    return f"AWS4-HMAC-SHA256 Credential={key_id}/{scope},SignedHeaders={names},Signature={signature}"


@functools.lru_cache(maxsize=8)  # it holds for a day
def signing_key(secret_key: str, scope: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


@dataclass(frozen=True)
class Keys:
    """What requests are signed with."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(repr=False)
    origin: str  # where they come from, for people
    expires: datetime | None = None
    due: datetime | None = None  # when they are to be renewed


class KeysFault(OSError):
    """The platform does not give keys, now."""


OWN_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
CONTAINER_KEYS = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
METADATA = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
PLATFORM = (OWN_KEYS[0], "AWS_WEB_IDENTITY_TOKEN_FILE", *CONTAINER_KEYS, METADATA)


class Platform:
    """The keys that the platform gives, renewed in time; found as AWS's SDKs find them, and in their order.

    Those of the environment; of a web identity (EKS: a token in a file, and STS); of a container (ECS, EKS
    Pod Identity); of an EC2 instance (IMDSv2). See "Standardized credential providers" in the AWS SDKs and
    Tools Reference Guide. Safe to use from several threads.
    """

    def __init__(self, environ: Mapping[str, str], told: list[str]) -> None:
        self._environ, self._told, self._lock = environ, told, threading.Lock()
        self._keys: Keys | None = None
        self._asking: Future[Keys] | None = None
        self._again = datetime.min.replace(tzinfo=UTC)  # not before then it is asked anew
        self._fds: list[int] = []  # what TigrisFS reads: its configuration, and the keys

    @property
    def is_there(self) -> bool:
        vendor = Path("/sys/class/dmi/id/sys_vendor")  # of an EC2 instance
        with contextlib.suppress(OSError):
            return any(map(self._environ.get, PLATFORM)) or vendor.read_text().strip() == "Amazon EC2"
        return False

    def keys(self) -> Keys:
        """Those that hold. Nobody waits for new ones until these have expired. Raises KeysFault."""
        with self._lock:
            keys, now = self._keys, datetime.now(UTC)
            is_due = now > self._again and (not keys or (keys.due and keys.due < now))
            if is_due and (not self._asking or self._asking.done()):
                self._asking, self._again = in_background(self._renew), now + timedelta(seconds=1)
            asking = self._asking
        return keys if keys and not (keys.expires and keys.expires < now) else asking.result()

    def _renew(self) -> Keys:
        try:
            self._keys = self._ask()
        except (*CONNECTION_FAULTS, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = str(error) or type(error).__name__
            if not isinstance(error, CONNECTION_FAULTS):
                reason = f"its answer cannot be read ({reason})"
            raise KeysFault(f"the platform gives no keys: {reason}") from None
        return self._keys

    def _ask(self) -> Keys:
        environ = self._environ
        if environ.get(OWN_KEYS[0]):
            return Keys(*(environ.get(name, "") for name in OWN_KEYS), OWN_KEYS[0])
        if path := environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
            role, token = environ.get("AWS_ROLE_ARN", ""), Path(path).read_text().strip()
            region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
            url = f"https://sts.{region + '.' if region else ''}amazonaws.com"
            query = {"Action": "AssumeRoleWithWebIdentity", "Version": "2011-06-15"}
            query["RoleSessionName"] = environ.get("AWS_ROLE_SESSION_NAME") or "s3borgbackup"
            body = urllib.parse.urlencode({**query, "RoleArn": role, "WebIdentityToken": token}).encode()
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = fetch(environ.get("AWS_ENDPOINT_URL_STS") or url, form, body, "POST")
            return self._lent(lambda name: xml_text(answer, name), f"the role {role}", "SessionToken")
        relative, full = map(environ.get, CONTAINER_KEYS)
        if url := f"http://169.254.170.2{relative}" if relative else full:
            token = environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
            if path := environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
                token = Path(path).read_text().strip()
            answer, origin = fetch(url, {"Authorization": token} if token else {}), "the container's role"
        else:
            base = (environ.get(METADATA) or "http://169.254.169.254").rstrip("/") + "/latest"
            token = fetch(f"{base}/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "300"}, method="PUT")
            own, roles = {"x-aws-ec2-metadata-token": token.decode()}, "meta-data/iam/security-credentials"
            role = fetch(f"{base}/{roles}/", own).decode().strip()
            answer, origin = fetch(f"{base}/{roles}/{role}", own), f"the instance's role {role}"
        return self._lent(json.loads(answer).get, origin, "Token")

    def _lent(self, find: Callable[[str], str | None], origin: str, token: str) -> Keys:
        """Keys that expire; they are renewed after half of their time."""
        parts = [find(name) or "" for name in ("AccessKeyId", "SecretAccessKey", token)]
        if not all(parts):
            raise OSError(f"{origin}: {find('Message') or 'an answer without keys'}")
        self._told += parts[1:]
        expires, now = datetime.fromisoformat(find("Expiration") or ""), datetime.now(UTC)
        return Keys(*parts, origin, expires, now + max(timedelta(seconds=1), (expires - now) / 2))

    def for_tigrisfs(self) -> dict[str, str]:
        """The variables that have TigrisFS read the keys, and read them anew before they expire."""
        keys = self.keys()
        if not keys.expires:
            return environment_of(keys)
        with self._lock:
            if not self._fds:
                self._fds = [os.memfd_create(name) for name in ("config", "keys")]
                place = f"/proc/{os.getpid()}/fd"
                text = f"[default]\ncredential_process = cat {place}/{self._fds[1]}\n"
                os.write(self._fds[0], text.encode())
                self._note(keys)
                in_background(lambda: self._keep(keys))
            return {"AWS_CONFIG_FILE": f"/proc/{os.getpid()}/fd/{self._fds[0]}"}

    def _note(self, keys: Keys) -> None:
        """Has TigrisFS find these keys the next time ("Sourcing credentials with an external process")."""
        names = {"AccessKeyId": keys.access_key_id, "SecretAccessKey": keys.secret_access_key}
        # What it sends then must arrive before they expire; by then new ones should be here.
        early = keys.due + (keys.expires - keys.due) / 2
        names |= {"SessionToken": keys.session_token, "Expiration": f"{early:%Y-%m-%dT%H:%M:%SZ}"}
        new = os.memfd_create("keys")
        os.write(new, json.dumps({"Version": 1, **names}).encode())
        os.dup2(new, self._fds[1], inheritable=False)  # who reads finds the old ones or these, whole
        os.close(new)

    def _keep(self, noted: Keys) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            with contextlib.suppress(KeysFault):
                if (keys := self.keys()) is not noted:
                    self._note(keys)
                    noted = keys


def environment_of(keys: Keys) -> dict[str, str]:
    parts = keys.access_key_id, keys.secret_access_key, keys.session_token
    return {name: value for name, value in zip(OWN_KEYS, parts, strict=True) if value}


def fetch(url: str, headers: Headers = NO_HEADERS, body: bytes | None = None, method: str = "GET") -> bytes:
    """What the platform answers. Raises OSError."""
    parts = urllib.parse.urlsplit(url)
    with contextlib.closing(connection_to(parts)) as connection:
        connection.timeout = PLATFORM_SECONDS
        try:
            connection.request(method, request_target(parts), body, dict(headers))
            answer = connection.getresponse()
            content = answer.read()
        except CONNECTION_FAULTS as fault:
            raise OSError(f"{parts.netloc}: {fault or type(fault).__name__}") from None
    if answer.status != 200:
        code, words = (xml_text(content, name) for name in ("Code", "Message"))
        code = code or http_reason(answer.status)
        raise OSError(f"{parts.netloc}: {code} ({answer.status}){words and f': {words}'}")
    return content


@dataclass(frozen=True, slots=True)
class S3Object:
    key: str
    size_bytes: int
    last_modified: datetime
    etag: str = ""  # without quotes
    is_shown: bool = True  # by a mount
    # What HEAD says of it, once that is known: `headers` by name, `tags`, `storage_class`.
    facts: Mapping[str, Any] | None = None

    @property
    def is_small(self) -> bool:
        """Whether one request gives all of it, and can prove of which version."""
        return 0 <= self.size_bytes <= WHOLE_READ_BYTES and bool(self.etag)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read to its end; header names are lower-case."""

    status: int
    headers: Headers
    body: bytes
    sent: float = 0.0  # when the try was sent that it answers, in boot_seconds()

    def time(self, header: str) -> datetime | None:
        """The time in `Date` or `Last-Modified`; None where it is not told."""
        try:
            return email.utils.parsedate_to_datetime(self.headers[header.lower()]).astimezone(UTC)
        except (KeyError, ValueError):
            return None

    @property
    def etag(self) -> str:
        return self.headers.get("etag", "").strip('"')

    @property
    def has_tags(self) -> bool:
        return int(self.headers.get("x-amz-tagging-count") or 0) > 0


@dataclass(frozen=True)
class Patience:
    """How long a client waits for one answer, and how long it tries again, by the kind of fault."""

    answer_seconds: float = ANSWER_TIMEOUT_SECONDS
    unreachable_seconds: float = CONNECT_PATIENCE_SECONDS
    failing_seconds: float = SERVER_PATIENCE_SECONDS


# For a store that has answered before: its address is right, so whatever it is may pass.
PROVEN = Patience(ANSWER_TIMEOUT_SECONDS, PROVEN_PATIENCE_SECONDS, PROVEN_PATIENCE_SECONDS)
HASTY, BRIEF = Patience(8, 0, 0), Patience(2, 0, 0)

# What to do about S3's error codes (with a word of the message); {setting} places are the store's settings.
S3_HINTS = {
    "NoSuchBucket": "Create the bucket or correct {path}.",
    "AccessDenied": "Give the key {permission}, or correct {path} and {access_key_id}.",
    "AccessDenied:deny": "A policy denies that, whatever the key may do: have it allow {permission}.",
    "InvalidAccessKeyId AccessDenied:key:": "Correct {access_key_id}.",
    "SignatureDoesNotMatch AccessDenied:signature": "Correct {secret_access_key}.",
    "InvalidBucketName": "Correct {path}.",
    "LIST/NoSuchKey": "The bucket's name belongs in {path}, not in {endpoint}: take it out.",
    "SecondLevelDomainForbidden PathStyleDomainForbidden": (
        "The server wants the bucket in its host name: set {addressing}=virtual."
    ),
    "MethodNotAllowed": "Check {endpoint}: an S3 API lies elsewhere (is this a console or a web site?).",
    "AccountProblem AllAccessDisabled": "See to the account: the provider has locked it.",
    "QuotaExceeded AccessDenied:cap": "Make room in the bucket, or have its quota or cap raised.",
    "ExpiredToken InvalidToken": "Renew {session_token}, or use a lasting key.",
    "NoKeys": "Write {access_key_id}, or see to the role that the platform gives.",
    "RequestTimeTooSkewed RequestExpired": "The clock of this machine is wrong: set it.",
    "AuthorizationHeaderMalformed InvalidRegion InvalidRegionName": "Set {region} to the bucket's region.",
    "IllegalLocationConstraintException": "Set {region} to the bucket's region.",
    "PermanentRedirect TemporaryRedirect": "Write the endpoint of the bucket's own region into {endpoint}.",
    "NoAnswer": "Check {endpoint} and the network.",
    "Untrusted": "Check {endpoint}, or name the certificate to trust in SSL_CERT_FILE.",
    "413": "Let the proxy before S3 take requests of 32 MB (nginx: client_max_body_size 32m).",
    "NotS3": "Check {endpoint}: this does not look like an S3 server.",
    "Redirect": "Redirects are not followed: write the right address into {endpoint}.",
    "CannotSend": "Correct {endpoint} and {access_key_id}.",
    "BadListing 501": "What is needed does not work there: update the server, or use another one.",
    "RangeIgnored": "Mounts read by ranges: have {endpoint}, or a proxy before it, heed them (206).",
}
S3_HINTS = {code: hint for codes, hint in S3_HINTS.items() for code in codes.split()}
PERMISSIONS = {"LIST": "ListBucket", "GET": "GetObject", "HEAD": "GetObject", "DELETE": "DeleteObject"}
REDIRECTS = range(300, 400)
# What passes: too early, too many, too busy; 520-530 are a CDN's words for a server that does not answer it.
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 531)})
RETRIED_CODES = frozenset({"RequestTimeout"})  # a 400, and S3's word for a body that stopped on its way
EMPTY_PAGES = 10_000  # of a listing, one after the other: millions of delete markers may lie between two keys
CONNECTION_FAULTS = (OSError, http.client.HTTPException)
MOST_HEADERS, MOST_HEADER_BYTES = 1000, 64 * 1024


class IdleConnections(list[http.client.HTTPConnection]):
    """Those that nobody uses now. They are closed when the last client that shares them is gone."""

    def __del__(self) -> None:
        for connection in self:
            connection.close()


@dataclass(eq=False)
class S3Client:
    """Requests to one store: signed and retried. Safe to use from several threads.

    `dataclasses.replace` makes a twin, with the same open connections and what it has learned.

    Every method raises S3Error when S3 refuses or does not answer for longer than `patience` says. After a
    stop signal a request has CLEANUP_SECONDS and no further try, and Stopped is raised.
    """

    store: Store
    region: str = ""  # by default the configured one, or what the server says
    patience: Patience = Patience()
    stop: Stop = field(default_factory=lambda: Stop())
    is_direct: bool = False  # for threads that nobody waits for: faster, but no stop signal ends a wait
    trying: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # round each try
    idle: IdleConnections = field(default_factory=IdleConnections, repr=False)
    dated: Answer | None = field(default=None, repr=False)  # the last one that had a time
    is_sorted: bool = True  # whether a store lists in key order, see `look`

    def __post_init__(self) -> None:
        self.region = self.region or self.store.region or "us-east-1"
        self._url, bucket = urllib.parse.urlsplit(self.store.endpoint), self.store.bucket
        if self.store.is_virtual:
            self._url = self._url._replace(netloc=f"{bucket}.{self._url.netloc}")
        self._path = self._url.path if self.store.is_virtual else f"{self._url.path}/{bucket}"

    @property
    def clock(self) -> datetime:
        """The server's clock, when it answered last; ours, where it does not tell."""
        return (self.dated and self.dated.time("Date")) or datetime.now(UTC)

    def reach(self) -> str:
        """How the server is reached, whatever the keys are. Raises S3Error, also where clocks differ."""
        connection, sent = connection_to(self._url), datetime.now(UTC)
        try:
            connection.timeout = CONNECT_TIMEOUT_SECONDS
            connection.request("HEAD", "/")
            date = connection.getresponse().headers.get("date", "")
        except CONNECTION_FAULTS as fault:
            raise self._no_answer(fault) from None
        finally:
            version = connection.sock.version() if isinstance(connection.sock, ssl.SSLSocket) else ""
            connection.close()
        text, clock = version or "without TLS", Answer(0, {"date": date}, b"").time("Date")
        ahead = round((sent - clock).total_seconds()) if clock else 0
        if abs(ahead) > CLOCK_ERROR_SECONDS:
            words = f"the clock here is {duration(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"
            raise self._error(0, "RequestTimeTooSkewed", words)
        return f"ok, {text}, clocks differ by {abs(ahead)} s" if clock else f"ok, {text}"

    def list_page(
        self, prefix: str, where: Where = None, limit: int = 1000, delimiter: str = ""
    ) -> tuple[list[S3Object], Where]:
        """Up to `limit` objects below `prefix`, and the `where` of the next page; None: there is none.

        With a `delimiter` all that has it behind the prefix is one entry, which ends with it.
        """
        query = [("list-type", "2"), ("encoding-type", "url"), ("max-keys", str(limit)), ("prefix", prefix)]
        query += [("delimiter", delimiter)] if delimiter else []
        answer = self.request("GET", query=[*query, where] if where else query)
        key, objects = "", []
        try:
            root = ElementTree.fromstring(answer.body)
            space, kind, rest = root.tag.partition("ListBucketResult")
            if not kind or rest:
                raise ElementTree.ParseError(f"{root.tag} instead of ListBucketResult")
            is_encoded = root.findtext("{*}EncodingType") == "url"

            def decoded(key: str) -> str:
                if is_encoded and ("%" in key or "+" in key):
                    return urllib.parse.unquote_plus(key, errors="surrogateescape")
                return key

            for folder in root.iterfind(f"{space}CommonPrefixes"):
                objects.append(S3Object(decoded(folder.findtext(f"{space}Prefix", "")), IS_FOLDER, EPOCH))
            for entry in root.iterfind(f"{space}Contents"):
                key, modified, size_bytes, etag = [entry.findtext(space + name, "") for name in LISTED]
                key = decoded(key)
                when = datetime.fromisoformat(modified)
                # S3's times are UTC, also where a server does not say so.
                when = when if when.tzinfo else when.replace(tzinfo=UTC)
                objects.append(S3Object(key, int(size_bytes), when, etag.strip('"')))
        except ElementTree.ParseError as error:
            raise self._error(answer.status, "NotS3", f"the listing cannot be read ({error})") from error
        except ValueError as error:
            words = f"the listing's entry of {key!r} cannot be read ({error})"
            raise self._error(answer.status, "BadListing", words) from error
        if root.findtext("{*}IsTruncated", "").strip().lower() != "true":
            return objects, None
        if token := root.findtext("{*}NextContinuationToken"):
            return objects, ("continuation-token", token)
        keys = [entry.key for entry in objects]
        if not keys or keys != sorted(keys) or delimiter:
            words = "a page of the listing is truncated, and does not say how it goes on"
            raise self._error(answer.status, "BadListing", words)
        return objects, ("start-after", keys[-1])

    def list_objects(
        self, prefix: str, start_after: str = "", where: Where = None, delimiter: str = ""
    ) -> Iterator[S3Object]:
        """Those below `prefix`, or after a key or from a page on, in order, but in S3's directory buckets."""
        where, last, empty = ("start-after", start_after) if start_after else where, None, 0
        ask = functools.partial(self.list_page, prefix, delimiter=delimiter)
        page = in_background(functools.partial(ask, where))
        while True:
            objects, following = page.result()
            if following:  # S3 looks for these while those are worked at
                page = in_background(functools.partial(ask, following))
            yield from (entry for entry in objects if entry.key > start_after)  # some servers ignore that
            if not following:
                return
            # An empty page may have a next one; one that came twice would come for ever.
            empty = 0 if objects else empty + 1
            is_repeated = following == where or (objects and objects == last)
            if is_repeated or empty > EMPTY_PAGES:
                what = "a page came twice" if is_repeated else f"{EMPTY_PAGES:,} empty pages"
                raise self._error(200, "BadListing", f"the listing does not advance: {what}")
            where, last = following, objects

    def get(self, key: str, span: tuple[int, int] | None = None) -> bytes:
        """The content of an object, or the bytes from the first to the last of `span`."""
        return (self.get_span(key, *span) if span else self.request("GET", key)).body

    def download(self, key: str, size_bytes: int) -> Iterator[Answer]:
        """The content of an object of about this size, in pieces of one version; the last has its headers."""
        if size_bytes <= LARGEST_PIECE_BYTES:
            yield self.request("GET", key)
            return
        head = self.request("HEAD", key)
        size_bytes, version = int(head.headers["content-length"]), {"If-Match": head.headers.get("etag", "*")}
        for first in range(0, size_bytes, LARGEST_PIECE_BYTES):
            yield self.get_span(key, first, min(first + LARGEST_PIECE_BYTES, size_bytes) - 1, version)
        yield head

    def tags(self, key: str) -> dict[str, str]:
        answer = self.request("GET", key, query=[("tagging", "")])
        try:
            tags = ElementTree.fromstring(answer.body or b"<Tagging/>").iterfind(".//{*}Tag")
        except ElementTree.ParseError as error:
            raise self._error(answer.status, "NotS3", f"the tags cannot be read ({error})") from error
        return {tag.findtext("{*}Key", ""): tag.findtext("{*}Value", "") for tag in tags}

    def get_span(self, key: str, first: int, last: int, headers: Headers = NO_HEADERS) -> Answer:
        answer = self.request("GET", key, headers={"Range": f"bytes={first}-{last}", **headers})
        is_right = answer.headers.get("content-range", "").startswith(f"bytes {first}-{last}/")
        is_right |= answer.status == 200 and first == 0  # an object that has no more
        if not is_right or len(answer.body) != last - first + 1:
            words = f"the bytes {first}-{last} of {key!r} were asked for, and others came"
            raise self._error(answer.status, "RangeIgnored", words)
        return answer

    def find(self, key: str) -> Answer | None:
        """An object; None where there is none."""
        try:
            return self.request("GET", key)
        except S3Error as error:
            if error.code == "NoSuchKey":
                return None
            # AWS says so of an absent object to who may list only what is below a prefix.
            if error.status == 403 and not any(entry.key == key for entry in self.list_page(key, limit=1)[0]):
                return None
            raise

    def put(self, key: str, body: bytes, headers: Headers = NO_HEADERS, query: Query = ()) -> Answer:
        """Writes an object, or the part of one that `query` names, under the condition in `headers`."""
        # A bucket with object lock takes none without its MD5.
        md5 = base64.b64encode(MD5(body).digest()).decode()
        return self.request("PUT", key, query, {"Content-MD5": md5, **headers}, body)

    def delete(self, key: str, headers: Headers = NO_HEADERS) -> None:
        """Deletes an object, if it is there, under the condition that `headers` may name."""
        self.request("DELETE", key, headers=headers)

    def request(
        self, method: str, key: str = "", query: Query = (), headers: Headers = NO_HEADERS, body: bytes = b""
    ) -> Answer:
        """One request, again while the fault may pass; finds out the bucket's region on the way."""
        start, pause = time.monotonic(), 0.1
        while True:
            try:
                with self.trying():
                    answer = self._answer(lambda: self._exchange(method, key, query, headers, body))
                if answer.status == 200 and method in ("PUT", "POST") and xml_text(answer.body, "Code"):
                    answer = dataclasses.replace(answer, status=500)  # it took long, and failed in the end
                if answer.status < 300:
                    return answer
                error = self._refusal(answer, method, key)
                passes = answer.status in RETRIED_STATUSES or error.code in RETRIED_CODES
                patience = self.patience.failing_seconds if passes else 0
                region = answer.headers.get("x-amz-bucket-region") or xml_text(answer.body, "Region")
                is_news = answer.status in (301, 400, 403) and region not in ("", self.region)
                if is_news and not self.store.region:
                    self.region = region
                    continue
            except CONNECTION_FAULTS as fault:
                error = self._no_answer(fault)
                patience = 0 if error.code == "Untrusted" else self.patience.unreachable_seconds
            except ValueError as fault:  # of http.client, whose words quote headers
                raise self._error(0, "CannotSend", f"cannot be sent ({type(fault).__name__})") from None
            if time.monotonic() - start + pause > patience:
                raise error
            self.stop.wait(pause)
            pause = min(2 * pause, MAX_BACKOFF_SECONDS)

    def _answer(self, exchange: Callable[[], Answer]) -> Answer:
        """The answer that `exchange` waits for. After a stop signal it is left to itself, soon."""
        if self.is_direct:
            self.stop.check()
            return exchange()
        work = in_background(exchange)
        for _ in waiting(work, stop=self.stop, grace_seconds=CLEANUP_SECONDS):
            pass
        return work.result()

    def _exchange(self, method: str, key: str, query: Query, extra: Headers, body: bytes) -> Answer:
        path = f"{self._path}/{key}" if key else self._path or "/"
        when, payload_hash, keys = datetime.now(UTC), hashlib.sha256(body).hexdigest(), self.store.keys()
        headers = {**extra, "Host": self._url.netloc, "x-amz-content-sha256": payload_hash}
        headers["x-amz-date"] = f"{when:%Y%m%dT%H%M%SZ}"
        if keys.session_token:
            headers["x-amz-security-token"] = keys.session_token
        if (method == "PUT" and not query) or ("uploads", "") in query:
            headers |= self.store.written_with
        canonical = canonical_request(method, path, query, headers, payload_hash)
        own = keys.access_key_id, keys.secret_access_key
        headers["Authorization"] = authorization(canonical, *own, when, self.region)
        target = "?".join(filter(None, canonical.split("\n")[1:3]))
        fields = {name: encode_key(value) for name, value in headers.items()}
        fields |= {"Content-Length": str(len(body)).encode()} if body else {}
        try:
            connection, is_new = self.idle.pop(), False
        except IndexError:
            connection, is_new = connection_to(self._url), True
        try:
            if is_new:
                connection.timeout = min(CONNECT_TIMEOUT_SECONDS, self.patience.answer_seconds)
                connection.connect()
            connection.sock.settimeout(self.patience.answer_seconds)
            sent = boot_seconds()
            # A body that is a file is sent in blocks, each with a timeout of its own: lines may be slow. One
            # that is not goes with its headers.
            is_long = len(body) > SMALL_BODY_BYTES
            connection.request(method, target, io.BytesIO(body) if is_long else body or None, fields)
            response = connection.getresponse()
            is_ignored = "Range" in extra and response.status == 200  # and what comes may be long
            content = response.read(READ_BYTES if is_ignored else None)
        except BaseException as fault:
            connection.close()
            if is_new or isinstance(fault, TimeoutError) or not isinstance(fault, CONNECTION_FAULTS):
                raise
            # The server closes what is idle for long: that says nothing about it.
            return self._exchange(method, key, query, extra, body)
        if is_ignored:
            connection.close()
        elif connection.sock:  # the server has not closed it
            self.idle.append(connection)
        answer = Answer(response.status, response.headers, content, sent)
        self.dated = answer if "date" in answer.headers else self.dated
        return answer

    def _no_answer(self, fault: Exception) -> S3Error:
        codes = {KeysFault: "NoKeys", ssl.SSLCertVerificationError: "Untrusted"}
        return self._error(0, codes.get(type(fault), "NoAnswer"), str(fault) or type(fault).__name__)

    def _refusal(self, answer: Answer, method: str, key: str) -> S3Error:
        status, reason = answer.status, http_reason(answer.status)
        code, *words = (xml_text(answer.body, name) for name in ("Code", "Message", "Details", "Endpoint"))
        message = " ".join(filter(None, words))
        if status in REDIRECTS and not code:
            to = urllib.parse.urlsplit(answer.headers.get("location", ""))  # whose path repeats ours
            code, message = "Redirect", f"to {to.scheme}://{to.netloc}"
        code = code or ("NotS3" if answer.body else reason)
        return self._error(status, code, message or reason, method if key else "LIST", key)

    def _error(self, status: int, code: str, message: str, asked_for: str = "PUT", key: str = "") -> S3Error:
        store = self.store
        settings = {name: store.setting(name) for name in STORE}
        if store.platform and code != "NoKeys":
            settings |= dict.fromkeys(SECRET_KEYS, "the platform's keys")
        place = f"{store.bucket}/{key}" if key else store.bucket
        settings["permission"] = f"s3:{PERMISSIONS.get(asked_for, 'PutObject')} on {place}"
        codes = (*(f"{code}:{word}" for word in message.split()), str(status), f"{asked_for}/{code}", code)
        hint = next(filter(None, map(S3_HINTS.get, codes)), TRY_LATER if status >= 500 else TRY_AGAIN)
        number = f" ({status})" if status else ""
        where = f"{store.name} ({store.location} at {store.endpoint})"
        return S3Error(f"{where}: {code}{number}: {message}", hint.format(**settings), status, code)


def connect_within(address: tuple[str, int], seconds: float, _source: object = None) -> socket.socket:
    """As `socket.create_connection`, but `seconds` are for the resolver and all addresses together.

    Each address gets an equal share of what is left, and a TLS handshake that follows the rest.
    """
    deadline, fault = time.monotonic() + seconds, OSError(f"{address[0]} has no address")
    lookup = in_background(lambda: socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
    try:
        found = lookup.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"looking up {address[0]} timed out") from None
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


def parse_headers(stream: IO[bytes], **_options: object) -> dict[str, str]:
    headers = dict[str, str]()
    while (line := stream.readline(MOST_HEADER_BYTES)).strip():
        if len(line) == MOST_HEADER_BYTES or len(headers) == MOST_HEADERS:
            raise http.client.HTTPException("its headers have no end")
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return headers


class Response(http.client.HTTPResponse):
    """One whose headers are a dictionary, in lower case; a parser of mail would take a third of our time."""

    begin = types.FunctionType(
        http.client.HTTPResponse.begin.__code__, {**vars(http.client), "parse_headers": parse_headers}
    )
    begin.__kwdefaults__ = http.client.HTTPResponse.begin.__kwdefaults__


def connection_to(url: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    """One that is not opened yet. Without a port, http.client takes one from an IPv6 address."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port or kind.default_port)
    connection._create_connection, connection.response_class = connect_within, Response
    return connection


def xml_text(body: bytes, name: str) -> str:
    """The text of the first element `name` in a small XML document, empty where there is none."""
    try:
        return (ElementTree.fromstring(body).findtext(f".//{{*}}{name}") or "").strip()
    except ElementTree.ParseError:
        return ""


def http_reason(status: int) -> str:
    return http.client.responses.get(status, f"HTTP status {status}")


# What is archived of an object's headers, besides user metadata; with examples, as which a probe has them.
KEPT_HEADERS = {
    "content-type": "text/css",
    "cache-control": "no-store",
    "content-disposition": "inline",
    "content-encoding": "gzip",
    "content-language": "la",
    "expires": "Thu, 01 Jan 1970 00:00:00 GMT",
    "x-amz-website-redirect-location": "/",
}
USER_METADATA = "x-amz-meta-"


def headers_of(answer: Answer) -> dict[str, str]:
    """Those of an object's headers that are its own, in S3's order and letters."""
    return {
        name: decode_key(text.encode("latin-1"))
        for name, text in answer.headers.items()
        if name in KEPT_HEADERS or name.startswith(USER_METADATA)
    }


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
UNREPRESENTABLE = re.compile(r"(^|/)(\.{0,2})(/|$)|\0")  # an empty part, or one that is a folder's own name
# XML 1.0 has no place for these ("Char" in its grammar): a page of a listing that has one cannot be read.
NOT_IN_XML = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def microseconds(when: datetime) -> int:
    return (when - EPOCH) // timedelta(microseconds=1)


def is_showable(key: str, size_bytes: int) -> bool:
    """Whether a mount can show an object, as far as its own key tells; an empty `folder/` is a folder."""
    name = key if size_bytes else key.removesuffix("/")
    # FUSE_NAME_MAX of the kernel; a character has four bytes at most.
    is_long = len(name) > 256 and any(len(encode_key(part)) > 1024 for part in name.split("/"))
    is_lost = NOT_IN_XML.search(name) or "\r" in name  # which XML reads as a line end
    return not (is_long or is_lost or UNREPRESENTABLE.search(name))


def folders_of(key: str) -> list[str]:
    """The folders that an object lies in, outermost first: "" or with a slash at the end."""
    return ["", *(key[: match.end()] for match in re.finditer("/", key))]


def below(folder: str) -> tuple[bytes, bytes]:
    """What the keys in a folder, "" or with a slash at the end, begin with, and the first key behind them."""
    start = encode_key(folder)
    return start, start[:-1] + b"0" if start else b"\xff" * 5  # 0 comes after the slash


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
        self.path, self._lock, self._noted = path, threading.RLock(), list[S3Object]()
        path.unlink(missing_ok=True)
        with self._told():
            self._db = sqlite3.connect(path.absolute().as_uri(), uri=True, check_same_thread=False)
            self._db.executescript(CATALOG_TABLES)

    def __del__(self) -> None:
        if "_db" in vars(self):  # one that was given up
            self._db.close()

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
            if self._noted:
                noted, self._noted = self._noted, []
                self.add(noted)
            return self._db.execute(sql, values).fetchall()

    def insert(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Takes rows in; one with a key that is there already replaces it."""
        for page in pages(rows):
            with self._told():
                marks = ", ".join("?" * len(page[0]))
                self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", page)

    def add(self, objects: Iterable[S3Object]) -> None:
        def row(each: S3Object) -> tuple[Any, ...]:
            modified = microseconds(each.last_modified)
            facts = None if each.facts is None else json.dumps(each.facts)
            return encode_key(each.key), each.size_bytes, modified, each.etag, each.is_shown, facts

        self.insert("objects", map(row, objects))

    def note(self, each: S3Object) -> None:
        """Adds one of many that come one by one: it is there for the next query."""
        with self._lock:
            self._noted.append(each)

    def rows(self, where: str = "1", values: Sequence[Any] = ()) -> Iterator[S3Object]:
        """The objects for which `where` holds, a condition of SQL, in key order."""
        sql, last = f"SELECT * FROM objects WHERE key > ? AND ({where}) ORDER BY key LIMIT ?", b""
        while page := self.execute(sql, (last, *values, CATALOG_PAGE)):
            for last, size_bytes, modified, etag, is_shown, facts in page:
                when, known = EPOCH + timedelta(microseconds=modified), facts and json.loads(facts)
                yield S3Object(decode_key(last), size_bytes, when, etag, bool(is_shown), known)

    def get(self, key: str) -> S3Object | None:
        return next(self.rows("key = ?", [encode_key(key)]), None)

    def total(self, where: str = "1", values: Sequence[Any] = ()) -> tuple[int, int]:
        """The number of the objects for which `where` holds, and of their bytes."""
        return self.execute(f"SELECT count(*), coalesce(sum(size), 0) FROM objects WHERE {where}", values)[0]

    def unlistable(self) -> set[str]:
        """The folders ("" or with a slash at the end) that TigrisFS cannot list, when all objects are in.

        They hold a key that no XML holds, or begin shortly before one: TigrisFS first asks for a page of all
        that follows a folder's name (`slurpOnce` in core/dir.go).
        """
        found, recent, previous = set[str](), deque([(0, "")]), ""
        if not any(NOT_IN_XML.search(each.key) for each in self.rows("NOT is_shown")):
            return found
        for number, each in enumerate(self.rows()):
            for folder in folders_of(each.key):
                if not previous.startswith(folder):
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
        hide = "UPDATE objects SET is_shown = 0 WHERE"
        for folder in unlistable:  # what is directly in it, not further down
            values = *below(folder), len(encode_key(folder)) + 1
            self.execute(f"{hide} key > ? AND key < ? AND instr(substr(key, ?), X'2F') = 0", values)
        self.execute(f"{hide} is_shown AND {IS_COVERED}")
        self.execute("DELETE FROM objects WHERE size < 0")  # what lies in other parts is not needed any more

    def exclude(self, patterns: Sequence[str]) -> set[str]:
        """Has SQL's `excluded(key)` say whether one of them matches; the set has those that ever did."""
        known, matched = {each: re.compile(fnmatch.translate(each)).match for each in patterns}, set[str]()

        def is_excluded(key: bytes) -> bool:
            found = {each for each, match in known.items() if match(decode_key(key))}
            matched.update(found)
            return bool(found)

        self._db.create_function("excluded", 1, is_excluded, deterministic=True)
        return matched

    def take_over(self, path: Path) -> None:
        """Takes over what the catalog at `path` knows of archives, and headers that this one has not."""
        right = {"application_id": CATALOG_ID, "user_version": CATALOG_VERSION, "quick_check(1)": "ok"}
        try:
            with self._told(path):
                self._db.commit()
                self._db.execute("ATTACH ? AS last", [f"{path.absolute().as_uri()}?mode=ro&immutable=1"])
                for pragma, value in right.items():
                    [found] = self._db.execute(f"PRAGMA last.{pragma}").fetchone()
                    if found != value:
                        raise sqlite3.DatabaseError(f"its {pragma} is {found}, not {value}")
                self._db.execute("""
                    INSERT OR REPLACE INTO archives SELECT * FROM last.archives AS old WHERE NOT EXISTS (
                        SELECT 1 FROM main.archives AS new WHERE new.repository = old.repository
                        AND new.label = old.label AND new.as_of >= old.as_of
                    )
                """)
                self._db.execute("""
                    UPDATE objects SET facts = (
                        SELECT facts FROM last.objects AS old WHERE old.key = objects.key
                        AND old.size = objects.size AND old.modified = objects.modified
                        AND old.etag = objects.etag
                    ) WHERE facts IS NULL
                """)
        finally:
            with contextlib.suppress(CatalogError), self._told():
                self._db.commit()
                self._db.execute("DETACH last")

    def note_archive(self, identity: str, label: str, objects: int | None, at: float | None = None) -> None:
        """Notes of a label's newest archive how many objects it has, and as of when; None: as before."""
        sql = """
            INSERT INTO archives VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET
            objects = coalesce(excluded.objects, objects), as_of = coalesce(excluded.as_of, as_of)
        """
        self.execute(sql, [identity, label, objects, at])

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.interrupt()  # somebody who was stopped may have left a long query
        with self._told():
            self._db.commit()
            self._db.close()


def manifest_line(each: S3Object) -> str:
    """An object's line in an archive's manifest; what is not known is left out."""
    path = {} if each.is_shown else {"path": odd_path(each.key)}
    own = {"key": each.key, "size": each.size_bytes, "modified": each.last_modified.isoformat()}
    return json.dumps({**own, "etag": each.etag, **(each.facts or {}), **path}, separators=(",", ":"))


def parse_manifest_line(line: str) -> S3Object:
    """The object of a manifest's line. Raises ValueError where it is none."""
    try:
        facts = json.loads(line)
        key, size_bytes, modified, etag = (facts.pop(name) for name in ("key", "size", "modified", "etag"))
        is_shown = facts.pop("path", None) is None
        return S3Object(key, size_bytes, datetime.fromisoformat(modified), etag, is_shown, facts or None)
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
SHARD_NAME = f"{OWN_PREFIX}shard-"  # and the part that a repository is for
LEASE_MARGIN_SECONDS = 2  # HTTP's dates have whole seconds
NO_SUCH_ETAG = '"00000000000000000000000000000000"'
IF_ABSENT = {"If-None-Match": "*"}

# Looked up before any fork, after which a child must do as little as possible.
LIBC = ctypes.CDLL(None, use_errno=True)


def boot_seconds() -> float:
    """A clock that goes on while the machine sleeps, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class DeadMansSwitch:
    """Has the kernel kill this process, and with it its children, unless the moment is put off in time.

    A program that was frozen (docker pause, SIGSTOP, a laptop's lid) would write on before it looks at a
    clock. The kernel's SIGKILL comes while it is frozen.
    """

    def __init__(self) -> None:
        self._timer = ctypes.c_void_p()
        event = struct.pack("Pii48x", 0, signal.SIGKILL, 0)  # `struct sigevent` of <signal.h>; SIGEV_SIGNAL
        if LIBC.timer_create(time.CLOCK_BOOTTIME, event, ctypes.byref(self._timer)):
            words = f"timer_create(2) failed: {os.strerror(ctypes.get_errno())}"
            raise BackupError(words, "Let the container's seccomp profile allow it.")

    def arm(self, at_boot_seconds: float) -> None:
        """Puts the moment off; 0 disarms."""
        whole = int(at_boot_seconds)
        # `struct itimerspec` of <time.h>: no interval; seconds and nanoseconds
        spec = (ctypes.c_long * 4)(0, 0, whole, int((at_boot_seconds - whole) * 1e9))
        LIBC.timer_settime(self._timer, 1, spec, None)  # TIMER_ABSTIME of <time.h>


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its object says; one that nobody can read has no `run_id`."""

    run_id: str
    words: str
    ttl_seconds: int
    etag: str
    has_expired: bool  # by the server's clock, when we looked at it

    @classmethod
    def parse(cls, answer: Answer) -> Holder:
        run_id, ttl_seconds = "", DEFAULT_LEASE_SECONDS
        words = "unknown work on an unknown host, since an unknown time"
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            held = json.loads(answer.body)
            ttl_seconds = min(max(int(held["ttl_seconds"]), LEASE_SECONDS[0]), LEASE_SECONDS[-1])
            words = "{purpose} on {host}, since {since}".format(**held)
            run_id = str(held["run_id"])
        now, then = answer.time("Date"), answer.time("Last-Modified")
        age_seconds = (now - then).total_seconds() if now and then else 0.0
        has_expired = age_seconds > ttl_seconds + LEASE_MARGIN_SECONDS
        return cls(run_id, words, ttl_seconds, answer.headers.get("etag", ""), has_expired)

    def __str__(self) -> str:
        return self.words


def look_at_lease(client: S3Client) -> Holder | None:
    """Who holds the lease now; None where there is none. Raises S3Error."""
    answer = client.find(f"{client.store.key_prefix}{LEASE_NAME}")
    return Holder.parse(answer) if answer else None


class Lease:
    """The right to write to one repository, which is held, and renewed, while its `with` block lasts.

    When it cannot be renewed, the processes that write are stopped (SIGSTOP) before anybody else may take
    it, and go on when a renewal succeeds: then nobody took it. When somebody did, they are killed.

    A holder is waited for as long as LEASE_WAIT says, by default until it has renewed its lease, and so is
    alive, or until that has expired. Raises StillRunning, S3Error, Stopped.
    """

    def __init__(self, runtime: Runtime, client: S3Client, purpose: str, only_reads: bool = False) -> None:
        """Who `only_reads` waits for nobody, and harms nobody who goes on too late."""
        settings, console, ttl = runtime.settings, runtime.console, runtime.settings.lease_ttl_seconds
        self.enforced = True  # whether the server heeds conditions
        self.suspended = False
        self.lost = ""  # why, when it is lost
        self.expires = False  # it is not to be given back, but to expire
        patience = Patience(failing_seconds=CONNECT_PATIENCE_SECONDS) if only_reads else client.patience
        client = dataclasses.replace(client, patience=patience)
        # Connecting, the answer and another try (R2: 429 for a second) end before a suspended lease expires.
        hasty = Patience(max(1.0, ttl / 10), 0, ttl / 24)
        long = min(PROVEN_PATIENCE_SECONDS, settings.stall_seconds)
        patient = Patience(hasty.answer_seconds, long, long)
        self._hasty = dataclasses.replace(client, patience=hasty)
        self._writer = dataclasses.replace(client, patience=patient, trying=self._writing)
        self._client, self._name, self._ttl = client, client.store.name, ttl
        self._notice = functools.partial(console.debug if only_reads else console.warning, self._name)
        self._wait_seconds = 0 if only_reads else settings.lease_wait_seconds
        self._key = f"{client.store.key_prefix}{LEASE_NAME}"
        self._run_id = f"{runtime.run_id}-{secrets.token_hex(4)}"  # a run may try twice
        self._content = {"run_id": self._run_id, "host": socket.gethostname(), "purpose": purpose}
        self._etag, self._valid_until, self._trouble = "", 0.0, "no answer"
        self._members: list[Child] = []
        self._keeper, self._renewal = threading.Thread(target=self._keep, daemon=True), in_background(bool)
        self._lock, self._write_lock, self._over = threading.RLock(), threading.Lock(), threading.Event()
        self._switch = None if only_reads else DeadMansSwitch()

    def __enter__(self) -> Lease:
        trials = IF_ABSENT, {"If-Match": NO_SUCH_ETAG}  # both have to fail
        try:
            self._take()
            self._apply()
            self._keeper.start()  # the trials may take their time, too
            self.enforced = not any(self._write(self._client, condition) for condition in trials)
        except BaseException as error:
            if not (isinstance(error, S3Error) and refuses_conditions(error)):
                self.__exit__()
                raise
            self.enforced = False
        if not self.enforced:
            self.__exit__()
            self.suspended = False
            self._notice(
                "this S3 server does not enforce conditional writes (If-None-Match, If-Match), so that runs"
                " cannot exclude each other: see to it that only one works on the repository at a time"
            )
            with contextlib.suppress(S3Error):
                self._client.delete(self._key)
        return self

    def _take(self) -> None:
        """Takes the lease where it is free, ours already or expired; else waits for who holds it."""
        start, first, wait, refused = boot_seconds(), None, self._wait_seconds, 0
        while refused < 5:
            current = look_at_lease(self._client)
            is_ours = current and current.run_id == self._run_id  # by a try whose answer was lost
            if not current or is_ours or current.has_expired:
                self._content |= {"since": utc_now(self._client), "ttl_seconds": self._ttl}
                if self._write(self._client, {"If-Match": current.etag} if current else IF_ABSENT):
                    if current and not is_ours:
                        self._notice(f"an expired lease is taken over: {current}")
                    return
                refused += 1
                continue
            first = first or current
            limit = current.ttl_seconds + 10 * LEASE_MARGIN_SECONDS if wait is None else wait
            is_alive = wait is None and current.etag != first.etag
            if boot_seconds() - start >= limit or is_alive:
                words = f"{self._name}: another run works on this repository: {current}"
                raise StillRunning(words, "Let it finish, or wait for it with LEASE_WAIT.")
            if current is first:
                self._notice(f"the repository is in use: {current}; waiting to see whether that lives")
            self._client.stop.wait(min(2.0, current.ttl_seconds / 10))
        raise BackupError(f"{self._name}: {self._key} can neither be written nor read", TRY_AGAIN)

    def _write(self, client: S3Client, condition: Headers) -> bool:
        """Writes the object under a condition; False when that is not met.

        Only a write that was answered counts, from when that try was sent. One whose answer was lost keeps
        the next one from meeting its condition, and is then overwritten.
        """
        # No two writes are alike, as equal content would have equal ETags.
        body = json.dumps({**self._content, "write": time.monotonic_ns()}).encode()
        try:
            answer = client.put(self._key, body, condition)
        except S3Error as error:
            # 409: somebody else wrote at the same moment; 404: there is nothing to match.
            if error.status not in (409, 412) and error.code != "NoSuchKey":
                raise
            # Ceph's gateway means the ETag without the quotes that it gives it.
            bare = {name: value.strip('"') for name, value in condition.items()}
            return bare != condition and self._write(client, bare)
        self._etag = answer.headers.get("etag", "")
        self._valid_until = answer.sent + self._ttl
        return True

    @property
    def _is_fresh(self) -> bool:
        """Whether the next renewal may still fail once."""
        return boot_seconds() < self._valid_until - self._ttl / 4

    def _apply(self) -> None:
        """Has the processes that write, and the switch, do what the lease allows now."""
        with self._lock:  # the switch is off only while nobody can write
            is_off = self.lost or self.suspended or self._over.is_set()
            if self._switch and not is_off and self._is_fresh:
                self._switch.arm(self._valid_until)
            for member in self._members:
                if self.lost:
                    member.send(signal.SIGKILL)
                else:
                    member.hold(HELD_BY_LEASE, self.suspended)
            if self._switch and is_off:
                self._switch.arm(0)

    def add(self, member: Child) -> None:
        """Has `member` stopped and killed with the lease."""
        self._members.append(member)
        self._apply()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """In the middle of a write of ours the work is not suspended, and the switch not off."""
        with self._write_lock:
            self.check()
            if self.enforced and (self.suspended or not self._is_fresh):
                raise ConnectionError(f"the lease cannot be renewed: {self._trouble}")
            yield

    def write(self, request: Callable[..., object], *values: object) -> None:
        """`S3Client.put` or `delete`, when the work is not suspended. Raises S3Error, Stuck, Stopped."""
        try:
            request(self._writer, *values)
        except Stopped:
            self.expires = True  # what was not answered may take effect later
            raise

    def check(self) -> None:
        """Raises Stuck when the lease is lost."""
        if self.lost:
            raise Stuck(f"{self._name}: {self.lost}", "Nothing was written since; run it again.")

    def _keep(self) -> None:
        """The life of the thread that renews the lease, and suspends the work when that comes too late."""
        client, began = dataclasses.replace(self._hasty, stop=Stop(), is_direct=True), 0.0
        while not self._over.wait(POLL_SECONDS) and not self.lost:
            due = max(self._valid_until - self._ttl * 3 / 4, began + self._ttl / 20)
            if boot_seconds() > due and self._renewal.done():
                self._renewal.result()
                # It may be waiting for S3 when the lease runs out.
                began, self._renewal = boot_seconds(), in_background(functools.partial(self._renew, client))
            if self.suspended == self._is_fresh:
                with self._write_lock:
                    self.suspended = not self.suspended
                    self._apply()
                suspended = f"cannot be renewed: the work is suspended until it can: {self._trouble}"
                self._notice(f"the lease {suspended if self.suspended else 'is renewed: the work goes on'}")

    def _renew(self, client: S3Client) -> None:
        try:
            if not self._write(client, {"If-Match": self._etag}):
                current = look_at_lease(client)
                if current and current.run_id == self._run_id:
                    if not self._write(client, {"If-Match": current.etag}):
                        self._trouble = "the ETag that it gave is refused as If-Match"
                else:
                    who = current or "its object was deleted"
                    self.lost = f"the lease on the repository was lost ({who})"
            self._apply()
        except S3Error as error:
            self._trouble = str(error)

    def __exit__(self, *_: object) -> None:
        """Gives the lease back, if it is certainly ours; else, or if asked to, it expires."""
        self._over.set()
        if self._keeper.is_alive():
            self._keeper.join(CLEANUP_SECONDS)
        concurrent.futures.wait([self._renewal], timeout=0 if self.expires else CLEANUP_SECONDS)
        self._apply()
        certain = self._renewal.done() and boot_seconds() < self._valid_until - LEASE_MARGIN_SECONDS
        if self.enforced and certain and not (self.lost or self.expires):
            try:
                self._hasty.delete(self._key, {"If-Match": self._etag})
            except (S3Error, Stopped) as error:
                self._notice(f"the lease could not be given back, and expires by itself: {error}")


def refuses_conditions(error: S3Error) -> bool:
    """Whether a server says that it does not know conditional writes."""
    return error.status == 501 or error.code in ("NotImplemented", "InvalidArgument")


# ------------------------------------------------------------------------------------------------ Processes

Result = TypeVar("Result")

DEFECT = "this is a defect of the program, please report it"
MAX_NAMED = 100  # objects, warnings or errors of a kind; more are counted


@dataclass
class Findings:
    """Objects, warnings or errors: the first ones by name, with words about each; all by number."""

    named: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0

    def add(self, name: str, text: str) -> bool:
        """Returns whether it is among those that are named."""
        self.count += 1
        if self.count <= MAX_NAMED:
            self.named.append((name, text))
        return self.count <= MAX_NAMED

    @property
    def more(self) -> int:
        return self.count - len(self.named)


class Console:
    """Prints a line, or a JSON object, for each event, with the store that it is about; for all threads."""

    def __init__(self, debug: bool, as_json: bool = False, run_id: str = "") -> None:
        self.debug_is_shown, self.as_json = debug, as_json
        self.troubles = {"error": Findings(), "warning": Findings()}  # what was printed, and about whom
        self.secrets: Collection[str] = ()  # that no traceback may show
        self._run_id, self._lock, self._stream = run_id, threading.Lock(), sys.stdout
        self._terminal = sys.stdout.isatty() and not as_json
        self._progress_is_shown = False
        self._told_at: dict[str, float] = {}  # whose progress was told when

    def leave_standard_output(self) -> None:
        """From now on standard output is for what a program may read."""
        self._stream = sys.stderr
        self._terminal = sys.stderr.isatty() and not self.as_json

    def _print(self, level: str, name: str, text: str, event: str = "message", /, **numbers: Any) -> None:
        if level == "debug" and not self.debug_is_shown:
            return
        stream, label, now = self._stream, "", datetime.now(UTC)
        if level in self.troubles:
            self.troubles[level].add(name, " ".join(text.split()))
            stream, label = sys.stderr, f"{level}: "
        if self.as_json:
            when = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            entry = {"time": when, "level": level, "run_id": self._run_id, "event": event, "about": name}
            if name.startswith("target-"):
                entry["target"] = name.removeprefix("target-")
            # A key that is not UTF-8 has lone surrogates, at which some readers of JSON stumble.
            entry["message"] = text.encode("utf-8", "backslashreplace").decode()
            line = json.dumps({**entry, **numbers})
        else:
            clock = "" if self._terminal or not name else f"{now:%Y-%m-%dT%H:%M:%SZ} "
            line = f"{clock}{f'[{name}] ' if name else ''}{label}{printable(text)}"
        with self._lock, contextlib.suppress(OSError):  # a terminal that was closed must not end a backup
            if self._progress_is_shown:
                print("\r\033[K", end="", file=self._stream, flush=True)
                self._progress_is_shown = False
            print(line, file=stream, flush=True)

    debug = functools.partialmethod(_print, "debug")
    info = functools.partialmethod(_print, "info")
    warning = functools.partialmethod(_print, "warning")
    error = functools.partialmethod(_print, "error")

    def defect(self, name: str, error: BaseException) -> None:
        """An exception that nobody foresaw. Its words may be anybody's, and quote what is secret."""
        trace = redacted("".join(traceback.format_exception(error)), self.secrets)
        self.error(name, DEFECT, "defect", traceback=trace)
        if not self.as_json:
            print(trace, end="", file=sys.stderr)

    def plain(self, text: str) -> None:
        for line in text.splitlines():
            self.info("", line)

    def progress(self, name: str, text: str, /, **numbers: Any) -> None:
        """How far something is: a live line on a terminal, elsewhere a line every PROGRESS_SECONDS."""
        if self._terminal:
            with self._lock, contextlib.suppress(OSError):
                line = printable(f"[{name}] {text}")[: shutil.get_terminal_size().columns - 1]
                print(f"\r\033[K{line}", end="", file=self._stream, flush=True)
                self._progress_is_shown = True
            return
        now = time.monotonic()
        if now - self._told_at.setdefault(name, now) >= PROGRESS_SECONDS:
            self._told_at[name] = now
            self.info(name, text, "progress", **numbers)


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
        if self.signals:
            raise Stopped(self.signals[0])

    def wait(self, seconds: float) -> None:
        """Sleeps. Raises Stopped."""
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
    excluded: str = ""  # how much of the source, where EXCLUDE is set
    shard: Shard | None = None

    @property
    def labels(self) -> dict[str, str]:
        """What it is known by, together with its target."""
        return {"label": self.label} | ({"shard": self.shard.setting} if self.shard else {})


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


def waiting(
    *work: concurrent.futures.Future[Any],
    stop: Stop | None = None,
    grace_seconds: float = 0,
    pause_seconds: float = POLL_SECONDS,
) -> Iterator[float]:
    """How many seconds it has been, again and again until all is done. Raises Stopped, with this grace."""
    start = time.monotonic()
    while concurrent.futures.wait(work, timeout=pause_seconds).not_done:
        if stop and stop.requested and concurrent.futures.wait(work, timeout=grace_seconds).not_done:
            stop.check()
        yield time.monotonic() - start


def within(seconds: float, what: str, function: Callable[[], Result], stop: Stop | None = None) -> Result:
    """The result of `function`, which may block for ever. Raises Hung after `seconds`, and Stopped."""
    work = in_background(function)
    for waited in waiting(work, stop=stop):
        if waited > seconds:
            raise Hung(f"{what}: no answer within {seconds:.0f} s", TRY_AGAIN)
    return work.result()


def side_by_side(functions: Sequence[Callable[[], Result]], stop: Stop) -> list[Result | BackupError]:
    """The results of all functions, run at the same time; a BackupError is one, too. Raises Stopped."""
    work = [in_background(function) for function in functions]
    for _ in waiting(*work, stop=stop, grace_seconds=CLEANUP_SECONDS):
        pass
    stop.check()
    return [
        error if isinstance(error := future.exception(), BackupError) else future.result() for future in work
    ]


class Child:
    """A running child process in a session of its own, so that only we send it signals.

    Threads hand every line of its output to `on_output` or `on_error`. Or one has `consume` read its standard
    output: then the child has ended when that has, too, and finds its pipe closed where that ends early.

    One in the foreground has our own standard streams, and the terminal, as a shell's command would: Ctrl-C
    reaches it alone. Ctrl-Z it ignores, as nobody could have it go on.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        on_output: Callable[[str], None] | None = None,
        on_error: Callable[[str], None] | None = None,
        pass_fds: Sequence[int] = (),
        consume: Callable[[IO[bytes]], None] | None = None,
        is_foreground: bool = False,
    ) -> None:
        """Starts the process. Raises BackupError."""

        def prepare() -> None:
            # Without this a SIGKILL of ours would leave a borg behind that goes on writing. The kernel kills
            # it when the thread is gone that has started it.
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if is_foreground:
                signal.signal(signal.SIGTSTP, signal.SIG_IGN)
                signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # in the background it would be stopped here
                with contextlib.suppress(OSError):  # no terminal, or not that of our session
                    os.tcsetpgrp(0, os.getpid())

        self.is_foreground = is_foreground
        # Whether it is stuck when nothing moves for long: it may wait for a person, who can press Ctrl-C.
        self.is_watched = not (is_foreground and os.isatty(0))
        self._terminal = None  # its foreground process group and settings, as they were
        with contextlib.suppress(OSError, termios.error):
            self._terminal = (os.tcgetpgrp(0), termios.tcgetattr(0)) if is_foreground else None
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        own = {"process_group": 0} if is_foreground else {"start_new_session": True, **pipes}
        try:
            self._process = subprocess.Popen(argv, env=env, pass_fds=pass_fds, preexec_fn=prepare, **own)
        except OSError as error:
            words = f"cannot start {argv[0]}: {error.strerror}"
            raise BackupError(words, "The image brings it; see the README.") from None
        self.pid = self._process.pid
        self._holders, self._hold_lock = set[str](), threading.Lock()

        def read_lines(stream: IO[bytes], on_line: Callable[[str], None]) -> None:
            with stream:
                for line in stream:
                    on_line(line.decode("utf-8", "replace").rstrip("\n"))

        def read_output() -> None:
            with self._process.stdout as stream:
                consume(stream)

        lines = [(self._process.stdout, None if consume else on_output), (self._process.stderr, on_error)]
        # These are no futures: whoever fails in `on_line` has a defect, which must be told.
        self._readers = [
            threading.Thread(target=read_lines, args=pair, daemon=True) for pair in lines if pair[1]
        ]
        for reader in self._readers:
            reader.start()
        self.consumed = in_background(read_output) if consume else None
        self.ended = in_background(self._reap)  # its exit code, 128+N for signal N

    def _reap(self) -> int:
        code = self._process.wait()
        if self._terminal:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])  # of this thread; it would stop us all
            with contextlib.suppress(OSError, termios.error):
                os.tcsetpgrp(0, self._terminal[0])
                termios.tcsetattr(0, termios.TCSADRAIN, self._terminal[1])
        for reader in self._readers:
            reader.join(timeout=POLL_SECONDS * 5)  # a grandchild may hold the pipe open
        if self.consumed:
            concurrent.futures.wait([self.consumed])
        return code if code >= 0 else 128 - code

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None when it is not done after `seconds`."""
        return self.ended.result() if concurrent.futures.wait([self.ended], timeout=seconds).done else None

    def send(self, signum: int) -> None:
        """Sends a signal; nothing happens when the process has ended."""
        self._process.send_signal(signum)

    def hold(self, why: str, is_held: bool = True) -> None:
        """Stops it (SIGSTOP) while anybody holds it; when nobody does any more, it goes on (SIGCONT)."""
        with self._hold_lock:
            if is_held != self.is_held(why):
                (self._holders.add if is_held else self._holders.remove)(why)
                self.send(signal.SIGSTOP if self._holders else signal.SIGCONT)

    def is_held(self, why: str) -> bool:
        return why in self._holders

    def kill(self) -> None:
        """Ends the process. One that hangs in a system call ends later: when that mount is gone."""
        self.send(signal.SIGKILL)
        self.wait(KILL_SECONDS)


def run_to_end(child: Child, stop: Stop, check: Callable[[], None] = lambda: None) -> int:
    """The exit code of `child`. A stop signal, or what `check` raises, ends it in order; Stuck kills it."""
    try:
        for _ in waiting(child.ended, stop=stop):
            check()
    except BackupError as error:
        if not isinstance(error, Stuck):
            child.send(signal.SIGTERM)
            child.hold(HELD_BACK, False)  # or it would not hear it
            for waited in waiting(child.ended):
                if stop.hurried or waited > TERMINATE_SECONDS:
                    break
        child.kill()
        raise
    return child.ended.result()


def minimal_environment(environ: Mapping[str, str], names: Iterable[str], **own: str) -> dict[str, str]:
    """What any program needs, the variables in `names`, and `own`; no secrets."""
    kept = ("PATH", "HOME", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", *names)
    return {**{name: environ[name] for name in kept if name in environ}, "LC_ALL": "C.UTF-8", **own}


def proc_file(pid: int, name: str) -> str:
    """A file of /proc/PID of proc(5); empty when the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    return ""


def io_bytes(pid: int) -> int:
    """How much a process has read and written by system calls; 0 when it is gone."""
    numbers = re.findall(r"^[rw]char: ([0-9]+)$", proc_file(pid, "io"), re.MULTILINE)
    return sum(int(number) for number in numbers)


def cpu_seconds(pid: int) -> float:
    """How long a process has computed, by itself and in the kernel; 0 when it is gone."""
    ticks = proc_file(pid, "stat").rpartition(")")[2].split()[11:13]
    return sum(int(number) for number in ticks) / os.sysconf("SC_CLK_TCK")


class Stillness:
    """How long no meter has moved, whose numbers grow by 1 or more where there is progress."""

    def __init__(self, meters: Sequence[Callable[[], float]]) -> None:
        self._meters, self._moved_at = meters, time.monotonic()
        self._before = [meter() for meter in meters]

    def seconds(self, now: float) -> float:
        """To be asked again and again."""
        values = [meter() for meter in self._meters]
        if any(value >= before + 1 for value, before in zip(values, self._before, strict=True)):
            self._before, self._moved_at = values, now
        return now - self._moved_at


class StallClock:
    """Notices when nothing moves for `seconds`, neither what `meters` measure nor the mounts.

    It is `hasty` where each of our own questions to S3 was answered, and tigrisfs had nothing to complain
    about either: then something waits for what will never come. About `beside` see Mount.meter.
    """

    def __init__(
        self,
        seconds: float,
        mounts: Sequence[Mount],
        *meters: Callable[[], float],
        beside: Callable[[], float] | None = None,
        hasty: bool = True,
    ) -> None:
        self._seconds, self._mounts = seconds, mounts
        self._silence_seconds = max(SILENCE_SECONDS, seconds / 8) if hasty and mounts else math.inf
        self._still = Stillness([*meters, *(mount.meter(seconds, beside) for mount in mounts)])
        self._looked_at = self._asked_at = self._unsure_at = time.monotonic()

    def check(self, what: str) -> None:
        """Raises Hung, saying `what`, when nothing moves; S3Error when S3 refuses all we ask."""
        now = time.monotonic()
        if now - self._looked_at < min(1.0, self._seconds / 10):
            return
        self._looked_at = now
        still_seconds, half_seconds = self._still.seconds(now), self._silence_seconds / 2
        # For the second half of a silence S3 has to answer.
        if min([still_seconds, *(now - mount.log.complained_at for mount in self._mounts)]) < half_seconds:
            self._unsure_at = now
        elif now - self._asked_at >= half_seconds / 6:
            self._asked_at = now
            if not all(mount.answers() for mount in self._mounts):
                self._unsure_at = time.monotonic()
        if still_seconds > self._seconds:
            why = f"{self._seconds:.0f} s"
        elif now - self._unsure_at >= half_seconds:
            why = f"{self._silence_seconds:.0f} s, though S3 answers"
        else:
            return
        hint = "STALL_TIMEOUT says how long that may be; run it again."
        raise Hung(f"{what} (no progress for {why})", hint)


# --------------------------------------------------------------------------------------------------- Mounts

FUSE_HELP = (
    "Start the container with"
    " --device /dev/fuse:/dev/fuse --cap-add SYS_ADMIN --security-opt apparmor:unconfined."
)
UNMOUNT_HELP = "Unmount it first: backup.py umount {}"
TEMPORARY_PREFIX = "s3borgbackup-"  # of what is made in TMPDIR


def container_memory_mb(root: Path = Path("/")) -> int:
    """The memory that there is, in MB: the machine's, or less where our control group or one above says so.

    Of version 2 or 1: "Control Group v2", "Memory Resource Controller" of the kernel's documentation.
    """
    files = {"": "sys/fs/cgroup/{}/memory.max", "memory": "sys/fs/cgroup/memory/{}/memory.limit_in_bytes"}
    limits, groups = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")], root / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else ():
        _, controllers, group = line.split(":", 2)
        path = Path(group.lstrip("/"))
        for controller in files.keys() & controllers.split(","):
            for part in (path, *path.parents):
                with contextlib.suppress(OSError, ValueError):  # `max`, or not shown to us
                    limits.append(int((root / files[controller].format(part)).read_text(encoding="ascii")))
    return min(limits) // 1_000_000


class MemoryPlan:
    """What a run may use, by the memory that there is."""

    def __init__(self, settings: Settings, memory_mb: int) -> None:
        # MiB that tigrisfs may cache of the source. Where memory is short: what one target leaves.
        source_mb = max(SMALLEST_CACHE_MB, min(SOURCE_CACHE_MB, memory_mb // 4, memory_mb - LEAST_REST_MB))
        affordable = (memory_mb - source_mb - OWN_MB - FIXED_MB) // (SMALLEST_CACHE_MB + FIXED_MB + BORG_MB)
        # Targets that are backed up side by side: fewer than asked for where memory is short.
        self.targets_at_once = max(1, min(len(settings.targets), settings.parallel_targets, affordable))
        # Of each target; together at most half of the memory.
        target_mb = min(TARGET_CACHE_MB, memory_mb // (4 * max(2, self.targets_at_once)))
        self.source_cache_mb, self.target_cache_mb = source_mb, max(SMALLEST_CACHE_MB, target_mb)
        # How far ahead of borg the source is read. TigrisFS drops what was not used for the longest time: so
        # the cache needs room for that, for what borg has read meanwhile, and for requests under way. With
        # two fifths of it a large object was fetched 1.6 times.
        self.window_bytes = source_mb * 1024 * 1024 // 4
        # How much one thread reads ahead at a time, and TigrisFS with one request.
        piece = min(max(self.window_bytes // 8, SMALLEST_PIECE_BYTES), LARGEST_PIECE_BYTES)
        self.piece_bytes = piece // 4096 * 4096


def tigrisfs_command(
    store: Store,
    region: str,
    mount_point: Path,
    read_only: bool,
    plan: MemoryPlan,
    environ: Mapping[str, str],
    preloads: bool = True,
    listed_seconds: int = LONGEST_RUN_SECONDS,
) -> tuple[list[str], dict[str, str]]:
    """The command line that mounts `store`, and the environment, which alone has its keys.

    What it reads ahead must fit its cache. With the defaults (5 MB, 100 MB of a file that is read for long)
    and less than 300 MB reads fail with ENOMEM, which borg takes for an unreadable file. And requests reserve
    memory before they wait for more, one reader's 5.5 times --read-ahead-large: at the limit, while a file is
    written, as in `borg compact`, nothing moves any more.
    """
    cache_mb, ahead_kb, large_kb = plan.target_cache_mb, 1024, plan.target_cache_mb * 1024 // 16
    part_kb = large_kb // 2
    if store.target is None:
        cache_mb, ahead_kb = plan.source_cache_mb, plan.piece_bytes // 1024
        large_kb = part_kb = ahead_kb
    argv = [
        "tigrisfs",
        "-f",  # in the foreground: a daemon cannot be waited for, and what it still uploads is lost
        *("--log-format", "json", "--no-log-color", "--print-stats", "0s"),
        *("--endpoint", store.endpoint, "--region", region),
        "--no-detect",  # it asks for an absent object: who may use a prefix only is told 403 (AWS)
        "--no-expire-multipart",  # else it deletes other programs' multipart uploads
        "--disable-xattr",  # it would ask for each object's headers
        *("--memory-limit", str(cache_mb), "--read-ahead", str(ahead_kb)),
        *("--read-ahead-large", str(large_kb), "--read-ahead-parallel", str(part_kb)),
        *(() if preloads else ("--no-preload-dir",)),  # it lists what follows each name that it looks up
        *(("--subdomain",) if store.is_virtual else ()),
        *(("--storage-class", store.storage_class) if store.storage_class else ()),
        *(("--sse",) if store.sse else ()),
        *(("--sse-kms", store.sse[8:]) if store.sse and store.sse.startswith("aws:kms") else ()),
        *("--stat-cache-ttl", f"{listed_seconds}s"),  # nobody else writes
        *("--entry-limit", "20000"),  # of what was listed so long ago
        # 1+2+4+8+15+15+... s: after some five minutes of errors borg names the object.
        *("--read-retry-attempts", "24", "--read-retry-max-interval", "15s", "--retry-interval", "2s"),
        # For a whole request. A read that is cut off goes on where it was, a part of an upload begins anew:
        # at 1 Mbit/s two of 5 MiB side by side take 84 s. What hangs is repeated before it counts as stalled.
        *("--http-timeout", "90s" if read_only else "100s"),
        *("--max-parallel-parts", "2"),  # of a file; the default, 8, was no faster, each four times as slow
        *(("-o", "ro") if read_only else ()),
        store.location,
        str(mount_point),
    ]
    # Where memory is short, Go collects garbage at that size of its heap: 14 MB less were seen.
    own = {"GOMEMLIMIT": f"{cache_mb + 8}MiB"} if cache_mb == SMALLEST_CACHE_MB else {}
    own |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}  # nobody's configuration counts
    try:
        own |= store.platform.for_tigrisfs() if store.platform else environment_of(store.keys())
    except KeysFault as error:
        hint = S3_HINTS["NoKeys"].format(access_key_id=store.setting("access_key_id"))
        raise BackupError(f"{store.name}: {error}", hint) from None
    return argv, minimal_environment(environ, (), **own)


# borg tries a hard link when it saves its config, removes folders that are not empty, and takes a lock by
# renaming a folder onto the one that somebody else may hold. And the kernel awaits no more answers after an
# unmount, which does not wait for the release of the file that was closed last (fuse/dev.c: ENOENT).
HARMLESS = re.compile(
    r"\*fuseops\.((Rename|RmDir)Op error: directory not empty|CreateLinkOp error: function not implemented)"
    r"|writeMessage: no such file or directory \[16 0 0 0 0 0 0 0 .*\]"
)
# The SDK tells an S3 error as `CODE: MESSAGE\n\tstatus code: NUMBER, ...`.
REFUSED_WRITE = re.compile(r"(Failed to .*?): (\w+): (.*?)\n\tstatus code: (4\d\d),", re.DOTALL)
UNFINISHED = re.compile(r"Failed to finalize multi-part upload of object (.*?): \w+: ", re.DOTALL)
# 4xx answers that are right the next time; NoSuchUpload can mean that all is there, see Mount.check.
PASSING_CODES = (*RETRIED_CODES, "OperationAborted", "NoSuchUpload")
SHORT_READ = re.compile(r"Error reading \d+ \+\d+ of (.*) \(attempt \d+\): EOF", re.DOTALL)


class TigrisLog:
    """TigrisFS's log. Warnings and errors are shown under the mount's name, the rest when debugging."""

    def __init__(self, name: str, console: Console) -> None:
        self.complaints: deque[str] = deque(maxlen=5)
        self.complained_at = 0.0
        self.shrunk: set[str] = set()  # objects that ended before their listed size
        self.failed_uploads = 0
        self.unfinished: set[str] = set()  # keys whose CompleteMultipartUpload failed
        self.arrived: dict[str, Path] = {}  # those that are there all the same -> their files
        self.lost = ""  # why it has dropped what was written
        self.refusal: tuple[str, ...] = ()  # what S3 refuses again and again, code, words, status
        self._refused = Counter[str]()  # what failed -> how often while it has complained
        self._shown_at = deque([-math.inf] * COMPLAINTS_A_MINUTE, COMPLAINTS_A_MINUTE)  # the last ones
        self._name, self._console = name, console

    def feed(self, line: str) -> None:
        try:
            entry = json.loads(line)
            level, message = str(entry.get("level", "warn")), str(entry.get("message", "")).strip()
            if entry.get("error"):
                message = f"{message}: {entry['error']}"
        except (ValueError, AttributeError):
            level, message = "warn", line.strip()
        unfinished, refused = UNFINISHED.match(message), REFUSED_WRITE.match(message)
        is_settled = unfinished and unfinished[1] in self.arrived  # it repeats that as long as it lives
        if "AWS_ACCESS_KEY_ID" in message or not message or is_settled:
            return
        if level in ("trace", "debug", "info") or HARMLESS.fullmatch(message):
            self._console.debug(self._name, f"tigrisfs: {message}")
            return
        if unfinished:
            self.unfinished.add(unfinished[1])
        if match := SHORT_READ.fullmatch(message):
            self.shrunk.add(match[1])
        if not self.is_complaining:
            self._refused.clear()
        if refused and int(refused[4]) not in RETRIED_STATUSES and refused[2] not in PASSING_CODES:
            self._refused[refused[1]] += 1
            if self._refused[refused[1]] >= REFUSED_TIMES:
                self.refusal = refused.groups()
        self.complaints.append(message)
        if message.startswith("Conflict detected"):
            self.lost = "; ".join(list(self.complaints)[-2:])
        self.failed_uploads += message.startswith("Failed to flush")
        self.complained_at = time.monotonic()
        if self._shown_at[0] < self.complained_at - 60:
            self._shown_at.append(self.complained_at)
            self._console.warning(self._name, f"tigrisfs: {message}")

    @property
    def is_complaining(self) -> bool:
        return self.complained_at > 0 and time.monotonic() - self.complained_at < COMPLAINT_SECONDS

    @property
    def reason(self) -> str:
        return self.complaints[-1] if self.complaints else "tigrisfs said nothing about it"


def mount_table(source: Path = Path("/proc/self/mountinfo")) -> dict[str, str]:
    """Mount point -> file system type in this process's mount namespace, proc(5)."""
    text = source.read_bytes().decode("utf-8", "surrogateescape")
    unescape = functools.partial(re.sub, r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)))
    found = re.findall(r"^(?:[^ ]+ ){4}([^ ]+) .*? - ([^ ]+) ", text, re.MULTILINE)
    return {unescape(mount_point): kind for mount_point, kind in found}


@dataclass
class Mount:
    """A mounted store and the tigrisfs process behind it."""

    runtime: Runtime
    store: Store
    path: Path
    child: Child
    log: TigrisLog
    client: S3Client  # to ask S3 directly
    lease: Lease | None = None  # what allows writing to it
    asked_at: float = 0.0
    nudges: int = 0  # how often its flusher was woken
    usable: bool = False  # it was listed
    unlistable: Collection[str] = ()  # folders whose listing TigrisFS cannot read
    holds_nothing: bool = False  # that would have to be uploaded: tigrisfs may end at any moment

    def error(self, words: str, hint: str = TRY_AGAIN, kind: type[BackupError] = BackupError) -> BackupError:
        """`words` about it, and what tigrisfs has complained of last."""
        return kind(f"{self.store.name}: {words}: {self.log.reason}", hint)

    @property
    def is_mounted(self) -> bool:
        return str(self.path) in mount_table()

    @property
    def is_alive(self) -> bool:
        return self.child.wait(0) is None and self.is_mounted

    def check(self) -> None:
        """Raises Hung when it is gone, and its folder empty, or has dropped what borg takes for stored.

        And S3Error when S3 refuses that for good, or keys or bucket are gone: tigrisfs tries for ever then.
        """
        log, code = self.log, self.child.wait(0)
        if self.lease:
            self.lease.check()
        if log.lost:
            raise Hung(f"{self.store.name}: tigrisfs lost what was written: {log.lost}", TRY_AGAIN)
        if code is not None:
            raise self.error(f"tigrisfs ended with {code}", kind=Hung)
        if not self.is_mounted:
            raise self.error(f"the mount at {self.path} vanished", kind=Hung)
        if not log.is_complaining:
            return
        if log.refusal:
            what, code, words, status = log.refusal
            raise self.client._error(int(status), code, f"{words} (tigrisfs: {what})")
        if time.monotonic() - self.asked_at < ASK_SECONDS:
            return
        self.asked_at = time.monotonic()
        self.answers()
        # When the answer to CompleteMultipartUpload is lost, TigrisFS repeats it for ever, perhaps in vain.
        for key in log.unfinished - log.arrived.keys():
            path = self.path / key.removeprefix(self.store.key_prefix)
            with contextlib.suppress(OSError, BackupError):
                written = within(KILL_SECONDS, f"{self.store.name}: looking at {path}", path.stat).st_size
                if self.client.request("HEAD", key).headers.get("content-length") == str(written):
                    log.arrived[key] = path

    def answers(self) -> bool:
        """Whether S3 answers us, and we may write. Raises S3Error when keys or bucket are gone."""
        try:
            self.client.list_page(self.store.key_prefix, limit=1)
        except S3Error as error:
            if error.status in (401, 403, 404):
                raise
            return False
        return not (self.lease and self.lease.suspended)

    def meter(self, stall_seconds: float, beside: Callable[[], float] | None = None) -> Callable[[], float]:
        """A meter for StallClock: what tigrisfs has moved, in units of more than it does when idle.

        For each upload that failed as many bytes are taken off as its tries can have sent, but no more than
        were sent in half of the time: after an outage a slow line could not make up for it. For a borg whose
        own meter, `beside`, stands still, it counts only what others may have asked for before.
        """
        limit = SHARED_BYTES if beside else math.inf
        unit, window_seconds = IDLE_BYTES_PER_SECOND * stall_seconds, max(60.0, stall_seconds / 2)
        vain, failed, stood_at, start = 0.0, self.log.failed_uploads, None, 0.0
        worths: deque[tuple[float, float]] = deque()

        def moved() -> float:
            nonlocal vain, failed, stood_at, start
            now, sent = time.monotonic(), io_bytes(self.child.pid) - NUDGE_BYTES * self.nudges
            while worths and worths[0][0] < now - window_seconds:
                worths.popleft()
            if more := self.log.failed_uploads - failed:
                least = min((value for _, value in worths), default=math.inf)
                vain += min(RETRY_BYTES * more, max(0.0, sent - vain - least))
                failed += more
            worths.append((now, sent - vain))
            if beside and stood_at != (stands_at := beside()):
                stood_at, start = stands_at, sent - vain
            return min(sent - vain, start + limit) / unit

        return moved

    def keep_awake(self) -> None:
        """Wakes TigrisFS's flusher again and again, as long as it lives, by opening a file.

        An upload may end between an fsync's look and its wait (SyncFile in core/file.go): it sleeps on until
        something else happens. TigrisFS wakes itself two seconds after an upload (recordFlushError), but not
        after a rename that went well.
        """
        while self.child.wait(WAKE_SECONDS) is None:
            self.nudges += 1
            with contextlib.suppress(OSError):
                os.close(os.open(self.path / "config", os.O_RDONLY))

    def wait_until_usable(self) -> None:
        """Returns when it is there and was listed. Raises BackupError, after MOUNT_SECONDS at the latest."""
        if self.usable:  # another target's borg may have hung on it since
            self.check()

        def look() -> None:
            while not self.is_mounted:
                if (code := self.child.wait(0.02)) is not None:
                    words = "; ".join(self.log.complaints)
                    is_forbidden = re.search(r"(?i)fuse|permission denied|not permitted", words)
                    words = f"{self.store.name}: cannot be mounted, tigrisfs ended with {code}: {words}"
                    raise BackupError(words, FUSE_HELP if is_forbidden else TRY_AGAIN)
            with os.scandir(self.path) as entries:  # this asks tigrisfs, too, which the next line may not
                if "" not in self.unlistable:
                    next(entries, None)

        what = f"{self.store.name}: mounting it at {self.path}"
        try:
            within(MOUNT_SECONDS, what, look, self.runtime.stop)
        except OSError as error:
            raise self.error(f"cannot be listed: {error.strerror}") from None
        is_new, self.usable = not self.usable, True
        if is_new and self.store.target and not self.holds_nothing:
            # TigrisFS deadlocks when a folder is renamed onto one that it has not listed, as borg does with
            # a stale lock. Listings stay cached.
            self.files(self.path)

    def files(self, folder: Path) -> dict[str, tuple[int, float]]:
        """The files below a folder of a repository: path below it -> size in bytes, time of writing."""
        found: dict[str, tuple[int, float]] = {}
        what = f"{self.store.name}: listing"

        def fail(error: OSError) -> None:
            if error.errno != errno.ENOENT:  # it was removed meanwhile
                raise BackupError(f"{what} {error.filename}: {error.strerror}", TRY_AGAIN)

        def walk() -> None:
            for name, _, files in os.walk(folder, onerror=fail):
                for path in (Path(name, file) for file in files):
                    with contextlib.suppress(FileNotFoundError):  # somebody still works in it
                        status = path.stat()
                        found[str(path.relative_to(folder))] = status.st_size, status.st_mtime

        work = in_background(walk)
        stall = StallClock(self.runtime.settings.stall_seconds, [self], lambda: len(found))
        for _ in waiting(work):
            self.runtime.stop.check()
            self.check()
            stall.check(f"{what} the repository does not end")
        work.result()
        self.check()
        return found

    def cut_off(self) -> None:
        """Kills it. What it has sent may take effect later, so that its lease must not end at once."""
        self.child.kill()
        if self.lease:
            self.lease.expires = True

    def __enter__(self) -> Mount:
        if self.lease:
            self.lease.add(self.child)
        if not self.holds_nothing:
            in_background(self.keep_awake)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Returns when it is unmounted and all is uploaded; else it is killed."""
        kill = isinstance(error, Stuck) or not self.usable
        try:
            if kill:
                self.cut_off()
            elif self.holds_nothing:
                # Else it would sleep for a second before it ends, and who still reads would keep it.
                self.child.kill()
            if self.is_mounted and (reason := detach(self.runtime, self.path, lazy=True)):
                raise BackupError(f"{self.store.name}: cannot unmount {self.path}: {reason}", TRY_AGAIN)
            if not kill and not self.holds_nothing:
                self._wait_for_upload()
            if not kill and self.lease:
                self.lease.check()
        except Exception as second:
            self.cut_off()  # it must not write on when the lease is given back
            if not error:
                raise
            self.runtime.console.warning(self.store.name, str(second))

    def _wait_for_upload(self) -> None:
        """Returns when tigrisfs has ended, which it does when all is uploaded."""
        runtime, stop = self.runtime, self.runtime.stop
        stall = StallClock(runtime.settings.stall_seconds, [self])
        still = Stillness([self.meter(FLUSH_SECONDS)])
        for waited in waiting(self.child.ended):
            runtime.console.progress(self.store.name, f"uploading what is left ({waited:.0f} s)")
            stall.check(f"{self.store.name}: the upload does not end: {self.log.reason}")
            is_still = still.seconds(time.monotonic()) > FLUSH_SECONDS
            is_vain = is_still or self.log.is_complaining or (self.lease and self.lease.suspended)
            if waited > FLUSH_SECONDS and (stop.hurried or (stop.requested and is_vain)):
                hint = "What borg wrote last is not in the bucket; the archives of earlier runs are."
                raise self.error(f"the upload did not end within {waited:.0f} s", hint)
        if code := self.child.ended.result():
            raise self.error(f"tigrisfs ended with {code}")


def mounted(
    runtime: Runtime,
    store: Store,
    region: str,
    read_only: bool,
    lease: Lease | None = None,
    unlistable: Collection[str] = (),
    path: Path | None = None,
    listed_seconds: int = LONGEST_RUN_SECONDS,
) -> Mount:
    """`store` being mounted at its mount point, or at `path`; usable when `wait_until_usable` returns.

    It is a context manager: on leaving it is unmounted and all is uploaded, or BackupError raised. Where
    Stuck is raised inside, or it was not usable, it is killed.
    """
    path = prepare_mount_point(runtime, store, path or runtime.settings.mount_point(store))
    log, plan = TigrisLog(store.name, runtime.console), MemoryPlan(runtime.settings, runtime.memory_mb)
    given = not unlistable, listed_seconds
    command = tigrisfs_command(store, region, path, read_only, plan, runtime.environ, *given)
    child = Child(*command, log.feed, log.feed)
    client = S3Client(store, region, BRIEF, runtime.stop)
    return Mount(
        runtime, store, path, child, log, client, lease, unlistable=unlistable, holds_nothing=read_only
    )


def prepare_mount_point(runtime: Runtime, store: Store, path: Path) -> Path:
    """An empty folder to mount on. Dead mounts there, and temporary ones, are removed."""
    if not os.path.exists("/dev/fuse"):
        raise BackupError(f"{store.name}: cannot be mounted: /dev/fuse is missing", FUSE_HELP)
    if runtime.memory_mb < MEMORY_MB[0]:
        raise BackupError(
            f"{store.name}: cannot be mounted safely: there are only {runtime.memory_mb} MB of memory",
            f"Give the container {MEMORY_MB[0]} MB or more (docker run --memory).",
        )
    temporary = re.escape(str(Path(tempfile.gettempdir()).resolve() / TEMPORARY_PREFIX))
    for left in map(Path, mount_table()):
        if re.fullmatch(rf"{temporary}\w{{8}}/[^/]+", str(left)) and remove_dead_mount(runtime, left):
            shutil.rmtree(left.parent, ignore_errors=True)
    try:
        path = path.parent.resolve() / path.name  # a dead mount itself cannot be looked at
        if str(path) in mount_table() and not remove_dead_mount(runtime, path):
            hint = UNMOUNT_HELP.format(shlex.quote(store.name))
            raise BackupError(f"{store.name}: is mounted at {path} already", hint)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackupError(
            f"{store.name}: cannot use {path} as mount point: {error.strerror}",
            "Make its folder writable, or set DATA_DIR to one that is.",
        ) from None
    return path


def remove_dead_mount(runtime: Runtime, path: Path) -> bool:
    """Whether a mount was dead, and is detached now. One that does not answer somebody serves, slowly."""
    name = path.name
    try:
        # To be opened: the kernel answers a mere stat from its cache, even when tigrisfs is dead.
        within(KILL_SECONDS, f"{name}: opening {path}", lambda: os.scandir(path).close(), runtime.stop)
    except (OSError, Hung) as error:
        # What the kernel says when its process is gone; a request that was under way then gets the second.
        # All else is somebody's mount that S3 refuses or fails.
        if getattr(error, "errno", 0) in (errno.ENOTCONN, errno.ECONNABORTED):
            runtime.console.warning(name, f"a dead mount at {path} is removed")
            detach(runtime, path, lazy=True)
            return True
    return False


@contextlib.contextmanager
def folder_for_mounts() -> Iterator[Path]:
    """A temporary folder, which stays while something is mounted in it."""
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX)).resolve()
    try:
        yield folder
    finally:  # to remove it with a mount would empty a bucket
        if not any(Path(mount_point).is_relative_to(folder) for mount_point in mount_table()):
            shutil.rmtree(folder, ignore_errors=True)


def detach(runtime: Runtime, path: Path, lazy: bool) -> str:
    """Detaches a mount; returns why it could not, or nothing."""

    def unmount() -> str:  # as root fusermount3 needs more of umount(8) than Alpine's has
        if not LIBC.umount2(os.fsencode(path), MNT_DETACH if lazy else 0):
            return ""
        if (number := ctypes.get_errno()) != errno.EPERM:
            return os.strerror(number)
        argv, lines = ["fusermount3", "-uz" if lazy else "-u", "--", str(path)], []
        child = Child(argv, minimal_environment(runtime.environ, ()), lines.append, lines.append)
        code = child.ended.result()
        return " ".join(lines) or f"fusermount3 ended with {code}" if code else ""

    try:
        return within(MOUNT_SECONDS, f"unmounting {path}", unmount)
    except BackupError as error:
        return error.message


# ----------------------------------------------------------------------------------------------- Read-ahead
# borg reads one object after the other, and waits for S3 at each. So threads read what it is going to read
# through the same mount, piece by piece, and TigrisFS keeps that until borg comes. There is room for so much:
# a piece gives its room back when the slowest borg has passed it, and no borg is told of an object before its
# first piece has found room.


@dataclass(eq=False, slots=True)
class Upcoming:
    path: str
    size: int  # in bytes, as all that follows; 0: nobody reads it
    fetch: Callable[[], object] | None = None  # reads it past the mount


@dataclass(eq=False, slots=True)
class Piece:
    item: Upcoming
    offset: int
    end: tuple[int, int]  # the Reader.at of who has read it
    room: int
    kept: object = None  # what was fetched, until it is passed


@dataclass(eq=False)
class Reader:
    """One borg on its way through the objects."""

    since: float = -math.inf  # what was last modified before that (Unix), it knows and does not read
    child: Child | None = None  # None: it has not begun yet
    began: float = 0.0
    at: tuple[int, int] = (0, 0)  # how many objects are behind it, and how far it is in the next one
    is_ahead: bool = False  # and is told of nothing more, for the sake of others
    waited_seconds: float = 0.0  # for others

    def knows(self, each: S3Object) -> bool:
        return each.is_shown and each.last_modified.timestamp() < self.since

    @property
    def is_running(self) -> bool:
        return bool(self.child and not self.child.ended.done())

    @property
    def waits(self) -> bool:
        return self.is_ahead or bool(self.child and self.child.is_held(HELD_BACK))


def file_position(pid: int, path: str) -> int:
    """How far a process is in a file that it has open, /proc/PID/fdinfo of proc(5); 0 when it is not open."""
    with contextlib.suppress(OSError, ValueError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{number}") == path:
                return int(proc_file(pid, f"fdinfo/{number}").partition("\n")[0].removeprefix("pos:"))
    return 0


NOWHERE = bytearray(READ_BYTES)  # what all threads read into: nobody looks at it


class ReadAhead:
    """Reads objects before borgs do, and keeps these close enough together to share that.

    What it cannot read, borg will report. A borg that is ahead of another waits; but not when that one does
    not move, and not for longer than it has worked itself. Then the slower one is left to read by itself.
    """

    def __init__(self, runtime: Runtime, items: Iterable[Upcoming], readers: Sequence[Reader]) -> None:
        settings, plan = runtime.settings, MemoryPlan(runtime.settings, runtime.memory_mb)
        self.moved = 0  # grows with all that is done for borg
        self.is_over = False
        self._window = self._room = plan.window_bytes
        self._piece_bytes, threads = plan.piece_bytes, settings.read_ahead_threads
        self._is_automatic, self._threads = threads is None, LEAST_THREADS if threads is None else threads
        self._measured, self._quickest_seconds = 0, math.inf  # reads
        self._patience_seconds = min(HOLD_SECONDS, settings.stall_seconds / 3)
        self._slowest, self._moved_at = (0, 0), time.monotonic()
        self._items, self._readers = items, list(readers)
        self._changed = threading.Condition()
        self._ahead: deque[Piece] = deque()  # that have room
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()  # of these, what is to be read
        self._taken = 0  # objects that borgs may be told of
        self._walked = in_background(self._walk)
        self._walked.add_done_callback(self._fail)
        for work in (self._watch, *[self._read] * self._threads):
            threading.Thread(target=work, daemon=True).start()

    def began(self, reader: Reader, since: float, child: Child) -> None:
        with self._changed:
            reader.since, reader.child = since, child
            reader.began = self._moved_at = time.monotonic()
            self._changed.notify_all()

    def wait_until_near(self, reader: Reader, number: int) -> None:
        self.wait_until(reader, lambda: number <= self._taken, number)

    def wait_until(self, reader: Reader, is_so: Callable[[], bool], number: int = 0) -> None:
        # Who is not done yet with all that comes before that `number` does not wait for others.
        with self._changed:
            while reader in self._readers and not (self.is_over or is_so()):
                reader.is_ahead = self._passed[0] < reader.at[0] >= number - 1
                self._changed.wait(POLL_SECONDS)
            reader.is_ahead = False

    def wait_until_passed(self, number: int) -> bool:
        # False at the end.
        with self._changed:
            while not self.is_over and number > self._passed[0]:
                self._changed.wait()
            return not self.is_over

    @property
    def _passed(self) -> tuple[float, int]:
        return min((reader.at for reader in self._readers), default=(math.inf, 0))

    def is_left(self, reader: Reader) -> bool:
        return reader not in self._readers

    def done(self, reader: Reader, number: int, offset: int = 0) -> None:
        with self._changed:
            reader.at = max(reader.at, (number, offset))
            self._slide()

    def left(self, reader: Reader) -> None:
        # At its end, or because it goes on by itself.
        with self._changed:
            self._readers = [each for each in self._readers if each is not reader]
            if reader.child:
                reader.child.hold(HELD_BACK, False)
            self._slide()

    def close(self) -> None:
        # Nobody waits for the threads: one may be in a read that takes long.
        with self._changed:
            self.is_over = True
            for reader in self._readers:
                self.left(reader)
            self._changed.notify_all()
            for _ in range(self._threads):
                self._pieces.put(None)

    def _slide(self) -> None:
        passed = self._passed
        if passed != self._slowest:
            self._slowest, self._moved_at = passed, time.monotonic()
        while self._ahead and self._ahead[0].end <= passed:
            self._room += self._ahead[0].room
            self._ahead.popleft().kept = None
        self._changed.notify_all()

    def _walk(self) -> None:
        with self._changed:
            while not (self.is_over or all(reader.began for reader in self._readers)):
                self._changed.wait()
        for number, item in enumerate(self._items, 1):
            if self.is_over:
                return
            self._take(number, item)

    def _fail(self, work: Future[None]) -> None:
        if work.exception():  # nobody waits for what does not come
            self.close()

    def _take(self, number: int, item: Upcoming) -> None:
        step = item.size if item.fetch else self._piece_bytes
        with self._changed:
            for offset in range(0, item.size if self._threads else 0, step):
                size_bytes = min(step, item.size - offset)
                # A small one counts for more, which bounds how many are ahead.
                room = min(max(size_bytes, SMALLEST_PLACE_BYTES), self._window)
                while not self.is_over and self._room < room:
                    self._changed.wait()
                self._room -= room
                self._ahead.append(Piece(item, offset, (number - 1, offset + size_bytes), room))
                self._pieces.put(self._ahead[-1])
                self._tell_of(number)
            self._tell_of(number)

    def _tell_of(self, number: int) -> None:
        if number > self._taken:  # else those who wait for it were woken
            self._taken = number
            self._changed.notify_all()

    def _read(self) -> None:
        while piece := self._pieces.get():
            start, (item, offset, (_, end)) = time.monotonic(), (piece.item, piece.offset, piece.end)
            if self.is_over or piece.end <= self._passed:
                continue
            with contextlib.suppress(OSError):
                if item.fetch:
                    piece.kept = item.fetch()
                else:
                    fd = os.open(item.path, os.O_RDONLY)
                    try:
                        while got := os.preadv(fd, [memoryview(NOWHERE)[: end - offset]], offset):
                            offset += got
                    finally:
                        os.close(fd)
                    self.measure(start)
            self.moved += 1

    def measure(self, start: float) -> None:
        self._quickest_seconds = min(self._quickest_seconds, time.monotonic() - start)
        self._measured += 1

    def _watch(self) -> None:
        while not self.is_over:
            before = time.monotonic()
            time.sleep(WATCH_SECONDS)
            with self._changed:
                for reader in self._readers:
                    self._look(reader)
                    if reader.waits:
                        reader.waited_seconds += time.monotonic() - before
                self._slide()
                self._leave_behind()
                if self._is_automatic and self._measured > MEASURED_READS and not self.is_over:
                    self._add_threads()

    def _add_threads(self) -> None:
        # As many as are busy at READS_PER_SECOND, if the quickest read shows how far away S3 is.
        while self._threads < min(READS_PER_SECOND * self._quickest_seconds, MOST_THREADS):
            self._threads += 1
            threading.Thread(target=self._read, daemon=True).start()
        self._is_automatic = False

    def _look(self, reader: Reader) -> None:
        # borg is told of objects, not of pieces: who is far ahead within a large one is stopped.
        (done, offset), child, lead = reader.at, reader.child, 0
        item = next((piece.item for piece in self._ahead if piece.end[0] == done), None)
        if child and item and item.size > self._piece_bytes:
            reader.at = done, max(offset, min(file_position(child.pid, item.path), item.size - 1))
            lead = sum(piece.room for piece in self._ahead if piece.end <= reader.at)
        if child and lead >= self._window * 3 // 4:
            child.hold(HELD_BACK)
        elif child and lead < self._window // 2:
            child.hold(HELD_BACK, False)

    def _leave_behind(self) -> None:
        # Who does not begin, and the slowest where that stands still, or others have waited for too long.
        now, (passed, _) = time.monotonic(), self._passed
        began = max((reader.began for reader in self._readers), default=0.0)
        is_stuck = now - self._moved_at > self._patience_seconds
        is_slow = any(
            is_stuck or reader.waited_seconds > max(self._patience_seconds, (now - reader.began) / 2)
            for reader in self._readers
            if reader.waits
        )
        for reader in self._readers:
            is_late = began and not reader.began and now - began > JOIN_SECONDS
            if is_late or (is_slow and reader.at[0] == passed and not reader.waits):
                self.left(reader)


# ----------------------------------------------------------------------------------------------------- Borg


class Verdict(enum.Enum):
    OK = "ok"
    WARNING = "warnings"
    FAILURE = "failed"
    BUSY = "busy"  # another run works on the repository


EXIT_CODES = {Verdict.FAILURE: EXIT_FAILURE, Verdict.BUSY: EXIT_BUSY, Verdict.WARNING: EXIT_WARNINGS}
EXIT_CODES |= {Verdict.OK: EXIT_OK}  # the worst comes first


def verdict(code: int) -> Verdict:
    """What borg's exit code means with BORG_EXIT_CODES=modern ("Return codes" in its documentation)."""
    if code == 0:
        return Verdict.OK
    return Verdict.WARNING if code == 1 or 100 <= code <= 127 else Verdict.FAILURE


def archive_pattern(label: str) -> str:
    """borg's pattern for the archives of `label` and of no other label."""
    return f"{label}-[0-9][0-9][0-9][0-9]-*"


def borg_time(text: str) -> datetime:
    """A time as `borg list` prints it when we run it: in UTC, without saying so."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def borg_create(target: Target, label: str, repository: Path, comment: str) -> list[str]:
    # LastModified is ctime, too, and inode numbers change with every mount. S3 has neither ACLs nor flags;
    # extended attributes cost a request for each object.
    options = ["--files-cache", "ctime,size", "--noxattrs", "--noacls", "--noflags", "--paths-from-stdin"]
    options += ["--compression", target.compression, "--comment", comment]
    return ["create", "--json", *options, f"{repository}::{label}-{{now:%Y-%m-%dT%H:%M:%S}}"]


def borg_prune(target: Target, label: str, repository: Path) -> list[str]:
    return ["prune", "--list", "--glob-archives", archive_pattern(label), *target.prune, str(repository)]


def borg_compact(target: Target, repository: Path) -> list[str]:
    return ["compact", "--verbose", "--progress", "--threshold", str(target.compact_percent), str(repository)]


def drain(stream: IO[bytes]) -> None:
    """Reads the rest: borg pads its tar file behind the end, and must not find the pipe closed."""
    while stream.read(READ_BYTES):
        pass


BREAK_LOCK_HELP = (
    "If nobody works on it any more: backup.py mount target-{name} && borg break-lock {path};"
    " backup.py umount target-{name}"
)
DAMAGE_HELP = (
    "Look for what changed objects of the bucket (a lifecycle rule, somebody's deletion), copy it before you"
    " try `backup.py borg {name} check --repair`, and then let `backup.py check {name}` look at all of it."
)
REPLACED_HELP = (
    "The repository was replaced, by another one or an older state; if that was you, remove /cache and"
    " /config/borg/security. If another target is a copy of it, let one of them begin in an empty place."
)
# What to do about borg's own errors, by its message ids; {name} and {path} are filled in.
BORG_HINTS = {
    "PassphraseWrong": 'Correct TARGET_SECRETS "{name}"."borg_passphrase".',
    "LockTimeout": BREAK_LOCK_HELP,
    "LockErrorT": BREAK_LOCK_HELP,
    "Repository.InvalidRepositoryConfig": 'Point TARGETS "{name}"."path" at an empty place or a repository.',
    "Cache.EncryptionMethodMismatch": REPLACED_HELP,
    "Cache.RepositoryReplay": REPLACED_HELP,
    "Cache.CacheInitAbortedError": "Another repository lies there, and it is not encrypted; if that is yours,"
    ' set TARGETS "{name}"."encryption" to none.',
    "IntegrityError": DAMAGE_HELP,
    "KeyfileNotFoundError": "The key is kept in /config: mount the volume that the repository was made with.",
    "RepoKeyNotFoundError": "Import your exported key: backup.py borg {name} key import :: FILE",
    "UnencryptedRepo": "Without encryption there is no key, and none to lose.",
    "NoManifestError": "The repository is damaged: backup.py borg {name} check",
}
# What borg says that a person needs to read in other words.
EXPECTED_NOTES = {
    "hardlinks not supported": "S3 has no hard links, as borg notes when it saves its config: harmless",
    "KEY AND PASSPHRASE": "keep the passphrase and a copy of the key (`backup.py key-export`) safe",
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class BorgLog:
    """What one command of borg says; its JSON log lines are shown as they come."""

    name: str
    console: Console
    stop: Stop
    on_fed: Callable[[Mapping[str, Any]], None] | None = None
    errors: Findings = field(default_factory=Findings)  # by message id
    warnings: Findings = field(default_factory=Findings)
    infos: list[str] = field(default_factory=list)
    output: str = ""
    verdict: Verdict = Verdict.FAILURE

    def feed(self, line: str) -> None:
        try:
            entry = json.loads(line)
            kind = entry["type"]
        except (ValueError, KeyError, TypeError):
            entry, kind = {"message": line}, "log_message"
        if kind in ("fed_done", "fed_status") and self.on_fed:
            self.on_fed(entry)
        elif kind in ("progress_message", "progress_percent") and entry.get("message"):
            self.console.progress(self.name, entry["message"])
        elif kind == "log_message" and (text := entry.get("message", "").strip()):
            self._take(entry.get("levelname", "ERROR"), entry.get("msgid", ""), text)

    def _take(self, level: str, msgid: str, text: str) -> None:
        found, show = None, self.console.debug
        for words, explanation in EXPECTED_NOTES.items():
            if words in text:
                self.console.info(self.name, explanation)
                return
        if level in ("ERROR", "CRITICAL"):
            found = self.errors
            # What it says when it is stopped is no error; a traceback says less than the failure's own line.
            if not self.stop.requested and not text.startswith(("Traceback", "Local Exception")):
                show = self.console.error
        elif level != "WARNING":
            self.infos.append(text)
        elif not (self.on_fed and re.fullmatch(r"Backup\w*Error", msgid)):  # those our own client tries
            found, show = self.warnings, self.console.warning
        if found is None or found.add(msgid, text):  # there may be one for each piece of data that is lost
            show(self.name, f"borg: {text}")

    def reason(self, code: int) -> str:
        """Why a command failed, in one line: the exception's where borg printed a traceback."""
        text = "\n".join(message for _, message in self.errors.named)
        exceptions = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", text, re.MULTILINE)
        first = text.partition("\n")[0].rstrip(".")
        return exceptions[-1] if exceptions else first or f"it ended with {code}"


BORG_FOLDERS = re.compile(r"XDG_(CONFIG|CACHE)_HOME|BORG_\w+_DIR")
# A person may tell borg how to behave (BORG_EXIT_CODES, BORG_NEW_PASSPHRASE, the answers to its questions).
HANDED_OVER = re.compile(r"TERM|COLUMNS|LINES|BORG_(?!PASSPHRASE$|PASSCOMMAND$).*", re.DOTALL)


@dataclass
class Borg:
    """Runs borg on one target's repository."""

    runtime: Runtime
    target: Target
    repository: Path  # its folder
    mounts: Sequence[Mount] = ()  # that borg works on, first of all the repository's
    folders: Mapping[str, str] = field(default_factory=dict)  # variables: where it keeps what it knows

    def run(
        self,
        arguments: Sequence[str],
        fed: Fed | None = None,
        consume: Callable[[IO[bytes]], None] | None = None,
        own: Mapping[str, str] | None = None,
        waits: Callable[[], float] = lambda: 0,
    ) -> BorgLog:
        """Runs one command to its end; `fed` tells it what to archive, `consume` reads its output.

        `own` variables are for borg; `waits` grows while whoever reads from it has reason to be slow. Raises
        BackupError when it fails (not where an archive lacks what could not be read), Hung when its mounts
        are gone or nothing moves, Stopped on a stop signal, and what `consume` raises.
        """
        console, stop, name = self.runtime.console, self.runtime.stop, self.target.store.name
        command, *rest = arguments
        lock = ["--lock-wait", str(LOCK_WAIT_SECONDS)]
        if command == "list" and self.mounts[0].lease and self.mounts[0].lease.enforced:
            lock = ["--bypass-lock"]  # the lease keeps all others away
        argv = ["borg", *command.split(), "--log-json", *lock, *rest]
        log, output = BorgLog(name, console, stop, fed.take if fed else None), []
        console.debug(name, shlex.join(argv))
        stop.check()
        with self._environment({"BORG_EXIT_CODES": "modern", **(own or {})}) as (env, fd):
            if command == "list":  # see `borg_time`; archive names and `prune` go by the user's zone
                env["TZ"] = "UTC"
            env |= fed.environment if fed else {}
            fds = (fd, fed.read_end) if fed else (fd,)
            child = Child(argv, env, output.append, log.feed, fds, consume=consume)
            if fed:
                fed.started(child)
            code = self._run_to_end(command, child, fed.moved if fed else waits)
        for found, show in ((log.errors, console.error), (log.warnings, console.warning)):
            if found.more:
                show(name, f"borg: {found.more:,} more like these")
        if child.consumed:
            child.consumed.result()
        log.verdict, log.output = verdict(code), "\n".join(output)
        if log.verdict is Verdict.FAILURE:
            raise self._failure(command, code, log)
        return log

    def hand_over(self, arguments: Sequence[str]) -> int:
        """Runs what a person typed, with our standard streams and terminal; returns borg's exit code.

        Raises Stuck when its mounts are gone, or nothing moves and no terminal is there, and Stopped.
        """
        environ = self.runtime.environ
        own = {name: value for name, value in environ.items() if HANDED_OVER.fullmatch(name)}
        self.runtime.stop.check()
        with self._environment({**own, "BORG_REPO": str(self.repository)}) as (env, fd):
            child = Child(["borg", *arguments], env, pass_fds=(fd,), is_foreground=True)
            return self._run_to_end(arguments[0] if arguments else "", child)

    @contextlib.contextmanager
    def _environment(self, own: Mapping[str, str]) -> Iterator[tuple[dict[str, str], int]]:
        with (
            passphrase_file(self.target.passphrase) as fd,
            tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as additions,
        ):
            Path(additions, "sitecustomize.py").write_text(BORG_ADDITIONS, encoding="ascii")
            self._arrived = Path(additions, "arrived")
            self._arrived.touch()
            ours = {
                "BORG_HOST_ID": f"{OWN_HOST}{self.runtime.run_id}",  # host names and PIDs repeat
                "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",  # the mount point is our choice
                "BORG_DISPLAY_PASSPHRASE": "no",
                "BORG_PASSPHRASE_FD": str(fd),
                "PYTHONPATH": additions,
                "S3BORGBACKUP_MOUNT": str(self.mounts[0].path) if self.mounts else "",
            }
            if self.target.encryption == "none":
                ours["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
            environ = self.runtime.environ
            kept = minimal_environment(environ, filter(BORG_FOLDERS.fullmatch, environ), **ours)
            yield {**own, **kept, **self.folders}, fd

    def _run_to_end(self, command: str, child: Child, waits: Callable[[], float] = lambda: 0) -> int:
        for mount in self.mounts:
            if mount.lease:
                mount.lease.add(child)

        def moved() -> float:
            return io_bytes(child.pid) + int(cpu_seconds(child.pid))

        def held() -> float:  # it would move if it might
            return time.monotonic() if child.is_held(HELD_BACK) else 0

        # What a person has started may wait for somebody else at its standard input.
        hasty, seconds = not child.is_foreground, self.runtime.settings.stall_seconds
        limit = seconds if child.is_watched else math.inf
        stall = StallClock(limit, self.mounts, moved, held, waits, beside=moved, hasty=hasty)

        def check() -> None:
            for mount in self.mounts:
                mount.check()
                if arrived := list(mount.log.arrived.values()):
                    self._arrived.write_bytes(b"\0".join(map(os.fsencode, arrived)))
            words = "; ".join(f"{mount.store.name}: {mount.log.reason}" for mount in self.mounts)
            stall.check(f"{self.target.store.name}: borg {command} hangs: {words}")

        try:
            code = run_to_end(child, self.runtime.stop, check)
        except BackupError as error:
            # It may hang on a mount: the one that complained last is killed first. Where it hung, the one
            # that is written to is lost anyway, and others may use the other.
            is_lost = isinstance(error, Hung)
            mounts = [(is_lost and bool(each.lease), each.log.complained_at, each) for each in self.mounts]
            for *_, mount in sorted(mounts, key=lambda each: each[:2], reverse=True):
                if child.wait(0) is None:
                    mount.cut_off()
                    child.wait(KILL_SECONDS)
            raise
        for mount in self.mounts if code else ():
            mount.check()  # the cause of borg's trouble, if it is gone
        return code

    def _failure(self, command: str, code: int, log: BorgLog) -> BackupError:
        msgid, reason = log.errors.named[0][0] if log.errors.count else "", log.reason(code)
        hint = BORG_HINTS.get(msgid, DISK_HELP if "No space left" in reason else TRY_AGAIN)
        if msgid.startswith("Lock") and (lock := re.search(r" (/.*/lock)(\.exclusive)?\b", reason)):
            owners: list[str] = []
            with contextlib.suppress(OSError, BackupError):
                owners = within(MOUNT_SECONDS, "lock", lambda: os.listdir(f"{lock[1]}.exclusive"))
            reason += f" (held by {', '.join(owners) or 'a shared lock: see lock.roster'})"
        return BackupError(
            f"{self.target.store.name}: borg {command}: {reason}",
            hint.format(name=self.target.name, path=shlex.quote(str(self.repository))),
        )


OWN_HOST = "s3borgbackup-"  # how BORG_HOST_ID begins, and so the name of each lock of ours
LOCK = re.compile(r"(lock\.exclusive(?:\..*\.tmp)?)/(.*)")
INDEX_FILE = re.compile(r"(?:index|hints|integrity)\.(\d+)")


def leftovers(names: Sequence[str], roster: bytes) -> tuple[list[str], list[str]]:
    """What crashed runs left in a repository, and who else is at work there; by the names of its files.

    An exclusive lock is a folder `lock.exclusive` with a file HOST.PID-THREAD, one that is about to be taken
    a folder `lock.exclusive.RANDOM.tmp` with the same. `lock.roster` names who reads (locking.py, borg 1.4).
    """
    try:
        entries = [entry for kind in json.loads(roster).values() for entry in kind]
        owners = [f"{host}.{pid}" for host, pid, _ in entries if not str(host).startswith(OWN_HOST)]
    except (ValueError, TypeError, AttributeError):  # borg takes it for an empty one
        owners = []
    stale = ["lock.roster"] if roster and not owners else []
    locks = [found.groups() for found in map(LOCK.fullmatch, names) if found]
    stale += [f"{folder}/{holder}" for folder, holder in locks if holder.startswith(OWN_HOST)]
    others = [(folder, holder) for folder, holder in locks if holder and not holder.startswith(OWN_HOST)]
    stale += dict.fromkeys(f"{folder}/" for folder, _ in locks if folder not in dict(others))
    owners += [holder for folder, holder in others if folder == "lock.exclusive"]
    if owners:
        return stale, owners
    stale += [name for name in names if name.endswith(".tmp") and "/" not in name]
    # TigrisFS may upload hints.N, index.N and integrity.N in any order, and a crash may come between. borg
    # makes an index that is not there anew. But where it meets one without hints, and an older one beside it,
    # it mixes the two and fails with a KeyError (`Repository.prepare_txn` of borg 1.4).
    for found in filter(None, map(INDEX_FILE.fullmatch, names)):
        if not {f"index.{found[1]}", f"hints.{found[1]}"} <= set(names):
            stale.append(found[0])
    return stale, owners


def borg_folder(environ: Mapping[str, str], kind: str) -> Path:
    """Where borg keeps its `CACHE` or `CONFIG` ("Environment Variables" in its documentation)."""
    base = environ.get("BORG_BASE_DIR")
    default = Path(base or environ.get("HOME") or Path.home(), f".{kind.lower()}")
    folder = default if base else Path(environ.get(f"XDG_{kind}_HOME", default))
    return Path(environ.get(f"BORG_{kind}_DIR", folder / "borg"))


def own_cache(environ: Mapping[str, str], store: Store) -> Path:
    """The beginning of the names of what we keep in /cache about a bucket."""
    place = hashlib.sha256(f"{store.endpoint} {store.location}".encode()).hexdigest()[:16]
    return borg_folder(environ, "CACHE").parent / "s3borgbackup" / place


def security_folder(environ: Mapping[str, str], repository_id: str) -> Path:
    return Path(environ.get("BORG_SECURITY_DIR", borg_folder(environ, "CONFIG") / "security"), repository_id)


@contextlib.contextmanager
def passphrase_file(passphrase: str) -> Iterator[int]:
    """A file descriptor from which the passphrase can be read once; a pipe would take 64 KiB at most."""
    with open(os.memfd_create("passphrase"), "wb") as stream:
        stream.write(passphrase.encode())
        stream.seek(0)
        yield stream.fileno()


# What borg's interpreter executes at its start, as a module named `sitecustomize`. What is called otherwise
# than in borg 1.4 is left alone: the change saves time, or is for convenience.
#
# About fsync: once an upload has failed, it returns that error until TigrisFS, which keeps the data, has
# tried again, as it does only when the file is closed (SyncFile and sendUpload in core/file.go). borg would
# give up. So the file is closed for a moment, behind borg's back. The stall clock bounds that, and where S3
# means a refusal, Mount.check ends borg. (os.fsync would repeat EINTR, which 409 becomes, for ever.) A
# file that has arrived all the same is in a list, see there. And where S3 does not know an upload any more,
# TigrisFS drops the data, and fsync succeeds: but what was dropped cannot be read.
#
# A folder's fsync tells borg that what it has renamed there is durable: only then does it delete the index
# before. TigrisFS hears of no error (SyncTree in core/goofys.go), and may wait for ever for the deletion of a
# folder: where a file was renamed together with it, and S3 did not answer when the old name was to be
# deleted, one change is left to do for good (sendRename in core/file.go). borg takes its lock by such a
# rename. So a folder is made anew under its new name, and its fsync is that of the files that were renamed.
BORG_ADDITIONS = """\
import contextlib, ctypes, fcntl, io, json, os, shutil, stat, sys, tarfile, time, types

MOUNT, ARRIVED = os.environ["S3BORGBACKUP_MOUNT"], os.path.dirname(__file__) + "/arrived"
LIBC = ctypes.CDLL(None, use_errno=True)
renamed = []

def around(owner, name):
    def decorate(wrapper):
        setattr(owner, name, lambda *given, **options: wrapper(original, *given, **options))
    original = getattr(owner, name)
    return decorate

def is_on_mount(path):
    return MOUNT and os.path.join(path, "").startswith(MOUNT + "/")

def open_as(fd, path, flags):
    opened = os.open(path, flags)
    os.dup2(opened, fd, inheritable=False)
    os.close(opened)

def close_for_a_moment(fd, path):
    flags, position = fcntl.fcntl(fd, fcntl.F_GETFL), os.lseek(fd, 0, os.SEEK_CUR)
    open_as(fd, os.devnull, os.O_RDONLY)
    time.sleep(3)
    open_as(fd, path, flags)
    os.lseek(fd, position, os.SEEK_SET)

def patient(sync, file):
    fd = file if isinstance(file, int) else file.fileno()
    path, facts = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
    if not is_on_mount(path):
        return sync(fd)
    if stat.S_ISDIR(facts.st_mode):
        while renamed:
            try:
                stream = open(renamed.pop(), "rb")
            except FileNotFoundError:
                continue
            with stream:
                os.fsync(stream)
        return
    while LIBC.fsync(fd):
        with open(ARRIVED, errors="surrogateescape") as stream:
            if path in stream.read().split("\\0"):
                return
        close_for_a_moment(fd, path)
    if facts.st_size:
        with open(path, "rb", buffering=0) as stream:
            stream.read(1)

def file_by_file(replace, old, new, **options):
    if not is_on_mount(os.fspath(old)) or not os.path.isdir(old):
        replace(old, new, **options)
        renamed.extend([new] if is_on_mount(os.fspath(new)) else [])
        return
    os.mkdir(new)
    for name in os.listdir(old):
        shutil.copyfile(os.path.join(old, name), os.path.join(new, name))
    shutil.rmtree(old)

# borg's files cache leaves out the newest files of a run: they might be written again within the resolution
# of their time. On S3 these are all objects of the newest second, which each run would read again. But S3
# sets that time itself: what it had written before the run began gets another one when it is overwritten.
def trust_old():
    from borg.cache import LocalCache
    until = int(os.environ["S3BORGBACKUP_TRUSTED_BEFORE"])
    LocalCache._newest_cmtime = property(lambda cache: until, lambda cache, newest: None)

# borg would wait for 4096 characters of paths before it begins with the first. Here it takes each one at once
# from a pipe of our own, reports how many it is done with, which ones it has read though it should know them
# and of which it could make no file, and must be told that the list is at its end: whoever feeds it may be
# gone.
#
# With a path comes what stat(2) would say of it, where that is known: it takes TigrisFS five answers. borg
# then gets a file that cannot be read, and the right one when it wants to read it all the same. Or a content
# comes, too, which nobody has as a file.
def be_fed(fd):
    from borg import archive, archiver
    number = at = 0
    facts = content = late = None  # of a file what is known, what it holds, and what opens it
    memory = os.memfd_create("content")

    def report(kind, **more):
        print(json.dumps({"type": kind, "number": number, **more}), file=sys.stderr, flush=True)

    class Told(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, room):
            report("fed_done")  # before it waits for more
            return os.readv(fd, [room])

    def stat_of(mode, size, time_ns):
        return types.SimpleNamespace(
            st_mode=mode, st_size=size, st_mtime_ns=time_ns, st_ctime_ns=time_ns, st_atime_ns=time_ns,
            st_ino=0, st_nlink=1, st_uid=os.getuid(), st_gid=os.getgid(),
        )

    def paths(*arguments):
        nonlocal number, at, facts, content
        stream = io.BufferedReader(Told())
        while line := stream.readline():
            if not (told := json.loads(line)):
                return
            path, known, length = told
            facts, content = known and stat_of(*known), None if length is None else stream.read(length)
            number += 1
            yield path
            facts = content = None
            if time.monotonic() > at + 0.05:
                at = time.monotonic()
                report("fed_done")
        raise EOFError("the list of what to archive has no end")

    def note(self, status, path):
        if status in ("E", "d") or (facts and content is None and status in ("A", "M", "C")):
            report("fed_status", status=status)

    archiver.iter_separated, archiver.Archiver.print_file_status = paths, note

    @around(archiver, "os_stat")
    def look(look_now, **given):
        return facts or look_now(**given)

    @around(archive, "stat_update_check")
    def compare(compare_now, before, now):
        return facts or compare_now(before, now)

    @around(os, "fstat")
    def look_again(fstat, file):
        return facts if file == memory and facts else fstat(file)

    @around(archive, "OsOpen")
    @contextlib.contextmanager
    def open_late(open_now, **given):
        nonlocal late
        late = None
        if content is not None:
            with archive.backup_io("open"):
                os.truncate(memory, 0)
                os.pwrite(memory, content, 0)
                os.lseek(memory, 0, os.SEEK_SET)
            yield memory
            return
        instead = {"path": os.devnull, "flags": os.O_WRONLY} if facts else {}
        with open_now(**{**given, **instead}) as opened:
            late = facts and (opened, given["path"], given["flags"])
            yield opened

    @around(archive.ChunksProcessor, "process_file_chunks")
    def read(read_now, *given, **options):
        if late:
            with archive.backup_io("open"):
                open_as(*late)
        return read_now(*given, **options)

# `borg list --format` knows `nfiles` and `size`, too, which borg notes in each archive. `borg info` would
# read all of each archive's metadata, and needs the cache.
def list_sizes():
    from borg.helpers.parseformat import ArchiveFormatter

    @around(ArchiveFormatter, "__init__")
    def know_more(start, self, format, *arguments, **options):
        start(self, format, *arguments, **options)
        for key in {"nfiles", "size"} & self.format_keys:
            self.call_keys[key] = lambda key=key: self.get_meta(key, rs=False)
            self.used_call_keys.add(key)

# After `backup.py borg NAME`, a word without a slash is an archive where borg wants REPOSITORY::ARCHIVE, so
# that `diff A B` means what it says. A new passphrase is asked for, as BORG_PASSPHRASE_FD is closed by then.
# And who deletes the repository deletes neither its mount nor the lease.
def take_archives_by_name():
    from borg.helpers.parseformat import Location

    @around(Location, "parse")
    def by_name(parse, self, text, *arguments):
        return parse(self, text if not text or "/" in text or "::" in text else "::" + text, *arguments)

def read_passphrase_once():
    from borg.crypto.key import Passphrase

    @around(Passphrase, "fd_passphrase")
    def once(read):
        passphrase = read()
        os.environ.pop("BORG_PASSPHRASE_FD", None)
        return passphrase

def spare_what_is_ours():
    from borg.repository import Repository

    def destroy(self):
        if self.append_only:
            raise ValueError(self.path + " is in append-only mode")
        self.close()
        for entry in sorted(os.scandir(self.path), key=lambda entry: entry.name != "config"):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry)
            elif not entry.name.startswith(".s3borgbackup-"):
                os.unlink(entry)

    Repository.destroy = destroy

# A file names what is asked for of an archive, in its order: patterns for a million paths would take much
# memory, and paths hold line ends. A tar file has a place for user metadata only when it is of the PAX kind.
def export_chosen():
    from borg.archive import Archive
    chosen, xattrs = map(json.loads, open(os.environ["S3BORGBACKUP_EXPORTED"])), {}
    following = [next(chosen, None)]

    @around(Archive, "item_filter")
    def is_chosen(item_filter, self, item, *arguments):
        if item.path != following[0] or not item_filter(self, item, *arguments):
            return False
        following[0], xattrs[item.path] = next(chosen, None), item.get("xattrs") or {}
        return True

    @around(tarfile.TarFile, "addfile")
    def with_headers(add, self, tarinfo, *arguments):
        headers = {
            "SCHILY.xattr." + name.decode(): (value or b"").decode("utf-8", "surrogateescape")
            for name, value in xattrs.pop(tarinfo.name, {}).items()
            if name.startswith(b"user.")
        }
        self.format = tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT
        tarinfo.pax_headers = headers
        return add(self, tarinfo, *arguments)

for name, changed in (
    ("fsync", patient), ("fdatasync", patient), ("rename", file_by_file), ("replace", file_by_file)
):
    around(os, name)(changed)
for patch in (
    trust_old, list_sizes, take_archives_by_name, read_passphrase_once, spare_what_is_ours, export_chosen
):
    try:
        patch()
    except (ImportError, AttributeError, KeyError):  # KeyError: it is not for this command
        pass
if "S3BORGBACKUP_FED" in os.environ:
    be_fed(int(os.environ["S3BORGBACKUP_FED"]))
"""


def expect_encryption(target: Target, actual: str) -> None:
    """Raises BackupError when a repository's mode is not what the configuration promises."""
    plain = ("none", "authenticated", "authenticated-blake2")
    if actual != target.encryption and (target.must_match or actual in plain):
        raise BackupError(
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


def first_of(names: Sequence[str], separator: str = ", ") -> str:
    """The first five names, and how many there are more."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{separator.join(names[:5])}{more}"


# ---------------------------------------------------------------------------------------------------- Audit

# TigrisFS ends with 0 although uploads failed, and borg has ended by then: when only the last writes (an
# index, the removal of the lock) are refused, nobody would notice. So bucket and mount are compared.


def repository_files(mount: Mount) -> dict[str, int]:
    """borg's files as the mount shows them, path -> size in bytes; the lease and probes come and go."""
    found = mount.files(mount.path)
    return {name: size_bytes for name, (size_bytes, _) in found.items() if not name.startswith(OWN_PREFIX)}


def listed_files(client: S3Client) -> dict[str, int]:
    """The same from the bucket's listing, without the empty objects that stand for folders."""
    prefix = client.store.key_prefix
    entries = (entry for entry in client.list_objects(prefix) if not entry.key.endswith("/"))
    found = {entry.key[len(prefix) :]: entry.size_bytes for entry in entries}
    return {name: size_bytes for name, size_bytes in found.items() if not name.startswith(OWN_PREFIX)}


def upload_mistakes(expected: Mapping[str, int], listed: Mapping[str, int]) -> list[str]:
    """What the bucket lacks or has too much."""

    def mistake(name: str) -> str:
        if name not in listed:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} was not removed"
        return f"{name} has {listed[name]:,} of {expected[name]:,} bytes"

    return [mistake(name) for name in sorted(dict(expected.items() ^ listed.items()))]


def settle(mount: Mount, client: S3Client) -> list[str]:
    """Waits until everything is uploaded; returns what is not.

    At its end TigrisFS tries each upload and each deletion just once. Until then it repeats those that
    failed, some without a word, and what its SDK repeats is told after many seconds. So something is lacking
    only when nothing was uploaded and nothing complained about for a while. Raises S3Error and Stuck.

    A repository is compared with the bucket. Of other files nobody has a list: there TigrisFS must have
    nothing to complain about, after it was told to upload all.
    """
    if mount.holds_nothing:
        return []

    def sync() -> None:
        folder_fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)  # of all that is below it, without a word about errors
        finally:
            os.close(folder_fd)

    written = repository_files(mount) if mount.store.target else {}
    synced = None if written else in_background(sync)

    def lacking() -> list[str]:
        if synced:
            return [] if synced.done() and not mount.log.is_complaining else [mount.log.reason]
        return upload_mistakes(written, listed_files(client))

    name, console, pause, found = mount.store.name, mount.runtime.console, 0.05, lacking()
    stall = StallClock(mount.runtime.settings.stall_seconds, [mount])
    still = Stillness([mount.meter(SETTLE_SECONDS), lambda: -len(found)])
    while found and (still.seconds(time.monotonic()) <= SETTLE_SECONDS or mount.log.is_complaining):
        mount.check()
        stall.check(f"{name}: the upload does not end: {found[0]}: {mount.log.reason}")
        console.progress(name, f"uploading what tigrisfs still holds: {found[0]}")
        client.stop.wait(pause)
        pause = min(2 * pause, MAX_BACKOFF_SECONDS)
        found = lacking()
    # A lock: TigrisFS may upload it late, or not know that it has, as the answer was lost.
    is_cleared = mount.lease and mount.lease.enforced
    return [words for words in found if not (is_cleared and words.startswith("lock."))]


def not_uploaded(store: Store, lacking: Sequence[str]) -> BackupError:
    words = f"{store.location} does not hold what was written: {first_of(lacking, '; ')}"
    hint = "TigrisFS's warnings tell why. Do it again, and check the repository, or compare the files."
    return BackupError(f"{store.name}: {words}", hint)


RACE_SECONDS = 2  # how far the clocks of an S3 service may be apart
UNREAD = "it could not be read"
REFUSALS = frozenset({400, 401, 403})  # no permission, cold storage, a foreign key for SSE-C

# -------------------------------------------------------------------------------------------- Notifications

# Nobody reads the output of a backup that runs at night. So a health check, a webhook and Prometheus are told
# of what a schedule starts. None of this makes a run fail, or holds it for long; and of the URLs, which are
# secrets, only scheme and host are ever printed.

TOLD_COMMANDS = {"run": "Backup", "maintain": "Maintenance"}
BODY_BYTES = 100_000  # what healthchecks.io keeps of a ping's body ("Pinging API" in its documentation)
KUMA_LETTERS = 300  # it takes the text in the URL


@dataclass(frozen=True)
class Ending:
    """What the exit code of a run, or of a target, means to those who are told."""

    name: str  # in JSON
    words: str
    signal_name: str = "fail"  # what a health check is told
    notify_on: Collection[str] = NOTIFY_ON  # the settings with which NOTIFY_URL is told


# With warnings the archive is there. A run that found another one at work leaves the word to that one.
ENDINGS = {
    EXIT_OK: Ending("ok", "all well", "success", ("always",)),
    EXIT_WARNINGS: Ending("warnings", "finished with warnings", "success", ("always", "warning")),
    EXIT_FAILURE: Ending("failed", "something failed"),
    EXIT_BUSY: Ending("busy", "another run was at work", "log", ("always", "warning")),
    EXIT_CONFIGURATION: Ending("misconfigured", "wrong configuration"),
}


def ending(code: int) -> Ending:
    stopped = Ending("stopped", str(Stopped(code - 128))) if code > 128 else ENDINGS[EXIT_FAILURE]
    return ENDINGS.get(code, stopped)


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

    def send(self, deadline: float, over: threading.Event) -> None:
        """Sends it, again while the fault may pass, until `deadline` (monotonic) or `over`.

        What is sent again may arrive twice. Raises BackupError, which has nothing of the URL.
        """
        url, pause = urllib.parse.urlsplit(self.url), 1.0
        headers = {"User-Agent": f"s3borgbackup/{VERSION}"}
        if self.body:
            headers["Content-Type"] = self.content_type
        if url.username is not None:  # basic authentication (RFC 7617)
            pair = urllib.parse.unquote(f"{url.username}:{url.password or ''}")
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        while True:
            connection = connection_to(url)
            connection.timeout = min(TELL_TRY_SECONDS, max(POLL_SECONDS, deadline - time.monotonic()))
            try:
                connection.request(self.method, request_target(url), self.body or None, headers)
                status = connection.getresponse().status
                if 200 <= status < 300:
                    return
                hint = "; redirects are not followed: write the final URL" if status in REDIRECTS else ""
                reason, may_pass = f"{status} {http_reason(status)}{hint}", status in RETRIED_STATUSES
            except OSError as fault:
                reason = str(fault) or type(fault).__name__
                may_pass = not isinstance(fault, ssl.SSLCertVerificationError)
            except (http.client.HTTPException, ValueError) as fault:
                # A broken answer is not quoted: it may repeat what was asked for.
                reason, may_pass = f"no HTTP ({type(fault).__name__})", True
            finally:
                connection.close()
            if not may_pass or time.monotonic() + pause > deadline or over.wait(pause):
                raise BackupError(f"{self} was not told how the run goes: {reason}")
            pause *= 2


def request_target(url: urllib.parse.SplitResult) -> str:
    """Path and query as HTTP has them; what is escaped already stays as it is."""
    whole = "?".join(filter(None, [url.path or "/", url.query]))
    return urllib.parse.quote(whole, safe="/%:@!$&'()*+,;=~?")


def healthcheck_message(url: str, signal_name: str, text: str, seconds: float) -> Message | None:
    """For `start`, `success`, `fail` or `log`; None where a health check is not told.

    healthchecks.io is given no run id (`rid`): a success with one does not end a start with another, so that
    a run which ends with 75 would leave a start behind that becomes an alarm, although the run that was at
    work succeeds (`Check.ping` of healthchecks). Uptime Kuma takes a number, here the run's milliseconds.
    """
    if not url:
        return None
    parts = urllib.parse.urlsplit(url)
    text = text.encode("utf-8", "backslashreplace")[:BODY_BYTES].decode("utf-8", "ignore")
    if "/api/push/" not in parts.path:
        path = parts.path.rstrip("/") + ("" if signal_name == "success" else f"/{signal_name}")
        return Message("HEALTHCHECK_URL", "POST", parts._replace(path=path).geturl(), text.encode())
    if signal_name not in ("success", "fail"):
        return None
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    query |= {"status": "up" if signal_name == "success" else "down"}
    query |= {"msg": " ".join(text.split())[:KUMA_LETTERS], "ping": str(round(seconds * 1000))}
    return Message("HEALTHCHECK_URL", "GET", parts._replace(query=urllib.parse.urlencode(query)).geturl())


def run_document(report: Report, code: int, finished: datetime, console: Console) -> dict[str, Any]:
    """What NOTIFY_URL gets; `text` is what many chat programs' webhooks read."""
    targets = [{**target, "errors": [], "warnings": []} for target in report.targets]
    document = {
        "run_id": report.run_id,
        "command": report.command,
        "version": VERSION,
        "host": socket.gethostname(),
        **report.labels,
        "started": f"{report.started:%Y-%m-%dT%H:%M:%SZ}",
        "finished": f"{finished:%Y-%m-%dT%H:%M:%SZ}",
        "seconds": round((finished - report.started).total_seconds(), 3),
        "exit_code": code,
        "result": ending(code).name,
        "targets": targets,
        "errors": [],
        "warnings": [],
        "more": sum(found.more for found in console.troubles.values()),
        "text": run_text(report, code, console.troubles),
    }
    places = {f"target-{target['name']}": target for target in targets}
    for level, found in console.troubles.items():
        for name, text in found.named:
            places.get(name, document)[f"{level}s"].append(text)
    return document


def run_text(report: Report, code: int, troubles: Mapping[str, Findings]) -> str:
    what = f"{TOLD_COMMANDS[report.command]} {report.label} on {socket.gethostname()}"
    lines = [f"{what}: {ending(code).words} (exit code {code})", report.table]
    reasons = [" ".join(target["reason"].split()) for target in report.targets]
    for level, found in troubles.items():
        for name, text in found.named:
            if not any(reason.endswith(text) for reason in reasons):  # else the table has it
                lines.append(f"[{name}] {level}: {text}")
    if more := sum(found.more for found in troubles.values()):
        lines.append(f"{more:,} more")
    return "\n".join(filter(None, lines))


class Reporter:
    """Tells of a run's start and end; `report` is filled in meanwhile."""

    def __init__(self, settings: Settings, console: Console, stop: Stop, report: Report) -> None:
        self._settings, self._console, self._stop, self._report = settings, console, stop, report
        self._over = threading.Event()
        self._jobs: list[tuple[str, concurrent.futures.Future[None]]] = []

    def start(self) -> None:
        """In the background: nobody waits for that."""
        self._tell(healthcheck_message(self._settings.healthcheck_url, "start", "", 0))

    def end(self, code: int) -> None:
        """Takes TELL_SECONDS, or TELL_STOPPED_SECONDS, at most."""
        settings, report, finished, how = self._settings, self._report, datetime.now(UTC), ending(code)
        # The start must not arrive after the end, so a try that is under way is waited for. But a failure
        # that arrives before a start still is one: after a stop signal there is no time.
        self._over.set()
        self._wait(2 * TELL_TRY_SECONDS, 0)
        self._over = threading.Event()
        document = run_document(report, code, finished, self._console)
        if self._console.as_json:
            numbers = {name: document[name] for name in ("exit_code", "result", "seconds")}
            self._console.info("run", how.words, "run_finished", **numbers)
        text, seconds = document["text"], document["seconds"]
        self._tell(healthcheck_message(settings.healthcheck_url, how.signal_name, text, seconds))
        if settings.notify_url and settings.notify_on in how.notify_on:
            body = json.dumps(document).encode()
            self._tell(Message("NOTIFY_URL", "POST", settings.notify_url, body, "application/json"))
        if settings.metrics_file and report.command == "run":
            write = functools.partial(write_metrics, Path(settings.metrics_file), report, code, finished)
            self._jobs.append(("METRICS_FILE", in_background(write)))
        # A try that ends at its deadline has something to say.
        self._wait(TELL_SECONDS + 2 * POLL_SECONDS, TELL_STOPPED_SECONDS)
        for name, job in self._jobs:
            error = job.exception() if job.done() else BackupError(f"{name}: no answer in time")
            if isinstance(error, BackupError):
                self._console.warning("run", str(error))
            elif error:
                self._console.defect("run", error)
            else:
                self._console.debug("run", f"{name} was told how the run goes")

    def _tell(self, message: Message | None) -> None:
        if message:
            send = functools.partial(message.send, time.monotonic() + TELL_SECONDS, self._over)
            self._jobs.append((str(message), in_background(send)))

    def _wait(self, seconds: float, stopped_seconds: float) -> None:
        for waited in waiting(*(job for _, job in self._jobs)):
            if waited > (stopped_seconds if self._stop.requested else seconds):
                return


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
METRIC_LINE = re.compile(r"^(s3borgbackup_[a-z_]+\{.*\}) ([0-9]+(?:\.[0-9]+)?)$", re.MULTILINE)


def write_metrics(path: Path, report: Report, code: int, finished: datetime) -> None:
    try:
        old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        replace_file(path, metrics_text(report, code, finished, old))
    except OSError as error:
        raise BackupError(f"METRICS_FILE: cannot write {str(path)!r}: {error.strerror}") from None


def metrics_text(report: Report, code: int, finished: datetime, old: str) -> str:
    """In Prometheus' text format ("Exposition formats" in its documentation).

    What is not told anew stays as it is in `old`: a success before, and targets that were not its turn.
    """
    samples, now = dict(METRIC_LINE.findall(old)), round(finished.timestamp(), 3)
    if report.configured is not None:  # else nobody knows which targets are gone
        wanted = {metric(name, report.labels, target) for name in METRICS for target in report.configured}
        samples = {key: value for key, value in samples.items() if key in wanted}

    def tell(target: str | None, **values: Any) -> None:
        samples.update({metric(name, report.labels, target): str(value) for name, value in values.items()})

    seconds = round((finished - report.started).total_seconds(), 3)
    tell(None, run_timestamp_seconds=now, run_duration_seconds=seconds, run_exit_code=code)
    codes = {how.name: number for number, how in ENDINGS.items()}
    for target in report.targets:
        name, went = target["name"], codes[target["result"]]
        tell(name, last_run_timestamp_seconds=now, last_run_exit_code=went)
        tell(name, last_run_duration_seconds=target["seconds"])
        if went in (EXIT_OK, EXIT_WARNINGS):
            tell(name, last_success_timestamp_seconds=now)
        if target["archive"]:
            tell(name, **{f"last_archive_{what}": target[what] for what in ("objects", "bytes", "new_bytes")})
    lines = []
    for name, text in METRICS.items():
        name = f"s3borgbackup_{name}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        lines += [f"{key} {value}" for key, value in samples.items() if key.startswith(f"{name}{{")]
    return "\n".join(lines) + "\n"


def metric(name: str, labels: Mapping[str, str], target: str | None) -> str:
    labels = labels if target is None else {**labels, "target": target}
    escaped = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = ",".join(f'{key}="{value.translate(escaped)}"' for key, value in labels.items())
    return f"s3borgbackup_{name}{{{pairs}}}".encode("utf-8", "replace").decode()


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one go: who reads it finds the old one or the new one, whole. Raises OSError.

    Everybody may read it, as the umask allows: node_exporter is another user.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
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
    following: tuple[str, str] | None  # what asks for the next page; None: the first is all there is
    clock: datetime  # the server's
    is_sorted: bool = True  # the listing

    def repository_state(self, store: Store) -> RepositoryState:
        # `borg init` writes README, config, the segments 0 and 1, and last an index. Without a further
        # segment nothing can have been archived, so what has only borg's own names may be made anew.
        others = self.others(store)
        own = {name for name in others if OWN_NAMES.fullmatch(name)}
        if not others:
            return RepositoryState.EMPTY
        is_small = not self.following and sum(others.values()) < UNFINISHED_MAX_BYTES
        is_first = is_small and not any(map(LATER_SEGMENT.fullmatch, own))
        is_whole = "config" in own and any(name.startswith("index.") for name in own)
        if is_first and own == others.keys() and "README" in own and not is_whole:
            return RepositoryState.UNFINISHED
        return RepositoryState.READY if "config" in own and len(own) > 1 else RepositoryState.FOREIGN

    def holds(self, store: Store, name: str) -> bool:
        """Whether a note is there; our names sort before all of borg's."""
        return name in self.names(store)

    def names(self, store: Store) -> list[str]:
        return [entry.key[len(store.key_prefix) :] for entry in self.keys]

    def others(self, store: Store) -> dict[str, int]:
        """What is not ours, as the lease, probes and notes are: name below the prefix -> size in bytes."""
        sizes = {entry.key[len(store.key_prefix) :]: entry.size_bytes for entry in self.keys}
        return {name: sizes[name] for name in sizes if name and not name.startswith(OWN_PREFIX)}


class RepositoryState(enum.Enum):
    EMPTY = "nothing"
    READY = "a repository"
    UNFINISHED = "what an interrupted `borg init` left"
    FOREIGN = "other objects"


# With borg's temporary files, `config-abcdefgh.tmp` (SaveFile in platform/base.py of borg 1.4).
OWN_NAMES = re.compile(
    r"README|(config|nonce)(-\w{8}\.tmp)?|(data|hints|index|integrity|lock)[./].*", re.DOTALL | re.ASCII
)
LATER_SEGMENT = re.compile(r"data/[0-9]+/(?![01]$)[0-9]+")
CONFIG_ID = re.compile(r"^id = ([0-9a-f]{64})$", re.MULTILINE)
PROBED_OBJECTS = 10  # each may be in cold storage, or just deleted
UNFINISHED_MAX_BYTES = 65536  # the first manifest and its commit take less than 1 KB


def look(client: S3Client) -> Preflight:
    entries, more = client.list_page(client.store.key_prefix)
    client.is_sorted = entries == sorted(entries, key=lambda entry: entry.key)
    if more and not client.is_sorted and client.store.target:  # what matters may be on any page
        entries, more = list(client.list_objects(client.store.key_prefix)), None
    return Preflight(client.region, tuple(entries), more, client.clock, client.is_sorted)


def examine(client: S3Client, write: bool) -> Preflight:
    """Lists a store, reads from it and, with `write`, writes. Raises S3Error naming what is refused."""
    found = look(client)
    probe_read(client, found)
    if write:
        probe_write(client)
    return found


def probe_read(client: S3Client, found: Preflight) -> None:
    """Reads the first byte of an object, if there is one."""
    refusal = None
    readable = [entry for entry in found.keys if not entry.key.endswith("/")]
    for entry in readable[:PROBED_OBJECTS]:
        try:
            client.get(entry.key, (0, 0) if entry.size_bytes else None)
            break
        except S3Error as error:
            if error.status not in (*REFUSALS, 404):
                raise
            # One in cold storage, or deleted since the listing, says nothing about the others.
            if error.status != 404 and error.code != "InvalidObjectState":
                refusal = refusal or error
    else:
        if refusal:
            raise refusal


def preflight_one(runtime: Runtime, store: Store, write: bool) -> Preflight:
    return examine(S3Client(store, stop=runtime.stop), write)


def probe_write(client: S3Client) -> None:
    """Writes a small object below the store's prefix, reads it back and deletes it."""
    key, body = f"{client.store.key_prefix}{PROBE_NAME}{secrets.token_hex(6)}", secrets.token_bytes(16)
    for last in (False, False, True):
        client.put(key, body)
        try:
            read_back(client, key, body)
            return
        except S3Error as error:
            if error.status != 404 or last:  # another run removes what it takes for a leftover
                raise
        finally:
            client.delete(key)


def read_back(client: S3Client, key: str, body: bytes) -> None:
    if client.get(key, (1, len(body) - 1)) != body[1:]:
        what = f"{client.store.name}: an object that was just written reads back differently"
        raise S3Error(what, "Use a store that reads what was written.", 200, "Stale")


def read_config(mount: Mount) -> tuple[str, str]:
    """A mounted repository's config, and the id in it."""
    name = mount.store.name
    config = within(MOUNT_SECONDS, f"{name}: reading config", (mount.path / "config").read_text)
    if not (found := CONFIG_ID.search(config)):
        raise BackupError(f"{name}: the repository's config has no id", "Restore its config.")
    return config, found[1]


def prepare_repository(
    runtime: Runtime, target: Target, client: S3Client, lease: Lease, may_be_new: bool = True
) -> bool:
    """Clears what crashed runs left in a repository, or makes one; returns whether it is new.

    Raises BackupError, also where somebody else has it locked.
    """
    store, prefix, found = target.store, target.store.key_prefix, look(client)
    probes = [entry.key for entry in found.keys if entry.key.startswith(f"{prefix}{PROBE_NAME}")]
    delete_all(lease, "", probes)  # which preflights that were killed left
    state = what_lies_there(runtime, client, found, may_be_new)
    if state is RepositoryState.READY:
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while owners := clear_leftovers(runtime, client, lease):
            if time.monotonic() > deadline:
                mount_point = shlex.quote(str(runtime.settings.mount_point(store)))
                raise BackupError(
                    f"{store.name}: the repository is locked by somebody else: {', '.join(owners)}",
                    BREAK_LOCK_HELP.format(name=shlex.quote(target.name), path=mount_point),
                )
            runtime.stop.wait(POLL_SECONDS * 5)
        return False
    if others := found.others(store):
        runtime.console.warning(store.name, f"{state.value} is removed: {len(others)} small objects")
        delete_all(lease, prefix, others)
    runtime.console.info(store.name, f"a new repository is made ({target.encryption})")
    # `borg init` wants an empty place, and the lease lies there already. So it makes a few small local files,
    # which are copied; the config goes last: what an interruption leaves has none, and is made anew.
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
        repository = Path(folder, "repository")
        Borg(runtime, target, repository).run(["init", "--encryption", target.encryption, str(repository)])
        parts = [name for name in found.names(store) if name.startswith(SHARD_NAME)]
        delete_all(lease, prefix, (KEY_EXPORTED_NAME, CHECKED_NAME, *parts))  # of one that was here before
        if shard := runtime.settings.shard:
            lease.write(S3Client.put, f"{prefix}{SHARD_NAME}{shard.dashed}", b"{}")
        paths = [path for path in repository.rglob("*") if path.is_file() and path.name != "lock.roster"]
        for path in sorted(paths, key=lambda path: (path.name == "config", path.name != "README")):
            lease.write(S3Client.put, f"{prefix}{path.relative_to(repository)}", path.read_bytes())
    return True


def expect_part(runtime: Runtime, store: Store, names: Iterable[str]) -> None:
    """Raises BackupError unless a repository, whose files have these names, is for what is backed up."""
    shard = runtime.settings.shard
    found = [name.removeprefix(SHARD_NAME) for name in names if name.startswith(SHARD_NAME)]
    if found == ([shard.dashed] if shard else []):
        return
    there = ", ".join(name.replace("-", "/") for name in found)
    is_for = f"SHARD={there}" if there else "a whole source (without SHARD)"
    here = f"SHARD={shard.setting}" if shard else "SHARD is not set"
    raise BackupError(
        f"{store.name}: the repository at {store.location} is for {is_for}, and here {here}",
        f"Set SHARD as it was, or point {store.setting('path')} at an empty place: other parts need new"
        " repositories, and the old ones can still be restored from.",
    )


def what_lies_there(
    runtime: Runtime, client: S3Client, found: Preflight, may_be_new: bool
) -> RepositoryState:
    """The state of the place for a repository. Raises BackupError where what lies there is not wanted."""
    store, state = client.store, found.repository_state(client.store)
    if state is RepositoryState.UNFINISHED:  # nothing of somebody else must be removed
        readme = client.get(f"{store.key_prefix}README")
        if not readme.startswith(b"This is a Borg Backup repository"):
            state = RepositoryState.FOREIGN
    if state is RepositoryState.FOREIGN:
        raise BackupError(
            f"{store.name}: {store.location} holds other objects"
            f" (such as {next(iter(found.others(store)))!r}) and no borg repository",
            f"Point {store.setting('path')} at an empty place, such as {store.bucket}:borg.",
        )
    if state is not RepositoryState.READY and not may_be_new:
        raise BackupError(
            f"{store.name}: {store.location} holds no repository yet",
            f"Run a backup first, or correct {store.setting('path')}.",
        )
    if state is RepositoryState.READY and may_be_new:  # somebody backs up to it, and does not just read it
        expect_part(runtime, store, found.names(store))
    return state


def clear_leftovers(runtime: Runtime, client: S3Client, lease: Lease) -> Sequence[str]:
    """Deletes what crashed runs left in a repository, where others are kept away; returns who else is there.

    No mount must show it before: TigrisFS may deadlock on such a lock, and borg cannot use such an index.
    """
    if not lease.enforced:
        return ()
    name, prefix = client.store.name, client.store.key_prefix
    # What sorts behind the segments: hints.N, index.N, integrity.N, lock. Storj lists in an order of its own.
    start = f"{prefix}hints" if client.is_sorted else ""
    names = [entry.key[len(prefix) :] for entry in client.list_objects(prefix, start)]
    # Its last holder may just have left.
    roster = client.find(f"{prefix}lock.roster") if "lock.roster" in names else None
    stale, owners = leftovers(names, roster.body if roster else b"")
    delete_all(lease, prefix, stale)
    if any(re.match(r"lock\.exclusive.*/.", name) for name in stale):
        runtime.console.info(name, "a lock that borg left behind is removed")
    if any(map(INDEX_FILE.fullmatch, stale)):
        runtime.console.info(name, "the index that a crashed run left half-written is removed")
    return owners


def delete_all(lease: Lease, prefix: str, names: Iterable[str]) -> None:
    for name in names:
        lease.write(S3Client.delete, f"{prefix}{name}")


@contextlib.contextmanager
def cache_reserved(runtime: Runtime, store: Store, lease: Lease, folder: Path) -> Iterator[None]:
    """Keeps others on this machine from borg's cache in `folder`, and clears the locks of crashed runs there.

    The lease is only that of a place in S3, and the cache may lie on a volume that outlives a container.
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
        if lease.enforced:
            # borg locks its cache exclusively: only readers' entries in `lock.roster` would matter.
            for path in (*folder.glob(f"lock.exclusive*/{OWN_HOST}*"), *folder.glob("lock.exclusive*")):
                with contextlib.suppress(OSError):  # somebody else's; or borg says what is wrong with it
                    path.rmdir() if path.is_dir() else path.unlink()
        yield


# By the numbers that borg notes (crypto/key.py of borg 1.4).
KEY_TYPES = {"0": "keyfile", "2": "none", "3": "repokey", "4": "keyfile-blake2", "5": "repokey-blake2"}
KEY_TYPES |= {"6": "authenticated-blake2", "7": "authenticated"}


def check_encryption(runtime: Runtime, repository: Repository) -> None:
    folder, borg = security_folder(runtime.environ, repository.identity), repository.borg
    try:  # borg refuses any mode but the one that it has seen (`SecurityManager` of borg 1.4)
        known, *_ = [(folder / name).read_text() for name in ("key-type", "location", "manifest-timestamp")]
        mode = KEY_TYPES[known.strip()]
    except (OSError, ValueError, KeyError):
        listed = borg.run(["list", "--json", "--last", "1", str(borg.repository)])
        mode = json.loads(listed.output)["encryption"]["mode"]
    expect_encryption(repository.target, mode)


def read_note(client: S3Client, name: str) -> dict[str, Any]:
    """What was noted beside the repository, a JSON object; an empty one where nothing was. Raises S3Error."""
    answer = client.find(f"{client.store.key_prefix}{name}")
    try:
        noted = json.loads(answer.body) if answer else {}
    except (ValueError, RecursionError):
        noted = {}
    return noted if isinstance(noted, dict) else {}


def write_note(client: S3Client, name: str, note: Mapping[str, Any]) -> None:
    body = json.dumps(note, default=lambda when: when.isoformat(timespec="seconds"))
    client.put(f"{client.store.key_prefix}{name}", body.encode())


def utc_now(client: S3Client) -> str:
    """The time by the server's clock."""
    return f"{client.clock:%Y-%m-%dT%H:%M:%SZ}"


@dataclass(frozen=True)
class Repository:
    """A mounted repository, and a borg to work on it with."""

    target: Target
    client: S3Client
    mount: Mount
    borg: Borg
    identity: str  # its id
    cache: Path  # where borg keeps its cache of it
    files: Mapping[str, int]  # path -> size in bytes, as they were when it was opened to read


@contextlib.contextmanager
def writable(
    runtime: Runtime, target: Target, client: S3Client, lease: Lease, others: Sequence[Mount] = ()
) -> Iterator[Repository]:
    """The repository mounted for writing; its locks are cleared already. borg will need the `others`, too.

    On leaving, everything is uploaded, and the bucket is compared with what borg left in the mount.
    """
    store = target.store
    try:
        with mounted(runtime, store, client.region, read_only=False, lease=lease) as mount:
            mount.wait_until_usable()
            identity = read_config(mount)[1]
            cache = borg_folder(runtime.environ, "CACHE") / identity
            with cache_reserved(runtime, store, lease, cache):
                borg = Borg(runtime, target, mount.path, [mount, *others])
                yield Repository(target, client, mount, borg, identity, cache, {})
                if lacking := settle(mount, client):
                    raise not_uploaded(store, lacking)
                # Where borg overwrites without changing the size, it renames a file that was uploaded before.
                mount.holds_nothing = True
    except BaseException:
        # A signal can end borg between the rename that takes its lock and the line that remembers it.
        with contextlib.suppress(BackupError):
            if not lease.expires:
                clear_leftovers(runtime, dataclasses.replace(client, patience=BRIEF), lease)
        raise
    clear_leftovers(runtime, client, lease)


@contextlib.contextmanager
def opened_for_writing(runtime: Runtime, target: Target, purpose: str) -> Iterator[Repository]:
    """An existing repository under its lease, for `purpose`; on leaving, all is uploaded and compared."""
    found = preflight_one(runtime, target.store, write=True)
    client = S3Client(target.store, found.region, PROVEN, runtime.stop)
    with Lease(runtime, client, purpose) as lease:
        prepare_repository(runtime, target, client, lease, may_be_new=False)
        with writable(runtime, target, client, lease) as repository:
            yield repository


@contextlib.contextmanager
def full_disk_told(store: Store) -> Iterator[None]:
    """Turns the OSError of a full disk into a BackupError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK or os.strerror(errno.ENOSPC) in str(error):
            raise BackupError(f"{store.name}: {os.strerror(errno.ENOSPC)}", DISK_HELP) from error
        raise


# Reading must work on the worst day: with keys that may only read, while a run writes, after one that
# crashed, beside anybody's locks. So borg gets a folder of links to the repository's files in a mount that is
# read-only: there it may take its lock, and rebuild an index. And it keeps what it knows beside that folder,
# as a run may have locked the cache. Only what a run removes meanwhile can be missed.


@contextlib.contextmanager
def opened_for_reading(runtime: Runtime, target: Target, purpose: str = "") -> Iterator[Repository]:
    """An existing repository to read from, with keys that may list and read; whoever writes goes on.

    With a `purpose` the lease is held where that can be, so that nobody compacts it meanwhile.
    """
    store, found = target.store, preflight_one(runtime, target.store, write=False)
    client = S3Client(store, found.region, PROVEN, runtime.stop)
    what_lies_there(runtime, client, found, may_be_new=False)
    with contextlib.ExitStack() as undo:
        undo.enter_context(full_disk_told(store))
        if purpose:
            try:  # should it be lost later, reading goes on all the same
                undo.enter_context(Lease(runtime, client, purpose, only_reads=True))
            except (StillRunning, S3Error) as error:
                words = "reading goes on without the lease, and fails if somebody compacts the repository"
                runtime.console.info(store.name, f"{error.message}: {words} meanwhile")
        folder = undo.enter_context(folder_for_mounts())
        path = folder / store.name
        mount = undo.enter_context(mounted(runtime, store, client.region, read_only=True, path=path))
        mount.wait_until_usable()
        files = repository_files(mount)
        files = {name: size_bytes for name, size_bytes in files.items() if not name.startswith("lock.")}
        (config, identity), view = read_config(mount), folder / "view"
        view.mkdir()
        (view / "config").write_text(config)
        for name in files.keys() - {"config"}:
            os.makedirs(os.path.dirname(f"{view}/{name}"), exist_ok=True)
            os.symlink(f"{mount.path}/{name}", f"{view}/{name}")
        cache, security = folder / "cache", folder / "security"
        known = security_folder(runtime.environ, identity)
        if known.is_dir():  # it notices a swapped repository; that this one lies elsewhere is no news
            shutil.copytree(known, security / identity)
            (security / identity / "location").write_text(str(view), encoding="utf-8")
        folders = {"BORG_CACHE_DIR": str(cache), "BORG_SECURITY_DIR": str(security)}
        borg = Borg(runtime, target, view, [mount], folders)
        try:
            yield Repository(target, client, mount, borg, identity, cache / identity, files)
        except BackupError as error:
            if isinstance(error, Stopped) or not error.message.startswith(store.name):
                raise
            listed = files
            with contextlib.suppress(S3Error):
                listed = listed_files(client)
            if files.keys() <= listed.keys():
                raise
            raise BackupError(
                f"{store.name}: another run changed the repository while it was read, which may be why this"
                f" failed: {error.message}",
                "Run it again.",
            ) from error


# ---------------------------------------------------------------------------------------------------- Check

# `borg check --max-duration` reads the segments one after another, compares each object in them with its
# checksum, and notes in the repository's config how far it came; one such pass may take many slices. What we
# know of it is a small JSON object beside the lease:

CHECK_KINDS = ("segments", "archives", "data")  # each sees what those before it see, and more
ROUND_SECONDS = 300  # borg notes its place only when it ends: so much is lost at most by an interruption
LAST_CHECKED = "last_segment_checked"  # in borg's config
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

    def unchecked_since(self, segments: Segments) -> datetime | None:
        """Since when the data that is unchecked for the longest time is so; None where there is no data.

        That is since the pass began that read it last, or since it was written, if none has.
        """
        since = []
        for number, (_, written) in segments.items():
            read = self.pass_began if number <= self.segment else self.checked_from
            since.append(max(written, read) if read else written)
        return min(since, default=None)

    def age(self, segments: Segments, now: datetime) -> str:
        since = self.unchecked_since(segments)
        if not since:
            return "there is no data to check"
        return f"the oldest unchecked data is {age(max(0.0, (now - since).total_seconds()))} old"


RECORD_TIMES = ("checked", "checked_from", "pass_began", "began", "damaged")
# Files of a repository that hold data: number, which grows with each that is written -> size in bytes, time.
Segments = Mapping[int, tuple[int, datetime]]


def age(seconds: float) -> str:
    """`3 days`, `5 hours`, `1 minute`: rounded down."""
    for name, unit in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= unit:
            return count(int(seconds // unit), name)
    return count(int(seconds), "second")


def last_check(repository: Repository) -> CheckRecord:
    """What is noted of the checks of a repository; an empty record where nothing is, or of another one."""
    note = read_note(repository.client, CHECKED_NAME)
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
        if note["repository"] == repository.identity:
            for name in RECORD_TIMES:
                note[name] = note[name] and datetime.fromisoformat(note[name]).astimezone(UTC)
            return CheckRecord(**{**note, "segment": int(note["segment"])})
    return CheckRecord(repository.identity)


def is_due(plan: CheckPlan, began: datetime | None, now: datetime) -> bool:
    since = (now - began).total_seconds() if began else math.inf
    return not plan.every or since >= EARLY * CHECK_PERIODS[plan.every]


def before_check(record: CheckRecord, position: int, now: datetime) -> CheckRecord:
    """The record when a check begins, where borg would go on after the segment `position`; -1: anew."""
    # It is set back where somebody else went on, or we were interrupted before we noted what was found.
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
    if record.damaged and record.pass_began and record.damaged >= record.pass_began:
        return over
    over = dataclasses.replace(over, checked=now, checked_from=record.pass_began)
    if record.kind in CHECK_KINDS[CHECK_KINDS.index(kind) + 1 :]:  # this check does not see what that one saw
        return over
    return dataclasses.replace(over, damage="", damaged=None, kind="")


def check_repository(
    runtime: Runtime, repository: Repository, plan: CheckPlan, verify_data: bool = False
) -> CheckRecord:
    """Checks a slice of a repository, or everything; damage, older one too, is in the record that it returns.

    Raises BackupError where it could not be checked, and Stopped: the next slice goes on from there.
    """
    name, borg, path = repository.target.store.name, repository.borg, str(repository.mount.path)
    start, began, position, damage = time.monotonic(), repository.client.clock, -1, ""

    def clock() -> datetime:  # the server's, without asking it again
        return began + timedelta(seconds=time.monotonic() - start)

    runtime.console.info(name, "borg check begins")
    kind, options = ("data", ["--verify-data"]) if verify_data else ("archives", [])
    if plan.seconds is not None:
        kind, position, damage = "segments", borgs_position(repository), missing_segments(runtime, repository)
    record = before_check(last_check(repository), position, clock())
    if record.segment < position:
        borg.run(["config", path, LAST_CHECKED, str(record.segment)])
    is_over = False
    while not is_over:  # a slice's place is noted now and then; it ends in time, or with the pass
        if plan.seconds is not None:
            left = min(ROUND_SECONDS, start + plan.seconds - time.monotonic())
            options = ["--repository-only", "--max-duration", str(max(1, round(left)))]
        result = borg.run(["check", "--info", "--progress", *options, path])
        if result.verdict is not Verdict.OK:
            damage = damage or result.reason(1)
        position = borgs_position(repository) if kind == "segments" else -1
        record = after_check(record, position, damage, kind, clock())
        is_over = position < 0 or time.monotonic() > start + plan.seconds
        record = dataclasses.replace(record, began=began if is_over else record.began)
        repository.mount.lease.write(write_note, CHECKED_NAME, dataclasses.asdict(record))
    segments = segments_of(runtime, repository)
    total = size(sum(size_bytes for size_bytes, _ in segments.values()))
    done = sum(size_bytes for number, (size_bytes, _) in segments.items() if number <= record.segment)
    extent = f"{size(done)} of {total} in this pass" if record.pass_began else f"all {total}"
    found = f"{'' if record.damage else 'no '}damage was found; {record.age(segments, clock())}"
    runtime.console.info(name, f"checked {extent}, in {duration(time.monotonic() - start)}: {found}")
    return record


def borgs_position(repository: Repository) -> int:
    found = re.search(rf"^{LAST_CHECKED} = ([0-9]+)$", read_config(repository.mount)[0], re.MULTILINE)
    return int(found[1]) if found else -1


def missing_segments(runtime: Runtime, repository: Repository) -> str:
    """The segments that the repository's index counts on and that are not there: borg's slices miss that."""
    hints = repository.borg.run(["debug", "dump-hints", str(repository.mount.path), "-"]).output
    used = {int(number) for number, objects in json.loads(hints)["segments"].items() if objects}
    missing = sorted(used - segments_of(runtime, repository).keys())
    names = first_of([str(number) for number in missing])
    return f"{count(len(missing), 'segment')} with data missing from the bucket: {names}" if missing else ""


def segments_of(runtime: Runtime, repository: Repository) -> Segments:
    """The segments of a mounted repository: the files `data/FOLDER/NUMBER`."""
    mount = repository.mount
    found = mount.files(mount.path / "data")
    return {
        int(number): (size_bytes, datetime.fromtimestamp(written, UTC))
        for name, (size_bytes, written) in found.items()
        if (number := name.rpartition("/")[2]).isdigit()
    }


def expect_sound(repository: Repository, record: CheckRecord) -> None:
    """Raises BackupError for damage that no later check has found repaired."""
    if record.damage:
        when = f" (found {record.damaged:%Y-%m-%dT%H:%M:%SZ})" if record.damaged else ""
        raise BackupError(
            f"{repository.target.store.name}: the repository is damaged: {record.damage}{when}",
            DAMAGE_HELP.format(name=repository.target.name),
        )


def check_if_due(runtime: Runtime, repository: Repository) -> None:
    """Checks a repository as its target's `check` says. Raises BackupError, also for older damage."""
    if not (plan := repository.target.check):
        return
    record, now = last_check(repository), repository.client.clock
    if is_due(plan, record.began, now):
        record = check_repository(runtime, repository, plan)
    else:
        words = f"no check is due; {record.age(segments_of(runtime, repository), now)}"
        runtime.console.info(repository.target.store.name, words)
    expect_sound(repository, record)


# --------------------------------------------------------------------------------------------------- Backup


def run_backup(runtime: Runtime, targets: Sequence[Target]) -> int:
    """One backup of the source to `targets`; prints what happens and returns the exit code.

    Raises BackupError when no target could even be tried, Stopped after everything is undone.
    """
    what = f"backup of {runtime.settings.origin} to {count(len(targets), 'target')}"
    names = [target.name for target in targets]
    runtime.console.info("run", what, "run_started", version=VERSION, targets=names)
    if runtime.settings.source_metadata:
        words = "SOURCE_METADATA is not needed any more: user metadata is archived with all other headers"
        runtime.console.info("run", words)
    runs = [TargetRun(runtime, target) for target in targets]
    try:
        found, *checks = preflight(runtime, targets)
        if isinstance(found, BackupError):
            raise found
        for run, check in zip(runs, checks, strict=True):
            run.check = check
        if all(isinstance(check, BackupError) for check in checks):  # a large source is not listed in vain
            for run in runs:
                run.attempt(run.back_up, None)
        else:
            with listed_source(runtime, found) as source:
                back_up_all(runtime, source, runs)
        runtime.stop.check()
    finally:
        conclude(runtime, runs, RUN_COLUMNS)
    return overall(runs)


def preflight(runtime: Runtime, targets: Sequence[Target]) -> list[Preflight | BackupError]:
    """Examines the source and all targets at the same time; the source's result is the first."""
    stores = [runtime.settings.source, *(target.store for target in targets)]
    clients = [S3Client(store, stop=runtime.stop) for store in stores]
    checks = [functools.partial(examine_for_run, runtime, each) for each in clients]
    *found, copies = side_by_side([*checks, lambda: find_copies(runtime, targets)], runtime.stop)
    return [copies.get(store.target, result) for store, result in zip(stores, found, strict=True)]


def examine_for_run(runtime: Runtime, client: S3Client) -> Preflight:
    store = client.store
    found = examine(client, write=store.target is not None)
    if store.target and found.repository_state(store) is RepositoryState.READY:
        expect_part(runtime, store, found.names(store))
    return found


def find_copies(runtime: Runtime, targets: Sequence[Target]) -> dict[str, BackupError]:
    """An error for each of `targets` whose repository has the id of one before it in the configuration.

    borg keeps one cache for both, and takes the one for a manipulated version of the other.
    """

    def identity(target: Target) -> str:
        patience = Patience() if target in targets else BRIEF
        client = S3Client(target.store, patience=patience, stop=runtime.stop)
        answer = client.find(f"{target.store.key_prefix}config")
        found = CONFIG_ID.search(answer.body.decode("utf-8", "replace")) if answer else None
        return found[1] if found else target.name

    configured = runtime.settings.targets if len(runtime.settings.targets) > 1 else ()
    ids = side_by_side([functools.partial(identity, target) for target in configured], runtime.stop)
    first: dict[str, Target] = {}
    errors = {}
    for target, found in zip(configured, ids, strict=True):
        other = first.setdefault(found if isinstance(found, str) else target.name, target)
        if other is not target:
            words = f"its repository has the id of {other.store.name}'s: one is a copy of the other"
            hint = f"Point {target.store.setting('path')} at an empty place: a run makes a repository there."
            errors[target.name] = BackupError(f"{target.store.name}: {words}", hint)
    return errors


def back_up_all(runtime: Runtime, source: Source, runs: Sequence[TargetRun]) -> None:
    # Where a target got stuck, the source is mounted anew, too: it may be the one that does not move.
    store, region = source.client.store, source.client.region
    at_once = MemoryPlan(runtime.settings, runtime.memory_mb).targets_at_once
    given: Any = {"unlistable": source.unlistable, "listed_seconds": source.listed_seconds}
    while remaining := sorted((run for run in runs if run.is_to_be_tried), key=lambda run: run.tries):
        tries = sum(run.tries for run in runs)
        try:
            with mounted(runtime, store, region, read_only=True, **given) as mount:
                for start in range(0, len(remaining), at_once):
                    batch = remaining[start : start + at_once]
                    back_up_batch(runtime, source, mount, batch)
                    if any(run.is_to_be_tried for run in batch) or not (mount.is_alive and mount.usable):
                        break
        except BackupError as error:  # the source is lost for the targets of that time only
            if isinstance(error, Stopped) or tries == sum(run.tries for run in runs):
                raise
            runtime.console.warning("source", str(error))


def back_up_batch(runtime: Runtime, source: Source, mount: Mount, batch: Sequence[TargetRun]) -> None:
    beside, names = source.catalog.path.parent, [run.name for run in batch]
    with (
        full_disk_told(source.client.store),
        tempfile.TemporaryDirectory(dir=beside, ignore_cleanup_errors=True) as folder,
        contextlib.closing(Feeder(runtime, source, mount, folder, names)) as feeder,
    ):
        work = []
        for run, fed in zip(batch, feeder.readers, strict=True):
            work.append(in_background(functools.partial(run.attempt, run.back_up, fed)))
            work[-1].add_done_callback(lambda _, fed=fed: feeder.left(fed))
        # Each sees stop signals by itself. But one that another thread gets is noted only when this one, the
        # main thread, goes on: so it must not sleep for long.
        for _ in waiting(*work):
            with contextlib.suppress(OSError):
                os.utime(beside)  # or another run might take it for a dead one's
        for each in work:
            each.result()


def maintain(runtime: Runtime, targets: Sequence[Target]) -> int:
    """Prunes, compacts and checks repositories without their source; returns the exit code."""
    runs = [TargetRun(runtime, target) for target in targets]
    try:
        for run in runs:
            while run.is_to_be_tried:
                run.attempt(run.maintain)
    finally:
        conclude(runtime, runs, MAINTENANCE_COLUMNS)
    return overall(runs)


# What an archive's comment begins with: before that time the source cannot have been listed.
SOURCE_AS_OF = "s3borgbackup: source as of "
WITH_MANIFEST = ", with manifest"  # and then one of its files is no object


@dataclass
class TargetRun:
    """The work on one target, and how it went: it has failed until its story is at its end."""

    runtime: Runtime
    target: Target
    check: Preflight | BackupError | None = None  # what S3 says of the store; None: not asked
    verdict: Verdict = Verdict.FAILURE
    reason: str = "was not run"
    numbers: dict[str, Any] = field(  # of the new archive, as they are told
        default_factory=lambda: {"archive": "", "objects": 0, "bytes": 0, "new_bytes": 0}
    )
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)  # the reasons, where there are any
    failures: list[str] = field(default_factory=list)  # what fails it although its story goes on
    tries: int = 0
    stuck: str = ""  # how the first try ended

    @property
    def name(self) -> str:
        return self.target.store.name

    @property
    def is_to_be_tried(self) -> bool:
        return not self.tries or (self.tries == 1 and bool(self.stuck))

    def as_json(self) -> dict[str, Any]:
        result = {"name": self.target.name, "result": self.verdict.value, "reason": self.reason}
        return {**result, **self.numbers, "seconds": round(self.seconds, 3)}

    def info(self, *words: str, **details: Any) -> None:
        self.runtime.console.info(self.name, *words, **details)

    def warn(self, reason: str, *event: str, **details: Any) -> None:
        self.warnings.append(reason)
        self.runtime.console.warning(self.name, reason, *event, **details)

    def doubt(self, text: str) -> None:
        # It fails, but its story goes on, without pruning.
        self.failures.append(f"{self.name}: {text}")
        self.runtime.console.error(self.name, self.failures[-1])

    def attempt(self, work: Callable[..., None], *values: Any) -> None:
        """A try. Whatever goes wrong in it becomes its outcome, so that the other targets go on.

        A second try takes the lease as anybody else would, when it has expired: until then what the killed
        tigrisfs had sent may arrive, and would overwrite segments that have the same numbers. Raises Stopped.
        """
        start, runtime = time.monotonic(), self.runtime
        kept = {"seconds": self.seconds, "tries": self.tries + 1, "stuck": self.stuck}
        vars(self).update(vars(TargetRun(runtime, self.target, self.check, **kept)))
        if self.tries > 1:  # LEASE_WAIT is about other runs
            settings = dataclasses.replace(runtime.settings, lease_wait_seconds=None)
            self.runtime = dataclasses.replace(runtime, settings=settings)
        try:
            work(*values)
            if not self.failures:
                self.verdict = Verdict.WARNING if self.warnings else Verdict.OK
            self.reason = next(filter(None, self.failures or self.warnings), "")
        except Stopped:
            self.reason = "was stopped"
            raise
        except (BackupError, OSError) as error:
            self.verdict = Verdict.BUSY if isinstance(error, StillRunning) else Verdict.FAILURE
            self.reason = str(error)
            if isinstance(error, Hung) and self.tries == 1 and not runtime.stop.requested:
                self.stuck = error.message
                words = f"{self.stuck}; it is tried once more, with new mounts"
                runtime.console.warning(self.name, words, "stuck")
            else:
                runtime.console.error(self.name, self.reason)
        except Exception as error:
            self.reason = f"{self.name}: {type(error).__name__}: {DEFECT}"
            runtime.console.defect(self.name, error)
        finally:
            self.seconds += time.monotonic() - start
            if self.tries > 1:
                self.reason = f"tried twice, as it got stuck: {self.stuck}; {self.reason}".rstrip("; ")

    def back_up(self, fed: Fed) -> None:
        if isinstance(check := self.check, BackupError):
            raise check
        runtime, target, label = self.runtime, self.target, self.runtime.settings.label
        source, catalog, mount = fed.feeder.source, fed.feeder.catalog, fed.feeder.mount
        if self.tries > 1:  # a store that does not take writes any more is to be told in seconds
            check = preflight_one(runtime, target.store, write=True)
        client = S3Client(target.store, check.region, PROVEN, runtime.stop)
        with Lease(runtime, client, "a backup") as lease:
            is_new = prepare_repository(runtime, target, client, lease)
            with writable(runtime, target, client, lease, [mount]) as repository:
                mount.wait_until_usable()
                if is_new:  # `borg init` made an empty files cache
                    catalog.note_archive(repository.cache.name, label, 0, 0.0)
                else:
                    check_encryption(runtime, repository)
                self.create_archive(repository, fed)
                archive, objects = self.numbers["archive"], self.numbers["objects"]
                is_good = bool(objects and not self.failures)
                is_known = is_good or (source.is_empty_part and not self.failures)
                is_pruned = self.is_like_last(repository, source) and is_good and bool(target.prune)
                self.keep_up(repository, is_pruned, is_pruned, f"the archive {archive} is stored")
            outlast_name(archive)
        if is_known:  # what comes after another one is to be compared with the last good one
            catalog.note_archive(repository.cache.name, label, objects)
        self.info(f"done: everything is uploaded to {target.store.location}")
        if target.encryption != "none" and (is_new or not check.holds(target.store, KEY_EXPORTED_NAME)):
            export = f"backup.py key-export {shlex.quote(target.name)}"
            self.info(f"its key was never exported; if that is lost, so is the backup: {export} prints it")

    def maintain(self) -> None:
        runtime, target, label = self.runtime, self.target, self.runtime.settings.label
        with opened_for_writing(runtime, target, "maintenance") as repository:
            check_encryption(runtime, repository)
            before = archives_of(repository)[1]
            newest, reason = newest_of(before, label), ""
            if target.prune and not newest:
                reason = f"no archive is called {label}-...; is BACKUP_LABEL that of the backups?"
            elif target.prune and newest.objects == 0:
                reason = f"the newest archive, {newest.name}, is empty; look at the source first"
            if reason:
                self.warn(f"nothing is pruned: {reason}")
            is_pruned = bool(target.prune and not reason)
            self.keep_up(repository, is_pruned, True, "it is pruned and compacted as asked")
            self.numbers["archives_before"] = len(before)
            self.numbers["archives_after"] = len(archives_of(repository)[1])
        self.info(f"done: everything is uploaded to {target.store.location}")

    def keep_up(self, repository: Repository, is_pruned: bool, is_compacted: bool, done: str) -> None:
        # Damage fails the target; what was `done` stands all the same.
        borg, path, target = repository.borg, repository.mount.path, self.target
        if is_pruned:
            result = borg.run(borg_prune(target, self.runtime.settings.label, path))
            self.warnings += [""] * (result.verdict is Verdict.WARNING)
            first_words = [line.partition(" archive")[0] for line in result.infos]
            gone, kept = first_words.count("Pruning"), first_words.count("Keeping")
            self.info(f"pruned {count(gone, 'archive')}, kept {kept:,}", "pruned", pruned=gone, kept=kept)
        if is_compacted and target.compact_percent is not None:
            result = borg.run(borg_compact(target, path))
            self.warnings += [""] * (result.verdict is Verdict.WARNING)
            for line in filter(lambda line: line.startswith("compaction freed"), result.infos):
                self.info(line)
        try:
            check_if_due(self.runtime, repository)
        except (Stopped, Stuck):
            raise
        except BackupError as error:
            self.failures.append(f"{done}, but {error}")
            self.runtime.console.error(self.name, str(error))

    def create_archive(self, repository: Repository, fed: Fed) -> None:
        self.info("borg create begins")
        source, label, path = fed.feeder.source, self.runtime.settings.label, repository.mount.path
        as_of, files = source.clock - timedelta(seconds=RACE_SECONDS), repository.cache / "files"
        if files.exists():  # what is older than this borg knows; else it is as old as the file
            sql = "SELECT max(as_of) FROM archives WHERE repository = ?"
            [[noted]] = source.catalog.execute(sql, [repository.cache.name])
            since = files.stat().st_mtime if noted is None else noted
        else:
            volume = "docker run --volume s3borgbackup-cache:/cache keeps it"
            self.info(f"borg's cache is not there, and all is read again: {volume}")
            since = -math.inf
        fed.prepare(since, as_of)
        comment = f"{SOURCE_AS_OF}{source.clock:%Y-%m-%dT%H:%M:%SZ}{WITH_MANIFEST}"
        try:
            created = repository.borg.run(borg_create(self.target, label, path, comment), fed)
        except BackupError as error:
            if isinstance(error, (Stopped, Stuck)) or not fed.failure:
                raise
            raise fed.failure from None
        finally:
            fed.feeder.left(fed)
        archive = json.loads(created.output)["archive"]
        name, stats = archive["name"], archive["stats"]
        objects, packed = stats["nfiles"] - 1, stats["compressed_size"]
        archived, new = stats["original_size"] - fed.manifest_bytes, stats["deduplicated_size"]
        self.numbers = {"archive": name, "objects": objects, "bytes": archived, "new_bytes": new}
        text = f"archive {name}: {count(objects, 'object')}, {size(archived)}, {size(packed)} compressed"
        text += f", {size(new)} new in the repository"
        self.info(text, "archive_created", compressed_bytes=packed, **self.numbers)
        self.judge_archive(fed)
        if any(msgid for msgid, _ in created.warnings.named):  # what has none does not change its exit code
            self.warnings.append("")
        if lost := fed.files - stats["nfiles"]:
            what = f"{count(abs(lost), 'object')} {'less' if lost > 0 else 'more'} than borg was told of"
            self.doubt(f"the archive holds {what}. Run it again.")
        source.catalog.note_archive(repository.cache.name, label, None, as_of.timestamp())

    def judge_archive(self, fed: Fed) -> None:
        console, feeder, location = self.runtime.console, fed.feeder, self.runtime.settings.origin
        if fed.lacks.count:  # some objects, or is the source gone, or its keys revoked?
            examine(feeder.client, write=False)
        if not self.numbers["objects"]:
            if feeder.catalog.total("size > 0 OR substr(key, -1) != X'2F'")[0]:  # more than mere folders
                what = f"the archive {self.numbers['archive']} is empty, and {location} was not"
                raise BackupError(f"{self.name}: {what}", "Run it again; nothing was pruned.")
            if not feeder.source.is_empty_part:
                self.warn(f"the source {location} lists no objects; nothing was pruned")
        for found in (fed.lacks, feeder.mixed):
            for key, reason in found.named:
                console.warning(self.name, f"{key!r} is not, or not whole, in the archive: {reason}")
            if found.more:
                console.warning(self.name, f"{found.more:,} more such objects")
        if lacks := fed.lacks.count + feeder.mixed.count:
            self.warnings.append(f"the archive lacks {count(lacks, 'object')}")
        if fed.vanished:
            names = first_of(list(map(repr, fed.vanished)))
            self.info(f"deleted before it was read, and so not in the archive: {names}")
        # Older archives may hold what could not be read, and must outlive that. But S3's refusal (cold
        # storage) lasts until a person acts: pruning must not wait for that (where S3 suddenly refuses very
        # many, the archive has shrunk), nor for an object that is overwritten in every night's run.
        if fed.unread:
            self.doubt(
                f"{count(fed.unread, 'object')} of the source could not be read (named above). Nothing is"
                " pruned, as older archives may hold these. Run it again; if it stays so, look at them."
            )
        if feeder.doubt:
            words = "whether objects were overwritten while they were read is not known"
            self.doubt(f"{words}, and nothing is pruned: {feeder.doubt}")
        for key in sorted(feeder.mount.log.shrunk):  # what became shorter borg sees end early, with no error
            self.warn(f"{key!r} was overwritten while it was read: it is incomplete in this archive")

    def is_like_last(self, repository: Repository, source: Source) -> bool:
        # Else the source may be wrong. This warns of it once: the next archive is compared with this one.
        settings, objects = self.runtime.settings, self.numbers["objects"]
        sql = "SELECT objects FROM archives WHERE repository = ? AND label = ?"
        [[last]] = source.catalog.execute(sql, [repository.cache.name, settings.label])
        if last is None and settings.shrink_percent:
            options = ["--last", "2", "--glob-archives", archive_pattern(settings.label)]
            before, *made = archives_of(repository, *options)[1]
            last = before.objects if made else None
        was_emptied = source.is_empty_part and last and settings.shrink_percent
        if not was_emptied and not has_shrunk(objects, last or 0, settings.shrink_percent):
            return True
        reason = (
            f"the archive has {count(objects, 'object')}, the one before it {last:,}:"
            f" is {settings.origin} what you want to back up? nothing was pruned (SHRINK_WARNING)"
        )
        self.warn(reason, "shrunk", objects=objects, objects_before=last)
        return False


def has_shrunk(objects: int, last: int, percent: int) -> bool:
    # None at all is somebody else's business.
    return percent > 0 and objects > 0 and objects * 100 < last * (100 - percent)


def outlast_name(archive: str) -> None:
    # Until the second in an archive's name is over: whoever comes next needs another one.
    over = datetime.fromisoformat(archive[-len("2025-01-31T03:00:00") :]).timestamp() + 1
    time.sleep(min(1.0, max(0.0, over - time.time())))


RUN_COLUMNS = ("target", "result", "objects", "archived", "new stored", "duration", "archive")
MAINTENANCE_COLUMNS = ("target", "result", "archives", "duration")


def summary(runs: Sequence[TargetRun], columns: Sequence[str]) -> str:
    rows = [columns]
    for run in runs:
        numbers, archives = run.numbers, "-"
        if "archives_after" in numbers:
            archives = "{archives_after:,} of {archives_before:,}".format(**numbers)
        cells = {
            "target": run.target.name,
            "result": run.verdict.value,
            "archives": archives,
            "objects": f"{numbers['objects']:,}",
            "archived": size(numbers["bytes"]),
            "new stored": size(numbers["new_bytes"]),
            "duration": duration(run.seconds),
            "archive": numbers["archive"] or "-",
        }
        rows.append([cells[name] for name in columns])
    reasons = [f"{run.target.name}: {run.reason}" for run in runs if run.reason]
    return "\n".join([*table(rows), *reasons])


def conclude(runtime: Runtime, runs: Sequence[TargetRun], columns: Sequence[str]) -> None:
    report, console = runtime.report, runtime.console
    report.targets = [run.as_json() for run in runs]
    part = f"this is {runtime.settings.shard}" if runtime.settings.shard else ""
    report.table = "\n".join(filter(None, [summary(runs, columns), part, report.excluded]))
    if not console.as_json:
        console.plain(report.table)
        return
    for run, details in zip(runs, report.targets, strict=True):
        run.info(run.reason or run.verdict.value, "target_finished", **details)


def overall(runs: Sequence[TargetRun]) -> int:
    verdicts = {run.verdict for run in runs}
    return next((code for verdict, code in EXIT_CODES.items() if verdict in verdicts), EXIT_OK)


@dataclass(frozen=True)
class Source:
    client: S3Client
    clock: datetime  # the server's, before it was listed
    catalog: Catalog
    unlistable: Collection[str]  # folders that TigrisFS cannot list
    is_empty_part: bool  # other parts have objects
    listed_seconds: int  # how long TigrisFS keeps what it has listed


@contextlib.contextmanager
def listed_source(runtime: Runtime, found: Preflight) -> Iterator[Source]:
    """The source's listing, with the headers that the last one knows; it is kept for the next run.

    What is wrong with the last one, or with its place, is told, and costs requests.
    """
    console, kept = runtime.console, own_cache(runtime.environ, runtime.settings.source)
    if shard := runtime.settings.shard:
        kept = kept.with_name(f"{kept.name}-{shard.dashed}")
    kept = kept.with_suffix(".catalog")
    folder = kept.with_suffix(f".{runtime.run_id}")
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            for old in kept.parent.glob(f"{kept.stem}.*/"):  # runs that were killed have left them
                with contextlib.suppress(OSError):
                    if time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
                        shutil.rmtree(old, ignore_errors=True)
            source = list_source(runtime, found, folder, kept)
        except (CatalogError, OSError) as error:
            words = "the catalog is not kept, and all headers are asked for again"
            console.warning("source", f"{words}: {error}")
            with contextlib.suppress(OSError):
                os.truncate(folder / "catalog", 0)  # borg needs the room
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX)))
            kept = folder / "kept"
            source = list_source(runtime, found, folder, kept)
        try:
            yield source
        finally:
            try:
                if kept.exists():  # another run may have noted archives meanwhile
                    source.catalog.take_over(kept)
                source.catalog.close()
                source.catalog.path.replace(kept)
            except (CatalogError, OSError) as error:
                console.warning("source", f"the catalog is not kept: {error}")


def list_source(runtime: Runtime, found: Preflight, folder: Path, kept: Path) -> Source:
    console, catalog = runtime.console, Catalog(folder / "catalog")
    client = S3Client(runtime.settings.source, found.region, PROVEN, runtime.stop)
    catalog.add(objects_of(runtime, client, found))
    unlistable = catalog.unlistable()
    catalog.hide(unlistable)
    try:
        if kept.exists():
            catalog.take_over(kept)
    except CatalogError as error:
        unusable = kept.with_suffix(".unusable")
        kept.replace(unusable)
        words = f"it is made anew, and all headers are asked for; the old one is {unusable.name} now"
        console.warning("source", f"{error.message}; {words}")
    if patterns := runtime.settings.exclude:  # what a mount shows does not depend on it
        matched = catalog.exclude(patterns)
        number, size_bytes = catalog.total("excluded(key)")
        catalog.execute("DELETE FROM objects WHERE excluded(key)")
        runtime.report.excluded = f"excluded: {count(number, 'object')}, {size(size_bytes)}"
        console.info("source", runtime.report.excluded, "excluded", objects=number, bytes=size_bytes)
        for pattern in patterns:
            if pattern not in matched:
                console.info("source", f"EXCLUDE: no key matches {pattern!r}")
    number, size_bytes = catalog.total()
    text = f"lists {count(number, 'object')}, {size(size_bytes)}"
    text = f"{runtime.settings.shard}: {text}" if runtime.settings.shard else text
    console.info("source", text, "listed", objects=number, bytes=size_bytes)
    if new := heads_to_ask(runtime, catalog):
        console.info("source", f"headers to fetch: those of {count(new, 'object')}")
    is_empty_part = bool(runtime.settings.shard and found.keys and not number)
    listed_seconds = LONGEST_RUN_SECONDS
    if number > MANY_OBJECTS and not unlistable:  # until it is read
        listed_seconds = 60 + LARGEST_LISTED_FOLDER * size_bytes // number // SLOW_BYTES_PER_SECOND
    return Source(client, found.clock, catalog, unlistable, is_empty_part, listed_seconds)


def heads_to_ask(runtime: Runtime, catalog: Catalog) -> int:
    return catalog.total("facts IS NULL AND is_shown")[0] if runtime.settings.headers else 0


def list_shard(client: S3Client, shard: Shard, folder: str = "", depth: int = 0) -> Iterator[S3Object]:
    """What the folders of a part hold, and, as IS_FOLDER, whatever folders lie beside their objects.

    A folder at the depth that counts is listed in full, those above it level by level.
    """
    start = f"{client.store.key_prefix}{folder}"
    if depth == shard.depth:
        yield from client.list_objects(start)
        return
    is_own, folders = shard.has_folder(folder), set[str]()
    for each in client.list_objects(start, delimiter="/"):
        name, slash, _ = each.key[len(start) :].partition("/")
        if not slash and is_own:
            yield each
        elif slash and name not in folders:
            folders.add(name)
            yield S3Object(f"{start}{name}/", IS_FOLDER, EPOCH)
    for below in (f"{folder}{name}/" for name in sorted(folders)):
        if depth + 1 < shard.depth or shard.has_folder(below):
            yield from list_shard(client, shard, below, depth + 1)


def objects_of(runtime: Runtime, client: S3Client, found: Preflight | None = None) -> Iterator[S3Object]:
    """What the source lists, or a part of it, by the keys behind its prefix; `found` knows the beginning.

    Of a part, folders that are no objects come, too: a mount shows the whole source, where they hide objects
    of their names. So do keys that no XML holds, as they spoil the mount's listing, whosever they are.
    """
    prefix, entries = client.store.key_prefix, client.list_objects(client.store.key_prefix)
    if shard := runtime.settings.shard:
        bad = [each.key for each in (found.keys if found else ()) if NOT_IN_XML.search(each.key)]
        strange = (S3Object(key, IS_FOLDER, EPOCH) for key in bad)
        entries = itertools.chain(strange, list_shard(client, shard))
    elif found:
        rest = client.list_objects(prefix, where=found.following) if found.following else ()
        entries = itertools.chain(found.keys, rest)
    for number, each in enumerate(entries, 1):
        if not number % CATALOG_PAGE:
            runtime.console.progress(client.store.name, f"listing: {count(number, 'object')}")
        if key := each.key[len(prefix) :]:
            is_shown = is_showable(key, each.size_bytes)
            yield S3Object(key, each.size_bytes, each.last_modified, each.etag, is_shown)


HEAD_THREADS = 64
FETCHED_AT_ONCE = 16  # where nobody reads ahead
KNOWN_BYTES = 16 * 1024  # to pass an object that borg knows takes as long as to read so many

TAGS_REFUSED = "objects' tags may not be read (s3:GetObjectTagging), and are in no archive"


class Feeder(ReadAhead):
    """What all borgs of a batch are fed from.

    Objects' headers are asked for behind the reads, as the answer then proves what was read.
    """

    def __init__(self, runtime: Runtime, source: Source, mount: Mount, folder: str, names: list[str]) -> None:
        self.runtime, self.source, self.mount, self._folder = runtime, source, mount, folder
        self.catalog, self.client = source.catalog, source.client
        self.readers = [Fed(self, name) for name in names]
        self.mixed = Findings()  # what may have been archived as no version ever was
        self.read_again = set[str]()  # keys of what a borg did not know, though it should
        self.overwritten: dict[str, S3Object] = {}  # as they were listed
        self.is_unproven = False  # whether somebody reads what is not asked for afterwards
        self.doubt = ""  # why that could not be looked at again
        self._asking, self._fetching = (dataclasses.replace(self.client, is_direct=True) for _ in range(2))
        self._prefix = self.client.store.key_prefix
        self._refusals, self._tags_refused = 0, threading.Lock()
        self._choosing, self._writing = threading.Lock(), threading.Lock()
        # By key. A file goes when nobody has it any more: it is neither ahead of a borg nor told to one.
        self._fetched = weakref.WeakValueDictionary[str, Future[bytes]]()
        self._to_ask = self._without_headers()
        super().__init__(runtime, self._objects(), self.readers)
        heads = min(HEAD_THREADS, heads_to_ask(runtime, self.catalog))
        self._heads = [in_background(self._ask) for _ in range(heads)]
        for head in self._heads:
            head.add_done_callback(self._fail)

    def path(self, each: S3Object) -> str:
        return f"{self.mount.path}/{each.key.rstrip('/')}"

    def _objects(self) -> Iterator[Upcoming]:
        listed, known_until = dict[str, bool](), 0
        for number, each in enumerate(self.catalog.rows()):
            is_new = not (is_folder(each) or all(reader.knows(each) for reader in self._readers))
            if is_new and self.is_fetched(each):  # an empty one, too
                yield Upcoming("", max(each.size_bytes, 1), fetch=functools.partial(self.fetched, each))
                continue
            if is_new:
                folders = folders_of(each.key)
                listed = {name: listed[name] if name in listed else self._list(name) for name in folders}
                # Asked for an unknown key, TigrisFS lists a thousand from there on. Others ask after that.
                if not all(listed.values()) and number >= known_until:
                    with contextlib.suppress(OSError):
                        os.stat(self.path(each))
                    known_until = number + CATALOG_PAGE
            is_read = each.size_bytes and is_new
            if is_read and not (each.facts is None and self._heads):
                self.is_unproven = True
            yield Upcoming(self.path(each), each.size_bytes if is_read else 0)

    def is_fetched(self, each: S3Object) -> bool:
        """Whether a borg that does not know it gets what our client fetches, not what the mount has."""
        is_cheap = each.size_bytes or self.runtime.settings.headers  # where HEAD gives all
        return not each.is_shown or bool(each.is_small and is_cheap and not is_folder(each))

    def _list(self, folder: str) -> bool:
        # As a whole, where TigrisFS can keep it: so the kernel, too, hears of all entries with one answer.
        if folder in self.mount.unlistable:
            return True
        in_it = "key >= ? AND key < ?", below(folder)
        is_much = self.source.listed_seconds < LONGEST_RUN_SECONDS
        if is_much and self.catalog.total(*in_it)[0] > LARGEST_LISTED_FOLDER:
            return False
        with contextlib.suppress(OSError), os.scandir(f"{self.mount.path}/{folder}") as found:
            for _ in found:  # TigrisFS asks for page after page
                self.moved += 1
        return True

    def _without_headers(self) -> Iterator[S3Object]:
        """What no headers came with, when all borgs have passed it and a page of others."""
        for page in pages(enumerate(self.catalog.rows(), 1)):
            if not self.wait_until_passed(page[-1][0]):
                return
            ends = [encode_key(each.key) for _, each in (page[0], page[-1])]
            yield from self.catalog.rows("facts IS NULL AND is_shown AND key BETWEEN ? AND ?", ends)

    def _ask(self) -> None:
        while True:
            with self._choosing:  # one of the threads waits, the others for that one
                if not (each := next(self._to_ask, None)):
                    return
            if self._refusals < MAX_NAMED:
                self._learn(each)
            self.moved += 1

    def _learn(self, each: S3Object) -> None:
        try:
            now = self._version(each, self._asking.request("HEAD", f"{self._prefix}{each.key}"))
            if (now.size_bytes, now.etag) != (each.size_bytes, each.etag):
                now = self._overwritten(each, now)
            self.catalog.note(dataclasses.replace(now, last_modified=each.last_modified))
            self._refusals = 0
        except (S3Error, CatalogError) as error:
            if isinstance(error, S3Error) and error.status == 404:  # it was deleted meanwhile
                return
            with self._changed:  # each number is somebody's: one of them tells
                self.is_unproven, self._refusals = True, self._refusals + 1
                number = self._refusals
            if number in (1, MAX_NAMED):
                many = "headers cannot be asked for, the archives lack those of new and changed objects"
                words = many if number > 1 else f"{each.key!r} is archived without its headers"
                self.runtime.console.warning("source", f"{words}: {error}")

    def _version(self, each: S3Object, answer: Answer) -> S3Object:
        size_bytes = int(answer.headers["content-length"])
        modified = answer.time("Last-Modified") or each.last_modified
        now = S3Object(each.key, size_bytes, modified, answer.etag, each.is_shown)
        if not self.runtime.settings.headers:
            return now
        facts: dict[str, Any] = {"headers": headers_of(answer)}
        if answer.has_tags and not self._tags_refused.locked():  # else that was told
            try:
                facts["tags"] = self.client.tags(f"{self._prefix}{each.key}")
            except S3Error as error:
                if error.status == 403 and self._tags_refused.acquire(blocking=False):
                    self.runtime.console.info("source", f"{TAGS_REFUSED}: {error.message}")
        if storage_class := answer.headers.get("x-amz-storage-class"):
            facts["storage_class"] = storage_class
        return dataclasses.replace(now, facts=facts)

    def _overwritten(self, each: S3Object, now: S3Object) -> S3Object:
        """What to note of an object that had another version when it was listed.

        Whoever has read it has the old one, the new one, or, where that took several requests, some of both.
        """
        self.overwritten.setdefault(each.key, each)
        is_read = any(reader.began and not reader.knows(each) for reader in self.readers)
        if not is_read and each.key not in self.read_again:
            return each  # and its headers belong to the version that the next run reads
        try:
            shown = within(MOUNT_SECONDS, f"source: {each.key!r}", lambda: os.stat(self.path(each)))
        except OSError as error:
            self.mixed.add(each.key, f"it was overwritten meanwhile, and {error.strerror}")
            return dataclasses.replace(now, etag="")
        was_rewritten = now.last_modified.timestamp() - shown.st_mtime > 1
        if shown.st_size != now.size_bytes:
            sizes = f"{shown.st_size:,} bytes are archived, it has {now.size_bytes:,}"
            self.mixed.add(each.key, f"it was overwritten meanwhile: {sizes}")
        elif was_rewritten and now.size_bytes > WHOLE_READ_BYTES:
            self.mixed.add(each.key, "it was overwritten meanwhile: what is archived may be of both versions")
        elif not was_rewritten:
            return now
        return dataclasses.replace(now, size_bytes=shown.st_size, etag="")

    def _new_file(self, path: str) -> str:
        # borg archives it by what follows the dot (the slashdot hack of its documentation).
        file = f"{tempfile.mkdtemp(dir=self._folder)}/./{path}"
        os.makedirs(os.path.dirname(file))
        return file

    def fetched(self, each: S3Object) -> Future[bytes]:
        """What borg is told of an object that our client fetches, for as long as somebody has the future."""
        with self._changed:
            if future := self._fetched.get(each.key):
                return future  # another thread is at it
            self._fetched[each.key] = future = Future()
        try:
            told = each.is_small and self._fetch_whole(each, each.size_bytes)
            future.set_result(told or self._fetch(each, future))
            self._fetching.patience = self.client.patience
        except BaseException as error:
            if isinstance(error, S3Error) and not 400 <= error.status < 500:
                self._fetching.patience = HASTY  # all that follow would wait as long for nothing
            future.set_exception(error)
        return future

    def _fetch_whole(self, each: S3Object, size_bytes: int) -> bytes:
        # One answer has all of one version. Nothing, where that is too large for it.
        span = {"Range": f"bytes=0-{size_bytes - 1}"} if size_bytes else {}
        method, start = "GET" if span else "HEAD", time.monotonic()
        try:
            answer = self._fetching.request(method, f"{self._prefix}{each.key}", headers=span)
            total = answer.headers.get("content-range") or answer.headers.get("content-length", "")
        except S3Error as error:
            if error.status != 416:
                raise
            total = "0"  # for all we know
        self.measure(start)
        total = total.rpartition("/")[2]
        if total.isdigit() and int(total) != size_bytes and int(total) <= WHOLE_READ_BYTES:
            return self._fetch_whole(each, int(total))  # it was overwritten
        if total != str(size_bytes) or len(answer.body) != size_bytes:
            return b""
        now = self._version(each, answer)
        if now.etag == each.etag:
            now = dataclasses.replace(now, last_modified=each.last_modified)
        elif each.is_shown:
            self.overwritten.setdefault(each.key, each)
            other, running = self.catalog.get(each.key), sum(reader.is_running for reader in self.readers)
            # Who is left behind fetches it later than the others.
            if len(self._readers) < running > 1 and other and other.facts and other.etag != now.etag:
                self.mixed.add(each.key, "it was overwritten meanwhile: the targets' archives differ")
        self.catalog.note(dataclasses.replace(now, last_modified=each.last_modified))
        path = self.path(each) if each.is_shown else f"/{odd_path(each.key)}"
        return told_of(path, now, answer.body)

    def _fetch(self, each: S3Object, keeper: object) -> bytes:
        file = self._new_file(odd_path(each.key))
        weakref.finalize(keeper, shutil.rmtree, file.partition("/./")[0], ignore_errors=True)
        with open(file, "wb") as stream:
            for answer in self._fetching.download(f"{self._prefix}{each.key}", each.size_bytes):
                stream.write(answer.body)
                self.moved += 1
        now = dataclasses.replace(self._version(each, answer), size_bytes=os.path.getsize(file))
        os.utime(file, (now.last_modified.timestamp(),) * 2)
        self.catalog.note(now)
        return told_of(file)

    def manifest(self, reader: Reader, vanished: Collection[str]) -> str:
        """Writes a manifest when all headers are there."""
        work = [self._walked, *self._heads]
        self.wait_until(reader, lambda: all(each.done() for each in work))
        for each in work:
            each.result()
        file, is_late = self._new_file(MANIFEST_PATH), self.is_left(reader)
        with self._writing, open(file, "w", encoding="ascii") as stream:
            # Others' headers were asked for before a late one has read.
            if (self.is_unproven or is_late) and self.runtime.settings.audit:
                try:
                    self._look_again()
                except S3Error as error:
                    self.doubt = str(error)
            for each in self.catalog.rows():
                if reader.knows(each) and each.key not in self.read_again:
                    each = self.overwritten.get(each.key, each)
                if each.key not in vanished:
                    stream.write(f"{manifest_line(each)}\n")
                    self.moved += 1
        return file

    def _look_again(self) -> None:
        for now in objects_of(self.runtime, self.client):
            self.moved += 1
            each = self.catalog.get(now.key) if now.size_bytes >= 0 else None
            if not each or not each.is_shown or (now.etag and not each.etag):  # that was noted before
                continue
            if self.is_fetched(each) and each.key not in self.read_again:  # or nobody has read it
                continue
            if (each.size_bytes, each.etag) != (now.size_bytes, now.etag):
                noted = self._overwritten(each, now)
                self.catalog.note(dataclasses.replace(noted, is_shown=True, facts=None))


MANIFEST = S3Object(MANIFEST_PATH, 0, EPOCH, is_shown=False)


def is_folder(each: S3Object) -> bool:
    return each.is_shown and each.key.endswith("/")


def told_of(path: str, known: S3Object | None = None, content: bytes | None = None) -> bytes:
    """What `be_fed` in BORG_ADDITIONS reads of a file."""
    facts = None
    if known:
        mode = stat.S_IFDIR | 0o755 if is_folder(known) else stat.S_IFREG | 0o644  # as TigrisFS shows them
        facts = mode, known.size_bytes, 1000 * microseconds(known.last_modified)
    length = None if content is None else len(content)
    return json.dumps([path, facts, length]).encode() + b"\n" + (content or b"")


class Fed(Reader):
    """One borg that is fed: what it was told of, and what has become of that."""

    def __init__(self, feeder: Feeder, name: str) -> None:
        super().__init__()
        self.feeder = feeder
        self.files = 0  # that its archive is to hold
        self.lacks, self.unread = Findings(), 0  # what it lacks, and how much of that S3 did not refuse
        self.vanished: dict[str, None] = {}  # keys
        self.failure: Exception | None = None  # of ours
        self.manifest_bytes = 0
        self._name, self._changed = name, threading.Condition()
        # What borg was told of and is not done with: number, object, what keeps its file.
        self._under_way: deque[tuple[int, S3Object, object]] = deque()
        self._behind = 0  # how many it was told of before these
        self._number = 0  # of the last object that it was told of, or is not to be
        self._unread: set[int] = set()  # numbers
        self._refusals = self._done_bytes = self._done_effort = 0

    def prepare(self, since: float, as_of: datetime) -> None:
        """For a borg that knows what is older than `since`, and may trust what is older than `as_of`."""
        self.since = since
        self.read_end, self._write_end = os.pipe()
        self.environment = {
            "S3BORGBACKUP_FED": str(self.read_end),
            "S3BORGBACKUP_TRUSTED_BEFORE": str(int(as_of.timestamp()) * 10**9),
        }
        total = self.feeder.catalog.total
        self._total = total()
        objects, size_bytes = total("modified >= ? OR NOT is_shown", [max(since, 0) * 10**6])
        self._effort = size_bytes + objects * SMALLEST_PLACE_BYTES + self._total[0] * KNOWN_BYTES

    def started(self, child: Child) -> None:
        os.close(self.read_end)
        self.feeder.began(self, self.since, child)
        in_background(self._feed)

    def moved(self) -> float:
        """A meter: it grows while borg waits for us, and we are at work or wait for another borg."""
        return 0 if self._under_way else self.feeder.moved + self.waited_seconds

    def take(self, event: Mapping[str, Any]) -> None:
        """What borg reports: how it went with one of the files, or how many are behind it."""
        with self._changed:
            place = event["number"] - self._behind
            if event["type"] == "fed_status":
                number, each, _ = self._under_way[place - 1]
                self._judge(number, each, event["status"])
                return
            passed = [self._under_way.popleft()[1] for _ in range(place)]
            self._behind += place
            self._tell_done()
            self._changed.notify_all()
        if passed:
            self._tell_progress(passed)

    def _judge(self, number: int, each: S3Object, status: str) -> None:
        if status in "AMC":  # it reads what it should know: another version, perhaps
            if self.knows(each):
                self.feeder.is_unproven = True
                self.feeder.read_again.add(each.key)
        elif status == "E" or not is_folder(each):
            self.files -= not is_folder(each)
            self._unread.add(number)

    def _tell_done(self) -> None:
        self.feeder.done(self, self._under_way[0][0] - 1 if self._under_way else self._number)

    def _feed(self) -> None:
        feeder = self.feeder
        try:
            with full_disk_told(feeder.client.store), open(self._write_end, "wb") as self._pipe:
                for number, each in enumerate(feeder.catalog.rows(), 1):
                    feeder.wait_until_near(self, number)
                    is_known = self.knows(each)
                    if feeder.is_fetched(each) and not is_known:
                        self._tell_fetched([(number, each)])
                    else:
                        known = each if is_known or is_folder(each) else None
                        self._tell(number, each, told_of(feeder.path(each), known))
                self._wait_until_done()
                self._fetch_unread()
                manifest = feeder.manifest(self, self.vanished)
                self.manifest_bytes = os.path.getsize(manifest)
                self._tell(self._number, MANIFEST, told_of(manifest))
                self._wait_until_done()
                self.unread += len(self._unread)  # of our own files, on a disk that fails
                self._pipe.write(b"null\n")  # this is the end
        except BrokenPipeError:
            pass  # borg has ended, and said why
        except Exception as error:  # without the end, borg makes no archive
            self.failure = error

    def _tell(self, number: int, each: S3Object, told: bytes, keeper: object = None) -> None:
        with self._changed:
            self._number = number
            self._under_way.append((number, each, keeper))
            self.files += not is_folder(each)
        self._pipe.write(told)
        self._pipe.flush()

    def _tell_fetched(self, objects: Sequence[tuple[int, S3Object]]) -> None:
        for number, each in objects:
            future = self.feeder.fetched(each)
            try:
                self._tell(number, each, future.result(), future)
            except BackupError as error:
                with self._changed:
                    self._number = number
                    self._tell_done()
                self._lack(each, error)

    def _lack(self, each: S3Object, error: BackupError) -> None:
        status = error.status if isinstance(error, S3Error) else 0
        if status == 404:
            self.vanished[each.key] = None
        elif status in REFUSALS:
            self._refusals += 1
            self.lacks.add(each.key, f"S3 refuses it: {error.code}{error.message.partition(error.code)[2]}")
        else:
            self.unread += 1
            self.lacks.add(each.key, f"{UNREAD}: {error.message}")

    def _fetch_unread(self) -> None:
        # What borg could not read, unless S3 refuses very many.
        unread, self._unread = self._unread, set()
        rows = self.feeder.catalog.rows() if unread else ()
        again = (pair for pair in enumerate(rows, 1) if pair[0] in unread)
        while some := list(itertools.islice(again, FETCHED_AT_ONCE)):
            if self._refusals < MAX_NAMED:
                fetch = [functools.partial(self.feeder.fetched, each) for _, each in some]
                kept = side_by_side(fetch, self.feeder.runtime.stop)
                self._tell_fetched(some)
                del kept
            else:
                self.lacks.count += len(some)
        self._wait_until_done()

    def _wait_until_done(self) -> None:
        with self._changed:
            while self._under_way:
                if self.child.ended.done():
                    raise BrokenPipeError
                self._changed.wait(POLL_SECONDS)

    def _tell_progress(self, passed: Sequence[S3Object]) -> None:
        # What borg knows is passed soon, and a small object takes longer than its bytes.
        for each in passed:
            is_new = not self.knows(each)
            self._done_bytes += each.size_bytes
            self._done_effort += KNOWN_BYTES + is_new * (SMALLEST_PLACE_BYTES + each.size_bytes)
        share = min(1.0, self._done_effort / max(1, self._effort))
        seconds, percent = (time.monotonic() - self.began) * (1 - share) / share, math.floor(share * 100)
        objects, size_bytes = self._total
        self.feeder.runtime.console.progress(
            self._name,
            f"{self.at[0]:,} of {count(objects, 'object')}, {size(self._done_bytes)} of {size(size_bytes)},"
            f" {percent} %, {duration(seconds)} left",
            objects=self.at[0],
            bytes=self._done_bytes,
            objects_total=objects,
            bytes_total=size_bytes,
            percent=percent,
            seconds_left=round(seconds),
        )


@dataclass(frozen=True)
class Archive:
    """An archive as `borg list` shows it; borg before 1.2 noted neither objects nor bytes."""

    name: str
    start: datetime  # for people, in their zone
    end: datetime
    as_of: datetime  # the source cannot have been listed before
    objects: int | None
    archived_bytes: int | None

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Archive:
        """From an entry of borg's JSON, which always has the name and the time."""
        name, comment = entry["name"], entry.get("comment", "")
        start, end = (borg_time(entry.get(key, entry["time"])).astimezone() for key in ("time", "end"))
        as_of = borg_time(entry["time"]) - timedelta(seconds=CLOCK_ERROR_SECONDS)
        noted = comment.removesuffix(WITH_MANIFEST).partition(SOURCE_AS_OF)[2]
        with contextlib.suppress(ValueError):
            as_of = datetime.fromisoformat(noted).astimezone(UTC)
        # borg names an archive a moment before it notes when that began, and people go by the name. It has
        # the local time, which is there twice when clocks are set back.
        with contextlib.suppress(ValueError):
            named = datetime.fromisoformat(name[-len("2025-01-31T03:00:00") :]).replace(tzinfo=None)
            earlier = start.replace(tzinfo=None) - named
            start -= earlier if timedelta(0) <= earlier < timedelta(seconds=5) else timedelta(0)
        numbers = entry.get("nfiles"), entry.get("size")
        objects, archived_bytes = (number if isinstance(number, int) else None for number in numbers)
        if objects and comment.endswith(WITH_MANIFEST):
            objects -= 1
        return cls(name, start, end, as_of, objects, archived_bytes)

    def as_json(self) -> dict[str, Any]:
        times = {"start": self.start.isoformat(), "end": self.end.isoformat()}
        return {"name": self.name, **times, "objects": self.objects, "bytes": self.archived_bytes}


ONLY_NAMES = ("--format", "{archive}")  # and times, which cost no request for each archive


def archives_of(repository: Repository, *options: str) -> tuple[str, list[Archive]]:
    """The encryption mode, and the archives, oldest first: a request for each, but for ONLY_NAMES."""
    details = "{archive}{time}{end}{comment}{nfiles}{size}"  # the last two: see BORG_ADDITIONS
    words = ["list", "--json", "--format", details, *options, str(repository.borg.repository)]
    listed = json.loads(repository.borg.run(words).output)
    return listed["encryption"]["mode"], [Archive.parse(entry) for entry in listed["archives"]]


def newest_of(archives: Sequence[Archive], label: str) -> Archive | None:
    pattern = archive_pattern(label)
    return next((each for each in reversed(archives) if fnmatch.fnmatchcase(each.name, pattern)), None)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


# ----------------------------------------------------------------------------------------------- Operations


def local_time(when: datetime) -> str:
    """A time for people: as archives' names have it, and with its zone."""
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S %z}"


def emit(text: str, must_arrive: bool = False) -> None:
    """Prints a command's answer; that nobody reads it to its end is no error by itself."""
    try:
        for line in text.splitlines():
            print(printable(line), flush=True)
    except OSError as error:
        if must_arrive or not isinstance(error, BrokenPipeError):
            words = f"the answer could not be written: {error.strerror}"
            raise BackupError(words, "Make room for it, and ask again.") from None


KEY_CODES = ("NoKeys", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


def check_config(runtime: Runtime) -> int:
    """Asks every store for all that a run needs; changes nothing but probes that it deletes again."""
    settings, console, failures = runtime.settings, runtime.console, dict[str, list[str]]()
    examinations = [functools.partial(examination, runtime, store) for store in settings.stores]
    *found, copies = side_by_side(
        [*examinations, lambda: find_copies(runtime, settings.targets)], runtime.stop
    )
    is_ready = not any(isinstance(result, BackupError) for points in found for _, result in points)
    slow = {each.compression: each for each in settings.targets if not QUICK.fullmatch(each.compression)}
    costs = {
        name: side_by_side([functools.partial(compare_compressions, runtime, target)], runtime.stop)[0]
        for name, target in slow.items()
        if is_ready
    }
    for target, points in zip(settings.targets, found[1:], strict=True):
        if cost := costs.get(target.compression):  # a run does without this
            points.append(("compression", cost if isinstance(cost, str) else f"not measured: {cost}"))
    rows = [("store", "what", "result")]
    for store, points in zip(settings.stores, found, strict=True):
        if error := copies.get(store.target):
            points.append(("repository", error))
        rows.append((store.name, "location", f"{store.location} at {store.endpoint}"))
        for what, result in points:
            if isinstance(result, BackupError):
                failures.setdefault(str(result), []).append(what)
                result = f"failed: {getattr(result, 'code', '') or 'see below'}"
            rows.append(("", what, result))
    console.plain("\n".join(table(rows)))
    for failure, points in failures.items():
        console.error("check-config", f"{', '.join(points)}: {failure}")
    return EXIT_FAILURE if failures else EXIT_OK


def examination(runtime: Runtime, store: Store) -> list[tuple[str, str | BackupError]]:
    """What a store lets us do, point by point: words, or the error that a run would meet."""
    client, points = S3Client(store, stop=runtime.stop), list[tuple[str, str | BackupError]]()

    def ask(what: str, question: Callable[[], object]) -> bool:
        try:
            points.append((what, str(question() or "ok")))
        except Stopped:
            raise
        except BackupError as error:
            points.append((what, error))
        return isinstance(points[-1][1], str)

    listed: Preflight | S3Error
    try:
        listed = look(client)
    except S3Error as error:
        listed = error

    def list_it() -> str:
        if isinstance(listed, S3Error):
            raise listed
        more = " or more" if listed.following else ""
        return f"ok, {count(len(listed.keys), 'object')}{more}, region {client.region}"

    def credentials() -> str:
        if isinstance(listed, S3Error) and listed.code in KEY_CODES:
            raise listed
        keys = store.keys()
        return f"{keys.origin}{f', until {keys.expires:%Y-%m-%dT%H:%M:%SZ}' if keys.expires else ''}"

    is_known = ask("reach", client.reach) & ask("credentials", credentials)
    if is_known and ask("list", list_it) and isinstance(listed, Preflight):
        found = listed
        if store.target:
            ask("repository", lambda: f"ok, holds {what_lies_there(runtime, client, found, True).value}")
        else:
            ask("read, ranges", lambda: probe_read(client, found))
            if found.keys and runtime.settings.headers:
                ask("tags", lambda: probe_tags(client, found.keys[0].key))
    if is_known and store.target and getattr(listed, "code", "") != "NoSuchBucket":
        key, body = f"{store.key_prefix}{PROBE_NAME}{secrets.token_hex(6)}", secrets.token_bytes(16)
        try:
            if ask("write", lambda: client.put(key, body) and None):
                ask("read, ranges", lambda: read_back(client, key, body))
                ask("conditional writes", lambda: probe_conditions(client, key, body))
            ask("multipart", lambda: probe_multipart(client, key, body))
        finally:  # also after a stop signal
            ask("delete", lambda: client.delete(key))
    return points


QUICK = re.compile(r"(auto,)*(none|lz4|zstd(,[1-6])?)")  # compressions that cost little
COMPARED_WITH = "zstd,3"
SAMPLES_BYTES = 4_000_000, 100_000_000  # of the source's first objects; a second one where the first is quick
QUICK_SECONDS = 2


def compare_compressions(runtime: Runtime, target: Target) -> str:
    """What a target's compression costs against a quick one: both archive the source's first objects here."""
    runtime.console.progress(target.store.name, f"{target.compression} is compared with {COMPARED_WITH}")
    client = S3Client(runtime.settings.source, stop=runtime.stop)
    objects = look(client).keys
    with full_disk_told(target.store):
        for most_bytes in SAMPLES_BYTES:
            with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
                if not (total := fetch_sample(client, objects, most_bytes, Path(folder, "sample"))):
                    return "ok"
                tries = target.compression, COMPARED_WITH
                results = [archive_sample(runtime, target, each, Path(folder)) for each in tries]
            if total < most_bytes or results[0][0] > QUICK_SECONDS:
                break
    words = [
        f"{name} archives {size(total / seconds)}/s and leaves {100 * stored / total:.0f} %"
        for name, (seconds, stored) in zip(tries, results, strict=True)
    ]
    return f"{', '.join(words)} (first {size(total)})"


def fetch_sample(client: S3Client, objects: Iterable[S3Object], most_bytes: int, folder: Path) -> int:
    """Fetches the first objects, cold ones aside, into files; returns how many bytes."""
    pieces, left = [], most_bytes
    folder.mkdir()
    for each in objects:
        for first in range(0, min(each.size_bytes, left), LARGEST_PIECE_BYTES):
            end = min(first + LARGEST_PIECE_BYTES, each.size_bytes, first + left)
            pieces.append(functools.partial(client.get, each.key, (first, end - 1)))
            left -= end - first
    for start in range(0, len(pieces), FETCHED_AT_ONCE):
        for number, content in enumerate(side_by_side(pieces[start:][:FETCHED_AT_ONCE], client.stop), start):
            if isinstance(content, bytes):
                Path(folder, str(number)).write_bytes(content)
    return sum(path.stat().st_size for path in folder.iterdir())


def archive_sample(runtime: Runtime, target: Target, compression: str, folder: Path) -> tuple[float, int]:
    """Archives a sample in a repository of its own: the seconds that takes, and the bytes that remain."""
    repository, kept = folder / compression, ("CACHE", "CONFIG", "SECURITY")
    folders = {f"BORG_{kind}_DIR": f"{folder}/{kind} {compression}" for kind in kept}
    borg = Borg(runtime, dataclasses.replace(target, encryption="none"), repository, folders=folders)
    borg.run(["init", "--encryption", "none", str(repository)])
    place = f"{repository}::sample", f"{folder}/sample"
    created = borg.run(["create", "--json", "--compression", compression, *place])
    archive = json.loads(created.output)["archive"]
    return max(archive["duration"], 0.001), archive["stats"]["compressed_size"]


def probe_tags(client: S3Client, key: str) -> str:
    try:
        dataclasses.replace(client, patience=HASTY).tags(key)
    except S3Error as error:
        return f"{TAGS_REFUSED}: {error.code}" if error.status == 403 else f"not known here: {error.code}"
    return "ok"


def probe_conditions(client: S3Client, key: str, body: bytes) -> str:
    try:
        client.put(key, body, IF_ABSENT)
    except S3Error as error:
        if error.status == 412:
            return "ok"
        if not refuses_conditions(error):
            raise
    return "not known here: see to it that only one run works on the repository at a time"


def probe_multipart(client: S3Client, key: str, body: bytes) -> None:
    upload = [("uploadId", xml_text(client.request("POST", key, [("uploads", "")]).body, "UploadId"))]
    try:
        part = completed_part(1, client.put(key, body, query=[("partNumber", "1"), *upload]).etag)
        client.request("POST", key, upload, body=completion([part]))
    except S3Error:
        with contextlib.suppress(S3Error):
            client.request("DELETE", key, upload)
        raise


Shown = tuple[dict[str, Any], list[tuple[str, ...]]]  # as JSON, and as a table


def show(
    runtime: Runtime, targets: Sequence[Target], as_json: bool, ask: Callable[[Runtime, Repository], Shown]
) -> int:
    """Prints what `ask` says of each repository; an error does not keep the others from their answers."""
    tables, document, code = [], {}, EXIT_OK
    for target in targets:
        try:
            with opened_for_reading(runtime, target) as repository:
                document[target.name], rows = ask(runtime, repository)
            tables.append("\n".join(table(rows)))
        except Stopped:
            raise
        except BackupError as error:
            runtime.console.error(target.store.name, str(error))
            document[target.name], code = {"error": str(error)}, max(code, error.exit_code)
    emit(json.dumps(document, indent=2) if as_json else "\n\n".join(tables))
    return code


def archives_shown(_: Runtime, repository: Repository) -> Shown:
    rows, archives = [("target", "archive", "time", "objects", "size")], archives_of(repository)[1]
    for each in archives:
        numbers = f"{each.objects or 0:,}", size(each.archived_bytes or 0)
        rows.append((repository.target.name, each.name, local_time(each.start), *numbers))
    rows += [] if archives else [(repository.target.name, "-", "-", "-", "-")]
    return {"archives": [each.as_json() for each in archives]}, rows


KEY_PLACES = {
    "none": "whoever can read the bucket can read the backup",
    "keyfile": "the key is in /config only",
    "authenticated": "not encrypted; the key, which authenticates, is in the repository",
}


def repository_shown(runtime: Runtime, repository: Repository) -> Shown:
    store, client, label = repository.target.store, repository.client, runtime.settings.label
    name, (encryption, archives) = repository.target.name, archives_of(repository)
    document, rows = {}, []

    def add(title: str, text: str, **values: Any) -> None:
        rows.append((title, text))
        document.update(values)

    add("target", name, target=name)
    add("location", f"{store.location} at {store.endpoint}", endpoint=store.endpoint, location=store.location)
    add("repository", repository.identity, repository_id=repository.identity)
    key_place = KEY_PLACES.get(encryption.removesuffix("-blake2"), "the key is in the repository")
    add("encryption", f"{encryption}: {key_place}", encryption=encryption)
    exported = str(read_note(client, KEY_EXPORTED_NAME).get("exported", ""))
    never = "there is none" if encryption == "none" else f"never: backup.py key-export {shlex.quote(name)}"
    add("key exported", exported or never, key_exported=exported or None)
    # What the archives would take one by one, without deduplication and compression.
    archived_bytes = sum(archive.archived_bytes or 0 for archive in archives)
    text = f"{len(archives):,}, {size(archived_bytes)} in all"
    add("archives", text, archives=len(archives), archived_bytes=archived_bytes)
    stored_objects, stored_bytes = len(repository.files), sum(repository.files.values())
    text = f"{size(stored_bytes)}, {count(stored_objects, 'object')}"
    if archived_bytes > stored_bytes:
        text += f": deduplication and compression save {1 - stored_bytes / archived_bytes:.1%}"
    add("in the bucket", text, stored_objects=stored_objects, stored_bytes=stored_bytes)
    newest, text = newest_of(archives, label), "no archive has this label"
    if newest:
        what = f"{count(newest.objects or 0, 'object')}, {size(newest.archived_bytes or 0)}"
        took = duration((newest.end - newest.start).total_seconds())
        text = f"{local_time(newest.start)}: {what}, in {took}"
    add(f"last {label}", text, last_archive=newest.as_json() if newest else None)
    record, segments = last_check(repository), segments_of(runtime, repository)
    text = f"{record.checked:%Y-%m-%d %H:%M:%S %z}" if record.checked else "never, as far as is known"
    text = f"DAMAGED: {record.damage}" if record.damage else f"{text}; {record.age(segments, client.clock)}"
    add("last check", text, damage=record.damage or None)
    times = {"last_check": record.checked, "unchecked_since": record.unchecked_since(segments)}
    document |= {key: when.isoformat() if when else None for key, when in times.items()}
    lease = look_at_lease(client)
    in_use = str(lease) if lease and not lease.has_expired else None
    add("in use", in_use or "no", in_use=in_use)
    return document, rows


def export_key(runtime: Runtime, target: Target) -> int:
    """Prints a repository's key, and notes beside the repository that this was done."""
    name, console = target.store.name, runtime.console
    with opened_for_reading(runtime, target) as repository:
        exported = repository.borg.run(["key export", str(repository.borg.repository)])
        emit(exported.output, must_arrive=True)
        try:
            write_note(repository.client, KEY_EXPORTED_NAME, {"exported": utc_now(repository.client)})
        except S3Error as error:
            console.warning(name, f"that it was exported cannot be noted, and runs go on to remind: {error}")
    console.info(
        name, "keep this key where the passphrase is, and not with the backups: a restore takes both"
    )
    return EXIT_OK


# borg's commands; keys that may only read are enough for the first ones.
READING_COMMANDS = ("list", "diff", "extract", "export-tar")
CHANGING_COMMANDS = (
    *("benchmark", "break-lock", "check", "compact", "config", "create", "debug", "delete", "help"),
    *("import-tar", "info", "init", "key", "prune", "recreate", "rename", "upgrade", "version", "with-lock"),
)
REFUSED_COMMANDS = {
    "mount": "it goes on in the background; in a shell: backup.py mount target-{name}, then borg mount",
    "umount": "there is nothing to unmount; `backup.py mount` and `backup.py umount` go together",
    "serve": "it serves repositories to other machines; this one is in S3",
}
BORG_COMMANDS = (*READING_COMMANDS, *CHANGING_COMMANDS, *REFUSED_COMMANDS)


def run_borg(runtime: Runtime, target: Target, arguments: Sequence[str]) -> int:
    command = arguments[0]
    if command in REFUSED_COMMANDS:
        raise ConfigurationError([f"`borg {command}`: {REFUSED_COMMANDS[command].format(name=target.name)}"])
    opened = opened_for_reading if command in READING_COMMANDS else opened_for_writing
    with opened(runtime, target, f"`borg {command}`") as repository:
        return repository.borg.hand_over(arguments)


# -------------------------------------------------------------------------------------------------- Restore

# `borg extract` writes one file after the other, and knows neither what is there already nor what S3 got. So
# borg writes a tar file to a pipe, and threads write what comes out of it, into a folder, or by requests of
# our own into a bucket. A row of the plan, a file, has all that is known of an object: what the archive's
# list and manifest say, what lies where it goes, and what is to be done.

# What one object's name is to blame for, and not the place.
UNWRITABLE = (
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ELOOP, errno.EFBIG),
)
UNTAKEN_STATUSES = (400, 404, 405, 409, 414)  # the same of S3, unless it is a code that S3_HINTS knows

MIB = 1024 * 1024
PART_BYTES = 16 * MIB  # what is larger is uploaded in parts
MAX_PARTS, MAX_KEY_BYTES, MAX_OBJECT_BYTES = 10_000, 1024, 5 * 1024**4  # S3's limits
# The parts that others upload in, in MiB: ours, TigrisFS's, and what the SDKs and programs have by default.
COMMON_PARTS = (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512)

TAGGING = "x-amz-tagging"


def end_of_time(text: str) -> datetime:
    """The end of the day, minute or second that `text` names, in local time. Raises ValueError."""
    start = datetime.fromisoformat(text)
    if re.fullmatch(r"[0-9-]+", text):
        return (start + timedelta(days=1)).astimezone()  # days may have 23 or 25 hours
    is_minute = re.fullmatch(r".{10}.[0-9]{2}:?[0-9]{2}(Z|[+-][0-9:]+)?", text)
    return start.astimezone() + timedelta(seconds=60 if is_minute else 1)


def choose_archive(
    archives: Sequence[Archive], label: str, name: str | None, until: datetime | None = None
) -> tuple[Archive, str]:
    """The archive that is meant, and why that one."""
    known = [each for each in archives if fnmatch.fnmatchcase(each.name, archive_pattern(label))]
    which = f"the newest of label {label!r}" if known else "the newest of any label"
    known = known or list(archives)
    if name:
        known, which = [each for each in archives if each.name == name], f"the one named {name!r}"
    if until:
        known = [each for each in known if each.start < until]
        which += f" until {local_time(until - timedelta(seconds=1))}"
    if not known:
        hint = "The oldest archive is of {}; `backup.py list` shows what there is."
        hint = hint.format(local_time(archives[0].start)) if archives else "Run a backup first."
        raise BackupError(f"archive not found: {which}", hint)
    return known[-1], which


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
    key: str
    path: str  # in the archive; empty: there is nothing to be read of it
    size_bytes: int
    modified: int  # Unix time in seconds
    headers: Mapping[str, str] | None = None  # those that can be given to another object; None: not known
    tags: Mapping[str, str] = field(default_factory=dict)
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
# there is a copy, of kind `own`; one that a mount should have shown, and could not, may be in either place.
PLAN_ITEMS = (
    """
    INSERT OR IGNORE INTO objects SELECT substr(path, :start), size, modified * 1000000, '', 1, NULL
    FROM entries WHERE kind NOT IN ('d', 'own') AND path >= :low AND path < :high
    """,
    """
    INSERT INTO items (key, path, place, size, modified, etag, fate, warning)
    SELECT key, path, place, coalesce(entries.size, objects.size),
        CASE kind WHEN '-' THEN entries.modified ELSE objects.modified / 1000000 END,
        CASE WHEN path IS NULL OR (entries.size = objects.size AND (
            kind = 'own' OR entries.modified = objects.modified / 1000000
        )) THEN etag ELSE '' END,
        CASE WHEN kind IN ('-', 'own') OR (path IS NULL AND objects.size = 0) THEN 'unknown'
            ELSE 'left out' END,
        CASE WHEN path IS NULL AND objects.size > 0
            THEN 'is missing: the manifest has it, and the archive has not'
            WHEN kind NOT IN ('-', 'own') THEN 'is no plain file, and is left out'
            WHEN NOT is_whole THEN 'is damaged in the repository: parts of it are zeros' END
    FROM objects LEFT JOIN entries ON kind != 'd' AND path = coalesce(
        (SELECT path FROM entries WHERE path = odd_path(key)), CAST(:prefix || key AS BLOB)
    )
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
# ETags are opaque, that of a multipart upload depends on its parts: where both are known they are equal or
# not, and else the times are, in whole seconds, as HTTP and tar have them. A file gets its time when it is
# complete.
FIRST_FATES = """
UPDATE items SET fate = CASE
    WHEN there_size IS NULL OR (there_size = 0 AND size > 0) THEN 'write'
    WHEN there_size > size THEN 'different'
    WHEN there_size = size AND (size = 0 OR CASE WHEN '' IN (etag, there_etag)
        THEN there_modified = modified ELSE etag = there_etag END) THEN 'there'
    ELSE 'unknown' END
WHERE fate = 'unknown'
"""
# What is in a bucket: not a folder that an older archive has because nothing is in it.
COUNTED = "key IN (SELECT key FROM objects)"
# SeaweedFS may lose one of `a` and `a/b` for good where both are written at the same moment.
ABOVE_OTHERS = IS_COVERED.replace("objects", "items")
CLASHES, KEPT = "fate IN ('different', 'headers')", f"fate = 'there' AND {COUNTED}"


def parse_entry(place: int, line: bytes) -> tuple[Any, ...]:
    """The row in `entries` of what is listed: `-` is a file there, `d` a folder."""
    given = json.loads(line)
    kind = "h" if given["mode"][0] == "h" else given["type"]
    modified = math.floor(borg_time(given["mtime"]).timestamp())
    return encode_key(given["path"]), place, kind, given["size"], modified, given["healthy"]


class Plan(Catalog):
    """What is to be done about an archive's objects; those of the catalog are the manifest's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._notes: deque[tuple[str, str, bytes]] = deque()
        self.prefix = ""  # what stands before the keys in the archive
        self.has_manifest = False
        with self._told():
            self._db.create_function("odd_path", 1, lambda key: odd_path(decode_key(key)).encode())
            self._db.executescript(PLAN_TABLES)

    def read(self, repository: Repository, archive: str, source: Path) -> None:
        self.repository, self.archive = repository, archive
        borg, place = repository.borg, f"{repository.borg.repository}::{archive}"
        borg.run(
            ["list", "--json-lines", "--format", "{size}{mtime}", place],  # nothing of its content is read
            consume=lambda lines: self.insert("entries", map(parse_entry, itertools.count(), lines)),
        )
        sql = "SELECT 1 FROM entries WHERE path = ?"
        self.has_manifest = bool(self.execute(sql, [MANIFEST_PATH.encode()]))
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

    def arrange(self, source: Path) -> None:
        """Joins the list and the manifest, when both are in.

        Keys stand behind the path under which the source was mounted then, which a run archived first; where
        there is none, as in what somebody archived by hand, the paths are the keys.
        """
        if self.has_manifest:
            sql = "UPDATE entries SET kind = 'own' WHERE path >= ? AND path < ?"
            self.execute(sql, below(OWN_FOLDER))
        [(first, kind)] = self.execute("SELECT min(path), kind FROM entries WHERE kind != 'own'")
        [(last,)] = self.execute("SELECT max(path) FROM entries WHERE kind != 'own'")
        before, name, key = f"{decode_key(first or b'')}/".partition(f"/{source.name}/")
        guesses = [str(source).lstrip("/")]
        if name and (self.has_manifest or (kind == "d" and not key)):
            guesses.append(f"{before}/{source.name}")
        low, high = b"", b"\xff" * 5
        for guess in guesses:
            start, end = below(f"{guess}/")
            if first is None or (last < end and (first >= start or first == encode_key(guess))):
                self.prefix, low, high = f"{guess}/", start, end
                break
        for sql in PLAN_ITEMS:
            self.execute(sql, {"prefix": self.prefix, "start": len(low) + 1, "low": low, "high": high})

    def select(self, paths: Sequence[str]) -> None:
        """Leaves only what `paths` name: keys or folders, as they stand, or else as borg shows them."""
        for path in paths:
            bare = path.strip("/")
            for name in (path, bare, bare.removeprefix(self.prefix)):
                values = [encode_key(name), *below(f"{name.rstrip('/')}/")]
                sql = "UPDATE items SET is_chosen = 1 WHERE key = ? OR (key >= ? AND key < ?) RETURNING 1"
                if self.execute(sql, values):
                    break
            else:
                hint = "A PATH is an object's key or a folder of keys; --dry-run without one lists them."
                raise BackupError(f"the archive holds nothing at {path!r}", hint)
        if paths:
            self.execute("DELETE FROM items WHERE NOT is_chosen")

    def choose(self, where: str, sample: float, seed: int) -> None:
        """Chooses a number of objects, or a share of them, which is one at least."""
        number = sample if isinstance(sample, int) else max(1, round(sample * self.sums(where)[0]))
        with self._told():
            self._db.create_function("chance", 0, random.Random(seed).random)
        chosen = f"SELECT key FROM items WHERE {where} ORDER BY chance() LIMIT {number}"
        self.execute(f"UPDATE items SET is_chosen = 1 WHERE key IN ({chosen})")

    def find(self, there: Iterable[tuple[int, str, int | None, bytes]]) -> None:
        """Notes what lies where objects go: size, ETag or Unix time, and key."""
        self.execute("UPDATE items SET there_size = NULL, there_etag = ''")
        sql = "UPDATE items SET there_size = ?, there_etag = ?, there_modified = ? WHERE key = ?"
        for page in pages(there):
            with self._told():
                self._db.executemany(sql, page)

    def items(self, where: str = "1", by: str = "key") -> Iterator[Item]:
        """Objects for which a condition of SQL holds, by key or by place in the archive."""
        sql = f"""
            SELECT items.{by}, items.key, items.path, items.size, items.modified, facts,
                there_size, there_etag, there_modified, fate
            FROM items LEFT JOIN objects USING (key)
            WHERE items.{by} > ? AND ({where}) ORDER BY items.{by} LIMIT {CATALOG_PAGE}
        """
        last: object = b"" if by == "key" else -1
        while page := self.execute(sql, [last]):
            for last, key, path, size_bytes, modified, known, *there, fate in page:  # noqa: B007
                facts = json.loads(known or "{}")
                headers = facts.get("headers")
                told = size_bytes, modified, headers, facts.get("tags", {})
                yield Item(decode_key(key), decode_key(path or b""), *told, *there, Fate(fate))

    def sums(self, where: str) -> tuple[int, int]:
        return self.execute(f"SELECT count(*), coalesce(sum(size), 0) FROM items WHERE {where}")[0]

    def summary(self, where: str) -> str:
        """`3 objects, 12 kB`, but for folders that an archive only has because nothing is in them."""
        number, size_bytes = self.sums(f"{where} AND {COUNTED}")
        return f"{count(number, 'object')}, {size(size_bytes)}"

    def note(self, item: Item, fate: Fate, sent: str = "") -> None:
        self._notes.append((fate.value, sent.strip('"'), encode_key(item.key)))
        if len(self._notes) >= CATALOG_PAGE:  # one by one, threads would wait for each other most of the time
            self.execute("SELECT 1")

    def execute(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._told():
            notes = [self._notes.popleft() for _ in range(len(self._notes))]
            self._db.executemany("UPDATE items SET fate = ?, sent = ? WHERE key = ?", notes)
            return super().execute(sql, values)


def completed_part(number: int, etag: str) -> str:
    return f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>"


def completion(parts: Sequence[str]) -> bytes:
    return f"<CompleteMultipartUpload>{''.join(parts)}</CompleteMultipartUpload>".encode()


def part_bytes(size_bytes: int) -> int:
    """How large an object's parts are, all but the last one."""
    return max(PART_BYTES, -(-size_bytes // (MAX_PARTS * MIB)) * MIB)


def fate_by_etag(item: Item, stream: IO[bytes], etags_are_md5: bool) -> Fate:
    """What the ETag says: the MD5 of the content, or that of the MD5s of equal parts, and their number."""
    number, sizes = item.there_etag.partition("-")[2], {item.size_bytes}
    if number:
        common = (*(mib * MIB for mib in COMMON_PARTS), part_bytes(item.size_bytes))
        sizes = {size for size in common if str(-(-item.size_bytes // size)) == number}
    if not (item.there_etag and sizes and item.there_bytes == item.size_bytes):
        return Fate.UNKNOWN
    sums: dict[int, list[Any]] = {size: [] for size in sizes}  # by the size of parts: an MD5 of each
    for offset in range(0, item.size_bytes, MIB):
        data = stream.read(MIB)
        for size, parts in sums.items():
            if offset % size == 0:
                parts.append(MD5())
            parts[-1].update(data)
    for parts in sums.values():
        digests = b"".join(part.digest() for part in parts)
        if item.there_etag == (f"{MD5(digests).hexdigest()}-{number}" if number else digests.hex()):
            return Fate.KEEP
    return Fate.DIFFERENT if etags_are_md5 and not number else Fate.UNKNOWN  # parts may be of any size


def fate_by_content(there: Iterable[bytes], stream: IO[bytes]) -> Fate:
    """What the content says: a beginning of what is to be written may be completed."""
    for data in there:
        if stream.read(len(data)) != data:
            return Fate.DIFFERENT
    return Fate.WRITE if stream.read(1) else Fate.KEEP


TAR_METADATA = "SCHILY.xattr.user."
Work = Callable[..., Any]


class Transfer:
    """Work on a plan's objects, in threads side by side, on no more bytes than there is memory for.

    Methods raise what has failed first, which ends all, and Stopped. Nobody waits for a thread that hangs.
    """

    name = "restore"
    small_bytes = 0  # what a thread takes whole; a handler sees to what is larger

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self.runtime, self.plan, self.console = runtime, plan, runtime.console
        # Two parts at least: one that is read, and one that is sent.
        self.memory_bytes = min(max(2 * PART_BYTES, runtime.memory_mb * MIB // 8), 8 * PART_BYTES)
        self.lock, self._changed = threading.Lock(), threading.Condition()
        self.goal, self.objects, self.bytes = "", 0, 0  # what is done, of what
        self._told = 0.0  # when that was told last
        self._threads = concurrent.futures.ThreadPoolExecutor(RESTORE_THREADS)
        self._busy_bytes = 0
        self._failures: list[BaseException] = []

    def add(self, objects: int, more_bytes: int) -> None:
        with self.lock:
            self.objects, self.bytes = self.objects + objects, self.bytes + more_bytes
            if time.monotonic() < self._told + POLL_SECONDS:
                return
            self._told = time.monotonic()
            done = f"{count(self.objects, 'object')}, {size(self.bytes)}"
            self.console.progress(self.name, f"{done} {self.goal}")

    def start(self, size_bytes: int, work: Work, *given: Any) -> None:
        share = min(self.memory_bytes, max(size_bytes, self.memory_bytes // WAITING_OBJECTS))

        def do() -> None:
            try:
                if not self._failures:
                    work(*given)
            except BaseException as error:
                self._failures.append(error)
            with self._changed:
                self._busy_bytes -= share
                self._changed.notify_all()

        self._wait_until_busy_with(self.memory_bytes - share)
        with self._changed:
            self._busy_bytes += share
        self._threads.submit(do)

    def _wait_until_busy_with(self, most_bytes: int) -> None:
        with self._changed:
            while self._busy_bytes > most_bytes and not self._failures:
                self._changed.wait(POLL_SECONDS)
                self.runtime.stop.check()
        if self._failures:
            raise self._failures[0]

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """At its end, all that was started meanwhile has ended."""
        try:
            yield
            self._wait_until_busy_with(0)
        finally:
            with self._changed:
                self._changed.wait_for(lambda: not self._busy_bytes, CLEANUP_SECONDS)

    def for_each(self, where: str, work: Work, *more: Any) -> None:
        with self.awaited():
            for item in self.plan.items(where):
                self.start(0, work, item, *more)

    def waited(self) -> float:
        """Grows while it is not borg's fault that nothing moves: S3 is waited for, which has an end."""
        return time.monotonic() if self._busy_bytes else 0

    def export(self, verb: str, where: str, handle: Work) -> None:
        """Hands objects and their content to `handle`, in several threads."""
        plan, where, missing = self.plan, f"place IS NOT NULL AND ({where})", ""
        number, _ = plan.sums(where)
        if not number:
            return
        self.goal, self.objects, self.bytes = f"{verb}, of {plan.summary(where)}", 0, 0

        def work(*given: Any) -> None:
            handle(*given)
            self.add(1, 0)

        def take(tar: tarfile.TarFile) -> None:
            nonlocal missing
            for item in plan.items(where, "place"):
                missing = item.key
                while member := tar.next():
                    tar.members.clear()  # it would remember each
                    if member.name == item.path and member.isreg():
                        break
                else:
                    return
                own = {
                    name.replace(TAR_METADATA, USER_METADATA): text
                    for name, text in member.pax_headers.items()
                    if name.startswith(TAR_METADATA)
                }
                # Older archives have user metadata there, and no headers.
                given = dataclasses.replace(item, headers=own) if own and not item.headers else item
                content = tar.extractfile(member)
                if item.size_bytes > self.small_bytes:
                    work(given, content)
                else:
                    self.start(item.size_bytes, work, given, io.BytesIO(content.read()))
            missing = ""

        def consume(stream: IO[bytes]) -> None:
            with self.awaited(), contextlib.suppress(tarfile.ReadError):  # it ended early: borg says why
                # borg writes it by the same module, surrogates included.
                buffer = READ_BYTES // 8
                with tarfile.open(fileobj=stream, mode="r|", bufsize=buffer, encoding="utf-8") as tar:
                    take(tar)
                drain(stream)

        borg, target, chosen = plan.repository.borg, plan.repository.target, plan.path.with_name("chosen")
        with chosen.open("w", encoding="ascii") as lines:
            lines.writelines(f"{json.dumps(item.path)}\n" for item in plan.items(where, "place"))
        command = ["export-tar", "--tar-filter", "", f"{borg.repository}::{plan.archive}", "-"]
        own = {"S3BORGBACKUP_EXPORTED": str(chosen)}
        try:
            borg.run(command, consume=consume, own=own, waits=self.waited)
        except BackupError as error:
            if missing and error.message.startswith(f"{target.store.name}: borg "):
                error.message += f" (while {missing!r} was read)"
            raise
        if self.objects < number:
            first = f"; {missing!r} is missing" if missing else ""
            words = f"the archive gave {self.objects:,} of {count(number, 'object')}{first}"
            raise BackupError(f"{target.store.name}: {words}", DAMAGE_HELP.format(name=target.name))

    def in_pieces(self, item: Item, content: IO[bytes], step: int, work: Work, conclude: Work) -> None:
        """Has threads `work` at pieces of a content; the last one concludes, with all results."""
        pieces, results = range(max(1, -(-item.size_bytes // step))), dict[int, Any]()

        def do(number: int, piece: bytes) -> None:
            result = work(number, piece)
            with self.lock:
                results[number] = result
                is_last = len(results) == len(pieces)
            if is_last:
                conclude([results[number] for number in pieces])

        for number in pieces:
            piece = content.read(step)
            self.start(len(piece), do, number, piece)


RUN_AGAIN = "run it again: it goes on where it was."


class Restoration(Transfer):
    """A restore. Subclasses know the place."""

    def __init__(self, runtime: Runtime, plan: Plan, title: str) -> None:
        super().__init__(runtime, plan)
        self.title, self.losses, self.warnings = title, Counter[str](), 0

    def warn(self, text: str) -> None:
        with self.lock:
            self.warnings += 1
        if self.warnings <= MAX_NAMED:
            self.console.warning("restore", text)

    def leave_out(self, item: Item, reason: str) -> None:
        self.plan.note(item, Fate.LEFT_OUT)
        self.warn(f"{item.key!r} could not be restored: {reason}")

    def compare(self) -> None:
        plan = self.plan
        for key, warning in plan.execute("SELECT key, warning FROM items WHERE warning IS NOT NULL"):
            self.warn(f"{decode_key(key)!r} {warning}")
        plan.find(self.there())
        plan.execute(FIRST_FATES)
        for comparison in self.comparisons:
            self.export("compared", "fate = 'unknown'", comparison)

    def announce(self, overwrite: bool, dry_run: bool) -> None:
        refused, number = "overwrite" if overwrite else "refuse", self.plan.sums(CLASHES)[0]
        words = {fate: (fate.value, "") for fate in Fate}
        words |= {Fate.DIFFERENT: (refused, ""), Fate.HEADERS: (refused, " (other headers)")}
        for item in self.plan.items(f"{COUNTED} OR fate = 'different'") if dry_run else ():
            word, why = words[item.fate]
            self.console.plain(f"{word:9}  {size(item.size_bytes):>8}  {printable(item.key)}{why}")
        for fate, (word, why) in words.items():
            if self.plan.sums(where := f"fate = '{fate.value}'")[0]:
                text = f"to {self.title}: {word}{why}: {self.plan.summary(where)}"
                self.console.info("restore", f"dry run {text}" if dry_run else text)
        if not number or overwrite:
            self.plan.execute("UPDATE items SET fate = 'write' WHERE fate = 'different'")
            return
        for item in itertools.islice(self.plan.items(CLASHES), MAX_NAMED):
            what = "headers or tags" if item.fate is Fate.HEADERS else "content"
            self.console.error("restore", f"{item.key!r} is there with other {what}")
        raise BackupError(
            f"{count(number, 'object')} in {self.title} would be overwritten; nothing was written",
            "Restore to another place, or say --overwrite.",
        )

    def write_all(self) -> None:
        for part in (ABOVE_OTHERS, f"NOT {ABOVE_OTHERS}"):
            where = f"fate = 'write' AND {part}"
            self.for_each(f"place IS NULL AND {where}", self.write, io.BytesIO())
            self.export("restored", where, self.write)

    def report(self, seconds: float) -> int:
        for what, number in sorted(self.losses.items()):
            self.warn(f"{self.title} takes no {what}: {count(number, 'object')} lost it")
        if not self.plan.sums("place IS NOT NULL")[0]:
            self.warn("this archive holds no objects; --at and --archive choose another (see `list`)")
        if self.warnings > MAX_NAMED:
            self.console.warning("restore", f"{self.warnings - MAX_NAMED:,} more warnings")
        kept, done = self.plan.sums(KEPT)[0], self.plan.summary("fate = 'restored'")
        there = f"; {kept:,} were there already" if kept else ""
        self.console.info("restore", f"restored {done}, to {self.title} in {duration(seconds)}{there}")
        return EXIT_WARNINGS if self.warnings else EXIT_OK


class ToFolder(Restoration):
    """Into a folder of the machine."""

    small_bytes = 256 * 1024

    def __init__(self, runtime: Runtime, plan: Plan, folder: Path, dry_run: bool) -> None:
        self._root, self._folders, self.comparisons = folder.absolute(), set[str](), [self.compare_content]
        super().__init__(runtime, plan, str(self._root))
        try:
            if not dry_run:
                self._root.mkdir(parents=True, exist_ok=True)
            device = os.stat(f"{self._root}/").st_dev
        except FileNotFoundError:
            return
        except OSError as error:
            words = f"cannot restore to {self.title}: {error.strerror}"
            raise BackupError(words, "Choose another folder.") from None
        if mount_table().get("/") == "overlay" and device == os.stat("/").st_dev:
            words = f"{self.title} is inside the container, and will be gone with it; mount a folder of the"
            words += f' machine there: docker run -v "$PWD/restored:{self.title}"'
            self.console.warning("restore", words)

    def waited(self) -> float:
        return self.objects + self.bytes  # a disk may hang for ever

    def there(self) -> Iterator[tuple[int, str, int, bytes]]:  # what is no file cannot be overwritten
        for item in self.plan.items("fate = 'unknown'"):
            is_folder = item.key.endswith("/") and not item.size_bytes
            if UNREPRESENTABLE.search(item.key[:-1] if is_folder else item.key):
                self.leave_out(item, "no file can have that name")
                continue
            with contextlib.suppress(OSError):
                status = os.lstat(f"{self._root}/{item.key}")
                if is_folder or stat.S_ISREG(status.st_mode):
                    size_bytes = 0 if is_folder else status.st_size
                    yield size_bytes, "", math.floor(status.st_mtime), encode_key(item.key)

    def compare_content(self, item: Item, stream: IO[bytes]) -> None:
        try:
            with open(f"{self._root}/{item.key}", "rb") as there:
                self.plan.note(item, fate_by_content(iter(lambda: there.read(READ_BYTES), b""), stream))
        except OSError as error:
            words = f"{item.key!r} in {self.title} cannot be compared: {error.strerror}"
            raise BackupError(words, TRY_AGAIN) from error

    def write_all(self) -> None:
        growth = "coalesce(sum(max(0, size - coalesce(there_size, 0))), 0)"
        [(needed,)] = self.plan.execute(f"SELECT {growth} FROM items WHERE fate = 'write'")
        disk = os.statvfs(self._root)
        free = disk.f_bavail * disk.f_frsize
        if needed > free and disk.f_blocks:
            words = f"{self.title} has {size(free)} free, and {size(needed)} are to be added"
            hint = "Make room, restore a part of it, or restore to another place."
            raise BackupError(f"{words}; nothing was written", hint)
        # What is complete, but has not got its time, as a restore was killed, gets it.
        for item in self.plan.items(f"{KEPT} AND there_modified != items.modified AND place IS NOT NULL"):
            try:
                times = item.modified, item.modified
                os.utime(f"{self._root}/{item.key}", times, follow_symlinks=False)
            except OSError as error:
                self.leave_out(item, f"its time cannot be set: {error.strerror}")
        super().write_all()
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        failed = LIBC.syncfs(fd)
        os.close(fd)
        if failed:
            words = f"{self.title}: the disk could not take what was written"
            raise BackupError(f"{words}: {os.strerror(ctypes.get_errno())}", "Run it again.")

    def write(self, item: Item, stream: IO[bytes]) -> None:
        path = f"{self._root}/{item.key}"
        folder = os.path.dirname(path)
        try:
            if folder not in self._folders:
                os.makedirs(folder, exist_ok=True)
                self._folders.add(folder)
            if not path.endswith("/"):
                self._fill(item, path, stream)
            self.plan.note(item, Fate.DONE)
        except OSError as error:
            if error.errno in UNWRITABLE:
                self.leave_out(item, error.strerror or str(error))
                return
            hint = f"Make room, and {RUN_AGAIN}" if error.errno in FULL_DISK else RUN_AGAIN.capitalize()
            words = f"cannot write {item.key!r} to {self.title}: {error.strerror}"
            raise BackupError(words, hint) from error

    def _fill(self, item: Item, path: str, stream: IO[bytes]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags | (os.O_EXCL if item.there_bytes is None else os.O_TRUNC), 0o644)
        with open(fd, "wb") as file:
            while data := stream.read(READ_BYTES):
                file.write(data)
                self.add(0, len(data))
            file.flush()
            for name, text in (item.headers or {}).items():
                if name.startswith(USER_METADATA):
                    try:
                        os.setxattr(fd, f"user.{name.removeprefix(USER_METADATA)}", encode_key(text))
                    except OSError as error:
                        self.losses[f"user metadata ({error.strerror})"] += 1
            os.utime(fd, (item.modified, item.modified))  # last: this says that it is complete


class Uploads:
    """The uploads in parts that a restore has begun: when it, or a later one, ends, none is left.

    A file in /cache has them, locked while the restore lives. Nobody else's are touched.
    """

    def __init__(self, runtime: Runtime, client: S3Client) -> None:
        self._client, self._lock = client, threading.Lock()
        self._begun: dict[str, Sequence[str]] = {}  # by key: since when, and the id when it is known
        self._path = own_cache(runtime.environ, client.store).with_suffix(f".uploads-{runtime.run_id}")

    def __enter__(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = lock_file(self._path)
            for path in self._path.parent.glob(f"{self._path.stem}.uploads-*"):
                if left := lock_file(path):  # that restore was killed
                    with left, contextlib.suppress(S3Error, ValueError):
                        left.seek(0)
                        noted = dict(map(json.loads, left)).items()
                        self._end_all([(key, begun) for key, begun in noted if begun])
                        path.unlink()
        except OSError:  # without a cache that can be written to it cannot be known after SIGKILL
            self._file = open(os.devnull, "w", encoding="ascii")

    def __exit__(self, *_: object) -> None:
        patience = Patience(failing_seconds=CONNECT_PATIENCE_SECONDS)
        self._client = dataclasses.replace(self._client, patience=patience)
        with self._file, contextlib.suppress(BackupError):
            self._end_all(list(self._begun.items()))
            self._path.unlink(missing_ok=True)

    def note(self, key: str, *begun: str) -> None:
        """Notes since when an object's is under way, and its id if known, or that it is over."""
        with self._lock, contextlib.suppress(OSError):
            self._begun.pop(key, None)
            self._begun |= {key: begun} if begun else {}
            print(json.dumps([key, begun]), file=self._file, flush=True)

    def begin(self, key: str, headers: Headers) -> str:
        since = utc_now(self._client)
        self.note(key, since, "")
        answer = self._client.request("POST", key, [("uploads", "")], headers)
        upload = xml_text(answer.body, "UploadId")
        self.note(key, since, upload)
        self._end_all([(key, (since, each)) for each in self._tries(key, since, upload)])
        return upload

    def _tries(self, key: str, since: str, last: str = "") -> list[str]:
        """The tries to begin an upload whose answers were lost: since then, and before the `last` one."""
        query = [("uploads", ""), ("prefix", key), ("encoding-type", "url")]
        try:
            listed = ElementTree.fromstring(self._client.request("GET", query=query).body)
        except S3Error as error:
            if error.status not in {*REFUSALS, 501}:
                raise
            return []  # the key may not list them (s3:ListBucketMultipartUploads), or Storj cannot
        began = {
            each.findtext("{*}UploadId", ""): datetime.fromisoformat(each.findtext("{*}Initiated", ""))
            for each in listed.iterfind("{*}Upload")
            if urllib.parse.unquote_plus(each.findtext("{*}Key", "")) == key
        }
        start = datetime.fromisoformat(since)
        end = began.pop(last, EPOCH if last else start + timedelta(seconds=2 * PROVEN_PATIENCE_SECONDS))
        return [each for each, when in began.items() if start <= when <= end]

    def _end_all(self, begun: Iterable[tuple[str, Sequence[str]]]) -> None:
        def end(key: str, upload: str) -> None:
            try:
                self._client.request("DELETE", key, [("uploadId", upload)])
            except S3Error as error:
                if error.status != 404:
                    raise

        work = [
            functools.partial(end, key, each)
            for key, (since, upload) in begun
            for each in ([upload] if upload else self._tries(key, since))
        ]
        for result in side_by_side(work, Stop()):
            if isinstance(result, BackupError):
                raise result


def readable(value: str) -> str:
    """A header's value for comparisons: encoded words (RFC 2047) are what they mean, blanks do not count."""
    with contextlib.suppress(ValueError, LookupError, email.errors.MessageError):
        value = str(email.header.make_header(email.header.decode_header(value)))
    return " ".join(value.split())


def other_headers(
    item: Item, answer: Answer, client: S3Client, key: str, dropped: Set[str] = frozenset()
) -> list[str]:
    """Which headers, or `tags`, are not as archived, but for those that a store has `dropped`."""
    then, now = item.headers, headers_of(answer)
    if then is None:
        return []
    # What has no type gets one that differs from server to server.
    names = {*then, *now} - dropped - ({"content-type"} - then.keys())
    other = sorted(name for name in names if readable(then.get(name, "")) != readable(now.get(name, "")))
    if TAGGING not in dropped and (item.tags or answer.has_tags):
        with contextlib.suppress(S3Error):  # the key may not read tags
            other += [] if client.tags(key) == item.tags else ["tags"]
    return other


class ToBucket(Restoration):
    """Into a bucket, by requests of our own."""

    small_bytes = PART_BYTES

    def __init__(self, runtime: Runtime, plan: Plan, store: Store, dry_run: bool) -> None:
        super().__init__(runtime, plan, f"{store.location} at {store.endpoint}")
        found = preflight_one(runtime, store, write=not dry_run)
        self._client = client = S3Client(store, found.region, PROVEN, runtime.stop)
        self._direct = dataclasses.replace(client, is_direct=True)
        self._prefix, self._uploads = store.key_prefix, Uploads(runtime, client)
        self._etags_are_md5, self._dropped = (False, set[str]()) if dry_run else self._try_out()
        self.comparisons = [self.compare_etag, self.compare_content]

    def _try_out(self) -> tuple[bool, set[str]]:
        """Whether an ETag is an MD5, which some kinds of encryption change; what is dropped."""
        client, start = self._client, f"{self._prefix}{PROBE_NAME}"
        for entry in client.list_objects(start):  # what a restore that was killed left
            client.delete(entry.key)
        key, body = f"{start}{secrets.token_hex(6)}", secrets.token_bytes(16)
        try:
            try:
                answer = client.put(key, body, {**KEPT_HEADERS, TAGGING: "a=b"})
                kept = {TAGGING} if client.tags(key) else set()
            except S3Error:  # the server does not know tags, or the key may not write or read them
                try:
                    answer, kept = client.put(key, body, KEPT_HEADERS), set()
                except S3Error:  # nor redirects, the last of these (Cloudflare R2)
                    answer, kept = client.put(key, body, dict([*KEPT_HEADERS.items()][:-1])), set()
            dropped = {*KEPT_HEADERS, TAGGING} - kept - headers_of(client.request("HEAD", key)).keys()
            return answer.etag == MD5(body).hexdigest(), dropped
        finally:
            client.delete(key)

    def there(self) -> Iterator[tuple[int, str, None, bytes]]:
        [ends] = self.plan.execute("SELECT min(key), max(key) FROM items")
        common = os.path.commonprefix([decode_key(key or b"") for key in ends])  # noqa: RUF071
        for each in self._client.list_objects(self._prefix + re.split("[\ud800-\udfff]", common)[0]):
            yield each.size_bytes, each.etag, None, encode_key(each.key[len(self._prefix) :])

    def compare(self) -> None:
        before = len(encode_key(self._prefix))
        limits = f"length(key) > {MAX_KEY_BYTES - before} OR items.size > {MAX_OBJECT_BYTES}"
        for item in self.plan.items(f"fate = 'unknown' AND ({limits})"):
            length, reason = before + len(encode_key(item.key)), "S3 takes objects of up to 5 TiB"
            if length > MAX_KEY_BYTES:
                reason = f"its key would have {length:,} bytes, and S3 takes {MAX_KEY_BYTES:,}"
            self.leave_out(item, reason)
        super().compare()
        self.for_each("fate = 'there' AND facts IS NOT NULL", self.compare_headers)

    def compare_etag(self, item: Item, stream: IO[bytes]) -> None:
        self.plan.note(item, fate_by_etag(item, stream, self._etags_are_md5))

    def compare_content(self, item: Item, stream: IO[bytes]) -> None:
        answers = self._direct.download(self._prefix + item.key, item.there_bytes or 0)
        self.plan.note(item, fate_by_content((answer.body for answer in answers), stream))

    def compare_headers(self, item: Item) -> None:
        key = self._prefix + item.key
        try:
            answer = self._direct.request("HEAD", key)
            if other_headers(item, answer, self._direct, key, self._dropped):
                self.plan.note(item, Fate.HEADERS)
        except S3Error as error:
            self._leave_out(item, error)

    def _leave_out(self, item: Item, error: S3Error) -> None:
        """Raises `error` where it is about more than this one object."""
        if error.status not in UNTAKEN_STATUSES or error.code in S3_HINTS.keys() - {"NotS3"}:
            raise error
        self.leave_out(item, error.message.partition("): ")[2] or error.message)

    def write_all(self) -> None:
        self.for_each("fate = 'headers'", self._copy)
        with self._uploads:
            super().write_all()
        if not self.plan.sums("fate = 'restored'")[0]:
            return  # it was listed just before
        deadline = time.monotonic() + LISTING_SECONDS
        wrong = "(there_size IS NULL OR there_size != items.size OR (sent != '' AND sent != there_etag))"
        where = f"fate IN ('restored', 'there') AND {wrong}"
        self.plan.find(self.there())
        while number := self.plan.sums(where)[0]:
            if time.monotonic() > deadline:
                first = next(self.plan.items(where)).key
                words = f"{self.title} does not hold {count(number, 'object')} as restored, {first!r} for one"
                raise BackupError(words, RUN_AGAIN.capitalize())
            self.runtime.stop.wait(1)
            self.plan.find(self.there())

    def _copy(self, item: Item) -> None:
        """Gives an object with the right content its headers, by a copy onto itself."""
        key, headers = self._prefix + item.key, self._headers_for(item)
        headers |= {} if TAGGING in self._dropped else {"x-amz-tagging-directive": "REPLACE"}
        headers["x-amz-metadata-directive"] = "REPLACE"
        headers["x-amz-copy-source"] = uri_encode(f"/{self._client.store.bucket}/{key}", safe="/")
        try:
            answer = self._direct.request("PUT", key, headers=headers)
            self.plan.note(item, Fate.DONE, xml_text(answer.body, "ETag"))
        except S3Error as error:
            if not 400 <= error.status <= 501:
                raise
            self.plan.note(item, Fate.WRITE)

    def _headers_for(self, item: Item) -> dict[str, str]:
        headers = dict(item.headers or {})
        if item.tags:
            headers[TAGGING] = urllib.parse.urlencode(item.tags, quote_via=urllib.parse.quote)
        with self.lock:
            self.losses.update(headers.keys() & self._dropped)
        return {name: value for name, value in headers.items() if name not in self._dropped}

    def write(self, item: Item, stream: IO[bytes]) -> None:
        key, headers = self._prefix + item.key, self._headers_for(item)
        try:
            if item.size_bytes <= PART_BYTES:
                answer = self._direct.put(key, stream.read(), headers)
                self.add(0, item.size_bytes)
                self.plan.note(item, Fate.DONE, answer.etag)
                return
            upload = self._uploads.begin(key, headers)
        except S3Error as error:
            self._leave_out(item, error)
            self._uploads.note(key)
            return

        def send(number: int, body: bytes) -> str:
            query = [("partNumber", str(number + 1)), ("uploadId", upload)]
            etag = self._direct.put(key, body, query=query).etag
            self.add(0, len(body))
            return completed_part(number + 1, etag)

        complete = functools.partial(self._complete, item, key, upload)
        self.in_pieces(item, stream, part_bytes(item.size_bytes), send, complete)

    def _complete(self, item: Item, key: str, upload: str, parts: Sequence[str]) -> None:
        body = completion(parts)
        client = dataclasses.replace(self._direct, patience=dataclasses.replace(PROVEN, answer_seconds=300))
        try:
            answer = client.request("POST", key, [("uploadId", upload)], body=body)
            etag = xml_text(answer.body, "ETag")
        except S3Error as error:
            if error.code != "NoSuchUpload":
                self._leave_out(item, error)
                return
            etag = client.request("HEAD", key).etag  # an answer that was lost may have been a success
            if etag == item.there_etag:
                raise
        self._uploads.note(key)
        self.plan.note(item, Fate.DONE, etag)


def restore(runtime: Runtime, **arguments: Any) -> int:
    """Restores an archive, or a part of it, as the command line says; returns the exit code."""
    start, given = time.monotonic(), argparse.Namespace(**arguments)
    settings, target = runtime.settings, given.target
    path = given.metadata if given.metadata and not given.dry_run else os.devnull
    try:
        metadata = open(path, "w", encoding="ascii")  # noqa: SIM115
    except OSError as error:
        raise BackupError(f"cannot write {path}: {error.strerror}", "Correct --metadata.") from None
    with (
        metadata,
        tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder,
        contextlib.closing(Plan(Path(folder, "plan"))) as plan,
    ):
        # A missing permission is told within seconds.
        kind, where = (ToFolder, given.folder) if given.folder else (ToBucket, given.bucket)
        place = kind(runtime, plan, where, given.dry_run)
        with opened_for_reading(runtime, target, "a restore") as repository:
            archives = archives_of(repository, *ONLY_NAMES)[1]
            archive, why = choose_archive(archives, settings.label, given.archive, given.until)
            what = f"archive {archive.name} of target {target.name} ({why})"
            runtime.console.info("restore", f"{what}, of {local_time(archive.start)}")
            plan.read(repository, archive.name, settings.mount_point(settings.source))
            plan.select(given.paths)
            place.compare()
            place.announce(given.overwrite, given.dry_run)
            if given.dry_run:
                return EXIT_WARNINGS if place.warnings else EXIT_OK
            place.write_all()
        if given.metadata:
            there = "key IN (SELECT key FROM items WHERE fate IN ('restored', 'there'))"
            metadata.writelines(f"{manifest_line(known)}\n" for known in plan.rows(there))
        return place.report(time.monotonic() - start)


# --------------------------------------------------------------------------------------------- Verification

# Is an archive good? What the source lists now comes into a table beside the plan, and each object's fate is
# what a restore into the source would have to do about it. A sample leaves borg as for a restore, verified by
# borg, and is compared piece by piece with what S3 gives: memory grows neither with the bucket, nor with the
# sample, nor with an object's size.

DEFAULT_SAMPLE = "300"  # where 1 % of the objects are bad, one of them is among 300 with a chance of 95 %
FETCHED_BYTES = 2 * MIB  # of an object, at a time

FIND_LISTED = """
UPDATE items SET there_size = now.size, there_etag = now.etag, there_modified = now.modified / 1000000
FROM source.objects AS now WHERE now.key = items.key
"""
ARCHIVED = f"fate != 'left out' AND {COUNTED}"
NO_MOUNT_SHOWS = "no file can have this name, or it is hidden by objects below the same name"
LOST_OR_LATE = (
    "the backup missed it, or it came later with an older time (a delete marker was removed, or it is a"
    " replica); the next has it"
)

# What is counted of all objects and of the sample; but for these the first objects are named, too.
OF_ALL = ("archived", "listed", "new", "missing", "unarchivable", "appeared", "changed", "deleted")
OF_SAMPLE = ("sampled", "sampled_bytes", "equal", "extracted", "differing", "headers_changed", "unreadable")
ONLY_COUNTED = ("archived", "listed", "new", "sampled", "sampled_bytes", "equal", "extracted")

VERIFICATION_TEXT = """\
archive       {archive} of {target}{part}: the source as of {as_of}
compared      {archived:,} archived, {listed:,} in the source now
missing       {missing:,} that the source had before
unarchivable  {unarchivable:,} that no mount can show
since then    {new:,} new, {changed:,} changed, {deleted:,} deleted
              {appeared:,} appeared with an older time
sample        {sampled:,} with {sampled_size}, --seed {seed}
              {equal:,} equal the source byte for byte
              {extracted:,} extracted, as the source has changed: borg's hashes hold
              {differing:,} differ, {headers_changed:,} in headers or tags
              {unreadable:,} could not be read in the source
result        {result}"""


def parse_sample(text: str) -> float:
    """How many objects are proved: a number of them, which is an int, or a share. Raises ValueError."""
    pattern = r"([0-9]{1,9})|([0-9]{1,3}(?:\.[0-9]{1,6})?)%"
    found = re.fullmatch(pattern, "100%" if text == "all" else text)
    sample = found and (int(found[1]) if found[1] else float(found[2]) / 100)
    if not sample or (isinstance(sample, float) and sample > 1):
        raise ValueError(text)
    return sample


class Verification:
    def __init__(self, target: str, seed: int, shard: Shard | None = None) -> None:
        self.target, self.seed, self.archive, self.as_of, self.shard = target, seed, "", "", shard
        self.error = ""  # why it could not be verified to the end
        self.found = {kind: Findings() for kind in (*OF_ALL, *OF_SAMPLE)}  # keys and reasons

    @property
    def verdict(self) -> Verdict:
        """Whether the archive is good. What changed in the source since says nothing about that."""
        if self.error or self.found["missing"].count or self.found["differing"].count:
            return Verdict.FAILURE
        doubts = (self.found[kind].count for kind in ("unarchivable", "unreadable", "headers_changed"))
        return Verdict.WARNING if any(doubts) else Verdict.OK

    def as_json(self) -> str:
        found: dict[str, Any] = {}
        for kind, each in self.found.items():
            objects = [{"key": key, **({"reason": reason} if reason else {})} for key, reason in each.named]
            found[kind] = each.count if kind in ONLY_COUNTED else {"count": each.count, "objects": objects}
        sample = {"seed": self.seed, **{kind: found.pop(kind) for kind in OF_SAMPLE}}
        facts = {"target": self.target, "archive": self.archive, "as_of": self.as_of or None}
        facts |= {"shard": self.shard.setting} if self.shard else {}
        found |= {"sample": sample, "result": self.verdict.value}
        return json.dumps({**facts, "error": self.error, **found})

    def as_text(self) -> str:
        named = [
            f"{kind.replace('_', ' ')}: {printable(repr(key))}{f': {reason}' if reason else ''}"
            for kind, each in self.found.items()
            for key, reason in each.named
        ]
        words = {**vars(self), **{kind: each.count for kind, each in self.found.items()}}
        words |= {"archive": self.archive or "-", "as_of": self.as_of or "-", "result": self.verdict.value}
        words |= {"part": f", {self.shard}" if self.shard else ""}
        words["sampled_size"] = size(words["sampled_bytes"])
        error = [f"error: {self.error}"] if self.error else []
        return "\n".join([*named, VERIFICATION_TEXT.format(**words), *error])


def run_verify(
    runtime: Runtime, target: Target, archive: str | None, all_shards: bool, sample: float, **options: Any
) -> int:
    """Verifies an archive, or the newest one of each part; returns the worst exit code."""
    if not all_shards:
        return verify_and_tell(runtime, target, archive, sample, **options)
    if not (shard := runtime.settings.shard):
        raise ConfigurationError(["`--all-shards`: SHARD is not set; write any part's, such as 1/16"])
    codes = {}
    for number in range(1, shard.count + 1):
        each = dataclasses.replace(shard, number=number)
        environ = {**runtime.environ, "SHARD": each.setting, "SHARD_FILE": ""}
        configuration = Configuration(environ)
        runtime.console.secrets = configuration.secrets
        part = dataclasses.replace(runtime, settings=configuration.settings(), environ=environ)
        runtime.console.info(target.store.name, f"{each} is verified")
        codes[number] = verify_and_tell(
            part, chosen(part.settings, "target", target.name), None, sample, **options
        )
    if bad := [f"{number:,}" for number, code in codes.items() if code]:
        words = f"of {shard.count:,} parts, these are not all right: {', '.join(bad)}"
        runtime.console.error(target.store.name, words)
    else:
        words = f"all {shard.count:,} parts are right: together they have each key that the source listed"
        runtime.console.info(target.store.name, words)
    return max(codes.values())


def verify_and_tell(
    runtime: Runtime, target: Target, archive: str | None, sample: float, seed: int, as_json: bool
) -> int:
    """Prints what is found about an archive, also where that is an error; returns the exit code."""
    found = Verification(target.name, seed, runtime.settings.shard)
    try:
        verify(runtime, target, archive, sample, found)
    except (Stopped, ConfigurationError):
        raise
    except BackupError as error:
        found.error = str(error)
        runtime.console.error(target.store.name, found.error)
    emit(found.as_json() if as_json else found.as_text())
    return EXIT_CODES[found.verdict]


def verify(runtime: Runtime, target: Target, name: str | None, sample: float, found: Verification) -> None:
    source, label, stop = runtime.settings.source, runtime.settings.label, runtime.stop
    patience = Patience(*(min(each, runtime.settings.stall_seconds) for each in dataclasses.astuple(PROVEN)))
    client = S3Client(source, preflight_one(runtime, source, write=False).region, patience, stop)
    with (
        opened_for_reading(runtime, target, "`verify`") as repository,
        tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder,
    ):
        names = within(MOUNT_SECONDS, target.store.name, lambda: os.listdir(repository.mount.path), stop)
        expect_part(runtime, target.store, names)
        pattern = re.sub(r"[*?[]", r"[\g<0>]", name) if name else archive_pattern(label)
        archives = archives_of(repository, "--last", "1", "--glob-archives", pattern)[1]
        if not archives:
            which = repr(name) if name else f"of BACKUP_LABEL {label!r}"
            hint = f"`backup.py list {target.name}` shows what there is."
            raise BackupError(f"{target.store.name}: there is no archive {which}", hint)
        archive = archives[0]
        found.archive, found.as_of = archive.name, f"{archive.as_of:%Y-%m-%dT%H:%M:%SZ}"
        runtime.console.info(target.store.name, f"{archive.name} is compared with {runtime.settings.origin}")
        with contextlib.closing(Catalog(Path(folder, "source"))) as catalog:
            take = functools.partial(catalog.add, objects_of(runtime, client))
            within(LIST_SECONDS, "source: listing it", take, stop)
            catalog.hide([])
        with contextlib.closing(Plan(Path(folder, "plan"))) as plan:
            plan.execute("ATTACH ? AS source", [str(catalog.path)])
            plan.exclude(runtime.settings.exclude)
            plan.read(repository, archive.name, runtime.settings.mount_point(source))
            verifier = Verifier(runtime, plan, client, found)
            within(LIST_SECONDS, "comparing the lists", lambda: verifier.compare(archive.as_of), stop)
            verifier.prove(sample)
        if found.found["unreadable"].count:  # some objects, or are the keys revoked?
            examine(client, write=False)


class Verifier(Transfer):
    name, small_bytes = "verify", -1

    def __init__(self, runtime: Runtime, plan: Plan, client: S3Client, found: Verification) -> None:
        super().__init__(runtime, plan)
        self.memory_bytes //= 2  # each piece is there twice
        self._client, self._found = dataclasses.replace(client, is_direct=True), found

    def compare(self, as_of: datetime) -> None:
        plan, is_old = self.plan, int(not self.plan.has_manifest)
        before = microseconds(as_of - timedelta(seconds=RACE_SECONDS))
        # An archive without a manifest does not tell the empty objects that stand for folders.
        is_marker = f"{is_old} AND now.size = 0 AND substr(key, -1) = X'2F'"
        is_excluded = "excluded(now.key)" if self.runtime.settings.exclude else "0"  # a call for each key
        listed = f"source.objects AS now WHERE NOT ({is_excluded} OR {is_marker})"
        not_then = f"{listed} AND NOT EXISTS (SELECT 1 FROM items WHERE items.key = now.key)"
        older = f"{not_then} AND modified < {before}"
        lost = "items WHERE path IS NULL AND size > 0", "its content is not in the archive"
        kinds = {
            "changed": (f"items WHERE {ARCHIVED} AND there_size NOT NULL AND fate != 'there'", ""),
            "deleted": (f"items WHERE {ARCHIVED} AND there_size IS NULL", ""),
            "archived": (f"items WHERE {ARCHIVED}", ""),
            "listed": (listed, ""),
            "new": (f"{not_then} AND modified >= {before}", ""),
            "missing": (f"{older} AND is_shown", LOST_OR_LATE) if is_old else lost,
            "unarchivable": (f"{older} AND {is_old} AND NOT is_shown", NO_MOUNT_SHOWS),
            "appeared": (f"{older} AND NOT {is_old}", "the source did not list it then"),
        }
        for statement in (FIND_LISTED, FIRST_FATES):
            plan.execute(statement)
        for kind, (where, reason) in kinds.items():
            [(number,)] = plan.execute(f"SELECT count(*) FROM {where}")
            keys = plan.execute(f"SELECT key FROM {where} ORDER BY key LIMIT {MAX_NAMED}")
            named = [(decode_key(key), reason) for (key,) in keys] if kind not in ONLY_COUNTED else []
            self._found.found[kind] = Findings(named, number)

    def prove(self, sample: float) -> None:
        self.plan.choose(f"place IS NOT NULL AND {ARCHIVED}", sample, self._found.seed)
        number = self.plan.sums("is_chosen")[0]
        self.console.info(self.plan.repository.target.store.name, f"{count(number, 'object')} are proved")
        self.export("proved", "is_chosen", self._prove)

    def _prove(self, item: Item, content: IO[bytes]) -> None:
        """Where the source has another version, borg's hashes say that an object is good."""
        if item.fate is Fate.KEEP:
            work = functools.partial(self._judge, item), functools.partial(self._conclude, item)
            self.in_pieces(item, content, FETCHED_BYTES, *work)
        else:
            drain(content)
            self._conclude(item, [("extracted", "")])

    def _judge(self, item: Item, number: int, archived: bytes) -> tuple[str, str]:
        """What a piece turns out to be, and why; where it is equal, which headers are not."""
        key, first = f"{self._client.store.key_prefix}{item.key}", number * FETCHED_BYTES
        try:
            if archived:
                answer = self._client.get_span(key, first, first + len(archived) - 1)
            else:
                answer = self._client.request("HEAD", key)
        except S3Error as error:
            if error.status in (404, 416, 200, 206):  # it is gone, or shorter, so that another span came
                return "extracted", ""
            if not error.status:  # the source does not answer at all
                raise
            return "unreadable", f"{error.code}{error.message.partition(error.code)[2]}"
        if archived == answer.body:
            is_known = self.plan.has_manifest and not number
            return "equal", ", ".join(other_headers(item, answer, self._client, key)) if is_known else ""
        modified = answer.time("Last-Modified")
        if answer.etag != item.there_etag or not modified or int(modified.timestamp()) != item.there_modified:
            return "extracted", ""
        unlike = map(int.__ne__, archived, answer.body)
        place = next(itertools.compress(itertools.count(first), unlike))
        return "differing", f"its content differs from byte {place:,} on"

    def _conclude(self, item: Item, pieces: Sequence[tuple[str, str]]) -> None:
        kind, reason = next((piece for piece in pieces if piece[0] != "equal"), pieces[0])
        with self.lock:
            found = self._found.found
            found["sampled"].count += 1
            found["sampled_bytes"].count += item.size_bytes
            if kind not in ONLY_COUNTED:
                found[kind].add(item.key, reason)
                return
            found[kind].count += 1
            if reason and item.there_modified == item.modified:
                found["headers_changed"].add(item.key, reason)
            elif reason:
                found["changed"].add(item.key, f"its content is the same, but not: {reason}")


# ---------------------------------------------------------------------------------------------- Manual mode

# `backup.py mount` returns while its mount lives on. A child of it, the keeper, is tigrisfs's parent: it
# unmounts when it is asked to, and sees the end. It holds a lock for as long as it lives, which, unlike a
# process id, cannot be mistaken. What it says then the command that unmounts prints.

MANUAL_WORK = "`backup.py mount`"  # the purpose that a manual mount's lease names
HOW_MOUNTED = {False: "read-only", True: "for reading and writing"}
UNMOUNT_TRIES = 5  # the keeper has a file open, too, for a moment


def state_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"s3borgbackup-{os.getuid()}"


def lock_file(path: Path) -> IO[str] | None:
    """The file, locked until it is closed; None when somebody else holds the lock."""
    stream = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


class ManualMount:
    """A store's mount that a person makes and ends.

    The state is there from before it is mounted until a person is told how it ended: whether it is `writable`
    and `usable`, the `reason` why it cannot be unmounted, and at its end the keeper's exit `code`. The
    request asks to unmount, and is gone when that was in vain.
    """

    def __init__(self, runtime: Runtime, store: Store) -> None:
        folder = state_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise BackupError(f"{folder} belongs to somebody else", "Remove it, or set TMPDIR.")
        self.runtime, self.store, self.name, self.console = runtime, store, store.name, runtime.console
        mount_point = runtime.settings.mount_point(store)
        self.path = mount_point.parent.resolve() / mount_point.name
        name = folder / hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        self._lock, self._state = name.with_suffix(".lock"), name.with_suffix(".mount")
        self._output, self._request = name.with_suffix(".log"), name.with_suffix(".umount")

    def facts(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads(self._state.read_text(encoding="utf-8"))
        return {}

    def _note(self, **facts: Any) -> None:
        replace_file(self._state, json.dumps({**self.facts(), **facts}))

    def mount(self, read_write: bool) -> int:
        """Has a keeper mount it, unless one has; returns when it is usable, or the keeper's exit code."""
        while (lock := lock_file(self._lock)) is None:  # another command mounts it, or has, or unmounts it
            facts = self.facts()
            if facts.get("usable") and "code" not in facts:
                already = f"is mounted at {self.path} already, {HOW_MOUNTED[facts['writable']]}"
                if facts["writable"] != read_write:
                    raise BackupError(f"{self.name}: {already}", UNMOUNT_HELP.format(shlex.quote(self.name)))
                self.console.info(self.name, already)
                return EXIT_OK
            self.runtime.stop.wait(POLL_SECONDS)
        with lock:
            if self.facts():
                self._tell_end()
            self._request.unlink(missing_ok=True)
            self._note(writable=read_write)
            if not (keeper := os.fork()):  # there is no other thread
                LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # a command that is stopped is enough
                os.setsid()
                for fd in map(int, os.listdir("/proc/self/fd")):  # somebody's locks and pipes
                    if fd > 2 and fd != lock.fileno():
                        with contextlib.suppress(OSError):
                            os.close(fd)
                os._exit(self._keep(read_write))
        while not self.facts().get("usable"):
            ended, status = os.waitpid(keeper, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            self.runtime.stop.wait(POLL_SECONDS / 4)
        path = shlex.quote(str(self.path))
        self.console.plain(
            f"{self.name} ({self.store.location}) is mounted {HOW_MOUNTED[read_write]} at {path}\n"
            f"next:      {'borg list' if self.store.target else 'ls'} {path}\n"
            f"when done: backup.py umount {shlex.quote(self.name)}   (returns when everything is uploaded)"
        )
        return EXIT_OK

    def _keep(self, read_write: bool) -> int:
        """The keeper's life; its exit code."""
        code = EXIT_OK
        try:
            self._serve(read_write)
        except BackupError as error:
            self.console.error(self.name, str(error))
            code = error.exit_code
        if self.facts().get("usable"):
            self._note(code=code)
        else:  # whoever mounts it has seen what went wrong
            self._state.unlink(missing_ok=True)
        return code

    def _serve(self, read_write: bool) -> None:
        """Mounts it, under the lease where it is a target; returns after a request or a stop signal."""
        runtime, store = self.runtime, self.store
        check = preflight_one(runtime, store, write=read_write)
        client, lease = S3Client(store, check.region, PROVEN, runtime.stop), None
        client.is_sorted = check.is_sorted
        with contextlib.ExitStack() as undo:  # gives the lease back
            if store.target and check.repository_state(store) is RepositoryState.READY:
                lease = undo.enter_context(Lease(runtime, client, MANUAL_WORK))
                clear_leftovers(runtime, client, lease)
            with mounted(runtime, store, client.region, read_only=not read_write, lease=lease) as mount:
                mount.wait_until_usable()
                if store.target and not lease:
                    # `borg init` wants an empty folder: a listing from before the lease does not show that.
                    mount.lease = undo.enter_context(Lease(runtime, client, MANUAL_WORK))
                    mount.lease.add(mount.child)
                with self._output.open("w") as output:
                    for fd in range(3):  # the terminal, or whoever reads what `backup.py mount` says
                        os.dup2(output.fileno(), fd)
                self.console.leave_standard_output()
                LIBC.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
                self._note(usable=True)
                lacking, settled_at = [], 0.0
                while mount.child.wait(POLL_SECONDS) is None and not runtime.stop.requested:
                    if self._request.exists():
                        lacking, settled_at = settle(mount, client), time.monotonic()
                        for _ in range(UNMOUNT_TRIES):
                            if not (reason := detach(runtime, mount.path, lazy=False)):
                                break
                            time.sleep(POLL_SECONDS)
                        if not reason:
                            break
                        lacking = []  # whoever works in it may go on
                        self._note(reason=reason)
                        self._request.unlink()
            if not lacking and read_write and mount.log.complained_at > settled_at:
                lacking = [mount.log.reason]
            if lacking:
                raise not_uploaded(store, lacking)

    def umount(self) -> int:
        """Has the keeper unmount it; returns its exit code when everything is uploaded."""
        is_asked = False
        while (lock := lock_file(self._lock)) is None:  # the keeper sees to it that this ends
            if not self._request.exists() and (facts := self.facts()).get("usable"):
                if is_asked:
                    hint = f"Leave {self.path} (cd /), close what is open there and repeat."
                    raise BackupError(f"{self.name}: cannot be unmounted: {facts.get('reason')}", hint)
                self._request.touch()
                is_asked = True
            self.runtime.stop.check()
            self.console.progress(self.name, "uploading what tigrisfs still holds")
            time.sleep(POLL_SECONDS / 4)
        with lock:
            return self._tell_end()

    def _tell_end(self) -> int:
        """Tells, once, how a keeper has ended, and frees what it left; its exit code.

        Whoever calls holds the lock. Raises BackupError where the mount is not the keeper's.
        """
        facts = self.facts()
        if str(self.path) in mount_table() and not remove_dead_mount(self.runtime, self.path):
            raise BackupError(f"{self.name}: another command has it mounted at {self.path}", "Let that end.")
        self._state.unlink(missing_ok=True)
        if not facts.get("usable"):
            self.console.info(self.name, f"is not mounted at {self.path}")
            return EXIT_OK
        with contextlib.suppress(OSError):
            print(self._output.read_text(errors="replace"), end="", file=sys.stderr)
        code = facts.get("code", EXIT_FAILURE if facts["writable"] else EXIT_OK)
        if code and "code" not in facts:
            words = f"its mount at {self.path} was killed, and may have held what is not uploaded"
            self.console.error(self.name, f"{words}. Mount it again, compare, and copy what is missing.")
        done = ", everything is uploaded" if facts["writable"] and not code else ""
        self.console.info(self.name, f"is unmounted{done}")
        return code


def mount_manually(runtime: Runtime, store: Store, read_write: bool) -> int:
    """Mounts `store` so that it lives on after this command; returns when it is usable."""
    return ManualMount(runtime, store).mount(read_write or store.target is not None)


def umount_manually(runtime: Runtime, stores: Sequence[Store]) -> int:
    """Unmounts what `mount_manually` mounted, by default all; returns when everything is uploaded."""
    mounts = [ManualMount(runtime, store) for store in stores or runtime.settings.stores]
    mounts = [mount for mount in mounts if stores or mount.facts()]
    if not mounts:
        runtime.console.info("umount", "nothing is mounted")
    results = side_by_side([mount.umount for mount in mounts], runtime.stop)
    for mount, result in zip(mounts, results, strict=True):
        if isinstance(result, BackupError):
            runtime.console.error(mount.name, str(result))
    return max([EXIT_OK, *(getattr(result, "exit_code", result) for result in results)])


# --------------------------------------------------------------------------------------------- Command line


def chosen(settings: Settings, kind: str, given: Any) -> Any:
    """The targets, or stores, that a command line names."""
    known: dict[str, Any] = {target.store.name: target for target in settings.targets}
    known |= {target.name: target for target in settings.targets}
    if kind.startswith("store"):
        known = {name: target.store for name, target in known.items()} | {"source": settings.source}
    names = given if isinstance(given, list) else [given]
    if unknown := [name for name in names if name not in known]:
        targets = ", ".join(target.name for target in settings.targets)
        raise ConfigurationError([f"there is no target {name!r}; known are {targets}" for name in unknown])
    found = list(dict.fromkeys(known[name] for name in names))
    if kind == "targets" and not found:
        return list(settings.targets)
    return found if isinstance(given, list) else found[0]


def run_check(runtime: Runtime, target: Target, max_duration: int | None, verify_data: bool) -> int:
    with opened_for_writing(runtime, target, "`check`") as repository:
        record = check_repository(runtime, repository, CheckPlan(max_duration), verify_data)
    expect_sound(repository, record)
    return EXIT_OK


TEXT, PATH = matching(".+"), matching(".+", Path)
TIME_HELP = "a time such as 2025-01-31T03:00, local or with a zone (+01:00 or Z)"
SAMPLE_HELP = "a number of objects, a share such as 1%, or all"
SPAN_HELP = "a number and a unit (s, m, h), such as 30m"
SPAN = matching("[0-9]+[smh]", lambda text: parse_check(text).seconds)
# By parameter: what a person writes, how that is read (None: it is there or not), and what it is.
ARGUMENTS: Mapping[str, tuple[str, Callable[[str], Any] | None, str]] = {
    "target": ("NAME", str, "a target's name"),
    "targets": ("NAME...", str, "targets' names; all targets without any"),
    "store": ("NAME", str, "source, or target-<name>"),
    "stores": ("NAME...", str, "source, or target-<name>; all without any"),
    "paths": ("PATH...", matching(".*[^/].*"), "a key, or a folder of keys; leave it out to restore all"),
    "all_shards": ("--all-shards", None, "verify each part of the source, see SHARD"),
    "archive": ("--archive ARCHIVE", TEXT, "its name; leave it out for the newest of BACKUP_LABEL"),
    "until": ("--at TIME", end_of_time, f"{TIME_HELP}: the newest archive until then"),
    "folder": ("--to DIR", PATH, "a path: restore into this folder"),
    "bucket": ("--to-bucket BUCKET[:PREFIX]", parse_path, f"{PATH_HELP}: restore into this bucket"),
    "metadata": ("--metadata FILE", PATH, "a path for headers and tags, a JSON object a line"),
    "overwrite": ("--overwrite", None, "what is there with other content, headers or tags, too"),
    "dry_run": ("--dry-run", None, "only tell what would be done"),
    "as_json": ("--json", None, "print JSON, for programs"),
    "sample": ("--sample N", parse_sample, f"{SAMPLE_HELP}: whose content is proved ({DEFAULT_SAMPLE})"),
    "seed": ("--seed SEED", int, "the number that was printed, for the same sample"),
    "max_duration": ("--max-duration TIME", SPAN, f"{SPAN_HELP}: at most so long"),
    "verify_data": ("--verify-data", None, "decrypt and verify each piece of data, too"),
    "read_write": ("--read-write", None, "so that objects can be restored into it"),
}

# What does it, and its parameters: `a|b` exclude each other, in brackets one is needed.
COMMANDS: Mapping[str, tuple[Callable[..., int], str, str]] = {
    "run": (run_backup, "targets", "back up to all targets, or to those named; so does no command"),
    "check-config": (check_config, "", "check the configuration, and ask each store"),
    "list": (functools.partial(show, ask=archives_shown), "targets as_json", "show archives"),
    "info": (functools.partial(show, ask=repository_shown), "targets as_json", "show size, last run, key"),
    "maintain": (maintain, "targets", "prune, compact and check, without the source"),
    "key-export": (export_key, "target", "print a repository's key, to be kept elsewhere"),
    "borg": (run_borg, "target", "run any borg command: borg first diff ARCHIVE1 ARCHIVE2"),
    "verify": (run_verify, "target archive|all_shards sample seed as_json", "compare with the source"),
    "check": (run_check, "target max_duration|verify_data", "check a repository; never repairs"),
    "restore": (
        restore,
        "target paths archive|until (folder|bucket) metadata overwrite dry_run",
        "restore an archive, or parts of it",
    ),
    "mount": (mount_manually, "store read_write", "mount `source` or `target-<name>` below /data"),
    "umount": (umount_manually, "stores", "unmount it, or all; returns when all is uploaded"),
}
SOURCE_COMMANDS = ("run", "check-config", "verify")  # they need the source's configuration
DATA_COMMANDS = ("list", "info", "key-export", "verify", "borg")  # standard output is for what is asked

EPILOG = """\
Configuration comes from environment variables; example.env and README.md explain each:
{variables}

Any other word that is a program is run in our place: `docker run -it ... s3borgbackup ash` gives a shell.

exit codes:
  0 all well   1 finished with warnings   2 something failed   75 another run works on the repository
  78 wrong configuration or usage   128+N stopped by signal N   `borg NAME`: borg's own
"""
GREETING = """\
s3borgbackup backs up an S3 bucket to other S3 buckets. Environment variables configure it, and none of them
is set. (Was `--env-file .env` forgotten?) Three steps:

  1. cp example.env .env     and put in your buckets, keys and passphrases
  2. docker run --rm --env-file .env s3borgbackup check-config
  3. the backup, with the other flags that README.md has in "Quick start"

`backup.py --help` shows all commands. What is missing:
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError([f"`{self.prog}`: {message} (see `{self.prog} --help`)"])


def parse_arguments(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters. Raises SystemExit when help was printed."""
    name, *given = argv or ["run"]
    variables = "\n".join(f"  {name:26}{row.help}" for name, row in VARIABLES.items())
    parser = Parser(
        "backup.py",
        description="Backs up an S3 bucket to one or more S3 buckets with BorgBackup.",
        epilog=EPILOG.format(variables=variables),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"s3borgbackup {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for each, (_, usage, about) in COMMANDS.items():
        command = commands.add_parser(each, prog=each, allow_abbrev=False, help=about, description=about)
        for words in usage.split():
            is_needed = words.startswith("(")
            group = command.add_mutually_exclusive_group(required=is_needed) if "|" in words else command
            for word in words.strip("()").split("|"):
                written, parse, what = ARGUMENTS[word]
                *option, metavar = written.split() if parse else (written, "")
                how: dict[str, Any] = {"action": "store_true"}
                if parse:
                    how = {"type": Value(what, parse), "metavar": metavar.rstrip(".")}
                if metavar.endswith("..."):
                    how["nargs"] = "*"
                group.add_argument(*option, dest=word, help=what.replace("%", "%%"), **how)
    commands.choices["verify"].set_defaults(sample=DEFAULT_SAMPLE, seed=secrets.randbelow(10**9))
    commands.choices["borg"].usage = "borg NAME COMMAND..."
    if name in ("help", "-h", "--help", "--version"):
        parser.parse_args(["--version" if name == "--version" else "--help"])
    if name not in COMMANDS:
        raise ConfigurationError([f"unknown command {name!r}; {near(name, COMMANDS)} (see --help)"])
    command = commands.choices[name]
    if name != "borg":
        return name, vars(command.parse_intermixed_args(given))
    parsed = vars(command.parse_args(given[:1]))
    if not given[1:]:
        command.error("a command of borg has to follow the target's name")
    return name, {**parsed, "arguments": given[1:]}  # which are for borg to judge


def other_program(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """A program that `argv` names, such as a shell: `borg`, too, unless a target's name follows."""
    name, *words = argv or ["run"]
    is_borgs = name == "borg" and (not words or words[0] in BORG_COMMANDS or words[0].startswith("-"))
    if name.startswith("-") or (name in COMMANDS and not is_borgs):
        return ""
    return shutil.which(name, path=environ.get("PATH")) or ""


# What process 1 becomes: a Python that has imported next to nothing takes 3 MB, ours 25. Its arguments: the
# child's process id, the folder of the keepers' states, and what to run where a shell leaves one.
INIT = """\
import os, signal, sys

child, folder, umount = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
is_shell = umount and os.isatty(0)

def pass_on(number, _):
    try:
        if not is_shell or number != signal.SIGINT:  # Ctrl-C reaches it from the terminal
            os.kill(child, number)
        if is_shell and number == signal.SIGTERM:
            os.kill(child, signal.SIGHUP)  # one that talks to a person ignores SIGTERM
    except ProcessLookupError:
        pass

def end():
    while (ended := os.waitpid(-1, 0))[0] != child:
        pass
    code = os.waitstatus_to_exitcode(ended[1])
    return code if code >= 0 else 128 - code

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, pass_on)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
code = end()
if umount and os.path.isdir(folder) and any(name.endswith(".mount") for name in os.listdir(folder)):
    child = os.posix_spawn(umount[0], umount, os.environ)
    last = end()
    code = code or last
sys.exit(code)
"""


def be_init(argv: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """As PID 1: runs ourselves, or what `argv` names, passes signals on, reaps orphans.

    The kernel gives PID 1 no default signal actions, and every process whose parent has ended. When the child
    ends, so does the container: what it left mounted by hand is unmounted first. A shell is left in the
    terminal's foreground process group, where Ctrl-C reaches it; us it reaches once, from PID 1.
    """
    ourselves, last = [sys.executable, os.path.abspath(__file__)], []
    words, how = [*ourselves, *argv], {"setpgroup": 0}
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until INIT can pass them on
    if program := other_program(argv, environ):
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # nobody could have it go on; a shell sees to its own
        words, how = argv, {"setsigdef": (signal.SIGPIPE, signal.SIGXFSZ)}  # which Python ignores
        last = [*ourselves, "umount"]
    pid = os.posix_spawn(program or ourselves[0], words, dict(environ), setsigmask=(), **how)
    words = [sys.executable, "-ISc", INIT, str(pid), str(state_folder()), *last]
    os.execve(words[0], words, dict(environ))


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Prints errors, one a line, and returns the exit code."""
    if os.getpid() == 1:
        return be_init(argv, environ)
    if program := other_program(argv, environ):
        os.execve(program, list(argv), dict(environ))
    configuration, command, stop = Configuration(environ), argv[0] if argv else "run", Stop()
    known = configuration.known
    report = Report(secrets.token_hex(6), known.label, datetime.now(UTC), command=command, shard=known.shard)
    console = Console(False, known.log_as_json, report.run_id)
    console.secrets = configuration.secrets
    threading.excepthook = lambda hook: console.defect("thread", hook.exc_value)
    stop.install()
    reporter = Reporter(known, console, stop, report)
    try:
        name, arguments = parse_arguments(argv)
        if name in DATA_COMMANDS:
            console.leave_standard_output()
        if not any(environ.get(variable) or environ.get(f"{variable}_FILE") for variable in VARIABLES):
            console.plain(GREETING)
        needs_source = name in SOURCE_COMMANDS or (name in ("mount", "umount") and "source" in argv)
        settings = configuration.settings(needs_source, arguments.get("bucket"))
        console.debug_is_shown = settings.debug
        report.configured = tuple(target.name for target in settings.targets)
        for key in ("target", "targets", "store", "stores"):
            if key in arguments:
                arguments[key] = chosen(settings, key, arguments[key])
        if arguments.get("bucket"):
            arguments["bucket"] = settings.destination
        memory_mb = settings.memory_limit_mb or container_memory_mb()
        if command in TOLD_COMMANDS:
            reporter.start()
        code = COMMANDS[name][0](Runtime(settings, environ, console, stop, memory_mb, report), **arguments)
    except SystemExit as end:  # argparse has printed what was asked for: the help, or the version
        return int(end.code or EXIT_OK)
    except ConfigurationError as error:
        code = error.exit_code
        for mistake in error.mistakes:
            console.error("configuration", mistake)
    except BackupError as error:
        code = error.exit_code
        console.error(command, str(error))
    except Exception as error:  # Python's own exit code for it, 1, means warnings here
        code = EXIT_FAILURE
        console.defect(command, error)
    if command in TOLD_COMMANDS:
        reporter.end(code)
    return code


def redacted(text: str, secrets: Iterable[str]) -> str:
    """`text` without these secrets, whichever way Python may quote them, and without signatures."""
    forms = {form.strip() for secret in secrets for form in (secret, repr(secret)[1:-1], ascii(secret)[1:-1])}
    for form in sorted(forms - {""}, key=len, reverse=True):
        text = text.replace(form, "***")
    return re.sub(r"(Credential|Signature)=[^\s,'\"]+", r"\1=***", text)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    code = main(sys.argv[1:], os.environ)
    with contextlib.suppress(OSError):  # whoever read it may be gone
        sys.stdout.flush()
    os._exit(code)  # a thread that hangs in a read of a dead mount must not keep us
