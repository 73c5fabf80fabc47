"""Experiments behind the evidence page; ``python -m experiments NAME`` runs them."""
