"""Requests to a server: at a rate of their own, or each after the answer to the one before."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """To one request.

    Attributes:
        phase: index of the phase in which the request was due.
        due_s: when it was, from the start of its phase.
        latency_ms: from then, not from when a busy generator came to send it, to the whole answer.
        status: of HTTP.
        content: of the answer.
    """

    phase: int
    due_s: float
    latency_ms: float
    status: int
    content: dict[str, Any]


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and content of one answer."""
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def connect(port: int) -> closing[http.client.HTTPConnection]:
    """A connection to close after use, made anew when the server has closed it."""
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S))


def open_loop(port: int, body: bytes, phases: Sequence[tuple[float, float]]) -> list[Reply]:
    """Evenly spaced requests, on a connection each.

    Args:
        port: of the server.
        body: of every request.
        phases: (seconds, requests per second).
    """

    def send(phase: int, start: float, due_s: float) -> Reply:
        with connect(port) as connection:
            status, content = ask(connection, "POST", "/classify", body)
            latency_ms = 1000 * (time.monotonic() - start - due_s)
        return Reply(phase, due_s, latency_ms, status, content)

    sent = []
    start = time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        for phase, (seconds, rate) in enumerate(phases):
            for n in range(int(seconds * rate)):
                due_s = n / rate
                time.sleep(max(0.0, start + due_s - time.monotonic()))
                sent.append(pool.submit(send, phase, start, due_s))
            start += seconds
        return [reply.result() for reply in sent]


def closed_loop(port: int, body: bytes, phases: Sequence[tuple[float, int]]) -> list[Reply]:
    """Clients that wait for their answers, and keep their connections.

    Args:
        port: of the server.
        body: of every request.
        phases: (seconds, number of clients).
    """

    def client(phase: int, start: float, seconds: float) -> list[Reply]:
        replies = []
        with connect(port) as connection:
            while (due_s := time.monotonic() - start) < seconds:
                status, content = ask(connection, "POST", "/classify", body)
                latency_ms = 1000 * (time.monotonic() - start - due_s)
                replies.append(Reply(phase, due_s, latency_ms, status, content))
        return replies

    replies: list[Reply] = []
    for phase, (seconds, clients) in enumerate(phases):
        start = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            running = [pool.submit(client, phase, start, seconds) for _ in range(clients)]
            replies += [reply for replies_of_one in running for reply in replies_of_one.result()]
    return replies


def share_within(replies: Iterable[Reply], objective_ms: float) -> float:
    """Of the requests: answered, and in time."""
    chosen = [r.status == 200 and r.latency_ms <= objective_ms for r in replies]
    return sum(chosen) / len(chosen)
