"""GPO: the two-player game and its training, after "Toward Optimal LLM Alignments Using Two-Player Games"
(Zheng et al., arXiv 2406.10977).

    Eq. (3.1)  max_pi min_mu J(pi, mu) = E_{x ~ mu, y ~ pi(.|x)} [ R(x, y) - R_div(x) ]

The attacker mu writes prompts x, the defender pi answers with y, a judge gives R = P(safe). Both are trained
in turn with token-level PPO: `play` collects a batch of exchanges, `ppo_update` improves the mover. The policies'
averages (`PolicyAverage`) are the subject of the theory; `solve_matrix_game` runs the theory's algorithms on tables.

Every process holds all exchanges, and forwards its own rows of every minibatch (`my_rows`). Losses are sums over
tokens divided by the tokens of the whole step, so gradients and statistics are sums over processes (`all_sum`).

Differs from the paper (numbers as in the README; rows are of docs/results.md):
(1) The KL anchor is the initial policy by default, as in the authors' code: row *KL to the previous round*.
(2) The KL penalty is the k1 estimate on sampled tokens, inside the reward: the same quantity in expectation.
(3) Theorem 3.2 averages distributions. Language models can be mixed by episode (exact) or averaged by weights (an
approximation); both are implemented: table *what an average costs*.
(14) Algorithms 2 and 3 use step sizes with explicit constants, which give a blind defender an explicit bound: section
*the theory*.
"""

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from tqdm import tqdm, trange

from model import (
    Policy,
    Rollout,
    demonstrations,
    frozen_copy,
    generate,
    group_by_length,
    logprobs_and_values,
    one_cycle,
    pack,
    sample_batches,
    split_words,
)
from reward import Judge, call_judge, decided


# --- several processes ---------------------------------------------------------------------------------------
def rank() -> int:
    """The rank of this process; the first, 0, writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor (...) over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def my_rows(rows: torch.Tensor | list) -> torch.Tensor | list:
    """The rows (n,) of this process: every world_size-th, so that of rows sorted by length each process gets long and
    short ones."""
    return rows[rank() :: world_size()]


# --- random choices --------------------------------------------------------------------------------------------
def new_seed(rng: np.random.Generator) -> int:
    """A seed for a function with its own random generator."""
    return int(rng.integers(2**31))


def sample(items: list, n: int, rng: np.random.Generator) -> list:
    """n random items, without replacement if there are enough."""
    return [items[i] for i in rng.choice(len(items), n, replace=n > len(items))]


def edit(text: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """The text with a random one of `words` inserted, or with one of its own removed or replaced by it."""
    edited = split_words(text)
    word = words[rng.integers(len(words))]
    kind = rng.integers(3)
    if kind == 0 or not edited:
        edited.insert(rng.integers(len(edited) + 1), word)
    elif kind == 1 and len(edited) > 1:
        del edited[rng.integers(len(edited))]
    else:
        edited[rng.integers(len(edited))] = word
    return " ".join(edited)


# --- PPO, the mathematics: everything is (B, T), and only response tokens count ------------------------
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


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float,
        lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016) over the response tokens: (advantages, returns),
    (B, T) each.

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


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
                clip: float, n_tokens: torch.Tensor) -> torch.Tensor:
    """PPO's clipped surrogate (Schulman et al., 2017, Eq. 7) of (B, T) tensors, summed over tokens and divided by
    `n_tokens`, the tokens of the whole optimizer step, so that micro-batches add up to the same gradient."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -(torch.minimum(unclipped, clipped) * mask).sum() / n_tokens  # minus: the optimizer descends


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
               clip: float, n_tokens: torch.Tensor) -> torch.Tensor:
    """Half the squared error of (B, T) values: the larger of that of the value and that of the value clipped around
    the old one (as in OpenAI's baselines, Dhariwal et al., 2017). Summed and divided as in `policy_loss`."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / n_tokens


def supervised_loss(policy: Policy, demos: Rollout) -> torch.Tensor:
    """Mean negative log-likelihood per response token of demonstrations (a Rollout of B rows), in nats: shape ()."""
    logprobs, _, _ = logprobs_and_values(policy, demos, with_values=False)
    return -logprobs.sum() / demos.response_lengths.sum().clamp(min=1)


RARE = 0.01  # likelihood relative to the initial policy's: below it unlearning an answer follows its probability


def unlikelihood_loss(policy: Policy, answers: Rollout, initial: Policy) -> torch.Tensor:
    """A loss that makes given answers (a Rollout of B rows) of the initial policy pi_0 less likely, per response token:
    shape (). After unlikelihood training (Welleck et al., 2020). With p = pi(y|x) / pi_0(y|x) an answer adds

        p / RARE             where p < RARE: proportional to p, like its own term pi(y|x) in P(unsafe)
        1 + log(p / RARE)    elsewhere: the gradient of a demonstration, reversed; that of p / RARE would be up to
                             1 / RARE times as large, and drown the other losses

    Both have the same value and slope at p = RARE. Of pi's own samples only one in 1 / P(unsafe) would contribute."""
    with torch.no_grad():
        before, _, _ = logprobs_and_values(initial, answers, with_values=False)
    logprobs, _, _ = logprobs_and_values(policy, answers, with_values=False)
    log_p = (logprobs - before).sum(1)  # (B,) nats
    losses = 1 + torch.nn.functional.elu(log_p - math.log(RARE))  # elu(x): exp(x) - 1 where x < 0, else x
    return losses.sum() / answers.response_lengths.sum().clamp(min=1)


