"""Measure quality against bytes: every policy on every task.

    python -m launch.eval --tasks=ruler:DIR --policies='full;snapkv(budget=0.5)' --limit=4 --out=out/e.json

Tasks: ruler:DIR (RULER .jsonl files), ruler_synthetic:LENGTH, needle:LENGTH, ppl:FILE. The context is
compressed before the question is known, unless --query_aware. A table goes to stdout, rows to --out, a plot
beside it; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags
from tqdm import tqdm

from kvjax import policies
from launch import cli
from launch.evaluation.engine import ModelEngine
from launch.evaluation.report import plot, table
from launch.evaluation.results import Store
from launch.evaluation.runner import evaluate
from launch.evaluation.samples import Sample
from launch.evaluation.tasks import Source, parse_tasks
from launch.session import check_model_flags, define_model_flags, open_session


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string(
        "tasks", "ruler_synthetic:2048", "comma-separated list of tasks, see above", flag_values=f
    )
    flags.DEFINE_string(
        "policies",
        "full",
        "policy specs separated by ';'; @all is every method by its defaults",
        flag_values=f,
    )
    flags.DEFINE_integer("limit", 0, "samples (or windows) per task; 0: all there are", flag_values=f)
    flags.DEFINE_string("out", "out/eval.json", "results file", flag_values=f)
    flags.DEFINE_bool("query_aware", False, "compress context and question together", flag_values=f)
    flags.DEFINE_bool(
        "select_question",
        False,
        "feed questions token by token, so that selectors choose for them as well",
        flag_values=f,
    )
    flags.DEFINE_integer("batch", 1, "samples in one batch, of their own lengths", flag_values=f)
    flags.DEFINE_integer("seed", 0, "of the tasks that are generated", flag_values=f)
    flags.DEFINE_integer(
        "ppl_context", 1024, "perplexity: tokens compressed before each window", flag_values=f
    )
    flags.DEFINE_integer("ppl_targets", 1024, "perplexity: tokens scored per window", flag_values=f)
    define_model_flags(f)


def main(f: flags.FlagValues) -> None:
    """Check the flags, load the model, evaluate what the results file does not hold yet, report."""
    specs = read_policies(f.policies)
    check_model_flags(f)
    if f.limit < 0:
        raise ValueError(f"--limit must not be negative, got {f.limit}")
    if f.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {f.batch}")
    out = pathlib.Path(f.out)
    if out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {f.out}")
    session = open_session(f)
    source = Source(session.encode, f.limit, f.seed, f.ppl_context, f.ppl_targets)
    tasks = parse_tasks(f.tasks, source)
    engine = ModelEngine(session, query_aware=f.query_aware, select_question=f.select_question)
    engine.prepare([item for task in tasks for item in task.items if isinstance(item, Sample)])
    settings = {
        "model": session.model.fingerprint,
        "dtype": session.dtype,
        "backend": session.backend,
        "query_aware": f.query_aware,
        "chunk": f.chunk,
        "mesh": f.mesh,
        "batch": f.batch,
    }
    if f.select_question:
        settings["select_question"] = True
    total = len(specs) * sum(len(task.items) for task in tasks)
    with tqdm(total=total, desc="samples", unit="sample", smoothing=0.1) as bar:
        rows = evaluate(engine, tasks, specs, Store(out), settings, batch=f.batch, advance=bar.update)
    picture = out.with_suffix(".png")
    scored = any(row["score"] is not None for row in rows)
    if scored:
        plot(rows, picture)
    print(table(rows))
    for note in filter(None, (task.note for task in tasks)):
        print(note)
    print(f"\n{session.model.name} {session.model.fingerprint}, {session.dtype}, {session.backend}")
    if not scored:
        raise ValueError(f"no sample was scored; the first error: {rows[0]['errors'][0]}")
    print(f"rows in {out}, plot in {picture}, samples in {Store(out).samples}")


def read_policies(text: str) -> list[str]:
    """Canonical policy names of a ';'-separated list, each once; ValueError for a bad spec or none."""
    names: list[str] = []
    for spec in filter(None, (part.strip() for part in text.split(";"))):
        every = policies.names() if spec == "@all" else [spec]
        names += [policies.parse(one).name for one in every]
    if not names:
        raise ValueError("--policies is empty; write e.g. 'full;snapkv(budget=0.5)' or @all")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
