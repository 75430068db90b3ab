"""
Tests. The oracle is one process with one dense softmax in float64, differentiated by autograd; every parallel
path must equal it on every rank. Checks that need several processes run in one spawn for each world size (gloo,
CPU); `pytest -k "every_rank and 2-"` selects those of two.
"""
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import kernels
import mos_cp
import ring as ring_module
import train
from mos_cp import GPT, GPTConfig
from ring import Link, PeerError, Ring, attend, average, visible, zigzag

FORKS = mp.get_context('forkserver')  # processes that need not import torch again
FORKS.set_forkserver_preload([__name__])


def relative_error(a, b):
    """|a - b| / |b|, and 0 for two empty or zero tensors."""
    difference = (a - b).norm().item()
    return difference / b.norm().item() if difference else 0.0


def assert_close(a, b, what, tolerance=1e-10):
    assert a.shape == b.shape, f'{what}: {tuple(a.shape)} != {tuple(b.shape)}'
    assert relative_error(a, b) < tolerance, f'{what}: relative error {relative_error(a, b):.2e}'


# -----------------------------------------------------------------------------
# The oracle

def dense_attend(ring, q, k, v, payload, codec, table, span, run=None):
    """`attend` on one process: all scores at once, one mask, one softmax, gradients by autograd."""
    t = torch.arange(q.shape[1])
    past = t[:, None] >= t
    own = t[:, None] // span == t // span if span else torch.zeros_like(past)
    blocks = [(k, v, past & own)] if span else []
    if codec:  # straight-through: the value of what travelled, the gradient of what was sent
        packed = codec.pack([p.detach() for p in payload])
        travelled = codec.unpack(packed, [p.shape[-1] for p in payload], q.dtype)
        payload = [p + (w - p).detach() if p.is_floating_point() else p for p, w in zip(payload, travelled)]
        kv = codec.expand(payload, codec.params)
        blocks.append((kernels.rope(kv[:, :, 0], table[0]), kv[:, :, 1], past & ~own))
    groups = q.shape[2] // blocks[0][0].shape[2]
    scores = torch.cat([
        torch.einsum('bthd,bshd->bhts', q, k.repeat_interleave(groups, 2)).masked_fill(~mask, float('-inf'))
        for k, _, mask in blocks], dim=-1) / q.shape[-1] ** 0.5
    values = torch.cat([v.repeat_interleave(groups, 2) for _, v, _ in blocks], dim=1)
    return torch.einsum('bhts,bshd->bthd', scores.softmax(-1), values)


# -----------------------------------------------------------------------------
# Checks that run on every rank of a ring. Each takes the ring and raises if something is off.

CHECKS = {}


def check(f):
    CHECKS[f.__name__] = f
    return f


class ToyCodec(mos_cp.Full):
    """A shared weight, and a second, coarser payload tensor: nothing that mos_cp.py has."""

    def __init__(self, weight, n_kv_head, keep):
        super().__init__()
        self.params_, self.n_kv_head, self.keep = (weight,), n_kv_head, keep

    @property
    def params(self):
        return self.params_

    def expand(self, payload, params):
        z, s = payload
        kv = z.unflatten(1, (s.shape[1], -1)) * s[:, :, None] @ params[0].to(z.dtype)  # (B, c, L, 2 Hkv hd)
        return kv.flatten(1, 2).unflatten(-1, (2, self.n_kv_head, -1))


def attention_case(ring, n_chunks, n_head, n_kv_head, span, keep, dtype=torch.float64):
    """One random ring attention against the oracle. span: in chunks, as in `attend`."""
    g = torch.Generator().manual_seed(0)
    B, hd, L = 2, 8, 4
    T = n_chunks * L

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    whole = dict(q=random(B, T, n_head, hd), k=random(B, T, n_kv_head, hd), v=random(B, T, n_kv_head, hd),
                 latent=random(B, T, 5), per_chunk=random(B, n_chunks, 1), weight=random(5, 2 * n_kv_head * hd))
    dout = random(B, T, n_head, hd)
    table = kernels.rope_table(T, hd, base=10.0).double()

    def part(name, x):
        """What this rank holds of a tensor."""
        return x if name == 'weight' else ring.shard(x, 1 if name == 'per_chunk' else L)

    def run(attend, ring, tensors, dout):
        t = {name: x.clone().requires_grad_() for name, x in tensors.items() if span or name not in 'kv'}
        where = ring_module.positions(T, ring.world_size, torch.device('cpu'))
        out = attend(ring, t['q'], t.get('k'), t.get('v'), (t['latent'], t['per_chunk']),
                     ToyCodec(t['weight'], n_kv_head, keep), table[where].to(dtype), span * L)
        return out, dict(zip(t, torch.autograd.grad(out, list(t.values()), dout)))

    expected_out, expected = run(dense_attend, Ring(), whole, dout)
    mine = {name: part(name, x).to(torch.float64 if name == 'weight' else dtype) for name, x in whole.items()}
    out, found = run(attend, ring, mine, part('dout', dout).to(dtype))
    if ring.world_size > 1:  # every rank has the share of its own queries
        dist.all_reduce(found['weight'], group=ring.group)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert out.dtype == dtype
    assert_close(out.double(), part('out', expected_out), 'out', tolerance)
    for name in found:
        assert_close(found[name].double(), part(name, expected[name]), 'd' + name, tolerance)


