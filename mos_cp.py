"""
The model: a small LLaMA-style GPT whose attention runs over a ring of workers, and the codecs that
decide what crosses the wire ("Mixtures of Subspaces for Bandwidth Efficient Context Parallel
Training", Ramasinghe et al., NeurIPS 2025, arXiv 2606.16384; "the paper" below).

    config = GPTConfig(block_size=1024, n_layer=4, n_head=4, n_embd=128)
    model = GPT(config)                     # one process: the reference
    logits, loss = model(idx, targets)      # (B, T, vocab_size), mean cross-entropy

With `GPT(config, Ring(group))` the same call takes each rank's `ring.shard(idx, config.chunk_size)`
and gives the same numbers: what the model computes depends on config.n_chunks, never on how many
ranks share the chunks.

`python mos_cp.py` times a training step beside the same model with PyTorch's own attention.
"""
import copy
import dataclasses
import functools
import gc
import math
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from ring import Ring, attend, positions

CHOICES = {  # the values an option takes; train.py's flags check against these too
    'send': ('full', 'local', 'topk', 'subspace'),
    'wire_dtype': ('auto', 'compute', 'bf16', 'int8', 'int4'),
    'grad_wire_dtype': ('same', 'compute', 'bf16', 'int8', 'int4'),
    'basis': ('fixed', 'rotated', 'learned'),
    'generator': ('frobenius', 'spectral'),
}


def check(holds, says, *flags):
    """Raises ValueError with a sentence, and the flags to change, unless something holds."""
    if not holds:
        raise ValueError(f'{says}: change {" or ".join("--" + flag for flag in flags)}')


@dataclass
class GPTConfig:
    """The model and what it sends. (The comments are what `train.py --help` says.)"""
    block_size: int = 1024  # context length in tokens, over all ranks of a ring together
    n_chunks: int = 16  # chunks of the context, a multiple of 2 * cp; results depend on it, not cp
    vocab_size: int = 0  # vocabulary; 0: 256 for text, 50304 for .bin (GPT-2's, rounded up)
    n_layer: int = 4  # layers
    n_head: int = 4  # query heads
    n_kv_head: int = 0  # key and value heads (grouped-query attention); 0: n_head
    n_embd: int = 128  # width
    n_ff: int = 0  # width of the SwiGLU; 0: 8/3 n_embd, rounded up to a multiple of 64
    rope_base: float = 500000.0  # base of the rotary embedding's frequencies
    send: str = 'subspace'  # full (uncompressed), local (nothing), topk, or subspace
    rank: int = 36  # numbers sent for a token and layer, its key and value together
    rank_k: int = 0  # of these for the key, without joint_kv; 0: two sevenths
    joint_kv: bool = True  # one subspace for keys and values together; False: one each
    basis: str = 'learned'  # fixed, learned, or rotated (the paper: by the mean of the chunk)
    generator: str = 'frobenius'  # random, of frobenius (the paper) or spectral norm 1
    n_generators: int = 1  # how many generators, that is numbers in theta
    theta_clip: float = 0.5  # largest |theta|; 0: not clipped
    exact_local: bool = True  # a chunk's own keys and values are exact; False (the paper): rebuilt
    compress_last: bool = True  # False (the paper): the last layer sends full keys and values
    wire_dtype: str = 'auto'  # compute, bf16, int8, int4; auto: int4 for subspace, else compute
    grad_wire_dtype: str = 'same'  # of the gradient; int8, int4: stochastically rounded
    topk: float = 0.1  # fraction of the entries that send=topk keeps
    recompute: bool = False  # compute MLPs and logits once more in backward: less memory
    compile: bool = False  # torch.compile what repeats; on one GPU alone, replay CUDA graphs

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_ff = self.n_ff or 64 * math.ceil(8 * self.n_embd / 3 / 64)
        self.vocab_size = self.vocab_size or 256
        self.rank_k = self.rank_k or max(1, round(2 * self.rank / 7))
        if self.wire_dtype == 'auto':
            self.wire_dtype = 'int4' if self.send == 'subspace' else 'compute'
        if self.grad_wire_dtype == 'same':
            self.grad_wire_dtype = self.wire_dtype

        for name, choices in CHOICES.items():
            value = getattr(self, name)
            check(value in choices, f'{name} ({value!r}) must be one of {", ".join(choices)}', name)
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd',
                     'n_ff', 'n_chunks', 'n_generators', 'rank', 'rope_base'):
            value = getattr(self, name)
            check(value >= 1, f'{name} ({value}) must be at least 1', name)
        for name, of, by in (('block_size', 'n_chunks', self.n_chunks),
                             ('n_embd', '2 * n_head', 2 * self.n_head),  # RoPE rotates pairs
                             ('n_head', 'n_kv_head', self.n_kv_head)):
            value = getattr(self, name)
            check(value % by == 0, f'{name} ({value}) must be a multiple of {of} ({by})', name,
                  of.split()[-1])
        check(0 < self.topk <= 1, f'topk ({self.topk}) must be above 0 and at most 1', 'topk')
        clip = self.theta_clip
        check(clip >= 0, f'theta_clip ({clip}) must be at least 0', 'theta_clip')
        for d, r in self.subspaces if self.send == 'subspace' else ():
            check(1 <= r <= d, f'rank ({self.rank}) must leave each subspace between 1 and {d} '
                  f'numbers, and one has {r}', 'rank', 'rank_k')
        check(self.compress_last or self.n_layer > 1 or self.send in ('full', 'local'),
              f'compress_last ({self.compress_last}) leaves nothing to compress when n_layer is '
              f'{self.n_layer}', 'compress_last', 'n_layer')

    @property
    def chunk_size(self):
        return self.block_size // self.n_chunks

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def subspaces(self):
        """(d, r) of each subspace: one for [K, V] together in R^2d, or one for K and one for V."""
        d = self.n_kv_head * self.head_dim  # width of all keys, and of all values, of a token
        apart = [(d, self.rank_k), (d, self.rank - self.rank_k)]
        return [(2 * d, self.rank)] if self.joint_kv else apart


