"""
Tests. The oracle is one process with one dense softmax in float64, differentiated by autograd; every
parallel path must equal it on every rank. Checks that need several processes run in one spawn per world
size (gloo, CPU); `pytest -k "every_rank and 2-"` selects those of two.
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
from concurrent.futures import ThreadPoolExecutor
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
from ring import Link, Ring, attend, average, depart, same, visible, zigzag


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

def ring_attention(q, payload, *args, ring, keep, **options):
    """`depart` and `attend` in one call."""
    return attend(q, [depart(payload, ring=ring, keep=keep)], *args, ring=ring, **options)


def dense_attention(q, payload, expand, params=(), local=None, expand_local=None, *, ring, chunk_size, causal=True,
                    keep=True, pack=same, unpack=same):
    """The same on one process: all scores at once, one mask, one softmax, gradients by autograd."""
    t = torch.arange(q.shape[2])
    past = t[:, None] >= t if causal else torch.ones(len(t), len(t), dtype=torch.bool)
    own = t[:, None] // chunk_size == t // chunk_size
    blocks = []
    if local:
        blocks.append((*expand_local(local, t), past & own))
    if payload:
        travelled = unpack(pack(payload), payload[0].dtype)  # straight-through: the value of what travelled, the gradient of what was sent
        payload = [p + (w - p).detach() if p.is_floating_point() else p for p, w in zip(payload, travelled)]
        blocks.append((*expand(payload, params, t), past & ~own if local else past))
    groups = q.shape[1] // blocks[0][0].shape[1]
    scores = torch.cat([(q @ k.repeat_interleave(groups, 1).transpose(2, 3)).masked_fill(~mask, float('-inf'))
                        for k, _, mask in blocks], dim=-1) / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ torch.cat([v.repeat_interleave(groups, 1) for _, v, _ in blocks], dim=2)


def dense_depart(payload, **options):
    return {k: o for k, o in options.items() if k in ('pack', 'unpack')}, payload


def dense_attend(q, sent, *args, n_parts, **options):
    (pack_and_unpack, payload), = sent
    return dense_attention(q, payload, *args, **options, **pack_and_unpack)


# -----------------------------------------------------------------------------
# Checks that run on every rank of a ring. Each takes the ring and raises if something is off.

CHECKS = {}


def check(f):
    CHECKS[f.__name__] = f
    return f


def in_two_parts(q, payload, expand, params, local, expand_local, *, ring, keep, **options):
    """`ring_attention` with the front and the back half of the tokens attended to in turn."""
    halves = [tuple(t.chunk(2, dim)[part] for t in ts) if ts else None
              for part in (0, 1) for ts, dim in (((q,), 2), (payload, 1), (local, 1))]
    (q0,), payload0, local0, (q1,), payload1, local1 = halves
    sent = [depart(payload0, ring=ring, n_uses=2), depart(payload1, ring=ring, n_uses=1)]
    return torch.cat((attend(q0, sent[:1], expand, params, local0, expand_local, ring=ring, n_parts=2, **options),
                      attend(q1, sent, expand, params, local1, expand_local, ring=ring, n_parts=2, **options)), dim=2)


def attention_case(ring, n_chunks, n_head, n_kv_head, causal, exact_local, keep, dtype=torch.float64,
                   ring_attention=ring_attention):
    """One random ring attention with positions, a shared weight and a second, coarser payload tensor, against the oracle."""
    g = torch.Generator().manual_seed(0)
    B, hd, L = 2, 8, 4
    T = n_chunks * L

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    whole = dict(q=random(B, n_head, T, hd), k=random(B, T, n_kv_head * hd), v=random(B, T, n_kv_head * hd),
                 latent=random(B, T, 5), per_chunk=random(B, n_chunks, 1), weight=random(5, 2 * n_kv_head * hd))
    dout = random(B, n_head, T, hd)
    angle = torch.outer(torch.arange(T).double(), 0.7 ** torch.arange(hd // 2))
    my_tokens = ring.positions(T // ring.world_size, L, 'cpu')
    my_chunks = torch.tensor(zigzag(n_chunks, ring.world_size, ring.rank))

    def part(name, x):
        """What this rank holds of a tensor."""
        if name == 'weight':
            return x
        return x[:, my_chunks] if name == 'per_chunk' else x[:, :, my_tokens] if x.dim() == 4 else x[:, my_tokens]

    def to_heads(kv, positions):
        return kernels.to_heads(*kv, angle[positions].cos(), angle[positions].sin())

    def expand(payload, params, positions):
        z, s = payload
        kv = z.unflatten(1, (s.shape[1], -1)) * s[:, :, None] @ params[0].to(z.dtype)  # (B, c, L, 2 * Hkv * hd)
        return to_heads(kv.flatten(1, 2).chunk(2, -1), positions)

    def run(attention, ring, tensors, dout):
        t = {name: x.clone().requires_grad_() for name, x in tensors.items() if exact_local or name not in 'kv'}
        out = attention(t['q'], (t['latent'], t['per_chunk']), expand, (t['weight'],),
                        (t['k'], t['v']) if exact_local else None, to_heads, ring=ring, chunk_size=L, causal=causal, keep=keep)
        return out, dict(zip(t, torch.autograd.grad(out, list(t.values()), dout)))

    expected_out, expected = run(dense_attention, Ring(), whole, dout)
    mine = {name: part(name, x).to(torch.float64 if name == 'weight' else dtype) for name, x in whole.items()}
    out, found = run(ring_attention, ring, mine, part('dout', dout).to(dtype))
    if ring.world_size > 1:  # every rank has the share of its own queries
        dist.all_reduce(found['weight'], group=ring.group)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert out.dtype == dtype
    assert_close(out.double(), part('out', expected_out), 'out', tolerance)
    for name in found:
        assert_close(found[name].double(), part(name, expected[name]), 'd' + name, tolerance)


@check
def ring_equals_dense(ring):
    for chunks_per_rank, heads in itertools.product((2, 4), ((3, 3), (3, 1), (4, 2))):
        for causal, exact_local, keep in itertools.product((True, False), repeat=3):
            attention_case(ring, chunks_per_rank * ring.world_size, *heads, causal, exact_local, keep)
        for exact_local in (True, False):
            attention_case(ring, chunks_per_rank * ring.world_size, *heads, True, exact_local, True, ring_attention=in_two_parts)
    for causal, keep in itertools.product((True, False), repeat=2):  # halves that are odd
        attention_case(ring, 6 * ring.world_size, 3, 3, causal, True, keep)


@check
def ring_equals_dense_in_low_precision(ring):
    merge, summed_in = kernels.merge, set()

    def noting(out, *rest):
        summed_in.add(out.dtype)
        return merge(out, *rest)
    kernels.merge = noting
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for exact_local in (True, False):
                attention_case(ring, 2 * ring.world_size, 3, 3, True, exact_local, True, dtype)
    finally:
        kernels.merge = merge
    assert summed_in <= {torch.float32}, summed_in


@check
def broken_code_fails_the_oracle(ring):
    """The oracle can fail: break the backward, the ring or the positions, and see it."""
    if ring.world_size != 2:
        return
    backward, exchange, positions, see = kernels.attention_backward, Ring.exchange, Ring.positions, ring_module.visible

    def swapped(*args):
        dq, dk, dv = backward(*args)
        return dq, dv, dk

    def lost_gradient(self, tensors, to, source, phase):
        wait = exchange(self, tensors, to, source, phase)
        return (lambda: [torch.zeros_like(t) for t in wait()]) if phase == 'bwd' else wait

    def shifted(self, n_local, chunk_size, device, rank=None):
        return positions(self, n_local, chunk_size, device, rank) + (rank not in (None, self.rank))

    def dropped(mine, theirs, exact_local, causal):
        return see(mine, theirs, exact_local, causal) if mine == theirs else []

    for owner, name, broken in ((kernels, 'attention_backward', swapped), (Ring, 'exchange', lost_gradient),
                                (Ring, 'positions', shifted), (ring_module, 'visible', dropped)):
        intact = getattr(owner, name)
        setattr(owner, name, broken)
        try:
            attention_case(ring, 4, 3, 3, True, True, True)
        except AssertionError as e:
            assert 'relative error' in str(e)
        else:
            raise RuntimeError(f'nobody noticed the broken {name} ({broken.__name__})')
        finally:
            setattr(owner, name, intact)


OPTIONS = [  # what a model can send
    dict(send='full'), dict(send='local'), dict(send='topk', topk=0.3),
    dict(send='topk', exact_local=False), dict(send='full', wire_dtype='int4', grad_wire_dtype='compute'),
    dict(send='full', wire_dtype='int8', exact_local=False, grad_wire_dtype='compute'),
    dict(send='topk', exact_local=False, wire_dtype='int8', grad_wire_dtype='compute'),
    dict(), dict(compress_last=False), dict(interleave=True), dict(interleave=True, recompute=True), dict(wire_dtype='int4', grad_wire_dtype='compute'),
    dict(wire_dtype='bf16', joint_kv=False, grad_wire_dtype='compute'),
    dict(interleave=True, exact_local=False, wire_dtype='int8', grad_wire_dtype='compute', joint_kv=False, basis='rotated'), dict(joint_kv=False), dict(exact_local=False), dict(basis='fixed'),
    dict(basis='fixed', joint_kv=False, exact_local=False),
    dict(basis='rotated'), dict(basis='rotated', joint_kv=False, exact_local=False, compress_last=False),
    dict(basis='rotated', generator='spectral', n_generators=3),
    dict(basis='rotated', theta_clip=0.0),
]


def small_model(ring=None, **options):
    """A float64 GPT with odd head counts, grouped keys and a rotation that does something."""
    config = GPTConfig(**{**dict(block_size=32, n_chunks=8, n_layer=2, n_head=3, n_kv_head=1, n_embd=48, vocab_size=50,
                                 rank_k=0.2, rank_v=0.2, wire_dtype='compute'), **options})
    torch.manual_seed(0)
    model = GPT(config, ring).double()
    model.loss_tokens = 5
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(100 if 'psi' in name else 3 if p.dim() == 2 and 'compressor' not in name else 1)
    return model


def train_steps(model, n_steps, dense=False):
    """-> the losses, the first gradients, and how far the parameters moved: each averaged over the ring."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    before = [p.detach().clone() for p in model.parameters()]
    g, losses, gradients = torch.Generator().manual_seed(1), [], None
    for _ in range(n_steps):
        idx, targets = torch.randint(50, (2, 2, 32), generator=g)
        idx, targets = (model.ring.shard(t, model.config.chunk_size) for t in (idx, targets))
        mos_cp.depart, mos_cp.attend = (dense_depart, dense_attend) if dense else (depart, attend)
        try:
            loss = model(idx, targets)[1]
            loss.backward()
        finally:
            mos_cp.depart, mos_cp.attend = depart, attend
        mean_loss = loss.detach().clone()
        if model.ring.world_size > 1:
            average([mean_loss[None], *(p.grad for p in model.parameters())], model.ring)
        losses.append(mean_loss)
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: p.detach() - b for (name, p), b in zip(model.named_parameters(), before)}
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
    """Bytes and hops per step, counted where tensors are handed over, against the formula, written out."""
    B, T, hops = 2, 32 // ring.world_size, ring.world_size - 1
    d, c = 16, 8 // ring.world_size  # one key head of 16, chunks a rank
    expected = {  # bytes of float64 per layer and hop, forward and backward
        'full': (2 * d * T * 8, 4 * d * T * 8), 'local': (0, 0), 'topk': (2 * 5 * T * (8 + 2), 2 * 5 * T * 8),
        'int4': (2 * (d // 2 + 2) * T, 2 * (d // 2 + 2) * T + 2 * (d + 2) * T), 'subspace': (6 * T * 8, 6 * T * 8),
        'small': (2 * (2 + 2) * T, 2 * 3 * 2 * T),  # 3 numbers of 4 bits and a scale; 3 of bf16
        'rotated': (2 * (3 * T + 2 * c) * 8, 2 * (3 * T + 2 * c) * 8)}
    for kind, (fwd, bwd) in expected.items():
        options = {'rotated': dict(basis='rotated', joint_kv=False, n_generators=2),
                   'int4': dict(send='full', wire_dtype='int4', grad_wire_dtype='int8'),
                   'small': dict(joint_kv=False, wire_dtype='int4', grad_wire_dtype='bf16')}.get(kind, dict(send=kind))
        model = small_model(ring, topk=0.3, **options)
        idx = ring.shard(torch.zeros(B, 32, dtype=torch.int64), model.config.chunk_size)
        ring.meter.reset()
        model(idx, idx)[1].backward()
        m = ring.meter
        assert (m.sent_fwd, m.sent_bwd) == (m.received_fwd, m.received_bwd) == (2 * B * hops * fwd, 2 * B * hops * bwd), (kind, m)
        assert tuple(B * x for x in model.compressors[0].wire_bytes(T, 8)) == (B * fwd, B * bwd), kind
        n = 0 if kind == 'local' else 2 * hops  # exchanges: one a layer and hop
        assert (m.hops_fwd, m.hops_bwd) == (n, 2 * n if kind in ('full', 'int4') else n), (kind, m)
    if hops:  # the default ranks, at the default width
        sent = {}
        for send in ('full', 'subspace'):
            model = GPT(GPTConfig(block_size=64, n_chunks=8, n_layer=2, send=send), ring)
            idx = ring.shard(torch.zeros(1, 64, dtype=torch.int64), model.config.chunk_size)
            ring.meter.reset()
            model(idx, idx)[1].backward()
            sent[send] = ring.meter.sent_fwd, ring.meter.sent_bwd
        assert all(ours < 0.05 * full for ours, full in zip(sent['subspace'], sent['full'])), sent


class FakeLink(Link):
    """A link on a clock of its own, which moves only when somebody waits."""
    now = 0.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@check
def dialled_link_delays_exchanges(ring):
    """1000 float64 over 8 Mbps, a MB a second: 8 ms, and 5 ms of latency. Rank r's clock says r seconds."""
    P = ring.world_size
    if P == 1:
        return
    link = FakeLink(mbps=8, latency_ms=5)
    dialled = Ring(ring.group, link)
    link.now = float(ring.rank)
    x = torch.full((1000,), float(ring.rank), dtype=torch.float64)
    source = (ring.rank - 1) % P
    waits = [dialled.exchange([x], ring.rank + 1, ring.rank - 1, 'fwd') for _ in range(2)]
    assert link.now == ring.rank  # posting waits for nothing
    for n, wait in enumerate(waits, start=1):
        received, = wait()
        assert (received == source).all()
        assert abs(link.now - max(ring.rank, source + n * 0.008 + 0.005)) < 1e-9, link.now
    dialled.meter.reset()
    link.now = 100.0 + ring.rank
    average([x], dialled)  # begins when the last rank does; every rank sends and receives 2 (P - 1) / P of 8000 bytes
    assert abs(x.mean() - (P - 1) / 2) < 1e-12 and (x == x[0]).all()
    assert abs(link.now - (100 + P - 1 + 2 * (P - 1) / P * 0.008 + 2 * (P - 1) * 0.005)) < 1e-9, link.now
    m = dialled.meter
    assert (m.sent_sync, m.received_sync, m.hops_sync) == (2 * (P - 1) * 8000 // P,) * 2 + (1,), m
    for interleave in (False, True):  # and a whole model gives the same numbers over it
        model, expected = (small_model(r, interleave=interleave) for r in (dialled, ring))
        idx = ring.shard(torch.arange(32)[None], model.config.chunk_size)
        assert torch.equal(model(idx)[0], expected(idx)[0])


@check
def quantised_gradients_are_unbiased(ring):
    """One gradient is off, by a little; the mean of many is not. Forward is the same to the last bit."""
    if ring.world_size == 1:
        return
    for dtype, n, interleave in (('int8', 40, False), ('int4', 60, True)):
        exact, rounded = (small_model(ring, grad_wire_dtype=d, interleave=interleave) for d in ('same', dtype))
        g = torch.Generator().manual_seed(5)
        idx, targets = (ring.shard(torch.randint(50, (2, 32), generator=g), exact.config.chunk_size) for _ in range(2))
        torch.manual_seed(ring.rank)

        def gradients(model):
            loss = model(idx, targets)[1]
            found = torch.autograd.grad(loss, [p for name, p in model.named_parameters() if 'c_k' in name or 'c_v' in name])
            return loss, torch.cat([t.flatten() for t in found])
        loss, expected = gradients(exact)
        found = [gradients(rounded) for _ in range(n)]
        assert all(l == loss for l, _ in found)
        one = sum(relative_error(f, expected) for _, f in found) / n
        mean = relative_error(sum(f for _, f in found) / n, expected)
        assert 1e-5 < one < 0.5, (dtype, one)
        assert mean < 2.5 * one / n ** 0.5, (dtype, one, mean)


@check
def uncompressed_blocks_are_not_held(ring):
    """Without `keep` at most one block is ahead of the one in use, and at most one gradient is on its way home."""
    transit = depart((torch.full((1, 4, 2), float(ring.rank)),), ring=ring, keep=False)[0]
    for hop in range(ring.world_size):
        assert transit.block(hop)[0][0, 0, 0] == (ring.rank - hop) % ring.world_size
        assert list(transit.blocks) == [0] and sum(a is not None for a in transit.arrivals) <= 1
    for hop in range(1, ring.world_size):
        transit.send_home(hop, [torch.full((1, 4, 2), 10.0 ** hop)])
        assert len(transit.returns) == 1
    total, = transit.end([torch.ones(1, 4, 2)])
    assert (total == sum(10 ** hop for hop in range(ring.world_size))).all() and transit.own is None


@check
def bad_lengths_are_refused(ring):
    if ring.world_size == 1:
        return
    model = small_model(ring)
    for call, message in (
            (lambda: ring.shard(torch.zeros(1, 33), 4), 'sequence length (33) must be a multiple of the chunk size (4)'),
            (lambda: ring.shard(torch.zeros(1, 4), 4), 'n_chunks (1) must be a multiple of 2 * cp'),
            (lambda: model(torch.zeros(1, 3).long()), 'shard length (3) must be a multiple of block_size / n_chunks (4)')):
        try:
            call()
        except ValueError as e:
            assert message in str(e), e
        else:
            raise RuntimeError(f'not refused: {message}')


@check
def warm_start_agrees_over_ranks(ring):
    """Moments summed over ranks are those of one process; the bases they give are the same subspaces."""
    idx = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
    model, alone = small_model(ring), small_model()
    moments = model.basis_moments(ring.shard(idx, model.config.chunk_size))
    if ring.world_size > 1:
        for m in moments:
            dist.all_reduce(m)
    expected = alone.basis_moments(idx)
    for i, (a, b) in enumerate(zip(moments, expected)):
        assert_close(a, b, f'moment {i}')
    turns = small_model(ring, interleave=True).basis_moments(ring.shard(idx, model.config.chunk_size))
    assert len(turns) == len(expected) == 2
    for a, b in zip(model.basis_moments(), alone.basis_moments()):
        assert_close(a, b, 'moment of the weights')


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


@pytest.mark.parametrize('causal', (True, False))
@pytest.mark.parametrize('exact_local', (True, False))
@pytest.mark.parametrize('P, n', ((3, 12), (1, 16), (1, 12), (1, 7), (2, 24)))
def test_visible_covers_each_pair_of_chunks_once(causal, exact_local, P, n):
    for r, source in itertools.product(range(P), repeat=2):
        mine, theirs = zigzag(n, P, r), zigzag(n, P, source)
        calls = visible(mine, theirs, exact_local, causal)
        seen = []
        for n_pieces, queries, keys, masked in calls:
            size = len(mine) // n_pieces
            for first in range(0, len(mine), size):
                seen += [(a, b) for i, a in enumerate(mine[first:first + size][queries])
                         for j, b in enumerate(theirs[first:first + size][keys]) if not (masked and j > i)]
        assert sorted(seen) == [(a, b) for a in sorted(mine) for b in sorted(theirs)
                                if (b <= a or not causal) and not (exact_local and a == b)]
    assert not (causal and exact_local and n == 16) or len(calls) == 4  # 8, 4, 2, 1 chunks at a time


# -----------------------------------------------------------------------------
# The arithmetic

@pytest.mark.parametrize('causal', (True, False))
def test_attention_backends_agree(causal):
    q, k, v, dout = (torch.randn(2, 3, 10, 8, dtype=torch.float64) for _ in range(4))
    out, lse = kernels._math_forward(q, k, v, causal)
    for a, b in zip(kernels.attention_forward(q, k, v, causal), (out, lse)):
        assert_close(a, b, 'forward')
    args = dout, q, k, v, out, lse, causal
    for a, b in zip(kernels.attention_backward(*args), kernels._math_backward(*args)):
        assert_close(a, b, 'backward')


def test_merge_does_not_overflow():
    ones = torch.ones(1, 1, 2, 4)
    out, lse = ones.clone(), torch.tensor([[[1e4, -1e4]]])
    kernels.merge(out, lse, 3 * ones, torch.tensor([[[-1e4, -1e4]]]))
    assert out[0, 0, :, 0].tolist() == pytest.approx([1, 2], rel=1e-3) and lse[0, 0, 0] == 1e4


def test_sums_over_blocks_are_float32(monkeypatch):
    """256 + 1 + 1 is 256 if it is added up in bfloat16."""
    T, hd, sizes = 16, 8, [256, 256]  # 4 chunks; the first two calls are the diagonal, and another chunk over the first

    def numbers(dout, q, k, v, out, lse, causal):
        size = sizes.pop() if sizes else 1
        return tuple(torch.full_like(t, size) for t in (q, k, v))
    monkeypatch.setattr(kernels, 'attention_backward', numbers)
    q = torch.randn(1, 1, T, hd).bfloat16().requires_grad_()
    payload = tuple(torch.randn(1, T, hd).bfloat16().requires_grad_() for _ in 'kv')
    local = tuple(torch.randn(1, T, hd).bfloat16() for _ in 'kv')

    def to_heads(kv, at):
        return kernels.to_heads(*kv, torch.ones(len(at), hd // 2), torch.zeros(len(at), hd // 2))
    out = ring_attention(q, payload, lambda payload, params, at: to_heads(payload, at), (), local, to_heads,
                         ring=Ring(), chunk_size=4, causal=False, keep=True)
    out.backward(torch.ones_like(out))
    assert (q.grad[:, :, 4:8] == 258).all() and all((p.grad[:, 4:] == 258).all() for p in payload)
    assert kernels.add_up([torch.tensor(n).bfloat16() for n in (256, 1, 1)], torch.float32) == 258


def test_grouped_heads_without_the_cpu_operator(monkeypatch):
    q, dout = torch.randn(2, 2, 6, 10, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 10, 8, dtype=torch.float64)
    out, lse = kernels.attention_forward(q, k, v, True)
    expected = out, lse, *kernels.attention_backward(dout, q, k, v, out, lse, True)
    monkeypatch.setattr(kernels, 'attention_backend', lambda *args: 'math')
    found = *kernels.attention_forward(q, k, v, True), *kernels.attention_backward(dout, q, k, v, out, lse, True)
    for a, b in zip(found, expected):
        assert_close(a, b, 'grouped heads')


def test_link_queues():
    """8 Mbps is a byte a microsecond; 100 ms of latency."""
    link = Link(mbps=8, latency_ms=100)
    assert link.send(10**6, now=0.0) == pytest.approx(1) and link.send(10**6, now=0.0) == pytest.approx(2)  # one after the other
    assert link.send(10**6, now=5.0) == pytest.approx(6)  # an idle link sends at once
    assert link.receive(10**6, left=1.0) == pytest.approx(1.1)
    assert link.receive(10**6, left=2.0) == pytest.approx(2.1)  # sent back to back: the latency is not paid again
    assert link.receive(10**6, left=2.0) == pytest.approx(3.1)  # from another sender: our own end is the bottleneck
    assert link.receive(10**6, left=2.0) == pytest.approx(4.1)
    fake = FakeLink(mbps=8, latency_ms=100)
    fake.sleep_until(3.0)
    fake.sleep_until(2.0)  # arrived while we computed
    assert fake.now == 3.0
    gloo = Link(mbps=8, latency_ms=100, handshake=True)
    sent = [gloo.send(10**6, now) for now in (0.0, 0.0, 0.5, 5.0)]
    assert sent == pytest.approx([1.1, 2.1, 3.2, 6.1])  # asked together; while data leave: behind them; on an idle link
    assert gloo.receive(10**6, left=1.0) == pytest.approx(1.1)
    assert not Link().dialled and Link(latency_ms=1).dialled and Link(latency_ms=1).send(10**9, now=1.0) == 1.0


@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize('bits', (8, 4))
def test_quantize(bits, dtype):
    """Nearest: at most half a step off. Stochastic: at most one, and right on average."""
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[1, 2] = 0, 1e4
    levels = 2 ** (bits - 1) - 1

    def there_and_back(stochastic):
        q, scale = kernels.quantize(x, bits, stochastic)
        assert q.dtype == torch.uint8 and q.shape == (50, -(-7 * bits // 8)) and scale.shape == (50, 1)
        return kernels.dequantize(q, scale, bits, 7, torch.float64)
    step = x.double().abs().amax(-1, keepdim=True) / levels * 1.02 + 1e-20
    assert ((there_and_back(False) - x.double()).abs() <= step / 2).all()
    torch.manual_seed(0)
    n = 2000
    found = [there_and_back(True) for _ in range(n)]
    assert all(((f - x.double()).abs() <= step).all() for f in found)
    bias = (sum(found) / n - x.double()) / step  # a step's standard deviation is at most 1/2
    assert bias.abs().max() < 5 * 0.5 / n ** 0.5, bias.abs().max()
    assert not torch.equal(found[0], found[1])


def test_rope_depends_on_distance_alone():
    angle = torch.outer(torch.arange(20).double(), torch.tensor([1.0, 0.1], dtype=torch.float64))
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64)

    def score(t, s):
        q_t, k_s = (kernels.rope(x, angle[[i]].cos(), angle[[i]].sin()) for x, i in ((q, t), (k, s)))
        return (q_t * k_s).sum()
    assert_close(score(7, 3), score(19, 15), 'score')
    assert relative_error(score(7, 3), score(7, 4)) > 1e-3


# -----------------------------------------------------------------------------
# The compressor

@pytest.mark.parametrize('generator', mos_cp.CHOICES['generator'])
@pytest.mark.parametrize('k', (1, 3))
def test_rotation(generator, k):
    """Skew-symmetric generators of norm 1; U(theta) is within |M|^3 / 6 of the exact exponential's, and moves."""
    d, r, B, c = 24, 3, 2, 4
    theta = 0.5 * (2 * torch.rand(B, c, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1)
    config = GPTConfig(basis='rotated', generator=generator, n_generators=k, rank_k=0.01, rank_v=0.02)
    s = mos_cp.Subspace(d, r, config, torch.Generator().manual_seed(0)).double()
    s.set_basis(torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0])
    U = s.basis(theta)  # (B, c, d, r)
    assert relative_error(U, s.U0.expand(B, c, d, r)) > 0.01
    norms = torch.linalg.matrix_norm(s.A, 'fro' if generator == 'frobenius' else 2)
    assert_close(norms, torch.ones(k, dtype=torch.float64), 'norm of A', 1e-6)  # drawn in float32
    assert_close(s.A.mT, -s.A, 'A^T')
    M = torch.einsum('bcl,lde->bcde', theta, s.A)
    error = torch.linalg.matrix_norm(U - torch.linalg.matrix_exp(M) @ s.U0, 2)
    assert (error <= torch.linalg.matrix_norm(M, 2)**3 / 6 + 1e-12).all() and error.max() > 0


def test_theta_is_clipped():
    config = GPTConfig(basis='rotated', theta_clip=0.5)
    s = mos_cp.Subspace(8, 2, config, torch.Generator().manual_seed(0))
    s.psi.weight.data.fill_(1.0)
    z = torch.arange(32.0).view(1, 4, 8) - 16
    assert s.theta((z,), 2).tolist() == [[[-0.5], [0.5]]]
    config.theta_clip = 0.0
    assert s.theta((z[..., :5], z[..., 5:]), 2)[0, 0, 0] == z[0, :2].mean(0).sum()


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
    k, v = torch.randn(2, 2, 32, 48, dtype=torch.float64) * scale.repeat_interleave(16)  # three heads of different size
    comp = small_model(send='full', wire_dtype='int4', n_kv_head=3).compressors[0]
    for pair in zip((k, v), comp.unpack(comp.pack((k, v)), k.dtype)):
        sent, rebuilt = (t.unflatten(-1, (3, 16)) for t in pair)
        assert ((sent - rebuilt).abs() <= 1.02 * sent.abs().amax(-1, keepdim=True) / 14).all()  # half a step of 1/7
    k, v = torch.randn(2, 2, 32, 16, dtype=torch.float64)
    comp = small_model(send='topk', topk=0.25).compressors[0]
    cos, sin = torch.ones(32, 8).double(), torch.zeros(32, 8).double()  # no rotation
    rebuilt = comp.expand(comp.compress(k, v), (), cos, sin)[0].squeeze(1)  # (B, T, d)
    kept = rebuilt != 0
    assert (kept.sum(-1) == 4).all() and torch.equal(rebuilt[kept], k[kept])
    assert (k.abs().masked_fill(~kept, 9).amin(-1) >= k.abs().masked_fill(kept, 0).amax(-1)).all()


def test_compress_last():
    compressors = small_model(n_layer=3, compress_last=False, wire_dtype='int4').compressors
    assert [c.send for c in compressors] == ['subspace', 'subspace', 'full']
    assert [c.wire_dtype() for c in compressors] == [c.wire_dtype(gradient=True) for c in compressors] == ['int4', 'int4', 'compute']


def test_exact_local_is_exact():
    """In a single chunk nothing is compressed, unless exact_local is off."""
    idx = torch.randint(50, (1, 32))
    plain = small_model(send='full')(idx)[0]
    for options in (dict(), dict(send='full', wire_dtype='int4'), dict(send='topk', wire_dtype='int8')):
        assert_close(small_model(n_chunks=1, **options)(idx)[0], plain, 'logits')
        assert relative_error(small_model(n_chunks=1, exact_local=False, **options)(idx)[0], plain) > 1e-4


@pytest.mark.parametrize('joint_kv', (True, False))
def test_warm_start_reduces_reconstruction_error(joint_kv):
    """On the keys and values of a briefly trained model, read from real text: random > weights > activations."""
    config = GPTConfig(block_size=128, n_chunks=4, n_layer=1, n_embd=64, n_head=4, rank_k=0.1, rank_v=0.1, joint_kv=joint_kv)
    torch.manual_seed(0)
    model = GPT(config)
    model.set_send('full')
    text = train.load_data('stdlib')[0]

    def batch(i):
        return train.get_batch(text, 8, 128, np.random.default_rng(i))
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
    for i in range(30):
        model(*batch(i))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    x = model.h[0].ln_1(model.wte(batch(99)[0])).detach()
    attn = model.h[0].attn
    groups = attn.compressor.group(attn.c_k(x), attn.c_v(x))

    def error():
        total = 0.0
        for zs, s in zip(groups, attn.compressor.subspaces):
            rebuilt = kernels.expand(kernels.compress(zs, s.U0, 4), s.U0, 4)
            total += (rebuilt - torch.cat(zs, -1)).square().sum().item()
        return total
    errors = [error()]
    for idx in (None, batch(0)[0]):
        model.set_bases(model.basis_moments(idx))
        U0 = attn.compressor.subspaces[0].U0
        assert_close(U0.T @ U0, torch.eye(U0.shape[1]), 'U0', 1e-5)
        errors.append(error())
    assert errors[2] < 0.9 * errors[1] < 0.9 * errors[0], errors


def test_unplugged_model_is_a_plain_model():
    idx = torch.randint(50, (1, 32))
    plain = small_model(send='full')
    local = small_model(send='local')
    for options in (dict(), dict(basis='rotated', exact_local=False), dict(send='full', wire_dtype='int4'), dict(send='local')):
        model = small_model(**options)  # the compressor draws its own random numbers: same weights otherwise
        assert relative_error(model(idx)[0], plain(idx)[0]) > 1e-6
        model.set_send('local')
        assert torch.equal(model(idx)[0], local(idx)[0])
        model.set_send('full')
        assert torch.equal(model(idx)[0], plain(idx)[0])
        missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
        assert not missing and all('compressor' in name for name in unexpected)


def test_compiled_equals_eager(monkeypatch):
    for name in ('merge', 'accumulate', 'add_up', 'quantize', 'dequantize', 'to_heads', 'expand_to_heads'):
        monkeypatch.setattr(kernels, name, getattr(kernels, name))  # put back at the end
    several = [dict(n_chunks=4, n_layer=1, **o) for o in (
        dict(basis='rotated', joint_kv=False), dict(wire_dtype='int4', grad_wire_dtype='compute', recompute=True))]
    eager = {str(o): train_steps(small_model(**o), 2) for o in several}
    kernels.fuse()
    for options in several:
        model = small_model(**options)
        model.forward = torch.compile(model.forward, backend='aot_eager')  # its C++ would take a minute more
        losses, gradients, _ = train_steps(model, 2)
        assert_close(losses, eager[str(options)][0], 'losses')
        for name, g in gradients.items():
            assert_close(g, eager[str(options)][1][name], name)


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
            assert decay[id(p)] == (0.1 if p.dim() == 2 and 'compressor' not in name else 0.0), name


def test_bases_learn_at_their_own_rate(tmp_path):
    moved = []
    for basis_lr in (0.0, 0.5):
        argv = ['--warm_start=0', f'--basis_lr={basis_lr}', '--max_iters=1', '--weight_decay=0', '--log_interval=1']
        model = small_run(tmp_path, *argv)['model']
        start = GPT(model.config).h[0].attn.compressor.subspaces[0].U0
        moved.append((model.h[0].attn.compressor.subspaces[0].U0 - start).abs().max().item())
    lr = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[0])['lr']
    assert moved[0] == 0 and abs(moved[1] / lr - 0.5) < 1e-3, (moved, lr)  # AdamW's first step is its learning rate


@pytest.mark.parametrize('options, message', (
    (dict(block_size=1000), r'block_size \(1000\) must be a multiple of n_chunks \(16\): change --block_size or --n_chunks'),
    (dict(n_embd=100, n_head=3), r'n_embd \(100\) must be a multiple of 2 \* n_head \(6\)'),
    (dict(n_head=4, n_kv_head=3), r'n_head \(4\) must be a multiple of n_kv_head \(3\)'),
    (dict(rank_k=0.0), r'rank_k \(0.0\)'), (dict(rank_v=1.5), r'rank_v \(1.5\)'), (dict(n_layer=0), r'n_layer \(0\)'),
    (dict(send='nothing'), r"send \('nothing'\) must be one of full, local"), (dict(send='local', exact_local=False), 'send=local'),
))
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


# -----------------------------------------------------------------------------
# train.py

SMALL = ['--block_size=128', '--n_chunks=8', '--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=1', '--warm_start=3',
         '--max_iters=12', '--lr_decay_iters=12', '--eval_interval=6', '--eval_iters=2', '--log_interval=1', '--sample_tokens=0',
         '--gradient_accumulation_steps=4', '--dtype=float64', '--warmup_iters=2', '--rank_k=0.1', '--rank_v=0.1',
         '--wire_dtype=compute']


def small_run(out_dir, *argv):
    return train.main([*SMALL, f'--out_dir={out_dir}', *argv])


def torchrun(n, out_dir, *argv, script=None):
    """torchrun train.py, or a function of this file -> the log's records."""
    script = [__file__, script] if script else ['train.py']
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', *script, *SMALL,
                           f'--out_dir={out_dir}', '--timeout_s=60', *argv], cwd=Path(__file__).parent, capture_output=True, text=True)
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
    assert records[11]['loss'] < records[0]['loss'] - 0.5 and records[11]['tokens'] == 12 * 4 * 128


def test_loss_by_chunk_averages_to_the_loss(reference_run):
    last = reference_run[1]['records'][-1]
    assert len(last['val_loss_by_chunk']) == 8 and np.mean(last['val_loss_by_chunk']) == pytest.approx(last['val_loss'])


def test_needle_batch():
    """Every key is stated once and asked for once, in the mirrored chunk, with the value it was stated with."""
    x, y = train.needle_batch(3, 48, 6, np.random.default_rng(0))
    stated, asked, answers = x[:, :24], x[:, 24:] - 24 * train.N_VALUES, y[:, 24:]
    assert (y[:, :24] == -1).all() and 0 <= answers.min() and answers.max() < train.N_VALUES
    for s, a, v in zip(stated, asked, answers):
        assert sorted(a.tolist()) == list(range(24))
        facts = {int(f) // train.N_VALUES: (int(f) % train.N_VALUES, i // 8) for i, f in enumerate(s)}
        assert all(facts[int(key)] == (int(value), 2 - i // 8) for i, (key, value) in enumerate(zip(a, v)))


def test_needle_is_found_through_the_compressor_alone(tmp_path):
    argv = ['--data=needle', '--n_layer=1', '--n_embd=32', '--n_head=2', '--block_size=32', '--n_chunks=4', '--batch_size=32',
            '--learning_rate=1e-2', '--max_iters=300', '--eval_interval=300', '--sample_tokens=0', f'--out_dir={tmp_path}']
    chance = np.log(train.N_VALUES)
    assert abs(train.main([*argv, '--send=local'])['val_loss'] - chance) < 0.05
    ours = train.main([*argv, '--warm_start=50'])['records'][-1]['val_loss_by_chunk']
    assert ours[:2] == [None] * 2 and max(ours[2:]) < chance - 0.5


def test_learning_rate():
    c, _ = train.parse_config(['--learning_rate=1', '--min_lr=0.1', '--warmup_iters=10', '--max_iters=110'])
    rates = [train.learning_rate(it, c) for it in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1])


def test_validation_reads_val_data_and_may_keep_only_the_best(tmp_path):
    for name in 'ab':
        (tmp_path / name).write_text(1000 * name)
    argv = f'--data={tmp_path}/a', f'--val_data={tmp_path}/b', '--learning_rate=0.02'
    records = small_run(tmp_path, *argv, '--always_save_checkpoint=False')['records']
    assert records[-1]['val_loss'] > records[0]['val_loss'] > records[11]['loss'] + 1
    assert not (tmp_path / 'ckpt.pt').exists()  # it got worse and worse
    small_run(tmp_path, *argv)
    assert (tmp_path / 'ckpt.pt').exists()


def test_life_of_the_compressor(tmp_path, monkeypatch):
    """Nothing is sent, the bases are set once, the compressor runs, everything is sent."""
    life, forward, set_bases = [], GPT.forward, GPT.set_bases

    def noting(self, *args, **kwargs):
        if torch.is_grad_enabled():
            life.append(self.compressors[0].send)
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(GPT, 'forward', noting)
    monkeypatch.setattr(GPT, 'set_bases', lambda self, moments: (life.append(f'start, {self.compressors[0].send}'), set_bases(self, moments)))
    small_run(tmp_path, '--gradient_accumulation_steps=1', '--unplug_at=7', '--warm_basis=weights')
    assert life == ['local'] * 3 + ['start, local'] + ['subspace'] * 4 + ['full'] * 5


def test_warm_start(tmp_path):
    """Before it ends every chunk is on its own (or nothing is compressed), whatever is sent later."""
    def run(*argv):
        argv = '--block_size=64', '--n_chunks=4', '--n_layer=1', '--n_embd=32', '--max_iters=5', '--log_interval=1', '--eval_iters=1', *argv
        return [r['loss'] for r in train.main([*argv, '--sample_tokens=0', '--dtype=float64', f'--out_dir={tmp_path}'])['records'][:-1]]
    local, full = run('--send=local'), run('--send=full')
    assert local[0] != full[0]
    for argv in (['--send=full'], ['--send=topk'], [], ['--exact_local=False'], ['--interleave']):
        warm = run('--warm_start=3', *argv)
        assert warm[:3] == pytest.approx(local[:3], rel=1e-12) and warm[3:] != pytest.approx(local[3:], rel=1e-6), argv
    for argv in (['--send=topk'], [], ['--interleave']):
        warm = run('--warm_start=3', '--warm_send=full', *argv)
        assert warm[:3] == pytest.approx(full[:3], rel=1e-12) and warm[3:] != pytest.approx(full[3:], rel=1e-6), argv


def test_gradients_are_clipped(tmp_path):
    """Gradients far below AdamW's epsilon move nothing."""
    records = small_run(tmp_path, '--grad_clip=1e-12')['records']
    assert records[11]['loss'] > records[0]['loss'] - 0.1


def test_bf16_trains(tmp_path, reference_run):
    records = small_run(tmp_path, '--dtype=bfloat16')['records']
    assert records[-1]['val_loss'] == pytest.approx(reference_run[1]['val_loss'], rel=0.02)
    assert max(abs(a['loss'] / b['loss'] - 1) for a, b in zip(records[:-1], reference_run[1]['records'])) > 1e-6  # and it is bf16


def test_resume_is_bit_equal(reference_run, tmp_path):
    with ThreadPoolExecutor(1) as pool:  # in another thread, where no signal can be handled
        pool.submit(small_run, tmp_path, '--max_iters=6').result()
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"iter": 7, "lo')  # as a killed run leaves it
    resumed = small_run(tmp_path, '--init_from=resume', '--n_ff=0', '--vocab_size=0', '--n_kv_head=0')  # the defaults, spelt out
    assert_same_log([json.loads(line) for line in open(tmp_path / 'log.jsonl')], reference_run[1]['records'])
    assert resumed['records'][-1]['val_loss'] == reference_run[1]['val_loss']
    for (name, a), b in zip(resumed['model'].state_dict().items(), reference_run[1]['model'].state_dict().values()):
        assert torch.equal(a, b), name
    with pytest.raises(SystemExit, match='--n_embd=64 differs from the checkpoint, which has 32'):
        small_run(tmp_path, '--init_from=resume', '--n_embd=64')
    assert not list(tmp_path.glob('*.tmp'))


def test_resume_with_other_options(reference_run, tmp_path):
    """The optimizer's options are those of the command line, not of the checkpoint."""
    expected = reference_run[1]['records'][-1]['val_loss']
    for flag, changes in (('--weight_decay=3', True), ('--beta1=0.1', True), ('--sync_every=3', False)):
        small_run(tmp_path, '--max_iters=6')
        (tmp_path / 'ckpt_rank0.6.pt').write_bytes(b'of an earlier run in this folder: not read')
        found = small_run(tmp_path, '--init_from=resume', '--max_iters=12', flag)['val_loss']
        assert (found != pytest.approx(expected, rel=1e-6)) == changes, (flag, found, expected)
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert checkpoint['config']['sync_basis_every'] == 0  # as given: it follows sync_every, should that change
    argv = '--init_from=resume', '--warm_start=12', '--max_iters=14'  # as if interrupted just when the warm start was over
    evaluated = small_run(tmp_path, *argv, '--eval_only')['val_loss']
    assert evaluated == small_run(tmp_path, *argv)['records'][0]['val_loss'] != found
    checkpoint['config']['warm_start'] = 20
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    with pytest.raises(SystemExit, match=r"warm_start \(3\) must be at least 12, the checkpoint's iteration"):
        small_run(tmp_path, '--init_from=resume', '--max_iters=30')
    del checkpoint['config']['interleave']
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    with pytest.raises(SystemExit, match='is of an older version of this code, which had no --interleave'):
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
    """2 x 2 processes give the numbers of one, bytes included, and start from its checkpoint."""
    records = torchrun(4, tmp_path, '--cp=2')
    assert_same_log(records, reference_run[1]['records'])
    full = 3 * 2 * 32 * 8 * 64 * 2 * 2  # if K, V, K, V again and their gradients travelled; d, float64, tokens, layers, sequences
    assert [r['received_fwd'] + r['received_bwd'] for r in records[:12]] == 3 * [0] + 9 * [full * 2 * 6 // (3 * 2 * 32)]
    assert records[5]['compression'] == pytest.approx(1 - 2 * 6 / (3 * 2 * 32))


def test_checkpoint_moves_to_another_world_size(reference_run, tmp_path):
    small_run(tmp_path, '--max_iters=6')
    resumed = torchrun(2, tmp_path, '--init_from=resume')
    assert_same_log(resumed, reference_run[1]['records'])  # the first 6 lines are of the first run


def test_weights_averaged_every_few_steps(reference_run, tmp_path):
    """
    sync_every > 1: not the same numbers, nearly the same loss; the ranks' weights differ before they are averaged, their
    bases less, as they are averaged more often; the checkpoint is the averaged model, and a run resumed from it goes on as
    if nothing had happened.
    """
    # the checkpoint falls on the end of the warm start
    argv = ['--sync_every=4', '--warm_start=6', '--outer_momentum=0.1', '--sync_basis_every=1']
    records = torchrun(2, tmp_path / 'whole', *argv, script='measure_drift')
    expected = reference_run[1]['records']
    assert records[0]['loss'] == pytest.approx(expected[0]['loss'], rel=1e-9)
    assert records[2]['loss'] != pytest.approx(expected[2]['loss'], rel=1e-9)
    assert records[-1]['val_loss'] == pytest.approx(expected[-1]['val_loss'], rel=0.05)
    drift = json.loads((tmp_path / 'whole' / 'drift.json').read_text())
    assert len(drift) == 4 and max(weights for _, weights in drift) > 1e-5
    assert drift[2][0] > 0 and all(basis < weights for basis, weights in drift), drift
    resumed = torchrun(2, tmp_path / 'whole' / 'at_6', *argv, '--init_from=resume')
    assert resumed[-1]['val_loss'] == records[-1]['val_loss']
    evaluated = small_run(tmp_path / 'whole', '--warm_start=6', '--init_from=resume', '--eval_only')
    assert evaluated['val_loss'] == pytest.approx(records[-1]['val_loss'], rel=1e-9)


def test_syncs_and_resuming(tmp_path):
    """
    The bases every 2 iterations, everything every 4, to validate, and at the end of the warm start; weights as bf16.
    The rounding of gradients is random, but the same after resuming.
    """
    argv = '--sync_every=4', '--sync_basis_every=2', '--sync_dtype=bf16', '--wire_dtype=int8'
    records = torchrun(2, tmp_path, *argv, script='measure_drift')
    model = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    bases = 8 * sum(t.numel() for name, t in model.items() if 'compressor' in name)
    weights = 2 * sum(t.numel() for name, t in model.items() if 'compressor' not in name)
    expected = [bases if i % 4 == 2 else bases + weights if i % 4 == 0 else 0 for i in range(1, 13)]
    expected[3] += bases + weights + 2 * 64 * 64 * 8  # the end of the warm start, with moments
    expected[6] += bases + weights  # before validation
    status = 16  # two numbers an iteration
    assert bases == 2 * 64 * 6 * 8 and [r['received_sync'] - status for r in records[:-1]] == expected
    sent = [bases * (i == 3) + n for i, n in enumerate(expected)]  # rank 0's new bases go to all
    assert [r['sent_sync'] - status for r in records[:-1]] == sent
    evaluated = small_run(tmp_path, '--wire_dtype=int8', '--init_from=resume', '--eval_only')  # all ranks had the same model
    assert evaluated['val_loss'] == pytest.approx(records[-1]['val_loss'], rel=1e-9)
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == ['ckpt.pt', 'ckpt_rank0.12.pt', 'ckpt_rank1.12.pt']
    assert torchrun(2, tmp_path / 'at_6', *argv, '--init_from=resume')[-1]['val_loss'] == records[-1]['val_loss']


def measure_drift(argv):
    """
    Run train.py, keep the checkpoint of iteration 6, and note, whenever all weights are averaged, how far the ranks' bases and other
    weights were apart.
    """
    average, save_checkpoint, drift, models = train.average, train.save_checkpoint, [], []

    class NotedGPT(GPT):
        def __init__(self, *args):
            super().__init__(*args)
            models.append(self)

    def noting(tensors, ring):
        if len(tensors) > 10:  # not the bases alone
            apart = {True: 0.0, False: 0.0}
            for name, p in models[0].named_parameters():
                others = [torch.empty_like(p) for _ in range(dist.get_world_size())]
                dist.all_gather(others, p.detach())
                is_basis = 'compressor' in name
                apart[is_basis] = max(apart[is_basis], (others[0] - others[1]).abs().max().item())
            drift.append((apart[True], apart[False]))
        average(tensors, ring)
    train.average, train.GPT = noting, NotedGPT
    out_dir = Path(next(a for a in argv if a.startswith('--out_dir=')).split('=')[1])
    (out_dir / 'at_6').mkdir(parents=True, exist_ok=True)

    def keeping(path, checkpoint):
        if path.name.endswith('.6.pt') or checkpoint.get('iter_num') == 6:
            save_checkpoint(out_dir / 'at_6' / path.name, checkpoint)
        return save_checkpoint(path, checkpoint)
    train.save_checkpoint = keeping
    train.main(argv)
    if os.environ['RANK'] == '0':
        (out_dir / 'drift.json').write_text(json.dumps(drift))


def test_outer_step(reference_run, tmp_path):
    """On one process: a whole step to the average changes nothing, no step goes nowhere, bf16 is nearly a whole step."""
    def run(*argv):
        return small_run(tmp_path, '--sync_every=3', *argv)['records']
    assert_same_log(run(), reference_run[1]['records'])
    still = run('--outer_lr=0', '--basis=fixed')
    assert still[6]['loss'] == pytest.approx(still[9]['loss'], rel=0.01) and still[-1]['val_loss'] > still[0]['val_loss'] - 0.05
    records, expected = run('--sync_dtype=bf16', '--sync_basis_every=2'), reference_run[1]['records']
    assert records[-1]['val_loss'] == pytest.approx(expected[-1]['val_loss'], rel=0.01)
    assert records[-1]['val_loss'] != pytest.approx(expected[-1]['val_loss'], rel=1e-9)


@pytest.mark.parametrize('argv, message', (
    (['--blok_size=8'], 'unknown argument --blok_size; the nearest flag is --block_size'),
    (['--block_size=1000'], r'block_size \(1000\) must be a multiple of n_chunks \(16\)'),
    (['--block_size=eight'], "--block_size: invalid int value: 'eight'"), (['--send=some'], "--send: invalid choice: 'some'"),
    (['--compile=maybe'], "'maybe' is neither True nor False"), (['--cp=2'], r'world size \(1\) must be a multiple of cp \(2\)'),
    (['--topk=0.2'], '--topk does nothing with --send=subspace'), (['--theta_clip=1'], '--theta_clip does nothing with --basis=learned'),
    (['--send=full', '--rank_k=0.1'], '--rank_k does nothing with --send=full'),
    (['--unplug_at=50'], r'unplug_at \(50\) must be between warm_start \(50\) and max_iters \(250\)'),
    (['--send=full', '--unplug_at=60'], '--unplug_at does nothing with --send=full: it needs --send=local or topk or subspace'),
    (['--method=paper', '--send=topk'], '--method=paper sends subspaces, not --send=topk'), (['--beta2=1'], r'beta2 \(1.0\)'),
    (['--seed=-1'], r'seed \(-1\) must be at least 0'), (['--learning_rate=nan'], r'learning_rate \(nan\) must be at least 0'),
    (['--sync_basis_every=1'], '--sync_basis_every does nothing with --sync_every=1'), (['--compress_last=False', '--n_layer=1'], 'nothing to compress'),
    (['--block_size=1600000'], r'block_size \(1600000\) must be below the length of the validation data'),
    (['--warm_start=500'], r'warm_start \(500\) must be below max_iters \(250\)'),
    (['--send=full', '--warm_send=full', '--warm_start=5'], r'warm_start \(5\) does nothing with --send=full and --warm_send=full'),
    (['--send=full', '--warm_send=local'], '--warm_send does nothing with --warm_start=0'),
    (['--warm_start=0', '--warm_basis=weights'], '--warm_basis does nothing with --warm_start=0'),
    (['--send=local', '--warm_start=5'], '--warm_start does nothing with --send=local'), (['--batch_size=0'], r'batch_size \(0\)'),
    (['--data=no/such/file'], "no file matches 'no/such/file'"), (['--init_from=resume'], 'there is no .*ckpt.pt'),
    (['--send=full', '--interleave'], '--interleave does nothing with --send=full'), (['--tflops=1'], '--tflops does nothing with --plan'),
    (['--send=local', '--wire_dtype=int8'], '--wire_dtype does nothing with --send=local'), (['--link_mbps=-1'], r'link_mbps \(-1.0\)'),
    (['--sync_basis_every=2'], r'sync_basis_every \(2\) must be at most sync_every \(1\)'), (['--plan', '--link_mbps=3'], '--link_mbps does nothing with --plan=True'),
    (['--plan', '--tflops=0'], r'tflops \(0\) above 0'), (['--interleave', '--compress_last=False'], 'interleave needs every layer'),
    (['--send=full', '--sync_basis_every=2', '--sync_every=4'], '--sync_basis_every does nothing with --send=full'),
    (['--sync_basis_every=5', '--sync_every=4'], r'sync_basis_every \(5\) must be at most sync_every \(4\)'), (['--outer_lr=0.7'], '--outer_lr does nothing with --sync_every=1'),
    (['--send=full', '--exact_local=False'], '--exact_local does nothing with --send=full and --wire_dtype=compute'),
    (['--vocab_size=100'], r'outside vocab_size \(100\)'), (['--rank_k=-0.1'], r'rank_k \(-0.1\) is a fraction of the width'),
    ([f'--out_dir={__file__}/x'], r'x cannot be read or made \(Not a directory\)'), (['--data=/'], r'/ cannot be read or made \(Is a directory\)'),
    (['--device=cuda'], r'needs a GPU per process: 1 processes on this machine, 0 GPUs'),
))
def test_bad_flags_are_refused(argv, message, tmp_path):
    if '--device=cuda' in argv and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(SystemExit, match=message):
        train.main([f'--out_dir={tmp_path}', *argv])
    assert not list(tmp_path.iterdir())


def test_a_read_only_out_dir_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'access', lambda *args: False)  # root may write everywhere
    with pytest.raises(SystemExit, match='out_dir .* cannot be written: change --out_dir'):
        small_run(tmp_path, '--data=needle')


def test_flags():
    c, checkpoint = train.parse_config(['--preset=800m', '--method', 'paper', '--block_size', '4096', '--compile', '--rank_k=0.1'])
    assert (c.n_layer, c.n_embd, c.n_head, c.block_size, c.compile, c.rank_k) == (8, 2048, 8, 4096, True, 0.1)
    assert (c.basis, c.exact_local, c.joint_kv, c.generator, c.compress_last, c.sync_every) == (
        'rotated', False, False, 'frobenius', False, 200)
    assert (c.theta_clip, c.n_generators, c.rank_v, c.warm_basis, c.warm_send) == (0.5, 1, 0.05, 'weights', 'full')
    assert checkpoint is None
    with pytest.raises(ValueError, match=r'n_chunks \(16\) must be a multiple of 2 \* cp \(6\): change --n_chunks or --cp'):
        zigzag(16, 3, 0)
    assert set(train.MODEL_FLAGS) == set(GPTConfig.__dataclass_fields__) - {'rope_base'}
    assert {name: d for name, d, _ in train.FLAGS if name in train.MODEL_FLAGS} == {
        **{name: f.default for name, f in GPTConfig.__dataclass_fields__.items() if name != 'rope_base'}, 'vocab_size': 0}


def test_plan(capsys):
    """--plan against the numbers written out: 4 ranks, 2 layers of d = 32, 128 tokens, bf16."""
    argv = ['--plan', '--cp=4', '--block_size=128', '--n_chunks=8', '--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=1000',
            '--rank_k=0.1', '--rank_v=0.1', '--wire_dtype=int4', '--grad_wire_dtype=compute', '--sync_every=10', '--sync_dtype=bf16', '--tflops=1e-3']
    assert train.main(argv) is None
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]
    mb = 3 * 32 * 1000 / 1e6  # tokens received, in millions
    full = 2 * 32 * 2 * 2 * mb  # K and V, 2 layers
    model = GPT(GPTConfig(block_size=128, n_chunks=8, n_layer=2, n_head=2, n_embd=32, rank_k=0.1, rank_v=0.1))
    bases = sum(p.numel() for name, p in model.named_parameters() if 'compressor' in name) * 4 / 1e6
    weights = sum(p.numel() for p in model.parameters()) * 4 / 1e6 - bases
    ours = 2 * (3 + 2) * mb, 2 * 6 * 2 * mb
    for row, (fwd, bwd, sync) in zip((rows[2], rows[6]), ((full, 2 * full, weights * 0.075), (*ours, weights * 0.075 + bases * 0.15))):
        assert row[1:] == [f'{fwd:,.1f}', f'{bwd:,.1f}', f'{1 - (fwd + bwd) / (3 * full):.2%}', f'{sync:,.1f}', f'{(fwd + bwd) / 3:,.1f}']
        seconds = rows[rows.index(row) + 7]
        assert seconds[3] == f'{(fwd + bwd) * 8 / 300:,.2f} + {sync * 8 / 300:,.2f}'  # at 300 Mbps
    n_params = model.get_num_params() - bases * 1e6 / 4  # the compressor's own work is not counted
    compute = (6 * n_params + 6 * 2 * 32 * 128) * 128_000 / 4 / 1e9
    wire, sync = (ours[0] + ours[1]) * 8 / 300, (weights * 0.075 + bases * 0.15) * 8 / 300
    assert rows[20][3] == '{:,.0f} ({:,.0f})'.format(128_000 / (max(compute, wire) + sync), 128_000 / (compute + wire + sync))
    with pytest.raises(SystemExit, match=r'n_chunks \(16\) must be a multiple of 2 \* cp \(6\)'):
        train.main(['--plan', '--cp=3'])


def test_readme_names_only_flags_that_exist():
    text = Path(__file__).with_name('README.md').read_text()
    known = {name for name, _, _ in train.FLAGS} | {'standalone', 'nproc_per_node', 'nnodes', 'node_rank', 'master_addr',
                                                   'master_port', 'max_restarts', 'help'}
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
    shards, val = train.load_data(str(tmp_path / 'shard_*.bin'), str(tmp_path / 'plain.bin'))
    assert np.array_equal(np.concatenate(shards), tokens) and len(val) == 1
    assert train.check_data('training', shards, 50, 0) == 1000
    text = np.zeros(60, dtype=np.uint8)
    assert [train.check_data('training', part, 50, 0) for part in ([text], [text, *shards], [text, tokens[:99] % 9])] == [256, 1000, 256]
    x, y = train.get_batch(shards, 64, 50, np.random.default_rng(0))
    assert x.shape == (64, 50) and torch.equal(x + 1, y)  # no window crosses from one shard into the next
    assert x[:, 0].min() < 300 and x[:, 0].max() > 600
    train_part, val_part = train.load_data(str(tmp_path / 'plain.bin'))
    assert np.array_equal(np.concatenate(train_part + val_part), tokens) and len(val_part[0]) == 100
    for content, message in ((b'', 'is empty'), (b'abc', r'odd number of bytes \(3\)'),
                             (header.tobytes() + b'ab', 'has header version 1 and 600 tokens'),
                             (header[:100].tobytes(), 'by its size, 0 tokens')):
        (tmp_path / 'bad.bin').write_bytes(content)
        with pytest.raises(ValueError, match=message):
            train.read_tokens(tmp_path / 'bad.bin')
    with pytest.raises(ValueError, match=r'block_size \(600\) must be below the length of the training data \(600 tokens'):
        train.check_data('training', shards, 600, 0)
    with pytest.raises(ValueError, match=r'the validation data has token 999, outside vocab_size \(999\)'):
        train.check_data('validation', shards, 50, 999)
    train_set, val_set = (sum(map(len, part)) for part in train.load_data('stdlib'))
    assert train_set > 5 * val_set > 1e6


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
             'average of gradients or weights': (0, ('train', 'average', None), 7, signal.SIGSTOP)}
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
            assert code == 1 and re.search(f'rank {rank} waited for .* in .*{where} and gave up: .*; nothing was heard from rank '
                                           f'{victim} since$', said), (rank, code, said)
            assert spoke[rank] - spoke[victim] < 5 + 15, (rank, said)
        assert not list(folder.glob('*.tmp'))
        if (folder / 'ckpt.pt').exists():
            train.load_checkpoint(folder / 'ckpt.pt')


def test_resume_after_a_kill_is_bit_equal(tmp_path):
    """kill -9 of a rank, then --init_from=auto: the losses that follow are those of a run that nobody killed. Syncs and all."""
    argv = [*SMALL, '--sync_every=4', '--sync_dtype=bf16', '--outer_momentum=0.3', '--wire_dtype=int8', '--eval_interval=3', '--init_from=auto']
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    end_ranks(start_ranks(2, whole, *argv), whole)
    codes = [code for code, _ in end_ranks(start_ranks(
        2, killed, '--timeout_s=5', *argv, sabotage=(end_at, 1, ('Ring', 'exchange', 'bwd'), 44, signal.SIGKILL)), killed)]
    assert codes == [1, -signal.SIGKILL] and max(losses(killed)) < 11 and (killed / 'ckpt.pt').exists()
    assert train.load_checkpoint(killed / 'ckpt.pt')['iter_num'] in (6, 9)
    assert [code for code, _ in end_ranks(start_ranks(2, killed, *argv), killed)] == [0, 0]
    assert losses(killed) == losses(whole) and len(losses(whole)) == 12


def test_torchrun_restarts_from_the_last_checkpoint(tmp_path):
    """The script of this file, as torchrun runs it, is killed once at iteration 8."""
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3',
                           __file__, 'die_once', *SMALL, f'--out_dir={tmp_path}', '--init_from=auto'], cwd=Path(__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / 'died').exists(), done.stdout + done.stderr
    assert sorted(losses(tmp_path)) == list(range(12))
    assert done.stdout.count('iter 7: loss') == 2 and done.stdout.count('iter 5: loss') == 1  # it went on from iteration 6


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


def interrupt(rank):
    """Ctrl-C for rank 1 alone, in iteration 7; before, the disk is slow once."""
    learning_rate, save = train.learning_rate, train.save_checkpoint
    train.save_checkpoint = lambda path, checkpoint: (time.sleep(8 * (checkpoint['iter_num'] == 6)), save(path, checkpoint))[1]
    train.learning_rate = lambda it, c: (it == 7 and rank == 1 and os.kill(os.getpid(), signal.SIGINT), learning_rate(it, c))[1]


def test_ctrl_c_saves_and_ends_all(tmp_path):
    folder = tmp_path / 'run'
    argv = *SMALL, '--timeout_s=5'  # writing a checkpoint may take longer
    for code, said in end_ranks(start_ranks(2, folder, *argv, sabotage=(interrupt,)), folder):
        assert code == 130, said
    assert train.load_checkpoint(folder / 'ckpt.pt')['iter_num'] == 8 and max(losses(folder)) == 7
    assert [code for code, _ in end_ranks(start_ranks(2, folder, *SMALL, '--init_from=auto'), folder)] == [0, 0]
    whole = tmp_path / 'whole'
    end_ranks(start_ranks(2, whole, *SMALL), whole)
    assert losses(folder) == losses(whole)


def lose_a_step(rank, iterations):
    """Rank 1's gradient is not finite in some iterations."""
    learning_rate, get_total_norm, now = train.learning_rate, torch.nn.utils.get_total_norm, []
    average = train.average

    def spoil(tensors):
        if now[-1] in iterations and rank == 1:
            tensors[0].fill_(float('inf'))
    train.learning_rate = lambda it, c: (now.append(it), learning_rate(it, c))[1]
    train.average = lambda tensors, ring: (spoil(tensors) if now and len(tensors) > 10 else None, average(tensors, ring))[1]
    torch.nn.utils.get_total_norm = lambda grads: (spoil(grads), get_total_norm(grads))[1]


@pytest.mark.parametrize('sync_every', (1, 20))
def test_steps_that_are_not_finite_are_skipped_by_all(tmp_path, sync_every):
    """Rank 1 alone has an infinite gradient in iterations 4 and 5; three in a row would be too many."""
    argv = *SMALL, f'--sync_every={sync_every}', '--max_skipped=3', '--eval_interval=12'
    folder = tmp_path / 'two'
    for code, said in end_ranks(start_ranks(2, folder, *argv, sabotage=(lose_a_step, (4, 5))), folder):
        assert code == 0, said
    records = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert [r['skipped'] for r in records[:12]] == [0] * 4 + [1] + [2] * 7 and np.isfinite(records[-1]['val_loss'])
    ranks = start_ranks(2, tmp_path / 'three', *argv, '--eval_interval=3', sabotage=(lose_a_step, range(4, 9)))
    for rank, (code, said) in enumerate(end_ranks(ranks, tmp_path / 'three')):
        assert code == 1 and (rank or 'no finite loss and gradient in 3 steps' in said), said
    assert train.load_checkpoint(tmp_path / 'three' / 'ckpt.pt')['iter_num'] in (3, 6)


def differ(rank, what):
    if rank == 1 and what == 'torch':
        torch.__version__ = '0.0'
    if rank == 1 and what == 'flag':
        parse = train.parse_config
        train.parse_config = lambda argv: parse([*argv, '--seed=2'])
    if rank == 1 and what == 'data':
        load_data = train.load_data
        train.load_data = lambda *args: [[np.flip(s) for s in part] for part in load_data(*args)]


@pytest.mark.parametrize('what, message', (('torch', r'rank 1 has torch 0\.0, and rank 0 has'), ('data', 'rank 1 has training data with checksum'),
                                           ('flag', 'rank 1 has --seed 2, and rank 0 has 1337: they must be the same')))
def test_ranks_that_disagree_are_named(tmp_path, what, message):
    for rank, (code, said) in enumerate(end_ranks(start_ranks(2, tmp_path, *SMALL, sabotage=(differ, what)), tmp_path)):
        assert code == 1 and (rank or re.search(message, said)), said
    assert not (tmp_path / 'log.jsonl').exists()


def test_what_an_earlier_start_left_in_the_store_is_not_read():
    store = dist.HashStore()

    def start(value):
        def agree(rank):
            time.sleep(0.3 * rank)  # the first finds only what the other's predecessor has left
            return train.agree(store, rank, 2, {'value': value})
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(agree, range(2)))
    for value in range(2):
        ours, theirs = start(value)
        assert not theirs.check(['address'])
        ours.set('address', 'here')
        assert theirs.check(['address'])


def save_for_ever(path):
    for i in itertools.count():
        train.save_checkpoint(path, {**dict.fromkeys(train.CHECKPOINT), 'model': torch.full((200_000,), i), 'iter_num': i})


def test_killed_while_saving(tmp_path):
    """50 times, at random moments: there is always one whole checkpoint, and never an older one than before."""
    path, rng, newest = tmp_path / 'ckpt.pt', np.random.default_rng(0), -1
    for _ in range(50):
        process = FORKS.Process(target=save_for_ever, args=(path,))
        process.start()
        seen = newest
        while not path.exists() or process.is_alive() and seen == newest and train.load_checkpoint(path)['iter_num'] == newest:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        checkpoint = train.load_checkpoint(path)
        assert (checkpoint['model'] == checkpoint['iter_num']).all()
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
        refused('ckpt.pt is not a checkpoint of this code')
    wrong = dict(checkpoint['model'], **{'wte.weight': torch.ones(256, 16)})
    for change in ({'model': wrong}, {'model': {}}, {'optimizer': {}}, {'optimizer': {'state': {}, 'param_groups': []}}):
        torch.save({**checkpoint, **change}, path)
        refused('ckpt.pt does not fit the model')
    path.unlink()
    small_run(tmp_path, '--sync_every=2')
    (tmp_path / 'ckpt_rank0.12.pt').write_bytes(b'')
    refused('ckpt_rank0.12.pt is damaged or not a checkpoint')


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
        data=one('stdlib', 'needle'), grad_clip=one(0.0, 1.0), link_mbps=one(0.0, 0.0, 1000.0), latency_ms=one(0.0, 0.0, 1.0))
    flags['block_size'] = flags['n_chunks'] * one(1, 2, 3, 5)
    if one(True, False):
        flags['n_kv_head'] = one(1, 2)
    for name, choices in {
            'wire_dtype': ('compute', 'bf16', 'int8', 'int4'), 'grad_wire_dtype': ('compute', 'compute', 'int8', 'int4'), 'exact_local': (True, False),
            'joint_kv': (True, False), 'basis': ('fixed', 'rotated', 'learned'), 'rank_k': (0.01, 0.1, 1.0), 'rank_v': (0.05, 0.3, 1.0),
            'generator': ('frobenius', 'spectral'), 'n_generators': (1, 2), 'theta_clip': (0.0, 0.5),
            'topk': (0.05, 0.5, 1.0), 'interleave': (True, False), 'compress_last': (True, False), 'warm_basis': ('activations', 'weights'),
            'unplug_at': (0, 1), 'sync_basis_every': (0, 1), 'sync_dtype': ('param', 'bf16'), 'outer_momentum': (0.0, 0.5), 'basis_lr': (0.1, 1.0),
            'warm_send': ('local', 'full')}.items():
        if rng.random() < 0.3 and (name not in ('sync_basis_every', 'sync_dtype', 'outer_momentum') or flags['sync_every'] > 1) and (
                not name.startswith('warm') or flags['warm_start']):
            flags[name] = one(*choices)
    for name in list(flags):  # what would do nothing is refused; that is tested apart
        if any(flags.get(flag, {'send': 'subspace', 'basis': 'learned', 'plan': False}.get(flag)) not in values
               for flag, values in train.NEEDS.get(name, {}).items()):
            del flags[name]
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
    gradient = next((f.split('=')[1] for f in flags if f.startswith('--grad_wire')), None) or next(
        (f.split('=')[1] for f in flags if f.startswith('--wire_dtype')), 'int8' if '--send=subspace' in flags else 'compute')
    exact = '--sync_every=1' in flags and gradient == 'compute'  # after the first step as well as before it
    assert found[0] == pytest.approx(alone[0], rel=1e-9) and found[1] == pytest.approx(alone[1], rel=1e-9 if exact else 0.05), what
    return 'trained'


@pytest.mark.parametrize('seed', range(20))
def test_fuzz(seed, tmp_path):
    fuzz(seed, tmp_path)


if __name__ == '__main__':  # one rank of a test that needs torchrun
    {'measure_drift': measure_drift, 'die_once': die_once}[sys.argv[1]](sys.argv[2:])
