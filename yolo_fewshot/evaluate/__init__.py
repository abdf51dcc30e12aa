"""Evaluation: validation with base and novel AP, and the K-shot benchmark."""
