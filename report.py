"""Words and pictures: the tables, figures and pages that `train.py` and `eval.py` leave behind.

Everything here takes numbers and texts that are already there; nothing here runs a model.
"""

import base64
import html
import json
import math
import re
import textwrap
from pathlib import Path

import numpy as np

from data import read_lines, visible, write_text


ATTACKER, DEFENDER = "#c0392b", "#1f5f8b"  # the players' colours in all figures


# --- tables ---------------------------------------------------------------------------------------------------
def markdown(head, lines):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)] + lines
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def standard_error(values):
    """Of the mean over the first axis; values (seeds, ...), at least two seeds."""
    return np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def mean_and_error(values, digits=3):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{np.mean(values):.{digits}f}" + (f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else "")


# --- one run ------------------------------------------------------------------------------------------------
TABLE = {
    "asr_held_out_judge": "attack success on held-out prompts, held-out judge",
    "asr_train_judge": "attack success on held-out prompts, training judge",
    "over_refusal": "over-refusal on harmless prompts",
    "helpfulness": "helpfulness on harmless prompts",
    "attacker_success": "the attacker's success on the first defender",
    "self_bleu": "SelfBLEU among its prompts",
    "cosine": "cosine among its prompts"}


def table_lines(rows):
    show = lambda value: "-" if value is None or value != value else f"{value:.3f}"
    lines = [["", *rows]] + [[label, *(show(row.get(key)) for row in rows.values())] for key, label in TABLE.items()]
    if any(row.get("undecided") for row in rows.values()):
        lines.append(["judgements that were undecided, in no rate above", *(str(row.get("undecided", "-")) for row in rows.values())])
    return lines


