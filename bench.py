"""Side-by-side speed: every row is a ratio against a peer on the same work in the same run.

    python bench.py logprob     the fused log-prob against eager, PyTorch's two cross entropies, and TRL's (>= 1.16), Liger's and
                                Apple's kernels where they are importable: time and peak memory
    python bench.py sample      our sampler against transformers' `generate`
    python bench.py ppo         a whole PPO update (sample, score, update) against plain PyTorch with `generate`
    python bench.py ppo --trl_python PYTHON     ... and against TRL's PPOTrainer, in an interpreter with trl==0.23.1
    python bench.py diversity   SelfBLEU of 64 new prompts against a history of 1,000 to 64,000, and nltk, fast_bleu
    python bench.py game        seconds of a PPO step of the embedded game, by part
    python bench.py all --json FILE     everything above, also as JSON lines
    python bench.py soak --kills 100    kills runs of train.py with SIGKILL in all their phases, resumes them, and compares their ends

Ours and the peer take turns, `--repeats` times; the figures are medians, the ratio is the median of the
ratios of neighbours. Random weights: speed does not depend on them.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from data import fail, interrupted, sigterm_as_ctrl_c
from diversity import Diversity, word_embedder
from gpo import Player, gae, policy_loss, ppo_update, token_rewards, value_loss, whiten
from kernel import linear_logprob
from model import DTYPE_NAMES, DTYPES, Policy, best_dtype, generate, keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"4x128": dict(vocab_size=512, n_embd=128, n_layer=4, n_head=4), "gpt2": dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12)}


def timed(work):
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
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
    """Peak memory that `work` adds, in MiB: of the GPU, or resident, sampled every millisecond."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    release_freed_memory()  # what an earlier `work` left behind must not hide what this one takes
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


def release_freed_memory():
    ctypes.CDLL("libc.so.6").malloc_trim(0)


