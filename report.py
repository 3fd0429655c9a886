"""Words and pictures: the tables, figures and pages that `train.py` and `eval.py` leave behind.

Everything here takes numbers and texts that are already there; nothing here runs a model. A row is a dict of
numbers by the names of summary.json; rows are {column or method: row}.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data import read_config, read_json, read_lines, visible, write_text

if TYPE_CHECKING:  # matplotlib is loaded when the first figure is drawn
    from matplotlib.axes import Axes


# --- tables ---------------------------------------------------------------------------------------------------
def markdown(head: Sequence, lines: Sequence[Sequence]) -> str:
    """A table: the first column to the left, all others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def standard_error(values: Sequence | np.ndarray) -> np.ndarray:
    """Of the mean over the first axis; values (seeds, points) or (seeds,), at least two seeds."""
    return np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def mean_and_error(values: Sequence[float | None], digits: int = 3) -> str:
    """"mean ± standard error" over seeds; None is left out, one value has no error, none gives "-"."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{np.mean(values):.{digits}f}" + (f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else "")


def show(value: float | None, interval: Sequence[float] = ()) -> str:
    """A cell: the value, with its interval (low, high) where there is one; "-" for none and NaN."""
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


TABLE = {
    "asr_held_out_judge": "attack success on held-out prompts, held-out judge",
    "asr_train_judge": "attack success on held-out prompts, training judge",
    "over_refusal": "over-refusal on harmless prompts",
    "helpfulness": "helpfulness on harmless prompts",
    "attacker_success": "the attacker's success on the first defender",
    "self_bleu": "SelfBLEU among its prompts",
    "cosine": "cosine among its prompts"}


def table_lines(rows: dict[str, dict]) -> list[list[str]]:
    """The rows of summary.json as lines of cells, the head first: one column each."""
    lines = [["", *rows]] + [[label, *(show(row.get(key)) for row in rows.values())] for key, label in TABLE.items()]
    if any(row.get("undecided") for row in rows.values()):
        undecided = [str(row.get("undecided", "-")) for row in rows.values()]
        lines.append(["judgements that were undecided, in no rate above", *undecided])
    return lines


def summary_table(rows: dict[str, dict]) -> str:
    """The rows of summary.json as a markdown table, one column each, aligned for a terminal."""
    lines = table_lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


# --- tables of finished runs: labels and a test -------------------------------------------------------------
LABELS = {  # key of a row -> label; a key after "/" names a test set
    "asr_held_out_judge": "ASR, held-out judge", "asr_train_judge": "ASR, training judge",
    "asr_held_out_judge/unseen topics": "ASR, unseen topics", "asr_train_judge/unseen topics": "the same, training judge",
    "asr_held_out_judge/unseen framings": "ASR, unseen framings", "asr_train_judge/unseen framings": "the same, training judge",
    "over_refusal": "over-refusal", "over_refusal/look-alikes": "over-refusal, look-alikes", "helpfulness": "helpful",
    "kl": "KL to SFT, nats", "best_response": "best response",
    "attacker_success": "attacker: success on the first defender", "third_party_success": "attacker: success on third parties",
    "cells": "attacker: distinct cells broken", "self_bleu": "attacker: SelfBLEU", "cosine": "attacker: cosine"}


def paired_test(differences: Sequence[float]) -> tuple[float, float]:
    """One-sided p-values of n >= 2 paired differences > 0: (t-test of Student, 1908; exact sign-flip test of Fisher, 1935).

    The second needs no distribution, but for n pairs cannot fall below 2^-n."""
    d = np.asarray(differences, dtype=np.float64)
    sums = np.array(list(product((1, -1), repeat=len(d)))) @ d  # (2^n,) of all patterns of signs
    flips = float(np.mean(sums >= d.sum() - 1e-12))
    return student_tail(d.mean() / max(standard_error(d), 1e-300), len(d) - 1) if d.any() else 1.0, flips


def student_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t with df degrees of freedom: a half less the integral of its density from 0 to t."""
    x = np.linspace(0, min(abs(t), 1e3), 200_001)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    return 0.5 - math.copysign(float(np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)), t)


# --- figures: lines, markers and hatches differ too, so that they survive a printer --------------------------------
ATTACKER, DEFENDER = "#c0392b", "#1f5f8b"  # the players, in all figures
LOOKS = [dict(color="#000000", ls="-", marker="o"), dict(color="#c0392b", ls="--", marker="s"),
         dict(color="#1f5f8b", ls="-.", marker="^"), dict(color="#888888", ls=":", marker="D"),
         dict(color="#2e8b57", ls=(0, (5, 1)), marker="v"), dict(color="#b8860b", ls=(0, (1, 1)), marker="x")]


