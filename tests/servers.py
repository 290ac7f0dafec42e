"""Real S3 servers for tests, demo and benchmark: started on free loopback ports, ended for certain.

`SeaweedFS` is the server that all promises are tested against: it checks signatures and permissions and
enforces conditional writes. `Moto` keeps any key that S3 allows (SeaweedFS refuses or changes some), but
checks neither signatures nor permissions. `Toxiproxy` is no S3 server, but the bad network before one.

How SeaweedFS 4.48 answers, seen with the settings below:
- Unknown access key: 403 `InvalidAccessKeyId`. Wrong secret: 403 `SignatureDoesNotMatch`. No signature: 403
  `AccessDenied`. Answers to HEAD have no body, hence only the status (403, 404).
- Missing bucket: 404 `NoSuchBucket` for reading and for writing, but 403 `AccessDenied` for who may not do
  that at all (a reader's PUT, an identity limited to another bucket). Missing object: 404 `NoSuchKey`;
  deleting it: 204.
- PUT or DELETE by a reader, and anything outside the one bucket of a limited identity: 403 `AccessDenied`.
- `If-None-Match: *` and `If-Match` are enforced for PUT, `If-Match` for DELETE, with 412 `PreconditionFailed`
  (also `If-Match` on a missing object, where AWS says 404). Of 8 writers at once exactly one wins, in 40 of
  40 races for either header. Such a race can take 3 s (for a lock); alone, a conditional PUT takes 3 ms.
- Any region is accepted, and `GET ?location` gives an empty one. Responses have a `Date` header.
- Keys: `x//y` is stored as `x/y`, a leading backslash is dropped; `.` and `..` as a part of the path: 400
  `InvalidRequest`; a part of over 255 bytes: `KeyTooLongError`; an object `trail/` loses its content. `a`
  beside `a/b` is kept. A listing is sorted folder by folder (`a/b` before `a b`), not by the keys' bytes.
- A bucket with objects can be deleted (AWS: `BucketNotEmpty`).
"""

import contextlib
import ctypes
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
import botocore.config
import botocore.exceptions

START_TIMEOUT_SECONDS = 30
POLL_SECONDS = 0.05
_IN_FLIGHT = re.compile(r"^SeaweedFS_s3_in_flight_requests\{.*\} [^0]", re.MULTILINE)

# Below Linux's range for outgoing connections (32768 and up), so that no connection can sit on a server's
# port while the server is stopped.
PORTS = range(10_000, 32_000)

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Identity:
    """Who may do what: S3 credentials, and the bucket they are limited to (None: all buckets)."""

    access_key_id: str
    secret_access_key: str
    actions: tuple[str, ...]
    bucket: str | None = None

    def as_seaweedfs(self) -> dict[str, Any]:
        """The entry of SeaweedFS's `-s3.config` file for this identity."""
        suffix = f":{self.bucket}" if self.bucket else ""
        return {
            "name": self.access_key_id,
            "credentials": [{"accessKey": self.access_key_id, "secretKey": self.secret_access_key}],
            "actions": [action + suffix for action in self.actions],
        }


ADMIN = Identity("admin-key", "admin-secret-3f9c1d", ("Admin", "Read", "List", "Tagging", "Write"))
READER = Identity("reader-key", "reader-secret-8a20b7", ("Read", "List"))
WRITER = Identity("writer-key", "writer-secret-c45e96", ("Read", "List", "Tagging", "Write"))


class ServerError(RuntimeError):
    """A server did not start; the message ends with the last lines of its log."""


def die_with_parent() -> None:
    """For `preexec_fn`: have the kernel kill this child when the thread that started it ends.

    So a server does not outlive tests that were killed. It is the starting *thread* that counts: start
    servers from the main thread.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def terminate_with_parent() -> None:
    """The same by SIGTERM, for a program that has something to put in order at its end."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Different loopback TCP ports on which nothing listens at the moment."""
    with contextlib.ExitStack() as sockets:
        ports: list[int] = []
        while len(ports) < count:
            probe = sockets.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                port = random.choice(PORTS)
                probe.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def _is_stopped(task: Path) -> bool:
    """Whether a thread is stopped by a signal, proc(5); one that has ended is, too."""
    with contextlib.suppress(OSError):
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    return True


