"""Stand-ins for those that lend AWS's keys, and stores that take only keys that hold at this moment.

What they answer is that of the documentation: "AssumeRoleWithWebIdentity" (AWS STS API Reference), "Container
credential provider" (AWS SDKs and Tools Reference Guide), "Retrieve security credentials from instance
metadata" and "Use the Instance Metadata Service" (Amazon EC2 User Guide).
"""

import base64
import http.server
import json
import os
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from faults.proxy import Action, FaultProxy, Request
from servers import WRITER

ROLE = "arn:aws:iam::123456789012:role/backup"
STS = "https://sts.amazonaws.com/doc/2011-06-15/"
ROLES = "/latest/meta-data/iam/security-credentials/"
KINDS = ("environment", "web identity", "ecs", "eks", "imds")
TOKEN = "x-amz-security-token"


@dataclass(frozen=True)
class Lent:
    """Keys that hold until then, of the clock."""

    until: float
    access_key_id: str = field(default_factory=lambda: f"ASIA{secrets.token_hex(8).upper()}")
    secret_access_key: str = field(default_factory=lambda: secrets.token_urlsafe(30))
    session_token: str = field(default_factory=lambda: base64.b64encode(os.urandom(300)).decode())

    @property
    def expiration(self) -> str:
        """As AWS writes it."""
        return f"{datetime.fromtimestamp(self.until, UTC):%Y-%m-%dT%H:%M:%SZ}"

    def accepts(self, request: Request) -> bool:
        """Whether it is signed with these, while they hold."""
        is_told = request.headers.get(TOKEN) == self.session_token
        return is_told and time.time() < self.until and request.is_signed_with(self.secret_access_key)


def lent_until(seconds: float) -> Lent:
    """Keys that hold for so long; AWS tells whole seconds."""
    return Lent(float(int(time.time() + seconds)))


class Platform:
    """Lends keys for `seconds` each in all the ways of AWS; a `with` block starts and ends it."""

    def __init__(self, folder: Path, seconds: float = 3600) -> None:
        """`folder` is for the files that AWS's variables name."""
        self.seconds, self.lent = seconds, dict[str, Lent]()
        self.fault: Callable[[http.server.BaseHTTPRequestHandler], None] | None = None
        self.asked: list[str] = []
        self._token, self._file = secrets.token_hex(16), folder / "token"
        self._file.write_text(f"{self._token}\n")
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def lend(self) -> Lent:
        """New keys."""
        new = lent_until(self.seconds)
        self.lent[new.access_key_id] = new
        return new

    def variables(self, kind: str) -> dict[str, str]:
        """What a container is given."""
        if kind == "environment":
            keys = self.lend()
            parts = keys.access_key_id, keys.secret_access_key, keys.session_token
            return dict(
                zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), parts, strict=True)
            )
        return {
            "web identity": {
                "AWS_WEB_IDENTITY_TOKEN_FILE": str(self._file),
                "AWS_ROLE_ARN": ROLE,
                "AWS_ENDPOINT_URL_STS": self.url,
            },
            "ecs": {
                "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.url}/ecs",
                "AWS_CONTAINER_AUTHORIZATION_TOKEN": self._token,
            },
            "eks": {
                "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.url}/eks?id=1",
                "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(self._file),
            },
            "imds": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url},
        }[kind]

    @property
    def secrets(self) -> set[str]:
        """What nobody may see."""
        parts = {part for each in self.lent.values() for part in (each.secret_access_key, each.session_token)}
        return {self._token, *parts}

    def accepts(self, request: Request) -> bool:
        """Whether a request is signed with keys that hold now."""
        parts = request.authorization
        keys = self.lent.get(parts[2]) if parts else None
        return bool(keys) and keys.accepts(request)

    def answer(self, method: str, path: str, headers: dict[str, str], body: str) -> tuple[int, str]:
        """Status and body."""
        query = dict(urllib.parse.parse_qsl(body))
        if method == "POST":
            keys = ("RoleArn", "WebIdentityToken", "Action", "Version")
            expected = (ROLE, self._token, "AssumeRoleWithWebIdentity", "2011-06-15")
            if tuple(map(query.get, keys)) != expected or not query.get("RoleSessionName"):
                return 400, sts_error("InvalidIdentityToken", "not that token")
            return 200, _sts_answer(self.lend())
        if path in ("/ecs", "/eks?id=1"):
            if headers.get("authorization") != self._token:
                return 401, '{"code": "401", "message": "no"}'
            if path != "/ecs":  # the next time another token is in its file
                self._token = secrets.token_hex(16)
                self._file.write_text(f"{self._token}\n")
            return 200, _document(self.lend())
        return self._instance(method, path, headers)

    def _instance(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if (method, path) == ("PUT", "/latest/api/token"):
            is_right = 0 < int(headers.get("x-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600
            return (200, self._token) if is_right else (400, "")
        if headers.get("x-aws-ec2-metadata-token") != self._token:
            return 401, ""
        answers = {ROLES: lambda: "backup-role", f"{ROLES}backup-role": lambda: _document(self.lend())}
        return (200, answers[path]()) if path in answers else (404, "")


def _handler(platform: Platform) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def _serve(self) -> None:
            platform.asked.append(self.path)
            if platform.fault:
                platform.fault(self)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply(self, *platform.answer(self.command, self.path, headers, body))

        do_GET = do_PUT = do_POST = _serve  # noqa: N815  # the names are http.server's

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def reply(handler: http.server.BaseHTTPRequestHandler, status: int, body: str) -> None:
    """The whole answer."""
    with suppress(OSError):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body.encode())))
        handler.end_headers()
        handler.wfile.write(body.encode())


def sts_error(code: str, message: str) -> str:
    """STS's error document."""
    error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
    return f'<ErrorResponse xmlns="{STS}">{error}<RequestId>1</RequestId></ErrorResponse>'


def _sts_answer(keys: Lent) -> str:
    parts = {
        "SessionToken": keys.session_token,
        "SecretAccessKey": keys.secret_access_key,
        "Expiration": keys.expiration,
        "AccessKeyId": keys.access_key_id,
    }
    inner = "".join(f"<{name}>{text}</{name}>" for name, text in parts.items())
    user = f"<AssumedRoleUser><Arn>{ROLE}</Arn></AssumedRoleUser>"
    result = f"{user}<Credentials>{inner}</Credentials><Provider>www.amazon.com</Provider>"
    name = "AssumeRoleWithWebIdentity"
    return f'<{name}Response xmlns="{STS}"><{name}Result>{result}</{name}Result></{name}Response>'


def _document(keys: Lent) -> str:
    return json.dumps(
        {
            "Code": "Success",
            "LastUpdated": "2026-01-01T00:00:00Z",
            "Type": "AWS-HMAC",
            "AccessKeyId": keys.access_key_id,
            "SecretAccessKey": keys.secret_access_key,
            "Token": keys.session_token,
            "Expiration": keys.expiration,
        }
    )


def guard(proxy: FaultProxy, accepts: Callable[[Request], bool], get_seconds: float = 0) -> None:
    """The server behind the proxy takes only what `accepts`, and tokens, which it does not know itself."""

    def without_token(request: Request) -> Request:
        if request.kind == "GET":
            time.sleep(get_seconds)
        return request.without(TOKEN).signed_by(WRITER.access_key_id)

    def is_refused(request: Request) -> bool:
        return bool(request.authorization) and not accepts(request)

    proxy.add(is_refused, Action.REFUSE, status=400, code="ExpiredToken")
    proxy.add(lambda request: bool(request.authorization), Action.REWRITE, rewrite=without_token)
