"""What is known of the prompts in, rollouts per prompt out: values, the exact solver, policies."""
