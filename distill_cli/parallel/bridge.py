"""Exchange messages and weights between ranks that have no process group in common (`parallel.roles`)."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

CHUNK_BYTES = 4 << 20
"""Size of a message's parts: a store takes values of up to 8 MiB."""
BUCKET_BYTES = 2**26
"""Size of the tensors that one broadcast carries, at most; a larger tensor has its own."""
ALIGNMENT = 16
"""Tensors begin at multiples of it in a bucket, so that their bytes can be read as any dtype."""
POLL = timedelta(seconds=1)
CLOSING = "closing"


class Mailbox:
    """Messages from one rank to another, in their order. The sender does not wait for the receiver."""

    def __init__(self, store: dist.Store, name: str) -> None:
        # A connection of its own: one that waits lets no other thread use it.
        self._store = dist.PrefixStore(name, store.clone())  # type: ignore[attr-defined]  # stubs lack it
        self._next = 0
        """Number of the next message that is put or taken: a rank does one of both."""

    def put(self, message: Any) -> None:
        """Send a message: anything that can be pickled."""
        number, content = self._count(), pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        chunks = [content[begin : begin + CHUNK_BYTES] for begin in range(0, len(content), CHUNK_BYTES)]
        for index, chunk in enumerate(chunks):
            self._store.set(f"{number}/{index}", chunk)  # type: ignore[arg-type]  # takes bytes, too
        self._store.set(str(number), str(len(chunks)))

    def take(self, *, while_waiting: Callable[[], object] = lambda: None) -> Any:
        """Block until the next message is there, and return it.

        Args:
            while_waiting: called once a second; what it raises ends the wait.
        """
        number = str(self._count())
        while True:
            try:
                self._store.wait([number], POLL)
                break
            except dist.DistStoreError:
                while_waiting()
        keys = [f"{number}/{index}" for index in range(int(self._store.get(number)))]
        content = b"".join(self._store.get(key) for key in keys)
        for key in (number, *keys):
            self._store.delete_key(key)
        return pickle.loads(content)

    def _count(self) -> int:
        self._next += 1
        return self._next - 1

    def has_next(self) -> bool:
        """Return whether `take` would return at once."""
        return self._store.check([str(self._next)])

    def close(self) -> None:
        """Let the receiver know that the last message is on its way."""
        self._store.set(CLOSING, "")

    def is_closing(self) -> bool:
        """Return whether `close` was called."""
        return self._store.check([CLOSING])


class WeightChannel:
    """Broadcasts tensors from one rank to others, without a file. Every rank has one: building it is a collective."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
        """Join; rank 0 sends."""
        self._device = device
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, timeout)

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send named tensors in their order. A collective with `receive`."""
        bucket, size = list[tuple[str, torch.Tensor]](), 0
        for name, tensor in tensors:
            if bucket and size + _padded_bytes(tensor) > BUCKET_BYTES:
                self._send_bucket(bucket)
                bucket, size = [], 0
            bucket.append((name, tensor.detach().to(self._device).contiguous()))
            size += _padded_bytes(tensor)
        if bucket:
            self._send_bucket(bucket)
        self._broadcast_header([])

    def _send_bucket(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        self._broadcast_header([(name, tensor.shape, tensor.dtype) for name, tensor in bucket])
        flat = [
            torch.nn.functional.pad(tensor.flatten().view(torch.uint8), (0, _padded_bytes(tensor) - tensor.nbytes))
            for _, tensor in bucket
        ]
        self._broadcast(torch.cat(flat))

    def receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that `send` sends, on this rank's device. A collective: take all of them."""
        while header := self._broadcast_header(None):
            sizes = [math.prod(shape) * dtype.itemsize for _, shape, dtype in header]
            padded = [_padded(size) for size in sizes]
            flat = torch.empty(sum(padded), dtype=torch.uint8, device=self._device)
            self._broadcast(flat)
            parts = zip(header, flat.split(padded), sizes, strict=True)
            yield from ((name, part[:size].view(dtype).view(shape)) for (name, shape, dtype), part, size in parts)

    def _broadcast_header(self, header: list[Any] | None) -> list[Any]:
        """Send what a bucket holds, or receive it (None)."""
        content = b"" if header is None else pickle.dumps(header)
        length = torch.tensor([len(content)], device=self._device)
        self._broadcast(length)
        payload = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(int(length))
        payload = payload.to(self._device, torch.uint8)
        self._broadcast(payload)
        found: list[Any] = pickle.loads(payload.cpu().numpy().tobytes())
        return found

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _padded_bytes(tensor: torch.Tensor) -> int:
    return _padded(tensor.nbytes)
