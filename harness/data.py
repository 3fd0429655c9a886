"""Terminal output, files that are written atomically, and rows of prompts and pairs in common formats."""

import contextlib
import csv
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import transformers
from tqdm import tqdm

from model import first_line

HUB_DATA = {"prompts": "red-team-attempts/red_team_attempts.jsonl.gz", "sft_data": "harmless-base/train.jsonl.gz",
            "benign_prompts": "helpful-base/test.jsonl.gz"}  # flag -> its default, a file of Anthropic/hh-rlhf


# --- terminal output --------------------------------------------------------------------------------------------
def visible(text: str) -> str:
    """A text for the terminal: control characters, line ends and direction marks are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def fail(message: object) -> NoReturn:
    """End the program after a user's mistake: one line on stderr and exit status 2."""
    print(f"error: {visible(' '.join(str(message).split()))}", file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error tells of a lack of memory."""
    texts = ("out of memory", "not enough memory", "can't allocate memory")  # on CUDA, Windows, Linux
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def as_a_program(main: Callable[[list[str]], None]) -> None:
    """Run main(arguments) as a program: SIGTERM too raises KeyboardInterrupt, with the number of the signal, and a
    character that the terminal's encoding lacks is printed as its escape."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in Jupyter's %run
            stream.reconfigure(errors="backslashreplace")
    main(sys.argv[1:])


def interrupted(stop: KeyboardInterrupt, what_next: str) -> NoReturn:
    """End the program after Ctrl-C or SIGTERM: one line, and the exit status that shells use, 130 or 143."""
    print(f"\ninterrupted{what_next}", file=sys.stderr)
    sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


@contextlib.contextmanager
def passing_on_sigterm(processes: list[subprocess.Popen]) -> Iterator[None]:
    """Ctrl-C reaches the processes that this one has started by the terminal. SIGTERM does not: end them with it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            for process in processes:
                process.terminate()
        raise


def do_jobs(jobs: list[tuple], workers: int, processes: list[subprocess.Popen], label: str | None = None) -> None:
    """Do jobs (function, *arguments), `workers` at a time, with a progress bar if there is a label. After an error or a
    signal no further job begins; it is raised when those at work have ended. processes: what the jobs have started."""
    failed = threading.Event()

    def work(function, *arguments):
        if failed.is_set():
            return
        try:
            function(*arguments)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(workers) as pool, passing_on_sigterm(processes):
        futures = [pool.submit(work, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), label, len(futures), disable=label is None, dynamic_ncols=True):
                future.result()
        finally:
            failed.set()


def quiet_libraries() -> None:
    """Hide warnings and progress bars of transformers and the hub's client: our own errors say what is missing."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


# --- files ------------------------------------------------------------------------------------------------------
def unique_keys(pairs: list[tuple]) -> dict:
    """A dict of (key, value) pairs. Raises ValueError if a key occurs twice, of which JSON and YAML take the last."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the name {key!r} must occur once: remove one")
        found[key] = value
    return found


def read_json(path: str | Path) -> Any:
    """The value in a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)


def read_config(folder: str | Path) -> dict:
    """The options of the run in a folder. Those that older versions did not have, with the values they had built in."""
    built_in = {"lam": 0.95, "missing_eos_penalty": 0.5, "unlikelihood_coef": 0.0}
    return {**built_in, **read_json(Path(folder) / "config.json")["config"]}


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file. Text after the last newline is an incomplete line, maybe of half a character: left out."""
    return path.read_bytes().split(b"\n")[:-1]


def read_lines(path: Path) -> list:
    """The values in the complete lines of a JSON lines file."""
    return list(map(json.loads, complete_lines(path)))


def finite(value: Any) -> Any:
    """A JSON value with None in place of NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)


def json_lines(rows: Iterable) -> str:
    """One JSON line per row."""
    return "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)


