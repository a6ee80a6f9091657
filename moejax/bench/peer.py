"""Another library in a process of its own, with its own interpreter: it is handed arrays, runs one call when asked, and reports seconds."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError

SCRIPT = Path(__file__).with_name("peer_hf.py")


class Peer:
    """The blocks of peer_hf.py: names, outputs, and clocks that run one call each."""

    def __init__(self, python: str, arrays: dict[str, np.ndarray], dtype: str):
        self._folder = tempfile.TemporaryDirectory()
        inputs = Path(self._folder.name) / "inputs.npz"
        np.savez(inputs, **arrays)
        try:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), str(inputs), dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UserError(
                f"--torch={python} cannot be run: {error.strerror}; give an interpreter that has torch"
            ) from error
        hello = self._answer()
        self.versions: dict[str, Any] = hello["versions"]
        self.names: list[str] = hello["names"]

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
            raise UserError(
                f"the process with torch ended with code {self._process.returncode}; it needs torch and transformers: "
                "pip install torch transformers, in an environment of its own"
            )
        return json.loads(line)
