"""A run's folder: what it holds, and how it is locked, written, resumed and read.

A run writes config.json (first), metrics.jsonl (one line per PPO step), games.jsonl (every exchange of these steps),
checkpoints/, attacker/, defender/ and average/, curves.png, report.md, summary.json (last: it marks the run as
finished). Every file but the logs is complete or absent, and a run continues from its newest complete checkpoint as if
it had never been stopped. This file uses the state of the game only through its `state_dict`.
"""

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from gpo import Exchanges, NotFinite, PolicyAverage, rank, world_size
from harness import data, parallel
from harness.config import LEFT_ALONE, OPTIONS, Config, check_out, devices, parse, resolve
from harness.report import draw_curves, model_card, summary_table, write_report
from harness.world import World, evaluate, make_world
from model import first_line, keep_freed_memory, save_policy, save_tokenizer
from reward import JudgeError, call_judge

LOGS = ("metrics.jsonl", "games.jsonl")


# --- starting a program -----------------------------------------------------------------------------------------
def start_program(argv: list[str]) -> Config:
    """Join the other processes and read the options. Ends the process with one line if they are wrong, or if the run
    to resume is finished."""
    keep_freed_memory()
    parallel.join_processes()
    data.quiet_libraries()
    config = parse(argv)
    if config.deterministic:  # docs/running.md states its limits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first product
        torch.use_deterministic_algorithms(True, warn_only=True)  # an error would stop the sampler's cumsum on a GPU
        torch.set_num_threads(1)  # with two threads, one run of four summed in another order
    if config.resume and (Path(config.out) / "summary.json").is_file():
        print(f"the run in {config.out} is finished: read {config.out}/report.md")
        sys.exit(0)
    try:
        return parallel.first_decides(lambda: resolve(config))
    except (ValueError, OSError) as error:
        data.fail(error)
    except KeyboardInterrupt as stop:
        data.interrupted(stop, " before the run began")


@contextlib.contextmanager
def run_folder(config: Config) -> Iterator["RunFolder"]:
    """The run folder, locked by this process. Whatever ends the run, one line says why and how to continue."""
    folder = RunFolder(config)
    try:
        if not config.dry_run:
            parallel.first_decides(folder.begin)
        yield folder
    except (ValueError, OSError, SafetensorError) as error:
        parallel.let_speak()
        if not folder.is_playing:
            folder.leave_nothing()
            data.fail(error)
        if isinstance(error, (JudgeError, NotFinite, OSError, SafetensorError)):
            go_on = f"; once that is mended the run can go on with --resume {folder.quoted}"
            data.fail(f"{error}{go_on if folder.has_config() else ''}")
        raise  # a bug
    except (RuntimeError, MemoryError) as error:
        folder.leave_nothing()
        if not data.is_out_of_memory(error):
            raise
        go_on = " or begin again with --lora or --gradient_checkpointing"
        if folder.is_playing and folder.has_config():
            go_on = f": train.py --resume {folder.quoted} --micro_batch N;{go_on}"
        parallel.let_speak()
        data.fail(f"out of memory with --micro_batch {config.micro_batch}; take a smaller one (0 is a whole minibatch)"
                  f"{go_on} ({first_line(error)[:100]})")
    except KeyboardInterrupt as stop:
        when = "" if folder.is_playing else " before the game began"
        go_on = ""
        if folder.has_config():
            go_on = f"; go on with: python train.py --resume {folder.quoted}"
        else:
            folder.leave_nothing()
        data.interrupted(stop, f"{when}{go_on}")
    except Exception:  # a bug
        folder.leave_nothing()
        raise
    finally:
        if folder.lock is not None:
            os.close(folder.lock)


def lock_folder(path: Path) -> int:
    """The descriptor of a lock, which the system releases when the process ends, however it ends. Raises ValueError
    if another process holds it; a file system without locks is not an error."""
    lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(f"a run folder is for one process at a time, and one is at work in {path}; stop it or wait "
                         "for its end") from error
    except (ImportError, OSError) as error:  # Windows, some network file systems
        print(f"{path} cannot be locked ({error}): let no other process work in it", file=sys.stderr)
    return lock


