"""What `distill doctor` says: a line about one thing each, with its fix if something is wrong."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import metadata

from distill_cli.config.credentials import without_credentials

TIMEOUT_S = 4.0
"""How long a server may take to answer."""


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = True
    """False where runs of this machine may do without it: a warning."""

    @property
    def word(self) -> str:
        return "ok  " if self.ok else "FAIL" if self.needed else "warn"


def find_package(name: str, package: str, *, fix: str) -> Finding:
    """Return the installed version of a distribution."""
    try:
        return Finding(name, True, metadata.version(package))
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", fix)


def unreachable(address: str) -> str | None:
    """Return why a server does not answer; None if it does, with whatever status."""
    user_free = without_credentials(address)
    try:
        urllib.request.urlopen(urllib.request.Request(user_free, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"does not answer ({getattr(error, 'reason', error)})"
    return None
