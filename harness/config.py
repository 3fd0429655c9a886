"""Every option of `train.py`: described once (`Config`), read (`parse`), completed and checked (`resolve`)."""

import argparse
import importlib.util
import re
import textwrap
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
import yaml

from gpo import world_size
from harness.data import PAPER_TEMPLATE, fail, read_config, read_json
from model import DTYPE_NAMES, best_dtype

METHODS = ("gpo", "rlhf", "iterative", "paraphrase", "sft")
DATA = ("prompts", "test_prompts", "benign_prompts", "sft_data")
PATHS = (*DATA, "attacker", "defender", "judge", "held_out_judge", "helpful_judge", "embedder", "start")
OUR_NAMES = ("rule", "answered", "toy", "truth", "chosen", "words")  # of judges and embedders
LEFT_BY_A_START = {".lock", "config.json.writing"}  # one that was killed in its first moment
LEFT_ALONE = {"lost+found"}  # of a file system of its own
AVERAGES = ("mixture", "weights", "none", "mixture,weights", "both")


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name and type."""
    reason: str
    defaults: tuple  # none; one; or two, for the embedded game and for user-supplied models (these suit GPT-2, 124M)
    at_least: int = 0  # bounds of a number
    above_0: bool = False
    below: int = 2**31
    choices: tuple[str, ...] = ()
    only: str = ""  # the condition without which it would do nothing: see `refuse_unused`
    heading: str = ""  # of --help: the heading that starts at this option
    warm_start: bool = False  # the warm start or the test sets depend on it: --start needs a run with the same value


def option(reason: str, *defaults: object, aliases: tuple[str, ...] = (), **facts) -> object:
    """A field of Config. HfArgumentParser reads `aliases` of its metadata; `option` is for us."""
    metadata = {"aliases": list(aliases), "option": Option(reason, defaults, **facts)}
    return field(default=defaults[0] if len(defaults) == 1 else None, metadata=metadata)


@dataclass
class Config:
    """Every option: its reason, its default or two defaults (`resolve` chooses one), and what else Option knows."""
    attacker: str | None = option("folder, .gguf file or hub id; without it: the embedded game", heading="players",
                                  warm_start=True)
    defender: str | None = option("folder, .gguf file or hub id", warm_start=True)
    judge: str | None = option("training judge: rule, toy, folder or hub id, guard:MODEL, file.py:function", "toy",
                               "facebook/roberta-hate-speech-dynabench-r4-target", heading="judges", warm_start=True)
    held_out_judge: str | None = option("judge for evaluation only", "truth", "s-nlp/roberta_toxicity_classifier")
    unsafe_label: str | None = option("labels of a classifier --judge that mean unsafe, separated by commas, if their "
                                      "names do not tell")
    held_out_unsafe_label: str | None = option("the same for --held_out_judge")
    helpful_judge: str | None = option("judge of answers to harmless requests: answered (no refusal, not empty, not "
                                       "repetitive) or as --judge, 1 for helpful", "toy", "answered")
    prompts: str | None = option("seed prompts: .jsonl .json .csv .txt, each also .gz; default: hh-rlhf's red-team "
                                 "attempts", only="user", heading="data and warm start", warm_start=True)
    test_prompts: str | None = option("held-out prompts; default: a tenth of --prompts", only="user", warm_start=True)
    benign_prompts: str | None = option("harmless prompts, to measure over-refusal; default: hh-rlhf's helpful-base "
                                        "test set, without --prompts", only="user", warm_start=True)
    sft_data: str | None = option("(prompt, response) pairs for the defender's warm start and --ptx_coef; default: "
                                  "hh-rlhf's harmless-base, without --prompts", only="user", warm_start=True)
    sft_steps: int | None = option("supervised steps of each player", 900, 400, warm_start=True)  # 400: 30% of hh-rlhf
    judge_steps: int = option("training steps of the toy judge", 900, at_least=1, only="toy", warm_start=True)
    method: str = option("rlhf: defender on fixed prompts, attacker against the initial defender; iterative: prompts "
                         "by the initial attacker; paraphrase, sft: no updates", "gpo", choices=METHODS, heading="game")
    rounds: int | None = option("rounds of the game", 15, 5, at_least=1, only="training")
    defender_steps: int | None = option("PPO steps per round (N_d)", 6, 20, only="training")  # the authors: 400
    attacker_steps: int | None = option("PPO steps per round (N_a)", 12, 10, only="attacker")  # the authors: 200
    first: str = option("who moves first in a round", "attacker", choices=("attacker", "defender"))
    batch_size: int | None = option("exchanges per PPO step, of all processes", 96, 32, at_least=1, heading="PPO")
    learning_rate: float | None = option("of the defender", 2.5e-4, 1e-5, above_0=True)  # TRL: 1.4e-5, trlx: 8e-6
    attacker_learning_rate: float | None = option("of the attacker", 6e-4, 1e-5, above_0=True)
    kl_coef: float | None = option("KL penalty of the defender", 0.05, 0.05)  # trlx's for 125M on hh-rlhf
    attacker_kl_coef: float | None = option("KL penalty of the attacker", 0.01, 0.05)
    kl_anchor: str = option("KL reference: initial or last round's policy", "initial", choices=("initial", "previous"))
    entropy_coef: float = option("eta_H of Eq. (3.7): entropy bonus of the attacker", 0.0, only="attacker")
    ptx_coef: float | None = option("weight of the supervised loss on demonstrations, for the defender", 1.0, 0.0)
    ppo_epochs: int = option("passes over a batch", 2, at_least=1)
    minibatches: int = option("optimizer steps per pass", 2, at_least=1)
    benign_share: float | None = option("fraction of --benign_prompts in the defender's batch, paid for a helpful "
                                        "answer (--helpful_judge)", 0.0, 0.4, below=1, only="training",
                                        heading="opponents")
    mine: int | None = option("attacks of the initial attacker, and as many earlier successes, tried before each "
                              "defender turn; successes are replayed", 600, 0, only="gpo")
    opponent: str = option("the other's last policy or mixture of all", "last", choices=("last", "mixture"), only="gpo")
    restart: int | None = option("rounds between resets to the initial attacker; 0: never", 3, 0, only="attacker")
    replay: float = option("fraction of earlier attacks in the defender's batch, by success", 0.6, below=1, only="gpo")
    diversity: float | None = option("weight k of the diversity reward; 0: off", 0.3, 1.0, heading="diversity")
    diversity_terms: str = option("terms of the diversity reward", "bleu,embedding", only="diversity",
                                  choices=("bleu,embedding", "embedding,bleu", "bleu", "embedding"))
    history: int = option("latest attacks that the diversity reward compares with; 0: all, as in the paper", 480)
    min_likelihood: float = option("quantile of the initial attacker's own likelihoods; below it an attack scores as a "
                                   "failed repetition; 0: off; alias --guard", 0.01, below=1, aliases=("--guard",))
    embedder: str | None = option("words, toy, folder or hub id", "toy", "sentence-transformers/all-MiniLM-L6-v2")
    average: str = option("policy averages to keep; both: mixture and weights", "mixture,weights", choices=AVERAGES,
                          heading="averages")
    average_size: int | None = option("policies kept, by reservoir sampling", 32, 8, at_least=1, only="mixture")
    temperature: float = option("of sampling and log-probs", 1.0, above_0=True, heading="models and sampling")
    critic: str = option("body of the value head: the policy's or its own", "shared", choices=("shared", "separate"))
    attack_tokens: int | None = option("longest attack", 25, 48, at_least=1)  # holds nearly all of the authors' prompts
    response_tokens: int | None = option("longest response", 16, 64, at_least=1)  # holds 3/4 of hh-rlhf's answers
    template: str | None = option("prompt of the attacker; {} is the seed", "{}", PAPER_TEMPLATE, warm_start=True)
    micro_batch: int = option("rows per forward and backward, four times as many without gradients; 0: a minibatch", 0)
    gradient_checkpointing: bool = option("keep only block inputs for the backward: less memory, a third slower", False)
    lora: int = option("rank of LoRA adapters (needs peft), which alone are then trained and saved; 0: off", 0)
    dtype: str | None = option("auto: bf16 if the processor has it", "fp32", "auto", choices=("fp32", "bf16", "auto"))
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    deterministic: bool = option("the same bits in every run on one machine: one CPU thread, slower kernels", False)
    trust_remote_code: bool = option("run Python files that come with a model; they can do anything", False)
    shard: bool = option("under torchrun: shard weights, gradients and optimizer state (FSDP2)", False)
    seed: int = option("seed of all random numbers", 0, heading="output", warm_start=True)
    eval_prompts: int | None = option("test prompts; a third of them per round", 1000, 200, at_least=1, warm_start=True)
    dry_run: bool = option("print prompts as players and judges will read them, with token counts, and stop", False)
    out: str | None = option("run folder; default: runs/DATE_METHOD_sSEED")
    save_every: int | None = option("PPO steps between checkpoints", 30, 20, at_least=1)
    log: str = option("also log to RUN/tensorboard or to wandb", "none", choices=("none", "tensorboard", "wandb"))
    start: str | None = option("begin with the warm-started players, judge and test sets of this run folder")
    resume: str | None = option("continue the run in this folder, with its own configuration")
    given = frozenset()  # not an option: the names of the options that the user gave


OPTIONS = {entry.name: entry.metadata["option"] for entry in fields(Config)}


# --- reading ----------------------------------------------------------------------------------------------------
USAGE = """usage: python train.py [FILE.yaml | FILE.json] [--OPTION VALUE ...]

