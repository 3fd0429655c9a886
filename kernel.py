"""Log-probability and entropy of target tokens under a linear head, without the (N, V) logits.

    z = (hidden @ weight.T + bias) / temperature          (N, V), never held whole
    logprob_i = z[i, y_i] - logsumexp(z[i])                H_i = -sum_v p[i, v] log p[i, v]

A language model's head is its largest matrix product, and its logits the largest tensor of a PPO
step: 2048 response tokens of GPT-2 are 412 MB of fp32 logits, and autograd would keep several such
copies. Here rows go through in chunks of about 64 MiB, only the two numbers per row that the
backward needs are kept, and the backward computes each chunk's logits again (four matrix products
instead of three; the memory is one chunk).

The gradient, with g the incoming gradient of logprob and e that of H:

    d logprob_i / d z[i, v] = [v = y_i] - p[i, v]
    d H_i       / d z[i, v] = -p[i, v] (log p[i, v] + H_i)
    dz = (g * (onehot - p) - e * p * (log p + H)) / temperature
    dhidden = dz @ weight      dweight = dz.T @ hidden      dbias = sum_i dz

`linear_logprob` is what the rest of the project calls; `linear_logprob_reference` is its plain twin.
Under autocast the matrix products run in the autocast dtype; the softmax and the sums stay fp32.
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 64 * 2**20  # of fp32 logits at a time: bounds memory, and stays large enough for a GEMM


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
    return ChunkedLogProb.apply(hidden, weight, targets, bias, temperature, entropy_grad, dtype)


class ChunkedLogProb(torch.autograd.Function):
    """Row-chunked forward, recomputing backward; see the module's header for the mathematics."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, entropy_grad, dtype):
        h, w = hidden.to(dtype), weight.to(dtype)  # (N, D), (V, D)
        out = torch.float64 if dtype == torch.float64 else torch.float32
        logprobs, entropy, lse = (torch.empty(len(h), dtype=out, device=h.device) for _ in range(3))
        for rows in _chunks(h, w):
            z = _logits(h[rows], w, bias, temperature)  # (n, V)
            lse[rows] = z.logsumexp(-1)
            logprobs[rows] = z.gather(-1, targets[rows, None])[:, 0] - lse[rows]
            p = (z - lse[rows, None]).exp_()
            entropy[rows] = lse[rows] - p.mul_(z).sum(-1)  # H = logsumexp(z) - E_p[z]
        ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy)
        ctx.temperature, ctx.dtype = temperature, dtype
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, bias, lse, entropy = ctx.saved_tensors
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        needs_h, needs_w, _, needs_b = ctx.needs_input_grad[:4]
        dh = torch.empty_like(h) if needs_h else None  # (N, D)
        dw = None  # (V, D), accumulated in fp32
        db = torch.zeros_like(bias, dtype=lse.dtype) if bias is not None and needs_b else None
        for rows in _chunks(h, w):
            g = grad_logprob[rows, None]
            logp = _logits(h[rows], w, bias, ctx.temperature).sub_(lse[rows, None])  # (n, V)
            if grad_entropy is None or not grad_entropy[rows].any():
                dz = logp.exp_().mul_(-g)
            else:
                dz = -logp.exp() * (g + grad_entropy[rows, None] * (logp + entropy[rows, None]))
            dz.scatter_add_(1, targets[rows, None], g).div_(ctx.temperature)
            dz_low = dz.to(ctx.dtype)
            if needs_h:
                dh[rows] = dz_low @ w
            if needs_w and dw is None:
                dw = _upcast(dz_low.T @ h[rows])
            elif needs_w and dw.dtype == dz_low.dtype:
                dw.addmm_(dz_low.T, h[rows])  # in place: a second (V, D) would cost more than the chunk
            elif needs_w:
                dw += dz_low.T @ h[rows]
            if db is not None:
                db += dz.sum(0)
        dw = torch.zeros_like(weight) if needs_w and dw is None else dw  # no rows at all
        dh, dw = (dh.to(hidden.dtype) if needs_h else None), (dw.to(weight.dtype) if needs_w else None)
        return dh, dw, None, (db.to(bias.dtype) if db is not None else None), None, None, None


def _upcast(x):
    return x if x.dtype == torch.float64 else x.float()


def _logits(h, w, bias, temperature):
    """(n, D) x (V, D) -> (n, V) scaled logits in fp32."""
    z = _upcast(h @ w.T)
    if bias is not None:
        z += bias
    return z if temperature == 1.0 else z.div_(temperature)


def _chunks(h, w):
    """Row slices whose fp32 logits fill at most CHUNK_BYTES. They depend on N and V alone, so that
    the same rows give the same bits with and without gradients."""
    step = max(1, CHUNK_BYTES // (4 * len(w)))
    return [slice(i, min(i + step, len(h))) for i in range(0, len(h), step)]
