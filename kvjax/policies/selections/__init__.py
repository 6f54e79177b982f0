"""Selection units: which entries survive, given scores and counts."""
