"""Rows, the store that resumes, the table and the plot, with an engine that answers from a list."""

import dataclasses
import json
import math

import pytest

from launch.evaluation import report
from launch.evaluation.results import Record, Store, key_of, row_of
from launch.evaluation.runner import Cost, evaluate
from launch.evaluation.samples import Sample
from launch.evaluation.tasks import PERPLEXITY, STRING_MATCH, Task, Window

ROW_FIELDS = [
    "policy", "task", "metric", "score", "n", "cache_bytes", "full_cache_bytes", "read_fraction", "prefill_s",
    "decode_s",
]  # fmt: skip


class Engine:
    """Answers every question with the context; counts the batches it is asked for."""

    def __init__(self, fail_after=None):
        self.calls, self.fail_after = [], fail_after

    def _cost(self, policy, items):
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((policy, len(items)))
        warm = len(self.calls) > 1
        size = 100 if policy == "full" else 40
        return Cost(size * len(items), 100 * len(items), 0.5, len(items) * (1.0 if warm else 60.0), 2.0, warm)

    def answer(self, policy, samples):
        cost = self._cost(policy, samples)
        return [s.context for s in samples], cost

    def negative_log_likelihood(self, policy, windows):
        cost = self._cost(policy, windows)
        return [float(len(w.context)) for w in windows], cost


def question(i, good):
    return Sample(f"the answer is {i}" if good else "nothing", f"Q{i}", (str(i), "answer"), 8, "t")


TASK = Task("t", STRING_MATCH, tuple(question(i, good=i % 2 == 0) for i in range(5)))
SETTINGS = {"model": "abc", "dtype": "float32"}


def run(out, engine, tasks=(TASK,), policies=("full", "half"), settings=SETTINGS, batch=2):
    return evaluate(engine, tasks, policies, Store(out), settings, batch=batch)


def test_rows_have_the_stated_fields_and_means(tmp_path):
    rows = run(tmp_path / "e.json", Engine())
    assert [list(r) for r in rows] == [ROW_FIELDS, ROW_FIELDS]
    assert rows[0] == {
        "policy": "full",
        "task": "t",
        "metric": "string_match",
        "score": pytest.approx(60.0),
        "n": 5,
        "cache_bytes": 100,
        "full_cache_bytes": 100,
        "read_fraction": 0.5,
        "prefill_s": 1.0,  # the first batch compiled: its 60 s do not count
        "decode_s": 1.0,  # 2 s for the batches of two, 2 s for the last alone
    }
    assert rows[1]["cache_bytes"] == 40
    assert json.loads((tmp_path / "e.json").read_text()) == rows


def test_seconds_come_from_cold_batches_when_there_are_no_others():
    cold = Record(50.0, 1.0, 10, 20, 1.0, 3.0, 4.0, False)
    assert row_of("p", "t", "m", [cold])["prefill_s"] == 3.0


def test_perplexity_is_the_exponential_of_the_mean_over_tokens(tmp_path):
    windows = (Window((1,), (5, 6, 7)), Window((1, 2), (8,)))
    rows = run(tmp_path / "e.json", Engine(), [Task("ppl:f", PERPLEXITY, windows)], ["full"])
    assert rows[0]["score"] == pytest.approx(math.exp((1 * 3 + 2 * 1) / 4))
    assert rows[0]["n"] == 4
    assert rows[0]["metric"] == "perplexity"


def test_a_second_run_asks_the_engine_nothing(tmp_path):
    first = run(tmp_path / "e.json", Engine())
    again = Engine()
    assert run(tmp_path / "e.json", again) == first
    assert again.calls == []


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    whole = run(tmp_path / "whole.json", Engine())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e.json", Engine(fail_after=4))
    assert len(json.loads((tmp_path / "e.json").read_text())) == 1  # the finished row is there
    rest = Engine()
    rows = run(tmp_path / "e.json", rest)
    assert rest.calls == [("half", 2), ("half", 1)]
    assert [r["score"] for r in rows] == [r["score"] for r in whole]


def test_a_line_cut_short_is_dropped_and_computed_again(tmp_path):
    run(tmp_path / "e.json", Engine())
    samples = tmp_path / "e.samples.jsonl"
    text = samples.read_text()
    samples.write_text(text[:-30])
    again = Engine()
    run(tmp_path / "e.json", again)
    assert again.calls == [("half", 1)]
    assert len(samples.read_text().splitlines()) == len(text.splitlines())


def test_more_samples_reuse_the_ones_before(tmp_path):
    few = Task("t", STRING_MATCH, TASK.items[:2])
    run(tmp_path / "e.json", Engine(), [few], ["full"])
    more = Engine()
    rows = run(tmp_path / "e.json", more, [TASK], ["full"])
    assert more.calls == [("full", 2), ("full", 1)]
    assert rows[0]["n"] == 5