def append_lines(path: str | Path, rows: Iterable) -> None:
    """Append one JSON line per row."""
    lines = json_lines(rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write(lines)


def sync(path: str | Path) -> None:
    """Flush a file, or a folder's list of names, to the disk; not on Windows, nor a folder that cannot be flushed."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not Path(path).is_dir():
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically, and flush it to the disk."""
    temporary = Path(f"{path}.writing")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, and flush it to the disk."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically, and flush it to the disk."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def share(folder: Path) -> None:
    """Give the files in a folder its own permissions: safetensors writes files that only their owner can read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextlib.contextmanager
def complete_folder(target: Path, writes: bool = True) -> Iterator[Path]:
    """Yields a temporary folder, which then replaces `target`, flushed to the disk. After an error it is deleted."""
    temporary = target.with_name(f".{target.name}.writing")
    if not writes:  # of several processes one writes; the others only get the path
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        share(temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hub_file(flag: str) -> str:
    """Path of a flag's default file of Anthropic/hh-rlhf, from the hub's cache or the hub. Raises ValueError."""
    try:
        return huggingface_hub.hf_hub_download("Anthropic/hh-rlhf", HUB_DATA[flag], repo_type="dataset")
    except Exception as error:
        raise ValueError(
            f"could not fetch {HUB_DATA[flag]} of Anthropic/hh-rlhf, the default of --{flag} ({type(error).__name__}); "
            "--attacker, --defender, --judge, --held_out_judge, --embedder, --prompts, --sft_data and --benign_prompts "
            "take local paths") from error


# --- rows of prompts and pairs ------------------------------------------------------------------------------------
ROLES = {"user": "Human", "human": "Human", "prompter": "Human", "assistant": "AI", "gpt": "AI", "chatgpt": "AI",
         "model": "AI", "ai": "AI", "bot": "AI", "system": "system", "developer": "system"}  # the role of a message
CONVERSATIONS = ("messages", "conversations", "conversation")
INSTRUCTION = ("instruction", "input", "context")  # Alpaca's and Dolly's: together they are one prompt
PROMPTS = ("prompt", "question", "query", "goal", "transcript")
RESPONSES = ("response", "completion", "answer", "output")  # not AdvBench's target, which no defender should learn
UNREAD = ("history", "image", "images", "video", "videos", "audio", "audios", "tools", "contextstring", "choices",
          "options", "passage", "instances")  # a prompt without them would be another prompt
LABEL_WORDS = {"safe": 1.0, "harmless": 1.0, "unharmful": 1.0, "benign": 1.0, "unsafe": 0.0, "harmful": 0.0}
LABELS = {"safe": ("safe", "is_safe"), "unsafe": ("unsafe", "is_unsafe"),  # 1 means ...
          "": ("label", "labels", "response_label", "response_harm_label")}
PROMPT_LABELS = {"safe": ("prompt_safe", "prompt_is_safe"), "unsafe": ("prompt_unsafe", "prompt_is_unsafe"),
                 "": ("prompt_label", "prompt_harm_label", "prompt_safety")}
LABEL_COLUMNS = {"response": ("label", "safe"), "prompt": ("prompt_label", "prompt_safe")}  # of `read_rows`
LABEL_LIKE = re.compile(  # not read, maybe a label
    "safe|harmful|harmless|toxic|hateful|jailbr|flagged|moderation|violat|_label")
OF_EITHER = re.compile(r"\w*((toxic|hateful|flagged|jailbreak|safety_label|moderation)\w*|type) = ")  # text of a row
NOT_LABELS = ("min_harmlessness_score_transcript", "task_descripton_harmlessness_score",  # HH's red-team attempts
              "response_refusal_label")  # WildGuardMix
RESPONSE_LIKE = re.compile(  # a label beside one may be its own
    r"(^|_)(response|completion|answer|output|generation|chosen)s?(_text|_\w{1,2})?$")
NO_TEXT = re.compile(r"[\d.]+|\{'.*\}|\[['\"].*['\"]\]", re.DOTALL)  # a number; a dict or list, as Python prints it
TEXTS = (*PROMPTS, *INSTRUCTION, *RESPONSES, *CONVERSATIONS, "chosen", "rejected", "system", "system_prompt")
TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # HH's format: it starts with such a name
RENDERED = re.compile(  # by a chat template; HelpSteer2 has such marks between the turns of a prompt
    r"(<s>|<bos>|<\|begin_of_text\|>)?\s*(<\|im_start\|>\w+\n|<\|start_header_id\|>\w+<\||<\|(user|system)\|>\n|"
    r"<start_of_turn>\w+\n|\[INST\].*\[/INST\])|.*<extra_id_1>(User|Assistant)\n", re.DOTALL)


def _is_message(value):
    if not isinstance(value, dict) or {"role", "from"}.isdisjoint(value):
        return False
    return not {"content", "value"}.isdisjoint(value) or set(TEXTS).isdisjoint(value)


def _is_conversation(row):
    return isinstance(row, list) and bool(row) and all(map(_is_message, row))


def _is_blank(value):
    return value is None or value == [] or value != value or (isinstance(value, str) and not value.strip())


def _the_one(fields, names):
    """The value of columns with the same meaning, None if all are blank. Raises ValueError if two differ."""
    found = {name: fields[name] for name in names if not _is_blank(fields.get(name))}
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise ValueError(f"{' and '.join(found)} must hold the same, as they mean the same: rename or remove one")
    return values[0] if values else None


def _message(message):
    """(role, text) of {"role", "content"} or {"from", "value"}."""
    role = str(message.get("role", message.get("from"))).strip().lower()
    content = message.get("content", message.get("value", 0))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text", part.get("value")) for part in content]
        content = "\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
    tools = message.get("tool_calls") or message.get("function_call")
    if role not in ROLES or tools or not isinstance(content, (str, type(None))):
        raise ValueError(f"a message must have a text 'content' or 'value' by one of {', '.join(ROLES)}, no image, no "
                         f"tool calls; got role {role!r} and the keys {', '.join(message)}; leave out the row")
    return ROLES[role], content or ""


def _turns(value, speaker=None):
    """[(role, text)] of a list of messages, of a transcript, or of one text by `speaker`; empty texts are left out."""
    if value is None:
        return []
    if _is_message(value):
        value = [value]
    if isinstance(value, str):
        value = value.replace("\r\n", "\n")
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        turns = [_message(message) for message in value]
    elif isinstance(value, str) and TRANSCRIPT.match(value):
        names_and_texts = TRANSCRIPT.split(value)[1:]
        if len(names_and_texts) == 2 and re.search(r"\n(Human|Assistant):", names_and_texts[1]):
            raise ValueError(f"the turns of a transcript must be separated by an empty line, got {value[:40]!r}")
        turns = [(ROLES[name.lower()], text) for name, text in zip(names_and_texts[::2], names_and_texts[1::2])]
    elif isinstance(value, str) and speaker and RENDERED.match(value.lstrip()):
        raise ValueError(f"a text must be without the marks of a chat template, got {value[:40]!r}: write its turns as "
                         "a list of messages, or leave out the row")
    elif isinstance(value, str) and speaker and not re.match(r"\[\s*\{\s*['\"](role|content|from|value)\b", value):
        turns = [(speaker, value)]
    else:
        raise ValueError(f"{'a prompt or response must be a text or' if speaker else 'a conversation must be'} a list "
                         f"of messages, got {str(value)[:40]!r}")
    return [(role, text.strip()) for role, text in turns if text.strip()]


def _continued(start, end):
    """The turns of `start` and `end`; an `end` that is a whole conversation must begin with `start`."""
    if not start or all(role == "AI" for role, _ in end):
        return start + end
    if end[0] == ("system", start[0][1]):  # no_robots: its prompt is the system message
        return end
    if [turn for turn in end if turn[0] != "system" or turn in start][: len(start)] != start:
        raise ValueError("a conversation beside a prompt must begin with it: add it there, or remove the prompt")
    return end


def _prompt_and_reply(turns):
    """(prompt, its first human turn, the AI's reply or ""). Consecutive turns of one side are joined; a system message
    is put before the human's next turn. PLAIN_TEMPLATE adds the first "Human: "."""
    sides = []
    system = []
    for role, text in turns:
        if role == "system":
            system.append(text)
            continue
        if role == "Human":
            text = "\n\n".join([*system, text])
            system = []
        if sides and sides[-1][0] == role:
            text = f"{sides.pop()[1]}\n\n{text}"
        sides.append((role, text))
    if system:
        raise ValueError("a system message must come before a user's words; move it, or leave out the row")
    reply = sides.pop()[1] if sides and sides[-1][0] == "AI" else ""
    prompt = "".join(f"\n\n{role}: {text}" for role, text in sides)
    first = next((text for role, text in sides if role == "Human"), "")
    return prompt.removeprefix("\n\nHuman: ").strip(), first, reply


def _prompt_turns(fields):
    """The turns of a row's prompt: of one of PROMPTS, or of the parts of an INSTRUCTION together."""
    parts = {name: fields[name] for name in INSTRUCTION if not _is_blank(fields.get(name))}
    whole = " + ".join(parts)  # a column that `_the_one` compares with PROMPTS
    if whole == "context":
        raise ValueError("a prompt with a 'context' beside it would be another without: put the context into the "
                         "prompt, or leave out the row")
    instruction = list(parts.values())
    if all(isinstance(text, str) for text in instruction):
        instruction = "\n\n".join(instruction)
    elif len(instruction) == 1:  # a list of messages
        instruction = instruction[0]
    turns = _turns(_the_one({**fields, whole: instruction}, (*PROMPTS, whole)), "Human")
    if fields.get("transcript"):  # of a red-team attempt: only the first human turn
        return [turn for turn in turns[:1] if turn[0] == "Human"]
    if turns and turns[-1][0] == "AI":
        raise ValueError("a prompt must not end with the AI's words; a whole conversation is 'messages'")
    return turns


def _responses(fields):
    """The names of columns that hold a response, by RESPONSE_LIKE."""
    return [name for name, value in fields.items() if RESPONSE_LIKE.search(name) and not _is_blank(value)]


def _texts(fields, first_turn):
    """{"prompt"} and, if a row has them, {"response", "chosen", "rejected"}, all replies to this prompt. first_turn: of
    the prompt only that. A reply column may hold its prompt too (HH's `chosen`), so each start + end is split anew."""
    turns = _continued(_prompt_turns(fields), _turns(_the_one(fields, CONVERSATIONS)))
    n = max((i for i, (role, _) in enumerate(turns, 1) if role != "AI"), default=0)
    start = turns[:n]
    answer = turns[n:]  # the AI's last turns
    columns = {"response": RESPONSES, "chosen": ["chosen"], "rejected": ["rejected"]}
    ends = {name: _turns(_the_one(fields, names), "AI") for name, names in columns.items()}
    if answer and ends["response"] not in ([], answer):
        raise ValueError("the response and the conversation's last turn compete: remove one of the two")
    others = [name for name in _responses(fields)
              if isinstance(fields[name], str) and name not in (*RESPONSES, "chosen") and not name.endswith("_id")]
    if ends["response"] and others and not first_turn:
        one = next(name for name in RESPONSES if not _is_blank(fields.get(name)))
        raise ValueError(f"{one} and {others[0]} compete: remove one of the two")
    ends["response"] = ends["response"] or answer
    system = _turns(_the_one(fields, ("system", "system_prompt")), "system")
    replies = {}
    for name, end in ends.items():
        if end or not any(ends.values()):
            whole = _continued(start, end)
            replies[name] = _prompt_and_reply([turn for turn in system if turn not in whole] + whole)
    prompt, first = next(((prompt, first) for prompt, first, _ in replies.values() if prompt), ("", ""))
    of_prompt = {name: reply for name, (own, _, reply) in replies.items() if reply and own == prompt}
    return {"prompt": first if first_turn else prompt, **of_prompt}


def _p_safe(value, one):
    """P(safe) of a label; None if it is ambiguous. one: what the number 1 means, "safe", "unsafe" or, unknown, ""."""
    word = str(value).strip().lower()
    if word in LABEL_WORDS:
        return LABEL_WORDS[word]
    with contextlib.suppress(ValueError):
        number = float({"true": 1, "false": 0}.get(word, word))
        if one and 0 <= number <= 1:
            return number if one == "safe" else 1 - number
    return None


def _label(fields, columns):
    """{"safe": P(safe)} by the columns of LABELS or PROMPT_LABELS; {"label": what it says} if that is ambiguous; {}
    without a label. `label` is the last to be read. Raises ValueError if `safe` and `unsafe` contradict each other."""
    values = {one: _the_one(fields, names) for one, names in columns.items()}
    p = {one: _p_safe(value, one) for one, value in values.items()}
    if None not in (p["safe"], p["unsafe"]) and not math.isclose(p["safe"], p["unsafe"], abs_tol=1e-6):
        raise ValueError(f"safe = {values['safe']!r} and unsafe = {values['unsafe']!r} contradict each other; remove "
                         "one")
    for one, value in values.items():
        if value is not None:
            return {"label": value} if p[one] is None else {"safe": p[one]}
    if columns is PROMPT_LABELS and {"s", "h", "v"} <= fields.keys():  # OpenAI's moderation set
        return {"label": f"h = {fields['h']!r}"}
    for name, value in fields.items():
        if name.startswith("prompt") == (columns is PROMPT_LABELS) and _may_be_label(name, value):
            return {"label": f"{name} = {value!r}"}
    return {}


def _may_be_label(name, value):
    """Whether a column that is not read may tell whether a text is safe, by its name or by its value."""
    if name in (*TEXTS, *NOT_LABELS) or name.endswith("_source") or name.startswith("why_") or _is_blank(value):
        return False
    word = str(value).strip().lower()
    if isinstance(value, str) and len(value) >= 20 and not re.fullmatch("[a-z_]{,40}", word):
        return False  # a text
    if LABEL_LIKE.search(name):
        return True
    is_kind = name.endswith("category") and word == "harmful"  # of prompts, in OR-Bench and HarmBench
    return not is_kind and not LABEL_WORDS.keys().isdisjoint(word.split("_"))  # vanilla_harmful, ...


def of_kind(name: str, rows: list[dict], of: str, safe: bool) -> tuple[str, list[dict]]:
    """(name, rows) of the rows whose `of`, "prompt" or "response", is labelled safe or, if not `safe`, unsafe, by all
    rows that hold it. If no row has a label, all remain; else those without one are left out too. The name then tells
    their numbers. Raises ValueError if a label is ambiguous, or if none remain."""
    check_labels(name, rows, of)
    column = LABEL_COLUMNS[of][1]
    has_labels = any(column in row for row in rows)
    labelled = [row for row in rows if column in row or of not in row or not has_labels]

    def text(row):
        return row["prompt"], row.get(of) or row.get("chosen")

    other_kind = [text(row) for row in labelled if (row.get(column, safe) > 0.5) != safe]
    others = set(other_kind)
    kept = [row for row in labelled if text(row) not in others]
    both = len(labelled) - len(kept) - len(other_kind)
    no_label = len(rows) - len(labelled)
    if other_kind:
        name += f" without {len(other_kind)} rows labelled {'unsafe' if safe else 'safe'}"
    if both:
        name += f" without {both} that have both labels"
    if no_label:
        name += f" without {no_label} rows that have no label"
    if not kept:
        raise ValueError(f"{name}: no {of} remains; take another file")
    return name, kept


def check_labels(path: str | Path, rows: list[dict], of: str = "response") -> None:
    """Raises ValueError if a label of `read_rows` is ambiguous: 1 may mean safe or unsafe. of: "response", "prompt"."""
    name, column = LABEL_COLUMNS[of]
    unclear = [row[name] for row in rows if name in row and of in row]
    if unclear:
        raise ValueError(f"{path}: the label {unclear[0]!r:.80} does not tell whether a {of} is safe: write safe "
                         f"or unsafe in a column {name!r}, or P(safe) in {column!r}; or remove this column")


def _fields(row):
    """A row as a dict with keys as in the lists above. Raises ValueError unless it can hold a prompt."""
    if isinstance(row, list) and len(row) == 1 and isinstance(row[0], str):
        row = row[0]
    if isinstance(row, str):
        row = {"prompt": row}
    if _is_conversation(row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a text, a list of messages or an object, got {str(row)[:80]!r}")
    fields = {}
    for key, value in row.items():
        name = "_".join(key.strip("\ufeff").lower().split())
        if name in fields:
            raise ValueError(f"two columns have the name {name!r}: rename or remove one")
        fields[name] = value
    known = (*PROMPTS, *INSTRUCTION[:2], *CONVERSATIONS)
    chosen = fields.get("chosen")
    if not (set(known) & set(fields) or isinstance(chosen, list) or TRANSCRIPT.match(str(chosen))):
        keys = ", ".join(map(repr, list(fields)[:20]))
        holds_rows = all(isinstance(value, (list, dict)) for value in fields.values())
        raise ValueError(f"a row must have one of {', '.join(known)}, or a whole conversation as 'chosen', got the "
                         f"keys {keys}; {'write one list of rows' if holds_rows else 'rename one'}")
    for name in UNREAD:
        if not _is_blank(fields.get(name)) and fields[name] != "[]":
            raise ValueError(f"{name!r} cannot be read, and without it the prompt is another: put it into the prompt, "
                             "or leave out the row")
    return fields


def _parse_row(fields, first_turn, has_responses):
    """A row as {"prompt", ...} of stripped texts, and its label. has_responses: whether any row of the file has one,
    so that the label beside an empty one is not of the prompt. Raises ValueError."""
    texts = _texts(fields, first_turn)
    for text in texts.values():
        if text.encode(errors="ignore").decode() != text:  # no file can hold it
            raise ValueError(f"a text must be complete, got half of a surrogate pair in {text[:40]!r}")
    label = _label(fields, LABELS)
    of_prompt = _label(fields, PROMPT_LABELS)
    is_alone = set(texts) == {"prompt"} and not _responses(fields)
    is_empty = has_responses and any(map(RESPONSE_LIKE.search, fields))
    if (is_alone and not is_empty) or OF_EITHER.match(str(label.get("label"))):
        of_prompt = of_prompt or label
    return {**texts, **label, **{f"prompt_{key}": value for key, value in of_prompt.items()}}


def _json_rows(text):
    """[(n, row)] of one JSON value over any number of lines, a list of rows or one row; or else of JSON lines."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        rows = value if isinstance(value, list) and not _is_conversation(value) else [value]
        return list(enumerate(rows, 1))
    except json.JSONDecodeError as error:
        if text.strip() and error.msg != "Extra data":  # which JSON lines have after the first
            raise
    rows = []
    for n, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append((n, json.loads(line, object_pairs_hook=unique_keys)))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {n}: malformed JSON ({error.msg} at column {error.colno})") from error
        except ValueError as error:  # by `unique_keys`
            raise ValueError(f"line {n}: {error}") from error
    return rows


def _csv_rows(file, separator):
    """[(line, row)] of a file with a header."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, delimiter=separator, strict=True, skipinitialspace=True)
    header = reader.fieldnames or []
    if len(header) == 1 and re.search("[,;\t]", header[0]):
        raise ValueError(f"the header {header[0]!r:.80} must have {separator!r} between its columns")
    names = [name for name in header if name.strip()]
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{error} at line {reader.line_num}: close each quote, and double quotes in a text") from error
    wide = [n for n, row in rows if None in row]
    short = [n for n, row in rows if None in row.values()]
    if len({*names}) < len(names):
        raise ValueError(f"two columns have one name in the header {', '.join(names)}: rename or remove one")
    if wide:
        raise ValueError(f"line {wide[0]} has more cells than the header: put a text with commas in quotes")
    if short:
        raise ValueError(f"line {short[0]} has fewer cells than the header: complete or remove it")
    return rows


def _numbered_rows(path):
    """[(n, row)] of a file: n is the line, or the position in a list."""
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError("it must hold rows, but is only Git LFS's pointer to them: run git lfs pull")
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind in (".json", ".jsonl"):
            return _json_rows(file.read())
        if kind in (".csv", ".tsv"):
            return _csv_rows(file, "," if kind == ".csv" else "\t")
        if kind == ".txt":
            text = file.read()
            if "\0" in text or re.match(r"\s*(<!doctype html|<html)", text, re.IGNORECASE):
                raise ValueError(f"a .txt file must hold a prompt a line, got {text[:40]!r}")
            if re.match(r"\s*(\{\s*\"|\[\s*[\"{\[])", text):
                raise ValueError("it holds JSON: its name must end in .jsonl or .json")
            return [(n, line.strip()) for n, line in enumerate(re.split("\r\n|\r|\n", text), 1) if line.strip()]
    raise ValueError("the name must end in .jsonl, .json, .csv, .tsv or .txt, or one of them and .gz; of Parquet: "
                     "pandas.read_parquet(FILE).to_json('rows.json', orient='records')")


def _each(parse, path, numbered):
    """[(n, parse(row))] of [(n, row)]. Raises ValueError with file and line."""
    parsed = []
    for n, row in numbered:
        try:
            parsed.append((n, parse(row)))
        except Exception as error:
            raise ValueError(f"{path}, row {n}: {error}") from error
    return parsed


def read_rows(path: str | Path, first_turn: bool = False) -> list[dict]:
    """Rows of a .jsonl, .json, .csv, .tsv or .txt file (each also .gz) as dicts of stripped texts: "prompt" and, if
    present, "response" or "chosen" and "rejected"; and "safe", P(safe), or an ambiguous "label", of the prompt
    "prompt_safe" or "prompt_label". Earlier turns and system messages stay in the prompt, which is "" without a
    human turn; with `first_turn` only the first human turn stays, with the system messages before it. A row may be
    a text, [text], a list of messages, or an object with the names above. Raises ValueError with file and line."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"a data file must exist, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"a data file must be a file, got the folder {str(path)!r}; name a file in it")
    try:
        numbered = _numbered_rows(path)
    except Exception as error:  # a damaged archive, bytes that are not text, ...
        remedy = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"cannot read {path}: {first_line(error)}{remedy}") from error
    fields = _each(_fields, path, numbered)
    has_responses = any(_responses(row) for _, row in fields)
    rows = [row for _, row in _each(lambda row: _parse_row(row, first_turn, has_responses), path, fields)]
    if not rows:
        raise ValueError(f"{path} must hold at least one row, got none")
    prompts = [row["prompt"] for row in rows if row["prompt"]]
    if prompts and all(map(NO_TEXT.fullmatch, prompts)):
        raise ValueError(f"{path}: no prompt is a text, the first is {prompts[0][:40]!r}; write texts there, or rename "
                         "another column")
    return rows


# --- which rows may be used ---------------------------------------------------------------------------------------
def first_turn(prompt: str) -> str:
    """The first human turn of a prompt from `read_rows`, without an AI turn before it."""
    turns = prompt.split("\n\nHuman: ")
    turn = turns[1] if prompt.startswith("AI: ") and len(turns) > 1 else turns[0]
    return turn.split("\n\nAI: ")[0]


def normalized(text: str) -> str:
    """A text for comparisons that ignore case and white space."""
    return " ".join(text.casefold().split())


def human_parts(prompts: Iterable[str]) -> set[str]:
    """Prompts from `read_rows`, their human turns, and their first turns without up to 50 of their leading paragraphs,
    which may be a system message; normalized."""
    texts = []
    for prompt in prompts:
        turns = [turn.split("\n\nAI: ")[0] for turn in prompt.split("\n\nHuman: ")]
        paragraphs = first_turn(prompt).split("\n\n")
        ends = ["\n\n".join(paragraphs[i:]) for i in range(min(len(paragraphs), 51))]
        texts += [prompt, *turns, *ends]
    return set(map(normalized, texts))


def is_test(prompt: str, parts: int = 10) -> bool:
    """True for one of `parts` equal parts of all prompts, chosen by hash, so that it is always the same part."""
    return int(hashlib.sha256(normalized(prompt).encode()).hexdigest(), 16) % parts == 0


def usable(name: str, rows: list[tuple], others: Collection[str], fit: Callable, limit: int) -> tuple[list[tuple], str]:
    """(the usable rows of a file, a line that counts the others by reason). rows: tuples (prompt,) or (prompt,
    response). Left out are prompts that share a text of `human_parts` with `others`, the prompts of another set, and
    rows that do not `fit`: rows -> list[bool], at most `limit` tokens. Raises ValueError if no row is usable."""
    whole = set(map(normalized, others))
    parts = human_parts(others)
    complete = [row for row in rows if all(row)]
    different = {}
    for row in complete:
        different.setdefault(tuple(map(normalized, row)), row)
    apart = [row for row in different.values()
             if whole.isdisjoint(human_parts([row[0]])) and normalized(row[0]) not in parts]
    fits = fit(apart) if apart else []
    fitting = [row for row, row_fits in zip(apart, fits) if row_fits]
    left_out = {"incomplete": len(rows) - len(complete), "duplicates": len(complete) - len(different),
                "in another set": len(different) - len(apart), f"longer than {limit} tokens": len(apart) - len(fitting)}
    reasons = " and ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    line = f"{name}: {len(rows)} rows, {reasons or 'none'} left out"
    if not fitting:
        no_replies = not complete and len(rows[0]) == 2
        columns = f", with {', '.join(RESPONSES)}, chosen or messages" if no_replies else ""
        raise ValueError(f"{line}, and none remain; add other complete rows, of at most {limit} tokens{columns}")
    return fitting, line
