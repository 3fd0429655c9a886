"""Log-probability and entropy of target tokens under a linear head, in bounded memory for any N.

    z = (hidden @ weight.T + bias) / temperature          (N, V), never whole in memory
    logprob_i = z[i, y_i] - logsumexp(z[i])                H_i = -sum_v p[i, v] log p[i, v]

A language model's head is its largest matrix product, and its logits the largest tensor of a PPO
step: 2048 response tokens of GPT-2 are 412 MB of fp32 logits, and autograd would keep several such
copies. What the backward needs is two numbers per row; with them it can compute the logits again,
a fourth matrix product.

The gradient, with g the incoming gradient of logprob and e that of H:

    d logprob_i / d z[i, v] = [v = y_i] - p[i, v]
    d H_i       / d z[i, v] = -p[i, v] (log p[i, v] + H_i)
    dz = (g * (onehot - p) - e * p * (log p + H)) / temperature
    dhidden = dz @ weight      dweight = dz.T @ hidden      dbias = sum_i dz

The forward needs, of each row, m = max z, s = sum exp(z - m) and t = sum exp(z - m) z: with them
logsumexp = m + log s and H = logsumexp - t / s. They can be had tile by tile (the online softmax of
Milakov and Gimelshein, 2018): two parts of a row, with (m, s, t) and (m', s', t') and M = max(m, m'), make
(M, s e^(m-M) + s' e^(m'-M), t e^(m-M) + t' e^(m'-M)).

Three ways through the same mathematics. `linear_logprob` chooses between the first two by the device:
    Triton (CUDA)   `_forward_kernel` never writes a logit; `_gradient_kernel` writes dz of a chunk of rows, whose
                    two products then run on the vendor's library. No atomics: the same input gives the same bits.
    row chunks      the same with torch, a chunk of rows at a time. The forward keeps the probabilities of the first rows,
                    up to KEEP_BYTES, so that nothing of a PPO minibatch is computed twice (three products).
    whole logits    `linear_logprob_reference`, the plain twin that the tests compare with.
Where the loss is known its gradient could be taken within the forward, chunk by chunk: three products for any N. Tried with
PPO's loss on GPT-2's head and two cores, against what is here: 0 to 8% less time at N = 512 and 2048, where all rows are kept,
24% (fp32) and 15% (bf16) at N = 8192. Minibatches here have some hundred tokens, and so the kernel stays free of any loss.
Under autocast the matrix products run in the autocast dtype; the softmax and the sums stay fp32.
"""

import contextlib

import torch
import torch.nn.functional as F

try:  # comes with the CUDA builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

KEEP_BYTES = 400 * 2**20  # of probabilities that the forward keeps for the backward
CHUNK_BYTES = {"cpu": 100 * 2**20, "cuda": 512 * 2**20}  # of fp32 logits at a time: bounds memory, and stays large enough for a GEMM


def linear_logprob_reference(hidden, weight, targets, bias=None, temperature=1.0, entropy_grad=False):
    """The plain twin of `linear_logprob`: same arguments, same results, holds the (N, V) logits."""
    logits = _upcast(F.linear(hidden, weight, bias)) / temperature  # (N, V)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    logprobs = logp.gather(-1, targets[:, None])[:, 0]  # (N,)
    return logprobs, entropy if entropy_grad else entropy.detach()


