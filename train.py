"""
Train a GPT on long sequences split over several workers, with compressed ring attention.

    python train.py                                               # one process
    torchrun --standalone --nproc_per_node=2 train.py             # two, on CPUs or GPUs
    torchrun --standalone --nproc_per_node=2 train.py --send=full # the same, uncompressed

`python train.py --help` lists every flag. The method is not here: mos_cp.py is what is
sent, ring.py the wire.
"""
import argparse
import copy
import difflib
import errno
import glob
import inspect
import json
import math
import os
import re
import signal
import sys
import sysconfig
import time
import zlib
from collections import Counter
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import kernels
from mos_cp import CHOICES, GPT, GPTConfig, check, graphed
from ring import (Link, PeerError, Rehearsal, Ring, average, average_bytes, check_chunks,
                  positions, waiting)

# -----------------------------------------------------------------------------
# Configuration. The fields of RunConfig and of GPTConfig (mos_cp.py) are the flags: name, type,
# default, and in the comment what --help says.

@dataclass
class RunConfig:
    """The run: data, schedule, optimizer, processes."""
    preset: str = 'tiny'  # sizes and schedule: tiny, needle, 124m or 800m; single flags override it
    method: str = 'ours'  # ours (the defaults), or paper: what is sent and how it starts
    data: str = 'stdlib'  # stdlib (Python's source), needle, or text (bytes), .bin, a glob (** too)
    val_data: str = ''  # validation data; empty: a tenth of --data
    out_dir: str = 'out'  # where ckpt.pt and log.jsonl go
    init_from: str = 'scratch'  # scratch, resume (out_dir/ckpt.pt), or auto: if it is there
    log_interval: int = 25  # iterations between log lines
    eval_interval: int = 250  # iterations between validations with checkpoints (at the next sync)
    eval_iters: int = 32  # batches per validation; which sequences depends on batch_size
    eval_only: bool = False  # validate once and stop; nothing is written
    always_save_checkpoint: bool = True  # False: only when the validation loss is the best so far
    prompt: str = 'def '  # text to continue at the end of the run (byte-level data only)
    sample_tokens: int = 200  # length of that continuation; 0: none
    warm_start: int = 50  # iterations before the codecs start, in which --warm_send travels
    warm_send: str = 'local'  # what travels before that: local (nothing), or full (uncompressed)
    unplug_at: int = 0  # iteration from which everything is sent uncompressed; 0: never
    batch_size: int = 16  # sequences per micro-step
    gradient_accumulation_steps: int = 1  # micro-steps per iteration, shared out over dp
    max_iters: int = 500  # iterations
    learning_rate: float = 2e-3  # peak learning rate of AdamW
    warmup_iters: int = 20  # iterations of linear warm-up
    lr_decay_iters: int = 0  # iteration at which the cosine decay ends; 0: max_iters
    min_lr: float = 2e-4  # learning rate at the end of the decay
    codec_lr: float = 1.0  # the codecs' learning rate over the others'; rises from their start
    weight_decay: float = 0.1  # weight decay of the matrices
    beta1: float = 0.9  # AdamW's beta1
    beta2: float = 0.95  # AdamW's beta2
    grad_clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    seed: int = 1337  # of weights, codecs, data order and sampling
    cp: int = 0  # ranks that share one sequence; 0: all. The rest is data parallel
    sync_every: int = 1  # 1: average gradients every iteration; c: weights every c (local AdamW)
    sync_dtype: str = 'int8'  # how that travels: compute (exact), bf16, int8 or int4 (at random)
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
    'needle': dict(data='needle', codec_lr=0.1, latent_dim=36, n_layer=2, n_embd=64, block_size=16,
                   n_chunks=4, batch_size=64, max_iters=300, warm_start=10, learning_rate=5e-3,
                   min_lr=2e-4, eval_interval=150, sample_tokens=0),
    '124m': dict(n_layer=12, n_head=12, n_embd=768, latent_dim=16, block_size=16384, batch_size=1,
                 gradient_accumulation_steps=16, max_iters=10000, warm_start=500, warmup_iters=500,
                 learning_rate=6e-4, min_lr=6e-5, eval_interval=500),
    # the paper's shape; it does not give the width of its MLP
    '800m': dict(n_layer=8, n_head=8, n_embd=2048, n_ff=8192, latent_dim=44, block_size=131072,
                 batch_size=1, max_iters=10000, warm_start=500, warmup_iters=500,
                 learning_rate=3e-4, min_lr=3e-5, weight_decay=0.01, eval_interval=500),
}

METHODS = {
    'ours': {},
    'paper': dict(send='paper', n_generators=1, exact_local=False, compress_last=False,
                  wire_dtype='compute', warm_send='full'),
}