Train an attacker and a defender against each other: Algorithm 1 of arXiv 2406.10977.
Without options: the embedded game, on a CPU, about 3 minutes.
Of two defaults the first is for the embedded game, the second for user-supplied models. Names in a file have no dashes.
"""


class Parser(transformers.HfArgumentParser):
    """HfArgumentParser with our --help, errors in one line, and without defaults: it returns only what was given."""

    def add_argument(self, *flags, option=None, **kwargs):
        return super().add_argument(*flags, **{**kwargs, "default": argparse.SUPPRESS})

    def error(self, message):
        fail(f"{message}; see python train.py --help")

    def format_help(self):
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


def flags_of(values: dict, source: str) -> list[str]:
    """{option: value} of a file or a run as flags, which the parser checks. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold names and values, got {str(values)[:40]!r}")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def parse(argv: list[str]) -> Config:
    """The configuration from flags, from a file and the flags after it, or from a run. Ends the process on an error."""
    parser = Parser(Config, allow_abbrev=False)
    try:
        if argv and argv[0].endswith((".json", ".yaml", ".yml")):
            values = read_json(argv[0]) if argv[0].endswith(".json") else yaml.safe_load(Path(argv[0]).read_bytes())
            argv = flags_of(values, argv[0]) + argv[1:]
        given = vars(parser.parse_args(argv))
    except Exception as error:
        fail(f"cannot read the configuration: {error}")
    for name, value in given.items():
        if value == "":  # an unset variable of a shell
            fail(f"--{name} must not be empty; to do without it leave it out")
        if isinstance(value, str):  # a shell leaves --out=~/run as it is
            given[name] = re.sub(r"^(guard:)?~(?=/)", rf"\g<1>{Path.home()}", value)
    if "resume" in given:
        return resumed(parser, given)
    config = Config(**given)
    config.given = frozenset(given)
    return config


