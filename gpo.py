"""GPO: the two-player game and its training, after "Toward Optimal LLM Alignments Using Two-Player Games"
(Zheng et al., arXiv 2406.10977).

    Eq. (3.1)  max_pi min_mu J(pi, mu) = E_{x ~ mu, y ~ pi(.|x)} [ R(x, y) - R_div(x) ]

The attacker mu writes prompts x, the defender pi answers with y, a judge gives R = P(safe). Both are trained
in turn with token-level PPO: `play` collects an exchange, `ppo_update` improves the mover. The policies'
averages (`PolicyAverage`) are what the theory speaks of; `solve_matrix_game` is that theory on small tables.

Differs from the paper: (1) the KL anchor is the initial policy by default, as in the authors' code; the
previous round's with `--kl_anchor previous`. (2) The KL penalty is the k1 estimate on sampled tokens, inside
the reward. (3) Theorem 3.2 averages distributions; of two language models one can only mix episodes (exact)
or average weights (an approximation): both are here.
"""

import contextlib
import copy
import math
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from diversity import set_similarity
from kernel import CHUNK_BYTES, KEEP_BYTES
from model import (Policy, Rollout, adapter, all_sum, data_parallel, demonstrations, frozen_copy, generate, load_whole, logprobs_and_values, on_first, pack, rank,
                   share, whole, with_idle_row, world_size)
from reward import call_judge, decided, unsafe_share


# --- PPO, the mathematics: everything is (B, T), and zero outside the response mask --------------------
def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Per-token rewards (B, T): -kl_coef * k1 at each response token, plus the score (B,) at the last one.

    k1 = logprob - ref_logprob, whose mean over samples is KL(policy || reference), Eq. (3.3).
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # (B,) index of the last True
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al., 2016) over the response tokens: (advantages, returns)."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        advantages[:, t] = next_advantage = advantage
        next_value = values[:, t] * mask[:, t]  # no value beyond the response: it has ended
    return advantages, (advantages + values) * mask


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Zero mean and unit variance over the True entries of mask, zero elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, clip, n_tokens):
    """PPO's clipped surrogate (Schulman et al., 2017), summed over tokens and divided by `n_tokens`, the
    tokens of the whole optimizer step, so that micro-batches add up to the same gradient."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -(torch.minimum(unclipped, clipped) * mask).sum() / n_tokens


def value_loss(values, old_values, returns, mask, clip, n_tokens):
    """Half the squared error; the larger of it and that of the value clipped around its old self."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / n_tokens


def supervised_loss(policy, demos):
    """Mean negative log-likelihood per response token of a Rollout of demonstrations."""
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

    def anchor(self):
        """The KL penalty is measured from the policy as it is now."""
        self.reference = frozen_copy(self.policy)

    def new_optimizer(self):
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)

    def go_back(self, policy):
        """Begin anew with the language model's weights of `policy` and a fresh optimizer; the critic is kept."""
        self.policy.lm.load_state_dict(policy.lm.state_dict())
        self.new_optimizer()

    def speak(self, prompts, seed, temperature=None):
        """One sampled response to each prompt (temperature 0: greedy), as a Rollout."""
        temperature = self.temperature if temperature is None else temperature
        rows = 4 * self.micro_batch or 256  # at a time: no gradients, so more than in an update
        return generate(self.policy, prompts, self.max_new_tokens, temperature, self.top_k, self.top_p, seed, clip_prompts=True, batch_size=rows)


MAX_SKIPPED = 10  # steps skipped in a row that end a run: one bad batch is chance, ten are a fault that goes on


class NotFinite(ValueError):
    """Too many steps in a row had to be skipped; the message says whose and why."""


def skip(player, what):
    """Count and name a step that is not taken because `what` is not finite: the weights stay as they were. Raises NotFinite."""
    player.skipped_steps, player.skipped_in_a_row = player.skipped_steps + 1, player.skipped_in_a_row + 1
    message = f"{player.name}: {what} not finite, step skipped ({player.skipped_steps} so far)"
    if player.skipped_in_a_row >= MAX_SKIPPED:
        raise NotFinite(f"{message}; these were {MAX_SKIPPED} in a row: look at the judge and the embedder, or begin again with a lower learning rate")
    tqdm.write(message, file=sys.stderr)


