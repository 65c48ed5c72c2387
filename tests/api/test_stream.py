"""The event stream: order, resuming, gaps, heartbeats, and readers that go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable
from functools import partial

import pytest

from foreshock.api.stream import EventStream


async def take(frames: AsyncIterator[str], count: int) -> list[str]:
    return [await asyncio.wait_for(anext(frames), 5) for _ in range(count)]


def ids(frames: list[str]) -> list[str]:
    return [line[4:] for f in frames for line in f.splitlines() if line.startswith("id: ")]


def run(work: Awaitable[None]) -> None:
    async def main() -> None:
        await work

    asyncio.run(main())


def test_a_reader_gets_what_happens_after_it_came() -> None:
    async def work() -> None:
        stream = EventStream()
        stream.publish("step", "a", {"step": 1}, project="p")
        frames = stream.follow()
        await take(frames, 1)
        later = partial(stream.publish, "risk", "a", {"step": 2}, project="p")
        threading.Thread(target=later).start()
        (frame,) = await take(frames, 1)
        assert "event: risk\n" in frame
        assert 'data: {"step":2}\n\n' in frame

    run(work())


def test_a_reader_that_comes_back_gets_what_it_missed_once() -> None:
    async def work() -> None:
        stream = EventStream()
        first = stream.follow()
        await take(first, 1)
        stream.publish("step", "a", {"step": 1}, project="p")
        (seen,) = ids(await take(first, 1))
        await first.aclose()  # type: ignore[attr-defined]
        for step in (2, 3):
            stream.publish("step", "a", {"step": step}, project="p")
        again = await take(stream.follow(last_event_id=seen), 2)
        assert "".join(again).count("event: step") == 2
        assert '"step":1' not in "".join(again)

    run(work())


@pytest.mark.parametrize("last", ["before-3", "", "nonsense", "-", "9" * 30])
def test_an_unknown_place_is_answered_by_reset(last: str) -> None:
    async def work() -> None:
        stream = EventStream()
        stream.publish("step", "a", {}, project="p")
        (frame,) = await take(stream.follow(last_event_id=last), 1)
        assert "event: reset" in frame

    run(work())


def test_a_reader_that_fell_out_of_the_buffer_is_told() -> None:
    async def work() -> None:
        stream = EventStream(capacity=2)
        frames = stream.follow()
        await take(frames, 1)
        for step in range(5):
            stream.publish("step", "a", {"step": step}, project="p")
        reset, kept = await take(frames, 2)
        assert "event: reset" in reset
        assert kept.count("event: step") == 2
        assert '"step":4' in kept

    run(work())


def test_only_the_wanted_run() -> None:
    async def work() -> None:
        stream = EventStream()
        frames = stream.follow(run_id="b", heartbeat=5)
        await take(frames, 1)
        stream.publish("step", "a", {}, project="p")
        stream.publish("step", "b", {}, project="p")
        (frame,) = await take(frames, 1)
        assert frame.count("event:") == 1

    run(work())


def test_quiet_streams_send_comments_and_closed_ones_end() -> None:
    async def work() -> None:
        stream = EventStream()
        frames = stream.follow(heartbeat=0.01)
        (_, comment) = await take(frames, 2)
        assert comment.startswith(":")
        stream.close()
        assert [frame async for frame in frames] in ([], [": still here\n\n"])
        assert stream.readers == 0

    run(work())


def test_a_reader_that_leaves_is_forgotten() -> None:
    async def work() -> None:
        stream = EventStream()
        frames = stream.follow()
        await take(frames, 1)
        assert stream.readers == 1
        await frames.aclose()  # type: ignore[attr-defined]
        assert stream.readers == 0

    run(work())


def test_numbers_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        EventStream().publish("step", "a", {"loss": float("nan")}, project="p")


def test_a_reader_kept_to_some_projects_gets_only_theirs() -> None:
    async def work() -> None:
        stream = EventStream()
        frames = stream.follow(sees=lambda project: project == "p", heartbeat=5)
        await take(frames, 1)
        stream.publish("step", "a", {"step": 1}, project="q")
        stream.publish("step", "b", {"step": 2}, project="p")
        (frame,) = await take(frames, 1)
        assert frame.count("event: ") == 1
        assert '"step":2' in frame

    run(work())


def test_a_stream_ends_with_the_right_to_read_it() -> None:
    async def work() -> None:
        stream, right = EventStream(), [True]
        frames = stream.follow(holds=lambda: right[0], heartbeat=0.01)
        await take(frames, 2)
        right.clear()
        right.append(False)
        with pytest.raises(StopAsyncIteration):
            await take(frames, 1)

    run(work())
