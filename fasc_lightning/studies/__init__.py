"""Studies on top of everything: nothing imports them."""