def not_finite(**tensors):
    """What of the named tensors holds NaN or infinity, in words; "" if nothing does."""
    bad = [name.replace("_", " ") for name, x in tensors.items() if not torch.isfinite(x).all()]
    return bad and f"{', '.join(bad)} {'are' if bad[-1].endswith('s') else 'is'}"


def ppo_update(player, rollout, scores, seed, demos=None, ptx_coef=0.0):
    """One PPO update of a player on its own rollout; returns its metrics as a dict of floats.

    scores (B,): one number for each response. demos: a Rollout of demonstrations whose likelihood is kept up
    during the update with weight ptx_coef (PPO-ptx, Ouyang et al., 2022). With several processes all pass the same
    arguments; each forwards its share of every minibatch, and whitening, token counts and metrics are of the whole.
    A step with a number that is not finite is skipped, and the whole update where whitening would spread it; metrics that are not
    finite are left out. Raises NotFinite.
    """
    B, N, D = len(rollout), world_size(), len(demos) if demos is not None else 0
    rollout, demos = with_idle_row(rollout), demos and with_idle_row(demos)
    policy, mask = player.policy, rollout.response_mask  # (B, T), True on sampled tokens; with an idle row, from here on, (B + 1, T)
    generator = torch.Generator().manual_seed(seed)

    # 1. Which rows are forwarded together. Old log-probs come from the very batches of the first epoch:
    #    the same shapes give the same bits, so the ratio before the first step is exactly 1.
    epochs = [torch.randperm(B, generator=generator).tensor_split(min(player.minibatches, B)) for _ in range(player.epochs)]
    split = lambda rows, idle=B: split_rows(share(rows, idle), player.micro_batch)
    old_logprobs, values, entropy = forward_rows(policy, rollout, sum(map(split, epochs[0]), []))
    by_length = split_rows(share(rollout.lengths[:B].argsort(stable=True), B), 4 * player.micro_batch or 32)  # no gradients: larger groups, little padding
    ref_logprobs, _, _ = forward_rows(player.reference, rollout, by_length, with_values=False)

    # 2. Scores -> token rewards -> advantages and returns, whitened over the whole rollout.
    scores = torch.as_tensor(scores, dtype=torch.float32, device=policy.device)
    penalised = F.pad(scores, (0, len(rollout) - B)) - player.missing_eos_penalty * ~rollout.ended
    rewards = token_rewards(penalised, old_logprobs, ref_logprobs, mask, player.kl_coef)
    advantages, returns = gae(rewards, values, mask, player.gamma, player.lam)
    advantages = whiten(advantages, mask)

    # 3. Minibatch steps. A process's losses are its shares of sums over all rows; the factor N is there because DDP and FSDP take means.
    steps, stats, early_stop = [(m, rows) for minibatches in epochs for m, rows in enumerate(minibatches)], [], False
    bad = not_finite(scores=scores, log_probs=old_logprobs, reference_log_probs=ref_logprobs, values=values) or not_finite(advantages=advantages)
    if bad:
        skip(player, bad)
        steps = []
    for m, minibatch in steps:
        if demos is not None and ptx_coef > 0:
            demo_rows = torch.arange(D).tensor_split(player.minibatches)[m]
            n_demo_tokens = demos.response_mask[demo_rows].sum()
            for rows in split(demo_rows, D) if len(demo_rows) else []:
                part = demos.select(rows)
                (N * ptx_coef * supervised_loss(policy, part) * part.response_mask.sum() / n_demo_tokens).backward()
        n_tokens, micro_batches = mask[minibatch].sum(), split(minibatch)
        step_stats = 0
        for i, rows in enumerate(micro_batches):
            part, T = rollout.select(rows), int(rollout.lengths[rows].max())
            cut = lambda x: x[rows, :T]
            module = player.trained if i + 1 == len(micro_batches) else policy  # DDP adds up once a step, in the last backward
            new_logprobs, new_values, new_entropy = logprobs_and_values(module, part, entropy_grad=player.entropy_coef > 0)
            loss_p = policy_loss(new_logprobs, cut(old_logprobs), cut(advantages), cut(mask), player.clip, n_tokens)
            loss_v = value_loss(new_values, cut(values), cut(returns), cut(mask), player.value_clip, n_tokens)
            loss_h = -(new_entropy * cut(mask)).sum() / n_tokens  # Eq. (3.7): mu also maximises its entropy
            (N * (loss_p + player.value_coef * loss_v + player.entropy_coef * loss_h)).backward()
            micro_stats = step_metrics(player, new_logprobs, cut(old_logprobs), new_values, cut(values), cut(mask), loss_p, loss_v, n_tokens)
            if not stats and 0 < (off := (new_logprobs.detach() - cut(old_logprobs)).abs().max()) < math.inf:  # else `optimizer_step` sees it
                raise RuntimeError(f"{player.name}: the PPO ratio must be exactly 1 before the first step; the training forward differs "
                                   f"from the scoring forward by up to {off:.2e}")
            step_stats = step_stats + micro_stats
        stats.append(all_sum(step_stats))  # now the same in all processes, and so is what is decided by it
        # KL early stop, the rule of Spinning Up and Stable-Baselines3: a step before which k3 exceeds 1.5 target_kl is not taken, nor any after it.
        early_stop = bool(0 < 1.5 * player.target_kl < stats[-1][0])
        if early_stop:
            player.optimizer.zero_grad(set_to_none=True)
            break
        optimizer_step(player, stats[-1])

    names = ("policy/approxkl", "policy/clipfrac", "policy/ratio", "val/clipfrac", "loss/policy", "loss/value")
    metrics = dict(zip(names, torch.stack(stats).mean(0).tolist())) if stats else {}
    metrics["objective/kl"] = ((old_logprobs - ref_logprobs) * mask).sum(1)[:B].mean().item()  # nats per response
    metrics["objective/entropy"] = masked_mean(entropy, mask).item()  # nats per token
    metrics["objective/scores"] = scores.mean().item()
    metrics["response_length"] = mask.sum(1)[:B].float().mean().item()
    metrics |= {"skipped_steps": player.skipped_steps, "policy/early_stop": float(early_stop)}
    return {f"{player.name}/{name}": value for name, value in metrics.items() if math.isfinite(value)}


