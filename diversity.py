"""The diversity reward: how unlike all earlier attacks a new attack is.

    Eq. (3.4)  R_SelfBLEU(x) = - mean_n SelfBLEU_X(x, n), n in {2, 3, 4, 5}
    Eq. (3.5)  R_emb(x)      = - mean_{x' in X} cos(phi(x), phi(x'))
               R_div         = (R_SelfBLEU + R_emb) / 2        X: the history of all earlier attacks

SelfBLEU (Zhu et al., 2018) is BLEU (Papineni et al., 2002) against all of X at once. Its clipped precision needs the
largest count of each n-gram in any one text of X. A table of how many texts have it once, twice, ... gives that count,
even for X without one of its own texts, at the same cost after 64 attacks or 64,000. The mean cosine is the dot product
with the mean of unit vectors. They are summed exactly, as integers, so that no term depends on the order or the batches
in which X was added.

Differs from the paper (numbers as in the README; rows are of docs/results.md):
(9) X is the last 480 attacks (--history), not all of them. Against all of them a collapse goes unpunished for long,
because varied early attacks keep the mean low: row *all earlier attacks, not the last 480*.
(10) Eq. (3.5) is the mean of the cosines, as in the authors' code, not the paper's sum, which grows with X and would
outweigh the other term. Eq. (3.4) is against all of X at once, as SelfBLEU is defined; the authors' code averages over
single texts of X, at a cost that grows.
"""

import functools
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModel
from transformers.utils import cached_file

from model import check_body, check_tokenizer, first_line, inert_texts, load_tokenizer, longest_input, split_words

Embedder = Callable[[list[str]], np.ndarray]  # B texts -> (B, D)
ORDERS = (2, 3, 4, 5)
BATCH_TOKENS = 192  # approximate size of an embedder's batch
FIXED_POINT = 2.0**32  # vectors are summed as integers in units of 2^-32


# --- SelfBLEU ---------------------------------------------------------------------------------------------------
def _split(text):
    """`split_words`, interned: the table's n-grams are found faster and take less memory."""
    return tuple(map(sys.intern, split_words(text)))


def _ngrams(tokens, max_order):
    """Yields the n-grams of the orders 1..max_order, each occurrence with its own key: see `_numbered`."""
    seen = {}
    for n in range(1, max_order + 1):
        for i in range(len(tokens) - n + 1):
            yield _numbered(tokens[i:i + n], seen)


def _numbered(gram, seen):
    """The n-gram itself the first time in a text, then (n-gram, 1), (n-gram, 2), ...: seen counts them. A text
    has (n-gram, k) if it has the n-gram more than k times, as clipped matches need (Papineni et al., 2002)."""
    earlier = seen.get(gram, 0)
    seen[gram] = earlier + 1
    return (gram, earlier) if earlier else gram


class NgramTable:
    """What BLEU needs of a set of reference texts; a lookup takes the same time for any number of texts."""

    def __init__(self, max_order: int = max(ORDERS), texts: Sequence[str] = ()):
        self.max_order = max_order
        self.counts = Counter()  # item of `_ngrams` -> how many texts have it
        self.lengths = Counter()  # number of words -> how many texts have that many
        for text in texts:
            self.add(text)

    def add(self, text: str, change: int = 1) -> None:
        """Add a reference text; a change of -1 removes it."""
        tokens = _split(text)
        self.lengths[len(tokens)] += change
        for item in _ngrams(tokens, self.max_order):
            self.counts[item] += change
            if not self.counts[item]:  # removed texts take no memory
                del self.counts[item]

    def bleu(self, text: str, orders: Sequence[int] = ORDERS, left_out: int = 0) -> float:
        """Mean over `orders` of BLEU-n of a text in [0, 1], smoothing method1 (Chen and Cherry, 2014), as nltk's
        sentence_bleu; 0 without references. left_out: copies of the text among the references that do not count."""
        tokens = _split(text)
        matches = self._matches(tokens, max(orders), left_out)
        if matches[0] == 0:  # or no words, or no references
            return 0.0
        logs = [math.log((m or 0.1) / max(1, len(tokens) - i)) for i, m in enumerate(matches)]  # method1: 0.1 for 0
        brevity = self._brevity_penalty(len(tokens), left_out)
        return sum(brevity * math.exp(math.fsum(logs[:n]) / n) for n in orders) / len(orders)

    def _matches(self, tokens, max_order, left_out):
        """Clipped matches of n-grams, at [n - 1]: an n-gram matches at most as often as it occurs in one reference."""
        matches = [0] * max_order
        seen = {}
        for start in range(len(tokens)):
            for end in range(start + 1, min(start + max_order, len(tokens)) + 1):
                gram = tokens[start:end]
                if self.counts.get(gram, 0) <= left_out:  # then no n-gram that begins with it does either
                    break
                if self.counts.get(_numbered(gram, seen), 0) > left_out:
                    matches[end - start - 1] += 1
        return matches

    def _brevity_penalty(self, length, left_out):
        """1, or less for a text of `length` words that is shorter than the reference nearest to it in length."""
        lengths = [n for n, texts in self.lengths.items() if texts > (left_out if n == length else 0)]
        closest = min(lengths, key=lambda n: (abs(n - length), n))
        return 1.0 if length > closest else math.exp(1 - closest / length)


