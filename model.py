"""Policies and rollouts: a transformers causal language model with a value head, its sampler, its log-probs.

One convention holds in the whole project. A rollout is right-padded: each row is prompt, response, padding.
**Index t always speaks of tokens[:, t]**: logprobs[:, t] is the log-probability of that token given the
tokens before it, values[:, t] the value of the state before it. Both come from the hidden state at t - 1;
`logprobs_and_values` is the one place where that shift happens.

Masks come from lengths, never from token ids, so a pad token that equals EOS is harmless. With padding only
on the right, causal attention alone keeps it out of every real position.
"""

import contextlib
import copy
import ctypes
import functools
import os
import sys
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache
from transformers.activations import NewGELUActivation
from transformers.cache_utils import StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from data import check_tokenizer, first_line, save_tokenizer, write_text
from kernel import linear_logprob

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PEFT_PREFIX = "base_model.model."  # before every name in peft's files
PLAIN_TEMPLATE = "Human: {} AI:"  # for tokenizers without a chat template, as in the authors' code


# --- several processes (torchrun) -----------------------------------------------------------------------
# Every process knows the whole exchange: texts, tokens, scores, the history of attacks. What is shared out is the work: sampling,
# judging, forward and backward. All draw the same random numbers, so all come to the same decisions, and the first one writes.
# With one process each of these functions hands back what it is given.
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes():
    """Under torchrun, meet the other processes. Only the first of them speaks, but a crash of any is shown."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    if rank():
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        sys.stdout = sys.stderr = open(os.devnull, "w")


def all_sum(x):
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def with_idle_row(rollout):
    """A rollout and, where there are several processes, one row more without a response, for `share`."""
    if world_size() == 1:
        return rollout
    filled = rollout.select(torch.arange(len(rollout) + 1).clamp(max=len(rollout) - 1))
    filled.prompt_lengths[-1] = filled.lengths[-1]
    return filled


def share(rows, idle):
    """This process's share of row numbers (n,): every world_size-th, so that of rows sorted by length all get long and short ones.
    All shares are made equally large by the number of an idle row: with shards the processes must keep step."""
    return torch.cat([rows, rows.new_full((-len(rows) % world_size(),), idle)])[rank()::world_size()]


def in_shares(work, items):
    """work(items), a list with one result an item: each process does its share, all get all results, in order.
    What goes wrong in one process is raised in all, so that none waits for ever. `work` must not itself wait for other processes."""
    if world_size() == 1:
        return work(items)
    first, last = (len(items) * r // world_size() for r in (rank(), rank() + 1))
    try:
        results = work(items[first:last]) if last > first else []
    except Exception as error:
        results = error
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, results)
    for results in gathered:
        if isinstance(results, Exception):
            raise results
    return sum(gathered, [])


def first_decides(work):
    """work() as the first process found it; its error is raised in all."""
    return in_shares(lambda _: [None if rank() else work()], range(world_size()))[0]


def shared_judge(judge):
    """A judge of which each process asks its own copy about its share of the exchanges."""
    ask = lambda pairs: list(judge(*map(list, zip(*pairs))))
    return judge if world_size() == 1 else lambda prompts, responses: in_shares(ask, list(zip(prompts, responses)))


def data_parallel(policy, **kwargs):
    """What is called instead of the policy where gradients are to become means over all processes: DDP, or a sharded policy itself."""
    if world_size() == 1 or policy.skeleton is not None:
        return policy
    return DistributedDataParallel(policy, gradient_as_bucket_view=True, **kwargs)


def shard(policy, device_type):
    """Cut a policy's weights (and so its gradients and its optimizer) among all processes, with FSDP2. Each transformer block is
    gathered, in fp32, while it runs. What stays whole is the policy's `skeleton`: its modules, without any weight."""
    object.__setattr__(policy, "skeleton", blank_copy(policy, "meta"))  # not as a submodule
    kwargs = dict(mesh=dist.init_device_mesh(device_type, (world_size(),)), reshard_after_forward=True)
    for block in [m for m in policy.modules() if type(m).__name__ in (policy.lm._no_split_modules or ())]:
        fully_shard(block, **kwargs)
    fully_shard(policy, **kwargs)  # what is left: embeddings, head, critic
    return policy