@check
def ring_equals_dense(ring):
    for per_rank, heads, keep in itertools.product((2, 4, 6), ((3, 3), (3, 1), (4, 2)), (True, False)):
        for span in {0, 1, per_rank // 2}:
            attention_case(ring, per_rank * ring.world_size, *heads, span, keep)


@check
def ring_equals_dense_in_low_precision(ring):
    merge, summed_in = kernels.merge, set()

    def noting(out, *rest):
        summed_in.add(out.dtype)
        return merge(out, *rest)
    kernels.merge = noting
    try:
        for dtype, span in itertools.product((torch.float32, torch.bfloat16), (0, 1)):
            attention_case(ring, 2 * ring.world_size, 3, 3, span, True, dtype)
    finally:
        kernels.merge = merge
    assert summed_in == {torch.float32}, summed_in


@check
def broken_code_fails_the_oracle(ring):
    """The oracle can fail: break the backward, the ring, the merge, the positions or the mask, and see it."""
    if ring.world_size != 2:
        return
    backward, exchange = kernels.attention_backward, Ring.exchange
    rebuild, see = ring_module._Spec.rebuild, ring_module.visible

    def swapped(*args):
        dq, dk, dv = backward(*args)
        return dq, dv, dk

    def lost_gradient(self, tensors, to, source, phase):
        wait = exchange(self, tensors, to, source, phase)
        return (lambda: [torch.zeros_like(t) for t in wait()]) if phase == 'bwd' else wait

    def misplaced(self, payload, params, source):
        return rebuild(self, payload, params, self.ring.rank)

    def blind(rank, source, T, span):
        return see(rank, source, T, span) if source in (None, rank) else ()

    for owner, name, broken in (
            (kernels, 'attention_backward', swapped), (Ring, 'exchange', lost_gradient),
            (kernels, 'merge', lambda *args: None), (ring_module._Spec, 'rebuild', misplaced),
            (ring_module, 'visible', blind)):
        intact = getattr(owner, name)
        setattr(owner, name, broken)
        try:
            attention_case(ring, 4, 3, 3, 1, True)
        except AssertionError as e:
            assert 'relative error' in str(e)
        else:
            raise RuntimeError(f'nobody noticed the broken {name}')
        finally:
            setattr(owner, name, intact)


EXACT = dict(grad_wire_dtype='compute')  # a gradient that travels is not rounded at random
OPTIONS = [  # what a model can send
    dict(send='full'), dict(send='local'), dict(send='topk', topk=0.3), dict(send='topk', exact_local=False),
    dict(send='full', wire_dtype='int4', **EXACT), dict(send='full', wire_dtype='int8', exact_local=False, **EXACT),
    dict(send='topk', exact_local=False, wire_dtype='int8', **EXACT),
    dict(), dict(compress_last=False), dict(recompute=True), dict(wire_dtype='int4', **EXACT),
    dict(wire_dtype='bf16', joint_kv=False, **EXACT), dict(joint_kv=False, rank_k=4), dict(exact_local=False),
    dict(basis='fixed'), dict(basis='fixed', joint_kv=False, exact_local=False),
    dict(basis='rotated'), dict(basis='rotated', joint_kv=False, exact_local=False, compress_last=False),
    dict(basis='rotated', joint_kv=False, exact_local=False, wire_dtype='int8', **EXACT),
    dict(basis='rotated', generator='spectral', n_generators=3), dict(basis='rotated', theta_clip=0.0),
]


def small_model(ring=None, seed=0, **options):
    """A float64 GPT with odd head counts, grouped keys and a rotation that does something."""
    config = GPTConfig(**{**dict(block_size=32, n_chunks=8, n_layer=2, n_head=3, n_kv_head=1, n_embd=48,
                                 vocab_size=50, rank=7, wire_dtype='compute'), **options})
    torch.manual_seed(seed)
    model = GPT(config, ring).double()
    model.loss_tokens = 5
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(30 if 'psi' in name else 3 if p.dim() == 2 and 'codec' not in name else 1)
    return model


def random_tokens(g, model):
    """idx and targets, some of which are ignored: more on some ranks than on others, all of a shard's last ones."""
    idx, targets = torch.randint(50, (2, 2, 32), generator=g)
    targets[:, :4], targets[0, 17] = -1, -1
    return (model.ring.shard(t, model.config.chunk_size) for t in (idx, targets))


def train_steps(model, n_steps, dense=False):
    """-> the losses, the first gradients, and how far the parameters moved: each averaged over the ring."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    before = [p.detach().clone() for p in model.parameters()]
    g, losses, gradients = torch.Generator().manual_seed(1), [], None
    for _ in range(n_steps):
        mos_cp.attend = dense_attend if dense else attend
        try:
            loss = model(*random_tokens(g, model))[1]
            loss.backward()
        finally:
            mos_cp.attend = attend
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        mean_loss = loss.detach().clone()
        average([mean_loss[None], *(p.grad for p in params.values())], model.ring)
        losses.append(mean_loss)
        gradients = gradients or {name: p.grad.clone() for name, p in params.items()}
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: p.detach() - b for (name, p), b in zip(model.named_parameters(), before) if p.requires_grad}
    return torch.stack(losses), gradients, moved


@check
def model_equals_dense_model(ring):
    for options in OPTIONS:
        try:
            expected = train_steps(small_model(**options), 3, dense=True)
            found = train_steps(small_model(ring, **options), 3)
            assert_close(found[0], expected[0], 'losses')
            for what, a, b in (('gradient', found[1], expected[1]), ('movement', found[2], expected[2])):
                for name in b:
                    assert b[name].norm() > 0, f'{what} of {name} is zero'
                    assert_close(a[name], b[name], f'{what} of {name}', 1e-8)
        except AssertionError as e:
            raise AssertionError(f'{options}: {e}') from e


@check
def meter_equals_formula(ring):
    """Bytes and exchanges of a step, counted where tensors are handed over, against the formula, written out."""
    B, T, hops = 2, 32 // ring.world_size, ring.world_size - 1
    d, c = 16, 8 // ring.world_size  # one key head of 16, chunks a rank
    expected = {  # bytes of float64 of a layer and hop, forward and backward
        'full': (2 * d * T * 8, 4 * d * T * 8), 'local': (0, 0), 'topk': (2 * 5 * T * (8 + 2), 2 * 5 * T * 8),
        'int4': (2 * (d // 2 + 2) * T, 2 * (d // 2 + 2) * T + 2 * (d + 2) * T), 'subspace': (7 * T * 8, 7 * T * 8),
        'apart': ((1 + 2 + 3 + 2) * T, 7 * 2 * T),  # 2 + 5 numbers of 4 bits and two scales; 7 of bf16
        'rotated': (2 * 3 * T * 8 + 2 * 2 * c * 8,) * 2}
    for kind, (fwd, bwd) in expected.items():
        options = {'rotated': dict(basis='rotated', joint_kv=False, n_generators=2, rank=6),
                   'int4': dict(send='full', wire_dtype='int4', grad_wire_dtype='int8'),
                   'apart': dict(joint_kv=False, wire_dtype='int4', grad_wire_dtype='bf16')}.get(kind, dict(send=kind))
        model = small_model(ring, topk=0.3, **options)
        idx = ring.shard(torch.zeros(B, 32, dtype=torch.int64), model.config.chunk_size)
        ring.meter.clear()
        model(idx, idx)[1].backward()
        m, codec = ring.meter, model.h[0].attn.codec
        assert (m['sent_fwd'], m['sent_bwd']) == (m['received_fwd'], m['received_bwd']) == (
            2 * B * hops * fwd, 2 * B * hops * bwd), (kind, m)
        if codec:
            kv = torch.empty(B, T, 2, 1, d, dtype=torch.float64, device='meta')
            assert codec.to('meta').wire_bytes(kv) == (B * fwd, B * bwd), kind
        n = 0 if kind == 'local' else 2 * hops  # exchanges: one a layer and hop
        assert (m['exchanges_fwd'], m['exchanges_bwd']) == (n, 2 * n if kind in ('full', 'int4') else n), (kind, m)
    if hops:  # the default rank, at the default width
        sent = {}
        for send in ('full', 'subspace'):
            model = GPT(GPTConfig(block_size=64, n_chunks=8, n_layer=2, send=send), ring)
            idx = ring.shard(torch.zeros(1, 64, dtype=torch.int64), model.config.chunk_size)
            ring.meter.clear()
            model(idx, idx)[1].backward()
            sent[send] = ring.meter['sent_fwd'], ring.meter['sent_bwd']
        assert all(ours < 0.05 * full for ours, full in zip(sent['subspace'], sent['full'])), sent


class FakeLink(Link):
    """A link on a clock of its own, which moves only when somebody waits."""
    time = 0.0

    def clock(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds


@check
def dialled_link_delays_exchanges(ring):
    """1000 float64 over 8 Mbps, a MB a second: 8 ms, and 5 ms of latency. Rank r's clock says r seconds."""
    P = ring.world_size
    if P == 1:
        return
    link = FakeLink(mbps=8, latency_ms=5)
    dialled = Ring(ring.group, link)
    link.time = float(ring.rank)
    x = torch.full((1000,), float(ring.rank), dtype=torch.float64)
    source = (ring.rank - 1) % P
    waits = [dialled.exchange([x], ring.rank + 1, ring.rank - 1, 'fwd') for _ in range(2)]
    assert link.time == ring.rank  # posting waits for nothing
    for n, wait in enumerate(waits, start=1):
        received, = wait()
        assert (received == source).all()
        assert abs(link.time - max(ring.rank, source + n * 0.008 + 0.005)) < 1e-9, link.time
    dialled.meter.clear()
    link.time = 100.0 + ring.rank
    average([x], dialled)  # begins when the last rank does; every rank sends and receives 2 (P - 1) / P of 8000 bytes
    assert abs(x.mean() - (P - 1) / 2) < 1e-12 and (x == x[0]).all()
    assert abs(link.time - (100 + P - 1 + 2 * (P - 1) / P * 0.008 + 2 * (P - 1) * 0.005)) < 1e-9, link.time
    m, n = dialled.meter, 2 * (P - 1) * 8000 // P
    assert (m['sent_sync'], m['received_sync'], m['exchanges_sync']) == (n, n, 1), m
    model, expected = (small_model(r) for r in (dialled, ring))  # and a whole model gives the same numbers over it
    idx = ring.shard(torch.arange(32)[None], model.config.chunk_size)
    assert torch.equal(model(idx)[0], expected(idx)[0])


@check
def quantised_gradients_are_unbiased(ring):
    """One gradient is off, by a little; the mean of many is not. Forward is the same to the last bit."""
    if ring.world_size != 2:
        return
    for dtype, n in (('int8', 40), ('int4', 60)):
        exact, rounded = (small_model(ring, grad_wire_dtype=d) for d in ('same', dtype))
        idx, targets = random_tokens(torch.Generator().manual_seed(5), exact)
        torch.manual_seed(ring.rank)

        def gradients(model):
            loss = model(idx, targets)[1]
            weights = [p for name, p in model.named_parameters() if 'c_kv' in name]
            return loss, torch.cat([t.flatten() for t in torch.autograd.grad(loss, weights)])
        loss, expected = gradients(exact)
        found = [gradients(rounded) for _ in range(n)]
        assert all(l == loss for l, _ in found)
        one = sum(relative_error(f, expected) for _, f in found) / n
        mean = relative_error(sum(f for _, f in found) / n, expected)
        assert 1e-5 < one < 0.5, (dtype, one)
        assert mean < 2.5 * one / n ** 0.5, (dtype, one, mean)


@check
def one_block_is_ahead_without_keep(ring):
    """circulate: every rank's tensors arrive once, and no more than `ahead` + 1 exchanges are open at a time."""
    open_now, most, exchange = [0], [0], ring.exchange

    def counting(*args):
        wait = exchange(*args)
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])

        def counted():
            open_now[0] -= 1
            return wait()
        return counted
    for ahead in (1, ring.world_size):
        ring.exchange, most[0] = counting, 0
        arrivals = ring.circulate([torch.full((3,), float(ring.rank))], 'fwd', ahead)
        assert open_now[0] == min(ahead, ring.world_size - 1)  # posted before anything is asked for
        sources = [source for source, (t,) in arrivals if (t == source).all()]
        del ring.exchange
        assert sources == [(ring.rank - hop) % ring.world_size for hop in range(1, ring.world_size)]
        assert most[0] <= min(ahead + 1, ring.world_size) and not open_now[0]


@check
def bad_lengths_are_refused(ring):
    if ring.world_size == 1:
        return
    model = small_model(ring)
    for call, message in (
            (lambda: ring.shard(torch.zeros(1, 33), 4), 'sequence length (33) must be a multiple of the chunk size (4)'),
            (lambda: ring.shard(torch.zeros(1, 4), 4), 'n_chunks (1) must be a multiple of 2 * cp'),
            (lambda: model(torch.zeros(1, 4).long()), 'shard length (4) must be a multiple of two chunks, 2 * block_size / n_chunks (8)')):
        try:
            call()
        except ValueError as e:
            assert message in str(e), e
        else:
            raise RuntimeError(f'not refused: {message}')


@check
def warm_start_agrees_over_ranks(ring):
    """Moments summed over ranks are those of one process; no logits are computed for them."""
    idx = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
    model, alone = small_model(ring), small_model()
    model.logits = None
    moments, expected = model.basis_moments(ring.shard(idx, model.config.chunk_size)), alone.basis_moments(idx)
    for i, (a, b) in enumerate(zip(moments, expected)):
        assert_close(ring_module.all_reduce(a, 'moments'), b, f'moment {i}')
    assert len(moments) == len(expected) == 2
    for a, b in zip(model.basis_moments(), alone.basis_moments()):
        assert_close(a, b, 'moment of the weights')


@check
def only_a_lost_peer_is_a_peer_error(ring):
    """What is wrong on this rank keeps its own name."""
    for error in (torch.OutOfMemoryError('CUDA out of memory'), RuntimeError('shape mismatch'), ValueError('no')):
        try:
            with ring_module.waiting('rank 1', 'the exchange'):
                raise error
        except PeerError as e:
            raise RuntimeError('renamed') from e
        except Exception as e:
            assert e is error