def resumed(parser: Parser, given: dict) -> Config:
    """The configuration of the run in the folder given["resume"]. Ends the process as `parse` does."""
    folder = given["resume"]
    if set(given) - {"resume", "device", "micro_batch"}:
        fail("--resume takes the run folder, --device and --micro_batch alone: all else is as in the run's own "
             "configuration")
    try:
        saved = read_config(folder)
        different = set(OPTIONS) ^ set(saved)
        if different:  # today's default may differ from the value that the run began with
            raise ValueError(f"it was begun by a version with other options ({', '.join(sorted(different))}); resume "
                             "it with that one, whose commit is in config.json, or begin again")
        saved = vars(parser.parse_args(flags_of(saved, folder)))
    except Exception as error:
        fail(f"--resume needs a run folder with its config.json, got {folder} ({type(error).__name__}: {error})")
    if "device" not in given and saved["device"] not in devices():
        print(f"the run began with --device {saved['device']}, which is not here; it goes on with --device auto")
        given["device"] = "auto"
    return Config(**{**saved, **given, "out": folder})


# --- completing and checking: all raise ValueError ----------------------------------------------------------------
def resolve(config: Config) -> Config:
    """Fill in the defaults, and refuse impossible settings before anything is made or trained."""
    if bool(config.attacker) != bool(config.defender):
        raise ValueError("--attacker and --defender go together: pass both, or neither for the embedded game")
    for name, known in OPTIONS.items():
        if len(known.defaults) == 2 and getattr(config, name) is None:
            setattr(config, name, known.defaults[1] if config.attacker else known.defaults[0])
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_values(config)
    for name in PATHS:
        setattr(config, name, absolute(name, getattr(config, name)))
    if config.dtype == "auto":
        config.dtype = DTYPE_NAMES[best_dtype(config.device)]
    if config.average == "both":
        config.average = "mixture,weights"
    check_combinations(config)
    config.shard = config.shard and world_size() > 1  # a resumed run may have fewer processes than it began with
    refuse_unused(config)
    config.out = config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.method}_s{config.seed}"
    if config.start and not config.resume:
        check_start(config, Path(config.start))
    if not config.resume:
        check_out(Path(config.out))
    return config


def absolute(name: str, value: str | None) -> str | None:
    """The value of an option, as an absolute path if it names a file or a folder that is here: a run is resumed and
    evaluated from other folders too. A hub id, and the name of a judge or an embedder of ours, stays as it is."""
    is_ours = (name.endswith("judge") or name == "embedder") and value in OUR_NAMES
    if value is None or is_ours:
        return value
    guard, path, function = re.fullmatch(r"(guard:)?(.+?)((?<=\.py):\w+)?", value, re.DOTALL).groups("")
    is_file = function or name in DATA or path.endswith(".gguf")
    is_here = Path(path).is_file() if is_file else Path(path).is_dir()
    return f"{guard}{Path(path).resolve()}{function}" if is_here else value