def split_rows(rows, size):
    return list(rows.split(size)) if size else [rows]


@torch.no_grad()
def forward_rows(policy, rollout, groups, with_values=True):
    """`logprobs_and_values` of a whole rollout, computed group of rows by group of rows (of this process's share)."""
    outputs = [torch.zeros(rollout.tokens.shape, device=policy.device) for _ in range(3)]
    with policy.autocast():  # around all groups, so that it casts the weights once
        for rows in groups:
            part = rollout.select(rows)
            for all_rows, piece in zip(outputs, logprobs_and_values(policy, part, with_values=with_values)):
                if piece is not None:
                    all_rows[rows, :piece.shape[1]] = piece
    return [all_sum(x) for x in outputs]  # the others' rows are zero here


@torch.no_grad()
def step_metrics(player, logprobs, old_logprobs, values, old_values, mask, loss_p, loss_v, n_tokens):
    """This micro-batch's share of a step's metrics: approxkl, clipfrac, ratio, value clipfrac, two losses."""
    difference = (logprobs - old_logprobs) * mask
    ratio = difference.exp()
    share = lambda x: (x * mask).sum() / n_tokens
    return torch.stack([share(ratio - 1 - difference), share((ratio - 1).abs() > player.clip), share(ratio),  # approxkl is k3
                        share((values - old_values).abs() > player.value_clip), loss_p, loss_v])


def optimizer_step(player, losses=torch.zeros(1)):
    """Clip and step; a gradient that is not finite, or whose losses are not, is thrown away."""
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in player.policy.parameters() if p.grad is not None]))
    if bad := not_finite(gradient=norm, losses=losses):
        skip(player, bad)
    else:
        player.optimizer.grad_scale = (norm / player.max_grad_norm).clamp(min=1)  # fused AdamW divides by it in its own pass over the gradient
        player.optimizer.step()
        player.skipped_in_a_row = 0
    player.optimizer.zero_grad(set_to_none=True)


