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
from typing import Callable, NamedTuple

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


class Call(NamedTuple):
    """Both sides cut into n_pieces equal pieces; in each piece the chunks `queries` attend to the chunks `keys`."""
    n_pieces: int
    queries: slice
    keys: slice
    causal: bool  # chunk i of a piece sees keys up to chunk i, token by token


def visible(mine, theirs, n_exact, causal):
    """
    Which attention calls the queries of chunks `mine` need over a block of chunks `theirs`, the same or others:
    a list of `Call`.

    A query chunk sees the chunks before it; as both lists ascend, that is a prefix of the block, and neighbours that
    see the same prefix share one call. In their own block queries also have the diagonal: part of one causal call
    over everything, or, if n_exact > 0, left out here because the caller lets every n_exact neighbouring chunks
    attend to themselves apart. What remains is triangles without their diagonal: the back half sees the front half,
    and each half is a triangle again.
    """
    size = len(mine)
    everything = slice(0, size)
    if mine != theirs:
        if not causal:
            return [Call(1, everything, everything, False)]
        calls, m = [], 0
        for prefix, run in itertools.groupby(sum(b < a for b in theirs) for a in mine):
            n = len(list(run))
            if prefix:
                calls.append(Call(1, slice(m, m + n), slice(0, prefix), False))
            m += n
        return calls
    if not n_exact:
        return [Call(1, everything, everything, causal)]
    calls, n_pieces = [], 1
    while causal and size > n_exact and size % 2 == 0 and size // 2 % n_exact == 0:
        half = size // 2
        calls.append(Call(n_pieces, slice(half, size), slice(0, half), False))
        n_pieces, size = 2 * n_pieces, half
    for m in range(0, size, n_exact):  # what cannot be halved: one call for those that see the same
        queries = slice(m, m + n_exact)
        for keys in (slice(0, m), slice(m + n_exact, 0 if causal else size)):
            if keys.start < keys.stop:
                calls.append(Call(n_pieces, queries, keys, False))
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
        uses, share = uses + 1, self._sum([share, grads], self.dtype if self.n_uses > 1 else None)
        if uses < self.n_uses:
            self.shares[hop] = uses, share
            return
        if len(self.returns) == self.ahead:  # without `keep`, receive buffers for all would be too much memory
            self.home = self._sum([self.home, *self._arrived()], self.dtype)
        if share is None:  # no query looked at it
            share = [torch.zeros(shape, device=device) for shape, _, device in self.like]
        wire = self.pack([t.to(dtype) for t, (_, dtype, _) in zip(share, self.like)], gradient=True)
        self.returns.append(self.ring.exchange(wire, self.ring.rank - hop, self.ring.rank + hop, 'bwd'))

    def _sum(self, several, dtype=None):
        """Sum of lists of gradients, some of which may be None; dtype None: each in that of its tensor of the payload."""
        several = [grads for grads in several if grads is not None]
        return [kernels.add_up(ts, dtype or own) for ts, (_, own, _) in zip(zip(*several), self.like)] if several else None

    def _arrived(self):
        """The gradients that were on their way home."""
        arrived = [list(self.unpack(arrival(), self.dtype, gradient=True)) for arrival in self.returns]
        self.returns = []
        return arrived

    def end(self, grads):
        """
        grads: the gradient of our own payload from our own queries, None if there is none -> the sum over all ranks.
        Frees everything.
        """
        total = self._sum([self.home, *self._arrived(), grads])
        self.own = self.blocks = self.arrivals = self.home = None  # autograd may hold this object for longer
        return total