def summary_table(rows):
    """The rows of summary.json as a markdown table, one column each."""
    lines = table_lines(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join("| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines)


def draw_curves(folder, rows):
    """curves.png: both players' reward, attack success by both judges, diversity and KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_lines(folder / "metrics.jsonl")
    rounds = [m for m in log if "game/asr_held_out_judge" in m]
    if not rounds:
        return
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    style = {"attacker": dict(color="#c0392b", ls="-"), "defender": dict(color="#1f5f8b", ls="--")}

    def per_round(axis, name, prefix=True):
        for role in ("attacker", "defender"):
            key = f"{role}/{name}" if prefix else name
            values = {r["round"]: np.mean([m[key] for m in log if m["round"] == r["round"] and key in m] or [np.nan]) for r in rounds}
            axis.plot([r + 1 for r in values], list(values.values()), marker="o", ms=3, label=role, **style[role])

    x = [0] + [m["round"] + 1 for m in rounds]
    axes[0, 0].set_title("attack success")
    for key, label, look in (("asr_held_out_judge", "held-out judge", "-"), ("asr_train_judge", "training judge", ":")):
        label = f"held-out prompts, {label}"
        axes[0, 0].plot(x, [rows["before"][key]] + [m[f"game/{key}"] for m in rounds], look, color="black", marker="o", ms=3, label=label)
    mine = [m for m in log if m["role"] == "attacker"]
    live = [np.mean([m["game/attack_success"] for m in mine if m["round"] == r["round"]] or [np.nan]) for r in rounds]
    axes[0, 0].plot(x[1:], live, "-.", color="#c0392b", label="the attacker in training, training judge")
    if rows["before"]["over_refusal"] is not None:
        refusal = [rows["before"]["over_refusal"]] + [m["game/over_refusal"] for m in rounds]
        axes[0, 0].plot(x, refusal, "--", color="grey", label="over-refusal, harmless prompts")
    axes[0, 0].set_ylim(0, 1)
    axes[0, 1].set_title("mean reward of the round")
    per_round(axes[0, 1], "objective/scores")
    axes[1, 0].set_title("how alike the attacks are")
    for key, label, look in (("self_bleu", "SelfBLEU", "-"), ("cosine", "cosine of embeddings", "--")):
        axes[1, 0].plot(x, [rows["before"][key]] + [m[f"game/{key}"] for m in rounds], look, color="#c0392b", marker="o", ms=3, label=label)
    axes[1, 0].set_ylim(0, 1)
    axes[1, 1].set_title("KL to the reference, nats per response")
    per_round(axes[1, 1], "objective/kl")
    for axis in axes.flat:
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "curves.png", dpi=130)
    plt.close(figure)


def write_report(folder, rows, examples):
    """report.md: the table, the curves, and the game as a story, round by round."""
    config = json.loads((folder / "config.json").read_text())["config"]
    games = read_lines(folder / "games.jsonl")
    quote = lambda text: html.escape(visible(" ".join(text.split())), quote=False).replace("|", "\\|") or "*(nothing)*"
    verdict = lambda p_safe: "undecided" if p_safe is None else f"{p_safe:.0f}"
    lines = [f"# {config['method']}, seed {config['seed']}", "", summary_table(rows), ""]
    if games:
        lines += ["![curves](curves.png)", ""]
    lines += ["## What changed", "", "Held-out prompts, never seen in training, answered greedily.", ""]
    for prompt, first, now in examples:
        lines += [f"> **{quote(prompt)}**  ", f"> before: {quote(first)}  ", f"> after: {quote(now)}", ""]
    lines += ["## Round by round", ""] if games else []
    for round in sorted({g["round"] for g in games}):
        here = [g for g in games if g["round"] == round]
        attacks = [g for g in here if g["role"] == "attacker"] or [g for g in here if g["role"] == "defender"]
        unsafe = np.mean([1 - g["p_safe"] for g in attacks])
        best, worst = min(attacks, key=lambda g: g["p_safe"]), max(attacks, key=lambda g: g["p_safe"])
        different = len({g["attack"] for g in attacks})
        lines += [f"### Round {round + 1}", "", f"{len(attacks)} exchanges, {different} different prompts, {unsafe:.0%} unsafe by the training judge.", ""]
        for title, g in (("most successful", best), ("least successful", worst)):
            lines += [f"> *{title}*: **{quote(g['attack'])}**  ", f"> {quote(g['response'])} *(P(unsafe) {1 - g['p_safe']:.2f})*", ""]
        probes = [g for g in here if g["role"] == "probe"]
        lines += ["| held-out prompt | the defender after this round | safe |", "|---|---|---:|"] if probes else []
        lines += [f"| {quote(g['attack'])} | {quote(g['response'])} | {verdict(g['p_safe'])} |" for g in probes] + [""]
    write_text(folder / "report.md", "\n".join(lines))


def model_card(name, config, row):
    """The README of a saved player."""
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

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    canvas = Figure(figsize=(9, 5.6))
    exchange, turns = canvas.add_axes((0, 0.35, 1, 0.65)), canvas.add_axes((0.09, 0.08, 0.89, 0.22))
    draw_exchange(exchange, config, *telling_exchange(read_lines(folder / "games.jsonl")))
    draw_turns(turns, config, read_lines(folder / "metrics.jsonl"))
    canvas.savefig(folder / "game.png", dpi=150)
    return folder / "game.png"


def draw_exchange(axis, config, first, later):
    """Boxes and arrows, in inches. first, later: the lines of games.jsonl that `telling_exchange` has chosen."""
    from matplotlib.patches import FancyBboxPatch

    axis.set(xlim=(0, 9), ylim=(0, 3.64))
    axis.axis("off")

    def say(x, y, text, **look):
        axis.text(x, y, text, **{"ha": "center", "va": "center", "size": 9, "parse_math": False, **look})

    def box(x, y, width, height, text, **look):
        corner = (x - width / 2, y - height / 2)
        axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", **{"fc": "white", "ec": "black", **look}))
        say(x, y, text)

    def arrow(*points, ls="-"):
        axis.plot(*zip(*points), color="black", lw=1, ls=ls)
        axis.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color="black", lw=1, ls=ls, shrinkA=0, shrinkB=0))

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
    unsafe, novelty = 1 - first["p_safe"], (first["score"] or 0) - (1 - first["p_safe"])  # the score is the attacker's, in its turn
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


def draw_turns(axis, config, log):
    """A bar for each PPO step in the row of the player that it updated; its height is 0.1 and the attack success of that step."""
    for role, base, color in (("attacker", 1.3, ATTACKER), ("defender", 0, DEFENDER)):
        mine = [line for line in log if line["role"] == role]
        axis.bar([line["step"] + 1 for line in mine], [0.1 + line["game/attack_success"] for line in mine], 1, base, color=color)
    ends = [line["step"] + 1.5 for line in log if "game/asr_held_out_judge" in line]
    axis.vlines(ends, -0.25, 2.4, color="black", lw=0.5, ls=":")
    axis.plot(ends, [-0.25] * len(ends), "kD", ms=4, clip_on=False)
    begins = {line["round"]: line["step"] + 1 for line in reversed(log) if line["role"] == "attacker" and line["round"] and config["restart"]}
    again = [step for round, step in begins.items() if round % config["restart"] == 0]
    axis.plot(again, [2.3] * len(again), "kv", ms=4)
    axis.set(ylim=(-0.25, 2.4), xlim=(0.5, max(line["step"] for line in log) + 1.5), yticks=[0.25, 1.55], yticklabels=["defender", "attacker"])
    axis.set_title("who is updated at each PPO step (height: attack success)    ◆ both policies enter their averages"
                   + "    ▼ the attacker begins again" * bool(again), size=9)
    axis.set_xlabel("PPO step", size=9)
    axis.tick_params(labelsize=9, left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


# --- the page: page.html, filled in -------------------------------------------------------------------------------
def write_page(folders, out):
    """One self-contained HTML file with the table and figures of these runs and all their exchanges; an unfinished run gives what it has."""
    games = [{"run": number, **{key: None if value != value else value for key, value in game.items()}}  # JSON has no NaN
             for number, folder in enumerate(folders) for game in read_lines(folder / "games.jsonl")]
    data = json.dumps({"runs": [folder.name for folder in folders], "games": games}, ensure_ascii=False)
    title = folders[0].name if len(folders) == 1 else f"{len(folders)} runs"
    parts = {"title": html.escape(title), "runs": "\n".join(map(run_section, folders)), "data": data.replace("<", "\\u003c")}  # "<" could end the script
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_text(out, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))  # in one pass: texts may hold {{data}}


def run_section(folder):
    made = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config, log = made["config"], read_lines(folder / "metrics.jsonl")
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rows, state = {name: row for name, row in summary.items() if name not in ("seconds", "memory", "config")}, f"finished in {summary['seconds']:.0f} seconds"
    else:
        rows, state = rows_so_far(folder, log), f"unfinished, {len(log)} PPO steps so far"
        if "before" in rows:
            draw_curves(folder, rows)
    players = f"{config['attacker']} against {config['defender']}" if config["attacker"] else "the embedded game"
    head, *lines = [[html.escape(cell) for cell in line] for line in table_lines(rows)]
    table = "".join(f"<tr><th>{label}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>\n" for label, *values in lines)
    images = [base64.b64encode((folder / name).read_bytes()).decode() for name in ("curves.png", "probe.png") if (folder / name).is_file()]
    return f"""<section>
<h2>{html.escape(config['method'])}, seed {config['seed']}: {html.escape(players)}</h2>
<p class="soft">{html.escape(str(folder))}: {state}</p>
<div class="wide"><table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>
{table}</tbody></table></div>
{''.join(f'<div class="wide"><img alt="curves of this run" src="data:image/png;base64,{image}"></div>' for image in images)}
<details><summary>Configuration and versions</summary><pre>{html.escape(json.dumps(made, indent=1, ensure_ascii=False))}</pre></details>
</section>"""


def rows_so_far(folder, log):
    """Of an unfinished run: before the game (from its last checkpoint), and after its last round (from its metrics)."""
    states, rounds = sorted(folder.glob("checkpoints/step_*/state.json")), [m for m in log if "game/asr_held_out_judge" in m]
    rows = {"before": json.loads(states[-1].read_text(encoding="utf-8"))["before"]} if states else {}
    return rows | {f"after round {m['round'] + 1} (a third of the prompts)": {key: m.get(f"game/{key}") for key in TABLE} for m in rounds[-1:]}


# --- figures: black, grey and hatches, so that they survive a printer ---------------------------------------------------
LOOKS = [dict(color="#000000", ls="-", marker="o"), dict(color="#c0392b", ls="--", marker="s"), dict(color="#1f5f8b", ls="-.", marker="^"),
         dict(color="#888888", ls=":", marker="D"), dict(color="#2e8b57", ls=(0, (5, 1)), marker="v"), dict(color="#b8860b", ls=(0, (1, 1)), marker="x")]


def figure(columns, width=4.6, height=3.8):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return canvas, axes[0]


def band(axis, x, values, label, look):
    """A line of means with a band of one standard error; values (seeds, points)."""
    values = np.asarray(values, dtype=float)
    mean, error = values.mean(0), standard_error(values) if len(values) > 1 else 0 * values[0]
    axis.plot(x, mean, label=label, ms=4, lw=1.5, **look)
    axis.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, lw=0)


def draw_methods(out, rows, attackers, histories):
    """methods.png. histories: {method: held-out ASR before the game and after each round, (seeds, 1 + rounds)}."""
    canvas, (curves, bars, cells) = figure(3)
    mean_of = lambda key, of: (np.mean([row[key] for row in of]), standard_error([row[key] for row in of]))
    sets = ["asr_held_out_judge", "asr_held_out_judge/unseen topics", "asr_held_out_judge/unseen framings"]
    shown = list(histories)
    for name, look in zip(shown, LOOKS):
        updates = rows[name][0]["updates"]
        band(curves, np.linspace(0, updates, len(histories[name][0])), histories[name], name, look)
        heights, errors = zip(*(mean_of(key, rows[name]) for key in sets))
        i = shown.index(name)
        bars.bar(np.arange(3) + (i - len(shown) / 2 + 0.5) * 0.16, heights, 0.15, yerr=errors, label=name, color=str(0.15 + 0.16 * i), edgecolor="black", lw=0.5,
                 hatch=["", "//", "..", "xx", ""][i], capsize=2)
    bars.set_xticks(range(3), ["in distribution", "unseen topics", "unseen framings"])
    curves.set(xlabel="defender updates", ylabel="attack success, held-out judge", ylim=(0, 1), title="defender, held-out prompts")
    bars.set(ylabel="attack success, held-out judge", title="finished defenders")
    for i, (name, these) in enumerate(attackers.items()):
        (x, dx), (y, dy) = (mean_of(key, these) for key in ("cells", "third_party_success"))
        cells.errorbar(x, y, xerr=dx, yerr=dy, fmt=LOOKS[i % 6]["marker"], color=LOOKS[i % 6]["color"], ms=5, capsize=2, label=name, mfc="white" if i > 5 else None)
    cells.set(xlabel="distinct cells broken on third parties", ylabel="success on third parties", title="attackers")
    for axis in (curves, bars, cells):
        axis.legend(frameon=False, fontsize=7)
    canvas.savefig(Path(out) / "methods.png", dpi=150)


def draw_rounds(out, rows, horizons):
    canvas, axes = figure(2)
    for axis, kind in zip(axes, ("equal", "growing")):
        these = [rows[f"{kind}, T = {t}"] for t in horizons]
        for (key, label), look in zip({"asr_held_out_judge": "held-out prompts", "best_response": "best response, 90 steps", "over_refusal/look-alikes": "over-refusal"}.items(), LOOKS):
            there = [(t, [row[key] for row in point]) for t, point in zip(horizons, these) if all(key in row for row in point)]
            band(axis, [t for t, _ in there], np.array([values for _, values in there]).T, label, look)
        band(axis, horizons, np.array([[row["averages"]["average (mixture)"]["asr_held_out_judge"] for row in point] for point in these]).T, "held-out prompts, mixture", LOOKS[3])
        axis.set(xscale="log", xlabel="rounds T", ylabel="attack success", ylim=(0, 1), title="64 steps of each player in all" if kind == "equal" else "steps grow with T")
        axis.set_xticks(horizons, horizons)
        axis.legend(frameon=False, fontsize=8)
    canvas.savefig(Path(out) / "rounds.png", dpi=150)


def draw_probe(folder, results, matrix, steps):
    canvas, (gaps, heat) = figure(2)
    for kind, look in zip(("last", "mixture", "weights"), LOOKS):
        these = [row for row in results if row["kind"] == kind]
        gaps.plot([row["round"] for row in these], [row["bound"] for row in these], label=f"{kind}: Nash gap, at least", ms=4, **look)
        gaps.plot([row["round"] for row in these], [row["best_attack"] for row in these], color=look["color"], ls=":", lw=1, label=f"{kind}: best attack")
    gaps.set(xlabel="round", ylabel=f"after {steps} PPO steps of a fresh player", ylim=(0, 1), title="best responses")
    gaps.legend(frameon=False, fontsize=7)
    heat.grid(False)
    image = heat.imshow(matrix, cmap="Greys", vmin=0, vmax=1, origin="lower")
    for (i, j), value in np.ndenumerate(matrix):
        heat.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color="white" if value > 0.5 else "black")
    ticks = range(0, len(matrix), max(1, len(matrix) // 5))
    heat.set_xticks(ticks), heat.set_yticks(ticks), gaps.set_xticks(sorted({row["round"] for row in results}))
    heat.set(xlabel="defender after round (0: SFT)", ylabel="attacker after round (0: SFT)", title="who breaks whom: attack success in %")
    canvas.colorbar(image, ax=heat, shrink=0.8)
    canvas.savefig(folder / "probe.png", dpi=150)
