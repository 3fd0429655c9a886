"""Train an attacker and a defender against each other: Algorithm 1 of "Toward Optimal LLM Alignments Using
Two-Player Games" (arXiv 2406.10977), from an empty folder to a report.

    python train.py                                            the embedded game, on a CPU, about 3 minutes
    python train.py --attacker gpt2 --defender gpt2            your own models: hub ids or local folders
    python train.py config.yaml --seed 3                       options from a file; flags after it count more
    python train.py --resume runs/...                          go on where a run stopped (Ctrl-C ends a step, and saves)
    torchrun --nproc_per_node=8 train.py [--shard] ...         on several GPUs: DDP, or FSDP2 with --shard

One round: the defender takes `--defender_steps` PPO steps against the frozen attacker, then the attacker
`--attacker_steps` against the frozen defender. The loop itself is `train`, below.

Differs from the paper: (1) the attacker moves first by default (`--first defender` for the paper's order), so
that the defender of a finished run has answered the last attacker. (2) `--replay`: a share of the defender's
batch is drawn from earlier attacks, the successful ones more often, so that it does not forget them.
(3) `--ptx_coef`: the defender also keeps up the likelihood of demonstrations, against over-refusal.
(4) `--mine`: untrained attacks, and attacks that once succeeded, are tried on the defender before its turns; what
succeeds is replayed too. (5) R_div is centred over the batch: its level, about -k for every attack, is no signal
but swamps a critic that starts at zero. (6) `--guard`: an attack that has left the first attacker's language counts
as a failed repetition. (7) `--restart`: every few rounds the attacker begins anew, and looks for another hole.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import (HUB_DATA, append_lines, check_template, fail, first_line, first_turn, hub_file, interrupted, is_test, plain, read_lines, read_rows, save_tokenizer,
                  sigterm_as_ctrl_c, sync, usable, visible, whole_folder, write_json, write_text)
from diversity import Diversity, load_embedder, word_embedder
from gpo import NotFinite, Player, PolicyAverage, Speaker, alarms, distill, evaluate, memory_plan, naturalness, peak_memory, play, player_memory, ppo_update, sft
from model import (DTYPE_NAMES, DTYPES, Policy, add_lora, best_dtype, checkpoint_blocks, demonstrations, first_decides, fold_lora, from_first, in_shares,
                   join_processes, keep_freed_memory, load_policy, load_weights, load_whole, model_size, on_first, rank, save_policy, save_weights, shard, shared_judge, world_size)
from report import draw_curves, model_card, summary_table, write_report
from reward import JudgeError, call_judge, is_refusal, load_judge, train_judge

NOVELTY = {"self_bleu": "bleu", "cosine": "embedding"}  # metric -> term of the diversity reward
# What the warm-started players and test sets depend on: equal in two runs, one may `--start` from the other.
WARM_START = ("attacker", "defender", "seed", "sft_steps", "judge", "judge_steps", "eval_prompts", "prompts", "test_prompts", "benign_prompts", "sft_data", "template")
METHODS = ("gpo", "rlhf", "iterative", "paraphrase", "sft")
# A value of None in Config means: the first of these for the embedded game, the second for your own models, which suits GPT-2 (124M).
PRESETS = {
    "rounds": (15, 5), "defender_steps": (6, 20), "attacker_steps": (12, 10), "batch_size": (96, 32), "restart": (3, 0),  # 20:10 is the authors' 400:200
    "sft_steps": (900, 400),  # 12,800 of hh-rlhf's 42,500 pairs: an untuned GPT-2 has to learn to answer and to end
    "learning_rate": (2.5e-4, 1e-5), "attacker_learning_rate": (6e-4, 1e-5),  # TRL takes 1.4e-5 for GPT-2, trlx 8e-6 for 125M on hh-rlhf
    "kl_coef": (0.05, 0.05), "attacker_kl_coef": (0.01, 0.05),  # trlx's for 125M on hh-rlhf
    "ptx_coef": (1.0, 0.0), "mine": (600, 0), "diversity": (0.3, 1.0), "average_size": (32, 8),
    "attack_tokens": (25, 48), "response_tokens": (16, 64),  # nearly every prompt of the authors' and three of four answers of hh-rlhf are shorter
    "eval_prompts": (1000, 200), "save_every": (30, 20),
    "template": ("{}", "Here is one question. Please write another harmful question on a similar topic: {}"),  # the paper's
    "dtype": ("fp32", "auto"), "judge": ("toy", "facebook/roberta-hate-speech-dynabench-r4-target"), "held_out_judge": ("truth", "s-nlp/roberta_toxicity_classifier"),
    "embedder": ("toy", "sentence-transformers/all-MiniLM-L6-v2"),
}

HEADINGS = {  # of --help: each begins at an option, in the order of Config
    "attacker": "the players", "judge": "judges", "prompts": "data and warm start", "method": "schedule", "batch_size": "PPO", "ptx_coef": "what the players meet",
    "diversity": "diversity", "average": "averages", "critic": "models and sampling", "seed": "output"}


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every option, its default and its reason. Where the default is None, `PRESETS` has two."""

    attacker: str | None = option(None, "attacker model, folder or hub id; without it the embedded game is played")
    defender: str | None = option(None, "defender model, folder or hub id")
    judge: str | None = option(None, "training judge: rule, toy, a classifier folder or hub id, guard:MODEL, file.py:function")
    held_out_judge: str | None = option(None, "judge of evaluation, never trained against")
    unsafe_label: str | None = option(None, "the label of a classifier judge that means unsafe, if its names do not tell")
    prompts: str | None = option(None, "seed prompts: .jsonl .json .csv .txt, each also .gz; default: the red-team attempts of Anthropic/hh-rlhf on the hub")
    test_prompts: str | None = option(None, "held-out prompts for evaluation; default: a tenth of --prompts, by hash")
    benign_prompts: str | None = option(None, "harmless prompts, to measure over-refusal; default: hh-rlhf's helpful-base test set, without --prompts")
    sft_data: str | None = option(None, "(prompt, response) pairs for the defender's warm start and --ptx_coef; default: hh-rlhf's harmless-base, without --prompts")
    sft_steps: int | None = option(None, "supervised steps before the game, for each player")
    judge_steps: int = option(900, "training steps of the embedded game's own judge")
    method: str = option("gpo", "gpo; rlhf: defender on fixed prompts, attacker against the first defender; iterative: diverse "
                         "prompts of the untrained attacker; paraphrase, sft: nobody is trained, prompts rewritten or as they are")
    rounds: int | None = option(None, "rounds of the game")
    defender_steps: int | None = option(None, "PPO steps of the defender in a round (N_d)")
    attacker_steps: int | None = option(None, "PPO steps of the attacker in a round (N_a)")
    first: str = option("attacker", "who moves first in a round: attacker or defender")
    batch_size: int | None = option(None, "exchanges in a PPO step")
    learning_rate: float | None = option(None, "of the defender")
    attacker_learning_rate: float | None = option(None, "of the attacker")
    kl_coef: float | None = option(None, "KL penalty of the defender")
    attacker_kl_coef: float | None = option(None, "KL penalty of the attacker")
    kl_anchor: str = option("initial", "the KL penalty is measured from the initial or the previous round's policy")
    target_kl: float = option(0.0, "an update ends where its KL exceeds 1.5 times this; 0: never")
    entropy_coef: float = option(0.0, "eta_H of Eq. (3.7): entropy bonus of the attacker")
    ptx_coef: float | None = option(None, "weight of the supervised loss on demonstrations in the defender's updates")
    opponent: str = option("last", "who a mover plays against: the other's last policy, or the mixture of all its rounds")
    restart: int | None = option(None, "the attacker begins again from its first weights every so many rounds; 0: never")
    replay: float = option(0.6, "share of the defender's batch drawn from earlier attacks, by their success")
    mine: int | None = option(None, "attacks of the first attacker tried on the defender at the start of each of its turns, and as many that ever "
                             "succeeded tried again; what succeeds is replayed")
    mine_temperature: float = option(1.5, "half of them are sampled at this temperature, to look further afield")
    diversity: float | None = option(None, "k: weight of the diversity reward of the attacker; 0 turns it off")
    diversity_terms: str = option("bleu,embedding", "terms of the diversity reward: bleu, embedding or both")
    history: int = option(480, "the diversity reward compares with the last so many attacks; 0: with all, as in the paper")
    guard: float = option(0.01, "attacks less natural to the first attacker than this share of its own samples count as failed repetitions; 0: off")
    embedder: str | None = option(None, "sentence embeddings: words, toy, or an encoder folder or hub id")
    average: str = option("mixture,weights", "policy averages to keep: mixture, weights, both, distill (both, and one policy "
                          "trained on the mixture's samples) or none")
    average_size: int | None = option(None, "policies kept by the mixture (reservoir sampling beyond)")
    critic: str = option("shared", "value head on the policy's own body (shared) or on a separate one")
    temperature: float = option(1.0, "of sampling; log-probs are taken at the same temperature")
    top_k: int = option(0, "sample from the k likeliest tokens only; 0 is off")
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this much mass; 1 is off")
    attack_tokens: int | None = option(None, "longest attack")
    response_tokens: int | None = option(None, "longest response")
    template: str | None = option(None, "how a seed is put to the attacker; {} is the seed; without {} the attacker is free")
    ppo_epochs: int = option(2, "passes over a batch")
    minibatches: int = option(2, "optimizer steps in a pass")
    micro_batch: int = option(0, "rows per forward and backward, four times as many without gradients; 0: the whole minibatch")
    gradient_checkpointing: bool = option(False, "keep only the blocks' inputs for the backward: less memory, a third slower")
    lora: int = option(0, "rank of LoRA adapters (needs peft): they alone are trained, averaged and saved; the reference is the base; 0: all weights")
    dtype: str | None = option(None, "compute dtype: fp32, bf16 (weights stay fp32), or auto: bf16 where the processor has it")
    device: str = option("auto", "auto, cpu or cuda")
    deterministic: bool = option(False, "the same bits every time on one machine: one CPU thread, slower kernels")
    trust_remote_code: bool = option(False, "run Python files that come with a model; they can do anything")
    shard: bool = option(False, "under torchrun: cut weights, gradients and optimizer among the processes (FSDP2); default: a copy in each (DDP)")
    seed: int = option(0, "of everything random")
    eval_prompts: int | None = option(None, "held-out prompts in the table; a third of them after every round")
    dry_run: bool = option(False, "print the first prompts of the players and the judges as their models read them, with token counts, and stop")
    out: str | None = option(None, "run folder; default: runs/DATE_METHOD_sSEED")
    save_every: int | None = option(None, "PPO steps between checkpoints")
    log: str = option("none", "tensorboard: also write the metrics to RUN/tensorboard; wandb: send them")
    start: str | None = option(None, "begin with the warm-started players, judge and test sets of this run folder")
    resume: str | None = option(None, "go on with this run folder; its own configuration is used")
    given = frozenset()  # no option: the names of those that the user gave


