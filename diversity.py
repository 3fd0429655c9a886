"""The diversity reward: what an attack has in common with every earlier attack.

    Eq. (3.4)  R_SelfBLEU(x) = - mean_n SelfBLEU_X(x, n), n in {2, 3, 4, 5}
    Eq. (3.5)  R_emb(x)      = - mean_{x' in X} cos(phi(x), phi(x'))
               R_div         = (R_SelfBLEU + R_emb) / 2        X: the history of all earlier attacks

SelfBLEU here is BLEU against *all* of X at once. Its clipped precision asks of each n-gram only: how
often does it occur, at most, in one text of X? A table of the two largest such counts answers that for
any X, and for X without one of its own members, so a new prompt costs the same after 64 texts or 64,000.
The cosines add up in a running sum of unit vectors, kept in integers: sums are exact, so neither term
depends on the order or the batches in which X was added.

Differs from the paper: (1) the mean of cosines for its unnormalised sum, as the authors' code does.
(2) X may be the last so many attacks only (`Diversity(window=...)`), so that a collapse is punished at once.
"""

import math
from collections import Counter

import numpy as np

ORDERS = (2, 3, 4, 5)
FIXED_POINT = 2.0**32  # cosines are summed as integers in units of 2^-32


class NgramTable:
    """What BLEU needs to know of a set of reference texts, in time independent of their number."""

    def __init__(self, max_order=max(ORDERS)):
        self.max_order = max_order
        self.top_two = {}  # n-gram -> its two largest counts in one text each: (first, second)
        self.lengths = Counter()  # words in a text -> how many such texts
        self.texts = Counter()

    def add(self, text):
        tokens = text.split()
        self.lengths[len(tokens)] += 1
        self.texts[text] += 1
        for gram, count in _ngrams(tokens, self.max_order).items():
            first, second = self.top_two.get(gram, (0, 0))
            self.top_two[gram] = (count, first) if count > first else (first, max(second, count))

    def bleu(self, text, orders=ORDERS, leave_one_out=False):
        """Mean over `orders` of BLEU-n(text; all references), smoothing method1 of Chen and Cherry (2014),
        as nltk's sentence_bleu computes it. With `leave_one_out`, one copy of the text itself is left out."""
        tokens = text.split()
        out = int(leave_one_out and self.texts[text] > 0)
        if not tokens or sum(self.lengths.values()) - out == 0:
            return 0.0
        matches, totals = [0] * (self.max_order + 1), [0] * (self.max_order + 1)
        for gram, count in _ngrams(tokens, max(orders)).items():
            first, second = self.top_two.get(gram, (0, 0))
            clip = second if out and count == first else first
            matches[len(gram)] += min(count, clip)
            totals[len(gram)] += count
        if matches[1] == 0:
            return 0.0
        n = len(tokens)
        lengths = [m for m, k in self.lengths.items() if k > out or m != n]
        closest = min(lengths, key=lambda m: (abs(m - n), m))
        brevity = 1.0 if n > closest else math.exp(1 - closest / n)
        logs = [math.log((matches[k] or 0.1) / max(1, totals[k])) for k in range(1, max(orders) + 1)]  # method1: 0 -> 0.1
        return sum(brevity * math.exp(math.fsum(logs[:k]) / k) for k in orders) / len(orders)


def self_bleu(texts, history, orders=ORDERS, kind="corpus", leave_one_out=True):
    """Mean over `orders` of BLEU-n of each text against the history, whitespace-tokenised: (B,) in [0, 1].

    kind "corpus": against all of the history at once (multi-reference). "pairwise": the mean of the BLEU
    against each of its texts alone, as in the authors' code; its cost grows with the history. A text that is
    itself in the history is compared with the rest of it (one copy is left out) unless `leave_one_out` is
    False. An empty history gives 0. Raises ValueError on another kind or on orders below 1.
    """
    if kind not in ("corpus", "pairwise") or not orders or min(orders) < 1:
        raise ValueError(f"self_bleu needs kind 'corpus' or 'pairwise' and orders of at least 1, got {kind!r} and {orders}")
    tables = [NgramTable(max(orders)) for _ in (history if kind == "pairwise" else [0])]
    for i, text in enumerate(history):
        tables[i if kind == "pairwise" else 0].add(text)
    if kind == "corpus":
        return np.array([tables[0].bleu(text, orders, leave_one_out) for text in texts])
    out = []
    for text in texts:
        out_index = history.index(text) if leave_one_out and text in history else None
        scores = [table.bleu(text, orders) for i, table in enumerate(tables) if i != out_index]
        out.append(float(np.mean(scores)) if scores else 0.0)
    return np.array(out)


def cosine_to_history(vectors, history):
    """Mean cosine of each row of vectors (B, D) to the rows of history (H, D), all unit vectors: (B,)."""
    return vectors @ history.mean(0) if len(history) else np.zeros(len(vectors))


def set_similarity(texts, embedder):
    """How alike a set of texts is: its mean SelfBLEU and mean pairwise cosine, each text against the others."""
    if len(texts) < 2:
        return {"self_bleu": float("nan"), "cosine": float("nan")}
    vectors, n = embedder(texts), len(texts)
    cosine = (np.linalg.norm(vectors.sum(0)) ** 2 - (vectors**2).sum()) / (n * (n - 1))  # without the diagonal
    return {"self_bleu": float(self_bleu(texts, texts).mean()), "cosine": float(cosine)}


