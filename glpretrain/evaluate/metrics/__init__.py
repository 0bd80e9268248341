"""Metrics and their confidence intervals: numbers in, numbers out, without encoders or sources."""
