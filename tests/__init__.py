"""Tests, against something independent: a slow reference, torch.optim, or numbers worked out by hand."""
