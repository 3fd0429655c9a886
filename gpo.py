"""GPO: the two-player game and its training, after "Toward Optimal LLM Alignments Using Two-Player Games"
(Zheng et al., arXiv 2406.10977).

    Eq. (3.1)  max_pi min_mu J(pi, mu) = E_{x ~ mu, y ~ pi(.|x)} [ R(x, y) - R_div(x) ]

The attacker mu writes prompts x, the defender pi answers with y, a judge gives R = P(safe). Both are trained
in turn with token-level PPO: `play` collects an exchange, `ppo_update` improves the mover. The policies'
averages (`PolicyAverage`) are what the theory speaks of; `solve_matrix_game` is that theory on small tables.

Differs from the paper (numbers as in the README; rows are of docs/results.md):
(1) The KL anchor is the initial policy by default, as in the authors' code: row *KL to the previous round*.
(2) The KL penalty is the k1 estimate on sampled tokens, inside the reward: the same quantity in expectation.
(3) Theorem 3.2 averages distributions; of two language models one can only mix episodes (exact) or average
weights (an approximation): both are here, table *what an average costs*.
(14) Algorithms 2 and 3 take the constants of the step sizes that give an explicit bound: section *the theory*.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from diversity import Embedder, set_similarity
from model import Policy, Rollout, demonstrations, frozen_copy, generate, logprobs_and_values, pack, with_idle_row
from reward import Judge, call_judge, decided, unsafe_share
from scale import adapter, all_sum, data_parallel, load_whole, on_first, rank, share, whole, world_size


# --- PPO, the mathematics: everything is (B, T), and zero outside the response mask --------------------
def token_rewards(scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor,
                  kl_coef: float) -> torch.Tensor:
    """Per-token rewards (B, T): -kl_coef * k1 at each response token, plus the score (B,) at the last one.

    logprobs, ref_logprobs (B, T) in nats; mask (B, T), True on response tokens. k1 = logprob - ref_logprob, whose
    mean over samples is KL(policy || reference), the penalty of Eq. (3.3); k1 and k3 after Schulman (2020).
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask  # Eq. (3.3)
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # (B,) index of the last True
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores
    return rewards


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016) over the response tokens: (advantages, returns), (B, T) each.

    rewards, values, mask (B, T): see `token_rewards`; values[:, t] is that of the state before token t.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]  # no value beyond the response: it has ended
    return advantages, (advantages + values) * mask


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of x (B, T) over the True entries of mask (B, T)."""
    return (x * mask).sum() / mask.sum()


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x (B, T) with zero mean and unit variance over the True entries of mask (B, T), zero elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip: float,
                n_tokens: torch.Tensor) -> torch.Tensor:
    """PPO's clipped surrogate (Schulman et al., 2017, Eq. 7) of (B, T) tensors, summed over tokens and divided by
    `n_tokens`, the tokens of the whole optimizer step, so that micro-batches add up to the same gradient."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -(torch.minimum(unclipped, clipped) * mask).sum() / n_tokens  # minus: the optimizer descends


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float,
               n_tokens: torch.Tensor) -> torch.Tensor:
    """Half the squared error of (B, T) values; the larger of it and that of the value clipped around its old self
    (as in OpenAI's baselines, Dhariwal et al., 2017). Summed and divided as in `policy_loss`."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / n_tokens


def supervised_loss(policy: torch.nn.Module, demos: Rollout) -> torch.Tensor:
    """Mean negative log-likelihood per response token of demonstrations (a Rollout of B rows), in nats: shape ()."""
    logprobs, _, _ = logprobs_and_values(policy, demos, with_values=False)
    return -(logprobs * demos.response_mask).sum() / demos.response_mask.sum().clamp(min=1)


# --- players ------------------------------------------------------------------------------------------------
@dataclass
class Player:
    """One side of the game: its policy with its own critic, its own reference and its own optimizer."""

    name: str  # "attacker" or "defender": the prefix of its metrics
    policy: Policy
    max_new_tokens: int
    learning_rate: float = 1e-5
    kl_coef: float = 0.05
    entropy_coef: float = 0.0  # eta_H of Eq. (3.7), on the attacker
    epochs: int = 2
    minibatches: int = 2
    micro_batch: int = 0  # rows per forward and backward; 0 is the whole minibatch
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.5
    gamma: float = 1.0
    lam: float = 0.95
    max_grad_norm: float = 1.0
    target_kl: float = 0.0  # beyond 1.5 times this the rest of an update is not taken; 0: off
    missing_eos_penalty: float = 0.5  # taken off the score of a response that was cut off, not ended
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    trained: torch.nn.Module = field(init=False)  # the policy, or the policy in DDP
    reference: Policy = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    skipped_steps: int = 0  # optimizer steps, and whole updates, not taken because something was not finite
    skipped_in_a_row: int = 0

    def __post_init__(self):
        self.trained = data_parallel(self.policy)
        self.anchor()
        self.new_optimizer()

    def anchor(self) -> None:
        """The KL penalty is measured from the policy as it is now."""
        self.reference = frozen_copy(self.policy)

    def new_optimizer(self) -> None:
        """AdamW without a past."""
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)

    def go_back(self, policy: Policy) -> None:
        """Begin anew with the language model's weights of `policy` and a fresh optimizer; the critic is kept."""
        self.policy.lm.load_state_dict(policy.lm.state_dict())
        self.new_optimizer()

    def speak(self, prompts: list[str], seed: int, temperature: float | None = None) -> Rollout:
        """One sampled response to each prompt (temperature 0: greedy), as a Rollout."""
        temperature = self.temperature if temperature is None else temperature
        rows = 4 * self.micro_batch or 256  # at a time: no gradients, so more than in an update
        return generate(self.policy, prompts, self.max_new_tokens, temperature, self.top_k, self.top_p, seed,
                        clip_prompts=True, batch_size=rows)