def blank_copy(policy, device):
    """A copy of the modules with weights that are not filled in."""
    return copy.deepcopy(policy, {id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in policy.parameters()})


def whole(tensor):
    """A tensor, or all of one of which each process holds a shard; all processes must ask for it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def on_first(tensors):
    """{name: tensor} gathered one by one: whole and on the CPU in the first process, {} in the others."""
    found = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in found if not rank()}


def from_first(tensor, target):
    """The first process's whole tensor, cut as `target` is. The others' (None will do) is not looked at."""
    if world_size() == 1:
        return tensor
    tensor = torch.empty(target.shape, dtype=target.dtype, device=target.device) if rank() else tensor.to(target.device, target.dtype).contiguous()
    if isinstance(target, DTensor):
        return distribute_tensor(tensor, target.device_mesh, target.placements)
    dist.broadcast(tensor, 0)
    return tensor


def load_whole(targets, weights):
    """The first process's weights {name: whole tensor} into tensors of the same names, sharded or not."""
    for name, target in targets.items():
        target.detach().copy_(from_first(None if rank() else weights[name], target))


def unsharded(policy):
    """A policy as it is, or where it is sharded a whole copy on the CPU (blank but in the first process)."""
    if policy.skeleton is None:
        return policy
    weights = on_first(policy.state_dict())
    twin = blank_copy(policy.skeleton, "meta" if rank() else "cpu")
    if weights:
        twin.load_state_dict(weights)
    return twin


# --- policies and rollouts ------------------------------------------------------------------------------
class Policy(nn.Module):
    """A causal language model, its tokenizer and its critic.

    critic "shared": the value head reads the policy's own hidden states. critic "separate": it reads a
    body of its own, at first a copy of the policy's. The value head starts at zero (section 2, point 13).
    The module stays in eval mode for ever: dropout would make the PPO ratio differ from 1.
    """

    def __init__(self, lm, tokenizer, critic="shared", dtype=torch.float32):
        super().__init__()
        if critic not in ("shared", "separate"):
            raise ValueError(f"critic must be 'shared' or 'separate', got {critic!r}")
        self.lm, self.tokenizer, self.compute_dtype = lm, tokenizer, dtype
        if dtype != torch.float32 and lm.device.type == "cpu":
            lm.set_attn_implementation("eager")  # for texts of 50 tokens five times faster than the fused backward in bf16; equal at 300
        for module in list(lm.modules()):  # GPT-2's activation in one operation instead of eight
            for name, child in module.named_children():
                if isinstance(child, NewGELUActivation):
                    setattr(module, name, nn.GELU(approximate="tanh"))
        self.critic_body = copy.deepcopy(lm.base_model) if critic == "separate" else None
        self.value_head = nn.Linear(lm.get_output_embeddings().in_features, 1, device=lm.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        eos = lm.generation_config.eos_token_id if lm.generation_config else None
        eos = eos if isinstance(eos, list) else [eos]
        V = lm.get_input_embeddings().num_embeddings
        self.eos_ids = list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *eos] if i is not None and i < V))  # the first is the one to teach
        if not self.eos_ids:
            raise ValueError(f"a policy needs an end-of-sequence token, {lm.config.name_or_path or 'the model'} has none; "
                             "set eos_token in its tokenizer")
        config = lm.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 2**30
        self.skeleton = None  # see `shard`
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @property
    def device(self):
        return self.value_head.weight.device

    @property
    def head(self):
        return self.lm.get_output_embeddings()  # weight (V, D), bias (V,) or None

    def autocast(self):
        """fp32 master weights; matrix products in the compute dtype (section 2, point 9)."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    def hidden(self, tokens, body=None):
        """Last hidden states (B, T, D) of right-padded tokens (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        body = self.lm.base_model if body is None else body
        return body(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state

    def forward(self, rollout, entropy_grad, with_values):
        return _forward(self, rollout, entropy_grad, with_values)  # for `logprobs_and_values`

    def encode(self, prompts):
        """Token ids of each prompt in the model's own chat format, ready to be answered."""
        if self.tokenizer.chat_template:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            rows = self.tokenizer(texts, add_special_tokens=False).input_ids
        else:
            rows = self.tokenizer([PLAIN_TEMPLATE.format(prompt) for prompt in prompts]).input_ids
            rows = [ids[:-1] if ids and ids[-1] in self.eos_ids else ids for ids in rows]  # some tokenizers append EOS
        return [ids or self.eos_ids[:1] for ids in rows]

    def encode_responses(self, responses):
        """Token ids of each response, EOS included."""
        space = "" if self.tokenizer.chat_template else " "
        rows = self.tokenizer([space + response for response in responses], add_special_tokens=False).input_ids
        return [[*ids, self.eos_ids[0]] for ids in rows]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@dataclass
class Rollout:
    """Prompts, what was said to them, and the tokens by which it was said.

    tokens (B, T) int64, right-padded; a row's first `prompt_lengths[b]` tokens are its prompt, the next, up
    to `lengths[b]`, its response with its EOS; `ended` (B,) is True where an EOS was sampled. `temperature`
    (and `support` (B, T, V), True where a top-k / top-p filter left a token possible) are replayed whenever
    log-probs are computed.
    """

    prompts: list
    texts: list
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    temperature: float = 1.0
    support: torch.Tensor | None = None

    def __len__(self):
        return len(self.prompts)

    @property
    def response_mask(self):
        """(B, T) bool, True on response tokens: the sampled actions, first EOS included, nothing after it."""
        t = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (t >= self.prompt_lengths[:, None]) & (t < self.lengths[:, None])

    def select(self, rows):
        """The given rows, trimmed to the longest of them."""
        T = int(self.lengths[rows].max())
        index = rows.tolist()
        return replace(
            self, prompts=[self.prompts[i] for i in index], texts=[self.texts[i] for i in index], tokens=self.tokens[rows, :T],
            prompt_lengths=self.prompt_lengths[rows], lengths=self.lengths[rows], ended=self.ended[rows],
            support=None if self.support is None else self.support[rows, :T])


def pack(policy, prompts, texts, prompt_ids, response_ids, temperature=1.0):
    """A Rollout from lists of token ids; `ended` is read off the responses' last tokens."""
    rows = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [policy.eos_ids[0]] * (T - len(row)) for row in rows], device=policy.device)  # (B, T)
    lengths = [torch.tensor([len(x) for x in ids], device=policy.device) for ids in (prompt_ids, rows)]
    ended = torch.tensor([bool(r) and r[-1] in policy.eos_ids for r in response_ids], device=policy.device)
    return Rollout(list(prompts), list(texts), tokens, *lengths, ended, temperature)


