"""Keys that do not last: session tokens, and the platform's keys, in AWS's order, renewed in time."""

import dataclasses
import http.server
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import backup
from faults.proxy import FaultProxy, Request
from helpers import (
    POLL_SECONDS,
    Backup,
    Bucket,
    command_line,
    descendants,
    first_short,
    run_backup,
    settings,
    wait_until,
    with_target,
    with_target_secrets,
)
from platforms import KINDS, Lent, Platform, guard, lent_until, reply, sts_error
from servers import SeaweedFS, free_ports

pytestmark = pytest.mark.usefixtures("needs_fuse")

KEY = ("access_key_id", "secret_access_key")
ORIGINS = {
    "environment": "AWS_ACCESS_KEY_ID",
    "web identity": "the role arn:aws:iam::123456789012:role/backup",
    "ecs": "the container's role",
    "eks": "the container's role",
    "imds": "the instance's role backup-role",
}


@contextmanager
def guarded(server: SeaweedFS, accepts: Callable[[Request], bool], **options: float) -> Iterator[FaultProxy]:
    """A store that takes only what is signed with keys that hold, each with its token."""
    with FaultProxy(server.endpoint) as proxy:
        guard(proxy, accepts, **options)
        yield proxy


def keyless(endpoint: str, server: SeaweedFS, folder: Path, *names: str, **more: str) -> dict[str, str]:
    """Settings of a source and a target without any key, behind this endpoint."""
    env = settings(server, folder, names[0], {"first": names[1]}, SOURCE_ENDPOINT=endpoint, **more)
    env = {name: text for name, text in env.items() if not name.startswith("SOURCE_") or "_KEY" not in name}
    return with_target_secrets(with_target(env, "first", endpoint=endpoint), "first", **dict.fromkeys(KEY))


def token_of(keys: Lent) -> dict[str, str]:
    """These keys as a target's secrets."""
    return {part: getattr(keys, part) for part in (*KEY, "session_token")}