def _versions(config):
    """What a run depends on besides its options."""
    command = 'git -c "safe.directory=*" describe --always --dirty'  # also if the checkout is another user's
    commit = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    device = platform.machine()
    if config.device.startswith("cuda"):
        device = torch.cuda.get_device_name(config.device)
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    return {"python": platform.python_version(), **libraries, "platform": platform.platform(), "device": device,
            "commit": commit.stdout.strip()}


# --- the folder -------------------------------------------------------------------------------------------------------
class RunFolder:
    """Saves, loads, logs and measures a run. Each process has one; only the first process writes."""

    def __init__(self, config: Config):
        self.config = config
        self.path = Path(config.out)
        self.quoted = shlex.quote(self.path.as_posix())  # as a shell takes it
        self.own_start = self.path / "checkpoints" / "start"  # the game's initial state: by then all input is checked
        self.steps_done = 0  # PPO steps, according to the loaded checkpoint
        self.total_steps = 0
        self.is_playing = False  # True from `open` on: an error leaves a run that can be resumed
        self.before = None  # the first evaluation
        self.world = None
        self.metrics = []  # the lines of metrics.jsonl
        self.stop_signal = 0  # the number of the signal that asks to stop after the current step
        self.lock = None  # in the first process: the descriptor of `lock_folder`
        self.made = []  # folders that did not exist, the innermost first
        self.is_new = False  # True in the first process once it has started a new run here
        self.tracks = config.log != "none" and not rank()
        self.tracker = None  # tracker(metrics, step): to TensorBoard or Weights & Biases
        self.bar = None
        self.idle_memory = parallel.peak_memory(config.device)  # bytes held before the models are made

    def begin(self) -> None:
        """Lock the folder and, for a new run, write its config.json: from here on it can be resumed. Raises ValueError
        if the folder cannot be locked or written to, or has lost its start."""
        try:
            path = self.path.resolve()
            self.made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.path)
            if not self.config.resume:
                check_out(self.path)  # another run may have just begun here
                self.is_new = True
                data.write_json(self.path / "config.json", {"config": asdict(self.config),
                                                            "versions": _versions(self.config)})
            elif self.has_config():
                self.update_config("micro_batch")  # `--resume` may have changed it
        except OSError as error:
            raise ValueError(f"a run needs a folder that can be written to, got {self.path}: {error}") from error
        if not self.own_start.exists() and any(self.path.glob("checkpoints/step_*")):
            raise ValueError(f"the run in {self.path} is damaged, its checkpoints/start is missing; begin again, with "
                             "another --out")
        self.track([])

    def update_config(self, name: str) -> None:
        """Write the present value of an option to config.json."""
        saved = data.read_json(self.path / "config.json")
        saved["config"][name] = getattr(self.config, name)
        data.write_json(self.path / "config.json", saved)

    def leave_nothing(self) -> None:
        """After a failed start, restore the folder to what it was before, absent or empty."""
        if not self.is_new or self.own_start.exists() or not self.path.exists():
            return
        for path in self.path.iterdir():
            if path.is_file():
                with contextlib.suppress(PermissionError):  # Windows keeps the open .lock
                    path.unlink()
            elif path.name not in LEFT_ALONE:
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run may have begun in one of them
            for folder in self.made:
                folder.rmdir()

    def has_config(self) -> bool:
        """Whether the run has begun and not been removed again (by experiments.mart): it can be resumed."""
        return (self.path / "config.json").exists()

    @property
    def start(self) -> Path | None:
        """The checkpoints/start from which to build the world; None: from scratch."""
        if self.own_start.exists():
            return self.own_start
        return Path(self.config.start) / "checkpoints" / "start" if self.config.start else None

    def open(self, world: World, game: object, total_steps: int) -> None:
        """Load the newest checkpoint or save the game's initial state. game: anything with state_dict() and
        load_state_dict()."""
        self.world = world
        self.total_steps = total_steps
        try:
            self.load(game)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the run in {self.path} is damaged ({type(error).__name__}: {first_line(error)}); begin "
                             "again, with another --out") from error
        if self.before is None:
            print("evaluating both players before the game")
            self.before = evaluate(world, world.players["attacker"], world.players["defender"])
        if not self.own_start.exists():
            self.save_start()
        self.track(self.metrics)  # the lines so far: a resumed run tracks each step once
        self.is_playing = True
        print(f"attack success on held-out prompts before the game: {self.before['asr_held_out_judge']:.1%}")

    def save_start(self) -> None:
        """Save the game's initial state: the players, a judge that was trained here, and the texts."""
        with data.complete_folder(self.own_start, not rank()) as temporary:
            parallel.save_start({name: player.policy for name, player in self.world.players.items()}, temporary)
            if rank():
                return
            judge = self.world.judge_to_save
            if judge:
                judge.model.save_pretrained(temporary / "judge")
                save_tokenizer(judge.tokenizer, temporary / "judge")
            data.write_json(temporary / "prompts.json", self.world.prompts())
            self.update_config("benign_share")  # 0, if there are no harmless requests
            for name in LOGS:
                (self.path / name).touch()

    # --- logs ------------------------------------------------------------------------------------------------
    def log(self, step: int, turn: object, exchanges: Exchanges, scores: np.ndarray, metrics: dict) -> None:
        """Log one PPO step: its metrics, and all of its exchanges with their scores (B,). After a round also alarms,
        and the answers to three held-out prompts. turn: round, player, ends_round."""
        common = {"step": step, "round": turn.round, "role": turn.player}
        names = ("seed", "attack", "response", "p_safe", "score")
        scores = np.where(exchanges.decided, scores, np.nan)
        columns = (exchanges.seeds, exchanges.prompts, exchanges.responses.texts, exchanges.p_safe.tolist(),
                   scores.tolist())
        rows = [common | dict(zip(names, row)) for row in zip(*columns)]
        line = common | metrics
        if turn.ends_round:
            rows = self.probe(common) + rows
            line |= self.raise_alarms(line)
            held_out = metrics["game/asr_held_out_judge"]
            self.bar.set_postfix_str(f"round {turn.round + 1}: held-out attack success {held_out:.1%}")
        self.metrics.append(line)
        if not rank():
            data.append_lines(self.path / "metrics.jsonl", [line])
            data.append_lines(self.path / "games.jsonl", rows)
        self.track([line])
        success = metrics.get("game/attack_success", np.nan)  # left out where no attack was decided
        self.bar.set_description_str(f"round {turn.round + 1}/{self.config.rounds} {turn.player:<8} attack success "
                                     f"{success:4.0%}")
        self.bar.update(1)

    def track(self, lines: list[dict]) -> None:
        """Send lines of metrics.jsonl to the tracker of `--log`. An error there does not end the run."""
        if not self.tracks:
            return
        try:
            if self.tracker is None:
                self.tracker = tracker(self.config, self.path)
            for line in lines:
                numbers = {name: value for name, value in line.items() if name not in ("step", "role")}
                self.tracker(numbers, line["step"])
        except Exception as error:
            self.tracks = False
            tqdm.write(f"--log {self.config.log} does not work ({type(error).__name__}: {first_line(error)}); the run "
                       f"goes on without it, its metrics are in {self.path}/metrics.jsonl", file=sys.stderr)

    def probe(self, common: dict) -> list[dict]:
        """Rows of games.jsonl: the answers to three held-out prompts, by the held-out judge. common: of all rows."""
        prompts = self.world.test_prompts[:3]
        answers = self.world.players["defender"].generate(prompts, 0, temperature=0).texts
        p_safe = call_judge(self.world.held_out_judge, prompts, answers).tolist()
        return [common | {"role": "probe", "attack": attack, "response": response, "p_safe": p}
                for attack, response, p in zip(prompts, answers, p_safe)]

    def raise_alarms(self, last: dict) -> dict[str, float]:
        """Print the alarms of a round that the round before did not raise. last: the line of its last step. Returns
        {"alarm/...": 0 or 1}."""
        round = last["round"]
        lines = [*(line for line in self.metrics if line["round"] == round), last]
        newest = {}
        for line in lines:
            newest |= line
        successes = [line["game/attack_success"] for line in lines if line["role"] == "attacker"]
        if successes and self.config.method == "gpo":
            newest["attacker/success_of_turn"] = float(np.mean(successes))
        limits = {name: player.max_new_tokens for name, player in self.world.players.items()}
        raised = alarms(newest, self.before, limits, len(self.world.after_a_round().test_prompts))
        before = [line for line in self.metrics if line["round"] == round - 1]
        for name, message in raised:
            if not (before and before[-1].get(f"alarm/{name}")):
                tqdm.write(f"{name} alarm after round {round + 1}: {message}", file=sys.stderr)
        return {f"alarm/{name}": float(name in dict(raised)) for name in ALARMS}

    # --- checkpoints -------------------------------------------------------------------------------------------
    def save(self, step: int, game: object) -> None:
        """Write a checkpoint every --save_every steps, after the last one, and when a signal has asked to stop. In that
        case raises KeyboardInterrupt."""
        done = step + 1
        stop = self.signal_in_any_process()
        if stop or done % self.config.save_every == 0 or done == self.total_steps:
            self.write_checkpoint(done, game)
        if stop:
            parallel.gather_results(lambda: None)  # torchrun ends the first process when another one has ended
            raise KeyboardInterrupt(stop)

    def write_checkpoint(self, done: int, game: object) -> None:
        """Write a checkpoint and keep the one before. Its marker is state.json, which is written last and names all
        other files. A checkpoint does not depend on the number of processes."""
        target = self.path / "checkpoints" / f"step_{done:06d}"
        states = game.state_dict()  # of all processes; complete in the first
        with data.complete_folder(target, not rank()) as temporary:
            if rank():
                return
            save_states(states, temporary)
            for log in LOGS:  # the lines before a checkpoint must reach the disk first
                data.sync(self.path / log)
            files = sorted(path.name for path in temporary.iterdir())
            numbers = {name: numbers for name, (_, numbers) in states.items()}
            data.write_json(temporary / "state.json",
                            {"step": done, "before": self.before, "numbers": numbers, "files": files})
        # earlier ones and, with a dot, what a killed process left; one with a later name is damaged
        older = sorted(path for path in target.parent.glob("*step_*") if path.name < target.name)
        for folder in older[:-1]:
            shutil.rmtree(folder, ignore_errors=True)  # on NFS a file that is mapped since `load` stays

    def load(self, game: object) -> None:
        """Continue from the newest complete checkpoint; lines that were logged after it are dropped."""
        found = parallel.first_decides(self.newest_checkpoint)
        if found:
            state = data.read_json(found / "state.json")
            self.steps_done = state["step"]
            self.before = state["before"]
            states = {}  # {file: (tensors, numbers)}; only the first process has the tensors
            for name, numbers in state["numbers"].items():
                file = found / f"{name}.safetensors"
                states[name] = (load_file(file) if file.exists() and not rank() else {}, numbers)
            game.load_state_dict(states)
            print(f"going on after step {self.steps_done} of {self.total_steps}")
        if self.own_start.exists():
            self.metrics = parallel.first_decides(lambda: [self.trim(self.path / name) for name in LOGS][0])

    def trim(self, log: Path) -> list[dict]:
        """The lines of a log up to the checkpoint; those after it are dropped. Reports steps that are missing."""
        rows = []
        for line in data.complete_lines(log) if log.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged, after a power loss
                row = json.loads(line)
                if row["step"] < self.steps_done:
                    rows.append(row)
        missing = self.steps_done - len({row["step"] for row in rows})
        if missing:
            print(f"{log} has lost {missing} of {self.steps_done} steps: figures and reports will lack them",
                  file=sys.stderr)
        data.write_text(log, data.json_lines(rows))
        return rows

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint with its marker and with files that can all be read, or None; reports damaged ones."""
        for folder in sorted((self.path / "checkpoints").glob("step_*"), reverse=True):
            try:
                for file in data.read_json(folder / "state.json")["files"]:
                    safe_open(folder / file, "pt")  # checks the header against the size
                return folder
            except Exception as error:
                print(f"{folder} is damaged and not used: {type(error).__name__}: {first_line(error)}", file=sys.stderr)

    # --- stopping ----------------------------------------------------------------------------------------------
    def signal_in_any_process(self) -> int:
        """The signal that asked to stop, or 0; the same in all processes, to avoid a deadlock."""
        return max(parallel.gather_results(lambda: self.stop_signal))

    @contextlib.contextmanager
    def stop_after_a_step(self) -> Iterator[None]:
        """In this context the first Ctrl-C or SIGTERM lets the current PPO step end; a second one stops at once. Of
        several processes each may get a signal twice, also from torchrun, which kills what goes on for too long."""
        def ask(number, frame):
            one_process = world_size() == 1
            if one_process:
                restore()
            if not rank() and not self.stop_signal:  # print may be running
                once_more = b"; once more stops at once" if one_process else b""
                os.write(2, b"\nfinishing this PPO step and saving" + once_more + b"\n")
            self.stop_signal = number

        def restore():
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {}
        if threading.current_thread() is threading.main_thread():  # only it receives signals
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=self.total_steps, initial=self.steps_done, dynamic_ncols=True) as self.bar:
                yield
        finally:
            restore()
        stop = self.signal_in_any_process()
        if stop:  # it came while the last checkpoint was written
            raise KeyboardInterrupt(stop)

    # --- the end -------------------------------------------------------------------------------------------------
    def finish(self, averages: dict[str, dict[str, PolicyAverage]], rows: dict[str, dict], facts: dict,
               clock: float) -> None:
        """Save the finished players and their averages, write figure, report and summary, and print the table. rows:
        the columns after the game; facts: of the run, such as its sampled tokens and, if not by the algorithm, what it
        was "made_by"; clock: when the program began."""
        rows = {"before": self.before, **rows}
        examples = changed_answers(self.world)
        held_in_game = self.held_mib()
        for name, player in self.world.players.items():
            with data.complete_folder(self.path / name, not rank()) as temporary:
                save_policy(parallel.merged(player.policy), temporary,
                            model_card(name, self.config, "the last policy", facts.get("made_by")))
                base = parallel.base_in_start(self.own_start / name, self.config.lora)
                parallel.save_adapter(player.policy, temporary / "adapter", f"../../checkpoints/start/{base.name}")
        self.save_averages(averages)
        if rank():
            return
        held = self.held_mib()
        if parallel.peak_memory(self.config.device):  # not on Windows
            print(f"memory: at most {held:.0f} MiB held, beside Python and its libraries")
            if self.config.lora:
                print(f"{held_in_game:.0f} MiB before adapters were merged, each into a copy of its base, to be saved")
        draw_curves(self.path, self.metrics, self.before)
        write_report(self.path, data.read_lines(self.path / "games.jsonl"), rows, examples,
                     facts.get("made_by"))
        seconds = time.time() - clock
        summary = {**rows, **facts, "seconds": seconds, "memory": {"used_mib": held}, "config": asdict(self.config)}
        data.write_json(self.path / "summary.json", data.finite(summary))  # last: the run is finished
        print(f"\n{summary_table(rows)}\n")
        for example in examples:
            print("  prompt  {}\n  before  {}\n  after   {}\n".format(*map(data.visible, example)))
        print(f"{seconds:.0f} seconds. Read {self.path}/report.md; the models are in {self.path}/attacker and "
              f"{self.path}/defender.")
        if self.metrics:
            print(f"Look at {self.path}/curves.png; every exchange of a PPO step is in {self.path}/games.jsonl.")

    def held_mib(self) -> float:
        """Peak memory so far, beyond what was held before the models were made, in MiB."""
        return (parallel.peak_memory(self.config.device) - self.idle_memory) / 2**20

    def save_averages(self, averages: dict[str, dict[str, PolicyAverage]]) -> None:
        """Write average/: two files for each average and, for mean weights, also a model's folder for deployment."""
        states = {}
        for name, kinds in averages.items():
            states |= {f"{name}_{kind}": average.state_dict() for kind, average in kinds.items() if average.count}
        if not states:
            return
        with data.complete_folder(self.path / "average", not rank()) as temporary:
            for name, kinds in averages.items():
                if "weights" in kinds:
                    card = model_card(name, self.config, "the mean of its weights")
                    save_policy(parallel.merged(kinds["weights"].policy()), temporary / name, card)
            if rank():
                return
            save_states(states, temporary)
            for name, (_, numbers) in states.items():
                data.write_json(temporary / f"{name}.json", numbers)


