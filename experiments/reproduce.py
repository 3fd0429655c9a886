"""The evidence: every claim is a row of a table, every row a command of train.py, each on several seeds.

    python -m experiments.reproduce [--quick]            METHODS: the paper's Tables 1, 2 and 4, paired tests, figures
    python -m experiments.reproduce ablate [ROW ...]     ABLATIONS of GPO+Div: one flag changed; all rows or those named
    python -m experiments.reproduce ablate_recommended   RECIPE: the same for the defaults, with best responses
    python -m experiments.reproduce rounds               ROUNDS: the defaults with another number of rounds T

The last three also test each row against the first one, or against the one that is named in BASELINES.

`train.py`, `eval.py RUN` and `experiments.probe RUN` are called as a user would call them, with one thread each and as
many at once as there are cores (at most 8). Finished work is not repeated: after a stop, give the same command.
"""

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eval import after_round, judge_errors, kl, measure, run_program
from gpo import sample
from harness import data, report
from harness.config import parse, resolve
from harness.run import FinishedRun, open_run
from reward import call_judge
from toy import ToyGame

ROOT = Path(__file__).resolve().parent.parent

# --- rows: {name: flags of train.py}; of two equal flags the last one is used ---------------------------------------
# Algorithm 1 as in the paper: long turns; no replay, harmless requests or unlearned answers
PAPER = ("--replay 0 --mine 0 --unlikelihood_coef 0 --benign_share 0 --rounds 2 --attacker_steps 30 "
         "--defender_steps 20 --kl_coef 0.1 --attacker_kl_coef 0.01 --diversity 3")
METHODS = {
    "SFT": "--method sft --average none",
    "Paraphrase": "--method paraphrase --average none",
    "RLHF": f"{PAPER} --method rlhf --diversity 0 --average none",
    "RLHF+Div": f"{PAPER} --method rlhf --average none",
    "RLHF, tokens matched":
        f"{PAPER} --method rlhf --attacker_steps 0 --rounds 12 --defender_steps 25 --average mixture",
    "Iterative": f"{PAPER} --method iterative --attacker_steps 0 --average none",
    "GPO": f"{PAPER} --diversity 0",
    "GPO+Div": PAPER,
    "MART": "--method paraphrase --average none",  # by experiments.mart
    "Iterative, recommended": "--method iterative --average mixture",  # as many defender updates as `recommended`
    "recommended": "--average mixture,weights"}
FLAGS = {
    "SelfBLEU only": "--diversity_terms bleu", "embedding only": "--diversity_terms embedding",
    "k = 1": "--diversity 1", "k = 5": "--diversity 5", "k = 10": "--diversity 10",
    "all earlier attacks, not the last 480": "--history 0", "no likelihood bound": "--min_likelihood 0",
    "defender:attacker steps 1:2": "--attacker_steps 40", "1:1": "--attacker_steps 20", "2:1": "--attacker_steps 10",
    "defender first": "--first defender",
    "authors' turns": "--first defender_twice --defender_steps 13 --attacker_steps 13",  # updates as in the other rows
    "authors' turns / 10": "--first defender_twice --defender_steps 20 --attacker_steps 20",
    "KL to the previous round": "--kl_anchor previous",
    "entropy 0.02": "--entropy_coef 0.02", "separate critic": "--critic separate",
    "attacker without a seed": "--template write", "no demonstrations": "--ptx_coef 0"}
ABLATIONS = {"GPO+Div": METHODS["GPO+Div"], "GPO": METHODS["GPO"],
             **{name: f"{PAPER} --average none {flag}" for name, flag in FLAGS.items()}}
RECIPE = {
    "recommended": METHODS["recommended"], "no known answers": "--unlikelihood_coef 0 --average mixture",
    "no edits": "--edits 0 --average mixture", "no replay": "--replay 0 --average mixture",
    "no harmless requests": "--benign_share 0 --average mixture",
    "against mixtures": "--opponent mixture --average mixture", "against the mean of weights": "--opponent weights",
    "against an exponential average": "--opponent ema --average mixture,ema",
    "no diversity": "--diversity 0 --average mixture", "little mining": "--mine 60 --average mixture",
    "Iterative, recommended": METHODS["Iterative, recommended"],
    "Iterative, no known answers": "--method iterative --unlikelihood_coef 0 --average mixture",
    "Iterative, little mining": "--method iterative --mine 60 --average mixture"}
