"""Policies and rollouts: a transformers causal language model with a value head, its sampler, its log-probs.

One convention holds in the whole project. A rollout is right-padded: each row is prompt, response, padding.
**Index t always belongs to tokens[:, t]**: logprobs[:, t] is the log-probability of that token given the
tokens before it, values[:, t] the value of the state before it. Both come from the hidden state at t - 1;
`Policy.forward` is the one place where that shift happens.

Masks come from lengths, never from token ids, so a pad token that equals EOS is harmless. With padding only
on the right, causal attention alone keeps it out of every real position.

B batch, T tokens of the longest row, D width, V vocabulary, N response tokens of all rows.
"""

import contextlib
import copy
import ctypes
import functools
import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.activations import NewGELUActivation
from transformers.cache_utils import StaticLayer
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, find_adapter_config_file

from kernel import linear_logprob

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PLAIN_TEMPLATE = "Human: {} AI:"  # for tokenizers without a chat template, as in the authors' code
THOUGHTS = re.compile(r"\A\s*<think>.*?(</think>|\Z)", re.DOTALL)  # of a reasoning model, before its answer
PROBE = ("Marmalade?", "Porcupine!")  # a prompt and a response, to see what a chat template makes of them
SAME_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro +%}"  # for a run that is resumed tomorrow
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")  # at the end of a prompt that asks for none


