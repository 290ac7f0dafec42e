"""backup.py's configuration, loaded as it does it at its start."""

from collections.abc import Mapping

import backup


def load_settings(environ: Mapping[str, str], needs_source: bool = True) -> backup.Settings:
    """The settings that `environ` and the files it points to describe; raises ConfigurationError."""
    return backup.Configuration(environ).settings(needs_source)
