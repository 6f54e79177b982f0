"""What a method must know of a model beforehand: directions of queries, scores and roles of heads."""