# --- the benches -------------------------------------------------------------------------------------------
def bench_logprob(repeats):
    """Forward and backward of the summed log-prob of N hidden states of width D under a head of V words."""
    rows = []
    shapes = [(512, 768, 50257, "fp32"), (2048, 768, 50257, "fp32"), (2048, 768, 50257, "bf16"), (8192, 768, 8192, "fp32"), (8192, 768, 50257, "fp32")]
    for N, D, V, dtype in shapes if DEVICE == "cpu" else [(2048, 768, 50257, "bf16"), (16384, 4096, 128256, "bf16")]:
        hidden, targets = torch.randn(N, D, device=DEVICE, requires_grad=True), torch.randint(V, (N,), device=DEVICE)
        weight = (torch.randn(V, D, device=DEVICE) * 0.02).requires_grad_()

        def step(logprob_sum):
            hidden.grad = weight.grad = None
            with torch.autocast(DEVICE, DTYPES[dtype], enabled=dtype != "fp32"):
                logprob_sum(hidden, weight, targets).backward()
            return hidden.grad

        ours = lambda hidden, weight, targets: linear_logprob(hidden, weight, targets)[0].sum()
        weight_gradient = weight.numel() * 4 / 2**20  # both must hold it; extra memory is what comes on top
        memory, result = extra_memory(lambda: step(ours)) - weight_gradient, step(ours)
        for name, peer in logprob_peers().items():
            hidden.grad = weight.grad = None  # so that the new gradient is counted, and can be taken off
            few = max(1, repeats // 3) if DEVICE == "cpu" and N * V > 2**28 else repeats  # half a minute each
            row = compare(f"logprob N={N} D={D} V={V} {dtype}", lambda: step(ours), name, lambda: step(peer), few)
            hidden.grad = weight.grad = None
            row |= {"ours_mib": memory, "peer_mib": extra_memory(lambda: step(peer)) - weight_gradient}
            rows.append(row | {"gradients_differ": ((step(peer) - result).norm() / result.norm()).item()})
    return rows


def logprob_peers():
    """{name: (hidden (N, D), weight (V, D), targets (N,)) -> sum of the log-probs}. Sums only: most peers give no log-probs."""
    peers = {
        "eager log_softmax + gather": lambda h, w, y: F.linear(h, w).float().log_softmax(-1).gather(-1, y[:, None]).sum(),
        "cross_entropy": lambda h, w, y: -F.cross_entropy(F.linear(h, w).float(), y, reduction="sum"),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # PyTorch's own, in chunks; it takes no autocast, so it is given the dtype
        options = torch.nn.LinearCrossEntropyOptions()
        cast = lambda x: x.to(torch.get_autocast_dtype(DEVICE)) if torch.is_autocast_enabled(DEVICE) else x
        peers["linear_cross_entropy"] = lambda h, w, y: -F.linear_cross_entropy(cast(h), cast(w), y, reduction="sum", options=options)
    with contextlib.suppress(ImportError):
        import trl
        import trl.trainer.utils  # the backward imports it
        from trl.kernels import ChunkedLogProbFunction
        peers[f"TRL {trl.__version__} ChunkedLogProbFunction"] = lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ("entropy",))[0].sum()
    if DEVICE == "cuda":  # Triton only
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
            peers["Liger"] = lambda h, w, y: -liger_fused_linear_cross_entropy(cast(h), cast(w), y, reduction="sum")
        with contextlib.suppress(ImportError):
            from cut_cross_entropy import linear_cross_entropy
            peers["Apple cut_cross_entropy"] = lambda h, w, y: -linear_cross_entropy(cast(h), cast(w), y, reduction="sum")
    return peers


def make_policy(size, critic="shared", dtype=torch.float32):
    """A GPT-2 of random weights whose EOS is never sampled, so that all rows have the same length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    V = SIZES[size]["vocab_size"]
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"w{V - 1}", chat_template="{{ messages[0]['content'] }}")
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(**SIZES[size], n_positions=1024, bos_token_id=V - 1, eos_token_id=V - 1)).to(DEVICE)
    with torch.no_grad():  # the first hidden unit is always 1, and the EOS hates it: its logit is about -50
        lm.transformer.ln_f.weight[0], lm.transformer.ln_f.bias[0], lm.transformer.wte.weight[V - 1, 0] = 0, 1, -50
    return Policy(lm, tokenizer, critic, dtype)


def make_prompts(policy, batch, length=16):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(1, 500, size=length)) for _ in range(batch)]


@torch.no_grad()
def hf_generate(policy, prompts, new_tokens):
    """transformers' own sampler on the same prompts, at temperature 1 without filters."""
    ids = torch.tensor(policy.encode(prompts), device=DEVICE)
    with policy.autocast():
        return policy.lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
                                  min_new_tokens=new_tokens, pad_token_id=policy.eos_ids[0])


def bench_sample(repeats):
    """Against `generate` of a model held in fp32: in fp32, and under bf16 autocast as a trainer runs it."""
    rows, dtype = [], best_dtype(DEVICE)
    for size, batch in (("4x128", 64), ("gpt2", 16 if DEVICE == "cpu" else 64)):
        ours, plain = make_policy(size, dtype=dtype), make_policy(size)
        prompts = make_prompts(ours, batch)
        for peer in {plain.compute_dtype: plain, dtype: ours}.values():
            rows.append(compare(f"sample {batch} x (16 + 32), {size}, {DTYPE_NAMES[dtype]}", lambda: generate(ours, prompts, 32, seed=1),
                                f"transformers generate, {DTYPE_NAMES[peer.compute_dtype]}", lambda: hf_generate(peer, prompts, 32), repeats))
    return rows


def bench_ppo(repeats, trl_python=None):
    """Sample, score with a reward model of the policy's size, and update: 2 epochs x 4 minibatches."""
    rows, dtype = [], best_dtype(DEVICE)
    for size, batch in (("4x128", 64), ("gpt2", 16)):
        reward_model, scores = make_policy(size, dtype=dtype), torch.rand(batch, generator=torch.Generator().manual_seed(0))

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
            for which, keep_memory in (("separate critic", False), ("shared critic", False), ("separate critic", True)):
                with Trl(trl_python, size, batch, keep_memory) as peer:
                    peer_name = f"TRL {peer.version} PPOTrainer, {peer.dtype}{', our allocator settings' * keep_memory}"
                    rows.append(compare(f"{name}, {which}, {DTYPE_NAMES[dtype]}", lambda: update(ours[which], prompts), peer_name, peer.update, repeats))
        plain = player()
        rows.append(compare(f"{name}, fp32, shared critic", lambda: update(ours["fp32, shared critic"], prompts), "plain PyTorch + generate",
                            lambda: plain_ppo(plain, reward_model, prompts, scores), repeats))
    return rows


