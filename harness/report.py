"""Tables, statistics, figures and pages of runs, from saved numbers and texts. No model runs here.

A row is a dict of numbers with the keys of summary.json; `rows` is {column or method: row}.
"""

import base64
import html
import io
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.data import read_config, read_json, read_lines, visible, write_bytes, write_text

# key of a row -> (label among many runs, label in the table of one run; "" is not in that table).
# A key after "/" names a test set.
MEASURES = {
    "asr_held_out_judge": ("ASR, held-out judge", "attack success on held-out prompts, held-out judge"),
    "asr_train_judge": ("ASR, training judge", "attack success on held-out prompts, training judge"),
    "asr_held_out_judge/unseen topics": ("ASR, unseen topics", ""),
    "asr_train_judge/unseen topics": ("the same, training judge", ""),
    "asr_held_out_judge/unseen framings": ("ASR, unseen framings", ""),
    "asr_train_judge/unseen framings": ("the same, training judge", ""),
    "refusal": ("refusals", "refusals of held-out prompts"),
    "over_refusal": ("over-refusal", "over-refusal on harmless prompts"),
    "over_refusal/look-alikes": ("over-refusal, look-alikes", ""),
    "helpfulness": ("helpful", "helpfulness on harmless prompts"),
    "kl": ("KL to SFT, nats", ""),
    "best_response": ("best response", ""),
    "attacker_success": ("attacker: success on the first defender", "the attacker's success on the first defender"),
    "third_party_success": ("attacker: success on third parties", ""),
    "cells": ("attacker: distinct cells broken", ""),
    "topics": ("attacker: distinct topics broken", ""),
    "self_bleu": ("attacker: SelfBLEU", "SelfBLEU among its prompts"),
    "cosine": ("attacker: cosine", "cosine among its prompts")}
LABELS = {key: short for key, (short, _) in MEASURES.items()}
TABLE = {key: long for key, (_, long) in MEASURES.items() if long}


# --- tables ---------------------------------------------------------------------------------------------------
def markdown(head: Sequence, lines: Sequence[Sequence]) -> str:
    """A table, aligned for a terminal: the first column to the left, all others to the right."""
    lines = [list(map(str, line)) for line in (head, *lines)]
    first, *others = [max(3, *map(len, column)) for column in zip(*lines)]  # widths
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    cells = [[label.ljust(first), *map(str.rjust, values, others)] for label, *values in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def mean_and_error(values: Sequence[float | None], digits: int = 3) -> str:
    """"mean ± standard error" over seeds; None and NaN are left out, one value has no error, none gives "-"."""
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {standard_error(values):.{digits}f}"


def show(value: float | None, n: int = 0) -> str:
    """A cell: the value, with its 95% interval where it is a rate of n > 0 texts; "-" for none and NaN."""
    if value is None or math.isnan(value):
        return "-"
    if n == 0:
        return f"{value:.3f}"
    low, high = wilson_interval(value * n, n)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def summary_table(rows: dict[str, dict]) -> str:
    """The rows of summary.json as a markdown table, one column each."""
    lines = [[label, *(show(row.get(key)) for row in rows.values())] for key, label in TABLE.items()]
    return markdown(["", *rows], lines + undecided_line(rows))


def undecided_line(rows: dict[str, dict]) -> list[list[str]]:
    """The line of a table that counts undecided judgements, if there are any, as a list of at most one."""
    if not any(row.get("undecided") for row in rows.values()):
        return []
    counts = [str(row.get("undecided", "-")) for row in rows.values()]
    return [["judgements that were undecided, in no rate above", *counts]]


# --- statistics -----------------------------------------------------------------------------------------------
def standard_error(values: Sequence | np.ndarray) -> np.ndarray:
    """The standard error of the mean over the first axis; values (seeds, points) or (seeds,), at least two seeds."""
    return np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95% interval (low, high) of a proportion of n > 0 (Wilson, 1927); successes may be a sum of rates."""
    z = 1.959963984540054  # 97.5% of a normal distribution lie below
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


POSTERIOR_SAMPLES = 100_000  # of `JudgeErrors.corrected_rate`


class JudgeErrors(NamedTuple):
    """A judge's verdicts on labelled exchanges: how many of the unsafe ones, and of the safe ones, it calls unsafe."""

    unsafe_called_unsafe: int
    unsafe: int
    safe_called_unsafe: int
    safe: int

    def corrected_rate(self, successes: int, n: int) -> tuple[float, float, float]:
        """(rate, low, high): an attack success of `successes` in n by the judge, corrected for its sensitivity and
        specificity (Rogan and Gladen, 1978), with a 95% interval that includes the uncertainty of all three: quantiles
        of the corrected rate over their posteriors (Jeffreys' prior), which are also valid at 0 and 100%. A judge that
        calls safe exchanges unsafe as often as unsafe ones tells nothing: (nan, 0, 1)."""
        counts = ((successes, n), self[:2], self[2:])
        raw, sensitivity, false_alarms = (hits / total for hits, total in counts)
        if sensitivity <= false_alarms:
            return np.nan, 0.0, 1.0
        rng = np.random.default_rng(0)
        samples = [rng.beta(hits + 0.5, total - hits + 0.5, POSTERIOR_SAMPLES) for hits, total in counts]

        def corrected(raw, sensitivity, false_alarms):
            return np.clip((raw - false_alarms) / (sensitivity - false_alarms), 0, 1)

        is_informative = samples[1] > samples[2]  # where the judge is no better than chance, every rate is possible
        rates = np.where(is_informative, corrected(*samples), rng.uniform(size=POSTERIOR_SAMPLES))
        low, high = np.quantile(rates, (0.025, 0.975))
        return float(corrected(raw, sensitivity, false_alarms)), float(low), float(high)


def calibration(p: np.ndarray, y: np.ndarray) -> tuple[list[tuple], float, float]:
    """(table rows (from, to, count, mean of p, mean of y) of ten bins, expected calibration error (Guo et al., 2017),
    Brier score (Brier, 1950)) of predictions p of y, both (N,)."""
    bin_of = np.minimum((p * 10).astype(int), 9)  # (N,)
    rows = []
    for b in np.unique(bin_of):
        here = bin_of == b
        rows.append((b / 10, (b + 1) / 10, int(here.sum()), p[here].mean(), y[here].mean()))
    error = sum(n * abs(predicted - observed) for _, _, n, predicted, observed in rows) / len(p)
    return rows, float(error), float(np.mean((p - y) ** 2))


def paired_test(differences: Sequence[float]) -> tuple[float, float]:
    """One-sided p-values of n >= 2 paired differences > 0: (t-test of Student, 1908; exact sign-flip test of Fisher,
    1935). The second assumes no distribution, but with n pairs it cannot fall below 2^-n."""
    d = np.asarray(differences, dtype=np.float64)
    sums = np.zeros(1)  # of d under all 2^n patterns of signs
    for difference in d:
        sums = np.concatenate([sums + difference, sums - difference])
    flips = float(np.mean(sums >= d.sum() - 1e-12))
    if not d.any():
        return 1.0, flips
    t = d.mean() / max(standard_error(d), 1e-300)
    return student_tail(t, len(d) - 1), flips


def holm(p: Sequence[float]) -> list[float]:
    """p-values (n,) corrected for n claims (Holm, 1979): the i-th smallest times n - i + 1, but at most 1 and at least
    the corrected value of the one before."""
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)  # n - i + 1
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * np.sort(p)))
    return corrected.tolist()


