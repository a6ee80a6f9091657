"""Where a run's time went, from its ledger: pure functions of the lines of events.jsonl."""

from __future__ import annotations

from typing import Any

Seconds = dict[str, float]


def seconds(events: list[dict[str, Any]]) -> Seconds:
    """Seconds by section, all starts together; what a killed process spent after its last save is unknown. Empty without a ledger.

    A ledger line counts from the start of its process, so a process's last one is its own, and a smaller sum is another process.
    """
    total: Seconds = {}
    last: Seconds = {}
    for line in [*_ledgers(events), {}]:
        if sum(line.values()) < sum(last.values()):
            total = {name: total.get(name, 0.0) + value for name, value in last.items()}
        last = line
    return total


def _ledgers(events: list[dict[str, Any]]) -> list[Seconds]:
    return [event["seconds"] for event in events if event.get("event") == "ledger"]


def starts(events: list[dict[str, Any]]) -> int:
    """How often the run was started, as far as it left a trace."""
    return 1 + sum(event.get("event") in ("resumed", "started again") for event in events)


def lost_steps(events: list[dict[str, Any]]) -> int:
    """Steps that were logged and made again."""
    resumed = sum(event.get("lost_steps", 0) for event in events)
    back = sum(event["spike"] - event["to"] for event in events if event.get("event") == "rolled back")
    return resumed + back


def share(events: list[dict[str, Any]]) -> float | None:
    """Goodput: the share of the known time that went into steps; None without a ledger."""
    found = seconds(events)
    return found["step"] / sum(found.values()) if sum(found.values()) else None


def sentence(events: list[dict[str, Any]]) -> str:
    """For a person: `81 % of 40.2 s in steps; compile 5.1 s, evaluation 1.9 s; 2 starts, 3 steps lost`."""
    found = {name: value for name, value in sorted(seconds(events).items(), key=lambda item: -item[1]) if value >= 0.05}
    if not found:
        return "no ledger"
    whole = sum(found.values())
    rest = ", ".join(f"{name} {value:.1f} s" for name, value in found.items() if name != "step")
    return (
        f"{100 * found.get('step', 0) / whole:.0f} % of {whole:.1f} s in steps; {rest}; {starts(events)} start(s), "
        f"{lost_steps(events)} step(s) lost"
    )


def happened(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that tell of something."""
    return [{k: v for k, v in event.items() if k != "time"} for event in events if event.get("event") != "ledger"]