@dataclass
class ExtraLoss:
    """A loss on given (prompt, response) pairs, beside PPO's."""

    pairs: Rollout
    coef: float = 1.0
    loss: Callable[[Policy, Rollout], torch.Tensor] = supervised_loss  # per response token: shape ()


# --- players ------------------------------------------------------------------------------------------------
@dataclass
class Player:
    """One player: its policy with a critic, its reference policy and its optimizer.

    Parameters that require grad are trained, saved and averaged. Players exchange text: each has its own tokenizer.
    """

    name: str  # "attacker" or "defender": the prefix of its metrics
    policy: Policy
    max_new_tokens: int
    learning_rate: float = 1e-5
    kl_coef: float = 0.05
    entropy_coef: float = 0.0  # bonus per token, after eta_H of Eq. (3.7), on the attacker
    template: str = "{}"  # wraps each prompt; the attacker's wraps its seeds
    kl_anchor: str = "initial"  # or "previous": the KL penalty is measured from the policy at the last `anchor`
    epochs: int = 2
    minibatches: int = 2
    micro_batch: int = 0  # rows per forward and backward; 0: the whole minibatch
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.5
    gamma: float = 1.0
    lam: float = 0.95
    max_grad_norm: float = 1.0
    missing_eos_penalty: float = 0.5  # subtracted from the score of a response without EOS
    temperature: float = 1.0
    initial: Policy = field(init=False)  # frozen: the initial policy
    reference: Policy = field(init=False)  # frozen: the anchor of the KL penalty
    optimizer: torch.optim.Optimizer = field(init=False)
    skipped_steps: int = 0  # optimizer steps, and whole updates, skipped because a number was not finite
    skipped_in_a_row: int = 0

    def __post_init__(self):
        self.initial = frozen_copy(self.policy)
        self.reference = self.initial if self.kl_anchor == "initial" else frozen_copy(self.policy)
        self.new_optimizer()

    def new_optimizer(self) -> None:
        """Replace the optimizer by a fresh AdamW, whose moments are zero."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)

    def anchor(self) -> None:
        """Measure the KL penalty from the current policy from now on."""
        if self.reference is self.initial:  # which stays as it is: the anchor becomes a copy of its own
            self.reference = frozen_copy(self.policy)
        else:
            self.reference.lm.load_state_dict(self.policy.lm.state_dict())

    def reset_to(self, policy: Policy) -> None:
        """Copy the language model's weights of `policy`, with a fresh optimizer; the critic is kept."""
        self.policy.lm.load_state_dict(policy.lm.state_dict())
        self.new_optimizer()

    def with_policy(self, policy: Policy) -> "Player":
        """The same player with another, frozen policy: it can `generate`, not learn."""
        other = copy.copy(self)
        other.policy = policy
        return other

    def generate(self, prompts: list[str], seed: int, temperature: float | None = None) -> Rollout:
        """One sampled response to each prompt (temperature 0: greedy), as a Rollout of the prompts in its template."""
        prompts = [self.template.format(prompt) for prompt in prompts]
        if temperature is None:
            temperature = self.temperature
        rows = 4 * self.micro_batch or 256  # per batch: more than in an update, as there are no gradients
        padded = prompts + prompts[:1] * (-len(prompts) % world_size())  # the same number for every process
        mine = generate(self.policy, my_rows(padded), self.max_new_tokens, temperature,
                        seed=seed + 1_000_003 * rank(), clip_prompts=True, batch_size=rows)
        if world_size() == 1:
            return mine
        parts = [None] * world_size()
        dist.all_gather_object(parts, mine.rows())
        gathered = list(itertools.chain.from_iterable(zip(*parts)))  # one of each process in turn undoes `my_rows`
        return pack(self.policy, prompts, *zip(*gathered[: len(prompts)]), mine.temperature)

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """(tensors, numbers) of a checkpoint: the trained weights, the optimizer's state, and the reference if it has
        moved. All processes must call it; tensors are complete in the first one and {} in the others."""
        tensors = {f"policy.{name}": w for name, w in weights(self.policy, trained_names(self.policy)).items()}
        if self.reference is not self.initial:
            names = trained_names(self.policy.lm)
            tensors |= {f"reference.{name}": tensor for name, tensor in weights(self.reference.lm, names).items()}
        if self.optimizer.state:  # without it torch would take a step to create it
            options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            states = dcp.get_optimizer_state_dict(self.policy, self.optimizer, options=options).get("state", {})
            for name, state in states.items():
                tensors |= {f"optimizer.{part}.{name}": tensor for part, tensor in state.items()}  # part: exp_avg, ...
        return tensors, {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], numbers: dict[str, int]) -> None:
        """Restore what `state_dict` returned; only the first process's tensors are used."""
        groups = {"policy": {}, "reference": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            group, name = key.split(".", 1)
            groups[group][name] = tensor
        if not rank() and set(groups["policy"]) != set(trained_names(self.policy)):
            raise ValueError("a checkpoint must hold the weights that its options train: they have been changed since")
        load_weights(self.policy, groups["policy"])
        self.new_optimizer()
        if any_process(groups["optimizer"]):
            self._load_optimizer(groups["optimizer"])
        if any_process(groups["reference"]):
            self.anchor()  # a reference of its own
            load_weights(self.reference.lm, groups["reference"])
        self.skipped_steps = numbers["skipped_steps"]
        self.skipped_in_a_row = numbers.get("skipped_in_a_row", 0)  # absent in older checkpoints

    def _load_optimizer(self, moments):
        """Load AdamW's moments {"part.parameter": tensor}."""
        state = {}
        for key, tensor in moments.items():
            part, name = key.split(".", 1)
            state.setdefault(name, {})[part] = tensor
        group = {**self.optimizer.param_groups[0], "params": trained_names(self.policy)}
        options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1,
                                       ignore_frozen_params=True, strict=False)  # an unused parameter has no moments
        dcp.set_optimizer_state_dict(self.policy, self.optimizer, {"state": state, "param_groups": [group]},
                                     options=options)


