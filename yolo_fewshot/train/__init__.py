"""Training: the trainer, what each stage adds to it, and the guard that keeps it finite."""
