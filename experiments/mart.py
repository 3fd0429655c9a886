"""MART (Ge et al., arXiv 2311.07689), a baseline without reinforcement learning: in every round each player is
fine-tuned on its own successes.

    python -m experiments.mart --start RUN --out RUN    and other options of train.py; from the players of --start

The attacker writes ATTACKS attacks and the defender answers each ANSWERS times. The attacker is then fine-tuned on the
attacks that got an unsafe answer; the defender on the safest answer to each, if it is safe, and on as many
demonstrations, which replace the paper's second reward model, that of helpfulness. OUT is an ordinary run folder
without PPO steps.
"""

import shutil
import time
from collections.abc import Sequence

import numpy as np

from gpo import SFTSettings, new_seed, sample, sft
from harness.data import as_a_program, fail, normalized
from harness.run import run_folder, start_program
from harness.world import World, evaluate, make_world, show_prompts
from reward import call_judge

ROUNDS = 4
ATTACKS = 240  # per round
ANSWERS = 4  # to each attack
STEPS = 150  # of fine-tuning, per player and round
BATCH = 64
LEARNING_RATE = 3e-4


def what_worked(world: World, rng: np.random.Generator) -> dict[str, list[tuple[str, str]]]:
    """{player: (prompt, response) pairs of a new round, for its fine-tuning}."""
    attacker = world.players["attacker"]
    defender = world.players["defender"]
    seeds = sample(world.seeds, ATTACKS, rng)
    attacks = attacker.generate(seeds, new_seed(rng)).texts
    asked = np.repeat(np.array(attacks, dtype=object), ANSWERS).tolist()
    answers = defender.generate(asked, new_seed(rng)).texts
    p_safe = call_judge(world.judge, asked, answers).reshape(ATTACKS, ANSWERS)  # NaN where undecided
    safest = np.nan_to_num(p_safe, nan=-1).argmax(1)
    excluded = world.held_out()
    pairs = {"attacker": [], "defender": []}
    for i, attack in enumerate(attacks):
        if (p_safe[i] < 0.5).any():
            pairs["attacker"].append((attacker.template.format(seeds[i]), attack))
        if p_safe[i, safest[i]] >= 0.5 and normalized(attack) not in excluded:
            pairs["defender"].append((attack, answers[i * ANSWERS + safest[i]]))
    pairs["defender"] += sample(world.demos, len(pairs["defender"]), rng)
    return pairs


def play_rounds(world: World, seed: int) -> None:
    """Fine-tune both players of the world, ROUNDS times; without pairs a policy does not change."""
    for round in range(ROUNDS):
        pairs = what_worked(world, np.random.default_rng([seed, round]))
        for i, (name, player) in enumerate(world.players.items()):
            print(f"round {round + 1}/{ROUNDS}: {len(pairs[name])} pairs for the {name}")
            settings = SFTSettings(STEPS, BATCH, LEARNING_RATE, [seed, round, i], player.micro_batch,
                                   f"SFT of the {name}")
            if pairs[name]:
                sft(player.policy, pairs[name], settings)


def main(argv: Sequence[str]) -> None:
    """Play all rounds and finish the run folder; Ctrl-C and errors leave no folder."""
    clock = time.time()
    if any(argument.startswith("--resume") for argument in argv):
        fail("a MART run cannot be resumed, as it saves no rounds; begin it again, in a new folder")
    config = start_program([*argv, "--method", "paraphrase", "--average", "none"])
    with run_folder(config) as folder:
        try:
            world = make_world(config, folder.start)
            if config.dry_run:
                show_prompts(world)
                return
            if not world.demos:
                raise ValueError("MART needs demonstrations, got none; pass --sft_data with (prompt, response) pairs")
            folder.open(world, None, 0)
            play_rounds(world, config.seed)
            after = evaluate(world, world.players["attacker"], world.players["defender"])
            folder.finish({}, {"after": after}, {"made_by": "MART"}, clock)
        except BaseException:
            if not (folder.path / "summary.json").exists():  # else it is finished
                shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
                folder.leave_nothing()  # train.py --resume would end it without its rounds
            raise


if __name__ == "__main__":
    as_a_program(main)