def trained_names(module: torch.nn.Module) -> list[str]:
    """Names of the parameters that require grad; tied parameters appear once, under the first name."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def weights(module: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """{name: tensor} of a module, complete and on the CPU in the first process, {} in the others."""
    only_trained = names == trained_names(module)  # then nothing else is gathered: with LoRA that would be the base
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    state = dcp.get_model_state_dict(module, options=options)
    return {name: state[name] for name in names} if state else {}


def load_weights(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load complete tensors {name: tensor} into a module, sharded or not; only the first process's are used."""
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1,
                                   strict=False)  # frozen weights are not among the tensors
    dcp.set_model_state_dict(module, dict(tensors), options=options)  # torch writes into the dict that it is given


def any_process(tensors: dict) -> bool:
    """Whether the first process holds any tensors; the others hold none."""
    return bool(all_sum(torch.tensor(len(tensors))))


# --- skipped steps ---------------------------------------------------------------------------------------------
MAX_SKIPPED = 10  # consecutive skipped steps that end a run: one bad batch may be chance, ten are a persistent fault


class NotFinite(ValueError):
    """Training cannot go on, as its numbers are not finite; the message says whose and why."""


def skip(player: Player, what: str) -> None:
    """Count and report a step that is skipped because `what` is not finite. Raises NotFinite after MAX_SKIPPED."""
    player.skipped_steps += 1
    player.skipped_in_a_row += 1
    message = f"{player.name}: not finite: {what}; step skipped ({player.skipped_steps} so far)"
    if player.skipped_in_a_row >= MAX_SKIPPED:
        raise NotFinite(f"{message}; these were {MAX_SKIPPED} in a row: look at the judge and the embedder, "
                        "or begin again with a lower learning rate")
    tqdm.write(message, file=sys.stderr)


