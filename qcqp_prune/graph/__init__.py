"""From a PyTorch module to its channel graph: what lives and dies together, and what it costs."""