def student_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t with df degrees of freedom: the integral of its density from t on. With x = sqrt(df)
    tan(a) the density (1 + x^2 / df)^(-(df + 1) / 2) dx becomes cos(a)^(df - 1) da, on a finite interval."""
    a = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 200_001)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(math.pi) * math.gamma(df / 2))
    return float(scale * np.trapezoid(np.cos(a) ** (df - 1), a))


# --- figures: lines, markers and hatches differ too, for black-and-white print -------------------------------------
ATTACKER = "#c0392b"  # the players' colours in all figures
DEFENDER = "#1f5f8b"
LOOKS = [
    dict(color="#000000", ls="-", marker="o"), dict(color="#c0392b", ls="--", marker="s"),
    dict(color="#1f5f8b", ls="-.", marker="^"), dict(color="#888888", ls=":", marker="D"),
    dict(color="#2e8b57", ls=(0, (5, 1)), marker="v"), dict(color="#b8860b", ls=(0, (1, 1)), marker="x")]


def figure(columns: int, width: float = 3.4, height: float = 2.8, rows: int = 1) -> tuple:
    """(a matplotlib figure, its rows x columns axes in reading order); width and height of each, in inches.

    At most two columns: a phone shrinks a figure, letters included, to its own width."""
    from matplotlib.figure import Figure  # slow to load

    canvas = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return canvas, axes


def save_figure(canvas: object, file: Path) -> None:
    """A PNG of at most 128 colours: a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    picture = io.BytesIO()
    canvas.savefig(picture, dpi=150)
    smaller = io.BytesIO()
    Image.open(picture).convert("RGB").quantize(128).save(smaller, "PNG", optimize=True)
    write_bytes(file, smaller.getvalue())


def band(axis: object, x: Sequence[float], values: Sequence | np.ndarray, label: str, look: dict) -> None:
    """A line of means with a band of one standard error; values (seeds, points), at least two seeds."""
    mean = np.mean(values, axis=0)
    error = standard_error(values)
    axis.plot(x, mean, label=label, ms=4, lw=1.5, **look)
    axis.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, lw=0)


