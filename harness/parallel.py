"""What large models need and the embedded game does not: several processes, sharded weights, LoRA, gradient
checkpointing. Without these options, a reader can skip this file.

Several processes (torchrun). Every process holds all exchanges: texts, tokens, scores, the history of attacks. The
work is divided: sampling, judging, forward and backward. All use the same random numbers, so all make the same
decisions; only the first process writes. Weights are copied to each process, or sharded (`--shard`: FSDP2).

    torchrun --nproc_per_node=8 -- train.py [--shard] ...
    python train.py --lora 16 --gradient_checkpointing --attacker DIR --defender DIR
"""

import contextlib
import copy
import functools
import os
import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from gpo import load_weights, my_rows, rank, trained_names, weights, world_size
from harness.data import fail, read_json
from model import Policy, first_line, load_policy, save_policy
from reward import Judge, JudgeError

PEFT_PREFIX = "base_model.model."  # before every name in peft's files


# --- several processes -------------------------------------------------------------------------------------
def join_processes() -> None:
    """Under torchrun, join the other processes. Only the first of them prints, but an error of any is shown, once the
    options are read."""
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes == "1":
        return
    if not os.environ.get("RANK"):
        print(f"WORLD_SIZE={processes} without RANK is ignored: torchrun starts several processes", file=sys.stderr)
        return
    cuda = torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    except (ValueError, KeyError, RuntimeError) as error:
        fail(f"several processes need what torchrun sets, with at most one process a GPU: {type(error).__name__}: "
             f"{first_line(error)}; without torchrun unset WORLD_SIZE and RANK")
    if rank():
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def let_speak() -> None:
    """Let this process tell of its own error, though it is not the first. If the first has the same one, torchrun ends
    this process before, without a word."""
    if rank():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(2)
        sys.stderr = sys.__stderr__


def _sendable(error):
    """An error for all processes: itself or, if it would end them silently or cannot be pickled, what it says."""
    try:
        if isinstance(error, Exception) and pickle.loads(pickle.dumps(error)):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {first_line(error)}")


def gather_results(work: Callable[[], object]) -> list:
    """The results of work() in all processes, for each of them. An error in one is raised in all, against deadlocks."""
    if world_size() == 1:
        return [work()]
    try:
        result = work()
    except (Exception, SystemExit) as error:
        result = _sendable(error)
    results = [None] * world_size()
    dist.all_gather_object(results, result)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def first_decides(work: Callable[[], object]) -> object:
    """The result of work() in the first process, for all processes; the others do not call it."""
    return gather_results(lambda: None if rank() else work())[0]


def shared_judge(judge: Judge) -> Judge:
    """A judge that divides the work: each process asks its own copy about its own rows of the exchanges."""
    if world_size() == 1:
        return judge

    def my_part(prompts, responses):
        if not prompts:
            return []
        answers = judge(prompts, responses)
        return answers.tolist() if isinstance(answers, torch.Tensor) else list(answers)

    def ask(prompts, responses):
        scores = [None] * len(prompts)
        parts = gather_results(lambda: my_part(my_rows(prompts), my_rows(responses)))
        for process, part in enumerate(parts):
            rows = range(process, len(prompts), world_size())
            if len(part) != len(rows):
                raise JudgeError(f"a judge must return one score per exchange: {len(rows)} expected, got {len(part)}")
            scores[process :: world_size()] = part
        return scores

    return ask


def broadcast_weights(module: nn.Module) -> None:
    """Copy the first process's weights to all: each has trained the module, and the last bits may differ."""
    if world_size() > 1:
        for p in module.parameters():
            dist.broadcast(p.detach(), 0)


def shard(policy: Policy) -> None:
    """Shard a policy's weights, and so its gradients and optimizer state, over all processes with FSDP2. Each
    transformer block is gathered, in fp32, while it runs. `policy.skeleton` keeps the modules without weights."""
    blank = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in policy.lm.parameters()}
    object.__setattr__(policy, "skeleton", copy.deepcopy(policy.lm, blank))  # not as a submodule
    mesh = dist.init_device_mesh(policy.device.type, (world_size(),))
    blocks = [m for m in policy.modules() if type(m).__name__ in (policy.lm._no_split_modules or ())]
    for module in (*blocks, policy):  # the last: embeddings, head, critic
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # gradients are sums over processes: see gpo.py
        module.set_force_sum_reduction_for_comms(True)