def self_bleu(texts: Sequence[str], history: Sequence[str], orders: Sequence[int] = ORDERS) -> np.ndarray:
    """Mean over `orders` of BLEU-n of each text against all of the history at once, split at white space: (B,) in
    [0, 1], Eq. (3.4). A text that is itself in the history is compared with the rest of it (one copy is left out).
    An empty history gives 0. Raises ValueError on orders below 1."""
    if not orders or min(orders) < 1:
        raise ValueError(f"self_bleu needs orders of at least 1, got {orders}")
    table = NgramTable(max(orders), history)
    known = set(history)
    return np.array([table.bleu(text, orders, left_out=1 if text in known else 0) for text in texts])


# --- cosines and embedders --------------------------------------------------------------------------------------
def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def set_similarity(texts: Sequence[str], embedder: Embedder) -> dict[str, float]:
    """How alike the texts of a set are: the mean SelfBLEU and the mean cosine of each text to the others, as
    {"self_bleu": ..., "cosine": ...}. A blank text has 1, as in `Diversity.score`; fewer than two texts have NaN."""
    n = len(texts)
    if n < 2:
        return {"self_bleu": float("nan"), "cosine": float("nan")}
    vectors = embedder(texts)  # (n, D)
    cosine = (vectors @ vectors.sum(0) - (vectors**2).sum(1)) / (n - 1)  # (n,), to the others
    is_blank = [not text.strip() for text in texts]
    terms = {"self_bleu": self_bleu(texts, texts), "cosine": cosine}
    return {name: float(np.where(is_blank, 1, values).mean()) for name, values in terms.items()}


@functools.cache
def _word_vector(word, width):
    seed = np.frombuffer(word.encode(), dtype=np.uint8)
    return np.random.default_rng(seed).standard_normal(width)


def word_embedder(texts: Sequence[str], width: int = 256) -> np.ndarray:
    """An embedder without a model: each word is a fixed random direction (B texts -> (B, width) unit vectors)."""
    vectors = np.zeros((len(texts), width))
    for row, text in zip(vectors, texts, strict=True):
        for word in split_words(text.lower()):
            row += _word_vector(word, width)
    return _unit(vectors)