def sft(policy, pairs, steps, batch_size, learning_rate, seed, bar=None, micro_batch=0):
    """Supervised fine-tuning on (prompt, response) pairs; one-cycle learning rate. Returns the last loss."""
    optimizer = torch.optim.AdamW(policy.lm.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, max(2, steps + (steps == 10)), pct_start=0.1)  # of 10 it divides by 0.1 * 10 - 1
    rng = np.random.default_rng(seed)
    demos, loss = with_idle_row(demonstrations(policy, pairs)), torch.tensor(float("nan"))
    trained = data_parallel(policy, find_unused_parameters=True)  # the critic
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(len(pairs), size=batch_size)).to(policy.device)
        n_tokens, loss, groups = demos.response_mask[rows].sum(), 0, split_rows(share(rows, len(pairs)), micro_batch)
        for i, some in enumerate(groups):
            part, module = demos.select(some), trained if i + 1 == len(groups) else policy
            some_loss = supervised_loss(module, part) * (part.response_mask.sum() / n_tokens)
            (world_size() * some_loss).backward()
            loss = loss + some_loss.detach()
        loss = all_sum(loss)
        norm = torch.nn.utils.clip_grad_norm_(policy.lm.parameters(), 1.0)
        if bad := not_finite(gradient=whole(norm)):
            raise NotFinite(f"supervised training stopped at step {step + 1}: its {bad} not finite; lower the learning rate or look at the model's weights")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if bar is not None:
            bar.update(1)
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def distill(speaker, student, prompts, steps, batch_size, learning_rate, seed, bar=None):
    """Train `student`, a frozen copy, to say to `prompts` what `speaker` (a mixture of policies) says: one policy for many."""
    for p in (adapter(student.lm) or dict(student.named_parameters())).values():
        p.requires_grad_(True)
    return sft(student, list(zip(prompts, speaker.speak(prompts, seed).texts)), steps, batch_size, learning_rate, seed, bar)


def naturalness(policy, rollout):
    """(B, 2): mean and least log-prob of each response's tokens under a frozen policy, in nats."""
    mask = rollout.response_mask
    B, rollout = len(rollout), replace(rollout, support=None)  # under the whole distribution, whatever filter it was sampled with
    logprobs = forward_rows(policy, with_idle_row(rollout), share(torch.arange(B), B).split(256), with_values=False)[0][:B]
    return torch.stack([(logprobs * mask).sum(1) / mask.sum(1), logprobs.masked_fill(~mask, 0).amin(1)], 1).cpu()


# --- memory -----------------------------------------------------------------------------------------------------
def player_memory(parameters, body, matrices, sides, layers, width, kv_width, vocabulary, rows, prompt_tokens, new_tokens, sampled_rows=256,
                  bf16=False, lora=0, separate_critic=False, references=1, checkpointing=False, device="cpu", ranks=1):
    """Bytes that one player takes, {what: bytes}, from numbers alone (`model_size` gives the first eight).

    Exact: parameters (4 bytes a weight; 2 in LoRA's frozen matrices in bf16), optimizer (AdamW: 8 a trained weight), reference (4 a
    weight that is the policy's own), gradients (4). They are divided among `ranks`. Estimates: activations = tokens of
    `rows` longest rows x (input + output of every matrix, `sides` numbers) x 4 bytes (2.5 in bf16: the residual stream stays
    fp32), with `checkpointing` a block's input for each block and one block's activations; probabilities and two chunks of logits
    (kernel.py). bf16 copies = 2 a weight that is not kept in bf16.
    Sampling, `sampled_rows` at a time = KV cache, one block's activations of the prompts, three times the next logits.
    """
    size, bodies, thin = 2 if bf16 else 4, 1 + separate_critic, lora * sides
    trained = (bodies * thin if lora else parameters + separate_critic * body) + width + 1  # the last two: the value head
    frozen = matrices * size + (parameters - matrices) * 4 if lora else 0
    token = sides * (2.5 if bf16 else 4)
    token = 4 * layers * width + token / layers if checkpointing else token
    logits, length = rows * new_tokens * vocabulary, prompt_tokens + new_tokens
    kept = 0 if device == "cuda" else min(logits * size, KEEP_BYTES)
    return {"parameters": (4 * trained + frozen) / ranks, "optimizer": 8 * trained / ranks, "reference": references * 4 * ((thin or parameters) + width + 1) / ranks,
            "gradients": 4 * trained / ranks, "activations": bodies * rows * length * token + kept + 2 * min(4 * logits, CHUNK_BYTES[device]),
            "bf16 copies": bf16 * 2 * (parameters - matrices + thin if lora else parameters),
            "sampling": sampled_rows * (length * 2 * layers * kv_width * size + prompt_tokens * sides / layers * size + 3 * 4 * vocabulary)}


