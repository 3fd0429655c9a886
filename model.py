"""Policies and rollouts: a transformers causal language model with a value head, its sampler, its log-probs.

One convention holds in the whole project. A rollout is right-padded: each row is prompt, response, padding.
**Index t always speaks of tokens[:, t]**: logprobs[:, t] is the log-probability of that token given the
tokens before it, values[:, t] the value of the state before it. Both come from the hidden state at t - 1;
`Policy.forward` is the one place where that shift happens.

Masks come from lengths, never from token ids, so a pad token that equals EOS is harmless. With padding only
on the right, causal attention alone keeps it out of every real position.

B batch, T tokens of the longest row, D width, V vocabulary, N response tokens of all rows.
"""

import contextlib
import copy
import ctypes
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.activations import NewGELUActivation
from transformers.cache_utils import StaticLayer
from transformers.pytorch_utils import Conv1D

from data import check_tokenizer, first_line, save_tokenizer, write_text
from kernel import linear_logprob
from scale import adapter, blank_copy, frozen_base, in_shares, load_whole, merged, rank, shard, unsharded, whole, world_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PEFT_PREFIX = "base_model.model."  # before every name in peft's files
PLAIN_TEMPLATE = "Human: {} AI:"  # for tokenizers without a chat template, as in the authors' code


# --- policies and rollouts ------------------------------------------------------------------------------
@dataclass
class Rollout:
    """Prompts, what was said to them, and the tokens by which it was said.

    A row's first `prompt_lengths[b]` tokens are its prompt, the next, up to `lengths[b]`, its response with its
    EOS. `temperature` and `support` are replayed whenever log-probs are computed.
    """

    prompts: list[str]
    texts: list[str]
    tokens: torch.Tensor  # (B, T) int64, right-padded
    prompt_lengths: torch.Tensor  # (B,)
    lengths: torch.Tensor  # (B,)
    ended: torch.Tensor  # (B,) bool, True where an EOS was sampled
    temperature: float = 1.0
    support: torch.Tensor | None = None  # (B, T, V) bool, True where a top-k / top-p filter left a token possible

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def response_mask(self) -> torch.Tensor:
        """(B, T) bool, True on response tokens: the sampled actions, first EOS included, nothing after it."""
        t = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (t >= self.prompt_lengths[:, None]) & (t < self.lengths[:, None])

    def select(self, rows: torch.Tensor) -> "Rollout":
        """The given rows (n,), trimmed to the longest of them."""
        T = int(self.lengths[rows].max())
        index = rows.tolist()
        return replace(
            self, prompts=[self.prompts[i] for i in index], texts=[self.texts[i] for i in index],
            tokens=self.tokens[rows, :T], prompt_lengths=self.prompt_lengths[rows], lengths=self.lengths[rows], ended=self.ended[rows],
            support=None if self.support is None else self.support[rows, :T])


