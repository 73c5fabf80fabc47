"""A harness that runs verl itself on a CPU, for tests only."""
