"""A proxy between an S3 client and an S3 server that does wrong things to chosen requests.

It speaks HTTP/1.1 on loopback, forwards requests and answers byte for byte (SigV4 signs the Host header, so
that stays as it is too), and applies the first fault that matches. A client that sends a large body does not
see an answer before the body's end: a server that answers earlier and closes looks like a broken connection.
"""

import contextlib
import dataclasses
import email.utils
import hashlib
import hmac
import html
import random
import re
import select
import socket
import socketserver
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Self

from servers import ADMIN, READER, WRITER, free_ports

BLOCK_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
UPSTREAM_SECONDS = 120
SECRETS = {identity.access_key_id: identity.secret_access_key for identity in (ADMIN, READER, WRITER)}


@dataclass(frozen=True)
class Request:
    """A request as the proxy sees it."""

    method: str
    target: str  # as sent: path and query
    headers: Mapping[str, str]  # names in lower case
    when: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> str:
        """Bucket and key, decoded: `/bucket/key`."""
        return urllib.parse.unquote(self.target.partition("?")[0])

    @property
    def bucket(self) -> str:
        """The bucket's name; empty where the request is about none (it lists them)."""
        return self.path.lstrip("/").partition("/")[0]

    @property
    def key(self) -> str:
        """The object's key; empty where the request is about the bucket."""
        return self.path.lstrip("/").partition("/")[2]

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters."""
        return dict(urllib.parse.parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def is_chunked(self) -> bool:
        """Whether the body has HTTP's chunked transfer encoding."""
        return _is_chunked(self.headers)

    @property
    def body_bytes(self) -> int:
        """The announced length of its body; of one in chunks that of the object, 0 where that is not told."""
        name = "x-amz-decoded-content-length" if self.is_chunked else "content-length"
        return int(self.headers.get(name, "0"))

    @property
    def kind(self) -> str:
        """GET, HEAD, PUT, COPY, DELETE; LIST, DELETES (many); INITIATE, PART, COMPLETE, ABORT; or OTHER."""
        if not self.key:
            kinds = {"GET": "LIST" if self.bucket else "OTHER", "POST": "DELETES"}
            return kinds.get(self.method, "OTHER")
        if "uploadId" in self.query:
            return {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}.get(self.method, "OTHER")
        if self.method == "POST":
            return "INITIATE" if "uploads" in self.query else "OTHER"
        if self.method == "PUT" and "x-amz-copy-source" in self.headers:
            return "COPY"
        return self.method

    @property
    def is_write(self) -> bool:
        """Whether it changes the bucket."""
        return self.method in ("PUT", "POST", "DELETE")

    @property
    def authorization(self) -> re.Match[str] | None:
        """The parts of its signature's header: the second is the key's id, the third the scope."""
        pattern = r"(.* Credential=)([^/]+)/([^,]+)(.*SignedHeaders=)([^,]+)(.*Signature=)(.*)"
        return re.fullmatch(pattern, self.headers.get("authorization", ""))

    def is_signed_with(self, secret: str) -> bool:
        """Whether that is the secret of its key."""
        parts = self.authorization
        return bool(parts) and parts[7] == _signature(self, parts[5].split(";"), secret, parts[3])

    def without(self, *names: str) -> Self:
        """The same without these headers."""
        headers = {name: value for name, value in self.headers.items() if name not in names}
        return dataclasses.replace(self, headers=headers)

    def signed_by(self, access_key_id: str) -> Self:
        """The same with this key in its signature, which the proxy makes anew."""
        parts = self.authorization
        assert parts, "not signed"
        text = f"{parts[1]}{access_key_id}/{parts[3]}{parts[4]}{parts[5]}{parts[6]}{parts[7]}"
        return dataclasses.replace(self, headers={**self.headers, "authorization": text})


class Action(Enum):
    """What happens to a request."""

    REFUSE = auto()  # an error is the answer, and the server never sees it: S3's, or HTML without a `code`
    HANG = auto()  # no answer ever, until the fault is removed
    RESET = auto()  # the connection is reset, and the server never sees it
    CUT = auto()  # half of the answer's body (of one in chunks: of its first), then the end
    LOSE_ANSWER = auto()  # the server does it, the client sees a reset connection
    IGNORE_CONDITIONS = auto()  # the server does not see If-Match and If-None-Match
    IGNORE_RANGE = auto()  # the server does not see Range
    DELAY = auto()  # it is forwarded `seconds` later, or when the fault is removed
    OTHER_ETAGS = auto()  # the answer's ETags are no MD5s, but as constant as those
    OTHER_DATE = auto()  # the answer's Date is `seconds` later
    REWRITE = auto()  # the server sees what `rewrite` makes of it, signed anew
    ANSWER = auto()  # what the fault's `answer` returns is the body of a 200, and the server never sees it