class Diversity:
    """The history X of attacks and the reward against it. Score first, then add.

    terms: any of "bleu" and "embedding". embedder(list of B str) -> (B, D) array, needed for the second;
    its rows are normalised here. A new text is scored as a newcomer: an exact repetition scores BLEU 1.
    window: X is the last so many attacks; 0: all of them, as in the paper. With all of them a collapse goes
    unpunished for long: what was varied once keeps the mean low, and every n-gram of a language occurs at last.
    """

    def __init__(self, terms=("bleu", "embedding"), embedder=None, window=0):
        if not set(terms) <= {"bleu", "embedding"} or not terms:
            raise ValueError(f"diversity terms are 'bleu' and 'embedding', got {','.join(terms) or 'none'}")
        if "embedding" in terms and embedder is None:
            raise ValueError("the diversity term 'embedding' needs an embedder")
        self.terms, self.embedder, self.window = tuple(terms), embedder, window
        self.history, self.table, self.vectors, self.vector_sum = [], NgramTable(), [], 0

    def score(self, texts):
        """{"bleu": (B,), "embedding": (B,), "reward": (B,)}: similarity by each term, and R_div = -their mean."""
        scores = {}
        if "bleu" in self.terms:
            scores["bleu"] = np.array([self.table.bleu(text) for text in texts])
        if "embedding" in self.terms:
            mean = np.asarray(self.vector_sum) / (FIXED_POINT * max(1, len(self.history)))  # (D,), or 0 while X is empty
            scores["embedding"] = (_unit(self.embedder(texts)) * mean).sum(1)
        scores["reward"] = -sum(scores[term] for term in self.terms) / len(self.terms)  # Eq. (3.4), (3.5)
        return scores

    def add(self, texts):
        self.history += list(texts)
        if "embedding" in self.terms and len(texts):
            vectors = self._vectors(texts)
            self.vector_sum = self.vector_sum + vectors.sum(0)
            self.vectors += list(vectors) if self.window else []
        if not self.window or len(self.history) <= self.window:
            for text in texts:
                self.table.add(text)
            return
        out = len(self.history) - self.window  # the oldest leave: counts of n-grams cannot be taken back, cosines can
        self.history, self.table = self.history[out:], NgramTable()
        for text in self.history:
            self.table.add(text)
        if self.vectors:
            self.vector_sum, self.vectors = self.vector_sum - np.sum(self.vectors[:out], 0), self.vectors[out:]

    def state_dict(self):
        return {"history": self.history, "vector_sum": np.asarray(self.vector_sum).tolist()}

    def load_state_dict(self, state):
        self.history, self.table = list(state["history"]), NgramTable()
        for text in self.history:
            self.table.add(text)
        self.vector_sum = np.array(state["vector_sum"], dtype=np.int64)
        if self.window and "embedding" in self.terms and self.history:
            self.vectors = list(self._vectors(self.history))

    def _vectors(self, texts):
        """Unit embeddings in fixed point, (B, D) int64; what is not finite is 0, and no part of the sum for ever."""
        return np.rint(np.nan_to_num(_unit(self.embedder(texts))) * FIXED_POINT).astype(np.int64)


def load_embedder(name_or_dir, device="cpu", trust_remote_code=False):
    """An embedder from any encoder folder or hub id: masked mean of the last hidden states, unit length.

    The embedder maps B texts to a (B, D) float64 array. Raises ValueError when the model cannot be had.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from data import check_tokenizer, first_line

    try:
        tokenizer, model = (kind.from_pretrained(name_or_dir, trust_remote_code=trust_remote_code) for kind in (AutoTokenizer, AutoModel))
        check_tokenizer(tokenizer)
        model.to(device).eval()(**tokenizer("a", return_tensors="pt").to(device)).last_hidden_state  # an encoder has it
    except Exception as error:
        raise ValueError(f"cannot load the embedder {name_or_dir!r}; --embedder takes a local encoder folder, a hub id or 'words': "
                         + first_line(error)) from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) - 2)  # RoBERTa's start at 2

    @torch.no_grad()
    def embed(texts):
        rows = []
        for text in texts:  # one at a time: next to other texts, padding would change a vector's last bits
            text = text if text.strip() else tokenizer.pad_token  # an encoder cannot read nothing
            batch = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(device)
            hidden, mask = model(**batch).last_hidden_state.double(), batch["attention_mask"][..., None]  # (1, T, D), (1, T, 1)
            rows.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))[0].cpu().numpy())
        return _unit(np.stack(rows))

    embed.model = model
    return embed


def word_embedder(texts, width=256):
    """An embedder without a model: each word is a fixed random direction (B texts -> (B, width))."""
    vectors = np.zeros((len(texts), width))
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row += _word_vector(word, width)
    return _unit(vectors)


def _word_vector(word, width, _known={}):
    if (word, width) not in _known:
        seed = np.frombuffer(word.encode(), dtype=np.uint8)
        _known[word, width] = np.random.default_rng(seed).standard_normal(width)
    return _known[word, width]


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _ngrams(tokens, max_order):
    """Counts of all n-grams of orders 1..max_order, as tuples."""
    return Counter(tuple(tokens[i:i + n]) for n in range(1, max_order + 1) for i in range(len(tokens) - n + 1))
