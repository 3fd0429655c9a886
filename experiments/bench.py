"""Speed comparisons: every row is a ratio against a peer on the same work in the same run.

    python -m experiments.bench [all]     the rows of docs/speed.md:
        logprob      our log-prob against eager, PyTorch's two cross entropies and, where installed, TRL's (>= 1.16),
                     Liger and Cut Cross-Entropy (on a GPU): time and peak memory
        sample       our sampler against transformers' `generate`
        ppo          a whole PPO update (sample, score, update) against plain PyTorch with `generate` and, with
                     --trl_python PYTHON, an interpreter with trl==0.23.1, against TRL's PPOTrainer
        diversity    R_div against histories of 1,000 and of 64,000 attacks, and SelfBLEU against nltk
    python -m experiments.bench profile   where the time of our PPO update goes (torch.profiler)

Ours and the peer take turns, `--repeats` times. Times are medians; the ratio is the median of the ratios of adjacent
turns. Weights and texts are random: speed does not depend on them.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from diversity import ORDERS, Diversity, word_embedder
from eval import DEVICE, run_program
from gpo import Player, gae, policy_loss, ppo_update, token_rewards, value_loss, whiten
from harness.data import as_a_program, fail
from harness.parallel import peak_memory
from harness.report import markdown
from kernel import linear_logprob
from model import DTYPE_NAMES, DTYPES, Policy, best_dtype, generate

PROMPT = 16  # prompt tokens in `sample` and `ppo`
NEW = 32  # response tokens
SIZES = {"4x128": dict(model_type="gpt2", vocab_size=512, n_embd=128, n_layer=4, n_head=4),
         "gpt2": dict(model_type="gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12),
         "smollm2": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)}
PPO_BATCHES = {"4x128": 64, "gpt2": 16, "smollm2": 16}  # exchanges of `ppo` and `profile`
SHAPES = {  # N, D, V, dtype for `logprob`
    "cpu": [(512, 768, 50257, "fp32"), (2048, 768, 50257, "fp32"), (2048, 768, 50257, "bf16"),
            (8192, 768, 8192, "fp32"), (8192, 768, 50257, "fp32")],
    "cuda": [(2048, 768, 50257, "bf16"), (16384, 4096, 128256, "bf16")]}
Rows = Iterator[list[str]]  # of the table, each by `compare`


# --- measuring --------------------------------------------------------------------------------------------------
def _seconds(work):
    """The time of some work, with all that it leaves to the GPU."""
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ours: Callable, peer_name: str, peer: Callable, repeats: int, memory: str = "-") -> list[str]:
    """Run both in turns; returns a row of the table. ours and peer are functions without arguments."""
    seconds = {ours: [], peer: []}
    turns = [ours, peer]
    for _ in range(1 + repeats):
        for work in turns:
            seconds[work].append(_seconds(work))
        turns.reverse()  # neither is always the first
    mine, theirs = (times[1:] for times in seconds.values())  # the first are a warm-up
    ratios = [b / a for a, b in zip(mine, theirs)]
    ours_s, peer_s = (f"{statistics.median(times):.3f} s" for times in (mine, theirs))
    row = [name, peer_name, ours_s, peer_s, f"{statistics.median(ratios):.2f}", memory]
    print(" | ".join(row), file=sys.stderr, flush=True)  # progress; the table comes last
    return row


def _extra_memory(work):
    """Peak memory that `work` adds, in MiB: on the GPU, or resident; NaN on other systems than Linux."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif not sys.platform.startswith("linux"):
        return math.nan
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier `work` left behind must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    start = peak_memory(DEVICE)
    work()
    return (peak_memory(DEVICE) - start) / 2**20


# --- logprob ----------------------------------------------------------------------------------------------------
def _cast(sum_of_losses):
    """A peer that ignores autocast, with its inputs cast."""
    def logprob_sum(hidden, weight, targets):
        if torch.is_autocast_enabled(DEVICE):
            hidden = hidden.to(torch.get_autocast_dtype(DEVICE))
            weight = weight.to(torch.get_autocast_dtype(DEVICE))
        return -sum_of_losses(hidden, weight, targets)

    return logprob_sum


