"""Whose a lock of borg is, by its name and by `lock.roster`; which index is broken; where caches lie."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import backup

OURS, THEIRS = "s3borgbackup-0123456789ab.7-0", "laptop@12345.99-0"


def roster(**kinds: Sequence[str]) -> bytes:
    """A `lock.roster` in which these hosts hold locks of these kinds."""
    return json.dumps({kind: [[host, 7, 0] for host in hosts] for kind, hosts in kinds.items()}).encode()


@pytest.mark.parametrize(
    ("names", "listed", "stale", "owners"),
    [
        ([], b"", [], []),
        (["lock.exclusive/"], b"", ["lock.exclusive/"], []),
        ([f"lock.exclusive/{OURS}"], b"", [f"lock.exclusive/{OURS}", "lock.exclusive/"], []),
        (
            ["lock.exclusive/", f"lock.exclusive/{OURS}"],
            b"",
            [f"lock.exclusive/{OURS}", "lock.exclusive/"],
            [],
        ),
        (["lock.exclusive/", f"lock.exclusive/{THEIRS}"], b"", [], [THEIRS]),
        (
            [f"lock.exclusive/{OURS}", f"lock.exclusive/{THEIRS}"],
            b"",
            [f"lock.exclusive/{OURS}"],
            [THEIRS],
        ),
        # Nobody holds a lock that he has not taken yet; it is his all the same.
        ([f"lock.exclusive.x1y2.tmp/{THEIRS}"], b"", [], []),
        (
            [f"lock.exclusive.x1y2.tmp/{OURS}"],
            b"",
            [f"lock.exclusive.x1y2.tmp/{OURS}", "lock.exclusive.x1y2.tmp/"],
            [],
        ),
        (["lock.roster"], roster(shared=[]), ["lock.roster"], []),
        (["lock.roster"], roster(shared=["s3borgbackup-1"]), ["lock.roster"], []),
        (["lock.roster"], roster(shared=["laptop@1"]), [], ["laptop@1.7"]),
        (["lock.roster"], roster(exclusive=["laptop@1"], shared=["s3borgbackup-1"]), [], ["laptop@1.7"]),
        (["lock.roster"], b"{", ["lock.roster"], []),
        # An index without hints, hints without an index: nobody can use either.
        (["hints.7", "index.7", "integrity.7", "hints.9", "index.9"], b"", [], []),
        (
            ["hints.7", "index.7", "index.9", "integrity.9", "hints.11", "integrity.12"],
            b"",
            ["index.9", "integrity.9", "hints.11", "integrity.12"],
            [],
        ),
        (["index.9", "lock.exclusive/", f"lock.exclusive/{THEIRS}"], b"", [], [THEIRS]),
        (["index.9", "lock.roster"], roster(shared=["laptop@1"]), [], ["laptop@1.7"]),
        (["index.x", "indexes.9", "data/0/index.9"], b"", [], []),
        # What borg was about to rename.
        (["index.9.tmp", "nonce", "nonce-x1y2.tmp"], b"", ["index.9.tmp", "nonce-x1y2.tmp"], []),
        (["nonce-x1y2.tmp", "lock.exclusive/", f"lock.exclusive/{THEIRS}"], b"", [], [THEIRS]),
        (["data/0/nonce-x1y2.tmp", "nonce-x1y2.tmp/x"], b"", [], []),
        # No lock of borg's, whatever it is.
        (["lock.exclusive-by-me/x", "lock.txt", "data/0/lock.exclusive/x"], b"", [], []),
    ],
)
def test_our_own_locks_are_stale_and_those_of_others_have_an_owner(
    names: Sequence[str], listed: bytes, stale: Sequence[str], owners: Sequence[str]
) -> None:
    assert backup.leftovers(names, listed) == (stale, owners)


@pytest.mark.parametrize("host", ["not-s3borgbackup-1", "s3borgbackup", "S3BORGBACKUP-1", "s3borgbackup_1"])
def test_only_a_host_id_that_begins_like_ours_is_ours(host: str) -> None:
    assert backup.leftovers([f"lock.exclusive/{host}.1-0"], b"")[1] == [f"{host}.1-0"]
    assert backup.leftovers([], roster(exclusive=[host]))[1] == [f"{host}.7"]


@pytest.mark.parametrize(
    ("listed", "owners"),
    [
        (b"", []),
        (b"{}", []),
        (b"[]", []),
        (b"null", []),
        (b'{"shared": 5}', []),
        (b'{"shared": [["laptop@1", 7]]}', []),
        (b"\xff\xfe", []),
        (roster(exclusive=[], shared=["a@1", "s3borgbackup-1", "b@2"]), ["a@1.7", "b@2.7"]),
    ],
)
def test_a_roster_names_who_else_is_there_and_an_unreadable_one_nobody(
    listed: bytes, owners: Sequence[str]
) -> None:
    assert backup.leftovers(["lock.roster"], listed)[1] == owners


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HOME": "/root"}, "/root/.cache/borg"),
        ({"HOME": "/root", "XDG_CACHE_HOME": "/cache"}, "/cache/borg"),
        ({"HOME": "/root", "BORG_BASE_DIR": "/base"}, "/base/.cache/borg"),
        (
            {"HOME": "/root", "BORG_BASE_DIR": "/base", "XDG_CACHE_HOME": "/cache"},
            "/base/.cache/borg",
        ),
        ({"XDG_CACHE_HOME": "/cache", "BORG_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_borgs_cache_is_where_borg_looks_for_it(environ: Mapping[str, str], folder: str) -> None:
    """borg 1.4's `get_cache_dir`."""
    assert backup.borg_folder(environ, "CACHE") == Path(folder)
