"""The soak: runs of train.py that are killed at any moment and resumed must end like one that is left alone.

    python bench.py soak --kills 100        100 runs' worth of SIGKILLs, some seconds each

A small run is killed in one function after the other, in the order of a run's life, each time at a random moment of the
function's first or second call, and resumed, until it has come to its end; then the next one begins. On a CPU with one
thread every file of it must have the bytes of a run that nobody touched, but for times and memory.
"""

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

SOAK = ("--out run --sft_steps 6 --judge_steps 6 --batch_size 8 --eval_prompts 8 --attack_tokens 8 --response_tokens 6 "
        "--save_every 1 --rounds 2 --attacker_steps 1 --defender_steps 2 --mine 8 --restart 1 --kl_anchor previous "
        "--critic separate --average distill").split()
SOAK_PROGRAM = """
import os, sys
import gpo, run, train, world

def announce(owner, name, around=["between"]):  # on stdout, when it begins, and when what is around it goes on
    def announced(*args, real=getattr(owner, name), **kwargs):
        around.append(name)
        os.write(1, f"\\n@{around[-1]}\\n".encode())
        result = real(*args, **kwargs)
        around.pop()
        os.write(1, f"\\n@{around[-1]}\\n".encode())
        return result
    setattr(owner, name, announced)

WHERE = (  # each name where it is looked up
         (train, "begin prepare play ppo_update"), (world, "sft train_judge"), (run.Run, "load save evaluate"),
         (run, "play distill save_policy draw_curves write_report"), (gpo, "call_judge"))
for owner, names in WHERE:
    for name in names.split():
        announce(owner, name)
train.main(sys.argv[1:])
"""


def live(folder: Path, plan: tuple[str, int, float] | None = None) -> tuple[int, list[tuple[str, float]]]:
    """Begin or resume the run in `folder` with one thread. plan (function, n, seconds): kill it so long after the n-th
    call of this function has begun. Returns (exit status, [(function, when it began)]); stderr goes to a file."""
    command = ["--resume", "run"] if (folder / "run" / "config.json").exists() else SOAK
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    began, calls = [], Counter()
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
    """A JSON object without the names that begin so."""
    return {name: value for name, value in json.loads(line).items() if not name.startswith(beginnings)}


def contents(run: Path) -> dict:
    """{file: what must be the same in two runs}: all but times, memory, how it was started, and older checkpoints."""
    older = set(sorted((run / "checkpoints").glob("*step_*"))[:-1])
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*")
             if path.is_file() and path.name != ".lock" and not older & set(path.parents)}
    files["metrics.jsonl"] = [_without(line, "time/") for line in files["metrics.jsonl"].splitlines()]
    files["summary.json"] = _without(files["summary.json"], "seconds", "memory", "config")
    files["config.json"] = _without(files["config.json"], "versions")
    return files


def _kill_until_its_end(folder, durations, kills, fell, rng, bar):
    """One run, begun, killed and resumed until it ends or there were enough kills; `fell` counts where they fell.
    durations: {function: seconds of each call in a run left alone}. Returns the exit status."""
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        name = list(durations)[fell.total() % len(durations)]
        n = rng.integers(min(2, len(durations[name])))  # of what is left: all steps come to be the first or second
        plan = (name, n + 1, rng.uniform(0, durations[name][n])) if fell.total() < kills else None
        status, began = live(folder, plan)
        if status == -signal.SIGKILL:
            fell[began[-1][0]] += 1
            bar.update()
    return status


def soak(kills: int, seed: int) -> int:
    """Prints into which functions the kills fell, and `K kills, 0 lost, 0 different`. Lost: a run that ended with an
    error; different: one whose end is not that of a run left alone. Returns the exit status, 1 where there was either;
    the folders of a failure are kept. Raises ValueError where the run does not even end when it is left alone."""
    place, rng = Path(tempfile.mkdtemp(prefix="soak_")), np.random.default_rng(seed)
    status, began = live(place)
    if status:
        last = (place / "stderr.txt").read_text().splitlines()[-1]
        raise ValueError(f"train.py must come to its end before it can be killed, got {last}")
    alone, durations = contents(place / "run"), defaultdict(list)
    for (name, start), (_, end) in zip(began, began[1:]):
        durations[name].append(end - start)
    fell, wrong = Counter(), Counter()
    with tqdm(total=kills, desc="kills", dynamic_ncols=True) as bar:
        while fell.total() < kills:
            folder = Path(tempfile.mkdtemp(dir=place))
            status = _kill_until_its_end(folder, durations, kills, fell, rng, bar)
            end = {} if status else contents(folder / "run")
            differ = sorted(name for name in {**alone, **end} if alone.get(name) != end.get(name))
            if differ:
                wrong["lost" if status else "different"] += 1
                why = f"ended with status {status}, see stderr.txt" if status else ", ".join(differ)
                bar.write(f"{folder}: {why}", file=sys.stderr)
    print(f"kills in {', '.join(f'{name}: {n}' for name, n in fell.most_common())}")
    print(f"{fell.total()} kills, {wrong['lost']} lost, {wrong['different']} different" + (f"; see {place}" if wrong else ""))
    if not wrong:
        shutil.rmtree(place)
    return int(bool(wrong))
