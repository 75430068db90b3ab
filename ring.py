"""
The wire: who holds which part of the sequence, ring attention over torch.distributed, a meter of every
byte that crosses, and a slow link one can dial.

Nothing here knows of models or compressors. What travels is a *payload*, a tuple of tensors whose
dimension 1 runs along the sequence, and `expand` turns a payload into keys and values. Sending less
is the caller's business (mos_cp.py); sending it once, overlapped with compute, and bringing its
gradient home is ours:

    sent = depart(payload, ring=ring)  # on its way to every other rank; compute something else
    y = attend(q, [sent], expand, ring=ring, chunk_size=chunk_size)  # waits for each block only when it is needed
"""
import functools
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
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


def visible(mine, theirs, exact_local, causal):
    """
    Which attention calls the queries of chunks `mine` need over a block of chunks `theirs`, the same or
    others: a list of (query chunks, key chunks, causal), the first two as slices in units of chunks.

    A query chunk sees the chunks before it; as both lists ascend, that is a prefix of the block, and
    neighbours that see the same prefix share one call. In their own block queries also have the
    diagonal: part of one causal call over everything, or, if `exact_local`, left out here because
    the caller attends to each chunk's own keys apart.
    """
    everything = slice(0, len(mine)), slice(0, len(theirs))
    if mine == theirs and not exact_local:
        return [(*everything, causal)]
    if not causal:
        if mine != theirs:
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

class Link:
    """
    A slow full-duplex link between this rank and all others, dialled on top of the real transfers: what is
    sent leaves through one queue of `mbps` megabits a second, what is received arrives through another, and
    in between lie `latency_ms` milliseconds, one way. mbps 0: as fast as the machine.

    handshake: gloo's way: a message leaves only when the receiver's word that it is ready has come: another latency.

    Clocks of several machines must agree to better than the latency (all ranks of one machine share one).
    """
    clock, sleep = staticmethod(time.time), staticmethod(time.sleep)

    def __init__(self, mbps=0.0, latency_ms=0.0, handshake=False):
        self.dialled = mbps > 0 or latency_ms > 0
        self.seconds_per_byte = 8e-6 / mbps if mbps else 0.0
        self.latency = latency_ms / 1e3 * (1 + handshake)
        self.sent_until = self.received_until = 0.0
        self.worker = ThreadPoolExecutor(1)

    def send(self, n_bytes, now):
        """Queue n_bytes for sending at time `now` (s). Returns the time when the last of them leaves."""
        self.sent_until = max(self.sent_until, now) + n_bytes * self.seconds_per_byte
        return self.sent_until

    def receive(self, n_bytes, left):
        """Returns the time when n_bytes, the last of which left their sender at time `left`, have arrived."""
        self.received_until = max(self.received_until + n_bytes * self.seconds_per_byte, left + self.latency)
        return self.received_until

    def sleep_until(self, moment):
        self.sleep(max(0.0, moment - self.clock()))

    def when_computed(self, device, leave):
        """
        Call leave(now) when everything launched so far is computed: on a CPU at once, for a GPU on a thread, so that
        launching can go on. Returns a function that waits for that and returns what `leave` did.
        """
        if device.type != 'cuda':
            result = leave(self.clock())
            return lambda: result
        start, posted = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = self.clock()
        start.record(self.idle_stream)
        posted.record()

        def follow():
            start.synchronize()
            posted.synchronize()
            return leave(started + max(0.0, start.elapsed_time(posted) / 1e3))
        return self.worker.submit(follow).result

    @functools.cached_property
    def idle_stream(self):
        """A CUDA stream on which nothing else ever runs: an event there happens when it is recorded."""
        return torch.cuda.Stream()


@dataclass
class Meter:
    """
    Bytes sent and received by this rank; hops: exchanges made. fwd, bwd: handed to torch.distributed by the
    ring; sync: the all-reduces of weights or gradients, 2 (N - 1) / N of the tensors' size each way, which is what
    an all-reduce over N ranks costs each of them at least (Patarasuk and Yuan 2009).
    """
    sent_fwd: int = 0
    sent_bwd: int = 0
    sent_sync: int = 0
    received_fwd: int = 0
    received_bwd: int = 0
    received_sync: int = 0
    hops_fwd: int = 0
    hops_bwd: int = 0
    hops_sync: int = 0

    def count(self, phase, sent, received):
        """Book one exchange. phase: 'fwd', 'bwd' or 'sync'; sent, received: bytes."""
        for name, n in (('sent', sent), ('received', received), ('hops', 1)):
            setattr(self, f'{name}_{phase}', getattr(self, f'{name}_{phase}') + n)

    def reset(self):
        self.__init__()


