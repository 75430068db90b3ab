"""
The arithmetic: attention of queries over one shard's keys and the merge of several shards, rotary
embedding, and rounding to 8 or 4 bits.

Nothing here knows of processes or models. Everywhere the sequence is dimension 1: q, k, v and out
are (B, T, H, hd), lse is (B, T, H); only the wrappers of PyTorch's attention kernels transpose.
"""
import functools
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

aten = torch.ops.aten


def accumulation_dtype(dtype):
    """float32 at least: bf16 sums over many shards lose small terms; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


# -----------------------------------------------------------------------------
# torch.compile, for what repeats

_compiling = False


def compile_fused(on):
    """From now on `fused` functions go through torch.compile, or (False) run as they are."""
    global _compiling
    _compiling = on


def fused(f):
    """
    Decorator: where `compile_fused` is on, f, a function or a method, runs under torch.compile,
    with all that it calls. A method is compiled once for all objects, such as layers.
    """
    @functools.cache
    def compiled():
        torch._dynamo.config.recompile_limit = 64  # several lengths, with grad and without
        return torch.compile(f, fullgraph=True, dynamic=False)

    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        if _compiling and not torch.compiler.is_compiling():  # else traced by a caller, or off
            return compiled()(*args, **kwargs)
        return f(*args, **kwargs)
    return wrapper


# -----------------------------------------------------------------------------
# One attention kernel: queries against keys, with the log-sum-exp by which blocks are merged.
# Each is a pair, in PyTorch's own layout (B, H, T, hd),
#     forward (q, k, v, causal) -> out, lse (B, H, T)
#     backward(dout, q, k, v, out, lse, causal) -> dq, dk, dv
# where out and lse in `backward` are those of the *whole* softmax, over all shards: the
# probabilities exp(q k - lse) are then the global ones, so the shards' gradients simply add up.

def _cpu_forward(q, k, v, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _cpu_backward(dout, q, k, v, out, lse, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal)


def _cudnn_forward(q, k, v, causal):
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse.view(q.shape[:3])  # the operator returns (B, H, T, 1)


def _cudnn_backward(dout, q, k, v, out, lse, causal):
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)  # its seed and offset
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), no_dropout, no_dropout, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal)


def _flash_forward(q, k, v, causal):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _flash_backward(dout, q, k, v, out, lse, causal):
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal,
        no_dropout, no_dropout)


def _math_scores(q, k, causal):
    s = (q @ k.mT).to(accumulation_dtype(q.dtype)) * q.shape[-1] ** -0.5  # (B, H, Tq, Tk)
    if causal:
        future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(future, float('-inf'))
    return s


def _math_forward(q, k, v, causal):
    s = _math_scores(q, k, causal)
    lse = torch.logsumexp(s, dim=-1)  # (B, H, Tq)
    return torch.exp(s - lse.unsqueeze(-1)).to(v.dtype) @ v, lse


def _math_backward(dout, q, k, v, out, lse, causal):
    p = torch.exp(_math_scores(q, k, causal) - lse.unsqueeze(-1))  # (B, H, Tq, Tk)
    delta = (dout * out).to(p.dtype).sum(-1, keepdim=True)  # (B, H, Tq, 1)
    ds = p * ((dout @ v.mT).to(p.dtype) - delta) * q.shape[-1] ** -0.5
    p, ds = p.to(q.dtype), ds.to(q.dtype)
    return ds @ k, ds.mT @ q, p.mT @ dout


BACKENDS = {'cudnn': (_cudnn_forward, _cudnn_backward), 'cpu': (_cpu_forward, _cpu_backward),
            'flash': (_flash_forward, _flash_backward), 'math': (_math_forward, _math_backward)}


@functools.cache
def attention_backend(device_type, dtype, head_dim):
    """
    Name of the fastest attention kernel this device runs, found by trying: 'cudnn' or 'flash' on
    CUDA in bf16, 'cpu' (PyTorch's flash attention for CPUs), else 'math', which holds all scores.
    """
    if device_type == 'cpu':
        return 'cpu'
    if device_type == 'cuda' and dtype == torch.bfloat16:
        q = torch.zeros(1, 1, 128, head_dim, dtype=dtype, device='cuda')
        for name in ('cudnn', 'flash'):
            forward, backward = BACKENDS[name]
            try:
                backward(q, q, q, q, *forward(q, q, q, True), True)
                return name
            except RuntimeError:  # this head size, chip or build has no such kernel
                continue
    return 'math'


def attention_forward(q, k, v, causal, backend):
    """
    Softmax attention of q over one set of keys, scaled by 1/sqrt(hd).

    q: (B, Tq, H, hd); k, v: (B, Tk, Hkv, hd), where Hkv divides H (grouped-query attention).
    causal: query t sees keys 0..t (needs Tq == Tk).
    Returns out (B, Tq, H, hd) in q's dtype and lse (B, Tq, H), the log of each softmax denominator,
    float32 at least.
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1 and backend != 'cpu':  # the CPU's kernel takes grouped heads as they are
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    out, lse = BACKENDS[backend][0](*(t.transpose(1, 2) for t in (q, k, v)), causal)
    return out.transpose(1, 2), lse.transpose(1, 2).to(accumulation_dtype(q.dtype))


def attention_backward(dout, q, k, v, out, lse, causal, backend):
    """
    Gradients of `attention_forward` for one set of keys out of a larger softmax.

    out (B, Tq, H, hd) and lse (B, Tq, H) are those after merging *all* keys that the queries see.
    Returns these keys' share of dq (B, Tq, H, hd), these queries' of dk and dv (B, Tk, Hkv, hd).
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1 and backend != 'cpu':
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    dout, q, k, v, out, lse = (t.transpose(1, 2) for t in (dout, q, k, v, out, lse))
    grads = BACKENDS[backend][1](dout, q, k, v, out, lse.contiguous(), causal)
    dq, dk, dv = (t.transpose(1, 2) for t in grads)
    if groups > 1 and backend != 'cpu':
        dk, dv = (t.unflatten(2, (-1, groups)).sum(3) for t in (dk, dv))
    return dq, dk, dv


# -----------------------------------------------------------------------------
# Attention over a shard's keys and values: several kernels on views of the same tensors

class Call(NamedTuple):
    """
    One attention kernel: queries and keys are cut into so many equal pieces, each a sequence of its
    own, in which the tokens `queries` attend to the tokens `keys`.
    """
    pieces: int
    queries: slice
    keys: slice
    causal: bool


def cut(x, pieces, part):
    """Of each of so many pieces of x (B, T, ...) the tokens `part`: a view (B * pieces, n, ...)."""
    return x.view(x.shape[0] * pieces, -1, *x.shape[2:])[:, part]


def merge(out, lse, other_out, other_lse):
    """
    Two attentions of the same queries over disjoint keys become the attention over all of them, in
    place of the first: out (B, T, H, hd), lse (B, T, H). The second's share of the softmax is
    e^b / (e^a + e^b) = sigmoid(b - a), which cannot overflow (as in ring-flash-attention).
    """
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    out.lerp_(other_out.to(out.dtype), share)
    lse.copy_(torch.logaddexp(lse, other_lse))


@fused
def merge_all(out, lse, parts, calls):
    """Merge the (out, lse) of every call, in float32 at least."""
    for (part, part_lse), c in zip(parts, calls):
        out, lse = out.to(lse.dtype).contiguous(), lse.contiguous()
        merge(cut(out, c.pieces, c.queries), cut(lse, c.pieces, c.queries), part, part_lse)
    return out, lse


def add_part(total, part, pieces, where, shape):
    """
    Add `part`, a gradient of what `cut(x, pieces, where)` shows of a tensor x of this shape, to the
    gradient of x so far, total (None: nothing). -> float32 at least; a part that is all of x stays.
    """
    if total is None and part.numel() == shape.numel():
        return part.reshape(shape)
    dtype = accumulation_dtype(part.dtype)
    total = part.new_zeros(shape, dtype=dtype) if total is None else total.to(dtype).contiguous()
    cut(total, pieces, where).add_(part)
    return total


@fused
def add_gradients(dq, grads, calls, q, k):
    """-> dq plus that of every call, and the calls' dk and dv (B, S, Hkv, hd) added up."""
    dk = dv = None
    for (dq_part, dk_part, dv_part), c in zip(grads, calls):
        dq = add_part(dq, dq_part, c.pieces, c.queries, q.shape)
        dk = add_part(dk, dk_part, c.pieces, c.keys, k.shape)
        dv = add_part(dv, dv_part, c.pieces, c.keys, k.shape)
    return dq, dk.to(k.dtype), dv.to(k.dtype)


def shard_forward(q, k, v, calls, out=None, lse=None):
    """
    Attention of q over one shard's keys: every call, merged with what earlier shards have left in
    out and lse. Without those it is the first shard, and its first call covers every query.

    q: (B, T, H, hd), k, v: (B, S, Hkv, hd), contiguous in B and T. Returns out (B, T, H, hd) and
    lse (B, T, H), float32 at least; after one call alone out has q's dtype.
    """
    backend = attention_backend(q.device.type, q.dtype, q.shape[-1])
    parts = [attention_forward(cut(q, c.pieces, c.queries), cut(k, c.pieces, c.keys),
                               cut(v, c.pieces, c.keys), c.causal, backend) for c in calls]
    if out is None:
        (out, lse), parts, calls = parts[0], parts[1:], calls[1:]
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    return merge_all(out, lse, parts, calls) if calls else (out, lse)


def shard_backward(dout, q, k, v, out, lse, calls, dq=None):
    """
    Gradients of attention over one shard's keys. out, lse: those after *all* shards. dq: the sum
    over earlier shards, or None. Returns dq with this shard's share, and dk, dv (B, S, Hkv, hd).
    """
    grads, backend = [], attention_backend(q.device.type, q.dtype, q.shape[-1])
    for c in calls:
        dout_, q_, out_, lse_ = (cut(t, c.pieces, c.queries) for t in (dout, q, out, lse))
        k_, v_ = (cut(t, c.pieces, c.keys) for t in (k, v))
        grads.append(attention_backward(dout_, q_, k_, v_, out_, lse_, c.causal, backend))
    return add_gradients(dq, grads, calls, q, k)


# -----------------------------------------------------------------------------
# What happens to keys and values around the wire

def rope_angles(positions, head_dim, base):
    """
    Of global positions (T,) cos and sin of every pair for `rope`: (T, 2, hd), float32, of angles in
    float64. Stored for both halves of a head, the sine with its signs.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    return _cos_and_sin(positions, base ** (-pair / head_dim))


@fused
def _cos_and_sin(positions, frequencies):
    turns = torch.outer(positions.double(), frequencies / (2 * math.pi))  # (T, hd/2)
    # reduced to half a turn it fits float32, whose cosine is far cheaper than float64's
    angle = ((turns - turns.round()) * (2 * math.pi)).float()
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)


@fused
def rope(x, angles):
    """
    Rotary position embedding (Su et al. 2021; entry i is paired with i + hd/2, as in LLaMA).

    x: (B, T, H, hd); angles: (T, 2, hd), `rope_angles` of its positions. -> x's dtype.
    """
    y = x.to(accumulation_dtype(x.dtype))
    cos, sin = angles.to(y.dtype).unsqueeze(2).unbind(1)  # (T, 1, hd)
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def quantize(x, bits, stochastic=False):
    """
    x (..., n), each row in numbers of `bits` bits, 8 or 4, and a scale in bfloat16 -> uint8
    (..., ceil(n bits / 8) + 2). Symmetric: the row's largest magnitude is at most the last level.

    stochastic: round up with a probability equal to the remainder: the expectation is x itself.
    """
    levels, x = 2 ** (bits - 1) - 1, x.to(accumulation_dtype(x.dtype))
    scale = torch.linalg.vector_norm(x, float('inf'), dim=-1) / levels
    # a little more, so that rounding the scale cannot push x beyond the last level
    scale = (scale * (1 + torch.finfo(torch.bfloat16).eps)).clamp(min=1e-30).to(torch.bfloat16)
    y = x / scale.unsqueeze(-1)
    y = torch.floor(y + torch.rand_like(y)) if stochastic else y.round()
    q = y.add(levels).to(torch.uint8)
    if bits == 4:  # two to a byte
        q = F.pad(q, (0, q.shape[-1] % 2))
        q = q[..., ::2] | q[..., 1::2] << 4
    return torch.cat((q, scale.view(torch.uint8).unflatten(-1, (-1, 2))), dim=-1)


def dequantize(q, bits, n, dtype):
    """The inverse of `quantize` up to rounding -> (..., n) in `dtype`."""
    q, scale = q[..., :-2], q[..., -2:].contiguous().view(torch.bfloat16)
    if bits == 4:
        q = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)[..., :n]
    return (q.to(dtype) - (2 ** (bits - 1) - 1)) * scale.to(dtype)


def encode(x, dtype, stochastic=False):
    """x as it travels: as it is (dtype 'compute'), in bf16, or by `quantize` ('int8', 'int4')."""
    if dtype == 'compute':
        return x
    if dtype == 'bf16':
        return x.to(torch.bfloat16)
    return quantize(x, int(dtype.removeprefix('int')), stochastic)


def decode(wire, dtype, n, to):
    """The inverse of `encode` for x (..., n), up to rounding -> in dtype `to`, or as it came."""
    if dtype == 'compute':
        return wire
    if dtype == 'bf16':
        return wire.to(to)
    return dequantize(wire, int(dtype.removeprefix('int')), n, to)
