"""
Tests. The oracle is one process with one dense softmax in float64, differentiated by autograd;
every parallel path must equal it on every rank. All `check_...` share one spawn a world size.
"""
import functools
import itertools
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch._dynamo  # the first optimizer would: 2 seconds, in every fork of this process
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

import kernels
import mos_cp
import train
from mos_cp import GPT, GPTConfig
from ring import Link, Rehearsal, Ring, Uncompressed, attend, average, positions, visible, waiting

torch.set_num_threads(1)  # here and in all processes below: tests share the cores with others
FORKS = mp.get_context('forkserver')  # processes that need not import torch again
FORKS.set_forkserver_preload([__name__])


def relative_error(a, b):
    """|a - b| / |b|, and 0 for two empty or zero tensors."""
    difference = (a - b).norm().item()
    return difference / b.norm().item() if difference else 0.0


def assert_close(a, b, what, tolerance=1e-10):
    assert a.shape == b.shape, f'{what}: {tuple(a.shape)} != {tuple(b.shape)}'
    assert relative_error(a, b) < tolerance, f'{what}: relative error {relative_error(a, b):.2e}'


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def double(*shape, generator=None):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_attend(ring, q, k, v, payload, known, weights, codec, rebuild, span):
    """`attend` on one process: all scores at once, one mask, one softmax, and autograd."""
    t = torch.arange(q.shape[1])
    past = t[:, None] >= t
    same_span = t[:, None] // span == t // span if span else torch.zeros_like(past)
    mask, arrived = past & same_span, []
    if codec:  # straight-through: the value of what travelled, the gradient of what was sent
        sizes = [p.shape[-1] if p.is_floating_point() else None for p in payload]
        travelled = codec.unpack(codec.pack([p.detach() for p in payload]), sizes, q.dtype)
        payload = [p + (w - p).detach() if p.is_floating_point() else p
                   for p, w in zip(payload, travelled)]
        keys, values = rebuild(payload, known[0], weights, 0, q.shape[1])
        k, v, mask = (torch.cat(pair, dim=1) for pair in ((k, keys), (v, values),
                                                          (mask, past & ~same_span)))
        if codec.keep and codec.feeds_above:
            arrived = [p.unsqueeze(0) for p in payload if p.is_floating_point()]
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum('bthd,bshd->bhts', q, k) / q.shape[-1] ** 0.5
    shares = scores.masked_fill(~mask, float('-inf')).softmax(-1)
    return torch.einsum('bhts,bshd->bthd', shares, v), *arrived


# -----------------------------------------------------------------------------
# kernels.py, and ring.py without other processes

def test_sums_over_blocks():
    """A merge does not overflow. Gradients add up in float32: in bfloat16, 256 + 1 + 1 is 256."""
    out, lse = torch.ones(1, 3, 1, 1), torch.tensor([1e4, -1e4, 1e4]).view(1, 3, 1)
    kernels.merge(out, lse, 3 * torch.ones_like(out), torch.full_like(lse, -1e4))
    assert out.flatten().tolist() == pytest.approx([1, 2, 1], rel=1e-3) and lse[0, 0, 0] == 1e4
    low, call, dq = out.bfloat16(), kernels.Call(1, slice(3), slice(3), False), None
    for x in (256, 1, 1):
        dq, _, _ = kernels.add_gradients(dq, [3 * [torch.full_like(low, x)]], [call], low, low)
    assert (dq == 258).all()