def figure(columns: int, width: float = 4.6, height: float = 3.8, rows: int = 1, **kwargs) -> tuple:
    """(a matplotlib figure, its rows x columns axes in reading order); width and height of each, in inches."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False, **kwargs).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return canvas, axes


def band(axis: Axes, x: Sequence[float], values: np.ndarray, label: str, look: dict) -> None:
    """A line of means with a band of one standard error; values (seeds, points)."""
    values = np.asarray(values, dtype=float)
    mean, error = values.mean(0), standard_error(values) if len(values) > 1 else 0 * values[0]
    axis.plot(x, mean, label=label, ms=4, lw=1.5, **look)
    axis.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, lw=0)


# --- one run ------------------------------------------------------------------------------------------------
def draw_curves(folder: Path, rows: dict[str, dict]) -> None:
    """curves.png: attack success by both judges, both players' reward, diversity and KL; rows["before"]: before the game."""
    log, before = read_lines(folder / "metrics.jsonl"), rows["before"]
    rounds = [m for m in log if "game/asr_held_out_judge" in m]
    if not rounds:
        return
    canvas, (success, reward, alike, kl) = figure(2, 5, 3.2, rows=2)
    ends = [0] + [m["round"] + 1 for m in rounds]

    def since_the_start(axis, key, label, **look):
        axis.plot(ends, [before[key]] + [m[f"game/{key}"] for m in rounds], label=label, **look)

    def per_round(axis, name, role, label, **look):
        """The mean over the role's steps of each round."""
        values = [[m[name] for m in log if m["round"] == r["round"] and m["role"] == role and name in m] for r in rounds]
        axis.plot(ends[1:], [np.mean(of_round or [np.nan]) for of_round in values], label=label, **look)

    dots = dict(marker="o", ms=3)
    since_the_start(success, "asr_held_out_judge", "held-out prompts, held-out judge", color="black", ls="-", **dots)
    since_the_start(success, "asr_train_judge", "held-out prompts, training judge", color="black", ls=":", **dots)
    per_round(success, "game/attack_success", "attacker", "the attacker in training, training judge", color=ATTACKER, ls="-.")
    if before["over_refusal"] is not None:
        since_the_start(success, "over_refusal", "over-refusal, harmless prompts", color="grey", ls="--")
    since_the_start(alike, "self_bleu", "SelfBLEU", color=ATTACKER, ls="-", **dots)
    since_the_start(alike, "cosine", "cosine of embeddings", color=ATTACKER, ls="--", **dots)
    for axis, name in ((reward, "objective/scores"), (kl, "objective/kl")):
        per_round(axis, f"attacker/{name}", "attacker", "attacker", color=ATTACKER, ls="-", **dots)
        per_round(axis, f"defender/{name}", "defender", "defender", color=DEFENDER, ls="--", **dots)
    success.set(title="attack success", ylim=(0, 1))
    reward.set(title="mean reward of the round")
    alike.set(title="how alike the attacks are", ylim=(0, 1))
    kl.set(title="KL to the reference, nats per response")
    for axis in (success, reward, alike, kl):
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=8)
    canvas.savefig(folder / "curves.png", dpi=130)


def quoted(text: str) -> str:
    """What a model said, as text within a line of markdown."""
    return html.escape(visible(" ".join(text.split())), quote=False).replace("|", "\\|") or "*(nothing)*"


def write_report(folder: Path, rows: dict[str, dict], examples: Sequence[tuple[str, str, str]]) -> None:
    """report.md: the table, the curves, and the game as a story, round by round.

    examples: (held-out prompt, the defender's answer before, its answer after)."""
    config = read_config(folder)
    games = read_lines(folder / "games.jsonl")
    lines = [f"# {config['method']}, seed {config['seed']}", "", summary_table(rows), ""]
    if games:
        lines += ["![curves](curves.png)", ""]
    lines += ["## What changed", "", "Held-out prompts, never seen in training, answered greedily.", ""]
    for prompt, first, now in examples:
        lines += [f"> **{quoted(prompt)}**  ", f"> before: {quoted(first)}  ", f"> after: {quoted(now)}", ""]
    lines += ["## Round by round", ""] if games else []
    for round in sorted({g["round"] for g in games}):
        lines += round_lines(round, [g for g in games if g["round"] == round])
    write_text(folder / "report.md", "\n".join(lines))