# --- policies and rollouts ------------------------------------------------------------------------------
@dataclass
class Rollout:
    """Prompts, the responses to them, and the sampled tokens of these responses.

    A row's first `prompt_lengths[b]` tokens are its prompt; the next, up to `lengths[b]`, are its response, EOS
    included. Log-probs are always computed at the `temperature` of sampling.
    """

    prompts: list[str]
    texts: list[str]
    tokens: torch.Tensor  # (B, T) int64, right-padded
    prompt_lengths: torch.Tensor  # (B,)
    lengths: torch.Tensor  # (B,)
    ended: torch.Tensor  # (B,) bool, True where an EOS was sampled
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def response_mask(self) -> torch.Tensor:
        """(B, T) bool, True on response tokens: the sampled actions, first EOS included, nothing after it."""
        t = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (t >= self.prompt_lengths[:, None]) & (t < self.lengths[:, None])

    @property
    def response_lengths(self) -> torch.Tensor:
        """(B,) tokens of each response: the True entries of each row of `response_mask`."""
        return self.lengths - self.prompt_lengths

    def without_responses(self, rows: torch.Tensor) -> "Rollout":
        """This rollout with an empty response mask where rows (B,) is True."""
        return replace(self, lengths=torch.where(rows.to(self.lengths.device), self.prompt_lengths, self.lengths))

    def rows(self) -> list[tuple[str, list[int], list[int]]]:
        """(text, prompt ids, response ids) of each row."""
        spans = zip(self.texts, self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return [(text, ids[:start], ids[start:end]) for text, ids, start, end in spans]

    def select(self, rows: torch.Tensor) -> "Rollout":
        """The given rows (n,), trimmed to the longest of them."""
        T = int(self.lengths[rows].max())
        index = rows.tolist()
        return replace(
            self, prompts=[self.prompts[i] for i in index], texts=[self.texts[i] for i in index],
            tokens=self.tokens[rows, :T], prompt_lengths=self.prompt_lengths[rows], lengths=self.lengths[rows],
            ended=self.ended[rows])


class Policy(nn.Module):
    """A causal language model, its tokenizer and its critic.

    critic "shared": the value head reads the policy's own hidden states. critic "separate": it reads a
    body of its own, initially a copy of the policy's. The value head starts at zero, so all values are zero at first.
    The module is always in eval mode: dropout would make the PPO ratio differ from 1.
    Raises ValueError for an unknown critic and for a model without an end-of-sequence token.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: Tokenizer, critic: str = "shared",
                 dtype: torch.dtype = torch.float32):
        super().__init__()
        if critic not in ("shared", "separate"):
            raise ValueError(f"critic must be 'shared' or 'separate', got {critic!r}")
        self.lm = lm
        self.tokenizer = tokenizer
        self.compute_dtype = dtype
        _use_faster_operations(lm, dtype)
        self.critic_body = copy.deepcopy(lm.base_model) if critic == "separate" else None
        self.value_head = nn.Linear(lm.get_output_embeddings().in_features, 1, device=lm.device)
        self.new_critic()
        self.context = context_length(lm.config)  # tokens
        last_token = max(tokenizer.get_vocab().values())
        rows = lm.get_output_embeddings().weight.shape[0]
        self.vocab_size = min(last_token + 1, rows)  # V: further rows of the head are padding, without a token
        self.eos_ids = _eos_ids(lm, tokenizer, self._render, self.vocab_size)  # demonstrations end with the first
        self.skeleton = None  # if sharded: the language model's modules without weights, to copy from
        self.eval()

    def train(self, mode: bool = True) -> "Policy":
        """Does nothing: a policy is always in eval mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    @property
    def head(self) -> nn.Module:
        """weight (at least V, D), bias or None."""
        return self.lm.get_output_embeddings()

    @property
    def is_sharded(self) -> bool:
        return self.skeleton is not None

    def autocast(self) -> torch.autocast:
        """fp32 master weights; matrix products in the compute dtype."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def new_critic(self) -> None:
        """Begin with an untrained critic: a copy of the policy's body, if separate, and a value head of zeros."""
        if self.critic_body is not None:
            self.critic_body.load_state_dict(self.lm.base_model.state_dict())
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def hidden(self, tokens: torch.Tensor, body: nn.Module | None = None) -> torch.Tensor:
        """Last hidden states (B, T, D) of right-padded tokens (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        body = self.lm.base_model if body is None else body
        return body(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state

    def forward(self, rollout: Rollout, entropy_grad: bool, with_values: bool) -> tuple[torch.Tensor | None, ...]:
        """What `logprobs_and_values` returns, (B, T) each."""
        mask = rollout.response_mask  # (B, T)
        acts = mask[:, 1:]  # (B, T - 1): True where the state at t - 1 chooses tokens[t]
        inputs = rollout.tokens[:, :-1]  # (B, T - 1): nothing is predicted from the last token
        targets = rollout.tokens[mask]  # (N,)
        with self.autocast():
            states = self.hidden(inputs)[acts]  # (N, D)
            weight = self.head.weight
            bias = self.head.bias
            if self.vocab_size < len(weight):
                weight = weight[: self.vocab_size]
                bias = None if bias is None else bias[: self.vocab_size]
            logprobs, entropy = linear_logprob(states, weight, targets, bias, rollout.temperature, entropy_grad)
            values = None
            if with_values:
                if self.critic_body is not None:
                    states = self.hidden(inputs, self.critic_body)[acts]  # (N, D)
                with torch.autocast(self.device.type, enabled=False):
                    values = _scatter(self.value_head(states.float())[:, 0], mask)
        return _scatter(logprobs, mask), values, _scatter(entropy, mask)  # (B, T) each

    def encode(self, prompts: list[str], render: Callable[..., str] | None = None) -> list[list[int]]:
        """Token ids of each prompt in the model's own chat format, up to where the response begins. render: a cached
        `_render`."""
        rows = encode_rendered(self.tokenizer, render or self._render, [[prompt] for prompt in prompts])
        return [ids or self.eos_ids[:1] for ids in rows]  # never empty: the first response token needs a state

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """(prompt ids, response ids) of (prompt, response) pairs: the rendered conversation's tokens up to the one that
        ends the assistant's turn, which occurs once. Raises ValueError if the template changes a response."""
        ends = "|".join(map(re.escape, self.tokenizer.convert_ids_to_tokens(self.eos_ids)))  # as text: not taught twice
        pairs = [(prompt, re.sub(rf"(({ends})\s*)+\Z", "", response)) for prompt, response in pairs]
        render = functools.cache(self._render)  # a slow function, and pairs repeat
        prompt_ids = self.encode([prompt for prompt, _ in pairs], render)
        conversations = encode_rendered(self.tokenizer, render, pairs)
        response_ids = []
        for start, ids, (prompt, response) in zip(prompt_ids, conversations, pairs):
            same_tokens = ids[:len(start)] == start
            _check_conversation(render(prompt, response), render(prompt), response, same_tokens)
            rest = ids[len(start):]
            if not same_tokens:  # first letters merged into the prompt's last token, or no empty thought
                text, = inert_texts(self.tokenizer, [response])
                rest = self.tokenizer(text, add_special_tokens=False).input_ids
            end = next((i for i, token in enumerate(rest) if token in self.eos_ids), len(rest))
            response_ids.append([*rest[:end], self.eos_ids[0]])
        return prompt_ids, response_ids

    def _render(self, prompt, *response):
        """The text of a conversation in the model's own format; without a response, up to where it begins."""
        if not self.tokenizer.chat_template:
            return " ".join([PLAIN_TEMPLATE.format(prompt), *response])
        return rendered_chat(self.tokenizer, prompt, *response, add_generation_prompt=not response)

    def decode(self, ids: list[int]) -> str:
        """The text of a response's token ids, without a reasoning model's thoughts before it, which its template may
        write, and the token that ended it, which need not be a special one."""
        ids = [i for i in ids if i not in self.eos_ids]
        return THOUGHTS.sub("", self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _check_conversation(text, opening, response, same_tokens):
    """Raises ValueError unless a rendered conversation is the rendered prompt, `opening`, and the response as it was
    given. same_tokens: its tokens begin with those of the opening."""
    begins = same_tokens or text.startswith(EMPTY_THOUGHT.sub("", opening))
    thinks = not same_tokens and THOUGHTS.match(response)
    if not begins and not thinks:
        raise ValueError("a chat template's conversations must begin as its prompts do, which end in "
                         f"{opening[-20:]!r}")
    if thinks or response.strip() not in text:
        raise ValueError("a demonstration must be a response as its chat template writes it; the template "
                         f"changes {response[:60]!r}: drop it, or the reasoning in it")


def _scatter(x, mask):
    """(N,) numbers at the True positions of mask -> (B, T), zero elsewhere."""
    return torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x)


def _use_faster_operations(lm, dtype):
    """Replace operations of the model by faster equivalents, in place."""
    if dtype != torch.float32 and lm.device.type == "cpu":
        # in bf16, five times faster than the fused backward for texts of 50 tokens; equal at 300
        lm.set_attn_implementation("eager")
    for name, module in list(lm.named_modules(remove_duplicate=False)):
        if isinstance(module, NewGELUActivation):  # GPT-2's activation in one operation instead of eight
            lm.set_submodule(name, nn.GELU(approximate="tanh"))


def context_length(config: PretrainedConfig) -> int:
    """A model's context length in tokens. With longrope it is the original context: beyond it the states of all tokens
    would depend on the longest text of the batch. With sparse attention it is the length up to which all tokens are
    attended: which of them are left out beyond it would depend on the padding."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    names = ("max_position_embeddings", "max_seq_len", "keep_window_size", "index_topk")
    return min(getattr(config, name, None) or 2**30 for name in names)


def _eos_ids(lm, tokenizer, render, V):
    """All token ids below V that end a response: that with which the chat template ends an assistant's turn, the
    tokenizer's EOS, and those of the model's generation config."""
    found = [_end_of_turn(tokenizer, render)] if tokenizer.chat_template else []
    more = lm.generation_config.eos_token_id if lm.generation_config else None
    found += [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    ids = list(dict.fromkeys(i for i in found if i is not None and i < V))
    if not ids:
        name = lm.config.name_or_path or "the model"
        raise ValueError(f"a policy needs an end-of-sequence token, {name} has none; set eos_token in its tokenizer")
    return ids


def _end_of_turn(tokenizer, render):
    """The first control token after the assistant's text in the chat template. If it leaves the last turn open
    (Qwen1.5), the one that ends it before the user's next; None if a turn ends in plain text."""
    text = render(*PROBE)
    if [text.count(words) for words in PROBE] != [1, 1]:
        raise ValueError("its chat template must render the words of the user and of the assistant once each, got "
                         f"{text[:200]!r}")
    control = control_ids(tokenizer)

    def marks(text):
        return [i for i in tokenizer(text, add_special_tokens=False).input_ids if i in control]

    ends = marks(text.partition(PROBE[1])[2])
    if not ends:
        between = marks(render(*PROBE, PROBE[0]).partition(PROBE[1])[2].partition(PROBE[0])[0])
        ends = [i for i in between[:-1] if i != tokenizer.bos_token_id]  # the last one begins the user's turn
    return ends[0] if ends else None


# --- no control tokens from texts -------------------------------------------------------------------------------
def rendered_chat(tokenizer: Tokenizer, *texts: object, **options) -> str:
    """The tokenizer's chat template of a user's turn and, if there are more texts, the assistant's and the user's next.
    A model that can answer without thoughts (Qwen3) is asked to, and one that is told the date is always told the
    same."""
    if "strftime_now" in str(tokenizer.chat_template):
        options["chat_template"] = SAME_DATE + tokenizer.get_chat_template()
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts)]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False, **options)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"its chat template cannot render {str(texts)[:80]}: {first_line(error)}") from error


