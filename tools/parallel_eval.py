"""Run `launch.eval` on many policies in parallel processes of one machine, then print one table.

    python tools/parallel_eval.py --specs=FILE --jobs=12 --out=DIR [--seconds=N] -- --tasks=ruler:DIR --limit=24

FILE has one policy spec a line. Each process takes the next spec when it is done with one; every result is
its own `launch.eval` file in DIR (so a run goes on where it stopped), and DIR/rows.json holds all rows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time


def run(spec: str, out: pathlib.Path, rest: list[str], deadline: float) -> tuple[str, list[dict], str, float]:
    """One policy in one process: (spec, rows, last line of an error, seconds)."""
    start = time.monotonic()
    file = out / (hashlib.sha1(spec.encode()).hexdigest()[:12] + ".json")
    command = [sys.executable, "-m", "launch.eval", f"--policies={spec}", f"--out={file}", *rest]
    if start > deadline:
        return spec, [], "not started: out of time", 0.0
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, deadline - start))
    except subprocess.TimeoutExpired:
        return spec, [], "out of time", time.monotonic() - start
    rows = json.loads(file.read_text()) if done.returncode == 0 else []
    error = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1][-300:]
    return spec, rows, error, time.monotonic() - start


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--specs", required=True)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    args, rest = parser.parse_known_args()
    rest = [x for x in rest if x != "--"]
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    specs = [s.strip() for s in open(args.specs) if s.strip() and not s.startswith("#")]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    deadline = time.monotonic() + args.seconds
    rows: list[dict] = []
    failures = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for spec, new, error, seconds in pool.map(lambda s: run(s, out, rest, deadline), specs):
            rows += new
            if error:
                failures.append(f"{spec}: {error}")
            (out / "rows.json").write_text(json.dumps(rows, indent=0))
            print(f"{seconds:6.0f} s  {spec}", file=sys.stderr, flush=True)
    print("\n".join(failures))
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    for policy in policies:
        mine = [r for r in rows if r["policy"] == policy]
        score = sum(r["score"] for r in mine) / len(mine)
        share = mine[0]["cache_bytes"] / mine[0]["full_cache_bytes"]
        tasks = " ".join(f"{r['score']:.0f}" for r in mine)
        print(f"{score:6.2f}  {100 * share:5.1f}%  {policy}  [{tasks}]")


if __name__ == "__main__":
    main()