def settings_of(keys: Lent, place: str) -> dict[str, str]:
    """These keys as variables."""
    return {f"{place}{part.upper()}": text for part, text in token_of(keys).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_platforms_keys_are_found_and_said(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, kind: str
) -> None:
    with Platform(tmp_path) as platform, guarded(server, platform.accepts) as proxy:
        env = keyless(proxy.endpoint, server, tmp_path, source.name, target.name)
        result = run_backup({**env, **platform.variables(kind)}, "check-config").expect(0)
        until = "" if kind == "environment" else f", until {next(iter(platform.lent.values())).expiration}"
    told = re.findall(r"credentials +(.*)", result.output)
    assert told == 2 * [f"{ORIGINS[kind]}{until}"]
    assert len(platform.lent) == 1


def test_the_platform_is_asked_in_the_order_of_awss_programs(tmp_path: Path) -> None:
    known: dict[str, str] = {}
    told: list[str] = []  # what no traceback may show
    with Platform(tmp_path) as platform:
        for kind in ("imds", "eks", "web identity", "environment"):
            known |= platform.variables(kind)
            assert backup.Platform(known, told).keys().origin == ORIGINS[kind]
    assert len(told) == 6


def keys_used(proxy: FaultProxy, bucket: Bucket, is_mount: bool) -> set[str]:
    """The ids of the keys that a bucket's mount, or our own client, has signed with."""
    return {
        parts[2]
        for request, _ in proxy.requests
        if request.bucket == bucket.name
        and ("user-agent" in request.headers) == is_mount  # ours says nothing of itself
        and (parts := request.authorization)
    }


def refused(proxy: FaultProxy) -> list[str]:
    """What the store did not take."""
    return [f"{each.method} {each.target}" for each, status in proxy.requests if status in (400, 401, 403)]


@pytest.mark.parametrize("kind", first_short(["web identity", "imds", "eks"]))
def test_a_run_does_not_notice_that_keys_expire(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, kind: str
) -> None:
    """Neither does its source's mount nor its target's; and nothing secret is seen of any of the keys."""
    source.put({f"{number:02}": os.urandom(1_100_000) for number in range(24)})  # read through the mount
    seen: set[str] = set()
    with (
        Platform(tmp_path, seconds=10) as platform,
        guarded(server, platform.accepts, get_seconds=1) as proxy,
    ):
        # One object after the other.
        more = {"LOG_LEVEL": "debug", "READ_AHEAD_THREADS": "0", **platform.variables(kind)}
        env = keyless(proxy.endpoint, server, tmp_path, source.name, target.name, **more)
        with Backup(env) as running:
            while running.process.poll() is None:
                seen |= {command_line(pid) for pid in [running.pid, *descendants(running.pid)]}
                time.sleep(POLL_SECONDS)
            result = running.wait().expect(0)
        assert result.duration_seconds > 2 * platform.seconds, "too quick to show anything"
        assert refused(proxy) == []
        for bucket, is_mount in itertools.product((source, target), (True, False)):
            assert len(keys_used(proxy, bucket, is_mount)) > 1, (bucket.name, is_mount)
    assert not [text for text in platform.secrets for line in [*seen, *result.lines] if text in line]


@pytest.mark.long
def test_a_platform_that_hangs_for_a_while_holds_up_nothing_while_keys_hold(
    server: SeaweedFS, source: Bucket, tmp_path: Path
) -> None:
    with Platform(tmp_path, seconds=24) as platform, guarded(server, platform.accepts) as proxy:
        keys = backup.Platform(platform.variables("ecs"), [])
        store = backup.Store(None, proxy.endpoint, source.name, platform=keys)
        client = backup.S3Client(store, is_direct=True)
        client.list_page("")
        platform.fault = lambda _: time.sleep(8)
        slowest, end = 0.0, time.monotonic() + 40
        while time.monotonic() < end:
            start = time.monotonic()
            client.list_page("")
            slowest = max(slowest, time.monotonic() - start)
            if len(platform.asked) > 2:
                platform.fault = None
            time.sleep(0.1)
        assert slowest < 3
        assert refused(proxy) == []
        assert len(platform.lent) > 2


def hang(_: http.server.BaseHTTPRequestHandler) -> None:
    """No answer for long."""
    time.sleep(30)


FAULTS: dict[str, tuple[str, Callable[[http.server.BaseHTTPRequestHandler], None] | None, str]] = {
    "STS refuses": (
        "web identity",
        lambda each: reply(each, 403, sts_error("AccessDenied", "Not authorized to perform that")),
        r"AccessDenied \(403\): Not authorized to perform that",
    ),
    "the role's document has an error": (
        "imds",
        lambda each: reply(each, 200, '{"Code": "AssumeRoleUnauthorizedAccess", "Message": "no trust"}'),
        "the instance's role .*: no trust",
    ),
    "no role": ("imds", lambda each: reply(each, 404, ""), r"Not Found \(404\)"),
    "no JSON": ("ecs", lambda each: reply(each, 200, "<html>"), "its answer cannot be read"),
    "another JSON": ("ecs", lambda each: reply(each, 200, "[]"), "its answer cannot be read"),
    "refused": ("eks", None, "Connection refused"),
    "hanging": ("imds", hang, "timed out"),
}


# A run begins with its source.
PLACES = {
    "check-config": {"source": "SOURCE_ACCESS_KEY_ID", "target-first": 'TARGET_SECRETS "first"'},
    "run": {"source": "SOURCE_ACCESS_KEY_ID"},
}


@pytest.mark.parametrize(("kind", "fault", "reason"), first_short([*FAULTS.values()]), ids=FAULTS)
def test_a_platform_that_gives_no_keys_is_told_in_one_line_for_each_store(
    server: SeaweedFS,
    tmp_path: Path,
    kind: str,
    fault: Callable[[http.server.BaseHTTPRequestHandler], None] | None,
    reason: str,
) -> None:
    """What happened to whom, whom it was asked of, and what to do."""
    with Platform(tmp_path) as platform:
        platform.fault = fault
        variables = platform.variables(kind)
        host = platform.url.removeprefix("http://")
        if not fault:
            gone = f"127.0.0.1:{free_ports(1)[0]}"
            variables = {name: text.replace(host, gone) for name, text in variables.items()}
        env = keyless(server.endpoint, server, tmp_path, "source", "target", **variables)
        for command, places in PLACES.items():
            result = run_backup(env, command).expect(2)
            assert result.duration_seconds < 40
            told = sorted(line for line in result.lines if "error: " in line)
            assert len(told) == len(places), result.output
            for line, (name, place) in zip(told, places.items(), strict=True):
                words = (
                    rf"NoKeys: the platform gives no keys: .*{reason}.* Write {place}.* or see to the role"
                )
                assert re.search(rf"{name} .*{words}", line), line


def test_half_a_key_is_a_mistake_and_so_is_none_where_the_platform_has_none(
    server: SeaweedFS, tmp_path: Path
) -> None:
    env = keyless(server.endpoint, server, tmp_path, "source", "target")
    with Platform(tmp_path) as platform:
        half = {**env, **platform.variables("ecs"), "SOURCE_ACCESS_KEY_ID": "AK"}
    for environment, missing in ((half, {"SOURCE_SECRET_ACCESS_KEY"}), (env, set())):
        result = run_backup(environment, "check-config").expect(78)
        told = {line.partition("error: ")[2].partition(":")[0] for line in result.lines}
        keys = [f'TARGET_SECRETS "first"."{key}"' for key in KEY]
        assert told == (missing or {"SOURCE_ACCESS_KEY_ID", "SOURCE_SECRET_ACCESS_KEY", *keys})
    assert not (tmp_path / "data" / "source").exists()


def test_session_tokens_in_the_settings_are_used_by_mounts_and_restores_and_an_expired_one_is_told(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """Each store has keys of its own."""
    objects = {"a": b"1", "large": os.urandom(6_000_000)}
    source.put(objects)
    restored = new_bucket("restored")
    own = {bucket.name: lent_until(3600) for bucket in (source, target, restored)}
    with guarded(server, lambda request: own[request.bucket].accepts(request)) as proxy:
        env = keyless(proxy.endpoint, server, tmp_path, source.name, target.name, LOG_LEVEL="debug")
        env |= settings_of(own[source.name], "SOURCE_")
        env = with_target_secrets(env, "first", **token_of(own[target.name]))
        ran = run_backup(env).expect(0)
        env |= settings_of(own[restored.name], "RESTORE_")
        back = run_backup(env, "restore", "first", "--to-bucket", restored.name).expect(0)
        assert refused(proxy) == []
        assert restored.contents() == objects
        hidden = [text for keys in own.values() for text in (keys.secret_access_key, keys.session_token)]
        assert not [text for text in hidden if text in ran.output + back.output]

        own[source.name] = dataclasses.replace(own[source.name], until=time.time() - 1)
        late = run_backup(env).expect(2)
        assert re.search("source .*ExpiredToken.* Renew SOURCE_SESSION_TOKEN, or", late.output)
        own[restored.name] = own[source.name]
        late = run_backup(env, "restore", "first", "--to-bucket", restored.name).expect(2)
        assert re.search("ExpiredToken.* Renew RESTORE_SESSION_TOKEN, or", late.output)


@pytest.mark.long
def test_a_restore_and_mounts_by_hand_use_the_platforms_keys_beyond_their_end(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    objects = {f"{number}/object": os.urandom(1000) for number in range(3)}
    source.put(objects)
    restored = new_bucket("restored")
    with Platform(tmp_path, seconds=8) as platform, guarded(server, platform.accepts) as proxy:
        env = keyless(proxy.endpoint, server, tmp_path, source.name, target.name)
        env |= platform.variables("web identity")
        run_backup(env).expect(0)
        run_backup(env, "restore", "first", "--to-bucket", restored.name).expect(0)
        assert restored.contents() == objects
        run_backup(env, "mount", "source").expect(0)
        run_backup(env, "mount", "target-first").expect(0)
        lent = len(platform.lent)
        wait_until(lambda: len(platform.lent) > lent + 5, 60, "keys were renewed in both keepers")
        assert (tmp_path / "data/source/2/object").read_bytes() == objects["2/object"]
        (tmp_path / "data/target-first/README").write_bytes(b"new")
        run_backup(env, "umount").expect(0)
        assert refused(proxy) == []
    assert target.get("README") == b"new"