class Trl:
    """TRL's PPOTrainer in another interpreter, which does one update whenever it is asked for one."""

    def __init__(self, python, size, batch, keep_memory=False):
        """keep_memory: with the settings of `keep_freed_memory` in its environment."""
        work = json.dumps({"config": SIZES[size], "batch": batch, "prompt": 16, "new": 32, "threads": torch.get_num_threads()})
        self.process = subprocess.Popen([python, "-c", TRL_PROGRAM, work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env={**os.environ, "HF_HUB_OFFLINE": "1", **({"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)} if keep_memory else {})})
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
settings = PPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, num_mini_batches=4, num_ppo_epochs=2, gradient_accumulation_steps=1,
                     local_rollout_forward_batch_size=batch, response_length=work["new"], temperature=1.0, total_episodes=batch * 10_000, num_sample_generations=0,
                     gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
trainer = PPOTrainer(args=settings, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value, train_dataset=rows,
                     eval_dataset=rows, data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])})

def wait(*_, **__):
    print("\\nTRL", trl.__version__, "bf16" if settings.bf16 else "fp32", flush=True)
    if not sys.stdin.readline():
        sys.exit()

assert (trainer.args.local_batch_size, trainer.args.local_mini_batch_size) == (batch, batch // 4)
trainer.log = wait  # it is called once an update
wait()
trainer.train()
"""


def plain_ppo(player, reward_model, prompts, scores):
    """The same update as straightforward PyTorch: `generate`, whole logits, eager log_softmax, same losses."""
    policy, P, R = player.policy, 16, 32
    tokens = hf_generate(policy, prompts, R)  # (B, P + R)
    mask = torch.zeros(tokens.shape, device=DEVICE)
    mask[:, P:] = 1

    def forward(model, tokens):
        out = model.lm(tokens, output_hidden_states=True)
        logp = out.logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]  # (B, P + R - 1)
        values = model.value_head(out.hidden_states[-1])[:, :-1, 0]
        pad = torch.zeros(len(tokens), 1, device=DEVICE)
        return torch.cat([pad, logp], 1) * mask[:len(tokens)], torch.cat([pad, values], 1) * mask[:len(tokens)]

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


# --- the soak: runs that are killed and resumed end like one that is left alone ---------------------------------
SOAK = ("--out run --sft_steps 6 --judge_steps 6 --batch_size 8 --eval_prompts 8 --attack_tokens 8 --response_tokens 6 --save_every 1 --rounds 2 --attacker_steps 1 "
        "--defender_steps 2 --mine 8 --restart 1 --kl_anchor previous --critic separate --average distill").split()
SOAK_PROGRAM = """
import os, sys
import gpo, train

def announce(owner, name, around=["between"]):  # on stdout, when it begins, and when what is around it goes on
    def announced(*args, real=getattr(owner, name), **kwargs):
        around.append(name)
        os.write(1, f"\\n@{around[-1]}\\n".encode())
        result = real(*args, **kwargs)
        around.pop()
        os.write(1, f"\\n@{around[-1]}\\n".encode())
        return result
    setattr(owner, name, announced)

for owner, names in ((train, "begin sft train_judge prepare play ppo_update distill save_policy draw_curves write_report"), (train.Run, "load save evaluate"), (gpo, "call_judge")):
    for name in names.split():
        announce(owner, name)
train.main(sys.argv[1:])
"""


def live(folder, plan=None):
    """Begin or resume the run in `folder` with one thread. plan (function, n, seconds): kill it so long after the n-th call of this
    function has begun. Returns (exit status, [(function, when it began)]); what it says on stderr goes to a file."""
    command, seen = ["--resume", "run"] if (folder / "run" / "config.json").exists() else SOAK, []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    with (open(folder / "stderr.txt", "a") as errors,
          subprocess.Popen([sys.executable, "-c", SOAK_PROGRAM, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process):
        for line in process.stdout:
            if line.startswith("@"):
                seen.append((line[1:-1], time.perf_counter()))
                if plan and plan[:2] == (line[1:-1], sum(name == line[1:-1] for name, _ in seen)):
                    time.sleep(plan[2])
                    process.kill()
    return process.returncode, seen


def contents(run):
    """{file: what must be the same in two runs}: all but times, memory, how it was started, and older checkpoints."""
    older = sorted((run / "checkpoints").glob("*step_*"))[:-1]
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock" and not {*older} & {*path.parents}}
    without = lambda text, *names: {name: value for name, value in json.loads(text).items() if not name.startswith(names)}
    files["metrics.jsonl"] = [without(line, "time/") for line in files["metrics.jsonl"].splitlines()]
    return files | {"summary.json": without(files["summary.json"], "seconds", "memory", "config"), "config.json": without(files["config.json"], "versions")}


def soak(kills, seed):
    """Prints into which functions the kills fell, and `K kills, 0 lost, 0 different`. Lost: a run that ended with an error; different: one whose
    end is not that of a run left alone. Returns the exit status; the folders of a failure are kept. A run is killed in one function
    after the other, in the order of a run's life, until it has come to its end; then the next one begins."""
    place, rng, fell, wrong, moments = Path(tempfile.mkdtemp(prefix="soak_")), np.random.default_rng(seed), Counter(), Counter(), defaultdict(list)
    status, seen = live(place)
    if status:
        raise ValueError(f"train.py must come to its end before it can be killed, got {(place / 'stderr.txt').read_text().splitlines()[-1]}")
    alone = contents(place / "run")
    for (name, begun), (_, ended) in zip(seen, seen[1:]):
        moments[name].append(ended - begun)
    with tqdm(total=kills, desc="kills", dynamic_ncols=True) as bar:
        while fell.total() < kills:
            folder, status = Path(tempfile.mkdtemp(dir=place)), -signal.SIGKILL
            while status == -signal.SIGKILL:
                name = list(moments)[fell.total() % len(moments)]
                n = rng.integers(min(2, len(moments[name])))  # in what is left of the run: all of its steps come to be the first or second
                status, seen = live(folder, (name, n + 1, rng.uniform(0, moments[name][n])) if fell.total() < kills else None)
                if status == -signal.SIGKILL:
                    fell[seen[-1][0]] += 1
                    bar.update()
            end = {} if status else contents(folder / "run")
            if differ := sorted(name for name in {**alone, **end} if alone.get(name) != end.get(name)):
                wrong["lost" if status else "different"] += 1
                bar.write(f"{folder}: {f'ended with status {status}, see stderr.txt' if status else ', '.join(differ)}", file=sys.stderr)
    print(f"kills in {', '.join(f'{name}: {n}' for name, n in fell.most_common())}")
    print(f"{fell.total()} kills, {wrong['lost']} lost, {wrong['different']} different" + (f"; see {place}" if wrong else ""))
    if not wrong:
        shutil.rmtree(place)
    return bool(wrong)


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
    keep_freed_memory()
    transformers.utils.logging.set_verbosity_error()
    benches = {"logprob": bench_logprob, "sample": bench_sample, "ppo": bench_ppo, "diversity": bench_diversity, "game": bench_game}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=[*benches, "all", "soak"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trl_python", "--trl-python", help="an interpreter with trl==0.23.1, for the peer of `ppo`")
    parser.add_argument("--json", help="append each row to this file as a JSON line")
    parser.add_argument("--kills", type=int, default=100, help="of `soak`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of `soak`")
    parser.error = fail
    args = parser.parse_args(argv)
    for name in ("repeats", "kills"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    more = {"ppo": {"trl_python": args.trl_python}}
    try:
        open(args.json or os.devnull, "a").close()  # find out now whether it can be written
        if args.what == "soak":
            sys.exit(soak(args.kills, args.seed))
        rows = [row for name, bench in benches.items() if args.what in (name, "all") for row in bench(args.repeats, **more.get(name, {}))]
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt as stop:
        interrupted(stop, "")
    print_table(rows)
    if args.json:
        with open(args.json, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sigterm_as_ctrl_c()
    main(sys.argv[1:])