def run_checks(rank, world_size, folder):
    torch.set_num_threads(1)
    ring = Ring()
    if world_size > 1:
        dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world_size,
                                timeout=timedelta(seconds=60))
        ring = Ring(dist.group.WORLD)
        exchange = dist.batch_isend_irecv

        def like_nccl(ops):
            assert all(op.tensor.dtype == torch.uint8 for op in ops)  # it takes bytes, but not topk's int16
            return exchange(ops)
        dist.batch_isend_irecv = like_nccl
    results = {}
    for name, f in CHECKS.items():
        try:
            f(ring)
            results[name] = 'ok'
        except Exception:
            results[name] = traceback.format_exc()
        Path(folder, f'{rank}.json').write_text(json.dumps(results))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope='session')
def check_results(tmp_path_factory):
    """world_size -> the results of every rank; each world size is spawned once."""
    cache = {}

    def results(world_size):
        if world_size not in cache:
            folder = tmp_path_factory.mktemp(f'world{world_size}')
            mp.start_processes(run_checks, (world_size, str(folder)), nprocs=world_size, start_method='forkserver')
            cache[world_size] = [json.loads((folder / f'{r}.json').read_text()) for r in range(world_size)]
        return cache[world_size]
    return results


@pytest.mark.parametrize('name', CHECKS)
@pytest.mark.parametrize('world_size', (1, 2, 4))
def test_on_every_rank(check_results, world_size, name):
    for rank, results in enumerate(check_results(world_size)):
        assert results.get(name) == 'ok', f'rank {rank}: {results.get(name)}'


# -----------------------------------------------------------------------------
# The layout

@pytest.mark.parametrize('world_size, per_rank', ((1, 3), (2, 2), (2, 4), (3, 2), (4, 4)))
def test_zigzag_shares_chunks_and_causal_work_evenly(world_size, per_rank):
    n = world_size * per_rank
    held = [zigzag(n, world_size, r) for r in range(world_size)]
    assert sorted(sum(held, [])) == list(range(n))
    assert all(chunks == sorted(chunks) for chunks in held)
    assert len({sum(2 * c + 1 for c in chunks) for chunks in held}) == 1  # chunk c: c blocks below the diagonal, half on it


