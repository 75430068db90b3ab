"""
The method and the model: what workers send each other instead of keys and values, and a small
LLaMA-style GPT whose attention runs over a ring of them ("Mixtures of Subspaces for Bandwidth
Efficient Context Parallel Training", Ramasinghe et al., NeurIPS 2025, arXiv 2606.16384; "the paper"
below).

    config = GPTConfig(block_size=256, n_layer=3, n_head=4, n_embd=96)
    model = GPT(config)                     # one process: the reference
    logits, loss = model(idx, targets)      # (B, T, vocab_size), mean cross-entropy

With `GPT(config, Ring(group))` every rank makes the same call with the same sequences, computes the
part that `ring.shard` gives it, and all together get the same logits and loss: they depend on
config.n_chunks, never on how many ranks share the chunks. So do gradients, where they are not
rounded on their way.
"""
import dataclasses
import math
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from ring import Ring, attend, average, positions

# -----------------------------------------------------------------------------
# What crosses the wire. A codec turns a layer's input, or its keys and values kv (B, T, 2, Hkv,
# hd), keys before RoPE, into a payload, a tuple of tensors (B, T, ...) or (B, chunks, ...), and
# that into kv. Every rank has the same weights (with --sync_every, until they drift apart).

class Full(nn.Module):
    """
    Keys and values as they are. The base of all codecs. One of your own needs `compress` and
    `expand`, and an entry in CODECS; rounding to fewer bits, and gradients across the wire, come
    for free. If it learns something (it has random numbers of its own, which change no others'):

        class LowRank(Full):
            keep = True

            def __init__(self, config, layer):
                super().__init__(config, layer)
                self.E = nn.Parameter(0.1 * torch.randn(config.n_embd, config.latent_dim))
                self.D = nn.Parameter(0.1 * torch.randn(config.latent_dim, config.n_embd))

            def compress(self, x, kv, known):
                return (x @ self.E,)

            def weights(self, W):
                return (self.D @ W.T,)

            def expand(self, payload, known, weights):
                (z,), (D_W,) = payload, weights
                return (z @ D_W).unflatten(-1, self.shape)

    `compress` runs under ordinary autograd. `expand` runs inside ring attention, forward and once
    more in backward, and sees nothing but its arguments: a parameter that it read from self would
    get no gradient. So what learns there is returned by `weights`.
    """
    keep = False  # True, for small payloads: held until backward. False: sent once more then
    feeds_above = False  # True, with keep: what arrives, (B, T, r), joins `known` of layers above

    def __init__(self, config, layer):
        super().__init__()
        self.wire_dtype, self.grad_wire_dtype = config.wire_dtype, config.grad_wire_dtype
        self.config, self.shape = config, (2, config.n_kv_head, config.head_dim)

    def weights(self, W):
        """
        The tensors that `expand` needs, made once a forward pass from parameters and from W (2 d,
        n_embd), with which an input x has keys and values W x.
        """
        return ()

    def compress(self, x, kv, known):
        """
        The layer's input x (B, T, n_embd), normed, kv = W x (B, T, 2, Hkv, hd), and what every rank
        knows of these tokens (B, T, 1 + n_below): a 1, and what arrived for the layers below with
        `feeds_above`, which gets gradients -> payload.
        """
        return (kv,)

    def expand(self, payload, known, weights):
        """Payload and `known` of some rank's T tokens, a shard or its front half -> kv."""
        return payload[0]

    @kernels.fused
    def pack(self, tensors, gradient=False):
        """
        The payload, or the gradient of its floating-point tensors, as it travels. int8 and int4
        have one scale for each row, which is the last dimension: a head of full keys and values, z
        of a token. In these, gradients are rounded at random: nothing is lost on average.
        """
        dtype = self.grad_wire_dtype if gradient else self.wire_dtype
        return [kernels.encode(t, dtype, stochastic=gradient) if t.is_floating_point() else t
                for t in tensors]

    @kernels.fused
    def unpack(self, wire, sizes, dtype, gradient=False):
        """
        The inverse of `pack` -> floating-point tensors in `dtype`. sizes: last dimensions of what
        was packed; None: it was no floating-point tensor, and came as it is.
        """
        wire_dtype = self.grad_wire_dtype if gradient else self.wire_dtype
        return [t if size is None else kernels.decode(t, wire_dtype, size, dtype)
                for t, size in zip(wire, sizes)]


