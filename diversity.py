"""The diversity reward: what an attack has in common with every earlier attack.

    Eq. (3.4)  R_SelfBLEU(x) = - mean_n SelfBLEU_X(x, n), n in {2, 3, 4, 5}
    Eq. (3.5)  R_emb(x)      = - mean_{x' in X} cos(phi(x), phi(x'))
               R_div         = (R_SelfBLEU + R_emb) / 2        X: the history of all earlier attacks

SelfBLEU (Zhu et al., 2018) is BLEU (Papineni et al., 2002) against *all* of X at once. Its clipped precision asks of
each n-gram only: how often does it occur, at most, in one text of X? A table of the two largest such counts answers
that for any X, and for X without one of its own members, so a new prompt costs the same after 64 texts or 64,000.
The cosines add up in a running sum of unit vectors, kept in integers: sums are exact, so neither term depends on the
order or the batches in which X was added.

Differs from the paper (numbers as in the README; rows are of docs/results.md):
(9) X is the last 480 attacks by default (--history), not all of them: against all a collapse goes unpunished for long,
since what was varied once keeps the mean low, and every n-gram of a language occurs at last: row *all earlier
attacks, not the last 480*.
(10) The mean of the cosines, as in the authors' code, for the paper's sum: that grows with X, and no k would fit early and
late attacks. It changes the scale alone: rows *k = 1*, *k = 5*, *k = 10*. Eq. (3.4) is taken against all of X at once, as
SelfBLEU is defined; the authors' code averages over single texts of X (`self_bleu(kind="pairwise")`), at a cost that grows.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from data import check_tokenizer, first_line, longest_input

Embedder = Callable[[list[str]], np.ndarray]  # B texts -> (B, D)

ORDERS = (2, 3, 4, 5)
FIXED_POINT = 2.0**32  # cosines are summed as integers in units of 2^-32


# --- SelfBLEU ---------------------------------------------------------------------------------------------------
def _ngrams(tokens, max_order):
    """Counts of all n-grams of orders 1..max_order, as tuples."""
    return Counter(tuple(tokens[i:i + n]) for n in range(1, max_order + 1) for i in range(len(tokens) - n + 1))


class NgramTable:
    """What BLEU needs to know of a set of reference texts, in time independent of their number."""

    def __init__(self, max_order: int = max(ORDERS), texts: Sequence[str] = ()):
        self.max_order = max_order
        self.top_two = {}  # n-gram -> its two largest counts in one text each: (first, second)
        self.lengths = Counter()  # words in a text -> how many such texts
        self.texts = Counter()
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """One more reference text."""
        tokens = text.split()
        self.lengths[len(tokens)] += 1
        self.texts[text] += 1
        for gram, count in _ngrams(tokens, self.max_order).items():
            first, second = self.top_two.get(gram, (0, 0))
            self.top_two[gram] = (count, first) if count > first else (first, max(second, count))

    def bleu(self, text: str, orders: Sequence[int] = ORDERS, leave_one_out: bool = False) -> float:
        """Mean over `orders` of BLEU-n(text; all references) in [0, 1] (Papineni et al., 2002), smoothing method1 of
        Chen and Cherry (2014), as nltk's sentence_bleu computes it; 0 without references. `leave_one_out`: where the
        text itself is one of them, one copy of it is left out."""
        tokens = text.split()
        out = leave_one_out and self.texts[text] > 0  # True: one of the references is the text itself, and is left out
        if not tokens or self.texts.total() - out == 0:
            return 0.0
        matches, totals = [0] * (max(orders) + 1), [0] * (max(orders) + 1)  # n-grams of each order: also in X, and all
        for gram, count in _ngrams(tokens, max(orders)).items():
            first, second = self.top_two.get(gram, (0, 0))
            matches[len(gram)] += min(count, second if out and count == first else first)  # clipped
            totals[len(gram)] += count
        if matches[1] == 0:
            return 0.0
        logs = [math.log((m or 0.1) / max(1, total)) for m, total in zip(matches, totals)][1:]  # method1: 0 -> 0.1
        brevity = self._brevity_penalty(len(tokens), out)
        return sum(brevity * math.exp(math.fsum(logs[:n]) / n) for n in orders) / len(orders)

    def _brevity_penalty(self, length, out):
        """1, or less for a text of `length` words that is shorter than the reference nearest to it in length."""
        lengths = [n for n, texts in self.lengths.items() if texts > out or n != length]
        closest = min(lengths, key=lambda n: (abs(n - length), n))
        return 1.0 if length > closest else math.exp(1 - closest / length)


def self_bleu(texts: Sequence[str], history: Sequence[str], orders: Sequence[int] = ORDERS, kind: str = "corpus",
              leave_one_out: bool = True) -> np.ndarray:
    """Mean over `orders` of BLEU-n of each text against the history, whitespace-tokenised: (B,) in [0, 1], Eq. (3.4).

    kind "corpus": against all of the history at once (Zhu et al., 2018). "pairwise": the mean of the BLEU against
    each of its texts alone, as in the authors' code; its cost grows with the history. A text that is itself in the
    history is compared with the rest of it (one copy is left out) unless `leave_one_out` is False. An empty history
    gives 0. Raises ValueError on another kind or on orders below 1.
    """
    if kind not in ("corpus", "pairwise") or not orders or min(orders) < 1:
        raise ValueError("self_bleu needs kind 'corpus' or 'pairwise' and orders of at least 1, "
                         f"got {kind!r} and {orders}")
    if kind == "corpus":
        table = NgramTable(max(orders), history)
        return np.array([table.bleu(text, orders, leave_one_out) for text in texts])
    tables = [NgramTable(max(orders), [reference]) for reference in history]
    means = []
    for text in texts:
        out = history.index(text) if leave_one_out and text in history else None
        scores = [table.bleu(text, orders) for i, table in enumerate(tables) if i != out]
        means.append(float(np.mean(scores)) if scores else 0.0)
    return np.array(means)


# --- cosines ----------------------------------------------------------------------------------------------------
def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def cosine_to_history(vectors: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Mean cosine of each row of vectors (B, D) to the rows of history (H, D), all unit vectors: (B,), Eq. (3.5)."""
    return vectors @ history.mean(0) if len(history) else np.zeros(len(vectors))


