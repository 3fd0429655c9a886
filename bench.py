"""Side-by-side speed: every row is a ratio against a peer on the same work in the same run.

    python bench.py logprob     the chunked log-prob against eager log_softmax + gather (time and peak memory)
    python bench.py sample      our sampler against transformers' `generate`
    python bench.py ppo         a whole PPO update (sample, score, update) against plain PyTorch with `generate`
    python bench.py all --json FILE     everything, also as JSON lines

Ours and the peer take turns, `--repeats` times; the figures are medians, the ratio is the median of the
ratios of neighbours. Random weights: speed does not depend on them.
"""

import argparse
import json
import statistics
import sys
import threading
import time

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gpo import Player, gae, policy_loss, ppo_update, token_rewards, value_loss, whiten
from kernel import linear_logprob, linear_logprob_reference
from model import Policy, generate

SIZES = {"4x128": dict(vocab_size=512, n_embd=128, n_layer=4, n_head=4), "gpt2": dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12)}


def compare(name, ours, peer_name, peer, repeats):
    """Run both in turns; returns a row. ours and peer are functions without arguments."""
    ours(), peer()  # warm up
    seconds = []
    for i in range(repeats):
        pair = {}
        for which in ("ours", "peer") if i % 2 == 0 else ("peer", "ours"):
            start = time.perf_counter()
            (ours if which == "ours" else peer)()
            pair[which] = time.perf_counter() - start
        seconds.append(pair)
    return {"bench": name, "peer": peer_name, "ours_s": statistics.median(s["ours"] for s in seconds), "peer_s": statistics.median(s["peer"] for s in seconds),
            "times_faster": statistics.median(s["peer"] / s["ours"] for s in seconds), "repeats": repeats, "threads": torch.get_num_threads()}


def extra_memory(work):
    """Peak resident memory that `work` adds, in MiB, sampled every millisecond."""
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
    start, peak, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(0.0, peak[0] - start)


# --- the three benches -----------------------------------------------------------------------------------
def bench_logprob(repeats):
    """Forward and backward of the log-prob of N hidden states under a 50257-word head of width 768."""
    rows = []
    for N in (512, 2048):
        hidden = torch.randn(N, 768, requires_grad=True)
        weight = (torch.randn(50257, 768) * 0.02).requires_grad_()
        targets = torch.randint(50257, (N,))

        def step(function):
            hidden.grad = weight.grad = None
            function(hidden, weight, targets)[0].sum().backward()

        def eager(hidden, weight, targets):
            return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0], None

        row = compare(f"logprob N={N} D=768 V=50257 fp32", lambda: step(linear_logprob), "eager log_softmax + gather", lambda: step(eager), repeats)
        weight_gradient = weight.numel() * 4 / 2**20  # both must hold it; extra memory is what comes on top
        for which, function in (("ours_mib", linear_logprob), ("peer_mib", eager)):
            hidden.grad = weight.grad = None  # so that the new gradient is counted, and can be taken off
            row[which] = extra_memory(lambda: step(function)) - weight_gradient
        worst = max((a - b).abs().max().item() for a, b in zip(linear_logprob(hidden, weight, targets), linear_logprob_reference(hidden, weight, targets)))
        rows.append(row | {"largest_difference": worst})
    return rows


def make_policy(size):
    """A GPT-2 of random weights whose EOS is never sampled, so that all rows have the same length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    V = SIZES[size]["vocab_size"]
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"w{V - 1}", chat_template="{{ messages[0]['content'] }}")
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(**SIZES[size], n_positions=1024, bos_token_id=V - 1, eos_token_id=V - 1))
    policy = Policy(lm, tokenizer)
    policy.eos_ids = [V - 1]
    return policy


def make_prompts(policy, batch, length=16):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(1, 500, size=length)) for _ in range(batch)]


@torch.no_grad()
def hf_generate(policy, prompts, new_tokens):
    """transformers' own sampler on the same prompts, at temperature 1 without filters."""
    ids = torch.tensor(policy.encode(prompts))
    with policy.autocast():
        return policy.lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
                                  min_new_tokens=new_tokens, pad_token_id=policy.eos_ids[0])