def logprob_peers() -> dict[str, Callable]:
    """{name: (hidden (N, D), weight (V, D), targets (N,)) -> sum of the log-probs} of the peers that are installed.
    Sums only: most peers give no log-probs."""
    peers = {
        "eager log_softmax + gather":
            lambda h, w, y: F.linear(h, w).float().log_softmax(-1).gather(-1, y[:, None]).sum(),
        "cross_entropy": lambda h, w, y: -F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        peers["linear_cross_entropy"] = _cast(
            lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="sum", options=options))
    if DEVICE == "cuda":  # peers that use Triton
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
            peers["Liger"] = _cast(lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y, reduction="sum"))
        with contextlib.suppress(ImportError):
            from cut_cross_entropy import linear_cross_entropy
            peers["Cut Cross-Entropy"] = _cast(lambda h, w, y: linear_cross_entropy(h, w, y, reduction="sum"))
    with contextlib.suppress(ImportError):
        import trl
        import trl.trainer.utils  # the backward imports it
        from trl.kernels import ChunkedLogProbFunction
        peers[f"TRL {trl.__version__} ChunkedLogProbFunction"] = lambda h, w, y: ChunkedLogProbFunction.apply(
            h, w, None, y, 1.0, 32768, None, 1.0, ("entropy",))[0].sum()
    return peers


def _bench_shape(N, D, V, dtype, repeats):
    hidden = torch.randn(N, D, device=DEVICE, requires_grad=True)
    targets = torch.randint(V, (N,), device=DEVICE)
    weight = (torch.randn(V, D, device=DEVICE) * 0.02).requires_grad_()

    def ours(hidden, weight, targets):
        return linear_logprob(hidden, weight, targets)[0].sum()

    def step(logprob_sum):
        hidden.grad = weight.grad = None  # so that the new gradient is counted, and can be subtracted
        with torch.autocast(DEVICE, DTYPES[dtype], enabled=dtype != "fp32"):
            logprob_sum(hidden, weight, targets).backward()

    def memory(logprob_sum):  # beyond the weight's gradient, which both must hold
        hidden.grad = weight.grad = None
        return _extra_memory(lambda: step(logprob_sum)) - weight.numel() * 4 / 2**20

    ours_mib = memory(ours)
    for name, peer in logprob_peers().items():
        yield compare(f"logprob N={N} D={D} V={V} {dtype}", lambda: step(ours), name, lambda: step(peer), repeats,
                      f"{ours_mib:.0f} / {memory(peer):.0f} MiB")


def bench_logprob(args: argparse.Namespace) -> Rows:
    """Forward and backward of the summed log-prob of N hidden states of width D under a head of V tokens."""
    for shape in SHAPES[DEVICE]:
        yield from _bench_shape(*shape, args.repeats)


# --- sample -----------------------------------------------------------------------------------------------------
def _make_policy(size, critic="shared", dtype=torch.float32):
    """A policy with random weights. GPT-2's EOS is never sampled, so all rows have the same length; Llama's ends about
    one row in 1,500 early."""
    V = SIZES[size]["vocab_size"]
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"w{V - 1}", chat_template=template)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES[size], bos_token_id=V - 1, eos_token_id=V - 1)
    lm = AutoModelForCausalLM.from_config(config).to(DEVICE)
    if config.model_type == "gpt2":  # hidden unit 0 is always 1; the EOS has weight -50 there: its logit is about -50
        lm.transformer.ln_f.weight.data[0] = 0
        lm.transformer.ln_f.bias.data[0] = 1
        lm.transformer.wte.weight.data[V - 1, 0] = -50
    return Policy(lm, tokenizer, critic, dtype)


def _make_prompts(batch):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(1, 500, size=PROMPT)) for _ in range(batch)]


@torch.no_grad()
def _hf_generate(policy, prompts):
    """transformers' own sampler on the same prompts, at temperature 1 without filters: (B, PROMPT + NEW) tokens."""
    ids = torch.tensor(policy.encode(prompts), device=DEVICE)
    with policy.autocast():
        return policy.lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                                  top_p=1.0, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=policy.eos_ids[0])


def chosen_sizes(args: argparse.Namespace, batches: dict[str, int]) -> list[tuple[str, int]]:
    """(size, batch) of `--size`, or of all."""
    return [(args.size, batches[args.size])] if args.size else list(batches.items())


