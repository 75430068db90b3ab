"""
The wire: who holds which part of the sequence, ring attention over torch.distributed, a meter of
every byte that crosses, and a slow link one can dial. Nothing here knows of models.

For P ranks the sequence is cut in 2 P equal pieces ("zigzag"). Four ranks hold

    rank 0: 0 7    rank 1: 1 6    rank 2: 2 5    rank 3: 3 4

so that causal attention costs every rank the same. Each sends its shard, in whatever form a codec
gives it (mos_cp.py), straight to every other one. What its queries see is then known without masks:

    shard of          queries          keys
    an earlier rank   all              its front half
    itself            causal           causal
    a later rank      the back half    all

`python ring.py` times it beside one process alone and PyTorch's own context parallelism.
"""
import argparse
import functools
import re
import tempfile
import time
import timeit
from collections import Counter, deque
from contextlib import contextmanager
from itertools import chain, islice

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels

# -----------------------------------------------------------------------------
# The layout

def positions(n, world_size, device='cpu'):
    """
    Which of n tokens (or chunks) every rank holds, in its local order: (world_size, n / world_size)
    int64. As many are from the front as from the back of the sequence; one rank alone has all.
    """
    if world_size == 1:
        return torch.arange(n, device=device).unsqueeze(0)
    half = n // (2 * world_size)
    rank = torch.arange(world_size, device=device).unsqueeze(1)
    piece = torch.arange(half, device=device)
    return torch.cat((rank * half + piece, n - (rank + 1) * half + piece), dim=1)


def check_chunks(n_chunks, world_size):
    """ValueError if so many chunks cannot be shared out."""
    if world_size > 1 and n_chunks % (2 * world_size):
        raise ValueError(f'n_chunks ({n_chunks}) must be a multiple of 2 * cp ({2 * world_size}): '
                         'change --n_chunks or --cp')