def not_finite(**tensors: torch.Tensor) -> str:
    """Names of the tensors that hold NaN or infinity, joined by commas, or ""."""
    return ", ".join(name for name, x in tensors.items() if not torch.isfinite(x).all())


# --- the PPO update -----------------------------------------------------------------------------------------------
@dataclass
class Experience:
    """What an update needs of a rollout before its first step, all (B, T) and zero outside the response mask."""

    logprobs: torch.Tensor  # of the policy before the update
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor

    def select(self, rows: torch.Tensor, T: int) -> "Experience":
        """The given rows (n,), cut to T tokens."""
        return Experience(*(x[rows, :T] for x in vars(self).values()))


def ppo_update(player: Player, rollout: Rollout, scores: np.ndarray | torch.Tensor, seed: int,
               extra: Sequence[ExtraLoss] = ()) -> dict[str, float]:
    """One PPO update (Schulman et al., 2017) of a player on its own rollout; returns its metrics by name.

    scores (B,): one number for each response. extra: losses added to PPO's, as that of demonstrations (PPO-ptx, Ouyang
    et al., 2022). With several processes all pass the same arguments. A step with a non-finite number is skipped; so is
    the whole update if whitening would spread that number. Non-finite metrics are left out. Raises NotFinite, and
    ValueError if the batch cannot be divided evenly.
    """
    B = len(rollout)
    parts = player.minibatches * world_size()
    if B % parts:
        raise ValueError(f"a batch must be a multiple of minibatches x processes = {parts}, got {B} rows")
    scores = torch.as_tensor(scores, dtype=torch.float32, device=player.policy.device)
    mask = rollout.response_mask  # (B, T)
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(B, generator=generator).chunk(player.minibatches) for _ in range(player.epochs)]
    old = experience(player, rollout, scores, epochs[0])
    bad = not_finite(scores=scores, logprobs=old.logprobs, ref_logprobs=old.ref_logprobs, values=old.values,
                     advantages=old.advantages)
    steps = []
    if bad:
        skip(player, bad)
        epochs = []
    for minibatches in epochs:
        for m, rows in enumerate(minibatches):
            if not mask[rows].any():  # none of its exchanges was decided: nothing to learn for PPO
                continue
            for term in extra:
                part = torch.arange(len(term.pairs)).tensor_split(player.minibatches)[m]
                extra_gradients(player.policy, term, part, player.micro_batch)
            steps.append(minibatch_gradients(player, rollout, old, rows, is_first=not steps))
            optimizer_step(player, steps[-1])
    metrics = rollout_metrics(old, rollout, scores)
    if steps:
        metrics |= {name: np.mean([step[name] for step in steps]) for name in steps[0]}
    metrics["skipped_steps"] = player.skipped_steps
    return {f"{player.name}/{name}": float(value) for name, value in metrics.items() if math.isfinite(value)}


def rollout_metrics(old: Experience, rollout: Rollout, scores: torch.Tensor) -> dict[str, float]:
    """Metrics of the rollout before the update; means leave out rows with an empty response mask."""
    mask = rollout.response_mask
    rows = mask.any(1)  # (B,)
    kl = (old.logprobs - old.ref_logprobs).sum(1)  # (B,) nats per response
    return {"objective/kl": kl[rows].mean().item(),
            "objective/entropy": masked_mean(old.entropy, mask).item(),  # nats per token
            "objective/scores": scores[rows].mean().item(),
            "ended": rollout.ended[rows].float().mean().item(),
            "response_length": rollout.response_lengths[rows].float().mean().item()}


