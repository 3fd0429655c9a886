"""A trial on real language without a hub: models of about 10 million parameters, trained from nothing on the
transcripts of Anthropic's hh-rlhf, play the game on real questions. Results and what they can show: docs/real_text.md.

    python -m experiments.real_text OUT --hh hh_harmless_base_test.jsonl.gz --prompts gpo_prompts.json --embedder FOLDER

(1,263 + 2,059 seconds and the judges' on one thread of a busy machine.)

    1. a byte-level BPE tokenizer and a GPT-2-format language model on the transcripts: the start of both players
    2. two judges on disjoint halves of the preference pairs (`experiments.train_judge`), from the sentence encoder
       where there is one: one to train against, one to measure with
    3. GPO+Div and RLHF (`train.py`) with the same defender steps from the same warm start
    4. both runs in one figure and one table

Every step is a command that a user could give; finished steps are not repeated.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from harness.data import append_lines, read_json, read_lines, read_rows
from harness.report import LOOKS, figure, markdown
from harness.run import open_run
from kernel import linear_logprob
from model import PLAIN_TEMPLATE, Policy, best_dtype, keep_freed_memory, save_policy
from reward import call_judge

EOS = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 256  # tokens
BATCH = 32  # blocks of CONTEXT tokens
STEPS = 300
JUDGE = "--steps 150 --batch_size 8 --max_length 128 --learning_rate 1e-4".split()
GAME = ("--rounds 5 --defender_steps 8 --attacker_steps 6 --batch_size 32 --sft_steps 100 --learning_rate 3e-5 "
        "--attacker_learning_rate 3e-5 --kl_coef 0.05 --attacker_kl_coef 0.1 --attack_tokens 32 --response_tokens 48 "
        "--ptx_coef 0.2 --eval_prompts 150 --dtype auto").split()
RUNS = {"GPO+Div": "--method gpo --diversity 1".split(), "RLHF": "--method rlhf --diversity 0".split()}


# --- the language model -------------------------------------------------------------------------------------------
def transcripts(hh: str) -> list[str]:
    """Each dialogue of the file twice, with the chosen and with the rejected end, in the players' format."""
    texts = []
    for row in read_rows(hh):
        prompt = PLAIN_TEMPLATE.format(row["prompt"])
        texts += [f"{prompt} {row[end].strip()}" for end in ("chosen", "rejected") if row.get(end)]
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = byte_level
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS], initial_alphabet=byte_level.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=EOS, model_max_length=CONTEXT)