def demonstrations(policy, pairs):
    """A Rollout of given (prompt, response) pairs, for supervised training; rows beyond the context are cut."""
    prompts, texts = zip(*pairs)
    response_ids = [ids[:policy.context // 2] for ids in policy.encode_responses(texts)]
    prompt_ids = [ids[-(policy.context - len(r)):] for ids, r in zip(policy.encode(prompts), response_ids)]
    return pack(policy, prompts, texts, prompt_ids, response_ids)


@torch.no_grad()
def generate(policy, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=None, clip_prompts=False, batch_size=256):
    """Sample one response to each prompt (list of str) with a KV cache; returns a Rollout.

    temperature 0 is greedy. top_k = 0 and top_p = 1 sample the full distribution. The same `seed` gives the
    same tokens. Raises ValueError when a prompt leaves no room for `max_new_tokens` in the model's context
    (with `clip_prompts` its left part is cut off instead) or a number is impossible.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                         f"{max_new_tokens}, {temperature}, {top_k}, {top_p}")
    if not prompts:
        raise ValueError("generate needs at least one prompt, got none")
    room = policy.context - max_new_tokens
    prompt_ids = policy.encode(prompts)
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
    if temperature > 0 and (top_k > 0 or top_p < 1):
        B, T = rollout.tokens.shape
        rollout.support = torch.zeros(B, T, supports[0].shape[-1], dtype=torch.bool, device=policy.device)
        for row, prompt, kept in zip(rollout.support, prompt_ids, supports):
            row[len(prompt):len(prompt) + len(kept)] = kept[:T - len(prompt)]
    return rollout


def cast_once(policy):
    """The language model with its weights in the compute dtype: autocast would cast them again for every token."""
    if policy.compute_dtype == torch.float32 and policy.skeleton is None:
        return policy.lm
    modules, parameters = (policy.skeleton or policy).lm, dict(policy.lm.named_parameters())
    weights = {id(p): nn.Parameter(whole(parameters[name].to(policy.compute_dtype)), requires_grad=False) for name, p in modules.named_parameters()}
    lm = copy.deepcopy(modules, weights)  # a copy of the modules, not of the fp32 weights
    for module in lm.modules():
        if isinstance(module, Conv1D):  # GPT-2's linear layer: a product of few rows is a third faster from the transposed layout
            module.weight.data = module.weight.data.T.contiguous().T
    return lm


def _decode(policy, lm, prompt_ids, max_new_tokens, pick):
    """Sample until every row has ended. `pick` makes tokens (n,) and supports (n, V) or None from logits (n, V).
    Returns ids per row and, with a filter, its (R, V) supports."""
    inputs, mask, positions = left_padded(policy, prompt_ids)  # (B, P) each
    B, eos = len(inputs), torch.tensor(policy.eos_ids, device=policy.device)
    alive = torch.arange(B, device=policy.device)  # the rows that have not ended: the others are decoded no further
    cache, sampled, supports = None, [], []
    for _ in range(max_new_tokens):
        out = lm.base_model(input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token, support = pick(lm.get_output_embeddings()(out.last_hidden_state[:, -1]).float())
        if support is not None:
            supports.append(torch.zeros(B, support.shape[1], dtype=torch.bool, device=policy.device).index_copy(0, alive, support))
        sampled.append(torch.full((B,), -1, device=policy.device).index_copy(0, alive, token))  # -1: after the end
        going = (~torch.isin(token, eos)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(alive):
            alive, token, mask, positions = alive[going], token[going], mask[going], positions[going]
            cache.batch_select_indices(going)
        inputs, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
    return responses_of(sampled, supports)


def _decode_static(policy, lm, prompt_ids, max_new_tokens, pick):
    """What `_decode` does, in shapes that never change: every row goes on until the last has ended, in a cache of full length.
    So a GPU can replay one captured step: launching a small model's kernels one by one takes longer than running them."""
    inputs, mask, positions = left_padded(policy, prompt_ids)  # (B, P) each
    (B, P), eos = inputs.shape, torch.tensor(policy.eos_ids, device=policy.device)
    cache, body = StaticCache(lm.config, max_cache_len=P + max_new_tokens), lm.base_model
    seen = F.pad(mask.bool(), (0, max_new_tokens))[:, None, None, :]  # (B, 1, 1, L), True where there is a token
    own = torch.ones(P, P + max_new_tokens, dtype=torch.bool, device=policy.device)  # a padding sees itself: no softmax over nothing
    bias = lambda may: torch.zeros(may.shape, device=policy.device, dtype=body.dtype).masked_fill(~may, torch.finfo(body.dtype).min)
    hidden = body(input_ids=inputs, attention_mask=bias(seen & own.tril() | own.tril() & own.triu()), position_ids=positions, past_key_values=cache).last_hidden_state
    logits = lm.get_output_embeddings()(hidden[:, -1])  # (B, V)
    token, position, attend = torch.zeros_like(inputs[:, :1]), positions[:, -1:].clone(), bias(seen)  # what a step reads, always in the same place
    step = lambda: lm.get_output_embeddings()(body(input_ids=token, attention_mask=attend, position_ids=position, past_key_values=cache).last_hidden_state[:, -1])
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
            graph, logits = capture(step, cache, P)
        if graph:
            graph.replay()
        else:
            logits = step()
    return responses_of(sampled, supports)


def capture(step, cache, length):
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


def has_static_shapes(lm):
    """Whether a model decodes with a static cache: it says so, and no layer has a window or a state of its own."""
    return lm._can_compile_fullgraph and all(type(layer) is StaticLayer for layer in StaticCache(lm.config, max_cache_len=1).layers)


def left_padded(policy, prompt_ids):
    """Prompts padded on the *left*, so that one column is one step: (tokens, mask with 1 = real, positions), (B, P) each.
    Positions count real tokens only."""
    P = max(map(len, prompt_ids))
    tokens = torch.tensor([[policy.eos_ids[0]] * (P - len(ids)) + ids for ids in prompt_ids], device=policy.device)
    mask = torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=policy.device)
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


def responses_of(sampled, supports):
    """Steps of tokens (B,), -1 after a row's end, and of supports (B, V) -> ids and supports (R, V) per row."""
    responses = [[i for i in row if i >= 0] for row in torch.stack(sampled, 1).tolist()]
    return responses, list(torch.stack(supports, 1)) if supports else []


def pick_token(logits, temperature, top_k, top_p, generator):
    """The next token (B,) from logits (B, V) in fp32 and, with a filter, its support (B, V), else None."""
    if temperature == 0:
        return logits.argmax(-1), None
    logits, support = logits / temperature if temperature != 1 else logits, None
    if top_k > 0 or top_p < 1:
        logits, support = filter_logits(logits, top_k, top_p)
    return draw(logits, generator), support


def draw(logits, generator):
    """One token (B,) from each row of logits (B, V), by inversion: one random number a row, where
    `torch.multinomial` takes V. 1 - rand lies in (0, 1], so a token of probability zero is never drawn. Logits that are not
    finite give the last token, for the same logits are found and named by `ppo_update`."""
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V), its last column 1 up to rounding
    u = (1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)) * cdf[:, -1:]
    return torch.searchsorted(cdf, u)[:, 0].clamp(max=logits.shape[1] - 1)