UNFORWARDED = (Action.REFUSE, Action.HANG, Action.RESET, Action.ANSWER)
IGNORED = {Action.IGNORE_CONDITIONS: ("if-match", "if-none-match"), Action.IGNORE_RANGE: ("range",)}


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
    message: str = "injected"
    details: str = ""  # further elements of S3's error, as XML
    headers: Mapping[str, str] = field(default_factory=dict)  # of an answer of ours
    answer: Callable[[Request], str] = lambda _: ""
    seconds: float = 0
    rewrite: Callable[[Request], Request] = lambda request: request
    seen: int = 0
    hit: int = 0
    removed: threading.Event = field(default_factory=threading.Event)


class FaultProxy:
    """Stands before `upstream` (an endpoint URL); a `with` block opens and closes it."""

    def __init__(self, upstream: str, seed: int = 0, address: str = "127.0.0.1") -> None:
        """`seed` decides what faults with a probability hit; `address` is ours to listen at."""
        url = urllib.parse.urlsplit(upstream)
        self.upstream = (url.hostname or "", url.port or 80)
        self._requests: list[Request] = []
        self._statuses: list[int | None] = []
        self._faults: list[Fault] = []
        self._lock, self._chance = threading.Lock(), random.Random(seed)
        self._server = _listening(address)
        self._server.proxy = self

    @property
    def endpoint(self) -> str:
        """The URL to use in place of the server's."""
        host, port = self._server.server_address[:2]
        return f"http://{host}:{port}"

    @property
    def requests(self) -> list[tuple[Request, int | None]]:
        """The requests up to now with the status that was answered, None where no answer was passed on."""
        with self._lock:
            return list(zip(self._requests, self._statuses, strict=True))

    def add(self, matches: Callable[[Request], bool], action: Action, **details: Any) -> Fault:
        """Do `action` to the requests that match, from now on; `matches` sees one at a time."""
        fault = Fault(matches, action, **details)
        with self._lock:
            self._faults.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        """Do not do this any more; what hangs by it is let go. Removing twice is fine."""
        with self._lock:
            self._faults = [other for other in self._faults if other is not fault]
        fault.removed.set()

    def clear(self) -> None:
        """Do no wrong any more; what hangs is let go."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.removed.set()

    def count(self, matches: Callable[[Request], bool]) -> int:
        """How many of the requests up to now match."""
        return sum(matches(request) for request, _ in self.requests)

    def judge(self, request: Request) -> tuple[int, Fault | None]:
        """The request's number, for `note_status`, and the fault for it, which is counted."""
        with self._lock:
            self._requests.append(request)
            self._statuses.append(None)
            number = len(self._requests) - 1
            for fault in self._faults:
                if not fault.matches(request):
                    continue
                fault.seen += 1
                due = fault.seen > fault.after and fault.hit < fault.times
                if due and self._chance.random() < fault.probability:
                    fault.hit += 1
                    return number, fault
        return number, None

    def note_status(self, number: int, status: int) -> None:
        """Note what is answered to the request of this number, just before the client gets it."""
        with self._lock:
            self._statuses[number] = status

    def close(self) -> None:
        """Let go what hangs, close all connections, listen no more. Closing twice is fine."""
        self.clear()
        self._server.close()

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    proxy: FaultProxy

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._open: set[socket.socket] = set()
        self._is_closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Accept connections, in a thread."""
        self._thread.start()

    @contextlib.contextmanager
    def closed_with_it(self, connection: socket.socket) -> Iterator[None]:
        """Within the block `close` ends the connection, which wakes the thread that waits for it."""
        with self._lock:
            if self._is_closed:
                raise EOFError
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)

    def close(self) -> None:
        """Stop accepting, end all connections."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
        self.server_close()
        with self._lock:
            self._is_closed = True
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that breaks is nothing to print about here."""


def _listening(address: str) -> _Server:
    """Somebody else may take the port between our look and the server's start."""
    for attempts_left in (4, 3, 2, 1, 0):
        try:
            return _Server((address, free_ports(1)[0]), _Connection)
        except OSError:
            if not attempts_left:
                raise
    raise AssertionError("unreachable")