def control_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of the tokens that delimit texts and turns: all special tokens, and added tokens that the chat template
    writes. The unknown token is left out, unless it is also BOS or EOS."""
    template = str(tokenizer.chat_template or "")
    ids = set(tokenizer.all_special_ids)
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special or (token.content.strip() and token.content in template):
            ids.add(i)
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        ids.discard(tokenizer.unk_token_id)
    return ids


def inert_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts; a control token that is written in one gets spaces between its letters."""
    control = control_ids(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [text if control.isdisjoint(ids) else _spaced(tokenizer, control, text) for text, ids in zip(texts, rows)]


def _spaced(tokenizer, control, text):
    """The text with spaces between the letters of each control token in it."""
    def spaced(match):
        return " ".join(match[0]) if len(match[0]) > 1 else " "

    text = unicodedata.normalize("NFKC", text)  # as tokenizers do: full-width brackets become brackets
    for mark in sorted(tokenizer.convert_ids_to_tokens(list(control)), key=len, reverse=True):
        text = re.sub(re.escape(mark), spaced, text, flags=re.IGNORECASE)
    is_inert = control.isdisjoint(tokenizer(text, add_special_tokens=False).input_ids)
    return text if is_inert else re.sub(r"[^\w\s]", " ", text)


UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai to Chinese


def split_words(text: str) -> list[str]:
    """Words, split at white space. In scripts without spaces each character is one, as in sacreBLEU's (Post, 2018)."""
    return re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)


def encode_rendered(tokenizer: Tokenizer, render: Callable[..., str], rows: list[Sequence[str]]) -> list[list[int]]:
    """Token ids of render(*texts) for each row of texts. Only `render` writes control tokens: the texts are made inert.
    A chat template writes its own BOS."""
    options = dict(add_special_tokens=not tokenizer.chat_template)
    different = list(dict.fromkeys(map(tuple, rows)))  # many rows are equal, and rendering is slow
    frame = render(*["text"] * len(rows[0]))
    frame, *encoded = tokenizer([frame, *(render(*row) for row in different)], **options).input_ids
    control = control_ids(tokenizer)
    expected = [i for i in frame if i in control]
    ids_of = {}
    for texts, ids in zip(different, encoded):
        if [i for i in ids if i in control] != expected:
            ids = tokenizer(render(*inert_texts(tokenizer, texts)), **options).input_ids
        while not tokenizer.chat_template and ids and ids[-1] in control:  # some tokenizers add an EOS
            ids.pop()
        ids_of[texts] = ids
    return [ids_of[tuple(row)] for row in rows]


# --- rollouts from tokens and texts -------------------------------------------------------------------------------
def pack(policy: Policy, prompts: list[str], texts: list[str], prompt_ids: list[list[int]],
         response_ids: list[list[int]], temperature: float = 1.0) -> Rollout:
    """A Rollout from lists of token ids; `ended` is read off the responses' last tokens."""
    rows = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [policy.eos_ids[0]] * (T - len(row)) for row in rows], device=policy.device)  # (B, T)
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids], device=policy.device)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    ended = torch.tensor([bool(r) and r[-1] in policy.eos_ids for r in response_ids], device=policy.device)
    return Rollout(list(prompts), list(texts), tokens, prompt_lengths, lengths, ended, temperature)


