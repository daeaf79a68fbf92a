"""The worker: from a `Reply` to a `Push`, and the evaluation of parameters."""
