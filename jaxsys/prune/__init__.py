"""Prune language models after training, with every common metric, and search for new ones.

>>> import jax.numpy as jnp
>>> from jaxsys import prune
>>> found = prune.prune_linear(
...     jnp.array([[1.0, -3.0]]), prune.Stats(), prune.Method("magnitude"), prune.Pattern(0.5))
>>> found.weight.tolist()
[[0.0, -3.0]]
"""

from jaxsys.prune.alps import alps
from jaxsys.prune.blocks import Blocks, block_gradients, dense_stats, lm_blocks
from jaxsys.prune.calibrate import calibration
from jaxsys.prune.compare import compare
from jaxsys.prune.dense import prune_dense
from jaxsys.prune.dsnot import dsnot
from jaxsys.prune.expression import Expression, parse
from jaxsys.prune.masks import block_mask, global_mask, matrix_mask, nm_mask, row_mask
from jaxsys.prune.methods import METHODS, Method, find_method, prune_linear
from jaxsys.prune.metrics import METRICS, Metric
from jaxsys.prune.patterns import Pattern, parse_pattern
from jaxsys.prune.permute import permute_channels
from jaxsys.prune.plan import PrunedBlock, layers_matching, memory_bytes
from jaxsys.prune.protocol import sequential
from jaxsys.prune.ratios import besa, owl
from jaxsys.prune.recover import keep_masks, masked, merge_masked, recover
from jaxsys.prune.run import load_pruned, prune_checkpoint
from jaxsys.prune.sparsegpt import reconstruct, sparsegpt
from jaxsys.prune.stats import Stats, collect, gradients
from jaxsys.prune.storage import SparseWeight, read_pruned, sparse_weight, write_pruned

__all__ = [
    "METHODS",
    "METRICS",
    "Blocks",
    "Expression",
    "Method",
    "Metric",
    "Pattern",
    "PrunedBlock",
    "SparseWeight",
    "Stats",
    "alps",
    "besa",
    "block_gradients",
    "block_mask",
    "calibration",
    "collect",
    "compare",
    "dense_stats",
    "dsnot",
    "find_method",
    "global_mask",
    "gradients",
    "keep_masks",
    "layers_matching",
    "lm_blocks",
    "load_pruned",
    "masked",
    "matrix_mask",
    "memory_bytes",
    "merge_masked",
    "nm_mask",
    "owl",
    "parse",
    "parse_pattern",
    "permute_channels",
    "prune_checkpoint",
    "prune_dense",
    "prune_linear",
    "read_pruned",
    "reconstruct",
    "recover",
    "row_mask",
    "sequential",
    "sparse_weight",
    "sparsegpt",
    "write_pruned",
]
