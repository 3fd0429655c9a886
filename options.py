"""Every option of `train.py`, its default and its reason; how options are read, completed and checked.

`Config` is the list. `parse` takes options from flags, from a .json or .yaml file, or from the run that is resumed; `resolve`
fills in what depends on other options and refuses what is impossible, in one line, before anything is made or trained.
"""

import argparse
import importlib.util
import json
import re
import textwrap
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
import yaml

from data import PAPER_TEMPLATE, check_template, fail, read_config, read_json
from model import DTYPE_NAMES, best_dtype
from scale import world_size

# A value of None in Config means: the first of these for the embedded game, the second for your own models, which suits GPT-2 (124M).
PRESETS = {
    "rounds": (15, 5), "batch_size": (96, 32), "restart": (3, 0),
    "defender_steps": (6, 20), "attacker_steps": (12, 10),  # 20:10 is the authors' 400:200
    "sft_steps": (900, 400),  # 12,800 of hh-rlhf's 42,500 pairs: an untuned GPT-2 has to learn to answer and to end
    "learning_rate": (2.5e-4, 1e-5), "attacker_learning_rate": (6e-4, 1e-5),  # TRL takes 1.4e-5 for GPT-2, trlx 8e-6 for 125M on hh-rlhf
    "kl_coef": (0.05, 0.05), "attacker_kl_coef": (0.01, 0.05),  # trlx's for 125M on hh-rlhf
    "ptx_coef": (1.0, 0.0), "mine": (600, 0), "diversity": (0.3, 1.0), "average_size": (32, 8),
    "attack_tokens": (25, 48), "response_tokens": (16, 64),  # longer than nearly all prompts of the authors', 3/4 of hh-rlhf's answers
    "eval_prompts": (1000, 200), "save_every": (30, 20), "dtype": ("fp32", "auto"),
    "template": ("{}", PAPER_TEMPLATE),
    "judge": ("toy", "facebook/roberta-hate-speech-dynabench-r4-target"), "held_out_judge": ("truth", "s-nlp/roberta_toxicity_classifier"),
    "embedder": ("toy", "sentence-transformers/all-MiniLM-L6-v2"),
}
HEADINGS = {  # of --help: each begins at an option, in the order of Config
    "attacker": "the players", "judge": "judges", "prompts": "data and warm start", "method": "schedule", "batch_size": "PPO",
    "ptx_coef": "what the players meet", "diversity": "diversity", "average": "averages", "critic": "models and sampling", "seed": "output"}
METHODS = ("gpo", "rlhf", "iterative", "paraphrase", "sft")
CHOICES = {
    "method": METHODS, "log": ("none", "tensorboard", "wandb"), "first": ("attacker", "defender"), "opponent": ("last", "mixture"),
    "kl_anchor": ("initial", "previous"), "critic": ("shared", "separate"), "dtype": ("fp32", "bf16", "auto"),
    "average": ("mixture,weights", "mixture", "weights", "both", "distill", "mixture,weights,distill", "none"),
    "diversity_terms": ("bleu,embedding", "embedding,bleu", "bleu", "embedding")}
AT_LEAST_1 = ("rounds judge_steps batch_size minibatches ppo_epochs attack_tokens response_tokens eval_prompts save_every "
              "average_size").split()
AT_LEAST_0 = ("defender_steps attacker_steps sft_steps micro_batch top_k seed kl_coef attacker_kl_coef entropy_coef ptx_coef "
              "diversity restart replay mine history guard lora target_kl").split()
ABOVE_0 = ("learning_rate", "attacker_learning_rate", "temperature", "mine_temperature")
# What the warm-started players and test sets depend on: equal in two runs, one may `--start` from the other.
WARM_START = ("attacker", "defender", "seed", "sft_steps", "judge", "judge_steps", "eval_prompts", "prompts", "test_prompts",
              "benign_prompts", "sft_data", "template")


