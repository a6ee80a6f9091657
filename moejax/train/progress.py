"""A progress bar on a terminal, plain lines elsewhere. One process of a run shows it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moejax.train.metrics import Numbers


def summary(numbers: Numbers, tokens_per_second: float) -> str:
    """The line a person follows: speed, loss, and the state of routing where there is any."""
    text = f"{tokens_per_second:9,.0f} tokens/s  loss {numbers['train/cross_entropy']:.4f}"
    if "moe/load_max" in numbers:
        text += f"  load {numbers['moe/load_max']:.2f}x  drops {100 * numbers['moe/drop_rate']:.2f} %"
    return text


class Reporter:
    """Shows where a run is; `quiet` shows nothing."""

    def __init__(self, name: str, steps: int, *, quiet: bool = False):
        self._console = Console(quiet=quiet, highlight=False)
        self._name, self._steps = name, steps
        self._bar: Progress | None = None
        self._task: Any = None
        if self._console.is_terminal:
            name_column, text_column = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
            columns = name_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text_column
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(name, total=steps, text="")
            self._bar.start()

    def step(self, step: int, numbers: Numbers, tokens_per_second: float) -> None:
        text = summary(numbers, tokens_per_second)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            self._console.print(f"{self._name}  step {step:6d}/{self._steps}  {text}", soft_wrap=True)

    def say(self, text: str) -> None:
        self._console.print(f"{self._name}  {text}", soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
