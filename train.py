"""
Train a GPT on long sequences split over several workers, with compressed ring attention between them.

    python train.py                                               # one process
    torchrun --standalone --nproc_per_node=2 train.py             # two, on CPUs or GPUs
    torchrun --standalone --nproc_per_node=2 train.py --send=full # the same, uncompressed
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=4 --master_addr=HOST --master_port=29500 train.py --preset=124m

`python train.py --help` lists every flag. Read next: mos_cp.py (the model), ring.py (the wire).
"""
import argparse
import dataclasses
import difflib
import glob
import json
import math
import os
import signal
import sys
import sysconfig
import textwrap
import threading
import time
import zlib
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import kernels
from mos_cp import CHOICES, GPT, GPTConfig
from ring import Link, PeerError, Ring, average, broadcast, sum_over_ranks, waiting, zigzag

# -----------------------------------------------------------------------------
# Configuration: (flag, default, meaning). The default's type is the flag's type.

FLAGS = [
    ('preset', 'tiny', 'sizes and schedule: tiny, 124m or 800m; single flags override it'),
    ('method', 'ours', 'ours (the defaults below), or paper: sets every option to what the paper does'),
    # input and output
    ('data', 'stdlib', "training data: stdlib (Python's own source), a text file (bytes), a uint16 .bin, a glob, or needle (a test "
                       'of memory, see needle_batch)'),
    ('val_data', '', 'validation data, same forms; empty: the last tenth of each file of --data'),
    ('out_dir', 'out', 'where ckpt.pt and log.jsonl go'),
    ('init_from', 'scratch', 'scratch, resume: continue from out_dir/ckpt.pt, or auto: resume if there is one'),
    ('log_interval', 10, 'iterations between log lines'),
    ('eval_interval', 125, 'iterations between validations, each followed by a checkpoint'),
    ('eval_iters', 8, 'batches per validation'),
    ('eval_only', False, 'validate once and stop'),
    ('always_save_checkpoint', True, 'False: write a checkpoint only when the validation loss is the best so far'),
    ('prompt', 'def ', 'text to continue at the end of the run (byte-level data only)'),
    ('sample_tokens', 200, 'length of that continuation; 0: none'),
    # model
    ('block_size', 1024, 'context length in tokens, over all ranks of a ring together'),
    ('n_chunks', 16, 'chunks the context is cut into; a multiple of 2 * cp. The result depends on it, not on cp'),
    ('n_layer', 4, 'layers'),
    ('n_head', 4, 'query heads'),
    ('n_kv_head', 0, 'key and value heads (grouped-query attention); 0: n_head'),
    ('n_embd', 128, 'width'),
    ('n_ff', 0, 'width of the SwiGLU; 0: 8/3 n_embd, rounded up to a multiple of 64'),
    ('vocab_size', 0, 'vocabulary; 0: from the data (256 for text, largest token + 1 for .bin)'),
    # what crosses the wire
    ('send', 'subspace', 'full (uncompressed), local (nothing), topk, or subspace'),
    ('wire_dtype', 'auto', 'of what is sent: compute (as computed), bf16, int8 or int4, whose gradient is rounded stochastically; auto: int8 '
                           'for subspaces, compute for the rest'),
    ('grad_wire_dtype', 'same', 'of that gradient alone, if not the same'),
    ('exact_local', True, 'a chunk attends to its own keys and values exactly; False (the paper): to rebuilt ones'),
    ('joint_kv', True, 'one subspace for keys and values together, of rank r_k + r_v; False: one each'),
    ('basis', 'learned', 'fixed, learned (a trained parameter), or rotated (the paper: by the mean of the chunk)'),
    ('rank_k', 0.08, 'numbers sent for a key, as a fraction of its width'),
    ('rank_v', 0.2, 'numbers sent for a value, as a fraction of its width'),
    ('generator', 'frobenius', 'of the rotation: random, with frobenius (the paper) or spectral norm 1'),
    ('n_generators', 1, 'how many generators, that is numbers in theta'),
    ('theta_clip', 0.5, 'largest |theta|; 0: not clipped'),
    ('topk', 0.1, 'fraction of entries that send=topk keeps'),
    ('interleave', False, "the front and back half of a rank's tokens take turns: one computes while the other travels"),
    ('compress_last', True, 'False: the last layer sends full keys and values, as in the paper'),
    ('warm_start', 50, 'iterations before the compressor starts, its subspaces in principal directions; 0: in random ones. Without subspaces, '
                       '0 unless given'),
    ('warm_send', 'local', 'what travels in these: local (nothing, every chunk attends to itself), or full (uncompressed)'),
    ('warm_basis', 'activations', 'principal directions of what: activations, or weights (the paper)'),
    ('unplug_at', 0, 'iteration from which everything is sent uncompressed and the compressor rests; 0: never'),
    # optimisation
    ('batch_size', 4, 'sequences per micro-step'),
    ('gradient_accumulation_steps', 1, 'micro-steps per iteration, shared out over dp; a multiple of dp'),
    ('max_iters', 250, 'iterations'),
    ('learning_rate', 2e-3, 'peak learning rate of AdamW'),
    ('warmup_iters', 20, 'iterations of linear warm-up'),
    ('lr_decay_iters', 0, 'iteration at which the cosine decay ends; 0: max_iters'),
    ('min_lr', 2e-4, 'learning rate at the end of the decay'),
    ('basis_lr', 0.3, "learning rate of the compressor's own parameters, as a fraction of the others'"),
    ('weight_decay', 0.1, 'weight decay of the matrices'),
    ('beta1', 0.9, "AdamW's beta1"),
    ('beta2', 0.95, "AdamW's beta2"),
    ('grad_clip', 1.0, 'largest norm of the gradient; 0: not clipped'),
    ('max_skipped', 10, 'steps in a row left out because a loss or gradient is not finite, after which the run stops'),
    ('seed', 1337, 'of weights, data order and sampling'),
    # system
    ('cp', 0, 'ranks that share one sequence; 0: all. The others are data parallel: dp = world size / cp'),
    ('sync_every', 1, '1: average gradients every iteration (exact); c: average weights every c, and to validate'),
    ('sync_basis_every', 0, 'with sync_every > 1: average the learned basis, small and shared, more often; 0: sync_every'),
    ('sync_dtype', 'param', 'with sync_every > 1: of what is averaged, how far the weights moved: param (as they are) or bf16'),
    ('outer_lr', 1.0, 'with sync_every > 1: step from the last average towards the new one; 1: the average itself'),
    ('outer_momentum', 0.0, "Nesterov's momentum of that step (DiLoCo); 0: none"),
    ('device', 'auto', 'auto, cpu or cuda; auto takes cuda if every process on the machine can have a GPU'),
    ('dtype', 'auto', 'auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 (autocast) or float64'),
    ('recompute', False, "compute the MLPs' activations and the logits once more in backward: room for a longer context"),
    ('compile', False, 'torch.compile the model and the kernels around the ring'),
    ('link_mbps', 0.0, 'pretend that every rank hangs on a link this slow, in megabits a second each way; 0: do not'),
    ('latency_ms', 0.0, 'and that a message takes this long one way besides, in milliseconds (gloo adds its own handshake)'),
    ('plan', False, 'print what crosses the wire, and how long that takes on which link, for --cp ranks (0: 8); no training'),
    ('tflops', 370.0, 'for --plan: what a rank computes, in TFLOP/s; 370: measured, an H100 with the 800m preset'),
    ('timeout_s', 60, 'seconds after which a rank that waits for a silent peer gives up (in the ring and in syncs, not while saving)'),
]

