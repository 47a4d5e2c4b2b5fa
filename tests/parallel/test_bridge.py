"""Messages and weights between ranks without a common process group."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distill_cli.parallel import bridge
from distill_cli.parallel.bridge import Mailbox, WeightChannel

CPU = torch.device("cpu")


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_messages_arrive_in_order(store: dist.Store) -> None:
    sent, taken = Mailbox(store, "box"), Mailbox(store, "box")
    messages = [("step", {"step": 1}), None, [], b"", torch.arange(3), "x" * (3 * bridge.CHUNK_BYTES + 5)]
    for message in messages:
        sent.put(message)
    for message in messages:
        found = taken.take()
        assert torch.equal(found, message) if isinstance(message, torch.Tensor) else found == message
    assert store.num_keys() <= 1  # the store's own: what was taken is gone
    other = Mailbox(store, "another box")
    other.put(3)
    sent.put(4)
    assert taken.take() == 4


def test_a_wait_can_be_ended(store: dist.Store) -> None:
    class Ended(Exception):
        pass

    def end() -> None:
        raise Ended

    with pytest.raises(Ended):
        Mailbox(store, "box").take(while_waiting=end)


def test_closing_overtakes_messages(store: dist.Store) -> None:
    sent, taken = Mailbox(store, "box"), Mailbox(store, "box")
    assert not taken.is_closing()
    sent.put(1)
    sent.close()
    assert taken.is_closing()
    assert taken.take() == 1


@pytest.fixture
def channels() -> Iterator[list[WeightChannel]]:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        make = [
            pool.submit(WeightChannel, store, rank=rank, size=3, device=CPU, timeout=timedelta(seconds=30))
            for rank in range(3)
        ]
        yield [one.result() for one in make]


@pytest.mark.parametrize("bucket", [bridge.BUCKET_BYTES, 100, 1])
def test_all_weights_arrive(channels, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "BUCKET_BYTES", bucket)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5, generator=generator),
        "norm": torch.randn(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "int": torch.tensor([1, 2, 3], dtype=torch.int64),
    }
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):  # a channel is used again and again
            sent = pool.submit(channels[0].send, tensors.items())
            received = [pool.submit(lambda one=one: list(one.receive())) for one in channels[1:]]
            sent.result()
            for found in (dict(one.result()) for one in received):
                assert list(found) == list(tensors)
                for name, tensor in tensors.items():
                    assert found[name].dtype == tensor.dtype
                    assert torch.equal(found[name], tensor)
