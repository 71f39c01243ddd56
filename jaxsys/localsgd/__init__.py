"""DreamDDP: partial local SGD with planned, overlapped synchronisation (arXiv 2502.11058).

``find_layers`` groups a model's leaves, ``plan_sync`` spreads them over a period, and
``partial_local_sgd`` is the step, for any loss and any optax optimiser; ``simulate`` runs it on
many workers in one process, and ``compare`` runs strategies side by side in real ones.
"""

from jaxsys.localsgd.codec import CODECS, codec_bytes, mean_over
from jaxsys.localsgd.compare import Comparison, compare
from jaxsys.localsgd.exchange import divergence
from jaxsys.localsgd.host import Overlapped, cut_loss, overlapped_local_sgd
from jaxsys.localsgd.layers import find_layers, layer_bytes
from jaxsys.localsgd.plan import SyncPlan, plan_sync, wait_s
from jaxsys.localsgd.plan_dp import schedule, schedule_many
from jaxsys.localsgd.profile import Profile
from jaxsys.localsgd.simulate import Simulation, mean_params, simulate
from jaxsys.localsgd.step import Algorithm, Due, Info, State, due, partial_local_sgd
from jaxsys.localsgd.strategy import Strategy, choose, make_plan, presets
from jaxsys.localsgd.supervise import Links
from jaxsys.localsgd.sweep import sweep
from jaxsys.localsgd.task import Task
from jaxsys.localsgd.wire import Wire

__all__ = [
    "CODECS",
    "Algorithm",
    "Comparison",
    "Due",
    "Info",
    "Links",
    "Overlapped",
    "Profile",
    "Simulation",
    "State",
    "Strategy",
    "SyncPlan",
    "Task",
    "Wire",
    "choose",
    "codec_bytes",
    "compare",
    "cut_loss",
    "divergence",
    "due",
    "find_layers",
    "layer_bytes",
    "make_plan",
    "mean_over",
    "mean_params",
    "overlapped_local_sgd",
    "partial_local_sgd",
    "plan_sync",
    "presets",
    "schedule",
    "schedule_many",
    "simulate",
    "sweep",
    "wait_s",
]
