"""Train an attacker and a defender against each other: Algorithm 1 of "Toward Optimal LLM Alignments Using
Two-Player Games" (arXiv 2406.10977), from an empty folder to a report.

    python train.py                                            the embedded game, on a CPU, 2 to 5 minutes
    python train.py --attacker gpt2 --defender gpt2            your own models: hub ids or local folders
    python train.py config.yaml --seed 3                       options from a file; flags after it override it
    python train.py --resume runs/...                          continue a stopped run (Ctrl-C ends a step and saves)
    torchrun --nproc_per_node=8 -- train.py [--shard] ...      on several GPUs: a copy in each, or FSDP2 with --shard

One round: the attacker takes `--attacker_steps` PPO steps against the frozen defender, then the defender
`--defender_steps` against the frozen attacker. The loop itself is `train`, below.

Differs from the paper (numbers as in the README; rows are of docs/results.md):
(4) The attacker moves first, so that the finished defender was trained against the last attacker: row *defender first*.
(5) `--unlikelihood_coef`: the defender's updates also make known unsafe answers less likely, and helpful ones likelier.
PPO learns from a rare answer only when it is sampled, once in thousands: section *the worst case, exactly*.
(6) `--replay`: most attacks in the defender's batch are earlier ones, against forgetting: row *no replay*.
(7) `--mine`: the unsafe answers of (5) are the initial defender's, to attacks of the initial attacker, a third of them
at twice its temperature, before each defender turn; `--edits`: they are unlearned for edited attacks too, in which one
word differs. The likelier an answer still is, the more often it is unlearned.
(8) `--ptx_coef`: a supervised loss on demonstrations, against over-refusal: row *no demonstrations*.
(11) R_div is centred over the batch. Its level, about -k / 2 for every attack, is no signal, but with lambda < 1 and a
critic that starts at zero it rewards by position: exercise 2 of docs/exercises.md. Row *k = 10* depends on it.
(12) `--min_likelihood`: an attack that is very unlikely under the initial attacker scores as a failed repetition: row
*no likelihood bound*.
(13) No test prompt enters an update of the defender, whoever wrote it. Otherwise the tables would measure memorisation.
(17) `--benign_share`: a fraction of the defender's batch is harmless requests, rewarded for a helpful answer. Without
them, a language model's safest strategy is to refuse everything: row *no harmless requests*.
"""

from harness.options import before_slow_imports, help_text

if __name__ == "__main__":
    before_slow_imports(help_text())

import time
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from diversity import Diversity
from gpo import (
    Exchanges,
    ExtraLoss,
    Player,
    PolicyAverage,
    Side,
    edit,
    log_likelihoods,
    new_seed,
    play,
    ppo_update,
    sample,
    unlikelihood_loss,
    world_size,
)
from harness.config import Config
from harness.data import as_a_program, finite, normalized
from harness.run import RunFolder, run_folder, start_program
from harness.world import World, evaluate, make_world, show_prompts
from model import Policy, Rollout, demonstrations, pack, split_words
from reward import call_judge, decided


# --- the loop: Algorithm 1 --------------------------------------------------------------------------------------
def train(config: Config, world: World, game: "Game", folder: RunFolder) -> None:
    """Algorithm 1. Every entry of the schedule is one PPO step of the mover; every round ends with the averages and an
    evaluation."""
    turns = schedule(config)
    for step in range(folder.steps_done, len(turns)):
        turn = turns[step]
        mover = game.players[turn.player]
        rng = np.random.default_rng([config.seed, step])  # all randomness of this step
        clock = time.time()
        seeds = sample(world.seeds, config.batch_size, rng)
        if turn.is_first:
            begin_turn(config, world, game, turn, rng)
        if turn.player == "attacker":  # seed -> attack -> response of the frozen defender -> P(unsafe) + k R_div
            exchanges = play(mover, opponent(config, game, "defender"), seeds, world.judge, new_seed(rng))
            scores, similarity = attacker_scores(config, game, exchanges)
            rollout = exchanges.attacks
            extra = []
            n_harmless = 0
        else:  # prompt of the frozen attacker, or of an earlier one, then harmless ones -> response -> P(safe)
            n_harmless = int(config.benign_share * config.batch_size)
            prompts = defender_prompts(config, game, seeds[n_harmless:], rng)
            if n_harmless:
                prompts = prompts + sample(world.benign_seeds, n_harmless, rng)
            exchanges = play(None, mover, prompts, world.judge, new_seed(rng))
            scores = defender_scores(world, exchanges, n_harmless)
            similarity = {}
            rollout = exchanges.responses
            extra = extra_losses(config, world, game, rng)
        game.replay.add(exchanges)
        game.sampled_tokens += exchanges.sampled_tokens
        played = time.time()
        metrics = ppo_update(mover, rollout, scores, new_seed(rng), extra)  # Eq. (3.3)
        metrics |= {"time/rollout": played - clock - exchanges.judge_seconds, "time/score": exchanges.judge_seconds,
                    "time/update": time.time() - played}
        metrics |= game_metrics(world, game, turn, exchanges, similarity, n_harmless)
        if turn.ends_round:
            game.add_to_averages()  # Theorem 3.2
            metrics |= round_metrics(world)
        folder.log(step, turn, exchanges, scores, metrics)
        folder.save(step, game)  # every few steps; after Ctrl-C it saves and stops


