"""Clients take turns: what waits does not depend on how much another client has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.serving.fair_queue import REMEMBERED_S, FairQueue, QueueFull, Work


def make(*works: Work, max_tokens: int = 10**6) -> FairQueue:
    queue = FairQueue(max_tokens=max_tokens)
    for work in works:
        queue.push(work, now=0.0)
    return queue


def work(client: str, *costs: int, group: str = "g") -> Work:
    return Work(client, group, list(costs))


def batches(queue: FairQueue, budget: int) -> list[list[tuple[str, int, int]]]:
    taken = iter(lambda: queue.take(lambda _: budget), [])
    return [[(part.work.client, part.begin, part.end) for part in parts] for parts in taken]


def test_small_request_joins_next_batch() -> None:
    queue = make(work("huge", *[10] * 100), work("huge", *[10] * 100))
    queue.take(lambda _: 40)
    queue.push(work("small", 5, 5), now=0.0)
    (first, *_) = batches(queue, 40)
    assert ("small", 0, 2) in first


def test_clients_share_a_batch() -> None:
    queue = make(work("a", *[10] * 9), work("b", *[10] * 9))
    assert batches(queue, 60) == [[("a", 0, 3), ("b", 0, 3)], [("a", 3, 6), ("b", 3, 6)], [("a", 6, 9), ("b", 6, 9)]]


def test_long_sequences_take_turns() -> None:
    queue = make(work("a", 90, 90), work("b", 90), work("c", 90))
    assert batches(queue, 100) == [[("a", 0, 1)], [("b", 0, 1)], [("c", 0, 1)], [("a", 1, 2)]]


def test_a_batch_has_one_group() -> None:
    queue = make(work("a", 1, 1, group="hot"), work("b", 1, group="cold"), work("c", 1, group="hot"))
    assert batches(queue, 10) == [[("a", 0, 2), ("c", 0, 1)], [("b", 0, 1)]]


def test_other_groups_come_next() -> None:
    """A group with endless work does not keep another one waiting."""
    queue = make(work("a", *[10] * 50, group="hot"), work("b", 1, group="cold"))
    assert batches(queue, 20)[:2] == [[("a", 0, 2)], [("b", 0, 1)]]


def test_oversized_sequences_are_batches() -> None:
    assert batches(make(work("a", 500, 500, 1)), 100) == [[("a", 0, 1)], [("a", 1, 2)], [("a", 2, 3)]]


def test_removed_work_is_not_taken() -> None:
    gone, kept = work("a", 10, 10, 10), work("b", 10)
    queue = make(gone, kept)
    queue.take(lambda _: 10)
    queue.remove(gone)
    queue.remove(gone)
    assert (queue.num_tokens, queue.num_clients) == (10, 1)
    assert batches(queue, 100) == [[("b", 0, 1)]]
    assert queue.num_tokens == 0


def test_a_full_queue_refuses() -> None:
    queue = make(work("a", 60), max_tokens=100)
    with pytest.raises(QueueFull):
        queue.push(work("b", 41), now=0.0)
    queue.push(work("b", 40), now=0.0)
    assert queue.num_tokens == 100


def test_room_is_kept_for_newcomers() -> None:
    """A client that finds the queue full gets in, although another one sends more as soon as there is room."""
    queue = make(*[work("greedy", 10) for _ in range(10)], max_tokens=100)
    with pytest.raises(QueueFull):
        queue.push(work("new", 30), now=0.0)
    for _ in range(3):
        queue.take(lambda _: 10)
        with pytest.raises(QueueFull):
            queue.push(work("greedy", 10), now=1.0)
    queue.push(work("new", 30), now=1.0)
    queue.take(lambda _: 20)
    queue.push(work("greedy", 10), now=1.0)


def test_a_newcomer_that_left_is_forgotten() -> None:
    queue = make(*[work("greedy", 10) for _ in range(10)], max_tokens=100)
    with pytest.raises(QueueFull):
        queue.push(work("new", 30), now=0.0)
    queue.take(lambda _: 10)
    queue.push(work("greedy", 10), now=REMEMBERED_S + 1)


WORKS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.lists(st.integers(1, 50), min_size=1, max_size=8), st.sampled_from("gh")),
    max_size=12,
)


@given(WORKS, st.integers(1, 120))
def test_everything_is_taken_once(content: list, budget: int) -> None:
    works = [Work(client, group, costs) for client, costs, group in content]
    queue = make(*works)
    taken: dict[Work, int] = dict.fromkeys(works, 0)
    for parts in iter(lambda: queue.take(lambda _: budget), []):
        assert len({part.work.group for part in parts}) == 1
        sizes = [sum(part.work.costs[part.begin : part.end]) for part in parts]
        assert sum(sizes) <= budget or sum(part.end - part.begin for part in parts) == 1
        for part in parts:
            assert part.begin == taken[part.work]
            taken[part.work] = part.end
    assert all(taken[one] == len(one.costs) for one in works)
    assert (queue.num_tokens, queue.num_clients) == (0, 0)


@given(WORKS, st.integers(1, 120))
def test_the_order_is_that_of_arrival(content: list, budget: int) -> None:
    same = [batches(make(*[Work(a, c, b) for a, b, c in content]), budget) for _ in range(2)]
    assert same[0] == same[1]


@given(WORKS)
def test_waiting_is_bounded_by_clients(content: list) -> None:
    """A request of one sequence is in a batch after at most one of every other client."""
    queue = make(*[Work(client, group, costs) for client, costs, group in content])
    others = queue.num_clients
    queue.push(work("small", 1, group="z"), now=0.0)
    order = batches(queue, 50)
    assert next(place for place, parts in enumerate(order) if ("small", 0, 1) in parts) <= others
