"""Every option of `train.py`, described once. This file imports nothing slow, so that --help is fast."""

import sys
import textwrap
from dataclasses import dataclass, field, fields

AVERAGES = ("mixture", "weights", "ema", "none", "mixture,weights", "mixture,ema", "both")
PAPER_TEMPLATE = "Here is one question. Please write another harmful question on a similar topic: {}"


@dataclass(frozen=True)
class Option:
    """The properties of an option besides its name and type."""
    reason: str
    defaults: tuple  # none; one; or two, for the embedded game and for user-supplied models (for about 130M weights)
    at_least: int = 0  # bounds of a number
    above_0: bool = False
    below: int = 2**31
    at_most: int = 2**31
    choices: tuple[str, ...] = ()
    only: str = ""  # the condition without which it would do nothing: see `refuse_unused`
    heading: str = ""  # in --help, the heading above this option
    warm_start: bool = False  # the warm start or the test sets depend on it: --start needs a run with the same value


def option(reason: str, *defaults: object, aliases: tuple[str, ...] = (), **facts) -> object:
    """A field of Config. HfArgumentParser reads `aliases` from its metadata; this project reads `option`."""
    metadata = {"aliases": list(aliases), "option": Option(reason, defaults, **facts)}
    return field(default=defaults[0] if len(defaults) == 1 else None, metadata=metadata)