class Mixture(Full):
    """
    What the layers below have not said, in r numbers; with k > 0 what they said also turns the
    subspace that the numbers span. Of a token whose key and value are [K, V] = W x (W: the layer's
    c_kv, x: its normed input, in R^n):

        known    y = [1, z', z'', .., u', u'', ..]      z: of all layers below, as it arrived; u: z
                                                        of the token before, 0 at a chunk's start
        guess    g = A y                                (guess_below; without it y = [1])
        mixture  theta = c tanh(S y)                    k numbers (n_generators), c = theta_max
                 E(theta) = E_0 + sum_i theta_i E_i     each E_i: (n, r), r numbers (latent_dim);
                                                        D(theta) likewise
        send     z = E(theta)^T (x - g)                 in 4 bits and a scale, by default
        rebuild  [K, V] = W (g + D(theta) z)

    Every rank has W, and has received z of the layers below. So guess and theta cost no byte, and
    what is rebuilt moves with W as W learns. W gets gradients from every rebuilt key and value too;
    z of a layer below gets those of all layers above, and they travel once, with its own layer's.
    Why u: to find where a text repeats, a key must tell which token came before (induction heads,
    Olsson et al. 2022). A, S, E_i and D_i are learned; k = 0 is one learned subspace.
    """
    keep = True
    theta_max = 0.2

    def __init__(self, config, layer):
        super().__init__(config, layer)
        n, r, k = config.n_embd, config.latent_dim, config.n_generators
        self.feeds_above = config.guess_below
        n_known = 8 * math.ceil((1 + 2 * r * layer * config.guess_below) / 8)  # of y, aligned
        # a mixture begins as the one subspace it contains: E_i and D_i are 0
        E_0 = torch.linalg.qr(torch.randn(n, r))[0]
        self.E = nn.Parameter(F.pad(E_0[:, None], (0, 0, 0, k)))  # (n, 1 + k, r)
        self.D = nn.Parameter(self.E.detach().clone())
        self.A = nn.Parameter(torch.zeros(n, n_known))
        self.S = nn.Parameter(torch.randn(k, n_known), requires_grad=k > 0)

    def y(self, known):
        """known (B, T, 1 + n_below) -> y (B, T, 1 + 2 n_below, and zeros up to a multiple of 8)"""
        before = known[..., 1:].unflatten(1, (-1, self.config.chunk_size))[:, :, :-1]
        return aligned(torch.cat((known, F.pad(before, (0, 0, 1, 0)).flatten(1, 2)), dim=-1))

    def shares(self, y, S):
        """
        How much of each E_i and D_i is in E(theta) and D(theta), 1 and theta: y (B, T, ny),
        S (k, ny) -> (B, T, 1 + k, 1), or what broadcasts to it.
        """
        if not len(S):  # no mixture: nothing to compute, and no gradient
            return y.new_ones(1, 1, 1, 1)
        theta = self.theta_max * F.linear(y, S.to(y.dtype)).tanh()
        return F.pad(theta, (1, 0), value=1.0).unsqueeze(-1)

    def weights(self, W):
        # W (A y + D(theta) z) = W [A, D_0, D_1, ..] [y, z, theta_1 z, ..]
        return W @ aligned(torch.cat((self.A, self.D.flatten(1)), dim=1)), self.S

    def compress(self, x, kv, known):
        y, E = self.y(known), aligned(self.E.flatten(1))
        # E_i^T (x - A y) for each i, without A y itself, which is as large as x: (B, T, 1 + k, r)
        zs = x @ E.to(x.dtype) - y @ (self.A.T @ E).to(x.dtype)
        zs = zs[..., :self.E[0].numel()].unflatten(-1, self.E.shape[1:])
        # without dtype autocast makes it float32 on GPUs
        return ((self.shares(y, self.S) * zs).sum(dim=2, dtype=x.dtype),)

    def expand(self, payload, known, weights):
        (z,), (W_AD, S), y = payload, weights, self.y(known)
        zs = (self.shares(y, S) * z.unsqueeze(2)).flatten(2)  # z, theta_1 z, .. (B, T, (1 + k) r)
        y_z = aligned(torch.cat((y, zs), dim=-1))
        return F.linear(y_z, W_AD.to(z.dtype)).unflatten(-1, self.shape)

    def moment(self, x, known):
        """
        For `start`: of a rank's x (B, T, n_embd) and what is known of them (B, T, 1 + n_below) the
        sum of [x, y] [x, y]^T over tokens. float32 at least.
        """
        with torch.autocast(x.device.type, enabled=False):
            dtype = kernels.accumulation_dtype(x.dtype)
            rows = torch.cat((x.to(dtype), self.y(known.to(dtype))), dim=-1).flatten(0, 1)
            return rows.T @ rows

    @torch.no_grad()
    def start(self, W, moment):
        """
        From the `moment` of many tokens, or its mean over ranks: the guess becomes the ridge
        regression of x on y, E_0 and D_0 what is best for W of the rest. S y becomes 1 or less.
        """
        n = len(self.A)
        C, W = moment.double() / moment[n, n], W.double()  # means over tokens, as y_0 = 1
        xy, yy = C[:n, n:], C[n:, n:]
        R = regression(xy, yy)
        left_of_x = C[:n, :n] - R @ xy.T - xy @ R.T + R @ yy @ R.T
        E_0, D_0 = bottleneck(left_of_x, W, self.E.shape[-1])
        self.A.copy_(R)
        self.S.mul_((len(yy) * yy.diagonal() + 1e-6).rsqrt())
        for family, subspace in ((self.E, E_0), (self.D, D_0)):
            family.zero_()
            family[:, 0] = subspace


