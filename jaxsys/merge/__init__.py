"""Model merging: every common method, in memory and streamed over files, and Mediator.

References: arXiv 2203.05482, 2212.04089, 2306.01708, 2311.03099, 2406.11617, 2312.06795,
2403.19522, 2408.07990 (merging), 2502.04411 (Mediator).
"""

from jaxsys.merge.adapters import open_reference
from jaxsys.merge.artefact import Artefact, load_artefact, save_artefact
from jaxsys.merge.conflict import Conflicts, conflicts
from jaxsys.merge.contract import Blocks, Method
from jaxsys.merge.extract import extract_adapter
from jaxsys.merge.files import merge_files
from jaxsys.merge.in_memory import merge_tree
from jaxsys.merge.mediator import LayerChoice, Mediated, MediatorConfig, mediate
from jaxsys.merge.methods import METHODS
from jaxsys.merge.recipe_parse import parse_recipe, read_recipe
from jaxsys.merge.routed import Routed, Server, materialise

__all__ = [
    "METHODS",
    "Artefact",
    "Blocks",
    "Conflicts",
    "LayerChoice",
    "Mediated",
    "MediatorConfig",
    "Method",
    "Routed",
    "Server",
    "conflicts",
    "extract_adapter",
    "load_artefact",
    "materialise",
    "mediate",
    "merge_files",
    "merge_tree",
    "open_reference",
    "parse_recipe",
    "read_recipe",
    "save_artefact",
]