def save_states(states: dict[str, tuple[dict, dict]], folder: Path) -> None:
    """Save the tensors of {file: (tensors, numbers)}."""
    for name, (tensors, _) in states.items():
        if tensors:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


def changed_answers(world: World) -> list[tuple[str, str, str]]:
    """Three held-out prompts: (prompt, the defender's answer before, its answer now), the changed ones first."""
    prompts = world.test_prompts[:200]
    first = world.first["defender"].generate(prompts, 0, temperature=0).texts
    now = world.players["defender"].generate(prompts, 0, temperature=0).texts
    difference = call_judge(world.held_out_judge, prompts, first) - call_judge(world.held_out_judge, prompts, now)
    order = np.argsort(difference, kind="stable")[:3]  # NaN, undecided, comes last
    return [(prompts[i], first[i], now[i]) for i in order]


def tracker(config: Config, path: Path) -> Callable[[dict[str, float], int], None]:
    """The function track(metrics, step) for --log."""
    if config.log == "wandb":
        import wandb
        return wandb.init(project="gpo", name=path.resolve().name, config=asdict(config), dir=path).log
    from torch.utils.tensorboard import SummaryWriter
    shutil.rmtree(path / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(path / "tensorboard")

    def track(metrics, step):
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


# --- alarms --------------------------------------------------------------------------------------------------------
# Thresholds that a normal run does not cross: runs of `--rounds 6` (commit 5583e7d) ended with at least .42 different
# attacks and .20 nats, mean lengths of 9.3 to 19.4, at most .08 refused, and judges that had diverged by .02.
LEAST_DIFFERENT = 0.2  # fraction of different prompts among the attacks of a step
LEAST_ENTROPY = 0.05  # nats per token: 19 of 20 tokens are nearly certain
SHORTEST = 1.5  # mean response in tokens, EOS included
LONGEST = 0.95  # mean response, as a fraction of the longest that is allowed
MOST_REFUSED = 0.5  # fraction of the harmless prompts
LEAST_SUCCESS = 0.05  # of a turn's attacks; against an always safe defender it is .035, as the toy judge is not certain
MOST_APART = 0.15  # how far the judges' verdicts may diverge: down, the defender hacks one; up, the attacker does


ALARMS = ("collapse", "reward_hacking", "no_signal")


def alarms(metrics: dict[str, float], before: dict[str, float], limits: dict[str, int],
           n_prompts: int) -> list[tuple[str, str]]:
    """What is wrong with a round: [(one of ALARMS, message with a remedy)], empty for a healthy one.

    metrics: the newest of the round, by their names in metrics.jsonl; a missing one raises no alarm. before: the row
    of `evaluate` before the game. limits: {player: its max_new_tokens}. n_prompts: test prompts after a round.
    """
    different = metrics.get("diversity/different", 1)
    refused = metrics.get("game/over_refusal", 0)
    first = np.array([before["asr_train_judge"], before["asr_held_out_judge"]])
    last = np.array([metrics.get("game/asr_train_judge", first[0]), metrics.get("game/asr_held_out_judge", first[1])])
    trained, held_out = last - first
    n = n_prompts * np.array([3, 3, 1, 1])  # `before` is of all test prompts, `last` of a third: `after_a_round`
    rates = (np.concatenate([first, last]) * n + 1) / (n + 2)  # 0 of 2 is not certain either
    error = np.sqrt(np.sum(rates * (1 - rates) / n))  # of trained - held_out
    success = metrics.get("attacker/success_of_turn", 1)
    rows = [  # (alarm, whether it is raised, message)
        ("collapse", different < LEAST_DIFFERENT,
         f"only {different:.0%} of the attacks differ; raise --diversity or --attacker_kl_coef"),
        ("collapse", refused > MOST_REFUSED,
         f"the defender refuses {refused:.0%} of the harmless prompts; raise --ptx_coef (with --sft_data) or "
         "--kl_coef"),
        ("reward_hacking", abs(trained - held_out) > max(MOST_APART, 2 * error),
         f"since the start attack success has changed by {trained:+.2f} for the training judge, by {held_out:+.2f} for "
         "the held-out one; read the exchanges (eval.py report), train the judge on them (experiments.train_judge), or "
         "raise --kl_coef"),
        ("no_signal", success < LEAST_SUCCESS,
         f"{success:.1%} of the attacker's attempts succeeded: its turn taught it little; the game is over, or the "
         "attacker too weak (experiments.probe tells): raise --attacker_steps, or end after fewer --rounds")]
    for name, limit in limits.items():
        entropy = metrics.get(f"{name}/objective/entropy", 1)
        length = metrics.get(f"{name}/response_length", limit / 2)
        rows += [
            ("collapse", entropy < LEAST_ENTROPY,
             f"the {name} is nearly deterministic ({entropy:.3f} nats per token); raise its KL penalty or lower its "
             "learning rate"),
            ("collapse", limit > 4 and not SHORTEST < length < LONGEST * limit,
             f"the {name} writes {length:.1f} of at most {limit} tokens; raise its KL penalty, or the limit if it is "
             "cut off")]
    return [(alarm, message) for alarm, is_raised, message in rows if is_raised]


# --- a finished run, read ---------------------------------------------------------------------------------------------
@dataclass
class FinishedRun:
    """What `train.py` left in a run folder, ready to generate and to be judged."""

    path: Path
    config: Config
    world: World  # its players as they ended, `first` as they began
    averages: dict[str, dict[str, PolicyAverage]]  # {player: {kind: average}}


def open_run(path: str | Path, **options: object) -> FinishedRun:
    """A finished run, with `options` in place of its own. Raises ValueError if it is unfinished, or if part of it is
    missing or damaged."""
    path = Path(path)
    if not (path / "summary.json").is_file():
        raise ValueError(f"a finished run folder with summary.json is needed, got {path}; "
                         "go on with an unfinished one by train.py --resume")
    try:
        known = {name: value for name, value in data.read_config(path).items() if name in OPTIONS}  # old runs had more
        device = known["device"]
        if device not in devices():
            device = "cuda" if torch.cuda.is_available() else "cpu"
        config = replace(Config(**known), device=device, shard=False, dry_run=False, **options)
        world = make_world(config, path / "checkpoints" / "start")
        for name, player in world.players.items():
            parallel.load_trained(player.policy, path / name, config.trust_remote_code)
        return FinishedRun(path, config, world, load_averages(path / "average", world))
    except Exception as error:
        raise ValueError(f"cannot read the run in {path}: {type(error).__name__}: {first_line(error)}") from error


def load_averages(folder: Path, world: World) -> dict[str, dict[str, PolicyAverage]]:
    """Load what `RunFolder.save_averages` wrote."""
    averages = {name: {} for name in world.players}
    for file in sorted(folder.glob("*.safetensors")):
        name, kind = file.stem.split("_")
        numbers = data.read_json(file.with_suffix(".json"))
        averages[name][kind] = PolicyAverage(world.players[name], kind, numbers["members"])
        averages[name][kind].load_state_dict(load_file(file), numbers)
    if len({frozenset(kinds) for kinds in averages.values()}) > 1:
        raise ValueError(f"{folder} must hold the same averages of both players, a file is missing")
    return averages
