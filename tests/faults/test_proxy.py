import hashlib
import http.client
import http.server
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session
import pytest

from helpers import Bucket, wait_until
from proxy import Action, FaultProxy, Request
from servers import READER, WRITER, SeaweedFS, Toxiproxy, free_ports, s3_client

BROKEN = (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError, ConnectionError)
CUT = (*BROKEN, botocore.exceptions.IncompleteReadError, botocore.exceptions.ResponseStreamingError)
PART_BYTES = 5 * 1024 * 1024


def is_get(request: Request) -> bool:
    return request.kind == "GET"


def is_put(request: Request) -> bool:
    return request.kind == "PUT"


@pytest.fixture
def proxy(server: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def bucket(new_bucket: Callable[..., Bucket]) -> Bucket:
    return new_bucket("bucket")


@pytest.fixture
def client(proxy: FaultProxy) -> Any:
    return s3_client(proxy.endpoint, WRITER)


def put(client: Any, bucket: Bucket, key: str = "key", body: bytes = b"body", **details: str) -> None:
    client.put_object(Bucket=bucket.name, Key=key, Body=body, **details)


def get(client: Any, bucket: Bucket, key: str = "key", **details: str) -> bytes:
    return client.get_object(Bucket=bucket.name, Key=key, **details)["Body"].read()


def refusal(call: Callable[..., object], *arguments: object, **details: Any) -> tuple[int, str]:
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        call(*arguments, **details)
    answer = refused.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


# ------------------------------------------------------------------------------------------ What passes it by


@pytest.mark.parametrize("length", [0, 1, 20_000_000])
def test_data_passes_unchanged_both_ways(client: Any, bucket: Bucket, length: int) -> None:
    data = os.urandom(length)
    put(client, bucket, body=data)
    assert bucket.get("key") == data
    assert get(client, bucket) == data


def test_a_part_of_an_object_and_odd_keys_pass(client: Any, bucket: Bucket) -> None:
    key = "a b/ü+%2F&=?#"
    put(client, bucket, key, b"0123456789")
    assert get(client, bucket, key, Range="bytes=2-4") == b"234"
    assert client.head_object(Bucket=bucket.name, Key=key)["ContentLength"] == 10
    assert bucket.sizes() == {key: 10}


def test_a_body_in_signed_chunks_passes_unchanged(proxy: FaultProxy, bucket: Bucket) -> None:
    """boto3 sends `aws-chunked` with a trailer in HTTP chunks when it computes a checksum over a stream."""
    config = botocore.config.Config(
        s3={"addressing_style": "path"}, request_checksum_calculation="when_supported", proxies={}
    )
    client = botocore.session.Session().create_client(
        "s3",
        "us-east-1",
        endpoint_url=proxy.endpoint,
        aws_access_key_id=WRITER.access_key_id,
        aws_secret_access_key=WRITER.secret_access_key,
        config=config,
    )
    data = os.urandom(3_000_000)
    client.put_object(Bucket=bucket.name, Key="key", Body=data, ChecksumAlgorithm="CRC32")
    assert bucket.get("key") == data


@contextmanager
def connected(proxy: FaultProxy, timeout_seconds: float = 30) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"), timeout=timeout_seconds)
    with closing(connection):
        yield connection


def signed_target(bucket: Bucket, operation: str, key: str) -> tuple[str, dict[str, str]]:
    """What to request, and the Host header that the signature covers: the server's own."""
    url = bucket.client.generate_presigned_url(operation, {"Bucket": bucket.name, "Key": key})
    parts = urllib.parse.urlsplit(url)
    return f"{parts.path}?{parts.query}", {"Host": parts.netloc}


def test_http_chunks_pass_unchanged(proxy: FaultProxy, bucket: Bucket) -> None:
    blocks = [os.urandom(100_000) for _ in range(20)]
    target, headers = signed_target(bucket, "put_object", "key")
    with connected(proxy) as connection:
        headers["Transfer-Encoding"] = "chunked"
        connection.request("PUT", target, iter(blocks), headers, encode_chunked=True)
        assert connection.getresponse().status == 200
    assert bucket.get("key") == b"".join(blocks)


def test_the_servers_own_refusals_pass(proxy: FaultProxy, bucket: Bucket) -> None:
    reader = s3_client(proxy.endpoint, READER)
    assert refusal(put, reader, bucket) == (403, "AccessDenied")
    assert refusal(get, reader, bucket) == (404, "NoSuchKey")
    assert [status for _, status in proxy.requests] == [403, 404]


def test_64_connections_at_once_do_not_mix_up_data(proxy: FaultProxy, bucket: Bucket) -> None:
    objects = {f"{number:02}": os.urandom(50_000 + number) for number in range(64)}
    bucket.put(objects)
    together = threading.Barrier(64)

    def fetch(key: str) -> bytes:
        target, headers = signed_target(bucket, "get_object", key)
        with connected(proxy) as connection:
            connection.connect()
            together.wait(60)
            data = b""
            for _ in range(3):
                connection.request("GET", target, headers=headers)
                data += connection.getresponse().read()
        return data

    with ThreadPoolExecutor(64) as pool:
        fetched = dict(zip(objects, pool.map(fetch, objects), strict=True))
    assert fetched == {key: data * 3 for key, data in objects.items()}


def test_large_bodies_are_not_held_in_memory(client: Any, bucket: Bucket, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        for _ in range(100):
            file.write(os.urandom(1_000_000))
    before = resident_bytes()
    with large.open("rb") as file:
        client.put_object(Bucket=bucket.name, Key="large", Body=file)
    digest, peak = hashlib.sha256(), before
    for block in client.get_object(Bucket=bucket.name, Key="large")["Body"].iter_chunks(1_000_000):
        digest.update(block)
        peak = max(peak, resident_bytes())
    assert digest.digest() == hashlib.sha256(large.read_bytes()).digest()
    assert peak - before < 40_000_000


def resident_bytes() -> int:
    """The memory of this process, in which the proxy's threads run."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ----------------------------------------------------------------------------------------- What is told of it


def test_requests_are_named_as_boto3_makes_them(proxy: FaultProxy, client: Any, bucket: Bucket) -> None:
    name = {"Bucket": bucket.name}
    put(client, bucket, "a/key")
    get(client, bucket, "a/key")
    client.head_object(**name, Key="a/key")
    client.list_objects_v2(**name, Prefix="a/")
    client.copy_object(**name, Key="copy", CopySource={**name, "Key": "a/key"})
    client.delete_object(**name, Key="copy")
    client.delete_objects(**name, Delete={"Objects": [{"Key": "a/key"}]})
    of_upload = {
        **name,
        "Key": "large",
        "UploadId": client.create_multipart_upload(**name, Key="large")["UploadId"],
    }
    part = client.upload_part(**of_upload, PartNumber=1, Body=bytes(PART_BYTES))
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(**of_upload, MultipartUpload=parts)
    of_upload["UploadId"] = client.create_multipart_upload(**name, Key="large")["UploadId"]
    client.abort_multipart_upload(**of_upload)
    client.list_buckets()

    requests = [request for request, _ in proxy.requests]
    reading = {"GET", "HEAD", "LIST", "OTHER"}
    expected = ["PUT", "GET", "HEAD", "LIST", "COPY", "DELETE", "DELETES"]
    expected += ["INITIATE", "PART", "COMPLETE", "INITIATE", "ABORT", "OTHER"]
    assert [request.kind for request in requests] == expected
    assert [request.is_write for request in requests] == [kind not in reading for kind in expected]
    assert {status for _, status in proxy.requests} <= {200, 204}
    first, listing = requests[0], requests[3]
    assert (first.method, first.path, first.bucket, first.key) == (
        "PUT",
        f"/{bucket.name}/a/key",
        bucket.name,
        "a/key",
    )
    assert first.body_bytes == 4
    assert (listing.bucket, listing.key, listing.query["prefix"]) == (bucket.name, "", "a/")
    assert proxy.count(lambda request: request.kind == "INITIATE") == 2
    assert [request.when for request in requests] == sorted(request.when for request in requests)


# --------------------------------------------------------------------------------------------- What it does


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (503, "SlowDown"), (500, "InternalError")]
)
def test_refused_requests_do_not_reach_the_server(
    proxy: FaultProxy, client: Any, bucket: Bucket, status: int, code: str
) -> None:
    proxy.add(lambda _: True, Action.REFUSE, status=status, code=code)
    assert refusal(put, client, bucket, body=bytes(2_000_000)) == (status, code)
    assert refusal(client.head_object, Bucket=bucket.name, Key="key")[0] == status
    assert [seen for _, seen in proxy.requests] == [status, status]
    proxy.clear()
    assert bucket.sizes() == {}
    put(client, bucket)


@pytest.mark.parametrize("release", ["remove", "clear", "close"])
def test_a_request_hangs_until_it_is_let_go(server: SeaweedFS, bucket: Bucket, release: str) -> None:
    with FaultProxy(server.endpoint) as proxy, ThreadPoolExecutor(1) as pool:
        fault = proxy.add(is_put, Action.HANG)
        hanging = pool.submit(put, s3_client(proxy.endpoint, WRITER), bucket)
        wait_until(lambda: fault.hit == 1, 10, "the request to arrive")
        with pytest.raises(TimeoutError):
            hanging.result(0.5)
        {"remove": lambda: proxy.remove(fault), "clear": proxy.clear, "close": proxy.close}[release]()
        with pytest.raises(BROKEN):
            hanging.result(10)
    assert bucket.sizes() == {}


def put_is_reset(proxy: FaultProxy, bucket: Bucket) -> bool:
    """Whether the connection of a PUT ends by a reset, which boto3 does not tell from an orderly end."""
    target, headers = signed_target(bucket, "put_object", "key")
    with connected(proxy) as connection:
        try:
            connection.request("PUT", target, b"body", headers)
            connection.getresponse()
        except ConnectionResetError as error:
            return not isinstance(error, http.client.RemoteDisconnected)
    return False


def test_an_answer_of_ours_has_the_words_elements_and_headers_that_are_asked_for(
    proxy: FaultProxy, client: Any, bucket: Bucket
) -> None:
    details = {
        "message": "moved & gone",
        "details": "<Region>north</Region>",
        "headers": {"Retry-After": "7"},
    }
    fault = proxy.add(is_put, Action.REFUSE, status=503, **details)
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        put(client, bucket)
    answer = refused.value.response
    assert (answer["Error"]["Message"], answer["Error"]["Region"]) == ("moved & gone", "north")
    assert answer["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "7"
    proxy.remove(fault)
    proxy.add(is_get, Action.ANSWER, answer=lambda request: f"for {request.key}")
    assert get(client, bucket, "nothing there") == b"for nothing there"


def test_a_reset_request_does_not_reach_the_server(proxy: FaultProxy, bucket: Bucket) -> None:
    proxy.add(is_put, Action.RESET)
    assert put_is_reset(proxy, bucket)
    assert bucket.sizes() == {}
    assert [status for _, status in proxy.requests] == [None]


def test_an_answer_is_cut_in_half(proxy: FaultProxy, client: Any, bucket: Bucket) -> None:
    bucket.put({"key": bytes(1_000_000)})
    proxy.add(is_get, Action.CUT)
    body = client.get_object(Bucket=bucket.name, Key="key")["Body"]
    got = 0
    with pytest.raises(CUT):
        while block := body.read(1000):
            got += len(block)
    assert 490_000 < got <= 500_000


@pytest.fixture
def chunking_server() -> Iterator[str]:
    """The endpoint of a server that answers `/chunks` in HTTP chunks and `/end` with a body up to its end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            if self.path == "/end":
                self.end_headers()
                self.wfile.write(b"first" * 100)
                self.close_connection = True
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nfirst\r\n6;a=b\r\nsecond\r\n0\r\nX-Trailer: yes\r\n\r\n")

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", free_ports(1)[0]), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_answers_without_a_length_pass_and_are_cut(chunking_server: str) -> None:
    with FaultProxy(chunking_server) as proxy:
        with connected(proxy) as connection:
            for path, expected in (
                ("/chunks", b"firstsecond"),
                ("/chunks", b"firstsecond"),
                ("/end", b"first" * 100),
            ):
                connection.request("GET", path)
                assert connection.getresponse().read() == expected
        proxy.add(lambda _: True, Action.CUT)
        with connected(proxy) as connection, pytest.raises(http.client.IncompleteRead):
            connection.request("GET", "/chunks")
            connection.getresponse().read()


def test_an_answer_is_lost_after_the_server_did_it(proxy: FaultProxy, bucket: Bucket) -> None:
    proxy.add(is_put, Action.LOSE_ANSWER)
    assert put_is_reset(proxy, bucket)
    assert bucket.contents() == {"key": b"body"}
    assert [status for _, status in proxy.requests] == [None]


def test_conditions_are_ignored(proxy: FaultProxy, client: Any, bucket: Bucket) -> None:
    """Although the client's signature covers them."""
    put(client, bucket, body=b"first")
    assert refusal(put, client, bucket, IfNoneMatch="*") == (412, "PreconditionFailed")
    fault = proxy.add(is_put, Action.IGNORE_CONDITIONS)
    put(client, bucket, body=b"second", IfNoneMatch="*")
    put(client, bucket, "a b/ü", body=b"third", IfMatch='"no such"')
    assert bucket.contents() == {"key": b"second", "a b/ü": b"third"}
    proxy.remove(fault)
    assert refusal(put, client, bucket, IfMatch='"no such"') == (412, "PreconditionFailed")


def test_a_request_is_delayed(proxy: FaultProxy, client: Any, bucket: Bucket) -> None:
    proxy.add(is_put, Action.DELAY, seconds=1.0)
    begin = time.monotonic()
    put(client, bucket)
    assert time.monotonic() - begin >= 1
    assert bucket.contents() == {"key": b"body"}


def test_only_the_chosen_requests_are_hit(proxy: FaultProxy, client: Any, bucket: Bucket) -> None:
    def survives() -> bool:
        try:
            put(client, bucket)
        except botocore.exceptions.ClientError:
            return False
        return True

    fault = proxy.add(is_put, Action.REFUSE, after=2, times=3)
    assert [survives() for _ in range(8)] == [True] * 2 + [False] * 3 + [True] * 3
    assert (fault.seen, fault.hit) == (8, 3)
    proxy.clear()
    proxy.add(is_put, Action.REFUSE, probability=0.5)
    assert 5 < sum(survives() for _ in range(30)) < 25


# ------------------------------------------------------------------------------------- When the server breaks


def test_a_server_that_restarts_breaks_no_later_request(tmp_path: Path) -> None:
    """The client's idle connection is closed with the server's, so that it is not used again."""
    with SeaweedFS(tmp_path / "own") as own, FaultProxy(own.endpoint) as proxy:
        client = s3_client(proxy.endpoint, WRITER)
        bucket = Bucket(own, "bucket").create()
        put(client, bucket)
        own.stop()
        own.start()
        assert get(client, bucket) == b"body"
        own.stop()
        with pytest.raises(BROKEN):
            get(client, bucket)


def test_closing_frees_threads_that_wait_for_a_paused_server(tmp_path: Path) -> None:
    before = threading.active_count()
    with SeaweedFS(tmp_path / "own") as own, ThreadPoolExecutor(1) as pool:
        bucket = Bucket(own, "bucket").create()
        with FaultProxy(own.endpoint) as proxy:
            own.pause()
            waiting = pool.submit(put, s3_client(proxy.endpoint, WRITER), bucket)
            wait_until(lambda: proxy.count(is_put) == 1, 10, "the request to arrive")
        with pytest.raises(BROKEN):
            waiting.result(10)
    wait_until(lambda: threading.active_count() <= before, 10, "the proxy's threads to end")


def test_a_client_that_gives_up_frees_the_thread_that_waits_for_a_paused_server(tmp_path: Path) -> None:
    with SeaweedFS(tmp_path / "own") as own, FaultProxy(own.endpoint) as proxy:
        own.pause()
        before = threading.active_count()
        with connected(proxy, timeout_seconds=0.5) as connection:
            connection.request("GET", "/bucket/key")
            with pytest.raises(TimeoutError):
                connection.getresponse()
            assert threading.active_count() == before + 1
        wait_until(lambda: threading.active_count() == before, 10, "the connection's thread to end")


# --------------------------------------------------------------------------------- The bad network: toxiproxy


@pytest.fixture
def toxiproxy(tmp_path: Path) -> Iterator[Toxiproxy]:
    with Toxiproxy(tmp_path / "toxiproxy") as running:
        yield running


def test_the_network_is_slow_or_broken_as_told(
    toxiproxy: Toxiproxy, server: SeaweedFS, bucket: Bucket
) -> None:
    network = toxiproxy.proxy(server.endpoint)
    client = s3_client(network.endpoint, WRITER)
    put(client, bucket)
    with network.toxic("latency", latency=700):
        begin = time.monotonic()
        assert get(client, bucket) == b"body"
        assert time.monotonic() - begin >= 0.7
    with network.toxic("reset_peer", timeout=0), pytest.raises(BROKEN):
        get(client, bucket)
    assert get(client, bucket) == b"body"
    network.disable()
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        get(client, bucket)
    network.enable()
    assert get(client, bucket) == b"body"
