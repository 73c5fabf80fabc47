"""Rewards in, what is known of each prompt out: records, estimators, expected lengths."""