def set_similarity(texts: Sequence[str], embedder: Embedder) -> dict[str, float]:
    """How alike a set of texts is, from their embeddings (B, D): its mean SelfBLEU and mean pairwise cosine, each text
    against the others, as {"self_bleu": ..., "cosine": ...}; NaN for fewer than two texts."""
    if len(texts) < 2:
        return {"self_bleu": float("nan"), "cosine": float("nan")}
    vectors, n = embedder(texts), len(texts)  # (n, D)
    cosine = (np.linalg.norm(vectors.sum(0)) ** 2 - (vectors**2).sum()) / (n * (n - 1))  # without the diagonal
    return {"self_bleu": float(self_bleu(texts, texts).mean()), "cosine": float(cosine)}


@functools.cache
def _word_vector(word, width):
    seed = np.frombuffer(word.encode(), dtype=np.uint8)
    return np.random.default_rng(seed).standard_normal(width)


def word_embedder(texts: Sequence[str], width: int = 256) -> np.ndarray:
    """An embedder without a model: each word is a fixed random direction (B texts -> (B, width) unit vectors)."""
    vectors = np.zeros((len(texts), width))
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row += _word_vector(word, width)
    return _unit(vectors)


def load_embedder(name_or_dir: str, device: str = "cpu", trust_remote_code: bool = False) -> Embedder:
    """An embedder from a word: `words`, or any encoder folder or hub id: masked mean of the last hidden states, as (B, D)
    float64 unit vectors. Raises ValueError when the model cannot be had."""
    if name_or_dir == "words":
        return word_embedder
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(name_or_dir, trust_remote_code=trust_remote_code)
        check_tokenizer(tokenizer)
        _ = model.to(device).eval()(**tokenizer("a", return_tensors="pt").to(device)).last_hidden_state  # an encoder has it
    except Exception as error:
        raise ValueError(f"cannot load the embedder {name_or_dir!r}; --embedder takes a local encoder folder, a hub id "
                         f"or 'words': {first_line(error)}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    longest = longest_input(tokenizer, model.config)

    @torch.no_grad()
    def embed(texts):
        rows = []
        for text in texts:  # one at a time: next to other texts, padding would change a vector's last bits
            text = text if text.strip() else tokenizer.pad_token  # an encoder cannot read nothing
            batch = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(device)
            hidden = model(**batch).last_hidden_state.double()  # (1, T, D)
            mask = batch["attention_mask"][..., None]  # (1, T, 1), 1: a token
            rows.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))[0].cpu().numpy())
        return _unit(np.stack(rows))

    embed.model = model
    return embed