HORIZONS = (1, 2, 8, 32)  # T, the number of rounds, with the same totals of updates and mined attacks
ROUNDS = {f"T = {t}": f"--rounds {t} --defender_steps {64 // t} --attacker_steps {64 // t} --mine {7200 // t} "
                      "--average mixture" for t in HORIZONS}
SUITES = {"ablate": ABLATIONS, "ablate_recommended": RECIPE, "rounds": ROUNDS}
BASELINES = {"Iterative, no known answers": "no known answers", "Iterative, little mining": "little mining"}
THIRD_PARTIES = ("SFT", "RLHF", "GPO+Div")  # every attacker is tried on their finished defenders
PROBE_STEPS = 90  # PPO steps of a fresh attacker
BEST_RESPONSE = f"best_0_{PROBE_STEPS}.json"  # by experiments.probe, in a run's folder
LABELLED = 400  # exchanges by which the training judge's errors are estimated
NEIGHBOURS = {name: METHODS[name] for name in ("RLHF", "GPO+Div")}  # third parties of SUITES

# (measure, larger, smaller[, margin]): the paper's orderings of Tables 1 and 2. A paired test over seeds tests
# larger + margin > smaller
ASR = "asr_held_out_judge"
ORDERINGS = [
    (ASR, "SFT", "RLHF"), (ASR, "RLHF", "GPO+Div"), (ASR, "GPO", "GPO+Div"), (ASR, "Iterative", "GPO+Div"),
    (ASR, "RLHF", "GPO"), (ASR, "RLHF, tokens matched", "GPO+Div"), (ASR, "RLHF, matched in KL", "GPO+Div"),
    (ASR, "MART", "GPO+Div"), ("cells", "GPO+Div", "GPO"), ("cells", "GPO+Div", "RLHF"), ("cells", "GPO+Div", "MART"),
    (ASR, "RLHF, tokens matched", "recommended"), (ASR, "Iterative, recommended", "recommended"),
    ("best_response", "Iterative, recommended", "recommended"),
    ("over_refusal/look-alikes", "RLHF", "GPO+Div", 0.05), ("helpfulness", "GPO+Div", "RLHF", 0.05),
    ("over_refusal/look-alikes", "RLHF", "recommended", 0.05), ("helpfulness", "recommended", "RLHF", 0.05),
    ("third_party_success", "GPO+Div", "GPO"), ("third_party_success", "GPO", "RLHF"),
    ("third_party_success", "RLHF", "Paraphrase")]

# --- columns: {key of a row: heading} -------------------------------------------------------------------------------
DEFENDER = {ASR: "in distribution", f"{ASR}/unseen topics": "unseen topics",
            f"{ASR}/unseen framings": "unseen framings"}
ATTACKER = {"third_party_success": "success on third parties", "cells": "distinct cells broken",
            "topics": "distinct topics broken", "1 - self_bleu": "1 - SelfBLEU", "1 - cosine": "1 - cosine"}
QUALITY = {"helpfulness": "helpful", "over_refusal/look-alikes": "over-refusal, look-alikes",
           "over_refusal": "over-refusal, all", "refusal": "held-out prompts refused"}
COST = {"updates": "defender updates", "effective_cells": "effective cells in them", "tokens": "sampled tokens",
        "kl": "KL to SFT, nats"}
COUNTS = ("updates", "effective_cells", "tokens", "cells", "topics")  # keys that are shown without decimals


# --- running: jobs {the file that a job writes: (function, *arguments)} ---------------------------------------------
RUNNING = []  # processes that `command` has started, to be ended with this one