def filter_logits(logits, top_k, top_p):
    """Top-k, then nucleus (top-p), filter. logits (B, V) -> (logits with -inf outside, support (B, V) bool)."""
    ranked, order = logits.sort(-1, descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k > 0:
        keep[:, top_k:] = False
    if top_p < 1:
        p = ranked.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= p.cumsum(-1) - p < top_p  # a token stays while the mass before it is below top_p
    support = torch.zeros_like(keep).scatter(-1, order, keep)
    return logits.masked_fill(~support, -torch.inf), support


def logprobs_and_values(policy, rollout, entropy_grad=False, with_values=True):
    """Log-probs, values and entropies of the response tokens, from one forward.

    Returns (logprobs, values, entropy), each (B, T) fp32, zero outside `rollout.response_mask`. The head is
    applied to response positions only, never to prompts or padding. values is None without `with_values`.
    """
    return policy(rollout, entropy_grad, with_values)  # a call, so that the hooks of DDP and FSDP run


def _forward(policy, rollout, entropy_grad, with_values):
    mask = rollout.response_mask  # (B, T)
    before = mask[:, 1:]  # (B, T - 1): the state at t - 1 acts tokens[t]
    with policy.autocast():
        hidden = policy.hidden(rollout.tokens[:, :-1])  # (B, T - 1, D); the last token decides nothing
        h, targets = hidden[before], rollout.tokens[mask]  # (N, D), (N,)
        if rollout.support is None:
            logp, entropy = linear_logprob(h, policy.head.weight, targets, policy.head.bias, rollout.temperature, entropy_grad)
        else:  # the filter that sampling applied is applied again
            support = rollout.support[mask]  # (N, V)
            logits = policy.head(h).float() / rollout.temperature
            logp_all = logits.masked_fill(~support, -torch.inf).log_softmax(-1)
            logp = logp_all.gather(-1, targets[:, None])[:, 0]
            entropy = -(logp_all.exp() * logp_all.masked_fill(~support, 0)).sum(-1)
            entropy = entropy if entropy_grad else entropy.detach()
        values = None
        if with_values:
            if policy.critic_body is not None:
                h = policy.hidden(rollout.tokens[:, :-1], policy.critic_body)[before]
            with torch.autocast(policy.device.type, enabled=False):
                values = policy.value_head(h.float())[:, 0]  # (N,)
    spread = lambda x: None if x is None else torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x)
    return spread(logp), spread(values), spread(entropy)


