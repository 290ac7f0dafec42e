"""Being told: health checks, webhooks, JSON lines, metrics, and archives that lost many objects."""

import http.server
import json
import os
import pty
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import backup
from helpers import (
    BACKUP,
    PASSPHRASE,
    Backup,
    Bucket,
    Repository,
    Result,
    leftovers,
    run_backup,
    settings,
    wait_until,
    with_target,
    with_target_secrets,
)
from readme import README
from servers import READER, WRITER, SeaweedFS

DOCKER_STOP_SECONDS = 10
SECRET_PARTS = ("user-of-url", "password-of-url", "secret-path", "secret-query")


# ------------------------------------------------------------------------------------------------ Who is told


@dataclass(frozen=True)
class Heard:
    """A request that was received."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        assert self.headers["Content-Type"] == "application/json"
        return json.loads(self.body)


@dataclass
class Receiver:
    """An HTTP server that notes what it is told. It answers the given statuses first, then 200."""

    statuses: list[int] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)  # how often a path is answered with 503 first
    certificate: Path | None = None  # with its key: it speaks TLS
    silent: bool = False  # it takes requests and never answers
    slow: dict[str, float] = field(default_factory=dict)  # how many seconds a path's requests are under way
    heard: list[Heard] = field(default_factory=list)

    def __enter__(self) -> "Receiver":
        receiver, self._over = self, threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                time.sleep(receiver.slow.get(self.path, 0))
                receiver.heard.append(Heard(self.command, self.path, dict(self.headers), body))
                if receiver.silent:
                    receiver._over.wait(60)
                    return
                self.send_response(receiver.status_for(self.path))
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST  # noqa: N815  # the name is http.server's

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def status_for(self, path: str) -> int:
        """What the next request to a path is answered with."""
        if self.refused.get(path):
            self.refused[path] -= 1
            return 503
        return self.statuses.pop(0) if self.statuses else 200

    def url(self, path: str) -> str:
        """An address of this server."""
        scheme, host = ("https", "localhost") if self.certificate else ("http", "127.0.0.1")
        return f"{scheme}://{host}:{self._server.server_port}{path}"

    @property
    def requests(self) -> list[str]:
        """Methods and paths, in order."""
        return [f"{heard.method} {heard.path}" for heard in self.heard]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Who is told in this test."""
    with Receiver() as running:
        yield running


@dataclass
class Site:
    """A configuration with one target, told to a receiver, and the buckets behind it."""

    environment: dict[str, str]
    source: Bucket
    target: Bucket
    folder: Path
    receiver: Receiver

    def run(self, *arguments: str, **variables: str) -> Result:
        """A run with further variables."""
        return run_backup({**self.environment, **variables}, *arguments)

    @property
    def metrics_file(self) -> Path:
        """Where the metrics go."""
        return Path(self.environment["METRICS_FILE"])


@pytest.fixture
def site(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    receiver: Receiver,
    needs_fuse: None,
) -> Site:
    """A source with ten objects; a health check, a webhook that is always told, and a metrics file."""
    source.put({f"folder/{number}": os.urandom(100) for number in range(10)})
    (tmp_path / "metrics").mkdir()
    environment = settings(
        server,
        tmp_path,
        source.name,
        {"first": {"path": target.name, "prune": "--keep-last=1"}},
        HEALTHCHECK_URL=receiver.url("/ping/uuid?create=1"),
        NOTIFY_URL=receiver.url("/hook"),
        NOTIFY_ON="always",
        METRICS_FILE=str(tmp_path / "metrics" / "backup.prom"),
    )
    return Site(environment, source, target, tmp_path, receiver)


def heard_by(site: Site, path: str) -> Heard:
    """The only request to a path."""
    found = [heard for heard in site.receiver.heard if heard.path == path]
    assert len(found) == 1, site.receiver.requests
    return found[0]


# ------------------------------------------------------------------------------------ What is sent, and where

HEALTHCHECKS = "https://hc-ping.com/uuid"
KUMA = "https://example.org/kuma/api/push/token"


@pytest.mark.parametrize(
    ("url", "signal_name", "method", "sent_to"),
    [
        (HEALTHCHECKS, "start", "POST", f"{HEALTHCHECKS}/start"),
        (HEALTHCHECKS, "success", "POST", HEALTHCHECKS),
        (HEALTHCHECKS, "fail", "POST", f"{HEALTHCHECKS}/fail"),
        (HEALTHCHECKS, "log", "POST", f"{HEALTHCHECKS}/log"),
        (f"{HEALTHCHECKS}/?create=1", "fail", "POST", f"{HEALTHCHECKS}/fail?create=1"),
        (f"{HEALTHCHECKS}/?create=1", "success", "POST", f"{HEALTHCHECKS}?create=1"),
        (KUMA, "success", "GET", f"{KUMA}?status=up&msg=all+well+%26+fine&ping=1500"),
        (
            f"{KUMA}?status=up&msg=OK&ping=",
            "fail",
            "GET",
            f"{KUMA}?status=down&msg=all+well+%26+fine&ping=1500",
        ),
        (f"{KUMA}?key=a%20b", "success", "GET", f"{KUMA}?key=a+b&status=up&msg=all+well+%26+fine&ping=1500"),
    ],
)
def test_each_kind_of_health_check_is_told_in_its_own_way(
    url: str, signal_name: str, method: str, sent_to: str
) -> None:
    message = backup.healthcheck_message(url, signal_name, "all well\n& fine", 1.5)
    assert message
    assert (message.method, message.url) == (method, sent_to)
    assert message.body == (b"all well\n& fine" if method == "POST" else b"")