# -----------------------------------------------------------------------------
# Codecs: what a layer's keys and values look like on the wire. kv is (B, T, 2, Hkv, hd), keys
# before RoPE and values; a payload is a tuple of tensors (B, T, ...) or (B, chunks, ...). One of
# your own needs `compress` and `expand`, and `params` if it learns something; autograd takes care
# of its gradients, also across the wire.

def _rotate_basis(theta, U0, AU0, AAU0):
    """
    R(theta) U0 with R(theta) = I + M + M^2/2, M = sum_l theta_l A_l: the paper's second-order
    exponential (Algorithm 1, step 3), without ever forming a d x d matrix.

    theta: (B, c, k), radians; U0: (d, r); AU0: (k, d, r) = A_l U0; AAU0: (k, k, d, r) = A_l A_m U0.
    Returns (B, c, d, r): one basis for each chunk.
    """
    first = torch.einsum('bcl,ldr->bcdr', theta, AU0)
    second = torch.einsum('bcl,bcm,lmdr->bcdr', theta, theta, AAU0)
    return U0 + first + second / 2


def aligned(x):
    """x (..., r) with zeros up to a multiple of 8: others miss a GPU's fast matrix products."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _compress(z, U):
    """Z_comp = Z U. z: (B, T, d); U: (d, r), or (B, c, d, r), one for each chunk -> (B, T, r)."""
    if U.dim() == 2:
        return (z @ aligned(U).to(z.dtype))[..., :U.shape[-1]].contiguous()
    return (z.unflatten(1, (U.shape[1], -1)) @ U.to(z.dtype)).flatten(1, 2)


def _expand(z, U):
    """Z_hat = Z_comp U^T, back from the subspace; U as in `compress`. z: (B, T, r) -> (B, T, d)."""
    if U.dim() == 2:
        return aligned(z) @ aligned(U).to(z.dtype).mT
    return (z.unflatten(1, (U.shape[1], -1)) @ U.to(z.dtype).mT).flatten(1, 2)


class Full(nn.Module):
    """Keys and values as they are. The base of all codecs: rounding to fewer bits stands here."""
    keep = False  # hold what arrived until backward? Too large: it is sent a second time
    n_rounded = 1  # how many of a payload's tensors, the first ones, are rounded
    params = ()  # the tensors that `expand` uses; reached any other way, they get no gradient

    def __init__(self, wire_dtype='compute', grad_wire_dtype='compute'):
        super().__init__()
        self.wire_dtype, self.grad_wire_dtype = wire_dtype, grad_wire_dtype

    def compress(self, kv):
        """kv (B, T, 2, Hkv, hd) -> payload"""
        return (kv,)

    def expand(self, payload, tokens, params):
        """payload, or the first part of one -> kv"""
        return payload[0]

    @kernels.fused
    def pack(self, tensors, gradient=False):
        """
        The payload, or the gradient of its floating-point tensors, as it travels. Integers have one
        scale for each row, which is the last dimension: a head of full keys and values, a token's
        numbers in a subspace. A gradient is rounded stochastically: nothing is lost on average.
        """
        dtype, n = self.grad_wire_dtype if gradient else self.wire_dtype, self.n_rounded
        if dtype == 'compute':
            return list(tensors)
        if dtype == 'bf16':
            return [*(t.to(torch.bfloat16) for t in tensors[:n]), *tensors[n:]]
        return [*(kernels.quantize(t, int(dtype[3:]), gradient) for t in tensors[:n]), *tensors[n:]]

    @kernels.fused
    def unpack(self, wire, sizes, dtype, gradient=False):
        """The inverse of `pack`. sizes, dtype: last dimensions and dtype of what was packed."""
        wire_dtype, n = self.grad_wire_dtype if gradient else self.wire_dtype, self.n_rounded
        if wire_dtype == 'compute':
            return list(wire)
        if wire_dtype == 'bf16':
            return [*(t.to(dtype) for t in wire[:n]), *wire[n:]]
        return [*(kernels.dequantize(t, int(wire_dtype[3:]), size, dtype)
                  for t, size in zip(wire[:n], sizes)), *wire[n:]]

    def wire_bytes(self, kv):
        """Bytes that kv, on the meta device, costs a rank it travels to: (forward, backward)."""
        payload = self.compress(kv)
        fwd = sum(t.nbytes for t in self.pack(payload))
        gradient = [t for t in payload if t.is_floating_point()]
        bwd = sum(t.nbytes for t in self.pack(gradient, gradient=True))
        return fwd, bwd if self.keep else fwd + bwd


class TopK(Full):
    """The largest entries of each token's key and of its value, and where they stood."""
    keep = True

    def __init__(self, config, *wire_dtypes):
        super().__init__(*wire_dtypes)
        self.shape = config.n_kv_head, config.head_dim
        self.n = max(1, round(config.topk * config.n_kv_head * config.head_dim))

    def compress(self, kv):
        kv = kv.flatten(3)  # (B, T, 2, d)
        where = kv.abs().topk(self.n, dim=-1).indices
        return kv.gather(-1, where), where.to(torch.int16 if kv.shape[-1] <= 2**15 else torch.int32)

    def expand(self, payload, tokens, params):
        values, where = payload
        zeros = values.new_zeros(*values.shape[:-1], self.shape[0] * self.shape[1])
        return zeros.scatter(-1, where.long(), values).unflatten(-1, self.shape)


