"""Data sets: episodes, support sets, ignore regions, K-shot splits, and checks of them."""
