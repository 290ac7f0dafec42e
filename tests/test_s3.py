"""S3: the client for control requests, against a real server and against one that is out of order."""

import http.server
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import backup
from faults.proxy import Action, FaultProxy
from helpers import UNUSUAL_KEYS, Bucket, run_backup, settings, skip_or_fail, wait_until, with_target_secrets
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
def scripted_server(*replies: Reply, host: str = "127.0.0.1") -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that gives these replies in turn, the last for ever: its URL and what it was sent."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append(f"{self.headers.get('Host')} {self.path} {self.headers.get('Authorization', '')}")
            replies[min(len(seen), len(replies)) - 1](self)

        do_POST = do_GET  # noqa: N815  # the name is http.server's

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = Server((host, 80 if ":" in host else 0), Handler)
    except OSError as error:
        skip_or_fail(f"port 80 of {host}: {error}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def answer(status: int, body: str, **headers: str) -> Reply:
    """A reply with this status and body."""

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
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
    assert statuses == [404, 206]
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


@pytest.mark.parametrize(
    "fault",
    [
        answer(503, error_body("SlowDown")),
        answer(500, ""),
        answer(520, ""),
        answer(400, error_body("RequestTimeout")),
        hang_up,
    ],
)
def test_faults_that_pass_are_retried(fault: Reply) -> None:
    with scripted_server(fault, fault, answer(200, EMPTY_LISTING)) as (url, seen):
        assert client_of(url).list_page("") == ([], None)
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
        client = replace(client_of(url), patience=IMPATIENT)
        assert client.list_page("") == client.list_page("") == ([], None)
        with pytest.raises(backup.S3Error, match="NoAnswer"):
            client.list_page("")
        assert len(seen) == 3


def test_connections_are_closed_when_the_last_client_that_shares_them_is_gone() -> None:
    with scripted_server(answer(200, EMPTY_LISTING)) as (url, _):
        client = replace(client_of(url), is_direct=True)
        client.list_page("")
        twin = replace(client, is_direct=False)
        connections = [connection.sock for connection in client.idle]
        del client
        assert [connection.fileno() > 0 for connection in connections] == [True]
        del twin
        assert [connection.fileno() for connection in connections] == [-1]


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
        client = replace(client_of("http://many.example"), patience=IMPATIENT)
        resolve_to([dead] * 7 + [alive], monkeypatch)
        assert client.list_page("") == ([], None)
        resolve_to([dead] * 8, monkeypatch)
        start = time.monotonic()
        with pytest.raises(backup.S3Error, match="timed out"):
            replace(client_of("http://many.example"), patience=IMPATIENT).list_page("")
        assert time.monotonic() - start < 4 * IMPATIENT.answer_seconds


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(30) or [])
    with pytest.raises(backup.S3Error, match=r"looking up many\.example timed out"):
        replace(client_of("http://many.example"), patience=IMPATIENT).list_page("")
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


def page(*keys: str, token: str = "", extra: str = "", modified: str = "2026-01-02T03:04:05Z") -> Reply:
    """A page of a listing; with a token, or where `extra` says so, it is not the last."""
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>{modified}</LastModified></Contents>"
        for key in keys
    )
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    return answer(200, f"<ListBucketResult>{more if token else ''}{extra}{entries}</ListBucketResult>")


TRUNCATED = "<IsTruncated>true</IsTruncated>"
LISTINGS = {
    "a page without objects": ((page("a", token="1"), page(token="2"), page("b")), "a b"),
    "keys in any order": ((page("c", "a", token="1"), page("b")), "c a b"),
    "no tokens": ((page("a", "b", extra=TRUNCATED), page("c")), "a b c"),
    "keys that are not encoded": ((page("100%25", "a+b"),), "100%25 a+b"),
    "encoded keys": ((page("100%25", "a+b", extra="<EncodingType>url</EncodingType>"),), "100% a b"),
    "a time without a zone": ((page("a", modified="2026-01-02T03:04:05"),), "a"),
}