def demonstrations(policy: Policy, pairs: list[tuple[str, str]]) -> Rollout:
    """A Rollout of given (prompt, response) pairs, for supervised training; rows beyond the context are cut."""
    prompts, texts = zip(*pairs)
    prompt_ids, response_ids = policy.encode_pairs(pairs)
    response_ids = [ids[: policy.context // 2] for ids in response_ids]
    prompt_ids = [ids[-(policy.context - len(r)) :] for ids, r in zip(prompt_ids, response_ids)]
    return pack(policy, prompts, texts, prompt_ids, response_ids)


def logprobs_and_values(policy: Policy, rollout: Rollout, entropy_grad: bool = False,
                        with_values: bool = True) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probs, values and entropies of the response tokens, from one forward.

    Returns (logprobs, values, entropy), each (B, T) fp32 in nats, zero outside `rollout.response_mask`. The head is
    applied to response positions only, never to prompts or padding. values is None without `with_values`.
    """
    return policy(rollout, entropy_grad, with_values)  # a call, so that the hooks of a sharded policy run


# --- sampling ---------------------------------------------------------------------------------------------
@torch.no_grad()
def generate(policy: Policy, prompts: list[str], max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int | None = None, *, clip_prompts: bool = False,
             batch_size: int = 256) -> Rollout:
    """Sample one response to each prompt with a KV cache; returns a Rollout.

    temperature 0 is greedy. top_k = 0 and top_p = 1 sample the full distribution, as PPO requires; filters are for
    evaluation. The same `seed` gives the same tokens. Raises ValueError if a prompt leaves no room for
    `max_new_tokens` in the model's context (with `clip_prompts` it is truncated on the left instead), or if an
    argument is out of range.
    """
    if max_new_tokens < 1 or not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:  # also refuses NaN
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                         f"{max_new_tokens}, {temperature}, {top_k}, {top_p}")
    if not prompts:
        raise ValueError("generate needs at least one prompt, got none")
    prompt_ids = policy.encode(prompts)
    room = policy.context - max_new_tokens
    longest = max(map(len, prompt_ids))
    if room < 1:
        raise ValueError(f"a context of {policy.context} tokens has no room for {max_new_tokens} new ones beside a "
                         "prompt; take a model with a longer one, or fewer --attack_tokens or --response_tokens")
    if longest > room and not clip_prompts:
        raise ValueError(f"a prompt may have at most {room} tokens (context {policy.context} less {max_new_tokens} new "
                         f"ones), got {longest}; shorten it or lower the number of new tokens")
    prompt_ids = [ids[-room:] for ids in prompt_ids]
    generator = torch.Generator(policy.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    pick = functools.partial(pick_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    lm = decoding_copy(policy)
    response_ids = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))  # batches of similar ones: less padding
    for start in range(0, len(prompts), batch_size):
        rows = sorted(by_length[start : start + batch_size])
        for i, ids in zip(rows, _decode(policy, lm, [prompt_ids[i] for i in rows], max_new_tokens, pick)):
            response_ids[i] = ids
    texts = [policy.decode(ids) for ids in response_ids]
    return pack(policy, prompts, texts, prompt_ids, response_ids, temperature or 1.0)


def _decode(policy, lm, prompt_ids, max_new_tokens, pick):
    """Token ids of each row's response. Rows leave the batch when they end. alive (n,): the numbers of the rows that
    are left; going: indices into `alive` of those that continue."""
    inputs, mask, positions = _left_padded(policy, prompt_ids)  # (B, P) each
    B = len(inputs)
    eos = torch.tensor(policy.eos_ids, device=policy.device)
    alive = torch.arange(B, device=policy.device)
    kind = _FixedDecoder if _has_fixed_shapes(lm) else _GrowingDecoder
    decoder = kind(lm, mask, positions, max_new_tokens)
    logits = decoder.prefill(inputs)  # (B, V)
    sampled = []
    while True:
        token = pick(logits[:, : policy.vocab_size].float())  # (n,)
        sampled.append(torch.full((B,), -1, device=policy.device).index_copy(0, alive, token))  # -1: after the end
        going = (~torch.isin(token, eos)).nonzero()[:, 0]
        if not len(going) or len(sampled) == max_new_tokens:
            break
        alive = alive[going]
        logits = decoder.step(token[going], going)  # (n, V)
    return [[i for i in row if i >= 0] for row in torch.stack(sampled, 1).tolist()]


def _next_logits(lm, inputs, mask, positions, cache):
    """(logits (n, V) of the token after inputs (n, P), the cache with these inputs)."""
    out = lm.base_model(input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
                        use_cache=True)
    return lm.get_output_embeddings()(out.last_hidden_state[:, -1]), out.past_key_values


class _GrowingDecoder:
    """Next tokens' logits. Its cache grows by one token at each step, and the rows that have ended leave it."""

    def __init__(self, lm, mask, positions, max_new_tokens):
        self.lm = lm
        self.mask = mask
        self.positions = positions
        self.cache = None

    def prefill(self, inputs):
        """Logits (n, V) after inputs (n, P), the next tokens of all rows."""
        logits, self.cache = _next_logits(self.lm, inputs, self.mask, self.positions, self.cache)
        return logits

    def step(self, token, going):
        """Logits (n, V) after a token (n,) of each row that goes on: the last rows' indices `going` (n,)."""
        if len(going) < len(self.mask):
            self.mask = self.mask[going]
            self.positions = self.positions[going]
            self.cache.batch_select_indices(going)
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(going), 1)], 1)
        return self.prefill(token[:, None])


class _FixedDecoder:
    """The same in shapes that never change: a cache of full length, which no row leaves. A GPU captures one step as a
    graph and replays it, because launching a small model's kernels one by one takes longer than running them."""

    def __init__(self, lm, mask, positions, max_new_tokens):
        self.lm = lm
        self.cache = StaticCache(lm.config, max_cache_len=mask.shape[1] + max_new_tokens)
        self.seen = F.pad(mask.bool(), (0, max_new_tokens))[:, None, None]  # (B, 1, 1, L), True: a token is there
        self.positions = positions
        self.alive = torch.arange(len(mask), device=mask.device)
        self.graph = None

    def prefill(self, inputs):
        """Logits (B, V) after inputs (B, P)."""
        self.length = inputs.shape[1]  # tokens in the cache
        past = torch.ones(self.length, self.seen.shape[-1], dtype=torch.bool, device=inputs.device).tril()  # (P, L)
        itself = past.triu()  # padding attends to itself, since a softmax over nothing is NaN
        bias = self._bias(self.seen & past | itself)
        logits, _ = _next_logits(self.lm, inputs, bias, self.positions, self.cache)
        # what a step reads, always in the same place
        self.token = torch.zeros_like(inputs[:, :1])
        self.position = self.positions[:, -1:].clone()
        self.bias = self._bias(self.seen)
        return logits

    def step(self, token, going):
        """Logits (n, V) after a token (n,) of each row that goes on: the last rows' indices `going` (n,)."""
        self.alive = self.alive[going]
        self.token[self.alive, 0] = token
        self.position += 1
        self.bias[..., self.length] = 0
        self.length += 1
        if not self.token.is_cuda:
            return self._next()[self.alive]
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.logits[self.alive]

    def _next(self):
        logits, _ = _next_logits(self.lm, self.token, self.bias, self.position, self.cache)
        return logits

    def _bias(self, sees):
        """0 where a query sees a key, else the least number: (B, 1, queries, L)."""
        dtype = self.lm.dtype
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)

    def _capture(self):
        """Capture a step, without running it, as a CUDA graph whose replays write self.logits."""
        with torch.cuda.device_of(self.token):  # streams are of the current GPU, which need not be the model's
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._next()  # a rehearsal, in which libraries set themselves up
                for layer in self.cache.layers:
                    layer.cumulative_length.sub_(1)
                self.graph = torch.cuda.CUDAGraph()
                self.graph.capture_begin()
                self.logits = self._next()
                self.graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)


