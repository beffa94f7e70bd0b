"""Models that read a text in both directions and write none: BERT and its kin. They embed, classify and rank."""