def best_dtype(device):
    """The compute dtype of `--dtype auto`: bf16 where the processor multiplies it natively, else fp32."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory():
    """Ask glibc to keep freed memory for the next tensor. It gives every large block back to the system and maps it
    afresh, page by page: a third of a GPT-2 update on a CPU. The programs call it; it does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def frozen_copy(policy):
    """A copy that no gradient reaches, without a critic: the reference policy of the KL penalty. With LoRA it holds
    an adapter of its own and shares the base."""
    source = policy.skeleton or policy
    body, source.critic_body = source.critic_body, None
    twin = (copy.deepcopy(source, frozen_base(policy.lm)) if source is policy else blank_copy(source, "cpu")).requires_grad_(False)
    source.critic_body = body
    if source is not policy:  # sharded alike: each process copies its own shards
        shard(twin, policy.device.type)
        ours = dict(policy.named_parameters())
        for name, p in twin.named_parameters():
            p.copy_(ours[name].detach())
    return twin


# --- what saves memory: LoRA and gradient checkpointing ---------------------------------------------------------
def adapter(module):
    """{name: parameter} of LoRA's thin matrices in a module; empty without LoRA."""
    return {name: p for name, p in module.named_parameters() if ".lora_" in name}


def frozen_base(module):
    """What copies of a module share with it, as a memo for `copy.deepcopy`: with LoRA all that is not its adapter."""
    return {id(p): p for name, p in module.named_parameters() if ".lora_" not in name} if adapter(module) else {}


