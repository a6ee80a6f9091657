"""What every command shares: one line and an exit code for each way to go wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from moejax import config
from moejax.errors import ConfigError, DamagedError, DivergedError, PreemptedError, SaveError, UserError, together

T = TypeVar("T")
KNOWN = (UserError, DivergedError, DamagedError, SaveError, PreemptedError)


class FloatOrNone(flags.FloatParser):
    """A number, or None for an option that may be without; `config.resolve` refuses it for others."""

    def convert(self, argument: str | float) -> Any:
        return None if argument == "None" else super().convert(argument)


class IntegerOrNone(flags.IntegerParser):
    """The same for whole numbers."""

    def convert(self, argument: str | int) -> Any:
        return None if argument == "None" else super().convert(argument)


config_flags.register_flag_parser_for_type(float, FloatOrNone())
config_flags.register_flag_parser_for_type(int, IntegerOrNone())


def fail(error: Exception) -> int:
    """Prints the error as one line and returns its exit code."""
    print(
        f"{'note' if isinstance(error, PreemptedError) else 'error'}: {' '.join(str(error).split())}", file=sys.stderr
    )
    return getattr(error, "exit_code", 1)


def run(main: Callable[..., None], *, rest: str | None = None) -> None:
    """Parses the flags, runs main, exits. An unexpected exception keeps its traceback and exits with 1.

    With `rest` main takes a list: of the arguments that are no flags ("names"), or of them and of the flags that this
    command does not know ("all").
    """
    try:
        left = parse(sys.argv, known_only=rest == "all")
        if left and rest is None:
            raise UserError(f"unexpected argument {left[0]!r}; options are written --name=value; see --help")
        main(*([] if rest is None else [left]))
    except KNOWN as error:
        _exit(error, fail(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        _exit(error, 1)


def _exit(error: Exception, code: int) -> None:
    """Ends the process. Of several, one that fails alone leaves at once: python's way out would wait for the others, who wait for it."""
    if not together(error) and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse(argv: list[str], *, known_only: bool = False) -> list[str]:
    """absl flags; wrong ones raise UserError. Returns what is no flag, and with `known_only` what is an unknown one."""
    if any(argument in ("--help", "-h", "-help") for argument in argv[1:]):
        print(sys.modules["__main__"].__doc__)
        print(flags.FLAGS.get_help(include_special_flags=False) if len(argv) == 2 else "")
        sys.exit(0)
    try:
        return flags.FLAGS(argv, known_only=known_only)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        raise UserError(f"{_flat(error)}; see --help") from error


def config_flag() -> flags.FlagHolder:
    """--config=FILE.py[:VARIANT], with --config.key=value for any option."""
    return config_flags.DEFINE_config_file("config", None, "experiment file, with --config.key=value for any option")


def config_file(name: str = "config") -> str:
    """FILE.py[:VARIANT] of the flag, as it was written."""
    if flags.FLAGS[name].value is None:
        raise ConfigError("--config is missing; for example --config=configs/tiny.py")
    return config_flags.get_config_filename(flags.FLAGS[name])


def overrides(argv: list[str], name: str = "config") -> list[str]:
    """--config.key=value of a command line, as they were written."""
    return [argument for argument in argv if argument.lstrip("-").startswith(f"{name}.")]


def tree(flag: flags.FlagHolder) -> ml_collections.ConfigDict:
    """The config of the flag as the file gives it."""
    return _loaded(flag, lambda value: value.copy_and_resolve_references())


def resolved(flag: flags.FlagHolder) -> config.Config:
    """The config of the flag, as frozen dataclasses."""
    return _loaded(flag, config.resolve)


def _loaded(flag: flags.FlagHolder, use: Callable[[ml_collections.ConfigDict], T]) -> T:
    if flag.value is None:
        raise ConfigError("--config is missing; for example --config=configs/tiny.py")
    try:
        return use(flag.value)
    except OSError as error:  # the file was not found, which absl says only now
        raise ConfigError(f"--config cannot be loaded: {_flat(error)}") from error


def _flat(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())
