"""A Docker engine for the tests: the one that runs, or one of our own where none does.

`python docker_client.py COMMAND...` runs a command with such an engine in its environment, and ends ours
afterwards.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from helpers import mounts_below
from servers import terminate_with_parent

START_SECONDS = 60
STOP_SECONDS = 30
# What one build of TigrisFS leaves in the cache is more than the default keeps.
ENGINE_SETTINGS = {"builder": {"gc": {"enabled": True, "defaultKeepStorage": "10GB"}}}
CACHE = Path(os.environ["S3BORGBACKUP_CACHE"])


class NoEngine(Exception):
    """Why there is no Docker engine here."""


@dataclass(frozen=True)
class BaseImages:
    """What the Dockerfile builds on."""

    python: str
    golang: str
    alpine: str
    are_genuine: bool

    @property
    def build_arguments(self) -> tuple[str, ...]:
        """For `docker build`."""
        return ("--build-arg", f"PYTHON_IMAGE={self.python}", "--build-arg", f"GO_IMAGE={self.golang}")


@dataclass(frozen=True)
class Docker:
    """The client of an engine."""

    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))

    def __call__(self, *arguments: str | Path, stdin: IO[bytes] | int | None = subprocess.DEVNULL) -> str:
        """The output of `docker ARGUMENTS`; AssertionError with all that it says unless it ends with 0."""
        done = subprocess.run(
            ["docker", *arguments], env=dict(self.environment), stdin=stdin, capture_output=True, text=True
        )
        assert done.returncode == 0, f"docker {arguments} ended with {done.returncode}:\n{done.stderr}"
        return done.stdout.strip()

    def succeeds(self, *arguments: str) -> bool:
        """Whether `docker ARGUMENTS` ends with 0."""
        command = ["docker", *arguments]
        return not subprocess.run(command, env=dict(self.environment), capture_output=True).returncode

    def has_image(self, name: str) -> bool:
        """Whether the engine has an image."""
        return self.succeeds("image", "inspect", name)


# ------------------------------------------------------------------------------------------------- The engine


@contextlib.contextmanager
def engine() -> Iterator[Docker]:
    """The engine that answers here, or one that is started for as long as the block lasts.

    Ours has no bridge and touches no firewall: containers use the host's network or none. Raises NoEngine.
    """
    running = Docker()
    if shutil.which("docker") and running.succeeds("version"):
        yield running
        return
    if os.geteuid() or not shutil.which("dockerd"):
        raise NoEngine(
            "no Docker engine runs, and to start one takes root and dockerd (tests/setup container)"
        )
    with (
        (CACHE / "docker.lock").open("w") as lock,
        tempfile.TemporaryDirectory(prefix="s3borgbackup-docker-") as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # two engines must not share one folder for their images
        with started(Path(folder)) as docker:
            yield docker


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Docker]:
    """An engine of our own, whose images outlive it. Raises NoEngine when it does not start."""
    socket, log = folder / "docker.sock", folder / "dockerd.log"
    (folder / "daemon.json").write_text(json.dumps(ENGINE_SETTINGS))
    command = [
        *("dockerd", "--data-root", CACHE / "docker-data", "--exec-root", folder / "exec"),
        *("--config-file", folder / "daemon.json", "--pidfile", folder / "pid", "--host", f"unix://{socket}"),
        *("--bridge", "none", "--iptables=false", "--ip-forward=false"),
    ]
    docker = Docker({**os.environ, **client_environment(folder), "DOCKER_HOST": f"unix://{socket}"})
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=terminate_with_parent,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not docker.succeeds("version"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoEngine(f"dockerd does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield docker
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.wait()
        for mount_point in mounts_below(folder):  # the network namespaces that it leaves
            subprocess.run(["umount", "--lazy", mount_point], check=False)


def client_environment(folder: Path) -> dict[str, str]:
    """What makes `docker` the one that came with dockerd: it knows BuildKit without a plugin."""
    (folder / "bin").mkdir()
    (folder / "bin/docker").symlink_to("/usr/bin/docker")
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}", "DOCKER_BUILDKIT": "1"}


def main(command: list[str]) -> int:
    """Runs a command with an engine; without one, too: its tests say that they are skipped."""
    os.environ.pop("PYTHONPATH", None)  # it was for us
    try:
        with engine() as docker:
            environment = {**docker.environment, "DOCKER_CONFIG": str(CACHE / "docker")}
            return subprocess.run(command, env=environment).returncode
    except NoEngine as reason:
        return subprocess.run(command, env={**os.environ, "S3BORGBACKUP_NO_ENGINE": str(reason)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
