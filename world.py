"""What a game is played with, apart from the algorithm: both policies, prompts, demonstrations, judges, an embedder.

`toy_world` makes the embedded game from nothing and warm-starts both players. `own_world` brings in your own models and data,
from local paths or from the hub. `make_players` then gives each policy its critic, reference and optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import HUB_DATA, first_turn, hub_file, is_test, plain, read_json, read_rows, usable, visible
from diversity import Embedder, load_embedder
from gpo import Player, sft
from model import DTYPES, Policy, load_policy
from options import Config
from reward import Judge, call_judge, load_judge, refusals, train_judge
from scale import add_lora, checkpoint_blocks, fold_lora, load_whole, memory_plan, model_size, player_memory, shard, world_size
from toy import ToyGame, toy_classifier, toy_lm

SFT_RATE = 5  # the warm start's learning rate for your own models, in units of the player's PPO learning rate


@dataclass
class World:
    """What a game is played with, apart from the algorithm."""

    attacker: Policy
    defender: Policy
    seeds: list[str]  # the fixed prompts: seeds of the attacker, and all that RLHF ever sees
    test_prompts: list[str]
    benign_prompts: list[str]
    demos: list[tuple[str, str]]  # (prompt, response) pairs for --ptx_coef
    judge: Judge
    held_out_judge: Judge
    refused: Callable  # list of responses -> list of 0.0 / 1.0
    helpful: Judge | None  # of helpfulness
    embedder: Embedder
    judge_to_save: Judge | None = None  # a judge that was trained here
    more_tests: dict[str, list[str]] = field(default_factory=dict)  # {name: further test prompts}, for eval.py


def make_world(config: Config, start: Path | None = None) -> World:
    """The world that the options ask for. start: a folder where an earlier run left what it began with; nothing is trained then.
    Raises ValueError, OSError."""
    return (own_world if config.attacker else toy_world)(config, start)


def make_players(config: Config, world: World) -> dict[str, Player]:
    """Both players by name, each with its own critic, reference and optimizer."""
    shared = dict(epochs=config.ppo_epochs, minibatches=config.minibatches, micro_batch=config.micro_batch, target_kl=config.target_kl,
                  temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    return {
        "attacker": Player("attacker", world.attacker, config.attack_tokens, config.attacker_learning_rate, config.attacker_kl_coef,
                           config.entropy_coef, **shared),
        "defender": Player("defender", world.defender, config.response_tokens, config.learning_rate, config.kl_coef, **shared)}


def plan_memory(config: Config, world: World, players: dict[str, Player]) -> float:
    """Print what the game will need beside its data (the warm start before it is not counted); returns its largest moment in bytes."""
    plan, references = {}, 1 + (config.kl_anchor == "previous")  # the first policies, and those of the last round
    for name, player in players.items():
        prompts = [config.template.format(s) for s in world.seeds] if name == "attacker" else world.seeds + world.test_prompts
        plan[name] = player_memory(
            **model_size(player.policy.lm), rows=config.micro_batch or -(-config.batch_size // config.minibatches),
            prompt_tokens=max(map(len, player.policy.encode(prompts))), new_tokens=player.max_new_tokens,
            sampled_rows=4 * config.micro_batch or 256, bf16=config.dtype == "bf16", lora=config.lora,
            separate_critic=config.critic == "separate", references=references, checkpointing=config.gradient_checkpointing,
            device=config.device.split(":")[0], ranks=world_size() if config.shard else 1)
    models = {"judge": world.judge, "held-out judge": world.held_out_judge, "embedder": world.embedder}
    models = {what: f.model for what, f in models.items() if hasattr(getattr(f, "model", None), "parameters")}
    others = {what: sum(p.numel() * p.element_size() for p in model.parameters()) for what, model in models.items()}
    if config.device == "cpu":  # else they are in main memory
        kept = ("mixture" in config.average) * min(config.average_size, config.rounds) + ("weights" in config.average)
        others["averages"] = kept * sum(p["reference"] for p in plan.values()) / references
    table, most = memory_plan(plan, others)
    print(table)
    return most


def draw(items: list, n: int, rng: np.random.Generator) -> list:
    """n of the items, without repetition where there are enough."""
    return [items[i] for i in rng.choice(len(items), n, replace=n > len(items))]


def bar(name: str, total: int) -> tqdm:
    """A progress bar as all of ours look."""
    return tqdm(total=total, desc=f"{name:<22}", dynamic_ncols=True)


def _slim(policy, config):
    """The policy with what the options ask for to save memory."""
    if config.lora:
        add_lora(policy, config.lora, config.seed)
    if config.gradient_checkpointing:
        checkpoint_blocks(policy)
    return policy


# --- the embedded game ------------------------------------------------------------------------------------------
def toy_world(config: Config, start: Path | None = None) -> World:
    """The embedded game: fresh small models, warm-started, and a judge trained on noisy samples."""
    game, place = ToyGame(config.seed), (config.device, config.trust_remote_code)
    known = {"truth": game.ground_truth}
    if config.judge != "toy":
        known["chosen"] = load_judge(config.judge, config.unsafe_label, known, *place)
    elif start:
        known["chosen"] = load_judge(str(start / "judge"), device=config.device)
    held_out = load_judge(config.held_out_judge, config.unsafe_label, known, *place)
    embedder = game.embed if config.embedder == "toy" else load_embedder(config.embedder, *place)
    rng = np.random.default_rng([config.seed, 2**20])
    torch.manual_seed(config.seed)
    policies, samples = _toy_players(config, game, start, rng)
    if "chosen" not in known:
        known["chosen"] = _toy_judge(config, game, policies["attacker"], rng)
    rng = np.random.default_rng([config.seed, 2**20 + 1])  # the test sets are the same whatever was trained above
    tests = game.test_sets(config.eval_prompts, rng)
    return World(
        policies["attacker"], policies["defender"], seeds=game.fixed_prompts, test_prompts=tests.pop("in distribution"), more_tests=tests,
        benign_prompts=game.sample_prompts(max(1, config.eval_prompts // 2), rng, harmful=False, held_out=True),
        demos=[pair for pair in samples["defender"] if game.is_demonstration(*pair)], judge=known["chosen"], held_out_judge=held_out,
        refused=game.refused, helpful=game.helpful, embedder=embedder, judge_to_save=known["chosen"] if config.judge == "toy" else None)


def _toy_players(config, game, start, rng):
    """({name: policy}, {name: (prompt, response) samples}): made and warm-started, or read from `start`."""
    tokenizer = game.tokenizer()
    n = min(30_000, 64 * config.sft_steps + 1000)
    samples = {"defender": game.defender_sft(n, rng)}
    samples["attacker"] = [(config.template.format(prompt), attack) for prompt, attack in game.attacker_sft(n, rng)]
    policies = {}
    for name, new_tokens in (("defender", config.response_tokens), ("attacker", config.attack_tokens)):
        policies[name] = (load_policy(start / name, config.critic, DTYPES[config.dtype], config.device) if start else
                          Policy(toy_lm(tokenizer).to(config.device), tokenizer, config.critic, DTYPES[config.dtype]))
        _check_room(name, policies[name], game.fixed_prompts, new_tokens)
        if config.shard:
            shard(policies[name], policies[name].device.type)
    for i, (name, pairs) in enumerate(samples.items() if not (start or config.dry_run) else []):
        with bar(f"SFT of the {name}", config.sft_steps) as progress:
            sft(policies[name], pairs, config.sft_steps, 64, 3e-3, [config.seed, i], progress, config.micro_batch)
    return {name: _slim(policy, config) for name, policy in policies.items()}, samples  # only now: fresh models learn with all weights


def _check_room(name, policy, prompts, new_tokens):
    lengths = [len(ids) for ids in policy.encode(prompts)]
    longest = int(np.argmax(lengths))
    if lengths[longest] + new_tokens > policy.context:
        raise ValueError(f"the {name} must hold a prompt and {new_tokens} new tokens in its context of {policy.context}, got a prompt of "
                         f"{lengths[longest]} tokens ({prompts[longest][:40]!r}...); shorten it or lower the number of new tokens")


def _toy_judge(config, game, attacker, rng):
    """The judge of training: a small classifier on noisy samples, among them the warm-started attacker's own."""
    tokenizer = game.tokenizer()
    classifier = toy_classifier(tokenizer).to(config.device)
    if config.dry_run:
        return train_judge(classifier, tokenizer, [], 0)
    seeds = [config.template.format(p) for p in draw(game.fixed_prompts, 3000, rng)]
    attacks = Player("attacker", attacker, config.attack_tokens).speak(seeds, config.seed).texts
    attacks = [attack for attack in attacks if not game.is_held_out(attack)]
    triples = list(zip(*game.judge_samples(min(30_000, 64 * config.judge_steps), rng, attacks)))
    with bar("training the judge", config.judge_steps) as progress:
        judge = train_judge(classifier, tokenizer, triples, config.judge_steps, 64, 2e-3, config.seed, progress)
    load_whole(classifier.state_dict(), classifier.state_dict())  # every process has trained it; the first one's bits count
    return judge