def add_lora(policy, rank, seed=0):
    """Freeze the language model; beside each of its matrices W but the head, train B A of the given rank (LoRA, Hu et
    al., 2022): W + 2 B A, from B = 0, so that the policy is the base until the first step. In bf16 the frozen matrices
    are kept in bf16: autocast would round them the same way at every forward. A separate critic begins anew, as
    an adapter of its own on the same base. Raises ValueError without the package peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora needs the package peft, which is not installed; pip install peft") from error
    transposed = any(isinstance(module, Conv1D) for module in policy.lm.modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed, task_type="CAUSAL_LM"), policy.lm)
    for name, p in policy.lm.named_parameters():
        p.requires_grad_(".lora_" in name)
    for module in policy.lm.modules():
        if hasattr(module, "lora_A"):
            weight = module.get_base_layer().weight
            weight.data = weight.data.to(policy.compute_dtype)
            if isinstance(module.get_base_layer(), Conv1D):
                weight.data = weight.data.T.contiguous().T  # the layout of `cast_once`, which then has nothing to copy
    if policy.critic_body is not None:
        policy.critic_body = copy.deepcopy(policy.lm.base_model, frozen_base(policy.lm))
        nn.init.zeros_(policy.value_head.weight)
        nn.init.zeros_(policy.value_head.bias)
    policy.eval()


@torch.no_grad()
def merged(module, device=None):
    """The same function without adapters: each is added, in fp32, to its matrix. All other weights are shared."""
    if not adapter(module):
        return module
    plain = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "lora_A"):
            base = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.to(device, torch.float32) + layer.get_delta_weight("default").to(device))
            plain.set_submodule(name, base)
    return plain


def fold_lora(policy, seed=0):
    """Make what the adapter has learned part of the base, and begin a new one: the base is the KL penalty's anchor."""
    if adapter(policy.lm):
        rank, policy.lm = policy.lm.peft_config["default"].r, merged(policy.lm)
        del policy.lm.peft_config  # else peft would take the new one for a second adapter
        add_lora(policy, rank, seed)


