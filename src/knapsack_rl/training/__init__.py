"""The main job: train a language model with a rollout budget allocated by the knapsack, and compare policies."""