# --- your own models ----------------------------------------------------------------------------------------------
def own_world(config: Config, start: Path | None = None) -> World:
    """Your own models: prompts, pairs and judges from files, or from the hub where no flag names one. With --prompts
    all data are your own: what you do not name is done without."""
    data, place = _own_data(config, start), (config.device, config.trust_remote_code)
    judge = _named("judge", load_judge, config.judge, config.unsafe_label, (), *place)
    held_out = _named("held_out_judge", load_judge, config.held_out_judge, config.unsafe_label, (), *place)
    embedder = load_embedder(config.embedder, *place)
    policies = {}
    for name in ("attacker", "defender"):
        source = start / name if start else getattr(config, name)
        policies[name] = _slim(_named(name, load_policy, source, config.critic, DTYPES[config.dtype], *place), config)
    if start:  # a resumed run goes on with its own prompts, whatever has become of the files
        saved = read_json(start / "prompts.json")
        seeds, test, benign = (saved[name] for name in ("seeds", "test_prompts", "benign_prompts"))
    else:
        seeds, test, benign = own_prompts(config, data, policies)
    pairs = own_pairs(config, *data["sft_data"], test + benign, policies["defender"]) if "sft_data" in data else []
    if not pairs and config.ptx_coef > 0:
        raise ValueError("--ptx_coef needs demonstrations, got none; pass --sft_data with (prompt, response) pairs, or --ptx_coef 0")
    for flag, what in (("sft_data", "the defender is not warm-started"), ("benign_prompts", "over-refusal is not measured")):
        if not (start or flag in data or getattr(config, flag)):
            print(f"without --{flag} {what}")
    for policy in policies.values() if config.shard else ():
        shard(policy, policy.device.type)
    if config.sft_steps and not (start or config.dry_run):
        _warm_start(config, policies, pairs, seeds, embedder)
    return World(
        policies["attacker"], policies["defender"], seeds=seeds, test_prompts=test, benign_prompts=benign,
        demos=pairs, judge=judge, held_out_judge=held_out, refused=refusals, helpful=None, embedder=embedder)


