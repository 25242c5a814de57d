"""How well dictionaries stand in for what they replace: reconstruction, sparsity, loss, and what chance would give."""
