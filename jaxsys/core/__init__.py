"""The foundation: trees, costs, timelines, measurements, graphs, compression, meshes, reports."""
