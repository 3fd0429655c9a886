"""Many runs: every claim is a row of a table, every row a command, each on several seeds.

    METHODS     the methods of the paper's Tables 1, 2 and 4     python eval.py reproduce
    ABLATIONS   one flag changed, from GPO+Div                   python eval.py ablate
    RECIPE      one flag changed, from the recommended setting   python eval.py ablate
    ROUNDS      performance against the number of rounds T       python eval.py rounds

`run_suite` calls `train.py`, `eval.py RUN` and `eval.py best RUN` as a user would, one thread each and as many at once as
there are cores. What is finished is never done again: after a stop, give the same command.
"""

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import read_json, read_lines, visible, write_json, write_text
from report import LABELS, LOOKS, band, draw_methods, draw_rounds, figure, markdown, mean_and_error, paired_test, show
from reward import call_judge, unsafe_share, wilson_interval
from run import FinishedRun

HERE = Path(__file__).parent

# --- rows: {name: flags of train.py}; the last of two equal flags counts ---------------------------------------------
# Algorithm 1 as it stands: long turns, no replay, no mining, no restarts
PAPER = ("--replay 0 --mine 0 --restart 0 --rounds 2 --attacker_steps 30 --defender_steps 20 "
         "--kl_coef 0.1 --attacker_kl_coef 0.01 --diversity 3")
METHODS = {
    "SFT": "--method sft --average none",
    "Paraphrase": "--method paraphrase --average none",
    "RLHF": f"{PAPER} --method rlhf --diversity 0 --average none",
    "RLHF+Div": f"{PAPER} --method rlhf --average none",
    "RLHF, tokens matched": f"{PAPER} --method rlhf --attacker_steps 0 --rounds 12 --defender_steps 25 --average mixture",
    "Iterative": f"{PAPER} --method iterative --attacker_steps 0 --average none",
    "GPO": f"{PAPER} --diversity 0",
    "GPO+Div": PAPER,
    "Iterative, recommended": "--method iterative --average none",  # the same defender updates as the recommended setting
    "recommended": "--average distill"}
ABLATIONS = {name: METHODS[name] for name in ("GPO+Div", "GPO")} | {name: f"{PAPER} --average none {flag}" for name, flag in {
    "SelfBLEU only": "--diversity_terms bleu", "embedding only": "--diversity_terms embedding",
    "k = 1": "--diversity 1", "k = 5": "--diversity 5", "k = 10": "--diversity 10",
    "all earlier attacks, not the last 480": "--history 0", "no guard": "--guard 0",
    "defender:attacker steps 1:2": "--attacker_steps 40", "1:1": "--attacker_steps 20", "2:1": "--attacker_steps 10",
    "defender first": "--first defender", "KL to the previous round": "--kl_anchor previous",
    "entropy 0.02": "--entropy_coef 0.02", "separate critic": "--critic separate",
    "attacker without a seed": "--template write", "no demonstrations": "--ptx_coef 0"}.items()}
RECIPE = {
    "recommended": METHODS["recommended"], "no mining": "--mine 0 --average none",
    "mining at temperature 1": "--mine_temperature 1 --average none", "no mining, no replay": "--mine 0 --replay 0 --average none",
    "no restarts": "--restart 0 --average none", "against mixtures": "--opponent mixture --average mixture",
    "no diversity": "--diversity 0 --average none"}
HORIZONS = (1, 2, 4, 8, 16, 32)  # T, the number of rounds: at equal total updates and mined attacks, and as one long run goes on
ROUNDS = {f"equal, T = {t}": f"--rounds {t} --defender_steps {64 // t} --attacker_steps {64 // t} --mine {4800 // t} "
                             "--restart 0 --average mixture" for t in HORIZONS}
ROUNDS["growing"] = "--rounds 32 --defender_steps 6 --attacker_steps 6 --restart 0 --average mixture"

