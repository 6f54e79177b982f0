"""Rows as a table for the terminal and as a plot of quality against bytes."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

LOWER_IS_BETTER = ("perplexity",)


def by_policy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by policy, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["policy"], []).append(row)
    return groups


def _mean(rows: Sequence[Row], field: str) -> float:
    return sum(r[field] for r in rows) / len(rows)


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row per policy and metric: means over tasks of the score, the bytes, the reads and the seconds."""
    out = []
    for policy, group in by_policy([r for r in rows if r["score"] is not None]).items():
        for metric in dict.fromkeys(r["metric"] for r in group):
            some = [r for r in group if r["metric"] == metric]
            fields = ("score", "cache_bytes", "full_cache_bytes", "read_fraction", "prefill_s", "decode_s")
            means = {f: _mean(some, f) for f in fields}
            out.append({"policy": policy, "metric": metric, "tasks": len(some), **means})
    return out


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A plain-text table: first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = []
    for line in [header, ["-" * w for w in widths], *body]:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Summary per policy, then scores per task: tasks down, policies across by number."""
    head = ["policy", "metric", "score", "tasks", "MB", "of full", "read", "prefill s", "decode s"]
    means = summary(rows)
    body = [
        [
            m["policy"],
            m["metric"],
            f"{m['score']:.2f}",
            str(m["tasks"]),
            f"{m['cache_bytes'] / 1e6:.3f}",
            f"{m['cache_bytes'] / m['full_cache_bytes']:.1%}",
            f"{m['read_fraction']:.1%}",
            f"{m['prefill_s']:.3f}",
            f"{m['decode_s']:.3f}",
        ]
        for m in means
    ]
    out = aligned(head, body)
    policies = list(by_policy(rows))
    scores = {(r["task"], r["policy"]): r["score"] for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    if len(tasks) > 1:
        numbers = [f"[{i}]" for i in range(1, len(policies) + 1)]
        grid = [[t, *(_cell(scores.get((t, p))) for p in policies)] for t in tasks]
        legend = "\n".join(f"{n} {p}" for n, p in zip(numbers, policies))
        out += "\n\n" + aligned(["score by task", *numbers], grid) + "\n" + legend
    for r in rows:
        if r.get("failed"):
            out += f"\nfailed: {r['failed']} of {r['policy']}, {r['task']}; the first: {r['errors'][0]}"
    return out


def _cell(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"


def pareto(points: Sequence[tuple[float, float]], lower: bool = False) -> list[int]:
    """Indices of the points (bytes, score) that no other beats in both, by bytes; `lower`: low scores win."""
    sign = -1 if lower else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or sign * points[i][1] > sign * points[front[-1]][1]:
            front.append(i)
    return front


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Save score against cache bytes (share of the full cache), one panel a metric, with the Pareto front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    means = summary(rows)
    metrics = list(dict.fromkeys(m["metric"] for m in means))
    figure = Figure(figsize=(7.5, 4.8 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(len(metrics), 1, place)
        some = [m for m in means if m["metric"] == metric]
        points = [(100 * m["cache_bytes"] / m["full_cache_bytes"], m["score"]) for m in some]
        front = [points[i] for i in pareto(points, metric in LOWER_IS_BETTER)]
        axes.step(*zip(*front), where="post", color="0.7", zorder=1, label="Pareto front")
        for number, (m, (x, y)) in enumerate(zip(some, points)):
            axes.scatter(x, y, s=36, color=f"C{number % 10}", zorder=2)
            axes.annotate(m["policy"], (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("cache bytes, % of the full cache")
        axes.set_ylabel(metric + (" (lower is better)" if metric in LOWER_IS_BETTER else ""))
        axes.grid(alpha=0.3)
        axes.margins(x=0.25)
        axes.legend(fontsize=8)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
