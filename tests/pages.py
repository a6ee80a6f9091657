"""The pages as their readers use them: code blocks by kind, and commands, up to where their work begins or to their end in tiny form."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import shlex
import sys
import traceback
from typing import NamedTuple
from unittest import mock

from absl import flags
from markdown_it import MarkdownIt

from moejax import cli, config
from moejax.checkpoint.hugging_face.families import deepseek
from moejax.moe import routers
from moejax.train import check, loop

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = {"NAME": "topk", "WORKDIR": "runs/tiny", "PYTHON": sys.executable}
"""What a page writes in capitals, and the reader fills in."""

NAMESPACES = {"docs/models.md": vars(deepseek)}
"""What an excerpt of a file has around it."""


def load(file, name):
    """A file outside of the package as a module."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


blocks = load(ROOT / "docs/blocks.py", "blocks")
reference = load(ROOT / "docs/reference.py", "reference")


class Block(NamedTuple):
    page: str
    line: int
    fence: str
    code: str

    @property
    def kind(self):
        return "directive" if self.fence.startswith("{") else blocks.kind(self.code, self.fence)


def blocks_of(page):
    """Fenced and indented, in lists too."""
    name, tokens = str(page.relative_to(ROOT)), MarkdownIt().parse(page.read_text())
    found = [token for token in tokens if token.type in ("fence", "code_block")]
    return [Block(name, token.map[0] + 1, token.info.strip(), token.content) for token in found]


def commands_of(page):
    """Lines of shell blocks, and what stands between backticks and begins like one."""
    lines = [line for block in blocks_of(page) if block.kind == "shell" for line in block.code.splitlines()]
    parts = [part for token in MarkdownIt().enable("table").parse(page.read_text()) for part in token.children or []]
    inline = [part.content for part in parts if part.type == "code_inline"]
    return [line for line in lines if line.strip()] + [code for code in inline if code.startswith(blocks.COMMANDS)]


# ---- commands -----------------------------------------------------------------------------------------------------

BENCHES = re.findall(r'^    "(\w+)": \1,', (ROOT / "scripts/bench.py").read_text(), re.MULTILINE)
WORK = {
    "bench": [f"{name}.run" for name in BENCHES],
    "cards": ["_read"],
    "compare": ["twins.train"],
    "compare_upcycled": ["upcycled.train"],
    "convert": ["starts.require_new", "saved.read_config"],
    "evaluate": ["saved.read_config"],
    "generate": ["saved.read_config"],
    "plan": ["pods.topologies"],
    "prepare": ["source.file_documents", "source.python_documents"],
    "report": ["runs.load_all"],
    "specialisation": ["saved.read_config"],
    "surgery": ["saved.read_arrays"],
    "sweep": ["_run", "_show"],
    "train": ["loop.train"],
    "tune": ["jax.devices"],
    "verify": ["verify"],
}
"""Where the work of a script begins. All that it says about wrong flags and options is said before."""


class Begun(Exception):
    """A command is right: its work would begin now."""


def _stopped(work):
    @functools.wraps(work)
    def begin(*arguments, **options):
        for argument in arguments:
            if isinstance(argument, config.Config):
                check.check(argument)
        raise Begun

    return begin


@contextlib.contextmanager
def script(path, *arguments):
    """A command as a module, with its arguments as they are given; its flags are gone afterwards."""
    before = set(flags.FLAGS)
    try:
        with mock.patch.object(sys, "argv", [path, *arguments]):
            yield load(ROOT / path, f"{pathlib.Path(path).stem}_script")
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()


def call(line, *, real=False):
    """One `python scripts/NAME.py …` of a page: up to its work; all of it if `real`, or if it is not known where that begins."""
    path, *arguments = words(line)
    name = pathlib.Path(path).stem
    with script(path, *arguments) as module, contextlib.ExitStack() as stack:
        if name not in WORK:
            return _options(module)
        for place in () if real else WORK[name]:
            *holder, function = place.split(".")
            holder = functools.reduce(getattr, holder, module)
            stack.enter_context(mock.patch.object(holder, function, _stopped(getattr(holder, function))))
        stack.enter_context(contextlib.suppress(Begun))
        if name == "prepare":
            return module.main(arguments)
        rest = re.search(r'cli\.run\(main(?:, rest="(\w+)")?\)', (ROOT / path).read_text())[1]
        left = cli.parse(sys.argv, known_only=rest == "all")
        assert rest or not left, f"{line}: unexpected {left}"
        module.main(*([left] if rest else []))


def _options(module):
    """A script of which no more is known: its flags, and its config by every rule."""
    cli.parse(sys.argv, known_only=True)
    if "config" in flags.FLAGS:
        check.check(cli.resolved(module.CONFIG))


def words(line):
    """Of a command after `python`, with what the reader fills in."""
    filled = re.sub(rf"\b({'|'.join(NAMES)})\b", lambda found: NAMES[found[0]], line)
    return shlex.split(filled, comments=True)[1:]


# ---- in tiny form -------------------------------------------------------------------------------------------------

CHEAP = {"report", "evaluate", "convert", "generate"}
TINY = "README.md", "docs/models.md"
"""Pages whose commands of CHEAP are run to their end, in this order and in one folder: a run is reported and judged; a published model is
brought in, speaks, is judged and published."""


@contextlib.contextmanager
def tiny(text):
    """Inside, training is two steps of one block of layers on the files of a glob."""
    train = loop.train

    def short(cfg, workdir, *, quiet=False):
        data = {"source": "files", "files": text, "cache": "tokens", "context": 16, "batch": 2, "heldout": 0.3}
        cfg = dataclasses.replace(
            cfg,
            data=dataclasses.replace(cfg.data, **data),
            train=dataclasses.replace(cfg.train, steps=2, warmup=0, eval_rows=2),
            model=dataclasses.replace(cfg.model, repeats=1, unroll=1),
        )
        return train(cfg, workdir, quiet=quiet)

    with mock.patch.object(loop, "train", short):
        yield


def run(page):
    """The Python of a page, block after block, as somebody would who follows it."""
    around = dict(NAMESPACES.get(str(page.relative_to(ROOT)), {}))
    with mock.patch.dict(routers.ROUTERS):
        for block in blocks_of(page):
            if block.kind == "python":
                exec(compile("\n" * block.line + block.code, block.page, "exec"), around)


def cheap():
    """The commands of TINY that are run to their end, each once."""
    found = [line for name in TINY for line in commands_of(ROOT / name) if line.split()[1][8:-3] in CHEAP]
    return dict.fromkeys(found)


def main():
    """All of it in the present folder. Prints what failed, and how, as JSON on the last line."""
    failed = {}
    tasks = {str(page.relative_to(ROOT)): functools.partial(run, page) for page in PAGES}
    tasks |= {line: functools.partial(call, line, real=True) for line in cheap()}
    with tiny("notes/*.md"):
        for name, task in tasks.items():
            try:
                task()
            except Exception:
                failed[name] = traceback.format_exc()
    print()
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
