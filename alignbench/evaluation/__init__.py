"""Evaluation of a policy: the same prompts and the same noise for every model that is compared."""
