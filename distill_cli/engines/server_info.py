"""The description of a scoring server: `GET /info`. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_cli.engines.wire import API, PRODUCT


@dataclass(frozen=True)
class ServerInfo:
    """A scoring server: its model and its limits."""

    version: str
    """Of the package."""
    path: str
    """The model, as it was given to the server: a folder or a name on the hub."""
    revision: str | None
    digest: str
    """Hash of the weights (`model_files.fingerprint`)."""
    dtype: str
    quantization: str | None
    vocab_size: int
    """Ids that may be scored."""
    eos_ids: tuple[int, ...]
    max_model_len: int
    """Tokens of the longest sequence that can be scored; a prompt to answer must be shorter."""
    max_topk: int
    chat_template: str | None
    special_tokens: Mapping[str, str]
    num_engines: int
    max_queued_tokens: int
    """Tokens that may wait; a request with more is refused."""
    max_answer_bytes: int
    """Size of the largest answer; a request with a larger one is refused."""
    product: str = PRODUCT
    api: int = API

    @property
    def identity(self) -> tuple[str, str, str | None]:
        """What the scores depend on: digest, dtype and quantization."""
        return self.digest, self.dtype, self.quantization

    @property
    def name(self) -> str:
        """The model in one phrase, for messages."""
        at = f"@{self.revision}" if self.revision else ""
        how = ", ".join(filter(None, (self.dtype, self.quantization, f"digest {self.digest[:12]}")))
        return f"{self.path}{at} ({how})"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, content: Any) -> ServerInfo:
        """Return the info in JSON that was read. Raises ValueError, with what is wrong, if it is something else.

        Fields that this version does not know are left out.
        """
        if not isinstance(content, dict) or content.get("product") != PRODUCT:
            raise ValueError("not a scoring server of distill")
        if content.get("api") != API:
            raise ValueError(f"a scoring server with API {content.get('api')!r:.20}, and this client has {API}")
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in content.items() if name in known}
        try:
            info = cls(**given)
            numbers = info.vocab_size, info.max_model_len, info.max_topk, info.max_queued_tokens, info.max_answer_bytes
            if not all(isinstance(value, int) for value in numbers) or not isinstance(info.digest, str):
                raise TypeError("a value has another type")
            return dataclasses.replace(info, eos_ids=tuple(info.eos_ids))
        except TypeError as error:
            raise ValueError(f"a scoring server whose info cannot be read ({error})") from error
