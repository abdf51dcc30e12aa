"""Plots of a run, and the results of prediction."""
