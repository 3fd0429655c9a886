"""A finished run's folder: `FinishedRun` is what `train.py` left there, ready to speak and to be judged."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from diversity import load_embedder, word_embedder
from gpo import Player, PolicyAverage, Speaker, evaluate
from model import DTYPES, add_lora, load_adapter, load_policy, logprobs_and_values
from reward import call_judge, is_refusal, load_judge, unsafe_share
from toy import ToyGame

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
        start, read = self.folder / "checkpoints" / "start", lambda file: json.loads(file.read_text(encoding="utf-8"))
        self.config = read(self.folder / "config.json")["config"]
        self.prompts, self.attack_seeds = read(start / "prompts.json"), read(start / "attack_seeds.json")
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
        c, known, embedders = self.config, {}, {"words": word_embedder}
        self.refused, self.helpful, self.cell_of, self.look_alikes = lambda responses: [float(is_refusal(r)) for r in responses], None, None, []
        if not c["attacker"]:
            game = ToyGame(c["seed"])
            known, embedders["toy"] = {"truth": game.ground_truth}, game.embed
            self.refused, self.helpful, self.cell_of = game.refused, game.helpful, game.cell_of
            self.look_alikes = game.look_alikes(self.prompts["benign_prompts"])
        place = "cpu", c.get("trust_remote_code", False)
        self.judge = load_judge(str(trained) if c["judge"] == "toy" else c["judge"], c["unsafe_label"], known, *place)
        self.held_out_judge = load_judge(c["held_out_judge"], c["unsafe_label"], known, *place)
        self.embedder = embedders.get(c["embedder"]) or load_embedder(c["embedder"], *place)

    # --- averages ------------------------------------------------------------------------------------------------
    def average(self, name: str, kind: str) -> PolicyAverage:
        stem, average = self.folder / "average" / f"{name}_{kind}", PolicyAverage(kind)
        average.load_state_dict(load_file(f"{stem}.safetensors"), json.loads(Path(f"{stem}.json").read_text()))
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
