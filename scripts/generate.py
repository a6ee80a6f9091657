"""Text from a checkpoint of any run: prompts are read, then answers come token by token.

    --prompt=TEXT                     may be given several times; they are answered together
    --temperature=0.8 --top_p=0.95    draws instead of the most likely token; --seed repeats them
    --json                            the texts and token ids, when all are done

No token is dropped, and what one prompt is answered does not depend on the others. With one prompt its answer appears as it comes.

Example: python scripts/generate.py --workdir=runs/tiny/sparse --prompt='def main' --tokens=100
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from moejax import cli, sharding
from moejax.data.tokenizer import Incremental, Tokenizer
from moejax.errors import UserError
from moejax.models import generate
from moejax.models.generate import Generator, Sampling, Sizes
from moejax.train import saved

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; the last one by default", 0)
PROMPT = flags.DEFINE_multi_string("prompt", None, "text to go on from; special tokens by their names")
TOKENS = flags.DEFINE_integer("tokens", 64, "tokens to add at most", 1)
ROWS = flags.DEFINE_integer("rows", None, "sequences that there is room for; what is compiled depends on it", 1)
POSITIONS = flags.DEFINE_integer("positions", None, "room for a prompt and its answer together", 1)
PIECE = flags.DEFINE_integer("piece", 32, "positions of a prompt that are read at a time", 1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "logits are divided by it; 0 takes the most likely token", 0.0)
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from so many of the most likely tokens; 0 for all", 0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the most likely tokens that reach this probability together")
SEED = flags.DEFINE_integer("seed", 0, "of the draws", 0)
START = flags.DEFINE_bool("start", True, "begin with the token that starts a document")
JSON = flags.DEFINE_bool("json", False, "print texts and token ids as JSON, when all are done")


def main() -> None:
    if WORKDIR.value is None or not PROMPT.value:
        raise UserError("--workdir and --prompt are needed; see --help for an example")
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value)
    generate.check_sampling(sampling)
    workdir = Path(WORKDIR.value).expanduser()
    cfg = saved.read_config(workdir)
    words = saved.tokens(cfg)
    prompts = [prompt_of(text, words) for text in PROMPT.value]
    model = saved.model(workdir, cfg, STEP.value)
    generator = Generator(model.built.config.model, model.built.model, model.built.mesh, sizes(prompts, model))
    parameters, routing = model.state.parameters, model.state.routing
    stream = generator.stream(parameters, routing, model.step, prompts, TOKENS.value, sampling, words.ends)
    facts = follow(stream, prompts, words) | {"step": model.step}
    print(json.dumps(facts, indent=1) if JSON.value else said(facts))


def prompt_of(text: str, words: Tokenizer) -> list[int]:
    """The ids of a prompt."""
    return [*([words.document] if START.value else []), *map(int, words.encode(text, special=True))]


def sizes(prompts: list[list[int]], model: saved.Model) -> Sizes:
    """As asked for; else room for what is there, in whole pieces, so that prompts of about this size compile the same program."""
    parts = sharding.shards(model.built.mesh, "batch")
    rows = ROWS.value or -(-len(prompts) // parts) * parts
    longest = max(map(len, prompts)) + TOKENS.value
    positions = POSITIONS.value or -(-longest // PIECE.value) * PIECE.value
    return Sizes(rows, positions, min(PIECE.value, positions))


def follow(stream: Any, prompts: list[list[int]], words: Tokenizer) -> dict[str, Any]:
    """The answers; a single one is written as it comes."""
    live = len(prompts) == 1 and not JSON.value
    writers = [Incremental(words, prompt) for prompt in prompts]
    texts, ids, times = [""] * len(prompts), [[] for _ in prompts], [time.monotonic()]
    for tokens in stream:
        times.append(time.monotonic())
        for i, token in enumerate(tokens):
            if token >= 0:
                ids[i].append(int(token))
                texts[i] += tell(writers[i].push(int(token)), live)
    for i, writer in enumerate(writers):
        texts[i] += tell(writer.end(), live)
    number, seconds = sum(map(len, ids)), times[-1] - times[min(2, len(times) - 1)]
    rest = sum(len(own) - min(2, len(own)) for own in ids)  # the first two wait for the compiler
    answers = [{"prompt": p, "text": t, "ids": own} for p, t, own in zip(PROMPT.value, texts, ids, strict=True)]
    return {"answers": answers, "tokens": number, "tokens_per_second": rest / seconds if seconds > 0 else None}


def tell(text: str, live: bool) -> str:
    """The text, written at once where it is the only one."""
    if live and text:
        sys.stdout.write(text)
        sys.stdout.flush()
    return text


def said(facts: dict[str, Any]) -> str:
    """What was not written yet, and a last line."""
    answers, speed = facts["answers"], facts["tokens_per_second"]
    rate = "" if speed is None else f", {speed:,.1f} a second after compilation"
    shown = [] if len(answers) == 1 else [f"> {a['prompt']}\n{a['text']}" for a in answers]
    return "\n".join(("", *shown, f"[{facts['tokens']} tokens at step {facts['step']}{rate}]"))


if __name__ == "__main__":
    cli.run(main)
