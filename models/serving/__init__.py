"""Using a trained model: recommending, testing, exporting."""