class Server:
    """A server process with its data and its log in one folder; a `with` block starts and stops it."""

    name = "server"
    port_count = 1
    # Who may do everything, who may only read, and who may write: the same where a server knows but one key.
    admin, reader, writer = ADMIN, READER, WRITER
    region = "us-east-1"
    start_seconds = START_TIMEOUT_SECONDS

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` keeps data and log; without one a temporary folder is used and removed."""
        self._owns_directory = directory is None
        self.directory = (
            Path(tempfile.mkdtemp(prefix="s3borgbackup-server-")) if directory is None else directory
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log_path = self.directory / f"{self.name}.log"
        self.ports: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The S3 endpoint's URL; the same after a restart."""
        return f"http://127.0.0.1:{self.ports[0]}"

    def command(self) -> Sequence[str | Path]:
        """The command line that runs the server in the foreground on `self.ports`."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """The whole environment of the server: nothing of the user's own S3 settings."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.directory)}

    def answers(self) -> bool:
        """Whether requests would succeed now."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start, or start again on the same ports with the same data, and wait until requests succeed.

        Raises ServerError when the server ends or does not answer in time.
        """
        chosen_before = bool(self.ports)
        for attempts_left in (2, 1, 0):
            if not chosen_before:
                self.ports = free_ports(self.port_count)
            try:
                self._start_once()
                return self
            except ServerError:
                self.stop()
                # Somebody may have taken a port between our look and the server's start.
                if chosen_before or not attempts_left or "address already in use" not in self.log_tail():
                    raise
        raise AssertionError("unreachable")

    def _start_once(self) -> None:
        if not shutil.which(str(self.command()[0])):
            raise ServerError(
                f"{self.command()[0]} is not on the PATH; tests/setup installs it, tests/run uses it"
            )
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment()),
                cwd=self.directory,
                # A session of its own, so that Ctrl-C reaches the tests first and they can still use it.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + self.start_seconds
        while not self.answers():
            if self.process.poll() is not None:
                raise ServerError(f"{self.name} ended with {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} does not answer:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Kill the server; what it acknowledged stays in `directory`. Stopping twice is fine.

        SIGKILL, because SeaweedFS needs minutes for an orderly end, and because a crash is what clients must
        survive. Nothing is lost by it: what was written is in the kernel's hands.
        """
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """Let the server hang: connections are accepted by the kernel, no request is answered."""
        assert self.process, "not running"
        self.process.send_signal(signal.SIGSTOP)
        while not all(map(_is_stopped, Path(f"/proc/{self.process.pid}/task").iterdir())):
            time.sleep(POLL_SECONDS)  # a thread that runs on may still answer

    def resume(self) -> None:
        """Go on after `pause`."""
        assert self.process, "not running"
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop, and remove the folder if it was a temporary one of ours."""
        self.stop()
        if self._owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def log_tail(self, line_count: int = 40) -> str:
        """The last lines of the server's log."""
        if not self.log_path.exists():
            return ""
        # Killed processes leave NUL bytes where memory-mapped or preallocated output was cut short.
        text = self.log_path.read_bytes().replace(b"\0", b"").decode(errors="replace")
        return "\n".join(text.splitlines()[-line_count:])

    def client(self, identity: Identity | None = None) -> Any:
        """A boto3 S3 client, of who may do everything unless given: path style, one try, short deadlines."""
        return s3_client(self.endpoint, identity or self.admin, self.region)

    def make_bucket(self, name: str) -> None:
        """Make a bucket that `reader` and `writer` may use as they are meant to."""
        self.client().create_bucket(Bucket=name)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Listed(Server):
    """A server that is up when it lists its buckets."""

    def answers(self) -> bool:
        try:
            self.client().list_buckets()
            return True
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False


class SeaweedFS(Listed):
    """SeaweedFS's master, volume server, filer and S3 gateway in one process (`weed server`).

    Up in 2.3 s (it sleeps for two of them), with 130 MB of memory. Each bucket is a collection with a volume
    of its own, so the first object of a bucket takes 0.2 s; 50 buckets with an object each take 1 MB.

    `has_metrics` lets it count requests, see `metrics`.
    """

    name = "seaweedfs"

    def __init__(self, directory: Path | None = None, *, has_metrics: bool = False) -> None:
        super().__init__(directory)
        self._has_metrics = has_metrics
        self.port_count = 9 if has_metrics else 8
        self.identities = [ADMIN, READER, WRITER]
        self._config_path = self.directory / "identities.json"
        self._write_identities()

    def command(self) -> Sequence[str | Path]:
        s3, s3_grpc, filer, filer_grpc, master, master_grpc, volume, volume_grpc = self.ports[:8]
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        return (
            *("weed", "-logtostderr", "server", f"-dir={data}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.peers=none"),
            *("-master.telemetry=false", "-master.volumeSizeLimitMB=1024"),
            *(f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}"),
            # Volumes are not preallocated: the number costs nothing, and each bucket takes at least one.
            *("-volume.max=10000", "-volume.minFreeSpace=100MiB"),
            *("-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"),
            f"-filer.localSocket={self._socket('filer')}",
            *("-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", f"-s3.config={self._config_path}"),
            f"-s3.localSocket={self._socket('s3')}",
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            # By default a write of an admin makes the missing bucket, where S3 says NoSuchBucket.
            "-s3.autoCreateBucket=false",
            *((f"-metricsPort={self.ports[8]}",) if self._has_metrics else ()),
        )

    def environment(self) -> Mapping[str, str]:
        # One new volume a bucket (default 7): growing is most of the time that a bucket's first write takes.
        return {**super().environment(), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}

    def answers(self) -> bool:
        try:
            return super().answers() and self._has_volume_server()
        except OSError:
            return False

    def _has_volume_server(self) -> bool:
        """Without one, listing works already and every write fails."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[4]}/dir/status", timeout=5) as response:
            return json.load(response)["Topology"]["Max"] > 0

    def metrics(self) -> str:
        """Its counters up to now, in Prometheus's text format.

        Each answered S3 request is counted once in SeaweedFS_s3_request_total, with its bucket; but not those
        that are refused for want of a permission. HEAD counts as GET, as does whatever else asks about a
        bucket; LIST is listing objects; a deletion of many objects counts as one DELETE.

        A request is counted after it was answered, but before it ceases to be in flight (`track` in
        weed/s3api/stats.go). So this waits until none is, and TimeoutError says that one still was.
        """
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while _IN_FLIGHT.search(self._scrape()):
            if time.monotonic() > deadline:
                raise TimeoutError("SeaweedFS still has requests in flight")
            time.sleep(POLL_SECONDS)
        # Once more: the counters of one answer may be older than its gauge.
        return self._scrape()

    def _scrape(self) -> str:
        assert self._has_metrics, "started without has_metrics"
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[8]}/metrics", timeout=30) as response:
            return response.read().decode()

    def stop(self) -> None:
        if not self.process:  # its ports may be another server's by now
            return
        super().stop()
        # Sockets for short cuts between its parts, which it leaves behind when killed.
        for port in self.ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)
        for part in ("filer", "s3"):
            self._socket(part).unlink(missing_ok=True)

    def _socket(self, part: str) -> Path:
        # Not in `directory`: a socket's path has at most 107 bytes.
        return Path(f"/tmp/seaweedfs-{part}-{self.ports[0]}.sock")

    def add_identity(self, identity: Identity) -> Identity:
        """Make another identity known to the running server; returns when its credentials are accepted."""
        self.identities.append(identity)
        self._write_identities()
        assert self.process, "not running"
        self.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self._knows(identity):
            if time.monotonic() > deadline:
                raise ServerError(f"SeaweedFS does not accept a new identity:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)
        return identity

    def _knows(self, identity: Identity) -> bool:
        try:
            self.client(identity).list_buckets()
            return True
        except botocore.exceptions.ClientError as error:
            return error.response["Error"]["Code"] != "InvalidAccessKeyId"

    def _write_identities(self) -> None:
        entries = [identity.as_seaweedfs() for identity in self.identities]
        self._config_path.write_text(json.dumps({"identities": entries}))


class Moto(Listed):
    """`moto_server`: keeps everything in memory, accepts any credentials, takes any key."""

    name = "moto"

    def command(self) -> Sequence[str | Path]:
        return ("moto_server", "-H", "127.0.0.1", "-p", str(self.ports[0]))


class Toxiproxy(Server):
    """toxiproxy: TCP proxies whose network can be made slow or broken; it knows nothing of HTTP.

    What is done to connections are its "toxics" (https://github.com/Shopify/toxiproxy#toxics).
    """

    name = "toxiproxy"

    def command(self) -> Sequence[str | Path]:
        return ("toxiproxy-server", "-host", "127.0.0.1", "-port", str(self.ports[0]))

    def answers(self) -> bool:
        try:
            return bool(self.api("GET", "/version"))
        except OSError:
            return False

    def api(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A request to its HTTP API; what it answers, decoded. Raises OSError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint + path, data, method=method)
        with urllib.request.urlopen(request, timeout=5) as response:
            return json.loads(response.read() or b"null")

    def proxy(self, upstream_url: str) -> "ToxicProxy":
        """A new proxy before this server, on a port of its own; it goes with this process."""
        port = free_ports(1)[0]
        made = ToxicProxy(self, f"proxy-{port}", f"http://127.0.0.1:{port}")
        upstream = urllib.parse.urlsplit(upstream_url).netloc
        self.api("POST", "/proxies", {"name": made.name, "listen": f"127.0.0.1:{port}", "upstream": upstream})
        return made


@dataclass(frozen=True)
class ToxicProxy:
    """One of toxiproxy's proxies: use `endpoint` in place of the server's."""

    toxiproxy: Toxiproxy
    name: str
    endpoint: str

    @contextlib.contextmanager
    def toxic(
        self, kind: str, stream: str = "downstream", toxicity: float = 1.0, **attributes: int
    ) -> Iterator[None]:
        """In this block a share of the connections, old and new, suffers: `toxic("latency", latency=500)`.

        `downstream` is what the server sends, `upstream` what the client sends; `toxicity` is the share.
        """
        body = {"type": kind, "stream": stream, "toxicity": toxicity, "attributes": attributes}
        path = f"/proxies/{self.name}/toxics"
        name = self.toxiproxy.api("POST", path, {"name": uuid.uuid4().hex, **body})["name"]
        try:
            yield
        finally:
            self.toxiproxy.api("DELETE", f"{path}/{name}")

    def disable(self) -> None:
        """Close all connections and refuse new ones."""
        self.toxiproxy.api("POST", f"/proxies/{self.name}", {"enabled": False})

    def enable(self) -> None:
        """Go on after `disable`."""
        self.toxiproxy.api("POST", f"/proxies/{self.name}", {"enabled": True})


@functools.cache
def s3_client(endpoint: str, identity: Identity, region: str = "us-east-1") -> Any:
    """A boto3 S3 client that does what it is told: no retries, no proxies; safe to use in several threads."""
    config = botocore.config.Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        retries={"total_max_attempts": 1},
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=32,
        proxies={},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.session.Session(
        aws_access_key_id=identity.access_key_id,
        aws_secret_access_key=identity.secret_access_key,
        region_name=region,
    )
    return session.client("s3", endpoint_url=endpoint, config=config)