@pytest.mark.parametrize(("pages", "keys"), LISTINGS.values(), ids=LISTINGS)
def test_listings_as_other_servers_give_them(pages: tuple[Reply, ...], keys: str) -> None:
    with scripted_server(*pages) as (url, _):
        entries = list(client_of(url).list_objects(""))
    assert " ".join(entry.key for entry in entries) == keys
    assert {entry.last_modified.isoformat() for entry in entries} == {"2026-01-02T03:04:05+00:00"}


BAD_LISTINGS = {
    "the same page again": ((page("a", token="1"), page("a", token="2")), "does not advance"),
    "the same token again": ((page("a", token="1"), page(token="1")), "does not advance"),
    "start-after is ignored, too": ((page("a", extra=TRUNCATED),), "does not advance"),
    "empty pages with ever new tokens": (
        tuple(page(token=str(number)) for number in range(10)),
        "does not advance: 3 empty pages",
    ),
    "nothing to go on with": ((page(extra=TRUNCATED),), "does not say how it goes on"),
    "neither tokens nor order": ((page("b", "a", extra=TRUNCATED),), "does not say how it goes on"),
    "a time that is none": ((page("a", modified="yesterday"),), "entry of 'a' cannot be read.*yesterday"),
}


@pytest.mark.parametrize(("pages", "reason"), BAD_LISTINGS.values(), ids=BAD_LISTINGS)
def test_a_listing_that_would_lose_objects_or_never_end_is_an_error(
    pages: tuple[Reply, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "EMPTY_PAGES", 3)
    with scripted_server(*pages) as (url, _), pytest.raises(backup.S3Error, match=reason) as failure:
        list(client_of(url).list_objects(""))
    assert "update the server" in str(failure.value)


def test_where_a_listing_starts_does_not_depend_on_the_server() -> None:
    with scripted_server(page("a", "b", token="1"), page("c")) as (url, seen):
        assert [entry.key for entry in client_of(url).list_objects("", "a")] == ["b", "c"]
    assert "start-after=a" in seen[0]
    assert "continuation-token=1" in seen[1]


def test_a_repository_is_found_whatever_the_order_of_its_keys() -> None:
    """What tells what lies there may be on any page then."""
    pages = page("data/0/1", "README", token="1"), page("config", "index.1")
    with scripted_server(pages[0], *pages) as (url, _):
        client = client_of(url)
        state = backup.look(client).repository_state(client.store)
    assert state is backup.RepositoryState.READY


HINTS = {
    "LIST answered as a GET": (answer(404, error_body("NoSuchKey")), "belongs in TARGETS"),
    "no path-style": (answer(403, error_body("SecondLevelDomainForbidden")), "addressing.*=virtual"),
    "not allowed": (answer(403, error_body("AccessDenied")), "Give the key s3:ListBucket on bucket, or"),
    "session token": (answer(400, error_body("InvalidToken")), "Renew TARGET_SECRETS"),
    "moved": (answer(301, "<html>", Location="https://other/bucket?x"), "Redirect.*to https://other. "),
    "a web site": (answer(405, error_body("MethodNotAllowed")), "an S3 API lies elsewhere"),
}


@pytest.mark.parametrize(("reply", "remedy"), HINTS.values(), ids=HINTS)
def test_a_refusal_says_what_to_do(reply: Reply, remedy: str) -> None:
    with scripted_server(reply) as (url, _), pytest.raises(backup.S3Error, match=remedy):
        client_of(url).list_page("")


def ignored(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Answers a request for a range with a large object from its beginning, which never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()
    with suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 16))


@pytest.mark.parametrize(
    "reply",
    [
        ignored,
        answer(200, "0123"),
        answer(206, "0", Content_Range="bytes 0-0/4"),
        answer(206, "12"),
        answer(206, "01", Content_Range="bytes 0-1/4"),
        answer(206, "123", Content_Range="bytes 1-3/4"),
    ],
)
def test_a_server_that_does_not_heed_ranges_is_refused(reply: Reply) -> None:
    """TigrisFS would not notice: what it reads would be other bytes."""
    with scripted_server(reply) as (url, _), pytest.raises(backup.S3Error, match=r"RangeIgnored.*206"):
        client_of(url).get("key", (0, 0) if reply is ignored else (1, 2))


