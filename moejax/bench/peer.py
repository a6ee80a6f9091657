"""Blocks in a process of its own, with its own interpreter: it is handed arrays, runs one call when asked, and reports seconds."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError

HERE = Path(__file__).parent
SCRIPT = HERE / "peer_process.py"


class Peer:
    """The blocks that a file beside this one defines (see peer_process.py): names, outputs, and clocks that run one call each.

    A context: the process ends with it."""

    def __init__(self, python: str, blocks: str, remedy: str, arrays: dict[str, np.ndarray], settings: dict[str, Any]):
        self._folder = tempfile.TemporaryDirectory()
        self._remedy = remedy
        files = [Path(self._folder.name) / name for name in ("inputs.npz", "settings.json")]
        np.savez(files[0], **arrays)
        files[1].write_text(json.dumps(settings))
        try:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), str(HERE / blocks), *map(str, files)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            self._folder.cleanup()
            raise UserError(f"{python} cannot be run: {error.strerror}; {remedy}") from error
        hello = self._answer()
        self.versions: dict[str, Any] = hello["versions"]
        self.names: list[str] = hello["names"]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def output(self, name: str) -> np.ndarray:
        """The block's output, fp32."""
        return np.load(self._ask({"name": name, "kind": "output"})["file"])

    def clocks(self) -> dict[str, Callable[[], float]]:
        """Functions that run one call over there and return its seconds."""
        return {
            f"{name} {kind}": lambda name=name, kind=kind: self._ask({"name": name, "kind": kind})["seconds"]
            for name in self.names
            for kind in ("forward", "both")
        }

    def close(self) -> None:
        """Ends the process: its input ends."""
        self._process.communicate(timeout=30)
        self._folder.cleanup()

    def _ask(self, what: dict[str, str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise UserError(f"a peer's process ended with code {self._process.returncode}; {self._remedy}")
        return json.loads(line)