class Ring:
    """
    The ranks that share one sequence (a context-parallel group), seen from this rank.

    group: a torch.distributed process group; None is the one-process ring: nothing is ever sent.
    """

    def __init__(self, group=None, link=None):
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self.link, self.meter = link or Link(), Meter()

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
        n_bytes = sum(t.nbytes for t in tensors)
        self.meter.count(phase, n_bytes, n_bytes)
        to, source = (dist.get_global_rank(self.group, r % self.world_size) for r in (to, source))
        if self.link.dialled:  # beside the data, on the CPU with tag 1, each side tells when its bytes leave
            theirs = torch.empty(1, dtype=torch.float64)
            told = dist.irecv(theirs, source, self.group, tag=1)

            def leave(now):
                ours = torch.tensor([self.link.send(n_bytes, now)], dtype=torch.float64)
                return ours, dist.isend(ours, to, self.group, tag=1)
            left = self.link.when_computed(tensors[0].device, leave)
        # receives first: gloo sends only once it knows that the receiver is ready, and that news must not queue up
        # behind our own data (posted the other way round, both directions of a late exchange run one after the other)
        works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, t, source, self.group) for t in received]
                                       + [dist.P2POp(dist.isend, t, to, self.group) for t in tensors])

        def wait():
            if self.link.dialled:
                told.wait()
                self.link.sleep_until(self.link.receive(n_bytes, theirs.item()))
                _, telling = left()
                telling.wait()
            for work in works:  # gloo returns one work per tensor, NCCL one per batch
                work.wait()
            tensors.clear()  # until here the sent tensors had to stay alive
            return received
        return wait


@torch.no_grad()
def average(tensors, ring):
    """
    Replace tensors, all of one dtype, by their mean over all ranks of the run, not of the ring alone: one
    all-reduce of everything, since over a slow link each one costs 2 (N - 1) latencies.
    """
    if not (dist.is_initialized() and tensors):
        return
    N, link = dist.get_world_size(), ring.link
    flat = torch.cat([t.flatten() for t in tensors])
    n_bytes = 2 * (N - 1) * flat.nbytes // N
    ring.meter.count('sync', n_bytes, n_bytes)
    if link.dialled:
        if flat.is_cuda:
            torch.cuda.current_stream().synchronize()
        left = torch.tensor([link.send(n_bytes, link.clock())], dtype=torch.float64, device=flat.device)
        dist.all_reduce(left, dist.ReduceOp.MAX)  # it ends for none before the last has begun
    dist.all_reduce(flat)
    if link.dialled:
        link.sleep_until(link.receive(n_bytes, left.item() + (2 * (N - 1) - 1) * link.latency))  # one after the other
    parts = flat.div_(N).split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])


def broadcast(tensors, ring):
    """Replace tensors on all ranks of the run by those of the first."""
    if dist.is_initialized():
        n_bytes = sum(t.nbytes for t in tensors)
        for t in tensors:
            dist.broadcast(t.detach(), 0)
        ring.meter.count('sync', n_bytes, n_bytes)
        link = ring.link
        link.sleep_until(link.receive(n_bytes, link.send(n_bytes, link.clock())))


# -----------------------------------------------------------------------------
# A payload's journey

def same(payload, dtype=None, gradient=False):
    """The default pack and unpack: the payload, or its gradient, travels as it is."""
    return payload


def _add(total, grads, dtype):
    """Running sum of lists of tensors, in `dtype`."""
    return [g.to(dtype) for g in grads] if total is None else [a.add_(g) for a, g in zip(total, grads)]


