"""Messages of Gloo's, over a pair of processes for each worker."""
