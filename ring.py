"""
The wire: who holds which part of the sequence, ring attention over torch.distributed, and a meter
of every byte that crosses.

Nothing here knows of models or compressors. What travels is a *payload*, a tuple of tensors whose
dimension 1 runs along the sequence, and `expand` turns a payload into keys and values. Sending less
is the caller's business (mos_cp.py); sending it once, overlapped with compute, and bringing its
gradient home is ours.
"""
import functools
import itertools
from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist

import kernels

# -----------------------------------------------------------------------------
# The layout: the sequence is cut into chunks, a setting of the *model*; ranks share the chunks out.


def zigzag(n_chunks, world_size, rank):
    """
    Chunks that `rank` holds, in its local order: as many from the front as from the back of the
    sequence, so that under a causal mask all ranks have the same work. With two chunks a rank:
    rank 0 of 4 holds [0, 7], rank 1 [1, 6], ... One rank alone holds all of them, in order.

    Raises ValueError if the chunks cannot be shared out.
    """
    if world_size == 1:
        return list(range(n_chunks))
    if n_chunks % (2 * world_size):
        raise ValueError(f'n_chunks ({n_chunks}) must be a multiple of 2 * cp ({2 * world_size}): '
                         'change --n_chunks or --cp')
    half = n_chunks // (2 * world_size)
    front = range(rank * half, (rank + 1) * half)
    back = range(n_chunks - (rank + 1) * half, n_chunks - rank * half)
    return [*front, *back]