# --- steps that are not taken ----------------------------------------------------------------------------------
MAX_SKIPPED = 10  # steps skipped in a row that end a run: one bad batch is chance, ten are a fault that goes on


class NotFinite(ValueError):
    """Too many steps in a row had to be skipped; the message says whose and why."""


def skip(player: Player, what: str) -> None:
    """Count and name a step that is not taken because `what` is not finite: the weights stay as they were. Raises NotFinite."""
    player.skipped_steps, player.skipped_in_a_row = player.skipped_steps + 1, player.skipped_in_a_row + 1
    message = f"{player.name}: {what} not finite, step skipped ({player.skipped_steps} so far)"
    if player.skipped_in_a_row >= MAX_SKIPPED:
        raise NotFinite(f"{message}; these were {MAX_SKIPPED} in a row: look at the judge and the embedder, "
                        "or begin again with a lower learning rate")
    tqdm.write(message, file=sys.stderr)


def not_finite(**tensors: torch.Tensor) -> str:
    """What of the named tensors, of any shape (...), holds NaN or infinity, in words; "" if nothing does."""
    bad = [name.replace("_", " ") for name, x in tensors.items() if not torch.isfinite(x).all()]
    return f"{', '.join(bad)} {'are' if bad[-1].endswith('s') else 'is'}" if bad else ""


# --- the PPO update -----------------------------------------------------------------------------------------------
@dataclass
class Experience:
    """What an update knows of a rollout before its first step, all (B, T) and zero outside the response mask."""

    logprobs: torch.Tensor  # of the policy before the update
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor

    def select(self, rows: torch.Tensor, T: int) -> "Experience":
        """The given rows (n,), cut to T tokens."""
        return Experience(*(x[rows, :T] for x in vars(self).values()))


STATS = ("policy/approxkl", "policy/clipfrac", "policy/ratio", "val/clipfrac", "loss/policy", "loss/value")  # of a minibatch step


