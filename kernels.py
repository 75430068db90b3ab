"""
The arithmetic: block attention with its log-sum-exp, the merge of two partial attentions, rotary
embedding, and the two small products that compress and rebuild keys and values.

Nothing here knows of processes. ring.py calls these functions once per block that arrives;
`fuse()` hands the elementwise and small ones to torch.compile (train.py --compile).
"""
import functools

import torch

aten = torch.ops.aten


def accumulation_dtype(dtype):
    """float32 at least: bf16 sums over many hops lose the small terms; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


# -----------------------------------------------------------------------------
# Block attention: queries against one block of keys, with the log-sum-exp that lets blocks be merged.
# Every backend is a pair
#     forward (q, k, v, causal) -> out, lse
#     backward(dout, q, k, v, out, lse, causal) -> dq, dk, dv
# where out and lse in `backward` are those of the *whole* softmax, over all blocks: the probabilities
# exp(q k - lse) are then the global ones, so the gradients of the blocks simply add up.

def _cpu_forward(q, k, v, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _cpu_backward(dout, q, k, v, out, lse, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)


def _cudnn_forward(q, k, v, causal):
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse.view(q.shape[:3])  # the operator returns (B, H, T, 1)


def _cudnn_backward(dout, q, k, v, out, lse, causal):
    no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)  # its seed and offset
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), no_dropout[0], no_dropout[1], None, None, None,
        q.shape[2], k.shape[2], 0.0, causal)


def _flash_forward(q, k, v, causal):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _flash_backward(dout, q, k, v, out, lse, causal):
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, no_dropout, no_dropout[0])


def _math_scores(q, k, causal):
    s = (q @ k.transpose(-2, -1)).to(accumulation_dtype(q.dtype)) * q.shape[-1] ** -0.5  # (B, H, Tq, Tk)
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
    ds = p * ((dout @ v.transpose(-2, -1)).to(p.dtype) - delta) * q.shape[-1] ** -0.5
    p, ds = p.to(q.dtype), ds.to(q.dtype)
    return ds @ k, ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ dout


BACKENDS = {'cudnn': (_cudnn_forward, _cudnn_backward), 'flash': (_flash_forward, _flash_backward),
            'cpu': (_cpu_forward, _cpu_backward), 'math': (_math_forward, _math_backward)}


@functools.lru_cache(maxsize=None)
def attention_backend(device_type, dtype, head_dim):
    """
    Name of the fastest block attention this device runs, found by trying: 'cudnn' or 'flash' on CUDA
    in bf16, 'cpu' (PyTorch's CPU flash attention), else 'math', which holds Tq x Tk scores.
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


def attention_forward(q, k, v, causal):
    """
    Softmax attention of q over one block of keys, scaled by 1/sqrt(hd).

    q: (B, H, Tq, hd); k, v: (B, Hkv, Tk, hd), where Hkv divides H (grouped-query attention).
    causal: query t sees keys 0..t of this block (needs Tq == Tk).
    Returns out (B, H, Tq, hd) in q's dtype and lse (B, H, Tq), the log of each softmax denominator,
    float32 at least.
    """
    name = attention_backend(q.device.type, q.dtype, q.shape[-1])
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and name != 'cpu':  # the CPU operator takes grouped heads as they are
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    out, lse = BACKENDS[name][0](q, k, v, causal)
    return out, lse.to(accumulation_dtype(q.dtype))


def attention_backward(dout, q, k, v, out, lse, causal):
    """
    Gradients of `attention_forward` for one block of a larger softmax.

    out (B, H, Tq, hd) and lse (B, H, Tq) are those after merging *all* blocks the queries see.
    Returns dq (B, H, Tq, hd), dk and dv (B, Hkv, Tk, hd): this block's share of dq, and all of what
    these queries contribute to dk and dv.
    """
    name = attention_backend(q.device.type, q.dtype, q.shape[-1])
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and name != 'cpu':
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    dq, dk, dv = BACKENDS[name][1](dout, q, k, v, out, lse.contiguous(), causal)
    if groups > 1 and name != 'cpu':
        dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (dk, dv))
    return dq, dk, dv


