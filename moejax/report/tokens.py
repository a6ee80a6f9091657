"""Which expert takes which token: tables of the probe by token class and position, and its text, coloured by expert."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import numpy as np
from jaxtyping import Int

from moejax.data.tokenizer import Tokenizer
from moejax.report import attributes, figures
from moejax.report.history import Probe
from moejax.report.layers import chosen

SHOWN = 600
"""Tokens of text a layer."""
COLOURED = len(figures.COLOURS)
"""Experts with a colour, those that the text goes to most."""
MARKS = {" ": "\u00b7", "\n": "\u21b5\n", "\t": "\u2192"}
"""What stands for white space, so that its colour is seen."""


def table(attribute: Int[np.ndarray, " N"], kinds: int, experts: Int[np.ndarray, "N K"]) -> Int[np.ndarray, "kinds E"]:
    """How many requests for each expert come from each value of an attribute."""
    asked = experts >= 0
    pairs = np.broadcast_to(attribute[:, None], experts.shape)[asked], experts[asked]
    found = np.zeros((kinds, int(experts.max(initial=0)) + 1), np.int64)
    np.add.at(found, pairs, 1)
    return found


def by_position(probe: Probe, context: int) -> tuple[list[str], list[Int[np.ndarray, "kinds E"]]]:
    """Titles of the parts of a row, and a table for every layer."""
    titles = [f"position {part}" for part in attributes.bin_names(context)]
    which = attributes.position_bins(probe.positions, context)
    return titles, [table(which, len(titles), of_layer) for of_layer in probe.experts]


def by_class(probe: Probe, words: Tokenizer) -> tuple[list[str], list[Int[np.ndarray, "kinds E"]]]:
    """Classes that the probe has, and a table for every layer."""
    which = attributes.token_classes(words)[probe.tokens]
    found, places = np.unique(which, return_inverse=True)
    return [attributes.CLASSES[i] for i in found], [table(places, len(found), of_layer) for of_layer in probe.experts]


def text(probe: Probe, kind: str, decode: Callable[[int], str]) -> str:
    """The beginning of the probe for the first, a middle and the last layer, each token on the colour of its first expert."""
    layers = chosen(len(probe.experts), 3)
    parts = [f"<h4>{escape(kind)} layer {layer}</h4>{_coloured(probe, layer, decode)}" for layer in layers]
    return f'<div class="grid">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _coloured(probe: Probe, layer: int, decode: Callable[[int], str]) -> str:
    experts = probe.experts[layer][:SHOWN]
    ids, counts = np.unique(experts[:, 0][experts[:, 0] >= 0], return_counts=True)
    most = [int(e) for e in ids[np.argsort(-counts, kind="stable")][:COLOURED]]
    legend = " ".join(f'<span class="e{i}">expert {e}</span>' for i, e in enumerate(most))
    others = f" and {len(ids) - len(most)} more without a colour" if len(ids) > len(most) else ""
    body, row = [], -1
    for i, own in enumerate(experts):
        if probe.rows[i] != row:
            row = probe.rows[i]
            body.append('<i class="row"></i>')
        colour = f"e{most.index(own[0])}" if own[0] in most else "e"
        names = ", ".join(str(e) for e in own if e >= 0) or "none"
        shown = decode(int(probe.tokens[i]))
        shown = "".join(MARKS.get(letter, escape(letter)) for letter in shown)
        body.append(f'<span class="{colour}" title="{names}">{shown}</span>')
    return f'<p class="note">{legend}{others}</p><div class="text">{"".join(body)}</div>'


CSS = """
.text { font: .8rem/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--shade);
  padding: .6rem; max-height: 22rem; overflow-y: auto; }
.text .row { display: block; border-top: 1px dashed var(--rule); }
""" + "".join(f".e{i} {{ background: {colour}55; border-radius: 2px; }}\n" for i, colour in enumerate(figures.COLOURS))
