"""
The method and the model: what workers send each other instead of keys and values, and a small
LLaMA-style GPT whose attention runs over a ring of them ("Mixtures of Subspaces for Bandwidth
Efficient Context Parallel Training", Ramasinghe et al., NeurIPS 2025, arXiv 2606.16384; "the paper"
below).

    config = GPTConfig(block_size=256, n_layer=2, n_head=4, n_embd=128)
    model = GPT(config)                     # one process: the reference
    logits, loss = model(idx, targets)      # (B, T, vocab_size), mean cross-entropy

With `GPT(config, Ring(group))` every rank makes the same call with the same sequences, computes the
part that `ring.shard` gives it, and all together get the same logits and loss: they depend on
config.n_chunks, never on how many ranks share the chunks.

`python mos_cp.py` times a training step with the codec and without.
"""
import dataclasses
import gc
import math
import timeit
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from ring import Ring, attend, positions

# -----------------------------------------------------------------------------
# What crosses the wire. A codec turns a layer's keys and values kv (B, T, 2, Hkv, hd), keys before
# RoPE, into a payload, a tuple of tensors (B, T, ...) or (B, chunks, ...), and back. Every rank
# knows all tokens, and has the same weights (with --sync_every, until they drift apart).

class Full(nn.Module):
    """
    Keys and values as they are. The base of all codecs. One of your own needs `compress` and
    `expand`, `weights` if it learns something, and an entry in CODECS: rounding to fewer bits, and
    gradients across the wire, come for free.
    """
    keep = False  # True, for a small payload: hold it until backward. False: it is sent again then

    def __init__(self, config, layer):
        super().__init__()
        self.wire_dtype, self.grad_wire_dtype = config.wire_dtype, config.grad_wire_dtype
        self.config, self.shape = config, (2, config.n_kv_head, config.head_dim)

    def weights(self, embedding, norm, c_kv):
        """
        The tensors that `expand` needs, made once a step from parameters, the embedding
        (vocab_size, n_embd), and the layer's own norm and c_kv, with which an input h has keys and
        values c_kv(norm(h)). `expand` must not read parameters from self.
        """
        return ()

    def compress(self, x, kv, tokens, weights):
        """
        x = norm(h) (B, T, n_embd) and kv = c_kv(x) (B, T, 2, Hkv, hd) -> payload. Of the tokens
        (B, T, guess_tokens) the j-th is the one j places before.
        """
        return (kv,)

    def expand(self, payload, tokens, weights):
        """The payload of some rank's T tokens, a shard or its front half -> kv."""
        return payload[0]

    @kernels.fused
    def pack(self, tensors, gradient=False):
        """
        The payload, or the gradient of its floating-point tensors, as it travels. int8 and int4
        have one scale for each row, which is the last dimension: a head of full keys and values, z
        of a token. There gradients are rounded stochastically: nothing is lost on average.
        """
        dtype = self.grad_wire_dtype if gradient else self.wire_dtype

        def rounded(t):
            if dtype == 'compute' or not t.is_floating_point():
                return t
            if dtype == 'bf16':
                return t.to(torch.bfloat16)
            return kernels.quantize(t, int(dtype[3:]), stochastic=gradient)
        return [rounded(t) for t in tensors]

    @kernels.fused
    def unpack(self, wire, sizes, dtype, gradient=False):
        """The inverse of `pack`. sizes, dtype: last dimensions and dtype of what was packed."""
        wire_dtype = self.grad_wire_dtype if gradient else self.wire_dtype

        def restored(t, size):
            if t.dtype == torch.uint8:
                return kernels.dequantize(t, int(wire_dtype[3:]), size, dtype)
            return t.to(dtype) if wire_dtype == 'bf16' and t.is_floating_point() else t
        return [restored(t, size) for t, size in zip(wire, sizes)]

    def wire_bytes(self, x, kv, tokens, weights):
        """Bytes to one other rank: forward; backward, with what is not kept a second time."""
        payload = self.compress(x, kv, tokens, weights)
        fwd = sum(t.nbytes for t in self.pack(payload))
        gradient = [t for t in payload if t.is_floating_point()]
        bwd = sum(t.nbytes for t in self.pack(gradient, gradient=True))
        return fwd, (bwd if self.keep else fwd + bwd)


