"""The fault proxy itself, in front of a server that counts: the client sees the fault, the server what it should."""

import asyncio

import pytest
from aiohttp import web

from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineTimedOut, EngineUnreachable, SglangClient
from tests.support.fault_proxy import Fault, FaultProxy, Rule

PATH = "/generate"


class Counting:
    """Answers the how-manieth call it is, as {"call": n, "got": payload}."""

    def __init__(self):
        self.seen = []

    async def handle(self, request):
        self.seen.append(await request.json())
        return web.json_response({"call": len(self.seen), "got": self.seen[-1]})

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post(PATH, self.handle)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()


def through(proxy_rules, calls, timeout_seconds=0.5, release=False):
    """What each call gave (an answer or the exception's type), the server's payloads, and the proxy's log."""

    async def run():
        async with Counting() as server:
            with FaultProxy(server.port) as proxy:
                proxy.script(*proxy_rules)
                client, outcomes = SglangClient(proxy.address, timeout_seconds=timeout_seconds), []
                for number in range(calls):
                    try:
                        outcomes.append((await client.generate({"number": number}))["call"])
                    except (EngineUnreachable, EngineRefused) as error:
                        outcomes.append(type(error))
                if release:
                    proxy.release()
                    while len(server.seen) <= calls - 1:
                        await asyncio.sleep(0.01)
                await client.close()
                return outcomes, [payload["number"] for payload in server.seen], list(proxy.calls)

    return asyncio.run(run())


GONE = EngineUnreachable


@pytest.mark.parametrize(
    "fault, outcomes, seen, status",
    [
        (Fault.DROP_REQUEST, [1, GONE, 2], [0, 2], None),
        (Fault.DROP_ANSWER, [1, GONE, 3], [0, 1, 2], 200),
        (Fault.STALL_REQUEST, [1, EngineTimedOut, 2], [0, 2], None),
        (Fault.STALL_ANSWER, [1, EngineTimedOut, 3], [0, 1, 2], 200),
        (Fault.HALF_REQUEST, [1, GONE, 2], [0, 2], None),
        (Fault.HALF_ANSWER, [1, GONE, 3], [0, 1, 2], 200),
        (Fault.DUPLICATE_REQUEST, [1, 3, 4], [0, 1, 1, 2], 200),
    ],
)
def test_the_second_call_is_struck_and_no_other(fault, outcomes, seen, status):
    got, served, log = through([Rule(PATH, fault, call=2)], 3)
    assert (got, served) == (outcomes, seen)
    assert [(call.number, call.payload["number"], call.fault) for call in log] == [
        (1, 0, None),
        (2, 1, fault),
        (3, 2, None),
    ]
    assert [call.status for call in log] == [200, status, 200]


@pytest.mark.parametrize("status, kind", [(503, EngineUnreachable), (500, EngineRefused), (400, EngineRefused)])
def test_refusals_carry_their_status(status, kind):
    got, served, _ = through([Rule(PATH, Fault.REFUSE, call=1, status=status)], 2)
    assert got == [kind, 1] and served == [1]


def test_a_late_request_reaches_the_server_after_the_others():
    got, served, log = through([Rule(PATH, Fault.LATE_REQUEST, call=1)], 2, release=True)
    assert got == [GONE, 1] and served == [1, 0]


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.05])
def test_a_second_answer_is_never_taken_for_the_next_call(delay):
    """The answers' call numbers would shift by one."""
    got, served, _ = through([Rule(PATH, Fault.DUPLICATE_ANSWER, call=None, delay=delay)], 6)
    assert served == [0, 1, 2, 3, 4, 5]
    assert all(outcome in (number, GONE) for number, outcome in enumerate(got, start=1)), got


def test_a_rule_without_a_fault_only_runs_its_hook():
    hits = []
    got, _, log = through([Rule(PATH, None, call=2, before=lambda: hits.append("second"))], 3)
    assert got == [1, 2, 3] and hits == ["second"] and not any(call.fault for call in log)
