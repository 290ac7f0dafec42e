"""A slow way to the target, made by the kernel's traffic control in a network namespace."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import Backup, Bucket, settings, skip_or_fail
from proof import newest_contents
from proxy import FaultProxy
from servers import WRITER, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")


@dataclass(frozen=True)
class SlowNetwork:
    """A network namespace from which `address` can be reached, ours, and nothing else."""

    name: str
    address: str

    @property
    def through(self) -> tuple[str, ...]:
        """The command that executes another one in it: mounts, processes and files are ours."""
        return ("nsenter", f"--net=/run/netns/{self.name}")

    def slow_down(self, kilobits: int) -> None:
        """All that is sent from it, in all, has this much a second from now on; tc-tbf(8)."""
        bucket = ("tbf", "rate", f"{kilobits}kbit", "burst", "32kb", "latency", "400ms")
        if problem := run("tc", "-n", self.name, "qdisc", "replace", "dev", "uplink", "root", *bucket):
            skip_or_fail(f"tc: {problem}")


def run(*argv: str) -> str:
    """Run a command; why it failed, or nothing."""
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.stderr.strip() or f"ended with {done.returncode}" if done.returncode else ""


@pytest.fixture
def network() -> Iterator[SlowNetwork]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "nsenter"))):
        skip_or_fail("a network namespace takes root, ip(8), tc(8) and nsenter(1)")
    name, link = f"s3borgbackup-{os.getpid()}", f"s3b{os.getpid()}"
    # Of 198.18.0.0/15, which no network may use, as it is for benchmarks.
    place = os.getpid() % 2**15
    near, far = (f"198.{18 + place // 2**14}.{place // 64 % 256}.{place % 64 * 4 + last}" for last in (1, 2))
    inside = ("ip", "-n", name)
    commands = (
        ("ip", "netns", "add", name),
        ("ip", "link", "add", link, "type", "veth", "peer", "name", "uplink", "netns", name),
        ("ip", "address", "add", f"{near}/30", "dev", link),
        ("ip", "link", "set", link, "up"),
        (*inside, "address", "add", f"{far}/30", "dev", "uplink"),
        (*inside, "link", "set", "uplink", "up"),
        (*inside, "link", "set", "lo", "up"),
    )
    try:
        for command in commands:
            if problem := run(*command):
                skip_or_fail(f"{' '.join(command)}: {problem}")
        yield SlowNetwork(name, near)
    finally:
        run("ip", "netns", "delete", name)  # with both ends of the link


@pytest.mark.long
def test_an_upload_may_take_as_long_as_the_line_needs(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, network: SlowNetwork
) -> None:
    """TigrisFS sends the segment in two parts at once: neither can end within its default of 30 s a request.

    Bytes move all the time, which is no stall.
    """
    objects = {"large": os.urandom(6_500_000)}
    source.put(objects)
    with FaultProxy(server.endpoint, address=network.address) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint, "compression": "none"}
        environment = settings(
            server,
            tmp_path,
            source.name,
            {"first": entry},
            SOURCE_ENDPOINT=proxy.endpoint,
            STALL_TIMEOUT="20",
        )
        network.slow_down(1300)
        with Backup(environment, through=network.through) as running:
            running.wait(240).expect(0)
        parts = [status for request, status in proxy.requests if request.kind == "PART"]
        assert parts == [200, 200]
    assert newest_contents(target, tmp_path, environment) == objects


@pytest.mark.long
def test_a_restore_may_take_as_long_as_the_line_needs(
    server: SeaweedFS, source: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path, network: SlowNetwork
) -> None:
    """All requests under way share the line, and none is sent twice."""
    objects = {"large": os.urandom(20_000_000)}
    objects |= {f"small-{number}": os.urandom(30_000) for number in range(160)}
    source.put(objects)
    restored = new_bucket("restored")
    with FaultProxy(server.endpoint, address=network.address) as proxy:
        entry = {"path": new_bucket("target").name, "endpoint": proxy.endpoint}
        environment = settings(
            server,
            tmp_path,
            source.name,
            {"first": entry},
            SOURCE_ENDPOINT=proxy.endpoint,
            RESTORE_ACCESS_KEY_ID=WRITER.access_key_id,
            RESTORE_SECRET_ACCESS_KEY=WRITER.secret_access_key,
        )
        with Backup(environment, through=network.through) as running:
            running.wait(120).expect(0)
        network.slow_down(4000)
        before = len(proxy.requests)
        with Backup(
            environment, "restore", "first", "--to-bucket", restored.name, through=network.through
        ) as running:
            running.wait(240).expect(0)
        asked = [request for request, _ in proxy.requests[before:] if request.bucket == restored.name]
    sent = [request.key for request in asked if request.kind == "PUT" and request.key.startswith("small")]
    assert len(sent) == len(set(sent)) == 160
    assert [request.kind for request in asked].count("PART") == 2
    assert restored.contents() == objects
