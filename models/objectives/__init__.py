"""Losses over queries and items, and the training objective of a model."""
