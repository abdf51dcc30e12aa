"""Enrollment: classifiers of new classes from their shots, without training."""
