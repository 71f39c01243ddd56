"""Measure fine-tuning: all parameters, LoRA, QLoRA and prompt tuning, with the same techniques."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxsys.bench import train
from jaxsys.bench.step import Task
from jaxsys.bench.techniques import Technique
from jaxsys.models.lm import LMConfig

# Name, method, and what the frozen weights are; QLoRA as the paper's grid has it, in 4 and 8 bits.
METHODS: dict[str, tuple[Any, Any]] = {
    "full": ("full", "full"),
    "lora": ("lora", "full"),
    "qlora": ("lora", "4bit"),
    "qlora8": ("lora", "int8"),
    "prompt": ("prompt", "full"),
}


def measure(
    model: str,
    config: LMConfig,
    methods: Sequence[str],
    techniques: Sequence[Technique],
    task: Task,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure a fine-tuning step by several methods under several techniques.

    Args:
      model: its name, for the rows.
      config: the model.
      methods: of `METHODS`; ``qlora`` quantises the frozen matrices whatever the technique says.
      techniques: how the step is run.
      task: batch, tokens and sizes; its method is set here.
      **options: of `train.measure`.

    Returns:
      Rows of kind ``finetune``.

    Reference: LoRA (arXiv 2106.09685); QLoRA (arXiv 2305.14314); prompt tuning (arXiv 2104.08691).

    >>> config = LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> rows = measure("tiny", config, ["prompt"], [Technique()], Task(tokens=8), runs=1,
    ...                memory=False)
    >>> rows[0]["kind"], rows[0]["trained_numbers"]
    ('finetune', 640)
    """
    rows = []
    for name in methods:
        method, weights = METHODS[name]
        chosen = [t if weights == "full" else replace(t, weights=weights) for t in techniques]
        own = list(dict.fromkeys(chosen))
        rows += train.measure(model, config, own, replace(task, method=method), **options)
    return rows