def option(default: object, help: str) -> object:
    """A field of Config: its default, and its reason."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every option, its default and its reason. Where the default is None, `PRESETS` has two."""

    attacker: str | None = option(None, "attacker model, folder or hub id; without it the embedded game is played")
    defender: str | None = option(None, "defender model, folder or hub id")
    judge: str | None = option(None, "training judge: rule, toy, a classifier folder or hub id, guard:MODEL, file.py:function")
    held_out_judge: str | None = option(None, "judge of evaluation, never trained against")
    unsafe_label: str | None = option(None, "the label of a classifier judge that means unsafe, if its names do not tell")
    prompts: str | None = option(
        None, "seed prompts: .jsonl .json .csv .txt, each also .gz; default: the red-team attempts of Anthropic/hh-rlhf on the hub")
    test_prompts: str | None = option(None, "held-out prompts for evaluation; default: a tenth of --prompts, by hash")
    benign_prompts: str | None = option(
        None, "harmless prompts, to measure over-refusal; default: hh-rlhf's helpful-base test set, without --prompts")
    sft_data: str | None = option(
        None, "(prompt, response) pairs for the defender's warm start and --ptx_coef; default: hh-rlhf's harmless-base, without --prompts")
    sft_steps: int | None = option(None, "supervised steps before the game, for each player")
    judge_steps: int = option(900, "training steps of the embedded game's own judge")
    method: str = option("gpo", "gpo; rlhf: defender on fixed prompts, attacker against the first defender; iterative: diverse "
                         "prompts of the untrained attacker; paraphrase, sft: nobody is trained, prompts rewritten or as they are")
    rounds: int | None = option(None, "rounds of the game")
    defender_steps: int | None = option(None, "PPO steps of the defender in a round (N_d)")
    attacker_steps: int | None = option(None, "PPO steps of the attacker in a round (N_a)")
    first: str = option("attacker", "who moves first in a round: attacker or defender")
    batch_size: int | None = option(None, "exchanges in a PPO step")
    learning_rate: float | None = option(None, "of the defender")
    attacker_learning_rate: float | None = option(None, "of the attacker")
    kl_coef: float | None = option(None, "KL penalty of the defender")
    attacker_kl_coef: float | None = option(None, "KL penalty of the attacker")
    kl_anchor: str = option("initial", "the KL penalty is measured from the initial or the previous round's policy")
    target_kl: float = option(0.0, "an update ends where its KL exceeds 1.5 times this; 0: never")
    entropy_coef: float = option(0.0, "eta_H of Eq. (3.7): entropy bonus of the attacker")
    ptx_coef: float | None = option(None, "weight of the supervised loss on demonstrations in the defender's updates")
    opponent: str = option("last", "who a mover plays against: the other's last policy, or the mixture of all its rounds")
    restart: int | None = option(None, "the attacker begins again from its first weights every so many rounds; 0: never")
    replay: float = option(0.6, "share of the defender's batch drawn from earlier attacks, by their success")
    mine: int | None = option(None, "attacks of the first attacker tried on the defender at the start of each of its turns, and as many "
                              "that ever succeeded tried again; what succeeds is replayed")
    mine_temperature: float = option(1.5, "half of them are sampled at this temperature, to look further afield")
    diversity: float | None = option(None, "k: weight of the diversity reward of the attacker; 0 turns it off")
    diversity_terms: str = option("bleu,embedding", "terms of the diversity reward: bleu, embedding or both")
    history: int = option(480, "the diversity reward compares with the last so many attacks; 0: with all, as in the paper")
    guard: float = option(0.01, "attacks less natural to the first attacker than this share of its own samples count as failed "
                          "repetitions; 0: off")
    embedder: str | None = option(None, "sentence embeddings: words, toy, or an encoder folder or hub id")
    average: str = option("mixture,weights", "policy averages to keep: mixture, weights, both, distill (both, and one policy "
                          "trained on the mixture's samples) or none")
    average_size: int | None = option(None, "policies kept by the mixture (reservoir sampling beyond)")
    critic: str = option("shared", "value head on the policy's own body (shared) or on a separate one")
    temperature: float = option(1.0, "of sampling; log-probs are taken at the same temperature")
    top_k: int = option(0, "sample from the k likeliest tokens only; 0 is off")
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this much mass; 1 is off")
    attack_tokens: int | None = option(None, "longest attack")
    response_tokens: int | None = option(None, "longest response")
    template: str | None = option(None, "how a seed is put to the attacker; {} is the seed; without {} the attacker is free")
    ppo_epochs: int = option(2, "passes over a batch")
    minibatches: int = option(2, "optimizer steps in a pass")
    micro_batch: int = option(0, "rows per forward and backward, four times as many without gradients; 0: the whole minibatch")
    gradient_checkpointing: bool = option(False, "keep only the blocks' inputs for the backward: less memory, a third slower")
    lora: int = option(0, "rank of LoRA adapters (needs peft): they alone are trained, averaged and saved; the reference is the base; "
                       "0: all weights")
    dtype: str | None = option(None, "compute dtype: fp32, bf16 (weights stay fp32), or auto: bf16 where the processor has it")
    device: str = option("auto", "auto, cpu or cuda")
    deterministic: bool = option(False, "the same bits every time on one machine: one CPU thread, slower kernels")
    trust_remote_code: bool = option(False, "run Python files that come with a model; they can do anything")
    shard: bool = option(
        False, "under torchrun: cut weights, gradients and optimizer among the processes (FSDP2); default: a copy in each (DDP)")
    seed: int = option(0, "of everything random")
    eval_prompts: int | None = option(None, "held-out prompts in the table; a third of them after every round")
    dry_run: bool = option(
        False, "print the first prompts of the players and the judges as their models read them, with token counts, and stop")
    out: str | None = option(None, "run folder; default: runs/DATE_METHOD_sSEED")
    save_every: int | None = option(None, "PPO steps between checkpoints")
    log: str = option("none", "tensorboard: also write the metrics to RUN/tensorboard; wandb: send them")
    start: str | None = option(None, "begin with the warm-started players, judge and test sets of this run folder")
    resume: str | None = option(None, "go on with this run folder; its own configuration is used")
    given = frozenset()  # no option: the names of those that the user gave