@pytest.mark.parametrize('P, per_rank', ((3, 4), (1, 16), (1, 12), (1, 7), (2, 12)))
@pytest.mark.parametrize('span', (0, 1, 2))
def test_visible_covers_each_pair_of_tokens_once(P, per_rank, span):
    """Here a token is a chunk. What is not seen through the codec are the tokens in the same piece of `span`."""
    if span and per_rank % span or P > 1 and span and (per_rank // 2) % span:
        return
    for r, source in itertools.product(range(P), [None, *range(P)]):
        mine = zigzag(per_rank * P, P, r)
        theirs = mine if source is None else zigzag(per_rank * P, P, source)
        seen = []
        for size, queries, keys, causal in visible(r, source, per_rank, span) if span or source is not None else ():
            for first in range(0, per_rank, size):
                seen += [(a, b) for i, a in enumerate(mine[first:first + size][queries])
                         for j, b in enumerate(theirs[first:first + size][keys]) if not (causal and j > i)]
        near = {(a, b) for a in mine for b in theirs if span and a // span == b // span}
        assert sorted(seen) == [(a, b) for a in mine for b in theirs if b <= a and ((a, b) in near) == (source is None)]
    assert (P, per_rank, span) != (1, 16, 1) or len(visible(0, 0, 16, 1)) == 4  # 8, 4, 2, 1 chunks at a time


# -----------------------------------------------------------------------------
# The arithmetic

@pytest.mark.parametrize('causal', (True, False))
@pytest.mark.parametrize('n_kv_head', (3, 1))
def test_attention_backends_agree(causal, n_kv_head):
    q, dout = torch.randn(2, 2, 10, 3, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 10, n_kv_head, 8, dtype=torch.float64)
    found, expected = [], []
    for backend, results in (('cpu', found), ('math', expected)):
        out, lse = kernels.attention_forward(q, k, v, causal, backend)
        results += [out, lse, *kernels.attention_backward(dout, q, k, v, out, lse, causal, backend)]
    for a, b in zip(found, expected):
        assert_close(a, b, 'backend')


def test_math_attention_in_a_ring_of_one(monkeypatch):
    """Its tensors lie in memory in another order."""
    model = small_model()
    expected = train_steps(model, 1)
    monkeypatch.setattr(kernels, 'attention_backend', lambda *args: 'math')
    found = train_steps(small_model(), 1)
    for name in expected[1]:
        assert_close(found[1][name], expected[1][name], name)


def test_merge_does_not_overflow():
    ones = torch.ones(1, 2, 1, 4)
    out, lse = ones.clone(), torch.tensor([1e4, -1e4]).view(1, 2, 1)
    kernels.merge(out, lse, 3 * ones, torch.full((1, 2, 1), -1e4))
    assert out[0, :, 0, 0].tolist() == pytest.approx([1, 2], rel=1e-3) and lse[0, 0, 0] == 1e4


def test_sums_over_blocks_are_float32(monkeypatch):
    """256 + 1 + 1 is 256 if it is added up in bfloat16."""
    sizes = [1, 1, 256]  # two calls over the own block; before them the diagonal

    def numbers(dout, q, k, *args):
        size = sizes.pop() if sizes else 1
        return tuple(torch.full_like(t, size) for t in (q, k, k))
    monkeypatch.setattr(kernels, 'attention_backward', numbers)
    q, k, v = torch.randn(3, 1, 16, 1, 8).bfloat16()
    latent, per_chunk = torch.randn(1, 16, 5).bfloat16(), torch.ones(1, 4, 1).bfloat16()
    q.requires_grad_()
    table = kernels.rope_table(16, 8, 10.0)[None].bfloat16()
    out = attend(Ring(), q, k, v, (latent, per_chunk), ToyCodec(torch.randn(5, 16), 1, True), table, 4)
    out.backward(torch.ones_like(out))
    assert (q.grad[:, 12:] == 258).all() and (q.grad[:, :4] == 256).all()
    total = kernels.add_parts(None, [torch.full((1, 4, 1, 1), n).bfloat16() for n in (256, 1, 1)], [(4, slice(0, 4))] * 3,
                              torch.Size((1, 4, 1, 1)))
    assert total.dtype == torch.float32 and (total == 258).all()


def test_link_queues():
    """8 Mbps is a byte a microsecond; 100 ms of latency."""
    link = Link(mbps=8, latency_ms=100)
    assert link.send(10**6, now=0.0) == pytest.approx(1) and link.send(10**6, now=0.0) == pytest.approx(2)  # one after the other
    assert link.send(10**6, now=5.0) == pytest.approx(6)  # an idle link sends at once
    assert link.receive(10**6, left=1.0) == pytest.approx(1.1)
    assert link.receive(10**6, left=2.0) == pytest.approx(2.1)  # sent back to back: the latency is not paid again
    assert link.receive(10**6, left=2.0) == pytest.approx(3.1)  # from another sender: our own end is the bottleneck
    fake = FakeLink(mbps=8, latency_ms=100)
    fake.sleep_until(3.0)
    fake.sleep_until(2.0)  # arrived while we computed
    assert fake.time == 3.0
    assert not Link().dialled and Link(latency_ms=1).dialled and Link(latency_ms=1).send(10**9, now=1.0) == 1.0


@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize('bits', (8, 4))
def test_quantize(bits, dtype):
    """Nearest: at most half a step off. Stochastic: at most one, and right on average."""
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[1, 2] = 0, 1e4
    levels = 2 ** (bits - 1) - 1

    def there_and_back(stochastic):
        q = kernels.quantize(x, bits, stochastic)
        assert q.dtype == torch.uint8 and q.shape == (50, -(-7 * bits // 8) + 2)
        return kernels.dequantize(q, bits, 7, torch.float64)
    step = x.double().abs().amax(-1, keepdim=True) / levels * 1.02 + 1e-20
    assert ((there_and_back(False) - x.double()).abs() <= step / 2).all()
    torch.manual_seed(0)
    n = 2000
    found = [there_and_back(True) for _ in range(n)]
    assert all(((f - x.double()).abs() <= step).all() for f in found)
    bias = (sum(found) / n - x.double()) / step  # a step's standard deviation is at most 1/2
    assert bias.abs().max() < 5 * 0.5 / n ** 0.5, bias.abs().max()
    assert not torch.equal(found[0], found[1])


def test_rope():
    """A rotation of the pairs (i, i + hd/2), whose scores depend on distance alone."""
    table = kernels.rope_table(20, 8, base=10.0).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    pairs = torch.complex(q[..., :4], q[..., 4:]) * torch.exp(7j * 10.0 ** (-torch.arange(0, 8, 2).double() / 8))
    assert_close(kernels.rope(q, table[[7]]), torch.cat((pairs.real, pairs.imag), -1), 'rotation', 1e-6)  # a float32 table

    def score(t, s):
        return (kernels.rope(q, table[[t]]) * kernels.rope(k, table[[s]])).sum()
    assert_close(score(7, 3), score(19, 15), 'score', 1e-6)
    assert relative_error(score(7, 3), score(7, 4)) > 1e-3


# -----------------------------------------------------------------------------
# The codecs

@pytest.mark.parametrize('generator', mos_cp.CHOICES['generator'])
@pytest.mark.parametrize('k', (1, 3))
def test_rotation(generator, k):
    """Skew-symmetric generators of norm 1; U(theta) is within |M|^3 / 6 of the exact exponential's, and moves."""
    d, r, B, c = 24, 3, 2, 4
    theta = 0.5 * (2 * torch.rand(B, c, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1)
    config = GPTConfig(basis='rotated', generator=generator, n_generators=k)
    b = mos_cp.Basis(d, r, config, torch.Generator().manual_seed(0)).double()
    b.start(torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0])
    U = b.rotate(theta, b.U0, b.AU0, b.AAU0)  # (B, c, d, r)
    assert relative_error(U, b.U0.expand(B, c, d, r)) > 0.01
    norms = torch.linalg.matrix_norm(b.A, 'fro' if generator == 'frobenius' else 2)
    assert_close(norms, torch.ones(k, dtype=torch.float64), 'norm of A', 1e-6)  # drawn in float32
    assert_close(b.A.mT, -b.A, 'A^T')
    M = torch.einsum('bcl,lde->bcde', theta, b.A)
    error = torch.linalg.matrix_norm(U - torch.linalg.matrix_exp(M) @ b.U0, 2)
    assert (error <= torch.linalg.matrix_norm(M, 2)**3 / 6 + 1e-12).all() and error.max() > 0


def test_theta_is_clipped():
    b = mos_cp.Basis(8, 2, GPTConfig(basis='rotated', theta_clip=0.5), torch.Generator().manual_seed(0))
    b.psi.data.fill_(1.0)
    z = torch.arange(32.0).view(1, 4, 8) - 16
    assert b.theta(z, 2).tolist() == [[[-0.5], [0.5]]]
    b.clip = 0.0
    assert b.theta(z, 2)[0, 0, 0] == z[0, :2].mean(0).sum()


def test_bases_follow_the_seed():
    """And no two layers or seeds share one; the other weights do not depend on what is sent."""
    models = [small_model(seed=seed, basis='rotated') for seed in (0, 0, 1)]
    bases = [[b.U0 for b in m.bases] + [b.A for b in m.bases] for m in models]
    assert all(torch.equal(a, b) for a, b in zip(bases[0], bases[1]))
    drawn = bases[0] + bases[2]
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    plain = small_model(send='full').state_dict()
    assert all(torch.equal(t, plain[name]) for name, t in models[0].state_dict().items() if 'codec' not in name)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_causality(options):
    """
    Changing a token changes no earlier logit, and does change later ones, except for the paper's literal method, where
    a chunk's rotation, and with it the rebuilt keys and values of all its tokens, depends on the chunk's mean.
    """
    model, t = small_model(**options), 18  # in the middle of chunk 4 of 8
    idx = torch.randint(50, (1, 32), generator=torch.Generator().manual_seed(0))
    other = idx.clone()
    other[0, t] = (idx[0, t] + 1) % 50
    changed = (model(idx)[0] - model(other)[0]).abs().amax(dim=-1)[0]  # (T,)
    leaks = not model.config.exact_local and options.get('basis') == 'rotated'
    assert changed[t] > 0
    assert changed[:16].max() < 1e-12  # earlier chunks never see it
    assert (changed[16:t].max() > 1e-9) == leaks
    if options.get('send') == 'local':
        assert changed[20:].max() < 1e-12
    else:
        assert changed[20:].min() > 0


def test_int4_and_topk_keep_what_they_say():
    scale = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    kv = torch.randn(2, 32, 2, 3, 16, dtype=torch.float64) * scale[:, None]  # three heads of different size
    codec = mos_cp.Full('int4')
    rebuilt, = codec.unpack(codec.pack((kv,)), [16], kv.dtype)
    assert ((kv - rebuilt).abs() <= 1.02 * kv.abs().amax(-1, keepdim=True) / 14).all()  # half a step of 1/7
    codec = mos_cp.TopK(GPTConfig(n_head=4, n_kv_head=1, n_embd=64, topk=0.25, send='topk'))
    kv = torch.randn(2, 32, 2, 1, 16, dtype=torch.float64)
    rebuilt = codec.expand(codec.compress(kv), ())
    kept = rebuilt != 0
    assert (kept.sum(-1) == 4).all() and torch.equal(rebuilt[kept], kv[kept])
    assert (kv.abs().masked_fill(~kept, 9).amin(-1) >= kv.abs().masked_fill(kept, 0).amax(-1)).all()


def test_compress_last():
    codecs = [block.attn.active_codec for block in small_model(n_layer=3, compress_last=False, wire_dtype='int4').h]
    assert [type(c) for c in codecs] == [mos_cp.Subspace, mos_cp.Subspace, mos_cp.Full]
    assert [c.wire_dtype for c in codecs] == [c.grad_wire_dtype for c in codecs] == ['int4', 'int4', 'compute']


def test_exact_local_is_exact():
    """In a single chunk nothing is compressed, unless exact_local is off."""
    idx = torch.randint(50, (1, 32))
    plain = small_model(send='full')(idx)[0]
    for options in (dict(), dict(send='full', wire_dtype='int4'), dict(send='topk', wire_dtype='int8')):
        assert_close(small_model(n_chunks=1, **options)(idx)[0], plain, 'logits')
        assert relative_error(small_model(n_chunks=1, exact_local=False, **options)(idx)[0], plain) > 1e-4


def test_own_codec():
    """What a reader would write first: the first r numbers of k and v. Rounded like all others."""
    class First(mos_cp.Full):
        keep = True

        def compress(self, kv):
            return (kv[..., :4],)

        def expand(self, payload, params):
            return torch.nn.functional.pad(payload[0], (0, 12))
    logits = []
    for dtype in ('compute', 'int8'):
        model = small_model()
        for block in model.h:
            block.attn.codec = First(dtype, 'compute')
        idx = torch.randint(50, (1, 32), generator=torch.Generator().manual_seed(0))
        out, loss = model(idx, idx)
        loss.backward()
        assert model.h[0].attn.c_kv.weight.grad.norm() > 0
        logits.append(out.detach())
    assert 1e-6 < relative_error(logits[1], logits[0]) < 0.1


@pytest.mark.parametrize('joint_kv', (True, False))
def test_warm_start_reduces_reconstruction_error(joint_kv):
    """On the keys and values of a briefly trained model, read from real text: random > weights > activations."""
    config = GPTConfig(block_size=128, n_chunks=4, n_layer=1, n_embd=64, n_head=4, rank=12, joint_kv=joint_kv)
    torch.manual_seed(0)
    model = GPT(config)
    model.set_send('full')
    text = train.load_data('stdlib', '', 128)[0]

    def batch(i):
        return train.get_batch(text, 8, 128, 256, np.random.default_rng(i))
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
    for i in range(30):
        model(*batch(i))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    block = model.h[0]
    kv = block.attn.c_kv(block.ln_1(model.wte(batch(99)[0]))).detach().unflatten(-1, (2, 4, 16))

    def error():
        codec = block.attn.codec
        return relative_error(codec.expand(codec.compress(kv), codec.params), kv)
    errors = [error()]
    for idx in (None, batch(0)[0]):
        for basis, moment in zip(model.bases, model.basis_moments(idx)):
            basis.start(mos_cp.principal_directions(moment, basis.U0.shape[1]))
        U0 = model.bases[0].U0
        assert_close(U0.T @ U0, torch.eye(U0.shape[1]), 'U0', 1e-5)
        errors.append(error())
    assert errors[2] < 0.95 * errors[1] < 0.95 * errors[0], errors


def test_unplugged_model_is_a_plain_model():
    idx = torch.randint(50, (1, 32))
    plain, local = small_model(send='full'), small_model(send='local')
    for options in (dict(), dict(basis='rotated', exact_local=False), dict(send='full', wire_dtype='int4'), dict(send='local')):
        model = small_model(**options)
        assert relative_error(model(idx)[0], plain(idx)[0]) > 1e-6
        model.set_send('local')
        assert torch.equal(model(idx)[0], local(idx)[0])
        model.set_send('full')
        assert torch.equal(model(idx)[0], plain(idx)[0])
        missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
        assert not missing and all('codec' in name for name in unexpected)


def test_compiled_equals_eager():
    """Every region: the layers, the loss, and a block's kernels."""
    if why := kernels.cannot_compile():
        pytest.skip(f'--compile does not work here: {why}')
    for options in (dict(), dict(wire_dtype='int4', recompute=True, **EXACT)):
        options = dict(n_chunks=4, n_layer=1, **options)
        expected, found = (train_steps(small_model(compile=compile, **options), 2) for compile in (False, True))
        assert_close(found[0], expected[0], 'losses')
        for name, g in expected[1].items():
            assert_close(found[1][name], g, name)


# -----------------------------------------------------------------------------
# The model's interface

def test_recompute_keeps_less_for_backward():
    kept = []
    for recompute in (False, True):
        model, seen = GPT(GPTConfig(block_size=256, vocab_size=2000, recompute=recompute)), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            model(*torch.zeros(2, 1, 256, dtype=torch.int64))
        kept.append(sum(t.nbytes for t in seen.values()))
    assert kept[1] < 0.6 * kept[0], kept


def test_any_length_and_generate():
    model = small_model()
    idx = torch.randint(50, (2, 32))
    logits, loss = model(idx)
    assert logits.shape == (2, 32, 50) and loss is None
    short, loss = model(idx[:, :5], idx[:, 1:6])  # not a multiple of the chunk: padded at the end, unseen
    assert_close(short, logits[:, :5], 'logits')
    assert torch.isfinite(loss)
    out = model.generate(idx[:, :30], 6, top_k=1)  # runs past block_size
    assert out.shape == (2, 36) and torch.equal(out[:, :30], idx[:, :30])
    assert torch.equal(out[:, 30], model(idx[:, :30])[0][:, -1].argmax(-1))
    with pytest.raises(ValueError, match=r'sequence length \(33\) is above block_size \(32\)'):
        model(torch.zeros(1, 33, dtype=torch.int64))
    assert model.flops_per_token() == 6 * model.get_num_params() + 6 * 2 * 48 * 32
    model.set_send('local')
    assert model.flops_per_token() == 6 * model.get_num_params() + 6 * 2 * 48 * model.config.chunk_size
    assert model.estimate_mfu(2, 0.5, 1e12) == pytest.approx(model.flops_per_token() * 32 * 2 / 0.5 / 1e12)


def test_only_matrices_decay():
    for options in (dict(), dict(basis='rotated')):
        model = small_model(**options)
        groups = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu').param_groups
        decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
        for name, p in model.named_parameters():
            expected = 0.1 if p.dim() == 2 and 'codec' not in name else 0.0
            assert decay.get(id(p)) == (expected if p.requires_grad else None), name


@pytest.mark.parametrize('options, message', (
    (dict(block_size=1000), r'block_size \(1000\) must be a multiple of n_chunks \(16\): change --block_size or --n_chunks'),
    (dict(n_embd=100, n_head=3), r'n_embd \(100\) must be a multiple of 2 \* n_head \(6\)'),
    (dict(n_head=4, n_kv_head=3), r'n_head \(4\) must be a multiple of n_kv_head \(3\)'),
    (dict(rank=0), r'rank \(0\) must be at least 1'), (dict(n_layer=0), r'n_layer \(0\)'),
    (dict(rank=257), r'rank \(257\) must leave each subspace between 1 and 256 numbers, and one has 257'),
    (dict(joint_kv=False, rank_k=36), r'rank \(36\) must leave each subspace between 1 and 128 numbers, and one has 0'),
    (dict(send='nothing'), r"send \('nothing'\) must be one of full, local"),
    (dict(n_layer=1, compress_last=False), r'leaves nothing to compress when n_layer is 1'),
))
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


# -----------------------------------------------------------------------------
# train.py

SMALL = ['--block_size=128', '--n_chunks=8', '--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=1', '--warm_start=3',
         '--max_iters=12', '--lr_decay_iters=12', '--eval_interval=6', '--eval_iters=2', '--log_interval=1', '--sample_tokens=0',
         '--gradient_accumulation_steps=4', '--dtype=float64', '--warmup_iters=2', '--rank=6', '--wire_dtype=compute']


def small_run(out_dir, *argv):
    return train.main([*SMALL, f'--out_dir={out_dir}', *argv])


def torchrun(n, out_dir, *argv, script=None):
    """torchrun train.py, or a function of this file -> the log's records."""
    script = [__file__, script] if script else ['train.py']
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}',
                           '--max-restarts=1' if script[1:] else '--max-restarts=0', *script, *SMALL,
                           f'--out_dir={out_dir}', *argv], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def reference_run(tmp_path_factory):
    """(folder, result) of one uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp('reference')
    return folder, small_run(folder)


def assert_same_log(found, expected):
    assert [r['iter'] for r in found] == [r['iter'] for r in expected]
    for a, b in zip(found, expected):
        for key in ('loss', 'val_loss', 'grad_norm'):
            assert (key in a) == (key in b) and a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-9), (key, a, b)
        assert a.get('val_loss_by_chunk', []) == pytest.approx(b.get('val_loss_by_chunk', []), rel=1e-9)


def test_log_and_falling_loss(reference_run):
    records = [json.loads(line) for line in (reference_run[0] / 'log.jsonl').read_text().splitlines()]
    assert records == reference_run[1]['records']
    assert [r['iter'] for r in records] == list(range(13)) and [r['iter'] for r in records if 'val_loss' in r] == [0, 6, 12]
    assert set(records[1]) == {'iter', 'loss', 'lr', 'grad_norm', 'tokens', 'seconds', 'sent_fwd', 'sent_bwd', 'received_fwd',
                               'received_bwd', 'sent_sync', 'received_sync', 'compression', 'skipped'}
    assert records[11]['loss'] < records[0]['loss'] - 0.2 and records[11]['tokens'] == 12 * 4 * 128
    by_chunk = records[-1]['val_loss_by_chunk']
    assert len(by_chunk) == 8 and np.mean(by_chunk) == pytest.approx(records[-1]['val_loss'])


def test_needle_batch():
    """Every key is stated once and asked for once, with the value it was stated with, on another rank."""
    n = 8  # chunks of 6 tokens
    x, y = train.needle_batch(3, 48, n, np.random.default_rng(0))
    stated, asked, answers = x[:, :24], x[:, 24:] - 24 * train.N_VALUES, y[:, 24:]
    assert (y[:, :24] == -1).all() and 0 <= answers.min() and answers.max() < train.N_VALUES
    for s, a, v in zip(stated, asked, answers):
        assert sorted(a.tolist()) == list(range(24))
        facts = {int(f) // train.N_VALUES: (int(f) % train.N_VALUES, i // 6) for i, f in enumerate(s)}
        for i, (key, value) in enumerate(zip(a, v)):
            told, chunk = facts[int(key)]
            assert told == value
            assert all({chunk, n // 2 + i // 6} - set(zigzag(n, P, r)) for P in (2, 4) for r in range(P))


def test_needle_is_found_through_the_compressor_alone(tmp_path):
    argv = ['--data=needle', '--n_layer=2', '--n_embd=64', '--n_head=4', '--block_size=16', '--n_chunks=4', '--batch_size=64',
            '--learning_rate=5e-3', '--max_iters=300', '--warm_start=50', '--eval_interval=300', '--sample_tokens=0',
            f'--out_dir={tmp_path}']
    assert abs(train.main([*argv, '--send=local', '--max_iters=100'])['val_loss'] - np.log(train.N_VALUES)) < 0.05
    ours = train.main(argv)['records'][-1]['val_loss_by_chunk']
    assert ours[:2] == [None] * 2 and max(ours[2:]) < 0.3


def test_learning_rate():
    c, _ = train.parse_config(['--learning_rate=1', '--min_lr=0.1', '--warmup_iters=10', '--max_iters=110'])
    rates = [train.learning_rate(it, c) for it in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1])


def test_validation_reads_val_data_and_may_keep_only_the_best(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in 'ab':
        (tmp_path / name).write_text(1000 * name)
    argv = '--data=~/a', f'--val_data={tmp_path}/[b]', '--learning_rate=0.02'
    records = small_run(tmp_path, *argv, '--always_save_checkpoint=False')['records']
    assert records[-1]['val_loss'] > records[0]['val_loss'] > records[11]['loss'] + 1
    assert not (tmp_path / 'ckpt.pt').exists()  # it got worse and worse
    small_run(tmp_path, *argv)
    assert (tmp_path / 'ckpt.pt').exists()


def test_life_of_the_codec(tmp_path, monkeypatch):
    """Nothing is sent, the bases are set once, subspaces, everything is sent. And the same for what has no bases."""
    life, forward, start = [], GPT.forward, mos_cp.Basis.start

    def noting(self, *args, **kwargs):
        sends = self.h[0].attn.active_codec
        life.append(type(sends).__name__)
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(GPT, 'forward', noting)
    monkeypatch.setattr(mos_cp.Basis, 'start', lambda self, U0: (life.append('start'), start(self, U0)))
    argv = '--gradient_accumulation_steps=1', '--unplug_at=7', '--warm_basis=weights'
    small_run(tmp_path, *argv)
    assert life == ['NoneType'] * 3 + ['start'] * 2 + ['Subspace'] * 4 + ['Full'] * 5
    life.clear()
    small_run(tmp_path, *argv, '--send=topk', '--warm_send=full')
    assert life == ['Full'] * 3 + ['TopK'] * 4 + ['Full'] * 5


def test_warm_start_is_the_same_whatever_is_sent_later(tmp_path):
    def run(*argv):
        argv = '--block_size=64', '--n_chunks=4', '--n_layer=1', '--n_embd=32', '--max_iters=5', '--log_interval=1', *argv
        argv = *argv, '--eval_iters=1', '--sample_tokens=0', '--dtype=float64', f'--out_dir={tmp_path}'
        return [r['loss'] for r in train.main([*argv])['records'][:-1]]
    local, full = run('--send=local', '--warm_start=0'), run('--send=full', '--warm_start=0')
    assert local[0] != full[0]
    for argv in (['--send=full'], ['--send=topk'], [], ['--exact_local=False']):
        warm = run('--warm_start=3', *argv)
        assert warm[:3] == pytest.approx(local[:3], rel=1e-12) and warm[3:] != pytest.approx(local[3:], rel=1e-6), argv
    for argv in (['--send=topk'], []):
        warm = run('--warm_start=3', '--warm_send=full', *argv)
        assert warm[:3] == pytest.approx(full[:3], rel=1e-12) and warm[3:] != pytest.approx(full[3:], rel=1e-6), argv


def test_optimizer_options(tmp_path):
    """Gradients clipped far below AdamW's epsilon move nothing; bases learn at their own rate, AdamW's first step."""
    records = small_run(tmp_path, '--grad_clip=1e-12')['records']
    assert records[11]['loss'] > records[0]['loss'] - 0.1
    moved = []
    for basis_lr in (0.0, 0.5):
        argv = ['--warm_start=0', f'--basis_lr={basis_lr}', '--max_iters=1', '--weight_decay=0']
        result = small_run(tmp_path, *argv)
        torch.manual_seed(1337)
        start = GPT(result['model'].config).double()
        moved.append((result['model'].bases[0].U0 - start.bases[0].U0).abs().max().item())
    assert moved[0] == 0 and abs(moved[1] / result['records'][0]['lr'] - 0.5) < 1e-3, moved


def test_bf16_trains(tmp_path, reference_run):
    records = small_run(tmp_path, '--dtype=bfloat16')['records']
    assert records[-1]['val_loss'] == pytest.approx(reference_run[1]['val_loss'], rel=0.02)
    assert max(abs(a['loss'] / b['loss'] - 1) for a, b in zip(records[:-1], reference_run[1]['records'])) > 1e-6  # and it is bf16


def test_resume_is_bit_equal(reference_run, tmp_path):
    small_run(tmp_path, '--max_iters=6')
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('[1]\n{"epoch": 3}\nnot JSON\n{"iter": 7, "lo')  # a foreign hand; and as a killed run leaves it
    resumed = small_run(tmp_path, '--init_from=resume', '--n_ff=0', '--vocab_size=0', '--n_kv_head=0')  # the defaults, spelt out
    assert_same_log([json.loads(line) for line in open(tmp_path / 'log.jsonl')], reference_run[1]['records'])
    assert resumed['records'][-1]['val_loss'] == reference_run[1]['val_loss']
    for (name, a), b in zip(resumed['model'].state_dict().items(), reference_run[1]['model'].state_dict().values()):
        assert torch.equal(a, b), name
    for flag, message in (('--n_embd=64', '--n_embd=64 differs from the checkpoint, which has 32'),
                          ('--preset=124m', '--preset=124m differs from the checkpoint, which has tiny')):
        with pytest.raises(SystemExit, match=message):
            small_run(tmp_path, '--init_from=resume', flag)
    assert not list(tmp_path.glob('*.tmp'))


def test_resume_with_other_options(reference_run, tmp_path):
    """The optimizer's options are those of the command line, not of the checkpoint; --recompute changes no number."""
    expected = reference_run[1]['records'][-1]['val_loss']
    for flag, changes in (('--weight_decay=3', True), ('--beta1=0.1', True), ('--sync_every=3', False), ('--recompute', False)):
        small_run(tmp_path, '--max_iters=6')
        found = small_run(tmp_path, '--init_from=resume', '--max_iters=12', flag)['val_loss']
        assert (found != pytest.approx(expected, rel=1e-6)) == changes, (flag, found, expected)
    argv = '--init_from=resume', '--warm_start=12', '--max_iters=14'  # as if interrupted just when the warm start was over
    evaluated = small_run(tmp_path, *argv, '--eval_only')['val_loss']
    assert evaluated == small_run(tmp_path, *argv)['records'][0]['val_loss'] != found
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    checkpoint['config']['warm_start'] = 20
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    with pytest.raises(SystemExit, match=r"warm_start \(3\) must be at least the checkpoint's iteration \(14\)"):
        small_run(tmp_path, '--init_from=resume', '--max_iters=30')
    del checkpoint['config']['cp']
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    with pytest.raises(SystemExit, match='is of another version of this code, which differs in --cp'):
        small_run(tmp_path, '--init_from=resume')


def test_optimizer_moves_to_a_gpu():
    """Where AdamW is fused, and counts its steps where the weights are. (Meta stands for cuda.)"""
    here, there = (torch.optim.AdamW([torch.ones(2, device=device, requires_grad=True)], fused=fused)
                   for device, fused in (('cpu', False), ('meta', True)))
    weight = here.param_groups[0]['params'][0]
    weight.sum().backward()
    here.step()
    train.load_optimizer(there, here.state_dict())
    assert there.param_groups[0]['fused'] and {t.device.type for t in there.state_dict()['state'][0].values()} == {'meta'}


def test_four_processes_dp_and_cp_equal_one(reference_run, tmp_path):
    """2 x 2 processes give the numbers of one, bytes included, and go on from its checkpoint."""
    small_run(tmp_path, '--max_iters=4', '--eval_interval=4')
    records = torchrun(4, tmp_path, '--cp=2', '--init_from=resume')
    assert_same_log(records, reference_run[1]['records'])
    full = 3 * 2 * 32 * 8 * 64 * 2 * 2  # if K, V, K, V again and their gradients travelled; d, float64, tokens, layers, sequences
    assert [r['received_fwd'] + r['received_bwd'] for r in records[4:12]] == 8 * [full * 2 * 6 // (3 * 2 * 32)]
    assert records[5]['compression'] == pytest.approx(1 - 2 * 6 / (3 * 2 * 32))


@pytest.mark.parametrize('argv, message', (
    (['--blok_size=8'], 'unknown argument --blok_size; the nearest flag is --block_size'),
    (['--block_size=1000'], r'block_size \(1000\) must be a multiple of n_chunks \(16\)'),
    (['--block_size=eight'], "--block_size: invalid int value: 'eight'"), (['--send=some'], "--send: invalid choice: 'some'"),
    (['--compile=maybe'], "'maybe' is neither True nor False"), (['--cp=2'], r'world size \(1\) must be a multiple of cp \(2\)'),
    (['--unplug_at=50'], r'unplug_at \(50\) must be between warm_start \(50\) and max_iters \(250\)'),
    (['--seed=-1'], r'seed \(-1\) must be at least 0'), (['--learning_rate=nan'], r'learning_rate \(nan\) must be at least 0'),
    (['--beta2=1'], r'beta2 \(1.0\)'), (['--compress_last=False', '--n_layer=1'], 'nothing to compress'),
    (['--block_size=1600000'], r'block_size \(1600000\) must be below the length of the validation data'),
    (['--warm_start=500'], r'warm_start \(500\) must be below max_iters \(250\)'), (['--batch_size=0'], r'batch_size \(0\)'),
    (['--data=no/such/file'], "no file matches 'no/such/file'"), (['--init_from=resume'], 'there is no .*ckpt.pt'),
    (['--link_mbps=-1'], r'link_mbps \(-1.0\)'), (['--plan', '--tflops=0'], r'tflops \(0\) above 0'),
    (['--vocab_size=100'], r'outside vocab_size \(100\)'), (['--rank=300'], r'rank \(300\) must leave each subspace'),
    ([f'--out_dir={__file__}/x'], r'x cannot be read or made \(Not a directory\)'), (['--data=/'], r'/ cannot be read or made \(Is a directory\)'),
    (['--device=cuda'], r'needs a GPU per process \(1 processes on this machine, 0 GPUs\)'),
    (['--plan', '--cp=3'], r'n_chunks \(16\) must be a multiple of 2 \* cp \(6\): change --n_chunks or --cp'),
))
def test_bad_flags_are_refused(argv, message, tmp_path):
    if '--device=cuda' in argv and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(SystemExit, match=message):
        train.main([f'--out_dir={tmp_path}', *argv])
    assert not (tmp_path / 'ckpt.pt').exists()


def test_no_compiler_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, 'cannot_compile', lambda: 'none found')
    with pytest.raises(SystemExit, match=r'--compile needs a C\+\+ compiler .* \(none found\): install one, or leave out --compile'):
        small_run(tmp_path, '--compile', '--device=cpu')


def test_a_read_only_out_dir_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'access', lambda *args: False)  # root may write everywhere
    with pytest.raises(SystemExit, match='out_dir .* cannot be written: change --out_dir'):
        small_run(tmp_path, '--data=needle')


def test_flags():
    c, checkpoint = train.parse_config(['--preset=800m', '--method', 'paper', '--block_size', '4096', '--compile'])
    assert (c.n_layer, c.n_embd, c.n_head, c.block_size, c.compile) == (8, 2048, 8, 4096, True) and checkpoint is None
    assert (c.basis, c.exact_local, c.joint_kv, c.generator, c.compress_last, c.sync_every) == (
        'rotated', False, False, 'frobenius', False, 200)
    assert (c.theta_clip, c.n_generators, c.warm_basis, c.warm_send) == (0.5, 1, 'weights', 'full')
    config = GPTConfig(**{name: getattr(c, name) for name in train.MODEL_FLAGS})
    assert config.subspaces == [(2048, 41), (2048, 102)]  # 2 % and 5 %
    assert [train.parse_config(argv)[0].rank for argv in ([], ['--preset=124m'], ['--method=paper'], ['--method=paper', '--rank=5'])] == [
        36, 128, 9, 5]
    for send in mos_cp.CHOICES['send']:  # one command line can be swept over what is sent
        train.parse_config([f'--send={send}', '--rank=5', '--topk=0.2', '--exact_local=False', '--theta_clip=1', '--wire_dtype=int8'])


def test_plan(capsys):
    """--plan against the numbers written out: 4 ranks, 2 layers of d = 32, 128 tokens, bf16."""
    argv = ['--plan', '--cp=4', '--block_size=128', '--n_chunks=8', '--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=1000',
            '--rank=6', '--wire_dtype=int4', '--grad_wire_dtype=compute', '--sync_every=10', '--tflops=1e-3']
    assert train.main(argv) is None
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]
    mb = 3 * 32 * 1000 / 1e6  # tokens received, in millions
    full = 2 * 32 * 2 * 2 * mb  # K and V, 2 layers
    model = GPT(GPTConfig(block_size=128, n_chunks=8, n_layer=2, n_head=2, n_embd=32, rank=6))
    for row, fwd, bwd, bases in ((rows[2], full, 2 * full, 0), (rows[6], 2 * (3 + 2) * mb, 2 * 6 * 2 * mb, 2 * 64 * 6)):
        n_params = model.get_num_params() - 2 * 64 * 6 + bases
        sync, compute = (n_params + 256 * 32) * 4 / 1e6 * 2 * 0.75 / 10, (6 * n_params + 6 * 2 * 32 * 128) * 128_000 / 4 / 1e9
        ring_s, sync_s = (fwd + bwd) * 8 / 300, sync * 8 / 300
        assert row[1:5] == [f'{fwd:,.1f} + {bwd:,.1f}', f'{1 - (fwd + bwd) / (3 * full):.2%}', f'{sync:,.1f}',
                            f'{ring_s:,.2f} + {sync_s:,.2f}: {128_000 / (max(compute, ring_s) + sync_s):,.0f}']