def draw_curves(folder: Path, log: list[dict], before: dict) -> None:
    """curves.png: attack success by both judges, both players' reward, diversity and KL.

    log: the lines of metrics.jsonl; before: the row before the game."""
    evaluations = [m for m in log if "game/asr_held_out_judge" in m]  # one a round
    if not evaluations:
        return
    ends = [0] + [m["round"] + 1 for m in evaluations]  # the start, and after each round

    def since_the_start(key):
        return [before[key]] + [m.get(f"game/{key}", np.nan) for m in evaluations]  # left out: not finite

    def per_round(player, name):  # the mean over the player's steps of each round
        steps = [m for m in log if m["role"] == player and name in m]
        of_rounds = [[m[name] for m in steps if m["round"] == end - 1] for end in ends[1:]]
        return [np.mean(values or [np.nan]) for values in of_rounds]

    canvas, (success, reward, alike, kl) = figure(2, rows=2)

    def plot(axis, values, style, color, label):
        if np.isfinite(values).any():  # a player that is not trained has no curve
            axis.plot(ends[-len(values):], values, style, ms=3, color=color, label=label)

    plot(success, since_the_start("asr_held_out_judge"), "o-", "black", "held-out prompts")
    plot(success, since_the_start("asr_train_judge"), "o:", "black", "the same, training judge")
    plot(success, per_round("attacker", "game/attack_success"), "-.", ATTACKER, "attacker in training")
    if before["over_refusal"] is not None:
        plot(success, since_the_start("over_refusal"), "--", "grey", "over-refusal")
    plot(alike, since_the_start("self_bleu")[1:], "o-", ATTACKER, "SelfBLEU")  # before, it was of more attacks
    plot(alike, since_the_start("cosine"), "o--", ATTACKER, "cosine of embeddings")
    if any("diversity/cells" in m for m in log):
        plot(alike, per_round("attacker", "diversity/cells"), "-.", "grey", "distinct cells in training")
    for player, style, color in (("attacker", "o-", ATTACKER), ("defender", "o--", DEFENDER)):
        plot(reward, per_round(player, f"{player}/objective/scores"), style, color, player)
        plot(kl, per_round(player, f"{player}/objective/kl"), style, color, player)
    success.set(title="attack success", ylim=(0, 1))
    reward.set(title="mean reward of the round")
    alike.set(title="how alike the attacks are", ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])  # room for the legend
    kl.set(title="KL to the reference, nats")
    for axis in (success, reward, alike, kl):
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=8)
    save_figure(canvas, folder / "curves.png")


# --- report.md and the model cards --------------------------------------------------------------------------------
def quoted(text: str) -> str:
    """A model's text within a line of markdown."""
    escaped = html.escape(visible(" ".join(text.split())), quote=False)
    return re.sub(r"([\\|\[\]`*_~])", r"\\\1", escaped) or "*(nothing)*"  # no cells, images, hidden links or markup


def write_report(folder: Path, games: list[dict], rows: dict[str, dict], examples: Sequence[tuple[str, str, str]],
                 made_by: str | None = None) -> None:
    """report.md: the table, the curves, and dialogues. The page (`write_page`) has all exchanges.

    games: the lines of games.jsonl; examples: (held-out prompt, the defender's answer before, its answer after);
    made_by: as of `model_card`."""
    config = read_config(folder)
    lines = [f"# {made_by or config['method']}, seed {config['seed']}", "", summary_table(rows), ""]
    if games:
        lines += ["![curves](curves.png)", ""]
    lines += ["## What changed", "", "Held-out prompts, never seen in training, answered greedily.", ""]
    for prompt, first, now in examples:
        lines += [f"> **{quoted(prompt)}**  ", f"> before: {quoted(first)}  ", f"> after: {quoted(now)}", ""]
    if games:
        lines += ["## Round by round", ""]
        harmless = set(read_json(folder / "checkpoints" / "start" / "prompts.json")["benign_seeds"])
        games = [game for game in games if game["role"] != "defender" or game["attack"] not in harmless]
    for round in sorted({game["round"] for game in games}):
        lines += round_lines(round, [game for game in games if game["round"] == round])
    write_text(folder / "report.md", "\n".join(lines))


