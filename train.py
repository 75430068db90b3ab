"""
Train a GPT on long sequences split over several workers, with compressed ring attention.

    python train.py                                               # one process
    torchrun --standalone --nproc_per_node=2 train.py             # two, on CPUs or GPUs
    torchrun --standalone --nproc_per_node=2 train.py --send=full # the same, uncompressed
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=4 --master_addr=HOST --master_port=29500 \
        train.py --preset=124m

`python train.py --help` lists every flag. Read next: mos_cp.py (the model), ring.py (the wire).
"""
import argparse
import bisect
import difflib
import glob
import inspect
import json
import math
import os
import re
import socket
import sys
import sysconfig
import textwrap
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import kernels
from mos_cp import CHOICES, GPT, GPTConfig, Loss, check, graphed, principal_directions
from ring import Link, PeerError, Rehearsal, Ring, average, waiting, zigzag

# -----------------------------------------------------------------------------
# Configuration. The fields of RunConfig and of GPTConfig (mos_cp.py) are the flags: name, type,
# default, and in the comment what --help says.


@dataclass
class RunConfig:
    """The run: data, schedule, optimizer, processes."""
    preset: str = 'tiny'  # sizes and schedule: tiny, needle, 124m or 800m; single flags override it
    method: str = 'ours'  # ours (the defaults), or paper: every option as in the paper
    data: str = 'stdlib'  # stdlib (Python's source), a text file (bytes), uint16 .bin, glob, needle
    val_data: str = ''  # validation data; empty: a tenth of --data
    out_dir: str = 'out'  # where ckpt.pt and log.jsonl go
    init_from: str = 'scratch'  # scratch, resume (out_dir/ckpt.pt), or auto: if it is there
    log_interval: int = 10  # iterations between log lines
    eval_interval: int = 125  # iterations between validations with checkpoints (at the next sync)
    eval_iters: int = 8  # batches per validation
    eval_only: bool = False  # validate once and stop
    always_save_checkpoint: bool = True  # False: only when the validation loss is the best so far
    prompt: str = 'def '  # text to continue at the end of the run (byte-level data only)
    sample_tokens: int = 200  # length of that continuation; 0: none
    warm_start: int = 50  # iterations before the codec starts, bases then in principal directions
    warm_send: str = 'local'  # what travels in these: local (nothing), or full (uncompressed)
    warm_basis: str = 'activations'  # principal directions of activations, or weights (the paper)
    unplug_at: int = 0  # iteration from which everything is sent uncompressed; 0: never
    batch_size: int = 4  # sequences per micro-step
    gradient_accumulation_steps: int = 1  # micro-steps per iteration, shared out over dp
    max_iters: int = 250  # iterations
    learning_rate: float = 2e-3  # peak learning rate of AdamW
    warmup_iters: int = 20  # iterations of linear warm-up
    lr_decay_iters: int = 0  # iteration at which the cosine decay ends; 0: max_iters
    min_lr: float = 2e-4  # learning rate at the end of the decay
    basis_lr: float = 0.3  # learning rate of the bases, as a fraction of the others'
    weight_decay: float = 0.1  # weight decay of the matrices
    beta1: float = 0.9  # AdamW's beta1
    beta2: float = 0.95  # AdamW's beta2
    grad_clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    seed: int = 1337  # of weights, bases, data order and sampling
    cp: int = 0  # ranks that share one sequence; 0: all. The rest is data parallel
    sync_every: int = 1  # 1: average gradients every iteration; c: weights every c (local AdamW)
    device: str = 'auto'  # auto, cpu or cuda; auto: cuda if every process can have a GPU
    dtype: str = 'auto'  # auto (bfloat16 on cuda, else float32), float32, bfloat16, float64
    rehearse: int = 0  # one process acts as one of so many ranks: its time, memory and bytes
    link_mbps: float = 0.0  # simulate links this slow, in megabits a second each way; 0: do not
    latency_ms: float = 0.0  # and this latency one way, in milliseconds
    plan: bool = False  # print what --cp ranks (0: 8) would send, and how fast; no training
    tflops: float = 370.0  # for --plan: TFLOP/s of a rank; 370: an H100, measured (800m preset)
    timeout_s: int = 60  # seconds to wait for a silent peer; 300 more with --compile


PRESETS = {
    'tiny': {},
    'needle': dict(data='needle', n_layer=2, n_embd=64, block_size=16, n_chunks=4, batch_size=64,
                   max_iters=300, warm_start=10, learning_rate=5e-3, eval_interval=150,
                   sample_tokens=0),
    '124m': dict(n_layer=12, n_head=12, n_embd=768, rank=128, block_size=16384, batch_size=1,
                 gradient_accumulation_steps=16, max_iters=10000, warm_start=500,
                 warmup_iters=500, learning_rate=6e-4, min_lr=6e-5, eval_interval=500),
    # the paper's shape; it does not give the width of its MLP
    '800m': dict(n_layer=8, n_head=8, n_embd=2048, n_ff=8192, rank=128, block_size=131072,
                 batch_size=1, max_iters=10000, warm_start=500, warmup_iters=500,
                 learning_rate=3e-4, min_lr=3e-5, weight_decay=0.01, eval_interval=500),
}

METHODS = {
    'ours': {},
    'paper': dict(basis='rotated', joint_kv=False, exact_local=False, generator='frobenius',
                  n_generators=1, theta_clip=0.5, wire_dtype='compute', compress_last=False,
                  warm_send='full', warm_basis='weights', basis_lr=1.0, sync_every=200),
}