def memory_plan(players, others):
    """(the plan as a table in MiB, bytes at the largest moment: what all hold, and one player that updates or samples).
    players: {name: `player_memory`}; others: {what: bytes}."""
    each = list(players.values())
    held = sum(others.values()) + sum(p["parameters"] + p["optimizer"] + p["reference"] for p in each)
    most = held + max(p["bf16 copies"] + max(p["gradients"] + p["activations"], p["sampling"]) for p in each)
    rows = [(what, *(p[what] for p in each)) for what in each[0]] + list(others.items()) + [("largest moment", most)]
    lines = [f"{what:<18}" + "".join(f"{n / 2**20:12.1f}" for n in numbers) for what, *numbers in rows]
    return "\n".join(["memory plan, MiB  " + "".join(f"{name:>12}" for name in players), *lines]), most


def peak_memory(device):
    """Most bytes that this process has held at a time: of the GPU's memory or, on a CPU, of main memory (0 on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux; its getrusage would count the parent before the fork
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


# --- the game -------------------------------------------------------------------------------------------------
@dataclass
class Game:
    """A batch of exchanges: seed -> attack -> response -> P(safe)."""

    seeds: list
    attacks: Rollout | None  # None: the prompts were given, nobody wrote them
    prompts: list
    responses: Rollout
    p_safe: np.ndarray  # (B,)
    score_seconds: float  # how long the judge took
    sampled: tuple  # (attacks, responses) as they were sampled: an exchange that the judge did not decide is in these alone


def play(attacker, defender, seeds, judge, seed, template="{}"):
    """The attacker rewrites each seed (put into `template`), the defender answers, the judge scores.

    attacker and defender are anything that can `speak`: a Player or a PolicyAverage. With attacker None the
    seeds themselves are the prompts. The players meet in text: each reads with its own tokenizer.
    """
    attacks = attacker.speak([template.format(s) for s in seeds], 2 * seed) if attacker else None
    prompts = attacks.texts if attacks else list(seeds)
    responses = defender.speak(prompts, 2 * seed + 1)
    clock = time.time()
    p_safe = call_judge(judge, prompts, responses.texts)
    game = Game(list(seeds), attacks, prompts, responses, p_safe, time.time() - clock, (attacks, responses))
    return game if (rows := decided(p_safe)).all() else select(game, np.flatnonzero(rows))


def select(game, rows):
    """The given rows of a game: seeds, prompts, rollouts and verdicts stay together."""
    pick = lambda items: [items[i] for i in rows]
    cut = lambda rollout: rollout and rollout.select(torch.from_numpy(rows).to(rollout.tokens.device))
    return replace(game, seeds=pick(game.seeds), attacks=cut(game.attacks), prompts=pick(game.prompts), responses=cut(game.responses), p_safe=game.p_safe[rows])


def evaluate(attacker, defender, seeds, test_prompts, benign_prompts, judge, held_out_judge, refused, helpful=None,
             embedder=None, third_party=None, template="{}"):
    """The row of numbers that is written before and after training. The defender answers greedily.

    Attack success rates on `test_prompts` by both judges; over-refusal and (where it can be told)
    helpfulness on `benign_prompts`; the attacker's success, by the held-out judge, against `third_party`
    (the defender of the start), and how alike its prompts are.
    """
    answers = defender.speak(test_prompts, 0, temperature=0).texts
    benign = defender.speak(benign_prompts, 0, temperature=0).texts if benign_prompts else []
    attacks = attacker.speak([template.format(s) for s in seeds], 0).texts if attacker else list(seeds)
    broken = call_judge(held_out_judge, attacks, (third_party or defender).speak(attacks, 0, temperature=0).texts)
    held_out, trained = (call_judge(j, test_prompts, answers) for j in (held_out_judge, judge))
    alike = set_similarity(attacks, embedder)
    return {
        "asr_held_out_judge": unsafe_share(held_out), "asr_train_judge": unsafe_share(trained),
        "over_refusal": float(np.mean(refused(benign))) if benign else None,
        "helpfulness": float(np.mean(helpful(benign_prompts, benign))) if helpful and benign else None,
        "attacker_success": unsafe_share(broken), **alike, "undecided": int(np.isnan(np.concatenate([broken, held_out, trained])).sum())}


# --- training health ----------------------------------------------------------------------------------------------
# Bounds that a healthy round keeps clear of: those of `python train.py --rounds 6` ended with .42 different attacks at least, .20 nats at least,
# mean lengths of 9.3 to 19.4, .08 refused at most, and judges that had parted by .02 at most.
LEAST_DIFFERENT = 0.2  # share of different prompts among the attacks of a step
LEAST_ENTROPY = 0.05  # nats per token: 19 of 20 tokens are as good as certain
LENGTHS = 1.5, 0.95  # mean response: fewest tokens, EOS included; greatest share of the longest that is allowed
MOST_REFUSED = 0.5  # share of the harmless prompts
MOST_APART = 0.15  # how much the judges' verdicts may part since before the game
OPPOSITE = 0.05  # or by how much each may change, the one for the better and the other for the worse


def alarms(metrics, before, limits):
    """What is wrong with a round: [("collapse" | "reward_hacking", message with a remedy)], empty for a healthy one.

    metrics: those of each player's last step in the round and of the round's evaluation, by their names in metrics.jsonl; one that is missing
    raises no alarm. before: the row of `evaluate` before the game. limits: {player: its max_new_tokens}."""
    found, m = [], metrics
    if m.get("diversity/different", 1) < LEAST_DIFFERENT:
        found.append(("collapse", f"only {m['diversity/different']:.0%} of the attacks differ; raise --diversity or --attacker_kl_coef, or set --restart"))
    for name, limit in limits.items():
        entropy, length = m.get(f"{name}/objective/entropy", 1), m.get(f"{name}/response_length", limit / 2)
        if entropy < LEAST_ENTROPY:
            found.append(("collapse", f"the {name} hardly chooses any more ({entropy:.3f} nats per token); raise its KL penalty or lower its learning rate"))
        if limit > 4 and not LENGTHS[0] < length < LENGTHS[1] * limit:
            found.append(("collapse", f"the {name} says {length:.1f} tokens of at most {limit}; raise its KL penalty, or the limit if it is cut off"))
    if m.get("game/over_refusal", 0) > MOST_REFUSED:
        found.append(("collapse", f"the defender refuses {m['game/over_refusal']:.0%} of the harmless prompts; raise --ptx_coef (with --sft_data) or --kl_coef"))
    trained, held_out = (m.get(f"game/{key}", before[key]) - before[key] for key in ("asr_train_judge", "asr_held_out_judge"))
    if abs(trained - held_out) > MOST_APART or trained < -OPPOSITE and held_out > OPPOSITE:
        found.append(("reward_hacking", f"since the start attack success has changed by {trained:+.2f} for the training judge, by {held_out:+.2f} for the held-out "
                      "one; read the exchanges (eval.py report), train the judge on them (reward.py), or raise --kl_coef"))
    return found


# --- averages of policies ---------------------------------------------------------------------------------------
class PolicyAverage:
    """The average policy of Theorem 3.2, in two forms.

    kind "mixture": the uniform mixture over all policies added so far; one member is drawn for each episode.
    At most `capacity` of them are kept, a uniform sample of all (reservoir sampling, Vitter 1985).
    kind "weights": one policy whose weights are the mean of theirs: cheap, and an approximation only.
    kind "distill": holds one policy, trained elsewhere on the mixture's samples (see `distill`).
    Members are language-model weights without critics, kept on the CPU (of the first process, if there are several); with LoRA adapters only (whose mean is not
    the mean of their products: one approximation more).
    """

    def __init__(self, kind="mixture", capacity=16, seed=0):
        if kind not in ("mixture", "weights", "distill") or capacity < 1:
            raise ValueError(f"PolicyAverage needs kind 'mixture', 'weights' or 'distill' and capacity >= 1, got {kind!r} and {capacity}")
        self.kind, self.capacity, self.seed = kind, capacity if kind == "mixture" else 1, seed
        self.members, self.count = [], 0  # list of {name: tensor}; how many policies were added

    def add(self, policy):
        weights = policy.lm.state_dict()
        thin = {k: v for k, v in weights.items() if ".lora_" in k}
        self.add_weights({k: v.clone() for k, v in on_first(thin or weights).items()})

    def add_weights(self, weights):
        """weights: {name: tensor} of one policy's language model, the average's from now on."""
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

    def policy(self, like, member=0):
        """A frozen policy with a member's weights; `like` gives architecture and tokenizer."""
        twin = frozen_copy(like)
        load_whole(adapter(twin.lm) or twin.lm.state_dict(), self.members[member])
        return twin

    def speaker(self, player):
        """Something that speaks like this average: (prompts, seed, temperature) -> Rollout."""
        return Speaker(Members(self, player.policy), player)

    def state_dict(self):
        return {f"{i}.{k}": v for i, member in enumerate(self.members) for k, v in member.items()}, {"count": self.count}

    def load_state_dict(self, tensors, numbers):
        members = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            members.setdefault(int(index), {})[name] = tensor
        self.members, self.count = [{} if rank() else members[i] for i in sorted(members)], numbers["count"]


