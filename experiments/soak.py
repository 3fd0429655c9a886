"""Soak test: runs of train.py that are killed at any moment and resumed must end like an undisturbed one.

    python -m experiments.soak --kills 100        100 SIGKILLs, some seconds each

A small run is killed in one function after another, in the order in which a run calls them, at a random moment of the
function's first or second call, and resumed until it finishes; then the next run begins. On a CPU with one thread,
every file must have the same bytes as in an undisturbed run, except for times and memory.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval import run_program
from harness.data import as_a_program, fail

ROOT = Path(__file__).resolve().parent.parent
SOAK = ("--out run --sft_steps 6 --judge_steps 6 --batch_size 8 --eval_prompts 8 --attack_tokens 8 --response_tokens 6 "
        "--save_every 1 --rounds 2 --attacker_steps 1 --defender_steps 2 --mine 8 --kl_anchor previous "
        "--critic separate").split()
SOAK_PROGRAM = """
import os, sys
import train

PARTS = ("begin make_world sft train_judge save_start load play call_judge ppo_update evaluate save save_policy "
         "draw_curves write_report").split()

def announce(frame, event, _):  # on stdout, when a part begins
    code = frame.f_code
    if event == "call" and code.co_name in PARTS and os.path.dirname(train.__file__) in code.co_filename:
        os.write(1, f"\\n@{code.co_name}\\n".encode())

sys.setprofile(announce)
train.main(sys.argv[1:])
"""


def live(folder: Path, plan: tuple[str, int, float] | None = None) -> tuple[int, list[tuple[str, float]]]:
    """Begin or resume the run in `folder` with one thread. plan (function, n, seconds): kill it that many seconds after
    the n-th call of the function began. Returns (exit status, [(function, when it began)]); stderr goes to a file."""
    command = ["--resume", "run"] if (folder / "run" / "config.json").exists() else SOAK
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = []
    calls = Counter()
    with (open(folder / "stderr.txt", "a") as errors,
          subprocess.Popen([sys.executable, "-c", SOAK_PROGRAM, *command], cwd=folder, env=environment,
                           stdout=subprocess.PIPE, stderr=errors, text=True) as process):
        for line in process.stdout:
            if line.startswith("@"):
                name = line[1:-1]
                began.append((name, time.perf_counter()))
                calls[name] += 1
                if plan and plan[:2] == (name, calls[name]):
                    time.sleep(plan[2])
                    process.kill()
    return process.returncode, began


def _without(line, *beginnings):
    """A JSON object without the names with these beginnings."""
    return {name: value for name, value in json.loads(line).items() if not name.startswith(beginnings)}


def outcome(run: Path) -> dict:
    """{file: what must be the same in two runs}: all except times, memory, options and older checkpoints."""
    older = set(sorted((run / "checkpoints").glob("*step_*"))[:-1])
    paths = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "config.json")]
    files = {str(path.relative_to(run)): path.read_bytes() for path in paths if not older & set(path.parents)}
    files["metrics.jsonl"] = [_without(line, "time/") for line in files["metrics.jsonl"].splitlines()]
    files["summary.json"] = _without(files["summary.json"], "seconds", "memory", "config")
    return files


def undisturbed(folder: Path) -> tuple[dict, dict[str, list[float]]]:
    """(`outcome`, {function: seconds of each call}) of an undisturbed run. Raises ValueError if it fails."""
    status, began = live(folder)
    if status:
        last = (folder / "stderr.txt").read_text().splitlines()[-1]
        raise ValueError(f"train.py must come to its end before it can be killed, got {last}")
    began.append(("end", time.perf_counter()))  # of the last part
    durations = defaultdict(list)
    for (name, start), (_, end) in zip(began, began[1:]):
        durations[name].append(end - start)
    return outcome(folder / "run"), durations


def kill_until_its_end(folder: Path, durations: dict, kills: int, fell: Counter, rng: np.random.Generator) -> int:
    """One run, begun, killed and resumed until it ends; after `kills` kills it is left to finish. `fell` counts kills
    by function. durations: those of `undisturbed`. Returns the exit status."""
    while True:
        plan = None
        if fell.total() < kills:
            name = list(durations)[fell.total() % len(durations)]
            n = rng.integers(min(2, len(durations[name])))  # each step is, after some resume, the first or second
            plan = (name, n + 1, rng.uniform(0, durations[name][n]))
        status, began = live(folder, plan)
        if status != -signal.SIGKILL:
            return status
        fell[began[-1][0]] += 1


def soak(args: argparse.Namespace) -> None:
    """Print in which functions the kills fell, and `K kills, 0 lost, 0 different`. Lost: a run that ended with an
    error; different: one whose outcome is not that of an undisturbed run. If there is either, the folders are kept and
    the exit status is 1. Raises ValueError if even an undisturbed run fails."""
    place = Path(tempfile.mkdtemp(prefix="soak_"))
    rng = np.random.default_rng(0)
    alone, durations = undisturbed(place)
    fell = Counter()
    wrong = Counter()
    with tqdm(total=args.kills, desc="kills", dynamic_ncols=True) as bar:
        while fell.total() < args.kills:
            folder = Path(tempfile.mkdtemp(dir=place))
            status = kill_until_its_end(folder, durations, args.kills, fell, rng)
            end = {} if status else outcome(folder / "run")
            differ = sorted(name for name in {**alone, **end} if alone.get(name) != end.get(name))
            if differ:
                wrong["lost" if status else "different"] += 1
                why = f"ended with status {status}, see stderr.txt" if status else ", ".join(differ)
                bar.write(f"{folder}: {why}", file=sys.stderr)
            bar.update(fell.total() - bar.n)
    print(f"kills in {', '.join(f'{name}: {n}' for name, n in fell.most_common())}")
    print(f"{fell.total()} kills, {wrong['lost']} lost, {wrong['different']} different")
    if wrong:
        print(f"see {place}")
        sys.exit(1)
    shutil.rmtree(place)


def main(argv: list[str]) -> None:
    """Parse the arguments and run the soak test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--kills", type=int, default=100, help="enough for several in every part of a run (100)")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error(f"--kills must be at least 1, got {args.kills}")
    run_program(soak, args)


if __name__ == "__main__":
    as_a_program(main)
