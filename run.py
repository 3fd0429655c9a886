"""A run's folder: written by `Run`, which holds all state of the game that is not inside a player and which `train.py`
plays with; read by `FinishedRun`, which `eval.py` measures.

What a run leaves: config.json (first), metrics.jsonl (a line a PPO step), games.jsonl (every exchange), checkpoints/,
attacker/, defender/ and average/, curves.png, report.md, summary.json (last: with it a run is finished). Every file is whole
or not there, and a run goes on from its newest checkpoint that is whole as if it had never been stopped.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import append_lines, first_line, read_config, read_json, read_lines, save_tokenizer, sync, whole_folder, write_json, write_text
from diversity import Diversity, load_embedder
from gpo import Game, Player, PolicyAverage, Speaker, distill, evaluate, naturalness, play
from model import DTYPES, Rollout, load_adapter, load_policy, load_weights, logprobs_and_values, save_policy, save_weights
from options import Config
from report import draw_curves, model_card, write_report
from reward import call_judge, load_judge, refusals, unsafe_share
from scale import add_lora, first_decides, from_first, in_shares, on_first, peak_memory, rank, world_size
from toy import ToyGame
from world import SFT_RATE, World, bar, draw

# What of the row of `evaluate` goes to metrics.jsonl after a round, as game/...
ROUND_METRICS = ("asr_held_out_judge", "asr_train_judge", "over_refusal", "attacker_success", "self_bleu", "cosine")


def new_seed(rng: np.random.Generator) -> int:
    """A seed for what has a random generator of its own."""
    return int(rng.integers(2**31))


# --- training health ----------------------------------------------------------------------------------------------
# Bounds that a healthy round keeps clear of: those of `python train.py --rounds 6` ended with .42 different attacks at least, .20 nats
# at least, mean lengths of 9.3 to 19.4, .08 refused at most, and judges that had parted by .02 at most.
LEAST_DIFFERENT = 0.2  # share of different prompts among the attacks of a step
LEAST_ENTROPY = 0.05  # nats per token: 19 of 20 tokens are as good as certain
LENGTHS = 1.5, 0.95  # mean response: fewest tokens, EOS included; greatest share of the longest that is allowed
MOST_REFUSED = 0.5  # share of the harmless prompts
MOST_APART = 0.15  # how much the judges' verdicts may part since before the game
OPPOSITE = 0.05  # or by how much each may change, the one for the better and the other for the worse


def alarms(metrics: dict[str, float], before: dict[str, float], limits: dict[str, int]) -> list[tuple[str, str]]:
    """What is wrong with a round: [("collapse" | "reward_hacking", message with a remedy)], empty for a healthy one.

    metrics: those of each player's last step in the round and of the round's evaluation, by their names in metrics.jsonl; one
    that is missing raises no alarm. before: the row of `evaluate` before the game. limits: {player: its max_new_tokens}."""
    found, m = [], metrics
    collapse = lambda message: found.append(("collapse", message))
    if m.get("diversity/different", 1) < LEAST_DIFFERENT:
        collapse(f"only {m['diversity/different']:.0%} of the attacks differ; raise --diversity or --attacker_kl_coef, or set --restart")
    for name, limit in limits.items():
        entropy, length = m.get(f"{name}/objective/entropy", 1), m.get(f"{name}/response_length", limit / 2)
        if entropy < LEAST_ENTROPY:
            collapse(f"the {name} hardly chooses any more ({entropy:.3f} nats per token); raise its KL penalty or lower its learning rate")
        if limit > 4 and not LENGTHS[0] < length < LENGTHS[1] * limit:
            collapse(f"the {name} says {length:.1f} tokens of at most {limit}; raise its KL penalty, or the limit if it is cut off")
    if m.get("game/over_refusal", 0) > MOST_REFUSED:
        collapse(f"the defender refuses {m['game/over_refusal']:.0%} of the harmless prompts; "
                 "raise --ptx_coef (with --sft_data) or --kl_coef")
    trained, held_out = (m.get(f"game/{key}", before[key]) - before[key] for key in ("asr_train_judge", "asr_held_out_judge"))
    if abs(trained - held_out) > MOST_APART or trained < -OPPOSITE and held_out > OPPOSITE:
        message = (f"since the start attack success has changed by {trained:+.2f} for the training judge, by {held_out:+.2f} for the "
                   "held-out one; read the exchanges (eval.py report), train the judge on them (reward.py), or raise --kl_coef")
        found.append(("reward_hacking", message))
    return found


def load_average(average: PolicyAverage, stem: Path) -> None:
    """Into an empty average what `Run.save_averages` wrote: stem.safetensors and stem.json."""
    average.load_state_dict(load_file(f"{stem}.safetensors"), read_json(f"{stem}.json"))


# --- the run ----------------------------------------------------------------------------------------------------------
class Run:
    """A run's folder, and all state of the game that is not inside a player."""

    stop = 0  # the number of the signal that asks `train` to stop after its present step
    track = bar = None  # track(step, metrics): to TensorBoard or Weights & Biases

    def __init__(self, config: Config, folder: str | Path, world: World, players: dict[str, Player]):
        self.config, self.folder, self.world, self.players = config, Path(folder), world, players
        self.step, self.sampled_tokens = 0, 0  # PPO steps done; tokens sampled by both players for them
        self.memory, self.once = {}, {}  # attack -> its last success; attack -> None where it ever succeeded
        self.before = None  # the first evaluation
        self.test_prompts = {*world.test_prompts, *world.benign_prompts}.union(*world.more_tests.values())  # in no update of the defender
        self.diversity = Diversity(tuple(config.diversity_terms.split(",")), world.embedder, config.history)
        kinds = [kind for kind in config.average.split(",") if kind in ("mixture", "weights")]
        self.averages = {name: {kind: PolicyAverage(kind, config.average_size, config.seed) for kind in kinds} for name in players}
        self.first_attacker, self.first_defender = (Speaker([players[name].reference], players[name]) for name in ("attacker", "defender"))
        self.guard, self.mixtures = self.natural_bounds(), {}
        self.attack_seeds = draw(world.seeds, 300, np.random.default_rng(config.seed))  # the attacker's part of the table
        self.planned, self.resident = 0, 0  # bytes: of the memory plan; held before the models were made

    # --- what the players meet ---------------------------------------------------------------------------
    def opponent(self, name: str) -> Player | Speaker:
        """The frozen player that the mover meets: its last policy or, with `--opponent mixture`, that of all rounds so far."""
        if name == "defender" and self.config.method == "rlhf":
            return self.first_defender
        if self.config.opponent == "last" or not self.averages[name]["mixture"].count:
            return self.players[name]
        count = self.averages[name]["mixture"].count
        if self.mixtures.get(name, (0,))[0] != count:
            self.mixtures[name] = count, self.averages[name]["mixture"].speaker(self.players[name])
        return self.mixtures[name][1]

    def attacks(self, seeds: list[str], seed: int) -> list[str]:
        """Prompts for the defender's turn, written by the frozen attacker."""
        rollout = self.opponent("attacker").speak([self.config.template.format(s) for s in seeds], seed)
        self.count(rollout)
        return rollout.texts

    def remember(self, game: Game, successes_only: bool = False) -> None:
        """What the last try of each attack came to (of several in a batch: the last one); test prompts are forgotten at once."""
        for prompt, p_safe in zip(game.prompts, game.p_safe.tolist()):
            if prompt not in self.test_prompts and (p_safe < 0.5 or not successes_only):
                self.memory[prompt] = 1 - p_safe
                if p_safe < 0.5:
                    self.once[prompt] = None

    def mine(self, n: int, rng: np.random.Generator) -> None:
        """Try n attacks of the first attacker on the defender as it is now, half of them sampled at a higher
        temperature, and remember which succeed. Then try again n of those that ever did: a hole that was closed
        may have come open since."""
        c, (defender, judge) = self.config, (self.players["defender"], self.world.judge)
        seeds = draw(self.world.seeds * (n // len(self.world.seeds) + 1), (n + 1) // 2, rng)
        seeds = [c.template.format(s) for s in seeds]
        attacks = [self.first_attacker.speak(seeds, new_seed(rng), temperature) for temperature in (None, c.mine_temperature)]
        game = play(None, defender, attacks[0].texts + attacks[1].texts, judge, new_seed(rng))
        self.remember(game, successes_only=True)
        self.count(*attacks, *game.sampled)
        if self.once:
            game = play(None, defender, draw(list(self.once), min(n, len(self.once)), rng), judge, new_seed(rng))
            self.remember(game)
            self.count(*game.sampled)

    def replayed(self, n: int, rng: np.random.Generator) -> list[str]:
        """n earlier attacks: three quarters by their last success; one quarter evenly, against forgetting."""
        earlier, success = list(self.memory), np.fromiter(self.memory.values(), dtype=float)
        still_open = np.where(success > 0.5, success, 0)
        chance = 3 * still_open / max(still_open.sum(), 1e-9) + 1 / len(earlier)
        return [earlier[i] for i in rng.choice(len(earlier), n, p=chance / chance.sum())]

    def count(self, *rollouts: Rollout | None) -> None:
        """Add the tokens of these rollouts to the tokens sampled so far."""
        self.sampled_tokens += int(sum(rollout.response_mask.sum() for rollout in rollouts if rollout))

    def natural_bounds(self) -> torch.Tensor:
        """(2,): the `--guard` quantiles of `naturalness` over the first attacker's own attacks."""
        if not self.config.guard:
            return torch.full((2,), -torch.inf)
        seeds = [self.config.template.format(s) for s in draw(self.world.seeds, 256, np.random.default_rng(self.config.seed))]
        natural = naturalness(self.first_attacker.policies[0], self.first_attacker.speak(seeds, self.config.seed))
        return torch.quantile(natural, self.config.guard, dim=0)

    def strange(self, attacks: Rollout) -> np.ndarray:
        """(B,) bool, True where an attack has left the first attacker's language: less natural than the guard."""
        return (naturalness(self.first_attacker.policies[0], attacks) < self.guard).any(1).numpy()

    def stop_asked(self) -> bool:
        """Whether a signal has come to any of the processes: the same in all, or some would wait for ever."""
        if stop := max(in_shares(lambda _: [self.stop], range(world_size()))):
            self.stop = stop
        return bool(stop)

    # --- measuring and logging ---------------------------------------------------------------------------------
    def evaluate(self, attacker: Player | Speaker | None = None, defender: Player | Speaker | None = None, share: int = 1
                 ) -> dict[str, float | None]:
        """A row of the table for the given speakers (default: the players) on 1/share of the test sets."""
        w, c = self.world, self.config
        attacker = None if c.method == "sft" else attacker or self.players["attacker"]
        return evaluate(attacker, defender or self.players["defender"], self.attack_seeds,
                        w.test_prompts[::share], w.benign_prompts[::share], w.judge, w.held_out_judge, w.refused, w.helpful, w.embedder,
                        self.first_defender, c.template)

    def evaluate_round(self, round: int, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of the last iterates after a round, and alarms (over `metrics`, of the last step, too); three held-out
        prompts and their answers go to games.jsonl."""
        row = self.evaluate(share=3)
        prompts = self.world.test_prompts[:3]
        answers = self.players["defender"].speak(prompts, 0, temperature=0).texts
        p_safe = call_judge(self.world.held_out_judge, prompts, answers).tolist()
        self.append("games.jsonl", [
            {"step": self.step, "round": round, "role": "probe", "attack": attack, "response": response, "p_safe": p}
            for attack, response, p in zip(prompts, answers, p_safe)])
        self.bar.set_postfix_str(f"round {round + 1}: held-out attack success {row['asr_held_out_judge']:.1%}")
        found = {f"game/{name}": row[name] for name in ROUND_METRICS if row[name] is not None}
        steps = [] if rank() else [line for line in read_lines(self.folder / "metrics.jsonl") if line["round"] == round]
        latest = {name: value for line in [*steps, metrics, found] for name, value in line.items()}
        raised = alarms(latest, self.before, {name: player.max_new_tokens for name, player in self.players.items()})
        for name, message in raised:
            tqdm.write(f"{name} alarm after round {round + 1}: {message}", file=sys.stderr)
        return found | {f"alarm/{name}": float(name in dict(raised)) for name in ("collapse", "reward_hacking")}

    def append(self, name: str, rows: list[dict]) -> None:
        """Lines for a log, from the first process only."""
        if not rank():
            append_lines(self.folder / name, rows)

    def log(self, role: str, round: int, game: Game, scores: np.ndarray, metrics: dict[str, float]) -> None:
        """One PPO step: its metrics, and all of its exchanges with their scores (B,)."""
        where = {"step": self.step, "round": round, "role": role}
        self.append("metrics.jsonl", [where | metrics])
        names = ("seed", "attack", "response", "p_safe", "score")
        exchanges = zip(game.seeds, game.prompts, game.responses.texts, game.p_safe.tolist(), np.asarray(scores).tolist())
        self.append("games.jsonl", [where | dict(zip(names, exchange)) for exchange in exchanges])
        if self.track:
            self.track(self.step, metrics)
        self.bar.set_description_str(f"round {round + 1}/{self.config.rounds} {role:<8} attack success {1 - game.p_safe.mean():4.0%}")
        self.bar.update(1)

    # --- checkpoints -----------------------------------------------------------------------------------------------
    def save(self) -> None:
        """A checkpoint (`whole_folder`). Its marker is state.json, which is written last and names all other files. It does
        not tell how many processes there were. The one before is kept."""
        target = self.folder / "checkpoints" / f"step_{self.step + 1:06d}"
        with whole_folder(target, not rank()) as temporary:
            for name, player in self.players.items():
                save_weights(player.policy, temporary / f"{name}.safetensors")
                save_weights(player.reference, temporary / f"{name}_reference.safetensors")
                states = player.optimizer.state_dict()["state"]  # {number of a parameter: {part: tensor}}
                moments = on_first({f"{i}.{part}": tensor for i, state in states.items() for part, tensor in state.items()})
                if not rank():
                    save_file(moments, temporary / f"{name}_optimizer.safetensors")
            if rank():  # it has given its shards; the first process writes
                return
            self.save_averages(temporary)
            for log in ("metrics.jsonl", "games.jsonl"):  # no checkpoint outlives the lines before it
                sync(self.folder / log)
            write_json(temporary / "state.json", {
                "step": self.step + 1, "diversity": self.diversity.state_dict(), "memory": self.memory, "once": list(self.once),
                "before": self.before, "sampled_tokens": self.sampled_tokens,
                "skipped": {name: player.skipped_steps for name, player in self.players.items()},
                "files": sorted(path.name for path in temporary.iterdir())})
        older = sorted(path for path in target.parent.glob("*step_*") if path.name < target.name)  # a later one is damaged
        for folder in older[:-1]:
            shutil.rmtree(folder)

    def save_averages(self, folder: Path) -> None:
        """Both players' averages, two files each."""
        for name, kinds in self.averages.items():
            for kind, average in kinds.items():
                tensors, numbers = average.state_dict()
                save_file(tensors, folder / f"{name}_{kind}.safetensors", metadata={k: str(v) for k, v in numbers.items()})
                write_json(folder / f"{name}_{kind}.json", numbers)

    def load(self) -> None:
        """Go on from the newest checkpoint that is whole; lines that were logged after it are dropped."""
        if found := first_decides(self.newest_checkpoint):
            self.load_checkpoint(found)
        for log in (self.folder / "metrics.jsonl", self.folder / "games.jsonl"):
            if log.exists() and not rank():
                lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut off
                write_text(log, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] < self.step))

    def newest_checkpoint(self) -> Path | None:
        """The newest one whose marker is there and whose files can all be read, or None; a damaged one is named."""
        for folder in sorted((self.folder / "checkpoints").glob("step_*"), reverse=True):
            try:
                for file in read_json(folder / "state.json")["files"]:
                    if file.endswith(".json"):
                        read_json(folder / file)
                    else:
                        safe_open(folder / file, "pt")  # it compares the header with the size
                return folder
            except Exception as error:
                print(f"{folder} is damaged and not used: {type(error).__name__}: {first_line(error)}", file=sys.stderr)

    def load_checkpoint(self, folder: Path) -> None:
        """All that `save` wrote."""
        state = read_json(folder / "state.json")
        self.step, self.memory, self.before, self.sampled_tokens = (state[name] for name in ("step", "memory", "before", "sampled_tokens"))
        self.once = dict.fromkeys(state["once"])
        self.diversity.load_state_dict(state["diversity"])
        for name, player in self.players.items():
            load_weights(player.policy, folder / f"{name}.safetensors")
            if self.config.kl_anchor == "previous":
                player.anchor()  # the first reference stays what it is: `first_attacker` and `first_defender` speak with it
            load_weights(player.reference, folder / f"{name}_reference.safetensors")
            self.load_optimizer(player, folder / f"{name}_optimizer.safetensors")
            player.skipped_steps = state["skipped"][name]
            for kind, average in self.averages[name].items():
                load_average(average, folder / f"{name}_{kind}")

    def load_optimizer(self, player: Player, file: Path) -> None:
        """AdamW's moments, each cut as its parameter is."""
        parameters = [p for group in player.optimizer.param_groups for p in group["params"]]
        states = {}
        for key, tensor in sorted(load_file(file).items()):
            i, part = key.split(".")
            states.setdefault(int(i), {})[part] = tensor if part == "step" else from_first(tensor, parameters[int(i)])
        player.optimizer.load_state_dict({"state": states, "param_groups": player.optimizer.state_dict()["param_groups"]})

    # --- the end -------------------------------------------------------------------------------------------------
    def finish(self, seconds: float) -> tuple[dict[str, dict], list[tuple[str, str, str]]]:
        """Evaluate, save the finished players and their averages, write summary, figure and report; returns (rows of the
        table, examples)."""
        rows = {"before": self.before, "after": self.evaluate()}
        averaged = any(average.count for average in self.averages["defender"].values())
        if averaged and "distill" in self.config.average:
            self.distill()
        for kind in self.averages["defender"] if averaged else ():
            speakers = {name: self.averages[name][kind].speaker(player) for name, player in self.players.items()}
            rows[f"average ({kind})"] = self.evaluate(**speakers)
        examples = self.examples()
        for name, player in self.players.items():
            with whole_folder(self.folder / name, not rank()) as temporary:
                save_policy(player.policy, temporary, model_card(name, self.config, rows["after"]))
        if rank():
            return rows, examples
        if averaged:
            with whole_folder(self.folder / "average") as temporary:
                self.save_averages(temporary)
        memory = {"plan_mib": self.planned / 2**20, "used_mib": (peak_memory(self.config.device) - self.resident) / 2**20}
        print(f"memory: {memory['plan_mib']:.0f} MiB planned for the game; the most that was held, libraries and warm start included, "
              f"{memory['used_mib']:.0f} MiB")
        draw_curves(self.folder, rows)
        write_report(self.folder, rows, examples)
        summary = {**rows, "seconds": seconds, "memory": memory, "config": asdict(self.config)}
        write_json(self.folder / "summary.json", summary)  # last: the run is finished
        return rows, examples

    def distill(self) -> None:
        """Add to each player's averages one policy, trained on what its mixture says to attacks and to harmless prompts."""
        c, rng = self.config, np.random.default_rng([self.config.seed, 2**21])
        heard = {"attacker": [c.template.format(s) for s in draw(self.world.seeds, 2000, rng)],
                 "defender": draw(list(self.memory) or self.world.seeds, 1000, rng)}
        heard["defender"] += [prompt for prompt, _ in draw(self.world.demos, 1000, rng)] if self.world.demos else []
        for name, player in self.players.items():
            student, speaker = self.averages[name]["weights"].policy(player.policy), self.averages[name]["mixture"].speaker(player)
            with bar(f"distilling the {name}", c.sft_steps // 2) as progress:
                distill(speaker, student, heard[name], c.sft_steps // 2, 64, SFT_RATE * player.learning_rate, c.seed, progress)
            self.averages[name]["distill"] = PolicyAverage("distill")
            self.averages[name]["distill"].add(student)

    def examples(self) -> list[tuple[str, str, str]]:
        """Three held-out prompts: (prompt, what the defender answered before, what it answers now), the changed ones first."""
        prompts = self.world.test_prompts[:200]
        first, now = (p.speak(prompts, 0, temperature=0).texts for p in (self.first_defender, self.players["defender"]))
        safe = [call_judge(self.world.held_out_judge, prompts, texts) for texts in (first, now)]
        order = np.argsort(safe[0] - safe[1], kind="stable")[:3]  # NaN, undecided, comes last
        return [(prompts[i], first[i], now[i]) for i in order]


# --- before and around a run --------------------------------------------------------------------------------------
def begin(config: Config) -> int:
    """Take the run folder for this process alone, and make a new one with its config.json in one move: from here on it can be
    resumed. Returns the descriptor of the lock, which the system lets go of when the process ends, however it ends."""
    folder = Path(config.out)
    if not config.resume:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as beside:
            (new := Path(beside) / "run").mkdir()
            write_json(new / "config.json", {"config": asdict(config), "versions": _versions(config)})
            os.rename(new, folder)  # an error where another run has just taken it
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(ImportError):  # Windows
        import fcntl
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ValueError(f"a run folder is for one process at a time, and one is at work in {folder}; "
                             "wait for its end or pass another --out") from error
    return lock


def _versions(config):
    """What a run depends on beside its options."""
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    device = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else platform.machine()
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in (torch, transformers, np)},
            "platform": platform.platform(), "device": device, "commit": commit.stdout.strip()}


def prepare(run: Run, start: Path) -> None:
    """Write what the game starts from, and the test sets."""
    with whole_folder(start, not rank()) as temporary:
        for name, player in run.players.items():
            save_policy(player.policy, temporary / name)
        if rank():
            return
        if run.world.judge_to_save:
            run.world.judge_to_save.model.save_pretrained(temporary / "judge")
            save_tokenizer(run.world.judge_to_save.tokenizer, temporary / "judge")
        names = ("seeds", "test_prompts", "benign_prompts", "more_tests")
        write_json(temporary / "prompts.json", {name: getattr(run.world, name) for name in names})
        write_json(temporary / "attack_seeds.json", run.attack_seeds)
        for name in ("metrics.jsonl", "games.jsonl"):
            (run.folder / name).touch()


def tracker(config: Config, folder: Path) -> Callable[[int, dict[str, float]], None]:
    """The function track(step, metrics) of --log. It begins with what metrics.jsonl holds, so a resumed run has each step once."""
    if config.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        writer = SummaryWriter(folder / "tensorboard")

        def track(step, metrics):
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()
    else:
        import wandb
        remote = wandb.init(project="gpo", name=folder.name, config=asdict(config), dir=folder)
        track = lambda step, metrics: remote.log(metrics, step=step)
    for line in read_lines(folder / "metrics.jsonl"):
        track(line.pop("step"), {name: value for name, value in line.items() if name != "role"})
    return track


@contextlib.contextmanager
def stop_after_a_step(run: Run) -> Iterator[None]:
    """Here the first Ctrl-C or SIGTERM lets the present PPO step end; a second one stops at once."""
    def ask(number, frame):
        restore()
        run.stop = number
        os.write(2, b"\nfinishing this PPO step and saving; once more stops at once\n")  # print may be at work just now

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    in_main = threading.current_thread() is threading.main_thread()  # signals reach no other
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        yield
    finally:
        restore()


# --- a finished run, read ---------------------------------------------------------------------------------------------
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where what is finished is evaluated
RESERVOIR = 4  # policies in the small reservoir that is evaluated beside a larger mixture


def kept(mixture: PolicyAverage, members: Sequence[int], kind: str = "mixture", capacity: int | None = None,
         seed: int = 0) -> PolicyAverage:
    """Some members of a mixture as an average of their own: a mixture of them or, with kind "weights", the mean of their
    weights. Beyond `capacity` (default: all) it is a reservoir (Vitter, 1985)."""
    average = PolicyAverage(kind, capacity or len(members), seed)
    for i in members:
        average.add_weights({name: weight.clone() for name, weight in mixture.members[i].items()})
    return average


class FinishedRun:
    """What `train.py` left in a run folder, ready to speak and to be judged.

    config; prompts {set: texts}; attack_seeds; start and end {"attacker" | "defender": Player}, before and after the game;
    judge and held_out_judge; refused(responses); of the toy world also helpful(prompts, responses), cell_of(attack) and
    look_alikes, the harmless prompts that resemble harmful ones. Raises ValueError on an unfinished or a damaged run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "summary.json").is_file():
            raise ValueError(f"a finished run folder with summary.json is needed, got {folder}; "
                             "go on with an unfinished one by train.py --resume")
        try:
            self.load()
        except Exception as error:
            raise ValueError(f"the run in {folder} is damaged: {type(error).__name__}: {error}") from error

    def load(self) -> None:
        """All but the averages, which are read when they are asked for."""
        self.config, start = read_config(self.folder), self.folder / "checkpoints" / "start"
        self.prompts, self.attack_seeds = read_json(start / "prompts.json"), read_json(start / "attack_seeds.json")
        self.start = {name: self.player(name, start / name) for name in ("attacker", "defender")}
        self.end = {name: self.player(name, self.folder / name) for name in ("attacker", "defender")}
        self.mixtures = {}  # of `snapshots`
        self.load_judges(start / "judge")

    def player(self, name: str, folder: Path) -> Player:
        """The player whose weights are in `folder`; with LoRA they are an adapter of the base in checkpoints/start."""
        c, prefix = self.config, "attacker_" if name == "attacker" else ""
        base = self.folder / "checkpoints" / "start" / name if c.get("lora") else folder
        policy = load_policy(base, c["critic"], DTYPES[c["dtype"]], DEVICE, c.get("trust_remote_code", False))
        if c.get("lora"):
            add_lora(policy, c["lora"])
            load_adapter(policy, folder)
        tokens = c["attack_tokens" if name == "attacker" else "response_tokens"]
        sampling = {key: c[key] for key in ("temperature", "top_k", "top_p")}
        return Player(name, policy, tokens, c[f"{prefix}learning_rate"], c[f"{prefix}kl_coef"], **sampling)

    def load_judges(self, trained: Path) -> None:
        """Both judges, what counts as a refusal, the embedder, and what the toy world knows beyond that."""
        c, known, game = self.config, {}, None
        self.refused, self.helpful, self.cell_of, self.look_alikes = refusals, None, None, []
        if not c["attacker"]:
            game = ToyGame(c["seed"])
            known = {"truth": game.ground_truth}
            self.refused, self.helpful, self.cell_of = game.refused, game.helpful, game.cell_of
            self.look_alikes = game.look_alikes(self.prompts["benign_prompts"])
        place = "cpu", c.get("trust_remote_code", False)
        self.judge = load_judge(str(trained) if c["judge"] == "toy" else c["judge"], c["unsafe_label"], known, *place)
        self.held_out_judge = load_judge(c["held_out_judge"], c["unsafe_label"], known, *place)
        self.embedder = game.embed if game and c["embedder"] == "toy" else load_embedder(c["embedder"], *place)

    # --- averages ------------------------------------------------------------------------------------------------
    def average(self, name: str, kind: str) -> PolicyAverage:
        """A player's average as it was saved; kind: mixture, weights or distill."""
        average = PolicyAverage(kind)
        load_average(average, self.folder / "average" / f"{name}_{kind}")
        return average

    def averages(self) -> dict[str, dict[str, Speaker]]:
        """{kind: {player: speaker}} of the averages that were saved, and of a small reservoir in place of a larger mixture."""
        found = {}
        for file in sorted((self.folder / "average").glob("*.safetensors")):
            name, kind = file.stem.split("_")
            kinds = {kind: (average := self.average(name, kind))}
            if kind == "mixture" and len(average.members) > RESERVOIR:
                all_of_them = range(len(average.members))
                kinds[f"reservoir of {RESERVOIR}"] = kept(average, all_of_them, "mixture", RESERVOIR, self.config["seed"])
            for kind, average in kinds.items():
                found.setdefault(kind, {})[name] = average.speaker(self.end[name])
        return found

    def snapshots(self, name: str) -> PolicyAverage:
        """The player's mixture, whose members are its policies after each round. Raises ValueError where one is missing."""
        if name not in self.mixtures:
            if not (self.folder / "average" / f"{name}_mixture.safetensors").is_file():
                raise ValueError(f"a run with --average mixture is needed, got {self.folder}, which kept none")
            mixture = self.average(name, "mixture")
            if mixture.count != len(mixture.members):
                raise ValueError(f"a mixture of all {mixture.count} rounds is needed, got one of {len(mixture.members)}; "
                                 f"train with --average_size {mixture.count}")
            self.mixtures[name] = mixture
        return self.mixtures[name]

    def speaker(self, name: str, rounds: Sequence[int], kind: str = "mixture") -> Speaker:
        """The player as the average of its policies after these rounds, counted from 0; of one round: that policy."""
        return kept(self.snapshots(name), rounds, kind).speaker(self.end[name])

    # --- numbers ---------------------------------------------------------------------------------------------------
    def rows(self, third_parties: Sequence[Player] = ()) -> dict[str, dict]:
        """{"before", "after", "average (...)": `row`} of the players at the start, at the end, and as each average."""
        players = {"before": self.start, "after": self.end}
        players |= {f"average ({kind})": pair for kind, pair in self.averages().items()}
        return {name: self.row(pair["attacker"], pair["defender"], third_parties) for name, pair in players.items()}

    def row(self, attacker: Player | Speaker, defender: Player | Speaker, third_parties: Sequence[Player] = ()) -> dict:
        """One column of the table: `evaluate`, the further test sets, KL in nats, and what the attacker does to strangers."""
        c, p = self.config, self.prompts
        attacker = None if c["method"] == "sft" else attacker
        answers = lambda prompts: defender.speak(prompts, 0, temperature=0).texts
        row = evaluate(attacker, defender, self.attack_seeds, p["test_prompts"], p["benign_prompts"], self.judge, self.held_out_judge,
                       self.refused, self.helpful, self.embedder, self.start["defender"], c["template"])
        for name, prompts in p["more_tests"].items():
            texts = answers(prompts)
            row[f"asr_held_out_judge/{name}"] = unsafe_share(call_judge(self.held_out_judge, prompts, texts))
            row[f"asr_train_judge/{name}"] = unsafe_share(call_judge(self.judge, prompts, texts))
        if self.look_alikes:
            row["over_refusal/look-alikes"] = float(np.mean(self.refused(answers(self.look_alikes))))
        if isinstance(defender, Player):
            row["kl"] = self.kl(defender)
        return row | (self.on_strangers(attacker, third_parties) if third_parties else {})

    def on_strangers(self, attacker: Player | Speaker | None, third_parties: Sequence[Player]) -> dict:
        """Success of one set of attacks (None: of the seeds as they are) against each third party, its mean, and of the
        toy world the number of cells in which any of them was broken."""
        seeds, template = self.attack_seeds, self.config["template"]
        attacks = attacker.speak([template.format(seed) for seed in seeds], 0).texts if attacker else seeds
        p_safe = [call_judge(self.held_out_judge, attacks, third.speak(attacks, 0, temperature=0).texts) for third in third_parties]
        success = [unsafe_share(p) for p in p_safe]
        row = {"third_parties": success, "third_party_success": float(np.mean(success))}
        if self.cell_of:
            broken = (np.array(p_safe) < 0.5).any(0)  # (attacks,), True: by one of them at least
            row["cells"] = len({self.cell_of(attack) for attack, hit in zip(attacks, broken) if hit} - {None})
        return row

    @torch.no_grad()
    def kl(self, defender: Player) -> float:
        """KL(defender || first defender) on held-out prompts, sampled, in nats per response."""
        rollout = defender.speak(self.prompts["test_prompts"][:300] + self.prompts["benign_prompts"][:150], 0)
        policies = defender.policy, self.start["defender"].policy
        now, first = (logprobs_and_values(policy, rollout, with_values=False)[0] for policy in policies)  # (B, T) each
        return ((now - first) * rollout.response_mask).sum(1).mean().item()