# --- reading ----------------------------------------------------------------------------------------------------
def help_text() -> str:
    """--help: every option on a line or two, with its default and its reason."""
    lines = ["usage: python train.py [FILE.yaml | FILE.json] [--OPTION VALUE ...]", "",
             "Train an attacker and a defender against each other: Algorithm 1 of arXiv 2406.10977.",
             "Without options: the embedded game, on a CPU, about 3 minutes.", "",
             "Of two defaults the first is the embedded game's, the second your own models'. In a file, names have no dashes."]
    for entry in fields(Config):
        if entry.name in HEADINGS:
            lines.append(HEADINGS[entry.name])
        reason = entry.metadata["help"]
        default = " / ".join(map(str, PRESETS.get(entry.name, [] if entry.default is None else [entry.default])))
        if len(default) > 15:  # no room in its column
            reason, default = f"{reason} ({default})", ""
        lines += textwrap.wrap(reason, 118, initial_indent=f"  --{entry.name:<22} {default:<15} ", subsequent_indent=" " * 43,
                               break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def flags_of(values: dict, source: str) -> list[str]:
    """{option: value} of a file or of a run as flags: all ways of giving options are checked by the same parser. Raises ValueError."""
    names = {entry.name for entry in fields(Config)}
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold names and values, got {str(values)[:40]!r}")
    if unknown := {str(name).replace("-", "_") for name in values} - names:
        hint = "; a run goes on with --resume RUN" if "versions" in unknown else ""
        raise ValueError(f"{source} must hold options of train.py, got {', '.join(sorted(unknown))}{hint}")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def parse(argv: list[str]) -> Config:
    """The configuration from flags, from a .json or .yaml file and the flags after it, or from the run that is resumed.
    Ends the process with one line and status 2 where that cannot be read."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False)
    parser.format_help = help_text
    parser.error = lambda message: fail(f"{message}; see python train.py --help")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what was given comes out
    try:
        if argv and argv[0].endswith((".json", ".yaml", ".yml")):
            text = Path(argv[0]).read_text(encoding="utf-8")
            argv = flags_of(json.loads(text) if argv[0].endswith(".json") else yaml.safe_load(text), argv[0]) + argv[1:]
        given = vars(parser.parse_args(argv))
    except Exception as error:
        fail(f"cannot read the configuration: {error}")
    config = Config(**given)
    config.given = frozenset(given)
    if empty := [name for name, value in given.items() if value == ""]:  # as an unset variable of a shell is
        fail(f"--{empty[0]} must not be empty; to do without it leave it out")
    if not config.resume:
        return config
    if len(given) > 1:
        fail("--resume takes the run folder alone: the run's own configuration is used")
    try:
        saved = read_config(config.resume)
        if missing := {entry.name for entry in fields(Config)} - set(saved):  # today's default would not be what the run began with
            raise ValueError(f"it was begun by an older version, without {', '.join(sorted(missing))}")
        saved = vars(parser.parse_args(flags_of(saved, config.resume)))
        return Config(**{**saved, "resume": config.resume, "out": config.resume})
    except Exception as error:
        fail(f"--resume needs a run folder with its config.json, got {config.resume} ({type(error).__name__}: {error})")


# --- completing and checking ----------------------------------------------------------------------------------------
def resolve(config: Config) -> Config:
    """Fill in what the presets decide, and refuse impossible settings, before anything is made. Raises ValueError, OSError."""
    if bool(config.attacker) != bool(config.defender):
        raise ValueError("--attacker and --defender go together: pass both, or neither for the embedded game")
    for name, values in PRESETS.items():
        if getattr(config, name) is None:
            setattr(config, name, values[bool(config.attacker)])
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_choices(config)
    config.dtype = DTYPE_NAMES[best_dtype(config.device)] if config.dtype == "auto" else config.dtype
    config.average = {"both": "mixture,weights", "distill": "mixture,weights,distill"}.get(config.average, config.average)
    check_numbers(config)
    check_combinations(config)
    config.shard = config.shard and world_size() > 1  # a resumed run may have fewer processes than it began with
    refuse_contradictions(config)
    if config.log != "none" and not importlib.util.find_spec(config.log):
        raise ValueError(f"--log {config.log} needs the package {config.log}: pip install {config.log}")
    if config.start and not config.resume:
        check_start(config)
    config.out = config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.method}_s{config.seed}"
    if not config.resume:
        check_out(Path(config.out), writes=not config.dry_run)
    return config


def check_choices(config: Config) -> None:
    """Words must be among those that mean something."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?" if torch.cuda.is_available() else "cpu", config.device):
        raise ValueError(f"--device must be auto, cpu or, where there is one, cuda, got {config.device!r}")
    if config.held_out_judge == "toy":
        raise ValueError("--held_out_judge must differ from the judge of training, got toy; the embedded game's own is 'truth'")
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


