"""Find out which kind of server answers at an address: `distill serve` or `vllm serve`. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_cli.engines.replicas import Replicas
from distill_cli.engines.server_client import OtherKind, check_addresses
from distill_cli.engines.server_info import KINDS, ServerKind
from distill_cli.errors import ConfigError


async def recognise(addresses: Sequence[str], *, certificate: Path | str | None, patience_s: float) -> ServerKind[Any]:
    """Return the kind of the servers at some addresses, by the first that answers.

    Raises:
        ConfigError: something else answers there, refuses the token, or the token would travel in the clear.
        TeacherLost: none answered within `patience_s`.
    """
    problems = list[str]()
    options: dict[str, Any] = {"certificate": certificate, "client": "recognise", "in_flight": 1}
    for kind in KINDS:
        checked = check_addresses(addresses, kind)
        servers = Replicas(checked, kind=kind, patience_s=patience_s, probe_s=patience_s, **options)
        try:
            await servers.info()
            return kind
        except OtherKind as error:
            problems += error.problems
        finally:
            await servers.close()
    raise ConfigError(problems[0])