class Mixture(Full):
    """
    What the tokens do not say, in a subspace that they choose. Of a token whose key and value are
    [K, V] = W x (W: the layer's c_kv, x: its normed input, in R^n):

        look up  [t, s] = sum_j W_e_j^T e_j             e_j: embedding of the token j places back
                                                        (j < guess_tokens), normed as x is
        guess    g = A t + b                            t: guess_dim numbers
        mixture  theta = c tanh(s)                      s: k numbers (n_generators), c = theta_max
                 E(theta) = E_0 + sum_l theta_l E_l     each E_l: (n, r), r numbers (latent_dim);
                                                        D(theta) likewise
        send     z = E(theta)^T (x - g)                 in 4 bits and a scale, by default
        rebuild  [K, V] = W (g + D(theta) z)

    Every rank has W and knows every token. So guess and theta cost no byte, and what is rebuilt
    moves with W as W learns. W gets gradients from every rebuilt key and value too. Nothing here
    looks at later tokens. W_e, A, b, E_l and D_l are learned; k = 0 is one learned subspace.

    theta = 'token': c tanh(psi (x - g)), with a learned psi, is sent beside z; 'chunk': of the mean
    of x - g in a chunk, later tokens too, which exact_local keeps from the chunk's own queries.
    subspace_of = 'kv': the same of [K, V] itself, with D = E and no W. The paper (Algorithm 1) is
    this with other choices: K and V apart; no guess; theta of a chunk's mean, clipped; E(theta) =
    (I + M + M^2 / 2) E_0 with M = sum_l theta_l G_l and frozen E_0 and skew-symmetric G_l: to
    second order, a rotation of E_0.
    """
    keep = True

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.frozen, self.of_input = config.subspace == 'frozen', config.subspace_of == 'input'
        # random numbers of its own: the initial weights must not depend on what is sent
        self.seed = (torch.initial_seed() * 1000 + layer) % 2**63
        rng = torch.Generator().manual_seed(self.seed)
        # an item for each of config.subspaces; no D where it is E, no psi where theta is looked up
        self.E, self.D, self.psi = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for n, r in config.subspaces:
            E = self.family(torch.linalg.qr(torch.randn(n, r, generator=rng))[0])
            self.E.append(nn.Parameter(E, requires_grad=not self.frozen))
            if self.of_input:
                self.D.append(nn.Parameter(E.clone(), requires_grad=not self.frozen))
            if config.n_generators and config.theta != 'words':
                psi = 0.02 * torch.randn(config.n_generators, n, generator=rng)
                self.psi.append(nn.Parameter(psi))
        n = sum(map(len, self.E))
        self.guess_dim = m = min(config.guess_dim, config.n_embd, 2 * math.prod(self.shape[1:]))
        # how many numbers are looked up: t, and s of each subspace unless theta is sent
        self.sizes = [m] if self.psi else [m, *len(self.E) * [config.n_generators]]
        if sum(self.sizes):
            # [t, s] are about 1 at this scale; at 0, and A = 0, they would never learn
            W_e = torch.randn(config.guess_tokens, config.n_embd, sum(self.sizes), generator=rng)
            self.W_e = nn.Parameter(W_e / math.sqrt(config.guess_tokens * config.n_embd))
        if m:
            self.A, self.b = nn.Parameter(torch.zeros(n, m)), nn.Parameter(torch.zeros(n))

    def family(self, E_0):
        """
        E_0 (n, r) and the matrices mixed into it -> (n, J, r). Learned ones, J = 1 + k, begin at 0:
        a mixture begins as the one subspace it contains. Frozen: G_l E_0 and G_l G_m E_0 / 2, J =
        1 + k + k^2; the same G whenever this is called.
        """
        k, (n, _) = self.config.n_generators, E_0.shape
        if k == 0 or not self.frozen:
            return F.pad(E_0[:, None], (0, 0, 0, k))
        S = torch.randn(k, n, n, generator=torch.Generator().manual_seed(self.seed)).to(E_0)
        order = 'fro' if self.config.generator_norm == 'frobenius' else 2
        G = (S - S.mT) / torch.linalg.matrix_norm(S - S.mT, order, keepdim=True)
        first = torch.einsum('lde,er->dlr', G, E_0)
        second = torch.einsum('lde,emr->dlmr', G, first).flatten(1, 2) / 2
        return torch.cat((E_0[:, None], first, second), dim=1)

    def weights(self, embedding, norm, c_kv):
        table, rebuild = (), tuple(self.D if self.of_input else self.E)
        if self.guess_dim:
            rebuild = self.A, self.b, *rebuild
        if self.of_input:  # W (A t + b + D z) = (W A) t + W b + (W D) z
            rebuild = tuple(torch.tensordot(c_kv.weight, M, dims=1) for M in rebuild)
        if sum(self.sizes):  # its row token * guess_tokens + j is W_e_j^T e of that token
            W_e = aligned(self.W_e).transpose(0, 1)  # (n_embd, guess_tokens, ...)
            table = ((norm(embedding) @ W_e.flatten(1)).view(-1, W_e.shape[-1]),)
        return *table, *rebuild

    def look_up(self, tokens, table):
        """
        What every rank knows of tokens (B, T, guess_tokens): t (B, T, guess_dim), and of each
        subspace theta (B, T, k), unless it is sent.
        """
        places = tokens.shape[-1]
        rows = tokens * places + torch.arange(places, device=tokens.device)
        found = F.embedding(rows, table).sum(dim=2, dtype=table.dtype)
        t, *s = found[..., :sum(self.sizes)].split(self.sizes, dim=-1)
        return t, [self.config.theta_max * one.tanh() for one in s]

    def theta(self, Z, psi):
        """Z (B, T, n) -> (B, T, k), or of each chunk (B, chunks, k)"""
        if self.config.theta == 'chunk':
            Z = Z.unflatten(1, (-1, self.config.chunk_size)).mean(dim=2)
        theta, largest = F.linear(Z, psi).to(Z.dtype), self.config.theta_max
        return theta.clamp(-largest, largest) if self.frozen else largest * theta.tanh()

    def mix(self, theta, T):
        """theta -> how much of each of the J matrices is in E(theta), D(theta): (B, T, J, 1)"""
        theta = theta.repeat_interleave(T // theta.shape[1], dim=1)
        parts = [torch.ones_like(theta[..., :1]), theta]
        if self.frozen:
            parts.append((theta[..., :, None] * theta[..., None, :]).flatten(2))
        return torch.cat(parts, dim=-1).unsqueeze(-1)

    def compress(self, x, kv, tokens, weights):
        rest, zs, thetas = (x if self.of_input else kv.flatten(2)), [], []  # (B, T, n)
        if sum(self.sizes):
            t, thetas = self.look_up(tokens, weights[0].to(rest.dtype))
        if self.guess_dim:
            rest = rest - (t @ self.A.to(t.dtype).mT + self.b.to(t.dtype))
        parts = rest.split([len(E) for E in self.E], dim=-1)
        sent = [self.theta(Z, psi) for Z, psi in zip(parts, self.psi)]
        thetas = sent or thetas
        for i, (Z, E) in enumerate(zip(parts, self.E)):
            J, r = E.shape[1:]
            z = (Z @ aligned(E.flatten(1)).to(Z.dtype))[..., :J * r]  # E_0^T Z, E_1^T Z, ...
            if J > 1:
                z = self.mix(thetas[i], Z.shape[1]) * z.unflatten(-1, (J, r))
                z = z.sum(dim=2, dtype=Z.dtype)  # without dtype autocast makes it float32 on GPUs
            zs.append(z.contiguous())
        return *zs, *sent

    def expand(self, payload, tokens, weights):
        several, dtype, rebuilt, thetas = len(self.E), payload[0].dtype, [], []
        if sum(self.sizes):
            t, thetas = self.look_up(tokens, weights[0].to(dtype))
        thetas = payload[several:] or thetas
        for i, (z, D) in enumerate(zip(payload[:several], weights[-several:])):
            if D.shape[1] > 1:
                z = (self.mix(thetas[i], z.shape[1]) * z.unsqueeze(2)).flatten(2)
            rebuilt.append(aligned(z) @ aligned(D.flatten(1)).to(dtype).mT)
        rebuilt = torch.cat(rebuilt, dim=-1)  # (B, T, 2 d)
        if self.guess_dim:
            rebuilt = rebuilt + (t @ weights[1].to(dtype).mT + weights[2].to(dtype))
        return rebuilt.unflatten(-1, self.shape)

    @torch.no_grad()
    def start(self, moment, c_kv):
        """
        From sums of [x, e, 1]^T [x, e, 1] (`GPT.moments`): the guess becomes the regression of x on
        e, the subspace what is best for W of what that leaves. (Of kv: x is [K, V], W is 1.)
        """
        C, n = moment.double(), sum(map(len, self.E))
        W = c_kv.weight.double() if self.of_input else torch.eye(n).to(C)
        left = C[:n, :n]
        if m := self.guess_dim:
            # 1. Ridge regression: R = argmin |x - R [e, 1]|^2 + 0.01 mean(e_i^2) |R|^2
            ex, ee = C[n:, :n], C[n:, n:]
            ridge = torch.full_like(ee[0], 0.01 * ee.diagonal()[:-1].mean() + 1e-6)
            ridge[-1] = 1e-6  # the last column, b, is not made smaller
            R = torch.linalg.solve(ee + ridge.diag(), ex).T  # (n, guess_tokens * n_embd + 1)
            # 2. The m numbers that say most of R [e, 1] to W, and how
            to_t, A = bottleneck(R @ ee @ R.T, W, m)
            W_e = R[:, :-1].T @ to_t  # (guess_tokens * n_embd, m); s stays random
            self.W_e[..., :m] = W_e.unflatten(0, (-1, self.config.n_embd))
            self.A.copy_(A)
            self.b.copy_(R[:, -1])
            # 3. The same sums of x - g, where g = [A W_e^T, b] [e, 1]
            R = torch.cat((A @ W_e.T, R[:, -1:]), dim=1)
            left = left - R @ ex - (R @ ex).T + R @ ee @ R.T
        rng, begin = torch.Generator().manual_seed(self.seed), 0
        for i, (n, r) in enumerate(self.config.subspaces):
            part = slice(begin, begin + n)
            M, begin = left[part, part], part.stop
            E, D = bottleneck(M, W[:, part], r)
            self.E[i].copy_(self.family(E))
            if self.of_input:
                self.D[i].copy_(self.family(D))
            if self.psi and not self.frozen:
                # 4. A new random psi: psi (x - g) has mean square 1, so tanh bends, and saturates
                #    seldom. C[-1, -1] is the number of rows.
                psi = torch.randn(self.psi[i].shape, generator=rng).to(M)
                square = torch.einsum('kd,de,ke->k', psi, M, psi) / C[-1, -1]
                self.psi[i].copy_(psi / square.clamp(min=1e-30).sqrt()[:, None])


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


class Words(Full):
    """Keys and values of the first layer follow from the token alone: nothing has to be sent."""
    keep = True

    def weights(self, embedding, norm, c_kv):
        return (c_kv(norm(embedding)),)  # those of all words: (vocab_size, 2 d)

    def compress(self, x, kv, tokens, weights):
        return ()

    def expand(self, payload, tokens, weights):
        return F.embedding(tokens[..., 0], weights[0]).unflatten(-1, self.shape)


class TopK(Full):
    """The largest entries of each token's key and of its value, and where they stood."""
    keep = True

    def compress(self, x, kv, tokens, weights):
        kv = kv.flatten(3)  # (B, T, 2, d)
        n = max(1, round(self.config.topk * kv.shape[-1]))
        where = kv.abs().topk(n, dim=-1).indices
        return kv.gather(-1, where), where.to(torch.int16 if kv.shape[-1] <= 2**15 else torch.int32)

    def expand(self, payload, tokens, weights):
        values, where = payload
        zeros = values.new_zeros(*values.shape[:-1], self.shape[1] * self.shape[2])
        return zeros.scatter(-1, where.long(), values).unflatten(-1, self.shape[1:])


CODECS = {'mixture': Mixture, 'full': Full, 'topk': TopK, 'local': None}  # the values of --send


# -----------------------------------------------------------------------------
# Configuration

CHOICES = {  # the values an option takes; train.py's flags check against these too
    'send': CODECS,
    'wire_dtype': ('auto', 'compute', 'bf16', 'int8', 'int4'),
    'grad_wire_dtype': ('same', 'compute', 'bf16', 'int8', 'int4'),
    'theta': ('words', 'token', 'chunk'),
    'subspace': ('learned', 'frozen'),
    'subspace_of': ('input', 'kv', 'apart'),
    'generator_norm': ('frobenius', 'spectral'),
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
    n_layer: int = 2  # layers
    n_head: int = 4  # query heads
    n_kv_head: int = 0  # key and value heads (grouped-query attention); 0: n_head
    n_embd: int = 128  # width
    n_ff: int = 0  # width of the SwiGLU; 0: 8/3 n_embd, rounded up to a multiple of 64
    rope_base: float = 500000.0  # base of the rotary embedding's frequencies
    send: str = 'mixture'  # full (uncompressed), local (nothing), topk, or mixture
    latent_dim: int = 36  # numbers sent for a token and layer, its key and value together
    latent_dim_k: int = 0  # of these for the key, with subspace_of=apart; 0: two sevenths
    n_generators: int = 4  # how many matrices theta mixes into the subspace; 0: one subspace
    theta: str = 'words'  # looked up; or sent: token, of each x - g; chunk, of its mean (the paper)
    subspace: str = 'learned'  # or frozen: skew-symmetric generators rotate it (the paper)
    generator_norm: str = 'frobenius'  # of frozen ones: frobenius (the paper) or spectral norm 1
    theta_max: float = 0.2  # largest |theta|; the paper's is 0.5
    subspace_of: str = 'input'  # the layer's input; kv: its [K, V]; apart: one each (the paper)
    guess_dim: int = 512  # rank of the guess by the tokens, at most n_embd; 0: no guess
    guess_tokens: int = 2  # tokens that are looked up: this one, and those just before it
    exact_local: bool = True  # a chunk's own keys and values are exact; False (the paper): rebuilt
    compress_last: bool = True  # False (the paper): the last layer sends full keys and values
    wire_dtype: str = 'auto'  # compute, bf16, int8, int4; auto: int4 for mixture, else compute
    grad_wire_dtype: str = 'same'  # of the gradient; int8, int4: stochastically rounded
    topk: float = 0.1  # fraction of the entries that send=topk keeps
    recompute: bool = False  # compute MLPs and logits once more in backward: less memory
    compile: bool = False  # torch.compile what repeats; on GPUs, replay a step as a CUDA graph

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_ff = self.n_ff or 64 * math.ceil(8 * self.n_embd / 3 / 64)
        self.vocab_size = self.vocab_size or 256
        self.latent_dim_k = self.latent_dim_k or max(1, round(2 * self.latent_dim / 7))
        if self.wire_dtype == 'auto':
            self.wire_dtype = 'int4' if self.send == 'mixture' else 'compute'
        if self.grad_wire_dtype == 'same':
            self.grad_wire_dtype = self.wire_dtype

        for name, choices in CHOICES.items():
            value = getattr(self, name)
            check(value in choices, f'{name} ({value!r}) must be one of {", ".join(choices)}', name)
        for name in (f.name for f in dataclasses.fields(self) if f.type is int):
            value, lowest = getattr(self, name), 0 if name in ('n_generators', 'guess_dim') else 1
            check(value >= lowest, f'{name} ({value}) must be at least {lowest}', name)
        for name, of, by in (('block_size', 'n_chunks', self.n_chunks),
                             ('n_embd', '2 * n_head', 2 * self.n_head),  # RoPE rotates pairs
                             ('n_head', 'n_kv_head', self.n_kv_head)):
            value = getattr(self, name)
            check(value % by == 0, f'{name} ({value}) must be a multiple of {of} ({by})', name,
                  of.split()[-1])
        for name in ('rope_base', 'theta_max', 'topk'):
            value = getattr(self, name)
            check(0 < value < math.inf, f'{name} ({value}) must be above 0 and finite', name)
        check(self.topk <= 1, f'topk ({self.topk}) must be at most 1', 'topk')
        for n, r in self.subspaces if self.send == 'mixture' else ():
            n = min(n, 2 * self.n_kv_head * self.head_dim)  # all that keys and values can say
            check(1 <= r <= n, f'latent_dim ({self.latent_dim}) must leave each subspace between 1 '
                  f'and {n} numbers, and one has {r}', 'latent_dim', 'latent_dim_k')
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
        """
        (n, r) of each subspace: one of the layer's input, or of [K, V] together in R^2d, or one for
        K and one for V.
        """
        d = self.n_kv_head * self.head_dim  # width of all keys, and of all values, of a token
        return {'input': [(self.n_embd, self.latent_dim)], 'kv': [(2 * d, self.latent_dim)],
                'apart': [(d, self.latent_dim_k), (d, self.latent_dim - self.latent_dim_k)],
                }[self.subspace_of]


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
        # the two W of Z = X W in the paper, of keys and of values
        self.c_kv = nn.Linear(config.n_embd, 2 * config.n_kv_head * config.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.plain = Full(config, layer)  # uncompressed: in a warm start, unplugged
        self.plain.wire_dtype = self.plain.grad_wire_dtype = 'compute'
        codec, last = CODECS[config.send], layer == config.n_layer - 1
        if codec is Mixture and config.guess_dim and layer == 0:
            codec = Words  # the best guess, which leaves nothing to send
        self.codec = codec and (codec(config, layer) if config.compress_last or not last
                                else self.plain)

    @property
    def active(self):
        """The codec in use now, see GPT.set_send; None: nothing is sent."""
        return {'local': None, 'full': self.plain, 'codec': self.codec}[self.sends]

    @kernels.fused
    def project(self, x, norm, table, tokens, embedding):
        """
        x (B, T, n_embd) of the tokens (B, T, guess_tokens), before its norm, table (T, 2, hd) of
        their positions, embedding (vocab_size, n_embd) -> q (B, T, H, hd) and k (B, T, Hkv, hd)
        with RoPE, kv (B, T, 2, Hkv, hd), the payload, and the codec's weights.
        """
        x = norm(x)
        q = self.c_q(x).unflatten(-1, (-1, self.config.head_dim))
        kv = self.c_kv(x).unflatten(-1, (2, -1, self.config.head_dim))
        weights = self.active.weights(embedding, norm, self.c_kv) if self.active else ()
        payload = self.active.compress(x, kv, tokens, weights) if self.active else ()
        return kernels.rope(q, table), kernels.rope(kv[:, :, 0], table), kv, payload, weights

    def attend(self, q, k, kv, payload, weights, ring, table, tokens):
        """What comes between the projections; nothing else crosses the wire. -> (B, T, H, hd)"""
        T, codec = q.shape[1], self.active
        span = self.config.chunk_size if self.config.exact_local or not codec else 0
        if type(codec) is Full and codec.wire_dtype == 'compute':
            span = T  # exact anyway: a rank's own shard in one piece, which is causal in its order
        return attend(ring, q, k, kv[:, :, 1], payload, codec, weights, table, tokens, span)


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
    on = kernels.is_compiling()
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (kernels.compiling(on), kernels.compiling(on)))


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.ln_1, self.attn = Norm(config.n_embd, eps=1e-5), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config.n_embd, eps=1e-5), MLP(config)

    @kernels.fused
    def after(self, x, y):
        x = x + self.attn.c_proj(y.flatten(2))
        return x + self.mlp(self.ln_2(x))

    def forward(self, x, ring, table, tokens, embedding):
        """
        x: (B, T, n_embd), this rank's shard; every rank's RoPE table (world_size, T, 2, hd) and
        tokens (world_size, B, T, guess_tokens).
        """
        own = self.attn.project(x, self.ln_1, table[ring.rank], tokens[ring.rank], embedding)
        y = self.attn.attend(*own, ring, table, tokens)
        return recomputed(self.after, x, y) if self.config.recompute else self.after(x, y)


class GPT(nn.Module):
    """LLaMA-3-style decoder: RMSNorm, RoPE, SwiGLU, untied head, no biases; nanoGPT's interface."""
    loss_tokens = 8192  # of each sequence, whose logits exist at a time, with config.recompute

    def __init__(self, config, ring=None):
        super().__init__()
        self.config, self.ring = config, ring or Ring()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.set_send('codec')
        # whose codec has something to start
        self.started = [block for block in self.h if hasattr(block.attn.codec, 'start')]
        self.ln_f = Norm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        table = kernels.rope_table(config.block_size, config.head_dim, config.rope_base)
        self.register_buffer('table', table, persistent=False)
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
        with kernels.compiling(self.config.compile):
            x = self.hidden(idx, self.ring)
            if targets is None:
                return self.lm_head(self.ln_f(x)), None
            mine = self.ring.shard(targets, self.config.chunk_size)
            if self.config.recompute:
                found = [recomputed(self.losses, *piece)[1]  # a piece's logits go at once
                         for piece in self.pieces(x, mine)]
                logits, losses = None, torch.cat(found, dim=1)
            else:
                logits, losses = self.losses(x, mine)
            return logits, losses.sum() * self.ring.world_size / (targets != -1).sum()

    def inputs(self, idx, ring):
        """
        Whole sequences (B, T) -> the embeddings x (B, T / world_size, n_embd) of this rank's shard,
        and of every rank's RoPE's table (world_size, T / world_size, 2, hd) and tokens, with those
        before each (the first one's: itself): (world_size, B, T / world_size, guess_tokens).
        """
        n, c = idx.shape[1], self.config
        check(n <= c.block_size, f'sequence length ({n}) is above block_size ({c.block_size})',
              'block_size')
        if ring.world_size == 1:  # padding: later than every real token (but in a chunk's mean)
            idx = F.pad(idx, (0, -n % c.chunk_size))
        ring.shard(idx, c.chunk_size)  # refuses lengths that cannot be shared out
        where = positions(idx.shape[1], ring.world_size, idx.device)  # (world_size, T)
        back = where.unsqueeze(-1) - torch.arange(c.guess_tokens, device=idx.device)
        tokens = idx[:, back.clamp(min=0)].transpose(0, 1)
        return self.wte(tokens[ring.rank, ..., 0]), self.table[where], tokens

    def hidden(self, idx, ring):
        """All but the head: (B, T) -> (B, T / world_size, n_embd)."""
        x, table, tokens = self.inputs(idx, ring)
        for block in self.h:
            x = block(x, ring, table, tokens, self.wte.weight)
        return x[:, :idx.shape[1]]

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
        found = []
        with kernels.compiling(self.config.compile):
            mine = self.ring.shard(targets, self.config.chunk_size)
            for x, y in self.pieces(self.hidden(idx, self.ring), mine):
                logits, losses = self.losses(x, y)
                found.append((losses, logits.argmax(-1) == y))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found))

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
    def moments(self, idx=None):
        """
        For each of self.started, second moments of rows [x, e, 1] over this rank's tokens of idx: x
        is what its subspace is of, the layer's normed input or its keys and values, e (if there is
        a guess) the embeddings of the tokens, normed alike. To be summed over ranks and batches.
        None: x are rows of the weights W of [K, V] = W x, or as in the paper columns; e is 0.
        """
        c, of_input, found = self.config, self.config.subspace_of == 'input', []
        n = c.guess_tokens * c.n_embd if c.guess_dim else 0  # numbers of e

        def moment(x, e):
            with torch.autocast(x.device.type, enabled=False):  # float32 at least
                rows = F.pad(torch.cat((x, e[..., :n]), dim=-1).flatten(0, -2), (0, 1), value=1.0)
                rows = rows.to(kernels.accumulation_dtype(x.dtype))
                return rows.T @ rows

        if idx is None:
            for W in (block.attn.c_kv.weight for block in self.started):  # (2 d, n_embd)
                x = W if of_input else W.T
                found.append(moment(x, x.new_zeros(len(x), n)))
            return found
        x, table, tokens = self.inputs(idx, self.ring)
        for block in self.h:
            if block in self.started:
                normed, e = block.ln_1(x), block.ln_1(self.wte(tokens[self.ring.rank])).flatten(2)
                found.append(moment(normed if of_input else block.attn.c_kv(normed), e))
            x = block(x, self.ring, table, tokens, self.wte.weight)
        return found

    def start_codecs(self, moments):
        """moments: the sums of all that `moments` gave."""
        for block, moment in zip(self.started, moments):
            block.attn.codec.start(moment, block.attn.c_kv)

    # -- nanoGPT's interface

    def get_num_params(self, non_embedding=True):
        """Parameters, without the input embedding by default: it costs no FLOPs."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.wte.weight.numel()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, codec_lr=1.0):
        """
        AdamW; weight matrices decay, norms and the codecs' own parameters do not.
        codec_lr: the codecs' learning rate as a fraction of the others', kept as 'lr_scale'.
        """
        groups = [{'params': [], 'weight_decay': decay, 'lr_scale': scale,
                   'lr': learning_rate * scale}
                  for decay, scale in ((weight_decay, 1.0), (0.0, 1.0), (0.0, codec_lr))]
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
        spans = (c.block_size if block.attn.active else c.chunk_size for block in self.h)
        return 6 * self.get_num_params() + 6 * c.n_embd * sum(spans)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Model FLOPs utilisation: sequences an iteration, its seconds, FLOP/s of all devices."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T), T > 0, on this process alone -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.config.block_size:], Ring())  # not compiled
            logits = self.lm_head(self.ln_f(x[:, -1])).float() / temperature
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                logits[logits < kth] = float('-inf')
            new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, new), dim=1)
        return idx


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
# `python mos_cp.py`: what the codec costs a training step on one process

def _milliseconds(config, device):
    """Of a step, forward, backward and AdamW, in bf16: median of 5, after 4 to warm up."""
    gc.collect()  # the last call's CUDA graph, whose memory hangs in cycles
    torch.manual_seed(0)
    model = GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device)
    batch = torch.randint(config.vocab_size, (2, 1, config.block_size), device=device).unbind()
    autocast = torch.autocast(device, torch.bfloat16, cache_enabled=False)
    with autocast:
        loss_of = graphed(model, *batch) if device == 'cuda' else lambda *batch: model(*batch)[1]

    def step():
        with autocast:
            loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for all of it
    return sorted(timeit.repeat(step, number=1, repeat=9)[4:])[2] * 1e3


def _benchmark():
    device, chip, rows = 'cpu', 'CPU', {'tiny, T 256': {}}
    if torch.cuda.is_available():
        device, chip, rows = 'cuda', torch.cuda.get_device_name(), {
            '124m, T 16384': dict(n_layer=12, n_head=12, n_embd=768, block_size=16384),
            '800m, T 32768': dict(n_layer=8, n_head=8, n_embd=2048, n_ff=8192, block_size=32768)}
    codecs = dict(send='full'), dict(n_generators=0, guess_dim=0), dict(n_generators=0), {}
    print(f'{chip}, torch {torch.__version__}, bf16, compiled; ms a step of one sequence, 128 '
          'numbers\n\n| model | full | one subspace | guess, one subspace | guess, mixture |\n|'
          + 5 * '---|')
    for name, sizes in rows.items():
        times = [_milliseconds(GPTConfig(latent_dim=128, compile=True, **codec, **sizes), device)
                 for codec in codecs]
        print(f'| {name} | ' + ' | '.join(f'{t:.1f}' for t in times) + ' |', flush=True)


if __name__ == '__main__':
    _benchmark()
