"""The image itself: what is in it, what it gets along without, and how it behaves as process 1."""

import dataclasses
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from container_site import Container, Site, build, wrapped
from docker_client import BaseImages, Docker
from helpers import Bucket, sample_objects, wait_until
from readme import README, TOP
from servers import SeaweedFS

OBJECTS = sample_objects(8, 40)
# The least that a mount takes, and nothing that can be written to but volumes.
BARE = re.findall("`(--read-only .*?)`", README)[0].split()
ELF_MACHINES = {"amd64": 62, "arm64": 183}  # e_machine of <elf.h>


@pytest.fixture
def configured(site: Site, source: Bucket, target: Bucket) -> Site:
    """One source, one target."""
    source.put(OBJECTS)
    site.configure(source, {"first": {"path": target.name, "prune": "--keep-last=2"}})
    return site


def test_what_is_in_the_image_by_size(
    docker: Docker, bases: BaseImages, image: str, record_property: Callable[[str, object], None]
) -> None:
    """For the report; and nothing is in it that only builds something."""
    kind = "real base images" if bases.are_genuine else "stand-ins for the base images"
    record_property("image", f"built on {kind}: {bases.python}, {bases.golang}")
    for line in docker("history", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines():
        size, _, command = line.partition("\t")
        if size != "0B":
            record_property("image", f"layer    {size:>8}  {' '.join(command.split())[:90]}")
    told = run_in(docker, image, "apk info --size $(apk info)")
    packages = dict(re.findall(r"^(\S+)-[^-\s]+-r\d+ installed size:\n(.+)$", told, re.MULTILINE))
    for name, size in packages.items():
        record_property("image", f"package  {size:>8}  {name}")
    paths = "/usr/local/bin/tigrisfs /usr/local/bin/backup.py /usr/local/lib"
    for line in run_in(docker, image, f"du -sh {paths}").splitlines():
        size, path = line.split("\t")
        record_property("image", f"path     {size:>8}  {path}")
    assert {"borgbackup", "fuse3", "busybox"} <= packages.keys()
    assert not {"gcc", "g++", "make", "go", "git", "build-base"} & packages.keys()
    assert run_in(docker, image, "find /var/cache/apk /root /tmp -type f") == ""


def run_in(docker: Docker, image: str, script: str) -> str:
    """The output of a shell script in the image."""
    return docker("run", "--rm", "--network", "none", "--entrypoint", "ash", image, "-euc", script)


def test_the_image_says_how_it_is_used(docker: Docker, image: str) -> None:
    told = docker(
        "image",
        "inspect",
        "--format",
        "{{json .Config.Healthcheck}} {{.Config.Entrypoint}} {{.Config.Volumes}}",
        image,
    )
    assert told == '{"Test":["NONE"]} [/usr/local/bin/backup.py] map[/cache:{} /config:{} /data:{}]'


def test_a_change_of_the_program_changes_the_last_layer_only(
    docker: Docker, bases: BaseImages, image: str, tmp_path: Path
) -> None:
    """So that an update is a small download."""
    context = tmp_path / "context"
    context.mkdir()
    for name in ("Dockerfile", ".dockerignore", "backup.py"):
        shutil.copy(TOP / name, context)
    with (context / "backup.py").open("a") as program:
        program.write("# changed\n")
    changed = f"{image}-changed"
    client = wrapped(docker, tmp_path / "bin", image, bases.build_arguments)
    client("build", "-t", changed, context)
    layers = [layers_of(docker, name) for name in (image, changed)]
    docker("image", "rm", changed)
    assert layers[0][:-1] == layers[1][:-1]
    assert layers[0][-1] != layers[1][-1]


def layers_of(docker: Docker, image: str) -> list[str]:
    """The digests of an image's layers."""
    return docker("image", "inspect", "--format", '{{join .RootFS.Layers " "}}', image).split()


@pytest.mark.long
@pytest.mark.timeout(900)  # a compiler's work, of two minutes where nobody else works
def test_tigrisfs_is_built_for_the_platform_that_is_asked_for(
    docker: Docker, bases: BaseImages, image: str, tmp_path: Path
) -> None:
    """By a compiler that runs on this machine's: arm64 takes no emulation."""
    client = wrapped(docker, tmp_path / "bin", image, bases.build_arguments)
    tag = f"{image}-arm64"
    client("build", "--platform", "linux/arm64", "--target", "tigrisfs", "-t", tag, TOP)
    container = docker("create", tag, "true")
    docker("cp", f"{container}:/build/tigrisfs", tmp_path / "tigrisfs")
    docker("rm", container)
    docker("image", "rm", tag)
    with (tmp_path / "tigrisfs").open("rb") as program:
        assert struct.unpack_from("<H", program.read(20), 18)[0] == ELF_MACHINES["arm64"]


def test_borgs_python_is_enough_where_the_base_has_none(
    docker: Docker,
    bases: BaseImages,
    image: str,
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
) -> None:
    """The smaller image that the README tells how to build."""
    smaller = f"{image}-smaller"
    build(docker, dataclasses.replace(bases, python=bases.alpine), smaller, tmp_path / "build")
    source.put(OBJECTS)
    with Site.opened(docker, smaller, server, tmp_path / "person") as site:
        site.configure(source, {"first": target.name})
        site.run().expect(0)
    sizes = [int(docker("image", "inspect", "--format", "{{.Size}}", name)) for name in (smaller, image)]
    docker("image", "rm", smaller)
    assert bases.python == bases.alpine or sizes[0] < sizes[1] - 10_000_000


def test_it_works_with_next_to_no_privileges_on_a_read_only_root(configured: Site) -> None:
    """New and later runs, pruned and compacted."""
    for _ in range(2):
        assert "everything is uploaded" in configured.run(*BARE).expect(0).output


# ----------------------------------------------------------------------------------------------- As process 1


def sleepers(container: Container) -> str:
    """The processes that are or were a `sleep`; `docker top` does not show those that are dead."""
    return container.docker(
        "exec", container.name, "ash", "-c", "cat /proc/[0-9]*/stat | grep '(sleep)' || true"
    )


def test_an_orphan_does_not_stay_as_a_zombie(configured: Site, server: SeaweedFS) -> None:
    """Process 1 inherits it, and is the only one that can bury it."""
    server.pause()
    try:
        container = configured.start()
        container.wait_for_line("backup of")
        container.docker("exec", container.name, "ash", "-c", "sleep 3 & exit 0")
        wait_until(lambda: sleepers(container), 5, "the orphan runs")
        wait_until(lambda: not sleepers(container), 10, "the orphan is buried")
    finally:
        server.resume()
    assert container.wait().exit_code in (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--version"], 0), (["mout"], 78), (["ash", "-c", "exit 3"], 3), (["ash", "-c", "kill -9 $$"], 137)],
)
def test_the_containers_exit_code_is_the_programs(site: Site, arguments: list[str], code: int) -> None:
    """A shell's, too, which is a child of process 1, and can be killed."""
    site.shell(f"docker run --rm s3borgbackup {' '.join(repr(word) for word in arguments)}").expect(code)


def test_a_failed_run_ends_the_container_with_2(configured: Site) -> None:
    configured.edit({"SOURCE_PATH": "there-is-no-such-bucket"})
    assert re.search("source .*NoSuchBucket", configured.run().expect(2).output)
