"""`EngineLoop`: commands from many threads, each called once or refused."""

import threading
from functools import partial

import pytest

from headrace.llm.loop import EngineLoop, EngineStoppedError


def test_commands_come_before_the_next_step_and_in_order():
    loop = EngineLoop()
    seen: list[object] = []
    for number in (1, 2):
        loop.post(partial(seen.append, number))

    def step():
        seen.append("step")
        loop.post(lambda: seen.append(3))
        loop.stop()

    loop.run(lambda: False, step)
    assert seen == [1, 2, "step", 3]


def test_every_command_that_was_taken_is_called_once_though_the_loop_ends():
    for _ in range(50):
        loop, barrier = EngineLoop(), threading.Barrier(4)
        taken: list[tuple[int, int]] = []
        called: list[tuple[int, int]] = []

        def post(name, loop=loop, taken=taken, called=called, barrier=barrier):
            barrier.wait()
            for i in range(100):
                try:
                    loop.post(lambda i=i: called.append((name, i)))
                except EngineStoppedError:
                    return
                taken.append((name, i))
                if i == 50 and name == 0:
                    loop.stop()
                    loop.stop()

        threads = [threading.Thread(target=post, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        barrier.wait()
        loop.run(lambda: False, lambda: None)
        loop.close(KeyError("why"))
        for thread in threads:
            thread.join()
        assert sorted(called) == sorted(taken)
        with pytest.raises(EngineStoppedError) as caught:
            loop.post(lambda: None)
        assert isinstance(caught.value.__cause__, KeyError)