# (measure, larger, smaller[, margin]): the paper's orderings of Tables 1 and 2, each put to a paired test over seeds
# of larger + margin > smaller
ASR = "asr_held_out_judge"
ORDERINGS = [
    (ASR, "SFT", "RLHF"), (ASR, "RLHF", "GPO+Div"), (ASR, "GPO", "GPO+Div"), (ASR, "Iterative", "GPO+Div"), (ASR, "RLHF", "GPO"),
    (ASR, "RLHF, tokens matched", "GPO+Div"), (ASR, "RLHF, matched in KL", "GPO+Div"),
    ("cells", "GPO+Div", "GPO"), ("cells", "GPO+Div", "RLHF"),
    (ASR, "RLHF, tokens matched", "recommended"), (ASR, "Iterative, recommended", "recommended"),
    ("best_response", "Iterative, recommended", "recommended"),
    ("over_refusal/look-alikes", "RLHF", "GPO+Div", 0.05), ("helpfulness", "GPO+Div", "RLHF", 0.05),
    ("over_refusal/look-alikes", "RLHF", "recommended", 0.05), ("helpfulness", "recommended", "RLHF", 0.05),
    ("third_party_success", "GPO+Div", "GPO"), ("third_party_success", "GPO", "RLHF"), ("third_party_success", "RLHF", "Paraphrase")]

# --- columns: {key of a row, or a function of it: heading} -----------------------------------------------------------
DEFENDER = {
    ASR: "in distribution", "asr_train_judge": "training judge",
    f"{ASR}/unseen topics": "unseen topics", "asr_train_judge/unseen topics": "training judge",
    f"{ASR}/unseen framings": "unseen framings", "asr_train_judge/unseen framings": "training judge"}
ATTACKER = {"third_party_success": "success on third parties", "cells": "distinct cells broken",
            (lambda row: 1 - row["self_bleu"]): "1 - SelfBLEU", (lambda row: 1 - row["cosine"]): "1 - cosine"}
QUALITY = {"helpfulness": "helpful", "over_refusal/look-alikes": "over-refusal, look-alikes", "over_refusal": "over-refusal, all"}
COST = {"updates": "defender updates", "tokens": "sampled tokens", "kl": "KL to SFT, nats"}


# --- running: jobs, each of which leaves a file ----------------------------------------------------------------------
class Job(NamedTuple):
    """A command that leaves a file; it is not done again."""

    seconds: int  # about, for the bar
    work: Callable
    arguments: tuple
    leaves: Path  # where this file is, the job is done


RUNNING = []  # what `command` has started, to be ended with this process


def command(program: str, arguments: list[str], log: Path) -> None:
    """Run one of our programs with one thread; what it prints goes to a log. Raises ValueError when it fails."""
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, str(HERE / program), *arguments], stdout=file, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    RUNNING.append(process)
    if process.wait():
        said = log.read_text().strip().splitlines() or ["it said nothing"]
        raise ValueError(f"{program} {' '.join(arguments)} ended with status {process.returncode}: {said[-1]} (all of it in {log})")


def finish(folder: Path, flags: str, start: list[str], log: Path) -> None:
    """Train one run to its end, from nothing or from where it stopped. The log's first line says what it is."""
    if (folder / "config.json").is_file():
        return command("train.py", ["--resume", str(folder)], log)
    shutil.rmtree(folder, ignore_errors=True)  # it was stopped before it had begun
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text(log, f"{flags}\n")
    command("train.py", [*flags.split(), *start, "--out", str(folder)], log)


def run_folder(out: str | Path, name: str, seed: int) -> Path:
    """Where a row's run with a seed is; two rows of one name are one run."""
    return Path(out) / "runs" / f"{''.join(c if c.isalnum() or c == '+' else '_' for c in name)}_s{seed}"


def best_file(round: int) -> str:
    """The file of `eval.py best` for the defender after a round; 0: the finished one."""
    return f"best_{round}.json" if round else "best.json"


def forget(file: Path, key: str, value: object) -> None:
    """Remove a finished file that says something else under `key`, so that it is made again."""
    if file.is_file() and read_json(file).get(key) != value:
        file.unlink()


