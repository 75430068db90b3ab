"""
The model: a small LLaMA-style GPT whose attention runs over a ring of workers, and the compressor that
decides what crosses the wire ("Mixtures of Subspaces for Bandwidth Efficient Context Parallel Training",
Ramasinghe et al., NeurIPS 2025, arXiv 2606.16384; "the paper" below).

    config = GPTConfig(block_size=1024, n_layer=4, n_head=4, n_embd=128)
    model = GPT(config)                     # one process: the reference
    logits, loss = model(idx, targets)      # (B, T, vocab_size), mean cross-entropy

With `GPT(config, Ring(group))` the same call takes each rank's `ring.shard(idx)` and gives the same
numbers: what the model computes depends on config.n_chunks, never on how many ranks share the chunks.
"""
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from ring import Ring, attend, depart

CHOICES = {  # the values each option takes; train.py's flags check against these too
    'send': ('full', 'local', 'topk', 'subspace'),
    'wire_dtype': ('auto', 'compute', 'bf16', 'int8', 'int4'),
    'grad_wire_dtype': ('same', 'compute', 'bf16', 'int8', 'int4'),
    'basis': ('fixed', 'rotated', 'learned'),
    'generator': ('frobenius', 'spectral'),
}


BITS = {'int8': 8, 'int4': 4}


@dataclass
class GPTConfig:
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0  # grouped-query attention; 0: n_head
    n_embd: int = 128
    n_ff: int = 0  # width of the SwiGLU; 0: 8/3 n_embd rounded up to a multiple of 64
    rope_base: float = 500000.0
    n_chunks: int = 16  # the sequence is cut into this many chunks; a multiple of 2 * cp
    # what crosses the wire (README, "The method")
    send: str = 'subspace'
    exact_local: bool = True
    joint_kv: bool = True
    basis: str = 'learned'
    rank_k: float = 0.08
    rank_v: float = 0.2
    generator: str = 'frobenius'
    n_generators: int = 1
    theta_clip: float = 0.5
    topk: float = 0.1
    compress_last: bool = True
    wire_dtype: str = 'auto'  # of what travels; 'compute': the dtype it was computed in; 'auto': int8 if subspace, else compute
    grad_wire_dtype: str = 'same'  # of the gradient that travels back
    interleave: bool = False  # the front and the back half of a rank's tokens compute in turn
    recompute: bool = False  # the MLPs' activations and the logits in backward, instead of keeping them

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_ff = self.n_ff or 64 * math.ceil(8 * self.n_embd / 3 / 64)

        def multiple(of, name, by):
            if getattr(self, name) < 1 or getattr(self, name) % by:
                raise ValueError(f'{name} ({getattr(self, name)}) must be a multiple of {of} ({by}): '
                                 f'change --{name} or --{of.split()[-1]}')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_chunks', 'n_generators'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} ({getattr(self, name)}) must be at least 1: change --{name}')
        multiple('n_chunks', 'block_size', self.n_chunks)
        multiple('2 * n_head', 'n_embd', 2 * self.n_head)  # RoPE rotates pairs
        multiple('n_kv_head', 'n_head', self.n_kv_head)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f'{name} ({getattr(self, name)!r}) must be one of {", ".join(choices)}: '
                                 f'change --{name}')
        if self.wire_dtype == 'auto':
            self.wire_dtype = 'int8' if self.send == 'subspace' else 'compute'
        for name in ('rank_k', 'rank_v', 'topk'):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f'{name} ({getattr(self, name)}) is a fraction of the width, above 0 and '
                                 f'at most 1: change --{name}')
        if self.theta_clip < 0:
            raise ValueError(f'theta_clip ({self.theta_clip}) must be at least 0 (0: no clipping): change --theta_clip')
        if self.send == 'local' and not self.exact_local:
            raise ValueError('send=local attends to nothing but the exact local keys: it needs --exact_local=True')
        if self.interleave and not self.compress_last:
            raise ValueError('interleave needs every layer compressed, not compress_last=False: change one of them')
        if self.send != 'full' and not self.compress_last and self.n_layer == 1:
            raise ValueError('compress_last=False leaves nothing to compress when n_layer is 1: change one of them')

    @property
    def chunk_size(self):
        """Tokens in a chunk."""
        return self.block_size // self.n_chunks

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_dim(self):
        """Width d of all keys (and of all values) of a token."""
        return self.n_kv_head * self.head_dim

    @property
    def subspaces(self):
        """(d, r) of each subspace: one for [K, V] together in R^2d, or one for K and one for V."""
        d = self.kv_dim
        r_k, r_v = (max(1, round(rank * d)) for rank in (self.rank_k, self.rank_v))
        return [(2 * d, r_k + r_v)] if self.joint_kv else [(d, r_k), (d, r_v)]