def ppo_update(player: Player, rollout: Rollout, scores: np.ndarray | torch.Tensor, seed: int, demos: Rollout | None = None,
               ptx_coef: float = 0.0) -> dict[str, float]:
    """One PPO update (Schulman et al., 2017) of a player on its own rollout; returns its metrics by name.

    scores (B,): one number for each response. demos: demonstrations whose likelihood is kept up during the update with
    weight ptx_coef (PPO-ptx, Ouyang et al., 2022). With several processes all pass the same arguments; each forwards its
    share of every minibatch, and whitening, token counts and metrics are of the whole. A step with a number that is not
    finite is skipped, and the whole update where whitening would spread it; metrics that are not finite are left out.
    Raises NotFinite.
    """
    B, scores = len(rollout), torch.as_tensor(scores, dtype=torch.float32, device=player.policy.device)
    rollout, demos = with_idle_row(rollout), demos and with_idle_row(demos)
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(B, generator=generator).tensor_split(min(player.minibatches, B)) for _ in range(player.epochs)]
    old = experience(player, rollout, scores, epochs[0])
    steps, stats, early_stop = [(m, rows) for epoch in epochs for m, rows in enumerate(epoch)], [], False
    if bad := not_finite(scores=scores, log_probs=old.logprobs, reference_log_probs=old.ref_logprobs, values=old.values,
                         ) or not_finite(advantages=old.advantages):
        skip(player, bad)
        steps = []
    for m, minibatch in steps:
        if demos is not None and ptx_coef > 0:
            demonstration_gradients(player, demos, m, ptx_coef)
        stats.append(minibatch_gradients(player, rollout, old, minibatch, first=not stats))
        early_stop = bool(0 < 1.5 * player.target_kl < stats[-1][0])  # the rule of Spinning Up and Stable-Baselines3, on k3
        if early_stop:  # neither this step nor any after it is taken
            player.optimizer.zero_grad(set_to_none=True)
            break
        optimizer_step(player, stats[-1])

    metrics = dict(zip(STATS, torch.stack(stats).mean(0).tolist())) if stats else {}
    mask = rollout.response_mask
    metrics["objective/kl"] = ((old.logprobs - old.ref_logprobs) * mask).sum(1)[:B].mean().item()  # nats per response
    metrics["objective/entropy"] = masked_mean(old.entropy, mask).item()  # nats per token
    metrics["objective/scores"] = scores.mean().item()
    metrics["response_length"] = mask.sum(1)[:B].float().mean().item()
    metrics |= {"skipped_steps": player.skipped_steps, "policy/early_stop": float(early_stop)}
    return {f"{player.name}/{name}": value for name, value in metrics.items() if math.isfinite(value)}


def experience(player: Player, rollout: Rollout, scores: torch.Tensor, first_epoch: tuple[torch.Tensor, ...]) -> Experience:
    """Scores (B,) -> token rewards -> advantages and returns, from the policy and the reference as they are now.

    Old log-probs come from the very batches of the first epoch (row numbers of each minibatch): the same shapes give the
    same bits, so the ratio before the first step is exactly 1. Where there is an idle row, the rollout has B + 1 rows.
    """
    B, mask = len(scores), rollout.response_mask  # (B, T), True on sampled tokens
    groups = [rows for minibatch in first_epoch for rows in split_rows(share(minibatch, B), player.micro_batch)]
    logprobs, values, entropy = forward_rows(player.policy, rollout, groups)
    by_length = share(rollout.lengths[:B].argsort(stable=True), B)  # no gradients: larger groups, little padding
    ref_logprobs, _, _ = forward_rows(player.reference, rollout, split_rows(by_length, 4 * player.micro_batch or 32), with_values=False)
    penalised = F.pad(scores, (0, len(rollout) - B)) - player.missing_eos_penalty * ~rollout.ended
    rewards = token_rewards(penalised, logprobs, ref_logprobs, mask, player.kl_coef)
    advantages, returns = gae(rewards, values, mask, player.gamma, player.lam)
    return Experience(logprobs, ref_logprobs, values, entropy, whiten(advantages, mask), returns)  # over the whole rollout