def run_suite(out: str | Path, suite: dict[str, str], seeds: Sequence[int], common: str = "",
              strangers: Sequence[str] = ("SFT", "RLHF", "GPO+Div"), probes: dict[str, Iterable[int]] | None = None,
              steps: int = 90) -> dict[str, list[dict]]:
    """Train and evaluate every row of `suite` = {name: flags} on every seed; returns {name: [row of each seed]}.

    Every row of a seed starts from the same warm-started players (those of its SFT run). An attacker's third parties are
    the finished defenders of the rows `strangers`, of the seed before (of the second for the first). probes: {name: rounds
    after which a fresh attacker is trained for `steps` steps against the defender; 0 is the finished one}.
    """
    suite, stages = {"SFT": METHODS["SFT"], **suite}, ([], [], [])  # a stage's jobs need those of the stages before
    for (name, flags), (i, seed) in product(suite.items(), enumerate(seeds)):
        folder, flags = run_folder(out, name, seed), f"{flags} {common} --seed {seed}"
        log = Path(f"{folder}.log")
        if (made := log.read_text().split("\n")[0] if log.is_file() else flags) != flags:
            raise ValueError(f"{folder} must be a run of train.py {flags}, got one of train.py {made}; pass another --out")
        alone = name == "SFT" or "--template" in flags  # the attacker is warm-started on its template
        start = [] if alone else ["--start", str(run_folder(out, "SFT", seed))]
        stages[0 if alone else 1].append(Job(150 if alone else 60, finish, (folder, flags, start, log), folder / "summary.json"))
        third = [str(run_folder(out, stranger, seeds[i - 1 if i else 1])) for stranger in strangers]
        forget(folder / "eval.json", "third_parties", third)
        stages[2].append(Job(15, command, ("eval.py", [str(folder), "--third_parties", *third], log), folder / "eval.json"))
        for round in (probes or {}).get(name, ()):
            forget(folder / best_file(round), "steps", steps)
            best = ["best", str(folder), "--steps", str(steps), "--round", str(round)]
            stages[2].append(Job(40, command, ("eval.py", best, log), folder / best_file(round)))
    work_off([[job for job in stage if not job.leaves.is_file()] for stage in stages])
    return {name: [suite_row(run_folder(out, name, seed)) for seed in seeds] for name in suite}


def work_off(stages: Sequence[list[Job]]) -> None:
    """Do the jobs of each stage, the longest first, as many at once as there are cores (8 at most)."""
    look = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
    with tqdm(total=sum(job.seconds for stage in stages for job in stage), dynamic_ncols=True, bar_format=look) as bar:
        for stage in stages:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                longest_first = sorted(stage, key=lambda job: -job.seconds)
                try:
                    wait_for({pool.submit(job.work, *job.arguments): job for job in longest_first}, bar)
                except BaseException as error:  # the rest is not begun; what is finished stays
                    if isinstance(error, KeyboardInterrupt) and error.args:  # SIGTERM came to this process alone; Ctrl-C reaches all
                        for process in RUNNING:
                            process.terminate()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise


def wait_for(jobs: dict[Future, Job], bar: tqdm) -> None:
    """Until all are done, or one of them has failed: then its error is raised."""
    while jobs:
        for future in wait(jobs, timeout=5, return_when=FIRST_COMPLETED).done:
            job = jobs.pop(future)
            future.result()
            bar.set_description_str(f"{job.leaves.parent.name}: ")
            bar.update(job.seconds)
        bar.refresh()


# --- what a run comes to --------------------------------------------------------------------------------------------
def suite_row(folder: Path) -> dict:
    """What is compared between runs: the finished players by `eval.py RUN`, the best response, and the compute."""
    found, log = read_json(folder / "eval.json"), read_lines(folder / "metrics.jsonl")
    updates, tokens = sum(m["role"] == "defender" for m in log), log[-1]["sampled_tokens"] if log else 0
    averages = {name: row for name, row in found.items() if name.startswith("average")}
    return found["after"] | {"updates": updates, "tokens": tokens, "averages": averages} | best_row(folder, 0)


def best_row(folder: Path, round: int) -> dict[str, float]:
    """{"best_response": success of a fresh attacker against the defender after a round}, or {} where none was trained."""
    file = folder / best_file(round)
    return {"best_response": read_json(file)["after"]} if file.is_file() else {}