class Policy(nn.Module):
    """A causal language model, its tokenizer and its critic.

    critic "shared": the value head reads the policy's own hidden states. critic "separate": it reads a
    body of its own, at first a copy of the policy's. The value head starts at zero (DESIGN, section 2, point 13).
    The module stays in eval mode for ever: dropout would make the PPO ratio differ from 1.
    Raises ValueError for another critic and for a model without an end-of-sequence token.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, critic: str = "shared", dtype: torch.dtype = torch.float32):
        super().__init__()
        if critic not in ("shared", "separate"):
            raise ValueError(f"critic must be 'shared' or 'separate', got {critic!r}")
        self.lm, self.tokenizer, self.compute_dtype = lm, tokenizer, dtype
        _use_faster_operations(lm, dtype)
        self.critic_body = copy.deepcopy(lm.base_model) if critic == "separate" else None
        self.value_head = nn.Linear(lm.get_output_embeddings().in_features, 1, device=lm.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eos_ids = _eos_ids(lm, tokenizer)  # the first is the one to teach
        self.context = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or 2**30  # tokens
        self.skeleton = None  # see `shard`
        self.eval()

    def train(self, mode: bool = True) -> "Policy":
        """Does nothing: a policy is always in eval mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    @property
    def head(self) -> nn.Module:
        """weight (V, D), bias (V,) or None."""
        return self.lm.get_output_embeddings()

    def autocast(self) -> torch.autocast:
        """fp32 master weights; matrix products in the compute dtype (DESIGN, section 2, point 9)."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def hidden(self, tokens: torch.Tensor, body: nn.Module | None = None) -> torch.Tensor:
        """Last hidden states (B, T, D) of right-padded tokens (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        body = self.lm.base_model if body is None else body
        return body(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state

    def forward(self, rollout: Rollout, entropy_grad: bool, with_values: bool) -> tuple[torch.Tensor | None, ...]:
        """What `logprobs_and_values` returns, (B, T) each."""
        mask = rollout.response_mask  # (B, T)
        before = mask[:, 1:]  # (B, T - 1): the state at t - 1 acts tokens[t]
        tokens, targets = rollout.tokens[:, :-1], rollout.tokens[mask]  # (B, T - 1): the last token decides nothing; (N,)
        values = None
        with self.autocast():
            h = self.hidden(tokens)[before]  # (N, D)
            if rollout.support is None:
                logp, entropy = linear_logprob(h, self.head.weight, targets, self.head.bias, rollout.temperature, entropy_grad)
            else:
                logp, entropy = _filtered_logprob(self.head(h), rollout.support[mask], targets, rollout.temperature, entropy_grad)
            if with_values:
                h = h if self.critic_body is None else self.hidden(tokens, self.critic_body)[before]
                with torch.autocast(self.device.type, enabled=False):
                    values = self.value_head(h.float())[:, 0]  # (N,)
        spread = lambda x: None if x is None else torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x)
        return spread(logp), spread(values), spread(entropy)  # (B, T) each

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt in the model's own chat format, ready to be answered."""
        if self.tokenizer.chat_template:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            rows = self.tokenizer(texts, add_special_tokens=False).input_ids
        else:
            rows = self.tokenizer([PLAIN_TEMPLATE.format(prompt) for prompt in prompts]).input_ids
            rows = [ids[:-1] if ids and ids[-1] in self.eos_ids else ids for ids in rows]  # some tokenizers append EOS
        return [ids or self.eos_ids[:1] for ids in rows]

    def encode_responses(self, responses: list[str]) -> list[list[int]]:
        """Token ids of each response, EOS included."""
        space = "" if self.tokenizer.chat_template else " "
        rows = self.tokenizer([space + response for response in responses], add_special_tokens=False).input_ids
        return [[*ids, self.eos_ids[0]] for ids in rows]

    def decode(self, ids: list[int]) -> str:
        """The text of a response's token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _use_faster_operations(lm, dtype):
    """The same function by other operations, in place."""
    if dtype != torch.float32 and lm.device.type == "cpu":
        lm.set_attn_implementation("eager")  # for texts of 50 tokens five times faster than the fused backward in bf16; equal at 300
    for module in list(lm.modules()):  # GPT-2's activation in one operation instead of eight
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _eos_ids(lm, tokenizer):
    """All token ids that end a response: the tokenizer's first, then those of the model's generation config."""
    more = lm.generation_config.eos_token_id if lm.generation_config else None
    more, V = more if isinstance(more, list) else [more], lm.get_input_embeddings().num_embeddings
    ids = list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *more] if i is not None and i < V))
    if not ids:
        raise ValueError(f"a policy needs an end-of-sequence token, {lm.config.name_or_path or 'the model'} has none; "
                         "set eos_token in its tokenizer")
    return ids


def pack(policy: Policy, prompts: list[str], texts: list[str], prompt_ids: list[list[int]], response_ids: list[list[int]],
         temperature: float = 1.0) -> Rollout:
    """A Rollout from lists of token ids; `ended` is read off the responses' last tokens."""
    rows = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [policy.eos_ids[0]] * (T - len(row)) for row in rows], device=policy.device)  # (B, T)
    prompt_lengths, lengths = (torch.tensor([len(x) for x in ids], device=policy.device) for ids in (prompt_ids, rows))
    ended = torch.tensor([bool(r) and r[-1] in policy.eos_ids for r in response_ids], device=policy.device)
    return Rollout(list(prompts), list(texts), tokens, prompt_lengths, lengths, ended, temperature)


