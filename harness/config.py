"""Read (`parse`), complete and check (`resolve`) the options of `train.py`, which harness/options.py describes."""

import argparse
import contextlib
import importlib.util
import re
import shlex
import time
from pathlib import Path

import torch
import transformers
import yaml

from gpo import world_size
from harness.data import fail, read_config, read_json, unique_keys
from harness.options import OPTIONS, Config, help_text
from model import DTYPE_NAMES, best_dtype

DATA = ("prompts", "test_prompts", "benign_prompts", "sft_data")
PATHS = (*DATA, "attacker", "defender", "judge", "held_out_judge", "helpful_judge", "embedder", "start")
OUR_NAMES = ("rule", "answered", "toy", "truth", "words")  # of judges and embedders
LEFT_ALONE = {".lock", "config.json.writing", "lost+found", ".DS_Store"}  # of a killed start; of file systems


# --- reading ----------------------------------------------------------------------------------------------------
class TextLoader(yaml.SafeLoader):
    """A YAML loader that leaves all scalars but null as they are written: YAML reads 1:30 as 90 and off as False."""

    yaml_implicit_resolvers = {
        first: [resolver for resolver in resolvers if resolver[0] == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node, deep=False):
        return unique_keys([(key.value, self.construct_object(value, deep)) for key, value in node.value])


class Parser(transformers.HfArgumentParser):
    """HfArgumentParser with our --help, errors in one line, and no defaults: it returns only the options given."""

    def add_argument(self, *flags, option=None, **kwargs):
        return super().add_argument(*flags, **{**kwargs, "default": argparse.SUPPRESS})

    def error(self, message):
        fail(f"{message}; see python train.py --help")

    def format_help(self):
        return help_text()


def flags_of(values: dict, source: str) -> list[str]:
    """{option: value} of a file or a run as flags, which the parser checks. Raises ValueError unless it is a dict."""
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold names and values, got {str(values)[:40]!r}")
    if isinstance(values.get("config"), dict):
        run = shlex.quote(Path(source).parent.as_posix())
        raise ValueError(f"{source} is a run's: continue it with --resume {run}")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def parse(argv: list[str]) -> Config:
    """The configuration from flags, from a file and the flags after it, or from a run. Ends the process on an error."""
    parser = Parser(Config, allow_abbrev=False)
    try:
        if argv and not argv[0].startswith("-") and argv[0].endswith((".json", ".yaml", ".yml")):
            is_json = argv[0].endswith(".json")
            values = read_json(argv[0]) if is_json else yaml.load(Path(argv[0]).read_bytes(), TextLoader)
            argv = flags_of(values, argv[0]) + argv[1:]
        given = vars(parser.parse_args(argv))
    except Exception as error:
        fail(f"cannot read the configuration: {error}")
    for name, value in given.items():
        if value == "":  # an unset shell variable
            fail(f"--{name} must not be empty; leave it out instead")
        if re.match("(guard:)?~/", str(value)):  # shells do not expand --out=~/run
            given[name] = value.replace("~", str(Path.home()), 1)
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
    """Fill in the defaults, and reject impossible settings before anything is created or trained."""
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
    """The value of an option, as an absolute path if it names an existing file or folder: a run can be resumed and
    evaluated from another folder. Hub ids and the names of our own judges and embedders are left unchanged."""
    is_ours = (name.endswith("judge") or name == "embedder") and value in OUR_NAMES
    if value is None or is_ours:
        return value
    guard, path, function = re.fullmatch(r"(guard:)?(.+?)((?<=\.py):\w+)?", value, re.DOTALL).groups("")
    is_file = function or name in DATA or path.endswith(".gguf")
    path = Path(path)
    is_here = path.is_file() if is_file else path.is_dir()
    place = path.parent.resolve() / path.name if is_file else path.resolve()  # the target of a link may lack its ending
    return f"{guard}{place}{function}" if is_here else value


def devices() -> list[str]:
    """The possible values of `--device` on this machine; with several processes each has its own GPU."""
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
            if value > known.at_most:
                raise ValueError(f"--{name} must be at most {known.at_most}, got {value}")


def check_combinations(config: Config) -> None:
    """Check options against each other, and against the machine."""
    if re.search("[{}]", config.template.replace("{}", "", 1)):
        raise ValueError(f"--template must hold {{}} once, for the seed, or not at all, got {config.template!r}")
    if config.opponent != "last" and config.opponent not in config.average:
        raise ValueError(f"--opponent {config.opponent} needs --average {config.opponent}, got {config.average!r}")
    if config.opponent != "last" and config.method == "gpo" and config.rounds == 1:
        raise ValueError(f"--opponent {config.opponent} needs --rounds of at least 2, as it is an average over earlier "
                         "rounds, got 1")
    unit = config.minibatches * world_size()
    if config.batch_size % unit:
        raise ValueError(f"--batch_size must be a multiple of --minibatches x processes ({config.minibatches} x "
                         f"{world_size()}), got {config.batch_size}; try {unit * (config.batch_size // unit + 1)} or, "
                         "in a run that is resumed, another number of processes")
    movers = ["defender_steps"] if config.method == "iterative" else ["attacker_steps", "defender_steps"]
    if config.trains and not any(getattr(config, name) for name in movers):
        raise ValueError(f"--{' or --'.join(movers)} must be above 0, got 0; --method paraphrase or sft trains nobody")
    has_requests = "benign_share" in config.given or config.benign_prompts or not (config.attacker and config.prompts)
    if config.trains and has_requests and 0 < config.benign_share * config.batch_size < 1:
        raise ValueError(f"--benign_share must be 0 or at least 1 / --batch_size, a row of each batch of "
                         f"{config.batch_size}, got {config.benign_share}")
    if config.shard and world_size() == 1 and not config.resume:
        raise ValueError("--shard needs several processes, got one; start torchrun --nproc_per_node=N -- train.py ...")
    if config.shard and config.lora:
        raise ValueError("--shard and --lora do not go together: adapters are too small to need it; leave one out")
    if config.log != "none" and not importlib.util.find_spec(config.log):
        raise ValueError(f"--log {config.log} needs the package {config.log}: pip install {config.log}")


def refuse_unused(config: Config) -> None:
    """Reject options that the user gave and `Option.only` says that the run would not use, unless they turn something
    off."""
    conditions = {  # Option.only: (whether it holds, the message if it does not)
        "toy": (config.judge == "toy", f"--judge {config.judge} is not trained"),
        "labels": (config.judge != "toy", "the embedded game trains its judge"),
        "user": (config.attacker, "the embedded game has its own; pass --attacker and --defender"),
        "demonstrations": (config.attacker and (config.sft_steps or config.ptx_coef),
                           "it takes --attacker and --defender, and --sft_steps or --ptx_coef above 0"),
        "training": (config.trains, f"--method {config.method} trains nobody"),
        "attacker": (config.method in ("gpo", "rlhf"), f"--method {config.method} trains no attacker"),
        "unlearning": (config.unlearns,
                       "it takes --method gpo or iterative, --mine, --unlikelihood_coef and --defender_steps above 0"),
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
        if name in ("judge", "held_out_judge", "embedder") and config.attacker and value == known.defaults[0]:
            raise ValueError(f"--{name} {value} is the embedded game's; user-supplied models need another")


def check_start(config: Config, run: Path) -> None:
    """Check that the run of `--start` has the same options of `Option.warm_start`."""
    try:
        other = read_config(run)
        read_json(run / "checkpoints" / "start" / "prompts.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--start needs a run folder with its config.json and checkpoints/start, got {run}") from error
    different = [name for name in OPTIONS if OPTIONS[name].warm_start and other.get(name) != getattr(config, name)]
    if different:
        theirs = " ".join(f"--{name} {other.get(name)}" for name in different)
        raise ValueError(f"--start needs a run of the same {', '.join(different)}, got {run} with {theirs}")


def check_out(folder: Path) -> None:
    """Check that `--out` is new or empty, apart from what a killed start or a file system leaves in a folder."""
    occupied = folder.exists()
    if folder.is_dir():
        occupied = {path.name for path in folder.iterdir()} - LEFT_ALONE
    if occupied:
        go_on = ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it is no run, maybe a model
            read_config(folder)
            go_on = f"; continue the run in it with --resume {shlex.quote(folder.as_posix())}"
        raise ValueError(f"--out must name a new or empty folder, got {folder}{go_on}")
