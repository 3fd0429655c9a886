"""What large models need and the embedded game does not: several processes, LoRA, gradient checkpointing, a memory plan.

A reader of the algorithm can skip this file: with one process, all weights trained and no checkpointing, each of these
functions hands back what it is given.

Several processes (torchrun). Every process knows the whole exchange: texts, tokens, scores, the history of attacks. What
is shared out is the work: sampling, judging, forward and backward. All draw the same random numbers, so all come to the
same decisions, and the first process writes. Weights are copied to each (DDP) or cut among all (`--shard`: FSDP2).

    torchrun --nproc_per_node=8 train.py [--shard] ...
    python train.py --lora 16 --gradient_checkpointing --attacker DIR --defender DIR
"""

import contextlib
import copy
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from kernel import CHUNK_BYTES, KEEP_BYTES


# --- several processes: who is who -----------------------------------------------------------------------
def rank() -> int:
    """The number of this process; 0 is the first, which writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes() -> None:
    """Under torchrun, meet the other processes. Only the first of them speaks, but a crash of any is shown."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    if rank():
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        sys.stdout = sys.stderr = open(os.devnull, "w")


# --- several processes: sharing out the work -----------------------------------------------------------------
def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor (...) over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def share(rows: torch.Tensor, idle: int) -> torch.Tensor:
    """This process's share of row numbers (n,): every world_size-th, so that of rows sorted by length all get long and
    short ones. All shares are made equally large by the number of an `idle` row: with shards the processes must keep step."""
    return torch.cat([rows, rows.new_full((-len(rows) % world_size(),), idle)])[rank()::world_size()]


def in_shares(work: Callable[[list], list], items: list | range) -> list:
    """work(items), a list with one result an item: each process does its share, all get all results, in order.

    What goes wrong in one process is raised in all, so that none waits for ever. `work` must not itself wait for others.
    """
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


def first_decides(work: Callable[[], object]) -> object:
    """work() as the first process found it; its error is raised in all."""
    return in_shares(lambda _: [None if rank() else work()], range(world_size()))[0]


def shared_judge(judge: Callable) -> Callable:
    """A judge of which each process asks its own copy about its share of the exchanges."""
    ask = lambda pairs: list(judge(*map(list, zip(*pairs))))
    return judge if world_size() == 1 else lambda prompts, responses: in_shares(ask, list(zip(prompts, responses)))


def data_parallel(policy: nn.Module, **kwargs) -> nn.Module:
    """What is called in the policy's place where gradients are to become means over all processes: DDP, or a sharded policy itself."""
    if world_size() == 1 or policy.skeleton is not None:
        return policy
    return DistributedDataParallel(policy, gradient_as_bucket_view=True, **kwargs)


# --- several processes: weights that are cut among them --------------------------------------------------------
def shard(policy: nn.Module, device_type: str) -> nn.Module:
    """Cut a policy's weights (and so its gradients and its optimizer) among all processes, with FSDP2. Each transformer
    block is gathered, in fp32, while it runs. What stays whole is the policy's `skeleton`: its modules, without any weight."""
    object.__setattr__(policy, "skeleton", blank_copy(policy, "meta"))  # not as a submodule
    kwargs = dict(mesh=dist.init_device_mesh(device_type, (world_size(),)), reshard_after_forward=True)
    for block in [m for m in policy.modules() if type(m).__name__ in (policy.lm._no_split_modules or ())]:
        fully_shard(block, **kwargs)
    fully_shard(policy, **kwargs)  # what is left: embeddings, head, critic
    return policy


def blank_copy(policy: nn.Module, device: str) -> nn.Module:
    """A copy of the modules with weights that are not filled in."""
    blank = lambda p: nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
    return copy.deepcopy(policy, {id(p): blank(p) for p in policy.parameters()})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor (...), or all of one of which each process holds a shard; all processes must ask for it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def on_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: tensor (...)} gathered one by one: whole and on the CPU in the first process, {} in the others."""
    found = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in found if not rank()}


def from_first(tensor: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    """The first process's whole tensor (...), cut as `target` is. The others' (None will do) is not looked at."""
    if world_size() == 1:
        return tensor
    if rank():
        tensor = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    tensor = tensor.to(target.device, target.dtype).contiguous()
    if isinstance(target, DTensor):
        return distribute_tensor(tensor, target.device_mesh, target.placements)
    dist.broadcast(tensor, 0)
    return tensor


def load_whole(targets: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """The first process's weights {name: whole tensor (...)} into tensors of the same names, sharded or not."""
    for name, target in targets.items():
        target.detach().copy_(from_first(None if rank() else weights[name], target))


def unsharded(policy: nn.Module) -> nn.Module:
    """A policy as it is, or where it is sharded a whole copy on the CPU (blank but in the first process)."""
    if policy.skeleton is None:
        return policy
    weights = on_first(policy.state_dict())
    twin = blank_copy(policy.skeleton, "meta" if rank() else "cpu")
    if weights:
        twin.load_state_dict(weights)
    return twin


