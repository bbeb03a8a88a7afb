"""How far the host runs ahead, with events that finish when the test says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rsfast.engine.lead import HostLead


def test_the_third_step_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    made = 0

    class Event:
        def __init__(self, **_: Any) -> None:
            nonlocal made
            self.number = made
            made += 1

        def record(self, _: object) -> None:
            calls.append(f"record {self.number}")

        def synchronize(self) -> None:
            calls.append(f"wait {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    lead = HostLead(torch.device("cuda"))
    for _ in range(4):
        lead.wait()
        lead.mark()
    assert calls == ["record 0", "record 1", "wait 0", "record 2", "wait 1", "record 3"]


def test_a_cpu_has_no_events() -> None:
    lead = HostLead(torch.device("cpu"))
    for _ in range(4):
        lead.wait()
        lead.mark()
