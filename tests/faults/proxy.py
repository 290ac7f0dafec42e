"""A proxy between an S3 client and an S3 server that does wrong things to chosen requests.

It speaks HTTP/1.1 on loopback, forwards requests and answers byte for byte (SigV4 signs the Host header, so
that stays as it is too), and applies the first fault that matches. TigrisFS sends its requests' bodies with a
Content-Length; other encodings are not understood here.
"""

import contextlib
import random
import socket
import socketserver
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Self

from servers import free_ports

BLOCK_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
UPSTREAM_SECONDS = 120


@dataclass(frozen=True)
class Request:
    """A request as the proxy sees it."""

    method: str
    target: str  # as sent: path and query
    headers: Mapping[str, str]  # names in lower case
    when: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> str:
        """The object's key; empty where the request is about the bucket."""
        path = urllib.parse.unquote(self.target.partition("?")[0])
        return path.lstrip("/").partition("/")[2]

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters."""
        return dict(urllib.parse.parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def body_bytes(self) -> int:
        """The length of its body."""
        return int(self.headers.get("content-length", "0"))

    @property
    def kind(self) -> str:
        """GET, HEAD, PUT, COPY, DELETE, LIST, DELETES (many); of multiparts INITIATE, PART, COMPLETE."""
        if not self.key:
            return {"GET": "LIST", "POST": "DELETES"}.get(self.method, "OTHER")
        if self.method == "PUT":
            copy = "COPY" if "x-amz-copy-source" in self.headers else "PUT"
            return "PART" if "uploadId" in self.query else copy
        if self.method == "POST":
            return "INITIATE" if "uploads" in self.query else "COMPLETE"
        return self.method

    @property
    def is_write(self) -> bool:
        """Whether it changes the bucket."""
        return self.kind not in ("GET", "HEAD", "LIST", "OTHER")


class Action(Enum):
    """What happens to a request."""

    REFUSE = auto()  # an S3 error is the answer, and the server never sees it
    HANG = auto()  # no answer ever, until the fault is removed
    RESET = auto()  # the connection is reset, and the server never sees it
    CUT = auto()  # half of the answer's body, then the connection is closed
    LOSE_ANSWER = auto()  # the server does it, the client sees a reset connection
    IGNORE_CONDITIONS = auto()  # the server does not see If-Match and If-None-Match


@dataclass(eq=False)
class Fault:
    """What to do with which requests: with those from the `after`th on, `times` times, at random if asked."""

    matches: Callable[[Request], bool]
    action: Action
    after: int = 0
    times: float = float("inf")
    probability: float = 1.0
    status: int = 403
    code: str = "AccessDenied"
    seen: int = 0
    hit: int = 0
    removed: threading.Event = field(default_factory=threading.Event)


class FaultProxy:
    """Stands before `upstream` (an endpoint URL); a `with` block opens and closes it."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        """`seed` decides what faults with a probability hit."""
        url = urllib.parse.urlsplit(upstream)
        self.upstream = (url.hostname or "", url.port or 80)
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock, self._chance = threading.Lock(), random.Random(seed)
        self._server = _Server(("127.0.0.1", free_ports(1)[0]), _Connection)
        self._server.proxy = self

    @property
    def endpoint(self) -> str:
        """The URL to use in place of the server's."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, matches: Callable[[Request], bool], action: Action, **details: float | str) -> Fault:
        """Do `action` to the requests that match, from now on."""
        fault = Fault(matches, action, **details)  # type: ignore[arg-type]
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Do no wrong any more; what hangs is let go."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.removed.set()

    def count(self, matches: Callable[[Request], bool]) -> int:
        """How many of the requests up to now match."""
        return sum(matches(request) for request in list(self.requests))

    def judge(self, request: Request) -> Fault | None:
        """The fault for this request, which is counted."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if not fault.matches(request):
                    continue
                fault.seen += 1
                due = fault.seen > fault.after and fault.hit < fault.times
                if due and self._chance.random() < fault.probability:
                    fault.hit += 1
                    return fault
        return None

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that breaks is nothing to print about here."""


