"""From beliefs about prompts to rollouts per prompt: values, the exact solver, policies. Imports numpy only."""