@pytest.mark.parametrize("change", [{"model": "other"}, {"dtype": "bfloat16"}])
def test_other_settings_reuse_nothing(tmp_path, change):
    run(tmp_path / "e.json", Engine(), policies=["full"])
    again = Engine()
    run(tmp_path / "e.json", again, policies=["full"], settings={**SETTINGS, **change})
    assert sum(n for _, n in again.calls) == 5


def test_a_foreign_samples_file_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "e.samples.jsonl").write_text('{"key": "k"}\n')
    with pytest.raises(ValueError, match=r"e\.samples\.jsonl:1 is not a record of launch\.eval"):
        Store(tmp_path / "e.json")


def test_keys_do_not_depend_on_the_order_of_their_parts():
    assert key_of(a=1, b=2) == key_of(b=2, a=1)
    assert key_of(a=1, b=2) != key_of(a=2, b=1)


def test_the_table_has_a_line_per_policy_and_a_grid_of_tasks(tmp_path):
    tasks = [TASK, Task("u", STRING_MATCH, TASK.items[:1])]
    text = report.table(run(tmp_path / "e.json", Engine(), tasks))
    lines = text.splitlines()
    assert lines[0].split() == ["policy", "metric", "score", "tasks", "MB", "of", "full", "read", "prefill", "s",
                                "decode", "s"]  # fmt: skip
    assert lines[2].split()[:7] == ["full", "string_match", "80.00", "2", "0.000", "100.0%", "50.0%"]
    assert "half" in lines[3] and "40.0%" in lines[3]
    assert [line.split() for line in lines if line.startswith(("t ", "u "))] == [
        ["t", "60.0", "60.0"],
        ["u", "100.0", "100.0"],
    ]


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(100.0, 90.0), (50.0, 70.0), (50.0, 60.0), (25.0, 75.0), (10.0, 5.0)]
    assert report.pareto(points) == [4, 3, 0]
    assert report.pareto([(100.0, 30.0), (50.0, 31.0), (25.0, 30.5)], lower=True) == [2, 0]


def test_the_plot_is_a_picture(tmp_path):
    windows = Task("ppl:f", PERPLEXITY, (Window((1,), (5, 6)),))
    rows = run(tmp_path / "e.json", Engine(), [TASK, windows])
    report.plot(rows, tmp_path / "e.png")
    data = (tmp_path / "e.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1125, 1440)  # two panels: one a metric


class Disk(Engine):
    """Fails the samples whose context is `broken`; moves bytes."""

    def answer(self, policy, samples):
        texts, cost = super().answer(policy, samples)
        errors = {i: f"row {i}: no space" for i, s in enumerate(samples) if s.context == self.broken}
        return texts, dataclasses.replace(cost, moved_bytes=60.0, disk_bytes=20.0, errors=errors)


def test_failed_samples_are_counted_left_out_of_the_score_and_tried_again(tmp_path):
    engine = Disk()
    engine.broken = "nothing"
    (row,) = run(tmp_path / "e.json", engine, policies=["full"])
    assert list(row) == [*ROW_FIELDS, "moved_bytes_last_step", "disk_bytes_last_step", "failed", "errors"]
    assert (row["score"], row["n"], row["failed"]) == (100.0, 3, 2)
    assert row["errors"] == ["row 1: no space"] * 2
    # The three good samples: two in batches of two, one alone.
    assert (row["moved_bytes_last_step"], row["disk_bytes_last_step"]) == (round((30 + 30 + 60) / 3), 13)
    assert report.table([row]).splitlines()[-1] == "failed: 2 of full, t; the first: row 1: no space"
    again = Disk()
    again.broken = None
    (row,) = run(tmp_path / "e.json", again, policies=["full"])
    assert again.calls == [("full", 2)]
    assert row["score"] == pytest.approx(60.0) and "failed" not in row


def test_a_row_whose_samples_all_failed_has_no_figures(tmp_path):
    engine = Disk()
    engine.broken = "nothing"
    bad = Task("t", STRING_MATCH, tuple(x for x in TASK.items if x.context == "nothing"))
    good, row = run(tmp_path / "e.json", engine, [dataclasses.replace(TASK, name="u"), bad], ["full"])
    assert list(row) == [*ROW_FIELDS, "failed", "errors"]
    assert row["score"] is row["cache_bytes"] is None and (row["n"], row["failed"]) == (0, 2)
    table = report.table([good, row])
    assert table.splitlines()[-1].startswith("failed: 2 of full, t; ")
    report.plot([good, row], tmp_path / "e.png")
    assert report.summary([good, row]) == report.summary([good])


def test_an_error_that_is_not_ours_ends_the_run(tmp_path):
    class Broken(Engine):
        def answer(self, policy, samples):
            raise ValueError("operands could not be broadcast together")

    with pytest.raises(ValueError, match="broadcast"):
        run(tmp_path / "e.json", Broken())