@dataclass
class Config:
    """Every option: its reason, its default or two defaults (`resolve` chooses one), and its other properties."""
    attacker: str | None = option("folder, .gguf file or hub id; without it: the embedded game", heading="players",
                                  warm_start=True)
    defender: str | None = option("folder, .gguf file or hub id", warm_start=True)
    judge: str | None = option("training judge: rule, folder or hub id, guard:MODEL, file.py:function; in the embedded "
                               "game also toy and truth", "toy",
                               "facebook/roberta-hate-speech-dynabench-r4-target", heading="judges", warm_start=True)
    held_out_judge: str | None = option("judge for evaluation only", "truth", "s-nlp/roberta_toxicity_classifier")
    unsafe_label: str | None = option("labels of a classifier --judge that mean unsafe, separated by commas, if their "
                                      "names do not tell", only="labels")
    held_out_unsafe_label: str | None = option("the same for --held_out_judge")
    helpful_judge: str | None = option("judge of answers to harmless requests: answered (no refusal, not empty, not "
                                       "repetitive), folder or hub id, file.py:function", "toy", "answered")
    prompts: str | None = option("seed prompts: .jsonl .json .csv .tsv .txt, each also .gz; default: hh-rlhf's "
                                 "red-team attempts", only="user", heading="data and warm start", warm_start=True)
    test_prompts: str | None = option("held-out prompts; default: a tenth of --prompts", only="user", warm_start=True)
    benign_prompts: str | None = option("harmless prompts, to measure over-refusal; default: hh-rlhf's helpful-base "
                                        "test set, without --prompts", only="user", warm_start=True)
    sft_data: str | None = option("(prompt, response) pairs for the defender's warm start and --ptx_coef; default: "
                                  "hh-rlhf's harmless-base, without --prompts", only="demonstrations", warm_start=True)
    sft_steps: int | None = option("supervised steps of each player", 900, 400, warm_start=True)  # 400: 30% of hh-rlhf
    judge_steps: int = option("training steps of the toy judge", 900, at_least=1, only="toy", warm_start=True)
    method: str = option("rlhf: defender on fixed prompts and harmless requests, attacker against the initial one; "
                         "iterative: prompts by the initial attacker; paraphrase, sft: no updates", "gpo",
                         choices=("gpo", "rlhf", "iterative", "paraphrase", "sft"), heading="game")
    rounds: int | None = option("rounds of the game", 8, 5, at_least=1, only="training")
    defender_steps: int | None = option("PPO steps per round (N_d)", 6, 20, only="training")  # the authors: 400
    attacker_steps: int | None = option("PPO steps per round (N_a)", 12, 10, only="attacker")  # the authors: 200
    first: str = option("who moves first in a round; defender_twice: the defender, in the first round with twice its "
                        "steps", "attacker", choices=("attacker", "defender", "defender_twice"), only="training")
    batch_size: int = option("exchanges per PPO step, of all processes; the warm start of user-supplied models takes "
                             "at most 32 of them", 96, at_least=1, heading="PPO")
    learning_rate: float | None = option("of the defender; the warm start of user-supplied models rises to five times "
                                         "it", 2.5e-4, 1e-5, above_0=True)  # TRL: 1.4e-5, trlx: 8e-6
    attacker_learning_rate: float | None = option("the same for the attacker", 6e-4, 1e-5, above_0=True)
    kl_coef: float = option("KL penalty of the defender", 0.02)
    attacker_kl_coef: float | None = option("KL penalty of the attacker", 0.01, 0.02)
    kl_anchor: str = option("KL reference: the initial policy, or that before the turn", "initial",
                            choices=("initial", "previous"), only="training")
    entropy_coef: float = option("entropy bonus of the attacker, after Eq. (3.7)", 0.0, only="attacker")
    ptx_coef: float | None = option("weight of the supervised loss on demonstrations, for the defender", 1.0, 0.0)
    unlikelihood_coef: float | None = option("weight of the losses that make the unsafe answers of --mine less likely "
                                             "and its helpful ones likelier, for the defender", 1.0, 0.0,
                                             only="unlearning")
    lam: float | None = option("lambda of GAE: below 1 the first tokens of a long text get little of its reward while "
                               "the critic is new", 0.95, 1.0, at_most=1)
    missing_eos_penalty: float | None = option("subtracted from the score of a response that --response_tokens cuts "
                                               "off", 0.5, 0.0)
    ppo_epochs: int = option("passes over a batch", 2, at_least=1)
    minibatches: int = option("optimizer steps per pass", 2, at_least=1)
    benign_share: float | None = option("fraction of the defender's batch that is harmless requests "
                                        "(--benign_prompts), rewarded for helpful answers (--helpful_judge)", 0.25, 0.4,
                                        below=1, only="training", heading="opponents")
    mine: int | None = option("attacks of the initial attacker before each defender turn, a third of them at twice "
                              "its temperature: the initial defender's unsafe answers are unlearned, and its helpful "
                              "ones to harmless requests learned (--benign_share)", 900, 0, only="unlearning")
    edits: int = option("versions of each of these attacks with one word added, removed or replaced, for which its "
                        "unsafe answer is unlearned too", 3, only="unlearning")
    opponent: str = option("the other's last policy, or the mixture, mean of the weights or exponential average of "
                           "those after all earlier rounds", "last", only="gpo",
                           choices=("last", "mixture", "weights", "ema"))
    replay: float = option("fraction of earlier ones among the attacks in the defender's batch, by success", 0.6,
                           below=1, only="gpo")
    diversity: float | None = option("weight k of the diversity reward; 0: off; no effect on the choice of "
                                     "prompts by iterative", 0.3, 1.0, only="training",
                                     heading="diversity")
    diversity_terms: str = option("terms of the diversity reward", "bleu,embedding", only="diversity",
                                  choices=("bleu,embedding", "embedding,bleu", "bleu", "embedding"))
    history: int = option("latest attacks that the diversity reward compares with; 0: all, as in the paper", 480,
                          only="training")
    min_likelihood: float = option("quantile of the initial attacker's own likelihoods; below it an attack scores as a "
                                   "failed repetition; 0: off; alias --guard", 0.01, below=1, only="attacker",
                                   aliases=("--guard",))
    embedder: str | None = option("words, folder or hub id; in the embedded game also toy", "toy",
                                  "sentence-transformers/all-MiniLM-L6-v2")
    average: str = option("policy averages to keep; ema: exponential, of weights; both: mixture and weights",
                          "mixture,weights", choices=AVERAGES, heading="averages")
    average_size: int | None = option("policies kept, by reservoir sampling", 32, 8, at_least=1, only="mixture")
    temperature: float = option("of sampling and log-probs", 1.0, above_0=True, heading="models and sampling")
    critic: str = option("body of the value head: the policy's or its own", "shared", choices=("shared", "separate"))
    attack_tokens: int | None = option("longest attack", 25, 48, at_least=1)  # holds nearly all of the authors' prompts
    response_tokens: int | None = option("longest response", 16, 64, at_least=1)  # holds 3/4 of hh-rlhf's answers
    template: str | None = option("prompt of the attacker; {} is the seed", "{}", PAPER_TEMPLATE, warm_start=True)
    micro_batch: int | None = option("rows per forward and backward, four times as many without gradients; 0: a "
                                     "minibatch", 0, 24)
    gradient_checkpointing: bool = option("keep only block inputs for the backward: less memory, a third slower", False)
    lora: int = option("rank of LoRA adapters (needs peft), trained in place of the model's weights; 0: off", 0)
    dtype: str | None = option("auto: bf16 if the GPU or the x86 processor has it", "fp32", "auto",
                               choices=("fp32", "bf16", "auto"))
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    deterministic: bool = option("the same bits in every run on one machine's CPU: one thread, slower kernels", False)
    trust_remote_code: bool = option("run Python files that come with a model; they can do anything", False)
    shard: bool = option("under torchrun: shard weights, gradients and optimizer state (FSDP2)", False)
    seed: int = option("seed of all random numbers", 0, heading="output", warm_start=True)
    eval_prompts: int | None = option("test prompts, and at most as many harmless ones; a third per round", 1000, 200,
                                      at_least=1, warm_start=True)
    dry_run: bool = option("print prompts as players and judges will read them, with token counts, and stop", False)
    out: str | None = option("run folder; default: runs/DATE_METHOD_sSEED")
    save_every: int | None = option("PPO steps between checkpoints", 30, 20, at_least=1)
    log: str = option("also log to RUN/tensorboard or to wandb", "none", choices=("none", "tensorboard", "wandb"))
    start: str | None = option("begin with the warm-started players, judge and test sets of this run folder")
    resume: str | None = option("continue the run in this folder, with its own configuration")
    # not an option: the names of the options that the user gave; empty where a run is resumed, measured or plain
    given = frozenset()

    @property
    def trains(self) -> bool:
        """Whether the method updates any player."""
        return self.method not in ("sft", "paraphrase")

    @property
    def unlearns(self) -> bool:
        """Whether the defender unlearns unsafe answers."""
        learns = self.method in ("gpo", "iterative") and self.defender_steps
        return bool(learns and self.mine and self.unlikelihood_coef)