class _Connection(socketserver.BaseRequestHandler):
    """One client's connection, with one of its own to the server."""

    server: _Server
    request: socket.socket

    def handle(self) -> None:
        """Serves requests until either side closes."""
        proxy = self.server.proxy
        with contextlib.suppress(OSError, EOFError), contextlib.ExitStack() as stack:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = _Stream(self.request)
            server: _Stream | None = None
            while True:
                head = client.head()
                request = _parse_request(head)
                fault = proxy.judge(request)
                if fault and fault.action in (Action.REFUSE, Action.HANG, Action.RESET):
                    if not self._fail(client, request, fault):
                        return
                    continue
                if server is None:
                    connection = socket.create_connection(proxy.upstream, timeout=UPSTREAM_SECONDS)
                    stack.enter_context(connection)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    server = _Stream(connection)
                if not self._forward(client, server, head, request, fault):
                    return

    def _fail(self, client: "_Stream", request: Request, fault: Fault) -> bool:
        """Does what keeps the request from the server; whether the connection is still good."""
        if fault.action is Action.RESET:
            self._reset()
            return False
        if "100-continue" in request.headers.get("expect", ""):
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        for _ in client.blocks(request.body_bytes):
            pass
        if fault.action is Action.HANG:
            fault.removed.wait()
            return False
        body = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
        length = f"Content-Length: {len(body)}\r\nContent-Type: application/xml\r\n"
        client.send(f"HTTP/1.1 {fault.status} Injected\r\n{length}\r\n".encode())
        client.send(b"" if request.method == "HEAD" else body)
        return True

    def _forward(
        self, client: "_Stream", server: "_Stream", head: bytes, request: Request, fault: Fault | None
    ) -> bool:
        """Passes request and answer on; whether both connections are still good."""
        if fault and fault.action is Action.IGNORE_CONDITIONS:
            lines = head.split(b"\r\n")
            head = b"\r\n".join(
                line for line in lines if not line.lower().startswith((b"if-match", b"if-none"))
            )
        server.send(head)
        if "100-continue" in request.headers.get("expect", ""):
            client.send(server.head())
        for block in client.blocks(request.body_bytes):
            server.send(block)
        answer = server.head()
        if fault and fault.action is Action.LOSE_ANSWER:
            for _ in server.blocks(_answer_bytes(answer, request)):
                pass
            self._reset()
            return False
        client.send(answer)
        length = _answer_bytes(answer, request)
        cut = length // 2 if fault and fault.action is Action.CUT else length
        for block in server.blocks(cut, is_chunked=b"chunked" in answer.lower().partition(b"\r\n\r\n")[0]):
            client.send(block)
        return cut == length and b"connection: close" not in answer.lower()

    def _reset(self) -> None:
        """Closes the connection so that the other side sees a reset."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()


class _Stream:
    """A socket read by heads and by blocks."""

    def __init__(self, connection: socket.socket) -> None:
        """Nothing was read yet."""
        self._socket, self._buffer = connection, b""

    def send(self, data: bytes) -> None:
        """All of it."""
        self._socket.sendall(data)

    def _fill(self) -> None:
        data = self._socket.recv(BLOCK_BYTES)
        if not data:
            raise EOFError
        self._buffer += data

    def head(self) -> bytes:
        """The next message's first line and headers, with the empty line."""
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
            if len(self._buffer) > MAX_HEAD_BYTES + BLOCK_BYTES:
                raise EOFError
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def blocks(self, length: int, is_chunked: bool = False) -> Iterator[bytes]:
        """A body of this length, or one in chunks, as it comes."""
        while is_chunked:
            while b"\r\n" not in self._buffer:
                self._fill()
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            size = int(line, 16)
            yield line + b"\r\n"
            yield from self.blocks(size + 2)
            is_chunked = size > 0
        while length > 0:
            if not self._buffer:
                self._fill()
            block, self._buffer = self._buffer[:length], self._buffer[length:]
            length -= len(block)
            yield block


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _parse_request(head: bytes) -> Request:
    method, target, _ = head.decode("latin-1").split(" ", 2)
    return Request(method, target, _headers(head))


def _answer_bytes(head: bytes, request: Request) -> int:
    status = head.split(b" ", 2)[1]
    if request.method == "HEAD" or status in (b"204", b"304"):
        return 0
    return int(_headers(head).get("content-length", "0"))
