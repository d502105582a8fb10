"""Full ranking of the catalogue, and metrics of the ranks."""