def test_readme_names_only_flags_that_exist():
    text = Path(__file__).with_name('README.md').read_text()
    known = {*train.parse_flags([])[1], 'standalone', 'nproc_per_node', 'nnodes', 'node_rank', 'master_addr', 'master_port',
             'max_restarts', 'help'}
    assert set(re.findall(r'--([a-z_0-9]+)', text)) <= known


def test_readers(tmp_path):
    """Text, nanoGPT's .bin, the headered .bin and a glob of shards; and what is refused."""
    tokens = np.arange(1000, dtype=np.uint16)
    (tmp_path / 'text.txt').write_bytes(bytes(range(256)) * 4)
    tokens.tofile(tmp_path / 'plain.bin')
    header = np.zeros(256, dtype=np.int32)
    for i, part in enumerate((tokens[:400], tokens[400:])):
        header[:3] = 20240520, 1, len(part)
        (tmp_path / f'shard_{i}.bin').write_bytes(header.tobytes() + part.tobytes())
    assert np.array_equal(train.read_tokens(tmp_path / 'text.txt'), np.tile(np.arange(256), 4))
    assert np.array_equal(train.read_tokens(tmp_path / 'plain.bin'), tokens)
    shards, val = train.load_data(str(tmp_path / 'shard_*.bin'), str(tmp_path / 'plain.bin'), 50)
    assert np.array_equal(np.concatenate(shards), tokens) and len(val) == 1
    x, y = train.get_batch(shards, 64, 50, 1000, np.random.default_rng(0))
    assert x.shape == (64, 50) and torch.equal(x + 1, y)  # no window crosses from one shard into the next
    assert x[:, 0].min() < 300 and x[:, 0].max() > 600
    train_part, val_part = train.load_data(str(tmp_path / 'plain.bin'), '', 50)
    assert np.array_equal(np.concatenate(train_part + val_part), tokens) and len(val_part[0]) == 100
    for content, message in ((b'', 'is empty'), (b'abc', r'odd number of bytes \(3\)'),
                             (header.tobytes() + b'ab', 'has header version 1 and 600 tokens'),
                             (header[:100].tobytes(), 'by its size, 0 tokens')):
        (tmp_path / 'bad.bin').write_bytes(content)
        with pytest.raises(ValueError, match=message):
            train.read_tokens(tmp_path / 'bad.bin')
    with pytest.raises(ValueError, match=r'block_size \(600\) must be below the length of the training data \(600 tokens'):
        train.load_data(str(tmp_path / 'shard_*.bin'), str(tmp_path / 'plain.bin'), 600)
    with pytest.raises(ValueError, match=r'the data has token \d+, outside vocab_size \(500\)'):
        train.get_batch(shards, 64, 50, 500, np.random.default_rng(0))
    train_set, val_set = (sum(map(len, part)) for part in train.load_data('stdlib', '', 50))
    assert train_set > 5 * val_set > 1e6
    flipped = [np.flip(s) for s in shards]
    assert train.fingerprint(shards) == train.fingerprint(list(shards)) != train.fingerprint(flipped)