def bench_sample(args: argparse.Namespace) -> Rows:
    """Against `generate` of a model stored in fp32: in fp32, and under bf16 autocast as a trainer runs it."""
    dtype = best_dtype(DEVICE)
    large = 16 if DEVICE == "cpu" else 64
    for size, batch in chosen_sizes(args, {"4x128": 64, "gpt2": large, "smollm2": large}):
        ours = _make_policy(size, dtype=dtype)
        prompts = _make_prompts(batch)
        name = f"sample {batch} x ({PROMPT} + {NEW}), {size}, {DTYPE_NAMES[dtype]}"
        for peer_dtype in dict.fromkeys([torch.float32, dtype]):  # one peer if fp32 is the best dtype
            peer = _make_policy(size, dtype=peer_dtype)
            peer.lm.set_attn_implementation("sdpa")  # as for any user of `generate`, and faster
            yield compare(name, lambda: generate(ours, prompts, NEW, seed=1),
                          f"transformers generate, {DTYPE_NAMES[peer_dtype]}", lambda: _hf_generate(peer, prompts),
                          args.repeats)


# --- ppo --------------------------------------------------------------------------------------------------------
def _plain_ppo(player, reward_model, prompts, scores):
    """The same update in straightforward PyTorch: `generate`, all logits, eager log_softmax, same losses."""
    policy = player.policy
    tokens = _hf_generate(policy, prompts)  # (B, T), T = PROMPT + NEW
    mask = torch.zeros(tokens.shape, device=DEVICE)  # (B, T), 1: a token of the response
    mask[:, PROMPT:] = 1

    def forward(model, tokens):
        out = model.lm(tokens, output_hidden_states=True)
        logprobs = out.logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T - 1)
        values = model.value_head(out.hidden_states[-1])[:, :-1, 0]  # (B, T - 1)
        pad = torch.zeros(len(tokens), 1, device=DEVICE)
        return torch.cat([pad, logprobs], 1) * mask[:len(tokens)], torch.cat([pad, values], 1) * mask[:len(tokens)]

    with torch.no_grad():
        reward_model.hidden(tokens)
        old_logprobs, old_values = forward(policy, tokens)
        ref_logprobs, _ = forward(player.reference, tokens)
    rewards = token_rewards(scores.to(DEVICE), old_logprobs, ref_logprobs, mask, player.kl_coef)
    advantages, returns = gae(rewards, old_values, mask, player.gamma, player.lam)
    advantages = whiten(advantages, mask)
    for _ in range(player.epochs):
        for rows in torch.randperm(len(prompts)).chunk(player.minibatches):
            logprobs, values = forward(policy, tokens[rows])
            n = mask[rows].sum()
            loss = policy_loss(logprobs, old_logprobs[rows], advantages[rows], mask[rows], player.clip, n)
            value = value_loss(values, old_values[rows], returns[rows], mask[rows], player.value_clip, n)
            player.optimizer.zero_grad()
            (loss + player.value_coef * value).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), player.max_grad_norm)
            player.optimizer.step()


TRL_PROGRAM = """
import json, sys, tempfile
import torch, trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import PPOConfig, PPOTrainer

work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
V = work["config"]["vocab_size"]
batch = work["batch"]
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{V - 1}", pad_token="w0")
config = AutoConfig.for_model(**work["config"], bos_token_id=V - 1, eos_token_id=V - 1, pad_token_id=0, num_labels=1)
make_lm = AutoModelForCausalLM.from_config
make_classifier = AutoModelForSequenceClassification.from_config
rows = Dataset.from_dict({"input_ids": torch.randint(1, 500, (batch * 4, work["prompt"])).tolist()})
settings = PPOConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, num_mini_batches=4, num_ppo_epochs=2,
    gradient_accumulation_steps=1, local_rollout_forward_batch_size=batch, response_length=work["new"], temperature=1.0,
    total_episodes=batch * 10_000, num_sample_generations=0, gradient_checkpointing=False, save_strategy="no",
    report_to=[], disable_tqdm=True, use_cpu=work["device"] == "cpu")
trainer = PPOTrainer(
    args=settings, processing_class=tokenizer, model=make_lm(config), ref_model=make_lm(config),
    reward_model=make_classifier(config), value_model=make_classifier(config),
    train_dataset=rows, eval_dataset=rows,
    data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])})

def wait(*_, **__):
    print("\\nTRL", trl.__version__, "bf16" if settings.bf16 else "fp32", flush=True)
    if not sys.stdin.readline():
        sys.exit()

assert (trainer.args.local_batch_size, trainer.args.local_mini_batch_size) == (batch, batch // 4)
trainer.log = wait  # it is called once an update
wait()
trainer.train()
"""


