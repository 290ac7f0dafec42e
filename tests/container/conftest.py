"""The image, built once as the README says, and a person's folder for each test."""

import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_site import Site, build
from docker_client import CACHE, BaseImages, Docker
from helpers import skip_or_fail
from servers import SeaweedFS
from standin import standins

ENGINE_PROBLEM = "S3BORGBACKUP_NO_ENGINE"


@pytest.fixture(scope="session")
def docker() -> Docker:
    """The engine that tests/run provides."""
    client = Docker()
    if reason := os.environ.get(ENGINE_PROBLEM):
        skip_or_fail(f"no Docker: {reason}")
    if not client.succeeds("version"):
        skip_or_fail("no Docker engine answers here")
    return client


@pytest.fixture(scope="session")
def bases(docker: Docker) -> BaseImages:
    """What to build on: what PYTHON_IMAGE and GO_IMAGE name; else the real images, or stand-ins."""
    named = {name: os.environ[name] for name in ("PYTHON_IMAGE", "GO_IMAGE") if os.environ.get(name)}
    images = {"PYTHON_IMAGE": "python:3-alpine", "GO_IMAGE": "golang:1-alpine"} | named
    absent = [name for name, image in images.items() if not is_obtainable(docker, image)]
    if not absent:
        return BaseImages(images["PYTHON_IMAGE"], images["GO_IMAGE"], "alpine:latest", are_genuine=True)
    for name in named.keys() & absent:
        pytest.fail(f"{name}={named[name]} can neither be pulled, nor is it here")
    try:
        return standins(docker, CACHE)
    except Exception as error:
        skip_or_fail(f"no base images: none can be pulled, and no stand-ins can be made here: {error}")
        raise


def is_obtainable(docker: Docker, image: str) -> bool:
    """Whether an image can be pulled, or is on this machine already."""
    return docker.succeeds("pull", "--quiet", image) or docker.succeeds("image", "inspect", image)


@pytest.fixture(scope="session")
def image(docker: Docker, bases: BaseImages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image's name, which no image of the machine's owner has."""
    name = f"s3borgbackup-test-{uuid.uuid4().hex[:8]}"
    with (CACHE / "build.lock").open("w") as lock:  # who comes second finds all layers made
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(docker, bases, name, tmp_path_factory.mktemp("build"))
    yield name
    docker("image", "rm", "--force", name)


@pytest.fixture
def site(docker: Docker, image: str, server: SeaweedFS, tmp_path: Path) -> Iterator[Site]:
    """A folder with a shell in which the README's commands work; what they leave is removed at the end."""
    with Site.opened(docker, image, server, tmp_path) as opened:
        yield opened


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded: what the image is built on, and its size by part."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    lines = [text for report in reports for what, text in report.user_properties if what == "image"]
    if lines:
        terminalreporter.section("image")
        for line in lines:
            terminalreporter.line(line)