class _Depart(torch.autograd.Function):
    """The identity. Its backward comes after that of every `attend` that uses the payload: then the gradient is complete."""

    @staticmethod
    def forward(ctx, transit, *payload):
        ctx.transit = transit
        ctx.set_materialize_grads(False)
        return payload

    @staticmethod
    def backward(ctx, *grads):
        transit = ctx.transit
        own = [g for g, floating in zip(grads, transit.floating) if floating]
        total = transit.end(None if any(g is None for g in own) else own)
        total = iter([] if total is None else total)
        return None, *(next(total, None) if floating else None for floating in transit.floating)


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
def attend(q, sent, expand, params=(), local=None, expand_local=None, *, ring, chunk_size, n_exact=1, causal=True, n_parts=1):
    """
    Attention of local queries over the keys and values of the whole ring (Liu et al. 2023), where what travels is
    not keys and values but a payload that `expand` turns into them.

    q: (B, H, T, hd), this rank's T tokens in `zigzag` order, rotated to their positions.
    sent: list of what `depart` returned. With n_parts=1 one, for the same T tokens.
    expand: (payload, params, positions) -> k, v (B, Hkv, T', hd). It must be a function of its arguments
        alone as far as gradients go, work on any selection of whole chunks, and rotate k to `positions` (T',).
    params: tuple of tensors that `expand` uses, the same on every rank (a decompressor's weights). Each rank
        returns the gradient for its own queries: sum over ranks as for any other weight.
    local, expand_local: a payload of the query tokens, never sent, and what turns it into their exact keys and values. If
        given, every n_exact neighbouring chunks attend to *themselves* through these, and to other chunks through what
        was sent. With n_exact=1 the result depends on how the sequence is cut into chunks but not on which rank holds
        which; if what is sent is exact too, more means fewer calls. Needed if the payload is empty, where nothing else
        is attended to.
    chunk_size: tokens in a chunk; T must be a multiple.
    causal: False lets every token see every other.
    n_parts: 2 if a rank's tokens are attended to in two calls, their front half (`sent` of the front half) and then
        their back half (`sent` of the front and of the back half), so that one can travel while the other computes.
        Every chunk in any front half is before every chunk in any back half. Causal only.

    Returns (B, H, T, hd) in q's dtype. Accumulates in float32 at least.
    Raises ValueError if the chunks cannot be shared out over the ring, or n_exact does not divide those of a rank.
    """
    transits, payloads = zip(*sent)
    n_chunks = q.shape[2] // chunk_size
    if local and n_chunks % n_exact:
        raise ValueError(f'the number of chunks attended to in one call ({n_chunks}) must be a multiple of n_exact ({n_exact})')
    spec = _Spec(ring, expand, expand_local, causal, chunk_size, n_exact if local else 0, n_parts, n_chunks, len(sent) - 1,
                 q.device, [t for t in transits if t], [len(local or ()), *map(len, payloads)])
    return _Attend.apply(spec, q, *(local or ()), *itertools.chain(*payloads), *params)


LOCAL = -1  # beside the hops 0, 1, ...: the exact keys and values of the query tokens themselves


def _part(x, dim, n_pieces, chunks, n_chunks):
    """
    Dimension `dim` of x, n_chunks chunks long, cut into n_pieces, and of each piece the slice `chunks`: a view with two
    dimensions there, (..., n_pieces, length, ...).
    """
    of_a_chunk = x.shape[dim] // n_chunks
    x = x.unflatten(dim, (n_pieces, -1))
    return x.narrow(dim + 1, chunks.start * of_a_chunk, (chunks.stop - chunks.start) * of_a_chunk)


def _pieces(x, n_pieces):
    """(B, H, n_pieces * L, ...) -> (B * n_pieces, H, L, ...): every piece a sequence of its own."""
    return x.unflatten(2, (n_pieces, -1)).transpose(1, 2).flatten(0, 1)