# --- the reward -------------------------------------------------------------------------------------------------
class Diversity:
    """The history X of attacks and the reward against it. Score first, then add.

    terms: any of "bleu" and "embedding". embedder(list of B str) -> (B, D) array, needed for the second; its rows are
    normalised here. A new text is scored as a newcomer: an exact repetition scores BLEU 1. window: X is the last so
    many attacks; 0: all of them, as in the paper. Raises ValueError on another term or a missing embedder.
    """

    def __init__(self, terms: Sequence[str] = ("bleu", "embedding"), embedder: Embedder | None = None, window: int = 0):
        if not set(terms) <= {"bleu", "embedding"} or not terms:
            raise ValueError(f"diversity terms are 'bleu' and 'embedding', got {','.join(terms) or 'none'}")
        if "embedding" in terms and embedder is None:
            raise ValueError("the diversity term 'embedding' needs an embedder")
        self.terms, self.embedder, self.window = tuple(terms), embedder, window
        self.history, self.table = [], NgramTable()
        self.vector_sum = 0  # (D,) int64: the sum of X's unit vectors in fixed point
        self.vectors = []  # of (D,) int64, one for each text of X; kept only where X has a window

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"bleu": (B,), "embedding": (B,), "reward": (B,)}: similarity by each term; Eq. (3.4), (3.5)."""
        scores = {}
        if "bleu" in self.terms:  # - Eq. (3.4)
            scores["bleu"] = np.array([self.table.bleu(text) for text in texts])
        if "embedding" in self.terms:  # - Eq. (3.5)
            mean = np.asarray(self.vector_sum) / (FIXED_POINT * max(1, len(self.history)))  # (D,), or 0: X is empty
            scores["embedding"] = (_unit(self.embedder(texts)) * mean).sum(1)
        scores["reward"] = -sum(scores[term] for term in self.terms) / len(self.terms)  # R_div
        return scores

    def add(self, texts: Sequence[str]) -> None:
        """These attacks join X, and beyond the window its oldest leave."""
        self.history = self.history + list(texts)
        for text in texts:
            self.table.add(text)
        if "embedding" in self.terms and len(texts):
            vectors = self._fixed_point(texts)  # (B, D)
            self.vector_sum = self.vector_sum + vectors.sum(0)
            self.vectors += list(vectors) if self.window else []
        too_many = len(self.history) - self.window
        if self.window and too_many > 0:
            self.history = self.history[too_many:]
            self.table = NgramTable(texts=self.history)  # counts of n-grams cannot be taken back, cosines can
            if self.vectors:
                self.vector_sum = self.vector_sum - np.sum(self.vectors[:too_many], 0)
                self.vectors = self.vectors[too_many:]

    def state_dict(self) -> dict:
        """X for a checkpoint, as JSON takes it."""
        return {"history": self.history, "vector_sum": np.asarray(self.vector_sum).tolist()}

    def load_state_dict(self, state: dict) -> None:
        """X as `state_dict` gave it, bit for bit."""
        self.history = list(state["history"])
        self.table = NgramTable(texts=self.history)
        self.vector_sum = np.array(state["vector_sum"], dtype=np.int64)
        if self.window and "embedding" in self.terms and self.history:
            self.vectors = list(self._fixed_point(self.history))

    def _fixed_point(self, texts):
        """Unit embeddings in fixed point, (B, D) int64; what is not finite is 0, and no part of the sum for ever."""
        return np.rint(np.nan_to_num(_unit(self.embedder(texts))) * FIXED_POINT).astype(np.int64)