class Transit:
    """
    One payload under way: at hop h it goes straight to rank + h while that of rank - h comes here, and later the
    gradient goes the way back. That is as many bytes as passing blocks from neighbour to neighbour, but no block
    waits for another, so a latency is paid once and not at every hop.

    keep: everything is sent at once, and kept until backward. Otherwise one hop is sent ahead of the one in use,
    nothing is kept, and backward sends everything again.
    n_uses: how many calls of `attend` look at this payload, all of which add to its gradient.
    """

    def __init__(self, payload, ring, keep, pack, unpack, n_uses):
        self.ring, self.keep, self.pack, self.unpack, self.n_uses = ring, keep, pack, unpack, n_uses
        self.n_hops = ring.world_size - 1
        self.ahead = self.n_hops if keep else 1
        self.floating = [t.is_floating_point() for t in payload]
        self.like = [(t.shape, t.dtype, t.device) for t in payload if t.is_floating_point()]
        self.dtype = kernels.accumulation_dtype(payload[0].dtype)
        self.own = pack([t.detach() for t in payload])
        self.shares = {}  # hop -> [how many uses have added to it, the gradient of that block]
        self.returns, self.home = [], None  # gradients of our own payload that are on their way; the sum of the others
        self.send('fwd')

    def send(self, phase):
        """Start sending the payload round. phase: 'fwd', or 'bwd' for the second time."""
        self.phase, self.arrivals, self.blocks = phase, [], {0: self.own}
        self._send_until(self.ahead)

    def _send_until(self, hop):
        for hop in range(len(self.arrivals) + 1, min(hop, self.n_hops) + 1):
            self.arrivals.append(self.ring.exchange(self.own, self.ring.rank + hop, self.ring.rank - hop, self.phase))

    def block(self, hop):
        """The payload of rank - hop as it travelled; waits for it. Without `keep`: once, and in order."""
        self._send_until(hop + self.ahead)
        if hop in self.blocks:
            return self.blocks[hop]
        block, self.arrivals[hop - 1] = self.arrivals[hop - 1](), None
        if self.keep:
            self.blocks[hop] = block
        return block

    def send_home(self, hop, grads):
        """Add `grads` to the gradient of the block of `hop`; once all uses have, it leaves for the block's owner."""
        uses, share = self.shares.pop(hop, (0, None))
        uses, share = uses + 1, grads if self.n_uses == 1 else _add(share, grads, self.dtype)
        if uses < self.n_uses:
            self.shares[hop] = uses, share
            return
        if len(self.returns) == self.ahead:  # without `keep`, receive buffers for all would be too much memory
            self._sum_returns()
        wire = self.pack([total.to(g.dtype) for total, g in zip(share, grads)], gradient=True)
        self.returns.append(self.ring.exchange(wire, self.ring.rank - hop, self.ring.rank + hop, 'bwd'))

    def _sum_returns(self):
        for arrival in self.returns:
            self.home = _add(self.home, self.unpack(arrival(), self.dtype, gradient=True), self.dtype)
        self.returns = []

    def end(self, grads):
        """grads: the gradient of our own payload from our own queries -> the sum over all ranks. Frees everything."""
        self._sum_returns()
        total = _add(self.home, grads, self.dtype)
        self.own = self.blocks = self.arrivals = self.home = None  # autograd may hold this object for longer
        return total


class _Depart(torch.autograd.Function):
    """The identity. Its backward comes after that of every `attend` that uses the payload: then the gradient is complete."""

    @staticmethod
    def forward(ctx, transit, *payload):
        ctx.transit = transit
        return payload

    @staticmethod
    def backward(ctx, *grads):
        transit = ctx.transit
        total = iter(transit.end([g for g, floating in zip(grads, transit.floating) if floating]))
        return None, *(next(total).to(g.dtype) if floating else None for g, floating in zip(grads, transit.floating))


@torch.compiler.disable  # communication stays out of compiled graphs; the kernels inside are compiled apart
def depart(payload, *, ring, keep=True, pack=same, unpack=same, n_uses=1):
    """
    Send a payload to every rank of the ring and start receiving theirs. Nothing is waited for.

    payload: tuple of tensors (B, S, ...), S any multiple of the local number of chunks: a token's numbers,
        a chunk's numbers. Same shapes on every rank. Floating-point ones get gradients. May be empty.
    keep: hold the received payloads until backward instead of sending them a second time. Right for a
        small payload; for uncompressed keys and values it would undo the memory saving of context parallelism.
    pack, unpack: the lossy last step: pack(payload) -> tensors that travel, unpack(those, dtype of the payload) -> payload.
        Gradients pass straight through it. With gradient=True, the same for the gradient of the floating-point ones.
    n_uses: how many calls of `attend` will be given the result. More than one needs keep.

    Returns what `attend` takes: (transit, payload).
    """
    if n_uses > 1 and not keep:
        raise ValueError(f'a payload that is not kept (keep={keep}) can be attended to once, not {n_uses} times')
    if not payload:
        return None, ()
    transit = Transit(payload, ring, keep, pack, unpack, n_uses)
    return transit, _Depart.apply(transit, *payload)


# -----------------------------------------------------------------------------
# Ring attention

