"""A live table of a sweep on a terminal, a line for every change elsewhere."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from moejax.sweep.local import Show
from moejax.sweep.members import Member
from moejax.sweep.states import DONE, RUNNING, WAITING, State

States = dict[str, State]


@contextlib.contextmanager
def shown(members: Sequence[Member], *, quiet: bool = False) -> Iterator[Show]:
    """What `Local.run` calls with the states of the members."""
    console = Console(quiet=quiet, highlight=False)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            yield lambda states: live.update(_table(members, states, console.height - 4))
    else:
        yield _lines(members, console)


def _lines(members: Sequence[Member], console: Console) -> Show:
    last: dict[str, str] = {}

    def show(states: States) -> None:
        for member in members:
            state = states[member.id]
            if last.get(member.id, DONE if state.kind == DONE else WAITING) != state.kind:
                loss = "" if state.loss is None else f"  {state.loss:.4f} bits per byte"
                console.print(f"{member.name}  {state.text}  step {state.step}/{state.steps}{loss}", soft_wrap=True)
                last[member.id] = state.kind

    return show


def _table(members: Sequence[Member], states: States, room: int) -> Table:
    """What runs first, then what has ended, then what waits; as many rows as there is room for, and the rest counted."""
    order = sorted(members, key=lambda m: (states[m.id].kind != RUNNING, -states[m.id].step))
    counts = Counter(state.kind for state in states.values())
    title = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    found = Table("run", "state", "step", "bits per byte", caption=title)
    for member in order[: max(room, 1)]:
        state = states[member.id]
        loss = "" if state.loss is None else f"{state.loss:.4f}"
        found.add_row(member.name, state.text, f"{state.step}/{state.steps}", loss)
    return found