# --- LoRA -----------------------------------------------------------------------------------------------------
def add_lora(policy: Policy, lora_rank: int, seed: int = 0) -> None:
    """Freeze the language model; beside the matrix W of each linear layer except the head, train B A of the given rank
    (LoRA, Hu et al., 2022): W + 2 B A, initially with B = 0, so that the untrained policy equals the base.

    In bf16 the frozen matrices are stored in bf16: autocast would round them the same way in every forward. A separate
    critic is reset to an adapter of its own on the same base. Raises ValueError without the package peft, and if
    peft adapts a module that is no plain linear layer, such as the router of a mixture of experts.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora needs the package peft, which is not installed; pip install peft") from error
    transposed = any(isinstance(module, Conv1D) for module in policy.lm.modules())
    settings = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear",
                          fan_in_fan_out=transposed, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, policy.lm)
    for name, p in policy.lm.named_parameters():
        p.requires_grad_(".lora_" in name)
    for name, layer in _lora_layers(policy.lm).items():
        base = layer.get_base_layer()
        if type(base) not in (nn.Linear, Conv1D):  # as a router, whose own forward would not call the adapter
            raise ValueError(f"--lora adapts linear layers, but {name} is a {type(base).__name__}; leave it out, or "
                             "take another model")
        base.weight.data = base.weight.data.to(policy.compute_dtype)
        if isinstance(base, Conv1D):
            base.weight.data = base.weight.data.T.contiguous().T  # the layout that `decoding_copy` prefers
    if policy.critic_body is not None:
        shared = {id(p): p for p in policy.lm.parameters() if not p.requires_grad}
        policy.critic_body = copy.deepcopy(policy.lm.base_model, shared)
        policy.new_critic()
    policy.eval()


def _lora_layers(module):
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


def sharing_base(policy: Policy) -> Policy:
    """A second player's policy: a copy of the trained weights on the same base."""
    return copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad})


@torch.no_grad()
def merged(module: nn.Module, with_adapters: bool = True) -> nn.Module:
    """The same module without adapters: each is added, in fp32 and on the CPU, to its matrix, and all other weights are
    shared. If not with_adapters: the base alone."""
    if not _lora_layers(module):
        return module
    plain = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for name, layer in _lora_layers(plain).items():
        base = layer.get_base_layer()
        weight = base.weight.to("cpu", torch.float32)
        if with_adapters:
            weight = weight + layer.get_delta_weight("default").to("cpu")
        base.weight = nn.Parameter(weight)
        plain.set_submodule(name, base)
    return plain


def save_adapter(policy: Policy, folder: Path, base: str | None = None) -> None:
    """Save the adapter of a policy with LoRA in peft's format; do nothing without LoRA. base: the folder of its base,
    relative to `folder`."""
    if _lora_layers(policy.lm) and not rank():
        settings = policy.lm.peft_config["default"]
        settings.base_model_name_or_path = base
        settings.target_modules = sorted(settings.target_modules)  # a set, which has another order in each process
        settings.save_pretrained(folder)
        tensors = {PEFT_PREFIX + name.replace(".default", ""): tensor.contiguous()
                   for name, tensor in weights(policy.lm, trained_names(policy.lm)).items()}
        save_file(tensors, folder / "adapter_model.safetensors")


def load_adapter(policy: Policy, folder: Path) -> None:
    """Load what `save_adapter` wrote. The critic begins anew."""
    tensors = load_file(folder / "adapter_model.safetensors")
    load_weights(policy.lm, {name.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): tensor
                             for name, tensor in tensors.items()})
    policy.new_critic()


def save_start(policies: dict[str, Policy], folder: Path) -> None:
    """Save the initial policies of a game, each in a folder of its name. With LoRA the folder holds the adapter, and
    each base is saved once, beside its adapters."""
    bases = {}  # {identity of a base: its folder's name}
    for name, policy in policies.items():
        if not _lora_layers(policy.lm):
            save_policy(policy, folder / name)
            continue
        base = bases.setdefault(id(policy.head.weight), f"{name}_base")
        if base == f"{name}_base":
            save_policy(merged(policy, with_adapters=False), folder / base)
        save_adapter(policy, folder / name, f"../{base}")


def base_in_start(folder: Path, lora_rank: int) -> Path:
    """The folder of the base of an adapter of this rank that `save_start` wrote to `folder`; else `folder` itself."""
    file = folder / "adapter_config.json"
    settings = read_json(file) if file.is_file() else {}
    if lora_rank and settings.get("r") == lora_rank:
        return (folder / settings["base_model_name_or_path"]).resolve()
    return folder


def load_trained(policy: Policy, folder: Path, trust_remote_code: bool) -> None:
    """Load what a run has trained: the adapter in folder/adapter or, without LoRA, the model in `folder`. The critic
    begins anew."""
    if _lora_layers(policy.lm):
        load_adapter(policy, folder / "adapter")
    else:
        source = load_policy(folder, "shared", policy.compute_dtype, str(policy.device), trust_remote_code)
        policy.lm.load_state_dict(source.lm.state_dict())
        policy.new_critic()


# --- memory ----------------------------------------------------------------------------------------------------
def checkpoint_blocks(policy: Policy) -> None:
    """Gradient checkpointing (Chen et al., 2016): keep only each block's input for the backward; recompute the rest.
    transformers' switch needs train mode, which a policy never enters. Raises ValueError if there is no such block."""
    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError("--gradient_checkpointing needs a model of transformers' own blocks, got "
                         f"{policy.lm.config.model_type}; leave it out")
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def peak_memory(device: str | torch.device) -> int:
    """Peak memory of this process in bytes: of the GPU, else main memory (0 on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, TypeError):  # Linux but gVisor; its getrusage would count the forking parent
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(ImportError):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0
