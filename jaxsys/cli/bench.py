"""`jaxsys bench`: where the time goes in training, fine-tuning and serving (arXiv 2311.03687)."""

from jaxsys.cli import bench_parts, bench_serve, bench_train

COMMANDS = {**bench_train.COMMANDS, **bench_serve.COMMANDS, **bench_parts.COMMANDS}