def _padded(length, longest):
    """The length to which a text is padded: a multiple of 8, or longest."""
    return min(longest, -(-length // 8) * 8)


def _groups(lengths, longest):
    """(padded length, row numbers) of groups of texts of similar length; the last group of a length is filled up by
    repetition. A batch's shape depends on its length alone: otherwise a vector's last bits would depend on the texts
    beside it."""
    lengths = [_padded(length, longest) for length in lengths]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    for length, same in itertools.groupby(by_length, key=lengths.__getitem__):
        rows = list(same)
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            yield length, group + group[-1:] * (size - len(group))


def _pool(name):
    """How sentence-transformers pools an encoder's states into one vector: "mean" or "cls"; None if its files do not
    say. Raises ValueError if it does anything else."""
    def read(file):
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if not found and not Path(name).is_dir() and not try_to_load_from_cache(name, file):  # nor as absent
            raise ValueError(f"neither the hub nor its cache tells whether it has {file}: load it with a network once, "
                             "or pass the folder of its snapshot")
        return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}

    pool = None
    modules = read("modules.json")
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            settings = read(f"{module['path']}/config.json")
            if not settings:
                raise ValueError(f"its modules.json names {module['path']}/config.json, which is missing; copy the "
                                 "folder with its subfolders")
            modes = [mode for mode, value in settings.items() if mode.startswith("pooling_mode_") and value is True]
            mode = str(settings.get("pooling_mode", "+".join(modes)))
            pool = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}.get(mode, mode)
        elif kind not in ("Transformer", "Normalize"):
            raise ValueError(f"it has a module {kind}, beyond the mean or the first of its states")
    prompt = read("config_sentence_transformers.json")
    prompt = (prompt.get("prompts") or {}).get(prompt.get("default_prompt_name"))
    if pool not in ("mean", "cls", None):
        raise ValueError(f"only the mean or the first of its states can be taken, it asks for {pool or 'no pooling'}")
    if prompt:
        raise ValueError(f"it asks for the prompt {prompt!r} before each text, which cannot be added")
    return pool or ("mean" if modules else None)


@torch.no_grad()
def _states(model, rows, T, pad):
    """An encoder's last hidden states (B, T, D) float64 of lists of token ids, padded on the right to T."""
    padded = torch.tensor([ids + [pad] * (T - len(ids)) for ids in rows], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids in rows], device=model.device)
    return model(input_ids=padded, attention_mask=mask).last_hidden_state.double()


def load_embedder(name_or_dir: str, device: str = "cpu", trust_remote_code: bool = False,
                  dtype: torch.dtype = torch.float32) -> Embedder:
    """Load an embedder from its `--embedder` string: `words`, or the folder or hub id of an encoder, whose last hidden
    states are averaged over the tokens (or the first is taken, if its modules.json says so): B texts -> (B, D)
    float64 unit vectors. dtype: of the encoder. Raises ValueError if it cannot be loaded."""
    if name_or_dir == "words":
        return word_embedder
    try:
        tokenizer = load_tokenizer(name_or_dir, trust_remote_code=trust_remote_code)
        pool = _pool(name_or_dir)  # before gigabytes of weights are fetched
        model, info = AutoModel.from_pretrained(name_or_dir, trust_remote_code=trust_remote_code,
                                                dtype=torch.float32, output_loading_info=True)
        model.to(device).eval()
        check_body(model, info)
        check_tokenizer(model, tokenizer)
        decoders = "ForCausalLM|(?<!With)LMHead|ForConditionalGeneration"
        if not pool and re.search(decoders, str(model.config.architectures)):
            raise ValueError("it must be an encoder, or its modules.json must say how it pools; got "
                             f"{model.config.architectures[0]}")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        ids = tokenizer("a").input_ids
        longest = longest_input(tokenizer, model.config)
        lengths = (len(ids), _padded(len(ids), longest))
        alone, padded = (_states(model, [ids], T, tokenizer.pad_token_id)[0, : len(ids)] for T in lengths)
        if not torch.allclose(alone, padded, atol=1e-3):
            raise ValueError("padding changes its states; take another encoder")
        for weight in model.parameters():  # not the buffers: rotary frequencies stay exact
            weight.data = weight.data.to(dtype)
        if dtype != torch.float32:
            model.set_attn_implementation("eager")  # on a CPU faster for short texts
            _states(model, [ids], len(ids), tokenizer.pad_token_id)  # some layers may fail in other types
    except Exception as error:
        raise ValueError(f"cannot load the embedder {name_or_dir!r}; --embedder takes a local encoder folder, a hub id "
                         f"or 'words': {first_line(error)}") from error

    def embed(texts):
        if not len(texts):
            return np.zeros((0, alone.shape[1]))
        texts = [text if text.strip() else tokenizer.pad_token for text in inert_texts(tokenizer, texts)]  # a token
        ids = tokenizer(texts, truncation=True, max_length=longest).input_ids
        vectors = [None] * len(ids)
        for T, rows in _groups([len(row) for row in ids], longest):
            states = _states(model, [ids[i] for i in rows], T, tokenizer.pad_token_id)  # (B, T, D)
            for i, of_text in zip(rows, states):
                vectors[i] = of_text[: len(ids[i])].mean(0) if pool != "cls" else of_text[0].clone()
        return _unit(torch.stack(vectors).cpu().numpy())

    return embed