class _Connection(socketserver.BaseRequestHandler):
    """One client's connection, with one of its own to the server."""

    server: _Server
    request: socket.socket

    def handle(self) -> None:
        """Serves requests until either side closes."""
        with contextlib.suppress(OSError, EOFError), contextlib.ExitStack() as stack:
            stack.enter_context(self.server.closed_with_it(self.request))
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client, server = _Stream(self.request), None
            while True:
                # A server that went away while idle ends the client's connection, too: it must not be reused.
                client.wait(server)
                head = client.head()
                request = _parse_request(head)
                number, fault = self.server.proxy.judge(request)
                if fault and fault.action in UNFORWARDED:
                    if not self._fail(client, request, number, fault):
                        return
                    continue
                server = server or self._connect(stack)
                if not self._forward(client, server, head, request, number, fault):
                    return

    def _connect(self, stack: contextlib.ExitStack) -> "_Stream":
        connection = socket.create_connection(self.server.proxy.upstream, timeout=UPSTREAM_SECONDS)
        stack.enter_context(connection)
        stack.enter_context(self.server.closed_with_it(connection))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Stream(connection)

    def _fail(self, client: "_Stream", request: Request, number: int, fault: Fault) -> bool:
        """Does what keeps the request from the server; whether the connection is still good."""
        if fault.action is Action.RESET:
            self._reset()
            return False
        if _expects_continue(request):
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        for _ in client.request_body(request):
            pass
        if fault.action is Action.HANG:
            fault.removed.wait()
            return False
        words = f"<Code>{fault.code}</Code><Message>{html.escape(fault.message)}</Message>{fault.details}"
        status, body = fault.status, f"<Error>{words}</Error>".encode()
        if fault.action is Action.ANSWER:
            status, body = 200, fault.answer(request).encode()
        elif not fault.code:
            body = b"<html>\r\n<head><title>Refused</title></head>\r\n<body><hr>\r\n</body>\r\n</html>\r\n"
        headers = {"Content-Length": len(body), "Content-Type": "application/xml", **fault.headers}
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status} Injected\r\n{fields}\r\n".encode()
        self.server.proxy.note_status(number, status)
        client.send(head if request.method == "HEAD" else head + body)
        return True

    def _forward(
        self,
        client: "_Stream",
        server: "_Stream",
        head: bytes,
        request: Request,
        number: int,
        fault: Fault | None,
    ) -> bool:
        """Passes request and answer on; whether both connections are still good."""
        action = fault and fault.action
        if fault and action is Action.DELAY:
            fault.removed.wait(fault.seconds)
        if fault and action is Action.REWRITE:
            head = _head(fault.rewrite(request))
        elif action in IGNORED:
            head = _head(request.without(*IGNORED[action]))
        server.send(head)
        is_whole, answer = self._pass_body(client, server, request)
        body = server.answer_body(answer, request)
        if action is Action.LOSE_ANSWER:
            for _ in body:
                pass
            self._reset()
            return False
        if action is Action.OTHER_ETAGS:
            answer, body = _with_other_etags(answer), iter([_with_other_etags(b"".join(body))])
        if fault and action is Action.OTHER_DATE:
            date = email.utils.formatdate(time.time() + fault.seconds, usegmt=True)
            answer = re.sub(rb"(?im)^(date:).*$", rf"\1 {date}\r".encode(), answer)
        self.server.proxy.note_status(number, _status(answer))
        client.send(answer)
        if action is Action.CUT and not self._cut(client, answer, body):
            return False
        for block in body:
            client.send(block)
        return is_whole and _keeps_alive(answer)

    def _pass_body(self, client: "_Stream", server: "_Stream", request: Request) -> tuple[bool, bytes]:
        """Sends the body, unless the server refuses it; whether all was sent, and the head of the answer."""
        if _expects_continue(request):
            answer = server.answer_head(client)
            if _status(answer) != 100:
                return False, answer
            client.send(answer)
        for block in client.request_body(request):
            server.send(block)
        return True, server.answer_head(client)

    def _cut(self, client: "_Stream", answer: bytes, body: Iterator[bytes]) -> bool:
        """Sends half of the body; whether there was none to cut."""
        headers = _headers(answer)
        if _is_chunked(headers):
            client.send(next(body))
            start = next(body)
            client.send(start[: len(start) // 2])
            return False
        left = length = int(headers.get("content-length", "0")) // 2
        for block in body:
            client.send(block[:left])
            left -= len(block)
            if left <= 0:
                return False
        return length == 0

    def _reset(self) -> None:
        """Closes the connection so that the other side sees a reset."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()


class _Stream:
    """A socket read by heads and by bodies, each as it comes and unchanged."""

    def __init__(self, connection: socket.socket) -> None:
        """Nothing was read yet."""
        self._socket, self._buffer = connection, b""

    def send(self, data: bytes) -> None:
        """All of it."""
        self._socket.sendall(data)

    def wait(self, other: "_Stream | None", seconds: float | None = None) -> None:
        """Return when there is something to read; raise EOFError when the other side ends meanwhile."""
        if self._buffer:
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if other:
            poll.register(other._socket, select.POLLIN)
        while ready := [number for number, _ in poll.poll(seconds and seconds * 1000)]:
            if self._socket.fileno() in ready or not other:
                return
            if not other._socket.recv(1, socket.MSG_PEEK):
                raise EOFError
            poll.unregister(other._socket)
        raise TimeoutError

    def _fill(self) -> None:
        data = self._socket.recv(BLOCK_BYTES)
        if not data:
            raise EOFError
        self._buffer += data

    def _until(self, end: bytes) -> bytes:
        """All up to this, with it."""
        while end not in self._buffer:
            self._fill()
            if len(self._buffer) > MAX_HEAD_BYTES + BLOCK_BYTES:
                raise EOFError
        before, _, self._buffer = self._buffer.partition(end)
        return before + end

    def head(self) -> bytes:
        """The next message's first line and headers, with the empty line."""
        return self._until(b"\r\n\r\n")

    def answer_head(self, client: "_Stream") -> bytes:
        """The head of the answer; EOFError when the client has gone, TimeoutError when none comes."""
        self.wait(client, UPSTREAM_SECONDS)
        return self.head()

    def request_body(self, request: Request) -> Iterator[bytes]:
        """The body that belongs to this head."""
        return self._chunks() if request.is_chunked else self._blocks(request.body_bytes)

    def answer_body(self, head: bytes, request: Request) -> Iterator[bytes]:
        """The body that belongs to this head; one of unknown length goes on to the connection's end."""
        headers = _headers(head)
        if request.method == "HEAD" or _status(head) in (204, 304):
            return iter(())
        if _is_chunked(headers):
            return self._chunks()
        return self._blocks(int(headers["content-length"])) if "content-length" in headers else self._rest()

    def _blocks(self, length: int) -> Iterator[bytes]:
        while length > 0:
            if not self._buffer:
                self._fill()
            block, self._buffer = self._buffer[:length], self._buffer[length:]
            length -= len(block)
            yield block

    def _chunks(self) -> Iterator[bytes]:
        size = 1
        while size:
            line = self._until(b"\r\n")
            yield line
            size = int(line.partition(b";")[0], 16)
            if size:
                yield from self._blocks(size + 2)
        while line != b"\r\n":  # trailers, and the empty line
            line = self._until(b"\r\n")
            yield line

    def _rest(self) -> Iterator[bytes]:
        with contextlib.suppress(EOFError):
            while True:
                block, self._buffer = self._buffer, b""
                yield block
                self._fill()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1])


