"""A person's folder on a machine with Docker: an .env file, and a shell for the README's commands.

The commands run as they stand, in a shell with the function `s3bb`, but for three things: `s3borgbackup`
becomes the test's own image's name (and so do the volumes' names), containers share the host's network, where
the S3 server is, and the base images may be others.
"""

import contextlib
import re
import shlex
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pexpect

import backup
from docker_client import BaseImages, Docker
from helpers import Bucket, Result, settings, wait_until
from readme import ONE_SHOT, S3BB, TOP, shell_line
from servers import SeaweedFS

# `docker` as a person calls it, with what these tests add.
WRAPPER = """\
#!/bin/sh
command=$1
network="--network host"
case "$*" in *--network*) network= ;; esac
case $command in
    run) shift; set -- run $network --label {label} "$@" ;;
    build) shift; set -- build $network {build_arguments} "$@" ;;
esac
PATH=${{PATH#*:}} exec docker "$@"
"""
PROMPT = r"\r\n/\S* # "


def run_shell(script: str, folder: Path, docker: Docker, timeout_seconds: float) -> Result:
    """Runs a script as a person's shell would, with our `docker` first on the PATH."""
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=dict(docker.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
    )
    return Result(done.returncode, done.stdout.splitlines(), time.monotonic() - start)


def wrapped(docker: Docker, folder: Path, label: str, build_arguments: Sequence[str] = ()) -> Docker:
    """The client with the wrapper, which is put into `folder`, and labels the containers."""
    folder.mkdir(parents=True)
    program = folder / "docker"
    program.write_text(WRAPPER.format(label=label, build_arguments=shlex.join(build_arguments)))
    program.chmod(0o755)
    return Docker({**docker.environment, "PATH": f"{folder}:{docker.environment['PATH']}"})


def build(docker: Docker, bases: BaseImages, name: str, folder: Path) -> None:
    """Builds the image with the README's command."""
    command = shell_line("Quick start", "docker build").replace("s3borgbackup", name)
    client = wrapped(docker, folder / "bin", name, bases.build_arguments)
    run_shell(command, TOP, client, timeout_seconds=1200).expect(0)


@dataclass
class Site:
    """The folder, and the commands that work in it."""

    docker: Docker
    server: SeaweedFS
    folder: Path
    name: str  # what the image, the volumes and containers of this site are called

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, docker: Docker, image: str, server: SeaweedFS, folder: Path, build_arguments: Sequence[str] = ()
    ) -> Iterator[Self]:
        """The folder; at the end containers, volumes and the name are gone."""
        name = f"s3borgbackup-test-{uuid.uuid4().hex[:8]}"
        docker("tag", image, name)
        site = cls(wrapped(docker, folder / "bin", name, build_arguments), server, folder, name)
        try:
            yield site
        finally:
            site.clean()

    def clean(self) -> None:
        """Removes all that Docker has of this site."""
        if containers := self.docker("ps", "--all", "--quiet", "--filter", f"label={self.name}").split():
            self.docker("rm", "--force", "--volumes", *containers)
        if volumes := self.docker("volume", "ls", "--quiet", "--filter", f"name={self.name}").split():
            self.docker("volume", "rm", "--force", *volumes)
        self.docker("image", "rm", self.name)

    def configure(self, source: Bucket, targets: Mapping[str, str | Mapping[str, Any]], **more: str) -> None:
        """Writes .env as the README says: the example, copied and edited."""
        own = settings(self.server, self.folder / "unused", source.name, targets, **more)
        values = {name: value for name, value in own.items() if name in backup.VARIABLES}
        del values["DATA_DIR"]
        self.shell(f"cp {shlex.quote(str(TOP / 'example.env'))} .env").expect(0)
        self.edit(values)

    def edit(self, values: Mapping[str, str]) -> None:
        """Changes settings in .env, as an editor would."""
        path = self.folder / ".env"
        text = path.read_text(encoding="utf-8")
        for name, value in values.items():
            line = f"{name}={value}"
            text, found = re.subn(rf"^#?{name}=.*$", lambda _, line=line: line, text, flags=re.MULTILINE)
            text += "" if found else f"{line}\n"
        path.write_text(text, encoding="utf-8")

    def shell(self, script: str, timeout_seconds: float = 120) -> Result:
        """Runs a command of the README to its end, in a shell that knows `s3bb`."""
        typed = f"{S3BB}{script}".replace("s3borgbackup", self.name)
        return run_shell(typed, self.folder, self.docker, timeout_seconds)

    def run(self, *options: str, arguments: Sequence[str] = (), timeout_seconds: float = 120) -> Result:
        """Runs the one-shot command of the README with more options, or with arguments for backup.py."""
        return self.shell(with_options(ONE_SHOT, options, arguments), timeout_seconds)

    def run_without(self, left_out: str, *options: str) -> Result:
        """Runs the one-shot command of the README without a part of it, and with more options."""
        assert left_out in ONE_SHOT
        return self.shell(with_options(ONE_SHOT.replace(left_out, ""), options))

    def start(self, *options: str, arguments: Sequence[str] = ()) -> "Container":
        """Starts the one-shot command in the background; `--rm` is left out, so that its end can be seen."""
        number = uuid.uuid4().hex[:6]
        options = ("--name", f"s3borgbackup-{number}", "--detach", *options)
        self.shell(with_options(ONE_SHOT, options, arguments).replace(" --rm", "", 1)).expect(0)
        return Container(self.docker, f"{self.name}-{number}")

    @contextlib.contextmanager
    def terminal(self, command: str) -> Iterator["Terminal"]:
        """A person at a terminal who has typed a command that gives them a shell in the container."""
        script = f"{S3BB}{command}".replace("s3borgbackup", self.name)
        child = pexpect.spawn(
            "bash",
            ["-c", script],
            cwd=self.folder,
            env=dict(self.docker.environment),
            encoding="utf-8",
            timeout=60,
        )
        child.setwinsize(50, 200)
        try:
            child.expect("/data # ")
            yield Terminal(child)
            child.sendline("exit")
            child.expect(pexpect.EOF)
        finally:
            child.close(force=True)


