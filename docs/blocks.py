"""What a code block is: the site colours it by that, and tests/test_docs.py runs it by that."""

from __future__ import annotations

import ast
import json

COMMANDS = ("python ", "make ", "pip ", ".venv")


def kind(code: str, fence: str = "") -> str | None:
    """python, shell, json or text by the fence; without one by what stands there; None where that says nothing."""
    if fence:
        return {"python": "python", "bash": "shell", "json": "json", "text": "text"}.get(fence)
    lines = [line for line in code.splitlines() if line.strip()]
    if all(line.startswith(COMMANDS) for line in lines):
        return "shell"
    if _is_json(lines):
        return "json"
    return "python" if _is_python(code) else None


def _is_json(lines: list[str]) -> bool:
    """An object or a list a line."""
    try:
        return all(isinstance(json.loads(line), (dict, list)) for line in lines)
    except json.JSONDecodeError:
        return False


def _is_python(code: str) -> bool:
    """It parses, and does more than name things."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in body)