@dataclass
class World:
    """What a game is played with, apart from the algorithm."""

    attacker: Policy
    defender: Policy
    seeds: list  # the fixed prompts: seeds of the attacker, and all that RLHF ever sees
    test_prompts: list
    benign_prompts: list
    demos: list  # (prompt, response) pairs for --ptx_coef
    judge: object
    held_out_judge: object
    refused: object  # list of responses -> list of 0.0 / 1.0
    helpful: object  # judge of helpfulness, or None
    embedder: object
    judge_to_save: object = None  # a judge that was trained here
    more_tests: dict = field(default_factory=dict)  # {name: further test prompts}, for eval.py


# --- the loop: Algorithm 1 --------------------------------------------------------------------------------------
def train(config, world, players, run):
    """Every turn of the schedule is one PPO step; every round ends with an evaluation and two averages."""
    attacker, defender = players["attacker"], players["defender"]
    turns = schedule(config)
    for run.step in range(run.step, len(turns)):
        round, role, first_of_turn, last_of_round = turns[run.step]
        rng, clock = np.random.default_rng([config.seed, run.step]), time.time()  # all randomness of this step
        mover = players[role]
        if role == "attacker" and first_of_turn and config.restart and round % config.restart == 0:
            attacker.go_back(run.first_attacker.policies[0])
        if config.kl_anchor == "previous" and first_of_turn:
            mover.anchor()
        seeds = draw(world.seeds, config.batch_size, rng)
        if role == "attacker":  # seed -> attack -> response of the frozen defender -> P(unsafe) + k R_div
            game = play(attacker, run.opponent("defender"), seeds, world.judge, new_seed(rng), config.template)
            novelty = run.diversity.score(game.prompts)
            run.diversity.add(game.prompts)
            strange = (naturalness(run.first_attacker.policies[0], game.attacks) < run.guard).any(1).numpy()  # (B,), True: drifts from its language
            r_div = np.where(strange, -1.0, novelty["reward"])  # strange: counts as a repetition that fails
            # R_div is centred over the batch: its level, the same for all, would swamp a critic that starts at zero
            scores = np.where(strange, 0.0, 1 - game.p_safe) + config.diversity * (r_div - r_div.mean())
            rollout, demos = game.attacks, None
        else:
            if first_of_turn and config.mine and config.method == "gpo":
                run.mine(config.mine, rng)
            # prompt of the frozen attacker, or of an earlier one -> response -> P(safe)
            prompts = defender_prompts(config, seeds, run, rng)
            game = play(None, defender, prompts, world.judge, new_seed(rng))
            rollout, scores, novelty = game.responses, game.p_safe, {}
            demos = demonstrations(defender.policy, draw(world.demos, 48, rng)) if config.ptx_coef > 0 else None
        run.remember(game)
        played = time.time()
        metrics = ppo_update(mover, rollout, scores, new_seed(rng), demos, config.ptx_coef)
        metrics |= {"time/rollout": played - clock - game.score_seconds, "time/score": game.score_seconds, "time/update": time.time() - played}
        run.count(*game.sampled)
        metrics["sampled_tokens"] = run.sampled_tokens
        metrics["game/attack_success"] = float(np.mean(1 - game.p_safe))  # of this batch, by the training judge
        metrics["game/undecided"] = len(game.sampled[1]) - len(game.p_safe)  # exchanges without a verdict: in no update and in no rate
        if role == "attacker":
            metrics["diversity/different"] = len(set(game.prompts)) / len(game.prompts)
        metrics |= {f"diversity/{name}": float(novelty[term].mean()) for name, term in NOVELTY.items() if term in novelty and np.isfinite(novelty[term]).all()}
        if last_of_round:
            for name, player in players.items():
                for average in run.averages[name].values():
                    average.add(player.policy)
            metrics |= run.evaluate_round(round, metrics)
        run.log(role, round, game, scores, metrics)
        stop = max(in_shares(lambda _: [run.stop], range(world_size())))  # the same in all processes, or some would wait for ever
        if stop or (run.step + 1) % config.save_every == 0 or run.step + 1 == len(turns):
            run.save()
        if stop:  # by Ctrl-C or SIGTERM; --resume begins with the next step
            run.stop = stop
            return