@torch.compiler.disable
def attend(q, sent, expand, params=(), local_kv=None, *, ring, chunk_size, causal=True, n_parts=1):
    """
    Attention of local queries over the keys and values of the whole ring (Liu et al. 2023), where what travels is
    not keys and values but a payload that `expand` turns into them.

    q: (B, H, T, hd), this rank's T tokens in `zigzag` order, rotated to their positions.
    sent: list of what `depart` returned. With n_parts=1 one, for the same T tokens.
    expand: (payload, params, positions) -> k, v (B, Hkv, T', hd). It must be a function of its arguments
        alone as far as gradients go, work on any prefix of whole chunks, and rotate k to `positions` (T',).
    params: tuple of tensors that `expand` uses, the same on every rank (a decompressor's weights). Each rank
        returns the gradient for its own queries: sum over ranks as for any other weight.
    local_kv: (k, v), each (B, Hkv, T, hd), the exact keys (rotated) and values of the query tokens. If given,
        every chunk attends to *itself* through these, and to other chunks through the payload, so the
        result depends on how the sequence is cut into chunks but not on which rank holds which. Needed if the
        payload is empty, where nothing else is attended to.
    chunk_size: tokens in a chunk; T must be a multiple.
    causal: False lets every token see every other.
    n_parts: 2 if a rank's tokens are attended to in two calls, their front half (`sent` of the front half) and then
        their back half (`sent` of the front and of the back half), so that one can travel while the other computes.
        Every chunk in any front half is before every chunk in any back half. Causal only.

    Returns (B, H, T, hd) in q's dtype. Accumulates in float32 at least.
    Raises ValueError if the chunks cannot be shared out over the ring.
    """
    transits, payloads = zip(*sent)
    spec = _Spec(ring, expand, causal, chunk_size, n_parts, [t for t in transits if t], [len(p) for p in payloads if p])
    return _Attend.apply(spec, q, *(local_kv or (None, None)), *itertools.chain(*payloads), *params)


