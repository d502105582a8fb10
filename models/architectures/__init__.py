"""One file a model; :mod:`models.architectures.registry` lists them."""