class Members:
    """The policies of an average, each made when it is asked for: one at a time is in memory."""

    def __init__(self, average, like):
        self.average, self.like = average, like

    def __len__(self):
        return len(self.average.members)

    def __getitem__(self, i):
        return self.average.policy(self.like, i)


@dataclass
class Speaker:
    """Several frozen policies that speak as one: each episode is given to one of them, drawn uniformly."""

    policies: list | Members
    player: Player

    def speak(self, prompts, seed, temperature=None):
        drawn = np.random.default_rng(seed).integers(len(self.policies), size=len(prompts))
        texts, prompt_ids, response_ids = [""] * len(prompts), [[]] * len(prompts), [[]] * len(prompts)
        for member in np.unique(drawn):
            rows = np.flatnonzero(drawn == member)
            one = copy.copy(self.player)
            one.policy = self.policies[member]
            rollout = one.speak([prompts[i] for i in rows], seed, temperature)
            for i, text, tokens, start, end in zip(rows, rollout.texts, rollout.tokens.tolist(), rollout.prompt_lengths, rollout.lengths):
                texts[i], prompt_ids[i], response_ids[i] = text, tokens[:start], tokens[start:end]
        return pack(self.player.policy, prompts, texts, prompt_ids, response_ids, self.player.temperature)