def checkpoint_blocks(policy):
    """Gradient checkpointing: of each block keep the input for the backward, and compute the rest again. transformers'
    own switch works in train mode only, in which a policy never is."""
    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"--gradient_checkpointing needs a model of transformers' own blocks, got {policy.lm.config.model_type}")
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def model_size(lm):
    """What `player_memory` must know of a language model, with or without LoRA. It may be one made under
    `with torch.device("meta")`, which takes no memory however large it is."""
    config, head = lm.config.get_text_config(), lm.get_output_embeddings()
    count = lambda module: sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)
    matrices = [module.weight for name, module in lm.named_modules()
                if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name and module is not head]
    heads = config.num_attention_heads
    kv_width = (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return {"parameters": count(lm), "body": count(lm.base_model), "matrices": sum(w.numel() for w in matrices), "sides": sum(sum(w.shape) for w in matrices),
            "layers": config.num_hidden_layers, "width": config.hidden_size, "kv_width": kv_width, "vocabulary": head.out_features}


# --- saving and loading -------------------------------------------------------------------------------------------


def load_policy(name_or_dir, critic="shared", dtype=torch.float32, device="cpu", trust_remote_code=False):
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
        where = "is the folder complete?" if Path(name_or_dir).is_dir() else "no such folder here, and the hub could not give it; pass a local folder"
        raise ValueError(f"cannot load {str(name_or_dir)!r} as a causal language model ({where}): {first_line(error)}") from error
    if info["missing_keys"]:  # a classifier or an encoder, say: transformers would make up the rest
        raise ValueError(f"cannot load {str(name_or_dir)!r} as a causal language model: it has no weights for {sorted(info['missing_keys'])[0]}")
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        raise ValueError(f"{name_or_dir}: the tokenizer has {len(tokenizer)} tokens but the model only {lm.get_input_embeddings().num_embeddings}")
    policy = Policy(lm, tokenizer, critic, dtype)
    probe_forward(policy)
    critic_file = Path(name_or_dir) / "critic.safetensors"
    if critic_file.exists():
        state = load_file(critic_file, device=str(device))
        if (policy.critic_body is not None) == any(k.startswith("critic_body") for k in state):  # a critic of the same kind
            policy.load_state_dict(state, strict=False)
    return policy


@torch.no_grad()
def probe_forward(policy):
    """Refuse a model that this project cannot run: its logits must be head(hidden), and it must keep a KV cache."""
    name, probe = policy.lm.config.model_type, torch.tensor([policy.eos_ids[:1] * 2], device=policy.device)
    try:
        same = torch.allclose(policy.head(policy.hidden(probe)), policy.lm(probe).logits, atol=1e-3, rtol=1e-3)
        cached = hasattr(policy.lm.base_model(input_ids=probe, use_cache=True).past_key_values, "batch_select_indices")
    except Exception as error:
        raise ValueError(f"a model of type {name} cannot be run as a policy: {first_line(error)}") from error
    if not same or not cached:
        raise ValueError(f"a policy's logits must be a linear head on its last hidden state, with a KV cache; {name} is different")


def save_policy(policy, folder, card=""):
    """Write a `save_pretrained` folder with tokenizer and model card, and the critic beside it. With LoRA the weights
    are merged ones; the adapter alone is in the folder `adapter`, in peft's format."""
    folder, policy = Path(folder), unsharded(policy)
    if rank():
        return
    plain = merged(policy, "cpu")  # not on the GPU, where there may be no room for it
    plain.lm.save_pretrained(folder)
    if policy.tokenizer.is_fast:  # it keeps what its last call was, and where it came from: not the same in a resumed run
        policy.tokenizer.backend_tokenizer.no_padding()
        policy.tokenizer.backend_tokenizer.no_truncation()
    for name in ("is_local", "local_files_only"):
        policy.tokenizer.init_kwargs.pop(name, None)
    save_tokenizer(policy.tokenizer, folder)
    if thin := adapter(policy.lm):
        policy.lm.peft_config["default"].save_pretrained(folder / "adapter")
        save_file({PEFT_PREFIX + k.replace(".default", ""): v.detach().contiguous() for k, v in thin.items()}, folder / "adapter" / "adapter_model.safetensors")
    critic = {k: v for k, v in plain.state_dict().items() if not k.startswith("lm.")}
    save_file({k: v.contiguous().clone() for k, v in critic.items()}, folder / "critic.safetensors")
    if card:
        write_text(folder / "README.md", card)


def load_adapter(policy, folder):
    """Read the adapter that `save_policy` wrote into a policy with LoRA on the base that it was trained on."""
    tensors = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    policy.lm.load_state_dict({k.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): v for k, v in tensors.items()}, strict=False)


def save_weights(policy, file):
    """All weights in one file, sharded or not; with LoRA those of adapters and value head only, since the base does not change."""
    policy = unsharded(policy)
    if rank():
        return
    if not adapter(policy):
        return save_model(policy, str(file))
    save_file({k: v.contiguous() for k, v in policy.state_dict().items() if ".lora_" in k or "value_head" in k}, file)


def load_weights(policy, file):
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