# -----------------------------------------------------------------------------
# The compressor

def second_moment(z):
    """sum_t z_t z_t^T of the columns of z (d, n) -> (d, d), in float32 at least."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(kernels.accumulation_dtype(z.dtype))
        return z @ z.T


def principal_directions(moment, n):
    """
    Top n eigenvectors of a second moment sum_t z_t z_t^T (d, d) -> (d, n), orthonormal, each with its
    largest entry positive (an eigenvector's sign is arbitrary; machines should agree on it).
    """
    _, vectors = torch.linalg.eigh(moment.double())  # ascending
    vectors = vectors.flip(-1)[:, :n]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * largest.sign()


class Subspace(nn.Module):
    """
    One r-dimensional subspace of R^d, or a family of them, U(theta) = R(theta) U0 (paper, Algorithm 1).

    d: n_kv_head * hd, or twice that for [K, V]. U0 starts with orthonormal columns.

    basis=fixed: U0 alone. learned: U0 is a free parameter. rotated: R(theta) = exp(sum_l theta_l A_l) with fixed
    skew-symmetric A_l, and theta = psi(mean of the chunk's keys or values): a mixture of subspaces.
    """

    def __init__(self, d, r, config, rng):
        super().__init__()
        self.config, k = config, config.n_generators
        U0 = torch.linalg.qr(torch.randn(d, r, generator=rng))[0].contiguous()
        self.learned, self.rotated = config.basis == 'learned', config.basis == 'rotated'
        if self.learned:
            self.U0 = nn.Parameter(U0)
        else:
            self.register_buffer('U0', U0)
        if self.rotated:
            self.psi = nn.Linear(d, k, bias=False, device='meta')  # draws no random numbers
            self.psi.weight = nn.Parameter(0.02 * torch.randn(k, d, generator=rng))
            S = torch.randn(k, d, d, generator=rng)
            A = S - S.transpose(-2, -1)
            norm = torch.linalg.matrix_norm(A, 'fro' if config.generator == 'frobenius' else 2, keepdim=True)
            self.register_buffer('A', A / norm)
            # A_l U0 and A_l A_m U0: all that the second-order exponential needs
            self.register_buffer('AU0', torch.zeros(k, d, r))
            self.register_buffer('AAU0', torch.zeros(k, k, d, r))
            self.set_basis(U0)

    @torch.no_grad()
    def set_basis(self, U0):
        """Start the subspace in the given orthonormal directions (d, r)."""
        self.U0.copy_(U0)
        if self.rotated:
            self.AU0.copy_(self.A @ self.U0)
            self.AAU0.copy_(torch.einsum('lde,mer->lmdr', self.A, self.AU0))

    def theta(self, zs, n_chunks):
        """How far to rotate, from each chunk's mean. zs: tensors (B, T, d_i) that make up Z -> (B, c, k), radians."""
        mean = torch.cat([z.unflatten(1, (n_chunks, -1)).mean(dim=2) for z in zs], dim=-1)  # (B, c, d)
        theta, clip = self.psi(mean).to(mean.dtype), self.config.theta_clip
        return theta.clamp(-clip, clip) if clip else theta

    def basis(self, theta):
        """U(theta) = R(theta) U0. theta: (B, c, k) -> (B, c, d, r)."""
        with torch.autocast(theta.device.type, enabled=False):  # sender and receiver must find the same U
            return kernels.rotate_basis(theta.to(self.U0.dtype), self.U0, self.AU0, self.AAU0)


class Compressor(nn.Module):
    """
    What a layer's keys and values look like on the wire. `compress` makes the payload, `expand` turns a
    payload, one's own or a received one, into keys and values. Compression acts before RoPE; the receiver
    rotates to the sender's positions. `override` says what to send instead for now: 'local', nothing, or 'full'
    (warm start, unplugged); '' is what the configuration says.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.override = config, ''
        last = layer == config.n_layer - 1
        self.configured = 'full' if last and not config.compress_last else config.send
        # its own random numbers: the model's initial weights must not depend on what is sent
        rng = torch.Generator().manual_seed(1000 + layer)
        subspaces = config.subspaces if self.configured == 'subspace' else []
        self.subspaces = nn.ModuleList(Subspace(d, r, config, rng) for d, r in subspaces)

    @property
    def send(self):
        """What is sent now."""
        return self.override or self.configured

    def wire_dtype(self, gradient=False):
        """In what numbers it is sent now."""
        left_out = self.configured != self.config.send  # the last layer, if compress_last is off
        if left_out or self.override:
            return 'compute'
        dtype = self.config.grad_wire_dtype
        return dtype if gradient and dtype != 'same' else self.config.wire_dtype

    @property
    def exact_local(self):
        exact = self.send == 'full' and self.wire_dtype() == 'compute'  # as everything is
        return self.send == 'local' or self.config.exact_local and not exact

    @property
    def keep(self):
        """Small payloads are held until backward; full ones are sent again."""
        return self.send != 'full'

    @property
    def params(self):
        """The tensors `expand` needs gradients for: the learned basis."""
        return tuple(s.U0 for s in self.subspaces if s.learned) if self.send == 'subspace' else ()

    def chunks_in(self, n_tokens):
        return n_tokens // self.config.chunk_size

    def group(self, k, v):
        """Keys and values as the subspaces see them: both in one, or one each."""
        return [(k, v)] if self.config.joint_kv else [(k,), (v,)]

    def bases(self, theta):
        """The basis of each subspace: U(theta) (B, c, d, r) where it is rotated, else U0 (d, r)."""
        return [s.basis(t) for s, t in zip(self.subspaces, theta)] if theta else [s.U0 for s in self.subspaces]

    def compress(self, k, v):
        """k, v: (B, T, d) before RoPE -> the payload, a tuple of tensors (B, T, ...) and (B, chunks, ...)."""
        if self.send == 'full':
            return k, v
        if self.send == 'local':
            return ()
        if self.send == 'topk':  # the largest entries of each token's key and value, and where they stood
            n = self.rows[0][1]
            where = [t.abs().topk(n, dim=-1).indices for t in (k, v)]
            index_dtype = torch.int16 if k.shape[-1] <= 2**15 else torch.int32
            return (*(t.gather(-1, i) for t, i in zip((k, v), where)), *(i.to(index_dtype) for i in where))
        c, groups = self.chunks_in(k.shape[1]), self.group(k, v)
        theta = [s.theta(zs, c) for s, zs in zip(self.subspaces, groups) if s.rotated]
        return (*(kernels.compress(zs, U, c) for zs, U in zip(groups, self.bases(theta))), *theta)

    def expand(self, payload, params, cos, sin):
        """
        payload: as from `compress`, or its first chunks; params: as the property of that name;
        cos, sin: (T, hd/2) at the payload's positions -> k with RoPE, v: (B, Hkv, T, hd).
        """
        if self.send == 'full':
            return kernels.to_heads(*payload, cos, sin)
        if self.send == 'topk':
            zeros = payload[0].new_zeros(*payload[0].shape[:-1], self.config.kv_dim)
            k, v = (zeros.scatter(-1, i.long(), t) for t, i in zip(payload[:2], payload[2:]))
            return kernels.to_heads(k, v, cos, sin)
        n = len(self.subspaces)
        latents, theta = payload[:n], payload[n:]
        return kernels.expand_to_heads(latents, params or self.bases(theta), cos, sin, self.chunks_in(cos.shape[0]))

    @property
    def rows(self):
        """What a token's payload is made of: (number of rows, numbers in a row) of each tensor that is quantised by rows."""
        c = self.config
        if self.send == 'full':
            return [(c.n_kv_head, c.head_dim)] * 2  # a scale a head
        if self.send == 'topk':
            return [(1, max(1, round(c.topk * c.kv_dim)))] * 2
        return [(1, r) for _, r in c.subspaces] if self.send == 'subspace' else []

    def pack(self, tensors, gradient=False):
        """
        The payload, or the gradient of its floating-point tensors, in the wire's dtype. Of small integers with a scale
        a row; the gradient's are rounded stochastically, so that on average nothing is lost. What is not by token,
        theta, and where topk's entries stood, travels as it is.
        """
        dtype, n = self.wire_dtype(gradient), len(self.rows)
        if dtype == 'compute':
            return tensors
        if dtype == 'bf16':
            return *(t.to(torch.bfloat16) for t in tensors[:n]), *tensors[n:]
        packed = (kernels.quantize(t.unflatten(-1, row), BITS[dtype], stochastic=gradient)
                  for t, row in zip(tensors, self.rows))
        return *itertools.chain(*packed), *tensors[n:]

    def unpack(self, wire, dtype, gradient=False):
        """The inverse of `pack`, up to rounding. dtype: that of the payload."""
        wire_dtype, n = self.wire_dtype(gradient), len(self.rows)
        if wire_dtype == 'compute':
            return wire
        if wire_dtype == 'bf16':
            return *(t.to(dtype) for t in wire[:n]), *wire[n:]
        values = (kernels.dequantize(q, scale, BITS[wire_dtype], row[1], dtype).flatten(-2)
                  for q, scale, row in zip(wire[:2 * n:2], wire[1:2 * n:2], self.rows))
        return *values, *wire[2 * n:]

    def wire_bytes(self, n_tokens, itemsize):
        """
        Bytes that `n_tokens` tokens of one sequence cost per rank they travel to: (forward, backward).

        itemsize: bytes of a number in the compute dtype. Backward is the gradient of what was sent; for `full`, the
        keys and values travel once more besides.
        """
        def values(dtype):
            if dtype in BITS:  # and a scale in bfloat16
                return n_tokens * sum(rows * (math.ceil(n * BITS[dtype] / 8) + 2) for rows, n in self.rows)
            return n_tokens * sum(rows * n for rows, n in self.rows) * (2 if dtype == 'bf16' else itemsize)
        c, fwd, bwd = self.config, values(self.wire_dtype()), values(self.wire_dtype(gradient=True))
        if self.send == 'full':
            return fwd, fwd + bwd
        if self.send == 'topk':  # where the entries stood travels forward only
            return fwd + n_tokens * sum(n for _, n in self.rows) * (2 if c.kv_dim <= 2**15 else 4), bwd
        rotated = self.send == 'subspace' and c.basis == 'rotated'
        theta = len(c.subspaces) * c.n_generators * self.chunks_in(n_tokens) * itemsize if rotated else 0
        return fwd + theta, bwd + theta


# -----------------------------------------------------------------------------
# The model

class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.kv_dim, bias=False)  # the W of Z = X W in the paper
        self.c_v = nn.Linear(config.n_embd, config.kv_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.compressor = Compressor(config, layer)
        self.moments = None  # a list while GPT.basis_moments collects

    def depart(self, x, ring, cos, sin, here, n_uses=1):
        """
        The first half of attention: everything up to the keys and values being on their way.

        x: (B, T, n_embd), this rank's tokens or part of them; cos, sin: (block_size, hd/2); here: positions of x, (T,).
        n_uses: how many calls of `arrive` will look at them. Returns what `arrive` takes.
        """
        comp = self.compressor
        k, v = self.c_k(x), self.c_v(x)  # (B, T, d)
        if self.moments is not None:
            self.moments += [second_moment(torch.cat(zs, dim=-1).flatten(0, 1).T) for zs in comp.group(k, v)]
        sent = depart(comp.compress(k, v), ring=ring, keep=comp.keep, pack=comp.pack, unpack=comp.unpack, n_uses=n_uses)
        # what comes after `depart` hides some of the way, forward, and as autograd goes backwards, there too
        q = self.c_q(x).unflatten(-1, (-1, self.config.head_dim))  # (B, T, H, hd)
        q = kernels.rope(q, cos[here], sin[here]).transpose(1, 2)  # (B, H, T, hd)
        return sent, q, (k, v) if comp.exact_local else None

    def arrive(self, departed, ring, cos, sin, n_parts=1):
        """The second half. departed: list of what `depart` returned, for the parts up to this one -> (B, T, n_embd)."""
        comp, (_, q, local) = self.compressor, departed[-1]
        y = attend(q, [sent for sent, _, _ in departed],
                   lambda payload, params, at: comp.expand(payload, params, cos[at], sin[at]), comp.params,
                   local, lambda kv, at: kernels.to_heads(*kv, cos[at], sin[at]),
                   ring=ring, chunk_size=self.config.chunk_size, n_parts=n_parts)  # (B, H, T, hd)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.c_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Norm(nn.RMSNorm):
    """RMSNorm, in autocast's dtype: rounded once, not (and kept for backward) by every matrix that multiplies the result."""

    def forward(self, x):
        device = x.device.type
        return super().forward(x).to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


def recomputed(f, *args):
    """f(*args), keeping nothing of what f computes: backward computes it once more. Only for what sends nothing."""
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = Norm(config.n_embd, eps=1e-5), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config.n_embd, eps=1e-5), MLP(config)

    def depart(self, x, *where):
        return self.attn.depart(self.ln_1(x), *where)

    def arrive(self, x, *departed):
        x = x + self.attn.arrive(*departed)
        return x + (recomputed(self.feed_forward, x) if self.attn.config.recompute else self.feed_forward(x))

    def feed_forward(self, x):
        return self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """LLaMA-3-style decoder: RMSNorm, RoPE, SwiGLU, untied head, no biases. nanoGPT's interface."""
    loss_tokens = 8192  # of each sequence, whose logits exist at a time, with config.recompute

    def __init__(self, config, ring=None):
        super().__init__()
        self.config, self.ring = config, ring or Ring()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        frequency = config.rope_base ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
        angle = torch.outer(torch.arange(config.block_size).double(), frequency)  # (block_size, hd/2)
        self.register_buffer('cos', angle.cos().float(), persistent=False)
        self.register_buffer('sin', angle.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and 'compressor' not in name:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02
                nn.init.normal_(p, mean=0.0, std=std)

    @property
    def compressors(self):
        return [block.attn.compressor for block in self.h]

    def forward(self, idx, targets=None, by_token=False):
        """
        idx, targets: (B, T) token numbers, -1 in targets is ignored. With a ring of several ranks they are this
        rank's shard (`ring.shard`), and `loss` is the mean over its tokens: shards are equally long, so, as long
        as no target is ignored, the mean over ranks is the mean over the sequence.
        by_token: `loss` is not the mean but each token's (B, T), 0 where the target is ignored.

        Returns logits (B, T, vocab_size) and loss (None without targets). With config.recompute there are no logits (None)
        beside a loss.
        Raises ValueError if the sequence is too long or cannot be cut into chunks for the ring.
        """
        n, world_size, chunk_size = idx.shape[1], self.ring.world_size, self.config.chunk_size
        if n * world_size > self.config.block_size:
            raise ValueError(f'sequence length ({n * world_size}) is above block_size ({self.config.block_size})')
        if n % chunk_size:
            if world_size > 1:
                raise ValueError(f'shard length ({n}) must be a multiple of block_size / n_chunks ({chunk_size})')
            idx = F.pad(idx, (0, chunk_size - n % chunk_size))  # in the future of every real token
        here = self.ring.positions(idx.shape[1], chunk_size, idx.device)
        x = self.transformer(self.wte(idx), here)[:, :n]  # (B, T, n_embd)
        if targets is None:
            return self.logits(x), None
        if self.config.recompute:  # a few tokens at a time: the logits of a long sequence are larger than all the rest
            pieces = zip(x.split(self.loss_tokens, dim=1), targets.split(self.loss_tokens, dim=1))
            logits, losses = None, torch.cat([recomputed(lambda *piece: self.losses(*piece)[1], *piece) for piece in pieces], dim=1)
        else:
            logits, losses = self.losses(x, targets)
        return logits, losses if by_token else losses.sum() / (targets != -1).sum()

    def logits(self, x):
        return self.lm_head(self.ln_f(x))  # (B, T, vocab_size)

    def losses(self, x, targets):
        logits = self.logits(x)
        losses = F.cross_entropy(logits.flatten(0, 1).to(kernels.accumulation_dtype(logits.dtype)),
                                 targets.flatten(), ignore_index=-1, reduction='none')
        return logits, losses.view(targets.shape)  # (B, T)

    def transformer(self, x, here):
        """
        All layers. x: (B, T, n_embd) at positions `here`. Interleaved, the front and the back half of a rank's tokens
        take turns: while the keys and values of one travel, the other computes. Causality allows it, as no front half
        needs any back half; autograd runs the same schedule backwards.
        """
        tables = self.cos, self.sin
        # not in the warm start, when full payloads are not kept, nor while basis_moments collects
        interleave = self.config.interleave and self.ring.world_size > 1 and all(
            block.attn.compressor.keep and block.attn.moments is None for block in self.h)
        n_parts = 1 + interleave
        xs, here, previous = list(x.chunk(n_parts, dim=1)), here.chunk(n_parts), None
        for block in self.h:
            departed = []
            for part in range(n_parts):
                if previous:
                    layer, sent = previous
                    xs[part] = layer.arrive(xs[part], sent[:part + 1], self.ring, *tables, n_parts)
                departed.append(block.depart(xs[part], self.ring, *tables, here[part], n_parts - part))
            previous = block, departed
        layer, sent = previous
        for part in range(n_parts):
            xs[part] = layer.arrive(xs[part], sent[:part + 1], self.ring, *tables, n_parts)
        return torch.cat(xs, dim=1)

    # -- the compressor's life: warm start, on, unplugged

    def set_send(self, override=''):
        """Send what the configuration says (''), nothing ('local') or full keys and values ('full')."""
        for compressor in self.compressors:
            compressor.override = override

    @torch.no_grad()
    def basis_moments(self, idx=None):
        """
        Second moments (d, d), one per subspace, whose principal directions are good bases: of the weights,
        W^T W for Z = X W, as in the paper, or of the keys and values on a batch `idx` (this rank's shard;
        sum over ranks is the caller's business).
        """
        moments = []
        for block in self.h:
            block.attn.moments = []
        if idx is not None:
            self(idx)
        for attn in (block.attn for block in self.h):
            if idx is None:
                weights = attn.compressor.group(attn.c_k.weight, attn.c_v.weight)  # W^T, (d, n_embd)
                attn.moments = [second_moment(torch.cat(ws)) for ws in weights]
            moments += attn.moments if len(attn.compressor.subspaces) else []
            attn.moments = None
        return moments

    def set_bases(self, moments):
        """Start every subspace in the principal directions of its moment, as from `basis_moments`."""
        for subspace, moment in zip((s for c in self.compressors for s in c.subspaces), moments):
            subspace.set_basis(principal_directions(moment, subspace.U0.shape[1]))

    # -- nanoGPT's interface

    def get_num_params(self, non_embedding=True):
        """Parameters, without the input embedding by default: it costs no FLOPs."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.wte.weight.numel()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, basis_lr=1.0):
        """
        AdamW; weight matrices decay, norms and the compressor's own parameters do not.
        basis_lr: the compressor's learning rate as a fraction of the others'; a group's fraction is its 'lr_scale'.
        """
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        bases = [p for n, p in named if 'compressor' in n]
        decay = [p for n, p in named if p.dim() >= 2 and 'compressor' not in n]
        norms = [p for n, p in named if p.dim() < 2 and 'compressor' not in n]
        groups = [{'params': decay, 'weight_decay': weight_decay, 'lr_scale': 1.0},
                  {'params': norms, 'weight_decay': 0.0, 'lr_scale': 1.0},
                  {'params': bases, 'weight_decay': 0.0, 'lr_scale': basis_lr}]
        for group in groups:
            group['lr'] = learning_rate * group['lr_scale']
        return torch.optim.AdamW(groups, betas=betas, fused=device_type == 'cuda')

    def flops_per_token(self):
        """
        Forward and backward: 6 per parameter, and for causal attention over T tokens 6 T n_embd per layer (12 T n_embd if
        nothing were masked; Chowdhery et al. 2022, appendix B). T is block_size, or a chunk while nothing is sent.
        """
        c = self.config
        spans = (c.chunk_size if comp.send == 'local' else c.block_size for comp in self.compressors)
        return 6 * self.get_num_params() + 6 * c.n_embd * sum(spans)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """
        Model FLOPs utilisation. fwdbwd_per_iter: sequences per iteration over all devices; dt: seconds;
        peak_flops: FLOP/s of all devices together.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T) by max_new_tokens, on this process alone. Returns (B, T + max_new_tokens)."""
        ring, self.ring = self.ring, Ring()
        try:
            for _ in range(max_new_tokens):
                logits = self(idx[:, -self.config.block_size:])[0][:, -1].float() / temperature  # (B, vocab_size)
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                    logits[logits < kth] = float('-inf')
                idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)), dim=1)
        finally:
            self.ring = ring
        return idx