def _named(flag, load, *args):
    """What a flag asks for; an error says which flag."""
    try:
        return load(*args)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def _own_data(config, start):
    """{flag: (name, rows)} of the data that the game needs, from the flag's file or, without --prompts, its default on the hub."""
    demos_used = config.ptx_coef > 0 or "distill" in config.average or (config.sft_steps > 0 and not start)
    data = {}
    for flag in ([] if start else ["prompts", "test_prompts", "benign_prompts"]) + ["sft_data"] * demos_used:
        if path := getattr(config, flag):
            data[flag] = path, read_rows(path)
        elif flag in HUB_DATA and not config.prompts:
            data[flag] = f"Anthropic/hh-rlhf/{HUB_DATA[flag]}", read_rows(hub_file(flag))
    return data


def own_prompts(config: Config, data: dict, policies: dict[str, Policy]) -> tuple[list[str], list[str], list[str]]:
    """(seeds, test prompts, benign prompts): first human turns that both players can read; no prompt is in two of the three.

    Without --test_prompts a tenth of --prompts is for testing, by hash. Prints a line for each file. Raises ValueError."""
    attacker, defender = policies["attacker"], policies["defender"]
    attack_room, room = attacker.context - config.attack_tokens, defender.context - config.response_tokens
    limit = " or ".join(str(tokens) for tokens in sorted({attack_room, room}))

    def fit(prompts):  # the attacker reads a prompt in its template
        prompts = [prompt for prompt, in prompts]
        lengths = zip(attacker.encode([config.template.format(p) for p in prompts]), defender.encode(prompts))
        return [len(a) <= attack_room and len(d) <= room for a, d in lengths]

    def pick(flag, others):
        if flag not in data:
            return [], None
        name, rows = data[flag]
        kept, line = usable(name, [(first_turn(row["prompt"]),) for row in rows], {*map(plain, others)}, fit, limit)
        return [prompt for prompt, in kept], line

    test, test_line = pick("test_prompts", [])
    seeds, line = pick("prompts", test)
    benign, benign_line = pick("benign_prompts", seeds + test)
    if not test:
        seeds, test = ([p for p in seeds if is_test(p) == tested] for tested in (False, True))
    else:
        print(f"{test_line}, {len(test)} to test")
    print(f"{line}, {len(seeds)} to train on, {len(test)} to test")
    if benign:
        print(f"{benign_line}, {len(benign)} to measure over-refusal")
    if not seeds or not test:
        raise ValueError(f"--prompts must leave at least one prompt for training and one for testing, got {len(seeds)} and {len(test)}; "
                         "add prompts or pass --test_prompts")
    return seeds, test[:config.eval_prompts], benign[:config.eval_prompts]


