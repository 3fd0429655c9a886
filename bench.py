"""Side-by-side speed: every row is a ratio against a peer on the same work in the same run.

    python bench.py logprob     the chunked log-prob against eager log_softmax + gather (time and peak memory)
    python bench.py sample      our sampler against transformers' `generate`
    python bench.py ppo         a whole PPO update (sample, score, update) against plain PyTorch with `generate`
    python bench.py ppo --trl_python PYTHON     ... and against TRL's PPOTrainer, in an interpreter with trl==0.23.1
    python bench.py diversity   SelfBLEU of 64 new prompts against a history of 1,000 to 64,000, and nltk, fast_bleu
    python bench.py game        seconds of a PPO step of the embedded game, by part
    python bench.py all --json FILE     everything, also as JSON lines

Ours and the peer take turns, `--repeats` times; the figures are medians, the ratio is the median of the
ratios of neighbours. Random weights: speed does not depend on them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from diversity import Diversity, word_embedder
from gpo import Player, gae, policy_loss, ppo_update, token_rewards, value_loss, whiten
from kernel import linear_logprob, linear_logprob_reference
from model import DTYPE_NAMES, Policy, best_dtype, generate

SIZES = {"4x128": dict(vocab_size=512, n_embd=128, n_layer=4, n_head=4), "gpt2": dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12)}


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name, ours, peer_name, peer, repeats):
    """Run both in turns; returns a row. ours and peer are functions without arguments."""
    ours(), peer()  # warm up
    seconds = []
    for i in range(repeats):
        pair = {}
        for which in ("ours", "peer") if i % 2 == 0 else ("peer", "ours"):
            pair[which] = timed(ours if which == "ours" else peer)
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


def make_policy(size, critic="shared", dtype=torch.float32):
    """A GPT-2 of random weights whose EOS is never sampled, so that all rows have the same length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    V = SIZES[size]["vocab_size"]
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"w{V - 1}", chat_template="{{ messages[0]['content'] }}")
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(**SIZES[size], n_positions=1024, bos_token_id=V - 1, eos_token_id=V - 1))
    policy = Policy(lm, tokenizer, critic, dtype)
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


def bench_ppo(repeats, trl_python=None):
    """Sample, score with a reward model of the policy's size, and update: 2 epochs x 4 minibatches."""
    rows, dtype = [], best_dtype("cpu")
    for size, batch in (("4x128", 64), ("gpt2", 16)):
        reward_model, scores = make_policy(size), torch.rand(batch, generator=torch.Generator().manual_seed(0))

        def update(player, prompts):
            rollout = player.speak(prompts, 1)
            with torch.no_grad(), player.policy.autocast():
                reward_model.hidden(rollout.tokens)  # what a reward model costs; its random values do not matter
            ppo_update(player, rollout, scores, 1)

        player = lambda **kwargs: Player("defender", make_policy(size, **kwargs), 32, minibatches=4, missing_eos_penalty=0.0)
        ours = {"separate critic": player(critic="separate", dtype=dtype), "shared critic": player(dtype=dtype), "fp32, shared critic": player()}
        prompts = make_prompts(reward_model, batch)
        name = f"ppo update {batch} x (16 + 32), {size}, 2 epochs x 4"
        if trl_python:
            with Trl(trl_python, size, batch) as peer:
                rows += [compare(f"{name}, {which}, {DTYPE_NAMES[dtype]}", lambda: update(ours[which], prompts), f"TRL {peer.version} PPOTrainer, {peer.dtype}", peer.update, repeats)
                         for which in ("separate critic", "shared critic")]
        plain = player()
        rows.append(compare(f"{name}, fp32, shared critic", lambda: update(ours["fp32, shared critic"], prompts), "plain PyTorch + generate",
                            lambda: plain_ppo(plain, reward_model, prompts, scores), repeats))
    return rows


