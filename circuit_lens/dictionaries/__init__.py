"""Sparse dictionaries on a model's hook points: adapters, the check of a pair, attachment."""