def _has_fixed_shapes(lm):
    """Whether `_FixedDecoder` decodes a model: on a GPU, if its code can be captured and no layer has a sliding window
    or a state of its own."""
    has_alibi = getattr(lm.config, "alibi", lm.config.model_type == "bloom")  # which reads a mask of two dimensions
    is_dynamic = "dynamic" in str(getattr(lm.config, "rope_parameters", ""))  # compares numbers on the CPU
    has_experts = lm._can_set_experts_implementation()  # which in fp32 count their rows on the CPU
    fits = lm.device.type == "cuda" and lm._can_compile_fullgraph
    if not fits or has_alibi or is_dynamic or has_experts or lm.config._attn_implementation not in ("eager", "sdpa"):
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(lm.config, max_cache_len=1).layers)


def _left_padded(policy, prompt_ids):
    """Prompts padded on the *left*, so that one column is one step: (tokens, mask with 1 = real, positions), (B, P)
    each. Positions count real tokens only."""
    P = max(map(len, prompt_ids))
    tokens = torch.tensor([[policy.eos_ids[0]] * (P - len(ids)) + ids for ids in prompt_ids], device=policy.device)
    mask = torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=policy.device)
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


def pick_token(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
               generator: torch.Generator) -> torch.Tensor:
    """The next token (B,) from logits (B, V) in fp32, sampled by inversion: that takes one random number per row, and
    `torch.multinomial` takes V. Non-finite logits give the last token: `ppo_update` computes the same logits and skips
    the step."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:  # Fan et al., 2018
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:  # nucleus; Holtzman et al., 2020
        logits = TopPLogitsWarper(top_p)(None, logits)
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V), its last column 1 up to rounding
    # 1 - rand lies in (0, 1], so a token of probability zero is never sampled
    u = (1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)) * cdf[:, -1:]
    return torch.searchsorted(cdf, u)[:, 0].clamp(max=logits.shape[1] - 1)


# --- the processor ------------------------------------------------------------------------------------------
def best_dtype(device: str | torch.device) -> torch.dtype:
    """The compute dtype of `--dtype auto`: bf16 if the processor multiplies it natively, else fp32."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next tensor. By default it returns every large block to the system and
    maps it again, page by page: a third of a GPT-2 update's time on a CPU. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets its own mapping
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: no memory is returned


# --- supervised training: learning rate and batches -----------------------------------------------------------
def one_cycle(optimizer: torch.optim.Optimizer, peak: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """The learning rate of supervised training: up to its peak in a tenth of the steps, then down to almost zero. As
    OneCycleLR does by default, AdamW's first beta goes the other way: .95, .85 at the peak, .95."""
    total = max(2, steps)
    if total == 10:
        total = 11  # for 10, OneCycleLR would divide by 0.1 * 10 - 1
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total, pct_start=0.1)


GROUP = 32  # steps whose rows are sorted together


