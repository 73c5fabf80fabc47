"""From rewards to beliefs about prompts: records, estimators, expected lengths."""