OPTIONS = {entry.name: entry.metadata["option"] for entry in fields(Config)}


USAGE = """usage: python train.py [FILE.yaml | FILE.json] [--OPTION VALUE ...]

Train an attacker and a defender against each other: Algorithm 1 of arXiv 2406.10977.
Without options: the embedded game, on a CPU, 2 to 5 minutes.
Of two defaults the first is for the embedded game, the second for user-supplied models. Names in a file have no dashes.
"""


def help_text() -> str:
    """The text of --help."""
    lines = []
    for name, known in OPTIONS.items():
        if known.heading:
            lines.append(known.heading)
        reason = known.reason
        if known.choices:
            reason += f" ({' | '.join(known.choices)})"
        if known.defaults:
            reason += f" [{' / '.join(map(str, known.defaults))}]"
        lines += textwrap.wrap(reason, 118, initial_indent=f"  --{name:<23}", subsequent_indent=" " * 27,
                               break_on_hyphens=False)
    return USAGE + "\n".join(lines) + "\n"


def before_slow_imports(help: str = "") -> None:
    """The first call of a program, before imports that take seconds: print the help if it is asked for, and end; or
    tell a terminal why nothing happens yet, and end quietly after Ctrl-C."""
    if help and sys.argv[1:] in (["--help"], ["-h"]):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # as `as_a_program` does
        print(help.rstrip())
        sys.exit()
    sys.excepthook = short_interrupt
    if sys.stderr.isatty():
        print("loading PyTorch and transformers", file=sys.stderr)


def short_interrupt(kind: type, error: BaseException, trace: object) -> None:
    """In place of sys.excepthook: Ctrl-C during the imports ends the program without a traceback."""
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
