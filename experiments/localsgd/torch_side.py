"""The PyTorch half of `against_torch.py`: the same GPT-2, under DDP and under post-local SGD."""

import copy
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from jaxsys.data import TokenStream

Block = Callable[[int], list[float]]


def linear(weights: dict[str, np.ndarray], name: str) -> nn.Linear:
    """Make a linear layer; the checkpoint has [in, out], PyTorch [out, in]."""
    weight = torch.from_numpy(weights[f"{name}.weight"].T.copy())
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(torch.from_numpy(weights[f"{name}.bias"].copy()))
    return layer


def norm(weights: dict[str, np.ndarray], name: str, eps: float) -> nn.LayerNorm:
    """Make a layer normalisation from the checkpoint."""
    layer = nn.LayerNorm(len(weights[f"{name}.weight"]), eps=eps)
    layer.weight = nn.Parameter(torch.from_numpy(weights[f"{name}.weight"].copy()))
    layer.bias = nn.Parameter(torch.from_numpy(weights[f"{name}.bias"].copy()))
    return layer


class TorchBlock(nn.Module):
    """One transformer block of GPT-2, with PyTorch's fused attention."""

    def __init__(self, weights: dict[str, np.ndarray], name: str, n_head: int, eps: float):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = (norm(weights, f"{name}.ln_{i}", eps) for i in (1, 2))
        self.c_attn = linear(weights, f"{name}.attn.c_attn")
        self.c_proj = linear(weights, f"{name}.attn.c_proj")
        self.c_fc = linear(weights, f"{name}.mlp.c_fc")
        self.mlp_proj = linear(weights, f"{name}.mlp.c_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on [B, T, D]."""
        n_batch, n_tokens, width = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(n_batch, n_tokens, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(n_batch, n_tokens, width))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class TorchGPT2(nn.Module):
    """GPT-2 with tied embeddings; returns the loss."""

    def __init__(self, weights: dict[str, np.ndarray], n_layer: int, n_head: int, eps: float):
        super().__init__()
        self.wte = nn.Embedding.from_pretrained(
            torch.from_numpy(weights["wte.weight"].copy()), freeze=False
        )
        self.wpe = nn.Embedding.from_pretrained(
            torch.from_numpy(weights["wpe.weight"].copy()), freeze=False
        )
        self.blocks = nn.ModuleList(
            [TorchBlock(weights, f"h.{i}", n_head, eps) for i in range(n_layer)]
        )
        self.ln_f = norm(weights, "ln_f", eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Average the cross-entropy of each next token of [B, T+1]."""
        inputs = tokens[:, :-1]
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make AdamW with the hyperparameters of jaxsys' preset; decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def join(rank: int, workers: int, host: str, port: int, interface: str | None) -> Callable[[], Any]:
    """Join the process group over gloo, on one thread; returns a barrier."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group(
        "gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=workers
    )
    return dist.barrier


def contenders(job: dict[str, Any], rank: int) -> dict[str, Block]:
    """Build every contender of this side: name -> function that takes some steps.

    Args:
      job: what `against_torch.py` wrote: sizes, learning rate, period, and the file with the
        initial weights and the tokens.
      rank: this worker.

    Returns:
      Functions ``steps -> losses``, each of which goes on from where it stopped.
    """
    found = dict(np.load(job["data"]))
    tokens = found.pop("__tokens__")
    stream = TokenStream(
        tokens,
        batch=job["batch"],
        length=job["length"],
        process_id=rank,
        num_processes=job["workers"],
        seed=job["seed"],
    )
    start = TorchGPT2(found, job["n_layer"], job["n_head"], job["eps"])

    def block(model: nn.Module, optimizer: Any) -> Block:
        step = 0

        def take(steps: int) -> list[float]:
            nonlocal step
            losses = []
            for _ in range(steps):
                batch = torch.from_numpy(stream.batch_at(step)).long()
                optimizer.zero_grad(set_to_none=True)
                loss = model(batch)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                step += 1
            return losses

        return take

    alone = copy.deepcopy(start)
    ddp = DistributedDataParallel(copy.deepcopy(start))
    local = DistributedDataParallel(copy.deepcopy(start))
    # Every worker is a site of its own: between two averagings nothing is sent at all.
    state = PostLocalSGDState(
        process_group=None,
        subgroup=None,
        start_localSGD_iter=0,
        post_local_gradient_allreduce=False,
    )
    local.register_comm_hook(state, post_localSGD_hook)
    averaged = PostLocalSGDOptimizer(
        optim=adamw(local, job["lr"]),
        averager=PeriodicModelAverager(period=job["period"], warmup_steps=0),
    )
    return {
        "torch-compute": block(alone, adamw(alone, job["lr"])),
        "torch-ddp": block(ddp, adamw(ddp, job["lr"])),
        "torch-postlocal": block(local, averaged),
    }


def leave() -> None:
    """Leave the process group."""
    dist.destroy_process_group()
