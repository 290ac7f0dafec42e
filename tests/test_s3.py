"""S3: the client for control requests, against a real server and against one that is out of order."""

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import backup
from faults.proxy import Action, FaultProxy
from helpers import UNUSUAL_KEYS, Bucket, run_backup, settings, wait_until, with_target_secrets
from servers import ADMIN, READER, Identity, SeaweedFS, free_ports

Reply = Callable[[http.server.BaseHTTPRequestHandler], None]


def store_of(
    server: SeaweedFS, bucket: str, identity: Identity = ADMIN, target: str | None = "t"
) -> backup.Store:
    """A store on the real server."""
    return backup.Store(
        target, server.endpoint, bucket, "", identity.access_key_id, identity.secret_access_key
    )


@contextmanager
def scripted_server(*replies: Reply) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that gives these replies in turn, the last for ever: its URL and what it was sent."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            replies[min(len(seen), len(replies)) - 1](self)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def answer(status: int, body: str) -> Reply:
    """A reply with this status and body."""

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body.encode())))
        handler.end_headers()
        handler.wfile.write(body.encode())

    return reply


def hang_up(handler: http.server.BaseHTTPRequestHandler) -> None:
    """No answer at all: the connection ends."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def error_body(code: str, extra: str = "") -> str:
    """S3's error document."""
    return f"<Error><Code>{code}</Code><Message>words of S3</Message>{extra}</Error>"


EMPTY_LISTING = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


def client_of(endpoint: str) -> backup.S3Client:
    """A client of a scripted server."""
    return backup.S3Client(backup.Store("t", endpoint, "bucket", "", "key", "secret"))


@pytest.mark.parametrize(
    ("change", "code", "remedy"),
    [
        ({"access_key_id": "nobody"}, "InvalidAccessKeyId", 'TARGET_SECRETS "t"."access_key_id"'),
        ({"secret_access_key": "wrong"}, "SignatureDoesNotMatch", 'TARGET_SECRETS "t"."secret_access_key"'),
        ({"bucket": "no-such-bucket"}, "NoSuchBucket", 'TARGETS "t"."path"'),
    ],
)
def test_refusals_are_in_s3s_own_words(
    server: SeaweedFS, target: Bucket, change: dict[str, str], code: str, remedy: str
) -> None:
    """The error names the store, S3's code and the setting to correct."""
    store = replace(store_of(server, target.name), **change)
    with pytest.raises(backup.S3Error) as failure:
        backup.S3Client(store).list_page("")
    assert failure.value.code == code
    assert "target-t" in str(failure.value)
    assert remedy in str(failure.value)


def test_a_key_that_may_only_read_is_refused_for_a_target(server: SeaweedFS, target: Bucket) -> None:
    with pytest.raises(backup.S3Error, match="AccessDenied"):
        backup.examine(backup.S3Client(store_of(server, target.name, READER)), write=True)
    backup.examine(backup.S3Client(store_of(server, target.name, READER)), write=False)


def test_nothing_is_left_of_a_probe(server: SeaweedFS, target: Bucket) -> None:
    backup.examine(backup.S3Client(store_of(server, target.name)), write=True)
    assert target.sizes() == {}


def test_a_probe_that_another_run_removes_is_written_again(server: SeaweedFS, target: Bucket) -> None:
    """That run takes it for a leftover of one that was killed, between the writing and the reading."""
    with FaultProxy(server.endpoint) as proxy:
        late = proxy.add(lambda request: request.kind == "GET", Action.DELAY, times=1, seconds=60)
        store = replace(store_of(server, target.name), endpoint=proxy.endpoint)
        thread = threading.Thread(target=backup.probe_write, args=[backup.S3Client(store)])
        thread.start()
        wait_until(lambda: late.hit, 20, "the probe is about to be read")
        target.clear()
        proxy.remove(late)
        thread.join(20)
        statuses = [status for request, status in proxy.requests if request.kind == "GET"]
    assert statuses == [404, 200]
    assert target.sizes() == {}


def test_a_probe_that_is_never_there_is_an_error(server: SeaweedFS, target: Bucket) -> None:
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "GET", Action.REFUSE, status=404, code="NoSuchKey")
        store = replace(store_of(server, target.name), endpoint=proxy.endpoint)
        with pytest.raises(backup.S3Error, match="NoSuchKey"):
            backup.probe_write(backup.S3Client(store))


def test_nobody_listens(target: Bucket) -> None:
    """A wrong endpoint is reported in seconds."""
    start = time.monotonic()
    with pytest.raises(backup.S3Error, match=r'TARGETS "t"\."endpoint"'):
        client_of(f"http://127.0.0.1:{free_ports(1)[0]}").list_page("")
    assert time.monotonic() - start < 15


def test_a_server_that_is_not_s3() -> None:
    with (
        scripted_server(answer(200, "<html>hello</html>")) as (url, _),
        pytest.raises(backup.S3Error, match="does not look like an S3 server"),
    ):
        client_of(url).list_page("")


@pytest.mark.parametrize("fault", [answer(503, error_body("SlowDown")), answer(500, ""), hang_up])
def test_faults_that_pass_are_retried(fault: Reply) -> None:
    with scripted_server(fault, fault, answer(200, EMPTY_LISTING)) as (url, seen):
        assert client_of(url).list_page("") == ([], False)
    assert len(seen) >= 3


