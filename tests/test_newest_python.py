"""The image's Python moves on by itself: every command works on the newest one that Debian has, too."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import BACKUP, PASSPHRASE, Bucket, sample_objects, settings, skip_or_fail, tree
from servers import WRITER, SeaweedFS

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("needs_fuse")]

# In a mount namespace of its own, so that nothing of it outlives the story.
STORY = """
set -eu
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
exec chroot "$ROOT" sh -eux -c '
    python3 --version
    backup() { python3 -X dev -W error::DeprecationWarning /work/backup.py "$@"; }
    backup check-config
    backup
    backup run first
    backup list --json
    backup info
    backup verify first --sample all
    backup check first --verify-data
    backup check first --max-duration 5s
    backup maintain
    backup key-export first
    backup borg first list
    backup restore first --to /work/restored --metadata /work/metadata --overwrite
    backup restore first "with space.txt" --to-bucket "$RESTORED"
    backup restore --to-bucket "$RESTORED" first
    backup mount source
    backup mount target-first
    BORG_RELOCATED_REPO_ACCESS_IS_OK=yes borg list "$DATA_DIR/target-first"
    backup umount
    ! backup restore first --to
    ! backup check first --max-duration 5s --verify-data
    backup run --help
'
"""


@pytest.mark.timeout(600)
def test_every_command_works_on_the_newest_python(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """With Debian's own borg, in development mode: a warning would be an error of ours."""
    root = Path(os.environ.get("S3BORGBACKUP_CACHE", ""), "newest")
    if not (root / "stamp").exists():
        skip_or_fail("no Debian with the newest Python is here; `tests/setup long` installs it, as root")
    objects = sample_objects(9, 60)
    source.put(objects)
    restored = new_bucket("restored")
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copy(BACKUP, work)
    shutil.copy(str(shutil.which("tigrisfs")), root / "usr/bin/tigrisfs")
    environment = settings(server, tmp_path, source.name, {"first": target.name})
    environment |= {
        **dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TMPDIR"), "/tmp"),
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "DATA_DIR": "/work/data",
        "RESTORED": restored.name,
        "ROOT": str(root),
        "BORG_PASSPHRASE": PASSPHRASE,
        "RESTORE_ACCESS_KEY_ID": WRITER.access_key_id,
        "RESTORE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
    }
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", STORY],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning: " not in done.stderr
    assert tree(work / "restored") == objects
    assert restored.contents() == objects
