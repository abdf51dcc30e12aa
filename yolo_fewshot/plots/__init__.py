"""Images that a run leaves to look at, and the results of prediction."""