def test_a_target_whose_proxy_ignores_ranges_is_refused(server: SeaweedFS, target: Bucket) -> None:
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(lambda request: request.kind == "GET", Action.IGNORE_RANGE)
        store = replace(store_of(server, target.name), endpoint=proxy.endpoint)
        with pytest.raises(backup.S3Error, match=r'RangeIgnored.*TARGETS "t"."endpoint"'):
            backup.examine(backup.S3Client(store), write=True)
    assert target.sizes() == {}


@pytest.mark.parametrize("endpoint", ["http://[::1]", "http://[::1]:80"])
def test_an_ipv6_address_may_have_a_port_or_not(endpoint: str) -> None:
    """For S3 and for those who are told of a run; the Host header has the brackets, too."""
    with scripted_server(answer(200, EMPTY_LISTING), host="::1") as (_, seen):
        client_of(endpoint).list_page("")
        message = backup.Message("NOTIFY_URL", "POST", f"{endpoint}/hook", b"x")
        message.send(backup.time.monotonic() + 10, backup.threading.Event())
    assert [words.split(" /")[0] for words in seen] == [endpoint.removeprefix("http://"), "[::1]"]


def test_nothing_secret_is_in_an_error_of_the_client() -> None:
    """http.client quotes headers that it cannot send."""
    with scripted_server(answer(200, EMPTY_LISTING)) as (url, _):
        store = replace(client_of(url).store, access_key_id="\n".join(("key", "id")))
        with pytest.raises(backup.S3Error, match="CannotSend") as failure:
            backup.S3Client(store).list_page("")
    shown = "".join(traceback.format_exception(failure.value))
    assert "key\\nid" not in shown
    assert "Signature" not in shown


@pytest.mark.parametrize("reply", [answer(503, ""), lambda _: time.sleep(20)], ids=["503", "no answer"])
def test_a_request_ends_soon_after_a_stop_signal(reply: Reply) -> None:
    """And one that is made then, to clean up, is answered where the server does, and else ends as soon."""
    stop = backup.Stop()
    with scripted_server(reply) as (url, seen):
        client = backup.S3Client(client_of(url).store, stop=stop)
        waiting = backup.in_background(lambda: client.list_page(""))
        wait_until(lambda: seen, 10, "the request is under way")
        stop.signals.append(signal.SIGTERM)
        start = time.monotonic()
        for request in (waiting.result, lambda: client.list_page("")):
            with pytest.raises(backup.Stopped):
                request()
        assert time.monotonic() - start < 8
    with scripted_server(answer(200, EMPTY_LISTING)) as (url, _):
        assert backup.S3Client(client_of(url).store, stop=stop).list_page("") == ([], None)


@pytest.mark.parametrize("key", UNUSUAL_KEYS, ids=ascii)
def test_unusual_keys_can_be_written_read_and_deleted(server: SeaweedFS, target: Bucket, key: str) -> None:
    client = backup.S3Client(store_of(server, target.name))
    client.put(key, b"content")
    assert target.get(key) == b"content"
    assert client.get(key) == b"content"
    assert client.get(key, (0, 0)) == b"c"
    client.delete(key)
    assert target.sizes() == {}


def test_check_config_says_what_is_wrong(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """A table of all stores; exit code 2 and S3's own code when one is not usable; nothing is changed."""
    source.put({"a": b"1"})
    env = settings(server, tmp_path, source.name, {"first": target.name})
    result = run_backup(env, "check-config").expect(0)
    points = re.findall(
        r"^(?:target-first)? +([a-z, ]+?)  +ok", result.output.partition("target-first")[2], re.M
    )
    assert ", ".join(points) == (
        "reach, list, repository, write, read, ranges, conditional writes, multipart, delete"
    )
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