def merge(out, lse, block_out, block_lse):
    """
    Two attentions of the same queries over disjoint keys become the attention over all of them, in place of the first.

    out, block_out: (..., T, hd); lse, block_lse: (..., T). Each output is weighted by its share of the joint softmax
    denominator; the exponents are <= 0, so nothing overflows.
    """
    both = torch.logaddexp(lse, block_lse)
    out.copy_(out * torch.exp(lse - both).unsqueeze(-1) + block_out * torch.exp(block_lse - both).unsqueeze(-1))
    lse.copy_(both)


def accumulate(total, x):
    """total += x, in total's dtype. torch.compile makes of it one fast kernel where the dtypes or strides differ."""
    total.add_(x)


def add_up(parts, dtype):
    """Sum of a tuple of tensors of one shape, added up in float32 at least, in `dtype`."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    return sum(p.to(accumulation_dtype(p.dtype)) for p in parts).to(dtype)


# -----------------------------------------------------------------------------
# What happens to keys and values around the wire

def rope(x, cos, sin):
    """
    Rotary position embedding (Su et al. 2021; halves paired as in LLaMA's public code).

    x: (B, T, H, hd); cos, sin: (T, hd/2) at the tokens' *global* positions. Returns x's dtype.
    """
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)  # (B, T, H, hd/2)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, hd/2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def rotate_basis(theta, U0, AU0, AAU0):
    """
    R(theta) U0 with R(theta) = I + M + M^2/2, M = sum_l theta_l A_l: the paper's second-order
    exponential, applied to U0 without ever forming a d x d matrix.

    theta: (B, c, k); U0: (d, r); AU0: (k, d, r) = A_l U0; AAU0: (k, k, d, r) = A_l A_m U0.
    Returns (B, c, d, r): one basis per chunk.
    """
    first = torch.einsum('bcl,ldr->bcdr', theta, AU0)
    second = torch.einsum('bcl,bcm,lmdr->bcdr', theta, theta, AAU0)
    return U0 + first + second / 2


def aligned(x):
    """x (..., r), with zeros up to the next multiple of 8: matrix products with other sizes miss the fast kernels of a GPU."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


def compress(zs, U, n_chunks):
    """
    Z_comp = Z U. zs: tensors (B, T, d_i) that stand side by side in Z, [K, V] or one of them, not concatenated
    because autograd would keep the copy; U: (sum d_i, r), or (B, c, sum d_i, r), a basis per chunk -> (B, T, r).
    """
    parts = aligned(U).split([z.shape[-1] for z in zs], dim=-2)
    out = sum(z.unflatten(1, (n_chunks, -1)) @ part.to(z.dtype) for z, part in zip(zs, parts)).flatten(1, 2)
    return out[..., :U.shape[-1]].contiguous()


def expand(z, U, n_chunks):
    """Z_hat = Z_comp U^T, back from the subspace; U as in `compress`. z: (B, T, r) -> (B, T, d)."""
    return (aligned(z).unflatten(1, (n_chunks, -1)) @ aligned(U).to(z.dtype).transpose(-2, -1)).flatten(1, 2)


def quantize(x, bits, stochastic=False):
    """
    x (..., n) -> numbers of `bits` bits, 8 or 4, as uint8 (..., n or ceil(n / 2)), and a scale for each row, (..., 1) in
    bfloat16. Symmetric: the row's largest magnitude is the largest level, 127 or 7.

    stochastic: round up with a probability equal to the remainder, so that the expectation is x itself.
    """
    levels, x = 2 ** (bits - 1) - 1, x.to(accumulation_dtype(x.dtype))
    scale = x.abs().amax(dim=-1, keepdim=True) / levels
    # a little more, so that rounding the scale cannot push x beyond the last level
    scale = (scale * (1 + torch.finfo(torch.bfloat16).eps)).clamp(min=1e-30).to(torch.bfloat16)
    y = x / scale
    q = (torch.floor(y + torch.rand_like(y)) if stochastic else y.round()).add(levels).to(torch.uint8)
    if bits == 4:  # two to a byte
        q = torch.nn.functional.pad(q, (0, q.shape[-1] % 2))
        q = q[..., ::2] | q[..., 1::2] << 4
    return q, scale


def dequantize(q, scale, bits, n, dtype):
    """The inverse of `quantize` up to rounding -> (..., n) in `dtype`."""
    if bits == 4:
        q = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)[..., :n]
    return (q.to(dtype) - (2 ** (bits - 1) - 1)) * scale.to(dtype)