class Basis(nn.Module):
    """
    One r-dimensional subspace of R^d, or a family of them, U(theta) = R(theta) U0 (Algorithm 1).

    basis=fixed: U0 alone. learned: U0 is a free parameter. rotated: R(theta) = exp(sum_l theta_l
    A_l) with fixed skew-symmetric A_l, and theta = psi(mean of the chunk's keys or values): a
    mixture of subspaces.
    """

    def __init__(self, d, r, config, rng):
        super().__init__()
        k, self.clip = config.n_generators, config.theta_clip or math.inf
        self.rotated = config.basis == 'rotated'
        U0 = torch.linalg.qr(torch.randn(d, r, generator=rng))[0].contiguous()
        self.U0 = nn.Parameter(U0, requires_grad=config.basis == 'learned')
        if self.rotated:
            self.psi = nn.Parameter(0.02 * torch.randn(k, d, generator=rng))
            S = torch.randn(k, d, d, generator=rng)
            order = 'fro' if config.generator == 'frobenius' else 2
            A = (S - S.mT) / torch.linalg.matrix_norm(S - S.mT, order, keepdim=True)
            self.register_buffer('A', A)
            # A_l U0 and A_l A_m U0: all that the second-order exponential needs
            self.register_buffer('AU0', torch.zeros(k, d, r))
            self.register_buffer('AAU0', torch.zeros(k, k, d, r))
            self.start(self.U0)

    @torch.no_grad()
    def start(self, U0):
        """Start the subspace in the given orthonormal directions (d, r)."""
        self.U0.copy_(U0)
        if self.rotated:
            self.AU0.copy_(self.A @ self.U0)
            self.AAU0.copy_(torch.einsum('lde,mer->lmdr', self.A, self.AU0))

    def theta(self, z, chunk_size):
        """How far to rotate, from each chunk's mean. z: (B, T, d) -> (B, c, k), radians."""
        mean = z.unflatten(1, (-1, chunk_size)).mean(dim=2)  # (B, c, d)
        return F.linear(mean, self.psi).to(mean.dtype).clamp(-self.clip, self.clip)

    @staticmethod
    def rotate(theta, U0, AU0, AAU0):
        """U(theta) = R(theta) U0. theta: (B, c, k) -> (B, c, d, r)."""
        device = 'cpu' if theta.is_meta else theta.device.type  # autocast knows no meta
        with torch.autocast(device, enabled=False):  # sender and receiver must find the same U
            return _rotate_basis(theta.to(U0.dtype), U0, AU0, AAU0)