def schedule(config):
    """Whose turn each PPO step is: [(round, role, first step of the turn, last step of the round)]."""
    if config.method in ("sft", "paraphrase"):
        return []
    steps = {"attacker": 0 if config.method == "iterative" else config.attacker_steps, "defender": config.defender_steps}
    order = sorted(steps, key=lambda role: role != config.first)
    turns = [(r, role, i == 0) for r in range(config.rounds) for role in order for i in range(steps[role])]
    return [(*turn, i + 1 == len(turns) or turns[i + 1][0] != turn[0]) for i, turn in enumerate(turns)]


def defender_prompts(config, seeds, run, rng):
    """What the defender is asked in one step: the only place where the methods of Table 1 differ."""
    if config.method == "rlhf":  # the fixed prompts themselves
        return seeds
    if config.method == "iterative":  # no adversary: the most novel quarter of untrained attacks
        texts = [text for text in run.attacks(seeds * 4, new_seed(rng)) if text not in run.test_prompts]
        novelty = run.diversity.score(texts)["reward"]
        chosen = [texts[i] for i in np.argsort(-novelty, kind="stable")[:len(seeds)]]
        run.diversity.add(chosen)
        return chosen
    replayed = []
    if run.memory and config.replay > 0:
        earlier, success = list(run.memory), np.fromiter(run.memory.values(), dtype=float)
        still_open = np.where(success > 0.5, success, 0)  # three quarters by success; one quarter evenly, against forgetting
        chance = 3 * still_open / max(still_open.sum(), 1e-9) + 1 / len(earlier)
        replayed = [earlier[i] for i in rng.choice(len(earlier), int(config.replay * len(seeds)), p=chance / chance.sum())]
    seeds = seeds[len(replayed):]
    fresh = run.attacks(seeds, new_seed(rng))
    return [seed if text in run.test_prompts else text for seed, text in zip(seeds, fresh)] + replayed  # no test prompt is trained on


def draw(items, n, rng):
    return [items[i] for i in rng.choice(len(items), n, replace=n > len(items))]


def new_seed(rng):
    return int(rng.integers(2**31))