# --- LoRA -----------------------------------------------------------------------------------------------------
def adapter(module: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of LoRA's thin matrices in a module; empty without LoRA."""
    return {name: p for name, p in module.named_parameters() if ".lora_" in name}


def frozen_base(module: nn.Module) -> dict[int, nn.Parameter]:
    """What copies of a module share with it, as a memo for `copy.deepcopy`: with LoRA all that is not its adapter."""
    return {id(p): p for name, p in module.named_parameters() if ".lora_" not in name} if adapter(module) else {}


def add_lora(policy: nn.Module, rank: int, seed: int = 0) -> None:
    """Freeze the language model; beside each of its matrices W but the head, train B A of the given rank (LoRA, Hu et
    al., 2022): W + 2 B A, from B = 0, so that the policy is the base until the first step.

    In bf16 the frozen matrices are kept in bf16: autocast would round them the same way at every forward. A separate
    critic begins anew, as an adapter of its own on the same base. Raises ValueError without the package peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora needs the package peft, which is not installed; pip install peft") from error
    transposed = any(isinstance(module, Conv1D) for module in policy.lm.modules())
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, policy.lm)
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
def merged(module: nn.Module, device: str | None = None) -> nn.Module:
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


def fold_lora(policy: nn.Module, seed: int = 0) -> None:
    """Make what the adapter has learned part of the base, and begin a new one: the base is the KL penalty's anchor."""
    if adapter(policy.lm):
        rank, policy.lm = policy.lm.peft_config["default"].r, merged(policy.lm)
        del policy.lm.peft_config  # else peft would take the new one for a second adapter
        add_lora(policy, rank, seed)


# --- memory: gradient checkpointing, the plan, and what was used -------------------------------------------------
def checkpoint_blocks(policy: nn.Module) -> None:
    """Gradient checkpointing (Chen et al., 2016): of each block keep the input for the backward, and compute the rest again.
    transformers' own switch works in train mode only, in which a policy never is."""
    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"--gradient_checkpointing needs a model of transformers' own blocks, got {policy.lm.config.model_type}")
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def model_size(lm: nn.Module) -> dict[str, int]:
    """What `player_memory` must know of a language model, with or without LoRA: {name: count}. It may be one made under
    `with torch.device("meta")`, which takes no memory however large it is."""
    config, head = lm.config.get_text_config(), lm.get_output_embeddings()
    count = lambda module: sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)
    is_matrix = lambda name, module: isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name and module is not head
    matrices = [module.weight for name, module in lm.named_modules() if is_matrix(name, module)]
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return {
        "parameters": count(lm), "body": count(lm.base_model),
        "matrices": sum(w.numel() for w in matrices), "sides": sum(sum(w.shape) for w in matrices),
        "layers": config.num_hidden_layers, "width": config.hidden_size, "vocabulary": head.out_features,
        "kv_width": kv_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)}


def player_memory(parameters: int, body: int, matrices: int, sides: int, layers: int, width: int, kv_width: int, vocabulary: int,
                  rows: int, prompt_tokens: int, new_tokens: int, sampled_rows: int = 256, bf16: bool = False, lora: int = 0,
                  separate_critic: bool = False, references: int = 1, checkpointing: bool = False, device: str = "cpu",
                  ranks: int = 1) -> dict[str, float]:
    """Bytes that one player takes, {what: bytes}, from numbers alone (`model_size` gives the first eight).

    Exact, and divided among `ranks`: parameters (4 bytes a weight; 2 in LoRA's frozen matrices in bf16), optimizer (AdamW: 8 a
    trained weight), reference (4 a weight that is the policy's own), gradients (4).
    Estimates: activations = tokens of `rows` longest rows x (input + output of every matrix, `sides` numbers) x 4 bytes (2.5 in
    bf16: the residual stream stays fp32), with `checkpointing` a block's input for each block and one block's activations;
    probabilities and two chunks of logits (kernel.py). bf16 copies = 2 a weight that is not kept in bf16. Sampling,
    `sampled_rows` at a time = KV cache, one block's activations of the prompts, three times the next logits.
    """
    size, bodies, thin = 2 if bf16 else 4, 1 + separate_critic, lora * sides
    trained = (bodies * thin if lora else parameters + separate_critic * body) + width + 1  # the last two: the value head
    frozen = matrices * size + (parameters - matrices) * 4 if lora else 0
    token = sides * (2.5 if bf16 else 4)
    token = 4 * layers * width + token / layers if checkpointing else token
    length, logits = prompt_tokens + new_tokens, rows * new_tokens * vocabulary
    kept = 0 if device == "cuda" else min(logits * size, KEEP_BYTES)
    cache = length * 2 * layers * kv_width * size  # of a row: keys and values
    return {
        "parameters": (4 * trained + frozen) / ranks, "optimizer": 8 * trained / ranks,
        "reference": references * 4 * ((thin or parameters) + width + 1) / ranks, "gradients": 4 * trained / ranks,
        "activations": bodies * rows * length * token + kept + 2 * min(4 * logits, CHUNK_BYTES[device]),
        "bf16 copies": bf16 * 2 * (parameters - matrices + thin if lora else parameters),
        "sampling": sampled_rows * (cache + prompt_tokens * sides / layers * size + 3 * 4 * vocabulary)}


def memory_plan(players: dict[str, dict[str, float]], others: dict[str, float]) -> tuple[str, float]:
    """(the plan as a table in MiB, bytes at the largest moment: what all hold, and one player that updates or samples).
    players: {name: `player_memory`}; others: {what: bytes}."""
    each = list(players.values())
    held = sum(others.values()) + sum(p["parameters"] + p["optimizer"] + p["reference"] for p in each)
    most = held + max(p["bf16 copies"] + max(p["gradients"] + p["activations"], p["sampling"]) for p in each)
    rows = [(what, *(p[what] for p in each)) for what in each[0]] + list(others.items()) + [("largest moment", most)]
    lines = [f"{what:<18}" + "".join(f"{n / 2**20:12.1f}" for n in numbers) for what, *numbers in rows]
    return "\n".join(["memory plan, MiB  " + "".join(f"{name:>12}" for name in players), *lines]), most


def peak_memory(device: str | torch.device) -> int:
    """Most bytes that this process has held at a time: of the GPU's memory or, on a CPU, of main memory (0 on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux; its getrusage would count the parent before the fork
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
