"""Train a judge, measure it on a held-out tenth, save it for --judge: python -m experiments.train_judge --help"""

import argparse
import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import find_adapter_config_file

from eval import DEVICE, run_program
from harness.config import devices
from harness.data import (
    as_a_program,
    check_labels,
    fail,
    is_out_of_memory,
    is_test,
    read_json,
    read_rows,
    share,
    write_json,
)
from harness.report import calibration, markdown, show
from model import best_dtype, check_body, check_tokenizer, first_line, load_tokenizer, save_tokenizer
from reward import Judge, JudgeTraining, classifier_inputs, judge_score, train_judge


def _read_samples(path):
    """(training, held-out) samples for `train_judge` from a file: a tenth is held out, by hash of the prompt."""
    rows = read_rows(path)
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows
             if {"chosen", "rejected"} <= set(row) and row["chosen"] != row["rejected"]]
    if not pairs:
        check_labels(path, rows)
    samples = pairs or [(row["prompt"], row["response"], row["safe"]) for row in rows
                        if {"response", "safe"} <= set(row)]
    if not samples:
        raise ValueError(f"{path} needs rows with 'response' and 'safe' or 'label', or with 'chosen' and 'rejected'")
    training = [sample for sample in samples if not is_test(sample[0])]
    held_out = [sample for sample in samples if is_test(sample[0])]
    if min(len(training), len(held_out)) < 2:
        raise ValueError(f"needs at least 2 samples to train on and 2 held out, got {len(training)}, {len(held_out)}")
    if not pairs and len({label > 0.5 for _, _, label in training}) < 2:
        raise ValueError(f"a judge needs safe and unsafe samples to train on, got one class only in {path}")
    kind = "preference pairs, two replies to one prompt" if pairs else "labelled responses"
    print(f"{len(samples)} of {len(rows)} rows are {kind}: {len(training)} to train on, {len(held_out)} held out")
    return training, held_out