def bench_sample(repeats):
    rows = []
    for size, batch in (("4x128", 64), ("gpt2", 16)):
        policy = make_policy(size)
        prompts = make_prompts(policy, batch)
        rows.append(compare(f"sample {batch} x (16 + 32), {size}", lambda: generate(policy, prompts, 32, seed=1), "transformers generate",
                            lambda: hf_generate(policy, prompts, 32), repeats))
    return rows


def bench_ppo(repeats):
    rows = []
    for size, batch in (("4x128", 64), ("gpt2", 16)):
        player = Player("defender", make_policy(size), 32, minibatches=4, missing_eos_penalty=0.0)
        plain = Player("defender", make_policy(size), 32, minibatches=4, missing_eos_penalty=0.0)
        prompts = make_prompts(player.policy, batch)
        scores = torch.rand(batch, generator=torch.Generator().manual_seed(0))
        ours = lambda: ppo_update(player, player.speak(prompts, 1), scores, 1)
        rows.append(compare(f"ppo update {batch} x (16 + 32), {size}, 2 epochs x 4", ours, "plain PyTorch + generate", lambda: plain_ppo(plain, prompts, scores), repeats))
    return rows


def plain_ppo(player, prompts, scores):
    """The same update as straightforward PyTorch: `generate`, whole logits, eager log_softmax, same losses."""
    policy, P, R = player.policy, 16, 32
    tokens = hf_generate(policy, prompts, R)  # (B, P + R)
    mask = torch.zeros(tokens.shape)
    mask[:, P:] = 1

    def forward(model, tokens):
        out = model.lm(tokens, output_hidden_states=True)
        logp = out.logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]  # (B, P + R - 1)
        values = model.value_head(out.hidden_states[-1])[:, :-1, 0]
        pad = torch.zeros(len(tokens), 1)
        return torch.cat([pad, logp], 1) * mask[:len(tokens)], torch.cat([pad, values], 1) * mask[:len(tokens)]

    with torch.no_grad():
        old_logprobs, old_values = forward(policy, tokens)
        ref_logprobs, _ = forward(player.reference, tokens)
    rewards = token_rewards(scores, old_logprobs, ref_logprobs, mask, player.kl_coef)
    advantages, returns = gae(rewards, old_values, mask, player.gamma, player.lam)
    advantages = whiten(advantages, mask)
    for _ in range(player.epochs):
        for rows in torch.randperm(len(prompts)).chunk(player.minibatches):
            logprobs, values = forward(policy, tokens[rows])
            n = mask[rows].sum()
            loss = policy_loss(logprobs, old_logprobs[rows], advantages[rows], mask[rows], player.clip, n)
            loss = loss + player.value_coef * value_loss(values, old_values[rows], returns[rows], mask[rows], player.value_clip, n)
            player.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), player.max_grad_norm)
            player.optimizer.step()


def print_table(rows):
    print("| what | peer | ours | peer's | times faster | memory, ours / peer's |\n|---|---|---:|---:|---:|---:|")
    for r in rows:
        memory = f"{r['ours_mib']:.0f} / {r['peer_mib']:.0f} MiB" if "ours_mib" in r else "-"
        print(f"| {r['bench']} | {r['peer']} | {r['ours_s']:.3f} s | {r['peer_s']:.3f} s | {r['times_faster']:.2f} | {memory} |")


def main(argv):
    transformers.utils.logging.set_verbosity_error()
    benches = {"logprob": bench_logprob, "sample": bench_sample, "ppo": bench_ppo}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=[*benches, "all"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="append each row to this file as a JSON line")
    parser.error = lambda message: (print(f"error: {message}", file=sys.stderr), sys.exit(2))
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    rows = [row for name, bench in benches.items() if args.what in (name, "all") for row in bench(args.repeats)]
    print_table(rows)
    if args.json:
        with open(args.json, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