def linear_logprob(hidden, weight, targets, bias=None, temperature=1.0, entropy_grad=False):
    """Log-probability of `targets` and entropy of the whole distribution, row by row.

    hidden (N, D); weight (V, D); targets (N,) int64 in [0, V); bias (V,) or None; temperature > 0
    divides the logits. Returns (logprobs (N,), entropy (N,)), both fp32 (fp64 for fp64 input).
    The entropy carries a gradient only with `entropy_grad`.
    Raises ValueError when the shapes do not fit or the temperature is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"linear_logprob needs hidden (N, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.long:
        raise ValueError(f"linear_logprob needs int64 targets ({hidden.shape[0]},), got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprob needs bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"linear_logprob needs temperature > 0, got {temperature}")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    keep = torch.is_grad_enabled() and not entropy_grad
    return LinearLogProb.apply(hidden, weight, targets, bias, temperature, entropy_grad, keep, dtype)


class LinearLogProb(torch.autograd.Function):
    """What is the same for both ways: what is saved, in which dtype, and the two products of the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, entropy_grad, keep, dtype):
        h, w, targets = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous(), targets.contiguous()  # (N, D), (V, D), (N,)
        n_kept = min(len(h), KEEP_BYTES // (len(w) * h.element_size())) if keep and not _use_triton(h) else 0
        ctx.kept = h.new_empty(n_kept, len(w))  # (n_kept, V) the probabilities of the first rows
        if _use_triton(h):
            logprobs, lse, entropy = triton_forward(h, w, targets, bias, temperature)  # (N,) each
        else:
            logprobs, lse, entropy = chunked_forward(h, w, targets, bias, temperature, ctx.kept)
        ctx.save_for_backward(h, w, targets, bias, logprobs, lse, entropy)
        ctx.temperature, ctx.entropy_grad, ctx.dtypes = temperature, entropy_grad, (hidden.dtype, weight.dtype)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        h, w, targets, bias, logprobs, lse, entropy = ctx.saved_tensors
        needs_h, needs_w, _, needs_b = ctx.needs_input_grad[:4]
        e = grad_entropy if ctx.entropy_grad else None
        gradient = triton_gradient if _use_triton(h) else chunked_gradient
        dh = torch.empty_like(h) if needs_h else None  # (N, D)
        dw = None  # (V, D), accumulated in fp32
        db = torch.zeros_like(bias, dtype=lse.dtype) if bias is not None and needs_b else None
        kept, ctx.kept = ctx.kept, h.new_empty(0)  # used up: a second backward computes them again
        n_kept = len(kept)
        for rows in _chunks(h, w, n_kept):
            if rows.stop <= n_kept:
                dz = kept_gradient(kept, targets[rows], ctx.temperature, logprobs[rows], grad_logprob[rows])  # (n, V)
            else:
                e_rows = None if e is None else e[rows]
                dz = gradient(h[rows], w, targets[rows], bias, ctx.temperature, lse[rows], entropy[rows], grad_logprob[rows], e_rows)
            if db is not None:
                db += dz.sum(0)
            dz = dz.to(h.dtype)
            if needs_h:
                dh[rows] = dz @ w
            if needs_w and dw is None:
                dw = _upcast(dz.T @ h[rows])
            elif needs_w and dw.dtype == dz.dtype:
                dw.addmm_(dz.T, h[rows])  # in place: a second (V, D) would cost more than the chunk
            elif needs_w:
                dw += dz.T @ h[rows]
            kept = dz = None  # before the next chunk is made
        dw = torch.zeros_like(w) if needs_w and dw is None else dw  # no rows at all
        dh, dw = (dh.to(ctx.dtypes[0]) if needs_h else None), (dw.to(ctx.dtypes[1]) if needs_w else None)
        return dh, dw, None, (db.to(bias.dtype) if db is not None else None), None, None, None, None


# --- row chunks: torch, in place ------------------------------------------------------------------------------
def chunked_forward(h, w, targets, bias, temperature, kept):
    """h (N, D), w (V, D), targets (N,), bias (V,) or None -> (logprobs, logsumexp, entropy), (N,) each.
    Writes the probabilities of the first rows into kept (n_kept, V)."""
    logprobs, lse, entropy = torch.empty(3, len(h), dtype=_upcast(h[:0]).dtype, device=h.device)
    for rows in _chunks(h, w):
        z = _logits(h[rows], w, bias, temperature)  # (n, V)
        p = z.softmax(-1)
        lse[rows] = z.amax(-1) - p.amax(-1).log()  # the likeliest token has log p = z - logsumexp, and p >= 1 / V
        logprobs[rows] = z.gather(-1, targets[rows, None])[:, 0] - lse[rows]
        entropy[rows] = lse[rows] - z.mul_(p).sum(-1)  # H = logsumexp(z) - E_p[z]
        kept[rows] = p[:len(kept[rows])]
        del z, p  # before the next chunk is made
    return logprobs, lse, entropy


def kept_gradient(p, targets, temperature, logprobs, g):
    """dz (n, V) from the probabilities (n, V), which it overwrites; logprobs and g are (n,). The target's entry is
    written, not added to: 1 - p of a bf16 p near 1 would be nothing but rounding."""
    p.mul_(-(g / temperature)[:, None].to(p.dtype))
    return p.scatter_(1, targets[:, None], (-g * logprobs.expm1() / temperature)[:, None].to(p.dtype))


def chunked_gradient(h, w, targets, bias, temperature, lse, entropy, g, e):
    """dz (n, V) in fp32 of the rows h (n, D); lse, entropy, g and e (or None) are (n,)."""
    logp = _logits(h, w, bias, temperature).sub_(lse[:, None])  # (n, V)
    if e is None:
        dz = logp.exp_().mul_(-g[:, None])
    else:
        dz = -logp.exp() * (g[:, None] + e[:, None] * (logp + entropy[:, None]))
    return dz.scatter_add_(1, targets[:, None], g[:, None]).div_(temperature)


def _upcast(x):
    return x if x.dtype == torch.float64 else x.float()


def _logits(h, w, bias, temperature):
    """(n, D) x (V, D) -> (n, V) scaled logits in fp32."""
    z = _upcast(h @ w.T)
    if bias is not None:
        z += bias
    return z if temperature == 1.0 else z.div_(temperature)


def _chunks(h, w, first=0):
    """Row slices whose fp32 logits fill at most CHUNK_BYTES, after one of the `first` rows. In the forward they
    depend on N, V and the device alone, so that the same rows give the same bits with and without gradients."""
    most = max(1, CHUNK_BYTES[h.device.type] // (4 * len(w)))
    n = -(-(len(h) - first) // most)  # how many
    cuts = [first + (len(h) - first) * i // n for i in range(n + 1)] if n else []
    return [slice(0, first)] * (first > 0) + [slice(a, b) for a, b in zip(cuts, cuts[1:])]


# --- Triton: tile by tile ---------------------------------------------------------------------------------------
def _use_triton(h):
    """Whether the Triton kernels take this (N, D) input."""
    return triton is not None and h.is_cuda and h.dtype != torch.float64


if triton is not None:
    @triton.jit
    def _logits_tile(h, w, bias, rows, columns, N, D, V, inv_temperature, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
        """z[rows, columns] in fp32 of h (N, D) and w (V, D), from rows (n,) and columns (v,); -inf beyond column V."""
        z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        for start in range(0, D, BLOCK_D):
            inner = start + tl.arange(0, BLOCK_D)
            h_tile = tl.load(h + rows[:, None].to(tl.int64) * D + inner, mask=(rows[:, None] < N) & (inner < D), other=0.0)  # (n, d)
            w_tile = tl.load(w + columns[:, None].to(tl.int64) * D + inner, mask=(columns[:, None] < V) & (inner < D), other=0.0)  # (v, d)
            if PRECISION == "interpreted":  # the interpreter has no products of bf16
                h_tile, w_tile = h_tile.to(tl.float32), w_tile.to(tl.float32)
            z = tl.dot(h_tile, w_tile.T, z, input_precision="ieee" if PRECISION == "interpreted" else PRECISION)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
        return tl.where(columns < V, z * inv_temperature, -float("inf"))

    @triton.jit
    def _forward_kernel(h, w, targets, bias, partial, N, D, V, columns_per_split, inv_temperature, HAS_BIAS: tl.constexpr,
                        PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: a block of rows x one split of the vocabulary, tile after tile, into
        partial (4, splits, N): of this split m, s, t (see the header) and the target's logit, 0 where it is not here."""
        rows, split = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
        y = tl.load(targets + rows, mask=rows < N, other=-1)
        m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        s, t, target_logit = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for start in range(split * columns_per_split, tl.minimum((split + 1) * columns_per_split, V), BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            z = _logits_tile(h, w, bias, rows, columns, N, D, V, inv_temperature, HAS_BIAS, PRECISION, BLOCK_D)
            new_m = tl.maximum(m, tl.max(z, 1))
            p = tl.exp(z - new_m[:, None])
            s = s * tl.exp(m - new_m) + tl.sum(p, 1)
            t = t * tl.exp(m - new_m) + tl.sum(p * tl.where(columns < V, z, 0.0), 1)  # never 0 * -inf
            target_logit += tl.sum(tl.where(columns == y[:, None], z, 0.0), 1)
            m = new_m
        at = partial + split * N + rows
        size = tl.num_programs(1) * N
        tl.store(at, m, mask=rows < N)
        tl.store(at + size, s, mask=rows < N)
        tl.store(at + 2 * size, t, mask=rows < N)
        tl.store(at + 3 * size, target_logit, mask=rows < N)

    @triton.jit
    def _gradient_kernel(h, w, targets, bias, lse, entropy, g, e, dz, N, D, V, inv_temperature, HAS_BIAS: tl.constexpr, HAS_E: tl.constexpr,
                         PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: one tile of dz (N, V); lse, entropy, g and e are (N,) fp32."""
        i, j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)  # neighbours share tiles in the cache
        rows, columns = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_V + tl.arange(0, BLOCK_V)
        z = _logits_tile(h, w, bias, rows, columns, N, D, V, inv_temperature, HAS_BIAS, PRECISION, BLOCK_D)
        here = rows < N
        logp = z - tl.load(lse + rows, mask=here, other=0.0)[:, None]
        g_rows = tl.load(g + rows, mask=here, other=0.0)[:, None]
        slope = g_rows
        if HAS_E:
            slope += tl.load(e + rows, mask=here, other=0.0)[:, None] * (logp + tl.load(entropy + rows, mask=here, other=0.0)[:, None])
        is_target = columns == tl.load(targets + rows, mask=here, other=-1)[:, None]
        gradient = (tl.where(is_target, g_rows, 0.0) - tl.exp(logp) * slope) * inv_temperature
        tl.store(dz + rows[:, None].to(tl.int64) * V + columns, gradient.to(dz.dtype.element_ty), mask=here[:, None] & (columns < V))


def _on(h):
    """Triton launches on the current GPU, which need not be the one of the tensors."""
    return torch.cuda.device(h.device) if h.is_cuda else contextlib.nullcontext()


def _blocks(h):
    """(tile sizes, number of warps, precision of the products) for h's dtype."""
    if h.dtype == torch.float32:
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        return dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32, num_warps=4, PRECISION=precision)
    return dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, num_warps=8, PRECISION="ieee" if h.is_cuda else "interpreted")


def triton_forward(h, w, targets, bias, temperature, splits=8):
    """The same as `chunked_forward`; `splits` programs share a row's vocabulary, so that few rows fill the GPU too."""
    (N, D), V, blocks = h.shape, len(w), _blocks(h)
    per_split = triton.cdiv(triton.cdiv(V, splits), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
    splits = triton.cdiv(V, per_split)
    partial = torch.empty(4, splits, N, dtype=torch.float32, device=h.device)
    if N:
        with _on(h):
            _forward_kernel[(triton.cdiv(N, blocks["BLOCK_N"]), splits)](
                h, w, targets, w if bias is None else bias.contiguous(), partial, N, D, V, per_split, 1 / temperature, HAS_BIAS=bias is not None, **blocks)
    m, s, t, target_logit = partial  # (splits, N)
    scale = (m - m.amax(0)).exp()
    s, t = (s * scale).sum(0), (t * scale).sum(0)
    lse = m.amax(0) + s.log()
    return target_logit.sum(0) - lse, lse, lse - t / s


def triton_gradient(h, w, targets, bias, temperature, lse, entropy, g, e):
    """The same as `chunked_gradient`, in h's dtype."""
    (N, D), V, blocks = h.shape, len(w), _blocks(h)
    dz = torch.empty(N, V, dtype=h.dtype, device=h.device)
    with _on(h):
        _gradient_kernel[(triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(V, blocks["BLOCK_V"]))](
            h, w, targets, w if bias is None else bias.contiguous(), lse, entropy, g.contiguous(), lse if e is None else e.contiguous(), dz,
            N, D, V, 1 / temperature, HAS_BIAS=bias is not None, HAS_E=e is not None, **blocks)
    return dz
