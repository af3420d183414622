"""The live data and the page's files, over a real gateway."""

import asyncio
import json
import os
import re
import signal

import httpx
import pytest
from fastapi import FastAPI

from headrace import SamplingParams
from headrace.serve import playground
from headrace.serve.live import STEPS, Live
from headrace.serve.playground import FILES, PUBLIC_PATHS, playground_router
from serve.gateway_kit import start

IDS = [5, 6, 7, 8, 9] * 9
LONG = SamplingParams(temperature=0.0, max_tokens=STEPS // 2, ignore_eos=True)


async def until(frames, found):
    """Frames up to the first that `found` likes, that one included."""
    seen = []
    async for frame in frames:
        seen.append(frame)
        if found(frame):
            return seen
    raise AssertionError(f"the picture ended after {len(seen)} frames")


def test_the_picture_moves_and_ends_with_the_gateway(tinyworld_checkpoint):
    async def scenario():
        gateway, _ = await start(tinyworld_checkpoint)
        live = Live(gateway, "tiny")
        frames = live.frames()
        first = await anext(frames)
        assert first["info"]["model"] == "tiny" and first["info"]["kv_blocks"] == gateway.info.kv_blocks
        assert first["state"] == "ready" and first["steps"] == []
        stream = await gateway.open("a", None, IDS, LONG)
        await stream.result()
        seen = await until(frames, lambda f: f["count"] >= LONG.max_tokens and f["stats"]["num_running"] == 0)
        steps = [step for frame in seen for step in frame["steps"]]
        assert seen[-1]["count"] == len(steps), "every step is in one frame"
        assert sum(prefill for prefill, *_ in steps) == len(IDS)
        assert sum(decode for _, decode, *_ in steps) + 1 == LONG.max_tokens
        grown = await until(frames, lambda f: "tree" in f and f["tree"]["nodes"])
        ids = {row[0] for row in grown[-1]["tree"]["nodes"]}
        assert all(row[1] == -1 or row[1] in ids for row in grown[-1]["tree"]["nodes"])
        stopping = asyncio.create_task(gateway.drain(10.0))
        assert [frame async for frame in frames][-1]["state"] in ("draining", "stopped")
        await stopping
        assert live.watchers == 0

    asyncio.run(scenario())


def test_the_picture_goes_on_over_the_death_of_an_instance(tinyworld_checkpoint):
    async def scenario():
        gateway, _ = await start(tinyworld_checkpoint)
        frames = Live(gateway, "tiny").frames()
        await anext(frames)
        os.kill(gateway.info.pid, signal.SIGKILL)
        stream = await gateway.open("a", None, IDS, LONG)
        await stream.result()
        seen = await until(frames, lambda f: f["restarts"] == 1 and f["stats"]["generated_tokens"] == LONG.max_tokens)
        assert seen[-1]["state"] == "ready"
        await frames.aclose()
        await gateway.stop()

    asyncio.run(scenario())


@pytest.fixture
def site(tinyworld_checkpoint):
    """Run a coroutine function with a client of the page's application, and its gateway."""

    def run(scenario):
        async def whole():
            gateway, _ = await start(tinyworld_checkpoint)
            app = FastAPI()
            app.include_router(playground_router(gateway, "tiny"))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                await scenario(client, gateway)
            await gateway.stop()

        asyncio.run(whole())

    return run


def test_the_page_is_complete_and_uses_no_other_host(site):
    async def scenario(client, gateway):
        for path in PUBLIC_PATHS:
            answer = await client.get(path)
            assert answer.status_code == 200 and answer.content
            assert answer.headers["content-security-policy"].startswith("default-src 'self'")
            text = answer.text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|//cdn|innerHTML|\son[a-z]+=", text), path
            for name in re.findall(r'(?:from "\./|src="playground/|href="playground/)([^"]+)"', text):
                assert name in FILES, f"{path} asks for {name}"

    site(scenario)


def test_the_live_picture_is_server_sent_events_and_a_crowd_is_refused(site, monkeypatch):
    async def scenario(client, gateway):
        monkeypatch.setattr(playground, "WATCHERS", 0)
        crowded = await client.get("/playground/live")
        assert crowded.status_code == 503 and crowded.json()["error"]["message"].endswith("close one")
        monkeypatch.undo()
        draining = asyncio.create_task(gateway.drain(10.0))
        answer = await client.get("/playground/live")
        await draining
        frames = [json.loads(part.removeprefix("data: ")) for part in answer.text.strip().split("\n\n")]
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert frames[0]["info"]["model"] == "tiny" and frames[-1]["state"] in ("draining", "stopped")

    site(scenario)
