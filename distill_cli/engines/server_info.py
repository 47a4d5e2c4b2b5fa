"""The kinds of servers that a teacher may be behind, and what each says of itself. No torch.

| kind      | started with    | says who it is at |
|-----------|-----------------|-------------------|
| `DISTILL` | `distill serve` | `GET /info`       |
| `VLLM`    | `vllm serve`    | `GET /v1/models`  |
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from distill_cli.engines.wire import API, PRODUCT, TOKEN


class Info(Protocol):
    """What a server of any kind says of its model."""

    @property
    def path(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def digest(self) -> str | None:
        """Hash of the weights; None if the server does not say."""

    @property
    def dtype(self) -> str | None:
        """Type of the weights; None if the server does not say."""

    @property
    def identity(self) -> tuple[str | None, ...]:
        """What the scores depend on, as far as the server says."""

    @property
    def name(self) -> str:
        """The model in one phrase, for messages."""


SomeInfo = TypeVar("SomeInfo", bound=Info)


@dataclass(frozen=True)
class ServerKind(Generic[SomeInfo]):
    """What differs between servers of several kinds, as far as it is not in their requests."""

    name: str
    """As resolved.json has it."""
    shown: str
    """As messages have it."""
    command: str
    """Starts one."""
    info_route: str
    parse_info: Callable[[Any], SomeInfo]
    """Returns the info in JSON that was read. Raises ValueError, with what is wrong, if it is something else."""
    token_names: tuple[str, ...]
    """Environment variables that may hold the token; the first that is set does."""
    tls_flag: str
    """Makes the server speak https."""

    @property
    def token(self) -> str | None:
        """The token that requests carry; None if there is none."""
        return next(filter(None, map(os.environ.get, self.token_names)), None)


@dataclass(frozen=True)
class ServerInfo:
    """A scoring server: its model and its limits."""

    version: str
    """Version of distill on the server."""
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
    hidden_size: int = 0
    """Numbers of a hidden state; 0 of a server that cannot return them."""
    product: str = PRODUCT
    api: int = API

    @property
    def hidden_bytes(self) -> int:
        """Bytes of each number of a hidden state."""
        return 4 if self.dtype == "float32" else 2

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


@dataclass(frozen=True)
class VllmInfo:
    """A model that `vllm serve` has: the first of `GET /v1/models` that is no adapter."""

    id: str
    """The name that requests use."""
    root: str
    """The model, as it was given to the server: a folder there or a name on the hub."""
    max_model_len: int
    """Tokens of the longest sequence, with at least one that is sampled."""
    revision: None = None
    digest: None = None
    dtype: None = None

    @property
    def path(self) -> str:
        return self.root

    @property
    def identity(self) -> tuple[str, str]:
        return self.id, self.root

    @property
    def name(self) -> str:
        return self.root if self.id == self.root else f"{self.root} (as {self.id})"

    @classmethod
    def parse(cls, content: Any) -> VllmInfo:
        """Return the info in JSON that was read. Raises ValueError, with what is wrong, if it is something else."""
        cards = content.get("data") if isinstance(content, dict) else None
        found = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        models = [card for card in found if card.get("owned_by") == "vllm" and card.get("parent") is None]
        if not models:
            raise ValueError("no server of vLLM")
        name, length = models[0].get("id"), models[0].get("max_model_len")
        if not isinstance(name, str) or type(length) is not int:
            raise ValueError(f"a server of vLLM whose models cannot be read ({models[0]!r:.80})")
        return cls(name, models[0].get("root") or name, length)


DISTILL = ServerKind(
    name="distill",
    shown="scoring server of distill",
    command="distill serve",
    info_route="/info",
    parse_info=ServerInfo.parse,
    token_names=(TOKEN,),
    tls_flag="distill serve --certificate",
)
VLLM = ServerKind(
    name="vllm",
    shown="server of vLLM",
    command="vllm serve",
    info_route="/v1/models",
    parse_info=VllmInfo.parse,
    token_names=(TOKEN, "VLLM_API_KEY"),
    tls_flag="vllm serve --ssl-certfile",
)
KINDS: tuple[ServerKind[Any], ...] = (DISTILL, VLLM)
