"""Byte tokens.

There is no end token: every target within a document is exactly one byte, so bits per byte are nats / ln 2 per
valid target.
"""

from __future__ import annotations

import numpy as np

NAME = "bytes"
DOCUMENT = 256
"""Starts each document."""
PAD = 257
"""Fills rows; never a valid token or target."""
VOCABULARY = 258
"""Number of token ids, 0..255 being the bytes."""


def encode(text: bytes) -> np.ndarray:
    """Text of n bytes -> u16[n + 1]: DOCUMENT, then the bytes."""
    tokens = np.empty(len(text) + 1, np.uint16)
    tokens[0] = DOCUMENT
    tokens[1:] = np.frombuffer(text, np.uint8)
    return tokens