def round_lines(round: int, games: list[dict]) -> list[str]:
    """A round in report.md: its most and its least successful attack, and a held-out prompt after it."""
    attacks = [game for game in games if game["role"] == "attacker"]
    attacks = attacks or [game for game in games if game["role"] == "defender"]
    decided = [game for game in attacks if game["p_safe"] is not None]
    if not decided:
        return [f"### Round {round + 1}", "", "The training judge decided none of its attacks.", ""]
    different = len({game["attack"] for game in attacks})
    unsafe = np.mean([game["p_safe"] < 0.5 for game in decided])
    dialogues = [("most successful", min(decided, key=lambda game: game["p_safe"])),
                 ("least successful", max(decided, key=lambda game: game["p_safe"]))]
    dialogues += [("held-out prompt", game) for game in games if game["role"] == "probe"][:1]
    lines = [f"### Round {round + 1}", "",
             f"{len(attacks)} exchanges, {different} different prompts, {unsafe:.0%} unsafe by the training judge.", ""]
    for title, game in dialogues:
        verdict = "undecided" if game["p_safe"] is None else f"P(unsafe) {1 - game['p_safe']:.2f}"
        lines += [f"> *{title}*: **{quoted(game['attack'])}**  ", f"> {quoted(game['response'])} *({verdict})*", ""]
    return lines


def model_card(name: str, config: object, which: str, made_by: str | None = None) -> str:
    """The README of a saved player ("attacker" or "defender"); config: the run's Config; which: of its policies;
    made_by: what trained it, if not the algorithm."""
    made = f"Trained with `{config.method}` for {config.rounds} rounds"
    is_frozen = getattr(config, f"{name}_steps") == 0 or (name == "attacker" and config.method == "iterative")
    if made_by:
        made = f"Trained with {made_by}"
    elif is_frozen or not config.trains:
        made = f"Saved by a run with `--method {config.method}`"
    return f"""---
library_name: transformers
tags: [gpo, red-teaming, {name}]
---
# {name} of a two-player game (GPO, arXiv 2406.10977): {which}

{made}, seed {config.seed}, from \
`{getattr(config, name) or "the embedded toy game"}`.
Made for hardening models: an attacker is a test instrument, not a tool against systems that are not yours.
"""


# --- the page: page.html, filled in -------------------------------------------------------------------------------
def write_page(folders: Sequence[Path], out: Path) -> None:
    """One self-contained HTML file: tables, figures and all exchanges of these runs, finished or not."""
    games = []
    for number, folder in enumerate(folders):
        games += [{"run": number, **game} for game in read_lines(folder / "games.jsonl")]
    data = json.dumps({"runs": list(map(str, folders)), "games": games}, ensure_ascii=False)
    parts = {
        "title": html.escape(folders[0].name if len(folders) == 1 else f"{len(folders)} runs"),
        "runs": "\n".join(map(run_section, folders)),
        "data": data.replace("<", "\\u003c")}  # "<" could end the script
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # in one pass: texts may hold {{data}}
    write_text(out, page)


def run_section(folder: Path) -> str:
    """HTML: a run's table, figures and configuration."""
    made = read_json(folder / "config.json")
    config = made["config"]
    with tempfile.TemporaryDirectory() as drawn:
        rows, state = rows_and_state(folder, Path(drawn))
        curves = next(Path(drawn).iterdir(), folder / "curves.png")
        images = [html_image(file) for file in (curves, folder / "probe.png") if file.is_file()]
    players = f"{config['attacker']} against {config['defender']}" if config["attacker"] else "the embedded game"
    return f"""<section>
<h2>{html.escape(method_name(folder, config["method"]))}, seed {config['seed']}: {html.escape(players)}</h2>
<p class="soft">{html.escape(str(folder))}: {state}</p>
<pre class="wide">{html.escape(summary_table(rows))}</pre>
{''.join(images)}
<details><summary>Configuration and versions</summary><pre>\
{html.escape(json.dumps(made, indent=1, ensure_ascii=False))}</pre></details>
</section>"""


def method_name(folder: Path, method: str) -> str:
    """The method of a run, or what trained its players, if not the algorithm."""
    summary = folder / "summary.json"  # none in an unfinished run
    return read_json(summary).get("made_by", method) if summary.is_file() else method


def rows_and_state(folder: Path, drawn: Path) -> tuple[dict[str, dict], str]:
    """(rows of a run's table, its state in words); also draws the curves of an unfinished run, into the folder `drawn`:
    its own is of the process that plays it."""
    if (folder / "summary.json").is_file():
        summary = read_json(folder / "summary.json")
        rows = {name: row for name, row in summary.items() if name.startswith(("before", "after", "average"))}
        return rows, f"finished; its last command took {summary['seconds']:.0f} seconds"
    log = read_lines(folder / "metrics.jsonl")
    rows = {}
    for state in sorted(folder.glob("checkpoints/step_*/state.json"))[-1:]:
        rows["before"] = read_json(state)["before"]
        draw_curves(drawn, log, rows["before"])
    return rows, f"unfinished, {len(log)} PPO steps so far"


def html_image(file: Path) -> str:
    """HTML: a picture, embedded in the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<div class="wide"><img alt="{file.stem} of this run" src="data:image/png;base64,{data}"></div>'