def command(program: str, arguments: list[str], log: Path) -> None:
    """Run one of our programs with one thread and append its output to a log. Raises ValueError if it fails."""
    # unbuffered, so that its last line is its error
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, "-m", program, *arguments], env=environment, stdout=file,
                                   stderr=subprocess.STDOUT)
    RUNNING.append(process)
    if process.wait():
        lines = log.read_text().strip().splitlines() or ["it printed nothing"]
        called = f"python -m {program} {' '.join(arguments)}"
        raise ValueError(f"{called} ended with status {process.returncode}: {lines[-1]} (all of it in {log})")


def finish(folder: Path, flags: str, log: Path, program: str) -> None:
    """Train one run to its end, from scratch or from where it stopped."""
    if program == "train" and (folder / "config.json").is_file():
        command(program, ["--resume", str(folder)], log)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        command(program, [*shlex.split(flags), "--out", str(folder)], log)


def run_folder(out: str | Path, name: str, seed: int) -> Path:
    """The folder of a row's run with a seed; rows of the same name share it."""
    plain = "".join(c if c.isalnum() or c == "+" else "_" for c in name)
    return Path(out) / "runs" / f"{plain}_s{seed}"


def check_options(folder: Path, flags: str) -> None:
    """Raises ValueError if the folder holds a run that was begun with options other than these flags."""
    if not (folder / "config.json").is_file():
        return
    wanted = parse([*flags.split(), "--device", "cpu"])
    wanted.resume = str(folder)  # so that the folder may exist
    made = data.read_config(folder)
    for name, value in asdict(resolve(wanted)).items():
        if name not in ("out", "start", "resume", "device") and made.get(name) != value:
            raise ValueError(f"{folder} must be a run with --{name} {value}, got one with {made.get(name)}; "
                             "pass another --out")


def run_suite(out: str | Path, rows: dict[str, str], seeds: Sequence[int],
              probed: Iterable[str] = ()) -> dict[str, list[dict]]:
    """Train and evaluate rows {name: flags of train.py} on every seed; returns {name: [row of each seed]}. All rows of
    a seed start from the warm-started players of its SFT run. Against the finished defenders of the rows in `probed` a
    fresh attacker is trained."""
    rows = {"SFT": METHODS["SFT"], **rows}
    stages = {"warm starts": {}, "games": {}, "measurements": {}}  # {stage: {the file that a job writes: the job}}
    for name in rows:
        for i, seed in enumerate(seeds):
            neighbour = seeds[i - 1] if i else seeds[1]  # its defenders are the third parties
            folder = run_folder(out, name, seed)
            log = Path(f"{folder}.log")
            flags = f"{rows[name]} --seed {seed}"
            check_options(folder, flags)
            program = "experiments.mart" if name == "MART" else "train"
            stage = "warm starts"
            if name != "SFT" and "--template" not in flags:  # the attacker's warm start depends on its template
                stage = "games"
                flags += f" --start {shlex.quote(str(run_folder(out, 'SFT', seed)))}"
            stages[stage][folder / "summary.json"] = (finish, folder, flags, log, program)
            others = [str(run_folder(out, other, neighbour)) for other in THIRD_PARTIES]
            table = folder / "eval.json"
            found = data.read_json(table)["third_parties"] if table.is_file() else others
            if [Path(other).name for other in found] != [Path(other).name for other in others]:  # of other seeds
                table.unlink()
            stages["measurements"][table] = (command, "eval", [str(folder), "--third_parties", *others], log)
            if name in probed:
                arguments = [str(folder), "--steps", str(PROBE_STEPS)]
                stages["measurements"][folder / BEST_RESPONSE] = (command, "experiments.probe", arguments, log)
    for stage, jobs in stages.items():
        missing = [job for file, job in jobs.items() if not file.is_file()]
        data.do_jobs(missing, min(os.cpu_count() or 1, 8), RUNNING, stage)
    return {name: [suite_row(run_folder(out, name, seed)) for seed in seeds] for name in rows}