def own_pairs(config: Config, name: str, rows: list[dict], tested: list[str], policy: Policy) -> list[tuple[str, str]]:
    """(prompt, response) pairs that the defender learns from: no test prompt and, for the memory's sake, none that is very long."""
    limit = min(policy.context, max(256, 4 * config.response_tokens))

    def fit(pairs):
        prompts, responses = zip(*pairs)
        return [len(p) + len(r) <= limit for p, r in zip(policy.encode(list(prompts)), policy.encode_responses(responses))]

    pairs = [(row["prompt"], row.get("response") or row.get("chosen")) for row in rows]
    kept, line = usable(name, pairs, {*map(plain, tested)}, fit, limit)
    print(f"{line}, {len(kept)} to learn from")
    return kept


def _warm_start(config, policies, pairs, seeds, embedder):
    """SFT of the defender on its pairs, of the attacker on neighbouring seeds."""
    rng = np.random.default_rng([config.seed, 2**20])
    some = draw(seeds, min(len(seeds), 4000), rng)  # each is embedded, then compared with all others
    samples = {"defender": pairs, "attacker": neighbour_pairs(some, embedder, config.template, rng)}
    rates = {"defender": config.learning_rate, "attacker": config.attacker_learning_rate}
    for i, (name, its_pairs) in enumerate(samples.items()):
        if its_pairs:
            with bar(f"SFT of the {name}", config.sft_steps) as progress:
                sft(policies[name], its_pairs, config.sft_steps, config.batch_size, SFT_RATE * rates[name], [config.seed, i], progress,
                    config.micro_batch)
            fold_lora(policies[name], config.seed)


def neighbour_pairs(seeds: list[str], embedder: Embedder, template: str, rng: np.random.Generator, k: int = 5) -> list[tuple[str, str]]:
    """The attacker's warm start: (seed in its template, one of its k nearest other seeds by the embedder, B texts -> (B, D))."""
    if len(seeds) < 2:
        return []
    vectors, pairs = embedder(seeds), []
    for i, vector in enumerate(vectors):
        nearest = np.argsort(-(vectors @ vector), kind="stable")[:k + 1]
        pairs.append((template.format(seeds[i]), seeds[rng.choice(nearest[nearest != i])]))
    return pairs


# --- looking at it ---------------------------------------------------------------------------------------------------
def show_prompts(config: Config, world: World, n: int = 3) -> None:
    """Print the first prompts of both players and the first exchanges of both judges as their models will read them:
    the tokens decoded again, special ones and chat template included, control characters escaped."""
    def show(tokenizer, ids):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        print(f"{len(ids):5} tokens  {visible(text)}")

    seeds = world.seeds[:n]
    for name, policy, template in (("attacker", world.attacker, config.template), ("defender", world.defender, "{}")):
        print(f"\nthe {name} reads")
        for ids in policy.encode([template.format(s) for s in seeds]):
            show(policy.tokenizer, ids)
    exchanges = world.demos[:n] or [(prompt, "I am sorry, I cannot help with that.") for prompt in seeds]
    for name, judge in (("judge", world.judge), ("held-out judge", world.held_out_judge)):
        print(f"\nthe {name} reads")
        for prompt, response in exchanges:
            if hasattr(judge, "model"):
                show(judge.tokenizer, _read_by(judge, prompt, response))
            else:  # a function of the two texts
                print(f"{prompt!r}, {response!r}")


def _read_by(judge, prompt, response):
    """The token ids that reach the judge's model itself."""
    seen = []
    look = lambda _, args, kwargs: seen.append(kwargs.get("input_ids", *args))
    hook = judge.model.register_forward_pre_hook(look, with_kwargs=True)
    call_judge(judge, [prompt], [response])
    hook.remove()
    return seen[0][0].tolist()
