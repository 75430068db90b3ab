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
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


def visible(mine, theirs, exact_local, causal):
    """
    Which attention calls the queries of chunks `mine` need over a block of chunks `theirs`, the same or others:
    a list of `Call`.

    A query chunk sees the chunks before it; as both lists ascend, that is a prefix of the block, and neighbours that
    see the same prefix share one call. In their own block queries also have the diagonal: part of one causal call
    over everything, or, if `exact_local`, left out here because the caller attends to each chunk's own keys apart.
    What remains is a triangle: its back half sees its front half, and each half is such a triangle again.
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
    if not exact_local:
        return [Call(1, everything, everything, causal)]
    calls, n_pieces = [], 1
    while causal and size % 2 == 0:
        half = size // 2
        calls.append(Call(n_pieces, slice(half, size), slice(0, half), False))
        n_pieces, size = 2 * n_pieces, half
    for m in range(size):  # an odd number of chunks cannot be halved, and a square has no halves: one at a time
        for keys in (slice(0, m), slice(m + 1, m + 1 if causal else size)):
            if keys.start < keys.stop:
                calls.append(Call(n_pieces, slice(m, m + 1), keys, False))
    return calls


# -----------------------------------------------------------------------------
# The transport

class PeerError(RuntimeError):
    """This rank waited for another one, which has ended, or been silent for longer than the group's timeout."""


@contextmanager
def waiting(whom, what):
    """Turns what the backend says when a peer is gone into a PeerError of one sentence. (NCCL's watchdog ends the process itself.)"""
    try:
        yield
    except RuntimeError as e:
        reason = re.sub(r'^\[[^]]*\] *', '', str(e)).split('\n')[0].split('. ')[0]  # without the place in gloo's source, and its advice
        raise PeerError(f'rank {dist.get_rank()} waited for {whom} in {what} and gave up: {reason}') from e


def sum_over_ranks(tensor, what):
    """All-reduce `tensor` in place, over all ranks of the run. what: a name for the operation, should it fail."""
    with waiting('all other ranks', what):
        dist.all_reduce(tensor)


