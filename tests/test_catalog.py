"""The catalog: objects in an SQLite file, and what of them a mount can show."""

import contextlib
from datetime import UTC, datetime
from pathlib import Path

import backup

NOW = datetime(2026, 1, 31, 3, tzinfo=UTC)


def test_an_object_with_others_below_its_name_is_hidden_by_them(tmp_path: Path) -> None:
    shown = ["a/b", "a b", "a-", "b0", "c/", "c/d", "é/x", "deep/er/still", "f\udcff/g"]
    hidden = ["a", "é", "deep/er", "f\udcff"]
    with contextlib.closing(backup.Catalog(tmp_path / "catalog")) as catalog:
        catalog.add(backup.S3Object(key, 1, NOW) for key in shown + hidden)
        catalog.hide([])
        assert [each.key for each in catalog.rows("NOT is_shown")] == sorted(hidden, key=backup.encode_key)
