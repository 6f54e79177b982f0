"""List every compression policy: parts, stored bits per element, source.

python -m launch.policies            a table
python -m launch.policies --write=README.md   renew the table between the markers of a Markdown file
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from kvjax import policies
from launch import cli

BEGIN, END = "<!-- policies:begin -->", "<!-- policies:end -->"


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("write", "", "Markdown file whose table is renewed", flag_values=f)


def table() -> str:
    """A Markdown table of the registry, one row a method."""
    rows = ["| policy | parts | bits | source |", "|---|---|---|---|"]
    hidden = {"Uniform", "Tokens", "Drop", "Plain"}
    for name in policies.names():
        d = policies.describe(name)
        parts = ", ".join(f"{part}: {kind}" for part, kind in d.parts.items() if kind not in hidden) or "none"
        source = f"{d.title} ([{d.arxiv}](https://arxiv.org/abs/{d.arxiv}))" if d.arxiv else d.title
        rows.append(f"| `{name}` | {parts} | {d.bits_per_element:g} | {source} |")
    return "\n".join(rows)


def main(f: flags.FlagValues) -> None:
    """Print the table, or write it into a file."""
    if not f.write:
        print(table())
        return
    path = pathlib.Path(f.write)
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    path.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