class Link:
    """
    A slow full-duplex link between this rank and all others, dialled on top of the real transfers: what is
    sent leaves through one queue of `mbps` megabits a second, what is received arrives through another, and
    in between lie `latency_ms` milliseconds, one way. mbps 0: as fast as the machine.

    handshake: gloo's way: a message leaves only when the receiver's word that it is ready has come, another latency, and
    that word waits behind the data that its sender is sending. All ranks do the same, so its queue is taken to be as ours.

    Clocks of several machines must agree to better than the latency (all ranks of one machine share one).
    """
    clock, sleep = staticmethod(time.time), staticmethod(time.sleep)

    def __init__(self, mbps=0.0, latency_ms=0.0, handshake=False):
        self.dialled = mbps > 0 or latency_ms > 0
        self.seconds_per_byte = 8e-6 / mbps if mbps else 0.0
        self.latency, self.handshake = latency_ms / 1e3, handshake
        self.sending_since = self.sent_until = self.received_until = 0.0
        self.worker = ThreadPoolExecutor(1)

    def send(self, n_bytes, now):
        """Queue n_bytes for sending at time `now` (s). Returns the time when the last of them leaves."""
        start = now
        if self.handshake:
            start = (max(now, self.sent_until) if now > self.sending_since else now) + self.latency
        if start > self.sent_until:  # after a pause
            self.sending_since = self.sent_until = start
        self.sent_until += n_bytes * self.seconds_per_byte
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
    an all-reduce over N ranks costs each of them at least (Patarasuk and Yuan 2009), and the broadcast of the bases.
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

        Returns a function that waits for both and returns the received tensors. Raises PeerError if the peer is gone, now or then.
        """
        tensors = [t.contiguous() for t in tensors]
        received = [torch.empty_like(t) for t in tensors]
        n_bytes = sum(t.nbytes for t in tensors)
        self.meter.count(phase, n_bytes, n_bytes)
        to, source = (dist.get_global_rank(self.group, r % self.world_size) for r in (to, source))

        def waiting_for(rank):
            return waiting(f'rank {rank}', f"the ring's {'forward' if phase == 'fwd' else 'backward'} exchange")

        def leave(now):
            ours = torch.tensor([self.link.send(n_bytes, now)], dtype=torch.float64)
            return ours, dist.isend(ours, to, self.group, tag=1)
        with waiting_for(source if source == to else f'{source} or {to}'):  # posting fails if it is known to be gone
            if self.link.dialled:  # beside the data, on the CPU with tag 1, each side tells when its bytes leave
                theirs = torch.empty(1, dtype=torch.float64)
                told = dist.irecv(theirs, source, self.group, tag=1)
                left = self.link.when_computed(tensors[0].device, leave)
            # receives first: gloo sends only once it knows that the receiver is ready, and that news must not queue up
            # behind our own data (posted the other way round, both directions of a late exchange run one after the other)
            # as bytes: NCCL does not know all dtypes
            works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, t.view(torch.uint8), source, self.group) for t in received]
                                           + [dist.P2POp(dist.isend, t.view(torch.uint8), to, self.group) for t in tensors])

        def wait():
            if self.link.dialled:
                with waiting_for(source):
                    told.wait()
                self.link.sleep_until(self.link.receive(n_bytes, theirs.item()))
                with waiting_for(to):
                    left()[1].wait()
            for i, work in enumerate(works):  # gloo returns one work per tensor, NCCL one per batch
                with waiting_for(source if i < len(received) else to):
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
    N, link, what = dist.get_world_size(), ring.link, 'the average of gradients or weights'
    flat = torch.cat([t.flatten() for t in tensors])
    n_bytes = 2 * (N - 1) * flat.nbytes // N
    ring.meter.count('sync', n_bytes, n_bytes)
    if link.dialled:
        if flat.is_cuda:
            torch.cuda.current_stream().synchronize()
        left = torch.tensor([link.send(n_bytes, link.clock())], dtype=torch.float64, device=flat.device)
        with waiting('all other ranks', what):
            dist.all_reduce(left, dist.ReduceOp.MAX)  # it ends for none before the last has begun
    sum_over_ranks(flat, what)
    if link.dialled:
        one_by_one = (2 * (N - 1) - 1) * (1 + link.handshake)  # the steps of an all-reduce wait for each other
        link.sleep_until(link.receive(n_bytes, left.item() + one_by_one * link.latency))
    parts = flat.div_(N).split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])


def broadcast(tensors, ring):
    """Replace tensors on all ranks of the run by those of the first."""
    if dist.is_initialized():
        n_bytes = sum(t.nbytes for t in tensors)
        with waiting('rank 0', 'the broadcast of the bases'):
            for t in tensors:
                dist.broadcast(t.detach(), 0)
        first = dist.get_rank() == 0
        ring.meter.count('sync', n_bytes * first, n_bytes * (not first))
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
        self.like = [t.detach() for t in payload if t.is_floating_point()]  # its gradients look like these
        self.dtype = kernels.accumulation_dtype(self.like[0].dtype)
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
            share = [torch.zeros_like(t) for t in self.like]
        wire = self.pack([g.to(t.dtype) for g, t in zip(share, self.like)], gradient=True)
        self.returns.append(self.ring.exchange(wire, self.ring.rank - hop, self.ring.rank + hop, 'bwd'))

    def _sum(self, several, dtype=None):
        """Sum of lists of gradients, some of which may be None; dtype None: each in that of its tensor of the payload."""
        several = [grads for grads in several if grads is not None]
        return [kernels.add_up(gs, dtype or t.dtype) for gs, t in zip(zip(*several), self.like)] if several else None

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
        if grads is not None:  # rounded as if it too had travelled: with few ranks or one the same noise as with many
            grads = self.unpack(self.pack(grads, gradient=True), self.dtype, gradient=True)
        total = self._sum([self.home, *self._arrived(), grads])
        self.own = self.like = self.blocks = self.arrivals = self.home = None  # autograd may hold this object for longer
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
def attend(q, sent, expand, params=(), local=None, expand_local=None, *, ring, chunk_size, causal=True, n_parts=1):
    """
    Attention of local queries over the keys and values of the whole ring (Liu et al. 2023), where what travels is
    not keys and values but a payload that `expand` turns into them.

    q: (B, H, T, hd), this rank's T tokens in `zigzag` order, rotated to their positions.
    sent: list of what `depart` returned. With n_parts=1 one, for the same T tokens.
    expand: (payload, params, positions) -> k, v (B, Hkv, T', hd). It must be a function of its arguments
        alone as far as gradients go, work on any selection of whole chunks, and rotate k to `positions` (T',).
    params: tuple of tensors that `expand` uses, the same on every rank (a decompressor's weights). Each rank
        returns the gradient for its own queries: sum over ranks as for any other weight.
    local, expand_local: a payload of the query tokens, never sent, and what turns it, (payload, positions) -> k, v, into
        their exact keys and values. If given, every chunk attends to *itself* through these, and to other chunks
        through what was sent, so the result depends on how the sequence is cut into chunks but not on which rank holds
        which. Needed if the payload is empty, where nothing else is attended to.
    chunk_size: tokens in a chunk; T must be a multiple.
    causal: False lets every token see every other.
    n_parts: 2 if a rank's tokens are attended to in two calls, their front half (`sent` of the front half) and then
        their back half (`sent` of the front and of the back half), so that one can travel while the other computes.
        Every chunk in any front half is before every chunk in any back half. Causal only.

    Returns (B, H, T, hd) in q's dtype. Accumulates in float32 at least.
    Raises ValueError if the chunks cannot be shared out over the ring.
    """
    transits, payloads = zip(*sent)
    spec = _Spec(ring, expand, expand_local, bool(local), causal, chunk_size, n_parts, q.shape[2] // chunk_size, len(sent) - 1,
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
    exact_local: bool
    causal: bool
    chunk_size: int
    n_parts: int
    n_chunks: int  # of the query tokens
    part: int  # which part they are
    device: torch.device
    transits: list
    n_tensors: list  # in `local` and in each transit's payload

    def chunks(self, rank, part):
        """The chunks that a part of a rank's tokens consists of."""
        n, world_size = self.n_chunks, self.ring.world_size
        return zigzag(n * self.n_parts * world_size, world_size, rank)[part * n:(part + 1) * n]

    def work(self):
        """
        All calls, as three lists of (part, hop, calls): first, of which the one call covers every query; the rest of our own
        blocks; and the blocks of others, in the order of their arrival, latest sent last.
        """
        ring, n = self.ring, self.n_chunks
        own, others = [], []
        for part, hop in itertools.product(range(len(self.transits)), range(ring.world_size)):
            theirs = self.chunks((ring.rank - hop) % ring.world_size, part)
            calls = visible(self.chunks(ring.rank, self.part), theirs, self.exact_local, self.causal)
            (others if hop else own).append((part, hop, calls))
        if self.exact_local:
            chunk = slice(0, 1)
            return [(self.part, LOCAL, [Call(n, chunk, chunk, self.causal)])], own, others
        part, _, calls = own.pop()
        if ring.world_size > 1 and self.causal and n % 2 == 0:
            # two triangles and a square, so that in backward something is left to compute while the last gradient travels
            front, back = slice(0, n // 2), slice(n // 2, n)
            calls = [Call(2, front, front, True), Call(1, back, front, False)]
        return [(part, 0, calls[:1])], [*own, (part, 0, calls[1:])], others

    def rebuild(self, wire, part, hop, call, params):
        """
        wire: the block (part, hop) as it travelled. Returns the payload of the call's key chunks, and keys and values
        (B * n_pieces, Hkv, L, hd) made of it. With gradients enabled the payload's tensors are fresh leaves, and k and
        v have a graph.
        """
        ring, n, transit = self.ring, self.n_chunks, None if hop == LOCAL else self.transits[part]
        source = (ring.rank - max(hop, 0)) % ring.world_size
        positions = ring.positions(n * self.n_parts * self.chunk_size, self.chunk_size, self.device, source)
        at = _part(positions.chunk(self.n_parts)[part], 0, call.n_pieces, call.keys, n).flatten()
        # the payload's tensors differ in granularity, but all run along dimension 1
        payload = [_part(t, 1, call.n_pieces, call.keys, n).flatten(1, 2) for t in wire]
        if transit:
            payload = transit.unpack(payload, transit.like[0].dtype)
        payload = [t.detach().requires_grad_(torch.is_grad_enabled() and t.is_floating_point()) for t in payload]
        k, v = self.expand(payload, params, at) if transit else self.expand_local(payload, at)
        return payload, *(_pieces(t, call.n_pieces) for t in (k, v))

    def add_part(self, totals, block, call, found, like):
        """Add the gradients `found` of the call's key chunks to totals[block], where there is one for each tensor of `like`."""
        if block not in totals and call.n_pieces * (call.keys.stop - call.keys.start) == self.n_chunks:
            totals[block] = list(found)  # all chunks
            return
        first = block not in totals
        so_far = [torch.zeros_like(t) for t in like] if first else totals[block]
        # what is added to once is exact as it is; sums are float32 at least
        totals[block] = so_far if first else [t.to(kernels.accumulation_dtype(t.dtype)) for t in so_far]
        for total, g in zip(totals[block], found):
            total = _part(total, 1, call.n_pieces, call.keys, self.n_chunks)
            kernels.accumulate(total, g.reshape(total.shape))

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
            for part, hop, calls in itertools.chain(*s.work()):
                wire = local if hop == LOCAL else s.transits[part].block(hop)  # waits for it
                for call in calls:
                    _, k, v = s.rebuild(wire, part, hop, call, params)
                    block = kernels.attention_forward(s.queries(q, call).flatten(0, 1), k, v, call.causal)
                    if out is None:
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
        dparams = [torch.zeros_like(p, dtype=acc) if need else None for p, need in zip(params, needs_grad)]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad)]
        dq, totals = None, {}  # totals: (part, hop) -> gradients of that block's payload

        def block_backward(part, hop, calls):
            wire = local if hop == LOCAL else s.transits[part].block(hop)
            for call in calls:
                call_backward(wire, part, hop, call)

        def call_backward(wire, part, hop, call):
            """Adds to dq, dparams and totals."""
            nonlocal dq
            with torch.enable_grad():
                payload, k, v = s.rebuild(wire, part, hop, call, leaves)
            dq_, dk, dv = kernels.attention_backward(
                *(s.queries(t, call).flatten(0, 1) for t in (dout, q)), k.detach(), v.detach(),
                *(s.queries(t, call).flatten(0, 1) for t in (out, lse)), call.causal)
            if dq is None:
                dq = _whole(dq_, batch).to(acc)
            else:
                kernels.accumulate(s.queries(dq, call), dq_.unflatten(0, (batch, -1)))
            like = local if hop == LOCAL else s.transits[part].like
            wanted = [t for t in (*payload, *(() if hop == LOCAL else leaves)) if t.requires_grad]
            found = torch.autograd.grad((k, v), wanted, (dk, dv))
            for dp, g in zip((dp for dp in dparams if dp is not None), found[len(like):]):
                dp += g
            s.add_part(totals, (part, hop), call, found[:len(like)], like)

        with torch.autocast(q.device.type, enabled=False):
            first, own, others = s.work()
            # Our own blocks come last, so that the gradients of others' travel under compute. Kept payloads are here
            # already; otherwise they are sent once more, under the first call.
            if s.transits and not s.transits[-1].keep:
                s.transits[-1].send('bwd')
            else:
                others.reverse()
            block_backward(*first[0])
            for part, hop, calls in others:
                block_backward(part, hop, calls)
                if payload_needs_grad:
                    s.transits[part].send_home(hop, totals.pop((part, hop), None))
            for block in own:
                block_backward(*block)
        dpayload = []
        for part, transit in enumerate(s.transits):
            grads = iter(totals.pop((part, 0), [None] * len(transit.like)))
            dpayload += [next(grads) if floating else None for floating in transit.floating]
        ctx.spec = None  # frees what has arrived
        return None, dq.to(q.dtype), *totals.pop((s.part, LOCAL), ()), *dpayload, *dparams
