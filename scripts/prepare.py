"""Prepares text once, for many runs with --config.data.source=prepared --config.data.files=DIR.

Example: python scripts/prepare.py --python --out=/tmp/python_text
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from moejax import config
from moejax.data import prepare, source, tokenizer
from moejax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(UserError.exit_code, f"error: {message}; see --help\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--files", metavar="GLOB", help='text files, or .jsonl with {"text": ..., "label": ...} per line')
    text.add_argument("--python", action="store_true", help="the standard library of this interpreter")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make; it must not exist")
    share = config.Data.heldout
    parser.add_argument("--heldout", type=float, default=share, help=f"share of documents for evaluation ({share})")
    parser.add_argument(
        "--tokenizer", metavar="DIR", default=tokenizer.NAME, help="folder with a tokenizer.json (bytes)"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser.parse_args(arguments)


def table(index: dict[str, Any]) -> str:
    """Documents, bytes and tokens of each split, and tokens per label."""
    lines = [["split", "documents", "bytes", "tokens", *index["labels"]]]
    for name, split in index["splits"].items():
        counts = [split["documents"], split["bytes"], split["tokens"], *split["tokens_per_label"].values()]
        lines.append([name, *(f"{count:,}" for count in counts)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*rows, f"near copies removed: {index['near_copies']}"])


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    try:
        documents = source.python_documents() if options.python else source.file_documents(options.files)
        tokens = tokenizer.of(options.tokenizer)
        index = prepare.read_index(prepare.prepare(documents, options.out.expanduser(), options.heldout, tokens))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({key: index[key] for key in ("splits", "near_copies")}) if options.json else table(index))


if __name__ == "__main__":
    main(sys.argv[1:])
