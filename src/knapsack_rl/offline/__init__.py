"""Without any engine: environments, simulation, dry runs on the reward logs of earlier runs."""