@pytest.mark.parametrize("signal_name", ["start", "log"])
def test_uptime_kuma_knows_up_and_down_only(signal_name: str) -> None:
    assert backup.healthcheck_message(KUMA, signal_name, "text", 1) is None


def test_what_is_too_long_is_cut_between_characters() -> None:
    message = backup.healthcheck_message(HEALTHCHECKS, "fail", "ü" * 100_000 + "\udcff", 1)
    assert message
    assert message.body == ("ü" * 50_000).encode()
    short = backup.healthcheck_message(KUMA, "fail", "\udcff" + "ü" * 100_000, 1)
    assert short
    assert len(short.url) < 3000


@pytest.mark.parametrize(
    ("code", "signal_name", "notified_on"),
    [
        (0, "success", {"always"}),
        (1, "success", {"always", "warning"}),
        (2, "fail", {"always", "warning", "failure"}),
        (75, "log", {"always", "warning"}),
        (78, "fail", {"always", "warning", "failure"}),
        (143, "fail", {"always", "warning", "failure"}),
    ],
)
def test_the_exit_code_decides_who_is_told_what(code: int, signal_name: str, notified_on: set[str]) -> None:
    assert backup.ending(code).signal_name == signal_name
    assert set(backup.ending(code).notify_on) == notified_on


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://h/a b/ü?x=ü&y=%C3%BC", "/a%20b/%C3%BC?x=%C3%BC&y=%C3%BC"),
        ("https://h", "/"),
        ("https://h/a%2Fb?c=d?e", "/a%2Fb?c=d?e"),
    ],
)
def test_a_url_is_sent_as_it_is_but_for_what_http_cannot_have(url: str, target: str) -> None:
    assert backup.request_target(backup.urllib.parse.urlsplit(url)) == target


@pytest.mark.parametrize(
    "url",
    [
        "secret-path",
        "ftp://host/secret-path",
        "https:///secret-path",
        "https://host:secret-path/",
        "https://user:secret-path/x@host/",
        "https://host/secret-path with a blank",
        "https://host\\secret-path",
        "https://a..b/secret-path",
    ],
)
@pytest.mark.parametrize("name", ["HEALTHCHECK_URL", "NOTIFY_URL"])
def test_a_wrong_url_is_a_mistake_that_does_not_quote_it(name: str, url: str) -> None:
    mistakes = backup.Configuration({name: url}).mistakes
    assert len(mistakes) == 1
    assert mistakes[0].startswith(f"{name}: is not an http(s) URL")
    assert "secret-path" not in mistakes[0]


def test_one_wrong_address_does_not_silence_the_other() -> None:
    values = {"HEALTHCHECK_URL": "nonsense", "NOTIFY_URL": "https://host/x", "METRICS_FILE": "relative"}
    configuration = backup.Configuration(values)
    known, mistakes = configuration.known, configuration.mistakes
    assert {mistake.partition(":")[0] for mistake in mistakes} == {"METRICS_FILE", "HEALTHCHECK_URL"}
    assert known.notify_url == "https://host/x"
    assert not known.healthcheck_url
    assert not known.metrics_file


# ---------------------------------------------------------------------------------- Sending, and trying again


def deliver(url: str, seconds: float = 10) -> None:
    """Delivers a small message."""
    message = backup.Message("NOTIFY_URL", "POST", url, b"body")
    message.send(time.monotonic() + seconds, threading.Event())


def test_what_may_pass_is_tried_again(receiver: Receiver) -> None:
    receiver.statuses += [500, 429]
    deliver(receiver.url("/x?a=b"))
    assert receiver.requests == ["POST /x?a=b"] * 3


@pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (302, "redirects are not followed")])
def test_what_cannot_pass_is_not_tried_again(receiver: Receiver, status: int, words: str) -> None:
    receiver.statuses.append(status)
    with pytest.raises(backup.BackupError) as raised:
        deliver(receiver.url("/secret-path?secret-query"))
    assert words in str(raised.value)
    assert "http://127.0.0.1)" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert len(receiver.heard) == 1