# -----------------------------------------------------------------------------
# Nothing is lost

def run_rank(rank, world_size, port, folder, argv, sabotage):
    """train.py as one rank, without torchrun. What it says goes to folder/RANK.txt."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    output = os.open(folder / f'{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(output, fd)
    torch.set_num_threads(1)
    if sabotage:
        sabotage[0](rank, *sabotage[1:])
    train.main([f'--out_dir={folder}', *argv])


def start_ranks(world_size, folder, *argv, sabotage=None):
    """Processes of `run_rank`, with sabotage = (function, *arguments) called first, as function(rank, *arguments)."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ranks = [FORKS.Process(target=run_rank, args=(r, world_size, port, folder, argv, sabotage)) for r in range(world_size)]
    for process in ranks:
        process.start()
    return ranks


def end_ranks(ranks, folder):
    """-> [(exit code, what it said) of each rank]; one that still runs after a minute is killed: None."""
    until = time.monotonic() + 60
    for process in ranks:
        process.join(max(0, until - time.monotonic()))
        if process.exitcode is None:
            process.kill()
    return [(process.exitcode, (folder / f'{rank}.txt').read_text()) for rank, process in enumerate(ranks)]


def losses(folder):
    return {r['iter']: r['loss'] for r in map(json.loads, (folder / 'log.jsonl').read_text().splitlines()) if 'loss' in r}