class Turn(NamedTuple):
    """One PPO step of the schedule: whose turn it is, and whether it begins the turn or ends the round."""

    round: int
    player: str
    is_first: bool  # the first step of this player's turn
    ends_round: bool


def schedule(config: Config) -> list[Turn]:
    """The PPO steps in the order of Algorithm 1: in each round, all steps of one player, then all of the other.
    With equal steps, two rounds of `--first defender_twice` have the proportions of the authors' script: 400 defender,
    200 attacker, 200 defender steps; then the attacker has one more turn."""
    if not config.trains:
        return []
    steps = {"attacker": config.attacker_steps, "defender": config.defender_steps}
    if config.method == "iterative":
        steps["attacker"] = 0
    players = ("attacker", "defender") if config.first == "attacker" else ("defender", "attacker")
    turns = []
    for round in range(config.rounds):
        for player in players:
            n = steps[player]
            if config.first == "defender_twice" and player == "defender" and round == 0:
                n *= 2
            for i in range(n):
                turns.append(Turn(round, player, is_first=i == 0, ends_round=False))
        turns[-1] = turns[-1]._replace(ends_round=True)
    return turns


# --- the state of the game ------------------------------------------------------------------------------------------
@dataclass
class ReplayBuffer:
    """Earlier attacks, and the initial defender's answers, on which the defender is trained again."""

    excluded: set[str] = field(default_factory=set)  # normalized: test prompts, and harmless requests (no attacks)
    last_success: dict[str, float] = field(default_factory=dict)  # attack -> P(unsafe) of its last try
    answers: list[tuple] = field(default_factory=list)  # unsafe ones: (attack, text, prompt ids, response ids)
    edited: list[tuple] = field(default_factory=list)  # the same answers, for edited attacks
    likelihood: list[float] = field(default_factory=list)  # pi / pi_0 of `answers`, then of `edited`, at most 1
    helpful: list[tuple] = field(default_factory=list)  # safe and helpful ones: (request, text, prompt ids, ...)

    def add(self, exchanges: Exchanges) -> None:
        """Record P(unsafe) of each decided attack; a later try of an attack replaces an earlier one."""
        for prompt, p_safe in zip(exchanges.prompts, exchanges.p_safe.tolist()):
            if not self.excludes(prompt) and not np.isnan(p_safe):
                self.last_success[prompt] = 1 - p_safe

    def excludes(self, prompt: str) -> bool:
        """Whether a prompt is excluded, in whatever case and white space."""
        return normalized(prompt) in self.excluded

    def add_answers(self, exchanges: Exchanges) -> None:
        """Record the unsafe answers, which are the initial defender's."""
        known = {(attack, text) for attack, text, *_ in self.answers}
        for attack, p_safe, row in zip(exchanges.prompts, exchanges.p_safe.tolist(), exchanges.responses.rows()):
            if p_safe < 0.5 and not self.excludes(attack) and (attack, row[0]) not in known:  # False where undecided
                known.add((attack, row[0]))
                self.answers.append((attack, *row))

    def edit_attacks(self, edits: int, defender: Player, rng: np.random.Generator) -> None:
        """Pair each unsafe answer with `edits` versions of its attack: with a word more, with one less, or with another
        one in its place. Words of all attacks and helpful requests are equally likely."""
        words = sorted(set(split_words(" ".join(prompt for prompt, *_ in self.answers + self.helpful))))
        words = words or [""]  # all attacks are blank
        answers = self.answers * edits
        attacks = [edit(attack, words, rng) for attack, *_ in answers]
        attacks = [first if self.excludes(attack) else attack for attack, (first, *_) in zip(attacks, answers)]
        prompts = [defender.template.format(attack) for attack in attacks]
        room = defender.policy.context - defender.max_new_tokens
        prompt_ids = [ids[-room:] for ids in defender.policy.encode(prompts)]
        rows = zip(attacks, prompt_ids, answers)
        self.edited = [(attack, text, ids, response_ids) for attack, ids, (_, text, _, response_ids) in rows]

    def measure(self, defender: Player) -> None:
        """Compute how likely each unsafe answer is under the current defender, for its attack and for each edited one,
        relative to what it was for the attack under the initial defender."""
        now = answer_likelihoods(self.answers + self.edited, defender, defender.policy)
        before = answer_likelihoods(self.answers, defender, defender.initial)
        relative = now - before.repeat(len(now) // len(before))
        self.likelihood = relative.clamp(max=0).exp().nan_to_num().tolist()  # NaN: the defender has diverged

    def sample_answers(self, n: int, defender: Player, rng: np.random.Generator) -> Rollout:
        """n unsafe answers, for attacks or edited ones, in proportion to their likelihood when it was measured."""
        answers = self.answers + self.edited
        chance = np.array(self.likelihood) + 1e-6  # for the case that all are 0
        rows = rng.choice(len(chance), n, p=chance / chance.sum())
        return as_rollout([answers[i] for i in rows], defender)

    def sample_helpful(self, n: int, defender: Player, rng: np.random.Generator) -> Rollout:
        """n helpful answers."""
        return as_rollout([self.helpful[i] for i in rng.choice(len(self.helpful), n)], defender)

    def sample(self, n: int, rng: np.random.Generator) -> list[str]:
        """n earlier attacks: 3/4 in proportion to their last P(unsafe) if above 1/2, 1/4 uniform against forgetting
        (all uniform if none is above)."""
        earlier = list(self.last_success)
        success = np.fromiter(self.last_success.values(), dtype=float)
        still_open = np.where(success > 0.5, success, 0)
        chance = 3 * still_open / max(still_open.sum(), 1e-9) + 1 / len(earlier)
        return [earlier[i] for i in rng.choice(len(earlier), n, p=chance / chance.sum())]


def as_rollout(answers: list[tuple], defender: Player) -> Rollout:
    """Answers of the ReplayBuffer as a Rollout."""
    prompts, *responses = zip(*answers)
    return pack(defender.policy, prompts, *responses, defender.temperature)


def answer_likelihoods(answers: list[tuple], defender: Player, policy: Policy) -> torch.Tensor:
    """(n,): the log-likelihood of each answer under a policy of the defender, in nats."""
    padded = answers + answers[:1] * (-len(answers) % world_size())  # as many for every process
    rollout = as_rollout(padded, defender)
    mean = log_likelihoods(policy, rollout, defender.micro_batch)[:, 0]
    return (mean * rollout.response_lengths.cpu())[: len(answers)]


@dataclass
class Game:
    """All state of the algorithm. A checkpoint holds what changes; the rest is made again from the run's start."""

    players: dict[str, Player]  # "attacker" and "defender"
    first: dict[str, Player]  # the initial players, frozen
    averages: dict[str, dict[str, PolicyAverage]]  # {player: {kind: its policies after each round}}
    diversity: Diversity  # the history X of attacks
    replay: ReplayBuffer  # earlier attacks, and the initial defender's answers
    likelihood_bound: torch.Tensor  # (2,) for the mean and least token log-prob: an attack below either is unlikely
    sampled_tokens: int = 0  # by both players, for their PPO steps and in mining

    def add_to_averages(self) -> None:
        """Add both current policies."""
        for name, player in self.players.items():
            for average in self.averages[name].values():
                average.add(player.policy)

    def state_dict(self) -> dict[str, tuple[dict, dict]]:
        """{file: (tensors, numbers)} of a checkpoint; all processes must call it."""
        states = {"game": ({}, {
            "diversity": self.diversity.state_dict(), "last_success": self.replay.last_success,
            "answers": self.replay.answers, "edited": self.replay.edited, "likelihood": self.replay.likelihood,
            "helpful": self.replay.helpful, "sampled_tokens": self.sampled_tokens,
            "likelihood_bound": finite(self.likelihood_bound.tolist())})}
        for name, player in self.players.items():
            states[name] = player.state_dict()
            for kind, average in self.averages[name].items():
                states[f"{name}_{kind}"] = average.state_dict()
        return states

    def load_state_dict(self, states: dict[str, tuple[dict, dict]]) -> None:
        """Restore what `state_dict` returned."""
        _, numbers = states["game"]
        self.diversity.load_state_dict(numbers["diversity"])
        self.replay.last_success = numbers["last_success"]
        self.replay.answers = numbers["answers"]
        self.replay.edited = numbers["edited"]
        self.replay.likelihood = numbers["likelihood"]
        self.replay.helpful = numbers["helpful"]
        self.sampled_tokens = numbers["sampled_tokens"]
        if None not in numbers.get("likelihood_bound", [None]):  # None: -inf, or from an older version
            self.likelihood_bound = torch.tensor(numbers["likelihood_bound"])
        for name, player in self.players.items():
            player.load_state_dict(*states[name])
            for kind, average in self.averages[name].items():
                average.load_state_dict(*states[f"{name}_{kind}"])


def new_game(config: Config, world: World) -> Game:
    """The state before the first step."""
    averages = {name: {} for name in world.players}
    for name, player in world.players.items():
        for kind in ("mixture", "weights", "ema"):
            if kind in config.average:
                averages[name][kind] = PolicyAverage(player, kind, config.average_size, config.seed)
    diversity = Diversity(config.diversity_terms.split(","), world.embedder, config.history)
    excluded = world.held_out() | set(map(normalized, world.benign_seeds))
    bound = likelihood_bound(config, world)
    return Game(world.players, world.first, averages, diversity, ReplayBuffer(excluded), bound)


def likelihood_bound(config: Config, world: World) -> torch.Tensor:
    """(2,): the `--min_likelihood` quantiles of `log_likelihoods` over the initial attacker's own attacks."""
    if not config.min_likelihood:
        return torch.full((2,), -torch.inf)
    attacker = world.first["attacker"]
    n = 256 + -256 % world_size()  # as many for every process
    seeds = sample(world.seeds, n, np.random.default_rng(config.seed))
    own = log_likelihoods(attacker.policy, attacker.generate(seeds, config.seed), config.micro_batch)  # (n, 2)
    return torch.quantile(own, config.min_likelihood, dim=0)


# --- the turns --------------------------------------------------------------------------------------------------
def opponent(config: Config, game: Game, name: str) -> Side:
    """The frozen player `name`, which the mover plays against: its last policy, its average if `--opponent` names one,
    or the first defender with `--method rlhf`."""
    if name == "defender" and config.method == "rlhf":
        return game.first["defender"]
    if config.opponent != "last" and game.averages[name][config.opponent].count:
        return game.averages[name][config.opponent]
    return game.players[name]


def begin_turn(config: Config, world: World, game: Game, turn: Turn, rng: np.random.Generator) -> None:
    """Before the first step of a player's turn: KL anchor; for the defender, the answers to learn and to unlearn."""
    if config.kl_anchor == "previous":
        game.players[turn.player].anchor()
    if turn.player == "defender" and config.unlearns:
        mine(config, world, game, rng)
        if turn.round == 0 and config.benign_share:
            mine_helpful(config, world, game)


def mine(config: Config, world: World, game: Game, rng: np.random.Generator) -> None:
    """Add the initial defender's unsafe answers to `--mine` attacks of the initial attacker, and measure how likely all
    of them still are, also for edited attacks: a refusal may hang on one word. A third of the attacks are sampled at
    twice the temperature: heaps of words that name a harmful topic, to which the defender would otherwise learn little.
    """
    repeats = config.mine // len(world.seeds) + 1  # so that there are enough to sample without replacement
    seeds = sample(world.seeds * repeats, config.mine, rng)
    attacker = game.first["attacker"]
    third = config.mine // 3
    attacks = write_attacks(game, attacker, seeds[third:], rng)
    if third:
        attacks += write_attacks(game, attacker, seeds[:third], rng, 2 * attacker.temperature)
    exchanges = play(None, game.first["defender"], attacks, world.judge, new_seed(rng), at_least=0)
    game.replay.add_answers(exchanges)
    game.sampled_tokens += exchanges.sampled_tokens
    if game.replay.answers:
        defender = game.players["defender"]
        if config.edits:
            game.replay.edit_attacks(config.edits, defender, rng)
        game.replay.measure(defender)


MOST_HELPFUL = 600  # harmless requests that the initial defender answers


def mine_helpful(config: Config, world: World, game: Game) -> None:
    """Keep the initial defender's safe, helpful and complete answers to harmless requests. Without them unlearning may
    make it refuse a whole topic, and PPO would sample no helpful answer to learn from."""
    n = min(MOST_HELPFUL, len(world.benign_seeds))
    requests = sample(world.benign_seeds, n, np.random.default_rng(config.seed))
    exchanges = play(None, game.first["defender"], requests, world.judge, config.seed, at_least=0)
    helpful = call_judge(world.helpful, requests, exchanges.responses.texts)
    kept = (helpful > 0.5) & (exchanges.p_safe > 0.5)  # False where undecided
    kept &= exchanges.responses.ended.cpu().numpy()
    rows = zip(requests, exchanges.responses.rows(), kept)
    game.replay.helpful = [(request, *row) for request, row, keep in rows if keep]
    game.sampled_tokens += exchanges.sampled_tokens


def attacker_scores(config: Config, game: Game, exchanges: Exchanges) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The attacker's score of each attack, (B,): P(unsafe) + k R_div; and what `Diversity.score` returned for them.

    Eq. (3.1) from the minimiser's side, with 1 - R(x, y) in place of -R(x, y). An unlikely attack scores as a failed
    repetition. An undecided one scores 0 and enters no update.
    """
    similarity = game.diversity.score(exchanges.prompts)
    game.diversity.add(exchanges.prompts)
    log_likelihood = log_likelihoods(game.first["attacker"].policy, exchanges.attacks, config.micro_batch)  # (B, 2)
    unlikely = (log_likelihood < game.likelihood_bound).any(1).numpy()  # (B,)
    r_div = np.where(unlikely, -1.0, similarity["reward"])
    p_unsafe = np.where(unlikely, 0.0, 1 - exchanges.p_safe)
    # R_div is centred: with lambda < 1 a critic that starts at zero turns its level into a reward by position
    scores = p_unsafe + config.diversity * (r_div - r_div[exchanges.decided].mean())
    return np.where(exchanges.decided, scores, 0), similarity


def defender_scores(world: World, exchanges: Exchanges, n_harmless: int) -> np.ndarray:
    """The defender's score of each response, (B,): P(safe), which is R(x, y) of Eq. (3.1). The last n_harmless rows
    are harmless requests; they score h (1 + P(safe)) / 2, where h is their helpfulness (undecided: the mean of the
    others): an answer that does not help scores 0, and for one that helps P(safe) decides half."""
    scores = exchanges.p_safe.copy()
    if n_harmless:
        helpful = call_judge(world.helpful, exchanges.prompts[-n_harmless:], exchanges.responses.texts[-n_harmless:])
        helpful = np.where(np.isnan(helpful), helpful[decided(helpful)].mean(), helpful)
        scores[-n_harmless:] = helpful * (1 + scores[-n_harmless:]) / 2
    return np.where(exchanges.decided, scores, 0)


def defender_prompts(config: Config, game: Game, seeds: list[str], rng: np.random.Generator) -> list[str]:
    """The defender's prompts of one step. Without `--mine`, Table 1's methods differ for it only here."""
    if config.method == "rlhf":  # the fixed prompts themselves
        return seeds
    if config.method == "iterative":
        return novel_prompts(game, seeds, rng)
    replayed = []
    if game.replay.last_success and config.replay > 0:
        replayed = game.replay.sample(int(config.replay * len(seeds)), rng)
    seeds = seeds[len(replayed) :]
    fresh = write_attacks(game, opponent(config, game, "attacker"), seeds, rng)
    fresh = [seed if game.replay.excludes(attack) else attack for attack, seed in zip(fresh, seeds, strict=True)]
    return fresh + replayed


def novel_prompts(game: Game, seeds: list[str], rng: np.random.Generator) -> list[str]:
    """Prompts of method iterative, without an adversary: the most diverse quarter of the initial attacker's."""
    attacker = game.players["attacker"]  # never trained by this method
    written = write_attacks(game, attacker, seeds * 4, rng)
    texts = [text for text in written if not game.replay.excludes(text)]
    r_div = game.diversity.score(texts)["reward"]
    chosen = [texts[i] for i in np.argsort(-r_div, kind="stable")[: len(seeds)]]
    chosen += seeds[len(chosen) :]  # where nearly all were test prompts or harmless
    game.diversity.add(chosen)
    return chosen


def write_attacks(game: Game, attacker: Side, seeds: list[str], rng: np.random.Generator,
                  temperature: float | None = None) -> list[str]:
    """Prompts for the defender by a frozen attacker, at its own temperature by default; their tokens are counted."""
    rollout = attacker.generate(seeds, new_seed(rng), temperature)
    game.sampled_tokens += int(rollout.response_lengths.sum())
    return rollout.texts


def extra_losses(config: Config, world: World, game: Game, rng: np.random.Generator) -> list[ExtraLoss]:
    """What is added to the defender's PPO loss: demonstrations and helpful answers become likelier, unsafe ones less
    likely. Each loss gets about half as many pairs as the batch has exchanges, a multiple of minibatches x processes.
    """
    parts = config.minibatches * world_size()
    n = parts * max(1, config.batch_size // (2 * parts))
    defender = game.players["defender"]
    extra = []
    if config.ptx_coef:
        extra.append(ExtraLoss(demonstrations(defender.policy, sample(world.demos, n, rng)), config.ptx_coef))
    if game.replay.helpful:
        extra.append(ExtraLoss(game.replay.sample_helpful(n, defender, rng), config.unlikelihood_coef))
    if game.replay.answers:
        loss = partial(unlikelihood_loss, initial=defender.initial)
        extra.append(ExtraLoss(game.replay.sample_answers(n, defender, rng), config.unlikelihood_coef, loss))
    return extra


# --- numbers ----------------------------------------------------------------------------------------------------
def game_metrics(world: World, game: Game, turn: Turn, exchanges: Exchanges, similarity: dict[str, np.ndarray],
                 n_harmless: int) -> dict[str, float]:
    """Metrics of a step's exchanges, whichever player moves. similarity: from `attacker_scores`, or {}. The last
    n_harmless rows are harmless requests."""
    n = len(exchanges.prompts) - n_harmless
    p_safe = exchanges.p_safe[:n][exchanges.decided[:n]]
    metrics = {"sampled_tokens": game.sampled_tokens,
               "game/undecided": int((~exchanges.decided).sum())}  # in no update and in no rate
    if len(p_safe):
        metrics["game/attack_success"] = float(np.mean(1 - p_safe))  # by the training judge
    if game.replay.likelihood:
        metrics["game/unsafe_likelihood"] = float(np.mean(game.replay.likelihood))
    if turn.player == "attacker":
        metrics["diversity/different"] = len(set(exchanges.prompts)) / n
        if world.toy:
            cells = {world.toy.cell_of(prompt) for prompt in exchanges.prompts} - {None}
            metrics["diversity/cells"] = len(cells) / n
    for name, term in (("self_bleu", "bleu"), ("cosine", "embedding")):
        if term in similarity and np.isfinite(similarity[term]).all():
            metrics[f"diversity/{name}"] = float(similarity[term].mean())
    return metrics


def round_metrics(world: World) -> dict[str, float]:
    """`evaluate` of the last policies after a round, on a third of the test prompts."""
    row = evaluate(world.after_a_round(), world.players["attacker"], world.players["defender"])
    names = ("asr_held_out_judge", "asr_train_judge", "refusal", "over_refusal", "attacker_success", "self_bleu",
             "cosine")
    return {f"game/{name}": row[name] for name in names if row[name] is not None and np.isfinite(row[name])}


def final_rows(world: World, game: Game) -> dict[str, dict]:
    """Columns of the table after the game: {"after" | "average (kind)": row}."""
    rows = {"after": evaluate(world, world.players["attacker"], world.players["defender"])}
    for kind, average in game.averages["defender"].items():
        if average.count:
            rows[f"average ({kind})"] = evaluate(world, game.averages["attacker"][kind], average)
    return rows


# --- entry point ------------------------------------------------------------------------------------------------------
def main(argv: list[str]) -> None:
    """Read the options, lock the run folder, play the game."""
    clock = time.time()
    config = start_program(argv)
    with run_folder(config) as folder:
        world = make_world(config, folder.start)
        if config.dry_run:
            show_prompts(world)
            return
        game = new_game(config, world)
        folder.open(world, game, len(schedule(config)))
        with folder.stop_after_a_step():
            train(config, world, game, folder)
        folder.finish(game.averages, final_rows(world, game), {"sampled_tokens": game.sampled_tokens}, clock)


if __name__ == "__main__":
    as_a_program(main)
