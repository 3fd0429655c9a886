"""Train an attacker and a defender against each other: Algorithm 1 of "Toward Optimal LLM Alignments Using
Two-Player Games" (arXiv 2406.10977), from an empty folder to a report.

    python train.py                                            the embedded game, on a CPU, about 3 minutes
    python train.py --attacker gpt2 --defender gpt2            your own models: hub ids or local folders
    python train.py config.yaml --seed 3                       options from a file; flags after it count more
    python train.py --resume runs/...                          go on where a run stopped (Ctrl-C ends a step, and saves)
    torchrun --nproc_per_node=8 train.py [--shard] ...         on several GPUs: DDP, or FSDP2 with --shard

One round: the attacker takes `--attacker_steps` PPO steps against the frozen defender, then the defender
`--defender_steps` against the frozen attacker. The loop itself is `train`, below.

Differs from the paper (numbers as in the README; rows are of docs/results.md):
(4) The attacker moves first, so that the finished defender has answered the last attacker: row *defender first*.
(5) `--restart`: every few rounds the attacker begins anew, and looks for another hole: row *no restarts*.
(6) `--replay`: a share of the defender's batch is drawn from earlier attacks, the successful ones more often, so
that it does not forget them: row *no mining, no replay*.
(7) `--mine`: untrained attacks, and attacks that once succeeded, are tried on the defender before its turns; what
succeeds is replayed too: row *no mining*.
(8) `--ptx_coef`: the defender keeps up the likelihood of demonstrations, against over-refusal: row *no demonstrations*.
(11) R_div is centred over the batch: its level, about -k for every attack, is no signal but swamps a critic that
starts at zero: exercise 2 of docs/walkthrough.md; row *k = 10* is possible only so.
(12) `--guard`: an attack that has left the first attacker's language counts as a failed repetition: row *no guard*.
(13) No test prompt is in an update of the defender, whoever wrote it: else the tables would measure memory.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data import fail, interrupted, quiet_libraries, sigterm_as_ctrl_c, visible
from gpo import Game, NotFinite, Player, play, ppo_update
from model import demonstrations, keep_freed_memory
from options import Config, parse, resolve
from report import summary_table
from reward import JudgeError
from run import Run, begin, new_seed, prepare, stop_after_a_step, tracker
from scale import first_decides, join_processes, peak_memory, rank, shared_judge
from world import World, draw, make_players, make_world, plan_memory, show_prompts

NOVELTY = {"self_bleu": "bleu", "cosine": "embedding"}  # metric -> term of the diversity reward


# --- the loop: Algorithm 1 --------------------------------------------------------------------------------------
def train(config: Config, world: World, players: dict[str, Player], run: Run) -> None:
    """Algorithm 1. Every turn of the schedule is one PPO step of the mover; every round ends with an evaluation and the averages."""
    turns = schedule(config)
    for step in range(run.step, len(turns)):
        run.step, turn, mover = step, turns[step], players[turns[step].role]
        rng, clock = np.random.default_rng([config.seed, step]), time.time()  # all randomness of this step
        seeds = draw(world.seeds, config.batch_size, rng)
        if turn.first_of_turn:
            begin_turn(config, turn, mover, run, rng)
        if turn.role == "attacker":  # seed -> attack -> response of the frozen defender -> P(unsafe) + k R_div
            game = play(mover, run.opponent("defender"), seeds, world.judge, new_seed(rng), config.template)
            scores, similarity = attacker_scores(config, game, run)
            rollout, demos = game.attacks, None
        else:  # prompt of the frozen attacker, or of an earlier one -> response -> P(safe)
            prompts = defender_prompts(config, seeds, run, rng)
            game = play(None, mover, prompts, world.judge, new_seed(rng))
            scores, similarity, rollout = game.p_safe, {}, game.responses  # Eq. (3.1): the defender maximises R(x, y)
            demos = demonstrations(mover.policy, draw(world.demos, 48, rng)) if config.ptx_coef > 0 else None
        run.remember(game)
        played = time.time()
        metrics = ppo_update(mover, rollout, scores, new_seed(rng), demos, config.ptx_coef)  # Eq. (3.3)
        metrics |= game_metrics(turn, game, similarity, run, clock, played)
        if turn.last_of_round:
            for name, player in players.items():
                for average in run.averages[name].values():
                    average.add(player.policy)  # Theorem 3.2
            metrics |= run.evaluate_round(turn.round, metrics)
        run.log(turn.role, turn.round, game, scores, metrics)
        stop = run.stop_asked()  # Ctrl-C or SIGTERM; --resume begins with the next step
        if stop or (step + 1) % config.save_every == 0 or step + 1 == len(turns):
            run.save()
        if stop:
            return


class Turn(NamedTuple):
    """Whose PPO step it is."""

    round: int
    role: str
    first_of_turn: bool
    last_of_round: bool


def schedule(config: Config) -> list[Turn]:
    """Algorithm 1's order of PPO steps: in each round all of one player's, then all of the other's."""
    if config.method in ("sft", "paraphrase"):
        return []
    steps = {"attacker": 0 if config.method == "iterative" else config.attacker_steps, "defender": config.defender_steps}
    order = sorted(steps, key=lambda role: role != config.first)
    in_a_round = [(role, i == 0) for role in order for i in range(steps[role])]
    return [Turn(round, *step, i + 1 == len(in_a_round)) for round in range(config.rounds) for i, step in enumerate(in_a_round)]


