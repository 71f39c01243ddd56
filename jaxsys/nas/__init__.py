"""Zero-cost architecture search: node-wise proxies, ParZC and DiffKendall (arXiv 2402.02105)."""
