"""Runtime dissection: training, fine-tuning, serving, modules and operators (arXiv 2311.03687)."""