def demonstrations(policy: Policy, pairs: list[tuple[str, str]]) -> Rollout:
    """A Rollout of given (prompt, response) pairs, for supervised training; rows beyond the context are cut."""
    prompts, texts = zip(*pairs)
    response_ids = [ids[:policy.context // 2] for ids in policy.encode_responses(texts)]
    prompt_ids = [ids[-(policy.context - len(r)):] for ids, r in zip(policy.encode(prompts), response_ids)]
    return pack(policy, prompts, texts, prompt_ids, response_ids)


def with_idle_row(rollout: Rollout) -> Rollout:
    """A rollout and, where there are several processes, one row more without a response, for `share`."""
    if world_size() == 1:
        return rollout
    filled = rollout.select(torch.arange(len(rollout) + 1).clamp(max=len(rollout) - 1))
    filled.prompt_lengths[-1] = filled.lengths[-1]
    return filled


def logprobs_and_values(policy: nn.Module, rollout: Rollout, entropy_grad: bool = False, with_values: bool = True
                        ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probs, values and entropies of the response tokens, from one forward.

    Returns (logprobs, values, entropy), each (B, T) fp32 in nats, zero outside `rollout.response_mask`. The head is
    applied to response positions only, never to prompts or padding. values is None without `with_values`.
    policy: a Policy, or a Policy in DDP.
    """
    return policy(rollout, entropy_grad, with_values)  # a call, so that the hooks of DDP and FSDP run


def _filtered_logprob(logits, support, targets, temperature, entropy_grad):
    """(logprobs, entropy), (N,) each, under the filter that sampling applied: logits (N, V), support (N, V), targets (N,)."""
    logp_all = (logits.float() / temperature).masked_fill(~support, -torch.inf).log_softmax(-1)
    logp = logp_all.gather(-1, targets[:, None])[:, 0]
    entropy = -(logp_all.exp() * logp_all.masked_fill(~support, 0)).sum(-1)
    return logp, entropy if entropy_grad else entropy.detach()


# --- sampling ---------------------------------------------------------------------------------------------
@torch.no_grad()
def generate(policy: Policy, prompts: list[str], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             seed: int | None = None, clip_prompts: bool = False, batch_size: int = 256) -> Rollout:
    """Sample one response to each prompt with a KV cache; returns a Rollout.

    temperature 0 is greedy. top_k = 0 and top_p = 1 sample the full distribution. The same `seed` gives the
    same tokens. Raises ValueError when a prompt leaves no room for `max_new_tokens` in the model's context
    (with `clip_prompts` its left part is cut off instead) or a number is impossible.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                         f"{max_new_tokens}, {temperature}, {top_k}, {top_p}")
    if not prompts:
        raise ValueError("generate needs at least one prompt, got none")
    prompt_ids, room = policy.encode(prompts), policy.context - max_new_tokens
    longest = max(map(len, prompt_ids))
    if room < 1 or (longest > room and not clip_prompts):
        raise ValueError(f"a prompt may have at most {room} tokens (context {policy.context} less {max_new_tokens} new ones), "
                         f"got {longest}; shorten it or lower the number of new tokens")
    prompt_ids = [ids[-room:] for ids in prompt_ids]
    generator = torch.Generator(policy.device)
    generator.seed() if seed is None else generator.manual_seed(seed + 1_000_003 * rank())  # other random numbers for other prompts
    lm = cast_once(policy)
    decode = _decode_static if policy.device.type == "cuda" and has_static_shapes(lm) else _decode  # a CPU gains more by dropping rows
    pick = lambda logits: pick_token(logits, temperature, top_k, top_p, generator)

    def sample(ids):
        done = []  # (response ids, support) of each prompt
        for start in range(0, len(ids), batch_size):
            responses, supports = decode(policy, lm, ids[start:start + batch_size], max_new_tokens, pick)
            done += zip(responses, [kept.cpu() for kept in supports] or [None] * len(responses))
        return done

    response_ids, supports = zip(*in_shares(sample, prompt_ids))
    rollout = pack(policy, prompts, [policy.decode(r) for r in response_ids], prompt_ids, response_ids, temperature or 1.0)
    if supports[0] is not None:
        rollout.support = torch.zeros(*rollout.tokens.shape, supports[0].shape[-1], dtype=torch.bool, device=policy.device)
        for row, start, end, kept in zip(rollout.support, rollout.prompt_lengths, rollout.lengths, supports):
            row[start:end] = kept[:end - start]
    return rollout


def cast_once(policy: Policy) -> nn.Module:
    """The language model with its weights in the compute dtype: autocast would cast them again for every token."""
    if policy.compute_dtype == torch.float32 and policy.skeleton is None:
        return policy.lm
    modules, ours = (policy.skeleton or policy).lm, dict(policy.lm.named_parameters())
    cast = lambda p: nn.Parameter(whole(p.to(policy.compute_dtype)), requires_grad=False)
    lm = copy.deepcopy(modules, {id(p): cast(ours[name]) for name, p in modules.named_parameters()})  # not the fp32 weights
    for module in lm.modules():
        if isinstance(module, Conv1D):  # GPT-2's linear layer: a product of few rows is a third faster from the transposed layout
            module.weight.data = module.weight.data.T.contiguous().T
    return lm


def _decode(policy, lm, prompt_ids, max_new_tokens, pick):
    """Sample until every row has ended. `pick` makes tokens (n,) and supports (n, V) or None from logits (n, V).
    Returns ids per row and, with a filter, its (R, V) supports, R the longest response."""
    inputs, mask, positions = _left_padded(policy, prompt_ids)  # (B, P) each
    B, eos = len(inputs), torch.tensor(policy.eos_ids, device=policy.device)
    alive = torch.arange(B, device=policy.device)  # the rows that have not ended: the others are decoded no further
    cache, sampled, supports = None, [], []
    for _ in range(max_new_tokens):
        out = lm.base_model(input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token, support = pick(lm.get_output_embeddings()(out.last_hidden_state[:, -1]).float())
        if support is not None:
            nothing = torch.zeros(B, support.shape[1], dtype=torch.bool, device=policy.device)
            supports.append(nothing.index_copy(0, alive, support))
        sampled.append(torch.full((B,), -1, device=policy.device).index_copy(0, alive, token))  # -1: after the end
        going = (~torch.isin(token, eos)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(alive):
            alive, token, mask, positions = alive[going], token[going], mask[going], positions[going]
            cache.batch_select_indices(going)
        inputs, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
    return _responses_of(sampled, supports)


def _decode_static(policy, lm, prompt_ids, max_new_tokens, pick):
    """What `_decode` does, in shapes that never change: every row goes on until the last has ended, in a cache of full length.
    So a GPU can replay one captured step: launching a small model's kernels one by one takes longer than running them."""
    inputs, mask, positions = _left_padded(policy, prompt_ids)  # (B, P) each
    (B, P), L, eos = inputs.shape, inputs.shape[1] + max_new_tokens, torch.tensor(policy.eos_ids, device=policy.device)
    cache, body, head = StaticCache(lm.config, max_cache_len=L), lm.base_model, lm.get_output_embeddings()
    lowest = torch.finfo(body.dtype).min
    bias = lambda may: torch.zeros(may.shape, device=policy.device, dtype=body.dtype).masked_fill(~may, lowest)
    run = lambda tokens, attend, positions: head(
        body(input_ids=tokens, attention_mask=attend, position_ids=positions, past_key_values=cache).last_hidden_state[:, -1])

    seen = F.pad(mask.bool(), (0, max_new_tokens))[:, None, None, :]  # (B, 1, 1, L), True where there is a token
    square = torch.ones(P, L, dtype=torch.bool, device=policy.device)
    itself = square.tril() & square.triu()  # a padding sees itself: no softmax over nothing
    logits = run(inputs, bias(seen & square.tril() | itself), positions)  # (B, V)
    token, position, attend = torch.zeros_like(inputs[:, :1]), positions[:, -1:].clone(), bias(seen)  # a step reads these places
    step = lambda: run(token, attend, position)
    graph, finished, sampled, supports = None, torch.zeros(B, dtype=torch.bool, device=policy.device), [], []
    for t in range(max_new_tokens):
        picked, support = pick(logits.float())
        supports += [] if support is None else [support & ~finished[:, None]]
        sampled.append(picked.masked_fill(finished, -1))
        finished = finished | torch.isin(picked, eos)
        if finished.all():
            break
        token.copy_(picked[:, None])
        position += 1
        attend[..., P + t] = 0
        if token.is_cuda and graph is None:
            graph, logits = _capture(step, cache, P)
        if graph:
            graph.replay()
        else:
            logits = step()
    return _responses_of(sampled, supports)


def _capture(step, cache, length):
    """step() as a CUDA graph, not yet run, and the tensor that its replays write. `length`: tokens in the cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # a rehearsal, in which libraries set themselves up
    torch.cuda.current_stream().wait_stream(side)
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def has_static_shapes(lm: nn.Module) -> bool:
    """Whether a model decodes with a static cache: it says so, and no layer has a window or a state of its own."""
    return lm._can_compile_fullgraph and all(type(layer) is StaticLayer for layer in StaticCache(lm.config, max_cache_len=1).layers)


def _left_padded(policy, prompt_ids):
    """Prompts padded on the *left*, so that one column is one step: (tokens, mask with 1 = real, positions), (B, P) each.
    Positions count real tokens only."""
    P = max(map(len, prompt_ids))
    tokens = torch.tensor([[policy.eos_ids[0]] * (P - len(ids)) + ids for ids in prompt_ids], device=policy.device)
    mask = torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=policy.device)
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


def _responses_of(sampled, supports):
    """Steps of tokens (B,), -1 after a row's end, and of supports (B, V) -> ids and supports (R, V) per row."""
    responses = [[i for i in row if i >= 0] for row in torch.stack(sampled, 1).tolist()]
    return responses, list(torch.stack(supports, 1)) if supports else []


def pick_token(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
               ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token (B,) from logits (B, V) in fp32 and, with a filter, its support (B, V), else None."""
    if temperature == 0:
        return logits.argmax(-1), None
    logits, support = logits / temperature if temperature != 1 else logits, None
    if top_k > 0 or top_p < 1:
        logits, support = filter_logits(logits, top_k, top_p)
    return draw(logits, generator), support


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token (B,) from each row of logits (B, V), by inversion: one random number a row, where
    `torch.multinomial` takes V. 1 - rand lies in (0, 1], so a token of probability zero is never drawn. Logits that are not
    finite give the last token, for the same logits are found and named by `ppo_update`."""
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V), its last column 1 up to rounding
    u = (1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)) * cdf[:, -1:]
    return torch.searchsorted(cdf, u)[:, 0].clamp(max=logits.shape[1] - 1)


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k (Fan et al., 2018), then nucleus (top-p; Holtzman et al., 2020), filter.
    logits (B, V) -> (logits with -inf outside, support (B, V) bool)."""
    ranked, order = logits.sort(-1, descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k > 0:
        keep[:, top_k:] = False
    if top_p < 1:
        p = ranked.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= p.cumsum(-1) - p < top_p  # a token stays while the mass before it is below top_p
    support = torch.zeros_like(keep).scatter(-1, order, keep)
    return logits.masked_fill(~support, -torch.inf), support


# --- the processor ------------------------------------------------------------------------------------------
def best_dtype(device: str | torch.device) -> torch.dtype:
    """The compute dtype of `--dtype auto`: bf16 where the processor multiplies it natively, else fp32."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next tensor. It gives every large block back to the system and maps it
    afresh, page by page: a third of a GPT-2 update on a CPU. The programs call it; it does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


# --- copying, loading and saving ------------------------------------------------------------------------------
def frozen_copy(policy: Policy) -> Policy:
    """A copy that no gradient reaches, without a critic: the reference policy of the KL penalty. With LoRA it holds
    an adapter of its own and shares the base; of a sharded policy each process copies its own shards."""
    source = policy.skeleton or policy
    body, source.critic_body = source.critic_body, None
    twin = (copy.deepcopy(source, frozen_base(policy.lm)) if source is policy else blank_copy(source, "cpu")).requires_grad_(False)
    source.critic_body = body
    if source is not policy:
        shard(twin, policy.device.type)
        ours = dict(policy.named_parameters())
        for name, p in twin.named_parameters():
            p.copy_(ours[name])
    return twin


def load_policy(name_or_dir: str | Path, critic: str = "shared", dtype: torch.dtype = torch.float32, device: str = "cpu",
                trust_remote_code: bool = False) -> Policy:
    """A Policy from a model folder or hub id; also reads the value head that `save_policy` wrote beside it.

    Raises ValueError, in one line, when it cannot be had, is no causal language model, lacks a tokenizer, or
    computes its logits by more than a linear head on `last_hidden_state`.
    """
    try:
        kwargs = dict(trust_remote_code=trust_remote_code)
        check_tokenizer(tokenizer := AutoTokenizer.from_pretrained(name_or_dir, **kwargs))
        lm, info = AutoModelForCausalLM.from_pretrained(name_or_dir, dtype=torch.float32, output_loading_info=True, **kwargs)
        lm = lm.to(device)
    except Exception as error:  # transformers raises a dozen kinds here
        where = "no such folder here, and the hub could not give it; pass a local folder"
        where = "is the folder complete?" if Path(name_or_dir).is_dir() else where
        raise ValueError(f"cannot load {str(name_or_dir)!r} as a causal language model ({where}): {first_line(error)}") from error
    if info["missing_keys"]:  # a classifier or an encoder, say: transformers would make up the rest
        missing = sorted(info["missing_keys"])[0]
        raise ValueError(f"cannot load {str(name_or_dir)!r} as a causal language model: it has no weights for {missing}")
    rows = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"{name_or_dir}: the tokenizer has {len(tokenizer)} tokens but the model only {rows}")
    policy = Policy(lm, tokenizer, critic, dtype)
    _probe_forward(policy)
    critic_file = Path(name_or_dir) / "critic.safetensors"
    if critic_file.exists():
        state = load_file(critic_file, device=str(device))
        if (policy.critic_body is not None) == any(k.startswith("critic_body") for k in state):  # a critic of the same kind
            policy.load_state_dict(state, strict=False)
    return policy


@torch.no_grad()
def _probe_forward(policy):
    """Refuse a model that this project cannot run: its logits must be head(hidden), and it must keep a KV cache."""
    name, probe = policy.lm.config.model_type, torch.tensor([policy.eos_ids[:1] * 2], device=policy.device)
    try:
        same = torch.allclose(policy.head(policy.hidden(probe)), policy.lm(probe).logits, atol=1e-3, rtol=1e-3)
        cached = hasattr(policy.lm.base_model(input_ids=probe, use_cache=True).past_key_values, "batch_select_indices")
    except Exception as error:
        raise ValueError(f"a model of type {name} cannot be run as a policy: {first_line(error)}") from error
    if not same or not cached:
        raise ValueError(f"a policy's logits must be a linear head on its last hidden state, with a KV cache; {name} is different")


def save_policy(policy: Policy, folder: str | Path, card: str = "") -> None:
    """Write a `save_pretrained` folder with tokenizer and model card, and the critic beside it. With LoRA the weights
    are merged ones; the adapter alone is in the folder `adapter`, in peft's format."""
    folder, policy = Path(folder), unsharded(policy)
    if rank():
        return
    plain = merged(policy, "cpu")  # not on the GPU, where there may be no room for it
    plain.lm.save_pretrained(folder)
    save_tokenizer(policy.tokenizer, folder)
    if thin := adapter(policy.lm):
        policy.lm.peft_config["default"].save_pretrained(folder / "adapter")
        thin = {PEFT_PREFIX + k.replace(".default", ""): v.detach().contiguous() for k, v in thin.items()}
        save_file(thin, folder / "adapter" / "adapter_model.safetensors")
    critic = {k: v.contiguous().clone() for k, v in plain.state_dict().items() if not k.startswith("lm.")}
    save_file(critic, folder / "critic.safetensors")
    if card:
        write_text(folder / "README.md", card)


def load_adapter(policy: Policy, folder: str | Path) -> None:
    """Read the adapter that `save_policy` wrote into a policy with LoRA on the base that it was trained on."""
    tensors = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    ours = {k.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    policy.lm.load_state_dict(ours, strict=False)


def save_weights(policy: Policy, file: Path) -> None:
    """All weights in one file, sharded or not; with LoRA those of adapters and value head only, since the base does not change."""
    policy = unsharded(policy)
    if rank():
        return
    if adapter(policy):
        save_file({k: v.contiguous() for k, v in policy.state_dict().items() if ".lora_" in k or "value_head" in k}, file)
    else:
        save_model(policy, str(file))


def load_weights(policy: Policy, file: Path) -> None:
    """What `save_weights` wrote, whatever the number of processes then and now."""
    if adapter(policy):
        policy.load_state_dict(load_file(file), strict=False)
    elif policy.skeleton is None:
        load_model(policy, str(file))
    else:
        twin = blank_copy(policy.skeleton, "meta" if rank() else "cpu")
        if not rank():
            load_model(twin, str(file))
        load_whole(policy.state_dict(), twin.state_dict())