CHOICES = {**CHOICES, 'preset': tuple(PRESETS), 'method': tuple(METHODS),
           'init_from': ('scratch', 'resume', 'auto'), 'warm_send': ('local', 'full'),
           'device': ('auto', 'cpu', 'cuda'),
           'sync_dtype': ('compute', 'bf16', 'int8', 'int4'),
           'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

AT_LEAST_1 = ('log_interval', 'eval_interval', 'eval_iters', 'batch_size',
              'gradient_accumulation_steps', 'sync_every', 'timeout_s')  # others: at least 0
DEFAULTS = {f.name: f.default for config in (RunConfig, GPTConfig) for f in fields(config)}
MODEL_FLAGS = [f.name for f in fields(GPTConfig)]
# never taken from the checkpoint: they are this run's own
HERE_FLAGS = ('init_from', 'out_dir', 'eval_only', 'device', 'cp', 'compile', 'recompute',
              'timeout_s', 'link_mbps', 'latency_ms')

PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # dense bf16, datasheets, for the MFU
STATE = dict(iter_num=0, tokens=0, seconds=0.0, best_val_loss=math.inf)  # at the start


def fail(message):
    """End the run with one sentence, of one rank if all find the same fault."""
    if int(os.environ.get('LOCAL_RANK', 0)) > 0:
        time.sleep(2)  # torchrun ends us with the first; if it does not, this fault is ours alone
        message = f'rank {os.environ["RANK"]}: {message}'
    sys.exit(f'train.py: {message}')


def complain(text):
    tqdm.write(f'train.py: {text}', sys.stderr)


def parse_flags(argv):
    """--key=value or --key value -> {key: value} of the flags on the command line, or exits."""
    parser = argparse.ArgumentParser(  # --help begins with the commands at the top of this file
        prog='train.py', usage=argparse.SUPPRESS, description=__doc__.rsplit('\n\n', 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error, booleans = fail, {'true': True, '1': True, 'false': False, '0': False}
    for config in (RunConfig, GPTConfig):
        group = parser.add_argument_group(config.__name__)
        comments = dict(re.findall(r'^    (\w+): .*?  # (.*)$', inspect.getsource(config), re.M))
        for f in fields(config):
            options = dict(type=f.type, choices=CHOICES.get(f.name))
            if f.type is bool:  # --flag alone is true
                options = dict(type=lambda text: booleans.get(text.lower(), text), nargs='?',
                               const=True, choices=(True, False))
            text = f'{comments.get(f.name, "")} [{f.default}]'.replace('%', '%%')
            group.add_argument(f'--{f.name}', metavar=f.type.__name__.upper(), help=text, **options)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split('=')[0]
        near = difflib.get_close_matches(key.lstrip('-'), DEFAULTS, n=1, cutoff=0.8)
        advice = f'the nearest flag is --{near[0]}' if near else '--help lists all, as --key=value'
        fail(f'unknown argument {key}; {advice}')
    return vars(flags)


def parse_config(argv):
    """
    -> (the configuration, a Namespace; the checkpoint to resume from, or None). Flags of the
    command line win over --method, that over --preset. Of a resumed run all is the checkpoint's,
    but these flags and HERE_FLAGS. Raises ValueError.
    """
    flags, checkpoint = parse_flags(argv), None
    preset, method = flags.get('preset', 'tiny'), flags.get('method', 'ours')
    config = {**DEFAULTS, **PRESETS[preset], **METHODS[method], **flags}
    if method == 'paper' and 'latent_dim' not in flags:
        # 2 % of the keys' width and 5 % of the values'; 143 at width 2048
        share = (config['n_kv_head'] or config['n_head']) / config['n_head']
        config['latent_dim'] = max(2, round(0.07 * config['n_embd'] * share))
    for name in ('out_dir', 'data', 'val_data'):
        config[name] = os.path.expanduser(config[name])
    path = Path(config['out_dir'], 'ckpt.pt')
    if config['init_from'] == 'resume' or config['init_from'] == 'auto' and path.exists():
        checkpoint = load_checkpoint(path)
        saved, fixed = checkpoint['config'], {*MODEL_FLAGS, 'preset', 'method'} - {*HERE_FLAGS}
        for name in flags.keys() & fixed:
            check(flags[name] == saved[name], f'--{name}={flags[name]} differs from the '
                  f'checkpoint, which has {saved[name]}', name, 'out_dir')
        config = {**saved, **{name: config[name] for name in (*flags, *HERE_FLAGS)}}
    c = argparse.Namespace(**config)
    check_values(c)
    return c, checkpoint


def model_config(c):
    config = {name: getattr(c, name) for name in MODEL_FLAGS}
    if c.data == 'needle':
        config['vocab_size'] = c.block_size // 2 * (N_VALUES + 1)
    elif c.data.endswith('.bin'):
        config['vocab_size'] = c.vocab_size or 50304  # GPT-2's, rounded up to a multiple of 64
    return GPTConfig(**config)


def check_values(c):
    """Raises ValueError on impossible values, before any data is read."""
    for f in fields(RunConfig):
        lowest, value = int(f.name in AT_LEAST_1), getattr(c, f.name)
        check(f.type is str or lowest <= value < 2**63,
              f'{f.name} ({value}) must be at least {lowest} and below 2^63', f.name)
    model_config(c)
    for name, holds, must_be in (
            ('min_lr', c.min_lr <= c.learning_rate, f'at most learning_rate ({c.learning_rate})'),
            ('val_data', c.data != 'needle' or not c.val_data, 'empty with --data=needle'),
            ('n_chunks', c.data != 'needle' or c.n_chunks % 2 == 0, 'even with --data=needle'),
            ('dtype', not c.plan or c.dtype != 'float64', 'bfloat16 or float32 with --plan'),
            ('tflops', c.tflops > 0, 'above 0'), ('rehearse', c.rehearse != 1, '0 or at least 2'),
            ('cp', not c.rehearse or c.cp in (0, c.rehearse), f'0 or rehearse ({c.rehearse})'),
            ('warm_start', c.send == 'local' or not 0 < c.max_iters <= c.warm_start,
             f'below max_iters ({c.max_iters}), or it never ends'),
            ('unplug_at', not c.unplug_at or c.warm_start < c.unplug_at < c.max_iters,
             f'between warm_start ({c.warm_start}) and max_iters ({c.max_iters})')):
        check(holds, f'{name} ({getattr(c, name)}) must be {must_be}', name)


# -----------------------------------------------------------------------------
# Data: every source becomes a list of one-dimensional arrays of tokens

def stdlib_source():
    """Python's standard library as bytes -> (training part, validation part: every tenth file)."""
    skip, paths = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}, []
    for folder, subfolders, names in os.walk(sysconfig.get_path('stdlib')):
        subfolders[:] = set(subfolders) - skip
        paths += [Path(folder, name) for name in names if name.endswith('.py')]
    texts = [path.read_bytes() for path in sorted(paths)]
    train = [text for i, text in enumerate(texts) if i % 10 != 9]
    return [[np.frombuffer(b'\n'.join(part), np.uint8)] for part in (train, texts[9::10])]


# a header of 256 int32 begins with one of these, a version and the number of tokens: shards of
# modded-nanogpt and llm.c, of GPT-2's and Llama 3's tokens
HEADERS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}


def read_tokens(path):
    """A file as an array: .bin (uint16, or what its header says), all else as bytes."""
    if not path.endswith('.bin'):
        return np.memmap(path, np.uint8, 'r')
    size, header = os.path.getsize(path), np.fromfile(path, np.int32, count=3).tolist()
    check(size % 2 == 0, f'{path} has an odd number of bytes ({size})', 'data', 'val_data')
    if len(header) < 3 or header[0] not in HEADERS:
        return np.memmap(path, np.uint16, 'r')
    version, dtype = HEADERS[header[0]]
    n_tokens = max(0, size - 1024) // dtype().itemsize
    check(header[1:] == [version, n_tokens] and n_tokens, f'{path} has header version {header[1]} '
          f'and {header[2]} tokens, but must have {version} and, by its size, {n_tokens} tokens',
          'data', 'val_data')
    return np.memmap(path, dtype, 'r', offset=1024)


def read_all(pattern):
    """A file, or all files that match a glob (** is any depth), but empty ones."""
    paths = [path for path in sorted(glob.glob(pattern, recursive=True))
             if os.path.isfile(path) and os.path.getsize(path)]
    check(paths, f'no file matches {pattern!r}, or it is empty (the files of a folder are '
          f'{os.path.join(pattern, "*")})', 'data', 'val_data')
    return [read_tokens(path) for path in paths]


def load_data(c):
    """--data and --val_data -> (training shards, validation shards). Raises ValueError."""
    train, val = stdlib_source() if c.data == 'stdlib' else (read_all(c.data), [])
    if c.val_data:
        val = read_all(c.val_data)
        both = {getattr(s, 'filename', '') for s in train} & {s.filename for s in val}
        check(not both, f'training and validation data share {both}', 'data', 'val_data')
    types = {str(s.dtype): getattr(s, 'filename', 'stdlib') for s in train + val}
    check(len(types) == 1, f'files hold different kinds of tokens: {types}', 'data', 'val_data')
    if not val:
        train, val = [s[:len(s) * 9 // 10] for s in train], [s[len(s) * 9 // 10:] for s in train]
    for name, shards, flag in (('training', train, 'data'), ('validation', val, 'val_data')):
        longest = max(map(len, shards))
        check(c.block_size < longest, f'block_size ({c.block_size}) must be below the length of '
              f'the {name} data ({longest} tokens in the longest part)', 'block_size', flag)
    return train, val


def fingerprint(shards):
    """A number that differs if sizes do, or any of a thousand tokens: not all data is read."""
    each = [(str(s.dtype), len(s), s[::1 + len(s) * len(shards) // 1000].tolist()) for s in shards]
    return zlib.crc32(repr(each).encode())


def get_batch(c, shards, vocab_size, rng):
    """Random windows, uniform over all starting points -> idx, targets (B, block_size) int64."""
    before = np.cumsum([0, *(max(0, len(s) - c.block_size) for s in shards)])  # starting points
    rows = []
    for position in rng.integers(before[-1], size=c.batch_size):
        i = np.searchsorted(before, position, side='right') - 1
        rows.append(shards[i][position - before[i]:][:c.block_size + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows))
    if rows.max() >= vocab_size:  # perhaps of this rank alone
        fail(f'the data has token {rows.max()}, outside vocab_size ({vocab_size}): change '
             '--vocab_size')
    return rows[:, :-1], rows[:, 1:]


N_VALUES = 8  # of a needle: chance is a loss of log(8) = 2.08


def needle_batch(c, rng):
    """
    --data=needle -> idx, targets. The first half of a sequence states facts, each a token of its
    own that says key and value; no key comes twice. The second half asks for each key once, and the
    target is its value; there are no other targets. A chunk of the second half asks for what one
    chunk of the first half states; with two ranks or more that lies on another one.
    """
    B, n_keys, n_chunks = c.batch_size, c.block_size // 2, c.n_chunks
    shape = B, n_chunks // 2, c.block_size // n_chunks
    keys = rng.permuted(np.broadcast_to(np.arange(n_keys), (B, n_keys)), axis=1)
    keys, values = keys.reshape(shape), rng.integers(N_VALUES, size=shape)
    order = rng.permuted(np.broadcast_to(np.arange(shape[2]), shape), axis=2)
    # zigzag puts chunk i and its mirror image on one rank: ask a quarter of the sequence further on
    asked, answers = (np.roll(np.take_along_axis(t, order, axis=2)[:, ::-1], n_chunks // 4, axis=1)
                      for t in (keys, values))
    x = np.concatenate((keys * N_VALUES + values, n_keys * N_VALUES + asked), axis=1)
    y = np.concatenate((np.full(shape, -1), answers), axis=1)
    return tuple(torch.from_numpy(t.reshape(B, -1)) for t in (x, y))


class Batches:
    """Whole sequences, the same for all ranks of a ring. A batch is a function of numbers."""

    def __init__(self, c, world):
        self.c, self.world, self.vocab_size = c, world, model_config(c).vocab_size
        self.train, self.val = ([], []) if c.data == 'needle' else load_data(c)

    def get(self, shards, *seed):
        c, rng = self.c, np.random.default_rng(seed)
        batch = get_batch(c, shards, self.vocab_size, rng) if shards else needle_batch(c, rng)
        if self.world.device.type == 'cuda':
            batch = [t.pin_memory().to(self.world.device, non_blocking=True) for t in batch]
        return batch

    def training(self, iter_num, micro):
        micro = micro * self.world.dp + self.world.dp_rank
        return self.get(self.train, 0, self.c.seed, iter_num, micro)

    def validation(self):
        mine = range(self.world.dp_rank, self.c.eval_iters, self.world.dp)
        return (self.get(self.val, 1, k) for k in mine)


# -----------------------------------------------------------------------------
# Sizing a run before renting machines

def estimate(argv, P):
    """
    An iteration of one of P ranks, with tensors that have no numbers -> bytes of the ring forward,
    backward, of the sync; FLOPs of the model without attention, of attention, of the codec.
    """
    c, _ = parse_config(argv)
    ring, n = Rehearsal(P), c.gradient_accumulation_steps
    with FakeTensorMode(), torch.autocast('cpu', torch.bfloat16, enabled=c.dtype != 'float32'):
        model = GPT(replace(model_config(c), compile=False), ring)
        idx = torch.zeros(c.batch_size, c.block_size, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(idx, idx)[1].backward()
    counts = counter.get_flop_counts()['Global'].items()
    flops = sum(count for operator, count in counts if 'attention' not in str(operator))
    n_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sync = average_bytes(n_params, 4, P, c.sync_dtype) / c.sync_every
    n_tokens, span = c.batch_size * c.block_size // P, c.block_size
    if c.send == 'local':
        span = model.config.chunk_size
    attention = 6 * c.n_layer * c.n_embd * span * n_tokens
    of_model = model.flops_per_token() * n_tokens - attention
    return (n * ring.meter['received_fwd'], n * ring.meter['received_bwd'], sync,
            n * of_model, n * attention, n * (flops - of_model))


def plan(argv):
    """What a rank would receive and compute, and how fast, with these flags and with others."""
    c, _ = parse_config(argv)
    P, config = c.rehearse or c.cp or 8, model_config(c)
    check_chunks(c.n_chunks, P)
    tokens = c.batch_size * c.gradient_accumulation_steps * c.block_size
    costs = {'--send=full': estimate([*argv, '--send=full'], P)}
    if c.n_head % P == config.n_kv_head % P == 0:  # each rank has some of the heads
        # queries and outputs change hands too, but only a rank's share of the heads
        fwd, bwd, *others = costs['--send=full']
        fwd = fwd * (1 + c.n_head / config.n_kv_head) / P
        costs['Ulysses'] = fwd, fwd, *others
    if c.n_layer > 1:  # the paper leaves out the last layer
        costs['--method=paper'] = estimate([*argv, '--method=paper', '--send=paper'], P)
    costs['this configuration'] = estimate(argv, P)
    print(f'{P} ranks of {c.tflops:g} TFLOP/s, {tokens:,} tokens an iteration. Computed: what a '
          'rank receives in it;\nthe arithmetic of the codec, as a share of model and attention; '
          'tokens/s, if exchanges hide under\nattention, and the sync under nothing.')
    for mbps in [c.link_mbps] if c.link_mbps else [300, 1000]:
        s = 8e-6 / mbps  # seconds a byte
        print(f'\n{f"at {mbps:g} Mbit/s":<20}{"ring, MB":>10}{"sync, MB":>10}{"ring, s":>10}'
              f'{"sync, s":>10}{"compute, s":>12}{"codec":>8}{"tokens/s":>12}')
        for name, (fwd, bwd, sync, *flops) in costs.items():
            of_model, attention, of_codec = (n / c.tflops / 1e12 for n in flops)  # seconds
            # A layer's exchange can hide under its attention alone, of whose time a sixth is
            # forward (heads of 256 on an H200: 4 T^2 H hd at 742 TFLOP/s, backward 10 at 367), and
            # under all but one shard of that: the last to arrive, or the first to have a gradient.
            # Ulysses' attention waits.
            after = 1 if name == 'Ulysses' else 1 / P
            seconds = of_model + of_codec + sync * s + sum(
                max(attention * share, n_bytes * s + attention * share * after)
                for n_bytes, share in ((fwd, 1 / 6), (bwd, 5 / 6)))
            print(f'{name:<20}{(fwd + bwd) / 1e6:>10,.1f}{sync / 1e6:>10,.1f}'
                  f'{(fwd + bwd) * s:>10,.2f}{sync * s:>10,.2f}'
                  f'{of_model + attention + of_codec:>12,.2f}'
                  f'{max(0, of_codec) / (of_model + attention):>8.1%}{tokens / seconds:>12,.0f}')


# -----------------------------------------------------------------------------
# The processes

class World:
    """
    This process among world_size = dp x cp ranks, of which n_processes are real (in a rehearsal
    one). The ranks of a ring are neighbours and see the same sequences.
    """

    def __init__(self, c):
        env, n = os.environ, c.gradient_accumulation_steps
        self.rank, self.n_processes = int(env.get('RANK', 0)), int(env.get('WORLD_SIZE', 1))
        check(not c.rehearse or self.n_processes == 1, f'rehearse ({c.rehearse}) is for one '
              f'process, and there are {self.n_processes}', 'rehearse', 'nproc_per_node')
        self.world_size = c.rehearse or self.n_processes
        self.master, self.cp = self.rank == 0, c.rehearse or c.cp or self.world_size
        check(self.world_size % self.cp == 0, f'world size ({self.world_size}) must be a multiple '
              f'of cp ({self.cp})', 'cp', 'nproc_per_node')
        check_chunks(c.n_chunks, self.cp)
        self.dp, self.dp_rank = self.world_size // self.cp, self.rank // self.cp
        check(n % self.dp == 0, f'gradient_accumulation_steps ({n}) must be a multiple of dp, '
              f'world size / cp ({self.dp})', 'gradient_accumulation_steps', 'cp')
        self.n_micro = n // self.dp
        self.tokens = n * c.batch_size * c.block_size  # in an iteration
        self.width, self.store = len(str(c.max_iters)), None  # of iterations, in lines
        self.signal, self.stopping = None, False  # told to stop; and all know it
        self.saved = None  # whether the last checkpoint was written; None: none was due
        self.asked, self.anchor = None, {}  # see `agree_to_stop`, `average_weights`
        link = Link(c.link_mbps, c.latency_ms)
        self.ring = Rehearsal(self.cp, link) if c.rehearse else Ring(link=link)
        self.choose_device(c)

    def choose_device(self, c):
        n_gpus, n_local = torch.cuda.device_count(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        counts = f'{n_local} processes on this machine, {n_gpus} GPUs'
        check(c.device != 'cuda' or n_gpus >= n_local, '--device=cuda needs a GPU per process '
              f'({counts})', 'device', 'nproc_per_node')
        self.device, default = torch.device('cpu'), 'float32'
        if c.device != 'cpu' and n_gpus >= n_local:
            local_rank, default = int(os.environ.get('LOCAL_RANK', 0)), 'bfloat16'
            self.device = torch.device('cuda', local_rank)
            torch.cuda.set_device(self.device)
        elif c.device == 'auto' and n_gpus:
            self.say(f'running on CPU: {counts}')
        self.dtype = getattr(torch, default if c.dtype == 'auto' else c.dtype)
        # no cache: a weight is used once in a forward pass, and a CUDA graph must not find one
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False,
                                       enabled=self.dtype == torch.bfloat16)

    def say(self, text):
        if self.master:
            tqdm.write(text)

    def tell(self, iter_num, text):
        self.say(f'iter {iter_num:>{self.width}}: {text}')

    def bar(self, items=None, **options):
        """A progress bar, on rank 0 and on a terminal alone. -> the items, if there are some."""
        return tqdm(items, disable=None if self.master else True, leave=False, dynamic_ncols=True,
                    **options)

    def join(self, c, facts):
        """Make the process groups. facts: {name: value}, the same on all. Raises ValueError."""
        if self.n_processes == 1:
            return
        env, cuda = os.environ, self.device.type == 'cuda'
        timeout = timedelta(seconds=c.timeout_s + 300 * c.compile)  # others may still be compiling
        try:
            store, _, _ = next(dist.rendezvous('env://', timeout=timeout))
            # torchrun's store outlives a restart, with all that was in it
            self.store = dist.PrefixStore(env.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
            dist.init_process_group('nccl' if cuda else 'gloo', store=self.store, rank=self.rank,
                                    world_size=self.world_size, timeout=timeout,
                                    device_id=self.device if cuda else None)
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, facts)
            group, _ = dist.new_subgroups(self.cp, timeout=timeout)
        except (RuntimeError, OSError) as e:
            reason = str(e).splitlines()[0][:200]
            raise ValueError(
                f'rank {self.rank} does not reach the others ({reason}): has one stopped? Is '
                f'{env["MASTER_ADDR"]} the first machine, its port open, and the network interface '
                '(see ip address) in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME?') from e
        for other, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs[name] != value:
                    raise ValueError(f'rank {other} has {name} {theirs[name]}, and rank 0 has '
                                     f'{value}: they must be the same')
        self.ring = Ring(group, self.ring.link)
        if not self.master and env.get('LOCAL_RANK') == '0':  # the first of another machine
            tqdm.write(f'rank {self.rank} of {self.world_size}: rank 0, on {env["MASTER_ADDR"]}, '
                       f'says the rest, and logs it there in {c.out_dir}')

    def stop(self, signum, frame):
        """On a signal: stop after a step. A second one ends the process at once."""
        self.signal = signal.Signals(signum)
        signal.signal(signum, signal.SIG_DFL)

    def agree_to_stop(self):
        """
        After every step: if one process was told to stop, all learn it together, a step later. What
        asks is under way during that step, so that nobody waits for it.
        """
        if self.n_processes == 1:
            self.stopping = self.signal is not None
            return
        with waiting('all other ranks', 'the end of a step'):
            if self.asked:
                work, flag = self.asked
                work.wait()
                self.stopping = flag.item() > 0
            flag = torch.tensor([float(self.signal is not None)], device=self.device)
            self.asked = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag

    @torch.no_grad()
    def set_anchor(self, params):
        """These weights are now the same on all ranks."""
        self.anchor.update({p: p.detach().clone() for p in params})

    @torch.no_grad()
    def average_weights(self, dtype):
        """What travels is the change since all ranks had the same weights."""
        changes = [p - same for p, same in self.anchor.items()]
        average(changes, self.ring, dtype)
        torch._foreach_add_(list(self.anchor.values()), changes)
        torch._foreach_copy_(list(self.anchor), list(self.anchor.values()))

    def broadcast(self, tensors, name):
        """Rank 0's for all, as machines may differ in the last digit. Neither counted nor slow."""
        if self.n_processes > 1:
            for tensor in tensors:
                with waiting('rank 0', name):
                    dist.broadcast(tensor.detach(), 0)


# -----------------------------------------------------------------------------
# What a run starts from, and what it keeps

def write_whole(path, write):
    """Write a file beside the old one and rename it: there is a whole one at every moment."""
    temporary = path.with_suffix('.tmp')
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint as `save` left it, on the CPU. Raises ValueError if it is not one."""
    check(path.exists(), f'{path} does not exist', 'init_from', 'out_dir')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint = {key: checkpoint[key] for key in ('model', 'optimizer', 'config', *STATE)}
        gone = sorted(checkpoint['config'].keys() - DEFAULTS.keys())
        checkpoint['newer'] = sorted(DEFAULTS.keys() - checkpoint['config'].keys())
        checkpoint['config'] = {**DEFAULTS, **checkpoint['config']}
    except Exception as e:  # whatever a damaged or foreign file makes of it
        raise ValueError(f'{path} is damaged, or no checkpoint of this version of the code '
                         f'({e!r:.99}): change --init_from or --out_dir') from e
    check(not gone, f'{path} was saved with --{", --".join(gone)}, which this version of the code '
          'does not have', 'init_from', 'out_dir')
    return checkpoint


def build(c, world, checkpoint):
    """-> model and optimizer, the same on all ranks. Raises ValueError."""
    torch.manual_seed(c.seed)
    if world.dtype == torch.bfloat16:  # float32 is for comparing runs to the last digit
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = torch.float64 if world.dtype == torch.float64 else torch.float32
    model = GPT(model_config(c), world.ring).to(world.device, dtype)
    optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2),
                                           world.device.type)
    for group in optimizer.param_groups:  # from the start, as ranks may leave out different steps
        for p in group['params']:
            step = torch.zeros((), device=p.device if group['fused'] else 'cpu')
            optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p),
                                      exp_avg_sq=torch.zeros_like(p))
    if checkpoint:
        model.load_state_dict(checkpoint['model'])
        state = checkpoint['optimizer']['state']
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': state})  # our own options
    world.broadcast(model.parameters(), 'the first weights')
    return model, optimizer


def save(c, model, optimizer, world, at):
    """
    A checkpoint of this moment: one model, the same on all ranks, and one optimizer, whose moments
    are means over all ranks. -> whether it was written.
    """
    state, key = optimizer.state_dict(), f'checkpoint {at.iter_num}'
    if c.sync_every > 1:  # else they are the same
        state = copy.deepcopy(state)
        average([t for moments in state['state'].values() for t in moments.values()], world.ring)
    if not world.master:  # writing may take longer than a silent peer is waited for
        with waiting('rank 0', 'saving a checkpoint'):
            world.store.wait([key], timedelta(minutes=10))
        return world.store.get(key) == b'written'
    path, result = Path(c.out_dir, 'ckpt.pt'), 'written'
    checkpoint = {'model': model.state_dict(), 'optimizer': state, 'config': vars(c), **vars(at),
                  'model_args': vars(model.config)}  # GPTConfig(**model_args), as in nanoGPT
    try:
        write_whole(path, lambda f: torch.save(checkpoint, f))
        world.tell(at.iter_num, f'saved {path}')
    except (OSError, RuntimeError) as e:  # torch has its own words for a disk that is full
        result = 'failed'
        complain(f'could not write {path} ({str(e.args[-1]).splitlines()[0]}); the checkpoint '
                 'before it, if there is one, is untouched')
    if world.store:
        world.store.set(key, result)
    return result == 'written'


class Log:
    """
    What a run says of its steps, and keeps: out_dir/log.jsonl, one record a line, written by rank
    0: first, and after a resume once more, the configuration. `records` are those of this run.
    """

    def __init__(self, c, model, world, at):
        """Of a log that is there, records of iterations before this one stay. Raises OSError."""
        self.c, self.model, self.world, self.records = c, model, world, []
        self.first = self.last = at.iter_num, at.seconds, Counter()  # at the start, the last line
        self.losses = []  # since the last line
        self.skipped = self.skipped_in_a_row = 0
        # what a rank receives in an iteration: so many pairs of a token and a layer; uncompressed
        # of each keys and values, these again, and their gradient
        self.n_received = c.n_layer * world.tokens // world.dp * (world.cp - 1) // world.cp
        width = model.config.n_kv_head * model.config.head_dim
        self.uncompressed = self.n_received * 3 * 2 * width * world.dtype.itemsize
        total = at.tokens + (c.max_iters - at.iter_num) * world.tokens
        self.bar = world.bar(total=total, initial=at.tokens, unit='tok', unit_scale=True)
        self.path = Path(c.out_dir, 'log.jsonl')
        self.writes = world.master and not c.rehearse and not c.eval_only
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            old = self.path.read_bytes() if self.path.exists() else b''
            lines = re.finditer(rb'^{"iter": (\d+),.*}\n', old, re.MULTILINE)
            kept = [line[0] for line in lines if int(line[1]) < at.iter_num]
            config = self.line({'iter': at.iter_num, 'config': vars(c)})
            write_whole(self.path, lambda f: f.writelines([*kept, config]))

    @staticmethod
    def line(record):  # JSON has neither NaN nor infinity: null
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)
        return json.dumps(record).encode() + b'\n'

    def write(self, record):
        """A full disk is said, and does not end the run."""
        self.records.append(record)
        if self.writes:
            try:
                with open(self.path, 'ab') as f:
                    f.write(self.line(record))
            except OSError as e:
                complain(f'could not write {self.path} ({e.strerror})')

    def add(self, it, loss, grad_norm):
        """A step is over: left out if its gradient is not finite. Ten such in a row are enough."""
        self.bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)
        self.bar.update(self.world.tokens)
        if math.isfinite(grad_norm):
            self.losses.append(loss)
            self.skipped_in_a_row = 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        complain(f'rank {self.world.rank}, iter {it}: the gradient is not finite, step skipped')
        if self.skipped_in_a_row == 10:
            fail(f'no finite gradient in 10 steps up to iteration {it}; the last checkpoint, if '
                 'there is one, is from before them: lower --learning_rate')

    def step(self, at, before, **more):
        """Say what happened since the last line, and -> it. before: the meter before the step."""
        world, ring, meter = self.world, self.world.ring, self.world.ring.meter
        total = torch.tensor([sum(self.losses), len(self.losses)], dtype=torch.float64)
        total, n = ring.reduce_over_world(total.to(world.device), 'the average of losses').tolist()
        loss = total / n if n else math.nan  # the mean, as one batch's jumps
        iter_num, seconds, meter_then = self.last
        dt = (at.seconds - seconds) / (at.iter_num - iter_num)
        text = f'loss {loss:.4f}, {dt * 1000:>6,.0f} ms, {world.tokens / dt:>9,.0f} tok/s'
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == 'cuda' else ''
        for name, flops in PEAK_FLOPS.items():
            if name in gpu:
                n_sequences, flops = world.tokens // self.c.block_size, world.world_size * flops
                text += f', mfu {self.model.estimate_mfu(n_sequences, dt, flops):.1%}'
        step, sync = meter - before, meter - meter_then  # syncs: since the last line
        fwd, bwd = step['received_fwd'], step['received_bwd']
        compression = 1 - (fwd + bwd) / self.uncompressed if fwd else None
        if fwd:
            text += (f', received {fwd / self.n_received:.0f} + {bwd / self.n_received:.0f} bytes '
                     f'a token and layer ({compression:.1%} less)')
        world.tell(at.iter_num - 1, text)
        self.losses, self.last = [], (at.iter_num, at.seconds, Counter(meter))
        return {'loss': loss, **more, 'skipped': self.skipped, 'tokens': at.tokens,
                'seconds': round(at.seconds, 3), 'compression': compression,
                **{k: step[k] for k in ('sent_fwd', 'received_fwd', 'sent_bwd', 'received_bwd')},
                **{k: sync[k] for k in ('sent_sync', 'received_sync')}}

    def say_summary(self, at):
        world, meter, rank = self.world, self.world.ring.meter, self.world.ring.rank
        n, seconds = at.iter_num - self.first[0], at.seconds - self.first[1]
        if n:
            world.say(f'{n} iterations, {n * world.tokens:,} tokens in {seconds:.0f}s')
        if n and world.world_size > 1:
            ring = (meter['sent_fwd'] + meter['sent_bwd']) / 1e6
            world.say(f'rank {rank} sent {ring:,.1f} MB over the ring (uncompressed: '
                      f'{n * self.uncompressed / 1e6:,.1f}) and {meter["sent_sync"] / 1e6:,.1f} MB '
                      'for syncs')
        if world.device.type == 'cuda':
            peak = torch.cuda.max_memory_allocated() / 1e9
            world.say(f'peak memory of rank {rank}: {peak:.2f} GB')


def describe(c, model, batches, world, at, checkpoint):
    say, n, acts_as = world.say, model.get_num_params(), 'as one of' if c.rehearse else '='
    attention = kernels.attention_backend(world.device.type, world.dtype, model.config.head_dim)
    say(f'{n / 1e6:.2f}M parameters, vocabulary {model.config.vocab_size}')
    say(f'{world.n_processes} process(es) {acts_as} dp {world.dp} x cp {world.cp} on '
        f'{world.device.type}, {world.dtype}; attention by {attention}')
    for name, data, n in (('training', batches.train, c.max_iters * world.tokens),
                          ('validation', batches.val, c.eval_iters * c.batch_size * c.block_size)):
        drawn = [len(s) for s in data if len(s) > c.block_size]
        if drawn:
            say(f'{name} data: {sum(drawn):,} tokens in {len(drawn)} file(s) longer than '
                f'block_size (of {len(data)}); {n / sum(drawn):.2g} passes')
    if c.rehearse:
        say(f'a rehearsal of rank {world.ring.rank} of {world.cp}: its time, memory and bytes. The '
            'losses mean nothing; nothing is validated or saved')
    if checkpoint:
        advice = '; to go on, raise --max_iters' if at.iter_num >= c.max_iters else ''
        say(f'resumed from {c.out_dir}/ckpt.pt at iteration {at.iter_num} of {c.max_iters}{advice}')
        for name in checkpoint['newer']:
            say(f'the checkpoint has no --{name}, which is newer: it is {getattr(c, name)!r}')


# -----------------------------------------------------------------------------
# The run: what is sent when, validation, the loop, and all of it from flags to the end

def learning_rate(it, c, codec=False):
    """Linear warm-up, then cosine decay to min_lr (nanoGPT's schedule)."""
    if codec:  # it starts well, and AdamW's first steps would spoil it: its rate rises once more
        rise = min(1, max(0, it - c.warm_start + 1) / (c.warmup_iters + 1))
        return learning_rate(it, c) * c.codec_lr * rise
    if it < c.warmup_iters:
        return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
    end = c.lr_decay_iters or c.max_iters
    ratio = (it - c.warmup_iters) / (end - c.warmup_iters) if it < end else 1
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (c.learning_rate - c.min_lr)


def sends_at(it, c):
    """What the model sends in iteration `it`: warm start, the codec, unplugged."""
    if it < c.warm_start:
        return c.warm_send
    return 'full' if c.unplug_at and it >= c.unplug_at else 'codec'


def change_send(c, model, batches, world, iter_num):
    """Bring the model to what it sends from now on -> a function (idx, targets) -> loss."""
    before, now = model.sends, sends_at(iter_num, c)
    if before != 'codec' and now == 'codec' and model.started:
        with world.autocast:
            model.start_codecs([batches.training(iter_num, k)[0] for k in range(world.n_micro)])
        codecs = [p for block in model.started for p in block.attn.codec.parameters()]
        world.broadcast(codecs, 'the first codecs')
        world.set_anchor(p for p in codecs if p in world.anchor)
    model.set_send(now)
    sends = c.send if now == 'codec' else now
    text = 'the codec starts' if iter_num == c.warm_start else 'the codec goes on'
    text = {'local': 'nothing is sent', 'full': 'all is sent, uncompressed'}.get(sends, text)
    world.tell(iter_num, text + '; compiling ...' if c.compile else text)
    if c.compile and world.device.type == 'cuda' and not world.ring.link.dialled:
        with world.autocast:
            return graphed(model, *batches.training(iter_num, 0))
    return lambda *batch: model(*batch)[1]


@torch.no_grad()
def validate(c, model, batches, world, it):
    """
    -> what the log has: the mean loss over fixed batches, and that of each chunk of the sequence
    (None: no targets). Every rank takes part, a ring cannot have idle members.
    """
    ring, config = world.ring, model.config
    sums = torch.zeros(3, c.n_chunks, dtype=torch.float64, device=world.device)
    mine = positions(c.n_chunks, world.cp)[ring.rank]
    for x, y in world.bar(batches.validation(), total=math.ceil(c.eval_iters / world.dp),
                          desc='validation', delay=3):
        with world.autocast:
            losses, right = model.evaluate(x, y)  # (B, T / cp)
        each = torch.stack((losses.double(), ring.shard(y, config.chunk_size) != -1, right))
        sums[:, mine] += each.unflatten(2, (len(mine), -1)).sum(dim=(1, 3))
    total, n, n_right = ring.reduce_over_world(sums, 'validation').sum(dim=1).tolist()
    text = f'val loss {total / n:.4f}'
    if c.data == 'needle':
        text += f', {n_right / n:.1%} right answers (chance: {1 / N_VALUES:.1%})'
    world.tell(it, text)
    return {'val_loss': total / n, 'right_answers': n_right / n,
            'val_loss_by_chunk': [loss / n if n else None for loss, n, _ in sums.T.tolist()]}


def sample(c, model, world):
    idx = torch.tensor([list(os.fsencode(c.prompt) or b'\n')], device=world.device)
    with world.autocast:
        for _ in world.bar(range(c.sample_tokens), desc='sample', delay=3):
            idx = model.generate(idx, 1, temperature=0.8, top_k=50)
    world.say('--- sample\n' + bytes(idx[0].tolist()).decode(errors='replace'))


def validate_and_save(c, model, optimizer, batches, world, log, at):
    """Validation, whose bytes do not count, and a checkpoint if one is due -> what the log has."""
    meter, world.ring.meter = world.ring.meter, Counter()
    record = validate(c, model, batches, world, at.iter_num)
    world.ring.meter, loss = meter, record['val_loss']
    wanted = c.always_save_checkpoint or loss < at.best_val_loss
    at.best_val_loss = min(at.best_val_loss, loss)
    if wanted and at.iter_num > log.first[0]:  # something is new
        world.saved = math.isfinite(loss) and save(c, model, optimizer, world, at)
    return record


def train(c, model, optimizer, batches, world, log, at):
    """The loop: until max_iters, or a signal to stop. Changes `at`, model and optimizer."""
    params, loss_of = [p for p in model.parameters() if p.requires_grad], None
    # at a sync: only then do all ranks have the same weights
    eval_interval = c.sync_every * math.ceil(c.eval_interval / c.sync_every)
    if c.sync_every > 1:
        world.set_anchor(params)
    while True:
        it, record, began = at.iter_num, {'iter': at.iter_num}, time.perf_counter()
        if world.stopping:  # a checkpoint before anything else
            if c.sync_every > 1 and it % c.sync_every:
                world.average_weights(c.sync_dtype)
            world.saved = None if c.rehearse else save(c, model, optimizer, world, at)
            return log.write(record)

        # -- what is sent from now on; validation and a checkpoint, whose time does not count
        if loss_of is None or model.sends != sends_at(it, c):
            loss_of = None  # an earlier CUDA graph goes before the next is captured
            loss_of = change_send(c, model, batches, world, it)
        at.seconds += time.perf_counter() - began
        done = it >= c.max_iters or c.eval_only
        if (done or it % eval_interval == 0) and not c.rehearse:
            record |= validate_and_save(c, model, optimizer, batches, world, log, at)
        if done:
            return log.write(record)

        # -- the gradient: of all micro-batches, averaged over all ranks
        began, before, loss = time.perf_counter(), Counter(world.ring.meter), 0.0
        seeds = np.random.SeedSequence((c.seed, it, world.rank))  # of rounding at random
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        for micro in range(world.n_micro):
            with world.autocast:
                micro_loss = loss_of(*batches.training(it, micro)) / world.n_micro
            micro_loss.backward()
            loss += micro_loss.detach()
        if c.sync_every == 1:
            average([p.grad for p in params if p.grad is not None], world.ring, c.sync_dtype)

        # -- a step of AdamW; without a finite gradient none, and the data moves on
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(it, c, group['codec'])
        grad_norm = torch.nn.utils.clip_grad_norm_(params, c.grad_clip or math.inf).item()
        if math.isfinite(grad_norm):
            optimizer.step()
        log.add(it, loss.item(), grad_norm)
        optimizer.zero_grad(set_to_none=True)

        # -- every so often the average of weights; then news of who was told to stop
        at.iter_num, at.tokens = it + 1, at.tokens + world.tokens
        last = at.iter_num == c.max_iters
        if c.sync_every > 1 and (last or at.iter_num % c.sync_every == 0):
            world.average_weights(c.sync_dtype)
        if not last:
            world.agree_to_stop()
        at.seconds += time.perf_counter() - began

        if it % c.log_interval == 0 or last:
            record |= log.step(at, before, lr=learning_rate(it, c), grad_norm=grad_norm)
        if len(record) > 1:
            log.write(record)


def set_up(argv):
    """-> what `train` needs, or None after --plan. Exits with a sentence if something is wrong."""
    try:
        c, checkpoint = parse_config(argv)
        if c.plan:
            return plan(argv)
        world = World(c)
        batches = Batches(c, world)
        at = argparse.Namespace(**{k: (checkpoint or STATE)[k] for k in STATE})
        world.join(c, {  # what all ranks must agree on
            **{f'--{k}': v for k, v in vars(c).items() if k not in ('out_dir', 'data', 'val_data')},
            'torch': torch.__version__, 'checkpoint': checkpoint and vars(at),
            'data checksums': [fingerprint(batches.train), fingerprint(batches.val)]})
        model, optimizer = build(c, world, checkpoint)
        log = Log(c, model, world, at)
    except ValueError as e:
        fail(e)
    except OSError as e:
        remedy = 'raise ulimit -n, or change' if e.errno == errno.EMFILE else 'change'
        fail(f'{e.filename or "a file"} cannot be read or made ({e.strerror}): {remedy} --data, '
             '--val_data or --out_dir')
    describe(c, model, batches, world, at, checkpoint)
    return c, model, optimizer, batches, world, log, at


def main(argv=None):
    """One training run. Returns a dict: the log's last values and records, iter_num, the model."""
    if hasattr(sys.stdout, 'reconfigure'):  # lines at once; what a terminal cannot show is escaped
        sys.stdout.reconfigure(line_buffering=True, errors='backslashreplace')
    try:
        run = set_up(sys.argv[1:] if argv is None else argv)
        if run is None:
            return None
        c, model, _, _, world, log, at = run
        handlers = {s: signal.signal(s, world.stop) for s in (signal.SIGTERM, signal.SIGINT)}
        with log.bar:
            train(*run)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    except PeerError as e:
        complain(e)
        os._exit(1)  # taking down groups whose members are gone can hang
    log.say_summary(at)
    if dist.is_initialized():
        dist.destroy_process_group()
    if world.stopping:
        signum = world.signal or signal.SIGTERM  # or another rank's
        advice = '--init_from=resume goes on' if world.saved else 'nothing was saved of it'
        world.say(f'stopped by {signum.name} at iteration {at.iter_num}; {advice}')
        sys.exit(128 + signum)
    if log.writes and model.config.vocab_size == 256 and c.sample_tokens:  # 256: bytes
        sample(c, model, world)
    if world.saved is False:
        fail('the last checkpoint was not written')
    last = {key: value for record in log.records for key, value in record.items()}
    return {**last, 'iter_num': at.iter_num, 'records': log.records, 'model': model}


if __name__ == '__main__':
    main()