def test_weights_averaged_every_few_steps(reference_run, tmp_path):
    """
    sync_every > 1: not the same numbers, nearly the same loss. Validation and checkpoints wait for the next sync, so how often
    one validates changes no weight; a checkpoint is the average, moments included.
    """
    runs = {}
    for interval in (1, 3, 12):  # at 4, 8 and 12; the same; at 12
        folder = tmp_path / str(interval)
        argv = *SMALL, '--sync_every=4', f'--eval_interval={interval}'
        assert [code for code, _ in end_ranks(start_ranks(2, folder, *argv, sabotage=(keep_no_checkpoint,)), folder)] == [0, 0]
        runs[interval] = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert losses(tmp_path / '1') == losses(tmp_path / '3') == losses(tmp_path / '12')
    assert [[r['iter'] for r in records if 'val_loss' in r] for records in runs.values()] == [[0, 4, 8, 12], [0, 4, 8, 12], [0, 12]]
    weights = 8 * sum(p.numel() for p in reference_run[1]['model'].parameters())
    moments = 2 * 64 * 64 * 8 + 2 * 64 * 6 * 8  # of keys and values, two layers; the bases they give, from rank 0
    assert [r['received_sync'] for r in runs[12][:-1]] == [0, 0, 0, moments, weights, 0, 0, 0, weights, 0, 0, 0]
    folder = tmp_path / 'saved'
    argv = *SMALL, '--sync_every=4', '--wire_dtype=int8'
    end_ranks(start_ranks(2, folder, *argv), folder)
    records, expected = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()], reference_run[1]['records']
    assert records[0]['loss'] == pytest.approx(expected[0]['loss'], rel=1e-9) != pytest.approx(records[2]['loss'], rel=1e-9)
    assert records[2]['loss'] != pytest.approx(expected[2]['loss'], rel=1e-9)
    assert records[-1]['val_loss'] == pytest.approx(expected[-1]['val_loss'], rel=0.05)
    evaluated = small_run(folder, '--wire_dtype=int8', '--init_from=resume', '--eval_only')  # all ranks had the same model
    assert evaluated['val_loss'] == pytest.approx(records[-1]['val_loss'], rel=1e-9)


def keep_no_checkpoint(rank):
    train.save = lambda *args: None


def end_at(rank, victim, function, call, how):
    """Makes `victim` end in the n-th call of a function (owner, name) whose arguments contain `mark`, by signal or exit code `how`."""
    if rank != victim:
        return
    owner, name, mark = function
    owner, n_calls = {'Ring': Ring, 'train': train}[owner], itertools.count(1)
    original = getattr(owner, name)

    def ending(*args, **kwargs):
        if (mark is None or mark in args) and next(n_calls) == call:
            print('ends', flush=True)  # the last it says: when, its file tells
            if how == 'exit':
                os._exit(7)
            os.kill(os.getpid(), how)
        return original(*args, **kwargs)
    setattr(owner, name, ending)


def test_a_dead_peer_ends_all(tmp_path):
    """Exit, SIGKILL and SIGSTOP, in forward, backward and the sync of weights: the others say whom they waited for, in what."""
    cases = {'forward exchange': (2, ('Ring', 'exchange', 'fwd'), 40, 'exit'),
             'backward exchange': (1, ('Ring', 'exchange', 'bwd'), 40, signal.SIGKILL),
             'average of gradients or weights': (0, ('train', 'average', None), 3, signal.SIGSTOP)}
    running, until = {}, time.monotonic() + 60
    for i, (where, (victim, *rest)) in enumerate(cases.items()):
        argv = [*SMALL, '--timeout_s=5', '--block_size=96', '--n_chunks=6', '--eval_interval=3', *(['--sync_every=2'] if i == 2 else [])]
        folder = tmp_path / str(i)
        running[where] = victim, folder, start_ranks(3, folder, *argv, sabotage=(end_at, victim, *rest))
    for victim, _, ranks in running.values():
        others = [p for r, p in enumerate(ranks) if r != victim]
        for process in others:
            process.join(max(0, until - time.monotonic()))
        for process in (*others, ranks[victim]):  # who hangs must not be freed by the end of who is frozen
            process.kill()
    for where, (victim, folder, ranks) in running.items():
        spoke = [(folder / f'{rank}.txt').stat().st_mtime for rank in range(3)]
        for rank, (code, said) in enumerate(end_ranks(ranks, folder)):
            if rank == victim:
                assert code == (7 if cases[where][-1] == 'exit' else -signal.SIGKILL), said
                continue
            assert code == 1 and re.search(f'rank {rank} waited for .* in .*{where} and gave up: .*$', said), (rank, code, said)
            assert spoke[rank] - spoke[victim] < 5 + 15, (rank, said)
        assert not list(folder.glob('*.tmp'))
        if (folder / 'ckpt.pt').exists():
            train.load_checkpoint(folder / 'ckpt.pt')


@pytest.mark.parametrize('argv', (['--eval_interval=3'], ['--eval_interval=4', '--sync_every=4']), ids=' '.join)
def test_resume_after_a_kill_is_bit_equal(tmp_path, argv):
    """
    kill -9 of a rank, then --init_from=auto: the losses that follow are those of a run that nobody killed, syncs, moments and
    rounding at random included. On the way the disk is slow once: slower than a silent peer is waited for.
    """
    argv = [*SMALL, '--wire_dtype=int8', '--init_from=auto', *argv]
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    end_ranks(start_ranks(2, whole, *argv, '--timeout_s=5', sabotage=(slow_disk,)), whole)
    codes = [code for code, _ in end_ranks(start_ranks(
        2, killed, '--timeout_s=5', *argv, sabotage=(end_at, 1, ('Ring', 'exchange', 'bwd'), 44, signal.SIGKILL)), killed)]
    assert codes == [1, -signal.SIGKILL] and max(losses(killed)) < 11 and (killed / 'ckpt.pt').exists()
    assert train.load_checkpoint(killed / 'ckpt.pt')['iter_num'] in (6, 8)
    assert [code for code, _ in end_ranks(start_ranks(2, killed, *argv), killed)] == [0, 0]
    assert losses(killed) == losses(whole) and len(losses(whole)) == 12


def slow_disk(rank):
    save = train.save_checkpoint
    train.save_checkpoint = lambda path, checkpoint: (time.sleep(7 * (checkpoint['iter_num'] < 5)), save(path, checkpoint))