@torch.compiler.disable
@functools.lru_cache(maxsize=None)
def token_positions(n_tokens, chunk_size, world_size, rank, device):
    """Global positions (n_tokens / world_size,) of the tokens that `rank` holds, in its local order."""
    chunks = torch.tensor(zigzag(n_tokens // chunk_size, world_size, rank))
    return (chunks[:, None] * chunk_size + torch.arange(chunk_size)).flatten().to(device)


def visible(mine, theirs, same_block, exact_local, causal):
    """
    Which attention calls the queries of chunks `mine` need over a block of chunks `theirs`: a list of
    (query chunks, key chunks, causal), the first two as slices in units of chunks.

    A query chunk sees the chunks before it; as both lists ascend, that is a prefix of the block, and
    neighbours that see the same prefix share one call. In its own block (`same_block`) a rank also has
    the diagonal: part of one causal call over everything, or, if `exact_local`, left out here because
    the caller attends to each chunk's own keys apart.
    """
    everything = slice(0, len(mine)), slice(0, len(theirs))
    if same_block and not exact_local:
        return [(*everything, causal)]
    if not causal:
        if not same_block:
            return [(*everything, False)]
        others = [(slice(m, m + 1), keys) for m in range(len(mine))
                  for keys in (slice(0, m), slice(m + 1, len(mine)))]
        return [(queries, keys, False) for queries, keys in others if keys.start < keys.stop]
    calls, m = [], 0
    for prefix, run in itertools.groupby(sum(b < a for b in theirs) for a in mine):
        n = len(list(run))
        if prefix:
            calls.append((slice(m, m + n), slice(0, prefix), False))
        m += n
    return calls


# -----------------------------------------------------------------------------
# The transport

@dataclass
class Meter:
    """Bytes handed to, and received from, torch.distributed by this rank; hops: exchanges made."""
    sent_fwd: int = 0
    sent_bwd: int = 0
    received_fwd: int = 0
    received_bwd: int = 0
    hops_fwd: int = 0
    hops_bwd: int = 0

    def count(self, phase, sent, received):
        """Book one exchange. phase: 'fwd' or 'bwd'; sent, received: bytes."""
        for name, n in (('sent', sent), ('received', received), ('hops', 1)):
            setattr(self, f'{name}_{phase}', getattr(self, f'{name}_{phase}') + n)

    def reset(self):
        self.__init__()


class Ring:
    """
    The ranks that share one sequence (a context-parallel group), seen from this rank.

    group: a torch.distributed process group; None is the one-process ring: nothing is ever sent.
    """

    def __init__(self, group=None):
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self.meter = Meter()

    def positions(self, n_local, chunk_size, device, rank=None):
        """Global positions (n_local,) of the tokens on `rank` (default: this one)."""
        rank = self.rank if rank is None else rank
        return token_positions(n_local * self.world_size, chunk_size, self.world_size, rank, device)

    def shard(self, x, chunk_size):
        """
        This rank's part of x (B, T, ...), the same on all ranks of the ring -> (B, T / world_size, ...).
        Raises ValueError if T is not a multiple of 2 * world_size chunks.
        """
        if self.world_size == 1:
            return x
        if x.shape[1] % chunk_size:
            raise ValueError(f'sequence length ({x.shape[1]}) must be a multiple of the chunk size ({chunk_size})')
        zigzag(x.shape[1] // chunk_size, self.world_size, self.rank)  # says what is wrong with the number of chunks
        return x[:, self.positions(x.shape[1] // self.world_size, chunk_size, x.device)]

    def exchange(self, tensors, to, source, phase):
        """
        Post one batched send of `tensors` to rank `to` of the ring and the receive of tensors of the same
        shapes from rank `source`; do not wait. phase: 'fwd' or 'bwd', for the meter.

        Returns a function that waits for both and returns the received tensors.
        """
        tensors = [t.contiguous() for t in tensors]
        received = [torch.empty_like(t) for t in tensors]
        to, source = (dist.get_global_rank(self.group, r % self.world_size) for r in (to, source))
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, t, to, self.group) for t in tensors]
                                       + [dist.P2POp(dist.irecv, t, source, self.group) for t in received])
        self.meter.count(phase, sum(t.nbytes for t in tensors), sum(t.nbytes for t in received))

        def wait():
            for work in works:  # gloo returns one work per tensor, NCCL one per batch
                work.wait()
            tensors.clear()  # until here the sent tensors had to stay alive
            return received
        return wait


# -----------------------------------------------------------------------------
# Ring attention

def same(payload):
    """The default pack and unpack: the payload travels as it is."""
    return payload


@torch.compiler.disable  # communication stays out of compiled graphs; the kernels inside are compiled apart
def ring_attention(q, payload, expand, params=(), local_kv=None, *, ring, chunk_size, causal=True, keep=True,
                   pack=same, unpack=same):
    """
    Attention of the local queries over the keys and values of the whole ring (Liu et al. 2023), where
    what travels is not keys and values but a payload that `expand` turns into them.

    q: (B, H, T, hd), this rank's T tokens in `zigzag` order, rotated to their positions.
    payload: tuple of tensors (B, S, ...), S any multiple of the local number of chunks: a token's numbers,
        a chunk's numbers. Same shapes on every rank. Floating-point ones get gradients. Empty: no block is
        attended to but local_kv, and nothing is sent.
    expand: (payload, params, positions) -> k, v (B, Hkv, T', hd). It must be a function of its arguments
        alone as far as gradients go, work on any prefix of whole chunks, and rotate k to `positions` (T',).
    params: tuple of tensors that `expand` uses, the same on every rank (a decompressor's weights). Each rank
        returns the gradient for its own queries: sum over ranks as for any other weight.
    local_kv: (k, v), each (B, Hkv, T, hd), the exact keys (rotated) and values of the local tokens. If given,
        every chunk attends to *itself* through these, and to other chunks through the payload, so the
        result depends on how the sequence is cut into chunks but not on which rank holds which.
    chunk_size: tokens in a chunk; T must be a multiple.
    causal: False lets every token see every other.
    keep: hold the received payloads until backward instead of sending them round a second time. Right for a
        small payload; for uncompressed keys and values it would undo the memory saving of context parallelism.
    pack, unpack: the lossy last step, payload -> tensors that travel -> payload. Gradients pass straight through
        it (they are taken at unpack's output and returned in that dtype).

    Returns (B, H, T, hd) in q's dtype. Accumulates in float32 at least.
    Raises ValueError if the chunks cannot be shared out over the ring.
    """
    spec = _Spec(ring, expand, pack, unpack, keep, causal, chunk_size, len(payload))
    return _RingAttention.apply(spec, q, *(local_kv or (None, None)), *payload, *params)


@dataclass
class _Spec:
    """Everything about one ring attention that is not a tensor."""
    ring: Ring
    expand: Callable
    pack: Callable
    unpack: Callable
    keep: bool
    causal: bool
    chunk_size: int
    n_payload: int

    def rebuild(self, wire, params, hop, n_local, exact_local):
        """
        Keys and values of the block that arrives at `hop` (that of rank - hop), as far as any local query
        sees it: (calls, payload, k, v). With gradients enabled the payload's tensors are fresh leaves.
        """
        ring, n_chunks = self.ring, n_local // self.chunk_size
        source = (ring.rank - hop) % ring.world_size
        mine, theirs = (zigzag(n_chunks * ring.world_size, ring.world_size, r) for r in (ring.rank, source))
        calls = visible(mine, theirs, hop == 0, exact_local, self.causal)
        if not calls:
            return [], [], None, None
        seen = max(keys.stop for _, keys, _ in calls)
        # the payload's tensors differ in granularity, but all run along dimension 1
        payload = [t[:, :t.shape[1] * seen // n_chunks].detach() for t in self.unpack(wire)]
        for t in payload:
            t.requires_grad_(torch.is_grad_enabled() and t.is_floating_point())
        positions = ring.positions(n_local, self.chunk_size, payload[0].device, source)
        k, v = self.expand(payload, params, positions[:seen * self.chunk_size])  # (B, Hkv, seen * L, hd)
        tokens = [(slice(i.start * self.chunk_size, i.stop * self.chunk_size),
                   slice(j.start * self.chunk_size, j.stop * self.chunk_size), causal) for i, j, causal in calls]
        return tokens, payload, k, v


def _fold(x, chunk_size):
    """(B, H, c * L, ...) -> (B * c, H, L, ...): every chunk a sequence of its own."""
    return x.unflatten(2, (-1, chunk_size)).transpose(1, 2).flatten(0, 1)


def _unfold(x, batch):
    """The inverse of `_fold`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def _add(total, grads, dtype):
    """Running sum of lists of tensors, in `dtype`."""
    return [g.to(dtype) for g in grads] if total is None else [a.add_(g) for a, g in zip(total, grads)]


class _RingAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, spec, q, k_local, v_local, *tensors):
        s, ring, (batch, _, n_local, _) = spec, spec.ring, q.shape
        payload, params = tensors[:s.n_payload], tensors[s.n_payload:]
        acc, exact_local = kernels.accumulation_dtype(q.dtype), k_local is not None
        out = lse = None  # (B, H, T, hd) and (B, H, T), in acc
        with torch.autocast(q.device.type, enabled=False):
            if exact_local:  # the diagonal: each chunk a sequence of its own
                folded = (_fold(t, s.chunk_size) for t in (q, k_local, v_local))
                out, lse = (_unfold(t, batch).to(acc) for t in kernels.attention_forward(*folded, s.causal))
            wire = tuple(s.pack(payload))
            wires = [wire]
            for hop in range(ring.world_size if payload else 0):
                passing_on = hop < ring.world_size - 1
                if passing_on:  # send this block to the right, receive the next from the left: under the compute
                    arrival = ring.exchange(wire, ring.rank + 1, ring.rank - 1, 'fwd')
                calls, _, k, v = s.rebuild(wire, params, hop, n_local, exact_local)
                for i, j, causal in calls:
                    block = kernels.attention_forward(q[:, :, i], k[:, :, j], v[:, :, j], causal)
                    if out is None:  # no diagonal apart: the first call, in hop 0, covers every query
                        out, lse = (t.to(acc) for t in block)
                    else:
                        out[:, :, i], lse[:, :, i] = kernels.merge(out[:, :, i], lse[:, :, i], *block)
                if passing_on:
                    wire = tuple(arrival())
                    if s.keep:
                        wires.append(wire)
        out = out.to(q.dtype)
        ctx.spec, ctx.n_params, ctx.n_wire = s, len(params), len(wires[0])
        ctx.floating = [t.is_floating_point() for t in payload]
        ctx.save_for_backward(q, k_local, v_local, out, lse, *params, *itertools.chain(*wires))
        return out

    @staticmethod
    def backward(ctx, dout):
        s, ring = ctx.spec, ctx.spec.ring
        q, k_local, v_local, out, lse, *rest = ctx.saved_tensors
        params, rest = rest[:ctx.n_params], rest[ctx.n_params:]
        wires = [rest[i:i + ctx.n_wire] for i in range(0, len(rest), ctx.n_wire or 1)]
        acc, (batch, _, n_local, _) = kernels.accumulation_dtype(q.dtype), q.shape
        needs_grad = ctx.needs_input_grad[-ctx.n_params:] if params else ()
        dq = torch.zeros_like(q, dtype=acc)
        dk_local = dv_local = None
        dparams = [torch.zeros_like(p, dtype=acc) if need else None for p, need in zip(params, needs_grad)]

        def block_backward(hop, wire):
            """Adds to dq and dparams; returns the gradient of this block's payload, in the payload's dtype."""
            leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad)]
            with torch.enable_grad():
                calls, payload, k, v = s.rebuild(wire, leaves, hop, n_local, k_local is not None)
            grads = [torch.zeros_like(t) for t in s.unpack(wire) if t.is_floating_point()]
            if not calls:
                return grads
            dk, dv = torch.zeros_like(k, dtype=acc), torch.zeros_like(v, dtype=acc)
            for i, j, causal in calls:
                dq_, dk_, dv_ = kernels.attention_backward(dout[:, :, i], q[:, :, i], k.detach()[:, :, j],
                                                           v.detach()[:, :, j], out[:, :, i], lse[:, :, i], causal)
                dq[:, :, i] += dq_
                dk[:, :, j] += dk_
                dv[:, :, j] += dv_
            wanted = [t for t in (*payload, *leaves) if t.requires_grad]
            found = torch.autograd.grad((k, v), wanted, (dk.to(k.dtype), dv.to(v.dtype)))
            for g, part in zip(grads, found):  # zero where no local query looked
                g[:, :part.shape[1]] = part
            for dp, g in zip((dp for dp in dparams if dp is not None), found[len(grads):]):
                dp += g
            return grads

        with torch.autocast(q.device.type, enabled=False):
            if k_local is not None:
                folded = (_fold(t, s.chunk_size) for t in (dout, q, k_local, v_local, out, lse))
                dq_, dk_local, dv_local = (_unfold(g, batch) for g in kernels.attention_backward(*folded, s.causal))
                dq += dq_
            # Kept payloads are not sent again, and the own block comes last, so that the last gradient too
            # travels under compute. Otherwise the payloads go round once more, the own block first.
            hops = [*range(1, ring.world_size), 0] if s.keep else [*range(ring.world_size)]
            home = arrival = None  # the gradient of our own payload, in acc; a share of it that is on its way
            wire = wires[0] if wires else None
            for hop in hops if wires else []:
                passing_on = not s.keep and hop < ring.world_size - 1
                if passing_on:
                    next_wire = ring.exchange(wire, ring.rank + 1, ring.rank - 1, 'bwd')
                grads = block_backward(hop, wires[hop] if s.keep else wire)
                if arrival:
                    home, arrival = _add(home, arrival(), acc), None
                if hop == 0:
                    home = _add(home, grads, acc)
                else:  # straight to the block's owner: rounded to the payload's dtype once, summed there in acc
                    arrival = ring.exchange(grads, ring.rank - hop, ring.rank + hop, 'bwd')
                if passing_on:
                    wire = next_wire()
            if arrival:
                home = _add(home, arrival(), acc)
        home = iter(home or [])
        dpayload = [next(home) if floating else None for floating in ctx.floating]
        return None, dq.to(q.dtype), dk_local, dv_local, *dpayload, *dparams