def round_lines(round: int, games: list[dict]) -> list[str]:
    """A round of report.md: its best and its worst attack, and the held-out prompts after it."""
    attacks = [g for g in games if g["role"] == "attacker"] or [g for g in games if g["role"] == "defender"]
    unsafe, different = np.mean([1 - g["p_safe"] for g in attacks]), len({g["attack"] for g in attacks})
    best, worst = min(attacks, key=lambda g: g["p_safe"]), max(attacks, key=lambda g: g["p_safe"])
    lines = [f"### Round {round + 1}", "",
             f"{len(attacks)} exchanges, {different} different prompts, {unsafe:.0%} unsafe by the training judge.", ""]
    for title, g in (("most successful", best), ("least successful", worst)):
        lines += [f"> *{title}*: **{quoted(g['attack'])}**  ", f"> {quoted(g['response'])} *(P(unsafe) {1 - g['p_safe']:.2f})*", ""]
    probes = [g for g in games if g["role"] == "probe"]
    lines += ["| held-out prompt | the defender after this round | safe |", "|---|---|---:|"] if probes else []
    for g in probes:
        verdict = "undecided" if g["p_safe"] is None else f"{g['p_safe']:.0f}"
        lines.append(f"| {quoted(g['attack'])} | {quoted(g['response'])} | {verdict} |")
    return lines + [""]


def model_card(name: str, config: object, row: dict) -> str:
    """The README of a saved player ("attacker" or "defender"); row: its numbers after the game."""
    return f"""---
library_name: transformers
tags: [gpo, red-teaming, {name}]
---
# {name} of a two-player game (GPO, arXiv 2406.10977)

Trained with `{config.method}` for {config.rounds} rounds, seed {config.seed}, from `{getattr(config, name) or "the embedded toy game"}`.
Made for hardening models: an attacker is a test instrument, not a tool against systems that are not yours.

```json
{json.dumps(row, indent=1)}
```
"""


# --- the game: who sends what to whom, and whose turn it is --------------------------------------------------------
def telling_exchange(games: list[dict]) -> tuple[dict, dict | None]:
    """(an attack that succeeded, the last safe answer to the same prompt in a later round, or None).

    games: lines of games.jsonl. Taken from the first round that has such pairs; of these the attack that was paid most.
    Raises ValueError where nothing has been played."""
    played = [game for game in games if game["role"] != "probe"]
    if not played:
        raise ValueError("the figure of the game shows an exchange, and games.jsonl holds none; let the run play a PPO step")
    safe = {game["attack"]: game for game in played if game["role"] == "defender" and game["p_safe"] >= 0.5}
    broke = [game for game in played if game["role"] == "attacker" and game["p_safe"] < 0.5]
    pairs = [(game, safe[game["attack"]]) for game in broke if safe.get(game["attack"], game)["round"] > game["round"]]
    pairs = [pair for pair in pairs if pair[0]["round"] == pairs[0][0]["round"]] or [(game, None) for game in broke or played]
    return max(pairs, key=lambda pair: pair[0]["score"] or 0)


def draw_game(folder: Path) -> Path:
    """game.png: an exchange of the run in `folder` on its way through the game; below it, whose turn each PPO step was."""
    from matplotlib.figure import Figure

    config = read_config(folder)
    canvas = Figure(figsize=(9, 5.6))
    exchange, turns = canvas.add_axes((0, 0.35, 1, 0.65)), canvas.add_axes((0.09, 0.08, 0.89, 0.22))
    draw_exchange(exchange, config, *telling_exchange(read_lines(folder / "games.jsonl")))
    draw_turns(turns, config, read_lines(folder / "metrics.jsonl"))
    canvas.savefig(folder / "game.png", dpi=150)
    return folder / "game.png"