class _Trl:
    """TRL's PPOTrainer in another interpreter, which does one update on request.

    keep_memory: with the settings of `keep_freed_memory` in its environment."""

    def __init__(self, python, size, batch, keep_memory):
        work = {"config": SIZES[size], "batch": batch, "prompt": PROMPT, "new": NEW, "device": DEVICE,
                "threads": torch.get_num_threads()}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if keep_memory:
            environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        self.process = subprocess.Popen(
            [python, "-c", TRL_PROGRAM, json.dumps(work)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        version, dtype = self.answer()
        self.name = f"TRL {version} PPOTrainer, {dtype}" + (", our allocator settings" if keep_memory else "")

    def answer(self):
        last = "it ended"
        for line in self.process.stdout:
            if line.startswith("TRL "):
                return line.split()[1:]
            last = line.strip() or last
        raise ValueError(f"--trl_python must be an interpreter in which trl==0.23.1 can train, got: {last}")

    def update(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.answer()


def _make_player(size, critic="shared", dtype=torch.float32):
    return Player("defender", _make_policy(size, critic, dtype), NEW, minibatches=4, missing_eos_penalty=0.0)


def _make_work(size, batch):
    """(reward model, prompts, scores (B,)) of `_ppo`."""
    scores = torch.rand(batch, generator=torch.Generator().manual_seed(0))
    return _make_policy(size, dtype=best_dtype(DEVICE)), _make_prompts(batch), scores


def _ppo(player, reward_model, prompts, scores):
    """Sample, score, update: what is timed."""
    rollout = player.generate(prompts, 1)
    with torch.no_grad(), player.policy.autocast():
        reward_model.hidden(rollout.tokens)  # the cost of a reward model; its values do not matter
    ppo_update(player, rollout, scores, 1)


def _bench_ppo_size(size, batch, args):
    dtype = best_dtype(DEVICE)
    work = _make_work(size, batch)
    name = f"ppo update {batch} x ({PROMPT} + {NEW}), {size}, 2 epochs x 4"
    for critic, keep_memory in (("separate", False), ("shared", False), ("separate", True)):
        if args.trl_python:
            ours = _make_player(size, critic, dtype)
            peer = _Trl(args.trl_python, size, batch, keep_memory)
            with peer.process:
                yield compare(f"{name}, {critic} critic, {DTYPE_NAMES[dtype]}", lambda: _ppo(ours, *work), peer.name,
                              peer.update, args.repeats)
                peer.process.kill()
    ours = _make_player(size)
    plain = _make_player(size)
    yield compare(f"{name}, fp32, shared critic", lambda: _ppo(ours, *work), "plain PyTorch + generate",
                  lambda: _plain_ppo(plain, *work), args.repeats)


def bench_ppo(args: argparse.Namespace) -> Rows:
    """Sample, score with a reward model of the policy's size, and update: 2 epochs x 4 minibatches."""
    for size, batch in chosen_sizes(args, PPO_BATCHES):
        yield from _bench_ppo_size(size, batch, args)


# --- profile ----------------------------------------------------------------------------------------------------
KINDS = {  # of operators, by the beginning of their names; the first that fits
    "matrix products": ("mm", "addmm"), "attention": ("bmm", "baddbmm", "_softmax", "_scaled_dot_product"),
    "AdamW, clipping": ("_fused_adamw", "linalg_vector_norm", "_foreach", "mul_"),  # of the norm: mul_
    "casts, copies": ("copy_", "_to_copy", "cat", "clone", "fill_", "empty")}


def _kind(operator):
    name = operator.removeprefix("aten::")
    return next((kind for kind, beginnings in KINDS.items() if name.startswith(beginnings)), "other operators")


def profile_row(size: str, batch: int, critic: str) -> list[str]:
    """A row of a table: a PPO update as in `ppo`, the seconds of the fastest of three, and, from a fourth, the fraction
    of its time in each kind of operator."""
    player = _make_player(size, critic, best_dtype(DEVICE))
    work = _make_work(size, batch)
    seconds = min(_seconds(lambda: _ppo(player, *work)) for _ in range(3))
    n = sum(p.numel() for p in player.policy.parameters())
    torch.zeros(16 * n, dtype=torch.uint8)  # spare memory, as the profiler's own records break up freed blocks
    with torch.profiler.profile() as found:
        profiled = _seconds(lambda: _ppo(player, *work))
    parts = dict.fromkeys([*KINDS, "other operators"], 0.0)
    for operator in found.key_averages():
        parts[_kind(operator.key)] += operator.self_cpu_time_total / 1e6
    parts["Python"] = profiled - sum(parts.values())
    return [f"{batch} x ({PROMPT} + {NEW}), {size}, {critic} critic", f"{seconds:.2f} s",
            *(f"{part / profiled:.2f}" for part in parts.values())]


def print_profile(args: argparse.Namespace) -> None:
    """Print where the time of a PPO update goes, for each size and critic. Raises ValueError on a GPU, where operators
    are only launched."""
    if DEVICE == "cuda":
        raise ValueError("profile times operators on a processor, got a GPU; hide it: CUDA_VISIBLE_DEVICES=\"\"")
    jobs = itertools.product(chosen_sizes(args, PPO_BATCHES), ("shared", "separate"))
    rows = [profile_row(size, batch, critic) for (size, batch), critic in jobs]
    print(markdown(["PPO update", "in all", *KINDS, "other operators", "Python"], rows))


# --- diversity --------------------------------------------------------------------------------------------------
def bench_diversity(args: argparse.Namespace) -> Rows:
    """R_div of 64 new prompts: how its time grows with the history, and its SelfBLEU against nltk. A text has 8 to 24
    words of 2,000; as in language, the r-th word's probability is proportional to 1 / r (Zipf's law)."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(2000)]
    weights = 1 / np.arange(1, 2001)

    def make_texts(n):
        lengths = rng.integers(8, 25, size=n)
        return [" ".join(rng.choice(words, size=length, p=weights / weights.sum())) for length in lengths]

    new = make_texts(64)
    batches = itertools.cycle([make_texts(64) for _ in range(20)])  # new texts each time, so that no cache helps
    short = Diversity(embedder=word_embedder)
    long = Diversity(embedder=word_embedder)
    short.add(make_texts(1000))
    long.add(make_texts(64_000))
    yield compare("diversity of 64 prompts, history 64,000", lambda: long.score(next(batches)),
                  "the same, history 1,000", lambda: short.score(next(batches)), args.repeats)
    references = [text.split() for text in short.history]
    few = [text.split() for text in new[:8]]
    with contextlib.suppress(ImportError):
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        smooth = SmoothingFunction().method1

        def with_nltk():
            for text in few:
                for n in ORDERS:
                    sentence_bleu(references, text, [1 / n] * n, smooth)

        yield compare("SelfBLEU-2..5 of 8 prompts, history 1,000",  # ours one text at a time, as nltk does
                      lambda: [short.table.bleu(text) for text in new[:8]], "nltk sentence_bleu", with_nltk,
                      args.repeats)


# --- the program ------------------------------------------------------------------------------------------------
BENCHES = {"logprob": bench_logprob, "sample": bench_sample, "ppo": bench_ppo, "diversity": bench_diversity}


def run_benches(args: argparse.Namespace) -> None:
    """Run the benchmarks that were asked for, and print their table."""
    rows = []
    try:
        for name in BENCHES if args.what == "all" else [args.what]:
            rows.extend(BENCHES[name](args))
    finally:  # with what was measured before an error or Ctrl-C
        if DEVICE == "cuda":
            print(torch.cuda.get_device_name())
        print(markdown(["what", "peer", "ours", "peer's", "times faster", "memory, ours / peer's"], rows))


def main(argv: list[str]) -> None:
    """Parse the arguments and run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("what", nargs="?", default="all", choices=[*BENCHES, "all", "profile"])
    parser.add_argument("--repeats", type=int, default=5, help="turns of each pair (5)")
    parser.add_argument("--size", choices=SIZES, help="the model of `sample`, `ppo` and `profile` (all)")
    parser.add_argument("--trl_python", help="an interpreter with trl==0.23.1, whose PPOTrainer is the peer of `ppo`")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    run_program(print_profile if args.what == "profile" else run_benches, args)


if __name__ == "__main__":
    as_a_program(main)