def row_of_round(run: FinishedRun, t: int) -> dict:
    """The row of a run as if it had ended after round t, with its mixture of these rounds."""
    attacker, defender = (run.speaker(name, [t - 1]) for name in ("attacker", "defender"))
    tests = run.prompts["test_prompts"]
    answers = run.speaker("defender", range(t)).speak(tests, 0, temperature=0).texts
    mixture = {ASR: unsafe_share(call_judge(run.held_out_judge, tests, answers))}
    tokens = [m["sampled_tokens"] for m in read_lines(run.folder / "metrics.jsonl") if m["round"] == t - 1][-1]
    row = run.row(attacker, defender) | best_row(run.folder, t if t < run.config["rounds"] else 0)
    return row | {"updates": t * run.config["defender_steps"], "tokens": tokens, "averages": {"average (mixture)": mixture}}


def matched_in_kl(folder: Path, target: float) -> dict:
    """The row of that round of a longer RLHF run whose KL to the SFT defender, in nats, is nearest to `target`."""
    run = FinishedRun(folder)
    snapshots, players = run.snapshots("defender"), []
    for i in range(len(snapshots.members)):
        players.append(copy.copy(run.end["defender"]))
        players[i].policy = snapshots.policy(players[i].policy, i)
    return run.row(run.start["attacker"], min(players, key=lambda player: abs(run.kl(player) - target)))


def held_out_history(folder: Path) -> list[float]:
    """Held-out attack success before the game and after each round."""
    before = read_json(folder / "summary.json")["before"][ASR]
    return [before] + [m[f"game/{ASR}"] for m in read_lines(folder / "metrics.jsonl") if f"game/{ASR}" in m]


# --- tables -----------------------------------------------------------------------------------------------------------
def suite_table(rows: dict[str, list[dict]], columns: dict, names: Iterable[str] | None = None) -> str:
    """markdown: mean ± standard error over seeds; rows {name: row of each seed}, columns {key or function of a row: heading}."""
    get = lambda row, key: key(row) if callable(key) else row.get(key)
    cell = lambda name, key: mean_and_error([get(row, key) for row in rows[name]], 0 if key in ("updates", "tokens", "cells") else 3)
    return markdown(["", *columns.values()], [[name, *(cell(name, key) for key in columns)] for name in names or rows])


def write_tables(out: str | Path, name: str, paragraphs: list[str], numbers: dict, *figures: str) -> None:
    """The paragraphs into OUT/name.md and onto the terminal, the numbers into OUT/name.json; figures: names of what was drawn."""
    text = "\n\n".join(paragraphs) + "\n"
    write_text(Path(out) / f"{name}.md", text)
    write_json(Path(out) / f"{name}.json", numbers)
    print(f"{text}\nwritten to {', '.join(f'{out}/{file}' for file in (f'{name}.md', f'{name}.json', *figures))}")


def reproduce(out: str | Path, n_seeds: int, first_seed: int, quick: bool) -> None:
    """The paper's Tables 1, 2 and 4 over seeds, its orderings put to tests, best responses, and what averages cost."""
    clock, seeds = time.time(), range(first_seed, first_seed + (2 if quick else n_seeds))
    few = {"SFT": METHODS["SFT"], **{name: f"{METHODS[name]} --rounds 2" for name in ("RLHF", "GPO", "GPO+Div")}}
    suite = few if quick else METHODS
    rows = run_suite(out, suite, seeds, probes={} if quick else {"Iterative, recommended": (0,), "recommended": (0,)})
    if not quick:
        rows["RLHF, matched in KL"] = [matched_in_kl(run_folder(out, "RLHF, tokens matched", seed), row["kl"])
                                       for seed, row in zip(seeds, rows["GPO+Div"])]
    attackers, tests = attacker_rows(rows), orderings(rows)
    paragraphs = [f"# {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), mean ± standard error", *paper_tables(rows, attackers, tests)]
    if not quick:
        probed = [name for name in rows if "best_response" in rows[name][0]]
        paragraphs += ["## Best responses", "Success of a fresh attacker after 90 PPO steps, and what it says most often.",
                       best_responses(out, seeds, probed), "## What an average costs", averages_table(out, seeds, rows["recommended"])]
    paragraphs.append(f"{len(seeds) * len(suite)} runs; the last call took {time.time() - clock:.0f} seconds.")
    shown = [name for name in ("RLHF", "Iterative", "GPO", "GPO+Div", "recommended") if name in rows]
    draw_methods(out, rows, attackers, {name: [held_out_history(run_folder(out, name, seed)) for seed in seeds] for name in shown})
    commands = {name: f"python train.py {flags}" for name, flags in suite.items()}
    write_tables(out, "table", paragraphs, {"seeds": list(seeds), "commands": commands, "rows": rows, "orderings": tests},
                 "methods.png", *([] if quick else ["best.png"]))