@dataclass
class _Spec:
    """Everything about one call of `attend` that is not a tensor."""
    ring: Ring
    expand: Callable
    causal: bool
    chunk_size: int
    n_parts: int
    transits: list  # the last is that of the query tokens themselves
    n_tensors: list  # in each transit's payload

    def blocks(self):
        """(part, hop) of every block, in the order of their arrival: our own, then the others, latest sent last."""
        hops = range(self.ring.world_size)
        return sorted(((part, hop) for part in range(len(self.transits)) for hop in hops), key=lambda b: (b[1] > 0, *b))

    def rebuild(self, part, hop, params, n_local, exact_local):
        """
        Keys and values of the block (part, hop), that of rank - hop, as far as any of the n_local query tokens
        sees it: (calls, payload, k, v). With gradients enabled the payload's tensors are fresh leaves.
        """
        ring, transit, n_chunks = self.ring, self.transits[part], n_local // self.chunk_size
        wire, source = transit.block(hop), (ring.rank - hop) % ring.world_size
        n_held = n_chunks * self.n_parts  # chunks on a rank
        mine, theirs = (zigzag(n_held * ring.world_size, ring.world_size, r)[p * n_chunks:(p + 1) * n_chunks]
                        for r, p in ((ring.rank, len(self.transits) - 1), (source, part)))
        calls = visible(mine, theirs, exact_local, self.causal)
        if not calls:
            return [], [], None, None
        seen = max(keys.stop for _, keys, _ in calls)
        # the payload's tensors differ in granularity, but all run along dimension 1
        wire = [t[:, :t.shape[1] * seen // n_chunks] for t in wire]
        payload = [t.detach() for t in transit.unpack(wire, transit.like[0][1])]
        for t in payload:
            t.requires_grad_(torch.is_grad_enabled() and t.is_floating_point())
        positions = ring.positions(n_held * self.chunk_size, self.chunk_size, payload[0].device, source)
        first = part * n_local
        k, v = self.expand(payload, params, positions[first:first + seen * self.chunk_size])  # (B, Hkv, seen * L, hd)
        tokens = [(slice(i.start * self.chunk_size, i.stop * self.chunk_size),
                   slice(j.start * self.chunk_size, j.stop * self.chunk_size), causal) for i, j, causal in calls]
        return tokens, payload, k, v


def _fold(x, chunk_size):
    """(B, H, c * L, ...) -> (B * c, H, L, ...): every chunk a sequence of its own."""
    return x.unflatten(2, (-1, chunk_size)).transpose(1, 2).flatten(0, 1)


def _unfold(x, batch):
    """The inverse of `_fold`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


class _Attend(torch.autograd.Function):

    @staticmethod
    def forward(ctx, spec, q, k_local, v_local, *tensors):
        s, (batch, _, n_local, _) = spec, q.shape
        params = tensors[sum(s.n_tensors):]
        acc, exact_local = kernels.accumulation_dtype(q.dtype), k_local is not None
        out = lse = None  # (B, H, T, hd) and (B, H, T), in acc
        with torch.autocast(q.device.type, enabled=False):
            if exact_local:  # the diagonal: each chunk a sequence of its own
                folded = (_fold(t, s.chunk_size) for t in (q, k_local, v_local))
                out, lse = (_unfold(t, batch).to(acc) for t in kernels.attention_forward(*folded, s.causal))
            for part, hop in s.blocks():
                calls, _, k, v = s.rebuild(part, hop, params, n_local, exact_local)
                for i, j, causal in calls:
                    block = kernels.attention_forward(q[:, :, i], k[:, :, j], v[:, :, j], causal)
                    if out is None:  # no diagonal apart: the first call, over an own block, covers every query
                        out, lse = (t.to(acc) for t in block)
                    else:
                        out[:, :, i], lse[:, :, i] = kernels.merge(out[:, :, i], lse[:, :, i], *block)
        out = out.to(q.dtype)
        ctx.spec, ctx.n_params = s, len(params)
        ctx.save_for_backward(q, k_local, v_local, out, lse, *params)
        return out

    @staticmethod
    def backward(ctx, dout):
        s, (q, k_local, v_local, out, lse, *params) = ctx.spec, ctx.saved_tensors
        acc, (batch, _, n_local, _) = kernels.accumulation_dtype(q.dtype), q.shape
        n_payload = sum(s.n_tensors)
        payload_needs_grad = any(ctx.needs_input_grad[4:4 + n_payload])
        needs_grad = ctx.needs_input_grad[4 + n_payload:]
        dq = torch.zeros_like(q, dtype=acc)
        dk_local = dv_local = None
        dparams = [torch.zeros_like(p, dtype=acc) if need else None for p, need in zip(params, needs_grad)]

        def block_backward(part, hop):
            """Adds to dq and dparams; returns the gradient of this block's payload, in the payload's dtype."""
            leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad)]
            with torch.enable_grad():
                calls, payload, k, v = s.rebuild(part, hop, leaves, n_local, k_local is not None)
            grads = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in s.transits[part].like]
            if not calls:
                return grads
            if len(calls) > 1:
                dk, dv = torch.zeros_like(k, dtype=acc), torch.zeros_like(v, dtype=acc)
            for i, j, causal in calls:
                dq_, dk_, dv_ = kernels.attention_backward(dout[:, :, i], q[:, :, i], k.detach()[:, :, j],
                                                           v.detach()[:, :, j], out[:, :, i], lse[:, :, i], causal)
                dq[:, :, i] += dq_
                if len(calls) == 1:  # it covers the whole block
                    dk, dv = dk_, dv_
                else:
                    dk[:, :, j] += dk_
                    dv[:, :, j] += dv_
            wanted = [t for t in (*payload, *leaves) if t.requires_grad]
            found = torch.autograd.grad((k, v), wanted, (dk.to(k.dtype), dv.to(v.dtype)))
            for g, part_of_g in zip(grads, found):  # zero where no local query looked
                g[:, :part_of_g.shape[1]] = part_of_g
            for dp, g in zip((dp for dp in dparams if dp is not None), found[len(grads):]):
                dp += g
            return grads

        with torch.autocast(q.device.type, enabled=False):
            # Kept payloads are here already, and our own blocks come last, so that every gradient travels under
            # compute. Otherwise payloads are sent once more, our own computed on first.
            blocks = s.blocks()
            if s.transits and s.transits[-1].keep:
                blocks = [b for b in reversed(blocks) if b[1]] + [b for b in blocks if not b[1]]
            elif s.transits:
                s.transits[-1].send('bwd')
            if k_local is not None:
                folded = (_fold(t, s.chunk_size) for t in (dout, q, k_local, v_local, out, lse))
                dq_, dk_local, dv_local = (_unfold(g, batch) for g in kernels.attention_backward(*folded, s.causal))
                dq += dq_
            dpayload = []
            for part, hop in blocks:
                grads = block_backward(part, hop)
                if hop == 0:
                    own = iter(grads)
                    dpayload += [next(own) if floating else None for floating in s.transits[part].floating]
                elif payload_needs_grad:
                    s.transits[part].send_home(hop, grads)
        ctx.spec = None  # frees what has arrived
        return None, dq.to(q.dtype), dk_local, dv_local, *dpayload, *dparams
