"""Networks and losses: the few-shot head, the model, the loss terms and the criterion that adds them up."""