def test_a_server_that_speaks_no_http_is_not_quoted() -> None:
    """An echo server would repeat the secret path."""
    with backup.socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(connection.recv(65536))

        threading.Thread(target=echo, daemon=True).start()
        with pytest.raises(backup.BackupError) as raised:
            deliver(f"http://127.0.0.1:{listener.getsockname()[1]}/secret-path", 0.5)
    assert "no HTTP" in str(raised.value)
    assert "secret" not in str(raised.value)


def own_certificate(path: Path) -> Path:
    """A file with a new key and a certificate for localhost, signed by itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, *form) + certificate.public_bytes(pem))
    return path


def test_a_certificate_is_checked_and_can_be_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver(certificate=own_certificate(tmp_path / "own.pem")) as receiver:
        start = time.monotonic()
        with pytest.raises(backup.BackupError, match=r"https://localhost\).*CERTIFICATE_VERIFY_FAILED"):
            deliver(receiver.url("/x"))
        assert time.monotonic() - start < 2, "it was tried again"
        assert receiver.heard == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
        deliver(receiver.url("/x"))
        assert receiver.requests == ["POST /x"]


def test_user_and_password_of_a_url_become_basic_authentication(receiver: Receiver) -> None:
    deliver(receiver.url("/x").replace("://", "://me:p%40ss@"))
    assert receiver.heard[0].headers["Authorization"] == "Basic bWU6cEBzcw=="


# ------------------------------------------------------------------------------------------------- Whole runs


def test_a_run_that_goes_well_is_told_at_its_start_and_its_end(site: Site) -> None:
    result = site.run().expect(0)
    check = [heard for heard in site.receiver.heard if heard.path.startswith("/ping/")]
    assert [f"{heard.method} {heard.path}" for heard in check] == [
        "POST /ping/uuid/start?create=1",
        "POST /ping/uuid?create=1",
    ]
    body = check[1].body.decode()
    assert "all well (exit code 0)" in body
    assert next(line for line in result.lines if line.startswith("first ")) in body
    document = heard_by(site, "/hook").json
    assert document["label"] == "backup"
    assert (document["exit_code"], document["result"], document["errors"]) == (0, "ok", [])
    assert (document["command"], document["host"]) == ("run", os.uname().nodename)
    assert "all well" in document["text"]
    (target,) = document["targets"]
    told = README.partition("- **`NOTIFY_URL`** ")[2].partition("\n- ")[0].partition(" It has ")[2]
    of_run, _, of_targets = (re.findall(r"`(\w+)`", part) for part in told.partition(" with their "))
    assert {*of_run, of_targets.pop()} <= document.keys()
    assert {*of_targets} <= target.keys()
    assert len(of_run) + len(of_targets) == 17
    assert (target["name"], target["result"], target["reason"]) == ("first", "ok", "")
    assert (target["objects"], target["bytes"]) == (10, 1000)
    assert target["archive"] in result.output
    assert target["new_bytes"] > 0
    assert 0 < target["seconds"] <= document["seconds"]
    assert document["version"] == backup.VERSION
    assert datetime.fromisoformat(document["started"]) <= datetime.fromisoformat(document["finished"])


@pytest.mark.long
def test_a_maintenance_is_told_and_does_not_pass_for_a_backup(site: Site) -> None:
    site.run().expect(0)
    metrics = site.metrics_file.read_text(encoding="utf-8")
    site.receiver.heard.clear()
    site.run("maintain").expect(0)
    assert site.receiver.requests[0] == "POST /ping/uuid/start?create=1"
    assert b"exit code 0" in heard_by(site, "/ping/uuid?create=1").body
    document = heard_by(site, "/hook").json
    assert (document["command"], document["exit_code"]) == ("maintain", 0)
    assert [target["name"] for target in document["targets"]] == ["first"]
    site.receiver.heard.clear()
    run_backup(with_target(site.environment, "first", path="no-such-bucket"), "maintain").expect(2)
    assert "NoSuchBucket" in heard_by(site, "/ping/uuid/fail?create=1").body.decode()
    assert site.metrics_file.read_text(encoding="utf-8") == metrics


def test_a_text_run_prints_what_it_always_did(site: Site) -> None:
    """Every line is a time and a name in brackets, or belongs to the table; nothing is coloured."""
    result = site.run().expect(0)
    ordinary = [
        line for line in result.lines if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \[[a-z-]+\] ", line)
    ]
    assert [line.split()[0] for line in result.lines if line not in ordinary] == ["target", "first"]
    assert "\033" not in result.output
    assert "hc" not in result.output


@pytest.mark.long
def test_a_failure_is_told_with_the_reason_and_no_secret(site: Site) -> None:
    site.run(NOTIFY_ON="failure").expect(0)
    assert "POST /hook" not in site.receiver.requests
    site.receiver.heard.clear()
    wrong = with_target_secrets(site.environment, "first", borg_passphrase="the-wrong-passphrase")
    run_backup({**wrong, "NOTIFY_ON": "failure"}).expect(2)
    body = heard_by(site, "/ping/uuid/fail?create=1").body.decode()
    assert 'TARGET_SECRETS "first"."borg_passphrase"' in body
    document = heard_by(site, "/hook").json
    assert (document["exit_code"], document["result"]) == (2, "failed")
    assert document["targets"][0]["result"] == "failed"
    assert 'TARGET_SECRETS "first"."borg_passphrase"' in document["targets"][0]["reason"]
    assert document["targets"][0]["errors"]
    everything = b"".join(heard.body for heard in site.receiver.heard).decode()
    secrets = (READER.secret_access_key, WRITER.secret_access_key, PASSPHRASE, "the-wrong-passphrase")
    assert not [secret for secret in secrets if secret in everything]


def test_a_source_that_is_not_there_is_told(site: Site) -> None:
    site.run(SOURCE_PATH="no-such-bucket").expect(2)
    assert b"NoSuchBucket" in heard_by(site, "/ping/uuid/fail?create=1").body
    document = heard_by(site, "/hook").json
    assert [target["result"] for target in document["targets"]] == ["failed"]
    assert "NoSuchBucket" in document["errors"][0]


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ((), {"TARGETS": "{"}, "TARGETS: is not valid JSON"),
        (
            (),
            {"SHRINK_WARNING": "100", "LOG_LEVEL": "loud"},
            "SHRINK_WARNING: write a whole number from 0 to 99",
        ),
        (("run", "frist"), {}, "known are first"),
        (("run", "--fast"), {}, "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_configuration_is_told(
    site: Site, arguments: Sequence[str], variables: Mapping[str, str], words: str
) -> None:
    site.run(*arguments, **variables).expect(78)
    assert words in heard_by(site, "/ping/uuid/fail?create=1").body.decode()
    document = heard_by(site, "/hook").json
    assert (document["exit_code"], document["result"]) == (78, "misconfigured")
    assert any(words in error for error in document["errors"])


@pytest.mark.long
def test_uptime_kuma_is_told_up_and_down(site: Site) -> None:
    url = site.receiver.url("/api/push/token?status=up&msg=OK&ping=")
    site.run(HEALTHCHECK_URL=url, NOTIFY_ON="failure").expect(0)
    site.run(HEALTHCHECK_URL=url, NOTIFY_ON="failure", SOURCE_PATH="no-such-bucket").expect(2)
    up, down = (heard for heard in site.receiver.heard if heard.path != "/hook")
    assert re.fullmatch(r"/api/push/token\?status=up&msg=Backup\+backup\+on\+.*&ping=\d{3,}", up.path)
    assert re.fullmatch(r"/api/push/token\?status=down&msg=Backup\+.*NoSuchBucket.*&ping=\d+", down.path)
    assert (up.method, down.method) == ("GET", "GET")


def test_commands_of_a_person_are_not_told(site: Site) -> None:
    site.run("check-config").expect(0)
    site.run("rum").expect(78)
    assert site.receiver.heard == []
    assert not site.metrics_file.exists()


def test_a_run_that_finds_another_one_at_work_raises_no_alarm(site: Site) -> None:
    holder = {
        "run_id": "x",
        "host": "h",
        "purpose": "a backup",
        "since": "now",
        "ttl_seconds": 600,
        "write": 1,
    }
    site.target.put({".s3borgbackup-lease": json.dumps(holder).encode()})
    site.run(LEASE_WAIT="0", NOTIFY_ON="failure").expect(75)
    assert [heard.path for heard in site.receiver.heard] == [
        "/ping/uuid/start?create=1",
        "/ping/uuid/log?create=1",
    ]
    assert b"a backup on h" in site.receiver.heard[1].body


def stopped_after_create_begins(site: Site, **variables: str) -> tuple[Result, float]:
    """A run that is stopped in `borg create`; its result, and how long its end took."""
    site.source.put({"large": os.urandom(40_000_000)})
    environment = with_target({**site.environment, **variables}, "first", compression="lzma,9")
    with Backup(environment) as run:
        run.wait_for_line("borg create begins")
        wait_until(site.target.locks, 30, "borg has its lock in the bucket")
        start = time.monotonic()
        run.send_signal(signal.SIGTERM)
        result = run.wait(60).expect(128 + signal.SIGTERM)
    return result, time.monotonic() - start


def test_a_run_that_is_stopped_says_so_in_time(site: Site) -> None:
    _, seconds = stopped_after_create_begins(site)
    assert seconds < DOCKER_STOP_SECONDS
    assert b"stopped by SIGTERM" in heard_by(site, "/ping/uuid/fail?create=1").body
    document = heard_by(site, "/hook").json
    assert (document["exit_code"], document["result"]) == (143, "stopped")
    assert leftovers(site.folder) == []


def test_nobody_who_answers_does_not_hold_a_stopped_run(site: Site) -> None:
    site.receiver.silent = True
    result, seconds = stopped_after_create_begins(site)
    assert seconds < DOCKER_STOP_SECONDS
    assert "HEALTHCHECK_URL (http://127.0.0.1): no answer" in result.output


@pytest.mark.long
def test_nobody_who_answers_does_not_hold_a_run_for_long_or_make_it_fail(site: Site) -> None:
    usual = site.run().duration_seconds
    site.receiver.silent = True
    result = site.run().expect(0)
    assert result.duration_seconds < usual + 30
    for variable in ("HEALTHCHECK_URL", "NOTIFY_URL"):
        assert any("warning" in line and variable in line for line in result.lines)


@pytest.mark.long
def test_a_start_is_not_told_after_the_end(site: Site) -> None:
    """A check that hears of a start after the end waits for an end that never comes, and raises the alarm."""
    start, end = "/ping/uuid/start?create=1", "/ping/uuid?create=1"
    site.receiver.refused = {start: 100, "/hook": 3}  # the webhook takes seven seconds
    site.run().expect(0)
    paths = [heard.path for heard in site.receiver.heard]
    assert paths.count(start) > 1
    assert start not in paths[paths.index(end) :]
    assert paths[-1] == "/hook"


def test_a_start_that_is_under_way_at_the_end_is_waited_for(receiver: Receiver) -> None:
    receiver.slow = {"/ping/start": 4}
    settings = backup.Configuration({"HEALTHCHECK_URL": receiver.url("/ping")}).known
    console, report = backup.Console(debug=False), backup.Report("id", "backup", datetime.now(UTC))
    reporter = backup.Reporter(settings, console, backup.Stop(), report)
    reporter.start()
    reporter.end(0)
    assert receiver.requests == ["POST /ping/start", "POST /ping"]


def test_an_error_stands_once_in_the_text_for_people() -> None:
    """It is the reason of a target, or the end of that reason; what is no reason stands there, too."""
    store = backup.Store("first", "https://s3.example", "bucket", "", "id", "secret")
    runtime = SimpleNamespace(console=backup.Console(debug=False))
    reasons = {
        "first": "target-first: refused. Correct it.",
        "second": "it is stored, but target-second: the repository is damaged",
    }
    runs = [
        backup.TargetRun(
            runtime, backup.Target(name, store, "", "none", False, "lz4", (), None), reason=reason
        )
        for name, reason in reasons.items()
    ]
    troubles = runtime.console.troubles
    troubles["error"].add("target-first", "target-first: refused. Correct it.")
    troubles["error"].add("target-second", "target-second: the repository is damaged")
    troubles["warning"].add("source", "slow")
    troubles["error"].count += 1
    troubles["warning"].count += 2
    targets, table = [run.as_json() for run in runs], backup.summary(runs, backup.RUN_COLUMNS)
    told = backup.Report("id", "backup", datetime.now(UTC), targets, table)
    text = backup.run_text(told, 2, troubles)
    assert text.count("refused") == text.count("damaged") == 1
    assert text.endswith("[source] warning: slow\n3 more")


def test_a_receiver_that_is_down_for_a_moment_hears_of_it_all_the_same(site: Site) -> None:
    site.receiver.statuses += [503, 503]
    site.run().expect(0)
    assert {"POST /hook", "POST /ping/uuid?create=1"} <= set(site.receiver.requests)


@pytest.mark.long
def test_nothing_of_the_addresses_but_scheme_and_host_is_ever_printed(site: Site) -> None:
    """A server that refuses, one that is not there, and a wrong URL, with all that debugging shows."""
    site.receiver.statuses += [404] * 10
    address = site.receiver.url("/secret-path?secret-query=1").replace(
        "://", "://user-of-url:password-of-url@"
    )
    nowhere = "http://user-of-url:password-of-url@127.0.0.1:1/secret-path?secret-query"
    outputs = [
        site.run(LOG_LEVEL="debug", HEALTHCHECK_URL=address, NOTIFY_URL=address).expect(0).output,
        site.run(LOG_LEVEL="debug", HEALTHCHECK_URL=nowhere, NOTIFY_URL=nowhere, LOG_FORMAT="json").output,
        site.run(HEALTHCHECK_URL=address.replace("http", "htp"), NOTIFY_URL=address).expect(78).output,
    ]
    assert "HEALTHCHECK_URL (http://127.0.0.1) was not told how the run goes: 404 Not Found" in outputs[0]
    assert "Connection refused" in outputs[1]
    for output in outputs:
        assert not [part for part in SECRET_PARTS if part in output], output


def test_the_address_may_come_from_a_file_and_redirects_lead_nowhere(site: Site) -> None:
    path = site.folder / "url"
    path.write_text(site.receiver.url("/from-a-file") + "\n", encoding="utf-8")
    site.receiver.statuses.append(301)
    environment = {name: value for name, value in site.environment.items() if name != "HEALTHCHECK_URL"}
    run_backup({**environment, "HEALTHCHECK_URL_FILE": str(path), "NOTIFY_ON": "failure"}).expect(0)
    assert site.receiver.requests == ["POST /from-a-file/start", "POST /from-a-file"]


# ------------------------------------------------------------------------------------------------- JSON lines


def events(result: Result, processes: int = 1) -> list[dict[str, Any]]:
    """Every line of the output as JSON, with what every line has; of so many processes, each with its id."""
    entries = [json.loads(line) for line in result.lines]
    for entry in entries:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
        assert entry["level"] in ("debug", "info", "warning", "error")
        assert {"event", "about", "message"} <= entry.keys()
    assert 1 <= len({entry["run_id"] for entry in entries}) <= processes
    return entries


def only(entries: Sequence[Mapping[str, Any]], event: str) -> Mapping[str, Any]:
    """The one event of this kind."""
    (found,) = [entry for entry in entries if entry["event"] == event]
    return found


def test_with_json_every_line_of_a_run_is_an_object_with_its_numbers(site: Site) -> None:
    entries = events(site.run(LOG_FORMAT="json", LOG_LEVEL="debug").expect(0))
    assert entries[0]["run_id"] == heard_by(site, "/hook").json["run_id"]
    assert only(entries, "run_started")["targets"] == ["first"]
    created = only(entries, "archive_created")
    assert (created["target"], created["objects"], created["bytes"]) == ("first", 10, 1000)
    assert only(entries, "pruned")["kept"] == 1
    finished = only(entries, "target_finished")
    assert (finished["target"], finished["result"], finished["archive"]) == (
        "first",
        "ok",
        created["archive"],
    )
    ended = only(entries, "run_finished")
    assert (ended["exit_code"], ended["result"]) == (0, "ok")
    assert any(entry["level"] == "debug" for entry in entries)


def test_with_json_errors_and_other_commands_are_objects_too(site: Site) -> None:
    wrong = with_target_secrets(site.environment, "first", secret_access_key="wrong")
    entries = events(run_backup({**wrong, "LOG_FORMAT": "json"}).expect(2))
    error = next(entry for entry in entries if entry["level"] == "error")
    assert (error["about"], error["target"]) == ("target-first", "first")
    assert "SignatureDoesNotMatch" in error["message"]
    assert only(entries, "run_finished")["exit_code"] == 2
    for code, arguments, variables in (
        (78, (), {"SOURCE_PATH": "", "AUDIT": "maybe"}),
        (78, ("rum",), {}),
        (0, ("check-config",), {}),
        (0, ("mount", "target-first"), {}),
        (0, ("umount", "target-first"), {}),
    ):
        # What keeps a mount has warnings of its own.
        processes = 2 if "mount" in arguments else 1
        assert events(site.run(*arguments, **variables, LOG_FORMAT="json").expect(code), processes)


def test_a_wrong_log_format_is_told_as_text(site: Site) -> None:
    result = site.run(LOG_FORMAT="xml").expect(78)
    assert any(
        line.endswith("[configuration] error: LOG_FORMAT: write text or json") for line in result.lines
    )


def test_json_holds_only_characters_that_every_reader_takes(capsys: pytest.CaptureFixture[str]) -> None:
    backup.Console(False, True, "1").info("target-x", "a\n\udcff\x1b", n=1)
    [line] = capsys.readouterr().out.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "a\n\\udcff\x1b"
    assert [entry[name] for name in ("level", "run_id", "about", "target", "n")] == [
        "info",
        "1",
        "target-x",
        "x",
        1,
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])


def test_json_on_a_terminal_is_json_and_nothing_else() -> None:
    script = (
        "import backup\n"
        "console = backup.Console(False, True, 'run')\n"
        "console.progress('a', 'far')\n"
        "console.info('a', 'well')\n"
        "console.warning('a', 'hm')\n"
        "console.error('a', 'no')\n"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", script]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(BACKUP.parent)}
    with subprocess.Popen(command, env=variables, stdout=theirs, stderr=theirs) as process:
        assert process.wait(30) == 0
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert [json.loads(line)["level"] for line in shown.splitlines()] == ["info", "warning", "error"]


# ---------------------------------------------------------------------------------------------------- Metrics

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'


def unescaped(value: str) -> str:
    """A label's value as it was before it was written."""
    return re.sub(r"\\.", lambda found: {"n": "\n"}.get(found[0][1], found[0][1]), value)