def with_options(command: str, options: Sequence[str], arguments: Sequence[str] = ()) -> str:
    """A `docker run` command with more options before the image's name, and arguments behind it."""
    beginning, image = command.rstrip().rsplit(" ", 1)
    return f"{beginning} {shlex.join(options)} {image} {shlex.join(arguments)}"


@dataclass(frozen=True)
class Terminal:
    """An interactive shell in the container."""

    child: "pexpect.spawn[str]"

    def type(self, line: str, answers: Sequence[str] = ()) -> str:
        """Types a line, and answers to what it asks; returns what it prints. It has to succeed."""
        self.child.sendline(line)
        for answer in answers:
            time.sleep(0.5)  # `read -s` shows nothing that could be waited for
            self.child.sendline(answer)
        self.child.expect(PROMPT)
        output = self.child.before
        self.child.sendline("echo status=$?")
        self.child.expect(r"status=(\d+)")
        status = self.child.match[1]
        self.child.expect(PROMPT)
        assert status == "0", f"{line!r} ended with {status}:\n{output}"
        return output


@dataclass(frozen=True)
class Container:
    """A container that was started in the background."""

    docker: Docker
    name: str

    @property
    def output(self) -> str:
        """What it has printed up to now."""
        command = ["docker", "logs", self.name]
        done = subprocess.run(command, env=dict(self.docker.environment), capture_output=True, text=True)
        return done.stdout + done.stderr

    def inspect(self, template: str) -> str:
        """What `docker inspect` says of it."""
        return self.docker("inspect", "--format", template, self.name)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.inspect("{{.State.Running}}") == "true"

    def wait_for_line(self, text: str, timeout_seconds: float = 60) -> None:
        """Returns as soon as it has printed `text`."""

        def found() -> bool:
            running, output = self.is_running, self.output
            assert running or text in output, f"ended without {text!r}:\n{output}"
            return text in output

        wait_until(found, timeout_seconds, f"{text!r} from the container")

    def wait(self, timeout_seconds: float = 120) -> Result:
        """Waits for its end."""
        start = time.monotonic()
        try:
            wait_until(lambda: not self.is_running, timeout_seconds, f"the end of {self.name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None
        code = int(self.inspect("{{.State.ExitCode}}"))
        return Result(code, self.output.splitlines(), time.monotonic() - start)
