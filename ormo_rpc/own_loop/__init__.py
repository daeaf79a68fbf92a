"""Training loops of a user's own: a script that joins a run with its model, and pushes the gradients that it computes."""