def to_heads(k, v, cos, sin):
    """k, v: (B, T, Hkv * hd), before RoPE -> k rotated to its positions, v: both (B, Hkv, T, hd)."""
    k, v = (t.unflatten(-1, (-1, 2 * cos.shape[-1])) for t in (k, v))  # (B, T, Hkv, hd)
    return rope(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


def expand_to_heads(latents, bases, cos, sin, n_chunks):
    """
    What a receiver does to a block: rebuild keys and values, rotate the keys to their positions.

    latents, bases: one of each where [K, V] share a subspace of R^2d, two where they have their own.
    Returns k, v: (B, Hkv, T, hd).
    """
    rebuilt = [expand(z, U, n_chunks) for z, U in zip(latents, bases)]
    k, v = rebuilt if len(rebuilt) == 2 else rebuilt[0].chunk(2, dim=-1)
    return to_heads(k, v, cos, sin)


def fuse():
    """
    torch.compile what runs once per arriving block (train.py --compile). Callers reach these functions
    through the module, `kernels.merge(...)`, so that rebinding the names here is enough.
    """
    torch._dynamo.config.recompile_limit = 64  # blocks come in many lengths
    for f in (merge, accumulate, add_up, quantize, dequantize, to_heads, expand_to_heads):
        globals()[f.__name__] = torch.compile(f)


# -----------------------------------------------------------------------------
# `python kernels.py`: how fast ring attention is on this machine, beside one process alone and PyTorch's own

def _benchmark(rank, world_size, store):
    """One process of the benchmark; rank 0 prints. store: path of a file that does not exist yet."""
    import statistics
    import time
    import torch.distributed as dist
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method
    from torch.nn.attention import SDPBackend, sdpa_kernel
    import kernels  # this file as ring.py sees it
    from ring import Ring, attend, depart

    cuda = torch.cuda.is_available()
    device = torch.device('cuda', rank) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
        kernels.fuse()
        rows = [(32768, 16, 128, 'flash'), (32768, 16, 128, 'cudnn'), (131072, 16, 128, 'flash'), (131072, 16, 128, 'cudnn'),
                (32768, 8, 256, 'cudnn')]
    else:
        torch.set_num_threads(1)
        rows = [(2048, 4, 64, 'cpu'), (8192, 4, 64, 'cpu')]
    dist.init_process_group('nccl' if cuda else 'gloo', init_method=f'file://{store}', rank=rank, world_size=world_size,
                            device_id=device if cuda else None)
    mesh = dist.init_device_mesh(device.type, (world_size,))
    ring, dtype = Ring(mesh.get_group()), torch.bfloat16 if cuda else torch.float32
    in_blocks = [0.0]  # seconds in block attention; on the CPU, where a call ends when it is done

    def timed(f):
        def g(*args):
            start = time.perf_counter()
            result = f(*args)
            in_blocks[0] += time.perf_counter() - start
            return result
        return g
    if not cuda:
        kernels.attention_forward, kernels.attention_backward = map(timed, (kernels.attention_forward, kernels.attention_backward))

    def milliseconds(f, n):
        """Of one of n calls back to back, as the layers of a model come, once all ranks are ready."""
        f()
        dist.barrier()
        if cuda:
            torch.cuda.synchronize()
        in_blocks[0], start = 0.0, time.perf_counter()
        for _ in range(n):
            f()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / n

    def say(*cells):
        if rank == 0:
            print('| ' + ' | '.join(cells) + ' |', flush=True)
    say('T', 'heads x size', 'attention', 'one process, ms (TFLOP/s)', f"PyTorch's context_parallel on {world_size}, ms", 'of ideal',
        f'ring.py on {world_size}, ms', 'of ideal', *([] if cuda else ['of it in attention']))
    say(*['---'] * (8 if cuda else 9))
    for T, H, hd, name in rows:
        kernels.attention_backend = lambda *args, name=name: name
        generator = torch.Generator(device).manual_seed(0)
        q, k, v, dout = (torch.randn(1, T, H, hd, generator=generator, dtype=dtype, device=device) for _ in range(4))
        whole = [x.transpose(1, 2) for x in (q, k, v, dout)]  # (1, H, T, hd)
        chunk_size = T // (2 * world_size)
        mine = [ring.shard(x, chunk_size) for x in (q, k, v, dout)]
        my_q, my_dout = (mine[i].transpose(1, 2).requires_grad_(i == 0) for i in (0, 3))
        my_kv = [x.flatten(2).requires_grad_() for x in mine[1:3]]  # (1, T / world_size, H * hd), as a model has them

        def alone():
            out, lse = kernels.attention_forward(*whole[:3], True)
            return out, *kernels.attention_backward(whole[3], *whole[:3], out, lse, True)

        def heads(kv, *_):
            return [x.unflatten(2, (H, hd)).transpose(1, 2) for x in kv]

        def ours():
            sent = depart(tuple(my_kv), ring=ring, keep=False)
            out = attend(my_q, [sent], heads, ring=ring, chunk_size=chunk_size)
            return out, *torch.autograd.grad(out, (my_q, *my_kv), my_dout)

        its = [x.contiguous() for x in whole]  # PyTorch's takes (1, H, T, hd)

        def theirs():
            out = torch.nn.functional.scaled_dot_product_attention(*its[:3], is_causal=True)
            return out, *torch.autograd.grad(out, its[:3], its[3])

        out, dq, dk, dv = alone()
        for x, y in zip((out, dq, dk, dv), ours()):  # a time is worth nothing if the result is wrong
            x = ring.shard(x.transpose(1, 2), chunk_size)
            y = y.transpose(1, 2) if y.dim() == 4 else y.unflatten(2, (H, hd))
            error = ((x - y).float().norm() / x.float().norm()).item()
            assert error < 1e-2, f'ring attention differs from attention by {error:.1e}'
        del out, dq, dk, dv, x, y
        times, blocks = {f: [] for f in (alone, ours, theirs)}, []
        n = 5 if cuda and T < 100000 else 1
        for _ in range(3):
            for f in (alone, ours):
                times[f].append(milliseconds(f, n))
            blocks.append(in_blocks[0] * 1e3)
            if not cuda:
                continue
            set_rotate_method('alltoall')
            with context_parallel(mesh, buffers=its, buffer_seq_dims=[2] * 4), \
                    sdpa_kernel(SDPBackend.CUDNN_ATTENTION if name == 'cudnn' else SDPBackend.FLASH_ATTENTION):
                for x in its[:3]:
                    x.requires_grad_()
                times[theirs].append(milliseconds(theirs, n))
                for x in its[:3]:
                    x.requires_grad_(False)
        one, our, their = (statistics.median(t) if t else None for t in times.values())
        flops = 7 * T * T * H * hd  # causal: 4 T^2 H hd forward and 10 T^2 H hd backward, halved
        ideal = one / world_size
        say(f'{T}', f'{H} x {hd}', name, f'{one:.1f} ({flops / one / 1e9:.3g})', *([f'{their:.1f}', f'{ideal / their:.1%}'] if their else ['-', '-']),
            f'{our:.1f}', f'{ideal / our:.1%}', *([] if cuda else [f'{statistics.median(blocks) / our:.1%}']))
    dist.destroy_process_group()


if __name__ == '__main__':
    import os
    import tempfile
    import torch.multiprocessing as mp
    n = torch.cuda.device_count() or 4
    print(f'{n} x {torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process"}, torch {torch.__version__}; '
          'forward and backward of causal attention, batch 1', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_benchmark, (n, os.path.join(folder, 'store')), nprocs=n)