def _whole(x, batch):
    """The inverse of `_pieces`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


@dataclass
class _Spec:
    """Everything about one call of `attend` that is not a tensor."""
    ring: Ring
    expand: Callable
    expand_local: Callable
    causal: bool
    chunk_size: int
    n_exact: int  # 0: no exact local keys and values
    n_parts: int
    n_chunks: int  # of the query tokens
    part: int  # which part they are
    device: torch.device
    transits: list
    n_tensors: list  # in `local` and in each transit's payload

    def blocks(self):
        """(part, hop) of every block in the order of their arrival: the local one, our own, the others, latest sent last."""
        blocks = [(part, hop) for part in range(len(self.transits)) for hop in range(self.ring.world_size)]
        return [(self.part, LOCAL)] * (self.n_exact > 0) + sorted(blocks, key=lambda b: (b[1] > 0, *b))

    def calls(self, part, hop, local, params, grad=False):
        """
        Every attention call over a block: yields (call, payload, k, v), where k, v (B * n_pieces, Hkv, L, hd) were made of the
        payload of the call's key chunks only. grad: the payload's tensors are fresh leaves, and k and v have a graph.
        """
        n, ring = self.n_chunks, self.ring
        source = (ring.rank - max(hop, 0)) % ring.world_size
        positions = ring.positions(n * self.n_parts * self.chunk_size, self.chunk_size, self.device, source)
        positions = positions.chunk(self.n_parts)[part]
        if hop == LOCAL:
            wire, chunks = local, slice(0, self.n_exact)
            calls = [Call(n // self.n_exact, chunks, chunks, self.causal)]
        else:
            transit = self.transits[part]
            wire = transit.block(hop)  # waits for it
            mine, theirs = (zigzag(n * self.n_parts * ring.world_size, ring.world_size, r)[p * n:(p + 1) * n]
                            for r, p in ((ring.rank, self.part), (source, part)))
            calls = visible(mine, theirs, self.n_exact, self.causal)
        for call in calls:
            # the payload's tensors differ in granularity, but all run along dimension 1
            payload = [_part(t, 1, call.n_pieces, call.keys, n).flatten(1, 2) for t in wire]
            at = _part(positions, 0, call.n_pieces, call.keys, n).flatten()
            if hop != LOCAL:
                payload = transit.unpack(payload, transit.like[0][1])
            payload = [t.detach().requires_grad_(grad and t.is_floating_point()) for t in payload]
            with torch.set_grad_enabled(grad):
                k, v = self.expand_local(payload, at) if hop == LOCAL else self.expand(payload, params, at)
                k, v = (_pieces(t, call.n_pieces) for t in (k, v))
            yield call, payload, k, v

    def queries(self, x, call):
        """The call's part of a tensor of the queries' shape (B, H, T, ...): a view (B, n_pieces, H, L, ...)."""
        return _part(x, 2, call.n_pieces, call.queries, self.n_chunks).transpose(1, 2)


class _Attend(torch.autograd.Function):

    @staticmethod
    def forward(ctx, spec, q, *tensors):
        s, batch, acc = spec, len(q), kernels.accumulation_dtype(q.dtype)
        local, params = tensors[:s.n_tensors[0]], tensors[sum(s.n_tensors):]
        out = lse = None  # (B, H, T, hd) and (B, H, T), in acc
        with torch.autocast(q.device.type, enabled=False):
            for part, hop in s.blocks():
                for call, _, k, v in s.calls(part, hop, local, params):
                    block = kernels.attention_forward(s.queries(q, call).flatten(0, 1), k, v, call.causal)
                    if out is None:  # the first call covers every query
                        out, lse = (_whole(t, batch).to(acc) for t in block)
                    else:
                        kernels.merge(s.queries(out, call), s.queries(lse, call), *(t.unflatten(0, (batch, -1)) for t in block))
        out = out.to(q.dtype)
        ctx.spec, ctx.n_params = s, len(params)
        ctx.save_for_backward(q, out, lse, *local, *params)
        return out

    @staticmethod
    def backward(ctx, dout):
        s, (q, out, lse, *tensors) = ctx.spec, ctx.saved_tensors
        local, params = tensors[:s.n_tensors[0]], tensors[s.n_tensors[0]:]
        acc, batch, n_others = kernels.accumulation_dtype(q.dtype), len(q), len(ctx.needs_input_grad) - len(params)
        payload_needs_grad = any(ctx.needs_input_grad[2 + len(local):n_others])
        needs_grad = ctx.needs_input_grad[n_others:]
        dq = None if s.n_exact else torch.zeros_like(q, dtype=acc)
        dparams = [torch.zeros_like(p, dtype=acc) if need else None for p, need in zip(params, needs_grad)]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad)]

        def block_backward(part, hop):
            """Adds to dq and dparams; returns the gradient of this block's payload, in the payload's dtype; None: all zero."""
            nonlocal dq
            like = [(t.shape, t.dtype, t.device) for t in local] if hop == LOCAL else s.transits[part].like
            parts = []
            for call, payload, k, v in s.calls(part, hop, local, leaves, grad=True):
                dq_, dk, dv = kernels.attention_backward(
                    *(s.queries(t, call).flatten(0, 1) for t in (dout, q)), k.detach(), v.detach(),
                    *(s.queries(t, call).flatten(0, 1) for t in (out, lse)), call.causal)
                if dq is None:  # the diagonal covers every query
                    dq = _whole(dq_, batch).to(acc)
                else:
                    s.queries(dq, call).add_(dq_.unflatten(0, (batch, -1)))
                used = () if hop == LOCAL else leaves
                wanted = [t for t in (*payload, *used) if t.requires_grad]
                found = torch.autograd.grad((k, v), wanted, (dk, dv))
                for dp, g in zip((dp for dp in dparams if dp is not None), found[len(like):]):
                    dp += g
                parts.append((call, found[:len(like)]))
            if len(parts) == 1 and (call.keys.stop - call.keys.start) * call.n_pieces == s.n_chunks:  # of the whole block
                return parts[0][1]
            grads = [torch.zeros(shape, dtype=acc if len(parts) > 1 else dtype, device=device) for shape, dtype, device in like]
            for call, found in parts:
                for total, g in zip(grads, found):
                    total = _part(total, 1, call.n_pieces, call.keys, s.n_chunks)
                    total.add_(g.reshape(total.shape))
            return [total.to(dtype) for total, (_, dtype, _) in zip(grads, like)] if parts else None

        with torch.autocast(q.device.type, enabled=False):
            # Our own blocks come last, so that the gradients of others' travel under compute. Kept payloads are here
            # already; otherwise they are sent once more, under the local block, or if there is none, under nothing.
            own = [b for b in s.blocks() if b[1] == 0]
            others = [b for b in s.blocks() if b[1] > 0]
            if s.transits and not s.transits[-1].keep:
                s.transits[-1].send('bwd')
            else:
                others.reverse()
            dlocal = block_backward(s.part, LOCAL) if s.n_exact else []
            for part, hop in others:
                grads = block_backward(part, hop)
                if payload_needs_grad:
                    s.transits[part].send_home(hop, grads)
            dpayload = []
            for part, hop in own:
                grads = block_backward(part, hop)
                grads = iter(grads or [None] * len(s.transits[part].like))
                dpayload += [next(grads) if floating else None for floating in s.transits[part].floating]
        ctx.spec = None  # frees what has arrived
        return None, dq.to(q.dtype), *dlocal, *dpayload, *dparams
