"""Sequential recommenders in Flax, with what it takes to train, evaluate and compare them."""
