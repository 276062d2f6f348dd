"""Scripts that a benchmark starts as processes of their own; nothing imports them."""
