"""SmolLM2-135M trained on one accelerator: arms of the comparison, and the cost of each part of a step.

``python -m experiments.accelerator`` measures on a machine with an accelerator and appends rows to a file; it needs
torch and transformers, no trainer. ``python -m experiments accelerator`` reads the rows. What was decided before the
first run is in ``registration.md``.
"""