# --- the theory on tables: Algorithms 2 and 3 --------------------------------------------------------------------
def solve_matrix_game(payoff, rounds, entropy=0.0, blind=False):
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
    beta, eta = np.sqrt(rounds / (8 * np.log(Y))), np.sqrt(rounds / (8 * np.log(X)))
    log_pi, log_mu = np.zeros((X, Y)), np.zeros(X)
    sum_pi, sum_mu = np.zeros((X, Y)), np.zeros(X)
    for _ in range(rounds):
        pi, mu = _softmax(log_pi), _softmax(log_mu)
        sum_pi, sum_mu = sum_pi + pi, sum_mu + mu
        V = (pi * R).sum(1)  # V_pi(x) = E_{y ~ pi(.|x)} R(x, y)
        log_pi = log_pi + (mu @ R if blind else R) / beta
        log_mu = (eta * log_mu - V) / (eta + entropy)  # entropy 0: log_mu - V / eta
    return sum_pi / rounds, sum_mu / rounds, pi, mu


def nash_gap(payoff, defender, attacker, entropy=0.0, blind=False):
    """Eq. (3.6): NEGap(pi, mu) = max_pi' J(pi', mu) - min_mu' J(pi, mu'), J = E[R] - eta_H H(mu) (Eq. 3.7).

    payoff (X, Y), defender (X, Y) rows sum to 1, attacker (X,) sums to 1. blind: pi' too is one for all x.
    """
    R, pi, mu = (np.asarray(a, dtype=np.float64) for a in (payoff, defender, attacker))
    best_defence = (mu @ R).max() if blind else (mu * R.max(1)).sum()
    V = (pi * R).sum(1)
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
