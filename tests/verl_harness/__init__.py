"""What it takes to run verl itself on a CPU, for tests: nothing here is part of the product."""
