"""Language grounding with 3D objects: DA4LG and the published baselines (arXiv 2407.02846)."""
