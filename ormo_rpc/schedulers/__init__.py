"""Communication schedulers: who is answered when."""
