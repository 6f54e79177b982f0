"""What every command shares: its own flags, a short `--help`, and one-line errors.

Exit codes: 0 success; 2 bad input, told in one line on stderr; 1 a bug, with its traceback.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

import jax
from absl import flags
from tqdm import tqdm

OWN_PACKAGES = ("launch", "models", "kvjax", "pallas_kernels")
MAX_LINE = 2000  # characters of an error line
REPEAT = "repeat this option"  # what absl appends to the help of a repeatable flag

Define = Callable[[flags.FlagValues], None]
Main = Callable[[flags.FlagValues], None]


def run(define: Define, main: Main, argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (without the program name; None: sys.argv) into fresh flags, call `main`; the exit code.

    define: adds the command's flags to a `FlagValues` of its own, so that several commands can live in one
    process. The module docstring of `define` is the text of `--help`.
    """
    values = flags.FlagValues()
    define(values)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(a in ("-h", "-help", "--help") for a in argv):
            print(usage(inspect.getdoc(inspect.getmodule(define)) or "", values))
            return 0
        extra = values(["", *argv])[1:]
        if extra:
            raise flags.Error(f"unexpected argument {extra[0]!r}; flags are written --name=value")
        main(values)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (what is left in the buffer has no reader)
        return 0
    except Exception as error:
        message = explain(error)
        if message is None:
            traceback.print_exc()
            return 1
        return _fail(message, 2)
    return 0


def usage(doc: str, values: flags.FlagValues) -> str:
    """The text of `--help`: what the command does, then one entry a flag in the order of definition."""
    lines = [doc, "", "flags:"]
    for name in values:
        flag = values[name]
        head = f"--{name}" if flag.default in (None, "", []) else f"--{name}={flag.default}"
        text = (flag.help or "").split(REPEAT)[0].rstrip("; \n")
        lines += textwrap.wrap(f"{head:<24} {text}", 108, initial_indent="  ", subsequent_indent=" " * 27)
    return "\n".join(lines)


def explain(error: Exception) -> str | None:
    """One line for a user's mistake or for too little memory; None for anything that looks like a bug.

    A mistake is a bad flag, a file that cannot be opened, or a ValueError that this project raised; one
    that comes out of a library was not meant for the user, and keeps its traceback.
    """
    if isinstance(error, flags.Error):
        text = str(error).replace("Unknown command line flag", "unknown flag")
        return _one_line(text)
    if isinstance(error, MemoryError):
        return _one_line(f"not enough memory: {error or 'an allocation on the host failed'}")
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _out_of_memory(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return _one_line(f"{error.filename}: {error.strerror}")
    if isinstance(error, ValueError) and _raised_by_us(error.__traceback__):
        return _one_line(str(error))
    return None


def _out_of_memory(message: str) -> str | None:
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    asked = re.search(r"allocat\w* (\d+) bytes", message)
    if asked:
        size = int(asked[1])
        return f"not enough memory: asked for {size} bytes ({size / 2**30:.2f} GiB)"
    return _one_line(f"not enough memory: {message}")


def _raised_by_us(trace: TracebackType | None) -> bool:
    module = ""
    while trace is not None:
        names = trace.tb_frame.f_globals
        spec = names.get("__spec__")
        module = spec.name if spec is not None else names.get("__name__", "")
        trace = trace.tb_next
    return module.split(".")[0] in OWN_PACKAGES


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_LINE]


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    for bar in list(getattr(tqdm, "_instances", ())):  # an open progress bar would share the line
        bar.close()
    print(f"error: {message}", file=sys.stderr)
    return code
