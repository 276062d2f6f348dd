"""What a run is made of, as plain data read from files."""