# --- the reward -------------------------------------------------------------------------------------------------
class Diversity:
    """The history X of attacks and the reward against it. Score first, then add: a repetition scores BLEU 1, or less if
    it has fewer than five words, some of whose n-grams do not exist.

    terms: "bleu", "embedding" or both. embedder: B texts -> (B, D), needed for "embedding"; normalised here. window:
    the number of latest attacks in X; 0: all, as in the paper. Raises ValueError for invalid terms or embedder."""

    def __init__(self, terms: Sequence[str] = ("bleu", "embedding"), embedder: Embedder | None = None, window: int = 0):
        if not set(terms) <= {"bleu", "embedding"} or not terms:
            raise ValueError(f"diversity terms are 'bleu' and 'embedding', got {','.join(terms) or 'none'}")
        if "embedding" in terms and embedder is None:
            raise ValueError("the diversity term 'embedding' needs an embedder")
        self.terms = tuple(terms)
        self.embedder = embedder
        self.window = window
        self.history = []  # the texts of X
        self.table = NgramTable()  # of the same texts
        self.vectors = []  # their unit vectors in fixed point, (D,) int64 each; kept only with a window
        self.vector_sum = 0  # (D,) int64
        self.scored = {}  # text -> its unit vector, of the last scored batch, which is usually added next

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"bleu": (B,), "embedding": (B,), "reward": (B,)}: similarity by each term, and R_div from both."""
        scores = {}
        if "bleu" in self.terms:  # - Eq. (3.4)
            scores["bleu"] = np.array([self.table.bleu(text) for text in texts])
        if "embedding" in self.terms:  # - Eq. (3.5)
            mean = self.vector_sum / (FIXED_POINT * max(1, len(self.history)))  # (D,), or 0 for an empty X
            vectors = _unit(self.embedder(texts))  # (B, D)
            self.scored = dict(zip(texts, vectors))
            scores["embedding"] = (vectors * mean).sum(1)
        blank = [not text.split() for text in texts]  # no new attack, but its terms would be 0
        for similarity in scores.values():
            similarity[blank] = 1.0
        scores["reward"] = -sum(scores[term] for term in self.terms) / len(self.terms)  # R_div
        return scores

    def add(self, texts: Sequence[str]) -> None:
        """Add attacks to X and drop its oldest beyond the window."""
        vectors = self._fixed_point(texts)
        self.history += texts
        self.vector_sum = self.vector_sum + sum(vectors)
        for text in texts:
            self.table.add(text)
        if self.window:
            self.vectors += vectors
            for text in self.history[:-self.window]:
                self.table.add(text, -1)
            self.vector_sum = self.vector_sum - sum(self.vectors[:-self.window])
            del self.history[:-self.window]
            del self.vectors[:-self.window]

    def state_dict(self) -> dict:
        """X for a checkpoint, as JSON values."""
        return {"history": list(self.history), "vector_sum": np.asarray(self.vector_sum).tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Restore X from `state_dict`; the texts of a window are embedded again."""
        self.history = list(state["history"])
        self.table = NgramTable(texts=self.history)
        self.vectors = self._fixed_point(self.history) if self.window else []
        self.vector_sum = sum(self.vectors) if self.window else np.array(state["vector_sum"])

    def _fixed_point(self, texts):
        """Unit vectors in fixed point, (D,) int64 each; a non-finite entry becomes 0, or it would stay in the sum."""
        if "embedding" not in self.terms or not len(texts):
            return []
        if set(texts) <= self.scored.keys():
            vectors = np.stack([self.scored[text] for text in texts])
        else:
            vectors = _unit(self.embedder(texts))
        return list(np.rint(np.nan_to_num(vectors) * FIXED_POINT).astype(np.int64))