class Paper(Full):
    """
    Algorithm 1 of the paper as published. For keys and for values, Z = W x in R^d of a token:

        theta = psi(mean of Z over a chunk)                clipped to theta_max; k numbers
        U(theta) = (I + M + M^2 / 2) U_0                   M = sum_l theta_l G_l: a rotation to
        send     Z_c = U(theta)^T Z, theta                 second order. G_l: frozen, random, skew-
        rebuild  Z = U(theta) Z_c                          symmetric, |G_l| = 1 (Frobenius)

    r = 2/7 of latent_dim for keys, the rest for values. psi is learned, U_0 (d, r) is frozen: from
    `start` on it spans the principal directions of W's columns. A chunk's later tokens move theta.
    """
    keep = True
    theta_max = 0.5

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.k, d = config.n_generators, math.prod(self.shape[1:])
        self.seed = torch.initial_seed()  # of this layer's codec
        self.U, self.psi = nn.ParameterList(), nn.ParameterList()
        for r in config.paper_dims:
            U_0 = torch.linalg.qr(torch.randn(d, r))[0]
            self.U.append(nn.Parameter(self.rotated(U_0), requires_grad=False))
            if self.k:
                self.psi.append(nn.Parameter(0.02 * torch.randn(self.k, d)))

    def rotated(self, U_0):
        """U_0 (d, r) -> (d, 1 + k + k^2, r): U_0, G_l U_0, G_l G_m U_0 / 2; the same G always."""
        generator = torch.Generator().manual_seed(self.seed)
        S = torch.randn(self.k, len(U_0), len(U_0), generator=generator).to(U_0)
        G = (S - S.mT) / torch.linalg.matrix_norm(S - S.mT, keepdim=True)  # Frobenius
        first = torch.einsum('lde,er->dlr', G, U_0)
        second = torch.einsum('lde,emr->dlmr', G, first).flatten(1, 2) / 2
        return torch.cat((U_0[:, None], first, second), dim=1)

    def weights(self, W):
        return tuple(self.U)

    def theta(self, Z, psi):
        """Z (B, T, d) -> (B, chunks, k)"""
        mean = Z.unflatten(1, (-1, self.config.chunk_size)).mean(dim=2)
        return F.linear(mean, psi).to(Z.dtype).clamp(-self.theta_max, self.theta_max)

    def share(self, theta, T):
        """theta (B, chunks, k) -> how much of each matrix is in U(theta): (B, T, 1 + k + k^2, 1)"""
        theta = theta.repeat_interleave(T // theta.shape[1], dim=1)
        products = (theta[..., :, None] * theta[..., None, :]).flatten(2)
        return F.pad(torch.cat((theta, products), dim=-1), (1, 0), value=1.0).unsqueeze(-1)

    def compress(self, x, kv, known):
        T, sent, thetas = kv.shape[1], [], []
        for i, (Z, U) in enumerate(zip(kv.flatten(3).unbind(2), self.U)):  # (B, T, d)
            Z_c = (Z @ aligned(U.flatten(1)).to(Z.dtype))[..., :U[0].numel()]
            if self.k:
                thetas.append(self.theta(Z, self.psi[i]))
                Z_c = self.share(thetas[i], T) * Z_c.unflatten(-1, U.shape[1:])
                Z_c = Z_c.sum(dim=2, dtype=Z.dtype)
            sent.append(Z_c.contiguous())
        return *sent, *thetas

    def expand(self, payload, known, weights):
        kv, thetas = [], payload[2:]
        for i, (Z_c, U) in enumerate(zip(payload[:2], weights)):
            if self.k:
                Z_c = (self.share(thetas[i], Z_c.shape[1]) * Z_c.unsqueeze(2)).flatten(2)
            kv.append(aligned(Z_c) @ aligned(U.flatten(1)).to(Z_c.dtype).mT)
        return torch.stack(kv, dim=2).unflatten(-1, self.shape[1:])

    @torch.no_grad()
    def start(self, W, moment):
        """From the weights alone: U_0 becomes the principal directions of the columns of W."""
        for U, half in zip(self.U, W.double().chunk(2)):
            U_0, _ = bottleneck(half @ half.T, torch.eye(len(half)).to(half), U.shape[-1])
            U.copy_(self.rotated(U_0))


def regression(xy, yy):
    """
    Ridge regression from sums xy = sum of x y^T, yy = sum of y y^T, whose first y is 1: R = argmin
    sum |x - R y|^2 + 0.01 sum_i |R_i|^2 yy_ii, where the first, the constant's, is not penalised.
    """
    ridge = 0.01 * yy.diagonal() + 1e-6
    ridge[0] = 1e-6
    return torch.linalg.solve(yy + ridge.diag(), xy.T).T


def bottleneck(M, W, r):
    """
    How r numbers say most of x to W: E and D (n, r) that minimise the sum of |W (x - D E^T x)|^2
    over all x with M = sum of x x^T (n, n), W (w, n); float64. |E| = sqrt(r), as if its columns
    were orthonormal, which they are if W is the identity.
    """
    # 1. W D E^T x is W x in its r principal directions V: so E^T x = V^T W x. Along V itself some
    #    numbers of a token would be far larger than others, which share a scale with them and
    #    would be rounded to 0. So V is turned by a fixed random rotation.
    _, vectors = torch.linalg.eigh(W @ M @ W.T)  # ascending
    noise = torch.randn(r, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    E = W.T @ (vectors[:, -r:] @ torch.linalg.qr(noise)[0].to(W.device))
    # 2. D: the regression of x on E^T x
    D = M @ E @ torch.linalg.pinv(E.T @ M @ E, rtol=1e-9, hermitian=True)
    scale = E.norm() / math.sqrt(r)
    return E / scale, D * scale


def aligned(x):
    """x (..., r) with zeros up to a multiple of 8: others miss a GPU's fast matrix products."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


CODECS = {'mixture': Mixture, 'paper': Paper, 'full': Full, 'local': None}  # the values of --send
# how to add one of your own stands in README.md


# -----------------------------------------------------------------------------
# Configuration

CHOICES = {  # the values an option takes; train.py's flags check against these too
    'send': CODECS,
    'wire_dtype': ('auto', 'compute', 'bf16', 'int8', 'int4'),
    'grad_wire_dtype': ('same', 'compute', 'bf16', 'int8', 'int4'),
}


def check(holds, says, *flags):
    """Raises ValueError with a sentence, and the flags to change, unless something holds."""
    if not holds:
        raise ValueError(f'{says}: change {" or ".join("--" + flag for flag in flags)}')


@dataclasses.dataclass
class GPTConfig:
    """The model and what it sends. (The comments are what `train.py --help` says.)"""
    block_size: int = 256  # context length in tokens, over all ranks of a ring together
    n_chunks: int = 16  # chunks of the context, a multiple of 2 * cp; results depend on it, not cp
    vocab_size: int = 0  # vocabulary; 0: 256 for text, 50304 for .bin (GPT-2's, rounded up)
    n_layer: int = 3  # layers
    n_head: int = 4  # query heads
    n_kv_head: int = 0  # key and value heads (grouped-query attention); 0: n_head
    n_embd: int = 96  # width
    n_ff: int = 0  # width of the SwiGLU; 0: 8/3 n_embd, rounded up to a multiple of 64
    rope_base: float = 500000.0  # base of the rotary embedding's frequencies
    send: str = 'mixture'  # mixture (ours), paper, full (uncompressed), or local (nothing)
    latent_dim: int = 16  # numbers sent for a token and layer, its key and value together
    n_generators: int = 0  # how many matrices theta mixes into the subspace; 0: one subspace
    guess_below: bool = True  # guess from what layers below sent of a token and the one before
    exact_local: bool = True  # a chunk's own keys and values are exact; False (the paper): rebuilt
    compress_last: bool = True  # False (the paper): the last layer sends full keys and values
    wire_dtype: str = 'auto'  # compute, bf16, int8, int4; auto: int4 for mixture, else compute
    grad_wire_dtype: str = 'same'  # of the gradient; int8, int4: stochastically rounded
    recompute: bool = False  # compute MLPs and logits once more in backward: less memory
    compile: bool = False  # torch.compile what repeats; on GPUs, replay a step as a CUDA graph

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_ff = self.n_ff or 64 * math.ceil(8 * self.n_embd / 3 / 64)
        self.vocab_size = self.vocab_size or 256
        if self.wire_dtype == 'auto':
            self.wire_dtype = 'int4' if self.send == 'mixture' else 'compute'
        if self.grad_wire_dtype == 'same':
            self.grad_wire_dtype = self.wire_dtype

        for name, choices in CHOICES.items():
            value = getattr(self, name)
            check(value in choices, f'{name} ({value!r}) must be one of {", ".join(choices)}', name)
        for name in (f.name for f in dataclasses.fields(self) if f.type is int):
            value, lowest = getattr(self, name), int(name != 'n_generators')
            check(value >= lowest, f'{name} ({value}) must be at least {lowest}', name)
        for name, of, by in (('block_size', 'n_chunks', self.n_chunks),
                             ('n_embd', '2 * n_head', 2 * self.n_head),  # RoPE rotates pairs
                             ('n_head', 'n_kv_head', self.n_kv_head)):
            value = getattr(self, name)
            check(value % by == 0, f'{name} ({value}) must be a multiple of {of} ({by})', name,
                  of.split()[-1])
        check(0 < self.rope_base < math.inf, f'rope_base ({self.rope_base}) must be above 0 and '
              'finite', 'rope_base')
        d = self.n_kv_head * self.head_dim  # width of all keys, and of all values, of a token
        most = min(self.n_embd, 2 * d)  # all that keys and values can say of x
        check(self.send != 'mixture' or self.latent_dim <= most,
              f'latent_dim ({self.latent_dim}) must be at most {most}', 'latent_dim')
        check(self.send != 'paper' or 1 <= min(self.paper_dims) <= max(self.paper_dims) <= d,
              f'latent_dim ({self.latent_dim}) must leave keys and values between 1 and {d} '
              f'numbers each, not {self.paper_dims}', 'latent_dim')
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
    def paper_dims(self):
        """Numbers sent for a token's key and for its value, with send=paper: as 2 to 5."""
        r_k = max(1, round(2 * self.latent_dim / 7))
        return r_k, self.latent_dim - r_k


# -----------------------------------------------------------------------------
# The model

class Norm(nn.RMSNorm):
    """RMSNorm, in autocast's dtype: rounded once, not by every matrix that multiplies it."""

    def forward(self, x):
        y, device = super().forward(x), x.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # W of [K, V] = W x: the paper's two, of keys and of values, one above the other
        self.c_kv = nn.Linear(config.n_embd, 2 * config.n_kv_head * config.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.plain = Full(config, layer)  # for --warm_send=full, --unplug_at, --compress_last=False
        self.plain.wire_dtype = self.plain.grad_wire_dtype = 'compute'
        kind = CODECS[config.send]
        if kind is None:
            self.codec = None
        elif not config.compress_last and layer == config.n_layer - 1:
            self.codec = self.plain
        else:
            # random numbers of its own: the initial weights must not depend on what is sent
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed((torch.initial_seed() * 1000 + layer) % 2**63)
                self.codec = kind(config, layer)

    @property
    def active(self):
        """The codec in use now, see GPT.set_send; None: nothing is sent."""
        if self.sends == 'local':
            return None
        return self.plain if self.sends == 'full' else self.codec

    @kernels.fused
    def project(self, x, norm, angles):
        """
        x (B, T, n_embd) before its norm, angles (T, 2, hd) of its positions -> normed; q (B, T, H,
        hd) and k (B, T, Hkv, hd) with RoPE; kv (B, T, 2, Hkv, hd), keys before it.
        """
        x = norm(x)
        q = self.c_q(x).unflatten(-1, (-1, self.config.head_dim))
        kv = self.c_kv(x).unflatten(-1, (2, -1, self.config.head_dim))
        return x, kernels.rope(q, angles), kernels.rope(kv[:, :, 0], angles), kv

    def forward(self, x, norm, ring, where, below):
        """-> (B, T, n_embd) before c_proj, and `below` with what arrived (`Full.feeds_above`)."""
        c, codec, T = self.config, self.active, x.shape[1]

        def angles(rank, n):  # of one shard at a time
            return kernels.rope_angles(where[rank, :n], c.head_dim, c.rope_base)

        def rebuild(payload, known, weights, source, n):
            keys, values = codec.expand(payload, known, weights).unbind(2)
            return kernels.rope(keys, angles(source, n)), values
        x, q, k, kv = self.project(x, norm, angles(ring.rank, T))
        payload, weights, known = (), (), below.to(x.dtype)
        if codec:
            payload = codec.compress(x, kv, known[ring.rank])
            weights = codec.weights(self.c_kv.weight)
        span = c.chunk_size if c.exact_local or not codec else 0
        if type(codec) is Full and codec.wire_dtype == 'compute':
            span = T  # exact: the own shard is one causal piece, nothing of it is rebuilt
        y, *arrived = attend(ring, q, k, kv[:, :, 1], payload, known, weights, codec, rebuild, span)
        return y.flatten(2), torch.cat((below, *arrived), dim=-1) if arrived else below


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
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.ln_1, self.attn = Norm(config.n_embd, eps=1e-5), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config.n_embd, eps=1e-5), MLP(config)

    @kernels.fused
    def after(self, x, y):
        x = x + self.attn.c_proj(y)
        return x + self.mlp(self.ln_2(x))

    def forward(self, x, ring, where, below):
        """
        x (B, T, n_embd): this rank's shard. Of every rank's: positions (world_size, T), and what
        all know, `below` (world_size, B, T, 1 + n_below) -> x, and `below` with what arrived for
        this layer.
        """
        y, below = self.attn(x, self.ln_1, ring, where, below)
        x = recomputed(self.after, x, y) if self.config.recompute else self.after(x, y)
        return x, below


class GPT(nn.Module):
    """LLaMA-3-style decoder: RMSNorm, RoPE, SwiGLU, untied head, no biases; nanoGPT's interface."""
    loss_tokens = 8192  # of each sequence, whose logits exist at a time, with config.recompute

    def __init__(self, config, ring=None):
        super().__init__()
        self.config, self.ring = config, ring or Ring()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.set_send('codec')
        # blocks whose codecs have something to start
        self.started = [block for block in self.h if hasattr(block.attn.codec, 'start')]
        self.ln_f = Norm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and 'codec' not in name:
                residual = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None):
        """
        idx, targets: (B, T) token numbers, the whole sequences, the same on every rank of a ring; a
        rank computes its shard of them, T / world_size tokens (`ring.shard`). -1 in targets is
        ignored.

        Returns logits (B, T / world_size, vocab_size) and loss, the mean over targets. A rank of a
        ring has its share of it, times the number of ranks: the mean over ranks is the mean over
        the sequence. No loss (None) without targets, no logits (None) beside a loss with
        config.recompute.
        Raises ValueError if the sequence is too long, or cannot be shared out in chunks.
        """
        kernels.compile_fused(self.config.compile)
        x = self.hidden(idx, self.ring)
        if targets is None:
            return self.lm_head(self.ln_f(x)), None
        mine = self.ring.shard(targets, self.config.chunk_size)
        if self.config.recompute:
            losses = [recomputed(self.losses, *piece)[1]  # a piece's logits go at once
                      for piece in self.pieces(x, mine)]
            logits, losses = None, torch.cat(losses, dim=1)
        else:
            logits, losses = self.losses(x, mine)
        return logits, losses.sum() * self.ring.world_size / (targets != -1).sum()

    def inputs(self, idx, ring):
        """
        Whole sequences (B, T) -> embeddings x (B, T / world_size, n_embd) of this rank's shard;
        positions (world_size, T / world_size) of every rank's; and `below`, what all know of these
        before the first layer: a 1 (world_size, B, T / world_size, 1), float32 at least.
        """
        n, c = idx.shape[1], self.config
        check(n <= c.block_size, f'sequence length ({n}) is above block_size ({c.block_size})',
              'block_size')
        if ring.world_size == 1:  # padding: only means see it, of a chunk (`Paper`), at a start
            idx = F.pad(idx, (0, -n % c.chunk_size))
        ring.check(idx.shape[1], c.chunk_size)
        where = positions(idx.shape[1], ring.world_size, idx.device)
        x = self.wte(idx[:, where[ring.rank]])
        return x, where, x.new_ones(ring.world_size, *x.shape[:2], 1)

    def hidden(self, idx, ring):
        """All but the head: (B, T) -> (B, T / world_size, n_embd)."""
        x, where, below = self.inputs(idx, ring)
        for block in self.h:
            x, below = block(x, ring, where, below)
        return x[:, :idx.shape[1]]  # without the padding

    def pieces(self, *tensors):
        """A few tokens at a time: the logits of a long sequence are larger than all the rest."""
        return zip(*(t.split(self.loss_tokens, dim=1) for t in tensors))

    @kernels.fused
    def losses(self, x, targets):
        """-> logits (B, T, vocab_size) and each token's loss (B, T), 0 if ignored."""
        logits = self.lm_head(self.ln_f(x))
        flat = logits.flatten(0, 1).to(kernels.accumulation_dtype(logits.dtype))
        losses = F.cross_entropy(flat, targets.flatten(), ignore_index=-1, reduction='none')
        return logits, losses.view(targets.shape)

    @torch.no_grad()
    def evaluate(self, idx, targets):
        """
        Of whole sequences (B, T), as in `forward` -> of this rank's shard each token's loss, 0 if
        ignored, and whether the target is the likeliest token: (B, T / world_size) each.
        """
        kernels.compile_fused(self.config.compile)
        losses, right = [], []
        mine = self.ring.shard(targets, self.config.chunk_size)
        for x, y in self.pieces(self.hidden(idx, self.ring), mine):
            logits, piece = self.losses(x, y)
            losses.append(piece)
            right.append(logits.argmax(-1) == y)
        return torch.cat(losses, dim=1), torch.cat(right, dim=1)

    # -- a codec's life: warm start, on, unplugged

    def set_send(self, send):
        """Send nothing from now on ('local'), all ('full'), or what config says ('codec')."""
        self.sends = send
        for block in self.h:
            block.attn.sends = send

    def get_extra_state(self):  # in state_dict: what is sent belongs to the model
        return self.sends

    set_extra_state = set_send

    @torch.no_grad()
    def start_codecs(self, batches):
        """
        Start the codecs, from the lowest layer to the highest, in one forward pass over `batches`,
        a list of idx (B, T) as in `forward`: means are over all of them and all ranks of the run.
        """
        self.set_send('codec')
        kernels.compile_fused(False)
        streams = [self.inputs(idx, self.ring) for idx in batches]
        for block in self.h:
            codec, moment = block.attn.codec, None
            if hasattr(codec, 'moment'):
                moment = sum(codec.moment(block.ln_1(x), below[self.ring.rank])
                             for x, _, below in streams)
                average([moment], self.ring)
            if block in self.started:
                codec.start(block.attn.c_kv.weight, moment)
            for i, (x, where, below) in enumerate(streams):
                x, below = block(x, self.ring, where, below)
                streams[i] = x, where, below

    # -- nanoGPT's interface

    def get_num_params(self, non_embedding=True):
        """Parameters, without the input embedding by default: it costs no FLOPs."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.wte.weight.numel()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW; weight matrices decay, norms and the codecs' own parameters (`codec`) do not."""
        decay, no_decay, codec = [], [], []
        for name, p in self.named_parameters():
            if p.requires_grad:
                group = codec if 'codec' in name else decay if p.dim() >= 2 else no_decay
                group.append(p)
        groups = [dict(params=decay, weight_decay=weight_decay, codec=False),
                  dict(params=no_decay, weight_decay=0.0, codec=False),
                  dict(params=codec, weight_decay=0.0, codec=True)]
        return torch.optim.AdamW(groups, learning_rate, betas=betas, fused=device_type == 'cuda')

    def flops_per_token(self):
        """
        Of the model without its codecs, forward and backward: 6 per parameter, and for causal
        attention over T tokens 6 T n_embd a layer (12 T n_embd if nothing were masked; Chowdhery et
        al. 2022, appendix B). T is block_size, or a chunk while nothing is sent.
        """
        c = self.config
        n_params = sum(p.numel() for name, p in self.named_parameters() if 'codec' not in name)
        spans = (c.block_size if block.attn.active else c.chunk_size for block in self.h)
        return 6 * (n_params - self.wte.weight.numel()) + 6 * c.n_embd * sum(spans)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Model FLOPs utilisation: sequences an iteration, its seconds, FLOP/s of all devices."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T), T > 0, on this process alone -> (B, T + max_new_tokens)."""
        kernels.compile_fused(False)
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.config.block_size:], Ring())
            logits = self.lm_head(self.ln_f(x[:, -1])).float() / temperature
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                logits[logits < kth] = float('-inf')
            new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, new), dim=1)
        return idx


