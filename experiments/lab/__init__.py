"""Many short runs of a bare loop on tiny models: what allocation, advantage and shared knowledge do to learning.

``python -m experiments.lab REGISTRATION --rows FILE`` runs what a file in ``registrations/`` states and appends a row
per run. The loop is that of ``experiments.accelerator``; the beds are in ``beds``.
"""
