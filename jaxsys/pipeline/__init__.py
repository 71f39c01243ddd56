"""FusionLLM: training in pieces over unequal devices and slow links (arXiv 2410.12707)."""