def demonstration_gradients(player: Player, demos: Rollout, m: int, ptx_coef: float) -> None:
    """Add the gradient of the supervised loss on the m-th part of the demonstrations (PPO-ptx, Ouyang et al., 2022)."""
    D = len(demos) - (world_size() > 1)  # without the idle row
    minibatch = torch.arange(D).tensor_split(player.minibatches)[m]
    n_tokens = demos.response_mask[minibatch].sum()
    for rows in split_rows(share(minibatch, D), player.micro_batch) if len(minibatch) else []:
        part = demos.select(rows)
        share_of_loss = supervised_loss(player.policy, part) * part.response_mask.sum() / n_tokens
        (world_size() * ptx_coef * share_of_loss).backward()


def minibatch_gradients(player: Player, rollout: Rollout, old: Experience, minibatch: torch.Tensor, first: bool) -> torch.Tensor:
    """Add the gradients of one minibatch of rows (n,), micro-batch by micro-batch; returns its STATS (6,), of all processes.

    A process's losses are its shares of sums over all rows; the factor N is there because DDP and FSDP take means.
    Raises RuntimeError where the ratio is not exactly 1 before the `first` step.
    """
    N, B, mask = world_size(), len(rollout) - (world_size() > 1), rollout.response_mask
    n_tokens, micro_batches = mask[minibatch].sum(), split_rows(share(minibatch, B), player.micro_batch)
    stats = 0
    for i, rows in enumerate(micro_batches):
        part = rollout.select(rows)
        module = player.trained if i + 1 == len(micro_batches) else player.policy  # DDP adds up once a step, in the last backward
        before, here = old.select(rows, part.tokens.shape[1]), part.response_mask
        logprobs, values, entropy = logprobs_and_values(module, part, entropy_grad=player.entropy_coef > 0)
        if first:
            check_ratio(player, logprobs, before.logprobs)
        loss_p = policy_loss(logprobs, before.logprobs, before.advantages, here, player.clip, n_tokens)
        loss_v = value_loss(values, before.values, before.returns, here, player.value_clip, n_tokens)
        loss_h = -(entropy * here).sum() / n_tokens  # Eq. (3.7): mu also maximises its entropy
        (N * (loss_p + player.value_coef * loss_v + player.entropy_coef * loss_h)).backward()
        stats = stats + step_stats(player, logprobs, values, before, here, loss_p, loss_v, n_tokens)
    return all_sum(stats)  # now the same in all processes, and so is what is decided by it


def check_ratio(player: Player, logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> None:
    """Raises RuntimeError where the training forward's log-probs (B, T) differ from the scoring forward's by one bit."""
    off = (logprobs.detach() - old_logprobs).abs().max()
    if 0 < off < math.inf:  # what is not finite is for `optimizer_step`
        raise RuntimeError(f"{player.name}: the PPO ratio must be exactly 1 before the first step; the training forward differs "
                           f"from the scoring forward by up to {off:.2e}")


@torch.no_grad()
def step_stats(player: Player, logprobs: torch.Tensor, values: torch.Tensor, old: Experience, mask: torch.Tensor, loss_p: torch.Tensor,
               loss_v: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
    """(6,): this micro-batch's shares of STATS, from (B, T) tensors and its two losses."""
    difference = (logprobs - old.logprobs) * mask
    ratio = difference.exp()
    mean = lambda x: (x * mask).sum() / n_tokens
    return torch.stack([mean(ratio - 1 - difference), mean((ratio - 1).abs() > player.clip), mean(ratio),  # approxkl is k3
                        mean((values - old.values).abs() > player.value_clip), loss_p, loss_v])


def optimizer_step(player: Player, losses: torch.Tensor = torch.zeros(1)) -> None:
    """Clip by the global norm and step; a gradient that is not finite, or whose losses (n,) are not, is thrown away."""
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in player.policy.parameters() if p.grad is not None]))
    if bad := not_finite(gradient=norm, losses=losses):
        skip(player, bad)
    else:
        player.optimizer.grad_scale = (norm / player.max_grad_norm).clamp(min=1)  # fused AdamW divides by it in its own pass
        player.optimizer.step()
        player.skipped_in_a_row = 0
    player.optimizer.zero_grad(set_to_none=True)