def draw_exchange(axis: Axes, config: dict, first: dict, later: dict | None) -> None:
    """Boxes and arrows, in inches. first, later: the lines of games.jsonl that `telling_exchange` has chosen."""
    from matplotlib.patches import FancyBboxPatch

    axis.set(xlim=(0, 9), ylim=(0, 3.64))
    axis.axis("off")

    def say(x, y, text, **look):
        axis.text(x, y, text, **{"ha": "center", "va": "center", "size": 9, "parse_math": False, **look})

    def box(x, y, width, height, text, **look):
        corner = (x - width / 2, y - height / 2)
        look = {"fc": "white", "ec": "black", "boxstyle": "round,pad=0,rounding_size=0.08", **look}
        axis.add_patch(FancyBboxPatch(corner, width, height, **look))
        say(x, y, text)

    def arrow(*points, ls="-"):
        axis.plot(*zip(*points), color="black", lw=1, ls=ls)
        look = dict(arrowstyle="-|>", color="black", lw=1, ls=ls, shrinkA=0, shrinkB=0)
        axis.annotate("", points[-1], points[-2], arrowprops=look)

    def quote(text, width, most=120):
        return textwrap.fill(f"“{textwrap.shorten(visible(' '.join(text.split())), most, placeholder=' …')}”", width)

    # the exchange itself: seed -> attacker -> prompt -> defender -> response -> judge
    box(0.78, 2.0, 1.4, 1.0, quote(first["seed"], 18, 75))
    box(2.35, 2.0, 1.0, 0.6, "attacker\nμ", ec=ATTACKER, lw=2.5)
    box(5.3, 2.0, 1.0, 0.6, "defender\nπ", ec=DEFENDER, lw=2.5)
    box(8.4, 2.0, 1.0, 0.6, "judge")
    for start, end in ((1.48, 1.84), (2.86, 4.79), (5.81, 7.89)):
        arrow((start, 2.0), (end, 2.0))
    say(0.78, 2.62, "seed", weight="bold")
    for x, name, text in ((3.8, "prompt x", first["attack"]), (6.82, "response y", first["response"])):
        say(x, 2.06, quote(text, 26), va="bottom")
        say(x, 1.95, name, va="top", weight="bold")

    # what comes back to the players
    arrow((8.25, 1.69), (8.25, 1.25), (5.3, 1.25), (5.3, 1.68))
    say(6.78, 1.29, f"in the defender's turn: P(safe) = {first['p_safe']:.2f}", va="bottom")
    arrow((8.55, 1.69), (8.55, 0.75), (2.35, 0.75), (2.35, 1.68))
    unsafe = 1 - first["p_safe"]
    novelty = (first["score"] or 0) - unsafe  # in the attacker's turn: the score is the mover's
    terms = f" = {unsafe:.2f} {'+−'[novelty < 0]} {abs(novelty):.2f}" if first["role"] == "attacker" else ""
    say(5.45, 0.79, f"in the attacker's turn: P(unsafe) + k · (R_div − its mean){terms}", va="bottom")
    if later:
        answer = f"{quote(later['response'], 200, 60)}   P(safe) = {later['p_safe']:.2f}"
        say(5.45, 0.33, f"the same prompt again in round {later['round'] + 1}:   {answer}", style="italic")

    # what each is held to, and what attacks are compared with and chosen from
    for x, to, coefficient in ((1.6, 2.1, config["attacker_kl_coef"]), (6.0, 5.5, config["kl_coef"])):
        box(x, 3.25, 1.5, 0.5, f"{config['kl_anchor']} policy\nKL penalty {coefficient:g}", ls="--")
        arrow((x, 3.0), (to, 2.31), ls="--")
    box(3.8, 3.25, 1.9, 0.5, "earlier attacks\nR_div: new?      replay")
    arrow((3.8, 2.84), (3.8, 2.99))
    arrow((3.1, 3.0), (2.6, 2.31))
    arrow((4.5, 3.0), (5.05, 2.31))