def _is_chunked(headers: Mapping[str, str]) -> bool:
    return "chunked" in headers.get("transfer-encoding", "").lower()


def _expects_continue(request: Request) -> bool:
    return request.headers.get("expect", "").lower() == "100-continue"


def _with_other_etags(answer: bytes) -> bytes:
    return re.sub(rb"\b[0-9a-f]{32}\b", lambda found: found[0][::-1], answer)


def _keeps_alive(answer: bytes) -> bool:
    headers = _headers(answer)
    has_end = _is_chunked(headers) or "content-length" in headers or _status(answer) in (204, 304)
    is_closed = headers.get("connection", "").lower() == "close" or answer.startswith(b"HTTP/1.0")
    return has_end and not is_closed


def _parse_request(head: bytes) -> Request:
    method, target, _ = head.decode("latin-1").split(" ", 2)
    return Request(method, target, _headers(head))


def _head(request: Request) -> bytes:
    """The head of this request, signed anew where its key is one of the server's."""
    headers = dict(request.headers)
    parts = request.authorization
    if parts and parts[2] in SECRETS:
        names = [name for name in parts[5].split(";") if name in headers]
        signature = _signature(request, names, SECRETS[parts[2]], parts[3])
        key, fields = f"{parts[1]}{parts[2]}/{parts[3]}{parts[4]}", f"{';'.join(names)}{parts[6]}"
        headers["authorization"] = f"{key}{fields}{signature}"
    lines = [f"{request.method} {request.target} HTTP/1.1", *(f"{name}: {headers[name]}" for name in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _signature(request: Request, names: list[str], secret: str, scope: str) -> str:
    """SigV4's, over these headers; the scope is date/region/service/aws4_request."""
    path, _, query = request.target.partition("?")
    pairs = sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&") if pair)
    headers = [f"{name}:{' '.join(request.headers[name].split())}" for name in names]
    payload = request.headers["x-amz-content-sha256"]
    canonical = "\n".join([request.method, path, "&".join(pairs), *headers, "", ";".join(names), payload])
    digest = hashlib.sha256(canonical.encode("latin-1")).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in [*scope.split("/"), f"AWS4-HMAC-SHA256\n{request.headers['x-amz-date']}\n{scope}\n{digest}"]:
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()