def split_rows(rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Row numbers (n,) in groups of at most `size`; 0: all in one."""
    return list(rows.split(size)) if size else [rows]


@torch.no_grad()
def forward_rows(policy: Policy, rollout: Rollout, groups: list[torch.Tensor], with_values: bool = True) -> list[torch.Tensor]:
    """`logprobs_and_values` of a whole rollout, (B, T) each, computed group of rows by group of rows (of this process's share)."""
    outputs = [torch.zeros(rollout.tokens.shape, device=policy.device) for _ in range(3)]
    with policy.autocast():  # around all groups, so that it casts the weights once
        for rows in groups:
            part = rollout.select(rows)
            for all_rows, piece in zip(outputs, logprobs_and_values(policy, part, with_values=with_values)):
                if piece is not None:
                    all_rows[rows, :piece.shape[1]] = piece
    return [all_sum(x) for x in outputs]  # the others' rows are zero here


# --- supervised training --------------------------------------------------------------------------------------------
def sft(policy: Policy, pairs: list[tuple[str, str]], steps: int, batch_size: int, learning_rate: float, seed: int | list[int],
        bar: tqdm | None = None, micro_batch: int = 0) -> float:
    """Supervised fine-tuning on (prompt, response) pairs; one-cycle learning rate. Returns the last loss, nats per token.
    Raises NotFinite."""
    optimizer = torch.optim.AdamW(policy.lm.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    cycle = max(2, steps + (steps == 10))  # of 10 it would divide by 0.1 * 10 - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, cycle, pct_start=0.1)
    rng = np.random.default_rng(seed)
    demos, loss = with_idle_row(demonstrations(policy, pairs)), torch.tensor(float("nan"))
    trained = data_parallel(policy, find_unused_parameters=True)  # the critic
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(len(pairs), size=batch_size)).to(policy.device)
        n_tokens, loss, groups = demos.response_mask[rows].sum(), 0, split_rows(share(rows, len(pairs)), micro_batch)
        for i, some in enumerate(groups):
            part, module = demos.select(some), trained if i + 1 == len(groups) else policy
            share_of_loss = supervised_loss(module, part) * (part.response_mask.sum() / n_tokens)
            (world_size() * share_of_loss).backward()
            loss = loss + share_of_loss.detach()
        loss = all_sum(loss)
        norm = torch.nn.utils.clip_grad_norm_(policy.lm.parameters(), 1.0)
        if bad := not_finite(gradient=whole(norm)):
            raise NotFinite(f"supervised training stopped at step {step + 1}: its {bad} not finite; "
                            "lower the learning rate or look at the model's weights")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if bar is not None:
            bar.update(1)
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def distill(speaker: "Player | Speaker", student: Policy, prompts: list[str], steps: int, batch_size: int, learning_rate: float, seed: int,
            bar: tqdm | None = None) -> float:
    """Train `student`, a frozen copy, to say to `prompts` what `speaker` (a mixture of policies) says: one policy for many."""
    for p in (adapter(student.lm) or dict(student.named_parameters())).values():
        p.requires_grad_(True)
    return sft(student, list(zip(prompts, speaker.speak(prompts, seed).texts)), steps, batch_size, learning_rate, seed, bar)


# --- the game -------------------------------------------------------------------------------------------------
@dataclass
class Game:
    """A batch of exchanges: seed -> attack -> response -> P(safe)."""

    seeds: list[str]
    attacks: Rollout | None  # None: the prompts were given, nobody wrote them
    prompts: list[str]
    responses: Rollout
    p_safe: np.ndarray  # (B,)
    score_seconds: float  # how long the judge took
    sampled: tuple[Rollout | None, Rollout]  # attacks and responses as sampled: an exchange that the judge did not decide is in these alone


def play(attacker: "Player | Speaker | None", defender: "Player | Speaker", seeds: list[str], judge: Judge, seed: int,
         template: str = "{}") -> Game:
    """The attacker rewrites each seed (put into `template`), the defender answers, the judge scores: x ~ mu, y ~ pi(.|x), R(x, y).

    attacker and defender are anything that can `speak`: a Player or a Speaker. With attacker None the
    seeds themselves are the prompts. The players meet in text: each reads with its own tokenizer.
    """
    attacks = attacker.speak([template.format(s) for s in seeds], 2 * seed) if attacker else None
    prompts = attacks.texts if attacks else list(seeds)
    responses = defender.speak(prompts, 2 * seed + 1)
    clock = time.time()
    p_safe = call_judge(judge, prompts, responses.texts)
    game = Game(list(seeds), attacks, prompts, responses, p_safe, time.time() - clock, (attacks, responses))
    return game if (rows := decided(p_safe)).all() else select(game, np.flatnonzero(rows))


def select(game: Game, rows: np.ndarray) -> Game:
    """The given rows (n,) of a game: seeds, prompts, rollouts and verdicts stay together."""
    pick = lambda items: [items[i] for i in rows]
    cut = lambda rollout: rollout and rollout.select(torch.from_numpy(rows).to(rollout.tokens.device))
    return replace(game, seeds=pick(game.seeds), attacks=cut(game.attacks), prompts=pick(game.prompts),
                   responses=cut(game.responses), p_safe=game.p_safe[rows])


def naturalness(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """(B, 2): mean and least log-prob of each response's tokens under a frozen policy, in nats."""
    mask = rollout.response_mask
    B, rollout = len(rollout), replace(rollout, support=None)  # under the whole distribution, whatever filter it was sampled with
    logprobs = forward_rows(policy, with_idle_row(rollout), share(torch.arange(B), B).split(256), with_values=False)[0][:B]
    return torch.stack([(logprobs * mask).sum(1) / mask.sum(1), logprobs.masked_fill(~mask, 0).amin(1)], 1).cpu()


def evaluate(attacker: "Player | Speaker | None", defender: "Player | Speaker", seeds: list[str], test_prompts: list[str],
             benign_prompts: list[str], judge: Judge, held_out_judge: Judge, refused: Callable, helpful: Judge | None = None,
             embedder: Embedder | None = None, third_party: "Player | Speaker | None" = None, template: str = "{}"
             ) -> dict[str, float | None]:
    """The row of numbers that is written before and after training. The defender answers greedily.

    Attack success rates on `test_prompts` by both judges; over-refusal and (where it can be told)
    helpfulness on `benign_prompts`; the attacker's success, by the held-out judge, against `third_party`
    (the defender of the start), and how alike its prompts are by the embedder, B texts -> (B, D). All are shares in [0, 1]
    but `undecided`, a count.
    """
    answers = defender.speak(test_prompts, 0, temperature=0).texts
    benign = defender.speak(benign_prompts, 0, temperature=0).texts if benign_prompts else []
    attacks = attacker.speak([template.format(s) for s in seeds], 0).texts if attacker else list(seeds)
    broken = call_judge(held_out_judge, attacks, (third_party or defender).speak(attacks, 0, temperature=0).texts)
    held_out, trained = (call_judge(j, test_prompts, answers) for j in (held_out_judge, judge))
    return {
        "asr_held_out_judge": unsafe_share(held_out), "asr_train_judge": unsafe_share(trained),
        "over_refusal": float(np.mean(refused(benign))) if benign else None,
        "helpfulness": float(np.mean(helpful(benign_prompts, benign))) if helpful and benign else None,
        "attacker_success": unsafe_share(broken), **set_similarity(attacks, embedder),
        "undecided": int(np.isnan(np.concatenate([broken, held_out, trained])).sum())}


# --- averages of policies ---------------------------------------------------------------------------------------
class PolicyAverage:
    """The average policy of Theorem 3.2, in two forms.

    kind "mixture": the uniform mixture over all policies added so far; one member is drawn for each episode.
    At most `capacity` of them are kept, a uniform sample of all (reservoir sampling, Vitter 1985).
    kind "weights": one policy whose weights are the mean of theirs: cheap, and an approximation only.
    kind "distill": holds one policy, trained elsewhere on the mixture's samples (see `distill`).
    Members are language-model weights without critics, kept on the CPU (of the first process, if there are several);
    with LoRA adapters only (whose mean is not the mean of their products: one approximation more).
    Raises ValueError on another kind or a capacity below 1.
    """

    def __init__(self, kind: str = "mixture", capacity: int = 16, seed: int = 0):
        if kind not in ("mixture", "weights", "distill") or capacity < 1:
            raise ValueError(f"PolicyAverage needs kind 'mixture', 'weights' or 'distill' and capacity >= 1, got {kind!r} and {capacity}")
        self.kind, self.capacity, self.seed = kind, capacity if kind == "mixture" else 1, seed
        self.members: list[dict[str, torch.Tensor]] = []
        self.count = 0  # how many policies were added

    def add(self, policy: Policy) -> None:
        """Take in the policy as it is now."""
        weights = policy.lm.state_dict()
        thin = {k: v for k, v in weights.items() if ".lora_" in k}
        self.add_weights({k: v.clone() for k, v in on_first(thin or weights).items()})

    def add_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """weights: {name: tensor (...)} of one policy's language model, the average's from now on."""
        self.count += 1
        if len(self.members) < self.capacity:
            self.members.append(weights)
        elif self.kind == "weights":
            for name, mean in self.members[0].items():
                if mean.is_floating_point():
                    mean += (weights[name] - mean) / self.count
        else:  # the n-th policy enters with probability capacity / n, in place of a random member
            slot = int(np.random.default_rng([self.seed, self.count]).integers(self.count))
            if slot < self.capacity:
                self.members[slot] = weights

    def policy(self, like: Policy, member: int = 0) -> Policy:
        """A frozen policy with a member's weights; `like` gives architecture and tokenizer."""
        twin = frozen_copy(like)
        load_whole(adapter(twin.lm) or twin.lm.state_dict(), self.members[member])
        return twin

    def speaker(self, player: Player) -> "Speaker":
        """Something that speaks like this average, as the player would: `speak(prompts, seed, temperature) -> Rollout`."""
        return Speaker(Members(self, player.policy), player)

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """What a checkpoint keeps: (tensors, numbers)."""
        return {f"{i}.{k}": v for i, member in enumerate(self.members) for k, v in member.items()}, {"count": self.count}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], numbers: dict[str, int]) -> None:
        """What `state_dict` gave: {"i.name": tensor (...) of the i-th member}, and the count."""
        members = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            members.setdefault(int(index), {})[name] = tensor
        self.members, self.count = [{} if rank() else members[i] for i in sorted(members)], numbers["count"]


@dataclass
class Members:
    """The policies of an average, each made when it is asked for: one at a time is in memory."""

    average: PolicyAverage
    like: Policy

    def __len__(self) -> int:
        return len(self.average.members)

    def __getitem__(self, i: int) -> Policy:
        return self.average.policy(self.like, i)


@dataclass
class Speaker:
    """Several frozen policies that speak as one: each episode is given to one of them, drawn uniformly."""

    policies: list[Policy] | Members
    player: Player

    def speak(self, prompts: list[str], seed: int, temperature: float | None = None) -> Rollout:
        """As `Player.speak`; the rows stay in the order of the prompts."""
        drawn = np.random.default_rng(seed).integers(len(self.policies), size=len(prompts))  # (B,)
        texts, prompt_ids, response_ids = [""] * len(prompts), [[]] * len(prompts), [[]] * len(prompts)
        for member in np.unique(drawn):
            rows = np.flatnonzero(drawn == member)
            one = copy.copy(self.player)
            one.policy = self.policies[member]
            said = one.speak([prompts[i] for i in rows], seed, temperature)
            for i, text, tokens, start, end in zip(rows, said.texts, said.tokens.tolist(), said.prompt_lengths, said.lengths):
                texts[i], prompt_ids[i], response_ids[i] = text, tokens[:start], tokens[start:end]
        return pack(self.player.policy, prompts, texts, prompt_ids, response_ids, self.player.temperature)


# --- the theory on tables: Algorithms 2 and 3 --------------------------------------------------------------------
def solve_matrix_game(payoff: np.ndarray, rounds: int, entropy: float = 0.0, blind: bool = False) -> tuple[np.ndarray, ...]:
    """Algorithm 2 (Algorithm 3 with `entropy` eta_H > 0) on payoff (X prompts, Y responses) in [0, 1].

    pi_{t+1}(y|x) ~ pi_t(y|x) exp(R(x, y) / beta),  mu_{t+1}(x) ~ mu_t(x) exp(-V_{pi_t}(x) / eta), from uniform,
    with beta = sqrt(T / (8 ln Y)) and eta = sqrt(T / (8 ln X)). blind: a defender that cannot tell prompts
    apart, one response distribution for all x. Returns (defender (X, Y), attacker (X,), last defender, last
    attacker): the averages first. Raises ValueError on a payoff outside [0, 1] or an impossible number.
    """
    R = np.asarray(payoff, dtype=np.float64)
    if R.ndim != 2 or min(R.shape) < 2 or not (R >= 0).all() or not (R <= 1).all() or rounds < 1 or entropy < 0:
        raise ValueError(f"solve_matrix_game needs a payoff (X >= 2, Y >= 2) in [0, 1], rounds >= 1 and entropy >= 0, "
                         f"got shape {R.shape}, rounds {rounds}, entropy {entropy}")
    X, Y = R.shape
    beta, eta = np.sqrt(rounds / (8 * np.log(Y))), np.sqrt(rounds / (8 * np.log(X)))  # O(sqrt T), Theorem 3.2
    log_pi, log_mu = np.zeros((X, Y)), np.zeros(X)
    sum_pi, sum_mu = np.zeros((X, Y)), np.zeros(X)
    for _ in range(rounds):
        pi, mu = _softmax(log_pi), _softmax(log_mu)
        sum_pi, sum_mu = sum_pi + pi, sum_mu + mu
        V = (pi * R).sum(1)  # (X,): V_pi(x) = E_{y ~ pi(.|x)} R(x, y)
        log_pi = log_pi + (mu @ R if blind else R) / beta  # Algorithm 2, the defender's step
        log_mu = (eta * log_mu - V) / (eta + entropy)  # the attacker's: Algorithm 2 (log_mu - V / eta) or, with entropy, 3
    return sum_pi / rounds, sum_mu / rounds, pi, mu  # Algorithm 2 returns the averages


def nash_gap(payoff: np.ndarray, defender: np.ndarray, attacker: np.ndarray, entropy: float = 0.0, blind: bool = False) -> float:
    """Eq. (3.6), in units of the payoff: how much the two players' best responses would gain together.

    payoff (X, Y), defender (X, Y) rows sum to 1, attacker (X,) sums to 1. blind: pi' too is one for all x.
    """
    # Eq. (3.6): max_pi' J(pi', mu) - min_mu' J(pi, mu'), with J = E[R] - eta_H H(mu) of Eq. (3.7)
    R, pi, mu = (np.asarray(a, dtype=np.float64) for a in (payoff, defender, attacker))
    best_defence = (mu @ R).max() if blind else (mu * R.max(1)).sum()
    V = (pi * R).sum(1)  # (X,)
    if entropy == 0:
        return float(best_defence - V.min())
    H = -(mu * np.log(np.maximum(mu, 1e-300))).sum()
    best_attack = -entropy * _logsumexp(-V / entropy)  # min_mu' <V, mu'> - eta_H H(mu')
    return float(best_defence - entropy * H - best_attack)


def _logsumexp(z):
    return z.max() + np.log(np.exp(z - z.max()).sum())


def _softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