@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize('bits', (8, 4))
def test_quantize(bits, dtype):
    """Nearest: at most half a step off. Stochastic: at most one, each for itself, unbiased."""
    x, levels, n = torch.randn(50, 7, generator=seeded(0)).to(dtype), 2 ** (bits - 1) - 1, 1000
    x[0], x[1, 2], x[2] = 0, 1e4, 1e-9 * x[2]
    step = x.double().abs().amax(-1, keepdim=True) / levels * 1.02 + 1e-20

    def difference(stochastic):
        q = kernels.quantize(x, bits, stochastic)
        assert q.dtype == torch.uint8 and q.shape == (50, -(-7 * bits // 8) + 2)
        return kernels.dequantize(q, bits, 7, torch.float64) - x.double()
    assert (difference(False).abs() <= step / 2).all()
    torch.manual_seed(0)
    off = torch.stack([difference(True) / step for _ in range(n)])
    assert off.abs().max() <= 1
    assert off.mean(0).abs().max() < 5 * 0.5 / n ** 0.5  # a standard deviation is at most 1/2
    assert 0.7 < off.sum((1, 2)).var() / off.var(0).sum() < 1.3  # independent


def test_rope():
    """A rotation of the pairs (i, i + hd/2) by the position, so that scores depend on distance."""
    q, frequency = double(1, 20, 1, 8), 10.0 ** (-torch.arange(0, 8, 2).double() / 8)
    where = torch.randperm(100_000)[:20]
    turn = torch.exp(1j * torch.outer(where.double(), frequency)).unsqueeze(1)
    pairs = torch.complex(q[..., :4], q[..., 4:]) * turn
    angles, low = kernels.rope_angles(where, 8, base=10.0), q.bfloat16()
    assert_close(kernels.rope(q, angles), torch.cat((pairs.real, pairs.imag), -1), 'rotation', 1e-6)
    assert torch.equal(kernels.rope(low, angles), kernels.rope(low.float(), angles).bfloat16())
    assert relative_error(small_model(rope_base=10.0)(IDX)[0], small_model()(IDX)[0]) > 1e-3


def test_layout():
    """Each rank has as much of the front as of the back; together they have all. Few kernels."""
    assert positions(8, 4).tolist() == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert positions(8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert len(visible(1, 16, 0, 0)) == 4  # 8, 4, 2, 1 chunks at a time
    with patch.object(kernels, 'attention_forward', side_effect=kernels.attention_forward) as call:
        small_model(n_layer=1, send='full')(IDX)  # all of it is exact
    assert call.call_count == 1


def test_sums_over_shards_are_in_float32():
    """Gradients, in bf16, of what 64 shards are rebuilt with."""
    g, ring = seeded(0), Rehearsal(64)
    tensors = [torch.randn(*shape, generator=g).bfloat16()
               for shape in (*4 * [(1, 2, 1, 64)], (1, 2, 16), (16, 64))]
    codec = mos_cp.Mixture(GPTConfig(wire_dtype='compute', grad_wire_dtype='compute'), 1)

    def rebuild(payload, known, weights, source, n):
        assert n == (1 if source < ring.rank else 2)  # no query sees more
        keys = (payload[0] @ weights[0]).unsqueeze(2)
        return keys * (1 + source / 64), keys

    def gradients(dtype):
        q, k, v, dout, z, weight = (t.to(dtype).requires_grad_() for t in tensors)
        known = q.new_empty(64, 1, 2, 0)
        out, arrived = attend(ring, q, k, v, [z], known, [weight], codec, rebuild, 1)
        assert arrived.dtype == kernels.accumulation_dtype(dtype)  # of its gradients' sum
        return torch.autograd.grad(out, (z, weight), dout)
    for low, exact in zip(gradients(torch.bfloat16), gradients(torch.float64)):
        assert_close(low.double(), exact, 'gradient', 0.008)


# -----------------------------------------------------------------------------
# Models: what they send

class First(mos_cp.Full):
    """What a reader would write first: 4 numbers of a key and value, bytes, and x for nothing."""
    keep = True

    def compress(self, x, kv, known):
        return (9 * x[..., :1].sigmoid()).to(torch.uint8), kv[..., :4], x[..., :2]

    def expand(self, payload, known, weights):
        return payload[0][..., None, None] * F.pad(payload[1], (0, self.shape[-1] - 4))


class Mine(mos_cp.Mixture):
    """Ours with one thing changed."""
    theta_max = 0.5


mos_cp.CODECS.update(first=First, mine=Mine)
EXACT = dict(grad_wire_dtype='compute')  # a gradient that travels is not rounded at random
PAPER = dict(send='paper', n_generators=1, exact_local=False, wire_dtype='compute')
OPTIONS = [
    dict(send='first', wire_dtype='int8', **EXACT), dict(send='first'), dict(send='mine'),
    dict(send='full', wire_dtype='int4', **EXACT), dict(send='full'), dict(send='local'),
    dict(send='full', wire_dtype='int8', exact_local=False, n_head=4, n_kv_head=2, **EXACT),
    dict(), dict(compress_last=False), dict(exact_local=False), dict(n_generators=0),
    dict(n_layer=1), dict(guess_below=False), dict(wire_dtype='int4', **EXACT),
    dict(recompute=True, n_generators=0, guess_below=False), dict(wire_dtype='bf16', **EXACT),
    dict(keep=False, guess_below=False, n_head=4, n_kv_head=2),
    dict(keep=False, guess_below=False, n_kv_head=3, block_size=48, n_chunks=24),
    dict(PAPER, n_generators=0), dict(PAPER, compress_last=False),
    dict(PAPER, wire_dtype='int8', keep=False, **EXACT),
    dict(PAPER, exact_local=True, n_generators=3)]
IDX = torch.randint(50, (1, 32), generator=seeded(0))


def small_model(ring=None, seed=0, keep=True, **options):
    """A float64 GPT with odd head counts, grouped keys, a mixture and a guess that do something."""
    sizes = dict(block_size=32, n_chunks=8, n_layer=3, n_head=3, n_kv_head=1, n_embd=48,
                 vocab_size=50, latent_dim=7, n_generators=4, wire_dtype='compute')
    torch.manual_seed(seed)
    model, g = GPT(GPTConfig(**{**sizes, **options}), ring).double(), seeded(seed)
    model.loss_tokens = 5
    for block in model.started:
        block.attn.codec.keep = keep
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('codec.S'):  # else tanh is saturated
                p.mul_(0.3)
            elif 'codec' in name and p.requires_grad:
                p.add_(0.3 * double(*p.shape, generator=g))
            elif p.dim() == 2:
                p.mul_(3)
    return model


def random_tokens(g, n=32):
    """idx and targets (2, n): more are ignored on some ranks than on others."""
    idx, targets = torch.randint(50, (2, 2, n), generator=g)
    targets[:, :4], targets[0, 17] = -1, -1
    return idx, targets


def train_steps(model, n_steps, attend=attend):
    """-> losses, and the last step's gradients, averaged over the ring."""
    optimizer, g, losses = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu'), seeded(1), []
    params = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    for _ in range(n_steps):
        optimizer.zero_grad()
        with patch.object(mos_cp, 'attend', attend):
            loss = model(*random_tokens(g, model.config.block_size))[1]
            loss.backward()
        losses.append(loss.detach().clone())
        average([losses[-1][None], *(p.grad for p in params.values())], model.ring)
        optimizer.step()
    return torch.stack(losses), {name: p.grad for name, p in params.items()}


def assert_same_steps(steps, expected, tolerance=1e-8, of='a model'):
    assert_close(steps[0].double(), expected[0], f'losses of {of}', tolerance / 100)
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, f'gradient of {name} of {of} is zero'
        assert_close(steps[1][name].double(), gradient, f'gradient of {name} of {of}', tolerance)


def test_one_shard_is_ahead_without_keep():
    """With keep all exchanges are posted at once; without, one is under way, each way."""
    ring, log = Rehearsal(4), []

    def exchange(*args):
        def noting_wait():
            log.append('W')
            return wait()
        wait = Rehearsal.exchange(ring, *args)
        log.append('P')
        return noting_wait
    for keep, order in ((True, 'PPPWWW' + 'PPPWWW'), (False, 'PPWPWW' + 'PPWPPWPWWPWW')):
        with patch.object(ring, 'exchange', exchange):
            small_model(ring, keep=keep, n_layer=1, **PAPER)(IDX, IDX)[1].backward()
        assert ''.join(log) == order
        log.clear()


# -----------------------------------------------------------------------------
# On every rank of a ring: each check raises if something is off

def check_model_equals_dense_model(ring):
    for options in OPTIONS if ring.world_size < 4 else OPTIONS[::3]:
        assert_same_steps(train_steps(small_model(ring, **options), 3),
                          train_steps(small_model(**options), 3, dense_attend), of=options)


def check_layers_above_teach_z(ring):
    """A layer whose attention says nothing: what it sends has a gradient from those above alone."""
    for below in (True, False):
        model = small_model(ring, guess_below=below)
        model.h[1].attn.c_proj.weight.data.zero_()
        model(*random_tokens(seeded(1)))[1].backward()
        assert model.h[1].attn.codec.E.grad.any() == below


def check_low_precision(ring):
    """Shards are merged, and gradients from other ranks unpacked, in float32."""
    with (patch.object(kernels, 'merge', side_effect=kernels.merge) as merge,
          patch.object(kernels, 'decode', side_effect=kernels.decode) as decode):
        for dtype, tolerance in ((torch.float32, 5e-5), (torch.bfloat16, 0.2)):
            for options in (dict(), dict(exact_local=False)):
                high = train_steps(small_model(**options).to(dtype).double(), 1, dense_attend)
                low = train_steps(small_model(ring, **options).to(dtype), 1)
                assert_same_steps(low, high, tolerance, dtype)
    assert {call.args[0].dtype for call in merge.call_args_list} == {torch.float32}
    assert decode.call_args.args[3] == torch.float32


class FakeLink(Link):
    """A link on a clock of its own, which moves only when somebody waits."""
    time = 0.0

    def clock(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds


def check_dialled_link_delays_exchanges(ring):
    """8 ms at 1 MB/s, and 5 ms of latency. Rank r's clock: r seconds. One process rehearses 4."""
    link, rank = FakeLink(mbps=8, latency_ms=5), ring.rank
    dialled = Ring(ring.group, link) if ring.group else Rehearsal(4, link)
    P, link.time, x = dialled.world_size, float(rank), torch.full((1000,), rank + 1.0).double()
    source, last = ((rank - 1) % P, P - 1) if ring.group else (0, 0)
    waits = [dialled.exchange([x], 1, 'fwd') for _ in range(2)]
    assert link.time == rank  # posting waits for nothing
    for n, wait in enumerate(waits, start=1):
        received, = wait()
        assert received is not x and (received == source + 1).all()
        assert link.time == pytest.approx(max(rank, source + n * 0.008 + 0.005), abs=1e-9)
    dialled.meter.clear()
    link.time = 100.0 + rank
    average([x], dialled)  # begins when the last rank does; 2 (P - 1) / P of 8000 bytes each way
    n_bytes, took = 2 * (P - 1) * 8000 // P, 2 * (P - 1) / P * 0.008 + 2 * (P - 1) * 0.005
    assert abs(x.mean() - (last / 2 + 1)) < 1e-12 and (x == x[0]).all()
    assert link.time == pytest.approx(100 + last + took, abs=1e-9)
    assert list(dialled.meter.values()) == [n_bytes, n_bytes, 1]
    for n in (1, 2):  # what left two ranks at one time arrives one after the other
        link.receive(8000, left=200.0)
        assert link.time == pytest.approx(200.005 + (n - 1) * 0.008)
    leaves = [link.send(8000, link.time) - link.time for _ in range(2)]  # in a queue
    assert leaves == pytest.approx([0.008, 0.016])
    assert Link(latency_ms=1).dialled and not Link().dialled


def check_meter_equals_formula(ring):
    """Bytes and exchanges, of a layer and hop, forward and backward; alike in a rehearsal."""
    B, T, hops = 2, 32 // ring.world_size, ring.world_size - 1
    d, c = 16, 8 // ring.world_size  # one key head of 16, chunks a rank
    idx = torch.zeros(B, 32, dtype=torch.int64)
    full = dict(send='full', n_layer=2, n_kv_head=3, wire_dtype='int4', grad_wire_dtype='int8')
    for options, fwd, bwd in (
            (dict(send='local'), 0, 0),
            # a scale for each of three key heads; keys and values once more in backward
            (full, 6 * (d // 2 + 2) * T, 6 * (d // 2 + 2 + d + 2) * T),
            (dict(send='first', n_layer=2, wire_dtype='int4'), (1 + 8 + 3) * T, (8 + 3) * T),
            (dict(n_layer=2, wire_dtype='int4', grad_wire_dtype='bf16'), (4 + 2) * T, 7 * 2 * T),
            (dict(n_layer=2, guess_below=False), 7 * T * 8, 7 * T * 8),
            # 2 + 5 numbers of 4 bits, two theta of a chunk, each with a scale
            (dict(PAPER, n_layer=2, wire_dtype='int4'),
             *2 * [(1 + 2 + 3 + 2) * T + 2 * (1 + 2) * c])):
        n = 2 * hops if fwd else 0  # exchanges: one a layer and hop
        for played in (ring, Rehearsal(ring.world_size)):
            played.meter.clear()
            small_model(played, **options)(idx, idx)[1].backward()
            meter = {name: number for name, number in played.meter.items() if number}
            expected = {'exchanges_fwd': n, 'exchanges_bwd': n * (1 + (options is full))}
            for way in ('sent', 'received'):
                expected |= {f'{way}_fwd': 2 * B * hops * fwd, f'{way}_bwd': 2 * B * hops * bwd}
            assert meter == {name: number for name, number in expected.items() if number}, options


def check_quantised_gradients_are_unbiased(ring):
    """One gradient is off, by a little; the mean of many is not. Forward is the same."""
    def gradients(model):
        loss = model(*random_tokens(seeded(5)))[1]
        weights = [p for name, p in model.named_parameters() if 'c_kv' in name]
        return loss, torch.cat([t.flatten() for t in torch.autograd.grad(loss, weights)])
    if n := {1: 40, 2: 60}.get(ring.world_size):
        dtype = 'int8' if ring.world_size == 1 else 'int4'
        exact, rounded = (small_model(ring, grad_wire_dtype=d) for d in ('same', dtype))
        torch.manual_seed(ring.rank)
        (loss, expected), several = gradients(exact), [gradients(rounded) for _ in range(n)]
        assert all(each == loss for each, _ in several)
        one = sum(relative_error(gradient, expected) for _, gradient in several) / n
        mean = relative_error(sum(gradient for _, gradient in several) / n, expected)
        assert 1e-5 < one < 0.5 and mean < 2.5 * one / n ** 0.5, (one, mean)


def check_codecs_start_alike_on_every_rank(ring):
    """From all ranks' inputs and all batches: as one process starts them from one large batch."""
    batches = torch.randint(50, (2, 2, 32), generator=seeded(1))
    for n_known, options in ((15, dict()), (1, dict(guess_below=False)), (1, PAPER)):
        model, alone = (small_model(r, **options) for r in (ring, None))
        inputs = []
        model.h[-1].register_forward_pre_hook(lambda block, args: inputs.append(args))
        model.set_send('local')
        model.start_codecs(list(batches))
        model(batches[-1])
        (x, *_), (new_x, *_, below) = inputs[-2:]
        assert torch.equal(x, new_x) and below.shape[-1] == n_known  # from started layers
        alone.start_codecs([batches.flatten(0, 1)])
        for (name, p), q in zip(model.named_parameters(), alone.parameters()):
            assert_close(p, q, f'{name} of {options}', 1e-6)


@patch('ring.SYNC_PART', 512)
@patch.object(kernels, 'encode', side_effect=kernels.encode)
def check_average(ring, encode):
    """Of rank r's numbers: right; rounded: unbiased, equal on all ranks, and counted."""
    N, n, rank = ring.world_size, 1000, ring.rank
    xs = [double(n, generator=seeded(r)) for r in range(N)]
    mean = sum(xs) / N
    for dtype, n_bytes, error in (('compute', 8 * n, 1e-12), ('bf16', 2 * 1024, 1e-2),
                                  ('int8', 8 * 130, 2e-2), ('int4', 8 * 66, 0.3)):
        torch.manual_seed(rank)
        ring.meter.clear()
        encode.reset_mock()
        averages = []
        for _ in range(40):
            parts = list(xs[rank].clone().split([300, 700]))
            average(parts, ring, dtype)
            averages.append(torch.cat(parts))
            same = ring.reduce_over_world(averages[-1].clone(), 'a test') / N
            assert torch.equal(same, averages[-1]), dtype
            assert_close(averages[-1], mean, dtype, error)
        if dtype != 'bf16':
            assert_close(sum(averages) / 40, mean, f'mean of {dtype}', error / 4)
        received = 40 * 2 * (N - 1) * n_bytes // N
        assert ring.meter['received_sync'] == ring.meter['sent_sync'] == received, dtype
        # what is rounded, at random: 1024 numbers in two parts, and their means' share
        sizes = [c.args[0].numel() * c.kwargs['stochastic'] for c in encode.call_args_list]
        assert sizes == (40 * 2 * [512, 512 // N] if N > 1 and dtype != 'compute' else []), dtype


def check_evaluation_is_that_of_forward(ring):
    """Losses and right answers of this rank's shard, whether or not logits are kept."""
    idx, targets = random_tokens(seeded(2))
    logits, loss = small_model()(idx, targets)
    right = ring.shard(logits.argmax(-1) == targets, 4)
    for recompute in (False, True):
        losses, answers = small_model(ring, recompute=recompute).evaluate(idx, targets)
        assert torch.equal(answers, right) and (losses[ring.shard(targets, 4) == -1] == 0).all()
        total = ring.reduce_over_world(losses.sum(), 'losses')
        assert_close(total / (targets != -1).sum(), loss, 'loss')


CHECKS = [f for name, f in globals().items() if name.startswith('check_')]


def run_checks(rank, world_size, store):
    """All checks on this rank of a gloo group. What fails raises."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank,
                                world_size=world_size, timeout=timedelta(seconds=60))
    for check in CHECKS:
        check(Ring(dist.group.WORLD if world_size > 1 else None))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.parametrize('world_size', (1, 2, 4))
def test_on_every_rank(world_size, tmp_path):
    mp.start_processes(run_checks, (world_size, tmp_path / 'store'), world_size,
                       start_method='forkserver')


def run_on_gpu(rank, world_size, store):
    """Ring attention against PyTorch's, a step in a CUDA graph against an eager one, in bf16."""
    torch.cuda.set_device(rank)
    dist.init_process_group('nccl', init_method=f'file://{store}', rank=rank,
                            world_size=world_size, device_id=torch.device('cuda', rank))
    ring, g = Ring(dist.group.WORLD), torch.Generator('cuda').manual_seed(0)
    whole = torch.randn(4, 1, 1024, 4, 64, generator=g, device='cuda').bfloat16()
    q, k, v, dout = (x.transpose(1, 2).requires_grad_() for x in whole)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = expected, *torch.autograd.grad(expected, (q, k, v), dout)
    q, k, v, dout = (ring.shard(x, 256).requires_grad_() for x in whole)
    kv = torch.stack((k, v), dim=2).detach().requires_grad_()
    codec = Uncompressed()
    nothing = q.new_empty(world_size, *q.shape[:2], 0)  # known
    out, = attend(ring, q, k, v, (kv,), nothing, (), codec, codec.rebuild, span=q.shape[1])
    dq, dk, dv, dkv = torch.autograd.grad(out, (q, k, v, kv), dout, materialize_grads=True)
    for name, a, b in zip(('out', 'dq', 'dk', 'dv'),
                          (out, dq, dk + dkv[:, :, 0], dv + dkv[:, :, 1]), expected):
        assert_close(a, ring.shard(b.transpose(1, 2), 256), f'{name} of rank {rank}', 0.01)

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, latent_dim=10, **EXACT), ring).cuda()
    batches = torch.randint(256, (3, 2, 2, 256), generator=g, device='cuda')
    params = [p for p in model.parameters() if p.numel()]
    with torch.autocast('cuda', torch.bfloat16, cache_enabled=False):
        model.start_codecs([batches[0, 0]])
        replay = mos_cp.graphed(model, *batches[0])
        for batch in batches:
            steps = []
            for loss in (replay(*batch), model(*batch)[1]):
                model.zero_grad()
                (loss / 2).backward()
                steps.append([loss.detach(), *(p.grad.clone() for p in params)])
            for a, b in zip(*steps):
                assert_close(a, b, f'of a replayed step on rank {rank}', 0.01)
    del replay
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU; two are better')
def test_on_gpus(tmp_path):
    n = min(2, torch.cuda.device_count())
    mp.spawn(run_on_gpu, (n, tmp_path / 'store'), nprocs=n)


# -----------------------------------------------------------------------------
# mos_cp.py: the codecs, and the model's interface

def codec_of(kind, layer=0, **options):
    """A codec of float64 alone: two key heads of 8, so that d is 16."""
    sizes = dict(n_head=2, n_embd=16, block_size=32, n_chunks=8, latent_dim=7, vocab_size=50)
    return kind(GPTConfig(**{**sizes, **options}), layer).double()


@pytest.mark.parametrize('k', (1, 3))
def test_rotation(k):
    """The paper's is within |M|^3 / 6 of exp(M). theta is that of a chunk's mean, clipped."""
    codec = codec_of(mos_cp.Paper, send='paper', n_generators=k)
    U, theta = codec.U[0].detach(), torch.rand(1, 5, k, generator=seeded(0)).double() - 0.5
    # G is not kept: find it from what it does to a basis of the whole space
    G = codec.rotated(torch.eye(16).double())[:, 1:k + 1].transpose(0, 1)
    assert_close(G.mT, -G, 'G^T')
    assert_close(torch.linalg.matrix_norm(G), torch.ones(k).double(), 'norm of G', 1e-6)
    rotated = torch.einsum('tj,djr->tdr', codec.share(theta, 5)[0, :, :, 0], U)
    M = torch.einsum('tl,lde->tde', theta[0], G)
    exact = torch.linalg.matrix_exp(M) @ U[:, 0]
    bound = torch.linalg.matrix_norm(M, 2)**3 / 6 + 1e-6
    assert (torch.linalg.matrix_norm(rotated - exact, 2) <= bound).all()
    psi, Z = torch.ones(k, 16).double(), torch.arange(-64.0, 64).double().view(1, 8, 16)
    assert codec.theta(Z, psi).tolist() == [[[-0.5] * k, [0.5] * k]]
    codec.theta_max = 1e6
    assert_close(codec.theta(Z, psi)[0, 1, 0], Z[0, 4:].mean(0).sum(), 'theta')


def test_formulas():
    """compress and expand are what the docstring says, token by token, and so is autograd."""
    g, codec = seeded(0), codec_of(Mine, layer=1, n_generators=3)
    inputs = dict(x=double(1, 8, 16), W=double(32, 16), known=double(1, 8, 1 + 7))
    inputs |= codec.named_parameters()
    for leaf in inputs.values():
        leaf.requires_grad_().data = 0.5 * double(*leaf.shape, generator=g)

    def written_out(t):
        x, known, before = inputs['x'][0, t], inputs['known'][0, t], inputs['known'][0, t - 1, 1:]
        y = torch.cat((known, before * (t % 4 > 0), known.new_zeros(1)))  # chunks of 4 tokens
        guess, theta = codec.A @ y, 0.5 * torch.tanh(codec.S @ y)
        E, D = (M[:, 0] + sum(theta[l] * M[:, 1 + l] for l in range(3)) for M in (codec.E, codec.D))
        z = E.T @ (x - guess)
        return z, W @ (guess + D @ z)
    W, known = inputs['W'], inputs['known']
    payload, weights = codec.compress(inputs['x'], None, known), codec.weights(W)
    assert weights[0].shape == (32, 48)  # 1 + 2 * 7 + 4 * 7 = 43, for fast matrix products
    results = *payload, codec.expand(payload, known, weights).flatten(2)
    expected = [torch.stack(each)[None] for each in zip(*map(written_out, range(8)))]
    upstream = [double(*each.shape, generator=g) for each in expected]
    gradients = (torch.autograd.grad(out, list(inputs.values()), upstream)
                 for out in (results, expected))
    for name, a, b in (*zip(('z', '[K, V]'), results, expected, strict=True),
                       *zip(inputs, *gradients)):
        assert_close(a, b, name)


def test_regression():
    """R has no gradient of the sum of squares with its ridge, from which the first y is free."""
    g = seeded(0)
    x, y = double(40, 3, generator=g), F.pad(double(40, 5, generator=g), (1, 0), value=1.0)
    R = mos_cp.regression(x.T @ y, y.T @ y).requires_grad_()
    ridge = 0.01 * y[:, 1:].square().sum(0) * R[:, 1:].square()
    gradient, = torch.autograd.grad((x - y @ R.T).square().sum() + ridge.sum(), R)
    assert gradient.abs().max() < 1e-4  # 1e-6 keeps it solvable


def test_a_mixture_starts_as_the_subspace_it_contains():
    """x: 6 dimensions for the subspace, and what z of two layers say, for the guess."""
    g = seeded(0)
    W, of_noise, of_below = (double(n, 16, generator=g) for n in (32, 6, 12))

    def rows(n):
        z, noise = double(1, n, 12, generator=g), double(1, n, 6, generator=g) @ of_noise
        x = z @ of_below + noise + 0.01 * double(1, n, 16, generator=g) + 1
        return x, F.pad(30 * z, (1, 0), value=1.0)
    start_rows, (x, new_known) = rows(4000), rows(400)

    def left(**options):
        codec = codec_of(mos_cp.Mixture, layer=2, latent_dim=6, **options)
        n_known = None if options['guess_below'] else 1
        known = new_known[..., :n_known]
        codec.start(W, codec.moment(start_rows[0], start_rows[1][..., :n_known]))
        theta = codec.shares(codec.y(known), codec.S)[:, :, 1:, 0]
        if options['n_generators'] and options['guess_below']:  # theta says something, and can move
            size = theta.abs().mean(dim=(0, 1))
            assert size.min() > 0.04 and size.max() < 0.17 and theta.abs().max() <= 0.2
        rebuilt = codec.expand(codec.compress(x, None, known), known, codec.weights(W))
        return relative_error(rebuilt.flatten(2), x @ W.T)
    errors, mixed = ([left(guess_below=below, n_generators=k) for below in (False, True)]
                     for k in (0, 4))
    assert errors[0] > 0.3 and 1e-4 < errors[1] < 0.02, errors  # ridge
    assert mixed == pytest.approx(errors, rel=1e-9)
    with torch.autocast('cpu', torch.bfloat16):
        low, codec = mos_cp.Norm(16)(torch.ones(1, 4, 16)), codec_of(mos_cp.Mixture)
        assert low.dtype == torch.bfloat16 and codec.moment(low, low).dtype == torch.float32


def test_bottleneck():
    """It leaves no more of W x than its principal directions do. These are turned: of one size."""
    g, one = seeded(0), torch.eye(8).double()
    X = double(200, 8, generator=g) * 5.0 ** -torch.arange(8) @ double(8, 8, generator=g)
    for W in (double(12, 8, generator=g), one):
        E, D = mos_cp.bottleneck(X.T @ X, W, 3)
        left, best = (X - X @ E @ D.T) @ W.T, torch.linalg.svdvals(X @ W.T)[3:].norm()
        assert_close(left.norm(), best, 'what is left', 1e-6)
        assert_close(E.norm().square(), 3 * one[0, 0], 'size')
        shares = (X @ E).square().sum(0)
        assert shares.max() < 0.9 * shares.sum()  # along the eigenvectors: above 0.93
    assert_close(E.T @ E, one[:3, :3], 'E^T E', 1e-6)


def test_weights_at_the_start():
    """Codecs' differ between layers and seeds; others' do not depend on what is sent."""
    codecs = [b.attn.codec for seed in (0, 1) for b in small_model(seed=seed, **PAPER).h]
    turned = [codec.rotated(torch.eye(16)) for codec in codecs]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(turned, 2))
    local = dict(small_model(send='local').named_parameters())
    for send in mos_cp.CODECS:
        weights = dict(small_model(send=send).named_parameters())
        assert all(torch.equal(weights[name], weight) for name, weight in local.items()), send
    model = GPT(GPTConfig(n_layer=2))  # without a warm start: its guess learns
    stds = [p.std().item() for p in (model.wte.weight, model.h[0].mlp.c_proj.weight)]
    assert stds == pytest.approx([0.02, 0.01], rel=0.05)
    model(IDX.repeat(1, 8), IDX.repeat(1, 8))[1].backward()
    assert model.h[1].attn.codec.A.grad.any()


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_causality(options):
    """A token changes later logits alone; in the paper's method also those before it in a chunk."""
    model, t, other = small_model(**options), 18, IDX.clone()  # in the middle of chunk 4 of 8
    other[0, t] = (IDX[0, t] + 1) % 50
    c, changed = model.config, (model(IDX)[0] - model(other)[0]).abs().amax(dim=-1)[0]  # (T,)
    leaks = c.send == 'paper' and c.n_generators > 0 and not c.exact_local
    assert changed[:16].max() < 1e-12 and changed[t] > 0  # earlier chunks never see it
    assert (changed[16:t].max() > 1e-9) == leaks
    assert changed[20:].max() < 1e-12 if c.send == 'local' else changed[20:].min() > 0


def test_what_loses_nothing():
    """One chunk with exact_local; unplugged; all 32 directions, started from these tokens."""
    plain, local = (small_model(send=send) for send in ('full', 'local'))
    expected, lossy = plain(IDX)[0], (dict(), dict(send='full', wire_dtype='int4'))
    for options in lossy:
        model, rebuilt = (small_model(n_chunks=1, exact_local=x, **options) for x in (True, False))
        assert_close(model(IDX)[0], expected, 'logits')
        assert relative_error(rebuilt(IDX)[0], expected) > 1e-4
    for options in (*lossy, PAPER, dict(send='local')):
        model, other = (small_model(**options, seed=seed) for seed in (0, 1))
        assert relative_error(model(IDX)[0], expected) > 1e-6
        for send, unplugged in (('local', local), ('full', plain)):
            model.set_send(send)
            assert torch.equal(model(IDX)[0], unplugged(IDX)[0])
        other.load_state_dict(model.state_dict())  # what is sent is part of the state
        assert torch.equal(other(IDX)[0], expected)
    model = small_model(latent_dim=32)
    model.start_codecs([IDX])
    assert_close(model(IDX)[0], expected, 'logits', 1e-6)
    last = small_model(compress_last=False, wire_dtype='int4').h[2].attn.active
    assert (type(last), last.wire_dtype, last.grad_wire_dtype) == (mos_cp.Full, *2 * ['compute'])


def test_backward_of_a_ring_of_one(monkeypatch):
    """The math kernel's tensors lie in another order in memory. A second backward is refused."""
    model, other = (small_model(n_head=4, n_kv_head=2) for _ in range(2))
    expected = train_steps(model, 1)
    monkeypatch.setattr(kernels, 'attention_backend', lambda *args: 'math')
    assert_same_steps(train_steps(other, 1), expected)
    loss = model(IDX, IDX)[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='a second backward'):  # what arrived is gone
        loss.backward()


def test_compiled_equals_eager():
    """Each region once, as it is captured, split in forward and backward, and decomposed."""
    options = dict(n_chunks=4, wire_dtype='int4', recompute=True, **EXACT)
    in_python = functools.partial(torch.compile, backend='aot_eager_decomp_partition')
    with patch.object(torch, 'compile', side_effect=in_python) as compile:
        eager = train_steps(small_model(**options), 2)
        assert not compile.called
        assert_same_steps(train_steps(small_model(compile=True, **options), 2), eager)
        assert 5 < compile.call_count < 15  # not for each layer or step
        n_graphs = []
        for n_layer in (3, 5):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = small_model(Rehearsal(2), compile=True, n_layer=n_layer, **options)
            model(IDX, IDX)[1].backward()
            n_graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
        assert n_graphs[0] == n_graphs[1] > 0  # nor a graph for each
    kernels.compile_fused(False)


def test_recompute_keeps_less_for_backward():
    kept, idx = [], torch.zeros(1, 256, dtype=torch.int64)
    for recompute in (False, True):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            GPT(GPTConfig(vocab_size=2000, recompute=recompute))(idx, idx)
        kept.append(sum(t.nbytes for t in saved.values()))
    assert kept[1] < 0.6 * kept[0], kept


def test_any_length_and_generate():
    model, idx = small_model(), torch.randint(50, (2, 33), generator=seeded(0))
    logits, loss = model(idx[:, :32])
    assert logits.shape == (2, 32, 50) and loss is None
    short, loss = model(idx[:, :5], idx[:, 1:6])  # no multiple of the chunk: padded, unseen
    assert_close(short, logits[:, :5], 'logits')
    # a rank of a ring generates alone; past block_size
    out = small_model(Rehearsal(2)).generate(idx[:, :30], 6, top_k=1)
    assert out.shape == (2, 36) and torch.equal(out[:, :30], idx[:, :30]) and loss.isfinite()
    assert torch.equal(out[:, 30], model(idx[:, :30])[0][:, -1].argmax(-1))
    for ring, n, message in (
            (None, 33, r'sequence length \(33\) is above block_size \(32\)'),
            (Rehearsal(2), 31, r'length \(31\) must be a multiple of the chunk size \(4\)'),
            (Rehearsal(2), 8, r'n_chunks \(2\) must be a multiple of 2 \* cp \(4\)')):
        with pytest.raises(ValueError, match=message):
            small_model(ring)(idx[:, :n])


@pytest.mark.parametrize('options', (dict(), PAPER), ids=str)
def test_decay_and_flops(options):
    """Only matrices decay. The FLOPs of 6 a parameter and of what attention sees. LLaMA's eps."""
    model = small_model(**options)
    assert {m.eps for m in model.modules() if isinstance(m, mos_cp.Norm)} == {1e-5}
    groups = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu').param_groups
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    for name, p in model.named_parameters():
        expected = 0.1 if p.dim() == 2 and 'codec' not in name else 0.0
        assert decay.get(id(p)) == (expected if p.requires_grad else None), name
    # attention, MLPs, norms; the head: neither the embedding nor codecs
    n_params = 3 * (2 * 48 * 48 + 2 * 16 * 48 + 3 * 48 * 128 + 2 * 48) + 48 + 48 * 50
    for send, span in (('codec', 32), ('local', model.config.chunk_size)):
        model.set_send(send)
        flops = 6 * n_params + 6 * 3 * 48 * span
        assert model.flops_per_token() == flops
        assert model.estimate_mfu(2, 0.5, 1e12) == pytest.approx(flops * 32 * 2 / 0.5 / 1e12)


# -----------------------------------------------------------------------------
# train.py: data and flags

def test_needle_batch():
    """Each key is stated once and asked for once, with the value stated, on another rank."""
    n = 8  # chunks of 6 tokens
    x, y = train.needle_batch(SimpleNamespace(batch_size=3, block_size=48, n_chunks=n),
                              np.random.default_rng(0))
    assert (y[:, :24] == -1).all()
    for stated, asked, answers in zip(x[:, :24], x[:, 24:] - 24 * train.N_VALUES, y[:, 24:]):
        assert sorted(asked.tolist()) == list(range(24))
        facts = {divmod(int(fact), train.N_VALUES): i // 6 for i, fact in enumerate(stated)}
        for i, (key, value) in enumerate(zip(asked.tolist(), answers.tolist())):
            both = {facts[key, value], n // 2 + i // 6}
            assert all(both - set(positions(n, P)[r].tolist()) for P in (2, 4) for r in range(P))


def test_readers(tmp_path, monkeypatch):
    """Text, .bin with and without a header, globs to any depth of many files."""
    def with_header(start, tokens):
        start = np.pad(np.array(start, np.int32), (0, 256 - len(start)))
        return start.tobytes() + tokens.tobytes()
    tokens, long = np.arange(1000, dtype=np.uint16), np.arange(70_000, 71_000, dtype=np.uint32)
    files = {'text.txt': bytes(range(256)) * 4, 'plain.bin': tokens.tobytes(), 'shard_e.bin': b'',
             'shard_0.bin': with_header([20240520, 1, 400], tokens[:400]),
             'deep/er/shard_1.bin': with_header([20240520, 1, 600], tokens[400:]),
             'llama.bin': with_header([20240801, 7, 1000], long),
             'odd.bin': b'abc', 'cut.bin': with_header([20240520, 1, 600], tokens[:1])}
    monkeypatch.chdir(tmp_path)
    os.makedirs('deep/er')
    for name, content in files.items():
        Path(name).write_bytes(content)

    def load(data, val_data='plain.bin', block_size=50):
        return train.load_data(SimpleNamespace(data=data, val_data=val_data, block_size=block_size))
    for name, expected in (('text.txt', np.tile(np.arange(256), 4)), ('llama.bin', long)):
        assert np.array_equal(train.read_tokens(name), expected)
    shards, val = load('**/shard_*.bin')
    shards.sort(key=len)
    assert np.array_equal(np.concatenate(shards), tokens) and np.array_equal(*val, tokens)
    x, y = train.get_batch(SimpleNamespace(batch_size=64, block_size=50), shards, 1000,
                           np.random.default_rng(0))
    assert x.shape == (64, 50) and torch.equal(x + 1, y)  # no window crosses into the next shard
    assert x[:, 0].min() < 300 and x[:, 0].max() > 600
    first, last = load('plain.bin', '')
    assert np.array_equal(np.concatenate(first + last), tokens) and len(last[0]) == 100
    assert train.fingerprint(shards) != train.fingerprint([np.flip(s) for s in shards])
    for argv, message in (
            (['shard_e.bin'], 'is empty'), (['odd.bin'], r'odd number of bytes \(3\)'),
            (['cut.bin'], 'version 1 and 600 tokens, but .* 1 and, by its size, 1 tokens'),
            (['text.txt'], "different kinds of tokens: .*'uint8': .*'uint16': "),
            (['**/shard_*.bin', 'plain.bin', 600], 'length of the training data .600 tokens')):
        with pytest.raises(ValueError, match=message):
            load(*argv)


@pytest.mark.parametrize('argv, message', (
    ('--blok_size=8', 'the nearest flag is --block_size'), ('--lr=1', '--lr; --help lists all'),
    ('--block_size=eight', "invalid int value: 'eight'"), ('--compile=maybe', "choice: 'maybe'"),
    ('--preset=some', "--preset: invalid choice: 'some'"), ('--tflops=0', 'tflops .0.0. must be'),
    ('--block_size=1000', 'multiple of n_chunks .16.: change --block_size or --n_chunks'),
    ('--n_embd=100 --n_head=3', r'n_embd \(100\) must be a multiple of 2 \* n_head \(6\)'),
    ('--n_head=4 --n_kv_head=3', r'n_head \(4\) must be a multiple of n_kv_head \(3\)'),
    ('--latent_dim=0', 'latent_dim .0. must be at least 1'),
    ('--n_kv_head=1 --latent_dim=49', 'at most 48'), ('--latent_dim=97', 'at most 96'),
    ('--method=paper --latent_dim=1', 'latent_dim .1. must leave'), ('--data=no/such', 'no file'),
    ('--plan --dtype=float64', r'dtype \(float64\) must be bfloat16 or float32 with --plan'),
    ('--compress_last=False --n_layer=1', 'leaves nothing to compress when n_layer is 1'),
    ('--cp=2', 'world size .1. must be a multiple of cp'), ('--batch_size=0', 'at least 1'),
    ('--unplug_at=50', r'between warm_start \(50\) and max_iters'), ('--rehearse=1', 'least 2'),
    ('--warm_start=500', 'below max_iters .500.'), ('--learning_rate=nan', 'must be at least 0'),
    ('--seed=18446744073709551616', 'below 2.63'), ('--vocab_size=99', 'outside vocab_size .99'),
    ('--init_from=resume', 'ckpt.pt does not exist: change --init_from or --out_dir'),
    (f'--out_dir={__file__}/x', r'x cannot .* made \(Not a directory\): change .*--out_dir'),
    ('--data=/', r"no file matches '/', .* folder are /\*\): change --data or --val_data"),
    (f'--data={__file__} --val_data={__file__}', r"validation data share {'/.*py'}: change --data"),
    (f'--val_data={__file__} --block_size=1600000', r'part\): change --block_size or --val_data'),
    (f'--data=needle --val_data={__file__}', 'must be empty with --data=needle'),
    ('--learning_rate=1e-4', r'min_lr \(0.0002\) must be at most learning_rate \(0.0001\)'),
    ('--device=cuda', r'a GPU per process \(1 processes on this machine, 0 GPUs\)'),
    ('--plan --cp=3', r'n_chunks \(16\) must be a multiple of 2 \* cp \(6\): change --n_chunks'),
    ('--rehearse=4 --cp=2', '0 or rehearse'), ('--rehearse=8 --n_chunks=8', 'n_chunks .8.')))
def test_bad_flags_are_refused(argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    with pytest.raises(SystemExit, match=message):
        train.main([f'--out_dir={tmp_path}', *argv.split()])
    assert not (tmp_path / 'ckpt.pt').exists()


def test_flags(monkeypatch):
    """Presets, methods, what follows from other flags; a field without a comment is a flag too."""
    @dataclass
    class Mine(train.RunConfig):
        dropout: float = 0.1
        why: bool = False

    def parse(argv):
        return train.parse_config(argv.split())[0]
    c = parse('--preset=800m --method paper --block_size 4096 --compile')
    assert (c.n_embd, c.block_size, c.compile) == (2048, 4096, True)
    assert train.METHODS['paper'].items() <= vars(c).items()
    assert train.model_config(c).paper_dims == (41, 102)  # 2 % and 5 % of 2048
    for argv, latent_dim, wire_dtype in (
            ('', 16, 'int4'), ('--preset=800m', 44, 'int4'), ('--send=paper', 16, 'compute'),
            ('--method=paper', 7, 'compute'), ('--method=paper --latent_dim=5', 5, 'compute'),
            ('--send=full', 16, 'compute'), ('--send=local --wire_dtype=int8', 16, 'int8')):
        config = train.model_config(parse(argv))
        assert (config.latent_dim, config.wire_dtype) == (latent_dim, wire_dtype), argv
    c = parse('--learning_rate=1 --min_lr=0.1 --warmup_iters=10 --max_iters=110')
    rates = [train.learning_rate(it, c) for it in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1])
    monkeypatch.setattr(train, 'RunConfig', Mine)
    assert train.parse_flags(['--dropout', '0.2', '--why']) == dict(dropout=0.2, why=True)


def test_a_gpu_for_each_process_or_for_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setenv('LOCAL_RANK', '1')
    for device, n_local, expected in (('auto', '2', 'cuda:1'), ('cuda', '2', 'cuda:1'),
                                      ('auto', '3', 'cpu'), ('cpu', '2', 'cpu')):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', n_local)
        c, _ = train.parse_config([f'--device={device}'])
        assert str(train.World(c).device) == expected


def test_readme():
    """Its flags exist, its diff applies."""
    path = Path(__file__).with_name('README.md')
    flags, diff = set(re.findall(r'--([a-z_0-9]+)', path.read_text())), path.read_text()
    torchrun = 'standalone nproc_per_node nnodes node_rank master_addr master_port max_restarts'
    assert flags <= {*train.DEFAULTS, *torchrun.split(), 'help'}
    diff = re.search('^```diff\n(.*?)^```', diff, re.DOTALL | re.MULTILINE)[1]
    subprocess.run(['git', 'apply', '--check'], input=diff, text=True, cwd=path.parent, check=True)


def test_plan(capsys):
    """--plan against the numbers written out: 4 ranks, 2 layers of d = 32, 512 tokens, bf16."""
    sizes = dict(block_size=512, n_chunks=8, n_layer=2, n_head=4, n_embd=32, latent_dim=6)
    flags = dict(sizes, cp=4, batch_size=250, grad_wire_dtype='compute', sync_every=10,
                 tflops=6e-4)  # full: forward waits for the wire, backward hides it
    argv = ['--plan', *(f'--{k}={v}' for k, v in flags.items())]
    assert train.main([*argv, '--link_mbps=75']) is None
    table = capsys.readouterr().out
    assert 'at 1000 Mbit/s' not in table and max(map(len, table.splitlines())) <= 100
    rows = dict(re.split('  +', line, maxsplit=1) for line in table.splitlines() if '   ' in line)
    n, full = 128_000, 2 * 2 * 32 * 2 * 3 / 4  # tokens an iteration; bytes of one: K, V, 2 layers
    n_ours, n_plain = (GPT(GPTConfig(**sizes, send=send)).get_num_params()
                       for send in ('mixture', 'full'))
    # FLOPs of a token, of two layers, with y, z and [y, z] filled up to 8: x and y to z, forward
    # and backward; [y, z] to [K, V] of 4 shards, of which two have half the work, forward, once
    # more in backward, and its two gradients. W [A, D] once a micro-step, of which there is one.
    y, y_z = 8 + 16, 16 + 24
    codec = 6 * 8 * (2 * 32 + y) + 8 * 64 * y_z * 3 + 6 * 64 * 32 * y_z / (n / 4)
    for name, fwd, bwd, n_params, of_codec in (
            ('--send=full', full, 2 * full, n_plain, 0),
            ('Ulysses', 2 * full / 4, 2 * full / 4, n_plain, 0),
            ('this configuration', 2 * (3 + 2) * 3 / 4, 2 * 6 * 2 * 3 / 4, n_ours, codec)):
        sync = (n_params + 256 * 32) * 4 * 2 * 0.75 / 10
        fwd_s, bwd_s, sync_s = (x * 8 / 75e6 for x in (n * fwd, n * bwd, sync))
        a, rest, c = (x * n / 4 / 6e8 for x in (6 * 2 * 32 * 512, 6 * n_plain, of_codec))  # seconds
        hidden = max(a / 6, fwd_s + a / 24) + max(a * 5 / 6, bwd_s + a * 5 / 24)
        seconds = rest + c + (a + fwd_s + bwd_s if name == 'Ulysses' else hidden)
        cells = rows[name].replace(',', '').replace('%', '').split()
        assert [float(cell) for cell in cells] == pytest.approx([
            n * (fwd + bwd) / 1e6, sync / 1e6, fwd_s + bwd_s, sync_s, rest + c + a,
            100 * c / (rest + a), n / (seconds + sync_s)], rel=0.03, abs=0.1), name
    train.main(argv)
    assert 'at 1000 Mbit/s' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# train.py: runs

SMALL = ('--block_size=128 --n_chunks=8 --n_layer=2 --n_head=2 --n_embd=32 --batch_size=1 '
         '--warm_start=3 --max_iters=12 --lr_decay_iters=12 --eval_interval=6 --eval_iters=2 '
         '--log_interval=1 --sample_tokens=0 --gradient_accumulation_steps=4 --dtype=float64 '
         '--warmup_iters=2 --latent_dim=6 --wire_dtype=compute --device=cpu --learning_rate=2e-3 '
         '--min_lr=2e-4 --sync_dtype=compute').split()


def small_run(out_dir, *argv):
    return train.main([*SMALL, f'--out_dir={out_dir}', *argv])


def read_log(folder, configs=False):
    records = [json.loads(line, parse_constant=pytest.fail) for line in open(folder / 'log.jsonl')]
    return [r for r in records if ('config' in r) == configs]


def losses(folder):
    return {r['iter']: r['loss'] for r in read_log(folder) if 'loss' in r}


def run_rank(rank, world_size, port, folder, argv, sabotage):
    """train.py as one rank, without torchrun. What it says goes to folder/RANK.txt."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    output = os.open(folder / f'{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(output, fd)
    if sabotage:
        sabotage[0](rank, *sabotage[1:])
    model = train.main([f'--out_dir={folder}', *argv])['model']
    total = sum(p.double().sum() for p in model.parameters()).item()
    print(f'seed {torch.initial_seed()}, weights {total.hex()}', flush=True)


def run_ranks(n, folder, *argv, sabotage=None, victim=None, seconds=60):
    """
    n processes of `run_rank` -> exit codes and what was printed. sabotage: (function, *arguments),
    called as function(rank, ...). The victim, and who still runs after so many seconds, is killed.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ranks = [FORKS.Process(target=run_rank, args=(r, n, port, folder, argv, sabotage))
             for r in range(n)]
    for process in ranks:
        process.start()
    until = time.monotonic() + seconds
    for rank, process in enumerate(ranks):
        if rank != victim:  # the end of who is frozen must free nobody
            process.join(max(0, until - time.monotonic()))
    for process in ranks:
        process.kill()
        process.join()
    codes, printed = ([process.exitcode for process in ranks],
                      [(folder / f'{rank}.txt').read_text() for rank in range(n)])
    print(*printed)  # pytest shows it if a test fails
    if not any(codes):  # rounded not alike, and yet the same on all ranks
        ends = [re.findall('^seed (.*), weights (.*)$', text, re.MULTILINE)[-1] for text in printed]
        seeds, weights = map(set, zip(*ends))
        assert len(seeds) == n and len(weights) == 1
    return codes, printed


@pytest.fixture(scope='module')
def reference_run(tmp_path_factory):
    """(folder, result) of one uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp('reference')
    return folder, small_run(folder)


def assert_same_log(records, expected):
    assert [r['iter'] for r in records] == [r['iter'] for r in expected]
    for a, b in zip(records, expected):
        for key in ('loss', 'val_loss', 'grad_norm', 'val_loss_by_chunk'):
            assert (key in a) == (key in b), (key, a, b)
            values = (np.array(record.get(key, 0), float) for record in (a, b))  # None: NaN
            np.testing.assert_allclose(*values, rtol=1e-9, err_msg=key)


def test_rehearsal_and_evaluation_leave_no_trace(tmp_path, capfd):
    result = small_run(tmp_path, '--rehearse=4', '--sync_every=4', '--sample_tokens=9')
    small_run(tmp_path, '--eval_only', '--link_mbps=9', '--sample_tokens=9')
    printed, steps = capfd.readouterr().out, [r for r in result['records'] if 'loss' in r]
    assert 'a rehearsal of rank 2 of 4' in printed and '--- sample' not in printed
    assert not list(tmp_path.iterdir()) and all(math.isfinite(r['loss']) for r in steps)
    assert steps[-1]['received_fwd'] and steps[-1]['received_sync']


def test_log_and_falling_loss(reference_run):
    folder, result = reference_run
    records, by_chunk = read_log(folder), result['records'][-1]['val_loss_by_chunk']
    assert records == result['records'] and [r['iter'] for r in records] == list(range(13))
    config = read_log(folder, configs=True)[0]['config']
    assert config['latent_dim'] == 6 and config.keys() == train.DEFAULTS.keys()
    assert [r['iter'] for r in records if 'val_loss' in r] == [0, 6, 12]
    assert {'lr', 'grad_norm', 'seconds', 'sent_fwd', 'sent_bwd', 'sent_sync'} <= records[1].keys()
    assert [r['compression'] for r in records[:12]] == [None] * 12  # one process sends nothing
    assert records[11]['loss'] < records[0]['loss'] - 0.2 and records[11]['tokens'] == 12 * 4 * 128
    assert len(by_chunk) == 8 and np.mean(by_chunk) == pytest.approx(records[-1]['val_loss'])


def test_needle_is_found_through_the_compressor_alone(tmp_path, capfd):
    argv = '--preset=needle', '--device=cpu', '--recompute', f'--out_dir={tmp_path}'
    blind = train.main([*argv, '--send=local', '--max_iters=100'])['val_loss']
    assert abs(blind - np.log(train.N_VALUES)) < 0.05
    result = train.main(argv)
    ours = result['records'][-1]['val_loss_by_chunk']
    assert ours[:2] == [None] * 2 and max(ours[2:]) < 0.3
    printed = re.findall(r'([0-9.]+)% right answers \(chance: 12.5%\)', capfd.readouterr().out)
    assert float(printed[0]) < 20 and float(printed[-1]) > 50  # which a loss below 0.3 implies


def test_paths_and_only_the_best_checkpoint(tmp_path, monkeypatch, capfd):
    """~ is a home. Files longer than a sequence are data. Validation gets worse and worse."""
    monkeypatch.setenv('HOME', str(tmp_path))
    for name, n in (('a', 1000), ('aa', 100), ('b', 1000)):
        (tmp_path / name).write_text(n * name[0])
    argv = '--data=~/a*', f'--val_data={tmp_path}/[b]', '--learning_rate=0.02'
    records = small_run('~', *argv, '--always_save_checkpoint=False')['records']
    assert records[-1]['val_loss'] > records[0]['val_loss'] > records[11]['loss'] + 1
    assert (tmp_path / 'log.jsonl').exists() and not (tmp_path / 'ckpt.pt').exists()
    small_run('~', *argv, '--sample_tokens=20', '--prompt=caf\udce9')
    printed = capfd.readouterr().out
    assert '--- sample\ncaf\ufffd' in printed
    assert 'data: 1,000 tokens in 1 file(s) longer than block_size (of 2)' in printed


def test_life_of_the_codec(tmp_path, monkeypatch, capfd):
    """Nothing is sent, codecs start, are sent, all is sent; each is said. A checkpoint knows."""
    life, seeds, forward, start_codecs = [], set(), GPT.forward, GPT.start_codecs

    def noting(self, *args):
        seeds.add(torch.initial_seed())
        life.append(self.sends)
        return forward(self, *args)

    def starting(self, batches):
        life.append([self.sends, *(idx.shape for idx in batches)])
        start_codecs(self, batches)
    monkeypatch.setattr(GPT, 'forward', noting)
    monkeypatch.setattr(GPT, 'start_codecs', starting)
    run = small_run(tmp_path, '--gradient_accumulation_steps=2', '--unplug_at=7')
    start = ['local', (1, 128), (1, 128)]
    assert life == ['local'] * 6 + [start] + ['codec'] * 8 + ['full'] * 10
    assert len(seeds) == 12  # iterations do not round alike
    printed = re.findall(r'^iter +(\d+): (.*s sent|.*starts)', capfd.readouterr().out, re.MULTILINE)
    assert printed == [('0', 'nothing is sent'), ('3', 'the codec starts'), ('7', 'all is sent')]
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    model = GPT(GPTConfig(**checkpoint['model_args'])).double()  # as users of nanoGPT do
    model.load_state_dict(checkpoint['model'])
    x = torch.randint(256, (2, 128), generator=seeded(0))
    assert model.sends == 'full'
    assert_close(model(x, x)[1], run['model'](x, x)[1], 'loss')
    life.clear()
    small_run(tmp_path, '--send=full', '--warm_send=full', '--max_iters=4')  # nothing to start
    assert life == ['full'] * 12 + ['codec'] * 4


def test_seed_dtype_and_optimizer_options(tmp_path, reference_run):
    """bf16 trains. Clipped far below AdamW's epsilon nothing moves; 0: not clipped. --codec_lr."""
    a, b, other = (small_run(tmp_path, f'--seed={seed}', '--max_iters=0')['model'].wte.weight
                   for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)
    try:
        result, expected = small_run(tmp_path, '--dtype=bfloat16'), reference_run[1]
        assert result['val_loss'] == pytest.approx(expected['val_loss'], rel=0.02)
        assert abs(result['loss'] / expected['loss'] - 1) > 1e-6  # and it is bf16
    except RuntimeError as e:  # PyTorch's kernel, where AVX-512 is there and may not be used
        assert 'pack_vnni2' in str(e)
    for clip, learns in (('1e-12', False), ('0', True)):
        records = small_run(tmp_path, f'--grad_clip={clip}')['records']
        assert (records[11]['loss'] < records[0]['loss'] - 0.2) == learns, clip
    argv = '--warm_start=0', '--warmup_iters=0', '--max_iters=1', '--weight_decay=0'
    runs = [small_run(tmp_path, *argv, f'--codec_lr={x}') for x in (0, 0.5)]
    still, moved = (run['model'].started[0].attn.codec.E for run in runs)
    step = (moved - still).abs().max().item() / runs[0]['records'][0]['lr']
    assert abs(step - 0.5) < 1e-3  # AdamW's first is the learning rate


@pytest.mark.parametrize('n, argv', (
    (2, '--cp=1 --send=paper --exact_local=False --compress_last=False --unplug_at=4'),
    (3, '--data=needle --block_size=96 --n_chunks=6 --latency_ms=1 --grad_clip=0'),
    (4, '--cp=2 --n_layer=3 --n_kv_head=1 --warm_send=full --recompute --batch_size=2')))
def test_processes_equal_one(tmp_path, n, argv):
    argv = *SMALL, '--max_iters=6', '--eval_interval=3', *argv.split()
    assert run_ranks(n, tmp_path / 'many', *argv)[0] == [0] * n
    train.main([*argv, '--cp=1', f'--out_dir={tmp_path}/one'])
    assert_same_log(read_log(tmp_path / 'many'), read_log(tmp_path / 'one'))


def test_four_processes_resume_a_run_of_one(reference_run, tmp_path):
    """2 x 2 processes give the numbers of one, bytes included, and go on from its checkpoint."""
    small_run(tmp_path, '--max_iters=4', '--eval_interval=4')
    codes, printed = run_ranks(4, tmp_path, *SMALL, '--cp=2', '--init_from=resume')
    assert codes == [0] * 4
    records = read_log(tmp_path)
    assert_same_log(records, reference_run[1]['records'])
    n = 64 * 2 * 2 * 8  # tokens of the other rank; layers, sequences, bytes
    assert [r['received_fwd'] + r['received_bwd'] for r in records[4:12]] == 8 * [2 * 6 * n]
    # K, V, K, V again and their gradients would have travelled
    assert records[5]['compression'] == pytest.approx(1 - 6 / (3 * 32))
    assert 'received 48 + 48 bytes a token and layer' in printed[0]
    assert 'rank 0 sent 0.2 MB over the ring (uncompressed: 3.1)' in printed[0]


def test_weights_averaged_every_few_steps(reference_run, tmp_path):
    """Nearly the same loss, also in few bits. Validation waits for a sync and changes nothing."""
    model, expected = reference_run[1]['model'], reference_run[1]['records']
    params = [p for p in model.parameters() if p.requires_grad]
    n, runs = sum(p.numel() for p in params), []
    for interval, dtype, validated in ((3, 'compute', [0, 4, 8, 12]), (12, 'compute', [0, 12]),
                                       (12, 'int4', [0, 12])):
        argv = *SMALL, '--sync_every=4', f'--eval_interval={interval}', f'--sync_dtype={dtype}'
        assert run_ranks(2, tmp_path, *argv)[0] == [0, 0]
        records = read_log(tmp_path)
        assert [r['iter'] for r in records if 'val_loss' in r] == validated
        runs.append((losses(tmp_path), records[-1]['val_loss']))
        sync = 8 * n if dtype == 'compute' else -(-n // 256) * 2 * 66
        save = 8 * (2 * n + len(params)) if interval == 3 else 0  # also of each one's step
        received = [r['received_sync'] for r in records[:-1]]
        assert received.pop(3) > sync  # and for the codecs' start
        assert received == [0, 0, 0, save, 0, 0, sync, save, 0, 0, sync]
        assert records[2]['loss'] != pytest.approx(expected[2]['loss'], rel=1e-9)
        assert records[-1]['val_loss'] == pytest.approx(expected[-1]['val_loss'], rel=0.05)
    assert runs[0] == runs[1] != runs[2]


def test_gradients_in_few_bits(reference_run, tmp_path):
    assert run_ranks(2, tmp_path, *SMALL, '--sync_dtype=int8')[0] == [0, 0]
    result, expected = losses(tmp_path)[11], reference_run[1]['records'][11]['loss']
    assert result != pytest.approx(expected, rel=1e-9) and result == pytest.approx(expected, 0.02)


def test_resume_is_bit_equal(reference_run, tmp_path, capfd):
    small_run(tmp_path, '--max_iters=6')
    with open(tmp_path / 'log.jsonl', 'ab') as f:  # a foreign hand; and as a killed run leaves it
        f.write(b'[1]\n{"epoch": 3}\nnot JSON\n{"iter": 7, "lo\xff\n')
    defaults = '--n_ff=0', '--vocab_size=0', '--n_kv_head=0'  # spelt out
    resumed, expected = small_run(tmp_path, '--init_from=resume', *defaults), reference_run[1]
    assert_same_log(read_log(tmp_path), expected['records'])
    started = [(r['iter'], r['config']['max_iters']) for r in read_log(tmp_path, configs=True)]
    assert started == [(0, 6), (6, 12)] and resumed['val_loss'] == expected['val_loss']
    printed = capfd.readouterr().out
    assert 'the codec goes on' in printed and 'raise --max_iters' not in printed
    small_run(tmp_path, '--init_from=resume')
    assert 'at iteration 12 of 12; to go on, raise --max_iters' in capfd.readouterr().out
    for flag, saved in (('--n_embd=64', 32), ('--preset=124m', 'tiny')):
        with pytest.raises(SystemExit, match=f'{flag} differs from the checkpoint, .* {saved}'):
            small_run(tmp_path, '--init_from=resume', flag)


def test_resume_with_other_options(reference_run, tmp_path, capfd):
    """The optimizer's options are the command line's; --recompute changes no number."""
    small_run(tmp_path, '--max_iters=6')
    path, records = tmp_path / 'ckpt.pt', reference_run[1]['records']
    half, best = torch.load(path), ('--always_save_checkpoint=False', '--max_iters=10')

    def resumed(*argv, **changes):
        torch.save({**half, **changes}, path)
        return small_run(tmp_path, '--init_from=resume', *argv)
    for flag, changes in (('--weight_decay=3', True), ('--beta1=0.1', True),
                          ('--sync_every=3', False), ('--recompute', False)):
        val_loss = resumed('--max_iters=12', flag)['val_loss']
        assert (val_loss != pytest.approx(records[12]['val_loss'], rel=1e-6)) == changes, flag
    other = resumed(*best, '--batch_size=2')['records']
    assert [r['tokens'] for r in other[:-1]] == [512 * n for n in (8, 10, 12, 14)]
    # as if the warm start were over only now, the best loss were 0, and one flag were newer
    config = {name: value for name, value in half['config'].items() if name != 'prompt'}
    model = {**half['model'], '_extra_state': 'local'}
    changes = dict(model=model, config=config, best_val_loss=0.0)
    evaluated = resumed('--eval_only', **changes)['val_loss']
    assert "no --prompt, which is newer: it is 'def '" in capfd.readouterr().out
    started = resumed(*best, **changes)['records'][0]['val_loss']
    assert evaluated == started != records[6]['val_loss']
    assert train.load_checkpoint(path)['iter_num'] == 6  # none is better than 0


def end_at(rank, victim, function, mark, call, how):
    """`victim` ends in the n-th call of a function of Ring with mark: by signal, or exit code 7."""
    original, n_calls = getattr(Ring, function), itertools.count(1)

    def ending(*args):
        if mark in args and next(n_calls) == call:
            print('ends', flush=True)  # the last it says: when, its file tells
            os._exit(7) if how == 'exit' else os.kill(os.getpid(), how)
        return original(*args)
    if rank == victim:
        setattr(Ring, function, ending)


@pytest.mark.parametrize('where, argv, victim, function, mark, call, how', (
    ('forward exchange', (), 2, 'exchange', 'fwd', 40, 'exit'),
    ('backward exchange', (), 1, 'exchange', 'bwd', 41, signal.SIGKILL),
    ('the average of gradients or weights', ['--sync_every=2'], 0, 'reduce_over_world',
     'the average of gradients or weights', 3, signal.SIGSTOP)))
def test_a_dead_peer_ends_all(tmp_path, where, argv, victim, function, mark, call, how):
    """The others say whom they waited for, and in what."""
    argv = *SMALL, '--timeout_s=5', '--block_size=96', '--n_chunks=6', '--eval_interval=3', *argv
    kill = end_at, victim, function, mark, call, how
    codes, printed = run_ranks(3, tmp_path, *argv, sabotage=kill, victim=victim)
    spoke = [(tmp_path / f'{rank}.txt').stat().st_mtime for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        sentence = f'rank {rank} waited for .* in .*{where} and gave up: .*$'
        assert codes[rank] == 1 and re.search(sentence, printed[rank]), (rank, codes, printed)
        assert spoke[rank] - spoke[victim] < 5 + 15, (rank, printed)
    assert codes[victim] == (7 if how == 'exit' else -signal.SIGKILL), printed
    with pytest.raises(RuntimeError, match='^shape$'), waiting('rank 1', 'the exchange'):
        raise RuntimeError('shape')  # what is wrong on this rank keeps its own name


def slow_disk(rank):
    """Takes longer for a first checkpoint than a silent peer is waited for."""
    def slowly(*args, save=torch.save, delays=iter([7])):
        time.sleep(next(delays, 0))
        save(*args)
    torch.save = slowly


@pytest.mark.parametrize('how, argv', (
    (signal.SIGKILL, '--eval_interval=3'), (signal.SIGKILL, '--eval_interval=4 --sync_every=4'),
    (signal.SIGTERM, '--eval_interval=9 --always_save_checkpoint=False'),
    (signal.SIGINT, '--eval_interval=9 --sync_every=1000')))
def test_resume_after_a_kill(tmp_path, how, argv):
    """The losses are those of a whole run, to the last bit but with --sync_every."""
    argv = [*SMALL, '--timeout_s=5', '--wire_dtype=int8', '--init_from=auto', *argv.split()]
    whole, killed, dies = tmp_path / 'whole', tmp_path / 'killed', how == signal.SIGKILL
    assert run_ranks(2, whole, *argv, sabotage=(slow_disk,) if dies else None)[0] == [0, 0]
    kill = end_at, 1, 'exchange', 'bwd', 44 if dies else 20, how
    codes, printed = run_ranks(2, killed, *argv, sabotage=kill)
    assert codes == [1, -how] if dies else set(codes) == {128 + how, 128 + signal.SIGTERM}, printed
    last, n = max(losses(killed)), train.load_checkpoint(killed / 'ckpt.pt')['iter_num']
    assert last < 11 and (n in (6, 8) if dies else n == last + 1)
    if not dies:
        assert f'at iteration {n}; --init_from=resume goes on' in printed[0]
        assert read_log(killed)[-1] == {'iter': n}  # no val_loss
    assert run_ranks(2, killed, *argv)[0] == [0, 0]
    again, expected = losses(killed), losses(whole)
    assert len(expected) == 12 and (again == expected or '--sync_every' in ' '.join(argv))
    assert list(again.values()) == pytest.approx(list(expected.values()), rel=0.01)


def test_torchrun_restarts_from_the_last_checkpoint(tmp_path):
    """The script of this file, as torchrun runs it, is killed once, see its last lines."""
    torchrun = 'torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=1'.split()
    command = [sys.executable, '-m', *torchrun, __file__, *SMALL, '--init_from=auto']
    done = subprocess.run([*command, f'--out_dir={tmp_path}'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r['iter'] for r in read_log(tmp_path)] == list(range(13))
    assert [r['iter'] for r in read_log(tmp_path, configs=True)] == [0, 6]  # it did die


def lose_losses(rank, iterations):
    """Rank 1's loss is not finite in some iterations."""
    change_send = train.change_send

    def changing(c, model, batches, world, it):
        loss_of, n_calls = change_send(c, model, batches, world, it), itertools.count()

        def spoiled(*batch):
            lost = it + next(n_calls) // world.n_micro in iterations
            return math.nan * loss_of(*batch) if lost else loss_of(*batch)
        return spoiled
    if rank == 1:
        train.change_send = changing


@pytest.mark.parametrize('alone, iterations', (
    (False, (4, 5)), (True, (0, 1)), (True, (2, 3)), (True, range(12))))
def test_steps_that_are_not_finite_are_skipped(tmp_path, alone, iterations):
    """By all ranks, with --sync_every by one alone; and can be saved. Ten in a row are too many."""
    argv = *SMALL, '--eval_interval=2', *(['--sync_every=2', '--cp=1'] if alone else ())
    codes, printed = run_ranks(2, tmp_path, *argv, sabotage=(lose_losses, iterations))
    n_skipped = [text.count('the gradient is not finite, step skipped') for text in printed]
    if len(iterations) == 12:
        assert codes[1] == 1 and codes[0] in (0, 1) and 'Traceback' not in printed[1], printed
        assert 'rank 1: no finite gradient in 10 steps' in printed[1]
        return
    assert codes == [0, 0] and n_skipped == [0 if alone else 2, 2], printed
    states = train.load_checkpoint(tmp_path / 'ckpt.pt')['optimizer']['state']
    steps = {s['step'].item() for s in states.values()}  # means, of codecs and of the rest
    assert steps == ({9 - 0.5 * (3 in iterations), 11} if alone else {7, 10})
    lost = [r['loss'] is None for r in read_log(tmp_path)[:12]]  # no NaN
    assert lost == [not alone and it in iterations for it in range(12)]
    assert alone or [r['skipped'] for r in read_log(tmp_path)[3:7]] == [0, 1, 2, 2]


def differ(rank, flag, checkpoint):
    parse = train.parse_config
    if rank == 1:
        train.parse_config = lambda argv: (parse([*argv, flag])[0], checkpoint)


@pytest.mark.parametrize('flag, checkpoint, message', (
    ('--data=needle', None, r'data checksums \[\d+, \d+\], and rank 0 has'),
    ('--cp=2', {**train.STATE, 'iter_num': 20}, "checkpoint {'iter_num': 20, .*, and rank 0 has N"),
    ('--seed=2', None, '--seed 2, and rank 0 has 1337: they must be the same')))
def test_ranks_that_disagree_are_named(tmp_path, flag, checkpoint, message):
    codes, printed = run_ranks(2, tmp_path, *SMALL, '--cp=2', sabotage=(differ, flag, checkpoint))
    assert codes == [1, 1] and re.search('rank 1 has ' + message, printed[0]), printed
    assert not (tmp_path / 'log.jsonl').exists()


def test_no_way_to_the_others(monkeypatch):
    for setting in 'WORLD_SIZE=2 RANK=1 MASTER_ADDR=10.9.0.1 MASTER_PORT=1'.split():
        monkeypatch.setenv(*setting.split('='))
    c, _ = train.parse_config(['--device=cpu', '--timeout_s=1'])
    with pytest.raises(ValueError, match=r'rank 1 does not reach the others \(.*10.9.0.1'):
        train.World(c).join(c, {})


@contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes. (Python ignores the signal: writing more fails.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_there_is_always_a_whole_checkpoint(tmp_path, capfd, monkeypatch):
    """The old one until the new one takes its place. A full disk is said, and the run goes on."""
    small_run(tmp_path, '--max_iters=6')
    path, log, whole = tmp_path / 'ckpt.pt', tmp_path / 'log.jsonl', []
    before, replace = (path.read_bytes(), log.read_bytes()), os.replace

    def replacing(source, target):
        if target == path:
            whole.append([train.load_checkpoint(f)['iter_num'] for f in (source, target)])
        replace(source, target)
    with full_disk(1000), pytest.raises(SystemExit, match='a file cannot be .*too large'):
        small_run(tmp_path, '--init_from=resume')
    assert (path.read_bytes(), log.read_bytes()) == before
    no_validation = patch.object(train, 'validate', return_value={'val_loss': math.nan})
    for fault in (full_disk(len(before[1]) + 1000), no_validation):  # soon the log is too long
        with fault, pytest.raises(SystemExit, match='last checkpoint was not written'):
            small_run(tmp_path, '--init_from=resume')
        assert path.read_bytes() == before[0] and not list(tmp_path.glob('*.tmp'))
    printed = capfd.readouterr().err
    assert 'log.jsonl (File too large)' in printed
    assert re.search('could not write .*ckpt.pt .*; the checkpoint before it, .*, is un', printed)
    monkeypatch.setattr(os, 'replace', replacing)
    (tmp_path / 'ckpt.tmp').touch()  # of a run that was killed
    small_run(tmp_path, '--init_from=resume')
    assert whole == [[12, 6]]


def test_bad_checkpoints_are_refused(reference_run, tmp_path):
    whole, path = (reference_run[0] / 'ckpt.pt').read_bytes(), tmp_path / 'ckpt.pt'
    checkpoint = torch.load(reference_run[0] / 'ckpt.pt', weights_only=True)
    damaged = 'is damaged, or no checkpoint'
    for message, content in (
            (damaged, whole[:len(whole) // 2]), (damaged, b''), (damaged, torch.ones(3)),
            (damaged, Path('code that must not run')), (damaged, {'model': {}}),
            ('was saved with --a, --b, which this version .*does not have',
             {**checkpoint, 'config': {**checkpoint['config'], 'b': 1, 'a': 2}})):
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(SystemExit, match='ckpt.pt ' + message):
            small_run(tmp_path, '--init_from=auto')


if __name__ == '__main__':  # one rank of a run that torchrun starts twice
    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        end_at(int(os.environ['RANK']), 1, 'exchange', 'bwd', 44, signal.SIGKILL)
    train.main(sys.argv[1:])