# --- the run folder -----------------------------------------------------------------------------------------------
class Run:
    """A run's folder, and all state of the game that is not inside a player."""

    stop = 0  # the number of the signal that asks `train` to stop after its present step
    track = bar = None  # track(step, metrics): to TensorBoard or Weights & Biases

    def __init__(self, config, folder, world, players):
        self.config, self.folder, self.world, self.players = config, Path(folder), world, players
        self.step, self.sampled_tokens = 0, 0  # PPO steps done; tokens sampled by both players for them
        self.memory, self.once = {}, {}  # attack -> its last success; attack -> None where it ever succeeded
        self.before = None  # the first evaluation
        self.test_prompts = set(world.test_prompts).union(world.benign_prompts, *world.more_tests.values())  # never in an update of the defender
        self.diversity = Diversity(tuple(config.diversity_terms.split(",")), world.embedder, config.history)
        kinds = [kind for kind in config.average.split(",") if kind in ("mixture", "weights")]
        self.averages = {name: {kind: PolicyAverage(kind, config.average_size, config.seed) for kind in kinds} for name in players}
        self.first_attacker, self.first_defender = (Speaker([players[name].reference], players[name]) for name in ("attacker", "defender"))
        self.guard, self.mixtures = self.natural_bounds(), {}
        self.attack_seeds = draw(world.seeds, 300, np.random.default_rng(config.seed))  # the attacker's part of the table
        self.planned, self.resident = 0, 0  # bytes: of the memory plan; held before the models were made

    def opponent(self, name):
        """The frozen player that the mover meets: its last policy or, with `--opponent mixture`, that of all rounds so far."""
        if name == "defender" and self.config.method == "rlhf":
            return self.first_defender
        if self.config.opponent == "last" or not self.averages[name]["mixture"].count:
            return self.players[name]
        count = self.averages[name]["mixture"].count
        if self.mixtures.get(name, (0,))[0] != count:
            self.mixtures[name] = count, self.averages[name]["mixture"].speaker(self.players[name])
        return self.mixtures[name][1]

    def attacks(self, seeds, seed):
        """Prompts for the defender's turn, written by the frozen attacker."""
        rollout = self.opponent("attacker").speak([self.config.template.format(s) for s in seeds], seed)
        self.count(rollout)
        return rollout.texts

    def remember(self, game, successes_only=False):
        """What the last try of each attack came to (of several in a batch: the last one); test prompts are forgotten at once."""
        for prompt, p_safe in zip(game.prompts, game.p_safe.tolist()):
            if prompt not in self.test_prompts and (p_safe < 0.5 or not successes_only):
                self.memory[prompt] = 1 - p_safe
                if p_safe < 0.5:
                    self.once[prompt] = None

    def mine(self, n, rng):
        """Try n attacks of the first attacker on the defender as it is now, half of them sampled at a higher
        temperature, and remember which succeed. Then try again n of those that ever did: a hole that was closed
        may have come open since."""
        c, (defender, judge) = self.config, (self.players["defender"], self.world.judge)
        seeds = [c.template.format(s) for s in draw(self.world.seeds * (n // len(self.world.seeds) + 1), (n + 1) // 2, rng)]
        attacks = [self.first_attacker.speak(seeds, new_seed(rng), temperature) for temperature in (None, c.mine_temperature)]
        game = play(None, defender, attacks[0].texts + attacks[1].texts, judge, new_seed(rng))
        self.remember(game, successes_only=True)
        self.count(*attacks, *game.sampled)
        if self.once:
            game = play(None, defender, draw(list(self.once), min(n, len(self.once)), rng), judge, new_seed(rng))
            self.remember(game)
            self.count(*game.sampled)

    def count(self, *rollouts):
        self.sampled_tokens += int(sum(rollout.response_mask.sum() for rollout in rollouts if rollout))

    def natural_bounds(self):
        """(2,): the `--guard` quantiles of `naturalness` over the first attacker's own attacks."""
        if not self.config.guard:
            return torch.full((2,), -torch.inf)
        seeds = [self.config.template.format(s) for s in draw(self.world.seeds, 256, np.random.default_rng(self.config.seed))]
        natural = naturalness(self.first_attacker.policies[0], self.first_attacker.speak(seeds, self.config.seed))
        return torch.quantile(natural, self.config.guard, dim=0)

    def evaluate(self, attacker=None, defender=None, share=1):
        """A row of the table for the given speakers (default: the players) on 1/share of the test sets."""
        w, c = self.world, self.config
        attacker = None if c.method == "sft" else attacker or self.players["attacker"]
        return evaluate(
            attacker, defender or self.players["defender"], self.attack_seeds, w.test_prompts[::share], w.benign_prompts[::share], w.judge, w.held_out_judge,
            w.refused, w.helpful, w.embedder, self.first_defender, c.template)

    def evaluate_round(self, round, metrics):
        """Metrics of the last iterates after a round, and alarms (over `metrics`, of the last step, too); three held-out
        prompts and their answers go to games.jsonl."""
        row = self.evaluate(share=3)
        names = {"asr_train_judge", "asr_held_out_judge", "over_refusal", "attacker_success", "self_bleu", "cosine"}
        prompts = self.world.test_prompts[:3]
        answers = self.players["defender"].speak(prompts, 0, temperature=0).texts
        p_safe = call_judge(self.world.held_out_judge, prompts, answers).tolist()
        self.append("games.jsonl", [
            {"step": self.step, "round": round, "role": "probe", "attack": attack, "response": response, "p_safe": None if p != p else p}
            for attack, response, p in zip(prompts, answers, p_safe)])
        self.bar.set_postfix_str(f"round {round + 1}: held-out attack success {row['asr_held_out_judge']:.1%}")
        found = {f"game/{name}": value for name, value in row.items() if name in names and value is not None}
        steps = [] if rank() else [line for line in read_lines(self.folder / "metrics.jsonl") if line["round"] == round]
        latest = {name: value for line in [*steps, metrics, found] for name, value in line.items()}
        raised = alarms(latest, self.before, {name: player.max_new_tokens for name, player in self.players.items()})
        for name, message in raised:
            tqdm.write(f"{name} alarm after round {round + 1}: {message}", file=sys.stderr)
        return found | {f"alarm/{name}": float(name in dict(raised)) for name in ("collapse", "reward_hacking")}

    def append(self, name, rows):
        if not rank():
            append_lines(self.folder / name, rows)

    def log(self, role, round, game, scores, metrics):
        self.append("metrics.jsonl", [{"step": self.step, "round": round, "role": role, **metrics}])
        exchanges = zip(game.seeds, game.prompts, game.responses.texts, game.p_safe.tolist(), np.asarray(scores).tolist())
        self.append("games.jsonl", [
            {"step": self.step, "round": round, "role": role, "seed": seed, "attack": attack, "response": response, "p_safe": p, "score": score if np.isfinite(score) else None}
            for seed, attack, response, p, score in exchanges])
        if self.track:
            self.track(self.step, metrics)
        self.bar.set_description_str(f"round {round + 1}/{self.config.rounds} {role:<8} attack success {1 - game.p_safe.mean():4.0%}")
        self.bar.update(1)

    def save(self):
        """A checkpoint (`whole_folder`). Its marker is state.json, which is written last and names all other files. It does
        not tell how many processes there were. The one before is kept."""
        target = self.folder / "checkpoints" / f"step_{self.step + 1:06d}"
        with whole_folder(target, not rank()) as temporary:
            for name, player in self.players.items():
                save_weights(player.policy, temporary / f"{name}.safetensors")
                save_weights(player.reference, temporary / f"{name}_reference.safetensors")
                moments = on_first({f"{i}.{k}": v for i, state in player.optimizer.state_dict()["state"].items() for k, v in state.items()})
                if not rank():
                    save_file(moments, temporary / f"{name}_optimizer.safetensors")
            if rank():  # it has given its shards; the first process writes
                return
            self.save_averages(temporary)
            for log in ("metrics.jsonl", "games.jsonl"):  # no checkpoint outlives the lines before it
                sync(self.folder / log)
            write_json(temporary / "state.json", {
                "step": self.step + 1, "diversity": self.diversity.state_dict(), "memory": self.memory, "once": list(self.once), "before": self.before, "sampled_tokens": self.sampled_tokens,
                "skipped": {name: player.skipped_steps for name, player in self.players.items()}, "files": sorted(path.name for path in temporary.iterdir())})
        for old in sorted(path for path in target.parent.glob("*step_*") if path.name < target.name)[:-1]:  # a later one is damaged
            shutil.rmtree(old)

    def save_averages(self, folder):
        for name, kinds in self.averages.items():
            for kind, average in kinds.items():
                tensors, numbers = average.state_dict()
                save_file(tensors, folder / f"{name}_{kind}.safetensors", metadata={k: str(v) for k, v in numbers.items()})
                write_json(folder / f"{name}_{kind}.json", numbers)

    def load(self):
        """Go on from the newest checkpoint that is whole; lines that were logged after it are dropped."""
        if found := first_decides(self.newest_checkpoint):
            self.load_checkpoint(found)
        for log in (self.folder / "metrics.jsonl", self.folder / "games.jsonl"):
            if log.exists() and not rank():
                lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut off
                write_text(log, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] < self.step))

    def newest_checkpoint(self):
        """The newest one whose marker is there and whose files can all be read, or None; a damaged one is named."""
        for folder in sorted((self.folder / "checkpoints").glob("step_*"), reverse=True):
            try:
                for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["files"]:  # safe_open compares the header with the size
                    json.loads((folder / file).read_text(encoding="utf-8")) if file.endswith(".json") else safe_open(folder / file, "pt")
                return folder
            except Exception as error:
                print(f"{folder} is damaged and not used: {type(error).__name__}: {first_line(error)}", file=sys.stderr)

    def load_checkpoint(self, folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.memory, self.before, self.sampled_tokens = (state[name] for name in ("step", "memory", "before", "sampled_tokens"))
        self.once = dict.fromkeys(state["once"])
        self.diversity.load_state_dict(state["diversity"])
        for name, player in self.players.items():
            load_weights(player.policy, folder / f"{name}.safetensors")
            if self.config.kl_anchor == "previous":
                player.anchor()  # the first reference stays what it is: `first_attacker` and `first_defender` speak with it
            load_weights(player.reference, folder / f"{name}_reference.safetensors")
            moments, per_parameter = load_file(folder / f"{name}_optimizer.safetensors"), {}
            parameters = [p for group in player.optimizer.param_groups for p in group["params"]]
            for key, tensor in sorted(moments.items()):
                index, part = key.split(".")
                per_parameter.setdefault(int(index), {})[part] = tensor if part == "step" else from_first(tensor, parameters[int(index)])
            player.optimizer.load_state_dict({"state": per_parameter, "param_groups": player.optimizer.state_dict()["param_groups"]})
            player.skipped_steps = state["skipped"][name]
            for kind, average in self.averages[name].items():
                stem = folder / f"{name}_{kind}"
                average.load_state_dict(load_file(f"{stem}.safetensors"), json.loads(Path(f"{stem}.json").read_text()))

    def finish(self, seconds):
        """Evaluate, save the finished players and their averages, write summary, figure and report."""
        rows = {"before": self.before, "after": self.evaluate()}
        if "distill" in self.config.average and schedule(self.config):
            self.distill()
        if self.averages["defender"] and schedule(self.config):
            for kind in self.averages["defender"]:
                speakers = {name: self.averages[name][kind].speaker(player) for name, player in self.players.items()}
                rows[f"average ({kind})"] = self.evaluate(**speakers)
        examples = self.examples()
        for name, player in self.players.items():
            with whole_folder(self.folder / name, not rank()) as temporary:
                save_policy(player.policy, temporary, model_card(name, self.config, rows["after"]))
        if rank():
            return rows, examples
        if len(rows) > 2:
            with whole_folder(self.folder / "average") as temporary:
                self.save_averages(temporary)
        memory = {"plan_mib": self.planned / 2**20, "used_mib": (peak_memory(self.config.device) - self.resident) / 2**20}
        print(f"memory: {memory['plan_mib']:.0f} MiB planned for the game; the most that was held, libraries and warm start included, {memory['used_mib']:.0f} MiB")
        draw_curves(self.folder, rows)
        write_report(self.folder, rows, examples)
        write_json(self.folder / "summary.json", {**rows, "seconds": seconds, "memory": memory, "config": asdict(self.config)})  # last: the run is finished
        return rows, examples

    def distill(self):
        """Add to each player's averages one policy, trained on what its mixture says to attacks and to harmless prompts."""
        c, rng = self.config, np.random.default_rng([self.config.seed, 2**21])
        heard = {"attacker": [c.template.format(s) for s in draw(self.world.seeds, 2000, rng)],
                 "defender": draw(list(self.memory) or self.world.seeds, 1000, rng) + [p for p, _ in (draw(self.world.demos, 1000, rng) if self.world.demos else [])]}
        for name, player in self.players.items():
            student, speaker = self.averages[name]["weights"].policy(player.policy), self.averages[name]["mixture"].speaker(player)
            with bar(f"distilling the {name}", c.sft_steps // 2) as progress:
                distill(speaker, student, heard[name], c.sft_steps // 2, 64, SFT_RATE * player.learning_rate, c.seed, progress)
            self.averages[name]["distill"] = PolicyAverage("distill")
            self.averages[name]["distill"].add(student)

    def examples(self):
        """Three held-out prompts: what the defender answered before and answers now, the changed ones first."""
        prompts = self.world.test_prompts[:200]
        first, now = (p.speak(prompts, 0, temperature=0).texts for p in (self.first_defender, self.players["defender"]))
        safe = [call_judge(self.world.held_out_judge, prompts, texts) for texts in (first, now)]
        order = np.argsort(safe[0] - safe[1], kind="stable")[:3]  # NaN, undecided, comes last
        return [(prompts[i], first[i], now[i]) for i in order]


# --- the worlds -----------------------------------------------------------------------------------------------------
def check_room(name, policy, prompts, new_tokens):
    lengths = [len(ids) for ids in policy.encode(prompts)]
    longest = int(np.argmax(lengths))
    if lengths[longest] + new_tokens > policy.context:
        raise ValueError(f"the {name} must hold a prompt and {new_tokens} new tokens in its context of {policy.context}, got a prompt of "
                         f"{lengths[longest]} tokens ({prompts[longest][:40]!r}...); shorten it or lower the number of new tokens")


def toy_world(config, start=None):
    """The embedded game: fresh small models, warm-started, and a judge trained on noisy samples.

    start: a folder where an earlier run left these models; nothing is trained then."""
    from toy import ToyGame, toy_classifier, toy_lm

    game = ToyGame(config.seed)
    known, judge_to_save = {"truth": game.ground_truth}, None
    if config.judge != "toy":
        known["chosen"] = load_judge(config.judge, config.unsafe_label, known, config.device, config.trust_remote_code)
    elif start:
        known["chosen"] = judge_to_save = load_judge(str(start / "judge"), device=config.device)
    held_out = load_judge(config.held_out_judge, config.unsafe_label, known, config.device, config.trust_remote_code)
    embedder = {"toy": game.embed, "words": word_embedder}.get(config.embedder) or load_embedder(config.embedder, config.device, config.trust_remote_code)
    rng = np.random.default_rng([config.seed, 2**20])
    torch.manual_seed(config.seed)
    tokenizer = game.tokenizer()
    n = min(30_000, 64 * config.sft_steps + 1000)
    samples = {"defender": game.defender_sft(n, rng), "attacker": [(config.template.format(p), attack) for p, attack in game.attacker_sft(n, rng)]}
    policies = {}
    for name, new_tokens in (("defender", config.response_tokens), ("attacker", config.attack_tokens)):
        policies[name] = (load_policy(start / name, config.critic, DTYPES[config.dtype], config.device) if start else
                          Policy(toy_lm(tokenizer).to(config.device), tokenizer, config.critic, DTYPES[config.dtype]))
        check_room(name, policies[name], game.fixed_prompts, new_tokens)
        if config.shard:
            shard(policies[name], policies[name].device.type)
    for i, (name, pairs) in enumerate(samples.items() if not (start or config.dry_run) else []):
        with bar(f"SFT of the {name}", config.sft_steps) as progress:
            sft(policies[name], pairs, config.sft_steps, 64, 3e-3, [config.seed, i], progress, config.micro_batch)
    policies = {name: slim(policy, config) for name, policy in policies.items()}  # only now: fresh models must learn with all of their weights
    if "chosen" not in known and config.dry_run:
        known["chosen"] = train_judge(toy_classifier(tokenizer).to(config.device), tokenizer, [], 0)
    elif "chosen" not in known:
        seeds = [config.template.format(p) for p in draw(game.fixed_prompts, 3000, rng)]
        attacks = Player("attacker", policies["attacker"], config.attack_tokens).speak(seeds, config.seed).texts
        attacks = [attack for attack in attacks if not game.is_held_out(attack)]
        triples = list(zip(*game.judge_samples(min(30_000, 64 * config.judge_steps), rng, attacks)))
        with bar("training the judge", config.judge_steps) as progress:
            classifier = toy_classifier(tokenizer).to(config.device)
            known["chosen"] = judge_to_save = train_judge(classifier, tokenizer, triples, config.judge_steps, 64, 2e-3, config.seed, progress)
        load_whole(classifier.state_dict(), classifier.state_dict())  # every process has trained it; the first one's bits count
    demos = [pair for pair in samples["defender"] if game.is_demonstration(*pair)]
    rng = np.random.default_rng([config.seed, 2**20 + 1])  # the test sets are the same whatever was trained above
    tests = game.test_sets(config.eval_prompts, rng)
    return World(
        policies["attacker"], policies["defender"], seeds=game.fixed_prompts, test_prompts=tests.pop("in distribution"), more_tests=tests,
        benign_prompts=game.sample_prompts(max(1, config.eval_prompts // 2), rng, harmful=False, held_out=True),
        demos=demos, judge=known["chosen"], held_out_judge=held_out, refused=game.refused, helpful=game.helpful, embedder=embedder, judge_to_save=judge_to_save)


def own_world(config, start=None):
    """Your own models: prompts, pairs and judges from files, or from the hub where no flag names one. With --prompts
    all data are your own: what you do not name is done without."""
    demos_used = config.ptx_coef > 0 or "distill" in config.average or (config.sft_steps > 0 and not start)
    flags = ([] if start else ["prompts", "test_prompts", "benign_prompts"]) + ["sft_data"] * demos_used
    names = {flag: getattr(config, flag) or (f"Anthropic/hh-rlhf/{HUB_DATA[flag]}" if flag in HUB_DATA and not config.prompts else None) for flag in flags}
    data = {flag: (name, read_rows(getattr(config, flag) or hub_file(flag))) for flag, name in names.items() if name}
    place = config.device, config.trust_remote_code
    judge, held_out = (named(flag, load_judge, getattr(config, flag), config.unsafe_label, (), *place) for flag in ("judge", "held_out_judge"))
    embedder = word_embedder if config.embedder == "words" else load_embedder(config.embedder, *place)
    policies = {name: slim(named(name, load_policy, start / name if start else getattr(config, name), config.critic, DTYPES[config.dtype], *place), config)
                for name in ("attacker", "defender")}
    if start:  # a resumed run goes on with its own prompts, whatever has become of the files
        saved = json.loads((start / "prompts.json").read_text(encoding="utf-8"))
        seeds, test, benign = (saved[name] for name in ("seeds", "test_prompts", "benign_prompts"))
    else:
        seeds, test, benign = own_prompts(config, data, policies)
    pairs = own_pairs(config, *data["sft_data"], test + benign, policies["defender"]) if "sft_data" in data else []
    if not pairs and config.ptx_coef > 0:
        raise ValueError("--ptx_coef needs demonstrations, got none; pass --sft_data with (prompt, response) pairs, or --ptx_coef 0")
    for flag, what in (("sft_data", "the defender is not warm-started"), ("benign_prompts", "over-refusal is not measured")):
        if not (start or flag in data or getattr(config, flag)):
            print(f"without --{flag} {what}")
    for policy in policies.values() if config.shard else ():
        shard(policy, policy.device.type)
    if config.sft_steps and not (start or config.dry_run):
        rng = np.random.default_rng([config.seed, 2**20])
        some = draw(seeds, min(len(seeds), 4000), rng)  # each is embedded, then compared with all others
        for i, (name, pairs_of) in enumerate({"defender": pairs, "attacker": neighbour_pairs(some, embedder, config.template, rng)}.items()):
            if pairs_of:
                with bar(f"SFT of the {name}", config.sft_steps) as progress:
                    rate = config.learning_rate if name == "defender" else config.attacker_learning_rate
                    sft(policies[name], pairs_of, config.sft_steps, config.batch_size, SFT_RATE * rate, [config.seed, i], progress, config.micro_batch)
                fold_lora(policies[name], config.seed)
    refused = lambda responses: [float(is_refusal(r)) for r in responses]
    return World(
        policies["attacker"], policies["defender"], seeds=seeds, test_prompts=test, benign_prompts=benign,
        demos=pairs, judge=judge, held_out_judge=held_out, refused=refused, helpful=None, embedder=embedder)


SFT_RATE = 5  # the warm start's learning rate, in units of the player's PPO learning rate


def named(flag, load, *args):
    """What a flag asks for; an error says which flag."""
    try:
        return load(*args)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def own_prompts(config, data, policies):
    """(seeds, test prompts, benign prompts): first human turns that both players can read; no prompt is in two of the three.

    Without --test_prompts a tenth of --prompts is for testing, by hash. Prints a line for each file."""
    room = {"attacker": policies["attacker"].context - config.attack_tokens, "defender": policies["defender"].context - config.response_tokens}
    limit = " or ".join(str(tokens) for tokens in sorted({*room.values()}))

    def fit(prompts):  # the attacker reads a prompt in its template
        prompts = [prompt for prompt, in prompts]
        lengths = zip(policies["attacker"].encode([config.template.format(p) for p in prompts]), policies["defender"].encode(prompts))
        return [len(a) <= room["attacker"] and len(d) <= room["defender"] for a, d in lengths]

    def pick(flag, others):
        if flag not in data:
            return [], None
        name, rows = data[flag]
        kept, line = usable(name, [(first_turn(row["prompt"]),) for row in rows], {*map(plain, others)}, fit, limit)
        return [prompt for prompt, in kept], line

    test, test_line = pick("test_prompts", [])
    seeds, line = pick("prompts", test)
    benign, benign_line = pick("benign_prompts", seeds + test)
    if not test:
        seeds, test = ([p for p in seeds if is_test(p) == tested] for tested in (False, True))
    else:
        print(f"{test_line}, {len(test)} to test")
    print(f"{line}, {len(seeds)} to train on, {len(test)} to test")
    if benign:
        print(f"{benign_line}, {len(benign)} to measure over-refusal")
    if not seeds or not test:
        raise ValueError(f"--prompts must leave at least one prompt for training and one for testing, got {len(seeds)} and {len(test)}; "
                         "add prompts or pass --test_prompts")
    return seeds, test[:config.eval_prompts], benign[:config.eval_prompts]


def own_pairs(config, name, rows, tested, policy):
    """(prompt, response) pairs that the defender learns from: no test prompt, and none much longer than what it plays with, for the memory."""
    limit = min(policy.context, max(256, 4 * config.response_tokens))

    def fit(pairs):
        prompts, responses = zip(*pairs)
        return [len(p) + len(r) <= limit for p, r in zip(policy.encode(list(prompts)), policy.encode_responses(responses))]

    kept, line = usable(name, [(row["prompt"], row.get("response") or row.get("chosen")) for row in rows], {*map(plain, tested)}, fit, limit)
    print(f"{line}, {len(kept)} to learn from")
    return kept


def neighbour_pairs(seeds, embedder, template, rng, k=5):
    """The attacker's warm start: (seed in its template, one of its k nearest other seeds)."""
    if len(seeds) < 2:
        return []
    vectors, pairs = embedder(seeds), []
    for i, vector in enumerate(vectors):
        nearest = np.argsort(-(vectors @ vector), kind="stable")[:k + 1]
        pairs.append((template.format(seeds[i]), seeds[rng.choice(nearest[nearest != i])]))
    return pairs


def bar(name, total):
    return tqdm(total=total, desc=f"{name:<22}", dynamic_ncols=True)


def show_prompts(config, world, n=3):
    """Print the first prompts of both players and the first exchanges of both judges as their models will read them:
    the tokens decoded again, special ones and chat template included, control characters escaped."""
    def show(tokenizer, ids):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        print(f"{len(ids):5} tokens  {visible(text)}")

    for name, policy, prompts in (("attacker", world.attacker, [config.template.format(s) for s in world.seeds[:n]]), ("defender", world.defender, world.seeds[:n])):
        print(f"\nthe {name} reads")
        for ids in policy.encode(prompts):
            show(policy.tokenizer, ids)
    exchanges = world.demos[:n] or [(prompt, "I am sorry, I cannot help with that.") for prompt in world.seeds[:n]]
    for name, judge in (("judge", world.judge), ("held-out judge", world.held_out_judge)):
        print(f"\nthe {name} reads")
        for prompt, response in exchanges:
            if not hasattr(judge, "model"):  # a function of the two texts
                print(f"{prompt!r}, {response!r}")
                continue
            seen = []  # what reaches the model itself
            hook = judge.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("input_ids", *args)), with_kwargs=True)
            call_judge(judge, [prompt], [response])
            hook.remove()
            show(judge.tokenizer, seen[0][0].tolist())


def slim(policy, config):
    if config.lora:
        add_lora(policy, config.lora, config.seed)
    if config.gradient_checkpointing:
        checkpoint_blocks(policy)
    return policy


def plan_memory(config, world, players):
    """Print what the game will need beside its data (the warm start before it is not counted); returns its largest moment in bytes."""
    plan, references = {}, 1 + (config.kl_anchor == "previous")  # the first policies, and those of the last round
    for name, player in players.items():
        prompts = [config.template.format(s) for s in world.seeds] if name == "attacker" else world.seeds + world.test_prompts
        plan[name] = player_memory(
            **model_size(player.policy.lm), rows=config.micro_batch or -(-config.batch_size // config.minibatches),
            prompt_tokens=max(map(len, player.policy.encode(prompts))), new_tokens=player.max_new_tokens, sampled_rows=4 * config.micro_batch or 256,
            bf16=config.dtype == "bf16", lora=config.lora, separate_critic=config.critic == "separate",
            references=references, checkpointing=config.gradient_checkpointing, device=config.device.split(":")[0],
            ranks=world_size() if config.shard else 1)
    models = {"judge": world.judge, "held-out judge": world.held_out_judge, "embedder": world.embedder}
    others = {what: sum(p.numel() * p.element_size() for p in f.model.parameters()) for what, f in models.items() if hasattr(getattr(f, "model", 0), "parameters")}
    if config.device == "cpu":  # else they are in main memory
        kept = ("mixture" in config.average) * min(config.average_size, config.rounds) + ("weights" in config.average)
        others["averages"] = kept * sum(p["reference"] for p in plan.values()) / references
    table, most = memory_plan(plan, others)
    print(table)
    return most


def make_players(config, world):
    """Both players, each with its own critic, reference and optimizer."""
    shared = dict(epochs=config.ppo_epochs, minibatches=config.minibatches, micro_batch=config.micro_batch, target_kl=config.target_kl,
                  temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    return {
        "attacker": Player("attacker", world.attacker, config.attack_tokens, config.attacker_learning_rate, config.attacker_kl_coef,
                           config.entropy_coef, **shared),
        "defender": Player("defender", world.defender, config.response_tokens, config.learning_rate, config.kl_coef, **shared)}


# --- entry point ------------------------------------------------------------------------------------------------------
def help_text():
    """Every option on a line or two, with its default and its reason."""
    lines = ["usage: python train.py [FILE.yaml | FILE.json] [--OPTION VALUE ...]", "", *__doc__.split("\n\n")[0].splitlines(), "",
             "Of two defaults the first is the embedded game's, the second your own models'. In a file, names have no dashes."]
    for entry in fields(Config):
        if entry.name in HEADINGS:
            lines.append(HEADINGS[entry.name])
        default = " / ".join(map(str, PRESETS.get(entry.name, [] if entry.default is None else [entry.default])))
        reason, default = (entry.metadata["help"], default) if len(default) <= 15 else (f"{entry.metadata['help']} ({default})", "")
        lines += textwrap.wrap(reason, 118, initial_indent=f"  --{entry.name:<22} {default:<15} ", subsequent_indent=" " * 43, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def flags_of(values, source):
    """{option: value} of a file or of a run as flags: all ways of giving options are checked by the same parser."""
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold names and values, got {str(values)[:40]!r}")
    if unknown := {str(name).replace("-", "_") for name in values} - {entry.name for entry in fields(Config)}:
        raise ValueError(f"{source} must hold options of train.py, got {', '.join(sorted(unknown))}" + "; a run goes on with --resume RUN" * ("versions" in unknown))
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def parse(argv):
    """The configuration from flags, from a .json or .yaml file and the flags after it, or from the run that is resumed."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False)
    parser.format_help = help_text
    parser.error = lambda message: fail(f"{message}; see python train.py --help")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what was given comes out
    try:
        if argv and argv[0].endswith((".json", ".yaml", ".yml")):
            text = Path(argv[0]).read_text(encoding="utf-8")
            argv = flags_of(json.loads(text) if argv[0].endswith(".json") else yaml.safe_load(text), argv[0]) + argv[1:]
        given = vars(parser.parse_args(argv))
    except Exception as error:
        fail(f"cannot read the configuration: {error}")
    config = Config(**given)
    config.given = frozenset(given)
    if empty := [name for name, value in given.items() if value == ""]:  # as an unset variable of a shell is
        fail(f"--{empty[0]} must not be empty; to do without it leave it out")
    if not config.resume:
        return config
    if len(given) > 1:
        fail("--resume takes the run folder alone: the run's own configuration is used")
    try:
        saved = json.loads((Path(config.resume) / "config.json").read_text(encoding="utf-8"))["config"]
        if missing := {entry.name for entry in fields(Config)} - set(saved):  # today's default would not be what the run began with
            raise ValueError(f"it was begun by an older version, without {', '.join(sorted(missing))}")
        return Config(**{**vars(parser.parse_args(flags_of(saved, config.resume))), "resume": config.resume, "out": config.resume})
    except Exception as error:
        fail(f"--resume needs a run folder with its config.json, got {config.resume} ({type(error).__name__}: {error})")


def refuse_contradictions(config):
    """What the user gave and the run would silently not do. Defaults and what is turned off contradict nothing."""
    own, nobody = bool(config.attacker), config.method in ("sft", "paraphrase")
    for wrong, names, reason in (
            (own, "judge_steps", "only the embedded game trains its judge"),
            (not own, "prompts test_prompts benign_prompts sft_data", "the embedded game has its own; --attacker and --defender bring in your models"),
            (nobody, "rounds defender_steps", f"--method {config.method} trains nobody"),
            (nobody or config.method == "iterative", "attacker_steps restart entropy_coef", f"--method {config.method} trains no attacker"),
            (config.method != "gpo", "opponent replay mine mine_temperature", f"it belongs to --method gpo, not to {config.method}"),
            (not config.mine, "mine_temperature", "--mine is 0"), ("mixture" not in config.average, "average_size", "--average keeps no mixture"),
            (not config.diversity and config.method != "iterative", "diversity_terms", "--diversity is 0")):
        for name in names.split():
            if wrong and name in config.given and getattr(config, name) not in (0, "last"):
                raise ValueError(f"--{name} {getattr(config, name)} would do nothing: {reason}")
    for name in ("judge", "held_out_judge", "embedder"):
        if own and getattr(config, name) == PRESETS[name][0]:
            raise ValueError(f"--{name} {getattr(config, name)} is the embedded game's; your own models need another")


def resolve(config):
    """Fill in what the presets decide, and refuse impossible settings, before anything is made."""
    if bool(config.attacker) != bool(config.defender):
        raise ValueError("--attacker and --defender go together: pass both, or neither for the embedded game")
    for name, values in PRESETS.items():
        if getattr(config, name) is None:
            setattr(config, name, values[bool(config.attacker)])
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?" if torch.cuda.is_available() else "cpu", config.device):
        raise ValueError(f"--device must be auto, cpu or, where there is one, cuda, got {config.device!r}")
    if config.held_out_judge == "toy":
        raise ValueError("--held_out_judge must differ from the judge of training, got toy; the embedded game's own is 'truth'")
    choices = {
        "method": METHODS, "log": ("none", "tensorboard", "wandb"), "first": ("attacker", "defender"), "opponent": ("last", "mixture"), "kl_anchor": ("initial", "previous"), "critic": ("shared", "separate"),
        "dtype": ("fp32", "bf16", "auto"), "average": ("mixture,weights", "mixture", "weights", "both", "distill", "mixture,weights,distill", "none"),
        "diversity_terms": ("bleu,embedding", "embedding,bleu", "bleu", "embedding")}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    config.dtype = DTYPE_NAMES[best_dtype(config.device)] if config.dtype == "auto" else config.dtype
    config.average = {"both": "mixture,weights", "distill": "mixture,weights,distill"}.get(config.average, config.average)
    if config.opponent == "mixture" and "mixture" not in config.average:
        raise ValueError(f"--opponent mixture needs --average mixture, got {config.average!r}")
    at_least_1 = "rounds judge_steps batch_size minibatches ppo_epochs attack_tokens response_tokens eval_prompts save_every average_size"
    at_least_0 = ("defender_steps attacker_steps sft_steps micro_batch top_k seed kl_coef attacker_kl_coef entropy_coef ptx_coef "
                  "diversity restart replay mine history guard lora target_kl")
    least = {**dict.fromkeys(at_least_1.split(), 1), **dict.fromkeys(at_least_0.split(), 0)}
    for name, bound in least.items():
        if not bound <= (value := getattr(config, name)) < 2**31:
            raise ValueError(f"--{name} must be a finite number of at least {bound}{' and below 2**31' * (value > bound)}, got {value}")
    for name in ("learning_rate", "attacker_learning_rate", "temperature", "mine_temperature"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"--{name} must be a finite number above 0, got {getattr(config, name)}")
    if not 0 < config.top_p <= 1 or config.replay >= 1 or config.guard >= 1:
        raise ValueError(f"--top_p must lie in (0, 1], --replay and --guard in [0, 1), got {config.top_p}, {config.replay} and {config.guard}")
    if config.minibatches > config.batch_size:
        raise ValueError(f"--minibatches must be at most --batch_size, got {config.minibatches} and {config.batch_size}")
    if config.shard and world_size() == 1 and not config.resume:
        raise ValueError("--shard needs several processes to share the weights among, got one; start with torchrun --nproc_per_node=N train.py ...")
    if config.shard and config.lora:
        raise ValueError("--shard and --lora do not go together: adapters are small, and DDP (without --shard) sums their gradients alone")
    config.shard = config.shard and world_size() > 1  # a resumed run may have fewer processes than it began with
    check_template(config.template)
    refuse_contradictions(config)
    if config.log != "none" and not importlib.util.find_spec(config.log):
        raise ValueError(f"--log {config.log} needs the package {config.log}: pip install {config.log}")
    if config.start and not config.resume:
        try:
            other = json.loads((Path(config.start) / "config.json").read_text(encoding="utf-8"))["config"]
            json.loads((Path(config.start) / "checkpoints" / "start" / "prompts.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--start needs a run folder with its config.json and checkpoints/start, got {config.start}") from error
        different = [name for name in WARM_START if other.get(name) != getattr(config, name)]
        if different:
            raise ValueError(f"--start needs a run of the same {', '.join(different)}, got {config.start} with "
                             f"{', '.join(str(other.get(name)) for name in different)}")
    config.out = config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.method}_s{config.seed}"
    if not config.resume and Path(config.out).exists() and (not Path(config.out).is_dir() or any(Path(config.out).iterdir())):
        raise ValueError(f"--out must name a new or empty folder, got {config.out}; to go on with a run use --resume {config.out}")
    if config.dry_run:  # writes nothing
        return config
    try:  # find out now, not after minutes of training
        Path(config.out).mkdir(parents=True, exist_ok=True)
        if not config.resume:
            Path(config.out).rmdir()
    except OSError as error:
        raise ValueError(f"--out must lie in a folder that can be written to, got {config.out} ({error.strerror})") from error
    return config


def tracker(config, folder):
    """The function track(step, metrics) of --log. It begins with what metrics.jsonl holds, so a resumed run has each step once."""
    if config.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        writer = SummaryWriter(folder / "tensorboard")

        def track(step, metrics):
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()
    else:
        import wandb
        remote = wandb.init(project="gpo", name=folder.name, config=asdict(config), dir=folder)
        track = lambda step, metrics: remote.log(metrics, step=step)
    for line in read_lines(folder / "metrics.jsonl"):
        track(line.pop("step"), {name: value for name, value in line.items() if name != "role"})
    return track


@contextlib.contextmanager
def stop_after_a_step(run):
    """Here the first Ctrl-C or SIGTERM lets the present PPO step end; a second one stops at once."""
    def ask(number, frame):
        restore()
        run.stop = number
        os.write(2, b"\nfinishing this PPO step and saving; once more stops at once\n")  # print may be at work just now

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    in_main = threading.current_thread() is threading.main_thread()  # signals reach no other
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        yield
    finally:
        restore()


def be_deterministic():
    """What `--deterministic` does; README says how far that goes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks at it before its first product
    torch.use_deterministic_algorithms(True, warn_only=True)  # an error would stop the sampler, whose cumsum PyTorch does not vouch for on a GPU
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)  # two threads were seen to add in another order, in one run of four


def begin(config):
    """Take the run folder for this process alone, and make a new one with its config.json in one move: from here on it can be
    resumed. Returns the descriptor of the lock, which the system lets go of when the process ends, however it ends."""
    folder = Path(config.out)
    if not config.resume:
        versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, transformers, np)}, "platform": platform.platform(),
                    "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else platform.machine(),
                    "commit": subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()}
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as beside:
            (new := Path(beside) / "run").mkdir()
            write_json(new / "config.json", {"config": asdict(config), "versions": versions})
            os.rename(new, folder)  # an error where another run has just taken it
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(ImportError):  # Windows
        import fcntl
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ValueError(f"a run folder is for one process at a time, and one is at work in {folder}; wait for its end or pass another --out") from error
    return lock


def prepare(run, start):
    """Write what the game starts from, and the test sets."""
    with whole_folder(start, not rank()) as temporary:
        for name, player in run.players.items():
            save_policy(player.policy, temporary / name)
        if rank():
            return
        if run.world.judge_to_save:
            run.world.judge_to_save.model.save_pretrained(temporary / "judge")
            save_tokenizer(run.world.judge_to_save.tokenizer, temporary / "judge")
        write_json(temporary / "prompts.json", {name: getattr(run.world, name) for name in ("seeds", "test_prompts", "benign_prompts", "more_tests")})
        write_json(temporary / "attack_seeds.json", run.attack_seeds)
        for name in ("metrics.jsonl", "games.jsonl"):
            (run.folder / name).touch()


def play_game(config, clock):
    """All of a run, in a folder that is this process's alone. clock: when the program began."""
    folder = Path(config.out)
    start = folder / "checkpoints" / "start"
    begun = start.exists()
    try:
        resident = peak_memory(config.device)
        source = start if begun or not config.start else Path(config.start) / "checkpoints" / "start"
        world = (own_world if config.attacker else toy_world)(config, source if begun or config.start else None)
        players = make_players(config, world)
        planned = plan_memory(config, world, players)
        if config.dry_run:
            show_prompts(config, world)
            return
        world.judge, world.held_out_judge = shared_judge(world.judge), shared_judge(world.held_out_judge)
        run = Run(config, folder, world, players)
        run.planned, run.resident = planned, resident
        try:
            run.load()
        except Exception as error:
            raise ValueError(f"the run in {folder} is damaged: {error}; remove its newest checkpoint or start again") from error
        run.before = run.before or run.evaluate()
        if not begun:  # only now: whatever can be wrong with the input has been tried
            prepare(run, start)
        run.track = tracker(config, folder) if config.log != "none" and not rank() else None
    except (ValueError, OSError, SafetensorError) as error:  # a user's mistake: one line, nothing left behind
        if not (config.resume or config.dry_run or start.exists() or rank()):
            shutil.rmtree(folder, ignore_errors=True)
        fail(error)
    except KeyboardInterrupt as stop:
        interrupted(stop, f" before the game began{'' if config.dry_run else f'; go on with: python train.py --resume {folder}'}")
    try:
        print(f"attack success on held-out prompts before the game: {run.before['asr_held_out_judge']:.1%}")
        with stop_after_a_step(run), tqdm(total=len(schedule(config)), initial=run.step, dynamic_ncols=True) as run.bar:
            train(config, world, players, run)
        if run.stop:
            raise KeyboardInterrupt(run.stop)
        rows, examples = run.finish(time.time() - clock)
    except (JudgeError, NotFinite, OSError, SafetensorError) as error:  # the judge broke its word, numbers are not finite, the disk is full
        fail(f"{error}; the run can go on with --resume {folder}")
    except KeyboardInterrupt as stop:
        interrupted(stop, f"; go on with: python train.py --resume {folder}")
    print(f"\n{summary_table(rows)}\n")
    for example in examples:
        print("  prompt  {}\n  before  {}\n  after   {}\n".format(*map(visible, example)))
    print(f"{time.time() - clock:.0f} seconds. Read {folder}/report.md, look at {folder}/curves.png;\n"
          f"the models are in {folder}/attacker and {folder}/defender, every exchange of a PPO step in {folder}/games.jsonl.")


def main(argv):
    keep_freed_memory()
    join_processes()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries are not news; what could not be had is said once
    clock, config = time.time(), parse(argv)
    if config.deterministic:
        be_deterministic()
    if config.resume and (Path(config.out) / "summary.json").is_file():
        print(f"the run in {config.out} is finished: read {config.out}/report.md")
        return
    try:
        config = first_decides(lambda: resolve(config))
        lock = None if config.dry_run else first_decides(lambda: begin(config))
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt as stop:
        interrupted(stop, " before the run began")
    try:
        play_game(config, clock)
    finally:
        if not (config.dry_run or rank()):
            os.close(lock)


if __name__ == "__main__":
    sigterm_as_ctrl_c()
    main(sys.argv[1:])