class Subspace(Full):
    """
    Coordinates in a subspace: Z_comp = Z U with Z = [K, V] or one of them, and Z_hat = Z_comp U^T.
    The default, one learned U for both, gives what multi-head latent attention calls the latent.
    """
    keep = True

    def __init__(self, config, layer, *wire_dtypes):
        super().__init__(*wire_dtypes)
        self.shape, self.chunk_size = (config.n_kv_head, config.head_dim), config.chunk_size
        # random numbers of its own: the initial weights must not depend on what is sent
        rng = torch.Generator().manual_seed((torch.initial_seed() * 1000 + layer) % 2**63)
        self.bases = nn.ModuleList(Basis(d, r, config, rng) for d, r in config.subspaces)
        self.n_rounded = len(self.bases)  # theta is not

    @property
    def params(self):
        return tuple(t for b in self.bases
                     for t in ((b.U0, b.AU0, b.AAU0) if b.rotated else (b.U0,)))

    def compress(self, kv):
        zs = kv.flatten(-3).chunk(len(self.bases), dim=-1)  # [K, V] together, or K and V
        thetas = [b.theta(z, self.chunk_size) for b, z in zip(self.bases, zs) if b.rotated]
        Us = [b.rotate(t, b.U0, b.AU0, b.AAU0) for b, t in zip(self.bases, thetas)] or self.params
        return (*(_compress(z, U) for z, U in zip(zs, Us)), *thetas)

    def expand(self, payload, tokens, params):
        thetas = payload[len(self.bases):]
        Us = [Basis.rotate(theta, *params[3 * i:3 * i + 3]) for i, theta in enumerate(thetas)]
        zs = [_expand(z, U) for z, U in zip(payload, Us or params)]
        return (torch.cat(zs, -1) if zs[1:] else zs[0]).unflatten(-1, (2, *self.shape))


def principal_directions(moment, n):
    """
    An orthonormal basis (d, n) of the span of the top n eigenvectors of a second moment (d, d): the
    eigenvectors times a fixed random rotation. Along the eigenvectors themselves some numbers of a
    token would be far larger than others, and these, which share a scale with them, rounded to 0.
    """
    _, vectors = torch.linalg.eigh(moment.double())  # ascending
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return vectors[:, -n:] @ torch.linalg.qr(noise)[0].to(vectors.device)


# -----------------------------------------------------------------------------
# The model

class Norm(nn.RMSNorm):
    """RMSNorm, in autocast's dtype: rounded once, not by every matrix that multiplies it."""

    def forward(self, x):
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        return super().forward(x).to(torch.get_autocast_dtype(device) if autocast else x.dtype)


