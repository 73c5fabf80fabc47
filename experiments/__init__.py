"""Experiments that compare policies without training a model; ``knapsack-rl experiment NAME`` runs them."""