def parse_metrics(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The samples of a text in Prometheus' format, which must be correct and have HELP and TYPE first."""
    assert text.endswith("\n")
    known: dict[str, set[str]] = {}
    samples = {}
    for line in text.removesuffix("\n").split("\n"):
        if comment := re.fullmatch(rf"# (HELP|TYPE) ({NAME}) (.+)", line):
            seen = known.setdefault(comment[2], set())
            assert comment[1] not in seen, line
            assert comment[1] == "HELP" or comment[3] == "gauge", line
            seen.add(comment[1])
            continue
        sample = re.fullmatch(rf"({NAME})\{{({LABEL}(?:,{LABEL})*)\}} (\S+)", line)
        assert sample, line
        assert known[sample[1]] == {"HELP", "TYPE"}, line
        labels = tuple((name, unescaped(value)) for name, value in re.findall(LABEL, sample[2]))
        assert (sample[1], labels) not in samples, line
        samples[sample[1], labels] = float(line.rpartition(" ")[2])
    return samples


def target_values(text: str, label: str = "backup", target: str = "first") -> dict[str, float]:
    """The samples of one target, by what comes after `s3borgbackup_`."""
    labels = (("label", label), ("target", target))
    return {
        name.removeprefix("s3borgbackup_"): value
        for (name, its), value in parse_metrics(text).items()
        if its == labels
    }


def run_values(text: str) -> dict[str, float]:
    """The samples of the run as a whole."""
    return {
        name.removeprefix("s3borgbackup_"): value
        for (name, its), value in parse_metrics(text).items()
        if its == (("label", "backup"),)
    }


def test_metrics_tell_of_the_last_run_and_of_the_last_success(site: Site) -> None:
    before = time.time()
    site.run().expect(0)
    text = site.metrics_file.read_text(encoding="utf-8")
    good, run = target_values(text), run_values(text)
    assert (
        before - 1
        < good["last_success_timestamp_seconds"]
        == good["last_run_timestamp_seconds"]
        < time.time() + 1
    )
    assert (good["last_run_exit_code"], good["last_archive_objects"], good["last_archive_bytes"]) == (
        0,
        10,
        1000,
    )
    assert good["last_archive_new_bytes"] > 0
    assert 0 < good["last_run_duration_seconds"] < run["run_duration_seconds"]
    assert site.metrics_file.stat().st_mode & 0o044 == 0o044, "node_exporter is another user"

    wrong = with_target_secrets(site.environment, "first", borg_passphrase="wrong")
    run_backup(wrong).expect(2)
    failed = target_values(site.metrics_file.read_text(encoding="utf-8"))
    assert failed["last_run_exit_code"] == 2
    assert failed["last_run_timestamp_seconds"] > good["last_run_timestamp_seconds"]
    for name in ("last_success_timestamp_seconds", "last_archive_objects", "last_archive_bytes"):
        assert failed[name] == good[name]

    site.run(TARGETS="{").expect(78)
    text = site.metrics_file.read_text(encoding="utf-8")
    assert target_values(text) == failed
    assert run_values(text)["run_exit_code"] == 78
    assert [path.name for path in site.metrics_file.parent.iterdir()] == [site.metrics_file.name]


def test_metrics_that_cannot_be_written_are_a_warning(site: Site) -> None:
    result = site.run(METRICS_FILE=str(site.folder / "missing" / "x.prom")).expect(0)
    assert any(
        "warning" in line and "METRICS_FILE" in line and "No such file" in line for line in result.lines
    )


def report(*targets: Mapping[str, Any], label: str = "backup", configured: tuple[str, ...]) -> backup.Report:
    """A report of a run that is over."""
    return backup.Report("id", label, datetime.now(UTC), [dict(target) for target in targets], "", configured)


def result_of(name: str, **changes: Any) -> dict[str, Any]:
    """How a target went."""
    numbers = {"objects": 1, "bytes": 2, "new_bytes": 3, "seconds": 4.5}
    return {"name": name, "result": "ok", "reason": "", "archive": "a", **numbers, **changes}


def test_metrics_keep_targets_that_were_not_their_turn_and_forget_those_that_are_gone() -> None:
    now = datetime.now(UTC)
    names = ("one", "two", "gone")
    text = backup.metrics_text(report(*map(result_of, names), configured=names), 0, now, "")
    again = report(result_of("two", result="failed", archive="", objects=0), configured=("one", "two"))
    text = backup.metrics_text(again, 2, now, text)
    assert target_values(text, target="one")["last_run_exit_code"] == 0
    assert target_values(text, target="two")["last_run_exit_code"] == 2
    assert target_values(text, target="two")["last_archive_objects"] == 1
    assert target_values(text, target="gone") == {}


@pytest.mark.parametrize("name", ['quote"', "back\\slash", "line\nfeed", 'all\\"\n} 5', "ü", "a,b={}"])
def test_metrics_take_any_name_and_find_it_again(name: str) -> None:
    now = datetime.now(UTC)
    text = backup.metrics_text(report(result_of(name), label=name, configured=(name,)), 0, now, "")
    good = target_values(text, name, name)
    assert good["last_archive_bytes"] == 2
    failed = report(result_of(name, result="failed", archive=""), label=name, configured=(name,))
    text = backup.metrics_text(failed, 2, now, text)
    assert target_values(text, name, name) == {**good, "last_run_exit_code": 2}


def test_a_file_of_somebody_else_does_no_harm(tmp_path: Path) -> None:
    now, path = datetime.now(UTC), tmp_path / "x.prom"
    told = report(configured=())
    for content in (b"", b"nonsense\n\xff", b's3borgbackup_run_exit_code{label="other"} NaN\n'):
        path.write_bytes(content)
        backup.write_metrics(path, told, 0, now)
        assert path.read_text(encoding="utf-8") == backup.metrics_text(told, 0, now, "")


def test_who_reads_the_metrics_finds_the_old_or_the_new_ones_whole(tmp_path: Path) -> None:
    path, over, seen = tmp_path / "x.prom", threading.Event(), []
    texts = [f"{letter * 500_000}\n" for letter in "ab"]
    backup.replace_file(path, texts[0])

    def read() -> None:
        while not over.is_set():
            seen.append(path.read_text(encoding="utf-8"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        backup.replace_file(path, texts[number % 2])
    over.set()
    reader.join()
    assert len(seen) > 1
    assert set(seen) <= set(texts)
    assert os.listdir(tmp_path) == ["x.prom"]


# ---------------------------------------------------------------------------- Archives that lost many objects


@pytest.mark.parametrize(
    ("objects", "last", "percent", "shrunk"),
    [
        (49, 100, 50, True),
        (50, 100, 50, False),
        (100, 100, 50, False),
        (1000, 100, 50, False),
        (89, 100, 10, True),
        (90, 100, 10, False),
        (1, 100, 99, False),
        (1, 101, 99, True),
        (1, 100, 0, False),
        (0, 100, 50, False),
        (5, 0, 50, False),
    ],
)
def test_how_many_objects_may_go_before_it_is_suspicious(
    objects: int, last: int, percent: int, shrunk: bool
) -> None:
    assert backup.has_shrunk(objects, last, percent) is shrunk


def forget_cache(site: Site) -> None:
    """The next run finds neither `/cache` nor `/config`."""
    for name in ("cache", "config"):
        (site.folder / name).rename(site.folder / f"{name}-lost")
        (site.folder / name).mkdir()


def forget_count(site: Site) -> None:
    """The next run finds `/cache` as a version that had no catalog has left it."""
    shutil.rmtree(site.folder / "cache" / "s3borgbackup")


@pytest.mark.long
@pytest.mark.parametrize("forget", [None, forget_cache, forget_count])
def test_an_archive_that_lost_most_objects_warns_once_and_pushes_none_out(
    site: Site, forget: Callable[[Site], None] | None
) -> None:
    """With the volumes, without them, and on the first run of a version that knows of this."""
    site.run().expect(0)
    site.source.delete(*(f"folder/{number}" for number in range(6)))
    if forget:
        forget(site)
    site.receiver.heard.clear()
    result = site.run().expect(1)
    words = (
        f"the archive has 4 objects, the one before it 10: is {site.source.name} what you want to back up?"
    )
    assert any("[target-first] warning: " in line and words in line for line in result.lines)
    assert b"nothing was pruned" in heard_by(site, "/ping/uuid?create=1").body
    assert words in heard_by(site, "/hook").json["targets"][0]["reason"]
    assert len(Repository.download(site.target, site.folder / "both").archives()) == 2

    assert "the one before it" not in site.run().expect(0).output
    assert len(Repository.download(site.target, site.folder / "one").archives()) == 1


@pytest.mark.long
def test_the_warning_comes_again_when_the_run_that_gave_it_did_not_reach_its_end(site: Site) -> None:
    site.run(LEASE_TTL="10").expect(0)
    site.source.delete(*(f"folder/{number}" for number in range(6)))
    with Backup({**site.environment, "LEASE_TTL": "10"}) as run:
        run.wait_for_line("the one before it 10")
        run.send_signal(signal.SIGKILL)
        run.wait(10).expect(128 + signal.SIGKILL)
    assert "the one before it 10" in site.run(LEASE_TTL="10").expect(1).output


@pytest.mark.long
def test_the_comparison_can_be_turned_off_and_is_by_label(site: Site) -> None:
    site.run().expect(0)
    site.source.delete(*(f"folder/{number}" for number in range(6)))
    site.run(BACKUP_LABEL="other").expect(0)
    forget_count(site)
    site.run(SHRINK_WARNING="0").expect(0)
    assert len(Repository.download(site.target, site.folder / "copy").archives()) == 2
