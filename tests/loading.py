"""Parts of backup.py, made as it makes them."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import backup


def load_settings(
    environ: Mapping[str, str], needs_source: bool = True, bucket: tuple[str, str] | None = None
) -> backup.Settings:
    """The settings that `environ` and the files it points to describe; raises ConfigurationError."""
    return backup.Configuration(environ).settings(needs_source, bucket)


def mount_of_folder(store: backup.Store, folder: Path) -> backup.Mount:
    """A folder that passes for a mount of `store`, and this process for its tigrisfs."""
    runtime = SimpleNamespace(stop=backup.Stop(), settings=SimpleNamespace(stall_seconds=900))
    log, child = backup.TigrisLog(store.name, backup.Console(debug=False)), SimpleNamespace(pid=os.getpid())
    mount = backup.Mount(runtime, store, folder, child, log, backup.S3Client(store))
    mount.check = lambda: None
    return mount