def exact_calls(span, T):
    """
    The attention kernels (`kernels.Call`) of T queries over their own keys and values as they are,
    within pieces of `span` tokens, which divides T. span 0: there is no such exact part.
    """
    return (kernels.Call(T // span, slice(0, span), slice(0, span), True),) if span else ()


def visible(span, T, rank, source):
    """
    The attention kernels that the queries of `rank` need over the rebuilt shard of rank `source`,
    both of T tokens. Of the own shard that is what `exact_calls` leaves: below the diagonal, here
    of eight pieces:

        .                   A row for each piece's queries, a column for its keys; exact (.) are
        c .                 those of the piece itself. One kernel does each letter: the back half
        b b .               sees the front half (a); in each half, now a sequence of its own, the
        b b c .             back half sees the front half (b), and in each half of these (c).
        a a a a .
        a a a a c .         An odd number of pieces has no halves: there, one kernel for each piece
        a a a a b b .       but the first, which sees all before it.
        a a a a b b c .
    """
    Call, everything, front, back = kernels.Call, slice(0, T), slice(0, T // 2), slice(T // 2, T)
    if source < rank:
        return (Call(1, everything, front, False),)
    if source > rank:
        return (Call(1, back, everything, False),)
    if not span:
        return (Call(1, everything, everything, True),)
    calls, n_sequences, n_pieces = [], 1, T // span  # n_pieces in each sequence
    while n_pieces % 2 == 0:
        half = n_pieces // 2 * span
        calls.append(Call(n_sequences, slice(half, 2 * half), slice(0, half), False))
        n_sequences, n_pieces = 2 * n_sequences, n_pieces // 2
    return (*calls, *(Call(n_sequences, slice(start, start + span), slice(0, start), False)
                      for start in range(span, n_pieces * span, span)))


# -----------------------------------------------------------------------------
# Ring attention

def attend(ring, q, k, v, payload, known, weights, codec, rebuild, span):
    """
    Causal attention of this rank's queries over the keys and values of the whole ring (Liu et al.
    2023), where what travels is a payload that a codec turns into keys and values, from every rank
    straight to every other one.

    q: (B, T, H, hd), k, v: (B, T, Hkv, hd): this rank's T tokens, q and k with RoPE.
    payload: tuple of tensors (B, S, ...), S = T for a token's numbers, or the number of chunks for
        a chunk's; the same shapes on every rank. Floating-point ones get gradients.
    known: (world_size, B, T, n), what this rank knows of every rank's tokens.
    weights: the tensors that `rebuild` uses, this rank's own for every shard. They get this rank's
        queries' share of their gradients: as for any weight, average over ranks. So does what is
        known; where it arrived in another layer, its share goes home in that layer's message.
    codec: None: nothing is sent. Else
        .pack(payload) -> the tensors that travel, .unpack(those, last dimensions, dtype) ->
            payload: lossy, its gradient the identity. With gradient=True the same for gradients.
        .keep: hold what has arrived until backward instead of sending it a second time. Right for a
            small payload; uncompressed it would undo the memory saving of context parallelism.
        .feeds_above: return what arrived too; only with keep.
    rebuild: a function (payload, known, weights, source, n) -> keys with RoPE and values
        (B, n, Hkv, hd), not views by Tensor.expand, of the first n tokens of rank `source`, of
        which it gets payload (B, S n / T, ...) and known (B, n, ...).
    span: within pieces of so many tokens queries see k and v as they are; all else comes through
        the codec, also what lies on this rank. 0: everything comes through the codec.
    Returns out (B, T, H, hd) in q's dtype, and with feeds_above what arrived of each floating-point
    tensor of the payload: (world_size, B, S, ...), every rank's, as unpacked. Sums are in float32
    at least.
    """
    return _Attend.apply(ring, codec, rebuild, span, len(payload), q, k, v, known, *payload,
                         *weights)


def floating(tensors):
    """Of a payload what is rounded, and gets gradients."""
    return [t for t in tensors if t.is_floating_point()]


def first_tokens(tensors, n, T):
    """Of tensors (B, S, ...) that belong to T tokens the part of the first n: (B, S n / T, ...)."""
    return [t[:, :t.shape[1] * n // T] for t in tensors]


def add_up(totals, gradients, dtype):
    """Sums of lists, item by item, in `dtype`. None is nothing; a first one stays as it is."""
    sums = []
    for total, gradient in zip(totals, gradients):
        if total is not None and gradient is not None:
            total = total.to(dtype) + gradient
        sums.append(gradient if total is None else total)
    return sums


def rebuilt_backward(rebuild, leaves, source, n, T, attention):
    """
    Backward of attention to a rebuilt shard -> dQ; the other gradients are left in .grad of leaves:
    its payload, what is known of it, and weights. attention: a function (K, V) -> dQ, dK, dV.
    """
    # 3. Its K and V once more, now as a graph from the leaves.
    payload, known, weights = leaves
    with torch.enable_grad():
        keys, values = rebuild(first_tokens(payload, n, T), known[:, :n], weights, source, n)
    # 4. Attention to it: its share of our dQ, our queries' share of its dK, dV.
    dq, dkeys, dvalues = attention(keys.detach(), values.detach())
    # 5. From dK and dV through `rebuild` to the gradients of all it used.
    used = [t for t in (*payload, known, *weights) if t.requires_grad]
    if used:
        torch.autograd.backward((keys, values), (dkeys, dvalues), inputs=used)
    return dq


class _Attend(torch.autograd.Function):
    """
    With keys and values K, V = rebuild(payload) of every shard, and lse the log of the softmax's
    denominator over all of them:

        P = exp(Q K^T / sqrt(hd) - lse)     out = sum of P V
        dV = P^T dout                       dS = P * (dout V^T - rowsum(dout * out)) / sqrt(hd)
        dK = dS^T Q                         dQ = sum of dS K

    Forward lse grows shard by shard (`kernels.merge`). Backward it is known: shards just add up.

    The payload of a rank gets the sum, over all ranks, of what comes to it through `rebuild` and of
    the gradient of what arrived there: both go home in one message.
    """

    @staticmethod
    def forward(ctx, ring, codec, rebuild, span, n_payload, q, k, v, known, *tensors):
        payload, weights = tensors[:n_payload], [t.detach() for t in tensors[n_payload:]]
        T, of_all = q.shape[1], known.detach()
        # last dimensions of the numbers that are rounded and get gradients; None: an integer's
        sizes = [t.shape[-1] if t.is_floating_point() else None for t in payload]
        keep, sum_dtype = codec is not None and codec.keep, kernels.accumulation_dtype(q.dtype)
        arrived = []
        if keep and codec.feeds_above:
            arrived = [t.new_empty(ring.world_size, *t.shape, dtype=sum_dtype)
                       for t in floating(payload)]
        mine, arriving, ctx.shards, out, lse = [], [], [], None, None
        with torch.autocast(q.device.type, enabled=False):
            # 1. Our payload leaves, and theirs are under way to us (at once, if we keep them all).
            if codec:
                wire = codec.pack([t.detach() for t in payload])
                mine, arriving = [(ring.rank, wire)], ring.circulate(wire, 'fwd', keep)
            # 2. Meanwhile our queries attend to our own keys and values as they are,
            if calls := exact_calls(span, T):
                out, lse = kernels.shard_forward(q, k, v, calls)
            # 3. and to those rebuilt from each payload, our own first.
            for source, wire in chain(mine, arriving):
                if source == ring.rank or keep:  # for backward
                    ctx.shards.append((source, wire))
                shard = codec.unpack(wire, sizes, q.dtype)
                for place, t in zip(arrived, floating(shard)):
                    place[source] = t
                if calls := visible(span, T, ring.rank, source):
                    n = T // 2 if source < ring.rank else T  # no query here sees more
                    keys, values = rebuild(
                        first_tokens(shard, n, T), of_all[source, :, :n], weights, source, n)
                    out, lse = kernels.shard_forward(q, keys, values, calls, out, lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, known, *tensors[n_payload:])
        ctx.args = ring, codec, rebuild, span, sizes
        ctx.set_materialize_grads(False)  # None for what arrived, where nobody uses it
        return out, *arrived

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, *darrived):
        if ctx.shards is None:
            raise RuntimeError('a second backward through ring attention: what arrived is gone')
        ring, codec, rebuild, span, sizes = ctx.args
        q, k, v, out, lse, known, *weights = ctx.saved_tensors
        T, sum_dtype = q.shape[1], kernels.accumulation_dtype(q.dtype)
        float_sizes = [size for size in sizes if size is not None]
        dpayload, dweights = [None] * len(float_sizes), [None] * len(weights)
        dknown = torch.zeros_like(known) if known.requires_grad else None
        dq = dk = dv = None
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        coming = deque()  # functions that wait for a rank's share of our payload's gradient

        def add_next():
            gradient = codec.unpack(coming.popleft()(), float_sizes, sum_dtype, gradient=True)
            return add_up(dpayload, gradient, sum_dtype)
        with torch.autocast(q.device.type, enabled=False):
            # 1. The payloads: those that were too large to keep travel a second time.
            mine, others = ctx.shards[:1], ctx.shards[1:]
            if codec and not codec.keep:
                others = ring.circulate(mine[0][1], 'bwd', False)
            # 2. Meanwhile attention to our own keys and values as they are: dQ, dK, dV.
            if calls := exact_calls(span, T):
                dq, dk, dv = kernels.shard_backward(dout, q, k, v, out, lse, calls)
            # Then shard by shard, all ranks in the same order of hops, so that exchanges meet. Our
            # own comes last: computing it hides the last gradient's way.
            for source, wire in chain(others, mine):
                shard = [t.detach().requires_grad_(t.is_floating_point())
                         for t in codec.unpack(wire, sizes, q.dtype)]
                floats = floating(shard)
                dshard = [t if t is None else t[source] for t in darrived or [None] * len(floats)]
                calls = visible(span, T, ring.rank, source)
                if calls:  # none: it is our own, and all of it exact
                    # 3. to 5. Its share of our dQ; in .grad of all others what our queries give.
                    n = T // 2 if source < ring.rank else T
                    of_source = known[source].detach().requires_grad_(known.requires_grad)
                    copies = [t.detach().requires_grad_(t.requires_grad) for t in weights]
                    dq = rebuilt_backward(
                        rebuild, (shard, of_source, copies), source, n, T,
                        lambda K, V: kernels.shard_backward(dout, q, K, V, out, lse, calls, dq))
                    dshard = add_up(dshard, [t.grad for t in floats], sum_dtype)
                    dweights = add_up(dweights, [t.grad for t in copies], sum_dtype)
                    if of_source.grad is not None:
                        dknown[source] = of_source.grad
                if not floats or not (calls or darrived):  # nothing to send
                    continue
                # 6. The payload's goes to its owner, h ranks on, and our own payload's comes from
                #    h ranks back. Our own share (h = 0) is rounded as well, like all others.
                sent = codec.pack([torch.zeros_like(t) if gradient is None else gradient.to(t.dtype)
                                   for t, gradient in zip(floats, dshard)], gradient=True)
                h = source - ring.rank
                coming.append(ring.exchange(sent, h, 'bwd') if h else lambda sent=sent: sent)
                if len(coming) > 1 and not codec.keep:  # large ones: hold one at a time
                    dpayload = add_next()
            # 7. Add up what comes home. (Of what is known and of weights our share stays here.)
            while coming:
                dpayload = add_next()
        ctx.shards, dpayload = None, iter(dpayload)  # autograd may hold ctx for longer
        return (*5 * [None], dq.to(q.dtype), dk, dv, dknown,
                *(None if size is None else next(dpayload) for size in sizes), *dweights)


# -----------------------------------------------------------------------------
# The transport

class PeerError(RuntimeError):
    """This rank waited for another, which has ended, or was silent for longer than the timeout."""


@contextmanager
def waiting(whom, what):
    """A backend's error, when a peer is gone, as a PeerError. (NCCL's ends the process itself.)"""
    try:
        yield
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or 'gloo' in str(e)):
            raise
        # without the place in gloo's source, and its advice
        reason = re.sub(r'^\[[^]]*\] *', '', str(e)).split('\n')[0].split('. ')[0]
        raise PeerError(
            f'rank {dist.get_rank()} waited for {whom} in {what} and gave up: {reason}') from e


class Ring:
    """
    The ranks that share one sequence (a context-parallel group), seen from this rank.
    group: a torch.distributed process group; None: one process, and nothing is ever sent.
    meter: bytes sent_X and received_X, and exchanges_X. X: fwd, bwd, counted where tensors are
        handed to torch.distributed, or sync, what `average` costs.
    """

    def __init__(self, group=None, link=None):
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self.link, self.meter = link or Link(), Counter()

    __deepcopy__ = lambda self, memo: self  # a model's copy: a process group cannot be copied

    def count(self, phase, n):
        """Book one exchange of n bytes each way. phase: 'fwd', 'bwd' or 'sync'."""
        self.meter.update({f'sent_{phase}': n, f'received_{phase}': n, f'exchanges_{phase}': 1})

    def check(self, n_tokens, chunk_size):
        """ValueError if so many tokens cannot be shared out without cutting a chunk."""
        if n_tokens % chunk_size and self.world_size > 1:
            raise ValueError(f'sequence length ({n_tokens}) must be a multiple of the chunk size '
                             f'({chunk_size})')
        check_chunks(n_tokens // chunk_size, self.world_size)

    def shard(self, x, chunk_size):
        """Our part (B, T / world_size, ...) of x (B, T, ...). ValueError if that cuts a chunk."""
        if self.world_size == 1:
            return x
        self.check(x.shape[1], chunk_size)
        return x[:, positions(x.shape[1], self.world_size, x.device)[self.rank]]

    def exchange(self, tensors, hop, phase):
        """
        Post a send of `tensors` to the rank `hop` further on and the receive of tensors of the same
        shapes from the rank `hop` back. phase: 'fwd' or 'bwd', to count. Returns a function that
        waits for both and returns what was received. Both ways raise PeerError if a peer is gone.
        """
        if not tensors:  # a payload of nothing
            return lambda: []
        sent, link = [t.contiguous() for t in tensors], self.link
        n_bytes = sum(t.nbytes for t in sent)
        self.count(phase, n_bytes)
        if link.dialled:  # a last tensor, not counted, tells the receiver when our queue is through
            leaves = link.send(n_bytes, link.stamp(sent[0].device)())
            sent.append(torch.tensor([leaves], dtype=torch.float64, device=sent[0].device))
        post = self.post(sent, hop, phase)

        def wait():
            received = post()
            if link.dialled:
                link.receive(n_bytes, left=received.pop().item())
            return received
        return wait

    def post(self, sent, hop, phase):
        """`exchange` without meter and link."""
        received = [torch.empty_like(t) for t in sent]
        to, source = (dist.get_global_rank(self.group, (self.rank + h) % self.world_size)
                      for h in (hop, -hop))
        whom = f'rank {source}' if source == to else f'rank {source} or {to}'
        what = f"the ring's {'forward' if phase == 'fwd' else 'backward'} exchange"
        with waiting(whom, what):  # posting fails if the peer is known to be gone
            # Receives first: gloo sends only once it knows that the receiver is ready, and that
            # news must not queue up behind our own data. As bytes: NCCL does not know all dtypes.
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.irecv, t.view(torch.uint8), source, self.group) for t in received]
                + [dist.P2POp(dist.isend, t.view(torch.uint8), to, self.group) for t in sent])

        def wait():
            with waiting(whom, what):
                for work in works:  # gloo returns one for each tensor, NCCL one for all
                    work.wait()
            sent.clear()  # until here the sent tensors had to stay alive
            return received
        return wait

    def circulate(self, tensors, phase, at_once):
        """
        Send `tensors` straight to every other rank, and yield (source, theirs) as they arrive: at
        hop h rank i sends to i + h and receives from i - h. That is as many bytes as passing shards
        from neighbour to neighbour, but none waits for another: one latency, not one a hop.
        at_once: post all exchanges now; else one, and the next whenever one is waited for.
        """
        posts = (self.exchange(tensors, hop, phase) for hop in range(1, self.world_size))
        under_way = deque(posts if at_once else islice(posts, 1))

        def arrivals():
            for hop in range(1, self.world_size):
                under_way.extend(islice(posts, 1))
                yield (self.rank - hop) % self.world_size, under_way.popleft()()
        return arrivals()

    # -- over all ranks of the run, not of the ring alone. name: for the error message

    def reduce_over_world(self, tensor, name, op=dist.ReduceOp.SUM):
        """In place."""
        if dist.is_initialized():
            with waiting('all other ranks', name):
                dist.all_reduce(tensor, op)
        return tensor

    def swap_over_world(self, pieces, name):
        """pieces (N, ...), one for each rank -> those that all ranks have for this one (N, ...)."""
        received, as_bytes = torch.empty_like(pieces), torch.uint8
        with waiting('all other ranks', name):
            dist.all_to_all_single(received.view(as_bytes), pieces.view(as_bytes))
        return received

    def gather_over_world(self, piece, name):
        """piece (...) -> every rank's (N, ...)."""
        pieces = piece.new_empty(dist.get_world_size(), *piece.shape)
        with waiting('all other ranks', name):
            dist.all_gather(list(pieces.view(torch.uint8)), piece.view(torch.uint8))
        return pieces


SYNC_ROW = 128  # numbers that share a scale, where a sync is rounded
SYNC_PART = 2**26  # numbers averaged at a time: rounding needs several times their memory


def average_bytes(n, itemsize, N, dtype):
    """What averaging n numbers costs each of N ranks each way: 2 (N - 1) / N of their bytes."""
    n_bytes = n * itemsize
    if dtype != 'compute':
        row = {'bf16': 2 * SYNC_ROW, 'int8': SYNC_ROW + 2, 'int4': SYNC_ROW // 2 + 2}[dtype]
        n_bytes = -(-n // (SYNC_ROW * N)) * N * row  # rows of a piece, for N ranks
    return 2 * (N - 1) * n_bytes // N


@torch.no_grad()
def average(tensors, ring, dtype='compute'):
    """
    Replace tensors, all of one dtype, by their mean over all ranks of the run, not of the ring
    alone; afterwards they are the same on all to the last bit.

    dtype: of the numbers that travel. compute: one all-reduce, since over a slow link each one
        costs 2 (N - 1) latencies. bf16, int8, int4: each rank gets a piece from all, rounded, adds
        it up, and returns the mean, rounded again. int8 and int4 are rounded at random, so that
        nothing is lost on average.
    The meter counts 2 (N - 1) / N of the bytes each way, the least that it costs (Patarasuk and
    Yuan 2009).
    """
    N = dist.get_world_size() if dist.is_initialized() else ring.world_size
    if N == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    for part in (flat,) if dtype == 'compute' else flat.split(SYNC_PART):
        n_bytes = average_bytes(len(part), part.itemsize, N, dtype)
        ring.count('sync', n_bytes)
        name, link = 'the average of gradients or weights', ring.link
        if link.dialled:  # it ends for none before the last has begun
            leaves = torch.tensor(link.send(n_bytes, link.stamp(flat.device)()), device=flat.device,
                                  dtype=torch.float64)
            ring.reduce_over_world(leaves, name, dist.ReduceOp.MAX)
        if dtype == 'compute':
            ring.reduce_over_world(part, name).div_(N)
        else:
            pieces = F.pad(part, (0, -len(part) % (N * SYNC_ROW))).view(N, -1, SYNC_ROW)
            wire = ring.swap_over_world(kernels.encode(pieces, dtype, stochastic=True), name)
            mean = kernels.decode(wire, dtype, SYNC_ROW, part.dtype).sum(dim=0) / N
            wire = ring.gather_over_world(kernels.encode(mean, dtype, stochastic=True), name)
            part.copy_(kernels.decode(wire, dtype, SYNC_ROW, part.dtype).flatten()[:len(part)])
        if link.dialled:  # its steps wait for each other
            link.receive(n_bytes, left=leaves.item() + (2 * N - 3) * link.latency)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])


# -----------------------------------------------------------------------------
# A slow link, and a ring played by one process

class Link:
    """
    A slow full-duplex link between this rank and all others, dialled on top of the real transfers:
    what is sent leaves through one queue of `mbps` megabits a second (0: no limit), what comes
    arrives through another, in the order in which it is waited for, and in between lie `latency_ms`
    milliseconds, one way. Clocks of several machines must agree to better than the latency.
    """
    clock, sleep = staticmethod(time.time), staticmethod(time.sleep)

    def __init__(self, mbps=0.0, latency_ms=0.0):
        self.dialled = mbps > 0 or latency_ms > 0
        self.seconds_per_byte = 8e-6 / mbps if mbps else 0.0
        self.latency = latency_ms / 1e3
        self.sent_until = self.received_until = 0.0
        self.zero = None  # a GPU's event, and when that was

    def stamp(self, device):
        """-> a function that waits until `device` has come to this point, and returns the time."""
        now = self.clock()
        if device.type != 'cuda':
            return lambda: now
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if not self.zero:
            event.synchronize()
            self.zero = event, self.clock()

        def when():
            event.synchronize()
            first, time_then = self.zero
            return time_then + first.elapsed_time(event) / 1e3
        return when

    def send(self, n_bytes, now):
        """Queue n_bytes, ready at the time `now` -> the time when the last leaves."""
        self.sent_until = max(self.sent_until, now) + n_bytes * self.seconds_per_byte
        return self.sent_until

    def receive(self, n_bytes, left):
        """Wait for n_bytes to arrive, the last of which left their sender at the time `left`."""
        self.received_until = max(self.received_until + n_bytes * self.seconds_per_byte,
                                  left + self.latency)
        self.sleep(max(0.0, self.received_until - self.clock()))


class Rehearsal(Ring):
    """
    The middle rank of a ring of `world_size`, played by one process alone: what would come from
    another rank is a copy of our own, no earlier than the link allows. Compute, memory and bytes
    are those of a real rank, as zigzag makes all alike; the results mean nothing.
    """

    def __init__(self, world_size, link=None):
        super().__init__(None, link)
        self.rank, self.world_size = world_size // 2, world_size

    def exchange(self, tensors, hop, phase):
        if not tensors:
            return lambda: []
        received, link = [t.clone() for t in tensors], self.link
        n_bytes = sum(t.nbytes for t in tensors)
        self.count(phase, n_bytes)
        ready = link.stamp(tensors[0].device) if link.dialled else None

        def wait():  # nobody waits for the GPU before this: its queue stays full
            if link.dialled:
                link.receive(n_bytes, left=link.send(n_bytes, ready()))
            return received
        return wait

    def reduce_over_world(self, tensor, name, op=dist.ReduceOp.SUM):
        return tensor.mul_(self.world_size) if op == dist.ReduceOp.SUM else tensor

    def swap_over_world(self, pieces, name):
        return pieces.clone()

    def gather_over_world(self, piece, name):
        return piece.expand(self.world_size, *piece.shape).clone()


# -----------------------------------------------------------------------------
# `python ring.py`: how fast ring attention is on this machine

class Uncompressed:
    """The simplest codec: the payload is kv (B, T, 2, H, hd), keys with RoPE."""
    keep = feeds_above = False
    pack = staticmethod(lambda tensors, gradient=False: list(tensors))
    unpack = staticmethod(lambda wire, sizes, dtype, gradient=False: list(wire))
    rebuild = staticmethod(lambda payload, known, weights, source, n: payload[0].unbind(2))


def _milliseconds(f, n, as_graph=False):
    """
    Of one of n calls back to back, like a model's layers; all ranks begin together. A median.
    as_graph: of f's kernels as one CUDA graph, as in training with --compile (`mos_cp.graphed`).
    """
    if as_graph:  # a local one: NCCL waits for its graphs before it ends
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            f()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            f()
        f = graph.replay

    def several():
        for _ in range(n):
            f()
        dist.barrier()  # waits for the GPU too
    times = timeit.repeat(several, dist.barrier, number=1, repeat=4)[1:]  # the first warms up
    return sorted(times)[1] * 1e3 / n


@sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)
def _theirs(q, k, v, dout, n):
    """PyTorch's attention of q, k, v, dout (1, H, T, hd) -> its results, and milliseconds."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def f():
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)
    return f(), _milliseconds(f, n)


def _benchmark(rank, P, store):
    """One process of P; rank 0 prints. store: path of a file that does not exist."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method
    device, dtype, H, hd = torch.device('cpu'), torch.float32, 4, 64
    if cuda := torch.cuda.is_available():
        device, dtype, H, hd = torch.device('cuda', rank), torch.bfloat16, 16, 128
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group('nccl' if cuda else 'gloo', init_method=f'file://{store}', rank=rank,
                            world_size=P, device_id=device if cuda else None)
    ring, mesh = Ring(dist.group.WORLD), dist.init_device_mesh(device.type, (P,))
    backend = kernels.attention_backend(device.type, dtype, hd)
    say = functools.partial(print, flush=True) if rank == 0 else lambda line: None
    say(f'{P} x {torch.cuda.get_device_name() if cuda else "CPU"}, torch {torch.__version__}: ms '
        f'forward and backward ({backend}, {H} heads of {hd}), and share of one process / {P}\n\n|'
        ' T | one process | eager | compiled in a CUDA graph | context_parallel |\n|' + 5 * '---|')
    set_rotate_method('alltoall')
    for n_tokens in (4096, 8192, 16384, 65536, 131072) if cuda else (1024, 4096):  # of a rank
        T, n = n_tokens * P, 5 if n_tokens * P < 100_000 else 1
        torch.manual_seed(0)
        whole = torch.randn(4, 1, T, H, hd, dtype=dtype, device=device)
        q, k, v, dout = (ring.shard(x, n_tokens // 2).requires_grad_() for x in whole)
        kv = torch.stack((k, v), dim=2).detach().requires_grad_()
        nothing = q.new_empty(P, 1, n_tokens, 0)  # known

        def ours(compiling=False):
            kernels.compile_fused(compiling)
            codec = Uncompressed()
            out, = attend(ring, q, k, v, (kv,), nothing, (), codec, codec.rebuild, span=n_tokens)
            gradients = torch.autograd.grad(out, (q, k, v, kv), dout, materialize_grads=True)
            return out.detach(), *gradients
        whole = [x.transpose(1, 2).contiguous() for x in whole]  # (1, H, T, hd), as PyTorch likes
        expected, one = _theirs(*whole, n)
        out, dq, dk, dv, dkv = ours(cuda)
        for x, y in zip(expected, (out, dq, dk + dkv[:, :, 0], dv + dkv[:, :, 1])):
            x = ring.shard(x.transpose(1, 2), n_tokens // 2)
            assert (x - y).float().norm() < 1e-2 * x.float().norm(), 'it differs from attention'
        times = [_milliseconds(ours, n)]
        if cuda:
            times.append(_milliseconds(functools.partial(ours, True), n, as_graph=True))
            with context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 4):
                times.append(_theirs(*whole, n)[1])
        say(f'| {T} | {one:.1f} | ' + ' '.join(f'{t:.1f} ({one / P / t:.1%}) |' for t in times))
    dist.destroy_process_group()


if __name__ == '__main__':
    argparse.ArgumentParser(description='Times ring attention alone, see README.md.').parse_args()
    n = torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_benchmark, (n, f'{folder}/store'), nprocs=n)