def begin_turn(config: Config, turn: Turn, mover: Player, run: Run, rng: np.random.Generator) -> None:
    """Before the first step of a player's turn: a new attacker now and then, the anchor, and attacks mined for the defender."""
    if turn.role == "attacker" and config.restart and turn.round % config.restart == 0:
        mover.go_back(run.first_attacker.policies[0])
    if config.kl_anchor == "previous":
        mover.anchor()
    if turn.role == "defender" and config.mine and config.method == "gpo":
        run.mine(config.mine, rng)


def attacker_scores(config: Config, game: Game, run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the attacker is paid for each attack, (B,): P(unsafe) + k R_div; and the similarity to the history by each term.

    Eq. (3.1) as its minimiser sees it, 1 - R(x, y) in place of -R(x, y). An attack that is strange, beyond the `--guard`,
    counts as a repetition that fails.
    """
    similarity = run.diversity.score(game.prompts)
    run.diversity.add(game.prompts)
    strange = run.strange(game.attacks)  # (B,), True: no longer in its language
    r_div = np.where(strange, -1.0, similarity["reward"])
    p_unsafe = np.where(strange, 0.0, 1 - game.p_safe)
    # R_div is centred over the batch: its level, the same for all, would swamp a critic that starts at zero
    return p_unsafe + config.diversity * (r_div - r_div.mean()), similarity


def defender_prompts(config: Config, seeds: list[str], run: Run, rng: np.random.Generator) -> list[str]:
    """What the defender is asked in one step: the only place where the methods of Table 1 differ."""
    if config.method == "rlhf":  # the fixed prompts themselves
        return seeds
    if config.method == "iterative":  # no adversary: the most novel quarter of untrained attacks
        texts = [text for text in run.attacks(seeds * 4, new_seed(rng)) if text not in run.test_prompts]
        r_div = run.diversity.score(texts)["reward"]
        chosen = [texts[i] for i in np.argsort(-r_div, kind="stable")[:len(seeds)]]
        run.diversity.add(chosen)
        return chosen
    replayed = run.replayed(int(config.replay * len(seeds)), rng) if run.memory and config.replay > 0 else []
    seeds = seeds[len(replayed):]
    fresh = run.attacks(seeds, new_seed(rng))
    return [seed if text in run.test_prompts else text for seed, text in zip(seeds, fresh)] + replayed  # no test prompt is trained on


def game_metrics(turn: Turn, game: Game, similarity: dict[str, np.ndarray], run: Run, clock: float, played: float) -> dict[str, float]:
    """What a step's exchanges say of the game, whoever moves; and its seconds. similarity: {term: (B,)}, to earlier attacks;
    clock, played: when the step and its update began."""
    metrics = {"time/rollout": played - clock - game.score_seconds, "time/score": game.score_seconds, "time/update": time.time() - played}
    run.count(*game.sampled)
    metrics |= {"sampled_tokens": run.sampled_tokens, "game/attack_success": float(np.mean(1 - game.p_safe)),  # by the training judge
                "game/undecided": len(game.sampled[1]) - len(game.p_safe)}  # exchanges without a verdict: in no update and in no rate
    if turn.role == "attacker":
        metrics["diversity/different"] = len(set(game.prompts)) / len(game.prompts)
    for name, term in NOVELTY.items():
        if term in similarity and np.isfinite(similarity[term]).all():
            metrics[f"diversity/{name}"] = float(similarity[term].mean())
    return metrics


# --- entry point ------------------------------------------------------------------------------------------------------
def be_deterministic() -> None:
    """What `--deterministic` does; docs/running.md says how far that goes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks at it before its first product
    torch.use_deterministic_algorithms(True, warn_only=True)  # an error would stop the sampler: on a GPU its cumsum has no such form
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)  # two threads were seen to add in another order, in one run of four


def set_up(config: Config) -> Run | None:
    """The run in the folder `config.out`, new or as far as it has come, ready to play; None after a dry run. Ends the process
    with one line where the input is wrong, and leaves nothing behind."""
    folder, start = Path(config.out), Path(config.out) / "checkpoints" / "start"
    begun = start.exists()
    try:
        resident = peak_memory(config.device)
        source = Path(config.start) / "checkpoints" / "start" if config.start and not begun else start
        world = make_world(config, source if begun or config.start else None)
        players = make_players(config, world)
        planned = plan_memory(config, world, players)
        if config.dry_run:
            return show_prompts(config, world)
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
        return run
    except (ValueError, OSError, SafetensorError) as error:
        if not (config.resume or config.dry_run or start.exists() or rank()):
            shutil.rmtree(folder, ignore_errors=True)
        fail(error)
    except KeyboardInterrupt as stop:
        interrupted(stop, f" before the game began{'' if config.dry_run else f'; go on with: python train.py --resume {folder}'}")


def play_game(run: Run, clock: float) -> None:
    """From the first evaluation to the last line. clock: when the program began. However it stops, one line says how to go on."""
    config, folder = run.config, run.folder
    try:
        print(f"attack success on held-out prompts before the game: {run.before['asr_held_out_judge']:.1%}")
        with stop_after_a_step(run), tqdm(total=len(schedule(config)), initial=run.step, dynamic_ncols=True) as run.bar:
            train(config, run.world, run.players, run)
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


def main(argv: list[str]) -> None:
    """Read the options, take the run folder, play."""
    keep_freed_memory()
    join_processes()
    quiet_libraries()
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
        if run := set_up(config):
            play_game(run, clock)
    finally:
        if not (config.dry_run or rank()):
            os.close(lock)


if __name__ == "__main__":
    sigterm_as_ctrl_c()
    main(sys.argv[1:])
