"""The type of a finding of `distill doctor`: one line, with a fix if something is wrong."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from distill_cli.config.credentials import without_credentials
from distill_cli.machine.hardware import installed_version

TIMEOUT_S = 4.0
"""How long a server may take to answer."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = True
    """False if runs on this machine may work without it: a failure is a warning."""


def find_package(name: str, package: str, *, fix: str) -> Finding:
    """Return the finding of a distribution's installed version."""
    version = installed_version(package)
    return Finding(name, version is not None, version or "not installed", "" if version else fix)


def optional_package(extra: str) -> Finding:
    """Return the finding of the package that an extra of the same name installs."""
    version = installed_version(extra)
    return Finding(extra, True, version or f"not installed, and not needed but for tracker={extra}", needed=False)


def missing_extra(extra: str) -> Iterator[str]:
    """Yield what to do if the package is missing that an extra of the same name installs."""
    if installed_version(extra) is None:
        yield f'enabled: the package {extra} is not installed; pip install "distill-cli[{extra}]"'


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
