"""ScheInfer: inference with a CPU, an accelerator and the link between (arXiv 2411.15715).

Only the paper's abstract could be read. How modules are cut and tokens assigned is therefore our
reconstruction, marked as such where it stands.
"""