def experience(player: Player, rollout: Rollout, scores: torch.Tensor,
               first_epoch: tuple[torch.Tensor, ...]) -> Experience:
    """Scores (B,) -> token rewards -> advantages and returns, from the current policy and reference.

    Old log-probs are computed in the batches of the first epoch (row numbers of each minibatch): the same shapes give
    the same bits, so the ratio before the first step is exactly 1, which `minibatch_gradients` checks.
    """
    same_batches = []  # as `minibatch_gradients` will forward them
    for minibatch in first_epoch:
        same_batches += my_rows(minibatch).split(player.micro_batch or len(rollout))
    logprobs, values, entropy = forward_rows(player.policy, rollout, same_batches)
    # the reference is compared with nothing bit by bit: its groups are of similar length, which have little padding
    by_length = my_rows(rollout.lengths.argsort(stable=True)).split(4 * player.micro_batch or 32)
    ref_logprobs, _, _ = forward_rows(player.reference, rollout, by_length, with_values=False)
    mask = rollout.response_mask  # (B, T), True on sampled tokens
    penalised = torch.where(rollout.ended, scores, scores - player.missing_eos_penalty)
    rewards = token_rewards(penalised, logprobs, ref_logprobs, mask, player.kl_coef)
    advantages, returns = gae(rewards, values, mask, player.gamma, player.lam)
    return Experience(logprobs, ref_logprobs, values, entropy, whiten(advantages, mask), returns)


def extra_gradients(policy: Policy, term: ExtraLoss, rows: torch.Tensor, micro_batch: int) -> float:
    """Add the gradient of an extra loss on the given rows (n,); returns the loss."""
    n_tokens = term.pairs.response_lengths[rows].sum()
    total = torch.zeros((), device=policy.device)
    for some in my_rows(rows).split(micro_batch or len(rows)):
        part = term.pairs.select(some)
        loss = term.coef * term.loss(policy, part) * (part.response_lengths.sum() / n_tokens)
        loss.backward()
        total += loss.detach()
    return all_sum(total).item()


def minibatch_gradients(player: Player, rollout: Rollout, old: Experience, minibatch: torch.Tensor,
                        is_first: bool) -> dict[str, float]:
    """Add the gradients of one minibatch of rows (n,), micro-batch by micro-batch. Returns its statistics over all
    processes, as means per token. Raises RuntimeError if the ratio is not exactly 1 before the first step."""
    n_tokens = rollout.response_lengths[minibatch].sum().clamp(min=1)
    total = {}
    for rows in my_rows(minibatch).split(player.micro_batch or len(rollout)):
        part = rollout.select(rows)
        before = old.select(rows, part.tokens.shape[1])
        mask = part.response_mask
        logprobs, values, entropy = logprobs_and_values(player.policy, part, entropy_grad=player.entropy_coef > 0)
        if is_first:
            check_ratio(player, logprobs, before.logprobs)
        loss_p = policy_loss(logprobs, before.logprobs, before.advantages, mask, player.clip, n_tokens)
        loss_v = value_loss(values, before.values, before.returns, mask, player.value_clip, n_tokens)
        loss_h = -(entropy * mask).sum() / n_tokens  # after Eq. (3.7): mu also maximises entropy, here of single tokens
        (loss_p + player.value_coef * loss_v + player.entropy_coef * loss_h).backward()
        stats = ratio_stats(player, logprobs.detach() - before.logprobs, values.detach() - before.values, mask)
        stats |= {"loss/policy": loss_p.detach() * n_tokens, "loss/value": loss_v.detach() * n_tokens}
        total = {name: total.get(name, 0) + value for name, value in stats.items()}
    sums = all_sum(torch.stack(list(total.values())))  # the same in all processes, so all decide the same
    return dict(zip(total, (sums / n_tokens).tolist()))