class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # the two W of Z = X W in the paper, of keys and of values
        self.c_kv = nn.Linear(config.n_embd, 2 * config.n_kv_head * config.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.full, self.override = Full(), ''  # see GPT.set_send
        dtypes = config.wire_dtype, config.grad_wire_dtype
        self.codec = {'full': lambda: Full(*dtypes), 'topk': lambda: TopK(config, *dtypes),
                      'subspace': lambda: Subspace(config, layer, *dtypes),
                      'local': lambda: None}[config.send]()
        if layer == config.n_layer - 1 and not config.compress_last and self.codec:
            self.codec = self.full

    @property
    def active_codec(self):
        """The codec in use now; None: nothing is sent."""
        return {'': self.codec, 'full': self.full, 'local': None}[self.override]

    def project(self, x, table):
        """
        x (B, T, n_embd), table (T, 2, hd) of its positions -> q (B, T, H, hd) and k
        (B, T, Hkv, hd) with RoPE, kv (B, T, 2, Hkv, hd), and the payload.
        """
        q = self.c_q(x).unflatten(-1, (-1, self.config.head_dim))
        kv = self.c_kv(x).unflatten(-1, (2, -1, self.config.head_dim))
        payload = self.active_codec.compress(kv) if self.active_codec else ()
        return kernels.rope(q, table), kernels.rope(kv[:, :, 0], table), kv, payload

    def attend(self, q, k, kv, payload, ring, table):
        """What comes between the projections; nothing else crosses the wire. -> (B, T, H, hd)"""
        T, codec = q.shape[1], self.active_codec
        span = self.config.chunk_size if self.config.exact_local or not codec else 0
        if type(codec) is Full and codec.wire_dtype == 'compute':
            span = T  # exact anyway: a rank's own shard in one piece, which is causal in its order
        params = codec.params if codec else ()
        return attend(ring, q, k, kv[:, :, 1], payload, codec, params, table, None, span)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.c_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


def recomputed(f, *args):
    """f(*args), keeping nothing of what f computes: backward computes it once more."""
    contexts = nullcontext(), kernels.compiling(kernels.is_compiling())
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: contexts)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.ln_1, self.attn = Norm(config.n_embd, eps=1e-5), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config.n_embd, eps=1e-5), MLP(config)

    @kernels.fused
    def before(self, x, table):
        return self.attn.project(self.ln_1(x), table)

    @kernels.fused
    def after(self, x, y):
        x = x + self.attn.c_proj(y.flatten(2))
        return x + self.mlp(self.ln_2(x))

    def forward(self, x, ring, table):
        """x: (B, T, n_embd); table: RoPE's, (world_size, T, 2, hd)."""
        y = self.attn.attend(*self.before(x, table[ring.rank]), ring, table)
        return recomputed(self.after, x, y) if self.config.recompute else self.after(x, y)