def closing(reply: Reply) -> Reply:
    """The same, and then the connection ends, without a word of that."""

    def reply_and_close(handler: http.server.BaseHTTPRequestHandler) -> None:
        reply(handler)
        handler.close_connection = True

    return reply_and_close


IMPATIENT = backup.Patience(answer_seconds=2, unreachable_seconds=0, failing_seconds=0)


def test_a_kept_connection_that_the_server_has_closed_is_no_failure() -> None:
    """It is opened anew, once, also for who has no patience: a lease must not fail by that."""
    listing = closing(answer(200, EMPTY_LISTING))
    with scripted_server(listing, listing, hang_up) as (url, seen):
        client = client_of(url).with_patience(IMPATIENT)
        assert client.list_page("") == client.list_page("") == ([], False)
        with pytest.raises(backup.S3Error, match="NoAnswer"):
            client.list_page("")
        assert len(seen) == 3


@contextmanager
def dead_address() -> Iterator[tuple[str, int]]:
    """An address that answers no attempt to connect."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # more than its queue holds
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        yield address
        for one in waiting:
            one.close()


def resolve_to(addresses: Sequence[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every name mean these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_connecting_takes_no_longer_for_a_name_with_many_dead_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What must end before a lease does ends; one address that lives is enough."""
    with dead_address() as dead, scripted_server(answer(200, EMPTY_LISTING)) as (url, _):
        alive = ("127.0.0.1", int(url.rpartition(":")[2]))
        client = client_of("http://many.example").with_patience(IMPATIENT)
        resolve_to([dead] * 7 + [alive], monkeypatch)
        assert client.list_page("") == ([], False)
        resolve_to([dead] * 8, monkeypatch)
        start = time.monotonic()
        with pytest.raises(backup.S3Error, match="timed out"):
            client_of("http://many.example").with_patience(IMPATIENT).list_page("")
        assert time.monotonic() - start < 4 * IMPATIENT.answer_seconds


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(30) or [])
    with pytest.raises(backup.S3Error, match=r"looking up many\.example timed out"):
        client_of("http://many.example").with_patience(IMPATIENT).list_page("")
    over.set()


def test_a_refusal_is_not_retried() -> None:
    with scripted_server(answer(403, error_body("RequestTimeTooSkewed"))) as (url, seen):
        with pytest.raises(backup.S3Error, match="The clock of this machine is wrong"):
            client_of(url).list_page("")
        assert len(seen) == 1


def test_the_region_is_learned_from_a_refusal() -> None:
    refusal = answer(400, error_body("AuthorizationHeaderMalformed", "<Region>eu-north-1</Region>"))
    with scripted_server(refusal, answer(200, EMPTY_LISTING)) as (url, seen):
        client = client_of(url)
        client.list_page("")
    assert client.region == "eu-north-1"
    assert "/us-east-1/s3/" in seen[0]
    assert "/eu-north-1/s3/" in seen[1]


def test_listings_are_complete(server: SeaweedFS, target: Bucket) -> None:
    """More than one page, and keys that need encoding: the same as an independent client sees."""
    target.put({**{f"n/{number:05}": b"" for number in range(1100)}, **dict.fromkeys(UNUSUAL_KEYS, b"x")})
    objects = list(backup.S3Client(store_of(server, target.name)).list_objects(""))
    assert {entry.key: entry.size_bytes for entry in objects if not entry.key.endswith("/")} == target.sizes()


@pytest.mark.parametrize("key", UNUSUAL_KEYS, ids=ascii)
def test_unusual_keys_can_be_written_read_and_deleted(server: SeaweedFS, target: Bucket, key: str) -> None:
    client = backup.S3Client(store_of(server, target.name))
    client.put(key, b"content")
    assert target.get(key) == b"content"
    assert client.get(key) == b"content"
    assert client.get(key, first_byte_only=True) == b"c"
    client.delete(key)
    assert target.sizes() == {}


def test_check_config_says_what_is_wrong(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """A table of all stores; exit code 2 and S3's own code when one is not usable; nothing is changed."""
    source.put({"a": b"1"})
    env = settings(server, tmp_path, source.name, {"first": target.name})
    result = run_backup(env, "check-config").expect(0)
    assert "list, read, write, delete" in result.output
    broken = with_target_secrets(env, "first", secret_access_key="wrong")
    result = run_backup(broken, "check-config").expect(2)
    assert "target-first" in result.output
    assert "SignatureDoesNotMatch" in result.output
    assert target.sizes() == {}
    target.put({"photo.jpg": b"not borg's"})
    result = run_backup(env, "check-config").expect(2)
    assert "holds other objects (such as 'photo.jpg')" in result.output
    assert target.sizes() == {"photo.jpg": 10}


@pytest.mark.parametrize(
    ("code", "refused", "usable"),
    [("AccessDenied", 1, True), ("AccessDenied", 9, True), ("AccessDenied", 10, False),
     ("InvalidObjectState", 10, True)],
)  # fmt: skip
def test_a_source_is_usable_as_long_as_something_can_be_read(
    server: SeaweedFS, source: Bucket, code: str, refused: int, usable: bool
) -> None:
    """An object in cold storage says nothing about the others."""
    source.put({f"{number:02}": b"x" for number in range(12)})
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "GET", Action.REFUSE, times=refused, code=code)
        client = backup.S3Client(replace(store_of(server, source.name), endpoint=proxy.endpoint))
        if usable:
            backup.examine(client, write=False)
        else:
            with pytest.raises(backup.S3Error, match=code):
                backup.examine(client, write=False)
