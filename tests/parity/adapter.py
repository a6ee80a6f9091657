"""What these tests ask of moejax, in one place: published files in and out, and what a decoder with such weights computes."""

import numpy as np
from models.published import Loaded, leaves

from moejax.checkpoint.hugging_face import published
from moejax.checkpoint.hugging_face import save as saving


def load(folder):
    """(config.Model, {path in the train state: float32 array}) of a folder in a family's published form."""
    return published.load(folder, leaves)


def save(folder, model, flat, family):
    """The inverse of `load`, as a model of that family in bfloat16."""
    saving.save(folder, model, leaves(model), flat.__getitem__, family=family)


def answers(model, flat, tokens, lengths):
    """{"logits": [N, V] of the N valid positions, row by row; "experts": [sparse layers, N, K], each token's in rising order}."""
    logits, experts = Loaded(model, flat).run(tokens.astype(np.int32), valid(tokens, lengths))
    return {"logits": logits, "experts": np.sort(experts, axis=-1)}


def gradients(model, flat, tokens, lengths):
    """(mean cross-entropy of the valid next tokens, {path in the train state: its gradient})."""
    return Loaded(model, flat).gradients(tokens.astype(np.int32), valid(tokens, lengths))


def valid(tokens, lengths):
    """Rows are padded on the right."""
    return np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