# --- rows of tables, from the files of the runs ---------------------------------------------------------------------
def suite_row(folder: Path) -> dict:
    """The row of a finished run: the last players by `eval.py RUN`, the best response, and the compute."""
    found = data.read_json(folder / "eval.json")
    log = data.read_lines(folder / "metrics.jsonl")
    row = found["after"]
    if (folder / BEST_RESPONSE).is_file():
        row["best_response"] = data.read_json(folder / BEST_RESPONSE)["after"]
    summary = data.read_json(folder / "summary.json")
    row["updates"] = sum(metrics["role"] == "defender" for metrics in log)
    if "made_by" in summary:  # MART, by supervised updates
        row["updates"] = None
    row["effective_cells"] = effective_cells(folder)
    row["tokens"] = summary.get("sampled_tokens")  # MART does not count them
    row["averages"] = {name: column for name, column in found.items() if name.startswith("average")}
    row["mixture"] = row["averages"].get("average (mixture)", {}).get(ASR)
    return row


toy_game = functools.cache(ToyGame)  # the world, whose topics and framings do not depend on a run's seed


def effective_cells(folder: Path) -> float | None:
    """The effective number of harmful cells that the defender was trained on: exp of the entropy of their frequencies
    in its batches, which is n for n equally frequent cells (Hill, 1973). None without a harmful prompt."""
    toy = toy_game()
    prompts = Counter(exchange["attack"] for exchange in data.read_lines(folder / "games.jsonl")
                      if exchange["role"] == "defender")
    counts = Counter()
    for prompt, n in prompts.items():
        cell = toy.cell_of(prompt)
        if cell and cell[0] < toy.n_harmful:
            counts[cell] += n
    if not counts:
        return None
    p = np.array(list(counts.values())) / counts.total()
    return float(np.exp(-(p * np.log(p)).sum()))


def matched_in_kl(folder: Path, target: float) -> dict:
    """The row of a longer RLHF run after the round whose KL to the SFT defender, in nats, is nearest to `target`."""
    run = open_run(folder)
    defenders = [after_round(run, "defender", t) for t in range(1, run.config.rounds + 1)]
    nearest = min(defenders, key=lambda defender: abs(kl(run.world, defender) - target))
    return measure(run, run.world.first["attacker"], nearest)


def held_out_history(folder: Path) -> list[float]:
    """Held-out attack success before the game and after each round."""
    log = data.read_lines(folder / "metrics.jsonl")
    before = data.read_json(folder / "summary.json")["before"][ASR]
    return [before] + [metrics[f"game/{ASR}"] for metrics in log if f"game/{ASR}" in metrics]


# --- tables ---------------------------------------------------------------------------------------------------------
def suite_cells(repeats: list[dict], keys: Iterable[str]) -> list[str]:
    """Mean ± standard error under each key of the rows of several seeds; "1 - key": of one minus the value. "by seed":
    the best response on each."""
    cells = []
    for key in keys:
        if key == "by seed":
            cells.append(", ".join(f"{row['best_response']:.2f}" for row in repeats))
        else:
            cells.append(report.mean_and_error(values(repeats, key), 0 if key in COUNTS else 3))
    return cells


def values(repeats: list[dict], key: str) -> list[float | None]:
    """What the rows of several seeds have under a key, "1 - key": one minus that."""
    if key.startswith("1 - "):
        return [1 - row[key.removeprefix("1 - ")] for row in repeats]
    return [row.get(key) for row in repeats]