def block_loss(policy: Policy, stream: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats a token, shape (), on the blocks of CONTEXT tokens of a stream (n,) from starts (B,)."""
    tokens = stream[starts[:, None] + torch.arange(CONTEXT)]  # (B, T)
    with policy.autocast():
        hidden = policy.hidden(tokens[:, :-1])  # (B, T - 1, D)
        return -linear_logprob(hidden.flatten(0, 1), policy.head.weight, tokens[:, 1:].flatten())[0].mean()


def pretrain(texts: list[str], folder: Path) -> None:
    """Next-token prediction over the transcripts, end to end, in blocks of CONTEXT tokens; 1/50 is held out."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(texts)
    ids = []
    for row in tokenizer(texts).input_ids:
        ids += [*row, tokenizer.eos_token_id]
    ids = torch.tensor(ids)
    train = ids[:-len(ids) // 50]
    test = ids[-len(ids) // 50:]
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=320, n_layer=7, n_head=5, bos_token_id=0,
                        eos_token_id=0)
    policy = Policy(GPT2LMHeadModel(config), tokenizer, dtype=best_dtype("cpu"))
    size = policy.lm.num_parameters()
    print(f"{size / 1e6:.1f} million parameters, {len(ids) / 1e6:.2f} million tokens, {policy.compute_dtype}")
    optimizer = torch.optim.AdamW(policy.lm.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.05)
    bar = trange(STEPS, desc="language model", dynamic_ncols=True)
    for _ in bar:
        loss = block_loss(policy, train, torch.randint(len(train) - CONTEXT, (BATCH,)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        held_out = block_loss(policy, test, torch.arange(0, len(test) - CONTEXT, CONTEXT)).item()
    print(f"held-out loss {held_out:.3f} nats a token, perplexity {np.exp(held_out):.1f}")
    save_policy(policy, folder)


# --- judges and runs ------------------------------------------------------------------------------------------------
def halves(hh: str, out: Path) -> None:
    """The preference pairs in two files; pairs of one prompt stay together."""
    rows = [row for row in read_rows(hh) if row.get("chosen") and row.get("rejected")]
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    prompts = dict.fromkeys(row["prompt"] for row in rows)  # in order, without repetition
    half = {prompt: i % 2 for i, prompt in enumerate(prompts)}
    for i in (0, 1):
        (out / f"pairs_{i}.jsonl").unlink(missing_ok=True)
        append_lines(out / f"pairs_{i}.jsonl", [row for row in rows if half[row["prompt"]] == i])


def call(*arguments: object) -> None:
    """Run one of our programs, after printing the command as a user would type it."""
    print(f"\npython {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def play(args: argparse.Namespace) -> None:
    """Both judges and both runs, from the language model in OUT/lm."""
    out = args.out
    start = out / "lm"
    for i in (0, 1):
        if not (out / f"judge_{i}" / "config.json").is_file():
            base = start if args.embedder == "words" else args.embedder
            call("-m", "experiments.train_judge", out / f"pairs_{i}.jsonl", "--model", base,
                 "--out", out / f"judge_{i}", *JUDGE)
    shared = ["--attacker", start, "--defender", start, "--judge", out / "judge_0", "--held_out_judge", out / "judge_1",
              "--embedder", args.embedder, "--prompts", args.prompts, "--sft_data", args.hh]
    for name, flags in RUNS.items():
        if (out / name / "summary.json").is_file():
            continue
        if (out / name / "config.json").is_file():
            call("train.py", "--resume", out / name)
            continue
        warm = [] if name == "GPO+Div" else ["--start", out / "GPO+Div"]
        call("train.py", *shared, *GAME, *flags, *warm, "--out", out / name)


# --- what came out --------------------------------------------------------------------------------------------------
def curves(folder: Path) -> dict[str, list[float]]:
    """{what: before the game and after each round} of a run: the judges' mean P(safe) of sampled answers to held-out
    prompts, how alike the attacks are, and the defender's KL to its warm start."""
    run = open_run(folder)
    log = read_lines(folder / "metrics.jsonl")
    before = read_json(folder / "summary.json")["before"]
    prompts = run.world.test_prompts
    mixture = run.averages["defender"]["mixture"]  # its members are the policies after each round
    defender = run.world.players["defender"]
    defenders = [run.world.first["defender"]]
    defenders += [defender.with_policy(mixture.policy(round)) for round in range(mixture.count)]
    answers = [defender.generate(prompts, 0).texts for defender in defenders]

    def reward(judge):
        return [np.nanmean(call_judge(judge, prompts, texts)) for texts in answers]

    kl = [0.0]
    for round in range(mixture.count):
        steps = [m for m in log if m["round"] == round and m["role"] == "defender"]
        kl.append(np.mean([m["defender/objective/kl"] for m in steps]))
    alike = [before["self_bleu"], *(m["game/self_bleu"] for m in log if "game/self_bleu" in m)]
    return {"reward on held-out prompts, training judge": reward(run.world.judge),
            "the same, held-out judge": reward(run.world.held_out_judge),
            "SelfBLEU among the attacks": alike, "KL of the defender, nats a response": kl}


def compare(out: Path) -> None:
    """real_text.png and a table, round by round, of both runs."""
    canvas, axes = figure(4, width=3.6, height=3.4)
    lines = []
    for name, look in zip(RUNS, LOOKS):
        for axis, (title, curve) in zip(axes, curves(out / name).items()):
            axis.plot(range(len(curve)), curve, label=name, ms=4, **look)
            axis.set(xlabel="round")
            axis.set_title(title, fontsize=9)
            lines.append([name, title, *(f"{value:.3f}" for value in curve)])
    axes[0].legend(frameon=False, fontsize=8)
    canvas.savefig(out / "real_text.png", dpi=130)
    print("\n" + markdown(["", "", "before", *(f"round {r}" for r in range(1, len(lines[0]) - 2))], lines))
    print(f"\nwritten to {out}/real_text.png; dialogues by round: {out}/GPO+Div/report.md")


def main() -> None:
    """The program: finished steps are not repeated."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for everything; call again to go on")
    parser.add_argument("--hh", required=True, help="preference pairs of hh-rlhf")
    parser.add_argument("--prompts", required=True, help="seed prompts; train.py holds a tenth of them out")
    parser.add_argument("--embedder", default="words", help="a sentence-embedding folder, for R_div and the judges")
    args = parser.parse_args()
    clock = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "lm" / "config.json").is_file():
        pretrain(transcripts(args.hh), args.out / "lm")
        print(f"{time.time() - clock:.0f} seconds")
    halves(args.hh, args.out)
    play(args)
    compare(args.out)
    print(f"{time.time() - clock:.0f} seconds in all")


if __name__ == "__main__":
    main()