def devices() -> list[str]:
    """What `--device` may name on this machine; several processes have a GPU each."""
    if not torch.cuda.is_available():
        return ["cpu"]
    if world_size() > 1:
        return ["cpu", "cuda"]
    return ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def check_values(config: Config) -> None:
    """Check each option by itself: the device, choices, bounds."""
    if config.device not in devices():
        raise ValueError(f"--device must be auto or, on this machine, {' or '.join(devices())}, got {config.device!r}")
    for name, known in OPTIONS.items():
        value = getattr(config, name)
        if known.choices and value not in known.choices:
            raise ValueError(f"--{name} must be one of {', '.join(known.choices)}, got {value!r}")
        if isinstance(value, (int, float)):
            lowest = "above 0" if known.above_0 else f"of at least {known.at_least}"
            if not value >= known.at_least or (known.above_0 and value == 0):
                raise ValueError(f"--{name} must be a finite number {lowest}, got {value}")
            if value >= known.below:
                raise ValueError(f"--{name} must be a finite number below {known.below}, got {value}")


def check_combinations(config: Config) -> None:
    """Check options against each other, and against the machine."""
    if re.search("[{}]", config.template.replace("{}", "", 1)):
        raise ValueError(f"--template must hold {{}} once, for the seed, or not at all, got {config.template!r}")
    if config.opponent == "mixture" and "mixture" not in config.average:
        raise ValueError(f"--opponent mixture needs --average mixture, got {config.average!r}")
    unit = config.minibatches * world_size()
    if config.batch_size % unit:
        raise ValueError(f"--batch_size must be a multiple of --minibatches x processes ({config.minibatches} x "
                         f"{world_size()}), got {config.batch_size}; try {unit * (config.batch_size // unit + 1)} or, "
                         "in a run that is resumed, another number of processes")
    if config.shard and world_size() == 1 and not config.resume:
        raise ValueError("--shard needs several processes, got one; start torchrun --nproc_per_node=N train.py ...")
    if config.shard and config.lora:
        raise ValueError("--shard and --lora do not go together: adapters are too small to need it; leave one out")
    if config.log != "none" and not importlib.util.find_spec(config.log):
        raise ValueError(f"--log {config.log} needs the package {config.log}: pip install {config.log}")


def refuse_unused(config: Config) -> None:
    """Refuse what the user gave and the run would not use, unless that turns something off."""
    conditions = {  # Option.only: (whether it holds, what to say where it does not)
        "toy": (not config.attacker, "only the embedded game trains its judge"),
        "user": (config.attacker, "the embedded game has its own; pass --attacker and --defender"),
        "training": (config.method not in ("sft", "paraphrase"), f"--method {config.method} trains nobody"),
        "attacker": (config.method in ("gpo", "rlhf"), f"--method {config.method} trains no attacker"),
        "gpo": (config.method == "gpo", f"it belongs to --method gpo, not to {config.method}"),
        "mixture": ("mixture" in config.average, "--average keeps no mixture"),
        "diversity": (config.diversity or config.method == "iterative", "--diversity is 0"),
    }
    for name, known in OPTIONS.items():
        value = getattr(config, name)
        if known.only and name in config.given and value not in (0, "last"):
            holds, reason = conditions[known.only]
            if not holds:
                raise ValueError(f"--{name} {value} would do nothing: {reason}")
        if name == "unsafe_label" and value and config.judge == "toy":
            raise ValueError(f"--unsafe_label {value} would do nothing: the embedded game trains its judge")
        if name in ("judge", "held_out_judge", "embedder") and config.attacker and value == known.defaults[0]:
            raise ValueError(f"--{name} {value} is the embedded game's; user-supplied models need another")


def check_start(config: Config, run: Path) -> None:
    """The run of `--start` must have been warm-started as this one would be."""
    try:
        other = read_config(run)
        read_json(run / "checkpoints" / "start" / "prompts.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--start needs a run folder with its config.json and checkpoints/start, got {run}") from error
    different = [name for name in OPTIONS if OPTIONS[name].warm_start and other.get(name) != getattr(config, name)]
    if different:
        theirs = ", ".join(str(other.get(name)) for name in different)
        raise ValueError(f"--start needs a run of the same {', '.join(different)}, got {run} with {theirs}")


def check_out(folder: Path) -> None:
    """`--out` must be new or empty, but for what a start that was killed and a file system leave in a folder."""
    occupied = folder.exists()
    if folder.is_dir():
        occupied = {path.name for path in folder.iterdir()} - LEFT_BY_A_START - LEFT_ALONE
    if occupied:
        go_on = f"; continue the run in it with --resume {folder}" if (folder / "config.json").is_file() else ""
        raise ValueError(f"--out must name a new or empty folder, got {folder}{go_on}")