CHOICES = {**CHOICES, 'preset': tuple(PRESETS), 'method': tuple(METHODS),
           'init_from': ('scratch', 'resume', 'auto'), 'warm_send': ('local', 'full'),
           'warm_basis': ('activations', 'weights'), 'device': ('auto', 'cpu', 'cuda'),
           'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

AT_LEAST_1 = ('log_interval', 'eval_interval', 'eval_iters', 'batch_size',
              'gradient_accumulation_steps', 'sync_every', 'timeout_s')  # others: at least 0

MODEL_FLAGS = [f.name for f in fields(GPTConfig)]
# never taken from the checkpoint: given or default, they are this run's own
HERE_FLAGS = ('init_from', 'out_dir', 'eval_only', 'device', 'cp', 'compile', 'recompute',
              'timeout_s', 'link_mbps', 'latency_ms')

PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # dense bf16, datasheets, for the MFU
STATE = ('iter_num', 'best_val_loss', 'seconds')  # of a checkpoint, beside model and optimizer
MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which a run stops


def fail(message):
    """End the run with one sentence, said once a machine, as its ranks find the same fault."""
    if int(os.environ.get('LOCAL_RANK', 0)) > 0:
        time.sleep(2)  # torchrun stops all ranks as soon as one exits: let the first speak
        sys.exit(1)
    sys.exit(f'train.py: {message}')


def parse_bool(text):
    if text.lower() not in ('true', 'false', '1', '0'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return text.lower() in ('true', '1')


def parse_flags(argv):
    """--key=value or --key value -> (what was given, all defaults), dicts. Unknown ones exit."""
    parser = argparse.ArgumentParser(
        prog='train.py', usage='train.py [--flag=value ...]', allow_abbrev=False,
        argument_default=argparse.SUPPRESS, description=__doc__.strip().split('\n')[0])
    parser.error, defaults = fail, {}
    for config in (RunConfig, GPTConfig):
        group = parser.add_argument_group(config.__doc__.split('.')[0])
        source = inspect.getsource(config)
        meaning = dict(re.findall(r'^    (\w+): .*?  # (.*)$', source, re.MULTILINE))
        for f in fields(config):
            boolean = dict(type=parse_bool, nargs='?', const=True, metavar='BOOL')
            value = dict(type=f.type, choices=CHOICES.get(f.name), metavar=f.type.__name__.upper())
            group.add_argument('--' + f.name, **(boolean if f.type is bool else value),
                               help=f'{meaning[f.name]} [{f.default}]'.replace('%', '%%'))
            defaults[f.name] = f.default
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split('=')[0]
        near = difflib.get_close_matches(key.lstrip('-'), defaults, n=1, cutoff=0)
        fail(f'unknown argument {key}; the nearest flag is --{near[0]}')
    return vars(given), defaults


def parse_config(argv):
    """
    -> (the configuration, a Namespace; the checkpoint to resume from, or None). Flags given win
    over the checkpoint's configuration, that over --method, that over --preset. Raises ValueError.
    """
    given, defaults = parse_flags(argv)
    method, checkpoint = given.get('method', 'ours'), None
    config = {**defaults, **PRESETS[given.get('preset', 'tiny')], **METHODS[method], **given}
    if method == 'paper' and 'rank' not in given:
        config['rank'] = paper_rank(config)
    path = Path(config['out_dir']) / 'ckpt.pt'
    if config['init_from'] == 'resume' or config['init_from'] == 'auto' and path.exists():
        checkpoint = load_checkpoint(path)
        saved = checkpoint['config']
        if odd := set(saved) ^ set(config):
            raise ValueError(f'{path} is of another version of this code, which differs in '
                             f'--{min(odd)}: change --init_from or --out_dir')
        for name in (*MODEL_FLAGS, 'preset', 'method'):
            if name not in HERE_FLAGS and given.get(name, saved[name]) != saved[name]:
                raise ValueError(f'--{name}={given[name]} differs from the checkpoint, which has '
                                 f'{saved[name]}')
        config = {**config, **{k: v for k, v in saved.items() if k not in HERE_FLAGS}, **given}
        n, over, now = checkpoint['iter_num'], saved['warm_start'], config['warm_start']
        check(not now < n < over, f"warm_start ({now}) must be at least the checkpoint's iteration "
              f'({n}), whose warm start (of {over}) is not over', 'warm_start')
    c = argparse.Namespace(**config)
    check_values(c)
    return c, checkpoint


def paper_rank(config):
    """The paper's 2 % of the keys' width and 5 % of the values'; 143 at width 2048."""
    n_kv_head = config['n_kv_head'] or config['n_head']
    return max(2, round(0.07 * config['n_embd'] * n_kv_head / config['n_head']))


def model_config(c):
    vocab_size = c.vocab_size or (50304 if c.data.endswith('.bin') else 256)
    if c.data == 'needle':
        vocab_size = c.block_size // 2 * (N_VALUES + 1)
    sizes = {name: getattr(c, name) for name in MODEL_FLAGS}
    return GPTConfig(**{**sizes, 'vocab_size': vocab_size})


def check_values(c):
    """Raises ValueError on impossible values, before any data is read."""
    for f in fields(RunConfig):
        lowest, value = int(f.name in AT_LEAST_1), getattr(c, f.name)
        check(f.type is str or value >= lowest, f'{f.name} ({value}) must be at least {lowest}',
              f.name)
    model_config(c)
    check(c.beta1 < 1 and c.beta2 < 1, f'beta1 ({c.beta1}) and beta2 ({c.beta2}) must be below 1',
          'beta1', 'beta2')
    check(c.data != 'needle' or c.n_chunks % 2 == 0,
          f'n_chunks ({c.n_chunks}) must be a multiple of 2 with --data=needle', 'n_chunks')
    check(c.rehearse != 1, 'rehearse (1) must be 0 or at least 2', 'rehearse')
    check(not c.rehearse or c.cp in (0, c.rehearse),
          f'cp ({c.cp}) must be 0 or rehearse ({c.rehearse})', 'cp', 'rehearse')
    check(c.send == 'local' or not 0 < c.max_iters <= c.warm_start, f'warm_start ({c.warm_start}) '
          f'must be below max_iters ({c.max_iters}), or it never ends', 'warm_start', 'max_iters')
    check(not c.unplug_at or c.warm_start < c.unplug_at < c.max_iters, f'unplug_at ({c.unplug_at}) '
          f'must be between warm_start ({c.warm_start}) and max_iters ({c.max_iters})', 'unplug_at')


# -----------------------------------------------------------------------------
# Data: every source becomes a list of one-dimensional arrays of tokens

def stdlib_source():
    """Python's standard library as bytes -> (training part, validation part: every tenth file)."""
    root, files = sysconfig.get_path('stdlib'), []
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - skip
        files += [Path(folder, name) for name in names if name.endswith('.py')]
    texts = [path.read_bytes() for path in sorted(files)]
    parts = [b'\n'.join(t for i, t in enumerate(texts) if (i % 10 == 9) == val) for val in (0, 1)]
    return [[np.frombuffer(part, dtype=np.uint8)] for part in parts]


def read_tokens(path):
    """
    One file as an array of tokens: .bin with the header of the modded-nanogpt shards (256 int32:
    magic 20240520, version 1, number of tokens) or without (nanoGPT), both uint16; anything else as
    bytes. Raises ValueError if a .bin is not what its size or header says.
    """
    path, size = Path(path), os.path.getsize(path)
    check(size, f'{path} is empty', 'data', 'val_data')
    if path.suffix != '.bin':
        return np.memmap(path, dtype=np.uint8, mode='r')
    if size % 2:
        raise ValueError(f'{path} has an odd number of bytes ({size}): it holds no uint16 tokens')
    header = np.fromfile(path, dtype=np.int32, count=3).tolist()
    if len(header) < 3 or header[0] != 20240520:
        return np.memmap(path, dtype=np.uint16, mode='r')
    if header[1] != 1 or header[2] < 1 or size != 1024 + 2 * header[2]:
        raise ValueError(f'{path} has header version {header[1]} and {header[2]} tokens, but must '
                         f'have 1 and, by its size, {max(0, size - 1024) // 2} tokens')
    return np.memmap(path, dtype=np.uint16, mode='r', offset=1024)


def load_data(data, val_data, block_size):
    """--data and --val_data -> (training shards, validation shards). Raises ValueError."""
    def read_all(pattern):
        pattern = os.path.expanduser(pattern)
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        check(paths, f'no file matches {pattern!r}', 'data', 'val_data')
        return [read_tokens(p) for p in paths]
    train, val = stdlib_source() if data == 'stdlib' else (read_all(data), None)
    if val_data:
        val = read_all(val_data)
    elif val is None:
        train, val = [s[:len(s) * 9 // 10] for s in train], [s[len(s) * 9 // 10:] for s in train]
    for what, shards in (('training', train), ('validation', val)):
        longest = max(map(len, shards))
        check(block_size < longest, f'block_size ({block_size}) must be below the length of the '
              f'{what} data ({longest} tokens in the longest part)', 'block_size', 'data')
    return train, val


def fingerprint(shards):
    """A number that differs if sizes do, or any of a thousand tokens: not all data is read."""
    crc = 0
    for s in shards:
        some = np.ascontiguousarray(s[::max(1, len(s) * len(shards) // 1000)])
        crc = zlib.crc32(some, zlib.crc32(f'{len(s)} {s.dtype}'.encode(), crc))
    return crc


def get_batch(shards, batch_size, block_size, vocab_size, rng):
    """
    Random windows, uniform over all starting points -> idx, targets (batch_size, block_size) int64.
    Raises ValueError if they have a token outside the vocabulary.
    """
    before = np.cumsum([0, *(max(0, len(s) - block_size) for s in shards)])  # starting points
    rows = []
    for position in rng.integers(before[-1], size=batch_size):
        shard = np.searchsorted(before, position, side='right') - 1
        rows.append(shards[shard][position - before[shard]:][:block_size + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows))
    check(rows.max() < vocab_size,
          f'the data has token {rows.max()}, outside vocab_size ({vocab_size})', 'vocab_size')
    return rows[:, :-1], rows[:, 1:]


N_VALUES = 8  # of a needle: chance is a loss of log(8) = 2.08


def needle_batch(batch_size, block_size, n_chunks, rng):
    """
    --data=needle: how far back can the model look things up? -> idx, targets
    (batch_size, block_size) int64.

    The first half of a sequence states facts, each a token of its own that says key and value; no
    key comes twice. The second half asks for each key once, and the target is its value; there are
    no other targets. A chunk of the second half asks, in another order, for what one chunk of the
    first half states; with two ranks or more that lies on another rank, and from its own chunk
    there is nothing to be learned.
    """
    n_keys, shape = block_size // 2, (batch_size, n_chunks // 2, block_size // n_chunks)
    keys = rng.permuted(np.broadcast_to(np.arange(n_keys), (batch_size, n_keys)), axis=1)
    keys, values = keys.reshape(shape), rng.integers(N_VALUES, size=shape)
    order = rng.permuted(np.broadcast_to(np.arange(shape[2]), shape), axis=2)
    # zigzag puts chunk i and its mirror image on one rank: ask a quarter of the sequence further on
    asked, answers = (np.roll(np.take_along_axis(t, order, axis=2)[:, ::-1], n_chunks // 4, axis=1)
                      for t in (keys, values))
    x = np.concatenate((keys * N_VALUES + values, n_keys * N_VALUES + asked), axis=1)
    y = np.concatenate((np.full(shape, -1), answers), axis=1)
    return tuple(torch.from_numpy(t.reshape(batch_size, block_size)) for t in (x, y))


class Batches:
    """This rank's part of every batch. A batch is a function of numbers: nothing to restore."""

    def __init__(self, c, world, vocab_size, train, val):
        self.c, self.world, self.vocab_size, self.train, self.val = c, world, vocab_size, train, val

    def get(self, shards, *seed):
        """-> idx, targets (B, T), and over a ring the number of targets in whole sequences."""
        c, ring, device = self.c, self.world.ring, self.world.device
        rng = np.random.default_rng(seed)
        try:
            x, y = (get_batch(shards, c.batch_size, c.block_size, self.vocab_size, rng) if shards
                    else needle_batch(c.batch_size, c.block_size, c.n_chunks, rng))
        except ValueError as e:  # perhaps of this rank alone
            sys.exit(f'train.py: rank {self.world.rank}: {e}')
        n_targets = (int((y != -1).sum()),) if ring.world_size > 1 else ()
        x, y = (ring.shard(t, c.block_size // c.n_chunks) for t in (x, y))
        if device.type == 'cuda':
            x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
        return x, y, *n_targets

    def training(self, iter_num, micro):
        world = self.world
        return self.get(self.train, 0, self.c.seed, iter_num, micro * world.dp + world.dp_rank)

    def validation(self):
        return (self.get(self.val, 1, k)
                for k in range(self.world.dp_rank, self.c.eval_iters, self.world.dp))


# -----------------------------------------------------------------------------
# Sizing a run before renting machines

ENOUGH = 0.95  # of the ring's speed without a slow link


class Estimate:
    """What a token of the sequence costs one of P ranks: bytes it receives, seconds it computes."""

    def __init__(self, c, P, ulysses=False, **options):
        config = model_config(argparse.Namespace(**{**vars(c), **options}))
        dtype = getattr(torch, 'bfloat16' if c.dtype == 'auto' else c.dtype)
        with torch.device('meta'):
            model = GPT(config)
            shape = 1, config.block_size // P, 2, config.n_kv_head, config.head_dim
            kv = torch.empty(*shape, dtype=dtype)
            layers = [b.attn.codec.wire_bytes(kv) for b in model.h if b.attn.codec]
        self.fwd, self.bwd = (sum(n) * (P - 1) / config.block_size for n in zip((0, 0), *layers))
        self.P, self.hides = P, not ulysses
        if ulysses:  # queries, keys, values and outputs change hands, and so do their gradients
            n_numbers = 2 * config.n_embd + 2 * config.n_kv_head * config.head_dim
            self.fwd = self.bwd = n_numbers * dtype.itemsize * config.n_layer * (P - 1) / P**2
        n_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.sync = 2 * (P - 1) / P * n_bytes / c.sync_every  # an iteration, not a token
        self.rest_s = 6 * model.get_num_params() / P / c.tflops / 1e12
        whole = model.flops_per_token() / P / c.tflops / 1e12
        self.attention_s = (whole - self.rest_s) / c.block_size  # for each token of context

    def seconds(self, n, mbps):
        """
        Of a sequence of n tokens, without the sync. A layer's exchange can hide under its attention
        alone, of which two sevenths are forward (4 of 14 T^2 H hd), and under all but one block of
        that: the last to arrive, or the first to have a gradient. Ulysses' attention waits.
        """
        seconds = self.rest_s
        for n_bytes, part in ((self.fwd, 2 / 7), (self.bwd, 5 / 7)):
            wire, attention = n_bytes * 8e-6 / mbps, part * self.attention_s * n
            seconds += max(attention, wire + attention / self.P) if self.hides else attention + wire
        return n * seconds

    def speed(self, n, mbps):
        """As a share of the speed without a slow link. It grows with n."""
        return self.seconds(n, math.inf) / self.seconds(n, mbps)

    def hidden_from(self, mbps):
        """The context from which the speed is ENOUGH."""
        return bisect.bisect_left(range(1, 10**9), ENOUGH, key=lambda n: self.speed(n, mbps)) + 1


def plan(c):
    """
    What one rank of a ring receives in an iteration, how long that takes and which speed it allows,
    for what a user would choose between. All computed. Raises ValueError.
    """
    P, n, links = c.rehearse or c.cp or 8, c.block_size, {'300 Mbit/s': 300, '1 Gbit/s': 1000}
    check(P > 1, f'--plan needs cp ({P}) of at least 2: one rank sends nothing', 'cp')
    check(c.tflops > 0, f'--plan needs tflops ({c.tflops:g}) above 0', 'tflops')
    zigzag(c.n_chunks, P, 0)
    full = dict(send='full', wire_dtype='compute', grad_wire_dtype='same', compress_last=True)
    quarter, n_kv_head = c.n_head // 4 if c.n_head % 4 == 0 else 1, c.n_kv_head or c.n_head
    rows = {'`--send=full`': full}
    if c.n_head % P == n_kv_head % P == 0:  # each rank has some of the heads
        rows['Ulysses'] = dict(full, ulysses=True)
    if quarter < n_kv_head:
        rows[f'`--send=full --n_kv_head={quarter}`'] = dict(full, n_kv_head=quarter)
    rows['`--send=topk`'] = dict(full, send='topk')
    rows['`--send=full --wire_dtype=int4`'] = dict(full, wire_dtype='int4')
    if c.n_layer > 1:  # the paper leaves out the last layer
        rows['`--method=paper`'] = dict(full, **METHODS['paper'], send='subspace',
                                        rank=paper_rank(vars(c)), rank_k=0)
    rows['**this configuration**'] = {}
    n_sequences, lines = c.batch_size * c.gradient_accumulation_steps, []
    for name, options in rows.items():
        e = Estimate(c, P, **options)
        ring = n_sequences * n * (e.fwd + e.bwd)
        cells = [f'{ring / 1e6:,.1f}', f'{e.sync / 1e6:,.1f}']
        for mbps in links.values():
            speed = n_sequences * n / (n_sequences * e.seconds(n, mbps) + e.sync * 8e-6 / mbps)
            cells.append(f'{ring * 8e-6 / mbps:,.2f} + {e.sync * 8e-6 / mbps:,.2f} s')
            cells += [f'{speed:,.0f}', f'{e.hidden_from(mbps) / 1000:,.0f}K']
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    about = (
        f'{P} ranks, {n_sequences * n:,} tokens an iteration, {c.tflops:g} TFLOP/s a rank '
        f'(--tflops; 370: an H100): {n_sequences * e.seconds(n, math.inf):.3g} s of compute; bf16 '
        'unless --dtype says otherwise. All computed, latency not counted. MB that a rank receives '
        'in an iteration over the ring, and in the sync of weights or gradients; the seconds of '
        "both; tokens/s, if a layer's exchange hides under its attention and the sync under "
        f'nothing; the context from which the ring alone has {ENOUGH:.0%} of its speed without a '
        'slow link.')
    heads = ' | '.join(f'{link} | tokens/s | {ENOUGH:.0%} from' for link in links)
    return '\n'.join((textwrap.fill(about, 100), '', f'| | ring, MB | sync, MB | {heads} |',
                      '|---' + '|---:' * 8 + '|', *lines))


# -----------------------------------------------------------------------------
# The processes

def address_of(name):
    try:
        return socket.gethostbyname(name)
    except OSError:
        return 'nothing'


class World:
    """
    This process among world_size = dp x cp ranks, of which n_processes are real (in a rehearsal
    one). The ranks of a ring are neighbours and see the same sequences. Until `join` nothing is
    sent.
    """

    def __init__(self, c):
        self.rank = int(os.environ.get('RANK', 0))
        self.n_processes = int(os.environ.get('WORLD_SIZE', 1))
        check(not c.rehearse or self.n_processes == 1, f'rehearse ({c.rehearse}) is for one '
              f'process, and there are {self.n_processes}', 'rehearse', 'nproc_per_node')
        self.world_size = c.rehearse or self.n_processes
        self.n_local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        self.master, self.cp = self.rank == 0, c.rehearse or c.cp or self.world_size
        check(self.world_size % self.cp == 0, f'world size ({self.world_size}) must be a multiple '
              f'of cp ({self.cp})', 'cp', 'nproc_per_node')
        self.dp, self.dp_rank = self.world_size // self.cp, self.rank // self.cp
        n = c.gradient_accumulation_steps
        check(n % self.dp == 0, f'gradient_accumulation_steps ({n}) must be a multiple of dp, '
              f'world size / cp ({self.dp})', 'gradient_accumulation_steps', 'cp')
        zigzag(c.n_chunks, self.cp, 0)
        self.device = self.pick_device(c.device)
        default = 'bfloat16' if self.device.type == 'cuda' else 'float32'
        self.dtype = getattr(torch, default if c.dtype == 'auto' else c.dtype)
        # no cache: a weight is used once in a forward pass, and a CUDA graph must not find one
        self.autocast = nullcontext() if self.dtype != torch.bfloat16 else torch.autocast(
            self.device.type, self.dtype, cache_enabled=False)
        # a graph writes gradients where the last ones are: they cannot be accumulated
        self.can_graph = self.device.type == 'cuda' and (
            self.world_size == c.gradient_accumulation_steps == 1)
        link, self.store = Link(c.link_mbps, c.latency_ms), None
        self.ring = Rehearsal(self.cp, link) if c.rehearse else Ring(link=link)

    def say(self, text):
        if self.master:
            tqdm.write(text)
            sys.stdout.flush()

    def pick_device(self, wanted):
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        said = f'{self.n_local} processes on this machine, {n_gpus} GPUs'
        check(wanted != 'cuda' or n_gpus >= self.n_local, f'--device=cuda needs a GPU per process '
              f'({said})', 'device', 'nproc_per_node')
        if 0 < n_gpus < self.n_local and wanted == 'auto':
            self.say(f'running on CPU: {said}')
        if n_gpus < self.n_local or wanted == 'cpu':
            return torch.device('cpu')
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)
        return device

    def join(self, c, facts):
        """
        Make the process groups. facts: {name: value} that must be the same on every rank. Raises
        ValueError if they are not, or if the others are not reached.
        """
        if self.n_processes == 1:
            return
        cuda, several_machines = self.device.type == 'cuda', self.n_local < self.world_size
        first, own = os.environ.get('MASTER_ADDR', ''), socket.gethostname()
        if several_machines and not cuda and 'GLOO_SOCKET_IFNAME' not in os.environ and (
                address_of(own).startswith('127.') and not address_of(first).startswith('127.')):
            raise ValueError(
                f'the others could not reach this machine: gloo would tell them {address_of(own)}, '
                f'the address of its name {own}. Set GLOO_SOCKET_IFNAME to the network interface '
                f'that reaches {first} (ip address lists them; for GPUs: NCCL_SOCKET_IFNAME)')
        timeout = timedelta(seconds=c.timeout_s + 300 * c.compile)  # others may still be compiling
        try:
            store, _, _ = next(dist.rendezvous('env://', timeout=timeout))
            # torchrun keeps the store, with what an earlier start has left in it, over restarts
            self.store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
            dist.init_process_group('nccl' if cuda else 'gloo', store=self.store, rank=self.rank,
                                    world_size=self.world_size, timeout=timeout,
                                    device_id=self.device if cuda else None)
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, facts)
            group, _ = dist.new_subgroups(self.cp, timeout=timeout)
        except RuntimeError as e:
            raise ValueError(
                f'rank {self.rank} does not reach the others ({str(e).splitlines()[0][:200]}): '
                f'has one stopped? Is {first} the first machine, its port open, and the network '
                'interface to use named in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME?') from e
        for other, theirs in enumerate(everyone):
            for name, value in theirs.items():
                if value != everyone[0][name]:
                    raise ValueError(f'rank {other} has {name} {value}, and rank 0 has '
                                     f'{everyone[0][name]}: they must be the same')
        self.ring = Ring(group, self.ring.link)


# -----------------------------------------------------------------------------
# Parts of a run

def learning_rate(it, c):
    """Linear warm-up, then cosine decay to min_lr (nanoGPT's schedule)."""
    end = c.lr_decay_iters or c.max_iters
    if it < c.warmup_iters:
        return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
    if it >= end:
        return c.min_lr
    ratio = (it - c.warmup_iters) / max(1, end - c.warmup_iters)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (c.learning_rate - c.min_lr)


def sends_at(it, c):
    """What GPT.set_send is told in iteration `it`: warm start, the codec, unplugged."""
    if it < c.warm_start:
        return c.warm_send
    return 'full' if c.unplug_at and it >= c.unplug_at else ''


def load_checkpoint(path):
    """A checkpoint as `save` left it, on the CPU. Raises ValueError if it is not one."""
    check(path.exists(), f'there is no {path} here to resume from', 'init_from', 'out_dir')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        return {k: checkpoint[k] for k in ('model', 'optimizer', 'config', *STATE)}
    except Exception as e:  # whatever a damaged or foreign file makes of it
        raise ValueError(f'{path} is damaged or not a checkpoint of this code '
                         f'({type(e).__name__}): change --init_from or --out_dir') from e


def load_optimizer(optimizer, state):
    """An optimizer's saved state, but not its options: those are this run's."""
    options = [{k: v for k, v in g.items() if k != 'params'} for g in optimizer.param_groups]
    # before loading: whether it is fused decides on which device its steps are counted
    groups = [{**saved, **own} for saved, own in zip(state['param_groups'], options)]
    optimizer.load_state_dict({**state, 'param_groups': groups})


def save_checkpoint(path, checkpoint):
    """
    Written beside the old one and renamed: there is a whole checkpoint at every moment. A full disk
    is said, and does not end the run.
    """
    temporary = path.with_suffix('.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch has its own words for a disk that is full
        temporary.unlink(missing_ok=True)
        print(f'train.py: could not write {path} ({str(e).splitlines()[0]}); the checkpoint before '
              'it is untouched', file=sys.stderr)


def build(c, world, checkpoint):
    """-> model and optimizer, the same on all ranks. Raises ValueError."""
    torch.manual_seed(c.seed)
    if world.dtype == torch.bfloat16:  # float32 is for comparing runs to the last digit
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = torch.float64 if world.dtype == torch.float64 else torch.float32
    model = GPT(model_config(c), world.ring).to(world.device, dtype)
    optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2),
                                           world.device.type, c.basis_lr)
    if checkpoint:
        try:
            model.load_state_dict(checkpoint['model'])
            load_optimizer(optimizer, checkpoint['optimizer'])
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise ValueError(
                f'{Path(c.out_dir) / "ckpt.pt"} does not fit the model that its own flags describe '
                f'({str(e).split(":")[0]}): change --init_from or --out_dir') from e
    if world.n_processes > 1:  # before the run proper: neither counted nor delayed
        with waiting('rank 0', 'the broadcast of the weights'):
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
    return model, optimizer


@torch.no_grad()
def validate(model, batches, world):
    """
    -> mean loss over fixed batches; that of each chunk of the sequence (None: no targets); share of
    targets that are the likeliest token (0 with recompute: no logits). Every rank takes part, a
    ring cannot have idle members.
    """
    n_chunks = model.config.n_chunks
    sums = torch.zeros(3, n_chunks, dtype=torch.float64, device=world.device)
    mine = zigzag(n_chunks, world.cp, world.ring.rank)
    for x, y, *_ in batches.validation():
        with world.autocast:
            logits, losses = model.losses(model.hidden(x), y)  # losses: (B, T / cp)
        right = torch.zeros_like(y) if logits is None else logits.argmax(-1) == y
        each = torch.stack((losses.double(), y != -1, right))
        sums[:, mine] += each.unflatten(2, (len(mine), -1)).sum(dim=(1, 3))
    total, count, n_right = world.ring.all_reduce(sums, 'validation').sum(dim=1).tolist()
    by_chunk = [loss / n if n else None for loss, n, _ in sums.T.tolist()]
    return total / count, by_chunk, n_right / count


@torch.no_grad()
def start_bases(c, model, batches, world, iter_num):
    """
    The end of the warm start: every basis begins in principal directions, of the weights or of this
    iteration's keys and values.
    """
    inputs = [None]  # the weights
    if c.warm_basis == 'activations':
        n = c.gradient_accumulation_steps // world.dp
        inputs = (batches.training(iter_num, micro)[0] for micro in range(n))
    with world.autocast:
        moments = [model.basis_moments(x) for x in inputs]
    moments = [sum(several) for several in zip(*moments)]
    average(moments, world.ring)
    # rank 0's for all, as an average: machines may differ in the last digit of an eigenvector. (In
    # a rehearsal, of one process, the average is over copies.)
    directions = [principal_directions(m, b.U0.shape[1]).to(b.U0.dtype) * world.n_processes
                  if world.master else torch.zeros_like(b.U0) for m, b in zip(moments, model.bases)]
    average(directions, world.ring)
    for basis, U0 in zip(model.bases, directions):
        basis.start(U0)
    width = 2 * model.config.n_kv_head * model.config.head_dim
    world.say(f'iter {iter_num}: the codec starts, {c.rank} of {width} numbers a token and layer'
              + ('' if c.compress_last else ' but the last'))


def take_step(c, optimizer, params, loss_of, batches, world, iter_num):
    """One iteration of AdamW -> loss (a tensor, of this rank), learning rate, gradient norm."""
    # for the stochastic rounding; a function of the seed too, and not the same on every rank
    seed = np.random.SeedSequence((c.seed, iter_num, world.rank)).generate_state(1)[0]
    torch.manual_seed(int(seed))
    lr, loss, n = learning_rate(iter_num, c), 0.0, c.gradient_accumulation_steps // world.dp
    for group in optimizer.param_groups:
        group['lr'] = lr * group['lr_scale']
    for micro in range(n):
        with world.autocast:
            micro_loss = loss_of(*batches.training(iter_num, micro)) / n
        micro_loss.backward()
        loss += micro_loss.detach()
    grads = [p.grad for p in params if p.grad is not None]
    if c.sync_every == 1:
        average(grads, world.ring)
    grad_norm = torch.nn.utils.get_total_norm(grads)
    if math.isfinite(grad_norm):  # else the step is left out, and the data moves on
        torch.nn.utils.clip_grads_with_norm_(params, c.grad_clip or math.inf, grad_norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, lr, grad_norm.item()


def save(c, model, optimizer, world, iter_num, best_val_loss, seconds):
    """A checkpoint of this moment: one model and one optimizer, the same on all ranks."""
    if c.sync_every > 1:  # the weights are averaged already, AdamW's moments are not
        average([t for state in optimizer.state.values() for name, t in state.items()
                 if name != 'step'], world.ring)
    if world.master:
        save_checkpoint(Path(c.out_dir) / 'ckpt.pt', {
            'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'config': vars(c),
            'model_args': vars(model.config),  # GPTConfig(**model_args) is the model, as in nanoGPT
            'iter_num': iter_num, 'best_val_loss': best_val_loss, 'seconds': seconds})
    if world.store:  # writing may take longer than a silent peer is waited for
        if world.master:
            world.store.set(f'checkpoint {iter_num}', '')
        with waiting('rank 0', 'saving a checkpoint'):
            world.store.wait([f'checkpoint {iter_num}'], timedelta(minutes=10))


class Log:
    """
    out_dir/log.jsonl, one record a line, written by rank 0: first, and after a resume once more,
    the configuration. `records` are those of this run.
    """

    def __init__(self, path, writes, keep_before):
        """keep_before: of a log that is there, records of iterations before this one stay."""
        self.path, self.writes, self.records = path, writes, []
        if writes:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line + '\n' for line in lines if self.is_before(line, keep_before)]
            path.with_suffix('.tmp').write_text(''.join(kept))
            os.replace(path.with_suffix('.tmp'), path)

    @staticmethod
    def is_before(line, iter_num):
        try:
            return json.loads(line)['iter'] < iter_num
        except (ValueError, KeyError, TypeError):  # a killed run may have left half a line
            return False

    def write(self, record):
        self.records.append(record)
        if self.writes:
            try:
                with open(self.path, 'a') as f:
                    f.write(json.dumps(record) + '\n')
            except OSError as e:  # a full disk does not end the run
                print(f'train.py: could not write {self.path} ({e.strerror})', file=sys.stderr)


def full_bytes(c, model, world):
    """What a rank would receive in an iteration uncompressed: KV; KV again, and its gradient."""
    d = model.config.n_kv_head * model.config.head_dim
    n_sequences = c.batch_size * c.gradient_accumulation_steps // world.dp
    n_tokens = n_sequences * c.block_size // world.cp * (world.cp - 1)
    return 3 * 2 * d * world.dtype.itemsize * c.n_layer * n_tokens


def wire_record(step, since_logged, full):
    """The bytes of a log line: of this iteration, and of syncs since the last line."""
    record = {k: step[k] for k in ('sent_fwd', 'received_fwd', 'sent_bwd', 'received_bwd')}
    record |= {k: since_logged[k] for k in ('sent_sync', 'received_sync')}
    received = step['received_fwd'] + step['received_bwd']
    return {**record, 'compression': 1 - received / full if full else None}


def log_line(record, dt, tokens_per_iter, model, world):
    """What is said of an iteration. dt: seconds that one took since the last line."""
    n = tokens_per_iter / world.world_size
    fwd, bwd = record['received_fwd'] / n, record['received_bwd'] / n
    wire = 'ring of one' if world.cp == 1 else 'nothing sent' if not fwd else (
        f'wire {fwd:.0f} fwd + {bwd:.0f} bwd B/token, compression {record["compression"]:.1%}')
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == 'cuda' else ''
    peak = world.world_size * next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), 0)
    n_sequences = tokens_per_iter / model.config.block_size
    mfu = f', mfu {model.estimate_mfu(n_sequences, dt, peak):.1%}' if peak else ''
    return (f'iter {record["iter"]}: loss {record["loss"]:.4f}, time {dt * 1000:.0f}ms, '
            f'{tokens_per_iter / dt:,.0f} tok/s, {wire}{mfu}')


def summarize(meter, full, world):
    """What a run came to. full: bytes that rank 0 would have received uncompressed."""
    if full:
        over_ring = (meter['received_fwd'] + meter['received_bwd']) / 1e6
        world.say(f'received by rank {world.ring.rank} over the ring: {over_ring:,.1f} MB, with '
                  f'--send=full --warm_start=0 it would be {full / 1e6:,.1f} MB; besides, to '
                  f'average gradients or weights: {meter["received_sync"] / 1e6:,.1f} MB')
    if world.device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated() / 2**30
        world.say(f'peak memory on rank {world.ring.rank}: {peak:.2f} GiB')


# -----------------------------------------------------------------------------
# The run

def prepare(c, checkpoint):
    """
    Reads data and looks for faults before the first byte is sent -> World, Batches, and the facts
    that all ranks must agree on. Raises ValueError or OSError.
    """
    world = World(c)
    facts = {f'--{k}': v for k, v in vars(c).items() if k not in ('out_dir', 'data', 'val_data')}
    facts.update(torch=torch.__version__, checkpoint='none' if checkpoint is None else (
        'iteration {}, best loss {:.4f}, {:.1f} s'.format(*(checkpoint[k] for k in STATE))))
    train, val = ([], []) if c.data == 'needle' else load_data(c.data, c.val_data, c.block_size)
    facts['training data with checksum'] = fingerprint(train)
    facts['validation data with checksum'] = fingerprint(val)
    if world.master and not c.rehearse:
        Path(c.out_dir).mkdir(parents=True, exist_ok=True)
        check(os.access(c.out_dir, os.W_OK), f'out_dir ({c.out_dir}) cannot be written', 'out_dir')
    if c.compile and world.device.type == 'cpu' and (why := kernels.cannot_compile()):
        raise ValueError('--compile needs a C++ compiler that PyTorch can use, for example g++, '
                         f'and has none ({why}): install one, or leave out --compile')
    return world, Batches(c, world, model_config(c).vocab_size, train, val), facts


def set_up(argv):
    """-> what `train` needs, or None after --plan. Exits with a sentence if something is wrong."""
    try:
        c, checkpoint = parse_config(argv)
        if c.plan:
            return print(plan(c))
        world, batches, facts = prepare(c, checkpoint)
        world.join(c, facts)
        model, optimizer = build(c, world, checkpoint)
    except ValueError as e:
        fail(e)
    except OSError as e:
        fail(f'{e.filename or e} cannot be read or made ({e.strerror}): change --data, --val_data '
             'or --out_dir')
    describe(c, model, world)
    state = [checkpoint[k] for k in STATE] if checkpoint else [0, math.inf, 0.0]
    if checkpoint:
        world.say(f'resumed from {c.out_dir}/ckpt.pt at iteration {state[0]} of {c.max_iters}'
                  + ('; to go on, raise --max_iters' if state[0] >= c.max_iters else ''))
    return c, model, optimizer, batches, world, *state


def main(argv=None):
    """One training run. Returns a dict: iter_num, loss, val_loss, the log's records, the model."""
    try:
        if not (run := set_up(argv)):
            return None
        result = train(*run)
    except PeerError as e:
        print(f'train.py: {e}', file=sys.stderr, flush=True)
        os._exit(1)  # taking down groups whose members are gone can hang
    if dist.is_initialized():
        dist.destroy_process_group()
    c, model, _, _, world, *_ = run
    if world.master and c.sample_tokens and not c.eval_only and not c.rehearse:
        sample(c, model, world)
    return result


def describe(c, model, world):
    preset = {**parse_flags([])[1], **PRESETS[c.preset]}
    changed = ', '.join(f'{k}={v}' for k, v in vars(c).items() if k != 'preset' and v != preset[k])
    world.say(textwrap.fill(f'preset {c.preset}' + (f' with {changed}' if changed else ''), 100,
                            break_on_hyphens=False))
    kernel = kernels.attention_backend(world.device.type, world.dtype, model.config.head_dim)
    n_tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
    role = 'as one of' if c.rehearse else '='
    world.say(f'{model.get_num_params() / 1e6:.2f}M parameters; {world.n_processes} process(es) '
              f'{role} dp {world.dp} x cp {world.cp} on {world.device.type}, {world.dtype}; '
              f'attention by {kernel}; {n_tokens:,} tokens per iteration')
    if c.rehearse:
        world.say(f'a rehearsal of rank {world.ring.rank} of {world.cp}: its time, memory and '
                  'bytes. The losses mean nothing; nothing is validated or saved')


def sample(c, model, world):
    """Continue --prompt."""
    if model.config.vocab_size != 256:
        return world.say('no sample: --prompt is bytes, and the vocabulary is not')
    prompt = torch.tensor([list(c.prompt.encode() or b'\n')], device=world.device)
    with world.autocast:
        text = model.generate(prompt, c.sample_tokens, temperature=0.8, top_k=50)[0]
    world.say('--- sample\n' + bytes(text.tolist()).decode(errors='replace'))


def train(c, model, optimizer, batches, world, iter_num, best_val_loss, seconds):
    """The loop. Returns what `main` does."""
    meter, params = world.ring.meter, [p for p in model.parameters() if p.requires_grad]
    first_iter, first_seconds, logged_at = iter_num, seconds, (iter_num, seconds)
    log = Log(Path(c.out_dir) / 'log.jsonl', world.master and not c.rehearse,
              math.inf if c.eval_only else iter_num)
    log.write({'iter': iter_num, 'config': vars(c)})
    tokens_per_iter = c.gradient_accumulation_steps * c.batch_size * c.block_size
    loss, val_loss, loss_of = math.nan, math.nan, None
    logged, n_skipped, in_a_row, full = Counter(), 0, 0, full_bytes(c, model, world)
    bar = tqdm(total=c.max_iters, initial=iter_num, disable=not world.master or None)  # no tty: off
    while True:
        # -- between steps: the sync of weights, the codec's life, validation, a checkpoint
        start, record = time.perf_counter(), {'iter': iter_num}
        done = iter_num >= c.max_iters or c.eval_only
        if c.sync_every > 1 and iter_num > first_iter and (iter_num % c.sync_every == 0 or done):
            average([p.detach() for p in params], world.ring)
        if iter_num == c.warm_start > 0 and model.bases:
            model.set_send(c.warm_send)
            start_bases(c, model, batches, world, iter_num)
        if loss_of is None or sends_at(iter_num, c) != sends_at(iter_num - 1, c):
            model.set_send(sends_at(iter_num, c))
            loss_of = Loss(model)
            if c.compile and world.can_graph:
                with world.autocast:
                    loss_of = graphed(model, *batches.training(iter_num, 0))
        # due since the last sync? Only at a sync do all ranks have the same weights
        due = iter_num // c.eval_interval > (iter_num - c.sync_every) // c.eval_interval
        if (done or due and iter_num % c.sync_every == 0) and not c.rehearse:
            paused, sent = time.perf_counter(), Counter(meter)  # validating and saving do not count
            val_loss, record['val_loss_by_chunk'], right = validate(model, batches, world)
            record['val_loss'] = val_loss
            meter.clear()
            meter.update(sent)
            world.say(f'iter {iter_num}: val loss {val_loss:.4f}' + (
                f', {right:.1%} right answers (chance: {1 / N_VALUES:.1%})' if c.data == 'needle'
                else ''))
            best, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
            if iter_num > first_iter and math.isfinite(val_loss) and (
                    best or c.always_save_checkpoint):
                save(c, model, optimizer, world, iter_num, best_val_loss, seconds)
            start += time.perf_counter() - paused
        if done:
            seconds += time.perf_counter() - start  # a last sync
            log.write(record)
            break

        # -- a step
        before = Counter(meter)
        loss, lr, grad_norm = take_step(c, optimizer, params, loss_of, batches, world, iter_num)
        in_a_row = 0 if math.isfinite(grad_norm) else in_a_row + 1
        if in_a_row:
            n_skipped += 1
            print(f'train.py: rank {world.rank}, iter {iter_num}: the gradient is not finite, step '
                  'skipped', file=sys.stderr, flush=True)
        if in_a_row == MAX_SKIPPED:
            fail(f'no finite gradient in {MAX_SKIPPED} steps up to iteration {iter_num}; the last '
                 'checkpoint is from before them: lower --learning_rate')
        iter_num += 1
        bar.update()
        logging = record['iter'] % c.log_interval == 0 or iter_num == c.max_iters
        if logging:
            loss = world.ring.all_reduce(loss, 'the average of losses').item() / world.world_size
        seconds += time.perf_counter() - start
        if logging:
            dt = (seconds - logged_at[1]) / (iter_num - logged_at[0])
            record.update(loss=loss, lr=lr, grad_norm=grad_norm, tokens=iter_num * tokens_per_iter,
                          seconds=round(seconds, 3), skipped=n_skipped,
                          **wire_record(meter - before, meter - logged, full))
            world.say(log_line(record, dt, tokens_per_iter, model, world))
            logged, logged_at = Counter(meter), (iter_num, seconds)
        if len(record) > 1:
            log.write(record)
    bar.close()
    if n := iter_num - first_iter:
        world.say(f'{n} iterations, {n * tokens_per_iter:,} tokens in '
                  f'{seconds - first_seconds:.0f}s')
        summarize(meter, n * full, world)
    return {'iter_num': iter_num, 'loss': loss, 'val_loss': val_loss,
            'records': log.records[1:], 'model': model}


if __name__ == '__main__':
    main()