class GPT(nn.Module):
    """LLaMA-3-style decoder: RMSNorm, RoPE, SwiGLU, untied head, no biases; nanoGPT's interface."""
    loss_tokens = 8192  # of each sequence, whose logits exist at a time, with config.recompute

    def __init__(self, config, ring=None):
        super().__init__()
        self.config, self.ring = config, ring or Ring()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        table = kernels.rope_table(config.block_size, config.head_dim, config.rope_base)
        self.register_buffer('table', table, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and 'codec' not in name:
                residual = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None, n_targets=None):
        """
        idx, targets: (B, T) token numbers; -1 in targets is ignored. With a ring of several ranks
        they are this rank's shard (`ring.shard`).
        n_targets: how many targets all ranks of the ring have together; None: they are asked.

        Returns logits (B, T, vocab_size) and loss, the mean over targets. A rank of a ring has its
        share of it, times the number of ranks: the mean over ranks is the mean over the sequence.
        No loss (None) without targets, no logits (None) beside a loss with config.recompute.
        Raises ValueError if the sequence is too long, or a shard is no multiple of two chunks.
        """
        with kernels.compiling(self.config.compile):
            return self._forward(idx, targets, n_targets)

    def _forward(self, idx, targets, n_targets):
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x), None
        logits, losses = self.losses(x, targets)
        if n_targets is None:
            n_targets = (targets != -1).sum()
            if self.ring.world_size > 1:
                self.ring.all_reduce(n_targets, 'counting targets', group=self.ring.group)
        return logits, losses.sum() * self.ring.world_size / n_targets

    def hidden(self, idx):
        """All but the head: (B, T) -> (B, T, n_embd)."""
        n, world_size, config = idx.shape[1], self.ring.world_size, self.config
        check(n * world_size <= config.block_size, f'sequence length ({n * world_size}) is above '
              f'block_size ({config.block_size})', 'block_size')
        check(world_size == 1 or n % (2 * config.chunk_size) == 0, f'shard length ({n}) must be a '
              f'multiple of two chunks, 2 * block_size / n_chunks ({2 * config.chunk_size})',
              'block_size', 'n_chunks')
        # padding: later than every real token (but in the mean that is the paper's theta)
        idx = F.pad(idx, (0, -n % config.chunk_size))
        x, table = self.wte(idx), self.table_of(idx)
        for block in self.h:
            x = block(x, self.ring, table)
        return x[:, :n]

    def table_of(self, idx):
        """`kernels.rope_table` at every rank's positions: (world_size, T, 2, hd)."""
        P = self.ring.world_size
        return self.table[positions(idx.shape[1] * P, P, idx.device)]

    def logits(self, x):
        return self.lm_head(self.ln_f(x))  # (B, T, vocab_size)

    def losses(self, x, targets):
        """-> logits (None with config.recompute) and each token's loss (B, T), 0 if ignored."""
        if not self.config.recompute:
            return self._losses(x, targets)
        # a few tokens at a time: the logits of a long sequence are larger than all the rest
        pieces = zip(*(t.split(self.loss_tokens, dim=1) for t in (x, targets)))
        losses = [recomputed(lambda *piece: self._losses(*piece)[1], *piece) for piece in pieces]
        return None, torch.cat(losses, dim=1)

    @kernels.fused
    def _losses(self, x, targets):
        logits = self.logits(x)
        flat = logits.flatten(0, 1).to(kernels.accumulation_dtype(logits.dtype))
        losses = F.cross_entropy(flat, targets.flatten(), ignore_index=-1, reduction='none')
        return logits, losses.view(targets.shape)

    # -- a codec's life: warm start, on, unplugged

    def set_send(self, override=''):
        """Send what is configured (''), nothing ('local') or all, uncompressed ('full')."""
        for block in self.h:
            block.attn.override = override

    @property
    def bases(self):
        """Every `Basis` of the layers that send subspaces."""
        return [basis for block in self.h for basis in getattr(block.attn.codec, 'bases', ())]

    @torch.no_grad()
    def basis_moments(self, idx=None):
        """
        Second moments (d, d), one for each basis, whose principal directions are good to start
        with: of the weights, W^T W for Z = X W, as in the paper, or of the keys and values on a
        batch `idx` (this rank's shard; to sum over ranks is the caller's business).
        """
        moments = []
        x, table = (None, None) if idx is None else (self.wte(idx), self.table_of(idx))
        for block in self.h:
            c_kv, codec = block.attn.c_kv, block.attn.codec
            kv = c_kv.weight.T if idx is None else c_kv(block.ln_1(x)).flatten(0, 1)  # (n, 2 d)
            for z in kv.chunk(len(codec.bases), -1) if isinstance(codec, Subspace) else ():
                with torch.autocast(z.device.type, enabled=False):  # float32 at least
                    z = z.to(kernels.accumulation_dtype(z.dtype))
                    moments.append(z.T @ z)
            x = x if idx is None else block(x, self.ring, table)
        return moments

    # -- nanoGPT's interface

    def get_num_params(self, non_embedding=True):
        """Parameters, without the input embedding by default: it costs no FLOPs."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.wte.weight.numel()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, basis_lr=1.0):
        """
        AdamW; weight matrices decay, norms and the codecs' own parameters do not.
        basis_lr: the codecs' learning rate as a fraction of the others', kept as 'lr_scale'.
        """
        groups = [{'params': [], 'weight_decay': decay, 'lr_scale': scale,
                   'lr': learning_rate * scale}
                  for decay, scale in ((weight_decay, 1.0), (0.0, 1.0), (0.0, basis_lr))]
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups[2 if 'codec' in name else int(p.dim() < 2)]['params'].append(p)
        return torch.optim.AdamW(groups, betas=betas, fused=device_type == 'cuda')

    def flops_per_token(self):
        """
        Forward and backward: 6 per parameter, and for causal attention over T tokens 6 T n_embd a
        layer (12 T n_embd if nothing were masked; Chowdhery et al. 2022, appendix B). T is
        block_size, or a chunk while nothing is sent.
        """
        c = self.config
        spans = (c.block_size if block.attn.active_codec else c.chunk_size for block in self.h)
        return 6 * self.get_num_params() + 6 * c.n_embd * sum(spans)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Model FLOPs utilisation: sequences an iteration, its seconds, FLOP/s of all devices."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T) on this process alone -> (B, T + max_new_tokens)."""
        alone = copy.copy(self)  # the same weights
        alone.ring, alone.config = Ring(), dataclasses.replace(self.config, compile=False)
        for _ in range(max_new_tokens):
            logits = alone(idx[:, -self.config.block_size:])[0][:, -1].float() / temperature
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                logits[logits < kth] = float('-inf')
            new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, new), dim=1)
        return idx