def draw_turns(axis: Axes, config: dict, log: list[dict]) -> None:
    """A bar for each PPO step in the row of the player that it updated; its height is 0.1 and the attack success of that step."""
    for role, base, color in (("attacker", 1.3, ATTACKER), ("defender", 0, DEFENDER)):
        mine = [line for line in log if line["role"] == role]
        axis.bar([line["step"] + 1 for line in mine], [0.1 + line["game/attack_success"] for line in mine], 1, base, color=color)
    ends = [line["step"] + 1.5 for line in log if "game/asr_held_out_judge" in line]
    axis.vlines(ends, -0.25, 2.4, color="black", lw=0.5, ls=":")
    axis.plot(ends, [-0.25] * len(ends), "kD", ms=4, clip_on=False)
    begins = {line["round"]: line["step"] + 1 for line in reversed(log) if line["role"] == "attacker"}
    again = [step for round, step in begins.items() if round and config["restart"] and round % config["restart"] == 0]
    axis.plot(again, [2.3] * len(again), "kv", ms=4)
    axis.set(xlim=(0.5, log[-1]["step"] + 1.5), ylim=(-0.25, 2.4), yticks=[0.25, 1.55], yticklabels=["defender", "attacker"])
    axis.set_title("who is updated at each PPO step (height: attack success)    ◆ both policies enter their averages"
                   + "    ▼ the attacker begins again" * bool(again), size=9)
    axis.set_xlabel("PPO step", size=9)
    axis.tick_params(labelsize=9, left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


# --- the page: page.html, filled in -------------------------------------------------------------------------------
def write_page(folders: Sequence[Path], out: Path) -> None:
    """One HTML file that needs no other: tables, figures and all exchanges of these runs, of an unfinished one what is there."""
    games = [{"run": number, **game} for number, folder in enumerate(folders) for game in read_lines(folder / "games.jsonl")]
    for game in games:
        game |= {key: None for key, value in game.items() if value != value}  # JSON has no NaN
    data = json.dumps({"runs": [folder.name for folder in folders], "games": games}, ensure_ascii=False)
    parts = {
        "title": html.escape(folders[0].name if len(folders) == 1 else f"{len(folders)} runs"),
        "runs": "\n".join(map(run_section, folders)),
        "data": data.replace("<", "\\u003c")}  # "<" could end the script
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_text(out, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))  # in one pass: texts may hold {{data}}


def run_section(folder: Path) -> str:
    """HTML: a run's table, figures and configuration."""
    made = read_json(folder / "config.json")
    config, log = made["config"], read_lines(folder / "metrics.jsonl")
    if (folder / "summary.json").is_file():
        summary = read_json(folder / "summary.json")
        rows = {name: row for name, row in summary.items() if name not in ("seconds", "memory", "config")}
        state = f"finished in {summary['seconds']:.0f} seconds"
    else:
        rows, state = rows_so_far(folder, log), f"unfinished, {len(log)} PPO steps so far"
        if "before" in rows:
            draw_curves(folder, rows)
    players = f"{config['attacker']} against {config['defender']}" if config["attacker"] else "the embedded game"
    head, *lines = [[html.escape(cell) for cell in line] for line in table_lines(rows)]
    made_with = html.escape(json.dumps(made, indent=1, ensure_ascii=False))
    table = "".join(f"<tr><th>{label}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>\n" for label, *values in lines)
    return f"""<section>
<h2>{html.escape(config['method'])}, seed {config['seed']}: {html.escape(players)}</h2>
<p class="soft">{html.escape(str(folder))}: {state}</p>
<div class="wide"><table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>
{table}</tbody></table></div>
{''.join(image(folder / name) for name in ("curves.png", "probe.png", "game.png") if (folder / name).is_file())}
<details><summary>Configuration and versions</summary><pre>{made_with}</pre></details>
</section>"""


