"""Clients that misbehave leave nothing behind, and do not disturb the others."""

import asyncio
import random
import time

from benchmarks import soak
from tests import serving
from tests.answers import script


def test_clients_that_misbehave_leave_nothing_behind() -> None:
    random.seed(0)
    limits = serving.Limits(context=serving.CONTEXT, body_bytes=2**20)
    with serving.serve(script, limits=limits) as server:
        server.engine.obeys, server.engine.delay = True, 0.005
        clients = soak.Clients(int(server.url.rpartition(":")[2]))
        asyncio.run(clients.run(10, 60))
        assert not clients.wrong, clients.wrong
        assert clients.slowest < 20
        statuses = {status for _, status in clients.seen}
        assert statuses >= {200, 400, 413, 422}
        end = time.monotonic() + 10
        while server.service.running or not server.engine.idle:
            assert time.monotonic() < end
            time.sleep(0.05)
