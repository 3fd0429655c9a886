"""Log-probability and entropy of target tokens under a linear head, in bounded memory for any N.

    z = (hidden @ weight.T + bias) / temperature          (N, V), never all of it in memory
    logprob_i = z[i, y_i] - logsumexp(z[i])                H_i = -sum_v p[i, v] log p[i, v]

The logits are the largest tensor of a PPO step: 2048 response tokens of GPT-2 are 412 MB in fp32, and autograd would
hold several copies. The backward recomputes the logits (a fourth matrix product, beside the forward's and the two
of the gradients) and needs two more numbers per row, logsumexp and H.

The gradient, with g the incoming gradient of logprob and e that of H:

    d logprob_i / d z[i, v] = [v = y_i] - p[i, v]
    d H_i       / d z[i, v] = -p[i, v] (log p[i, v] + H_i)
    dz = (g * (onehot - p) - e * p * (log p + H)) / temperature
    dhidden = dz @ weight      dweight = dz.T @ hidden      dbias = sum_i dz

The forward needs three numbers per row, m = max z, s = sum exp(z - m) and t = sum exp(z - m) z: logsumexp = m + log s
and H = logsumexp - t / s. They can be computed tile by tile (the online softmax of Milakov and Gimelshein, 2018): parts
(m, s, t), (m', s', t') of a row merge, with M = max(m, m'), into (M, s e^(m-M) + s' e^(m'-M), t e^(m-M) + t' e^(m'-M)).

Three implementations. `linear_logprob` chooses between the last two by the device:
    reference       `linear_logprob_reference` in plain PyTorch, with all logits; the tests compare with it.
    row chunks      the same in PyTorch, a chunk of rows at a time. The forward saves the probabilities of the first
                    rows, up to KEEP_BYTES, so that a PPO minibatch computes no logits twice (three matrix products).
    Triton (CUDA)   `forward_kernel` never writes a logit, as in cut cross-entropy (Wijmans et al., 2024);
                    `gradient_kernel` writes dz of a chunk of rows, whose two products then run on the vendor's
                    library. No atomics: the same input gives the same bits.
Under autocast the matrix products run in the autocast dtype; the softmax and the sums stay fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # comes with the CUDA builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

KEEP_BYTES = 400 * 2**20  # of probabilities that the forward saves for the backward
CHUNK_BYTES = {"cpu": 100 * 2**20, "cuda": 512 * 2**20}  # of fp32 logits at a time: small, yet efficient products


# --- the reference implementation -------------------------------------------------------------------------------
def _upcast(x):
    return x if x.dtype == torch.float64 else x.float()


def linear_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
                             temperature: float = 1.0, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """`linear_logprob` in plain PyTorch: same arguments, same results, but it holds the (N, V) logits."""
    logits = _upcast(F.linear(hidden, weight, bias)) / temperature  # (N, V)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    logprobs = logp.gather(-1, targets[:, None])[:, 0]  # (N,)
    return logprobs, entropy if entropy_grad else entropy.detach()


# --- row chunks: torch, in place --------------------------------------------------------------------------------
def _logits(h, w, bias, temperature):
    """(n, D) x (V, D) -> (n, V) scaled logits in fp32."""
    z = _upcast(h @ w.T)
    if bias is not None:
        z += bias
    return z if temperature == 1.0 else z.div_(temperature)


def _chunks(h, w, first=0):
    """Row slices: the `first` rows in one, then chunks whose fp32 logits fill at most CHUNK_BYTES. In the forward they
    depend only on N, V and the device, so that the same rows give the same bits with and without gradients."""
    largest = max(1, CHUNK_BYTES[h.device.type] // (4 * len(w)))  # rows
    chunks = [slice(start, start + largest) for start in range(first, len(h), largest)]
    return [slice(0, first), *chunks] if first else chunks


def _chunked_forward(h, w, targets, bias, temperature, saved_p):
    """h (N, D), w (V, D), targets (N,), bias (V,) or None -> (logprobs, logsumexp, entropy), (N,) each.
    Writes the probabilities of the first S rows into saved_p (S, V)."""
    logprobs, lse, entropy = torch.empty(3, len(h), dtype=_upcast(h[:0]).dtype, device=h.device)
    for rows in _chunks(h, w):
        z = _logits(h[rows], w, bias, temperature)  # (n, V)
        p = z.softmax(-1)
        lse[rows] = z.amax(-1) - p.amax(-1).log()  # log p = z - logsumexp, of the likeliest token: its p is >= 1 / V
        logprobs[rows] = z.gather(-1, targets[rows, None])[:, 0] - lse[rows]
        entropy[rows] = lse[rows] - z.mul_(p).sum(-1)  # H = logsumexp(z) - E_p[z]
        saved_p[rows] = p[:len(saved_p[rows])]  # S <= N: a chunk saves only its rows below S
        del z, p  # before the next chunk is made
    return logprobs, lse, entropy


def _chunked_gradient(h, w, targets, bias, temperature, lse, entropy, g, e):
    """dz (n, V) in fp32 of the rows h (n, D); lse, entropy, g and e (or None) are (n,)."""
    logp = _logits(h, w, bias, temperature).sub_(lse[:, None])  # (n, V)
    if e is None:
        dz = logp.exp_().mul_(-g[:, None])
    else:
        dz = -logp.exp() * (g[:, None] + e[:, None] * (logp + entropy[:, None]))
    return dz.scatter_add_(1, targets[:, None], g[:, None]).div_(temperature)


def _gradient_from_probabilities(p, targets, temperature, logprobs, g):
    """dz (n, V) from the probabilities (n, V), which it overwrites; logprobs and g are (n,). The target's entry is
    computed from its log-prob: 1 - p of a bf16 p near 1 would be only rounding error."""
    p.mul_(-(g / temperature)[:, None].to(p.dtype))
    of_targets = -g * logprobs.expm1() / temperature  # (n,)
    return p.scatter_(1, targets[:, None], of_targets[:, None].to(p.dtype))


# --- Triton: tile by tile ---------------------------------------------------------------------------------------
def use_triton(h):
    return triton is not None and h.is_cuda and h.dtype != torch.float64


if triton is not None:
    @triton.jit
    def _logits_tile(h, w, bias, rows, columns, N, D, V, inv_temperature,
                     HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
        """z[rows, columns] in fp32 of h (N, D) and w (V, D), from rows (n,) and columns (v,); -inf beyond column V."""
        z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        h_rows = h + rows[:, None].to(tl.int64) * D
        w_rows = w + columns[:, None].to(tl.int64) * D
        for start in range(0, D, BLOCK_D):
            inner = start + tl.arange(0, BLOCK_D)
            h_tile = tl.load(h_rows + inner, mask=(rows[:, None] < N) & (inner < D), other=0.0)  # (n, d)
            w_tile = tl.load(w_rows + inner, mask=(columns[:, None] < V) & (inner < D), other=0.0)  # (v, d)
            if PRECISION == "interpreted":  # Triton's interpreter has no bf16 products
                h_tile = h_tile.to(tl.float32)
                w_tile = w_tile.to(tl.float32)
            z = tl.dot(h_tile, w_tile.T, z, input_precision="ieee" if PRECISION == "interpreted" else PRECISION)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
        return tl.where(columns < V, z * inv_temperature, -float("inf"))

    @triton.jit
    def forward_kernel(h, w, targets, bias, partial, N, D, V, columns_per_split, inv_temperature,
                        HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
                        BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: a block of rows x one split of the vocabulary, tile by tile. Writes partial (4, splits, N): m,
        s, t (see the header) of this split, and the target's logit, which is 0 if the target is in another split."""
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        split = tl.program_id(1)
        y = tl.load(targets + rows, mask=rows < N, other=-1)
        m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        t = tl.zeros((BLOCK_N,), tl.float32)
        target_logit = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(split * columns_per_split, tl.minimum((split + 1) * columns_per_split, V), BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            z = _logits_tile(h, w, bias, rows, columns, N, D, V, inv_temperature, HAS_BIAS, PRECISION, BLOCK_D)
            new_m = tl.maximum(m, tl.max(z, 1))
            p = tl.exp(z - new_m[:, None])
            s = s * tl.exp(m - new_m) + tl.sum(p, 1)
            t = t * tl.exp(m - new_m) + tl.sum(p * tl.where(columns < V, z, 0.0), 1)  # never 0 * -inf
            target_logit += tl.sum(tl.where(columns == y[:, None], z, 0.0), 1)
            m = new_m
        out = partial + split * N + rows
        size = tl.num_programs(1) * N
        tl.store(out, m, mask=rows < N)
        tl.store(out + size, s, mask=rows < N)
        tl.store(out + 2 * size, t, mask=rows < N)
        tl.store(out + 3 * size, target_logit, mask=rows < N)

    @triton.jit
    def gradient_kernel(h, w, targets, bias, lse, entropy, g, e, dz, N, D, V, inv_temperature,
                         HAS_BIAS: tl.constexpr, HAS_E: tl.constexpr, PRECISION: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: one tile of dz (N, V), in an order that shares the cache; lse, entropy, g, e are (N,) fp32."""
        i, j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
        rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = j * BLOCK_V + tl.arange(0, BLOCK_V)
        z = _logits_tile(h, w, bias, rows, columns, N, D, V, inv_temperature, HAS_BIAS, PRECISION, BLOCK_D)
        valid = rows < N
        logp = z - tl.load(lse + rows, mask=valid, other=0.0)[:, None]
        g_rows = tl.load(g + rows, mask=valid, other=0.0)[:, None]
        slope = g_rows
        if HAS_E:
            H = tl.load(entropy + rows, mask=valid, other=0.0)[:, None]
            slope += tl.load(e + rows, mask=valid, other=0.0)[:, None] * (logp + H)
        is_target = columns == tl.load(targets + rows, mask=valid, other=-1)[:, None]
        gradient = (tl.where(is_target, g_rows, 0.0) - tl.exp(logp) * slope) * inv_temperature
        out = dz + rows[:, None].to(tl.int64) * V + columns
        tl.store(out, gradient.to(dz.dtype.element_ty), mask=valid[:, None] & (columns < V))


def tile_sizes(h):
    """The kernels' tile sizes, number of warps and precision of the products, by h's dtype."""
    if h.dtype == torch.float32:
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        return dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32, num_warps=4, PRECISION=precision)
    precision = "ieee" if h.is_cuda else "interpreted"
    return dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, num_warps=8, PRECISION=precision)


def triton_forward(h: Tensor, w: Tensor, targets: Tensor, bias: Tensor | None, temperature: float,
                   splits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """h (N, D), w (V, D), targets (N,), bias (V,) or None -> (logprobs, logsumexp, entropy), (N,) fp32 each.
    `splits` programs share a row's vocabulary, so that even a few rows fill the GPU."""
    N, D = h.shape
    V = len(w)
    blocks = tile_sizes(h)
    per_split = triton.cdiv(triton.cdiv(V, splits), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
    splits = triton.cdiv(V, per_split)
    partial = torch.empty(4, splits, N, dtype=torch.float32, device=h.device)
    if N:
        grid = triton.cdiv(N, blocks["BLOCK_N"]), splits
        with torch.cuda.device_of(h):  # Triton launches on the current GPU, which need not be the tensors'
            forward_kernel[grid](h, w, targets, w if bias is None else bias.contiguous(), partial,
                                  N, D, V, per_split, 1 / temperature, HAS_BIAS=bias is not None, **blocks)
    m, s, t, target_logit = partial  # (splits, N)
    scale = (m - m.amax(0)).exp()
    s = (s * scale).sum(0)  # (N,)
    t = (t * scale).sum(0)
    lse = m.amax(0) + s.log()
    return target_logit.sum(0) - lse, lse, lse - t / s


def _triton_gradient(h, w, targets, bias, temperature, lse, entropy, g, e):
    """The same as `_chunked_gradient`, in h's dtype."""
    N, D = h.shape
    V = len(w)
    blocks = tile_sizes(h)
    dz = torch.empty(N, V, dtype=h.dtype, device=h.device)
    grid = triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(V, blocks["BLOCK_V"])
    with torch.cuda.device_of(h):
        gradient_kernel[grid](h, w, targets, w if bias is None else bias.contiguous(), lse, entropy, g.contiguous(),
                               lse if e is None else e.contiguous(), dz, N, D, V, 1 / temperature,
                               HAS_BIAS=bias is not None, HAS_E=e is not None, **blocks)
    return dz


# --- the autograd function of both: what is saved, in which dtype, and the two products of the backward -------------
class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, entropy_grad, keep, dtype):
        h = hidden.to(dtype).contiguous()
        w = weight.to(dtype).contiguous()
        targets = targets.contiguous()
        ctx.temperature = temperature
        ctx.entropy_grad = entropy_grad
        ctx.saved_p = h.new_empty(0, len(w))  # (S, V) probabilities of the first S rows
        if use_triton(h):
            logprobs, lse, entropy = triton_forward(h, w, targets, bias, temperature)  # (N,) each
        else:
            if keep:
                ctx.saved_p = h.new_empty(min(len(h), KEEP_BYTES // (len(w) * h.element_size())), len(w))
            logprobs, lse, entropy = _chunked_forward(h, w, targets, bias, temperature, ctx.saved_p)
        ctx.save_for_backward(h, w, targets, bias, logprobs, lse, entropy)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, e):
        h, w, targets, bias, logprobs, lse, entropy = ctx.saved_tensors
        needs_h, needs_w, _, needs_bias, *_ = ctx.needs_input_grad
        dh = torch.empty_like(h) if needs_h else None  # (N, D)
        dw = torch.zeros_like(w) if needs_w and not len(h) else None  # (V, D): else made by the first chunk, in fp32
        db = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None  # (V,)
        for rows in _chunks(h, w, first=len(ctx.saved_p)):
            dz = _logits_gradient(ctx, rows, g, e if ctx.entropy_grad else None)  # (n, V)
            if needs_bias:
                db += dz.sum(0)
            dz = dz.to(h.dtype)
            if needs_h:
                dh[rows] = dz @ w
            if needs_w:
                dw = _add_product(dw, dz, h[rows])
            del dz  # before the next chunk is made
        return dh, dw, None, db, None, None, None, None  # autograd casts them to the inputs' dtypes


def _logits_gradient(ctx, rows, g, e):
    """dz (n, V) of a chunk of rows, from their saved probabilities or from their recomputed logits."""
    h, w, targets, bias, logprobs, lse, entropy = ctx.saved_tensors
    if rows.stop <= len(ctx.saved_p):
        p = ctx.saved_p
        ctx.saved_p = h.new_empty(0)  # p is overwritten: a second backward recomputes its logits
        return _gradient_from_probabilities(p, targets[rows], ctx.temperature, logprobs[rows], g[rows])
    gradient = _triton_gradient if use_triton(h) else _chunked_gradient
    e = None if e is None else e[rows]
    return gradient(h[rows], w, targets[rows], bias, ctx.temperature, lse[rows], entropy[rows], g[rows], e)


def _add_product(total, dz, h):
    """total + dz.T @ h, (V, D) in fp32, in place; for fp32 without a second (V, D), which would be larger than dz."""
    if total is None:
        return _upcast(dz.T @ h)
    return total.addmm_(dz.T, h) if total.dtype == dz.dtype else total.add_(dz.T @ h)


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
                   temperature: float = 1.0, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy of the full distribution, per row, in nats (see the header).

    hidden (N, D); weight (V, D); targets (N,) int64 in [0, V); bias (V,) or None; temperature > 0 divides the logits.
    Returns (logprobs (N,), entropy (N,)), both fp32 (fp64 for fp64 input). The entropy carries a gradient only with
    `entropy_grad`. Raises ValueError if the shapes do not fit or the temperature is not positive.
    """
    h, w, y = (tuple(x.shape) for x in (hidden, weight, targets))
    if len(h) != 2 or len(w) != 2 or h[1] != w[1]:
        raise ValueError(f"linear_logprob needs hidden (N, D) and weight (V, D), got {h} and {w}")
    if y != h[:1] or targets.dtype != torch.long:
        raise ValueError(f"linear_logprob needs int64 targets ({h[0]},), got {targets.dtype} {y}")
    if bias is not None and bias.shape != w[:1]:
        raise ValueError(f"linear_logprob needs bias ({w[0]},), got {tuple(bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"linear_logprob needs temperature > 0, got {temperature}")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    keep = torch.is_grad_enabled() and not entropy_grad  # read here: inside an autograd function it is always False
    return _LinearLogProb.apply(hidden, weight, targets, bias, temperature, entropy_grad, keep, dtype)
