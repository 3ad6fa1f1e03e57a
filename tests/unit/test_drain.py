"""A server that drains: what runs is waited for, and what comes is refused."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from tests.toy_pipeline import toy_request
from tests.unit.http_app import FakeEngine
from vllm_cfg_plugin.compat import engine_deaths
from vllm_cfg_plugin.compat.engines import drain_before_shutdown
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.errors import RequestAbortedError


def test_a_drain_waits_for_running_ones_and_refuses_new_ones():
    """Running requests are waited for and new ones are refused."""

    async def scenario():
        engine = FakeEngine()
        let_go = asyncio.Event()
        engine.behave = lambda request: let_go.wait()
        calls = EngineCalls(engine, lambda: False)
        with calls.room_for(1):
            work = calls.start([toy_request()], "a")
        drained = threading.Event()
        threading.Thread(target=lambda: (calls.drain(20), drained.set())).start()
        await asyncio.sleep(0.3)
        assert not drained.is_set()
        with pytest.raises(RequestAbortedError, match="takes no new requests"):
            calls.check_room()
        work.cancel()
        await asyncio.wait({work})
        await asyncio.to_thread(drained.wait, 10)
        assert drained.is_set()

    asyncio.run(scenario())


def test_it_waits_no_longer_than_it_may():
    calls = EngineCalls(FakeEngine(), lambda: False)
    calls._works.add("never done")
    began = time.monotonic()
    calls.drain(0.3)
    assert time.monotonic() - began >= 0.3


def test_only_servers_that_end_no_engines_drain_themselves(monkeypatch):
    """Only servers that do not end their engines drain by themselves."""
    monkeypatch.setattr(engine_deaths, "_has_let_go", False)
    for manager, happened in ((None, ["drain 4.0", "shutdown 5"]), (object(), ["shutdown 5"])):
        order = []
        client = SimpleNamespace(
            engine_core=SimpleNamespace(resources=SimpleNamespace(engine_manager=manager)),
            shutdown=lambda timeout, order=order: order.append(f"shutdown {timeout}"),
        )
        drain_before_shutdown(client, lambda seconds, order=order: order.append(f"drain {seconds}"))
        client.shutdown(timeout=5)
        assert order == happened
    assert engine_deaths.was_stopped(), "so the end of its connection is no fault"