PRESETS = {
    'tiny': {},
    '124m': dict(n_layer=12, n_head=12, n_embd=768, block_size=16384, batch_size=1, gradient_accumulation_steps=16,
                 max_iters=10000, warm_start=500, warmup_iters=500, learning_rate=6e-4, min_lr=6e-5, eval_interval=500),
    # the paper's shape; it does not give the width of its MLP
    '800m': dict(n_layer=8, n_head=8, n_embd=2048, n_ff=8192, block_size=131072, batch_size=1, max_iters=10000,
                 warm_start=500, warmup_iters=500, learning_rate=3e-4, min_lr=3e-5, weight_decay=0.01,
                 eval_interval=500),
}

METHODS = {
    'ours': {},
    'paper': dict(basis='rotated', joint_kv=False, exact_local=False, generator='frobenius', n_generators=1,
                  theta_clip=0.5, rank_k=0.02, rank_v=0.05, wire_dtype='compute', compress_last=False,
                  warm_send='full', warm_basis='weights', basis_lr=1.0, sync_every=200),
}

CHOICES = {**CHOICES, 'preset': tuple(PRESETS), 'method': tuple(METHODS), 'init_from': ('scratch', 'resume', 'auto'),
           'warm_send': ('local', 'full'), 'warm_basis': ('activations', 'weights'), 'sync_dtype': ('param', 'bf16'),
           'device': ('auto', 'cpu', 'cuda'), 'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # dense bf16, by the vendor's datasheets, for the MFU

# A flag on the command line that would do nothing is an error: flag -> the values of others it needs
LOSSY = ('local', 'topk', 'subspace')
NEEDS = {**dict.fromkeys(('compress_last', 'unplug_at'), {'send': LOSSY}), 'interleave': {'send': ('topk', 'subspace')},
         **dict.fromkeys(('wire_dtype', 'grad_wire_dtype', 'warm_start', 'warm_send'), {'send': ('full', 'topk', 'subspace')}),
         **dict.fromkeys(('basis', 'joint_kv', 'rank_k', 'rank_v', 'warm_basis'), {'send': ('subspace',)}),
         **dict.fromkeys(('generator', 'n_generators', 'theta_clip'), {'send': ('subspace',), 'basis': ('rotated',)}),
         **dict.fromkeys(('basis_lr', 'sync_basis_every'), {'send': ('subspace',), 'basis': ('learned', 'rotated')}),
         'topk': {'send': ('topk',)}, 'tflops': {'plan': (True,)},
         'link_mbps': {'plan': (False,)}, 'latency_ms': {'plan': (False,)}}

LOWEST = {**dict.fromkeys(('log_interval', 'eval_interval', 'eval_iters', 'batch_size', 'gradient_accumulation_steps',
                           'sync_every', 'timeout_s', 'max_skipped'), 1),
          **dict.fromkeys(('cp', 'sync_basis_every', 'warm_start', 'unplug_at', 'max_iters', 'warmup_iters', 'lr_decay_iters', 'vocab_size',
                           'sample_tokens', 'seed', 'grad_clip', 'learning_rate', 'min_lr', 'weight_decay', 'beta1',
                           'beta2', 'link_mbps', 'latency_ms', 'outer_lr', 'outer_momentum', 'tflops', 'basis_lr'), 0)}

MODEL_FLAGS = [f.name for f in dataclasses.fields(GPTConfig) if f.name in {name for name, _, _ in FLAGS}]
# What a resumed run takes from its own command line rather than from the checkpoint
RUN_FLAGS = ('init_from', 'out_dir', 'eval_only', 'device', 'cp', 'compile', 'timeout_s', 'link_mbps', 'latency_ms')

CHECKPOINT = ('model', 'optimizer', 'config', 'model_args', 'iter_num', 'best_val_loss', 'seconds', 'outer')  # what it holds
START_S = 300  # seconds that ranks may start apart: a machine may still be reading its data
SAVE_S = 600  # seconds that writing a checkpoint may take


def fail(message):
    """End the run with one sentence, said once on every machine: its ranks all find the same fault."""
    if int(os.environ.get('LOCAL_RANK', 0)) > 0:
        time.sleep(2)  # torchrun stops all ranks as soon as one exits: let the first speak
        sys.exit(1)
    sys.exit(f'train.py: {message}')


def parse_bool(text):
    if text.lower() not in ('true', 'false', '1', '0'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return text.lower() in ('true', '1')


def load_checkpoint(path, keys=CHECKPOINT):
    """A checkpoint as `save_checkpoint` left it, on the CPU. Exits with a sentence if it is not one."""
    if not path.exists():
        fail(f'there is no {path} on this machine to resume from: change --init_from or --out_dir')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # whatever a damaged or foreign file makes of it
        fail(f'{path} is damaged or not a checkpoint ({type(e).__name__}): change --init_from or --out_dir')
    missing = [key for key in keys if key not in checkpoint] if isinstance(checkpoint, dict) else keys
    if missing:
        fail(f'{path} is not a checkpoint of this code, it has no {missing[0]!r}: change --init_from or --out_dir')
    return checkpoint


def parse_config(argv):
    """
    --key=value or --key value -> (the configuration, the checkpoint to resume from or None). Flags given win over
    the checkpoint's configuration, that over --method, that over --preset. Exits on anything unknown or pointless.
    """
    parser = argparse.ArgumentParser(prog='train.py', allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     description=__doc__.strip().split('\n')[0])
    parser.error = fail
    for name, default, meaning in FLAGS:
        boolean = dict(type=parse_bool, nargs='?', const=True, metavar='BOOL')
        value = dict(type=type(default), choices=CHOICES.get(name), metavar=name.upper())
        parser.add_argument('--' + name, help=f'{meaning} [{default}]'.replace('%', '%%'),
                            **(boolean if isinstance(default, bool) else value))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split('=')[0]
        near = difflib.get_close_matches(key.lstrip('-'), [name for name, _, _ in FLAGS], n=1, cutoff=0)
        fail(f'unknown argument {key}; the nearest flag is --{near[0]}')
    given, checkpoint, defaults = vars(given), None, {name: default for name, default, _ in FLAGS}
    config = dict(defaults)
    config.update(PRESETS[given.get('preset', config['preset'])])
    config.update(METHODS[given.get('method', config['method'])])
    path = Path(given.get('out_dir', config['out_dir'])) / 'ckpt.pt'
    how = given.get('init_from', config['init_from'])
    if how == 'resume' or how == 'auto' and path.exists():
        checkpoint = load_checkpoint(path)
        saved = {k: v for k, v in checkpoint['config'].items() if k not in RUN_FLAGS}
        older = [name for name in MODEL_FLAGS if name not in saved]
        if older:
            fail(f'--init_from={how}: {path} is of an older version of this code, which had no --{older[0]}')
        for name in ('wire_dtype', 'n_kv_head', 'n_ff', 'vocab_size'):  # whose default stands for what came of it
            if given.get(name) == defaults[name]:
                del given[name]
        for name in (*MODEL_FLAGS, 'preset', 'method'):
            if given.get(name, saved[name]) != saved[name]:
                fail(f'--{name}={given[name]} differs from the checkpoint, which has {saved[name]}')
        config.update(saved)
        warm_start = given.get('warm_start', saved['warm_start'])
        if saved['send'] == 'subspace' and warm_start < checkpoint['iter_num'] <= saved['warm_start']:
            fail(f"warm_start ({warm_start}) must be at least {checkpoint['iter_num']}, the checkpoint's iteration, as its warm start (of "
                 f"{saved['warm_start']}) is not over: change --warm_start")
    config.update(given)
    for name, needs in NEEDS.items():
        for flag, values in needs.items():
            if name in given and config[flag] not in values:
                fail(f'--{name} does nothing with --{flag}={config[flag]}: it needs --{flag}={" or ".join(map(str, values))}')
    for name, lowest in LOWEST.items():
        if not config[name] >= lowest:  # nan is not
            fail(f'{name} ({config[name]}) must be at least {lowest}: change --{name}')
    c = argparse.Namespace(**config)
    if 'exact_local' in given and c.send == 'full' and c.wire_dtype in ('auto', 'compute'):
        fail('--exact_local does nothing with --send=full and --wire_dtype=compute, where all is exact: change one of them')
    if not (c.beta1 < 1 and c.beta2 < 1):
        fail(f'beta1 ({c.beta1}) and beta2 ({c.beta2}) must be below 1: change --beta1 or --beta2')
    if c.method == 'paper' and c.send != 'subspace':
        fail(f'--method=paper sends subspaces, not --send={c.send}: leave out one of the two')
    if c.data == 'needle':
        for name in {'val_data', 'vocab_size'} & given.keys():
            fail(f'--{name} does nothing with --data=needle: leave out one of the two')
        if c.n_chunks % 2:
            fail(f'n_chunks ({c.n_chunks}) must be a multiple of 2 for --data=needle: change --n_chunks')
    if c.send != 'subspace' and 'warm_start' not in given and not checkpoint:
        c.warm_start = 0
    if c.warm_start and c.send == c.warm_send == 'full':
        fail(f'warm_start ({c.warm_start}) does nothing with --send=full and --warm_send=full: leave out --warm_start or --warm_send')
    for name in ('warm_send', 'warm_basis'):
        if name in given and not c.warm_start:
            fail(f'--{name} does nothing with --warm_start=0: raise --warm_start')
    if c.sync_basis_every > c.sync_every:
        fail(f'sync_basis_every ({c.sync_basis_every}) must be at most sync_every ({c.sync_every}): change one of them')
    for name in ('sync_basis_every', 'sync_dtype', 'outer_lr', 'outer_momentum'):
        if c.sync_every == 1 and given.get(name, defaults[name]) != defaults[name]:
            fail(f'--{name} does nothing with --sync_every=1, which averages gradients: raise --sync_every')
    if 0 < c.max_iters <= c.warm_start:
        fail(f'warm_start ({c.warm_start}) must be below max_iters ({c.max_iters}), or it never ends: '
             'change --warm_start or --max_iters')
    if c.unplug_at and not c.warm_start < c.unplug_at < c.max_iters:
        fail(f'unplug_at ({c.unplug_at}) must be between warm_start ({c.warm_start}) and max_iters ({c.max_iters}): '
             'change --unplug_at')
    return c, checkpoint


# -----------------------------------------------------------------------------
# Data: every source becomes a list of one-dimensional arrays of tokens, memory-mapped

def stdlib_files(out_dir):
    """
    train.bin and val.bin (every tenth file) of the Python standard library's source, made once and kept in the
    user's cache, or in out_dir if that cannot be written.
    """
    for folder in (Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mos_cp', Path(out_dir)):
        paths = [folder / f'stdlib-{sys.version.split()[0]}-{split}.bin' for split in ('train', 'val')]
        if all(p.exists() for p in paths):
            return paths
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            break
    root = Path(sysconfig.get_path('stdlib'))
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    files = sorted(p for p in root.rglob('*.py') if not skip & set(p.relative_to(root).parts))
    for split, path in enumerate(paths):
        text = b'\n'.join(p.read_bytes() for i, p in enumerate(files) if (i % 10 == 9) == split)
        part = path.with_suffix(f'.{os.getpid()}')  # every process may write it; the rename is atomic
        np.frombuffer(text, dtype=np.uint8).astype(np.uint16).tofile(part)
        os.replace(part, path)
    return paths


def read_tokens(path):
    """
    One file as an array of tokens: .bin with the header of the modded-nanogpt shards (256 int32: magic 20240520,
    version 1, number of tokens) or without (nanoGPT), both uint16; anything else as bytes.

    Raises ValueError if a .bin is not what its size or header says.
    """
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f'{path} is empty')
    if path.suffix != '.bin':
        return np.memmap(path, dtype=np.uint8, mode='r')
    if size % 2:
        raise ValueError(f'{path} has an odd number of bytes ({size}): it is not a file of uint16 tokens')
    header = np.fromfile(path, dtype=np.int32, count=3)
    if len(header) == 3 and header[0] == 20240520:
        if header[1] != 1 or header[2] < 1 or size != 1024 + 2 * header[2]:
            raise ValueError(f'{path} has header version {header[1]} and {header[2]} tokens, but must have version 1 '
                             f'and, by its size, {max(0, size - 1024) // 2} tokens')
        return np.memmap(path, dtype=np.uint16, mode='r', offset=1024)
    return np.memmap(path, dtype=np.uint16, mode='r')


def load_data(data, val_data='', out_dir='out'):
    """--data and --val_data -> (training shards, validation shards), lists of arrays. Raises ValueError."""
    def read_all(pattern):
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not paths:
            raise ValueError(f'no file matches {pattern!r}: change --data or --val_data')
        return [read_tokens(p) for p in paths]
    if data == 'stdlib':
        train, val = ([read_tokens(p)] for p in stdlib_files(out_dir))
        return train, read_all(val_data) if val_data else val
    shards = read_all(data)
    if val_data:
        return shards, read_all(val_data)
    return [s[:len(s) * 9 // 10] for s in shards], [s[len(s) * 9 // 10:] for s in shards]


def check_data(what, shards, block_size, vocab_size):
    """
    Raises ValueError if no shard holds block_size + 1 tokens, or a token is outside vocab_size (0: any will do).
    Returns the vocabulary of the data: the largest token + 1, for bytes 256 at least.
    """
    longest = max(map(len, shards))
    if longest <= block_size:
        raise ValueError(f'block_size ({block_size}) must be below the length of the {what} data ({longest} tokens in '
                         f'the longest part): change --block_size, --data or --val_data')
    largest = max(int(s.max()) for s in shards if len(s))
    if vocab_size and largest >= vocab_size:
        raise ValueError(f'the {what} data has token {largest}, outside vocab_size ({vocab_size}): change --vocab_size')
    return max([largest + 1] + [256 for s in shards if s.dtype == np.uint8])


def get_batch(shards, batch_size, block_size, rng):
    """Random windows, uniform over all starting points -> idx, targets (batch_size, block_size) int64."""
    ends = np.cumsum([max(0, len(s) - block_size) for s in shards])  # starting points up to the end of each shard
    rows = []
    for position in rng.integers(ends[-1], size=batch_size):
        shard = int(np.searchsorted(ends, position, side='right'))
        i = position - (ends[shard - 1] if shard else 0)
        rows.append(shards[shard][i:i + block_size + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows))
    return rows[:, :-1], rows[:, 1:]


N_VALUES = 8  # of a needle: chance is a loss of log(8) = 2.08


def needle_batch(batch_size, block_size, n_chunks, rng):
    """
    --data=needle: how far back can the model look things up? -> idx, targets (batch_size, block_size) int64.

    The first half of a sequence states facts, each a token of its own that says key and value; no key comes twice. The
    second half asks for each key once, and the target is its value; there are no other targets. What chunk i states is asked for,
    in another order, in chunk n_chunks - 1 - i: so every chunk of the second half looks back over one distance, and from its
    own chunk there is nothing to be learned.
    """
    n_keys, shape = block_size // 2, (batch_size, n_chunks // 2, block_size // n_chunks)
    keys = rng.permuted(np.broadcast_to(np.arange(n_keys), (batch_size, n_keys)), axis=1).reshape(shape)
    values = rng.integers(N_VALUES, size=shape)
    order = rng.permuted(np.broadcast_to(np.arange(shape[2]), shape), axis=2)
    asked, answers = (np.take_along_axis(t, order, axis=2)[:, ::-1] for t in (keys, values))
    x = np.concatenate((keys * N_VALUES + values, n_keys * N_VALUES + asked), axis=1)
    y = np.concatenate((np.full(shape, -1), answers), axis=1)
    return tuple(torch.from_numpy(t.reshape(batch_size, block_size)) for t in (x, y))


# -----------------------------------------------------------------------------
# Sizing a run before renting machines

def plan(c):
    """
    Markdown tables for one ring of c.cp ranks: bytes a rank receives in an iteration, how long they take on links of
    several speeds, and the tokens/s this allows, for this configuration beside others. All computed, nothing run.

    Raises ValueError if the configuration is not possible.
    """
    if c.cp == 1 or c.tflops <= 0:
        raise ValueError(f'--plan needs cp ({c.cp}) of at least 2, as one rank sends nothing, and tflops ({c.tflops:g}) above 0')
    P, links = c.cp or 8, {'50 Mbps': 50, '100 Mbps': 100, '300 Mbps': 300, '1 Gbps': 1000, '100 Gbps': 100_000}
    itemsize, n_sequences = {'float32': 4, 'float64': 8}.get(c.dtype, 2), c.batch_size * c.gradient_accumulation_steps
    full = dict(send='full', wire_dtype='compute', grad_wire_dtype='same')
    others = {'`--send=full`': full, '`--send=topk`': dict(full, send='topk'),
              '`--send=full`, int4 both ways': dict(full, wire_dtype='int4'),
              '`--method=paper`': dict(full, send='subspace', interleave=False, **METHODS['paper'], sync_basis_every=0),
              '**this configuration**': {}}
    if c.n_layer == 1:  # the paper leaves out the last layer
        del others['`--method=paper`']
    rows, compute = {}, 0.0
    for name, options in others.items():
        o = argparse.Namespace(**{**vars(c), 'vocab_size': c.vocab_size or 256, **options})
        config = GPTConfig(**{name: getattr(o, name) for name in MODEL_FLAGS})
        zigzag(config.n_chunks, P, 0)
        with torch.device('meta'):
            model = GPT(config)
        fwd, bwd = (n_sequences * (P - 1) * sum(bytes_) for bytes_ in
                    zip(*(m.wire_bytes(c.block_size // P, itemsize) for m in model.compressors)))
        bases = sum(p.nbytes for name, p in model.named_parameters() if 'compressor' in name)
        weights = sum(p.nbytes for p in model.parameters()) - bases
        weights /= 2 if o.sync_every > 1 and o.sync_dtype == 'bf16' else 1
        sync = 2 * (P - 1) / P * (weights / o.sync_every + bases / (o.sync_basis_every or o.sync_every))
        compute = compute or model.flops_per_token() * c.block_size * n_sequences / P / c.tflops / 1e12
        rows[name] = fwd, bwd, sync
    n_tokens, widest = n_sequences * c.block_size, max(map(len, rows))

    def table(head, cells):
        lines = [['', *head], ['---'] + ['---:'] * len(head), *([name, *row] for name, row in cells.items())]
        return '\n'.join('| ' + ' | '.join([line[0].ljust(widest), *line[1:]]) + ' |' for line in lines)

    def seconds(n_bytes, mbps):
        return n_bytes * 8e-6 / mbps
    all_full = sum(rows['`--send=full`'][:2])
    return '\n\n'.join((
        f'{P} ranks, {n_tokens:,} tokens an iteration, {itemsize} bytes a number; {compute:.2f} s of compute at {c.tflops:g} '
        'TFLOP/s a rank. MB that a rank receives in an iteration; sync: its share of the all-reduces of weights or gradients; '
        "own chunk: counted the paper's way, each rank's chunk once a pass, however many ranks need it:",
        table(('forward', 'backward', 'less than full', 'sync', 'own chunk'), {name: (
            f'{fwd / 1e6:,.1f}', f'{bwd / 1e6:,.1f}', f'{1 - (fwd + bwd) / all_full:.2%}', f'{sync / 1e6:,.1f}',
            f'{(fwd + bwd) / (P - 1) / 1e6:,.1f}') for name, (fwd, bwd, sync) in rows.items()}),
        'Seconds an iteration on the wire, ring + sync:',
        table(links, {name: [f'{seconds(fwd + bwd, mbps):,.2f} + {seconds(sync, mbps):,.2f}' for mbps in links.values()]
                      for name, (fwd, bwd, sync) in rows.items()}),
        'Tokens/s if the ring is wholly hidden under compute (if not at all); sync is never hidden; latency not counted:',
        table(links, {name: ['{:,.0f} ({:,.0f})'.format(*(n_tokens / (time + seconds(sync, mbps)) for time in (
            max(compute, seconds(fwd + bwd, mbps)), compute + seconds(fwd + bwd, mbps)))) for mbps in links.values()]
            for name, (fwd, bwd, sync) in rows.items()}),
        'To hide under compute, the ring may bring a rank at most ' + ', '.join(
            f'{compute * mbps / 8:,.1f} MB at {link} ({1 - compute * mbps * 1e6 / 8 / all_full:.2%} less than full)'
            for link, mbps in links.items() if mbps == 50 or compute * mbps * 1e6 / 8 < all_full) + '.'))


# -----------------------------------------------------------------------------
# Parts of a run

def pick_device(wanted, local_rank, local_world_size):
    """-> (torch.device, note or None). Exits if --device=cuda cannot be had."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == 'cpu' or wanted == 'auto' and n_gpus == 0:
        return torch.device('cpu'), None
    if n_gpus < local_world_size:
        if wanted == 'cuda':
            fail(f'--device=cuda needs a GPU per process: {local_world_size} processes on this machine, {n_gpus} GPUs')
        return torch.device('cpu'), f'running on CPU: {local_world_size} processes on this machine, {n_gpus} GPUs'
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank), None


def learning_rate(it, c):
    """Linear warm-up, then cosine decay to min_lr (nanoGPT's schedule)."""
    end = c.lr_decay_iters or c.max_iters
    if it < c.warmup_iters:
        return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
    if it >= end:
        return c.min_lr
    ratio = (it - c.warmup_iters) / max(1, end - c.warmup_iters)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (c.learning_rate - c.min_lr)


def load_optimizer(optimizer, state):
    """An optimizer's saved state, but not its options: those are this run's."""
    options = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    # before loading: whether it is fused decides on which device its steps are counted
    groups = [{**saved, **own} for saved, own in zip(state['param_groups'], options)]
    optimizer.load_state_dict({**state, 'param_groups': groups})


def save_checkpoint(path, checkpoint):
    """
    Written beside the old one and renamed: there is a whole checkpoint at every moment. Returns whether it worked; a full
    disk is said, and does not end the run.
    """
    temporary = path.with_suffix('.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError) as e:  # torch has its own words for a disk that is full
        temporary.unlink(missing_ok=True)
        print(f'train.py: could not write {path} ({str(e).splitlines()[0]}); the checkpoint before it is untouched', file=sys.stderr)
        return False


# -----------------------------------------------------------------------------
# The other ranks

def fingerprint(shards):
    """A number that differs if the data does."""
    crc = 0
    for s in shards:
        crc = zlib.crc32(np.ascontiguousarray(s), zlib.crc32(f'{len(s)} {s.dtype}'.encode(), crc))
    return crc


def agree(store, rank, world_size, facts):
    """
    Every rank must have the same `facts` {name: value}, or a run would go wrong in silence. Compared through the store,
    before there is any group. Exits with a sentence that names the first rank that differs, and in what.

    Returns the store as this start of the run has it to itself: torchrun keeps the store, with all that is in it, over restarts.
    """
    until = time.monotonic() + START_S
    try:
        store.set(f'facts/{rank}', f'{time.time_ns()} {json.dumps(facts)}')
        while True:  # until all have seen the same; what a rank of an earlier start has left there, nobody else sees
            said = [store.get(f'facts/{other}').decode() for other in range(world_size)]
            own = dist.PrefixStore(f'{zlib.crc32("".join(said).encode())}', store)
            own.set(f'seen/{rank}', '')
            if own.check([f'seen/{other}' for other in range(world_size)]):
                break
            if time.monotonic() > until:
                raise RuntimeError(f'no answer in {START_S} s')
            time.sleep(0.05)
        own.add('read', 1)
        while rank == 0 and own.add('read', 0) < world_size:  # rank 0 may be the one that keeps the store
            time.sleep(0.01)
    except RuntimeError as e:
        fail(f'rank {rank} did not hear from all {world_size} ranks at the start: {str(e).splitlines()[0]}')
    everyone = [json.loads(theirs.split(' ', 1)[1]) for theirs in said]
    for other, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                fail(f'rank {other} has {name} {value}, and rank 0 has {everyone[0][name]}: they must be the same')
    return own


def silent_ranks(rank, world_size, patience=3.0):
    """
    Ranks that do not say within `patience` seconds, through the store, that they too have given up waiting: those that are
    gone or stuck. (Whom a rank waited for need not be: it may itself have been waiting.)
    """
    store, silent = dist.distributed_c10d._get_default_store(), {0}  # if it does not answer: without torchrun, rank 0 keeps it

    def ask():
        nonlocal silent
        with suppress(RuntimeError):
            store.set(f'gave up/{rank}', '')
            while len(silent := {r for r in range(world_size) if not store.check([f'gave up/{r}'])}) > 1:
                time.sleep(0.05)
    thread = threading.Thread(target=ask, daemon=True)  # a frozen keeper keeps it waiting for ever: no timeout of the store applies
    thread.start()
    thread.join(patience)
    return sorted(silent)


# -----------------------------------------------------------------------------
# The run

def main(argv=None):
    """One training run. Returns a dict: iter_num, loss, val_loss, the log's records. Exits with 130 after Ctrl-C."""
    interrupted, before = [], signal.getsignal(signal.SIGINT)

    def note_interrupt(*_):
        interrupted.append(True)
        print('train.py: interrupted; this iteration is finished and saved first (once more: stop at once)', file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, before)  # the second Ctrl-C ends it at once
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there may a handler be set
    if in_main_thread:
        signal.signal(signal.SIGINT, note_interrupt)
    try:
        return run(argv, interrupted)
    except PeerError as e:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        silent = ' and '.join(map(str, silent_ranks(rank, world_size)))
        since = f'nothing was heard from rank {silent} since' if silent else 'all others have given up too'
        print(f'train.py: {e}; {since}', file=sys.stderr, flush=True)
        time.sleep(1)  # for the others to read the store
        os._exit(1)  # taking down groups whose members are gone can hang
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def run(argv, interrupted):
    """All of `main`. interrupted: a list that is no longer empty once Ctrl-C was pressed."""
    c, checkpoint = parse_config(sys.argv[1:] if argv is None else argv)
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    local_rank, local_world_size = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    master = rank == 0
    out_dir = Path(c.out_dir)
    if c.plan:
        try:
            print(plan(c))
        except ValueError as e:
            fail(e)
        return None

    # -- everything that can be wrong is found before the first byte is sent
    cp = c.cp or world_size
    if world_size % cp:
        fail(f'world size ({world_size}) must be a multiple of cp ({cp}): change --cp or --nproc_per_node')
    dp = world_size // cp
    if c.gradient_accumulation_steps % dp:
        fail(f'gradient_accumulation_steps ({c.gradient_accumulation_steps}) must be a multiple of dp, world size / cp '
             f'({dp}): change --gradient_accumulation_steps or --cp')
    try:
        if c.data == 'needle':
            train_data = val_data = None
            c.vocab_size = c.block_size // 2 * (N_VALUES + 1)
        else:
            train_data, val_data = load_data(c.data, c.val_data, out_dir)
            vocab_size = max(check_data('training', train_data, c.block_size, c.vocab_size),
                             check_data('validation', val_data, c.block_size, c.vocab_size))
            c.vocab_size = c.vocab_size or max(vocab_size, 256 if c.data == 'stdlib' else 0)
        config = GPTConfig(**{name: getattr(c, name) for name in MODEL_FLAGS})
        zigzag(config.n_chunks, cp, 0)
        if master or c.sync_every > 1:
            out_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(out_dir, os.W_OK):
                raise ValueError(f'out_dir ({out_dir}) cannot be written: change --out_dir')
    except ValueError as e:
        fail(e)
    except OSError as e:
        fail(f'{e.filename} cannot be read or made ({e.strerror}): change --data, --val_data or --out_dir')
    c.n_kv_head, c.n_ff, c.wire_dtype = config.n_kv_head, config.n_ff, config.wire_dtype  # 0 or auto stood for a default
    device, note = pick_device(c.device, local_rank, local_world_size)
    default = 'bfloat16' if device.type == 'cuda' else 'float32'
    dtype = getattr(torch, default if c.dtype == 'auto' else c.dtype)

    # -- groups: world = dp x cp; the ranks of a ring are neighbours and see the same sequences
    link = Link(c.link_mbps, c.latency_ms, handshake=device.type == 'cpu')  # of gloo
    ring, dp_rank = Ring(link=link), 0
    if world_size > 1:
        timeout, backend = timedelta(seconds=c.timeout_s), 'nccl' if device.type == 'cuda' else 'gloo'
        store, _, _ = next(dist.rendezvous('env://', timeout=timedelta(seconds=START_S)))
        facts = {f'--{name}': getattr(c, name) for name, _, _ in FLAGS if name not in ('out_dir', 'data', 'val_data')}
        store = agree(store, rank, world_size, {
            'torch': torch.__version__, 'WORLD_SIZE': world_size, 'device': device.type, **facts, 'a checkpoint of iteration':
            checkpoint and checkpoint['iter_num'], **({} if c.data == 'needle' else {
                'training data with checksum': fingerprint(train_data), 'validation data with checksum': fingerprint(val_data)})})
        if link.dialled and backend == 'nccl':
            backend = 'cpu:gloo,cuda:nccl'  # the dialled link keeps its books on the CPU
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout,
                                device_id=device if device.type == 'cuda' else None)
        group, _ = dist.new_subgroups(cp, timeout=timeout)
        ring, dp_rank = Ring(group, link), rank // cp

    # -- model and optimizer
    torch.manual_seed(c.seed)
    if dtype == torch.bfloat16:  # float32 is for comparing runs to the last digit
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    raw_model = GPT(config, ring).to(device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer = raw_model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2), device.type,
                                               c.basis_lr)
    iter_num, best_val_loss, seconds = 0, float('inf'), 0.0
    if checkpoint:
        try:
            raw_model.load_state_dict(checkpoint['model'])
            load_optimizer(optimizer, checkpoint['optimizer'])
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as e:
            fail(f'{out_dir / "ckpt.pt"} does not fit the model that its own flags describe ({str(e).split(":")[0]}): '
                 'change --init_from or --out_dir')
        iter_num, best_val_loss, seconds = (checkpoint[k] for k in ('iter_num', 'best_val_loss', 'seconds'))

    if world_size > 1:  # before the run proper: neither counted nor delayed
        with waiting('rank 0', 'the broadcast of the weights'):
            for tensor in raw_model.state_dict().values():
                dist.broadcast(tensor, 0)
    model = raw_model
    if c.compile:
        kernels.fuse()
        model = torch.compile(raw_model)
    params = [p for p in raw_model.parameters() if p.requires_grad]
    bases = [p for name, p in raw_model.named_parameters() if 'compressor' in name]
    weights = [p for name, p in raw_model.named_parameters() if 'compressor' not in name]
    anchors = [p.detach().clone() for p in weights] if c.sync_every > 1 else []  # the weights after the last sync
    outer = torch.optim.SGD(anchors, c.outer_lr, c.outer_momentum, nesterov=c.outer_momentum > 0) if anchors else None
    own_files = f'ckpt_rank{rank}.{{}}.pt'  # with sync_every > 1 every rank's AdamW has its own moments; {}: iter_num
    if outer and checkpoint and checkpoint['outer']:
        load_optimizer(outer, checkpoint['outer'])
        own_path = out_dir / own_files.format(iter_num)
        own = load_checkpoint(own_path, ('optimizer', 'world_size')) if own_path.exists() else {}
        if own.get('world_size') == world_size:
            load_optimizer(optimizer, own['optimizer'])
        elif rank:
            print(f"rank {rank}: {own_path} is missing or of another world size; going on with rank 0's AdamW moments", flush=True)
    checkpoint = None  # frees its memory
    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()

    # -- what a step is
    micro_steps = c.gradient_accumulation_steps // dp
    tokens_per_iter = c.gradient_accumulation_steps * c.batch_size * c.block_size

    def batch(shards, *seed):
        """One batch, this rank's part of it: a function of the seed alone, so iter_num is the place in the data."""
        rng = np.random.default_rng(seed)
        if c.data == 'needle':
            x, y = needle_batch(c.batch_size, c.block_size, c.n_chunks, rng)
        else:
            x, y = get_batch(shards, c.batch_size, c.block_size, rng)
        x, y = (ring.shard(t, config.chunk_size) for t in (x, y))
        if device.type == 'cuda':
            x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
        return x, y

    def train_batch(micro):
        return batch(train_data, 0, c.seed, iter_num, micro * dp + dp_rank)

    def mean_over_ranks(total, count):
        """Sum of losses and number of terms on this rank -> the mean over all ranks."""
        sums = torch.tensor([float(total), count], dtype=torch.float64, device=device)
        if world_size > 1:
            sum_over_ranks(sums, 'the average of losses')
        return (sums[0] / sums[1]).item()

    @torch.no_grad()
    def validate():
        """
        -> mean loss over eval_iters fixed batches, and that of each chunk of the sequence (None: no targets there). Every rank
        takes part, a ring cannot have idle members.
        """
        sums = torch.zeros(2, config.n_chunks, dtype=torch.float64, device=device)  # losses, number of targets
        mine = zigzag(config.n_chunks, cp, ring.rank)
        for k in range(dp_rank, c.eval_iters, dp):
            x, y = batch(val_data, 1, k)
            with autocast:
                losses = model(x, y, by_token=True)[1]  # (B, T / cp)
            sums[:, mine] += torch.stack((losses.double(), (y != -1).double())).unflatten(2, (len(mine), -1)).sum(dim=(1, 3))
        if world_size > 1:
            sum_over_ranks(sums, 'validation')
        total, count = sums.sum(dim=1).tolist()
        return total / count, [loss / n if n else None for loss, n in sums.T.tolist()]

    def start_bases():
        """The end of the warm start: every subspace begins in principal directions, of this iteration's batch."""
        if c.warm_basis == 'weights':
            moments = raw_model.basis_moments()
        else:
            with autocast:
                moments = [raw_model.basis_moments(train_batch(micro)[0]) for micro in range(micro_steps)]
            moments = [sum(ms) for ms in zip(*moments)]
        average(moments, ring)
        raw_model.set_bases(moments)
        # machines may differ in the last digit of an eigenvector
        broadcast([t for name, t in raw_model.state_dict().items() if name.endswith('U0')], ring)

    @torch.no_grad()
    def sync_weights():
        """
        Make the ranks' models one again: SGD on the mean of how far each has moved since the last time (DiLoCo, Douillard et
        al. 2023). With outer_lr 1 and no momentum that is the mean of the weights.
        """
        moved = [(anchor - p).to(torch.bfloat16 if c.sync_dtype == 'bf16' else p.dtype) for p, anchor in zip(weights, anchors)]
        average(moved, ring)
        for anchor, delta in zip(anchors, moved):
            anchor.grad = delta.to(anchor.dtype)
        outer.step()
        outer.zero_grad(set_to_none=True)
        torch._foreach_copy_(weights, anchors)
        average(bases, ring)

    def all_saved(what, saved):
        """Whether `saved` on all ranks. Through the store: a large file may take longer than a silent peer is waited for."""
        if world_size == 1:
            return saved
        keys = [f'{what} {iter_num}/{other}' for other in range(world_size)]
        with waiting('all other ranks', 'saving a checkpoint'):
            store.set(keys[rank], str(saved))
            store.wait(keys, timedelta(seconds=SAVE_S))
            return all(store.get(key) == b'True' for key in keys)

    def save():
        """A checkpoint of this moment, by all ranks or by none: until ckpt.pt is in its place, all that the one before needs stays."""
        saved = not outer or save_checkpoint(out_dir / own_files.format(iter_num), {
            'optimizer': optimizer.state_dict(), 'world_size': world_size})
        saved = all_saved('own', saved)
        if saved and master:
            saved = save_checkpoint(out_dir / 'ckpt.pt', {
                'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'config': vars(c),
                'model_args': {name: getattr(c, name) for name in MODEL_FLAGS}, 'iter_num': iter_num,
                'best_val_loss': best_val_loss, 'seconds': seconds, 'outer': outer.state_dict() if outer else None})
        if all_saved('ckpt', saved) and outer:
            for path in set(out_dir.glob(own_files.format('*'))) - {out_dir / own_files.format(iter_num)}:
                path.unlink()

    def now():
        """Seconds on a clock, once a GPU has done what it was given."""
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def say(text):
        if master:
            tqdm.write(text)
            sys.stdout.flush()

    records, log_path = [], out_dir / 'log.jsonl'
    if master:
        kept = log_path.read_text().splitlines(keepends=True) if log_path.exists() and (iter_num or c.eval_only) else []
        kept = [line for line in kept if line.endswith('\n')]  # a killed run may have left half a line
        if not c.eval_only:  # what comes after the checkpoint will be written again
            kept = [line for line in kept if json.loads(line)['iter'] < iter_num]
        log_path.with_suffix('.tmp').write_text(''.join(kept))
        os.replace(log_path.with_suffix('.tmp'), log_path)

    def write(record):
        records.append(record)
        if master:
            try:
                with open(log_path, 'a') as f:
                    f.write(json.dumps(record) + '\n')
            except OSError as e:  # a full disk does not end the run
                print(f'train.py: could not write {log_path} ({e.strerror})', file=sys.stderr)

    if note:
        say(note)
    say(textwrap.fill(', '.join(f'{name}={getattr(c, name)}' for name, _, _ in FLAGS), 120, break_on_hyphens=False))
    say(f'{raw_model.get_num_params() / 1e6:.2f}M parameters; {world_size} process(es) = dp {dp} x cp {cp} on '
        f'{device.type}, {dtype}; attention by {kernels.attention_backend(device.type, dtype, config.head_dim)}; '
        f'{tokens_per_iter:,} tokens per iteration')

    # -- the loop
    meter, itemsize, first_iter, last_sync = ring.meter, dtype.itemsize, iter_num, iter_num
    # what this rank would receive in one iteration uncompressed: K and V; K and V again, and their gradients
    full_bytes = 3 * 2 * config.kv_dim * itemsize * c.n_layer * c.block_size // cp * (cp - 1) * c.batch_size * micro_steps
    gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), 0) * world_size
    received, sent_sync, received_sync, total_sync = 0, 0, 0, 0
    started, timed, loss, val_loss = seconds, (iter_num, seconds), None, None
    stopping, n_skipped, in_a_row = False, 0, 0
    bar = tqdm(total=c.max_iters, initial=iter_num, disable=not (master and sys.stderr.isatty()))
    while True:
        validating = iter_num % c.eval_interval == 0 or iter_num >= c.max_iters or c.eval_only
        ending_warm_start = iter_num == c.warm_start > 0 and c.send == 'subspace'
        start = time.perf_counter()
        meter.reset()
        if c.sync_every > 1 and iter_num > last_sync and (validating or ending_warm_start or stopping):
            sync_weights()  # one model, not one per rank, is analysed, validated and saved
            last_sync = iter_num
        if stopping:
            if not in_a_row:
                save()
            break
        if ending_warm_start:
            raw_model.set_send(c.warm_send)
            start_bases()
            received += meter.received_fwd
        # the compressor's life: warm start, on, unplugged
        raw_model.set_send(c.warm_send if iter_num < c.warm_start else 'full' if c.unplug_at and iter_num >= c.unplug_at else '')
        record = {'iter': iter_num}

        if validating:
            seconds += now() - start  # validating and saving do not count
            val_loss, record['val_loss_by_chunk'] = validate()
            record['val_loss'] = val_loss
            say(f'iter {iter_num}: val loss {val_loss:.4f}')
            best = val_loss < best_val_loss
            best_val_loss = val_loss if best else best_val_loss
            if not c.eval_only and iter_num > first_iter and math.isfinite(val_loss) and (best or c.always_save_checkpoint):
                save()
            start = time.perf_counter()

        sent_sync, received_sync = sent_sync + meter.sent_sync, received_sync + meter.received_sync
        meter.reset()  # of what this iteration sends over the ring, the start of the bases is no part
        if iter_num >= c.max_iters or c.eval_only:
            write(record)
            break

        # for the stochastic rounding; a function of the seed too, and not the same numbers on every rank
        torch.manual_seed(int(np.random.SeedSequence((c.seed, iter_num, rank)).generate_state(1)[0]))
        lr = learning_rate(iter_num, c)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']
        loss = 0.0
        for micro in range(micro_steps):
            x, y = train_batch(micro)
            with autocast:
                micro_loss = model(x, y)[1] / micro_steps
            micro_loss.backward()
            loss += micro_loss.detach()
        grads = [p.grad for p in params if p.grad is not None]
        # what all ranks must know of each: was it interrupted, is its loss or gradient not finite
        status = torch.stack((torch.tensor(float(len(interrupted)), device=device), 0 * loss)).to(grads[0])
        if c.sync_every == 1:
            average([*grads, status], ring)
            grad_norm = torch.nn.utils.get_total_norm(grads)
        else:
            grad_norm = torch.nn.utils.get_total_norm(grads)
            status[1] += 0 * grad_norm
            average([status], ring)
        n_interrupts, trouble = torch.stack((status[0], status[1] + grad_norm)).tolist()
        stopping, skipping = n_interrupts > 0, not math.isfinite(trouble)
        in_a_row = in_a_row + 1 if skipping else 0
        if skipping:  # all ranks do, and the data moves on
            n_skipped += 1
            say(f'iter {iter_num}: a loss or gradient is not finite, step skipped ({in_a_row} in a row)')
            if in_a_row == c.max_skipped:
                fail(f'no finite loss and gradient in {in_a_row} steps, up to iteration {iter_num}; the last checkpoint is from before '
                     'them: lower --learning_rate or raise --max_skipped')
        else:
            torch.nn.utils.clip_grads_with_norm_(params, c.grad_clip or float('inf'), grad_norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        iter_num += 1
        if c.sync_every > 1 and iter_num % c.sync_every == 0:
            sync_weights()
            last_sync = iter_num
        elif c.sync_every > 1 and c.sync_basis_every and iter_num % c.sync_basis_every == 0:
            average(bases, ring)
        bar.update()
        received += meter.received_fwd + meter.received_bwd
        sent_sync, received_sync = sent_sync + meter.sent_sync, received_sync + meter.received_sync

        logging = record['iter'] % c.log_interval == 0 or iter_num == c.max_iters
        if logging:
            loss = mean_over_ranks(loss, 1)
        seconds += (now() if logging else time.perf_counter()) - start
        if logging:
            dt = (seconds - timed[1]) / (iter_num - timed[0])
            timed = iter_num, seconds
            compression = 1 - (meter.received_fwd + meter.received_bwd) / full_bytes if full_bytes else None
            record.update(loss=loss, lr=lr, grad_norm=grad_norm.item(), tokens=iter_num * tokens_per_iter,
                          seconds=round(seconds, 3), sent_fwd=meter.sent_fwd, sent_bwd=meter.sent_bwd,
                          received_fwd=meter.received_fwd, received_bwd=meter.received_bwd, sent_sync=sent_sync,
                          received_sync=received_sync, compression=compression, skipped=n_skipped)
            total_sync, sent_sync, received_sync = total_sync + received_sync, 0, 0  # a line has all since the last one
            local_tokens = tokens_per_iter / world_size
            fwd, bwd = meter.received_fwd / local_tokens, meter.received_bwd / local_tokens
            text = (f'iter {record["iter"]}: loss {loss:.4f}, time {dt * 1000:.0f}ms, '
                    f'{tokens_per_iter / dt:,.0f} tok/s, wire {fwd:.0f} fwd + {bwd:.0f} bwd B/token')
            text += f', compression {compression:.1%}' if full_bytes else ' (ring of one)'
            if peak_flops:
                text += f', mfu {raw_model.estimate_mfu(tokens_per_iter / c.block_size, dt, peak_flops):.1%}'
            say(text)
        if len(record) > 1:
            write(record)
    bar.close()
    if stopping:
        say(f'interrupted before iteration {iter_num}: go on with --init_from=resume')
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(130)

    # -- what it came to
    n_iters = iter_num - first_iter
    if n_iters:
        say(f'{n_iters} iterations, {n_iters * tokens_per_iter:,} tokens in {seconds - started:.0f}s; '
            f'final loss {loss:.4f}, val loss {val_loss:.4f}')
        if full_bytes:
            say(f'received by rank 0 over the ring: {received / 1e6:,.1f} MB, with --send=full it would be '
                f'{n_iters * full_bytes / 1e6:,.1f} MB; besides, to keep the ranks in step: {(total_sync + received_sync) / 1e6:,.1f} MB')
        if device.type == 'cuda':
            say(f'peak memory on rank 0: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB')
    if dist.is_initialized():
        dist.destroy_process_group()
    if master and c.sample_tokens and not c.eval_only:
        if c.vocab_size != 256:
            say('no sample: --prompt is bytes, and the vocabulary is not')
        else:
            prompt = torch.tensor([list(c.prompt.encode() or b'\n')], device=device)
            with autocast:
                sample = raw_model.generate(prompt, c.sample_tokens, temperature=0.8, top_k=50)[0]
            say('--- sample\n' + bytes(sample.tolist()).decode(errors='replace'))
    return {'iter_num': iter_num, 'loss': loss, 'val_loss': val_loss, 'records': records, 'model': raw_model}


if __name__ == '__main__':
    main()