@torch.no_grad()
def measure_judge(judge: Judge, samples: list[tuple], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions p and outcomes y of a judge from `train_judge`, both (N,): P(safe) and the label; or, for pairs in
    random order, P(the first is better) and 0 or 1."""
    prompts, first, second = zip(*samples)

    def scores(texts):  # (N,), in groups
        groups = [slice(i, i + 64) for i in range(0, len(texts), 64)]
        inputs = classifier_inputs(judge.model, judge.tokenizer, prompts, texts)
        return torch.cat([judge_score(judge, inputs[rows]) for rows in groups]).double().cpu()

    if not isinstance(second[0], str):
        return scores(first).sigmoid().numpy(), np.array(second)
    y = np.random.default_rng(seed).integers(2, size=len(samples))  # always "first" would be no test of calibration
    difference = (scores(first) - scores(second)) * torch.from_numpy(2 * y - 1)
    return difference.sigmoid().numpy(), y.astype(float)


SAVE_SECONDS = 60  # between checkpoints


class Checkpoint:
    """The state of a training, kept in a file."""

    def __init__(self, file: Path):
        self.file = file
        self.saved_at = time.time()

    def load(self, parts: dict[str, object]) -> int:
        """Restore {name: model, optimizer or schedule}. Returns the steps that were done, 0 without a file; raises
        ValueError if it is damaged."""
        if not self.file.exists():
            return 0
        try:
            saved = torch.load(self.file, map_location="cpu")  # AdamW counts steps on the CPU
            done = saved.pop("done")
            for name, state in saved.items():
                parts[name].load_state_dict(state)
        except Exception as error:
            raise ValueError(f"cannot go on from {self.file}: {first_line(error)}; remove it to begin the training "
                             "again") from error
        return done

    def save(self, done: int, parts: dict[str, object]) -> None:
        """Write the state after `done` steps, at most every SAVE_SECONDS. Raises OSError."""
        if time.time() - self.saved_at < SAVE_SECONDS:
            return
        writing = Path(f"{self.file}.writing")
        try:
            torch.save({"done": done, **{name: part.state_dict() for name, part in parts.items()}}, writing)
            os.replace(writing, self.file)
        except RuntimeError as error:  # by which torch tells of a full disk
            raise OSError(f"cannot write {self.file}: {first_line(error)}") from error
        finally:
            writing.unlink(missing_ok=True)
        self.saved_at = time.time()


def _training(args):
    """What the training depends on, for training.json in --out, by which a stopped one is resumed. Raises ValueError if
    --out is neither new nor empty and holds no stopped training with the same options."""
    options = {name: str(value) for name, value in vars(args).items()
               if name not in ("out", "device", "trust_remote_code")}
    if Path(args.model).is_dir():
        options["model"] = str(Path(args.model).resolve())
    options["data"] = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()  # another file is another training
    if (args.out / "training.json").is_file():
        other = read_json(args.out / "training.json")
        different = [name for name in options if other.get(name) != options[name]]
        if different:
            raise ValueError(f"--out {args.out} holds a training that was stopped, of another {', '.join(different)}; "
                             "go on with the command that began it, or name a new folder")
        print(f"going on with the training that was stopped in {args.out}")
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out must name a new or empty folder, got {args.out}")
    return options


def _check_arguments(args):
    sizes = args.steps >= 2 and args.batch_size >= 1 and args.max_length >= 16
    if not (sizes and 0 < args.learning_rate < float("inf") and 0 <= args.seed < 2**31):
        raise ValueError("needs --steps >= 2, --max_length >= 16, --batch_size >= 1, --learning_rate > 0, --seed >= 0 "
                         "and below 2^31")
    if args.device not in devices():
        raise ValueError(f"--device must be {' or '.join(devices())} on this machine, got {args.device!r}")


def _load_classifier(args):
    """(model, tokenizer) with a head of two labels. Raises ValueError."""
    torch.manual_seed(args.seed)  # for a new head
    try:
        if find_adapter_config_file(args.model):  # of which only the adapter would be saved, without our labels
            raise ValueError("it is an adapter; merge it into its base first (peft's merge_and_unload) and save that")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            args.model, dtype=torch.float32, num_labels=2, ignore_mismatched_sizes=True, output_loading_info=True,
            trust_remote_code=args.trust_remote_code)
        check_body(model, info)
        tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
        check_tokenizer(model, tokenizer)
    except Exception as e:
        raise ValueError(f"--model must be a model's folder or hub id, got {args.model!r}: {first_line(e)}") from e
    model.to(args.device)
    tokenizer.model_max_length = min(tokenizer.model_max_length, args.max_length)
    return model, tokenizer


def _make_judge(args):
    """Train, measure and save as the flags say; returns `measure_judge`'s (p, y). Raises ValueError or OSError."""
    _check_arguments(args)
    training, held_out = _read_samples(args.data)
    options = _training(args)
    model, tokenizer = _load_classifier(args)
    args.out.mkdir(parents=True, exist_ok=True)  # fail now if it cannot be written
    write_json(args.out / "training.json", options)
    dtype = best_dtype(args.device)
    if dtype != torch.float32 and args.device == "cpu":
        model.set_attn_implementation("eager")  # faster in bf16, as for policies
    checkpoint = Checkpoint(args.out / "training.pt")
    settings = JudgeTraining(args.steps, args.batch_size, args.learning_rate, args.seed, dtype, by_length=True,
                             checkpoint=checkpoint)
    try:
        judge = train_judge(model, tokenizer, training, settings)
    except BaseException:  # Ctrl-C too
        if not checkpoint.file.is_file():  # there is nothing to go on from
            (args.out / "training.json").unlink()
            with contextlib.suppress(OSError):
                args.out.rmdir()
        raise
    judge.model.save_pretrained(args.out)
    save_tokenizer(judge.tokenizer, args.out)
    share(args.out)
    measured = measure_judge(judge, held_out, args.seed)
    checkpoint.file.unlink(missing_ok=True)
    (args.out / "training.json").unlink()
    return measured


def make_judge(args: argparse.Namespace) -> None:
    """Train and save a judge, and print accuracy and calibration on the held-out tenth."""
    try:
        p, y = _make_judge(args)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"out of memory with --batch_size {args.batch_size}; take a smaller one, or fewer tokens by "
                         f"--max_length ({first_line(error)[:100]})") from error
    rows, ece, brier = calibration(p, y)
    print(f"held-out accuracy {show(np.mean((p > 0.5) == (y > 0.5)), len(p))}, expected calibration error {ece:.3f}, "
          f"Brier score {brier:.3f}\n")
    lines = [[f"{low:.1f} to {high:.1f}", n, *map(show, means)] for low, high, n, *means in rows]
    print(markdown(["predicted", "count", "mean predicted", "observed"], lines))
    print(f"\nThe judge is in {args.out}: python train.py --judge {args.out}")


def main(argv: Sequence[str]) -> None:
    """Parse the arguments and train a judge."""
    parser = argparse.ArgumentParser(prog="python -m experiments.train_judge", description=__doc__.split(":")[0],
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see python -m experiments.train_judge --help")
    flag = parser.add_argument
    flag("data", help="rows of prompt, response and safe (1, true or a probability) or label (safe or unsafe), or of "
         "prompt, chosen, rejected, or HH")
    flag("--model", required=True, help="classifier, encoder or decoder, folder or hub id; a missing head is made new")
    flag("--out", required=True, type=Path, help="new folder for the judge")
    flag("--steps", type=int, default=500, help="of AdamW; more will overfit a few thousand rows")
    flag("--batch_size", type=int, default=32, help="samples in a step: lower it where memory is short")
    flag("--learning_rate", type=float, default=2e-5, help="peak of one cycle; small new models want 1e-3")
    flag("--seed", type=int, default=0, help="of everything random: a new head, the order of the samples")
    flag("--max_length", type=int, default=512, help="tokens of prompt and response, saved with the judge")
    flag("--device", default=DEVICE, help="cpu or cuda")
    flag("--trust_remote_code", action="store_true", help="run Python files that come with a model")
    run_program(make_judge, parser.parse_args(argv),
                "; the same command goes on from the last checkpoint, of every minute of training")


if __name__ == "__main__":
    as_a_program(main)