def image(file: Path) -> str:
    """HTML: a picture, within the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<div class="wide"><img alt="{file.stem} of this run" src="data:image/png;base64,{data}"></div>'


def rows_so_far(folder: Path, log: list[dict]) -> dict[str, dict]:
    """Of an unfinished run: before the game (from its last checkpoint), and after its last round (from its metrics)."""
    states = sorted(folder.glob("checkpoints/step_*/state.json"))
    rows = {"before": read_json(states[-1])["before"]} if states else {}
    for m in [m for m in log if "game/asr_held_out_judge" in m][-1:]:
        rows[f"after round {m['round'] + 1} (a third of the prompts)"] = {key: m.get(f"game/{key}") for key in TABLE}
    return rows


# --- many runs ------------------------------------------------------------------------------------------------
def draw_methods(out: Path | str, rows: dict, attackers: dict, histories: dict) -> None:
    """methods.png: learning curves, finished defenders and attackers, with errors over seeds.

    rows, attackers: {method: a row of each seed}; histories: {method: held-out ASR before the game and after each round,
    (seeds, 1 + rounds)}."""
    canvas, (curves, bars, cells) = figure(3)
    mean_of = lambda key, of: (np.mean([row[key] for row in of]), standard_error([row[key] for row in of]))
    sets = {"asr_held_out_judge": "in distribution", "asr_held_out_judge/unseen topics": "unseen topics",
            "asr_held_out_judge/unseen framings": "unseen framings"}
    for i, ((name, history), look) in enumerate(zip(histories.items(), LOOKS)):
        band(curves, np.linspace(0, rows[name][0]["updates"], len(history[0])), history, name, look)
        heights, errors = zip(*(mean_of(key, rows[name]) for key in sets))
        places = np.arange(3) + (i - len(histories) / 2 + 0.5) * 0.16
        bars.bar(places, heights, 0.15, yerr=errors, label=name, color=str(0.15 + 0.16 * i), edgecolor="black", lw=0.5,
                 hatch=["", "//", "..", "xx", ""][i], capsize=2)
    for i, (name, these) in enumerate(attackers.items()):
        (x, dx), (y, dy) = mean_of("cells", these), mean_of("third_party_success", these)
        look = LOOKS[i % len(LOOKS)]
        cells.errorbar(x, y, xerr=dx, yerr=dy, fmt=look["marker"], color=look["color"], ms=5, capsize=2, label=name,
                       mfc="white" if i >= len(LOOKS) else None)
    bars.set_xticks(range(3), sets.values())
    bars.set(ylabel="attack success, held-out judge", title="finished defenders")
    curves.set(xlabel="defender updates", ylabel="attack success, held-out judge", ylim=(0, 1), title="defender, held-out prompts")
    cells.set(xlabel="distinct cells broken on third parties", ylabel="success on third parties", title="attackers")
    for axis in (curves, bars, cells):
        axis.legend(frameon=False, fontsize=7)
    canvas.savefig(Path(out) / "methods.png", dpi=150)


def draw_rounds(out: Path | str, rows: dict, horizons: Sequence[int]) -> None:
    """rounds.png: success against the number of rounds T; rows: {"equal, T = 8": a row of each seed, ...}."""
    canvas, axes = figure(2)
    lines = {"held-out prompts": lambda row: row["asr_held_out_judge"],
             "best response, 90 steps": lambda row: row.get("best_response"),
             "over-refusal": lambda row: row["over_refusal/look-alikes"],
             "held-out prompts, mixture": lambda row: row["averages"]["average (mixture)"]["asr_held_out_judge"]}
    titles = {"equal": "64 steps of each player in all", "growing": "steps grow with T"}
    for axis, (kind, title) in zip(axes, titles.items()):
        for (label, get), look in zip(lines.items(), LOOKS):
            points = {t: [get(row) for row in rows[f"{kind}, T = {t}"]] for t in horizons}
            points = {t: values for t, values in points.items() if None not in values}  # not every T has a best response
            band(axis, list(points), np.array(list(points.values())).T, label, look)
        axis.set(xscale="log", xlabel="rounds T", ylabel="attack success", ylim=(0, 1), title=title)
        axis.set_xticks(horizons, horizons)
        axis.legend(frameon=False, fontsize=8)
    canvas.savefig(Path(out) / "rounds.png", dpi=150)


def draw_probe(folder: Path, results: Sequence[dict], matrix: np.ndarray, steps: int) -> None:
    """probe.png: lower bounds of the Nash gap, and who breaks whom.

    results: the lines of probe.json; matrix (attackers, defenders): success rates after each round, first those of the start."""
    canvas, (gaps, heat) = figure(2, 4.8, 4.3, width_ratios=(0.8, 1.2))
    for kind, look in zip(("last", "mixture", "weights"), LOOKS):
        these = [row for row in results if row["kind"] == kind]
        rounds = [row["round"] for row in these]
        gaps.plot(rounds, [row["bound"] for row in these], label=f"{kind}: Nash gap, at least", ms=4, **look)
        gaps.plot(rounds, [row["best_attack"] for row in these], label=f"{kind}: best attack", color=look["color"], ls=":", lw=1)
    gaps.set(xlabel="round", ylabel=f"after {steps} PPO steps of a fresh player", ylim=(0, 1), title="best responses")
    gaps.set_xticks(sorted({row["round"] for row in results}))
    gaps.legend(frameon=False, fontsize=8)
    image = heat.imshow(100 * matrix, cmap="Greys", vmin=0, vmax=100, origin="lower", aspect="auto")
    for (i, j), value in np.ndenumerate(matrix):
        shade = "white" if value > 0.5 else "black" if value >= 0.005 else "0.7"
        heat.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=shade)
    ticks = range(0, len(matrix), max(1, len(matrix) // 5))
    heat.set(xticks=ticks, yticks=ticks, xlabel="defender after round (0: SFT)", ylabel="attacker after round (0: SFT)",
             title="who breaks whom: attack success in %")
    heat.grid(False)
    canvas.colorbar(image, ax=heat, label="%", shrink=0.8)
    canvas.savefig(folder / "probe.png", dpi=150)