def sample_batches(n: int, steps: int, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of each supervised step's batch, (steps, batch_size), sampled uniformly from n rows."""
    return rng.integers(n, size=(steps, batch_size))


def group_by_length(batches: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The batches (steps, batch_size) with the rows of GROUP steps sorted by their lengths (n,) and split again, in
    random order. Rows of similar length then share a batch, which has little padding (but the mean over its tokens
    weighs those of short rows more)."""
    grouped = batches.copy()
    for start in range(0, len(batches), GROUP):
        chosen = batches[start : start + GROUP]
        sorted_rows = chosen.ravel()[np.argsort(lengths[chosen.ravel()], kind="stable")]
        grouped[start : start + GROUP] = rng.permutation(sorted_rows.reshape(chosen.shape))
    return grouped


# --- copies -----------------------------------------------------------------------------------------------------
def _copy_lm(policy, dtype=None):
    """A copy of the language model, in `dtype` if given, complete even if the policy is sharded. Weights that are
    neither trained nor cast are shared, not copied."""
    source = policy.skeleton if policy.is_sharded else policy.lm
    weights = dict(policy.lm.named_parameters())
    memo = {}
    for name, parameter in source.named_parameters():
        weight = weights[name]
        is_cast = dtype not in (None, weight.dtype)
        if weight.requires_grad or is_cast or policy.is_sharded:
            complete = weight.detach().full_tensor() if policy.is_sharded else weight.detach()
            weight = nn.Parameter(complete.to(dtype or weight.dtype, copy=True), requires_grad=False)
        memo[id(parameter)] = weight
    return copy.deepcopy(source, memo)


def decoding_copy(policy: Policy) -> nn.Module:
    """The language model with its weights in the compute dtype: autocast would cast them again for every token."""
    if policy.compute_dtype == torch.float32 and not policy.is_sharded:
        return policy.lm
    lm = _copy_lm(policy, policy.compute_dtype)
    if lm._supports_sdpa:  # without a backward it is faster than plain attention: see `_use_faster_operations`
        lm.set_attn_implementation("sdpa")
    for module in lm.modules():
        if isinstance(module, Conv1D):  # GPT-2's layer: products of few rows are a third faster when transposed
            module.weight.data = module.weight.data.T.contiguous().T
    return lm


def frozen_copy(policy: Policy) -> Policy:
    """A frozen copy without the trained critic, such as the reference policy of the KL penalty. Only trained weights
    are copied, so the copy of a policy with LoRA is an adapter on the same base."""
    return Policy(_copy_lm(policy), policy.tokenizer, "shared", policy.compute_dtype).requires_grad_(False)


# --- loading and saving -----------------------------------------------------------------------------------------
def load_policy(name_or_dir: str | Path, critic: str = "shared", dtype: torch.dtype = torch.float32,
                device: str = "cpu", trust_remote_code: bool = False) -> Policy:
    """A Policy, with an untrained critic, from a model's folder, a .gguf file or a hub id.

    Raises ValueError, in one line, if it cannot be loaded, is not a causal language model, is quantized, lacks a
    tokenizer, writes more into a response than the answer, or computes its logits by more than a linear head on
    `last_hidden_state`.
    """
    try:
        if Path(name_or_dir, "games.jsonl").is_file():
            raise ValueError("it is a run's folder; take the attacker or the defender in it, once the run is finished")
        lm, tokenizer = load_model(AutoModelForCausalLM, name_or_dir, trust_remote_code, is_player=True)
        policy = Policy(lm.to(device), tokenizer, critic, dtype)
        if tokenizer.chat_template:
            _probe_template(policy)
        _probe_forward(policy)
        return policy
    except Exception as error:  # transformers raises a dozen kinds here
        where = ""
        if isinstance(error, OSError) and not Path(name_or_dir).exists():
            where = " (no such folder here, and the hub did not provide it; pass a local folder)"
        raise ValueError(f"cannot load {str(name_or_dir)!r} as a causal language model{where}: {first_line(error)}"
                         ) from error


def load_model(kind: type, name: str | Path, trust_remote_code: bool = False,
               is_player: bool = False) -> tuple[PreTrainedModel, Tokenizer]:
    """(model, tokenizer) of a folder, a .gguf file or a hub id, in fp32; kind: a class such as AutoModelForCausalLM. An
    adapter by peft or TRL is merged into its base, whose tokenizer is used if it has none. Raises ValueError if
    weights are missing (transformers would initialise them at random), or embeddings of the tokenizer's tokens, and
    if the weights of a player are quantized."""
    options = dict(trust_remote_code=trust_remote_code)
    load_options = dict(options, dtype=torch.float32, output_loading_info=True)
    source = name  # where the tokenizer is
    if str(name).endswith(".gguf"):
        from transformers import GgufConfig
        options["gguf_file"] = load_options["gguf_file"] = Path(name).name
        source = Path(name).parent
        unpack = GgufConfig(dequantize=True)  # a model of packed weights could be neither trained nor saved
        model, info = kind.from_pretrained(source, quantization_config=unpack, **load_options)
    elif find_adapter_config_file(name):
        model, info = merge_adapter(kind, name, load_options)
        options["config"] = model.config  # the adapter's repository has none
        if not get_tokenizer_config(name):
            source = model.name_or_path
        model.name_or_path = str(name)
    else:
        if is_player and _is_quantized(name):
            raise ValueError("a player's weights must not be quantized, as they are trained and saved; take the model "
                             "it was made from")
        model, info = kind.from_pretrained(name, **load_options)
    check_finite(model)
    if Path(source, GENERATION_CONFIG_NAME).is_file():  # with EOS ids; a damaged one would be ignored without a word
        GenerationConfig.from_pretrained(source)
    task = kind.__name__.removeprefix("AutoModelFor")
    made_for = re.search("For(SequenceClassification|TokenClassification|QuestionAnswering)",
                         str(model.config.architectures))
    if made_for and made_for[1] != task:  # of which transformers would drop the head, without a word
        raise ValueError(f"it is a {made_for[1]} model, not a {task} one")
    if info["missing_keys"]:  # a classifier or an encoder, say
        raise ValueError(f"it has no weights for {min(info['missing_keys'])}, so it is not a trained {task} model"
                         f"{_own_code(model)}")
    check_layers(model, info)
    tokenizer = load_tokenizer(source, **options)
    if str(name).endswith(".gguf"):
        from gguf import GGUFReader
        reader = GGUFReader(name)
        check_gguf(model, reader)
        tokenizer.add_tokens(_gguf_control_tokens(reader), special_tokens=True)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def _is_quantized(name):
    """Whether the weights of a folder or hub id are packed, by its config.json: of some formats (FP8) transformers
    unpacks them where it loads them, and what it saves later is garbage."""
    config, _ = PretrainedConfig.get_config_dict(name)
    return any(part.get("quantization_config") for part in (config, config.get("text_config") or {}))


def check_gguf(model: PreTrainedModel, reader: object) -> None:
    """Raises ValueError if a .gguf file holds what transformers drops without a word: the scaling of rotary positions,
    or weights for which the model has no place. reader: a GGUFReader of it."""
    scalings = [field.contents() for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")]
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    factors = [name for name in sizes if name.startswith("rope_")]
    if factors or scalings not in ([], ["none"]):
        raise ValueError(f"its rotary positions are scaled ({(factors or scalings)[0]}), which transformers drops from "
                         "a .gguf file; take the folder of the model it was made from")
    loaded = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}  # tied ones count once
    n = sum(sizes.values())
    if n > sum(loaded.values()):
        raise ValueError(f"it holds {n:,} weights, of which transformers loads only {sum(loaded.values()):,}; take the "
                         "folder of the model it was made from")


def _gguf_control_tokens(reader):
    """The tokens that the file marks as control tokens. transformers keeps their text, but drops the mark."""
    from gguf import TokenType
    words = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    return [word for word, kind in zip(words, types) if kind == TokenType.CONTROL]


def merge_adapter(kind: type, name: str | Path, options: dict) -> tuple[PreTrainedModel, dict]:
    """(an adapter's base model with the adapter merged into it, what `from_pretrained` tells of it; only weights that
    neither has are missing). kind: a class such as AutoModelForCausalLM; options: for `from_pretrained`. Raises
    ValueError without peft or the base, and if the adapter does not fit it or cannot be merged."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("it is an adapter, which needs the package peft: pip install peft") from error
    settings = peft.PeftConfig.from_pretrained(name)
    other_task = "SEQ_CLS" if kind is AutoModelForCausalLM else "CAUSAL_LM"
    if settings.task_type == other_task:
        raise ValueError(f"it is an adapter for {other_task}, not for a {kind.__name__.removeprefix('AutoModelFor')}")
    if settings.is_prompt_learning:
        raise ValueError(f"it is an adapter of type {settings.peft_type}, which cannot be merged into its base; take "
                         "one that can")
    base = settings.base_model_name_or_path
    if base and Path(name, base).is_dir():  # in checkpoints/start the base's path is relative to the adapter
        base = str(Path(name, base).resolve())
    weights = {key.removeprefix("base_model.model."): w for key, w in peft.load_peft_weights(name, "cpu").items()}
    heads = [w for key, w in weights.items() if key.endswith(("score.weight", "classifier.weight", "out_proj.weight"))]
    if heads:
        options = {**options, "num_labels": len(heads[-1]), "ignore_mismatched_sizes": True}
    try:
        if base and find_adapter_config_file(base):  # peft would put both in one place
            raise ValueError("it is an adapter too; merge that one into its own base first, and save the result")
        if _is_quantized(base):
            raise ValueError("its weights are quantized")
        model, info = kind.from_pretrained(base, **options)
    except Exception as error:
        raise ValueError(f"it is an adapter, and its base {base!r} cannot be loaded: {first_line(error)}; name "
                         "another as base_model_name_or_path in its adapter_config.json") from error
    _prepare_embeddings(model, weights, getattr(settings, "ensure_weight_tying", False))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # the base would play without them
            model = peft.PeftModel.from_pretrained(model, name)
    except UserWarning as error:
        raise ValueError(f"it is an adapter that lacks weights for its base {base!r}, or names them otherwise; merge "
                         "it as it was trained, and save the result") from error
    model = model.merge_and_unload().requires_grad_(True)  # peft froze it
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    return model, {**info, "missing_keys": (set(info["missing_keys"]) | mismatched) - set(weights)}


def _prepare_embeddings(model, weights, keeps_tie):
    """Give an adapter's base as many embeddings as the adapter has, and, if the adapter adds LoRA to an embedding that
    is the head too, a head of its own: merged, it would change both. Raises ValueError if peft would tie them again."""
    names = {module: name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    own = [w for key, w in weights.items() if re.fullmatch(rf"{names.get(embedding)}(\.base_layer)?\.weight", key)]
    if own and len(own[0]) != embedding.num_embeddings:
        model.resize_token_embeddings(len(own[0]), mean_resizing=False)
    places = tuple(f"{names[module]}.lora_" for module in (embedding, head) if module in names)
    if head is not None and head.weight is embedding.weight and any(key.startswith(places) for key in weights):
        if keeps_tie:
            raise ValueError("its adapter has ensure_weight_tying, and changes a tied embedding: it cannot be merged")
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _probe_template(policy):
    """Raises ValueError unless a response is the answer alone, without thoughts or a channel's name."""
    prompt, answer = PROBE
    text = policy._render(prompt)
    if re.search(r"<think>\s*\Z", text):
        raise ValueError("a policy must answer without thoughts, but its chat template opens one at the end of its "
                         f"prompts, {text[-20:]!r}: take another model")
    _, (ids,) = policy.encode_pairs([PROBE])
    if policy.decode(ids) != policy.decode(policy.tokenizer(answer, add_special_tokens=False).input_ids):
        raise ValueError(f"a response must be the assistant's words alone, but its chat template makes of {answer!r} "
                         f"{policy.decode(ids)[:60]!r}: take another model")


@torch.no_grad()
def _probe_forward(policy):
    """Raises ValueError for a model that this project cannot run: its logits must be head(hidden), and the sampler,
    with a cache, padding and rows that end, must compute the same logits as one forward."""
    name = policy.lm.config.model_type
    rows = policy.lm.get_input_embeddings().num_embeddings
    ids = [i for i in torch.linspace(0, rows - 1, 16).long().tolist() if i not in policy.eos_ids]
    tokens = torch.tensor([ids], device=policy.device)  # (1, T)
    # added to the hidden states, so that a cap on the logits shows
    large = 100 * torch.randn(1, len(ids), policy.head.in_features, generator=torch.Generator().manual_seed(0))
    large = large.to(policy.device)

    def decoded(lm):
        """Logits (3, V) of the sampler: of two rows, then of the one that goes on."""
        sampled = []

        def pick(logits):  # the first row ends at once, the other goes on with its next token
            sampled.append(logits)
            return torch.tensor([policy.eos_ids[0], ids[4]], device=policy.device)[-len(logits):]

        _decode(policy, lm, [ids[:6], ids[:4]], 2, pick)
        return torch.cat(sampled)

    try:
        hidden = policy.hidden(tokens)  # (1, T, D)
        hook = policy.head.register_forward_pre_hook(lambda head, states: states[0] + large)
        large_logits = policy.lm(tokens).logits
        hook.remove()
        sampled = decoded(policy.lm)
        if policy.compute_dtype != torch.float32:  # in which a model may fail that runs in fp32
            with policy.autocast():
                policy.hidden(tokens)
            decoded(decoding_copy(policy))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"a model of type {name} cannot be run as a policy ({first_line(error)}); take one of another "
                         "type") from error
    if not _all_close(large_logits, policy.head(hidden + large)):
        raise ValueError("a policy's logits must be a linear head on its last hidden state, neither scaled nor capped; "
                         f"{name} is different: take a model of another type")
    if not _all_close(sampled, policy.head(hidden[0, [5, 3, 4]])[:, : policy.vocab_size]):
        raise ValueError("a policy must give the same logits with a cache and padding as without; a model of type "
                         f"{name} does not: take one of another type")


def _all_close(x, y):
    """Whether two tensors (...) are equal up to rounding, in units of their largest element."""
    return bool((x - y).abs().max() <= 1e-4 * y.abs().max())


def save_policy(policy: Policy, folder: str | Path, card: str = "") -> None:
    """Write a `save_pretrained` folder with tokenizer and model card, without the critic. All processes of a sharded
    policy must call it; the first one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy.lm, options=options)  # complete in the first process, {} in the others
    if not state:
        return
    folder = Path(folder)
    policy.lm.save_pretrained(folder, state_dict=state)
    save_tokenizer(policy.tokenizer, folder)
    file = folder / GENERATION_CONFIG_NAME
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = settings.get("eos_token_id")
    if not set(policy.eos_ids) <= {*(named if isinstance(named, list) else [named])}:
        settings["eos_token_id"] = policy.eos_ids  # or the base's `generate` would not stop where the template does
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """`save_pretrained` without the padding of the last call and the tokenizer's origin, which differ in a resumed
    run. Raises OSError if it cannot write."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # on a full disk the package tokenizers raises a plain Exception
        raise OSError(f"cannot write the tokenizer to {folder}: {first_line(error)}") from error


def check_finite(model: PreTrainedModel) -> None:
    """Raises ValueError if a weight is NaN or infinite, as after a training that diverged."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"its weights in {name} are not all finite; take a checkpoint in which they are")


def check_layers(model: PreTrainedModel, info: dict) -> None:
    """Raises ValueError if a model's files hold weights for which its config has no place, though it has the layer, or
    the same one with another number: more layers or biases, say, which transformers drops. info: of
    `from_pretrained`."""
    def layer(name):
        return re.sub(r"\.\d+\.", ".0.", name.removeprefix(f"{model.base_model_prefix}.")).rpartition(".")[0]

    layers = {layer(name) for name, _ in model.named_parameters()}
    dropped = [name for name in info["unexpected_keys"] if layer(name) in layers]
    if dropped:
        raise ValueError(f"its files hold {min(dropped)}, which its config.json leaves out; take the config.json that "
                         f"belongs to these weights{_own_code(model)}")


def _own_code(model):
    """What to say of a model's weights that do not fit, if it is of a class of its own that was not run."""
    return "; it comes with code of its own (trust_remote_code)" if hasattr(model.config, "auto_map") else ""


def check_body(model: PreTrainedModel, info: dict) -> None:
    """Raises ValueError if weights of a model's body are missing (transformers has made them at random), left out or
    not finite. info: of `from_pretrained`. A head, which is trained, and a pooler, which is not used or trained, may
    be new."""
    check_layers(model, info)
    check_finite(model.base_model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    missing = [key for key in new if key.startswith(prefix) and "pooler" not in key]
    if missing:
        raise ValueError(f"it has no weights for {min(missing)}{_own_code(model)}")


def load_tokenizer(source: str | Path, **options) -> Tokenizer:
    """AutoTokenizer's of a folder or hub id, with the model, normalizer, pre-tokenizer and decoder of its
    tokenizer.json. transformers makes those of some classes anew, from the vocabulary alone, and texts become other
    tokens: of Llama 2 and SmolLM2, or where a BERT's files do not name the class of its XLM-R tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    file = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    is_made_anew = tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.models.")
    if not file or not is_made_anew or "gguf_file" in options:
        return tokenizer
    written = tokenizers.Tokenizer.from_file(file)
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        value = getattr(written, part)
        is_kept = type(value) is type(getattr(tokenizer.backend_tokenizer, part))
        if not is_kept or not isinstance(value, (BertNormalizer, ByteLevel)):  # with options in tokenizer_config.json
            setattr(tokenizer.backend_tokenizer, part, value)
    return tokenizer


def check_tokenizer(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Raises ValueError if a folder has no tokenizer (transformers then makes one of special tokens only), or one with
    tokens for which the model has no embedding, but for special ones that neither it nor its chat template writes:
    `inert_texts` keeps them out of texts. (Gemma 3's models for text alone have the token of images.)"""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError("it has no tokenizer")
    rows = model.get_input_embeddings().num_embeddings
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    written = [getattr(tokenizer, f"{name}_token") or "" for name in names] + [str(tokenizer.chat_template or "")]
    spare = {i for i, token in tokenizer.added_tokens_decoder.items()
             if token.special and not any(token.content in text for text in written)}
    last = max(set(tokenizer.get_vocab().values()) - spare)
    if last >= rows:
        raise ValueError(f"its tokenizer must be of its {rows} embeddings, but has a token of number {last}; use the "
                         "tokenizer that it was trained with")


def longest_input(tokenizer: Tokenizer, config: PretrainedConfig) -> int:
    """The longest input of an encoder or classifier, in tokens."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0
    if positions < 3:  # no limit; XLNet has -1
        positions = 514
    return min(tokenizer.model_max_length, positions - 2)  # RoBERTa's start at 2


def first_line(error: Exception) -> str:
    """The first non-empty line of an error's message, and the second if it explains the first, for an error of one
    line."""
    line, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if line.endswith(":"):
        line = " ".join([line, *more[:1]])
    if "trust_remote_code" in str(error):
        line += "; --trust_remote_code runs it"
    return line