class Trl:
    """TRL's PPOTrainer in another interpreter, which does one update whenever it is asked for one."""

    def __init__(self, python, size, batch):
        work = json.dumps({"config": SIZES[size], "batch": batch, "prompt": 16, "new": 32, "threads": torch.get_num_threads()})
        self.process = subprocess.Popen([python, "-c", TRL_PROGRAM, work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env={**os.environ, "HF_HUB_OFFLINE": "1"})
        self.version, self.dtype = self.answer()

    def answer(self):
        said = "it ended"
        for line in self.process.stdout:
            if line.startswith("TRL "):
                return line.split()[1:]
            said = line.strip() or said
        raise ValueError(f"--trl_python must be an interpreter in which trl==0.23.1 can train, got: {said}")

    def update(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()


TRL_PROGRAM = """
import json, sys, tempfile
import torch, trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import PPOConfig, PPOTrainer

work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
V, batch = work["config"]["vocab_size"], work["batch"]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0")), eos_token=f"w{V - 1}", pad_token="w0")
config = GPT2Config(**work["config"], n_positions=1024, bos_token_id=V - 1, eos_token_id=V - 1, pad_token_id=0, num_labels=1)
policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
value, reward = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
rows = Dataset.from_dict({"input_ids": torch.randint(1, 500, (batch * 4, work["prompt"])).tolist()})
settings = PPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch // 4, num_mini_batches=4, num_ppo_epochs=2, gradient_accumulation_steps=1,
                     local_rollout_forward_batch_size=batch, response_length=work["new"], temperature=1.0, total_episodes=batch * 10_000, num_sample_generations=0,
                     gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
trainer = PPOTrainer(args=settings, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value, train_dataset=rows,
                     eval_dataset=rows, data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])})

def wait(*_, **__):
    print("\\nTRL", trl.__version__, "bf16" if settings.bf16 else "fp32", flush=True)
    if not sys.stdin.readline():
        sys.exit()

trainer.log = wait  # it is called once an update
wait()
trainer.train()
"""


def plain_ppo(player, reward_model, prompts, scores):
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
        reward_model.hidden(tokens)
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


def bench_diversity(repeats):
    """R_div of 64 new prompts: against nltk and fast_bleu where they are importable, and how it grows with the history."""
    rng, words = np.random.default_rng(0), [f"w{i}" for i in range(500)]
    write = lambda n: [" ".join(rng.choice(words, size=12)) for _ in range(n)]
    new, histories = write(64), {n: Diversity(embedder=word_embedder) for n in (1000, 64_000)}
    for n, history in histories.items():
        history.add(write(n))
    rows = [compare("diversity of 64 prompts, history 64,000", lambda: histories[64_000].score(new), "the same, history 1,000", lambda: histories[1000].score(new), repeats)]
    references, few = [text.split() for text in histories[1000].history], [text.split() for text in new[:8]]
    table = histories[1000].table  # scores one text at a time, as the peers do
    peers = {}
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        smooth = SmoothingFunction().method1
        peers["nltk sentence_bleu"] = lambda: [sentence_bleu(references, text, [1 / n] * n, smooth) for text in few for n in (2, 3, 4, 5)]
    except ImportError:
        pass
    try:
        from fast_bleu import BLEU
        peers["fast_bleu"] = lambda: BLEU(references, {n: [1 / n] * n for n in (2, 3, 4, 5)}).get_score(few)
    except ImportError:
        pass
    return rows + [compare("SelfBLEU-2..5 of 8 prompts, history 1,000", lambda: [table.bleu(text) for text in new[:8]], name, peer, repeats) for name, peer in peers.items()]


def bench_game(repeats):
    """Seconds of a PPO step of the embedded game by part, from the log of a short run of train.py, and how near its
    update comes to the processor's own matrix product (a product of 1024 x 1024 matrices in the same run)."""
    a, b = torch.randn(2, 1024, 1024)
    limit = 2 * 1024**3 / statistics.median(timed(lambda: a @ b) for _ in range(20))  # FLOP/s
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(Path(__file__).parent / "train.py"), "--sft_steps", "50", "--judge_steps", "50", "--rounds", str(repeats), "--eval_prompts", "60", "--average", "none",
                        "--out", f"{folder}/run"], check=True, capture_output=True)
        log = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    rows = []
    for role in ("attacker", "defender"):
        steps = [m for m in log if m["role"] == role][1:]
        part = {name: statistics.median(m[f"time/{name}"] for m in steps) for name in ("rollout", "score", "update")}
        tokens = statistics.median(m[f"{role}/response_length"] for m in steps) * 96 + 96 * 20  # response and prompt
        flop = 2 * 150_000 * tokens * (2 * 3 + 2)  # weights of the three layers: two epochs forward and backward, two scoring forwards
        rows.append({"bench": f"game, one step of the {role}", "ours_s": sum(part.values()), "parts": part, "share_of_gemm": flop / part["update"] / limit})
    return rows


def print_table(rows):
    print("| what | peer | ours | peer's | times faster | memory, ours / peer's |\n|---|---|---:|---:|---:|---:|")
    for r in rows:
        if "parts" in r:
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in r["parts"].items())
            print(f"| {r['bench']}: {parts} s; update at {r['share_of_gemm']:.0%} of the matrix product | - | {r['ours_s']:.3f} s | - | - | - |")
            continue
        memory = f"{r['ours_mib']:.0f} / {r['peer_mib']:.0f} MiB" if "ours_mib" in r else "-"
        print(f"| {r['bench']} | {r['peer']} | {r['ours_s']:.3f} s | {r['peer_s']:.3f} s | {r['times_faster']:.2f} | {memory} |")


def main(argv):
    transformers.utils.logging.set_verbosity_error()
    benches = {"logprob": bench_logprob, "sample": bench_sample, "ppo": bench_ppo, "diversity": bench_diversity, "game": bench_game}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=[*benches, "all"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trl_python", "--trl-python", help="an interpreter with trl==0.23.1, for the peer of `ppo`")
    parser.add_argument("--json", help="append each row to this file as a JSON line")
    parser.error = lambda message: (print(f"error: {message}", file=sys.stderr), sys.exit(2))
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    more = {"ppo": {"trl_python": args.trl_python}}
    try:
        rows = [row for name, bench in benches.items() if args.what in (name, "all") for row in bench(args.repeats, **more.get(name, {}))]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print_table(rows)
    if args.json:
        with open(args.json, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
