"""Start, drain, stop, restart and failure of a gateway and its instances."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

import headrace.serve.gateway as module
from headrace import LLM, HeadraceError, SamplingParams
from headrace.instance import supervisor
from headrace.instance.client import InstanceDiedError
from headrace.instance.wire import (
    Accepted,
    Add,
    Delta,
    EventBatch,
    InstalledWeights,
    Ready,
    Refused,
    Resume,
    UpdateWeights,
    WeightsUpdated,
)
from headrace.llm.outputs import CompletionOutput, RequestOutput
from headrace.serve.gateway import Gateway, UnavailableError
from serve.gateway_kit import OPTIONS, PROMPT, begun, start

LONG = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
IDS = [5, 6, 7, 8, 9]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The empty directory in which instances make their temporary folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_bad_model_is_the_user_s_fault_and_leaves_nothing(temporary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    gateway = Gateway(str(folder), OPTIONS, max_queue=1)
    with pytest.raises(HeadraceError, match=r"config\.json"):
        asyncio.run(gateway.start())
    assert gateway.state == "failed" and list(temporary.iterdir()) == []
    with pytest.raises(UnavailableError, match="failed"):
        asyncio.run(gateway.open("a", None, IDS, LONG))


def test_an_option_that_only_the_engine_can_judge_is_refused(tinyworld_checkpoint):
    gateway = Gateway(str(tinyworld_checkpoint), {**OPTIONS, "max_model_len": 10**7}, max_queue=1)
    with pytest.raises(HeadraceError, match="max_model_len=10000000 is more than the model's"):
        asyncio.run(gateway.start())


def test_a_drain_lets_what_runs_finish_and_takes_nothing_new(tinyworld_checkpoint, temporary):
    expected = LLM(tinyworld_checkpoint, **OPTIONS).generate([IDS], LONG)[0]
    seen: list[tuple[int, int, str]] = []

    async def scenario():
        gateway, _ = await start(tinyworld_checkpoint, progress=lambda *at: seen.append(at))
        process = psutil.Process(gateway.info.pid)
        for number in (signal.SIGINT, signal.SIGTERM):  # the instance ignores them: only the gateway handles signals
            process.send_signal(number)
        stream = await gateway.open("last", None, IDS, LONG)
        draining = await begun(gateway.drain(60.0))
        assert gateway.state == "draining"
        with pytest.raises(UnavailableError, match="draining"):
            await gateway.open("late", None, IDS, LONG)
        with pytest.raises(UnavailableError, match="draining"):
            await gateway.embed("late", IDS)
        output = await stream.result()
        await draining
        assert output.outputs == expected.outputs and gateway.restarts == 0
        assert gateway.state == "stopped" and not process.is_running()

    asyncio.run(scenario())
    assert list(temporary.iterdir()) == [] and seen[-1][0] == seen[-1][1] > 0


def test_a_drain_that_takes_too_long_ends_in_an_error(tinyworld_checkpoint):
    async def scenario():
        gateway, watcher = await start(tinyworld_checkpoint)
        stream = await gateway.open("slow", None, IDS, LONG)
        await gateway.drain(0.0)
        with pytest.raises(UnavailableError, match="stopping"):
            await stream.result()
        with pytest.raises(UnavailableError, match="stopping"):
            async for _ in stream:
                pass
        assert watcher.told[-1] == ("finished", "slow", "error")
        await gateway.stop()

    asyncio.run(scenario())


def test_without_restart_a_death_is_an_error_for_all(tinyworld_checkpoint, capfd):
    async def scenario():
        gateway, watcher = await start(tinyworld_checkpoint, restart=False)
        stream = await gateway.open("a", None, IDS, LONG)
        embedding = await begun(gateway.embed("e", IDS * 60))
        os.kill(gateway.info.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="process died"):
            await stream.result()
        await asyncio.gather(embedding, return_exceptions=True)
        assert gateway.state == "failed" and gateway.unfinished == 0
        with pytest.raises(UnavailableError, match="failed"):
            await gateway.open("b", None, IDS, LONG)
        with pytest.raises(UnavailableError, match="failed"):
            await gateway.inspect()
        assert ("restarted",) not in watcher.told
        await gateway.stop()

    asyncio.run(scenario())
    assert "process died; no other is started" in capfd.readouterr().err


def test_requests_that_come_while_an_instance_starts_wait_for_it(tinyworld_checkpoint):
    async def scenario():
        gateway, _ = await start(tinyworld_checkpoint)
        first = gateway.info.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(UnavailableError):  # raised when the gateway detects the death
            await gateway.inspect()
        assert gateway.state == "restarting"
        leaves = await begun(gateway.open("leaves", None, IDS, LONG))
        bad = await begun(gateway.open("bad", None, IDS, SamplingParams(stop=("\ud800",))))
        vector = await begun(gateway.embed("e", IDS))
        leaves.cancel()
        stream = await gateway.open("waits", None, IDS, SamplingParams(max_tokens=3, ignore_eos=True))
        assert gateway.info.pid != first and gateway.state == "ready"
        assert len((await stream.result()).outputs[0].token_ids) == 3
        assert stream.explanation is not None and stream.explanation.resumes == 0
        assert len((await vector).vector) == gateway.info.hidden_size
        ends = await asyncio.gather(leaves, bad, return_exceptions=True)
        assert isinstance(ends[0], asyncio.CancelledError) and isinstance(ends[1], HeadraceError)
        assert gateway.unfinished == 0
        await gateway.stop()

    asyncio.run(scenario())


def test_an_instance_goes_when_its_gateway_is_killed(tinyworld_checkpoint, tmp_path):
    program = (
        "import asyncio, sys\n"
        "from headrace.serve.gateway import Gateway\n"
        "async def main():\n"
        f"    gateway = Gateway({str(tinyworld_checkpoint)!r}, {OPTIONS!r}, max_queue=1)\n"
        "    await gateway.start()\n"
        "    print(gateway.info.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as gateway:
        assert gateway.stdout is not None
        instance = psutil.Process(int(gateway.stdout.readline()))
        assert [path.name.startswith("headrace-") for path in tmp_path.iterdir()] == [True]
        gateway.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        instance.wait(30)
    assert not instance.is_running() and list(tmp_path.iterdir()) == []


class FakeClient:
    """An instance that dies after it has sent the given events."""

    def __init__(self, fingerprint="hr_1", says=(), waits=False):
        self.ready = Ready("0", 1, fingerprint, 100, 100, 100, 10, 16, {}, 0.0)
        self.sent = []
        self._asked = asyncio.Event()
        self._says, self._waits = says, waits

    def send(self, command):
        self.sent.append(command)
        self._asked.set()

    async def batches(self):
        await self._asked.wait()
        for news in self._says:
            yield EventBatch([news])
        if self._waits:
            await asyncio.Event().wait()

    async def kill(self):
        pass

    async def stop(self):
        pass


def fake(monkeypatch, clients):
    """A gateway whose processes are these clients; an exception in the list is a failed start."""
    left = list(clients)

    async def make():
        client = left.pop(0)
        if isinstance(client, Exception):
            raise client
        return client

    monkeypatch.setattr(supervisor, "BACKOFF", 0.0)
    gateway = Gateway("nowhere", OPTIONS, max_queue=9)
    monkeypatch.setattr(gateway._instances["0"], "_spawn", make)
    return gateway, left


def delta(name, text, token, finish_reason=None):
    """One token of a request with one choice."""
    choice = CompletionOutput(0, text, [token], finish_reason=finish_reason)
    return Delta(RequestOutput(name, None, [], [choice], finished=finish_reason is not None))


SOME = delta("1", "a", 7)


def test_another_fingerprint_ends_what_runs(monkeypatch):
    async def scenario():
        gateway, _ = fake(monkeypatch, [FakeClient(says=[Accepted("1"), SOME]), FakeClient("hr_2", waits=True)])
        await gateway.start()
        stream = await gateway.open("a", None, IDS, LONG)
        with pytest.raises(UnavailableError, match="hr_2, not hr_1"):
            await stream.result()
        assert gateway.state == "ready"
        await gateway.stop()

    asyncio.run(scenario())


def test_a_request_that_kills_every_engine_is_dropped_and_the_next_one_served(monkeypatch):
    async def scenario():
        last = FakeClient(
            says=[Accepted("2"), delta("2", "a", 7, "stop")],
            waits=True,
        )
        clients = [FakeClient(says=[Accepted("1")]) for _ in range(3)]
        gateway, left = fake(monkeypatch, [*clients, last])
        await gateway.start()
        stream = await gateway.open("kills", None, IDS, LONG)
        with pytest.raises(UnavailableError, match="3 times in a row"):
            await stream.result()
        output = await (await gateway.open("next", None, IDS, LONG)).result()
        assert output.outputs[0].text == "a" and left == [] and gateway.restarts == 3
        await gateway.stop()

    asyncio.run(scenario())


def test_the_death_of_one_instance_leaves_the_requests_of_another_alone(monkeypatch):
    end = delta("2", "b", 8, "stop")

    async def scenario():
        monkeypatch.setattr(module, "INSTANCES", ("0", "1"))
        dies, lives = FakeClient(says=[Accepted("1"), SOME]), FakeClient(says=[Accepted("2")], waits=True)
        gateway, left = fake(monkeypatch, [dies, HeadraceError("no config.json")])
        second = gateway._instances["1"]

        async def make():
            return lives

        monkeypatch.setattr(second, "_spawn", make)
        await gateway.start()
        first_stream = await gateway.open("a", None, IDS, LONG)
        monkeypatch.setattr(gateway, "_pick", lambda: second)
        stream = await gateway.open("b", None, IDS, LONG)
        with pytest.raises(UnavailableError, match="cannot start again"):
            await first_stream.result()
        assert left == [] and gateway._instances["0"].state == "failed"
        assert gateway.state == "ready" and gateway.unfinished == 1
        gateway.on_events("1", EventBatch([end]))
        assert (await stream.result()).outputs[0].text == "b"
        assert [type(command) for command in lives.sent] == [Add]
        await gateway.stop()

    asyncio.run(scenario())


def test_an_engine_that_cannot_start_again_is_given_up(monkeypatch, capfd):
    async def scenario(failures, match):
        gateway, left = fake(monkeypatch, [FakeClient(says=[Accepted("1"), SOME]), *failures])
        await gateway.start()
        stream = await gateway.open("a", None, IDS, LONG)
        with pytest.raises(UnavailableError, match=match):
            await stream.result()
        await gateway._instances["0"]._task
        assert gateway.state == "failed" and left == []
        await gateway.stop()

    asyncio.run(scenario([InstanceDiedError("status 3")] * 5, "status 3"))
    asyncio.run(scenario([HeadraceError("no config.json")], "cannot start again: no config.json"))
    assert "status 3, 6 times in a row; no other is started" in capfd.readouterr().err


def test_an_engine_of_the_same_fingerprint_that_refuses_to_go_on_is_an_error(monkeypatch):
    async def scenario():
        second = FakeClient(says=[Refused("1", "no room")], waits=True)
        gateway, _ = fake(monkeypatch, [FakeClient(says=[Accepted("1"), SOME]), second])
        await gateway.start()
        stream = await gateway.open("a", None, IDS, LONG)
        with pytest.raises(UnavailableError, match="no room"):
            await stream.result()
        assert isinstance(second.sent[0], Resume)
        await gateway.stop()

    asyncio.run(scenario())


def test_an_engine_that_dies_while_its_weights_change_has_changed_nothing(monkeypatch):
    async def scenario():
        first, second = FakeClient(), FakeClient(says=[Refused("2", "no such folder", "path")], waits=True)
        gateway, left = fake(monkeypatch, [first, second])
        await gateway.start()
        with pytest.raises(UnavailableError, match="died, and its weights are those of before"):
            await gateway.update_weights("somewhere")
        assert first.sent == [UpdateWeights("1", "somewhere")] and gateway.weights_version == 0
        with pytest.raises(HeadraceError, match="no such folder"):
            await gateway.update_weights("somewhere", 7)
        assert left == [] and second.sent == [UpdateWeights("2", "somewhere", 7)] and gateway.weights_version == 0
        await gateway.stop()

    asyncio.run(scenario())


def test_updated_weights_count_without_a_waiting_caller(monkeypatch):
    weights = InstalledWeights("somewhere", 3, [("a", 1, 2)])

    async def scenario():
        gateway, _ = fake(monkeypatch, [FakeClient(says=[WeightsUpdated("9", weights), Accepted("1")], waits=True)])
        await gateway.start()
        stream = await gateway.open("a", None, IDS, LONG)
        assert gateway.weights_version == 3
        await stream.close()
        await gateway.stop()

    asyncio.run(scenario())


def test_a_checkpoint_that_is_gone_at_the_restart_is_a_clear_failure(tinyworld_checkpoint, tmp_path, capfd):
    folder = Path(shutil.copytree(tinyworld_checkpoint, tmp_path / "model"))

    async def scenario():
        gateway, _ = await start(folder)
        stream = await gateway.open("a", PROMPT, IDS, LONG)
        (folder / "config.json").unlink()
        os.kill(gateway.info.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match=r"config\.json"):
            await stream.result()
        assert gateway.state == "failed"
        await gateway.stop()

    asyncio.run(scenario())
    assert "no other is started" in capfd.readouterr().err