def suite_table(rows: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """markdown: rows {name: row of each seed}, columns {key of a row: heading}."""
    lines = [[name, *suite_cells(repeats, columns)] for name, repeats in rows.items()]
    return report.markdown(["", *columns.values()], lines)


def differences_table(rows: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """markdown: the columns in which a row differs from its baseline with p < .05 (two-sided paired t-test), and the p
    corrected for the rows of that column (Holm). Baselines that are not among the rows: not tested."""
    first = next(iter(rows))
    baselines = {name: BASELINES.get(name, first) for name in rows if name != first}
    pairs = [(name, baseline) for name, baseline in baselines.items() if baseline in rows]
    lines = []
    for key, heading in columns.items():
        differences = [np.subtract(values(rows[name], key), values(rows[baseline], key)) for name, baseline in pairs]
        tails = [min(report.paired_test(d)[0], report.paired_test(-d)[0]) for d in differences]
        p = [min(1, 2 * tail) for tail in tails]
        for (name, baseline), d, plain, corrected in zip(pairs, differences, p, report.holm(p)):
            if plain < 0.05:
                agree = f"{max((d > 0).sum(), (d < 0).sum())} of {len(d)}"
                lines.append([heading, name, baseline, report.mean_and_error(d.tolist(), 0 if key in COUNTS else 3),
                              agree, f"{plain:.3f}", f"{corrected:.3f}"])
    head = ["", "row", "baseline", "difference", "seeds that agree", "p", "p, Holm"]
    return f"Differences tested: {len(pairs) * len(columns)}. Those with p < .05:\n\n{report.markdown(head, lines)}"


def title(out: str | Path, names: Iterable[str], seeds: Sequence[int]) -> str:
    """The seeds of a table, and the commits at which its runs were made."""
    configs = [data.read_json(run_folder(out, name, seed) / "config.json") for name in names for seed in seeds]
    commits = ", ".join(sorted({config["versions"]["commit"] for config in configs}))
    return f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), commit {commits}, mean ± standard error"


def write_tables(out: str | Path, name: str, paragraphs: list[str], numbers: dict) -> None:
    """Write the paragraphs to OUT/name.md and print them; write the numbers to OUT/name.json."""
    text = "\n\n".join(paragraphs) + "\n"
    data.write_text(Path(out) / f"{name}.md", text)
    data.write_json(Path(out) / f"{name}.json", numbers)
    print(f"{text}\nwritten to {out}/{name}.md, {out}/{name}.json")


def reproduce(args: argparse.Namespace) -> None:
    """The paper's Tables 1, 2 and 4 over seeds, tests of its orderings, best responses, and the cost of averages."""
    clock = time.time()
    out = args.out
    seeds = args.seeds
    methods = METHODS
    probed = ("Iterative, recommended", "recommended")
    if args.quick:
        methods = {name: METHODS[name] for name in ("SFT", "RLHF", "GPO", "GPO+Div")}
        probed = ()
    rows = run_suite(out, methods, seeds, probed)
    if not args.quick:
        rows["RLHF, matched in KL"] = [matched_in_kl(run_folder(out, "RLHF, tokens matched", seed), row["kl"])
                                       for seed, row in zip(seeds, rows["GPO+Div"])]
    attackers = attacker_rows(rows)
    tests = orderings(rows)
    paragraphs = [f"# {title(out, methods, seeds)}", *paper_tables(rows, attackers, tests)]
    if not args.quick:
        paragraphs += ["## Best responses",
                       "Success of a fresh attacker after 90 PPO steps, and what it writes most often.",
                       best_responses(out, seeds, probed),
                       "## The training judge's rate, corrected for its errors",
                       corrected_table(out, seeds, ("SFT", "RLHF", "GPO+Div", "recommended")),
                       "## What an average costs", averages_table(out, seeds, rows["recommended"])]
    paragraphs.append(f"{len(seeds) * len(methods)} runs; the last call took {time.time() - clock:.0f} seconds.")
    histories = {name: [held_out_history(run_folder(out, name, seed)) for seed in seeds]
                 for name in ("RLHF", "Iterative", "GPO", "GPO+Div", "recommended") if name in rows}
    draw_methods(out, rows, attackers, histories)
    commands = {name: f"python train.py {flags}" for name, flags in methods.items()}
    if "MART" in commands:
        commands["MART"] = "python -m experiments.mart"
    numbers = {"seeds": list(seeds), "commands": commands, "rows": rows, "orderings": tests}
    write_tables(out, "table", paragraphs, numbers)


def attacker_rows(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The rows that measure an attacker, and those of the attackers' mixtures."""
    names = ("SFT", "Paraphrase", "RLHF", "RLHF+Div", "GPO", "GPO+Div", "MART", "recommended")
    found = {name: rows[name] for name in names if name in rows}
    for name in list(found):
        if "average (mixture)" in rows[name][0]["averages"]:
            found[f"{name}, mixture"] = [row["averages"]["average (mixture)"] for row in rows[name]]
    return found


def orderings(rows: dict[str, list[dict]]) -> list[dict]:
    """The ORDERINGS for which there are rows: differences over seeds, margin included, p of both paired tests, and the
    t-test's p corrected for the number of claims."""
    found = []
    for key, larger, smaller, *margin in ORDERINGS:
        if all(name in rows and key in rows[name][0] for name in (larger, smaller)):
            differences = [a[key] - b[key] + sum(margin) for a, b in zip(rows[larger], rows[smaller])]
            larger = " + ".join([larger, *map(str, margin)])
            found.append({"measure": key, "larger": larger, "smaller": smaller, "differences": differences,
                          "p": report.paired_test(differences)})
    for test, p in zip(found, report.holm([test["p"][0] for test in found])):
        test["holm"] = p
    return found


def paper_tables(rows: dict, attackers: dict, tests: list[dict]) -> list[str]:
    """Paragraphs of markdown: Tables 1, 2 and 4 of the paper, and its orderings."""
    defenders = {name: repeats for name, repeats in rows.items() if name != "Paraphrase"}
    lines = []
    for test in tests:
        differences = test["differences"]
        agree = f"{sum(d > 0 for d in differences)} of {len(differences)}"
        claim = f"{report.LABELS[test['measure']]}: {test['larger']} > {test['smaller']}"
        spread = float(np.std(differences, ddof=1))
        size = f"{np.mean(differences) / spread:.1f}" if spread else "-"
        lines.append([claim, report.mean_and_error(differences), size, agree,
                      *(f"{p:.3f}" for p in (*test["p"], test["holm"]))])
    return [
        "## Table 1: the defender",
        "Attack success on 1,000 held-out prompts of each set, by the held-out judge.",
        suite_table(defenders, DEFENDER | {"best_response": "best response"} | COST),
        "## Table 2: the attacker",
        "Against the finished SFT, RLHF and GPO+Div defenders of another seed, 300 attacks (SFT: its 200 fixed "
        "prompts).",
        suite_table(attackers, ATTACKER), "## Table 4: quality", suite_table(defenders, QUALITY),
        "## Orderings", "Paired over seeds, one-sided; effect size: mean over standard deviation of the differences; "
        "the last column is the t-test's p corrected for the number of claims (Holm).",
        report.markdown(["", "difference", "effect size", "seeds that agree", "p, t-test", "p, sign flips", "p, Holm"],
                        lines)]


def best_responses(out: str | Path, seeds: Iterable[int], names: Iterable[str]) -> str:
    """markdown: for each run, a fresh attacker's success and most frequent exploit."""
    lines = []
    for name in names:
        for seed in seeds:
            row = data.read_json(run_folder(out, name, seed) / BEST_RESPONSE)
            frequent = [f"{count} of 200: *{data.visible(prompt)}*" for prompt, count in row["exploits"][:1]] or ["-"]
            n = len(toy_game().fixed_prompts)  # the seeds of 500 tries: those from one may succeed or fail together
            lines.append([name, seed, report.show(row["after"], n), *frequent])
    return report.markdown(["", "seed", "success", "most frequent exploit"], lines)


def corrected_table(out: str | Path, seeds: Iterable[int], names: Iterable[str]) -> str:
    """markdown: attack success by the training judge, corrected for its errors on LABELLED exchanges of the initial
    players, beside the truth; on how many seeds the 95% interval covers it."""
    found = {name: [] for name in names}  # {method: [(raw, corrected, truth, covered) of each seed]}
    for seed in seeds:
        run = open_run(run_folder(out, "SFT", seed))  # all methods of a seed have its judge and its initial players
        errors = judge_errors(run.world.judge, labelled_by_truth(run))
        n = len(run.world.test_prompts)
        for name, values in found.items():
            row = data.read_json(run_folder(out, name, seed) / "eval.json")["after"]
            rate, low, high = errors.corrected_rate(round(row["asr_train_judge"] * n), n)
            values.append((row["asr_train_judge"], rate, row[ASR], low <= row[ASR] <= high))
    lines = []
    for name, values in found.items():
        raw, corrected, truth, covered = zip(*values)
        cells = [report.mean_and_error(rates) for rates in (raw, corrected, truth)]
        lines.append([name, *cells, f"{sum(covered)} of {len(covered)}"])
    return report.markdown(["", "training judge, raw", "corrected", "truth", "interval covers the truth"], lines)


def labelled_by_truth(run: FinishedRun) -> list[dict]:
    """LABELLED exchanges of the players as they began, as rows of `eval.py --judge_labels`."""
    seeds = sample(run.world.seeds, LABELLED, np.random.default_rng(run.config.seed))
    attacks = run.world.first["attacker"].generate(seeds, 0).texts
    responses = run.world.first["defender"].generate(attacks, 0).texts
    truth = call_judge(run.world.held_out_judge, attacks, responses)
    return [{"prompt": a, "response": r, "safe": safe} for a, r, safe in zip(attacks, responses, truth)]


def averages_table(out: str | Path, seeds: Sequence[int], rows: list[dict]) -> str:
    """markdown: the measures of each kind of average, its memory in MiB, and the seconds that 1,000 answers take."""
    run = open_run(run_folder(out, "recommended", seeds[0]))
    final = run.world.players["defender"]
    policy_size = sum(p.numel() * 4 for p in final.policy.lm.parameters()) / 2**20  # MiB
    sides = {"final": final, **{f"average ({kind})": side for kind, side in run.averages["defender"].items()}}
    keys = (ASR, "over_refusal/look-alikes", "helpfulness", "third_party_success", "cells")
    lines = []
    for name, side in sides.items():
        repeats = rows if side is final else [row["averages"][name] for row in rows]
        n_policies = 1 if side is final else len(side.members)
        seconds = []
        for _ in range(4):  # the first is a warm-up
            clock = time.time()
            side.generate(run.world.test_prompts, 0, temperature=0)
            seconds.append(time.time() - clock)
        cost = [f"{n_policies * policy_size:.1f}", f"{np.median(seconds[1:]):.2f}"]
        lines.append([name, *suite_cells(repeats, keys), *cost])
    return report.markdown(["", *(report.LABELS[key] for key in keys), "MiB a player", "s for 1,000 answers"], lines)


def variations(args: argparse.Namespace) -> None:
    """A suite over seeds, all rows or those named; but for `ablate`, with best responses."""
    suite = SUITES[args.command]
    wrong = set(args.rows) - set(suite)
    if wrong:
        raise ValueError(f"rows of {args.command} are {', '.join(suite)}; got {', '.join(wrong)}")
    suite = {name: flags for name, flags in suite.items() if name in (args.rows or suite)}
    columns = {ASR: "ASR", f"{ASR}/unseen framings": "unseen framings", **QUALITY}
    shown = {}  # columns that are not tested
    probed = ()
    if args.command == "ablate":
        columns |= ATTACKER
    else:
        columns["best_response"] = f"best response, {PROBE_STEPS} steps"
        shown = {"by seed": "by seed", "mixture": "ASR, mixture", "tokens": "sampled tokens"}
        probed = suite
    rows = run_suite(args.out, NEIGHBOURS | suite, args.seeds, probed)
    rows = {name: rows[name] for name in suite}
    file = args.command
    if args.rows:  # they leave the table of all rows
        file = re.sub(r"\W+", "_", "_".join([file, *suite]))[:200]
    head = f"# {args.command}: {title(args.out, suite, args.seeds)}"
    commands = {name: f"python train.py {flags}" for name, flags in suite.items()}
    tables = [suite_table(rows, columns | shown), differences_table(rows, columns)]
    write_tables(args.out, file, [head, *tables], {"commands": commands, "rows": rows})


# --- figures --------------------------------------------------------------------------------------------------------
def draw_methods(out: str | Path, rows: dict, attackers: dict, histories: dict) -> None:
    """Draw methods.png: learning curves, finished defenders and attackers, with errors over seeds.

    rows, attackers: {method: a row of each seed}; histories: {method: (seeds, 1 + rounds) held-out attack success
    before the game and after each round}."""
    def mean_of(key, repeats):
        values = [row[key] for row in repeats]
        return np.mean(values), report.standard_error(values)

    canvas, (curves, bars, cells) = report.figure(1, 4.8, 3.6, rows=3)
    for i, (name, history) in enumerate(histories.items()):
        report.band(curves, np.linspace(0, rows[name][0]["updates"], len(history[0])), history, name, report.LOOKS[i])
        heights, errors = zip(*(mean_of(key, rows[name]) for key in DEFENDER))
        x = np.arange(3) + (i - len(histories) / 2 + 0.5) * 0.16
        bars.bar(x, heights, 0.15, yerr=errors, label=name, color=str(0.15 + 0.16 * i), edgecolor="black", lw=0.5,
                 hatch=["", "//", "..", "xx", ""][i], capsize=2)
    for i, (name, repeats) in enumerate(attackers.items()):
        x, dx = mean_of("cells", repeats)
        y, dy = mean_of("third_party_success", repeats)
        look = report.LOOKS[i % len(report.LOOKS)]
        cells.errorbar(x, y, xerr=dx, yerr=dy, fmt=look["marker"], color=look["color"], ms=5, capsize=2, label=name,
                       mfc="white" if i >= len(report.LOOKS) else None)
    bars.set_xticks(range(3), DEFENDER.values())
    bars.margins(y=0.25)  # room for the legend
    bars.set(ylabel="attack success, held-out judge", title="finished defenders")
    curves.set(xlabel="defender updates", ylabel="attack success, held-out judge", ylim=(0, 1),
               title="defender, held-out prompts")
    cells.set(xlabel="distinct cells broken on third parties", ylabel="success on third parties", title="attackers")
    for axis, columns in ((curves, 1), (bars, 3), (cells, 2)):
        axis.legend(frameon=False, fontsize=7, ncols=columns, loc="upper right")
    report.save_figure(canvas, Path(out) / "methods.png")


# --- the command line -----------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.fail
    parser.add_argument("command", nargs="?", default="reproduce", choices=["reproduce", *SUITES])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of any other command; default: all")
    parser.add_argument("--quick", action="store_true", help="reproduce: four methods, two seeds, two rounds")
    parser.add_argument("--seeds", type=int, help="how many, 2 to 20; default: 10 for reproduce, 5 for the others")
    parser.add_argument("--first_seed", type=int, default=118,
                        help="settings were chosen on 0 to 5; measured so far: 10 to 14, 20 to 145")
    parser.add_argument("--out", help="folder; default: results, with --quick results_quick")
    args = parser.parse_intermixed_args(argv)
    default = 5
    if args.command == "reproduce":
        default = 2 if args.quick else 10
    n_seeds = default if args.seeds is None else args.seeds
    if not 2 <= n_seeds <= 20 or args.first_seed < 0:  # the exact test of reproduce has 2^seeds cases
        parser.error(f"--seeds must be 2 to 20 and --first_seed at least 0, got {n_seeds} and {args.first_seed}")
    if args.quick and args.command != "reproduce":
        parser.error(f"--quick is of reproduce, not of {args.command}; take fewer --seeds")
    if args.rows and args.command == "reproduce":
        parser.error(f"rows are of {', '.join(SUITES)}; got {' '.join(args.rows)} for reproduce")
    args.seeds = range(args.first_seed, args.first_seed + n_seeds)
    args.out = args.out or ("results_quick" if args.quick else "results")
    program = reproduce if args.command == "reproduce" else variations
    run_program(program, args, "; the same command goes on where it stopped")


if __name__ == "__main__":
    data.as_a_program(main)