def test_torchrun_restarts_from_the_last_checkpoint(tmp_path):
    """The script of this file, as torchrun runs it, is killed once at iteration 8."""
    records = torchrun(2, tmp_path, '--init_from=auto', script='die_once')
    assert (tmp_path / 'died').exists() and [r['iter'] for r in records] == list(range(13))


def die_once(argv):
    """Run train.py; rank 1 kills itself at iteration 8, the first time."""
    died, learning_rate = Path(next(a for a in argv if a.startswith('--out_dir=')).split('=')[1]) / 'died', train.learning_rate

    def dying(it, c):
        if it == 8 and os.environ['RANK'] == '1' and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(it, c)
    train.learning_rate = dying
    train.main(argv)


def lose_steps(rank, iterations):
    """Rank 1's gradient is not finite in some iterations."""
    learning_rate, average, norm, now = train.learning_rate, train.average, torch.nn.utils.get_total_norm, []

    def spoil(tensors):
        if now and now[-1] in iterations and rank == 1:
            tensors[0].fill_(float('inf'))
    train.learning_rate = lambda it, c: (now.append(it), learning_rate(it, c))[1]
    train.average = lambda tensors, ring: (spoil(tensors) if len(tensors) > 10 else None, average(tensors, ring))[1]
    torch.nn.utils.get_total_norm = lambda grads: (spoil(grads), norm(grads))[1]


def test_steps_that_are_not_finite_are_skipped(tmp_path, monkeypatch):
    """Rank 1 alone has an infinite gradient in iterations 4 and 5; ten in a row are too many."""
    folder = tmp_path / 'two'
    for code, said in end_ranks(start_ranks(2, folder, *SMALL, '--eval_interval=12', sabotage=(lose_steps, (4, 5))), folder):
        assert code == 0 and said.count('the gradient is not finite, step skipped') == 2, said
    records = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert [r['skipped'] for r in records[:12]] == [0] * 4 + [1] + [2] * 7 and np.isfinite(records[-1]['val_loss'])
    monkeypatch.setattr(torch.nn.utils, 'get_total_norm', lambda grads: torch.tensor(float('nan')))
    with pytest.raises(SystemExit, match='no finite gradient in 10 steps'):
        small_run(tmp_path)


def differ(rank, what):
    if rank == 1 and what == 'torch':
        torch.__version__ = '0.0'
    if rank == 1 and what == 'flag':
        parse = train.parse_config
        train.parse_config = lambda argv: parse([*argv, '--seed=2'])
    if rank == 1 and what == 'data':
        load_data = train.load_data
        train.load_data = lambda *args: [[np.flip(s) for s in part] for part in load_data(*args)]


@pytest.mark.parametrize('what, message', (
    ('torch', r'rank 1 has torch 0\.0, and rank 0 has'), ('data', 'rank 1 has training data with checksum'),
    ('flag', 'rank 1 has --seed 2, and rank 0 has 1337: they must be the same')))
def test_ranks_that_disagree_are_named(tmp_path, what, message):
    for rank, (code, said) in enumerate(end_ranks(start_ranks(2, tmp_path, *SMALL, sabotage=(differ, what)), tmp_path)):
        assert code == 1 and (rank or re.search(message, said)), said
    assert not (tmp_path / 'log.jsonl').exists()


def save_for_ever(path):
    for i in itertools.count():
        train.save_checkpoint(path, {**dict.fromkeys(('optimizer', 'config', *train.STATE)), 'iter_num': i,
                                     'model': torch.full((200_000,), i)})


def test_killed_while_saving(tmp_path):
    """20 times, at random moments: there is always one whole checkpoint, and never an older one than before."""
    path, rng = tmp_path / 'ckpt.pt', np.random.default_rng(0)
    for _ in range(20):
        process = FORKS.Process(target=save_for_ever, args=(path,))
        process.start()
        while not path.exists():
            assert process.is_alive() and not time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        seen = train.load_checkpoint(path)['iter_num']
        process.kill()
        process.join()
        checkpoint = train.load_checkpoint(path)
        assert (checkpoint['model'] == checkpoint['iter_num']).all() and checkpoint['iter_num'] >= seen
        path.unlink()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, capfd):
    small_run(tmp_path, '--max_iters=6')
    before, (soft, hard) = (tmp_path / 'ckpt.pt').read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # Python ignores the signal: writing more fails
    try:
        result = small_run(tmp_path, '--init_from=resume', '--max_iters=12')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result['iter_num'] == 12 and (tmp_path / 'ckpt.pt').read_bytes() == before and not list(tmp_path.glob('*.tmp'))
    assert re.search('could not write .*ckpt.pt .*; the checkpoint before it is untouched', capfd.readouterr().err)


def test_bad_checkpoints_are_refused(reference_run, tmp_path):
    whole, path = (reference_run[0] / 'ckpt.pt').read_bytes(), tmp_path / 'ckpt.pt'
    checkpoint = torch.load(reference_run[0] / 'ckpt.pt', weights_only=True)

    def refused(message):
        with pytest.raises(SystemExit, match=message):
            small_run(tmp_path, '--init_from=auto')
    for content in (whole[:len(whole) // 2], b'', b'something else'):
        path.write_bytes(content)
        refused('ckpt.pt is damaged or not a checkpoint')
    torch.save(Path('code that must not run'), path)
    refused('ckpt.pt is damaged or not a checkpoint')
    for other in (torch.ones(3), {'model': {}}):
        torch.save(other, path)
        refused('ckpt.pt is damaged or not a checkpoint')
    wrong = dict(checkpoint['model'], **{'wte.weight': torch.ones(256, 16)})
    for change in ({'model': wrong}, {'model': {}}, {'optimizer': {}}, {'optimizer': {'state': {}, 'param_groups': []}}):
        torch.save({**checkpoint, **change}, path)
        refused('ckpt.pt does not fit the model')


# -- fuzz: any configuration trains as on one process, or is refused before anything is sent

def random_configuration(rng):
    """-> (world size, flags): small, mostly possible."""
    def one(*choices):
        return choices[rng.integers(len(choices))]
    world_size = int(one(1, 2, 2, 3, 4, 4))
    cp = one(0, 0, 0, 1, 2)
    dp = max(1, world_size // (cp or world_size))
    flags = dict(n_layer=one(1, 2, 3), n_head=one(1, 2, 4), n_embd=one(16, 32), n_chunks=one(
        one(2, 4, 6, 8), *3 * [2 * world_size // dp * one(1, 2, 3)]), send=one(
        'full', 'local', 'topk', 'subspace', 'subspace', 'subspace', 'subspace'), cp=cp, warm_start=one(0, 0, 1),
        batch_size=one(1, 2), gradient_accumulation_steps=one(1, dp, 2 * dp), sync_every=one(1, 1, 1, 2), recompute=one(True, False),
        data=one('stdlib', 'needle'), grad_clip=one(0.0, 1.0), link_mbps=one(0.0, 0.0, 1000.0), latency_ms=one(0.0, 0.0, 1.0),
        rank=one(3, 8, 16, 40))
    flags['block_size'] = flags['n_chunks'] * one(1, 2, 3, 5)
    for name, choices in {
            'n_kv_head': (1, 2), 'wire_dtype': ('compute', 'bf16', 'int8', 'int4'), 'grad_wire_dtype': ('compute', 'compute', 'int8', 'int4'),
            'exact_local': (True, False), 'joint_kv': (True, False), 'basis': ('fixed', 'rotated', 'learned'), 'rank_k': (1, 2, 30),
            'generator': ('frobenius', 'spectral'), 'n_generators': (1, 2), 'theta_clip': (0.0, 0.5), 'topk': (0.05, 0.5, 1.0),
            'compress_last': (True, False), 'warm_basis': ('activations', 'weights'), 'unplug_at': (0, 1), 'basis_lr': (0.1, 1.0),
            'warm_send': ('local', 'full')}.items():
        if rng.random() < 0.3:
            flags[name] = one(*choices)
    return world_size, [f'--{name}={value}' for name, value in flags.items()]


def fuzz(seed, folder):
    """One random configuration, on its number of ranks and on one -> 'trained' or 'refused'. Raises AssertionError if it did neither."""
    world_size, flags = random_configuration(np.random.default_rng(seed))
    argv = ['--dtype=float64', '--max_iters=2', '--eval_iters=2', '--log_interval=1', '--sample_tokens=0', '--timeout_s=30', *flags]
    ranks = start_ranks(world_size, folder / 'many', *argv)
    try:
        train.main([*(a for a in argv if not a.startswith('--cp')), f'--out_dir={folder / "one"}'])
        alone = losses(folder / 'one')
    except SystemExit as e:
        alone = str(e)
    ended, what = end_ranks(ranks, folder / 'many'), f'seed {seed}: {world_size} ranks, {" ".join(flags)}'
    if any(code for code, _ in ended):
        for rank, (code, said) in enumerate(ended):
            assert code == 1 and 'Traceback' not in said and (rank or 'train.py: ' in said), (what, said)
        assert not (folder / 'many' / 'log.jsonl').exists(), what  # before anything was sent
        return 'refused'
    assert isinstance(alone, dict), (what, alone)
    found = losses(folder / 'many')
    given = dict(flag.strip('-').split('=') for flag in flags)
    gradient = given.get('grad_wire_dtype') or given.get('wire_dtype') or ('int8' if given['send'] == 'subspace' else 'compute')
    exact = given['sync_every'] == '1' and gradient == 'compute'  # after the first step as well as before it
    assert found[0] == pytest.approx(alone[0], rel=1e-9) and found[1] == pytest.approx(alone[1], rel=1e-9 if exact else 0.05), what
    return 'trained'


@pytest.mark.parametrize('seed', range(20))
def test_fuzz(seed, tmp_path):
    fuzz(seed, tmp_path)


if __name__ == '__main__':  # one rank of a test that needs torchrun
    {'die_once': die_once}[sys.argv[1]](sys.argv[2:])
