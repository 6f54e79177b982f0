"""Tables and a Pareto plot from rows files of `launch.eval` (or `tools/parallel_eval.py`).

    python tools/leaderboard.py ROWS.json [MORE.json ...] [--perplexity=PPL.json ...] --out=docs/leaderboard.md \
        --plot=docs/pareto.png

RULER rows become one line a policy, best first: mean of the tasks, bytes against the full cache of the same run, the
tasks, seconds. A later file replaces a policy's rows of an earlier one. Policies that only store entries otherwise, and
drop none, go into a table of their own with bits per element and perplexity.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from kvjax import policies
from kvjax.types import ModelShape
from launch.evaluation.report import pareto
from models import zoo
from models.lm import DecoderLM

Row = dict[str, Any]
SHORT = {"niah_": "", "multi": "m-", "single": "s"}


def load(files: Sequence[str]) -> dict[str, dict[str, Row]]:
    """policy -> task -> row."""
    out: dict[str, dict[str, Row]] = {}
    for file in files:
        fresh: dict[str, dict[str, Row]] = {}
        for row in json.loads(pathlib.Path(file).read_text()):
            fresh.setdefault(row["policy"], {})[row["task"]] = row
        out |= fresh
    return out


def mean(rows: dict[str, Row]) -> float:
    """Score over the tasks."""
    return statistics.fmean(r["score"] for r in rows.values())


def share(rows: dict[str, Row]) -> float:
    """Bytes against the full cache."""
    return sum(r["cache_bytes"] for r in rows.values()) / sum(r["full_cache_bytes"] for r in rows.values())


def is_codec(spec: str) -> bool:
    """True for a policy that keeps every entry, in fewer bits."""
    policy = policies.parse(spec)
    return not policy.compresses and policy.selector is None and spec != "full"


def short(task: str) -> str:
    """A task's name for a column."""
    for old, new in SHORT.items():
        task = task.replace(old, new)
    return task


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def leaderboard(scores: dict[str, dict[str, Row]]) -> str:
    """Every policy, best first."""
    tasks = list(next(iter(scores.values())))
    body = []
    for policy, rows in sorted(scores.items(), key=lambda x: -mean(x[1])):
        times = (statistics.median(r[f] for r in rows.values()) * 1e3 for f in ("prefill_s", "decode_s"))
        cells = [f"{rows[t]['score']:.0f}" for t in tasks]
        name = "`" + policy.replace("|", r"\|") + "`"
        body.append([name, f"{mean(rows):.1f}", f"{share(rows):.1%}", *(f"{t:.1f}" for t in times), *cells])
    return markdown(["policy", "mean", "bytes", "prefill ms", "answer ms", *map(short, tasks)], body)


def codecs(scores: dict[str, dict[str, Row]], losses: dict[str, dict[str, Row]], shape: ModelShape) -> str:
    """Codecs by bytes: score, perplexity against the full cache, bytes, bits of an encoded element."""
    base = {p: mean(r) for p, r in losses.items()}
    body = []
    for policy, rows in sorted(scores.items(), key=lambda x: share(x[1])):
        if policy != "full" and not is_codec(policy):
            continue
        codec = policies.parse(policy).codec
        bits = statistics.fmean(
            codec.for_layer(i, shape).bits_per_element(shape.head_dim, "bfloat16")
            for i in range(shape.layers)
        )
        loss = f"{base[policy] / base['full'] - 1:+.2%}" if policy in base and "full" in base else "-"
        body.append(
            [
                f"`{policy}`",
                f"{mean(rows):.2f}",
                loss,
                f"{share(rows):.1%}",
                f"{16 * share(rows):.2f}",
                f"{bits:.2f}",
            ]
        )
    return markdown(["codec", "RULER-4k", "perplexity", "bytes", "bits, all in", "bits, encoded"], body)


def plot(scores: dict[str, dict[str, Row]], path: pathlib.Path) -> None:
    """Score against bytes; the front is labelled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(scores)
    points = [(100 * share(scores[n]), mean(scores[n])) for n in names]
    front = pareto(points)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, side = figure.subplots(1, 2, width_ratios=(3, 2))
    side.axis("off")
    for label, marker, chosen in (
        ("codecs", "s", [i for i, n in enumerate(names) if n != "full" and is_codec(n)]),
        (
            "eviction, merging, and both with a codec",
            "o",
            [i for i, n in enumerate(names) if not is_codec(n)],
        ),
    ):
        axes.scatter(*zip(*(points[i] for i in chosen)), s=16, marker=marker, alpha=0.7, label=label)
    axes.step(*zip(*(points[i] for i in front)), where="post", color="0.5", lw=1, label="Pareto front")
    legend = []
    for n, i in enumerate(front, 1):
        axes.annotate(str(n), points[i], textcoords="offset points", xytext=(-3, 5 + 7 * (n % 2)), fontsize=7)
        legend.append(f"{n}  {points[i][1]:.1f} at {points[i][0]:.1f}%\n    {names[i]}")
    side.text(0, 1, "\n".join(legend), va="top", fontsize=7, family="monospace")
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the compressed context, % of the full cache")
    axes.set_ylabel("RULER-4k, mean of 11 tasks")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--perplexity", nargs="*", default=[])
    parser.add_argument("--intro", help="text file that goes before the tables")
    parser.add_argument("--model", default="kvref-22m", help="a named shape, for bits by layer")
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot", required=True)
    args = parser.parse_args()
    scores = load(args.rows)
    parts = [pathlib.Path(args.intro).read_text().strip()] if args.intro else ["# Leaderboard"]
    parts += ["## Codecs", codecs(scores, load(args.perplexity), DecoderLM(zoo.shape(args.model)).shape)]
    parts += ["## Every policy", leaderboard(scores)]
    pathlib.Path(args.out).write_text("\n\n".join(parts) + "\n")
    plot(scores, pathlib.Path(args.plot))


if __name__ == "__main__":
    main()