class Loss(nn.Module):
    """A model's loss alone: what a training step needs of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model(*batch)[1]


class _Replay(torch.autograd.Function):
    """The loss of a replayed step, whose backward hands out gradients that are already there."""

    @staticmethod
    def forward(ctx, loss, gradients, *params):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss):  # as new tensors: the next replay writes over the old ones
        return None, None, *torch._foreach_mul(ctx.gradients, dloss)


class graphed:
    """
    A function (idx, targets) -> loss of a model, whose forward and backward are one CUDA graph,
    because to launch the kernels of a small model takes longer than they do. For batches of these
    shapes and what is sent now, under an autocast that does not cache. Not over a dialled link,
    which waits on the host. Destroy it before the process group: NCCL waits for its graphs.
    """

    def __init__(self, model, idx, targets):
        self.model, self.batch, meter = model, (idx.clone(), targets.clone()), model.ring.meter
        self.params = [p for p in model.parameters() if p.requires_grad]
        before, stream = Counter(meter), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at first use: compiled code, communicators
            for _ in range(3):
                found = self.step()[1]
        torch.cuda.synchronize()
        self.params = [p for p, g in zip(self.params, found) if g is not None]
        del found
        meter.clear()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog, another thread, goes on asking after finished exchanges
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode='thread_local'):
            self.loss, self.gradients = self.step()
        self.counted = Counter(meter)  # by one step: a replay does not pass through Python
        meter.clear()
        meter.update(before)

    def step(self):
        loss = self.model(*self.batch)[1]
        return loss.detach(), torch.autograd.grad(loss, self.params, allow_unused=True)

    def __call__(self, *batch):
        torch._foreach_copy_(self.batch, batch)
        self.graph.replay()
        self.model.ring.meter.update(self.counted)
        return _Replay.apply(self.loss, self.gradients, *self.params)


# -----------------------------------------------------------------------------
# `python mos_cp.py`: a training step on one process

def _plain(model, idx, targets):
    """The model as one would write it without a ring: F.scaled_dot_product_attention. -> loss"""
    x = model.wte(idx)
    for block in model.h:
        q, k, kv, _ = block.before(x, model.table)
        heads = (t.transpose(1, 2) for t in (q, k, kv[:, :, 1]))
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = block.after(x, y.transpose(1, 2))
    return model._losses(x, targets)[1].mean()


def _milliseconds(config, batch_size, device, plain=False):
    """Of a step, forward, backward and AdamW, in bf16: median of 6, after 4 to warm up."""
    gc.collect()  # the last call's CUDA graph, whose memory hangs in cycles
    torch.manual_seed(0)
    model = GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device)
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size), device=device)
    autocast = torch.autocast(device, torch.bfloat16, cache_enabled=False)
    f = functools.partial(torch.compile(_plain), model) if plain else Loss(model)
    if config.compile and device == 'cuda':
        with autocast:
            f = graphed(model, x, y)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        with autocast:
            loss = f(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for all of it
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[4:])


def _benchmark():
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = {'6 x 512, T 2048, B 16': (dict(n_layer=6, n_head=8, n_embd=512, block_size=2048), 16),
            '124m, T 16384, B 1': (dict(n_layer=12, n_head=12, n_embd=768, block_size=16384), 1),
            '800m, T 32768, B 1': (dict(n_layer=8, n_head=8, n_embd=2048, n_ff=8192,
                                        block_size=32768), 1)}
    if device == 'cpu':
        rows = {'tiny, T 1024, B 4': ({}, 4)}
    print(f'{torch.cuda.get_device_name() if device == "cuda" else "CPU"}, torch '
          f'{torch.__version__}, bf16, compiled; ms a step, and the share of the plain model in '
          'speed\n\n| model | plain | full | 128 numbers of 8 bits |\n' + '|---' * 4 + '|')
    for name, (sizes, batch_size) in rows.items():
        plain = _milliseconds(GPTConfig(send='local', **sizes), batch_size, device, plain=True)
        ours = [_milliseconds(GPTConfig(compile=True, **codec, **sizes), batch_size, device)
                for codec in (dict(send='full'), dict(rank=128, wire_dtype='int8'))]
        cells = [f'{plain:.1f}', *(f'{t:.1f} ({plain / t:.0%})' for t in ours)]
        print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    _benchmark()