def check_ratio(player: Player, logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> None:
    """Raises RuntimeError if the training forward's log-probs (B, T) differ in any bit from the scoring forward's."""
    off = (logprobs.detach() - old_logprobs).abs().max()
    if 0 < off < math.inf:  # `optimizer_step` handles what is not finite
        raise RuntimeError(f"{player.name}: the PPO ratio must be exactly 1 before the first step; the training "
                           f"forward differs from the scoring forward by up to {off:.2e}")


def ratio_stats(player: Player, logprob_change: torch.Tensor, value_change: torch.Tensor,
                mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics summed over the tokens of a micro-batch, from the changes (B, T) since the update began."""
    difference = logprob_change * mask
    ratio = difference.exp()
    per_token = {
        "policy/approxkl": ratio - 1 - difference,  # k3 (Schulman, 2020)
        "policy/clipfrac": (ratio - 1).abs() > player.clip,
        "policy/ratio": ratio,
        "val/clipfrac": value_change.abs() > player.value_clip}
    return {name: (x * mask).sum() for name, x in per_token.items()}


def optimizer_step(player: Player, stats: dict[str, float]) -> None:
    """Clip by the global norm and step; skip the step if its gradient or its losses are not finite."""
    norm = clip_gradients(player.policy, player.max_grad_norm)
    losses = torch.tensor([stats["loss/policy"], stats["loss/value"]])
    bad = not_finite(gradient=norm, losses=losses)
    if bad:
        skip(player, bad)
    else:
        player.optimizer.step()
        player.skipped_in_a_row = 0
    player.optimizer.zero_grad(set_to_none=True)


def clip_gradients(policy: Policy, max_norm: float) -> torch.Tensor:
    """Sum the gradients over processes, clip them by their global norm, and return it: shape ()."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    if world_size() > 1 and not policy.is_sharded:  # else its backward has summed them
        for p in trained:
            if p.grad is None:  # of an expert, say, that no token of this process has met
                p.grad = torch.zeros_like(p)
            all_sum(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    return norm.full_tensor() if policy.is_sharded else norm


@torch.no_grad()
def forward_rows(policy: Policy, rollout: Rollout, groups: list[torch.Tensor],
                 with_values: bool = True) -> list[torch.Tensor]:
    """`logprobs_and_values` of a rollout, (B, T) each, computed by groups of this process's rows."""
    outputs = [torch.zeros(rollout.tokens.shape, device=policy.device) for _ in range(3)]
    with policy.autocast():  # around all groups, so that it casts trained weights once
        for rows in groups:
            part = rollout.select(rows)
            for all_rows, piece in zip(outputs, logprobs_and_values(policy, part, with_values=with_values)):
                if piece is not None:
                    all_rows[rows, : piece.shape[1]] = piece
    return [all_sum(x) for x in outputs]  # rows of other processes are zero here


def log_likelihoods(policy: Policy, rollout: Rollout, micro_batch: int = 0) -> torch.Tensor:
    """(B, 2): mean and least log-prob of each response's tokens under a policy, without gradients, in nats."""
    by_length = my_rows(rollout.lengths.argsort(stable=True)).split(4 * micro_batch or 256)  # little padding
    logprobs, _, _ = forward_rows(policy, rollout, by_length, with_values=False)  # 0 outside the responses
    mean = logprobs.sum(1) / rollout.response_lengths
    return torch.stack([mean, logprobs.amin(1)], 1).cpu()


# --- supervised training --------------------------------------------------------------------------------------------
@dataclass
class SFTSettings:
    """How a policy is fine-tuned on demonstrations."""

    steps: int
    batch_size: int
    learning_rate: float  # the peak of one cycle
    seed: int | list[int]
    micro_batch: int = 0  # rows per forward and backward; 0: the whole batch
    name: str = "SFT"  # label of the progress bar
    by_length: bool = False  # pairs of similar length share a batch: less padding


def sft(policy: Policy, pairs: list[tuple[str, str]], settings: SFTSettings) -> float:
    """Supervised fine-tuning on (prompt, response) pairs, with a new critic. Returns the last loss, nats per token.
    Raises NotFinite."""
    optimizer = torch.optim.AdamW([p for p in policy.lm.parameters() if p.requires_grad], lr=settings.learning_rate,
                                  betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = one_cycle(optimizer, settings.learning_rate, settings.steps)
    demos = demonstrations(policy, pairs)
    batch_size = settings.batch_size + -settings.batch_size % world_size()  # as many rows for every process
    rng = np.random.default_rng(settings.seed)
    batches = sample_batches(len(pairs), settings.steps, batch_size, rng)
    if settings.by_length:
        batches = group_by_length(batches, demos.lengths.cpu().numpy(), rng)
    loss = math.nan
    bar = trange(settings.steps, desc=f"{settings.name:<22}", dynamic_ncols=True)
    for step in bar:
        rows = torch.from_numpy(batches[step]).to(policy.device)
        loss = extra_gradients(policy, ExtraLoss(demos), rows, settings.micro_batch)
        if not_finite(gradient=clip_gradients(policy, 1.0)):
            raise NotFinite(f"supervised training stopped at step {step + 1}: its gradient is not finite; "
                            "lower the learning rate or look at the model's weights")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}")
    policy.new_critic()  # the old one read the states of another body
    return loss


# --- averages of policies ---------------------------------------------------------------------------------------
class PolicyAverage:
    """An average of policies: Theorem 3.2's, or a cheaper one. Like a player it can `generate`.

    kind "mixture": the uniform mixture over all policies added so far; one member is sampled for each prompt.
    At most `capacity` of them are kept, a uniform sample of all (reservoir sampling, Vitter 1985).
    kind "weights": one policy, whose weights are the mean of theirs. It is cheap, but only an approximation.
    kind "ema": the same, with an exponential moving average: the latest policy counts half, the one before a quarter.
    Members are the language model's trained weights, without critic, on the CPU of the first process; with LoRA they
    are its adapters (whose mean is not the mean of their products: a second approximation).
    """

    def __init__(self, player: Player, kind: str = "mixture", capacity: int = 16, seed: int = 0):
        self.player = player  # provides architecture, tokenizer and sampling
        self.kind = kind
        self.capacity = capacity if kind == "mixture" else 1
        self.seed = seed
        self.members: list[dict[str, torch.Tensor]] = []
        self.count = 0  # how many policies were added

    def add(self, policy: Policy) -> None:
        """Add the current policy: the weights that the average's player trains."""
        names = trained_names(self.player.policy.lm)
        self.add_weights({name: tensor.clone() for name, tensor in weights(policy.lm, names).items()})

    def add_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Add the weights {name: tensor (...)} of one policy's language model; the average then owns the tensors."""
        self.count += 1
        if len(self.members) < self.capacity:
            self.members.append(weights)
        elif self.kind in ("weights", "ema"):
            divisor = self.count if self.kind == "weights" else 2
            for name, mean in self.members[0].items():
                mean += (weights[name] - mean) / divisor
        else:  # the n-th policy enters with probability capacity / n, in place of a random member
            slot = int(np.random.default_rng([self.seed, self.count]).integers(self.count))
            if slot < self.capacity:
                self.members[slot] = weights

    def policy(self, member: int = 0) -> Policy:
        """A frozen policy with a member's weights."""
        policy = frozen_copy(self.player.policy)
        load_weights(policy.lm, self.members[member])
        return policy

    def generate(self, prompts: list[str], seed: int, temperature: float | None = None) -> Rollout:
        """As `Player.generate`, each prompt by a uniformly sampled member; one member's policy at a time is loaded."""
        rng = np.random.default_rng([seed, 1])  # not the stream by which a caller may have sampled the prompts
        member_of = rng.integers(len(self.members), size=len(prompts))  # (B,)
        rows = [None] * len(prompts)
        for member in np.unique(member_of):
            indices = np.flatnonzero(member_of == member)
            player = self.player.with_policy(self.policy(member))
            rollout = player.generate([prompts[i] for i in indices], new_seed(rng), temperature)  # independent rows
            for i, row in zip(indices, rollout.rows()):
                rows[i] = row
        prompts = [self.player.template.format(prompt) for prompt in prompts]
        return pack(self.player.policy, prompts, *zip(*rows), rollout.temperature)

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """(tensors, numbers) of a checkpoint."""
        tensors = {}
        for i, member in enumerate(self.members):
            tensors |= {f"{i}.{name}": tensor for name, tensor in member.items()}
        return tensors, {"count": self.count, "members": len(self.members)}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], numbers: dict[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.count = numbers["count"]
        self.members = [{} for _ in range(numbers["members"])]
        for key, tensor in tensors.items():
            member, name = key.split(".", 1)
            self.members[int(member)][name] = tensor


Side = Player | PolicyAverage  # what can generate: one side of the game


# --- exchanges ------------------------------------------------------------------------------------------------
@dataclass
class Exchanges:
    """A batch of exchanges: seed -> attack -> response -> P(safe)."""

    seeds: list[str]  # where the prompts were given: the prompts
    attacks: Rollout | None  # None if the prompts were given
    prompts: list[str]
    responses: Rollout
    p_safe: np.ndarray  # (B,), NaN where the judge is undecided: these rows have an empty response mask
    judge_seconds: float
    sampled_tokens: int

    @property
    def decided(self) -> np.ndarray:
        """(B,) bool, True where there is a verdict."""
        return ~np.isnan(self.p_safe)


def play(attacker: Side | None, defender: Side, seeds: list[str], judge: Judge, seed: int,
         at_least: float = 0.5) -> Exchanges:
    """The attacker rewrites each seed, the defender answers, the judge scores: x ~ mu, y ~ pi(.|x), R(x, y).

    With attacker None the seeds themselves are the prompts. An exchange that the judge does not decide keeps its row
    with an empty response mask, so it enters no update. Raises JudgeError if a smaller fraction than at_least is
    decided.
    """
    attacks = None
    prompts = list(seeds)
    if attacker is not None:
        attacks = attacker.generate(seeds, 2 * seed)  # the players' random numbers differ
        prompts = attacks.texts
    responses = defender.generate(prompts, 2 * seed + 1)
    tokens = int(responses.response_lengths.sum())
    clock = time.time()
    p_safe = call_judge(judge, prompts, responses.texts)
    seconds = time.time() - clock
    undecided = torch.from_numpy(~decided(p_safe, at_least))
    responses = responses.without_responses(undecided)
    if attacks is not None:
        tokens += int(attacks.response_lengths.sum())
        attacks = attacks.without_responses(undecided)
    return Exchanges(list(seeds), attacks, prompts, responses, p_safe, seconds, tokens)


# --- the theory on tables: Algorithms 2 and 3 --------------------------------------------------------------------
def solve_matrix_game(payoff: np.ndarray, rounds: int, entropy: float = 0.0,
                      blind: bool = False) -> tuple[np.ndarray, ...]:
    """Algorithm 2 (Algorithm 3 with `entropy` eta_H > 0) on payoff (X prompts, Y responses) in [0, 1].

    pi_{t+1}(y|x) ~ pi_t(y|x) exp(R(x, y) / beta),  mu_{t+1}(x) ~ mu_t(x) exp(-V_{pi_t}(x) / eta), from uniform,
    with beta = sqrt(T / (8 ln Y)) and eta = sqrt(T / (8 ln X)). blind: a defender that cannot tell prompts
    apart, one response distribution for all x. Returns (defender (X, Y), attacker (X,), last defender, last
    attacker): the averages first. Raises ValueError on a payoff outside [0, 1] or an invalid number.
    """
    R = np.asarray(payoff, dtype=np.float64)
    if R.ndim != 2 or min(R.shape) < 2 or not (R >= 0).all() or not (R <= 1).all() or rounds < 1 or entropy < 0:
        raise ValueError("solve_matrix_game needs a payoff (X >= 2, Y >= 2) in [0, 1], rounds >= 1 and entropy >= 0, "
                         f"got shape {R.shape}, rounds {rounds}, entropy {entropy}")
    X, Y = R.shape
    beta = np.sqrt(rounds / (8 * np.log(Y)))  # O(sqrt T), Theorem 3.2
    eta = np.sqrt(rounds / (8 * np.log(X)))
    log_pi = sum_pi = np.zeros((X, Y))
    log_mu = sum_mu = np.zeros(X)
    for _ in range(rounds):
        pi = _softmax(log_pi)
        mu = _softmax(log_mu)
        sum_pi = sum_pi + pi
        sum_mu = sum_mu + mu
        V = (pi * R).sum(1)  # (X,): V_pi(x) = E_{y ~ pi(.|x)} R(x, y)
        log_pi = log_pi + (mu @ R if blind else R) / beta  # Algorithm 2, the defender's step
        # the attacker's step: Algorithm 3, which without entropy is log_mu - V / eta, Algorithm 2
        log_mu = (eta * log_mu - V) / (eta + entropy)
    return sum_pi / rounds, sum_mu / rounds, pi, mu  # Algorithm 2 returns the averages


def nash_gap(payoff: np.ndarray, defender: np.ndarray, attacker: np.ndarray, entropy: float = 0.0,
             blind: bool = False) -> float:
    """Eq. (3.6), in units of the payoff: how much the two players' best responses would gain together.

    payoff (X, Y), defender (X, Y) rows sum to 1, attacker (X,) sums to 1. blind: pi' also is the same for all x.
    """
    # Eq. (3.6): max_pi' J(pi', mu) - min_mu' J(pi, mu'), with J = E[R] - eta_H H(mu) of Eq. (3.7)
    R, pi, mu = (np.asarray(a, dtype=np.float64) for a in (payoff, defender, attacker))
    best_defence = (mu @ R).max() if blind else (mu * R.max(1)).sum()
    V = (pi * R).sum(1)  # (X,)
    if entropy == 0:
        return float(best_defence - V.min())
    H = -(mu * np.log(np.maximum(mu, 1e-300))).sum()
    best_attack = -entropy * np.logaddexp.reduce(-V / entropy)  # min_mu' <V, mu'> - eta_H H(mu')
    return float(best_defence - entropy * H - best_attack)


def _softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