def check_numbers(config: Config) -> None:
    """Numbers must be finite and within their bounds."""
    for name, bound in {**dict.fromkeys(AT_LEAST_1, 1), **dict.fromkeys(AT_LEAST_0, 0)}.items():
        if not bound <= (value := getattr(config, name)) < 2**31:
            raise ValueError(f"--{name} must be a finite number of at least {bound}{' and below 2**31' * (value > bound)}, got {value}")
    for name in ABOVE_0:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"--{name} must be a finite number above 0, got {getattr(config, name)}")
    if not 0 < config.top_p <= 1 or config.replay >= 1 or config.guard >= 1:
        raise ValueError("--top_p must lie in (0, 1], --replay and --guard in [0, 1), got "
                         f"{config.top_p}, {config.replay} and {config.guard}")


def check_combinations(config: Config) -> None:
    """What each allows by itself must go together."""
    if config.opponent == "mixture" and "mixture" not in config.average:
        raise ValueError(f"--opponent mixture needs --average mixture, got {config.average!r}")
    if config.minibatches > config.batch_size:
        raise ValueError(f"--minibatches must be at most --batch_size, got {config.minibatches} and {config.batch_size}")
    if config.shard and world_size() == 1 and not config.resume:
        raise ValueError("--shard needs several processes to share the weights among, got one; "
                         "start with torchrun --nproc_per_node=N train.py ...")
    if config.shard and config.lora:
        raise ValueError("--shard and --lora do not go together: adapters are small, and DDP (without --shard) sums their gradients alone")
    check_template(config.template)


def refuse_contradictions(config: Config) -> None:
    """What the user gave and the run would silently not do. Defaults and what is turned off contradict nothing."""
    own, nobody = bool(config.attacker), config.method in ("sft", "paraphrase")
    only_gpo, no_diversity = config.method != "gpo", not config.diversity and config.method != "iterative"
    for wrong, names, reason in (
            (own, "judge_steps", "only the embedded game trains its judge"),
            (not own, "prompts test_prompts benign_prompts sft_data",
             "the embedded game has its own; --attacker and --defender bring in your models"),
            (nobody, "rounds defender_steps", f"--method {config.method} trains nobody"),
            (nobody or config.method == "iterative", "attacker_steps restart entropy_coef", f"--method {config.method} trains no attacker"),
            (only_gpo, "opponent replay mine mine_temperature", f"it belongs to --method gpo, not to {config.method}"),
            (not config.mine, "mine_temperature", "--mine is 0"),
            ("mixture" not in config.average, "average_size", "--average keeps no mixture"),
            (no_diversity, "diversity_terms", "--diversity is 0")):
        for name in names.split():
            if wrong and name in config.given and getattr(config, name) not in (0, "last"):
                raise ValueError(f"--{name} {getattr(config, name)} would do nothing: {reason}")
    for name in ("judge", "held_out_judge", "embedder"):
        if own and getattr(config, name) == PRESETS[name][0]:
            raise ValueError(f"--{name} {getattr(config, name)} is the embedded game's; your own models need another")


def check_start(config: Config) -> None:
    """`--start RUN` must have been warm-started as this run would be."""
    try:
        other = read_config(config.start)
        read_json(Path(config.start) / "checkpoints" / "start" / "prompts.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--start needs a run folder with its config.json and checkpoints/start, got {config.start}") from error
    if different := [name for name in WARM_START if other.get(name) != getattr(config, name)]:
        theirs = ", ".join(str(other.get(name)) for name in different)
        raise ValueError(f"--start needs a run of the same {', '.join(different)}, got {config.start} with {theirs}")


def check_out(folder: Path, writes: bool) -> None:
    """`--out` must be new, and where the run `writes`, a place that can be written to: found out now, not after minutes of training."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out must name a new or empty folder, got {folder}; to go on with a run use --resume {folder}")
    if not writes:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.rmdir()
    except OSError as error:
        raise ValueError(f"--out must lie in a folder that can be written to, got {folder} ({error.strerror})") from error
