"""Model merging: every common method, in memory and streamed over files, and Mediator.

References: arXiv 2203.05482, 2212.04089, 2306.01708, 2311.03099, 2406.11617, 2312.06795,
2403.19522, 2408.07990 (merging), 2502.04411 (Mediator).
"""

from jaxsys.merge.contract import Blocks, Method
from jaxsys.merge.in_memory import merge_tree
from jaxsys.merge.methods import METHODS

__all__ = ["METHODS", "Blocks", "Method", "merge_tree"]
