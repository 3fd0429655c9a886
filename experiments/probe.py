"""How far a fresh attacker gets against the frozen defender of a finished run: a best response, found by PPO.

    python -m experiments.probe RUN [--steps S] [--round R]      RUN/best_R_S.json; R = 0: the finished defender
    python -m experiments.probe RUN --figure                     draws what `eval.py probe RUN` has measured

The gain in its success is a lower bound of what the initial attacker could gain: its part of the Nash gap, Eq. (3.6).
The held-out judge is used for both training and measurement.
"""

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval import EXCHANGES, BestResponseSettings, after_round, best_response, fresh_player, run_program, success
from gpo import play
from harness.data import as_a_program, fail, read_json, visible, write_json
from harness.report import LOOKS, figure, save_figure
from harness.run import open_run


def probe(args: argparse.Namespace) -> None:
    """Print a fresh attacker's success against the frozen defender before, during and after training, and exploits."""
    run = open_run(args.run)
    if args.round > run.config.rounds:
        raise ValueError(f"--round must be at most the {run.config.rounds} rounds of {args.run}, got {args.round}")
    defender = run.world.players["defender"]
    if args.round:
        defender = after_round(run, "defender", args.round)
    settings = BestResponseSettings(run.world.seeds, run.world.held_out_judge, args.steps, run.config.batch_size,
                                    run.config.seed)
    fresh = fresh_player(run, "attacker")
    attacker, curve = best_response(fresh, defender, settings)
    before = success(fresh, defender, settings)
    after = success(attacker, defender, settings)
    exchanges = play(attacker, defender, settings.seeds[:EXCHANGES], settings.judge, settings.seed)
    broken = Counter(prompt for prompt, p in zip(exchanges.prompts, exchanges.p_safe) if p < 0.5).most_common(3)
    found = {"steps": args.steps, "before": before, "after": after, "curve": curve, "exploits": broken}
    write_json(run.path / f"best_{args.round}_{args.steps}.json", found)
    print(f"a fresh attacker breaks the defender in {before:.1%} of {EXCHANGES} tries, after {args.steps} PPO steps "
          f"on the held-out judge in {after:.1%}: gap {after - before:+.1%}")
    print(f"success in the batch of every tenth step: {' '.join(f'{rate:.2f}' for rate in curve[::10])}")
    for prompt, count in broken:
        print(f"{count} of {len(exchanges.prompts)} times: {visible(prompt)}")


def draw_probe(args: argparse.Namespace) -> None:
    """Draw probe.png from probe.json: lower bounds of the Nash gap, and who breaks whom after each round (0: start)."""
    file = Path(args.run) / "probe.json"
    if not file.is_file():
        raise ValueError(f"--figure needs the lower bounds in {file}; compute them with: python eval.py probe "
                         f"{shlex.quote(args.run)}")
    found = read_json(file)
    matrix = np.array(found["cross_play"])  # (attackers, defenders), success rates
    canvas, (gaps, heat) = figure(1, 4.8, 3.6, rows=2)
    for kind, look in zip(("last", "mixture", "weights"), LOOKS):
        rows = [row for row in found["gaps"] if row["kind"] == kind]
        rounds = [row["round"] for row in rows]
        gaps.plot(rounds, [row["bound"] for row in rows], label=f"{kind}: Nash gap, at least", ms=4, **look)
        gaps.plot(rounds, [row["best_attack"] for row in rows], label=f"{kind}: best attack", color=look["color"],
                  ls=":", lw=1)
    gaps.set(xlabel="round", ylabel=f"after {found['steps']} PPO steps of a fresh player", ylim=(0, 1),
             title="best responses", xticks=sorted({row["round"] for row in found["gaps"]}))
    gaps.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # below the curves
    image = heat.imshow(100 * matrix, cmap="Greys", vmin=0, vmax=100, origin="lower", aspect="auto")
    for (i, j), value in np.ndenumerate(matrix):
        shade = "white" if value > 0.5 else "black"
        heat.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=shade)
    ticks = range(0, len(matrix), max(1, len(matrix) // 5))
    heat.set(xticks=ticks, yticks=ticks, xlabel="defender after round (0: SFT)",
             ylabel="attacker after round (0: SFT)", title="who breaks whom: attack success in %")
    heat.grid(False)
    canvas.colorbar(image, ax=heat, label="%", shrink=0.8)
    save_figure(canvas, Path(args.run) / "probe.png")
    print(f"written to {args.run}/probe.png")


def main(argv: Sequence[str]) -> None:
    """Measure a best response, or draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--steps", type=int, default=90, help="PPO steps of the attacker")
    parser.add_argument("--round", type=int, default=0, help="the defender after this round; 0: the finished one")
    parser.add_argument("--figure", action="store_true", help="draw RUN/probe.json into RUN/probe.png")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.round < 0:
        parser.error(f"--steps must be at least 1 and --round at least 0, got {args.steps} and {args.round}")
    run_program(draw_probe if args.figure else probe, args)


if __name__ == "__main__":
    as_a_program(main)
