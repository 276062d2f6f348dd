"""A trained model in fewer bytes."""