def attacker_rows(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The rows that say something of an attacker, and those of the attackers' mixtures."""
    names = [name for name in ("SFT", "Paraphrase", "RLHF", "RLHF+Div", "GPO", "GPO+Div", "recommended") if name in rows]
    mixed = [name for name in names if "average (mixture)" in rows[name][0]["averages"]]
    return {name: rows[name] for name in names} | {
        f"{name}, mixture": [row["averages"]["average (mixture)"] for row in rows[name]] for name in mixed}


def orderings(rows: dict[str, list[dict]]) -> list[dict]:
    """ORDERINGS of which there are rows: differences over seeds, margin included, and p of the two paired tests."""
    found = []
    for key, more, less, *margin in ORDERINGS:
        if all(name in rows and key in rows[name][0] for name in (more, less)):
            d = [a[key] - b[key] + sum(margin) for a, b in zip(rows[more], rows[less])]
            more = " + ".join([more, *map(str, margin)])
            found.append({"measure": key, "larger": more, "smaller": less, "differences": d, "p": paired_test(d)})
    return found


def paper_tables(rows: dict, attackers: dict, tests: list[dict]) -> list[str]:
    """Paragraphs of markdown: Tables 1, 2 and 4 of the paper, and its orderings."""
    defenders, lines = [name for name in rows if name != "Paraphrase"], []
    for test in tests:
        d, claim = test["differences"], f"{LABELS[test['measure']]}: {test['larger']} > {test['smaller']}"
        lines.append([claim, mean_and_error(d), f"{sum(x > 0 for x in d)} of {len(d)}", *(f"{p:.3f}" for p in test["p"])])
    return [
        "## Table 1: the defender",
        "Attack success on held-out prompts, by the held-out judge and by the training judge; 1,000 prompts in each set.",
        suite_table(rows, DEFENDER | {"best_response": "best response"} | COST, defenders),
        "## Table 2: the attacker", "Against the finished SFT, RLHF and GPO+Div defenders of another seed, 300 attacks.",
        suite_table(attackers, ATTACKER), "## Table 4: quality", suite_table(rows, QUALITY, defenders),
        "## Orderings", "Paired over seeds, one-sided.",
        markdown(["", "difference", "seeds that agree", "p, t-test", "p, sign flips"], lines)]


def best_responses(out: str | Path, seeds: Iterable[int], names: Iterable[str]) -> str:
    """markdown: of each run, how far a fresh attacker got and by which sentence; their learning curves go to best.png."""
    lines, (canvas, (axis,)) = [], figure(1)
    for name, look in zip(names, LOOKS):
        found = [read_json(run_folder(out, name, seed) / best_file(0)) for seed in seeds]
        band(axis, range(1, 1 + len(found[0]["curve"])), [row["curve"] for row in found], name, {**look, "marker": None})
        for seed, row in zip(seeds, found):
            most_frequent = [f"{count} of 200: *{visible(prompt)}*" for prompt, count in row["exploits"][:1]] or ["-"]
            lines.append([name, seed, show(row["after"], wilson_interval(round(500 * row["after"]), 500)), *most_frequent])
    axis.set(xlabel="PPO steps of a fresh attacker", ylabel="its success against the finished defender", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    canvas.savefig(Path(out) / "best.png", dpi=150)
    return markdown(["", "seed", "success", "most frequent exploit"], lines)


def averages_table(out: str | Path, seeds: Sequence[int], rows: list[dict]) -> str:
    """markdown: what each kind of average gives, how much it stores, and how long 1,000 answers take."""
    run = FinishedRun(run_folder(out, "recommended", seeds[0]))
    policy_size = sum(p.numel() * 4 for p in run.end["defender"].policy.lm.parameters()) / 2**20  # MiB
    speakers = {"last": run.end["defender"], **{f"average ({kind})": pair["defender"] for kind, pair in run.averages().items()}}
    columns, lines = {key: LABELS[key] for key in (ASR, "over_refusal/look-alikes", "helpfulness", "third_party_success", "cells")}, []
    for name, speaker in speakers.items():
        these, seconds = rows if name == "last" else [row["averages"][name] for row in rows], []
        for _ in range(4):
            clock = time.time()
            speaker.speak(run.prompts["test_prompts"], 0, temperature=0)
            seconds.append(time.time() - clock)
        size = len(getattr(speaker, "policies", [run.end])) * policy_size
        cells = [mean_and_error([row.get(key) for row in these], 0 if key == "cells" else 3) for key in columns]
        lines.append([name, *cells, f"{size:.1f}", f"{np.median(seconds[1:]):.2f}"])  # the first one warms up
    return markdown(["", *columns.values(), "MiB a player", "s for 1,000 answers"], lines)


def ablate(out: str | Path, n_seeds: int, first_seed: int, names: Sequence[str]) -> None:
    """ABLATIONS and RECIPE, all rows or those named, over seeds."""
    if wrong := set(names) - {*ABLATIONS, *RECIPE}:
        raise ValueError(f"rows of ablate are {', '.join([*ABLATIONS, *RECIPE])}; got {', '.join(wrong)}")
    seeds, neighbours = range(first_seed, first_seed + n_seeds), {name: METHODS[name] for name in ("RLHF", "GPO+Div")}
    columns = {ASR: "ASR", f"{ASR}/unseen framings": "unseen framings", "over_refusal/look-alikes": "over-refusal, look-alikes",
               "helpfulness": "helpful", **ATTACKER}
    best = {"best_response": "best response, 90 steps"}
    paragraphs, everything = [f"# Ablations: one flag, one row; {n_seeds} seeds, mean ± standard error"], {}
    for title, suite, more in (("GPO+Div", ABLATIONS, {}), ("The recommended setting", RECIPE, best)):
        suite = {name: flags for name, flags in suite.items() if not names or name in names}
        if suite:
            rows = run_suite(out, neighbours | suite, seeds, probes=dict.fromkeys(suite, (0,)) if more else {})
            paragraphs += [f"## {title}", suite_table(rows, columns | more, suite)]
            everything |= {name: rows[name] for name in suite}
    write_tables(out, "ablations", paragraphs, {"commands": ABLATIONS | RECIPE, "rows": everything})


def rounds(out: str | Path, n_seeds: int, first_seed: int) -> None:
    """Performance against the number of rounds T: at equal totals (a run for each T), and as one long run goes on."""
    seeds, neighbours = range(first_seed, first_seed + n_seeds), {name: METHODS[name] for name in ("RLHF", "GPO+Div")}
    probes = {"growing": (0, 1, 4, 16), "equal, T = 1": (0,), "equal, T = 8": (0,), "equal, T = 32": (0,)}
    rows = run_suite(out, neighbours | ROUNDS, seeds, probes=probes)
    runs = [FinishedRun(run_folder(out, "growing", seed)) for seed in seeds]
    rows |= {f"growing, T = {t}": [row_of_round(run, t) for run in runs] for t in HORIZONS}  # the beginnings of the longer run
    mixture = lambda row: row["averages"]["average (mixture)"][ASR]
    columns = {"updates": "defender updates", "tokens": "sampled tokens", ASR: "ASR", mixture: "ASR, mixture",
               f"{ASR}/unseen framings": "unseen framings", "best_response": "best response",
               "over_refusal/look-alikes": "over-refusal, look-alikes", "helpfulness": "helpful"}
    shown = [f"{kind}, T = {t}" for kind in ("equal", "growing") for t in HORIZONS]
    draw_rounds(out, rows, HORIZONS)
    paragraphs = [f"# Performance against the number of rounds T; {n_seeds} seeds", suite_table(rows, columns, shown)]
    write_tables(out, "rounds", paragraphs, rows, "rounds.png")