class graphed:
    """
    A function (idx, targets) -> loss of a model, whose forward and backward are one CUDA graph,
    because to launch the kernels of a small model takes longer than they do. For batches of these
    shapes and what is sent now, under an autocast that does not cache. Backward comes before the
    next call. Not over a dialled link, which waits on the host. Destroy it before the process
    group: NCCL waits for its graphs.
    """

    def __init__(self, model, idx, targets):
        self.model, self.batch, meter = model, (idx.clone(), targets.clone()), model.ring.meter
        params = [p for p in model.parameters() if p.requires_grad]
        before, stream = Counter(meter), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at first use: compiled code, communicators
            for _ in range(3):
                gradients = self.step(params)[1]
        torch.cuda.synchronize()
        self.params = [p for p, g in zip(params, gradients) if g is not None]
        del gradients
        meter.clear()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog, another thread, goes on asking after finished exchanges
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode='thread_local'):
            self.loss, self.gradients = self.step(self.params)
        self.counted = Counter(meter)  # by one step: a replay does not pass through Python
        meter.clear()
        meter.update(before)

    def step(self, params):
        loss = self.model(*self.batch)[1]
        return loss.detach(), torch.autograd.grad(loss, params, allow_unused=True)

    def __call__(self, *batch):
        torch._foreach_copy_(self.batch, batch)
        self.graph.replay()
        self.model.ring.meter.update(self.counted)
        loss = self.loss.clone().requires_grad_()
        loss.register_hook(self.add_gradients)
        return loss

    def add_gradients(self, dloss):
        """The loss's backward: the gradients are there already, for a dloss of 1."""
        # new tensors: the next replay writes over the old ones
        torch.autograd.backward(self.params, torch._foreach_mul(self.gradients, dloss))
